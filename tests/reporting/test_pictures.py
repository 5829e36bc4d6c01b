"""Grids, contact sheets and curves: the pixels, not only the existence of a file."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.utils import make_grid

from bigan.reporting import image_grids, metrics_log, plots
from bigan.reporting.plots import _eval_panel, _labels, _panels, _running_mean


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


def test_cells_are_in_row_major_order_and_can_be_cropped(tmp_path: Path) -> None:
    path = tmp_path / "new" / "0.png"
    image_grids.save_grid(path, flat([10, 20, 30, 40, 50, 60]), columns=3, row_labels=["a", "b"])
    with Image.open(path) as picture:
        geometry = image_grids.read_geometry(picture)
        assert geometry is not None
        assert (geometry.rows, geometry.columns, geometry.labels) == (2, 3, ("a", "b"))
        for index, value in enumerate([10, 20, 30, 40, 50, 60]):
            cell = np.asarray(picture.crop(geometry.box(index // 3, index % 3)))
            assert cell.shape[:2] == (64, 64)  # 16 pixels, enlarged four times
            assert np.all(cell == value)  # every pixel: no separator, no neighbour
        x0, _, _, y1 = geometry.box(0, 0)
        assert picture.convert("RGB").getpixel((x0, y1)) == (255, 255, 255)  # the separator
        assert np.asarray(picture.convert("L"))[:, : x0 - 2].min() < 128  # the labels
    assert [p.name for p in path.parent.iterdir()] == ["0.png"]


@pytest.mark.parametrize("size", [1, 8, 28, 64, 100])
def test_small_images_are_enlarged_by_an_integer_factor(size: int) -> None:
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


@pytest.mark.parametrize(("channels", "color"), [(2, (90, 90, 90)), (4, (90, 60, 30))])
def test_transparency_is_shown_over_a_checkerboard(
    tmp_path: Path, channels: int, color: tuple[int, int, int]
) -> None:
    images = torch.zeros(2, channels, 24, 16, dtype=torch.uint8)
    images[0] = torch.tensor([*color[: channels - 1], 255])[:, None, None]
    for layout in (images, images.permute(0, 2, 3, 1)):
        image_grids.save_grid(tmp_path / "0.png", layout, columns=2)
        with Image.open(tmp_path / "0.png") as picture:
            geometry = image_grids.read_geometry(picture)
            assert geometry is not None
            assert (geometry.width, geometry.height) == (48, 72)
            opaque, clear = (
                np.asarray(picture.convert("RGB").crop(geometry.box(0, i))) for i in range(2)
            )
        assert (opaque == color).all()
        assert np.unique(clear).tolist() == [204, 255]
        assert (clear[:8, :8] != clear[:8, 8:16]).all()
        assert (clear[:8, :8] != clear[8:16, :8]).all()


@pytest.mark.parametrize("num", [4, 5, 6])
def test_geometry_is_that_of_torchvision(num: int) -> None:
    images = torch.randint(0, 256, (num, 3, 64, 80), dtype=torch.uint8)
    expected = make_grid(images, nrow=2, padding=2, pad_value=255).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(np.asarray(image_grids.grid(images, columns=2)), expected)


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
        (torch.zeros(2, 5, 8, 8, dtype=torch.uint8), 1, "1 to 4 channels"),
        (torch.zeros(0, 1, 8, 8, dtype=torch.uint8), 1, "uint8 images"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), 0, "columns"),
    ],
)
def test_invalid_images_are_refused(images: torch.Tensor, columns: int, message: str) -> None:
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


def test_contact_sheet_shows_time_from_left_to_right(tmp_path: Path) -> None:
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


def test_long_runs_show_evenly_chosen_snapshots(tmp_path: Path) -> None:
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
    write_run(tmp_path, train__discriminator__loss=1.0, train__generator__loss=0.5)
    out = plots.curves(tmp_path, tmp_path / "figures" / "curves.png")
    assert holds(out, BLUE)
    assert holds(out, VERMILION)
    assert not holds(out, GREEN)
    logits = {"train__discriminator__logits_real": 1.0, "train__discriminator__logits_fake": -1.0}
    write_run(tmp_path, **logits)
    plots.curves(tmp_path, out)
    assert holds(out, GREEN)
    assert holds(out, PURPLE)
    assert [p.name for p in out.parent.iterdir()] == ["curves.png"]


def test_singular_values_of_many_layers_are_shades_and_of_few_are_named(tmp_path: Path) -> None:
    dark = "#440154"  # viridis begins here
    write_run(tmp_path, **{f"spectral__discriminator__conv{i}": 1.0 + i for i in range(4)})
    out = plots.curves(tmp_path, tmp_path / "curves.png")
    assert not holds(out, dark)
    write_run(tmp_path, **{f"spectral__generator__conv{i}": 1.0 + i for i in range(20)})
    plots.curves(tmp_path, out)
    assert holds(out, dark)


def test_every_evaluation_metric_gets_a_panel(tmp_path: Path) -> None:
    write_run(tmp_path, train__discriminator__loss=1.0)
    one = height(plots.curves(tmp_path, tmp_path / "one.png"))
    write_run(
        tmp_path, train__images_per_second=9.0, train__discriminator__grad_norm=1.0,
        train__discriminator__r1=0.1,
        eval__fd__digits8=3.0, eval__cs__digits8=5.0, eval__recall=0.5,
    )  # fmt: skip
    seven = height(plots.curves(tmp_path, tmp_path / "seven.png"))
    assert seven > 2.5 * one  # three rows of panels


def test_reference_lines_are_drawn_in_their_panel(tmp_path: Path) -> None:
    write_run(tmp_path, eval__fd__digits8=3.0)

    def drawn(lines: dict[str, dict[str, float]]) -> bytes:
        return plots.curves(tmp_path, tmp_path / "curves.png", lines).read_bytes()

    plain = drawn({})
    assert drawn({"eval/fd/another": {"floor": 0.6}}) == plain
    low, high = (drawn({"eval/fd/digits8": {"floor": floor}}) for floor in (0.6, 60.0))
    same, named = (drawn({"eval/fd/digits8": {name: 3.0}}) for name in ("floor", "ceiling"))
    assert len({plain, low, high, same, named}) == 5


def test_panels_do_not_depend_on_the_names_of_phases() -> None:
    keys = [
        "images_seen", "time", "train/attempt", "train/images_per_second", "train/encoder/loss",
        "train/encoder/kl", "train/encoder/grad_norm", "train/a_to_b/loss", "train/a_to_b/cycle",
        "train/b_to_a/cycle", "train/a_to_b/logits_real", "train/critic/wgan_gp",
        "train/mapping/path_penalty", "rank/step_ms/0",
        "spectral/critic/conv2", "spectral/critic/conv10",
    ]  # fmt: skip
    panels = {panel.title: (panel.keys, panel.log) for panel in _panels(keys)}
    assert panels == {
        "Losses": (("train/a_to_b/loss", "train/encoder/loss"), False),
        "Logits: logits real": (("train/a_to_b/logits_real",), False),
        "Gradient norms": (("train/encoder/grad_norm",), True),
        "Path lengths: path penalty": (("train/mapping/path_penalty",), True),
        "Penalties: wgan gp": (("train/critic/wgan_gp",), True),
        "cycle": (("train/a_to_b/cycle", "train/b_to_a/cycle"), False),
        "kl": (("train/encoder/kl",), False),
        "Largest singular values (critic)": (
            ("spectral/critic/conv2", "spectral/critic/conv10"),
            True,
        ),
        "Throughput (images/s)": (("train/images_per_second",), False),
    }


def test_labels_are_what_distinguishes_the_keys() -> None:
    def labels(*keys: str) -> list[str]:
        return list(_labels(keys).values())

    assert labels("train/a/loss", "train/b/loss") == ["a", "b"]
    assert labels("train/d/logits_real", "train/d/logits_fake") == ["real", "fake"]
    assert labels("train/a/r1", "train/b/gradient_penalty") == ["a, r1", "b, gradient penalty"]
    assert labels("train/a/logits_real", "train/b/logits_real") == ["a", "b"]
    assert labels("spectral/d/blocks.0/conv", "spectral/d/linear") == ["blocks.0/conv", "linear"]


def test_frechet_distances_are_logarithmic_and_named() -> None:
    panel = _eval_panel("eval/fd/digits8-cnn-v1")
    assert (panel.title, panel.log) == ("Frechet distance (digits8-cnn-v1)", True)
    panel = _eval_panel("eval/cs/digits8-cnn-v1")
    assert (panel.title, panel.log) == ("Classifier score (digits8-cnn-v1)", False)
    panel = _eval_panel("eval/fid50k/inception-v3-compat.tf")
    assert (panel.title, panel.log) == ("FID50k (inception-v3-compat.tf)", True)
    assert _eval_panel("eval/recall").title == "recall"


def test_runs_without_or_with_non_finite_metrics_are_drawn(tmp_path: Path) -> None:
    blank = plots.curves(tmp_path / "absent", tmp_path / "empty.png")
    assert colors(blank).min() < 150  # "no metrics yet"
    odd = tmp_path / "odd"
    odd.mkdir()
    metrics_log.append(
        odd / "metrics.jsonl", 0, 0.0, {"eval/fd/x": math.nan, "train/discriminator/loss": math.inf}
    )
    plots.curves(odd, tmp_path / "odd.png", {"eval/fd/x": {"floor": 0.6}})
    metrics_log.append(
        odd / "metrics.jsonl", 10, 0.0, {"eval/fd/x": 0.0, "train/generator/grad_norm": -1.0}
    )
    metrics_log.append(
        odd / "metrics.jsonl", 20, 0.0, {"eval/fd/x": -1e-5, "train/discriminator/r1": 0.0}
    )
    metrics_log.append(
        odd / "metrics.jsonl", 30, 0.0, {"eval/fd/x": math.inf, "eval/cs/x": math.inf}
    )
    plots.curves(odd, tmp_path / "odd.png")
    for step in range(100):
        values = {
            "train/discriminator/loss": math.nan if step % 7 else 1.0,
            "train/generator/loss": math.nan,
        }
        metrics_log.append(odd / "metrics.jsonl", 10_000_000 + step, 0.0, values)
    assert holds(plots.curves(odd, tmp_path / "odd.png"), BLUE)


def test_running_mean_skips_nan() -> None:
    y = np.array([1.0, math.nan, 3.0, 5.0, math.nan, math.nan, math.nan])
    expected = [1.0, 2.0, 4.0, 4.0, 5.0, math.nan, math.nan]
    np.testing.assert_allclose(_running_mean(y, 1), expected)


def test_pyplot_is_not_imported(tmp_path: Path) -> None:
    """pyplot would choose a display, and two threads would share its current figure."""
    import subprocess
    import sys

    write_run(tmp_path, train__discriminator__loss=1.0)
    code = (
        "import sys; from pathlib import Path; from bigan.reporting.plots import curves\n"
        "assert 'matplotlib' not in sys.modules\n"
        "curves(Path(sys.argv[1]), Path(sys.argv[1]) / 'c.png')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
