"""Train a causal language model on preferences with RPO or DPO; one process, many, or many machines.

    python examples/train_rpo.py --model HuggingFaceTB/SmolLM2-135M-Instruct --train train.jsonl --eval test.jsonl \\
        --output_dir out --learning_rate 1e-5 --beta 0.1 --eta 0.2        # --eta 0 is DPO
    accelerate launch --config_file examples/accelerate/ddp.yaml examples/train_rpo.py ...
    python examples/train_rpo.py --smoke    # seconds, no download: a tiny model, made-up pairs

The files (.json, .jsonl, .csv or .parquet) have the columns `prompt`, `chosen` and `rejected`: texts, or lists of
turns for the model's chat template. The log says the loss in symbols and numbers, and what the reference is. `out`
holds a LoRA adapter for `peft.PeftModel.from_pretrained`, or the model with `--adapter none`. A run that was stopped
goes on from its last checkpoint with `--resume`, and by itself after an elastic restart.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, DatasetDict, load_dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.trainer_utils import get_last_checkpoint, set_seed

from hf_reg import RPOConfig, RPOTrainer
from hf_reg.adapters import SorsaConfig, get_regularized_peft_model


FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
NUMBERS = 50


@dataclass
class Task:
    model: str = field(default="HuggingFaceTB/SmolLM2-135M-Instruct", metadata={"help": "A Hub name or a folder."})
    train: str | None = field(default=None, metadata={"help": "Pairs: prompt, chosen, rejected."})
    eval: str | None = field(default=None, metadata={"help": "The same, held out."})
    adapter: Literal["lora", "sorsa", "none"] = field(default="lora", metadata={"help": "none: train every weight."})
    rank: int = field(default=16, metadata={"help": "Of the adapter; its scaling is 1."})
    ref_model: str | None = field(
        default=None,
        metadata={"help": "The reference. Without: the adapter off; with --adapter none, --model once more."},
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in output_dir."})
    smoke: bool = field(default=False, metadata={"help": "A tiny model and made-up pairs, four steps."})


def smoke() -> tuple[Any, Any, DatasetDict]:
    """A tiny model, words for tokens, and pairs of which the chosen answer counts up and the rejected one down."""
    words = ["<unk>", "</s>", *map(str, range(NUMBERS))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("</s>", "isolated"), pre_tokenizers.Whitespace()]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="</s>", pad_token="</s>", model_max_length=64
    )

    def count(start: int, step: int) -> str:
        return " ".join(str((start + step * i) % NUMBERS) for i in range(6))

    rows = [
        {"prompt": f"{count(i, 1)} ", "chosen": count(i + 6, 1), "rejected": count(i + 4, -1)} for i in range(NUMBERS)
    ]
    data = Dataset.from_list(rows).train_test_split(10, seed=0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes))
    return model, tokenizer, DatasetDict(train=data["train"], eval=data["test"])


def read(task: Task) -> DatasetDict:
    files = {name: path for name, path in (("train", task.train), ("eval", task.eval)) if path}
    found = {Path(path).suffix for path in files.values()}
    if len(found) > 1 or not found <= FORMATS.keys():
        raise SystemExit(f"The files end with {sorted(found)}; give files of one kind: {', '.join(FORMATS)}.")
    return load_dataset(FORMATS[found.pop()], data_files=files)


def adapt(task: Task, model: Any) -> Any:
    """The model with its adapter, if any."""
    shared = {"r": task.rank, "lora_alpha": task.rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if task.adapter == "sorsa":
        return get_regularized_peft_model(model, SorsaConfig(**shared))
    return get_peft_model(model, LoraConfig(**shared)) if task.adapter == "lora" else model


def main() -> None:
    task, args = HfArgumentParser((Task, RPOConfig)).parse_args_into_dataclasses()
    set_seed(args.seed)  # LoRA's first factors are drawn before the trainer is made
    if task.smoke:
        model, tokenizer, data = smoke()
        args.max_steps, args.logging_steps, args.report_to = 4, 1, []
    elif task.train:
        tokenizer = AutoTokenizer.from_pretrained(task.model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        model, data = AutoModelForCausalLM.from_pretrained(task.model), read(task)
    else:
        raise SystemExit("Give --train FILE (and --eval FILE), or --smoke for a run without data.")
    reference = AutoModelForCausalLM.from_pretrained(task.ref_model) if task.ref_model else None
    stored = "ref_chosen_logps" in data["train"].column_names or args.precompute_reference
    if task.adapter == "none" and reference is None and not stored:
        reference = copy.deepcopy(model)
    trainer = RPOTrainer(
        adapt(task, model), args, train_dataset=data["train"], eval_dataset=data.get("eval"),
        processing_class=tokenizer, ref_model=reference,
    )  # fmt: skip
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    there = os.path.isdir(args.output_dir) and (task.resume or restarted)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.output_dir) if there else None)
    if "eval" in data:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()


if __name__ == "__main__":
    main()
