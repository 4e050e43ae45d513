"""The whole job, picture to GLB, with diffusers priors instead of the embedded one."""

from __future__ import annotations

import pytest

from conrad_engine.config import preset, with_overrides
from conrad_engine.pipeline import Job, generate

from . import tiny_checkpoints as tiny
from .conftest import figure_rgba, png_bytes

pytest.importorskip("diffusers")
SMALL = {
    "device": "cpu",
    "prompt": "a toy",
    "optimize.warm_start_views": 0,
    "optimize.warm_start_steps": 0,
    "optimize.n_steps": 12,
    "render.size": 32,
    "render.n_samples": 24,
    "field.resolution": 24,
    "field.coarsest": 6,
    "mesh.resolution": 32,
    "mesh.n_faces": 500,
    "mesh.texture_size": 64,
    "mesh.turntable_frames": 2,
    "mesh.turntable_size": 32,
}


@pytest.mark.slow
def test_a_mixture_makes_an_object(tmp_path):
    overrides = SMALL | {
        "guidance": "mixture",
        "guidance.zero123.model": str(tiny.write_zero123(tmp_path / "zero123")),
        "guidance.stable_diffusion.model": str(tiny.write_stable_diffusion(tmp_path / "sd1")),
        "guidance.spare_seen": 0.5,
    }
    job = Job(png_bytes(figure_rgba()), with_overrides(preset("draft"), overrides))
    result = generate(job, tmp_path / "out")
    assert (tmp_path / "out" / "mesh.glb").stat().st_size > 1000
    assert result.metrics["n_skipped_steps"] == 0
