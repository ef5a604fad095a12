"""A card as text, and as a file that keeps what others wrote into it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ..files import replacing
from .checks import check_metadata
from .curve import draw_curve
from .facts import Facts, facts_of
from .metadata import merge_metadata, metadata_of
from .private import secrets_in
from .rendering import context_of


__all__ = ["BEGIN", "CURVE", "END", "FACTS", "card_of", "write_card"]

BEGIN, END = "<!-- hf_reg:begin -->", "<!-- hf_reg:end -->"
TEMPLATE = Path(__file__).parent.parent / "card_template.md"
README, CURVE, FACTS = "README.md", "learning_curve.png", "hf_reg_card.json"


def card_of(source: Any = None, **facts: Any) -> ModelCard:
    """The model card of a training: methods with formula and source, results, settings, limits, how to load it.

    Args:
        source (`Trainer`, `nn.Module`, folder or [`Facts`], *optional*): see [`facts_of`].
        facts: fields of [`Facts`], such as `baseline={"accuracy": 0.71}`, `datasets="OWNER/NAME"` or `license="mit"`.

    Returns:
        [`~huggingface_hub.ModelCard`]: `str` of it is the text.

    Raises:
        `TypeError`: for a source or a fact that is none. `ValueError`: for facts that make no valid card, or that hold
            tokens or paths of this machine.

    Example:

    ```python
    card = card_of(trainer, baseline={"loss": 0.61, "accuracy": 0.71}, datasets="OWNER/NAME")
    ```
    """
    return _render(facts_of(source, **facts), None)


def _render(facts: Facts, curve: str | None) -> ModelCard:
    card = ModelCard.from_template(metadata_of(facts), template_path=str(TEMPLATE), **context_of(facts, curve))
    card.text = re.sub(r"\n{3,}", "\n\n", card.text).rstrip() + "\n"
    text = str(card)
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"A fact holds one of the marks {BEGIN} and {END}, which enclose the section. Take it out.")
    if problems := [f"It holds {found}; take it out." for found in secrets_in(text)] + check_metadata(text):
        raise ValueError("The facts make no valid card. " + " ".join(problems))
    return card


def write_card(folder: str | os.PathLike[str], source: Any = None, **facts: Any) -> Path:
    """Write the card of a model into `folder`/README.md, with its learning curve if there are logs.

    A card that is there is kept: of its text only what stands between the marks `<!-- hf_reg:begin -->` and
    `<!-- hf_reg:end -->` is replaced, or the section is put at its end; of its metadata our keys are updated. The
    facts stay beside it in hf_reg_card.json: a later call without `source` begins with them.

    Args:
        folder (`str` or `PathLike`): where the model was saved.
        source (`Trainer`, `nn.Module`, folder or [`Facts`], *optional*): by default `folder` itself.
        facts: fields of [`Facts`].

    Returns:
        `Path`: of the card.

    Raises:
        `ValueError`: for a folder that is none, a card whose marks or metadata are damaged (it is left as it is), and
            as in [`card_of`]. `TypeError`: as in [`card_of`].
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: save the model there first.")
    path, old = folder / README, None
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            old = _Old(path, file.read())
    found = facts_of(folder if source is None else source, **facts)
    _render(found, None)  # says what is wrong before anything is written
    card = _render(found, CURVE if draw_curve(found.history, folder / CURVE) else None)
    text = str(card) if old is None else old.with_section_of(card)
    for name, content in ((FACTS, found.to_json()), (README, text)):
        with replacing(folder / name) as unfinished:
            unfinished.write_text(content, encoding="utf-8", newline="")
    return path


class _Old:
    """A card that is there: checked when it is read.

    Raises:
        `ValueError`: if its marks or its metadata are damaged.
    """

    def __init__(self, path: Path, text: str) -> None:
        begins, ends = text.count(BEGIN), text.count(END)
        if (begins, ends) not in ((0, 0), (1, 1)) or text.find(BEGIN) > text.find(END):
            raise ValueError(
                f"{path} has {begins} x {BEGIN} and {ends} x {END}: expected one of each, in this order, or none. "
                "Repair the marks by hand; the file was left as it is."
            )
        if not REGEX_YAML_BLOCK.search(text):
            text = "---\n{}\n---\n" + text
        try:
            self.card = ModelCard(text)
        except (ValueError, TypeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"The metadata of {path} cannot be read ({reason}). Repair it by hand.") from error
        self.marked = begins == 1

    def with_section_of(self, new: ModelCard) -> str:
        """The old card with the section and the metadata of the new one."""
        if not self.marked and _is_skeleton(self.card.text):
            self.card.text = new.text
            self.marked = True
        merge_metadata(self.card.data, new.data)
        text, section = self.card.text, _section(new.text)
        if "\r\n" in text:
            section = section.replace("\n", "\r\n")
        if self.marked:
            text = text.replace(_section(text), section)
        else:
            line = "\r\n" if "\r\n" in text else "\n"
            text = f"{text.rstrip(line)}{line * 2}{section}{line}" if text.strip() else f"{line}{section}{line}"
        self.card.text = text
        return str(self.card)


def _section(text: str) -> str:
    return text[text.index(BEGIN) : text.index(END) + len(END)]


def _is_skeleton(text: str) -> bool:
    """Whether `text` is the form that PEFT puts beside every adapter, with nothing filled in."""
    if "[More Information Needed]" not in text:
        return False
    from huggingface_hub import ModelCardData

    form = {line.strip() for line in ModelCard.from_template(ModelCardData()).text.splitlines()}
    return all(
        line.strip() in form or line.startswith(("### Framework versions", "- PEFT ")) for line in text.splitlines()
    )
