"""The add-on in a real Blender window under Xvfb, driven by mouse and keyboard; screenshots to look at.

    python tests/blender/window_smoke.py --zip dist/conrad-0.1.0.zip --root FOLDER --out SHOTS

FOLDER is a Debian trixie folder with Blender 4.3 and the tools, made once as root:

    debootstrap --variant=minbase trixie FOLDER
    cp /etc/resolv.conf FOLDER/etc/ && for d in proc dev sys; do mount --bind /$d FOLDER/$d; done
    chroot FOLDER apt-get update && chroot FOLDER apt-get install -y --no-install-recommends \
        blender python3-numpy xvfb xdotool imagemagick libgl1-mesa-dri libegl1

and its three mounts must be there (unmount them before removing it). The engine runs outside of the folder, with this
interpreter and the ball pipeline. Positions of buttons are those of a 1280 x 900 window of Blender 4.3.
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
# Where things are, in pixels from the window's upper left.
TAB, PICTURE_MENU, SECOND_PICTURE = (1043, 207), (799, 154), (840, 205)
ADD_CAMERA, GENERATE, VIEW = (909, 307), (909, 212), (400, 500)


class Window:
    """A Blender in the folder, its screen, and the state it tells."""

    def __init__(self, root: Path, out: Path) -> None:
        self.root, self.out = root, out
        self.folder = Path(f"{root}{INSIDE}")
        self._processes: list[subprocess.Popen] = []

    def command(self, text: str) -> list[str]:
        variables = f"export HOME={INSIDE}/home LIBGL_ALWAYS_SOFTWARE=1 DISPLAY={DISPLAY};"
        return ["chroot", str(self.root), "sh", "-c", f"{variables} {text}"]

    def run(self, text: str) -> str:
        return subprocess.run(self.command(text), check=True, capture_output=True, text=True, timeout=120).stdout

    def start(self, text: str, log: str) -> None:
        with open(self.out / log, "wb") as file:
            self._processes.append(subprocess.Popen(self.command("exec " + text), stdout=file, stderr=file))

    def state(self) -> dict:
        try:
            return json.loads((self.folder / "state.json").read_text())
        except (OSError, ValueError):
            return {}

    def until(self, is_true: Callable[[dict], object], what: str, within_s: float = 30.0) -> dict:
        end = time.monotonic() + within_s
        while time.monotonic() < end:
            state = self.state()
            if state.get("error"):
                raise AssertionError(state["error"])
            if state and is_true(state):
                print(f"{what}: yes", flush=True)
                return state
            time.sleep(0.1)
        self.shot("failed")
        raise AssertionError(f"{what}: not within {within_s} s; {self.state()}")

    def shot(self, name: str) -> None:
        self.run(f"import -window root {INSIDE}/shot.png")
        shutil.copy(self.folder / "shot.png", self.out / f"{name}.png")

    def click(self, place: tuple[int, int]) -> None:
        x, y = place
        self.focus()
        self.run(f"xdotool mousemove {x - 3} {y - 2}; sleep 0.1; xdotool mousemove {x} {y}; sleep 0.4;"
                 " xdotool mousedown 1; sleep 0.15; xdotool mouseup 1; sleep 0.4")  # fmt: skip

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


def drive(window: Window) -> None:
    """The artist's way from an empty window to the object and back."""
    window.until(lambda s: s["sidebar"].get("height"), "window and add-on are up", 60)
    time.sleep(1.0)
    window.click(TAB)
    window.until(lambda s: s["sidebar"]["tab"] == "ConRad", "a click opens the tab")
    window.click(PICTURE_MENU)
    time.sleep(0.5)
    window.click(SECOND_PICTURE)
    window.until(lambda s: s["picture"] == "slow pot", "a picture is chosen in the list")
    window.click(ADD_CAMERA)
    window.until(lambda s: s["camera"], "the camera is added")
    window.shot("1_camera")
    window.click(GENERATE)
    window.until(lambda s: s["job"] == "running" and s["step"] > 3, "the job runs")
    window.until(lambda s: s["is_drawn"], "the overlay is drawn")
    window.shot("2_running")
    serial = window.state()["serial"]
    window.drag(VIEW, (160, 40))
    window.until(lambda s: s["serial"] > serial + 1, "the preview follows the view")
    time.sleep(1.5)
    window.shot("3_orbit")
    state = window.until(lambda s: len(s["made"]) == 1, "the object is there", 60)
    n_objects = state["n_undone"]
    time.sleep(0.5)
    window.shot("4_object")
    window.key("ctrl+z")
    window.until(lambda s: not s["made"] and s["n_undone"] == n_objects - 1 and s["camera"], "one undo takes it away")
    window.key("ctrl+shift+z")
    state = window.until(lambda s: len(s["made"]) == 1, "redo brings it back")
    window.shot("5_redo")
    print(
        f"{state['ticks']} ticks: p99 {state['tick_p99_ms']:.1f} ms, longest {state['tick_longest_ms']} ms (software GL)"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zip", type=Path, required=True)
    parser.add_argument("--root", type=Path, required=True, help="folder with Blender in it")
    parser.add_argument("--out", type=Path, required=True, help="folder of the screenshots")
    parser.add_argument("--picture", type=Path, default=ROOT / "tests" / "pictures" / "robot.png")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    window = Window(options.root.resolve(), options.out.resolve())
    shutil.rmtree(window.folder, ignore_errors=True)
    (window.folder / "home").mkdir(parents=True)
    (window.folder / "data").mkdir()
    shutil.copy(options.zip, window.folder / "conrad.zip")
    shutil.copy(options.picture, window.folder / options.picture.name)
    shutil.copy(Path(__file__).with_name("window_state.py"), window.folder)
    engine_command = [sys.executable, "-m", "conrad_engine", "serve", "--devices", "cpu"]
    engine_command += ["--data", str(window.folder / "data"), "--pipeline", "tests.blender.ball_pipeline"]
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
            f" {INSIDE}/state.json {INSIDE}/data {INSIDE}/{options.picture.name}",
            "blender.log",
        )
        drive(window)
    finally:
        window.close()
        engine.terminate()
        engine.wait(15)
    print("SMOKE TEST PASSED")
    return 0


if __name__ == "__main__":
    sys.exit(main())
