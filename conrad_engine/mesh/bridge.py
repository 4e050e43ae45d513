"""Joining the parts of a surface that belong to one object: a slat that is broken in the middle, a ball on a thin rod.

The result keeps one connected part. What the pictures show of the others must not be lost with them, so each is tied to the
main part by a thin rod across the shortest gap, as far as the rod stays inside the silhouettes. Where depths are only what the
field made of one picture, a part too far away for a rod is first brought beside the main one, along the camera's rays.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from scipy.ndimage import binary_erosion, label, map_coordinates
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
TOUCHING_CELLS = 3.0
"""Parts no farther apart than this in the picture touch there."""
N_NEAREST = 16
"""Cells of the main part, nearest in the picture, among which the one nearest in depth says where a part belongs."""
COVERAGE = 128
"""Pixels along the longer side of the picture by which parts are told from floaters: about a cell each, so that the main
part's cells leave no holes."""
MIN_PIXELS, MIN_BESIDE = 3, 0.25
"""A part is needed if so many of its pixels, and such a share of them, lie beside the main part."""
ANY_NEIGHBOR = np.ones((3, 3, 3), bool)


def join_parts(
    values: Float[np.ndarray, "x y z"],
    hull: Float[np.ndarray, "x y z"],
    room: Float[np.ndarray, "x y z"],
    cell: float,
    low: Float[np.ndarray, "3"],
    cameras: list[Camera],
    longest_rod: float,
    may_move: bool = False,
) -> np.ndarray:
    """A level set whose parts, as far as a picture needs them, are joined to the largest one.

    A part that the main part hides from every camera is a floater and stays apart.

    Args:
        values: Signed distances, positive inside, world units.
        hull: Signed distances to what the parts must stay in, the silhouettes' cones.
        room: Those to what rods must stay in.
        cell: Side of a cell, world units.
        low: World position of the first cell.
        cameras: Of the pictures.
        longest_rod: In cells.
        may_move: Whether parts may change their depth; only where there is one camera, which does not see it.
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
    cells = {part: points[owners == part] for part in order}
    joined = cells[order[0]]
    waiting = [part for part in order[1:] if _is_needed(cells[part], joined, low, cell, cameras)]
    may_move = may_move and len(cameras) == 1
    rods, moved = np.full_like(values, -np.inf), set()
    while waiting:
        tree = cKDTree(joined)
        gaps = []
        for part in waiting:
            distances, nearest = tree.query(cells[part])
            best = int(np.argmin(distances))
            gaps.append((float(distances[best]), part, cells[part][best], joined[nearest[best]]))
        gap, part, start, end = min(gaps, key=lambda g: g[0])
        if gap > longest_rod:
            tried = [k for k in waiting if may_move and k not in moved]
            factors = {k: _factor_beside(cells[k], joined, low, cell, cameras[0]) for k in tried}
            beside = {k: factor for k, factor in factors.items() if factor is not None}
            if not beside:
                break
            for k, factor in beside.items():
                values, cells[k] = _moved(values, parts == k, cells[k], factor, low, cell, cameras[0])
            moved |= beside.keys()
            continue
        _add_rod(rods, start, end, cell)
        joined = np.concatenate([joined, cells[part]])
        waiting = [k for k in waiting if k != part]
    return np.maximum(np.minimum(values, hull), np.minimum(rods, room))


def _factor_beside(part: np.ndarray, main: np.ndarray, low: np.ndarray, cell: float, camera: Camera) -> float | None:
    """Factor by which the part's cells, scaled from the camera, are as deep as the main part's where the picture shows the
    two nearest to each other; None where it shows them apart, and nothing says that they belong together."""
    pixels, depths = zip(*(_projected(cells, low, cell, camera) for cells in (part, main)))
    gaps, nearest = cKDTree(pixels[1]).query(pixels[0], k=min(N_NEAREST, len(main)))
    gaps, nearest = gaps.reshape(len(part), -1), nearest.reshape(len(part), -1)
    factors = depths[1][nearest] / depths[0][:, None]
    cell_px = cell * float(camera.intrinsics[0]) / float(np.median(depths[0]))
    if gaps.min() > TOUCHING_CELLS * cell_px:
        return None
    factors = factors[gaps <= gaps.min() + cell_px]
    return float(factors[np.abs(np.log(factors)).argmin()])


def _moved(
    values: np.ndarray,
    is_part: np.ndarray,
    cells: np.ndarray,
    factor: float,
    low: np.ndarray,
    cell: float,
    camera: Camera,
) -> tuple[np.ndarray, np.ndarray]:
    """The level set with a part scaled from the camera, and the part's new cells.

    Both as they were if it would leave the grid, or is so thin that no cell of it would be left.
    """
    position = camera.positions.cpu().double().numpy()
    scaled = (position + (low + cells * cell - position) * factor - low) / cell
    first, end = np.floor(scaled.min(0)).astype(int) - 2, np.ceil(scaled.max(0)).astype(int) + 3
    if (first < 0).any() or (end > values.shape).any():
        return values, cells
    box = tuple(slice(a, b) for a, b in zip(first, end))
    own = np.where(is_part, values, np.minimum(values, -cell / 2))
    there = low + np.stack(np.meshgrid(*(np.arange(a, b) for a, b in zip(first, end)), indexing="ij")).T * cell
    here = ((position + (there - position) / factor - low) / cell).T
    carried = factor * map_coordinates(own, here, order=1, cval=-cell)
    if not (carried > 0).any():
        return values, cells
    values = np.where(is_part, -np.abs(values), values)
    values[box] = np.maximum(values[box], carried)
    return values, np.argwhere(carried > 0) + first


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
    uv, z_depths = _projected(cells, low, cell, camera)
    columns, rows = np.floor(uv).astype(np.int64).T
    inside = (z_depths > 0) & (columns >= 0) & (columns < camera.width) & (rows >= 0) & (rows < camera.height)
    return np.stack([rows, columns], 1)[inside]


def _projected(cells: np.ndarray, low: np.ndarray, cell: float, camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """Positions in the picture (n, 2) and z-depths (n,) of cells."""
    uv, z_depths = camera.to("cpu", torch.float64).project(torch.from_numpy(low + cells * cell).double())
    return uv.numpy(), z_depths.numpy()


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
