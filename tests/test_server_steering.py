"""How previews share the time with the job, by a clock that only moves when something is said to take time."""

from types import SimpleNamespace

import numpy as np
import pytest

from conrad_engine.monitor import Command
from conrad_engine.server import steering
from conrad_engine.server.steering import SteeredMonitor, reduced, turning_camera
from conrad_engine.server.worker_messages import Run, Steer, View, WorkerPreview

STEP_S = 0.2
C2W = (1.0, 0, 0, 0, 0, 0, -1, -3, 0, 1, 0, 0, 0, 0, 0, 1)


class Desk:
    """A job that makes steps and draws previews, each taking its time; what it sends is kept."""

    def __init__(self, monkeypatch, pixel_s: float, preview_s: float = 0.0) -> None:
        self.now_s, self.spent_s = 1000.0, 0.0
        self.pixel_s, self.preview_s = pixel_s, preview_s
        self.sent: list[WorkerPreview] = []
        monkeypatch.setattr(steering, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        run = Run("a", "", "cpu", 1, "run", "", "draft", "", "", 0, None, None, {})
        self.monitor = SteeredMonitor(run, SimpleNamespace(offer=self.sent.append), turning_camera(None))

    def work(self, for_s: float) -> None:
        end_s = self.now_s + for_s
        while self.now_s < end_s:
            self.now_s += 0.05 if self.monitor.command() is Command.PAUSE else STEP_S
            self.show()

    def show(self) -> None:
        camera = self.monitor.preview_camera()
        if camera is None:
            return
        cost_s = self.preview_s + self.pixel_s * camera.width * camera.height
        self.now_s, self.spent_s = self.now_s + cost_s, self.spent_s + cost_s
        self.monitor.preview(np.zeros((camera.height, camera.width, 4), np.uint8), camera)

    def widths(self) -> list[int]:
        return [preview.rgb.shape[1] for preview in self.sent]


def view(serial: int = 0, width: int = 512, height: int = 512, c2w=()) -> View:
    intrinsics = (600.0, 600.0, width / 2, height / 2) if c2w else ()
    return View("a", 1, True, serial, c2w, intrinsics, width, height)


def test_a_slow_device_sends_smaller_pictures_and_spends_no_more_than_its_share(monkeypatch):
    """20 µs a pixel, as on two processor cores: a picture of 512 px would take 5 s."""
    desk = Desk(monkeypatch, pixel_s=20e-6)
    desk.monitor.take(view())
    desk.work(40.0)
    assert len(desk.sent) >= 4 and min(desk.widths()) >= steering.SMALLEST_SIDE
    assert desk.spent_s < 0.05 * 40.0


def test_a_fast_device_sends_the_size_asked_for_at_once(monkeypatch):
    desk = Desk(monkeypatch, pixel_s=20e-9, preview_s=0.01)
    desk.monitor.take(view())
    desk.work(2.0)
    assert desk.widths()[0] == steering.FIRST_SIDE and desk.widths()[-1] == 512
    desk.work(100.0)
    assert desk.widths().count(512) > 100 and desk.spent_s < 0.05 * 102.0


def test_a_first_preview_that_takes_long_does_not_keep_the_next_ones_small(monkeypatch):
    """Loading what draws them takes its time once."""
    desk = Desk(monkeypatch, pixel_s=20e-9, preview_s=0.5)
    desk.monitor.take(view(c2w=C2W))
    desk.work(0.5)
    desk.preview_s = 0.01
    desk.work(60.0)
    assert desk.widths()[-1] == 512


def test_a_view_that_moves_is_shown_often(monkeypatch):
    desk = Desk(monkeypatch, pixel_s=20e-6)
    for serial in range(1, 41):
        desk.monitor.take(view(serial, c2w=C2W))
        desk.work(0.5)
    assert len(desk.sent) > 20 and desk.spent_s < 0.35 * (desk.now_s - 1000.0)
    assert desk.sent[-1].serial >= 39


def test_while_paused_a_view_is_drawn_once_and_larger(monkeypatch):
    desk = Desk(monkeypatch, pixel_s=20e-6)
    desk.monitor.take(view(1, c2w=C2W))
    desk.work(2.0)
    running = desk.widths()[-1]
    desk.monitor.take(Steer("a", "pause"))
    desk.monitor.take(view(2, c2w=C2W))
    desk.work(10.0)
    paused = [preview for preview in desk.sent if preview.serial == 2]
    assert len(paused) <= 2 and paused[-1].rgb.shape[1] > 1.5 * running


@pytest.mark.parametrize("factor", [1.0, 0.5, 0.3])
def test_a_reduced_view_sees_the_same(factor):
    whole = view(width=400, height=200, c2w=C2W)
    small = reduced(whole, factor)
    assert (small.width, small.height) == (round(400 * factor), round(200 * factor))
    for corner in (0, 1):  # The angles to the left, right, upper and lower edge.
        for axis, (side, less) in enumerate(((400, small.width), (200, small.height))):
            f, c, g, d = whole.intrinsics[axis], whole.intrinsics[axis + 2], *small.intrinsics[axis::2]
            assert (corner * side - c) / f == pytest.approx((corner * less - d) / g)


def test_the_preview_says_from_where_it_was_seen(monkeypatch):
    desk = Desk(monkeypatch, pixel_s=20e-6)
    desk.monitor.take(view(7, c2w=C2W))
    desk.show()
    (preview,) = desk.sent
    assert (preview.serial, preview.c2w) == (7, C2W) and preview.rgb.shape[:2] == (96, 96)
    assert preview.intrinsics == pytest.approx((112.5, 112.5, 48.0, 48.0))
