"""How well shapes agree: surface points, Chamfer distance, F-score, alignment, and the soundness of a mesh."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

F_SCORE_DISTANCE = 0.05
"""Points nearer than this count as matched; longest side of the truth 1."""
N_POINTS = 20_000
N_ALIGN_POINTS = 4_000


def sample_surface(vertices: np.ndarray, faces: np.ndarray, n_points: int, rng: np.random.Generator) -> np.ndarray:
    """(n_points, 3): points on a mesh, uniform by area; none (0, 3) where the mesh has no area."""
    corners = np.asarray(vertices, np.float64)[faces]
    areas = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    if len(areas) == 0 or areas.sum() <= 0:
        return np.zeros((0, 3))
    chosen = corners[rng.choice(len(areas), n_points, p=areas / areas.sum())]
    # Points of the parallelogram beyond the diagonal are folded back into the triangle.
    a, b = rng.random((2, n_points, 1))
    folded = a + b > 1
    a, b = np.where(folded, 1 - a, a), np.where(folded, 1 - b, b)
    return chosen[:, 0] + a * (chosen[:, 1] - chosen[:, 0]) + b * (chosen[:, 2] - chosen[:, 0])


@dataclass(frozen=True)
class ScaleTranslation:
    """points -> scale * points + translation."""

    scale: float
    translation: np.ndarray

    def __call__(self, points: np.ndarray) -> np.ndarray:
        return self.scale * points + self.translation


def box_alignment(points: np.ndarray, truth: np.ndarray) -> ScaleTranslation:
    """Matches the centers and the diagonals of the bounding boxes."""
    (low, high), (low_true, high_true) = ((x.min(axis=0), x.max(axis=0)) for x in (points, truth))
    scale = float(np.linalg.norm(high_true - low_true) / max(np.linalg.norm(high - low), 1e-12))
    return ScaleTranslation(scale, (low_true + high_true) / 2 - scale * (low + high) / 2)


def align(points: np.ndarray, truth: np.ndarray, n_iterations: int = 30) -> ScaleTranslation:
    """Scale and translation (no rotation) that bring surface points onto the truth's.

    From two starts, the points as they are and the matched bounding boxes: every iteration pairs each point with the
    nearest of the other set, in both directions (one direction alone would shrink or grow the shape), and solves the
    pairs for scale and translation by least squares. Of both ends the one with the smaller Chamfer distance is taken.
    """
    tree = cKDTree(truth)
    starts = [ScaleTranslation(1.0, np.zeros(3)), box_alignment(points, truth)]
    ends = [_refine(start, points, truth, tree, n_iterations) for start in starts]
    return min(ends, key=lambda end: chamfer(end(points), truth))


def _refine(
    start: ScaleTranslation, points: np.ndarray, truth: np.ndarray, tree: cKDTree, n_iterations: int
) -> ScaleTranslation:
    current = start
    for _ in range(n_iterations):
        moved = current(points)
        to_truth, to_points = tree.query(moved)[1], cKDTree(moved).query(truth)[1]
        found = _least_squares(np.concatenate([points, points[to_points]]), np.concatenate([truth[to_truth], truth]))
        change = np.abs(found(points) - moved).max()
        current = found
        if change < 1e-5 * np.ptp(truth, axis=0).max():
            break
    return current


def _least_squares(sources: np.ndarray, targets: np.ndarray) -> ScaleTranslation:
    """The scale and translation with the smallest sum of |s p + t - q|²."""
    mean, mean_target = sources.mean(axis=0), targets.mean(axis=0)
    centered = sources - mean
    scale = float((centered * (targets - mean_target)).sum() / max((centered**2).sum(), 1e-12))
    scale = max(scale, 1e-3)
    return ScaleTranslation(scale, mean_target - scale * mean)


def nearest_distances(points: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of every point to the truth, and of every true point to the points."""
    return cKDTree(truth).query(points)[0], cKDTree(points).query(truth)[0]


def chamfer(points: np.ndarray, truth: np.ndarray) -> float:
    """Mean of the two mean distances to the nearest point of the other set (not squared, not summed)."""
    to_truth, to_points = nearest_distances(points, truth)
    return float((to_truth.mean() + to_points.mean()) / 2)


def f_score(points: np.ndarray, truth: np.ndarray, distance: float = F_SCORE_DISTANCE) -> float:
    """Harmonic mean of the shares of points, and of true points, that have the other set within `distance`."""
    return _f_score(*nearest_distances(points, truth), distance)


def _f_score(to_truth: np.ndarray, to_points: np.ndarray, distance: float) -> float:
    precision, recall = (to_truth < distance).mean(), (to_points < distance).mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall > 0 else 0.0


def shape_scores(vertices: np.ndarray, faces: np.ndarray, truth_points: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Chamfer distance and F-score of a mesh, as it stands and after alignment.

    Lengths are in units of the truth's longest side. Keys: `chamfer`, `f_score` (aligned), `chamfer_unaligned`,
    `f_score_unaligned`, `scale` (the alignment's; above 1 the mesh was too small).
    """
    rng = np.random.default_rng(seed)
    points = sample_surface(vertices, faces, N_POINTS, rng)
    if len(points) == 0:
        return {}
    unit = np.ptp(truth_points, axis=0).max()
    points, truth = points / unit, truth_points / unit
    few = [x[rng.permutation(len(x))[:N_ALIGN_POINTS]] for x in (points, truth)]
    alignment = align(*few)
    scores = {"scale": alignment.scale}
    for suffix, moved in (("", alignment(points)), ("_unaligned", points)):
        to_truth, to_points = nearest_distances(moved, truth)
        scores[f"chamfer{suffix}"] = float((to_truth.mean() + to_points.mean()) / 2)
        scores[f"f_score{suffix}"] = _f_score(to_truth, to_points, F_SCORE_DISTANCE)
    return scores


def topology(vertices: np.ndarray, faces: np.ndarray) -> dict[str, float]:
    """Parts and edges of a mesh whose vertices were welded by position (UV seams split them in a file).

    Keys: `components`, `manifold_edges` (share of edges with exactly two triangles; 1 is watertight and manifold),
    `boundary_edges` (share with one), `n_faces`.
    """
    if len(faces) == 0:
        return {"components": 0, "manifold_edges": 0.0, "boundary_edges": 0.0, "n_faces": 0}
    welded = weld(vertices)[faces]
    welded = welded[(welded != np.roll(welded, 1, axis=1)).all(axis=1)]
    edges = np.sort(np.concatenate([welded[:, [0, 1]], welded[:, [1, 2]], welded[:, [2, 0]]]), axis=1)
    unique, counts = np.unique(edges, axis=0, return_counts=True)
    n = int(welded.max()) + 1
    _, labels = connected_components(coo_matrix((np.ones(len(unique)), unique.T), shape=(n, n)), directed=False)
    return {
        "components": int(len(np.unique(labels[welded]))),
        "manifold_edges": float((counts == 2).mean()),
        "boundary_edges": float((counts == 1).mean()),
        "n_faces": int(len(faces)),
    }


def weld(vertices: np.ndarray, tolerance: float = 1e-6) -> np.ndarray:
    """(n_vertices,): the same number for vertices at the same place, to `tolerance` of the longest side."""
    step = max(float(np.ptp(vertices, axis=0).max()) * tolerance, 1e-12)
    return np.unique(np.round(np.asarray(vertices, np.float64) / step).astype(np.int64), axis=0, return_inverse=True)[
        1
    ].reshape(-1)
