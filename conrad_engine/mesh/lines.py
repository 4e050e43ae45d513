"""Straight slender parts of a silhouette: lines along the middle of legs, slats and rungs, also where others cross them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float
from scipy.ndimage import distance_transform_edt, label, maximum_filter

LEAST_PX, LEAST_WIDTHS = 12.0, 4.0
"""Length of lines, in pixels and in their widths."""
LEAST_TAPER = 0.5
"""Width of a line's narrow end over the wide one's. Blades and leaves have less."""
SAME_WIDTH = 0.5
"""How much, as a part of the usual one, its width may differ along it."""
HIDDEN_WIDTHS = 5.0
"""A line may pass behind other parts for so many of its widths."""
N_TRIES = 200
"""Lines tried for each that is found."""
TIP, JOINT = 1.5, 0.25
"""Half widths beyond a line's ends that still belong to it, where it ends freely and where it joins something."""
ASIDE_PX = 3
"""Where so far beside a line's end, on both sides, there is something else, it has ended."""
ANY_NEIGHBOR = np.ones((3, 3), bool)


@dataclass(frozen=True)
class Line:
    """A straight slender part of a silhouette, in pixels (u, v)."""

    start: Float[np.ndarray, "2"]
    along: Float[np.ndarray, "2"]
    """Unit vector."""
    length: float
    halves: tuple[float, float]
    """Half of the width at both ends."""
    free: tuple[bool, bool] = (True, True)
    """Whether nothing lies beyond either end."""

    def coordinates(self, points: Float[np.ndarray, "n 2"]) -> tuple[np.ndarray, np.ndarray]:
        """How far points are along the line and beside it."""
        rest = points - self.start
        return rest @ self.along, np.abs(rest[..., 0] * self.along[1] - rest[..., 1] * self.along[0])

    def half_widths(self, along: np.ndarray) -> np.ndarray:
        return self.halves[0] + (self.halves[1] - self.halves[0]) * np.clip(along / self.length, 0, 1)

    def area(self, shape: tuple[int, int], beside: float, beyond: float | None = None) -> Bool[np.ndarray, "h w"]:
        """Pixels beside the line up to its half width and some more.

        Args:
            beside: Pixels.
            beyond: Half widths beyond its ends; by default what belongs to it.
        """
        v, u = np.indices(shape)
        along, across = self.coordinates(np.stack([u, v], -1) + 0.5)
        half = self.half_widths(along)
        before, after = (beyond if beyond is not None else TIP if free else JOINT for free in self.free)
        return (across <= half + beside) & (along >= -before * half) & (along <= self.length + after * half)

    def beside(self, along: Float[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
        """Points (n, 2) just outside of it, on either side."""
        middle = self.start + along[:, None] * self.along
        away = (self.half_widths(along)[:, None] + ASIDE_PX) * np.array([-self.along[1], self.along[0]])
        return middle + away, middle - away


def narrower_than(widest: float, deep: Float[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Pixels of a mask, given by the distances to what is outside, that no disk of this diameter in it covers."""
    core = deep > widest / 2
    return (deep > 0) & (distance_transform_edt(~core) > widest / 2) if core.any() else deep > 0


def straight_lines(
    slender: Bool[np.ndarray, "h w"], deep: Float[np.ndarray, "h w"], least_length: float
) -> Iterator[Line]:
    """The straight parts of an area, the longest first in each piece of it.

    Args:
        slender: The area.
        deep: Distances of a mask's pixels to what is outside; lines pass behind other parts of it.
        least_length: Pixels.
    """
    least_length = max(least_length, LEAST_PX)
    rng = np.random.default_rng(0)
    pieces, n_pieces = label(slender, ANY_NEIGHBOR)
    is_ridge = slender & (deep >= maximum_filter(deep, 3) - 0.3)
    for piece in range(1, n_pieces + 1):
        v, u = np.nonzero(is_ridge & (pieces == piece))
        points, halves = np.stack([u, v], 1) + 0.5, deep[v, u]
        while len(points) >= least_length:
            tries = rng.integers(len(points), size=(N_TRIES, 2))
            ways = points[tries[:, 1]] - points[tries[:, 0]]
            far = np.hypot(*ways.T) >= least_length / 2
            run = np.zeros(0, int)
            for (a, _), way in zip(tries[far], ways[far]):
                run = max(run, _run(points, halves, points[a], way, deep, len(run)), key=len)
            if len(run) < least_length / 2:
                break
            for _ in range(2):
                run = max(run, _run(points, halves, *_middle_and_way(points[run]), deep, len(run)), key=len)
            line = _line(points[run], halves[run])
            along, across = line.coordinates(points)
            used = (across <= np.maximum(halves, 2)) & (along >= -1) & (along <= line.length + 1)
            used[run] = True
            points, halves = points[~used], halves[~used]
            line = _trimmed(line, deep)
            ends = sorted(line.halves)
            if line.length >= max(least_length, LEAST_WIDTHS * sum(ends)) and ends[0] >= LEAST_TAPER * ends[1]:
                yield line


def _middle_and_way(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The middle of points and the direction in which they extend most."""
    middle = points.mean(0)
    return middle, np.linalg.svd(points - middle, full_matrices=False)[2][0]


def _run(
    points: np.ndarray, halves: np.ndarray, origin: np.ndarray, way: np.ndarray, deep: np.ndarray, n_least: int
) -> np.ndarray:
    """Indices of the longest run of points along a line, unbroken but where other parts of the mask hide it.

    Most lines that are tried have few points near them: those with `n_least` or less are not looked at any closer.
    """
    way = way / np.linalg.norm(way)
    rest = points - origin
    beside = np.abs(rest[:, 0] * way[1] - rest[:, 1] * way[0])
    near = np.flatnonzero(beside <= np.maximum(0.4 * halves, 1.2))
    if len(near) <= n_least:
        return near[:0]
    near = near[np.abs(halves[near] / np.median(halves[near]) - 1) <= SAME_WIDTH]  # no knobs
    if len(near) <= n_least:
        return near[:0]
    along = rest[near] @ way
    near, along = near[np.argsort(along)], np.sort(along)
    steps = np.diff(along)
    most = 2 * HIDDEN_WIDTHS * np.median(halves[near])
    gaps = [
        k
        for k in np.flatnonzero(steps > 2)
        if steps[k] > most or not _is_covered(points[near[k]], points[near[k + 1]], deep)
    ]
    runs = np.split(np.arange(len(near)), np.array(gaps, int) + 1)
    return near[max(runs, key=lambda run: along[run[-1]] - along[run[0]])]


def is_mask(mask: np.ndarray, points: Float[np.ndarray, "n 2"]) -> Bool[np.ndarray, " n"]:
    """Whether a mask (above 0) has the pixels of points; beyond the picture there is none."""
    u, v = np.floor(points).astype(int).T
    inside = (u >= 0) & (v >= 0) & (u < mask.shape[1]) & (v < mask.shape[0])
    found = np.zeros(len(points), bool)
    found[inside] = mask[v[inside], u[inside]] > 0
    return found


def _is_covered(first: np.ndarray, last: np.ndarray, deep: np.ndarray) -> bool:
    """Whether the mask has all pixels between two."""
    return bool(is_mask(deep, np.linspace(first, last, int(np.abs(last - first).max()) + 2)).all())


def _line(points: np.ndarray, halves: np.ndarray) -> Line:
    """The line through points of a ridge, and how wide it is at its ends."""
    middle, way = _middle_and_way(points)
    along = (points - middle) @ way
    slope, level = np.polyfit(along, halves, 1)
    ends = tuple(max(level + slope * end, 0.5) for end in (along.min(), along.max()))
    return Line(middle + way * along.min(), way, float(np.ptp(along)), ends)


def _trimmed(line: Line, deep: np.ndarray) -> Line:
    """The line without what it goes on as inside of something else at its ends."""
    along = np.arange(0, line.length + 1)
    is_free = ~np.logical_and(*(is_mask(deep, points) for points in line.beside(along)))
    if not is_free.any():
        return replace(line, length=0.0)
    first, last = along[is_free][[0, -1]]
    halves = tuple(float(half) for half in line.half_widths(np.array([first, last])))
    ends = line.start + np.array([[first], [last]]) * line.along
    beyond = ends + np.array([[-halves[0] - ASIDE_PX], [halves[1] + ASIDE_PX]]) * line.along
    return replace(line, start=ends[0], length=float(last - first), halves=halves, free=tuple(~is_mask(deep, beyond)))
