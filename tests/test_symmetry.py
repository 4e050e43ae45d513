"""The plane of symmetry of a half-formed shape, and the picture in the mirror as a view of it."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from conrad_engine import optimize as loop
from conrad_engine.cameras import Camera, orbit_angles, orbit_camera
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
from conrad_engine.symmetry import (
    USUAL_ERRORS,
    USUAL_TURNS_DEG,
    find_plane,
    mirror_errors,
    mirrored_points,
    mirrored_view,
    turns_deg,
)
from conrad_engine.training import raster
from conrad_engine.warm_start import sample_warm_start

from .training_meshes import UNLIT, boxes

BOX = torch.tensor([[-0.85, -1.0, -0.85], [0.85, 1.0, 0.85]])


class Balls:
    """Rows of x, y, z, radius in a body that is turned; seen as silhouettes."""

    def __init__(self, rows, azimuth_deg: float = 0.0) -> None:
        rows = torch.tensor(rows, dtype=torch.float32)
        angle = math.radians(azimuth_deg)
        turn = torch.tensor(
            [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1.0]]
        )
        self.centers, self.radii = rows[:, :3] @ turn.T, rows[:, 3]

    def silhouettes(self, cameras: Camera) -> torch.Tensor:
        """(v, 1, h, w): 1 where a ray meets a ball."""
        origins, directions = cameras.rays()
        to_centers = self.centers - origins[..., None, :]
        along = (to_centers * directions[..., None, :]).sum(-1)
        nearest = (to_centers.square().sum(-1) - along.square()).clamp(min=0).sqrt()
        return ((nearest < self.radii).any(-1)).float().view(len(cameras), 1, cameras.height, cameras.width)

    def plane(self, judge: "Judge", axis_deg: float | None = None) -> float | None:
        """What is found for it where it is drawn as it is, twelve times around."""
        azimuths = torch.arange(1, 13) * (2 * math.pi / 13)
        heights = torch.deg2rad(torch.tensor([0.0, 30.0])).repeat(6)
        around = orbit_camera(azimuths, heights, torch.full((12,), 3.0), torch.full((12,), 0.55), 64)
        camera = orbit_camera(0.0, math.radians(15), 3.0, 0.5, 96)
        mask = self.silhouettes(camera[None])[0]
        view = ReferenceView(torch.zeros(3, 96, 96), mask, camera)
        axis = None if axis_deg is None else math.radians(axis_deg)
        return find_plane(view, self.silhouettes(around), around, BOX, judge, axis)


# Two arms, a head in front and a tail behind: alike on both sides of x = 0 alone.
CREATURE = [
    (0, 0, 0, 0.25),
    (0.35, 0.05, 0.1, 0.12),
    (-0.35, 0.05, 0.1, 0.12),
    (0, -0.35, 0.25, 0.15),
    (0, 0.5, -0.1, 0.1),
]


class Judge:
    """A prior that likes the planes at some angles best; `depth` is how much better than others."""

    def __init__(self, *azimuths_deg: float, depth: float = 1.0) -> None:
        self.azimuths_deg, self.depth = azimuths_deg, depth

    def sample_views(self, *_, **__): ...

    def know_mirrored(self, azimuth_rad: float) -> None: ...

    def mirror_errors(self, azimuths_rad: torch.Tensor) -> torch.Tensor:
        # In a plane's mirror the reference moves by twice its angle.
        off = azimuths_rad[:, None] / 2 - torch.deg2rad(torch.tensor(self.azimuths_deg))
        off = torch.remainder(off + math.pi / 2, math.pi) - math.pi / 2
        liked = self.depth * torch.exp(-((off / 0.1) ** 2) / 2).amax(1)
        usual = np.interp(turns_deg(np.degrees(azimuths_rad.numpy() / 2)), USUAL_TURNS_DEG, USUAL_ERRORS)
        return torch.from_numpy(usual) - liked


def off_deg(azimuth_rad: float, azimuth_deg: float) -> float:
    return (math.degrees(azimuth_rad) - azimuth_deg + 90) % 180 - 90


@pytest.mark.parametrize("azimuth_deg", [20, 62, 131, 169])
def test_the_prior_says_where_a_plane_is(azimuth_deg):
    for wanted in (azimuth_deg, azimuth_deg + 3.7):
        found = Balls(CREATURE, azimuth_deg).plane(Judge(wanted))
        assert found is not None and abs(off_deg(found, wanted)) < 0.8


def test_of_several_the_one_counts_about_which_the_drawn_shape_is_alike():
    for others in ([30, 110], [110, 30]):
        found = Balls(CREATURE, 62).plane(Judge(*others[:1], 62, *others[1:]))
        assert abs(off_deg(found, 62)) < 0.5


def test_a_plane_that_the_prior_hardly_sees_is_none():
    assert Balls(CREATURE, 62).plane(Judge(62, depth=0.1)) is None
    assert Balls(CREATURE, 62).plane(Judge(62, depth=0.2)) is not None


@pytest.mark.parametrize("axis_deg", [62, 62 - 90, 62 + 180])
def test_along_one_of_the_worlds_axes_a_hint_will_do(axis_deg):
    creature = Balls(CREATURE, 62)
    assert creature.plane(Judge(62, depth=0.1)) is None
    found = creature.plane(Judge(62, depth=0.1), axis_deg)
    assert found is not None and abs(off_deg(found, 62)) < 1e-6
    assert creature.plane(Judge(62, depth=0.03), axis_deg) is None  # no better than the other axis


def test_a_plane_beside_an_axis_is_moved_to_it():
    for off, found in ((1.5, 62), (-3.5, 62), (5.5, 62 + 5.5)):
        angle = Balls(CREATURE, 62).plane(Judge(62 + off), 62)
        assert abs(off_deg(angle, found)) < (1e-6 if found == 62 else 0.8)


def test_a_mirrored_silhouette_that_leaves_no_room_for_what_was_drawn_is_not_believed():
    """A bar that points away from the camera, a little to the right: short in the picture, and so it would be in the mirror,
    where the drawn views say that it is long."""
    bar = Balls([(0, y, 0, 0.12) for y in np.linspace(-0.6, 0.6, 15)], -10)
    assert bar.plane(Judge(45)) is None and bar.plane(Judge(45, depth=0.1), 45) is None
    assert abs(off_deg(bar.plane(Judge(-10 + 180)), -10)) < 0.8


def test_nothing_drawn_has_no_plane():
    assert Balls([(0, 0, 0, -1.0)]).plane(Judge(60)) is None


@pytest.mark.parametrize("azimuth_deg", [3, 178, 84, 90, 96])
def test_along_and_nearly_across_the_line_of_sight_the_mirror_is_not_used(azimuth_deg):
    assert Balls(CREATURE, azimuth_deg).plane(Judge(azimuth_deg)) is None
    assert Balls(CREATURE, azimuth_deg).plane(Judge(azimuth_deg, 45)) is not None


def test_the_mirrored_picture_is_what_its_camera_sees_of_the_mirror_image():
    camera = orbit_camera(0.0, 0.3, 2.0, 0.7, 64)
    camera = replace(camera, intrinsics=camera.intrinsics + torch.tensor([0.0, 0.0, 5.0, -3.0]), width=70)
    view = ReferenceView(torch.rand(3, 64, 70), torch.rand(1, 64, 70), camera)
    plane = math.radians(35)
    mirrored = mirrored_view(view, plane)
    assert torch.det(mirrored.camera.c2w[:, :3]) == pytest.approx(1, abs=1e-5)
    points = torch.from_numpy(np.random.default_rng(0).uniform(-0.4, 0.4, (50, 3))).float()
    uv, depths = camera.project(points)
    theirs, their_depths = mirrored.camera.project(mirrored_points(points, plane))
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
    angles = np.arange(azimuth_deg - 24, azimuth_deg + 25, 6)
    errors = mirror_errors(prior, angles)
    assert abs(angles[errors.argmin()] - azimuth_deg) <= 6
    assert min(errors[0], errors[-1]) > errors.min() + 0.05


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
