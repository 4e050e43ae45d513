"""Zero-1-to-3 (arXiv:2303.11328), Zero123-XL and Stable Zero123 as a prior that knows the picture and the camera.

The network is Stable Diffusion's with 8 input channels: the noisy latents, scaled by the autoencoder's factor, and the
condition picture's latents, *not* scaled. Its one token is a linear map of [CLIP embedding of the picture, pose]. Both
conditions are replaced by zeros (the token after the map) for classifier-free guidance.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .. import cameras as camera_math
from ..cameras import Camera
from ..config import REFERENCE_EXTENT, WeightsConfig, Zero123Config
from ..errors import GuidanceError
from ..known_models import license_of
from ..model_files import (
    DTYPES,
    list_files,
    load_component,
    model_folder,
    require_diffusers,
    weight_files,
    with_precision,
)
from . import sds
from .distill import Denoiser, Distiller, Draws, NoiseSchedule
from .interfaces import GuidanceResult, ReferencePicture
from .latents import composited, find_tiny_autoencoder, load_latent_space, on_device, resized
from .memory import choose_plan

PARTS = ("unet", "vae", "scheduler", "image_encoder")
PROJECTIONS = {"cc_projection": "projection", "clip_camera_projection": "proj"}
"""Names of the pose projection in the two published conversions to diffusers, and of its linear layer."""
TRAINING_FOV_RAD = 2 * math.atan(32 / 2 / 35)
"""Zero123's pictures were rendered through a lens of 35 mm on a sensor of 32 mm: 49.1 degrees."""
TRAINING_SIZE = 256
"""Pixels a side of Zero123's pictures."""
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def pose_vectors(reference: Camera, cameras: Camera, variant: str) -> Float[Tensor, "n 4"]:
    """Zero123's pose of each camera against the reference: [Δpolar, sin Δazimuth, cos Δazimuth, last].

    Zero123 takes camera positions in Blender's world (+Z up): polar is the angle from +Z, azimuth is atan2(y, x), so it
    grows from +X towards +Y, counterclockwise seen from above; Δ is target minus condition.

    Here a camera at azimuth A stands at (sin A, -cos A) seen from above, hence atan2(-cos A, sin A) = A - 90°: the same
    sense of rotation with another zero, which the difference drops. So Δazimuth keeps its sign. Elevation E is measured
    from the level, polar = 90° - E, hence Δpolar = E_reference - E: negative for a camera that has moved up.

    The last number is Δradius for `zero123`, in units of the object's longest side: Zero123 scales objects to a unit
    cube and has one angle of view, so a camera counts as the radius at which *that* angle shows the object this large,
    r = distance · tan(fov/2) / tan(49.1°/2) / longest side. For `stable_zero123` it is the reference's polar angle.

    Args:
        reference: Single square camera that looks at the origin.
        cameras: Batch of such cameras.
        variant: `zero123` or `stable_zero123`.
    """
    azimuth, elevation, radius = _orbit(cameras)
    azimuth_0, elevation_0, radius_0 = (value.to(azimuth) for value in _orbit(reference))
    turned = azimuth - azimuth_0
    polar_0 = math.pi / 2 - elevation_0
    last = radius - radius_0 if variant == "zero123" else polar_0.expand_as(radius)
    return torch.stack([math.pi / 2 - elevation - polar_0, turned.sin(), turned.cos(), last], -1)


def _orbit(cameras: Camera) -> tuple[Tensor, Tensor, Tensor]:
    azimuth, elevation, distance = camera_math.orbit_angles(cameras.positions)
    tangent = cameras.width / 2 / cameras.intrinsics[..., 0]
    return azimuth, elevation, distance * tangent / math.tan(TRAINING_FOV_RAD / 2) / REFERENCE_EXTENT


def clip_input(rgb: Float[Tensor, "n 3 height width"], size: int) -> Float[Tensor, "n 3 size size"]:
    """Pictures in [0, 1] as CLIP's image encoder wants them, resized as Zero123's training code did."""
    rgb = F.interpolate(rgb, (size, size), mode="bicubic", align_corners=True)
    mean, std = (torch.tensor(values).to(rgb).reshape(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (rgb - mean) / std


def check_settings(config: Zero123Config, device: torch.device) -> None:
    """Refuse what `Zero123Guidance` would for want of a package or of files."""
    require_diffusers()
    weights = with_precision(config.weights, device)
    folder = model_folder(config.model, PARTS, weights, optional=tuple(PROJECTIONS))
    _projection_file(folder, weights)
    find_tiny_autoencoder(weights)


class Zero123Guidance:
    """Implements `interfaces.SplitGuidance`."""

    def __init__(self, config: Zero123Config, device: torch.device) -> None:
        require_diffusers()
        self.config, self.device = config, device
        weights = with_precision(config.weights, device)
        self.dtype = DTYPES[weights.precision]
        plan = choose_plan(weights.memory, device)
        folder = model_folder(config.model, PARTS, weights, optional=tuple(PROJECTIONS))
        self.license = license_of(config.model, folder)
        # Imported once the model is known to be there; its files are read meanwhile.
        from diffusers import UNet2DConditionModel
        from transformers import CLIPVisionModelWithProjection

        unet = load_component(folder, "unet", UNet2DConditionModel, self.dtype, weights)
        if unet.config.in_channels != 8:
            raise GuidanceError(
                f"the network of {config.model} takes {unet.config.in_channels} channels, Zero123's takes 8: this is another "
                "kind of model"
            )
        unet = on_device(unet, device, weights.compile)
        encoder_dtype = self.dtype if plan.keeps_encoders else torch.float32
        encoder = load_component(folder, "image_encoder", CLIPVisionModelWithProjection, encoder_dtype, weights)
        self.image_encoder = encoder.to(device if plan.keeps_encoders else "cpu")
        self.projection = load_projection(folder, weights).to(device)
        space = load_latent_space(folder, weights, device)
        # Conversions may carry Stable Diffusion's sample size; the network was trained at this one.
        self.picture_size = min(TRAINING_SIZE, int(unet.config.sample_size) * space.factor)
        schedule = NoiseSchedule.read(folder, device)
        self.distiller = Distiller(space, schedule, unet, self._denoiser, config, plan, self.picture_size)
        self.reference: Camera | None = None

    @torch.no_grad()
    def set_reference(self, reference: ReferencePicture) -> None:
        """Encode the picture, over white as in Zero123's training."""
        white = torch.ones(1, 3, 1, 1, device=self.device)
        rgb = composited(reference.rgba[None].to(self.device), white).clamp(0, 1)
        rgb = resized(rgb, self.picture_size)
        seen = clip_input(rgb, self.image_encoder.config.image_size).to(
            self.image_encoder.device, self.image_encoder.dtype
        )
        self.embedding: Float[Tensor, "1 width"] = self.image_encoder(seen).image_embeds.float().to(self.device)
        self.latents: Float[Tensor, "1 4 h w"] = self.distiller.space.encode_unscaled(rgb)
        self.reference = reference.camera.to(self.device)
        self.distiller.forget()

    def gradient(
        self,
        rgba: Float[Tensor, "n 4 height width"],
        cameras: Camera,
        progress: float,
        generator: torch.Generator | None = None,
    ) -> GuidanceResult:
        """See `interfaces.Guidance`."""
        if self.reference is None:
            raise ValueError("set_reference must be called before gradient")
        return self.distiller.gradient(rgba, cameras, progress, generator, white_background=True)

    def draw(self, n: int, progress: float, generator: torch.Generator | None = None) -> Draws:
        """See `interfaces.SplitGuidance`."""
        return self.distiller.draw(n, progress, generator, white_background=True)

    def distill(
        self, rgba: Float[Tensor, "n 4 height width"], cameras: Camera, draws: tuple[Tensor, ...]
    ) -> GuidanceResult:
        """See `interfaces.SplitGuidance`."""
        return self.distiller.distill(rgba, cameras, draws)

    def _tokens(self, cameras: Camera) -> Float[Tensor, "n 1 width"]:
        """The projection runs in float32: it is tiny, and angles lose their small differences in half precision."""
        poses = pose_vectors(self.reference, cameras, self.config.variant).float()
        joined = torch.cat([self.embedding.expand(len(poses), -1), poses], -1)
        return self.projection(joined)[:, None].to(self.dtype)

    def _denoiser(self, cameras: Camera) -> Denoiser:
        tokens = self._tokens(cameras)

        def guided(noisy: Tensor, timesteps: Tensor, views: slice) -> Tensor:
            if self.distiller.plan.splits_guidance:
                plain, own = (self._ask(noisy, timesteps, tokens[views], [seen])[0] for seen in (False, True))
            else:
                plain, own = self._ask(noisy, timesteps, tokens[views], [False, True])
            return sds.guided(plain, own, self.config.scale)

        def unconditional(noisy: Tensor, timesteps: Tensor, views: slice) -> Tensor:
            return self._ask(noisy, timesteps, tokens[views], [False])[0]

        return Denoiser(guided, unconditional)

    def _ask(
        self, noisy: Tensor, timesteps: Tensor, tokens: Float[Tensor, "n 1 width"], is_conditioned: list[bool]
    ) -> list[Float[Tensor, "n 4 h w"]]:
        """Noise predictions with both conditions, or with neither."""
        seen = self.latents.expand(len(noisy), -1, -1, -1)
        concatenated = torch.cat([seen if c else torch.zeros_like(seen) for c in is_conditioned])
        said = torch.cat([tokens if c else torch.zeros_like(tokens) for c in is_conditioned])
        return self.distiller.ask(noisy, timesteps, said, concatenated)


def load_projection(folder: Path, weights: WeightsConfig) -> nn.Linear:
    """The linear map from [CLIP embedding, pose] to the token, in float32.

    Both conversions to diffusers are read: `cc_projection` (as in `kxic/zero123-xl`, whose settings file does not hold the
    sizes) and `clip_camera_projection`.

    Raises:
        GuidanceError: The model has no such component, or it does not take four pose numbers.
    """
    name, file = _projection_file(folder, weights)
    state = _read_state(file)
    layer = PROJECTIONS[name]
    weight, bias = state.get(f"{layer}.weight"), state.get(f"{layer}.bias")
    if weight is None or bias is None or weight.dim() != 2 or weight.shape[1] != weight.shape[0] + 4:
        raise GuidanceError(
            f"{name} of {folder} is not a linear layer from [embedding, 4 pose numbers] to an embedding"
        )
    projection = nn.Linear(weight.shape[1], weight.shape[0])
    projection.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    return projection.requires_grad_(False)


def _projection_file(folder: Path, weights: WeightsConfig) -> tuple[str, Path]:
    """Name and weights of the component that holds the pose projection."""
    files = list_files(folder)
    for name in PROJECTIONS:
        if found := weight_files(files, name, weights):
            return name, folder / found[0]
    raise GuidanceError(f"{folder} has no {' or '.join(PROJECTIONS)}: it is not a Zero123 in diffusers layout")


def _read_state(file: Path) -> dict[str, Any]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)
