"""What a comparison measures in each task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


__all__ = ["MEASURES", "TASK_FACTS", "TaskFacts"]

MEASURES = {  # of every task; all are better if lower
    "eval_loss": "held-out loss",
    "gap": "gap (held-out minus training loss)",
    "ece": "calibration error (ECE)",
    "drift": "forgetting (drift from the base)",
}


@dataclass(frozen=True)
class TaskFacts:
    """What a comparison needs to know of a task.

    Args:
        metrics (mapping): the task's own, and whether higher is better; the first one is what methods are judged by.
        text (tuple): the columns of the data whose texts are probes for forgetting.
        confidence (`str`, *optional*):
            Where a prediction's confidence is: in `"classes"` (logits and labels position by position), in the
            `"next"` token, or nowhere.
        language_model (`bool`): whether forgetting is that of next-token distributions; else of hidden states.
        label (`str`, *optional*): the column by whose values samples are stratified.
        classes (`str`, *optional*): the column with classes, or lists of them, that a small sample may not all have.
        adapters (tuple): methods of adapters that fit the task by default.
        objective (tuple):
            Arguments that say what the loss is. Losses are measured under the recipe's own, whatever a method trains
            with, or they could not be compared.
    """

    metrics: Mapping[str, bool]
    text: tuple[str, ...]
    confidence: str | None = None
    language_model: bool = False
    label: str | None = None
    classes: str | None = None
    adapters: tuple[str, ...] = ("sorsa",)
    objective: tuple[str, ...] = ()


CLASSES = {"accuracy": True, "macro_f1": True}
BOTH = ("sorsa", "balora")  # BA-LoRA compares logits with the pretrained model's, which new heads have none of

TASK_FACTS = {
    "sequence-classification": TaskFacts(CLASSES, ("text", "text_pair"), "classes", label="label", classes="label"),
    "token-classification": TaskFacts(CLASSES, ("tokens",), "classes", classes="tags"),
    "question-answering": TaskFacts({"f1": True, "exact_match": True}, ("question", "context")),
    "seq2seq": TaskFacts({"bleu": True, "chrf": True}, ("source",), "classes"),
    "causal-lm": TaskFacts({"perplexity": False}, ("text",), "next", language_model=True, adapters=BOTH),
    "preference": TaskFacts(
        {"rewards/accuracies": True, "rewards/margins": True},
        ("prompt", "chosen"),
        language_model=True,
        adapters=BOTH,
        objective=("variant", "beta", "eta", "base", "label_smoothing"),
    ),  # fmt: skip
}
