"""The whole preparation: which mask wins, boxes, scales, depth, warnings, and the errors a user meets."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conrad_engine.cameras import CameraSetup
from conrad_engine.config import PictureConfig
from conrad_engine.errors import InputError
from conrad_engine.preprocess.prepare import prepare_picture

from .conftest import figure_rgba

PICTURES = Path(__file__).parent / "pictures"
CONFIG = PictureConfig()


def png(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


def figure(height: int = 192, width: int = 192) -> np.ndarray:
    return figure_rgba(height, width)


def opaque_figure() -> np.ndarray:
    rgba = figure()
    return np.where(rgba[..., 3:] > 0, rgba[..., :3], 235).astype(np.uint8)


def box_of(inside: np.ndarray) -> tuple[int, int, int, int]:
    v, u = np.nonzero(inside)
    return int(u.min()), int(v.min()), int(u.max()) + 1, int(v.max()) + 1


def test_alpha_is_the_mask_and_visible_colors_stay_exact() -> None:
    rgba = figure()
    data = png(rgba)
    prepared = prepare_picture(data, CONFIG)
    assert prepared.matting == "alpha" and prepared.box == box_of(rgba[..., 3] > 0)
    np.testing.assert_array_equal(prepared.mask, rgba[..., 3] / np.float32(255))
    inside = rgba[..., 3] == 255
    np.testing.assert_allclose(prepared.rgb[inside] * 255, rgba[..., :3][inside], atol=1e-3)
    np.testing.assert_array_equal(prepared.original, rgba)
    assert prepared.sha256 == hashlib.sha256(data).hexdigest()
    assert prepared.rgb.dtype == prepared.mask.dtype == np.float32
    assert (prepared.scale, prepared.original_width, prepared.original_height) == (1.0, 192, 192)


def test_colors_go_on_beyond_the_silhouette() -> None:
    rgba = figure()
    prepared = prepare_picture(png(rgba), CONFIG)
    left_arm_row = int(0.4 * 192)
    first = int(np.flatnonzero(rgba[left_arm_row, :, 3])[0])
    # Two pixels outside, still the arm's red; the file holds black there.
    assert np.abs(prepared.rgb[left_arm_row, first - 2] - np.float32([210, 30, 30]) / 255).max() < 0.02


def disc_alpha(opacity: float, rim_px: float = 1.0) -> np.ndarray:
    v, u = np.mgrid[:256, :256] + 0.5
    coverage = ((80 - np.hypot(u - 128, v - 128)) / rim_px + 0.5).clip(0, 1)
    return (coverage * opacity * 255).round().astype(np.uint8)


def with_alpha(alpha: np.ndarray) -> bytes:
    return png(np.dstack([np.full_like(alpha, 90), np.full_like(alpha, 140), np.full_like(alpha, 150), alpha]))


@pytest.mark.parametrize("rim_px", [1.0, 5.0])
def test_glass_becomes_solid_with_the_same_outline(rim_px: float) -> None:
    opaque = prepare_picture(with_alpha(disc_alpha(1.0, rim_px)), CONFIG)
    glass = prepare_picture(with_alpha(disc_alpha(0.55, rim_px)), CONFIG)
    assert np.abs(opaque.mask - disc_alpha(1.0, rim_px) / 255).max() < 0.03
    assert np.abs(glass.mask - opaque.mask).max() < 0.06
    assert glass.box == opaque.box


def test_a_glass_shade_on_an_opaque_foot_is_solid_down_to_the_foot() -> None:
    alpha = disc_alpha(0.5)
    alpha[120:136, 40:216] = 255
    mask = prepare_picture(with_alpha(alpha), CONFIG).mask
    assert mask[60:200, 100:156].min() == 1


def test_shadows_and_wires_keep_their_alpha() -> None:
    alpha = disc_alpha(1.0)
    alpha[200:240, 100:156] = np.maximum(alpha[200:240, 100:156], 80)  # a cast shadow
    alpha[10:40, 20] = 120  # a wire that covers half of each pixel
    mask = prepare_picture(with_alpha(alpha), CONFIG).mask
    wanted = alpha / np.float32(255)
    assert (mask[alpha == 80] == wanted[alpha == 80]).all()
    assert set(np.unique(mask[10:40, 20])) <= {np.float32(0), np.float32(120 / 255)}


def test_files_and_bytes_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "figure.png").write_bytes(png(figure()))
    one, other = prepare_picture(tmp_path / "figure.png", CONFIG), prepare_picture(png(figure()), CONFIG)
    np.testing.assert_array_equal(one.rgb, other.rgb)
    assert one.sha256 == other.sha256 and one.box == other.box


def test_a_mask_overrides_alpha() -> None:
    given = np.zeros((192, 192), bool)
    given[50:100, 40:90] = True
    prepared = prepare_picture(png(figure()), CONFIG, mask=given)
    assert prepared.matting == "mask" and prepared.box == (40, 50, 90, 100)
    np.testing.assert_array_equal(prepared.mask, given.astype(np.float32))


def test_glass_is_solid_in_a_mask_too() -> None:
    in_front = png(np.full((256, 256, 3), 120, np.uint8))
    opaque, glass = (prepare_picture(in_front, CONFIG, mask=disc_alpha(opacity)) for opacity in (1.0, 0.51))
    np.testing.assert_array_equal(opaque.mask, disc_alpha(1.0) / np.float32(255))
    assert np.abs(glass.mask - opaque.mask).max() < 0.06


def as_files(mask: np.ndarray) -> dict[str, object]:
    levels = (mask * 255).astype(np.uint8)
    in_alpha = np.dstack([levels * 0, levels * 0, levels * 0, levels])
    return {
        "bool": mask,
        "float": mask.astype(np.float64),
        "uint8": levels,
        "uint16": (mask * 65535).astype(np.uint16),
        "0 and 1": mask.astype(np.uint8),
        "one channel": levels[..., None],
        "gray png": png(levels),
        "rgb png": png(np.dstack([levels] * 3)),
        "alpha png": png(in_alpha),
        "16-bit png": png((mask * 65535).astype(np.uint16)),
    }


@pytest.mark.parametrize("kind", as_files(np.ones((2, 2), bool)))
def test_masks_of_every_kind_are_the_same(kind: str) -> None:
    mask = figure()[..., 3] > 0
    prepared = prepare_picture(png(opaque_figure()), CONFIG, mask=as_files(mask)[kind])
    np.testing.assert_array_equal(prepared.mask, mask.astype(np.float32))


@pytest.mark.parametrize("size", [96, 384])
def test_a_mask_of_another_size_is_resampled(size: int) -> None:
    mask = figure(size, size)[..., 3]
    prepared = prepare_picture(png(opaque_figure()), CONFIG, mask=mask)
    truth = figure()[..., 3] > 0
    assert prepared.mask.shape == truth.shape
    assert ((prepared.mask > 0.5) & truth).sum() / ((prepared.mask > 0.5) | truth).sum() > 0.93


@pytest.mark.parametrize(
    "mask, sentence",
    [
        (np.zeros((192, 192), np.uint8), "mask is empty"),
        (np.ones((192, 100), np.uint8), "mask is 100x192 but the picture is 192x192"),
        (np.full((192, 192), np.nan), "negative or non-finite"),
        (np.full((192, 192), 4000.0), "values up to 4000"),
        (np.zeros((3, 4, 5, 6)), "one channel of numbers"),
        (b"", "mask is empty \\(0 bytes\\)"),
        (b"no picture", "mask is not a picture"),
        (Path("nowhere.png"), "mask nowhere.png does not exist"),
    ],
)
def test_unusable_masks_give_one_sentence(mask: object, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        prepare_picture(png(figure()), CONFIG, mask=mask)
    assert "\n" not in str(caught.value)


def test_opaque_pictures_are_cut_out_and_specks_of_alpha_ignored() -> None:
    prepared = prepare_picture(png(opaque_figure()), CONFIG)
    truth = figure()[..., 3] > 0
    assert prepared.matting == "backdrop"
    assert ((prepared.mask > 0.5) & truth).sum() / ((prepared.mask > 0.5) | truth).sum() > 0.97
    specked = figure()
    specked[3, 3] = 255
    assert prepare_picture(png(specked), CONFIG).box == box_of(truth)


def test_alpha_that_says_nothing_is_not_a_mask() -> None:
    rounded = np.dstack([opaque_figure(), np.full((192, 192), 255, np.uint8)])
    rounded[:3, :3, 3] = rounded[-3:, -3:, 3] = 0
    assert prepare_picture(png(rounded), CONFIG).matting == "backdrop"


@pytest.mark.parametrize(
    "values, sentence",
    [
        (np.zeros((64, 64, 4), np.uint8), "transparent everywhere"),
        (np.full((64, 64, 4), 90, np.uint8), "transparent everywhere"),
        (np.full((64, 64, 3), 200, np.uint8), "no object stands out"),
        (
            np.dstack(
                [np.zeros((64, 64, 3), np.uint8), np.eye(64, dtype=np.uint8)[:, ::-1] * 200 * (np.arange(64) < 20)]
            ),
            "no visible object",
        ),
    ],
    ids=["transparent", "veil", "uniform", "too few"],
)
def test_pictures_without_an_object_give_one_sentence(values: np.ndarray, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        prepare_picture(png(values), CONFIG)
    assert "\n" not in str(caught.value)


def test_large_pictures_are_reduced_and_the_scale_kept() -> None:
    prepared = prepare_picture(png(figure(300, 500)), PictureConfig(max_side=250))
    assert prepared.rgb.shape == (150, 250, 3) and prepared.original.shape == (150, 250, 4)
    assert prepared.scale == 0.5 and (prepared.original_width, prepared.original_height) == (500, 300)


def test_warnings_name_what_the_user_should_know() -> None:
    rgba = figure()
    assert prepare_picture(png(rgba), CONFIG).warnings == ()
    cropped = prepare_picture(png(rgba[:, 60:]), CONFIG).warnings
    assert len(cropped) == 1 and "touches the left border" in cropped[0]
    small = prepare_picture(png(figure(96, 96)), CONFIG).warnings
    assert len(small) == 1 and "pixels large" in small[0]
    blurred = np.asarray(Image.fromarray(figure(48, 48)).resize((384, 384), Image.Resampling.BICUBIC))
    assert any("enlarged" in note for note in prepare_picture(png(blurred), CONFIG).warnings)


def depth_ramp(height: int = 96, width: int = 96) -> np.ndarray:
    v, u = np.mgrid[:height, :width] + 0.5
    return 1 + u / width + 0.5 * v / height


def npz(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["array", "npy", "npz", "one of several", "16-bit png", "float tiff"])
def test_depth_of_every_kind_is_read(kind: str, tmp_path: Path) -> None:
    ramp = depth_ramp(192, 192)
    scale, source = 1.0, ramp
    match kind:
        case "npy":
            source = npy(ramp)
        case "npz":
            source = npz(anything=ramp)
        case "one of several":
            source = npz(depth=ramp, rgb=np.zeros(3))
        case "16-bit png":
            scale, source = 20000.0, png((ramp * 20000).astype(np.uint16))
        case "float tiff":
            source = tmp_path / "depth.tiff"
            Image.fromarray(ramp.astype(np.float32)).save(source)
    prepared = prepare_picture(png(figure()), CONFIG, depth=source, depth_kind="metric")
    assert prepared.depth is not None and prepared.depth.dtype == np.float32 and prepared.depth_kind == "metric"
    np.testing.assert_allclose(prepared.depth / scale, ramp, atol=1e-4)


def test_depth_is_resampled_to_the_picture_and_disparity_inverted() -> None:
    ramp = depth_ramp(96, 96)
    prepared = prepare_picture(png(figure()), CONFIG, depth=ramp)
    np.testing.assert_allclose(prepared.depth[4:-4, 4:-4], depth_ramp(192, 192)[4:-4, 4:-4], atol=1e-5)
    flipped = prepare_picture(png(figure()), CONFIG, depth=1 / ramp, depth_is_inverse=True)
    np.testing.assert_allclose(flipped.depth, prepared.depth, atol=1e-5)
    with_zero = prepare_picture(png(figure()), CONFIG, depth=2.5 - ramp + ramp.min() - 1, depth_is_inverse=True)
    assert np.isfinite(with_zero.depth).all() and (np.diff(with_zero.depth[20]) >= 0).all()


def test_infinite_depth_becomes_the_farthest() -> None:
    ramp = depth_ramp(192, 192)
    farthest = ramp[:, 100:].max()
    ramp[:, :100] = np.inf
    prepared = prepare_picture(png(figure()), CONFIG, depth=ramp)
    assert np.isfinite(prepared.depth).all() and abs(prepared.depth[5, 5] - farthest) < 1e-5


@pytest.mark.parametrize(
    "depth, sentence",
    [
        (depth_ramp(96, 60), "depth is 60x96 but the picture is 192x192: they must have the same aspect"),
        (np.where(depth_ramp() > 2, np.nan, 1), "NaN values"),
        (np.ones((96, 96)), "the same everywhere"),
        (np.full((96, 96), np.inf), "the same everywhere"),
        (np.zeros((96, 96, 3)) + np.arange(3), "one channel of numbers"),
        (np.array("text"), "one channel of numbers"),
        (b"", "depth is empty"),
        (b"\x93NUMPY cut", "not a readable NumPy file"),
        (npy(depth_ramp())[:500], "not a readable NumPy file"),
        (b"PK\x03\x04 cut", "not a readable NumPy file"),
        (npz(a=depth_ramp(), b=depth_ramp()), "name the array to use 'depth'"),
        (npy(np.array([{}])), "not a readable NumPy file"),
        (b"\x76\x2f\x31\x01 cut", "OpenEXR file this OpenCV cannot read"),
        (b"no depth", "not a picture"),
        (Path("nowhere.npy"), "depth nowhere.npy does not exist"),
    ],
)
def test_unusable_depth_gives_one_sentence(depth: object, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        prepare_picture(png(figure()), CONFIG, depth=depth)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["robot.png", "chair.webp", "camera.jpg", "truck.jpg", "lighthouse.jpg"])
def test_shipped_pictures_fit_their_cameras_and_masks(name: str) -> None:
    """The object's center and size, seen through the camera file, must lie where the mask says."""
    stem = name.split(".")[0]
    true_mask = PICTURES / f"{stem}.mask.png"
    prepared = prepare_picture(PICTURES / name, CONFIG, mask=true_mask if true_mask.exists() else None)
    setup = CameraSetup.from_json(PICTURES / f"{stem}.camera.json")
    assert prepared.rgb.shape[:2] == (setup.camera.height, setup.camera.width)
    assert not prepared.warnings
    uv, z_depths = setup.camera.project(setup.object_center[None])
    left, top, right, bottom = prepared.box
    assert left < float(uv[0, 0]) < right and top < float(uv[0, 1]) < bottom
    largest = setup.object_size * float(setup.camera.intrinsics[0]) / float(z_depths[0])
    assert 0.75 < max(right - left, bottom - top) / largest < 1.35
    assert json.loads((PICTURES / f"{stem}.camera.json").read_text())["width"] == setup.camera.width


def test_robot_has_its_red_arm_on_the_right() -> None:
    prepared = prepare_picture(PICTURES / "robot.png", CONFIG)
    visible = prepared.mask > 0.9
    u = np.broadcast_to(np.arange(prepared.mask.shape[1]), visible.shape)
    # Beside the body only: the face and the chest have red and blue parts, too.
    beside = visible & ((u < 250) | (u > 500))
    red = beside & (prepared.rgb[..., 0] > prepared.rgb[..., 2] + 0.4)
    blue = beside & (prepared.rgb[..., 2] > prepared.rgb[..., 0] + 0.3)
    assert red.sum() > 1000 and blue.sum() > 1000
    assert u[red].mean() > 500 and u[blue].mean() < 250
