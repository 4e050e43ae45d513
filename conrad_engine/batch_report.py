"""The report of a batch: one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import time
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from .files import write_atomic

if TYPE_CHECKING:
    from .batch import Entry

PICTURE_SIDE = 220
VIEWS_WIDTH = 1000
SCORE_WORDS = ("psnr", "iou", "ssim", "lpips", "n_faces")
"""Measures whose name holds one of these are shown."""

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1280px; padding: 0 1rem;
 color: #222; background: #fff }
h1 { font-size: 1.4rem; margin: 0 } .sum { color: #555; margin: .3rem 0 1.2rem }
.item { display: grid; grid-template-columns: 240px 1fr; gap: 1rem; padding: 1rem 0; border-top: 1px solid #ddd }
.item > div { min-width: 0 } .item img { max-width: 100%; border-radius: 4px; display: block }
h2 { font-size: 1rem; margin: 0 0 .4rem; overflow-wrap: anywhere } .meta { color: #555; font-size: .85rem; margin: .4rem 0 0 }
.tag { font-size: .75rem; padding: .1rem .5rem; border-radius: 1rem; margin-left: .4rem; color: #fff; font-weight: 600 }
.done { background: #2a7d46 } .failed { background: #b3261e } .todo { background: #777 }
.why { background: #fdecea; color: #7a1c16; padding: .6rem .8rem; border-radius: 4px; overflow-wrap: anywhere }
table { border-collapse: collapse; font-size: .85rem; margin-top: .6rem } td { padding: .1rem 1rem .1rem 0 }
td:last-child { text-align: right; font-variant-numeric: tabular-nums }
@media (max-width: 700px) { .item { grid-template-columns: 1fr } }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd } .item { border-color: #333 }
 .sum, .meta { color: #999 } .why { background: #3a1a18; color: #f2b8b5 } }
"""


def write_report(out: Path, folder: Path, entries: dict[str, Entry]) -> None:
    """Write `report.html`: failures first, then the rest by name.

    Args:
        folder: Where the pictures are.
    """
    ordered = sorted(entries.items(), key=lambda item: (item[1].state != "failed", item[0]))
    body = "\n".join(_item(out, folder, name, entry) for name, entry in ordered)
    counts = {state: sum(e.state == state for e in entries.values()) for state in ("done", "failed", "todo")}
    seconds = sum(entry.seconds for entry in entries.values())
    words = f"{counts['done']} done, {counts['failed']} failed" + (
        f", {counts['todo']} to do" if counts["todo"] else ""
    )
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>ConRad batch: {words}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(folder.resolve().name)}: {words}</h1>"
        f"<p class=sum>{_duration(seconds)} of computing, written {time.strftime('%Y-%m-%d %H:%M')}</p>\n{body}\n</html>\n"
    )
    write_atomic(out / "report.html", page.encode())


def _item(out: Path, folder: Path, name: str, entry: Entry) -> str:
    picture = _embedded(folder / entry.picture, PICTURE_SIDE, PICTURE_SIDE)
    seen = f"<img src='{picture}' alt='input picture'>" if picture else "<p class=meta>the picture cannot be shown</p>"
    meta = [_duration(entry.seconds) if entry.seconds else "", entry.where]
    meta += [f"attempt {entry.attempts}" if entry.attempts > 1 else ""]
    right = f"<p class=why>{html.escape(entry.message)}</p>" if entry.state == "failed" else ""
    if entry.state == "done":
        views = _embedded(out / name / "sheet.png", VIEWS_WIDTH, VIEWS_WIDTH)
        right = f"<img src='{views}' alt='views of the object'>" if views else ""
        right += _scores(entry.metrics)
    return (
        f"<section class=item><div>{seen}<p class=meta>{html.escape(' · '.join(filter(None, meta)))}</p></div>"
        f"<div><h2>{html.escape(name)}<span class='tag {entry.state}'>{entry.state}</span></h2>{right}</div></section>"
    )


def _scores(metrics: dict) -> str:
    rows = [
        f"<tr><td>{html.escape(name)}<td>{value:.4g}"
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and any(word in name for word in SCORE_WORDS)
    ]
    return f"<table>{''.join(rows)}</table>" if rows else ""


def _embedded(path: Path, width: int, height: int) -> str:
    """A reduced copy of a picture as a data address; empty if it cannot be read."""
    try:
        with Image.open(path) as picture:
            picture.draft("RGB", (2 * width, 2 * height))
            upright = ImageOps.exif_transpose(picture)
            upright.thumbnail((width, height))
            ground = Image.new("RGBA", upright.size, (255, 255, 255, 255))
            ground.alpha_composite(upright.convert("RGBA"))
            buffer = io.BytesIO()
            ground.convert("RGB").save(buffer, "jpeg", quality=85)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    return f"{minutes} min {int(seconds % 60)} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
