"""`python -m tests.pages`: writes examples/methods/, a page for each method from its docstring, and the support table
of every architecture from coverage.json. A test compares them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_reg.commands.methods import TITLES, Method, known_methods


ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "methods"
COVERAGE = ROOT / "tests" / "coverage.json"
KINDS = {kind: title[0].upper() + title[1:] for kind, title in TITLES.items()}


def table(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(method: Method) -> str:
    """Everything that `hf-reg methods NAME` says."""
    said = method.as_json()
    parts = [f"# {method.name}", method.description]
    parts += [f"Definition: `{said['definition']}`", f"Paper: {said['paper']}"] if "definition" in said else []
    parts += [f"```python\n{said['example']}\n```"] if said.get("example") else []
    parts += method.notes
    if method.settings:
        rows = [(f"`{name}`", f"`{value!r}`", method.said.get(name, "")) for name, value in method.settings.items()]
        parts += ["## Settings", table(("setting", "default", "what it is, and where the default comes from"), rows)]
    measured = [(one["case"], one["ours"], one["peer"], f"{one['ratio']:.3f}") for one in said["cost"]["measured"]]
    cost = [table(("measured", "of", "compared with", "ratio"), measured), said["cost"]["conditions"]]
    parts += ["## Cost", *(cost if measured else ["It has not been measured."])]
    return "\n\n".join(parts) + "\n"


def support() -> str:
    """A row for each architecture of transformers: on which of its models the patches were seen to work."""
    found = json.loads(COVERAGE.read_text())
    patches = sorted({name for one in found["types"].values() for name in one["patches"]})
    rows = []
    for name, one in sorted(found["types"].items()):
        reached = ", ".join(f"{count} x {kind}" for kind, count in sorted(one["reached"].items()))
        if one["forward"] is not True:
            reached = f"not tried: {one['forward']}"
        verdicts = [_verdict(one["patches"].get(patch)) for patch in patches]
        ffn = ", ".join(f"{count} x {kind}" for kind, count in sorted(one.get("ffn", {}).items()))
        rows.append((f"`{name}`", reached or "no attention that can be reached", ffn, *verdicts))
    totals = ", ".join(f"{name}: {count}" for name, count in found["totals"].items())
    return "\n\n".join([
        "# Support", f"Every architecture of transformers under every property of the test matrix ({totals}).",
        '"yes": all properties hold (eval bit-identical, unpatch restores, checkpoints stay stock, ...). Adapters and '
        "penalties on parameters work on any linear layers.",
        table(("architecture", "attention of its tiny model", "FFN", *patches), rows),
    ]) + "\n"  # fmt: skip


def _verdict(properties: dict[str, str] | None) -> str:
    if not properties:
        return ""
    if "refused" in properties:
        return f"refused: {properties['refused']}"
    broken = [name for name, verdict in properties.items() if verdict.startswith("BROKEN")]
    return f"not {', '.join(broken)}" if broken else "yes"


def index(methods: list[Method]) -> str:
    parts = ["# Methods", "A page for each, made of its docstring by `python -m tests.pages`; [support.md](support.md)"
             " says which architectures the patches were tried on."]  # fmt: skip
    for kind, title in KINDS.items():
        rows = [(f"[{one.name}]({one.name}.md)", one.description) for one in methods if one.kind == kind]
        parts += [f"## {title}", table(("name", "what it does"), rows)]
    return "\n\n".join(parts) + "\n"


def pages() -> dict[str, str]:
    """Texts by file name."""
    methods = known_methods()
    return {"README.md": index(methods), "support.md": support(), **{f"{one.name}.md": page(one) for one in methods}}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text)
