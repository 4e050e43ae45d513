"""Scores one textured mesh against the truth of a suite's object: a flat row of numbers, and what failed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from scipy.ndimage import binary_erosion

from ..errors import InputError
from ..mesh.glb import read_textured
from ..mesh.mesh import TexturedMesh
from ..mesh.outline import islands
from . import metrics
from .geometry import shape_scores, topology
from .renders import render, render_with_depth
from .suite import SuiteObject, read_object, read_rgba

VIEW_KEYS = ("psnr", "foreground", "ssim", "iou")
PRINTED_DETAIL = 0.5
PRINTED_EXCESS = 0.3
"""The back counts as printed through where the correlation of detail is above the first, and above the truth's own by the
second."""
MIN_REFERENCE_IOU = 0.9
BACK_SIZE = 256

Row = dict[str, float | int | str | bool | None | list]


def evaluate_result(folder: str | Path, truth: SuiteObject | str | Path, picture: Path | None = None) -> Row:
    """Score a result folder of the pipeline.

    Args:
        folder: With mesh.glb in the coordinates of the truth's camera.json, and metrics.json if the pipeline wrote it.
        truth: An object of a suite, or its folder.
        picture: What the pipeline was given, if not the suite's clean picture; the reference view is compared with it.

    Returns:
        See `score_mesh`; with the pipeline's own numbers under `pipeline`.

    Raises:
        InputError: The folder has no readable mesh.glb.
    """
    folder = Path(folder)
    truth = truth if isinstance(truth, SuiteObject) else read_object(truth)
    path = folder / "mesh.glb"
    if not path.is_file():
        raise InputError(f"{folder} is not a finished result: it has no mesh.glb")
    row = score_mesh(read_textured(path), truth, picture)
    own = folder / "metrics.json"
    if own.is_file():
        row["pipeline"] = json.loads(own.read_text(encoding="utf-8"))
    return row


def score_mesh(mesh: TexturedMesh | None, truth: SuiteObject, picture: Path | None = None) -> Row:
    """Score a mesh against the truth; None stands for a job that made none and scores as nothing to be seen.

    Returns:
        `novel_*`: mean over the novel views, `rear_*`: over those more than 130 degrees of azimuth away (see
        `metrics.view_scores`; `*_perceptual` where LPIPS is at hand); `detail`: gradient energy of the rear views
        against the truth's, with both energies; `reference_*`: the picture's own view at its own resolution;
        `picture_parts`: parts of its silhouette that do not touch, which as many parts of the mesh may show;
        `print_through*` and the truth's own; shape and soundness (`geometry`); `views`: every view's scores;
        `failures`: names of what went wrong.
    """
    is_empty = mesh is None or len(mesh.faces) == 0
    row: Row = {"object": truth.name, "source": str(truth.meta.get("source", ""))}
    row |= _novel_scores(None if is_empty else mesh, truth)
    row |= _reference_scores(None if is_empty else mesh, truth, picture or truth.picture_path)
    row |= {key: truth.meta.get(key) for key in ("truth_print_through", "truth_print_through_detail")}
    if mesh is not None and not is_empty:
        row |= _print_through(mesh, truth)
        row |= shape_scores(mesh.vertices, mesh.faces, truth.points)
        row |= topology(mesh.vertices, mesh.faces)
    row["failures"] = find_failures(row)
    return row


def _novel_scores(mesh: TexturedMesh | None, truth: SuiteObject) -> Row:
    perceptual = metrics.perceptual_distance()
    views: list[dict] = []
    energies, true_energies = [], []
    for view in truth.views:
        expected = view.rgba()
        ours = np.zeros_like(expected) if mesh is None else render(mesh, view.camera)
        scores = metrics.view_scores(ours, expected)
        if perceptual is not None:
            scores["perceptual"] = perceptual(metrics.on_white(ours), metrics.on_white(expected))
        views.append({"azimuth_deg": view.azimuth_deg, "elevation_deg": view.elevation_deg, **scores})
        if view.is_rear:
            energies.append(metrics.gradient_energy(ours))
            true_energies.append(metrics.gradient_energy(expected))
    rear = [scores for scores, view in zip(views, truth.views) if view.is_rear]
    keys = [*VIEW_KEYS, "perceptual"] if perceptual is not None else list(VIEW_KEYS)
    row: Row = {f"novel_{key}": mean_of(scores[key] for scores in views) for key in keys}
    row |= {f"rear_{key}": mean_of(scores[key] for scores in rear) for key in keys}
    energy, true_energy = mean_of(energies), mean_of(true_energies)
    row |= {"rear_energy": energy, "truth_rear_energy": true_energy}
    row["detail"] = energy / true_energy if energy is not None and true_energy else None
    row["views"] = views
    return row


def mean_of(values) -> float | None:
    """Mean of the finite values; None where there is none."""
    finite = [float(value) for value in values if value is not None and math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def _reference_scores(mesh: TexturedMesh | None, truth: SuiteObject, picture_path: Path) -> Row:
    """The picture's own view at its own resolution: its colors, with the true silhouette, on white."""
    picture, alpha = read_rgba(picture_path), read_rgba(truth.picture_path)[..., 3:]
    camera = truth.setup.camera.resized(picture.shape[1], picture.shape[0])
    ours = np.zeros_like(picture) if mesh is None else render(mesh, camera)
    expected = np.concatenate([picture[..., :3], alpha], -1)
    mask, own_mask = metrics.mask_of(expected), metrics.mask_of(ours)
    return {
        # Without the outermost pixel: how much of the object the soft rim shows is each renderer's own way of averaging.
        "reference_psnr": metrics.psnr(metrics.on_white(ours), metrics.on_white(expected), binary_erosion(mask)),
        # Where both cover a pixel: the colors alone, without the outline.
        "reference_psnr_common": metrics.psnr(ours[..., :3], picture[..., :3], mask & own_mask),
        "reference_ssim": metrics.ssim(metrics.on_white(ours), metrics.on_white(expected)),
        "reference_iou": metrics.mask_iou(own_mask, mask),
        "picture_parts": len(islands(mask)),
    }


def _print_through(mesh: TexturedMesh, truth: SuiteObject) -> Row:
    reference = truth.setup.camera
    scale = BACK_SIZE / max(reference.width, reference.height)
    size = round(reference.width * scale), round(reference.height * scale)
    back = metrics.back_camera(reference, truth.setup.object_center.numpy()).resized(*size)
    view, z_depths = render_with_depth(mesh, back)
    picture = read_rgba(truth.picture_path)
    return metrics.print_through(view, metrics.printed_through(picture, reference, back, z_depths))


def find_failures(row: Row) -> list[str]:
    """Names of what went wrong with an object; an empty list is a good object."""
    failures = []
    if not row.get("n_faces"):
        return ["no mesh"]
    if (row.get("components") or 0) > (row.get("picture_parts") or 1):
        failures.append(f"{row['components']} components")
    printed, own = row.get("print_through_detail"), row.get("truth_print_through_detail") or 0.0
    if printed is not None and printed > max(PRINTED_DETAIL, own + PRINTED_EXCESS):
        failures.append(f"print-through {printed:.2f}")
    if (row.get("reference_iou") or 0) < MIN_REFERENCE_IOU:
        failures.append(f"reference mask IoU {row.get('reference_iou') or 0:.2f}")
    return failures
