"""RPO: a step of the preference trainer against one of TRL's DPO trainer with the same loss, on the same pairs."""

from __future__ import annotations

import copy
import logging
import random
import tempfile
from collections.abc import Callable
from typing import Any

import datasets
import torch
import trl
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_reg import RPOConfig, RPOTrainer
from hf_reg.losses import LinearHead, token_log_probs

from .balora import VOCABULARY, base
from .steps import trainer_step
from .timing import Row, interleave, peak_memory, ratio


PAIRS, BETA, WEIGHT = 4, 0.1, 0.5
SHAPES = {(128, 128): (0.50, 0.48), (256, 128): (0.40, 0.40)}  # targets: reference computed in the step, and before
MEMORY = 0.25
Steps = dict[str, Callable[[], Any]]


def tokenizer() -> PreTrainedTokenizerFast:
    """Words are tokens."""
    special = {"<pad>": 0, "<eos>": 1}
    words = special | {f"w{index}": index for index in range(len(special), VOCABULARY)}
    own = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", eos_token="<eos>")


def rows(prompt: int, answer: int) -> list[dict[str, str]]:
    """Pairs of random words, of exactly so many tokens; an answer ends with EOS."""
    draw = random.Random(0)

    def text(count: int) -> str:
        return "".join(f"w{draw.randrange(2, VOCABULARY)} " for _ in range(count))

    return [
        {"prompt": text(prompt), "chosen": text(answer - 1) + "<eos>", "rejected": text(answer - 1) + "<eos>"}
        for _ in range(PAIRS)
    ]


def policy(lora: bool) -> Any:
    if not lora:
        return base()
    return get_peft_model(base(), LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def steps(shape: tuple[int, int], lora: bool, folder: str) -> Steps:
    """A whole optimizer step of either trainer, reference computed in the step or before; models are shared."""
    common: dict[str, Any] = {
        "learning_rate": 1e-7, "report_to": [], "use_cpu": True, "bf16": False, "max_length": None, "beta": BETA,
        "per_device_train_batch_size": PAIRS, "disable_tqdm": True, "gradient_checkpointing": False,
    }  # fmt: skip
    data, other = rows(*shape), None if lora else base()
    made: dict[str, Any] = {}
    for name, precomputed in (("TRL", False), ("TRL, precomputed", True)):
        config = trl.DPOConfig(
            folder, loss_type=["sigmoid", "sft"], loss_weights=[1.0, WEIGHT], precompute_ref_log_probs=precomputed,
            **common,
        )  # fmt: skip
        made[name] = trl.DPOTrainer(
            policy(lora), copy.deepcopy(other), config, train_dataset=datasets.Dataset.from_list(data),
            processing_class=tokenizer(),
        )  # fmt: skip
    stored = made["TRL, precomputed"].train_dataset
    columns = ("ref_chosen_logps", "ref_rejected_logps")
    given = [row | {name: stored[index][name] for name in columns} for index, row in enumerate(data)]
    for name, own in (("RPOTrainer", data), ("RPOTrainer, precomputed", given)):
        config = RPOConfig(folder, variant="trl", eta=WEIGHT, **common)
        made[name] = RPOTrainer(
            policy(lora), config, train_dataset=own, processing_class=tokenizer(),
            ref_model=other if own is data else None,
        )  # fmt: skip
    found: Steps = {}
    for name, trainer in made.items():
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(PAIRS)])
        found[name] = trainer_step(trainer, batch)
    return found


def kernels() -> Steps:
    """Log-probs of 512 of 1,024 positions with their gradient, from what enters a head of 32,000 tokens."""
    torch.manual_seed(0)
    hidden, tokens = torch.randn(1024, 512, requires_grad=True), torch.randint(VOCABULARY, (1024,))
    weight, answers = torch.randn(VOCABULARY, 512) * 0.02, torch.arange(1024) % 2 == 1

    def whole(trained: bool, chosen: torch.Tensor) -> Callable[[], None]:
        head = weight.clone().requires_grad_(trained)

        def run() -> None:
            logits = hidden[chosen] @ head.mT
            logits.log_softmax(-1).gather(1, tokens[chosen][:, None]).sum().backward()

        return run

    def chunks(trained: bool) -> Callable[[], None]:
        head = LinearHead(weight.clone().requires_grad_(trained))
        return lambda: token_log_probs(hidden[answers], tokens[answers], head).sum().backward()

    return {
        "logits of all positions": whole(False, torch.ones(1024, dtype=torch.bool)),
        "logits of answers, frozen head": whole(False, answers), "token_log_probs, frozen head": chunks(False),
        "logits of answers, trained head": whole(True, answers), "token_log_probs, trained head": chunks(True),
    }  # fmt: skip


def run(rounds: int) -> list[Row]:
    for name in ("transformers", "trl", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    table, made = [], kernels()
    times = interleave(made, min(rounds, 11), "log-probs of answers")
    case = "log-probs of 512 of 1,024 positions, vocabulary 32,000"
    pairs = [("token_log_probs, frozen head", "logits of all positions")]
    pairs += [(f"token_log_probs, {head}", f"logits of answers, {head}") for head in ("frozen head", "trained head")]
    peaks = {name: peak_memory(step) for name, step in made.items()}
    for ours, peer in pairs:
        middle, spread = ratio(times, ours, peer)
        table.append(Row("RPO", case, ours, peer, middle, None, spread=spread))
        table.append(Row("RPO", f"{case}, peak memory", ours, peer, peaks[ours] / peaks[peer], None))
    with tempfile.TemporaryDirectory() as folder:
        for shape, targets in SHAPES.items():
            made = steps(shape, False, folder)
            case = f"56M step, {PAIRS} pairs, prompt {shape[0]}, answers {shape[1]}"
            times = interleave(made, min(rounds, 9), f"RPO step {shape[0]} + {shape[1]}")
            for ending, target in zip(("", ", precomputed"), targets, strict=True):
                middle, spread = ratio(times, "RPOTrainer" + ending, "TRL" + ending)
                table.append(Row("RPO", case, "RPOTrainer" + ending, "TRL" + ending, middle, target, spread=spread))
            del made
        case = f"56M LoRA step, {PAIRS} pairs, prompt 256, answers 128, peak memory"
        peaks = {name: peak_memory(step) for name, step in steps((256, 128), True, folder).items()}
        for ending in ("", ", precomputed"):
            names = ("RPOTrainer" + ending, "TRL" + ending)
            table.append(Row("RPO", case, *names, peaks[names[0]] / peaks[names[1]], MEMORY))
    return table
