"""Set Up Engine from the zip alone, Check, and a start of the engine that was installed. Installs packages: minutes.

PYTHON_WITH_BPY check_setup.py ZIP BASE_PYTHON
"""

from __future__ import annotations

import os
import sys
import time

import bpy
from common import empty_scene, figure, main, part, preferences, pump_until

LIMIT_S = 1200


def run() -> None:
    operators, session = part("operators_engine"), part("link").session()
    empty_scene()
    bpy.context.preferences.system.use_online_access = True
    preferences().base_python = sys.argv[2]
    preferences().data_folder = str(part("preferences").user_folder() / "jobs_of_the_test")
    assert session.state_line() == "Not Set Up"
    assert bpy.ops.conrad.set_up_engine("EXEC_DEFAULT") == {"FINISHED"}
    shown, longest = [], (0.0, 0.0)
    end = time.monotonic() + LIMIT_S
    while operators.running_setup is not None and time.monotonic() < end:
        wall, own = time.perf_counter(), time.thread_time()
        part("link").pump()
        longest = max(longest, (time.perf_counter() - wall, time.thread_time() - own))
        if operators.running_setup is not None and [operators.running_setup.progress] != shown[-1:]:
            shown.append(operators.running_setup.progress)
        time.sleep(0.05)
    assert not operators.last_setup_error, operators.last_setup_error
    factors = [factor for factor, _ in shown]
    assert factors == sorted(factors) and len({text for _, text in shown}) > 5
    wall_ms, own_ms = (1e3 * seconds for seconds in longest)
    figure(
        f"longest tick of a whole Set Up Engine, {len(shown)} steps of progress shown",
        "50 ms",
        f"{wall_ms:.1f} ms (own processor time {own_ms:.1f} ms; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores)",
    )
    print("doctor:", operators.last_doctor)
    assert operators.last_doctor.is_ok, operators.last_doctor
    bpy.ops.conrad.check_engine()
    pump_until(lambda: operators.running_check is None)
    assert operators.last_doctor.is_ok
    bpy.ops.conrad.start_engine()
    pump_until(lambda: session.is_connected)
    pump_until(lambda: session.details() and session.status.workers == "ready", 90)
    print(session.state_line())
    bpy.ops.conrad.stop_engine()
    pump_until(lambda: not session.launcher.is_running)


if __name__ == "__main__":
    main(run)
