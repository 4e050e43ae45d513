"""The plane of symmetry of a half-formed shape, and the picture in the mirror as a view of it."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from conrad_engine import optimize as loop
from conrad_engine.cameras import orbit_angles, orbit_camera
from conrad_engine.checkpoint import load_checkpoint, save_checkpoint
from conrad_engine.config import (
    EmbeddedPriorConfig,
    FieldConfig,
    OptimizeConfig,
    PictureConfig,
    PipelineConfig,
    RenderConfig,
)
from conrad_engine.constraint import ReferenceView, reference_view
from conrad_engine.fields.radiance_field import make_field
from conrad_engine.files import BackgroundWriter
from conrad_engine.guidance.embedded.prior import EmbeddedPrior
from conrad_engine.guidance.interfaces import GuidanceResult, Priors, ReferencePicture
from conrad_engine.monitor import Monitor
from conrad_engine.preprocess.framing import frame_object
from conrad_engine.rendering.renderer import render_picture
from conrad_engine.state import make_state
from conrad_engine.symmetry import (
    find_plane,
    likely_planes,
    mirror_errors,
    mirrored_points,
    mirrored_view,
    outer_surface,
)
from conrad_engine.training import raster
from conrad_engine.warm_start import sample_warm_start

from .training_meshes import UNLIT, boxes

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


class Judge:
    """A prior that likes the plane at an angle best; `depth` is how much better than others."""

    def __init__(self, azimuth_deg: float, depth: float = 1.0) -> None:
        self.azimuth_deg, self.depth, self.n_asked = azimuth_deg, depth, 0

    def sample_views(self, *_, **__): ...

    def mirror_errors(self, azimuths_rad: torch.Tensor) -> torch.Tensor:
        self.n_asked += len(azimuths_rad)
        off = azimuths_rad / 2 - math.radians(
            self.azimuth_deg
        )  # in a plane's mirror the reference moves by twice its angle
        return self.depth * (
            1 - torch.exp(-(((torch.remainder(off + math.pi / 2, math.pi) - math.pi / 2) / 0.1) ** 2) / 2)
        )


def off_deg(azimuth_rad: float, azimuth_deg: float) -> float:
    return (math.degrees(azimuth_rad) - azimuth_deg + 90) % 180 - 90


@pytest.mark.parametrize("azimuth_deg", [20, 62, 131, 170])
def test_the_shape_says_about_where_a_plane_is_and_the_prior_says_where(azimuth_deg):
    field = Balls(CREATURE, azimuth_deg)
    assert abs(off_deg(math.radians(likely_planes(field)[0]), azimuth_deg)) <= 2
    for wanted in (azimuth_deg, azimuth_deg + 3.7):
        found = find_plane(field, Judge(wanted))
        assert found is not None and abs(off_deg(found, wanted)) < 0.5


def test_a_plane_that_the_prior_does_not_see_is_none():
    assert find_plane(Balls(CREATURE, 62), Judge(62, depth=0.02)) is None
    assert find_plane(Balls(CREATURE, 62), Judge(62 + 25)) is None  # better still beyond the window


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
    judge = Judge(90)
    assert find_plane(Balls(rows), judge) is None and judge.n_asked == 0


@pytest.mark.parametrize("azimuth_deg", [3, 178, 76, 90, 105])
def test_along_and_nearly_across_the_line_of_sight_the_mirror_is_not_used(azimuth_deg):
    assert likely_planes(Balls(CREATURE, azimuth_deg))
    assert find_plane(Balls(CREATURE, azimuth_deg), Judge(azimuth_deg)) is None


def test_the_surface_is_the_outer_one_and_lies_where_the_density_rises():
    shell = Balls([(0, 0, 0, 0.5)])
    solid = shell.density
    shell.density = lambda p: torch.where(p.norm(dim=-1) < 0.3, 0.0, solid(p))
    distances = np.linalg.norm(outer_surface(shell).vertices, axis=1)
    assert len(distances) > 1000 and abs(distances - 0.5).max() < 0.03


def test_the_mirrored_picture_is_what_its_camera_sees_of_the_mirror_image():
    camera = orbit_camera(0.0, 0.3, 2.0, 0.7, 64)
    camera = replace(camera, intrinsics=camera.intrinsics + torch.tensor([0.0, 0.0, 5.0, -3.0]), width=70)
    view = ReferenceView(torch.rand(3, 64, 70), torch.rand(1, 64, 70), camera)
    plane = math.radians(35)
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
    # The reference stands at azimuth 0, on the -y side; in the mirror it moves by twice the angle.
    azimuth, elevation, distance = orbit_angles(mirrored.camera.positions)
    assert float(azimuth) == pytest.approx(2 * plane, abs=1e-5)
    assert float(elevation) == pytest.approx(0.3, abs=1e-5) and float(distance) == pytest.approx(2.0, abs=1e-5)


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


def test_the_other_side_becomes_what_the_mirror_shows():
    plane, errors = math.radians(45), {}
    for found in (plane, None):
        state, config, frame, view = board_job()
        state.plane = found
        run(state, config, frame)
        assert ("twin" in state.history[-1]) == (found is not None)
        state.field.prepare()
        twin = mirrored_view(view, plane)
        picture = render_picture(state.constrained, twin.camera, 64)
        wanted = torch.cat([twin.rgb * twin.mask, twin.mask])
        shown = torch.cat([picture.rgb.view(*twin.mask.shape[1:], 3).permute(2, 0, 1), picture.opacities[None]])
        errors[found] = float((shown - wanted).abs().mean())
    assert errors[plane] < 0.5 * errors[None]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="the rasterizer needs a C compiler")
@pytest.mark.parametrize("azimuth_deg", [-50, -25, 35, 60])
def test_the_shipped_prior_sees_the_plane_of_a_chair(azimuth_deg):
    """The sign of every angle: the chair is turned by hand, its picture taken by the trainers' rasterizer."""
    legs = [((x, y, -0.5), (x + 0.08, y + 0.08, 0), (0.5, 0.3, 0.15)) for x in (-0.3, 0.22) for y in (-0.3, 0.22)]
    seat, back = (
        ((-0.3, -0.3, 0), (0.3, 0.3, 0.08), (0.7, 0.2, 0.2)),
        ((-0.3, 0.22, 0.08), (0.3, 0.3, 0.6), (0.7, 0.2, 0.2)),
    )
    mesh, angle = boxes((*legs, seat, back)), math.radians(azimuth_deg)
    turn = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    mesh = replace(mesh, vertices=((mesh.vertices - [0, 0, 0.05]) @ turn.T).astype(np.float32))
    camera = orbit_camera(0.0, math.radians(15), 2.2, 0.66, 256)
    rgba = raster.Rasterizer(mesh).render(camera.c2w.double().numpy(), 0.66, 256, UNLIT).astype(np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    prior = EmbeddedPrior(EmbeddedPriorConfig(), "cpu")
    prior.set_reference(ReferencePicture(torch.from_numpy(rgba).permute(2, 0, 1), camera, object_size=1.1))
    angles = np.arange(azimuth_deg - 24, azimuth_deg + 25, 6)
    errors = mirror_errors(prior, angles)
    assert abs(angles[errors.argmin()] - azimuth_deg) <= 6
    assert min(errors[0], errors[-1]) > errors.min() + 0.05


class Painter(Judge):
    """Draws white balls, and likes the plane at 62 degrees."""

    def __init__(self) -> None:
        super().__init__(62.0)

    def sample_views(self, cameras, **_) -> torch.Tensor:
        return torch.ones(len(cameras), 4, cameras.height, cameras.width)


@pytest.mark.parametrize(
    ("symmetry", "is_centered", "n_views", "is_asked"),
    [(True, True, 1, True), (False, True, 1, False), (True, False, 1, False), (True, True, 2, False)],
    ids=["symmetric", "switched off", "center unknown", "several pictures"],
)
def test_a_plane_is_looked_for_once_the_first_views_are_drawn(monkeypatch, symmetry, is_centered, n_views, is_asked):
    asked = []
    monkeypatch.setattr("conrad_engine.warm_start.find_plane", lambda field, sampler: asked.append(1) or 0.5)
    state, config, frame, _ = board_job(symmetry, n_views)
    config = replace(config, optimize=replace(config.optimize, warm_start_views=3, warm_start_steps=4))
    state.is_centered = is_centered
    sample_warm_start(state, Painter(), frame.condition, config, Monitor())
    assert (len(asked), state.plane) == ((1, 0.5) if is_asked else (0, None))


def test_symmetry_switched_off_later_leaves_no_plane(tmp_path):
    state, config, *_ = board_job()
    state.plane = 0.5
    with BackgroundWriter() as writer:
        save_checkpoint(tmp_path, state, config, "job", writer)
    for symmetry in (True, False):
        other, settings, *_ = board_job(symmetry)
        assert load_checkpoint(tmp_path, other, settings, "job")
        assert other.plane == (0.5 if symmetry else None)


def test_a_checkpoint_keeps_the_plane():
    state, *_ = board_job()
    for plane in (0.5, None):
        state.plane = plane
        other, *_ = board_job()
        other.load(state.to_dict())
        assert other.plane == plane
    data = state.to_dict()
    del data["plane"]  # one from before there were any
    other.load(data)
    assert other.plane is None
