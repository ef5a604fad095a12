"""What token-level masking hides from one example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..patches.tlm import TLM, TLMGate
from ..patching import make_patch
from ..seams.masks import TokenView
from .style import BLUE, ORANGE, PURPLE, drawn, plain, sheet


__all__ = ["tlm_mask"]

VISIBLE, NEVER, HIDDEN, SIBLINGS, SELF = range(5)
NAMED = {False: "#8a5f00", True: "#8e3b6d"}  # the orange and the purple, dark enough for text; True: self-masked
COLOURS = ("#ffffff", "#d4d4d4", BLUE, ORANGE, PURPLE)
SAID = (
    "may attend", "not visible without TLM either", "hidden: that token was selected",
    "hidden: this token sees itself only (siblings-masked)", "hidden: this token does not see itself (self-masked)",
)  # fmt: skip
MOST = 64  # tokens whose labels can be read


def _tokens(tokens: str | Sequence[str], tokenizer: Any) -> tuple[list[str], list[int] | None]:
    """Labels, and ids where a tokenizer made them."""
    if not isinstance(tokens, str):
        return [str(token) for token in tokens], None
    if tokenizer is None:
        raise ValueError("tlm_mask: a text needs a tokenizer=; or give its tokens as a list.")
    ids = tokenizer(tokens)["input_ids"]
    return tokenizer.convert_ids_to_tokens(ids), list(ids)


def _patch(patch: TLM | str | Mapping[str, Any]) -> TLM:
    made = TLM(**patch) if isinstance(patch, Mapping) else make_patch(patch)
    if not isinstance(made, TLM):
        raise ValueError(f"tlm_mask draws token-level masking; got the patch {made.name!r}.")
    return made


def _draw(patch: TLM, ids: list[int] | None, allowed: torch.Tensor, seed: int) -> tuple[torch.Tensor, ...]:
    """`selected` and `self_masked` (T), and what stays visible (T, T): of the gate, as a layer calls it."""
    tokens = allowed.shape[-1]
    spared = None
    if patch.spare_token_ids:
        if ids is None:
            raise ValueError("tlm_mask: spare_token_ids are ids: give the text and its tokenizer=, not labels.")
        spared = torch.tensor([[one in patch.spare_token_ids for one in ids]])
    gate = TLMGate(patch).train()
    view = TokenView(allowed, 1, tokens, tokens, torch.device("cpu"), spared=spared)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        selected, self_masked = gate.draw(view, view.real())
        torch.manual_seed(seed)
        visible = gate.hide(view)
    return selected[0], self_masked[0], visible[0, 0]


def _states(
    allowed: torch.Tensor, selected: torch.Tensor, self_masked: torch.Tensor, visible: torch.Tensor
) -> torch.Tensor:
    """(T, T): why each cell is as it is."""
    states = torch.full(visible.shape, HIDDEN)
    states[selected & ~self_masked] = SIBLINGS
    states[selected & self_masked] = SELF
    states[visible] = VISIBLE
    states[~allowed] = NEVER
    return states


@drawn
def tlm_mask(
    tokens: str | Sequence[str],
    patch: TLM | str | Mapping[str, Any] = "tlm",
    *,
    tokenizer: Any = None,
    causal: bool = False,
    padding: int = 0,
    seed: int = 0,
) -> Any:
    """Draw what one layer sees of one example in a training step under token-level masking.

    The gate of the patch draws it, from torch's stream with `seed`: a layer that draws first after `manual_seed(seed)`
    and sees this example alone has this very mask. Every layer and every step draws anew.

    Args:
        tokens (`str` or sequence of `str`): a text for `tokenizer`, or labels as they are; at most 64 tokens.
        patch ([`TLM`], `str` or `dict`, *optional*, defaults to `"tlm"`): its settings.
        tokenizer (*optional*): of transformers; splits the text as it does for the model, special tokens included.
        causal (`bool`, *optional*, defaults to `False`): whether a token sees only those before it, as in decoders.
        padding (`int`, *optional*, defaults to 0): how many of the last tokens are padding.
        seed (`int`, *optional*, defaults to 0): of the draw; torch's own stream stays as it is.

    Returns:
        `matplotlib.figure.Figure`: rows are queries, columns keys; the names of selected tokens are coloured.

    Raises:
        `ValueError`: for a text without tokenizer, too many tokens, or a patch that is another method.
        `ImportError`: without matplotlib.

    Example:

    ```python
    tlm_mask("a red ball is up".split(), {"rate": 0.3}).savefig("mask.png")
    ```
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch as Swatch

    made = _patch(patch)
    labels, ids = _tokens(tokens, tokenizer)
    count = len(labels)
    if not 0 < count <= MOST:
        raise ValueError(f"tlm_mask: {count} tokens; expected 1 to {MOST}, whose names can be read.")
    if not 0 <= padding < count:
        raise ValueError(f"tlm_mask: padding={padding} of {count} tokens; expected 0 to {count - 1}.")
    allowed = torch.ones(count, count, dtype=torch.bool)
    allowed[:, count - padding :] = False
    allowed = allowed.tril() if causal else allowed
    selected, self_masked, visible = _draw(made, ids, allowed[None, None], seed)
    states = _states(allowed, selected, self_masked, visible)

    side = 1.6 + 0.24 * max(count, 14)
    figure = sheet(side + 0.3, side + 1.5)
    figure.set_layout_engine("compressed")  # the grid is square
    axes = figure.subplots()
    axes.imshow(states.numpy(), cmap=ListedColormap(COLOURS), vmin=-0.5, vmax=len(COLOURS) - 0.5)
    axes.set_xticks(range(count), [plain(label, 14) for label in labels], rotation=90)
    axes.set_yticks(range(count), [plain(label, 14) for label in labels])
    for axis in (axes.get_xticklabels(), axes.get_yticklabels()):
        for text, chosen, own in zip(axis, selected.tolist(), self_masked.tolist(), strict=True):
            if chosen:
                text.set(color=NAMED[own], fontweight="bold")
    axes.set_xticks([i - 0.5 for i in range(count + 1)], minor=True)
    axes.set_yticks([i - 0.5 for i in range(count + 1)], minor=True)
    axes.grid(False)
    axes.grid(which="minor", color="#bdbdbd", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    axes.set(xlabel="key: what is looked at", ylabel="query: who looks")
    kinds = int(self_masked[selected].sum()), int(selected.sum())
    figure.suptitle(
        f"Token-level masking, rate {made.rate:g}: {kinds[1]} of {count - padding} tokens selected,\n"
        f"{kinds[1] - kinds[0]} siblings-masked and {kinds[0]} self-masked (one layer, seed {seed})"
    )
    present = [state for state in range(5) if (states == state).any()]
    swatches = [Swatch(facecolor=COLOURS[state], edgecolor="#8c8c8c", label=SAID[state]) for state in present]
    figure.legend(handles=swatches, loc="outside lower center", ncols=1)
    return figure
