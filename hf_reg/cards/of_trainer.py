"""What `Trainer` says of a card, in its own words, and what it calls to make one."""

from __future__ import annotations

from typing import Any


__all__ = ["card_facts", "create_model_card"]


def card_facts(
    language: str | list[str] | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | list[str] | None = None,
    dataset_tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    dataset_args: Any = None,
    dataset_name: str | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """Fields of [`~hf_reg.cards.Facts`] from the arguments of `Trainer.create_model_card`.

    Args:
        language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_name:
            As in [`~transformers.Trainer`] and TRL: language, license and tags of the model, its name, the repository
            of its base, task on the Hub, ids and a name of the data.
        dataset_args: not used; for the signature.
        facts: further fields, such as `baseline={"accuracy": 0.71}`.
    """
    from .private import is_private

    if model_name and is_private(model_name):  # `Trainer` takes the name of the folder
        model_name = None
    task, data = ((one[0] if isinstance(one, list) and one else one) for one in (tasks, dataset))
    given = {
        "language": language, "license": license, "tags": tags, "name": model_name, "base_model": finetuned_from,
        "pipeline_tag": task, "datasets": dataset_tags or dataset_name, "evaluated_on": data,
    }  # fmt: skip
    return {key: value for key, value in given.items() if value} | facts


def create_model_card(self: Any, *args: Any, **said: Any) -> None:
    """Write the card of this run into `args.output_dir`, on the first process; see [`~hf_reg.cards.write_card`].

    Args:
        args, said: of [`card_facts`].
    """
    if self.is_world_process_zero():
        from . import write_card

        write_card(self.args.output_dir, self, **card_facts(*args, **said))
