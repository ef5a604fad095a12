"""DropBlock: spans and squares against slow loops, padding, grids, normalisation, the paper's schedule."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_reg import patch_model
from hf_reg.draws.blocks import keep_spans, keep_squares
from hf_reg.schedules import model_step
from hf_reg.seams.attention import gates

from .architectures import build, forward
from .properties import Case, check, lively, reseed, without_dropout


def slow_span(coins: list[float], block_size: int, rate: float) -> list[bool]:
    """One text of one channel, as the paper's algorithm in one dimension."""
    length = len(coins)
    block = min(block_size, length)
    gamma = rate * length / (block * (length - block + 1))
    keep = [True] * length
    for start in range(length - block + 1):
        if coins[start] < gamma:
            keep[start : start + block] = [False] * block
    return keep


@pytest.mark.parametrize("block_size", [1, 3, 7, 50])
def test_spans_equal_the_slow_loop_and_padding_does_not_matter(block_size: int) -> None:
    torch.manual_seed(0)
    lengths = [12, 5, 1, 9]
    coins = torch.rand(4, 12, 3)
    for side in ("right", "left"):
        real = torch.zeros(4, 12, dtype=torch.bool)
        for row, length in enumerate(lengths):
            real[row, :length] = True
        real = real.flip(1) if side == "left" else real
        keep = keep_spans(coins, real, block_size, 0.4)
        assert keep.shape == coins.shape and keep[~real].all()
        for row in range(len(lengths)):
            for channel in range(3):
                own = coins[row, real[row], channel].tolist()
                assert keep[row, real[row], channel].tolist() == slow_span(own, block_size, 0.4)
        assert not keep[real].all()


def test_no_span_reaches_over_a_gap() -> None:
    real = torch.tensor([[True, True, False, True, True, True]])
    keep = keep_spans(torch.zeros(1, 6, 1), real, 3, 0.5)[0, :, 0]
    assert keep.tolist() == [True, True, True, False, False, False]


@pytest.mark.parametrize("block_size", [1, 2, 3, 9])
def test_squares_equal_the_slow_loop(block_size: int) -> None:
    torch.manual_seed(0)
    side, coins = 5, torch.rand(4, 5, 5, 2)
    block = min(block_size, side)
    gamma = 0.3 * side**2 / (block**2 * (side - block + 1) ** 2)
    expected = torch.ones(4, 5, 5, 2, dtype=torch.bool)
    for b in range(4):
        for i in range(side - block + 1):
            for j in range(side - block + 1):
                for c in range(2):
                    if coins[b, i, j, c] < gamma:
                        expected[b, i : i + block, j : j + block, c] = False
    assert torch.equal(keep_squares(coins, block_size, 0.3), expected) and not expected.all()


def test_the_dropped_part_is_what_gamma_says() -> None:
    """P(token kept) = (1 - gamma)^(spans that may cover it); without overlaps the dropped part would be p."""
    torch.manual_seed(0)
    length, block, rate = 40, 4, 0.2
    keep = keep_spans(torch.rand(4000, length, 1), torch.ones(4000, length, dtype=torch.bool), block, rate)[..., 0]
    gamma = rate * length / (block * (length - block + 1))
    covering = torch.tensor([min(t, length - block) - max(t - block + 1, 0) + 1 for t in range(length)])
    torch.testing.assert_close(keep.float().mean(0), (1 - gamma) ** covering, atol=0.03, rtol=0)
    assert 0.8 < keep.float().mean() < 0.84  # overlaps: somewhat more than 1 - p is kept


def multiplied(model_type: str, seed: int = 0, **settings: object) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """What every branch is multiplied with, (B, T, C)."""
    tiny = build(model_type)
    model = patch_model(lively(without_dropout(tiny.model)).train(), "drop_block", **settings)  # type: ignore[arg-type]
    found: list[torch.Tensor] = []
    for gate in gates(model):

        def seen(states: torch.Tensor, gate: nn.Module = gate) -> torch.Tensor:
            ones = type(gate).transform(gate, torch.ones_like(states))  # type: ignore[attr-defined]
            found.append(ones.detach())
            return states * ones

        gate.transform = seen  # type: ignore[method-assign]
    reseed(seed)
    with torch.no_grad():
        forward(model, tiny.inputs)
    return found, tiny.pad_positions


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["bert", "llama", "deberta-v2"])
def test_padding_is_known_from_the_mask_that_attention_gets(model_type: str, implementation: str) -> None:
    """Padding is never dropped nor scaled, and the tokens' mean factor is count(M) / count_ones(M) over them alone."""
    tiny = build(model_type)
    if model_type != "deberta-v2":
        tiny.model.set_attn_implementation(implementation)
    padding = tiny.inputs["attention_mask"] == 0
    assert padding.any()
    model = patch_model(tiny.model.train(), "drop_block", p=0.5, block_size=2)
    for gate in gates(model):
        states = torch.ones(*padding.shape, 3)
        factors: list[torch.Tensor] = []
        gate.transform = lambda s, gate=gate, f=factors: (
            f.append(  # type: ignore[method-assign,misc]
                type(gate).transform(gate, torch.ones_like(s))
            )
            or s
        )
        forward(tiny, tiny.inputs)
        [factor] = factors
        assert (factor[padding] == 1).all() and states.shape[:2] == factor.shape[:2]
        inside = factor[~padding][:, 0]
        torch.testing.assert_close(inside.sum(), torch.tensor(float(len(inside))))
        assert (inside == 0).any() and len(inside.unique()) == 2


def test_channels_share_a_block_or_have_their_own() -> None:
    shared, _ = multiplied("gpt2", p=0.5, block_size=2)
    assert all((each == each[..., :1]).all() for each in shared)
    own, _ = multiplied("gpt2", p=0.5, block_size=2, channels="own")
    assert all((each != each[..., :1]).any() for each in own)
    for each in (*shared, *own):
        runs = (each[:, 1:-1] == 0) & (each[:, :-2] != 0) & (each[:, 2:] != 0)
        assert not runs.any(), "a span of one token"


@pytest.mark.parametrize(
    ("model_type", "leading"), [("vit", 1), ("deit", 2), ("dinov2_with_registers", 5), ("siglip_vision_model", 0)]
)
def test_squares_of_patches_spare_the_tokens_before_them(model_type: str, leading: int) -> None:
    found, _ = multiplied(model_type, p=0.5, block_size=2)
    dropped = False
    for each in found:
        assert (each[:, :leading] == 1).all()
        grid = each[:, leading:, 0].unflatten(1, (4, 4))
        dropped |= bool((grid == 0).any())
        for image in grid == 0:
            blocks = image[:-1, :-1] & image[1:, :-1] & image[:-1, 1:] & image[1:, 1:]
            covered = nn.functional.pad(blocks, (1, 1, 1, 1))
            covered = covered[:-1, :-1] | covered[1:, :-1] | covered[:-1, 1:] | covered[1:, 1:]
            assert torch.equal(covered, image), "dropped patches that are no squares of 2 x 2"
        torch.testing.assert_close(each[:, leading:].sum(), torch.tensor(float(each[:, leading:].numel())))
    assert dropped


def test_spans_of_patches_if_that_is_asked_for() -> None:
    found, _ = multiplied("vit", p=0.5, block_size=3, shape="span")
    assert any((each[:, 0] == 0).any() or (each == 0).any() for each in found)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("llama", {"channels": "own"}), ("bart", {"branch": "ffn"}), ("vit", {"shape": "span"})],
)
def test_other_settings_have_the_properties(model_type: str, settings: dict[str, str]) -> None:
    case = Case(model_type, "drop_block", build(model_type), {"p": 0.5, "block_size": 2, **settings})
    for name in ("rate_zero_is_identity", "gradients_kept", "checkpointing_repeats", "copies_are_independent"):
        assert check(case, name) is None, name


def test_the_linear_schedule_is_that_of_the_paper() -> None:
    model = patch_model(build("llama").model, "drop_block", p=0.2, schedule="linear")
    for step, rate in ((0, 0.0), (5, 0.1), (10, 0.2)):  # keep_prob falls from 1
        model_step(model, step, 10)
        assert {round(float(gate.rate), 6) for gate in gates(model)} == {rate}  # type: ignore[arg-type]


def test_compiles_in_one_graph() -> None:
    for model_type in ("llama", "vit"):
        tiny = build(model_type)
        settings = {} if model_type == "vit" else {"use_cache": False}
        model = patch_model(tiny.model.train(), "drop_block", p=0.5, block_size=2)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        one = compiled(**tiny.inputs, **settings)[0]
        assert not torch.equal(one, compiled(**tiny.inputs, **settings)[0])
        counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for gate in gates(model):
            gate.factor = 0.5  # type: ignore[attr-defined]
        compiled(**tiny.inputs, **settings)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted


def test_errors() -> None:
    llama, vit = build("llama").model, build("vit").model
    for settings, said in [
        ({"p": 1.0}, "p=1.0 is out of range"), ({"block_size": 0}, "block_size=0 must be a whole number"),
        ({"shape": "round"}, "shape='round' is not known"), ({"channels": "all"}, "channels='all' is not known"),
        ({"branch": "mlp"}, "branch='mlp' is not known"),
        ({"shape": "square"}, r"\(LlamaModel\) has no square grid of patches: its configuration has no image_size"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            patch_model(llama, "drop_block", **settings)
    vit.config.image_size = (64, 32)
    with pytest.raises(ValueError, match=r"image_size=\(64, 32\) in patches of 16 is no square. Use shape='span'"):
        patch_model(vit, "drop_block")
    with pytest.raises(ValueError, match="FSMTModel have tokens before examples"):
        patch_model(build("fsmt").model, "drop_block")
    clip = build("qwen2_vl_vision")
    with pytest.raises(ValueError, match=r"has no square grid|cannot be told apart"):
        forward(patch_model(clip.model.train(), "drop_block"), clip.inputs)
    tiny = build("vit")
    patch_model(tiny.model.train(), "drop_block")
    wide = torch.randn(2, 3, 64, 96)
    with pytest.raises(ValueError, match="25 tokens, 1 of them before the patches, are no square grid"):
        tiny.model(pixel_values=wide, interpolate_pos_encoding=True)


def test_a_branch_before_attention_is_refused_by_name() -> None:
    tiny = build("wav2vec2-conformer")  # an FFN, attention, an FFN
    patch_model(tiny.model.train(), "drop_block")
    with pytest.raises(ValueError, match="No self-attention has run before in this layer"):
        forward(tiny, tiny.inputs)
