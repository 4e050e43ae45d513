"""Drawing only: reads state, changes nothing. The same tab lives in the 3D View and in the Image Editor."""

from __future__ import annotations

import textwrap

import bpy
from bl_ui.utils import PresetPanel

from . import batch, batch_run, engine_setup, link, operators_engine, preferences, requests, thumbnails
from .jobs import Job, clock
from .properties import PROMPTED
from .session import State

CATEGORY = "ConRad"
STATE_ICONS = {
    State.NOT_SET_UP: "UNLINKED",
    State.STOPPED: "RADIOBUT_OFF",
    State.STARTING: "SORTTIME",
    State.READY: "CHECKMARK",
    State.BUSY: "PLAY",
    State.NOT_RESPONDING: "QUESTION",
    State.CRASHED: "ERROR",
}
JOB_ICONS = {
    "sending": "SORTTIME",
    "remembered": "QUESTION",
    "queued": "SORTTIME",
    "running": "PLAY",
    "paused": "PAUSE",
    "done": "CHECKMARK",
    "failed": "ERROR",
    "cancelled": "CANCEL",
}
BATCH_ICONS = {batch.WAITING: "SORTTIME", batch.SENT: "PLAY", batch.DONE: "CHECKMARK", batch.FAILED: "ERROR"}


def wrapped(layout: bpy.types.UILayout, text: str, width: int, icon: str = "NONE") -> None:
    """Text over as many lines as the panel is narrow."""
    scale = bpy.context.preferences.system.ui_scale
    n_characters = max(int((width / scale - 50) / 6.2), 16)
    column = layout.column(align=True)
    column.scale_y = 0.8
    for number, line in enumerate(textwrap.wrap(text, n_characters) or [""]):
        column.label(text=line, icon=icon if number == 0 else ("BLANK1" if icon != "NONE" else "NONE"), translate=False)


def session_state() -> State:
    if link.has_session():
        return link.session().state
    return State.NOT_SET_UP if preferences.why_no_engine() else State.STOPPED


def state_text() -> str:
    if operators_engine.running_setup is not None:
        return "Setting up the engine"
    return link.session().state_line() if link.has_session() else session_state().value


def draw_state(layout: bpy.types.UILayout, context: bpy.types.Context) -> None:
    """The line that is always there: the engine's state, and the one thing to do about it."""
    state = session_state()
    row = layout.row(align=True)
    row.alert = state in (State.CRASHED, State.NOT_RESPONDING)
    row.label(text=state_text(), icon=STATE_ICONS[state], translate=False)
    row = row.row(align=True)
    row.alert = False
    if state in (State.STOPPED, State.CRASHED):
        row.operator("conrad.start_engine", text="", icon="PLAY")
    elif state not in (State.NOT_SET_UP,):
        row.operator("conrad.stop_engine", text="", icon="QUIT")
    row.operator("conrad.show_preferences", text="", icon="PREFERENCES")


def draw_setup(layout: bpy.types.UILayout) -> str:
    """Set-up: its progress while it runs, else the button.

    Returns:
        Why the button is grey, or nothing.
    """
    running = operators_engine.running_setup
    if running is not None:
        factor, text = running.progress
        row = layout.row(align=True)
        row.progress(factor=factor, type="BAR", text=text)
        row.operator("conrad.cancel_setup", text="", icon="CANCEL")
        return ""
    is_there = engine_setup.is_complete(preferences.setup_folder())
    layout.operator("conrad.set_up_engine", text="Set Up Engine Again" if is_there else "Set Up Engine", icon="IMPORT")
    return operators_engine.why_no_setup()


def draw_trouble(layout: bpy.types.UILayout, width: int) -> None:
    """What is wrong with the engine, and the ways out."""
    state = session_state()
    if state is State.NOT_SET_UP and not preferences.get().use_remote:
        reason = draw_setup(layout)
        if reason:
            wrapped(layout, reason, width, "INFO")
    problems = [operators_engine.last_setup_error]
    if link.has_session():
        own = link.session()
        problems.append(own.problem if state is not State.CRASHED else own.launcher.crash_report(6) or own.problem)
    if preferences.is_outdated():
        problems.append("The engine is older than the add-on: press Set Up Engine Again")
    problems.append(link.last_error.strip().splitlines()[-1] if link.last_error else "")
    shown = [problem for problem in problems if problem]
    if not shown:
        return
    box = layout.box()
    for problem in shown:
        for number, line in enumerate(problem.splitlines()):
            wrapped(box, line, width - 20, "ERROR" if number == 0 else "NONE")
    row = box.row(align=True)
    row.operator("conrad.open_log", icon="TEXT")
    row.operator("conrad.copy_report", icon="COPYDOWN")
    if preferences.is_outdated():
        draw_setup(box)


def draw_progress(layout: bpy.types.UILayout, job: Job) -> None:
    """Bar, and the buttons that steer a job."""
    row = layout.row(align=True)
    row.scale_y = 1.4
    row.progress(factor=job.factor, type="BAR", text=job.status())
    row.operator("conrad.cancel", text="", icon="X").job = job.id
    row = layout.row(align=True)
    if job.state_name == "paused":
        row.operator("conrad.resume", icon="PLAY").job = job.id
    else:
        row.operator("conrad.pause", icon="PAUSE").job = job.id
    row.operator("conrad.keep", icon="CHECKMARK").job = job.id


class ConradPanel:
    bl_category = CATEGORY
    bl_region_type = "UI"

    def draw_header_preset(self, context: bpy.types.Context) -> None:
        return


class Main(ConradPanel):
    bl_label = "ConRad"

    def draw(self, context: bpy.types.Context) -> None:
        layout, settings = self.layout, context.scene.conrad
        draw_state(layout, context)
        draw_trouble(layout, context.region.width)
        layout.template_ID(settings, "image", open="image.open")
        if (
            settings.image is None
            and context.space_data.type == "IMAGE_EDITOR"
            and context.space_data.image is not None
        ):
            layout.operator("conrad.use_shown_picture", icon="IMAGE_DATA")
        row = layout.row(heading="Mask")
        row.prop(settings, "use_mask", text="")
        sub = row.row()
        sub.active = settings.use_mask
        sub.template_ID(settings, "mask", open="image.open")
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
        icon = thumbnails.live_icon(job.id)
        if icon:
            layout.template_icon(icon, scale=9.0)
        else:
            layout.label(text="Waiting for the First Picture")
        layout.prop(settings, "use_overlay")
        row = layout.row()
        row.active = settings.use_overlay
        row.prop(settings, "overlay_opacity", slider=True)
        for warning in job.state.warnings[-2:] if job.state else ():
            wrapped(layout, warning, context.region.width, "INFO")


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
        column.prop(settings, "n_faces")
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


class Camera(ConradPanel):
    bl_label = "Reference Camera"

    def draw(self, context: bpy.types.Context) -> None:
        layout, settings = self.layout, context.scene.conrad
        layout.use_property_split, layout.use_property_decorate = True, False
        layout.prop(settings, "camera", text="Camera")
        item = settings.camera
        if item is None:
            self._draw_without(layout, settings)
            return
        if not item.conrad.is_reference or item.conrad.proxy is None or item.conrad.image != settings.image:
            layout.operator("conrad.use_camera", icon="OUTLINER_OB_CAMERA")
        row = layout.row(align=True)
        row.operator("conrad.look_through", icon="VIEW_CAMERA")
        row.operator("conrad.fit_camera", icon="ZOOM_SELECTED")
        if settings.previous_x:
            row = layout.row()
            row.operator(
                "conrad.leave_camera", icon="LOOP_BACK", text=f"Restore {settings.previous_x} x {settings.previous_y}"
            )
        space = context.space_data
        if space.type == "VIEW_3D":
            layout.prop(space, "lock_camera", text="Move with the View")
        if item.conrad.image is not None:
            layout.prop(item.conrad, "opacity", text="Picture Opacity", slider=True)
            layout.prop(item.conrad, "in_front")

    def _draw_without(self, layout: bpy.types.UILayout, settings: bpy.types.PropertyGroup) -> None:
        column = layout.column()
        column.operator("conrad.add_camera", icon="OUTLINER_OB_CAMERA")
        column.operator("conrad.camera_from_view", icon="RESTRICT_VIEW_OFF")
        column = layout.column(align=True)
        column.prop(settings, "elevation")
        column.prop(settings, "fov")
        row = layout.row(align=True)
        row.prop(settings, "is_elevation_guess")
        row.menu("CONRAD_MT_elevations", text="", icon="DOWNARROW_HLT")


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
        row = layout.row(align=True)
        row.prop(settings, "is_elevation_guess")
        row.menu("CONRAD_MT_elevations", text="", icon="DOWNARROW_HLT")
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


class CONRAD_UL_jobs(bpy.types.UIList):
    def draw_item(self, context, layout, data, item, icon, active_data, active_property, index=0, flt_flag=0):  # noqa: ANN001
        job = link.session().table.jobs.get(item.job) if link.has_session() else None
        if job is None:
            return
        thumbnail = thumbnails.icon_of(job.id)
        row = layout.row(align=True)
        if thumbnail:
            row.label(text=job.name, icon_value=thumbnail, translate=False)
        else:
            row.label(text=job.name, icon=JOB_ICONS.get(job.state_name, "DOT"), translate=False)
        if job.state_name == "running":
            row.label(text=f"{100 * job.factor:.0f} %", translate=False)
        elif job.is_waiting:
            row.operator("conrad.import_result", text="", icon="IMPORT").job = job.id
        elif thumbnail and job.state_name != "done":
            row.label(text="", icon=JOB_ICONS.get(job.state_name, "DOT"))


class Results(ConradPanel):
    bl_label = "Results"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return len(context.window_manager.conrad.jobs) > 0

    def draw_header_preset(self, context: bpy.types.Context) -> None:
        n_active = len(link.session().table.active) if link.has_session() else 0
        if n_active:
            self.layout.label(text=f"{n_active} in queue", translate=False)

    def draw(self, context: bpy.types.Context) -> None:
        layout, state = self.layout, context.window_manager.conrad
        row = layout.row()
        row.template_list("CONRAD_UL_jobs", "", state, "jobs", state, "active_job", rows=3)
        column = row.column(align=True)
        column.operator("conrad.forget", text="", icon="REMOVE")
        column.operator("conrad.clear_finished", text="", icon="TRASH")
        column.operator("conrad.cancel_all", text="", icon="CANCEL")
        job = link.active_job()
        if job is not None:
            self._draw_job(layout, job, context)

    def _draw_job(self, layout: bpy.types.UILayout, job: Job, context: bpy.types.Context) -> None:
        settings = context.scene.conrad
        thumbnail = thumbnails.icon_of(job.id)
        if thumbnail:
            layout.template_icon(thumbnail, scale=7.0)
        is_shown_above = job is link.session().table.shown()
        if is_shown_above:
            return
        words = job.status() if job.is_active or job.state_name == "remembered" else self._summary(job)
        wrapped(layout, words, context.region.width, "ERROR" if job.problem or job.state_name == "failed" else "NONE")
        if job.state is not None and job.state.error_hint:
            wrapped(layout, job.state.error_hint, context.region.width, "INFO")
        if job.is_active and job.state is not None:
            return draw_progress(layout, job)
        if job.result_number:
            row = layout.row()
            row.scale_y = 1.2
            row.operator("conrad.import_result", text="Import" if job.is_waiting else "Import Again", icon="IMPORT")
        if job.state_name in ("failed", "cancelled"):
            layout.operator("conrad.resume", text="Start Again", icon="FILE_REFRESH")
        if job.state_name in ("done", "cancelled"):
            row = layout.row(align=True)
            row.operator("conrad.continue_job", icon="FORWARD")
            row.prop(settings, "extra_steps", text="Steps")
            row = layout.row(align=True)
            row.operator("conrad.extract", icon="MESH_ICOSPHERE")
            row.prop(settings, "extract_resolution", text="Res.")
        row = layout.row(align=True)
        row.operator("conrad.reuse_settings", text="Reuse Settings", icon="LOOP_BACK")
        row.operator("conrad.camera_of_result", text="Camera", icon="CAMERA_DATA")

    def _summary(self, job: Job) -> str:
        parts = [job.problem or job.status()]
        if job.state is not None and job.state.elapsed_s and not job.problem:
            parts.append(f"in {clock(job.state.elapsed_s)}")
        if job.is_waiting and not job.problem:
            parts.append("- waits to be imported")
        return " ".join(parts)


class CONRAD_UL_batch(bpy.types.UIList):
    def draw_item(self, context, layout, data, item, icon, active_data, active_property, index=0, flt_flag=0):  # noqa: ANN001
        opened = batch_run.current
        if opened is None or index >= len(opened.items):
            return
        entry = opened.items[index]
        row = layout.row(align=True)
        thumbnail = thumbnails.picture_icon(str(opened.path(entry)))
        row.label(text=entry.picture, icon_value=thumbnail, translate=False)
        if entry.seconds:
            row.label(text=clock(entry.seconds), translate=False)
        row.label(text="", icon=BATCH_ICONS[entry.state])


class Batch(ConradPanel):
    bl_label = "Batch"
    bl_options = {"DEFAULT_CLOSED"}

    def draw(self, context: bpy.types.Context) -> None:
        layout, chosen = self.layout, context.scene.conrad.batch
        state, opened = context.window_manager.conrad, batch_run.current
        layout.use_property_split, layout.use_property_decorate = True, False
        column = layout.column()
        column.enabled = not batch_run.is_running
        column.prop(chosen, "folder")
        column.prop(chosen, "pattern")
        column.prop(chosen, "output")
        column.prop(chosen, "out_folder")
        column.prop(chosen, "use_scene_camera")
        row = layout.row(align=True)
        if batch_run.is_running:
            counts = opened.counts
            n_ended = counts[batch.DONE] + counts[batch.FAILED]
            row.progress(
                factor=n_ended / max(len(opened.items), 1), type="BAR", text=f"{n_ended} of {len(opened.items)}"
            )
            row.operator("conrad.batch_stop", text="", icon="X")
        else:
            row.operator("conrad.batch_scan", icon="VIEWZOOM")
            row.operator("conrad.batch_start", icon="PLAY")
        if batch_run.message:
            wrapped(layout, batch_run.message, context.region.width, "INFO")
        if opened is None or not state.batch:
            return
        layout.template_list("CONRAD_UL_batch", "", state, "batch", state, "active_batch", rows=4)
        entry = opened.items[state.active_batch] if state.active_batch < len(opened.items) else None
        if entry is not None and entry.error:
            wrapped(layout, entry.error, context.region.width, "ERROR")
        row = layout.row(align=True)
        row.operator("conrad.batch_retry", icon="FILE_REFRESH")
        row.operator("conrad.batch_retry", text="Retry Failed").all_failed = True


class Engine(ConradPanel):
    bl_label = "Engine"
    bl_options = {"DEFAULT_CLOSED"}

    def draw(self, context: bpy.types.Context) -> None:
        layout = self.layout
        status = link.session().status if link.has_session() else None
        if status is not None:
            column = layout.column(align=True)
            column.label(text=status.device or "Looking for the device", icon="MEMORY", translate=False)
            if status.total_memory_bytes:
                free, total = status.free_memory_bytes / 2**30, status.total_memory_bytes / 2**30
                column.label(text=f"{free:.1f} of {total:.1f} GB free", icon="BLANK1", translate=False)
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
    if operators_engine.last_setup_error:
        wrapped(box, operators_engine.last_setup_error, width, "ERROR")
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
