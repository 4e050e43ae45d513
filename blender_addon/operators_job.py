"""Operators that start and steer jobs. Each checks, sends one message and returns."""

from __future__ import annotations

import json
from pathlib import Path

import bpy
import numpy as np
from bpy.props import BoolProperty, StringProperty

from . import camera, link, pictures, requests
from .jobs import Job
from .protocol import Cancel, Continue, EngineUnavailable, Extract, Keep, Pause, Resume
from .session import with_result_wanted

CANNOT_SEND = (*requests.REFUSALS, EngineUnavailable)
PICTURE_EXTENSIONS = ".png;.jpg;.jpeg;.webp;.bmp;.tif;.tiff;.tga;.exr;.hdr"


class JobOperator:
    """An operator on one job: the one named, else the one chosen in the list."""

    job: StringProperty(options={"HIDDEN", "SKIP_SAVE"})

    def chosen(self) -> Job | None:
        if not self.job:
            return link.active_job()
        return link.session().table.jobs.get(self.job)

    def send(self, request: object) -> set[str]:
        try:
            link.refresh_settings()
            link.session().ask(request)
        except EngineUnavailable as error:
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        link.wake()
        return {"FINISHED"}


def _pause(context: bpy.types.Context) -> str:
    settings = context.scene.conrad
    return pictures.why_pause(settings.image, settings.mask if settings.use_mask else None)


class CONRAD_OT_generate(pictures.PreparedFirst, bpy.types.Operator):
    bl_idname = "conrad.generate"
    bl_label = "Generate"
    bl_description = "Turn the picture into a textured object; Blender stays usable meanwhile"
    bl_options = {"REGISTER"}

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        reason = requests.why_not(context)
        if reason:
            cls.poll_message_set(reason)
        return not reason

    def execute(self, context: bpy.types.Context) -> set[str]:
        try:
            pause = _pause(context)
            notes = requests.start_job(context)
        except CANNOT_SEND as error:
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        self.report({"INFO"}, pause or f"{notes.name}: job sent to the engine")
        return {"FINISHED"}


class CONRAD_OT_project(pictures.PreparedFirst, bpy.types.Operator):
    bl_idname = "conrad.project"
    bl_label = "Project Picture"
    bl_description = "Put the picture on the active mesh through the reference camera, without changing its shape"
    bl_options = {"REGISTER"}

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        reason = requests.why_not_project(context)
        if reason:
            cls.poll_message_set(reason)
        return not reason

    def execute(self, context: bpy.types.Context) -> set[str]:
        try:
            pause = _pause(context)
            notes = requests.start_projection(context)
        except CANNOT_SEND as error:
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        self.report({"INFO"}, pause or f"{notes.name}: job sent to the engine")
        return {"FINISHED"}


class CONRAD_OT_pause(JobOperator, bpy.types.Operator):
    bl_idname = "conrad.pause"
    bl_label = "Pause"
    bl_description = "Hold the job; its preview stays alive"

    def execute(self, context: bpy.types.Context) -> set[str]:
        job = self.chosen()
        return self.send(Pause(job.id)) if job else {"CANCELLED"}


class CONRAD_OT_resume(JobOperator, bpy.types.Operator):
    bl_idname = "conrad.resume"
    bl_label = "Resume"
    bl_description = "Let a paused job go on, or start a failed or cancelled one again from its last checkpoint"

    def execute(self, context: bpy.types.Context) -> set[str]:
        job = self.chosen()
        return self.send(Resume(job.id)) if job else {"CANCELLED"}


class CONRAD_OT_cancel(JobOperator, bpy.types.Operator):
    bl_idname = "conrad.cancel"
    bl_label = "Cancel"
    bl_description = "Stop the job without a mesh"

    def execute(self, context: bpy.types.Context) -> set[str]:
        job = self.chosen()
        if job is None:
            return {"CANCELLED"}
        if job.state is None:
            # The engine has never heard of it.
            link.session().forget(job)
            link.sync_list()
            return {"FINISHED"}
        return self.send(Cancel(job.id))


class CONRAD_OT_cancel_all(JobOperator, bpy.types.Operator):
    bl_idname = "conrad.cancel_all"
    bl_label = "Cancel All"
    bl_description = "Stop every job that runs or waits"

    def execute(self, context: bpy.types.Context) -> set[str]:
        for job in link.session().table.active:
            if job.state is None:
                link.session().forget(job)
            else:
                self.send(Cancel(job.id))
        link.sync_list()
        return {"FINISHED"}


class CONRAD_OT_keep(JobOperator, bpy.types.Operator):
    bl_idname = "conrad.keep"
    bl_label = "Stop and Keep"
    bl_description = "Stop optimizing and make the mesh of what is there"

    def execute(self, context: bpy.types.Context) -> set[str]:
        job = self.chosen()
        return self.send(Keep(job.id)) if job else {"CANCELLED"}


class CONRAD_OT_continue(JobOperator, bpy.types.Operator):
    bl_idname = "conrad.continue_job"
    bl_label = "Continue"
    bl_description = "Optimize the ended job further, for the number of steps beside this button"

    def execute(self, context: bpy.types.Context) -> set[str]:
        job = self.chosen()
        if job is None or job.state is None:
            return {"CANCELLED"}
        return self.send(Continue(job.id, job.state.n_steps_set + context.scene.conrad.extra_steps))


class CONRAD_OT_extract(JobOperator, bpy.types.Operator):
    bl_idname = "conrad.extract"
    bl_label = "Extract Again"
    bl_description = "Make the mesh again with the faces, texture and resolution set now, without optimizing"

    def execute(self, context: bpy.types.Context) -> set[str]:
        job, settings = self.chosen(), context.scene.conrad
        if job is None:
            return {"CANCELLED"}
        return self.send(
            Extract(
                job.id,
                n_faces=max(settings.n_faces, 100) if settings.n_faces else None,
                texture_size=int(settings.texture_size) or None,
                resolution=max(settings.extract_resolution, 16) if settings.extract_resolution else None,
            )
        )


class CONRAD_OT_import_result(JobOperator, bpy.types.Operator):
    bl_idname = "conrad.import_result"
    bl_label = "Import"
    bl_description = "Bring the job's newest result into this scene, where the settings now say"

    def execute(self, context: bpy.types.Context) -> set[str]:
        job, settings = self.chosen(), context.scene.conrad
        if job is None or not job.result_number:
            self.report({"ERROR"}, "This job has no result yet")
            return {"CANCELLED"}
        if settings.place != "CAMERA":
            job.notes.place, job.notes.size = settings.place, settings.size
            job.notes.location = tuple(camera.place_of(settings, context.scene))
        job.notes.origin = settings.origin
        job.notes.is_asset, job.notes.asset_tags = settings.is_asset, settings.asset_tags
        with_result_wanted(link.session(), job)
        link.wake()
        return {"FINISHED"}


class CONRAD_OT_forget(JobOperator, bpy.types.Operator):
    bl_idname = "conrad.forget"
    bl_label = "Remove Job"
    bl_description = "Remove the job from the list and its files from the engine; imported objects stay"

    def invoke(self, context: bpy.types.Context, event: bpy.types.Event) -> set[str]:
        return context.window_manager.invoke_confirm(self, event)

    def execute(self, context: bpy.types.Context) -> set[str]:
        job = self.chosen()
        if job is None:
            return {"CANCELLED"}
        if job.is_active and job.state is not None:
            self.report({"ERROR"}, "The job is still running: cancel it first")
            return {"CANCELLED"}
        if job.is_remembered and job.state is None:
            link.session().table.remove(job.id)
        else:
            link.session().forget(job)
        link.sync_list()
        link.wake()
        return {"FINISHED"}


class CONRAD_OT_clear_finished(JobOperator, bpy.types.Operator):
    bl_idname = "conrad.clear_finished"
    bl_label = "Clear Finished"
    bl_description = "Remove every ended job whose result is in a scene, and every failed or cancelled one"

    def invoke(self, context: bpy.types.Context, event: bpy.types.Event) -> set[str]:
        return context.window_manager.invoke_confirm(self, event)

    def execute(self, context: bpy.types.Context) -> set[str]:
        for job in list(link.session().table.jobs.values()):
            if not job.is_active and job.state is not None and not job.is_waiting:
                link.session().forget(job)
        link.sync_list()
        link.wake()
        return {"FINISHED"}


class CONRAD_OT_reuse_settings(JobOperator, bpy.types.Operator):
    bl_idname = "conrad.reuse_settings"
    bl_label = "Use These Settings Again"
    bl_description = "Set picture, seed and quality as they were for this job"
    bl_options = {"REGISTER", "UNDO"}

    def execute(self, context: bpy.types.Context) -> set[str]:
        job, settings = self.chosen(), context.scene.conrad
        if job is None:
            return {"CANCELLED"}
        settings.seed = job.notes.seed
        if job.notes.preset:
            settings.preset = job.notes.preset
        image = bpy.data.images.get(job.notes.picture)
        if image is not None:
            settings.image = image
        return {"FINISHED"}


class CONRAD_OT_camera_of_result(bpy.types.Operator):
    bl_idname = "conrad.camera_of_result"
    bl_label = "Camera of Object"
    bl_description = "Add the reference camera from which the active object covers its picture"
    bl_options = {"REGISTER", "UNDO"}

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        item = context.active_object
        is_usable = item is not None and bool(item.get("conrad_camera"))
        if not is_usable:
            cls.poll_message_set("Select an object that ConRad made")
        return is_usable

    def execute(self, context: bpy.types.Context) -> set[str]:
        item = context.active_object
        try:
            setup = json.loads(item["conrad_camera"])
            reference = camera.from_setup(setup, bpy.data.images.get(item.get("conrad_picture", "")), context.scene)
        except (ValueError, KeyError, TypeError, camera.CannotUseCamera) as error:
            self.report({"ERROR"}, f"The object's camera cannot be used: {error}")
            return {"CANCELLED"}
        # The object may have been moved or turned since it was made; its camera goes with it.
        made_at = np.eye(4)
        made_at[:3, 3] = setup["object_origin"]
        camera.carry(reference, np.array(item.matrix_world) @ np.linalg.inv(made_at))
        self.report({"INFO"}, f"Added {reference.name}")
        return {"FINISHED"}


class CONRAD_OT_drop_picture(bpy.types.Operator):
    bl_idname = "conrad.drop_picture"
    bl_label = "Use as ConRad Picture"
    bl_description = "Load a picture file and take it as the picture to turn into an object"
    bl_options = {"REGISTER", "UNDO"}

    filepath: StringProperty(subtype="FILE_PATH", options={"SKIP_SAVE"})
    directory: StringProperty(subtype="DIR_PATH", options={"SKIP_SAVE", "HIDDEN"})
    files: bpy.props.CollectionProperty(type=bpy.types.OperatorFileListElement, options={"SKIP_SAVE", "HIDDEN"})
    with_camera: BoolProperty(name="Add Reference Camera", description="Also add a reference camera for it")

    def invoke(self, context: bpy.types.Context, event: bpy.types.Event) -> set[str]:
        if self.filepath or self.directory:
            return self.execute(context)
        context.window_manager.fileselect_add(self)
        return {"RUNNING_MODAL"}

    def execute(self, context: bpy.types.Context) -> set[str]:
        path = self.filepath or str(Path(self.directory) / (self.files[0].name if self.files else ""))
        try:
            image = bpy.data.images.load(bpy.path.abspath(path), check_existing=True)
        except RuntimeError as error:
            self.report({"ERROR"}, f"{Path(path).name} cannot be read as a picture: {error}")
            return {"CANCELLED"}
        if not pictures.is_picture(image):
            if not image.users:
                bpy.data.images.remove(image)
            self.report({"ERROR"}, f"{Path(path).name} has no pixels: it is no picture that Blender reads")
            return {"CANCELLED"}
        settings = context.scene.conrad
        if settings.camera is not None and settings.camera.conrad.image not in (None, image):
            # Another picture needs another camera; the old one keeps its own picture.
            settings.camera = None
        settings.image = image
        try:
            if self.with_camera:
                camera.add_reference(context.scene)
        except camera.CannotUseCamera as error:
            # Blender has not looked into such a file before; as the picture it is chosen, which undo takes back.
            self.report({"ERROR"}, str(error))
        return {"FINISHED"}


class CONRAD_FH_picture(bpy.types.FileHandler):
    bl_idname = "CONRAD_FH_picture"
    bl_label = "ConRad Picture"
    bl_import_operator = "conrad.drop_picture"
    bl_file_extensions = PICTURE_EXTENSIONS

    @classmethod
    def poll_drop(cls, context: bpy.types.Context) -> bool:
        return context.area is not None and context.area.type == "VIEW_3D"


CLASSES = (
    CONRAD_OT_generate,
    CONRAD_OT_project,
    CONRAD_OT_pause,
    CONRAD_OT_resume,
    CONRAD_OT_cancel,
    CONRAD_OT_cancel_all,
    CONRAD_OT_keep,
    CONRAD_OT_continue,
    CONRAD_OT_extract,
    CONRAD_OT_import_result,
    CONRAD_OT_forget,
    CONRAD_OT_clear_finished,
    CONRAD_OT_reuse_settings,
    CONRAD_OT_camera_of_result,
    CONRAD_OT_drop_picture,
    CONRAD_FH_picture,
)


def register() -> None:
    for cls in CLASSES:
        bpy.utils.register_class(cls)


def unregister() -> None:
    for cls in reversed(CLASSES):
        bpy.utils.unregister_class(cls)
