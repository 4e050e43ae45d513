"""The add-on's zip: same bytes every time, the protocol's own files, importable where nothing else is."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import build_addon
from conrad_engine import __version__


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """Stand-ins for pyzmq's wheels, with their own hashes: the build is tested, not the download."""
    cache = tmp_path / "wheels"
    cache.mkdir()

    def replaced(wheel):
        data = wheel.name.encode()
        (cache / wheel.name).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        return build_addon.Wheel(wheel.name, digest, wheel.python, wheel.platform, wheel.serves)

    for name in ("WHEELS", "ABI3_WHEELS"):
        monkeypatch.setattr(build_addon, name, tuple(map(replaced, getattr(build_addon, name))))
    return cache


def test_two_builds_are_the_same(tmp_path, wheels):
    first = build_addon.build(tmp_path / "a", wheels, engine="none")
    second = build_addon.build(tmp_path / "b", wheels, engine="none")
    assert first[0].read_bytes() == second[0].read_bytes()


def test_the_protocol_is_the_engines_byte_for_byte(tmp_path, wheels):
    [path] = build_addon.build(tmp_path, wheels, engine="none")
    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if n.startswith("protocol/")]
        own = sorted(f"protocol/{p.name}" for p in build_addon.PROTOCOL.glob("*.py"))
        assert names == own
        for name in names:
            assert archive.read(name) == (build_addon.PROTOCOL / Path(name).name).read_bytes()


def test_the_manifest_names_what_is_there(tmp_path, wheels):
    [path] = build_addon.build(tmp_path, wheels, engine="none")
    with zipfile.ZipFile(path) as archive:
        manifest = tomllib.loads(archive.read("blender_manifest.toml").decode())
        listed = {name.removeprefix("./") for name in manifest["wheels"]}
        assert listed == {n for n in archive.namelist() if n.startswith("wheels/")}
        assert {n for n in archive.namelist() if "__pycache__" in n or n.endswith(".pyc")} == set()
    assert manifest["version"] == __version__ and manifest["blender_version_min"] == "4.2.0"
    tags = {name.split("-")[2] for name in listed}
    assert tags == {"cp311", "cp313"}, "no abi3 among them: Blender would refuse the zip on Python 3.13"


def test_variants(tmp_path, wheels):
    [abi3] = build_addon.build(tmp_path, wheels, engine="none", is_abi3=True)
    with zipfile.ZipFile(abi3) as archive:
        assert all("-abi3-" in n for n in archive.namelist() if n.startswith("wheels/"))
    zips = build_addon.build(tmp_path, wheels, engine="none", is_split=True)
    assert len(zips) == 4
    for path in zips:
        with zipfile.ZipFile(path) as archive:
            manifest = tomllib.loads(archive.read("blender_manifest.toml").decode())
            assert len(manifest["wheels"]) == 2 and len(manifest["platforms"]) == 1
            assert manifest["platforms"][0] in path.name


def test_a_wheel_that_was_tampered_with_is_refused(tmp_path, wheels, capsys):
    victim = wheels / build_addon.WHEELS[0].name
    victim.write_bytes(b"something else")
    assert build_addon.main(["--out", str(tmp_path), "--wheels", str(wheels), "--engine", "none"]) == 2
    assert "delete it and build again" in capsys.readouterr().err


@pytest.mark.slow
def test_the_engines_wheel_goes_inside_or_beside(tmp_path, wheels):
    [inside] = build_addon.build(tmp_path / "a", wheels)
    with zipfile.ZipFile(inside) as archive:
        [name] = [n for n in archive.namelist() if n.startswith("engine/")]
        first = archive.read(name)
    build_addon.build(tmp_path / "b", wheels, engine="beside")
    [beside] = (tmp_path / "b").glob("conrad_engine-*.whl")
    assert beside.read_bytes() == first, "the engine's wheel is the same every time too"
    with zipfile.ZipFile(beside) as wheel:
        names = wheel.namelist()
    assert "conrad_engine/server/serve.py" in names and "conrad_engine/__main__.py" in names
    assert any(name.endswith(".safetensors") for name in names), "the prior's weights are in it"


def test_the_shipped_protocol_needs_neither_engine_nor_torch(tmp_path, wheels):
    [path] = build_addon.build(tmp_path, wheels, engine="none")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "conrad")
    code = (
        "import sys\n"
        "for name in ('torch', 'conrad_engine'): sys.modules[name] = None\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "import conrad\n"
        "from conrad import camera_math, jobs, launcher, engine_setup, session, batch, child\n"
        "from conrad.protocol import EngineClient, Submit\n"
        "assert 'bpy' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = f"import sys; sys.modules['numpy'] = sys.modules['torch'] = None; sys.path.insert(0, {str(tmp_path)!r}); "
    done = subprocess.run([sys.executable, "-c", code + "import conrad.protocol, conrad.session"], capture_output=True)
    assert done.returncode == 0, done.stderr
