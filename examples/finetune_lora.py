"""Fine-tune a causal language model on instructions with a low-rank adapter; one process, many, or many machines.

    python examples/finetune_lora.py --method sorsa --model HuggingFaceTB/SmolLM2-135M-Instruct --train train.jsonl \\
        --eval test.jsonl --output_dir out --learning_rate 2e-4 --drift drift.png
    accelerate launch --config_file examples/accelerate/ddp.yaml examples/finetune_lora.py ...
    python examples/finetune_lora.py --smoke --method ba_lora    # seconds, no download: a tiny model, made-up ids

The files are JSON lines with `prompt` and `answer`. The loss is on the answers and on the token that ends them, in the
model's chat template where it has one. `out` is a plain LoRA adapter for `peft.PeftModel.from_pretrained`. A run that
was stopped goes on from its last checkpoint with `--resume`, and by itself after an elastic restart.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, HfArgumentParser
from transformers.models.llama import LlamaConfig, LlamaForCausalLM
from transformers.trainer_utils import get_last_checkpoint, set_seed

from hf_reg import RegularizedTrainer, RegularizedTrainingArguments
from hf_reg.adapters import BALoraConfig, SorsaConfig, get_regularized_peft_model
from hf_reg.adapters.drift import spectrum_drift


@dataclass
class Task:
    method: Literal["lora", "pissa", "sorsa", "ba_lora"] = field(default="sorsa", metadata={"help": "The adapter."})
    model: str = field(default="HuggingFaceTB/SmolLM2-135M-Instruct", metadata={"help": "A Hub name or a folder."})
    train: str | None = field(default=None, metadata={"help": "JSON lines with prompt and answer."})
    eval: str | None = field(default=None, metadata={"help": "The same, held out."})
    max_tokens: int = field(default=512, metadata={"help": "Longer examples are cut at their end."})
    r: int = field(default=16, metadata={"help": "Rank."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Scaling times r; none: no scaling."})
    target_modules: str = field(default="all-linear", metadata={"help": "Which layers, as in peft.LoraConfig."})
    gamma: float | None = field(default=None, metadata={"help": "sorsa: strength of the orthonormality, 0 is off."})
    lambdas: list[float] | None = field(default=None, metadata={"help": "ba_lora: weights of its three terms."})
    folded: bool = field(default=False, metadata={"help": "sorsa, ba_lora: keep the residual in the base weights."})
    drift: str | None = field(default=None, metadata={"help": "Picture (.png) of how far the spectra moved."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in output_dir."})
    smoke: bool = field(default=False, metadata={"help": "A tiny model and made-up ids, four steps."})


def smoke() -> tuple[Any, DatasetDict]:
    """Counting modulo 50 from random starts, of which the second half is the answer, and a tiny model."""
    starts = np.random.default_rng(0).integers(0, 50, 64)
    ids = [((start + np.arange(24)) % 50).tolist() for start in starts]
    rows = [{"input_ids": one, "labels": [-100] * 12 + one[12:]} for one in ids]
    data = Dataset.from_list(rows).train_test_split(16, seed=0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)), DatasetDict(train=data["train"], eval=data["test"])


def encode(row: dict[str, str], tokenizer: Any, max_tokens: int) -> dict[str, list[int]]:
    """Ids of the prompt and of the answer with its end; the labels are the answer's, -100 elsewhere."""
    start, answer = row["prompt"] + "\n", row["answer"]
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}]
        start = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        answer = whole.removeprefix(start).rstrip() if whole.startswith(start) else answer
    given = tokenizer(start, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    learned = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if learned[-1:] != [tokenizer.eos_token_id]:
        learned.append(tokenizer.eos_token_id)
    return {"input_ids": (given + learned)[:max_tokens], "labels": ([-100] * len(given) + learned)[:max_tokens]}


def read(task: Task, tokenizer: Any) -> DatasetDict:
    files = {name: path for name, path in (("train", task.train), ("eval", task.eval)) if path}
    data = load_dataset("json", data_files=files)
    for name, part in data.items():
        if missing := {"prompt", "answer"} - set(part.column_names):
            raise SystemExit(f"{files[name]} has the columns {part.column_names}; missing: {sorted(missing)}.")
    columns = ["prompt", "answer"]
    data = data.select_columns(columns).map(
        encode, fn_kwargs={"tokenizer": tokenizer, "max_tokens": task.max_tokens}, remove_columns=columns
    )
    data = data.filter(lambda row: row["labels"][-1] != -100)  # a prompt that fills max_tokens leaves no answer
    if empty := [files[name] for name, part in data.items() if not len(part)]:
        raise SystemExit(f"Every prompt in {empty[0]} fills {task.max_tokens} tokens. Raise --max_tokens.")
    return data


def adapt(task: Task, model: Any, args: RegularizedTrainingArguments) -> Any:
    """The model with its adapter."""
    shared = {"r": task.r, "target_modules": task.target_modules, "task_type": "CAUSAL_LM"}
    given = {"gamma": task.gamma, "lambdas": task.lambdas, "folded": task.folded or None}
    own = {name: value for name, value in given.items() if value is not None}
    known = {"sorsa": {"gamma", "folded"}, "ba_lora": {"lambdas", "folded"}}.get(task.method, set())
    if wrong := sorted(own.keys() - known):
        raise SystemExit(f"--{wrong[0]} does not belong to --method {task.method}. Leave it out.")
    if task.method in ("sorsa", "ba_lora"):
        config = SorsaConfig if task.method == "sorsa" else BALoraConfig
        return get_regularized_peft_model(model, config(lora_alpha=task.lora_alpha, **shared, **own))
    start = "pissa" if task.method == "pissa" else True
    model = get_peft_model(model, LoraConfig(lora_alpha=task.lora_alpha or task.r, init_lora_weights=start, **shared))
    if task.method == "pissa":  # PEFT takes the start out of the base weights: keep it, to save plain LoRA in the end
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(os.path.join(args.output_dir, "pissa_start"), is_main_process=args.should_save)
        model.peft_config["default"].init_lora_weights = "pissa"
    return model


def main() -> None:
    task, args = HfArgumentParser((Task, RegularizedTrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)  # LoRA's first factors are drawn before the trainer is made
    tokenizer = collator = None
    if task.smoke:
        model, data = smoke()
        args.max_steps, args.logging_steps, args.report_to = 4, 1, []
    elif task.train:
        tokenizer = AutoTokenizer.from_pretrained(task.model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        data = read(task, tokenizer)
        model = AutoModelForCausalLM.from_pretrained(task.model)
        collator = DataCollatorForSeq2Seq(tokenizer)  # labels are padded with -100, whatever the padding token
    else:
        raise SystemExit("Give --train FILE (and --eval FILE), or --smoke for a run without data.")
    base = copy.deepcopy(model) if task.drift else None
    trainer = RegularizedTrainer(
        model=adapt(task, model, args), args=args, train_dataset=data["train"], eval_dataset=data.get("eval"),
        processing_class=tokenizer, data_collator=collator,
    )  # fmt: skip
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    there = os.path.isdir(args.output_dir) and (task.resume or restarted)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.output_dir) if there else None)
    if "eval" in data:
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_model()
    trainer.save_state()
    if task.method == "pissa" and args.should_save:
        start = os.path.join(args.output_dir, "pissa_start")
        trainer.model.save_pretrained(args.output_dir, path_initial_model_for_weight_conversion=start)
    if base is not None and args.should_save:
        drift = spectrum_drift(None, PeftModel.from_pretrained(base, args.output_dir), rank=task.r)
        print(drift)
        drift.plot().savefig(task.drift)


if __name__ == "__main__":
    main()
