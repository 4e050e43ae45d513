"""The object frame: made from a silhouette, it must keep every ray where it was."""

import math

import numpy as np
import pytest
import torch

from conrad_engine.cameras import CameraSetup, default_camera, look_at, orbit_angles
from conrad_engine.config import HALF_FRAME, REFERENCE_EXTENT, PictureConfig
from conrad_engine.errors import InputError
from conrad_engine.preprocess.framing import (
    MOST_BESIDE,
    MOST_REACH,
    condition_picture,
    final_similarity,
    frame_object,
    silhouette_bounds,
)

from .conftest import figure_rgba


def off_center_setup(width=160, height=120, right=0.0) -> tuple[CameraSetup, np.ndarray]:
    """A rolled camera with an off-center principal point, and the mask of a box seen through it, whose middle is 2 pixels below
    the object's center and `right` of the box's longest side beside it."""
    position = torch.tensor([3.0, -4.0, 3.0], dtype=torch.float64)
    c2w = look_at(position, torch.tensor([0.3, 0.2, 1.0], dtype=torch.float64))
    roll = math.radians(12)
    turn = torch.tensor([[math.cos(roll), -math.sin(roll), 0], [math.sin(roll), math.cos(roll), 0], [0, 0, 1]]).double()
    c2w = torch.cat([c2w[:, :3] @ turn, c2w[:, 3:]], 1)
    data = {
        "c2w": [*c2w.tolist(), [0, 0, 0, 1]],
        "intrinsics": [190.0, 190.0, 70.0, 66.0],
        "width": width,
        "height": height,
        "object_center": [0.2, 0.1, 0.9],
        "object_size": 1.0,
    }
    setup = CameraSetup.from_json(data)
    mask = np.zeros((height, width), np.float32)
    u, v = setup.camera.project(setup.object_center[None])[0][0].round().int().tolist()
    u += round(44 * right)
    mask[v - 20 : v + 24, u - 14 : u + 15] = 1
    return setup, mask


def test_frame_with_a_camera_puts_the_object_where_it_says():
    setup, mask = off_center_setup()
    frame = frame_object(mask, setup, PictureConfig())
    azimuth, elevation, distance = orbit_angles(frame.camera.positions)
    assert float(azimuth) == pytest.approx(0, abs=1e-9), "the reference camera stands on -Y"
    assert float(elevation) > 0.2 and frame.elevation_rad == float(elevation)
    world_origin = frame.to_world.points(torch.zeros(3, dtype=torch.float64))
    assert world_origin.tolist() == pytest.approx(setup.object_center.tolist()), "its origin is the object's center"
    assert float(frame.to_world.points(torch.tensor([0.0, 0, 1]).double())[2] - world_origin[2]) > 0, "+Z stays up"


def test_the_worlds_x_axis_is_known_where_the_world_is_the_users():
    setup, mask = off_center_setup()
    frame = frame_object(mask, setup, PictureConfig())
    azimuth = frame.world_azimuth_rad
    along = frame.to_world.points(torch.tensor([[0, 0, 0], [math.cos(azimuth), math.sin(azimuth), 0]]).double())
    step = along[1] - along[0]
    assert step[0] > 0 and step[1:].abs().max() < 1e-7 * step[0]
    assert frame_object(mask, None, PictureConfig()).world_azimuth_rad is None


def test_a_center_far_beside_the_silhouette_gives_its_depth_alone():
    setup, mask = off_center_setup(right=MOST_BESIDE + 0.05)
    frame = frame_object(mask, setup, PictureConfig())
    origin = frame.to_world.points(torch.zeros(1, 3, dtype=torch.float64))
    (uv,), (z_depth,) = setup.camera.project(origin)
    _, center_depth = setup.camera.project(setup.object_center[None])
    rows, columns = np.nonzero(mask)
    middle = (columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2
    assert uv.tolist() == pytest.approx(middle, abs=1.0) and float(z_depth) == pytest.approx(float(center_depth))


@pytest.mark.parametrize("right", [-0.1, 0.1])
def test_a_center_beside_the_silhouettes_middle_stays_the_origin_and_the_picture_shows_all(right):
    setup, mask = off_center_setup(right=right)
    frame = frame_object(mask, setup, PictureConfig())
    picture = condition_picture(np.ones((*mask.shape, 3), np.float32), mask, frame)
    columns = (picture[3] > 0.5).any(0).nonzero().flatten()
    beside = (float(columns[0] + columns[-1] + 1) / 2 - 128) / (0.8 * 256)
    assert beside == pytest.approx(right, abs=0.04), "right in the user's picture is right in the prior's"
    edge = torch.cat([picture[3, 0], picture[3, -1], picture[3, :, 0], picture[3, :, -1]])
    assert float(edge.max()) == 0


def test_frame_and_world_project_to_the_same_pixels(generator):
    setup, mask = off_center_setup()
    frame = frame_object(mask, setup, PictureConfig())
    points = torch.rand(20, 3, generator=generator, dtype=torch.float64) - 0.5
    inside = frame.camera.project(points)[0]
    outside = setup.camera.project(frame.to_world.points(points))[0]
    assert torch.allclose(inside, outside, atol=1e-6)


def test_silhouette_has_its_extent_on_the_plane_through_the_origin():
    setup, mask = off_center_setup()
    frame = frame_object(mask, setup, PictureConfig())
    _, low, high = silhouette_bounds(frame.camera, mask, torch.zeros(3, dtype=torch.float64))
    assert float((high - low).max()) * frame.distance == pytest.approx(REFERENCE_EXTENT, rel=1e-6)
    half = math.tan(2 * math.atan(HALF_FRAME / frame.distance) / 2) * frame.distance
    assert half == pytest.approx(HALF_FRAME)


def test_a_silhouette_beside_the_origin_is_smaller_so_that_the_conditioning_view_holds_it():
    setup, mask = off_center_setup()
    mask = np.roll(mask, 5, axis=0)
    frame = frame_object(mask, setup, PictureConfig())
    _, low, high = silhouette_bounds(frame.camera, mask, torch.zeros(3, dtype=torch.float64))
    assert float(torch.maximum(-low, high).max()) * frame.distance == pytest.approx(MOST_REACH, rel=1e-6)
    assert 0.9 * REFERENCE_EXTENT < float((high - low).max()) * frame.distance < REFERENCE_EXTENT


def test_condition_picture_shows_the_object_centered_at_80_percent_and_upright():
    setup, mask = off_center_setup(right=MOST_BESIDE + 0.05)
    frame = frame_object(mask, setup, PictureConfig())
    picture = condition_picture(np.ones((*mask.shape, 3), np.float32) * 0.5, mask, frame)
    rows, columns = (picture[3] > 0.5).any(1).nonzero().flatten(), (picture[3] > 0.5).any(0).nonzero().flatten()
    assert float(rows[0] + rows[-1] + 1) / 2 == pytest.approx(128, abs=4)
    assert float(columns[0] + columns[-1] + 1) / 2 == pytest.approx(128, abs=4)
    longest = max(rows[-1] - rows[0], columns[-1] - columns[0])
    assert float(longest) == pytest.approx(0.8 * 256, abs=6)


def test_without_a_camera_left_stays_left():
    rgba = figure_rgba().astype(np.float32) / 255
    frame = frame_object(rgba[..., 3], None, PictureConfig(elevation_deg=15))
    picture = condition_picture(rgba[..., :3], rgba[..., 3], frame)
    left, right = picture[:, :, :70].sum((1, 2)), picture[:, :, 186:].sum((1, 2))
    assert left[0] > 3 * left[2] and right[2] > 3 * right[0], "red arm left, blue arm right"
    assert math.degrees(frame.elevation_rad) == pytest.approx(15, abs=1.5)


def test_a_large_picture_is_averaged_not_skipped():
    rgba = np.zeros((1024, 1024, 4), np.float32)
    rgba[128:896, 128:896, 3] = 1
    rgba[::2, :, :3] = 1  # one-pixel stripes must come out gray
    frame = frame_object(rgba[..., 3], None, PictureConfig())
    picture = condition_picture(rgba[..., :3], rgba[..., 3], frame)
    inner = picture[0, 80:170, 80:170]
    assert inner.mean() == pytest.approx(0.5, abs=0.02) and inner.std() < 0.05


def test_mesh_without_a_camera_is_centered_with_largest_side_1():
    rgba = figure_rgba().astype(np.float32) / 255
    frame = frame_object(rgba[..., 3], None, PictureConfig())
    vertices = np.array([[-0.3, -0.2, -0.6], [0.5, 0.4, 0.6]], np.float32)
    moved = final_similarity(frame, vertices).points(torch.from_numpy(vertices).double())
    assert torch.allclose(moved.sum(0), torch.zeros(3).double(), atol=1e-6)
    assert float((moved[1] - moved[0]).max()) == pytest.approx(1)


def test_shapes_must_match():
    setup, mask = off_center_setup()
    with pytest.raises(InputError, match="shapes must match"):
        frame_object(mask.T, setup, PictureConfig())


def test_an_object_all_around_the_camera_is_refused():
    camera = default_camera(64, 64, 0, 118.0)
    mask = np.ones((64, 64), np.float32)
    setup = CameraSetup(camera, torch.zeros(3, dtype=torch.float64))
    with pytest.raises(InputError, match="longer focal length"):
        frame_object(mask, setup, PictureConfig())
