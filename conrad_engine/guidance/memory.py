"""How much a diffusion model holds on the device at once: presets, and the choice among them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

GIB = 2**30


@dataclass(frozen=True)
class MemoryPlan:
    """One preset."""

    name: str
    gib: int
    """Free device memory it is meant for."""
    views_at_once: int
    """Views that go through the networks together; more are done in turn, their gradients are the same."""
    keeps_encoders: bool
    """Text and image encoders stay on the device; otherwise they run on the CPU, once a job."""
    recomputes: bool
    """The autoencoder's activations are computed again in the backward pass instead of being kept."""
    splits_guidance: bool
    """Conditional and unconditional predictions run one after the other."""
    tiles: bool
    """The autoencoder sees the picture in overlapping tiles; close to, but not exactly, the same latents."""


PLANS = (
    MemoryPlan("24", 24, 8, keeps_encoders=True, recomputes=False, splits_guidance=False, tiles=False),
    MemoryPlan("12", 12, 4, keeps_encoders=False, recomputes=False, splits_guidance=False, tiles=False),
    MemoryPlan("8", 8, 1, keeps_encoders=False, recomputes=False, splits_guidance=False, tiles=False),
    MemoryPlan("6", 6, 1, keeps_encoders=False, recomputes=True, splits_guidance=True, tiles=False),
    MemoryPlan("least", 0, 1, keeps_encoders=False, recomputes=True, splits_guidance=True, tiles=True),
)
"""Largest first. Every step down needs less; the last one is reached only by running out of memory."""


def choose_plan(name: str, device: torch.device) -> MemoryPlan:
    """The preset of this name, or for `auto` the largest that fits the device's free memory."""
    if name != "auto":
        return next(plan for plan in PLANS if plan.name == name)
    free = free_memory(device) / GIB
    # A card sold as 8 GiB has a little less of it free; half a GiB of slack keeps it in its class.
    return next((plan for plan in PLANS[:-1] if plan.gib <= free + 0.5), PLANS[-2])


def smaller_plan(plan: MemoryPlan) -> MemoryPlan | None:
    """The next preset down; None at the last."""
    index = PLANS.index(plan) + 1
    return PLANS[index] if index < len(PLANS) else None


def free_memory(device: torch.device) -> int:
    """Bytes this process can still take on the device; 8 GiB where that cannot be asked."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch holds in its own cache without using it counts as free.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 8 * GIB
