"""Trains adapters and saves them, on any number of processes: `-m tests.distributed.adapters FOLDER --fsdp2`."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from hf_reg import RegularizedTrainer, RegularizedTrainingArguments

from ..adapters.models import adapted
from .heads import LENGTH, rows


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "decoupled": ("sorsa", {"gamma": 0.05}),
    "coupled": ("sorsa", {"gamma": 0.01, "orthonormality": "coupled", "squared": True}),
    "folded": ("sorsa", {"folded": True, "gamma": 0.05}),
    "ba_lora": ("ba_lora", {"lambdas": [0.5, 0.0, 0.0]}),
}
STEPS, BATCH = 3, 4


def run(name: str, folder: Path, processes: int, checkpointing: bool = False, **settings: Any) -> list[float]:
    """The losses of a few steps on whole batches of `BATCH` rows; the adapter is saved in `folder`."""
    method, chosen = ADAPTERS[name]
    args = RegularizedTrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH // processes, learning_rate=1e-2,
        logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", optim="sgd",
        train_sampling_strategy="sequential", gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None, **settings,
    )  # fmt: skip
    data = [{key: value.clamp(max=59) for key, value in row.items()} for row in rows("tokens/llama", BATCH * STEPS)]
    data = [row | {"labels": row["input_ids"]} for row in data]
    assert all(len(row["input_ids"]) == LENGTH for row in data)
    model = adapted(method, **chosen)
    trainer = RegularizedTrainer(model=model, args=args, train_dataset=data)
    if not settings:  # DDP: an evaluation before must not leave it out
        trainer.evaluate(data[:2])
    trainer.train()
    trainer.save_model(str(folder / name))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    for kind in ("--ddp", "--fsdp2", "--zero3"):
        parser.add_argument(kind, action="store_true")
    options = parser.parse_args()
    more: dict[str, Any] = {}
    if options.fsdp2:
        from .fsdp_on_cpu import FSDP2

        config = FSDP2["fsdp_config"] | {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        more = FSDP2 | {"fsdp_config": config}
    names = list(ADAPTERS)
    if options.zero3:
        from .run import ZERO3

        more, names = dict(ZERO3), ["coupled", "ba_lora"]  # the decoupled step is refused there
    world = int(os.environ["WORLD_SIZE"])
    losses = {name: run(name, options.folder, world, name == "coupled", **more) for name in names}
    if int(os.environ["RANK"]) == 0:
        (options.folder / "losses.json").write_text(json.dumps(losses))
