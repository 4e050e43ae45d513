"""From the scene's settings to the message that starts a job, and the reasons why it cannot start."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import bpy

from . import background, camera, link, pictures, preferences, scene_tools
from .jobs import Notes
from .properties import PROMPTED
from .protocol import ProtocolError, Submit, new_job_id

PROJECT_OVERRIDES = {"mesh.project_only": True, "optimize.n_steps": 0, "optimize.warm_start_views": 0}


class BadSettings(Exception):
    """What is written in More Settings cannot be read; the message says why."""


REFUSALS = (pictures.NoPicture, camera.CannotUseCamera, BadSettings, ProtocolError)
"""Something about a job is wrong before it is sent; the message says what."""


def why_not(context: bpy.types.Context) -> str:
    """The reason why Generate is grey, or nothing. Called while drawing: it looks at nothing but settings."""
    settings = context.scene.conrad
    if settings.image is None:
        return "Choose a picture first: open one, or drop an image file onto the viewport"
    if settings.use_mask and settings.mask is None:
        return "Choose a mask image, or switch Mask Image off"
    if settings.use_start and settings.start is None:
        return "Choose the mesh to start from, or switch Start from Mesh off"
    if settings.camera is not None:
        if settings.camera.data.type != "PERSP":
            return "The reference camera must be a perspective camera"
        if settings.camera.conrad.proxy is None:
            return "Press Use as Reference: the camera has no proxy that says where the object is"
    reason = preferences.why_no_engine()
    if reason:
        return reason
    status = link.session().status if link.has_session() else None
    if status is not None and status.guidances and settings.guidance not in status.guidances:
        return "The engine has no model for this guidance: choose another one, or install it (see Check)"
    return ""


def why_not_project(context: bpy.types.Context) -> str:
    """The reason why Project Picture is grey, or nothing."""
    item = context.active_object
    if item is None or item.type != "MESH" or item.conrad.is_proxy:
        return "Select the mesh to put the picture on"
    if context.scene.conrad.camera is None:
        return "Add a reference camera first: it says how the picture lies on the mesh"
    return why_not(context)


def start_job(context: bpy.types.Context) -> Notes:
    """Send a job for the scene's picture.

    Raises:
        NoPicture, CannotUseCamera, BadSettings, ProtocolError: Something cannot be sent; the message says what.
    """
    settings = context.scene.conrad
    start = settings.start if settings.use_start else None
    return _send(context, settings, start, "generate")


def start_projection(context: bpy.types.Context) -> Notes:
    """Send a job that puts the picture on the active mesh. Raises what `start_job` raises."""
    return _send(context, context.scene.conrad, context.active_object, "project")


def extra_overrides(text: str) -> dict[str, str]:
    """The settings written as `name=value`, separated by spaces; what they mean is the engine's to check.

    Raises:
        BadSettings: Something in it has another form.
    """
    found = {}
    for word in text.split():
        name, separator, value = word.partition("=")
        if not (name and separator and value):
            raise BadSettings(f"More Settings has {word!r}: write name=value, such as optimize.n_steps=300")
        found[name] = value
    return found


def _send(
    context: bpy.types.Context, settings: bpy.types.PropertyGroup, start: bpy.types.Object | None, kind: str
) -> Notes:
    image, mask = settings.image, settings.mask if settings.use_mask else None
    overrides = {**extra_overrides(settings.extra), **(PROJECT_OVERRIDES if kind == "project" else {})}
    # Without a camera and an elevation nobody has said how high it stands: the default is only a guess.
    is_unsaid = settings.camera is None and not settings.is_property_set("elevation")
    if settings.is_elevation_guess or is_unsaid:
        overrides["picture.is_elevation_known"] = False
    mesh = {} if start is None else pictures.mesh_fields(start, context.evaluated_depsgraph_get())
    notes = notes_of(settings, context.scene, kind)
    if start is not None:
        notes.place = "CAMERA"
    if kind == "project":
        notes.name = start.name if start is not None else notes.name
    request = Submit(
        notes.job,
        name=notes.name,
        **camera_fields(notes.setup),
        **job_fields(settings),
        overrides=overrides,
        **mesh,
    )
    settings.file_id = link.file_token
    link.refresh_settings()
    link.session().table.add(notes)
    steps = _sending(request, notes, image, mask, context.scene)
    if pictures.is_large(image, mask):
        # The engine is wanted when the job is sent: its start would take the processor from what Blender waits for.
        background.start(_sending_later(steps, notes, image, mask))
    else:
        background.finish(steps)
    link.sync_list()
    link.wake()
    return notes


def _sending(
    request: Submit, notes: Notes, image: bpy.types.Image, mask: bpy.types.Image | None, scene: bpy.types.Scene
) -> background.Steps:
    """Add the picture to a job that is in the list, and send it; without it, or with more than the protocol takes, the job
    leaves the list. Raises NoPicture, ProtocolError."""
    session = link.session()
    try:
        request = replace(request, **(yield from pictures.job_fields(image, mask, scene)))
        yield partial(session.table.keep_request, request)
    except (pictures.NoPicture, ProtocolError):
        session.table.remove(notes.job)
        raise
    if notes.job in session.table.jobs:
        session.submit(request, notes)
    else:
        # It was cancelled meanwhile.
        session.table.confirmed(notes.job)


def _sending_later(
    steps: background.Steps, notes: Notes, image: bpy.types.Image, mask: bpy.types.Image | None
) -> background.Steps:
    """The same at the ticks to come."""
    try:
        yield from pictures.until_decoded(image, mask)
        yield from steps
    except (pictures.NoPicture, ProtocolError) as error:
        link.session().table.remove(notes.job)
        link.session().problem = f"{notes.name}: {error}"
        link.sync_list()


def job_fields(settings: bpy.types.PropertyGroup) -> dict:
    """What a job takes from the settings as they are."""
    return {
        "preset": settings.preset,
        "guidance": settings.guidance,
        "prompt": settings.prompt if settings.guidance in PROMPTED else "",
        "seed": settings.seed,
        "texture_size": int(settings.texture_size) or None,
        "n_faces": max(settings.n_faces, 100) if settings.n_faces else None,
    }


def camera_fields(setup: dict) -> dict:
    """A camera set-up in the message's flat form."""
    return {
        "c2w": tuple(float(x) for row in setup["c2w"] for x in row),
        "intrinsics": tuple(setup["intrinsics"]),
        "width": setup["width"],
        "height": setup["height"],
        "object_center": tuple(setup["object_center"]),
        "object_size": setup["object_size"],
    }


def notes_of(settings: bpy.types.PropertyGroup, scene: bpy.types.Scene, kind: str) -> Notes:
    """What Blender will want to know when the result comes."""
    item, image = settings.camera, settings.image
    location = camera.place_of(settings, scene)
    setup = camera.job_setup(item, image) if item is not None else camera.imagined_setup(settings, image, location)
    place = settings.place
    if item is None and place == "CAMERA":
        # No camera is to be kept aligned with, so the object gets exactly the size that was asked for.
        place = "ORIGIN"
    return Notes(
        new_job_id(),
        name=scene_tools.data_name(image.name.rsplit(".", 1)[0]),
        kind=kind,
        file_token=link.file_token,
        picture=image.name,
        camera=item.name if item is not None else "",
        is_own_camera=item is not None and item.conrad.is_own,
        setup=setup,
        place=place,
        location=tuple(location),
        size=settings.size,
        origin=settings.origin,
        is_asset=settings.is_asset,
        asset_tags=settings.asset_tags,
        seed=settings.seed,
        preset=settings.preset,
    )
