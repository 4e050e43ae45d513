"""What differs where there are only words and no picture: no silhouette to fit, no photo to paint, nothing to measure against.

DreamFusion (arXiv:2209.14988): a text-to-image prior looks from all around, and nothing else says what the object is.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from .cameras import CameraSetup, Similarity, orbit_camera
from .config import HALF_FRAME, PictureConfig, PipelineConfig, StableDiffusionConfig
from .errors import InputError
from .evaluation.geometry import topology
from .files import write_json
from .finish import Finished, surface_color, view_pixel, write_other_files
from .mesh.bake import bake_texture
from .mesh.clean import clean_mesh
from .mesh.extract import extract_mesh
from .mesh.glb import write_glb, write_texture
from .mesh.mesh import TexturedMesh
from .mesh.raster import render_mesh
from .mesh.unwrap import unwrap
from .monitor import Monitor, Progress
from .optimize import memory_bytes
from .preprocess.framing import Frame, final_similarity
from .preview import on_color, sheet_cameras, to_bytes, turntable_cameras, write_turntable
from .state import State

PICTURE_SIZE = 256
SHEET_COLUMNS = 4


def check_words(config: PipelineConfig) -> None:
    """Make sure that words alone can be enough.

    Raises:
        InputError: There are none, or a setting asks for a picture.
    """
    if not config.prompt.strip():
        raise InputError("an object from words alone needs a prompt: say with --prompt what it is")
    guidance = config.guidance
    if not isinstance(guidance, StableDiffusionConfig):
        raise InputError("only Stable Diffusion reads words alone: use --guidance stable_diffusion")
    if guidance.ip_adapter or guidance.word_steps:
        raise InputError("guidance.ip_adapter and guidance.word_steps ask for a picture, and there are only words")
    if config.optimize.warm_start_views or config.mesh.project_only or config.clip.is_used:
        raise InputError(
            "optimize.warm_start_views, mesh.project_only and clip.weight ask for a picture, and there are only words"
        )


def frame_of_words(config: PictureConfig) -> Frame:
    """An object frame without a picture: only the angle of view and what is the front."""
    fov_rad = math.radians(config.fov_deg)
    distance = HALF_FRAME / math.tan(fov_rad / 2)
    camera = orbit_camera(0.0, math.radians(config.elevation_deg), distance, fov_rad, PICTURE_SIZE)
    camera = camera.to(dtype=torch.float64)
    return Frame(camera, Similarity.identity(), camera, has_camera=False, is_centered=False, object_size=None)


def finish_words(
    state: State, frame: Frame, config: PipelineConfig, folder: Path, name: str, monitor: Monitor
) -> Finished:
    """`finish.finish` without a picture: the field's own surface and colors.

    Raises:
        MeshError: The field has no surface.
        InputError: A file cannot be written.
    """

    def at(step: int) -> None:
        monitor.progress(Progress("mesh", step, 3, None, {}, memory_bytes(state.device)))

    at(0)
    state.field.prepare()
    extracted = extract_mesh(state.field.density, state.field.aabb, config.mesh, [])
    mesh = clean_mesh(extracted.mesh, config.mesh, pixel=view_pixel(state, config))
    at(1)
    textured = bake_texture(
        unwrap(mesh, config.mesh), lambda p: surface_color(state.field, p.to(state.device)).cpu(), [], config.mesh
    )
    to_world = final_similarity(frame, textured.vertices)
    vertices = to_world.points(torch.from_numpy(textured.vertices).double())
    textured = replace(textured, vertices=vertices.float().numpy())
    at(2)
    write_glb(textured, folder / "mesh.glb", name)
    write_other_files(textured, folder, name)
    low, high = vertices.amin(0), vertices.amax(0)
    setup = CameraSetup(to_world.camera(frame.camera), (low + high) / 2, float((high - low).max()))
    write_json(folder / "camera.json", setup.to_json())
    _write_pictures(textured, config, folder)
    return Finished(textured, setup, {"level": extracted.level, **topology(textured.vertices, textured.faces)})


def _write_pictures(mesh: TexturedMesh, config: PipelineConfig, folder: Path) -> None:
    """Eight views, one of them alone, and the turntable."""
    views = [render_mesh(mesh, camera, supersample=2) for camera in sheet_cameras(mesh.vertices)]
    tiles = [to_bytes(on_color(view)) for view in views]
    rows = [np.concatenate(tiles[k : k + SHEET_COLUMNS], 1) for k in range(0, len(tiles), SHEET_COLUMNS)]
    write_texture(np.concatenate(rows), folder / "sheet.png")
    write_texture(to_bytes(views[1]), folder / "thumbnail.png")
    if config.mesh.turntable_frames:
        cameras = turntable_cameras(mesh.vertices, config.mesh.turntable_frames, config.mesh.turntable_size)
        write_turntable([render_mesh(mesh, camera, supersample=1) for camera in cameras], folder / "turntable.gif")
