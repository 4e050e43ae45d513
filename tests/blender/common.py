"""What every script inside bpy starts with: the built zip is installed as an extension, as an artist would.

BLENDER_USER_RESOURCES=EMPTY_FOLDER PYTHON_WITH_BPY SCRIPT.py ZIP
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable

import bpy

MODULE = "bl_ext.user_default.conrad"


def install(zip_path: str) -> None:
    bpy.ops.extensions.package_install_files(
        filepath=zip_path, repo="user_default", enable_on_install=True, overwrite=True
    )
    assert "zmq" in sys.modules, "the zip's own pyzmq wheel is not in use"


def part(name: str):  # noqa: ANN201
    """A module of the installed add-on."""
    return importlib.import_module(f"{MODULE}.{name}")


def preferences():  # noqa: ANN201
    return bpy.context.preferences.addons[MODULE].preferences


def empty_scene() -> bpy.types.Scene:
    bpy.ops.wm.read_homefile(use_empty=True, use_factory_startup=True)
    return bpy.context.scene


def pump_until(is_done: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """What the timer does in a window."""
    link = part("link")
    end = time.monotonic() + timeout_s
    while not is_done():
        link.pump()
        assert not link.last_error, link.last_error
        time.sleep(0.02)
        assert time.monotonic() < end, f"not done after {timeout_s} s: {link.session().state_line()}"


def figure(what: str, at_most: str, found: str) -> None:
    """Print a line of the table of what the add-on must show."""
    print(f"FIGURE | {what} | at most {at_most} | {found}", flush=True)


def main(run: Callable[[], None]) -> None:
    """Run the checks and leave at once: bpy may crash or hang in a normal exit after it has rendered."""
    code = 1
    try:
        install(sys.argv[1])
        run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        part("link").unregister()
        print("CHECKS PASSED" if code == 0 else "CHECKS FAILED")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
