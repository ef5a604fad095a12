"""`strong_weight_decay`: a weight decay some thirty times the usual one, and what it amounts to in this run."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainingArguments

from ..base import check_range
from ..messages import say


__all__ = ["strong_weight_decay"]

USUAL = 0.1  # of pre-training, by the paper
DECOUPLED = (
    "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_anyprecision",
    "adamw_torch_4bit", "adamw_torch_8bit", "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit",
    "stable_adamw",
)  # fmt: skip


def strong_weight_decay(args: TrainingArguments, *, times: float = 30.0) -> dict[str, Any]:
    """Set `args.weight_decay` to `times` the usual 0.1, if the optimizer is a decoupled AdamW.

    From *Pre-training under infinite compute* (ICLR 2026): where data are few and epochs many, about 30 times the
    usual decay was best (up to 1.6 to 3.2), tuned together with learning rate and epochs, for models of 300M to 1.4B
    parameters that were *pre-trained* on 200M tokens. For fine-tuning that is not shown: decay pulls towards 0, not
    towards the pretrained weights ([`DecoupledL2SP`] does that). A third party that repeated it reports a run that
    diverged when the decay was halved from 1.6 to 0.8 at its learning rate: tune both together.

    In a step a weight shrinks by lr * weight_decay, so the learning rate counts as much as the decay. A log message
    says how much that is over the run, where its length is known (`max_steps`). Biases and norms are not decayed by
    `Trainer`. Call it before the trainer is made.

    Args:
        args ([`~transformers.TrainingArguments`]): changed in place, or left as they are when an error is raised.
        times (`float`, *optional*, defaults to 30.0): over the usual weight decay of 0.1; the paper's.

    Returns:
        `dict[str, Any]`: the arguments that were set.

    Raises:
        `ValueError`: for an optimizer whose decay is not known to be AdamW's, a weight decay that `args` name already,
            and a step that would shrink weights by half or more. `TypeError`: for other arguments.
    """
    if not isinstance(args, TrainingArguments):
        raise TypeError(f"strong_weight_decay expects TrainingArguments, got {type(args).__name__}.")
    check_range("strong_weight_decay", "times", times, 1, float("inf"))
    decay = times * USUAL
    optimizer = str(getattr(args.optim, "value", args.optim))
    if optimizer not in DECOUPLED:
        raise ValueError(
            f"strong_weight_decay: optim={optimizer!r} is not known to decay as AdamW does, apart from the gradient; "
            f"{decay:g} would mean something else there. Give one of {', '.join(DECOUPLED)}."
        )
    if args.weight_decay not in (0.0, decay):
        raise ValueError(
            f"strong_weight_decay sets weight_decay={decay:g}, but the arguments say {args.weight_decay:g}. Leave it "
            f"out there, or give times={args.weight_decay / USUAL:g}."
        )
    share = args.learning_rate * decay
    if share >= 0.5:
        raise ValueError(
            f"strong_weight_decay: learning_rate={args.learning_rate:g} times weight_decay={decay:g} is {share:g}: "
            "each step would take that part of every weight. Lower the learning rate, or `times`."
        )
    args.weight_decay = decay
    length = ""
    if args.max_steps > 0:
        length = f"; at a constant rate, {1 - math.exp(args.max_steps * math.log1p(-share)):.1%} over the run"
    say(
        f"weight_decay={decay:g}: a weight without gradient loses {share:.2g} of itself a step{length}. The setting "
        "is from pre-training on 200M tokens, tuned together with the learning rate."
    )
    return {"weight_decay": decay}
