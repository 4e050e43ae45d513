"""Likeness by CLIP: read from the real format, the way its gradient points, which views count, and the step it is part of."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from conrad_engine import step as steps
from conrad_engine.cameras import orbit_camera
from conrad_engine.config import ClipConfig
from conrad_engine.errors import GuidanceError
from conrad_engine.graphs import WARM_UP_CALLS, GraphedStep
from conrad_engine.guidance import make_likeness
from conrad_engine.guidance.clip import spherical_distance
from conrad_engine.guidance.interfaces import ReferencePicture

from . import tiny_checkpoints as tiny
from .test_optimize import CPU, ball_picture, toy
from .test_step import SplitBallPrior, Watched

pytest.importorskip("transformers")
FRONT = orbit_camera(0.0, 0.1, 2.0, 0.7, 40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_clip(tmp_path_factory.mktemp("clip") / "model")


@pytest.fixture(scope="module")
def picture():
    return torch.rand(4, 40, 40, generator=torch.Generator().manual_seed(3)).sort(0).values


def likeness_of(folder, picture, **settings):
    likeness = make_likeness(ClipConfig(weight=1.0, model=str(folder), **settings), CPU)
    likeness.set_reference(ReferencePicture(picture, FRONT))
    return likeness


def views_at(*azimuths_deg):
    return orbit_camera(torch.deg2rad(torch.tensor(azimuths_deg)), 0.1, 2.0, 0.7, 40)


def test_the_distance_is_half_the_squared_angle(generator):
    a = torch.randn(5, 7, generator=generator)
    b = torch.randn(1, 7, generator=generator)
    torch.testing.assert_close(spherical_distance(a, b), F.cosine_similarity(a, b).acos().square() / 2)
    assert float(spherical_distance(3 * b, b)[0]) == pytest.approx(0, abs=1e-6)


def test_embeddings_are_those_of_the_whole_model(folder, picture):
    """Against transformers' own classes, reading the same folder."""
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    whole = CLIPVisionModelWithProjection.from_pretrained(folder)
    seen = F.interpolate((picture[:3] + 1 - picture[3:])[None], (32, 32), mode="bilinear", antialias=True)
    normalize = CLIPImageProcessor()
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (normalize.image_mean, normalize.image_std))
    expected = whole((seen - mean) / std).image_embeds
    torch.testing.assert_close(likeness_of(folder, picture).wanted, expected.detach(), atol=1e-5, rtol=1e-5)


def test_a_step_down_its_gradient_raises_the_similarity(folder, picture):
    likeness = likeness_of(folder, picture)
    views = torch.rand(2, 4, 40, 40, generator=torch.Generator().manual_seed(4)).requires_grad_()
    cameras = views_at(10.0, -20.0)

    def similarity(rgba):
        return F.cosine_similarity(likeness._embeddings(rgba), likeness.wanted).detach()

    loss = likeness.loss(views, cameras)
    (gradient,) = torch.autograd.grad(loss, views)
    moved = (views - 0.5 * gradient / gradient.norm()).detach()
    assert float(likeness.loss(moved, cameras)) < float(loss.detach())
    assert (similarity(moved) > similarity(views.detach())).all()
    assert float(likeness.loss(picture[None], views_at(0.0))) == pytest.approx(0, abs=1e-6), (
        "the picture is like itself"
    )


def test_views_count_by_where_they_look_from(folder, picture):
    rgba = torch.rand(1, 4, 40, 40, generator=torch.Generator().manual_seed(5))

    def at(azimuth_deg, **settings):
        return float(likeness_of(folder, picture, **settings).loss(rgba, views_at(azimuth_deg)))

    full = at(0.0)
    assert full > 1e-4 and at(59.0) == at(-59.0) == pytest.approx(full)
    assert at(61.0) == at(180.0) == 0.0
    assert at(-61.0, weight_aside=0.5) == pytest.approx(full / 2)
    assert make_likeness(ClipConfig(), CPU) is None


def test_it_is_a_term_of_a_captured_step_and_needs_no_host(folder, monkeypatch):
    monkeypatch.setattr(steps, "GraphedStep", Watched)
    likeness = likeness_of(folder, ball_picture(views_at(0.0))[0], weight_aside=0.5)
    found = {}
    for name, wanted in (("with", likeness), ("without", None)):
        state, config, frame, _ = toy(steps=4)
        train_step = steps.TrainStep(state, SplitBallPrior(), frame.condition, config, likeness=wanted)
        found[name] = {key: float(value) for key, value in train_step().items()}
    clip = found["with"].pop("clip")
    assert clip > 0 and found["with"] == found["without"], "the first step's other terms are what they were"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_holds_it_with_its_gradient(folder, picture):
    cuda = torch.device("cuda")
    likeness = make_likeness(ClipConfig(weight=1.0, weight_aside=0.5, model=str(folder)), cuda)
    likeness.set_reference(ReferencePicture(picture, FRONT))
    cameras = views_at(0.0, 90.0).to(cuda)

    def step(rgba):
        leaf = rgba.detach().requires_grad_()
        loss = likeness.loss(leaf, cameras)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    graphed = GraphedStep(step, cuda)
    for _ in range(WARM_UP_CALLS + 3):
        rgba = torch.rand(2, 4, 40, 40, device=cuda)
        for found, expected in zip(graphed(rgba), step(rgba)):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)
    assert graphed.is_captured


def test_a_folder_without_its_weights_is_named(tmp_path):
    with pytest.raises(GuidanceError, match="lacks the top folder"):
        make_likeness(ClipConfig(weight=1.0, model=str(tmp_path)), CPU)
