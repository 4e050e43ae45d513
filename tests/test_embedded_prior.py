"""The prior that ships: its algebra, on tiny networks of random weights."""

from __future__ import annotations

import itertools
import json
import math
import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load as load_tensors
from safetensors.torch import save

from conrad_engine.cameras import Camera, orbit_camera
from conrad_engine.config import HALF_FRAME, EmbeddedPriorConfig
from conrad_engine.errors import Cancelled, GuidanceError
from conrad_engine.guidance.embedded.prior import EmbeddedPrior, camera_rows
from conrad_engine.guidance.embedded.sampling import KNOWN_TIME, ConditionedPrior, extrapolation
from conrad_engine.guidance.embedded.unet import ARCHITECTURE, Group, Reference, ViewPrior, alpha_sigma, ray_directions
from conrad_engine.guidance.embedded.weights import load, load_for_use, to_bytes
from conrad_engine.guidance.interfaces import ReferencePicture

FOV_RAD = math.radians(40)
DISTANCE = HALF_FRAME / math.tan(FOV_RAD / 2)
TINY = (32, 32, 32)
EXACT = torch.autocast("cpu", torch.bfloat16, enabled=False)


def orbit(azimuths_deg: list[float], elevation_deg: float = 15, distance: float = 2.2, size: int = 64) -> Camera:
    azimuths = torch.tensor(azimuths_deg, dtype=torch.float32).deg2rad()
    return orbit_camera(azimuths, math.radians(elevation_deg), distance, FOV_RAD, size)


def reference_camera(elevation_deg: float = 15, size: int = 64) -> Camera:
    return orbit_camera(0.0, math.radians(elevation_deg), DISTANCE, FOV_RAD, size)


def random_network(seed: int = 0) -> ViewPrior:
    """Small, and with no layer left at zero, so that every input reaches the output."""
    net = ViewPrior(TINY)
    generator = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim > 1:
            p.data = noise / math.sqrt(p[0].numel())
        else:  # factors of norms, large enough for attention to choose; and biases
            p.data = noise * 0.3 + (1.5 if name.endswith("weight") else 0)
    return net.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def tiny_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    path.write_bytes(to_bytes(random_network(), TINY))
    return path


@pytest.fixture
def config(tiny_weights) -> EmbeddedPriorConfig:
    return EmbeddedPriorConfig(weights=str(tiny_weights), precision="float32")


def disc(size: int = 64) -> torch.Tensor:
    """Premultiplied: a disc, red to the left and green to the right."""
    v, u = torch.meshgrid(*[(torch.arange(size) + 0.5) / size * 2 - 1] * 2, indexing="ij")
    alpha = ((u**2 + v**2) < 0.64).float()
    return torch.stack([(1 - u) / 2 * alpha, (1 + u) / 2 * alpha, 0.2 * alpha, alpha])


def ready(config: EmbeddedPriorConfig, **facts) -> EmbeddedPrior:
    prior = EmbeddedPrior(config, "cpu")
    prior.set_reference(ReferencePicture(disc(), reference_camera(), **facts))
    return prior


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def conditioned(net: ViewPrior, pictures: torch.Tensor) -> ConditionedPrior:
    n = len(pictures)
    ones = torch.ones(n)
    rows = camera_rows(reference_camera())[None].expand(n, -1)
    sizes = torch.linspace(-0.2, 0.2, n)
    return ConditionedPrior(net, pictures, Reference(rows, ones, ones, sizes, ones), EXACT)


# Cameras


def test_rays_are_those_of_the_project_camera():
    camera = orbit([30, -100, 180], elevation_deg=20, size=16)
    directions = ray_directions(camera_rows(camera), 16)
    assert torch.allclose(directions.flatten(2).transpose(1, 2), camera.rays()[1], atol=1e-5)


def test_camera_rows_state_angles_distance_and_field_of_view():
    rows = camera_rows(orbit([30, -100], elevation_deg=20, distance=2.5))
    expected = torch.tensor([[30.0, 20], [-100, 20]]).deg2rad()
    assert torch.allclose(rows[:, :2], expected, atol=1e-5)
    assert torch.allclose(rows[:, 2:], torch.tensor([2.5, math.tan(FOV_RAD / 2)]), atol=1e-5)


# Sampling


def test_sampled_views_have_the_prior_size_and_range(config):
    views = ready(config).sample_views(orbit([0, 90, 200], size=32), 2, generator=seeded())
    assert views.shape == (3, 4, 64, 64)
    assert views.min() >= 0 and views.max() <= 1
    assert views.std() > 0.01


def test_the_generator_decides_the_samples(config):
    prior, cameras = ready(config), orbit([45, 180])
    first, again, other = (prior.sample_views(cameras, 2, generator=seeded(s)) for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.01


def test_sampling_reports_each_step_and_can_be_stopped(config):
    prior, seen = ready(config), []
    prior.sample_views(orbit([90]), 3, generator=seeded(), on_step=seen.append)
    assert seen == [1, 2, 3]

    def stop_at_two(step: int) -> None:
        seen.append(step)
        if step == 2:
            raise Cancelled("stopped")

    seen.clear()
    with pytest.raises(Cancelled):
        prior.sample_views(orbit([90]), 3, generator=seeded(), on_step=stop_at_two)
    assert seen == [1, 2]


def test_one_joint_view_is_an_independent_one_and_several_are_not(config):
    prior = ready(config)

    def sample(azimuths: list[float], is_joint: bool) -> torch.Tensor:
        return prior.sample_views(orbit(azimuths), 2, generator=seeded(), is_joint=is_joint)

    assert torch.allclose(sample([70], True), sample([70], False), atol=1e-5)
    assert (sample([70, 160, 250], True) - sample([70, 160, 250], False)).abs().max() > 1e-3


def test_views_are_joint_unless_said_otherwise(config):
    prior, cameras = ready(config), orbit([70, 160])
    joint = prior.sample_views(cameras, 2, generator=seeded(), is_joint=True)
    assert torch.equal(prior.sample_views(cameras, 2, generator=seeded()), joint)


def test_drafts_share_their_mean_first_and_the_first_goes_on_alone(config):
    prior, cameras, n_steps = ready(config), orbit([70, 160]), 4
    drawn = prior.sample_views(cameras, n_steps, scale=1.0, generator=seeded(), n_drafts=2, temperature=0.5)
    drafts = 0.5 * torch.randn(2, 2, 4, 64, 64, generator=seeded())
    rows = camera_rows(cameras)
    mean = torch.zeros(())
    # Alone from 0.6 on. From 0.5 to 0.25 ln cot(πt/2) grows as much as it did before: half of the last change is added.
    for time, later, n, half in ((1.0, 0.75, 2, 0), (0.75, 0.5, 2, 0), (0.5, 0.25, 1, 0.5), (0.25, 0.0, 1, 0)):
        (alpha, sigma), (next_alpha, next_sigma) = (alpha_sigma(torch.tensor([t])) for t in (time, later))
        t = torch.full((2,), time)
        cleans = [prior._conditioned.denoised(x, t, rows, scale=1.0, is_joint=True) for x in drafts[:n]]
        mean, before = sum(cleans) / n, mean
        push = half * (mean - before)
        pairs = zip(drafts, cleans)
        drafts = torch.stack(
            [next_alpha * (mean + push) + next_sigma * (x - alpha * (c + push)) / sigma for x, c in pairs]
        )
    assert torch.allclose(drawn, (mean + 1) / 2, atol=1e-4)


def test_a_step_is_that_of_dpm_solver_plus_plus():
    """arXiv:2211.01095, Algorithm 2, for a clean picture that changes evenly with λ = ln(α / σ)."""
    n_steps, step = 10, 6
    (a0, s0), (a1, s1), (a2, s2) = (
        alpha_sigma(torch.tensor([1 - k / n_steps]).double()) for k in (step - 1, step, step + 1)
    )
    before, now, noisy = torch.tensor(0.2).double(), torch.tensor(0.3).double(), torch.tensor(0.7).double()
    h, earlier = (a2 / s2).log() - (a1 / s1).log(), (a1 / s1).log() - (a0 / s0).log()
    r = earlier / h
    expected = s2 / s1 * noisy - a2 * ((-h).exp() - 1) * ((1 + 1 / (2 * r)) * now - before / (2 * r))
    ahead = now + extrapolation(step, n_steps) * (now - before)
    torch.testing.assert_close(a2 * ahead + s2 * (noisy - a1 * ahead) / s1, expected)
    assert extrapolation(0, 8) == extrapolation(1, 8) == extrapolation(7, 8) == 0, "λ is infinite at both ends"


def test_one_draft_is_the_plain_sample(config):
    prior, cameras = ready(config), orbit([70, 160])
    plain = prior.sample_views(cameras, 2, generator=seeded())
    assert torch.equal(prior.sample_views(cameras, 2, generator=seeded(), n_drafts=1, temperature=1.0), plain)
    assert not torch.equal(prior.sample_views(cameras, 2, generator=seeded(), temperature=0.8), plain)


def test_azimuths_count_from_the_reference_camera(config):
    prior = ready(config)
    expected = prior.sample_views(orbit([90]), 2, generator=seeded())
    turned = replace(reference_camera(), c2w=orbit([50], distance=DISTANCE).c2w[0])
    prior.set_reference(ReferencePicture(disc(), turned))
    assert torch.allclose(prior.sample_views(orbit([140]), 2, generator=seeded()), expected, atol=1e-4)


def test_an_unknown_elevation_is_not_looked_at(config):
    prior, samples = ready(config), []
    for elevation_deg, is_known in ((5, False), (40, False), (5, True), (40, True)):
        camera = reference_camera(elevation_deg)
        prior.set_reference(ReferencePicture(disc(), camera, is_elevation_known=is_known))
        samples.append(prior.sample_views(orbit([90]), 2, generator=seeded()))
    assert torch.allclose(samples[0], samples[1], atol=1e-5)
    assert (samples[2] - samples[3]).abs().max() > 1e-3


def test_a_known_size_is_used(config):
    unknown, small, large = (
        ready(config, object_size=size).sample_views(orbit([90]), 2, generator=seeded()) for size in (None, 1.2, 2.0)
    )
    assert (small - large).abs().max() > 1e-3
    assert (small - unknown).abs().max() > 1e-3


# Guided denoising


def test_guidance_goes_from_the_picture_free_answer_through_the_conditional_one():
    net, noisy = random_network(), 0.3 * torch.randn(2, 4, 64, 64, generator=seeded())
    prior = conditioned(net, disc()[None] * 2 - 1)
    t, rows = torch.full((2,), 0.6), camera_rows(orbit([80, 200]))

    def v_of(is_present: float) -> torch.Tensor:
        facts = Reference(*(x[:1] for x in prior.reference))._replace(is_present=torch.tensor([is_present]))
        return net(noisy, t, rows, disc()[None] * 2 - 1, facts, (Group(1, 2, True),))

    def clean(v: torch.Tensor) -> torch.Tensor:
        return (math.cos(0.3 * math.pi) * noisy - math.sin(0.3 * math.pi) * v).clamp(-1, 1)

    with_picture, without = v_of(1.0), v_of(0.0)
    assert (with_picture - without).abs().max() > 0.1
    for scale in (1.0, 2.5):
        expected = clean(without + scale * (with_picture - without))
        assert torch.allclose(prior.denoised(noisy, t, rows, scale, is_joint=True), expected, atol=5e-3)


@pytest.mark.parametrize("is_joint", [True, False])
def test_references_in_a_batch_are_answered_as_one_by_one(is_joint):
    net, pictures = random_network(), torch.rand(3, 4, 64, 64, generator=seeded(1)) * 2 - 1
    noisy, t = torch.randn(6, 4, 64, 64, generator=seeded()), torch.linspace(0.2, 0.9, 6)
    rows = camera_rows(orbit([10, 60, 110, 160, 210, 260]))
    together = conditioned(net, pictures)
    batch = together.denoised(noisy, t, rows, 2.0, is_joint)
    for i in range(3):
        own = slice(2 * i, 2 * i + 2)
        facts = Reference(*(x[i : i + 1] for x in together.reference))
        alone = ConditionedPrior(net, pictures[i : i + 1], facts, EXACT)
        assert torch.allclose(alone.denoised(noisy[own], t[own], rows[own], 2.0, is_joint), batch[own], atol=1e-4)


@pytest.mark.parametrize("time", [0.8, 0.1])
def test_known_views_are_seen_by_targets_that_see_each_other(time):
    net, noisy = random_network(), torch.randn(2, 4, 64, 64, generator=seeded())
    t, rows = torch.full((2,), time), camera_rows(orbit([80, 200]))
    prior, plain = (conditioned(net, disc()[None] * 2 - 1) for _ in range(2))
    known, place = disc().flip(-1)[None] * 2 - 1, camera_rows(orbit([120]))
    prior.know(known, place)
    known_time = min(time, KNOWN_TIME)
    angle = known_time * math.pi / 2
    beside = math.cos(angle) * known + math.sin(angle) * torch.randn(1, 4, 64, 64, generator=seeded())
    three = torch.cat([noisy, beside]), torch.cat([t, torch.tensor([known_time])]), torch.cat([rows, place])
    for scale in (1.0, 2.0):
        answer = prior.denoised(noisy, t, rows, scale, is_joint=True)
        assert torch.allclose(answer, plain.denoised(*three, scale, is_joint=True)[:2], atol=1e-5)
        assert (answer - plain.denoised(noisy, t, rows, scale, is_joint=True)).abs().max() > 0.01
        alone = [p.denoised(noisy, t, rows, scale, is_joint=False) for p in (prior, plain)]
        assert torch.equal(*alone)


def test_the_mirrored_picture_stands_where_the_mirror_puts_it(config):
    prior = ready(config, object_size=1.2)
    prior.know_mirrored(math.radians(110))
    pictures, rows, _ = prior._conditioned._known
    assert torch.allclose(pictures[0], disc().flip(-1) * 2 - 1)
    expected = camera_rows(reference_camera())[None]
    expected[0, 0] = math.radians(110)
    assert torch.allclose(rows, expected)
    views = [p.sample_views(orbit([90]), 2, generator=seeded()) for p in (prior, ready(config, object_size=1.2))]
    assert views[0].shape == (1, 4, 64, 64) and not torch.equal(*views)
    gradients = [
        p.gradient(disc()[None], orbit([90]), 0.5, seeded()).gradient for p in (prior, ready(config, object_size=1.2))
    ]
    assert gradients[0].shape == (1, 4, 64, 64) and not torch.equal(*gradients)
    prior.set_reference(ReferencePicture(disc(), reference_camera()))
    assert prior._conditioned._known is None  # another job's picture


def test_bfloat16_is_close_to_float32(config):
    views = [ready(replace(config, precision=p)).sample_views(orbit([90]), 2, generator=seeded())
             for p in ("float32", "bfloat16")]  # fmt: skip
    difference = (views[0] - views[1]).abs()
    assert 0 < difference.mean() < 0.01


# Gradient


@pytest.mark.parametrize("size", [32, 64, 96])
def test_the_gradient_is_that_of_half_the_summed_squared_difference(config, size):
    rgba = torch.rand(2, 4, size, size, generator=seeded(5)).requires_grad_()
    result = ready(config).gradient(rgba.detach(), orbit([30, 200], size=size), 0.5, seeded())
    mode = {"mode": "area"} if size > 64 else {"mode": "bilinear", "align_corners": False}
    small = rgba if size == 64 else F.interpolate(rgba, size=(64, 64), **mode)
    assert float(result.loss) == pytest.approx(float((small - result.denoised).detach().square().mean()), rel=1e-4)
    assert result.denoised.min() >= 0 and result.denoised.max() <= 1
    wanted, pull = result.denoised.clone(), torch.ones(2, 1, 64, 64)
    for view, row, column in itertools.product(range(2), range(64), range(64)):
        own, alpha = small[view, 3, row, column].item(), wanted[view, 3, row, column].item()
        if own > 0.5 and alpha > 0.5:  # colors of a surface as opaque as the view's own
            straight = [float(c) / alpha for c in wanted[view, :3, row, column]]
            wanted[view, :3, row, column] = torch.tensor(straight) * own
            pull[view, 0, row, column] = 1 + sum(c * c for c in straight)
    squares = (small - wanted).square() * torch.cat([torch.ones(2, 3, 64, 64), pull], 1)
    (expected,) = torch.autograd.grad(0.5 * squares.sum(), rgba)
    assert torch.allclose(result.gradient, expected, atol=1e-5)


def test_a_doubtful_opacity_does_not_darken_a_surface(config, monkeypatch):
    """A network that sees the view as it is, but only 0.97 of it there: its colors are right, and stay."""
    prior, rgba = ready(config), torch.cat([torch.full((1, 3, 64, 64), 0.6), torch.ones(1, 1, 64, 64)], 1)
    monkeypatch.setattr(ConditionedPrior, "denoised", lambda *_, **__: 0.97 * rgba * 2 - 1)
    gradient = prior.gradient(rgba, orbit([180]), 0.5, seeded()).gradient
    assert gradient[:, :3].abs().max() < 1e-6
    # The opacity is pulled as by the premultiplied difference: (1 + 3 * 0.6^2) * 0.03.
    assert torch.allclose(gradient[:, 3], torch.tensor(2.08 * 0.03), atol=1e-6)


def test_the_generator_decides_the_gradient(config):
    prior, rgba = ready(config), disc()[None]
    first, again, other = (prior.gradient(rgba, orbit([90]), 0.5, seeded(s)).gradient for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_noise_falls_with_progress_and_stays_in_its_range(config):
    prior, rgba = ready(config), disc()[None]
    for progress in (0.0, 0.4, 1.0):
        times = {prior.gradient(rgba, orbit([90]), progress, seeded(s)).notes["t"] for s in range(4)}
        middle = config.t_start + (config.t_end - config.t_start) * progress
        assert len(times) > 1
        assert all(0.02 <= t <= 0.99 and abs(t - middle) <= config.t_spread + 1e-6 for t in times)


def test_without_a_reference_it_says_so(config):
    with pytest.raises(GuidanceError, match="call set_reference first"):
        EmbeddedPrior(config, "cpu").gradient(disc()[None], orbit([0]), 0.5)


def test_an_unknown_precision_is_named(config):
    with pytest.raises(GuidanceError, match="unknown precision 'half': use auto, float32 or bfloat16"):
        EmbeddedPrior(replace(config, precision="half"), "cpu")


# Weights


def test_weights_survive_writing_and_reading(tiny_weights):
    expected = random_network().state_dict()
    for name, value in load(tiny_weights).state_dict().items():
        assert torch.equal(value, expected[name].half().float()), name


def damaged(kind: str, data: bytes) -> bytes:
    header = {"architecture": ARCHITECTURE, "widths": json.dumps(TINY)}
    tensors = load_tensors(data)
    if kind == "truncated":
        return data[: len(data) // 2]
    if kind == "not weights":
        return b"<html>Not found</html>"
    if kind == "other architecture":
        return save(tensors, {**header, "architecture": "conrad-view-prior-0"})
    if kind == "no header":
        return save(tensors)
    if kind == "no widths":
        return save(tensors, {"architecture": ARCHITECTURE})
    if kind == "other widths":
        return save(tensors, {**header, "widths": "[64, 64, 64]"})
    if kind == "absurd widths":
        return save(tensors, {**header, "widths": '[1, "a", 9999999]'})
    if kind == "tensor missing":
        del tensors["enter.weight"]
    if kind == "not finite":
        tensors["enter.bias"][3] = torch.nan
    return save(tensors, header)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "cannot be read"),
        ("not weights", "cannot be read"),
        ("other architecture", "are for conrad-view-prior-0, this version needs"),
        ("no header", "are for no architecture"),
        ("no widths", "not three multiples of 32"),
        ("absurd widths", "not three multiples of 32"),
        ("other widths", "do not fit"),
        ("tensor missing", "1 tensors are missing, unknown or of another shape .the first is enter.weight"),
        ("not finite", "not finite"),
    ],
)
def test_bad_weights_give_one_clear_sentence(tiny_weights, tmp_path, kind, message):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(damaged(kind, tiny_weights.read_bytes()))
    with pytest.raises(GuidanceError, match=message) as caught:
        EmbeddedPrior(EmbeddedPriorConfig(weights=str(path)), "cpu")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_weights_are_read_once_until_their_file_changes(tiny_weights, tmp_path):
    path = tmp_path / "kept.safetensors"
    path.write_bytes(tiny_weights.read_bytes())
    first = load_for_use(path, "cpu", torch.float32)
    assert EmbeddedPrior(EmbeddedPriorConfig(weights=str(path), precision="float32"), "cpu").net is first
    assert load_for_use(path, "cpu", torch.bfloat16) is not first
    first = load_for_use(path, "cpu", torch.float32)
    os.utime(path, ns=(1, 1))
    assert load_for_use(path, "cpu", torch.float32) is not first


@pytest.mark.parametrize("name", ["", "nothing.safetensors"])
def test_missing_weights_are_named(tmp_path, name):
    with pytest.raises(GuidanceError, match="are missing at .*reinstall the package or name a file"):
        load(tmp_path / name)
