"""From a density field to a surface: marching cubes on a level set that respects the pictures' outlines.

The field knows the surface to about one of its own cells. The picture knows the outline to a fraction of a pixel. So a signed
distance to the surface of one density, positive inside, is changed in four steps:

- parts of a silhouette that the surface misses (a thin leg weaker than the level) get a body where their rays met the field,
  and so do wires (`threads`), which are narrower than cells;
- near the outline the surface moves outward or inward until its silhouette is the mask's;
- straight slender parts become round (`bars`);
- what still stands out of a silhouette's cone (the visual hull) is cut off.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain

import mcubes
import numpy as np
import torch
from jaxtyping import Float
from scipy.ndimage import binary_dilation, distance_transform_edt, gaussian_filter, label, maximum_filter, median_filter
from torch import Tensor

from ..cameras import Camera
from ..config import MeshConfig
from ..errors import MeshError
from .bars import find_bars
from .bridge import MAX_GAP, SLACK_CELLS, join_parts
from .mesh import Mesh
from .outline import (
    REACH_CELLS,
    SILHOUETTE,
    SurfaceView,
    continued,
    hull_distances,
    lookup,
    outline_correction,
    outline_distances,
    resized_nearest,
    silhouette,
    surface_distances,
)
from .raster import rasterize
from .threads import Threads

log = logging.getLogger(__name__)

COARSE_CELLS = 40
LEVELS = (2.0, 4.0, 7.0, 11.0, 16.0, 22.0, 30.0, 42.0)
"""Densities tried as the surface, per world unit."""
LEVEL_TOLERANCE = 0.005
"""Silhouette IoU under the best one's that still counts as equal."""
BLIND_LEVEL = 16.0
"""The one taken where no picture says which is right."""
N_OUTLINE_ROUNDS = 2
"""Times that the outline is bent towards the masks; the second one corrects what perspective and overlaps left."""
RIM_PX = 5
"""A gap no wider than this, at `SILHOUETTE`, is the outline's error and no missing part."""
BREAK_SHARE, BREAK_PIXELS = 0.8, 12
"""Unless it is as thick as this share of the mask beside it, and as large: then something thin is broken there."""
CHUNK = 1 << 20
SHEET_CELLS, MAX_BODY_CELLS = 1.2, 5.0
"""Half thickness, in cells, of what fills missing parts: marching cubes still sees the least one."""
MARGIN_CELLS = 12
"""Farther from the surface than this nothing is looked at: half as much again as the rounds of the outline move it by."""
NO_SURFACE = "the field has no surface: the optimisation found nothing solid; try more steps or another seed"


@dataclass(frozen=True)
class Extracted:
    mesh: Mesh
    level: float
    """Density of the surface."""


@dataclass(frozen=True)
class _Grid:
    """Cell corners of a box: `positions` (n, 3) in x-major order, `shape`, and the cell's side."""

    low: np.ndarray
    shape: tuple[int, ...]
    cell: float
    first: tuple[int, ...] = (0, 0, 0)
    """The first corner, in cells from `low`. Not 0 in a part of a grid, whose corners are the whole's to the last bit."""

    @property
    def corner(self) -> np.ndarray:
        """Position (3,) of the first corner."""
        return self.low + np.array(self.first) * self.cell

    def positions(self) -> Tensor:
        axes = [
            torch.arange(first, first + n, dtype=torch.float32) * self.cell + float(low)
            for first, n, low in zip(self.first, self.shape, self.low)
        ]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)

    def part(self, box: tuple[slice, ...]) -> _Grid:
        first = tuple(start + side.start for start, side in zip(self.first, box))
        return replace(self, first=first, shape=tuple(side.stop - side.start for side in box))

    def evaluate(self, function: Callable[[Tensor], Tensor]) -> np.ndarray:
        values = [function(chunk).float().cpu() for chunk in self.positions().split(CHUNK)]
        return torch.cat(values).view(self.shape).numpy()

    def box_where(self, distances: Callable[[Tensor], Tensor], least: float) -> tuple[slice, ...]:
        """A box that holds the corners where distances to something are above `least`, found by every fourth corner."""
        step = 4
        shape = tuple((n + 2 * step - 2) // step for n in self.shape)  # the last one is at the end or beyond
        coarse = _Grid(self.corner, shape, self.cell * step).evaluate(distances)
        # No corner is farther from the next one of these than their cell's half diagonal.
        box = _box_around(coarse > least - math.sqrt(3) / 2 * step * self.cell, 1)
        return tuple(slice(s.start * step, min(max(s.stop * step - step + 1, 0), n)) for s, n in zip(box, self.shape))

    def surface(self, level_set: np.ndarray) -> Mesh:
        """Triangles of level_set = 0, counterclockwise from outside (where it is negative)."""
        inside = level_set >= 0
        if not inside.any():
            return Mesh(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int32))
        box = _box_around(inside, 1)  # marching cubes takes as long for empty cells as for others
        # A border of outside closes surfaces that reach the box.
        padded = np.pad(level_set[box], 1, constant_values=-self.cell)
        vertices, faces = mcubes.marching_cubes(padded, 0.0)
        vertices = (vertices + (np.array(self.part(box).first) - 1)) * self.cell + self.low
        return Mesh(vertices.astype(np.float32), faces.astype(np.int32))


def _box_around(chosen: np.ndarray, margin: int) -> tuple[slice, ...]:
    """The box of the true cells with a margin, as far as the array goes; empty where there are none."""
    box = []
    for axis in range(chosen.ndim):
        found = np.flatnonzero(chosen.any(tuple(other for other in range(chosen.ndim) if other != axis)))
        low, high = (found[0] - margin, found[-1] + 1 + margin) if len(found) else (0, 0)
        box.append(slice(max(int(low), 0), min(int(high), chosen.shape[axis])))
    return tuple(box)


def _grid_over(low: np.ndarray, high: np.ndarray, n_cells: int) -> _Grid:
    """A grid with cubic cells, `n_cells` along the longest side."""
    cell = float((high - low).max()) / n_cells
    shape = tuple(int(n) for n in np.ceil((high - low) / cell).astype(int) + 1)
    return _Grid(low, shape, cell)


def extract_mesh(
    density: Callable[[Tensor], Tensor],
    aabb: Float[Tensor, "2 3"],
    config: MeshConfig,
    views: list[SurfaceView],
    may_move: bool = False,
) -> Extracted:
    """The surface of a density field, its outline as in the pictures.

    Args:
        density: σ of positions (n, 3).
        aabb: The field's box.
        views: Pictures with their silhouettes; the first one's chooses the level. May be empty.
        may_move: Whether parts may change their depth; see `bridge`.

    Raises:
        MeshError: Nothing reaches the level.
    """
    device = aabb.device
    on_device = lambda p: density(p.to(device))  # noqa: E731
    met = [_met_points(view) for view in views]
    with torch.no_grad():
        whole = _tight_grid(on_device, aabb.cpu().numpy(), config.resolution, met)
        densities = whole.evaluate(on_device)
    needed = _needed_box(whole, densities, min(LEVELS[0], config.level or LEVELS[0]), met)
    grid, densities = whole.part(needed), densities[needed]
    level = config.level if config.level > 0 else _best_level(grid, densities, views)
    values = surface_distances(_level_set(densities, level, grid.cell), grid.cell)
    mesh = grid.surface(values)
    threads = [Threads.of(view, grid.cell) for view in views]
    for view, thin in zip(views, threads):
        weaker = (_level_set(densities, lower, grid.cell) for lower in reversed(LEVELS) if lower < level)
        values, mesh = _with_missing_parts(values, mesh, weaker, grid, view, thin)
    for _ in range(N_OUTLINE_ROUNDS if views else 0):
        values = values + np.sum(
            [grid.evaluate(outline_correction(mesh, view, SILHOUETTE, grid.cell)) for view in views], axis=0
        )
        mesh = grid.surface(values)
        for view, thin in zip(views, threads):  # where an outline came in from two sides it may have opened a hole
            values, mesh = _with_missing_parts(values, mesh, [], grid, view, thin)
    if config.round_bars and len(views) == 1:  # others would know how deep its bars are
        bars = find_bars(mesh, views[0], threads[0].mask, may_move)
        if bars is not None:
            values = bars.put_into(torch.from_numpy(values).flatten(), grid.positions()).view(grid.shape).numpy()
            values, mesh = _with_missing_parts(values, grid.surface(values), [], grid, views[0], threads[0])
    if views:
        cones = [grid.evaluate(hull_distances(view.mask, view.camera)) for view in views]
        wider = [
            np.maximum(cone, grid.evaluate(thin.room)) if thin.mask.any() else cone
            for cone, thin in zip(cones, threads)
        ]
        hull, room = np.minimum.reduce(wider), np.minimum.reduce(cones) + SLACK_CELLS * grid.cell
        values = np.minimum(values, hull)
        if config.max_components == 1:
            longest_rod = MAX_GAP * max(whole.shape)
            cameras = [view.camera for view in views]
            values = join_parts(values, hull, room, grid.cell, grid.corner, cameras, longest_rod, may_move)
        mesh = grid.surface(values)
    if not len(mesh.faces):
        raise MeshError(NO_SURFACE)
    return Extracted(mesh, level)


def _best_level(grid: _Grid, densities: np.ndarray, views: list[SurfaceView]) -> float:
    """The level whose silhouette, not yet cut by any mask, is like the first view's mask.

    A low level is too fat: the masks would hide that from their own cameras, and leave flat sides along their rays. A high
    one breaks thin parts, so of nearly equal levels the lowest is taken.
    """
    levels = [level for level in LEVELS if level < densities.max()]
    if not levels:
        raise MeshError(NO_SURFACE)
    if not views:
        return min(levels, key=lambda level: abs(level - BLIND_LEVEL))

    def score(level: float) -> float:
        return _silhouette_iou(grid.surface(_level_set(densities, level, grid.cell)), views[0])

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        scores = list(threads.map(score, levels))
    log.info("surface levels %s match the silhouette by %s", levels, [round(score, 3) for score in scores])
    return next(level for level, score in zip(levels, scores) if score >= max(scores) - LEVEL_TOLERANCE)


def _tight_grid(density: Callable[[Tensor], Tensor], aabb: np.ndarray, n_cells: int, met: list[np.ndarray]) -> _Grid:
    """A grid around everything that could be surface, or that a silhouette says must be: `met`, points (n, 3)."""
    coarse = _grid_over(aabb[0], aabb[1], COARSE_CELLS)
    occupied = np.argwhere(coarse.evaluate(density) > LEVELS[0] / 4)
    if not len(occupied):
        raise MeshError(NO_SURFACE)
    points = np.concatenate([coarse.low + occupied * coarse.cell, *met])
    low, high = points.min(0) - coarse.cell, points.max(0) + coarse.cell
    return _grid_over(np.maximum(low, aabb[0]), np.minimum(high, aabb[1]), n_cells)


def _needed_box(grid: _Grid, densities: np.ndarray, level: float, met: list[np.ndarray]) -> tuple[slice, ...]:
    """The part of a grid around what is above a level and around `met`, often a fifth of it: the coarse look takes in fog."""
    needed = densities > level
    for points in met:
        cells = np.round((points - grid.low) / grid.cell).astype(int)
        needed[tuple(np.clip(cells, 0, np.array(grid.shape) - 1).T)] = True
    if not needed.any():
        raise MeshError(NO_SURFACE)
    return _box_around(needed, MARGIN_CELLS)


def _met_points(view: SurfaceView) -> np.ndarray:
    """World points (n, 3) on the rays of the mask, where the field's surface was met there or nearby."""
    camera, mask = view.resized(max(view.distances.shape))
    origins, directions = camera.to("cpu", torch.float32).rays()
    distances = torch.from_numpy(_filled(resized_nearest(view.distances, mask.shape), mask)).flatten()[:, None]
    return (origins + distances * directions).numpy()[(mask.ravel() > 0.5) & np.isfinite(view.distances).any()]


def _level_set(densities: np.ndarray, level: float, cell: float) -> np.ndarray:
    """Positive where the density is above the level, about linear near its surface."""
    # The logarithm of a softplus blob is about linear near its surface; two cells either way are enough.
    values = np.clip(np.log(np.maximum(densities, 1e-4) / level), -2, 2) * cell
    return gaussian_filter(values, 0.7).astype(np.float32)


def _silhouette_iou(mesh: Mesh, view: SurfaceView) -> float:
    covered, soft = silhouette(mesh, view, SILHOUETTE)
    mask = soft > 0.5
    return float((covered & mask).sum() / max((covered | mask).sum(), 1))


def _with_missing_parts(
    values: np.ndarray, mesh: Mesh, weaker: Iterable[np.ndarray], grid: _Grid, view: SurfaceView, threads: Threads
) -> tuple[np.ndarray, Mesh]:
    """The level set united, over every part of the silhouette that it leaves open, with the first that closes it.

    Args:
        mesh: The surface of `values`; that of the answer comes back with it.
        weaker: Level sets of ever lower densities; when none is left, a body takes their place.
    """
    camera, soft = view.resized(SILHOUETTE)
    for candidate in chain(weaker, [None]):
        front = rasterize(mesh.vertices, mesh.faces, camera).z_depths
        # Slices of a weaker level set would leave frays where only a bit is missing.
        open_part = _open_part(front > 0, (soft > 0.5) & ~threads.mask, with_breaks=candidate is None)
        if not open_part.any():
            break
        log.info("the surface leaves %.1f %% of a silhouette open", 100 * open_part.sum() / (soft > 0.5).sum())
        part = _bodies(view, threads, front, grid) if candidate is None else _slices(candidate, grid)
        values = _united(values, part, open_part, camera, grid)
        mesh = grid.surface(values)
    if threads.mask.any():
        front = rasterize(mesh.vertices, mesh.faces, camera).z_depths
        broken = threads.broken(front > 0)
        if broken.any():
            part = _bodies(view, threads, np.where(broken, 0, front), grid)
            values = _united(values, part, binary_dilation(broken, iterations=RIM_PX), camera, grid)
            mesh = grid.surface(values)
    return values, mesh


def _united(
    values: np.ndarray, part: Callable[[tuple[slice, ...]], np.ndarray], area: np.ndarray, camera: Camera, grid: _Grid
) -> np.ndarray:
    """The level set united with another, whose values in a box `part` says, within an area of a camera's picture."""
    cone = hull_distances(area.astype(np.float32), camera)
    box = grid.box_where(cone, -MARGIN_CELLS * grid.cell)
    values = values.copy()
    values[box] = np.maximum(values[box], np.minimum(part(box), grid.part(box).evaluate(cone)))
    return values


def _slices(level_set: np.ndarray, grid: _Grid) -> Callable[[tuple[slice, ...]], np.ndarray]:
    return lambda box: surface_distances(level_set[box], grid.cell)


def _bodies(
    view: SurfaceView, threads: Threads, front: np.ndarray, grid: _Grid
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    body = _body(view, threads, front, grid.cell)
    return lambda box: grid.part(box).evaluate(body)


def _open_part(covered: np.ndarray, mask: np.ndarray, with_breaks: bool) -> np.ndarray:
    """Pixels of the mask's parts that the surface misses, with a margin to join them to it; a mere rim is none.

    A rim is thin, and thinner than the mask is beside it. A break in a rung is as thick as the rung; those count `with_breaks`.
    """
    if not covered.any():
        return binary_dilation(mask, iterations=RIM_PX)
    parts, _ = label(mask & ~covered)
    far_out, deep = distance_transform_edt(~covered), distance_transform_edt(mask)
    wide = np.unique(parts[(parts > 0) & ((far_out > RIM_PX) | (deep > RIM_PX))])
    missing = np.isin(parts, wide)
    if with_breaks:
        is_break = (deep >= BREAK_SHARE * maximum_filter(deep, 2 * RIM_PX + 1)) & (deep > 1)
        is_break &= (parts > 0) & (np.bincount(parts.ravel()) >= BREAK_PIXELS)[parts]
        missing |= binary_dilation(is_break, iterations=RIM_PX) & (parts > 0)
    return binary_dilation(missing, iterations=RIM_PX) if missing.any() else missing


def _body(view: SurfaceView, threads: Threads, front: np.ndarray, cell: float) -> Callable[[Tensor], Tensor]:
    """Signed distance inside a body as thick as its silhouette is wide, up to a slab, that grows out of the surface.

    Args:
        front: z-depths of the surface so far, 0 where it is open.
    """
    camera, soft = view.resized(SILHOUETTE)
    camera = camera.to("cpu", torch.float32)
    along_axis = (camera.rays()[1] @ camera.forward).view(soft.shape).numpy()
    known = (front > 0) & (soft > 0.5)
    met = _filled(resized_nearest(view.distances, soft.shape), soft)
    size = float(np.median(met)) / float(camera.intrinsics[0])
    inside = np.maximum(np.maximum(outline_distances(soft), threads.distances), 0) * size
    half_width = maximum_filter(inside, 2 * int(np.ceil(MAX_BODY_CELLS * cell / size)) + 1)
    half_width = np.clip(half_width, SHEET_CELLS * cell, MAX_BODY_CELLS * cell)
    distances = np.where(known, front / along_axis + half_width, np.nan)
    # Rays through a wire mostly met nothing: what is said of them there counts as far as its ends are.
    hint = threads.clipped(met, distances)
    middle = continued(distances, soft > 0.5, hint)

    def evaluate(positions: Tensor) -> Tensor:
        center, z_depths = lookup(middle, camera, positions)
        half, _ = lookup(half_width, camera, positions)
        from_rim, _ = lookup(inside, camera, positions)
        signed = half - torch.hypot(camera.distances(positions) - center, (half - from_rim).clamp(min=0))
        return torch.where(z_depths > 0, signed, -REACH_CELLS * cell)

    return evaluate


def _filled(distances: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Every pixel's distance, without outliers; those without one take the nearest pixel's of the object."""
    known = np.isfinite(distances) & (mask > 0.3)
    if not known.any():
        return np.full(distances.shape, 1e6, np.float32)
    nearest = distance_transform_edt(~known, return_distances=False, return_indices=True)
    return median_filter(distances[tuple(nearest)], 3).astype(np.float32)
