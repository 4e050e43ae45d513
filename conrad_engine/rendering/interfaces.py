"""What the renderer asks of a field; any object with these answers can be rendered."""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Float
from torch import Tensor


class Field(Protocol):
    """Density and color at world positions of the object frame."""

    aabb: Float[Tensor, "2 3"]
    """Lower and upper corner of the box outside of which the field is empty."""

    def density(self, positions: Float[Tensor, "n 3"]) -> Float[Tensor, " n"]:
        """σ after activation, per world unit, non-negative."""

    def density_and_color(self, positions: Float[Tensor, "n 3"]) -> tuple[Float[Tensor, " n"], Float[Tensor, "n 3"]]:
        """σ, and sRGB color in [0, 1]."""
