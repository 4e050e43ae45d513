"""The command line: exit codes, one sentence for each fault, no traceback, nothing half-written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conrad_engine import cli
from conrad_engine.errors import InputError

from .conftest import figure_rgba

PICTURES = Path(__file__).parent / "pictures"


def run(capsys, *arguments: str) -> tuple[int, str]:
    code = cli.main(list(arguments))
    return code, capsys.readouterr().err


@pytest.fixture
def picture(tmp_path) -> str:
    path = tmp_path / "figure.png"
    Image.fromarray(figure_rgba()).save(path)
    return str(path)


def bad_files(folder: Path) -> dict[str, Path]:
    """Broken pictures by what is wrong with them."""
    files = {name: folder / f"{name}.png" for name in ("empty", "text", "truncated", "tiny", "clear", "plain")}
    files["empty"].write_bytes(b"")
    files["text"].write_text("not a picture")
    Image.fromarray(figure_rgba()).save(files["truncated"])
    files["truncated"].write_bytes(files["truncated"].read_bytes()[:200])
    Image.new("RGB", (1, 1)).save(files["tiny"])
    Image.new("RGBA", (64, 64)).save(files["clear"])
    Image.new("RGB", (64, 64), "white").save(files["plain"])
    files["huge"] = folder / "huge.png"
    Image.new("1", (20000, 20000)).save(files["huge"])
    files["missing"] = folder / "missing.png"
    files["animated"] = folder / "animated.gif"
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    frames[0].save(files["animated"], save_all=True, append_images=frames[1:])
    return files


@pytest.mark.parametrize(
    "kind", ["empty", "text", "truncated", "tiny", "clear", "plain", "huge", "missing", "animated"]
)
def test_bad_pictures_are_one_sentence_and_exit_2(capsys, tmp_path, kind):
    out = tmp_path / "out"
    code, err = run(capsys, "generate", str(bad_files(tmp_path)[kind]), "--out", str(out), "--quiet", "--device", "cpu")
    assert code == 2 and err.startswith("conrad: ") and err.count("\n") == 1 and "Traceback" not in err
    assert not list(out.glob("mesh*"))


def test_wrong_depth_size(capsys, tmp_path, picture):
    np.save(tmp_path / "depth.npy", np.random.default_rng(0).random((10, 30)))
    depth = ["--depth", str(tmp_path / "depth.npy")]
    code, err = run(capsys, "generate", picture, "--out", str(tmp_path / "o"), "--quiet", *depth)
    assert code == 2 and "depth" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "options",
    [["--preset", "best"], ["--set", "a"], ["--set", "optimize.n=1"], ["--device", "warp"], ["--guidance", "wish"],
     ["--camera", "nowhere.json"], ["--elevation", "95"], ["--mask", "nowhere.png"], ["--init", "nowhere.glb"]],
)  # fmt: skip
def test_bad_options_are_one_sentence_and_exit_2(capsys, tmp_path, picture, options):
    code, err = run(capsys, "generate", picture, "--out", str(tmp_path / "o"), "--quiet", *options)
    assert code == 2 and err.count("\n") == 1 and err.startswith("conrad: ")


def test_no_picture_and_no_prompt(capsys, tmp_path):
    code, err = run(capsys, "generate", "--out", str(tmp_path))
    assert code == 2 and "--prompt" in err


def test_unwritable_folder(capsys, tmp_path, picture):
    (tmp_path / "file").write_text("")
    code, err = run(capsys, "generate", picture, "--out", str(tmp_path / "file" / "out"), "--quiet")
    assert code == 2 and "choose another folder" in err


def test_overrides():
    assert cli.parse_overrides(["a.b=1", "c= x"]) == {"a.b": "1", "c": "x"}
    with pytest.raises(InputError, match="NAME=VALUE"):
        cli.parse_overrides(["a.b"])


def test_doctor_prints_json(capsys):
    code = cli.main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == (0 if report["ok"] else 2)
    assert {"version", "python", "torch", "device", "memory_bytes", "missing"} <= set(report)
    assert all(set(item) >= {"name", "command"} for item in report["missing"])


def test_doctor_names_what_is_missing_and_the_command(monkeypatch, capsys):
    from conrad_engine import doctor

    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "xatlas" else real(name))
    assert cli.main(["doctor"]) == 2
    out = capsys.readouterr().out
    assert "MISSING  xatlas" in out and "pip install xatlas" in out


@pytest.mark.slow
def test_ctrl_c_keeps_a_checkpoint_and_says_how_to_go_on(tmp_path):
    """The real program with the shipped prior: stopped in the middle, then resumed to its end."""
    settings = (
        "optimize.n_steps=6 optimize.warm_start_steps=20 optimize.warm_start_views=2 optimize.warm_start_sampling=2"
    )
    settings += " field.resolution=32 mesh.resolution=48 mesh.n_faces=3000 mesh.texture_size=256"
    small = [
        "--preset",
        "draft",
        "--device",
        "cpu",
        "--quiet",
        *(x for item in settings.split() for x in ("--set", item)),
    ]
    command = [
        sys.executable,
        "-m",
        "conrad_engine",
        "generate",
        str(PICTURES / "robot.png"),
        "--out",
        str(tmp_path),
        *small,
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not (tmp_path / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=200)
    assert process.returncode == cli.STOPPED and "--resume" in err and "Traceback" not in err
    assert not (tmp_path / "mesh.glb").exists()
    done = subprocess.run(
        [command[0], "-X", "importtime", *command[1:], "--resume"], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "torch" in imported and not {"sympy", "torch._dynamo"} & imported, "these delay every job"
    numbers = json.loads((tmp_path / "metrics.json").read_text())
    assert numbers["steps"] == 26 and numbers["field_psnr_training"] > 35
