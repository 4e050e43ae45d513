"""ConRad for Blender: one picture in, one textured object out, without leaving the viewport.

Importing this package costs nothing and needs no Blender; `register` imports the rest.
"""

from __future__ import annotations

import importlib

MODULES = (
    "preferences",
    "properties",
    "link",
    "thumbnails",
    "overlay",
    "operators_engine",
    "operators_camera",
    "operators_job",
    "batch_run",
    "operators_batch",
    "operators_ui",
    "panels",
    "handlers",
    "translations",
)
_registered: list = []


def register() -> None:
    try:
        importlib.import_module("zmq")
    except ImportError as error:
        # A zip built for another Python: say so in the panel instead of failing to enable.
        broken = importlib.import_module(".broken", __package__)
        broken.register(str(error))
        _registered.append(broken)
        return
    for name in MODULES:
        module = importlib.import_module("." + name, __package__)
        module.register()
        _registered.append(module)


def unregister() -> None:
    while _registered:
        _registered.pop().unregister()
