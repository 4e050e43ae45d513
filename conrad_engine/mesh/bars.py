"""Bars: straight slender parts of a picture, such as legs, slats, rungs and antennas, made round.

The prior's views are too coarse for them: what stands behind a slat is chance, and comes out as a ragged blade along the
picture's rays, which the picture itself cannot show. What the field knows is about where a bar begins. Along a straight line in
space the inverse z-depth changes linearly in its picture, so one line fitted to the whole length says where the bar is, and as
deep as it is wide is what it most likely is: of 46 validation objects with slender parts half are 0.5 to 1.0 times as deep.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.ndimage import binary_dilation, distance_transform_edt, label, maximum_filter
from torch import Tensor

from ..cameras import Camera
from .lines import ANY_NEIGHBOR, ASIDE_PX, TIP, Line, is_mask, narrower_than, straight_lines
from .mesh import Mesh, dots, face_crosses
from .outline import SILHOUETTE, SurfaceView, hull_distances, lookup, outline_distances
from .raster import rasterize

log = logging.getLogger(__name__)

WIDEST, LEAST_LENGTH = 0.06, 0.06
"""Width and length of bars, as parts of the silhouette's longer side."""
DEEPEST = 0.09
"""What the field has deeper than this, as a part of the silhouette's longer side, is a plate seen from its edge, and no bar.
Of less, which is some five pixels of the prior's views, they cannot tell how deep it is."""
USUAL_DEPTH = 0.97
"""Share of a bar's length that is no deeper than what is taken away; where more is, it is something behind the bar."""
LEAST_SINE = 0.3
"""Sine of the angle between bars and the picture's rays; what points at the camera is too short to say where it goes."""
STRAIGHT_SHARE = 0.4
"""Share of a bar's length where the surface begins within a width of the line."""
N_ROUNDS = 6
"""Times that the depth along a line is fitted, ever less to what is off."""
TOUCHING_PX, REACH = 4, 0.15
"""A bar's end that is as near to another part in the picture joins it, if that is not farther behind or before it, as a part
of the silhouette's longer side."""
PARALLEL = 0.9
"""Cosine of the angle in the picture from which on bars lie beside each other instead of joining."""
CRUMB_WIDTHS = 1.0
"""What is left between bars belongs to them if all of it is as near, in widths of the bar beside it."""
BESIDE_PX = 6
"""Pixels beside bars from which the surface is taken away with them."""
INTO = 1.5
"""Half widths by which bars go on into what they join."""


@dataclass(frozen=True)
class Bar:
    """A line with its place in space."""

    line: Line
    inverse_depths: tuple[float, float]
    """1 / z-depth of its axis at both ends."""
    behind: float
    """How far behind that, in z-depth, there is what the surface had in its place."""
    trust: float
    """How much of the picture says so, pixels."""

    def depths(self, along: np.ndarray) -> np.ndarray:
        """z-depths of its axis, pixels from its start; the end's beyond it."""
        first, last = self.inverse_depths
        return 1 / (first + (last - first) * np.clip(along / self.line.length, 0, 1))

    def sine(self, camera: Camera) -> float:
        """Sine of the angle between its axis and the ray through its middle."""
        uv = torch.from_numpy(np.stack([self.line.start, self.line.start + self.line.length * self.line.along])).float()
        first, last = camera.unproject(uv, 1 / torch.tensor(self.inverse_depths).float())
        axis, ray = last - first, (first + last) / 2 - camera.positions
        return float(torch.linalg.cross(axis, ray).norm() / (axis.norm() * ray.norm()))


@dataclass(frozen=True)
class Bars:
    """The bars of one picture, with `SILHOUETTE` pixels along its longer side."""

    camera: Camera
    bars: list[Bar]
    cleared: Bool[np.ndarray, "h w"]
    """Where the surface is taken away."""
    ends: Float[np.ndarray, "h w"]
    """z-depth up to which it is; what is behind, another leg, stays."""
    rims: Float[np.ndarray, "h w"]
    """Signed distances to the outline, pixels, positive inside."""
    crumb_halves: Float[np.ndarray, "h w"]
    """Half widths of small pieces between bars, pixels; 0 where there is none."""
    crumb_depths: Float[np.ndarray, "h w"]
    """z-depths of their middles."""

    def put_into(self, values: Float[Tensor, " n"], positions: Float[Tensor, "n 3"]) -> Float[Tensor, " n"]:
        """A level set's values at points, with round bodies in place of what it has where the bars are."""
        near = self.cleared | np.any([bar.line.area(self.rims.shape, BESIDE_PX, INTO) for bar in self.bars], axis=0)
        found, z_depths = lookup(near.astype(np.float32), self.camera, positions)
        chosen = torch.nonzero((found > 0) & (z_depths > 0))[:, 0]
        values = values.clone()
        values[chosen] = self._put_into(values[chosen], positions[chosen])
        return values

    def _put_into(self, values: Tensor, positions: Tensor) -> Tensor:
        cone = hull_distances(self.cleared.astype(np.float32), self.camera)(positions)
        ends, along_axis = lookup(self.ends, self.camera, positions, "nearest")
        values = torch.minimum(values, -torch.minimum(cone, ends - along_axis))
        uv, z_depths = (x.numpy() for x in self.camera.project(positions))
        rims, halves, depths = (
            lookup(table, self.camera, positions, mode)[0].numpy()
            for table, mode in ((self.rims, "bilinear"), (self.crumb_halves, "nearest"), (self.crumb_depths, "nearest"))
        )
        per_depth = self.camera.distances(positions).numpy() / z_depths * float(self.camera.intrinsics[0])

        def inside(half: np.ndarray, middle: np.ndarray, sine: float, beside: np.ndarray) -> np.ndarray:
            """Pixels inside a round body: off its axis along the ray, as far as that leads away from it, and in the picture."""
            return half - np.hypot((z_depths / middle - 1) * per_depth * sine, beside)

        # The outline knows best how far something is from its middle.
        body = np.where(
            halves > 0, inside(halves, np.maximum(depths, 1e-9), 1.0, np.maximum(halves - rims, 0)), -np.inf
        )
        for bar in self.bars:
            along, across = bar.line.coordinates(uv)
            half = bar.line.half_widths(along)
            beside = np.maximum(np.maximum(half - rims, 0), across - TOUCHING_PX / 2)
            ends = np.minimum(along, bar.line.length - along) + INTO * half
            body = np.maximum(body, np.minimum(inside(half, bar.depths(along), bar.sine(self.camera), beside), ends))
        return torch.maximum(values, torch.from_numpy(body * z_depths / float(self.camera.intrinsics[0])).to(values))


def find_bars(mesh: Mesh, view: SurfaceView, threads: Bool[np.ndarray, "h w"], may_move: bool = True) -> Bars | None:
    """The bars of a picture, where a surface has them; None where there are none.

    Args:
        mesh: The surface so far.
        threads: What is too narrow for a grid's cells, `SILHOUETTE` pixels along the longer side.
        may_move: Whether their ends may join what they touch in the picture; not where depths are known.
    """
    camera, soft = view.resized(SILHOUETTE)
    camera, mask = camera.to("cpu", torch.float32), soft > 0.5
    if not mask.any() or not len(mesh.faces):
        return None
    front, back = _front_and_back(mesh, camera)
    side = float(max(np.ptp(np.nonzero(mask)[0]), np.ptp(np.nonzero(mask)[1])) + 1)
    deep = distance_transform_edt(mask)
    slender = narrower_than(WIDEST * side, deep) & ~threads
    lines = list(straight_lines(slender, deep, LEAST_LENGTH * side))
    areas = [slender & line.area(mask.shape, 0) for line in lines]
    bars = []
    for line, area in zip(lines, areas):
        # Where two cross, the picture shows only one of them.
        crossing = [other for way, other in zip(lines, areas) if abs(way.along @ line.along) < PARALLEL]
        own = area & ~np.any(crossing, axis=0) if crossing else area
        bar = _fitted(line, own, front, back, camera, DEEPEST * side)
        if bar is not None:
            bars.append(bar)
    if not bars:
        return None
    bars.sort(key=lambda bar: -bar.trust)
    own = np.zeros(mask.shape)  # the bars' pixels: their widths
    for bar in bars:
        own = np.where(slender & bar.line.area(mask.shape, 1.5), np.maximum(own, sum(bar.line.halves)), own)
    reach = REACH * side / float(camera.intrinsics[0])
    for k, bar in enumerate(bars if may_move else []):
        bars[k] = _joined(bar, bars[:k], mask & (own == 0), front, back, camera, reach)
    log.info("%d straight slender parts are made round", len(bars))
    crumbs = _crumbs(slender & (own == 0), own, mask & ~slender)
    # Threads hang between what was there; where that are bars now, they are to be strung anew.
    loose = _touching(threads & mask, binary_dilation((own > 0) | crumbs, ANY_NEIGHBOR, TOUCHING_PX))
    theirs = (own > 0) | crumbs | loose
    cleared = binary_dilation(theirs, ANY_NEIGHBOR, BESIDE_PX) & (theirs | ~mask)
    ends = np.where(binary_dilation(crumbs | loose, ANY_NEIGHBOR, BESIDE_PX), np.inf, 0)
    for bar in bars:
        area = bar.line.area(mask.shape, BESIDE_PX, TIP)
        ends[area] = np.maximum(ends, _ends(bar, mask & ~theirs, float(camera.intrinsics[0])))[area]
    return Bars(camera, bars, cleared, ends, outline_distances(soft), *_crumb_maps(crumbs, deep, bars))


def _front_and_back(mesh: Mesh, camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """z-depths where rays first meet a mesh and where they first leave it, 0 where they miss it."""
    to_faces = mesh.vertices[mesh.faces[:, 0]] - camera.positions.numpy()
    is_back = dots(face_crosses(mesh.vertices, mesh.faces), to_faces) > 0
    front, back = (rasterize(mesh.vertices, faces, camera).z_depths for faces in (mesh.faces, mesh.faces[is_back]))
    return front, back


def _fitted(
    line: Line, own: np.ndarray, front: np.ndarray, back: np.ndarray, camera: Camera, deepest: float
) -> Bar | None:
    """The bar along a line; None where the surface shows none, or nothing like one, or something deeper, pixels."""
    v, u = np.nonzero(own & (front > 0) & (back > 0))
    along, across = line.coordinates(np.stack([u, v], 1) + 0.5)
    halves = line.half_widths(along)
    core = (across <= 0.5 * halves + 0.5) & (along >= 0) & (along <= line.length)
    if core.sum() < line.length / 4:
        return None
    along, halves, first, last = along[core], halves[core], front[v, u][core], back[v, u][core]
    focal = float(camera.intrinsics[0])
    widths = 2 * halves * np.median(first) / focal
    ways = np.stack([1 - along / line.length, along / line.length], 1)
    weights = np.ones(len(along))
    for _ in range(N_ROUNDS):  # least absolute differences
        inverse = np.linalg.lstsq(ways * weights[:, None], weights / first, rcond=None)[0]
        off = np.abs(1 / np.maximum(ways @ inverse, 1e-9) - first) / widths
        weights = 1 / np.sqrt(np.maximum(off, 0.1))
    share, depth = np.mean(off < 1), np.median(last / first - 1) * focal
    if share < STRAIGHT_SHARE or depth > deepest or inverse.min() <= 0:
        return None
    behind = (np.quantile((last - 1 / (ways @ inverse)) / widths, USUAL_DEPTH) + 0.5) * np.median(widths)
    bar = Bar(line, tuple(inverse), float(behind), float(share * line.length * sum(line.halves)))
    sine = bar.sine(camera)
    if sine < LEAST_SINE:
        return None
    # That was its front; its axis lies half a width behind it, or more along a ray that meets it at a slant.
    return replace(bar, inverse_depths=tuple(x / (1 + half / focal / sine) for x, half in zip(inverse, line.halves)))


def _joined(
    bar: Bar, others: list[Bar], body: np.ndarray, front: np.ndarray, back: np.ndarray, camera: Camera, reach: float
) -> Bar:
    """A bar with its ends as deep as what they touch in the picture: other bars, or the wide parts, between front and back."""
    line, focal = bar.line, float(camera.intrinsics[0])
    known = body & (front > 0) & (back > 0)
    v, u = np.nonzero(known)
    inverse = list(bar.inverse_depths)
    for k, half in enumerate(line.halves):
        end, own = line.start + k * line.length * line.along, 1 / inverse[k]
        found = []
        for other in others:
            along, across = other.line.coordinates(end)
            room = half + other.line.half_widths(along) + TOUCHING_PX
            beyond = max(-along, along - other.line.length)
            if across <= room and beyond <= room and abs(line.along @ other.line.along) < PARALLEL:
                found.append(other.depths(along))
        away = np.hypot(u + 0.5 - end[0], v + 0.5 - end[1])
        if len(away) and away.min() <= 2 * half + TOUCHING_PX:
            at = v[away.argmin()], u[away.argmin()]
            inner = half / focal * own
            low, high = front[at] + inner, back[at] - inner
            found.append(np.clip(own, min(low, (low + high) / 2), max(high, (low + high) / 2)))
        nearest = min(found, key=lambda depth: abs(depth - own), default=own)
        if abs(nearest - own) <= reach * own:
            inverse[k] = 1 / float(nearest)
    return replace(bar, inverse_depths=tuple(inverse))


def _ends(bar: Bar, others: np.ndarray, focal: float) -> Float[np.ndarray, "h w"]:
    """z-depths up to which what the surface has in a bar's place is taken away; less far where other parts pass behind it."""
    along = np.arange(0, bar.line.length + 1)
    crosses = binary_dilation(
        np.logical_and(*(is_mask(others, points) for points in bar.line.beside(along))), iterations=ASIDE_PX
    )
    v, u = np.indices(others.shape)
    at = bar.line.coordinates(np.stack([u, v], -1) + 0.5)[0]
    depths = bar.depths(at)
    widths = 2 * bar.line.half_widths(at) / focal * depths
    behind = np.where(
        crosses[np.clip(np.round(at).astype(int), 0, len(along) - 1)], np.minimum(widths, bar.behind), bar.behind
    )
    return depths + behind


def _touching(parts: np.ndarray, area: np.ndarray) -> Bool[np.ndarray, "h w"]:
    """The connected parts that reach into an area."""
    pieces, _ = label(parts, ANY_NEIGHBOR)
    return parts & np.isin(pieces, pieces[area])


def _crumbs(left: np.ndarray, own: np.ndarray, body: np.ndarray) -> Bool[np.ndarray, "h w"]:
    """Small pieces of what is left that touch bars, whose pixels have their widths in `own`, and nothing else."""
    away, nearest = distance_transform_edt(own == 0, return_indices=True)
    return left & ~_touching(left, (away > CRUMB_WIDTHS * own[tuple(nearest)]) | binary_dilation(body, ANY_NEIGHBOR))


def _crumb_maps(crumbs: np.ndarray, deep: np.ndarray, bars: list[Bar]) -> tuple[np.ndarray, np.ndarray]:
    """Half widths of crumbs and what is beside them, and the z-depth of the bar nearest to each pixel."""
    around = binary_dilation(crumbs, ANY_NEIGHBOR, BESIDE_PX) if crumbs.any() else crumbs
    v, u = np.nonzero(around)
    points = np.stack([u, v], 1) + 0.5
    away, at = np.full(len(points), np.inf), np.zeros(len(points))
    for bar in bars:
        along, across = bar.line.coordinates(points)
        beyond = np.maximum(0, np.maximum(-along, along - bar.line.length))
        distance = np.hypot(across, beyond) - bar.line.half_widths(along)
        at = np.where(distance < away, bar.depths(along), at)
        away = np.minimum(away, distance)
    depths = np.zeros(crumbs.shape)
    depths[v, u] = at
    return np.where(around, maximum_filter(np.where(crumbs, deep, 0), 2 * BESIDE_PX + 1), 0), depths
