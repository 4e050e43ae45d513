"""The benchmark measures what it says it does: sizes are tiny here, figures mean nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conrad_engine.benchmark import assets, engine, fields, networks, shared, steps
from conrad_engine.benchmark.__main__ import main
from conrad_engine.benchmark.ceilings import Ceilings, count_flop, measure_ceilings
from conrad_engine.benchmark.fields import SMALL_GRID, check_backend
from conrad_engine.benchmark.guidance import unet_inputs
from conrad_engine.benchmark.peer import PeerStep
from conrad_engine.benchmark.report import Report, Row, Timing, format_row, measure
from conrad_engine.config import FieldConfig
from conrad_engine.errors import InputError
from conrad_engine.fields.hash_grid import HashGrid
from conrad_engine.fields.radiance_field import HashField
from conrad_engine.guidance.frozen_encoder import rewrite_encoder
from conrad_engine.guidance.interfaces import SplitGuidance
from conrad_engine.monitor import Command, Progress

from .host_reads import HostReads

CPU = torch.device("cpu")


@pytest.fixture
def report() -> Report:
    return Report(CPU, is_small=True, budget_s=0.0)


def test_measure_warms_up_and_stops_at_its_limits() -> None:
    calls: list[int] = []
    timing = measure(lambda: calls.append(1), CPU, n_calls=7, warm_up=2, budget_s=100)
    assert timing.n_calls == 7 and len(calls) == 9
    assert 0 <= timing.low_ms <= timing.median_ms <= timing.high_ms
    assert measure(lambda: None, CPU, n_calls=1000, budget_s=0).n_calls == 3


def test_measure_reads_the_clock_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 10.0, 10.5, 11.0, 13.0, 14.0, 15.0, 15.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    timing = measure(lambda: None, CPU, n_calls=3, warm_up=0, budget_s=100)
    assert timing == Timing(1000.0, 500.0, 2000.0, 3)


def test_a_measurement_that_fails_becomes_a_row_and_the_others_go_on(report: Report, capsys) -> None:
    def fails() -> None:
        raise RuntimeError("CUDA out of memory\nlong text")

    report.begin("section", "explained")
    assert report.time("large", fails) is None
    assert report.time("small", lambda: None) is not None
    rows = report.to_json()["sections"]["section"]
    assert rows[0]["error"] == "RuntimeError: CUDA out of memory" and rows[0]["timing"] is None
    assert rows[1]["timing"]["n_calls"] == 3
    assert "not measured: RuntimeError: CUDA out of memory" in capsys.readouterr().out


def test_rows_go_to_the_section_that_began_last(report: Report) -> None:
    for section, name in (("one", "a"), ("two", "b"), ("one", "c")):
        report.begin(section, "explained")
        report.add(Row(name))
    found = {name: [row["name"] for row in rows] for name, rows in report.to_json()["sections"].items()}
    assert found == {"one": ["a", "c"], "two": ["b"]}


def test_mistakes_of_the_benchmark_itself_are_not_hidden(report: Report) -> None:
    report.begin("section", "explained")
    with pytest.raises(TypeError):
        report.time("wrong", lambda: 1 + "1")  # type: ignore[operator]


def test_captured_rows_exist_on_cuda_only(report: Report) -> None:
    report.begin("section", "explained")
    assert report.time("x", lambda: None, is_captured=True) is None
    assert report.to_json()["sections"]["section"] == []


def test_a_row_shows_figures_floor_and_ratio() -> None:
    line = format_row(Row("grid", Timing(3.0, 2.5, 4.0, 9), floor_ms=1.5, notes={"error": 1.25e-4}))
    assert line.split() == ["grid", "3.000", "2.500", "4.000", "1.500", "2.0", "error", "0.000125"]


def test_floor_is_the_larger_of_moving_and_multiplying() -> None:
    ceilings = Ceilings(1e9, {torch.bfloat16: 1e12})
    assert ceilings.floor_ms(n_bytes=2e6, flop=1e9) == pytest.approx(2.0)
    assert ceilings.floor_ms(n_bytes=2e6, flop=5e9) == pytest.approx(5.0)


def test_operations_of_a_product_forward_and_backward() -> None:
    a, b = torch.randn(4, 5, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    assert count_flop(lambda: (a @ b).sum().backward()) == 3 * 2 * 4 * 5 * 6


def test_fields_section(report: Report) -> None:
    fields.run(report, measure_ceilings(report))
    sections = report.to_json()["sections"]
    (errors,) = sections["hash grid, errors"]
    assert set(errors["notes"]) == {"output", "gradient to table", "gradient to positions"}
    assert all(0 < error < 1e-4 for error in errors["notes"].values())
    assert [row["name"] for row in sections["hash grid"]] == ["torch, forward", "torch, forward + backward"]
    assert all(row["timing"]["median_ms"] > row["floor_ms"] > 0 for row in sections["hash grid"])
    (errors,) = sections["heads, errors"]
    assert set(errors["notes"]) == {"output", "gradient to features", "gradient to parameters"}
    assert all(0 < error < 1e-4 for error in errors["notes"].values())
    assert [row["name"] for row in sections["heads"]] == ["layers, forward", "layers, forward + backward"]
    assert len(sections["render"]) == 2 and not any(row["error"] for rows in sections.values() for row in rows)


def test_a_backend_that_is_replaced_is_not_timed_under_its_name() -> None:
    with pytest.raises(RuntimeError, match="triton is not usable"):
        check_backend(HashGrid(replace(SMALL_GRID, encoder="triton")), CPU)


def check_static(step: steps.StaticStep) -> None:
    """It moves the field, and a CUDA graph could hold it."""
    before = [p.detach().clone() for p in step.field.parameters()]
    step()
    moved = [not torch.equal(old, new) for old, new in zip(before, step.field.parameters())]
    assert all(moved)
    # Adam reads its step counter on a CPU; on CUDA it is told to stay on the device.
    step.adam.step = lambda: None  # type: ignore[method-assign]
    with HostReads() as reads:
        step()
    assert reads.found == []


def test_embedded_step_can_be_captured() -> None:
    torch.manual_seed(0)
    prior, _ = networks.embedded_prior(CPU, torch.float32)
    volume = FieldConfig(kind="dense_volume", resolution=16, coarsest=16)
    check_static(steps.StaticStep(volume, steps.RaySettings(64, 4), 1, steps.embedded_loss(prior), CPU))


@pytest.mark.parametrize("model", [networks.SD21, networks.ZERO123], ids=lambda model: model.name)
def test_latent_step_can_be_captured(model: networks.LatentModel) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    unet, vae = (make(model) for make in (small_unet, small_autoencoder))
    rewrite_encoder(vae)
    inputs = unet_inputs(model, CPU, torch.float32, is_small=True)
    loss = steps.latent_loss(model, unet, networks.Encoder(vae), inputs, 64, torch.channels_last)
    check_static(steps.StaticStep(SMALL_GRID, steps.RaySettings(16, 8), model.n_views, loss, CPU))


def small_unet(model: networks.LatentModel):
    return networks.make_unet(model, CPU, torch.float32, is_small=True)


def small_autoencoder(model: networks.LatentModel):
    return networks.make_autoencoder(CPU, torch.float32, is_small=True)


@pytest.mark.slow
def test_published_sizes() -> None:
    """Parameters as counted on the published models."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    meta = torch.device("meta")
    for model, millions in ((networks.SD21, 865.9), (networks.ZERO123, 859.5)):
        unet = networks.make_unet(model, meta, torch.float16, is_small=False)
        assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    vae = networks.make_autoencoder(meta, torch.float16, is_small=False)
    assert sum(p.numel() for p in vae.parameters()) / 1e6 == pytest.approx(83.7, abs=0.1)


def test_peer_step_moves_its_field_and_leaves_empty_space_out() -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    unet, vae = small_unet(networks.SD21), small_autoencoder(networks.SD21)
    inputs = unet_inputs(networks.SD21, CPU, torch.float32, is_small=True)
    loss = steps.latent_loss(networks.SD21, unet, networks.Encoder(vae), inputs, 64, torch.contiguous_format)
    field = HashField(SMALL_GRID, fields.unit_box(CPU))
    before = field.encoding.table.detach().clone()
    step = PeerStep(field, loss, CPU, is_small=True)
    step()
    assert not torch.equal(before, field.encoding.table)
    assert 0 < step.n_kept < 16 * 16 * 32


def test_job_rows() -> None:
    parts = {"prepare": 1.0, "optimize": 4.0, "finish": 2.0}
    finish_s = {"surface": 1.5, "pictures": 0.5}
    figures = assets.JobFigures(10.0, parts, 1.5, 0.0, glb_s=9.0, finish_s=finish_s, n_steps=100)
    row = assets.job_row("draft", figures)
    assert row.notes["picture to GLB s"] == 9.0 and row.notes["finish: surface s"] == 1.5
    assert row.notes["wall s"] == 10.0 and row.notes["start s"] == 3.0 and "GPU GiB" not in row.notes
    assert row.notes["optimize: steps/s"] == 25.0
    failed = assets.job_row("draft", assets.JobFigures(1.0, {}, 0.2, 0.0, "no such file"))
    assert failed.error == "no such file" and failed.timing is None


@pytest.mark.slow
def test_a_job_that_fails_says_why(tmp_path: Path) -> None:
    figures = assets.run_job(tmp_path / "missing.png", "draft", "cpu", 1)
    assert "missing.png" in figures.error and not figures.parts_s


@pytest.mark.slow
def test_a_cap_too_small_stops_the_job(tmp_path: Path) -> None:
    picture = assets.drawn_picture(tmp_path / "figure.png", 64)
    assert assets.run_job(picture, "draft", "cpu", 1, cap_gib=0.05).error


@pytest.mark.slow
def test_engine_section(report: Report) -> None:
    engine.run(report)
    rows = report.to_json()["sections"]["engine process"]
    timed = [row["timing"]["n_calls"] for row in rows if row["timing"]]
    assert timed[:2] == [2, 20] and timed[2] >= 1 and timed[3:] == [timed[2], 1, 1, 5]
    assert all(row["timing"]["median_ms"] > 0 for row in rows if row["timing"])
    assert rows[1]["notes"]["p99 ms"] >= rows[1]["timing"]["median_ms"]
    whole, asked, step, alone, watched, cost, _ = rows[2:]
    assert 0 < whole["notes"]["of that rendering ms"] <= whole["timing"]["high_ms"]
    assert whole["timing"]["median_ms"] <= asked["timing"]["median_ms"]
    assert step["notes"]["ms"] > 0 and 0 < cost["notes"]["rendering percent"] < 100 and cost["notes"]["previews"] >= 1


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert engine.percentile(values, 0.99) == 99 and engine.percentile(values, 1.0) == 100
    assert engine.percentile([5.0], 0.99) == 5.0


def test_command_line_writes_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(report: Report, ceilings: Ceilings) -> None:
        report.begin("hash grid", "explained")
        report.add(Row("torch", Timing(1.0, 1.0, 1.0, 3)))

    monkeypatch.setattr(fields, "run", fake)
    target = tmp_path / "figures.json"
    assert main(["field", "--device", "cpu", "--threads", "1", "--small", "--json", str(target)]) == 0
    data = json.loads(target.read_text())
    assert data["sections"]["hash grid"][0]["timing"]["median_ms"] == 1.0
    assert [row["name"] for row in data["sections"]["ceilings"]][-1] == "copy of 16 MiB"
    assert data["machine"]["threads"] == 1 and data["is_small"] is True


def test_command_line_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["speed"])
    assert stop.value.code == 2
    assert main(["field", "--device", "toaster"]) == 2
    assert "toaster" in capsys.readouterr().err


@pytest.mark.parametrize("model", [networks.SD21, networks.ZERO123])
def test_a_jobs_steps_with_a_latent_model_of_random_weights(model):
    pytest.importorskip("diffusers")
    unet = networks.make_unet(model, CPU, torch.float32, is_small=True)
    vae = networks.make_autoencoder(CPU, torch.float32, is_small=True)
    prior = steps.RandomLatentPrior(model, unet, vae, steps.unet_inputs(model, CPU, torch.float32, True), 64)
    assert isinstance(prior, SplitGuidance)
    step = steps.job_step(steps.latent_job(model, is_small=True), prior, CPU)
    before = [p.detach().clone() for p in step.state.field.parameters()]
    terms = step()
    assert {"sds", "mask", "entropy"} <= set(terms) and all(torch.isfinite(value) for value in terms.values())
    assert step.state.step == 2001 and step.state.n_skipped == 0
    assert any(not torch.equal(a, b) for a, b in zip(before, step.state.field.parameters()))
    step.graphed._wants_capture = True  # static shapes
    drawn = step._draw()
    with HostReads() as reads:
        step._on_device(*drawn)
    assert reads.found == []


def test_a_stopwatch_times_the_steps_it_is_told_and_ends_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 14.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    watch = shared.Stopwatch(first=20, last=30)
    for step in range(1, 31):
        assert watch.command() is Command.RUN
        watch.progress(Progress("mesh", step, 100))
        watch.progress(Progress("optimize", step, 100))
    assert watch.seconds == 4.0 and watch.command() is Command.CANCEL


@pytest.mark.slow
def test_steps_shared_by_two_processes_are_timed_beside_one(report: Report) -> None:
    shared.run(report, n_gpus=2)
    alone, together = report.to_json()["sections"]["shared"]
    assert alone["notes"]["x one"] == 1.0 and together["notes"]["x one"] > 0 and not together["error"]


def test_gpus_that_are_not_there_are_named(report: Report, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def refuses(*arguments: object) -> float:
        raise InputError("this machine shows 1 GPUs")

    monkeypatch.setattr(shared, "timed_steps", refuses)
    shared.run(report, n_gpus=2)
    assert "not measured: this machine shows 1 GPUs" in capsys.readouterr().out
