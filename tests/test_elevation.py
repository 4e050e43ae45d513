"""Guessing how high a picture's camera stands: the head's file, the estimate, and what a job makes of it."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save

from conrad_engine import elevation as engine
from conrad_engine import pipeline
from conrad_engine.cameras import CameraSetup, orbit_angles
from conrad_engine.config import HALF_FRAME, PictureConfig, preset, with_overrides
from conrad_engine.errors import GuidanceError
from conrad_engine.guidance.embedded import elevation as head_file
from conrad_engine.guidance.embedded.elevation import ElevationEstimate, ElevationHead, estimate_elevation
from conrad_engine.guidance.embedded.weights import ELEVATION, shipped_path
from conrad_engine.preprocess.framing import frame_object
from conrad_engine.preprocess.prepare import prepare_picture
from conrad_engine.training import train_elevation
from conrad_engine.training.elevation_views import render_elevations
from conrad_engine.training.raster import Rasterizer, default_light, orbit_camera
from conrad_engine.training.views import Framing, Task, framed

from .conftest import figure_rgba, png_bytes
from .test_optimize import BallPrior
from .test_pipeline import TOY
from .training_meshes import box, write_tiny_pool

needs_compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="the rasterizer needs a C compiler")
CPU = torch.device("cpu")


def seen_from(elevation_deg: float, size: int = 256) -> np.ndarray:
    """A box, wider than high, from its corner; (size, size, 4) as the prior's conditioning camera sees it."""
    fov_rad, azimuth_rad = math.radians(40), math.radians(35)
    mesh = box(1.0, 0.7, 0.6)
    framing = Framing(fov_rad, math.radians(elevation_deg), azimuth_rad, 0.8, is_silhouette_centered=True)
    moved = replace(mesh, vertices=framed(mesh.vertices, framing).astype(np.float32))
    camera = orbit_camera(azimuth_rad, framing.elevation_rad, HALF_FRAME / math.tan(fov_rad / 2))
    return Rasterizer(moved).render(camera, fov_rad, size, default_light(azimuth_rad))


def as_picture(rgba: np.ndarray) -> torch.Tensor:
    return train_elevation.premultiplied(rgba[None])[0]


# The head


def test_mean_and_spread_of_two_equal_chances():
    scores = torch.full((1, len(head_file.CENTERS_DEG)), -torch.inf)
    scores[0, head_file.CENTERS_DEG.index(10)] = scores[0, head_file.CENTERS_DEG.index(30)] = 0
    mean, spread = head_file.mean_and_spread(scores)
    assert float(mean) == pytest.approx(20) and float(spread) == pytest.approx(10)


def test_pictures_from_usual_places_are_expected():
    nothing_seen = torch.zeros(1, len(head_file.CENTERS_DEG))
    mean, spread = head_file.mean_and_spread(head_file.as_usual(nothing_seen))
    assert float(mean) == pytest.approx(head_file.USUAL_DEG, abs=5) and float(spread) > head_file.MAX_SPREAD_DEG


def test_a_written_head_is_read_again(tmp_path):
    head = ElevationHead(24).eval()
    (tmp_path / "head").write_bytes(head_file.to_bytes(head, {"views": "7"}))
    features = torch.randn(3, 24)
    assert torch.allclose(head_file.load(tmp_path / "head")(features), head(features), atol=2e-3)


def test_the_shipped_file_is_small():
    assert shipped_path(ELEVATION).stat().st_size < 500_000


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda data: b"", "cannot be read"),
        (lambda data: data[:-100], "cannot be read"),
        (lambda data: save(load_tensors(data), {"architecture": "other-2"}), "are for other-2"),
        (lambda data: save(load_tensors(data)), "no architecture"),
        (lambda data: _resaved(data, lambda t: t.pop("scale")), "do not fit"),
        (lambda data: _resaved(data, lambda t: t.pop("center")), "do not fit"),
        (lambda data: _resaved(data, lambda t: t["scale"].fill_(torch.nan)), "not finite"),
    ],
)
def test_a_bad_file_is_named(tmp_path, change, complaint):
    path = tmp_path / "head.safetensors"
    path.write_bytes(change(head_file.to_bytes(ElevationHead(24))))
    with pytest.raises(GuidanceError, match=complaint):
        head_file.load(path)


def _resaved(data: bytes, change) -> bytes:
    tensors = load_tensors(data)
    change(tensors)
    return save(tensors, {"architecture": head_file.ARCHITECTURE})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(GuidanceError, match="missing"):
        head_file.load(tmp_path / "none")


# The shipped weights


@needs_compiler
def test_a_box_is_seen_from_where_it_is_seen():
    estimates = [estimate_elevation(as_picture(seen_from(deg)), CPU) for deg in (0, 20, 40)]
    found = [estimate.elevation_deg for estimate in estimates]
    assert found == sorted(found) and np.abs(np.array(found) - [0, 20, 40]).max() < 12
    assert all(estimate.is_sure for estimate in estimates)


@needs_compiler
def test_a_mirrored_picture_has_nearly_the_same_elevation():
    picture = as_picture(seen_from(25))
    found = [estimate_elevation(p, CPU).elevation_deg for p in (picture, picture.flip(-1))]
    assert abs(found[0] - found[1]) < 6


@pytest.mark.parametrize("name", ["chair.webp", "truck.jpg"])
def test_pictures_whose_camera_is_known(name):
    path = Path(__file__).parent / "pictures" / name
    mask = path.with_name(f"{path.stem}.mask.png")
    setup = CameraSetup.from_json(path.with_name(f"{path.stem}.camera.json"))
    true_deg = math.degrees(float(orbit_angles(setup.camera.positions - setup.object_center)[1]))
    estimate = pipeline.elevation_of_picture(path, mask if mask.exists() else None, 40.0, "cpu")
    assert estimate.is_sure and abs(estimate.elevation_deg - true_deg) < 5


# What a job makes of it


def estimated(monkeypatch, elevation_deg: float, spread_deg: float) -> None:
    monkeypatch.setattr(engine, "estimate_elevation", lambda *_: ElevationEstimate(elevation_deg, spread_deg))


def off_center() -> bytes:
    """The figure in the upper left quarter of a larger picture."""
    rgba = np.zeros((400, 400, 4), np.uint8)
    rgba[10:202, 20:180] = figure_rgba(192, 160)
    return png_bytes(rgba)


def test_the_guessed_elevation_is_that_of_the_object_also_beside_the_middle(monkeypatch):
    estimated(monkeypatch, 30.0, 5.0)
    config = PictureConfig()
    prepared = prepare_picture(off_center(), config)
    assert abs(math.degrees(frame_object(prepared.mask, None, config).elevation_rad) - config.elevation_deg) > 5
    guess = engine.guess_elevation(prepared, config, CPU)
    found = math.degrees(frame_object(prepared.mask, None, guess.picture).elevation_rad)
    assert found == pytest.approx(30, abs=1.5) and guess.picture.is_elevation_known
    assert guess.sentence() == "the camera's elevation was guessed from the picture: 30 ± 5 degrees"


def test_an_unsure_estimate_leaves_the_default_and_says_so(monkeypatch):
    estimated(monkeypatch, 40.0, head_file.MAX_SPREAD_DEG + 1)
    config = PictureConfig(elevation_deg=12)
    guess = engine.guess_elevation(prepare_picture(off_center(), config), config, CPU)
    assert guess.picture == replace(config, is_elevation_known=False)
    assert "does not say" in guess.sentence() and "12 degrees are taken" in guess.sentence()
    assert guess.to_json()["is_used"] is False and guess.to_json()["used_deg"] == 12


class Told(BallPrior):
    """Keeps what it is told of the reference."""

    def set_reference(self, reference):
        type(self).reference = reference
        super().set_reference(reference)


def generated(monkeypatch, folder, camera=None, **settings) -> dict:
    """The metrics of a job whose elevation would be estimated as 35 degrees."""
    estimated(monkeypatch, 35.0, 6.0)
    monkeypatch.setattr(pipeline, "make_guidance", lambda config, device: Told())
    small = {"optimize.warm_start_steps": 2, "optimize.n_steps": 2, **settings}
    config = with_overrides(preset("draft"), TOY | small)
    job = pipeline.Job(png_bytes(figure_rgba(192, 160)), config, camera=camera, name="figure")
    pipeline.generate(job, folder)
    return json.loads((folder / "metrics.json").read_text())


def test_without_camera_and_elevation_a_job_guesses(monkeypatch, tmp_path):
    metrics = generated(monkeypatch, tmp_path)
    assert metrics["elevation"]["estimate_deg"] == 35 and metrics["elevation"]["is_used"]
    assert Told.reference.is_elevation_known
    camera = json.loads((tmp_path / "camera.json").read_text())
    backward = np.array(camera["c2w"])[:3, 2]
    assert math.degrees(math.asin(backward[2])) == pytest.approx(metrics["elevation"]["used_deg"], abs=0.1)
    assert "guessed from the picture: 35 ± 6 degrees" in (tmp_path / "log.txt").read_text()


def test_an_unsure_job_tells_the_prior_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(head_file, "MAX_SPREAD_DEG", 5.0)
    metrics = generated(monkeypatch, tmp_path)
    assert not metrics["elevation"]["is_used"] and not Told.reference.is_elevation_known


def test_a_given_elevation_is_taken_and_known(monkeypatch, tmp_path):
    metrics = generated(monkeypatch, tmp_path, **{"picture.elevation_deg": 20})
    assert "elevation" not in metrics and Told.reference.is_elevation_known


@pytest.mark.parametrize("is_known", [True, False])
def test_a_camera_is_taken_and_may_be_called_a_guess(monkeypatch, tmp_path, is_known):
    c2w = [[1, 0, 0, 0], [0, 0, -1, -3], [0, 1, 0, 0], [0, 0, 0, 1]]
    camera = {"c2w": c2w, "intrinsics": [200, 200, 80, 96], "width": 160, "height": 192, "object_center": [0, 0, 0]}
    metrics = generated(monkeypatch, tmp_path, camera, **{"picture.is_elevation_known": is_known})
    assert "elevation" not in metrics and Told.reference.is_elevation_known is is_known


def test_a_question_without_a_job(monkeypatch):
    estimated(monkeypatch, 35.0, 6.0)
    assert pipeline.elevation_of_picture(off_center(), None, 50.0, "cpu") == (35.0, 6.0)


# Training


@needs_compiler
def test_training_views_are_what_they_say(tmp_path):
    from conrad_engine.training.views import open_pools

    write_tiny_pool(tmp_path)
    for split in ("train", "val"):
        [(source, index), *_] = open_pools(tmp_path, ("sweethome3d",), split)
        found = render_elevations(Task(4, source, index, 0, "", split == "train"), 5)
        assert found.views.shape == (5, 64, 64, 4) and set(found.objects) == {4}
        assert -10 <= found.elevations_deg.min() and found.elevations_deg.max() <= 60
        assert 20 <= found.fovs_deg.min() and found.fovs_deg.max() <= 60
        rows, columns = (np.ptp(np.nonzero(found.views[0, ..., 3] > 127)[axis]) + 1 for axis in (0, 1))
        assert 0.74 <= max(rows, columns) / 64 <= 0.86, "framed as the product frames a picture"
    assert found.elevations_deg.tolist() == pytest.approx(np.linspace(-10, 60, 5).tolist())


@needs_compiler
def test_the_training_script_makes_a_head_that_loads(tmp_path):
    write_tiny_pool(tmp_path)
    arguments = "--views 2 --val-views 3 --epochs 2 --processes 1 --sources sweethome3d,0ad".split()
    train_elevation.main(["--pool", str(tmp_path), "--out", str(tmp_path / "out"), *arguments])
    scores = json.loads((tmp_path / "out" / "elevation_scores.json").read_text())
    assert scores["validation"]["all"]["views"] == 6 and scores["validation, degraded"]["all"]["mean_error"] > 0
    assert isinstance(head_file.load(tmp_path / "out" / "elevation.safetensors"), ElevationHead)


def test_calibration_widens_a_spread_that_is_too_small():
    torch.manual_seed(0)

    class Fixed(torch.nn.Module):
        """Scores that are the features, through a last layer that does nothing."""

        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Linear(15, 15))
            self.layers[-1].weight.data, self.layers[-1].bias.data = torch.eye(15), torch.zeros(15)

        def forward(self, features):
            return torch.cat([self.layers(features), torch.full((len(features), 2), -30.0)], 1)

    truth = torch.rand(400) * 30 + 5
    said = truth + 12 * torch.randn(400)  # the scores say 5 degrees of spread, the errors are 12
    features = -(((torch.tensor(head_file.CENTERS_DEG[:15]) - said[:, None]) / 5) ** 2) / 2
    head = Fixed()
    factor = train_elevation.calibrate(head, train_elevation.Examples(features, truth, torch.zeros(400)))
    assert factor < 0.8
