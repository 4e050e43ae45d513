"""View-dependent prompts, memory presets, mixtures: the parts around the diffusion models, without any."""

from __future__ import annotations

import math

import pytest
import torch

from conrad_engine.cameras import orbit_camera
from conrad_engine.config import EmbeddedPriorConfig, MixtureConfig, StableDiffusionConfig, Zero123Config
from conrad_engine.guidance import memory, mixture, prompts
from conrad_engine.guidance.interfaces import GuidanceResult, ReferencePicture

GIB = 2**30


def angles(*degrees: float) -> torch.Tensor:
    return torch.deg2rad(torch.tensor(degrees))


def test_view_words_follow_the_prompt():
    assert prompts.view_prompts("a shoe") == [f"a shoe, {v} view" for v in ("front", "side", "back", "overhead")]
    assert prompts.view_prompts("")[2] == "back view"


def test_shares_are_pure_at_the_quarters_and_linear_between():
    azimuths = angles(0, 90, 180, -90, 270, 45, -135, 360)
    shares = prompts.view_shares(azimuths, torch.zeros(8))
    front, side, back = torch.eye(4)[:3]
    expected = torch.stack([front, side, back, side, side, (front + side) / 2, (side + back) / 2, front])
    torch.testing.assert_close(shares, expected, atol=1e-6, rtol=0)


def test_shares_sum_to_one_everywhere_and_turn_overhead_from_above():
    generator = torch.Generator().manual_seed(0)
    azimuths = (torch.rand(500, generator=generator) - 0.5) * 20
    elevations = (torch.rand(500, generator=generator) - 0.5) * math.pi
    shares = prompts.view_shares(azimuths, elevations)
    torch.testing.assert_close(shares.sum(1), torch.ones(500))
    assert (shares >= -1e-6).all()
    assert prompts.view_shares(angles(30), angles(80))[0, 3] == 1
    assert prompts.view_shares(angles(30), angles(45))[0, 3] == 0


def test_negative_weights_spare_the_view_itself():
    front, side = prompts.negative_weights(angles(0, 90, 180), torch.zeros(3))
    # From the front, "front" must not be pushed away; from the side, "side" must not.
    torch.testing.assert_close(front, torch.tensor([0.0, -1.5736, -1.967]), atol=1e-3, rtol=0)
    torch.testing.assert_close(side, torch.tensor([-1.574, 0.0, -0.394]), atol=1e-3, rtol=0)
    assert prompts.negative_weights(angles(170), angles(80)).abs().max() == 0


def test_negative_weights_are_continuous():
    azimuths = torch.linspace(-math.pi, math.pi, 2001)
    weights = prompts.negative_weights(azimuths, torch.zeros(2001))
    assert weights.max() <= 0
    assert weights.diff(dim=1).abs().max() < 0.01


@pytest.mark.parametrize(
    ("free", "name"), [(80, "24"), (23.7, "24"), (20, "12"), (11.6, "12"), (7.8, "8"), (6, "6"), (2, "6")]
)
def test_memory_presets_by_free_memory(monkeypatch, free, name):
    monkeypatch.setattr(memory, "free_memory", lambda device: int(free * GIB))
    assert memory.choose_plan("auto", torch.device("cuda")).name == name
    assert memory.choose_plan("8", torch.device("cuda")).name == "8"


def test_every_preset_steps_down_to_the_least():
    plan, names = memory.PLANS[0], []
    while plan is not None:
        names.append(plan.name)
        plan = memory.smaller_plan(plan)
    assert names == ["24", "12", "8", "6", "least"]
    views = [p.views_at_once for p in memory.PLANS]
    assert views == sorted(views, reverse=True)


def test_free_memory_of_this_machine_is_plausible():
    assert 0.1 * GIB < memory.free_memory(torch.device("cpu")) < 10_000 * GIB


class Constant:
    """A prior whose gradient is one number."""

    picture_size = 64

    def __init__(self, value: float) -> None:
        self.value, self.n_calls, self.reference = value, 0, None

    def set_reference(self, reference):
        self.reference = reference

    def gradient(self, rgba, cameras, progress, generator=None):
        self.n_calls += 1
        return GuidanceResult(torch.full_like(rgba, self.value), self.value, None, {"x": 1.0})


def make_mixture(**settings):
    made = []

    def make(config, device):
        value = {EmbeddedPriorConfig: 100.0, Zero123Config: 1.0, StableDiffusionConfig: 2.0}[type(config)]
        made.append(Constant(value))
        return made[-1]

    guidance = mixture.MixtureGuidance(MixtureConfig(**settings), torch.device("cpu"), make)
    guidance.set_reference(ReferencePicture(torch.zeros(4, 8, 8), orbit_camera(0.0, 0.2, 2.0, 0.7, 8)))
    return guidance, made


CAMERAS = orbit_camera(torch.tensor([0.0, math.pi]), torch.tensor([0.2, -0.2]), 2.0, 0.7, 8)


def test_in_the_fine_stage_zero123_counts_by_its_factor():
    config = MixtureConfig(zero123_fine=0.25)
    assert mixture.shares(config, 1.0) == {"zero123": 40 / 41, "stable_diffusion": 1 / 41}
    assert mixture.shares(config, 1.5) == {"zero123": 10 / 11, "stable_diffusion": 1 / 11}


def test_the_default_mixture_has_magic123s_ratio_and_loads_two_priors():
    guidance, made = make_mixture()
    assert len(made) == 2
    gradient = guidance.gradient(torch.zeros(2, 4, 8, 8), CAMERAS, 0.5).gradient
    torch.testing.assert_close(gradient, torch.full((2, 4, 8, 8), (40 * 1.0 + 1 * 2.0) / 41))
    assert all(prior.reference is not None for prior in made)


def test_weights_change_linearly_and_a_prior_without_weight_is_not_asked():
    guidance, made = make_mixture(
        zero123_start=1.0, zero123_end=0.0, stable_diffusion_start=0.0, stable_diffusion_end=1.0
    )
    values = [
        float(guidance.gradient(torch.zeros(2, 4, 8, 8), CAMERAS, p).gradient[0, 0, 0, 0]) for p in (0.0, 0.25, 1.0)
    ]
    assert values == pytest.approx([1.0, 1.25, 2.0])
    assert [prior.n_calls for prior in made] == [2, 2]
    assert guidance.gradient(torch.zeros(2, 4, 8, 8), CAMERAS, 0.25).notes["stable_diffusion.share"] == 0.25


def test_the_gradient_is_spared_where_the_photo_is_seen():
    guidance, _ = make_mixture(spare_seen=0.8)
    seen = torch.zeros(2, 8, 8)
    seen[:, :4] = 1
    gradient = guidance.gradient(torch.zeros(2, 4, 8, 8), CAMERAS, 0.0, seen=seen).gradient
    full = 42 / 41
    torch.testing.assert_close(gradient[:, :, 4:], torch.full((2, 4, 4, 8), full))
    torch.testing.assert_close(gradient[:, :, :4], torch.full((2, 4, 4, 8), full * 0.2))


def test_without_a_mask_the_angle_decides():
    guidance, _ = make_mixture(spare_seen=1.0)
    gradient = guidance.gradient(torch.zeros(2, 4, 8, 8), CAMERAS, 0.0).gradient
    assert gradient[0].abs().max() < 1e-5, "the reference view itself"
    assert float(gradient[1].mean()) == pytest.approx(42 / 41), "the view from behind"
