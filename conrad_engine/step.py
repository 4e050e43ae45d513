"""One step of the optimisation. The host looks around and draws numbers; the rest needs no host, and a CUDA graph holds it."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import losses
from .cameras import Camera
from .config import OptimizeConfig, PipelineConfig
from .errors import InputError
from .graphs import GraphedStep
from .guidance.interfaces import Guidance, GuidanceResult, Likeness, SplitGuidance
from .ranks import Ranks, taken
from .rendering.compositing import distortion
from .rendering.renderer import Rendering, render_rays
from .state import State, n_coarse_steps
from .warm_start import N_SAMPLED_RAYS, SampledViews, half_angle_tangent, view_cameras

FIT_WEIGHT = 4.0
N_REFERENCE_RAYS = 1536
"""Rays a step that compare opacity with the mask."""
OCCUPANCY_EVERY = 16
OCCUPANCY_FROM = 32
"""Until this step every cell counts as occupied: the shape is still moving."""
N_SURFACE_UPDATES = 200
"""Times that a long run infers its surfaces anew."""
ENTROPY_FROM = 0.3
"""Part of the run after which opacities are pushed to 0 or 1."""
SOFT_PX = 1.4
"""Blur of the constraint's picture while the shape forms, in pixels of the views it is seen beside."""
N_DEPTHS = 16
"""Rays that must see a known depth for the depth loss to say anything."""
DEPTH_LOSSES = {"correlation": losses.correlation_loss, "ranking": losses.ranking_loss}
ALONE = Ranks()
SDS_WEIGHT = 16.0
"""Of the distillation gradient's mean over pixels and channels, against the other terms."""


class Draws(NamedTuple):
    """All that differs from step to step without depending on the field: tensors on the device, in nested tuples."""

    reference: tuple[tuple[Tensor, Tensor], ...]
    """A reference view each: places in its picture, jitter of the rays."""
    fade: Tensor
    """Share of the depth loss that is left."""
    views: tuple[Any, ...]
    """What `fit_rendering` or `view_rendering` needs."""
    smooth: tuple[Tensor, ...]
    """What the field's `smoothness` needs."""


class TrainStep:
    """Takes the step that `state.step` names: cameras, rays, field, constraint, guidance, losses, backward, Adam.

    On CUDA it is captured in a graph, and captured anew when the loss gets or loses a term (`_structure`). Where several GPUs
    share the views, the graph ends at the gradients: their exchange and the optimiser's step come after it, as they are.
    """

    def __init__(
        self,
        state: State,
        guidance: Guidance | None,
        condition: Camera,
        config: PipelineConfig,
        ranks: Ranks = ALONE,
        likeness: Likeness | None = None,
    ) -> None:
        self.state, self.guidance, self.likeness, self.config, self.ranks = state, guidance, likeness, config, ranks
        self.condition, self.tangent = condition, half_angle_tangent(condition)
        self.generator = torch.Generator(device=state.device)
        can_be_split = guidance is None or isinstance(guidance, SplitGuidance)
        if ranks.count > 1 and not can_be_split:
            raise InputError("this guidance cannot be split over several GPUs; set optimize.n_gpus=1")
        is_wanted = config.optimize.capture == "auto" and can_be_split and state.field.can_be_captured
        captured = self._on_device if ranks.count == 1 else self._gradients
        self.graphed = GraphedStep(captured, state.device, enabled=is_wanted)
        self.n_coarse = n_coarse_steps(config)
        self.n_warm = self.n_coarse - config.optimize.n_steps
        self._captured_structure: tuple = ()
        self._is_prepared = False

    def __call__(self) -> dict[str, Tensor]:
        """Take the step.

        Returns:
            The terms of the loss, on the device; the next call overwrites them.
        """
        state, progress = self.state, self.progress
        # The seed and the step alone decide all random numbers, so that a resumed run repeats.
        self.generator.manual_seed(self.config.seed * 1_000_003 + state.step)
        state.field.set_progress(progress)
        state.constrained.set_progress(progress)
        before, length = (self.n_coarse, self.config.optimize.fine_steps) if self.is_fine else (0, self.n_coarse)
        set_learning_rate(state, state.step - before, length)
        self._look_around()
        structure = self._structure()
        if structure != self._captured_structure:
            self._captured_structure = structure
            self.graphed.reset()
            state.constrained.soften(SOFT_PX * state.pixel(self._view_size))
        if self.ranks.count == 1:
            return self.graphed(*self._draw())
        loss, terms = self.graphed(*self._draw())
        self.ranks.average([loss, *(p.grad for p in state.field.parameters() if p.grad is not None)])
        take_step(state, loss)
        return terms

    # The schedule

    @property
    def is_fine(self) -> bool:
        """Whether this step belongs to the fine stage: larger views, learning rates from their start."""
        return self.state.step >= self.n_coarse

    @property
    def progress(self) -> float:
        """Part of the coarse stage done. In the fine one all that follows it stays as the last coarse step had it."""
        return min(self.state.step, self.n_coarse - 1) / max(1, self.n_coarse)

    @property
    def is_fit(self) -> bool:
        """Whether this step fits sampled views; it distils the prior otherwise."""
        return self.state.sampled is not None and self.state.step < self.n_warm

    @property
    def fade(self) -> float:
        """The depth loss falls to nothing at half of the run."""
        return max(0.0, 1 - 2 * self.progress)

    def _structure(self) -> tuple:
        """All that decides which operations a step consists of."""
        has_entropy = self.progress > ENTROPY_FROM
        has_depth = self.config.optimize.depth_weight > 0 and self.fade > 0
        return self.is_fit, self.is_fine, has_entropy, has_depth, self.state.constrained.has_shell, self.state.n_views

    # The host's part

    def _look_around(self) -> None:
        """Find occupied cells and surfaces. Both depend on the field's values, so they are no part of what is captured."""
        state, config = self.state, self.config
        has_cells = state.step >= OCCUPANCY_FROM and state.step % OCCUPANCY_EVERY == 0
        # In a long run they move less from step to step.
        every = max(config.constraint.update_every, self.n_coarse // N_SURFACE_UPDATES)
        has_surfaces = state.step % every == 0
        if self.graphed.is_enabled:
            with torch.no_grad():
                if has_cells or has_surfaces:
                    state.field.prepare()
        else:
            state.field.prepare()
            self._is_prepared = True
        if has_cells:
            state.occupancy.update(state.constrained, self.generator)
        if has_surfaces:
            state.constrained.infer_surfaces(config.render.n_samples, state.occupancy, self.graphed.is_enabled)

    def _draw(self) -> Draws:
        generator, device = self.generator, self.state.device

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=device)

        reference = tuple(
            (uniform(1, N_REFERENCE_RAYS, 2), uniform(N_REFERENCE_RAYS, 1)) for _ in self.state.constrained.views
        )
        if self.is_fit:
            views = (*self._sampled.draw(generator), uniform(N_SAMPLED_RAYS, 1))
        else:
            n, size = self.state.n_views, self._view_size
            reach = torch.full((), azimuth_reach(self.progress, self.config), device=device)
            views = (uniform(4, n), reach, uniform(n * size**2, 1), self._draw_guidance(n))
        fade = torch.full((), self.fade, device=device)
        return Draws(reference, fade, views, self.state.field.draw_smoothness(generator))

    @cached_property
    def _sampled(self) -> SampledViews:
        return SampledViews.of(self.state, self.condition)

    @property
    def _view_size(self) -> int:
        return self.config.render.fine_size if self.is_fine else self.config.render.size

    @property
    def _done(self) -> float:
        """Part of the distillation done, as guidance counts it: the fine stage goes from 1 to 2."""
        if self.is_fine:
            return 1 + (self.state.step + 1 - self.n_coarse) / self.config.optimize.fine_steps
        return (self.state.step - self.n_warm) / max(1, self.config.optimize.n_steps)

    def _draw_guidance(self, n: int) -> tuple[Any, ...]:
        if isinstance(self.guidance, SplitGuidance):
            return self.guidance.draw(n, self._done, self.generator)
        return ()

    # The device's part

    def _on_device(self, *draws: Any) -> dict[str, Tensor]:
        """One step as a function of tensors alone; what it reads besides them is the state and `_structure`."""
        loss, terms = self._gradients(*draws)
        take_step(self.state, loss)
        return terms

    def _gradients(self, *draws: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The step up to the parameters' gradients: the loss, and its terms."""
        state, settings = self.state, self.config.optimize
        drawn = Draws(*draws)
        if not self._is_prepared:
            state.field.prepare()
        self._is_prepared = False
        state.adam.zero_grad()
        terms = self._reference_terms(drawn)
        rendering, of_views = self._fit(*drawn.views) if self.is_fit else self._distilled(*drawn.views)
        terms |= of_views
        if self.progress > ENTROPY_FROM:
            terms["entropy"] = settings.entropy_weight * losses.entropy_loss(rendering.opacities)
        if settings.distortion_weight:
            spread = distortion(rendering.weights, rendering.t_mids, rendering.steps)
            terms["distortion"] = settings.distortion_weight * spread.mean()
        terms["smooth"] = settings.smooth_weight * state.field.smoothness(*drawn.smooth)
        loss = sum(terms.values())
        loss.backward()
        return loss.detach(), {name: value.detach() for name, value in terms.items()}

    def _reference_terms(self, draws: Draws) -> dict[str, Tensor]:
        """Losses seen from the reference cameras: the mask always; the colors only where no constraint gives them."""
        settings, constraint = self.config.optimize, self.config.constraint
        terms: dict[str, Tensor] = {}
        for view, (unit, jitter) in zip(self.state.constrained.views, draws.reference):
            camera, mask = view.picture.camera, view.picture.mask
            rendering = self._render(*camera.rays(unit[0] * view.size), jitter)
            picture = torch.cat([view.picture.rgb * mask, mask])[None]
            wanted = F.grid_sample(picture, unit[None] * 2 - 1, align_corners=False)[0, :, 0].T
            mask_term = settings.mask_weight * losses.mask_loss(rendering.opacities, wanted[:, 3])
            terms["mask"] = terms.get("mask", 0) + mask_term
            if settings.distortion_weight:
                # Ten times that of other views, as NeuralLift-360: what the mask asks for must stand at one depth.
                spread = distortion(rendering.weights, rendering.t_mids, rendering.steps).mean()
                terms["gather"] = terms.get("gather", 0) + 10 * settings.distortion_weight * spread
            if constraint.kind == "loss":
                error = (rendering.rgb - wanted[:, :3]).square().mean()
                terms["picture"] = terms.get("picture", 0) + constraint.loss_weight * error
            if settings.depth_weight and view.picture.surface is not None and self.fade > 0:
                known = F.grid_sample(
                    view.picture.surface[None], unit[None] * 2 - 1, mode="nearest", align_corners=False
                )[0, 0, 0]
                is_usable = known.isfinite() & (rendering.opacities.detach() > 0.5)
                depth_loss = DEPTH_LOSSES[settings.depth_loss]
                depth_term = depth_loss(rendering.depths, known, is_usable)
                depth_term = torch.where(is_usable.sum() > N_DEPTHS, depth_term, 0.0)
                terms["depth"] = terms.get("depth", 0) + settings.depth_weight * draws.fade * depth_term
        return terms

    def _fit(self, pixels: Tensor, places: Tensor, jitter: Tensor) -> tuple[Rendering, dict[str, Tensor]]:
        """Random rays of the sampled views against what they should see."""
        origins, directions, wanted = self._sampled.rays(pixels, places)
        rendering = self._render(origins, directions, jitter)
        return rendering, {"fit": FIT_WEIGHT * losses.picture_loss(rendering.rgba, wanted)}

    def _distilled(
        self, numbers: Tensor, reach: Tensor, jitter: Tensor, draws: tuple[Any, ...]
    ) -> tuple[Rendering, dict[str, Tensor]]:
        """Random views against what the prior makes of them."""
        mine = self.ranks.share(numbers.shape[1])
        settings = self.config.optimize
        cameras = random_cameras(numbers, reach, self.state.half_frame, self.tangent, self._view_size, settings)[mine]
        draws, jitter = taken(draws, mine), jitter.view(numbers.shape[1], -1)[mine].reshape(-1, 1)
        rendering = self._render(*cameras.rays(), jitter)
        rgba = _as_pictures(rendering.rgba, cameras)
        gradient = self._guide(rgba.detach(), cameras, draws).gradient
        # Score distillation, arXiv:2209.14988, Eq. 3: a given gradient as the loss whose gradient it is.
        terms = {"sds": SDS_WEIGHT * (rgba * gradient).mean()}
        if self.likeness is not None:
            terms["clip"] = self.likeness.loss(rgba, cameras)
        return rendering, terms

    def _guide(self, rgba: Tensor, cameras: Camera, draws: tuple[Any, ...]) -> GuidanceResult:
        if isinstance(self.guidance, SplitGuidance):
            return self.guidance.distill(rgba, cameras, draws)
        assert self.guidance is not None, "a job without guidance has no such steps"
        return self.guidance.gradient(rgba, cameras, self._done, self.generator)

    def _render(self, origins: Tensor, directions: Tensor, jitter: Tensor) -> Rendering:
        state, n_samples = self.state, self.config.render.n_samples
        origins, directions = origins.reshape(-1, 3), directions.reshape(-1, 3)
        return render_rays(
            state.constrained, origins, directions, n_samples, state.occupancy, jitter, self.graphed.is_enabled
        )


def random_cameras(
    numbers: Tensor, reach: Tensor | float, half_frame: float, tangent: float, size: int, settings: OptimizeConfig
) -> Camera:
    """Views of one step: azimuths in equal sectors, of the part of the circle that `reach` says.

    Args:
        numbers: Uniform in [0, 1), four a view: (4, n).
        reach: See `azimuth_reach`.
        half_frame: Of the views in the middle of their random range.
        tangent: Of half their angle of view.
        size: Pixels a side.
    """
    n = numbers.shape[1]
    turn, place, height, closeness = numbers
    sectors = ((torch.arange(n, device=numbers.device) + place) / n + turn[:1]) % 1
    azimuths = (sectors * 2 - 1) * math.pi * reach
    low, high = math.radians(settings.elevation_min_deg), math.radians(settings.elevation_max_deg)
    half_frames = (0.95 + (1.08 - 0.95) * closeness) * half_frame
    return view_cameras(tangent, azimuths, low + (high - low) * height, half_frames, size)


def azimuth_reach(progress: float, config: PipelineConfig) -> float:
    """Part of the circle that views come from: it grows from around the picture to all around."""
    return min(1.0, 0.3 + 0.7 * progress / max(config.optimize.range_grows_until, 1e-6))


def _as_pictures(values: Tensor, cameras: Camera) -> Tensor:
    """(n * height * width, c) as (n, c, height, width)."""
    return values.view(len(cameras), cameras.height, cameras.width, -1).permute(0, 3, 1, 2)


def set_learning_rate(state: State, n_done: int, n_steps: int) -> None:
    """A short warm-up, then constant, then falling to a tenth over the last two fifths of a stage."""
    progress = n_done / max(1, n_steps)
    factor = min(1.0, (n_done + 1) / 20) * (1.0 if progress < 0.6 else 1 - 0.9 * (progress - 0.6) / 0.4)
    for group in state.adam.param_groups:
        rate = group["initial_lr"] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def take_step(state: State, loss: Tensor) -> None:
    """Let Adam take the step, unless the loss or a gradient is not finite: then nothing changes, and the step is counted."""
    gradients = [p.grad for p in state.field.parameters() if p.grad is not None]
    # A gradient's largest number is finite only if all are, and takes one pass over memory where `isfinite` takes five.
    largest = [torch.linalg.vector_norm(g, math.inf) for g in gradients]
    is_bad = ~torch.stack([loss, *largest]).isfinite().all()
    state.adam.step(is_bad)
    state.skipped[0].add_(is_bad)
    state.skipped[1].add_(1).mul_(is_bad)
