"""Checkpoints: the complete state of a run at a step boundary, whole or absent.

    <run_dir>/checkpoints/<images_seen>/part-00000-of-00002.safetensors   one of each process
                                        part-00001-of-00002.safetensors
                                        progress.json    format, counters, size and CRC-32 of parts
                                        COMPLETE         written last

Random draws and the data order are functions of `images_seen`, so there is no generator or loader
state to keep.

Every engine writes this one format (2) and reads what any other wrote, on any number of processes.
Whole tensors (one process, DDP), dim-0 chunks (FSDP2) and flat partitions (ZeRO) are all ranges of
the flattened, row-major tensor, and a part holds just those (`Piece`):

- a whole tensor under its name and in its shape ("networks/g.linear.weight",
  "optimizers/g.linear.weight.exp_avg");
- the range that begins at element `start` as a 1-D tensor named "<name>@<start>", the whole shape
  being in the part's metadata: {"ranges": '{"<name>@<start>": [64, 3, 3, 3], ...}'}.

A reader looks at the headers, checks that the pieces cover every tensor exactly, and reads any
range of any tensor. torch.distributed.checkpoint can do that too, but its metadata file is a
pickle: nothing in our checkpoints can run code when it is loaded, whoever wrote them.

Format 1 (networks.safetensors, optimizers.safetensors, no checksums) is still read.

    progress.py   counters and progress.json        retention.py  which checkpoints are kept
    pieces.py     what a process holds              part.py       one process's file
    folder.py     a draft becomes a checkpoint      reader.py     any range of any tensor
    saver.py      saving while training goes on     fit.py        is it of this model?
"""

from bigan.checkpoint.fit import check_fit, load, optimizer_shapes
from bigan.checkpoint.pieces import Piece, require_finite
from bigan.checkpoint.progress import FORMAT, CheckpointError, Progress, amend, read_progress
from bigan.checkpoint.reader import Reader
from bigan.checkpoint.retention import discard_after, latest, newest_until, prune
from bigan.checkpoint.saver import Saver

__all__ = [
    "FORMAT",
    "CheckpointError",
    "Piece",
    "Progress",
    "Reader",
    "Saver",
    "amend",
    "check_fit",
    "discard_after",
    "latest",
    "load",
    "newest_until",
    "optimizer_shapes",
    "prune",
    "read_progress",
    "require_finite",
]
