"""`-m tests.distributed.process MODULE ARGUMENTS`: runs a module, then leaves the process group with the others.

The process ends without torch's static destructors, of which one aborts once in some twenty times on a busy machine
("terminate called without an active exception", torch 2.13 with gloo): that would be a failure of any test.
"""

from __future__ import annotations

import os
import runpy
import sys

import torch.distributed


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:  # of a command line
        if end.code:
            raise
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
