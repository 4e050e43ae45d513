"""Camera conventions, by sign tests on an object with a red left arm and a blue right arm, and by algebra."""

import json
import math

import numpy as np
import pytest
import torch

from conrad_engine.cameras import (
    Camera,
    CameraSetup,
    Similarity,
    centered_camera,
    default_camera,
    look_at,
    orbit_angles,
    orbit_camera,
    orbit_positions,
    pixel_mapping,
    resample,
    stack_cameras,
)
from conrad_engine.errors import InputError

from . import reference

# A person facing the camera at azimuth 0 (on -Y): the arm on the picture's left is at -X.
RED_ARM, BLUE_ARM, HEAD, NOSE = (-0.5, 0.0, 0.0), (0.5, 0.0, 0.0), (0.0, 0.0, 0.6), (0.0, -0.3, 0.3)


def seen(camera: Camera, point) -> tuple[float, float, float]:
    uv, z_depths = camera.project(torch.tensor([list(point)], dtype=camera.c2w.dtype))
    return float(uv[0, 0]), float(uv[0, 1]), float(z_depths[0])


def tilted_camera() -> Camera:
    c2w = look_at(
        torch.tensor([1.0, -2.0, 1.5], dtype=torch.float64), torch.tensor([0.1, 0.2, -0.1], dtype=torch.float64)
    )
    return Camera(c2w, torch.tensor([120.0, 110.0, 37.0, 70.0], dtype=torch.float64), 90, 120)


def test_front_view_shows_red_left_blue_right_head_up():
    camera = orbit_camera(0.0, 0.0, 3.0, math.radians(40), 64)
    assert seen(camera, RED_ARM)[0] < 30 and seen(camera, BLUE_ARM)[0] > 34
    assert seen(camera, HEAD)[1] < 30, "up in the world is up in the picture: a smaller row"
    assert seen(camera, NOSE)[2] < 3.0, "the nose points at the camera on -Y"


def test_azimuth_90_stands_on_plus_x_and_sees_the_blue_arm_first():
    camera = orbit_camera(math.pi / 2, 0.0, 3.0, math.radians(40), 64)
    assert torch.allclose(camera.positions, torch.tensor([3.0, 0.0, 0.0]), atol=1e-5)
    assert seen(camera, BLUE_ARM)[2] < seen(camera, RED_ARM)[2]
    # From +X the person looks to the picture's left.
    assert seen(camera, NOSE)[0] < 31


def test_back_view_mirrors_left_and_right():
    camera = orbit_camera(math.pi, 0.0, 3.0, math.radians(40), 64)
    assert seen(camera, RED_ARM)[0] > 34 and seen(camera, BLUE_ARM)[0] < 30


def test_positive_elevation_looks_down():
    camera = orbit_camera(0.0, math.radians(30), 3.0, math.radians(40), 64)
    assert camera.positions[2] > 0 and camera.forward[2] < 0
    assert seen(camera, (0.0, 0.5, 0.0))[1] < seen(camera, (0.0, -0.5, 0.0))[1], "what lies farther is higher"


def test_projection_equals_the_slow_twin():
    camera = tilted_camera()
    for point in np.random.default_rng(0).uniform(-0.5, 0.5, (20, 3)):
        expected = reference.project(camera.c2w.numpy(), camera.intrinsics.numpy(), point)
        assert seen(camera, point) == pytest.approx(expected, abs=1e-9)


def test_unproject_inverts_project_and_rays_hit_their_pixels(generator):
    camera = tilted_camera()
    points = torch.rand(50, 3, generator=generator, dtype=torch.float64) - 0.5
    uv, z_depths = camera.project(points)
    assert torch.allclose(camera.unproject(uv, z_depths), points, atol=1e-9)
    origins, directions = camera.rays(uv)
    assert torch.allclose(origins + directions * camera.distances(points)[:, None], points, atol=1e-9)
    assert torch.allclose(directions.norm(dim=-1), torch.ones(50, dtype=torch.float64))


def test_first_ray_goes_through_the_center_of_the_top_left_pixel():
    camera = tilted_camera()
    origins, directions = camera.rays()
    assert len(origins) == 90 * 120
    assert torch.allclose(camera.project(origins + directions)[0][0], torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert torch.allclose(camera.project(origins + directions)[0][90], torch.tensor([0.5, 1.5], dtype=torch.float64))


@pytest.mark.parametrize("change", [lambda c: c.resized(45, 60), lambda c: c.cropped(12.5, -4, 50, 70)])
def test_resizing_and_cropping_move_pixels_not_directions(change):
    camera = tilted_camera()
    point = (0.2, 0.1, 0.0)
    u, v, z = seen(camera, point)
    new = change(camera)
    expected = (u / 2, v / 2, z) if new.width == 45 else (u - 12.5, v + 4, z)
    assert seen(new, point) == pytest.approx(expected, abs=1e-9)


def test_rotations_are_proper(generator):
    angles = torch.rand(2, 30, generator=generator)
    cameras = orbit_camera(angles[0] * 6 - 3, angles[1] * 3 - 1.5, 2.0, 0.7, 32)
    rotations = cameras.c2w[:, :, :3]
    assert torch.allclose(torch.linalg.det(rotations), torch.ones(30), atol=1e-5)
    assert torch.allclose(rotations.mT @ rotations, torch.eye(3).expand(30, 3, 3), atol=1e-5)
    azimuth, elevation, distance = orbit_angles(cameras.positions)
    assert torch.allclose(orbit_positions(azimuth, elevation, distance), cameras.positions, atol=1e-5)


def test_look_at_straight_down_is_defined():
    c2w = look_at(torch.tensor([0.0, 0.0, 2.0]), torch.zeros(3))
    assert torch.allclose(c2w[:, 1], torch.tensor([0.0, 1.0, 0.0]), atol=1e-6)
    assert torch.linalg.det(c2w[:, :3]) == pytest.approx(1)


def test_homography_keeps_what_is_seen():
    """A camera turned on the spot sees the same picture through `pixel_mapping`."""
    source = default_camera(160, 120, 10.0, 60.0)
    target = centered_camera(source, torch.tensor([0.2, 0.0, 0.1], dtype=torch.float64), math.radians(30), 32)
    point = torch.tensor([[0.18, 0.02, 0.12]], dtype=torch.float64)
    in_target = target.project(point)[0][0]
    row, column = int(in_target[1]), int(in_target[0])
    uv = pixel_mapping(target, source)[row, column]
    assert (uv - source.project(point)[0][0]).norm() < 3


def test_resample_reads_pixel_centers():
    picture = torch.arange(12.0).view(1, 3, 4)
    uv = torch.tensor([[[0.5, 0.5], [3.5, 2.5], [2.0, 0.5], [-5.0, 0.5]]])
    assert resample(picture, uv)[0, 0].tolist() == pytest.approx([0.0, 11.0, 1.5, 0.0], abs=1e-5)


def test_similarity_carries_points_and_cameras_together(generator):
    turn = orbit_camera(0.4, 0.3, 1.0, 1.0, 8).c2w[:, :3].double()
    change = Similarity(2.5, turn, torch.tensor([0.3, -1.0, 0.2], dtype=torch.float64))
    camera = tilted_camera()
    points = torch.rand(9, 3, generator=generator, dtype=torch.float64)
    before, after = camera.project(points), change.camera(camera).project(change.points(points))
    assert torch.allclose(before[0], after[0], atol=1e-7) and torch.allclose(2.5 * before[1], after[1], atol=1e-7)
    assert torch.allclose(change.inverse().points(change.points(points)), points, atol=1e-9)
    assert torch.allclose(change.then(change.inverse()).points(points), points, atol=1e-9)


def test_stacked_cameras_must_agree_in_size():
    a = tilted_camera()
    assert len(stack_cameras([a, a])) == 2
    with pytest.raises(ValueError, match="same picture size"):
        stack_cameras([a, a.resized(10, 10)])


def setup_json() -> dict:
    return CameraSetup(tilted_camera(), torch.zeros(3, dtype=torch.float64), 1.5).to_json()


def test_camera_file_round_trip(tmp_path):
    path = tmp_path / "camera.json"
    path.write_text(json.dumps(setup_json()))
    setup = CameraSetup.from_json(path)
    assert torch.allclose(setup.camera.c2w, tilted_camera().c2w) and setup.object_size == 1.5


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("c2w", [[1, 0], [0, 1]], "c2w"),
        ("c2w", (2 * np.eye(4)).tolist(), "rotation"),
        ("c2w", np.diag([-1.0, 1, 1, 1]).tolist(), "mirroring"),
        ("intrinsics", [1, 2, 3], "intrinsics"),
        ("intrinsics", [float("nan"), 1, 1, 1], "not finite"),
        ("width", 0, "positive"),
        ("object_size", -1, "positive"),
        ("object_center", [5, -10, 8], "behind the camera"),
        ("width", None, "needs c2w"),
    ],
)
def test_bad_camera_files_are_named(field, value, message):
    data = setup_json() | {field: value}
    with pytest.raises(InputError, match=message):
        CameraSetup.from_json(data)


def test_unreadable_camera_file(tmp_path):
    (tmp_path / "x.json").write_text("{")
    for name in ("x.json", "missing.json"):
        with pytest.raises(InputError, match="cannot be read"):
            CameraSetup.from_json(tmp_path / name)
