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

    is_warm = state.sampled is not None and state.step < n_total - settings.n_steps
    if is_warm:
        cameras, wanted = _pick_sampled(state, condition, config, generator)
    else:
        cameras, wanted = random_cameras(state, condition, config, generator), None
    rendering = _render(state, *cameras.rays(), config, generator)
    rgba = _as_pictures(rendering.rgba, cameras)

    terms = reference_terms(state, config, generator)
    if is_warm:
        terms["fit"] = 4 * losses.picture_loss(rgba, wanted)
    elif guidance is not None:
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
        )
        border = torch.cat([state.sampled[:, 3, :, :1], state.sampled[:, 3, :, -1:]], -1)
        if (border > 0.5).float().mean() < 0.02:
            return
        log.info("the object is deeper than it is wide: its views are drawn again from farther away")


def _pick_sampled(state: State, condition: Camera, config: PipelineConfig, generator: torch.Generator):
    cameras = ring_cameras(condition, len(state.sampled), state.half_frame, config.render.size).to(generator.device)
    count = min(max(2, state.n_views), len(state.sampled))
    chosen = torch.randperm(len(state.sampled), generator=generator, device=generator.device)[:count]
    return cameras[chosen], state.sampled[chosen]


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
