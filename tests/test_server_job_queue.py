"""States and transitions of jobs, without any process."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conrad_engine.protocol import (
    CANCELLED,
    DONE,
    FAILED,
    FINAL_STATES,
    PAUSED,
    QUEUED,
    RESULT_FILES,
    RUNNING,
    JobState,
    decode,
    encode,
    new_job_id,
)
from conrad_engine.server.job_queue import MAX_DEATHS, Job, JobQueue, StateError, UnknownJob


def queue_of(n_jobs: int = 1, **fields) -> JobQueue:
    queue = JobQueue()
    for number in range(n_jobs):
        queue.add(Job(f"{number}", queue.next_order(), {"prompt": ""}, **fields), 0.0)
    return queue


def running(**fields) -> JobQueue:
    queue = queue_of(**fields)
    queue.start("0", worker=0)
    queue.progressed("0", 10, 100, 1.0)
    return queue


def done() -> JobQueue:
    queue = running()
    queue.finish("0", 1, ("arrays",), {"psnr": 30.0})
    return queue


def test_the_order_of_arrival_is_kept_within_a_priority():
    queue = queue_of(3)
    queue.add(Job("urgent", queue.next_order(), {}, priority=5), 0.0)
    order = []
    while (job := queue.next_queued()) is not None:
        order.append(job.id)
        queue.start(job.id, worker=0)
    assert order == ["urgent", "0", "1", "2"]


def test_positions_count_the_jobs_before():
    queue = queue_of(3)
    assert [queue.position(job) for job in queue] == [0, 1, 2]
    assert queue.position(queue.start("0", worker=0)) == 0


def test_a_job_that_lost_its_worker_comes_before_later_ones():
    queue = queue_of(2)
    queue.start("0", worker=0)
    queue.worker_lost("0", "killed")
    assert queue.next_queued().id == "0"


def test_a_queued_job_is_cancelled_at_once_and_a_running_one_by_its_worker():
    assert queue_of().cancel("0").state == CANCELLED
    queue = running()
    assert (queue.cancel("0").state, queue["0"].wanted) == (RUNNING, "cancel")
    assert queue.stopped("0").state == CANCELLED


def test_a_cancelled_job_whose_worker_dies_is_cancelled():
    queue = running()
    queue.cancel("0")
    assert queue.worker_lost("0", "killed").state == CANCELLED


def test_a_job_that_finishes_although_cancelled_is_done():
    queue = running()
    queue.cancel("0")
    job = queue.finish("0", 1, (), {})
    assert (job.state, job.command) == (DONE, "")


def test_pause_and_resume_with_and_without_a_worker():
    queue = running()
    assert (queue.pause("0").state, queue["0"].worker) == (PAUSED, 0)
    assert queue.resume("0").state == RUNNING
    queue.pause("0")
    assert queue.worker_lost("0", "killed").state == PAUSED
    assert queue.resume("0").state == QUEUED


def test_a_paused_job_is_not_given_to_a_worker():
    queue = queue_of()
    queue.pause("0")
    assert queue.next_queued() is None


def test_keep_ends_a_pause_and_wakes_an_ended_job():
    queue = running()
    queue.pause("0")
    assert (queue.keep("0").state, queue["0"].wanted) == (RUNNING, "keep")
    queue = running()
    queue.cancel("0")
    queue.stopped("0")
    assert (queue.keep("0").state, queue["0"].wanted) == (QUEUED, "keep")


def test_there_is_nothing_to_keep_of_a_job_that_has_not_begun():
    with pytest.raises(StateError, match="has not begun"):
        queue_of().keep("0")


def test_extract_and_continue_put_an_ended_job_back():
    queue = done()
    job = queue.extract("0", {"n_faces": 500})
    assert (job.state, job.wanted, job.settings["n_faces"], job.result) == (QUEUED, "keep", 500, 1)
    queue = done()
    job = queue.continue_("0", {"overrides": {"optimize.n_steps": 9}})
    assert (job.state, job.wanted) == (QUEUED, "run")


def test_requests_that_come_twice_change_nothing_more():
    for act in (
        lambda q: q.pause("0"),
        lambda q: q.cancel("0"),
        lambda q: q.keep("0"),
        lambda q: q.resume("0"),
    ):
        queue = running()
        first = act(queue)
        assert act(queue) is first
    queue = done()
    first = queue.extract("0", {"overrides": {"a": 1}})
    assert queue.extract("0", {"overrides": {"a": 1}}) is first
    queue = done()
    first = queue.continue_("0", {"overrides": {"a": 1}})
    assert queue.continue_("0", {"overrides": {"a": 1}}) is first


@pytest.mark.parametrize(
    ("act", "complaint"),
    [
        (lambda q: q.cancel("0"), "cannot be cancelled: it is done"),
        (lambda q: q.resume("0"), "cannot be resumed: it is done"),
        (lambda q: q.pause("0"), "cannot be paused"),
    ],
)
def test_what_a_done_job_refuses(act, complaint):
    with pytest.raises(StateError, match=complaint):
        act(done())


@pytest.mark.parametrize("act", [lambda q: q.extract("0", {}), lambda q: q.continue_("0", {"a": 1})])
def test_a_running_job_is_neither_extracted_nor_continued(act):
    with pytest.raises(StateError, match="it is running"):
        act(running())


def test_a_job_at_work_is_not_forgotten():
    with pytest.raises(StateError, match="cancel it first"):
        running().check_forgettable("0")
    done().check_forgettable("0")


def test_an_unknown_job_is_named():
    with pytest.raises(UnknownJob, match="no job 'nobody'"):
        queue_of()["nobody"]


def test_a_job_that_kills_its_workers_at_one_place_is_given_up():
    queue = queue_of()
    for death in range(MAX_DEATHS):
        queue.start("0", worker=0)
        queue.progressed("0", 7, 100, 1.0)
        job = queue.worker_lost("0", "code -9")
        assert job.state == (QUEUED if death < MAX_DEATHS - 1 else FAILED)
    assert (job.error_code, "code -9" in job.error_message) == ("worker_lost", True)
    assert queue.resume("0").deaths == 0


def test_a_job_that_gets_on_may_lose_any_number_of_workers():
    queue = queue_of()
    for step in range(1, 50):
        queue.start("0", worker=0)
        queue.progressed("0", step, 100, 1.0)
        assert queue.worker_lost("0", "killed").state == QUEUED


def test_after_a_restart_no_job_has_a_worker():
    queue = queue_of(4)
    for name in "0123":
        queue.start(name, worker=int(name))
    queue.cancel("1")
    queue.pause("2")
    queue.progressed("3", 5, 9, 1.0)
    queue.keep("3")
    again = JobQueue(list(queue))
    assert [job.state for job in again] == [QUEUED, CANCELLED, PAUSED, QUEUED]
    assert again["3"].wanted == "keep"
    assert all(job.worker is None for job in again)
    assert again["0"].revision > queue["0"].revision


ACTIONS = [
    "start",
    "pause",
    "resume",
    "cancel",
    "keep",
    "finish",
    "fail",
    "stopped",
    "lost",
    "extract",
    "continue",
    "restart",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 2)), max_size=40))
def test_whatever_happens_the_table_stays_sound(actions):
    """Random histories against the rules that every other part relies on."""
    queue = queue_of(3)
    for action, number in actions:
        name, before = str(number), {job.id: job for job in queue}
        at_work = before[name].worker is not None
        try:
            if action == "start" and (job := queue.next_queued()) is not None:
                queue.progressed(queue.start(job.id, worker=1).id, 3, 9, 1.0)
            elif action == "finish" and at_work:
                queue.finish(name, 1, (), {})
            elif action == "fail" and at_work:
                queue.fail(name, "x", "y")
            elif action == "stopped" and at_work and before[name].command == "cancel":
                queue.stopped(name)
            elif action == "lost" and at_work:
                queue.worker_lost(name, "z")
            elif action == "restart":
                queue = JobQueue(list(queue))
            elif action in ("pause", "resume", "cancel", "keep"):
                getattr(queue, action)(name)
            elif action == "extract":
                queue.extract(name, {"a": 1})
            elif action == "continue":
                queue.continue_(name, {"a": 2})
        except StateError:
            assert {job.id: job for job in queue} == before
        for job in queue:
            assert job.revision >= before[job.id].revision
            told = dataclasses.replace(
                job, revision=0, step=0, n_steps=0, elapsed_s=0, deaths=0, death_step=-1, worker=None
            )
            was = dataclasses.replace(
                before[job.id], revision=0, step=0, n_steps=0, elapsed_s=0, deaths=0, death_step=-1, worker=None
            )
            assert told == was or job.revision > before[job.id].revision, "a change without a new revision"
            assert job.state not in (*FINAL_STATES, QUEUED) or job.worker is None
            assert job.state != RUNNING or job.worker is not None
            assert job.command != "cancel" or job.worker is not None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guidance.weights", "/etc/passwd"),
        ("guidance.weights.allow_pickle", True),
        ("guidance.zero123.weights.revision", "evil"),
        ("guidance.embedding", "/tmp/x.safetensors"),
        ("picture.matting_model", "/tmp/x.onnx"),
        ("guidance.model", "/home/x"),
        ("guidance.zero123.model", "../../x"),
    ],
)
def test_no_client_names_files_or_trust_of_the_engines_machine(name, value):
    from conrad_engine.errors import InputError
    from conrad_engine.server.requests import pipeline_config

    settings = {"preset": "draft", "guidance": "", "prompt": "", "seed": 0, "texture_size": None, "n_faces": None}
    with pytest.raises(InputError, match="cannot be set by a client|hub id"):
        pipeline_config({**settings, "overrides": {name: value}})


def test_all_that_a_job_tells_people_fits_into_one_message():
    """In any script: what cannot be sent would be a change of state that nobody hears of."""
    queue = running(name="\u4e16" * 200)
    for number in range(30):
        queue.warn("0", f"{number}" + "\u754c" * 1000)
    metrics = {f"a measure with a long name {number}": 1.2345678901234567 for number in range(100)}
    queue.finish("0", 1, RESULT_FILES, metrics)
    job = queue.fail("0", "internal", "\u4e16" * 4000, "\u754c" * 4000)
    told = ("name", "parts", "metrics", "warnings", "error_code", "error_message", "error_hint")
    state = JobState(new_job_id(), 1, FAILED, **{name: getattr(job, name) for name in told})
    assert decode(encode(state)) == state
