"""Runs inside the Blender window of window_smoke.py: prepares it and tells its state through a file.

blender --python window_state.py -- STATE_FILE DATA_FOLDER PICTURE MORE_SETTINGS

A file "command" beside the state file is one line of `COMMANDS`, done once, for what the mouse cannot do reliably.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from time import perf_counter, thread_time
from typing import Any

import bpy

MODULE = "bl_ext.user_default.conrad"
STATE_FILE, DATA_FOLDER, PICTURE, MORE_SETTINGS = sys.argv[sys.argv.index("--") + 1 :]

longest_s: dict[str, tuple[float, float]] = {}
"""Wall and own processor seconds of the longest call of everything that Blender calls, by its name."""
rehearsed: list[tuple[int, int, bool]] = []
"""Sizes of the pictures whose drawing the overlay has rehearsed, each with or without colors."""


@contextmanager
def timed(name: str) -> Iterator[None]:
    wall, own = perf_counter(), thread_time()
    try:
        yield
    finally:
        longest_s[name] = max(longest_s.get(name, (0.0, 0.0)), (perf_counter() - wall, thread_time() - own))


def timed_method(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    # Blender passes as many arguments as the function names.
    def call(self, context):  # noqa: ANN001, ANN202
        with timed(name):
            return function(self, context)

    return call


def timed_tick(pump: Callable[[], float | None]) -> Callable[[], float | None]:
    def call() -> float | None:
        with timed("tick"):
            return pump()

    return call


def timed_handler(name: str, handler: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        with timed(name):
            handler()

    return call


def noted(rehearse: Callable[[Any, bool], None], overlay: Any) -> Callable[[Any, bool], None]:
    def call(job: Any, has_colors: bool) -> None:
        rehearsed.append((*overlay._shown.rgb.shape[:2], has_colors))
        rehearse(job, has_colors)

    return call


def watch() -> None:
    """Time panels, operators and the overlay; the add-on times its ticks itself."""
    overlay = import_module(f"{MODULE}.overlay")
    for name in ("panels", "operators_engine", "operators_camera", "operators_job", "operators_batch", "operators_ui"):
        for cls in import_module(f"{MODULE}.{name}").CLASSES:
            for method in ("draw", "execute"):
                if method in dir(cls) and cls.__module__.startswith(MODULE):
                    setattr(cls, method, timed_method(f"{cls.__name__}.{method}", getattr(cls, method)))
    link = import_module(f"{MODULE}.link")
    link.pump = timed_tick(link.pump)
    # They are registered once more, with the clock around them.
    overlay.unregister()
    overlay._rehearse = noted(overlay._rehearse, overlay)
    overlay._prepare = timed_handler("overlay before a view", overlay._prepare)
    overlay._draw = timed_handler("overlay", overlay._draw)
    overlay.register()


def prepare() -> None:
    chosen = bpy.context.preferences.addons[MODULE].preferences
    # The engine runs already; its announcement lies in the data folder, so no interpreter is ever started.
    chosen.data_folder, chosen.engine_python = DATA_FOLDER, sys.executable
    for item in list(bpy.data.objects):
        if item.type == "MESH":
            bpy.data.objects.remove(item)
    image = bpy.data.images.load(PICTURE)
    image.name, image.use_fake_user = "slow pot", True
    bpy.context.scene.conrad.preset, bpy.context.scene.conrad.extra = "draft", MORE_SETTINGS
    bpy.ops.ed.undo_push(message="Prepared")


def import_in_edit_mode() -> None:
    window = bpy.context.window_manager.windows[0]
    area = next(area for area in window.screen.areas if area.type == "VIEW_3D")
    with bpy.context.temp_override(window=window, area=area):
        bpy.ops.object.mode_set(mode="EDIT")
        bpy.ops.conrad.import_result(job=next(iter(import_module(f"{MODULE}.link").session().table.jobs)))


def object_mode() -> None:
    window = bpy.context.window_manager.windows[0]
    with bpy.context.temp_override(window=window):
        if bpy.context.mode != "OBJECT":
            bpy.ops.object.mode_set(mode="OBJECT")


def other_camera() -> None:
    bpy.context.window_manager.windows[0].scene.camera = bpy.data.objects["Camera"]


def camera_from_view() -> None:
    """The new camera stands where the view looked from, and sees as much over its larger side."""
    global view_error
    window = bpy.context.window_manager.windows[0]
    area = next(area for area in window.screen.areas if area.type == "VIEW_3D")
    region = next(region for region in area.regions if region.type == "WINDOW")
    data, settings = area.spaces.active.region_3d, window.scene.conrad
    settings.camera = None
    expected = data.view_matrix.inverted()
    lens = data.window_matrix[0][0] * region.width / 2 * 36.0 / max(region.width, region.height)
    with bpy.context.temp_override(window=window, area=area, region=region):
        bpy.ops.conrad.camera_from_view()
    found = settings.camera.matrix_basis
    off = max(abs(expected[row][column] - found[row][column]) for row in range(3) for column in range(4))
    view_error = max(off, abs(settings.camera.data.lens / lens - 1))


def add_camera_of_a_file() -> None:
    """Press Add Reference Camera for a large picture that nobody has looked at; it begins once a thread has decoded it."""
    global was_decoded
    window = bpy.context.window_manager.windows[0]
    area = next(area for area in window.screen.areas if area.type == "VIEW_3D")
    image = bpy.data.images.new("large", 3000, 2000, alpha=True)
    image.filepath_raw, image.file_format = os.path.join(os.path.dirname(STATE_FILE), "large.png"), "PNG"
    image.save()
    bpy.data.images.remove(image)
    image = bpy.data.images.load(os.path.join(os.path.dirname(STATE_FILE), "large.png"))
    window.scene.conrad.camera, window.scene.conrad.image = None, image
    camera = import_module(f"{MODULE}.camera")
    add_reference = camera.add_reference

    def add(*arguments: Any) -> bpy.types.Object:
        global was_decoded
        was_decoded = not import_module(f"{MODULE}.pictures").is_decoding() and image.has_data
        return add_reference(*arguments)

    camera.add_reference = add
    with bpy.context.temp_override(window=window, area=area, region=area.regions[-1]):
        answer = bpy.ops.conrad.add_camera("INVOKE_DEFAULT")
        again = bpy.ops.conrad.add_camera("INVOKE_DEFAULT")
    assert answer == {"RUNNING_MODAL"} and window.scene.conrad.camera is None, answer
    assert again == {"CANCELLED"}, "a second press while the first one waits"


def render() -> None:
    """Render in Full HD, and do not look at the result: Blender has not read AgX's table yet."""
    global was_rendering
    window = bpy.context.window_manager.windows[0]
    scene = window.scene
    bpy.context.preferences.view.render_display_type = "NONE"
    scene.render.engine, scene.cycles.samples, scene.cycles.use_denoising = "CYCLES", 1, False
    scene.render.resolution_x, scene.render.resolution_y = 1920, 1080
    # Without a handler: Blender calls those from the renderer's thread, after which scripts may not write any more at times.
    with bpy.context.temp_override(window=window):
        bpy.ops.render.render("INVOKE_DEFAULT")
    was_rendering = True


def generate_from_render() -> None:
    window = bpy.context.window_manager.windows[0]
    settings = window.scene.conrad
    settings.camera, settings.image = None, bpy.data.images["Render Result"]
    # From now on the longest tick is of this.
    longest_s.pop("tick", None)
    with bpy.context.temp_override(window=window):
        bpy.ops.conrad.generate("INVOKE_DEFAULT")


was_rendering = False
view_error: float | None = None
was_decoded: bool | None = None
COMMANDS = {
    function.__name__: function
    for function in (
        import_in_edit_mode,
        object_mode,
        other_camera,
        camera_from_view,
        add_camera_of_a_file,
        render,
        generate_from_render,
    )
}


def obey() -> None:
    path = os.path.join(os.path.dirname(STATE_FILE), "command")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            name = file.read()
        os.remove(path)
        COMMANDS[name]()


def sidebar() -> dict:
    for area in bpy.context.window_manager.windows[0].screen.areas:
        if area.type == "VIEW_3D":
            if not area.spaces.active.show_region_ui:
                # Setting it again would end a click in the middle.
                area.spaces.active.show_region_ui = True
            region = next(r for r in area.regions if r.type == "UI")
            return {"x": region.x, "y": region.y, "width": region.width, "height": region.height,
                    "tab": getattr(region, "active_panel_category", "")}  # fmt: skip
    return {}


def tell() -> float:
    obey()
    link, overlay = import_module(f"{MODULE}.link"), import_module(f"{MODULE}.overlay")
    session = link.session()
    job = next(iter(session.table.jobs.values()), None)
    settings = bpy.context.window_manager.windows[0].scene.conrad
    render = bpy.context.window_manager.windows[0].scene.render
    ticks = sorted(link.tick_times)
    state = {
        "sidebar": sidebar(),
        "engine": session.state.value,
        "picture": settings.image.name if settings.image else "",
        "camera": settings.camera.name if settings.camera else "",
        "job": job.state_name if job else "",
        "step": job.steps[0] if job else 0,
        "serial": job.preview.serial if job and job.preview else 0,
        "is_drawn": overlay.is_ready(),
        "is_rehearsed_anew": len(set(rehearsed)) < len(rehearsed),
        "made": [item.name for item in bpy.data.objects if item.get("conrad_job")],
        "n_undone": len(bpy.data.objects),
        "mode": bpy.context.window_manager.windows[0].view_layer.objects.active.mode
        if bpy.context.window_manager.windows[0].view_layer.objects.active
        else "",
        "render_size": [render.resolution_x, render.resolution_y],
        "view_error": view_error,
        "was_decoded": was_decoded,
        "is_rendered": was_rendering and not bpy.app.is_job_running("RENDER"),
        "from_render": next((job.state_name for job in session.table.jobs.values() if job.name == "Render Result"), ""),
        "told": perf_counter(),
        "ticks": len(ticks),
        "tick_p99_ms": 1e3 * ticks[int(0.99 * (len(ticks) - 1))] if ticks else 0.0,
        "longest_ms": {
            name: [round(1e3 * seconds, 1) for seconds in both]
            for name, both in sorted(longest_s.items(), key=lambda item: -item[1][0])
        },
        "error": link.last_error,
    }
    with open(STATE_FILE + ".part", "w", encoding="utf-8") as file:
        json.dump(state, file)
    os.replace(STATE_FILE + ".part", STATE_FILE)
    return 0.1


def begin() -> None:
    watch()
    prepare()
    bpy.app.timers.register(tell, first_interval=0.1, persistent=True)


bpy.app.timers.register(begin, first_interval=1.0)
