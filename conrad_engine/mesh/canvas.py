"""A texture under repainting: its mesh is looked at from a camera, a picture drawn over that view is painted back.

What a photo shows is final from the start, what is painted is final from then on; at the border of what is painted lies a
narrow band, where the picture is blended over what was there.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float

from ..cameras import Camera
from ..config import MeshConfig
from .bake import Photo, as_texture, depth_map, sample_picture, surface_texels, visibilities, visibility
from .mesh import TexturedMesh, dots, lengths
from .raster import rasterize, reduced, sample_texture
from .unwrap import UnwrappedMesh

SUPERSAMPLE = 3
"""Samples a pixel along each side of a view: texels are finer than its pixels."""
Z_BUFFER = 512
FACING_RANGE = 0.3, 0.55
"""Cosines between normal and viewing direction from which and up to which a painted picture fades in."""
FINAL_SHARE = 0.9
"""Part of a pixel that must be final for the pixel to be."""


class Canvas:
    """The texels of a mesh, each with its color and how final that is, 0 to 1."""

    def __init__(self, mesh: TexturedMesh, photos: list[Photo], config: MeshConfig) -> None:
        """Take a mesh textured by `bake_texture` with these photos and settings."""
        self.mesh, self.config, self.size = mesh, config, len(mesh.texture)
        self.shape = UnwrappedMesh(mesh.vertices, mesh.faces, mesh.uvs, mesh.normals)
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            mapped = threads.map(partial(depth_map, self.shape), [photo.camera for photo in photos])
            self.texels, depth_maps = surface_texels(self.shape, self.size), list(mapped)
        self.before = mesh.texture.reshape(-1, 3)[self.texels.pixels].astype(np.float32) / 255
        self.colors = self.before.copy()
        self.final = np.zeros(len(self.colors), np.float32)
        for weight, _ in visibilities(depth_maps, self.texels.positions, self.texels.normals, photos, config):
            # Also where a photo is already blended with the field: its camera must see no change at all.
            self.final[weight > 0] = 1

    def view(self, camera: Camera) -> tuple[Float[np.ndarray, "h w 4"], Float[np.ndarray, "h w"]]:
        """What a camera sees now, straight RGBA in [0, 1], and which of its pixels are final, 0 or 1."""
        n = SUPERSAMPLE
        fragments = rasterize(self.mesh.vertices, self.mesh.faces, camera.resized(camera.width * n, camera.height * n))
        found = fragments.faces >= 0
        samples = np.zeros((*found.shape, 5), np.float32)
        uvs = fragments.interpolate(self.mesh.faces, self.mesh.uvs)[found]
        palette = np.concatenate([self.colors, self.final[:, None]], 1)
        samples[found, :4] = sample_texture(self.texels.nearest, uvs, palette)
        samples[found, 4] = 1
        mean = reduced(samples, n) / np.float32(n * n)
        alpha = mean[..., 4:]
        mean = mean[..., :4] / np.maximum(alpha, 1e-6)
        return np.concatenate([mean[..., :3], alpha], -1), ((mean[..., 3] > FINAL_SHARE) & (alpha[..., 0] > 0)) * 1.0

    def paint(self, camera: Camera, rgb: Float[np.ndarray, "h w 3"]) -> None:
        """Put a picture on the texels that its camera sees well and that are not final.

        Args:
            rgb: Straight colors, continued past the silhouette.
        """
        texels = np.flatnonzero(self.final < 1)
        positions, normals = self.texels.positions[texels], self.texels.normals[texels]
        photo = Photo(camera, rgb, np.ones(rgb.shape[:2], np.float32))
        depths = depth_map(self.shape, camera, Z_BUFFER)
        weight, uv, _ = visibility(depths, positions, normals, photo, self.config)
        toward = camera.positions.numpy() - positions
        facing = dots(normals, toward) / lengths(toward)
        low, high = FACING_RANGE
        ramp = np.clip((facing - low) / (high - low), 0, 1)
        weight = (weight * ramp * ramp * (3 - 2 * ramp)).astype(np.float32)
        seen = weight > 0
        texels, weight, uv = texels[seen], weight[seen], uv[seen]
        # What is final lies over the new picture, the new picture over what was there before.
        share = ((1 - self.final[texels]) * weight)[:, None]
        self.colors[texels] += share * (sample_picture(rgb, uv, 1.0).clip(0, 1) - self.before[texels])
        self.final[texels] += share[:, 0]
        self.final[self.final > 0.999] = 1

    def textured(self) -> TexturedMesh:
        """The mesh with its texture as painted so far."""
        return replace(self.mesh, texture=as_texture(self.colors, self.texels))
