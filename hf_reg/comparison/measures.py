"""What is measured on a trained model, without its training noticing: losses, metrics, calibration, forgetting."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..runs.errors import RunError
from ..runs.models import load_model, load_tokenizer
from .plan import Plan


__all__ = ["Base", "Bins", "Diverged", "evaluated", "penalty_shares"]

BINS = 10  # of confidence, of equal width
IGNORED = -100  # of the loss
AT_A_TIME = 16  # probes; we chose it
OF_A_RUN = ("runtime", "samples_per_second", "steps_per_second", "jit_compilation_time", "model_preparation_time")


class Diverged(RunError):
    """A training whose numbers are not finite: its settings do not work, whenever they are tried."""


@contextmanager
def _apart(trainer: Any, objective: Mapping[str, Any]) -> Iterator[None]:
    """Evaluations that are neither logged nor told to callbacks, draw no random number of the training, and are of the
    task's loss alone, without label smoothing."""
    trained_with = {name: getattr(trainer.args, name) for name in objective}
    kept = {name: getattr(trainer, name) for name in ("label_smoother", "compute_loss_func", "compute_metrics")}
    callbacks, training = trainer.callback_handler.callbacks, trainer.model.training
    trainer.callback_handler.callbacks = []
    trainer.label_smoother = trainer.compute_loss_func = None
    trainer.log = lambda *_, **__: None
    vars(trainer.args).update(objective)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        del trainer.log
        vars(trainer.args).update(trained_with)
        trainer.callback_handler.callbacks = callbacks
        for name, value in kept.items():
            setattr(trainer, name, value)
        trainer.model.train(training)


def evaluated(
    trainer: Any, further: Any, bins: Bins | None = None, objective: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, float]:
    """`train_loss` and `eval_loss`, in evaluation mode and of the task alone, and the metrics of the held-out data.

    Args:
        further (`Callable`): what follows from metrics, see [`Recipe.further_metrics`].
        bins ([`Bins`], *optional*): is filled from the held-out data.
        objective (mapping): arguments that say what the loss is, in place of those of the training.
    """
    with _apart(trainer, objective):
        watching = nullcontext() if bins is None else trainer.model.register_forward_hook(bins, with_kwargs=True)
        with watching:
            found = trainer.evaluate()
        found |= further(found)
        trainer.compute_metrics = None
        train = trainer.evaluate(trainer.train_dataset, metric_key_prefix="train")["train_loss"]
    numbers = {name.removeprefix("eval_"): float(value) for name, value in found.items() if name.startswith("eval_")}
    numbers = {name: value for name, value in numbers.items() if name not in OF_A_RUN}
    loss = numbers.pop("loss")
    numbers = {"train_loss": float(train), "eval_loss": loss, **numbers}
    if wrong := [name for name, value in numbers.items() if not math.isfinite(value)]:
        raise Diverged(f"{wrong[0]} is {numbers[wrong[0]]}: the training diverged. Give a smaller learning rate.")
    return numbers


class Bins:
    """How often the likeliest class, or token, is right, by its probability: ten bins of equal width. A forward hook,
    so that calibration takes no pass of its own.

    Args:
        kind (`str`): see [`TaskFacts`].
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.totals = torch.zeros(3, BINS, dtype=torch.float64)

    def __call__(self, model: nn.Module, args: Any, inputs: Any, output: Any) -> None:
        logits, labels = output.logits, inputs["labels"]
        if self.kind == "next":
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        counts = labels != IGNORED
        confidence, chosen = logits[counts].double().softmax(-1).max(-1)
        right = (chosen == labels[counts]).double()
        places = (confidence * BINS).long().clamp(max=BINS - 1).cpu()
        for row, values in zip(self.totals, (torch.ones_like(right), confidence, right), strict=True):
            row.index_add_(0, places, values.cpu())

    def lines(self) -> list[dict[str, float]]:
        """As `cells.jsonl` has them."""
        count, confidence, right = self.totals.tolist()
        return [
            {
                "low": index / BINS, "high": (index + 1) / BINS, "count": int(n),
                "confidence": confidence[index] / n if n else 0.0, "accuracy": right[index] / n if n else 0.0,
            }
            for index, n in enumerate(count)
        ]  # fmt: skip


def penalty_shares(trainer: Any) -> dict[str, float]:
    """The mean share of each penalty in the training loss, over all steps; those of weight 0 have none."""
    logs = [entry for entry in trainer.state.log_history if entry.get("loss")]
    names = [one.name for one in trainer.penalties if any(f"loss_{one.name}" in entry for entry in logs)]
    return {name: sum(entry.get(f"loss_{name}", 0.0) / entry["loss"] for entry in logs) / len(logs) for name in names}


@dataclass
class Base:
    """The pretrained model, and texts that nobody trains on.

    What a model forgets is how far it has drifted from the pretrained one on them. Of an encoder: 1 minus the cosine
    of the mean of the last hidden states over the tokens of a text, before and after, mean over texts (of an
    encoder-decoder: its encoder). Of a language model: the Kullback-Leibler divergence, in nats, of the distribution
    of the next token before from that after, mean over tokens.
    """

    model: nn.Module
    tokenizer: Any
    texts: Sequence[str]
    max_tokens: int
    language_model: bool

    @classmethod
    def load(cls, plan: Plan, texts: Sequence[str]) -> Base:
        from transformers import AutoModel, AutoModelForCausalLM

        recipe, language_model = plan.recipe, plan.facts.language_model
        model = load_model(AutoModelForCausalLM if language_model else AutoModel, recipe.model, True)
        most = getattr(recipe.data, "max_tokens", None) or recipe.train.get("max_length") or 512
        return cls(model.eval(), load_tokenizer(recipe.model), texts, most, language_model)

    def drift(self, model: nn.Module) -> float:
        """How far `model` has drifted.

        Args:
            model (`nn.Module`): what was fine-tuned, perhaps with an adapter.
        """
        model.eval()
        device = next(model.parameters()).device
        self.model.to(device)
        found = []
        with torch.inference_mode():
            for start in range(0, len(self.texts), AT_A_TIME):
                batch = self.tokenizer(
                    list(self.texts[start : start + AT_A_TIME]), truncation=True, max_length=self.max_tokens,
                    padding=True, return_tensors="pt",
                ).to(device)  # fmt: skip
                found.append(self._apart(batch, model).double().cpu())
        return float(torch.cat(found).mean())

    def _apart(self, batch: Any, model: nn.Module) -> torch.Tensor:
        mask = batch["attention_mask"].bool()
        if self.language_model:
            before, after = (one(**batch).logits[mask].double().log_softmax(-1) for one in (self.model, model))
            return (before.exp() * (before - after)).sum(-1)
        before, after = (_mean_state(one, batch, mask) for one in (self.model, model))
        return 1 - torch.nn.functional.cosine_similarity(before, after, dim=-1)


def _mean_state(model: Any, batch: Any, mask: torch.Tensor) -> torch.Tensor:
    """The mean of the last hidden states of each text; of shape `(B, H)`."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner = getattr(inner, inner.base_model_prefix, inner)
    if inner.config.is_encoder_decoder:
        inner = inner.get_encoder()
    states = inner(**{key: batch[key] for key in ("input_ids", "attention_mask")}).last_hidden_state.double()
    weights = mask.unsqueeze(-1)
    return (states * weights).sum(1) / weights.sum(1)
