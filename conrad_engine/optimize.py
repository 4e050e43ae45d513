"""The optimisation: a constrained field, pulled by a diffusion prior into shape. One loop, readable top to bottom."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

import torch

from .cameras import Camera
from .config import PipelineConfig
from .errors import Cancelled, OptimizationError
from .guidance.interfaces import Priors
from .monitor import Command, Monitor, Progress
from .ranks import Ranks
from .state import State, n_coarse_steps, n_total_steps
from .step import ALONE, TrainStep
from .warm_start import sample_warm_start

log = logging.getLogger(__name__)

READ_EVERY = 10
"""Steps between two looks at what a GPU has computed: it works ahead of the processor, which a look makes wait."""
MAX_BAD_STEPS = 10
"""Non-finite steps in a row that end the run."""
PAUSE_S = 0.05
SAVE_EVERY_S, SAVE_SHARE = 5.0, 0.02
"""Least time between two checkpoints on the way, and the most of all time that saving takes: a hash grid's has 140 MB."""
COMMANDS = tuple(Command)


def optimize(
    state: State,
    priors: Priors,
    condition: Camera,
    config: PipelineConfig,
    monitor: Monitor,
    save: Callable[[State], None],
    show: Callable[[State], None],
    ranks: Ranks = ALONE,
) -> None:
    """Run from `state.step` to the end of the schedule.

    Args:
        state: Changed in place.
        priors: Only what no step asks for may be missing.
        condition: The camera of the reference picture as guidance sees it; views share its angle.
        config: The job's settings; `seed` and the step number alone decide all random numbers, so a resumed run repeats.
        monitor: Watches and steers.
        save: Writes a checkpoint.
        show: Sends a preview if the monitor wants one.
        ranks: This process among several that share the views; the first one's monitor counts.

    Raises:
        Cancelled: The monitor asked for it; the checkpoint is written.
        OptimizationError: Non-finite values in a row, or out of memory at one view a step.
        GuidanceError, MissingDependency: As from reading the priors, where that is late.
    """
    n_coarse, n_total = n_coarse_steps(config), n_total_steps(config)
    n_warm = n_coarse - config.optimize.n_steps
    read_every = 1 if state.device.type == "cpu" else READ_EVERY
    if n_warm and state.sampled is None and state.step < n_warm:
        sample_warm_start(state, priors.sampler, condition, config, monitor)
        ranks.take_over([state.sampled, *state.field.state_dict().values()])
        plane = ranks.agree(math.nan if state.plane is None else state.plane)
        state.plane = None if math.isnan(plane) else plane
        save(state)
    if state.plane is not None and priors.sampler is not None:
        priors.sampler.know_mirrored(2 * state.plane)
    train_step = TrainStep(state, priors.guidance, condition, config, ranks, priors.likeness)
    terms, n_skipped, save_after = {}, state.n_skipped, 0.0
    started, first_step = time.monotonic(), state.step
    while state.step < n_total:
        command = COMMANDS[int(ranks.agree(COMMANDS.index(_wait_while_paused(state, monitor, show))))]
        if command is Command.KEEP:
            break
        if command is Command.CANCEL:
            save(state)
            raise Cancelled(f"cancelled at step {state.step} of {n_total}; the checkpoint is kept")
        if state.step >= n_warm and priors.late is not None:
            train_step.graphed.reset()  # gives the fit's memory to what is read now
            priors = priors.late()
            train_step = TrainStep(state, priors.guidance, condition, config, ranks, priors.likeness)
            started, first_step = time.monotonic(), state.step
        if state.step == n_coarse:
            started, first_step = time.monotonic(), state.step  # steps of the fine stage take longer
        try:
            found = train_step()
        except torch.cuda.OutOfMemoryError:
            _shrink(state, train_step, ranks)
            continue
        state.step += 1
        if state.step % read_every == 0 or state.step == n_total:
            n_skipped = _check_skipped(state, n_skipped)
            terms = dict(zip(found, torch.stack(list(found.values())).tolist()))
        if state.step % READ_EVERY == 0 or state.step == n_total:
            state.history.append({"step": state.step, **terms})
        eta_s = (time.monotonic() - started) / (state.step - first_step) * (n_total - state.step)
        monitor.progress(Progress("optimize", state.step, n_total, eta_s, terms, memory_bytes(state.device)))
        is_due = state.step % config.optimize.checkpoint_every == 0 and state.step < n_total
        if is_due and (now := time.monotonic()) >= save_after:
            save(state)
            spent_s = time.monotonic() - now
            save_after = now + spent_s + max(SAVE_EVERY_S, spent_s / SAVE_SHARE)
        show(state)
    save(state)


def _check_skipped(state: State, n_before: int) -> int:
    """Report steps that were skipped since the last look; several in a row end the run. Returns how many there are now."""
    n_skipped, n_in_row = state.skipped.tolist()
    if n_skipped > n_before:
        log.warning("%d steps up to step %d had non-finite values and were skipped", n_skipped - n_before, state.step)
    if n_in_row >= MAX_BAD_STEPS:
        raise OptimizationError(
            f"{MAX_BAD_STEPS} steps in a row had non-finite values; lower the learning rate (optimize.rate) or use float32 "
            "(guidance.precision=float32)"
        )
    return n_skipped


def _shrink(state: State, train_step: TrainStep, ranks: Ranks) -> None:
    """Go on with fewer views a step after the device ran out of memory; at one view, without a captured step's memory."""
    state.adam.zero_grad()
    train_step.graphed.reset()
    torch.cuda.empty_cache()
    if ranks.count > 1:
        raise OptimizationError("a GPU ran out of memory; use fewer views (optimize.n_views) or one GPU")
    if state.n_views == 1 and train_step.graphed.is_enabled:
        train_step.graphed.disable()
        log.warning("the GPU ran out of memory; going on without a captured step, which is slower")
        return
    if state.n_views == 1:
        raise OptimizationError(
            "the GPU ran out of memory even with one view a step; close other programs that use it, choose the preset "
            "draft, or run with --device cpu"
        )
    state.n_views //= 2
    log.warning("the GPU ran out of memory; going on with %d views a step", state.n_views)


def _wait_while_paused(state: State, monitor: Monitor, show: Callable[[State], None]) -> Command:
    while (command := monitor.command()) is Command.PAUSE:
        show(state)
        time.sleep(PAUSE_S)
    return command


def memory_bytes(device: torch.device) -> int:
    """Device memory in use on a GPU, resident memory of the process on a CPU (0 where it cannot be read)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return 0
