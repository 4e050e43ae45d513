"""Slow, obvious twins of the engine's mathematics, one number at a time."""

from __future__ import annotations

import math

import numpy as np


def composite(densities, steps, colors):
    """One ray, front to back: weights, color and opacity by the definition of transmittance."""
    transmittance, weights, color = 1.0, [], np.zeros(3)
    for density, step, sample in zip(densities, steps, colors):
        alpha = 1 - math.exp(-density * step)
        weights.append(transmittance * alpha)
        color = color + transmittance * alpha * np.asarray(sample)
        transmittance *= 1 - alpha
    return np.array(weights), color, 1 - transmittance


def distortion(weights, mids, steps):
    """mip-NeRF 360, Eq. 15, as printed: a double sum."""
    total = 0.0
    for i in range(len(weights)):
        for j in range(len(weights)):
            total += weights[i] * weights[j] * abs(mids[i] - mids[j])
        total += weights[i] ** 2 * steps[i] / 3
    return total


def project(c2w, intrinsics, point):
    """One point through one camera: u, v, z-depth."""
    w2c = np.linalg.inv(np.vstack([c2w, [0, 0, 0, 1]]))
    x, y, z = (w2c @ [*point, 1])[:3]
    fx, fy, cx, cy = intrinsics
    return cx + fx * x / -z, cy - fy * y / -z, -z


def ranking(depths, relative):
    """NeuralLift-360's depth loss: each pair of rays in turn."""
    total = 0.0
    for i in range(len(depths)):
        for j in range(len(depths)):
            order = np.sign(relative[i] - relative[j])
            total += max(0.0, -order * (depths[i] - depths[j]))
    return total / len(depths) ** 2


def correlation(a, b):
    """Pearson's, from its definition."""
    a, b = np.asarray(a) - np.mean(a), np.asarray(b) - np.mean(b)
    return (a * b).sum() / math.sqrt((a**2).sum() * (b**2).sum())
