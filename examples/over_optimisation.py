"""Reward over-optimisation: DPO against RPO on a real model and real pairs, with the same batches, seeds and settings.

    python examples/over_optimisation.py --output_dir out --etas 0 0.2 1  # half an hour on one core; can be resumed
    python examples/over_optimisation.py --output_dir choice --on validation --etas 0 0.05 0.2 1 --seeds 100 \\
        --every 16 --set max_steps=32
    python examples/over_optimisation.py --output_dir tiny --smoke        # seconds: a tiny model, made-up pairs

SmolLM2-135M-Instruct first learns 249 right answers (two epochs): that is the start of every run, and its reference.
Every few steps the policy is measured on pairs it does not learn from (body in bf16, as in training, head in fp32);
sums are over an answer's tokens and its end, means over pairs unless it says otherwise:

- `chosen`, `rejected`: change of the answer's log-prob since the start, log pi(y) - log pi_ref(y), in nats;
- `margin`: the reward of the chosen answer minus that of the rejected one, beta * (chosen - rejected), in nats;
- `train_margin`: the same of the pairs learned from, a mean over the steps since the last measurement;
- `accuracy`: share of pairs whose margin is above 0; a margin of 0 counts half;
- `kl`: KL(pi || pi_ref) of the next token, exact over the vocabulary, in nats a token; a mean over the tokens of both
  answers, as the data gives them: not over text that the policy writes.

`out/` gets a file of these numbers for each run, numbers.json, table.md and curves.png.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from datasets import load_dataset
from finetune_lora import encode
from local_models import CACHE, NotAvailable, piqa, smollm2
from peft import LoraConfig, get_peft_model
from train_rpo import smoke
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import set_seed

from hf_reg import RPOConfig, RPOTrainer
from hf_reg.preferences import PreferenceCollator, prepare_preferences


SHARED = {
    "bf16": True, "use_cpu": True, "logging_steps": 8, "save_strategy": "no", "report_to": "none",
    "disable_tqdm": True,
}  # fmt: skip
SETTINGS = SHARED | {
    "variant": "cumulative", "beta": 0.1, "learning_rate": 5e-4, "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5, "max_steps": 40, "per_device_train_batch_size": 8,
}  # fmt: skip
SFT = {"learning_rate": 5e-4, "warmup_steps": 3, "num_train_epochs": 2, "per_device_train_batch_size": 16}
SMOKE = {"max_steps": 4, "bf16": False, "warmup_steps": 0}
LORA = {"r": 16, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
PAIRS = 128  # to learn from: 16 steps are an epoch
CHUNK = 256  # positions whose distributions over the vocabulary are held at once
PANELS = {  # what is drawn, as what, and where it starts
    "chosen": ("log-prob of the answer - start\n[nats per answer]", 0), "margin": ("reward margin [nats]", 0),
    "kl": ("KL(policy || reference)\n[nats per token]", 0), "accuracy": ("reward accuracy [share of pairs]", 0.5),
}  # fmt: skip
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#e69f00", "#56b4e9")  # Okabe and Ito's


class Measure(TrainerCallback):
    """Measures the policy at the start and every `every` steps; `rows` are the numbers."""

    def __init__(self, model: Any, pairs: list, collator: PreferenceCollator, beta: float, every: int) -> None:
        self.model, self.beta, self.every = model, beta, every
        self.rows: list[dict[str, float]] = []
        pairs = sorted(pairs, key=lambda pair: len(pair["prompt_ids"]) + len(pair["chosen_ids"]))
        self.batches = [collator(pairs[i : i + 8]) for i in range(0, len(pairs), 8)]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bf16 = args.bf16
        with self.model.disable_adapter():
            self.reference = [self.states(batch) for batch in self.batches]
        self.rows.append({"step": 0, **self.measure()})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.rows.append({"step": state.global_step, **self.measure()})
            print(self.rows[-1], flush=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "rewards/margins" in logs and self.rows[-1]["step"] == state.global_step:
            self.rows[-1]["train_margin"] = logs["rewards/margins"]

    @torch.no_grad()
    def states(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """What enters the head where it predicts the tokens of answers, (M, d)."""
        base = self.model.get_base_model()
        body, device = getattr(base, base.base_model_prefix), base.device
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        self.model.eval()
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            hidden = body(**inputs, use_cache=False).last_hidden_state[:, :-1]
        self.model.train()
        return hidden[batch["completion_mask"][:, 1:].bool().to(device)].float()

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        head = self.model.get_output_embeddings()
        divergence, changes, starts = [], [], []
        for batch, reference in zip(self.batches, self.reference, strict=True):
            mask = batch["completion_mask"][:, 1:].bool()
            tokens = batch["input_ids"][:, 1:][mask].to(reference.device)
            found = []
            for parts in zip(*(one.split(CHUNK) for one in (self.states(batch), reference, tokens)), strict=True):
                policy, other = (head(states).float().log_softmax(-1) for states in parts[:2])
                divergence.append((policy.exp() * (policy - other)).sum(-1))
                found.append(torch.stack([one.gather(1, parts[2][:, None])[:, 0] for one in (policy - other, other)]))
            for values, sums in zip(torch.cat(found, dim=1).cpu(), (changes, starts), strict=True):
                sums.append(values.new_zeros(mask.shape).masked_scatter(mask, values).sum(1).view(2, -1))
        chosen, rejected = torch.cat(changes, dim=1)
        margins = self.beta * (chosen - rejected)
        values = {
            "chosen": chosen, "rejected": rejected, "margin": margins, "accuracy": (margins.sign() + 1) / 2,
            "kl": torch.cat(divergence), "chosen_start": torch.cat(starts, dim=1)[0],
            "rejected_start": torch.cat(starts, dim=1)[1],
        }  # fmt: skip
        return {name: float(value.mean()) for name, value in values.items()}


def data(options: argparse.Namespace) -> tuple[Any, Any, list, list]:
    """A new model, its tokenizer, pairs to learn from and pairs to measure on."""
    if options.smoke:
        model, tokenizer, pairs = smoke()
        return model, tokenizer, pairs["train"], pairs["eval"]
    pairs = load_dataset("json", data_files={name: str(path) for name, path in piqa().items()})
    folder = fine_tuned()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return model, tokenizer, pairs["train"].select(range(PAIRS)), pairs[options.on]


def fine_tuned() -> Path:
    """Where every run starts, and the reference: SmolLM2 after it learned the right answers to other prompts."""
    folder = CACHE / "SmolLM2-135M-piqa"
    if folder.is_dir():
        return folder
    partial = folder.with_suffix(f".{os.getpid()}.partial")
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    tokenizer.chat_template = None  # plain text: its system prompt is longer than most pairs
    rows = [json.loads(line) for line in piqa()["first"].read_text().splitlines()]
    rows = [encode({"prompt": row["prompt"].strip(), "answer": row["chosen"]}, tokenizer, 128) for row in rows]
    set_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(smollm2()), LoraConfig(**LORA))
    args = TrainingArguments(str(partial), **SHARED, **SFT)
    Trainer(model, args, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer)).train()
    model.merge_and_unload().save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return folder


def run(eta: float, seed: int, options: argparse.Namespace) -> list[dict[str, float]]:
    """The measurements of one run, unless `output_dir` has them already."""
    file = options.output_dir / f"{options.on}-eta{eta:g}-seed{seed}.json"
    if file.is_file():
        return json.loads(file.read_text())
    set_seed(seed)  # LoRA's first factors
    model, tokenizer, train, measured = data(options)
    settings = SETTINGS | {"logging_steps": options.every} | (SMOKE if options.smoke else {}) | dict(options.set)
    args = RPOConfig(str(options.output_dir), eta=eta, seed=seed, **settings)
    model = get_peft_model(model, LoraConfig(**LORA))
    pairs = prepare_preferences(measured, tokenizer, name=options.on)
    measure = Measure(model, pairs, PreferenceCollator(tokenizer.pad_token_id), args.beta, options.every)
    RPOTrainer(model, args, train_dataset=train, processing_class=tokenizer, callbacks=[measure]).train()
    file.write_text(json.dumps(measure.rows))
    return measure.rows


def label(eta: float) -> str:
    return f"RPO, eta = {eta:g}" if eta else "DPO"


def shown(values: list[float], digits: int) -> str:
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def table(found: dict[float, list[list[dict]]]) -> str:
    columns = {  # name and digits
        "chosen": ("chosen", 2), "rejected": ("rejected", 2), "train_margin": ("margin, training", 2),
        "margin": ("margin", 3), "accuracy": ("accuracy", 3), "kl": ("KL", 2),
    }  # fmt: skip
    lines = ["| loss | " + " | ".join(title for title, _ in columns.values()) + " |", "|---" * 7 + "|"]
    for eta, runs in found.items():
        cells = [shown([rows[-1][name] for rows in runs], digits) for name, (_, digits) in columns.items()]
        lines.append(f"| {label(eta)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def over_seeds(runs: list[list[dict]], name: str) -> tuple[list[int], list[float], list[float]]:
    """Steps, and the mean and the standard deviation of the runs there."""
    values = [[row[name] for row in rows] for rows in zip(*runs, strict=True)]
    return [row["step"] for row in runs[0]], list(map(mean, values)), [stdev(v) if len(v) > 1 else 0.0 for v in values]


def draw(found: dict[float, list[list[dict]]], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    for (name, (title, start)), axes in zip(PANELS.items(), figure.subplots(2, 2, sharex=True).flat, strict=True):
        for colour, (eta, runs) in zip(COLOURS, found.items(), strict=False):
            steps, middle, spread = over_seeds(runs, name)
            axes.plot(steps, middle, color=colour, linewidth=2, label=label(eta))
            low, high = ([m + sign * s for m, s in zip(middle, spread, strict=True)] for sign in (-1, 1))
            axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
            if name == "chosen":
                steps, middle, _ = over_seeds(runs, "rejected")
                axes.plot(steps, middle, color=colour, linestyle=(0, (2, 2)))
        axes.axhline(start, color="black", linewidth=0.8)
        axes.set_ylabel(title)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    for axes in figure.axes[2:]:
        axes.set_xlabel("step of 8 pairs")
    figure.axes[0].legend(frameon=False, title="solid: chosen, dashed: rejected")
    seeds = len(next(iter(found.values())))
    figure.suptitle(f"Pairs not learned from: mean and standard deviation over {seeds} seeds", fontsize="medium")
    figure.savefig(file, dpi=90)


def setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, json.loads(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--etas", type=float, nargs="+", default=[0.0, 1.0], help="0 is DPO.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--on", choices=["held_out", "validation"], default="held_out", help="What is measured on.")
    parser.add_argument("--every", type=int, default=8, help="Steps between measurements.")
    parser.add_argument("--set", type=setting, nargs="+", default=[], metavar="NAME=JSON", help="Of RPOConfig.")
    parser.add_argument("--smoke", action="store_true", help="A tiny model and made-up pairs, four steps.")
    options = parser.parse_args()
    if options.smoke:
        options.every = 2
    options.output_dir.mkdir(parents=True, exist_ok=True)
    try:
        found = {eta: [run(eta, seed, options) for seed in options.seeds] for eta in options.etas}
    except NotAvailable as error:
        raise SystemExit(str(error)) from error
    numbers = {label(eta): dict(zip(options.seeds, runs, strict=True)) for eta, runs in found.items()}
    (options.output_dir / "numbers.json").write_text(json.dumps(numbers, indent=1))
    (options.output_dir / "table.md").write_text(table(found) + "\n")
    draw(found, options.output_dir / "curves.png")
    print(table(found))


if __name__ == "__main__":
    main()
