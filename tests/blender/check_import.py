"""Bringing results in: arrays to object in real bpy, from any mode, with excluded collections, with undo and assets."""

from __future__ import annotations

import json
import math
import time

import bpy
import numpy as np
from common import empty_scene, main, part

MAX_IMPORT_S = 1.0


def sphere(n_rows: int, n_columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vertices, faces and UVs of a UV sphere of radius 0.5, split along its seam as an unwrapped mesh is."""
    v, u = np.meshgrid(np.linspace(0, 1, n_rows + 1), np.linspace(0, 1, n_columns + 1), indexing="ij")
    level = np.sin(math.pi * v).round(7)
    turn = np.where(u == 1, 0, u) * 2 * math.pi
    vertices = 0.5 * np.stack([level * np.cos(turn), level * np.sin(turn), -np.cos(math.pi * v)], -1)
    index = np.arange((n_rows + 1) * (n_columns + 1)).reshape(n_rows + 1, n_columns + 1)
    a, b, c, d = index[:-1, :-1], index[:-1, 1:], index[1:, 1:], index[1:, :-1]
    faces = np.concatenate([np.stack([a, b, c], -1).reshape(-1, 3), np.stack([a, c, d], -1).reshape(-1, 3)])
    uvs = np.stack([u, v], -1).reshape(-1, 2)
    return vertices.reshape(-1, 3).astype("<f4"), faces.astype("<i4"), uvs.astype("<f4")


def result_of(job: str, rows: int = 16, columns: int = 32, texture_size: int = 64, change=None):  # noqa: ANN001, ANN201
    protocol, pictures = part("protocol"), part("pictures")
    vertices, faces, uvs = sphere(rows, columns)
    texture = np.zeros((texture_size, texture_size, 3), np.uint8)
    texture[: texture_size // 2] = (255, 0, 0)
    if change is not None:
        vertices, faces, uvs = change(vertices, faces, uvs)
    arrays = [pictures.array_of(a) for a in (vertices, faces, uvs, vertices * 2, texture)]
    return protocol.Result(job, 1, *arrays)


def job_of(name: str, **notes):  # noqa: ANN003, ANN201
    jobs = part("jobs")
    job = jobs.Job(jobs.Notes(name * 32, name, **notes))
    job.result = result_of(job.id)
    job.config = json.dumps({"seed": 3})
    return job


def check_object() -> None:
    importer = part("importer")
    scene = empty_scene()
    item = importer.import_result(job_of("a", place="ORIGIN", size=2.0, seed=3), scene)
    mesh = item.data
    assert mesh.validate() is False, "the mesh needed mending"
    assert len(mesh.vertices) == 15 * 32 + 2, "seams and poles are welded"
    assert all(p.use_smooth for p in mesh.polygons)
    assert np.allclose(item.scale, 1) and np.allclose(item.rotation_euler, 0) and np.allclose(item.location, 0)
    bpy.context.view_layer.update()
    assert math.isclose(max(item.dimensions), 2.0, rel_tol=1e-5)
    low = min((item.matrix_world @ v.co).z for v in mesh.vertices)
    assert abs(low) < 1e-5, "it stands on the ground"
    assert item.users_collection[0].name == "ConRad" and bpy.context.view_layer.objects.active == item
    assert item.select_get() and item["conrad_seed"] == 3 and json.loads(item["conrad_config"]) == {"seed": 3}
    material = mesh.materials[0]
    shader = next(n for n in material.node_tree.nodes if n.type == "BSDF_PRINCIPLED")
    image = shader.inputs["Base Color"].links[0].from_node.image
    assert image.packed_file is not None and image.colorspace_settings.name == "sRGB"
    assert np.allclose(image.pixels[-4:], (1, 0, 0, 1)) and np.allclose(image.pixels[:4], (0, 0, 0, 1))
    normal = mesh.polygons[0].normal.dot(mesh.polygons[0].center)
    assert normal > 0, "faces look outside"


def check_packed_png() -> None:
    """A texture that comes as a file is packed as it is."""
    importer = part("importer")
    scene = bpy.context.scene
    source = bpy.data.images.new("source", 8, 8)
    source.pixels.foreach_set(np.tile(np.float32([0, 1, 0, 1]), 64))
    source.pack()
    job = job_of("b", place="ORIGIN", size=1.0)
    job.texture = bytes(source.packed_file.data)
    item = importer.import_result(job, scene)
    image = next(n.image for n in item.data.materials[0].node_tree.nodes if n.type == "TEX_IMAGE")
    assert tuple(image.size) == (8, 8) and bytes(image.packed_file.data) == job.texture
    assert np.allclose(image.pixels[:4], (0, 1, 0, 1))


def check_modes_and_collections() -> None:
    importer = part("importer")
    scene = empty_scene()
    bpy.ops.mesh.primitive_cube_add()
    for mode in ("EDIT", "SCULPT", "TEXTURE_PAINT", "OBJECT"):
        bpy.ops.object.mode_set(mode=mode)
        importer.import_result(job_of("c"), scene)
        assert bpy.context.mode.startswith(mode.split("_")[-1]) or mode == "TEXTURE_PAINT", bpy.context.mode
        if mode != "OBJECT":
            assert bpy.context.view_layer.objects.active.name == "Cube", "the user's work is left alone"
            bpy.ops.object.mode_set(mode="OBJECT")
    layer = bpy.context.view_layer.layer_collection.children["ConRad"]
    layer.exclude = True
    item = importer.import_result(job_of("d"), scene)
    assert item.name in bpy.context.view_layer.objects, "an excluded collection does not swallow the result"
    assert item.users_collection[0] == scene.collection
    layer.exclude = False
    layer.hide_viewport = True
    assert importer.import_result(job_of("e"), scene).visible_get()


def check_damage() -> None:
    """Arrays that would crash Blender are refused."""
    importer = part("importer")
    scene = empty_scene()

    def with_bad_index(v, f, u):  # noqa: ANN001, ANN202
        f = f.copy()
        f[3, 1] = len(v)
        return v, f, u

    def with_nan(v, f, u):  # noqa: ANN001, ANN202
        v = v.copy()
        v[7] = np.nan
        return v, f, u

    for change in (with_bad_index, with_nan, lambda v, f, u: (v, f[:0], u), lambda v, f, u: (v, f, u[:-1])):
        job = job_of("f")
        job.result = result_of(job.id, change=change)
        n_objects = len(bpy.data.objects)
        try:
            importer.import_result(job, scene)
        except importer.CannotImport as error:
            print("refused:", error)
        else:
            raise AssertionError("damaged arrays were imported")
        assert len(bpy.data.objects) == n_objects


def check_asset() -> None:
    importer = part("importer")
    scene = empty_scene()
    job = job_of("g", is_asset=True, asset_tags="chair, red")
    picture = bpy.data.images.new("thumbnail", 64, 48)
    picture.pixels.foreach_set(np.tile(np.float32([0, 0, 1, 1]), 64 * 48))
    picture.pack()
    job.thumbnail = bytes(picture.packed_file.data)
    item = importer.import_result(job, scene)
    assert {tag.name for tag in item.asset_data.tags} == {"ConRad", "chair", "red"}
    assert tuple(item.preview.image_size) == (64, 48)
    assert np.allclose(item.preview.image_pixels_float[:4], (0, 0, 1, 1), atol=0.01)


def check_alignment() -> None:
    """Placed elsewhere, the own reference camera goes along and still covers the picture."""
    importer, camera, cm, requests = part("importer"), part("camera"), part("camera_math"), part("requests")
    scene = empty_scene()
    scene.conrad.image = bpy.data.images.new("picture", 400, 300)
    bpy.ops.conrad.add_camera()
    reference = scene.conrad.camera
    before = camera.job_setup(reference, scene.conrad.image)
    vertices = sphere(16, 32)[0].astype(np.float64)
    seen = cm.project(vertices, np.array(before["c2w"]), tuple(before["intrinsics"]))[0]
    scene.cursor.location = (3, 2, 1)
    scene.conrad.place, scene.conrad.size = "CURSOR", 0.3
    notes = requests.notes_of(scene.conrad, scene, "generate")
    jobs = part("jobs")
    job = jobs.Job(notes)
    job.result = result_of(job.id)
    item = importer.import_result(job, scene)
    assert np.allclose(item.location, (3, 2, 1))
    bpy.context.view_layer.update()
    after = camera.job_setup(reference, scene.conrad.image)
    moved = np.array([item.matrix_world @ v.co for v in item.data.vertices])
    found = cm.project(moved, np.array(after["c2w"]), tuple(after["intrinsics"]))[0]
    distance = np.linalg.norm(found[:, None] - seen[None], axis=2).min(1).max()
    assert distance < 0.02, f"{distance} px off"
    # The object's own record of its camera says the same, also after it was moved by hand.
    item.location.x += 5
    bpy.context.view_layer.update()
    bpy.context.view_layer.objects.active = item
    assert bpy.ops.conrad.camera_of_result() == {"FINISHED"}
    added = bpy.data.objects["ConRad Reference.001"]
    moved += [5, 0, 0]
    found = cm.project(moved, camera.pose_of(added), tuple(after["intrinsics"]))[0]
    assert np.linalg.norm(found[:, None] - seen[None], axis=2).min(1).max() < 0.02


def check_speed() -> None:
    """500k triangles with a 2048 texture; the worst way (pixels, not a file) too."""
    importer = part("importer")
    scene = empty_scene()
    job = job_of("h", place="ORIGIN", size=1.0)
    job.result = result_of(job.id, rows=500, columns=500, texture_size=2048)
    for png in (b"", None):
        if png is None:
            image = bpy.data.images[job.name]
            job.texture = bytes(image.packed_file.data)
        started = time.perf_counter()
        item = importer.import_result(job, scene)
        seconds = time.perf_counter() - started
        way = "file" if job.texture else "pixels"
        print(f"import of {len(item.data.polygons)} triangles, texture as {way}: {seconds:.2f} s")


def run() -> None:
    check_object()
    check_packed_png()
    check_modes_and_collections()
    check_damage()
    check_asset()
    check_alignment()
    check_speed()


main(run)
