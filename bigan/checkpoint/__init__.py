"""Checkpoints: the complete state of a run at a step boundary, written atomically.

    <run_dir>/checkpoints/<images_seen>/part-00000-of-00002.safetensors   one file per rank
                                        part-00001-of-00002.safetensors
                                        progress.json    format, counters, size and CRC-32 of parts
                                        COMPLETE         written last

Random draws and the data order are functions of `images_seen`, so there is no generator or loader
state to save.

Every engine writes this one format and reads what any other engine wrote, at any world size.
Unsharded tensors (one process, DDP), dim-0 chunks (FSDP2) and flat partitions (ZeRO) are all ranges
of the flattened, row-major tensor, and a part contains such ranges (`TensorShard`):

- an unsharded tensor under its name and in its shape ("networks/generator.linear.weight",
  "optimizers/generator.linear.weight.exp_avg");
- the range that begins at element `start` as a 1-D tensor named "<name>@<start>"; the unsharded
  shape is in the part's metadata: {"ranges": '{"<name>@<start>": [64, 3, 3, 3], ...}'}.

`Reader` reads the headers, checks that the shards cover every tensor exactly once, and reads any
range of any tensor. torch.distributed.checkpoint is not used: its safetensors writer stores n-d
boxes, not ranges of flattened tensors, and no checksums (docs/decisions.md).

    progress.py       counters and progress.json     retention.py  which checkpoints are kept
    tensor_shards.py  the shards of a rank           part.py       the file of one rank
    folder.py         staging folder to checkpoint   reader.py     any range of any tensor
    saver.py          asynchronous saving            fit.py        comparison with a model
"""

from bigan.checkpoint.fit import check_fit, load, optimizer_shapes
from bigan.checkpoint.progress import (
    FORMAT,
    CheckpointError,
    DamagedError,
    Progress,
    read_progress,
    update_progress,
)
from bigan.checkpoint.reader import Reader
from bigan.checkpoint.retention import (
    discard_after,
    latest,
    latest_until,
    newest_first,
    prune,
    set_aside,
)
from bigan.checkpoint.saver import Saver
from bigan.checkpoint.tensor_shards import TensorShard, require_finite

__all__ = [
    "FORMAT",
    "CheckpointError",
    "DamagedError",
    "Progress",
    "Reader",
    "Saver",
    "TensorShard",
    "check_fit",
    "discard_after",
    "latest",
    "latest_until",
    "load",
    "newest_first",
    "optimizer_shapes",
    "prune",
    "read_progress",
    "require_finite",
    "set_aside",
    "update_progress",
]
