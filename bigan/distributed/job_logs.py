"""Files that a process of a batch job writes for the job's script, in the folder BIGAN_LOG_DIR.

    rank-<rank>.log                        output of the process
    failure-<time in ns>-rank-<rank>.txt   why the process failed: a kind (`errors.kind_of`), the
                                           message, and for a bug the traceback; one per line

A job that trains and evaluates at once gives its evaluator another folder.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from bigan.atomic_files import write_atomic
from bigan.distributed.signals import launched_rank, print_line
from bigan.errors import BUG, LOST, kind_of
from bigan.urls import redacted_text

FOLDER = "BIGAN_LOG_DIR"
LOGGED = ("train", "evaluate")  # commands with a log of each rank


def redirect_output() -> None:
    """Append stdout and stderr to the log of this rank, if the job has a folder for it.

    The file descriptors are redirected, so that the output of C++ libraries and of child processes
    is included. If the file cannot be written, the output stays where it is.
    """
    folder = os.environ.get(FOLDER)
    if not folder or not set(sys.argv[1:2]) & set(LOGGED):
        return
    path = Path(folder, f"rank-{launched_rank(os.environ)}.log")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        print_line(f"{path}: cannot be written ({error.strerror}); the output of this rank is here")
        return
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a line is in the file when it is printed


def write_failure(kind: str, message: str, details: str = "") -> None:
    """Write why this process exits, without secrets, if the job has a folder for that.

    A folder that cannot be written is ignored: the error itself is reported elsewhere.
    """
    folder = os.environ.get(FOLDER)
    if not folder:
        return
    lines = [kind, " ".join(message.split()), *details.splitlines()]
    content = "".join(f"{redacted_text(line)}\n" for line in lines)
    name = f"failure-{time.time_ns()}-rank-{launched_rank(os.environ)}.txt"
    with contextlib.suppress(OSError):
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_atomic(Path(folder, name), content.encode(errors="backslashreplace"), sync=False)


@contextlib.contextmanager
def failures_written() -> Iterator[None]:
    """A context that writes why it is left by an exception. Stop requests are no failures."""
    try:
        yield
    except BrokenPipeError:  # the reader of the output has ended
        raise
    except Exception as error:
        kind = _kind(error)
        message = str(error) if kind != BUG else f"{type(error).__name__}: {error}"
        write_failure(kind, message, traceback.format_exc() if kind == BUG else "")
        raise


def _kind(error: Exception) -> str:
    """`kind_of` the error; a collective that failed without a heartbeat is a lost rank, too."""
    kind = kind_of(error)
    if kind == BUG and os.environ.get("WORLD_SIZE", "1") != "1" and "torch" in sys.modules:
        from bigan.distributed.heartbeat import is_communication_error

        return LOST if is_communication_error(error) else BUG
    return kind
