"""A script that makes a trainer and nothing else: it has to be refused under the launches of test_processes.py."""

from __future__ import annotations

import os
import sys

from hf_reg import RegularizedTrainer, RegularizedTrainingArguments

from .heads import make, rows


if __name__ == "__main__":
    args = RegularizedTrainingArguments(
        sys.argv[1], use_cpu=not os.environ.get("ALONE"), fsdp=bool(os.environ.get("FSDP")) or None, report_to=[]
    )
    RegularizedTrainer(model=make("classes/bert"), args=args, train_dataset=rows("classes/bert"), patches="tlm")
