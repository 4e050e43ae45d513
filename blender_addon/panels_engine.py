"""The engine's panel, the preferences and the status bar."""

from __future__ import annotations

import bpy

from . import link, operators_engine, preferences
from .panel_parts import STATE_ICONS, ConradPanel, draw_setup, problems, session_state, state_text, wrapped


class Engine(ConradPanel):
    bl_label = "Engine"
    bl_options = {"DEFAULT_CLOSED"}

    def draw(self, context: bpy.types.Context) -> None:
        layout = self.layout
        status = link.session().status if link.has_session() else None
        if status is not None and status.total_memory_bytes:
            free, total = status.free_memory_bytes / 2**30, status.total_memory_bytes / 2**30
            layout.label(text=f"{free:.1f} of {total:.1f} GB free", icon="MEMORY", translate=False)
        row = layout.row(align=True)
        row.operator("conrad.start_engine", text="Start", icon="PLAY")
        row.operator("conrad.stop_engine", text="Stop", icon="QUIT")
        layout.operator("conrad.free_memory", icon="TRASH")
        row = layout.row(align=True)
        row.operator("conrad.open_log", icon="TEXT")
        row.operator("conrad.copy_report", icon="COPYDOWN")


def draw_preferences(
    chosen: preferences.ConradPreferences, layout: bpy.types.UILayout, context: bpy.types.Context
) -> None:
    """The add-on's preferences."""
    layout.use_property_split, layout.use_property_decorate = True, False
    width = context.region.width
    box = layout.box()
    row = box.row(align=True)
    row.label(text=state_text(), icon=STATE_ICONS[session_state()], translate=False)
    row.operator("conrad.start_engine", text="", icon="PLAY")
    row.operator("conrad.stop_engine", text="", icon="QUIT")
    row.operator("conrad.open_log", text="", icon="TEXT")
    if not chosen.use_remote:
        row = box.row(align=True)
        reason = draw_setup(row)
        if operators_engine.running_setup is None:
            row.operator("conrad.check_engine", icon="VIEWZOOM")
        if reason:
            wrapped(box, reason, width, "INFO")
    draw_doctor(box, width)
    for problem in problems():
        wrapped(box, problem.splitlines()[0], width, "ERROR")
    layout.prop(chosen, "device")
    layout.prop(chosen, "idle_minutes")
    layout.prop(chosen, "free_before_render")
    layout.prop(chosen, "preview_size")
    layout.prop(chosen, "show_textures")
    layout.prop(chosen, "data_folder")
    header, body = layout.panel("conrad_setup", default_closed=True)
    header.label(text="Installation")
    if body is not None:
        body.prop(chosen, "engine_python")
        body.prop(chosen, "base_python")
        body.prop(chosen, "find_links")
        body.prop(chosen, "is_offline")
        body.prop(chosen, "pip_options")
        body.prop(chosen, "engine_options")
    header, body = layout.panel("conrad_remote", default_closed=not chosen.use_remote)
    header.label(text="Remote Engine")
    if body is not None:
        body.prop(chosen, "use_remote")
        column = body.column()
        column.active = chosen.use_remote
        column.prop(chosen, "remote_endpoint")
        column.prop(chosen, "server_key_file")
        column.prop(chosen, "client_key_file")
        reason = preferences.why_no_engine() if chosen.use_remote else ""
        if reason:
            wrapped(body, reason, width, "INFO")


def draw_doctor(layout: bpy.types.UILayout, width: int) -> None:
    """What the last check found."""
    if operators_engine.running_check is not None:
        layout.label(text="Checking", icon="SORTTIME")
        return
    doctor = operators_engine.last_doctor
    if doctor is None:
        return
    if doctor.problem:
        return wrapped(layout, doctor.problem, width, "ERROR")
    column = layout.column(align=True)
    line = f"Engine {doctor.version}, Python {doctor.python}, PyTorch {doctor.torch}"
    column.label(text=line, icon="CHECKMARK" if doctor.is_ok else "ERROR", translate=False)
    column.label(text=f"{doctor.device}, {doctor.memory_bytes / 2**30:.1f} GB free", icon="BLANK1", translate=False)
    for name, command in doctor.missing:
        row = column.row(align=True)
        row.label(text=f"{name} is not installed", icon="BLANK1", translate=False)
        if command:
            row.operator("conrad.copy_text", text=command, icon="COPYDOWN").text = command


def draw_status_bar(self: bpy.types.Header, context: bpy.types.Context) -> None:
    """Progress where it is seen with the sidebar closed."""
    setup = operators_engine.running_setup
    if setup is not None:
        factor, text = setup.progress
        return self.layout.progress(factor=factor, type="BAR", text="ConRad: " + text)
    job = link.session().table.shown() if link.has_session() else None
    if job is None:
        return
    row = self.layout.row(align=True)
    row.ui_units_x = 14
    row.progress(factor=job.factor, type="BAR", text=f"{job.name}: {job.status()}")
    row.operator("conrad.cancel", text="", icon="X").job = job.id
