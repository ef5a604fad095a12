"""Real runs with a planted fault are told apart from each other and from a healthy one, from their folders alone."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from typer.testing import CliRunner, Result

from hf_reg import diagnose, patch_model
from hf_reg.cli import app
from hf_reg.diagnosis import OverfitReport
from hf_reg.seams.attention import gates
from hf_reg.training.activity import Activity

from .diagnosis_runs import STEPS, Evaluating, bert, trained, without_dropout


LATE: dict[str, Any] = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 8.0, "lr_end": 1e-9}}
SLOW = {"labels": "signal", "learning_rate": 3e-4}
RUNS: dict[str, dict[str, Any]] = {
    "healthy": SLOW | {"settings": {"patches": "tlm", "penalties": {"l2": 1e-3}}},
    "healthy plain": SLOW | {"trainer": Trainer},
    "over-fit": {"labels": "noise", "learning_rate": 5e-3},
    "over-fit plain": {"labels": "noise", "learning_rate": 5e-3, "trainer": Trainer},
    "evaluation mode": SLOW | {"trainer": Evaluating, "settings": {"patches": "tlm", "penalties": {"l2_sp": 0.1}}},
    "dropout at 0": SLOW | {"plant": without_dropout},
    "no dropout": SLOW | {"model": 0.0},
    "patch at 0": SLOW | {"settings": {"patches": {"drophead": {"p": 0.0}}}},
    "decayed": {"labels": "signal", "learning_rate": 3e-3, **LATE},
    "converged": {"labels": "signal", "learning_rate": 1e-2, "lr_scheduler_type": "constant"},
    "dominating": SLOW | {"settings": {"penalties": {"l2": 0.1}}},
    "dominating gradient": SLOW | {"settings": {"penalties": {"l2": 0.1}}, "gradient_shares": True},
    "negligible": SLOW | {"settings": {"penalties": {"l2": 1e-7}}},
    "penalty at 0": SLOW | {"settings": {"penalties": {"l2": 0.0}}},
    "nothing learned": {"labels": "noise", "learning_rate": 0.0, "trainer": Trainer},
    "diverged": {"labels": "signal", "trainer": Trainer, "plant": "diverge"},
}  # fmt: skip


class Shaking(TrainerCallback):
    """From the middle of the run on the learning rate is a hundred times as high as planned."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= STEPS // 2:
            for group in kwargs["optimizer"].param_groups:
                group["lr"] = 0.5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> Any:
    """A function that gives the folder of a run, trained once."""
    root = tmp_path_factory.mktemp("runs")

    def folder(name: str) -> Path:
        path = root / name.replace(" ", "-")
        if not path.exists():
            given = dict(RUNS[name])
            plant, dropout = given.pop("plant", None), given.pop("model", 0.1)
            model: nn.Module = bert(dropout)
            if plant == "diverge":
                given |= {"learning_rate": 2e-3, "settings": {"callbacks": [Shaking()]}}
            elif plant is not None:
                model = plant(model)
            trained(path, model=model, **given)
        return path

    return folder


def kinds(report: OverfitReport, problem: bool = True) -> list[str]:
    return [one.kind for one in report.findings if one.problem or not problem]


# what is found, and nothing else: verdict, kinds of the problems
EXPECTED: dict[str, tuple[str, list[str]]] = {
    "healthy": ("no sign of over-fitting", []),
    "healthy plain": ("no sign of over-fitting", []),
    "over-fit": ("over-fits", ["over-fitting"]),
    "over-fit plain": ("over-fits", ["over-fitting"]),
    "evaluation mode": (
        "no sign of over-fitting", ["evaluation mode", "patch never ran", "dropout never ran", "penalty absent"],
    ),
    "dropout at 0": ("no sign of over-fitting", ["dropout never ran"]),
    "no dropout": ("no sign of over-fitting", []),
    "patch at 0": ("no sign of over-fitting", ["patch without rate"]),
    "decayed": ("no sign of over-fitting", []),
    "converged": ("no sign of over-fitting", []),
    "dominating": ("no sign of over-fitting", ["penalty dominates"]),
    "dominating gradient": ("no sign of over-fitting", ["penalty dominates"]),
    "negligible": ("no sign of over-fitting", ["penalty does nothing"]),
    "penalty at 0": ("no sign of over-fitting", ["penalty absent"]),
    "nothing learned": ("learns too little", ["learns too little"]),
    "diverged": ("diverges", ["diverging"]),
}  # fmt: skip
NOTES = {"decayed": ["plateau"], "converged": ["plateau"], "no dropout": ["no dropout"]}


@pytest.mark.parametrize("name", RUNS)
def test_runs_are_told_apart(name: str, folders: Any) -> None:
    report = diagnose(folders(name))
    verdict, problems = EXPECTED[name]
    assert (report.verdict, kinds(report)) == (verdict, problems), str(report)
    assert kinds(report, problem=False) == problems + NOTES.get(name, [])
    assert all(one.text and one.reason for one in report.findings) and report.next_steps
    assert report.headline.startswith(verdict)
    assert all(kind in report.headline for kind in problems if kind not in ("over-fitting", "diverging"))
    json.dumps(report.as_json(), allow_nan=False)


def test_what_is_said_of_over_fitting(folders: Any) -> None:
    report = diagnose(folders("over-fit"))
    [finding] = report.findings
    losses = {log["step"]: log["eval_loss"] for log in report.run.history if "eval_loss" in log}
    assert finding.step == report.best_step == min(losses, key=losses.__getitem__)
    assert report.eval_loss == losses[STEPS] and report.best_loss == min(losses.values())
    assert report.rise == pytest.approx(losses[STEPS] / min(losses.values()) - 1) and report.rise > 0.1
    since = finding.evidence["above_tolerance_from"]
    assert since == next(s for s in losses if s > finding.step and losses[s] > 1.02 * report.best_loss)
    assert finding.evidence["gap_end"] == report.gap > 0.5 > abs(finding.evidence["gap_then"])
    advice = "\n".join(report.next_steps)
    assert report.next_steps[0].startswith(f"Stop near step {report.best_step}: callbacks=[early_stopping(args)]")
    for said in ('patches="tlm"', 'penalties={"l2_sp": 0.01}', "Halve the learning rate", "weight_decay", "more data"):
        assert said in advice
    assert str(report.best_step) in finding.text and "gap grew" in finding.reason


def test_advice_builds_on_what_is_set(tmp_path: Path) -> None:
    settings = {"patches": {"tlm": {"rate": 0.02}}, "penalties": {"l2": 1e-6}}
    run = trained(tmp_path / "run", "noise", learning_rate=5e-3, settings=settings)
    advice = "\n".join(diagnose(run).next_steps)
    assert "Raise the rate of tlm (0.02 to 0.03)" in advice and 'Add patches="drophead"' in advice
    assert "Raise the weight of l2 tenfold, from 1e-06 to 1e-05: at 0.0" in advice
    assert "weight_decay=0.01: it is 0.\n" in advice  # a trainer in memory says so, a folder does not
    assert diagnose(tmp_path / "run").next_steps[:3] == diagnose(run).next_steps[:3]


def test_what_is_said_of_penalties(folders: Any) -> None:
    loss, gradient, weak = (diagnose(folders(name)) for name in ("dominating", "dominating gradient", "negligible"))
    assert loss.findings[0].evidence == {"share": pytest.approx(loss.shares["l2"])} and loss.shares["l2"] > 0.6
    assert "gradient_shares=True" in loss.findings[0].reason
    share = gradient.findings[0].evidence["gradient_share"]
    assert share == gradient.shares["gradient of l2"] and 0.55 < share < 0.95
    assert gradient.next_steps == [
        f"Lower the weight of l2 to a tenth, from 0.1 to 0.01: at {share:.0%} of the gradient it outweighs the task."
    ]
    assert weak.shares["l2"] < 1e-3 and weak.next_steps[0].startswith("Raise the weight of l2 tenfold, from 1e-07 to")


def test_a_penalty_that_nothing_moves(tmp_path: Path) -> None:
    constant = {"penalties": {"fixed": (1.0, lambda model, inputs, outputs: torch.tensor(0.3))}}
    report = diagnose(trained(tmp_path, "signal", settings=constant))
    assert kinds(report) == ["penalty does nothing"] and "stayed what it was" in report.findings[0].text
    assert 0.1 < report.findings[0].evidence["share"] < 0.5


def test_what_is_said_of_a_plateau(folders: Any) -> None:
    decayed, converged = diagnose(folders("decayed")).findings[0], diagnose(folders("converged")).findings[0]
    assert decayed.evidence["rate_share"] < 0.1 and "had decayed" in decayed.reason
    assert converged.evidence["rate_share"] == 1 and "not for lack of a learning rate" in converged.reason
    for one in (decayed, converged):
        assert one.step is not None and 0.1 * STEPS < one.step <= 2 / 3 * STEPS
    assert "more steps" in diagnose(folders("decayed")).next_steps[1]
    assert "lr_scheduler_type='cosine'" in diagnose(folders("converged")).next_steps[1]


def test_dropout_that_never_ran(folders: Any) -> None:
    finding = diagnose(folders("dropout at 0")).findings[0]
    assert finding.evidence["hidden_dropout_prob"] == 0.1 and finding.evidence["dropout_rate"] == 0
    evaluating = diagnose(folders("evaluation mode"))
    assert evaluating.findings[0].evidence == {"training_mode": 0.0}
    assert all("evaluation mode" in one.reason for one in evaluating.findings)
    assert "model.eval()" in evaluating.next_steps[0] and len(evaluating.next_steps) == 1
    plain = diagnose(folders("healthy plain"))
    assert len(plain.unknown) == 1 and plain.unknown[0].startswith("Whether dropout ran: the logs do not say.")
    assert not diagnose(folders("healthy")).unknown


# ---- what a RegularizedTrainer logs


def logged(run: Any, name: str) -> list[float]:
    return [log[name] for log in run.state.log_history if name in log]


def test_what_acted_is_logged(tmp_path: Path) -> None:
    settings = {"patches": {"tlm": {"layers": "1:"}, "drophead": {"p": 0.2, "schedule": "linear"}}}
    run = trained(tmp_path, "signal", max_steps=8, settings=settings)
    for name in ("ran_tlm", "ran_drophead", "dropout_on"):
        assert logged(run, name) == [1.0] * 4
    assert logged(run, "rate_tlm") == pytest.approx([0.1] * 4)
    assert logged(run, "rate_drophead") == pytest.approx([0.2 * (1 - (step - 0.5) / 8) for step in (1, 3, 5, 7)])
    assert logged(run, "dropout_rate") == pytest.approx([0.1] * 4) and not logged(run, "training_mode")


class Stopping(TrainerCallback):
    """The patches of the second layer do not run after the fourth step: their gates are put in evaluation mode."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 20:
            for gate in gates(model):
                gate.train = lambda mode=True: None  # type: ignore[method-assign, assignment]
                gate.training = False


def test_a_patch_that_stops(tmp_path: Path) -> None:
    run = trained(tmp_path, "signal", learning_rate=3e-4, settings={"patches": "tlm", "callbacks": [Stopping()]})
    assert logged(run, "ran_tlm") == [1.0] * 10 + [0.0] * 20
    report = diagnose(tmp_path)
    assert kinds(report) == ["patch stopped"] and report.findings[0].step == 22
    assert "until step 20" in report.findings[0].text


def test_half_of_a_patch_never_runs(tmp_path: Path) -> None:
    model = bert()
    model.bert.encoder.layer[1].attention.self.forward = model.bert.encoder.layer[0].attention.self.forward
    with pytest.warns(UserWarning, match="1 of 2 patched modules did not run"):
        run = trained(tmp_path, "signal", model=model, learning_rate=3e-4, settings={"patches": "tlm"})
    assert set(logged(run, "ran_tlm")) == {0.5}
    assert kinds(diagnose(run), problem=False) == ["patch partly ran"] and not kinds(diagnose(run))


def test_the_dropout_of_a_patch_counts_where_the_place_rests(tmp_path: Path) -> None:
    run = trained(tmp_path, "signal", max_steps=4, settings={"patches": {"hidden_dropout": {"p": 0.3}}})
    assert logged(run, "ran_hidden_dropout") == [1.0] * 2 and logged(run, "dropout_on") == [1.0] * 2
    assert 0.1 < logged(run, "dropout_rate")[0] < 0.3


def test_a_compiled_forward_does_not_tell(tmp_path: Path) -> None:
    model = patch_model(bert(), "tlm")
    seen = Activity(model, compiled=True)
    model.train()
    seen.note()
    found = seen.read(torch.device("cpu")).mean(lambda values: values)
    assert "ran_tlm" not in found and found["rate_tlm"] == pytest.approx(0.1)


# ---- folders, as they come


def copied(folders: Any, name: str, to: Path) -> Path:
    return Path(shutil.copytree(folders(name), to / "run"))


def state_of(folder: Path, step: int = STEPS) -> Path:
    return folder / f"checkpoint-{step}" / "trainer_state.json"


def rewritten(folder: Path, change: Any) -> Path:
    state = json.loads(state_of(folder).read_text())
    change(state)
    state_of(folder).write_text(json.dumps(state))
    return folder


def test_the_newest_whole_state_is_read(folders: Any, tmp_path: Path) -> None:
    run = copied(folders, "over-fit", tmp_path)
    assert diagnose(run).last_step == STEPS and diagnose(state_of(run, STEPS // 2)).last_step == STEPS // 2
    state_of(run).write_text(state_of(run).read_text()[:500])  # killed while it was written
    report = diagnose(str(run))
    assert report.last_step == STEPS // 2
    assert "checkpoint-60/trainer_state.json was left out, it cannot be read" in report.run.remarks[0]
    assert "left out" in str(report)
    whole = json.loads(state_of(folders("over-fit")).read_text())
    (run / "trainer_state.json").write_text(json.dumps(whole))  # trainer.save_state()
    assert diagnose(run).run.source == str(run / "trainer_state.json")
    os.utime(run / "trainer_state.json", (1, 1))
    assert any("is newer than trainer_state.json" in text for text in diagnose(run).run.remarks)


def test_a_folder_and_the_trainer_agree(tmp_path: Path) -> None:
    run = trained(tmp_path, "noise", learning_rate=5e-3, settings={"patches": "tlm", "penalties": {"l2": 1e-6}})
    live, read = diagnose(run), diagnose(tmp_path)
    assert [one.text for one in live.findings] == [one.text for one in read.findings]
    assert live.curves == read.curves and live.run.dropout == read.run.dropout != {}
    assert diagnose(run.state).verdict == diagnose(run.state.log_history).verdict == read.verdict


def test_evaluations_after_training_do_not_count(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "save_steps": 4, "metric_for_best_model": "eval_loss"}
    run = trained(tmp_path, "noise", learning_rate=5e-3, **best)
    assert run.evaluate()["eval_loss"] == min(logged(run, "eval_loss"))  # of the best checkpoint, at the last step
    run.save_state()
    assert diagnose(tmp_path).verdict == diagnose(run).verdict == "over-fits"
    logs = run.state.log_history
    last = next(log for log in logs if log["step"] == STEPS and "eval_loss" in log)
    assert diagnose([log for log in logs if log is not last]).verdict == "over-fits"  # of trainers that leave it out


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda state: state.pop("log_history"), "is no state of a Trainer: it has no log_history"),
        (lambda state: state.update(log_history=3), "log_history is 3; expected the list"),
        (lambda state: state.update(log_history=[]), "found 0 training logs and 0 evaluations; it needs two"),
        (lambda state: state["log_history"].insert(0, "x"), "log 1 is 'x'; expected an object"),
        (lambda state: state["log_history"][0].update(loss="1.0"), "log 1 has loss='1.0'; expected a number"),
        (lambda state: state["log_history"][0].update(loss=10**400), "expected a number"),
        (lambda state: state["log_history"][3].update(step=1), "log 4 is of step 1 and the one before of step 4"),
        (lambda state: state["log_history"][3].update(step=math.nan), "log 4 is of step nan"),
    ],
)  # fmt: skip
def test_states_that_cannot_be_used(change: Any, said: str, folders: Any, tmp_path: Path) -> None:
    run = rewritten(copied(folders, "over-fit plain", tmp_path), change)
    with pytest.raises(ValueError) as caught:
        diagnose(state_of(run))
    assert said in str(caught.value) and str(state_of(run)) in str(caught.value)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no .*nowhere.* Give the output folder"):
        diagnose(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no trainer_state.json.* it holds nothing. Give the output_dir"):
        diagnose(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="it holds model.safetensors"):
        diagnose(tmp_path)
    path = tmp_path / "trainer_state.json"
    for text, said in {
        "": "is no JSON file", "[1]": "holds a list", "[" * 100_000: "is no JSON file", "{}": "is no state",
    }.items():  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            diagnose(tmp_path)
    with path.open("wb") as file:
        file.truncate(100_000_001)
    with pytest.raises(ValueError, match="has 100,000,001 bytes; such a file has at most 100,000,000"):
        diagnose(tmp_path)
    with pytest.raises(TypeError, match="expects a Trainer, its state, its log_history or its output folder, got int"):
        diagnose(3)


def test_numbers_that_are_none_are_found(folders: Any, tmp_path: Path) -> None:
    def change(state: Any) -> None:
        for log in state["log_history"]:
            if log["step"] >= 40:
                log.update({"grad_norm": math.nan} | ({"eval_loss": math.nan} if "eval_loss" in log else {}))

    report = diagnose(rewritten(copied(folders, "healthy plain", tmp_path), change))
    assert report.verdict == "diverges" and report.findings[0].kind == "not finite" and report.findings[0].step == 40
    assert "eval_loss" in report.findings[0].text and "Lower the learning rate to a third" in report.next_steps[0]
    json.dumps(report.as_json(), allow_nan=False)
    assert report.figure().axes


def test_a_configuration_that_cannot_be_used_is_left_out(folders: Any, tmp_path: Path) -> None:
    run = copied(folders, "healthy", tmp_path)
    path = run / "checkpoint-60" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"hf_reg": {"patches": "everything"}}))
    report = diagnose(run)
    assert report.verdict == "no sign of over-fitting" and "was left out" in report.run.remarks[0]
    path.unlink()
    assert diagnose(run).run.dropout is None


def test_without_evaluations(tmp_path: Path) -> None:
    trained(tmp_path, "signal", learning_rate=3e-4, eval_strategy="no", model=without_dropout(bert()))
    report = diagnose(tmp_path)
    assert report.verdict == "cannot tell" and kinds(report) == ["dropout never ran"]
    assert report.eval_loss is report.gap is report.best_step is None
    assert report.unknown[0].startswith("Over-fitting: there are 0 evaluations") and "cannot be told" in str(report)
    assert report.figure().axes


# ---- the picture


def test_the_picture(folders: Any) -> None:
    report = diagnose(folders("over-fit"))
    losses, words = report.figure().axes
    [star] = [line for line in losses.get_lines() if line.get_marker() == "*"]
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (report.best_step, report.best_loss)
    held_out = next(line for line in losses.get_lines() if line.get_label() == "held out")
    assert list(zip(held_out.get_xdata(), held_out.get_ydata(), strict=True)) == report.curves.held_out
    assert "1 over-fitting" in [text.get_text() for text in losses.texts]
    assert "lowest there" in words.texts[0].get_text()
    assert len(diagnose(folders("dominating")).figure().axes) == 3
    plotted = diagnose(folders("dominating gradient")).figure().axes[1].get_legend().get_texts()
    assert [text.get_text() for text in plotted] == ["l2, of the loss", "l2, of the gradient"]


# ---- the command


def run_command(*options: Any) -> Result:
    return CliRunner().invoke(app, ["diagnose", *map(str, options)])


def test_the_command(folders: Any, tmp_path: Path) -> None:
    done = run_command(folders("over-fit"), "--plot", tmp_path / "out.png")
    assert done.exit_code == 0, done.output
    assert "over-fits" in done.output and "Stop near step" in done.output
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 1
    found = json.loads(run_command(folders("dropout at 0"), "--json").stdout)
    assert found["verdict"] == "no sign of over-fitting" and found["findings"][0]["kind"] == "dropout never ran"
    assert found["source"] == str(state_of(folders("dropout at 0"))) and found["next_steps"]


def test_the_command_refuses_in_one_line(folders: Any, tmp_path: Path) -> None:
    for options, said in {
        (tmp_path,): "has no trainer_state.json",
        (tmp_path / "nowhere",): "there is no",
        (folders("over-fit"), "--plot", tmp_path / "out.txt"): "Give one of .png, .svg, .pdf",
        (folders("over-fit"), "--plot", tmp_path / "no" / "out.png"): "there is no folder",
    }.items():
        done = run_command(*options)
        assert done.exit_code == 2 and said in done.stderr and "Traceback" not in done.output, done.output
        assert len([line for line in done.stderr.splitlines() if line]) == 1
    assert not list(tmp_path.iterdir())


def test_a_loss_near_zero_is_not_worse_for_being_twice_as_large() -> None:
    def logs(*held_out: float) -> list[dict[str, float]]:
        train = [{"loss": 1 / 4**step, "step": step} for step in range(1, len(held_out) + 1)]
        evaluations = [{"eval_loss": loss, "step": step} for step, loss in enumerate(held_out, 1)]
        return [log for both in zip(train, evaluations, strict=True) for log in both]

    assert diagnose(logs(1.0, 0.1, 0.0001, 0.0002)).verdict == "no sign of over-fitting"
    assert diagnose(logs(1.0, 0.1, 0.0, 0.01)).verdict == "over-fits"
    report = diagnose(logs(1.0, 0.5, 0.4, 0.45))
    assert report.verdict == "over-fits" and report.rise == pytest.approx(0.125)
    assert diagnose(logs(-1.0, -2.0, -4.0, -3.0)).rise == pytest.approx(0.25)  # a likelihood of densities
