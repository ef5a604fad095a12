"""BA-LoRA: LoRA from the principal singular triplets, with three penalties on the logits (arXiv 2408.04556)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_reg.base import Penalty, check_choice
from hf_reg.penalties import ba_lora

from .config import SvdAdapterConfig


__all__ = ["BALoraConfig"]

FORMS = {"CAUSAL_LM": "nlg", "SEQ_2_SEQ_LM": "nlg", "SEQ_CLS": "nlu"}  # of a task type


@dataclass
class BALoraConfig(SvdAdapterConfig):
    """BA-LoRA, *Bias-Alleviating Low-Rank Adaptation* (arXiv 2408.04556; version 6 is the text of ICLR 2026).

    LoRA whose factors start as in PiSSA, A = sqrt(S_r / s) V_r^T and B = U_r sqrt(S_r / s), with the initial product
    subtracted in `forward` instead of stored in the weights. So the model starts as the pretrained one, and is it
    whenever the adapter is off: the teacher of the consistency term is no second copy. [`RegularizedTrainer`] adds

    `L = L_task + lambda1 L_consistency + lambda2 L_diversity + lambda3 L_concentration`

    as [`ba_lora`](hf_reg/penalties/balora.py) defines them: for answer tokens of language models ("nlg"), or for the
    logits of classified examples ("nlu").

    Args:
        version (`str`, *optional*, defaults to `"iclr2026"`):
            `"iclr2026"` (version 6 of the paper) or `"v5"` (versions 3 to 5): other terms, other weights.
        form (`str`, *optional*):
            `"nlg"` or `"nlu"`; `None` takes that of `task_type`: CAUSAL_LM and SEQ_2_SEQ_LM, or SEQ_CLS.
        lambdas (list of three `float`, *optional*):
            Weights of the terms; `None`, the paper's: 0.025, 0.005, 0.005 for nlg and 0.15, 0.03, 0.03 for nlu (v5:
            1e-4, 3e-4, 1e-4).
        temperature (`float`, *optional*): of the consistency; `None`: 2 (v5: 1). For nlu 2 is not verified.
        top_k (`int`, *optional*): largest logits of a token whose entropy is kept up; `None`: 20, the paper's.
        k (`int`, *optional*): singular values that are concentrated; `None`: 10 for nlg, 5 for nlu (v5: 3).
        r, lora_alpha, target_modules, folded, svd_tolerance, svd_seed, svd_cache_dir, kwargs:
            see [`SvdAdapterConfig`](hf_reg/adapters/config.py). `folded=True` makes a pass with the adapter
            off, and so the teacher, dearer.

    Teacher logits that are needed in several epochs can be kept on disk: `RegularizedTrainingArguments(teacher_cache=
    folder)`.

    Raises:
        `ValueError`: for a setting out of range, or that this version and form have no use for, and for a `task_type`
            that says neither form.

    Example:

    ```python
    model = get_regularized_peft_model(model, BALoraConfig(r=16, task_type="CAUSAL_LM"))
    RegularizedTrainer(model=model, args=args, train_dataset=train).train()
    ```
    """

    METHOD: ClassVar[str] = "ba_lora"
    FORMULA: ClassVar[str] = "L = L_task + lambda1 L_consistency + lambda2 L_diversity + lambda3 L_concentration"
    HAS_VALUES: ClassVar[bool] = False

    version: str = field(default="iclr2026", metadata={"help": "iclr2026 or v5."})
    form: str | None = field(default=None, metadata={"help": "nlg, nlu or that of task_type."})
    lambdas: list[float] | None = field(default=None, metadata={"help": "Weights of the three terms."})
    temperature: float | None = field(default=None, metadata={"help": "Of the consistency."})
    top_k: int | None = field(default=None, metadata={"help": "Logits in the diversity of a token."})
    k: int | None = field(default=None, metadata={"help": "Singular values that are concentrated."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form is not None:
            check_choice("BALoraConfig", "form", self.form, ("nlg", "nlu"))
        elif self.task_type not in FORMS:
            raise ValueError(
                f"BALoraConfig: task_type={self.task_type!r} does not say which form the penalties take. Give "
                f"task_type (one of {', '.join(FORMS)}), or form='nlg' (tokens) or 'nlu' (classified examples)."
            )
        self.penalties("default", 1.0)  # says what is out of range

    def penalties(self, adapter_name: str, learning_rate: float) -> list[Penalty]:
        form = self.form or FORMS[self.task_type]
        settings: dict[str, Any] = {"lambdas": self.lambdas, "temperature": self.temperature}
        return list(ba_lora(form, version=self.version, top_k=self.top_k, k=self.k, **settings))
