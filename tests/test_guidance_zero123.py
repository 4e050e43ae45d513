"""Zero123: every sign of its pose vector by an independent computation, and its gradient against an explicit twin."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conrad_engine.cameras import orbit_camera
from conrad_engine.config import REFERENCE_EXTENT, StableDiffusionConfig, WeightsConfig, Zero123Config
from conrad_engine.errors import GuidanceError
from conrad_engine.guidance import make_guidance, memory
from conrad_engine.guidance.distill import UNIT
from conrad_engine.guidance.interfaces import ReferencePicture
from conrad_engine.guidance.zero123 import TRAINING_FOV_RAD, clip_input, pose_vectors

from . import tiny_checkpoints as tiny

pytest.importorskip("diffusers")
CPU = torch.device("cpu")


def zero123_pose(position: np.ndarray, position_cond: np.ndarray) -> list[float]:
    """[Δθ, sin Δφ, cos Δφ, Δr] of two camera positions in a +Z-up world: θ from +Z, φ from +X towards +Y."""

    def spherical(p):
        r = np.sqrt((p**2).sum())
        return np.arccos(p[2] / r), np.arctan2(p[1], p[0]), r

    (theta, phi, r), (theta_0, phi_0, r_0) = spherical(position), spherical(position_cond)
    turn = (phi - phi_0) % (2 * np.pi)
    return [theta - theta_0, np.sin(turn), np.cos(turn), r - r_0]


@pytest.mark.parametrize("seed", range(5))
def test_poses_equal_those_of_the_camera_positions(seed):
    """Zero123's own formula on the cameras' world positions, at its own angle of view and object size."""
    generator = torch.Generator().manual_seed(seed)
    azimuth, elevation = (torch.rand(2, 6, generator=generator) - 0.5) * torch.tensor([[6.2], [2.8]])
    distance = 1.5 + torch.rand(6, generator=generator)
    cameras = orbit_camera(azimuth, elevation, distance * REFERENCE_EXTENT, TRAINING_FOV_RAD, 64)
    reference = orbit_camera(0.0, 0.3, 1.8 * REFERENCE_EXTENT, TRAINING_FOV_RAD, 64)
    found = pose_vectors(reference, cameras, "zero123")
    # Their objects have a longest side of 1, ours of REFERENCE_EXTENT.
    positions, position_cond = (c.positions.double().numpy() / REFERENCE_EXTENT for c in (cameras, reference))
    expected = torch.tensor([zero123_pose(p, position_cond) for p in positions], dtype=torch.float32)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_signs_one_by_one():
    reference = orbit_camera(0.0, 0.2, 2.0, 0.7, 64)
    to_the_right = orbit_camera(torch.tensor([math.pi / 2]), 0.2, 2.0, 0.7, 64)
    # Seen from the reference, which looks along +Y, a camera at azimuth +90° stands to its right, on +X.
    assert float(to_the_right.positions[0, 0]) > 1.9
    np.testing.assert_allclose(pose_vectors(reference, to_the_right, "zero123")[0], [0, 1, 0, 0], atol=1e-6)
    above = orbit_camera(torch.tensor([0.0]), 0.7, 2.0, 0.7, 64)
    np.testing.assert_allclose(pose_vectors(reference, above, "zero123")[0], [-0.5, 0, 1, 0], atol=1e-6)
    farther = pose_vectors(reference, orbit_camera(torch.tensor([0.0]), 0.2, 2.5, 0.7, 64), "zero123")
    assert float(farther[0, 3]) > 0.1


def test_a_narrow_lens_from_afar_is_no_other_radius():
    """Only how large the object appears counts, because Zero123 knows one angle of view."""
    reference = orbit_camera(0.0, 0.0, 1.0 / math.tan(0.35), 0.7, 64)
    tele = orbit_camera(torch.tensor([0.0]), 0.0, 1.0 / math.tan(0.1), 0.2, 128)
    assert float(pose_vectors(reference, tele, "zero123")[0, 3]) == pytest.approx(0, abs=1e-5)


def test_stable_zero123_takes_the_references_polar_angle():
    reference = orbit_camera(0.0, math.radians(20), 2.0, 0.7, 64)
    cameras = orbit_camera(torch.tensor([1.0, 2.0]), math.radians(-10), 3.0, 0.7, 64)
    poses = pose_vectors(reference, cameras, "stable_zero123")
    np.testing.assert_allclose(poses[:, 3], math.radians(70), atol=1e-6)
    np.testing.assert_allclose(poses[:, :3], pose_vectors(reference, cameras, "zero123")[:, :3])


def test_clip_sees_normalized_pictures():
    white = clip_input(torch.ones(1, 3, 20, 20), 8)
    expected = (1 - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    )
    torch.testing.assert_close(white[0, :, 3, 3], expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_zero123(tmp_path_factory.mktemp("zero123") / "model")


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory):
    """The same network in the other published conversion."""
    return tiny.write_zero123(tmp_path_factory.mktemp("zero123") / "other", "clip_camera_projection")


@pytest.fixture(scope="module")
def reference():
    generator = torch.Generator().manual_seed(1)
    alpha = (torch.rand(1, 80, 80, generator=generator) > 0.5).float()
    rgba = torch.cat([torch.rand(3, 80, 80, generator=generator) * alpha, alpha])
    return ReferencePicture(rgba, orbit_camera(0.0, 0.2, 2.0, 0.7, 80))


VIEWS = orbit_camera(torch.tensor([0.4, 2.0, -3.0]), torch.tensor([0.0, 0.3, -0.2]), 2.1, 0.7, 32)


def views_rgba(seed: int = 2) -> torch.Tensor:
    rgba = torch.rand(3, 4, 32, 32, generator=torch.Generator().manual_seed(seed))
    return torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)


def explicit_gradient(folder, config, reference, rgba, timesteps, noise):
    """The whole step in plain library calls, one view and one branch at a time, as a loss that autograd differentiates."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from safetensors.torch import load_file
    from transformers import CLIPVisionModelWithProjection

    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    encoder = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder")
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    name = "cc_projection" if (folder / "cc_projection").is_dir() else "clip_camera_projection"
    weight, bias = sorted(
        load_file(folder / name / "diffusion_pytorch_model.safetensors").values(), key=lambda v: -v.dim()
    )

    white = (reference.rgba[:3] + 1 - reference.rgba[3:])[None]
    white = F.interpolate(white, (64, 64), mode="bilinear", antialias=True)
    with torch.no_grad():
        embedding = encoder(clip_input(white, 32)).image_embeds
        condition = vae.encode(white * 2 - 1).latent_dist.mean  # Not scaled.
    leaf = rgba.clone().requires_grad_()
    loss = 0
    for i in range(3):
        rgb = leaf[i : i + 1, :3] + 1 - leaf[i : i + 1, 3:]
        rgb = F.interpolate(rgb, (64, 64), mode="bilinear")
        latents = vae.encode(rgb * 2 - 1).latent_dist.mean * vae.config.scaling_factor
        with torch.no_grad():
            noisy = scheduler.add_noise(latents, noise[i : i + 1], timesteps[i : i + 1])
            pose = pose_vectors(reference.camera, VIEWS[i : i + 1], config.variant)
            token = F.linear(torch.cat([embedding, pose], 1), weight, bias)[None]
            own = unet(torch.cat([noisy, condition], 1), timesteps[i], token).sample
            nothing = torch.zeros_like
            plain = unet(torch.cat([noisy, nothing(condition)], 1), timesteps[i], nothing(token)).sample
            noise_pred = plain + config.scale * (own - plain)
            gradient = (1 - scheduler.alphas_cumprod[timesteps[i]]) * (noise_pred - noise[i : i + 1])
        loss = loss + 0.5 * (latents - (latents - gradient).detach()).square().sum() / 3
    loss.backward()
    return leaf.grad * config.strength / UNIT


@pytest.mark.parametrize("variant", ["zero123", "stable_zero123"])
def test_the_gradient_is_that_of_the_explicit_loss(folder, reference, variant):
    config = Zero123Config(model=str(folder), variant=variant, strength=2.0, scale=4.0)
    guidance = make_guidance(config, CPU)
    guidance.set_reference(reference)
    assert guidance.picture_size == 64
    rgba = views_rgba()
    result = guidance.gradient(rgba, VIEWS, 0.4, torch.Generator().manual_seed(3))
    draws = guidance.draw(len(rgba), 0.4, torch.Generator().manual_seed(3))
    expected = explicit_gradient(folder, config, reference, rgba, draws.timesteps, draws.noise)
    torch.testing.assert_close(result.gradient, expected, atol=float(expected.abs().max()) * 1e-4, rtol=1e-3)
    assert result.gradient.abs().max() > 0


def test_both_conversions_give_the_same_gradient(folder, other_folder, reference):
    results = []
    for model in (folder, other_folder):
        guidance = make_guidance(Zero123Config(model=str(model)), CPU)
        guidance.set_reference(reference)
        results.append(guidance.gradient(views_rgba(), VIEWS, 0.1, torch.Generator().manual_seed(0)).gradient)
    torch.testing.assert_close(results[0], results[1], atol=0, rtol=0)


def test_presets_and_batches_give_the_same_gradient(folder, reference):
    results = []
    for preset in ("24", "8", "6"):
        config = Zero123Config(model=str(folder), weights=WeightsConfig(memory=preset))
        guidance = make_guidance(config, CPU)
        guidance.set_reference(reference)
        results.append(guidance.gradient(views_rgba(), VIEWS, 0.1, torch.Generator().manual_seed(0)).gradient)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=float(results[0].abs().max()) * 1e-4, rtol=1e-3)


def test_the_scale_one_needs_no_unconditional_answer(folder, reference):
    guidance = make_guidance(Zero123Config(model=str(folder), scale=1.0), CPU)
    guidance.set_reference(reference)
    tokens = guidance._tokens(VIEWS)
    noisy, timesteps = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500, 20, 900])
    guided = guidance._denoiser(VIEWS).guided(noisy, timesteps, slice(0, 3))
    torch.testing.assert_close(guided, guidance._ask(noisy, timesteps, tokens, [True])[0], atol=1e-5, rtol=1e-4)


def test_half_precision_gradients_are_finite_and_close(folder, reference):
    results = []
    for precision in ("float32", "bfloat16"):
        guidance = make_guidance(Zero123Config(model=str(folder), weights=WeightsConfig(precision=precision)), CPU)
        guidance.set_reference(reference)
        results.append(guidance.gradient(views_rgba(), VIEWS, 0.2, torch.Generator().manual_seed(0)).gradient)
    assert results[1].isfinite().all()
    similarity = F.cosine_similarity(results[0].flatten(), results[1].flatten(), dim=0)
    assert float(similarity) > 0.98


def test_the_azimuth_reaches_the_gradient(folder, reference):
    """Left and right are told apart: mirrored cameras give other gradients."""
    guidance = make_guidance(Zero123Config(model=str(folder)), CPU)
    guidance.set_reference(reference)
    mirrored = orbit_camera(torch.tensor([-0.4, -2.0, 3.0]), torch.tensor([0.0, 0.3, -0.2]), 2.1, 0.7, 32)
    a, b = (
        guidance.gradient(views_rgba(), cameras, 0.2, torch.Generator().manual_seed(0)).gradient
        for cameras in (VIEWS, mirrored)
    )
    assert (a - b).abs().max() > 1e-3 * a.abs().max()


def test_another_kind_of_model_is_refused(folder, tmp_path):
    other = tiny.write_stable_diffusion(tmp_path / "sd1")
    with pytest.raises(GuidanceError, match="lacks image_encoder"):
        make_guidance(Zero123Config(model=str(other)), CPU)
    with pytest.raises(GuidanceError, match="lacks text_encoder, tokenizer"):
        make_guidance(StableDiffusionConfig(model=str(folder)), CPU)


def test_a_model_without_the_pose_projection_is_refused(tmp_path):
    broken = tiny.write_zero123(tmp_path / "model")
    (broken / "cc_projection" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(GuidanceError, match="lacks cc_projection"):
        make_guidance(Zero123Config(model=str(broken)), CPU)
    (broken / "cc_projection" / "config.json").unlink()
    with pytest.raises(GuidanceError, match="not a Zero123 in diffusers layout"):
        make_guidance(Zero123Config(model=str(broken)), CPU)


def test_the_published_pickles_are_read_when_allowed(folder, reference, tmp_path):
    """As `kxic/zero123-xl` was published: every network in a .bin file."""
    pickled = tiny.write_zero123(tmp_path / "model")
    for component in ("unet", "vae", "image_encoder", "cc_projection"):
        tiny.to_pickles(pickled, component)
    with pytest.raises(GuidanceError, match="no safetensors for unet, vae, image_encoder, cc_projection"):
        make_guidance(Zero123Config(model=str(pickled)), CPU)
    trusting = Zero123Config(model=str(pickled), weights=WeightsConfig(allow_pickle=True))
    results = []
    for config in (trusting, Zero123Config(model=str(folder))):
        guidance = make_guidance(config, CPU)
        guidance.set_reference(reference)
        results.append(guidance.gradient(views_rgba(), VIEWS, 0.1, torch.Generator().manual_seed(0)).gradient)
    torch.testing.assert_close(results[0], results[1], atol=0, rtol=0)


def test_pictures_have_the_size_of_the_training(tmp_path):
    large = tiny.write_zero123(tmp_path / "model")
    settings = json.loads((large / "unet" / "config.json").read_text())
    (large / "unet" / "config.json").write_text(json.dumps(settings | {"sample_size": 64}))
    assert make_guidance(Zero123Config(model=str(large)), CPU).picture_size == 256


def test_gradient_before_the_reference_is_a_callers_mistake(folder):
    guidance = make_guidance(Zero123Config(model=str(folder)), CPU)
    with pytest.raises(ValueError, match="set_reference"):
        guidance.gradient(views_rgba(), VIEWS, 0.0)


def test_running_out_of_memory_steps_down_and_repeats_the_step(folder, reference):
    guidance = make_guidance(Zero123Config(model=str(folder), weights=WeightsConfig(memory="24")), CPU)
    guidance.set_reference(reference)
    expected = guidance.gradient(views_rgba(), VIEWS, 0.2, torch.Generator().manual_seed(0)).gradient
    network, n_views = guidance.distiller.network, []

    class Limited(torch.nn.Module):
        """Holds two samples at most: one view with both branches."""

        def forward(self, sample, *args, **kwargs):
            n_views.append(len(sample))
            if len(sample) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return network(sample, *args, **kwargs)

    guidance.distiller.network = Limited()
    result = guidance.gradient(views_rgba(), VIEWS, 0.2, torch.Generator().manual_seed(0)).gradient
    assert n_views == [6, 6, 2, 2, 2]
    assert guidance.distiller.plan.name == "8"
    torch.testing.assert_close(result, expected, atol=float(expected.abs().max()) * 1e-4, rtol=1e-3)


def test_the_last_preset_passes_the_error_on(folder, reference):
    guidance = make_guidance(Zero123Config(model=str(folder), weights=WeightsConfig(memory="24")), CPU)
    guidance.set_reference(reference)

    class Full(torch.nn.Module):
        def forward(self, *args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory")

    guidance.distiller.network = Full()
    with pytest.raises(torch.OutOfMemoryError):
        guidance.gradient(views_rgba(), VIEWS, 0.2)
    assert guidance.distiller.plan.name == "least"


def test_tiles_change_nothing_inside_one_and_carry_gradient_across_all(folder):
    space = make_guidance(Zero123Config(model=str(folder)), CPU).distiller.space
    picture = torch.rand(1, 3, 320, 320, generator=torch.Generator().manual_seed(0), requires_grad=True)
    small = picture[:, :, :64, :64].detach()
    whole = space.encode(small)
    space.apply(memory.PLANS[-1])
    torch.testing.assert_close(space.encode(small), whole)
    tiled = space.encode(picture)
    assert tiled.shape == (1, 4, 40, 40)
    tiled.square().sum().backward()
    assert picture.grad.isfinite().all()
    assert (F.avg_pool2d(picture.grad.abs(), 32) > 0).all()
