"""Blender is killed in the middle of a job (first call); the next Blender brings the result in (second call).

PYTHON_WITH_BPY check_killed.py ZIP ENGINE_PYTHON DATA_FOLDER die SECONDS
PYTHON_WITH_BPY check_killed.py ZIP ENGINE_PYTHON DATA_FOLDER collect SECONDS
"""

from __future__ import annotations

import os
import signal
import sys
import time

import bpy
from check_jobs import made_by, painted, submit, table, use_engine
from common import empty_scene, figure, main, part, pump_until


def run() -> None:
    empty_scene()
    use_engine()
    if sys.argv[4] == "die":
        bpy.context.scene.conrad.image = painted("pot")
        bpy.ops.conrad.add_camera()
        job = submit("slow pot")
        print("submitted", job.id, flush=True)
        end = time.monotonic() + float(sys.argv[5])
        while time.monotonic() < end:
            part("link").pump()
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    session = part("link").session()
    [job] = table().jobs.values()
    assert job.is_remembered and job.notes.setup and job.notes.preset == "draft"
    session.want(by_person=True)
    pump_until(lambda: job.state_name == "done" and job.result_number == 1)
    was_imported = job.notes.imported == 1
    assert job.is_waiting != was_imported and not job.wants_import, "another file is open: it waits in the list"
    bpy.ops.conrad.import_result(job=job.id)
    pump_until(lambda: made_by(job))
    figure(
        f"Blender killed {sys.argv[5]} s after Generate",
        "no lost result",
        f"the next Blender has it{', again' * was_imported}",
    )


if __name__ == "__main__":
    main(run)
