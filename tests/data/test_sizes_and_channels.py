"""Images of any size, fit and number of channels: packed, verified, and read in every mode."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import one_line
from PIL import Image
from streams import take

from bigan.cli.main import main
from bigan.data import DataError
from bigan.data.format.codec import BadImageError, Pixels, decode_into, encode
from bigan.data.format.convert import load, to_size
from bigan.data.format.manifest import Manifest
from bigan.data.packing.contact_sheet import Row, contact_sheet
from bigan.data.packing.pack import pack
from bigan.data.packing.pack_plan import make_plan
from bigan.data.packing.pack_shard import halvings
from bigan.data.packing.sources import open_source
from bigan.data.packing.verify import verify
from bigan.data.settings import Fetch
from bigan.data.streaming.dataset import open_level
from bigan.data.streaming.resampled import ResampledStream
from bigan.data.streaming.stream import sequential
from bigan.distributed.world import World
from bigan.image_size import ImageSize

LANCZOS = Image.Resampling.LANCZOS


def noise(height: int, width: int, channels: int, seed: int = 0) -> Pixels:
    """Random pixels; alpha, if any, between 1 and 255."""
    image = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    if channels in (2, 4):
        image[..., -1] = image[..., -1].clip(1)
    return image


def png(image: Pixels) -> bytes:
    return encode(image, "png")


def resized(image: Pixels, width: int, height: int) -> Pixels:
    return np.asarray(Image.fromarray(image).resize((width, height), LANCZOS))


# --- fit -----------------------------------------------------------------------------------------

WIDE, GREY28 = noise(20, 60, 3), noise(28, 28, 1)  # 60 x 20 pixels
PADDED = np.zeros((24, 24, 3), np.uint8)
PADDED[8:16] = resized(WIDE, 24, 8)
CENTERED = np.zeros((32, 64, 3), np.uint8)
CENTERED[6:26, 2:62] = WIDE
FRAMED = np.zeros((30, 75, 3), np.uint8)
FRAMED[2:27] = resized(WIDE, 75, 25)


@pytest.mark.parametrize(
    ("image", "resolution", "options", "expected"),
    [
        pytest.param(
            GREY28, 32, {"fit": "pad"}, np.pad(GREY28, ((2, 2), (2, 2), (0, 0))), id="mnist"
        ),
        pytest.param(WIDE, 24, {"fit": "pad"}, PADDED, id="pad-reduces"),
        pytest.param(WIDE, (32, 64), {"fit": "pad"}, CENTERED, id="pad-keeps-what-fits"),
        pytest.param(
            WIDE, (30, 75), {"fit": "pad", "allow_upscale": True}, FRAMED, id="pad-enlarges"
        ),
        pytest.param(WIDE, (20, 60), {"fit": "pad"}, WIDE, id="pad-of-the-same-size"),
        pytest.param(WIDE, (16, 8), {"fit": "stretch"}, resized(WIDE, 8, 16), id="stretch"),
        pytest.param(WIDE, (20, 60), {"fit": "stretch"}, WIDE, id="stretch-of-the-same-size"),
        pytest.param(
            WIDE, (40, 60), {"fit": "stretch", "allow_upscale": True}, resized(WIDE, 60, 40),
            id="stretch-enlarges",
        ),
        pytest.param(
            WIDE, (10, 20), {}, resized(WIDE[:, 10:50], 20, 10), id="crop-to-two-by-one"
        ),
        pytest.param(WIDE, (20, 10), {}, WIDE[:, 25:35], id="crop-upright"),
        pytest.param(
            WIDE.transpose(1, 0, 2), (20, 20), {}, WIDE.transpose(1, 0, 2)[20:40], id="crop-square"
        ),
    ],
)  # fmt: skip
def test_each_fit_gives_its_pixels(
    image: Pixels, resolution: ImageSize, options: dict[str, Any], expected: Pixels
) -> None:
    assert np.array_equal(load(png(image), resolution, image.shape[2], **options), expected)


@pytest.mark.parametrize(
    ("fit", "resolution", "fits"),
    [
        ("crop", (24, 16), False), ("crop", (20, 64), False), ("crop", (20, 60), True),
        ("stretch", (20, 64), False), ("stretch", (24, 60), False), ("stretch", (20, 60), True),
        ("pad", (20, 64), True), ("pad", (64, 64), True),
    ],
)  # fmt: skip
def test_enlarging_a_side_must_be_requested(fit: Any, resolution: ImageSize, fits: bool) -> None:
    assert to_size(WIDE, resolution, fit=fit, allow_upscale=True).shape[:2] == resolution
    if fits:
        to_size(WIDE, resolution, fit=fit)
        return
    assert isinstance(resolution, tuple)
    with pytest.raises(BadImageError, match=f"60x20, smaller than {resolution[1]}x{resolution[0]}"):
        to_size(WIDE, resolution, fit=fit)


def test_the_fit_is_part_of_the_transform(tmp_path: Path) -> None:
    """Reference statistics name it; a set that was packed before keeps its own."""
    src = tmp_path / "src"
    src.mkdir()
    Image.fromarray(WIDE).save(src / "a.png")
    names = {
        open_source(src, resolution=8, fit=fit, resize=resize).transform
        for fit in ("crop", "pad", "stretch")
        for resize in ("lanczos", "area")
    }
    assert len(names) == 6
    plans = {
        make_plan(open_source(src, resolution=8, fit=fit, test_fraction=0.0)).id
        for fit in ("crop", "pad", "stretch")
    }
    assert len(plans) == 3
    pack(src, tmp_path / "packed", resolution=8, fit="pad", test_fraction=0.0)
    assert open_source(tmp_path / "packed", fit="stretch").transform == "pad-lanczos-v1"


# --- alpha ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("original", "channels", "expected"),
    [
        ((9,), 2, [9, 255]), ((9,), 4, [9, 9, 9, 255]), ((9, 77), 4, [9, 9, 9, 77]),
        ((1, 2, 3), 4, [1, 2, 3, 255]), ((255, 0, 255, 77), 4, [255, 0, 255, 77]),
        ((1, 2, 3, 0), 4, [0, 0, 0, 0]), ((9, 0), 2, [0, 0]), ((255, 255, 255, 50), 2, [255, 50]),
        ((9, 0), 1, [255]), ((1, 2, 3, 0), 3, [255, 255, 255]), ((9, 255), 3, [9, 9, 9]),
    ],
)  # fmt: skip
def test_alpha_is_kept_added_or_composited(
    original: tuple[int, ...], channels: int, expected: list[int]
) -> None:
    image = np.full((12, 8, len(original)), original, np.uint8)
    file = io.BytesIO()
    np.save(file, image)
    for data in (png(image), file.getvalue()):
        found = load(data, (6, 4), channels)
        assert found.shape == (6, 4, channels)
        assert (found == expected).all()
    for size in ((6, 4), (12, 8)):  # resized and not
        assert (to_size(image, size, channels) == expected).all()


@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("resize", ["lanczos", "area"])
def test_colors_of_transparent_pixels_do_not_bleed(channels: int, resize: Any) -> None:
    """White shapes on transparent black stay white at every alpha above rounding."""
    image = np.zeros((40, 40, channels), np.uint8)
    image[5:33, 7:36] = 255
    found = to_size(image, 16, channels, resize)
    edge = (found[..., -1] > 4) & (found[..., -1] < 250)
    assert edge.sum() > 8
    assert (found[edge][:, :-1] == 255).all()
    for level in halvings(image, 4):
        assert (level[level[..., -1] > 0][:, :-1] == 255).all()


def test_padding_is_transparent() -> None:
    found = to_size(np.full((4, 8, 3), 7, np.uint8), 8, 4, fit="pad")
    assert (found[2:6] == [7, 7, 7, 255]).all()
    assert not found[:2].any()
    assert not found[6:].any()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("encoding", ["npy", "png", "webp"])
def test_lossless_encodings_keep_every_channel(encoding: Any, channels: int) -> None:
    opaque, image = noise(6, 10, channels), noise(6, 10, channels)
    if channels in (2, 4):
        opaque[..., -1] = 255
        image[0, :, -1] = 0  # colors below it are kept
    for pixels in (opaque, image):
        out = np.empty_like(pixels)
        decode_into(out, encode(pixels, encoding), encoding)
        assert np.array_equal(out, pixels)
    with pytest.raises(BadImageError):
        decode_into(np.empty((10, 6, channels), np.uint8), encode(image, encoding), encoding)


# --- pack, verify, read --------------------------------------------------------------------------

CASES = [
    pytest.param((24, 16), 4, "npy", id="upright-rgba-npy"),
    pytest.param((12, 20), 2, "png", id="wide-grey-alpha-png"),
    pytest.param((20, 28), 4, "webp", id="rgba-webp"),
    pytest.param((12, 20), 3, "jpg", id="wide-jpg"),
    pytest.param(24, 4, "png", id="square-24"),
]


def folder_of(path: Path, size: ImageSize, channels: int, num: int = 12) -> dict[int, Pixels]:
    """PNG files in two class folders; label and first pixel identify the image."""
    height, width = size if isinstance(size, tuple) else (size, size)
    images = {}
    for i in range(num):
        image = noise(height, width, channels, seed=i)
        image[0, 0, 0] = i
        folder = path / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0] if channels == 1 else image).save(folder / f"{i}.png")
        images[i] = image
    return images


@pytest.mark.parametrize(("size", "channels", "encoding"), CASES)
def test_a_packed_set_is_read_in_every_mode(
    tmp_path: Path, size: ImageSize, channels: int, encoding: Any
) -> None:
    images = folder_of(tmp_path / "src", size, channels)
    (manifest,) = pack(
        tmp_path / "src", tmp_path / "d", resolution=size, channels=channels,
        encoding=encoding, test_fraction=0.0, shard_size=5,
    ).manifests  # fmt: skip
    written = json.loads((tmp_path / "d" / "manifest.json").read_text())
    assert written["resolution"] == (list(size) if isinstance(size, tuple) else size)
    assert written["channels"] == channels
    assert Manifest.load(tmp_path / "d") == manifest
    report = verify(tmp_path / "d", deep=True)
    assert report.ok, report.as_text()
    assert report.num_images == len(images)
    batches = {
        mode: take(tmp_path / "d", num=3, fetch=Fetch(mode=mode), batch=4)  # type: ignore[arg-type]
        for mode in ("random_access", "resident", "stream")
    }
    for mode, found in batches.items():
        for batch in found:
            assert tuple(batch.pixels.shape[1:]) == manifest.image_shape, mode
            for pixels, label in zip(batch.pixels.numpy(), batch.labels.tolist(), strict=True):
                if encoding == "jpg":
                    continue
                number = int(pixels[0, 0, 0])
                assert np.array_equal(pixels, images[number]), mode
                assert label == number % 2
    again = pack(tmp_path / "src", tmp_path / "d", resolution=size, channels=channels,
                 encoding=encoding, test_fraction=0.0, shard_size=5)  # fmt: skip
    assert again.manifests[0].fingerprint == manifest.fingerprint


def test_a_pyramid_of_images_that_are_not_square(tmp_path: Path) -> None:
    folder_of(tmp_path / "src", (24, 40), 4)
    levels = pack(tmp_path / "src", tmp_path / "d", resolution=(24, 40), channels=4,
                  pyramid=4, test_fraction=0.0).manifests  # fmt: skip
    assert [level.folder.name for level in levels] == ["r0010x0006", "r0020x0012", "r0040x0024"]
    assert [level.resolution for level in levels] == [(6, 10), (12, 20), (24, 40)]
    assert verify(tmp_path / "d").ok
    for level in levels:
        assert open_level(str(tmp_path / "d"), level.resolution, Fetch()) == level
    assert open_level(str(tmp_path / "d"), None, Fetch()) == levels[-1]
    top, small = (
        next(iter(sequential(level, "train", World(), 12))).pixels.numpy().astype(int)
        for level in (levels[-1], levels[0])
    )
    weights = top[..., 3:].reshape(12, 6, 4, 10, 4, 1)
    colors = top[..., :3].reshape(12, 6, 4, 10, 4, 3)
    mean = (colors * weights).sum((2, 4)) / weights.sum((2, 4))
    assert np.array_equal(small[..., :3], np.floor(mean + 0.5))
    assert np.array_equal(small[..., 3:], np.floor(weights.mean((2, 4)) + 0.5))


@pytest.mark.parametrize(
    ("resolution", "names"),
    [(96, [6, 12, 24, 48, 96]), (48, [6, 12, 24, 48]), (28, [7, 14, 28]), (20, [5, 10, 20])],
)
def test_a_pyramid_ends_where_halving_ends(
    tmp_path: Path, resolution: int, names: list[int]
) -> None:
    Image.fromarray(noise(resolution, resolution, 3)).save(tmp_path / "a.png")
    plan = make_plan(open_source(tmp_path, resolution=resolution, test_fraction=0.0), pyramid=4)
    assert [level.resolution for level in plan.levels] == names


@pytest.mark.parametrize(("suffix", "channels"), [("png", 3), ("png", 1), ("npy", 4), ("npy", 1)])
def test_shards_are_used_directly(tmp_path: Path, suffix: Any, channels: int) -> None:
    import tarfile

    images = {i: noise(12, 20, channels, seed=i) for i in range(6)}
    tmp_path.joinpath("d").mkdir()
    with tarfile.open(tmp_path / "d" / "x.tar", "w") as tar:
        for i, image in images.items():
            image[0, 0, 0] = i
            for name, data in ((f"{i}.{suffix}", encode(image, suffix)), (f"{i}.cls", b"0")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    (batch,) = take(tmp_path / "d", num=1, batch=6)
    assert (batch.pixels[:, 0, 0, 0].sort().values == np.arange(6)).all()
    for pixels in batch.pixels.numpy():
        assert np.array_equal(pixels, images[int(pixels[0, 0, 0])])
    with ResampledStream(
        str(tmp_path / "d" / "x.tar"), shape=(6, 4, channels), num_classes=1, seed=0,
        world=World(), batch=4,
    ) as stream:  # fmt: skip
        (batch,) = itertools.islice(stream, 1)
    assert batch.pixels.shape == (4, 6, 4, channels)


def test_iterables_keep_alpha(tmp_path: Path) -> None:
    images = [noise(6, 4, 4, seed=i) for i in range(3)]
    source = open_source(images, resolution=(6, 4), channels=4, scratch=tmp_path)
    assert np.array_equal([image for _, _, image in source], images)


# --- the command line ----------------------------------------------------------------------------


def test_the_command_takes_width_by_height(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of(tmp_path / "src", (20, 30), 4)
    common = ["pack", str(tmp_path / "src"), str(tmp_path / "d"), "--test-fraction", "0"]
    assert main([*common, "--resolution", "24x16", "--fit", "stretch", "--channels", "4"]) == 0
    assert "24x16 px" in capsys.readouterr().out
    manifest = Manifest.load(tmp_path / "d")
    assert (manifest.resolution, manifest.channels) == ((16, 24), 4)
    assert manifest.transform == "stretch-lanczos-v1"


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"resolution": 8, "channels": 5}, ("channels 5", "4 (RGBA)")),
        ({"resolution": (8, 0)}, ("(8, 0)", "positive")),
        ({"resolution": "8x8"}, ("8x8", "height, width")),
        ({"resolution": [8, 8, 3]}, ("[8, 8, 3]", "height, width")),
        ({"resolution": (2**14, 2**14)}, ("16384", "pixels")),
        ({"resolution": 8, "fit": "letterbox"}, ("letterbox", "crop, pad or stretch")),
        ({"resolution": 8, "channels": 4, "encoding": "jpg"}, ("jpg", "no alpha", "png")),
        ({"resolution": 8, "channels": 2, "encoding": "jpg", "pyramid": 4}, ("jpg", "no alpha")),
    ],
)
def test_impossible_options_are_one_line(
    tmp_path: Path, options: dict[str, Any], parts: tuple[str, ...]
) -> None:
    folder_of(tmp_path / "src", 8, 4, num=2)
    with pytest.raises(DataError) as error:
        pack(tmp_path / "src", tmp_path / "d", **options)
    one_line(error, *parts)
    assert not (tmp_path / "d").exists()


def test_a_pair_of_equal_sides_is_a_square(tmp_path: Path) -> None:
    folder_of(tmp_path / "src", 8, 1, num=2)
    plans = [
        make_plan(open_source(tmp_path / "src", resolution=resolution, test_fraction=0.0)).id
        for resolution in (8, (8, 8), [8, 8])
    ]
    assert len(set(plans)) == 1


# --- pictures ------------------------------------------------------------------------------------


def test_the_contact_sheet_shows_transparency_over_a_checkerboard() -> None:
    clear, solid = np.zeros((2, 12, 20, 4), np.uint8)
    solid[:] = (255, 0, 0, 255)
    page = contact_sheet("t", [Row("c", 2, [clear, solid])])
    colors = {color for _, color in page.getcolors(maxcolors=1 << 16) or []}
    assert {(255, 0, 0), (204, 204, 204)} <= colors
    red = np.argwhere((np.asarray(page) == (255, 0, 0)).all(-1))
    height, width = red.max(0) - red.min(0) + 1
    assert height * 20 == width * 12
