"""The sheet, the turntable and their cameras."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from conrad_engine import preview
from conrad_engine.errors import InputError, MissingDependency
from conrad_engine.preview import SheetData


def disk(size: int = 64, color: tuple[float, float, float] = (0.8, 0.2, 0.1)) -> np.ndarray:
    """A colored disk, RGBA."""
    y, x = np.mgrid[:size, :size] + 0.5
    inside = np.hypot(x - size / 2, y - size / 2) < size * 0.4
    return np.concatenate([np.broadcast_to(color, (size, size, 3)), inside[..., None]], -1).astype(np.float64)


def spinning(n_frames: int, size: int) -> list[np.ndarray]:
    """Frames with many colors that change all over."""
    y, x = np.mgrid[:size, :size] / size
    phases = np.arange(n_frames) / n_frames * 2 * math.pi
    return [np.stack([(np.sin(9 * x + p) + 1) / 2, (np.cos(7 * y + p) + 1) / 2, x * y], -1) for p in phases]


def sheet_data(**changes: object) -> SheetData:
    picture = disk()
    settings = dict(
        picture=picture,
        mask=picture[..., 3],
        views=[disk(32, (0.1 * i, 0.5, 0.5)) for i in range(8)],
        field_view=disk(48),
        mesh_view=disk(64),
        depth=np.where(disk(48)[..., 3] > 0, 2.0, 0.0),
        surface=disk(48),
        numbers={"PSNR": "38.2 dB"},
        title="a disk",
    )
    return SheetData(**{**settings, **changes})


def test_sheet_shows_every_part(tmp_path) -> None:
    data = sheet_data()
    captions = [caption for caption, _ in preview.sheet_tiles(data)]
    assert captions[0].startswith("input") and sum(c.startswith("azimuth") for c in captions) == 8
    assert {"field, error x 8", "mesh, error x 8", "depth, near is bright", "surface, azimuth 45°"} <= set(captions)
    sheet = np.asarray(Image.open(preview.make_sheet(data, tmp_path / "sheet.png")))
    assert sheet.shape[1] == 6 * (preview.TILE + preview.MARGIN) + preview.MARGIN
    # The middle of the first tile shows the disk's color, the paper beside it is white.
    top = 34 + preview.MARGIN
    assert np.allclose(sheet[top + 128, preview.MARGIN + 128] / 255, (0.8, 0.2, 0.1), atol=0.02)
    assert (sheet[top + 4, preview.MARGIN + 4] == 255).all()


@pytest.mark.parametrize("n_views", [0, 1, 3, 4, 8])
def test_sheet_keeps_the_numbers_whatever_is_missing(tmp_path, n_views) -> None:
    full = sheet_data(views=[disk(16)] * n_views, depth=None, surface=None, field_view=None)
    with_numbers = np.asarray(Image.open(preview.make_sheet(full, tmp_path / "a.png")))
    none = sheet_data(views=[disk(16)] * n_views, depth=None, surface=None, field_view=None, numbers={})
    without = np.asarray(Image.open(preview.make_sheet(none, tmp_path / "b.png")))
    ink = lambda picture: (picture.sum(-1) < 200).sum()  # noqa: E731
    assert ink(with_numbers) > ink(without)


def test_sheet_takes_a_landscape_photo_without_alpha(tmp_path) -> None:
    picture = np.full((60, 120, 3), 0.4)
    mask = np.zeros((60, 120))
    mask[20:50, 70:110] = 1
    data = sheet_data(picture=picture, mask=mask, field_view=None, mesh_view=np.full((60, 120, 4), 0.4))
    tiles = dict(preview.sheet_tiles(data))
    assert tiles["input and mask outline"].shape == (60, 120, 3)
    height, width = tiles["object"].shape[:2]
    assert 30 <= height <= 40 and 40 <= width <= 50
    preview.make_sheet(data, tmp_path / "sheet.png")


def test_error_tile_is_black_for_equal_pictures_and_amplifies() -> None:
    picture = disk()
    assert preview.error_tile(picture, picture, picture[..., 3]).max() < 1e-6
    brighter = picture.copy()
    brighter[..., :3] += 0.05
    error = preview.error_tile(brighter, picture, picture[..., 3])
    assert np.allclose(error[32, 32], 0.4) and error[0, 0].max() == 0


def test_object_window_holds_the_object_and_little_else() -> None:
    mask = np.zeros((100, 200))
    mask[40:60, 100:150] = 1
    left, top, right, bottom = preview.object_window(mask, margin=0.1)
    assert (left, right) == (pytest.approx(95 / 200), pytest.approx(155 / 200))
    assert (top, bottom) == (pytest.approx(35 / 100), pytest.approx(65 / 100))
    assert preview.object_window(np.zeros((10, 10))) == (0, 0, 1, 1)


def test_depth_tile_near_is_bright() -> None:
    depth = np.array([[1.0, 2.0, 0.0, np.inf]])
    tile = preview.depth_tile(depth)[..., 0]
    assert tile[0, 0] > tile[0, 1] and (tile[0, 2:] == 1).all()


def test_turntable_cameras_see_all_points_and_turn_counterclockwise() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(200, 3)) * (2, 0.3, 1) + (5, -3, 1)
    cameras = preview.turntable_cameras(points, n_frames=8, size=100)
    center = (points.min(0) + points.max(0)) / 2
    fills = []
    for camera in cameras:
        uv, z_depths = camera.project(torch.from_numpy(points))
        assert (z_depths > 0).all() and uv.min() > 0 and uv.max() < 100
        fills.append(float((uv - 50).abs().max()) / 50)
    # Some frame is filled to 90 %: the cameras are no farther away than they must be.
    assert 0.8 < max(fills) <= 0.9 + 1e-6
    first, third = cameras[0].positions.numpy() - center, cameras[2].positions.numpy() - center
    assert first[1] < 0 and abs(first[0]) < 1e-9
    assert third[0] > 0 and abs(third[1]) < 1e-9


def test_sheet_cameras_alternate() -> None:
    points = np.array([[-1.0, -1, -1], [1, 1, 1]])
    heights = [float(camera.positions[2]) for camera in preview.sheet_cameras(points)]
    assert np.allclose(heights[::2], 0, atol=1e-9) and min(heights[1::2]) > 0.5
    # Started at 90 degrees, the first view is the former third.
    turned, plain = preview.sheet_cameras(points, start_deg=90)[0], preview.sheet_cameras(points)[2]
    assert torch.allclose(turned.positions, plain.positions)


def test_gif_loops_and_keeps_its_colors(tmp_path) -> None:
    frames = [disk(40, (0.9, 0.1, 0.1)), disk(40, (0.1, 0.2, 0.9))]
    path = preview.write_turntable(frames, tmp_path / "turn.gif")
    gif = Image.open(path)
    assert gif.n_frames == 2 and gif.info["loop"] == 0
    for i, color in enumerate([(0.9, 0.1, 0.1), (0.1, 0.2, 0.9)]):
        gif.seek(i)
        rgb = np.asarray(gif.convert("RGB")) / 255
        assert np.allclose(rgb[20, 20], color, atol=0.03) and (rgb[0, 0] == 1).all()


def test_gif_stays_under_its_limit(tmp_path, monkeypatch) -> None:
    frames = spinning(12, 96)
    full = preview.write_turntable(frames, tmp_path / "full.gif").stat().st_size
    monkeypatch.setattr(preview, "MAX_TURNTABLE_BYTES", full // 3)
    path = preview.write_turntable(frames, tmp_path / "small.gif")
    assert path.stat().st_size < full // 3 and Image.open(path).n_frames == 12


def test_gif_colors_are_close_on_a_smooth_animation(tmp_path) -> None:
    frames = spinning(6, 64)
    gif = Image.open(preview.write_turntable(frames, tmp_path / "turn.gif"))
    for i, frame in enumerate(frames):
        gif.seek(i)
        error = np.asarray(gif.convert("RGB")) / 255 - frame
        # Dithered: single pixels are off, local means are right.
        assert abs(error.reshape(8, 8, 8, 8, 3).mean((1, 3))).max() < 0.08


def test_turntable_mp4(tmp_path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    path = preview.write_turntable(spinning(6, 64), tmp_path / "turn.mp4")
    assert path.read_bytes()[4:8] == b"ftyp"


def test_turntable_says_what_is_wrong(tmp_path, monkeypatch) -> None:
    with pytest.raises(InputError, match="at least one frame"):
        preview.write_turntable([], tmp_path / "turn.gif")
    with pytest.raises(InputError, match="gif or .mp4"):
        preview.write_turntable(spinning(1, 8), tmp_path / "turn.avi")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    monkeypatch.setattr(preview, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="pip install imageio-ffmpeg"):
        preview.write_turntable(spinning(1, 8), tmp_path / "turn.mp4")
