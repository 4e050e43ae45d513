"""A folder of pictures into a folder of objects: manifest, side-cars, failures, resuming, several machines, report."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from conrad_engine.batch import (
    DONE,
    FAILED,
    MANIFEST,
    TODO,
    Entry,
    Outcome,
    Task,
    config_from,
    convert,
    find_pictures,
    read_manifest,
    read_task,
    settle,
    write_manifest,
)
from conrad_engine.batch_report import write_report
from conrad_engine.batch_runners import LocalRunner, RayRunner
from conrad_engine.cli import make_parser
from conrad_engine.config import PipelineConfig, with_overrides
from conrad_engine.errors import InputError

from .engine_process import ROOT, WITHIN_S
from .toy_pipeline import expected_value

TOY = "tests.toy_pipeline"
CONFIG = with_overrides(PipelineConfig(), {"optimize.n_steps": 5, "mesh.n_faces": 100, "mesh.texture_size": 64})


def until(is_true: Callable[[], object]) -> None:
    end_s = time.monotonic() + WITHIN_S
    while not is_true():
        assert time.monotonic() < end_s, f"not within {WITHIN_S:g} s"
        time.sleep(0.02)


class Bar:
    """Counts instead of drawing."""

    def __init__(self) -> None:
        self.n = 0

    def update(self, n: int) -> None:
        self.n += n

    def set_postfix_str(self, text: str) -> None:
        pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, name in enumerate(("ape", "bee", "cat", "dog")):
        Image.new("RGB", (40, 30), (60 * number, 100, 200 - 40 * number)).save(folder / f"{name}.png")
    return folder


def run(folder: Path, out: Path, config=CONFIG, devices=("cpu",), retries=1, again=False, **limits) -> dict[str, Entry]:
    out.mkdir(exist_ok=True)
    runner = LocalRunner(list(devices), TOY, out / ".work", limits.get("time_limit_s"))
    bar = Bar()
    try:
        entries = convert(folder, find_pictures(folder, "*"), out, config, runner, retries, again, bar)
    finally:
        runner.close()
    assert bar.n == len(entries)
    return entries


def test_every_picture_becomes_an_object(folder, tmp_path):
    entries = run(folder, tmp_path / "out", devices=("cpu", "cpu"))
    assert [(name, e.state, e.attempts) for name, e in entries.items()] == [
        (n, DONE, 1) for n in ("ape", "bee", "cat", "dog")
    ]
    assert all(e.metrics["value"] == expected_value(5) for e in entries.values())
    assert (tmp_path / "out" / "cat" / "mesh.glb").read_bytes() == b"glTF" + bytes(100)
    assert not (tmp_path / "out" / "cat" / "checkpoint.json").exists()
    assert read_manifest(tmp_path / "out") == entries


def test_what_is_done_is_skipped_until_it_changes(folder, tmp_path):
    out = tmp_path / "out"
    run(folder, out)
    times = {path: path.stat().st_mtime_ns for path in out.glob("*/mesh.glb")}
    run(folder, out)
    assert times == {path: path.stat().st_mtime_ns for path in out.glob("*/mesh.glb")}
    Image.new("RGB", (9, 9), (1, 2, 3)).save(folder / "bee.png")
    (folder / "cat.json").write_text('{"set": {"optimize.n_steps": 7}}')
    (out / "dog" / "mesh.glb").unlink()
    entries = run(folder, out)
    redone = {path.parent.name for path in out.glob("*/mesh.glb") if path.stat().st_mtime_ns != times.get(path)}
    assert redone == {"bee", "cat", "dog"}
    assert entries["cat"].metrics["value"] == expected_value(7)


def test_one_bad_picture_does_not_stop_the_rest(folder, tmp_path):
    (folder / "bee.json").write_text(json.dumps({"prompt": '{"error": "input"}'}))
    (folder / "cat.json").write_text(json.dumps({"prompt": '{"error": "mistake"}'}))
    (folder / "dog.json").write_text(json.dumps({"colour": "red"}))
    entries = run(folder, tmp_path / "out")
    assert entries["ape"].state == DONE
    assert {name: e.code for name, e in entries.items() if e.state == FAILED} == {
        "bee": "input",
        "cat": "internal",
        "dog": "input",
    }
    assert "shows no object" in entries["bee"].message and "dog.json has colour" in entries["dog"].message


def test_failed_pictures_are_tried_again_only_when_asked(folder, tmp_path):
    (folder / "bee.json").write_text(json.dumps({"prompt": '{"error": "input"}'}))
    out = tmp_path / "out"
    run(folder, out)
    assert run(folder, out)["bee"].attempts == 1
    entries = run(folder, out, again=True)
    assert (entries["bee"].state, entries["bee"].attempts) == (FAILED, 1)
    (folder / "bee.json").unlink()
    assert run(folder, out)["bee"].state == DONE


def test_a_process_that_dies_is_replaced_and_its_picture_tried_again(folder, tmp_path):
    (folder / "bee.json").write_text(json.dumps({"prompt": '{"crash_at": 3}'}))
    entries = run(folder, tmp_path / "out", retries=1)
    assert (entries["bee"].state, entries["bee"].code, entries["bee"].attempts) == (FAILED, "lost", 2)
    assert all(entries[name].state == DONE for name in ("ape", "cat", "dog"))


def test_a_picture_that_takes_too_long_is_given_up(folder, tmp_path):
    (folder / "bee.json").write_text(json.dumps({"prompt": '{"hang_at": 3}'}))
    # Long enough for the others, which wait for their process to load, on a busy machine.
    entries = run(folder, tmp_path / "out", time_limit_s=10.0)
    assert (entries["bee"].state, entries["bee"].code) == (FAILED, "timeout")
    assert entries["dog"].state == DONE


def test_a_killed_batch_goes_on_where_it_was(folder, tmp_path):
    out, hold = tmp_path / "out", tmp_path / "hold"
    hold.touch()
    for name in ("ape", "bee", "cat", "dog"):
        behavior = {"checkpoint_every": 1} | ({"hold_at": 5, "hold": str(hold)} if name == "bee" else {})
        settings = {"prompt": json.dumps(behavior), "set": {"optimize.n_steps": 10}}
        (folder / f"{name}.json").write_text(json.dumps(settings))
    code = "import sys; from tests.test_batch import run; from pathlib import Path; run(Path(sys.argv[1]), Path(sys.argv[2]))"
    main = f"if __name__ == '__main__':\n    {code.replace('; run(', '; run(')}"
    script = tmp_path / "script.py"
    script.write_text(main)
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder), str(out)], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    checkpoint = out / ".work" / "bee" / "checkpoint.json"
    until(
        lambda: (
            (out / "ape" / "mesh.glb").exists() and checkpoint.exists() and json.loads(checkpoint.read_text())[0] == 5
        )
    )
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = (out / "ape" / "mesh.glb").stat().st_mtime_ns
    assert read_manifest(out)["ape"].state == DONE and read_manifest(out)["bee"].state == TODO
    hold.unlink()
    entries = run(folder, out)
    assert all(e.state == DONE and e.metrics["value"] == expected_value(10) for e in entries.values())
    assert (out / "ape" / "mesh.glb").stat().st_mtime_ns == before


def test_side_car_settings(folder):
    Image.new("L", (40, 30), 255).save(folder / "mask.bmp")
    camera = {"c2w": [[1, 0, 0, 0]], "intrinsics": [1, 1, 1, 1]}
    side_car = {"preset": "draft", "seed": 7, "mask": "mask.bmp", "camera": camera, "set": {"optimize.n_steps": 3}}
    (folder / "ape.json").write_text(json.dumps(side_car))
    task = read_task(folder, "ape.png", CONFIG)
    assert (task.config["preset"], task.config["seed"], task.config["optimize"]["n_steps"]) == ("draft", 7, 3)
    assert task.mask == (folder / "mask.bmp").read_bytes() and task.camera == camera
    for text, complaint in (
        ("{", "is not JSON"),
        ('{"mask": "none.png"}', "mask of ape.json: none.png cannot be read"),
        ("[1]", "not an object"),
    ):
        (folder / "ape.json").write_text(text)
        with pytest.raises(InputError, match=complaint):
            read_task(folder, "ape.png", CONFIG)


def test_elevations_are_guessed_unless_given():
    def picture_settings(*options: str):
        return config_from(make_parser().parse_args(["batch", "in", "--out", "out", *options])).picture

    assert picture_settings().guess_elevation and picture_settings("--elevation", "auto").guess_elevation
    given = picture_settings("--elevation", "25")
    assert given.elevation_deg == 25 and not given.guess_elevation
    with pytest.raises(InputError, match="elevation must be between"):
        picture_settings("--elevation", "100")


def test_folders_that_cannot_be_converted(folder, tmp_path):
    with pytest.raises(InputError, match="is no folder"):
        find_pictures(tmp_path / "nowhere", "*")
    with pytest.raises(InputError, match="holds no picture"):
        find_pictures(folder, "*.webp")
    Image.new("RGB", (4, 4)).save(folder / "ape.jpg")
    with pytest.raises(InputError, match="several pictures are called 'ape'"):
        find_pictures(folder, "*")


def test_a_foreign_manifest_is_not_overwritten(tmp_path):
    (tmp_path / MANIFEST).write_text('{"version": 99, "items": {}}')
    with pytest.raises(InputError, match="no manifest of this version"):
        read_manifest(tmp_path)
    write_manifest(tmp_path, {"a": Entry("a.png", "f")})
    assert read_manifest(tmp_path) == {"a": Entry("a.png", "f")}


@pytest.mark.parametrize(
    ("attempts", "is_lost", "state"), [(1, True, TODO), (2, True, TODO), (3, True, FAILED), (1, False, FAILED)]
)
def test_only_lost_pictures_are_retried_and_not_for_ever(tmp_path, attempts, is_lost, state):
    outcome = Outcome("a", code="lost", message="gone", is_lost=is_lost)
    assert settle(tmp_path, Entry("a.png", "f", attempts=attempts), outcome, retries=2).state == state


def test_the_report_is_one_page_that_needs_nothing_else(folder, tmp_path):
    (folder / "bee.json").write_text(json.dumps({"prompt": '{"error": "input"}'}))
    (folder / "<b>bold.png").write_bytes((folder / "ape.png").read_bytes())
    run(folder, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "4 done, 1 failed" in page and page.index(">bee<") < page.index(">ape<"), "failures come first"
    assert "the picture shows no object" in page
    assert "<b>bold" not in page and "&lt;b&gt;bold" in page
    sources = re.findall(r"(?:src|href)='([^']*)'", page)
    pictures = [source for source in sources if source.startswith("data:image/jpeg;base64,")]
    links = [source.removeprefix("#") for source in sources if source.startswith("#")]
    assert len(pictures) == 9 and len(links) == 1 and len(sources) == 10, "nothing from outside"
    assert f"id='{links[0]}'" in page
    assert not re.search(r"https?:|url\(|@import|<script|<link", page)


def test_the_report_shows_times_scores_and_warnings_for_people(folder, tmp_path):
    metrics = {
        "mesh_psnr": 37.4567,
        "mesh_iou": 0.99123,
        "n_faces": 19999,
        "manifold_edges": 0.9999,
        "field_psnr_full": float("inf"),
        "seconds_by_stage": {"prepare": 1.0, "optimize": 75.0},
        "warnings": ["a <b>small</b> picture"],
    }
    entries = {
        "ape": Entry("ape.png", "f", DONE, 1, 80.0, "cuda:0", metrics),
        "bee": Entry("bee.png", "f", DONE, 2, 3700.0, "host (ab12cd)", {**metrics, "mesh_psnr": 40.0}),
        "gone": Entry("gone.png", "f", FAILED, code="input", message="it is <gone>"),
        "later": Entry("cat.png", "f"),
    }
    write_report(tmp_path, folder, entries)
    page = (tmp_path / "report.html").read_text()
    assert "2 done, 1 failed, 1 to do" in page and "median mesh against the picture 38.7 dB" in page
    assert "<dd>37.5 dB</dd>" in page and "<dd>19,999</dd>" in page and "<dd>99.99%</dd>" in page
    assert "prepare 1.0 s, optimize 1 min 15 s" in page and "1 h 1 min · host (ab12cd) · attempt 2" in page
    assert (
        "a &lt;b&gt;small&lt;/b&gt; picture" in page
        and "it is &lt;gone&gt;" in page
        and "inf" not in page.split("</style>")[1]
    )


def test_tasks_travel_as_bytes(folder):
    task = read_task(folder, "ape.png", CONFIG)
    assert isinstance(task, Task) and task.picture == (folder / "ape.png").read_bytes()
    assert json.dumps(task.config)


@pytest.mark.slow
def test_a_cluster_loses_a_machine_in_the_middle(tmp_path, monkeypatch):
    """Three machines of a real Ray cluster, one of which is killed while it works."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(9):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(folder / f"{number}.png")
    config = with_overrides(CONFIG, {"prompt": json.dumps({"delay_s": 0.2}), "optimize.n_steps": 10})
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        runner = RayRunner(cluster.address, TOY, None)
        assert runner.n_free() == 3

        class Killer(Bar):
            def update(self, n: int) -> None:
                super().update(n)
                if n and self.n == 2:
                    cluster.remove_node(nodes[1], allow_graceful=False)

        out = tmp_path / "out"
        out.mkdir()
        bar = Killer()
        entries = convert(folder, find_pictures(folder, "*"), out, config, runner, 3, False, bar)
        runner.close()
        assert bar.n == 9 and all(entry.state == DONE for entry in entries.values())
        assert all(entry.metrics["value"] == expected_value(10) for entry in entries.values())
        assert sum(entry.attempts for entry in entries.values()) > 9, "no picture was on the machine that was lost"
        assert len({entry.where for entry in entries.values()}) >= 2
        assert len(list(out.glob("*/mesh.glb"))) == 9
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
def test_the_command_goes_on_on_a_cluster_after_it_was_killed(tmp_path, monkeypatch):
    """As typed: killed when some pictures are done, then the same command again, with one bad picture among them."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder, out, hold = tmp_path / "pictures", tmp_path / "out", tmp_path / "hold"
    folder.mkdir()
    hold.touch()
    for number in range(6):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(folder / f"{number}.png")
        behavior = {"error": "input"} if number == 1 else {"hold_at": 2, "hold": str(hold)} if number > 3 else {}
        (folder / f"{number}.json").write_text(json.dumps({"prompt": json.dumps(behavior)}))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        command = [sys.executable, "-m", "conrad_engine", "batch", str(folder), "--out", str(out), "--pipeline", TOY]
        command += ["--set", "optimize.n_steps=5", "--set", "mesh.texture_size=64", "--ray", cluster.address]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        until(lambda: sum((out / f"{number}" / "mesh.glb").exists() for number in (0, 2, 3)) == 3)
        process.kill()
        process.wait()
        times = {path: path.stat().st_mtime_ns for path in out.glob("*/mesh.glb")}
        assert len(times) == 3
        hold.unlink()
        again = subprocess.run(command, capture_output=True, text=True, timeout=2 * WITHIN_S)
        assert again.returncode == 2 and "failed: 1: the picture shows no object" in again.stdout
        assert "5 of 6 done" in again.stdout and "6/6" in again.stderr, "progress of the whole"
        assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in times.items()), "what is done is left alone"
        assert len(list(out.glob("*/mesh.glb"))) == 5
        assert "5 done, 1 failed" in (out / "report.html").read_text()
    finally:
        cluster.shutdown()
