"""Single-image textual inversion: it learns, changes nothing else, and its file is read by the prior."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from conrad_engine.cameras import orbit_camera
from conrad_engine.config import EmbeddedPriorConfig, MixtureConfig, StableDiffusionConfig
from conrad_engine.errors import GuidanceError
from conrad_engine.guidance import make_guidance, textual_inversion
from conrad_engine.guidance.interfaces import ReferencePicture
from conrad_engine.guidance.textual_inversion import (
    FILE_NAME,
    TEMPLATE,
    TOKEN,
    InversionSettings,
    augmented,
    invert_picture,
    with_learned_word,
)

from . import tiny_checkpoints as tiny

pytest.importorskip("diffusers")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose untrained network listens to its prompt more than chance would have it."""
    from diffusers import UNet2DConditionModel

    folder = tiny.write_stable_diffusion(tmp_path_factory.mktemp("models") / "sd1")
    network = UNet2DConditionModel.from_pretrained(folder / "unet")
    for name, weight in network.named_parameters():
        if "attn2.to_v" in name or "attn2.to_out" in name:
            weight.data *= 6
    network.save_pretrained(folder / "unet")
    return folder


def reference(prompt: str = "") -> ReferencePicture:
    rgba = torch.zeros(4, 64, 64)
    rgba[:, 16:48, 20:44] = torch.tensor([0.8, 0.3, 0.1, 1.0])[:, None, None]
    return ReferencePicture(rgba, orbit_camera(0.0, 0.2, 2.0, 0.7, 64), prompt=prompt)


def training_loss(folder, embedding: torch.Tensor) -> float:
    """The model's loss on fixed augmentations and noises, with this embedding for the token."""
    from conrad_engine.guidance import textual_inversion as ti

    prior = make_guidance(StableDiffusionConfig(model=str(folder)), CPU)
    table, token = ti._add_token(prior.pipeline, "object")
    text = TEMPLATE.format(TOKEN)
    ids = prior.pipeline.tokenizer(text, padding="max_length", max_length=tiny.N_TOKENS).input_ids
    settings, encoder = InversionSettings(batch=32), prior.pipeline.text_encoder
    given = (table, embedding, token, torch.tensor([ids]), reference(), settings)
    with torch.no_grad():
        return float(ti._loss(prior, encoder, *given, torch.Generator().manual_seed(77)))


def test_the_word_learns_the_picture_and_the_file_is_read(folder, tmp_path):
    config = StableDiffusionConfig(model=str(folder))
    n_reports = []
    for n_steps, name in ((0, "initial"), (30, "learned")):
        settings = InversionSettings(n_steps=n_steps, batch=4, rate=0.1)
        invert_picture(
            reference(),
            config,
            CPU,
            tmp_path / f"{name}.safetensors",
            seed=0,
            settings=settings,
            report=lambda step, loss: n_reports.append(step),
        )
    initial, learned = (load_file(tmp_path / f"{name}.safetensors")[TOKEN] for name in ("initial", "learned"))
    assert n_reports == list(range(30)) and learned.shape == (1, tiny.WIDTH)
    assert training_loss(folder, learned[0]) < training_loss(folder, initial[0]) - 0.01
    guidance = make_guidance(
        StableDiffusionConfig(model=str(folder), embedding=str(tmp_path / "learned.safetensors")), CPU
    )
    assert len(guidance.pipeline.tokenizer.tokenize(TOKEN)) == 1
    guidance.set_reference(reference(TEMPLATE.format(TOKEN)))
    result = guidance.gradient(torch.rand(1, 4, 32, 32), orbit_camera(torch.zeros(1), 0.2, 2.0, 0.7, 32), 0.5)
    assert result.gradient.isfinite().all()


def test_the_same_seed_gives_the_same_word(folder, tmp_path):
    words = [
        load_file(
            invert_picture(
                reference(),
                StableDiffusionConfig(model=str(folder)),
                CPU,
                tmp_path / f"{i}.safetensors",
                seed=seed,
                settings=InversionSettings(n_steps=2),
            )
        )[TOKEN]
        for i, seed in enumerate((3, 3, 4))
    ]
    assert torch.equal(words[0], words[1]) and not torch.equal(words[0], words[2])


def test_xl_is_refused(tmp_path):
    folder = tiny.write_stable_diffusion(tmp_path / "xl", "xl")
    with pytest.raises(GuidanceError, match="not with XL"):
        invert_picture(reference(), StableDiffusionConfig(model=str(folder)), CPU, tmp_path / "x.safetensors", 0)


def test_augmentations_keep_the_object_and_its_colors():
    views = augmented(reference().rgba, InversionSettings(batch=64), torch.Generator().manual_seed(0))
    assert views.shape == (64, 4, 64, 64)
    areas = views[:, 3].mean((1, 2)) / reference().rgba[3].mean()
    assert float(areas.min()) > 0.7**2 * 0.7 and float(areas.max()) < 1 / 0.7**2 * 1.1
    assert areas.std() > 0.1
    inside = views[:, :, 32, 32][views[:, 3, 32, 32] > 0.99]
    torch.testing.assert_close(
        inside[:, :3], torch.tensor([[0.8, 0.3, 0.1]]).expand(len(inside), -1), atol=1e-4, rtol=0
    )


def test_a_word_is_learned_once_a_job_and_named_in_the_prompt(monkeypatch, tmp_path):
    learned = []

    def invert(reference, config, device, path, seed, settings, report):
        learned.append((settings.n_steps, seed))
        path.write_text("word")
        return path

    monkeypatch.setattr(textual_inversion, "invert_picture", invert)
    text, file = StableDiffusionConfig(word_steps=7), tmp_path / FILE_NAME
    with_word, picture = with_learned_word(text, reference("ignored"), CPU, tmp_path, 3, is_resumed=False)
    assert learned == [(7, 3)] and [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert with_word.embedding == str(file) and picture.prompt == TEMPLATE.format(TOKEN)
    mixture, picture = with_learned_word(
        MixtureConfig(stable_diffusion=text), reference(f"a red {TOKEN}"), CPU, tmp_path, 3, is_resumed=True
    )
    assert len(learned) == 1, "a resumed job has its word"
    assert mixture.stable_diffusion.embedding == str(file) and picture.prompt == f"a red {TOKEN}"
    with_learned_word(text, reference(), CPU, tmp_path, 4, is_resumed=False)
    assert len(learned) == 2, "a new job in an old folder learns its own"
    for untouched in (
        StableDiffusionConfig(),
        StableDiffusionConfig(word_steps=7, embedding="x"),
        EmbeddedPriorConfig(),
    ):
        assert with_learned_word(untouched, picture, CPU, tmp_path, 4, is_resumed=False) == (untouched, picture)
    assert len(learned) == 2
