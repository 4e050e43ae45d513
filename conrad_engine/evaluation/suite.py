"""A suite: a folder of objects with a picture each and the truth of what the picture does not show.

    suite.json                 how it was made, and the names of the objects
    OBJECT/picture.png         RGBA, straight alpha: what the pipeline gets
    OBJECT/picture_degraded.png, picture_photo.png   the same object as careless photographs show it (`photo_like`)
    OBJECT/camera.json         the picture's camera (`CameraSetup`)
    OBJECT/depth.npz           `z_depths` (H, W) of the picture, 0 outside the object
    OBJECT/truth.npz           `vertices`, `faces`, and `points` (n, 3) on the surface that can be seen from outside
    OBJECT/views.json, views/  novel views: azimuth and elevation against the picture's, camera, picture file
    OBJECT/meta.json           name, source, license, authors, light

All lengths are in the world of camera.json, +Z up. A picture and the novel views of one object share one light.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from ..cameras import Camera, CameraSetup
from ..errors import InputError
from .geometry import N_POINTS, sample_surface
from .metrics import back_camera, print_through, printed_through

if TYPE_CHECKING:
    from ..training.pool import Pool, PoolMesh
    from ..training.raster import Light, Rasterizer

AZIMUTHS_DEG = (0, 45, 90, 135, 180, 225, 270, 315)
ELEVATIONS_DEG = (0, 30)
FOV_DEG = 40.0
FIT_ELEVATION_DEG = 20.0
FIT_FILL = 0.85
"""The distance is such that the object fills at most this part of the frame from all around at that elevation."""
SUPERSAMPLE = 4
VISIBLE_TOLERANCE = 0.01
"""A sampled point this far behind the z-buffer still counts as seen; longest side 1."""


@dataclass(frozen=True)
class TruthView:
    """One novel view."""

    azimuth_deg: float
    """Against the picture's own azimuth, around the object's center, counterclockwise from above."""
    elevation_deg: float
    camera: Camera
    path: Path

    @property
    def is_rear(self) -> bool:
        """More than 130 degrees of azimuth away from the picture."""
        return abs((self.azimuth_deg + 180) % 360 - 180) > 130

    def rgba(self) -> np.ndarray:
        """(height, width, 4) float in [0, 1]."""
        return read_rgba(self.path)


@dataclass(frozen=True)
class SuiteObject:
    """One object of a suite, read where asked for."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def picture_path(self) -> Path:
        return self.folder / "picture.png"

    @cached_property
    def setup(self) -> CameraSetup:
        return CameraSetup.from_json(self.folder / "camera.json")

    @cached_property
    def meta(self) -> dict:
        return _read_json(self.folder / "meta.json")

    @cached_property
    def views(self) -> list[TruthView]:
        views = []
        for entry in _read_json(self.folder / "views.json"):
            camera = CameraSetup.from_json(
                {**entry["camera"], "object_center": self.setup.object_center.tolist()}
            ).camera
            views.append(
                TruthView(entry["azimuth_deg"], entry["elevation_deg"], camera, self.folder / "views" / entry["file"])
            )
        return views

    @cached_property
    def points(self) -> np.ndarray:
        """(n, 3): points on the part of the surface that can be seen from somewhere."""
        with np.load(self.folder / "truth.npz") as arrays:
            return arrays["points"].astype(np.float64)

    def z_depths(self) -> np.ndarray:
        """(H, W) float32 along the optical axis of the picture's camera, 0 outside the object."""
        with np.load(self.folder / "depth.npz") as arrays:
            return arrays["z_depths"]


def _read_json(path: Path) -> dict | list:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}; make the suite again") from None


def read_rgba(path: Path) -> np.ndarray:
    """(height, width, 4) float in [0, 1], straight alpha."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGBA"), np.float64) / 255


def write_picture(rgba: np.ndarray, path: Path) -> None:
    """Write an 8-bit or float picture as PNG."""
    if rgba.dtype != np.uint8:
        rgba = np.round(np.clip(rgba, 0, 1) * 255).astype(np.uint8)
    Image.fromarray(rgba).save(path)


def read_object(folder: str | Path) -> SuiteObject:
    """One object of a suite.

    Raises:
        InputError: The folder is not one.
    """
    folder = Path(folder)
    missing = [n for n in ("picture.png", "camera.json", "views.json", "truth.npz") if not (folder / n).is_file()]
    if missing:
        raise InputError(f"{folder} is not an object of a suite: it lacks {', '.join(missing)}")
    return SuiteObject(folder)


def read_suite(folder: str | Path) -> list[SuiteObject]:
    """The objects of a suite, in its order.

    Raises:
        InputError: The folder holds no suite, or one whose making was interrupted.
    """
    folder = Path(folder)
    if not (folder / "suite.json").is_file():
        raise InputError(f"{folder} is not a finished suite: it has no suite.json; make one with --make-suite")
    return [read_object(folder / name) for name in _read_json(folder / "suite.json")["objects"]]


def make_suite(
    pool: str | Path,
    out: str | Path,
    split: str = "val",
    count: int | None = None,
    picture_size: int = 512,
    view_size: int = 256,
    elevation_deg: float = 15.0,
    seed: int = 0,
    photos: list[Path] | None = None,
) -> list[SuiteObject]:
    """Render a suite from the mesh pool.

    Args:
        pool: A folder of pool files, or one pool file.
        out: Folder for the suite; made if missing.
        split: `val` or `train`.
        count: A random choice of this many objects; all of them when None.
        picture_size, view_size: Pixels a side of the pictures and of the novel views.
        elevation_deg: Of the picture's camera.
        seed: Of yaw, light and degradations; an object's look depends on it and on the object alone.
        photos: Backgrounds of the photo-like pictures; photos that come with scikit-image when None.

    Raises:
        InputError: There are no pool files, or they have no such objects.
    """
    from .photo_like import background_photos

    pools = _open_pools(Path(pool))
    items = [(source, int(index)) for source in pools for index in source.indices(split)]
    if not items:
        raise InputError(f"the pool at {pool} has no objects in split {split!r}: use val or train")
    if count is not None and count < len(items):
        chosen = np.random.default_rng(seed).permutation(len(items))[:count]
        items = [items[i] for i in sorted(chosen)]
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    backgrounds = background_photos(photos)
    settings = {"split": split, "picture_size": picture_size, "view_size": view_size, "elevation_deg": elevation_deg}
    names = []
    for source, index in items:
        folder = out / _object_name(source, index)
        rng = np.random.default_rng([seed, index, *source.source.encode()])
        _write_object(source, index, folder, settings, rng, backgrounds)
        names.append(folder.name)
    content = {**settings, "seed": seed, "fov_deg": FOV_DEG, "objects": names}
    (out / "suite.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return read_suite(out)


def _open_pools(path: Path) -> list[Pool]:
    from ..training.pool import Pool

    files = [path] if path.is_file() else sorted(path.glob("pool_*.npz"))
    if not files:
        raise InputError(f"{path} has no pool files (pool_SOURCE.npz); give the folder that holds them")
    return [Pool(file) for file in files]


def _object_name(source: Pool, index: int) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", str(source.names[index]).lower()).strip("-")[:40]
    return f"{source.source}-{index:04d}-{slug}".rstrip("-")


def _write_object(
    source: Pool, index: int, folder: Path, settings: dict, rng: np.random.Generator, backgrounds: list[np.ndarray]
) -> None:
    from ..training.raster import Rasterizer, fit_distance, random_light
    from .photo_like import composited, degraded

    (folder / "views").mkdir(parents=True, exist_ok=True)
    mesh = source.mesh(index)
    scene = Rasterizer(mesh)
    light, yaw = random_light(rng), float(rng.uniform(-math.pi, math.pi))
    distance = fit_distance(mesh.vertices, math.radians(FOV_DEG), math.radians(FIT_ELEVATION_DEG), FIT_FILL)
    camera = _orbit_camera(yaw, math.radians(settings["elevation_deg"]), distance, settings["picture_size"])
    picture, z_depths = _render(scene, camera, light)
    write_picture(picture, folder / "picture.png")
    write_picture(degraded(picture / 255, rng), folder / "picture_degraded.png")
    background = backgrounds[int(rng.integers(len(backgrounds)))]
    write_picture(composited(picture / 255, background, rng), folder / "picture_photo.png")
    np.savez_compressed(folder / "depth.npz", z_depths=z_depths)
    setup = CameraSetup(camera, torch.zeros(3, dtype=torch.float64), 1.0)
    _write_json(setup.to_json(), folder / "camera.json")
    _write_views(scene, light, yaw, distance, settings["view_size"], folder)
    points = visible_points(scene, mesh, rng)
    np.savez_compressed(folder / "truth.npz", vertices=mesh.vertices, faces=mesh.faces, points=points)
    meta = {
        "name": str(source.names[index]),
        "source": source.source,
        "key": str(source.keys[index]),
        "category": str(source.categories[index]),
        "license": str(source.licenses[index]),
        "authors": str(source.authors[index]),
        "yaw_rad": yaw,
        "light": asdict(light),
        **_truth_print_through(scene, light, setup, picture),
    }
    _write_json(meta, folder / "meta.json")


def _write_json(data: dict | list, path: Path) -> None:
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")


def _orbit_camera(azimuth_rad: float, elevation_rad: float, distance: float, size: int) -> Camera:
    from ..training.raster import orbit_camera

    focal = size / 2 / math.tan(math.radians(FOV_DEG) / 2)
    intrinsics = torch.tensor([focal, focal, size / 2, size / 2], dtype=torch.float64)
    return Camera(torch.from_numpy(orbit_camera(azimuth_rad, elevation_rad, distance)), intrinsics, size, size)


def _render(scene: Rasterizer, camera: Camera, light: Light) -> tuple[np.ndarray, np.ndarray]:
    fov_rad = 2 * math.atan(camera.width / 2 / float(camera.intrinsics[0]))
    return scene.render_with_depth(camera.c2w.numpy(), fov_rad, camera.width, light, SUPERSAMPLE)


def _write_views(scene: Rasterizer, light: Light, yaw: float, distance: float, size: int, folder: Path) -> None:
    entries = []
    for elevation_deg in ELEVATIONS_DEG:
        for azimuth_deg in AZIMUTHS_DEG:
            camera = _orbit_camera(yaw + math.radians(azimuth_deg), math.radians(elevation_deg), distance, size)
            name = f"az{azimuth_deg:03d}_el{elevation_deg:02d}.png"
            write_picture(_render(scene, camera, light)[0], folder / "views" / name)
            numbers = CameraSetup(camera, torch.zeros(3, dtype=torch.float64)).to_json()
            numbers = {key: numbers[key] for key in ("c2w", "intrinsics", "width", "height")}
            entries.append(
                {"azimuth_deg": azimuth_deg, "elevation_deg": elevation_deg, "file": name, "camera": numbers}
            )
    _write_json(entries, folder / "views.json")


def _truth_print_through(scene: Rasterizer, light: Light, setup: CameraSetup, picture: np.ndarray) -> dict:
    """How far the object itself is alike on both sides: a chair is, and that is no fault of a reconstruction."""
    back = back_camera(setup.camera, setup.object_center.numpy())
    view, z_depths = _render(scene, back, light)
    scores = print_through(view / 255, printed_through(picture / 255, setup.camera, back, z_depths))
    return {f"truth_{key}": value for key, value in scores.items()}


def sphere_directions(n: int) -> Iterator[tuple[float, float]]:
    """`n` directions spread evenly over the sphere, as azimuth and elevation (a Fibonacci lattice)."""
    for i in range(n):
        yield (i * math.pi * (3 - math.sqrt(5))) % (2 * math.pi), math.asin(1 - (2 * i + 1) / n)


def visible_points(
    scene: Rasterizer, mesh: PoolMesh, rng: np.random.Generator, n_cameras: int = 60, size: int = 384
) -> np.ndarray:
    """Points of the surface that some camera outside can see, float32 (at most `N_POINTS`, 3).

    Meshes of the pool have drawers, engines and double walls inside, which no reconstruction from pictures should be
    asked for. A point counts as seen where it is not behind the z-buffer of one of `n_cameras` all around.
    """
    from ..training.raster import Light

    points = sample_surface(mesh.vertices, mesh.faces, 4 * N_POINTS, rng)
    seen = np.zeros(len(points), bool)
    for azimuth_rad, elevation_rad in sphere_directions(n_cameras):
        camera = _orbit_camera(azimuth_rad, elevation_rad, 3.0, size)
        z_buffer = scene.render_with_depth(
            camera.c2w.numpy(), math.radians(FOV_DEG), size, Light((0.0, 0.0, 1.0)), supersample=1
        )[1]
        uv, z_depths = camera.project(torch.from_numpy(points))
        columns, rows = np.clip(np.floor(uv.numpy()).astype(int), 0, size - 1).T
        nearest = z_buffer[rows, columns]
        seen |= (nearest == 0) | (z_depths.numpy() < nearest + VISIBLE_TOLERANCE)
    return rng.permutation(points[seen])[:N_POINTS].astype(np.float32)
