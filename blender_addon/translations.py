"""Translations of the user interface: locale -> (context, English text) -> text. English is in the sources.

A translation is one more entry here; `bpy.app.translations.locales` lists the names of locales.
"""

from __future__ import annotations

import bpy

DICTIONARY: dict[str, dict[tuple[str, str], str]] = {
    "de_DE": {
        ("*", "Turn the picture into a textured object; Blender stays usable meanwhile"): (
            "Macht aus dem Bild ein Objekt mit Textur; Blender bleibt dabei benutzbar"
        ),
        ("*", "Add Reference Camera"): "Referenzkamera hinzufügen",
        ("*", "Project Picture"): "Bild projizieren",
        ("Operator", "Generate"): "Erzeugen",
        ("Operator", "Add Reference Camera"): "Referenzkamera hinzufügen",
        ("Operator", "Project Picture"): "Bild projizieren",
        ("Operator", "Stop and Keep"): "Anhalten und behalten",
        ("Operator", "Set Up Engine"): "Engine einrichten",
        ("Operator", "Start Engine"): "Engine starten",
        ("Operator", "Stop Engine"): "Engine anhalten",
        ("Operator", "Free GPU Memory"): "GPU-Speicher freigeben",
        ("*", "Picture"): "Bild",
        ("*", "Quality"): "Qualität",
        ("*", "Results"): "Ergebnisse",
    },
}


def register() -> None:
    bpy.app.translations.register(__package__, DICTIONARY)


def unregister() -> None:
    bpy.app.translations.unregister(__package__)
