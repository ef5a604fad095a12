"""What test_end_to_end.py launches: sharded runs that save, resume and push, with the real verification and card."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import torch

from ..distributed.fsdp_on_cpu import FSDP2  # before anything that makes an Accelerator
from . import loopback


def trainer(name: str, kind: str, folder: Path) -> Any:
    from peft import LoraConfig, get_peft_model

    from hf_reg import RegularizedTrainer, RegularizedTrainingArguments

    from ..adapters.models import adapted, build, inputs
    from ..distributed.run import ZERO3

    family, layer = ("bert", "BertLayer") if name == "bert" else ("llama", "LlamaDecoderLayer")
    sharding: dict[str, Any] = dict(ZERO3)
    if kind == "fsdp2":
        sharding = FSDP2 | {"fsdp_config": FSDP2["fsdp_config"] | {"transformer_layer_cls_to_wrap": [layer]}}
    args = RegularizedTrainingArguments(
        str(folder / name), max_steps=2, save_steps=1, per_device_train_batch_size=1, report_to=[], use_cpu=True,
        disable_tqdm=True, learning_rate=0.01, hub_model_id=f"alice/{name}", **sharding,
    )  # fmt: skip
    rows = [{key: value[i % 3] for key, value in inputs(family).items()} for i in range(4)]
    if name == "sorsa":
        return RegularizedTrainer(model=adapted(orthonormality="coupled"), args=args, train_dataset=rows)
    model = build(family)
    if name == "lora":
        settings = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(model, settings)
    return RegularizedTrainer(model=model, args=args, train_dataset=rows, patches="drophead")


def failure(action: Any) -> tuple[str, str]:
    try:
        action()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def keep_apart(made: Any) -> None:
    """From here on the trainer does not gather what it saves."""
    if made.is_fsdp_enabled:
        made.accelerator.state.fsdp_plugin.set_state_dict_type("SHARDED_STATE_DICT")
    else:
        made.deepspeed._config.zero_config.gather_16bit_weights_on_model_save = False


def main(kind: str, folder: Path) -> None:
    """Each process notes what it pushed, and how the rest failed: by everyone's fault, and by the first one's."""
    from hf_reg import push_to_hub

    got: dict[str, str] = {}
    for name in ("sorsa", "lora", "bert"):
        made = trainer(name, kind, folder)
        made.train()
        made.save_model(str(folder / name / "final"))
        got[name] = made.push_to_hub(base_model=None if name == "bert" else "alice/base").oid
        again = trainer(name, kind, folder)
        again.train(resume_from_checkpoint=str(folder / name / "checkpoint-1"))
        again.save_model(str(folder / name / "resumed"))
    rank = torch.distributed.get_rank()

    def push(**settings: Any) -> None:
        push_to_hub(made, "alice/none", base_model="alice/base", **settings)

    failures = [failure(lambda: push(token="hf_" + "Nobody" * 6))]
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, resource.RLIM_INFINITY))
    failures.append(failure(push))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    keep_apart(made)
    failures.append(failure(push))
    failures.append(failure(lambda: made.save_model(str(folder / "bert" / "final"))))
    torch.save([got, failures], folder / f"{rank}.pt")


if __name__ == "__main__":
    with loopback.only_loopback():
        main(sys.argv[1], Path(sys.argv[2]))
    assert loopback.contacted <= set(loopback.LOCAL)
