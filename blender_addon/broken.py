"""The panel of an add-on that cannot work: it says why."""

from __future__ import annotations

import sys

import bpy

_reason = ""


class CONRAD_PT_broken(bpy.types.Panel):
    bl_label = "ConRad"
    bl_category = "ConRad"
    bl_space_type = "VIEW_3D"
    bl_region_type = "UI"

    def draw(self, context: bpy.types.Context) -> None:
        column = self.layout.column(align=True)
        column.alert = True
        column.label(text="This build of ConRad does not fit", icon="ERROR")
        column.label(text=f"Blender's Python {sys.version_info[0]}.{sys.version_info[1]}:")
        column.label(text=_reason)
        self.layout.label(text="Install the zip made for this Blender")


def register(reason: str) -> None:
    global _reason
    _reason = reason
    bpy.utils.register_class(CONRAD_PT_broken)


def unregister() -> None:
    bpy.utils.unregister_class(CONRAD_PT_broken)
