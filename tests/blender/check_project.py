"""Project Picture with the real pipeline: the mesh keeps its shape, its front is the picture.

PYTHON_WITH_BPY check_project.py ZIP ENGINE_PYTHON DATA_FOLDER PICTURE_WITH_ALPHA CAMERA_JSON
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import bpy
import numpy as np
from check_result import pixels_of, render
from common import empty_scene, main, part, preferences, pump_until

MIN_PSNR_DB = 25.0


def run() -> None:
    data, picture = Path(sys.argv[3]), Path(sys.argv[4])
    scene = empty_scene()
    preferences().engine_python, preferences().data_folder = sys.argv[2], str(data)
    preferences().device = "cpu"
    scene.conrad.image = bpy.data.images.load(str(picture))
    scene.conrad.camera = part("camera").from_setup(
        json.loads(Path(sys.argv[5]).read_text()), scene.conrad.image, scene
    )
    bpy.ops.conrad.look_through()
    proxy = scene.conrad.camera.conrad.proxy
    bpy.ops.mesh.primitive_uv_sphere_add(
        segments=48, ring_count=24, radius=0.5 * proxy.scale.x, location=proxy.location
    )
    ball = bpy.context.active_object
    ball.name = "Ball"
    scene.conrad.preset, scene.conrad.extra = "draft", "mesh.turntable_frames=2 mesh.turntable_size=64"
    assert bpy.ops.conrad.project() == {"FINISHED"}
    [job] = part("link").session().table.jobs.values()
    pump_until(lambda: job.state is not None and job.state.state in ("done", "failed"), 300)
    assert job.state.state == "done", job.status()
    pump_until(lambda: any(item.get("conrad_job") for item in bpy.data.objects))
    made = next(item for item in bpy.data.objects if item.get("conrad_job"))
    assert ball.hide_get(), "the textured copy is seen instead of the mesh"
    bpy.context.view_layer.update()
    # A textured copy of the same shape, as triangles.
    n_triangles = sum(len(p.vertices) - 2 for p in ball.data.polygons)
    assert len(made.data.polygons) == n_triangles, (len(made.data.polygons), n_triangles)
    wanted = np.array([ball.matrix_world @ v.co for v in ball.data.vertices])
    found = np.array([made.matrix_world @ v.co for v in made.data.vertices])
    distance = np.linalg.norm(found[:, None] - wanted[None], axis=2).min(1).max()
    print(f"largest distance between the vertices {distance:.2e}")
    assert distance < 1e-4 * proxy.scale.x
    ball.hide_render = True
    ours, theirs = render(scene, data / "render.png"), pixels_of(picture)
    # Inside both outlines, away from their rims.
    inside = (ours[..., 3] > 0.99) & (theirs[..., 3] > 0.99)
    for axis in (0, 1):
        for step in (-12, 12):
            inside &= np.roll(inside, step, axis)
    psnr = -10 * np.log10(((ours - theirs)[inside][:, :3] ** 2).mean())
    print(f"{inside.sum()} pixels compared: PSNR {psnr:.2f} dB")
    assert inside.sum() > 1000 and psnr >= MIN_PSNR_DB


if __name__ == "__main__":
    main(run)
