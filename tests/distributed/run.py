"""What test_processes.py launches: `python -m torch.distributed.run ... -m tests.distributed.run WHAT FOLDER ...`."""

from __future__ import annotations

import argparse
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_reg import RegularizedTrainer, RegularizedTrainingArguments
from hf_reg.seams.attention import gates

from .heads import BERT, HEADS, ROWS, gradients, make, rows


PARAMETER_PENALTIES: dict[str, dict[str, Any]] = {
    "l1": {"weight": 0.01},
    "l2": {"weight": 0.1},
    "l2_sp": {"weight": 1.0, "alpha": 0.1, "beta": 0.2},
    "orthonormality": {"weight": 0.1, "scope": "*query.weight"},
    "frobenius_decay": {"weight": 0.1, "kind": ["qk", "ov"]},
}
ZERO3 = {
    "deepspeed": {
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True,
                              "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }
}  # fmt: skip
RANK = int(os.environ.get("RANK", "0"))


class Killer(TrainerCallback):
    """Ends this process as a machine failure would, once a step is done: no handler, no flush."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Masks(TrainerCallback):
    """What DropHead draws on this rank, a list a step."""

    def __init__(self) -> None:
        self.drawn: list[list[list[float]]] = []

    def watch(self, trainer: RegularizedTrainer) -> None:
        for gate in gates(trainer.model):
            if gate.patch.name != "drophead":
                continue
            draw = gate.scales

            def scales(*args: Any, draw: Any = draw) -> Any:
                found = draw(*args)
                self.drawn.append(found.tolist())
                return found

            gate.scales = scales  # type: ignore[method-assign]


def train(folder: Path, *, kill: int, resume: bool, steps: int, masks: Masks | None = None, **settings: Any) -> Any:
    """A run with dropout, a scheduled patch, scheduled penalties and shuffled rows; saves every third step."""
    HEADS["dropout/bert"] = ("BertForSequenceClassification", "bert", BERT | {"hidden_dropout_prob": 0.1})
    args = RegularizedTrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
        save_steps=3, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, lr_scheduler_type="linear",
        logging_nan_inf_filter=False, **settings,
    )  # fmt: skip
    data = [row | {"labels": torch.tensor(i % 3)} for i, row in enumerate(rows("classes/bert", 40))]
    trainer = RegularizedTrainer(
        model=make("dropout/bert"), args=args, train_dataset=data,
        patches={"drophead": {"p": 0.4, "schedule": "v_shape"}, "tlm": {"rate": 0.2}},
        penalties={"l2_sp": {"weight": 0.3, "schedule": "linear"}, "spread": (0.1, lambda m, i, o: o.logits.var())},
        callbacks=[Killer(kill)] if kill else [],
    )  # fmt: skip
    if masks is not None:
        masks.watch(trainer)
    last = get_last_checkpoint(str(folder)) if resume and folder.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(str(folder / "final"))
    if RANK == 0:
        losses = [
            {k: v for k, v in e.items() if k.startswith("loss") or k == "step"} for e in trainer.state.log_history
        ]
        (folder / "history.json").write_text(json.dumps([e for e in losses if "loss" in e]))
    return trainer


def sharded_penalties(folder: Path, arguments: dict[str, Any]) -> None:
    """Gradients of every penalty on parameters under FSDP2."""
    world, found = int(os.environ["WORLD_SIZE"]), {}
    for name, settings in PARAMETER_PENALTIES.items():
        for accumulation in (1, 2):
            size = ROWS // world // accumulation
            found[name, accumulation] = gradients(
                "classes/bert", size, accumulation, {name: dict(settings)}, arguments=arguments
            )[0]
    if RANK == 0:
        torch.save(found, folder / "gradients.pt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("train", "masks", "penalties"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--kill", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--sharded", action="store_true")
    parser.add_argument("--zero3", action="store_true")
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    chosen: dict[str, Any] = {}
    if options.sharded:
        from .fsdp_on_cpu import FSDP2

        chosen = dict(FSDP2)
    if options.zero3:
        chosen = dict(ZERO3)
    if options.what == "penalties":
        sharded_penalties(options.folder, chosen)
    elif options.what == "masks":
        seen = Masks()
        train(options.folder, kill=0, resume=False, steps=2, masks=seen, seed=options.seed)
        (options.folder / f"masks-{options.seed}-{RANK}.json").write_text(json.dumps(seen.drawn))
    else:
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        kill = 0 if restarted or RANK else options.kill
        train(options.folder, kill=kill, resume=options.resume or restarted, steps=options.steps, **chosen)
