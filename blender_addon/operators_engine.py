"""Operators on the engine: set-up, check, start, stop, memory, logs. None of them waits."""

from __future__ import annotations

import bpy

from . import engine_setup, link, preferences, scene_tools
from .child import tail
from .engine_state import options_of

running_setup: engine_setup.SetUp | None = None
last_setup_error = ""
running_check: engine_setup.Check | None = None
last_doctor: engine_setup.Doctor | None = None


def _step() -> bool:
    """Go on with set-up and check; called at every tick."""
    global running_setup, running_check, last_doctor, last_setup_error
    if running_setup is not None:
        running_setup.poll()
        if running_setup.is_done:
            last_setup_error, last_doctor = running_setup.error, running_setup.doctor or last_doctor
            running_setup = None
            link.refresh_settings()
        scene_tools.redraw()
    if running_check is not None:
        found = running_check.poll()
        if found is not None:
            last_doctor, running_check = found, None
            scene_tools.redraw()
    return running_setup is not None or running_check is not None


def why_no_setup() -> str:
    """The reason why the set-up cannot start, or nothing."""
    chosen = preferences.get()
    if running_setup is not None:
        return "The set-up is running"
    if chosen.is_offline:
        return "" if chosen.find_links else "Choose the wheel folder to install from"
    if not bpy.app.online_access:
        return "Allow Online Access in Preferences > System, or name a folder of wheels in the add-on's preferences"
    return ""


class CONRAD_OT_set_up_engine(bpy.types.Operator):
    bl_idname = "conrad.set_up_engine"
    bl_label = "Set Up Engine"
    bl_description = "Make the engine's own Python environment, or make it anew where it is damaged or outdated"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        reason = why_no_setup()
        if reason:
            cls.poll_message_set(reason)
        return not reason

    def invoke(self, context: bpy.types.Context, event: bpy.types.Event) -> set[str]:
        if preferences.get(context).is_offline:
            return self.execute(context)
        return context.window_manager.invoke_props_dialog(self, width=460, confirm_text="Download")

    def draw(self, context: bpy.types.Context) -> None:
        column = self.layout.column()
        column.label(text="The engine's packages will be downloaded from the internet.", icon="URL")
        column.label(text="This takes up to 3 GB with a GPU build of PyTorch, and some minutes.")
        column.label(text="They go into a Python environment of their own, not into Blender's.")

    def execute(self, context: bpy.types.Context) -> set[str]:
        global running_setup, last_setup_error
        chosen = preferences.get(context)
        wheel = engine_setup.bundled_wheel(preferences.addon_folder())
        if wheel is None and chosen.find_links:
            wheel = engine_setup.newest_wheel(bpy.path.abspath(chosen.find_links))
        if wheel is None:
            self.report({"ERROR"}, "This build has no engine in it: put conrad_engine's wheel into the wheel folder")
            return {"CANCELLED"}
        if link.has_session():
            link.session().stop()
        last_setup_error = ""
        try:
            running_setup = engine_setup.SetUp(
                preferences.setup_folder(),
                wheel,
                bpy.path.abspath(chosen.base_python) if chosen.base_python else "",
                bpy.path.abspath(chosen.find_links) if chosen.find_links else "",
                chosen.is_offline,
                options_of(chosen.pip_options),
            )
        except OSError as error:
            self.report({"ERROR"}, f"{error.filename} cannot be written: {error.strerror}")
            return {"CANCELLED"}
        link.session()
        link.wake()
        return {"FINISHED"}


class CONRAD_OT_cancel_setup(bpy.types.Operator):
    bl_idname = "conrad.cancel_setup"
    bl_label = "Cancel Set-Up"
    bl_description = "Stop the set-up; it can be started again"

    def execute(self, context: bpy.types.Context) -> set[str]:
        global running_setup, last_setup_error
        if running_setup is not None:
            running_setup.cancel()
            last_setup_error, running_setup = running_setup.error, None
        return {"FINISHED"}


class CONRAD_OT_check_engine(bpy.types.Operator):
    bl_idname = "conrad.check_engine"
    bl_label = "Check"
    bl_description = "Ask the engine's environment for its versions, its device and what is missing"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        reason = "" if preferences.engine_python() else "Set up the engine first"
        reason = reason or ("The check is running" if running_check is not None else "")
        if reason:
            cls.poll_message_set(reason)
        return not reason

    def execute(self, context: bpy.types.Context) -> set[str]:
        global running_check, last_doctor
        try:
            running_check = engine_setup.Check(preferences.engine_python(), preferences.setup_folder())
        except OSError as error:
            last_doctor = engine_setup.Doctor(False, problem=f"The engine's Python cannot be started: {error}")
            self.report({"ERROR"}, last_doctor.problem)
            return {"CANCELLED"}
        last_doctor = None
        link.session()
        link.wake()
        return {"FINISHED"}


class CONRAD_OT_start_engine(bpy.types.Operator):
    bl_idname = "conrad.start_engine"
    bl_label = "Start Engine"
    bl_description = "Start the engine, or connect to the remote one"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        reason = preferences.why_no_engine()
        if reason:
            cls.poll_message_set(reason)
        return not reason

    def execute(self, context: bpy.types.Context) -> set[str]:
        link.refresh_settings()
        link.session().want(by_person=True)
        link.wake()
        return {"FINISHED"}


class CONRAD_OT_stop_engine(bpy.types.Operator):
    bl_idname = "conrad.stop_engine"
    bl_label = "Stop Engine"
    bl_description = "Stop the engine; unfinished jobs go on at its next start"

    def execute(self, context: bpy.types.Context) -> set[str]:
        link.session().stop()
        link.wake()
        return {"FINISHED"}


class CONRAD_OT_free_memory(bpy.types.Operator):
    bl_idname = "conrad.free_memory"
    bl_label = "Free GPU Memory"
    bl_description = "Let the engine give its GPU memory back; a running job pauses at its last checkpoint"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        is_there = link.has_session() and link.session().is_connected
        if not is_there:
            cls.poll_message_set("The engine does not run: it holds no memory")
        return is_there

    def execute(self, context: bpy.types.Context) -> set[str]:
        link.session().free_memory(pause_jobs=True)
        return {"FINISHED"}


def report_text() -> str:
    """Everything a person who helps would ask for."""
    session = link.session()
    preferences_now = preferences.get()
    parts = [
        f"Blender {bpy.app.version_string}, {session.state_line()}",
        f"Engine Python: {preferences.engine_python() or 'none'}, device {preferences_now.device}",
        f"Problem: {session.problem or 'none'}",
        session.launcher.crash_report(1) or "The engine has not crashed",
    ]
    if last_doctor is not None:
        parts.append(f"Check: {last_doctor}")
    job = link.active_job()
    if job is not None:
        parts.append(f"Job {job.id}: {job.state_name}, {job.status()}")
        parts += list(job.state.warnings) if job.state else []
    if link.last_error:
        parts.append(link.last_error)
    parts += ["Engine log:", *tail(session.launcher.log, 40)]
    parts += ["Set-up log:", *tail(preferences.setup_folder() / "setup.log", 15)]
    return "\n".join(parts)


class CONRAD_OT_copy_report(bpy.types.Operator):
    bl_idname = "conrad.copy_report"
    bl_label = "Copy Report"
    bl_description = "Copy versions, state and the end of the logs to the clipboard"

    def execute(self, context: bpy.types.Context) -> set[str]:
        context.window_manager.clipboard = report_text()
        self.report({"INFO"}, "Report copied")
        return {"FINISHED"}


class CONRAD_OT_open_log(bpy.types.Operator):
    bl_idname = "conrad.open_log"
    bl_label = "Open Log"
    bl_description = "Show the engine's and the set-up's log as a text"

    def execute(self, context: bpy.types.Context) -> set[str]:
        name = "ConRad Log"
        text = bpy.data.texts.get(name) or bpy.data.texts.new(name)
        text.clear()
        text.write(report_text())
        for area in context.screen.areas if context.screen else ():
            if area.type == "TEXT_EDITOR":
                area.spaces.active.text = text
                return {"FINISHED"}
        bpy.ops.wm.window_new()
        area = context.window_manager.windows[-1].screen.areas[0]
        area.type = "TEXT_EDITOR"
        area.spaces.active.text = text
        return {"FINISHED"}


class CONRAD_OT_copy_text(bpy.types.Operator):
    bl_idname = "conrad.copy_text"
    bl_label = "Copy"
    bl_description = "Copy this to the clipboard"

    text: bpy.props.StringProperty(options={"HIDDEN"})

    def execute(self, context: bpy.types.Context) -> set[str]:
        context.window_manager.clipboard = self.text
        return {"FINISHED"}


CLASSES = (
    CONRAD_OT_set_up_engine,
    CONRAD_OT_cancel_setup,
    CONRAD_OT_check_engine,
    CONRAD_OT_start_engine,
    CONRAD_OT_stop_engine,
    CONRAD_OT_free_memory,
    CONRAD_OT_copy_report,
    CONRAD_OT_open_log,
    CONRAD_OT_copy_text,
)


def register() -> None:
    for cls in CLASSES:
        bpy.utils.register_class(cls)
    link.steps.append(_step)


def unregister() -> None:
    global running_setup, running_check
    if running_setup is not None:
        running_setup.cancel()
    if running_check is not None:
        running_check.cancel()
    running_setup = running_check = None
    if _step in link.steps:
        link.steps.remove(_step)
    for cls in reversed(CLASSES):
        bpy.utils.unregister_class(cls)
