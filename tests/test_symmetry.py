"""The plane of symmetry that a prior sees, and the picture in the mirror as a view of the object."""

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
from conrad_engine.state import make_state
from conrad_engine.symmetry import COARSE_TIMES, FINE_TIMES, dip_near, find_plane, mirrored_view, off_deg, usual_errors
from conrad_engine.training import raster
from conrad_engine.warm_start import sample_warm_start

from .training_meshes import UNLIT, boxes

BOX = torch.tensor([[-0.85, -1.0, -0.85], [0.85, 1.0, 0.85]])


class Judge:
    """A prior that likes the planes at some angles best; `depth` is how much better than others. With much noise it sees them
    from farther away."""

    def __init__(self, *azimuths_deg: float, depth: float = 1.0) -> None:
        self.azimuths_deg, self.depth = azimuths_deg, depth

    def sample_views(self, *_, **__): ...

    def know_mirrored(self, azimuth_rad: float) -> None: ...

    def mirror_errors(self, azimuths_rad: torch.Tensor, times) -> torch.Tensor:
        # In a plane's mirror the reference moves by twice its angle.
        off = azimuths_rad[:, None] / 2 - torch.deg2rad(torch.tensor(self.azimuths_deg))
        off = torch.remainder(off + math.pi / 2, math.pi) - math.pi / 2
        width = 0.3 if min(times) > 0.5 else 0.08
        liked = self.depth * torch.exp(-((off / width) ** 2) / 2).amax(1)
        return torch.from_numpy(usual_errors(np.degrees(azimuths_rad.numpy() / 2))) - liked


def found_deg(judge: Judge, axis_deg: float | None = None) -> float | None:
    """Angle of the plane that is found, 0 to 180."""
    found = find_plane(judge, None if axis_deg is None else math.radians(axis_deg))
    return None if found is None else math.degrees(found) % 180


@pytest.mark.parametrize("azimuth_deg", [20, 62, 131, 160])
def test_the_prior_says_where_a_plane_is(azimuth_deg):
    for wanted in (azimuth_deg, azimuth_deg + 3.7):
        assert off_deg(found_deg(Judge(wanted)), wanted) < 0.8


def test_a_plane_that_the_prior_hardly_sees_is_none():
    assert found_deg(Judge(62, depth=0.1)) is None
    assert found_deg(Judge(62, depth=0.2)) is not None


@pytest.mark.parametrize("axis_deg", [62, 62 - 90, 62 + 180])
def test_of_the_worlds_axes_the_likelier_one_is_taken_at_a_hint(axis_deg):
    for wanted in (62, 152):
        assert found_deg(Judge(wanted, depth=0.1)) is None
        assert found_deg(Judge(wanted, depth=0.1), axis_deg) == pytest.approx(wanted)


def test_a_plane_beside_an_axis_is_on_it_or_askew():
    for off, found in ((1.5, 62), (-3.5, 62), (5.5, 62 + 5.5), (-12, 62 - 12)):
        assert off_deg(found_deg(Judge(62 + off), 62), found) < (1e-6 if found == 62 else 0.8)


def test_a_thing_that_does_not_stand_square_has_the_plane_of_a_dip_or_none():
    for axis, wanted in ((62, 107), (90, 130)):  # no use would be made of either axis of the second world
        assert off_deg(found_deg(Judge(wanted, depth=0.8), axis), wanted) < 0.8
    # What is not liked much better says nothing against an axis nearby.
    assert found_deg(Judge(36, depth=0.3), 62) == pytest.approx(62)
    assert off_deg(found_deg(Judge(36), 62), 36) < 0.8


def test_where_no_axis_is_to_go_by_the_prior_is_asked_twice_as_often():
    asked = []

    class Asked(Judge):
        def mirror_errors(self, azimuths_rad, times):
            asked.append(list(times))
            return super().mirror_errors(azimuths_rad, times)

    find_plane(Asked(62), None)
    assert asked == [[*COARSE_TIMES] * 2, [*FINE_TIMES] * 2, [*FINE_TIMES] * 2]
    asked.clear()
    find_plane(Asked(107), math.radians(62))  # stands askew
    assert asked[0] == [*COARSE_TIMES] and asked[-1] == [*FINE_TIMES] * 2
    asked.clear()
    find_plane(Asked(62), math.radians(62))
    assert asked[0] == [*COARSE_TIMES] and asked[-1] == [*FINE_TIMES]


@pytest.mark.parametrize("azimuth_deg", [3, 178, 84, 90, 96])
def test_along_and_nearly_across_the_line_of_sight_the_mirror_is_not_used(azimuth_deg):
    assert found_deg(Judge(azimuth_deg)) is None
    assert off_deg(found_deg(Judge(azimuth_deg, 45)), 45) < 0.8
    # An axis that the prior likes is believed, though it be of no use.
    assert found_deg(Judge(azimuth_deg, 45), azimuth_deg) is None


def test_the_mirrored_picture_is_what_its_camera_sees_of_the_mirror_image():
    camera = orbit_camera(0.0, 0.3, 2.0, 0.7, 64)
    camera = replace(camera, intrinsics=camera.intrinsics + torch.tensor([0.0, 0.0, 5.0, -3.0]), width=70)
    view = ReferenceView(torch.rand(3, 64, 70), torch.rand(1, 64, 70), camera)
    plane = math.radians(35)
    mirrored = mirrored_view(view, plane)
    assert torch.det(mirrored.camera.c2w[:, :3]) == pytest.approx(1, abs=1e-5)
    points = torch.from_numpy(np.random.default_rng(0).uniform(-0.4, 0.4, (50, 3))).float()
    uv, depths = camera.project(points)
    normal = torch.tensor([math.cos(plane), math.sin(plane), 0])
    theirs, their_depths = mirrored.camera.project(points - 2 * (points @ normal)[:, None] * normal)
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
    found = dip_near(prior, azimuth_deg + 8, FINE_TIMES)
    assert found is not None and off_deg(found, azimuth_deg) < 3


class Painter(Judge):
    """Draws discs, half as wide once it knows the mirrored picture."""

    def __init__(self) -> None:
        super().__init__(62.0)
        self.known: list[float] = []

    def know_mirrored(self, azimuth_rad: float) -> None:
        self.known.append(azimuth_rad)

    def sample_views(self, cameras, **_) -> torch.Tensor:
        grid = (torch.arange(cameras.width) + 0.5) / cameras.width * 2 - 1
        disc = (grid[:, None].square() + grid.square()).sqrt() < (0.3 if self.known else 0.6)
        return disc.float().expand(len(cameras), 4, -1, -1)


def warm_job(symmetry: bool = True, n_views: int = 1, is_centered: bool = True):
    state, config, frame, _ = board_job(symmetry, n_views)
    config = replace(config, optimize=replace(config.optimize, warm_start_views=3, warm_start_steps=4))
    state.is_centered = is_centered
    return state, config, frame


@pytest.mark.parametrize(
    ("symmetry", "is_centered", "n_views", "is_asked"),
    [(True, True, 1, True), (False, True, 1, False), (True, False, 1, False), (True, True, 2, False)],
    ids=["symmetric", "switched off", "center unknown", "several pictures"],
)
def test_a_plane_is_looked_for_once_the_first_views_are_drawn(monkeypatch, symmetry, is_centered, n_views, is_asked):
    asked = []
    monkeypatch.setattr("conrad_engine.warm_start.find_plane", lambda *about: asked.append(1) or 0.5)
    state, config, frame = warm_job(symmetry, n_views, is_centered)
    sample_warm_start(state, Painter(), frame.condition, config, Monitor())
    assert (len(asked), state.plane) == ((1, 0.5) if is_asked else (0, None))


def test_symmetric_things_are_drawn_again_beside_the_mirrored_picture(monkeypatch):
    state, config, frame = warm_job()
    painter = Painter()
    monkeypatch.setattr("conrad_engine.warm_start.find_plane", lambda *about: None)
    sample_warm_start(state, painter, frame.condition, config, Monitor())
    before = float(state.sampled[:, 3].mean())
    assert painter.known == []
    monkeypatch.setattr("conrad_engine.warm_start.find_plane", lambda *about: 0.5)
    sample_warm_start(state, painter, frame.condition, config, Monitor())
    assert painter.known == [1.0] and float(state.sampled[:, 3].mean()) < 0.5 * before


def test_a_resumed_job_tells_the_prior_again():
    state, config, frame = warm_job()
    state.plane, state.step, painter = 0.5, 4, Painter()
    state.sampled = painter.sample_views(frame.condition[None])
    config = replace(config, optimize=replace(config.optimize, n_steps=1))
    loop.optimize(
        state, Priors(Silent(), sampler=painter), frame.condition, config, Monitor(), lambda s: None, lambda s: None
    )
    assert painter.known == [1.0]


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
