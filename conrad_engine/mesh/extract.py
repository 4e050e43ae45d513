"""From a density field to a surface: marching cubes on a level set that respects the pictures' outlines.

The field knows the surface to about one of its own cells. The picture knows the outline to a fraction of a pixel. So the level
set is f = min(max(field, sheet), hull), each a signed distance in world units, positive inside:

- field: log density against the level, in cells; zero where density equals the level.
- hull: how far a point lies inside the silhouette of every picture (the exact visual hull).
- sheet: a thin skin at the surface that each picture's rays met, so that every pixel of the object is covered even where a
  thin leg is weaker than the level.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import mcubes
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.ndimage import distance_transform_edt, gaussian_filter
from torch import Tensor

from ..cameras import Camera
from ..config import MeshConfig
from ..errors import MeshError
from .mesh import Mesh
from .raster import rasterize

log = logging.getLogger(__name__)

COARSE_CELLS = 40
LEVELS = (4.0, 8.0, 15.0, 25.0, 40.0)
"""Densities tried as the surface, per world unit."""
LEVEL_SILHOUETTE = 192
"""Pixels of the silhouettes by which levels are compared."""
CHUNK = 1 << 20
SHEET_CELLS = 1.0
"""Half thickness of the sheet in cells: marching cubes still sees it."""
NO_SURFACE = "the field has no surface: the optimisation found nothing solid; try more steps or another seed"


@dataclass(frozen=True)
class SurfaceView:
    """What one picture says of the surface."""

    camera: Camera
    """Object frame, with the pixels of `mask`."""
    mask: Float[np.ndarray, "height width"]
    """Soft alpha in [0, 1]."""
    distances: Float[np.ndarray, "h w"]
    """Ray distance at which the field's surface was met, any resolution; nan where it was not."""


@dataclass(frozen=True)
class Extracted:
    mesh: Mesh
    level: float
    """Density of the surface."""


@dataclass(frozen=True)
class _Grid:
    """Cell corners of a box: `positions` (n, 3) in x-major order, `shape`, and the cell's side."""

    low: np.ndarray
    shape: tuple[int, int, int]
    cell: float

    def positions(self) -> Tensor:
        axes = [torch.arange(n, dtype=torch.float32) * self.cell + float(low) for n, low in zip(self.shape, self.low)]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)

    def evaluate(self, function: Callable[[Tensor], Tensor]) -> np.ndarray:
        values = [function(chunk).float().cpu() for chunk in self.positions().split(CHUNK)]
        return torch.cat(values).view(self.shape).numpy()

    def surface(self, level_set: np.ndarray) -> Mesh:
        """Triangles of level_set = 0, counterclockwise from outside (where it is negative)."""
        # A border of outside closes surfaces that reach the box.
        padded = np.pad(level_set, 1, constant_values=-self.cell)
        vertices, faces = mcubes.marching_cubes(padded, 0.0)
        vertices = (vertices - 1) * self.cell + self.low
        return Mesh(vertices.astype(np.float32), faces.astype(np.int32))


def _grid_over(low: np.ndarray, high: np.ndarray, n_cells: int) -> _Grid:
    """A grid with cubic cells, `n_cells` along the longest side."""
    cell = float((high - low).max()) / n_cells
    shape = tuple(int(n) for n in np.ceil((high - low) / cell).astype(int) + 1)
    return _Grid(low, shape, cell)


def extract_mesh(
    density: Callable[[Tensor], Tensor], aabb: Float[Tensor, "2 3"], config: MeshConfig, views: list[SurfaceView]
) -> Extracted:
    """The surface of a density field, its outline as in the pictures.

    Args:
        density: σ of positions (n, 3).
        aabb: The field's box.
        views: Pictures with their silhouettes; the first one's chooses the level. May be empty.

    Raises:
        MeshError: Nothing reaches the level.
    """
    device = aabb.device
    with torch.no_grad():
        grid = _tight_grid(lambda p: density(p.to(device)), aabb.cpu().numpy(), config.resolution)
        densities = grid.evaluate(lambda p: density(p.to(device)))
        hull = np.minimum.reduce([_on_grid(grid, view, _hull) for view in views]) if views else None
        sheet = np.maximum.reduce([_on_grid(grid, view, _sheet) for view in views]) if views else None
    levels = [config.level] if config.level > 0 else [value for value in LEVELS if value < densities.max()]
    if not levels or densities.max() <= levels[0]:
        raise MeshError(NO_SURFACE)
    candidates = [(grid.surface(_level_set(densities, level, grid.cell, hull, sheet)), level) for level in levels]
    candidates = [(mesh, level) for mesh, level in candidates if len(mesh.faces)]
    if not candidates:
        raise MeshError(NO_SURFACE)
    if len(candidates) == 1 or not views:
        return Extracted(*candidates[len(candidates) // 2])
    # The sheet covers the mask at any level, so the level is judged without it: by the field's own silhouette.
    own = [grid.surface(_level_set(densities, level, grid.cell, hull, None)) for _, level in candidates]
    scores = [_silhouette_iou(mesh, views[0]) for mesh in own]
    log.info("surface levels %s match the silhouette by %s", levels, [round(s, 3) for s in scores])
    return Extracted(*candidates[int(np.argmax(scores))])


def _tight_grid(density: Callable[[Tensor], Tensor], aabb: np.ndarray, n_cells: int) -> _Grid:
    """A grid around everything that could be surface."""
    coarse = _grid_over(aabb[0], aabb[1], COARSE_CELLS)
    occupied = np.argwhere(coarse.evaluate(density) > LEVELS[0] / 4)
    if not len(occupied):
        raise MeshError(NO_SURFACE)
    low = coarse.low + (occupied.min(0) - 1) * coarse.cell
    high = coarse.low + (occupied.max(0) + 1) * coarse.cell
    return _grid_over(np.maximum(low, aabb[0]), np.minimum(high, aabb[1]), n_cells)


def _level_set(
    densities: np.ndarray, level: float, cell: float, hull: np.ndarray | None, sheet: np.ndarray | None
) -> np.ndarray:
    """Signed distances of one level, roughly; positive inside."""
    # The logarithm of a softplus blob is about linear near its surface; two cells either way are enough.
    values = np.clip(np.log(np.maximum(densities, 1e-4) / level), -2, 2) * cell
    values = gaussian_filter(values, 0.7)
    if sheet is not None:
        values = np.maximum(values, sheet)
    if hull is not None:
        values = np.minimum(values, hull)
    return values.astype(np.float32)


def _silhouette_iou(mesh: Mesh, view: SurfaceView) -> float:
    scale = LEVEL_SILHOUETTE / max(view.mask.shape)
    camera = view.camera.resized(round(view.camera.width * scale), round(view.camera.height * scale))
    covered = rasterize(mesh.vertices, mesh.faces, camera).faces >= 0
    mask = F.interpolate(torch.from_numpy(view.mask)[None, None], covered.shape, mode="area")[0, 0].numpy() > 0.5
    return float((covered & mask).sum() / max((covered | mask).sum(), 1))


def _on_grid(grid: _Grid, view: SurfaceView, function: Callable) -> np.ndarray:
    return grid.evaluate(function(view, grid.cell))


def _lookup(
    values: np.ndarray, camera: Camera, positions: Tensor, mode: str = "bilinear"
) -> tuple[Tensor, Tensor, Tensor]:
    """Values of a map that covers the camera's picture at projected positions, their z-depths, and which lie inside."""
    uv, z_depths = camera.to("cpu", torch.float32).project(positions)
    unit = uv / torch.tensor([camera.width, camera.height]) * 2 - 1
    table = torch.from_numpy(np.ascontiguousarray(values, np.float32))[None, None]
    found = F.grid_sample(table, unit[None, None], mode=mode, padding_mode="border", align_corners=False)[0, 0, 0]
    return found, z_depths, (unit.abs() <= 1).all(-1) & (z_depths > 0)


def _hull(view: SurfaceView, cell: float) -> Callable[[Tensor], Tensor]:
    """Signed distance inside the silhouette's cone, world units; open where the object leaves the picture."""
    inside = view.mask > 0.5
    # Distances run to pixel centers; half a pixel less reaches the outline, and soft alpha says where inside the pixel.
    pixels = np.where(inside, distance_transform_edt(inside) - 0.5, 0.5 - distance_transform_edt(~inside))
    rim = np.abs(pixels) < 1
    pixels = np.where(rim, view.mask - 0.5, pixels).astype(np.float32)
    focal = float(view.camera.intrinsics[:2].mean())

    def evaluate(positions: Tensor) -> Tensor:
        found, z_depths, _ = _lookup(pixels, view.camera, positions)
        return torch.where(z_depths > 0, found * z_depths / focal, 1.0)

    return evaluate


def _sheet(view: SurfaceView, cell: float) -> Callable[[Tensor], Tensor]:
    """Signed distance inside a skin of `SHEET_CELLS` at the distances that the picture's rays met."""
    distances = _filled(view.distances, _resized_mask(view.mask, view.distances.shape))

    def evaluate(positions: Tensor) -> Tensor:
        surface, _, is_seen = _lookup(distances, view.camera, positions, mode="nearest")
        behind = view.camera.to("cpu", torch.float32).distances(positions) - surface
        # The skin lies just behind the surface, so that it never stands in front of the field's own.
        inside = SHEET_CELLS * cell - (behind - SHEET_CELLS * cell).abs()
        return torch.where(is_seen, inside, -1.0)

    return evaluate


def _resized_mask(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return F.interpolate(torch.from_numpy(mask)[None, None], tuple(shape), mode="area")[0, 0].numpy()


def _filled(distances: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Every pixel's distance; those without one take the nearest pixel's of the object."""
    known = np.isfinite(distances) & (mask > 0.3)
    if not known.any():
        return np.full(distances.shape, 1e6, np.float32)
    rows, columns = distance_transform_edt(~known, return_distances=False, return_indices=True)
    return distances[rows, columns].astype(np.float32)
