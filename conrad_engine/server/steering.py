"""What a job in a worker asks between two steps: go on, hold still, stop, and who wants to see it from where.

Previews take a fixed share of the time. Where a picture of the size asked for would take long, it is drawn smaller, so that
the next one need not be waited for so long: a device's speed shows as size, not as a picture that never changes.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..monitor import Command, Monitor, Progress
from ..protocol import Array
from ..protocol import Progress as ProgressMessage
from .link import Link
from .worker_messages import Run, Steer, View, Warned, WorkerPreview

PREVIEW_SHARE = 0.03
"""Part of the time spent on previews of views that stand still."""
MOVING_SHARE = 0.3
"""The same while a client moves its view: then it is the previews that somebody waits for."""
STANDING_LIMIT_S, MOVING_LIMIT_S, PAUSED_LIMIT_S = 0.3, 0.15, 1.0
"""A preview is drawn so small that it takes about so long at most: of views that stand still, that move, of a paused job."""
FIRST_SIDE, SMALLEST_SIDE = 96, 48
"""Longer side of a job's first preview, which tells what previews cost here, and the least it is reduced to."""
WORTH_IT = 1.25
"""A view that could be drawn this much larger than it was is drawn again."""
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
        self._served: dict[int, tuple[int | None, float]] = {}
        """By view: the serial that was drawn as large as it can be, and when the last picture was drawn."""
        self._shown: tuple[View, float, float] | None = None
        """The view being drawn, how long it may take, and when that began."""
        self._pixel_s: float | None = None
        """What a pixel of the last preview took."""
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
                size = order.width or DEFAULT_SIDE, order.height or DEFAULT_SIDE
                self._views[order.view] = replace(order, width=size[0], height=size[1])
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
        found = self._next_view(time.monotonic())
        if found is None:
            return None
        view, limit_s = found
        smaller = reduced(view, self._factor(view, limit_s))
        camera = _camera_of(smaller) if view.c2w else self._turning_camera(smaller)
        self._shown = view, limit_s, time.monotonic()
        return camera

    def preview(self, rgb: Any, camera: Any) -> None:
        assert self._shown is not None, "no preview was asked for"
        view, limit_s, started_s = self._shown
        now_s = time.monotonic()
        cost_s = now_s - started_s
        self._pixel_s = cost_s / (rgb.shape[0] * rgb.shape[1])
        # Waiting in proportion to the cost keeps the share, whatever the device.
        self._next_preview_s = now_s + cost_s * (1 / PREVIEW_SHARE - 1)
        self._next_moving_s = now_s + cost_s * (1 / MOVING_SHARE - 1)
        could_be_larger = self._factor(view, limit_s) * view.width > WORTH_IT * rgb.shape[1]
        self._served[view.view] = None if could_be_larger else view.serial, now_s
        pixels = Array("u1", tuple(rgb.shape), rgb.tobytes())
        c2w = (*camera.c2w.reshape(-1).tolist(), 0.0, 0.0, 0.0, 1.0)
        intrinsics = tuple(camera.intrinsics.tolist())
        self._link.offer(WorkerPreview(self._job, view.view, view.serial, self._step, c2w, intrinsics, pixels))

    def warning(self, message: str) -> None:
        self._link.send(Warned(self._job, message[:1000]))

    def _next_view(self, now_s: float) -> tuple[View, float] | None:
        """The view to show now, and how long it may take: one that has moved, else the one not shown for longest.

        None while it is too early.
        """
        with self._lock:
            views = list(self._views.values())
            is_paused = self._command is Command.PAUSE
        moved = [v for v in views if self._served.get(v.view, (None, 0.0))[0] != v.serial]
        limit_s = STANDING_LIMIT_S
        if moved and (is_paused or now_s >= self._next_moving_s):
            views, limit_s = moved, PAUSED_LIMIT_S if is_paused else MOVING_LIMIT_S
        elif not views or is_paused or now_s < self._next_preview_s:
            return None
        return min(views, key=lambda v: self._served.get(v.view, (0, 0.0))[1]), limit_s

    def _factor(self, view: View, limit_s: float) -> float:
        """By how much the sides of a view must be reduced to take no longer than this; at most 1."""
        longer = max(view.width, view.height)
        if self._pixel_s is None:
            return min(1.0, FIRST_SIDE / longer)
        factor = math.sqrt(limit_s / (self._pixel_s * view.width * view.height))
        return min(1.0, max(factor, SMALLEST_SIDE / longer))

    def _turning_camera(self, view: View) -> Any:
        return self._default_camera(TURN_DEG * next(self._turn), view.width, view.height)


def reduced(view: View, factor: float) -> View:
    """The same view with fewer pixels."""
    width, height = (max(1, round(factor * side)) for side in (view.width, view.height))
    scales = 2 * (width / view.width, height / view.height)
    intrinsics = tuple(number * scale for number, scale in zip(view.intrinsics, scales))
    return replace(view, width=width, height=height, intrinsics=intrinsics)


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
