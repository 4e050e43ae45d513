"""Procedural objects: boxes, cylinders and turned shapes with label-like, striped, checkered or noisy textures.

They add what game assets lack: packages, cans, jars and vases whose print differs from side to side.
"""

from __future__ import annotations

import colorsys

import numpy as np

from .pool import PoolMesh

TEXTURE_SIZE = 128
N_SIDES = 40
"""Faces around a turned shape."""


def random_color(rng: np.random.Generator) -> np.ndarray:
    """An sRGB color with enough light to be seen."""
    return np.array(colorsys.hsv_to_rgb(rng.random(), rng.random() ** 1.3 * 0.95, rng.uniform(0.15, 1.0)))


def _stripes(rng: np.random.Generator, image: np.ndarray) -> None:
    count, color = int(rng.integers(1, 7)), random_color(rng)
    phase = np.arange(TEXTURE_SIZE) / TEXTURE_SIZE * count + rng.random()
    is_stripe = phase % 1 < rng.uniform(0.15, 0.6)
    if rng.random() < 0.5:
        image[is_stripe] = color
    else:
        image[:, is_stripe] = color


def _checkers(rng: np.random.Generator, image: np.ndarray) -> None:
    cells = np.arange(TEXTURE_SIZE) * int(rng.integers(2, 9)) // TEXTURE_SIZE
    image[(cells[:, None] + cells[None]) % 2 == 0] = random_color(rng)


def _noise(rng: np.random.Generator, image: np.ndarray) -> None:
    """Clouds: random grids of growing fineness, stretched to the picture and summed."""
    clouds = np.zeros((TEXTURE_SIZE, TEXTURE_SIZE))
    for octave in range(int(rng.integers(2, 6))):
        repeats = TEXTURE_SIZE >> (octave + 1)
        coarse = rng.normal(size=(2 << octave, 2 << octave))
        clouds += np.kron(coarse, np.ones((repeats, repeats))) * 0.6**octave
    amount = np.clip(clouds * rng.uniform(0.1, 0.4) + 0.4, 0, 1)[..., None]
    image[:] = image * (1 - amount) + random_color(rng) * amount


def _label(rng: np.random.Generator, image: np.ndarray) -> None:
    """A framed area with lines of dashes, as print looks from afar, and perhaps a disc."""
    top, left = rng.integers(5, 45, 2)
    bottom, right = TEXTURE_SIZE - rng.integers(5, 45, 2)
    image[top:bottom, left:right] = random_color(rng)
    ink, row = random_color(rng), top + 4
    while row < bottom - 6:
        height = int(rng.integers(2, 10))
        column = left + int(rng.integers(2, 20))
        while column < right - 4:
            width = int(rng.integers(2, 14))
            image[row : min(row + height, bottom), column : min(column + width, right - 2)] = ink
            column += width + int(rng.integers(1, 5))
        row += height + int(rng.integers(2, 8))
    if rng.random() < 0.5:
        rows, columns = np.mgrid[:TEXTURE_SIZE, :TEXTURE_SIZE]
        center, radius = rng.uniform(30, 98, 2), rng.uniform(8, 26)
        image[(rows - center[0]) ** 2 + (columns - center[1]) ** 2 < radius**2] = random_color(rng)


def random_texture(rng: np.random.Generator) -> np.ndarray:
    """(128, 128, 4) 8-bit: a plain ground with one to three patterns on it."""
    image = np.broadcast_to(random_color(rng), (TEXTURE_SIZE, TEXTURE_SIZE, 3)).copy()
    patterns = (_stripes, _checkers, _noise, _label, _label)
    for index in rng.integers(0, len(patterns), int(rng.integers(1, 4))):
        patterns[index](rng, image)
    opaque = np.ones((TEXTURE_SIZE, TEXTURE_SIZE, 1))
    return np.round(np.concatenate([np.clip(image, 0, 1), opaque], -1) * 255).astype(np.uint8)


def box(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Vertices, uvs, faces and face materials (one of six) of a box; each side has the whole texture."""
    size = rng.uniform(0.2, 1.0, 3)
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    vertices, faces = [], []
    for side in range(6):
        outward = np.eye(3)[side // 2] * (1 - 2 * (side % 2))
        up = np.array([0, 1, 0]) if side >= 4 else np.array([0, 0, 1])
        right = np.cross(up, outward)
        vertices.append((outward + corners[:, :1] * right + corners[:, 1:] * up) * size / 2)
        faces += [[4 * side, 4 * side + 1, 4 * side + 2], [4 * side, 4 * side + 2, 4 * side + 3]]
    return np.concatenate(vertices), np.tile((corners + 1) / 2, (6, 1)), np.array(faces), np.repeat(np.arange(6), 2)


def turned(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A surface of revolution about +Z with closed ends: a cylinder in one case of three, else a random profile."""
    n_rings = 2 if rng.random() < 0.33 else int(rng.integers(3, 14))
    heights = np.linspace(0, rng.uniform(0.4, 1.6), n_rings)
    if n_rings == 2:
        radii = np.full(2, rng.uniform(0.2, 0.6)) * [1, rng.uniform(0.6, 1.2)]
    else:
        waves = rng.normal(size=3) * [0.15, 0.1, 0.07]
        phases = np.arange(1, 4)[:, None] * np.linspace(0, np.pi, n_rings) + rng.uniform(0, 6.3, (3, 1))
        radii = np.maximum(0.35 + waves @ np.sin(phases), 0.05)
    radii, heights = np.concatenate([[1e-3], radii, [1e-3]]), np.concatenate([heights[:1], heights, heights[-1:]])
    angles = np.linspace(0, 2 * np.pi, N_SIDES + 1)
    ring = np.stack([np.sin(angles), -np.cos(angles), np.zeros_like(angles)], -1)
    vertices = ring[None] * radii[:, None, None] + heights[:, None, None] * [0, 0, 1]
    length = np.concatenate([[0], np.cumsum(np.hypot(np.diff(radii), np.diff(heights)))])
    u = np.broadcast_to(angles / (2 * np.pi) * int(rng.integers(1, 3)), vertices.shape[:2])
    uvs = np.stack([u, np.broadcast_to(length[:, None] / length[-1], vertices.shape[:2])], -1)
    low = (np.arange(len(radii) - 1)[:, None] * (N_SIDES + 1) + np.arange(N_SIDES)).ravel()
    high = low + N_SIDES + 1
    faces = np.concatenate([np.stack([low, low + 1, high + 1], -1), np.stack([low, high + 1, high], -1)])
    is_end = np.isin(faces[:, 0] // (N_SIDES + 1), (0, len(radii) - 2))
    return vertices.reshape(-1, 3), uvs.reshape(-1, 2), faces, is_end.astype(int)


def random_shape(rng: np.random.Generator) -> PoolMesh:
    """One procedural object, its box centered on the origin."""
    vertices, uvs, faces, materials = box(rng) if rng.random() < 0.5 else turned(rng)
    n_materials = int(materials.max()) + 1
    textures = [random_texture(rng) for _ in range(n_materials if rng.random() < 0.6 else 1)]
    return PoolMesh(
        vertices=(vertices - (vertices.min(0) + vertices.max(0)) / 2).astype(np.float32),
        faces=faces.astype(np.int32),
        uvs=uvs.astype(np.float32),
        face_materials=materials.astype(np.int32),
        material_rgba=np.ones((n_materials, 4), np.float32),
        material_texture=(np.arange(n_materials) % len(textures)).astype(np.int32),
        textures=textures,
    )
