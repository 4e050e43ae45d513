"""Machine settings: where the engine is, how it is set up, and what it may use."""

from __future__ import annotations

from pathlib import Path

import bpy
from bpy.props import BoolProperty, EnumProperty, FloatProperty, IntProperty, StringProperty

from . import engine_setup
from .engine_state import EngineSettings, options_of
from .protocol import default_data_folder


class ConradPreferences(bpy.types.AddonPreferences):
    bl_idname = __package__

    engine_python: StringProperty(
        name="Engine Python",
        subtype="FILE_PATH",
        description="Interpreter of an environment with the engine in it; empty takes the one made by Set Up Engine",
    )
    base_python: StringProperty(
        name="Base Python",
        subtype="FILE_PATH",
        description="Python 3.11 or newer to build the engine's environment on; empty looks for one",
    )
    find_links: StringProperty(
        name="Wheel Folder", subtype="DIR_PATH", description="Folder of Python wheels to install from"
    )
    is_offline: BoolProperty(
        name="Wheel Folder Only", description="Install without the internet, from the wheel folder alone"
    )
    pip_options: StringProperty(
        name="More Options for pip", description="Such as --index-url with the address of another torch build"
    )
    engine_options: StringProperty(
        name="More Options for the Engine", description="Such as --devices cuda:0,cuda:1; see conrad serve --help"
    )
    device: EnumProperty(
        name="Device",
        items=(
            ("auto", "Automatic", "The GPU if there is a usable one"),
            ("cuda", "NVIDIA GPU", ""),
            ("mps", "Apple GPU", ""),
            ("cpu", "CPU", ""),
        ),
        default="auto",
        description="What the engine computes on",
    )
    data_folder: StringProperty(
        name="Jobs Folder", subtype="DIR_PATH", description="Where the engine keeps jobs; empty takes its usual place"
    )
    idle_minutes: FloatProperty(
        name="Stop When Idle (Minutes)", min=0.0, precision=1, description="Minutes without work; 0 keeps it running"
    )
    use_remote: BoolProperty(
        name="Remote Engine", description="Use an engine on another machine instead of one on this machine"
    )
    remote_endpoint: StringProperty(
        name="Address", description="Of the remote engine, such as tcp://render.example.org:50123"
    )
    server_key_file: StringProperty(name="Engine's Key", subtype="FILE_PATH", description="Public key of the engine")
    client_key_file: StringProperty(name="Own Key", subtype="FILE_PATH", description="Secret key of this machine")
    preview_size: IntProperty(
        name="Preview Size", default=512, min=64, max=1024, description="Largest side of the live preview in pixels"
    )
    show_textures: BoolProperty(
        name="Show Texture of Results",
        default=True,
        description="Solid 3D views that show material colors show textures from the first result on",
    )
    free_before_render: BoolProperty(
        name="Free GPU Memory Before Rendering",
        description="Idle engine processes give their memory back when a render starts",
    )

    def draw(self, context: bpy.types.Context) -> None:
        from . import panels_engine

        panels_engine.draw_preferences(self, self.layout, context)


def get(context: bpy.types.Context | None = None) -> ConradPreferences:
    return (context or bpy.context).preferences.addons[__package__].preferences


def user_folder() -> Path:
    """The add-on's own folder for logs, notes and the engine's environment; it outlives updates."""
    return Path(bpy.utils.extension_path_user(__package__, create=True))


def setup_folder() -> Path:
    return user_folder() / "engine"


def addon_folder() -> Path:
    return Path(__file__).resolve().parent


def engine_python() -> str:
    """The interpreter to run the engine with, or nothing while it is not set up."""
    chosen = get().engine_python
    if chosen:
        return bpy.path.abspath(chosen)
    folder = setup_folder()
    return str(engine_setup.environment_python(folder / "environment")) if engine_setup.is_complete(folder) else ""


def is_outdated() -> bool:
    """The environment was made with another engine wheel than the one that came with the add-on."""
    wheel = engine_setup.bundled_wheel(addon_folder())
    folder = setup_folder()
    return bool(
        wheel
        and not get().engine_python
        and engine_setup.is_complete(folder)
        and engine_setup.installed_wheel(folder) != wheel.name
    )


def engine_settings() -> EngineSettings:
    preferences = get()
    return EngineSettings(
        python=engine_python(),
        data_folder=bpy.path.abspath(preferences.data_folder)
        if preferences.data_folder
        else str(default_data_folder()),
        device=preferences.device,
        idle_minutes=preferences.idle_minutes,
        extra_arguments=options_of(preferences.engine_options),
        remote_endpoint=preferences.remote_endpoint if preferences.use_remote else "",
        server_key_file=bpy.path.abspath(preferences.server_key_file),
        client_key_file=bpy.path.abspath(preferences.client_key_file),
    )


def is_loopback(endpoint: str) -> bool:
    return endpoint.startswith(("tcp://127.", "tcp://localhost:", "tcp://[::1]:", "ipc://"))


def why_no_engine() -> str:
    """The reason why the engine cannot be used at all, or nothing."""
    preferences = get()
    if preferences.use_remote:
        if not preferences.remote_endpoint:
            return "Enter the remote engine's address in the preferences"
        if not bpy.app.online_access and not is_loopback(preferences.remote_endpoint):
            return "Allow Online Access in the preferences to use a remote engine"
        return ""
    return "" if engine_python() else "Set up the engine in the preferences first"


CLASSES = (ConradPreferences,)


def register() -> None:
    for cls in CLASSES:
        bpy.utils.register_class(cls)


def unregister() -> None:
    for cls in reversed(CLASSES):
        bpy.utils.unregister_class(cls)
