"""Trains the embedded prior on rendered views for a given time, on any number of GPUs (or a CPU).

    python -m conrad_engine.training.views --pool POOL --out CACHE/train --rounds 20 &
    python -m conrad_engine.training.views --pool POOL --out CACHE/val --split val &
    torchrun --nproc-per-node 2 -m conrad_engine.training.train --data CACHE/train --val CACHE/val --state RUN --export OUT \
        --plan 1080 --deadline UNIXTIME [--init weights.safetensors]

`--plan` is the training time in seconds over all calls that share `--state` (they resume its checkpoint); `--deadline` ends
this call. The learning rate falls to 0 at whichever comes first. `--export` gets the averaged weights in pieces
(`cat OUT/prior.safetensors.part* > prior.safetensors`), `train.jsonl` and `samples.png`, each written atomically.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ..graphs import WARM_UP_CALLS
from ..guidance.embedded.sampling import ConditionedPrior
from ..guidance.embedded.unet import Group, Layout, Reference, ViewPrior, alpha_sigma
from ..guidance.embedded.weights import load, to_bytes
from .batches import Batch, ViewStore
from .descent import Descent
from .sheets import write_sheet
from .views import N_VIEWS
from .workers import Workers

WIDTHS = (128, 224, 224)
WARMUP_STEPS = 400
RING = N_VIEWS - 1
"""Targets drawn together: all of a rendered group."""
EMA_DECAY = 0.9995
RING_POWER = 0.75
"""Noise times of rings are uniform numbers to this power. The root leaves a ninth for t under 1/3, and lost there."""
MOST_DISTILLED = 0.8
"""Highest noise time of small groups."""
CLOCK_STEPS, LOG_STEPS, VALIDATE_STEPS, SAVE_SECONDS = 20, 200, 1000, 120
RESERVE_SECONDS = 25
"""Kept before the deadline for the last validation, samples and export."""
PIECE_BYTES = 15 * 2**20


def training_layout(unit: int) -> Layout:
    """31 targets a unit and 5 references: what the product asks for, a ring of views drawn together and a few distilled."""
    return Group(2 * unit, RING, True), Group(unit, 4, True), Group(unit, 2, True), Group(unit, 1, True)


def count_targets(layout: Layout) -> int:
    return sum(group.n_references * group.n_targets for group in layout)


def stratified(n: int, device: torch.device) -> Float[Tensor, " n"]:
    # `randperm` would draw few numbers on the host and copy them.
    return (torch.rand(n, device=device).argsort() + torch.rand(n, device=device)) / n


def draw_times(layout: Layout, device: torch.device) -> Float[Tensor, " b"]:
    """Noise times for `training_layout`; the targets of a reference share one.

    Rings, which come first, have every time, high ones more often: there the shape is decided. The others have those of
    distillation.
    """
    counts = [group.n_references for group in layout]
    few = MOST_DISTILLED * stratified(sum(counts[1:]), device)
    times = stratified(counts[0], device) ** RING_POWER, *few.split(counts[1:])
    return torch.cat([t.repeat_interleave(group.n_targets) for t, group in zip(times, layout)])


def v_errors(net: torch.nn.Module, batch: Batch, t: Tensor, noise: Tensor, layout: Layout) -> Float[Tensor, " b"]:
    """Mean squared error of the predicted v, one number a target."""
    alpha, sigma = alpha_sigma(t)
    noisy = alpha * batch.targets + sigma * noise
    v = net(noisy, t, batch.cameras, batch.picture, batch.reference, layout).float()
    return (v - (alpha * noise - sigma * batch.targets)).square().mean((1, 2, 3))


def loss_weights(t: Tensor) -> Tensor:
    """In terms of the clean picture min(SNR + 1, 5): nearly clean pictures do not dominate (cf. arXiv:2303.09556)."""
    return (5 * (t * (torch.pi / 2)).sin().square()).clamp(max=1)


def learning_rate(step: int, progress: float, peak: float, decay_from: float) -> float:
    """Warmed up, held at `peak`, then falling linearly to 0 from the part `decay_from` of the planned time on."""
    decay = 1.0 if progress < decay_from else max(0.0, (1 - progress) / (1 - decay_from))
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * decay


@torch.no_grad()
def validate(net: ViewPrior, views: ViewStore, unit: int, cast: torch.autocast) -> dict[str, list[float]]:
    """Mean v error in four bands of t on unseen objects with fixed noise, rings and pairs of views."""
    device = views.device
    devices = [device] if device.type == "cuda" else []
    bands: dict[str, list[float]] = {}
    with torch.random.fork_rng(devices=devices):
        for name, n_targets in (("ring", RING), ("pair", 2)):
            torch.manual_seed(1)
            rows = []
            for _ in range(4):
                layout = (Group(4 * unit, n_targets, True),)
                batch = views.batch(layout, is_training=False)
                t = stratified(4 * unit, device).sort().values.repeat_interleave(n_targets)
                with cast:
                    error = v_errors(net, batch, t, torch.randn_like(batch.targets), layout)
                rows.append(error.view(4, -1).mean(1))
            bands[name] = [round(x, 5) for x in torch.stack(rows).mean(0).tolist()]
    return bands


@torch.no_grad()
def draw_samples(
    net: ViewPrior, views: ViewStore, path: Path, cast: torch.autocast, n_objects: int, n_steps: int
) -> None:
    """A sheet of unseen objects: reference and true views above, joint samples below."""
    torch.manual_seed(2)
    layout = (Group(n_objects, 7, True),)
    batch = views.batch(layout, is_training=False)
    conditioned = ConditionedPrior(net, batch.picture, batch.reference, cast)
    samples = conditioned.sample(batch.cameras, n_steps, 2.0)
    rows = []
    for i in range(n_objects):
        mine = slice(7 * i, 7 * i + 7)
        rows.append(torch.cat([batch.picture[i : i + 1], batch.targets[mine]]))
        rows.append(torch.cat([-torch.ones_like(batch.picture[:1]), samples[mine]]))
    write_sheet(rows, path)


def write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


class Trainer(Descent):
    """The network under training and the clock of one process."""

    def __init__(self, options: argparse.Namespace, workers: Workers) -> None:
        self.options = options
        widths = tuple(options.widths)
        torch.manual_seed(0)  # the same start in all processes
        net = load(options.init).requires_grad_(True).train() if options.init else ViewPrior(widths)
        super().__init__(net, workers, EMA_DECAY, options.optimizer == "muon", options.export / "train.jsonl")
        self.trained_s = 0.0
        self.cast = torch.autocast(self.device.type, torch.bfloat16)
        self.layout = training_layout(options.unit)
        self.graphed_backward = self.graphed(self._backward)
        self.compiled = self.net
        if options.compile != "none":
            self.compiled = torch.compile(self.net, dynamic=False, fullgraph=True, backend=options.compile)
        self.checkpoint = options.state / "checkpoint.pt"

    def resume(self) -> None:
        if self.checkpoint.exists():
            saved = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
            self.net.load_state_dict(saved["net"])
            self.ema.load_state_dict(saved["ema"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.step, self.trained_s = saved["step"], saved["trained_s"]

    def backward(self, views: ViewStore) -> Tensor:
        """Gradients of one batch into the buffer; returns the mean weighted error of rings and of the other groups."""
        return self.graphed_backward(views.batch(self.layout), draw_times(self.layout, self.device)).clone()

    def _backward(self, batch: tuple, t: Tensor) -> Tensor:
        targets, cameras, picture, reference = batch
        batch = Batch(targets, cameras, picture, Reference(*reference))
        with self.cast:
            errors = v_errors(self.compiled, batch, t, torch.randn_like(batch.targets), self.layout)
        weighted = errors * loss_weights(t)
        self.gradients.zero_()
        weighted.mean().backward()
        n_ring = count_targets(self.layout[:1])
        parts = weighted.detach().split([n_ring, len(weighted) - n_ring])
        return torch.stack([part.mean() for part in parts])

    def save(self) -> None:
        """Checkpoint for resuming, and the averaged weights in pieces; the first process only."""
        state = {"net": self.net.state_dict(), "ema": self.ema.state_dict()}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save({**state, "step": self.step, "trained_s": self.trained_s}, temporary)
        temporary.replace(self.checkpoint)
        data = to_bytes(self.ema, tuple(self.options.widths), {"steps": str(self.step)})
        for index in range(0, len(data), PIECE_BYTES):
            piece = self.options.export / f"prior.safetensors.part{index // PIECE_BYTES}"
            write_atomically(piece, data[index : index + PIECE_BYTES])

    def train(self, views: ViewStore, val: ViewStore) -> None:
        """The loop: until the planned time is used up or the deadline is near."""
        options, start, before = self.options, time.time(), self.trained_s
        budget = max(min(options.plan - before, options.deadline - start - RESERVE_SECONDS), 1.0)
        progress, errors, norms = before / options.plan, [], []
        mark, next_save = (start, self.step), start + 60
        while progress < 1:
            if self.workers.is_first and (self.step % VALIDATE_STEPS == 0 or options.smoke):
                self.note({"step": self.step, "val": validate(self.ema, val, options.unit, self.cast)})
            errors.append(self.backward(views))
            rate = learning_rate(self.step, progress, options.peak_rate, options.decay_from)
            norms.append(self.update(rate))
            if self.step % CLOCK_STEPS == 0 or options.smoke:
                torch.stack(errors[-1:]).sum().item()  # waits for the device, so that the clock is honest
                self.trained_s = before + time.time() - start
                progress = self.workers.agree(self.trained_s / (before + budget))
            if self.step % LOG_STEPS == 0 or options.smoke:
                mean, now = torch.stack(errors).mean(0), time.time()
                speed = (self.step - mark[1]) * count_targets(self.layout) * self.workers.count / (now - mark[0])
                shown = {"step": self.step, "trained_s": round(self.trained_s, 1), "targets_per_s": round(speed)}
                shown |= {
                    "loss": [round(x, 5) for x in mean.tolist()],
                    "norm": round(float(torch.stack(norms).mean()), 3),
                }
                shown |= {"rate": round(rate, 6), "rounds": len(views.rounds)}
                self.note(shown | {"bad": int(self.n_bad)})
                mark, errors, norms = (now, self.step), [], []
            if self.workers.is_first and time.time() > next_save:
                self.save()
                next_save = time.time() + SAVE_SECONDS

    def finish(self, val: ViewStore) -> None:
        """Last weights first, then validation and samples."""
        if not self.workers.is_first:
            return
        self.save()
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0
        result = validate(self.ema, val, self.options.unit, self.cast)
        n_targets = self.step * count_targets(self.layout) * self.workers.count
        self.note({"step": self.step, "trained_s": round(self.trained_s, 1), "targets": n_targets, "val": result})
        self.note({"peak_gib": round(peak, 1), "bad": int(self.n_bad)})
        n_objects, n_steps = (2, 2) if self.options.smoke else (20, 25)
        draw_samples(self.ema, val, self.options.export / "samples.png", self.cast, n_objects, n_steps)
        self.note({"event": "finished"})


def compile_network(trainer: Trainer) -> None:
    """Forward and backward on empty pictures until they are captured; done while the first views are still being rendered."""
    start, blank = time.time(), ViewStore.blank(trainer.device)
    for _ in range(WARM_UP_CALLS + 1):
        trainer.backward(blank)
    shown = {"event": "compiled", "seconds": round(time.time() - start, 1), "gpus": trainer.workers.count}
    trainer.note(shown | {"captured": trainer.graphed_backward.is_captured})


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="views of the training split")
    parser.add_argument("--val", type=Path, required=True, help="views of the validation split")
    parser.add_argument("--state", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--export", type=Path, required=True, help="folder of weights, log and samples")
    parser.add_argument("--plan", type=float, required=True, help="seconds of training, all calls together")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="unix time at which this call is over")
    parser.add_argument("--init", default="", help="weights to start from; take a lower peak rate then")
    parser.add_argument("--peak-rate", type=float, default=5e-4, help="largest learning rate")
    parser.add_argument("--decay-from", type=float, default=0.45, help="part of the plan after which the rate falls")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon", help="of the hidden layers' matrices")
    parser.add_argument("--unit", type=int, default=16, help="31 targets and 5 references a step and process")
    parser.add_argument("--most-rounds", type=int, default=24, help="rounds kept on the device, 2 GB each")
    parser.add_argument("--widths", type=int, nargs=3, default=WIDTHS)
    parser.add_argument("--compile", default="inductor", help="inductor, aot_eager, or none")
    parser.add_argument("--smoke", action="store_true", help="log and validate at every step")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options, workers = parse(arguments), Workers()
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    options.state.mkdir(parents=True, exist_ok=True)
    options.export.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(options, workers)
    trainer.resume()
    torch.manual_seed(int(time.time()) * 64 + workers.rank)  # other samples in each process and call
    compile_network(trainer)
    views = ViewStore.follow(options.data, workers.device, options.most_rounds)
    val = ViewStore.follow(options.val, workers.device, 1)
    trainer.note({"event": "data", "objects": len(views.rounds[0].chances), "val": len(val.rounds[0].chances)})
    trainer.train(views, val)
    trainer.finish(val)
    workers.part()


if __name__ == "__main__":
    main()
