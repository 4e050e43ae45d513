"""What a client sent, as the pipeline takes it. In the worker: here pictures are decoded for the first time."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import InputError
from ..preprocess.depth import decode_depth
from ..preprocess.reading import PROGRAMS
from ..protocol import Array
from .requests import MAX_PIXELS


def read_inputs(folder: Path) -> dict:
    """The fields of a pipeline's `Job` that come from the client.

    Args:
        folder: As `Store.put_inputs` wrote it.

    Raises:
        InputError: A picture or depth map cannot be decoded or is too large.
    """
    request = json.loads((folder / "request.json").read_text())
    arrays = {
        name: np.frombuffer((folder / name).read_bytes(), described["dtype"]).reshape(described["shape"])
        for name, described in request["arrays"].items()
    }
    camera = None
    if request["c2w"]:
        camera = {key: request[key] for key in ("c2w", "intrinsics", "width", "height", "object_size")}
        camera["object_center"] = request["object_center"] or [0.0, 0.0, 0.0]
    fields = {
        "picture": _picture(folder, "picture", arrays.get("pixels")),
        "mask": _picture(folder, "mask", arrays.get("mask_pixels")),
        "depth": _depth(folder, arrays.get("depth_pixels")),
        "depth_kind": request["depth_kind"],
        "camera": camera,
        "init_mesh": _mesh(folder, arrays),
    }
    # What is decoded later, such as textures of a start mesh, falls under Pillow's.
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    return fields


def _picture(folder: Path, name: str, pixels: np.ndarray | None) -> bytes | None:
    path = folder / name
    data = path.read_bytes() if pixels is None and path.exists() else None
    return picture_file(name, data, pixels)


def picture_file(name: str, data: bytes | memoryview | None, pixels: np.ndarray | None) -> bytes | None:
    """File bytes of a picture, known to be decodable and of bearable size; None if there is neither file nor pixels.

    Raises:
        InputError: It cannot be decoded or is too large.
    """
    if pixels is not None:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "png", compress_level=1)
        return buffer.getvalue()
    if data is None:
        return None
    data = bytes(data)
    Image.MAX_IMAGE_PIXELS = None  # Our own limit, checked before anything is decoded, says what to do.
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.format in PROGRAMS:
                raise InputError(f"the {name} is a {picture.format} file, which is a program: save it as PNG or JPEG")
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise InputError(
                    f"the {name} has {width} x {height} pixels; at most {MAX_PIXELS} are allowed: scale it down"
                )
            picture.load()
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError) as error:
        raise InputError(f"the {name} cannot be decoded: {error}; send a PNG, JPEG or another common format") from None
    return data


def numbers_of(array: Array | None) -> np.ndarray | None:
    """The numbers of an array on the wire, without a copy."""
    return None if array is None else np.frombuffer(array.data, array.dtype).reshape(array.shape)


def _depth(folder: Path, pixels: np.ndarray | None) -> bytes | None:
    if pixels is not None:
        buffer = io.BytesIO()
        np.save(buffer, pixels)
        return buffer.getvalue()
    path = folder / "depth"
    if not path.exists():
        return None
    data = path.read_bytes()
    decode_depth(data, MAX_PIXELS)
    return data


def _mesh(folder: Path, arrays: dict[str, np.ndarray]) -> Path | bytes | None:
    if "init_vertices" in arrays:
        path = folder / "init.ply"
        write_ply(path, arrays["init_vertices"], arrays["init_faces"])
        return path
    path = folder / "init_mesh"
    return path.read_bytes() if path.exists() else None


def write_ply(path: Path, vertices: np.ndarray, faces: np.ndarray) -> None:
    """A binary PLY file of (n, 3) float32 vertices and (n, 3) triangles.

    Raises:
        InputError: A face names a vertex that does not exist, or a coordinate is not finite.
    """
    if not np.isfinite(vertices).all() or faces.min() < 0 or faces.max() >= len(vertices):
        raise InputError("the start mesh has coordinates that are not finite, or faces of vertices that do not exist")
    header = (
        "ply\nformat binary_little_endian 1.0\n"
        f"element vertex {len(vertices)}\nproperty float x\nproperty float y\nproperty float z\n"
        f"element face {len(faces)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    rows = np.empty(len(faces), [("count", "u1"), ("ids", "<i4", 3)])
    rows["count"], rows["ids"] = 3, faces
    path.write_bytes(header.encode() + vertices.astype("<f4").tobytes() + rows.tobytes())
