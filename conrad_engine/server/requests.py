"""From the wire's small vocabulary to the engine's settings, with everything checked that needs no picture. No torch."""

from __future__ import annotations

import json
import math
import re

from ..config import GUIDANCES, PipelineConfig, preset, with_overrides
from ..errors import InputError
from ..protocol import Extract, GuessElevation, Submit
from .store import JOB_ID

LOCAL_SETTINGS = frozenset(
    "matting_model weights allow_pickle revision embedding tiny_autoencoder ip_adapter ip_adapter_file text_to_image "
    "edit_model instruct_model caption_model depth_model".split()
)
"""Last parts of settings that name files of the engine's machine or decide what code it trusts: no client may choose them."""
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
OWN_SETTINGS = ("preset", "guidance", "device", "threads")
"""Settings that are not overrides: they have a field of their own, or are the engine's."""

MAX_PICTURE_BYTES = 64 * 1024 * 1024
MAX_OVERRIDES = 16_000
"""Characters; what a job carries must fit into one message header together."""
MAX_PIXELS = 100_000_000
MAX_MESH_ELEMENTS = 5_000_000


def settings_of(submit: Submit) -> dict:
    """The settings of a job as they are kept: JSON types only.

    Raises:
        InputError: Something in the request cannot be used.
    """
    _check_identity(submit)
    _check_pictures(submit, ("picture", "mask", "depth"))
    if submit.depth_kind not in ("relative", "metric"):
        raise InputError(f"depth_kind must be relative or metric, not {submit.depth_kind[:60]!r}")
    _check_camera(submit)
    _check_mesh(submit)
    overrides = dict(submit.overrides)
    if not submit.c2w and "picture.elevation_deg" not in overrides:
        # Nobody has said how high the camera stands: the preset's elevation is only a guess.
        overrides.setdefault("picture.is_elevation_known", False)
    if len(json.dumps(overrides)) > MAX_OVERRIDES:
        raise InputError(f"the overrides have more than {MAX_OVERRIDES} characters")
    settings = {
        "preset": submit.preset,
        "guidance": submit.guidance,
        "prompt": submit.prompt,
        "seed": submit.seed,
        "texture_size": submit.texture_size,
        "n_faces": submit.n_faces,
        "overrides": overrides,
    }
    return {**settings, "resolved": _resolved(settings)}


def pipeline_config(settings: dict, device: str = "auto") -> PipelineConfig:
    """The full configuration of a job.

    Raises:
        InputError: A setting does not exist, has no such value, or may not be set by a client.
    """
    overrides: dict[str, object] = {"seed": settings["seed"], "prompt": settings["prompt"], "device": device}
    if settings["guidance"]:
        overrides["guidance"] = settings["guidance"]
    for name, value in settings["overrides"].items():
        # A name may end in underscores, as that of a field that would be a keyword does: see `config.with_overrides`.
        leaf = name.rsplit(".", 1)[-1].rstrip("_")
        if leaf in LOCAL_SETTINGS or name.rstrip("_") in OWN_SETTINGS:
            raise InputError(f"setting {name!r} cannot be set by a client")
        if leaf == "model" and not HUB_ID.fullmatch(str(value)):
            raise InputError(f"{name} must be a hub id such as 'name/model', not {str(value)[:60]!r}")
        overrides[name] = value
    if settings["texture_size"] is not None:
        overrides["mesh.texture_size"] = settings["texture_size"]
    if settings["n_faces"] is not None:
        overrides["mesh.n_faces"] = settings["n_faces"]
    return with_overrides(preset(settings["preset"]), overrides)


def extract_changes(extract: Extract, settings: dict) -> dict:
    """What an `Extract` changes in a job's settings.

    Raises:
        InputError: A value cannot be used.
    """
    overrides = dict(settings["overrides"])
    changes: dict = {"overrides": overrides}
    for name, value in (("mesh.resolution", extract.resolution), ("mesh.level", extract.level)):
        if value is not None:
            overrides[name] = value
    for name, value in (("texture_size", extract.texture_size), ("n_faces", extract.n_faces)):
        if value is not None:
            changes[name] = value
    return {**changes, "resolved": _resolved({**settings, **changes})}


def continue_changes(n_steps: int, settings: dict) -> dict:
    """What a `Continue` changes in a job's settings.

    Raises:
        InputError: The number of steps is not larger than the present one.
    """
    present = settings["resolved"]["n_steps_set"]
    if not present <= n_steps <= 1_000_000:
        raise InputError(
            f"the job has {present} steps; continue it with a larger number (at most 1000000), not {n_steps}"
        )
    changes = {"overrides": {**settings["overrides"], "optimize.n_steps": n_steps}}
    return {**changes, "resolved": _resolved({**settings, **changes})}


def check_view(c2w: tuple[float, ...], intrinsics: tuple[float, ...], width: int, height: int, max_side: int) -> None:
    """A camera on the wire has the right number of sensible numbers; whether the object is before it is the worker's check.

    Raises:
        InputError: It has not.
    """
    if not (0 <= width <= max_side and 0 <= height <= max_side):
        raise InputError(f"a picture has at most {max_side} pixels a side, not {width} x {height}")
    if not c2w and not intrinsics:
        return
    if len(c2w) != 16 or len(intrinsics) != 4:
        raise InputError(f"a camera has 16 numbers of c2w and 4 intrinsics, not {len(c2w)} and {len(intrinsics)}")
    if not all(math.isfinite(x) and abs(x) < 1e9 for x in (*c2w, *intrinsics)):
        raise InputError("a camera's numbers must be finite")
    if min(*intrinsics[:2], width, height) <= 0:
        raise InputError("a camera needs positive focal lengths and a size of at least one pixel")
    if not _is_rotation([c2w[0:3], c2w[4:7], c2w[8:11]]):
        raise InputError("a camera's c2w must be a rotation and a position, without scale or mirroring")


def _resolved(settings: dict) -> dict:
    """The figures that clients show, from the full configuration."""
    config = pipeline_config(settings)
    return {
        "n_steps_set": config.optimize.n_steps,
        "texture_size": config.mesh.texture_size,
        "n_faces": config.mesh.n_faces,
    }


def _is_rotation(rows: list[tuple[float, ...]]) -> bool:
    """Whether the rows are orthonormal and right-handed."""
    (a, b, c), (d, e, f), (g, h, i) = rows
    products = [sum(x * y for x, y in zip(rows[m], rows[n])) - (m == n) for m in range(3) for n in range(m, 3)]
    determinant = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
    return all(abs(product) < 2e-3 for product in products) and determinant > 0


def _check_identity(submit: Submit) -> None:
    if not JOB_ID.fullmatch(submit.job):
        raise InputError("a job's id must be 32 hexadecimal digits in lower case")
    if len(submit.name) > 200:
        raise InputError("a job's name must have at most 200 characters")
    if not -100 <= submit.priority <= 100:
        raise InputError(f"a job's priority must be between -100 and 100, not {submit.priority}")
    if submit.guidance and submit.guidance not in GUIDANCES:
        raise InputError(f"unknown guidance {submit.guidance[:60]!r}: use {', '.join(GUIDANCES)}")


PIXELS = {"picture": ("pixels", "u1", (3, 4)), "mask": ("mask_pixels", "u1", ()), "depth": ("depth_pixels", "<f4", ())}
"""Of each kind of picture the field of its pixels, their number type and how many channels they may have; () is one plane."""


def _check_pictures(message: Submit | GuessElevation, names: tuple[str, ...]) -> None:
    if (message.picture is None) == (message.pixels is None):
        raise InputError("the request needs a picture: either its file's bytes or its pixels")
    for name in names:
        data = getattr(message, name)
        if data is not None and not 1 <= len(data) <= MAX_PICTURE_BYTES:
            raise InputError(f"the {name} has {len(data)} bytes; 1 to {MAX_PICTURE_BYTES} are allowed")
        field, dtype, channels = PIXELS[name]
        array = getattr(message, field)
        if array is None:
            continue
        is_image = array.dtype == dtype and len(array.shape) == (3 if channels else 2) and min(array.shape) > 0
        if not is_image or (channels and array.shape[2] not in channels):
            shape = "(height, width, 3 or 4)" if channels else "(height, width)"
            raise InputError(f"{field} must be {dtype} {shape}, not {array.dtype} {array.shape}")
        if array.shape[0] * array.shape[1] > MAX_PIXELS:
            raise InputError(f"{field} has {array.shape[0] * array.shape[1]} pixels; at most {MAX_PIXELS} are allowed")


def check_guess(guess: GuessElevation) -> None:
    """A question about a picture's elevation can be answered, as far as that shows without decoding the picture.

    Raises:
        InputError: It cannot.
    """
    _check_pictures(guess, ("picture", "mask"))
    if not 2 <= guess.fov_deg <= 120:
        raise InputError(f"fov_deg must be between 2 and 120 degrees, not {guess.fov_deg:g}")


def _check_camera(submit: Submit) -> None:
    check_view(submit.c2w, submit.intrinsics, submit.width, submit.height, max_side=100_000)
    if len(submit.object_center) not in (0, 3):
        raise InputError(f"object_center has 3 numbers, not {len(submit.object_center)}")
    if submit.object_size is not None and submit.object_size <= 0:
        raise InputError(f"object_size must be positive, not {submit.object_size:g}")


def _check_mesh(submit: Submit) -> None:
    vertices, faces = submit.init_vertices, submit.init_faces
    if (vertices is None) != (faces is None) or (vertices is not None and submit.init_mesh is not None):
        raise InputError("a start mesh is either file bytes, or init_vertices together with init_faces")
    for array, dtypes, name in ((vertices, ("<f4",), "init_vertices"), (faces, ("<i4", "<u4"), "init_faces")):
        if array is None:
            continue
        if array.dtype not in dtypes or len(array.shape) != 2 or array.shape[1] != 3:
            raise InputError(f"{name} must be {' or '.join(dtypes)} (n, 3), not {array.dtype} {array.shape}")
        if not 1 <= array.shape[0] <= MAX_MESH_ELEMENTS:
            raise InputError(f"{name} has {array.shape[0]} rows; 1 to {MAX_MESH_ELEMENTS} are allowed")
