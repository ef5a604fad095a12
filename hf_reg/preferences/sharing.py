"""Whether a model can compute each prompt once for both of its answers: asked of the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..messages import say
from ..patching import unwrap
from ..seams.attention import gates, install
from .collator import PreferenceCollator
from .layouts import Layout, padded, together


__all__ = ["Sharing"]

TRIAL = ((5, 4, 3), (3, 2, 5))  # tokens of prompt, chosen and rejected answer
TOLERANCES = {torch.float64: 1e-8, torch.float32: 2e-5}  # relative to the largest log-prob; elsewhere:
HALF_PRECISION = 3e-2


def _trial(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Two pairs made of the tokens of a batch, as different from each other as it has them."""
    tokens = batch["input_ids"].unique().tolist()
    rows, used = [], 0
    for lengths in TRIAL:
        row = {}
        for name, length in zip(("prompt_ids", "chosen_ids", "rejected_ids"), lengths, strict=True):
            row[name] = [tokens[index % len(tokens)] for index in range(used, used + length)]
            used += length
        rows.append(row)
    made = PreferenceCollator(tokens[0])(rows)
    return {name: tensor.to(batch["input_ids"].device) for name, tensor in made.items()}


def _window(config: Any) -> float:
    """The fewest tokens that a layer sees: of a window, a chunk, or those that sparse attention picks."""
    kinds = getattr(config, "layer_types", None)
    names = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    found = ["index_topk", *(names[kind] for kind in names if kinds is None or kind in kinds)]
    return min((getattr(config, name, None) or float("inf") for name in found), default=float("inf"))


class Sharing:
    """Lays out batches for one model: prompts shared where that gives its log-probs, which a first trial shows.

    Args:
        model (`nn.Module`): a causal language model, without the wrappers of distributed training.
        reason (`str`, *optional*): why prompts are not shared in this run.
    """

    def __init__(self, model: nn.Module, reason: str | None = None) -> None:
        self.model, self.reason = model, reason
        config: Any = getattr(unwrap(model), "config", None)
        self.config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self._share: Callable[[Mapping[str, torch.Tensor]], Layout | None] | None = None
        self._settled = False
        self._said: set[str] = set()

    @property
    def works(self) -> bool:
        """Whether the trial found a way to share prompts."""
        return self._share is not None

    def _candidates(self) -> Iterator[Callable[[Mapping[str, torch.Tensor]], Layout | None]]:
        implementation = str(getattr(self.config, "_attn_implementation", None))
        if implementation == "sdpa":
            install()
            yield partial(together, in_segments=True)
            yield together
        elif "flash" not in implementation:
            yield partial(together, dtype=next(self.model.parameters()).dtype)

    @torch.no_grad()
    def settle(self, batch: Mapping[str, torch.Tensor], values: Callable[[Any, Layout], torch.Tensor]) -> None:
        """Find out, with the tokens of a batch, which layout gives this model's log-probs; once.

        Args:
            values (`Callable`): log-probs (M,) of the tokens of answers, of a batch and its layout, in eval mode.
        """
        if self._settled:
            return
        self._settled = True
        trial, why = _trial(batch), "its attention takes no mask"
        expected = None
        for share in self._candidates() if self.reason is None else ():
            expected = values(trial, padded(trial)) if expected is None else expected
            try:
                layout = share(trial)
                assert layout is not None
                difference = float((values(trial, layout) - expected).abs().max() / expected.abs().max())
            except Exception as error:  # whatever a model makes of a mask that it does not know is the answer
                why = f"its forward fails ({type(error).__name__}: {str(error)[:120].partition(chr(10))[0]})"
                continue
            if difference <= TOLERANCES.get(next(self.model.parameters()).dtype, HALF_PRECISION):
                self._share = share
                return
            why = f"its log-probs would change by {difference:.1g} of the largest: not every layer is masked attention"
        self._say(self.reason or why)

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            say(
                f"{type(unwrap(self.model)).__name__} computes each prompt twice, for the chosen and the rejected "
                f"answer: {reason}."
            )

    def __call__(self, batch: Mapping[str, torch.Tensor]) -> Layout:
        """Where the tokens of a batch go."""
        layout = None
        if self._share is not None:
            length, window = batch["input_ids"].shape[1], _window(self.config)
            if length > window:
                self._say(f"{length} tokens are longer than its attention window of {window:.0f}")
            elif self.model.training and any(gate.enabled() for gate in gates(self.model)):
                self._say("patches act on a row as one example")
            else:
                layout = self._share(batch)
                if layout is None:
                    self._say("the rows of a batch are not filled up on the right")
        return padded(batch) if layout is None else layout
