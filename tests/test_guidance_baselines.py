"""The published systems' settings: they exist, are valid, and differ from the constrained ones in the constraint alone."""

from __future__ import annotations

import dataclasses
import json

import pytest

from conrad_engine.baselines import BASELINES, NEEDS_DEPTH, NEEDS_WORDS, baseline
from conrad_engine.cli import config_from, make_parser
from conrad_engine.config import MixtureConfig, StableDiffusionConfig, from_json, to_json
from conrad_engine.errors import InputError
from conrad_engine.evaluation.variants import find_variant


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
    assert baseline("magic123").optimize.fine_steps == 5000 and magic.zero123_end * magic.zero123_fine == 10
    assert baseline("zero123").optimize.n_steps == 600
    assert baseline("realfusion").guidance.word_steps > 0 and magic.stable_diffusion.word_steps > 0
    assert baseline("neurallift").optimize.depth_loss == "ranking" and baseline("neurallift").clip.weight == 1


def test_an_unknown_baseline_is_named():
    with pytest.raises(InputError, match="unknown baseline 'x': use realfusion"):
        baseline("x")


def parsed(*options):
    return config_from(make_parser().parse_args(["generate", "x.png", "--out", "o", "--camera", "c.json", *options]))


@pytest.mark.parametrize("name", BASELINES)
def test_the_command_line_takes_a_baseline_and_its_constrained_form(name):
    assert parsed("--baseline", name) == baseline(name)
    assert parsed("--baseline", name, "--constrained") == baseline(name, constrained=True)
    # What is said beside it counts for more, and a preset still says what the baseline leaves open.
    config = parsed("--preset", "draft", "--baseline", name, "--set", "optimize.n_steps=7")
    assert config.optimize.n_steps == 7 and config.mesh.n_faces == 20_000


def test_a_model_of_ones_own_goes_with_a_baseline():
    config = parsed("--baseline", "realfusion", "--set", "guidance.model=here")
    assert config.guidance.model == "here" and config.guidance.scale == 100
    # Also where the baseline's settings come second, as over a whole suite.
    config = find_variant("realfusion").settings(
        parsed("--guidance", "stable_diffusion", "--set", "guidance.model=here")
    )
    assert config.guidance.model == "here" and config.guidance.scale == 100


def test_a_suite_compares_each_baseline_with_its_constrained_form():
    for name in BASELINES:
        plain, constrained = find_variant(name), find_variant(f"{name}_constrained")
        assert plain.settings(parsed()).constraint.kind == "loss"
        assert constrained.settings(parsed()).constraint.kind == "inferred_depth"
        assert plain.gives_depth == (name in NEEDS_DEPTH)
    assert set(NEEDS_DEPTH) | set(NEEDS_WORDS) <= set(BASELINES)


def test_constrained_alone_says_nothing():
    with pytest.raises(InputError, match="goes with --baseline"):
        parsed("--constrained")
