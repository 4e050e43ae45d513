"""The systems before the optimisation, on tiny models in the real formats: text to picture, edits, captions, depth."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from conrad_engine import seeding
from conrad_engine.config import PipelineConfig, SeedingConfig, WeightsConfig, from_json, to_json, with_overrides
from conrad_engine.errors import GuidanceError, InputError
from conrad_engine.guidance import edict
from conrad_engine.preprocess.captioning import caption

from . import tiny_checkpoints as tiny

pytest.importorskip("diffusers")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_stable_diffusion(tmp_path_factory.mktemp("models") / "sd1")


def picture(height: int = 60, width: int = 80, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def wild_prediction(latents: torch.Tensor, timestep: int) -> torch.Tensor:
    """No denoiser at all: strongly non-linear, and different at every timestep."""
    return torch.sin(3 * latents.roll(1, -1) + timestep) + 0.2 * latents.mean()


ALPHAS = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)


@pytest.mark.parametrize("mixing", [0.93, 1.0])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_edict_is_exact_whatever_the_network(mixing, strength):
    clean = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    walk = (wild_prediction, ALPHAS, edict.timesteps_of(20, strength, 1000), mixing)
    noisy = edict.invert((clean, clean), *walk)
    assert (noisy[0] - clean).abs().max() > 0.1
    x, y = edict.denoise(noisy, *walk)
    torch.testing.assert_close(x, clean, atol=1e-9, rtol=0)
    torch.testing.assert_close(y, clean, atol=1e-9, rtol=0)


def test_plain_ddim_inversion_is_not_exact():
    """What EDICT is for: the same walk with one copy does not come back."""
    clean = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    timesteps = edict.timesteps_of(20, 1.0, 1000)
    x = clean
    for timestep, a, b, _ in edict._moves(ALPHAS, timesteps):
        x = (x - b * wild_prediction(x, timestep)) / a
    for timestep, a, b, _ in reversed(edict._moves(ALPHAS, timesteps)):
        x = a * x + b * wild_prediction(x, timestep)
    assert (x - clean).abs().max() > 0.01


def test_edict_denoises_to_what_the_denoiser_knows():
    """With the exact denoiser of one picture both copies end near it; without mixing they drift apart."""
    wanted = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def exact(latents, timestep):
        a = ALPHAS[timestep].double()
        return (latents - a.sqrt() * wanted) / (1 - a).sqrt()

    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def error(n_steps, mixing):
        x, y = edict.denoise((noise, noise), exact, ALPHAS, edict.timesteps_of(n_steps, 1.0, 1000), mixing)
        return float(torch.maximum((x - wanted).abs().max(), (y - wanted).abs().max()))

    assert error(50, 0.93) < 0.4
    assert error(200, 0.93) < 0.6 * error(50, 0.93)
    assert error(50, 1.0) > 2


def test_edict_timesteps_rise_to_the_strength():
    steps = edict.timesteps_of(50, 0.8, 1000)
    assert len(steps) == 50 and steps[-1] == round(0.8 * 999) and (steps.diff() > 0).all() and steps[0] > 0


def test_an_edict_edit_with_the_same_words_returns_the_autoencoders_picture(folder):
    config = SeedingConfig(edit_model=str(folder), edit_steps=6)
    editor = seeding.EdictEditor(config, CPU)
    rgb = picture(64, 64)
    kept = editor.edit(rgb, "a chair", "a chair")
    with torch.no_grad():
        pixels = torch.from_numpy(rgb).permute(2, 0, 1)[None] / 255
        expected = editor.space.decode(editor.space.encode(pixels))[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(kept / 255, expected, atol=0.006)


def test_edits_change_the_picture_and_keep_its_aspect(folder):
    config = SeedingConfig(edit_model=str(folder), edit_steps=4)
    same = seeding.edit_picture(picture(), "a chair", "a chair", config, CPU, 0)
    other = seeding.edit_picture(picture(), "a green horse", "a chair", config, CPU, 0)
    assert same.shape == other.shape and same.dtype == np.uint8
    assert abs(same.shape[1] / same.shape[0] - 80 / 60) < 0.1
    assert (same != other).any()


def test_edits_need_words(folder):
    config = SeedingConfig(edit_model=str(folder))
    with pytest.raises(InputError, match="an edit needs words"):
        seeding.edit_picture(picture(), " ", "a chair", config, CPU, 0)
    with pytest.raises(InputError, match="description of the picture"):
        seeding.edit_picture(picture(), "a horse", "", config, CPU, 0)


def test_an_instruction_model_edits_the_picture(tmp_path):
    folder = tiny.write_stable_diffusion(tmp_path / "instruct")
    tiny._save(tiny._unet(3, in_channels=8), folder / "unet")
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionInstructPix2PixPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    config = SeedingConfig(edit_method="instruct", instruct_model=str(folder), edit_steps=2)
    first, again, other = (
        seeding.edit_picture(picture(), words, "", config, CPU, seed)
        for words, seed in (("make it red", 1), ("make it red", 1), ("make it red", 2))
    )
    assert first.dtype == np.uint8 and first.shape[2] == 3
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize("kind", ["sd1", "xl"])
def test_a_picture_from_text(tmp_path, kind):
    folder = tiny.write_stable_diffusion(tmp_path / kind, kind)
    config = SeedingConfig(text_to_image=str(folder), text_steps=2, text_suffix="", weights=WeightsConfig())
    made = seeding.picture_from_text("a chair", config, CPU, 5)
    assert made.shape == (64, 64, 3) and made.dtype == np.uint8 and made.std() > 1
    assert np.array_equal(made, seeding.picture_from_text("a chair", config, CPU, 5))
    assert not np.array_equal(made, seeding.picture_from_text("a chair", config, CPU, 6))
    path = seeding.write_picture(made, tmp_path / "made.png")
    from PIL import Image

    assert np.array_equal(np.asarray(Image.open(path)), made)


def test_text_models_obey_the_rules_of_weights(tmp_path):
    folder = tiny.write_stable_diffusion(tmp_path / "sd1")
    tiny.to_pickles(folder, "unet")
    config = SeedingConfig(text_to_image=str(folder), text_steps=1)
    with pytest.raises(GuidanceError, match="allow_pickle"):
        seeding.picture_from_text("a chair", config, CPU, 0)
    with pytest.raises(InputError, match="needs a prompt"):
        seeding.picture_from_text("", config, CPU, 0)


def test_a_half_precision_repository_is_enough_for_a_picture(tmp_path):
    folder = tiny.write_stable_diffusion(tmp_path / "sd1")
    for file in folder.glob("*/*.safetensors"):
        if "fp16" not in file.name:
            file.unlink()
    config = SeedingConfig(text_to_image=str(folder), text_steps=1)
    assert seeding.picture_from_text("a chair", config, CPU, 0).shape == (64, 64, 3)


def write_blip(folder):
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "chair", "photo", "of", "the", "[DEC]", "[ENC]"]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    text = {"vocab_size": 13, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    text |= {
        "intermediate_size": 32,
        "encoder_hidden_size": 32,
        "bos_token_id": 11,
        "sep_token_id": 3,
        "pad_token_id": 0,
    }
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    vision |= {"image_size": 32, "patch_size": 8}
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=32)
    model = BlipForConditionalGeneration(config)
    # Untrained, it would repeat any token: let it like one word.
    model.text_decoder.cls.predictions.decoder.bias.data[7] = 20.0
    model.save_pretrained(folder)
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


def test_blip_captions_a_picture(tmp_path):
    folder = write_blip(tmp_path / "blip")
    words = caption(picture(), SeedingConfig(caption_model=str(folder)), CPU)
    assert "chair" in words and len(words.split()) <= 30


def test_another_model_is_no_captioner(tmp_path):
    folder = write_depth(tmp_path / "depth")
    with pytest.raises(GuidanceError, match="cannot be read as an image-to-text model"):
        caption(picture(), SeedingConfig(caption_model=str(folder)), CPU)


def write_depth(folder, kind: str = "relative"):
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessor

    torch.manual_seed(0)
    backbone = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        apply_layernorm=True,
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
        patch_size=14,
        depth_estimation_type=kind,
        max_depth=10 if kind == "metric" else 1,
    )
    DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessor(size={"height": 56, "width": 56}, do_rescale=True).save_pretrained(folder)
    return folder


def test_a_depth_model_gives_relative_distances(tmp_path):
    config = SeedingConfig(depth_model=str(write_depth(tmp_path / "depth")))
    depth = seeding.estimate_depth(picture(45, 70), config, CPU)
    assert depth.shape == (45, 70) and depth.min() == 0 and depth.max() == 1


def test_disparity_is_turned_round_and_distance_is_not(tmp_path, monkeypatch):
    """The same network read as relative (disparity: near is large) and as metric (distance: far is large)."""
    config = SeedingConfig(depth_model=str(write_depth(tmp_path / "depth")))
    as_disparity = seeding.estimate_depth(picture(), config, CPU)
    monkeypatch.setattr(seeding, "answers_distance", lambda model_config: True)
    np.testing.assert_allclose(as_disparity, 1 - seeding.estimate_depth(picture(), config, CPU), atol=1e-6)


def test_which_models_answer_distance():
    from transformers import DepthAnythingConfig, DPTConfig, ZoeDepthConfig

    assert not seeding.answers_distance(DepthAnythingConfig())
    assert not seeding.answers_distance(DPTConfig())
    assert seeding.answers_distance(DepthAnythingConfig(depth_estimation_type="metric"))
    assert seeding.answers_distance(ZoeDepthConfig())


def test_seeding_settings_survive_json_and_are_checked():
    values = {"seeding.edit_strength": "0.5", "seeding.weights.allow_pickle": "true"}
    config = with_overrides(PipelineConfig(), values)
    assert config.seeding.edit_strength == 0.5 and config.seeding.weights.allow_pickle
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    with pytest.raises(InputError, match="unknown edit method"):
        with_overrides(PipelineConfig(), {"seeding.edit_method": "magic"})


def test_the_whole_chain_from_words_to_depth(folder, tmp_path):
    """No picture, no description: text makes the picture, then it is edited, and its depth is guessed."""
    settings = SeedingConfig(
        text_to_image=str(folder),
        edit_model=str(folder),
        depth_model=str(write_depth(tmp_path / "depth")),
        text_steps=1,
        edit_steps=2,
    )
    config = replace(PipelineConfig(), seeding=settings, seed=3)
    request = seeding.SeedRequest(None, "a chair", edit="a red chair", wants_depth=True)
    seed = seeding.make_seed(request, config, CPU, tmp_path)
    assert seed.picture == tmp_path / "edited.png" and (tmp_path / "from_text.png").is_file()
    assert seed.prompt == "a red chair"
    assert np.load(seed.depth).shape == (64, 64)
    from conrad_engine.preprocess.depth import read_depth

    assert read_depth(seed.depth, 64, 64, 10**6).shape == (64, 64)


def test_a_picture_without_words_is_described_where_words_are_needed(folder, tmp_path):
    settings = SeedingConfig(edit_model=str(folder), edit_steps=1, caption_model=str(write_blip(tmp_path / "blip")))
    config = replace(PipelineConfig(), seeding=settings)
    source = seeding.write_picture(picture(), tmp_path / "picture.png")
    described = seeding.make_seed(seeding.SeedRequest(source, wants_caption=True), config, CPU, tmp_path)
    assert "chair" in described.prompt and described.picture == source and described.depth is None
    kept = seeding.make_seed(seeding.SeedRequest(source, "a lamp", wants_caption=True), config, CPU, tmp_path)
    assert kept.prompt == "a lamp", "the caller's own words win"
    edited = seeding.make_seed(seeding.SeedRequest(source, edit="a lamp"), config, CPU, tmp_path)
    assert edited.picture == tmp_path / "edited.png" and edited.prompt == "a lamp"


def test_nothing_asked_for_loads_nothing(tmp_path):
    untouched = seeding.make_seed(seeding.SeedRequest(b"not even a picture", "x"), PipelineConfig(), CPU, tmp_path)
    assert untouched == seeding.Seed(b"not even a picture", "x", None)
