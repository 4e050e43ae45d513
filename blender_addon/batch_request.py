"""What is asked of the engine for one picture of a batch."""

from __future__ import annotations

import math
from pathlib import Path

import bpy

from . import background, batch, camera, link, pictures, requests, scene_tools
from .jobs import Notes
from .protocol import Submit, new_job_id


def made_of(
    opened: batch.Batch, item: batch.Item, scene: bpy.types.Scene, source: batch.Source, setup: dict
) -> tuple[Submit, Notes]:
    """The request for a picture and what is to become of its result: the scene's settings, but for what the picture's own file
    says.

    Args:
        setup: Of its reference camera; empty if there is none.

    Raises:
        BadSettings, ProtocolError: Something about it cannot be sent.
    """
    path, settings, own = opened.path(item), scene.conrad, source.settings
    fields = requests.job_fields(settings)
    fields |= {name: own[name] for name in fields if name in own}
    overrides = {**requests.extra_overrides(settings.extra), **own.get("overrides", {})}
    elevation = own.get("elevation_deg")
    if not setup:
        overrides.setdefault("picture.fov_deg", float(own.get("fov_deg", math.degrees(settings.fov))))
        if elevation is None:
            elevation = batch.AUTO if settings.batch.camera == "GUESS" else math.degrees(settings.elevation)
        if elevation != batch.AUTO:
            # Without one the engine guesses, and says itself how sure it is.
            overrides.setdefault("picture.elevation_deg", float(elevation))
    if settings.is_elevation_guess and elevation != batch.AUTO:
        overrides.setdefault("picture.is_elevation_known", False)
    index = opened.items.index(item)
    size = float(own.get("size", settings.size))
    notes = Notes(
        new_job_id(),
        name=scene_tools.data_name(path.stem),
        kind="batch",
        file_token=link.file_token,
        picture=path.name,
        setup=setup,
        place="ORIGIN",
        location=batch.grid_place(index, len(opened.items), 1.4 * settings.size)
        if opened.output == "GRID"
        else (0.0, 0.0, 0.0),
        size=size,
        origin=settings.origin,
        is_asset=opened.output == "LIBRARY" or settings.is_asset,
        asset_tags=settings.asset_tags,
        seed=fields["seed"],
        preset=fields["preset"],
    )
    request = Submit(
        notes.job,
        name=notes.name,
        picture=source.picture,
        mask=source.mask,
        overrides=overrides,
        **(requests.camera_fields(setup) if setup else {}),
        **fields,
    )
    return request, notes


def picture_size(path: Path, data: bytes) -> background.Steps:
    """Width and height of a picture. Of a kind whose size only Blender reads, a thread of Blender's decodes it first.

    Raises:
        BatchError: It is no picture.
        NoPicture: It was removed meanwhile.
    """
    size = pictures.upright_size(data)
    if size is not None:
        return size
    try:
        image = bpy.data.images.load(str(path))
    except RuntimeError as error:
        raise batch.BatchError(f"{path.name} cannot be read as a picture: {error}") from None
    uid = image.session_uid
    try:
        yield from pictures.until_decoded(image)
        return camera.picture_size(pictures.found(uid))
    finally:
        bpy.data.batch_remove([image for image in bpy.data.images if image.session_uid == uid])


def scene_camera(scene: bpy.types.Scene, size: tuple[int, int]) -> dict:
    """The set-up of the scene's reference camera for a picture of this size.

    Raises:
        CannotUseCamera: There is none, or it does not look as pictures are taken.
    """
    item = scene.conrad.camera
    if item is None:
        raise camera.CannotUseCamera("The scene has no reference camera: add one, or use the elevation instead")
    return camera.setup_of(item, *size)
