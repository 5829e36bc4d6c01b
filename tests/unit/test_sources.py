"""Where images come from: the digits, folders of pictures of every kind."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bigan.data import DataError, sources


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 JPEG files in two classes."""
    root = tmp_path_factory.mktemp("photos") / "photos"
    random = np.random.default_rng(0)
    for i in range(60):
        file = root / f"class{i % 2}" / f"image.{i:02d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 30, 3), np.uint8)).save(file)
    return root


def one_line(error: pytest.ExceptionInfo[DataError], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert all(part in text for part in parts), text


def png(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


@pytest.mark.parametrize("resolution", [8, 16, 32])
def test_digits_average_back_to_the_original_exactly(resolution: int) -> None:
    from sklearn.datasets import load_digits

    bundle = load_digits()
    source = sources.digits(resolution)
    images = np.stack([image for _, _, image in source])
    assert images.shape == (1797, resolution, resolution, 1)
    f = resolution // 8
    means = images.reshape(1797, 8, f, 8, f).mean((2, 4), dtype=np.float64)
    assert np.array_equal(means, np.rint(bundle.images * 255 / 16))
    assert [label for _, label, _ in source] == bundle.target.tolist()


def test_digits_are_smoother_than_repeated_pixels() -> None:
    small = np.stack([image[..., 0] for _, _, image in sources.digits(8)])
    large = np.stack([image[..., 0] for _, _, image in sources.digits(32)]).astype(float)
    bricks = small.repeat(4, 1).repeat(4, 2).astype(float)
    roughness = [np.abs(np.diff(x, 2, axis=1)).mean() for x in (large, bricks)]
    assert roughness[0] < 0.75 * roughness[1]


def test_digits_split_is_fixed_and_balanced() -> None:
    source, other = sources.digits(8), sources.digits(16)
    assert source.splits == other.splits
    test = [
        label for label, split in zip(source.labels, source.splits, strict=True) if split == "test"
    ]
    assert np.bincount(test).tolist() == [50] * 10
    assert source.splits.count("train") == 1297
    first = [i for i, split in enumerate(source.splits) if split == "test"][:8]
    assert first == [0, 5, 6, 10, 11, 15, 19, 24]


def test_digits_have_three_sizes_only() -> None:
    with pytest.raises(DataError, match="8, 16 or 32"):
        sources.digits(64)


def colour_of(
    tmp_path: Path, image: Image.Image, name: str = "x.png", **options: object
) -> list[int]:
    image.save(tmp_path / name, **options)
    return sources.read_rgb(tmp_path / name, 4)[2, 2].tolist()


def test_every_kind_of_picture_becomes_rgb(tmp_path: Path) -> None:
    size = (8, 8)
    assert colour_of(tmp_path, Image.new("L", size, 90)) == [90] * 3
    assert colour_of(tmp_path, Image.new("1", size, 1)) == [255] * 3
    assert colour_of(tmp_path, Image.new("RGBA", size, (255, 0, 0, 0))) == [255] * 3
    assert colour_of(tmp_path, Image.new("LA", size, (0, 255))) == [0] * 3
    palette = Image.new("P", size, 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert colour_of(tmp_path, palette) == [10, 20, 30]
    assert colour_of(tmp_path, palette, transparency=1) == [255] * 3
    cmyk = colour_of(tmp_path, Image.new("CMYK", size, (0, 255, 255, 0)), "x.jpg", quality=100)
    assert np.abs(np.subtract(cmyk, [255, 0, 0])).max() <= 3
    sixteen = Image.fromarray(np.full(size, 127 * 257, np.uint16))
    assert colour_of(tmp_path, sixteen) == [127] * 3
    with pytest.raises(DataError, match="floating-point"):
        colour_of(tmp_path, Image.fromarray(np.ones(size, np.float32)), "x.tiff")


def test_exif_rotation_and_centre_crop(tmp_path: Path) -> None:
    pixels = np.zeros((30, 90, 3), np.uint8)
    pixels[:, :30] = (255, 0, 0)  # left third red, middle third green
    pixels[:, 30:60] = (0, 255, 0)
    image = Image.fromarray(pixels)
    assert colour_of(tmp_path, image, "crop.png") == [0, 255, 0]
    half = np.zeros((30, 30, 3), np.uint8)
    half[:15] = 255  # the upper half is white; rotated by 90 degrees: one side
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(half).save(tmp_path / "turned.png", exif=exif)
    turned = sources.read_rgb(tmp_path / "turned.png", 4)[..., 0]
    assert turned[:, 3].min() > 200
    assert turned[:, 0].max() < 50


def test_damaged_pictures_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    whole = io.BytesIO()
    Image.fromarray(random).save(whole, "JPEG")
    for name, content in [
        ("truncated.jpg", whole.getvalue()[:2000]),
        ("empty.png", b""),
        ("page.jpg", b"<html>not found</html>"),
        (
            "program.png",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n",
        ),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError) as error:
            sources.read_rgb(tmp_path / name, 8)
        one_line(error, name, "repair or remove it")
        if name == "program.png":  # PostScript is not even recognised, let alone run
            one_line(error, "cannot identify")
    (tmp_path / "bomb.png").write_bytes(png(Image.new("L", (400, 400))))
    monkeypatch.setattr(sources, "MAX_PIXELS", 100_000)
    with pytest.raises(DataError) as error:
        sources.read_rgb(tmp_path / "bomb.png", 8)
    one_line(error, "bomb.png", "400x400")


def test_image_folder_classes_keys_and_split(photos: Path) -> None:
    source = sources.image_folder(photos, 8, test_fraction=0.25)
    assert source.classes == ("class0", "class1")
    assert source.keys[0] == "class0/image.00.jpg"
    assert source.labels == (0,) * 30 + (1,) * 30
    assert 5 <= source.splits.count("test") <= 25
    again = sources.image_folder(photos, 16, test_fraction=0.25)
    assert again.splits == source.splits
    assert set(sources.image_folder(photos, 8, 0).splits) == {"train"}


def test_flat_folder_is_one_class(photos: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in photos.rglob("*.jpg"):
        (flat / file.name).write_bytes(file.read_bytes())
    (flat / "notes.txt").write_text("passed over")
    source = sources.image_folder(flat, 8)
    assert source.classes == ("all",)
    assert len(source) == 60


def test_bad_folders(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        sources.image_folder(tmp_path / "missing", 8)
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match=r"a: no images here"):
        sources.image_folder(tmp_path, 8)
    (tmp_path / "x.png").write_bytes(png(Image.new("L", (8, 8))))
    with pytest.raises(DataError, match="beside folders"):
        sources.image_folder(tmp_path, 8)
