"""What the machine does at most, measured on it: the floors of everything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from .report import Report, measure


@dataclass(frozen=True)
class Ceilings:
    """Rates of simple operations on large inputs."""

    copy_bytes_per_s: float
    """Device copy, bytes read and written."""
    matrix_flop_per_s: Mapping[torch.dtype, float]
    """Square matrix product."""

    def floor_ms(self, n_bytes: float = 0.0, flop: float = 0.0, dtype: torch.dtype = torch.bfloat16) -> float:
        """The larger of the two times that moving bytes and multiplying in `dtype` need."""
        return 1000 * max(n_bytes / self.copy_bytes_per_s, flop / self.matrix_flop_per_s[dtype])


def measure_ceilings(report: Report) -> Ceilings:
    """Measure the rates and add their rows."""
    device, is_gpu = report.device, report.device.type == "cuda"
    report.begin("ceilings", "what the machine does at most (random inputs)")
    side = 8192 if is_gpu else 512 if report.is_small else 1536
    rates = {}
    for dtype in (torch.bfloat16, torch.float16 if is_gpu else torch.float32):
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        product = measure(partial(torch.matmul, a, b), device, budget_s=report.budget_s)
        rates[dtype] = 2 * side**3 / product.median_ms * 1000
        name = f"matrix product {side}³, {str(dtype).removeprefix('torch.')}"
        report.add_timing(name, product, notes={"TFLOP/s": rates[dtype] / 1e12})
    n_bytes = 2**31 if is_gpu else 2**24 if report.is_small else 2**27
    source = torch.rand(n_bytes // 4, device=device)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), device, budget_s=report.budget_s)
    rate = 2 * n_bytes / copy.median_ms * 1000
    report.add_timing(f"copy of {n_bytes / 2**20:.0f} MiB", copy, notes={"GB/s, read + written": rate / 1e9})
    if is_gpu:
        one = torch.ones(1, device=device)
        launches = measure(lambda: [one.add_(0) for _ in range(200)], device, budget_s=report.budget_s)
        report.add_timing("200 small launches", launches, notes={"us each": launches.median_ms * 5})
    return Ceilings(rate, rates)


def count_flop(run: Callable[[], object]) -> float:
    """Floating-point operations of the matrix products, convolutions and attention in one call, backward included."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())
