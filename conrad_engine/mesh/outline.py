"""Outlines: signed distances to a silhouette or a surface, and bending a level set until its outline is the picture's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from scipy.ndimage import binary_dilation, distance_transform_edt, gaussian_filter, label
from scipy.sparse import coo_matrix, diags
from scipy.sparse.linalg import spsolve
from torch import Tensor

from ..cameras import Camera
from .mesh import Mesh, vertex_normals
from .raster import rasterize

SILHOUETTE = 512
"""Pixels along the longer side of the silhouettes in which parts are looked for and compared."""
REACH_CELLS = 4.0
"""An outline farther off than this many cells is a missing part, not an inexact one."""
BLUR_CELLS = 1.5
"""Blur of the correction along the outline."""
FADE_CELLS, INWARD_FADE_CELLS = 8.0, 2.0
"""Distance from the outline, in cells, over which a correction fades; the second one where it takes away."""
FIT_PIXELS, FIT_CELL_PX, N_FIT_ROUNDS = 1024, 1.5, 2
"""The last correction of a mesh: pixels along the silhouettes' longer side, its unit in these pixels, repetitions."""
ISLAND = 0.003
"""Least share of a silhouette that counts as a part of its own."""
HINT_PX = 60.0
"""Distance over which a hint overrules what a continued map comes from."""


@dataclass(frozen=True)
class SurfaceView:
    """What one picture says of the surface."""

    camera: Camera
    """Object frame, with the pixels of `mask`."""
    mask: Float[np.ndarray, "height width"]
    """Soft alpha in [0, 1]."""
    distances: Float[np.ndarray, "h w"]
    """Ray distance at which the field's surface was met, any resolution; nan where it was not."""

    def resized(self, longest: int) -> tuple[Camera, np.ndarray]:
        """Camera and soft mask with `longest` pixels along the longer side."""
        scale = longest / max(self.mask.shape)
        height, width = (max(1, round(side * scale)) for side in self.mask.shape)
        table = torch.from_numpy(np.ascontiguousarray(self.mask, np.float32))[None, None]
        mask = F.interpolate(table, (height, width), mode="area")[0, 0].numpy()
        return self.camera.resized(width, height), mask


def silhouette(mesh: Mesh, view: SurfaceView, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels that the mesh covers, and the view's soft mask, both with `longest` pixels along the longer side."""
    camera, mask = view.resized(longest)
    return rasterize(mesh.vertices, mesh.faces, camera).faces >= 0, mask


def islands(mask: Bool[np.ndarray, "h w"]) -> list[Bool[np.ndarray, "h w"]]:
    """The parts of a silhouette that do not touch each other, largest first; the largest always, others but for crumbs."""
    labels, n_labels = label(mask, np.ones((3, 3)))
    counts = np.bincount(labels.ravel(), minlength=n_labels + 1)[1:]
    order = np.argsort(-counts, kind="stable")
    return [labels == k + 1 for i, k in enumerate(order) if i == 0 or counts[k] >= ISLAND * mask.sum()]


def resized_nearest(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    table = torch.from_numpy(np.ascontiguousarray(values, np.float32))[None, None]
    return F.interpolate(table, tuple(shape), mode="nearest-exact")[0, 0].numpy()


def lookup(values: np.ndarray, camera: Camera, positions: Tensor, mode: str = "bilinear") -> tuple[Tensor, Tensor]:
    """Values of a map that covers the camera's picture at projected positions (n, 3), and their z-depths (n,).

    Beyond the picture, the border's values count.
    """
    uv, z_depths = camera.to("cpu", torch.float32).project(positions)
    unit = uv / torch.tensor([camera.width, camera.height]) * 2 - 1
    table = torch.from_numpy(np.ascontiguousarray(values, np.float32))[None, None]
    found = F.grid_sample(table, unit[None, None], mode=mode, padding_mode="border", align_corners=False)
    return found[0, 0, 0], z_depths


def outline_distances(alpha: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """Signed distances of pixel centers to the silhouette's outline, pixels, positive inside; soft alpha counts."""
    inside = alpha > 0.5
    if inside.all() or not inside.any():
        return np.full(alpha.shape, 1e4 if inside.all() else -1e4, np.float32)
    # A pixel at the outline is covered by alpha, so the outline passes alpha - 0.5 from its center.
    return _from_border(inside, np.clip(alpha - 0.5, -0.5, 0.5))


def surface_distances(values: Float[np.ndarray, "x y z"], cell: float) -> Float[np.ndarray, "x y z"]:
    """Signed distances to the surface values = 0, positive inside, in the unit of `cell`."""
    inside = values > 0
    if inside.all() or not inside.any():  # farther away than anything here
        return np.where(inside, cell, -cell).astype(np.float32) * sum(values.shape)
    slope = np.sqrt(sum(np.square(part) for part in np.gradient(values)))
    offsets = np.clip(values / np.maximum(slope, 1e-6), -1, 1)
    return _from_border(inside, offsets) * cell


def _from_border(inside: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Signed distances in cells: to the nearest cell at the border, and from there to the border by its own `offsets`."""
    border = binary_dilation(inside) & binary_dilation(~inside)
    nearest = distance_transform_edt(~border, return_distances=False, return_indices=True)
    # Whole numbers of cells: scipy's own distances take several times as long, in float64.
    squares = (np.square(cells - own) for cells, own in zip(nearest, np.indices(inside.shape, np.int32, sparse=True)))
    distances = np.sqrt(sum(squares))
    signed = np.where(inside, distances, -distances)
    return (signed + offsets[tuple(nearest)]).astype(np.float32)


def hull_distances(alpha: np.ndarray, camera: Camera) -> Callable[[Tensor], Tensor]:
    """Signed distance of points (n, 3) inside the silhouette's cone, world units; open where the object leaves the picture."""
    pixels = outline_distances(alpha)
    focal = float(camera.intrinsics[:2].mean())

    def evaluate(positions: Tensor) -> Tensor:
        found, z_depths = lookup(pixels, camera, positions)
        return torch.where(z_depths > 0, found * z_depths / focal, 1.0)

    return evaluate


def outline_correction(mesh: Mesh, view: SurfaceView, longest: int, cell: float) -> Callable[[Tensor], Tensor]:
    """How far surfaces at points (n, 3) must move outward for the outline of the mesh to become the mask's.

    Args:
        longest: Pixels along the longer side of the silhouettes compared.
        cell: Length, world units, in which the reach and the fading of the correction are measured.
    """
    if not len(mesh.vertices):
        return lambda positions: torch.zeros(len(positions))
    camera, alpha = view.resized(longest)
    covered, _ = silhouette(mesh, view, longest)
    z_depth = float(camera.to("cpu", torch.float32).project(torch.from_numpy(mesh.vertices).mean(0, keepdim=True))[1])
    wanted, ours = outline_distances(alpha), outline_distances(covered.astype(np.float32))
    focal = float(camera.intrinsics[:2].mean())
    cell_px = cell * focal / z_depth
    at_outline = np.abs(wanted) < 1
    at_outline[[0, -1]] = at_outline[:, [0, -1]] = False
    reach = REACH_CELLS * cell_px
    missing = wanted - ours
    missing = np.clip(missing, -reach, reach) * np.exp(-np.square(np.maximum(np.abs(missing) / reach - 1, 0)))
    if not at_outline.any():
        return lambda positions: torch.zeros(len(positions))
    nearest = distance_transform_edt(~at_outline, return_distances=False, return_indices=True)
    pixels = gaussian_filter(missing[tuple(nearest)], BLUR_CELLS * cell_px)
    # What stands out is taken back at the outline alone: farther in, something in front would lose its surface.
    fade = np.where((pixels < 0) & (wanted > 0), INWARD_FADE_CELLS, FADE_CELLS) * cell_px
    pixels = pixels * np.exp(-np.square(wanted / fade))

    def evaluate(positions: Tensor) -> Tensor:
        found, z_depths = lookup(pixels, camera, positions)
        return torch.where(z_depths > 0, found * z_depths / focal, 0.0)

    return evaluate


def fit_outline(mesh: Mesh, views: list[SurfaceView]) -> Mesh:
    """The mesh with its outlines moved by the last pixel or two, along the normals, to the masks' outlines."""
    for _ in range(N_FIT_ROUNDS):
        for view in views:
            vertices = torch.from_numpy(mesh.vertices)
            focal = float(view.camera.intrinsics[0]) * FIT_PIXELS / max(view.mask.shape)
            z_depth = float(view.camera.to("cpu", torch.float32).project(vertices.mean(0, keepdim=True))[1])
            correction = outline_correction(mesh, view, FIT_PIXELS, FIT_CELL_PX * z_depth / focal)(vertices)
            moved = mesh.vertices + correction.numpy()[:, None] * vertex_normals(mesh.vertices, mesh.faces)
            mesh = Mesh(moved.astype(np.float32), mesh.faces)
    return mesh


def continued(
    known: Float[np.ndarray, "h w"], mask: Bool[np.ndarray, "h w"], hint: Float[np.ndarray, "h w"]
) -> Float[np.ndarray, "h w"]:
    """A map continued smoothly over the unknown (nan) part of the mask, drawn a little towards a hint.

    Minimizes Σ |∇x|² + (x - hint)² / HINT_PX² with the known values held. The hint may be biased: its median difference
    to what is known is taken off first. Outside the mask the nearest value counts.
    """
    unknown = mask & np.isnan(known)
    held = np.isfinite(known)
    result = np.where(held, known, hint)
    if held.any():
        result = np.where(unknown, hint - np.median((hint - known)[held]), result)
    if unknown.any():
        result[unknown] = _screened_poisson(result, unknown, unknown | held)
    outside = ~(unknown | held)
    if not outside.all():
        nearest = distance_transform_edt(outside, return_distances=False, return_indices=True)
        result = result[tuple(nearest)]
    return result.astype(np.float32)


def _screened_poisson(values: np.ndarray, unknown: np.ndarray, domain: np.ndarray) -> np.ndarray:
    """Solve for the unknown pixels, with their present values as the hint and the rest of the domain held."""
    n = int(unknown.sum())
    index = np.full(values.shape, -1)
    index[unknown] = np.arange(n)
    diagonal = np.full(n, 1 / HINT_PX**2)
    right = values[unknown] / HINT_PX**2
    pairs = []
    for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
        neighbor = np.roll(index, step, axis)[unknown]
        # Nothing couples across the picture's border.
        in_picture = np.ones(values.shape, bool)
        in_picture[(slice(None),) * axis + (0 if step == 1 else -1,)] = False
        couples = np.roll(domain, step, axis)[unknown] & in_picture[unknown]
        diagonal += couples
        is_free = couples & (neighbor >= 0)
        pairs.append(np.stack([np.flatnonzero(is_free), neighbor[is_free]]))
        right += np.where(couples & ~is_free, np.roll(values, step, axis)[unknown], 0)
    rows, columns = np.concatenate(pairs, 1)
    matrix = coo_matrix((-np.ones(len(rows)), (rows, columns)), shape=(n, n)).tocsc() + diags(diagonal, format="csc")
    return spsolve(matrix, right)
