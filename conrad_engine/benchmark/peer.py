"""The step that threestudio's `configs/dreamfusion-sd.yaml` asks for, re-implemented from that published configuration.

Kept: one view of 64x64 rays at distance 1.5 to 2.0, 512 nominal samples a ray with an occupancy grid, a hash grid of 16
levels to 4096 vertices, the Magic3D blob, normals from the gradient of the density, a shaded picture, the autoencoder at
512 px and the UNet with guidance in half precision under autocast, gradient scaling, unfused Adam, losses on opacity and
normals. Changed, all in the peer's favor: random weights; our Triton hash grid in place of tiny-cuda-nn's slower one; the
normals are not differentiated a second time; no environment-map network, no text encoder, no logging.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cameras import Camera
from ..fields.radiance_field import HashField
from ..rendering.compositing import render_weights
from ..rendering.occupancy import OccupancyGrid
from ..rendering.renderer import sample_rays
from .fields import orbit_cameras

OCCUPANCY_EVERY = 16
"""Steps between updates of the occupancy grid, as nerfacc does."""
AMBIENT = 0.1
"""Least brightness of a shaded surface."""


class PeerStep:
    """Called once an iteration."""

    def __init__(
        self,
        field: HashField,
        to_loss: Callable[[Tensor, Camera], tuple[Tensor, Tensor]],
        device: torch.device,
        is_small: bool,
    ) -> None:
        self.field, self.to_loss, self.device = field, to_loss, device
        self.size, self.n_samples = (16, 32) if is_small else (64, 512)
        self.occupancy = OccupancyGrid(field.aabb, 32, threshold=0.01)
        self.adam = torch.optim.Adam(field.parameters(), lr=0.01, betas=(0.9, 0.99), eps=1e-15)
        self.scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
        self.n_kept = 0
        self._n_calls = 0

    def _shaded(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Densities, and colors lit from a random direction."""
        positions = positions.detach().requires_grad_()
        densities, albedo = self.field.density_and_color(positions)
        (gradient,) = torch.autograd.grad(densities.sum(), positions, retain_graph=True)
        normals = -F.normalize(gradient, dim=-1)
        light = F.normalize(torch.randn(3, device=self.device), dim=0)
        return densities, albedo * (AMBIENT + (1 - AMBIENT) * (normals @ light).clamp(min=0))[:, None]

    def _render(self, cameras: Camera) -> tuple[Tensor, Tensor]:
        """Premultiplied RGBA (1, 4, h, w) and opacities, samples in empty cells left out."""
        origins, directions = (rays.reshape(-1, 3) for rays in cameras.rays())
        jitter = torch.rand(len(origins), 1, device=self.device)
        t_starts, steps = sample_rays(origins, directions, self.field.aabb, self.n_samples, jitter)
        positions = origins[:, None] + (t_starts + steps / 2)[..., None] * directions[:, None]
        ray, sample = torch.nonzero(self.occupancy.contains(positions) & (steps > 0), as_tuple=True)
        self.n_kept = len(ray)
        found, colors = self._shaded(positions[ray, sample])
        densities = torch.zeros_like(t_starts).index_put((ray, sample), found.float())
        weights, _ = render_weights(densities, steps)
        rgb = torch.zeros_like(origins).index_add(0, ray, weights[ray, sample, None] * colors.float())
        opacities = weights.sum(-1)
        rgba = torch.cat([rgb, opacities[:, None]], -1).view(1, self.size, self.size, 4).permute(0, 3, 1, 2)
        return rgba, opacities

    def __call__(self) -> None:
        if self._n_calls % OCCUPANCY_EVERY == 0:
            self.occupancy.update(self.field)
        self._n_calls += 1
        self.adam.zero_grad()
        cameras = orbit_cameras(1, self.size, self.device)
        with torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda"):
            rgba, opacities = self._render(cameras)
            latents, gradient = self.to_loss(rgba, cameras)
            # The given gradient as the loss whose gradient it is, as threestudio writes it.
            target = (latents - gradient).detach()
            loss = 0.5 * F.mse_loss(latents.float(), target.float(), reduction="sum")
            loss = loss + (opacities.square() + 0.01).sqrt().mean()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.adam)
        self.scaler.update()
