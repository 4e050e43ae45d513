"""Timing functions, and the table and JSON that the results end in."""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from .. import __version__
from ..errors import ConradError
from ..files import write_json
from ..graphs import WARM_UP_CALLS, GraphedStep

EXPECTED_ERRORS = (RuntimeError, ConradError, ImportError, OSError)
"""What keeps one measurement from being made without ending the others: out of memory, a missing package or file."""
Notes = Mapping[str, float | int | str | bool]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of single calls."""

    median_ms: float
    low_ms: float
    high_ms: float
    n_calls: int


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    timing: Timing | None = None
    floor_ms: float | None = None
    """What the machine needs at least: operations over its measured rate, or bytes over its measured bandwidth."""
    notes: Notes = field(default_factory=dict)
    error: str = ""
    """Why there is no figure."""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def measure(
    run: Callable[[], object], device: torch.device, n_calls: int = 20, warm_up: int = 3, budget_s: float = 3.0
) -> Timing:
    """Median time of a call: CUDA events around each on a GPU, the processor's clock elsewhere.

    Args:
        run: What to time.
        device: Where it runs.
        n_calls: At most so many timed calls.
        warm_up: Calls before them.
        budget_s: After this time no further call is made, once three are.
    """
    for _ in range(warm_up):
        run()
    synchronize(device)
    started = time.perf_counter()
    times: list[float] = []
    events = []
    while len(events) + len(times) < n_calls:
        if device.type == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            run()
            after.record()
            events.append((before, after))
        else:
            before_s = time.perf_counter()
            run()
            synchronize(device)
            times.append(1000 * (time.perf_counter() - before_s))
        if len(events) + len(times) >= 3 and time.perf_counter() - started > budget_s:
            break
    synchronize(device)
    times += [before.elapsed_time(after) for before, after in events]
    return Timing(statistics.median(times), min(times), max(times), len(times))


def captured(run: Callable[[], object], device: torch.device) -> GraphedStep:
    """The function, warmed up and captured.

    Raises:
        RuntimeError: It cannot be captured.
    """
    graphed = GraphedStep(run, device)
    for _ in range(WARM_UP_CALLS + 1):
        graphed()
    if not graphed.is_captured:
        raise RuntimeError("cannot be captured in a CUDA graph")
    return graphed


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖, in float64."""
    difference = (actual.detach().double() - expected.detach().double()).norm()
    return float(difference / expected.detach().double().norm())


class Report:
    """Collects rows, prints each as it comes, and writes them all."""

    def __init__(self, device: torch.device, is_small: bool = False, budget_s: float = 3.0) -> None:
        self.device, self.is_small, self.budget_s = device, is_small, budget_s
        self.machine = describe_machine(device)
        self.sections: dict[str, list[Row]] = {}
        self._rows: list[Row] = []

    def begin(self, section: str, explanation: str) -> None:
        self._rows = self.sections.setdefault(section, [])
        print(f"\n{section}: {explanation}", flush=True)
        print(f"{'':52}{'median ms':>10}{'low':>9}{'high':>9}{'floor':>9}{'x floor':>8}", flush=True)

    def add(self, row: Row) -> None:
        self._rows.append(row)
        print(format_row(row), flush=True)

    def add_timing(self, name: str, timing: Timing, floor_ms: float | None = None, notes: Notes | None = None) -> None:
        self.add(Row(name, timing, floor_ms, notes or {}))

    def time(
        self,
        name: str,
        run: Callable[[], object],
        floor_ms: float | None = None,
        notes: Notes | None = None,
        is_captured: bool = False,
        n_calls: int = 20,
    ) -> Timing | None:
        """Time a function and add its row; a failure becomes a row that says why."""
        try:
            if is_captured and self.device.type != "cuda":
                return None
            if is_captured:
                run = captured(run, self.device)
            timing = measure(run, self.device, n_calls, budget_s=self.budget_s)
        except EXPECTED_ERRORS as error:
            self.fail(name, error)
            return None
        self.add_timing(name, timing, floor_ms, notes)
        return timing

    def fail(self, name: str, error: Exception) -> None:
        text = str(error).splitlines()[0] if str(error) else ""
        self.add(Row(name, error=f"{type(error).__name__}: {text}"[:200]))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def to_json(self) -> dict:
        return {
            "machine": self.machine,
            "is_small": self.is_small,
            "sections": {name: [asdict(row) for row in rows] for name, rows in self.sections.items()},
        }

    def write(self, path: Path) -> None:
        write_json(path, self.to_json())


def format_row(row: Row) -> str:
    notes = ", ".join(f"{key} {_short(value)}" for key, value in row.notes.items())
    if row.error:
        return f"{row.name:<52}not measured: {row.error}"
    if row.timing is None:
        return f"{row.name:<52}{notes}"
    floor = "" if row.floor_ms is None else f"{row.floor_ms:.3f}"
    ratio = "" if not row.floor_ms else f"{row.timing.median_ms / row.floor_ms:.1f}"
    figures = f"{row.timing.median_ms:>10.3f}{row.timing.low_ms:>9.3f}{row.timing.high_ms:>9.3f}{floor:>9}{ratio:>8}"
    return f"{row.name:<52}{figures}  {notes}".rstrip()


def _short(value: float | int | str | bool) -> str:
    return f"{value:.3g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def describe_machine(device: torch.device) -> dict[str, str | int]:
    """Where the figures come from."""
    machine: dict[str, str | int] = {
        "conrad": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30)}
        machine["cuda"] = str(torch.version.cuda)
    return machine


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
