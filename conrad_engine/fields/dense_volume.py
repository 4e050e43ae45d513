"""A radiance field as a pyramid of dense grids: the fastest one on a CPU, and enough for priors of 64 px."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..config import FieldConfig, OptimizeConfig

EMPTY_RAW = -10.0
"""Raw density of empty space: its softplus is 4.5e-5."""


class _Roughness(torch.autograd.Function):
    """Sum over the spatial axes of the mean squared difference of neighbors, its gradient made along the way.

    Torch's own derivative fills and adds whole volumes for every slice of one: twice the time.
    """

    @staticmethod
    def forward(ctx, volume: Float[Tensor, "1 c z y x"]) -> Float[Tensor, ""]:
        total, gradient = volume.new_zeros(()), torch.zeros_like(volume)
        for axis in (2, 3, 4):
            steps = volume.diff(dim=axis)
            n = steps.shape[axis]
            total += steps.square().mean()
            gradient.narrow(axis, 1, n).add_(steps, alpha=2 / steps.numel())
            gradient.narrow(axis, 0, n).sub_(steps, alpha=2 / steps.numel())
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, weight: Float[Tensor, ""]) -> Float[Tensor, "1 c z y x"]:
        return ctx.saved_tensors[0] * weight


class DenseVolume(nn.Module):
    """Raw density and raw color on grids of doubling size, summed at the finest.

    Coarse grids move whole regions at once, fine ones add detail, and a step of the optimiser moves all of them: the sum
    converges in far fewer steps than the finest grid alone.
    """

    can_be_captured = True
    """In a CUDA graph."""

    def __init__(self, config: FieldConfig, aabb: Float[Tensor, "2 3"]) -> None:
        """
        Args:
            config: Size of the grids and the initial blob.
            aabb: Box of the field in the object frame; cells are cubes of its longest side over `config.resolution`.
        """
        super().__init__()
        self.config = config
        self.density_scale = config.density_scale
        self.register_buffer("aabb", aabb.float())
        sides = aabb[1] - aabb[0]
        self.cell = float(sides.max()) / config.resolution
        finest = [max(2, round(float(side) / self.cell)) for side in sides.flip(0)]  # z, y, x
        n_levels = 1
        while config.resolution / 2**n_levels >= config.coarsest:
            n_levels += 1
        shapes = [[max(2, round(n / 2**level)) for n in finest] for level in reversed(range(n_levels))]
        device = aabb.device
        self.grids = nn.ParameterList(torch.zeros(1, 4, *shape, device=device) for shape in shapes)
        radius = self.centers().norm(dim=-1)
        # Magic3D's blob: raw density falls linearly from the center, so that empty space is really empty.
        blob = config.blob_density * (1 - radius / config.blob_radius)
        self.register_buffer("base", blob.clamp(min=EMPTY_RAW)[None, None])
        self._volume: Tensor | None = None

    def centers(self) -> Float[Tensor, "z y x 3"]:
        """Positions of the finest cells' centers."""
        shape = self.grids[-1].shape[2:]
        axes = [
            (torch.arange(n, device=self.aabb.device) + 0.5) / n * (high - low) + low
            for n, low, high in zip(shape, self.aabb[0].flip(0), self.aabb[1].flip(0))
        ]
        z, y, x = torch.meshgrid(*axes, indexing="ij")
        return torch.stack([x, y, z], -1)

    def prepare(self) -> None:
        """Sum the grids once for all look-ups until the parameters change; call it at the start of every step."""
        # Before the new sum is made: as long as the old one lives, the grids' gradients are added up on its stream, which
        # a CUDA graph must not be made to wait for.
        self._volume = None
        total = self.grids[0]
        for grid in self.grids[1:]:
            total = F.interpolate(total, size=grid.shape[2:], mode="trilinear") + grid
        self._volume = torch.cat([total[:, :1] + self.base, total[:, 1:]], 1)

    @property
    def volume(self) -> Float[Tensor, "1 4 z y x"]:
        """Raw density and raw colors at the finest size."""
        if self._volume is None:
            self.prepare()
        return self._volume

    def _raw(self, positions: Float[Tensor, "n 3"], channels: slice) -> Float[Tensor, "c n"]:
        grid = (positions - self.aabb[0]) / (self.aabb[1] - self.aabb[0]) * 2 - 1
        volume = self.volume[:, channels]
        raw = F.grid_sample(volume, grid[None, None, None], align_corners=False, padding_mode="border")[0, :, 0, 0]
        inside = (grid.abs() <= 1).all(-1)
        return torch.cat([torch.where(inside, raw[:1], EMPTY_RAW), raw[1:]]) if channels.start == 0 else raw

    def _activate(self, raw: Tensor) -> Tensor:
        return self.density_scale * F.softplus(raw)

    def density(self, positions: Float[Tensor, "n 3"]) -> Float[Tensor, " n"]:
        return self._activate(self._raw(positions, slice(0, 1))[0])

    def density_and_color(self, positions: Float[Tensor, "n 3"]) -> tuple[Tensor, Tensor]:
        raw = self._raw(positions, slice(0, 4))
        return self._activate(raw[0]), raw[1:].sigmoid().T

    def set_progress(self, progress: float) -> None:
        """Every level is active from the start; the pyramid itself is the coarse-to-fine scheme."""

    def draw_smoothness(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """The random numbers of `smoothness`: none."""
        return ()

    def smoothness(self) -> Tensor:
        """Mean squared difference of neighbouring cells of the summed grid."""
        return _Roughness.apply(self.volume)

    def parameter_groups(self, config: OptimizeConfig) -> list[dict]:
        return [{"params": list(self.grids.parameters()), "lr": config.rate}]

    @torch.no_grad()
    def initialize(self, signed_distances: Float[Tensor, "x y z"]) -> None:
        """Start from a shape instead of the blob.

        Args:
            signed_distances: World units, positive inside, on a grid over the field's box with values at cell centers.
        """
        finest = self.grids[-1].shape[2:]
        inside = F.interpolate(
            signed_distances.permute(2, 1, 0)[None, None].to(self.base), size=finest, mode="trilinear"
        )
        self.base.copy_((inside / self.cell * 3).clamp(EMPTY_RAW, 6.0))
        self._volume = None
