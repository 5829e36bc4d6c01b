"""`python -m recording FOLDER CONFIG ...`: bigan train, which records every sample it reads.

Each rank of each attempt appends the positions of its batches to a separate file in FOLDER.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from bigan.cli.main import main
from bigan.data.streaming import stream


def record(folder: Path) -> None:
    rank = os.environ.get("RANK", "0")
    path = folder / f"{time.time_ns()}-{rank}.jsonl"
    original = stream.ShardStream.__next__

    def recorded(self: stream.ShardStream) -> stream.Batch:
        batch = original(self)
        with path.open("a") as file:
            file.write(json.dumps(batch.positions.tolist()) + "\n")
        return batch

    stream.ShardStream.__next__ = recorded  # type: ignore[method-assign]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    record(folder)
    sys.exit(main(["train", *sys.argv[2:]]))
