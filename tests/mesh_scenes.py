"""Simple bodies with known surfaces, seen by cameras: what the mesh tests look at."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from conrad_engine.cameras import Camera, orbit_camera
from conrad_engine.mesh.mesh import Mesh

AABB = torch.tensor([[-0.85, -1.0, -0.85], [0.85, 1.0, 0.85]])


def camera(azimuth_deg: float = 0.0, elevation_deg: float = 10.0, size: int = 192) -> Camera:
    return orbit_camera(math.radians(azimuth_deg), math.radians(elevation_deg), 3.0, 0.6, size)


def soft_density(signed_distance, sharpness: float = 40.0):
    """σ of positions that is 17 (25 log 2) where the signed distance is zero and falls off softly, as a trained field's."""
    return lambda p: 25 * F.softplus(-sharpness * signed_distance(p))


def ball(radius: float, center=(0.0, 0.0, 0.0)):
    return lambda p: (p - torch.tensor(center)).norm(dim=-1) - radius


def rod(radius: float, a, b):
    a, b = torch.tensor(a), torch.tensor(b)

    def distance(p):
        t = ((p - a) @ (b - a) / (b - a).square().sum()).clamp(0, 1)
        return (p - a - t[:, None] * (b - a)).norm(dim=-1) - radius

    return distance


def union(*bodies):
    return lambda p: torch.stack([body(p) for body in bodies]).amin(0)


def trace(signed_distance, view: Camera) -> tuple[np.ndarray, np.ndarray]:
    """Mask and ray distances (nan where nothing is) by sphere tracing."""
    origins, directions = view.rays()
    distances = torch.full((len(origins),), 1.8)
    for _ in range(80):
        distances = distances + signed_distance(origins + distances[:, None] * directions).clamp(max=0.3) * 0.95
    is_hit = (signed_distance(origins + distances[:, None] * directions) < 2e-3) & (distances < 4.2)
    shape = view.height, view.width
    return is_hit.float().view(shape).numpy(), torch.where(is_hit, distances, torch.nan).view(shape).numpy()


def sphere_mesh(radius: float = 0.5, n: int = 40) -> Mesh:
    """Latitudes and longitudes, closed, counterclockwise from outside."""
    theta, phi = np.linspace(0, np.pi, n + 1)[1:-1], np.arange(2 * n) * np.pi / n
    t, f = np.meshgrid(theta, phi, indexing="ij")
    rings = np.stack([np.sin(t) * np.cos(f), np.sin(t) * np.sin(f), np.cos(t)], -1).reshape(-1, 3)
    vertices = np.concatenate([rings, [[0, 0, 1], [0, 0, -1]]]) * radius
    index = np.arange(len(rings)).reshape(n - 1, 2 * n)
    right = np.roll(index, -1, axis=1)
    quads = index[:-1], index[1:], right[1:], right[:-1]
    top = np.stack([np.full(2 * n, len(rings)), index[0], right[0]], -1)
    bottom = np.stack([np.full(2 * n, len(rings) + 1), right[-1], index[-1]], -1)
    faces = [np.stack([quads[0], quads[1], quads[2]], -1), np.stack([quads[0], quads[2], quads[3]], -1)]
    faces = np.concatenate([*(part.reshape(-1, 3) for part in faces), top, bottom])
    return Mesh(vertices.astype(np.float32), faces.astype(np.int32))


def box_mesh(half: float = 0.4) -> Mesh:
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float32) * half
    quads = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
    faces = [triangle for a, b, c, d in quads for triangle in ((a, b, c), (a, c, d))]
    return Mesh(corners, np.array(faces, np.int32))


def euler_number(mesh: Mesh) -> int:
    edges = np.unique(
        np.sort(np.concatenate([mesh.faces[:, [0, 1]], mesh.faces[:, [1, 2]], mesh.faces[:, [2, 0]]]), 1), axis=0
    )
    return len(np.unique(mesh.faces)) - len(edges) + len(mesh.faces)


def volume(mesh: Mesh) -> float:
    """Enclosed volume, positive where faces are counterclockwise from outside."""
    a, b, c = (mesh.vertices[mesh.faces[:, k]].astype(np.float64) for k in range(3))
    return float((a * np.cross(b, c)).sum() / 6)
