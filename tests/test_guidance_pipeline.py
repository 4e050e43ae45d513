"""The whole job, picture to GLB, with diffusers priors instead of the embedded one."""

from __future__ import annotations

import numpy as np
import pytest

from conrad_engine.baselines import overrides_of
from conrad_engine.config import preset, with_overrides
from conrad_engine.guidance.textual_inversion import FILE_NAME
from conrad_engine.monitor import Monitor
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


@pytest.mark.slow
def test_the_embedded_prior_starts_a_job_of_another_one(tmp_path):
    """Whoever only chooses another guidance gets an object all the same."""
    start = {"optimize.warm_start_views": 2, "optimize.warm_start_sampling": 2, "optimize.warm_start_steps": 20}
    model = {"guidance": "zero123", "guidance.model": str(tiny.write_zero123(tmp_path / "zero123"))}
    seen = set()

    class Watching(Monitor):
        def progress(self, progress):
            seen.update(progress.losses)

    job = Job(png_bytes(figure_rgba()), with_overrides(preset("draft"), SMALL | start | model))
    result = generate(job, tmp_path / "out", Watching())
    assert {"fit", "sds"} <= seen
    assert (tmp_path / "out" / "mesh.glb").stat().st_size > 1000
    assert result.metrics["n_skipped_steps"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["realfusion", "neurallift", "magic123"])
def test_a_baseline_runs_from_picture_to_files(tmp_path, name):
    depth = np.linspace(1, 2, 96 * 96, dtype=np.float32).reshape(96, 96)
    np.save(tmp_path / "depth.npy", depth)
    text = str(tiny.write_stable_diffusion(tmp_path / "sd1"))
    own = {
        "realfusion": {"guidance.model": text, "guidance.word_steps": 1},
        "neurallift": {"guidance.model": text, "clip.model": str(tiny.write_clip(tmp_path / "clip"))},
        "magic123": {
            "guidance.stable_diffusion.model": text,
            "guidance.stable_diffusion.word_steps": 1,
            "guidance.zero123.model": str(tiny.write_zero123(tmp_path / "zero123")),
            "optimize.fine_steps": 2,
            "render.fine_size": 48,
        },
    }
    changes = own[name] | {"field.kind": "dense_volume", "optimize.n_steps": 4, "mesh.resolution": 24}
    config = with_overrides(preset("draft"), overrides_of(name) | SMALL | changes)
    given = {"depth": tmp_path / "depth.npy"} if name == "neurallift" else {}
    job = Job(png_bytes(figure_rgba()), config, **given)
    seen = set()

    class Watching(Monitor):
        def progress(self, progress):
            seen.update(progress.losses)

    result = generate(job, tmp_path / "out", Watching())
    assert result.metrics["n_skipped_steps"] == 0 and result.glb.stat().st_size > 1000
    assert result.metrics["steps"] == (6 if name == "magic123" else 4)
    word = tmp_path / "out" / FILE_NAME
    assert word.is_file() == (name != "neurallift")
    assert {"sds", "picture", "mask"} <= seen and ({"depth", "clip"} <= seen) == (name == "neurallift")
