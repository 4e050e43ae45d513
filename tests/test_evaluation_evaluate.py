"""Baselines, scores, whole suites with a stand-in for the pipeline, tables and the command."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conrad_engine.cameras import CameraSetup
from conrad_engine.config import preset
from conrad_engine.errors import InputError, MeshError
from conrad_engine.evaluation import commands, geometry, scoring, suite, tables
from conrad_engine.evaluation.baselines import BASELINES, ellipsoid, inflated_relief
from conrad_engine.evaluation.evaluate import evaluate_suite, read_rows
from conrad_engine.evaluation.geometry import topology
from conrad_engine.evaluation.renders import render, render_with_depth
from conrad_engine.evaluation.variants import VARIANTS, find_variant
from conrad_engine.mesh.glb import read_textured, write_glb

from .test_evaluation_suite import SmallPool


@pytest.fixture(scope="module")
def small_suite(tmp_path_factory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("rendering the suite needs a C compiler")
    out = tmp_path_factory.mktemp("suite")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "_open_pools", lambda path: [SmallPool()])
        patch.setattr(suite, "N_POINTS", 3000)
        suite.make_suite("unused", out, picture_size=64, view_size=32)
    return out


@pytest.fixture(autouse=True)
def few_points(monkeypatch) -> None:
    monkeypatch.setattr(geometry, "N_POINTS", 3000)
    monkeypatch.setattr(geometry, "N_ALIGN_POINTS", 800)


def ball_setup(size: int = 96) -> tuple[np.ndarray, CameraSetup]:
    """A picture of a ball of radius 0.5 around (1, 2, 3), seen from -Y, nearly without perspective."""
    focal, distance = size * 10.0, 12.5
    c2w = [[1, 0, 0, 1], [0, 0, -1, 2 - distance], [0, 1, 0, 3], [0, 0, 0, 1]]
    data = {"c2w": c2w, "intrinsics": [focal, focal, size / 2, size / 2], "width": size, "height": size}
    y, x = np.mgrid[:size, :size] + 0.5
    radius = 0.5 / distance * focal
    alpha = (np.hypot(x - size / 2, y - size / 2) < radius).astype(float)
    picture = np.stack([x / size, np.full_like(x, 0.3), y / size, alpha], -1)
    return picture, CameraSetup.from_json({**data, "object_center": [1, 2, 3]})


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_are_closed_and_show_the_picture(name: str) -> None:
    picture, setup = ball_setup()
    mesh = BASELINES[name](picture, setup)
    checks = topology(mesh.vertices, mesh.faces)
    assert checks["components"] == 1 and checks["manifold_edges"] == 1
    corners = mesh.vertices[mesh.faces].astype(np.float64)
    # Outward winding: the enclosed volume is positive.
    assert np.linalg.det(corners - mesh.vertices.mean(0)).sum() > 0
    view = render(mesh, setup.camera)
    both = (view[..., 3] > 0.5) & (picture[..., 3] > 0.5)
    assert both.sum() / (picture[..., 3] > 0.5).sum() > 0.95
    assert np.abs(view - picture)[both].mean() < 0.02


@pytest.mark.parametrize("make", [inflated_relief, ellipsoid])
def test_a_disk_becomes_a_ball(make) -> None:
    picture, setup = ball_setup()
    radii = np.linalg.norm(make(picture, setup).vertices - np.array([1, 2, 3]), axis=1)
    assert abs(np.median(radii) - 0.5) < 0.02 and radii.max() < 0.53


def test_billboard_is_flat_and_faces_the_camera() -> None:
    picture, setup = ball_setup()
    mesh = BASELINES["billboard"](picture, setup)
    assert np.ptp(mesh.vertices[:, 1]) < 0.05 and np.ptp(mesh.vertices[:, 0]) > 0.9


def test_baselines_refuse_an_empty_mask() -> None:
    picture, setup = ball_setup()
    with pytest.raises(InputError, match="mask is empty"):
        inflated_relief(picture * (1, 1, 1, 0), setup)


def test_baselines_keep_a_speck() -> None:
    picture, setup = ball_setup()
    picture[..., 3] = 0
    picture[11, 13, 3] = 1
    assert topology(*(lambda m: (m.vertices, m.faces))(BASELINES["billboard"](picture, setup)))["components"] == 1


def test_a_written_mesh_comes_back_in_its_world(tmp_path) -> None:
    picture, setup = ball_setup()
    mesh = inflated_relief(picture, setup)
    write_glb(mesh, tmp_path / "mesh.glb")
    again = read_textured(tmp_path / "mesh.glb")
    assert np.allclose(again.vertices.min(0), mesh.vertices.min(0), atol=1e-5)
    assert np.abs(render(again, setup.camera) - render(mesh, setup.camera)).mean() < 0.01


def test_depth_of_a_render_is_along_the_axis() -> None:
    picture, setup = ball_setup()
    rgba, z_depths = render_with_depth(inflated_relief(picture, setup), setup.camera)
    assert z_depths[48, 48] == pytest.approx(12.0, abs=0.02)
    assert (z_depths[rgba[..., 3] == 0] == 0).all()


def truth_as_result(truth: suite.SuiteObject, folder: Path) -> None:
    """The true shape, colored by the picture: what a perfect geometry would give."""
    from conrad_engine.evaluation.baselines import _textured

    folder.mkdir(parents=True, exist_ok=True)
    with np.load(truth.folder / "truth.npz") as arrays:
        vertices, faces = arrays["vertices"].astype(np.float64), arrays["faces"]
    write_glb(_textured(vertices, faces, suite.read_rgba(truth.picture_path), truth.setup), folder / "mesh.glb")


def test_the_true_shape_scores_as_true(small_suite: Path, tmp_path) -> None:
    truth = suite.read_suite(small_suite)[0]
    truth_as_result(truth, tmp_path)
    row = scoring.evaluate_result(tmp_path, truth)
    assert row["novel_iou"] > 0.95 and row["reference_iou"] > 0.97
    assert row["chamfer"] < 0.02 and row["chamfer_unaligned"] < 0.02 and row["f_score"] > 0.99
    assert row["reference_psnr"] > 30 and row["reference_psnr_common"] > 30
    assert row["scale"] == pytest.approx(1, abs=0.02)
    assert row["components"] == 1 and row["manifold_edges"] == 1
    assert len(row["views"]) == 16
    # The picture is on both sides of this stand-in, and that is noticed.
    assert [failure.split()[0] for failure in row["failures"]] == ["print-through"]


def test_scores_tell_a_billboard_from_the_truth(small_suite: Path, tmp_path) -> None:
    truth = suite.read_suite(small_suite)[0]
    truth_as_result(truth, tmp_path)
    good = scoring.evaluate_result(tmp_path, truth)
    flat = scoring.score_mesh(BASELINES["billboard"](suite.read_rgba(truth.picture_path), truth.setup), truth)
    for key in ("novel_psnr", "novel_iou", "f_score"):
        assert flat[key] < good[key]
    assert flat["chamfer"] > 3 * good["chamfer"]


def test_a_printed_back_is_a_failure() -> None:
    row = {"n_faces": 10, "components": 1, "reference_iou": 1.0, "print_through_detail": 0.8}
    assert scoring.find_failures(row) == ["print-through 0.80"]
    assert scoring.find_failures({**row, "truth_print_through_detail": 0.7}) == []
    assert scoring.find_failures({**row, "print_through_detail": None}) == []
    assert scoring.find_failures({**row, "components": 3, "print_through_detail": 0})[0] == "3 components"
    shown_apart = {**row, "components": 2, "picture_parts": 2, "print_through_detail": 0}
    assert scoring.find_failures(shown_apart) == []
    assert scoring.find_failures({**shown_apart, "components": 3}) == ["3 components"]
    assert scoring.find_failures({"n_faces": 0}) == ["no mesh"]


def test_a_pattern_printed_through_is_found(small_suite: Path) -> None:
    """A billboard of a colorful picture shows it on its back: detail correlates fully."""
    truth = suite.read_suite(small_suite)[0]
    y, x = np.mgrid[:64, :64]
    checks = ((x // 5 + y // 5) % 2)[..., None] * np.ones(3)
    picture = np.concatenate([checks, suite.read_rgba(truth.picture_path)[..., 3:]], -1)
    mesh = BASELINES["billboard"](picture, truth.setup)
    from conrad_engine.evaluation import metrics

    back = metrics.back_camera(truth.setup.camera, np.zeros(3))
    view, z_depths = render_with_depth(mesh, back)
    scores = metrics.print_through(view, metrics.printed_through(picture, truth.setup.camera, back, z_depths))
    assert scores["print_through_detail"] > 0.8


def test_nothing_scores_as_an_empty_picture(small_suite: Path) -> None:
    truth = suite.read_suite(small_suite)[0]
    row = scoring.score_mesh(None, truth)
    assert row["novel_iou"] == 0 and row["failures"] == ["no mesh"] and "chamfer" not in row
    white = np.mean([((1 - on) ** 2).mean() for on in [_on_white(v.rgba()) for v in truth.views][:1]])
    assert row["views"][0]["psnr"] == pytest.approx(-10 * np.log10(white))


def _on_white(rgba: np.ndarray) -> np.ndarray:
    return rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]


def test_evaluate_result_needs_a_mesh(small_suite: Path, tmp_path) -> None:
    with pytest.raises(InputError, match="no mesh.glb"):
        scoring.evaluate_result(tmp_path, suite.read_suite(small_suite)[0])


def fake_generate(job, folder: Path, monitor) -> None:
    """Stands for the pipeline: a relief of what the job hands in; leaves marks of what it was asked."""
    rgba = suite.read_rgba(job.picture)
    if job.mask is not None:
        rgba[..., 3] = np.asarray(Image.open(job.mask)) / 255
    write_glb(inflated_relief(rgba, CameraSetup.from_json(job.camera)), folder / "mesh.glb")
    (folder / "checkpoint.pt").write_bytes(b"state")
    asked = {"field_psnr_full": 41.0, "kind": job.config.constraint.kind, "depth": str(job.depth), "pid": os.getpid()}
    (folder / "metrics.json").write_text(json.dumps(asked))


def failing_generate(job, folder: Path, monitor) -> None:
    if "flat" in job.name:
        raise MeshError("the field has no surface")
    fake_generate(job, folder, monitor)


def breaking_generate(job, folder: Path, monitor) -> None:
    if "flat" in job.name:
        raise RuntimeError("a library broke")
    os._exit(9)


@pytest.fixture
def draft():
    return replace(preset("draft"), device="cpu")


def test_a_suite_is_run_scored_and_tabled(small_suite: Path, tmp_path, draft) -> None:
    seen: list[tuple[str, str]] = []
    summaries = evaluate_suite(
        small_suite,
        tmp_path,
        draft,
        ("constraint", "loss", "known_depth", "photo_masked", "relief"),
        limit=1,
        generate=fake_generate,
        on_object=lambda variant, row: seen.append((variant, row["object"])),
    )
    assert len(seen) == 5 and {name for name, _ in seen} == set(summaries)
    # The stand-in is the relief: every number of both agrees.
    for key in ("novel_psnr", "chamfer", "reference_psnr", "detail"):
        assert summaries["constraint"][key] == pytest.approx(summaries["relief"][key])
    assert summaries["constraint"]["field_reference_psnr"] == 41 and "field_reference_psnr" not in summaries["relief"]
    results = json.loads((tmp_path / "results.json").read_text())
    asked = {name: results[name]["objects"][0]["pipeline"] for name in ("constraint", "loss", "known_depth")}
    assert [asked[name]["kind"] for name in asked] == ["inferred_depth", "loss", "known_depth"]
    assert asked["constraint"]["depth"] == "None" and asked["known_depth"]["depth"].endswith("depth.npz")
    text, markdown = (tmp_path / "table.txt").read_text(), (tmp_path / "table.md").read_text()
    assert all(name in text and f"| {name} |" in markdown for name in summaries)
    assert (tmp_path / "sheets" / "constraint_01.png").is_file()
    assert not list(tmp_path.glob("*/*/checkpoint.pt"))


def test_a_run_goes_on_where_it_stopped(small_suite: Path, tmp_path, draft) -> None:
    evaluate_suite(small_suite, tmp_path, draft, limit=1, generate=fake_generate)
    seen: list[str] = []
    summaries = evaluate_suite(
        small_suite, tmp_path, draft, generate=fake_generate, on_object=lambda _, row: seen.append(row["object"])
    )
    assert len(seen) == 1 and summaries["constraint"]["n"] == 2
    with pytest.raises(InputError, match="results of other settings"):
        evaluate_suite(small_suite, tmp_path, replace(draft, seed=5), generate=fake_generate)


def test_one_bad_object_does_not_end_the_suite(small_suite: Path, tmp_path, draft) -> None:
    summary = evaluate_suite(small_suite, tmp_path, draft, generate=failing_generate)["constraint"]
    assert summary["n"] == 2 and summary["n_failures"] >= 1
    assert summary["failures"]["boxes-0001-flat-box"] == ["mesh: the field has no surface"]
    assert summary["worst"][0]["object"] == "boxes-0001-flat-box"


def test_workers_survive_crashes(small_suite: Path, tmp_path, draft) -> None:
    summary = evaluate_suite(small_suite, tmp_path, draft, n_workers=2, generate=breaking_generate)["constraint"]
    assert "a library broke" in summary["failures"]["boxes-0001-flat-box"][0]
    assert "ended with code 9" in summary["failures"]["boxes-0000-tall-box-1"][0]
    assert (tmp_path / "constraint" / "boxes-0001-flat-box" / "traceback.txt").is_file()
    assert len(read_rows(tmp_path / "constraint")) == 2


def test_variants_change_what_they_say() -> None:
    config = preset("standard")
    for variant in VARIANTS.values():
        settings = variant.settings(config)
        assert (settings == config) == (not variant.overrides)
    assert find_variant("no_sds").settings(config).optimize.n_steps == 0
    assert config.optimize.symmetry and not find_variant("no_symmetry").settings(config).optimize.symmetry
    with pytest.raises(InputError, match="unknown variant 'magic'"):
        find_variant("magic")


def test_summary_is_the_mean_and_pools_the_detail() -> None:
    base = {
        "source": "a",
        "failures": [],
        "novel_psnr": 10.0,
        "detail": 0.1,
        "rear_energy": 1.0,
        "truth_rear_energy": 10.0,
    }
    other = {"source": "b", "failures": ["2 components"], "novel_psnr": 20.0, "detail": 2.0, "rear_energy": 2.0}
    rows = [{"object": "x", "chamfer": 0.1, **base}, {"object": "y", "truth_rear_energy": 1.0, **other}]
    summary = tables.summarize(rows)
    assert summary["novel_psnr"] == 15 and summary["chamfer"] == 0.1
    assert summary["detail"] == pytest.approx(3 / 11) and summary["detail_median"] == pytest.approx(1.05)
    assert summary["n_failures"] == 1 and summary["by_source"] == {"a": 10, "b": 20}
    assert [entry["object"] for entry in summary["worst"]] == ["x", "y"]


def test_tables_line_up() -> None:
    cells = tables.table_cells({"a": {"n": 3, "novel_psnr": 18.123}, "longer": {"n": 12}})
    assert cells == [["variant", "objects", "PSNR"], ["a", "3", "18.12"], ["longer", "12", "-"]]
    lines = tables.plain_table(cells).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert tables.markdown_table(cells).splitlines()[1] == "| --- | ---: | ---: |"


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    commands.add_arguments(parser.add_subparsers())
    return parser.parse_args(["evaluate", *map(str, words)])


def test_command_scores_a_result(small_suite: Path, tmp_path, capsys) -> None:
    truth = suite.read_suite(small_suite)[0]
    truth_as_result(truth, tmp_path)
    arguments = parsed(tmp_path, "--truth", truth.folder)
    assert arguments.run(arguments) == 0
    text = capsys.readouterr().out
    assert "novel_psnr" in text and "failures  " in text and "print-through" in text
    commands.run(parsed(tmp_path, "--truth", truth.folder, "--json"))
    assert json.loads(capsys.readouterr().out)["components"] == 1


def test_command_runs_baselines_on_a_suite(small_suite: Path, tmp_path, capsys) -> None:
    words = ["--suite", small_suite, "--out", tmp_path, "--variants", "ellipsoid", "billboard", "--limit", 1]
    assert commands.run(parsed(*words)) == 0
    text = capsys.readouterr().out
    assert "ellipsoid" in text and "billboard" in text and "Novel views" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs one of"),
        (["r", "--suite", "s"], "needs one of"),
        (["r"], "--truth"),
        (["--suite", "s"], "--out"),
        (["--suite", "s", "--out", "o", "--set", "nonsense"], "NAME=VALUE"),
        (["--suite", "s", "--out", "o", "--preset", "best"], "unknown preset"),
        (["--suite", "s", "--out", "o", "--workers", "-1"], "--workers"),
        (["--suite", "s", "--out", "o"], "suite.json"),
    ],
)
def test_command_says_what_is_wrong(words, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        commands.run(parsed(*words))
