"""Threads: what a picture shows narrower than a grid's cells, such as wires and strings.

Cut along its outline a thread is lost between the cells. It is kept a little wider instead, and the outline is fitted once more
to the finished triangles, which may be as thin as they like.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.ndimage import distance_transform_edt, label, maximum, minimum
from torch import Tensor

from ..cameras import Camera
from .lines import ANY_NEIGHBOR, narrower_than
from .outline import SILHOUETTE, SurfaceView, lookup, outline_distances

THREAD_CELLS = 1.5
"""What is narrower is a thread."""
WIDENING_CELLS = 0.7
"""Threads stand out of their outline by so much on either side: the corner of some cell is always inside."""
LEAST_PIXELS = 12
"""Smaller ones, or ones smaller than the square of half a thread's width, are the tips of corners."""
BESIDE_PX = 5
"""What is so near to a thread tells where its ends are."""
COVERED_SHARE = 0.95
"""A thread of which a surface covers less is broken."""


@dataclass(frozen=True)
class Threads:
    """The threads of one picture, `SILHOUETTE` pixels along its longer side."""

    camera: Camera
    mask: Bool[np.ndarray, "h w"]
    distances: Float[np.ndarray, "h w"]
    """Signed distances to their widened outline, pixels, positive inside."""

    @staticmethod
    def of(view: SurfaceView, cell: float) -> Threads:
        camera, soft = view.resized(SILHOUETTE)
        known = view.distances[np.isfinite(view.distances)]
        # Nothing was met, nothing is known of how large a cell looks: no threads.
        cell_px = cell * float(camera.intrinsics[0]) / float(np.median(known)) if len(known) else 0.0
        mask = find_threads(soft > 0.5, cell_px)
        return Threads(camera, mask, widened(mask, soft > 0.5, WIDENING_CELLS * cell_px))

    def room(self, positions: Float[Tensor, "n 3"]) -> Float[Tensor, " n"]:
        """Signed distances of points inside the cones of the widened threads, world units."""
        pixels, z_depths = lookup(self.distances, self.camera, positions)
        return torch.where(z_depths > 0, pixels * z_depths / float(self.camera.intrinsics[0]), -1.0)

    def broken(self, covered: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
        """The threads that a surface does not cover from end to end, but for a small part."""
        parts, n_parts = label(self.mask, ANY_NEIGHBOR)
        shares = np.bincount(parts[covered], minlength=n_parts + 1) / np.bincount(parts.ravel()).clip(min=1)
        return self.mask & (shares < COVERED_SHARE)[parts]

    def clipped(self, values: Float[np.ndarray, "h w"], known: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
        """Values with each thread's between the least and the largest that is known (not nan) beside it, if any is."""
        parts, n_parts = label(self.mask, ANY_NEIGHBOR)
        if not n_parts:
            return values
        far, nearest = distance_transform_edt(~self.mask, return_indices=True)
        beside = np.where(np.isfinite(known) & (far <= BESIDE_PX), parts[tuple(nearest)], 0)
        chosen = beside > 0
        if not chosen.any():
            return values
        low, high = np.full(n_parts + 1, -np.inf), np.full(n_parts + 1, np.inf)
        found = np.unique(beside[chosen])
        low[found] = minimum(known[chosen], beside[chosen], found)
        high[found] = maximum(known[chosen], beside[chosen], found)
        return np.clip(values, low[parts], high[parts])


def find_threads(mask: Bool[np.ndarray, "h w"], cell_px: float) -> Bool[np.ndarray, "h w"]:
    """The parts of a silhouette that no disk of `THREAD_CELLS` fits into."""
    reach = THREAD_CELLS / 2 * cell_px
    thin = narrower_than(2 * reach, distance_transform_edt(mask))
    parts, _ = label(thin, ANY_NEIGHBOR)
    return thin & (np.bincount(parts.ravel()) >= max(LEAST_PIXELS, reach**2))[parts]


def widened(threads: Bool[np.ndarray, "h w"], mask: Bool[np.ndarray, "h w"], by_px: float) -> Float[np.ndarray, "h w"]:
    """Signed distances to the widened outline of threads; the holes of nets, which they would close, stay outside."""
    distances = outline_distances(threads.astype(np.float32)) + by_px
    outside = distance_transform_edt(~mask)
    holes, n_holes = label(~mask)
    is_small = maximum(outside, holes, np.arange(n_holes + 1)) <= 2 * by_px
    return np.where(is_small[holes] & ~mask, -outside, distances).astype(np.float32)
