"""Which sources of meshes may be trained on, and which are kept for evaluation."""

from __future__ import annotations

import argparse

SOURCES = ("sweethome3d", "flightgear", "0ad", "supertuxkart", "procedural")
GREEN_SOURCES = ("sweethome3d", "procedural")
"""What may be used with attribution alone."""
RESERVED = ("libero", "robosuite", "pybullet", "torcs", "megaglest", "assimp", "gltf", "duck")
"""Parts of names of what is kept for evaluation; never trained on."""


def selected_sources(text: str, known: tuple[str, ...] = SOURCES) -> tuple[str, ...]:
    """Source names from `all`, `green` or a list with commas.

    Raises:
        argparse.ArgumentTypeError: A source is reserved for evaluation, or unknown.
    """
    if text in ("all", "green"):
        return tuple(name for name in known if text == "all" or name in GREEN_SOURCES)
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    choice = f"use all, green or some of {', '.join(known)}"
    for name in names:
        if any(word in name.lower() for word in RESERVED):
            raise argparse.ArgumentTypeError(f"{name} is kept for evaluation and must not be trained on: {choice}")
        if name not in known:
            raise argparse.ArgumentTypeError(f"unknown source {name!r}: {choice}")
    return names
