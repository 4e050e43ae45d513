"""Scores full samples of the prior on the validation objects: independent and joint, at several guidance scales.

    python -m conrad_engine.training.evaluate_prior --pool POOL --weights prior.safetensors --out DIR

Every object is seen once from elevation 15, framed as the product frames a picture, and sampled at seven azimuths on the level
and seven at elevation 30. Writes `prior_scores.json` and `prior_sheet.png`. `agreement` is the mean IoU between sampled
silhouettes and the visual hull carved from all of them (the true silhouettes' own value stands in the row `truth`).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..config import HALF_FRAME
from ..guidance.embedded.prior import fast_precision
from ..guidance.embedded.sampling import ConditionedPrior
from ..guidance.embedded.unet import Reference, camera_axes
from ..guidance.embedded.weights import load
from .raster import Rasterizer, default_light, fit_distance, orbit_camera
from .sheets import on_white, write_sheet
from .sources import SOURCES
from .views import POOLS, SIZE, Framing, framed, is_usable, open_pools

FOV_RAD, REFERENCE_ELEVATION_RAD = math.radians(40), math.radians(15)
AZIMUTHS_DEG = (45, 90, 135, 180, 225, 270, 315)
ELEVATIONS_DEG = (0, 30)
SETTINGS = ((False, 1.0), (False, 2.0), (True, 1.0), (True, 1.5), (True, 2.0), (True, 3.0))
"""(is joint, guidance scale)."""


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


def evaluate(options: argparse.Namespace) -> dict[str, object]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    views, camera_rows, names = render_set(options.pool, options.objects)
    rgba = torch.from_numpy(views).to(device).float().permute(0, 1, 4, 2, 3) / 255
    pictures = torch.cat([rgba[:, :, :3] * rgba[:, :, 3:], rgba[:, :, 3:]], 2) * 2 - 1
    cameras, n = torch.from_numpy(camera_rows).to(device), len(views)
    truth, targets = pictures[:, 1:].flatten(0, 1), cameras[:, 1:].flatten(0, 1)
    dtype = fast_precision(device)
    cast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    net = load(options.weights).to(device).to(memory_format=torch.channels_last)
    ones = torch.ones(n, device=device)
    results: dict[str, object] = {"objects": n, "weights": str(options.weights), "steps": options.steps}
    copied = pictures[:, :1].expand(-1, truth.shape[0] // n, -1, -1, -1).flatten(0, 1)
    results["copy of the input"], results["truth"] = score(copied, truth, targets), score(truth, truth, targets)
    kept: dict[str, Tensor] = {}
    for is_known in (True, False):
        facts = Reference(cameras[:, 0], ones * is_known, ones, 0 * ones, 0 * ones)
        prior = ConditionedPrior(net, pictures[:, 0], facts, cast)
        for is_joint, scale in SETTINGS if is_known else ((True, 2.0),):
            start, generator = time.time(), torch.Generator(device).manual_seed(0)
            name = f"{'joint' if is_joint else 'independent'}, guidance {scale:g}{'' if is_known else ', elevation unknown'}"
            kept[name] = prior.sample(targets, options.steps, scale, generator, is_joint)
            results[name] = {**score(kept[name], truth, targets), "seconds": round(time.time() - start, 1)}
            print(name, json.dumps(results[name]), flush=True)
    start, joint = pictures[:, 0], kept["joint, guidance 2"].unflatten(0, (n, -1))
    alone, true = kept["independent, guidance 2"].unflatten(0, (n, -1)), truth.unflatten(0, (n, -1))
    rows = []
    for i in range(0, n, max(1, n // options.shown)):
        blank = -torch.ones_like(start[i : i + 1])
        half = len(AZIMUTHS_DEG)
        rows += [torch.cat([start[i : i + 1], true[i, half:]]), torch.cat([blank, alone[i, half:]])]
        rows += [torch.cat([blank, joint[i, half:]])]
    write_sheet(rows, options.out / "prior_sheet.png", n_columns=3)
    results["names"] = names
    return results


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--weights", default="", help="the shipped ones when left out")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--objects", type=int, default=0, help="only so many; 0 is all")
    parser.add_argument("--shown", type=int, default=30, help="objects on the sheet")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    results = evaluate(options)
    (options.out / "prior_scores.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
