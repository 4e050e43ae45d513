"""The optimisation: a constrained field, pulled by a diffusion prior into shape. One loop, readable top to bottom."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import losses
from .cameras import Camera, orbit_camera
from .config import HALF_FRAME, PipelineConfig
from .constraint import ConstrainedField, ReferenceView
from .errors import Cancelled, OptimizationError
from .fields.dense_volume import DenseVolume
from .fields.radiance_field import HashField
from .guidance.interfaces import Guidance
from .monitor import Command, Monitor, Progress
from .rendering.compositing import distortion
from .rendering.occupancy import OccupancyGrid
from .rendering.renderer import Rendering, render_rays

log = logging.getLogger(__name__)

N_SAMPLED_RAYS = 4096
"""Rays a step of the fit to sampled views."""
FIT_WEIGHT = 4.0
LOST_SCORE = -9.0
"""Hull score under which a point is nowhere near any sampled silhouette: about two and a half views see nothing there."""
HULL_CELLS = 72
"""Cells a side of the hull that sampled views are carved into."""
N_REFERENCE_RAYS = 1536
"""Rays a step that compare opacity with the mask."""
OCCUPANCY_EVERY = 16
OCCUPANCY_FROM = 32
"""Until this step every cell counts as occupied: the shape is still moving."""
MAX_BAD_STEPS = 10
"""Non-finite steps in a row that end the run."""
VIEW_HALF_FRAME = 0.85
"""Half side, at the origin, of the views shown to the prior: wider than the reference's, since the depth is unknown."""
SDS_WEIGHT = 16.0
"""Of the distillation gradient's mean over pixels and channels, against the other terms."""
PAUSE_S = 0.05


@dataclass
class State:
    """What the optimisation changes, and all that a checkpoint holds."""

    field: DenseVolume | HashField
    constrained: ConstrainedField
    occupancy: OccupancyGrid
    adam: torch.optim.Adam
    step: int = 0
    n_views: int = 1
    n_skipped: int = 0
    n_skipped_in_row: int = 0
    sampled: Tensor | None = None
    """Views sampled from the prior for the warm start, premultiplied RGBA (n, 4, h, w)."""
    half_frame: float = VIEW_HALF_FRAME
    history: list[dict[str, float]] = field(default_factory=list)

    def to_dict(self) -> dict:
        return {
            "field": self.field.state_dict(),
            "adam": self.adam.state_dict(),
            "occupancy": self.occupancy.state_dict(),
            "surfaces": [view.surface for view in self.constrained.views],
            "step": self.step,
            "n_views": self.n_views,
            "n_skipped": self.n_skipped,
            "sampled": self.sampled,
            "half_frame": self.half_frame,
            "history": self.history,
        }

    def load(self, data: dict) -> None:
        """Take over a checkpoint's content; shapes must fit."""
        self.field.load_state_dict(data["field"])
        self.adam.load_state_dict(data["adam"])
        self.occupancy.load_state_dict(data["occupancy"])
        for view, surface in zip(self.constrained.views, data["surfaces"], strict=True):
            view.surface = surface.to(view.surface.device)
        for name in ("step", "n_views", "n_skipped", "half_frame", "history"):
            setattr(self, name, data[name])
        self.sampled = None if data["sampled"] is None else data["sampled"].to(self.field.aabb.device)
        self.field.prepare()


def make_state(
    field_: DenseVolume | HashField, views: list[ReferenceView], config: PipelineConfig, device: torch.device
) -> State:
    constrained = ConstrainedField(field_, views, config.constraint)
    diagonal = float((field_.aabb[1] - field_.aabb[0]).norm())
    # A cell is empty when one sample step through it is nearly clear.
    threshold = config.render.occupancy_threshold * config.render.n_samples / diagonal
    occupancy = OccupancyGrid(field_.aabb, config.render.occupancy_resolution, threshold)
    adam = torch.optim.Adam(
        field_.parameter_groups(config.optimize), betas=(0.9, 0.95), eps=1e-10, fused=device.type == "cuda"
    )
    return State(field_, constrained, occupancy, adam, n_views=config.optimize.n_views)


def n_total_steps(config: PipelineConfig) -> int:
    """Steps of the whole schedule: the fit to sampled views and the distillation; none if only the picture is projected."""
    if config.mesh.project_only:
        return 0
    warm = config.optimize.warm_start_steps if config.optimize.warm_start_views else 0
    return warm + config.optimize.n_steps


def optimize(
    state: State,
    guidance: Guidance | None,
    condition: Camera,
    config: PipelineConfig,
    monitor: Monitor,
    save: Callable[[State], None],
    show: Callable[[State], None],
) -> None:
    """Run from `state.step` to the end of the schedule.

    Args:
        state: Changed in place.
        guidance: Has its reference set; None only if no step asks for it.
        condition: The camera of the reference picture as guidance sees it; views share its angle.
        config: The job's settings; `seed` and the step number alone decide all random numbers, so a resumed run repeats.
        monitor: Watches and steers.
        save: Writes a checkpoint.
        show: Sends a preview if the monitor wants one.

    Raises:
        Cancelled: The monitor asked for it; the checkpoint is written.
        OptimizationError: Non-finite values in a row, or out of memory at one view a step.
    """
    n_warm = n_total_steps(config) - config.optimize.n_steps
    n_total = n_total_steps(config)
    generator = torch.Generator(device=state.field.aabb.device)
    if n_warm and state.sampled is None and state.step < n_warm:
        sample_warm_start(state, guidance, condition, config, monitor, generator)
        save(state)
    started, first_step = time.monotonic(), state.step
    while state.step < n_total:
        command = _wait_while_paused(state, monitor, show)
        if command is Command.KEEP:
            break
        if command is Command.CANCEL:
            save(state)
            raise Cancelled(f"cancelled at step {state.step} of {n_total}; the checkpoint is kept")
        generator.manual_seed(config.seed * 1_000_003 + state.step)
        try:
            terms = train_step(state, guidance, condition, config, generator)
        except torch.cuda.OutOfMemoryError:
            _shrink(state)
            continue
        state.step += 1
        if state.step % 10 == 0 or state.step == n_total:
            state.history.append({"step": state.step, **terms})
        eta_s = (time.monotonic() - started) / (state.step - first_step) * (n_total - state.step)
        monitor.progress(Progress("optimize", state.step, n_total, eta_s, terms, memory_bytes(state.field.aabb.device)))
        if state.step % config.optimize.checkpoint_every == 0 and state.step < n_total:
            save(state)
        show(state)
    save(state)


def train_step(
    state: State, guidance: Guidance | None, condition: Camera, config: PipelineConfig, generator: torch.Generator
) -> dict[str, float]:
    """One step: render views, ask the prior (or take sampled views), add regularisers, move the field."""
    settings = config.optimize
    n_total = n_total_steps(config)
    progress = state.step / n_total
    state.field.set_progress(progress)
    state.constrained.set_progress(progress)
    _set_learning_rate(state, progress)
    state.field.prepare()
    if state.step >= OCCUPANCY_FROM and state.step % OCCUPANCY_EVERY == 0:
        state.occupancy.update(state.constrained, generator)
    if state.step % config.constraint.update_every == 0:
        state.constrained.infer_surfaces(config.render.n_samples, state.occupancy)

    terms = reference_terms(state, config, generator)
    if state.sampled is not None and state.step < n_total - settings.n_steps:
        origins, directions, wanted = _sampled_rays(state, condition, config, generator)
        rendering = _render(state, origins, directions, config, generator)
        terms["fit"] = FIT_WEIGHT * losses.picture_loss(rendering.rgba, wanted)
    else:
        cameras = random_cameras(state, condition, config, generator)
        rendering = _render(state, *cameras.rays(), config, generator)
        rgba = _as_pictures(rendering.rgba, cameras)
        done = (state.step - (n_total - settings.n_steps)) / max(1, settings.n_steps)
        result = guidance.gradient(rgba.detach(), cameras, done, generator)
        # Score distillation, arXiv:2209.14988, Eq. 3: a given gradient as the loss whose gradient it is.
        terms["sds"] = SDS_WEIGHT * (rgba * result.gradient).mean()
    if progress > 0.3:
        terms["entropy"] = settings.entropy_weight * losses.entropy_loss(rendering.opacities)
    if settings.distortion_weight:
        spread = distortion(rendering.weights, rendering.t_mids, rendering.steps)
        terms["distortion"] = settings.distortion_weight * spread.mean()
    terms["smooth"] = settings.smooth_weight * state.field.smoothness()

    loss = sum(terms.values())
    state.adam.zero_grad(set_to_none=True)
    loss.backward()
    if _is_finite(loss, state):
        state.adam.step()
    return {name: float(value.detach()) for name, value in terms.items()}


def reference_terms(state: State, config: PipelineConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Losses seen from the reference cameras: the mask always; the colors only where no constraint gives them."""
    terms: dict[str, Tensor] = {}
    for view in state.constrained.views:
        camera, mask = view.picture.camera, view.picture.mask
        unit = torch.rand(1, N_REFERENCE_RAYS, 2, generator=generator, device=mask.device)
        uv = unit[0] * torch.tensor([camera.width, camera.height], device=mask.device)
        rendering = _render(state, *camera.rays(uv), config, generator)
        picture = torch.cat([view.picture.rgb * mask, mask])[None]
        wanted = torch.nn.functional.grid_sample(picture, unit[None] * 2 - 1, align_corners=False)[0, :, 0].T
        mask_term = config.optimize.mask_weight * losses.mask_loss(rendering.opacities, wanted[:, 3])
        terms["mask"] = terms.get("mask", 0) + mask_term
        if config.optimize.distortion_weight:
            # Ten times that of other views, as NeuralLift-360: what the mask asks for must stand at one depth.
            spread = distortion(rendering.weights, rendering.t_mids, rendering.steps).mean()
            terms["gather"] = terms.get("gather", 0) + 10 * config.optimize.distortion_weight * spread
        if config.constraint.kind == "loss":
            error = (rendering.rgb - wanted[:, :3]).square().mean()
            terms["picture"] = terms.get("picture", 0) + config.constraint.loss_weight * error
        if config.optimize.depth_weight and view.picture.surface is not None:
            known = torch.nn.functional.grid_sample(
                view.picture.surface[None], unit[None] * 2 - 1, mode="nearest", align_corners=False
            )[0, 0, 0]
            usable = known.isfinite() & (rendering.opacities.detach() > 0.5)
            fade = max(0.0, 1 - 2 * state.step / n_total_steps(config))
            if fade and usable.sum() > 16:
                term = losses.correlation_loss(rendering.depths[usable], known[usable])
                terms["depth"] = terms.get("depth", 0) + config.optimize.depth_weight * fade * term
    return terms


def random_cameras(state: State, condition: Camera, config: PipelineConfig, generator: torch.Generator) -> Camera:
    """Views of one step: azimuths in equal sectors, the range growing from around the picture to all around."""
    settings, n = config.optimize, state.n_views
    device = generator.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator, device=device)

    progress = state.step / max(1, n_total_steps(config))
    reach = min(1.0, 0.3 + 0.7 * progress / max(settings.range_grows_until, 1e-6))
    turn = uniform(0, 1)[:1]
    sectors = ((torch.arange(n, device=device) + uniform(0, 1)) / n + turn) % 1
    azimuths = (sectors * 2 - 1) * math.pi * reach
    elevations = uniform(math.radians(settings.elevation_min_deg), math.radians(settings.elevation_max_deg))
    half_frames = uniform(0.95, 1.08) * state.half_frame
    return _view_cameras(condition, azimuths, elevations, half_frames, config.render.size)


def ring_cameras(condition: Camera, n_views: int, half_frame: float, size: int) -> Camera:
    """Views of the warm start: all around except the reference's own place, at two heights."""
    azimuths = torch.arange(1, n_views + 1) * (2 * math.pi / (n_views + 1))
    elevations = torch.deg2rad(torch.tensor([5.0, 30.0])).repeat(n_views)[:n_views]
    return _view_cameras(condition, azimuths, elevations, torch.full((n_views,), half_frame), size)


def _view_cameras(condition: Camera, azimuths: Tensor, elevations: Tensor, half_frames: Tensor, size: int) -> Camera:
    """Orbit cameras with the reference's angle of view, as far away as their half frame at the origin asks for."""
    tangent = HALF_FRAME / float(condition.positions.norm())
    return orbit_camera(azimuths, elevations, half_frames / tangent, 2 * math.atan(tangent), size).to(azimuths.device)


def sample_warm_start(
    state: State,
    guidance: Guidance,
    condition: Camera,
    config: PipelineConfig,
    monitor: Monitor,
    generator: torch.Generator,
) -> None:
    """Let the prior draw the object from all around, once; the fit to these views gives score distillation its start."""
    settings = config.optimize
    for half_frame in (VIEW_HALF_FRAME, 1.15):
        state.half_frame = half_frame
        cameras = ring_cameras(condition, settings.warm_start_views, half_frame, config.render.size)
        cameras = cameras.to(state.field.aabb.device)
        monitor.progress(Progress("warm_start", 0, settings.warm_start_sampling))
        generator.manual_seed(config.seed)
        state.sampled = guidance.sample_views(
            cameras,
            n_steps=settings.warm_start_sampling,
            generator=generator,
            on_step=lambda k: _sampling_step(k, settings.warm_start_sampling, monitor),
        )
        border = torch.cat([state.sampled[:, 3, :, :1], state.sampled[:, 3, :, -1:]], -1)
        if (border > 0.5).float().mean() < 0.02:
            break
        log.info("the object is deeper than it is wide: its views are drawn again from farther away")
    if settings.carve:
        carve(state, cameras)


def _sampling_step(step: int, n_steps: int, monitor: Monitor) -> None:
    monitor.progress(Progress("warm_start", step, n_steps))
    if monitor.command() is Command.CANCEL:
        raise Cancelled("cancelled while the first views were drawn")


def carve(state: State, cameras: Camera) -> None:
    """Start from the space that the sampled silhouettes leave: their visual hull, lenient with a single dissenting view.

    A point's score sums the logarithms of the opacities it projects to; the worst view counts half, so a point that one view
    sees outside starts half dense and one that two views see outside starts empty.
    """
    field, sampled = state.field, state.sampled
    resolution = HULL_CELLS
    axes = [
        low + (torch.arange(resolution, device=low.device) + 0.5) / resolution * (high - low)
        for low, high in field.aabb.T
    ]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    uv, _ = cameras.project(points[None].expand(len(cameras), -1, -1))
    unit = uv / cameras.width * 2 - 1
    opacities = torch.nn.functional.avg_pool2d(sampled[:, 3:], 3, 1, 1)
    seen = torch.nn.functional.grid_sample(opacities, unit[:, None], align_corners=False, padding_mode="border")[
        :, 0, 0
    ]
    logs = seen.clamp(0.02, 1).log()
    score = _lifted(logs.sum(0) - 0.5 * logs.amin(0), points, state.constrained)
    cell = float((field.aabb[1] - field.aabb[0]).max()) / field.config.resolution
    field.initialize(((score + 2) * cell).view(resolution, resolution, resolution))
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


def _sampled_rays(
    state: State, condition: Camera, config: PipelineConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Random rays of the sampled views and the RGBA they should see; half of them near the object."""
    cameras = ring_cameras(condition, len(state.sampled), state.half_frame, config.render.size).to(generator.device)
    size = config.render.size
    near = torch.nn.functional.max_pool2d(state.sampled[:, 3:], 5, 1, 2).flatten() > 0.05
    n = N_SAMPLED_RAYS
    chance = near / near.sum().clamp(min=1) + 1 / near.numel()
    pick = torch.multinomial(chance, n, replacement=True, generator=generator)
    view, pixel = pick // size**2, pick % size**2
    # A place inside the pixel, so that the pixel grid leaves no pattern.
    uv = torch.stack([pixel % size, pixel // size], -1) + torch.rand(n, 2, generator=generator, device=pick.device)
    picked = cameras[view]
    origins, directions = (x[:, 0] for x in picked.rays(uv[:, None]))
    return origins, directions, state.sampled[view, :, pixel // size, pixel % size]


def _render(
    state: State, origins: Tensor, directions: Tensor, config: PipelineConfig, generator: torch.Generator
) -> Rendering:
    return render_rays(
        state.constrained,
        origins.reshape(-1, 3),
        directions.reshape(-1, 3),
        config.render.n_samples,
        state.occupancy,
        generator,
    )


def _as_pictures(values: Tensor, cameras: Camera) -> Tensor:
    """(n * height * width, c) as (n, c, height, width)."""
    return values.view(len(cameras), cameras.height, cameras.width, -1).permute(0, 3, 1, 2)


def _set_learning_rate(state: State, progress: float) -> None:
    """A short warm-up, then constant, then falling to a tenth over the last two fifths."""
    factor = min(1.0, (state.step + 1) / 20) * (1.0 if progress < 0.6 else 1 - 0.9 * (progress - 0.6) / 0.4)
    for group in state.adam.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * factor


def _is_finite(loss: Tensor, state: State) -> bool:
    """Whether this step can be taken; a bad one is counted, and several in a row end the run."""
    gradients = [p.grad for p in state.field.parameters() if p.grad is not None]
    if bool(torch.isfinite(loss)) and all(bool(torch.isfinite(g).all()) for g in gradients):
        state.n_skipped_in_row = 0
        return True
    state.n_skipped += 1
    state.n_skipped_in_row += 1
    log.warning("step %d has non-finite values and is skipped", state.step)
    if state.n_skipped_in_row >= MAX_BAD_STEPS:
        raise OptimizationError(
            f"{MAX_BAD_STEPS} steps in a row had non-finite values; lower the learning rate (optimize.rate) or use float32 "
            "(guidance.precision=float32)"
        )
    return False


def _shrink(state: State) -> None:
    """Go on with fewer views a step after the device ran out of memory."""
    state.adam.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    if state.n_views == 1:
        raise OptimizationError(
            "the GPU ran out of memory even with one view a step; close other programs that use it, choose the preset "
            "draft, or run with --device cpu"
        )
    state.n_views //= 2
    log.warning("the GPU ran out of memory; going on with %d views a step", state.n_views)


def _wait_while_paused(state: State, monitor: Monitor, show: Callable[[State], None]) -> Command:
    while (command := monitor.command()) is Command.PAUSE:
        show(state)
        time.sleep(PAUSE_S)
    return command


def memory_bytes(device: torch.device) -> int:
    """Device memory in use on a GPU, resident memory of the process on a CPU (0 where it cannot be read)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return 0
