"""What a person sees: a bar on a real terminal, a line now and then elsewhere."""

import contextlib
import fcntl
import io
import os
import pty
import struct
import termios

import pytest

from bigan.checkpoint import Progress
from bigan.reporting import progress_bar
from bigan.reporting.progress_bar import ProgressBar

REPORT = {"train/loss_d": 1.25, "train/loss_g": 0.5, "train/images_per_second": 100.0}


def test_lines_tell_speed_time_left_and_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_bar, "LINE_SECONDS", 3600.0)
    stream = io.StringIO()
    bar = ProgressBar(10_000, stream)
    for seen in (1_000, 2_000, 10_000):  # the first, none in between, and always the last
        bar.tick(Progress(images_seen=seen), REPORT)
    bar.echo("a remark")
    bar.close()
    lines = stream.getvalue().splitlines()
    expected = "images_seen 1,000 of 10,000 100 images/s 01:30 left loss_d 1.250 loss_g 0.500"
    assert " ".join(lines[0].split()) == expected
    assert [line.split()[1] for line in lines[1:]] == ["10,000", "remark"]


@pytest.mark.parametrize("columns", [110, 0])
def test_bar_on_a_terminal(columns: int) -> None:
    """A resumed run starts where it is; a terminal without a width gets lines."""
    control, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    with os.fdopen(terminal, "w") as stream:
        bar = ProgressBar(10_000, stream)
        for seen in (5_000, 10_000):
            bar.tick(Progress(images_seen=seen), REPORT)
        bar.close()
    written = b""
    with contextlib.suppress(OSError):  # EIO: the other end is closed and all of it was read
        while True:  # one read gives one write of the terminal
            written += os.read(control, 4096)
    os.close(control)
    shown = written.decode()
    for part in ("loss_d", "1.250", "image/s" if columns else "images/s"):
        assert part in shown
    assert ("100%" in shown) == (columns > 0)
