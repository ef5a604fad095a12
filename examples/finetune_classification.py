"""Fine-tune an encoder or decoder to classify texts, regularized; one process, many, or many machines.

    python examples/finetune_classification.py --model bert-base-cased --train train.csv --eval test.csv \\
        --output_dir out --patches tlm --penalties 'l2_sp: 0.01' --num_train_epochs 3
    accelerate launch --config_file examples/accelerate/ddp.yaml examples/finetune_classification.py ...
    python examples/finetune_classification.py --smoke    # seconds, no download: a tiny model, made-up texts

The files are CSV or JSON lines with the columns `text` and `label`. A run that was stopped goes on from its last
checkpoint with `--resume`, and by itself after an elastic restart (`torchrun --max-restarts`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    HfArgumentParser,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_reg import RegularizedTrainer, RegularizedTrainingArguments


@dataclass
class Task:
    model: str = field(default="bert-base-cased", metadata={"help": "A name on the Hub or a folder."})
    train: str | None = field(default=None, metadata={"help": "CSV or JSON lines with the columns text and label."})
    eval: str | None = field(default=None, metadata={"help": "The same, held out."})
    max_tokens: int = field(default=128, metadata={"help": "Longer texts are cut."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in output_dir."})
    smoke: bool = field(default=False, metadata={"help": "A tiny model and made-up texts, four steps."})


def read(task: Task) -> DatasetDict:
    if not task.train:
        raise SystemExit("Give --train FILE (and --eval FILE), or --smoke for a run without data.")
    files = {name: path for name, path in (("train", task.train), ("eval", task.eval)) if path}
    kind = "csv" if task.train.endswith(".csv") else "json"
    data = load_dataset(kind, data_files=files)
    missing = {"text", "label"} - set(data["train"].column_names)
    if missing:
        raise SystemExit(f"{task.train} has the columns {data['train'].column_names}; missing: {sorted(missing)}.")
    return data.class_encode_column("label")


def smoke() -> tuple[Any, DatasetDict]:
    """Texts of two made-up classes as ids, and a model small enough for any machine."""
    draw = np.random.default_rng(0)
    rows = [
        {"input_ids": draw.integers(2 + 48 * (i % 2), 50 + 48 * (i % 2), 16).tolist(), "labels": i % 2}
        for i in range(64)
    ]
    data = Dataset.from_list(rows).train_test_split(16, seed=0)
    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    return BertForSequenceClassification(config), DatasetDict(train=data["train"], eval=data["test"])


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    task, args = HfArgumentParser((Task, RegularizedTrainingArguments)).parse_args_into_dataclasses()
    tokenizer = collator = None
    if task.smoke:
        model, data = smoke()
        args.max_steps, args.logging_steps, args.report_to = 4, 1, []
    else:
        data, tokenizer = read(task), AutoTokenizer.from_pretrained(task.model)
        names = data["train"].features["label"].names
        config = AutoConfig.from_pretrained(
            task.model,
            num_labels=len(names),
            id2label=dict(enumerate(names)),
            label2id={n: i for i, n in enumerate(names)},
        )
        model = AutoModelForSequenceClassification.from_pretrained(task.model, config=config)
        data = data.map(
            lambda rows: tokenizer(rows["text"], truncation=True, max_length=task.max_tokens), batched=True
        )
        data = data.rename_column("label", "labels")
        collator = DataCollatorWithPadding(tokenizer)
    trainer = RegularizedTrainer(
        model=model, args=args, train_dataset=data["train"], eval_dataset=data.get("eval"), processing_class=tokenizer,
        data_collator=collator, compute_metrics=accuracy,
    )  # fmt: skip
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    there = os.path.isdir(args.output_dir) and (task.resume or restarted)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.output_dir) if there else None)
    if "eval" in data:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()


if __name__ == "__main__":
    main()
