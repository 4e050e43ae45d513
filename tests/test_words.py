"""Words alone: from a prompt to files, with a tiny Stable Diffusion, and what cannot go without a picture."""

from __future__ import annotations

import json

import pytest
import torch

from conrad_engine import cli
from conrad_engine.errors import InputError
from conrad_engine.mesh.glb import load_mesh
from conrad_engine.pipeline import Job, generate
from conrad_engine.words import check_words, frame_of_words

from . import tiny_checkpoints as tiny

SMALL = """optimize.n_steps=6 render.size=16 render.n_samples=24 render.occupancy_resolution=16 field.n_levels=3
field.log2_table=10 field.max_resolution=32 field.hidden=16 mesh.resolution=24 mesh.n_faces=400 mesh.texture_size=64
mesh.turntable_frames=2 mesh.turntable_size=32 guidance.scale=5""".split()


def options(*more: str) -> list[str]:
    sets = [word for item in SMALL for word in ("--set", item)]
    return [
        "generate",
        "--text-only",
        "--preset",
        "draft",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--quiet",
        *sets,
        *more,
    ]


def test_an_object_from_words_alone(tmp_path, capsys):
    pytest.importorskip("diffusers")
    out, model = tmp_path / "out", tiny.write_stable_diffusion(tmp_path / "sd1")
    more = ["--prompt", "a toy", "--out", str(out), "--set", f"guidance.model={model}"]
    assert cli.main(options(*more)) == 0
    assert "mesh.glb" in capsys.readouterr().out
    assert {f"mesh.{kind}" for kind in ("glb", "obj", "ply")} <= {path.name for path in out.iterdir()}
    assert all(
        (out / name).stat().st_size > 100 for name in ("sheet.png", "thumbnail.png", "turntable.gif", "camera.json")
    )
    mesh = load_mesh(out / "mesh.glb")
    sides = mesh.vertices.max(0) - mesh.vertices.min(0)
    assert sides.max() == pytest.approx(1, abs=1e-3) and len(mesh.faces) > 50
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["steps"] == 6 and metrics["n_skipped_steps"] == 0 and metrics["warnings"] == []
    history = torch.load(out / "checkpoint.pt", weights_only=True)["state"]["history"]
    assert set(history[-1]) == {"step", "sds", "entropy", "distortion", "smooth"}, "nothing of a picture"
    # Going on with more steps, and refusing another prompt's checkpoint.
    config = cli.config_from(cli.make_parser().parse_args(options(*more, "--set", "optimize.n_steps=7")))
    assert generate(Job(None, config), out).metrics["steps"] == 7
    assert cli.main(options(*more, "--prompt", "a cup", "--resume")) == 2
    assert "another picture" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--prompt"),
        (["--prompt", "a", "--guidance", "zero123"], "--guidance stable_diffusion"),
        (["--prompt", "a", "--set", "guidance.ip_adapter=x"], "ip_adapter"),
        (["--prompt", "a", "--set", "optimize.warm_start_views=2"], "warm_start_views"),
        (["--prompt", "a", "--set", "clip.weight=1"], "clip.weight"),
        (["--prompt", "a", "--mask", "m.png", "--caption"], "leave out: mask, caption"),
        (["--prompt", "a", "--baseline", "zero123"], "leave out: baseline"),
    ],
)
def test_what_words_alone_cannot_do_is_one_sentence(tmp_path, capsys, more, message):
    code = cli.main(options("--out", str(tmp_path / "out"), *more))
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1


def test_the_frame_of_words_looks_at_the_origin_from_the_front():
    config = cli.config_from(cli.make_parser().parse_args(options("--prompt", "a toy", "--out", "o")))
    check_words(config)
    camera = frame_of_words(config.picture).condition
    uv, z_depths = camera.project(torch.zeros(1, 3, dtype=torch.float64))
    assert uv[0].tolist() == pytest.approx([128, 128]) and float(z_depths) > 0
    assert camera.positions[1] < 0 and camera.positions[0] == pytest.approx(0, abs=1e-6)
    with pytest.raises(InputError, match="needs a prompt"):
        check_words(cli.config_from(cli.make_parser().parse_args(options("--out", "o"))))
