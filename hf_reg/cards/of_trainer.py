"""What `Trainer.push_to_hub` calls to make a card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


__all__ = ["create_model_card"]


def create_model_card(
    self: Any,
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
) -> None:
    """Write the card of this run into `args.output_dir`, on the first process; see [`~hf_reg.cards.write_card`].

    Args:
        language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_name:
            As in [`~transformers.Trainer`] and TRL: language, license and tags of the model, its name, the repository
            of its base, task on the Hub, ids and a name of the data.
        dataset_args: not used; for the signature.
        facts: fields of [`~hf_reg.cards.Facts`], such as `baseline={"accuracy": 0.71}`.
    """
    if not self.is_world_process_zero():
        return
    from . import write_card
    from .private import is_private

    if model_name and is_private(model_name):  # `Trainer` takes the name of the folder
        model_name = None
    task, data = ((one[0] if isinstance(one, list) and one else one) for one in (tasks, dataset))
    given: Mapping[str, Any] = {
        "language": language, "license": license, "tags": tags, "name": model_name, "base_model": finetuned_from,
        "pipeline_tag": task, "datasets": dataset_tags or dataset_name, "evaluated_on": data,
    }  # fmt: skip
    write_card(self.args.output_dir, self, **{key: value for key, value in given.items() if value}, **facts)
