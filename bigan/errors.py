"""Exceptions with messages for users.

Anything that the user can correct (a config key, a shard folder, an image, a checkpoint, the launch
environment) is a `UserError`: one line with where, what is wrong and what to do. The command line
prints it without a traceback and exits with code 2. Any other exception is a bug.

The kind of an error (`kind_of`) decides whether a batch job is worth another attempt:

    input, run   the same command fails again
    lost         a rank, a connection or a server was lost: the next attempt can succeed
    taken_over   another trainer continues the run
    bug          unknown
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, the limit of a file's size
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)
# Of a disk, a server or a network that answers again later.
_PASSING = (
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNREFUSED, errno.ECONNRESET,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
)  # fmt: skip
INPUT, RUN, LOST, TAKEN_OVER, BUG = "input", "run", "lost", "taken_over", "bug"
REPORTED_ELSEWHERE = "reported by another rank"  # a note on an error that rank 0 prints


class UserError(Exception):
    """Invalid input; the message is one line: where it is, what is wrong, what to do.

    `everywhere`: every rank raises the same error, so that rank 0 alone prints it.
    """

    kind = INPUT
    everywhere = False


class LaunchError(UserError):
    """A launch that cannot work, or ranks that differ."""

    everywhere = True


class JoinError(LaunchError):
    """Ranks that could not be connected: a port in use, a rank that is late, a network."""

    kind = LOST
    everywhere = False


class PeerError(RuntimeError):
    """An unexpected error of one rank, raised on all ranks."""


class RunError(Exception):
    """A run that had to stop, for example after a non-finite loss. Exit code 1.

    The last checkpoint is intact.
    """

    kind = RUN


class LostError(RunError):
    """A rank, its connection or its weights were lost; resuming from the checkpoint can succeed."""

    kind = LOST


def kind_of(error: BaseException) -> str:
    """The kind of an error, from the error that it reports where that one passes."""
    reported = error.__cause__ or error.__context__
    for each in (error, reported):
        if isinstance(each, OSError) and each.errno in _PASSING:
            return LOST
        if isinstance(each, UserError | RunError) and each.kind == LOST:
            return LOST
    if isinstance(error, UserError | RunError):
        return error.kind
    return INPUT if isinstance(error, OSError) and unusable_file(error) else BUG


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Converts an OSError to a `UserError`: `path` cannot be written, why, and what to do."""
    try:
        yield
    except OSError as error:
        remedy = _remedy(error)
        raise UserError(
            f"{path}: cannot be written: {_reason(error)}"
            + (f"; {remedy} and run the same command again" if remedy else "")
        ) from error


def disk_is_full(error: OSError) -> bool:
    """Whether a disk or a quota is full."""
    return error.errno in _FULL


def unusable_file(error: OSError) -> UserError | None:
    """The `UserError` of a file or a disk that cannot be used; None for another OSError."""
    if error.filename:
        return UserError(f"{os.fsdecode(error.filename)}: {_reason(error)}")
    if disk_is_full(error):
        return UserError(f"a file or the output: {_reason(error)}; {_remedy(error)}")
    return None


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _remedy(error: OSError) -> str:
    if disk_is_full(error):
        return "free some space or raise the quota"
    return "make its folder writable" if error.errno in _CLOSED else ""


class NonFiniteError(RunError):
    """A loss, gradient or weight that is not finite; the first clause states which, and when."""

    @property
    def finding(self) -> str:
        """The message without its advice."""
        return str(self).partition(";")[0]
