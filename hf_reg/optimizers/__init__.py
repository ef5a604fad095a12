"""What acts beside the optimizer: on gradients before its step, on weights after it, and what belongs with these."""

from .companion import Companion
from .decoupled_l2_sp import DecoupledL2SP
from .gradient_dropout import GradientDropout, gradient_dropout
from .perp_grad import PerpGrad, perpendicular_
from .stablemax import StableMaxLoss, stablemax_log_probs
from .strong_decay import strong_weight_decay


__all__ = [
    "COMPANIONS", "Companion", "DecoupledL2SP", "GradientDropout", "PerpGrad", "StableMaxLoss", "gradient_dropout",
    "perpendicular_", "stablemax_log_probs", "strong_weight_decay",
]  # fmt: skip

COMPANIONS: dict[str, type[Companion]] = {cls.NAME: cls for cls in (PerpGrad, DecoupledL2SP, GradientDropout)}
