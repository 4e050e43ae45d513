"""The texture: the photo where its camera sees the surface, the field's color elsewhere, and no seam between them.

Visibility is the mesh's own (a z-buffer from the photo's camera), so the photo lands where the mesh shows it. What no photo
sees well continues the photos' colors; see `blend`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from scipy.ndimage import distance_transform_edt, maximum_filter, minimum_filter
from torch import Tensor

from ..cameras import Camera
from ..config import MeshConfig
from ..resampling import between_pixels, reduced_by_area
from .blend import complete_colors
from .mesh import TexturedMesh, dots, face_crosses, lengths
from .raster import averaged, finer, look, rasterize, rasterize_projected
from .unwrap import UnwrappedMesh

Z_BUFFER = 1024
"""Pixels along the longer side of the visibility test."""
FACING_BAND = 0.06
"""Cosine range over which the photo fades in above `MeshConfig.facing_min`."""
FILLER_FACING = 0.2, 0.5
"""The same of a filler. A photo is shown up to its outline, as its camera sees it; nobody asks that of a guess, and what lies
at its outline would only be drawn out into streaks."""
TRUSTED = 0.1, 0.3
"""Cosines between which a photo's colors begin to be continued past its end: where the surface turns away, they are those of an
outline or a highlight, some pixels wide, and would be drawn out into patches."""
RIM_FADE = 0.03
"""Distance over which such a rim's colors fade, as a part of the mesh's size."""
JUMP_PX = 20.0
"""A step in depth of more than this many pixels from one to the next is no slope: something stands in front."""
STREAK = 0.02
"""Colors nearer than this count as equal."""
LONG_EDGE, N_SUBDIVISIONS, MOST_FACES = 0.03, 10, 400_000
"""Longer edges, as a part of the mesh's size, are halved for blending; bounds of that."""
N_CORRECTIONS = 2
"""Times that the texture is corrected by what its photos' cameras miss."""
N_SAMPLES = 3
"""Samples a pixel along each side, seen from there."""
CHUNK = 1 << 19


@dataclass(frozen=True)
class Photo:
    """A picture that shows a part of the surface."""

    camera: Camera
    rgb: Float[np.ndarray, "height width 3"]
    """sRGB in [0, 1], continued past the mask."""
    mask: Float[np.ndarray, "height width"]
    is_filler: bool = False
    """Whether it only counts where no photo before it sees a point at all."""


@dataclass(frozen=True)
class Texels:
    """The texels that lie on the surface."""

    pixels: np.ndarray
    """(n,) flat numbers."""
    positions: np.ndarray
    normals: np.ndarray
    faces: np.ndarray
    barycentric: np.ndarray
    nearest: np.ndarray
    """(size, size): which of them colors each texel of the texture: itself, or the nearest one to those outside the charts, so
    that no seam shows at any mip level."""


def bake_texture(
    mesh: UnwrappedMesh, color: Callable[[Tensor], Tensor], photos: list[Photo], config: MeshConfig
) -> TexturedMesh:
    """Color an unwrapped mesh.

    Args:
        color: The field's sRGB color in [0, 1] at positions (n, 3).
        photos: Pictures with their cameras, in the mesh's world.
    """
    size, whole = config.texture_size, mesh
    spacing = texel_length(whole, size)
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        mapped = threads.map(partial(depth_map, whole), [photo.camera for photo in photos])
        compared = threads.map(partial(_comparison, whole, spacing), photos)
        mesh = _subdivided(whole)
        texels, depth_maps = surface_texels(mesh, size), list(mapped)
        visible = visibilities(depth_maps, texels.positions, texels.normals, photos, config)
        photo, weight = _mixed([photo.rgb for photo in photos], photos, visible, len(texels.positions), spacing)
        # The rest are the photo's alone: what the field would say there is slow to ask.
        rest = np.flatnonzero(weight < 1)
        field = _field_colors(texels.positions[rest], color)
        at_vertices = visibilities(depth_maps, mesh.vertices, mesh.normals, photos, config)
        base = field + _change_at_texels(
            mesh, texels.faces[rest], texels.barycentric[rest], field, color, photos, at_vertices
        )
        colors, share = photo.copy(), weight[rest, None]
        colors[rest] = share * photo[rest] + (1 - share) * base
        texture, comparisons = as_texture(colors, texels), list(compared)
        for _ in range(N_CORRECTIONS if photos else 0):
            missing = [threads.submit(comparison, texture) for comparison in comparisons]
            change, _ = _mixed([part.result() for part in missing], photos, visible, len(colors), spacing)
            # Where a photo fades, its camera is meant to see something else.
            colors = np.where(weight[:, None] > 0.999, colors + change, colors).clip(0, 1)
            texture = as_texture(colors, texels)
    return TexturedMesh(whole.vertices, whole.faces, whole.uvs, whole.normals, texture)


def _comparison(mesh: UnwrappedMesh, spacing: float, photo: Photo) -> Callable[[np.ndarray], np.ndarray]:
    """A function of the texture: what (h, w, 3) the photo has and its camera's view of the mesh lacks, where both show nothing
    but the object; as coarse as texels.

    A texture is looked at through its texels, which is one more mean: what that takes is given back to it (Landweber 1951).
    """
    factor = max(1, int(_footprint(photo, spacing)))
    height, width = (max(1, round(side / factor)) for side in photo.mask.shape)
    sight = look(mesh.vertices, mesh.faces, mesh.uvs, finer(photo.camera.resized(width, height), N_SAMPLES))
    wanted = np.concatenate([photo.rgb.transpose(2, 0, 1), photo.mask[None]]).astype(np.float32)
    wanted = reduced_by_area(torch.from_numpy(wanted), height, width).permute(1, 2, 0).numpy()

    def missing(texture: np.ndarray) -> np.ndarray:
        shown = averaged(sight.shown(texture), N_SAMPLES)
        is_whole = np.minimum(shown[..., 3:], wanted[..., 3:]) > 0.99
        return np.where(is_whole, wanted[..., :3] - shown[..., :3], 0).astype(np.float32)

    return missing


def _footprint(photo: Photo, spacing: float) -> float:
    """Pixels of the photo between points on the surface that far apart."""
    return spacing * float(photo.camera.intrinsics[0]) / float(photo.camera.positions.norm())


def _subdivided(mesh: UnwrappedMesh) -> UnwrappedMesh:
    """The same surface with no long edges: colors are blended from vertex to vertex."""
    longest = LONG_EDGE * float(np.ptp(mesh.vertices, axis=0).max())
    values = np.concatenate([mesh.vertices, mesh.uvs, mesh.normals], 1).astype(np.float64)
    faces = mesh.faces
    for _ in range(N_SUBDIVISIONS):
        corners = values[faces, :3]
        is_long = np.linalg.norm(corners - np.roll(corners, 1, axis=1), axis=2).max(1) > longest
        if not is_long.any() or len(faces) > MOST_FACES:
            break
        a, b, c = faces[is_long].T
        edges = np.sort(np.stack([np.stack(pair, 1) for pair in ((a, b), (b, c), (c, a))]), axis=2)
        unique, index = np.unique(edges.reshape(-1, 2), axis=0, return_inverse=True)
        ab, bc, ca = len(values) + index.reshape(3, -1)
        values = np.concatenate([values, values[unique].mean(1)])
        parts = [np.stack(part, 1) for part in ((a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca))]
        faces = np.concatenate([faces[~is_long], *parts])
    vertices, uvs, normals = (part.astype(np.float32) for part in np.split(values, [3, 5], axis=1))
    normals /= np.maximum(lengths(normals)[:, None], 1e-9)
    return UnwrappedMesh(vertices, faces.astype(np.int32), uvs, normals)


def _field_colors(positions: np.ndarray, color: Callable[[Tensor], Tensor]) -> np.ndarray:
    chunks = torch.from_numpy(positions).split(CHUNK)
    return np.concatenate([np.zeros((0, 3), np.float32), *(color(chunk).numpy() for chunk in chunks if len(chunk))])


def _change_at_texels(
    mesh: UnwrappedMesh,
    faces: np.ndarray,
    barycentric: np.ndarray,
    field: np.ndarray,
    color: Callable[[Tensor], Tensor],
    photos: list[Photo],
    visible: list[tuple[np.ndarray, np.ndarray]],
) -> np.ndarray:
    """What is added to the field's color at points of faces (n, 3), so that it continues the photos; see `blend`.

    Args:
        visible: How well each photo sees each vertex (`visibility`).
    """
    corners = mesh.vertices[mesh.faces]
    spacing = float(np.median(lengths(corners[:, 1] - corners[:, 0])))
    photo, seen = _mixed([view.rgb for view in photos], photos, visible, len(mesh.vertices), spacing)
    if not seen.any():
        return np.zeros_like(field)
    trusted = np.zeros_like(seen)
    for view, (weight, _) in zip(photos, visible):
        facing = _facing(mesh.vertices, mesh.normals, view.camera)
        trusted = np.maximum(trusted, weight * _smooth_step(facing, *TRUSTED))
    own = _field_colors(mesh.vertices, color)
    # A color equal to the photo's, where the photo hardly sees, is the photo drawn out along its rays.
    streaks = np.zeros(len(own), bool)
    for view in photos:
        if view.is_filler:  # the field is meant to have its colors
            continue
        uv, z_depths = _project(view.camera, mesh.vertices)
        streaks |= (np.abs(sample_picture(view.rgb, uv, 1.0) - own).max(1) < STREAK) & (z_depths > 0)
    known = 1.0 - streaks
    colors = complete_colors(mesh.vertices, mesh.faces, photo, trusted, own, known)
    colors = complete_colors(mesh.vertices, mesh.faces, photo, seen, colors, np.ones_like(known), RIM_FADE)
    # Vertices tell the smooth part; the field's finer detail stays where it is the field's own.
    kept = known * (1 - seen)
    at_vertices = np.concatenate([colors - kept[:, None] * own, kept[:, None]], 1)
    at_texels = sum(barycentric[:, k, None] * at_vertices[mesh.faces[faces, k]] for k in range(3))
    return (at_texels[:, :3] + (at_texels[:, 3:] - 1) * field).astype(np.float32)


def texel_length(mesh: UnwrappedMesh, size: int) -> float:
    """Side of a texel on the surface, world units."""
    charts = mesh.uvs[mesh.faces].astype(np.float64) * size
    area = lengths(face_crosses(mesh.vertices, mesh.faces)).sum()
    (ax, ay), (bx, by) = (charts[:, 1] - charts[:, 0]).T, (charts[:, 2] - charts[:, 0]).T
    return float(np.sqrt(area / max(np.abs(ax * by - ay * bx).sum(), 1e-12)))


def surface_texels(mesh: UnwrappedMesh, size: int) -> Texels:
    uv = np.stack([mesh.uvs[:, 0] * size, (1 - mesh.uvs[:, 1]) * size], 1).astype(np.float64)
    fragments = rasterize_projected(uv, np.ones(len(uv)), mesh.faces, size, size)
    pixels = np.flatnonzero(fragments.faces.ravel() >= 0)
    faces, weights = fragments.faces.ravel()[pixels], fragments.barycentric.reshape(-1, 3)[pixels]
    a, b, c = (mesh.vertices[corner] for corner in mesh.faces.T)
    positions = sum(weights[:, k, None] * corner[faces] for k, corner in enumerate((a, b, c)))
    # Whether a photo sees a texel is decided by the true surface; smooth normals would tilt a box's flat sides.
    normals = np.cross(b - a, c - a)
    normals /= np.maximum(lengths(normals)[:, None], 1e-12)
    normals = normals[faces]
    rows, columns = distance_transform_edt(fragments.faces < 0, return_distances=False, return_indices=True)
    number = np.cumsum(fragments.faces.ravel() >= 0) - 1
    nearest = number[rows * size + columns].clip(0)
    return Texels(pixels, positions.astype(np.float32), normals.astype(np.float32), faces, weights, nearest)


def _mixed(
    pictures: list[np.ndarray],
    photos: list[Photo],
    visible: list[tuple[np.ndarray, np.ndarray]],
    n: int,
    spacing: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Colors of n points in pictures of the photos' cameras, of any size, mixed by how well these see them (`visibility`)."""
    total, colors = np.zeros(n, np.float32), np.zeros((n, 3), np.float32)
    strongest = np.zeros_like(total)
    for picture, photo, (weight, uv) in zip(pictures, photos, visible):
        seen = np.flatnonzero(weight > 0)
        share = weight[seen] ** 4 + 1e-12  # the photo that faces a point best rules it
        scale = np.divide(picture.shape[1::-1], (photo.camera.width, photo.camera.height))
        footprint = _footprint(photo, spacing) * scale[0]
        colors[seen] += share[:, None] * sample_picture(picture, uv[seen] * scale, footprint)
        total[seen] += share
        strongest = np.maximum(strongest, weight)
    return colors / np.maximum(total, 1e-20)[:, None], strongest


def _project(camera: Camera, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    uv, z_depths = camera.to("cpu", torch.float64).project(torch.from_numpy(positions).double())
    return uv.numpy(), z_depths.numpy()


@dataclass(frozen=True)
class DepthMap:
    """A mesh as a photo's camera sees it, with whole pixels."""

    camera: Camera
    """The photo's, float64, of the map's size."""
    farthest: Float[np.ndarray, "height width"]
    """z-depth of the farthest surface around each pixel, 0 for none: at an occluder's rim it differs from the nearest."""
    clearance: Float[np.ndarray, "height width"]
    """Pixels to the next one that shows what lies beside and behind an occluder."""


def depth_map(mesh: UnwrappedMesh, camera: Camera, size: int = Z_BUFFER) -> DepthMap:
    """What decides whether points on a mesh are seen; `size` is of the map's longer side, pixels."""
    scale = size / max(camera.width, camera.height)
    small = camera.resized(max(1, round(camera.width * scale)), max(1, round(camera.height * scale)))
    small = small.to("cpu", torch.float64)
    buffer = rasterize(mesh.vertices, mesh.faces, small).z_depths
    nearest = minimum_filter(np.where(buffer > 0, buffer, np.inf), 3)
    jump = JUMP_PX / float(small.intrinsics[0]) * buffer
    with np.errstate(invalid="ignore"):
        is_far_side = (buffer > 0) & (buffer - nearest > jump)
    clearance = distance_transform_edt(~is_far_side) if is_far_side.any() else np.full(buffer.shape, np.inf)
    return DepthMap(small, maximum_filter(buffer, 3), clearance)


def visibilities(
    depth_maps: list[DepthMap], positions: np.ndarray, normals: np.ndarray, photos: list[Photo], config: MeshConfig
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weights and places of `visibility` in several photos."""
    found: list[tuple[np.ndarray, np.ndarray]] = []
    is_free = np.ones(len(positions), bool)
    for depths, photo in zip(depth_maps, photos):
        weight, uv, is_seen = visibility(depths, positions, normals, photo, config)
        found.append((weight * is_free if photo.is_filler else weight, uv))
        is_free &= ~is_seen
    return found


def visibility(
    depths: DepthMap, positions: np.ndarray, normals: np.ndarray, photo: Photo, config: MeshConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How well a photo sees each surface point (n,), 0 to 1; where it lies in the photo (n, 2), pixels; and whether it is seen
    at all, be it along the surface.

    Args:
        depths: Of the photo's camera and the mesh that has these points.
    """
    camera, small = photo.camera, depths.camera
    uv, z_depths = _project(camera, positions)
    column = np.clip((uv[:, 0] * (small.width / camera.width)).astype(np.int64), 0, small.width - 1)
    row = np.clip((uv[:, 1] * (small.height / camera.height)).astype(np.int64), 0, small.height - 1)
    facing = _facing(positions, normals, camera)
    slope = 1 / np.clip(facing, 0.15, 1)
    pixel = 1 / float(small.intrinsics[0])
    is_seen = (z_depths <= depths.farthest[row, column] + 1.5 * pixel * z_depths * slope) & (z_depths > 0)
    for side, limit in zip(uv.T, (camera.width, camera.height)):
        is_seen &= (side >= 0) & (side <= limit)
    # Beside an occluder the photo may show the occluder: the far side keeps away from the jump by a ramp.
    band = max(1.0, config.band_px / 8 * max(small.width, small.height) / 512)
    ramp = np.clip(depths.clearance[row, column] / band, 0, 1)
    fades = FILLER_FACING if photo.is_filler else (config.facing_min, config.facing_min + FACING_BAND)
    weight = is_seen * ramp * _smooth_step(facing, *fades)
    return weight.astype(np.float32), uv, is_seen & (facing > 0)


def _facing(positions: np.ndarray, normals: np.ndarray, camera: Camera) -> np.ndarray:
    """Cosines (n,) of the angles between normals and the direction to the camera."""
    toward = (camera.positions.double().cpu().numpy() - positions).astype(np.float32)
    return dots(normals, toward / lengths(toward)[:, None])


def _smooth_step(x: np.ndarray, low: float, high: float) -> np.ndarray:
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def sample_picture(rgb: np.ndarray, uv: np.ndarray, footprint: float) -> np.ndarray:
    """The photo at pixel coordinates, averaged over the footprint first so that fine detail does not alias."""
    height, width = rgb.shape[:2]
    if footprint >= 2:
        factor = int(footprint)
        shape = max(1, round(height / factor)), max(1, round(width / factor))
        table = torch.from_numpy(np.ascontiguousarray(rgb, np.float32)).permute(2, 0, 1)
        rgb = reduced_by_area(table, *shape).permute(1, 2, 0).numpy()
    return between_pixels(rgb, uv / [width, height] * rgb.shape[1::-1])


def as_texture(colors: Float[np.ndarray, "n 3"], texels: Texels) -> np.ndarray:
    """The 8-bit texture (size, size, 3) of colors in [0, 1] of its texels."""
    return (colors.clip(0, 1) * 255).round().astype(np.uint8)[texels.nearest]
