"""Drawing only: reads state, changes nothing. The same tab lives in the 3D View and in the Image Editor."""

from __future__ import annotations

import bpy
from bl_ui.utils import PresetPanel

from . import link, operators_camera, requests, thumbnails
from .panel_parts import ConradPanel, draw_progress, draw_state, draw_trouble, draw_warnings, wrapped
from .panels_engine import Engine, draw_status_bar
from .panels_lists import Batch, CONRAD_UL_batch, CONRAD_UL_jobs, Results
from .properties import PROMPTED


class Main(ConradPanel):
    bl_label = "ConRad"

    def draw(self, context: bpy.types.Context) -> None:
        layout, settings = self.layout, context.scene.conrad
        draw_state(layout, context)
        draw_trouble(layout, context.region.width)
        # With the picture as its icon: for that Blender decodes it in a thread, before the viewport would have to wait.
        layout.template_ID(settings, "image", open="image.open", live_icon=True)
        if (
            settings.image is None
            and context.space_data.type == "IMAGE_EDITOR"
            and context.space_data.image is not None
        ):
            layout.operator("conrad.use_shown_picture", icon="IMAGE_DATA")
        layout.prop(settings, "use_mask")
        if settings.use_mask:
            layout.template_ID(settings, "mask", open="image.open", live_icon=True)
        self._draw_generate(layout, context)

    def _draw_generate(self, layout: bpy.types.UILayout, context: bpy.types.Context) -> None:
        job = link.session().table.shown() if link.has_session() else None
        if job is not None:
            draw_progress(layout, job)
        row = layout.row()
        row.scale_y = 1.0 if job is not None else 1.6
        row.operator("conrad.generate", text="Queue Another" if job is not None else "Generate", icon="MOD_REMESH")
        reason = requests.why_not(context)
        if reason and job is None:
            wrapped(layout, reason, context.region.width, "INFO")


class Preview(ConradPanel):
    bl_label = "Live Preview"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return link.has_session() and link.session().table.shown() is not None

    def draw(self, context: bpy.types.Context) -> None:
        layout, settings = self.layout, context.scene.conrad
        layout.use_property_split, layout.use_property_decorate = True, False
        job = link.session().table.shown()
        if job is None:
            return
        layout.template_icon(thumbnails.live_icon(job.id), scale=9.0)
        layout.prop(settings, "use_overlay")
        row = layout.row()
        row.active = settings.use_overlay
        row.prop(settings, "overlay_opacity", slider=True)
        draw_warnings(layout, job, context.region.width)


class CONRAD_PT_presets(PresetPanel, bpy.types.Panel):
    bl_label = "ConRad Presets"
    preset_subdir = "conrad"
    preset_operator = "script.execute_preset"
    preset_add_operator = "conrad.preset_add"


class Settings(ConradPanel):
    bl_label = "Settings"

    def draw_header_preset(self, context: bpy.types.Context) -> None:
        CONRAD_PT_presets.draw_panel_header(self.layout)

    def draw(self, context: bpy.types.Context) -> None:
        layout, settings = self.layout, context.scene.conrad
        layout.use_property_split, layout.use_property_decorate = True, False
        layout.prop(settings, "preset")
        layout.prop(settings, "guidance")
        if settings.guidance in PROMPTED:
            layout.prop(settings, "prompt")
        layout.prop(settings, "seed")
        column = layout.column(align=True)
        column.prop(settings, "texture_size")
        column.prop(settings, "n_faces", text="Faces" if settings.n_faces else "Faces (Auto)")
        layout.prop(settings, "extra")
        column = layout.column(align=True)
        column.prop(settings, "size")
        column.prop(settings, "place")
        column.prop(settings, "origin")


class Assets(ConradPanel):
    bl_label = "Mark as Asset"
    bl_options = {"DEFAULT_CLOSED"}

    def draw_header(self, context: bpy.types.Context) -> None:
        self.layout.prop(context.scene.conrad, "is_asset", text="")

    def draw(self, context: bpy.types.Context) -> None:
        layout, settings = self.layout, context.scene.conrad
        layout.use_property_split, layout.use_property_decorate = True, False
        layout.active = settings.is_asset
        layout.prop(settings, "asset_tags")


def draw_guess(layout: bpy.types.UILayout, context: bpy.types.Context) -> None:
    """What is there for pictures whose elevation nobody knows."""
    row = layout.row(align=True)
    row.prop(context.scene.conrad, "is_elevation_guess")
    row.menu("CONRAD_MT_elevations", text="", icon="DOWNARROW_HLT")
    layout.operator("conrad.estimate_elevation", icon="VIEWZOOM")
    if operators_camera.guess_note:
        wrapped(layout, operators_camera.guess_note, context.region.width, "INFO")


class Camera(ConradPanel):
    bl_label = "Reference Camera"

    def draw(self, context: bpy.types.Context) -> None:
        layout, settings = self.layout, context.scene.conrad
        layout.use_property_split, layout.use_property_decorate = True, False
        layout.prop(settings, "camera", text="Camera")
        item = settings.camera
        if item is None:
            self._draw_without(layout, context)
            return
        if not item.conrad.is_reference or item.conrad.proxy is None or item.conrad.image != settings.image:
            layout.operator("conrad.use_camera", icon="OUTLINER_OB_CAMERA")
        row = layout.row(align=True)
        row.operator("conrad.look_through", icon="VIEW_CAMERA")
        row.operator("conrad.fit_camera", icon="ZOOM_SELECTED")
        if settings.previous_x:
            row = layout.row()
            row.operator(
                "conrad.leave_camera",
                icon="LOOP_BACK",
                text=f"Restore Render Size {settings.previous_x} x {settings.previous_y}",
            )
        space = context.space_data
        if space.type == "VIEW_3D":
            layout.prop(space, "lock_camera", text="Move with the View")
        if item.conrad.image is not None:
            layout.prop(item.conrad, "opacity", text="Picture Opacity", slider=True)
            layout.prop(item.conrad, "in_front")

    def _draw_without(self, layout: bpy.types.UILayout, context: bpy.types.Context) -> None:
        settings = context.scene.conrad
        column = layout.column()
        column.operator("conrad.add_camera", icon="OUTLINER_OB_CAMERA")
        column.operator("conrad.camera_from_view", icon="RESTRICT_VIEW_OFF")
        column = layout.column(align=True)
        column.prop(settings, "elevation")
        column.prop(settings, "fov")
        draw_guess(layout, context)


class Align(ConradPanel):
    bl_label = "Align"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return context.scene.conrad.camera is not None

    def draw(self, context: bpy.types.Context) -> None:
        layout, settings = self.layout, context.scene.conrad
        layout.use_property_split, layout.use_property_decorate = True, False
        item = settings.camera
        column = layout.column(align=True)
        column.prop(item.conrad, "azimuth")
        column.prop(item.conrad, "elevation")
        column.prop(item.conrad, "roll")
        column.prop(item.conrad, "distance")
        draw_guess(layout, context)
        column = layout.column(align=True)
        column.prop(item.conrad, "perspective")
        column.prop(item.data, "lens", text="Focal Length")
        column.prop(item.data, "shift_x", text="Shift X")
        column.prop(item.data, "shift_y", text="Y")
        proxy = item.conrad.proxy
        if proxy is not None:
            column = layout.column(align=True)
            column.prop(proxy, "location", text="Object")
            column.prop(proxy, "hide_viewport", text="Hide Proxy", toggle=False)


class StartMesh(ConradPanel):
    bl_label = "Start from Mesh"
    bl_options = {"DEFAULT_CLOSED"}

    def draw_header(self, context: bpy.types.Context) -> None:
        self.layout.prop(context.scene.conrad, "use_start", text="")

    def draw(self, context: bpy.types.Context) -> None:
        layout, settings = self.layout, context.scene.conrad
        layout.use_property_split, layout.use_property_decorate = True, False
        row = layout.row()
        row.active = settings.use_start
        row.prop(settings, "start", text="Mesh")
        layout.operator("conrad.project", icon="UV")
        reason = requests.why_not_project(context)
        if reason:
            wrapped(layout, reason, context.region.width, "INFO")


# Order, name in the identifier, parent.
TREE = (
    (Main, "main", ""),
    (Preview, "preview", "main"),
    (Results, "results", "main"),
    (Camera, "camera", "main"),
    (Align, "align", "camera"),
    (Settings, "settings", "main"),
    (Assets, "assets", "settings"),
    (StartMesh, "start", "main"),
    (Batch, "batch", "main"),
    (Engine, "engine", "main"),
)
SPACES = (("VIEW_3D", ""), ("IMAGE_EDITOR", "_image"))


def _panel_class(definition: type, name: str, parent: str, space: str, suffix: str) -> type:
    members = {"bl_idname": f"CONRAD_PT_{name}{suffix}", "bl_space_type": space, "__module__": __name__}
    if parent:
        members["bl_parent_id"] = f"CONRAD_PT_{parent}{suffix}"
    return type(members["bl_idname"], (definition, bpy.types.Panel), members)


CLASSES = (
    CONRAD_PT_presets,
    CONRAD_UL_jobs,
    CONRAD_UL_batch,
    *(
        _panel_class(definition, name, parent, space, suffix)
        for space, suffix in SPACES
        for definition, name, parent in TREE
    ),
)


def register() -> None:
    for cls in CLASSES:
        bpy.utils.register_class(cls)
    bpy.types.STATUSBAR_HT_header.append(draw_status_bar)


def unregister() -> None:
    bpy.types.STATUSBAR_HT_header.remove(draw_status_bar)
    for cls in reversed(CLASSES):
        bpy.utils.unregister_class(cls)
