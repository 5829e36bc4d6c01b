"""The progress bar on a real terminal, and the lines elsewhere."""

import contextlib
import fcntl
import io
import os
import pty
import struct
import termios

import pytest

from bigan.reporting import progress_bar
from bigan.reporting.progress_bar import ProgressBar

REPORT = {
    "train/discriminator/loss": 1.25,
    "train/discriminator/grad_norm": 9.0,
    "train/generator/loss": 0.5,
    "train/encoder/loss": 2.0,
    "train/images_per_second": 100.0,
}


def test_lines_show_speed_time_left_and_the_loss_of_every_phase(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress_bar, "LINE_SECONDS", 3600.0)
    stream = io.StringIO()
    bar = ProgressBar(10_000, stream)
    for seen in (1_000, 2_000, 10_000):  # shows the first and the last
        bar.tick(seen, REPORT)
    bar.echo("a remark")
    bar.close()
    lines = stream.getvalue().splitlines()
    shown = " ".join(lines[0].split())
    assert shown.startswith("images_seen 1,000 of 10,000 100 images/s 01:30 left ")
    assert shown.endswith("discriminator 1.250 generator 0.500 encoder 2.000")
    assert [line.split()[1] for line in lines[1:]] == ["10,000", "remark"]


def test_stage_of_a_growing_run_is_shown() -> None:
    stream = io.StringIO()
    growth = {"train/resolution": 16.0, "train/alpha": 0.25}
    ProgressBar(10_000, stream).tick(1_000, REPORT | growth)
    assert "16 px (25% faded in)  discriminator" in stream.getvalue()


@pytest.mark.parametrize("columns", [130, 0])
def test_bar_on_a_terminal(columns: int) -> None:
    """A resumed run starts where it is; a terminal without a width gets lines."""
    control, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    with os.fdopen(terminal, "w") as stream:
        bar = ProgressBar(10_000, stream)
        for seen in (5_000, 10_000):
            bar.tick(seen, REPORT)
        bar.close()
    written = b""
    with contextlib.suppress(OSError):  # EIO: the other end is closed and all of it was read
        while True:  # one read gives one write of the terminal
            written += os.read(control, 4096)
    os.close(control)
    shown = written.decode()
    for part in ("discriminator 1.250", "encoder 2.000", "image/s" if columns else "images/s"):
        assert part in shown
    assert ("100%" in shown) == (columns > 0)
