"""Stages that stand in for those of ``benchmarks.gpu``: they fail in the ways in which a GPU makes stages fail."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection

from benchmarks.gpu import Settings


def serve(connection: Connection, settings: Settings) -> None:
    """Do what the name of each stage says, and tell the number of stages that this process has run."""
    os.setsid()
    connection.send(("environment", {"device": settings.device}))
    number = 0
    while True:
        try:
            stage, _ = connection.recv()
        except EOFError:
            return
        number += 1
        connection.send(("partial", {"half": number}))
        if stage == "sampler":
            connection.send(("failed", "RuntimeError: no luck"))
        elif stage == "attention":
            os._exit(9)
        elif stage == "compile":
            time.sleep(600)
        else:
            connection.send(("done", {"stages_of_process": number}))
