"""The hash-grid radiance field, and the choice between fields."""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..adam import Adam
from ..config import FieldConfig, OptimizeConfig
from .dense_volume import EMPTY_RAW, DenseVolume
from .hash_grid import HashGrid

N_INITIAL_FIT_STEPS = 200
"""Steps that fit the density network to a given initial shape."""
N_SMOOTH_POINTS = 4096
"""Pairs of points whose densities are compared by `smoothness`."""


class HashField(nn.Module):
    """Multiresolution hash encoding with two small MLPs: density from all features, color from all features."""

    def __init__(self, config: FieldConfig, aabb: Float[Tensor, "2 3"]) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("aabb", aabb.float())
        self.encoding = HashGrid(config).to(aabb.device)
        width = config.n_levels * config.n_features
        self.density_head = nn.Sequential(nn.Linear(width, config.hidden), nn.ReLU(), nn.Linear(config.hidden, 1))
        self.color_head = nn.Sequential(nn.Linear(width, config.hidden), nn.ReLU(), nn.Linear(config.hidden, 3))
        self.to(aabb.device)
        self.is_from_shape = False
        self.set_progress(0.0)

    @property
    def can_be_captured(self) -> bool:
        """tiny-cuda-nn works on streams of its own, and ends the process where a CUDA graph is being captured."""
        return self.encoding.backend(self.aabb.device) != "tinycudann"

    def prepare(self) -> None:
        """Nothing is kept between look-ups."""

    def _features(self, positions: Tensor) -> Tensor:
        unit = ((positions - self.aabb[0]) / (self.aabb[1] - self.aabb[0])).clamp(0, 1)
        return self.encoding(unit)

    def _answers(self, features: Tensor, *heads: nn.Sequential) -> list[Float[Tensor, "n n_out"]]:
        """Outputs of the networks.

        With `fused_heads` in one kernel where Triton encodes: its features lie as that kernel reads them, and have no second
        derivatives either.
        """
        if self.config.fused_heads and self.encoding.backend(features.device) == "triton":
            kernels = _heads_module()
            if kernels.can_run(features.device, features.shape[1], self.config.hidden):
                return kernels.evaluate(features, *heads)
        return [head(features) for head in heads]

    def _density(self, raw: Float[Tensor, "n 1"], positions: Tensor) -> Tensor:
        raw = raw.squeeze(-1)
        if not self.is_from_shape:
            blob = self.config.blob_density * (1 - positions.norm(dim=-1) / self.config.blob_radius)
            raw = raw + blob.clamp(min=EMPTY_RAW)
        inside = ((positions >= self.aabb[0]) & (positions <= self.aabb[1])).all(-1)
        return self.config.density_scale * F.softplus(torch.where(inside, raw, EMPTY_RAW))

    def density(self, positions: Float[Tensor, "n 3"]) -> Float[Tensor, " n"]:
        (raw,) = self._answers(self._features(positions), self.density_head)
        return self._density(raw, positions)

    def density_and_color(self, positions: Float[Tensor, "n 3"]) -> tuple[Tensor, Tensor]:
        raw, colors = self._answers(self._features(positions), self.density_head, self.color_head)
        return self._density(raw, positions), colors.sigmoid()

    def set_progress(self, progress: float) -> None:
        """Coarse to fine: `start_levels` levels at first, all of them from half of the run."""
        extra = (self.config.n_levels - self.config.start_levels) * min(1.0, 2 * progress)
        self.encoding.active_levels = self.config.start_levels + round(extra)

    def draw_smoothness(self, generator: torch.Generator) -> tuple[Float[Tensor, "n 3"], Float[Tensor, "n 3"]]:
        """The random numbers of `smoothness`: places in the unit cube, and moves."""
        device = generator.device
        places = torch.rand(N_SMOOTH_POINTS, 3, generator=generator, device=device)
        return places, torch.randn(N_SMOOTH_POINTS, 3, generator=generator, device=device)

    def smoothness(self, places: Float[Tensor, "n 3"], moves: Float[Tensor, "n 3"]) -> Tensor:
        """Change of density between nearby random points near the surface, in units of the activation."""
        points = self.aabb[0] + places * (self.aabb[1] - self.aabb[0])
        moved = points + 0.02 * moves
        # One look-up of both: the gradient of each has the size of the whole table.
        shares = torch.tanh(self.density(torch.cat([points, moved])) / self.config.density_scale)
        return (shares[: len(points)] - shares[len(points) :]).square().mean()

    def parameter_groups(self, config: OptimizeConfig) -> list[dict]:
        heads = [*self.density_head.parameters(), *self.color_head.parameters()]
        return [
            {"params": list(self.encoding.parameters()), "lr": config.hash_rate},
            {"params": heads, "lr": config.hash_rate / 10},
        ]

    def initialize(self, signed_distances: Float[Tensor, "x y z"]) -> None:
        """Fit the density to a shape (world units, positive inside, cell centers over the field's box)."""
        self.is_from_shape = True
        self.encoding.active_levels = self.config.n_levels
        grid = signed_distances.permute(2, 1, 0)[None, None].to(self.aabb)
        optimizer = Adam([{"params": self.parameters(), "lr": 5e-3}], betas=(0.9, 0.999), eps=1e-8)
        for _ in range(N_INITIAL_FIT_STEPS):
            unit = torch.rand(8192, 3, device=self.aabb.device)
            wanted = F.grid_sample(grid, (unit * 2 - 1)[None, None, None], align_corners=False)[0, 0, 0, 0]
            positions = self.aabb[0] + unit * (self.aabb[1] - self.aabb[0])
            (raw,) = self._answers(self._features(positions), self.density_head)
            loss = (raw.squeeze(-1) - (wanted * 150).clamp(EMPTY_RAW, 6.0)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.set_progress(0.0)


def _heads_module() -> ModuleType:
    """Imported only where Triton is known to be there."""
    from . import heads_triton

    return heads_triton


def make_field(config: FieldConfig, aabb: Float[Tensor, "2 3"]) -> DenseVolume | HashField:
    """The field that `config.kind` names, on the device of `aabb`."""
    return HashField(config, aabb) if config.kind == "hash_grid" else DenseVolume(config, aabb)
