"""The add-on's engine process and its set-up, without Blender: real processes."""

from __future__ import annotations

import os
import stat
import sys
import time
import zipfile
from pathlib import Path

import pytest

from blender_addon import background, engine_setup
from blender_addon.child import CANNOT_RUN, Child, clean_environment, tail
from blender_addon.engine_state import options_of
from blender_addon.launcher import MAX_FAILURES, CannotStart, Launcher
from tests.engine_process import WITHIN_S, script

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in interpreters are shell scripts")


def until(is_true, within_s: float = WITHIN_S) -> None:
    end = time.monotonic() + within_s
    while not is_true():
        time.sleep(0.01)
        assert time.monotonic() < end, "not in time"


ANNOUNCE = """
import json, os, sys, time
print("some other line")
print(json.dumps(dict(endpoint="tcp://127.0.0.1:1", version="1", protocol=1, pid=os.getpid(), token="t")), flush=True)
"""


def test_the_launcher_reads_the_announcement_and_passes_the_parent(tmp_path):
    python = script(
        tmp_path / "python", ANNOUNCE + f"open({str(tmp_path / 'args')!r}, 'w').write(repr(sys.argv)); time.sleep(60)"
    )
    launcher = Launcher(tmp_path / "folder")
    launcher.start(python, ["--data", "x"], by_person=True)
    until(lambda: launcher.poll() == "announced")
    assert launcher.announcement.endpoint == "tcp://127.0.0.1:1" and launcher.announcement.token == "t"
    until(lambda: (tmp_path / "args").exists() and (tmp_path / "args").read_text().endswith("]"))
    arguments = eval((tmp_path / "args").read_text())[1:]
    assert arguments == ["-I", "-m", "conrad_engine", "serve", "--parent-pid", str(os.getpid()), "--data", "x"]
    announced = tmp_path / "folder" / "engine.announce"
    assert stat.S_IMODE(announced.stat().st_mode) == 0o600, "the token is the owner's alone"
    process = launcher.child.process
    launcher.end()
    assert process.poll() is not None and not announced.exists()


def test_a_crash_is_reported_with_its_log_and_the_breaker_opens(tmp_path):
    python = script(tmp_path / "python", "import sys; print('no such library', file=sys.stderr); sys.exit(7)")
    launcher = Launcher(tmp_path)
    now = time.monotonic()
    for k in range(MAX_FAILURES):
        launcher.start(python, [], by_person=False, now=now + 10 * k)
        until(lambda: launcher.poll() == "ended")
        assert launcher.exit_code == 7 and "no such library" in launcher.crash_report()
    with pytest.raises(CannotStart, match="3 times in a row"):
        launcher.start(python, [], by_person=False, now=now + 100)
    launcher.start(python, [], by_person=True)
    until(lambda: launcher.poll() == "ended")


def test_no_restart_within_five_seconds(tmp_path):
    launcher = Launcher(tmp_path)
    python = script(tmp_path / "python", "raise SystemExit(1)")
    launcher.start(python, [], by_person=False, now=100.0)
    until(lambda: launcher.poll(100.0) == "ended")
    with pytest.raises(CannotStart, match="wait a moment"):
        launcher.start(python, [], by_person=False, now=102.0)
    launcher.start(python, [], by_person=False, now=106.0)
    launcher.end()


def test_an_interpreter_that_is_not_there(tmp_path):
    with pytest.raises(CannotStart, match="cannot be started"):
        Launcher(tmp_path).start(str(tmp_path / "none"), [], by_person=True)


def test_an_interpreter_that_cannot_be_loaded(tmp_path):
    """What the thread that starts it finds out is told like a crash."""
    python = tmp_path / "python"
    python.write_bytes(b"no program")
    python.chmod(0o755)
    launcher = Launcher(tmp_path)
    launcher.start(str(python), [], by_person=True)
    until(lambda: launcher.poll() == "ended")
    assert launcher.exit_code == CANNOT_RUN and f"{python} cannot be started" in launcher.crash_report()
    launcher.end()


def test_steps_go_on_from_tick_to_tick_and_what_fails_in_a_thread_is_theirs():
    def steps():
        told.append((yield lambda: 7))
        try:
            yield lambda: 1 // 0
        except ZeroDivisionError:
            told.append("no number")
        return len(told)

    told = []
    background.start(steps())
    until(lambda: not background.go_on())
    assert told == [7, "no number"]
    assert background.finish(x for x in ()) is None
    assert background.finish(steps()) == 4 and told[2:] == [7, "no number"], "as much as when they are done at once"
    del told[2:]
    background.start(steps())
    background.clear()
    assert not background.go_on() and told == [7, "no number"]


def test_an_engine_that_does_not_stop_is_killed_and_no_other(tmp_path):
    # Deaf before it announces itself, or the polite signal may find it still listening.
    stubborn = script(
        tmp_path / "python", "import signal; signal.signal(15, signal.SIG_IGN)\n" + ANNOUNCE + "time.sleep(60)"
    )
    launcher = Launcher(tmp_path / "folder")
    launcher.start(stubborn, [], by_person=True)
    until(lambda: launcher.poll() == "announced")
    now = time.monotonic()
    launcher.ask_to_stop(now)
    assert launcher.poll(now + 1) == "" and launcher.is_running
    launcher.poll(now + 4)
    time.sleep(0.1)
    assert launcher.child.exit_code is None, "it ignores the polite signal"
    until(lambda: launcher.poll(now + 7) == "ended")
    assert launcher.exit_code is None, "an end that was asked for is no crash"


def test_children_do_not_inherit_blenders_python(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/blender")
    monkeypatch.setenv("PYTHONHOME", "/blender")
    assert not [name for name in clean_environment() if name.startswith("PYTHON")]
    child = Child([sys.executable, "-c", "import os; print(os.environ.get('PYTHONPATH'))"], tmp_path / "log")
    until(lambda: child.poll() is not None)
    assert tail(tmp_path / "log") == ["None"]


# Set-up


def test_cancelling_a_check_that_does_not_end_waits_for_nothing(tmp_path):
    code = f"import signal, time, pathlib; signal.signal(15, signal.SIG_IGN); pathlib.Path({str(tmp_path / 'up')!r}).touch()"
    check = engine_setup.Check(script(tmp_path / "python", code + "; time.sleep(60)"), tmp_path)
    until((tmp_path / "up").exists)
    began = time.monotonic()
    check.cancel()
    assert time.monotonic() - began < 0.5, "Blender stood still until the process was killed"
    until(lambda: check._child.exit_code is not None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ()),
        ("--devices cuda:0,cuda:1  --data '/a b' # x", ("--devices", "cuda:0,cuda:1", "--data", "/a b", "#", "x")),
        ("--data /home/o'brien", ("--data", "/home/o'brien")),
        ("--data /end\\", ("--data", "/end\\")),
        (r"--data /a\ b", ("--data", "/a b")),
    ],
)
def test_options_are_read_as_they_are_written(text, words):
    assert options_of(text, is_windows=False) == words


def test_paths_of_windows_keep_their_backslashes():
    assert options_of(r'--find-links "C:\My Wheels" D:\x', is_windows=True) == (
        "--find-links",
        r"C:\My Wheels",
        r"D:\x",
    )


def make_wheel(folder: Path, doctor: str = '{"ok": true, "version": "9", "python": "3", "torch": "2"}') -> Path:
    """A wheel of a package called conrad_engine that only knows `doctor`."""
    path = folder / "conrad_engine-9-py3-none-any.whl"
    info = "conrad_engine-9.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("conrad_engine/__init__.py", "")
        wheel.writestr("conrad_engine/__main__.py", f"print({doctor!r})")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: conrad-engine\nVersion: 9\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


def finish(setup: engine_setup.SetUp, within_s: float = 3 * WITHIN_S) -> None:
    until(lambda: setup.poll() or setup.is_done, within_s)


@pytest.mark.slow
def test_set_up_makes_its_own_environment_and_repairs_it(tmp_path):
    wheel = make_wheel(tmp_path)
    options = {"preferred_python": sys.executable, "is_offline": True, "forbidden_prefix": "/blender"}
    setup = engine_setup.SetUp(tmp_path / "engine", wheel, find_links=str(tmp_path), **options)
    finish(setup)
    assert not setup.error and setup.doctor.is_ok and setup.doctor.version == "9"
    assert engine_setup.is_complete(tmp_path / "engine")
    assert engine_setup.installed_wheel(tmp_path / "engine") == wheel.name
    python = engine_setup.environment_python(tmp_path / "engine" / "environment")
    assert python.exists() and "Installing" in (tmp_path / "engine" / "setup.log").read_text()
    # Damaged, then cancelled in the middle, then repaired.
    (python.parent.parent / "pyvenv.cfg").unlink()
    setup = engine_setup.SetUp(tmp_path / "engine", wheel, find_links=str(tmp_path), **options)
    until(lambda: setup.poll() or setup.progress[0] > 0.01)
    setup.cancel()
    assert "cancelled" in setup.error and not engine_setup.is_complete(tmp_path / "engine")
    setup = engine_setup.SetUp(tmp_path / "engine", wheel, find_links=str(tmp_path), **options)
    finish(setup)
    assert not setup.error and engine_setup.is_complete(tmp_path / "engine")


def test_set_up_never_builds_on_blenders_python(tmp_path):
    setup = engine_setup.SetUp(
        tmp_path / "engine", make_wheel(tmp_path), sys.executable, forbidden_prefix=sys.base_prefix
    )
    finish(setup)
    assert "is Blender's own" in setup.error and not (tmp_path / "engine" / "environment").exists()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise SystemExit(1)", "does not run"),
        ("print('some'); print('words')", "does not run"),
        ("print(); print('words')", "does not run"),
        ("print('hello'); print('3 9'); print('/usr')", "is Python 3.9"),
    ],
)
def test_set_up_says_what_is_wrong_with_a_python(tmp_path, body, reason):
    setup = engine_setup.SetUp(tmp_path / "engine", make_wheel(tmp_path), script(tmp_path / "python", body))
    finish(setup)
    assert reason in setup.error and "3.11" in setup.error


def test_doctor_answers_are_read_strictly():
    good = engine_setup.Doctor.from_text(
        'warning\n{"ok": false, "memory_bytes": 5, "missing": [{"name": "x", "command": "pip install x"}]}', 0
    )
    assert not good.is_ok and good.missing == (("x", "pip install x"),) and good.memory_bytes == 5
    assert "gave no answer: boom" in engine_setup.Doctor.from_text("Traceback\nboom", 1).problem
    assert engine_setup.Doctor.from_text('{"missing": [1]}', 0).problem
