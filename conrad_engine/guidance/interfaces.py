"""What a diffusion prior answers. Guidance sees pictures and cameras; it cannot tell a radiance field from a photograph.

The object frame: origin at the object's center, +Z up, the reference camera at azimuth 0 (on -Y). All cameras are square,
look at the origin and have no roll, so azimuth, elevation, distance and field of view say everything about them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ..cameras import Camera


@dataclass(frozen=True)
class ReferencePicture:
    """The picture as guidance sees it."""

    rgba: Float[Tensor, "4 size size"]
    """Premultiplied sRGB in [0, 1], seen by `camera`; at least as large as any guidance wants, guidance resizes it."""
    camera: Camera
    """Single square camera that looks at the origin (azimuth 0)."""
    is_elevation_known: bool = True
    prompt: str = ""
    object_size: float | None = None
    """Longest side of the object's box in the object frame, if something is known of it."""


@dataclass(frozen=True)
class GuidanceResult:
    gradient: Float[Tensor, "n 4 height width"]
    """Descent direction's negative: the gradient of the guidance loss to the premultiplied RGBA pictures."""
    loss: float | Tensor
    """A diagnostic at noise level, not a progress measure."""
    denoised: Float[Tensor, "n 4 h w"] | None = None
    """What the prior makes of the pictures, premultiplied RGBA or RGB with full opacity, for debugging and previews."""
    notes: Mapping[str, float] = field(default_factory=dict)


class Guidance(Protocol):
    """A diffusion prior that pulls rendered pictures towards plausible ones."""

    picture_size: int
    """Pixels a side that it wants rendered; other sizes are resized inside, with the gradient."""

    def set_reference(self, reference: ReferencePicture) -> None:
        """Take the picture to condition on; called once a job."""

    def gradient(
        self,
        rgba: Float[Tensor, "n 4 height width"],
        cameras: Camera,
        progress: float,
        generator: torch.Generator | None = None,
    ) -> GuidanceResult:
        """Score distillation on rendered pictures.

        Args:
            rgba: Premultiplied sRGB in [0, 1], detached.
            cameras: Batch of the n cameras they were rendered from.
            progress: Part of the optimisation done, 0 to 1; sets the noise level. In a fine stage it goes on from 1 to 2,
                where noise stays as at 1.
            generator: Source of the noise.
        """


@runtime_checkable
class SplitGuidance(Guidance, Protocol):
    """Guidance whose random numbers can be drawn ahead, so that the rest needs no host and can be part of a CUDA graph."""

    def draw(self, n: int, progress: float, generator: torch.Generator | None = None) -> tuple[Any, ...]:
        """Everything about a step on n views that the device cannot know: random numbers and what follows from `progress`.

        Returns:
            Tensors on the device, or nested tuples of them; their shapes depend on n alone. Their first dimension counts the
            views, so that the views of one step can be split; what they have in common has no dimension.
        """

    def distill(
        self, rgba: Float[Tensor, "n 4 height width"], cameras: Camera, draws: tuple[Any, ...]
    ) -> GuidanceResult:
        """`gradient` with the numbers of an earlier `draw`; without notes."""


class Likeness(Protocol):
    """What new views have in common with the picture, as a loss besides the prior."""

    def set_reference(self, reference: ReferencePicture) -> None:
        """Take the picture; called once a job."""

    def loss(self, rgba: Float[Tensor, "n 4 height width"], cameras: Camera) -> Float[Tensor, ""]:
        """The loss, already weighted; differentiable, and without need of the host, so that a CUDA graph can hold it.

        Args:
            rgba: Premultiplied sRGB in [0, 1], with its gradient.
            cameras: Batch of the n cameras they were rendered from.
        """


@runtime_checkable
class ViewSampler(Protocol):
    """A prior that can draw views of the object from nothing but the picture."""

    def sample_views(
        self,
        cameras: Camera,
        n_steps: int,
        *,
        generator: torch.Generator | None,
        on_step: Callable[[int], None] | None,
        n_drafts: int,
        temperature: float,
    ) -> Float[Tensor, "n 4 size size"]:
        """Views from noise, premultiplied RGBA in [0, 1]; `on_step` hears of each denoising step and may raise to stop.

        Args:
            n_drafts: Draws of noise that agree on the layout.
            temperature: Width of the noise.
        """

    def mirror_errors(self, azimuths_rad: Float[Tensor, " n"], times: Sequence[float]) -> Float[Tensor, " n"]:
        """How badly the picture, left and right exchanged, fits as the view from azimuths around the reference, at its own
        height and distance: logarithms, up to a constant, and their mean over noise times, 0 to 1."""

    def know_mirrored(self, azimuth_rad: float) -> None:
        """From now on the picture, left and right exchanged, is known to be the view from this azimuth: what is drawn or
        distilled has to agree with it."""


@dataclass(frozen=True)
class Priors:
    """All that an optimisation asks; each has its reference set."""

    guidance: Guidance | None = None
    likeness: Likeness | None = None
    """A further loss of distilled views."""
    sampler: ViewSampler | None = None
    """Draws the views of the warm start."""
    late: Callable[[], Priors] | None = None
    """Reads the others, which the warm start does not ask: called before the first step that does."""
