"""A word for the object of one picture: single-image textual inversion, as RealFusion starts with it.

Textual inversion (arXiv:2208.01618) optimises the embedding of one new token so that the frozen model denoises the picture
well when the token is in the prompt. RealFusion (arXiv:2302.10663, section 3.2) does it with one picture, heavily augmented.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..config import GuidanceConfig, MixtureConfig, StableDiffusionConfig
from ..errors import GuidanceError
from . import sds
from .interfaces import ReferencePicture
from .latents import composited, resized
from .stable_diffusion import StableDiffusionGuidance

TOKEN = "<object>"
TEMPLATE = "a high-resolution DSLR image of a {}"
"""RealFusion's prompt."""
FILE_NAME = "word.safetensors"


@dataclass(frozen=True)
class InversionSettings:
    """Own defaults: RealFusion's hour on a V100 is more than a first try needs."""

    n_steps: int = 600
    batch: int = 4
    rate: float = 5e-3
    initial_word: str = "object"
    max_turn_deg: float = 15.0
    """Augmentation: rotation in the picture's plane, either way."""
    min_scale: float = 0.7
    """Augmentation: smallest size against the picture's own; the largest is its inverse."""


def learns_word(config: GuidanceConfig) -> bool:
    """Whether `with_learned_word` has anything to do."""
    text = _text_of(config)
    return text is not None and text.word_steps > 0 and not text.embedding


def _text_of(config: GuidanceConfig) -> StableDiffusionConfig | None:
    text = config.stable_diffusion if isinstance(config, MixtureConfig) else config
    return text if isinstance(text, StableDiffusionConfig) else None


def with_learned_word(
    config: GuidanceConfig,
    reference: ReferencePicture,
    device: torch.device,
    folder: Path,
    seed: int,
    is_resumed: bool,
    report: Callable[[int, float], None] | None = None,
) -> tuple[GuidanceConfig, ReferencePicture]:
    """Settings and picture with a word learned for it as the prompt, if `StableDiffusionConfig.word_steps` asks for one.

    Args:
        folder: Keeps the word (`FILE_NAME`), which a resumed job takes from there.
        report: See `invert_picture`, which also says what is raised.
    """
    text = _text_of(config)
    if text is None or not learns_word(config):
        return config, reference
    path = folder / FILE_NAME
    if not (is_resumed and path.is_file()):
        settings = InversionSettings(n_steps=text.word_steps)
        unfinished = folder / f"unfinished_{FILE_NAME}"
        invert_picture(reference, text, device, unfinished, seed, settings, report).replace(path)
    text = replace(text, embedding=str(path))
    learned = replace(config, stable_diffusion=text) if isinstance(config, MixtureConfig) else text
    prompt = reference.prompt if TOKEN in reference.prompt else TEMPLATE.format(TOKEN)
    return learned, replace(reference, prompt=prompt)


def invert_picture(
    reference: ReferencePicture,
    config: StableDiffusionConfig,
    device: torch.device,
    path: Path,
    seed: int,
    settings: InversionSettings | None = None,
    report: Callable[[int, float], None] | None = None,
) -> Path:
    """Find the token's embedding and save it as `path` (.safetensors), for `StableDiffusionConfig.embedding`.

    The picture's prompt then names `TOKEN`, as in `TEMPLATE.format(TOKEN)`.

    Args:
        report: Told the step and its loss after every step; may raise to stop.

    Raises:
        GuidanceError: The model is XL, which has two text encoders, or values stop being finite.
    """
    from safetensors.torch import save_file

    settings = settings or InversionSettings()
    prior = StableDiffusionGuidance(config, device)
    if prior.is_xl:
        raise GuidanceError("textual inversion works with Stable Diffusion 1.x and 2.x, not with XL")
    encoder = prior.pipeline.text_encoder.to(device, torch.float32)
    table, token = _add_token(prior.pipeline, settings.initial_word)
    ids = prior.pipeline.tokenizer(
        TEMPLATE.format(TOKEN), padding="max_length", max_length=prior.pipeline.tokenizer.model_max_length
    ).input_ids
    prompt = torch.tensor([ids], device=device)
    row = table.weight[token].detach().clone().requires_grad_()
    adam = torch.optim.Adam([row], lr=settings.rate)
    generator = torch.Generator().manual_seed(seed)
    for step in range(settings.n_steps):
        adam.zero_grad(set_to_none=True)
        loss = _loss(prior, encoder, table, row, token, prompt, reference, settings, generator)
        if not torch.isfinite(loss):
            raise GuidanceError("textual inversion ran into non-finite values: use guidance.weights.precision=float32")
        loss.backward()
        adam.step()
        if report is not None:
            report(step, float(loss.detach()))
    save_file({TOKEN: row.detach()[None].cpu()}, path)
    return path


def _add_token(pipeline: Any, initial_word: str) -> tuple[Any, int]:
    """The token's place in the embedding table, which starts as another word's."""
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    tokenizer.add_tokens(TOKEN)
    encoder.resize_token_embeddings(len(tokenizer))
    token = tokenizer.convert_tokens_to_ids(TOKEN)
    table = encoder.get_input_embeddings()
    initial = tokenizer.encode(initial_word, add_special_tokens=False)
    with torch.no_grad():
        table.weight[token] = table.weight[initial].mean(0)
    return table, token


def _loss(
    prior: StableDiffusionGuidance,
    encoder: Any,
    table: Any,
    row: Float[Tensor, " width"],
    token: int,
    prompt: Tensor,
    reference: ReferencePicture,
    settings: InversionSettings,
    generator: torch.Generator,
) -> Tensor:
    """The model's own training loss on augmented pictures (arXiv:2208.01618, Eq. 2)."""
    distiller = prior.distiller
    with torch.no_grad():
        views = augmented(reference.rgba.to(prior.device), settings, generator)
        background = torch.rand(settings.batch, 3, 1, 1, generator=generator).to(prior.device)
        latents = distiller.space.encode(resized(composited(views, background), prior.picture_size))
        n_train = len(distiller.schedule.alphas_cumprod)
        timesteps = torch.randint(0, n_train, (settings.batch,), generator=generator).to(prior.device)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        noisy = sds.add_noise(latents, noise, distiller.schedule.alphas_cumprod[timesteps])
    # The token's row is put in by a hook, so that the gradient reaches it and nothing else.
    hook = table.register_forward_hook(
        lambda module, inputs, output: torch.where((inputs[0] == token)[..., None], row.to(output), output)
    )
    try:
        tokens = encoder(prompt)[0].to(prior.dtype).expand(settings.batch, -1, -1)
    finally:
        hook.remove()
    return F.mse_loss(distiller.ask(noisy, timesteps, tokens)[0], noise)


def augmented(
    rgba: Float[Tensor, "4 size size"], settings: InversionSettings, generator: torch.Generator
) -> Float[Tensor, "n 4 size size"]:
    """The picture turned, scaled and moved a little; what comes in from outside of it is empty."""
    n = settings.batch
    unit = torch.rand(n, 4, generator=generator).to(rgba) * 2 - 1
    turn = unit[:, 0] * math.radians(settings.max_turn_deg)
    scale = torch.exp(unit[:, 1] * math.log(settings.min_scale))
    rotation = (
        torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], -1).reshape(n, 2, 2) * scale[:, None, None]
    )
    grid = F.affine_grid(torch.cat([rotation, 0.15 * unit[:, 2:, None]], 2), [n, *rgba.shape], align_corners=False)
    return F.grid_sample(rgba.expand(n, -1, -1, -1), grid, align_corners=False)
