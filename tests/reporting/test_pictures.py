"""Grids, contact sheets and curves: what is in the pixels, not only that a file appears."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bigan.reporting import image_grids, metrics_log
from bigan.reporting.plots import _eval_panel, _running_mean


def flat(values: list[int], size: int = 16, channels: int = 1) -> torch.Tensor:
    """One constant image for each value, uint8 [N, channels, size, size]."""
    column = torch.tensor(values, dtype=torch.uint8)[:, None, None, None]
    return column.expand(-1, channels, size, size).contiguous()


def center(picture: Image.Image, box: tuple[int, int, int, int]) -> tuple[int, ...]:
    return picture.convert("RGB").getpixel(((box[0] + box[2]) // 2, (box[1] + box[3]) // 2))


def colors(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).reshape(-1, 3)


def holds(path: Path, color: str) -> bool:
    """Whether more than a few pixels have this colour."""
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return bool((np.abs(colors(path).astype(int) - wanted).max(axis=1) <= 2).sum() > 20)


# --- grids ------------------------------------------------------------------------------------


def test_cells_go_row_by_row_and_can_be_cut_out_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "0.png"
    image_grids.save_grid(path, flat([10, 20, 30, 40, 50, 60]), columns=3, row_labels=["a", "b"])
    with Image.open(path) as picture:
        geometry = image_grids.read_geometry(picture)
        assert geometry is not None
        assert (geometry.rows, geometry.columns, geometry.labels) == (2, 3, ("a", "b"))
        for index, value in enumerate([10, 20, 30, 40, 50, 60]):
            cell = np.asarray(picture.crop(geometry.box(index // 3, index % 3)))
            assert cell.shape[:2] == (64, 64)  # 16 pixels, enlarged four times
            assert np.all(cell == value)  # to the last pixel: no separator, no neighbour
        x0, _, _, y1 = geometry.box(0, 0)
        assert picture.convert("RGB").getpixel((x0, y1)) == (255, 255, 255)  # the separator
        assert np.asarray(picture.convert("L"))[:, : x0 - 2].min() < 128  # the labels
    assert [p.name for p in path.parent.iterdir()] == ["0.png"]


@pytest.mark.parametrize("size", [1, 8, 28, 64, 100])
def test_small_images_are_enlarged_by_a_whole_factor(size: int) -> None:
    picture = image_grids.grid(flat([1], size), columns=1)
    cell = picture.width - 4
    assert cell % size == 0
    assert cell == size if size >= 64 else 64 <= cell < 64 + size


def test_both_layouts_and_colour() -> None:
    images = torch.randint(0, 256, (4, 3, 64, 80), dtype=torch.uint8)
    first = image_grids.grid(images, columns=2)
    last = image_grids.grid(images.permute(0, 2, 3, 1), columns=2)
    assert first.tobytes() == last.tobytes()
    pixels = np.asarray(first)
    np.testing.assert_array_equal(pixels[2:66, 2:82], images[0].permute(1, 2, 0).numpy())
    np.testing.assert_array_equal(pixels[68:132, 84:164], images[3].permute(1, 2, 0).numpy())


def test_grey_pictures_are_stored_in_grey_and_coloured_ones_in_colour(tmp_path: Path) -> None:
    image_grids.save_grid(tmp_path / "grey.png", flat([7]), columns=1)
    coloured = flat([0], channels=3)
    coloured[:, 0] = 200
    image_grids.save_grid(tmp_path / "colour.png", coloured, columns=1)
    modes = [Image.open(tmp_path / name).mode for name in ("grey.png", "colour.png")]
    assert modes == ["L", "RGB"]


@pytest.mark.parametrize(
    ("images", "columns", "message"),
    [
        (torch.zeros(2, 1, 8, 8), 1, "uint8"),
        (torch.zeros(1, 8, 8, dtype=torch.uint8), 1, "N, C, H, W"),
        (torch.zeros(2, 4, 8, 8, dtype=torch.uint8), 1, "1 or 3 channels"),
        (torch.zeros(0, 1, 8, 8, dtype=torch.uint8), 1, "uint8 images"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), 0, "columns"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(
    images: torch.Tensor, columns: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        image_grids.grid(images, columns)


# --- contact sheet ----------------------------------------------------------------------------


def snapshots(folder: Path, steps: list[int], classes: int = 4) -> list[tuple[int, Path]]:
    """Grids of `classes` rows by 3 columns; cell (row c, column k) of the t-th is the constant
    10 t + c + 40 k."""
    found = []
    for t, step in enumerate(steps):
        values = [10 * t + c + 40 * column for c in range(classes) for column in range(3)]
        path = folder / f"{step}.png"
        image_grids.save_grid(path, flat(values), 3, [str(c) for c in range(classes)])
        found.append((step, path))
    return found


def test_the_sheet_shows_time_from_left_to_right(tmp_path: Path) -> None:
    pngs = snapshots(tmp_path / "samples", [0, 1000, 20_000], classes=10)
    out = image_grids.contact_sheet(list(reversed(pngs)), tmp_path / "timeline.png")
    assert out == tmp_path / "timeline.png"
    with Image.open(out) as sheet:
        geometry = image_grids.read_geometry(sheet)
        assert geometry is not None
        assert (geometry.rows, geometry.columns) == (10, 3)
        assert geometry.labels == tuple("0123456789")
        for row in range(10):
            for t in range(3):
                assert center(sheet, geometry.box(row, t))[0] == 10 * t + row
        header = np.asarray(sheet.convert("L"))[: geometry.top - 2]
        for t in range(3):  # each column is labelled
            x0, _, x1, _ = geometry.box(0, t)
            assert header[geometry.top // 2 :, x0:x1].min() < 128
        assert header.shape[0] > 20


def test_long_runs_are_thinned_and_keep_their_ends(tmp_path: Path) -> None:
    pngs = snapshots(tmp_path / "samples", list(range(0, 170_000, 10_000)), classes=1)
    out = image_grids.contact_sheet(pngs, tmp_path / "timeline.png")
    assert out is not None
    with Image.open(out) as sheet:
        geometry = image_grids.read_geometry(sheet)
        assert geometry is not None
        assert geometry.columns == image_grids.MAX_SNAPSHOTS == 12
        shown = [center(sheet, geometry.box(0, t))[0] // 10 for t in range(12)]
        assert geometry.rows == 3  # an unconditional grid: its other columns fill the sheet
        assert center(sheet, geometry.box(1, 0))[0] == 40
    assert (shown[0], shown[-1]) == (0, 16)
    assert sorted(set(shown)) == shown
    assert max(np.diff(shown)) == 2


def test_unusable_files_are_left_out(tmp_path: Path) -> None:
    pngs = snapshots(tmp_path / "samples", [0, 10])
    Image.new("L", (9, 9)).save(tmp_path / "plain.png")
    (tmp_path / "torn.png").write_bytes(pngs[0][1].read_bytes()[:200])
    (tmp_path / "text.png").write_text("no picture")
    extra = [(t, tmp_path / f"{n}.png") for t, n in enumerate(["plain", "torn", "text", "absent"])]
    out = image_grids.contact_sheet([*pngs, *extra], tmp_path / "timeline.png")
    assert out is not None
    with Image.open(out) as sheet:
        geometry = image_grids.read_geometry(sheet)
    assert geometry is not None
    assert geometry.columns == 2
    assert image_grids.contact_sheet(extra, tmp_path / "nothing.png") is None
    assert not (tmp_path / "nothing.png").exists()


def test_images_that_grew_during_training_share_a_sheet(tmp_path: Path) -> None:
    sizes = [(0, 4), (1, 64), (2, 256)]
    for step, size in sizes:
        image_grids.save_grid(tmp_path / f"{step}.png", flat([50 + step] * 8, size), 1)
    out = image_grids.contact_sheet(
        [(step, tmp_path / f"{step}.png") for step, _ in sizes], tmp_path / "timeline.png"
    )
    assert out is not None
    with Image.open(out) as sheet:
        geometry = image_grids.read_geometry(sheet)
        assert geometry is not None
        assert geometry.width == geometry.height == image_grids.MAX_SHEET_CELL
        assert [center(sheet, geometry.box(0, t))[0] for t in range(3)] == [50, 51, 52]


@pytest.mark.parametrize(
    ("num", "text"),
    [(0, "0"), (950, "950"), (1000, "1k"), (1500, "1.5k"), (71_000, "71k"), (2_400_000, "2.4M"),
     (100_000_000, "100M")],
)  # fmt: skip
def test_counts_are_short(num: int, text: str) -> None:
    assert image_grids.short_count(num) == text


# --- curves -----------------------------------------------------------------------------------

BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#AA4499"


def write_run(run_dir: Path, **values: float) -> None:
    run_dir.mkdir(exist_ok=True)
    names = {key.replace("__", "/"): value for key, value in values.items()}
    for step in range(1, 8):
        metrics_log.append(run_dir / "metrics.jsonl", 1000 * step, 0.0, names)


def height(path: Path) -> int:
    with Image.open(path) as picture:
        return picture.height


def test_losses_and_logits_have_their_colours(tmp_path: Path) -> None:
    write_run(tmp_path, train__loss_d=1.0, train__loss_g=0.5)
    out = image_grids.curves(tmp_path, tmp_path / "figures" / "curves.png")
    assert holds(out, BLUE)
    assert holds(out, VERMILION)
    assert not holds(out, GREEN)
    write_run(tmp_path, train__logits_real=1.0, train__logits_fake=-1.0)
    image_grids.curves(tmp_path, out)
    assert holds(out, GREEN)
    assert holds(out, PURPLE)
    assert [p.name for p in out.parent.iterdir()] == ["curves.png"]


def test_singular_values_of_many_layers_are_shades_and_of_few_are_named(tmp_path: Path) -> None:
    dark = "#440154"  # viridis begins here
    write_run(tmp_path, **{f"spectral__d__conv{i}": 1.0 + i for i in range(4)})
    out = image_grids.curves(tmp_path, tmp_path / "curves.png")
    assert not holds(out, dark)
    write_run(tmp_path, **{f"spectral__g__conv{i}": 1.0 + i for i in range(20)})
    image_grids.curves(tmp_path, out)
    assert holds(out, dark)


def test_every_evaluation_metric_gets_a_panel(tmp_path: Path) -> None:
    write_run(tmp_path, train__loss_d=1.0)
    one = height(image_grids.curves(tmp_path, tmp_path / "one.png"))
    write_run(
        tmp_path, train__images_per_second=9.0, train__grad_norm_d=1.0, train__r1=0.1,
        eval__fd__digits8=3.0, eval__cs__digits8=5.0, eval__recall=0.5,
    )  # fmt: skip
    seven = height(image_grids.curves(tmp_path, tmp_path / "seven.png"))
    assert seven > 2.5 * one  # three rows of panels


def test_a_floor_is_drawn_where_it_belongs(tmp_path: Path) -> None:
    write_run(tmp_path, eval__fd__digits8=3.0)

    def drawn(lines: dict[str, dict[str, float]]) -> bytes:
        return image_grids.curves(tmp_path, tmp_path / "curves.png", lines).read_bytes()

    plain = drawn({})
    assert drawn({"eval/fd/another": {"floor": 0.6}}) == plain
    low, high = (drawn({"eval/fd/digits8": {"floor": floor}}) for floor in (0.6, 60.0))
    same, named = (drawn({"eval/fd/digits8": {name: 3.0}}) for name in ("floor", "ceiling"))
    assert len({plain, low, high, same, named}) == 5


def test_frechet_distances_are_logarithmic_and_named() -> None:
    panel = _eval_panel("eval/fd/digits8-cnn-v1")
    assert (panel.title, panel.log) == ("Frechet distance (digits8-cnn-v1)", True)
    panel = _eval_panel("eval/cs/digits8-cnn-v1")
    assert (panel.title, panel.log) == ("Classifier score (digits8-cnn-v1)", False)
    panel = _eval_panel("eval/fid50k/inception-v3-compat.tf")
    assert (panel.title, panel.log) == ("FID50k (inception-v3-compat.tf)", True)
    assert _eval_panel("eval/recall").title == "recall"


def test_odd_runs_are_drawn_all_the_same(tmp_path: Path) -> None:
    blank = image_grids.curves(tmp_path / "absent", tmp_path / "empty.png")
    assert colors(blank).min() < 150  # it says so
    odd = tmp_path / "odd"
    odd.mkdir()
    metrics_log.append(
        odd / "metrics.jsonl", 0, 0.0, {"eval/fd/x": math.nan, "train/loss_d": math.inf}
    )
    image_grids.curves(odd, tmp_path / "odd.png", {"eval/fd/x": {"floor": 0.6}})
    metrics_log.append(
        odd / "metrics.jsonl", 10, 0.0, {"eval/fd/x": 0.0, "train/grad_norm_g": -1.0}
    )
    metrics_log.append(odd / "metrics.jsonl", 20, 0.0, {"eval/fd/x": -1e-5, "train/r1": 0.0})
    metrics_log.append(
        odd / "metrics.jsonl", 30, 0.0, {"eval/fd/x": math.inf, "eval/cs/x": math.inf}
    )
    image_grids.curves(odd, tmp_path / "odd.png")
    for step in range(100):
        values = {"train/loss_d": math.nan if step % 7 else 1.0, "train/loss_g": math.nan}
        metrics_log.append(odd / "metrics.jsonl", 10_000_000 + step, 0.0, values)
    assert holds(image_grids.curves(odd, tmp_path / "odd.png"), BLUE)


def test_the_running_mean_skips_what_is_missing() -> None:
    y = np.array([1.0, math.nan, 3.0, 5.0, math.nan, math.nan, math.nan])
    expected = [1.0, 2.0, 4.0, 4.0, 5.0, math.nan, math.nan]
    np.testing.assert_allclose(_running_mean(y, 1), expected)


def test_drawing_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    """No pyplot: it would pick a display, and two threads would share its current figure."""
    import subprocess
    import sys

    write_run(tmp_path, train__loss_d=1.0)
    code = (
        "import sys; from pathlib import Path; from bigan.reporting.plots import curves\n"
        "assert 'matplotlib' not in sys.modules\n"
        "curves(Path(sys.argv[1]), Path(sys.argv[1]) / 'c.png')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
