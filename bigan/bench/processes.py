"""The processes of one measured point.

The processes of all points are started once; the points are then measured in rotation, so that a
machine that slows down slows all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from bigan.errors import RunError, UserError

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
LAUNCHER_PREFIXES = ("ACCELERATE_", "SLURM_", "FSDP_")


def launch_environment(
    rank: int, size: int, port: int, threads: int, base: Mapping[str, str], joined: bool
) -> dict[str, str]:
    """The variables that `torchrun` sets for process `rank` of `size` on this machine.

    `joined` is false for a single process without a process group.
    """
    kept = {
        name: value
        for name, value in base.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith(LAUNCHER_PREFIXES)
    }
    kept["OMP_NUM_THREADS"] = str(threads)
    if joined:
        kept |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
        kept |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
        kept |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return kept


def free_port() -> int:
    """A TCP port of this machine that is not in use at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Processes:
    """`size` processes of `bigan.bench.rank`, idle until `measure`; a context manager.

    Raises the `UserError` or `RunError` of a process, and `RunError` if one ends early.
    """

    def __init__(self, name: str, task: dict[str, Any], size: int, threads: int) -> None:
        self.name = name
        joined = size > 1 or task["engine"] not in ("auto", "single")
        port = free_port()
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "bigan.bench.rank"],
                env=launch_environment(rank, size, port, threads, os.environ, joined),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(size)
        ]
        self._send(json.dumps(task))

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def measure(self) -> list[dict[str, Any]]:
        """One timed run; the results of each rank, in order."""
        self._send("measure")
        return self.responses()

    def responses(self) -> list[dict[str, Any]]:
        """One response of each process; the end of any process is noticed at once."""
        pipes = [process.stdout for process in self._processes]
        by_pipe = {pipe: rank for rank, pipe in enumerate(pipes) if pipe is not None}
        found: dict[int, dict[str, Any]] = {}
        while len(found) < len(by_pipe):
            waiting = [pipe for pipe, rank in by_pipe.items() if rank not in found]
            for pipe in select.select(waiting, [], [])[0]:
                rank, line = by_pipe[pipe], pipe.readline()
                if not line:
                    code = self._processes[rank].wait()
                    raise RunError(f"{self.name}: process {rank} ended with exit code {code}")
                found[rank] = json.loads(line)
                if "error" in found[rank]:
                    raise (UserError if found[rank]["user"] else RunError)(found[rank]["error"])
        return [found[rank] for rank in range(len(found))]

    def _send(self, line: str) -> None:
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # `responses` reports its exit code
                process.stdin.write(line + "\n")
                process.stdin.flush()
