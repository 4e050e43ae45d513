"""Every kind of picture file gives the right colors; every unusable one gives one clear sentence."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from conrad_engine.errors import InputError
from conrad_engine.preprocess.reading import Picture, read_picture, reduce_area

COLORS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [200, 120, 40]]], np.uint8)
"""One color in each quarter: a wrong turn, mirror or channel order shows."""


def quarters(size: int = 32) -> np.ndarray:
    return COLORS.repeat(size // 2, 0).repeat(size // 2, 1)


def encoded(image: Image.Image, kind: str = "PNG", **settings: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return stream.getvalue()


def read(data: bytes | Path, max_pixels: int = 100_000_000, max_side: int = 2048) -> Picture:
    return read_picture(data, max_pixels, max_side)


def levels(picture: Picture) -> np.ndarray:
    return picture.rgba * 255


RGB = Image.fromarray(quarters())
GRAY = np.asarray(RGB.convert("L"))


@pytest.mark.parametrize(
    "mode, expected",
    [
        ("RGB", quarters()),
        ("RGBA", quarters()),
        ("RGBX", quarters()),
        ("P", quarters()),
        ("L", np.stack([GRAY] * 3, -1)),
        ("LA", np.stack([GRAY] * 3, -1)),
        ("1", np.stack([np.asarray(RGB.convert("1"), np.uint8) * 255] * 3, -1)),
        ("CMYK", quarters()),
    ],
)
def test_colors_of_every_mode_are_exact(mode: str, expected: np.ndarray) -> None:
    image = RGB.convert("RGBA").convert("P") if mode == "P" else RGB.convert(mode)
    picture = read(encoded(image, "TIFF" if mode in ("CMYK", "RGBX") else "PNG"))
    np.testing.assert_allclose(levels(picture)[..., :3], expected, atol=1e-3)
    assert (picture.rgba[..., 3] == 1).all() and picture.rgba.dtype == np.float32


def test_lab_is_converted() -> None:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(RGB, *profiles, outputMode="LAB")
    # Only the brown quarter lies well inside of what Lab in 8 bits can hold.
    assert np.abs(levels(read(encoded(image, "TIFF")))[24, 24, :3] - COLORS[1, 1]).max() <= 3


def test_jpeg_is_read_within_its_loss() -> None:
    assert np.abs(levels(read(encoded(RGB, "JPEG", quality=100, subsampling=0)))[8, 8, :3] - COLORS[0, 0]).max() <= 2


def test_sixteen_bit_gray_is_scaled_by_its_full_range() -> None:
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    for data in (encoded(Image.fromarray(ramp)), encoded(Image.fromarray(ramp), "TIFF")):
        assert np.abs(read(data).rgba[..., 0] - ramp / 65535.0).max() < 1e-6


def test_sixteen_bit_color_keeps_its_high_bytes() -> None:
    values = (quarters().astype(np.uint16) << 8) + 77
    data = cv2.imencode(".png", values[..., ::-1])[1].tobytes()
    np.testing.assert_allclose(levels(read(data))[..., :3], quarters(), atol=1e-3)


def test_float_pictures_in_range_are_taken_and_others_refused() -> None:
    ramp = np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(32, 32)
    assert np.abs(read(encoded(Image.fromarray(ramp), "TIFF")).rgba[..., 1] - ramp).max() < 1e-6
    with pytest.raises(InputError, match="gray values from 0 to 300"):
        read(encoded(Image.fromarray(ramp * 300), "TIFF"))
    with pytest.raises(InputError, match="not finite"):
        read(encoded(Image.fromarray(ramp * np.nan), "TIFF"))


def test_transparency_of_palette_and_gray_pictures_is_read() -> None:
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.paste(0, (0, 0, 16, 32))
    picture = read(encoded(palette, transparency=0))
    assert picture.has_alpha
    np.testing.assert_allclose(levels(picture)[0, [0, -1]][:, 3], [0, 255])
    np.testing.assert_allclose(levels(picture)[0, -1, :3], [10, 200, 30], atol=1e-3)
    gray = Image.new("L", (32, 32), 90)
    gray.paste(0, (0, 0, 16, 32))
    np.testing.assert_allclose(levels(read(encoded(gray, transparency=0)))[0, [0, -1], 3], [0, 255])


def premultiplied_tiff(mode: str, value: tuple[int, ...]) -> bytes:
    """A TIFF whose colors are stored multiplied by alpha, which Pillow reads but does not write."""
    color, alpha = np.array(value[:-1]), value[-1]
    stored = [*(color * alpha / 255).round().astype(int).tolist(), alpha]
    data = encoded(Image.new(mode, (32, 32), tuple(stored)), "TIFF")
    tag = struct.pack("<HHIH", 338, 3, 1, 2)  # ExtraSamples: unassociated alpha
    assert data.count(tag) == 1
    return data.replace(tag, tag[:-2] + struct.pack("<H", 1))  # associated


@pytest.mark.parametrize("mode, value", [("RGBA", (200, 100, 50, 128)), ("LA", (120, 128))])
def test_premultiplied_pictures_are_divided(mode: str, value: tuple[int, ...]) -> None:
    expected = value if mode == "RGBA" else (value[0],) * 3 + value[1:]
    picture = read(premultiplied_tiff(mode, value))
    assert picture.has_alpha and np.abs(levels(picture)[5, 5] - expected).max() <= 1.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(orientation: int) -> None:
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that makes the stored picture
    upright = Image.fromarray(np.concatenate([quarters(), quarters()[:16] // 2], 0))
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = read(encoded(stored, exif=exif.tobytes()))
    assert (picture.original_width, picture.original_height) == upright.size
    np.testing.assert_allclose(levels(picture)[..., :3], np.asarray(upright), atol=1e-3)


def swapped_profile() -> bytes:
    """sRGB's profile with the red and blue primaries exchanged: applying it must exchange the channels."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    n_tags = struct.unpack(">I", data[128:132])[0]
    entries = {bytes(data[132 + 12 * k : 136 + 12 * k]): 132 + 12 * k for k in range(n_tags)}
    red, blue = entries[b"rXYZ"], entries[b"bXYZ"]
    data[red + 4 : red + 12], data[blue + 4 : blue + 12] = data[blue + 4 : blue + 12], data[red + 4 : red + 12]
    offset = struct.unpack(">I", data[entries[b"desc"] + 4 : entries[b"desc"] + 8])[0]
    size = struct.unpack(">I", data[entries[b"desc"] + 8 : entries[b"desc"] + 12])[0]
    text = bytes(data[offset : offset + size]).replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))
    data[offset : offset + size] = text.replace(b"sRGB", b"test")
    return bytes(data)


def test_color_profile_is_applied() -> None:
    found = levels(read(encoded(RGB, icc_profile=swapped_profile())))[..., :3]
    assert np.abs(found - quarters()[..., ::-1]).max() <= 2
    with_alpha = RGB.convert("RGBA")
    with_alpha.putalpha(100)
    found = levels(read(encoded(with_alpha, icc_profile=swapped_profile())))
    assert np.abs(found[..., :3] - quarters()[..., ::-1]).max() <= 2 and np.allclose(found[..., 3], 100)


def test_srgb_profile_changes_nothing_and_a_broken_one_is_reported() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_allclose(levels(read(encoded(RGB, icc_profile=profile)))[..., :3], quarters(), atol=1e-3)
    picture = read(encoded(RGB, icc_profile=b"nonsense"))
    np.testing.assert_allclose(levels(picture)[..., :3], quarters(), atol=1e-3)
    assert len(picture.warnings) == 1 and "color profile" in picture.warnings[0]


def test_reduction_weighs_colors_by_alpha() -> None:
    rgba = np.zeros((64, 64, 4), np.float32)
    rgba[:, ::2] = [1, 0.5, 0, 1]
    rgba[:, 1::2] = [0, 0, 1, 0]  # hidden blue must not tint the result
    small = reduce_area(rgba, 32)
    np.testing.assert_allclose(small, np.broadcast_to(np.float32([1, 0.5, 0, 0.5]), (32, 32, 4)), atol=1e-6)


@pytest.mark.parametrize("max_side", [32, 50, 130])
def test_large_pictures_are_reduced_by_area(max_side: int) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (300, 200, 3), np.uint8)
    picture = read(encoded(Image.fromarray(noise)), max_side=max_side)
    assert max(picture.rgba.shape) == max_side and picture.original_height == 300
    # The mean stays; point sampling would keep the deviation of 0.29, area averages of 6 x 6 divide it by six.
    assert abs(picture.rgba[..., :3].mean() - noise.mean() / 255) < 0.01
    assert picture.rgba[..., :3].std() < 1.3 * 0.29 * max_side / 300


def test_phone_pictures_with_a_second_lens_are_read(tmp_path: Path) -> None:
    path = tmp_path / "phone.mpo"
    RGB.save(path, "MPO", save_all=True, append_images=[RGB.rotate(90)], quality=100, subsampling=0)
    picture = read(path)
    assert np.abs(levels(picture)[4, 4, :3] - COLORS[0, 0]).max() < 6 and not picture.warnings


def test_tiff_pages_beyond_the_first_are_reported() -> None:
    data = encoded(RGB, "TIFF", save_all=True, append_images=[RGB.rotate(90)])
    picture = read(data)
    np.testing.assert_allclose(levels(picture)[..., :3], quarters(), atol=1e-3)
    assert "2 pages" in picture.warnings[0]


def huge_png(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that nobody should decode."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


ANIMATION = [Image.new("RGB", (32, 32), color) for color in ("red", "green", "blue")]


@pytest.mark.parametrize(
    "data, sentence",
    [
        (b"", "picture is empty"),
        (b"#!/bin/sh\necho this is no picture\n", "not a picture in a known format"),
        (encoded(RGB)[:60], "damaged or cut off"),
        (encoded(RGB.resize((300, 300)), "JPEG")[:700], "damaged or cut off"),
        (encoded(Image.new("RGB", (1, 1))), "1x1 pixels: at least 16"),
        (encoded(Image.new("RGB", (4000, 20))), "at least 16"),
        (huge_png(20000, 20000), "pixels: at most 100,000,000"),
        (huge_png(12000, 12000), "12000x12000, 144,000,000 pixels: at most 100,000,000"),
        (encoded(ANIMATION[0], "GIF", save_all=True, append_images=ANIMATION[1:]), r"animated \(3 frames\)"),
        (encoded(ANIMATION[0], "WEBP", save_all=True, append_images=ANIMATION[1:]), r"animated \(3 frames\)"),
        (encoded(ANIMATION[0], "PNG", save_all=True, append_images=ANIMATION[1:]), r"animated \(3 frames\)"),
    ],
    ids=["empty", "text", "cut png", "cut jpeg", "1x1", "strip", "20000", "12000", "gif", "webp", "apng"],
)
def test_unusable_pictures_give_one_sentence(data: bytes, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        read(data)
    assert "\n" not in str(caught.value)


def test_unusable_paths_give_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read(tmp_path / "nowhere.png")
    with pytest.raises(InputError, match="is a folder"):
        read(tmp_path)
    (tmp_path / "empty.png").touch()
    with pytest.raises(InputError, match=r"empty\.png is empty"):
        read(tmp_path / "empty.png")
    with pytest.raises(InputError, match="cannot be read|does not exist"):
        read(Path("x" * 5000))
    with pytest.raises(InputError, match="cannot be read|does not exist"):
        read(Path("nul\0byte"))


FILES = {
    kind: encoded(Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 24, 3), np.uint8)), kind)
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP")
}


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(sorted(FILES)),
    changes=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=8),
    cut=st.integers(0, 4000),
)
def test_damaged_files_never_escape_as_another_error(kind: str, changes: list, cut: int) -> None:
    data = bytearray(FILES[kind])
    for place, value in changes:
        data[place % len(data)] = value
    data = bytes(data[: max(1, cut)])
    try:
        picture = read(data, max_pixels=1_000_000)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert np.isfinite(picture.rgba).all()
