"""The prior that ships: its conventions, with the shipped weights.

A post with a high red arm towards -X and a low blue one towards +X tells all sides apart.
"""

from __future__ import annotations

import pytest
import torch

from conrad_engine.cameras import Camera
from conrad_engine.config import EmbeddedPriorConfig
from conrad_engine.guidance.embedded.prior import EmbeddedPrior
from conrad_engine.guidance.embedded.weights import load, shipped_path
from conrad_engine.guidance.interfaces import ReferencePicture

from .test_embedded_prior import orbit, reference_camera, seeded

PARTS = (
    ((-0.14, -0.14, -0.6), (0.14, 0.14, 0.55), (0.3, 0.75, 0.3)),
    ((-0.55, -0.12, 0.15), (-0.14, 0.12, 0.35), (0.85, 0.1, 0.1)),
    ((0.14, -0.12, -0.2), (0.55, 0.12, 0.0), (0.1, 0.15, 0.85)),
)
"""Low corner, high corner and color of boxes."""


def signpost(camera: Camera) -> torch.Tensor:
    """Premultiplied RGBA (..., 4, h, w) of the boxes by the slab method, each side with its own shade."""
    origins, directions = camera.rays()
    nearest = torch.full(origins.shape[:-1], torch.inf)
    rgba = torch.zeros(*origins.shape[:-1], 4)
    for low, high, color in PARTS:
        first, second = (torch.tensor(low) - origins) / directions, (torch.tensor(high) - origins) / directions
        near, axis = torch.minimum(first, second).max(-1)
        is_hit = (near < torch.maximum(first, second).min(-1).values) & (near < nearest)
        shade = torch.tensor([0.75, 0.9, 1.0])[axis][..., None]
        rgba = torch.where(
            is_hit[..., None], torch.cat([torch.tensor(color) * shade, torch.ones_like(shade)], -1), rgba
        )
        nearest = torch.where(is_hit, near, nearest)
    return rgba.reshape(*rgba.shape[:-2], camera.height, camera.width, 4).movedim(-1, -3)


def red_and_blue(view: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of clearly red and clearly blue pixels."""
    difference = view[0] - view[2]
    return (difference > 0.35) & (view[0] > view[1] + 0.2), (difference < -0.35) & (view[2] > view[1] + 0.2)


def middle_of(mask: torch.Tensor) -> float:
    """Mean column, from -1 on the left to 1."""
    return float(mask.nonzero()[:, 1].float().mean()) / mask.shape[1] * 2 - 1


SHIPPED = EmbeddedPriorConfig(scale=2.0, t_start=0.98, t_end=0.2, precision="float32")


@pytest.fixture(scope="module")
def shipped() -> EmbeddedPrior:
    prior = EmbeddedPrior(SHIPPED, "cpu")
    camera = reference_camera()
    prior.set_reference(ReferencePicture(signpost(camera), camera))
    return prior


@pytest.fixture(scope="module")
def samples_and_truth(shipped):
    """Views at azimuths 0, 60 and 180 degrees, and the true ones."""
    cameras = orbit([0, 60, 180])
    return shipped.sample_views(cameras, 6, generator=seeded()), signpost(cameras)


def test_the_shipped_weights_are_of_the_published_size():
    assert sum(p.numel() for p in load().parameters()) == pytest.approx(15.4e6, rel=0.01)
    assert shipped_path().stat().st_size < 32e6


def test_the_back_has_the_red_arm_on_the_right(samples_and_truth):
    for views in samples_and_truth:
        for view, red_side in ((views[0], -1), (views[2], 1)):  # as in the picture, and the other way round
            red, blue = red_and_blue(view)
            assert red.sum() > 30 and blue.sum() > 30
            assert middle_of(red) * red_side > 0.15 and middle_of(blue) * red_side < -0.15


def test_turning_counterclockwise_shows_the_side_of_positive_x(samples_and_truth):
    for views in samples_and_truth:
        red, blue = red_and_blue(views[1])
        assert blue.sum() > 1.3 * red.sum() and blue.sum() > 30


def test_sampled_silhouettes_overlap_the_true_ones(samples_and_truth):
    masks, true_masks = (views[:, 3] > 0.5 for views in samples_and_truth)
    ious = (masks & true_masks).sum((1, 2)) / (masks | true_masks).sum((1, 2))
    # How far the arms come forward, the picture does not say.
    assert ious[0] > 0.8 and ious[2] > 0.6 and ious.min() > 0.25


def test_samples_are_premultiplied(samples_and_truth):
    samples, _ = samples_and_truth
    assert samples.min() >= 0 and samples.max() <= 1
    assert (samples[:, :3] <= samples[:, 3:] + 0.1).float().mean() > 0.99


def test_an_unknown_elevation_changes_little(shipped):
    camera = reference_camera()
    unsure = EmbeddedPrior(SHIPPED, "cpu")
    unsure.set_reference(ReferencePicture(signpost(camera), camera, is_elevation_known=False))
    views = [prior.sample_views(orbit([90]), 3, generator=seeded()) for prior in (shipped, unsure)]
    assert 0 < (views[0] - views[1]).abs().mean() < 0.1


def test_the_gradient_pulls_a_wrong_picture_towards_the_object(shipped):
    camera = orbit([0])
    truth = signpost(camera)
    wrong = truth.flip(-1)
    step = wrong - shipped.gradient(wrong, camera, 0.0, seeded()).gradient
    assert (step - truth).square().sum() < 0.6 * (wrong - truth).square().sum()
