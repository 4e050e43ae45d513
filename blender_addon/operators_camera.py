"""Operators on reference cameras: adding, fitting, looking through. Each is one undo step."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import bpy
import numpy as np
from bpy.props import BoolProperty, FloatProperty

from . import background, camera, link, pictures, preferences, scene_tools
from . import camera_math as cm
from .protocol import ElevationGuess, EngineUnavailable, Error, GuessElevation


def _reason(context: bpy.types.Context, needs_camera: bool) -> str:
    settings = context.scene.conrad
    if settings.image is None:
        return "Choose a picture first"
    if needs_camera and settings.camera is None:
        return "Add a reference camera first"
    return ""


class CameraOperator(pictures.PreparedFirst):
    bl_options = {"REGISTER", "UNDO"}
    needs_camera = True
    fits_camera = adds_camera = False

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        reason = _reason(context, cls.needs_camera)
        if reason:
            cls.poll_message_set(reason)
        return not reason

    def preparation(self, context: bpy.types.Context) -> background.Steps:
        settings = context.scene.conrad
        if self.fits_camera and (self.adds_camera or settings.camera is not None):
            return camera.find_outline(settings.image)
        return super().preparation(context)


def sentences(*said: str) -> str:
    """Everything there is to say, as one text."""
    return ". ".join(text for text in said if text)


def look_through(context: bpy.types.Context) -> None:
    """Turn the 3D view the operator was called from, or the first one, to the scene's camera."""
    area = context.area if context.area is not None and context.area.type == "VIEW_3D" else None
    screen = context.screen
    if area is None and screen is not None:
        area = next((a for a in screen.areas if a.type == "VIEW_3D"), None)
    if area is not None:
        area.spaces.active.region_3d.view_perspective = "CAMERA"
        area.spaces.active.region_3d.view_camera_zoom = 0
        area.spaces.active.region_3d.view_camera_offset = (0.0, 0.0)


class CONRAD_OT_add_camera(CameraOperator, bpy.types.Operator):
    bl_idname = "conrad.add_camera"
    bl_label = "Add Reference Camera"
    bl_description = "Add a camera with the picture behind it and a proxy that shows where the object will be"
    needs_camera = False
    fits_camera = adds_camera = True
    look: BoolProperty(name="Look Through", default=True, description="Also turn the view to it")

    def execute(self, context: bpy.types.Context) -> set[str]:
        try:
            item = camera.add_reference(context.scene)
            message = camera.activate(item, context.scene) if self.look else ""
        except camera.CannotUseCamera as error:
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        scene_tools.make_active(item)
        if self.look:
            look_through(context)
        pause = camera.why_pause(context.scene.conrad.image)
        self.report({"INFO"}, sentences(message, pause) or f"Added {item.name}")
        return {"FINISHED"}


class CONRAD_OT_camera_from_view(CameraOperator, bpy.types.Operator):
    bl_idname = "conrad.camera_from_view"
    bl_label = "Camera from View"
    bl_description = "Add a reference camera that stands where the 3D view looks from"
    needs_camera = False

    def execute(self, context: bpy.types.Context) -> set[str]:
        found = view_pose(context)
        if found is None:
            self.report({"ERROR"}, "There is no 3D view to take the camera from")
            return {"CANCELLED"}
        pose, fov_deg = found
        try:
            item = camera.add_reference(context.scene, pose, fov_deg)
            message = camera.activate(item, context.scene)
        except camera.CannotUseCamera as error:
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        scene_tools.make_active(item)
        look_through(context)
        self.report({"INFO"}, message or f"Added {item.name}")
        return {"FINISHED"}


def view_pose(context: bpy.types.Context) -> tuple[np.ndarray, float] | None:
    """Pose and angle of view, over its larger side, of a 3D view; an orthographic one gets 40 degrees."""
    areas = [context.area, *(context.screen.areas if context.screen else [])]
    area = next((a for a in areas if a is not None and a.type == "VIEW_3D"), None)
    if area is None:
        return None
    region = next(r for r in area.regions if r.type == "WINDOW")
    data = area.spaces.active.region_3d
    window = np.array(data.window_matrix)
    pose, lens = cm.view_camera(np.array(data.view_matrix), window, region.width, region.height, np.zeros(3), 1.0)
    if not data.is_perspective:
        pose = cm.rigid(np.linalg.inv(np.array(data.view_matrix)))
        focus = np.array(data.view_location)
        pose[:3, 3] = focus + pose[:3, 2] * data.view_distance / math.tan(math.radians(20))
        return pose, 40.0
    return pose, math.degrees(2 * math.atan(max(region.width, region.height) / 2 / lens[0]))


class CONRAD_OT_use_camera(CameraOperator, bpy.types.Operator):
    bl_idname = "conrad.use_camera"
    bl_label = "Use as Reference"
    bl_description = "Put the picture behind the chosen camera and add a proxy; the camera is not moved"

    def execute(self, context: bpy.types.Context) -> set[str]:
        try:
            camera.use_existing(context.scene.conrad.camera, context.scene)
        except camera.CannotUseCamera as error:
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        return {"FINISHED"}


class CONRAD_OT_fit_camera(CameraOperator, bpy.types.Operator):
    bl_idname = "conrad.fit_camera"
    bl_label = "Fit to Picture"
    bl_description = "Move the camera until the proxy covers the object in the picture, at the same orbit and elevation"
    fits_camera = True

    def execute(self, context: bpy.types.Context) -> set[str]:
        settings = context.scene.conrad
        try:
            camera.fit_to_picture(settings.camera, settings.image)
        except camera.CannotUseCamera as error:
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        pause = camera.why_pause(settings.image)
        if pause:
            self.report({"INFO"}, pause)
        return {"FINISHED"}


class CONRAD_OT_look_through(CameraOperator, bpy.types.Operator):
    bl_idname = "conrad.look_through"
    bl_label = "Look Through"
    bl_description = "Make it the scene's camera, in the picture's proportions, and turn the view to it"

    def execute(self, context: bpy.types.Context) -> set[str]:
        try:
            message = camera.activate(context.scene.conrad.camera, context.scene)
        except camera.CannotUseCamera as error:
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        look_through(context)
        if message:
            self.report({"INFO"}, message)
        return {"FINISHED"}


class CONRAD_OT_leave_camera(bpy.types.Operator):
    bl_idname = "conrad.leave_camera"
    bl_label = "Restore Render Size"
    bl_description = "Give the scene the render size and the camera from before the reference camera"
    bl_options = {"REGISTER", "UNDO"}

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        is_usable = context.scene.conrad.previous_x > 0
        if not is_usable:
            cls.poll_message_set("The render size is the scene's own")
        return is_usable

    def execute(self, context: bpy.types.Context) -> set[str]:
        camera.restore_aspect(context.scene, with_camera=True)
        render = context.scene.render
        self.report({"INFO"}, f"Render size is {render.resolution_x} x {render.resolution_y} again")
        return {"FINISHED"}


class CONRAD_OT_guess_elevation(CameraOperator, bpy.types.Operator):
    bl_idname = "conrad.guess_elevation"
    bl_label = "Guess"
    bl_description = "Set a usual elevation and let the prior treat it as uncertain"
    needs_camera, fits_camera = False, True
    elevation_deg: FloatProperty(options={"HIDDEN"})

    def execute(self, context: bpy.types.Context) -> set[str]:
        try:
            context.scene.conrad.is_elevation_guess = True
            pause = set_elevation(context.scene.conrad, self.elevation_deg)
        except camera.CannotUseCamera as error:
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        if pause:
            self.report({"INFO"}, pause)
        return {"FINISHED"}


def set_elevation(settings: bpy.types.PropertyGroup, elevation_deg: float) -> str:
    """Give the reference camera an elevation or, without one, the settings.

    Returns:
        Why Blender stood still for a moment, or nothing.

    Raises:
        CannotUseCamera: The camera cannot be fitted to the picture.
    """
    item = settings.camera
    if item is None:
        settings.elevation = math.radians(elevation_deg)
        return ""
    camera.set_orbit_value(item, "elevation_deg", elevation_deg)
    if settings.image is None or not item.conrad.is_own:
        return ""
    camera.fit_to_picture(item, settings.image)
    return camera.why_pause(settings.image)


GUESS_LIMIT_S = 120.0
"""An engine that has not answered by then will not: a worker that has to be started first takes some seconds."""


@dataclass(frozen=True)
class Question:
    """What the engine was asked about; scene data by name, because it may be gone when the answer comes."""

    file_token: str
    scene: str
    image: str
    camera: str
    asked_s: float
    is_answered: bool = False


question: Question | None = None
guess_note = ""
"""What came of the last Guess Elevation, for the panel."""


class CONRAD_OT_estimate_elevation(CameraOperator, bpy.types.Operator):
    bl_idname = "conrad.estimate_elevation"
    bl_label = "Guess Elevation"
    bl_description = "Have the engine estimate from the picture how high its camera stands, and move the camera there"
    bl_options = {"REGISTER"}
    needs_camera = False

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        reason = _reason(context, cls.needs_camera) or preferences.why_no_engine()
        if not reason and question is not None:
            reason = "The engine is looking at the picture"
        if reason:
            cls.poll_message_set(reason)
        return not reason

    def execute(self, context: bpy.types.Context) -> set[str]:
        global question, guess_note
        settings, item = context.scene.conrad, context.scene.conrad.camera
        image, mask = settings.image, settings.mask if settings.use_mask else None
        try:
            fov_deg = math.degrees(settings.fov) if item is None else camera.fov_deg(item, image)
            pause = pictures.why_pause(image, mask)
            link.refresh_settings()
            link.session().elevation = None
            steps = _asking(min(max(fov_deg, 2.0), 120.0), image, mask, context.scene)
            if pictures.is_large(image, mask):
                background.start(_asking_later(steps, image, mask))
            else:
                background.finish(steps)
        except (pictures.NoPicture, camera.CannotUseCamera, EngineUnavailable) as error:
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        names = (context.scene.name, image.name, "" if item is None else item.name)
        question, guess_note = Question(link.file_token, *names, time.monotonic()), "Looking at the picture"
        if pause:
            self.report({"INFO"}, pause)
        link.wake()
        return {"FINISHED"}


def _asking(
    fov_deg: float, image: bpy.types.Image, mask: bpy.types.Image | None, scene: bpy.types.Scene
) -> background.Steps:
    """Ask the engine about a picture. Raises NoPicture, EngineUnavailable."""
    fields = yield from pictures.job_fields(image, mask, scene)
    link.session().ask(GuessElevation(fov_deg=fov_deg, **fields))


def _asking_later(steps: background.Steps, image: bpy.types.Image, mask: bpy.types.Image | None) -> background.Steps:
    """The same at the ticks to come; what goes wrong is the answer."""
    try:
        yield from pictures.until_decoded(image, mask)
        yield from steps
    except (pictures.NoPicture, EngineUnavailable) as error:
        link.session().elevation = Error("input", str(error))


def take_guess() -> bool:
    """Use the engine's answer when it is here and the user's hands are off; called at every tick.

    Returns:
        Whether an answer is still waited for, or being used.
    """
    global question
    if question is None or question.is_answered:
        return question is not None
    answer = link.session().elevation
    if answer is None and time.monotonic() - question.asked_s < GUESS_LIMIT_S:
        return True
    if answer is not None and scene_tools.is_busy():
        return True
    question, link.session().elevation = replace(question, is_answered=True), None
    background.start(_using(answer, question))
    return question is not None


def _using(answer: ElevationGuess | Error | None, asked: Question) -> background.Steps:
    """Use an answer once the outline is known to which the camera is fitted."""
    global question, guess_note
    image = bpy.data.images.get(asked.image)
    try:
        if isinstance(answer, ElevationGuess) and answer.is_sure and asked.camera and image is not None:
            yield from camera.find_outline(image)
    except pictures.NoPicture:
        pass
    question, guess_note = None, _used(answer, asked)
    scene_tools.redraw(view=True)


def _used(answer: ElevationGuess | Error | None, asked: Question) -> str:
    """Move the camera that was asked for; returns what to tell the user."""
    if answer is None:
        return "The engine did not answer: see its state above"
    if isinstance(answer, Error):
        return f"No guess: {answer.message}"
    degrees = f"{answer.elevation_deg:.0f}° ± {answer.spread_deg:.0f}°"
    if not answer.is_sure:
        return f"The picture does not say it ({degrees}): the elevation was left as it is"
    scene = bpy.data.scenes.get(asked.scene) if asked.file_token == link.file_token else None
    settings = None if scene is None else scene.conrad
    names = settings and (settings.image and settings.image.name, settings.camera.name if settings.camera else "")
    if names != (asked.image, asked.camera):
        return "The picture or the camera was changed meanwhile: guess again"
    try:
        # What the engine is sure of counts as known; see the prior's model card.
        settings.is_elevation_guess = False
        pause = set_elevation(settings, answer.elevation_deg)
    except camera.CannotUseCamera as error:
        return str(error)
    scene_tools.push_undo("ConRad: Guess Elevation")
    return sentences(f"Elevation guessed: {degrees}", pause)


class CONRAD_MT_elevations(bpy.types.Menu):
    bl_idname = "CONRAD_MT_elevations"
    bl_label = "Guess the Elevation"

    def draw(self, context: bpy.types.Context) -> None:
        for label, degrees in (
            ("Eye Level", 0.0),
            ("Product Photo", 15.0),
            ("On a Table", 30.0),
            ("From Above", 60.0),
        ):
            self.layout.operator("conrad.guess_elevation", text=label).elevation_deg = degrees


CLASSES = (
    CONRAD_OT_add_camera,
    CONRAD_OT_camera_from_view,
    CONRAD_OT_use_camera,
    CONRAD_OT_fit_camera,
    CONRAD_OT_look_through,
    CONRAD_OT_leave_camera,
    CONRAD_OT_guess_elevation,
    CONRAD_OT_estimate_elevation,
    CONRAD_MT_elevations,
)


def register() -> None:
    for cls in CLASSES:
        bpy.utils.register_class(cls)
    link.steps.append(take_guess)


def unregister() -> None:
    global question, guess_note
    question, guess_note = None, ""
    if take_guess in link.steps:
        link.steps.remove(take_guess)
    for cls in reversed(CLASSES):
        bpy.utils.unregister_class(cls)
