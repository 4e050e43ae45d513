"""A coarse grid that remembers where the field is empty, so that those samples are never evaluated."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .interfaces import Field

EMA_DECAY = 0.9
"""A cell's largest density seen fades by this factor each update (nerfacc uses 0.95 every 16 steps)."""


class OccupancyGrid(nn.Module):
    """Cells of the field's box with a running maximum of their density."""

    def __init__(self, aabb: Float[Tensor, "2 3"], resolution: int, threshold: float) -> None:
        """
        Args:
            aabb: Lower and upper corner of the box.
            resolution: Cells along each side.
            threshold: Density per world unit under which a cell counts as empty.
        """
        super().__init__()
        self.resolution, self.threshold = resolution, threshold
        self.register_buffer("aabb", aabb.clone())
        self.register_buffer("densities", torch.full((resolution**3,), float("inf"), device=aabb.device))
        self.register_buffer("is_occupied", torch.ones(resolution**3, dtype=torch.bool, device=aabb.device))

    def cells(self, positions: Float[Tensor, "*n 3"]) -> Tensor:
        """Flat cell numbers of positions; positions outside the box take the nearest cell."""
        size = self.aabb[1] - self.aabb[0]
        index = ((positions - self.aabb[0]) / size * self.resolution).int().clamp_(0, self.resolution - 1)
        x, y, z = index.unbind(-1)
        return (x * self.resolution + y) * self.resolution + z

    def contains(self, positions: Float[Tensor, "*n 3"]) -> Bool[Tensor, "*n"]:
        """Whether positions lie in occupied cells."""
        return self.is_occupied[self.cells(positions)]

    @torch.no_grad()
    def update(self, field: Field, generator: torch.Generator | None = None) -> None:
        """Look at one random point of every cell and let older observations fade."""
        device = self.aabb.device
        axis = torch.arange(self.resolution, device=device)
        corners = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
        jitter = torch.rand(corners.shape, generator=generator, device=device)
        positions = self.aabb[0] + (corners + jitter) / self.resolution * (self.aabb[1] - self.aabb[0])
        found = torch.cat([field.density(chunk) for chunk in positions.split(1 << 20)])
        older = torch.where(self.densities.isinf(), 0.0, self.densities * EMA_DECAY)
        # In place, here and below: a captured step reads the grid where it was captured.
        torch.maximum(older, found, out=self.densities)
        # A neighbour of an occupied cell stays open, so that a surface can move into it.
        grid = (self.densities > self.threshold).view(1, 1, *[self.resolution] * 3).float()
        self.is_occupied.copy_(torch.nn.functional.max_pool3d(grid, 3, 1, 1).flatten() > 0)
