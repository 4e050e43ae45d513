"""Pieces of panels that several panels draw. Drawing only: reads state, changes nothing."""

from __future__ import annotations

import textwrap

import bpy

from . import engine_setup, link, operators_engine, preferences
from .engine_state import State
from .jobs import Job

CATEGORY = "ConRad"
STATE_ICONS = {
    State.NOT_SET_UP: "UNLINKED",
    State.STOPPED: "RADIOBUT_OFF",
    State.STARTING: "SORTTIME",
    State.READY: "CHECKMARK",
    State.BUSY: "PLAY",
    State.NOT_RESPONDING: "QUESTION",
    State.CRASHED: "ERROR",
}
STATE_HINTS = {
    State.STOPPED: "Starts when it is needed",
    State.STARTING: "This takes some seconds",
    State.READY: "Looking for the device",
    State.BUSY: "Looking for the device",
    State.NOT_RESPONDING: "Jobs go on when it answers",
}
"""Below the state while the engine has told nothing."""


class ConradPanel:
    bl_category = CATEGORY
    bl_region_type = "UI"

    def draw_header_preset(self, context: bpy.types.Context) -> None:
        return


def wrapped(layout: bpy.types.UILayout, text: str, width: int, icon: str = "NONE") -> None:
    """Text over as many lines as the panel is narrow."""
    scale = bpy.context.preferences.system.ui_scale
    n_characters = max(int((width / scale - 50) / 6.8), 16)
    column = layout.column(align=True)
    column.scale_y = 0.8
    for number, line in enumerate(textwrap.wrap(text, n_characters) or [""]):
        column.label(text=line, icon=icon if number == 0 else ("BLANK1" if icon != "NONE" else "NONE"), translate=False)


def draw_warnings(layout: bpy.types.UILayout, job: Job | None, width: int) -> None:
    """What the engine has to say about a job, the newest two sentences."""
    for warning in job.state.warnings[-2:] if job is not None and job.state is not None else ():
        wrapped(layout, warning, width, "INFO")


def session_state() -> State:
    if link.has_session():
        return link.session().state
    return State.NOT_SET_UP if preferences.why_no_engine() else State.STOPPED


def state_text() -> str:
    if operators_engine.running_setup is not None:
        return "Setting up the engine"
    return session_state().value


def problems() -> list[str]:
    """What is wrong, one text each; of an engine that died the end of its log."""
    found = [operators_engine.last_setup_error]
    if link.has_session():
        own = link.session()
        report = own.launcher.crash_report(6) if own.state is State.CRASHED else ""
        found += [report] if report and own.problem in report else [report, own.problem]
    if preferences.is_outdated():
        found.append("The engine is older than the add-on: press Set Up Engine Again")
    found.append(link.last_error.strip().splitlines()[-1] if link.last_error else "")
    return [text for text in found if text]


def draw_state(layout: bpy.types.UILayout, context: bpy.types.Context) -> None:
    """What is always there: the engine's state, the one thing to do about it, and below it device and free memory."""
    state = session_state()
    row = layout.row(align=True)
    row.alert = state in (State.CRASHED, State.NOT_RESPONDING)
    row.label(text=state_text(), icon=STATE_ICONS[state], translate=False)
    row = row.row(align=True)
    row.alert = False
    if state in (State.STOPPED, State.CRASHED):
        row.operator("conrad.start_engine", text="", icon="PLAY")
    elif state not in (State.NOT_SET_UP,):
        row.operator("conrad.stop_engine", text="", icon="QUIT")
    row.operator("conrad.show_preferences", text="", icon="PREFERENCES")
    # A line of its own: names of devices are long, and the free memory behind one would not be seen.
    details = ", ".join(link.session().details()) if link.has_session() else ""
    details = details or STATE_HINTS.get(state, "")
    if details:
        wrapped(layout, details, context.region.width, "BLANK1")


def draw_setup(layout: bpy.types.UILayout) -> str:
    """Set-up: its progress while it runs, else the button.

    Returns:
        Why the button is grey, or nothing.
    """
    running = operators_engine.running_setup
    if running is not None:
        factor, text = running.progress
        row = layout.row(align=True)
        row.progress(factor=factor, type="BAR", text=text)
        row.operator("conrad.cancel_setup", text="", icon="CANCEL")
        return ""
    is_there = engine_setup.is_complete(preferences.setup_folder())
    layout.operator("conrad.set_up_engine", text="Set Up Engine Again" if is_there else "Set Up Engine", icon="IMPORT")
    return operators_engine.why_no_setup()


def draw_trouble(layout: bpy.types.UILayout, width: int) -> None:
    """What is wrong with the engine, and the ways out."""
    state = session_state()
    is_missing = state is State.NOT_SET_UP and not preferences.get().use_remote
    if is_missing or operators_engine.running_setup is not None:
        reason = draw_setup(layout)
        if reason:
            wrapped(layout, reason, width, "INFO")
    shown = problems()
    if not shown:
        return
    box = layout.box()
    for problem in shown:
        for number, line in enumerate(problem.splitlines()):
            wrapped(box, line, width - 20, "ERROR" if number == 0 else "NONE")
    row = box.row(align=True)
    row.operator("conrad.open_log", icon="TEXT")
    row.operator("conrad.copy_report", icon="COPYDOWN")
    if preferences.is_outdated() and operators_engine.running_setup is None:
        draw_setup(box)


def draw_progress(layout: bpy.types.UILayout, job: Job) -> None:
    """Bar, and the buttons that steer a job."""
    row = layout.row(align=True)
    row.scale_y = 1.4
    row.progress(factor=job.factor, type="BAR", text=job.status())
    row.operator("conrad.cancel", text="", icon="X").job = job.id
    row = layout.row(align=True)
    if job.state_name == "paused":
        row.operator("conrad.resume", icon="PLAY").job = job.id
    else:
        row.operator("conrad.pause", icon="PAUSE").job = job.id
    row.operator("conrad.keep", icon="CHECKMARK").job = job.id
