"""One job at toy size, from picture bytes to files, with an analytic prior; resuming, extracting again, and bad input."""

import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from conrad_engine import finish, pipeline
from conrad_engine.cameras import CameraSetup, orbit_camera
from conrad_engine.config import preset, with_overrides
from conrad_engine.errors import Cancelled, InputError
from conrad_engine.evaluation import metrics
from conrad_engine.mesh.glb import load_mesh, read_textured
from conrad_engine.mesh.raster import render_mesh
from conrad_engine.monitor import Command, Monitor

from .conftest import figure_rgba, png_bytes
from .test_optimize import BallPrior

TOY = {
    "field.resolution": 32,
    "field.coarsest": 8,
    "render.size": 24,
    "render.n_samples": 32,
    "render.occupancy_resolution": 16,
    "constraint.depth_size": 64,
    "optimize.warm_start_views": 3,
    "optimize.warm_start_steps": 20,
    "optimize.n_steps": 10,
    "optimize.n_views": 1,
    "mesh.resolution": 48,
    "mesh.n_faces": 4000,
    "mesh.texture_size": 512,
    "mesh.turntable_frames": 3,
    "mesh.turntable_size": 48,
    "device": "cpu",
    "threads": 1,
}
PICTURE = png_bytes(figure_rgba(192, 160))


@pytest.fixture(autouse=True)
def ball_prior(monkeypatch):
    monkeypatch.setattr(pipeline, "make_guidance", lambda config, device: BallPrior())


def toy_job(**changes) -> pipeline.Job:
    settings = TOY | changes.pop("settings", {})
    return pipeline.Job(
        **{"picture": PICTURE, "config": with_overrides(preset("draft"), settings), "name": "figure"} | changes
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished job, shared by the tests that only look."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "make_guidance", lambda config, device: BallPrior())
        return pipeline.generate(toy_job(), folder)


def test_every_file_is_there(finished):
    expected = (
        "mesh.glb mesh.obj mesh.mtl mesh.ply texture.png turntable.gif sheet.png config.json metrics.json log.txt"
    )
    names = {path.name for path in finished.folder.iterdir()}
    assert set(expected.split()) <= names
    assert not [name for name in names if name.endswith(".tmp")]


def test_front_is_the_picture(finished):
    """The mesh, read back from its file and seen through the saved camera, against the picture."""
    setup = CameraSetup.from_json(finished.folder / "camera.json")
    rgba = figure_rgba(192, 160).astype(np.float32) / 255
    ours = render_mesh(read_textured(finished.glb), setup.camera)
    inside = torch.nn.functional.avg_pool2d(torch.from_numpy(rgba[None, ..., 3]), 5, 1, 2)[0].numpy() > 0.99
    assert metrics.mask_iou(ours[..., 3] > 0.5, rgba[..., 3] > 0.5) > 0.93
    assert metrics.psnr(ours[..., :3] * ours[..., 3:], rgba[..., :3], inside) > 22
    red, blue = ours[78, 40, :3], ours[105, 120, :3]
    assert red[0] > 0.6 > 0.3 > red[2] and blue[2] > 0.6 > 0.3 > blue[0], "red arm left, blue arm right"


def test_metrics_say_what_was_measured(finished):
    numbers = json.loads((finished.folder / "metrics.json").read_text())
    assert numbers["field_psnr_training"] > 30 and numbers["mesh_iou"] > 0.93
    assert numbers["components"] == 1 and numbers["manifold_edges"] > 0.99
    assert numbers["steps"] == 30 and numbers["seconds"] > 0 and numbers["memory_bytes"] > 0
    parts = numbers["seconds_of_finish"]
    assert {"surface", "texture", "files", "pictures"} <= set(parts)
    assert 0 < sum(parts.values()) < numbers["seconds_by_stage"]["finish"] + 0.1


def test_without_a_camera_the_mesh_is_centered_with_largest_side_1(finished):
    vertices = load_mesh(finished.glb).vertices
    assert np.ptp(vertices, axis=0).max() == pytest.approx(1, abs=1e-3)
    assert np.abs(vertices.min(0) + vertices.max(0)).max() < 2e-3


def test_with_a_camera_the_mesh_lies_in_its_world(tmp_path):
    angle = math.radians(40)
    position = np.array([5 * math.sin(angle) + 10, -5 * math.cos(angle) + 20, 31.0])
    backward = (position - [10, 20, 30]) / np.linalg.norm(position - [10, 20, 30])
    right = np.cross([0, 0, 1], backward) / np.linalg.norm(np.cross([0, 0, 1], backward))
    c2w = np.eye(4)
    c2w[:3] = np.stack([right, np.cross(backward, right), backward, position], 1)
    camera = {
        "c2w": c2w.tolist(),
        "intrinsics": [200, 200, 90, 90],
        "width": 160,
        "height": 192,
        "object_center": [10, 20, 30],
    }
    result = pipeline.generate(toy_job(camera=camera), tmp_path)
    ours = render_mesh(result.mesh, CameraSetup.from_json(camera).camera)
    assert metrics.mask_iou(ours[..., 3] > 0.5, figure_rgba(192, 160)[..., 3] > 127) > 0.93
    middle = (result.mesh.vertices.min(0) + result.mesh.vertices.max(0)) / 2
    assert np.abs(middle - [10, 20, 30]).max() < 1.0


def test_the_middle_is_brought_to_the_origins_depth_and_the_picture_stays(finished):
    camera = orbit_camera(0.4, 0.3, 4.0, 0.6, 96).to("cpu", torch.float64)
    away = replace(finished.mesh, vertices=(finished.mesh.vertices + [0.2, 0.5, -0.1]).astype(np.float32))
    moved = finish.centered(away, camera)
    points = torch.from_numpy(np.stack([finish.upright_middle(moved.vertices), np.zeros(3)]))
    middle, origin = camera.project(points)[1].tolist()
    assert middle == pytest.approx(origin, abs=1e-5)
    before, after = (render_mesh(mesh, camera, 1) for mesh in (away, moved))
    assert np.abs(before - after).mean() < 1e-3 and before[..., 3].mean() > 0.02
    assert np.abs(moved.vertices - away.vertices).max() > 0.05, "it was somewhere else"


def test_the_middle_of_a_box_does_not_depend_on_where_it_faces():
    box = np.array([[x, y, z] for x in (0.0, 2.0) for y in (0.0, 0.5) for z in (-1.0, 3.0)])
    for yaw in (0.0, 0.3, 1.0, 2.0):
        cos, sin = math.cos(yaw), math.sin(yaw)
        turned = box @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]]) + [5, 6, 7]
        expected = np.array([1 * cos - 0.25 * sin, 1 * sin + 0.25 * cos, 1]) + [5, 6, 7]
        for azimuth_rad in (None, yaw, yaw + math.pi / 2):
            assert np.abs(finish.upright_middle(turned, azimuth_rad) - expected).max() < 1e-6


def test_the_middle_of_what_is_no_box_is_that_of_its_box_along_the_given_axes():
    wedge = np.array([[0.0, 0, 0], [2, 0, 0], [0, 1, 0], [0, 0, 4]])
    for yaw in (0.0, 0.3, 2.0):
        cos, sin = math.cos(yaw), math.sin(yaw)
        turned = wedge @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
        expected = np.array([1 * cos - 0.5 * sin, 1 * sin + 0.5 * cos, 2])
        assert np.abs(finish.upright_middle(turned, yaw) - expected).max() < 1e-6
        assert np.abs(finish.upright_middle(turned) - expected).max() > 0.05


def test_the_middle_is_that_of_the_box_along_the_worlds_axes(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(finish, "centered", lambda mesh, camera, azimuth_rad: asked.append(azimuth_rad) or mesh)
    camera = CameraSetup(orbit_camera(0.7, 0.3, 5.0, 0.8, 96), torch.zeros(3)).to_json()
    camera |= {"width": 160, "height": 192, "intrinsics": [200, 200, 80, 96]}
    for index, settings in enumerate(({}, {"optimize.axis_aligned": False})):
        pipeline.generate(toy_job(camera=camera, settings=settings | {"mesh.detail_views": 0}), tmp_path / str(index))
    assert asked[0] % (math.pi / 2) == pytest.approx(-0.7 % (math.pi / 2), abs=1e-4), (
        "the camera's azimuth is 0 in the frame"
    )
    assert asked[1] is None, "the thing stands anyhow"


@pytest.mark.parametrize("told", ("nothing", "not to", "metric depth", "start mesh", "mirrored picture"))
def test_a_job_centers_its_mesh_unless_something_says_how_deep_it_lies(tmp_path, monkeypatch, finished, told):
    moved = []
    monkeypatch.setattr(finish, "centered", lambda mesh, *about: moved.append(about) or mesh)
    changes = {"depth_kind": "metric"}  # of no depth map
    if told == "mirrored picture":
        first_state = pipeline._first_state
        monkeypatch.setattr(pipeline, "_first_state", lambda *about: replace(first_state(*about), plane=0.5))
    if told == "metric depth":
        changes["depth"] = tmp_path / "depth.npy"
        np.save(changes["depth"], np.linspace(2.9, 3.1, 192 * 160, dtype=np.float32).reshape(192, 160))
    if told == "start mesh":
        changes["init_mesh"] = finished.glb
    settings = {"mesh.centered": told != "not to", "mesh.detail_views": 0}
    pipeline.generate(toy_job(settings=settings, **changes), tmp_path / "out")
    assert len(moved) == (told == "nothing")


class CancelAt(Monitor):
    def __init__(self, step):
        self.step, self.steps, self.of_mesh = step, [], []

    def progress(self, progress):
        if progress.stage == "optimize":
            self.steps.append(progress.step)
        if progress.stage == "mesh":
            self.of_mesh.append((progress.step, progress.n_steps))

    def command(self):
        return Command.CANCEL if self.steps and self.steps[-1] >= self.step else Command.RUN


def test_cancelled_job_resumes_to_the_same_result(tmp_path, finished):
    with pytest.raises(Cancelled):
        pipeline.generate(toy_job(), tmp_path, CancelAt(13))
    assert not (tmp_path / "mesh.glb").exists()
    watcher = CancelAt(10_000)
    again = pipeline.generate(toy_job(), tmp_path, watcher)
    assert watcher.steps == list(range(13, 31)), "where it goes on from is told first"
    n = len(watcher.of_mesh)
    assert n > 4 and watcher.of_mesh == [(step, n) for step in range(n)], "the bar never goes back"
    a, b = (json.loads((r.folder / "metrics.json").read_text()) for r in (finished, again))
    assert abs(a["mesh_psnr"] - b["mesh_psnr"]) < 0.3 and abs(a["mesh_iou"] - b["mesh_iou"]) < 0.005


def test_cancelling_at_the_start_of_the_mesh_does_not_wait_for_the_field_s_pictures(tmp_path, monkeypatch):
    class CancelMesh(Monitor):
        stage = ""

        def progress(self, progress):
            self.stage = progress.stage

        def command(self):
            return Command.CANCEL if self.stage == "mesh" else Command.RUN

    def endless(*settings, on_chunk, **others):
        while True:
            time.sleep(0.01)
            on_chunk()

    monkeypatch.setattr(finish, "render_picture", endless)
    with pytest.raises(Cancelled, match="mesh"):
        pipeline.generate(toy_job(), tmp_path, CancelMesh())
    assert not (tmp_path / "mesh.glb").exists()


def test_the_glb_comes_before_the_other_files(tmp_path, monkeypatch):
    found = []
    for name in ("write_other_files", "start_drawing"):
        real = getattr(finish, name)
        monkeypatch.setattr(
            finish, name, lambda *a, real=real: (found.append((tmp_path / "mesh.glb").is_file()), real(*a))[1]
        )
    pipeline.generate(toy_job(), tmp_path)
    assert found == [True, True]


def test_extract_again_and_continue(tmp_path, monkeypatch):
    pipeline.generate(toy_job(), tmp_path)
    monkeypatch.setattr(pipeline, "make_guidance", lambda *_: pytest.fail("extracting again needs no prior"))
    smaller = pipeline.generate(toy_job(settings={"mesh.n_faces": 1000}), tmp_path)
    assert smaller.metrics["n_faces"] <= 1000 and smaller.metrics["steps"] == 30
    monkeypatch.setattr(pipeline, "make_guidance", lambda config, device: BallPrior())
    longer = pipeline.generate(toy_job(settings={"optimize.n_steps": 14}), tmp_path)
    assert longer.metrics["steps"] == 34


def test_a_job_stopped_early_is_made_into_a_mesh_again_without_a_prior(tmp_path, monkeypatch):
    with pytest.raises(Cancelled):
        pipeline.generate(toy_job(), tmp_path, CancelAt(25))

    class Keep(Monitor):
        def command(self):
            return Command.KEEP

    monkeypatch.setattr(pipeline, "make_guidance", lambda *_: pytest.fail("no step is asked for"))
    result = pipeline.generate(toy_job(), tmp_path, Keep())
    assert result.metrics["steps"] == 25 and result.glb.exists()


def test_start_from_a_mesh_and_project_only(tmp_path, finished):
    glb = finished.glb.read_bytes()
    result = pipeline.generate(toy_job(init_mesh=glb, settings={"mesh.project_only": True}), tmp_path)
    assert result.metrics["steps"] == 0
    assert result.metrics["n_faces"] == len(load_mesh(glb).faces), "the mesh is taken as it is"
    assert result.metrics["mesh_psnr_common"] > 20


def test_preview_is_sent_in_the_callers_camera(tmp_path):
    class Watching(Monitor):
        def __init__(self):
            self.pictures = []

        def preview_camera(self):
            from conrad_engine.cameras import default_camera

            return default_camera(40, 30, 10.0, 60.0)

        def preview(self, rgba, camera):
            self.pictures.append(rgba)

    monitor = Watching()
    pipeline.generate(toy_job(), tmp_path, monitor)
    assert len(monitor.pictures) == 30
    assert monitor.pictures[0].shape == (30, 40, 4) and monitor.pictures[0].dtype == np.uint8
    assert monitor.pictures[-1][..., 3].max() > 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"picture": b""}, "empty|cannot be read|no picture"),
        ({"camera": {"c2w": 1}}, "camera needs"),
        ({"settings": {"constraint.kind": "known_depth"}}, "metric depth"),
        ({"settings": {"mesh.project_only": True}}, "--init"),
        ({"init_mesh": b"solid nothing"}, "mesh"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_result(tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        pipeline.generate(toy_job(**changes), tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "mesh.glb").exists()


def test_checkpoint_of_another_picture_is_refused(tmp_path):
    with pytest.raises(Cancelled):
        pipeline.generate(toy_job(), tmp_path, CancelAt(2))
    other = png_bytes(figure_rgba(100, 100))
    with pytest.raises(InputError, match="another picture"):
        pipeline.generate(toy_job(picture=other), tmp_path)


def test_a_checkpoint_goes_on_with_the_same_field_computed_in_another_way(tmp_path):
    with pytest.raises(Cancelled):
        pipeline.generate(toy_job(), tmp_path, CancelAt(2))
    other = {"field.fused_heads": not toy_job().config.field_.fused_heads}
    assert pipeline.generate(toy_job(settings=other), tmp_path).glb.is_file()
    with pytest.raises(InputError, match="other field settings"):
        pipeline.generate(toy_job(settings={"field.resolution": 20}), tmp_path)


def fill_disk(monkeypatch, suffix: str) -> None:
    """There is no room for files of this kind any more."""
    from conrad_engine import files

    def full(source, target, real=files.os.replace):
        if str(target).endswith(suffix):
            raise OSError(28, "No space left on device")
        return real(source, target)

    monkeypatch.setattr(files.os, "replace", full)


def test_a_cancelled_job_says_that_its_checkpoint_was_not_written(tmp_path, monkeypatch):
    fill_disk(monkeypatch, ".pt")
    with pytest.raises(InputError, match="checkpoint.pt: the disk is full"):
        pipeline.generate(toy_job(), tmp_path, CancelAt(2))
    assert not list(tmp_path.glob(".*.tmp"))


def test_full_disk_keeps_the_checkpoint(tmp_path, monkeypatch):
    fill_disk(monkeypatch, ".glb")
    with pytest.raises(InputError, match="disk is full"):
        pipeline.generate(toy_job(), tmp_path)
    assert (tmp_path / "checkpoint.pt").exists() and not (tmp_path / "mesh.glb").exists()
