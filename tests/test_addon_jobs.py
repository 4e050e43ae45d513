"""The add-on's job table and batch list, without Blender and without an engine."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blender_addon import batch
from blender_addon.camera_math import setup_json
from blender_addon.jobs import JobTable, Notes, clock, is_setup
from blender_addon.protocol import JobState, Progress, Submit, new_job_id


def state(job: str, revision: int, name: str, **fields) -> JobState:
    return JobState(job, revision, name, **fields)


def test_messages_move_a_job_through_its_life(tmp_path):
    table = JobTable(tmp_path)
    job = table.add(Notes(new_job_id(), "chair"))
    assert job.is_active and job.status() == "Sending" and table.shown() is job
    table.take_state(state(job.id, 1, "queued", position=2))
    assert "2 before it" in job.status()
    table.take_state(state(job.id, 2, "running"))
    table.take_progress(Progress(job.id, 1, "optimize", 30, 120, eta_s=75.4))
    assert job.status() == "Optimizing 30/120 - 1:15 left" and 0.1 < job.factor < 0.5
    table.take_state(state(job.id, 3, "done", result=1, parts=("arrays",)))
    assert job.factor == 1 and not job.is_active and job.is_waiting and table.shown() is None
    table.imported(job, 1)
    assert not job.is_waiting
    table.take_state(state(job.id, 4, "done", result=2))
    assert job.is_waiting, "extracting again makes a new result"


def test_the_bar_never_runs_backwards():
    table, factors = JobTable(), []
    job = table.take_state(state("a" * 32, 1, "running"))
    stages = ("decode", "prepare", "warm_start", "optimize", "mesh", "write")
    for number, (stage, step) in enumerate((stage, step) for stage in stages for step in range(5)):
        table.take_progress(Progress(job.id, number, stage, step, 4))
        factors.append(job.factor)
    assert factors == sorted(factors) and factors[0] == 0 and factors[-1] == 1


def test_old_news_change_nothing():
    table = JobTable()
    job = table.take_state(state("a" * 32, 5, "done", result=1))
    table.take_state(state("a" * 32, 4, "running"))
    assert job.state_name == "done"
    table.take_progress(Progress("a" * 32, 9, "optimize", 1, 2))
    assert job.progress is None
    assert table.take_progress(Progress("b" * 32, 1, "optimize", 1, 2)) is None


def test_a_failed_job_keeps_its_message_until_it_runs_again():
    table = JobTable()
    job = table.take_state(state("a" * 32, 1, "failed", error_message="no object"))
    assert job.status() == "no object"
    job.problem = "The import failed"
    table.take_state(state("a" * 32, 2, "running"))
    assert job.status() == "Starting"


@given(st.lists(st.sampled_from(["queued", "running", "paused", "done", "failed", "cancelled"]), max_size=8))
def test_status_is_always_one_short_line(states):
    table = JobTable()
    for revision, name in enumerate(states):
        job = table.take_state(state("c" * 32, revision, name, error_message="why"))
        table.take_progress(Progress("c" * 32, revision, "mesh", 1, 3, eta_s=None))
        assert job.status() and "\n" not in job.status() and 0 <= job.factor <= 1


def test_notes_survive_and_damage_costs_one_line(tmp_path):
    table = JobTable(tmp_path)
    first = table.add(Notes("1" * 32, "a", location=(1.0, 2.0, 3.0), size=0.5, submitted_unix_s=2.0))
    table.add(Notes("2" * 32, "b", submitted_unix_s=1.0))
    (tmp_path / ("3" * 32 + ".json")).write_text("{broken")
    (tmp_path / ("4" * 32 + ".json")).write_text(json.dumps({"name": "without job"}))
    (tmp_path / ("5" * 32 + ".json")).write_text(json.dumps({"job": "5" * 32, "of_the_future": 1}))
    again = JobTable(tmp_path)
    assert [job.name for job in again.jobs.values()] == ["55555555", "b", "a"]
    assert again.jobs["1" * 32].notes == first.notes
    assert not again.jobs["1" * 32].is_active and "Engine Runs" in again.jobs["1" * 32].status()
    again.remove("1" * 32)
    assert "1" * 32 not in JobTable(tmp_path).jobs


def test_a_job_that_was_not_sent_is_kept_until_the_engine_has_it(tmp_path):
    table = JobTable(tmp_path)
    request = Submit(new_job_id(), "pot", picture=b"bytes", pixels=None, c2w=(1.0,) * 16)
    table.keep_request(request)
    (tmp_path / "damaged.unsent").write_bytes(b"1234567890")
    kept = JobTable(tmp_path).unsent()
    assert list(kept) == [request.job] and bytes(kept[request.job].picture) == b"bytes"
    assert kept[request.job].c2w == request.c2w
    table.confirmed(request.job)
    assert JobTable(tmp_path).unsent() == {}


def test_a_file_that_cannot_be_removed_keeps_no_message_from_its_job(tmp_path, monkeypatch):
    def refuse(path, missing_ok=False):
        raise PermissionError("another program reads it")

    table = JobTable(tmp_path)
    table.keep_request(Submit(new_job_id(), "pot", picture=b"bytes"))
    job = table.add(Notes("1" * 32, "pot"))
    monkeypatch.setattr(Path, "unlink", refuse)
    table.confirmed(job.id)
    table.remove(job.id)
    assert not table.jobs


def test_a_camera_from_a_file_is_whole_or_none():
    whole = setup_json(np.eye(4), (50.0, 50.0, 32.0, 24.0), 64, 48, np.zeros(3), 1.0)
    assert is_setup(whole) and is_setup(json.loads(json.dumps(whole)))
    for name, bad in (("c2w", 5), ("c2w", [[1, 0, 0, 0]] * 3), ("intrinsics", [1, 2, 3]), ("object_center", [0, 0, None]),
                      ("width", 0), ("object_size", "large")):  # fmt: skip
        assert not is_setup({**whole, name: bad}), (name, bad)
    for name in whole:
        assert not is_setup({key: value for key, value in whole.items() if key != name}), name
    assert not is_setup([whole]) and not is_setup(None)


def test_clock():
    assert [clock(s) for s in (0, 59.6, 75, 3725)] == ["0:00", "1:00", "1:15", "1:02:05"]


# Batch


def pictures(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_a_folder_is_listed_once_and_resumed(tmp_path):
    pictures(tmp_path / "in", "b.png", "a.JPG", "sub/c.webp", "notes.txt", ".hidden.png")
    opened = batch.open_batch(tmp_path / "in", "*.png *.jpg *.webp", tmp_path / "out", "GLB")
    assert [item.picture for item in opened.items] == ["a.JPG", "b.png", "sub/c.webp"]
    opened.items[0].state, opened.items[0].output = batch.DONE, "a.glb"
    opened.items[1].state, opened.items[1].job = batch.SENT, "f" * 32
    opened.save()
    pictures(tmp_path / "in", "d.png")
    (tmp_path / "in" / "sub" / "c.webp").unlink()
    again = batch.open_batch(tmp_path / "in", "*.png *.jpg *.webp", tmp_path / "out", "GLB")
    assert [(item.picture, item.state) for item in again.items] == [
        ("a.JPG", batch.DONE),
        ("b.png", batch.SENT),
        ("d.png", batch.WAITING),
    ]
    assert again.by_job("f" * 32).picture == "b.png" and again.next_waiting().picture == "d.png"
    assert not again.is_finished and again.counts[batch.DONE] == 1
    again.items[0].retry()
    again.save()
    assert json.loads((tmp_path / "out" / batch.LIST_NAME).read_text())["items"][0]["state"] == batch.WAITING


def test_a_search_that_nobody_waits_for_writes_nothing(tmp_path):
    pictures(tmp_path / "in", "a.png", "sub/b.png")
    for n_answers in (0, 1, 2):
        answers = iter([True] * n_answers + [False])
        with pytest.raises(batch.BatchError, match="was stopped"):
            batch.open_batch(tmp_path / "in", "*.png", tmp_path / "out", "GLB", answers.__next__)
        assert not (tmp_path / "out").exists(), f"after {n_answers} folders"


def test_a_list_that_threads_write_at_once_is_whole_and_the_newest(tmp_path):
    opened = batch.Batch(tmp_path, tmp_path / "out", [batch.Item(f"{k}.png") for k in range(300)])
    threads = []
    for item in opened.items[:40]:
        item.state = batch.DONE
        threads.append(threading.Thread(target=opened.save))
        threads[-1].start()
    for thread in threads:
        thread.join()
    items = json.loads((tmp_path / "out" / batch.LIST_NAME).read_text())["items"]
    assert [item["state"] for item in items] == [item.state for item in opened.items]


def test_what_is_written_is_no_input(tmp_path):
    pictures(tmp_path, "a.png", "results/texture.png")
    opened = batch.open_batch(tmp_path, "*.png", tmp_path / "results", "GLB")
    assert [item.picture for item in opened.items] == ["a.png"]


def test_unusable_folders_and_lists_say_why(tmp_path):
    with pytest.raises(batch.BatchError, match="is no folder"):
        batch.open_batch(tmp_path / "none", "*", tmp_path / "out", "GLB")
    pictures(tmp_path / "in", "a.png")
    with pytest.raises(batch.BatchError, match="No picture"):
        batch.open_batch(tmp_path / "in", "*.jpg", tmp_path / "out", "GLB")
    batch.open_batch(tmp_path / "in", "*", tmp_path / "out", "GLB")
    pictures(tmp_path / "other", "a.png")
    with pytest.raises(batch.BatchError, match="belongs to the pictures in"):
        batch.open_batch(tmp_path / "other", "*", tmp_path / "out", "GLB")
    (tmp_path / "out" / batch.LIST_NAME).write_text("{")
    with pytest.raises(batch.BatchError, match="is damaged"):
        batch.open_batch(tmp_path / "in", "*", tmp_path / "out", "GLB")
    (tmp_path / "file").write_text("")
    with pytest.raises(batch.BatchError, match="cannot be written"):
        batch.open_batch(tmp_path / "in", "*", tmp_path / "file" / "out", "GLB")


def test_another_output_does_finished_pictures_again(tmp_path):
    pictures(tmp_path / "in", "a.png")
    opened = batch.open_batch(tmp_path / "in", "*", tmp_path / "out", "GLB")
    opened.items[0].state = batch.DONE
    opened.save()
    assert batch.open_batch(tmp_path / "in", "*", tmp_path / "out", "LIBRARY").items[0].state == batch.WAITING


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1]", "must be a JSON object"),
        ("{", "cannot be read as JSON"),
        ('{"colour": 1}', "unknown setting 'colour'"),
        ('{"seed": "x"}', "seed must be int"),
        ('{"size": true}', "size must be float"),
        ('{"camera": {"c2w": 5}}', "camera must have c2w"),
    ],
)
def test_side_cars_are_checked(tmp_path, text, reason):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(batch.BatchError, match=reason):
        batch.sidecar(tmp_path / "a.png")


def test_a_side_car_is_read_and_may_be_missing(tmp_path):
    assert batch.sidecar(tmp_path / "a.png") == {}
    (tmp_path / "a.json").write_text('{"seed": 3, "size": 2, "overrides": {"optimize.n_steps": 5}}')
    assert batch.sidecar(tmp_path / "a.png") == {"seed": 3, "size": 2, "overrides": {"optimize.n_steps": 5}}
    (tmp_path / "a.json").write_text('{"elevation_deg": "auto"}')
    assert batch.sidecar(tmp_path / "a.png") == {"elevation_deg": batch.AUTO}


def test_all_that_belongs_to_a_picture_is_read_at_once(tmp_path):
    pictures(tmp_path, "a.png", "mask.png")
    (tmp_path / "a.json").write_text('{"mask": "mask.png"}')
    assert batch.read_source(tmp_path / "a.png", 1) == batch.Source(b"x", {"mask": "mask.png"}, b"x")
    (tmp_path / "mask.png").write_bytes(bytes(3_000_000))
    with pytest.raises(batch.BatchError, match="mask.png has 3 MB: at most 2 MB are sent"):
        batch.read_source(tmp_path / "a.png", 2_000_000)
    (tmp_path / "mask.png").unlink()
    with pytest.raises(batch.BatchError, match="mask.png cannot be read: No such file"):
        batch.read_source(tmp_path / "a.png", 1)


def test_names_and_places_are_distinct():
    names = ("sub/a.b.png", "cup.png", "cup.jpg", "x/y.png", "x_y.png")
    opened = batch.Batch(Path(), Path(), [batch.Item(name) for name in names])
    found = [batch.output_name(opened, item, ".glb") for item in opened.items]
    assert found == ["sub_a.b.glb", "cup_png.glb", "cup_jpg.glb", "x__y_png.glb", "x_y_png.glb"]
    places = {batch.grid_place(k, 7, 1.5) for k in range(7)}
    assert len(places) == 7 and max(abs(x) for x, _, _ in places) == 1.5
