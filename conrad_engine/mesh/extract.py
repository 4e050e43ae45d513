"""From a density field to a surface: marching cubes on a level set that respects the pictures' outlines.

The field knows the surface to about one of its own cells. The picture knows the outline to a fraction of a pixel. So the level
set is f = min(max(field, sheet), hull), each a signed distance in world units, positive inside:

- field: log density against the level, in cells; zero where density equals the level.
- hull: how far a point lies inside the silhouette of every picture (the exact visual hull).
- sheet: where the field at this level leaves a part of the silhouette open (a thin leg that is weaker than the level), a thin
  skin at the distance that the picture's rays met there.
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
from scipy.ndimage import binary_dilation, distance_transform_edt, gaussian_filter, label
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
SILHOUETTE = 256
"""Pixels along the longer side of the silhouettes that are compared."""
RIM_PX = 2
"""A gap no wider than this, at `SILHOUETTE`, is the outline's error and no missing part."""
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
        hull = np.minimum.reduce([grid.evaluate(_hull(view)) for view in views]) if views else None
    levels = [config.level] if config.level > 0 else [value for value in LEVELS if value < densities.max()]
    if not levels or densities.max() <= levels[0]:
        raise MeshError(NO_SURFACE)
    level_sets = [_level_set(densities, level, grid.cell, hull) for level in levels]
    meshes = [grid.surface(values) for values in level_sets]
    scores = [_silhouette_iou(mesh, views[0]) if views else -abs(level - 15) for mesh, level in zip(meshes, levels)]
    best = int(np.argmax(scores))
    log.info("surface levels %s match the silhouette by %s", levels, [round(score, 3) for score in scores])
    sheets = [_sheet(view, meshes[best], grid.cell) for view in views]
    if any(sheet is not None for sheet in sheets):
        skin = np.maximum.reduce([grid.evaluate(sheet) for sheet in sheets if sheet is not None])
        covered = np.minimum(np.maximum(level_sets[best], skin), hull)
        return Extracted(grid.surface(covered), levels[best])
    if not len(meshes[best].faces):
        raise MeshError(NO_SURFACE)
    return Extracted(meshes[best], levels[best])


def _tight_grid(density: Callable[[Tensor], Tensor], aabb: np.ndarray, n_cells: int) -> _Grid:
    """A grid around everything that could be surface."""
    coarse = _grid_over(aabb[0], aabb[1], COARSE_CELLS)
    occupied = np.argwhere(coarse.evaluate(density) > LEVELS[0] / 4)
    if not len(occupied):
        raise MeshError(NO_SURFACE)
    low = coarse.low + (occupied.min(0) - 1) * coarse.cell
    high = coarse.low + (occupied.max(0) + 1) * coarse.cell
    return _grid_over(np.maximum(low, aabb[0]), np.minimum(high, aabb[1]), n_cells)


def _level_set(densities: np.ndarray, level: float, cell: float, hull: np.ndarray | None) -> np.ndarray:
    """Signed distances of one level, roughly; positive inside."""
    # The logarithm of a softplus blob is about linear near its surface; two cells either way are enough.
    values = np.clip(np.log(np.maximum(densities, 1e-4) / level), -2, 2) * cell
    values = gaussian_filter(values, 0.7)
    if hull is not None:
        values = np.minimum(values, hull)
    return values.astype(np.float32)


def _silhouette(mesh: Mesh, view: SurfaceView) -> tuple[np.ndarray, np.ndarray]:
    """Pixels that the mesh covers, and the mask, both at `SILHOUETTE` pixels."""
    scale = SILHOUETTE / max(view.mask.shape)
    camera = view.camera.resized(*(max(1, round(side * scale)) for side in (view.camera.width, view.camera.height)))
    covered = rasterize(mesh.vertices, mesh.faces, camera).faces >= 0
    return covered, _resized_mask(view.mask, covered.shape) > 0.5


def _silhouette_iou(mesh: Mesh, view: SurfaceView) -> float:
    covered, mask = _silhouette(mesh, view)
    return float((covered & mask).sum() / max((covered | mask).sum(), 1))


def _lookup(
    values: np.ndarray, camera: Camera, positions: Tensor, mode: str = "bilinear"
) -> tuple[Tensor, Tensor, Tensor]:
    """Values of a map that covers the camera's picture at projected positions, their z-depths, and which lie inside."""
    uv, z_depths = camera.to("cpu", torch.float32).project(positions)
    unit = uv / torch.tensor([camera.width, camera.height]) * 2 - 1
    table = torch.from_numpy(np.ascontiguousarray(values, np.float32))[None, None]
    found = F.grid_sample(table, unit[None, None], mode=mode, padding_mode="border", align_corners=False)[0, 0, 0]
    return found, z_depths, (unit.abs() <= 1).all(-1) & (z_depths > 0)


def _hull(view: SurfaceView) -> Callable[[Tensor], Tensor]:
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


def _sheet(view: SurfaceView, mesh: Mesh, cell: float) -> Callable[[Tensor], Tensor] | None:
    """Signed distance inside a skin over what the mesh leaves open of the silhouette; None if that is only the rim."""
    covered, mask = _silhouette(mesh, view)
    parts, _ = label(mask & ~covered)
    # A gap counts where it is farther from the mesh than a rim's width; then all of it counts, and a margin to join it.
    wide = (
        np.unique(parts[(parts > 0) & (distance_transform_edt(~covered) > RIM_PX)])
        if covered.any()
        else np.unique(parts)
    )
    open_part = np.isin(parts, wide[wide > 0])
    if not open_part.any():
        return None
    open_part = binary_dilation(open_part, iterations=RIM_PX)
    distances = _filled(view.distances, _resized_mask(view.mask, view.distances.shape))

    def evaluate(positions: Tensor) -> Tensor:
        surface, _, is_seen = _lookup(distances, view.camera, positions, mode="nearest")
        is_open, _, _ = _lookup(open_part, view.camera, positions, mode="nearest")
        behind = view.camera.to("cpu", torch.float32).distances(positions) - surface
        inside = SHEET_CELLS * cell - behind.abs()
        return torch.where(is_seen & (is_open > 0.5), inside, -2 * cell)

    return evaluate


def _resized_mask(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    table = torch.from_numpy(np.ascontiguousarray(mask, np.float32))[None, None]
    return F.interpolate(table, tuple(shape), mode="area")[0, 0].numpy()


def _filled(distances: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Every pixel's distance; those without one take the nearest pixel's of the object."""
    known = np.isfinite(distances) & (mask > 0.3)
    if not known.any():
        return np.full(distances.shape, 1e6, np.float32)
    rows, columns = distance_transform_edt(~known, return_distances=False, return_indices=True)
    return distances[rows, columns].astype(np.float32)
