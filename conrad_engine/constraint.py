"""The ConRad constraint: the field's color, at and in front of the surface seen from the reference camera, is the picture.

Names against the article (blog 'Detail-preserving image-to-3D generation', arXiv:2311.05230): `picture` I, `distances` ρ(x)
(along the reference ray), `surface` d_ref, `delta` δ, `shell_density` λ, `fraction` 0.05, field F_θ with density σ_θ.
Three deviations, all needed: the depth rule is normalised (see `rendering.compositing.quantile_distances`), the printed
tests on T_ref compare a distance with a distance, and while the shape forms the picture is shown softened (see
`ConstrainedField.soften`). d_ref carries no gradient: it is the field's own, looked up.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from .cameras import Camera
from .config import ConstraintConfig
from .rendering.compositing import quantile_distances
from .rendering.interfaces import Field
from .rendering.occupancy import OccupancyGrid
from .rendering.renderer import render_density
from .resampling import reduced_by_area

WINDOW_MARGIN = 0.04
"""Margin around the silhouette's box, as a part of its longest side."""
N_RIM_PIXELS = 3
"""Pixels by which the inferred depth is continued past the mask: the rim of the object is still the picture's."""
N_FILLED_PIXELS = 32
"""Pixels by which it is continued inside the mask, over thin parts that the field has not found yet."""
SHELL_FRACTION = 0.5
"""The shell stands at the median depth: the dominant layer, wherever fog or a back wall would drag a higher percentile."""
HULL_PIXELS = 512
"""The carving margin `ConstraintConfig.dilate_px` is in pixels of a picture of this size."""


@dataclass(frozen=True)
class ReferenceView:
    """One picture of the object, cut to the object, and the camera that took it; both in the object frame."""

    rgb: Float[Tensor, "3 height width"]
    """sRGB in [0, 1], continued past the mask."""
    mask: Float[Tensor, "1 height width"]
    camera: Camera
    surface: Float[Tensor, "1 height width"] | None = None
    """Known ray distances in world units, nan where unknown."""

    @property
    def focal_at_origin(self) -> float:
        """Pixels of a world unit at the origin's depth."""
        return float(self.camera.intrinsics[0]) / float(self.camera.positions.norm())

    def to(self, device: torch.device | str) -> ReferenceView:
        surface = None if self.surface is None else self.surface.to(device)
        camera = self.camera.to(device, torch.float32)
        return replace(self, rgb=self.rgb.to(device), mask=self.mask.to(device), camera=camera, surface=surface)

    def resized(self, longest: int) -> ReferenceView:
        """The same view with at most `longest` pixels along its longer side, averaged by area."""
        height, width = self.mask.shape[1:]
        scale = longest / max(height, width)
        if scale >= 1:
            return self
        size = max(1, round(height * scale)), max(1, round(width * scale))
        # Colors are averaged by mask, so that nothing of what was continued past it comes back in.
        mask = reduced_by_area(self.mask, *size)
        rgb = reduced_by_area(self.rgb * (self.mask + 1e-3), *size) / (mask + 1e-3)
        surface = self.surface
        if surface is not None:
            surface = F.interpolate(surface[None], size, mode="nearest-exact")[0]
        return ReferenceView(rgb, mask, self.camera.resized(size[1], size[0]), surface)

    def softened(self, width: float) -> Float[Tensor, "3 height width"]:
        """The colors blurred inside the mask, by a Gaussian of this standard deviation in world units at the origin's depth."""
        sigma = width * self.focal_at_origin
        weight = self.mask + 1e-3
        sums = torch.cat([self.rgb * weight, weight]).cpu().numpy()
        sums = torch.from_numpy(gaussian_filter(sums, (0, sigma, sigma), mode="constant")).to(self.rgb)
        return sums[:3] / sums[3:]


def reference_view(
    rgb: np.ndarray, mask: np.ndarray, camera: Camera, surface: np.ndarray | None = None
) -> ReferenceView:
    """Cut a picture to its object.

    Args:
        rgb: (height, width, 3) in [0, 1].
        mask: (height, width) in [0, 1].
        camera: Of the whole picture, object frame.
        surface: Known ray distances (height, width), object frame units, nan where unknown.
    """
    rows, columns = np.flatnonzero((mask > 0.5).any(1)), np.flatnonzero((mask > 0.5).any(0))
    margin = round(WINDOW_MARGIN * max(rows[-1] - rows[0], columns[-1] - columns[0])) + 2
    top, bottom = max(0, rows[0] - margin), min(mask.shape[0], rows[-1] + 1 + margin)
    left, right = max(0, columns[0] - margin), min(mask.shape[1], columns[-1] + 1 + margin)
    window = np.s_[top:bottom, left:right]
    return ReferenceView(
        torch.from_numpy(np.ascontiguousarray(rgb[window])).permute(2, 0, 1).float().contiguous(),
        torch.from_numpy(np.ascontiguousarray(mask[window]))[None].float(),
        camera.cropped(float(left), float(top), int(right - left), int(bottom - top)).to(dtype=torch.float32),
        None if surface is None else torch.from_numpy(np.ascontiguousarray(surface[window]))[None].float(),
    )


class _View(nn.Module):
    """A reference view with the surface distances inferred so far."""

    def __init__(self, view: ReferenceView, config: ConstraintConfig, device: torch.device) -> None:
        super().__init__()
        coarse = view.resized(config.depth_size).to(device)
        self.picture = view.to(device)
        self.soft_rgb = self.picture.rgb
        """Colors as steps of the optimisation see them; see `ConstrainedField.soften`."""
        self.depth_camera = coarse.camera
        self.in_mask = coarse.mask[0] > 0.3
        self.inside = self.in_mask.flatten().nonzero()[:, 0]
        """Numbers of the depth map's pixels on the object: as a mask they would be counted, and waited for, at each use."""
        mask = self.picture.mask[None]
        self.size = torch.tensor([self.picture.camera.width, self.picture.camera.height], device=mask.device)
        radius = max(1, round(config.dilate_px * max(mask.shape) / HULL_PIXELS))
        # 1 inside the carving frustum, the mask and a narrow margin; 2 inside the mask itself.
        hull = (F.max_pool2d(mask, 2 * radius + 1, 1, radius) > 0.3).float() + (mask > 0.5)
        self.register_buffer("hull", hull)
        known = torch.full_like(coarse.mask, float("nan")) if coarse.surface is None else coarse.surface
        self.register_buffer("surface", self._continued(known[None]))

    def _continued(self, surface: Tensor) -> Tensor:
        """Distances grown into where there are none (nan): all over the mask, a few pixels past it, -1 beyond."""
        filled = torch.where(self.in_mask, surface.nan_to_num(nan=-1.0), -1.0)
        for step in range(N_FILLED_PIXELS):
            grown = torch.where(filled < 0, F.max_pool2d(filled, 3, 1, 1), filled)
            # Past the mask only the first few pixels; inside it as far as it goes.
            filled = grown if step < N_RIM_PIXELS else torch.where(self.in_mask, grown, filled)
        # A pixel of the object that meets no density at all is the picture's all along its ray.
        return torch.where(filled < 0, torch.where(self.in_mask, float("inf"), -1.0), filled)

    @torch.no_grad()
    def infer_surface(
        self, field: Field, n_samples: int, fraction: float, occupancy: OccupancyGrid | None, is_static: bool
    ) -> None:
        """Look where the field's surface is now, seen from this camera."""
        origins, directions = (x[self.inside] for x in self.depth_camera.rays())
        found = torch.full_like(self.surface.flatten(), float("nan"))
        weights, t_starts, steps = render_density(field, origins, directions, n_samples, occupancy, is_static)
        distances = quantile_distances(weights, t_starts, steps, fraction)
        found[self.inside] = torch.where(weights.sum(-1) > 0.02, distances, float("nan"))
        # In place: a captured step reads the map where it was captured.
        self.surface.copy_(self._continued(found.view_as(self.surface)))

    def lookup(self, positions: Float[Tensor, "n 3"]) -> _Lookup:
        """What this view says of some points."""
        uv, z_depths = self.picture.camera.project(positions)
        return _Lookup(self, positions, (uv / self.size * 2 - 1)[None, None], z_depths)


@dataclass(frozen=True)
class _Lookup:
    """Points as a view sees them. Only what is asked for is looked up: most points are asked for their density alone."""

    view: _View
    positions: Float[Tensor, "n 3"]
    grid: Float[Tensor, "1 1 n 2"]
    """Where they lie in the picture, -1 to 1."""
    z_depths: Float[Tensor, " n"]

    def _nearest(self, table: Tensor) -> Tensor:
        # Past the window the border's own value counts: empty, or open where the object leaves the picture.
        return F.grid_sample(table, self.grid, mode="nearest", align_corners=False, padding_mode="border")[0, 0, 0]

    @cached_property
    def place(self) -> Float[Tensor, " n"]:
        """2 inside the mask, 1 in the margin around it, 0 outside; 1 behind the camera."""
        return torch.where(self.z_depths > 0, self._nearest(self.view.hull), 1.0)

    @cached_property
    def surface(self) -> Float[Tensor, " n"]:
        """The surface's distance along each point's ray; negative where there is none."""
        in_picture = (self.grid[0, 0].abs() <= 1).all(-1) & (self.z_depths > 0)
        return torch.where(in_picture, self._nearest(self.view.surface), -1.0)

    @cached_property
    def distances(self) -> Float[Tensor, " n"]:
        return self.view.picture.camera.distances(self.positions)

    def colors(self, is_soft: bool) -> Float[Tensor, "n 3"]:
        """The picture's."""
        rgb = self.view.soft_rgb if is_soft else self.view.picture.rgb
        return F.grid_sample(rgb[None], self.grid, align_corners=False, padding_mode="border")[0, :, 0].T


class ConstrainedField(nn.Module):
    """A field seen through its constraint. The renderer cannot tell it from any other field."""

    def __init__(self, field: Field, views: list[ReferenceView], config: ConstraintConfig) -> None:
        super().__init__()
        self.field, self.config = field, config
        self.views = nn.ModuleList(_View(view, config, field.aabb.device) for view in views)
        self.fraction = config.fraction_start
        self.delta = config.delta
        self.has_shell = config.kind == "known_depth"
        self.is_soft = False

    @property
    def aabb(self) -> Tensor:
        return self.field.aabb

    def with_pictures(self, views: list[ReferenceView]) -> ConstrainedField:
        """The same constraint and surfaces with other (larger) versions of the pictures, for evaluation and texturing."""
        other = ConstrainedField(self.field, views, self.config)
        for mine, theirs in zip(self.views, other.views):
            theirs.surface = mine.surface.clone()
        other.fraction, other.delta, other.has_shell = self.fraction, self.delta, self.has_shell
        return other

    def soften(self, width: float) -> None:
        """From now on show the pictures blurred, as steps of the optimisation should see them (inferred form only).

        What other views are compared with is blurry, and places small print a little elsewhere. The print itself cannot give
        way, so the surface would: dark letters on a light panel became holes, through which the field's free colors show.

        Args:
            width: Standard deviation of the blur, world units.
        """
        if self.config.kind == "inferred_depth":
            self.is_soft = True
            for view in self.views:
                view.soft_rgb = view.picture.softened(width)

    def sharp(self) -> ConstrainedField:
        """The same field with the pictures as they are: what is shown and measured."""
        other = copy.copy(self)
        other.is_soft = False
        return other

    def set_progress(self, progress: float) -> None:
        """The fraction falls during the first half: the median paints less of a half-formed blob than the 95th percentile.

        From `shell_from` on the inferred form has an opaque shell, too: the article's first form at the depth of its second.
        The shell stands at the median depth and nothing behind it is seen, so the picture's color ends there as well.
        """
        kind = self.config.kind
        self.has_shell = kind == "known_depth" or (kind == "inferred_depth" and progress >= self.config.shell_from)
        part = min(1.0, 2 * progress)
        falling = self.config.fraction_start + part * (self.config.fraction_end - self.config.fraction_start)
        self.fraction = SHELL_FRACTION if self.has_shell else falling

    def infer_surfaces(self, n_samples: int, occupancy: OccupancyGrid | None = None, is_static: bool = False) -> None:
        """Update d_ref of every view from the live field (inferred form only); `is_static` as in `render_rays`."""
        if self.config.kind != "known_depth":
            # Without the shell, or the surface would only ever find itself.
            has_shell, self.has_shell = self.has_shell, False
            for view in self.views:
                view.infer_surface(self, n_samples, self.fraction, occupancy, is_static)
            self.has_shell = has_shell

    def _constrained_density(self, density: Tensor, lookups: list[_Lookup]) -> Tensor:
        for seen in lookups:
            density = torch.where(seen.place > 0, density, 0.0)
        if not self.has_shell:
            return density
        for seen in lookups:
            is_known = (seen.place > 1) & seen.surface.isfinite() & (seen.surface > 0)
            in_shell = is_known & ((seen.distances - seen.surface).abs() <= self.delta)
            density = torch.where(in_shell, density.clamp(min=self.config.shell_density), density)
            if self.config.kind == "known_depth":
                density = torch.where(is_known & (seen.distances < seen.surface - self.delta), 0.0, density)
        return density

    def density(self, positions: Float[Tensor, "n 3"]) -> Float[Tensor, " n"]:
        return self._constrained_density(self.field.density(positions), [v.lookup(positions) for v in self.views])

    def density_and_color(self, positions: Float[Tensor, "n 3"]) -> tuple[Tensor, Tensor]:
        density, color = self.field.density_and_color(positions)
        lookups = [view.lookup(positions) for view in self.views]
        density = self._constrained_density(density, lookups)
        if self.config.kind == "loss":
            return density, color
        # Where several views claim a point, the one it lies nearest to the surface of is the one that sees it.
        nearest = torch.full_like(density, float("inf"))
        for seen in lookups:
            behind = seen.distances - seen.surface - self.delta
            share = _share(behind, seen.surface, self.config.softness)
            wins = share * (behind.abs() < nearest) if len(lookups) > 1 else share
            nearest = torch.where(wins > 0, behind.abs(), nearest)
            color = torch.lerp(color, seen.colors(self.is_soft), wins[:, None])
        return density, color


def _share(behind: Tensor, surface: Tensor, softness: float) -> Tensor:
    """Part of the picture's color at points this far behind the boundary: 1 in front of it, 0 behind."""
    has_picture = surface > 0
    if softness > 0:
        return torch.sigmoid(-behind.nan_to_num(neginf=-1e3) / softness) * has_picture
    return ((behind < 0) & has_picture).to(behind)
