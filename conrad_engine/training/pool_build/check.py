"""Decodes every object of the pool, checks and renders it, measures the speed, and draws contact sheets.

python -m conrad_engine.training.pool_build.check --pool DIR [--processes 16] [--sheets DIR]
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from functools import partial
from multiprocessing import Pool as ProcessPool
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ...errors import ConradError
from ..pool import Pool, PoolMesh
from ..raster import Rasterizer, compiled_library, default_light, fit_distance, orbit_camera, random_light

FOV_RAD = math.radians(40)
ELEVATION_RAD = math.radians(20)
N_VIEWS = 8
SMALLEST_COVERAGE, LARGEST_COVERAGE = 0.04, 0.90

_open_pools: dict[Path, Pool] = {}


def open_pool(path: Path) -> Pool:
    """The pool file, opened once a process."""
    if path not in _open_pools:
        _open_pools[path] = Pool(path)
    return _open_pools[path]


def faults(mesh: PoolMesh) -> list[str]:
    """Broken promises of the format, in words; empty where all is well."""
    found = []
    for name in ("vertices", "uvs", "material_rgba"):
        if not np.isfinite(getattr(mesh, name)).all():
            found.append(f"{name} not finite")
    extents = np.ptp(mesh.vertices, axis=0)
    center = (mesh.vertices.max(axis=0) + mesh.vertices.min(axis=0)) / 2
    if abs(extents.max() - 1) > 1e-3 or np.abs(center).max() > 1e-3:
        found.append(f"box {np.round(extents, 3)} around {np.round(center, 3)}")
    if mesh.faces.min() < 0 or mesh.faces.max() != len(mesh.vertices) - 1:
        found.append("face indices do not match the vertices")
    if len(mesh.face_materials) != len(mesh.faces) or mesh.face_materials.max() != len(mesh.material_rgba) - 1:
        found.append("face materials do not match the materials")
    if len(mesh.textures) and mesh.material_texture.max() != len(mesh.textures) - 1:
        found.append("textures do not match the materials")
    if any(max(texture.shape[:2]) > 128 for texture in mesh.textures):
        found.append("texture over 128 px")
    return found


def check(job: tuple[Path, int]) -> tuple[list[str], np.ndarray, float, float]:
    """Faults, coverage of `N_VIEWS` views, seconds to decode and to build the rasterizer, faces."""
    path, index = job
    start = time.perf_counter()
    mesh = open_pool(path).mesh(index)
    rasterizer = Rasterizer(mesh)
    seconds = time.perf_counter() - start
    found = faults(mesh)
    distance = fit_distance(mesh.vertices, FOV_RAD, ELEVATION_RAD)
    coverage = []
    for view in range(N_VIEWS):
        azimuth_rad = 2 * math.pi * (view + 0.5) / N_VIEWS
        image = rasterizer.render(
            orbit_camera(azimuth_rad, ELEVATION_RAD, distance), FOV_RAD, 64, default_light(azimuth_rad)
        )
        coverage.append(image[..., 3].mean() / 255)
    coverage = np.array(coverage)
    if coverage.min() < SMALLEST_COVERAGE or coverage.max() > LARGEST_COVERAGE:
        found.append(f"coverage {coverage.min():.3f} to {coverage.max():.3f}")
    return found, coverage, seconds, len(mesh.faces)


def render_views(job: tuple[Path, int], n_views: int, size: int) -> int:
    """Decode one object and render it from random cameras under random light, as training would."""
    path, index = job
    rng = np.random.default_rng(index)
    rasterizer = Rasterizer(mesh := open_pool(path).mesh(index))
    distance = fit_distance(mesh.vertices, FOV_RAD, ELEVATION_RAD)
    for _ in range(n_views):
        camera = orbit_camera(
            rng.uniform(0, 2 * math.pi), math.radians(rng.uniform(-10, 60)), distance * rng.uniform(1.0, 1.3)
        )
        rasterizer.render(camera, FOV_RAD, size, random_light(rng))
    return n_views


def sheet(pool: Pool, indices: np.ndarray, columns: int, size: int = 108) -> Image.Image:
    """A contact sheet: one view of each object, with the end of its name."""
    rows = -(-len(indices) // columns)
    picture = Image.new("RGB", (columns * (size + 2), rows * (size + 2)), (235, 238, 242))
    draw = ImageDraw.Draw(picture)
    azimuth_rad = math.radians(35)
    for place, index in enumerate(indices):
        mesh = pool.mesh(int(index))
        camera = orbit_camera(azimuth_rad, ELEVATION_RAD, fit_distance(mesh.vertices, FOV_RAD))
        image = Image.fromarray(Rasterizer(mesh).render(camera, FOV_RAD, size, default_light(azimuth_rad)))
        corner = ((place % columns) * (size + 2), (place // columns) * (size + 2))
        picture.paste(image, corner, image)
        draw.text((corner[0] + 2, corner[1]), str(pool.names[index])[-18:], fill=(200, 0, 0))
    return picture


def report(path: Path, processes) -> int:
    """Print the facts of one file; returns the number of objects at fault."""
    pool = open_pool(path)
    results = list(processes.imap(check, [(path, k) for k in range(len(pool))], chunksize=8))
    coverage = np.array([result[1] for result in results])
    n_faces = np.array([result[3] for result in results])
    print(
        f"\n{path.name}: {len(pool)} objects, {path.stat().st_size / 1e6:.1f} MB, splits {dict(Counter(pool.splits.tolist()))}"
    )
    print(
        f"  faces p10/50/90/max {np.percentile(n_faces, [10, 50, 90, 100]).astype(int).tolist()}, "
        f"over 6000: {(n_faces > 6000).sum()}"
    )
    print(f"  coverage smallest {coverage.min():.3f}, median {np.median(coverage):.3f}, largest {coverage.max():.3f}")
    print(f"  decode + build {1000 * np.mean([result[2] for result in results]):.1f} ms an object")
    print(f"  licenses {dict(Counter(pool.licenses.tolist()).most_common(8))}")
    print(f"  categories {dict(Counter(pool.categories.tolist()).most_common(20))}")
    at_fault = [(pool.keys[k], result[0]) for k, result in enumerate(results) if result[0]]
    for key, found in at_fault[:20]:
        print(f"  FAULT {key}: {'; '.join(found)}")
    return len(at_fault)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets")
    parser.add_argument("--sheet-objects", type=int, default=200)
    arguments = parser.parse_args()
    compiled_library()
    paths = sorted(arguments.pool.glob("pool_*.npz"))
    with ProcessPool(arguments.processes) as processes:
        n_faults = sum(report(path, processes) for path in paths)
        jobs = [(path, k) for path in paths for k in range(len(open_pool(path)))]
        sample = [
            jobs[k] for k in np.random.default_rng(0).permutation(len(jobs))[: 200 * max(1, arguments.processes // 2)]
        ]
        for n_views, size in ((24, 128), (24, 64)):
            start = time.perf_counter()
            n_rendered = sum(
                processes.imap_unordered(partial(render_views, n_views=n_views, size=size), sample, chunksize=2)
            )
            rate = n_rendered / (time.perf_counter() - start)
            print(
                f"\n{size} px, 2 x 2 samples, {n_views} views an object, {arguments.processes} processes: "
                f"{rate:.0f} views/s, decoding included"
            )
    print(
        f"\n{len(jobs)} objects, {sum(path.stat().st_size for path in paths) / 1e6:.1f} MB in all, {n_faults} with faults"
    )
    if arguments.sheets:
        arguments.sheets.mkdir(parents=True, exist_ok=True)
        for path in paths:
            pool = open_pool(path)
            indices = np.sort(np.random.default_rng(3).permutation(len(pool))[: arguments.sheet_objects])
            sheet(pool, indices, 20).save(arguments.sheets / f"{path.stem}.png")


if __name__ == "__main__":
    try:
        main()
    except ConradError as error:
        sys.exit(f"error: {error}")
