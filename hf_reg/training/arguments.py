"""`RegularizedTrainingArguments`: what regularizes a run, as a command line or a YAML file can say it."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..base import check_choice, check_range


__all__ = ["RegularizedArguments", "RegularizedTrainingArguments"]

ON_NONFINITE = ("raise", "skip")
AVERAGES = ("items", "examples")


@dataclass
class RegularizedArguments:
    """The fields that regularization adds; a base beside the arguments of another trainer (`SFTConfig`, `DPOConfig`).

    Args:
        patches (`str` or `dict` or `list`, *optional*):
            What [`patch_model`] attaches: a name, `{name: settings}`, a list, or YAML text or file of one of these.
        penalties (`str` or `dict` or `list`, *optional*):
            Terms that join the loss: a name, `{name: weight}`, `{name: settings}`, a list, or YAML text or file.
        companions (`str` or `dict` or `list`, *optional*):
            What acts beside the optimizer ([`~hf_reg.optimizers.Companion`]): a name, `{name: settings}`, a list, or
            YAML text or file.
        on_nonfinite (`str`, *optional*, defaults to `"raise"`):
            A loss or a term that is not finite: `"raise"` reports it by name and stops, `"skip"` leaves that step out
            and counts it (`skipped_steps` in the logs). Our choice.
        gradient_shares (`bool`, *optional*, defaults to `False`):
            Log each term's share of the gradient norm (`share_<name>`) at logging steps; a backward pass for each.
        average_loss_over (`str`, *optional*, defaults to `"items"`):
            What the mean loss of a head that ignores `num_items_in_batch` is over: `"items"` (labels that are not
            -100) or `"examples"` (such as connectionist temporal classification).
        fused_loss (`bool`, *optional*):
            Compute the loss of a causal language model with a frozen head (any adapter) in one pass over chunks of
            positions, so that logits of all positions are never in memory: the same loss, terms and gradients, faster.
            `None`: where one of the penalties is on logits (BA-LoRA's three, the confidence penalty); `True`: without
            such penalties too; `False`: never. Where it is not possible, whole logits are used and the log says why.
        teacher_cache (`str`, *optional*):
            A folder that keeps the teacher's largest logits of each training example, for further epochs and runs with
            the same teacher and data. `consistency` then compares these and all others together, from the first
            epoch on: a lower bound, exact if `teacher_cache_top_k` is the size of the vocabulary.
        teacher_cache_top_k (`int`, *optional*, defaults to 64):
            How many logits of a position are kept; 8 bytes each. Our choice.
    """

    patches: dict | str | list | None = field(
        default=None, metadata={"help": "What patch_model attaches: a name, YAML text, or a YAML file."}
    )
    penalties: dict | str | list | None = field(
        default=None,
        metadata={"help": "Terms that join the loss: a name, YAML text such as 'l2_sp: 0.01', or a file."},
    )
    companions: dict | str | list | None = field(
        default=None,
        metadata={"help": "What acts beside the optimizer: a name, YAML text such as 'perp_grad', or a file."},
    )
    on_nonfinite: str = field(
        default="raise", metadata={"help": "raise or skip (and count) a step that is not finite."}
    )
    gradient_shares: bool = field(default=False, metadata={"help": "Log each term's share of the gradient norm."})
    average_loss_over: str = field(
        default="items", metadata={"help": "items (labels that are not -100) or examples: what a head's mean is over."}
    )
    fused_loss: bool | None = field(
        default=None,
        metadata={"help": "Loss of a causal language model without whole logits; None: with penalties on logits."},
    )
    teacher_cache: str | None = field(
        default=None, metadata={"help": "Folder that keeps the teacher's largest logits of each training example."}
    )
    teacher_cache_top_k: int = field(default=64, metadata={"help": "How many logits of a position are kept there."})

    def check_regularization(self) -> None:
        from ..recipes import read_recipe

        owner = type(self).__name__
        check_choice(owner, "on_nonfinite", self.on_nonfinite, ON_NONFINITE)
        check_choice(owner, "average_loss_over", self.average_loss_over, AVERAGES)
        check_range(owner, "teacher_cache_top_k", self.teacher_cache_top_k, 1, float("inf"))
        for name in ("patches", "penalties", "companions"):
            setattr(self, name, read_recipe(getattr(self, name)))


@dataclass
class RegularizedTrainingArguments(RegularizedArguments, TrainingArguments):
    __doc__ = (TrainingArguments.__doc__ or "") + (RegularizedArguments.__doc__ or "")

    def __post_init__(self) -> None:
        self.check_regularization()
        super().__post_init__()
