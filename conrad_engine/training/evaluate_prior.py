"""Scores full samples of the prior on the validation objects: independent and joint, at several guidance scales.

    python -m conrad_engine.training.evaluate_prior --pool POOL --weights prior.safetensors --out DIR

Every object is seen once from elevation 15, framed as the product frames a picture without a camera, and sampled at seven
azimuths on the level and seven at elevation 30. Writes `prior_scores.json` and `prior_sheet.png`. `agreement` is the mean IoU
between sampled silhouettes and the visual hull carved from all of them (the true silhouettes' own value stands in the row
`truth`).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..config import HALF_FRAME
from ..errors import ConradError
from ..guidance.embedded.prior import fast_precision
from ..guidance.embedded.sampling import ConditionedPrior
from ..guidance.embedded.unet import Reference, ViewPrior, camera_axes
from ..guidance.embedded.weights import load
from .raster import Rasterizer, default_light, fit_distance, orbit_camera
from .sheets import on_white, write_sheet
from .sources import SOURCES
from .views import POOLS, SIZE, Framing, framed, is_usable, open_pools

FOV_RAD, REFERENCE_ELEVATION_RAD = math.radians(40), math.radians(15)
AZIMUTHS_DEG = (45, 90, 135, 180, 225, 270, 315)
ELEVATIONS_DEG = (0, 30)


def seen_from_the_front(vertices: np.ndarray) -> tuple[np.ndarray, Framing]:
    """The vertices framed from azimuth 0; turned by steps of 45 degrees where that view is not usable."""
    for azimuth_deg in (0, 45, 90, 135):
        framing = Framing(FOV_RAD, REFERENCE_ELEVATION_RAD, math.radians(azimuth_deg), 0.8, is_silhouette_centered=True)
        moved = framed(vertices, framing)
        if is_usable(moved, framing):
            break
    return moved, framing


def render_set(pool: Path, most: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Views (objects, 1 + 14, 64, 64, 4) and cameras of the validation objects, the reference first; and their names."""
    tan_half = math.tan(FOV_RAD / 2)
    objects = open_pools(pool, SOURCES, "val")
    objects = objects[:: max(1, len(objects) // most)][:most] if most else objects
    views, cameras, names = [], [], []
    for source, index in objects:
        mesh = POOLS[source].mesh(index)
        vertices, framing = seen_from_the_front(mesh.vertices)
        distance = max(fit_distance(vertices, FOV_RAD, fill=0.85), 0.6 / tan_half)
        rows = [(0.0, REFERENCE_ELEVATION_RAD, HALF_FRAME / tan_half, tan_half)]
        rows += [(math.radians(a), math.radians(e), distance, tan_half) for e in ELEVATIONS_DEG for a in AZIMUTHS_DEG]
        scene = Rasterizer(replace(mesh, vertices=vertices.astype(np.float32)))
        light = default_light(framing.azimuth_rad)
        views.append(
            [
                scene.render(orbit_camera(framing.azimuth_rad + azimuth, *rest), FOV_RAD, SIZE, light)
                for azimuth, *rest, _ in rows
            ]
        )
        cameras.append(rows)
        names.append(f"{source}/{POOLS[source].keys[index]}")
    return np.array(views), np.array(cameras, np.float32), names


def psnr(squared: Tensor) -> Tensor:
    return -10 * squared.clamp(min=1e-6).log10()


def ssim(a: Float[Tensor, "b 3 h w"], b: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Structural similarity with the usual Gaussian window of 1.5 px (Wang et al. 2004)."""
    offsets = torch.arange(-5, 6, device=a.device)
    window = torch.exp(-0.5 * (offsets / 1.5) ** 2)
    kernel = (window[:, None] * window / window.sum() ** 2).expand(3, 1, 11, 11)

    def local_mean(x: Tensor) -> Tensor:
        return F.conv2d(x, kernel, groups=3)

    mean_a, mean_b = local_mean(a), local_mean(b)
    var_a, var_b = local_mean(a * a) - mean_a**2, local_mean(b * b) - mean_b**2
    covariance = local_mean(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
    return (luminance * (2 * covariance + 9e-4) / (var_a + var_b + 9e-4)).mean((1, 2, 3))


def gradient_energy(rgb: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    return rgb.diff(dim=-1).square().mean((1, 2, 3)) + rgb.diff(dim=-2).square().mean((1, 2, 3))


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boolean pictures (b, h, w)."""
    return (a & b).sum((1, 2)) / (a | b).sum((1, 2)).clamp(min=1)


def hull_agreement(masks: Tensor, cameras: Float[Tensor, "n v 4"], resolution: int = 64) -> float:
    """Mean IoU of silhouettes (n, v, h, w) with the visual hull carved from all of them, by voxels of [-1.2, 1.2]³."""
    axis = (torch.arange(resolution, device=masks.device) + 0.5) / resolution * 2.4 - 1.2
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    size, scores = masks.shape[-1], []
    for own, rows in zip(masks, cameras):
        right, up, backward, position = camera_axes(rows)
        local = [(points @ direction.T) - (position * direction).sum(1) for direction in (right, up, backward)]
        reach = -local[2] * rows[:, 3]
        uv = torch.stack([local[0] / reach, -local[1] / reach], -1).transpose(0, 1)  # v, points, 2
        inside = F.grid_sample(own[:, None].float(), uv[:, None], align_corners=False)[:, 0, 0] > 0.5
        kept = inside.all(0)
        pixels = ((uv[:, kept] + 1) / 2 * size).floor().long().clamp(0, size - 1)
        hull = torch.zeros_like(own)
        for view, uv_px in enumerate(pixels):
            hull[view, uv_px[:, 1], uv_px[:, 0]] = True
        # Voxels are coarser than pixels: close the gaps.
        hull = F.max_pool2d(hull[:, None].float(), 3, 1, 1)[:, 0]
        hull = -F.max_pool2d(-hull[:, None], 3, 1, 1)[:, 0] > 0.5
        scores.append(float(overlap(hull, own).mean()))
    return float(np.mean(scores))


def score(pictures: Tensor, truth: Tensor, cameras: Tensor) -> dict[str, object]:
    """Means over views, and by azimuth; pictures in [-1, 1], fourteen an object."""
    n_views = len(AZIMUTHS_DEG) * len(ELEVATIONS_DEG)
    a, b = on_white(pictures), on_white(truth)
    mask, true_mask = pictures[:, 3] > 0, truth[:, 3] > 0
    squared = (a - b).square().mean(1)
    foreground = (squared * true_mask).sum((1, 2)) / true_mask.sum((1, 2)).clamp(min=1)
    table = {"psnr": psnr(squared.mean((1, 2))), "foreground": psnr(foreground), "ssim": ssim(a, b)}
    table["iou"] = overlap(mask, true_mask)
    table["detail"] = gradient_energy(a) / gradient_energy(b).clamp(min=1e-6)
    result: dict[str, object] = {name: round(float(x.mean()), 4) for name, x in table.items() if name != "detail"}
    result["detail"] = round(float(table["detail"].median()), 4)
    for name in ("psnr", "iou"):
        by_azimuth = table[name].reshape(-1, len(ELEVATIONS_DEG), len(AZIMUTHS_DEG)).mean((0, 1))
        result[f"{name}_by_azimuth"] = {str(k): round(x, 3) for k, x in zip(AZIMUTHS_DEG, by_azimuth.tolist())}
    shape = (-1, n_views, *mask.shape[1:])
    result["agreement"] = round(hull_agreement(mask.reshape(shape), cameras.view(-1, n_views, 4)), 4)
    return result


@dataclass(frozen=True)
class Cases:
    """The validation objects as the prior sees them."""

    references: Float[Tensor, "n 4 h w"]
    """Premultiplied RGBA in [-1, 1], as all pictures here."""
    reference_cameras: Float[Tensor, "n 4"]
    truth: Float[Tensor, "n v 4 h w"]
    cameras: Float[Tensor, "n v 4"]

    @staticmethod
    def of(views: np.ndarray, cameras: np.ndarray, device: torch.device) -> Cases:
        rgba = torch.from_numpy(views).to(device).float().permute(0, 1, 4, 2, 3) / 255
        pictures = torch.cat([rgba[:, :, :3] * rgba[:, :, 3:], rgba[:, :, 3:]], 2) * 2 - 1
        rows = torch.from_numpy(cameras).to(device)
        return Cases(pictures[:, 0], rows[:, 0], pictures[:, 1:], rows[:, 1:])

    def scores(self, pictures: Float[Tensor, "n v 4 h w"]) -> dict[str, object]:
        return score(pictures.flatten(0, 1), self.truth.flatten(0, 1), self.cameras.flatten(0, 1))


@dataclass(frozen=True)
class Setting:
    """One way of sampling."""

    is_joint: bool
    scale: float
    is_elevation_known: bool = True

    @property
    def name(self) -> str:
        way = f"{'joint' if self.is_joint else 'independent'}, guidance {self.scale:g}"
        return way if self.is_elevation_known else f"{way}, elevation unknown"


SETTINGS = (
    *(Setting(False, scale) for scale in (1.0, 2.0)),
    *(Setting(True, scale) for scale in (1.0, 1.5, 2.0, 3.0)),
    Setting(True, 2.0, is_elevation_known=False),
)
SHOWN = Setting(False, 2.0), Setting(True, 2.0)
"""Those on the sheet."""


def sampled(net: ViewPrior, cases: Cases, setting: Setting, n_steps: int, chunk: int) -> Float[Tensor, "n v 4 h w"]:
    """All views of all objects from noise, `chunk` objects at a time."""
    device = cases.references.device
    dtype = fast_precision(device)
    cast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    generator, parts = torch.Generator(device).manual_seed(0), []
    for first in range(0, len(cases.references), chunk):
        rows = slice(first, first + chunk)
        ones = torch.ones_like(cases.reference_cameras[rows, 0])
        facts = Reference(cases.reference_cameras[rows], ones * setting.is_elevation_known, ones, 0 * ones, 0 * ones)
        prior = ConditionedPrior(net, cases.references[rows], facts, cast)
        cameras = cases.cameras[rows].flatten(0, 1)
        pictures = prior.sample(cameras, n_steps, setting.scale, generator, setting.is_joint)
        parts.append(pictures.unflatten(0, cases.cameras[rows].shape[:2]))
    return torch.cat(parts)


def write_comparison(cases: Cases, kept: dict[str, Tensor], path: Path, n_shown: int) -> None:
    """Of some objects three rows at elevation 30: the input and the true views, independent samples, joint samples."""
    rows, n, half = [], len(cases.references), len(AZIMUTHS_DEG)
    blank = -torch.ones_like(cases.references[:1])
    for i in range(0, n, max(1, n // n_shown)):
        rows.append(torch.cat([cases.references[i : i + 1], cases.truth[i, half:]]))
        rows += [torch.cat([blank, kept[setting.name][i, half:]]) for setting in SHOWN]
    write_sheet(rows, path, n_columns=3)


def evaluate(options: argparse.Namespace) -> dict[str, object]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    views, camera_rows, names = render_set(options.pool, options.objects)
    cases = Cases.of(views, camera_rows, device)
    net = load(options.weights).to(device).to(memory_format=torch.channels_last)
    results: dict[str, object] = {
        "objects": len(names),
        "weights": options.weights or "shipped",
        "steps": options.steps,
        "copy of the input": cases.scores(cases.references[:, None].expand_as(cases.truth)),
        "truth": cases.scores(cases.truth),
    }
    kept: dict[str, Tensor] = {}
    for setting in SETTINGS:
        start = time.time()
        pictures = sampled(net, cases, setting, options.steps, options.chunk)
        seconds = round(time.time() - start, 1)
        results[setting.name] = {**cases.scores(pictures), "seconds": seconds}
        if setting in SHOWN:
            kept[setting.name] = pictures.cpu()
        print(setting.name, json.dumps(results[setting.name]), flush=True)
    on_cpu = Cases(*(getattr(cases, field.name).cpu() for field in fields(Cases)))
    write_comparison(on_cpu, kept, options.out / "prior_sheet.png", options.shown)
    results["names"] = names
    return results


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--weights", default="", help="the shipped ones when left out")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--objects", type=int, default=0, help="only so many; 0 is all")
    parser.add_argument("--chunk", type=int, default=8, help="objects sampled at once; fewer need less memory")
    parser.add_argument("--shown", type=int, default=30, help="objects on the sheet")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    results = evaluate(options)
    (options.out / "prior_scores.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    try:
        main()
    except ConradError as error:
        sys.exit(f"error: {error}")
