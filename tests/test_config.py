"""Settings: presets, overrides by name, and the round trip through JSON."""

import json

import pytest

from conrad_engine import config as c
from conrad_engine.errors import InputError


@pytest.mark.parametrize("name", c.PRESETS)
@pytest.mark.parametrize("guidance", c.GUIDANCES)
def test_round_trip(name, guidance):
    config = c.with_overrides(c.preset(name), {"guidance": guidance, "seed": 7, "optimize.rate": "0.5"})
    assert c.from_json(json.loads(json.dumps(c.to_json(config)))) == config


def test_a_named_elevation_is_not_guessed():
    assert c.preset("draft").picture.guess_elevation
    named = c.with_overrides(c.preset("draft"), {"picture.elevation_deg": 25})
    assert not named.picture.guess_elevation and c.from_json(c.to_json(named)) == named
    both = c.with_overrides(c.preset("draft"), {"picture.elevation_deg": 25, "picture.guess_elevation": True})
    assert both.picture.guess_elevation and c.from_json(c.to_json(both)) == both


def test_settings_of_before_there_were_guesses_keep_their_elevation():
    data = c.to_json(c.preset("draft"))
    del data["picture"]["guess_elevation"]
    assert not c.from_json(data).picture.guess_elevation


def test_overrides_convert_text():
    config = c.with_overrides(
        c.preset("draft"), {"field.resolution": "80", "picture.is_elevation_known": "false", "constraint.kind": "loss"}
    )
    assert config.field_.resolution == 80 and config.picture.is_elevation_known is False
    assert config.constraint.kind == "loss"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optimize.n_stepz", 1, "unknown setting"),
        ("optimize", 1, "group"),
        ("seed.x", 1, "no parts"),
        ("optimize.n_steps", "many", "must be int"),
        ("optimize.n_steps", 1.5, "must be int"),
        ("optimize.rate", "nan", "finite"),
        ("picture.is_elevation_known", "maybe", "must be bool"),
        ("guidance", "magic", "unknown guidance"),
        ("constraint.kind", "wish", "unknown constraint"),
        ("mesh.n_faces", 5, "at least 100"),
        ("picture.elevation_deg", 95, "elevation"),
    ],
)
def test_bad_settings_are_named(name, value, message):
    with pytest.raises(InputError, match=message):
        c.with_overrides(c.preset("standard"), {name: value})


def test_unknown_preset():
    with pytest.raises(InputError, match="draft, standard, fine"):
        c.preset("best")
