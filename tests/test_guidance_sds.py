"""Score distillation on latents, against closed forms and explicit losses."""

from __future__ import annotations

import math

import pytest
import torch

from conrad_engine.guidance import schedule, sds


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian_noise_pred(noisy, alphas_cumprod, mean, variance):
    """The exact denoiser of data ~ N(mean, variance): ε̂ = E[ε | z_t] by the rule for two jointly Gaussian variables."""
    a = alphas_cumprod.reshape(-1, 1, 1, 1)
    return (1 - a).sqrt() / (a * variance + 1 - a) * (noisy - a.sqrt() * mean)


def test_sds_with_a_gaussian_denoiser_pulls_to_its_mean():
    mean, latents = randn(1, 4, 4, 4, seed=1), randn(1, 4, 4, 4, seed=2)
    generator = torch.Generator().manual_seed(3)
    for step in range(2000):
        times = schedule.sample_times(1, *schedule.time_range(step / 2000, "linear", 0.02, 0.98, 0.3), generator)
        alphas = torch.cos(times.double() * math.pi / 2).square().clamp(1e-4, 1 - 1e-4)
        noise = torch.randn(latents.shape, generator=generator, dtype=torch.float64)
        noisy = sds.add_noise(latents, noise, alphas)
        noise_pred = gaussian_noise_pred(noisy, alphas, mean, 0.01)
        latents = latents - 0.02 * sds.sds_gradient(noise_pred, noise, sds.weighting(alphas, "sds"))
    assert (latents - mean).abs().max() < 0.15
    assert (latents - mean).square().mean().sqrt() < 0.06


def test_mean_sds_gradient_is_the_closed_form():
    """E_ε[w (ε̂ - ε)] = w √(1-ᾱ) √ᾱ (z - mean) / (ᾱ v + 1-ᾱ): the noise averages out."""
    n = 40_000
    alphas = torch.full((n,), 0.4, dtype=torch.float64)
    latents, mean = torch.full((n, 1, 1, 1), 1.3).double(), 0.5
    noise = randn(n, 1, 1, 1)
    noisy = sds.add_noise(latents, noise, alphas)
    gradient = sds.sds_gradient(gaussian_noise_pred(noisy, alphas, mean, 0.25), noise, sds.weighting(alphas, "sds"))
    expected = 0.6 * math.sqrt(0.6 * 0.4) / (0.4 * 0.25 + 0.6) * (1.3 - mean)
    assert float(gradient.mean()) == pytest.approx(expected, abs=0.01)


def test_ism_of_a_gaussian_points_away_from_the_mean_without_noise():
    mean, latents = 0.2, randn(3, 2, 2, 2)
    first, second = torch.full((3,), 0.9).double(), torch.full((3,), 0.7).double()
    before = sds.add_noise(latents, torch.zeros_like(latents), first)
    pred_before = gaussian_noise_pred(before, first, mean, 0.1)
    noisy = sds.ddim_move(pred_before, before, first, second)
    pred = gaussian_noise_pred(noisy, second, mean, 0.1)
    gradient = sds.ism_gradient(pred, pred_before, sds.weighting(second, "ism"))
    unbiased = (before - first.sqrt().reshape(-1, 1, 1, 1) * mean) * gradient
    assert (unbiased >= 0).all()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_type_gives_the_true_noise(kind):
    clean, noise, alphas = randn(3, 4, 5, 5), randn(3, 4, 5, 5, seed=1), torch.tensor([0.01, 0.5, 0.99]).double()
    noisy = sds.add_noise(clean, noise, alphas)
    a = alphas.reshape(-1, 1, 1, 1)
    answers = {"epsilon": noise, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * clean, "sample": clean}
    noise_pred = sds.prediction_to_noise(answers[kind], noisy, alphas, kind)
    torch.testing.assert_close(noise_pred, noise)
    torch.testing.assert_close(sds.noise_to_clean(noise_pred, noisy, alphas), clean)


def test_unknown_kinds_are_refused():
    x, a = randn(1, 1, 1, 1), torch.ones(1).double() / 2
    with pytest.raises(ValueError, match="unknown prediction type 'flow'"):
        sds.prediction_to_noise(x, x, a, "flow")
    with pytest.raises(ValueError, match="unknown weighting"):
        sds.weighting(a, "x")
    with pytest.raises(ValueError, match="unknown schedule"):
        schedule.time_range(0.5, "x", 0.02, 0.98, 0.3)


def test_ddim_there_and_back_with_the_same_prediction():
    noisy, pred = randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1)
    low, high = torch.tensor([0.9, 0.8]).double(), torch.tensor([0.5, 0.1]).double()
    torch.testing.assert_close(sds.ddim_move(pred, sds.ddim_move(pred, noisy, low, high), high, low), noisy)


def test_guidance_scale_one_is_the_conditional_prediction():
    unconditional, conditional = randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1)
    torch.testing.assert_close(sds.guided(unconditional, conditional, 1.0), conditional)
    torch.testing.assert_close(sds.guided(unconditional, conditional, 0.0), unconditional)


def test_perp_neg_adds_nothing_along_the_positive_direction():
    unconditional, positive = randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1)
    negatives = randn(2, 2, 4, 3, 3, seed=2)
    weights = torch.tensor([[-1.0, -0.5], [-2.0, 0.0]]).double()
    with_negatives = sds.perp_neg_guided(unconditional, positive, negatives, weights, 7.5)
    added = with_negatives - sds.guided(unconditional, positive, 7.5)
    along = (added * (positive - unconditional)).sum((1, 2, 3))
    torch.testing.assert_close(along, torch.zeros(2).double(), atol=1e-10, rtol=0)
    assert (added.flatten(1).norm(dim=1) > 1).all()
    # It moves away from the negative prompt, not towards it.
    assert ((added * (negatives[0] - unconditional)).sum((1, 2, 3)) < 0).all()


def test_perp_neg_without_weights_is_plain_guidance():
    unconditional, positive, negatives = randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1), randn(1, 2, 4, 3, 3, seed=2)
    result = sds.perp_neg_guided(unconditional, positive, negatives, torch.zeros(1, 2).double(), 5.0)
    torch.testing.assert_close(result, sds.guided(unconditional, positive, 5.0))
    same = sds.perp_neg_guided(positive, positive, negatives, -torch.ones(1, 2).double(), 5.0)
    assert same.isfinite().all()


def test_weightings_are_their_formulas():
    a = torch.tensor([0.2, 0.6]).double()
    expected = {
        "sds": [0.8, 0.4],
        "uniform": [1, 1],
        "fantasia3d": [math.sqrt(0.2) * 0.8, math.sqrt(0.6) * 0.4],
        "ism": [2.0, math.sqrt(2 / 3)],
    }
    for kind, values in expected.items():
        torch.testing.assert_close(sds.weighting(a, kind), torch.tensor(values).double())


def test_the_gradient_is_that_of_the_usual_loss():
    latents = randn(2, 4, 3, 3).requires_grad_()
    gradient = randn(2, 4, 3, 3, seed=1)
    loss = 0.5 * (latents - (latents - gradient).detach()).square().sum() / 2
    loss.backward()
    torch.testing.assert_close(latents.grad, gradient / 2)
    assert float(loss.detach()) == pytest.approx(float(sds.distillation_loss(gradient)), rel=1e-6)


@pytest.mark.parametrize("kind", schedule.SCHEDULES)
def test_noise_times_fall_and_stay_inside(kind):
    highs = []
    for progress in torch.linspace(0, 1, 41).tolist():
        low, high = schedule.time_range(progress, kind, 0.02, 0.98, 0.3)
        assert 0.02 - 1e-9 <= low <= high <= 0.98 + 1e-9
        highs.append(high)
    assert highs == sorted(highs, reverse=True)
    assert highs[0] == pytest.approx(0.98)
    assert highs[-1] == pytest.approx(0.98 if kind == "uniform" else 0.3, abs=1e-3)


def test_square_root_falls_faster_first_and_dreamtime_dwells_in_the_middle():
    assert schedule.time_range(0.25, "sqrt", 0.02, 0.98, 0.3)[1] == pytest.approx(0.64)
    assert schedule.time_range(0.25, "linear", 0.02, 0.98, 0.3)[1] == pytest.approx(0.81)
    times = [schedule.dreamtime_time(i / 100, 0.02, 0.98) for i in range(101)]
    dwell = sum(0.5 <= t <= 0.8 for t in times) / 101
    assert dwell > 0.45, "a uniform fall would spend 0.31 there"
    assert times[0] == pytest.approx(0.98) and times[-1] == pytest.approx(0.02)


def test_times_are_reproducible_and_become_indices():
    times = schedule.sample_times(1000, 0.3, 0.6, torch.Generator().manual_seed(5))
    assert torch.equal(times, schedule.sample_times(1000, 0.3, 0.6, torch.Generator().manual_seed(5)))
    assert times.min() >= 0.3 and times.max() <= 0.6 and times.std() > 0.05
    assert schedule.times_to_timesteps(torch.tensor([0.0, 0.5, 0.98, 1.0]), 1000).tolist() == [0, 500, 980, 999]
