"""TLM's masks against a slow loop written from the definition, and every fast path against each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_reg.patches.tlm import TLM, TLMGate, token_level_mask
from hf_reg.seams.masks import BlockView, TokenView
from hf_reg.seams.token_masks import HIDE, hide_tokens, hide_tokens_by_rows, token_mask_mod


def slow(allowed: torch.Tensor, selected: torch.Tensor, self_masked: torch.Tensor, hide: str) -> torch.Tensor:
    """METHODS 1.1, a cell at a time: `allowed` (B, Tq, Tk); the queries are the last keys."""
    batch, queries, keys = allowed.shape
    out = torch.zeros_like(allowed)
    for b in range(batch):
        chosen = [
            bool(selected[b, j]) and j >= keys - queries and bool(allowed[b, j - (keys - queries), j])
            for j in range(keys)
        ]
        for i in range(queries):
            me = i + keys - queries
            for j in range(keys):
                if chosen[me]:
                    sees = j != me if self_masked[b, me] else j == me
                else:
                    gone = {"selected": chosen[j], "siblings": chosen[j] and not self_masked[b, j], "none": False}[
                        hide
                    ]
                    sees = not gone
                out[b, i, j] = sees and allowed[b, i, j]
            if not out[b, i].any():
                out[b, i] = allowed[b, i]
    return out


def authors(padding: torch.Tensor, selected: torch.Tensor, self_masked: torch.Tensor) -> torch.Tensor:
    """The official function (METHODS 1.1), for text without padding; 1 = neither selected nor padding."""
    ordinary = (padding & ~selected).long()
    rows = []
    for b in range(len(padding)):
        for i in range(padding.shape[1]):
            if ordinary[b, i] == 1:
                rows.append(ordinary[b])
            else:
                own = torch.nn.functional.one_hot(torch.tensor(i), padding.shape[1])
                rows.append(1 - own if self_masked[b, i] else own)
    return torch.stack(rows).view(len(padding), 1, *padding.shape[1:] * 2).bool()


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, str]:
    """A mask of a kind that occurs, and a draw: padding on either side, causal, window, packed, prefix keys, or
    arbitrary."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, queries = draw(st.integers(1, 3)), draw(st.integers(1, 17))
    prefix = draw(st.sampled_from([0, 0, 3, 8]))
    keys = queries + prefix
    position, key = torch.arange(queries)[:, None] + prefix, torch.arange(keys)[None]
    lengths = torch.randint(1, queries + 1, (batch, 1, 1), generator=generator)
    kind = draw(st.sampled_from(["full", "right padding", "left padding", "causal", "window", "packed", "arbitrary"]))
    allowed = {
        "full": torch.ones(batch, queries, keys, dtype=torch.bool),
        "right padding": (key[None] < lengths + prefix).expand(batch, queries, keys),
        "left padding": (key[None] >= keys - lengths) & (key <= position)[None],
        "causal": (key <= position).expand(batch, -1, -1),
        "window": ((key <= position) & (key > position - 3)).expand(batch, -1, -1),
        "packed": ((key <= position) & (key // 5 == position // 5)).expand(batch, -1, -1),
        "arbitrary": torch.rand(batch, queries, keys, generator=generator) < 0.6,
    }[kind]
    rate = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    selected = torch.rand(batch, keys, generator=generator) < rate
    self_masked = torch.rand(batch, keys, generator=generator) < 0.5
    return allowed.contiguous(), selected, self_masked, draw(st.sampled_from(HIDE))


@settings(max_examples=150, deadline=None)
@given(problems())
def test_mask_equals_the_slow_loop(problem: tuple[torch.Tensor, torch.Tensor, torch.Tensor, str]) -> None:
    allowed, selected, self_masked, hide = problem
    expected = slow(allowed, selected, self_masked, hide)
    assert torch.equal(token_level_mask(allowed, selected, self_masked, hide=hide), expected)
    heads = allowed[:, None].expand(-1, 2, -1, -1)
    assert torch.equal(token_level_mask(heads, selected, self_masked, hide=hide), expected[:, None].expand_as(heads))


@settings(max_examples=150, deadline=None)
@given(problems())
def test_what_no_mask_may_do(problem: tuple[torch.Tensor, torch.Tensor, torch.Tensor, str]) -> None:
    allowed, selected, self_masked, hide = problem
    mask = token_level_mask(allowed, selected, self_masked, hide=hide)
    assert not (mask & ~allowed).any(), "attends to what the model hides"
    assert torch.equal(mask.any(-1), allowed.any(-1)), "a row became empty"
    prefix = allowed.shape[-1] - allowed.shape[-2]
    nothing = torch.zeros_like(selected)
    assert torch.equal(token_level_mask(allowed, nothing, self_masked, hide=hide), allowed)
    only_prefix = selected.clone()
    only_prefix[:, prefix:] = False
    assert torch.equal(token_level_mask(allowed, only_prefix, self_masked, hide=hide), allowed), (
        "a cached key was selected"
    )


@settings(max_examples=150, deadline=None)
@given(problems())
def test_rows_and_blocks_equal_the_dense_mask(problem: tuple[torch.Tensor, torch.Tensor, torch.Tensor, str]) -> None:
    allowed, selected, self_masked, hide = problem
    batch, queries, keys = allowed.shape
    view = TokenView(allowed[:, None], batch, queries, keys, allowed.device)
    real = view.real()
    assert real is not None
    selected[:, : view.offset] = False
    selected[:, view.offset :] &= real  # as the gate draws them
    dense = hide_tokens(allowed[:, None], selected, self_masked, hide)
    assert torch.equal(hide_tokens_by_rows(view, real, selected, self_masked, hide), dense)

    def given_mask(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return allowed[b, q, k]

    class Owner:
        pass

    blocks = BlockView(given_mask, batch, queries, keys, allowed.device, Owner())
    assert torch.equal(blocks.real(), real)
    from torch.nn.attention.flex_attention import and_masks, create_mask

    mod = and_masks(given_mask, token_mask_mod(blocks, selected, self_masked, hide))
    made = create_mask(mod, batch, 1, queries, keys, "cpu")
    rows = real[:, None, :, None]  # a row of padding may stay empty in flex attention, which then gives zeros
    assert torch.equal(made & rows, dense & rows)


@pytest.mark.parametrize("length", [1, 5, 8, 40])
def test_equals_the_authors_function_without_padding(length: int) -> None:
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        selected = torch.rand(3, length, generator=generator) < 0.3
        self_masked = torch.rand(3, length, generator=generator) < 0.5
        if length == 1:
            self_masked[:] = False  # theirs leaves a lone self-masked token with an empty row
        padding = torch.ones(3, length, dtype=torch.bool)
        allowed = padding[:, None, None, :].expand(-1, 1, length, -1)
        assert torch.equal(token_level_mask(allowed, selected, self_masked), authors(padding, selected, self_masked))


def test_truth_table() -> None:
    """Four tokens and one of padding; token 1 is siblings-masked, token 2 self-masked."""
    allowed = torch.tensor([True, True, True, True, False]).expand(1, 1, 5, 5)
    selected = torch.tensor([[False, True, True, False, True]])  # padding named: never selected
    self_masked = torch.tensor([[False, False, True, False, False]])
    rows = {
        "selected": ["10010", "01000", "11010", "10010", "10010"],
        "siblings": ["10110", "01000", "11010", "10110", "10110"],
        "none": ["11110", "01000", "11010", "11110", "11110"],
    }
    for hide, table in rows.items():
        expected = torch.tensor([[c == "1" for c in row] for row in table])
        assert torch.equal(token_level_mask(allowed, selected, self_masked, hide=hide)[0, 0], expected), hide


def test_bad_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"expected \(B, 1 \| H, Tq, Tk\)"):
        token_level_mask(torch.ones(2, 4, 4, dtype=torch.bool), torch.zeros(2, 5) > 0, torch.zeros(2, 5) > 0)
    with pytest.raises(ValueError, match="hide='all' is not known; choose one of 'selected', 'siblings', 'none'"):
        token_level_mask(
            torch.ones(2, 4, 4, dtype=torch.bool), torch.zeros(2, 4) > 0, torch.zeros(2, 4) > 0, hide="all"
        )


def drawn(patch: TLM, batch: int = 400, length: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    view = TokenView(None, batch, length, length, torch.device("cpu"))
    return TLMGate(patch).draw(view, None)


def test_rate_and_coins() -> None:
    selected, self_masked = drawn(TLM(rate=0.3))
    assert abs(selected.float().mean() - 0.3) < 0.01
    assert abs(self_masked[selected].float().mean() - 0.5) < 0.02, "given a selected token, the coin is fair"
    for coin, varies in (("example", True), ("batch", False)):
        _, self_masked = drawn(TLM(coin=coin))
        assert torch.equal(self_masked.any(1), self_masked.all(1)), "one coin an example"
        assert bool(self_masked.any() and not self_masked.all()) == varies
    assert not drawn(TLM(mode="siblings"))[1].any() and drawn(TLM(mode="self"))[1].all()
    assert abs(drawn(TLM(coin="batch"), batch=1)[0].float().mean() - 0.1) < 0.1


def test_expected_visible_columns() -> None:
    """An ordinary row sees each other token with probability 1 - rate (METHODS 7)."""
    view = TokenView(None, 200, 40, 40, torch.device("cpu"))
    gate = TLMGate(TLM(rate=0.2))
    torch.manual_seed(1)
    selected, self_masked = gate.draw(view, None)
    mask = hide_tokens_by_rows(view, None, selected, self_masked, "selected")[:, 0]
    ordinary = mask[~selected]
    assert abs(ordinary.float().mean() - (0.8 + 0.2 / 40)) < 0.01
