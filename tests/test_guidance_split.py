"""Drawing first and distilling then is what `gradient` does, and distilling needs no more numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conrad_engine.cameras import orbit_camera
from conrad_engine.config import EmbeddedPriorConfig, MixtureConfig, StableDiffusionConfig, Zero123Config
from conrad_engine.graphs import flat
from conrad_engine.guidance import make_guidance
from conrad_engine.guidance.interfaces import ReferencePicture, SplitGuidance
from conrad_engine.ranks import taken

from . import tiny_checkpoints as tiny
from .host_reads import HostReads

pytest.importorskip("diffusers")
CPU = torch.device("cpu")
CAMERAS = orbit_camera(torch.tensor([0.5, 2.5]), torch.tensor([0.1, 0.3]), 2.0, 0.7, 32)


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    text = StableDiffusionConfig(model=str(tiny.write_stable_diffusion(folder / "sd1")))
    views = Zero123Config(model=str(tiny.write_zero123(folder / "zero123")))
    embedded = EmbeddedPriorConfig(precision="float32")
    mixture = MixtureConfig(
        embedded_start=1.0, embedded_end=0.5, spare_seen=0.5, embedded=embedded, zero123=views, stable_diffusion=text
    )
    return {"embedded": embedded, "stable_diffusion": text, "zero123": views, "mixture": mixture}


@pytest.mark.parametrize("name", ["embedded", "stable_diffusion", "zero123", "mixture"])
def test_distilling_drawn_numbers_is_the_gradient(configs, name):
    guidance = make_guidance(configs[name], CPU)
    assert isinstance(guidance, SplitGuidance)
    rgba = torch.rand(2, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    guidance.set_reference(ReferencePicture(rgba[0], orbit_camera(0.0, 0.1, 2.0, 0.7, 32), prompt="a toy"))
    at_once = guidance.gradient(rgba, CAMERAS, 0.4, torch.Generator().manual_seed(5)).gradient
    early, late = (guidance.draw(2, progress, torch.Generator().manual_seed(5)) for progress in (0.4, 0.9))
    for _ in range(2):
        torch.testing.assert_close(guidance.distill(rgba, CAMERAS, early).gradient, at_once)
    assert not torch.allclose(guidance.distill(rgba, CAMERAS, late).gradient, at_once)
    with HostReads() as reads:
        guidance.distill(rgba, CAMERAS, early)
    assert reads.found == []
    # What a captured step asks: the same shapes and types at every progress, and plain nested tuples will do.
    assert [(t.shape, t.dtype) for t in flat(early)] == [(t.shape, t.dtype) for t in flat(late)]


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("name", ["stable_diffusion", "zero123"])
def test_only_steps_of_jobs_that_compile_search_for_fast_convolutions(configs, name, compiles):
    weights = replace(configs[name].weights, compile=compiles, memory="24")
    guidance, searches = make_guidance(replace(configs[name], weights=weights), CPU), []

    def look(*_) -> None:
        searches.append(torch.backends.cudnn.benchmark)

    guidance.distiller.space.vae.encoder.register_forward_hook(look)
    guidance.distiller.space.vae.encoder.register_full_backward_hook(look)
    guidance.distiller.network.register_forward_hook(look)
    rgba = torch.rand(2, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    guidance.set_reference(ReferencePicture(rgba[0], orbit_camera(0.0, 0.1, 2.0, 0.7, 32), prompt="a toy"))
    assert not any(searches)
    searches.clear()
    guidance.gradient(rgba, CAMERAS, 0.4)
    assert searches == [compiles] * 3  # the autoencoder, the network, and back through the autoencoder
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("name", ["stable_diffusion", "zero123"])
def test_views_of_a_step_can_be_distilled_apart(configs, name):
    guidance = make_guidance(configs[name], CPU)
    rgba = torch.rand(2, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    guidance.set_reference(ReferencePicture(rgba[0], orbit_camera(0.0, 0.1, 2.0, 0.7, 32), prompt="a toy"))
    draws = guidance.draw(2, 0.4, torch.Generator().manual_seed(5))
    whole = guidance.distill(rgba, CAMERAS, draws).gradient
    for mine in (slice(0, 1), slice(1, 2)):
        part = guidance.distill(rgba[mine], CAMERAS[mine], taken(draws, mine)).gradient
        torch.testing.assert_close(part, whole[mine], atol=float(whole.abs().max()) * 1e-4, rtol=1e-3)
