"""Operators of the batch list."""

from __future__ import annotations

import bpy

from . import batch, batch_run, preferences, scene_tools


def _why_not(context: bpy.types.Context) -> str:
    """The reason why no batch can be opened now, or nothing."""
    if not context.scene.conrad.batch.folder:
        return "Choose the folder with the pictures"
    if batch_run.is_looking():
        return "The folder is being looked through"
    return "The batch is running: stop it first" if batch_run.is_running else ""


class CONRAD_OT_batch_scan(bpy.types.Operator):
    bl_idname = "conrad.batch_scan"
    bl_label = "List Pictures"
    bl_description = "Look for pictures in the folder, and for what an earlier run finished"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        reason = _why_not(context)
        if reason:
            cls.poll_message_set(reason)
        return not reason

    def execute(self, context: bpy.types.Context) -> set[str]:
        try:
            batch_run.look(context.scene, and_start=False)
        except batch.BatchError as error:
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        self.report({"INFO"}, batch_run.message)
        return {"FINISHED"}


class CONRAD_OT_batch_start(bpy.types.Operator):
    bl_idname = "conrad.batch_start"
    bl_label = "Start Batch"
    bl_description = "Convert every listed picture that is not finished"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        reason = preferences.why_no_engine() or _why_not(context)
        if reason:
            cls.poll_message_set(reason)
        return not reason

    def execute(self, context: bpy.types.Context) -> set[str]:
        try:
            batch_run.look(context.scene, and_start=True)
        except batch.BatchError as error:
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        return {"FINISHED"}


class CONRAD_OT_batch_stop(bpy.types.Operator):
    bl_idname = "conrad.batch_stop"
    bl_label = "Stop Batch"
    bl_description = "Cancel the pictures that run; finished ones stay, and Start Batch goes on with the rest"

    def execute(self, context: bpy.types.Context) -> set[str]:
        batch_run.stop(cancel_jobs=True)
        return {"FINISHED"}


class CONRAD_OT_batch_retry(bpy.types.Operator):
    bl_idname = "conrad.batch_retry"
    bl_label = "Retry"
    bl_description = "Do the chosen picture again, or every failed one"

    all_failed: bpy.props.BoolProperty(name="All Failed", options={"SKIP_SAVE"})

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if batch_run.current is None:
            cls.poll_message_set("List the pictures first")
        return batch_run.current is not None

    def execute(self, context: bpy.types.Context) -> set[str]:
        opened, index = batch_run.current, context.window_manager.conrad.active_batch
        if self.all_failed:
            chosen = [item for item in opened.items if item.state == batch.FAILED]
        else:
            chosen = opened.items[index : index + 1]
        batch_run.retry(chosen)
        scene_tools.redraw()
        return {"FINISHED"}


CLASSES = (CONRAD_OT_batch_scan, CONRAD_OT_batch_start, CONRAD_OT_batch_stop, CONRAD_OT_batch_retry)


def register() -> None:
    for cls in CLASSES:
        bpy.utils.register_class(cls)


def unregister() -> None:
    for cls in reversed(CLASSES):
        bpy.utils.unregister_class(cls)
