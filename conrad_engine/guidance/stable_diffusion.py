"""Stable Diffusion 1.x, 2.x and XL as a prior: text, told apart by view, and on request the picture through an IP-Adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import cameras as camera_math
from ..cameras import Camera
from ..config import StableDiffusionConfig, WeightsConfig
from ..errors import GuidanceError, InputError
from ..known_models import license_of
from ..model_files import DTYPES, is_xl, load_component, model_folder, require_diffusers, trusted_file, with_precision
from . import sds
from .distill import Denoiser, Distiller, Draws, NoiseSchedule
from .interfaces import GuidanceResult, ReferencePicture
from .latents import composited, find_tiny_autoencoder, load_latent_space, on_device
from .memory import choose_plan
from .prompts import NEGATIVE_VIEWS, VIEWS, negative_weights, view_prompts, view_shares

PARTS = ("unet", "vae", "scheduler", "text_encoder", "tokenizer")
PARTS_XL = ("text_encoder_2", "tokenizer_2")


@dataclass(frozen=True)
class TextCondition:
    """What the network is told: one row a prompt, or one a view."""

    tokens: Float[Tensor, "rows n_tokens width"]
    pooled: Float[Tensor, "rows pooled_width"] | None
    """XL only."""
    sees_picture: bool = True
    """Whether an IP-Adapter shows the picture along with the text."""

    def mixed(self, shares: Float[Tensor, "n rows"], sees_picture: bool) -> TextCondition:
        """Rows blended by shares, one for each view."""
        pooled = None if self.pooled is None else shares.to(self.pooled) @ self.pooled
        tokens = torch.einsum("nr,rtw->ntw", shares.to(self.tokens), self.tokens)
        return TextCondition(tokens, pooled, sees_picture)


def check_settings(config: StableDiffusionConfig, prompt: str, device: torch.device) -> None:
    """Refuse what `StableDiffusionGuidance` would for want of a package, of files or of a prompt."""
    require_diffusers()
    weights = with_precision(config.weights, device)
    model_folder(config.model, PARTS, weights, optional=PARTS_XL)
    find_tiny_autoencoder(weights)
    if config.embedding:
        trusted_file(config.embedding, weights)
    if config.ip_adapter:
        _adapter_folder(config, weights)
    if config.word_steps == 0:  # a word that is learned becomes the prompt
        _require_condition(config, prompt)


class StableDiffusionGuidance:
    """Implements `interfaces.SplitGuidance`."""

    def __init__(self, config: StableDiffusionConfig, device: torch.device) -> None:
        require_diffusers()
        self.config, self.device = config, device
        weights = with_precision(config.weights, device)
        self.dtype = DTYPES[weights.precision]
        plan = choose_plan(weights.memory, device)
        folder = model_folder(config.model, PARTS, weights, optional=PARTS_XL)
        self.license = license_of(config.model, folder)
        self.is_xl = is_xl(folder)
        space = load_latent_space(folder, weights, device)
        self.pipeline = _make_pipeline(folder, config, weights, space.vae, plan.keeps_encoders)
        unet = on_device(self.pipeline.unet, device, weights.compile)
        if plan.keeps_encoders:
            self.pipeline.to(device)
        self.picture_size = config.picture_size or int(unet.config.sample_size) * space.factor
        size = float(self.picture_size)
        # XL: original size, crop and target size of a picture of this very size, not cropped (arXiv:2307.01952, section 2.2).
        self.time_ids = torch.tensor([[size, size, 0.0, 0.0, size, size]], device=device, dtype=self.dtype)
        schedule = NoiseSchedule.read(folder, device)
        self.distiller = Distiller(space, schedule, unet, self._denoiser, config, plan, self.picture_size)
        self.text: TextCondition | None = None
        self.image_prompts: list[Tensor] = []
        """Per adapter two rows: what stands for no picture, and the picture."""

    @torch.no_grad()
    def set_reference(self, reference: ReferencePicture) -> None:
        """Encode the prompts, and the picture where an IP-Adapter takes it.

        Raises:
            InputError: There is neither a prompt nor a picture to condition on.
        """
        _require_condition(self.config, reference.prompt)
        prompts = view_prompts(reference.prompt) if self.config.view_prompts else [reference.prompt] * len(VIEWS)
        self.text = self.encode_text([self.config.negative_prompt, *prompts])
        if self.config.ip_adapter:
            self.image_prompts = self._encode_picture(reference)
        self.distiller.forget()

    def gradient(
        self,
        rgba: Float[Tensor, "n 4 height width"],
        cameras: Camera,
        progress: float,
        generator: torch.Generator | None = None,
    ) -> GuidanceResult:
        """See `interfaces.Guidance`."""
        if self.text is None:
            raise ValueError("set_reference must be called before gradient")
        return self.distiller.gradient(rgba, cameras, progress, generator, self.config.background == "white")

    def draw(self, n: int, progress: float, generator: torch.Generator | None = None) -> Draws:
        """See `interfaces.SplitGuidance`."""
        return self.distiller.draw(n, progress, generator, self.config.background == "white")

    def distill(
        self, rgba: Float[Tensor, "n 4 height width"], cameras: Camera, draws: tuple[Tensor, ...]
    ) -> GuidanceResult:
        """See `interfaces.SplitGuidance`."""
        return self.distiller.distill(rgba, cameras, draws)

    def _denoiser(self, cameras: Camera) -> Denoiser:
        """Branches: the negative prompt, the view's own, and with Perp-Neg the views it must not be taken for."""
        assert self.text is not None
        azimuth, elevation, _ = camera_math.orbit_angles(cameras.positions)
        n = len(azimuth)
        own = torch.cat([torch.zeros(n, 1, device=azimuth.device), view_shares(azimuth, elevation)], 1)
        plain = torch.zeros_like(own)
        plain[:, 0].fill_(1)
        branches = [self.text.mixed(plain, sees_picture=False), self.text.mixed(own, sees_picture=True)]
        if self.config.perp_neg:
            for view in NEGATIVE_VIEWS:
                negative = torch.zeros_like(own)
                negative[:, 1 + VIEWS.index(view)].fill_(1)
                branches.append(self.text.mixed(negative, sees_picture=True))
        weights = negative_weights(azimuth, elevation)

        def guided(noisy: Tensor, timesteps: Tensor, views: slice) -> Tensor:
            plain_pred, own_pred, *negative_preds = self._predict(noisy, timesteps, branches, views)
            if not negative_preds:
                return sds.guided(plain_pred, own_pred, self.config.scale)
            negatives = torch.stack(negative_preds)
            return sds.perp_neg_guided(plain_pred, own_pred, negatives, weights[:, views], self.config.scale)

        def unconditional(noisy: Tensor, timesteps: Tensor, views: slice) -> Tensor:
            return self._predict(noisy, timesteps, branches[:1], views)[0]

        return Denoiser(guided, unconditional)

    def _predict(
        self, noisy: Tensor, timesteps: Tensor, branches: list[TextCondition], views: slice
    ) -> list[Float[Tensor, "n 4 h w"]]:
        """Noise predictions of every branch, in one pass or one after the other."""
        if self.distiller.plan.splits_guidance:
            return [self._ask(noisy, timesteps, [branch], views)[0] for branch in branches]
        return self._ask(noisy, timesteps, branches, views)

    def _ask(self, noisy: Tensor, timesteps: Tensor, branches: list[TextCondition], views: slice) -> list[Tensor]:
        k, n = len(branches), len(noisy)
        extra: dict[str, Any] = {}
        if self.is_xl:
            extra["text_embeds"] = torch.cat([branch.pooled[views] for branch in branches])
            extra["time_ids"] = self.time_ids.expand(k * n, -1)
        if self.image_prompts:
            rows = [int(branch.sees_picture) for branch in branches for _ in range(n)]
            extra["image_embeds"] = [torch.cat([pair[row : row + 1] for row in rows]) for pair in self.image_prompts]
        tokens = torch.cat([branch.tokens[views] for branch in branches])
        return self.distiller.ask(noisy, timesteps, tokens, extra=extra or None)

    def encode_text(self, prompts: list[str]) -> TextCondition:
        """One row a prompt; the first one is the negative or empty prompt."""
        where = self.pipeline.text_encoder.device
        encoded = self.pipeline.encode_prompt(
            prompts, device=where, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        tokens = encoded[0].to(self.device, self.dtype)
        pooled = encoded[2].to(self.device, self.dtype) if self.is_xl else None
        if pooled is not None and not prompts[0]:
            # XL was trained with zeros, not with the encoding of an empty prompt.
            tokens[0], pooled[0] = 0, 0
        return TextCondition(tokens, pooled)

    def _encode_picture(self, reference: ReferencePicture) -> list[Tensor]:
        from PIL import Image

        white = torch.ones(1, 3, 1, 1, device=reference.rgba.device)
        rgb = composited(reference.rgba[None], white)[0].clamp(0, 1)
        picture = Image.fromarray((rgb.permute(1, 2, 0) * 255).round().byte().cpu().numpy())
        encoded = self.pipeline.prepare_ip_adapter_image_embeds(
            picture, None, self.pipeline.image_encoder.device, 1, do_classifier_free_guidance=True
        )
        return [embeds.to(self.device, self.dtype) for embeds in encoded]


def _require_condition(config: StableDiffusionConfig, prompt: str) -> None:
    if not prompt and not config.ip_adapter:
        raise InputError(
            "Stable Diffusion needs a prompt that says what the picture shows (--prompt), or an IP-Adapter "
            "(guidance.ip_adapter)"
        )


def _make_pipeline(
    folder: Path, config: StableDiffusionConfig, weights: WeightsConfig, vae: Any, keeps_encoders: bool
) -> Any:
    """diffusers' pipeline of the components, which encodes prompts and takes adapters; its sampler is not used."""
    from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    dtype = DTYPES[weights.precision]
    # Encoders that stay on the CPU run there in float32: half precision is slow on a CPU, or missing.
    encoder_dtype = dtype if keeps_encoders else torch.float32
    unet = load_component(folder, "unet", UNet2DConditionModel, dtype, weights)
    if unet.config.in_channels != 4:
        raise GuidanceError(
            f"the network of {config.model} takes {unet.config.in_channels} channels, a text-to-image one takes 4: choose a "
            "base model, not an inpainting, depth or novel-view one"
        )
    parts = {
        "vae": vae,
        "unet": unet,
        "scheduler": DDPMScheduler(steps_offset=1, clip_sample=False),
        "text_encoder": load_component(folder, "text_encoder", CLIPTextModel, encoder_dtype, weights),
        "tokenizer": CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"),
    }
    if is_xl(folder):
        second = load_component(folder, "text_encoder_2", CLIPTextModelWithProjection, encoder_dtype, weights)
        tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer_2")
        pipeline = StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=tokenizer)
    else:
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    if config.embedding:
        pipeline.load_textual_inversion(str(trusted_file(config.embedding, weights)))
    if config.ip_adapter:
        _add_ip_adapter(pipeline, config, weights)
        pipeline.image_encoder.to(encoder_dtype)
    return pipeline


def _adapter_folder(config: StableDiffusionConfig, weights: WeightsConfig) -> Path:
    place = config.ip_adapter_file.rpartition("/")[0]
    encoder = f"{place}/image_encoder" if place else "image_encoder"
    return model_folder(config.ip_adapter, (encoder,), weights, (config.ip_adapter_file,))


def _add_ip_adapter(pipeline: Any, config: StableDiffusionConfig, weights: WeightsConfig) -> None:
    """IP-Adapter (arXiv:2308.06721): further cross-attention that reads the picture's CLIP embedding."""
    folder = _adapter_folder(config, weights)
    place, _, name = config.ip_adapter_file.rpartition("/")
    pipeline.load_ip_adapter(folder, subfolder=place, weight_name=name, image_encoder_folder="image_encoder")
    pipeline.set_ip_adapter_scale(config.ip_adapter_scale)
