"""Conversion of image files to uint8 squares, and unusable files."""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from bigan.data.format import convert
from bigan.data.format.codec import BadImageError, first_line
from bigan.data.format.convert import load, to_size

SIZE = (8, 8)
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (48, 48, 3), np.uint8)


def coded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file, kind, **options)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def colour(data: bytes, channels: int = 3) -> list[int]:
    return load(data, 4, channels)[2, 2].tolist()


def smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 200], -1).astype(np.uint8)


def test_every_mode_becomes_rgb() -> None:
    assert colour(coded(Image.new("L", SIZE, 90))) == [90] * 3
    assert colour(coded(Image.new("1", SIZE, 1))) == [255] * 3
    assert colour(coded(Image.new("RGBA", SIZE, (255, 0, 0, 0)))) == [255] * 3
    assert colour(coded(Image.new("RGBA", SIZE, (255, 0, 0, 128)))) == [255, 127, 127]
    assert colour(coded(Image.new("LA", SIZE, (0, 255)))) == [0] * 3
    palette = Image.new("P", SIZE, 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert colour(coded(palette)) == [10, 20, 30]
    assert colour(coded(palette, transparency=1)) == [255] * 3
    assert colour(coded(palette, "GIF")) == [10, 20, 30]


def test_cmyk_jpeg_goes_through_pil() -> None:
    cmyk = coded(Image.new("CMYK", SIZE, (0, 255, 255, 0)), "JPEG", quality=100)
    assert np.abs(np.subtract(colour(cmyk), [255, 0, 0])).max() <= 3


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    for value in (0, 127 * 257, 128 * 257 + 128, 65_535):
        image = np.full(SIZE, value, np.uint16)
        want = [(value + 128) // 257] * 3
        assert colour(coded(image)) == want
        pgm = b"P5 8 8 65535\n" + image.astype(">u2").tobytes()
        assert colour(pgm) == want


def test_pixels_of_unknown_range_are_refused() -> None:
    with pytest.raises(BadImageError, match="floating-point"):
        colour(coded(np.ones(SIZE, np.float32), "TIFF"))
    with pytest.raises(BadImageError, match="32-bit"):
        colour(coded(np.ones(SIZE, np.int32), "TIFF"))


def test_one_channel_is_luma() -> None:
    assert colour(coded(Image.new("RGB", SIZE, (255, 0, 0))), 1) == [76]
    assert colour(coded(Image.new("L", SIZE, 90)), 1) == [90]
    assert colour(coded(Image.new("LA", SIZE, (0, 0))), 1) == [255]
    data = coded(NOISE, "JPEG")  # PIL's luma of the RGB pixels, not the Y of the file
    want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB").convert("L"))
    assert np.array_equal(load(data, 48, 1)[..., 0], want)


@pytest.mark.parametrize("kind", convert.FORMATS)
def test_format_is_detected_from_the_content(kind: str) -> None:
    data = coded(smooth(16, 16), kind)
    want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(load(data, 16), want)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", SIZE, c) for c in ((200, 0, 0), (0, 200, 0))]
    data = coded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert colour(data) == [200, 0, 0]


def test_camera_files_with_two_images() -> None:
    """Phones write JPEG files with a second image behind the first (MPO)."""
    frames = [Image.fromarray(smooth(16, 16)), Image.new("RGB", (16, 16))]
    data = coded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert np.array_equal(load(data, 16), load(coded(frames[0], "JPEG"), 16))


def test_npy_arrays() -> None:
    grey = NOISE[..., 0]
    assert np.array_equal(load(npy(NOISE), 48), NOISE)
    assert np.array_equal(load(npy(np.asfortranarray(NOISE)), 48), NOISE)
    assert np.array_equal(load(npy(grey), 48, 1)[..., 0], grey)
    assert np.array_equal(load(npy(grey[..., None]), 48, 3), grey[..., None].repeat(3, 2))
    for array, reason in [
        (NOISE.astype(np.float32), "float32"),
        (NOISE.transpose(2, 0, 1), r"\[3, 48, 48\]"),
        (np.zeros((0, 4), np.uint8), "without pixels"),
        (np.asarray([[{}]], object), "object"),
    ]:
        with pytest.raises(BadImageError, match=reason):
            load(npy(array), 8)
    with pytest.raises(BadImageError, match="expected 6912"):
        load(npy(NOISE)[:-1], 8)


def test_false_npy_header_allocates_nothing() -> None:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (11000, 11000, 1)}"
    data = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header
    with pytest.raises(BadImageError, match="holds 0 bytes"):
        load(data, 8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation(kind: str) -> None:
    half = np.zeros((32, 32, 3), np.uint8)
    half[:16] = 255  # the upper half is white; turned by 90 degrees: one side
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = load(coded(half, kind, exif=exif), 4)[..., 0]
    assert turned[:, 3].min() > 200
    assert turned[:, 0].max() < 50


def test_all_orientations() -> None:
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = coded(NOISE, "JPEG", exif=exif, quality=100)
        want = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert np.array_equal(load(data, 48), np.asarray(want))
        assert np.array_equal(to_size(Image.open(io.BytesIO(data)), 48), np.asarray(want))


def test_damaged_exif_is_accepted() -> None:
    """One type code is wrong, as from some cameras; the orientation (6) is readable."""
    exif = (
        b"Exif\0\0MM\0*\0\0\0\x08\0\x03\x01\x03\0\x02\0\0\0\x16\0\0\0\x32\x01\x12\0\x03\0\0\0\x01"
        b"\0\x06\0\0\x87i\0\x04\0\x0c\0\x01\0\0\0H\0\0\0\0desc\x02iption here\0long\0\0"
    )
    data = coded(NOISE, "JPEG", exif=exif)
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    upright = load(coded(NOISE, "JPEG"), 48)
    assert np.array_equal(load(data, 48), np.rot90(upright, -1))
    data = coded(NOISE, "JPEG", exif=b"Exif\0\0no TIFF header at all")
    assert np.array_equal(load(data, 48), upright)


def test_centre_crop() -> None:
    pixels = np.zeros((30, 90, 3), np.uint8)
    pixels[:, 30:60] = (0, 255, 0)
    assert np.array_equal(load(coded(pixels), 30), pixels[:, 30:60])
    upright = pixels.transpose(1, 0, 2)
    assert np.array_equal(load(coded(upright), 30), upright[30:60])


def test_lanczos_and_area() -> None:
    image = smooth(64, 64)
    area = image.reshape(16, 4, 16, 4, 3).mean((1, 3))
    assert np.abs(load(coded(image), 16, resize="area") - area).max() <= 1  # it rounds twice
    lanczos = Image.fromarray(image).resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(load(coded(image), 16), np.asarray(lanczos))
    assert not np.array_equal(load(coded(image), 16), load(coded(image), 16, resize="area"))
    names = [convert.TRANSFORMS["crop", resize] for resize in ("lanczos", "area")]
    assert names == ["center-lanczos-v1", "center-area-v1"]  # of data sets that exist


def test_nothing_is_resampled_at_the_same_size() -> None:
    for resize in ("lanczos", "area"):
        assert np.array_equal(load(coded(NOISE), 48, resize=resize), NOISE)


def test_enlarging_must_be_requested() -> None:
    small = coded(smooth(20, 30))
    with pytest.raises(BadImageError, match=r"30x20, smaller than 32 px.*--allow-upscale"):
        load(small, 32)
    assert load(small, 20).shape == (20, 20, 3)
    assert load(small, 32, allow_upscale=True).shape == (32, 32, 3)


def test_damaged_structure_of_a_jpeg_is_refused() -> None:
    """PIL decodes these files without an error."""
    data = bytearray(coded(smooth(200, 200), "JPEG", quality=90))
    middle = len(data) * 2 // 3
    data[middle : middle + 40] = b"\xff\xd0" * 20
    assert Image.open(io.BytesIO(bytes(data))).convert("RGB").size == (200, 200)
    with pytest.raises(BadImageError, match="cannot be read"):
        load(bytes(data), 8)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("PPM", {}),
     ("TIFF", {}), ("GIF", {}), ("AVIF", {}), ("JPEG2000", {}), ("JPEG2000", {"no_jp2": True})],
)  # fmt: skip
def test_truncated_images_are_refused(kind: str, options: dict[str, object]) -> None:
    data = coded(NOISE, kind, **options)
    for length in (1, 20, len(data) // 2, len(data) - 20):
        with pytest.raises(BadImageError):
            load(data[:length], 8)


@pytest.mark.parametrize("compression", [None, "tga_rle"])
def test_truncated_targa_files(compression: str | None) -> None:
    """All pixels are needed, the footer behind them is not."""
    data = coded(NOISE, "TGA", compression=compression)
    assert np.array_equal(load(data[:-26], 48), NOISE)
    for length in (1, 17, 20, len(data) // 2, len(data) - 28):
        with pytest.raises(BadImageError):
            load(data[:length], 8)


def test_png_without_its_end_is_refused() -> None:
    with pytest.raises(BadImageError, match="truncated"):
        load(coded(NOISE)[:-2], 8)


def test_unknown_formats() -> None:
    with pytest.raises(BadImageError, match="empty"):
        load(b"", 8)
    for data in (
        b"<html>not found</html>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n",
        coded(Image.new("RGB", (16, 16)), "ICO"),
        b"\0\0\x01\xba" + b"\x08\0" * 100,  # MPEG, with the size of a TGA
    ):  # PostScript is not recognised, therefore not executed
        with pytest.raises(BadImageError, match=r"^has an unknown image format$"):
            load(data, 8)


def test_reasons_are_the_same_in_every_process() -> None:
    assert first_line(ValueError("<io.BytesIO object at 0x7f12ab> is bad\nmore")) == (
        "<io.BytesIO object> is bad"
    )
    assert first_line(ValueError()) == "ValueError"


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_bombs_are_refused_before_decoding(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = coded(Image.new("L", (400, 400)), kind)
    monkeypatch.setattr(convert, "MAX_PIXELS", 160_000)
    assert load(data, 8).shape == (8, 8, 3)
    monkeypatch.setattr(convert, "MAX_PIXELS", 159_999)
    monkeypatch.setattr(convert.simplejpeg, "decode_jpeg", None)  # nothing is decoded
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(BadImageError, match="is 400x400, more than"):
        load(data, 8)


def test_larger_images_by_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also above PIL's limits, the one of its warning and twice as many."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    data = coded(Image.new("L", (400, 400)))
    with pytest.raises(BadImageError, match=r"more than 100,000 pixels; use --max-pixels"):
        load(data, 8, max_pixels=100_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert.allow_pixels(160_000)
        assert load(data, 8, max_pixels=160_000).shape == (8, 8, 3)
        assert load(npy(np.zeros((400, 400), np.uint8)), 8, max_pixels=160_000).shape == (
            8,
            8,
            3,
        )


def test_bomb_of_real_size() -> None:
    """A PNG of 20,000 x 20,000 pixels in a few bytes."""
    data = bytearray(coded(Image.new("L", SIZE)))
    data[16:24] = struct.pack(">II", 20_000, 20_000)
    with pytest.raises(BadImageError):
        load(bytes(data), 8)


def test_arrays_and_pil_images() -> None:
    grey = NOISE[..., :1]
    assert np.array_equal(to_size(NOISE, 48), NOISE)
    assert np.array_equal(to_size(grey, 48, 1), grey)
    assert np.array_equal(to_size(grey[..., 0], 48, 1), grey)
    assert np.array_equal(to_size(Image.fromarray(NOISE), 48), NOISE)
    clear = np.concatenate([NOISE, np.zeros_like(grey)], 2)
    assert to_size(clear, 48).min() == 255
    for array in (NOISE.astype(float), NOISE[None], NOISE[..., [0] * 5], np.zeros(5, np.uint8)):
        with pytest.raises(BadImageError, match="not uint8"):
            to_size(array, 8)
