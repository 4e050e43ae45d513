"""Guessing elevations by the real server process: between jobs, never beside one, and always answered."""

import json
import time

import numpy as np
import pytest

from conrad_engine.protocol import Array, Cancel, ElevationGuess, FreeMemory, GuessElevation, RequestRefused

from .engine_process import picture, toy_job, until, until_step

SLOWLY = json.dumps({"delay_s": 0.02})


def ask(client, **fields) -> ElevationGuess:
    answer = client.request(GuessElevation(**{"picture": picture(8, 6), **fields}), timeout_s=15)
    assert isinstance(answer, ElevationGuess)
    return answer


def test_a_picture_is_looked_at(client):
    answer = ask(client)
    assert (answer.elevation_deg, answer.spread_deg, answer.is_sure) == (8, 6, False)


def test_scripts_have_a_method_for_it(client):
    answer = client.guess_elevation(picture(8, 6), mask=picture(8, 6), fov_deg=30)
    assert (answer.elevation_deg, answer.spread_deg, answer.is_sure) == (8, 6, True)


def test_pixels_and_a_mask_do_as_well(client):
    pixels = np.full((5, 9, 4), 200, np.uint8)
    answer = ask(
        client,
        picture=None,
        pixels=Array("u1", pixels.shape, pixels.tobytes()),
        mask_pixels=Array("u1", (5, 9), bytes(45)),
    )
    assert (answer.elevation_deg, answer.spread_deg, answer.is_sure) == (9, 5, True)


def test_a_question_waits_for_a_worker_that_starts(client):
    client.request(FreeMemory())
    until(client, lambda: client.status.workers == "stopped")
    assert ask(client).elevation_deg == 8


def test_several_questions_are_all_answered(client):
    numbers = [client.send(GuessElevation(picture(3 + k, 6))) for k in range(3)]
    answers = {}

    def is_done() -> bool:
        return len(answers) == 3

    end_s = time.monotonic() + 15
    while not is_done() and time.monotonic() < end_s:
        answers |= {m.request: m for m in client.poll(0.02) if isinstance(m, ElevationGuess)}
    assert [answers[number].elevation_deg for number in numbers] == [3, 4, 5]


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"picture": None}, "needs a picture"),
        ({"fov_deg": 150.0}, "fov_deg must be between 2 and 120"),
        ({"mask_pixels": Array("u1", (2, 2, 3), bytes(12))}, "mask_pixels must be u1"),
        ({"picture": b"GIF no more"}, "cannot be decoded"),
        ({"fov_deg": 67.0}, "shows no object"),
    ],
)
def test_a_picture_that_cannot_be_used_is_refused_with_the_reason(client, fields, complaint):
    with pytest.raises(RequestRefused, match=complaint) as caught:
        ask(client, **fields)
    assert caught.value.code == "input"
    assert ask(client).elevation_deg == 8


def test_at_work_the_engine_is_busy_and_the_job_goes_on(client):
    job = toy_job(steps=2000, behavior=SLOWLY)
    client.request(job)
    until_step(client, job.job, 3)
    with pytest.raises(RequestRefused, match="at work on a job") as caught:
        ask(client)
    assert caught.value.code == "busy"
    until_step(client, job.job, 8)
    client.request(Cancel(job.job))
    client.wait(job.job, 15)
    assert ask(client).elevation_deg == 8


def test_a_job_sent_right_after_a_question_is_done_after_it(client):
    number = client.send(GuessElevation(picture(7, 7)))
    job = toy_job(steps=5)
    seen = []
    client.send(job)
    client.wait(job.job, 15, seen.append)
    assert [m.elevation_deg for m in seen if isinstance(m, ElevationGuess) and m.request == number] == [7]
    assert client.jobs[job.job].state == "done"


def test_a_worker_that_dies_over_a_picture_is_told_and_replaced(client):
    with pytest.raises(RequestRefused, match="worker ended before it had looked") as caught:
        ask(client, fov_deg=66.0)
    assert caught.value.code == "internal"
    assert ask(client).elevation_deg == 8
