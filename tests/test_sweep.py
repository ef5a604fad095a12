"""Every architecture of the installed transformers, under every property of the matrix, with patches of each seam;
writes tests/coverage.json.

A property that does not hold for a type must be listed in `KNOWN` with its reason, and one that is listed must not
hold.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from hf_reg import unpatch_model
from hf_reg.sites.attention import find_attention
from hf_reg.sites.ffn import find_ffn, find_ffn_uncovered
from hf_reg.sites.residual import find_branches

from .architectures import MODEL_TYPES, NotBuilt, build
from .conftest import REPORT, sweep_folder
from .known import KNOWN, WITHOUT_FFN
from .properties import PROPERTIES, Case, check


SWEPT = ("tlm", "drophead", "ffn_dropout", "residual_dropout")  # two for each seam; the others are in the matrix


def examine(model_type: str) -> dict[str, Any]:
    """What holds for one type: forward, how its attention is reached, and a verdict per patch and property."""
    found: dict[str, Any] = {"forward": True, "reached": {}, "ffn": {}, "complete": False, "patches": {}}
    try:
        tiny = build(model_type)
    except NotBuilt as error:
        return found | {"forward": str(error)[:200]}
    for site in find_attention(tiny.model):
        found["reached"][site.kind] = found["reached"].get(site.kind, 0) + 1
    sites = find_ffn(tiny.model)
    for ffn in sites:
        found["ffn"][ffn.kind] = found["ffn"].get(ffn.kind, 0) + 1
    found["branches"] = len(find_branches(tiny.model))
    found["ffn uncovered"] = find_ffn_uncovered(tiny.model, sites)
    for patch in SWEPT if found["reached"] or found["ffn"] else ():
        case = Case(model_type, patch, tiny)
        try:
            case.attach()
        except ValueError as error:  # says why, and the model is as it was: an honest refusal
            found["patches"][patch] = {"refused": str(error)[:200]}
            continue
        finally:
            unpatch_model(case.model)
        verdicts = found["patches"][patch] = {}
        for name in PROPERTIES:
            try:
                reason = check(case, name)
                verdicts[name] = "holds" if reason is None else f"n/a: {reason}"
            except (
                Exception
            ) as error:  # whatever breaks is a verdict: the sweep goes on and the test below fails on it
                verdicts[name] = f"BROKEN: {type(error).__name__}: {str(error)[:200]}"
    verdicts = [verdict for patch in found["patches"].values() for verdict in patch.values()]
    found["complete"] = bool(verdicts) and not any(verdict.startswith("BROKEN") for verdict in verdicts)
    return found


def test_ffns_are_found_where_there_is_attention() -> None:
    """In what the sweep last wrote; SURVEY.md counts 655 of 665 architectures with an FFN beside attention."""
    coverage = json.loads(REPORT.read_text())
    attending = [name for name, found in coverage["types"].items() if found["reached"]]
    without = [name for name in attending if not coverage["types"][name]["ffn"]]
    assert without == sorted(WITHOUT_FFN)
    assert len(attending) > 600 and len(without) <= 0.02 * len(attending)
    assert coverage["totals"]["with attention and FFN found"] == len(attending) - len(without)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_architecture(model_type: str) -> None:
    found = examine(model_type)
    broken = {
        (patch, name): verdict
        for patch, verdicts in found["patches"].items()
        for name, verdict in verdicts.items()
        if verdict.startswith("BROKEN")
    }
    known = KNOWN.get(model_type, {})
    for patch, name in broken:
        if name in known:
            found["patches"][patch][name] += f" -- known: {known[name]}"
    sweep_folder().mkdir(parents=True, exist_ok=True)
    (sweep_folder() / f"{model_type}.json").write_text(json.dumps(found))
    if found["reached"]:
        assert bool(found["ffn"]) != (model_type in WITHOUT_FFN), "an FFN is found or listed as not there, not both"
    unexpected = {key: verdict for key, verdict in broken.items() if key[1] not in known}
    assert not unexpected, unexpected
    assert set(known) <= {name for _, name in broken}, f"listed as known, but it holds: {known}"
