"""Trains the detail model on rendered views for a given time, on any number of GPUs (or a CPU).

    python -m conrad_engine.training.views --pool POOL --out CACHE/val --split val --size 128 --groups 2 --views 5 --tight
    python -m conrad_engine.training.views --pool POOL --out CACHE/train --rounds 12 --size 128 --groups 2 --views 5 --tight &
    torchrun --nproc-per-node 2 -m conrad_engine.training.train_detail --data CACHE/train --val CACHE/val --export OUT \
        --plan 480 --deadline UNIXTIME [--init detail.safetensors] [--prior prior.safetensors]

The network is given true views made to look as a texture before its detail is drawn (`degrade`): half of them are true views
blurred, half what the embedded prior makes of noised ones. Parts of most views are left sharp and marked as final. The loss
counts inside the silhouette alone, where colors are not final.

`--plan` is the training time in seconds; `--deadline` ends the call. The learning rate falls to 0 at whichever comes first.
`--export` gets the averaged weights (`detail.safetensors`), `train_detail.jsonl` and at the end `detail_samples.png`, three
rows an object: reference and true views, what the network is given, what it makes of them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..graphs import WARM_UP_CALLS
from ..guidance.embedded.detail import (
    PICTURE_SIZE,
    WIDTHS,
    ConditionedDetail,
    DetailNet,
    load,
    open_pixels,
    residual_of,
    to_bytes,
)
from ..guidance.embedded.sampling import ConditionedPrior, channels_last
from ..guidance.embedded.unet import Group, Reference, ViewPrior, alpha_sigma
from ..guidance.embedded.weights import load as load_prior
from .batches import ViewStore
from .degrade import prior_guesses, random_finals, textured, warped
from .descent import Descent
from .sheets import write_sheet
from .train import learning_rate, loss_weights, stratified, write_atomically
from .workers import Workers

EMA_DECAY = 0.999
BLUR_RANGE_PX, PRIOR_BLUR_RANGE_PX = (1.0, 9.0), (0.5, 4.0)
"""Widths of the blur at 128 px, of true views and of what the prior makes of them."""
P_BENT, MOST_BENT_PX = 0.5, 4.0
"""Targets bent as meshes are whose shape is a guess, and by how much, pixels at 128 px."""
ELEVATION_NOISE_RAD = 0.07
"""Standard deviation of how wrong the elevation of a reference is taken to be; the product often guesses it."""
N_VAL_STEPS = 8
CLOCK_STEPS, LOG_STEPS, VALIDATE_STEPS, SAVE_SECONDS = 10, 100, 1000, 90
RESERVE_SECONDS = 25
"""Kept before the deadline for the last validation, samples and export."""


class DetailBatch(NamedTuple):
    """References and their views, reference by reference; pictures premultiplied in [-1, 1]."""

    targets: Float[Tensor, "b 4 h h"]
    views: Float[Tensor, "b 5 h h"]
    """What the network is given: RGBA and what is final."""
    cameras: Float[Tensor, "b 4"]
    picture: Float[Tensor, "r 4 h h"]
    references: Float[Tensor, "r 4"]
    """Cameras of the references."""
    is_present: Float[Tensor, " r"]


def bent(targets: Float[Tensor, "b 4 h h"]) -> Float[Tensor, "b 4 h h"]:
    """Some of the targets with wobbly outlines, their detail as sharp as before; premultiplied in [0, 1]."""
    chance = torch.rand(len(targets), 1, 1, 1, device=targets.device)
    amplitude = chance / P_BENT * MOST_BENT_PX * targets.shape[-1] / 128
    return torch.where(chance < P_BENT, warped(targets, amplitude), targets)


class Degrader:
    """Makes batches out of rendered views."""

    def __init__(self, prior: ViewPrior, cast: torch.autocast, n_targets: int) -> None:
        self.prior, self.cast, self.n_targets = prior, cast, n_targets

    @torch.no_grad()
    def batch(
        self, store: ViewStore, n_references: int, part_prior: float = 0.5, is_training: bool = True
    ) -> DetailBatch:
        """A random batch; of the first `part_prior` of the references the prior tells the colors."""
        clean = store.batch((Group(n_references, self.n_targets, False),), is_training)
        targets = (clean.targets + 1) / 2
        if is_training:
            targets = bent(targets)
        alpha, finals = targets[:, 3:], random_finals(clean.cameras, targets.shape[-1])
        n = round(part_prior * n_references)
        split = n * self.n_targets
        parts = []
        if n:
            facts = Reference(*(x[:n] for x in clean.reference))
            small = F.interpolate(clean.picture[:n], size=(self.prior.size, self.prior.size), mode="area")
            conditioned = ConditionedPrior(self.prior, small, facts, self.cast)
            guesses = prior_guesses(conditioned, targets[:split], clean.cameras[:split])
            parts.append(textured(guesses, alpha[:split], PRIOR_BLUR_RANGE_PX))
        if n < n_references:
            parts.append(textured(targets[split:], alpha[split:], BLUR_RANGE_PX))
        rough = torch.cat(parts)
        views = torch.cat([torch.where(finals > 0, targets, rough) * 2 - 1, finals], 1)
        references = clean.reference.camera.clone()
        if is_training:
            references[:, 1] += ELEVATION_NOISE_RAD * torch.randn_like(references[:, 1])
        return DetailBatch(
            channels_last(targets * 2 - 1),
            channels_last(views),
            clean.cameras,
            clean.picture,
            references,
            clean.reference.is_present,
        )


def v_errors(
    net: torch.nn.Module, batch: DetailBatch, t: Float[Tensor, " b"], noise: Float[Tensor, "b 3 h h"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Sums over each view's open pixels of the mean squared error of v, and the numbers of these pixels."""
    alpha, sigma = alpha_sigma(t)
    residual = residual_of(batch.targets, batch.views)
    noisy = channels_last(alpha * residual + sigma * noise)
    v = net(noisy, t, batch.views, batch.cameras, batch.picture, batch.references, batch.is_present).float()
    error = (v - (alpha * noise - sigma * residual)).square().mean(1, keepdim=True)
    is_open = open_pixels(batch.views)
    return (error * is_open).sum((1, 2, 3)), is_open.sum((1, 2, 3))


def gradient_energies(pictures: Float[Tensor, "b 4 h w"]) -> Float[Tensor, " b"]:
    """`evaluation.metrics.gradient_energy` of premultiplied pictures in [0, 1]."""
    alpha = pictures[:, 3:]
    rgb = pictures[:, :3] / alpha.clamp(min=1e-3)
    cross = torch.tensor([[0.0, 1, 0], [1, 1, 1], [0, 1, 0]], device=pictures.device)[None, None]
    outside = F.pad((alpha <= 0.5).float(), (2, 2, 2, 2), value=1.0)
    for _ in range(2):  # erosion by the cross, twice
        outside = (F.conv2d(outside, cross) > 0).float()
    inside = 1 - outside
    rows, columns = torch.gradient(rgb, dim=(2, 3))
    energy = ((rows**2 + columns**2) / 2).mean(1, keepdim=True)
    return (energy * inside).sum((1, 2, 3)) / inside.sum((1, 2, 3)).clamp(min=1)


def drawn(net: DetailNet, batch: DetailBatch, cast: torch.autocast, n_steps: int) -> Float[Tensor, "b 4 h h"]:
    """The network's views of a batch."""
    return ConditionedDetail(net, batch.picture, batch.references, cast).sample(batch.views, batch.cameras, n_steps)


def scores(pictures: Float[Tensor, "b 4 h h"], batch: DetailBatch) -> dict[str, float]:
    """PSNR over all open pixels, and gradient energy of all views as a part of the truth's; pictures in [-1, 1]."""
    is_open = open_pixels(batch.views)
    squared = ((pictures[:, :3] - batch.targets[:, :3]) / 2).square() * is_open
    psnr = -10 * (squared.sum() / (3 * is_open.sum()).clamp(min=1)).clamp(min=1e-6).log10()
    energy, truth = (gradient_energies((x + 1) / 2).sum() for x in (pictures, batch.targets))
    return {"psnr": round(float(psnr), 3), "energy": round(float(energy / truth.clamp(min=1e-9)), 3)}


@torch.no_grad()
def validate(
    net: DetailNet, degrader: Degrader, store: ViewStore, n_references: int, cast: torch.autocast, n_steps: int
) -> dict[str, dict[str, object]]:
    """Scores of what the network is given and of what it draws, on unseen objects with fixed noise; and its v error."""
    device = store.device
    result = {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for name, part in (("blurred", 0.0), ("prior", 1.0)):
            torch.manual_seed(1)
            batch = degrader.batch(store, n_references, part, is_training=False)
            t = stratified(len(batch.targets), device).sort().values
            with cast:
                sums, counts = v_errors(net, batch, t, torch.randn_like(batch.targets[:, :3]))
            bands = [round(float(s.sum() / c.sum().clamp(min=1)), 4) for s, c in zip(sums.chunk(4), counts.chunk(4))]
            given, made = scores(batch.views[:, :4], batch), scores(drawn(net, batch, cast, n_steps), batch)
            residual = residual_of(batch.targets, batch.views)[open_pixels(batch.views).expand(-1, 3, -1, -1) > 0]
            result[name] = {"v": bands, "given": given, "drawn": made, "residual_std": round(float(residual.std()), 3)}
    return result


@torch.no_grad()
def draw_samples(
    net: DetailNet,
    degrader: Degrader,
    store: ViewStore,
    path: Path,
    cast: torch.autocast,
    n_references: int,
    n_steps: int,
) -> None:
    """A sheet of unseen objects: reference and truth, what is given, what is drawn; half of them from the prior's guesses."""
    torch.manual_seed(2)
    batch = degrader.batch(store, n_references, 0.5, is_training=False)
    samples = drawn(net, batch, cast, n_steps)
    n, empty, rows = degrader.n_targets, -torch.ones_like(batch.picture[:1]), []
    for index in range(n_references):
        mine = slice(n * index, n * index + n)
        firsts = batch.picture[index : index + 1], empty, empty
        pictures = batch.targets, batch.views[:, :4], samples
        rows += [torch.cat([first, row[mine]]) for first, row in zip(firsts, pictures)]
    write_sheet(rows, path)


class Trainer(Descent):
    """The network under training, its data and the clock of one process."""

    def __init__(self, options: argparse.Namespace, workers: Workers) -> None:
        self.options, device = options, workers.device
        torch.manual_seed(0)
        net = load(options.init).requires_grad_(True).train() if options.init else DetailNet(tuple(options.widths))
        super().__init__(net, workers, EMA_DECAY, options.optimizer == "muon", options.export / "train_detail.jsonl")
        self.cast = torch.autocast(device.type, torch.bfloat16)
        prior = load_prior(options.prior).to(device).to(memory_format=torch.channels_last)
        self.degrader = Degrader(prior, self.cast, options.targets)
        self.trained_s, self.targets_a_step = 0.0, options.references * options.targets * workers.count
        self.compiled, self.graphed_backward = self.net, self.graphed(self._backward)
        if options.compile != "none":
            self.compiled = torch.compile(self.net, dynamic=False, fullgraph=True, backend=options.compile)

    def backward(self, store: ViewStore) -> Tensor:
        """Gradients of one batch into the buffer; returns the weighted errors of its halves, the prior's first."""
        batch = self.degrader.batch(store, self.options.references)
        return self.graphed_backward(batch, stratified(len(batch.targets), self.device)).clone()

    def _backward(self, batch: tuple, t: Tensor) -> Tensor:
        batch = DetailBatch(*batch)
        with self.cast:
            sums, counts = v_errors(self.compiled, batch, t, torch.randn_like(batch.targets[:, :3]))
        weighted = sums * loss_weights(t)
        self.gradients.zero_()
        (weighted.sum() / counts.sum().clamp(min=1)).backward()
        halves = zip(weighted.detach().chunk(2), counts.chunk(2))
        return torch.stack([total.sum() / count.sum().clamp(min=1) for total, count in halves])

    def save(self) -> None:
        """The averaged weights."""
        widths = tuple(module.out_channels for module in (self.net.enter, self.net.to_32, self.net.to_16))
        write_atomically(
            self.options.export / "detail.safetensors", to_bytes(self.ema, widths, {"steps": str(self.step)})
        )

    def validate(self, val: ViewStore) -> None:
        n_references = min(64, 4 * self.options.references)
        result = validate(self.ema, self.degrader, val, n_references, self.cast, self.options.steps)
        self.note({"step": self.step, "trained_s": round(self.trained_s, 1), "val": result})

    def train(self, views: ViewStore, val: ViewStore) -> None:
        """The loop: until the planned time is used up or the deadline is near."""
        options, start = self.options, time.time()
        budget = max(min(options.plan, options.deadline - start - RESERVE_SECONDS), 1.0)
        progress, errors, norms = 0.0, [], []
        mark, next_save = (start, self.step), start + SAVE_SECONDS
        while progress < 1:
            errors.append(self.backward(views))
            rate = learning_rate(self.step, progress, options.peak_rate, options.decay_from)
            norms.append(self.update(rate))
            if self.step % CLOCK_STEPS == 0 or options.smoke:
                errors[-1].sum().item()  # waits for the device, so that the clock is honest
                self.trained_s = time.time() - start
                progress = self.workers.agree(self.trained_s / budget)
            if self.step % LOG_STEPS == 0 or options.smoke:
                now = time.time()
                n_targets = (self.step - mark[1]) * self.targets_a_step
                shown = {"step": self.step, "trained_s": round(self.trained_s, 1)}
                shown |= {"targets_per_s": round(n_targets / (now - mark[0])), "rounds": len(views.rounds)}
                shown |= {"loss": [round(x, 5) for x in torch.stack(errors).mean(0).tolist()]}
                shown |= {"norm": round(float(torch.stack(norms).mean()), 3), "bad": int(self.n_bad)}
                self.note(shown | {"rate": round(rate, 6)})
                mark, errors, norms = (now, self.step), [], []
            if self.workers.is_first and (self.step % VALIDATE_STEPS == 0 or options.smoke):
                self.validate(val)
            if self.workers.is_first and time.time() > next_save:
                self.save()
                next_save = time.time() + SAVE_SECONDS

    def finish(self, val: ViewStore) -> None:
        """Last weights first, then validation and samples."""
        if not self.workers.is_first:
            return
        self.save()
        self.validate(val)
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0
        self.note({"targets": self.step * self.targets_a_step, "peak_gib": round(peak, 1), "bad": int(self.n_bad)})
        n_references = 2 if self.options.smoke else 20
        sheet = self.options.export / "detail_samples.png"
        draw_samples(self.ema, self.degrader, val, sheet, self.cast, n_references, self.options.steps)
        self.note({"event": "finished"})


def compile_network(trainer: Trainer) -> None:
    """Forward and backward on empty pictures until captured; done while the first views are still being rendered.

    Where the compiler fails, training goes on without it: slower, but a planned time is not lost.
    """
    start, options = time.time(), trainer.options
    blank = ViewStore.blank(trainer.device, n_views=options.targets + 1, size=options.size)
    try:
        trainer.backward(blank)
    except torch._dynamo.exc.TorchDynamoException as error:
        trainer.compiled = trainer.net
        trainer.note({"event": "not compiled", "reason": str(error)[:500]})
    for _ in range(WARM_UP_CALLS):
        trainer.backward(blank)
    shown = {"event": "compiled", "seconds": round(time.time() - start, 1), "gpus": trainer.workers.count}
    trainer.note(shown | {"captured": trainer.graphed_backward.is_captured})


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="views of the training split")
    parser.add_argument("--val", type=Path, required=True, help="views of the validation split")
    parser.add_argument("--export", type=Path, required=True, help="folder of weights, log and samples")
    parser.add_argument("--plan", type=float, required=True, help="seconds of training")
    parser.add_argument("--deadline", type=float, default=float("inf"), help="unix time at which this call is over")
    parser.add_argument("--init", default="", help="weights to start from; take a lower peak rate then")
    parser.add_argument("--peak-rate", type=float, default=5e-4, help="largest learning rate")
    parser.add_argument("--decay-from", type=float, default=0.45, help="part of the time after which the rate falls")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon", help="of the hidden layers' matrices")
    parser.add_argument("--prior", default="", help="the embedded prior's weights; the shipped ones when left out")
    parser.add_argument("--references", type=int, default=64, help="of a step and process; even")
    parser.add_argument("--targets", type=int, default=4, help="views of each reference; fewer than rendered")
    parser.add_argument("--size", type=int, default=PICTURE_SIZE, help="pixels a side of the rendered views")
    parser.add_argument("--steps", type=int, default=N_VAL_STEPS, help="denoising steps of validation and samples")
    parser.add_argument("--most-rounds", type=int, default=12, help="rounds kept on the device, 2.2 GB each")
    parser.add_argument("--widths", type=int, nargs=3, default=WIDTHS)
    parser.add_argument("--compile", default="inductor", help="inductor, aot_eager, or none")
    parser.add_argument("--smoke", action="store_true", help="log and validate at every step")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options, workers = parse(arguments), Workers()
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    options.export.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(options, workers)
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
