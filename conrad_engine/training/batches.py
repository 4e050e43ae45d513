"""Training batches from rendered rounds: all views on the training device, loaded as rounds are finished."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..guidance.embedded.sampling import channels_last
from ..guidance.embedded.unet import Layout, Reference
from .augment import draw_color_shifts, photo_like, shifted_colors
from .sources import SOURCES
from .views import N_GROUPS, N_VIEWS, SIZE

SOURCE_SHARES = dict(zip(SOURCES, (0.42, 0.18, 0.24, 0.08, 0.08)))
"""Parts of the samples; those of absent sources go to the others in proportion."""
P_UNKNOWN_ELEVATION, P_UNKNOWN_SIZE, P_NO_REFERENCE, P_PERMUTED_COLORS = 0.15, 0.2, 0.1, 0.3
SIZE_NOISE = 0.05
"""Standard deviation of the logarithm of a known size."""


class Batch(NamedTuple):
    targets: Float[Tensor, "b 4 h w"]
    """Premultiplied RGBA in [-1, 1], reference by reference."""
    cameras: Float[Tensor, "b 4"]
    picture: Float[Tensor, "r 4 h w"]
    reference: Reference


@dataclass(frozen=True)
class Round:
    """One finished round on the device."""

    views: Tensor
    """(objects, groups, views, size, size, 4) 8-bit straight RGBA."""
    cameras: Tensor
    sizes: Tensor
    """(objects, groups), 0 where unknown."""
    chances: Tensor
    """(objects,) sampling weights; 0 where rendering failed."""


class ViewStore:
    """All finished rounds of a folder; a thread of its own loads new ones while training goes on."""

    def __init__(self, rounds: list[Round], device: torch.device) -> None:
        self.rounds, self.device = rounds, device
        self._permutations = torch.tensor(list(itertools.permutations(range(3))), device=device)

    @staticmethod
    def follow(folder: Path, device: torch.device, most: int) -> ViewStore:
        """Wait for the first round, then load more in the background; beyond `most` each new one replaces the oldest."""
        store = ViewStore([], device)
        while not (folder / "done_0").exists():
            time.sleep(0.2)
        store.rounds.append(load_round(folder, 0, device))

        def load_more() -> None:
            replaced = None
            for index in itertools.count(1):
                while not (folder / f"done_{index}").exists():
                    time.sleep(0.5)
                if replaced is not None and device.type == "cuda":
                    torch.cuda.synchronize(device)  # batches of the replaced round are drawn: its memory may be used
                replaced = None
                loaded = load_round(folder, index, device)
                if len(store.rounds) < most:
                    store.rounds.append(loaded)
                else:
                    replaced, store.rounds[index % most] = store.rounds[index % most], loaded

        threading.Thread(target=load_more, daemon=True).start()
        return store

    @staticmethod
    def blank(device: torch.device, n_objects: int = 4, n_views: int = N_VIEWS, size: int = SIZE) -> ViewStore:
        """Empty views, to compile the network on before the first round is there."""
        shape = (n_objects, N_GROUPS, n_views)
        views = torch.zeros(*shape, size, size, 4, dtype=torch.uint8, device=device)
        cameras, sizes = torch.ones(*shape, 4, device=device), torch.ones(shape[:2], device=device)
        return ViewStore([Round(views, cameras, sizes, torch.ones(n_objects, device=device))], device)

    def batch(self, layout: Layout, is_training: bool = True) -> Batch:
        """A random batch with the layout's references and targets; validation gets clean pictures and all facts."""
        device, n = self.device, sum(group.n_references for group in layout)
        now = self.rounds[int(torch.randint(len(self.rounds), ()))]
        row = torch.multinomial(now.chances, n, replacement=True)
        group = torch.randint(now.views.shape[1], (n,), device=device)
        # The reference is view 0; targets are drawn from the others without repetition.
        order = torch.rand(n, now.views.shape[2] - 1, device=device).argsort(1) + 1
        owners, views = _targets(order, layout)
        reference = _premultiplied(now.views[row, group, 0])
        targets = _premultiplied(now.views[row[owners], group[owners], views])
        camera, cameras = now.cameras[row, group, 0].clone(), now.cameras[row[owners], group[owners], views].clone()
        if is_training:
            is_permuted = torch.rand(n, device=device) < P_PERMUTED_COLORS
            order = self._permutations[torch.where(is_permuted, torch.randint(6, (n,), device=device), 0)]
            reference, targets = _permuted(reference, order), _permuted(targets, order[owners])
            shifts = draw_color_shifts(n, device)
            reference, targets = shifted_colors(reference, shifts), shifted_colors(targets, shifts[owners])
            is_mirrored = torch.rand(n, device=device) < 0.5
            reference, targets = _mirrored(reference, is_mirrored), _mirrored(targets, is_mirrored[owners])
            cameras[:, 0] = torch.where(is_mirrored[owners], -cameras[:, 0], cameras[:, 0])
            reference = photo_like(reference)
        facts = _facts(camera, now.sizes[row, group], is_training)
        return Batch(channels_last(targets * 2 - 1), cameras, channels_last(reference * 2 - 1), facts)


def load_round(folder: Path, index: int, device: torch.device) -> Round:
    """Copy one finished round to the device."""
    views, cameras, sizes = (
        torch.from_numpy(np.load(folder / f"{name}_{index}.npy", mmap_mode="c"))
        for name in ("views", "cameras", "sizes")
    )
    sources = torch.from_numpy(np.load(folder / "sources.npy"))
    counts = torch.bincount(sources, minlength=len(SOURCES)).clamp(min=1)
    chances = (torch.tensor(list(SOURCE_SHARES.values())) / counts)[sources]
    chances = chances * (cameras[..., 2] > 0).flatten(1).all(1)
    if device.type == "cuda":
        # A stream of its own, so that copying does not hold up the training step.
        with torch.cuda.stream(torch.cuda.Stream(device)):
            loaded = Round(*(x.to(device) for x in (views, cameras, sizes, chances)))
            torch.cuda.current_stream(device).synchronize()
        return loaded
    return Round(*(x.to(device) for x in (views, cameras, sizes, chances)))


def _targets(order: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Each target's reference and view, reference by reference."""
    owners, views, row = [], [], 0
    for n_references, n_targets, _ in layout:
        rows = torch.arange(row, row + n_references, device=order.device)
        owners.append(rows.repeat_interleave(n_targets))
        views.append(order[row : row + n_references, :n_targets].flatten())
        row += n_references
    return torch.cat(owners), torch.cat(views)


def _premultiplied(views: Tensor) -> Float[Tensor, "b 4 h w"]:
    rgba = views.permute(0, 3, 1, 2).float() / 255
    return torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)


def _permuted(pictures: Tensor, order: Tensor) -> Tensor:
    index = torch.cat([order, torch.full_like(order[:, :1], 3)], 1)
    return pictures.gather(1, index[:, :, None, None].expand_as(pictures))


def _mirrored(pictures: Tensor, is_mirrored: Tensor) -> Tensor:
    return torch.where(is_mirrored[:, None, None, None], pictures.flip(-1), pictures)


def _facts(camera: Tensor, size: Tensor, is_training: bool) -> Reference:
    ones, is_known = torch.ones_like(size), (size > 0).float()
    log_size = torch.where(size > 0, size, 1.0).log()
    if not is_training:
        return Reference(camera, ones, ones, log_size, is_known)
    chance = torch.rand(3, len(size), device=size.device)
    return Reference(
        camera=camera,
        is_elevation_known=(chance[0] > P_UNKNOWN_ELEVATION).float(),
        is_present=(chance[1] > P_NO_REFERENCE).float(),
        log_size=log_size + torch.randn_like(log_size) * SIZE_NOISE,
        is_size_known=(chance[2] > P_UNKNOWN_SIZE).float() * is_known,
    )
