"""The engine's commands, as a user types them."""

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conrad_engine.protocol import Array, Progress
from conrad_engine.server.commands import _Line, png_bytes, progress_line

from .engine_process import ROOT, picture

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def conrad(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "conrad_engine", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)


def start(data: Path, *options: object) -> subprocess.Popen:
    """An engine with the toy pipeline, once it has announced itself."""
    command = [sys.executable, "-m", "conrad_engine", "serve", "--data", str(data), "--devices", "cpu"]
    command += ["--pipeline", "tests.toy_pipeline", *map(str, options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT)
    assert process.stdout.readline().startswith(b'{"endpoint"')
    return process


def until(is_true: Callable[[], object], within_s: float = 60.0) -> None:
    end_s = time.monotonic() + within_s
    while not is_true():
        assert time.monotonic() < end_s, f"not within {within_s} s"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands") / "data"
    process = start(folder)
    yield folder
    ended = conrad("shutdown", "--data", folder)
    assert ended.returncode == 0 and process.wait(30) == 0


def test_submit_watch_and_fetch(data, tmp_path):
    (tmp_path / "duck.png").write_bytes(picture())
    options = ["--data", data, "--prompt", '{"delay_s": 0.02}', "--set", "optimize.n_steps=40", "--faces", 100]
    options += ["--texture-size", 64, "--out", tmp_path / "out", "--preview-dir", tmp_path / "previews"]
    done = conrad("submit", tmp_path / "duck.png", *options)
    assert done.returncode == 0, done.stderr
    job = done.stdout.split()[0]
    assert "duck: done in" in done.stderr
    assert (tmp_path / "out" / "mesh.glb").read_bytes() == b"glTF" + bytes(100)
    previews = sorted((tmp_path / "previews").glob("*.png"))
    assert previews and Image.open(previews[-1]).size == (256, 256)
    listed = conrad("list", "--data", data)
    assert f"{job}  done" in listed.stdout and "40/40" in listed.stdout
    again = conrad("fetch", job[:6], "--data", data, "--out", tmp_path / "again")
    assert again.returncode == 0 and (tmp_path / "again" / "sheet.png").exists()
    watched = conrad("watch", "duck", "--data", data)
    assert watched.returncode == 0 and "done" in watched.stderr


def test_a_watcher_goes_on_after_its_engine_was_killed(tmp_path):
    """With progress and previews of the job that the next engine takes up."""
    (tmp_path / "duck.png").write_bytes(picture())
    engine = start(tmp_path / "data")
    command = [sys.executable, "-m", "conrad_engine", "submit", str(tmp_path / "duck.png"), "--data", tmp_path / "data"]
    command += ["--prompt", '{"delay_s": 0.05}', "--set", "optimize.n_steps=200", "--preview-dir", tmp_path / "seen"]
    watcher = subprocess.Popen(list(map(str, command)), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: list((tmp_path / "seen").glob("*.png")))
        engine.kill()
        engine.wait()
        seen = {path.name for path in (tmp_path / "seen").glob("*.png")}
        engine = start(tmp_path / "data")
        until(lambda: {path.name for path in (tmp_path / "seen").glob("*.png")} - seen)
        _, told = watcher.communicate(timeout=120)
        assert watcher.returncode == 0 and "duck: done in" in told
    finally:
        watcher.kill()
        engine.terminate()
        engine.wait(30)


def test_an_engine_ends_with_its_parent_unless_it_is_to_be_kept(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    mortal = start(tmp_path / "a", "--parent-pid", parent.pid)
    kept = start(tmp_path / "b", "--parent-pid", parent.pid, "--keep")
    try:
        assert conrad("list", "--data", tmp_path / "a").returncode == 0, "it lives as long as its parent"
        parent.kill()
        parent.wait()
        assert mortal.wait(30) == 0
        assert conrad("list", "--data", tmp_path / "b").returncode == 0
    finally:
        mortal.kill()
        kept.kill()
        mortal.wait()
        kept.wait()


def test_an_engine_ends_when_nobody_needs_it(tmp_path):
    engine = start(tmp_path / "data", "--idle-timeout", 0.5)
    assert engine.wait(30) == 0
    assert not (tmp_path / "data" / "connection.json").exists()


def test_cancel(data, tmp_path):
    (tmp_path / "slow.png").write_bytes(picture())
    sent = conrad("submit", tmp_path / "slow.png", "--data", data, "--prompt", '{"delay_s": 0.1}')
    job = sent.stdout.strip()
    assert conrad("cancel", job, "--data", data).returncode == 0
    watched = conrad("watch", job, "--data", data)
    assert watched.returncode == 2 and "cancelled" in watched.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["submit", "none.png"], 2, "none.png cannot be read: No such file"),
        (["submit", "{picture}", "--preset", "golden"], 2, "unknown preset 'golden'"),
        (["submit", "{picture}", "--set", "x"], 2, "--set needs NAME=VALUE"),
        (["submit", "{picture}", "--camera", "{picture}"], 2, "camera file"),
        (["watch", "nobody"], 2, "0 jobs are called 'nobody'"),
        (["list", "--endpoint", "tcp://127.0.0.1:9"], 2, "--endpoint needs --server-key and --client-key"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(data, tmp_path, arguments, code, words):
    (tmp_path / "picture.png").write_bytes(picture())
    arguments = [argument.format(picture=tmp_path / "picture.png") for argument in arguments]
    told = conrad(*arguments, "--data", data)
    assert told.returncode == code and words in told.stderr, told.stderr
    assert "Traceback" not in told.stderr and told.stderr.count("\n") == 1


def test_without_an_engine_the_commands_say_how_to_start_one(tmp_path):
    told = conrad("list", "--data", tmp_path)
    assert told.returncode == 3 and "start one with `conrad serve`" in told.stderr


def test_a_bind_without_keys_is_refused(tmp_path):
    told = conrad("serve", "--data", tmp_path, "--bind", "0.0.0.0")
    assert told.returncode == 2 and "conrad keys FOLDER --client NAME" in told.stderr


def test_keys_say_what_to_do_with_them(tmp_path):
    told = conrad("keys", tmp_path, "--client", "alice")
    assert told.returncode == 0 and "--server-key server.key --client-key alice.key_secret" in told.stdout
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == [
        "alice.key_secret",
        "clients",
        "server.key",
        "server.key_secret",
    ]


@pytest.mark.parametrize("channels", [3, 4])
def test_previews_are_sound_png_files(channels):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    read = np.array(Image.open(io.BytesIO(png_bytes(Array("u1", pixels.shape, pixels.tobytes())))))
    assert (read == pixels).all()


def test_the_progress_line():
    line = progress_line(Progress("a", 1, "optimize", 50, 100, 75.0, {"sds": 0.1234}), width=10)
    assert line == "optimize   [#####.....] 50/100  1:15 left  sds 0.123"
    assert progress_line(Progress("a", 1, "mesh", 0, 0), width=4) == "mesh       [....] 0/0"


def test_a_line_that_replaces_itself_never_wraps(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "30")
    _Line().show("optimize " + "#" * 80)
    assert len(capsys.readouterr().err.removeprefix("\r\x1b[K")) == 29
