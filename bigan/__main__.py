"""`python -m bigan`, and the installed script `bigan`: the command line.

Nothing else is imported until Ctrl-C is handled: an import takes seconds, and would turn a
KeyboardInterrupt into a long traceback or another error.
"""

import os
import signal
import sys
import types


def _interrupt(number: int, frame: types.FrameType | None) -> None:
    """SIGINT: exit at once during an import, where nothing has to be cleaned up."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            if (os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") == "0":
                os.write(2, b"bigan: interrupted\n")
            os._exit(128 + number)
        frame = frame.f_back
    raise KeyboardInterrupt


def run() -> int:
    """Run the command of `sys.argv`; returns its exit code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else ignored, as by nohup
        signal.signal(signal.SIGINT, _interrupt)
    from bigan.distributed.job_logs import redirect_output

    redirect_output()
    from bigan.cli.main import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
