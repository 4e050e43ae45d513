"""Tiny diffusion models, random but complete, written to disk in the real formats of diffusers and transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from conrad_engine.benchmark.checkpoints import write_tokenizer

WIDTH = 32
N_TOKENS = 40
DOWN = ("CrossAttnDownBlock2D", "DownBlock2D")
UP = ("UpBlock2D", "CrossAttnUpBlock2D")


def _save(component, folder: Path) -> None:
    """The full-precision file and the fp16 variant beside it, as published repositories have them."""
    component.save_pretrained(folder, safe_serialization=True)
    for file in list(folder.glob("*.safetensors")):
        half = {key: value.half() if value.is_floating_point() else value for key, value in load_file(file).items()}
        save_file(half, file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")), {"format": "pt"})


def _unet(seed: int, **changes):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    shape = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (WIDTH, WIDTH),
        "layers_per_block": 1,
        "down_block_types": DOWN,
        "up_block_types": UP,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**(shape | changes))


def _vae(**changes):
    from diffusers import AutoencoderKL

    torch.manual_seed(10)
    shape = {
        "block_out_channels": (16, 16, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "sample_size": 64,
        "scaling_factor": 0.18215,
    }
    return AutoencoderKL(**(shape | changes))


def _text_config():
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=600,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=N_TOKENS,
        projection_dim=WIDTH,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )


def _vision():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(20)
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=WIDTH,
    )
    return CLIPVisionModelWithProjection(config)


PUBLISHED_NAMES = {
    "text_encoder": lambda key: key if key.startswith("text_model.") else f"text_model.{key}",
    "vae": lambda key: (
        key.replace(".to_q.", ".query.")
        .replace(".to_k.", ".key.")
        .replace(".to_v.", ".value.")
        .replace(".to_out.0.", ".proj_attn.")
    ),
}
"""Stable Diffusion's repositories were written by older libraries, under these names."""


def _to_published_names(folder: Path) -> None:
    for component, rename in PUBLISHED_NAMES.items():
        for file in (folder / component).glob("*.safetensors"):
            state = {rename(key): value for key, value in load_file(file).items()}
            if component == "text_encoder":
                state["text_model.embeddings.position_ids"] = torch.arange(N_TOKENS)[None]
            save_file(state, file, {"format": "pt"})


def _write_index(folder: Path, is_xl: bool) -> None:
    index = {
        "_class_name": "StableDiffusionXLPipeline" if is_xl else "StableDiffusionPipeline",
        "_diffusers_version": "0.30.0",
        "scheduler": ["diffusers", "EulerDiscreteScheduler" if is_xl else "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if is_xl:
        index |= {
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "force_zeros_for_empty_prompt": True,
        }
    else:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def write_stable_diffusion(folder: Path, kind: str = "sd1") -> Path:
    """A text-to-image model: `sd1` (epsilon), `sd2` (v-prediction, linear projections) or `xl` (two text encoders)."""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(30)
    _save(CLIPTextModel(_text_config()), folder / "text_encoder")
    write_tokenizer(folder / "tokenizer", N_TOKENS)
    changes = {}
    if kind == "sd2":
        changes = {"use_linear_projection": True, "attention_head_dim": (4, 8)}
    if kind == "xl":
        torch.manual_seed(31)
        _save(CLIPTextModelWithProjection(_text_config()), folder / "text_encoder_2")
        write_tokenizer(folder / "tokenizer_2", N_TOKENS)
        changes = {
            "cross_attention_dim": 2 * WIDTH,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": WIDTH + 6 * 8,
        }
    _save(_unet(40, **changes), folder / "unet")
    _save(_vae(force_upcast=kind == "xl", scaling_factor=0.13025 if kind == "xl" else 0.18215), folder / "vae")
    _to_published_names(folder)
    options = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    if kind == "xl":
        EulerDiscreteScheduler(**options).save_pretrained(folder / "scheduler")
    else:
        prediction = "v_prediction" if kind == "sd2" else "epsilon"
        DDIMScheduler(**options, prediction_type=prediction, clip_sample=False).save_pretrained(folder / "scheduler")
    _write_index(folder, kind == "xl")
    (folder / "README.md").write_text("---\nlicense: creativeml-openrail-m\ntags: []\n---\n# Tiny\n")
    return folder


def write_zero123(folder: Path, projection: str = "cc_projection") -> Path:
    """A Zero123 in either of the two published conversions to diffusers."""
    from diffusers import DDIMScheduler

    _save(_unet(50, in_channels=8), folder / "unet")
    _save(_vae(), folder / "vae")
    _save(_vision(), folder / "image_encoder")
    options = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    DDIMScheduler(**options, clip_sample=False).save_pretrained(folder / "scheduler")
    layer = {"cc_projection": "projection", "clip_camera_projection": "proj"}[projection]
    generator = torch.Generator().manual_seed(60)
    weight = torch.randn(WIDTH, WIDTH + 4, generator=generator) / WIDTH**0.5
    (folder / projection).mkdir()
    # As published: this settings file does not hold the sizes of the layer.
    (folder / projection / "config.json").write_text(json.dumps({"_class_name": "CCProjection"}))
    state = {f"{layer}.weight": weight, f"{layer}.bias": torch.zeros(WIDTH)}
    save_file(state, folder / projection / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return folder


def _plain_image_projection(random) -> dict[str, torch.Tensor]:
    return {
        "proj.weight": random(4 * WIDTH, WIDTH),
        "proj.bias": torch.zeros(4 * WIDTH),
        "norm.weight": torch.ones(WIDTH),
        "norm.bias": torch.zeros(WIDTH),
    }


def _plus_image_projection(random) -> dict[str, torch.Tensor]:
    """Four layers of a resampler with one head of 64, which reads all tokens of the image encoder."""
    inner = 64
    state = {"latents": random(1, 16, inner)}
    for name, shape in (("proj_in", (inner, WIDTH)), ("proj_out", (WIDTH, inner))):
        state |= {f"{name}.weight": random(*shape), f"{name}.bias": torch.zeros(shape[0])}
    norms = {"norm_out": WIDTH}
    for i in range(4):
        norms |= {f"layers.{i}.0.norm1": inner, f"layers.{i}.0.norm2": inner, f"layers.{i}.1.0": inner}
        shapes = {"0.to_q": (inner, inner), "0.to_kv": (2 * inner, inner), "0.to_out": (inner, inner)}
        shapes |= {"1.1": (4 * inner, inner), "1.3": (inner, 4 * inner)}
        state |= {f"layers.{i}.{name}.weight": random(*shape) for name, shape in shapes.items()}
    for name, width in norms.items():
        state |= {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}
    return state


def write_ip_adapter(folder: Path, unet, is_plus: bool = False) -> Path:
    """An IP-Adapter for the tiny network, with its image encoder, in the layout of `h94/IP-Adapter`."""
    generator = torch.Generator().manual_seed(70)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    _save(_vision(), folder / "models" / "image_encoder")
    projection = _plus_image_projection(random) if is_plus else _plain_image_projection(random)
    state = {f"image_proj.{key}": value for key, value in projection.items()}
    # Published files number the cross-attentions 1, 3, 5, ... in the order of the network's attention processors.
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for i, _ in enumerate(names):
        for part in ("to_k_ip", "to_v_ip"):
            state[f"ip_adapter.{2 * i + 1}.{part}.weight"] = random(WIDTH, WIDTH)
    save_file(state, folder / "models" / "ip-adapter_sd15.safetensors", {"format": "pt"})
    return folder


def write_tiny_autoencoder(folder: Path) -> Path:
    from diffusers import AutoencoderTiny

    torch.manual_seed(80)
    widths = {"encoder_block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
    blocks = {"num_encoder_blocks": (1, 1, 1, 1), "num_decoder_blocks": (1, 1, 1, 1)}
    _save(AutoencoderTiny(**widths, **blocks), folder)
    return folder


def write_clip(folder: Path) -> Path:
    """A whole CLIP, text and pictures, as published: with the buffer that older libraries kept."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(90)
    config = CLIPConfig(
        text_config=_text_config().to_dict(), vision_config=_vision().config.to_dict(), projection_dim=WIDTH
    )
    CLIPModel(config).save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    return folder


def to_pickles(folder: Path, component: str) -> None:
    """Replace a component's safetensors by the older .bin file."""
    for file in (folder / component).glob("*.safetensors"):
        if "fp16" not in file.name:
            name = "pytorch_model.bin" if file.name == "model.safetensors" else file.name.replace("safetensors", "bin")
            torch.save(load_file(file), file.with_name(name))
        file.unlink()


def to_hub_cache(folder: Path, cache: Path, model: str) -> Path:
    """Put a model into the hub's cache layout: blobs, a snapshot of links into them, and the ref that names it."""
    root, commit = cache / f"models--{model.replace('/', '--')}", "0123456789abcdef0123456789abcdef01234567"
    for i, file in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        blob = root / "blobs" / f"{i:064x}"
        link = root / "snapshots" / commit / file.relative_to(folder)
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        link.symlink_to(blob)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    return root
