"""Settings of the diffusion priors: validation, overrides by dotted names, and the way through JSON and back."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from conrad_engine.config import (
    PRESETS,
    EmbeddedPriorConfig,
    MixtureConfig,
    PipelineConfig,
    StableDiffusionConfig,
    WeightsConfig,
    Zero123Config,
    from_json,
    to_json,
    with_overrides,
)
from conrad_engine.errors import InputError

CONFIGS = [
    EmbeddedPriorConfig(scale=1.5),
    StableDiffusionConfig(model="folder/x", objective="ism", perp_neg=False, weights=WeightsConfig(allow_pickle=True)),
    Zero123Config(t_start=0.25, t_end=0.22, variant="stable_zero123"),
    MixtureConfig(
        embedded_start=1.0,
        zero123_start=0.0,
        zero123_end=0.0,
        spare_seen=0.5,
        zero123=Zero123Config(t_start=0.28, t_end=0.27, weights=WeightsConfig(memory="6", precision="bfloat16")),
        stable_diffusion=StableDiffusionConfig(negative_prompt="blurry, dark"),
    ),
]


@pytest.mark.parametrize("guidance", CONFIGS, ids=lambda config: type(config).__name__)
def test_settings_survive_json(guidance):
    config = replace(PRESETS["fine"], guidance=guidance, seed=7)
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


def test_overrides_reach_nested_parts():
    config = with_overrides(
        PipelineConfig(),
        {"guidance.zero123.weights.memory": "8", "guidance.zero123_end": "2.5", "guidance": "mixture"},
    )
    assert config.guidance.zero123.weights.memory == "8"
    assert config.guidance.zero123_end == 2.5


def test_overrides_of_one_group_are_checked_together():
    values = {"guidance": "zero123", "guidance.t_start": 0.2, "guidance.t_end": 0.1, "guidance.t_min": 0.05}
    assert with_overrides(PipelineConfig(), values).guidance.t_start == 0.2
    with pytest.raises(InputError, match="t_min <= t_end <= t_start"):
        with_overrides(PipelineConfig(), {"guidance": "zero123", "guidance.t_start": 0.2})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"guidance": "dalle"}, "unknown guidance 'dalle'"),
        ({"guidance": "mixture", "guidance.zero123": "x"}, "is a group"),
        ({"guidance": "mixture", "guidance.spare_seen.x": 1}, "has no parts"),
        ({"guidance": "mixture", "guidance.spare_seen": 1, "guidance.spare_seen.x": 1}, "has no parts"),
        ({"guidance": "mixture", "guidance.zero123.scal": 1}, "unknown setting 'guidance.zero123.scal'"),
        ({"guidance": "mixture", "guidance.spare_seen": 2}, "between 0 and 1"),
        ({"guidance": "mixture", "guidance.zero123.weights.memory": "7"}, "unknown memory preset '7'"),
        ({"guidance": "stable_diffusion", "guidance.objective": "vsd"}, "unknown objective 'vsd'"),
        ({"guidance": "stable_diffusion", "guidance.picture_size": 100}, "multiple of 8"),
    ],
)
def test_bad_overrides_are_named(values, message):
    with pytest.raises(InputError, match=message):
        with_overrides(PipelineConfig(), values)


def test_a_mixture_needs_a_prior():
    with pytest.raises(InputError, match="at least one positive weight"):
        MixtureConfig(zero123_start=0, zero123_end=0, stable_diffusion_start=0, stable_diffusion_end=0)
