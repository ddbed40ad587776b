"""Run a module of the tests as a script in one of several processes, and end as the command does.

``python -m torch.distributed.run ... -m tests.on_rank MODULE ARGUMENT...``
"""

from __future__ import annotations

import runpy
import sys

from spo.processes import end_process

if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    end_process(0)
