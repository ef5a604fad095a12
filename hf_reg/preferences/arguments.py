"""`RPOConfig`: the loss of a preference run and the limits of its data, as a command line can say it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from ..losses.rpo import BASES, DEFAULTS, FORMULAS, RPO_ALPHA, rpo_loss
from ..training.arguments import RegularizedTrainingArguments
from .data import check_limits
from .description import LossDescription


__all__ = ["RPOConfig"]

OWN_DOC = """
    Args:
        learning_rate (`float`, *optional*, defaults to 5e-7):
            As published, for full fine-tuning; adapters want a larger one (1e-5 or so).
        variant (`str`, *optional*, defaults to `"cumulative"`):
            How the log-probs of a chosen answer are normalised: `"cumulative"` (paper), `"average"` (its appendix F)
            or `"trl"`, see [`rpo_loss`]. The first two are means over the pairs of a whole step, however it is cut
            into micro-batches and processes; `"trl"`, like TRL's, is a mean over the tokens of each micro-batch.
        beta (`float`, *optional*): `None`: as published for the variant (0.01; 0.5 for `"average"`).
        eta (`float`, *optional*): `None`: as published for the variant (0.005; 0.2 for `"average"`). 0 is DPO.
        base (`str`, *optional*, defaults to `"sigmoid"`): the preference term: `"sigmoid"`, `"hinge"` or `"ipo"`.
        label_smoothing (`float`, *optional*, defaults to 0.0): probability that a pair is the wrong way round.
        max_length (`int`, *optional*, defaults to 1024): most tokens of prompt + answer; `None`: no limit.
        max_prompt_length (`int`, *optional*): most tokens of the prompt, 512 in the paper; `None`: no own limit.
        truncation_mode (`str`, *optional*, defaults to `"keep_start"`):
            `"keep_start"` cuts the end of the answer, `"keep_end"` the start of the prompt.
        pad_to_multiple_of (`int`, *optional*): fill the rows of a batch up to a multiple of this length.
        share_prompts (`bool`, *optional*, defaults to `True`):
            Compute each prompt once for both of its answers, where the model's attention allows it (a log message says
            where it does not): the same log-probs from fewer tokens, without padding.
        max_tokens_per_batch (`int`, *optional*):
            Fill each micro-batch with pairs up to this many tokens, in the place of `per_device_train_batch_size`
            pairs. A step is still a mean over all of its pairs.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Switch the policy's own dropout off, LoRA's included, as TRL does; patches stay. The reference never has
            any.
        precompute_reference (`bool`, *optional*, defaults to `False`):
            Compute the reference's log-probs once, before training, instead of in every step; `ref_model` is let go of
            then. A model that is trained as a whole may then be its own reference, as it is when the trainer is made.
        reference_cache (`str`, *optional*):
            A folder that keeps these log-probs for later runs, a file for each data set; implies
            `precompute_reference`. A file belongs to the reference's weights and configuration, to the precision it
            computes in, and to the token ids of all pairs, in their order and as they are cut: that is, to data,
            tokenizer, chat template and limits. Whatever else is changed, the file is read; else computed anew.
        rpo_alpha: refused, with a table of what it meant in TRL.
"""


@dataclass(repr=False)
class RPOConfig(RegularizedTrainingArguments):
    __doc__ = "Arguments of [`RPOTrainer`].\n" + OWN_DOC + (RegularizedTrainingArguments.__doc__ or "")

    learning_rate: float = field(default=5e-7, metadata={"help": "As published, for full fine-tuning."})
    variant: str = field(default="cumulative", metadata={"help": "cumulative (paper), average or trl."})
    beta: float | None = field(default=None, metadata={"help": "None: as published for the variant."})
    eta: float | None = field(default=None, metadata={"help": "None: as published for the variant. 0 is DPO."})
    base: str = field(default="sigmoid", metadata={"help": "Preference term: sigmoid, hinge or ipo."})
    label_smoothing: float = field(default=0.0, metadata={"help": "Probability that a pair is the wrong way round."})
    max_length: int | None = field(default=1024, metadata={"help": "Most tokens of prompt + answer."})
    max_prompt_length: int | None = field(default=None, metadata={"help": "Most tokens of the prompt."})
    truncation_mode: str = field(default="keep_start", metadata={"help": "keep_start or keep_end (of the prompt)."})
    pad_to_multiple_of: int | None = field(default=None, metadata={"help": "Fill rows up to a multiple of it."})
    share_prompts: bool = field(default=True, metadata={"help": "Compute a prompt once for both of its answers."})
    max_tokens_per_batch: int | None = field(default=None, metadata={"help": "Fill micro-batches up to it."})
    disable_dropout: bool = field(default=True, metadata={"help": "Switch the policy's own dropout off."})
    precompute_reference: bool = field(
        default=False, metadata={"help": "Compute the reference's log-probs once, before training."}
    )
    reference_cache: str | None = field(
        default=None, metadata={"help": "Folder that keeps these log-probs; implies precompute_reference."}
    )
    rpo_alpha: float | None = field(default=None, metadata={"help": "Refused: TRL's versions disagree on it."})

    def __post_init__(self) -> None:
        if self.rpo_alpha is not None:
            raise ValueError(f"RPOConfig: {RPO_ALPHA}")
        one = torch.ones(1)
        settings = {name: getattr(self, name) for name in ("beta", "eta", "variant", "base", "label_smoothing")}
        rpo_loss(one, one, one, one, lengths=one, **settings)
        self.beta = DEFAULTS[self.variant][0] if self.beta is None else self.beta
        self.eta = DEFAULTS[self.variant][1] if self.eta is None else self.eta
        self.precompute_reference |= self.reference_cache is not None
        check_limits(self.max_length, self.max_prompt_length, self.truncation_mode)
        super().__post_init__()
        for name, remedy in (
            ("label_smoothing_factor", "it smooths the labels of tokens; label_smoothing is for pairs"),
            ("use_liger_kernel", "it replaces the model's head, which is applied to the answers alone here"),
        ):
            if getattr(self, name):
                raise ValueError(
                    f"RPOConfig: {name}={getattr(self, name)!r} has no place here: {remedy}. Leave it out."
                )
        if getattr(self.accelerator_config, "dispatch_batches", None):
            raise ValueError(
                "RPOConfig: dispatch_batches=True would cut batches between chosen and rejected answers. Leave it out."
            )

    @property
    def formula(self) -> str:
        """The loss in symbols and numbers."""
        smoothed = f", label smoothing {self.label_smoothing}" if self.label_smoothing else ""
        return (
            f"RPO, variant {self.variant!r}: {FORMULAS[self.variant]}, with L_pref = mean_b( {BASES[self.base]} )"
            f"{smoothed}, h = log pi(y_w)/pi_ref(y_w) - log pi(y_l)/pi_ref(y_l), beta = {self.beta}, eta = {self.eta}"
        )

    @property
    def description(self) -> LossDescription:
        """What `describe` shows of it."""
        assert self.beta is not None and self.eta is not None
        return LossDescription(self.variant, self.base, self.beta, self.eta, self.label_smoothing, self.formula)

    def __str__(self) -> str:
        return f"{self.formula}\n{TrainingArguments.__str__(self)}"

    __repr__ = __str__
