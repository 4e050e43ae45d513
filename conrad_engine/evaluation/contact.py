"""Contact sheets: ten objects a page, each with its picture, the truth and the result from four sides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..mesh.mesh import TexturedMesh
from .metrics import on_white
from .renders import render
from .scoring import Row
from .suite import SuiteObject, TruthView, read_rgba

ANGLES_DEG = ((45, 30), (90, 0), (180, 30), (270, 0))
TILE = 160
CAPTION = 20
PER_PAGE = 10
STRIP_NAME = "strip.png"
INK, PAPER = (40, 40, 40), (255, 255, 255)


def _tile(rgba: np.ndarray) -> Image.Image:
    rgb = Image.fromarray(np.round(np.clip(on_white(rgba), 0, 1) * 255).astype(np.uint8))
    rgb.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
    tile = Image.new("RGB", (TILE, TILE), PAPER)
    tile.paste(rgb, ((TILE - rgb.width) // 2, (TILE - rgb.height) // 2))
    return tile


def contact_views(truth: SuiteObject) -> list[TruthView]:
    """The four views of the sheet, or the first four where the suite has others."""
    chosen = [view for angles in ANGLES_DEG for view in truth.views if (view.azimuth_deg, view.elevation_deg) == angles]
    return chosen if len(chosen) == len(ANGLES_DEG) else truth.views[: len(ANGLES_DEG)]


def write_strip(mesh: TexturedMesh | None, truth: SuiteObject, picture: Path, folder: Path) -> None:
    """One object's line of the contact sheet: the input, the truth and the result from the same sides."""
    views = contact_views(truth)
    expected = [view.rgba() for view in views]
    empty = np.zeros((TILE, TILE, 4))
    ours = [empty if mesh is None or len(mesh.faces) == 0 else render(mesh, view.camera) for view in views]
    strip = Image.new("RGB", (TILE * (1 + 2 * len(views)) + 16, TILE), (225, 225, 225))
    for i, rgba in enumerate([read_rgba(picture), *expected, *ours]):
        # Thin lines part the input, the truth and the result.
        strip.paste(_tile(rgba), (i * TILE + 8 * ((i > 0) + (i > len(views))), 0))
    strip.save(folder / STRIP_NAME, optimize=True)


def write_contact_sheets(name: str, entries: list[tuple[Path, Row]], out: Path) -> list[Path]:
    """Write NAME_01.png and following.

    Args:
        entries: Folder with the object's strip, and its scores; in the order they are to appear.
    """
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob(f"{name}_[0-9][0-9].png"):
        old.unlink()
    entries = [entry for entry in entries if (entry[0] / STRIP_NAME).is_file()]
    pages = [entries[i : i + PER_PAGE] for i in range(0, len(entries), PER_PAGE)]
    return [_write_page(page, out / f"{name}_{number:02d}.png") for number, page in enumerate(pages, 1)]


def _write_page(entries: list[tuple[Path, Row]], path: Path) -> Path:
    strips = [Image.open(folder / STRIP_NAME).convert("RGB") for folder, _ in entries]
    page = Image.new("RGB", (strips[0].width, CAPTION + len(strips) * (TILE + CAPTION)), PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for i, title in ((0, "input"), (1, "truth"), (5, "result")):
        draw.text((i * TILE + 4 + 8 * ((i > 0) + (i > 4)), 2), title, INK, font)
    for k, (strip, (_, row)) in enumerate(zip(strips, entries)):
        top = CAPTION + k * (TILE + CAPTION)
        page.paste(strip, (0, top))
        draw.text((4, top + TILE + 2), _caption(row), INK, font)
    page.save(path, optimize=True)
    return path


def _caption(row: Row) -> str:
    parts = [
        str(row["object"]),
        f"PSNR {row['novel_psnr']:.1f}",
        f"rear {row['rear_psnr']:.1f}",
        f"IoU {row['novel_iou']:.2f}",
    ]
    if row.get("chamfer") is not None:
        parts.append(f"Chamfer {row['chamfer']:.3f}")
    parts.append(f"reference {row['reference_psnr']:.1f} dB")
    return "    ".join([*parts, *row["failures"]])
