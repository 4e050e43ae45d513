"""One job: a picture in, a textured object out. Progress leaves through a `Monitor`; results lie in one folder.

mesh.glb mesh.obj (+ mtl) mesh.ply texture.png   the object, in the world of the camera file
sheet.png turntable.gif                          to look at
config.json camera.json metrics.json log.txt     what was asked, where the camera stands, how good it is, what happened
checkpoint.pt                                    to go on from
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread

import numpy as np
import torch

from . import __version__
from .cameras import Camera, CameraSetup, Similarity
from .checkpoint import FILE_NAME, fingerprint, load_checkpoint, save_checkpoint
from .config import (
    HALF_BOX,
    REFERENCE_EXTENT,
    EmbeddedPriorConfig,
    MixtureConfig,
    PipelineConfig,
    StableDiffusionConfig,
    to_json,
)
from .constraint import ConstrainedField, ReferenceView, reference_view
from .device import resolve_device, set_threads, wake
from .elevation import ElevationGuess, guess_elevation
from .elevation import elevation_of_picture as elevation_of_picture  # a question that workers pass on to us
from .errors import Cancelled, InputError
from .fields.radiance_field import make_field
from .files import BackgroundWriter, make_folder, write_json
from .finish import Finished, finish
from .guidance import check_priors, import_libraries, make_guidance, make_likeness
from .guidance.embedded.prior import EmbeddedPrior
from .guidance.interfaces import Priors, ReferencePicture, ViewSampler
from .mesh.glb import load_mesh, load_writer
from .mesh.mesh import Mesh
from .mesh.occupancy import signed_distance_grid
from .model_files import import_hub
from .monitor import Command, Monitor, Progress
from .optimize import memory_bytes, optimize
from .preprocess.framing import Frame, condition_picture, frame_object
from .preprocess.prepare import PreparedPicture, prepare_picture
from .ranks import Ranks, helped
from .rendering.renderer import render_picture
from .state import State, make_state, n_total_steps
from .words import check_words, finish_words, frame_of_words

log = logging.getLogger(__name__)

TRAINING_PICTURE = 256
"""Pixels along the longer side of the picture that the optimisation sees; the texture takes the full one."""
PREVIEW_SAMPLES = 96
INITIAL_SHAPE_CELLS = 96


@dataclass(frozen=True)
class Job:
    """What a caller asks for. Files may be paths or their bytes."""

    picture: Path | bytes | None
    """None makes the object from the prompt alone; see `words`."""
    config: PipelineConfig
    mask: Path | bytes | None = None
    depth: Path | bytes | None = None
    depth_kind: str = "relative"
    camera: Path | dict | None = None
    init_mesh: Path | bytes | None = None
    name: str = "object"


@dataclass(frozen=True)
class JobResult:
    """The object in the caller's world, and where its files are."""

    finished: Finished
    folder: Path

    @property
    def mesh(self):
        """The textured mesh; see `mesh.mesh.TexturedMesh`."""
        return self.finished.mesh

    @property
    def metrics(self) -> dict:
        return self.finished.metrics

    @property
    def glb(self) -> Path:
        return self.folder / "mesh.glb"


def generate(job: Job, folder: Path, monitor: Monitor | None = None, resume: bool = True) -> JobResult:
    """Run a job to its end, going on from the folder's checkpoint if there is one.

    Calling it again after the end makes the mesh again, with other settings if they changed, or goes on optimising if more
    steps are asked for.

    Raises:
        InputError: An input or the folder cannot be used.
        GuidanceError, MissingDependency, OptimizationError, MeshError: See there.
        Cancelled: The monitor asked for it; the checkpoint is kept.
    """
    monitor = monitor or Monitor()
    folder = make_folder(Path(folder))
    config, started = job.config, time.monotonic()
    device = resolve_device(config.device)
    wake(device)
    # A job that goes on may have no step left to do.
    imports = None if resume and (folder / FILE_NAME).exists() else _start_imports(config)
    n_threads = set_threads(config.threads)
    torch.set_float32_matmul_precision("high")  # the field's networks on a GPU's tensor cores
    with _log_file(folder), BackgroundWriter() as writer:
        log.info("ConRad engine %s on %s with %d threads, preset %s", __version__, device, n_threads, config.preset)
        monitor.progress(Progress("prepare", 0, 1))
        inputs = _prepare(job, monitor, device)
        prepared, frame, view = inputs.prepared, inputs.frame, inputs.view
        write_json(folder / "config.json", {"version": __version__, "name": job.name, **to_json(config)})
        state = _first_state(view, frame, config, device)
        initial = _initial_shape(job, frame, state, config)
        is_resumed = resume and load_checkpoint(folder, state, config, inputs.fingerprint)
        if is_resumed:
            monitor.progress(Progress("optimize", state.step, n_total_steps(config)))
        seconds = {"prepare": time.monotonic() - started}
        # A job stopped early and only made into a mesh again needs no prior.
        if state.step < n_total_steps(config) and monitor.command() is not Command.KEEP:
            imports = imports or _start_imports(config)
            priors = _priors(config, inputs, device, folder, is_resumed, monitor, imports)
            seconds["load"] = time.monotonic() - started - seconds["prepare"]
            if priors.late is not None:
                priors = replace(priors, late=_added_to(seconds, "load")(priors.late))
            # Now there is time: what follows computes outside of Python.
            Thread(target=load_writer, daemon=True).start()
            save = lambda s: save_checkpoint(folder, s, config, inputs.fingerprint, writer)  # noqa: E731
            show = lambda s: _show(s, frame, config, monitor)  # noqa: E731
            if not is_resumed:
                save(state)
            if config.optimize.n_gpus > 1:
                writer.wait()  # the other processes start from it
            with helped(config.optimize.n_gpus, device, help_optimize, job, folder) as ranks:
                optimize(state, priors, frame.condition, config, monitor, save, show, ranks)
        seconds["optimize"] = time.monotonic() - started - sum(seconds.values())
        if prepared is None or view is None:
            finished = finish_words(state, frame, config, folder, job.name, monitor)
        else:
            full = full_size_field(state, view, config)
            finished = finish(state, full, view, initial, prepared, frame, config, folder, job.name, monitor)
        writer.wait()  # a job is done with its last checkpoint
        seconds["finish"] = time.monotonic() - started - sum(seconds.values())
        finished.metrics.update(
            seconds=round(time.monotonic() - started, 2),
            seconds_by_stage={name: round(value, 2) for name, value in seconds.items()},
            device=str(device),
            memory_bytes=_peak_memory(device),
            n_skipped_steps=state.n_skipped,
            steps=state.step,
            warnings=[] if prepared is None else list(prepared.warnings),
        )
        if inputs.guess is not None:
            finished.metrics["elevation"] = inputs.guess.to_json()
        write_json(folder / "metrics.json", finished.metrics)
        log.info("done in %.1f s", time.monotonic() - started)
        monitor.progress(Progress("done", 1, 1, 0.0, {}, memory_bytes(device)))
    return JobResult(finished, folder)


def help_optimize(ranks: Ranks, device: torch.device, job: Job, folder: Path) -> None:
    """What another process does in a job whose views are shared: go on from the first one's checkpoint, and write nothing."""
    config, monitor = job.config, Monitor()
    imports = _start_imports(config)
    inputs = _prepare(job, monitor, device)
    state = _first_state(inputs.view, inputs.frame, config, device)
    _initial_shape(job, inputs.frame, state, config)
    load_checkpoint(folder, state, config, inputs.fingerprint)
    priors = _priors(config, inputs, device, folder, True, monitor, imports)
    silent = lambda s: None  # noqa: E731
    with suppress(Cancelled):
        optimize(state, priors, inputs.frame.condition, config, monitor, silent, silent, ranks)


def _first_state(view: ReferenceView | None, frame: Frame, config: PipelineConfig, device: torch.device) -> State:
    torch.manual_seed(config.seed)
    views = [] if view is None else [view.resized(TRAINING_PICTURE)]
    state = make_state(make_field(config.field_, _field_box(device)), views, config, device)
    state.is_centered = frame.is_centered
    state.world_azimuth = frame.world_azimuth_rad
    return state


@dataclass(frozen=True)
class _Inputs:
    """What a job starts from."""

    prepared: PreparedPicture | None
    """None, like the view, where there are only words."""
    frame: Frame
    view: ReferenceView | None
    guess: ElevationGuess | None
    """The camera's elevation, if it had to be guessed."""
    fingerprint: str


def _prepare(job: Job, monitor: Monitor, device: torch.device) -> _Inputs:
    if job.picture is None:
        check_words(job.config)
        frame, parts = frame_of_words(job.config.picture), [job.config.prompt.encode(), _content(job.init_mesh)]
        return _Inputs(None, frame, None, None, fingerprint(parts))
    prepared = prepare_picture(job.picture, job.config.picture, job.mask, job.depth, job.depth_kind)
    for message in prepared.warnings:
        log.warning("%s", message)
        monitor.warning(message)
    setup = None if job.camera is None else CameraSetup.from_json(job.camera)
    settings, guess = job.config.picture, None
    if setup is None and settings.guess_elevation:
        guess = guess_elevation(prepared, settings, device)
        settings = guess.picture
        monitor.warning(guess.sentence())
    frame = frame_object(prepared.mask, setup, settings)
    surface = _known_surface(prepared, frame, job.config)
    view = reference_view(prepared.rgb, prepared.mask, frame.camera, surface)
    camera = json.dumps(None if setup is None else setup.to_json(), sort_keys=True)
    angles = (settings.elevation_deg, settings.fov_deg) if setup is None else ()
    parts = [prepared.sha256.encode(), _content(job.mask), _content(job.depth), _content(job.init_mesh)]
    parts += [camera.encode(), repr(angles).encode()]
    return _Inputs(prepared, frame, view, guess, fingerprint(parts))


def _content(source: Path | bytes | None) -> bytes:
    if source is None or isinstance(source, bytes):
        return source or b""
    try:
        return hashlib.sha256(Path(source).read_bytes()).digest()
    except OSError as error:
        raise InputError(f"{source} cannot be read: {error.strerror}; give the path of an existing file") from None


def _known_surface(prepared: PreparedPicture, frame: Frame, config: PipelineConfig) -> np.ndarray | None:
    """The depth map as ray distances of the object frame; a relative one keeps its own scale and only feeds a loss."""
    if prepared.depth is None:
        if config.constraint.kind == "known_depth":
            raise InputError(
                "the constraint known_depth needs a metric depth map: give one with --depth and --depth-kind metric"
            )
        return None
    depth = np.where(prepared.mask > 0.5, prepared.depth, np.nan)
    if prepared.depth_kind == "relative":
        if config.constraint.kind == "known_depth":
            raise InputError(
                "the constraint known_depth needs metric depth; a relative map can only guide the inferred form"
            )
        return depth
    _, directions = frame.camera.rays()
    along_axis = (directions @ frame.camera.forward).view(depth.shape).numpy()
    return depth / along_axis / frame.to_world.scale


def _field_box(device: torch.device) -> torch.Tensor:
    """Sideways the silhouette bounds the object, up to perspective; its depth is unknown."""
    side = 0.85 * HALF_BOX
    return torch.tensor([[-side, -HALF_BOX, -side], [side, HALF_BOX, side]], device=device)


def _initial_shape(job: Job, frame: Frame, state: State, config: PipelineConfig) -> Mesh | None:
    """Let the field start from the user's mesh, given in the camera's world; returns it in the object frame."""
    if job.init_mesh is None:
        return None
    mesh = load_mesh(job.init_mesh)
    points = torch.from_numpy(mesh.vertices).double()
    to_object = frame.to_world.inverse() if frame.has_camera else _fitted(points)
    mesh = replace(mesh, vertices=to_object.points(points).float().numpy())
    grid = signed_distance_grid(mesh, state.field.aabb.cpu().numpy(), INITIAL_SHAPE_CELLS)
    if not (grid > 0).any():
        raise InputError(
            "the start mesh lies outside the object's space: it must stand in the world of the camera, around object_center"
        )
    state.field.initialize(torch.from_numpy(grid).to(state.field.aabb))
    return mesh


def _fitted(points: torch.Tensor) -> Similarity:
    """Without a camera there is no common world: the mesh is centered, with the size of the silhouette."""
    low, high = points.amin(0), points.amax(0)
    scale = REFERENCE_EXTENT / float((high - low)[[0, 2]].max())
    return Similarity(scale, torch.eye(3, dtype=torch.float64), -scale * (low + high) / 2)


def _start_imports(config: PipelineConfig) -> Thread:
    """Let a thread import the libraries of the priors, beside preparation and warm start.

    It reads no weights: for that both libraries change torch's default type and its modules, in all threads.
    """
    if config.clip.is_used or not isinstance(config.guidance, EmbeddedPriorConfig):
        import_hub()
    thread = Thread(target=import_libraries, args=(config.guidance, config.clip), daemon=True)
    thread.start()
    return thread


def _priors(
    config: PipelineConfig,
    inputs: _Inputs,
    device: torch.device,
    folder: Path,
    is_resumed: bool,
    monitor: Monitor,
    imports: Thread,
) -> Priors:
    """What the optimisation asks, with the reference set; nothing where nothing will be asked.

    A latent model is read after the warm start, which the embedded prior draws: the libraries are there by then.
    """
    has_warm_start = config.optimize.warm_start_views > 0 and config.optimize.warm_start_steps > 0
    if config.optimize.n_steps == 0 and not has_warm_start:
        return Priors()
    prepared, frame = inputs.prepared, inputs.frame
    if prepared is None:
        picture = torch.zeros(4, frame.condition.height, frame.condition.width)
    else:
        picture = condition_picture(prepared.rgb, prepared.mask, frame)
    is_known = (config.picture if inputs.guess is None else inputs.guess.picture).is_elevation_known
    reference = ReferencePicture(picture, frame.condition, is_known, config.prompt, frame.object_size)
    settings = config.guidance
    check_priors(settings, config.clip, config.prompt, device)
    if isinstance(settings, StableDiffusionConfig | MixtureConfig):
        from .guidance.textual_inversion import learns_word, with_learned_word

        if learns_word(settings):
            _wait_for(imports, monitor)
            report = lambda step, loss: _learning_step(step, loss, monitor)  # noqa: E731
            settings, reference = with_learned_word(
                settings, reference, device, folder, config.seed, is_resumed, report
            )

    def read() -> Priors:
        _wait_for(imports, monitor)
        guidance = make_guidance(settings, device)
        guidance.set_reference(reference)
        likeness = make_likeness(config.clip, device)
        if likeness is not None:
            likeness.set_reference(reference)
        return Priors(guidance, likeness, guidance if isinstance(guidance, ViewSampler) else None)

    if not has_warm_start or isinstance(settings, EmbeddedPriorConfig):
        return read()
    # Other priors draw no views: the embedded one starts their jobs.
    sampler = EmbeddedPrior(EmbeddedPriorConfig(), device)
    sampler.set_reference(reference)
    return Priors(sampler=sampler, late=read)


def _wait_for(imports: Thread, monitor: Monitor) -> None:
    while imports.is_alive():
        if monitor.command() is Command.CANCEL:
            raise Cancelled("cancelled while libraries were imported")
        imports.join(0.05)


@contextmanager
def _added_to(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[stage] += time.monotonic() - started


def _learning_step(step: int, loss: float, monitor: Monitor) -> None:
    """Between two steps of learning a word."""
    monitor.progress(Progress("prepare", step, step + 1, losses={"word": loss}))
    if monitor.command() is Command.CANCEL:
        raise Cancelled("cancelled while a word for the picture was learned")


def full_size_field(state: State, view: ReferenceView, config: PipelineConfig) -> ConstrainedField:
    """The constrained field with the full picture and a fresh surface: what evaluation and texturing look at."""
    state.field.prepare()
    state.constrained.set_progress(1.0)
    state.constrained.infer_surfaces(2 * config.render.n_samples, state.occupancy)
    return state.constrained.with_pictures([view])


def _show(state: State, frame: Frame, config: PipelineConfig, monitor: Monitor) -> None:
    """Send the preview that the monitor asks for, if it does."""
    camera: Camera | None = monitor.preview_camera()
    if camera is None:
        return
    # Without a camera file the world is that of the finished mesh: largest side 1, see `final_similarity`.
    to_object = (
        frame.to_world.inverse()
        if frame.has_camera
        else Similarity(REFERENCE_EXTENT, torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    )
    seen = to_object.camera(camera).to(state.field.aabb.device, torch.float32)
    state.field.prepare()
    settings = PREVIEW_SAMPLES, state.occupancy, config.render.max_points, config.render.early_stop
    picture = render_picture(state.constrained.sharp(), seen, *settings)
    opacities = picture.opacities[..., None]
    rgba = torch.cat([picture.rgb / opacities.clamp(min=1e-3), opacities], -1)
    monitor.preview((rgba.clamp(0, 1) * 255).round().byte().cpu().numpy(), camera)


def _peak_memory(device: torch.device) -> int:
    """Largest memory in use so far: of the device on a GPU (not what a search for fast algorithms tried), of the process on a
    CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    except ImportError:  # Windows has no such module
        return 0


@contextmanager
def _log_file(folder: Path) -> Iterator[None]:
    """The engine's log lines go to the folder's `log.txt` while a job runs."""
    handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("conrad_engine")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    except Exception as error:
        # For the file: what the terminal shows of it is the command line's to say.
        logger.info("the job ended: %s", error, exc_info=True)
        raise
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()
