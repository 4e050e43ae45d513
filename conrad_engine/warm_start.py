"""The start of an optimisation: views that the prior draws from all around, their hull, and the rays of the fit to them."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .cameras import Camera, orbit_camera
from .config import HALF_FRAME, PipelineConfig
from .constraint import ConstrainedField
from .errors import Cancelled
from .guidance.interfaces import ViewSampler
from .hull import EMPTY_SCORE, HULL_CELLS, cell_centers, hull_scores, log_opacities
from .monitor import Command, Monitor, Progress
from .state import VIEW_HALF_FRAME, State
from .symmetry import find_plane

log = logging.getLogger(__name__)

N_SAMPLED_RAYS = 4096
"""Rays a step of the fit to sampled views."""
LOST_SCORE = -9.0
"""Hull score under which a point is nowhere near any sampled silhouette: about two and a half views see nothing there."""
FRAMES = ((VIEW_HALF_FRAME, 0.84), (1.0, 0.84), (1.1, 0.92), (1.3, math.inf))
"""Half sides of the sampled views, and how much of them silhouettes may fill; where they fill more, the next is taken. The
prior was trained on frames that fit their object and takes the frame as a hint of its size: in one that a long object would
leave it draws the object short, in one too wide it draws it long."""
RING_ELEVATIONS_DEG = (0.0, 30.0)
"""In turn. From the level the hull has no wedge under the object."""


def ring_azimuths_rad(n_views: int) -> list[float]:
    """From the reference's own place, which is left out."""
    return [2 * math.pi * k / (n_views + 1) for k in range(1, n_views + 1)]


def ring_cameras(condition: Camera, n_views: int, half_frame: float, size: int) -> Camera:
    """Views of the warm start: all around except the reference's own place, at two heights."""
    azimuths = torch.tensor(ring_azimuths_rad(n_views))
    elevations = torch.deg2rad(torch.tensor(RING_ELEVATIONS_DEG)).repeat(n_views)[:n_views]
    half_frames = torch.full((n_views,), half_frame)
    return view_cameras(half_angle_tangent(condition), azimuths, elevations, half_frames, size)


def half_angle_tangent(condition: Camera) -> float:
    """Of the conditioning camera, which `HALF_FRAME` fits."""
    return HALF_FRAME / float(condition.positions.norm())


def view_cameras(tangent: float, azimuths: Tensor, elevations: Tensor, half_frames: Tensor, size: int) -> Camera:
    """Orbit cameras with an angle of view, as far away as their half frame at the origin asks for.

    Args:
        tangent: Of half the angle.
    """
    # A tensor made from a host's number would be a copy, which a CUDA graph cannot hold.
    fov = torch.full_like(azimuths, 2 * math.atan(tangent))
    return orbit_camera(azimuths, elevations, half_frames / tangent, fov, size)


def sample_warm_start(
    state: State,
    sampler: ViewSampler | None,
    condition: Camera,
    config: PipelineConfig,
    monitor: Monitor,
) -> None:
    """Let the prior draw the object from all around, once; the fit to these views gives score distillation its start.

    If the prior takes it for symmetric, they are drawn beside the picture in the mirror.
    """
    assert sampler is not None, "a job with a warm start has someone to draw its views"
    settings = config.optimize
    _sampling_step(0, settings.warm_start_sampling, monitor)  # looking for a plane takes some seconds of a processor
    if settings.symmetry and state.is_centered and len(state.constrained.views) == 1:
        state.plane = find_plane(sampler, state.world_azimuth if settings.axis_aligned else None)
        if state.plane is not None:
            sampler.know_mirrored(2 * state.plane)
    cameras = _draw_views(state, sampler, condition, config, monitor)
    if settings.carve:
        carve(state, cameras)


def _draw_views(
    state: State, sampler: ViewSampler, condition: Camera, config: PipelineConfig, monitor: Monitor
) -> Camera:
    """Views from all around in a frame that fits them, and their cameras."""
    settings = config.optimize
    for half_frame, full in FRAMES:
        state.half_frame = half_frame
        cameras = ring_cameras(condition, settings.warm_start_views, half_frame, config.render.size)
        cameras = cameras.to(state.device)
        _sampling_step(0, settings.warm_start_sampling, monitor)
        state.sampled = sampler.sample_views(
            cameras,
            n_steps=settings.warm_start_sampling,
            generator=torch.Generator(state.device).manual_seed(config.seed),
            n_drafts=settings.warm_start_drafts,
            temperature=settings.warm_start_temperature,
            on_step=lambda k: _sampling_step(k, settings.warm_start_sampling, monitor),
        )
        if (filled := filled_part(state.sampled[:, 3])) < full:
            break
        log.info("the object fills %.2f of views with a half frame of %.2f: they are drawn again", filled, half_frame)
    return cameras


def filled_part(opacities: Float[Tensor, "n size size"]) -> float:
    """How far from the middle, of the way to the border, silhouettes reach: all but the two that reach farthest, which may
    be mistaken."""
    size = opacities.shape[-1]
    columns = torch.arange(size, device=opacities.device)
    distances = torch.maximum(size - columns, columns + 1) * (2 / size) - 1
    is_seen = opacities > 0.5
    reach = ((is_seen.any(1) | is_seen.any(2)) * distances).amax(1)
    return float(reach.sort().values[max(0, len(reach) - 3)])


def _sampling_step(step: int, n_steps: int, monitor: Monitor) -> None:
    monitor.progress(Progress("warm_start", step, n_steps))
    if monitor.command() is Command.CANCEL:
        raise Cancelled("cancelled while the first views were drawn")


def carve(state: State, cameras: Camera) -> None:
    """Start from the hull of the sampled silhouettes: a point that one view sees outside starts half dense, one that two views
    see outside empty."""
    field = state.field
    points = cell_centers(field.aabb)
    scores = _lifted(hull_scores(log_opacities(points, state.sampled[:, 3:], cameras)), points, state.constrained)
    cell = float((field.aabb[1] - field.aabb[0]).max()) / field.config.resolution
    field.initialize(((scores - EMPTY_SCORE) * cell).view(HULL_CELLS, HULL_CELLS, HULL_CELLS))
    field.prepare()


def _lifted(score: Tensor, points: Tensor, constrained: ConstrainedField) -> Tensor:
    """Scores raised along rays of the pictures that would meet nothing: a thin part that the samples lost stands where they
    came nearest to it. Rays that no sample comes near stay empty."""
    for view in constrained.views:
        camera = view.depth_camera
        uv, z_depths = camera.project(points)
        column, row = uv.long().unbind(-1)
        inside = (z_depths > 0) & (column >= 0) & (column < camera.width) & (row >= 0) & (row < camera.height)
        pixel = row.clamp(0, camera.height - 1) * camera.width + column.clamp(0, camera.width - 1)
        inside &= view.in_mask.flatten()[pixel]
        best = torch.full((camera.width * camera.height,), -1e3, device=score.device)
        best = best.scatter_reduce(0, pixel[inside], score[inside], "amax")
        # The hull's cells are larger than the map's pixels: a ray's best is that of its neighborhood.
        best = torch.nn.functional.max_pool2d(best.view(1, 1, camera.height, camera.width), 3, 1, 1).flatten()[pixel]
        is_thin = inside & (best < -1) & (best > LOST_SCORE)
        score = torch.where(is_thin, torch.maximum(score, -1 + 3 * (score - best)), score)
    return score


@dataclass(frozen=True)
class SampledViews:
    """The sampled views as the fit uses them."""

    pictures: Float[Tensor, "n 4 h w"]
    cameras: Camera
    chances: Float[Tensor, " pixels"]
    """Of each pixel of all views: half of the rays go near the object."""

    @staticmethod
    def of(state: State, condition: Camera) -> SampledViews:
        assert state.sampled is not None, "there is a fit only to sampled views"
        n_views, size = len(state.sampled), state.sampled.shape[-1]
        cameras = ring_cameras(condition, n_views, state.half_frame, size).to(state.device)
        near = torch.nn.functional.max_pool2d(state.sampled[:, 3:], 5, 1, 2).flatten() > 0.05
        return SampledViews(state.sampled, cameras, near / near.sum().clamp(min=1) + 1 / near.numel())

    def draw(self, generator: torch.Generator) -> tuple[Int[Tensor, " n"], Float[Tensor, "n 2"]]:
        """Random pixels, numbered through all views, and a place in each, so that the pixel grid leaves no pattern."""
        pixels = torch.multinomial(self.chances, N_SAMPLED_RAYS, replacement=True, generator=generator)
        return pixels, torch.rand(N_SAMPLED_RAYS, 2, generator=generator, device=pixels.device)

    def rays(self, pixels: Int[Tensor, " n"], places: Float[Tensor, "n 2"]) -> tuple[Tensor, Tensor, Tensor]:
        """Origins, directions, and the RGBA that they should see."""
        size = self.cameras.width
        view, pixel = pixels // size**2, pixels % size**2
        uv = torch.stack([pixel % size, pixel // size], -1) + places
        origins, directions = (x[:, 0] for x in self.cameras[view].rays(uv[:, None]))
        return origins, directions, self.pictures[view, :, pixel // size, pixel % size]
