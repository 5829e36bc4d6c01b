"""A phase that cannot be compiled on one rank must not leave the others in a collective."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from commands import environment, free_port

RANK = """
import json, sys, time
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from bigan.engine import compiling
from bigan.errors import RunError
from bigan.distributed.world import World

dist.init_process_group("gloo", timeout=timedelta(seconds=60))
world = World(dist.get_rank(), dist.get_world_size())
compiling.OTHERS_SECONDS = 2.0
found = [compiling.all_ranks_compiled(world, why) for why in ("", "no compiler")]
why = "" if world.is_rank_0 else "on one, no collective"
found.append(compiling.all_ranks_compiled(world, why))
dist.barrier()
if not world.is_rank_0:  # rank 0 is inside the phase, waiting for this one
    try:
        compiling.all_ranks_compiled(world, "disk full")
    except RunError as error:
        found.append(str(error))
Path(sys.argv[1], f"{world.rank}.json").write_text(json.dumps(found))
while not Path(sys.argv[1], "1.json").exists():  # rank 0 hosts the store
    time.sleep(0.05)
"""


def test_compilation_failure_is_known_on_all_ranks(tmp_path: Path) -> None:
    shared = environment() | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path)],
            env=shared | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    zero, one = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert zero == [True, False, False]
    assert one[:3] == zero
    assert "rank 1 cannot compile" in one[3]
    assert "disk full" in one[3]
