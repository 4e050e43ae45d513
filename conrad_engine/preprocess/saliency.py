"""Which parts of a picture stand out from its border: robust background detection.

Zhu et al. 2014, "Saliency Optimization from Robust Background Detection" (CVPR), with the paper's constants. Names:
`appearance` d_app, `geodesic` d_geo, `area` Area (eq. 3), `border_length` Len_bnd (eq. 4), `connectivity` BndCon (eq. 5),
`background` ω_bg (eq. 6), `contrast` wCtr (eq. 8).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.sparse.csgraph import dijkstra
from skimage.segmentation import slic

N_PATCHES = 250
SIGMA_COLOR, SIGMA_SPACE, SIGMA_BORDER = 10.0, 0.25, 1.0
MU = 0.1


def border_saliency(lab: Float[ndarray, "height width 3"]) -> Float[ndarray, "height width"]:
    """Saliency of each pixel, 0 to 1; all zero if the picture is of one color."""
    height, width = lab.shape[:2]
    patches = slic(lab, N_PATCHES, compactness=20, convert2lab=False, start_label=0, enforce_connectivity=True)
    n = int(patches.max()) + 1
    counts = np.bincount(patches.ravel(), minlength=n)
    v, u = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    means = np.stack(
        [
            np.bincount(patches.ravel(), weights=x.ravel(), minlength=n) / counts
            for x in (*np.moveaxis(lab, -1, 0), u, v)
        ],
        -1,
    )
    on_border = np.zeros(n, bool)
    for line in (patches[0], patches[-1], patches[:, 0], patches[:, -1]):
        on_border[line] = True
    appearance = np.linalg.norm(means[:, None, :3] - means[None, :, :3], axis=-1)
    neighbors = _neighbors(patches, n)
    background = _background(appearance, neighbors | (on_border[:, None] & on_border[None]), on_border)
    nearness = np.exp(-((means[:, None, 3:] - means[None, :, 3:]) ** 2).sum(-1) / (2 * SIGMA_SPACE**2))
    contrast = (appearance * nearness * background).sum(1)
    contrast /= max(contrast.max(), 1e-6)
    saliency = _optimized(contrast, background, appearance, neighbors)
    return _stretched(saliency)[patches].astype(np.float32)


def _neighbors(patches: ndarray, n: int) -> ndarray:
    touching = np.zeros((n, n), bool)
    for a, b in ((patches[:, 1:], patches[:, :-1]), (patches[1:], patches[:-1])):
        touching[a.ravel(), b.ravel()] = touching[b.ravel(), a.ravel()] = True
    np.fill_diagonal(touching, False)
    return touching


def _background(appearance: ndarray, linked: ndarray, on_border: ndarray) -> ndarray:
    """Probability that a patch belongs to the background: long border for the area it spans (eq. 2 to 6)."""
    # Zero means "no edge" to the solver, so that equal neighbors get a tiny length.
    geodesic = dijkstra(np.where(linked, np.maximum(appearance, 1e-6), 0), directed=False)
    alike = np.exp(-(geodesic**2) / (2 * SIGMA_COLOR**2))
    area, border_length = alike.sum(1), alike[:, on_border].sum(1)
    connectivity = border_length / np.sqrt(area)
    return 1 - np.exp(-(connectivity**2) / (2 * SIGMA_BORDER**2))


def _optimized(contrast: ndarray, background: ndarray, appearance: ndarray, neighbors: ndarray) -> ndarray:
    """Minimum of eq. 9: background towards 0, contrast towards 1, neighbors alike; a linear system."""
    smooth = np.where(neighbors, np.exp(-(appearance**2) / (2 * SIGMA_COLOR**2)) + MU, 0)
    system = np.diag(background + contrast + smooth.sum(1)) - smooth
    return np.linalg.solve(system + 1e-9 * np.eye(len(contrast)), contrast)


def _stretched(values: ndarray) -> ndarray:
    spread = values.max() - values.min()
    return (values - values.min()) / spread if spread > 1e-6 else np.zeros_like(values)
