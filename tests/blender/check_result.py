"""A real job with the embedded prior; its result, rendered by Workbench through the reference camera, covers the picture.

    PYTHON_WITH_BPY check_result.py ZIP ENGINE_PYTHON DATA_FOLDER PICTURE_WITH_ALPHA [CAMERA_JSON]

Writes render.png and difference.png beside the data folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import bpy
import numpy as np
from common import empty_scene, main, part, preferences, pump_until

MIN_IOU, MIN_PSNR_DB = 0.97, 28.0
TIME_LIMIT_S = 500
TOY = (
    "optimize.warm_start_views=2 optimize.warm_start_sampling=4 optimize.warm_start_steps=60 optimize.n_steps=5"
    " mesh.resolution=160 mesh.turntable_frames=2 mesh.turntable_size=64"
)
"""The whole pipeline at a size for tests: the front is the picture's, the back is whatever came of it."""


def pixels_of(path: Path) -> np.ndarray:
    """(H, W, 4) float, sRGB, row 0 on top."""
    image = bpy.data.images.load(str(path))
    values = np.empty(len(image.pixels), np.float32)
    image.pixels.foreach_get(values)
    return values.reshape(image.size[1], image.size[0], 4)[::-1]


def render(scene: bpy.types.Scene, path: Path) -> np.ndarray:
    """Unlit colors on transparency through the scene's camera."""
    scene.render.engine = "BLENDER_WORKBENCH"
    scene.display.shading.light, scene.display.shading.color_type = "FLAT", "TEXTURE"
    scene.display.render_aa = "8"
    scene.render.film_transparent = True
    scene.view_settings.view_transform = "Standard"
    scene.render.image_settings.file_format, scene.render.image_settings.color_mode = "PNG", "RGBA"
    scene.render.filepath = str(path)
    bpy.ops.render.render(write_still=True)
    return pixels_of(path)


def run() -> None:
    data, picture = Path(sys.argv[3]), Path(sys.argv[4])
    scene = empty_scene()
    preferences().engine_python, preferences().data_folder = sys.argv[2], str(data)
    preferences().device = "cpu"
    scene.conrad.image = bpy.data.images.load(str(picture))
    if len(sys.argv) > 5:
        setup = json.loads(Path(sys.argv[5]).read_text())
        reference = part("camera").from_setup(setup, scene.conrad.image, scene)
        scene.conrad.camera = reference
        bpy.ops.conrad.look_through()
    else:
        bpy.ops.conrad.add_camera()
    scene.conrad.preset, scene.conrad.extra = "draft", TOY
    assert bpy.ops.conrad.generate() == {"FINISHED"}
    session = part("link").session()
    [job] = session.table.jobs.values()
    pump_until(lambda: job.state is not None and job.state.state in ("done", "failed"), TIME_LIMIT_S)
    assert job.state.state == "done", job.status()
    pump_until(lambda: any(item.get("conrad_job") for item in bpy.data.objects))
    print("warnings:", job.state.warnings, "parts:", job.state.parts, "in", round(job.state.elapsed_s), "s")
    item = next(item for item in bpy.data.objects if item.get("conrad_job"))
    print("object:", [round(x, 3) for x in item.dimensions], len(item.data.polygons), "faces")
    ours, theirs = render(scene, data / "render.png"), pixels_of(picture)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    mask, wanted = ours[..., 3] > 0.5, theirs[..., 3] > 0.5
    iou = (mask & wanted).sum() / (mask | wanted).sum()
    inside = mask & wanted
    error = ((ours - theirs)[inside][:, :3] ** 2).mean()
    psnr = -10 * np.log10(error)
    print(f"through the reference camera: mask IoU {iou:.4f}, PSNR inside {psnr:.2f} dB")
    bpy.ops.wm.save_as_mainfile(filepath=str(data / "result.blend"))
    assert iou >= MIN_IOU and psnr >= MIN_PSNR_DB


if __name__ == "__main__":
    main(run)
