"""Stable Diffusion 1.x, 2.x and XL as a prior, on tiny models in the real formats, against an explicit twin."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

from conrad_engine.cameras import orbit_camera
from conrad_engine.config import StableDiffusionConfig, WeightsConfig
from conrad_engine.errors import GuidanceError, InputError
from conrad_engine.guidance import make_guidance, sds
from conrad_engine.guidance.distill import UNIT
from conrad_engine.guidance.interfaces import ReferencePicture
from conrad_engine.guidance.latents import make_fast
from conrad_engine.guidance.prompts import view_shares

from . import tiny_checkpoints as tiny

pytest.importorskip("diffusers")
CPU = torch.device("cpu")
PROMPT = "a red shoe"
VIEWS = orbit_camera(torch.tensor([0.2, 1.9, -3.0]), torch.tensor([0.0, 0.3, 1.3]), 2.1, 0.7, 32)


@pytest.fixture(scope="module", params=["sd1", "sd2", "xl"])
def any_folder(request, tmp_path_factory):
    return tiny.write_stable_diffusion(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_stable_diffusion(tmp_path_factory.mktemp("models") / "sd1")


def reference(prompt: str = PROMPT, seed: int = 1) -> ReferencePicture:
    rgba = torch.rand(4, 80, 80, generator=torch.Generator().manual_seed(seed))
    return ReferencePicture(rgba * rgba[3:].clamp(min=0.5), orbit_camera(0.0, 0.2, 2.0, 0.7, 80), prompt=prompt)


def views_rgba(seed: int = 2) -> torch.Tensor:
    rgba = torch.rand(3, 4, 32, 32, generator=torch.Generator().manual_seed(seed))
    return torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)


def gradient_of(config: StableDiffusionConfig, picture: ReferencePicture | None = None, progress: float = 0.4):
    guidance = make_guidance(config, CPU)
    guidance.set_reference(picture or reference())
    result = guidance.gradient(views_rgba(), VIEWS, progress, torch.Generator().manual_seed(3))
    return guidance, result


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=float(b.abs().max()) * 2e-4, rtol=2e-3)


def explicit_gradient(folder, config, draws):
    """One view and one branch at a time through diffusers' own pipeline, as a loss that autograd differentiates."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    is_xl = "XL" in type(pipe).__name__
    encode = {"device": CPU, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    encoded = pipe.encode_prompt(PROMPT, negative_prompt=config.negative_prompt or None, **encode)
    time_ids = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])
    pooled = encoded[2:] if is_xl else (None, None)
    alphas = pipe.scheduler.alphas_cumprod
    leaf = views_rgba().requires_grad_()
    loss = 0
    for i in range(3):
        a, noise = alphas[draws.timesteps[i]], draws.noise[i : i + 1]
        rgb = leaf[i : i + 1, :3] + (1 - leaf[i : i + 1, 3:]) * draws.background[i]
        latents = pipe.vae.encode(F.interpolate(rgb, (64, 64), mode="bilinear") * 2 - 1).latent_dist.mean
        latents = latents * pipe.vae.config.scaling_factor
        with torch.no_grad():
            noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
            noise_preds = []
            for tokens, pool in zip(encoded[:2], pooled):
                extra = {"text_embeds": pool, "time_ids": time_ids} if is_xl else None
                answer = pipe.unet(noisy, draws.timesteps[i], tokens, added_cond_kwargs=extra).sample
                is_v = pipe.scheduler.config.prediction_type == "v_prediction"
                noise_preds.append(a.sqrt() * answer + (1 - a).sqrt() * noisy if is_v else answer)
            own, plain = noise_preds
            gradient = (1 - a) * (plain + config.scale * (own - plain) - noise)
        loss = loss + 0.5 * (latents - (latents - gradient).detach()).square().sum() / 3
    loss.backward()
    return leaf.grad / UNIT


@pytest.mark.parametrize("negative", ["", "blurry"])
def test_the_gradient_is_that_of_the_explicit_loss(any_folder, negative):
    config = StableDiffusionConfig(
        model=str(any_folder), scale=5.0, perp_neg=False, view_prompts=False, negative_prompt=negative
    )
    guidance, result = gradient_of(config)
    assert guidance.picture_size == 64
    draws = guidance.draw(3, 0.4, torch.Generator().manual_seed(3))
    close(result.gradient, explicit_gradient(any_folder, config, draws))


@pytest.mark.parametrize("objective", ["sds", "ism"])
def test_presets_and_batches_give_the_same_gradient(any_folder, objective):
    results = [
        gradient_of(
            StableDiffusionConfig(model=str(any_folder), objective=objective, weights=WeightsConfig(memory=preset))
        )[1]
        for preset in ("24", "8", "6")
    ]
    for other in results[1:]:
        close(other.gradient, results[0].gradient)
        assert float(other.loss) == pytest.approx(float(results[0].loss), rel=1e-3)


def test_half_precision_gradients_are_finite_and_close(any_folder):
    results = [
        gradient_of(
            StableDiffusionConfig(model=str(any_folder), scale=5.0, weights=WeightsConfig(precision=precision))
        )[1]
        for precision in ("float32", "bfloat16")
    ]
    assert results[1].gradient.isfinite().all()
    similarity = F.cosine_similarity(results[0].gradient.flatten(), results[1].gradient.flatten(), dim=0)
    assert float(similarity) > 0.97


def test_xl_keeps_its_autoencoder_in_float32(tmp_path):
    folder = tiny.write_stable_diffusion(tmp_path / "xl", "xl")
    weights = WeightsConfig(precision="float16", memory="8")
    guidance = make_guidance(StableDiffusionConfig(model=str(folder), weights=weights), CPU)
    assert guidance.distiller.space.vae.dtype == torch.float32
    assert guidance.distiller.network.dtype == torch.float16
    assert guidance.pipeline.text_encoder.dtype == torch.float32, "it stays on the CPU with this preset"


def test_other_autoencoders_run_in_float16_whatever_their_settings_repeat(tmp_path):
    folder = tiny.write_stable_diffusion(tmp_path / "sd1")
    settings = folder / "vae" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"force_upcast": True}))
    weights = WeightsConfig(precision="float16", memory="8")
    guidance = make_guidance(StableDiffusionConfig(model=str(folder), weights=weights), CPU)
    assert guidance.distiller.space.vae.dtype == torch.float16


def test_scale_one_is_the_conditional_prediction(folder):
    guidance, _ = gradient_of(StableDiffusionConfig(model=str(folder), scale=1.0, perp_neg=False))
    azimuth, elevation = torch.tensor([0.2, 1.9]), torch.zeros(2)
    noisy, timesteps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([400, 30])
    shares = torch.cat([torch.zeros(2, 1), view_shares(azimuth, elevation)], 1)
    own = guidance.text.mixed(shares, sees_picture=True)
    guided = guidance._denoiser(orbit_camera(azimuth, elevation, 2.0, 0.7, 32)).guided(noisy, timesteps, slice(0, 2))
    torch.testing.assert_close(guided, guidance._ask(noisy, timesteps, [own], slice(0, 2))[0], atol=1e-5, rtol=1e-4)


def test_prompts_change_with_the_view_and_only_then(folder):
    def of_views(config, *azimuths):
        guidance = make_guidance(config, CPU)
        guidance.set_reference(reference())
        rgba = views_rgba()[:1].repeat(len(azimuths), 1, 1, 1)
        denoiser = guidance._denoiser(orbit_camera(torch.tensor(azimuths), 0.0, 2.0, 0.7, 32))
        noisy = torch.ones(len(azimuths), 4, 8, 8)
        return denoiser.guided(noisy, torch.full((len(rgba),), 500), slice(0, len(rgba)))

    same = of_views(StableDiffusionConfig(model=str(folder), view_prompts=False, perp_neg=False), 0.0, 2.0)
    close(same[0], same[1])
    told_apart = of_views(StableDiffusionConfig(model=str(folder), perp_neg=False), 0.0, 2.0, -2.0)
    assert (told_apart[0] - told_apart[1]).abs().max() > 1e-3
    close(told_apart[1], told_apart[2])


def test_perp_neg_acts_on_the_side_but_not_above(folder):
    plain, pushed = (
        gradient_of(StableDiffusionConfig(model=str(folder), perp_neg=on))[1].gradient for on in (False, True)
    )
    assert (plain[1] - pushed[1]).abs().max() > 1e-3 * plain[1].abs().max(), "from the side"
    close(pushed[2], plain[2])  # Elevation 1.3 looks down from above.


def test_ism_is_its_formula(folder):
    config = StableDiffusionConfig(
        model=str(folder), objective="ism", ism_steps=1, ism_interval=0.1, perp_neg=False, schedule="deterministic"
    )
    guidance, result = gradient_of(config)
    denoiser = guidance._denoiser(VIEWS[:1])
    draws = guidance.draw(1, 0.4, torch.Generator().manual_seed(0))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    found, _ = guidance.distiller._latent_gradient(latents, draws, denoiser, slice(0, 1))

    alphas, one = guidance.distiller.schedule.alphas_cumprod, slice(0, 1)
    t = draws.timesteps
    s = t - 100
    a = {k: alphas[v].reshape(1, 1, 1, 1) for k, v in {"0": t * 0, "s": s, "t": t}.items()}

    def move(x, eps, here, there):
        return a[there].sqrt() * (x - (1 - a[here]).sqrt() * eps) / a[here].sqrt() + (1 - a[there]).sqrt() * eps

    start = a["0"].sqrt() * latents + (1 - a["0"]).sqrt() * draws.noise
    at_s = move(start, denoiser.unconditional(start, t * 0, one), "0", "s")
    eps_s = denoiser.unconditional(at_s, s, one)
    eps_t = denoiser.guided(move(at_s, eps_s, "s", "t"), t, one)
    torch.testing.assert_close(found, (1 - a["t"]) * (eps_t - eps_s), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("is_plus", [False, True])
def test_the_ip_adapter_shows_the_picture(folder, tmp_path, is_plus):
    guidance = make_guidance(StableDiffusionConfig(model=str(folder)), CPU)
    adapter = tiny.write_ip_adapter(tmp_path / "adapter", guidance.distiller.network, is_plus)
    config = StableDiffusionConfig(model=str(folder), ip_adapter=str(adapter))
    first, second = (gradient_of(config, reference(seed=seed))[1].gradient for seed in (1, 9))
    assert (first - second).abs().max() > 1e-3 * first.abs().max(), "another picture, another gradient"
    # Without influence the adapter changes nothing.
    off = StableDiffusionConfig(model=str(folder), ip_adapter=str(adapter), ip_adapter_scale=0.0)
    close(gradient_of(off)[1].gradient, gradient_of(StableDiffusionConfig(model=str(folder)))[1].gradient)
    # With the adapter, no prompt is needed; the presets agree too.
    split = StableDiffusionConfig(model=str(folder), ip_adapter=str(adapter), weights=WeightsConfig(memory="6"))
    close(gradient_of(split, reference(prompt=""))[1].gradient, gradient_of(config, reference(prompt=""))[1].gradient)


@pytest.mark.parametrize("is_plus", [False, True])
def test_without_the_picture_the_adapter_sees_what_its_library_says(folder, tmp_path, is_plus):
    """Both branches against diffusers' own preparation of the picture and of its absence."""
    network = make_guidance(StableDiffusionConfig(model=str(folder)), CPU).distiller.network
    adapter = tiny.write_ip_adapter(tmp_path / "adapter", network, is_plus)
    guidance, _ = gradient_of(StableDiffusionConfig(model=str(folder), ip_adapter=str(adapter), perp_neg=False))
    noisy, timesteps = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    text = guidance.text.mixed(torch.tensor([[0.0, 1, 0, 0, 0]]), sees_picture=True)
    plain = guidance.text.mixed(torch.tensor([[1.0, 0, 0, 0, 0]]), sees_picture=False)
    white = reference().rgba[:3] + 1 - reference().rgba[3:]
    from PIL import Image

    shown = Image.fromarray((white.clamp(0, 1).permute(1, 2, 0) * 255).round().byte().numpy())
    pipe = guidance.pipeline
    (embeds,) = pipe.prepare_ip_adapter_image_embeds([shown], None, CPU, 1, do_classifier_free_guidance=True)
    tokens = torch.cat([plain.tokens, text.tokens])
    with torch.no_grad():
        expected = pipe.unet(
            noisy.repeat(2, 1, 1, 1), 500, tokens, added_cond_kwargs={"image_embeds": [embeds]}, return_dict=False
        )[0]
        found = torch.cat(guidance._ask(noisy, timesteps, [plain, text], slice(0, 1)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert (expected[0] - expected[1]).abs().max() > 1e-3


def test_an_adapter_with_pickles_is_refused(folder, tmp_path):
    adapter = tiny.write_ip_adapter(
        tmp_path / "adapter", make_guidance(StableDiffusionConfig(model=str(folder)), CPU).distiller.network
    )
    file = adapter / "models" / "ip-adapter_sd15.safetensors"
    file.rename(file.with_suffix(".bin"))
    config = {"model": str(folder), "ip_adapter": str(adapter)}
    with pytest.raises(GuidanceError, match="lacks models/ip-adapter_sd15.safetensors"):
        make_guidance(StableDiffusionConfig(**config), CPU)
    with pytest.raises(GuidanceError, match="pickles"):
        make_guidance(StableDiffusionConfig(**config, ip_adapter_file="models/ip-adapter_sd15.bin"), CPU)


def test_textual_inversion_gives_a_token_its_meaning(folder, tmp_path):
    from safetensors.torch import save_file

    for i in (1, 2):
        vector = torch.randn(1, tiny.WIDTH, generator=torch.Generator().manual_seed(i))
        save_file({"<thing>": vector}, tmp_path / f"learned_{i}.safetensors")
    first, second = (
        gradient_of(
            StableDiffusionConfig(model=str(folder), embedding=str(tmp_path / f"learned_{i}.safetensors")),
            reference(prompt="a photo of <thing>"),
        )[1].gradient
        for i in (1, 2)
    )
    assert (first - second).abs().max() > 1e-3 * first.abs().max()
    torch.save({"<thing>": torch.zeros(1, tiny.WIDTH)}, tmp_path / "learned.bin")
    with pytest.raises(GuidanceError, match="pickles"):
        make_guidance(StableDiffusionConfig(model=str(folder), embedding=str(tmp_path / "learned.bin")), CPU)
    with pytest.raises(GuidanceError, match="does not exist"):
        make_guidance(StableDiffusionConfig(model=str(folder), embedding="nowhere.safetensors"), CPU)


def test_a_tiny_autoencoder_takes_the_models_place(folder, tmp_path):
    small = tiny.write_tiny_autoencoder(tmp_path / "tiny")
    config = StableDiffusionConfig(model=str(folder), weights=WeightsConfig(tiny_autoencoder=str(small)))
    guidance, result = gradient_of(config)
    assert type(guidance.distiller.space.vae).__name__ == "AutoencoderTiny"
    assert result.gradient.isfinite().all() and result.gradient.abs().max() > 0


def test_denoised_pictures_are_shown_on_request(folder):
    guidance, result = gradient_of(StableDiffusionConfig(model=str(folder)))
    assert result.denoised is None
    guidance.distiller.shows_denoised = True
    denoised = guidance.gradient(views_rgba(), VIEWS, 0.4).denoised
    assert denoised.shape == (3, 4, 32, 32)
    assert denoised.min() >= 0 and denoised.max() <= 1 and (denoised[:, 3] == 1).all()


def test_random_backgrounds_differ_by_view_and_white_is_white(folder):
    guidance, _ = gradient_of(StableDiffusionConfig(model=str(folder)))
    draws = guidance.distiller.draw(64, 0.4, torch.Generator().manual_seed(0), False)
    is_gray = (draws.background[:, :1] == draws.background).all(dim=(1))
    assert 0.25 < float(is_gray.float().mean()) < 0.75
    assert draws.background.std(0).min() > 0.2
    white = guidance.distiller.draw(2, 0.4, None, True)
    assert (white.background == 1).all()


def test_a_picture_size_of_ones_own(folder):
    guidance, result = gradient_of(StableDiffusionConfig(model=str(folder), picture_size=128))
    assert guidance.picture_size == 128 and result.gradient.shape == (3, 4, 32, 32)


def test_the_seed_decides_everything(folder):
    guidance, first = gradient_of(StableDiffusionConfig(model=str(folder)))
    again = guidance.gradient(views_rgba(), VIEWS, 0.4, torch.Generator().manual_seed(3)).gradient
    other = guidance.gradient(views_rgba(), VIEWS, 0.4, torch.Generator().manual_seed(4)).gradient
    assert torch.equal(first.gradient, again) and not torch.allclose(first.gradient, other)


def test_sds_on_the_real_stack_moves_a_picture_to_the_denoisers_mean(folder):
    """The network replaced by the exact denoiser of one picture: distillation through the autoencoder finds it."""
    guidance = make_guidance(StableDiffusionConfig(model=str(folder), perp_neg=False, background="white"), CPU)
    guidance.set_reference(reference())
    wanted = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(8))
    mean = guidance.distiller.space.encode(F.avg_pool2d(wanted, 33, 1, 16)).detach()
    alphas = guidance.distiller.schedule.alphas_cumprod

    class Exact(torch.nn.Module):
        dtype = torch.float32

        def forward(self, sample, timesteps, **options):
            a = alphas[timesteps].reshape(-1, 1, 1, 1)
            return ((sample - a.sqrt() * mean) / (1 - a).sqrt(),)

    guidance.distiller.network = Exact()
    picture = torch.cat([torch.full((1, 3, 64, 64), 0.5), torch.ones(1, 1, 64, 64)], 1)
    camera = VIEWS[:1]
    before = (guidance.distiller.space.encode(picture[:, :3]) - mean).norm()
    generator = torch.Generator().manual_seed(0)
    adam = torch.optim.Adam([picture.requires_grad_()], lr=0.02)
    for step in range(60):
        result = guidance.gradient(picture.detach(), camera, step / 60, generator)
        picture.grad = torch.cat([result.gradient[:, :3], torch.zeros(1, 1, 64, 64)], 1)
        adam.step()
    after = (guidance.distiller.space.encode(picture[:, :3]) - mean).norm()
    assert after < 0.3 * before


def test_there_must_be_something_to_condition_on(folder):
    guidance = make_guidance(StableDiffusionConfig(model=str(folder)), CPU)
    with pytest.raises(InputError, match="--prompt"):
        guidance.set_reference(reference(prompt=""))
    with pytest.raises(ValueError, match="set_reference"):
        guidance.gradient(views_rgba(), VIEWS, 0.0)


def test_an_inpainting_network_is_refused(tmp_path):
    from diffusers import UNet2DConditionModel

    folder = tiny.write_stable_diffusion(tmp_path / "sd1")
    tiny._save(tiny._unet(1, in_channels=9), folder / "unet")
    assert UNet2DConditionModel.load_config(folder / "unet")["in_channels"] == 9
    with pytest.raises(GuidanceError, match="takes 9 channels"):
        make_guidance(StableDiffusionConfig(model=str(folder)), CPU)


def test_sds_and_math_agree_on_the_weighting(folder):
    """`strength` and w(t) scale the gradient and nothing else."""
    base = {"model": str(folder), "schedule": "deterministic", "perp_neg": False}
    guidance, plain = gradient_of(StableDiffusionConfig(**base, weighting="uniform"))
    timestep = round((0.98 + (0.3 - 0.98) * 0.4) * 1000)
    weight = sds.weighting(guidance.distiller.schedule.alphas_cumprod[[timestep]], "fantasia3d")
    _, weighted = gradient_of(StableDiffusionConfig(**base, weighting="fantasia3d", strength=3.0))
    close(weighted.gradient, plain.gradient * float(weight) * 3)
    assert math.isfinite(float(plain.loss))


@pytest.mark.parametrize("preset", ["24", "6"])
def test_the_fast_networks_give_the_same_gradient(any_folder, preset):
    """As they are used on a GPU, here on the CPU."""
    config = StableDiffusionConfig(model=str(any_folder), weights=WeightsConfig(memory=preset))
    guidance, plain = gradient_of(config)
    guidance.distiller.space.make_fast()
    make_fast(guidance.distiller.network)
    again = guidance.gradient(views_rgba(), VIEWS, 0.4, torch.Generator().manual_seed(3))
    close(again.gradient, plain.gradient)


def test_a_step_follows_its_inputs_whatever_their_shape(folder):
    """Fewer views, another size, another reference: nothing of an earlier step is kept."""
    guidance, _ = gradient_of(StableDiffusionConfig(model=str(folder)))
    guidance.set_reference(reference("a blue car"))
    fewer = guidance.gradient(views_rgba()[:1], VIEWS[:1], 0.4, torch.Generator().manual_seed(3)).gradient
    other = make_guidance(StableDiffusionConfig(model=str(folder)), CPU)
    other.set_reference(reference("a blue car"))
    torch.testing.assert_close(
        fewer, other.gradient(views_rgba()[:1], VIEWS[:1], 0.4, torch.Generator().manual_seed(3)).gradient
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("objective", ["sds", "ism"])
def test_a_captured_step_equals_a_plain_one(any_folder, objective):
    device = torch.device("cuda")
    weights = WeightsConfig(precision="float32", memory="24")
    config = StableDiffusionConfig(model=str(any_folder), objective=objective, weights=weights)
    guidance = make_guidance(config, device)
    guidance.set_reference(reference())
    plain = make_guidance(config, CPU)
    plain.set_reference(reference())
    for seed in range(6):
        rgba, progress = views_rgba(seed), seed / 6
        expected = plain.gradient(rgba, VIEWS, progress, torch.Generator().manual_seed(seed)).gradient
        found = guidance.gradient(rgba.to(device), VIEWS.to(device), progress, torch.Generator().manual_seed(seed))
        scale = float(expected.abs().max())
        # TF32 rounds, and ism asks the network several times one after the other.
        tolerance = 1e-2 if objective == "sds" else 2e-2
        torch.testing.assert_close(found.gradient.cpu(), expected, atol=tolerance * scale, rtol=tolerance)
    assert guidance.distiller._graphed.is_captured
