"""The add-on in real Blender: the built zip is installed as an extension into empty preferences, with its own wheels.

    CONRAD_BPY_PYTHON=/venv-bpy45/bin/python:/venv-bpy42/bin/python pytest -m "blender and not slow" tests/test_addon_blender.py

Each interpreter has the bpy module (`pip install bpy==4.5.15`). Without the variable this interpreter is tried. pyzmq's
wheels are fetched by pip into the cache folder unless they are there. The measured figures are printed at the end; `-k shows`
runs only the tests that measure them, in three minutes an interpreter. `-m blender` takes the place of pyproject's
`not slow`: it also kills Blender at 20 random moments, which takes four minutes more an interpreter.
"""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import build_addon

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "tests" / "blender"
LIMIT_S = 280


def interpreters() -> list[str]:
    named = [path for path in os.environ.get("CONRAD_BPY_PYTHON", "").split(os.pathsep) if path]
    return named or ([sys.executable] if importlib.util.find_spec("bpy") else [])


FOUND = interpreters()
pytestmark = [
    pytest.mark.blender,
    pytest.mark.skipif(not FOUND, reason="no bpy: name interpreters that have it in CONRAD_BPY_PYTHON"),
]


@pytest.fixture(scope="session")
def zip_path(tmp_path_factory) -> Path:
    [path] = build_addon.build(tmp_path_factory.mktemp("zip"), build_addon.default_cache())
    validator = build_addon.find_validator("")
    if validator is not None:
        build_addon.validate(path, validator)
    return path


@pytest.fixture(scope="session")
def engine_python(tmp_path_factory) -> str:
    """An engine's environment as Set Up Engine makes it, with this checkout and this interpreter's packages in it."""
    folder = tmp_path_factory.mktemp("engine") / "environment"
    venv.create(folder, symlinks=os.name != "nt")
    [site] = folder.glob("lib/python*/site-packages") or folder.glob("Lib/site-packages")
    own = [path for path in sys.path if path.endswith("-packages")]
    (site / "checkout.pth").write_text("\n".join([*own, str(ROOT)]), encoding="utf-8")
    return str(folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


@pytest.fixture
def run_script(record_property):
    """Runs a script inside Blender and keeps the figures it prints for the end of the test run."""

    def run(name: str, interpreter: str, *arguments: object, **named: object) -> str:
        output = output_of(name, interpreter, *arguments, **named)
        for line in output.splitlines():
            if line.startswith("FIGURE | "):
                record_property("figure", f"{Path(interpreter).parents[1].name} | {line.removeprefix('FIGURE | ')}")
        return output

    return run


def output_of(name: str, interpreter: str, tmp_path: Path, *arguments: str, limit_s: float = LIMIT_S) -> str:
    (tmp_path / "user").mkdir(exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "BLENDER"))}
    environment |= {"BLENDER_USER_RESOURCES": str(tmp_path / "user"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [interpreter, str(SCRIPTS / name), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=limit_s,
    )
    assert done.returncode == 0 and "CHECKS PASSED" in done.stdout, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("interpreter", FOUND)
@pytest.mark.parametrize("name", ["check_camera.py", "check_import.py"])
def test_inside_blender(name, interpreter, zip_path, tmp_path, run_script):
    run_script(name, interpreter, tmp_path, str(zip_path))


@pytest.mark.parametrize("interpreter", FOUND)
@pytest.mark.parametrize("name", ["check_jobs.py", "check_batch.py"])
def test_with_a_real_engine_process(name, interpreter, zip_path, engine_python, tmp_path, run_script):
    (tmp_path / "data").mkdir()
    print(run_script(name, interpreter, tmp_path, str(zip_path), engine_python, str(tmp_path / "data")))


@pytest.mark.parametrize("interpreter", FOUND)
@pytest.mark.parametrize("name", ["check_install.py", "check_faults.py"])
def test_what_it_shows(name, interpreter, zip_path, engine_python, tmp_path, run_script):
    """The figures that the add-on has to show, printed at the end of the test run."""
    (tmp_path / "data").mkdir()
    print(run_script(name, interpreter, tmp_path, str(zip_path), engine_python, str(tmp_path / "data")))


@pytest.mark.parametrize("interpreter", FOUND)
def test_what_it_shows_in_a_session(interpreter, zip_path, engine_python, tmp_path, run_script):
    """Two of three sessions may fall into a bad moment of the machine; the figures of all are printed."""
    for name in ("first", "second", "third"):
        (tmp_path / name / "data").mkdir(parents=True)
        data = str(tmp_path / name / "data")
        output = run_script("bench_session.py", interpreter, tmp_path / name, str(zip_path), engine_python, data)
        print(output)
        if "TOO SLOW" not in output:
            return
    pytest.fail("three sessions took Blender's main thread longer than they may")


def moments(n_random: int) -> list:
    """Seconds after Generate: three usual ones, and random ones up to the time when the result is in the scene."""
    generator = random.Random(0)
    drawn = [f"{generator.uniform(0, 10):.2f}" for _ in range(n_random)]
    return ["0", "0.8", "2", *(pytest.param(seconds, marks=pytest.mark.slow) for seconds in drawn)]


@pytest.mark.parametrize("interpreter", FOUND)
@pytest.mark.parametrize("seconds", moments(n_random=20))
def test_it_shows_the_result_of_a_killed_blender(seconds, interpreter, zip_path, engine_python, tmp_path, run_script):
    (tmp_path / "data").mkdir()
    arguments = (str(zip_path), engine_python, str(tmp_path / "data"))
    with pytest.raises(AssertionError, match="submitted"):
        run_script("check_killed.py", interpreter, tmp_path, *arguments, "die", seconds)
    run_script("check_killed.py", interpreter, tmp_path, *arguments, "collect", seconds)


@pytest.mark.slow
@pytest.mark.parametrize("interpreter", FOUND[:1])
@pytest.mark.parametrize("script", ["check_result.py", "check_project.py"])
def test_a_real_object_covers_its_picture(script, interpreter, zip_path, engine_python, tmp_path, run_script):
    (tmp_path / "data").mkdir()
    pictures = ROOT / "tests" / "pictures"
    files = (str(pictures / "robot.png"), str(pictures / "robot.camera.json"))
    places = (str(zip_path), engine_python, str(tmp_path / "data"))
    print(run_script(script, interpreter, tmp_path, *places, *files, limit_s=600))


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("CONRAD_SETUP_PYTHON"), reason="name the Python to build on in CONRAD_SETUP_PYTHON"
)
def test_set_up_engine_from_the_zip(zip_path, tmp_path, run_script):
    """Downloads and installs every package of the engine: minutes and gigabytes."""
    print(
        run_script("check_setup.py", FOUND[0], tmp_path, str(zip_path), os.environ["CONRAD_SETUP_PYTHON"], limit_s=1500)
    )
