"""The loop on a toy: an analytic prior pulls the field to a known ball; stopping and resuming change nothing."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from conrad_engine import optimize as loop
from conrad_engine.checkpoint import load_checkpoint, save_checkpoint
from conrad_engine.config import (
    ConstraintConfig,
    FieldConfig,
    OptimizeConfig,
    PictureConfig,
    PipelineConfig,
    RenderConfig,
)
from conrad_engine.constraint import reference_view
from conrad_engine.errors import Cancelled, InputError, OptimizationError
from conrad_engine.fields.radiance_field import make_field
from conrad_engine.files import BackgroundWriter
from conrad_engine.guidance.interfaces import GuidanceResult, Priors
from conrad_engine.monitor import Command, Monitor
from conrad_engine.preprocess.framing import frame_object
from conrad_engine.rendering.renderer import render_picture
from conrad_engine.state import make_state
from conrad_engine.step import azimuth_reach, random_cameras
from conrad_engine.warm_start import filled_part, half_angle_tangent, ring_cameras, sample_warm_start

RADIUS = 0.575
"""The ball whose silhouette, in perspective, is the disc of the picture."""
BOX = torch.tensor([[-0.85, -1.0, -0.85], [0.85, 1.0, 0.85]])
CPU = torch.device("cpu")


def ball_picture(cameras) -> torch.Tensor:
    """What a green ball looks like: premultiplied RGBA (n, 4, h, w)."""
    origins, directions = cameras.rays()
    closest = (origins - (origins * directions).sum(-1, keepdim=True) * directions).norm(dim=-1)
    alpha = torch.sigmoid((RADIUS - closest) / 0.01).view(len(cameras), 1, cameras.height, cameras.width)
    return torch.cat([0.1 * alpha, 0.8 * alpha, 0.1 * alpha, alpha], 1)


class BallPrior:
    """Knows exactly what the object looks like from everywhere."""

    picture_size = 32

    def __init__(self) -> None:
        self.n_calls = 0

    def set_reference(self, reference) -> None: ...

    def gradient(self, rgba, cameras, progress, generator=None) -> GuidanceResult:
        self.n_calls += 1
        return GuidanceResult(rgba - ball_picture(cameras), 0.0)

    def sample_views(self, cameras, n_steps, scale=None, generator=None, on_step=None, **_):
        return ball_picture(cameras)

    def know_mirrored(self, azimuth_rad): ...

    def mirror_errors(self, azimuths_rad, times):
        return torch.zeros_like(azimuths_rad)  # a ball is the same in every mirror


def toy(kind="inferred_depth", steps=60, warm=0, field="dense_volume", **settings):
    config = PipelineConfig(
        field_=FieldConfig(
            kind=field,
            resolution=32,
            coarsest=8,
            n_levels=6,
            log2_table=12,
            max_resolution=64,
            start_levels=4,
            blob_radius=0.3,
        ),
        render=RenderConfig(size=32, fine_size=48, n_samples=32, occupancy_resolution=24),
        constraint=ConstraintConfig(kind=kind, depth_size=48),
        optimize=OptimizeConfig(
            warm_start_views=4 if warm else 0, warm_start_steps=warm, n_steps=steps, n_views=2, **settings
        ),
    )
    disc = np.zeros((64, 64, 3), np.float32) + [0.9, 0.2, 0.1]
    v, u = np.mgrid[:64, :64] - 31.5
    mask = (np.hypot(u, v) < 24).astype(np.float32)
    frame = frame_object(mask, None, PictureConfig(elevation_deg=0))
    view = reference_view(disc.astype(np.float32), mask, frame.camera)
    torch.manual_seed(0)
    state = make_state(make_field(config.field_, BOX), [view], config, CPU)
    return state, config, frame, view


def run(state, config, frame, prior=None, monitor=None, save=lambda s: None):
    prior = prior or BallPrior()
    priors = Priors(prior, sampler=prior)
    loop.optimize(state, priors, frame.condition, config, monitor or Monitor(), save, lambda s: None)


def ball_error(state, frame) -> float:
    cameras = ring_cameras(frame.condition, 3, 0.85, 32)
    state.field.prepare()
    error = []
    for index, truth in enumerate(ball_picture(cameras)):
        picture = render_picture(state.constrained, cameras[index], 64)
        error.append((picture.opacities - truth[3]).abs().mean())
    return float(torch.stack(error).mean())


@pytest.mark.parametrize(
    ("radius", "half_frames"),
    [(0.6, [0.85]), (0.76, [0.85, 1.0]), (0.95, [0.85, 1.0, 1.1]), (1.5, [0.85, 1.0, 1.1, 1.3])],
)
def test_the_frame_grows_until_the_object_fits(radius, half_frames):
    """Parallel rays, so that a ball of a radius reaches `radius / half_frame` of the way to the border."""
    state, config, frame, _ = toy(warm=4)
    asked = []

    class Sampler:
        def sample_views(self, cameras, **_):
            half = half_angle_tangent(frame.condition) * float(cameras.positions[0].norm())
            asked.append(round(half, 4))
            grid = (torch.arange(64) + 0.5) / 32 - 1
            disc = (grid[:, None].square() + grid.square()).sqrt() < radius / half
            return disc.float().expand(len(cameras), 4, 64, 64)

    sample_warm_start(state, Sampler(), frame.condition, config, Monitor())
    assert asked == half_frames and state.half_frame == half_frames[-1]


def test_a_frame_is_filled_as_far_as_all_silhouettes_but_two_reach():
    opacities = torch.zeros(5, 16, 16)
    assert filled_part(opacities) == 0
    opacities[:3, 8, 8:13] = 1  # the outer edge of column 12 is five of the eight pixels from the middle to the border
    opacities[3:, 0, 7] = 1
    assert filled_part(opacities) == 5 / 8
    opacities[2, 15, 3] = 0.6
    assert filled_part(opacities) == 1
    assert filled_part(opacities[:1] * 0.4) == 0 and filled_part(opacities[3:4]) == 1


@pytest.mark.parametrize(
    ("field", "steps", "limit"),
    [("dense_volume", 90, 0.05), pytest.param("hash_grid", 220, 0.1, marks=pytest.mark.slow)],
)
def test_distillation_finds_the_ball_behind_a_red_disc(field, steps, limit):
    state, config, frame, view = toy(steps=steps, field=field, hash_rate=0.02)
    before = ball_error(state, frame)
    run(state, config, frame)
    assert ball_error(state, frame) < min(limit, before / 2)
    back = render_picture(state.constrained, ring_cameras(frame.condition, 1, 0.85, 33)[0], 64)
    color = back.rgb[16, 16] / back.opacities[16, 16]
    assert color[1] > color[0] + 0.25, "the back is the prior's green"
    state.constrained.infer_surfaces(128)
    front = render_picture(state.constrained, view.camera, 128)
    inside = view.mask[0] > 0.99
    mse = (front.rgb - view.rgb.permute(1, 2, 0) * front.opacities[..., None]).square().mean(-1)[inside].mean()
    assert -10 * math.log10(mse) > 30, "the front is the picture's red although the prior wants green"


@pytest.mark.parametrize("size", [24, 32, 48], ids=["smaller", "as rendered", "larger"])
def test_warm_start_fits_sampled_views_of_any_size(size):
    state, config, frame, _ = toy(steps=0, warm=60)
    prior = BallPrior()
    prior.sample_views = lambda cameras, n_steps, **_: ball_picture(cameras.resized(size, size))
    run(state, config, frame, prior)
    assert prior.n_calls == 0 and len(state.sampled) == 4
    assert ball_error(state, frame) < 0.08


def test_loss_instead_of_the_constraint_leaves_the_front_to_compromise():
    """The article's claim on a toy: where picture and prior disagree, a loss gives in and the constraint does not."""
    error = {}
    for kind in ("inferred_depth", "loss"):
        state, config, frame, view = toy(kind, steps=60)
        run(state, config, frame)
        state.constrained.infer_surfaces(128)
        picture = render_picture(state.constrained, view.camera, 128)
        inside = view.mask[0] > 0.99
        error[kind] = float((picture.rgb - view.rgb.permute(1, 2, 0))[inside].square().mean())
    assert error["inferred_depth"] < error["loss"] / 4


def test_resumed_run_equals_an_undisturbed_one(tmp_path):
    straight, config, frame, _ = toy(steps=24, warm=16)
    run(straight, config, frame)

    class StopAt(Monitor):
        def __init__(self, state, step):
            self.state, self.step = state, step

        def command(self):
            return Command.CANCEL if self.state.step >= self.step else Command.RUN

    stopped, *_ = toy(steps=24, warm=16)
    writer = BackgroundWriter()
    save = lambda s: save_checkpoint(tmp_path, s, config, "same", writer)  # noqa: E731
    with pytest.raises(Cancelled, match="step 21 of 40"):
        run(stopped, config, frame, monitor=StopAt(stopped, 21), save=save)
    writer.wait()
    resumed, *_ = toy(steps=24, warm=16)
    assert load_checkpoint(tmp_path, resumed, config, "same") and resumed.step == 21
    run(resumed, config, frame)
    for a, b in zip(straight.field.parameters(), resumed.field.parameters()):
        assert torch.allclose(a, b, atol=1e-5)


class NotedPrior(BallPrior):
    """Remembers how large the views were, and how far the optimisation was said to be."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def gradient(self, rgba, cameras, progress, generator=None):
        self.seen.append((rgba.shape[-1], progress))
        return super().gradient(rgba, cameras, progress, generator)


def test_a_fine_stage_goes_on_with_larger_views_and_can_be_resumed(tmp_path):
    def made():
        return toy(steps=30, warm=6, fine_steps=10)

    straight, config, frame, _ = made()
    prior, rates, told = NotedPrior(), [], []

    class Watching(Monitor):
        def progress(self, progress):
            if progress.stage == "optimize":
                told.append((progress.step, progress.n_steps))
                rates.append(straight.adam.param_groups[0]["lr"] / straight.adam.param_groups[0]["initial_lr"])

    run(straight, config, frame, prior, Watching())
    assert told == [(step, 46) for step in range(1, 47)] and straight.step == 46
    assert [size for size, _ in prior.seen] == [32] * 30 + [48] * 10
    amounts = [progress for _, progress in prior.seen]
    assert amounts == pytest.approx([k / 30 for k in range(30)] + [1 + k / 10 for k in range(1, 11)])
    assert rates[35] < 0.2 and rates[36:42] == [pytest.approx((k + 1) / 20) for k in range(6)], "rates start again"
    coarse, coarse_config, *_ = toy(steps=30, warm=6)
    run(coarse, coarse_config, frame)
    assert not straight.constrained.has_shell and ball_error(straight, frame) < ball_error(coarse, frame)

    class StopIn(Monitor):
        def command(self):
            return Command.CANCEL if stopped.step >= 41 else Command.RUN

    stopped, *_ = made()
    writer = BackgroundWriter()
    save = lambda s: save_checkpoint(tmp_path, s, config, "same", writer)  # noqa: E731
    with pytest.raises(Cancelled, match="step 41 of 46"):
        run(stopped, config, frame, monitor=StopIn(), save=save)
    writer.wait()
    resumed, *_ = made()
    assert load_checkpoint(tmp_path, resumed, config, "same") and resumed.step == 41
    late = NotedPrior()
    run(resumed, config, frame, late)
    assert late.seen == prior.seen[35:]
    for a, b in zip(straight.field.parameters(), resumed.field.parameters()):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_fine_stage_needs_a_first_one():
    with pytest.raises(InputError, match="needs optimize.n_steps"):
        OptimizeConfig(n_steps=0, fine_steps=5)


def test_checkpoints_on_the_way_are_seconds_apart(monkeypatch):
    state, config, frame, _ = toy(steps=50, checkpoint_every=3)
    clock, steps = [100.0], []
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])

    class SlowPrior(BallPrior):
        def gradient(self, *args):
            clock[0] += 1.0
            return super().gradient(*args)

    run(state, config, frame, SlowPrior(), save=lambda s: steps.append(s.step))
    assert steps == [*range(3, 50, 6), 50]


def test_keep_ends_early_without_an_error():
    state, config, frame, _ = toy(steps=50)

    class KeepAt5(Monitor):
        def command(self):
            return Command.KEEP if state.step == 5 else Command.RUN

    run(state, config, frame, monitor=KeepAt5())
    assert state.step == 5


def test_pause_holds_still_and_still_shows(monkeypatch):
    state, config, frame, _ = toy(steps=3)
    commands = iter([Command.PAUSE, Command.PAUSE, Command.RUN, Command.RUN, Command.RUN])
    shown = []
    monkeypatch.setattr(loop.time, "sleep", lambda s: None)

    class Pausing(Monitor):
        def command(self):
            return next(commands)

    priors = Priors(BallPrior(), sampler=BallPrior())
    loop.optimize(state, priors, frame.condition, config, Pausing(), lambda s: None, lambda s: shown.append(s.step))
    assert shown == [0, 0, 1, 2, 3]


class BrokenPrior(BallPrior):
    def __init__(self, n_broken):
        super().__init__()
        self.n_broken = n_broken

    def gradient(self, rgba, cameras, progress, generator=None):
        result = super().gradient(rgba, cameras, progress, generator)
        return replace(result, gradient=result.gradient * float("nan")) if self.n_calls <= self.n_broken else result


def test_non_finite_steps_are_skipped_and_counted():
    state, config, frame, _ = toy(steps=8)
    run(state, config, frame, BrokenPrior(3))
    assert state.n_skipped == 3 and state.step == 8
    assert all(torch.isfinite(p).all() for p in state.field.parameters())


def test_many_non_finite_steps_end_the_run():
    state, config, frame, _ = toy(steps=30)
    with pytest.raises(OptimizationError, match="non-finite"):
        run(state, config, frame, BrokenPrior(30))


class HungryPrior(BallPrior):
    """Runs out of memory above a number of views."""

    def __init__(self, most):
        super().__init__()
        self.most = most

    def gradient(self, rgba, cameras, progress, generator=None):
        if len(rgba) > self.most:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return super().gradient(rgba, cameras, progress, generator)


def test_out_of_memory_goes_on_with_fewer_views():
    state, config, frame, _ = toy(steps=4)
    run(state, config, frame, HungryPrior(1))
    assert state.n_views == 1 and state.step == 4
    state, config, frame, _ = toy(steps=4)
    with pytest.raises(OptimizationError, match="draft"):
        run(state, config, frame, HungryPrior(0))


def run_late(state, config, frame, read, monitor=None):
    priors = Priors(sampler=BallPrior(), late=read)
    loop.optimize(state, priors, frame.condition, config, monitor or Monitor(), lambda s: None, lambda s: None)


def test_a_prior_read_after_the_fit_gives_the_same():
    state, config, frame, _ = toy(steps=6, warm=8)
    run(state, config, frame)
    later, read_at = toy(steps=6, warm=8)[0], []

    def read():
        read_at.append(later.step)
        return Priors(BallPrior())

    run_late(later, config, frame, read)
    assert read_at == [8] and later.step == 14
    assert all(torch.equal(a, b) for a, b in zip(state.field.parameters(), later.field.parameters(), strict=True))


def test_a_prior_is_read_at_once_where_nothing_is_left_to_fit_and_never_where_no_step_asks():
    read_at = []
    state, config, frame, _ = toy(steps=6, warm=8)
    state.step = 9

    def read():
        read_at.append(state.step)
        return Priors(BallPrior())

    run_late(state, config, frame, read)
    assert read_at == [9] and state.sampled is None

    class KeepAt5(Monitor):
        def command(self):
            return Command.KEEP if state.step == 5 else Command.RUN

    state, config, frame, _ = toy(steps=6, warm=8)
    run_late(state, config, frame, lambda: pytest.fail("no step asks for it"), KeepAt5())
    assert state.step == 5


def test_memory_that_runs_out_while_a_prior_is_read_is_no_matter_of_views():
    state, config, frame, _ = toy(steps=2, warm=2)

    def read():
        raise torch.cuda.OutOfMemoryError("out of memory")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        run_late(state, config, frame, read)
    assert state.n_views == 2


def test_checkpoints_refuse_what_is_not_theirs(tmp_path):
    state, config, _, _ = toy()
    assert load_checkpoint(tmp_path, state, config, "a") is False
    with BackgroundWriter() as writer:
        save_checkpoint(tmp_path, state, config, "a", writer)
    with pytest.raises(InputError, match="another picture"):
        load_checkpoint(tmp_path, state, config, "b")
    other = replace(config, field_=replace(config.field_, resolution=40))
    with pytest.raises(InputError, match="other field settings"):
        load_checkpoint(tmp_path, state, other, "a")
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="not a checkpoint"):
        load_checkpoint(tmp_path, state, config, "a")
    torch.save({"version": 0}, path)
    with pytest.raises(InputError, match="version 0"):
        load_checkpoint(tmp_path, state, config, "a")


def test_views_spread_over_sectors_and_the_range_grows(generator):
    _, config, frame, _ = toy(steps=100)

    def views(n, progress):
        numbers, reach = torch.rand(4, n, generator=generator), azimuth_reach(progress, config)
        return random_cameras(numbers, reach, 0.85, half_angle_tangent(frame.condition), 32, config.optimize)

    early, late = views(2, 0.0), views(8, 0.99)
    early_azimuth = torch.atan2(early.positions[:, 0], -early.positions[:, 1])
    assert early_azimuth.abs().max() <= 0.3 * math.pi + 1e-4
    azimuths = torch.atan2(late.positions[:, 0], -late.positions[:, 1]).sort().values
    gaps = torch.cat([azimuths.diff(), azimuths[:1] + 2 * math.pi - azimuths[-1:]])
    assert gaps.max() < 2 * (2 * math.pi / 8) + 1e-4
