"""The real server process with real worker processes and clients; only the optimisation is a toy that counts."""

import dataclasses
import io
import json
import re
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from conrad_engine.protocol import (
    CANCELLED,
    DONE,
    FAILED,
    PAUSED,
    PROTOCOL_VERSION,
    QUEUED,
    RUNNING,
    Array,
    Cancel,
    Continue,
    Extract,
    Fetch,
    Forget,
    FreeMemory,
    JobState,
    Keep,
    ListJobs,
    Pause,
    Preview,
    Progress,
    RequestRefused,
    Resume,
    SetPreview,
    Submit,
    new_job_id,
)
from conrad_engine.server.dispatch import DECODE_LIMIT_S
from conrad_engine.server.inputs import read_inputs
from conrad_engine.server.store import Store

from .engine_process import (
    WITHIN_S,
    picture,
    running,
    toy_job,
    until,
    until_message,
    until_state,
    until_step,
)
from .toy_pipeline import expected_value

SLOWLY = json.dumps({"delay_s": 0.02, "checkpoint_every": 5})


def test_a_job_from_picture_to_mesh(client):
    job = toy_job(steps=30, n_faces=128, texture_size=64)
    client.request(job)
    state = client.wait(job.job, WITHIN_S)
    assert (state.state, state.step, state.n_steps_set, state.result) == (DONE, 30, 30, 1)
    assert state.metrics == {"value": expected_value(30), "steps": 30, "nested.psnr": 30.0}
    assert state.parts == ("arrays", "mesh.glb", "sheet.png")
    result = client.fetch(job.job)
    faces = np.frombuffer(result.faces.data, result.faces.dtype).reshape(result.faces.shape)
    assert faces.shape == (128, 3) and faces.max() < result.vertices.shape[0]
    assert result.texture.shape == (64, 64, 3)
    assert bytes(client.fetch(job.job, "mesh.glb").data) == b"glTF" + bytes(128)


def test_progress_comes_and_only_the_newest(client):
    job = toy_job(steps=40, behavior=json.dumps({"delay_s": 0.01}))
    client.send(job)
    time.sleep(1.5)  # Nobody reads meanwhile.
    progress = [message for message in client.poll() if isinstance(message, Progress) and message.job == job.job]
    assert len(progress) <= 1
    assert client.wait(job.job, WITHIN_S).state == DONE


def test_every_change_of_state_is_told(client):
    job = toy_job(steps=5)
    seen = []
    client.send(job)
    client.wait(job.job, WITHIN_S, seen.append)
    states = [(m.state, m.revision) for m in seen if isinstance(m, JobState) and m.job == job.job]
    # The list that `wait` asks for may tell one of them again.
    assert list(dict.fromkeys(states)) == [(QUEUED, 1), (RUNNING, 2), (DONE, 3)]


def test_a_job_sent_twice_is_one_job(client):
    job = toy_job(steps=5)
    client.request(job)
    client.request(job)
    client.wait(job.job, WITHIN_S)
    assert client.request(job).job == job.job
    assert client.jobs[job.job].revision == 3


def test_pause_resume_and_cancel(client):
    job = toy_job(steps=40_000, behavior=SLOWLY)
    client.request(job)
    until_step(client, job.job, 5)
    client.request(Pause(job.job))
    assert until_state(client, job.job, PAUSED).state == PAUSED
    client.request(Resume(job.job))
    assert until_state(client, job.job, RUNNING).state == RUNNING
    client.request(Cancel(job.job))
    assert until_state(client, job.job, CANCELLED).state == CANCELLED
    with pytest.raises(RequestRefused, match="no result yet: it is cancelled") as caught:
        client.fetch(job.job)
    assert caught.value.code == "no_result"


def test_stop_and_keep_then_continue_then_extract_again(client):
    job = toy_job(steps=40_000, behavior=SLOWLY)
    client.request(job)
    until_step(client, job.job, 8)
    client.request(Keep(job.job))
    kept = until_state(client, job.job, DONE)
    assert 8 <= kept.step < 40_000 and kept.metrics["value"] == expected_value(kept.step)
    client.request(Continue(job.job, 40_000))  # It has so many steps set and stopped before.
    until_state(client, job.job, QUEUED, RUNNING)
    client.request(Keep(job.job))
    until_state(client, job.job, DONE)
    client.request(Extract(job.job, n_faces=256, texture_size=128, resolution=64))
    until_state(client, job.job, QUEUED, RUNNING)
    again = until_state(client, job.job, DONE)
    assert (again.n_faces, again.texture_size, again.result) == (256, 128, 3)
    assert again.metrics["value"] == expected_value(again.step)
    assert client.fetch(job.job).texture.shape == (128, 128, 3)


def test_more_steps_go_on_from_the_end(client):
    job = toy_job(steps=10)
    client.request(job)
    client.wait(job.job, WITHIN_S)
    client.request(Continue(job.job, 25))
    until(client, lambda: client.jobs[job.job].result == 2)
    assert client.jobs[job.job].metrics["value"] == expected_value(25)


def test_previews_come_from_the_clients_own_camera(client):
    job = toy_job(steps=40_000, behavior=SLOWLY)
    client.request(job)
    c2w = (1.0, 0, 0, 0, 0, 0, -1, -3, 0, 1, 0, 0, 0, 0, 0, 1)
    client.request(SetPreview(job.job, True, 7, c2w, (50.0, 50.0, 16.0, 12.0), 32, 24))
    preview = until_message(client, lambda m: isinstance(m, Preview))
    assert (preview.serial, preview.rgb.shape, preview.c2w) == (7, (24, 32, 4), c2w)
    client.request(SetPreview(job.job, True, 8, width=64, height=64))
    turned = until_message(client, lambda m: isinstance(m, Preview) and m.serial == 8)
    assert turned.rgb.shape == (64, 64, 4) and len(turned.c2w) == 16
    client.request(SetPreview(job.job, False))
    client.request(Cancel(job.job))
    until_state(client, job.job, CANCELLED)


def test_pixels_masks_depth_and_start_mesh_arrive(client, engine):
    job = Submit(
        new_job_id(),
        pixels=Array("u1", (2, 3, 4), bytes(range(24))),
        mask_pixels=Array("u1", (2, 3), bytes([255] * 6)),
        depth_pixels=Array("<f4", (2, 3), bytes(24)),
        init_vertices=Array("<f4", (3, 3), np.eye(3, dtype="<f4").tobytes()),
        init_faces=Array("<i4", (1, 3), np.arange(3, dtype="<i4").tobytes()),
        overrides={"optimize.n_steps": 2},
        texture_size=64,
        n_faces=100,
    )
    client.request(job)
    assert client.wait(job.job, WITHIN_S).state == DONE


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"job": "../../etc"}, "32 hexadecimal digits"),
        ({"picture": None}, "needs a picture"),
        ({"picture": b""}, "the picture has 0 bytes"),
        ({"pixels": Array("u1", (1, 1, 3), b"abc")}, "either its file's bytes or its pixels"),
        ({"preset": "golden"}, "unknown preset 'golden'"),
        ({"guidance": "magic"}, "unknown guidance 'magic'"),
        ({"overrides": {"mesh.colour": 1}}, "unknown setting 'mesh.colour'"),
        ({"overrides": {"picture.matting_model": "/etc/passwd"}}, "cannot be set by a client"),
        ({"overrides": {"picture.matting_model_": "/etc/passwd"}}, "cannot be set by a client"),
        ({"overrides": {"guidance.weights": "/etc/passwd"}}, "cannot be set by a client"),
        ({"guidance": "zero123", "overrides": {"guidance.weights.allow_pickle__": True}}, "cannot be set by a client"),
        ({"guidance": "zero123", "overrides": {"guidance.model_": "/root/model"}}, "must be a hub id"),
        ({"overrides": {"threads_": 500}}, "cannot be set by a client"),
        ({"overrides": {"device": "cuda:7"}}, "cannot be set by a client"),
        ({"guidance": "zero123", "overrides": {"guidance.model": "/root/model"}}, "must be a hub id"),
        ({"guidance": "zero123", "overrides": {"guidance.model": "../up/model"}}, "must be a hub id"),
        ({"texture_size": 5}, "texture size must be between"),
        ({"priority": 1000}, "between -100 and 100"),
        ({"c2w": (1.0,)}, "16 numbers of c2w"),
        ({"c2w": (1.0,) * 16, "intrinsics": (0.0,) * 4, "width": 4, "height": 4}, "positive focal lengths"),
        ({"c2w": (2.0,) * 16, "intrinsics": (1.0,) * 4, "width": 4, "height": 4}, "must be a rotation"),
        ({"overrides": {f"x{n}": "y" * 1000 for n in range(30)}}, "more than 16000 characters"),
        ({"object_size": -1.0}, "object_size must be positive"),
        ({"depth_kind": "deep"}, "relative or metric"),
        ({"init_faces": Array("<i4", (1, 3), bytes(12))}, "init_vertices together with init_faces"),
        ({"name": "x" * 201}, "at most 200 characters"),
    ],
)
def test_a_request_that_cannot_be_done_is_refused_in_one_sentence(client, changes, complaint):
    with pytest.raises(RequestRefused, match=complaint) as caught:
        client.request(dataclasses.replace(toy_job(), **changes))
    assert caught.value.code == "input"


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (Pause("0" * 32), "unknown_job"),
        (Fetch("../x"), "unknown_job"),
        (Forget("0" * 32), "unknown_job"),
        (SetPreview("0" * 32), "unknown_job"),
        (JobState("0" * 32, 1, "done"), "state"),
    ],
)
def test_requests_about_nothing_are_refused(client, request_, code):
    with pytest.raises(RequestRefused) as caught:
        client.request(request_)
    assert caught.value.code == code


def test_a_file_outside_the_list_is_not_handed_out(client):
    job = toy_job(steps=2)
    client.request(job)
    client.wait(job.job, WITHIN_S)
    with pytest.raises(RequestRefused, match="a result has no '../../jobs.sqlite'"):
        client.fetch(job.job, "../../jobs.sqlite")
    with pytest.raises(RequestRefused, match="this job has no texture.png"):
        client.fetch(job.job, "texture.png")


@pytest.mark.parametrize(
    ("behavior", "code", "words"),
    [
        ({"error": "input"}, "input", "shows no object"),
        ({"error": "disk_full"}, "disk_full", "disk is full"),
        ({"error": "mistake"}, "internal", "RuntimeError: a mistake"),
    ],
)
def test_a_job_that_fails_says_why_and_the_worker_lives_on(client, behavior, code, words):
    job = toy_job(behavior=json.dumps(behavior))
    client.request(job)
    state = client.wait(job.job, WITHIN_S)
    assert (state.state, state.error_code) == (FAILED, code) and words in state.error_message


@pytest.mark.parametrize("data", [b"no picture", picture()[:40], b"\x89PNG\r\n\x1a\n" + bytes(100)])
def test_a_broken_picture_fails_in_one_sentence(client, data):
    job = dataclasses.replace(toy_job(), picture=data)
    client.request(job)
    state = client.wait(job.job, WITHIN_S)
    assert (state.state, state.error_code) == (
        FAILED,
        "input",
    ) and "the picture cannot be decoded" in state.error_message


def bomb() -> bytes:
    """A small PNG file of 3.6 billion pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 6, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10_000_000))) + chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n0 0 64 64 rectfill\n%%EOF\n"


@pytest.mark.parametrize("name", ["picture", "mask", "depth"])
@pytest.mark.parametrize(
    ("data", "complaint"),
    [(bomb(), r"60000 ?x ?60000"), (EPS, "EPS file, which is a program"), (b"\x93NUMPY\1\0", "NumPy file")],
)
def test_what_must_not_be_decoded_is_refused_before_the_job_begins(client, name, data, complaint):
    """Limits that a client sets for itself change nothing."""
    if name != "depth" and data.startswith(b"\x93NUMPY"):
        complaint = "cannot be decoded"
    overrides = {"picture.max_pixels": 10**15}
    job = dataclasses.replace(toy_job(), overrides=overrides, **{name: data})
    client.request(job)
    state = client.wait(job.job, WITHIN_S)
    assert (state.state, state.error_code) == (FAILED, "input"), state
    assert re.search(complaint, state.error_message), state.error_message


def test_what_is_decoded_after_the_inputs_is_limited_too(tmp_path, monkeypatch):
    """Such as textures inside a start mesh."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    store = Store(tmp_path)
    job = toy_job()
    store.put_inputs(job)
    read_inputs(store.job_folder(job.job) / "input")
    store.close()
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(bomb()))


@pytest.mark.slow
def test_a_decoder_that_does_not_end_costs_the_job_and_nothing_else(tmp_path):
    """It even keeps the interpreter for itself, so that the worker cannot say a word."""
    with running(tmp_path / "data", pipeline="tests.stuck_pipeline") as engine, engine.client() as client:
        stuck = dataclasses.replace(toy_job(), picture=b"STUCK")
        client.request(stuck)
        good = toy_job(steps=2)
        client.request(good)
        state = client.wait(stuck.job, DECODE_LIMIT_S + 30)
        assert (state.state, state.error_code) == (FAILED, "timeout") and "to decode" in state.error_message
        assert client.wait(good.job, 30).state == DONE


def test_forgetting_a_job_removes_it_everywhere(client, engine):
    job = toy_job(steps=2)
    client.request(job)
    client.wait(job.job, WITHIN_S)
    folder = engine.folder / "jobs" / job.job
    assert folder.exists()
    client.request(Forget(job.job))
    assert job.job not in client.jobs
    until(client, lambda: not folder.exists())


def test_two_clients_see_the_same(engine, client):
    with engine.client("other") as other:
        job = toy_job(steps=3)
        client.request(job)
        assert other.wait(job.job, WITHIN_S).state == DONE
        assert client.request(ListJobs()).count == len(other.jobs)


def test_free_memory_ends_idle_workers_and_the_next_job_starts_one(client, engine):
    until(client, lambda: client.status.workers == "ready")
    (before,) = engine.worker_pids()
    client.request(FreeMemory())
    until(client, lambda: client.status.workers == "stopped")
    assert engine.worker_pids() == []
    job = toy_job(steps=2)
    client.request(job)
    assert client.wait(job.job, WITHIN_S).state == DONE
    assert engine.worker_pids() != [before]


def test_free_memory_can_pause_a_job_at_its_checkpoint(client, engine, tmp_path):
    hold = tmp_path / "hold"
    hold.touch()
    job = toy_job(steps=60, behavior=json.dumps({"checkpoint_every": 5, "hold_at": 14, "hold": str(hold)}))
    client.request(job)
    until_step(client, job.job, 12)
    with pytest.raises(RequestRefused, match="at work") as caught:
        client.request(FreeMemory())
    assert caught.value.code == "busy"
    client.request(FreeMemory(pause_jobs=True))
    assert until_state(client, job.job, PAUSED).step >= 12
    until(client, lambda: engine.worker_pids() == [])
    hold.unlink()
    client.request(Resume(job.job))
    assert until_state(client, job.job, DONE).metrics["value"] == expected_value(60)


def test_the_welcome_says_who_is_there(client, engine):
    assert client.welcome.pid == engine.process.pid
    assert client.status.device == "toy: cpu" and client.status.guidances == ("embedded",)
    assert engine.connection.protocol == PROTOCOL_VERSION
