"""The detail model: a blurred view of an object and its picture -> the same view as sharp as the picture, 128 px.

What it diffuses is what the blurred view lacks: residual = (sharp - blurred) / `RESIDUAL_SCALE`, premultiplied RGB of pictures
scaled to [-1, 1] (empty = -1). So noise of every level is about what detail is made of, and where a pixel is known already the
residual is 0. Time, v-prediction, cameras and rays are the embedded prior's (`unet`), and so are the two streams: the network
runs once on the reference picture (`encode`), and the attention layers of the views see its tokens.

A view's silhouette is certain (the mesh's own), only its colors are drawn: view pictures hold premultiplied RGBA and a fifth
channel, 1 where the color is final and 0 elsewhere. Everything is convolutional or attention: 128 px is what it learned from.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...cameras import Camera
from ...graphs import GraphedStep
from ..interfaces import ReferencePicture
from .prior import camera_rows, fast_precision, resized
from .sampling import channels_last, extrapolation
from .unet import N_RAY_FEATURES as N_RAYS
from .unet import Attention, Group, Layout, ResBlock, Tokens, alpha_sigma, enlarged, ray_features, time_features
from .weights import DETAIL, filled, packed, read, shipped_path, stated_widths

ARCHITECTURE = "conrad-detail-1"
"""Changes whenever weights of another version would not fit."""
PICTURE_SIZE = 128
WIDTHS = (96, 128, 128)
RESIDUAL_SCALE = 0.4
"""About the standard deviation of sharp minus blurred, in pictures from -1 to 1."""
N_CONDITIONS = 14


def conditions(
    cameras: Float[Tensor, "b 4"], references: Float[Tensor, "b 4"], is_present: Float[Tensor, " b"], is_reference: bool
) -> Float[Tensor, "b c"]:
    """Numbers for the global embedding: where the camera is, where the reference's, and which of them this picture is."""
    azimuth = cameras[:, 0]
    columns = [azimuth.sin(), azimuth.cos(), (2 * azimuth).sin(), (2 * azimuth).cos()]
    for camera in (cameras, references):
        columns += [camera[:, 1].sin(), camera[:, 1].cos(), 2 * (camera[:, 2] / 2.4).log(), 4 * camera[:, 3] - 1]
    columns += [is_present, torch.full_like(azimuth, float(is_reference))]
    return torch.stack(columns, 1)


class DetailNet(nn.Module):
    """The U-Net. Works on 2x2 pixel blocks: at 128 px levels of 64, 32 and 16 cells a side; attention on the last two."""

    def __init__(self, widths: tuple[int, int, int] = WIDTHS, n_embedding: int = 128) -> None:
        super().__init__()
        a, b, c = widths
        e = n_embedding
        self.embed = nn.Sequential(nn.Linear(128 + N_CONDITIONS, e), nn.SiLU(), nn.Linear(e, e), nn.SiLU())
        self.ray_maps = nn.ModuleList(
            nn.Sequential(nn.Conv2d(N_RAYS, w, 1), nn.SiLU(), nn.Conv2d(w, w, 1)) for w in widths
        )
        self.enter = nn.Conv2d(32, a, 3, padding=1)
        self.down = nn.ModuleList(ResBlock(w, w, e) for w in (a, a, b, b, c))
        self.middle = ResBlock(c, c, e)
        self.up = nn.ModuleList(ResBlock(2 * w, w, e) for w in (c, b, b, a, a))
        self.attention = nn.ModuleList(Attention(w) for w in (b, c, c, b))
        self.to_32, self.to_16 = nn.Conv2d(a, b, 3, stride=2, padding=1), nn.Conv2d(b, c, 3, stride=2, padding=1)
        self.from_16, self.from_32 = nn.Conv2d(c, b, 3, padding=1), nn.Conv2d(b, a, 3, padding=1)
        self.leave = nn.Sequential(nn.GroupNorm(32, a), nn.SiLU(), nn.Conv2d(a, 12, 3, padding=1))
        nn.init.zeros_(self.leave[-1].weight)
        nn.init.zeros_(self.leave[-1].bias)

    def _run(
        self, picture: Tensor, cameras: Tensor, embedding: Tensor, reference: Tokens | None, layout: Layout
    ) -> tuple[Tensor | None, Tokens]:
        side = picture.shape[-1]
        rays = [layer(ray_features(cameras, side // 2 // 2**level)) for level, layer in enumerate(self.ray_maps)]
        tokens: Tokens = []

        def look(h: Tensor, level: int) -> Tensor:
            index = len(tokens)
            h, own = self.attention[index](h, rays[level], None if reference is None else reference[index], layout)
            tokens.append(own)
            return h

        h0 = self.down[0](self.enter(F.pixel_unshuffle(picture, 2)), embedding, rays[0])
        h1 = self.down[1](h0, embedding, rays[0])
        h2 = self.down[2](self.to_32(h1), embedding, rays[1])
        h3 = look(self.down[3](h2, embedding, rays[1]), 1)
        h4 = look(self.down[4](self.to_16(h3), embedding, rays[2]), 2)
        h = self.middle(h4, embedding, rays[2])
        h = look(self.up[0](torch.cat([h, h4], 1), embedding, rays[2]), 2)
        h = self.from_16(enlarged(h))
        h = self.up[1](torch.cat([h, h3], 1), embedding, rays[1])
        h = look(self.up[2](torch.cat([h, h2], 1), embedding, rays[1]), 1)
        if reference is None:
            return None, tokens  # the reference pass ends at the last attention layer
        h = self.from_32(enlarged(h))
        h = self.up[3](torch.cat([h, h1], 1), embedding, rays[0])
        h = self.up[4](torch.cat([h, h0], 1), embedding, rays[0])
        return F.pixel_shuffle(self.leave(h), 2), tokens

    def encode(
        self, picture: Float[Tensor, "r 4 h h"], cameras: Float[Tensor, "r 4"], is_present: Float[Tensor, " r"]
    ) -> Tokens:
        """Tokens of reference pictures in [-1, 1]; `is_present` 0 drops a picture, for classifier-free guidance."""
        time = time_features(torch.zeros_like(is_present))
        embedding = self.embed(torch.cat([time, conditions(cameras, cameras, is_present, True)], 1))
        final = torch.ones_like(picture[:, :1])
        seen = torch.cat([torch.zeros_like(picture[:, :3]), picture, final], 1) * is_present[:, None, None, None]
        return self._run(channels_last(seen), cameras, embedding, None, ())[1]

    def denoise(
        self,
        noisy: Float[Tensor, "b 3 h h"],
        t: Float[Tensor, " b"],
        views: Float[Tensor, "b 5 h h"],
        cameras: Float[Tensor, "b 4"],
        references: Float[Tensor, "r 4"],
        is_present: Float[Tensor, " r"],
        tokens: Tokens,
    ) -> Float[Tensor, "b 3 h h"]:
        """v of noisy residuals.

        Args:
            noisy, t, views, cameras: The views, reference by reference, as many of each.
            references, is_present, tokens: The references' cameras, and `encode`'s argument and answer for them.
        """
        n = len(cameras) // len(references)
        condition = conditions(cameras, references.repeat_interleave(n, 0), is_present.repeat_interleave(n), False)
        embedding = self.embed(torch.cat([time_features(t), condition], 1))
        picture = channels_last(torch.cat([noisy, views], 1))
        return self._run(picture, cameras, embedding, tokens, (Group(len(references), n, False),))[0]

    def forward(
        self,
        noisy: Tensor,
        t: Tensor,
        views: Tensor,
        cameras: Tensor,
        picture: Tensor,
        references: Tensor,
        is_present: Tensor,
    ) -> Tensor:
        tokens = self.encode(picture, references, is_present)
        return self.denoise(noisy, t, views, cameras, references, is_present, tokens)


def residual_of(sharp: Float[Tensor, "b c h w"], views: Float[Tensor, "b 5 h w"]) -> Float[Tensor, "b 3 h w"]:
    """What views lack of sharp pictures."""
    return (sharp[:, :3] - views[:, :3]) / RESIDUAL_SCALE


def open_pixels(views: Float[Tensor, "b 5 h w"]) -> Float[Tensor, "b 1 h w"]:
    """1 where a view shows the object and its color is not final, 0 elsewhere."""
    return (1 - views[:, 4:]) * (views[:, 3:4] > -1)


class ConditionedDetail:
    """The network with the tokens of its reference pictures, computed once.

    On CUDA a step of the sampling is captured in a graph: it is some hundred launches, which take four times as long.
    """

    def __init__(
        self,
        net: DetailNet,
        pictures: Float[Tensor, "r 4 h h"],
        cameras: Float[Tensor, "r 4"],
        cast: torch.autocast,
    ) -> None:
        """Take the reference pictures, premultiplied RGBA in [-1, 1]; `cast` is the precision to compute in."""
        self.net, self.cast, self.cameras = net, cast, cameras
        self.is_present = torch.ones_like(cameras[:, 0])
        self._graphed, self._shape = GraphedStep(self._denoise, cameras.device), None
        with torch.no_grad(), cast:
            self.tokens = net.encode(pictures, cameras, self.is_present)

    def _denoise(self, noisy: Tensor, t: Tensor, views: Tensor, cameras: Tensor) -> Tensor:
        with self.cast:
            return self.net.denoise(noisy, t, views, cameras, self.cameras, self.is_present, self.tokens).float()

    @torch.no_grad()
    def sample(
        self,
        views: Float[Tensor, "b 5 h h"],
        cameras: Float[Tensor, "b 4"],
        n_steps: int,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
    ) -> Float[Tensor, "b 4 h h"]:
        """Views with detail, drawn as `sampling.ConditionedPrior.sample` does, from one draft.

        Final colors, silhouettes and what is outside of them come back as they are.

        Args:
            views, cameras: As many for each reference, reference by reference; premultiplied RGBA in [-1, 1] and what is final.
            temperature: Width of the starting noise: under 1 the network keeps to what it is surer of.
        """
        source = views.device if generator is None else generator.device
        x = temperature * torch.randn(views[:, :3].shape, generator=generator, device=source).to(views.device)
        is_open, blurred, alpha = open_pixels(views), views[:, :3], views[:, 3:4]
        clean = before = torch.zeros_like(x)
        if views.shape != self._shape:
            self._graphed.reset()
            self._shape = views.shape
        for step in range(n_steps):
            now, then = 1 - step / n_steps, 1 - (step + 1) / n_steps
            t = torch.full_like(cameras[:, 0], now)
            a, s = alpha_sigma(t)
            v = self._graphed(x, t, views, cameras)
            sharp = blurred + RESIDUAL_SCALE * (a * x - s * v)
            # A premultiplied color lies between empty and its alpha.
            clean, before = (torch.minimum(sharp.clamp(min=-1), alpha) - blurred) * is_open / RESIDUAL_SCALE, clean
            ahead = clean + extrapolation(step, n_steps) * (clean - before)
            noise = (x - a * ahead) / s
            x = math.cos(then * math.pi / 2) * ahead + math.sin(then * math.pi / 2) * noise
        return torch.cat([blurred + RESIDUAL_SCALE * clean, alpha], 1)


def to_bytes(net: DetailNet, widths: tuple[int, int, int], notes: dict[str, str] | None = None) -> bytes:
    """The network as a file of weights; `notes` go to its header too."""
    return packed(net, ARCHITECTURE, {"widths": json.dumps(widths), **(notes or {})})


def load(path: Path | str = "") -> DetailNet:
    """The network with weights from a file, on the CPU in fp32; the shipped ones when no path is given.

    Raises:
        GuidanceError: There is no such file, it is damaged, or it is for another architecture.
    """
    path = Path(path) if path else shipped_path(DETAIL)
    header, tensors = read(path, ARCHITECTURE)
    return filled(DetailNet(stated_widths(header, path)), tensors, path)


class DetailModel:
    """The network with its weights, ready to redraw views of one reference picture."""

    def __init__(self, device: torch.device, weights: Path | str = "") -> None:
        """Load the weights, the shipped ones when no path is given.

        Raises:
            GuidanceError: They are missing, damaged or of another architecture.
        """
        self.device = device
        self.net = load(weights).to(device).to(memory_format=torch.channels_last)
        dtype = fast_precision(device)
        self._cast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def set_reference(self, reference: ReferencePicture) -> None:
        """Take the picture to condition on; its camera looks at the origin of the object frame."""
        picture = resized(reference.rgba.to(self.device, torch.float32)[None], PICTURE_SIZE) * 2 - 1
        rows = camera_rows(reference.camera.to(self.device))[None]
        self._base_azimuth_rad = float(rows[0, 0])
        rows = rows * torch.tensor([0.0, 1, 1, 1], device=self.device)
        self._conditioned = ConditionedDetail(self.net, picture, rows, self._cast)

    def redraw(
        self,
        rgba: Float[Tensor, "4 size size"],
        final: Float[Tensor, "1 size size"],
        camera: Camera,
        n_steps: int,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
    ) -> Float[Tensor, "4 size size"]:
        """A view with detail.

        Args:
            rgba: The blurred view, premultiplied in [0, 1]; `PICTURE_SIZE` pixels a side are best.
            final: 1 where its color stays.
            camera: Square camera that looks at the middle of the object, which is taken for the origin.
            temperature: See `ConditionedDetail.sample`.
        """
        view = torch.cat([rgba * 2 - 1, final])[None].to(self.device, torch.float32)
        rows = camera_rows(camera.to(self.device), self._base_azimuth_rad)[None]
        return (self._conditioned.sample(view, rows, n_steps, generator, temperature)[0].cpu() + 1) / 2
