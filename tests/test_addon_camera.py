"""The add-on's camera mathematics, without Blender."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blender_addon import camera_math as cm
from conrad_engine import cameras

angles = st.floats(-179, 179)
elevations = st.floats(-80, 80)


@given(angles, elevations, st.floats(0.1, 50), st.floats(-170, 170))
def test_orbit_round_trip(azimuth, elevation, distance, roll):
    target = np.array([0.3, -2.0, 1.5])
    orbit = cm.orbit_of(cm.orbit_pose(target, cm.Orbit(azimuth, elevation, distance, roll)), target)
    assert orbit.azimuth_deg == pytest.approx(azimuth, abs=1e-6)
    assert orbit.elevation_deg == pytest.approx(elevation, abs=1e-6)
    assert orbit.distance == pytest.approx(distance)
    assert orbit.roll_deg == pytest.approx(roll, abs=1e-6)


def test_orbit_agrees_with_the_engine():
    pose = cm.orbit_pose(np.zeros(3), cm.Orbit(30.0, 20.0, 2.5))
    camera = cameras.orbit_camera(math.radians(30), math.radians(20), 2.5, 0.7, 64)
    assert np.allclose(pose[:3], camera.c2w.numpy(), atol=1e-6)


@given(angles, elevations, angles, elevations, st.floats(-60, 60))
def test_moving_on_the_orbit_keeps_the_target_in_its_place(azimuth, elevation, new_azimuth, new_elevation, roll):
    target = np.array([1.0, 2.0, 3.0])
    lens, box = (500, 500, 256, 256), (200, 260, 340, 330)
    pose = cm.fitted_pose(cm.Orbit(azimuth, elevation, 1.0, roll), lens, target, 1.0, box)
    before = cm.project(target[None], pose, lens)[0]
    moved = cm.moved_on_orbit(pose, target, cm.Orbit(new_azimuth, new_elevation, 4.0, roll))
    after, depth = cm.project(target[None], moved, lens)
    assert np.allclose(before, after, atol=1e-4) and depth > 0
    back = cm.orbit_of(moved, target)
    assert (back.azimuth_deg, back.elevation_deg, back.roll_deg, back.distance) == (
        pytest.approx(new_azimuth, abs=1e-6),
        pytest.approx(new_elevation, abs=1e-6),
        pytest.approx(roll, abs=1e-6),
        pytest.approx(4.0),
    )
    assert np.linalg.det(moved[:3, :3]) == pytest.approx(1)


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (512, 512)])
@pytest.mark.parametrize("fit", ["AUTO", "HORIZONTAL", "VERTICAL"])
def test_shift_is_the_inverse_of_the_principal_point(size, fit):
    lens = cm.Lens(35.0, 32.0, 18.0, fit, 0.13, -0.21)
    fx, fy, cx, cy = cm.intrinsics(lens, *size)
    assert fx == fy
    assert cm.shift_of((cx, cy), fit, *size) == (pytest.approx(0.13), pytest.approx(-0.21))


def test_focal_length_of_an_angle():
    fx = cm.intrinsics(cm.Lens(cm.focal_mm(40.0)), 800, 600)[0]
    assert math.degrees(2 * math.atan(400 / fx)) == pytest.approx(40)


@given(st.floats(50, 300), st.floats(20, 200), st.floats(310, 500), st.floats(210, 460))
def test_fitted_object_covers_the_box(left, top, right, bottom):
    target, size = np.array([0.0, 1.0, 0.5]), 0.8
    camera = (700.0, 700.0, 250.0, 300.0)
    pose = cm.fitted_pose(cm.Orbit(25.0, 15.0, 3.0, 5.0), camera, target, size, (left, top, right, bottom))
    uv, depth = cm.project(target[None], pose, camera)
    assert np.allclose(uv[0], [(left + right) / 2, (top + bottom) / 2], atol=1e-6)
    assert camera[0] * size / depth[0] == pytest.approx(max(right - left, bottom - top))
    orbit = cm.orbit_of(pose, target)
    assert (orbit.azimuth_deg, orbit.elevation_deg, orbit.roll_deg) == (
        pytest.approx(25),
        pytest.approx(15),
        pytest.approx(5),
    )


def test_box_of_a_mask():
    mask = np.zeros((20, 30), bool)
    assert cm.box_of_mask(mask) is None
    mask[4:9, 10:25] = True
    assert cm.box_of_mask(mask) == (10, 4, 25, 9)
    assert cm.box_of_mask(np.ones((3, 3), bool)) is None


def test_the_engine_reads_what_is_sent():
    pose = cm.orbit_pose(np.array([1.0, 0.0, 0.5]), cm.Orbit(40.0, 25.0, 3.0, 10.0))
    scaled = pose.copy()
    scaled[:3, :3] *= 2.5
    lens = cm.intrinsics(cm.Lens(50.0, shift_x=0.1), 300, 400)
    setup = cameras.CameraSetup.from_json(cm.setup_json(scaled, lens, 300, 400, [1.0, 0.0, 0.5], 1.2))
    points = np.random.default_rng(0).uniform(-0.5, 0.5, (20, 3)) + [1, 0, 0.5]
    ours, _ = cm.project(points, pose, lens)
    theirs, _ = setup.camera.project(torch.from_numpy(points))
    assert np.abs(ours - theirs.numpy()).max() < 1e-6


def _window_matrix(fx, fy, cx, cy, width, height, near=0.1, far=100.0):
    """A perspective projection written from its definition: clip = P @ view point."""
    return np.array(
        [
            [2 * fx / width, 0, 1 - 2 * cx / width, 0],
            [0, 2 * fy / height, 2 * cy / height - 1, 0],
            [0, 0, -(far + near) / (far - near), -2 * far * near / (far - near)],
            [0, 0, -1, 0],
        ]
    )


def test_viewport_camera_perspective():
    pose = cm.orbit_pose(np.zeros(3), cm.Orbit(60.0, 30.0, 4.0))
    window = _window_matrix(400, 420, 210, 140, 400, 300)
    found, lens = cm.view_camera(np.linalg.inv(pose), window, 400, 300, np.zeros(3), 1.0)
    assert np.allclose(found, pose) and np.allclose(lens, (400, 420, 210, 140))


def test_viewport_camera_orthographic_matches_at_the_center():
    pose = cm.orbit_pose(np.zeros(3), cm.Orbit(10.0, 20.0, 4.0))
    window = np.diag([0.5, 0.7, -0.01, 1.0])
    center = np.array([0.2, 0.1, 0.3])
    found, lens = cm.view_camera(np.linalg.inv(pose), window, 400, 300, center, 1.0)
    for offset in (0.0, 0.3):
        point = center + offset * pose[:3, 0]
        view = np.linalg.inv(pose) @ [*point, 1]
        expected = [200 * (1 + 0.5 * view[0]), 150 * (1 - 0.7 * view[1])]
        assert np.allclose(cm.project(point[None], found, lens)[0][0], expected, atol=1e-6)


@pytest.mark.parametrize("origin", ["BOTTOM", "CENTER"])
def test_placement_puts_the_origin_and_the_size(origin):
    vertices = np.random.default_rng(1).uniform(-1, 2, (50, 3))
    place = np.array([5.0, 6.0, 7.0])
    mapping, goal = cm.placement(vertices, place, 0.5, origin)
    moved = mapping.points(vertices)
    low, high = moved.min(0), moved.max(0)
    assert (high - low).max() == pytest.approx(0.5)
    assert np.allclose(goal, place)
    anchor = (low + high) / 2
    if origin == "BOTTOM":
        anchor[2] = low[2]
    assert np.allclose(anchor, place)


def test_placed_object_still_covers_the_picture_from_the_placed_camera():
    vertices = np.random.default_rng(2).uniform(-0.4, 0.4, (30, 3))
    pose, lens = cm.orbit_pose(np.zeros(3), cm.Orbit(20.0, 10.0, 3.0)), (600, 600, 320, 240)
    mapping, _ = cm.placement(vertices, np.array([1.0, 2.0, 0.0]), 2.0, "BOTTOM")
    before, after = (
        cm.project(vertices, pose, lens)[0],
        cm.project(mapping.points(vertices), mapping.pose(pose), lens)[0],
    )
    assert np.allclose(before, after, atol=1e-6)


def test_left_alone_nothing_moves():
    mapping, goal = cm.placement(np.array([[0.0, 0, 0], [1, 1, 2]]), None, None, "BOTTOM")
    assert mapping.scale == 1 and np.allclose(mapping.offset, 0) and np.allclose(goal, [0.5, 0.5, 0])
