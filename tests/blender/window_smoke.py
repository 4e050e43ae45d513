"""The add-on in a real Blender window under Xvfb, driven by mouse and keyboard, and in `blender -b`; screenshots to look at.

    python tests/blender/window_smoke.py --zip dist/conrad-0.1.0.zip --root FOLDER --out SHOTS

FOLDER is a Debian trixie folder with Blender 4.3 and the tools, made once as root:

    debootstrap --variant=minbase trixie FOLDER
    cp /etc/resolv.conf FOLDER/etc/ && for d in proc dev sys; do mount --bind /$d FOLDER/$d; done
    chroot FOLDER apt-get update && chroot FOLDER apt-get install -y --no-install-recommends \
        blender python3-numpy xvfb xdotool imagemagick libgl1-mesa-dri libegl1 python3-xlib

and its three mounts must be there (unmount them before removing it). The engine runs outside of the folder, with this
interpreter and the ball pipeline, or with the real one and its embedded prior (`--real`). Positions of buttons are those of a
1280 x 900 window of Blender 4.3.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DISPLAY, SIZE = ":78", (1280, 900)
INSIDE = "/tmp/conrad_smoke"
INSTALL = (
    "import bpy; bpy.ops.extensions.package_install_files(filepath='{0}/conrad.zip', repo='user_default',"
    " enable_on_install=True, overwrite=True); bpy.context.preferences.view.show_splash = False;"
    " bpy.ops.wm.save_userpref()"
)
BATCH = (
    "import bpy; chosen = bpy.context.preferences.addons['bl_ext.user_default.conrad'].preferences;"
    " chosen.data_folder, chosen.engine_python = '{0}/data', '/usr/bin/python3';"
    " bpy.context.scene.conrad.preset = 'draft';"
    " from bl_ext.user_default.conrad import batch_run; batch_run.run('{0}/in', '{0}/{1}', '{2}')"
)
# Where things are, in pixels from the window's upper left.
TAB, PICTURE_MENU, SECOND_PICTURE = (1043, 207), (799, 175), (840, 226)
ADD_CAMERA, GENERATE, VIEW = (909, 328), (909, 233), (400, 500)
# A dropped picture opens a menu at the mouse: Blender's own empty, then ours.
USE_DROPPED = (VIEW[0] - 50, VIEW[1] - 7)


class Window:
    """A Blender in the folder, its screen, and the state it tells."""

    def __init__(self, root: Path, out: Path, dropped: str) -> None:
        self.root, self.out, self.dropped = root, out, dropped
        self.folder = Path(f"{root}{INSIDE}")
        self._processes: list[subprocess.Popen] = []

    def inside(self, text: str) -> list[str]:
        variables = f"export HOME={INSIDE}/home LIBGL_ALWAYS_SOFTWARE=1 DISPLAY={DISPLAY};"
        return ["chroot", str(self.root), "sh", "-c", f"{variables} {text}"]

    def run(self, text: str, limit_s: float = 120.0) -> str:
        done = subprocess.run(self.inside(text), capture_output=True, text=True, timeout=limit_s)
        if done.returncode:
            raise AssertionError(f"exit code {done.returncode}: {text}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        return done.stdout

    def start(self, text: str, log: str) -> None:
        with open(self.out / log, "wb") as file:
            self._processes.append(subprocess.Popen(self.inside("exec " + text), stdout=file, stderr=file))

    def state(self) -> dict:
        try:
            return json.loads((self.folder / "state.json").read_text())
        except (OSError, ValueError):
            return {}

    def is_true(self, claim: Callable[[dict], object], within_s: float) -> dict:
        """The state in which the claim holds; empty when it does not come true in time."""
        end = time.monotonic() + within_s
        while time.monotonic() < end:
            state = self.state()
            if state.get("error"):
                raise AssertionError(state["error"])
            if state and claim(state):
                return state
            time.sleep(0.1)
        return {}

    def until(self, claim: Callable[[dict], object], what: str, within_s: float = 30.0) -> dict:
        state = self.is_true(claim, within_s)
        if not state:
            self.shot("failed")
            raise AssertionError(f"{what}: not within {within_s} s; {self.state()}")
        print(f"{what}: yes", flush=True)
        return state

    def shot(self, name: str) -> None:
        self.run(f"import -window root {INSIDE}/shot.png")
        shutil.copy(self.folder / "shot.png", self.out / f"{name}.png")

    def click(self, place: tuple[int, int]) -> None:
        x, y = place
        self.focus()
        self.run(f"xdotool mousemove {x - 3} {y - 2}; sleep 0.1; xdotool mousemove {x} {y}; sleep 0.4;"
                 " xdotool mousedown 1; sleep 0.15; xdotool mouseup 1; sleep 0.4")  # fmt: skip

    def click_until(self, place: tuple[int, int], claim: Callable[[dict], object], what: str) -> dict:
        """A click that comes while a menu is still closing is swallowed by it, so it may take several."""
        for _ in range(3):
            self.click(place)
            if self.is_true(claim, 8.0):
                break
        return self.until(claim, what, 1.0)

    def drop(self, file: str, place: tuple[int, int]) -> str:
        return self.run(f"python3 {INSIDE}/drop_file.py {INSIDE}/{file} {place[0]} {place[1]} Blender")

    def command(self, name: str) -> None:
        (self.folder / "command.part").write_text(name)
        (self.folder / "command.part").rename(self.folder / "command")

    def rest(self) -> None:
        """Software GL shows a change with the next one: the mouse lights up a button and leaves it."""
        for x, y in (VIEW, ADD_CAMERA, VIEW):
            time.sleep(1.5)
            self.run(f"xdotool mousemove {x} {y}")
        time.sleep(1.0)

    def focus(self) -> None:
        """There is no window manager that would do it."""
        self.run("xdotool search --class Blender | while read w; do xdotool windowfocus $w; done; sleep 0.1")

    def drag(self, start: tuple[int, int], by: tuple[int, int]) -> None:
        """Orbit with the middle button."""
        moves = "; ".join(
            f"xdotool mousemove {start[0] + by[0] * k // 10} {start[1] + by[1] * k // 10}; sleep 0.05"
            for k in range(11)
        )
        self.run(f"xdotool mousemove {start[0]} {start[1]}; sleep 0.3; xdotool mousedown 2; {moves}; xdotool mouseup 2")

    def key(self, name: str) -> None:
        self.focus()
        self.run(f"xdotool mousemove {VIEW[0]} {VIEW[1]}; sleep 0.2; xdotool key {name}; sleep 0.4")

    def close(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def drive(window: Window, job_limit_s: float) -> None:
    """The artist's way from an empty window to the object and back."""
    window.until(lambda s: s["sidebar"].get("height"), "window and add-on are up", 60)
    time.sleep(1.0)
    window.click_until(TAB, lambda s: s["sidebar"]["tab"] == "ConRad", "a click opens the tab")
    window.shot("0_tab")
    window.click(PICTURE_MENU)
    time.sleep(1.0)
    window.click(SECOND_PICTURE)
    window.until(lambda s: s["picture"] == "slow pot", "a picture is chosen in the list")
    window.drop(f"{window.dropped}.png", VIEW)
    time.sleep(1.0)
    window.shot("1_drop")
    window.click_until(
        USE_DROPPED,
        lambda s: s["picture"].startswith(window.dropped),
        "a file dropped onto the viewport is the picture",
    )
    window.click_until(ADD_CAMERA, lambda s: s["camera"], "the camera is added")
    window.rest()
    window.shot("2_camera")
    window.click_until(GENERATE, lambda s: s["job"], "Generate sends a job")
    window.until(lambda s: s["job"] == "running" and s["step"] > 3, "the job runs", job_limit_s)
    window.until(lambda s: s["is_drawn"], "the overlay is drawn", job_limit_s)
    window.shot("3_running")
    serial = window.state()["serial"]
    window.drag(VIEW, (80, 30))
    window.until(lambda s: s["serial"] > serial + 1, "the preview follows the view", job_limit_s)
    window.rest()
    window.shot("4_orbit")
    window.key("ctrl+z")
    window.until(lambda s: not s["camera"], "undo takes the camera away in the middle of the job")
    window.key("ctrl+shift+z")
    window.until(lambda s: s["camera"], "redo brings it back")
    state = window.until(lambda s: len(s["made"]) == 1, "the object is there", job_limit_s)
    assert not state["is_rehearsed_anew"], "the overlay rehearses what the driver has compiled already"
    n_objects = state["n_undone"]
    window.rest()
    window.shot("5_object")
    window.key("ctrl+z")
    window.until(lambda s: not s["made"] and s["n_undone"] == n_objects - 1 and s["camera"], "one undo takes it away")
    window.key("ctrl+shift+z")
    window.until(lambda s: len(s["made"]) == 1, "redo brings it back")
    window.rest()
    window.shot("6_redo")
    window.command("import_in_edit_mode")
    window.until(
        lambda s: len(s["made"]) == 2 and s["mode"] == "EDIT", "a result comes in beside the work in Edit Mode"
    )
    for key in ("ctrl+z", "ctrl+z", "ctrl+z", "ctrl+shift+z", "ctrl+shift+z", "ctrl+shift+z"):
        window.key(key)
    told = window.state()["told"]
    window.until(lambda s: s["told"] > told and len(s["made"]) == 2, "undo and redo across it leave Blender alive")
    window.command("object_mode")
    window.until(
        lambda s: s["mode"] == "OBJECT" and s["render_size"] != [1920, 1080], "the picture's proportions are on"
    )
    window.command("other_camera")
    state = window.until(lambda s: s["render_size"] == [1920, 1080], "another camera gives the render size back")
    window.command("camera_from_view")
    window.until(
        lambda s: s["view_error"] is not None and s["view_error"] < 1e-3, "the view becomes a reference camera"
    )
    window.command("add_camera_of_a_file")
    window.until(lambda s: s["was_decoded"] and s["camera"], "a large picture is decoded before its camera is added")
    longest = window.state()["longest_ms"]
    window.command("render")
    window.until(lambda s: s["is_rendered"], "Blender renders")
    window.command("generate_from_render")
    state = window.until(lambda s: s["from_render"] == "running", "the render result is sent", job_limit_s)
    longest["tick, a render result of 1920 x 1080 that nobody looked at"] = state["longest_ms"]["tick"]
    print(f"{state['ticks']} ticks: p99 {state['tick_p99_ms']:.1f} ms (software GL, load {os.getloadavg()[0]:.1f})")
    for name, (wall, own) in longest.items():
        print(f"longest {name}: {wall:.1f} ms, own processor time {own:.1f} ms")


def convert_folder(window: Window, limit_s: float) -> None:
    """`blender -b --python-expr` converts a folder, once to GLB files and once to a library; a bad picture fails alone,
    and a Blender that is killed in the middle is gone on from."""
    (window.folder / "in").mkdir()
    shutil.copy(window.folder / f"{window.dropped}.png", window.folder / "in" / "robot.png")
    (window.folder / "in" / "bad.png").write_bytes(b"no picture")
    for folder, output, made in (("glb", "GLB", "robot.glb"), ("library", "LIBRARY", "robot.blend")):
        n_before = len(list((window.folder / "data" / "jobs").iterdir()))
        command = f'blender -b --python-exit-code 1 --python-expr "{BATCH.format(INSIDE, folder, output)}"'
        if output == "GLB":
            process = subprocess.Popen(window.inside("exec " + command))
            end = time.monotonic() + limit_s
            while items_of(window, folder).get("robot.png", {}).get("state") != "sent":
                assert process.poll() is None and time.monotonic() < end, "the batch was not killed in the middle"
                time.sleep(0.01)
            process.kill()
            process.wait()
        print(window.run(command, limit_s))
        items = items_of(window, folder)
        assert {name: item["state"] for name, item in items.items()} == {"robot.png": "done", "bad.png": "failed"}, (
            items
        )
        n_jobs = len(list((window.folder / "data" / "jobs").iterdir())) - n_before
        assert n_jobs == len(items), f"{n_jobs} jobs for {len(items)} pictures"
        assert (window.folder / folder / made).stat().st_size > 100, made
        print(f"blender -b makes {made}: yes", flush=True)


def items_of(window: Window, folder: str) -> dict[str, dict]:
    """The batch list in an output folder, by picture; empty before it is written."""
    path = window.folder / folder / "conrad_batch.json"
    return {item["picture"]: item for item in json.loads(path.read_text())["items"]} if path.exists() else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zip", type=Path, required=True)
    parser.add_argument("--root", type=Path, required=True, help="folder with Blender in it")
    parser.add_argument("--out", type=Path, required=True, help="folder of the screenshots")
    parser.add_argument("--picture", type=Path, default=ROOT / "tests" / "pictures" / "robot.png")
    parser.add_argument("--real", action="store_true", help="the real engine with its prior instead of the ball")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    # The ball takes its time for a picture whose name says so.
    window = Window(options.root.resolve(), options.out.resolve(), "robot" if options.real else "slow_robot")
    shutil.rmtree(window.folder, ignore_errors=True)
    (window.folder / "home").mkdir(parents=True)
    (window.folder / "data").mkdir()
    shutil.copy(options.zip, window.folder / "conrad.zip")
    for name in ("listed", window.dropped):
        shutil.copy(options.picture, window.folder / f"{name}.png")
    for script in ("window_state.py", "drop_file.py"):
        shutil.copy(Path(__file__).with_name(script), window.folder)
    engine_command = [sys.executable, "-m", "conrad_engine", "serve", "--devices", "cpu"]
    engine_command += ["--data", str(window.folder / "data")]
    engine_command += [] if options.real else ["--pipeline", "tests.blender.ball_pipeline"]
    with open(options.out / "engine.log", "wb") as log:
        engine = subprocess.Popen(
            engine_command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=log, cwd=ROOT
        )
    try:
        window.start(f"Xvfb {DISPLAY} -screen 0 {SIZE[0]}x{SIZE[1]}x24 +extension GLX -nolisten tcp", "xvfb.log")
        time.sleep(1.5)
        window.run(f'blender -b --python-expr "{INSTALL.format(INSIDE)}"')
        window.start(
            f"blender --window-geometry 0 0 {SIZE[0]} {SIZE[1]} --python {INSIDE}/window_state.py --"
            f" {INSIDE}/state.json {INSIDE}/data {INSIDE}/listed.png optimize.n_steps={80 if options.real else 200}",
            "blender.log",
        )
        drive(window, job_limit_s=900 if options.real else 60)
        convert_folder(window, limit_s=900 if options.real else 120)
    finally:
        window.close()
        engine.terminate()
        engine.wait(15)
    print("SMOKE TEST PASSED")
    return 0


if __name__ == "__main__":
    sys.exit(main())
