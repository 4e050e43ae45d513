"""The last stage of a texture: views around the finished mesh are redrawn with detail, one after the other, and painted back.

The order goes outward from the picture, so that each view continues what is final already: the picture itself, then what was
drawn before. The picture's own texels are never touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from scipy.ndimage import gaussian_filter

from .cameras import Camera, orbit_angles, orbit_camera
from .config import REFERENCE_EXTENT, MeshConfig
from .guidance.embedded.detail import PICTURE_SIZE, DetailModel
from .guidance.interfaces import ReferencePicture
from .mesh.bake import Photo
from .mesh.canvas import Canvas
from .mesh.mesh import TexturedMesh

RING_ELEVATION_DEG, TOP_ELEVATION_DEG = 10.0, 55.0
RING_PART = 0.7
"""Part of the views that stand around the object; the others look down on it."""
FILL = 0.9
"""Part of the frame that the object takes."""
COLOR_SCALE_PX = 4.0
"""Width of the blur above which colors stay as they were."""
HUE_SHARE = 0.3
"""Part of a drawn change of hue that is painted; of lightness it is all."""
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
PLAIN = 0.015
"""Contrast that is painted where there was none; elsewhere it is as much as there was more."""
NEARLY_BLACK = 0.1
"""Colors this dark have no hue to keep: they become lighter in gray."""
CLEARANCE = 0.25
"""Least depth of a vertex in front of a camera, object frame."""


def view_angles_deg(n_views: int) -> list[tuple[float, float]]:
    """Azimuths from the picture's and elevations of the views, in the order in which they are drawn."""
    n_ring = max(1, math.ceil(RING_PART * n_views)) if n_views else 0
    ring = [360 * k / (n_ring + 1) for k in range(1, n_ring + 1)]
    tops = [360 * (k + 0.5) / (n_views - n_ring) for k in range(n_views - n_ring)]
    angles = []
    for azimuths, elevation in ((ring, RING_ELEVATION_DEG), (tops, TOP_ELEVATION_DEG)):
        turned = [(azimuth + 180) % 360 - 180 for azimuth in azimuths]
        angles += [(azimuth, elevation) for azimuth in sorted(turned, key=lambda azimuth: round(abs(azimuth), 6))]
    return angles


def view_camera(vertices: np.ndarray, azimuth_rad: float, elevation_rad: float, fov_rad: float) -> Camera:
    """A square camera whose frame just holds the vertices (n, 3), though it is never much narrower than the picture's."""
    camera = orbit_camera(azimuth_rad, elevation_rad, 1.0, fov_rad, PICTURE_SIZE)
    local = vertices @ camera.c2w[:, :3].numpy()
    tan_half = math.tan(fov_rad / 2)
    fitting = float((np.abs(local[:, :2]).max(1) / (tan_half * FILL) + local[:, 2]).max())
    return orbit_camera(
        azimuth_rad,
        elevation_rad,
        max(fitting, REFERENCE_EXTENT / 2 / tan_half, float(local[:, 2].max()) + CLEARANCE),
        fov_rad,
        PICTURE_SIZE,
    )


def redraw_texture(
    mesh: TexturedMesh,
    photos: list[Photo],
    reference: ReferencePicture,
    config: MeshConfig,
    model: DetailModel,
    seed: int,
    on_view: Callable[[int], None],
) -> TexturedMesh:
    """The mesh with detail where no photo shows it.

    Args:
        mesh: In the object frame, textured by `bake_texture` with these photos and settings.
        reference: The picture as guidance sees it.
        seed: Of the noise.
        on_view: Called before each view with its number from 0; it may raise to stop.
    """
    model.set_reference(reference)
    generator = torch.Generator().manual_seed(seed)
    canvas = Canvas(mesh, photos, config)
    base_rad = float(orbit_angles(reference.camera.positions)[0])
    fov_rad = 2 * math.atan(reference.camera.width / 2 / float(reference.camera.intrinsics[0]))
    center = (mesh.vertices.min(0) + mesh.vertices.max(0)) / 2
    angles = view_angles_deg(config.detail_views)
    for index, (azimuth_deg, elevation_deg) in enumerate(angles):
        on_view(index)
        camera = view_camera(
            mesh.vertices - center, base_rad + math.radians(azimuth_deg), math.radians(elevation_deg), fov_rad
        )
        shift = torch.from_numpy(np.concatenate([np.zeros((3, 3)), center[:, None]], 1)).to(camera.c2w)
        around = replace(camera, c2w=camera.c2w + shift)
        rgba, final = canvas.view(around)
        if not ((final == 0) & (rgba[..., 3] > 0)).any():
            continue
        view = torch.from_numpy(np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], -1)).permute(2, 0, 1)
        drawn = model.redraw(
            view.float(),
            torch.from_numpy(final).float()[None],
            camera,
            config.detail_steps,
            generator,
            config.detail_temperature,
        )
        canvas.paint(around, repainted(drawn.permute(1, 2, 0).numpy(), view.permute(1, 2, 0).numpy()))
    return canvas.textured()


def repainted(drawn: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Straight colors (h, w, 3) of a redrawn view as they are painted: lighter and darker as it is drawn, but with little of
    its own hue, and at most twice the contrast that was there.

    What is drawn where the texture is plain is mostly specks, green and red ones on a cream head, and dark patches in hazes.

    Args:
        drawn, before: Premultiplied RGBA of one silhouette.
    """
    own, wanted = spread(before), spread(drawn) + drift(drawn, before)
    lighter = (wanted - own) @ LUMA
    found, asked = (contrast(detail, before[..., 3]) for detail in ((own - smooth_color(before)) @ LUMA, lighter))
    share = np.minimum(1, (found + PLAIN) / np.maximum(asked, 1e-6))[..., None]
    along = lighter[..., None] * (own + NEARLY_BLACK) / ((own @ LUMA)[..., None] + NEARLY_BLACK)
    return (own + share * (along + HUE_SHARE * (wanted - own - along))).clip(0, 1)


def contrast(detail: Float[np.ndarray, "h w"], alpha: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """Root of the mean square of detail around each pixel inside a silhouette."""
    weights = np.maximum(gaussian_filter(alpha, COLOR_SCALE_PX), 1e-4)
    return np.sqrt(gaussian_filter(alpha * np.square(detail), COLOR_SCALE_PX) / weights)


def drift(drawn: np.ndarray, before: np.ndarray) -> np.ndarray:
    """What brings the large-scale colors (h, w, 3) of a drawn view back to those it had before.

    Only detail is asked for: a guess about whole parts is no better here than the guidance's, and flaws of one grow in it.

    Args:
        drawn, before: Premultiplied RGBA of one silhouette.
    """
    return smooth_color(before) - smooth_color(drawn)


def smooth_color(picture: np.ndarray) -> np.ndarray:
    """Large-scale straight colors (h, w, 3) of a premultiplied RGBA picture."""
    smooth = gaussian_filter(picture, (COLOR_SCALE_PX, COLOR_SCALE_PX, 0))
    return smooth[..., :3] / np.maximum(smooth[..., 3:], 1e-4)


def spread(picture: np.ndarray) -> np.ndarray:
    """Straight colors (h, w, 3) of a premultiplied RGBA picture, continued past its silhouette."""
    alpha = picture[..., 3:]
    blurred = gaussian_filter(picture, (1.5, 1.5, 0))
    outside = blurred[..., :3] / np.maximum(blurred[..., 3:], 1e-4)
    inside = picture[..., :3] / np.maximum(alpha, 1e-4)
    return np.where(alpha > 0.9, inside, outside).clip(0, 1).astype(np.float32)
