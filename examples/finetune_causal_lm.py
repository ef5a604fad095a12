"""Fine-tune a causal language model on texts, regularized; one process, many, or many machines.

    python examples/finetune_causal_lm.py --model gpt2 --train train.txt --eval test.txt --output_dir out \\
        --patches '{drophead: {p: 0.1, schedule: v_shape}}' --penalties 'confidence: 0.01'
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/finetune_causal_lm.py ...
    python examples/finetune_causal_lm.py --smoke    # seconds, no download: a tiny model, made-up ids

The files are plain text, an example a line. A run that was stopped goes on from its last checkpoint with `--resume`,
and by itself after an elastic restart (`torchrun --max-restarts`).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_reg import RegularizedTrainer, RegularizedTrainingArguments


@dataclass
class Task:
    model: str = field(default="gpt2", metadata={"help": "A name on the Hub or a folder."})
    train: str | None = field(default=None, metadata={"help": "Plain text, an example a line."})
    eval: str | None = field(default=None, metadata={"help": "The same, held out."})
    max_tokens: int = field(default=256, metadata={"help": "Longer lines are cut."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in output_dir."})
    smoke: bool = field(default=False, metadata={"help": "A tiny model and made-up ids, four steps."})


def smoke() -> tuple[Any, DatasetDict]:
    """Counting modulo 50 from random starts, and a model small enough for any machine."""
    starts = np.random.default_rng(0).integers(0, 50, 64)
    ids = [((start + np.arange(24)) % 50).tolist() for start in starts]
    data = Dataset.from_list([{"input_ids": one, "labels": one} for one in ids]).train_test_split(16, seed=0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    return LlamaForCausalLM(config), DatasetDict(train=data["train"], eval=data["test"])


def main() -> None:
    task, args = HfArgumentParser((Task, RegularizedTrainingArguments)).parse_args_into_dataclasses()
    tokenizer = collator = None
    if task.smoke:
        model, data = smoke()
        args.max_steps, args.logging_steps, args.report_to = 4, 1, []
    elif task.train:
        tokenizer = AutoTokenizer.from_pretrained(task.model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        model = AutoModelForCausalLM.from_pretrained(task.model)
        files = {name: path for name, path in (("train", task.train), ("eval", task.eval)) if path}
        data = load_dataset("text", data_files=files).filter(lambda row: row["text"].strip())
        data = data.map(
            lambda rows: tokenizer(rows["text"], truncation=True, max_length=task.max_tokens),
            batched=True, remove_columns="text",
        )  # fmt: skip
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    else:
        raise SystemExit("Give --train FILE (and --eval FILE), or --smoke for a run without data.")
    trainer = RegularizedTrainer(
        model=model, args=args, train_dataset=data["train"], eval_dataset=data.get("eval"), processing_class=tokenizer,
        data_collator=collator,
    )  # fmt: skip
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    there = os.path.isdir(args.output_dir) and (task.resume or restarted)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.output_dir) if there else None)
    if "eval" in data:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics | {"perplexity": math.exp(metrics["eval_loss"])})
    trainer.save_model()


if __name__ == "__main__":
    main()
