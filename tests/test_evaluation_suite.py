"""Making and reading suites, and photo-like pictures."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conrad_engine.errors import InputError
from conrad_engine.evaluation import metrics, photo_like, suite
from conrad_engine.training.pool import PoolMesh
from conrad_engine.training.raster import Rasterizer

needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="rendering the suite needs a C compiler")


def box_mesh(size: tuple[float, float, float], inner: bool = False) -> PoolMesh:
    """A box with a red -Y side, a blue +Y side and gray others; with a small box inside it if asked for."""
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float32) / 2
    faces = [[0, 4, 5], [0, 5, 1], [2, 3, 7], [2, 7, 6], [0, 1, 3], [0, 3, 2]]
    faces += [[4, 6, 7], [4, 7, 5], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]]
    materials = [0, 0, 1, 1, *[2] * 8]
    vertices = corners * np.array(size, np.float32)
    if inner:
        vertices = np.concatenate([vertices, vertices * 0.5])
        faces += [[i + 8 for i in face] for face in faces]
        materials = materials * 2
    return PoolMesh(
        vertices=vertices.astype(np.float32),
        faces=np.array(faces, np.int32),
        uvs=np.zeros((len(vertices), 2), np.float32),
        face_materials=np.array(materials, np.int32),
        material_rgba=np.array([[0.9, 0.1, 0.1, 1], [0.1, 0.1, 0.9, 1], [0.5, 0.5, 0.5, 1]], np.float32),
        material_texture=np.full(3, -1, np.int32),
    )


class SmallPool:
    """Two boxes, with everything `make_suite` asks a pool for."""

    source = "boxes"
    names = np.array(["Tall Box / 1", "Flat box"])
    keys = categories = licenses = authors = np.array(["a", "b"])
    splits = np.array(["val", "val"])

    def indices(self, split: str) -> np.ndarray:
        return np.flatnonzero(self.splits == split)

    def mesh(self, index: int) -> PoolMesh:
        return box_mesh([(0.5, 0.4, 1.0), (1.0, 0.7, 0.3)][index])


@pytest.fixture(scope="module")
def small_suite(tmp_path_factory) -> Path:
    """A suite of two boxes: 64 px pictures, 32 px views."""
    if shutil.which("gcc") is None:
        pytest.skip("rendering the suite needs a C compiler")
    out = tmp_path_factory.mktemp("suite")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "_open_pools", lambda path: [SmallPool()])
        suite.make_suite("unused", out, picture_size=64, view_size=32)
    return out


def test_suite_has_what_it_promises(small_suite: Path) -> None:
    objects = suite.read_suite(small_suite)
    assert [o.name for o in objects] == ["boxes-0000-tall-box-1", "boxes-0001-flat-box"]
    for item in objects:
        assert len(item.views) == 16 and item.views[0].rgba().shape == (32, 32, 4)
        assert {(v.azimuth_deg, v.elevation_deg) for v in item.views} == {
            (a, e) for a in range(0, 360, 45) for e in (0, 30)
        }
        assert sum(view.is_rear for view in item.views) == 6
        picture = suite.read_rgba(item.picture_path)
        assert picture.shape == (64, 64, 4) and 0.05 < picture[..., 3].mean() < 0.8
        for name in ("picture_degraded.png", "picture_photo.png"):
            assert Image.open(item.folder / name).size == (64, 64)
        assert Image.open(item.folder / "picture_photo.png").mode == "RGB"
        assert item.meta["name"] in SmallPool.names


def test_suite_camera_stands_at_the_elevation_and_sees_the_truth(small_suite: Path) -> None:
    for item in suite.read_suite(small_suite):
        camera = item.setup.camera
        position = camera.positions
        assert math.degrees(math.asin(position[2] / position.norm())) == pytest.approx(15)
        # The true surface points, projected, fill the picture's mask and nothing else.
        uv, z_depths = camera.project(torch.from_numpy(item.points))
        mask = suite.read_rgba(item.picture_path)[..., 3] > 0
        columns, rows = np.floor(uv.numpy()).astype(int).T
        assert mask[rows, columns].mean() > 0.99
        covered = np.zeros_like(mask)
        covered[rows, columns] = True
        assert metrics.mask_iou(covered, mask) > 0.97
        # The depth map is the nearest of these points.
        depth = item.z_depths()
        nearest = np.full(mask.shape, np.inf)
        np.minimum.at(nearest, (rows, columns), z_depths.numpy())
        inside = (depth > 0) & np.isfinite(nearest)
        assert np.abs(depth - nearest)[inside].mean() < 0.02


def test_suite_azimuths_are_relative_and_counterclockwise(small_suite: Path) -> None:
    for item in suite.read_suite(small_suite):
        reference = math.atan2(item.setup.camera.positions[0], -item.setup.camera.positions[1])
        for view in item.views:
            azimuth = math.atan2(view.camera.positions[0], -view.camera.positions[1])
            turn = math.degrees(azimuth - reference) % 360
            assert min(abs(turn - view.azimuth_deg), 360 - abs(turn - view.azimuth_deg)) < 1e-3


def test_suite_views_show_the_side_they_should() -> None:
    """From -Y the box is red, from +Y blue: the sign of the world is right in rendering and camera alike."""
    if shutil.which("gcc") is None:
        pytest.skip("needs a C compiler")
    from conrad_engine.training.raster import Light

    scene = Rasterizer(box_mesh((1.0, 0.5, 0.5)))
    for azimuth, channel in ((0.0, 0), (math.pi, 2)):
        rgba = suite._render(scene, suite._orbit_camera(azimuth, 0.0, 2.0, 32), Light((0, 0, 1)))[0]
        assert rgba[16, 16, :3].argmax() == channel


def test_suite_is_reproducible_and_a_choice_keeps_the_looks(small_suite: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(suite, "_open_pools", lambda path: [SmallPool()])
    (one,) = suite.make_suite("unused", tmp_path, count=1, picture_size=64, view_size=32)
    twin = suite.read_object(small_suite / one.name)
    for name in ("picture.png", "picture_photo.png", "views/az090_el30.png"):
        assert (one.folder / name).read_bytes() == (twin.folder / name).read_bytes()
    assert one.setup.to_json() == twin.setup.to_json()


@needs_compiler
def test_visible_points_leave_out_what_is_inside() -> None:
    mesh = box_mesh((1.0, 1.0, 1.0), inner=True)
    points = suite.visible_points(Rasterizer(mesh), mesh, np.random.default_rng(0), n_cameras=20, size=96)
    assert np.abs(points).max(1).min() > 0.49
    # All six sides are there, in equal shares.
    sides = np.bincount(np.abs(points).argmax(1) * 2 + (points[np.arange(len(points)), np.abs(points).argmax(1)] > 0))
    assert len(sides) == 6 and sides.min() / sides.max() > 0.9


def test_reading_says_what_is_wrong(tmp_path, small_suite: Path) -> None:
    with pytest.raises(InputError, match="no suite.json"):
        suite.read_suite(tmp_path)
    with pytest.raises(InputError, match="lacks picture.png"):
        suite.read_object(tmp_path)
    with pytest.raises(InputError, match="no pool files"):
        suite.make_suite(tmp_path, tmp_path / "out")
    broken = shutil.copytree(small_suite / "boxes-0001-flat-box", tmp_path / "broken")
    (broken / "views.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        suite.read_object(broken).views  # noqa: B018


def test_make_suite_refuses_an_empty_split(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(suite, "_open_pools", lambda path: [SmallPool()])
    with pytest.raises(InputError, match="no objects in split 'test'"):
        suite.make_suite("unused", tmp_path, split="test")


def ball(size: int = 96) -> np.ndarray:
    y, x = np.mgrid[:size, :size] + 0.5
    alpha = (np.hypot(x - size / 2, y - size / 2) < size * 0.3).astype(float)
    return np.stack([0.2 + 0.6 * x / size, np.full_like(x, 0.5), 0.8 - 0.6 * y / size, alpha], -1)


def test_degraded_is_close_but_not_equal() -> None:
    clean = ball()
    for seed in range(5):
        picture = photo_like.degraded(clean, np.random.default_rng(seed))
        assert picture.min() >= 0 and picture.max() <= 1
        inside = metrics.mask_of(clean) & metrics.mask_of(picture)
        assert 15 < metrics.psnr(picture[..., :3], clean[..., :3], inside) < 35
        assert 0.85 < metrics.mask_iou(metrics.mask_of(picture), metrics.mask_of(clean)) < 1


def test_composited_keeps_the_object_over_the_photo() -> None:
    photo = np.random.default_rng(1).random((80, 120, 3))
    picture = photo_like.composited(ball(), photo, np.random.default_rng(0))
    assert picture.shape == (96, 96, 3)
    inside = ball()[..., 3] > 0.5
    assert metrics.psnr(picture, ball()[..., :3], inside) > 15
    assert metrics.psnr(picture, ball()[..., :3], ~inside) < 15


def test_random_crop_keeps_the_aspect_and_stays_inside() -> None:
    ramp = np.stack(np.meshgrid(np.linspace(0, 1, 60), np.linspace(0, 1, 40)), -1)
    photo = np.concatenate([ramp, np.zeros((40, 60, 1))], -1)
    for seed in range(20):
        crop = photo_like.random_crop(photo, 32, 64, np.random.default_rng(seed))
        assert crop.shape == (32, 64, 3)
        assert crop[:, -1, 0].mean() - crop[:, 0, 0].mean() > 0.4


def test_background_photos_ship_with_scikit_image_or_come_from_files(tmp_path) -> None:
    assert len(photo_like.background_photos()) >= 5
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(InputError, match="cannot be read"):
        photo_like.background_photos([tmp_path / "text.png"])
    with pytest.raises(InputError, match="no photos"):
        photo_like.background_photos([])


def test_suite_json_lists_the_settings(small_suite: Path) -> None:
    content = json.loads((small_suite / "suite.json").read_text())
    assert content["picture_size"] == 64 and content["elevation_deg"] == 15 and len(content["objects"]) == 2
