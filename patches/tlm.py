"""Token-level masking (TLM): hide random tokens from their neighbours, or from themselves, in every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from hf_reg.base import Patch, RateGate, check_choice, check_range
from hf_reg.seams.masks import BlockView, TokenView, refuse_backend
from hf_reg.seams.sparing import spare_tokens, takes_ids
from hf_reg.seams.token_masks import HIDE, hide_tokens, hide_tokens_by_rows, token_level_mask, token_mask_mod
from hf_reg.sites.attention import AttentionSite


__all__ = ["TLM", "token_level_mask"]


@dataclass(frozen=True)
class TLM(Patch):
    """Token-level masking: random tokens are hidden from their neighbours or themselves, in every self-attention.

    From *Token-Level Masking for Transformers* (EMNLP 2023, arXiv 2310.18738). In training, every layer selects each
    token with probability `rate`; a selected token is either *siblings-masked* (it attends to itself only) or
    *self-masked* (it attends to everything but itself). Evaluation is untouched. It *replaces* attention dropout, as
    in the authors' scripts, and is therefore faster than the default on backends that are slow with dropout.

    Args:
        rate (`float`, *optional*, defaults to 0.1):
            Probability that a token is selected in a layer, in [0, 1). 0.1 is the default of the authors' code; their
            RTE script uses 0.05. Their `masking_rate` is `1 - rate`.
        mode (`str`, *optional*, defaults to `"both"`):
            `"siblings"`, `"self"`, or `"both"` by a fair coin (the authors').
        coin (`str`, *optional*, defaults to `"token"`):
            Who shares a coin: every `"token"` its own (the authors' code), one an `"example"`, or one a `"batch"`.
        hide (`str`, *optional*, defaults to `"selected"`):
            Which selected tokens ordinary rows cannot see: all `"selected"` ones (the authors' code), only the
            `"siblings"`-masked ones (the wording of the paper), or `"none"`.
        spare_token_ids (sequence of `int`, *optional*, defaults to `()`):
            Ids that are never selected, such as `tokenizer.all_special_ids`. The authors select special tokens too.
        replace_dropout (`bool`, *optional*, defaults to `True`):
            Whether attention-probability dropout is off while TLM is on.
        layers, submodel, schedule: see [`Patch`].

    Where we deviate from the authors' code, and why:

    - padding is never selected and never attended to (theirs lets self-masked rows attend to padding);
    - a row never becomes empty (a causal self-masked first token keeps itself);
    - masked keys get the minimum score (their BART adds 0 / 1 to the scores, which masks nothing), and causal masks,
      windows and packed sequences stay as the model made them;
    - random numbers come from torch on the tensor's device, so a checkpointed or seeded run repeats them, and batches
      of one work (theirs draws Python's `random` once per row, and squeezes the batch away).
    """

    name: ClassVar[str] = "tlm"
    formula: ClassVar[str] = "softmax(Q K^T / sqrt(d) + M) V, M_ij = -inf where token j is hidden from token i"
    acts_on: ClassVar[str] = "self-attention"
    rate_field: ClassVar[str] = "rate"
    MODES: ClassVar[tuple[str, ...]] = ("siblings", "self", "both")
    COINS: ClassVar[tuple[str, ...]] = ("token", "example", "batch")

    rate: float = 0.1
    mode: str = "both"
    coin: str = "token"
    hide: str = "selected"
    spare_token_ids: tuple[int, ...] = ()
    replace_dropout: bool = True

    def __post_init__(self) -> None:
        check_range("tlm", "rate", self.rate, 0, 1)
        check_choice("tlm", "mode", self.mode, self.MODES)
        check_choice("tlm", "coin", self.coin, self.COINS)
        check_choice("tlm", "hide", self.hide, HIDE)
        object.__setattr__(self, "spare_token_ids", tuple(int(i) for i in self.spare_token_ids))
        super().__post_init__()

    def accepts(self, site: AttentionSite) -> bool:
        return not site.cross

    def check(self, model: nn.Module, site: AttentionSite) -> None:
        refuse_backend(self.name, site.implementation)
        if self.spare_token_ids:
            if site.kind != "interface":
                raise ValueError(
                    f"tlm: spare_token_ids cannot reach {site.path}, which has attention code of its own."
                )
            takes_ids(model, site.path)

    def gate(self, site: AttentionSite) -> TLMGate:
        return TLMGate(self)


class TLMGate(RateGate):
    """Draws the tokens of one layer and hides them."""

    patch: TLM
    hides = True

    def __init__(self, patch: TLM) -> None:
        super().__init__(patch)
        self.replaces_dropout = patch.replace_dropout

    def attach(self, model: nn.Module, site: AttentionSite) -> None:
        if self.patch.spare_token_ids:
            spare_tokens(model, site.path, self, self.patch.spare_token_ids)

    def draw(self, view: TokenView | BlockView, real: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """`selected` and `self_masked`, (B, Tk) bool each; padding, spared and cached tokens are never selected."""
        if self.patch.spare_token_ids and view.spared is None:
            raise RuntimeError(
                "tlm: the layers of this model do not hand keyword arguments on to their attention, so the tokens of "
                "spare_token_ids are not known there. Patch with spare_token_ids=()."
            )
        noise = torch.rand(view.batch, view.queries, device=view.device)
        selected = noise < self.rate
        for also in (real, None if view.spared is None else ~view.spared):
            if also is not None:
                selected = selected & also
        if self.patch.mode != "both":
            self_masked = torch.full_like(selected, self.patch.mode == "self")
        elif self.patch.coin == "token":
            self_masked = noise < self.rate / 2  # given that a token is selected, this is a fair coin
        else:
            coin = torch.rand(view.batch if self.patch.coin == "example" else 1, 1, device=view.device)
            self_masked = (coin < 0.5).expand_as(selected)
        if view.offset:
            pad = torch.nn.functional.pad
            return pad(selected, (view.offset, 0)), pad(self_masked, (view.offset, 0))
        return selected, self_masked

    def hide(self, view: TokenView) -> torch.Tensor:
        real = view.real()
        selected, self_masked = self.draw(view, real)
        allowed = view.allowed
        one_head = allowed is None or allowed.shape[1] == 1
        if one_head and view.device.type == "cpu" and not torch.compiler.is_compiling():
            return hide_tokens_by_rows(view, real, selected, self_masked, self.patch.hide)
        if allowed is None:
            allowed = torch.ones(1, 1, view.queries, view.keys, dtype=torch.bool, device=view.device)
        return hide_tokens(allowed, selected, self_masked, self.patch.hide)

    def hidden_tokens(self, view: TokenView) -> tuple[torch.Tensor, torch.Tensor, str]:
        return *self.draw(view, None), self.patch.hide

    def hide_blocks(self, view: BlockView) -> Callable[..., torch.Tensor]:
        selected, self_masked = self.draw(view, view.real())
        return token_mask_mod(view, selected, self_masked, self.patch.hide)
