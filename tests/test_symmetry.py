"""The plane of symmetry of a half-formed shape, and the picture in the mirror as a view of it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from conrad_engine import optimize as loop
from conrad_engine.cameras import orbit_camera
from conrad_engine.config import FieldConfig, OptimizeConfig, PictureConfig, PipelineConfig, RenderConfig
from conrad_engine.constraint import ReferenceView, reference_view
from conrad_engine.fields.radiance_field import make_field
from conrad_engine.guidance.interfaces import GuidanceResult, Priors
from conrad_engine.monitor import Monitor
from conrad_engine.preprocess.framing import frame_object
from conrad_engine.rendering.renderer import render_picture
from conrad_engine.state import make_state
from conrad_engine.step import TrainStep
from conrad_engine.symmetry import Plane, find_plane, mirrored_points, mirrored_view, outer_surface

BOX = torch.tensor([[-0.85, -1.0, -0.85], [0.85, 1.0, 0.85]])


class Balls:
    """A field that is dense inside some balls: rows of x, y, z, radius, in a body that is turned and moved."""

    aabb = BOX

    def __init__(self, rows, azimuth_deg: float = 0.0, shift=(0.0, 0.0, 0.0)) -> None:
        rows = torch.tensor(rows, dtype=torch.float32)
        angle = math.radians(azimuth_deg)
        turn = torch.tensor(
            [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1.0]]
        )
        self.centers, self.radii = rows[:, :3] @ turn.T + torch.tensor(shift, dtype=torch.float32), rows[:, 3]

    def density(self, positions: torch.Tensor) -> torch.Tensor:
        inside = (self.radii - torch.cdist(positions, self.centers)).amax(-1)
        return 60 * torch.sigmoid(inside / 0.01)


# Two arms, a head in front and a tail behind: alike on both sides of x = 0 alone.
CREATURE = [
    (0, 0, 0, 0.25),
    (0.35, 0.05, 0.1, 0.12),
    (-0.35, 0.05, 0.1, 0.12),
    (0, -0.35, 0.25, 0.15),
    (0, 0.5, -0.1, 0.1),
]


@pytest.mark.parametrize("azimuth_deg", [20, 62, 90, 131, 170])
def test_the_plane_of_a_creature_is_found_whichever_way_it_faces(azimuth_deg):
    plane = find_plane(Balls(CREATURE, azimuth_deg), is_centered=True)
    assert plane is not None and plane.offset == 0
    error = (math.degrees(plane.azimuth_rad) - azimuth_deg + 90) % 180 - 90
    assert abs(error) < 1.0
    assert plane.turn_deg == pytest.approx(min(azimuth_deg, 180 - azimuth_deg), abs=1.0)


def test_beside_the_origin_it_is_found_where_nobody_says_that_this_is_the_center():
    normal = Plane(math.radians(40), 0.0).normal
    plane = find_plane(Balls(CREATURE, 40, 0.08 * normal), is_centered=False)
    assert plane is not None
    assert math.degrees(plane.azimuth_rad) == pytest.approx(40, abs=1.5) and plane.offset == pytest.approx(
        0.08, abs=0.01
    )


@pytest.mark.parametrize(
    "rows",
    [
        [(0, 0, 0, 0.3), (0.4, 0.1, 0.1, 0.12), (-0.1, 0.45, 0.3, 0.1), (-0.3, -0.2, -0.3, 0.15)],
        [(0, 0, z, 0.2 + 0.1 * z) for z in (-0.5, -0.3, -0.1, 0.1, 0.3, 0.5)],
        [(0, 0, 0, -1.0)],
    ],
    ids=["alike on no two sides", "round", "empty"],
)
def test_what_has_no_plane_of_its_own_gets_none(rows):
    assert find_plane(Balls(rows), is_centered=True) is None


def test_seen_from_straight_ahead_the_mirror_says_nothing_new():
    assert find_plane(Balls(CREATURE, 3), is_centered=True) is None
    assert find_plane(Balls(CREATURE, 178), is_centered=True) is None


def test_the_surface_is_the_outer_one_and_lies_where_the_density_rises():
    shell = Balls([(0, 0, 0, 0.5)])
    solid = shell.density
    shell.density = lambda p: torch.where(p.norm(dim=-1) < 0.3, 0.0, solid(p))
    distances = np.linalg.norm(outer_surface(shell)[0], axis=1)
    assert len(distances) > 1000 and abs(distances - 0.5).max() < 0.03


def test_the_mirrored_picture_is_what_its_camera_sees_of_the_mirror_image():
    camera = orbit_camera(0.0, 0.3, 2.0, 0.7, 64)
    camera = replace(camera, intrinsics=camera.intrinsics + torch.tensor([0.0, 0.0, 5.0, -3.0]), width=70)
    view = ReferenceView(torch.rand(3, 64, 70), torch.rand(1, 64, 70), camera)
    plane = Plane(math.radians(35), 0.07)
    mirrored = mirrored_view(view, plane)
    assert torch.det(mirrored.camera.c2w[:, :3]) == pytest.approx(1, abs=1e-5)
    points = np.random.default_rng(0).uniform(-0.4, 0.4, (50, 3))
    uv, depths = camera.project(torch.from_numpy(points).float())
    theirs, their_depths = mirrored.camera.project(torch.from_numpy(mirrored_points(points, plane)).float())
    assert torch.allclose(theirs[:, 0], 70 - uv[:, 0], atol=1e-3) and torch.allclose(theirs[:, 1], uv[:, 1], atol=1e-3)
    assert torch.allclose(depths, their_depths, atol=1e-5)
    assert torch.equal(mirrored.rgb[:, :, 3], view.rgb[:, :, 66]) and torch.equal(
        mirrored.mask[:, :, 0], view.mask[:, :, 69]
    )
    # A mirror's mirror image is the thing itself.
    again = mirrored_view(mirrored, plane)
    assert torch.equal(again.rgb, view.rgb) and torch.allclose(again.camera.c2w, camera.c2w, atol=1e-6)
    # From the left of the plane to its right: seen along +y, a plane whose normal points right and away is turned to the left.
    assert mirrored.camera.positions[0] * math.sin(2 * plane.azimuth_rad) > 0


class Silent:
    """A prior that has nothing to say."""

    picture_size = 32

    def gradient(self, rgba, cameras, progress, generator=None) -> GuidanceResult:
        return GuidanceResult(torch.zeros_like(rgba), 0.0)


def board_job(symmetry: bool = True, n_views: int = 1):
    """A bright upright bar left of the middle of a dark disc, seen by nobody but the reference."""
    config = PipelineConfig(
        field_=FieldConfig(resolution=32, blob_radius=0.3),
        render=RenderConfig(size=32, n_samples=32, occupancy_resolution=24),
        optimize=OptimizeConfig(warm_start_views=0, warm_start_steps=0, n_steps=60, n_views=1, symmetry=symmetry),
    )
    v, u = np.mgrid[:64, :64] - 31.5
    mask = ((np.abs(u) < 24) & (np.abs(v) < 10)).astype(np.float32)
    rgb = np.where((np.abs(u + 14) < 5)[..., None], [0.9, 0.9, 0.1], [0.2, 0.1, 0.4]).astype(np.float32)
    frame = frame_object(mask, None, PictureConfig(elevation_deg=0))
    view = reference_view(rgb, mask, frame.camera)
    torch.manual_seed(0)
    return (
        make_state(make_field(config.field_, BOX), [view] * n_views, config, torch.device("cpu")),
        config,
        frame,
        view,
    )


def run(state, config, frame) -> None:
    prior = Silent()
    loop.optimize(state, Priors(prior), frame.condition, config, Monitor(), lambda s: None, lambda s: None)


def test_the_other_side_becomes_what_the_mirror_shows(monkeypatch):
    plane, errors = Plane(math.radians(45), 0.0), {}
    for found in (plane, None):
        monkeypatch.setattr("conrad_engine.step.find_plane", lambda *_, found=found: found)
        state, config, frame, view = board_job()
        run(state, config, frame)
        assert state.plane == found and ("twin" in state.history[-1]) == (found is not None)
        state.field.prepare()
        twin = mirrored_view(view, plane)
        picture = render_picture(state.constrained, twin.camera, 64)
        wanted = torch.cat([twin.rgb * twin.mask, twin.mask])
        shown = torch.cat([picture.rgb.view(*twin.mask.shape[1:], 3).permute(2, 0, 1), picture.opacities[None]])
        errors[found] = float((shown - wanted).abs().mean())
    assert errors[plane] < 0.5 * errors[None]


def test_nobody_looks_for_a_plane_where_it_is_switched_off_or_there_are_several_pictures(monkeypatch):
    def never(*_):
        raise AssertionError("it was looked for")

    monkeypatch.setattr("conrad_engine.step.find_plane", never)
    for job in (board_job(symmetry=False), board_job(n_views=2)):
        state, config, frame, _ = job
        TrainStep(state, Silent(), frame.condition, config)()
        assert state.plane is None


def test_a_checkpoint_keeps_the_plane():
    state, *_ = board_job()
    for plane in (Plane(0.5, 0.1), None):
        state.plane = plane
        other, *_ = board_job()
        other.load(state.to_dict())
        assert other.plane == plane
    data = state.to_dict()
    del data["plane"]  # one from before there were any
    other.load(data)
    assert other.plane is None
