"""Renders a field: samples along rays, empty space left out, colors and opacities composited."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..cameras import Camera
from .compositing import render_weights
from .interfaces import Field
from .occupancy import OccupancyGrid


@dataclass(frozen=True)
class Rendering:
    """What rays see. Colors are premultiplied: background shows through by 1 - opacity."""

    rgb: Float[Tensor, "n_rays 3"]
    opacities: Float[Tensor, " n_rays"]
    weights: Float[Tensor, "n_rays n_samples"]
    t_starts: Float[Tensor, "n_rays n_samples"]
    steps: Float[Tensor, "n_rays 1"]

    @property
    def t_mids(self) -> Float[Tensor, "n_rays n_samples"]:
        return self.t_starts + self.steps / 2

    @property
    def rgba(self) -> Float[Tensor, "n_rays 4"]:
        return torch.cat([self.rgb, self.opacities[:, None]], -1)

    @property
    def depths(self) -> Float[Tensor, " n_rays"]:
        """Mean distance of the surface; 0 where a ray is empty."""
        return (self.weights * self.t_mids).sum(-1) / self.opacities.clamp(min=1e-6) * (self.opacities > 1e-3)


def box_intersections(
    origins: Float[Tensor, "n 3"], directions: Float[Tensor, "n 3"], aabb: Float[Tensor, "2 3"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Distances at which rays enter and leave a box; equal where they miss it."""
    safe = torch.where(directions.abs() < 1e-9, torch.full_like(directions, 1e-9), directions)
    a, b = (aabb[0] - origins) / safe, (aabb[1] - origins) / safe
    near = torch.minimum(a, b).amax(-1).clamp(min=1e-3)
    far = torch.maximum(a, b).amin(-1)
    return near, torch.maximum(far, near)


def sample_rays(
    origins: Float[Tensor, "n 3"],
    directions: Float[Tensor, "n 3"],
    aabb: Float[Tensor, "2 3"],
    n_samples: int,
    jitter: Float[Tensor, "n 1"] | None = None,
) -> tuple[Float[Tensor, "n n_samples"], Float[Tensor, "n 1"]]:
    """Equal intervals between a ray's entry into the box and its exit.

    Args:
        jitter: Uniform in [0, 1): shifts a ray's intervals together by this part of one, less a half.

    Returns:
        Starts of the intervals and their length.
    """
    near, far = box_intersections(origins, directions, aabb)
    steps = ((far - near) / n_samples)[:, None]
    starts = near[:, None] + steps * torch.arange(n_samples, device=origins.device)
    if jitter is not None:
        starts = starts + (jitter - 0.5) * steps
    return starts, steps


def render_rays(
    field: Field,
    origins: Float[Tensor, "n 3"],
    directions: Float[Tensor, "n 3"],
    n_samples: int,
    occupancy: OccupancyGrid | None = None,
    jitter: Float[Tensor, "n 1"] | None = None,
    is_static: bool = False,
) -> Rendering:
    """Render rays with gradients to the field.

    Args:
        occupancy: Samples in its empty cells see nothing; all do without it.
        jitter: See `sample_rays`.
        is_static: Evaluate the samples in empty cells, too, and leave them out afterwards. That costs more on a processor,
            but shapes depend on no values, so that the work can be captured in a CUDA graph.
    """
    t_starts, steps = sample_rays(origins, directions, field.aabb, n_samples, jitter)
    positions = origins[:, None] + (t_starts + steps / 2)[..., None] * directions[:, None]
    if occupancy is None or is_static:
        densities, colors = field.density_and_color(positions.reshape(-1, 3))
        densities = densities.view(t_starts.shape)
        if occupancy is not None:
            densities = torch.where(occupancy.contains(positions) & (steps > 0), densities, 0.0)
        weights, _ = render_weights(densities, steps)
        rgb = (weights[..., None] * colors.view(*t_starts.shape, 3)).sum(1)
        return Rendering(rgb, weights.sum(-1), weights, t_starts, steps)
    ray, sample = torch.nonzero(occupancy.contains(positions) & (steps > 0), as_tuple=True)
    found, colors = field.density_and_color(positions[ray, sample])
    densities = torch.zeros_like(t_starts).index_put((ray, sample), found)
    weights, _ = render_weights(densities, steps)
    rgb = torch.zeros_like(origins).index_add(0, ray, weights[ray, sample, None] * colors)
    return Rendering(rgb, weights.sum(-1), weights, t_starts, steps)


@torch.no_grad()
def render_density(
    field: Field,
    origins: Float[Tensor, "n 3"],
    directions: Float[Tensor, "n 3"],
    n_samples: int,
    occupancy: OccupancyGrid | None = None,
    is_static: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, starts and steps of rays from densities alone: what the depth rule needs. See `render_rays`."""
    t_starts, steps = sample_rays(origins, directions, field.aabb, n_samples)
    positions = origins[:, None] + (t_starts + steps / 2)[..., None] * directions[:, None]
    densities = torch.zeros_like(t_starts)
    if occupancy is None or is_static:
        densities = field.density(positions.reshape(-1, 3)).view(t_starts.shape)
        if occupancy is not None:
            densities = torch.where(occupancy.contains(positions), densities, 0.0)
    else:
        inside = occupancy.contains(positions)
        densities[inside] = field.density(positions[inside])
    return render_weights(densities, steps)[0], t_starts, steps


@dataclass(frozen=True)
class Picture:
    """A rendered picture; every array is (height, width, ...)."""

    rgb: Float[Tensor, "height width 3"]
    """Premultiplied."""
    opacities: Float[Tensor, "height width"]
    depths: Float[Tensor, "height width"]
    """Along the rays, world units; 0 where nothing is."""

    def on(self, background: float) -> Float[Tensor, "height width 3"]:
        """Composited over a gray level."""
        return (self.rgb + background * (1 - self.opacities[..., None])).clamp(0, 1)


@torch.no_grad()
def render_picture(
    field: Field,
    camera: Camera,
    n_samples: int,
    occupancy: OccupancyGrid | None = None,
    max_points: int = 4_000_000,
    early_stop: float = 1e-4,
    on_chunk: Callable[[], None] = lambda: None,
) -> Picture:
    """Render one camera without gradients, in chunks.

    Colors are evaluated only where a sample's weight exceeds `early_stop`: what lies behind an opaque surface
    costs a density only.

    Args:
        on_chunk: Called before each chunk; it may raise to stop.
    """
    parts = []
    all_origins, all_directions = camera.rays()
    n_rays = max(1, max_points // n_samples)
    for origins, directions in zip(all_origins.split(n_rays), all_directions.split(n_rays)):
        on_chunk()
        weights, t_starts, steps = render_density(field, origins, directions, n_samples, occupancy)
        ray, sample = torch.nonzero(weights > early_stop, as_tuple=True)
        distances = t_starts[ray, sample] + steps[ray, 0] / 2
        positions = origins[ray] + distances[:, None] * directions[ray]
        weight = weights[ray, sample, None]
        values = field.density_and_color(positions)[1]
        values = torch.cat([values, torch.ones_like(weight), distances[:, None]], -1)
        parts.append(values.new_zeros(len(origins), values.shape[-1]).index_add(0, ray, weight * values))
    image = torch.cat(parts).view(camera.height, camera.width, -1)
    opacities, depths = image[..., -2], image[..., -1]
    return Picture(image[..., :3], opacities, depths / opacities.clamp(min=1e-6))
