"""How high the camera of a picture seems to stand, from what the embedded prior's network makes of the picture.

The network encodes the picture once, told nothing of its elevation or lens; a small head turns means and spreads of what
three of its attention layers hold into a distribution over elevations. See MODEL_CARD.md for data, scores and limits.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ...config import HALF_FRAME
from .prior import fast_precision, resized
from .sampling import channels_last
from .unet import Reference, ViewPrior
from .weights import ELEVATION, filled, load_for_use, packed, read, shipped_path

ARCHITECTURE = "conrad-elevation-1"
"""Changes whenever weights of another version would not fit."""
LAYERS = (3, 4, 5)
"""Attention layers whose values are looked at; each on its own says more than the ones before and after."""
N_CELLS = 8
"""Cells a side that their tokens are averaged to."""
CENTERS_DEG = tuple(range(-15, 66, 5))
"""Elevations that the head weighs; pictures of -10 to 60 degrees were learned from."""
FOV_RAD = math.radians(40)
"""What the network is told of the lens, whatever it was: the true one makes the estimate no better."""
USUAL_DEG, USUAL_SPREAD_DEG = 15.0, 20.0
"""Mean and standard deviation of the elevations that people take pictures from. The head learned from all alike."""
MAX_SPREAD_DEG = 13.0
"""With a larger spread the estimate of a picture from a usual elevation is no better than the default."""


class ElevationEstimate(NamedTuple):
    elevation_deg: float
    """Above the object's horizon; positive looks down on it."""
    spread_deg: float
    """Standard deviation."""

    @property
    def is_sure(self) -> bool:
        """Whether it is worth more than the usual elevation."""
        return self.spread_deg <= MAX_SPREAD_DEG


class ElevationHead(nn.Module):
    """Scores of `CENTERS_DEG` from a picture's features."""

    def __init__(self, n_features: int, width: int = 128, dropout: float = 0.3) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(n_features))
        self.register_buffer("scale", torch.ones(n_features))
        self.layers = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(n_features, width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, len(CENTERS_DEG)),
        )

    def forward(self, features: Float[Tensor, "n features"]) -> Float[Tensor, "n centers"]:
        return self.layers((features - self.center) / self.scale)


def picture_features(
    net: ViewPrior, pictures: Float[Tensor, "n 4 size size"], cast: torch.autocast
) -> Float[Tensor, "n features"]:
    """Mean and standard deviation over the picture of each channel of the values of `LAYERS`.

    Args:
        pictures: Premultiplied RGBA in [0, 1], framed as the prior's reference pictures.
        cast: The precision to compute in.
    """
    one = torch.ones(len(pictures), device=pictures.device)
    tan_half = math.tan(FOV_RAD / 2)
    camera = torch.tensor([0.0, 0.0, HALF_FRAME / tan_half, tan_half], device=pictures.device).expand(len(pictures), 4)
    nothing_known = Reference(camera, 0 * one, one, 0 * one, 0 * one)
    with torch.no_grad(), cast:
        layers = net.encode(channels_last(resized(pictures, net.size) * 2 - 1), nothing_known)
    cells = torch.cat([_in_cells(layers[index][1].float().flatten(2)) for index in LAYERS], 2)
    return torch.cat([cells.mean(1), cells.std(1, correction=0)], 1)


def _in_cells(tokens: Float[Tensor, "n tokens channels"]) -> Float[Tensor, "n cells channels"]:
    side = math.isqrt(tokens.shape[1])
    picture = tokens.transpose(1, 2).unflatten(2, (side, side))
    return F.adaptive_avg_pool2d(picture, N_CELLS).flatten(2).transpose(1, 2)


def as_usual(scores: Float[Tensor, "n centers"]) -> Float[Tensor, "n centers"]:
    """Scores that take into account from where people take pictures: Bayes' rule with a bell of `USUAL_DEG`."""
    centers = torch.tensor(CENTERS_DEG, dtype=scores.dtype, device=scores.device)
    return scores - ((centers - USUAL_DEG) / USUAL_SPREAD_DEG) ** 2 / 2


def mean_and_spread(scores: Float[Tensor, "n centers"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Mean and standard deviation, in degrees, of the distributions that scores stand for."""
    chances, centers = scores.softmax(1), torch.tensor(CENTERS_DEG, dtype=scores.dtype, device=scores.device)
    mean = chances @ centers
    return mean, (chances * (centers - mean[:, None]) ** 2).sum(1).sqrt()


def estimate_elevation(
    picture: Float[Tensor, "4 size size"], device: torch.device, weights: Path | str = "", prior: Path | str = ""
) -> ElevationEstimate:
    """Estimate the elevation of the camera that took a picture.

    Args:
        picture: The object as `condition_picture` gives it: premultiplied RGBA in [0, 1], the silhouette's longer side 80 %
            of the frame.
        weights, prior: Files of the head and of the network it was trained on; the shipped ones when empty.

    Raises:
        GuidanceError: Weights are missing, damaged or of another architecture.
    """
    dtype = fast_precision(device)
    net = load_for_use(prior, device, dtype)
    head = load(weights).to(device)
    cast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with torch.no_grad():
        scores = head(picture_features(net, picture.to(device, torch.float32)[None], cast))
    mean, spread = mean_and_spread(as_usual(scores.cpu()))
    return ElevationEstimate(float(mean), float(spread))


def to_bytes(head: ElevationHead, notes: dict[str, str] | None = None) -> bytes:
    """The head as a file of weights; `notes` go to its header too."""
    return packed(head, ARCHITECTURE, notes)


def load(path: Path | str = "") -> ElevationHead:
    """The head with weights from a file, on the CPU in fp32; the shipped ones when no path is given.

    Raises:
        GuidanceError: There is no such file, it is damaged, or it is for another architecture.
    """
    path = Path(path) if path else shipped_path(ELEVATION)
    _, tensors = read(path, ARCHITECTURE)
    head = ElevationHead(max(tensors["center"].numel() if "center" in tensors else 0, 1))
    return filled(head, tensors, path)
