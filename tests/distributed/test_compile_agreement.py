"""A phase that cannot be compiled on one rank must not leave the others in a collective."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from commands import ROOT, environment, free_port

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
"""


def test_compilation_failure_is_known_on_all_ranks(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, "--master_port", str(free_port()), str(script), str(tmp_path)],
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    zero, one = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert zero == [True, False, False]
    assert one[:3] == zero
    assert "rank 1 cannot compile" in one[3]
    assert "disk full" in one[3]
