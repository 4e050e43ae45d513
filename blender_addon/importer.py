"""Result arrays -> named object with material, texture and provenance. One call, well under a second."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import bpy
import numpy as np

from . import camera, scene_tools
from . import camera_math as cm
from .jobs import Job
from .protocol import Result


class CannotImport(Exception):
    """The result is not a usable mesh; the message says why."""


def import_result(job: Job, scene: bpy.types.Scene, collection: str = scene_tools.COLLECTION_NAME) -> bpy.types.Object:
    """Bring a job's result into the scene, where its notes want it.

    Raises:
        CannotImport: The arrays do not make a mesh.
    """
    result, notes = job.result, job.notes
    assert result is not None
    vertices, faces, uvs = checked_arrays(result)
    place = None if notes.place == "CAMERA" else np.array(notes.location)
    mapping, origin = cm.placement(vertices, place, None if place is None else notes.size, notes.origin)
    name = scene_tools.data_name(job.name)
    mesh = make_mesh(name, mapping.points(vertices) - origin, faces, uvs)
    mesh.materials.append(make_material(name, make_texture(name, result, job.texture)))
    item = bpy.data.objects.new(name, mesh)
    item.location = origin
    scene_tools.link(item, scene, collection)
    _write_provenance(item, job, mapping)
    _keep_aligned(job, mapping)
    if notes.is_asset:
        mark_asset(item, job)
    scene_tools.make_active(item)
    return item


def checked_arrays(result: Result) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vertices, faces and UVs as arrays that cannot harm Blender: indices in range, numbers finite, no folded faces.

    Raises:
        CannotImport: They are not those of a mesh.
    """
    vertices = np.frombuffer(result.vertices.data, result.vertices.dtype).reshape(result.vertices.shape)
    faces = np.frombuffer(result.faces.data, result.faces.dtype).reshape(result.faces.shape)
    uvs = np.frombuffer(result.uvs.data, result.uvs.dtype).reshape(result.uvs.shape)
    if vertices.ndim != 2 or vertices.shape[1] != 3 or faces.ndim != 2 or faces.shape[1] != 3:
        raise CannotImport(f"The result's arrays have shapes {vertices.shape} and {faces.shape}: that is no mesh")
    if uvs.shape != (len(vertices), 2) or not len(faces):
        raise CannotImport("The result has no faces" if not len(faces) else f"The result's UVs have shape {uvs.shape}")
    if not (np.isfinite(vertices).all() and np.isfinite(uvs).all()):
        raise CannotImport("The result has coordinates that are not finite")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise CannotImport("The result's faces name vertices that are not there")
    return vertices, faces, uvs


def make_mesh(name: str, vertices: np.ndarray, faces: np.ndarray, uvs: np.ndarray) -> bpy.types.Mesh:
    """A smooth mesh with one UV map; vertices split at UV seams are welded, because a loop has its own UV in Blender."""
    welded, joined = weld(vertices, faces)
    is_folded = (joined[:, 0] == joined[:, 1]) | (joined[:, 1] == joined[:, 2]) | (joined[:, 2] == joined[:, 0])
    faces, joined = faces[~is_folded], joined[~is_folded]
    mesh = bpy.data.meshes.new(name)
    mesh.vertices.add(len(welded))
    mesh.vertices.foreach_set("co", np.ascontiguousarray(welded, np.float32).ravel())
    mesh.loops.add(3 * len(joined))
    mesh.loops.foreach_set("vertex_index", np.ascontiguousarray(joined, np.int32).ravel())
    mesh.polygons.add(len(joined))
    mesh.polygons.foreach_set("loop_start", np.arange(0, 3 * len(joined), 3, dtype=np.int32))
    layer = mesh.uv_layers.new(name="UVMap", do_init=False)
    layer.uv.foreach_set("vector", np.ascontiguousarray(uvs[faces.ravel()], np.float32).ravel())
    mesh.update(calc_edges=True)
    mesh.shade_smooth()
    return mesh


def weld(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge vertices at exactly the same place: the kept vertices, and the faces on them."""
    exact = np.ascontiguousarray(vertices, np.float32) + np.float32(0.0)
    keys = exact.view(np.uint32).astype(np.uint64)
    # One 64 bit key a vertex sorts several times faster than rows; keys that collide are told apart below.
    mixed = keys[:, 0] * np.uint64(0x9E3779B97F4A7C15) ^ keys[:, 1] * np.uint64(0xC2B2AE3D27D4EB4F)
    mixed ^= keys[:, 2] * np.uint64(0x165667B19E3779F9)
    _, first, inverse = np.unique(mixed, return_index=True, return_inverse=True)
    inverse = inverse.reshape(-1)
    if not np.array_equal(exact[first][inverse], exact):
        _, first, inverse = np.unique(exact, axis=0, return_index=True, return_inverse=True)
        inverse = inverse.reshape(-1)
    return np.asarray(vertices)[first], inverse[faces].astype(np.int32)


def make_texture(name: str, result: Result, png: bytes) -> bpy.types.Image:
    """The texture, packed: from its PNG file if it came along, else from the pixels."""
    height, width = result.texture.shape[:2]
    image = bpy.data.images.new(scene_tools.data_name(name), width, height, alpha=False)
    image.colorspace_settings.name = "sRGB"
    if png:
        image.pack(data=png, data_len=len(png))
        image.source = "FILE"
        return image
    rgb = np.frombuffer(result.texture.data, np.uint8).reshape(height, width, 3)[::-1]
    pixels = np.ones((height, width, 4), np.float32)
    np.multiply(rgb, np.float32(1 / 255), out=pixels[..., :3])
    image.pixels.foreach_set(pixels.ravel())
    image.pack()
    return image


def make_material(name: str, image: bpy.types.Image) -> bpy.types.Material:
    """Principled, with the texture as its base color."""
    material = bpy.data.materials.new(name)
    if bpy.app.version < (5, 0, 0):
        material.use_nodes = True
    nodes, links = material.node_tree.nodes, material.node_tree.links
    shader = next(node for node in nodes if node.type == "BSDF_PRINCIPLED")
    texture = nodes.new("ShaderNodeTexImage")
    texture.image, texture.location = image, (-320, 300)
    links.new(texture.outputs["Color"], shader.inputs["Base Color"])
    shader.inputs["Roughness"].default_value = 0.8
    nodes.active = texture
    return material


def _write_provenance(item: bpy.types.Object, job: Job, mapping: cm.Placement) -> None:
    notes = job.notes
    item["conrad_job"] = job.id
    item["conrad_result"] = job.result.result if job.result else 0
    item["conrad_seed"] = notes.seed
    item["conrad_preset"] = notes.preset
    item["conrad_picture"] = notes.picture
    item["conrad_config"] = job.config
    if notes.setup:
        # The camera that sees the object as the picture does, where it stands now.
        setup = dict(notes.setup)
        setup["c2w"] = mapping.pose(np.array(setup["c2w"])).tolist()
        setup["object_center"] = mapping.points(np.array(setup["object_center"])).tolist()
        setup["object_size"] = setup["object_size"] * mapping.scale
        setup["object_origin"] = list(item.location)
        item["conrad_camera"] = json.dumps(setup)


def _keep_aligned(job: Job, mapping: cm.Placement) -> None:
    """An own reference camera moves along with a result that was placed elsewhere, if it still is where it was."""
    item = bpy.data.objects.get(job.notes.camera) if job.notes.camera else None
    is_moved = mapping.scale != 1.0 or any(mapping.offset)
    if item is None or item.type != "CAMERA" or not (job.notes.is_own_camera and is_moved):
        return
    if np.allclose(camera.pose_of(item), np.array(job.notes.setup["c2w"]), atol=1e-5):
        camera.move_along(item, mapping)


def mark_asset(item: bpy.types.Object, job: Job) -> None:
    """Make the object an asset; its preview is the engine's picture, because Blender's own takes seconds to render."""
    item.asset_mark()
    item.asset_data.description = f"Made by ConRad from {job.notes.picture or job.name}"
    item.asset_data.author = "ConRad"
    for tag in ("ConRad", *job.notes.asset_tags.split(",")):
        if tag.strip():
            item.asset_data.tags.new(tag.strip(), skip_if_exists=True)
    pixels = decoded(job.thumbnail) if job.thumbnail else None
    if pixels is not None:
        preview = item.preview_ensure()
        preview.image_size = pixels.shape[1], pixels.shape[0]
        preview.image_pixels_float.foreach_set(pixels.ravel())


def decoded(png: bytes) -> np.ndarray | None:
    """(H, W, 4) float32, bottom row first, of a PNG file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.png"
        path.write_bytes(png)
        try:
            image = bpy.data.images.load(str(path))
        except RuntimeError:
            return None
        try:
            width, height = image.size
            pixels = np.empty(len(image.pixels), np.float32)
            image.pixels.foreach_get(pixels)
            channels = image.channels
        finally:
            bpy.data.images.remove(image)
    if not pixels.size:
        return None
    rgba = np.ones((height, width, 4), np.float32)
    rgba[..., :channels] = pixels.reshape(height, width, channels)
    return rgba
