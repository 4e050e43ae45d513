"""A folder of pictures into a folder of objects: manifest, side-cars, failures, resuming, several machines, report."""

import json
import os
import re
import signal
import subprocess
import sys
import time
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
    convert,
    find_pictures,
    read_manifest,
    read_task,
    settle,
    write_manifest,
)
from conrad_engine.batch_runners import LocalRunner, RayRunner
from conrad_engine.config import PipelineConfig, with_overrides
from conrad_engine.errors import InputError

from .engine_process import ROOT
from .toy_pipeline import expected_value

TOY = "tests.toy_pipeline"
CONFIG = with_overrides(PipelineConfig(), {"optimize.n_steps": 5, "mesh.n_faces": 100, "mesh.texture_size": 64})


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
    entries = run(folder, tmp_path / "out", time_limit_s=3.0)
    assert (entries["bee"].state, entries["bee"].code) == (FAILED, "timeout")
    assert entries["dog"].state == DONE


def test_a_killed_batch_goes_on_where_it_was(folder, tmp_path):
    out = tmp_path / "out"
    slow = json.dumps({"delay_s": 0.1, "checkpoint_every": 1})
    for name in ("ape", "bee", "cat", "dog"):
        (folder / f"{name}.json").write_text(json.dumps({"prompt": slow, "set": {"optimize.n_steps": 10}}))
    code = "import sys; from tests.test_batch import run; from pathlib import Path; run(Path(sys.argv[1]), Path(sys.argv[2]))"
    main = f"if __name__ == '__main__':\n    {code.replace('; run(', '; run(')}"
    script = tmp_path / "script.py"
    script.write_text(main)
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder), str(out)], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    end_s = time.monotonic() + 30
    while not (out / "ape" / "mesh.glb").exists() or not (out / ".work" / "bee" / "checkpoint.json").exists():
        assert time.monotonic() < end_s
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = (out / "ape" / "mesh.glb").stat().st_mtime_ns
    reached = json.loads((out / ".work" / "bee" / "checkpoint.json").read_text())[0]
    assert reached >= 1
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
        ('{"mask": "none.png"}', "none.png cannot be read"),
        ("[1]", "not an object"),
    ):
        (folder / "ape.json").write_text(text)
        with pytest.raises(InputError, match=complaint):
            read_task(folder, "ape.png", CONFIG)


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
    assert len(sources) == 9 and all(source.startswith("data:image/jpeg;base64,") for source in sources)


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
