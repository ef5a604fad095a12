"""A script that makes a trainer and nothing else: it has to be refused under the launches of test_processes.py."""

from __future__ import annotations

import os
import sys

import torch

from hf_reg import RegularizedTrainer, RegularizedTrainingArguments

from .heads import make, rows


if __name__ == "__main__":
    args = RegularizedTrainingArguments(
        sys.argv[1], use_cpu=not os.environ.get("ALONE"), fsdp=bool(os.environ.get("FSDP")) or None, report_to=[]
    )
    if os.environ.get("UNUSED"):  # a parameter that the penalty uses and the forward does not
        model = make("classes/bert")
        model.extra = torch.nn.Parameter(torch.ones(3))
        args.max_steps, args.save_strategy = 1, "no"
        args.ddp_find_unused_parameters = os.environ["UNUSED"] == "find"
        trainer = RegularizedTrainer(model=model, args=args, train_dataset=rows("classes/bert"), penalties={"l2": 0.1})
        trainer.train()
        assert model.extra.grad is None and not torch.equal(model.extra, torch.ones(3))
    else:
        RegularizedTrainer(model=make("classes/bert"), args=args, train_dataset=rows("classes/bert"), patches="tlm")
