"""The one kind of error a user is meant to read.

Anything the user can put right (a config key, a shard folder, an image, a checkpoint, the launch
environment) is a `UserError`: one line that says where, what is wrong and what to do. The command
line prints it without a traceback and exits with code 2; everything else is a bug of ours.
"""


class UserError(Exception):
    """Bad input, described in one line: where it is, what is wrong, what to do about it.

    `everywhere`: every process of a launch finds the same, so that one of them says it.
    """

    everywhere = False


class LaunchError(UserError):
    """Processes that were started in a way that cannot work."""

    everywhere = True


class PeerError(RuntimeError):
    """A bug that one process ran into, told to all of them."""


class RunError(Exception):
    """A run that had to stop (a non-finite loss, say), its last checkpoint intact. Exit code 1."""
