"""Whole models of the published sizes with random weights, in diffusers layout on disk: jobs load them as they do real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .networks import SD21, ZERO123, LatentModel, make_autoencoder, make_unet

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
TOKENS = {"bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
"""As `write_tokenizer` numbers them."""


def write_stable_diffusion(folder: Path, device: torch.device, is_small: bool) -> Path:
    """Stable Diffusion 2.1-base: UNet, autoencoder, text encoder (v-prediction is 2.1's; the base predicts noise)."""
    from diffusers import DDIMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel

    _write_networks(folder, SD21, device, is_small)
    sizes = {"hidden_size": SD21.n_text, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
    if is_small:
        sizes |= {"intermediate_size": 64, "num_hidden_layers": 1}
    with torch.device(device):
        text = CLIPTextModel(CLIPTextConfig(vocab_size=49408, max_position_embeddings=SD21.n_tokens, **sizes, **TOKENS))
    text.half().save_pretrained(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer", SD21.n_tokens)
    DDIMScheduler(**BETAS, clip_sample=False).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def write_zero123(folder: Path, device: torch.device, is_small: bool) -> Path:
    """Zero-1-to-3: UNet, autoencoder, image encoder (CLIP ViT-L/14), camera projection."""
    from diffusers import DDIMScheduler
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    _write_networks(folder, ZERO123, device, is_small)
    sizes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    if is_small:
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = CLIPVisionConfig(
        **sizes, num_attention_heads=16, image_size=224, patch_size=14, projection_dim=ZERO123.n_text
    )
    with torch.device(device):
        encoder = CLIPVisionModelWithProjection(config)
    encoder.half().save_pretrained(folder / "image_encoder")
    DDIMScheduler(**BETAS, clip_sample=False).save_pretrained(folder / "scheduler")
    projection = folder / "cc_projection"
    projection.mkdir()
    (projection / "config.json").write_text(json.dumps({"_class_name": "CCProjection"}), encoding="utf-8")
    n = ZERO123.n_text
    weight = torch.cat([torch.eye(n), 0.02 * torch.randn(n, 4)], 1)
    state = {"projection.weight": weight.half(), "projection.bias": torch.zeros(n).half()}
    save_file(state, projection / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return folder


def _write_networks(folder: Path, model: LatentModel, device: torch.device, is_small: bool) -> None:
    make_unet(model, device, torch.float16, is_small).save_pretrained(folder / "unet")
    make_autoencoder(device, torch.float16, is_small).save_pretrained(folder / "vae")


def write_tokenizer(folder: Path, n_tokens: int) -> None:
    """A byte-level CLIP vocabulary without merges: every byte is a token, 512 of them, and the two ends."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    letters = [chr(b) for b in visible] + [chr(256 + i) for i in range(len(hidden))]
    words = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": n_tokens,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
