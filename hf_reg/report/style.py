"""How every figure looks: colours that colour-blind readers can tell apart, and a line and a marker to each."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar


__all__ = [
    "COLOURS",
    "GREY",
    "LINES",
    "MARKERS",
    "drawn",
    "ends",
    "in_style",
    "legend_below",
    "looks",
    "picture",
    "plain",
    "sheet",
]

Arguments = ParamSpec("Arguments")
Made = TypeVar("Made")

# Okabe and Ito's (Color Universal Design, 2008) without the yellow, which cannot be read on white
BLUE, ORANGE, GREEN, PURPLE, VERMILLION, SKY, BLACK = COLOURS = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#000000",
)  # fmt: skip
GREY = "#767676"  # 4.5 : 1 on white
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p")
LINES = ("-", (0, (6, 2)), (0, (2, 1.2)), (0, (7, 2, 1.5, 2)), (0, (4, 1.5, 1, 1.5, 1, 1.5)))
LONGEST = 32  # characters of a label
# Fonts with Chinese, Japanese and Korean letters, which DejaVu Sans lacks: of Linux, Windows, macOS
CJK = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
    "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "PingFang HK", "Hiragino Sans", "Arial Unicode MS",
)  # fmt: skip

STYLE: dict[str, Any] = {
    "font.size": 10, "axes.titlesize": 10.5,
    "axes.labelsize": 10, "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9, "figure.titlesize": 11.5,
    "text.color": "#1a1a1a", "axes.labelcolor": "#1a1a1a", "xtick.color": "#1a1a1a", "ytick.color": "#1a1a1a",
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white", "axes.edgecolor": "#4d4d4d",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#e0e0e0", "grid.linewidth": 0.8, "legend.frameon": False, "lines.linewidth": 1.8,
    "lines.markersize": 5.5, "errorbar.capsize": 2.5, "axes.formatter.useoffset": False, "text.usetex": False,
    "svg.hashsalt": "hf_reg", "svg.fonttype": "path",  # the same figure is the same file, on every machine's fonts
}  # fmt: skip


@functools.cache
def _fonts() -> list[str]:
    """DejaVu Sans, which comes with matplotlib, and of `CJK` those that are installed, for letters that it lacks."""
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    return ["DejaVu Sans", *(name for name in CJK if name in installed)]


@contextmanager
def in_style() -> Iterator[None]:
    """matplotlib with our settings and none of the user's.

    Raises:
        `ImportError`: without matplotlib.
    """
    try:
        import matplotlib
        import matplotlib.figure  # noqa: F401  what a figure needs, and no window system
    except ImportError as error:
        raise ImportError('Figures need matplotlib: run `pip install "hf_reg[report]"`.') from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**STYLE, "font.family": _fonts()})
        yield


def drawn(function: Callable[Arguments, Made]) -> Callable[Arguments, Made]:
    """A function that draws: in our style, and a clear error without matplotlib."""

    @functools.wraps(function)
    def inside(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Made:
        with in_style():
            return function(*args, **kwargs)

    return inside


def sheet(width: float, height: float) -> Any:
    """An empty figure of a size in inches, which belongs to no window and to no list of open figures."""
    from .figure import Sheet

    return Sheet(width, height)


def looks(names: Sequence[str], reference: str | None = None) -> dict[str, dict[str, Any]]:
    """Colour, line and marker of each name: the reference black and solid, the others all different."""
    others = [name for name in names if name != reference]
    made = {
        name: {
            "color": COLOURS[i % (len(COLOURS) - 1)],
            "linestyle": LINES[1 + i % (len(LINES) - 1)],
            "marker": MARKERS[1 + i % (len(MARKERS) - 1)],
        }
        for i, name in enumerate(others)
    }
    if reference is not None:
        made[reference] = {"color": BLACK, "linestyle": LINES[0], "marker": MARKERS[0]}
    return made


def ends(row: Mapping[str, Any]) -> tuple[float, float]:
    """How far an interval reaches below and above its mean; not at all where there is none."""
    low, high = (row["mean"] if row.get(end) is None else row[end] for end in ("low", "high"))
    return max(row["mean"] - low, 0.0), max(high - row["mean"], 0.0)


def plain(text: object, longest: int = LONGEST) -> str:
    """A label as it is: of one line, of a length that fits, no formula, and not hidden from legends."""
    line = " ".join(str(text).split())
    line = line if len(line) <= longest else f"{line[: longest - 1]}…"
    return (f" {line}" if line.startswith("_") else line).replace("$", r"\$")


def legend_below(figure: Any, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Below all plots, in as many columns, up to three, as the longest label leaves room for."""
    column = 0.075 * max((len(label) for label in labels), default=0) + 0.6  # inches: letters of 9 points, and a line
    columns = min(max(int(figure.get_figwidth() / column), 1), 3)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def picture(figure: Any, kind: str, dpi: int = 150) -> bytes:
    """The bytes of a PNG or SVG; the same figure gives the same bytes. It is laid out once, for all its files."""
    file = io.BytesIO()
    with in_style():
        figure.savefig(file, format=kind, dpi=dpi, metadata={"Date": None} if kind == "svg" else {"Software": None})
    figure.set_layout_engine("none")
    return file.getvalue()
