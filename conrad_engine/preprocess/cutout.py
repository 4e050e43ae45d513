"""The built-in matting, without any learned model: plain backdrops by their color, busy ones by GrabCut.

A backdrop counts as plain when most of the picture's border fits one smooth color field. Then the object is what does
not fit it and is no soft shadow on it. Otherwise several GrabCut runs (Rother et al. 2004), started from rectangles and
from saliency, compete, and the one whose outline follows edges and whose colors stand apart wins.
"""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from ..errors import InputError
from .foreground import spread
from .saliency import border_saliency

Rgb = Float[ndarray, "height width 3"]
Mask = Float[ndarray, "height width"]
Region = Bool[ndarray, "height width"]

WORK_SIDE = 1024
"""Longest side, pixels, at which the outline is found; its soft edge is found at full size."""
COARSE_SIDE = 256
"""Longest side at which the GrabCut starts compete."""
PLAIN_SHARE = 0.75
"""Share of the border that has to fit the backdrop's color field."""
LOOSE, NOISE_FACTOR, LOOSEST = 5.0, 6.0, 9.0
"""Color difference (CIE76) to the backdrop that still counts as backdrop: at least, times its noise, at most."""
SHADOW_DARKEST = 0.4
"""Light left in the darkest shadow that is recognized; darker ones stay with the object."""
SHADOW_EDGE = 1.2
"""Largest color difference a pixel within a soft shadow."""
GAP, SHADOW_GAP = 2, 5
"""Half widths, pixels, of the gaps in an object's outline that backdrop and shadow do not pass."""
REFINED_BAND = 0.008
"""Half width, as share of the longest side, of the band in which the coarse outline may still move."""
SMALL_HOLE = 0.02
"""Holes before a busy background are filled if smaller than this share of the object: more often a part than a view."""
MIN_SHARE, MAX_SHARE = 0.002, 0.95
"""Share of the picture an object has to have."""


def cut_out(rgb: Rgb) -> tuple[Mask, str]:
    """Soft mask of the most prominent object, and how it was found: `backdrop` or `grabcut`.

    Raises:
        InputError: Nothing stands out from the background.
    """
    work = _at_most(rgb, WORK_SIDE)
    lab = _lab(work)
    backdrop, noise = fit_backdrop(lab)
    inside = busy_object(work) if backdrop is None else plain_object(lab, backdrop, noise)
    share = float(inside.mean())
    if not MIN_SHARE <= share <= MAX_SHARE:
        raise InputError(
            f"no object stands out from the background ({share:.1%} of the picture differs from it): "
            "use a picture with one clear object, or give a mask"
        )
    return soften(rgb, inside), "grabcut" if backdrop is None else "backdrop"


def fit_backdrop(lab: Rgb) -> tuple[Rgb | None, float]:
    """A smooth color field (quadratic in x and y) of the picture's border, and how far its pixels scatter about it.

    Returns:
        None if too little of the border fits.
    """
    height, width = lab.shape[:2]
    v, u = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    basis = np.stack([np.ones_like(u), u, v, u * u, u * v, v * v], -1)
    band = max(2, round(0.025 * min(height, width)))
    at_border = np.ones((height, width), bool)
    at_border[band:-band, band:-band] = False
    colors, terms = lab[at_border], basis[at_border]
    # The median's neighborhood first: an object that touches the border must not bend the field.
    fits = np.linalg.norm(colors - np.median(colors, axis=0), axis=-1) < 25
    for _ in range(6):
        if fits.mean() < PLAIN_SHARE:
            return None, 0.0
        weights = np.linalg.lstsq(terms[fits], colors[fits], rcond=None)[0]
        errors = np.linalg.norm(colors - terms @ weights, axis=-1)
        noise = float(np.median(errors[fits]))
        fits = errors < _tolerance(noise)
    return (None, 0.0) if fits.mean() < PLAIN_SHARE else ((basis @ weights).astype(np.float32), noise)


def _tolerance(noise: float) -> float:
    return float(np.clip(NOISE_FACTOR * noise, LOOSE, LOOSEST))


def plain_object(lab: Rgb, backdrop: Rgb, noise: float) -> Region:
    """What differs from a plain backdrop, without soft shadows and with see-through holes."""
    tolerance = _tolerance(noise)
    # Grain has steps like an outline's; averaging what is about equal removes the one and keeps the other.
    lab = cv2.bilateralFilter(lab, 9, 3 * noise + 1e-3, 3)
    edges = _edge_strength(lab)
    flat = edges < 0.4 * tolerance
    for _ in range(3):
        difference = np.linalg.norm(lab - backdrop, axis=-1)
        outside = _flooded((difference < tolerance) & flat, GAP)
        # The field was only known at the border; what the flood reached corrects it, also behind the object.
        backdrop = cv2.GaussianBlur(spread(lab, outside.astype(np.float32)), (0, 0), 3)
    matches = difference < tolerance
    outside = _flooded(outside | (_soft_shadow(lab, backdrop) & (edges < SHADOW_EDGE)), SHADOW_GAP)
    # The flood stops short of the outline, where the picture is no longer flat.
    outside |= cv2.dilate(outside.astype(np.uint8), _disk(3)).astype(bool) & matches
    return _tidy(~outside & ~_see_through(matches & ~outside, difference, tolerance))


def _flooded(passable: Region, radius: int) -> Region:
    """What is reached from the border without squeezing through gaps of a few pixels in the object's outline."""
    wide = cv2.erode(passable.astype(np.uint8), _disk(radius), borderValue=1).astype(bool)
    reached = _joined_to_border(wide)
    return cv2.dilate(reached.astype(np.uint8), _disk(radius)).astype(bool) & passable


def _soft_shadow(lab: Rgb, backdrop: Rgb) -> Region:
    """Pixels that are the backdrop with less light: the same ratio in every channel."""
    light, full_light = np.maximum(_from_lab(lab), 1e-3) ** 2.2, np.maximum(_from_lab(backdrop), 1e-2) ** 2.2
    ratios = light / full_light
    level = ratios.mean(-1)
    same_hue = np.abs(ratios / level[..., None] - 1).max(-1) < 0.10
    return same_hue & (level > SHADOW_DARKEST) & (level < 1.02)


def _see_through(matches: Region, difference: Mask, tolerance: float) -> Region:
    """Enclosed regions that show the backdrop itself: between a chair's slats, in a handle.

    A highlight may have the backdrop's color by chance, but it fades; a hole ends at once, in something else.
    """
    n_parts, labels = cv2.connectedComponents(matches.astype(np.uint8), connectivity=4)
    areas = np.maximum(np.bincount(labels.ravel(), minlength=n_parts), 1)
    means = np.bincount(labels.ravel(), weights=difference.ravel(), minlength=n_parts) / areas
    # Each pixel up to three away belongs to the ring of one region.
    rings = cv2.dilate(labels.astype(np.float32), _disk(3)).astype(int) * (labels == 0)
    ring_sizes = np.maximum(np.bincount(rings.ravel(), minlength=n_parts), 1)
    apart = (difference > 2.5 * tolerance) & (rings > 0)
    contrast = np.bincount(rings.ravel(), weights=apart.ravel(), minlength=n_parts) / ring_sizes
    is_hole = (means < 0.35 * tolerance) & (contrast > 0.5) & (areas >= 2e-5 * matches.size + 6)
    is_hole[0] = False
    return is_hole[labels]


def busy_object(rgb: Rgb) -> Region:
    """GrabCut from several starts; the best outline is then redone at full working size in a band around it."""
    coarse = _at_most(rgb, COARSE_SIDE)
    lab = _lab(coarse)
    saliency = border_saliency(lab)
    judge = _Judge(lab, saliency)
    # GrabCut's Gaussians see other clusters in Lab than in RGB: each finds objects that the other one misses.
    images = [
        (coarse * 255).round().astype(np.uint8),
        np.clip(lab * [1.6, 2, 2] + [40, 128, 128], 0, 255).astype(np.uint8),
    ]
    tries = judge.plausible([_grab(image, start, 3) for image in images for start in _starts(saliency)])
    if not tries:
        return np.zeros(rgb.shape[:2], bool)
    # Once the object's place is known, everything beyond it teaches the background's colors.
    places = [judge.choice(tries), _majority(tries)]
    again = [_grab(image, _around(place, m), 3) for image in images for place in places for m in (0.04, 0.1)]
    return _refined(rgb, judge.choice(tries + judge.plausible(again)))


def _majority(regions: list[Region]) -> Region:
    votes = np.mean(regions, axis=0)
    return votes > min(0.5, 0.99 * votes.max())


def _around(region: Region, margin: float) -> ndarray:
    """GrabCut labels: undecided in the grown convex hull of a region, background outside."""
    labels = np.full(region.shape, cv2.GC_BGD, np.uint8)
    hull = cv2.convexHull(np.argwhere(region)[:, ::-1].astype(np.int32))
    cv2.fillConvexPoly(labels, hull, cv2.GC_PR_FGD)
    grown = cv2.dilate((labels == cv2.GC_PR_FGD).astype(np.uint8), _disk(margin * max(region.shape)))
    return np.where(grown > 0, cv2.GC_PR_FGD, labels).astype(np.uint8)


def _starts(saliency: Mask) -> list[ndarray]:
    """GrabCut label maps: rectangles of three margins, and three levels of saliency."""
    height, width = saliency.shape
    starts = []
    for margin in (0.04, 0.12, 0.2):
        labels = np.full((height, width), cv2.GC_BGD, np.uint8)
        dy, dx = max(2, round(margin * height)), max(2, round(margin * width))
        labels[dy:-dy, dx:-dx] = cv2.GC_PR_FGD
        starts.append(labels)
    for level in (0.35, 0.55, 0.75):
        labels = np.where(saliency > level, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
        labels[saliency < 0.1 * level] = cv2.GC_BGD
        labels[[0, -1]], labels[:, [0, -1]] = cv2.GC_BGD, cv2.GC_BGD
        starts.append(labels)
    return starts


def _grab(image: ndarray, labels: ndarray, n_rounds: int) -> Region | None:
    labels = labels.copy()
    try:
        cv2.setRNGSeed(0)
        cv2.grabCut(image, labels, None, np.zeros((1, 65)), np.zeros((1, 65)), n_rounds, cv2.GC_INIT_WITH_MASK)
    except cv2.error:
        return None  # one side has too few samples for its color model
    return (labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)


class _Judge:
    """How much a region looks like the object: outline on edges, colors apart, salient, central, off the border."""

    def __init__(self, lab: Rgb, saliency: Mask) -> None:
        self.bins = _color_bins(lab)
        edges = _edge_strength(lab)
        edges = np.minimum(edges / max(float(np.percentile(edges, 95)), 1e-3), 1)
        self.edges = cv2.dilate(edges, np.ones((3, 3), np.uint8))
        self.saliency = saliency

    def plausible(self, regions: list[Region | None]) -> list[Region]:
        """The regions of a size that an object may have, tidied."""
        tidied = [_filled(_tidy(region, self.saliency), self.bins) for region in regions if region is not None]
        return [region for region in tidied if MIN_SHARE <= region.mean() <= MAX_SHARE]

    def choice(self, regions: list[Region]) -> Region:
        """The region of the highest score times agreement (mean intersection over union) with the others.

        The score alone likes a clean part better than the whole object; the other starts tell it is a part.
        """
        flat = np.stack(regions).reshape(len(regions), -1).astype(np.float32)
        shared, areas = flat @ flat.T, flat.sum(1)
        agreement = (shared / (areas[:, None] + areas[None] - shared)).mean(1)
        return regions[int(np.argmax(agreement * [self.score(region) for region in regions]))]

    def score(self, inside: Region) -> float:
        height, width = inside.shape
        outline = inside & ~cv2.erode(inside.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
        on_edge = float(self.edges[outline].mean())
        inner, outer = _shares(self.bins, inside), _shares(self.bins, ~inside)
        apart = 1 - float(np.sqrt(inner * outer).sum())
        salient = float(self.saliency[inside].mean() - self.saliency[~inside].mean())
        v, u = np.argwhere(inside).mean(0) / [height, width] - 0.5
        central = float(np.exp(-(u * u + v * v) / (2 * 0.2**2)))
        rim = np.concatenate([inside[0], inside[-1], inside[:, 0], inside[:, -1]])
        free = float(np.exp(-((rim.mean() / 0.25) ** 2)))
        share = float(inside.mean())
        sized = min(share / 0.05, 1) * min((1 - share) / 0.3, 1)
        return (on_edge + apart + salient) * central * free * sized

    def _shares(self, inside: Region) -> tuple[ndarray, ndarray]:
        return tuple(np.bincount(self.bins[part], minlength=2048) / max(part.sum(), 1) for part in (inside, ~inside))


def _color_bins(lab: Rgb) -> Int[ndarray, "height width"]:
    """Coarse color of each pixel, as one of 2048 numbers."""
    return np.clip(lab / [12.5, 16, 16] + [0, 8, 8], 0, [7, 15, 15]).astype(int) @ [256, 16, 1]


def _shares(bins: Int[ndarray, "height width"], part: Region) -> Float[ndarray, " n_bins"]:
    return np.bincount(bins[part], minlength=2048) / max(int(part.sum()), 1)


def _filled(inside: Region, bins: Int[ndarray, "height width"]) -> Region:
    """Without small holes, and without those whose colors are rather the object's than those of the background nearby."""
    near = cv2.dilate(inside.astype(np.uint8), _disk(0.08 * max(inside.shape))).astype(bool)
    beyond = _joined_to_border(~inside)
    odds = np.log((_shares(bins, near & beyond) + 1e-4) / (_shares(bins, inside) + 1e-4))
    n_parts, labels = cv2.connectedComponents((~inside & ~beyond).astype(np.uint8), connectivity=4)
    is_object = np.bincount(labels.ravel(), weights=odds[bins].ravel(), minlength=n_parts) < 0
    is_object |= np.bincount(labels.ravel(), minlength=n_parts) < SMALL_HOLE * inside.sum()
    is_object[0] = False
    return inside | is_object[labels]


def _refined(rgb: Rgb, coarse: Region) -> Region:
    """Outline at working size: GrabCut decides only in a band around the coarse outline."""
    height, width = rgb.shape[:2]
    grown = cv2.resize(coarse.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR) > 0.5
    reach = max(3, round(REFINED_BAND * max(height, width)))
    brush = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    outer = cv2.dilate(grown.astype(np.uint8), brush).astype(bool)
    inner = cv2.erode(grown.astype(np.uint8), brush).astype(bool)
    labels = np.where(grown, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    labels[~outer], labels[inner] = cv2.GC_BGD, cv2.GC_FGD
    found = _grab((rgb * 255).round().astype(np.uint8), labels, 2)
    return _filled(_tidy(grown if found is None else found), _color_bins(_lab(rgb)))


def _tidy(inside: Region, saliency: Mask | None = None) -> Region:
    """The main part and what is not tiny beside it, without specks and pinholes."""
    size = 3 if max(inside.shape) > COARSE_SIDE else 1
    brush = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * size - 1, 2 * size - 1))
    closed = cv2.morphologyEx(inside.astype(np.uint8), cv2.MORPH_CLOSE, brush)
    n_parts, labels = cv2.connectedComponents(closed, connectivity=8)
    if n_parts < 2:
        return inside
    weight = np.ones(inside.shape, np.float32) if saliency is None else saliency
    v, u = np.mgrid[-1 : 1 : inside.shape[0] * 1j, -1 : 1 : inside.shape[1] * 1j]
    weight = weight * np.exp(-(u * u + v * v))
    votes = np.bincount(labels.ravel(), weights=weight.ravel(), minlength=n_parts)
    votes[0] = 0
    keep = votes >= (0.3 if saliency is not None else 0.05) * votes.max()
    keep[0] = False
    kept = keep[labels]
    filled = _small_holes_filled(kept & (closed > 0), 1e-4)
    return filled


def _small_holes_filled(inside: Region, largest_share: float) -> Region:
    n_parts, labels = cv2.connectedComponents((~inside).astype(np.uint8), connectivity=4)
    areas = np.bincount(labels.ravel(), minlength=n_parts)
    small = areas < largest_share * inside.size
    small[0] = False
    return inside | small[labels]


def soften(rgb: Rgb, inside: Region) -> Mask:
    """A soft edge at the picture's full size.

    In a narrow band around the outline, alpha is where the color lies between the object's and the background's, both
    continued from outside the band; where these two look alike, the smoothed outline decides.
    """
    height, width = rgb.shape[:2]
    smooth = cv2.resize(inside.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    smooth = cv2.GaussianBlur(smooth, (0, 0), max(0.7, 0.5 * width / inside.shape[1]))
    reach = max(1.5, 1.5 * max(height, width) / WORK_SIDE)
    far_in = cv2.distanceTransform((smooth > 0.5).astype(np.uint8), cv2.DIST_L2, 5)
    far_out = cv2.distanceTransform((smooth <= 0.5).astype(np.uint8), cv2.DIST_L2, 5)
    band = (far_in <= reach) & (far_out <= reach)
    own = spread(rgb, (far_in > reach).astype(np.float32))
    other = spread(rgb, (far_out > reach).astype(np.float32))
    across = own - other
    contrast = (across**2).sum(-1)
    # A contrast of 0.1 (26 of 255) outweighs the outline four to one.
    doubt = 0.0025
    share = (((rgb - other) * across).sum(-1) + doubt * smooth) / (contrast + doubt)
    # Thin parts have no inside to take a color from: they keep the outline.
    near_core = cv2.dilate((far_in > reach).astype(np.uint8), _disk(2 * reach)).astype(bool)
    alpha = np.where(band & near_core, share.clip(0, 1), np.where(band, smooth, smooth > 0.5))
    return alpha.astype(np.float32)


def _disk(radius: float) -> ndarray:
    side = 2 * max(1, round(radius)) + 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))


def _joined_to_border(region: Region) -> Region:
    n_parts, labels = cv2.connectedComponents(region.astype(np.uint8), connectivity=4)
    touching = np.zeros(n_parts, bool)
    for line in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        touching[line] = True
    touching[0] = False
    return touching[labels]


def _edge_strength(lab: Rgb) -> Mask:
    """Color difference a pixel, by the larger of both directions."""
    across = cv2.Scharr(lab, cv2.CV_32F, 1, 0) / 32
    down = cv2.Scharr(lab, cv2.CV_32F, 0, 1) / 32
    return np.maximum(np.linalg.norm(across, axis=-1), np.linalg.norm(down, axis=-1))


def _at_most(rgb: Rgb, side: int) -> Rgb:
    scale = side / max(rgb.shape[:2])
    if scale >= 1:
        return rgb
    size = (max(1, round(rgb.shape[1] * scale)), max(1, round(rgb.shape[0] * scale)))
    return cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)


def _lab(rgb: Rgb) -> Rgb:
    return cv2.cvtColor(np.ascontiguousarray(rgb, np.float32), cv2.COLOR_RGB2LAB)


def _from_lab(lab: Rgb) -> Rgb:
    return cv2.cvtColor(np.ascontiguousarray(lab, np.float32), cv2.COLOR_LAB2RGB).clip(0, 1)
