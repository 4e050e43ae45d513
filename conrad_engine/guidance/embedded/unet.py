"""The embedded prior's network: one reference picture and cameras -> the same object from other cameras, 64 px RGBA.

Pictures are premultiplied RGBA scaled to [-1, 1] (empty = -1 in all channels). Schedule: alpha = cos(pi t / 2),
sigma = sin(pi t / 2), t in [0, 1]; the network predicts v = alpha * noise - sigma * x0 (Salimans and Ho, arXiv:2202.00512).
A camera is a row (azimuth_rad relative to the reference, elevation_rad, distance, tan_half_fov) of the object frame: it looks
at the origin, without roll, and the reference's silhouette is `REFERENCE_EXTENT` long, or a little less (`preprocess.framing`).

One U-Net is used twice with the same weights (two streams, as 3DiM, arXiv:2210.04628): once on the reference picture (no
noise, once an object: `encode`), then on the noisy targets, whose attention layers also see the reference's tokens. Targets of
one reference may be denoised jointly: then each also sees the tokens of the others.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...config import REFERENCE_EXTENT

ARCHITECTURE = "conrad-view-prior-1"
"""Changes whenever weights of another version would not fit."""
UNKNOWN_ELEVATION_RAD = math.radians(15)
"""Elevation that stands in for an unknown one."""
N_CONDITIONS = 17
N_RAY_FEATURES = 42
N_OCTAVES = 3

Tokens = list[tuple[Tensor, Tensor]]
"""Keys and values (n_references, n_tokens, n_heads, channels) of each attention layer."""


class Group(NamedTuple):
    """Neighboring references whose targets are treated alike; targets are stored reference by reference."""

    n_references: int
    n_targets: int
    """Of each reference."""
    is_joint: bool


Layout = tuple[Group, ...]


class Reference(NamedTuple):
    """What is known of the reference pictures, one row each."""

    camera: Float[Tensor, "r 4"]
    is_elevation_known: Float[Tensor, " r"]
    """0 or 1."""
    is_present: Float[Tensor, " r"]
    """0 or 1; 0 is a dropped picture, for classifier-free guidance."""
    log_size: Float[Tensor, " r"]
    """Logarithm of the object's longest box side over `REFERENCE_EXTENT`."""
    is_size_known: Float[Tensor, " r"]
    """0 or 1."""

    def repeated(self, layout: Layout) -> Reference:
        """One row a target."""
        columns = []
        for value in self:
            parts, row = [], 0
            for n_references, n_targets, _ in layout:
                parts.append(value[row : row + n_references].repeat_interleave(n_targets, 0))
                row += n_references
            columns.append(torch.cat(parts))
        return Reference(*columns)

    def visible(self) -> Reference:
        """The same with what is unknown replaced by fixed values."""
        camera, known = self.camera, self.is_elevation_known
        elevation = torch.where(known > 0, camera[:, 1], torch.full_like(known, UNKNOWN_ELEVATION_RAD))
        camera = torch.stack([torch.zeros_like(known), elevation, camera[:, 2], camera[:, 3]], 1)
        return self._replace(camera=camera, log_size=self.log_size * self.is_size_known)


def alpha_sigma(t: Float[Tensor, " b"]) -> tuple[Float[Tensor, "b 1 1 1"], Float[Tensor, "b 1 1 1"]]:
    """Signal and noise factors of times."""
    angle = t[:, None, None, None] * (math.pi / 2)
    return angle.cos(), angle.sin()


def time_features(t: Float[Tensor, " b"]) -> Float[Tensor, "b 128"]:
    """Sinusoidal embedding of times."""
    frequencies = torch.exp(torch.arange(64, device=t.device) * (-math.log(1000.0) / 63)) * 1000
    angles = t[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


def camera_axes(cameras: Float[Tensor, "b 4"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Right, up, backward and position (b, 3) of orbit cameras."""
    azimuth, elevation, distance = cameras[:, 0], cameras[:, 1], cameras[:, 2]
    level = elevation.cos()
    backward = torch.stack([level * azimuth.sin(), -level * azimuth.cos(), elevation.sin()], 1)
    right = torch.stack([azimuth.cos(), azimuth.sin(), torch.zeros_like(azimuth)], 1)
    return right, torch.cross(backward, right, dim=1), backward, backward * distance[:, None]


def ray_directions(cameras: Float[Tensor, "b 4"], size: int) -> Float[Tensor, "b 3 size size"]:
    """Unit directions through the pixel centers, row 0 on top."""
    right, up, backward, _ = camera_axes(cameras)
    grid = (torch.arange(size, device=cameras.device, dtype=cameras.dtype) + 0.5) * (2 / size) - 1
    reach = cameras[:, 3, None, None, None]
    across = grid[None, None, None, :] * reach * right[:, :, None, None]
    along = grid[None, None, :, None] * reach * up[:, :, None, None]
    return F.normalize(across - along - backward[:, :, None, None], dim=1)


def ray_features(cameras: Float[Tensor, "b 4"], size: int) -> Float[Tensor, "b 42 size size"]:
    """A ray as its direction and its point nearest to the origin, with Fourier features.

    Positions are scaled so that the reference's silhouette reaches from -1 to 1.
    """
    directions = ray_directions(cameras, size)
    positions = camera_axes(cameras)[3][:, :, None, None]
    nearest = positions - (positions * directions).sum(1, keepdim=True) * directions
    line = torch.cat([directions, nearest * (2 / REFERENCE_EXTENT)], 1)
    waves = [line]
    for octave in range(N_OCTAVES):
        angle = line * (math.pi * 2**octave / 2)
        waves += [angle.sin(), angle.cos()]
    return torch.cat(waves, 1)


def conditions(cameras: Float[Tensor, "b 4"], reference: Reference, is_reference: bool) -> Float[Tensor, "b c"]:
    """Numbers for the global embedding; `reference` has one row a picture."""
    azimuth = cameras[:, 0]
    columns = [azimuth.sin(), azimuth.cos(), (2 * azimuth).sin(), (2 * azimuth).cos()]
    for camera in (cameras, reference.camera):
        distance = 2 * (camera[:, 2] / (2 * REFERENCE_EXTENT)).log()
        columns += [camera[:, 1].sin(), camera[:, 1].cos(), distance, 4 * camera[:, 3] - 1]
    role = torch.full_like(azimuth, float(is_reference))
    columns += [reference.is_elevation_known, reference.is_present, role, reference.log_size, reference.is_size_known]
    return torch.stack(columns, 1)


def enlarged(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c 2h 2w"]:
    """Each cell four times. `F.interpolate` gives the same; its gradient is compiled to atomic additions."""
    b, c, height, width = x.shape
    cells = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(b, height, 2, width, 2, c)
    return cells.reshape(b, 2 * height, 2 * width, c).permute(0, 3, 1, 2)


class RootMeanSquare(nn.Module):
    """RMS norm of the last axis in float32: `nn.RMSNorm` runs unfused and warns where weight and input differ in type."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), 1e-6).to(x.dtype)


class ResBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int, n_embedding: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, n_in), nn.Conv2d(n_in, n_out, 3, padding=1)
        self.scale_shift = nn.Linear(n_embedding, 2 * n_out)
        self.norm2, self.conv2 = nn.GroupNorm(32, n_out), nn.Conv2d(n_out, n_out, 3, padding=1)
        self.skip = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, embedding: Tensor, rays: Tensor) -> Tensor:
        scale, shift = self.scale_shift(embedding)[:, :, None, None].chunk(2, 1)
        h = self.conv1(F.silu(self.norm1(x))) + rays
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.skip(x) + h


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of tokens stored as (batch, n_tokens, n_heads, channels)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention over a picture's tokens; targets also see the reference's and, jointly, each other's. Then an MLP."""

    def __init__(self, n_channels: int, n_heads: int = 4) -> None:
        super().__init__()
        self.n_heads, head = n_heads, n_channels // n_heads
        self.norm = nn.GroupNorm(32, n_channels)
        self.qkv = nn.Linear(n_channels, 3 * n_channels)
        self.norm_q, self.norm_k = RootMeanSquare(head), RootMeanSquare(head)
        self.out = nn.Linear(n_channels, n_channels)
        self.mlp = nn.Sequential(
            nn.LayerNorm(n_channels),
            nn.Linear(n_channels, 2 * n_channels),
            nn.GELU(),
            nn.Linear(2 * n_channels, n_channels),
        )
        for layer in (self.out, self.mlp[-1]):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, x: Tensor, rays: Tensor, reference: tuple[Tensor, Tensor] | None, layout: Layout
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Returns the features and this picture's own keys and values."""
        b, c, height, width = x.shape
        tokens = (self.norm(x) + rays).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).view(b, -1, 3, self.n_heads, c // self.n_heads).unbind(2)
        q, k = self.norm_q(q), self.norm_k(k)
        y = attend(q, k, v) if reference is None else self._over_views((q, k, v), reference, layout)
        y = x.flatten(2).transpose(1, 2) + self.out(y.reshape(b, -1, c))
        y = y + self.mlp(y)
        return y.transpose(1, 2).reshape(b, c, height, width), (k, v)

    @staticmethod
    def _over_views(own: tuple[Tensor, Tensor, Tensor], reference: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
        """Attention over own and other tokens, group by group: no mask is needed, so the fast kernels stay in use."""
        parts, row, first = [], 0, 0
        for n_references, n_targets, is_joint in layout:
            count = n_references * n_targets
            q, k, v = (x[first : first + count] for x in own)
            theirs = [x[row : row + n_references].to(v.dtype) for x in reference]
            if is_joint:  # all targets of a reference become one long sequence
                q, k, v = (x.reshape(n_references, -1, *x.shape[2:]) for x in (q, k, v))
            else:
                theirs = [x.repeat_interleave(n_targets, 0) for x in theirs]
            y = attend(q, torch.cat([k, theirs[0]], 1), torch.cat([v, theirs[1]], 1))
            parts.append(y.reshape(count, -1, *y.shape[2:]))
            row, first = row + n_references, first + count
        return torch.cat(parts)


class ViewPrior(nn.Module):
    """The U-Net. Works on 2x2 pixel blocks: levels of 32, 16 and 8 cells a side; attention on the last two."""

    def __init__(self, widths: tuple[int, int, int] = (128, 224, 224), n_embedding: int = 320, size: int = 64) -> None:
        super().__init__()
        a, b, c = widths
        e = n_embedding
        self.size = size
        self.embed = nn.Sequential(nn.Linear(128 + N_CONDITIONS, e), nn.SiLU(), nn.Linear(e, e), nn.SiLU())
        self.ray_maps = nn.ModuleList(
            nn.Sequential(nn.Conv2d(N_RAY_FEATURES, w, 1), nn.SiLU(), nn.Conv2d(w, w, 1)) for w in widths
        )
        self.enter = nn.Conv2d(16, a, 3, padding=1)
        self.down = nn.ModuleList(ResBlock(w, w, e) for w in (a, a, b, b, c))
        self.middle = ResBlock(c, c, e)
        self.up = nn.ModuleList(ResBlock(2 * w, w, e) for w in (c, b, b, a, a))
        self.attention = nn.ModuleList(Attention(w) for w in (b, b, c, c, c, b, b))
        self.to_16, self.to_8 = nn.Conv2d(a, b, 3, stride=2, padding=1), nn.Conv2d(b, c, 3, stride=2, padding=1)
        self.from_8, self.from_16 = nn.Conv2d(c, b, 3, padding=1), nn.Conv2d(b, a, 3, padding=1)
        self.leave = nn.Sequential(nn.GroupNorm(32, a), nn.SiLU(), nn.Conv2d(a, 16, 3, padding=1))
        nn.init.zeros_(self.leave[-1].weight)
        nn.init.zeros_(self.leave[-1].bias)

    def _embedding(self, t: Tensor, condition: Tensor) -> Tensor:
        return self.embed(torch.cat([time_features(t), condition], 1))

    def _run(
        self, picture: Tensor, cameras: Tensor, embedding: Tensor, reference: Tokens | None, layout: Layout
    ) -> tuple[Tensor | None, Tokens]:
        rays = [layer(ray_features(cameras, self.size // 2 // 2**level)) for level, layer in enumerate(self.ray_maps)]
        tokens: Tokens = []

        def look(h: Tensor, level: int) -> Tensor:
            index = len(tokens)
            theirs = None if reference is None else reference[index]
            h, own = self.attention[index](h, rays[level], theirs, layout)
            tokens.append(own)
            return h

        h = self.enter(F.pixel_unshuffle(picture, 2))
        h0 = self.down[0](h, embedding, rays[0])
        h1 = self.down[1](h0, embedding, rays[0])
        h2 = look(self.down[2](self.to_16(h1), embedding, rays[1]), 1)
        h3 = look(self.down[3](h2, embedding, rays[1]), 1)
        h4 = look(self.down[4](self.to_8(h3), embedding, rays[2]), 2)
        h = look(self.middle(h4, embedding, rays[2]), 2)
        h = look(self.up[0](torch.cat([h, h4], 1), embedding, rays[2]), 2)
        h = self.from_8(enlarged(h))
        h = look(self.up[1](torch.cat([h, h3], 1), embedding, rays[1]), 1)
        h = look(self.up[2](torch.cat([h, h2], 1), embedding, rays[1]), 1)
        if reference is None:
            return None, tokens  # the reference pass ends at the last attention layer
        h = self.from_16(enlarged(h))
        h = self.up[3](torch.cat([h, h1], 1), embedding, rays[0])
        h = self.up[4](torch.cat([h, h0], 1), embedding, rays[0])
        return F.pixel_shuffle(self.leave(h), 2), tokens

    def encode(self, picture: Float[Tensor, "r 4 h w"], reference: Reference) -> Tokens:
        """Tokens of reference pictures, the same for all targets."""
        reference = reference.visible()
        embedding = self._embedding(
            torch.zeros_like(reference.is_present), conditions(reference.camera, reference, True)
        )
        picture = picture * reference.is_present[:, None, None, None]
        return self._run(picture, reference.camera, embedding, None, ())[1]

    def denoise(
        self,
        noisy: Float[Tensor, "b 4 h w"],
        t: Float[Tensor, " b"],
        cameras: Float[Tensor, "b 4"],
        reference: Reference,
        tokens: Tokens,
        layout: Layout,
    ) -> Float[Tensor, "b 4 h w"]:
        """v of noisy targets.

        Args:
            noisy, t, cameras: The targets, reference by reference as `layout` says.
            reference, tokens: The references, and `encode`'s answer for them.
            layout: How many targets each reference has, and which of them see each other.
        """
        condition = conditions(cameras, reference.visible().repeated(layout), False)
        return self._run(noisy, cameras, self._embedding(t, condition), tokens, layout)[0]

    def forward(
        self, noisy: Tensor, t: Tensor, cameras: Tensor, picture: Tensor, reference: Reference, layout: Layout
    ) -> Tensor:
        return self.denoise(noisy, t, cameras, reference, self.encode(picture, reference), layout)


def in_precision(net: ViewPrior, dtype: torch.dtype) -> ViewPrior:
    """The network for use without training: matrices and kernels in the type that autocast would give them at each call."""
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(dtype)
    return net
