"""Small operators of the user interface: presets, preferences, the picture that an Image Editor shows."""

from __future__ import annotations

import bpy
from bl_operators.presets import AddPresetBase


class CONRAD_OT_preset_add(AddPresetBase, bpy.types.Operator):
    bl_idname = "conrad.preset_add"
    bl_label = "Add ConRad Preset"
    bl_description = "Keep these settings under a name, or remove the chosen preset"
    preset_menu = "CONRAD_PT_presets"
    preset_subdir = "conrad"
    preset_defines = ["settings = bpy.context.scene.conrad"]
    preset_values = [
        f"settings.{name}"
        for name in ("preset", "guidance", "prompt", "texture_size", "n_faces", "extra", "size", "place", "origin")
    ]


class CONRAD_OT_show_preferences(bpy.types.Operator):
    bl_idname = "conrad.show_preferences"
    bl_label = "ConRad Preferences"
    bl_description = "Open the add-on's preferences: engine set-up, device, remote engine"

    def execute(self, context: bpy.types.Context) -> set[str]:
        return bpy.ops.preferences.addon_show(module=__package__)


class CONRAD_OT_use_shown_picture(bpy.types.Operator):
    bl_idname = "conrad.use_shown_picture"
    bl_label = "Use This Picture"
    bl_description = "Take the picture that this Image Editor shows"
    bl_options = {"REGISTER", "UNDO"}

    def execute(self, context: bpy.types.Context) -> set[str]:
        context.scene.conrad.image = context.space_data.image
        return {"FINISHED"}


CLASSES = (CONRAD_OT_preset_add, CONRAD_OT_show_preferences, CONRAD_OT_use_shown_picture)


def register() -> None:
    for cls in CLASSES:
        bpy.utils.register_class(cls)


def unregister() -> None:
    for cls in reversed(CLASSES):
        bpy.utils.unregister_class(cls)
