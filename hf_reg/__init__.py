"""Regularization for fine-tuning Hugging Face models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .adapters import BALoraConfig, SorsaConfig, get_regularized_peft_model
    from .checkpoints.loading import load_regularized
    from .checkpoints.verification import verify_checkpoint
    from .comparison import compare
    from .description import describe
    from .diagnosis import diagnose
    from .dropout import set_dropout
    from .hub import push_to_hub
    from .losses import rpo_loss
    from .patching import patch_model, patched, unpatch_model
    from .rpo_trainer import RPOConfig, RPOTrainer
    from .stopping import early_stopping
    from .trainer import RegularizedTrainer, RegularizerMixin
    from .training.arguments import RegularizedTrainingArguments

__version__ = "0.1.0"

_HOME = {
    "BALoraConfig": "adapters",
    "SorsaConfig": "adapters",
    "get_regularized_peft_model": "adapters",
    "compare": "comparison",
    "describe": "description",
    "diagnose": "diagnosis",
    "early_stopping": "stopping",
    "set_dropout": "dropout",
    "load_regularized": "checkpoints.loading",
    "patch_model": "patching",
    "rpo_loss": "losses",
    "RPOConfig": "rpo_trainer",
    "RPOTrainer": "rpo_trainer",
    "patched": "patching",
    "push_to_hub": "hub",
    "unpatch_model": "patching",
    "verify_checkpoint": "checkpoints.verification",
    "RegularizedTrainer": "trainer",
    "RegularizerMixin": "trainer",
    "RegularizedTrainingArguments": "training.arguments",
}
__all__ = [
    "BALoraConfig", "RPOConfig", "RPOTrainer", "RegularizedTrainer", "RegularizedTrainingArguments",
    "RegularizerMixin", "SorsaConfig", "compare", "describe", "diagnose", "early_stopping",
    "get_regularized_peft_model", "load_regularized", "patch_model", "patched", "push_to_hub", "rpo_loss",
    "set_dropout", "unpatch_model", "verify_checkpoint",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import hf_reg` costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
