"""LoRA, PiSSA, SORSA and BA-LoRA on a real model and real text: the same rank, layers, learning rate, batches, seeds.

    python examples/compare_adapters.py --output_dir compare    # 40 minutes on two cores; what is done is not repeated

Each run is `examples/finetune_lora.py` in a process of its own. `compare/` gets its logs, table.md and curves.png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

from local_models import NotAvailable, headlines, smollm2


SCRIPT = Path(__file__).with_name("finetune_lora.py")
ARMS = {
    "LoRA": ["--method", "lora"],
    "PiSSA (PEFT)": ["--method", "pissa"],
    "SORSA": ["--method", "sorsa"],
    "BA-LoRA": ["--method", "ba_lora"],
    "SORSA, gamma 0": ["--method", "sorsa", "--gamma", "0"],
    "PiSSA, learning rate x 3": ["--method", "pissa", "--learning_rate", "6e-4"],
}
SETTINGS = {
    "r": 16, "target_modules": r".*\.(q_proj|v_proj)", "learning_rate": 2e-4, "lr_scheduler_type": "cosine",
    "warmup_steps": 3, "max_steps": 30, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 16,
    "eval_strategy": "steps", "eval_steps": 20, "logging_steps": 1, "fused_loss": True, "save_strategy": "no",
    "report_to": "none", "disable_tqdm": True, "use_cpu": True,
}  # fmt: skip
DASHES = ("-", "-", "-", (0, (2, 4)), (0, (2, 4)), (3, (2, 4)))  # several curves lie upon each other
LAST = 10  # steps of training whose mean is given
COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#e69f00", "#56b4e9")  # Okabe and Ito's


def run(arm: str, seed: int, folder: Path) -> None:
    """One run, unless `folder` has it already."""
    if (folder / "trainer_state.json").is_file():
        return
    train, held_out = headlines()
    settings = SETTINGS | {"model": smollm2(), "train": train, "eval": held_out, "seed": seed, "output_dir": folder}
    if arm == "LoRA":
        settings["eval_on_start"] = True  # every adapter starts as the pretrained model
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "w") as log:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(SCRIPT), *words, *ARMS[arm]]
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{arm}, seed {seed}: failed, see {folder / 'log.txt'}.")
    print(f"{arm}, seed {seed}: done", flush=True)


def curves(folder: Path) -> tuple[list[float], dict[int, float]]:
    """The task's loss of every training step, and the held-out loss by step."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    training = [float(row.get("loss_task", row["loss"])) for row in history if "loss" in row]
    return training, {row["step"]: float(row["eval_loss"]) for row in history if "eval_loss" in row}


def spread(values: list[float], sign: str = "") -> str:
    return f"{mean(values):{sign}.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2, help="Runs at a time, a thread each.")
    options = parser.parse_args()
    try:
        smollm2(), headlines()
    except NotAvailable as error:
        raise SystemExit(str(error)) from error
    folders = {(arm, seed): options.output_dir / f"{arm}-{seed}" for seed in options.seeds for arm in ARMS}
    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(lambda one: run(*one, folders[one]), folders))

    found = {one: curves(folder) for one, folder in folders.items()}
    steps = [step for step in sorted(found["LoRA", options.seeds[0]][1]) if step]
    start = found["LoRA", options.seeds[0]][1][0]
    lines = [
        f"| adapter | training, last {LAST} steps | "
        + " | ".join(f"held out, step {step}" for step in steps)
        + " | minus PiSSA |",
        "|---" * (len(steps) + 3) + "|",
    ]
    for arm in ARMS:
        runs = [found[arm, seed] for seed in options.seeds]
        reference = [found["PiSSA (PEFT)", seed][1][steps[-1]] for seed in options.seeds]
        cells = [spread([mean(training[-LAST:]) for training, _ in runs])]
        cells += [spread([held_out[step] for _, held_out in runs]) for step in steps]
        cells += [spread([one[1][steps[-1]] - other for one, other in zip(runs, reference, strict=True)], "+")]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    (options.output_dir / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join([*lines, f"Held out before training: {start:.3f}"]))
    start_row = {0: start}
    found = {one: (training, start_row | held_out) for one, (training, held_out) in found.items()}
    draw(found, [0, *steps], options)


def draw(found: dict, steps: list[int], options: argparse.Namespace) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for colour, dash, arm in zip(COLOURS, DASHES, ARMS, strict=True):
        style = {"color": colour, "linestyle": dash, "linewidth": 2}
        training = [mean(parts) for parts in zip(*(found[arm, seed][0] for seed in options.seeds), strict=True)]
        smooth = [mean(training[max(0, i - 4) : i + 1]) for i in range(len(training))]
        left.plot(range(1, len(smooth) + 1), smooth, label=arm, **style)
        right.plot(steps, [mean(found[arm, seed][1][step] for seed in options.seeds) for step in steps], **style)
        for seed in options.seeds:
            right.scatter(steps, [found[arm, seed][1][step] for step in steps], color=colour, s=8, alpha=0.5)
    left.set(title="Training, mean of 5 steps", xlabel="step", ylabel="task loss of an answer's token")
    right.set(title="Held out, each seed and the mean", xlabel="step")
    figure.legend(frameon=False, loc="outside right upper")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(options.output_dir / "curves.png", dpi=90)


if __name__ == "__main__":
    main()
