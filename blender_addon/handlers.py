"""What happens when Blender opens or saves a file, undoes, renders or switches cameras."""

from __future__ import annotations

import atexit
import threading

import bpy
from bpy.app.handlers import persistent

from . import batch_run, camera, link, overlay, preferences, scene_tools

_is_memory_wanted = False
"""A thread has begun to render: the next tick asks the engine for its memory."""


@persistent
def _load_pre(*_: object) -> None:
    overlay.clear()


@persistent
def _load_post(*_: object) -> None:
    link.file_opened()
    batch_run.file_opened()
    if link.has_session():
        link.wake()


@persistent
def _save_pre(*_: object) -> None:
    link.file_is_saved()


@persistent
def _undo_post(*_: object) -> None:
    # Lists live in the window manager, which undo does not touch, but the view has changed under the overlay.
    scene_tools.redraw(view=True)


@persistent
def _render_init(*_: object) -> None:
    global _is_memory_wanted
    if link.has_session() and preferences.get().free_before_render:
        _is_memory_wanted = True
        # Scripts render in the main thread, which has no tick before it is done; a window in another one, and the connection
        # to the engine is the main one's.
        if threading.current_thread() is threading.main_thread():
            _free_memory()


def _free_memory() -> bool:
    """Called at every tick."""
    global _is_memory_wanted
    if _is_memory_wanted:
        _is_memory_wanted = False
        link.session().free_memory(pause_jobs=False)
    return False


@persistent
def _depsgraph_update(scene: bpy.types.Scene, *_: object) -> None:
    if camera.is_aspect_stale(scene) and not bpy.app.background and not bpy.app.timers.is_registered(_give_back):
        bpy.app.timers.register(_give_back, first_interval=0.0)


def _give_back() -> None:
    """Another camera is active now: the scene gets its own render size back. Not done inside the handler, where changes
    to the scene would be part of someone else's undo step."""
    scene = scene_tools.scene_now()
    if camera.is_aspect_stale(scene):
        camera.restore_aspect(scene, with_camera=False)
        scene_tools.push_undo("ConRad: Restore Render Size")


_HANDLERS = (
    ("load_pre", _load_pre),
    ("load_post", _load_post),
    ("save_pre", _save_pre),
    ("undo_post", _undo_post),
    ("redo_post", _undo_post),
    ("render_init", _render_init),
    ("depsgraph_update_post", _depsgraph_update),
)


def _at_exit() -> None:
    if link.has_session():
        link.session().end()


def register() -> None:
    for name, function in _HANDLERS:
        getattr(bpy.app.handlers, name).append(function)
    link.steps.append(_free_memory)
    atexit.register(_at_exit)


def unregister() -> None:
    if _free_memory in link.steps:
        link.steps.remove(_free_memory)
    atexit.unregister(_at_exit)
    for name, function in _HANDLERS:
        listed = getattr(bpy.app.handlers, name)
        if function in listed:
            listed.remove(function)
    if bpy.app.timers.is_registered(_give_back):
        bpy.app.timers.unregister(_give_back)
