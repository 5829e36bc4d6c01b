"""Exceptions with messages for users.

Anything that the user can correct (a config key, a shard folder, an image, a checkpoint, the launch
environment) is a `UserError`: one line with where, what is wrong and what to do. The command line
prints it without a traceback and exits with code 2. Any other exception is a bug.
"""

REPORTED_ELSEWHERE = "reported by another rank"  # a note on an error that rank 0 prints


class UserError(Exception):
    """Invalid input; the message is one line: where it is, what is wrong, what to do.

    `everywhere`: every rank raises the same error, so that rank 0 alone prints it.
    """

    everywhere = False


class LaunchError(UserError):
    """A launch that cannot work, or ranks that differ."""

    everywhere = True


class PeerError(RuntimeError):
    """An unexpected error of one rank, raised on all ranks."""


class RunError(Exception):
    """A run that had to stop, for example after a non-finite loss. Exit code 1.

    The last checkpoint is intact.
    """


class NonFiniteError(RunError):
    """A loss, gradient or weight that is not finite; the first clause states which, and when."""

    @property
    def finding(self) -> str:
        """The message without its advice."""
        return str(self).partition(";")[0]
