"""Where new objects go, and what may happen at any moment: small things several modules need."""

from __future__ import annotations

from typing import Any

import bpy

COLLECTION_NAME = "ConRad"
MAX_NAME_BYTES = 63


def data_name(text: str) -> str:
    """A name as long as the oldest supported Blender takes."""
    return text.encode("utf-8")[: MAX_NAME_BYTES - 4].decode("utf-8", "ignore") or "ConRad"


def scene_now() -> bpy.types.Scene:
    """The scene the user looks at; a timer has no context of its own."""
    window = bpy.context.window
    if window is None and not bpy.app.background and bpy.context.window_manager.windows:
        window = bpy.context.window_manager.windows[0]
    return window.scene if window is not None else bpy.context.scene


def found(items: Any, uid: int) -> Any | None:
    """The one of these scenes or pictures that had this session_uid some ticks ago; None if it is gone."""
    return next((item for item in items if item.session_uid == uid), None)


def view_layer_now() -> bpy.types.ViewLayer:
    window = bpy.context.window
    if window is None and not bpy.app.background and bpy.context.window_manager.windows:
        window = bpy.context.window_manager.windows[0]
    return window.view_layer if window is not None else bpy.context.view_layer


def _layer_collection(root: bpy.types.LayerCollection, name: str) -> bpy.types.LayerCollection | None:
    for child in root.children:
        found = child if child.collection.name == name else _layer_collection(child, name)
        if found is not None:
            return found
    return None


def own_collection(scene: bpy.types.Scene, name: str = COLLECTION_NAME) -> bpy.types.Collection:
    """The add-on's collection of a scene; the scene's own one where that is excluded, hidden or linked in."""
    found = next((c for c in scene.collection.children_recursive if c.name.split(".")[0] == name), None)
    if found is None:
        found = bpy.data.collections.new(name)
        scene.collection.children.link(found)
    view_layer = view_layer_now()
    layer = _layer_collection(view_layer.layer_collection, found.name) if view_layer in scene.view_layers[:] else None
    is_unusable = found.library is not None or found.override_library is not None
    if is_unusable or (layer is not None and (layer.exclude or not layer.is_visible)):
        return scene.collection
    return found


def link(item: bpy.types.Object, scene: bpy.types.Scene, collection_name: str = COLLECTION_NAME) -> None:
    own_collection(scene, collection_name).objects.link(item)


def is_object_mode() -> bool:
    active = view_layer_now().objects.active
    return active is None or active.mode == "OBJECT"


def make_active(item: bpy.types.Object) -> None:
    """Select only this object and make it active; in another mode than Object Mode the user's work is left alone."""
    view_layer = view_layer_now()
    if not is_object_mode() or item.name not in view_layer.objects:
        return
    for other in view_layer.objects:
        if other.select_get(view_layer=view_layer):
            other.select_set(False, view_layer=view_layer)
    item.select_set(True, view_layer=view_layer)
    view_layer.objects.active = item


def is_busy() -> bool:
    """The user is in the middle of dragging or painting, or Blender renders: a bad moment to add things."""
    if bpy.app.background:
        return False
    if bpy.app.is_job_running("RENDER"):
        return True
    prefixes = ("TRANSFORM_OT", "SCULPT_OT", "PAINT_OT", "MESH_OT", "CURVE_OT", "GPENCIL_OT", "GREASE_PENCIL_OT")
    names = [operator.bl_idname for window in bpy.context.window_manager.windows for operator in window.modal_operators]
    return any(name.startswith(prefixes) for name in names)


def push_undo(message: str) -> None:
    """One undo step for what a timer changed; an operator has its own."""
    if bpy.app.background or not bpy.context.window_manager.windows:
        return
    window = bpy.context.window or bpy.context.window_manager.windows[0]
    with bpy.context.temp_override(window=window):
        bpy.ops.ed.undo_push(message=message)


def show_textures() -> None:
    """Let solid 3D views that show plain material colors show textures: a new object would look gray there."""
    for window in () if bpy.app.background else bpy.context.window_manager.windows:
        for area in window.screen.areas:
            if area.type == "VIEW_3D":
                shading = area.spaces.active.shading
                if shading.type == "SOLID" and shading.color_type == "MATERIAL":
                    shading.color_type = "TEXTURE"


def redraw(
    kinds: tuple[str, ...] = ("VIEW_3D", "IMAGE_EDITOR", "PREFERENCES", "STATUSBAR"), view: bool = False
) -> None:
    """Draw our panels again, and the viewports themselves if asked to."""
    if bpy.app.background:
        return
    for window in bpy.context.window_manager.windows:
        for area in window.screen.areas:
            if area.type not in kinds:
                continue
            for region in area.regions:
                is_panel = region.type == "UI" or area.type == "PREFERENCES"
                if is_panel or (view and area.type == "VIEW_3D" and region.type == "WINDOW"):
                    region.tag_redraw()
        # The status bar is no area of the screen; setting its text to nothing is what draws it again. A running modal
        # operator may show its keys there, so it is left alone meanwhile.
        if "STATUSBAR" in kinds and not len(window.modal_operators):
            window.workspace.status_text_set_internal(None)
