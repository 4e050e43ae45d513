"""What can stand before the optimisation: a picture from text, an edit of the picture, a guess of its depth.

The article's second result makes the picture by a text-to-image model and lifts it; its outlook edits the picture first.
Everything here needs the extra `sd`; models are read from folders or the hub's cache as `model_files` says.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from torch import Tensor

from .config import PipelineConfig, SeedingConfig, StableDiffusionConfig, WeightsConfig
from .errors import GuidanceError, InputError
from .guidance import edict
from .guidance.sds import guided
from .model_files import model_folder, pipeline_folder, pipeline_options, require_diffusers, with_precision
from .preprocess.captioning import caption
from .preprocess.reading import read_picture

log = logging.getLogger(__name__)

PictureArray = UInt8[ndarray, "height width 3"]
MadePicture = UInt8[ndarray, "made_height made_width 3"]
"""Of the size that the model works at."""


@dataclass(frozen=True)
class SeedRequest:
    """What a caller has, and what is to be made of it before the optimisation."""

    picture: Path | bytes | None
    """None: it is made from the prompt."""
    prompt: str = ""
    edit: str = ""
    """Change the picture first; see `edit_picture`."""
    wants_caption: bool = False
    """Describe the picture where the caller has not."""
    wants_depth: bool = False


@dataclass(frozen=True)
class Seed:
    """What the optimisation starts from."""

    picture: Path | bytes
    prompt: str
    depth: Path | None
    """Relative distances, as a job takes them."""


def make_seed(request: SeedRequest, config: PipelineConfig, device: torch.device, folder: Path) -> Seed:
    """Everything that is asked for, in order: the picture, its caption, its edit, its depth. Files go to the folder.

    Raises:
        InputError: Words are missing, or the picture cannot be read.
        MissingDependency: diffusers or transformers is not installed.
        GuidanceError: A model cannot be found or read.
    """
    settings, prompt, source = config.seeding, request.prompt, request.picture
    if source is None:
        source = write_picture(picture_from_text(prompt, settings, device, config.seed), folder / "from_text.png")
    needs_words = bool(request.edit) and settings.edit_method == "edict"
    if not prompt and (request.wants_caption or needs_words):
        prompt = caption(_on_white(source, config), settings, device)
        log.info("caption: %s", prompt)
    if request.edit:
        edited = edit_picture(_on_white(source, config), request.edit, prompt, settings, device, config.seed)
        source = write_picture(edited, folder / "edited.png")
        # An instruction says what to change, not what is then to be seen.
        prompt = request.edit if settings.edit_method == "edict" else prompt
    depth = None
    if request.wants_depth:
        depth = folder / "depth_guess.npy"
        np.save(depth, estimate_depth(_on_white(source, config), settings, device))
    return Seed(source, prompt, depth)


def _on_white(source: Path | bytes, config: PipelineConfig) -> PictureArray:
    rgba = read_picture(source, config.picture.max_pixels, config.picture.max_side).rgba
    return _to_bytes(rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:])


def picture_from_text(prompt: str, config: SeedingConfig, device: torch.device, seed: int) -> MadePicture:
    """A picture of one object that a text-to-image model makes of the prompt; lifting it gives text to object.

    Raises:
        InputError: The prompt is empty.
        MissingDependency: diffusers is not installed.
        GuidanceError: The model cannot be found or read, or its safety checker blanks the picture.
    """
    if not prompt.strip():
        raise InputError("a picture from text needs a prompt: say what it should show")
    require_diffusers()
    from diffusers import AutoPipelineForText2Image

    pipeline = _load_pipeline(AutoPipelineForText2Image, config.text_to_image, config.weights, device)
    made = pipeline(
        prompt + config.text_suffix,
        num_inference_steps=config.text_steps,
        guidance_scale=config.text_scale,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    )
    if any(getattr(made, "nsfw_content_detected", None) or []):
        raise GuidanceError(
            f"the safety checker of {config.text_to_image} blanked the picture: try another prompt or seed"
        )
    return _to_bytes(made.images[0])


def edit_picture(
    rgb: PictureArray, edit: str, described: str, config: SeedingConfig, device: torch.device, seed: int
) -> MadePicture:
    """The picture changed as the words say, at the size the model works at.

    Args:
        edit: For `edict` the wanted picture in words ("a wooden chair with a red cushion"); for `instruct` what to change
            ("make the cushion red").
        described: What the picture shows now, in words; `edict` inverts along it. A caption will do.

    Raises:
        InputError: Words are missing.
        MissingDependency: diffusers is not installed.
        GuidanceError: The model cannot be found or read.
    """
    if not edit.strip():
        raise InputError("an edit needs words that say what the picture should become")
    require_diffusers()
    if config.edit_method == "instruct":
        return _edit_by_instruction(rgb, edit, config, device, seed)
    if not described.strip():
        raise InputError("edict needs a description of the picture as it is (--prompt, or a caption model)")
    return EdictEditor(config, device).edit(rgb, described, edit)


def _edit_by_instruction(
    rgb: PictureArray, edit: str, config: SeedingConfig, device: torch.device, seed: int
) -> MadePicture:
    from diffusers import StableDiffusionInstructPix2PixPipeline
    from PIL import Image

    pipeline = _load_pipeline(StableDiffusionInstructPix2PixPipeline, config.instruct_model, config.weights, device)
    size = int(pipeline.unet.config.sample_size) * pipeline.vae_scale_factor
    made = pipeline(
        edit,
        image=Image.fromarray(rgb).resize(_fitted(rgb.shape[1], rgb.shape[0], size), Image.Resampling.LANCZOS),
        num_inference_steps=config.edit_steps,
        guidance_scale=config.text_scale,
        image_guidance_scale=config.picture_scale,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    )
    if any(getattr(made, "nsfw_content_detected", None) or []):
        raise GuidanceError(
            f"the safety checker of {config.instruct_model} blanked the picture: try other words or a seed"
        )
    return _to_bytes(made.images[0])


class EdictEditor:
    """Editing by exact inversion (arXiv:2211.12446): back to noise under one prompt, forward again under another."""

    def __init__(self, config: SeedingConfig, device: torch.device) -> None:
        from .guidance.stable_diffusion import StableDiffusionGuidance

        self.config, self.device = config, device
        # The prior's class reads the model and encodes prompts; nothing else of it is used here.
        prior = StableDiffusionGuidance(StableDiffusionConfig(model=config.edit_model, weights=config.weights), device)
        if prior.is_xl:
            raise GuidanceError(f"{config.edit_model} is an XL model: edict works with Stable Diffusion 1.x and 2.x")
        self.prior, self.space, self.schedule = prior, prior.distiller.space, prior.distiller.schedule

    @torch.no_grad()
    def edit(self, rgb: PictureArray, described: str, wanted: str) -> MadePicture:
        from PIL import Image

        size = _fitted(rgb.shape[1], rgb.shape[0], self.prior.picture_size)
        picture = np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.LANCZOS))
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].to(self.device).float() / 255
        latents = self.space.encode(pixels).double()
        steps = self.config.edit_steps
        timesteps = edict.timesteps_of(steps, self.config.edit_strength, len(self.schedule.alphas_cumprod))
        walk = (self.schedule.alphas_cumprod, timesteps, self.config.edict_mixing)
        noisy = edict.invert((latents, latents), self.predictor(described), *walk)
        x, y = edict.denoise(noisy, self.predictor(wanted), *walk)
        return _to_bytes(self.space.decode(((x + y) / 2).float())[0].permute(1, 2, 0).cpu().numpy())

    def predictor(self, prompt: str) -> edict.Predict:
        """Noise predictions under a prompt. Their precision does not matter, only that the same input gives the same."""
        text = self.prior.encode_text(["", prompt])

        def predict(latents: Tensor, timestep: int) -> Tensor:
            timesteps = torch.full((1,), timestep, device=self.device)
            plain, own = self.prior.distiller.ask(latents, timesteps, text.tokens)
            return guided(plain, own, self.config.edit_scale).double()

        return predict


def estimate_depth(rgb: PictureArray, config: SeedingConfig, device: torch.device) -> Float[ndarray, "height width"]:
    """A guess of relative distances, 0 (nearest) to 1 (farthest), by any depth-estimation model of transformers.

    Raises:
        MissingDependency: transformers is not installed.
        GuidanceError: The model cannot be found or read, or answers nothing usable.
    """
    require_diffusers()
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    folder = model_folder(config.depth_model, ("",), with_precision(config.weights, device))
    try:
        processor = AutoImageProcessor.from_pretrained(folder)
        model = AutoModelForDepthEstimation.from_pretrained(
            folder, use_safetensors=None if config.weights.allow_pickle else True
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise GuidanceError(f"{config.depth_model} cannot be read as a depth-estimation model: {reason}") from None
    model = model.float().to(device).eval()
    inputs = processor(images=Image.fromarray(np.ascontiguousarray(rgb)), return_tensors="pt").to(device)
    with torch.no_grad():
        found = model(**inputs).predicted_depth.float()
    found = torch.nn.functional.interpolate(found.reshape(1, 1, *found.shape[-2:]), rgb.shape[:2], mode="bicubic")[0, 0]
    low, high = found.min(), found.max()
    if not torch.isfinite(found).all() or float(high - low) <= 1e-9:
        raise GuidanceError(f"{config.depth_model} sees no depth in the picture: leave the depth out, or give a map")
    nearness = (found - low) / (high - low)
    return (nearness if answers_distance(model.config) else 1 - nearness).cpu().numpy()


def answers_distance(model_config: Any) -> bool:
    """Whether a depth model's numbers grow with distance; those without a scale answer disparity, which shrinks with it."""
    if getattr(model_config, "depth_estimation_type", "relative") == "metric":
        return True
    return model_config.model_type in ("zoedepth", "depth_pro", "glpn")


def _load_pipeline(kind: Any, model: str, weights: WeightsConfig, device: torch.device) -> Any:
    weights = with_precision(weights, device)
    folder = pipeline_folder(model, weights)
    try:
        pipeline = kind.from_pretrained(folder, **pipeline_options(folder, weights))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise GuidanceError(f"{model} cannot be read as {kind.__name__}: {reason}") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _fitted(width: int, height: int, size: int) -> tuple[int, int]:
    """The picture's aspect at about the model's number of pixels, in multiples of 64 where the model is large enough."""
    grid = 64 if size >= 256 else 8
    factor = size / (width * height) ** 0.5
    return max(grid, round(width * factor / grid) * grid), max(grid, round(height * factor / grid) * grid)


def _to_bytes(rgb: Float[ndarray, "made_height made_width 3"]) -> MadePicture:
    return (np.clip(rgb, 0, 1) * 255).round().astype(np.uint8)


def write_picture(rgb: PictureArray, path: Path) -> Path:
    """Save a picture as PNG, to go on from as from any other."""
    from PIL import Image

    Image.fromarray(rgb).save(path)
    return path
