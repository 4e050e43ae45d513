"""How alike new views and the picture are to CLIP: what NeuralLift-360 asks of views that nobody has seen.

NeuralLift-360 (arXiv:2211.16431) uses CLIP twice, in its released code (github.com/VITA-Group/NeuralLift-360, commit 93b9e2d,
`nerf/clip.py` and `nerf/utils_neurallift.py`): as a loss of views within 60 degrees of the front, weight 1, and inside the
diffusion model's step, of the denoised view, 100 in front and 50 elsewhere. Here is the loss; views from elsewhere have it
too, at a weight of their own, in place of the second use, which would decode a picture and go back through the decoder in
every step. The picture and the views both stand on white; there the picture is on black, and views are on random grays.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..cameras import Camera, orbit_angles
from ..config import ClipConfig
from ..model_files import load_component, model_folder, require_diffusers
from .interfaces import ReferencePicture
from .latents import composited, resized
from .prompts import turned_away
from .zero123 import CLIP_MEAN, CLIP_STD

FRONT_RAD = math.radians(60)
"""Views turned away less than this are from the front."""


def spherical_distance(a: Float[Tensor, "n width"], b: Float[Tensor, "m width"]) -> Float[Tensor, " n"]:
    """2 arcsin²(‖a - b‖ / 2) of unit vectors along a and b: half the square of the angle between them."""
    return 2 * (F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).norm(dim=-1).div(2).arcsin().square()


def find_model(config: ClipConfig) -> Path:
    """The folder of its files; errors as those of `ClipLikeness`."""
    require_diffusers()
    return model_folder(config.model, ("",), replace(config.weights, precision="float32"))


class ClipLikeness:
    """CLIP's picture encoder, and what it makes of the picture. Implements `interfaces.Likeness`."""

    def __init__(self, config: ClipConfig, device: torch.device) -> None:
        """Read the encoder.

        Raises:
            GuidanceError: Weights are missing or cannot be used.
            MissingDependency: diffusers or transformers is not installed.
        """
        require_diffusers()
        from transformers import CLIPModel

        self.config, self.device = config, device
        # Float32: the encoder is small, and the gradient that comes out of it would be lost in half precision.
        weights = replace(config.weights, precision="float32")
        clip = load_component(find_model(config), "", CLIPModel, torch.float32, weights)
        self.encoder, self.projection = clip.vision_model.to(device), clip.visual_projection.to(device)
        self.picture_size = int(clip.config.vision_config.image_size)
        # On the device once: a captured step cannot bring numbers from the host.
        self.mean, self.std, self.white = (
            torch.tensor(values, device=device).reshape(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD, (1.0, 1.0, 1.0))
        )

    @torch.no_grad()
    def set_reference(self, reference: ReferencePicture) -> None:
        """See `interfaces.Likeness`."""
        self.wanted = self._embeddings(reference.rgba[None].to(self.device))

    def loss(self, rgba: Float[Tensor, "n 4 height width"], cameras: Camera) -> Float[Tensor, ""]:
        """See `interfaces.Likeness`; views count by where they look from."""
        front, aside = self.config.weight, self.config.weight_aside
        azimuth, _, _ = orbit_angles(cameras.positions)
        weights = aside + (front - aside) * (turned_away(azimuth) < FRONT_RAD)
        return (weights * spherical_distance(self._embeddings(rgba), self.wanted)).mean()

    def _embeddings(self, rgba: Float[Tensor, "n 4 height width"]) -> Float[Tensor, "n width"]:
        rgb = resized(composited(rgba.float(), self.white), self.picture_size)
        return self.projection(self.encoder((rgb - self.mean) / self.std).pooler_output)
