"""A vertical plane of symmetry: where the object has one, the picture in a mirror is a view of its other side.

Most things are alike on two sides. The prior says how well the mirrored picture would do as the view from around there; a
plane found so gives a second picture of the object, which the prior then knows, at the price of an error of the plane of a
degree or two.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float

from .cameras import Camera
from .constraint import ReferenceView
from .guidance.interfaces import ViewSampler

log = logging.getLogger(__name__)

LEAST_TURN_DEG, MOST_TURN_DEG = 6.0, 80.0
"""Angles between plane and line of sight from which on the mirrored picture says something new, and up to which it may be
taken for the other side: beyond, it is the face of a head on its back, which the prior does not find strange enough."""

AXIS_TIMES = (0.85,) * 8
COARSE_TIMES, COARSE_STEP_DEG = (0.85,) * 4, 12.0
"""Noise times at which the prior is asked about where a plane is: much noise leaves nothing but the layout. Twice as many draws
of noise give no better answers where there are axes to go by, half as many angles no worse ones."""
USUAL_TURNS_DEG = (0, 6, 12, 18, 24, 36, 48, 60, 78, 90)
USUAL_ERRORS = (0.70, 0.45, 0.24, 0.14, 0.08, -0.01, -0.08, -0.10, -0.17, -0.20)
"""Its error then, over the median for a picture, at any angle between plane and line of sight: means over 300 objects. It
takes a face for a likelier back than side."""
LEAST_ADVANTAGE, MOST_OFF_AXIS_DEG = 0.6, 30.0
"""A thing does not stand square if the error at some angle is so much less than at the likelier axis; nor if the angle of the
least error is far from both axes."""

FINE_TIMES, FINE_STEP_DEG = (0.25, 0.55, 0.85), 3.0
"""Noise times at which it is asked where exactly: little noise leaves narrow dips."""
REACH, WINDOW = 5, 4
"""Steps from a guess up to which there may be a dip, and from a dip up to where the error must be higher again."""
LEAST_DIP = 0.12
"""By how much, on both sides (logarithm of the error)."""
SNAP_DEG = 4.5
"""A dip so near to one of the world's axes is taken to be on it: the lowest error may be as far off as that."""


def find_plane(sampler: ViewSampler, world_azimuth_rad: float | None = None) -> float | None:
    """The vertical plane through the origin about which the object is symmetric; None if there is none to be seen, or if the
    picture would say nothing new in its mirror.

    Most things stand square to the axes of a scene and are symmetric about one of them: the one that the prior likes better, if
    it does not like another angle far better. With less noise the prior's error, as a function of the angle, falls by a tenth
    and more, within ten degrees, where a plane is right (cf. ID-Pose, arXiv:2306.17140, for the cameras of several pictures).
    Such a dip says how far a thing stands askew; without an axis to go by there must be one.

    Args:
        sampler: Has its reference set.
        world_azimuth_rad: Of one of the world's level axes, if things are likely to stand square to them.

    Returns:
        Azimuth of its normal (radians); 0 is across the reference's line of sight.
    """
    all_around = np.arange(0, 180, COARSE_STEP_DEG)
    coarse_times = COARSE_TIMES * (2 if world_azimuth_rad is None else 1)  # twice: the prior alone must find it
    guess, error = likeliest(sampler, all_around[is_new(all_around)], coarse_times)
    is_square = False
    if world_azimuth_rad is not None:
        axes = (math.degrees(world_azimuth_rad) + np.array([0.0, 90.0])) % 180
        axis, its_error = likeliest(sampler, axes, AXIS_TIMES)
        off = off_deg(axis, guess)
        is_near = off <= MOST_OFF_AXIS_DEG or 90 - off <= COARSE_STEP_DEG or not is_new(axis)
        is_square = is_near and its_error - error < LEAST_ADVANTAGE
        guess = axis if is_square else guess
    if is_square and not is_new(guess):
        return None
    dip = dip_near(sampler, guess, FINE_TIMES * (1 if is_square else 2))
    angle = guess if is_square and (dip is None or off_deg(dip, guess) < SNAP_DEG) else dip
    if angle is None or not is_new(angle):
        return None
    log.info("symmetric about the plane at %.1f degrees", angle)
    return math.radians(angle)


def likeliest(sampler: ViewSampler, angles_deg: np.ndarray, times: Sequence[float]) -> tuple[float, float]:
    """The angle that the prior likes best, compared with what is usual; and its error over that."""
    unusual = mirror_errors(sampler, angles_deg, times) - usual_errors(angles_deg)
    return float(angles_deg[unusual.argmin()]), float(unusual.min())


def dip_near(sampler: ViewSampler, guess_deg: float, times: Sequence[float]) -> float | None:
    """The angle (degrees) where the prior's error dips deepest around a guess."""
    reach = REACH + WINDOW
    angles = guess_deg + np.arange(-reach, reach + 1) * FINE_STEP_DEG
    errors = mirror_errors(sampler, angles, times)
    depths = {}
    for k in range(WINDOW, len(angles) - WINDOW):
        before, after = errors[k - WINDOW : k - WINDOW + 2].min(), errors[k + WINDOW - 1 : k + WINDOW + 1].min()
        if errors[k] <= errors[k - 1 : k + 2].min():
            depths[k] = min(before, after) - errors[k]
    deepest = max(depths, key=depths.__getitem__, default=None)
    if deepest is None or depths[deepest] <= LEAST_DIP:
        return None
    # The lowest point of a parabola through the errors around it.
    steps = np.arange(-2, 3) * (FINE_STEP_DEG / 2)
    curve = np.polyfit(steps, mirror_errors(sampler, angles[deepest] + steps, times), 2)
    lowest = np.clip(-curve[1] / (2 * curve[0]), -FINE_STEP_DEG, FINE_STEP_DEG) if curve[0] > 0 else 0.0
    return float(angles[deepest] + lowest)


def mirror_errors(sampler: ViewSampler, azimuths_deg: np.ndarray, times: Sequence[float]) -> Float[np.ndarray, " n"]:
    """What the prior thinks of planes. In a mirror the reference moves by twice its angle."""
    azimuths_rad = torch.from_numpy(np.radians(2 * azimuths_deg)).float()
    return sampler.mirror_errors(azimuths_rad, times).double().cpu().numpy()


def usual_errors(angles_deg: np.ndarray) -> np.ndarray:
    """See `USUAL_ERRORS`."""
    return np.interp(turns_deg(angles_deg), USUAL_TURNS_DEG, USUAL_ERRORS)


def off_deg(angle_deg: float, other_deg: float) -> float:
    """Between two planes, 0 to 90."""
    return abs((angle_deg - other_deg + 90) % 180 - 90)


def turns_deg(angles_deg: np.ndarray | float) -> np.ndarray:
    """Angles, 0 to 90, between planes and the line of sight."""
    return np.minimum(angles_deg % 180, -angles_deg % 180)


def is_new(angles_deg: np.ndarray | float) -> np.ndarray:
    """Whether the picture in the mirror says something of the other side."""
    return (turns_deg(angles_deg) > LEAST_TURN_DEG) & (turns_deg(angles_deg) < MOST_TURN_DEG)


def mirrored_view(view: ReferenceView, azimuth_rad: float) -> ReferenceView:
    """The picture in the mirror as a view of the object, and the camera that took it."""
    return ReferenceView(view.rgb.flip(-1), view.mask.flip(-1), mirrored_camera(view.camera, azimuth_rad))


def mirrored_camera(camera: Camera, azimuth_rad: float) -> Camera:
    """The one that sees of the mirror image what `camera` sees of the thing, left and right exchanged."""
    normal = torch.tensor([math.cos(azimuth_rad), math.sin(azimuth_rad), 0.0], dtype=torch.float64)
    mirror = torch.eye(3, dtype=torch.float64) - 2 * torch.outer(normal, normal)
    # A mirror makes a right hand a left one, and so does a picture turned over: together they are a camera again.
    c2w = (mirror @ camera.c2w.double().cpu()) * torch.tensor([-1.0, 1, 1, 1], dtype=torch.float64)
    fx, fy, cx, cy = camera.intrinsics.unbind(-1)
    intrinsics = torch.stack([fx, fy, camera.width - cx, cy], -1)
    return replace(camera, c2w=c2w.to(camera.c2w), intrinsics=intrinsics)
