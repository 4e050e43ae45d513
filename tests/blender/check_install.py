"""Enabling and disabling: quick, repeatable, without leftovers; another file and undo at any moment."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import bpy
import numpy as np
from common import MODULE, empty_scene, figure, main, part, pump_until

LIMIT_S = 0.5


def leftovers() -> dict[str, set]:
    """Everything an add-on can leave behind."""
    handlers = bpy.app.handlers
    return {
        "classes": {name for name in dir(bpy.types) if "conrad" in name.lower()},
        "operators": {name for name in dir(bpy.ops) if name == "conrad"},
        "handlers": {
            f"{name}.{function.__module__}"
            for name in dir(handlers)
            if isinstance(getattr(handlers, name), list)
            for function in getattr(handlers, name)
            if "conrad" in function.__module__
        },
        "properties": {
            name
            for kind in (bpy.types.Scene, bpy.types.Object, bpy.types.WindowManager)
            for name in kind.bl_rna.properties.keys()
            if name == "conrad"
        },
        "status bar": {f for f in bpy.types.STATUSBAR_HT_header.draw._draw_funcs if "conrad" in f.__module__},
    }


def check_cycles() -> None:
    # bpy puts its scripts on the path when it is imported, not before.
    import addon_utils

    bpy.context.scene.conrad.image = bpy.data.images.new("picture", 64, 64)
    longest = {"disable": 0.0, "enable": 0.0}
    for _ in range(5):
        started = time.perf_counter()
        addon_utils.disable(MODULE)
        middle = time.perf_counter()
        left = {kind: names for kind, names in leftovers().items() if names and kind != "operators"}
        assert not left, left
        addon_utils.enable(MODULE)
        ended = time.perf_counter()
        longest["disable"] = max(longest["disable"], middle - started)
        longest["enable"] = max(longest["enable"], ended - middle)
    for what, seconds in longest.items():
        figure(f"{what}, the longest of 5, nothing left behind", f"{LIMIT_S} s", f"{seconds:.3f} s")
    assert max(longest.values()) < LIMIT_S
    assert bpy.context.scene.conrad.image.name == "picture", "the file's settings outlive disabling"
    found = leftovers()
    assert len(found["handlers"]) == 7 and found["properties"] == {"conrad"} and len(found["status bar"]) == 1


def check_first_use() -> None:
    """Reasons are given before anything is set up; nothing starts by itself."""
    requests, preferences = part("requests"), part("preferences")
    scene = empty_scene()
    assert requests.why_not(bpy.context).startswith("Choose a picture first")
    scene.conrad.image = bpy.data.images.new("picture", 64, 64)
    assert "Set up the engine" in requests.why_not(bpy.context)
    assert not bpy.ops.conrad.generate.poll()
    assert not part("link").has_session(), "nothing was started"
    chosen = preferences.get()
    chosen.use_remote, chosen.remote_endpoint = True, "tcp://gpu.example.org:5555"
    expected = "" if bpy.app.online_access else "Online Access"
    assert expected in preferences.why_no_engine()
    chosen.remote_endpoint = "tcp://127.0.0.1:5555"
    assert preferences.why_no_engine() == ""
    chosen.use_remote = False
    chosen.engine_options = "--data /home/o'brien"
    assert preferences.engine_settings().extra_arguments == ("--data", "/home/o'brien")
    chosen.engine_options = ""
    assert part("engine_setup").bundled_wheel(preferences.addon_folder()) is not None
    operators = part("operators_engine")
    if not bpy.app.online_access:
        assert "Online Access" in operators.why_no_setup()
    chosen.is_offline = True
    assert "wheel folder" in operators.why_no_setup()
    chosen.find_links = bpy.app.tempdir
    preferences.setup_folder().write_bytes(b"no folder")
    try:
        bpy.ops.conrad.set_up_engine()
        raise AssertionError("no error is reported")
    except RuntimeError as error:
        assert "cannot be written" in str(error) and "Traceback" not in str(error), error
    preferences.setup_folder().unlink()
    assert operators.running_setup is None
    chosen.find_links = ""


def check_dead_engine() -> None:
    """An engine that cannot run: a short state, its last words once, and an open breaker that says so."""
    preferences, parts, session = part("preferences"), part("panel_parts"), part("link").session()
    preferences.get().engine_python = sys.executable
    bpy.ops.conrad.start_engine()
    pump_until(lambda: session.launcher.exit_code is not None and not session.launcher.is_running)
    assert parts.state_text() == "Crashed"
    [problem] = parts.problems()
    assert "exit code 1" in problem and "No module named conrad_engine" in problem, problem
    session.problem = "The engine failed 3 times in a row"
    assert parts.problems()[-1] == "The engine failed 3 times in a row", "it is not hidden by the report"
    assert "exit code 1" in part("operators_engine").report_text()
    session.problem = preferences.get().engine_python = ""
    part("link").refresh_settings()


def check_render_thread() -> None:
    """A window renders in a thread of its own, which leaves the connection to the main one; a script in the main thread."""
    handlers, session, threads = part("handlers"), part("link").session(), []
    preferences = part("preferences").get()
    preferences.free_before_render = True
    session.free_memory = lambda pause_jobs: threads.append(threading.current_thread())
    renderer = threading.Thread(target=handlers._render_init)
    renderer.start()
    renderer.join()
    assert not threads
    part("link").pump()
    assert threads == [threading.main_thread()]
    part("link").pump()
    handlers._render_init()
    assert threads == 2 * [threading.main_thread()]
    preferences.free_before_render = False
    del session.free_memory


def check_own_presets() -> None:
    """Settings are kept under a name and come back; the picture and the seed stay."""
    settings = bpy.context.scene.conrad
    settings.preset, settings.size, settings.seed = "fine", 0.25, 4
    assert bpy.ops.conrad.preset_add(name="Small And Fine") == {"FINISHED"}
    [folder] = bpy.utils.preset_paths("conrad")
    settings.preset, settings.size, settings.seed = "draft", 2.0, 5
    [name] = os.listdir(folder)
    assert bpy.ops.script.execute_preset(filepath=f"{folder}/{name}", menu_idname="CONRAD_PT_presets") == {"FINISHED"}
    assert (settings.preset, settings.size, settings.seed) == ("fine", 0.25, 5)


def check_mask() -> None:
    """A mask is the alpha of a picture that has one, else its brightness; its top is the picture's top."""
    pictures, finish = part("pictures"), part("background").finish
    mask = bpy.data.images.new("mask", 4, 2, alpha=True)
    bright = np.zeros((2, 4, 4), np.float32)
    bright[..., 3], bright[1, :2, 1] = 1, 1
    mask.pixels.foreach_set(bright.ravel())
    array = finish(pictures.mask_fields(mask))["mask_pixels"]
    found = np.frombuffer(array.data, np.uint8).reshape(array.shape)
    assert found.tolist() == [[255, 255, 0, 0], [0, 0, 0, 0]], found
    bright[0, 3, 3] = 0.5
    mask.pixels.foreach_set(bright.ravel())
    array = finish(pictures.mask_fields(mask))["mask_pixels"]
    found = np.frombuffer(array.data, np.uint8).reshape(array.shape)
    assert found.tolist() == [[255, 255, 255, 255], [255, 255, 255, 128]], found


def check_drop() -> None:
    """A dropped file becomes the picture; something else is refused in words."""
    scene = bpy.context.scene
    try:
        bpy.ops.conrad.drop_picture("EXEC_DEFAULT", filepath=__file__)
    except RuntimeError as error:
        assert "has no pixels" in str(error) or "cannot be read" in str(error), error
    else:
        assert scene.conrad.image.name != "check_install.py"
    image = bpy.data.images.new("dropped", 8, 8)
    image.filepath_raw, image.file_format = bpy.app.tempdir + "dropped.png", "PNG"
    image.save()
    Path(bpy.app.tempdir, "damaged.tif").write_bytes(b"II*\0 and no more")
    try:
        bpy.ops.conrad.drop_picture("EXEC_DEFAULT", filepath=bpy.app.tempdir + "damaged.tif", with_camera=True)
        raise AssertionError("no error is reported")
    except RuntimeError as error:
        assert "has no pixels" in str(error) and "Traceback" not in str(error), error
    assert scene.conrad.camera is None
    bpy.ops.conrad.drop_picture("EXEC_DEFAULT", filepath=image.filepath_raw, with_camera=True)
    assert scene.conrad.image.name.startswith("dropped") and scene.conrad.camera is not None


def check_texts() -> None:
    """Labels in title case, tooltips one sentence without a final dot."""
    for name in dir(bpy.types):
        if not name.startswith("CONRAD_OT_"):
            continue
        operator = getattr(bpy.types, name)
        assert operator.bl_description and not operator.bl_description.endswith("."), name
        assert operator.bl_label.istitle() or operator.bl_label[0].isupper(), name
    for group in ("ConradSettings", "ConradBatchSettings", "ConradObject"):
        for prop in part("properties").__dict__[group].bl_rna.properties:
            assert not prop.description.endswith("."), (group, prop.identifier)


def run() -> None:
    check_cycles()
    check_first_use()
    check_dead_engine()
    check_render_thread()
    check_own_presets()
    check_mask()
    check_drop()
    check_texts()
    sys.stdout.flush()


main(run)
