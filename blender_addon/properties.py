"""What the user can set: settings that belong to the file (scene and reference cameras) and state of this run.

Orbit values of a reference camera are computed from its matrix, so sliders, dragging the camera and walking with the view
locked to it always agree.
"""

from __future__ import annotations

from math import degrees, radians

import bpy
from bpy.props import (
    BoolProperty,
    CollectionProperty,
    EnumProperty,
    FloatProperty,
    IntProperty,
    PointerProperty,
    StringProperty,
)

GUIDANCES = (
    ("embedded", "Built-In", "The small prior that ships with the engine; needs no download"),
    ("stable_diffusion", "Stable Diffusion", "Follows a text prompt; its model must be installed in the engine"),
    ("zero123", "Zero123", "Knows views of objects; its model must be installed in the engine"),
    ("mixture", "Mixture", "Zero123 and Stable Diffusion together; both models must be installed in the engine"),
)
PRESETS = (
    ("draft", "Draft", "Fastest: a first look at the shape"),
    ("standard", "Standard", "Good quality in reasonable time"),
    ("fine", "Fine", "Best quality: more views, finer mesh, larger texture"),
)
TEXTURE_SIZES = (
    ("0", "By Preset", "The size that the preset names"),
    ("512", "512", ""),
    ("1024", "1024", ""),
    ("2048", "2048", ""),
    ("4096", "4096", ""),
)
PLACES = (
    ("CAMERA", "Under the Picture", "Where the reference camera sees it"),
    ("ORIGIN", "World Origin", "At the center of the world, in exactly the size set"),
    ("CURSOR", "3D Cursor", "At the 3D cursor, in exactly the size set"),
)
ORIGINS = (
    ("BOTTOM", "Bottom", "The object's origin lies at the center of its base"),
    ("CENTER", "Center", "The object's origin lies at the center of its bounding box"),
)
BATCH_OUTPUTS = (
    ("GRID", "Scene Grid", "All objects side by side in this scene"),
    ("COLLECTIONS", "Collections", "One collection for each picture in this scene"),
    ("LIBRARY", "Asset Library", "One .blend file with a marked asset for each picture"),
    ("GLB", "GLB Files", "One .glb file for each picture"),
)
BATCH_CAMERAS = (
    ("GUESS", "Guess Elevation", "The engine guesses from each picture how high its camera stands"),
    ("ELEVATION", "Same Elevation", "Every picture was taken from this height"),
    ("CAMERA", "Reference Camera", "The scene's reference camera for every picture"),
)
# Prompts mean something to these only.
PROMPTED = ("stable_diffusion", "mixture")


def _picture_changed(settings: ConradSettings, context: bpy.types.Context) -> None:
    from . import camera

    camera.picture_changed(settings)


def _camera_changed(settings: ConradSettings, context: bpy.types.Context) -> None:
    from . import camera

    camera.camera_changed(settings)


def _is_camera(settings: ConradSettings, item: bpy.types.Object) -> bool:
    return item.type == "CAMERA"


def _is_mesh(settings: ConradSettings, item: bpy.types.Object) -> bool:
    return item.type == "MESH" and not item.conrad.is_proxy


class ConradBatchSettings(bpy.types.PropertyGroup):
    """Many pictures at once."""

    folder: StringProperty(name="Pictures", subtype="DIR_PATH", description="Folder with the pictures")
    pattern: StringProperty(
        name="Pattern", default="*.png *.jpg *.jpeg *.webp", description="File name patterns, separated by spaces"
    )
    output: EnumProperty(name="Output", items=BATCH_OUTPUTS, default="GLB", description="What becomes of the results")
    out_folder: StringProperty(
        name="Output Folder", subtype="DIR_PATH", description="Folder for files and the list that a later run resumes"
    )
    camera: EnumProperty(
        name="Camera",
        items=BATCH_CAMERAS,
        default="GUESS",
        description="Where the pictures were taken from; a side-car file may say otherwise for its picture",
    )


class ConradSettings(bpy.types.PropertyGroup):
    """One picture and what to make of it; saved with the scene."""

    image: PointerProperty(
        name="Picture", type=bpy.types.Image, description="Picture to turn into an object", update=_picture_changed
    )
    use_mask: BoolProperty(
        name="Mask Image", description="Cut the object out by a mask instead of the picture's alpha or automatically"
    )
    mask: PointerProperty(
        name="Mask", type=bpy.types.Image, description="White where the object is, in the picture's proportions"
    )
    prompt: StringProperty(name="Prompt", description="What the picture shows, for priors that read text")
    guidance: EnumProperty(
        name="Guidance", items=GUIDANCES, default="embedded", description="Prior that imagines the unseen sides"
    )
    preset: EnumProperty(
        name="Quality", items=PRESETS, default="standard", description="How much time to spend on quality"
    )
    seed: IntProperty(name="Seed", min=0, max=2**31 - 1, description="Same seed, same picture, same object")
    texture_size: EnumProperty(
        name="Texture", items=TEXTURE_SIZES, default="0", description="Pixels along a side of the texture"
    )
    n_faces: IntProperty(
        name="Faces", min=0, max=2_000_000, soft_max=200_000, description="Face count of the mesh; 0 is by preset"
    )
    extra: StringProperty(
        name="More Settings",
        description="Other settings of the engine, such as optimize.n_steps=300 mesh.resolution=256",
    )
    size: FloatProperty(
        name="Size", default=1.0, min=1e-4, soft_max=100.0, unit="LENGTH", description="Largest side of the object"
    )
    place: EnumProperty(name="Place", items=PLACES, default="CAMERA", description="Where the object goes")
    origin: EnumProperty(name="Origin", items=ORIGINS, default="BOTTOM", description="Where its origin lies")
    elevation: FloatProperty(
        name="Elevation",
        default=radians(10.0),
        min=radians(-60.0),
        max=radians(89.0),
        subtype="ANGLE",
        description="Height of the camera above the object's horizon, while no reference camera is set",
    )
    fov: FloatProperty(
        name="Angle of View",
        default=radians(40.0),
        min=radians(2.0),
        max=radians(120.0),
        subtype="ANGLE",
        description="Of the picture's larger side, while no reference camera is set",
    )
    is_elevation_guess: BoolProperty(name="Only a Guess", description="Let the prior treat the elevation as uncertain")
    camera: PointerProperty(
        name="Camera",
        type=bpy.types.Object,
        poll=_is_camera,
        update=_camera_changed,
        description="Reference camera that the picture was taken from",
    )
    use_start: BoolProperty(name="Start from Mesh", description="Begin with the shape of a mesh object")
    start: PointerProperty(
        name="Start Mesh", type=bpy.types.Object, poll=_is_mesh, description="Mesh object whose shape is the beginning"
    )
    is_asset: BoolProperty(name="Mark as Asset", description="Make the object an asset with a preview of its own")
    asset_tags: StringProperty(name="Tags", description="Tags of the asset, separated by commas")
    use_overlay: BoolProperty(
        name="Show in Viewport", default=True, description="Draw the forming object in the viewport, from its own view"
    )
    overlay_opacity: FloatProperty(
        name="Opacity", default=1.0, min=0.0, max=1.0, subtype="FACTOR", description="Of the forming object"
    )
    extra_steps: IntProperty(name="More Steps", default=100, min=1, max=100_000, description="Steps to go on for")
    extract_resolution: IntProperty(
        name="Resolution", min=0, max=1024, description="Cells along the longest side when extracting; 0 keeps it"
    )
    batch: PointerProperty(type=ConradBatchSettings)
    file_id: StringProperty(description="Names this file among others", options={"HIDDEN"})
    # The render size from before the reference camera was activated.
    aspect_camera: PointerProperty(type=bpy.types.Object)
    previous_camera: PointerProperty(type=bpy.types.Object)
    previous_x: IntProperty()
    previous_y: IntProperty()


def _orbit_getter(name: str):
    def get(settings: ConradObject) -> float:
        from . import camera

        value = camera.orbit_value(settings.id_data, name)
        # Rounding noise would show as -0 degrees.
        return round(radians(value), 6) + 0.0 if name.endswith("_deg") else value

    return get


def _orbit_setter(name: str):
    def set_(settings: ConradObject, value: float) -> None:
        from . import camera

        camera.set_orbit_value(settings.id_data, name, degrees(value) if name.endswith("_deg") else value)

    return set_


def _opacity_get(settings: ConradObject) -> float:
    from . import camera

    background = camera.background_of(settings.id_data)
    return background.alpha if background else 0.5


def _opacity_set(settings: ConradObject, value: float) -> None:
    from . import camera

    background = camera.background_of(settings.id_data)
    if background:
        background.alpha = value


def _front_get(settings: ConradObject) -> bool:
    from . import camera

    background = camera.background_of(settings.id_data)
    return bool(background and background.display_depth == "FRONT")


def _front_set(settings: ConradObject, value: bool) -> None:
    from . import camera

    background = camera.background_of(settings.id_data)
    if background:
        background.display_depth = "FRONT" if value else "BACK"


class ConradObject(bpy.types.PropertyGroup):
    """What makes an object a reference camera or its proxy."""

    is_reference: BoolProperty()
    is_own: BoolProperty(description="Made by this add-on, which may move it along with a result")
    is_proxy: BoolProperty()
    image: PointerProperty(type=bpy.types.Image)
    proxy: PointerProperty(type=bpy.types.Object)
    azimuth: FloatProperty(
        name="Orbit",
        description="Angle around the object; 0 looks at its front",
        subtype="ANGLE",
        soft_min=radians(-180.0),
        soft_max=radians(180.0),
        get=_orbit_getter("azimuth_deg"),
        set=_orbit_setter("azimuth_deg"),
    )
    elevation: FloatProperty(
        name="Elevation",
        description="Height above the object's horizon",
        subtype="ANGLE",
        soft_min=radians(-30.0),
        soft_max=radians(89.0),
        get=_orbit_getter("elevation_deg"),
        set=_orbit_setter("elevation_deg"),
    )
    roll: FloatProperty(
        name="Roll",
        description="Turn around the viewing axis",
        subtype="ANGLE",
        soft_min=radians(-45.0),
        soft_max=radians(45.0),
        get=_orbit_getter("roll_deg"),
        set=_orbit_setter("roll_deg"),
    )
    distance: FloatProperty(
        name="Distance",
        description="From the center of the object",
        unit="LENGTH",
        min=1e-4,
        get=_orbit_getter("distance"),
        set=_orbit_setter("distance"),
    )
    perspective: FloatProperty(
        name="Perspective",
        description="Focal length, with the distance following so that the object keeps its size",
        unit="CAMERA",
        soft_min=10.0,
        soft_max=200.0,
        get=_orbit_getter("perspective"),
        set=_orbit_setter("perspective"),
    )
    opacity: FloatProperty(
        name="Opacity",
        description="Of the picture in the camera's view",
        subtype="FACTOR",
        min=0.0,
        max=1.0,
        get=_opacity_get,
        set=_opacity_set,
    )
    in_front: BoolProperty(
        name="In Front", description="Show the picture in front of the scene", get=_front_get, set=_front_set
    )


class ConradJobItem(bpy.types.PropertyGroup):
    """A line of the job list; everything else about the job is in `link.session`."""

    job: StringProperty()


class ConradBatchItem(bpy.types.PropertyGroup):
    """A line of the batch list."""

    path: StringProperty()


class ConradState(bpy.types.PropertyGroup):
    """State of this run; nothing of it is saved."""

    jobs: CollectionProperty(type=ConradJobItem, options={"SKIP_SAVE"})
    active_job: IntProperty(options={"SKIP_SAVE"})
    batch: CollectionProperty(type=ConradBatchItem, options={"SKIP_SAVE"})
    active_batch: IntProperty(options={"SKIP_SAVE"})


CLASSES = (ConradBatchSettings, ConradSettings, ConradObject, ConradJobItem, ConradBatchItem, ConradState)


def register() -> None:
    for cls in CLASSES:
        bpy.utils.register_class(cls)
    bpy.types.Scene.conrad = PointerProperty(type=ConradSettings)
    bpy.types.Object.conrad = PointerProperty(type=ConradObject)
    bpy.types.WindowManager.conrad = PointerProperty(type=ConradState, options={"SKIP_SAVE"})


def unregister() -> None:
    del bpy.types.WindowManager.conrad, bpy.types.Object.conrad, bpy.types.Scene.conrad
    for cls in reversed(CLASSES):
        bpy.utils.unregister_class(cls)
