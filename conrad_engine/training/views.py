"""Renders the pool to memory-mapped rounds of small views, in many processes; training starts after the first round.

    python -m conrad_engine.training.views --pool DIR --out DIR --rounds 10 --processes 16 [--split val] [--sources green]
    python -m conrad_engine.training.views --pool DIR --out DIR --rounds 10 --size 128 --groups 2 --views 5 --tight

A round r is `views_r.npy` (objects, groups, views, 64, 64, 4) 8-bit straight RGBA, `cameras_r.npy` (objects, groups, views,
4) (azimuth relative to the reference, elevation, distance, tan of half the field of view), `sizes_r.npy` (objects, groups),
0 where the product would not know them, and, once all is written, `done_r`; options set other sizes and numbers. `sources.npy`
(objects,) indexes `SOURCES`. Objects that fail keep distances of 0.

A group is one object of one stretch, one light and one field of view in the product's object frame: view 0 is the reference,
framed as the product frames a picture (its silhouette fills 80 % of a frame whose half side at the origin is 0.75); the other
views look at the same origin from all around, as the product's do: half of the groups are its ring, the others are spread as
those of distillation are. `--tight` ones are as near as the object allows. Views are the reference's world: azimuth 0 is its
camera.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from ..config import HALF_BOX, HALF_FRAME, REFERENCE_EXTENT
from ..errors import ConradError, InputError
from ..files import writing_failed
from ..preprocess.framing import MOST_BESIDE, MOST_REACH
from ..warm_start import FRAMES, RING_ELEVATIONS_DEG, ring_azimuths_rad
from .pool import Pool, PoolMesh
from .raster import (
    Light,
    Rasterizer,
    compiled_library,
    orbit_camera,
    orbit_position,
    random_light,
)
from .remodel import recolored, reshaped, with_companion, without_parts
from .shapes import random_shape
from .sources import SOURCES, selected_sources

SIZE, N_GROUPS, N_VIEWS = 64, 3, 13
PROCEDURAL_SHARE = 0.1
"""Procedural objects of a round, as a part of the pool's."""
CLEARANCE = 0.25
"""Least depth of a vertex in front of a camera, in the object frame: no camera is inside an object."""
MIN_COVERAGE = 0.01
"""Part of the reference's pixels that the object covers at least."""
P_COMPANION, P_RECOLOR, P_WITHOUT_PARTS = 0.06, 0.25, 0.15
HIGHEST_REACH = MOST_REACH / HALF_FRAME
"""How far from the middle of the reference's frame a silhouette reaches at most, of the way to its border."""
P_CENTERED = 0.35
"""Of references without a camera, whose silhouette is the product's only hint of where the object's center is."""
P_ROUGH, ROUGH_JITTER, FINE_JITTER = 0.3, 0.02, 0.004
"""How far off the object's center lies, longest sides of the silhouette; some are lined up by eye."""
P_RING, P_FIRST_FRAME = 0.5, 0.5
"""Of groups whose views are the product's ring, and of those in its first frame whatever their object's size is."""
POOLS: dict[str, Pool] = {}


@dataclass(frozen=True)
class Shape:
    """How many pictures a round has of each object, and which."""

    size: int = SIZE
    """Pixels a side."""
    n_groups: int = N_GROUPS
    n_views: int = N_VIEWS
    """Of each group, the reference included."""
    is_tight: bool = False
    """Whether each other view's frame just holds the object, though it is never much narrower than the reference's."""
    seed: int = 7
    """Another one draws other views."""


@dataclass(frozen=True)
class Task:
    """One object of one round."""

    row: int
    source: str
    index: int
    round_index: int
    out: str
    is_train: bool
    shape: Shape = Shape()


@dataclass(frozen=True)
class Framing:
    """How a group looks at its object."""

    fov_rad: float
    elevation_rad: float
    """Of the reference."""
    azimuth_rad: float
    """Of the reference, in the mesh's own world."""
    fill: float
    """Part of the reference frame that the silhouette's longer side takes."""
    is_silhouette_centered: bool
    """Whether the origin is the silhouette's middle, as without a camera, at the depth of the box center, or that center."""


def projected(vertices: np.ndarray, framing: Framing, distance: float) -> np.ndarray:
    """Pixel positions (n, 2) in the reference's frame, -1 to 1, +y up."""
    camera = orbit_camera(framing.azimuth_rad, framing.elevation_rad, distance)
    local = (vertices - camera[:, 3]) @ camera[:, :3]
    return local[:, :2] / np.maximum(-local[:, 2:], 0.05) / math.tan(framing.fov_rad / 2)


def framed(vertices: np.ndarray, framing: Framing) -> np.ndarray:
    """The vertices moved and scaled into the object frame, all of them at least `CLEARANCE` in front of the reference.

    Scale and shift depend on each other through perspective, so both are solved for the vertices on the silhouette's rim,
    which are then looked up again; this settles in a few rounds. Where an object is so long towards the camera that the
    clearance does not allow the asked fill, the silhouette stays smaller: `is_usable` tells. So does one beside the origin that
    would leave the frame.
    """
    tan_half = math.tan(framing.fov_rad / 2)
    distance = HALF_FRAME / tan_half
    axes = orbit_camera(framing.azimuth_rad, framing.elevation_rad, distance)[:, :3]
    centered = vertices - (vertices.min(0) + vertices.max(0)) / 2
    across, near = centered @ axes[:, :2], centered @ axes[:, 2]
    largest = (distance - CLEARANCE) / max(float(near.max()), 1e-9)
    scale, shift = 0.5 * min(1.0, largest), np.zeros(2)
    for _ in range(12):
        uv = (across * scale + shift) / (distance - near * scale)[:, None]
        low, high, sides = uv.argmin(0), uv.argmax(0), np.arange(2)
        longer = int(np.ptp(uv, axis=0).argmax())
        ends = [(float(across[rim[longer], longer]), float(near[rim[longer]])) for rim in (high, low)]
        scale = min(_scale_for(2 * framing.fill * tan_half, distance, *ends, float(shift[longer])), largest)
        if framing.is_silhouette_centered:
            # Sideways only, so the box center stays at the origin's depth.
            weights = 1 / (distance - near[np.stack([low, high])] * scale)
            rims = across[np.stack([low, high]), sides] * scale
            shift = -(rims * weights).sum(0) / weights.sum(0)
    if not framing.is_silhouette_centered:
        # |x| s / (d - n s) is within the reach for all of them up to this scale.
        limit = HIGHEST_REACH * tan_half
        scale = min(scale, limit * distance / float((np.abs(across) + limit * near[:, None]).max()))
    return centered * scale + axes[:, :2] @ shift


def _scale_for(
    extent: float, distance: float, high: tuple[float, float], low: tuple[float, float], shift: float
) -> float:
    """The scale at which two vertices (x, towards the camera) appear `extent` apart, in tangents.

    It is the smallest positive root of (x_h s + t) / (d - n_h s) - (x_l s + t) / (d - n_l s) = extent.
    """
    (x_high, near_high), (x_low, near_low) = high, low
    a = x_low * near_high - x_high * near_low - extent * near_high * near_low
    b = distance * (x_high - x_low + extent * (near_high + near_low)) + shift * (near_high - near_low)
    roots = np.roots([a, b, -extent * distance**2])
    positive = roots.real[(np.abs(roots.imag) < 1e-9) & (roots.real > 1e-9)]
    return float(positive.min()) if len(positive) else math.inf


def is_usable(moved: np.ndarray, framing: Framing) -> bool:
    """Whether framed vertices fill the picture as asked and fit the product's box, with some tolerance."""
    uv = projected(moved, framing, HALF_FRAME / math.tan(framing.fov_rad / 2))
    is_filled = np.ptp(uv, axis=0).max() > 0.97 * 2 * framing.fill or np.abs(uv).max() > 0.99 * HIGHEST_REACH
    return bool(is_filled and np.ptp(moved, axis=0).max() <= 1.2 * 2 * HALF_BOX)


def random_framing(rng: np.random.Generator, fov_rad: float) -> Framing:
    # Most pictures are taken from a little above.
    low, high = (0, 30) if rng.random() < 0.5 else (-10, 45)
    return Framing(
        fov_rad,
        elevation_rad=math.radians(rng.uniform(low, high)),
        azimuth_rad=rng.uniform(-math.pi, math.pi),
        fill=rng.uniform(0.72, 0.85),
        is_silhouette_centered=bool(rng.random() < P_CENTERED),
    )


def place(rng: np.random.Generator, vertices: np.ndarray) -> tuple[np.ndarray, Framing]:
    """The vertices in the object frame of a random reference view, as far beside its origin as users' centers are.

    Views that are not usable (along the object's length, mostly) are drawn again a few times.
    """
    fov_rad = math.radians(rng.uniform(15, 55))
    for _ in range(8):
        framing = random_framing(rng, fov_rad)
        moved = framed(vertices, framing)
        if not framing.is_silhouette_centered:
            uv = projected(moved, framing, HALF_FRAME / math.tan(fov_rad / 2))
            if np.abs(uv.min(0) + uv.max(0)).max() / 2 > MOST_BESIDE * np.ptp(uv, axis=0).max():  # as the product does
                framing = replace(framing, is_silhouette_centered=True)
                moved = framed(vertices, framing)
        if is_usable(moved, framing):
            break
    jitter = ROUGH_JITTER if rng.random() < P_ROUGH else FINE_JITTER
    offset = rng.normal(size=3) * (jitter * REFERENCE_EXTENT)
    if framing.is_silhouette_centered:  # the product centers it whatever the offset is: what is left of it is depth
        backward = orbit_camera(framing.azimuth_rad, framing.elevation_rad, 1.0)[:, 2]
        offset = backward * (offset @ backward)
    return moved + offset, framing


def clear_distance(vertices: np.ndarray, azimuth_rad: float, elevation_rad: float) -> float:
    """Smallest orbit distance from which all vertices are at least `CLEARANCE` in front of the camera."""
    return float((vertices @ np.array(orbit_position(azimuth_rad, elevation_rad))).max()) + CLEARANCE


def tight_distance(
    vertices: np.ndarray, azimuth_rad: float, elevation_rad: float, fov_rad: float, fill: float
) -> float:
    """Orbit distance at which the vertex farthest from the middle of the frame is at `fill` of its half."""
    points = vertices @ orbit_camera(azimuth_rad, elevation_rad, 0.0)[:, :3]
    return float((np.abs(points[:, :2]).max(1) / (math.tan(fov_rad / 2) * fill) + points[:, 2]).max())


def half_frame(
    rng: np.random.Generator, vertices: np.ndarray, framing: Framing, angles_rad: list[tuple[float, float]]
) -> float:
    """Half side at the origin of the frames of a group: the first one, which the product tries on every object and which so
    must not tell its size, or the one that the product comes to (`warm_start.FRAMES`).

    Args:
        angles_rad: Azimuths from the reference and elevations of the views.
    """
    if rng.random() < P_FIRST_FRAME:
        return FRAMES[0][0]
    tan_half = math.tan(framing.fov_rad / 2)
    local = [
        vertices @ orbit_camera(framing.azimuth_rad + azimuth, elevation, 0.0)[:, :3]
        for azimuth, elevation in angles_rad
    ]
    for half, full in FRAMES:
        reach = sorted(
            float((np.abs(p[:, :2]).max(1) / np.maximum(half - p[:, 2] * tan_half, 1e-3)).max()) for p in local
        )
        if reach[max(0, len(reach) - 3)] < full:  # all but two views, as `filled_part` has it
            break
    return half


def random_cameras(
    rng: np.random.Generator, vertices: np.ndarray, framing: Framing, shape: Shape = Shape()
) -> np.ndarray:
    """(n_views, 4) cameras: the reference, then the product's ring, or others at azimuths spread all around."""
    tan_half, n = math.tan(framing.fov_rad / 2), shape.n_views - 1
    is_ring = not shape.is_tight and rng.random() < P_RING
    if is_ring:
        heights = [math.radians(RING_ELEVATIONS_DEG[k % len(RING_ELEVATIONS_DEG)]) for k in range(n)]
        angles = list(zip(ring_azimuths_rad(n), heights))
    else:
        azimuths = rng.uniform(-math.pi, math.pi) + (np.arange(n) + rng.uniform(-0.4, 0.4, n)) * (2 * math.pi / n)
        ranges = [(-15, 55) if rng.random() < 0.5 else (0, 35) for _ in range(n)]
        angles = [(float(azimuth), math.radians(rng.uniform(*range_))) for azimuth, range_ in zip(azimuths, ranges)]
    half = 0.0 if shape.is_tight else half_frame(rng, vertices, framing, angles)
    cameras = [(0.0, framing.elevation_rad, HALF_FRAME / tan_half, tan_half)]
    for azimuth, elevation in angles:
        seen_from = framing.azimuth_rad + azimuth, elevation
        if shape.is_tight:
            fitting = tight_distance(vertices, *seen_from, framing.fov_rad, rng.uniform(0.8, 0.95))
            distance = max(fitting, 0.6 / tan_half)
        else:
            distance = half / tan_half * (1 if is_ring else rng.uniform(0.9, 1.12))
        cameras.append((azimuth, elevation, max(distance, clear_distance(vertices, *seen_from)), tan_half))
    return np.array(cameras, np.float32)


def load_mesh(rng: np.random.Generator, task: Task) -> PoolMesh:
    """The object of a task; in training some objects get a companion."""
    if task.source == "procedural":
        mesh = random_shape(rng)
        return with_companion(rng, mesh, random_shape(rng)) if rng.random() < 0.25 else mesh
    mesh = POOLS[task.source].mesh(task.index)
    if task.is_train and rng.random() < P_COMPANION:
        indices = POOLS[task.source].indices("train")
        return with_companion(rng, mesh, POOLS[task.source].mesh(int(rng.choice(indices))))
    return mesh


def render_group(
    rng: np.random.Generator,
    mesh: PoolMesh,
    is_train: bool,
    views: np.ndarray,
    cameras: np.ndarray,
    shape: Shape = Shape(),
) -> float:
    """Fill one group's views and cameras.

    Returns:
        The longest box side as a multiple of the reference's extent; 0 where the reference is one without a camera, for which
        the product knows no size. So a known size also says that the origin is the box center.
    """
    if is_train:
        mesh = without_parts(rng, mesh) if rng.random() < P_WITHOUT_PARTS else mesh
        mesh = recolored(rng, mesh) if rng.random() < P_RECOLOR else mesh
        mesh = replace(mesh, vertices=reshaped(rng, mesh.vertices))
    for _ in range(4):
        vertices, framing = place(rng, mesh.vertices)
        rows = random_cameras(rng, vertices, framing, shape)
        render_views(replace(mesh, vertices=vertices.astype(np.float32)), framing, rows, random_light(rng), views)
        if (views[0, ..., 3] > 127).mean() >= MIN_COVERAGE:
            cameras[:] = rows
            return 0.0 if framing.is_silhouette_centered else float(np.ptp(vertices, axis=0).max()) / REFERENCE_EXTENT
    raise ValueError(f"no reference in four shows more than {MIN_COVERAGE:.0%} of it")


def render_views(mesh: PoolMesh, framing: Framing, rows: np.ndarray, light: Light, views: np.ndarray) -> None:
    """Fill `views` with one picture a camera row, azimuths counted from the framing's own."""
    scene = Rasterizer(mesh)
    for view, (azimuth, elevation, distance, _) in enumerate(rows.tolist()):
        c2w = orbit_camera(framing.azimuth_rad + azimuth, elevation, distance)
        views[view] = scene.render(c2w, framing.fov_rad, views.shape[1], light)


def render_object(task: Task) -> str:
    """Render all groups of one object into the round's files; returns what went wrong, or nothing."""
    rng = np.random.default_rng([task.round_index, task.row, task.shape.seed])
    views, cameras, sizes = (
        np.lib.format.open_memmap(f"{task.out}/{name}_{task.round_index}.npy", mode="r+")
        for name in ("views", "cameras", "sizes")
    )
    try:
        mesh = load_mesh(rng, task)
        for group in range(task.shape.n_groups):
            sizes[task.row, group] = render_group(
                rng, mesh, task.is_train, views[task.row, group], cameras[task.row, group], task.shape
            )
    except (ValueError, IndexError, ArithmeticError, MemoryError, OSError) as error:
        # One bad object must not end the run; the trainer skips it.
        cameras[task.row] = 0
        return f"{task.source} {task.index}: {error!r}"[:200]
    return ""


def open_pools(folder: Path, sources: tuple[str, ...], split: str) -> list[tuple[str, int]]:
    """Open the pool files found; returns the objects (source, index) of the split, procedural ones last.

    Raises:
        InputError: A file holds another source than its name says, or there is no object.
    """
    POOLS.clear()
    for source in sources:
        path = folder / f"pool_{source}.npz"
        if source != "procedural" and path.exists():
            POOLS[source] = Pool(path)
            if POOLS[source].source != source:
                raise InputError(f"{path} holds objects of {POOLS[source].source!r}, not of {source!r}: build it again")
    objects = [(source, int(index)) for source, pool in POOLS.items() for index in pool.indices(split)]
    if not objects and sources != ("procedural",):
        raise InputError(
            f"no object of split {split!r} found: {folder} must hold pool_*.npz of {', '.join(sources)} (see pool_build)"
        )
    if split == "train" and "procedural" in sources:
        objects += [("procedural", index) for index in range(max(1, round(PROCEDURAL_SHARE * len(objects))))]
    return objects


def take_space(path: Path) -> None:
    """Give a file that is still empty its place on the disk: a write to a memory map that finds none kills the process."""
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def render_round(
    out: Path,
    objects: list[tuple[str, int]],
    round_index: int,
    is_train: bool,
    mapped: Callable,
    shape: Shape = Shape(),
) -> None:
    """Render one round and mark it as done; `mapped` is `map` or another processes' likeness of it.

    Raises:
        InputError: The disk does not hold it.
    """
    start, counts = time.time(), (len(objects), shape.n_groups, shape.n_views)
    arrays = {"views": (*counts, shape.size, shape.size, 4), "cameras": (*counts, 4), "sizes": counts[:2]}
    paths = {name: out / f"{name}_{round_index}.npy" for name in arrays}
    try:
        for name, full_shape in arrays.items():
            kind = np.uint8 if name == "views" else np.float32
            np.lib.format.open_memmap(paths[name], mode="w+", dtype=kind, shape=full_shape).flush()
            take_space(paths[name])
    except OSError as error:
        for path in paths.values():
            path.unlink(missing_ok=True)
        done = f"rounds that are done stay, {round_index} of them; ask for no more --rounds, or take a folder with more space"
        raise InputError(f"{writing_failed(out, error)} ({done})") from None
    tasks = [Task(row, *item, round_index, str(out), is_train, shape) for row, item in enumerate(objects)]
    # Heavy objects are spread over the round by a fixed shuffle.
    tasks = [tasks[i] for i in np.random.default_rng(0).permutation(len(tasks))]
    faults = [fault for fault in mapped(render_object, tasks) if fault]
    (out / f"done_{round_index}").write_text(f"{len(objects)} {time.time() - start:.1f}\n")
    n_views = math.prod(counts)
    print(
        f"round {round_index}: {n_views} views in {time.time() - start:.1f} s; failed: {faults or 'none'}", flush=True
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, required=True, help="folder of the pool_*.npz files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--split", choices=("train", "val"), default="train")
    parser.add_argument("--sources", type=selected_sources, default=SOURCES, help="all, green, or names with commas")
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--most", type=int, default=0, help="only so many objects, evenly picked; 0 is all")
    parser.add_argument("--seed", type=int, default=7, help="another one draws other views")
    parser.add_argument("--size", type=int, default=SIZE, help="pixels a side")
    parser.add_argument("--groups", type=int, default=N_GROUPS, help="references of each object and round")
    parser.add_argument("--views", type=int, default=N_VIEWS, help="views of each group, the reference included")
    parser.add_argument("--tight", action="store_true", help="frames that just hold the object")
    options = parser.parse_args(arguments)
    shape = Shape(options.size, options.groups, options.views, options.tight, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    for stale in options.out.glob("done_*"):
        stale.unlink()
    compiled_library()
    objects = open_pools(options.pool, options.sources, options.split)
    missing = [source for source in options.sources if source not in POOLS and source != "procedural"]
    if missing:
        print(f"left out, as {options.pool} has no pool file of it: {', '.join(missing)}", flush=True)
    if options.most:
        objects = objects[:: max(1, len(objects) // options.most)][: options.most]
    np.save(options.out / "sources.npy", np.array([SOURCES.index(source) for source, _ in objects]))
    is_train = options.split == "train"
    if options.processes == 1:  # in this process: no fork, which other libraries' threads would not survive
        for round_index in range(options.rounds):
            render_round(options.out, objects, round_index, is_train, map, shape)
        return
    # Forked workers share the opened pools.
    with multiprocessing.get_context("fork").Pool(options.processes) as workers:
        for round_index in range(options.rounds):
            mapped = partial(workers.imap_unordered, chunksize=4)
            render_round(options.out, objects, round_index, is_train, mapped, shape)


if __name__ == "__main__":
    try:
        main()
    except ConradError as error:
        sys.exit(f"error: {error}")
