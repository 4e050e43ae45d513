"""Credits: joins the licenses of a mesh and its textures, and writes ATTRIBUTION.md."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from .meshes import Mesh

TITLES = {
    "sweethome3d": ("Sweet Home 3D furniture catalogues", "Debian package sweethome3d-furniture; www.sweethome3d.com"),
    "flightgear": ("FlightGear scenery models", "Debian package flightgear-data-base; www.flightgear.org"),
    "0ad": ("0 A.D.", "Debian package 0ad-data; play0ad.com"),
    "supertuxkart": ("SuperTuxKart", "Debian package supertuxkart-data; supertuxkart.net"),
}
CATALOGUES = {
    "BlendSwap-CC-0": "Blend Swap CC-0: models by the authors named, from www.blendswap.com; cleaned and "
    "converted by Emmanuel Puybaret. CC0, credit not required",
    "BlendSwap-CC-BY": "Blend Swap CC-BY: models by the authors named, from www.blendswap.com; cleaned and "
    "converted by Emmanuel Puybaret. CC BY 3.0",
    "KatorLegaz": "Kator Legaz: copyright 2003-2008 Andrew Kator and Jennifer Legaz. CC BY 3.0 United States",
    "Reallusion": "Reallusion: copyright 2008-2016 Reallusion, www.reallusion.com. CC BY 3.0 United States",
    "Scopia": "Scopia: copyright Emmanuel Puybaret / eTeks and Scopia Visual Interfaces Systems, www.scopia.es. CC BY 3.0",
}


def with_textures(mesh: Mesh, license: str, author: str, credit: Callable[[Path], tuple[str, str]]) -> tuple[str, str]:
    """Licenses and authors of the mesh and of every texture it shows, each once, mesh first."""
    files = sorted(
        {mesh.materials[m].file for m in set(mesh.face_materials.tolist()) if mesh.materials[m].file is not None}
    )
    credits = [(license, author), *map(credit, files)]
    licenses, authors = dict.fromkeys(c[0] for c in credits if c[0]), dict.fromkeys(c[1] for c in credits if c[1])
    return " + ".join(licenses), " | ".join(authors)


def _by_credit(items: list) -> list[str]:
    """Bullets: authors and license, then the objects."""
    groups = defaultdict(list)
    for item in items:
        groups[item.author or "author not named in the package", item.license].append(item)
    lines = []
    for (author, license), members in sorted(groups.items()):
        names = ", ".join(sorted({item.name for item in members}))
        lines.append(f"- **{author}** ({license}): {names}")
    return lines


def document(items: list) -> str:
    """ATTRIBUTION.md for the objects of a pool."""
    lines = [
        "# Attribution",
        "",
        "The pool holds changed copies (simplified, rescaled, smaller textures) of the works named here,",
        "as their packages state authors and licenses.",
        "",
    ]
    for source, (title, origin) in TITLES.items():
        members = [item for item in items if item.source == source]
        if not members:
            continue
        lines += [f"## {title}: {len(members)} objects", "", f"Origin: {origin}.", ""]
        if source == "sweethome3d":
            for catalogue, statement in CATALOGUES.items():
                part = [item for item in members if item.key.startswith(f"{catalogue}/")]
                if part:
                    lines += [f"### {statement}", "", *_by_credit(part), ""]
        elif source == "supertuxkart":
            lines += [
                "Authors and licenses of each mesh and its textures, from the package's copyright file.",
                "",
                *_by_credit(members),
                "",
            ]
        elif source == "flightgear":
            lines += [
                "Copyright 1999-2017 Curtis L. Olson and the FlightGear team (the package's AUTHORS and Thanks files). "
                "GNU GPL, version 2 or later.",
                "",
            ]
        else:
            lines += ["Copyright 2010 Wildfire Games. Creative Commons Attribution-ShareAlike 3.0.", ""]
    return "\n".join(lines)
