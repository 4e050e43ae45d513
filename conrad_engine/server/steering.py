"""What a job in a worker asks between two steps: go on, hold still, stop, and who wants to see it from where."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable
from typing import Any

from ..monitor import Command, Monitor, Progress
from ..protocol import Array
from ..protocol import Progress as ProgressMessage
from .link import Link
from .worker_messages import Run, Steer, View, Warned, WorkerPreview

PREVIEW_SHARE = 0.04
"""Part of the time spent on previews of views that stand still."""
MOVING_SHARE = 0.3
"""The same while a client moves its view: then it is the previews that somebody waits for."""
DEFAULT_SIDE = 256
TURN_DEG = 20.0
"""Step of the turning view between two previews."""


class SteeredMonitor(Monitor):
    """Carries one job's progress and previews to the server, and the clients' wishes to the job.

    Args:
        default_camera: Makes the turning view's camera, from an azimuth and the wanted picture size.
    """

    def __init__(self, run: Run, link: Link, default_camera: Callable[[float, int, int], Any]) -> None:
        self._job = run.job
        self._link = link
        self._default_camera = default_camera
        self._lock = threading.Lock()
        self._command = Command(run.command)
        self._views: dict[int, View] = {}
        self._served: dict[int, tuple[int, float]] = {}
        self._shown: tuple[View, float] | None = None
        self._next_preview_s = self._next_moving_s = 0.0
        self._turn = itertools.count()
        self._numbers = itertools.count(1)
        self._step = 0

    # In the link's thread.

    def take(self, order: Steer | View) -> None:
        """An order of the server; one for another job is old and without effect."""
        if order.job != self._job:
            return
        with self._lock:
            if isinstance(order, Steer):
                self._command = Command(order.command)
            elif order.is_on:
                self._views[order.view] = order
            else:
                self._views.pop(order.view, None)

    # In the job's thread.

    def progress(self, progress: Progress) -> None:
        self._step = progress.step
        losses = {name: float(value) for name, value in progress.losses.items() if math.isfinite(value)}
        eta_s = progress.eta_s if progress.eta_s is not None and math.isfinite(progress.eta_s) else None
        number = next(self._numbers)
        told = (progress.stage, progress.step, progress.n_steps, eta_s, losses, progress.memory_bytes)
        self._link.offer(ProgressMessage(self._job, number, *told))

    def command(self) -> Command:
        with self._lock:
            return self._command

    def preview_camera(self) -> Any | None:
        view = self._next_view(time.monotonic())
        if view is None:
            return None
        camera = _camera_of(view) if view.c2w else self._turning_camera(view)
        self._shown = view, time.monotonic()
        return camera

    def preview(self, rgb: Any, camera: Any) -> None:
        assert self._shown is not None, "no preview was asked for"
        view, started_s = self._shown
        now_s = time.monotonic()
        cost_s = now_s - started_s
        # Waiting in proportion to the cost keeps the share, whatever the device.
        self._next_preview_s = now_s + cost_s * (1 / PREVIEW_SHARE - 1)
        self._next_moving_s = now_s + cost_s * (1 / MOVING_SHARE - 1)
        self._served[view.view] = view.serial, now_s
        pixels = Array("u1", tuple(rgb.shape), rgb.tobytes())
        c2w = (*camera.c2w.reshape(-1).tolist(), 0.0, 0.0, 0.0, 1.0)
        intrinsics = tuple(camera.intrinsics.tolist())
        self._link.offer(WorkerPreview(self._job, view.view, view.serial, self._step, c2w, intrinsics, pixels))

    def warning(self, message: str) -> None:
        self._link.send(Warned(self._job, message[:1000]))

    def _next_view(self, now_s: float) -> View | None:
        """The view to show now: one that has moved, else the one not shown for longest; none while it is too early."""
        with self._lock:
            views = list(self._views.values())
            is_paused = self._command is Command.PAUSE
        moved = [v for v in views if self._served.get(v.view, (None, 0.0))[0] != v.serial]
        if moved and (is_paused or now_s >= self._next_moving_s):
            views = moved
        elif is_paused or now_s < self._next_preview_s:
            return None
        return min(views, key=lambda v: self._served.get(v.view, (0, 0.0))[1], default=None)

    def _turning_camera(self, view: View) -> Any:
        azimuth_deg = TURN_DEG * next(self._turn)
        return self._default_camera(azimuth_deg, view.width or DEFAULT_SIDE, view.height or DEFAULT_SIDE)


def _camera_of(view: View) -> Any:
    import torch

    from ..cameras import Camera

    c2w = torch.tensor(view.c2w, dtype=torch.float64).reshape(4, 4)[:3]
    return Camera(c2w, torch.tensor(view.intrinsics, dtype=torch.float64), view.width, view.height)


def turning_camera(setup: dict | None) -> Callable[[float, int, int], Any]:
    """A camera that turns around the object, starting where the reference camera stands.

    Args:
        setup: The job's camera in `CameraSetup`'s JSON form; without one the object has size 1 at the origin.
    """
    import torch

    from ..cameras import Camera, CameraSetup, look_at, orbit_angles, orbit_positions, square_intrinsics

    center, size, start_rad = torch.zeros(3, dtype=torch.float64), 1.0, 0.0
    if setup is not None:
        known = CameraSetup.from_json(setup)
        offset = known.camera.positions - known.object_center
        azimuth_rad, _, distance = orbit_angles(offset)
        center, start_rad = known.object_center, float(azimuth_rad)
        # Without a size the object is taken to fill two thirds of the picture.
        seen = float(distance) * max(known.camera.width, known.camera.height) / float(known.camera.intrinsics[0])
        size = known.object_size or seen * 2 / 3

    def camera(azimuth_deg: float, width: int, height: int) -> Camera:
        angles = torch.tensor([start_rad + math.radians(azimuth_deg), math.radians(15.0)], dtype=torch.float64)
        position = center + orbit_positions(angles[0], angles[1], torch.tensor(2.6 * size, dtype=torch.float64))
        side = min(width, height)
        intrinsics = square_intrinsics(torch.tensor(math.radians(36.0), dtype=torch.float64), side)
        intrinsics = intrinsics + torch.tensor([0.0, 0.0, (width - side) / 2, (height - side) / 2])
        return Camera(look_at(position, center), intrinsics, width, height)

    return camera
