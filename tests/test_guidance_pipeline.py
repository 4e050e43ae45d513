"""The whole job, picture to GLB, with diffusers priors instead of the embedded one."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from conrad_engine import model_files, pipeline
from conrad_engine.baselines import overrides_of
from conrad_engine.config import preset, with_overrides
from conrad_engine.errors import Cancelled, GuidanceError, InputError, MissingDependency
from conrad_engine.guidance.textual_inversion import FILE_NAME
from conrad_engine.monitor import Command, Monitor
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


SMALL_TABLE = {"field.n_levels": 6, "field.log2_table": 12, "field.max_resolution": 64, "field.start_levels": 4}
START = {"optimize.warm_start_views": 2, "optimize.warm_start_sampling": 2, "optimize.warm_start_steps": 6}


def started_job(**settings) -> Job:
    """A job of a latent model with a warm start."""
    overrides = SMALL | START | {"optimize.n_steps": 4, "threads": 1, "guidance": "zero123"} | settings
    return Job(png_bytes(figure_rgba()), with_overrides(preset("draft"), overrides))


@pytest.mark.slow
@pytest.mark.parametrize("field", ["dense_volume", "hash_grid"])
def test_a_model_read_after_the_warm_start_gives_the_same_object(tmp_path, monkeypatch, field):
    model = str(tiny.write_zero123(tmp_path / "zero123"))
    job = started_job(**{"guidance.model": model, "field.kind": field}, **SMALL_TABLE)
    late = generate(job, tmp_path / "late")
    assert late.metrics["seconds_by_stage"]["load"] > 0
    real = pipeline._priors

    def at_once(*arguments):
        priors = real(*arguments)
        random_numbers = torch.get_rng_state()  # reading takes some
        read = replace(priors.late(), sampler=priors.sampler)
        torch.set_rng_state(random_numbers)
        return read

    monkeypatch.setattr(pipeline, "_priors", at_once)
    generate(job, tmp_path / "at_once")
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["state"] for name in ("late", "at_once"))
    assert a["step"] == b["step"] == 10 and a["history"] == b["history"]
    assert all(torch.equal(a["field"][key], b["field"][key]) for key in a["field"])


def without_projection(folder):
    for file in (folder / "cc_projection").iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"guidance.model": "./none"}, GuidanceError, "neither an existing folder nor a hub id"),
        ({"guidance.model": "{zero123}"}, GuidanceError, "has no cc_projection"),
        ({"guidance": "stable_diffusion", "guidance.model": "{sd1}", "prompt": ""}, InputError, "needs a prompt"),
        (
            {"guidance": "stable_diffusion", "guidance.model": "{sd1}", "guidance.embedding": "./none.safetensors"},
            GuidanceError,
            "does not exist",
        ),
        (
            {"guidance": "stable_diffusion", "guidance.model": "{sd1}", "guidance.ip_adapter": "./none"},
            GuidanceError,
            "neither an existing folder nor a hub id",
        ),
        (
            {"guidance.model": "{sd1}", "guidance.weights.tiny_autoencoder": "./none"},
            GuidanceError,
            "lacks image_encoder",
        ),
        (
            {"guidance": "mixture", "guidance.stable_diffusion.model": "{sd1}", "guidance.zero123.model": "./none"},
            GuidanceError,
            "neither an existing folder nor a hub id",
        ),
        ({"guidance": "embedded", "clip.weight": 1.0, "clip.model": "./none"}, GuidanceError, "neither an existing"),
    ],
)
def test_what_a_job_lacks_is_said_before_its_warm_start(tmp_path, monkeypatch, settings, error, message):
    models = {"zero123": tiny.write_zero123(tmp_path / "zero123"), "sd1": tiny.write_stable_diffusion(tmp_path / "sd1")}
    without_projection(models["zero123"])
    settings = {name: value.format(**models) if isinstance(value, str) else value for name, value in settings.items()}
    monkeypatch.setattr(pipeline, "EmbeddedPrior", lambda *_: pytest.fail("the warm start comes later"))
    with pytest.raises(error, match=message) as caught:
        generate(started_job(**settings), tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_missing_library_is_said_before_the_warm_start(tmp_path, monkeypatch):
    model = str(tiny.write_zero123(tmp_path / "zero123"))
    nothing = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setattr(model_files, "importlib", nothing)
    monkeypatch.setattr(pipeline, "EmbeddedPrior", lambda *_: pytest.fail("the warm start comes later"))
    with pytest.raises(MissingDependency, match="diffusers and transformers"):
        generate(started_job(**{"guidance.model": model}), tmp_path / "out")


def test_what_fails_while_a_thread_imports_is_raised_where_it_is_needed(tmp_path, monkeypatch):
    model = str(tiny.write_zero123(tmp_path / "zero123"))
    asked = []

    class Broken(ModuleType):
        def __getattr__(self, name):
            asked.append(threading.current_thread() is threading.main_thread())
            raise RuntimeError("this diffusers is broken")

    broken = Broken("diffusers")
    broken.__spec__ = sys.modules["diffusers"].__spec__
    monkeypatch.setitem(sys.modules, "diffusers", broken)
    with pytest.raises(RuntimeError, match="this diffusers is broken"):
        generate(started_job(**{"guidance.model": model}), tmp_path / "out")
    assert not asked[0] and asked[-1], "first by the thread"


@pytest.mark.parametrize("stage", ["warm_start", "optimize", "import"])
def test_cancelling_does_not_wait_for_imports(tmp_path, monkeypatch, stage):
    model, released = str(tiny.write_zero123(tmp_path / "zero123")), threading.Event()

    class Cancelling(Monitor):
        stage, n_asked = "", 0

        def progress(self, progress):
            self.stage = progress.stage
            if progress.stage == "optimize":
                self.stage = "import" if progress.step == START["optimize.warm_start_steps"] else "optimize"

        def command(self):
            self.n_asked += self.stage == "import"
            # First the loop asks, then who waits.
            return Command.CANCEL if self.stage == stage and (stage != "import" or self.n_asked > 3) else Command.RUN

    monkeypatch.setattr(pipeline, "import_libraries", lambda *_: released.wait(60))
    monkeypatch.setattr(pipeline, "make_guidance", lambda *_: pytest.fail("libraries are not there yet"))
    said = {"warm_start": "first views", "optimize": "cancelled at step", "import": "libraries were imported"}
    try:
        with pytest.raises(Cancelled, match=said[stage]):
            generate(started_job(**{"guidance.model": model}), tmp_path / "out", Cancelling())
    finally:
        released.set()
    assert (tmp_path / "out" / "checkpoint.pt").exists()


@pytest.mark.slow
def test_a_job_that_goes_on_imports_only_for_steps(tmp_path, monkeypatch):
    model = str(tiny.write_zero123(tmp_path / "zero123"))
    job = started_job(**{"guidance.model": model})
    generate(job, tmp_path / "out")
    monkeypatch.setattr(pipeline, "import_libraries", lambda *_: pytest.fail("the mesh is only made again"))
    generate(job, tmp_path / "out")
    monkeypatch.undo()
    longer = started_job(**{"guidance.model": model, "optimize.n_steps": 6})
    assert generate(longer, tmp_path / "out").metrics["steps"] == 12
