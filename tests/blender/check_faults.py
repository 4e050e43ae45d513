"""Twenty random blows in the middle of jobs: no crash, no lost result.

PYTHON_WITH_BPY check_faults.py ZIP ENGINE_PYTHON DATA_FOLDER [SEED]
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import bpy
from check_jobs import made_by, painted, submit, table, use_engine
from common import empty_scene, figure, main, part, pump_until

N_BLOWS = 20


def kill_engine() -> None:
    child = part("link").session().launcher.child
    if child is not None:
        child.process.kill()


def kill_engine_at_the_end() -> None:
    """The result is there and on its way."""
    job = list(table().jobs.values())[-1]
    pump_until(lambda: job.state_name == "done")
    kill_engine()


def reload_file() -> None:
    bpy.ops.wm.open_mainfile(filepath=sys.argv[3] + "/faults.blend")


def new_file() -> None:
    bpy.ops.wm.read_homefile(use_empty=True)


def undo() -> None:
    bpy.ops.ed.undo_push(message="before")
    bpy.context.scene.conrad.seed += 1
    bpy.ops.ed.undo_push(message="after")
    if bpy.ops.ed.undo.poll():
        bpy.ops.ed.undo()


def delete_picture() -> None:
    for image in list(bpy.data.images):
        bpy.data.images.remove(image)


def delete_camera() -> None:
    for item in list(bpy.data.objects):
        if item.type == "CAMERA" or item.conrad.is_proxy:
            bpy.data.objects.remove(item)


def delete_everything() -> None:
    bpy.ops.wm.read_factory_settings(use_empty=True)


def disable_and_enable() -> None:
    import addon_utils

    addon_utils.disable("bl_ext.user_default.conrad")
    addon_utils.enable("bl_ext.user_default.conrad")


BLOWS = (kill_engine, kill_engine_at_the_end, reload_file, new_file, undo, delete_picture, delete_camera)


def one_round(blow, wait_s: float, number: int) -> None:  # noqa: ANN001
    if bpy.context.scene.conrad.image is None:
        bpy.context.scene.conrad.image = painted("pot")
    if bpy.context.scene.conrad.camera is None:
        bpy.ops.conrad.add_camera()
    job = submit(f"pot {number}")
    job_id = job.id
    end = time.monotonic() + wait_s
    while time.monotonic() < end:
        part("link").pump()
        time.sleep(0.01)
    blow()
    part("link").pump()
    part("link").session().want(by_person=True)
    job = table().jobs[job_id]
    pump_until(lambda: job.state_name == "done" and job.result_number >= 1, 60)
    end = time.monotonic() + 0.5
    while time.monotonic() < end and not made_by(job):
        part("link").pump()
        time.sleep(0.01)
    if not made_by(job):
        bpy.ops.conrad.import_result(job=job_id)
        pump_until(lambda: made_by(job))
    print(f"{number}: {blow.__name__} after {wait_s:.2f} s: result is there", flush=True)


def run() -> None:
    seed = int(sys.argv[4]) if len(sys.argv) > 4 else 0
    generator = random.Random(seed)
    part("launcher").MIN_PAUSE_S = 0.2
    empty_scene()
    use_engine()
    bpy.context.scene.conrad.image = painted("pot")
    bpy.context.scene.conrad.image.pack()
    bpy.ops.conrad.add_camera()
    bpy.ops.wm.save_as_mainfile(filepath=str(Path(sys.argv[3]) / "faults.blend"))
    n_blows = int(sys.argv[5]) if len(sys.argv) > 5 else N_BLOWS
    blows = [BLOWS[k % len(BLOWS)] for k in range(n_blows - 1)] + [disable_and_enable]
    for number, blow in enumerate(blows):
        if blow is disable_and_enable:
            # The engine ends with the add-on; its jobs go on when it is wanted again.
            one_round(blow, 0.8, number)
        else:
            one_round(blow, generator.uniform(0.0, 2.5), number)
    names = ", ".join(dict.fromkeys(blow.__name__.replace("_", " ") for blow in blows))
    figure(f"{n_blows} random moments: {names}", "no crash, no lost result", f"{n_blows} results of {n_blows} jobs")


if __name__ == "__main__":
    main(run)
