"""The last part of a job: from the optimised field to a textured mesh, its files, its measures and something to look at."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event

import numpy as np
import torch
from jaxtyping import Float

from .cameras import Camera, CameraSetup, Similarity, orbit_angles
from .config import MeshConfig, PipelineConfig
from .constraint import ConstrainedField, ReferenceView
from .errors import Cancelled, InputError
from .evaluation import metrics as measure
from .evaluation.geometry import topology
from .files import write_json
from .guidance.embedded.detail import DetailModel
from .guidance.interfaces import ReferencePicture
from .mesh.bake import Photo, bake_texture
from .mesh.clean import clean_mesh
from .mesh.extract import SurfaceView, extract_mesh
from .mesh.glb import write_glb, write_obj, write_ply, write_texture
from .mesh.mesh import Mesh, TexturedMesh
from .mesh.raster import render_mesh, render_surface, render_with_depth
from .mesh.unwrap import unwrap
from .monitor import Command, Monitor, Progress
from .optimize import memory_bytes
from .preprocess.framing import Frame, condition_picture, final_similarity
from .preprocess.prepare import PreparedPicture
from .preview import SheetData, make_sheet, sheet_cameras, turntable_cameras, write_turntable
from .redraw import redraw_texture
from .rendering.interfaces import Field
from .rendering.renderer import Picture, render_picture
from .state import State, n_coarse_steps
from .symmetry import mirrored_view

MEASURED_PICTURE, FIELD_PICTURE = 1024, 512
"""Most pixels along the longer side at which mesh and field are compared with the picture; a smaller one is at its own size."""
FIELD_SAMPLES = 192
FIELD_POINTS = 1 << 20
"""Points of the field evaluated at once, while the mesh takes memory as well."""
BACK_PICTURE = 256
COLOR_REACH = 0.02
"""Distance of the neighbors whose colors are averaged, object frame: about a cell of the field."""
N_YAWS = 16
"""Boxes whose middles make an object's where it is not known which way it faces."""
COLOR_OFFSETS = [(float(x), float(y), float(z)) for x in (-1, 0, 1) for y in (-1, 0, 1) for z in (-1, 0, 1)]


@dataclass(frozen=True)
class Finished:
    mesh: TexturedMesh
    """In the world of the camera file."""
    setup: CameraSetup
    """The reference camera and the object there."""
    metrics: dict


def finish(
    state: State,
    full: ConstrainedField,
    view: ReferenceView,
    initial: Mesh | None,
    prepared: PreparedPicture,
    frame: Frame,
    config: PipelineConfig,
    folder: Path,
    name: str,
    monitor: Monitor,
) -> Finished:
    """Make the mesh of the current state and write everything of a result but `config.json` and `checkpoint.pt`.

    Args:
        full: The field with the full-size picture.
        initial: The user's start mesh in the object frame, textured as it is if `mesh.project_only` asks for it.

    Raises:
        MeshError: The field has no surface.
        GuidanceError: The detail model's weights are missing or damaged.
        InputError: A file cannot be written.
        Cancelled: The monitor asked for it.
    """
    device = state.field.aabb.device
    n_views = config.mesh.detail_views if has_detail_stage(full, config.mesh) else 0
    steps = _Steps(n_views, device, monitor)
    measured, seen = view.resized(MEASURED_PICTURE), view.resized(FIELD_PICTURE)
    with ThreadPoolExecutor(torch.get_num_threads()) as threads, _set_on_error(Event()) as is_stopped:
        # Much of what follows keeps a single core busy; meanwhile the others do what does not wait for it.
        model = threads.submit(DetailModel, device, config.mesh.detail_weights) if n_views else None
        show_field = partial(threads.submit, render_field, state, full, seen, config, is_stopped)
        # On a GPU it is short and only takes turns with what leads to the GLB.
        field_pictures = show_field() if device.type == "cpu" else None
        textured, level = make_textured(state, full, view, initial, prepared, frame, config, model, steps)
        steps.begin("files")
        to_world = final_similarity(frame, textured.vertices)
        setup = _world_setup(frame, to_world, textured.vertices)
        moved = _moved(textured, to_world)
        write_glb(moved, folder / "mesh.glb", name)  # before anything competes with it: it is what is waited for
        field_pictures = field_pictures or show_field()
        files = threads.submit(write_other_files, moved, folder, name)
        drawing = start_drawing(threads, moved, setup, frame, seen.camera, config.mesh, folder)
        write_json(folder / "camera.json", setup.to_json())
        back = threads.submit(back_measures, textured, view)
        shape = threads.submit(topology, textured.vertices, textured.faces)
        trained, field_picture = field_pictures.result()
        numbers = {
            "level": level,
            **({} if state.plane is None else {"plane_deg": math.degrees(state.plane)}),
            **reference_measures(state, measured, seen, trained, field_picture, textured),
            **back.result(),
            **shape.result(),
        }
        files.result()
        steps.begin("pictures")
        write_pictures(drawing, prepared, view, frame, field_picture, numbers, folder, name)
    numbers["seconds_of_finish"] = steps.seconds()
    return Finished(moved, setup, numbers)


class _Steps:
    """Tells the monitor which step has begun, and when each part did."""

    def __init__(self, n_views: int, device: torch.device, monitor: Monitor) -> None:
        self.names = ["surface", "texture", *(f"view {index}" for index in range(n_views)), "files", "pictures"]
        self.device, self.monitor = device, monitor
        self.began: dict[str, float] = {}

    def begin(self, name: str) -> None:
        self.began.setdefault("detail" if name.startswith("view") else name, time.monotonic())
        done = self.names.index(name), len(self.names)
        self.monitor.progress(Progress("mesh", *done, None, {}, memory_bytes(self.device)))

    def begin_stoppable(self, name: str) -> None:
        self.begin(name)
        if self.monitor.command() is Command.CANCEL:
            raise Cancelled("cancelled while the mesh was made")

    def seconds(self) -> dict[str, float]:
        """Of each part, the last one until now; all views are one part."""
        ends = [*self.began.values(), time.monotonic()][1:]
        return {part: round(end - start, 2) for (part, start), end in zip(self.began.items(), ends)}


def make_textured(
    state: State,
    full: ConstrainedField,
    view: ReferenceView,
    initial: Mesh | None,
    prepared: PreparedPicture,
    frame: Frame,
    config: PipelineConfig,
    model: Future[DetailModel] | None,
    steps: _Steps,
) -> tuple[TexturedMesh, float]:
    """The textured mesh in the object frame, and the density that its surface was taken at.

    Args:
        model: Draws detail on the texture at the end.
    """
    photos = photos_of(view, state.plane)
    steps.begin_stoppable("surface")
    has_depth = initial is not None or (prepared.depth is not None and prepared.depth_kind == "metric")
    may_move = config.mesh.centered and not has_depth
    mesh, level = surface_mesh(full, view, initial, config.mesh, may_move, view_pixel(state, config))
    steps.begin_stoppable("texture")
    textured = texture_mesh(full, photos, mesh, config.mesh)
    # Where a mirrored picture had a say, the surface is as deep as the two views tell.
    if may_move and state.plane is None:
        azimuth = state.world_azimuth if config.optimize.axis_aligned else None
        textured = centered(textured, frame.camera, azimuth)
    if model is not None:
        on_view = lambda index: steps.begin_stoppable(f"view {index}")  # noqa: E731
        textured = with_detail(textured, photos, prepared, frame, config, model.result(), on_view)
    return textured, level


@contextmanager
def _set_on_error(event: Event) -> Iterator[Event]:
    """Tells threads that nobody waits for what they do any more."""
    try:
        yield event
    except BaseException:
        event.set()
        raise


def view_pixel(state: State, config: PipelineConfig) -> float:
    """Side of a pixel, at the origin, of the finest views that formed the field: what is smaller it has by chance."""
    had_fine = config.optimize.fine_steps > 0 and state.step > n_coarse_steps(config)
    return state.pixel(config.render.fine_size if had_fine else config.render.size)


def surface_mesh(
    full: ConstrainedField, view: ReferenceView, initial: Mesh | None, config: MeshConfig, may_move: bool, pixel: float
) -> tuple[Mesh, float]:
    """The cleaned surface in the object frame, and the density it was taken at.

    Args:
        may_move: Whether parts may change their depth; see `mesh.bridge`.
        pixel: See `view_pixel`.
    """
    if config.project_only:
        if initial is None:
            raise InputError("mesh.project_only puts the picture on a mesh: give one with --init")
        return initial, 0.0
    surface = full.views[0].surface[0, 0]
    distances = torch.where(surface.isfinite() & (surface > 0), surface, torch.nan)
    seen = SurfaceView(view.camera, view.mask[0].numpy(), distances.cpu().numpy())
    # The shell of an inferred surface is a blocky skin, there for its color; `extract_mesh` closes the outline itself.
    density = full.density if full.config.kind == "known_depth" else full.field.density
    extracted = extract_mesh(density, full.aabb, config, [seen], may_move)
    return clean_mesh(extracted.mesh, config, [seen], pixel), extracted.level


def texture_mesh(full: ConstrainedField, photos: list[Photo], mesh: Mesh, config: MeshConfig) -> TexturedMesh:
    """The mesh with charts, colored by the photos where they see and by the field where they do not."""
    picture = photos[0]
    mean = torch.from_numpy((picture.rgb * picture.mask[..., None]).sum((0, 1)) / picture.mask.sum())

    def color(positions: torch.Tensor) -> torch.Tensor:
        if config.project_only:  # there is no optimised field; what the picture does not show takes its mean
            return mean.expand(len(positions), 3)
        return surface_color(full, positions.to(full.aabb)).cpu()

    # Systems that know the picture only by a loss bake what their field has become; so does the comparison with them.
    is_baked = full.config.kind == "loss" and not config.project_only
    return bake_texture(unwrap(mesh, config), color, [] if is_baked else photos, config)


def photos_of(view: ReferenceView, plane: float | None) -> list[Photo]:
    """The picture, and in the mirror of a symmetric object what it does not show."""
    views = [view] if plane is None else [view, mirrored_view(view, plane)]
    return [
        Photo(seen.camera, seen.rgb.permute(1, 2, 0).numpy(), seen.mask[0].numpy(), is_filler=seen is not view)
        for seen in views
    ]


def centered(mesh: TexturedMesh, camera: Camera, world_azimuth_rad: float | None = None) -> TexturedMesh:
    """The mesh in the object frame, scaled from the reference camera until its middle is as deep as the origin.

    The picture is the same from there whatever the scale, so it says nothing of how far away its object is; the user's object
    center does, and the prior, whose views are all of things around the origin, is not always held to it by what it drew.

    Args:
        world_azimuth_rad: See `upright_middle`.
    """
    camera = camera.to("cpu", torch.float64)
    points = torch.from_numpy(np.stack([upright_middle(mesh.vertices, world_azimuth_rad), np.zeros(3)]))
    middle, origin = camera.project(points)[1].tolist()
    position = camera.positions.numpy()
    vertices = position + (mesh.vertices - position) * (origin / middle)
    return replace(mesh, vertices=vertices.astype(np.float32))


def upright_middle(
    vertices: Float[np.ndarray, "n 3"], world_azimuth_rad: float | None = None
) -> Float[np.ndarray, "3"]:
    """The middle of the vertices' upright bounding box, float64.

    Args:
        world_azimuth_rad: Of one of the box's level axes; None takes the mean of the boxes of all directions.
    """
    yaws = np.arange(N_YAWS) * (math.pi / 2 / N_YAWS) if world_azimuth_rad is None else np.array([world_azimuth_rad])
    axes = np.stack([np.stack([np.cos(yaws), np.sin(yaws)], 1), np.stack([-np.sin(yaws), np.cos(yaws)], 1)], 1)
    along = vertices[:, :2].astype(np.float64) @ axes.reshape(-1, 2).T
    middles = ((along.min(0) + along.max(0)) / 2).reshape(len(yaws), 2)
    level = (vertices[:, 2].min() + vertices[:, 2].max()) / 2
    return np.array([*np.einsum("yk,ykc->yc", middles, axes).mean(0), level])


def has_detail_stage(full: ConstrainedField, config: MeshConfig) -> bool:
    if config.project_only or full.config.kind == "loss":
        return False
    return config.detail_views > 0


def with_detail(
    mesh: TexturedMesh,
    photos: list[Photo],
    prepared: PreparedPicture,
    frame: Frame,
    config: PipelineConfig,
    model: DetailModel,
    on_view: Callable[[int], None],
) -> TexturedMesh:
    """The mesh in the object frame with detail drawn where the picture does not show it; see `redraw`."""
    picture = condition_picture(prepared.rgb, prepared.mask, frame)
    reference = ReferencePicture(picture, frame.condition.to(dtype=torch.float32))
    return redraw_texture(mesh, photos, reference, config.mesh, model, config.seed, on_view)


@torch.no_grad()
def surface_color(field: Field, positions: torch.Tensor) -> torch.Tensor:
    """The color (n, 3) that rays see at surface points: averaged by density over the points and their neighborhood.

    A view composites the colors of a layer some cells deep, so the color of one point alone is noisier than any view of it.
    """
    offsets = torch.tensor(COLOR_OFFSETS, device=positions.device) * COLOR_REACH
    total, weights = torch.zeros_like(positions), torch.zeros_like(positions[:, :1])
    for offset in offsets:
        density, color = field.density_and_color(positions + offset)
        weight = 1 - torch.exp(-density[:, None] * COLOR_REACH) + 1e-4
        total, weights = total + weight * color, weights + weight
    return total / weights


def _moved(mesh: TexturedMesh, to_world: Similarity) -> TexturedMesh:
    vertices = to_world.points(torch.from_numpy(mesh.vertices).double()).float().numpy()
    normals = (mesh.normals @ to_world.rotation.numpy().T).astype(np.float32)
    return replace(mesh, vertices=vertices, normals=normals)


def _world_setup(frame: Frame, to_world: Similarity, vertices: np.ndarray) -> CameraSetup:
    """The reference camera in the mesh's world, with the box of the mesh as its object."""
    points = to_world.points(torch.from_numpy(vertices).double())
    low, high = points.amin(0), points.amax(0)
    return CameraSetup(to_world.camera(frame.camera), (low + high) / 2, float((high - low).max()))


def render_field(
    state: State, full: ConstrainedField, seen: ReferenceView, config: PipelineConfig, is_stopped: Event
) -> tuple[Picture, Picture]:
    """The field from the reference camera, constrained by the picture at the size of training and at that of `seen`.

    Raises:
        Cancelled: `is_stopped` was set meanwhile.
    """

    def check() -> None:
        if is_stopped.is_set():
            raise Cancelled("nobody waits for the field's pictures")

    device = state.field.aabb.device
    settings = FIELD_SAMPLES, state.occupancy, min(FIELD_POINTS, config.render.max_points)
    camera = state.constrained.views[0].picture.to(device).camera
    trained = render_picture(state.constrained.sharp(), camera, *settings, on_chunk=check)
    shown = full.with_pictures([seen])
    return trained, render_picture(shown, seen.to(device).camera, *settings, on_chunk=check)


def reference_measures(
    state: State,
    measured: ReferenceView,
    seen: ReferenceView,
    trained: Picture,
    field_picture: Picture,
    mesh: TexturedMesh,
) -> dict[str, float]:
    """How exactly field and mesh show the picture, seen from its own camera, inside the mask.

    Args:
        measured: The picture at the size at which the mesh is compared.
        seen, trained, field_picture: See `render_field`.
    """
    training = state.constrained.views[0].picture
    numbers = {}
    for name, shown, picture in (("training", training, trained), ("full", seen, field_picture)):
        inside = measure.solid_pixels(shown.mask[0].cpu().numpy())
        wanted = shown.rgb.permute(1, 2, 0).cpu().numpy()
        numbers[f"field_psnr_{name}"] = measure.psnr(picture.on(0.0).cpu().numpy(), wanted, inside)
        numbers[f"field_opacity_{name}"] = float(picture.opacities.cpu().numpy()[inside].mean())
    # An odd number, so that half coverage is the pixel's center.
    rendered = render_mesh(mesh, measured.camera, supersample=3)
    mask = measured.mask[0].numpy() > 0.5
    ours = rendered[..., 3] > 0.5
    wanted = measured.rgb.permute(1, 2, 0).numpy()
    inside = measure.solid_pixels(measured.mask[0].numpy())
    numbers["mesh_psnr"] = measure.psnr(rendered[..., :3] * rendered[..., 3:], wanted, inside)
    numbers["mesh_psnr_common"] = measure.psnr(rendered[..., :3], wanted, mask & ours)
    numbers["mesh_iou"] = measure.mask_iou(ours, mask)
    return numbers


def back_measures(mesh: TexturedMesh, view: ReferenceView) -> dict[str, float | None]:
    """Whether the picture was printed through the object onto its far side."""
    seen = view.resized(BACK_PICTURE)
    center = (mesh.vertices.min(0) + mesh.vertices.max(0)) / 2
    back = measure.back_camera(seen.camera, center)
    rendered, z_depths = render_with_depth(mesh, back, supersample=1)
    picture = torch.cat([seen.rgb, seen.mask]).permute(1, 2, 0).numpy()
    return measure.print_through(rendered, measure.printed_through(picture, seen.camera, back, z_depths))


def write_other_files(mesh: TexturedMesh, folder: Path, name: str) -> None:
    """The mesh in other forms than GLB, and its texture alone."""
    write_obj(mesh, folder / "mesh.obj", name)
    write_ply(mesh, folder / "mesh.ply")
    write_texture(mesh.texture, folder / "texture.png")


@dataclass(frozen=True)
class Drawing:
    """Pictures of the mesh that threads are at work on: numpy and Pillow let each other run."""

    views: list[Future[np.ndarray]]
    """From `preview.sheet_cameras`."""
    reference: Future[np.ndarray]
    """From the reference camera."""
    surface: Future[np.ndarray]
    """Without texture, from the second of these cameras."""
    turntable: Future[None]
    """Its file."""


def start_drawing(
    threads: ThreadPoolExecutor,
    mesh: TexturedMesh,
    setup: CameraSetup,
    frame: Frame,
    reference: Camera,
    config: MeshConfig,
    folder: Path,
) -> Drawing:
    """Let threads draw the mesh in its world.

    Args:
        reference: The reference camera in the object frame, of the size to draw.
    """
    azimuth_rad, _, _ = orbit_angles(setup.camera.positions - setup.object_center)
    start_deg = math.degrees(float(azimuth_rad))
    world_view = replace(reference, c2w=_world_camera(setup, frame, reference))
    cameras = [world_view, *sheet_cameras(mesh.vertices, start_deg=start_deg)]
    first, *views = [threads.submit(render_mesh, mesh, camera, 2) for camera in cameras]
    surface = threads.submit(render_surface, mesh, cameras[2])
    cameras = turntable_cameras(mesh.vertices, config.turntable_frames, config.turntable_size, start_deg=start_deg)
    frames = [threads.submit(render_mesh, mesh, camera, 1) for camera in cameras]

    def finish_turntable() -> None:
        if frames:
            write_turntable([frame.result() for frame in frames], folder / "turntable.gif")

    return Drawing(views, first, surface, threads.submit(finish_turntable))


def write_pictures(
    drawing: Drawing,
    prepared: PreparedPicture,
    view: ReferenceView,
    frame: Frame,
    field_picture: Picture,
    numbers: dict,
    folder: Path,
    name: str,
) -> None:
    """The sheet and its thumbnail, and the end of the turntable."""
    window = _window(frame.camera, view.camera)
    opacity = field_picture.opacities.cpu().numpy()[..., None]
    field_view = np.concatenate([(field_picture.rgb.cpu().numpy() / np.maximum(opacity, 1e-3)).clip(0, 1), opacity], -1)
    data = SheetData(
        picture=prepared.original[window].astype(np.float32) / 255,
        mask=prepared.mask[window],
        views=[picture.result() for picture in drawing.views],
        field_view=field_view,
        mesh_view=drawing.reference.result(),
        depth=(field_picture.depths * (field_picture.opacities > 0.5)).cpu().numpy(),
        surface=drawing.surface.result(),
        numbers={
            "field PSNR": f"{numbers['field_psnr_full']:.1f} dB",
            "mesh PSNR": f"{numbers['mesh_psnr']:.1f} dB",
            "mask IoU": f"{numbers['mesh_iou']:.3f}",
            "faces": f"{numbers['n_faces']:,}",
            "parts": str(numbers["components"]),
            "print-through": "plain" if numbers["print_through"] is None else f"{numbers['print_through']:.2f}",
        },
        title=name,
    )
    write_texture((data.views[1].clip(0, 1) * 255).round().astype(np.uint8), folder / "thumbnail.png")
    make_sheet(data, folder / "sheet.png")
    drawing.turntable.result()


def _window(whole: Camera, part: Camera) -> tuple[slice, slice]:
    """Rows and columns of the picture that a cropped camera shows."""
    left, top = (whole.intrinsics[2:] - part.intrinsics[2:].double()).round().long().tolist()
    return slice(top, top + part.height), slice(left, left + part.width)


def _world_camera(setup: CameraSetup, frame: Frame, camera: Camera) -> torch.Tensor:
    """The pose of a crop of the reference camera in the mesh's world: the reference's own."""
    assert torch.allclose(frame.camera.c2w.float(), camera.c2w.float(), atol=1e-5)
    return setup.camera.c2w.float()
