"""Fast renders of pool meshes: `rast.c` through ctypes, orbit cameras and random light. Needs numpy and a C compiler.

World: +Z up, any scale, but nothing nearer to a camera than 0.05. Camera: OpenGL/Blender (+X right, +Y up, looks along -Z).
Orbit: azimuth 0 looks from -Y, positive counterclockwise from above; elevation 0 is level.
The library is compiled once; many processes may start at the same time.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import MissingDependency
from .pool import PoolMesh

SOURCE = Path(__file__).with_name("rast.c")
# No -march=native: the compiled file may travel to another machine together with the checkout.
ARCHITECTURE_FLAGS = ("-mavx2", "-mfma") if platform.machine() in ("x86_64", "AMD64") else ()
# What -ffast-math would allow, but for finite numbers only; that flag itself also links code that has the whole process
# round denormal numbers to zero from then on.
FAST_FLAGS = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math")
COMPILER_FLAGS = ("-O3", *FAST_FLAGS, *ARCHITECTURE_FLAGS, "-shared", "-fPIC")


def compiled_library() -> Path:
    """Path of the shared library, compiled where it is missing.

    It lies beside `rast.c`, or in the user's folder for temporary files where that place is read-only. Its name holds a
    digest of source and flags, so another version never takes its place.

    Raises:
        MissingDependency: There is no C compiler, or it fails.
    """
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(COMPILER_FLAGS).encode()).hexdigest()[:12]
    folder = SOURCE.parent
    if not os.access(folder, os.W_OK):
        folder = Path(tempfile.gettempdir()) / f"conrad-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():  # a library out of another user's folder would be their program
            raise MissingDependency(f"{folder} belongs to another user: set TMPDIR to a folder of your own")
    library = folder / f"rast-{digest}.so"
    if library.exists():
        return library
    compiler = os.environ.get("CC", "gcc")
    # Compile under another name, then rename: a process never loads a half-written file.
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    command = [compiler, *COMPILER_FLAGS, str(SOURCE), "-o", temporary, "-lm"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        Path(temporary).unlink(missing_ok=True)
        said = error.stderr.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else str(error)
        reason = " ".join(said.split())[:300]
        raise MissingDependency(
            f"rendering training views needs a C compiler and {compiler!r} failed ({reason}): "
            "install gcc or name another compiler in the environment variable CC"
        ) from None
    os.replace(temporary, library)
    return library


@dataclass(frozen=True)
class Light:
    """color * (ambient + hemisphere * n_z + key * max(0, n . direction)), on sRGB values."""

    direction: tuple[float, float, float]
    """Unit vector from the object to the lamp, world space."""
    ambient: float = 0.52
    hemisphere: float = 0.13
    key: float = 0.42


def light_from(
    azimuth_rad: float, elevation_rad: float, ambient: float = 0.52, hemisphere: float = 0.13, key: float = 0.42
) -> Light:
    """A light at an orbit position (same angles as the camera's)."""
    x, y, z = orbit_position(azimuth_rad, elevation_rad)
    return Light((x, y, z), ambient, hemisphere, key)


def default_light(camera_azimuth_rad: float) -> Light:
    """A studio light that turns with the camera: 35 degrees to its right, 50 degrees up."""
    return light_from(camera_azimuth_rad + math.radians(35), math.radians(50))


def random_light(rng: np.random.Generator) -> Light:
    """A light from a random upper direction, with random strength; a white diffuse surface peaks at 0.8 to 1.1."""
    key = rng.uniform(0.2, 0.6)
    hemisphere = rng.uniform(0.0, 0.2)
    ambient = rng.uniform(0.85, 1.1) - key - 0.6 * hemisphere
    return light_from(rng.uniform(-math.pi, math.pi), math.radians(rng.uniform(15, 80)), ambient, hemisphere, key)


def orbit_position(azimuth_rad: float, elevation_rad: float) -> tuple[float, float, float]:
    """Unit vector of an orbit position. Azimuth 0 is -Y, a quarter turn is +X."""
    level = math.cos(elevation_rad)
    return level * math.sin(azimuth_rad), -level * math.cos(azimuth_rad), math.sin(elevation_rad)


def orbit_camera(azimuth_rad: float, elevation_rad: float, distance: float) -> np.ndarray:
    """Camera-to-world matrix (3, 4) of a camera that looks at the origin; elevation within ±90 degrees."""
    backward = np.array(orbit_position(azimuth_rad, elevation_rad))
    right = np.array([math.cos(azimuth_rad), math.sin(azimuth_rad), 0.0])
    return np.stack([right, np.cross(backward, right), backward, backward * distance], axis=1)


def fit_distance(
    vertices: np.ndarray,
    fov_rad: float,
    elevation_rad: float = math.radians(20),
    fill: float = 0.9,
    n_azimuths: int = 8,
) -> float:
    """Smallest orbit distance from which the object fills at most `fill` of the frame, from all azimuths.

    Args:
        vertices: (n_vertices, 3), world units.
        fov_rad: Full angle of view of the square image.
        elevation_rad: Elevation of the orbit that must fit; other elevations may overshoot slightly.
        fill: Largest part of the half frame that a projected vertex may reach.
        n_azimuths: Number of orbit positions tested.
    """
    reach = math.tan(fov_rad / 2) * fill
    distance = 0.0
    for azimuth_rad in np.arange(n_azimuths) * (2 * math.pi / n_azimuths):
        camera_points = vertices @ orbit_camera(azimuth_rad, elevation_rad, 0.0)[:, :3]
        needed = np.abs(camera_points[:, :2]).max(axis=1) / reach + camera_points[:, 2]
        distance = max(distance, float(needed.max()))
    return distance


def places(vertices: np.ndarray) -> np.ndarray:
    """(n_vertices,): the same number for vertices at the same place, which UV seams split; 16 bits a coordinate."""
    low = vertices.min(axis=0)
    grid = np.round((vertices - low) * (60000 / max(float((vertices - low).max()), 1e-9))).astype(np.int64)
    return np.unique((grid[:, 0] << 34) + (grid[:, 1] << 17) + grid[:, 2], return_inverse=True)[1]


def corner_normals(vertices: np.ndarray, faces: np.ndarray, crease_deg: float = 60.0) -> np.ndarray:
    """Smooth normals per face corner (n_faces, 3, 3); corners sharper than the crease keep the face's own normal."""
    corners = vertices[faces]
    face_normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    ids = places(vertices)[faces]
    sums = np.stack([np.bincount(ids.ravel(), np.repeat(face_normals[:, k], 3)) for k in range(3)], axis=1)
    smooth = sums[ids]
    smooth /= np.maximum(np.linalg.norm(smooth, axis=2, keepdims=True), 1e-12)
    flat = face_normals / np.maximum(np.linalg.norm(face_normals, axis=1, keepdims=True), 1e-12)
    is_sharp = (smooth * flat[:, None]).sum(axis=2) < math.cos(math.radians(crease_deg))
    return np.where(is_sharp[..., None], flat[:, None], smooth).astype(np.float32)


def mip_levels(texture: np.ndarray) -> list[np.ndarray]:
    """The texture (height, width, 4) and its halvings; colors are averaged weighted by alpha."""
    levels = [np.ascontiguousarray(texture)]
    while max(levels[-1].shape[:2]) > 1:
        fine = levels[-1].astype(np.float32)
        height, width = max(fine.shape[0] // 2, 1), max(fine.shape[1] // 2, 1)
        blocks = (
            fine[: height * 2, : width * 2]
            if min(fine.shape[:2]) > 1
            else np.broadcast_to(fine, (*np.maximum(fine.shape[:2], 2), 4))
        )
        blocks = blocks[: height * 2, : width * 2].reshape(height, 2, width, 2, 4)
        weights = blocks[..., 3:] + 1e-3
        rgb = (blocks[..., :3] * weights).sum(axis=(1, 3)) / weights.sum(axis=(1, 3))
        levels.append(np.round(np.concatenate([rgb, blocks[..., 3:].mean(axis=(1, 3))], axis=-1)).astype(np.uint8))
    return levels


def _pointer(array: np.ndarray | None) -> ctypes.c_void_p | None:
    return None if array is None else array.ctypes.data_as(ctypes.c_void_p)


def _check(mesh: PoolMesh) -> None:
    """Refuse what would make the C code read outside of its arrays."""
    limits = {
        "faces": (mesh.faces, 0, len(mesh.vertices)),
        "face_materials": (mesh.face_materials, 0, len(mesh.material_rgba)),
        "material_texture": (mesh.material_texture, -1, len(mesh.textures)),
    }
    for name, (values, low, end) in limits.items():
        if len(values) and (values.min() < low or values.max() >= end):
            raise ValueError(f"{name} go from {values.min()} to {values.max()}, allowed is {low} to {end - 1}")
    if len(mesh.face_materials) != len(mesh.faces) or len(mesh.uvs) != len(mesh.vertices):
        raise ValueError("faces and their materials, or vertices and their uvs, differ in number")
    if not (np.isfinite(mesh.vertices).all() and np.isfinite(mesh.uvs).all()):
        raise ValueError("a vertex or uv is not finite")


class Rasterizer:
    """A mesh made ready for many renders; building one costs a few milliseconds, so render all its views at once."""

    _library: ctypes.CDLL | None = None

    def __init__(self, mesh: PoolMesh) -> None:
        """Prepare a mesh.

        Raises:
            ValueError: An index is out of range, or a number is not finite.
        """
        _check(mesh)
        if Rasterizer._library is None:
            Rasterizer._library = ctypes.CDLL(str(compiled_library()))
        self.vertices = np.ascontiguousarray(mesh.vertices, np.float32)
        self.faces = np.ascontiguousarray(mesh.faces, np.int32)
        self.uvs = np.ascontiguousarray(mesh.uvs, np.float32)
        self.colors = None if mesh.vertex_colors is None else np.ascontiguousarray(mesh.vertex_colors, np.float32)
        self.normals = corner_normals(self.vertices, self.faces)
        self.face_materials = np.ascontiguousarray(mesh.face_materials, np.int32)
        self.material_rgba = np.ascontiguousarray(mesh.material_rgba, np.float32)
        self.material_texture = np.ascontiguousarray(mesh.material_texture, np.int32)
        levels = [mip_levels(texture) for texture in mesh.textures]
        counts = [sum(level.shape[0] * level.shape[1] for level in chain) for chain in levels]
        self.texture_size = np.array([[*chain[0].shape[1::-1], len(chain)] for chain in levels], np.int32).reshape(
            -1, 3
        )
        self.texture_offset = np.cumsum([0, *counts])[:-1].astype(np.int64)
        flat = [level.reshape(-1, 4) for chain in levels for level in chain]
        self.texels = np.ascontiguousarray(np.concatenate(flat)) if flat else np.zeros((1, 4), np.uint8)

    def render(self, c2w: np.ndarray, fov_rad: float, size: int, light: Light, supersample: int = 2) -> np.ndarray:
        """One view as (size, size, 4) 8-bit sRGB with straight alpha, transparent where nothing was hit.

        Args:
            c2w: Camera-to-world matrix (3, 4).
            fov_rad: Full angle of view of the square image.
            size: Pixels a side.
            light: See `default_light` and `random_light`.
            supersample: Samples a pixel along each side; 2 also smooths cut-outs and glass.
        """
        image = np.empty((size, size, 4), np.uint8)
        self._rasterize(c2w, fov_rad, size, light, supersample, image, None)
        return image

    def render_with_depth(
        self, c2w: np.ndarray, fov_rad: float, size: int, light: Light, supersample: int = 2
    ) -> tuple[np.ndarray, np.ndarray]:
        """Like `render`, and z-depths (size, size) along the optical axis, 0 where nothing was hit."""
        image, z_depths = np.empty((size, size, 4), np.uint8), np.empty((size, size), np.float32)
        self._rasterize(c2w, fov_rad, size, light, supersample, image, z_depths)
        return image, z_depths

    def _rasterize(
        self,
        c2w: np.ndarray,
        fov_rad: float,
        size: int,
        light: Light,
        supersample: int,
        image: np.ndarray,
        z_depths: np.ndarray | None,
    ) -> None:
        camera = np.ascontiguousarray(c2w, np.float32)
        lamp = np.array([*light.direction, light.ambient, light.hemisphere, light.key], np.float32)
        failed = Rasterizer._library.rasterize(
            _pointer(self.vertices),
            len(self.vertices),
            _pointer(self.uvs),
            _pointer(self.colors),
            _pointer(self.faces),
            _pointer(self.normals),
            _pointer(self.face_materials),
            len(self.faces),
            _pointer(self.material_rgba),
            _pointer(self.material_texture),
            _pointer(self.texels),
            _pointer(self.texture_offset),
            _pointer(self.texture_size),
            _pointer(camera),
            ctypes.c_float(math.tan(fov_rad / 2)),
            _pointer(lamp),
            size,
            supersample,
            _pointer(image),
            _pointer(z_depths),
        )
        if failed:
            raise MemoryError(f"no memory for a {size} px image with {supersample} samples a side")
