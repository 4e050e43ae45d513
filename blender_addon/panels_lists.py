"""Panels of the job list and of the batch."""

from __future__ import annotations

import bpy

from . import batch, batch_run, link, thumbnails
from .jobs import Job, clock
from .panel_parts import ConradPanel, draw_progress, draw_warnings, wrapped

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
            # Aligned right it takes no more than it needs, and the name gets the rest.
            part = row.row()
            part.alignment = "RIGHT"
            part.label(text=f"{100 * job.factor:.0f} %", translate=False)
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
        draw_warnings(layout, job, context.region.width)
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
            row.prop(settings, "extract_resolution", text="Res." if settings.extract_resolution else "Res. (Same)")
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
            part = row.row()
            part.alignment = "RIGHT"
            part.label(text=clock(entry.seconds), translate=False)
        row.label(text="", icon=BATCH_ICONS[entry.state])


class Batch(ConradPanel):
    bl_label = "Batch"
    bl_options = {"DEFAULT_CLOSED"}

    def draw(self, context: bpy.types.Context) -> None:
        layout, chosen = self.layout, context.scene.conrad.batch
        state, opened = context.window_manager.conrad, batch_run.current
        layout.use_property_split, layout.use_property_decorate = True, False
        column = layout.column()
        column.enabled = not (batch_run.is_running or batch_run.is_looking())
        column.prop(chosen, "folder")
        column.prop(chosen, "pattern")
        column.prop(chosen, "output")
        column.prop(chosen, "out_folder")
        column.prop(chosen, "camera")
        if chosen.camera == "ELEVATION":
            column.prop(context.scene.conrad, "elevation")
        if chosen.camera != "CAMERA":
            column.prop(context.scene.conrad, "fov")
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
            if batch_run.is_looking():
                row.operator("conrad.batch_stop", text="", icon="X")
        if batch_run.message:
            wrapped(layout, batch_run.message, context.region.width, "INFO")
        if opened is None or not state.batch:
            return
        layout.template_list("CONRAD_UL_batch", "", state, "batch", state, "active_batch", rows=4)
        entry = opened.items[state.active_batch] if state.active_batch < len(opened.items) else None
        if entry is not None and entry.error:
            wrapped(layout, entry.error, context.region.width, "ERROR")
        elif entry is not None and link.has_session():
            draw_warnings(layout, link.session().table.jobs.get(entry.job), context.region.width)
        row = layout.row(align=True)
        row.operator("conrad.batch_retry", icon="FILE_REFRESH")
        row.operator("conrad.batch_retry", text="Retry Failed").all_failed = True
