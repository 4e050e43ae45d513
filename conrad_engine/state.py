"""What an optimisation changes from step to step, and how long it is."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from .adam import Adam
from .config import PipelineConfig
from .constraint import ConstrainedField, ReferenceView
from .fields.dense_volume import DenseVolume
from .fields.radiance_field import HashField
from .rendering.occupancy import OccupancyGrid

VIEW_HALF_FRAME = 0.85
"""Half side, at the origin, of the views shown to the prior: wider than the reference's, since the depth is unknown."""


@dataclass
class State:
    """What the optimisation changes, and all that a checkpoint holds."""

    field: DenseVolume | HashField
    constrained: ConstrainedField
    occupancy: OccupancyGrid
    adam: Adam
    skipped: Int[Tensor, "2"]
    """Steps that were not taken because of non-finite values: in all, and in a row up to now. Counted on the device."""
    step: int = 0
    n_views: int = 1
    sampled: Tensor | None = None
    """Views sampled from the prior for the warm start, premultiplied RGBA (n, 4, h, w)."""
    half_frame: float = VIEW_HALF_FRAME
    is_centered: bool = False
    """Whether the origin is the object's center, as the user has it; part of the job, not of its checkpoint."""
    world_azimuth: float | None = None
    """Of the world's x axis (radians), if the world is the user's; part of the job, too."""
    plane: float | None = None
    """Of symmetry: azimuth of its normal (radians), once it has been found."""
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.field.aabb.device

    @property
    def n_skipped(self) -> int:
        """Steps not taken so far; waits for the device."""
        return int(self.skipped[0])

    def pixel(self, size: int) -> float:
        """Side, at the origin, of a pixel of the views shown to the prior, `size` pixels a side."""
        return 2 * self.half_frame / size

    def to_dict(self) -> dict:
        return {
            "field": self.field.state_dict(),
            "adam": self.adam.state_dict(),
            "occupancy": self.occupancy.state_dict(),
            "surfaces": [view.surface for view in self.constrained.views],
            "step": self.step,
            "n_views": self.n_views,
            "n_skipped": self.n_skipped,
            "sampled": self.sampled,
            "half_frame": self.half_frame,
            "plane": self.plane,
            "history": self.history,
        }

    def load(self, data: dict) -> None:
        """Take over a checkpoint's content; shapes must fit."""
        self.field.load_state_dict(data["field"])
        self.adam.load_state_dict(data["adam"])
        self.occupancy.load_state_dict(data["occupancy"])
        for view, surface in zip(self.constrained.views, data["surfaces"], strict=True):
            view.surface.copy_(surface)
        for name in ("step", "n_views", "half_frame", "history"):
            setattr(self, name, data[name])
        self.plane = data.get("plane")
        self.skipped[0] = data["n_skipped"]
        self.sampled = None if data["sampled"] is None else data["sampled"].to(self.device)
        self.field.prepare()


def make_state(
    field_: DenseVolume | HashField, views: list[ReferenceView], config: PipelineConfig, device: torch.device
) -> State:
    constrained = ConstrainedField(field_, views, config.constraint)
    diagonal = float((field_.aabb[1] - field_.aabb[0]).norm())
    # A cell is empty when one sample step through it is nearly clear.
    threshold = config.render.occupancy_threshold * config.render.n_samples / diagonal
    occupancy = OccupancyGrid(field_.aabb, config.render.occupancy_resolution, threshold)
    adam = Adam(field_.parameter_groups(config.optimize), betas=(0.9, 0.95), eps=1e-10)
    skipped = torch.zeros(2, dtype=torch.int64, device=device)
    return State(field_, constrained, occupancy, adam, skipped, n_views=config.optimize.n_views)


def n_coarse_steps(config: PipelineConfig) -> int:
    """Steps before the fine stage: the fit to sampled views and the distillation; none if only the picture is projected."""
    if config.mesh.project_only:
        return 0
    warm = config.optimize.warm_start_steps if config.optimize.warm_start_views else 0
    return warm + config.optimize.n_steps


def n_total_steps(config: PipelineConfig) -> int:
    """Steps of the whole schedule."""
    return n_coarse_steps(config) + (0 if config.mesh.project_only else config.optimize.fine_steps)
