"""Peak memory of a latent model's step on a GPU, and whether it runs under hard caps."""

from __future__ import annotations

import gc
from dataclasses import replace

import torch

from ..graphs import WARM_UP_CALLS, GraphedStep
from ..guidance.frozen_encoder import rewrite_encoder
from ..guidance.fused_norms import fuse_norms
from .fields import PAPER_GRID, SMALL_GRID
from .guidance import channels_last, half, unet_inputs
from .networks import SD21, Encoder, TinyEncoder, make_autoencoder, make_tiny_autoencoder, make_unet
from .report import Report, Row
from .steps import RaySettings, StaticStep, latent_loss

GIB = 2**30
CAPS_GIB = (6.0, 4.0, 3.0)


def run(report: Report) -> None:
    """SD 2.1's step: networks, field and all activations in one process."""
    report.begin("memory, SD 2.1 step", "one view of 512 px, captured; everything in one process, weights included")
    if report.device.type != "cuda":
        report.add(Row("SD 2.1", error="device memory is measured on CUDA only; jobs on a CPU are measured below"))
        return
    for uses_tiny in (False, True):
        name = "tiny autoencoder" if uses_tiny else "own autoencoder"
        peak_gib, weights_gib, _ = _attempt(report, 0.0, uses_tiny)
        report.add(Row(name, notes={"peak GiB": peak_gib, "of it networks GiB": weights_gib}))
        for cap in CAPS_GIB:
            _, _, error = _attempt(report, cap, uses_tiny)
            if error:
                report.add(Row(f"{name}, cap {cap:g} GiB", error=error))
                break
            report.add(Row(f"{name}, cap {cap:g} GiB", notes={"runs": True}))


def _attempt(report: Report, cap_gib: float, uses_tiny: bool) -> tuple[float, float, str]:
    """Peak and network memory in GiB, and the error if it does not fit."""
    device = report.device
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    total = torch.cuda.get_device_properties(device).total_memory
    # What earlier measurements still hold is not this step's.
    before = torch.cuda.memory_allocated()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (cap_gib * GIB + before) / total) if cap_gib else 1.0)
    try:
        weights = _step(report, uses_tiny)
        return (torch.cuda.max_memory_allocated() - before) / GIB, weights / GIB, ""
    except torch.cuda.OutOfMemoryError as error:
        return 0.0, 0.0, str(error).splitlines()[0]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _step(report: Report, uses_tiny: bool) -> int:
    """Build everything and run the captured step; answers the networks' bytes."""
    device, dtype, small = report.device, half(report.device), report.is_small
    before = torch.cuda.memory_allocated()
    unet = make_unet(SD21, device, dtype, small).to(memory_format=torch.channels_last)
    if uses_tiny:
        encoder = TinyEncoder(make_tiny_autoencoder(device, dtype))
    else:
        vae = make_autoencoder(device, dtype, small)
        rewrite_encoder(vae)
        encoder = Encoder(vae)
        del vae
    encoder.to(memory_format=torch.channels_last)
    fuse_norms(encoder)
    fuse_norms(unet)
    weights = torch.cuda.memory_allocated() - before
    inputs = channels_last(unet_inputs(SD21, device, dtype, small))
    picture_size, rays = (64, RaySettings(16, 16)) if small else (512, RaySettings(64, 128))
    loss = latent_loss(SD21, unet, encoder, inputs, picture_size, torch.channels_last)
    grid = SMALL_GRID if small else replace(PAPER_GRID, encoder="auto")
    step = GraphedStep(StaticStep(grid, rays, 1, loss, device), device)
    for _ in range(WARM_UP_CALLS + 3):
        step()
    torch.cuda.synchronize()
    return weights
