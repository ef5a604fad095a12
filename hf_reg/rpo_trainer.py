"""`RPOTrainer`: Regularized Preference Optimization (arXiv 2405.16436), and DPO, with everything that regularizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from .base import Gate
from .dropout.places import Map
from .messages import say
from .patching import unwrap
from .preferences import PreferenceCollator, prepare_preferences
from .preferences.arguments import RPOConfig
from .preferences.data import REFERENCE, PreferencePairs
from .preferences.layouts import model_inputs
from .preferences.precomputed import check_precomputing, precompute_reference
from .preferences.reference import Reference, refuse_head
from .preferences.trainer import PreferenceTrainer
from .tables import Shown
from .trainer import RegularizerMixin


__all__ = ["RPOConfig", "RPOTrainer"]


def _without_dropout(model: nn.Module) -> None:
    """Rate 0 for the model's and PEFT's dropout; its configuration and our patches are left alone."""
    for place in Map(unwrap(model)).places:
        setattr(place.owner, place.attribute, 0.0)
    for module in model.modules():
        if isinstance(module, _DropoutNd) and not isinstance(module, Gate):
            module.p = 0.0


def _stores_reference(dataset: Any) -> bool:
    first = dataset[0] if hasattr(dataset, "__getitem__") and len(dataset) and not isinstance(dataset, dict) else {}
    return isinstance(first, Mapping) and any(first.get(name) is not None for name in REFERENCE)


def _refuse(model: Any, args: RPOConfig, unknown: Mapping[str, Any]) -> None:
    for name, remedy in (
        ("compute_metrics", "evaluation reports rewards and log-probs; for more, override evaluation_loop"),
        ("compute_loss_func", "the loss is rpo_loss; add a term as a penalty: penalties={name: (weight, function)}"),
        ("model_init", "the reference belongs to one model; pass model"),
    ):
        if unknown.get(name) is not None:
            raise ValueError(f"RPOTrainer takes no {name}: {remedy}.")
    if not isinstance(args, RPOConfig):
        raise TypeError(f"RPOTrainer: args is {type(args).__name__}; expected RPOConfig, which names the loss.")
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"RPOTrainer: model is {type(model).__name__}; expected a model. Load it with "
            "AutoModelForCausalLM.from_pretrained(...)."
        )
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"RPOTrainer: {type(model).__name__} has an encoder; expected a causal language model.")
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            "RPOTrainer adds no load-balancing loss of experts. Set model.config.output_router_logits = False."
        )
    refuse_head(model)


class RPOTrainer(RegularizerMixin, PreferenceTrainer):
    """Trains a causal language model on pairs of answers, so that the better one of each becomes likelier.

    One forward over chosen and rejected answers, whose log-probs are computed a chunk of answer positions at a time,
    and one of the reference: the model with its adapter off, `ref_model`, or log-probs that the data brings. Logs
    show TRL's `rewards/*` and `logps/*`, and the two parts of the loss, `loss_dpo` and `loss_sft`.

    Args:
        model (`nn.Module`): a causal language model, or a `PeftModel` around one.
        args ([`RPOConfig`], *optional*): the loss (`print(args.formula)`), limits of the data, and a run's arguments.
        train_dataset, eval_dataset: rows for [`prepare_preferences`], with a length; several as a dict to evaluate on.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): the tokenizer.
        ref_model (`nn.Module`, *optional*): a reference of its own; needed where the whole model is trained, unless
            `args.precompute_reference` says that the model as it is given is the reference.
        penalties, patches, teacher: of [`RegularizerMixin`]. The reference runs without patches.
        kwargs: of [`~transformers.Trainer`].

    Raises:
        `ValueError`: without a reference, or where the base of the adapter was changed; for an adapted head and other
            things that cannot be combined; for data that cannot be used. `TypeError`: for arguments of another kind.

    Example:

    ```python
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(name), LoraConfig(target_modules="all-linear"))
    trainer = RPOTrainer(model, RPOConfig("out", learning_rate=1e-5), train_dataset=pairs, processing_class=tokenizer)
    trainer.train()
    ```
    """

    def __init__(
        self,
        model: Any = None,
        args: RPOConfig | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        ref_model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or RPOConfig()
        _refuse(model, args, kwargs)
        rows = train_dataset if train_dataset is not None else eval_dataset
        self._stored = _stores_reference(rows)
        early = args.precompute_reference
        if early:
            check_precomputing(args, self._stored, kwargs.get("data_collator"))
        self._unscored: dict[str, PreferencePairs] | None = {} if early else None  # what `_prepared` sees meanwhile
        reference = Reference(model, ref_model, self._stored, at_start=early)
        if args.disable_dropout:
            _without_dropout(model)
        self.processing_class, self.args = processing_class, args  # `_prepared` reads them
        kwargs.setdefault("data_collator", None)
        if kwargs["data_collator"] is None and processing_class is not None:
            kwargs["data_collator"] = PreferenceCollator(
                processing_class.pad_token_id, args.max_length, args.truncation_mode, args.pad_to_multiple_of
            )
        super().__init__(
            model=model, args=args, train_dataset=self._prepared(train_dataset, "train_dataset"),
            eval_dataset=self._prepared(eval_dataset, "eval_dataset"), processing_class=processing_class,
            reference=reference, **kwargs,
        )  # fmt: skip
        reference.refuse_patches()
        if self._unscored is not None:
            precompute_reference(self, self._unscored)
            self._unscored = None
        say(f"Loss: {args.formula}. Reference: {reference}.")

    @property
    def description(self) -> Shown:
        """What `describe` shows of it: the loss."""
        return self.args.description

    def _prepared(self, dataset: Any, name: str) -> Any:
        if dataset is None or isinstance(dataset, str):
            return dataset
        if isinstance(dataset, Mapping):
            return {key: self._prepared(value, f"{name}[{key!r}]") for key, value in dataset.items()}
        if not hasattr(dataset, "__len__"):
            raise ValueError(
                f"{name} is a stream ({type(dataset).__name__}) whose pairs cannot be counted. Give a list or a "
                "datasets.Dataset."
            )
        args: Any = self.args
        limits = args.max_length, args.max_prompt_length, args.truncation_mode
        pairs: PreferencePairs = dataset
        if not (isinstance(dataset, PreferencePairs) and dataset.limits == limits):
            pairs = prepare_preferences(
                dataset, self.processing_class, max_length=limits[0], max_prompt_length=limits[1],
                truncation_mode=limits[2], name=name,
            )  # fmt: skip
        if self._unscored is None and args.precompute_reference:
            return pairs  # with columns, or what the reference is asked for
        if pairs.stores_reference != self._stored:
            columns = " and ".join(REFERENCE)
            raise ValueError(
                f"{name} has {'' if pairs.stores_reference else 'no '}{columns}, other data of this run has "
                f"{'none' if pairs.stores_reference else 'them'}. Give the columns in every data set, or in none."
            )
        if self._unscored is not None:  # in pairs of our own: those that were given stay as they are
            pairs = PreferencePairs([dict(pair) for pair in pairs], limits, pairs.row_numbers)
            self._unscored[name] = pairs
        return pairs

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return super().get_eval_dataloader(self._prepared(eval_dataset, "eval_dataset"))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        return super().get_test_dataloader(self._prepared(test_dataset, "test_dataset"))

    # penalties and teachers see what a model takes, and the labels

    def _weighted_penalties(self, scaled: bool, inputs: Any, outputs: Any, batch: bool = True) -> Any:
        return super()._weighted_penalties(scaled, self._shown(inputs), outputs, batch)

    def _note_evaluation(self, inputs: Any, outputs: Any) -> None:
        super()._note_evaluation(self._shown(inputs), outputs)

    def _shown(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {**model_inputs(inputs), "labels": inputs["labels"]}
