"""Joining the parts of a surface that belong to one object: a slat that is broken in the middle, a ball on a thin rod.

The result keeps one connected part. What the pictures show of the others must not be lost with them, so each is tied to the
main part by a thin rod across the shortest gap, as far as the rod stays inside the silhouettes.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from scipy.ndimage import binary_erosion, label
from scipy.spatial import cKDTree

from ..cameras import Camera

ROD_CELLS = 1.6
"""Radius of a rod: thick enough for marching cubes and for the clean-up after it."""
SLACK_CELLS = 1.0
"""How far rods may stand out of the silhouettes: what is narrower than a cell has no cell inside."""
MAX_GAP = 0.15
"""Longest rod, as a part of the grid's longest side."""
MIN_CELLS = 12
"""Parts with fewer cells are dust and are left to the clean-up."""
MAX_PARTS = 40
COVERAGE = 128
"""Pixels along the longer side of the picture by which parts are told from floaters: about a cell each, so that the main
part's cells leave no holes."""
MIN_PIXELS, MIN_BESIDE = 3, 0.25
"""A part is needed if so many of its pixels, and such a share of them, lie beside the main part."""
ANY_NEIGHBOR = np.ones((3, 3, 3), bool)


def join_parts(
    values: Float[np.ndarray, "x y z"],
    hull: Float[np.ndarray, "x y z"],
    cell: float,
    low: Float[np.ndarray, "3"],
    cameras: list[Camera],
    longest_rod: float,
) -> np.ndarray:
    """A level set whose parts, as far as a picture needs them, are joined to the largest one.

    A part that the main part hides from every camera is a floater and stays apart.

    Args:
        values: Signed distances, positive inside, world units.
        hull: Signed distances to the silhouettes' cones: rods end `SLACK_CELLS` outside.
        cell: Side of a cell, world units.
        low: World position of the first cell.
        cameras: Of the pictures.
        longest_rod: In cells.
    """
    # Marching cubes parts what touches only at an edge or a corner.
    parts, n_parts = label(values > 0)
    if n_parts < 2:
        return values
    counts = np.bincount(parts.ravel())
    counts[0] = 0
    order = [k for k in np.argsort(-counts, kind="stable")[:MAX_PARTS] if counts[k] >= MIN_CELLS]
    rim = (parts > 0) & ~binary_erosion(parts > 0, ANY_NEIGHBOR)
    points = np.argwhere(rim)
    owners = parts[tuple(points.T)]
    joined = points[owners == order[0]]
    waiting = [k for k in order[1:] if _is_needed(points[owners == k], joined, low, cell, cameras)]
    rods = np.full_like(values, -np.inf)
    while waiting:
        tree = cKDTree(joined)
        gaps = []
        for part in waiting:
            mine = points[owners == part]
            distances, nearest = tree.query(mine)
            best = int(np.argmin(distances))
            gaps.append((float(distances[best]), part, mine[best], joined[nearest[best]]))
        gap, part, start, end = min(gaps, key=lambda g: g[0])
        if gap > longest_rod:
            break
        _add_rod(rods, start, end, cell)
        joined = np.concatenate([joined, points[owners == part]])
        waiting = [k for k in waiting if k != part]
    return np.maximum(np.minimum(values, hull), np.minimum(rods, hull + SLACK_CELLS * cell))


def _is_needed(part: np.ndarray, main: np.ndarray, low: np.ndarray, cell: float, cameras: list[Camera]) -> bool:
    """Whether some picture shows a good part of these cells beside the main part."""
    for camera in cameras:
        scale = COVERAGE / max(camera.width, camera.height)
        small = camera.resized(*(max(1, round(side * scale)) for side in (camera.width, camera.height)))
        covered = np.zeros((small.height, small.width), bool)
        covered[tuple(_pixels(main, low, cell, small).T)] = True
        mine = np.unique(_pixels(part, low, cell, small), axis=0)
        beside = ~covered[tuple(mine.T)]
        if beside.sum() >= MIN_PIXELS and beside.mean() > MIN_BESIDE:
            return True
    return False


def _pixels(cells: np.ndarray, low: np.ndarray, cell: float, camera: Camera) -> np.ndarray:
    """Rows and columns (n, 2) that cells project to; those outside the picture are left out."""
    positions = torch.from_numpy(low + cells * cell).double()
    uv, z_depths = camera.to("cpu", torch.float64).project(positions)
    columns, rows = np.floor(uv.numpy()).astype(np.int64).T
    inside = (z_depths.numpy() > 0) & (columns >= 0) & (columns < camera.width) & (rows >= 0) & (rows < camera.height)
    return np.stack([rows, columns], 1)[inside]


def _add_rod(values: np.ndarray, start: np.ndarray, end: np.ndarray, cell: float) -> None:
    """Unite, in place, with the cells within `ROD_CELLS` of a segment between two cells."""
    margin = int(np.ceil(ROD_CELLS)) + 1
    low = np.maximum(np.minimum(start, end) - margin, 0)
    high = np.minimum(np.maximum(start, end) + margin + 1, values.shape)
    box = tuple(slice(a, b) for a, b in zip(low, high))
    cells = np.stack(np.meshgrid(*(np.arange(a, b) for a, b in zip(low, high)), indexing="ij"), -1).astype(np.float64)
    along = (end - start).astype(np.float64)
    t = np.clip(((cells - start) @ along) / max(float(along @ along), 1e-9), 0, 1)
    distance = np.linalg.norm(cells - start - t[..., None] * along, axis=-1)
    values[box] = np.maximum(values[box], (ROD_CELLS - distance) * cell)
