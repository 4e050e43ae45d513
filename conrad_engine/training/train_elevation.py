"""Trains the head that guesses a picture's elevation, on the embedded prior's frozen features, and scores it.

    python -m conrad_engine.training.train_elevation --pool POOL --out DIR [--sources green] [--prior prior.safetensors]

Every training object is rendered a few times (`elevation_views`), changed as the prior's own references are, half of the
pictures as if cut out of photos, and encoded once by the frozen network; then the head trains in a minute. Every sixteenth
training object is held back: its views set the factor on the scores that makes the spread honest. Writes
`elevation.safetensors` and `elevation_scores.json` with the scores on the validation objects, clean and degraded. Encoding
takes nearly all of the time: about 25 views a second on a quiet CPU core that multiplies bfloat16.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ConradError
from ..guidance.embedded.elevation import (
    CENTERS_DEG,
    MAX_SPREAD_DEG,
    ElevationHead,
    as_usual,
    mean_and_spread,
    picture_features,
    to_bytes,
)
from ..guidance.embedded.prior import fast_precision
from ..guidance.embedded.unet import ViewPrior
from ..guidance.embedded.weights import load
from .augment import draw_color_shifts, photo_like, shifted_colors
from .batches import P_PERMUTED_COLORS
from .elevation_views import ElevationViews, render_elevations
from .raster import compiled_library
from .sources import SOURCES, selected_sources
from .views import Task, open_pools

HELD_BACK = 16
"""Every such training object is not trained on."""
DEFAULT_DEG = 10.0
"""What the product takes without an estimate."""
USUAL_RANGE_DEG = 0.0, 30.0
"""Where most pictures of products are taken from."""
LABEL_WIDTH_DEG = 5.0
CHUNK = 32


class Examples(NamedTuple):
    """What the head learns from, one row a view."""

    features: Float[Tensor, "n features"]
    elevations_deg: Float[Tensor, " n"]
    objects: Float[Tensor, " n"]

    def rows(self, chosen: Tensor) -> Examples:
        return Examples(*(values[chosen] for values in self))


def rendered(options: argparse.Namespace, split: str, n_views: int) -> ElevationViews:
    """Views of all objects of a split, from a few processes."""
    objects = open_pools(options.pool, options.sources, split)
    if options.objects:
        objects = objects[:: max(1, len(objects) // options.objects)][: options.objects]
    tasks = [Task(row, *item, 0, "", split == "train") for row, item in enumerate(objects)]
    render = partial(render_elevations, n_views=n_views)
    if options.processes == 1:  # in this process: no fork, which other libraries' threads would not survive
        parts = [render(task) for task in tasks]
    else:
        with multiprocessing.get_context("fork").Pool(options.processes) as workers:
            parts = workers.map(render, tasks, chunksize=8)
    return ElevationViews.joined(parts)


def premultiplied(views: np.ndarray) -> Float[Tensor, "n 4 h w"]:
    rgba = torch.from_numpy(views).permute(0, 3, 1, 2).float() / 255
    return torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)


def as_in_training(pictures: Float[Tensor, "n 4 h w"]) -> Float[Tensor, "n 4 h w"]:
    """As the prior's references: some with swapped color channels, half mirrored, colors shifted, half degraded."""
    n = len(pictures)
    channels = torch.rand(n, 3).argsort(1)
    channels = torch.where(torch.rand(n, 1) < P_PERMUTED_COLORS, channels, torch.arange(3))
    channels = torch.cat([channels, torch.full((n, 1), 3)], 1)
    pictures = pictures.gather(1, channels[:, :, None, None].expand_as(pictures))
    is_mirrored = torch.rand(n, 1, 1, 1) < 0.5
    pictures = torch.where(is_mirrored, pictures.flip(-1), pictures)
    return photo_like(shifted_colors(pictures, draw_color_shifts(n, pictures.device)))


def all_degraded(pictures: Float[Tensor, "n 4 h w"]) -> Float[Tensor, "n 4 h w"]:
    return photo_like(shifted_colors(pictures, draw_color_shifts(len(pictures), pictures.device)), p_untouched=0.0)


def encoded(net: ViewPrior, views: ElevationViews, change, device: torch.device) -> Examples:
    """What the network makes of all views, changed first."""
    dtype = fast_precision(device)
    cast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    parts = [
        picture_features(net, change(premultiplied(views.views[first : first + CHUNK])).to(device), cast).cpu()
        for first in range(0, len(views.views), CHUNK)
    ]
    return Examples(torch.cat(parts), torch.from_numpy(views.elevations_deg), torch.from_numpy(views.objects))


def labels(elevations_deg: Float[Tensor, " n"]) -> Float[Tensor, "n centers"]:
    """Chances of the centers: a bell around the true elevation."""
    distance = (torch.tensor(CENTERS_DEG) - elevations_deg[:, None]) / LABEL_WIDTH_DEG
    return (-(distance**2) / 2).softmax(1)


def trained(examples: Examples, epochs: int, rate: float = 1e-3, batch: int = 128) -> ElevationHead:
    """A head fitted by cross-entropy."""
    head = ElevationHead(examples.features.shape[1])
    head.center.copy_(examples.features.mean(0))
    head.scale.copy_(examples.features.std(0) + 1e-3)
    optimizer = torch.optim.AdamW(head.parameters(), rate, weight_decay=0.05)
    n_steps = epochs * -(-len(examples.elevations_deg) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, n_steps, pct_start=0.1)
    for _ in range(epochs):
        for rows in torch.randperm(len(examples.elevations_deg)).split(batch):
            now = examples.rows(rows)
            scores = head(now.features)
            loss = -(labels(now.elevations_deg) * scores.log_softmax(1)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return head.eval()


def calibrate(head: ElevationHead, held: Examples) -> float:
    """Scale the head's scores so that the spread fits the errors on views not learned from; returns the factor."""
    with torch.no_grad():
        scores = head(held.features)

    def misfit(factor: float) -> float:
        mean, spread = mean_and_spread(scores * factor)
        # Negative log-likelihood of a normal distribution.
        return float((((mean - held.elevations_deg) / spread) ** 2 / 2 + spread.log()).mean())

    factor = min(np.linspace(0.4, 2.0, 33).tolist(), key=misfit)
    with torch.no_grad():
        head.layers[-1].weight *= factor
        head.layers[-1].bias *= factor
    return factor


@torch.no_grad()
def score(head: ElevationHead, examples: Examples, constant_deg: float) -> dict[str, object]:
    """Errors in degrees of the product's estimate beside those of constant answers: over all elevations, over the usual
    ones, by elevation, and by quarters of the views from the smallest spread to the largest."""
    mean, spread = mean_and_spread(as_usual(head(examples.features)))
    truth = examples.elevations_deg
    error, default = (mean - truth).abs(), (DEFAULT_DEG - truth).abs()
    is_sure = spread <= MAX_SPREAD_DEG
    used = torch.where(is_sure, error, default)

    def summary(rows: Tensor) -> dict[str, float]:
        return {
            "views": len(truth[rows]),
            "mean_error": rounded(error[rows].mean()),
            "median_error": rounded(error[rows].median()),
            "mean_error_with_fallback": rounded(used[rows].mean()),
            "mean_error_of_constant": rounded((constant_deg - truth[rows]).abs().mean()),
            "mean_error_of_default": rounded(default[rows].mean()),
            "better_than_default": rounded((error < default)[rows].float().mean(), 3),
            "mean_spread": rounded(spread[rows].mean()),
            "root_mean_square_error": rounded(error[rows].square().mean().sqrt()),
            "within_one_spread": rounded((error < spread)[rows].float().mean(), 3),
            "within_two_spreads": rounded((error < 2 * spread)[rows].float().mean(), 3),
            "sure": rounded(is_sure[rows].float().mean(), 3),
        }

    low, high = USUAL_RANGE_DEG
    band = truth.div(10).floor().clamp(max=5)
    return {
        "all": summary(torch.ones_like(is_sure)),
        "usual": summary((truth >= low) & (truth <= high)),
        "mean_error_by_elevation": {
            f"{10 * k:.0f}..{10 * k + 10:.0f}": rounded(error[band == k].mean()) for k in band.unique().tolist()
        },
        "by_quarter_of_spread": [summary(rows) for rows in spread.argsort().chunk(4)],
    }


def rounded(value: Tensor, digits: int = 2) -> float:
    return round(float(value), digits)


def run(options: argparse.Namespace) -> dict[str, object]:
    """Render, encode, train, calibrate, score and write."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = load(options.prior).to(device).to(memory_format=torch.channels_last)
    started = time.time()

    def log(text: str) -> None:
        print(f"{time.time() - started:6.0f} s  {text}", flush=True)

    views, val = rendered(options, "train", options.views), rendered(options, "val", options.val_views)
    log(f"rendered {len(views.views)} views to train on and {len(val.views)} to validate with")
    torch.manual_seed(options.seed)
    examples = encoded(net, views, as_in_training, device)
    log("encoded those to train on")
    is_held = examples.objects % HELD_BACK == 0
    learned, held = examples.rows(~is_held), examples.rows(is_held)
    head = trained(learned, options.epochs)
    temperature = calibrate(head, held)
    log("trained")
    constant_deg = float(learned.elevations_deg.median())
    scores = {
        "objects": int(learned.objects.unique().numel()),
        "views": len(learned.elevations_deg),
        "temperature": round(temperature, 3),
        "constant_deg": round(constant_deg, 1),
        "held back": score(head, held, constant_deg),
        "validation": score(head, encoded(net, val, lambda pictures: pictures, device), constant_deg),
        "validation, degraded": score(head, encoded(net, val, all_degraded, device), constant_deg),
        "seconds": round(time.time() - started),
    }
    notes = {"sources": ",".join(options.sources), "views": str(scores["views"])}
    (options.out / "elevation.safetensors").write_bytes(to_bytes(head, notes))
    (options.out / "elevation_scores.json").write_text(json.dumps(scores, indent=1))
    return scores


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, required=True, help="folder of the pool_*.npz files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sources", type=selected_sources, default=SOURCES, help="all, green, or names with commas")
    parser.add_argument("--prior", default="", help="the network's weights; the shipped ones when left out")
    parser.add_argument("--views", type=int, default=6, help="of each training object")
    parser.add_argument(
        "--val-views", type=int, default=32, help="of each validation object, evenly from -10 to 60 degrees"
    )
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--objects", type=int, default=0, help="only so many of each split, evenly picked; 0 is all")
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count(), help="for rendering")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    compiled_library()
    print(json.dumps(run(options), indent=1))


if __name__ == "__main__":
    try:
        main()
    except ConradError as error:
        sys.exit(f"error: {error}")
