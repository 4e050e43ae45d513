"""The published systems' settings: they exist, are valid, and differ from the constrained ones in the constraint alone."""

from __future__ import annotations

import dataclasses
import json

import pytest

from conrad_engine.baselines import BASELINES, baseline
from conrad_engine.config import MixtureConfig, StableDiffusionConfig, from_json, to_json
from conrad_engine.errors import InputError


@pytest.mark.parametrize("name", BASELINES)
def test_only_the_constraint_differs(name):
    plain, constrained = baseline(name), baseline(name, constrained=True)
    assert plain.constraint.kind == "loss" and constrained.constraint.kind == "inferred_depth"
    assert dataclasses.replace(plain, constraint=constrained.constraint) == constrained
    assert plain.optimize.warm_start_views == 0
    assert from_json(json.loads(json.dumps(to_json(plain)))) == plain


def test_the_published_numbers():
    assert isinstance(baseline("realfusion").guidance, StableDiffusionConfig)
    assert baseline("realfusion").guidance.scale == 100
    magic = baseline("magic123").guidance
    assert isinstance(magic, MixtureConfig) and magic.zero123_start == 40 * magic.stable_diffusion_start
    assert (magic.zero123.t_min, magic.zero123.t_start) == (0.2, 0.6)
    assert baseline("zero123").optimize.n_steps == 600


def test_an_unknown_baseline_is_named():
    with pytest.raises(InputError, match="unknown baseline 'x': use realfusion"):
        baseline("x")
