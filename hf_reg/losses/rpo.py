"""RPO: a preference loss with a likelihood term on the chosen answer (arXiv 2405.16436), a function of log-probs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from ..base import check_choice


__all__ = ["DEFAULTS", "FORMULAS", "RPOLossOutput", "rpo_loss", "to_trl"]

FORMULAS = {
    "cumulative": "L = L_pref - eta * beta * mean_b( sum_t log pi(y_w,t) )",
    "average": "L = L_pref - eta * mean_b( mean_t log pi(y_w,t) )",
    "trl": "L = L_pref - eta * sum_bt log pi(y_w,t) / (number of chosen tokens in the batch)",
}
DEFAULTS = {  # beta, eta
    "cumulative": (0.01, 0.005),  # the authors' zephyr-7b-beta recipe
    "average": (0.5, 0.2),  # their OpenRLHF script, train_rpo.sh
    "trl": (0.01, 0.005),  # what TRL's index of papers recommends for this one; not the paper's loss
}
BASES = {
    "sigmoid": "-log sigmoid(beta h)",
    "hinge": "relu(1 - beta h)",
    "ipo": "(h - 1 / (2 beta))^2",
}
RPO_ALPHA = """rpo_alpha had a meaning of its own in each version of TRL, none of them this paper's. What it was:

| TRL | loss | here |
|---|---|---|
| 0.9.3 to 0.9.5 | alpha * DPO + mean of -log pi(y_w) / length | variant="average", eta=1/alpha (rate x alpha) |
| 0.9.6 to 0.9.x | alpha * DPO + mean of -log pi(y_w) over tokens | variant="trl", eta=1/alpha (rate x alpha) |
| 0.10 to 0.28 | DPO + alpha * mean of -log pi(y_w) over tokens | variant="trl", eta=alpha |
| 0.29 and later | gone: loss_type=["sigmoid", "sft"], loss_weights=[1, w] | variant="trl", eta=w |

Give variant= and eta= instead."""


@dataclass(frozen=True)
class RPOLossOutput:
    """What [`rpo_loss`] computed.

    Attributes:
        loss (`torch.Tensor` of shape `()`): the preference term plus the likelihood term, with its gradient.
        dpo (`torch.Tensor` of shape `()`): the preference term, a mean over the pairs.
        sft (`torch.Tensor` of shape `()`): the likelihood term with its coefficient, as it stands in `loss`.
        rewards_chosen, rewards_rejected (`torch.Tensor` of shape `(B,)`): beta * (policy - reference), detached.
        margins (`torch.Tensor` of shape `(B,)`): their difference.
        accuracies (`torch.Tensor` of shape `(B,)`): 1 where the chosen answer has the larger reward.
    """

    loss: torch.Tensor
    dpo: torch.Tensor
    sft: torch.Tensor
    rewards_chosen: torch.Tensor
    rewards_rejected: torch.Tensor

    @property
    def margins(self) -> torch.Tensor:
        return self.rewards_chosen - self.rewards_rejected

    @property
    def accuracies(self) -> torch.Tensor:
        return (self.margins > 0).to(self.margins.dtype)


def _check(beta: float, eta: float, label_smoothing: float, base: str, **log_probs: torch.Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in log_probs.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"rpo_loss: {found}: expected (B,) each, the log-probs of whole answers.")
    if not log_probs["policy_chosen"].numel():
        raise ValueError("rpo_loss: no pair in the batch. Leave the batch out.")
    if not 0 < beta < float("inf"):
        raise ValueError(f"rpo_loss: beta={beta} is out of range; give a finite beta > 0 (the paper: 0.01 to 0.05).")
    if not 0 <= eta < float("inf"):
        raise ValueError(f"rpo_loss: eta={eta} is out of range; give a finite eta >= 0, 0 for plain DPO.")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"rpo_loss: label_smoothing={label_smoothing} is out of range; give one in [0, 0.5).")
    if label_smoothing and base != "sigmoid":
        raise ValueError(f"rpo_loss: label_smoothing has no meaning with base={base!r}; leave it at 0.")


def _preference(h: torch.Tensor, beta: float, base: str, label_smoothing: float) -> torch.Tensor:
    if base == "hinge":
        return torch.relu(1 - beta * h)
    if base == "ipo":
        return (h - 1 / (2 * beta)).square()
    if not label_smoothing:
        return -logsigmoid(beta * h)
    return -logsigmoid(beta * h) * (1 - label_smoothing) - logsigmoid(-beta * h) * label_smoothing


def rpo_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    *,
    beta: float | None = None,
    eta: float | None = None,
    variant: str = "cumulative",
    lengths: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    base: str = "sigmoid",
    rpo_alpha: Any = None,
) -> RPOLossOutput:
    """Regularized Preference Optimization (arXiv 2405.16436; the authors' `rpo_trainer.py`).

    With h = log pi(y_w) / pi_ref(y_w) - log pi(y_l) / pi_ref(y_l), the preference term is
    mean_b(-log sigmoid(beta h)), and the likelihood term keeps the policy near the chosen answers:

    - `"cumulative"` (paper): - eta * beta * mean_b(sum_t log pi(y_w,t)): long answers weigh more;
    - `"average"` (its appendix F): - eta * mean_b(mean_t log pi(y_w,t)), not multiplied by beta;
    - `"trl"` (TRL's `"sft"`): - eta * the mean over all chosen tokens, which depends on how a batch is cut.

    Args:
        policy_chosen, policy_rejected, ref_chosen, ref_rejected (`torch.Tensor` of shape `(B,)`):
            Log-probs of the answers, summed over their tokens.
        beta (`float`, *optional*): `None`: 0.01 for `"cumulative"` and `"trl"`, 0.5 for `"average"`, as published.
        eta (`float`, *optional*): `None`: 0.005, and 0.2 for `"average"`, as published. 0 is DPO, bit for bit.
        variant (`str`, *optional*, defaults to `"cumulative"`): see above.
        lengths (`torch.Tensor` of shape `(B,)`, *optional*):
            Tokens of the chosen answers, for `"average"` and `"trl"`. An answer of 0 tokens adds 0, and counts.
        label_smoothing (`float`, *optional*, defaults to 0.0): probability that a pair is the wrong way round.
        base (`str`, *optional*, defaults to `"sigmoid"`):
            `"sigmoid"` (DPO), `"hinge"` (SLiC) or `"ipo"`, (h - 1 / (2 beta))^2 as in arXiv 2310.12036, equation 17
            (TRL divides both log-ratios by their lengths first).
        rpo_alpha: always refused, with a table of what it meant in TRL.

    Returns:
        [`RPOLossOutput`].

    Raises:
        `ValueError`: for shapes that do not fit, values out of range, missing lengths, and `rpo_alpha`.
    """
    if rpo_alpha is not None:
        raise ValueError(f"rpo_loss: {RPO_ALPHA}")
    check_choice("rpo_loss", "variant", variant, tuple(FORMULAS))
    check_choice("rpo_loss", "base", base, tuple(BASES))
    beta = DEFAULTS[variant][0] if beta is None else beta
    eta = DEFAULTS[variant][1] if eta is None else eta
    log_probs = {"policy_chosen": policy_chosen, "policy_rejected": policy_rejected}
    log_probs |= {"ref_chosen": ref_chosen, "ref_rejected": ref_rejected}
    _check(beta, eta, label_smoothing, base, **log_probs)
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    dpo = _preference(chosen - rejected, beta, base, label_smoothing).mean()
    rewards = (beta * chosen.detach(), beta * rejected.detach())
    if eta == 0:
        return RPOLossOutput(dpo, dpo, torch.zeros_like(dpo), *rewards)
    sft = _likelihood(policy_chosen, variant, beta, eta, lengths)
    return RPOLossOutput(dpo + sft, dpo, sft, *rewards)


def _likelihood(
    policy_chosen: torch.Tensor, variant: str, beta: float, eta: float, lengths: torch.Tensor | None
) -> torch.Tensor:
    if variant == "cumulative":
        return -eta * beta * policy_chosen.mean()
    if lengths is None or lengths.shape != policy_chosen.shape or bool((lengths < 0).any()):
        found = "none" if lengths is None else str(tuple(lengths.shape))
        raise ValueError(
            f"rpo_loss: variant={variant!r} divides by the number of chosen tokens; lengths: {found}, expected "
            f"{tuple(policy_chosen.shape)}, none below 0."
        )
    if variant == "average":
        return -eta * (policy_chosen / lengths.clamp(min=1)).mean()
    return -eta * policy_chosen.sum() / lengths.sum().clamp(min=1)


def to_trl(
    *,
    variant: str = "cumulative",
    beta: float | None = None,
    eta: float | None = None,
    mean_length: float | None = None,
) -> dict[str, Any]:
    """The fields of TRL's `DPOConfig` (1.x) whose loss is this one.

    Args:
        variant, beta, eta: see [`rpo_loss`].
        mean_length (`float`, *optional*):
            Mean number of chosen tokens. TRL's likelihood term is a mean over tokens, so `"cumulative"` is matched
            only on average, with the weight eta * beta * mean_length, and `"average"` only where lengths are equal.

    Raises:
        `ValueError`: for `"cumulative"` without `mean_length`.
    """
    check_choice("to_trl", "variant", variant, tuple(FORMULAS))
    beta = DEFAULTS[variant][0] if beta is None else beta
    weight = DEFAULTS[variant][1] if eta is None else eta
    if variant == "cumulative" and weight:
        if mean_length is None or not mean_length > 0:
            raise ValueError(
                "to_trl: TRL has no sum over tokens; give mean_length, the mean number of chosen tokens, to match "
                "'cumulative' on average (exactly, where all answers have that length)."
            )
        weight = weight * beta * mean_length
    if not weight:
        return {"beta": beta, "loss_type": ["sigmoid"]}
    return {"beta": beta, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, weight]}
