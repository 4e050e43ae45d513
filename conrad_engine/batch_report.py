"""The report of a batch: one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import math
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from .files import write_atomic

if TYPE_CHECKING:
    from .batch import Entry

PICTURE_SIDE = 220
VIEWS_WIDTH = 1000
SCORES = (
    ("mesh_psnr", "mesh against the picture", "{:.1f} dB"),
    ("field_psnr_full", "field against the picture", "{:.1f} dB"),
    ("mesh_iou", "mask IoU", "{:.3f}"),
    ("n_faces", "triangles", "{:,.0f}"),
    ("components", "parts", "{:.0f}"),
    ("manifold_edges", "manifold edges", "{:.2%}"),
    ("steps", "steps", "{:.0f}"),
)
"""What is shown of a job's metrics: name there, name for people, format."""
MEDIANS = ("mesh_psnr", "mesh_iou")
"""Those of which the head of the page shows the median."""

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
.item .none { display: grid; place-items: center; height: 140px; border: 1px dashed #bbb; border-radius: 4px }
.note { color: #7a5a00; font-size: .85rem; margin: .5rem 0 0 } .item:target { background: #f4f7ff }
dl { display: flex; flex-wrap: wrap; gap: .5rem 1.6rem; margin: .7rem 0 0; font-size: .85rem } dt { color: #666 }
dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums } .links { margin: 0 0 1rem; line-height: 1.9 }
.links a { color: #b3261e; margin-right: 1rem }
@media (max-width: 700px) { .item { grid-template-columns: 1fr } }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd } .item { border-color: #333 }
 .sum, .meta, dt { color: #999 } .why { background: #3a1a18; color: #f2b8b5 } .note { color: #d9b44a }
 .links a { color: #f2b8b5 } .item:target { background: #20242c } .item .none { border-color: #555 } }
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
    failed = [f"<a href='#{_anchor(name)}'>{html.escape(name)}</a>" for name, e in ordered if e.state == "failed"]
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>ConRad batch: {words}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(folder.resolve().name)}: {words}</h1>"
        f"<p class=sum>{_duration(seconds)} of computing{_medians(entries)}, written {time.strftime('%Y-%m-%d %H:%M')}</p>\n"
        + (f"<p class=links>Failed: {' '.join(failed)}</p>\n" if failed else "")
        + f"{body}\n</html>\n"
    )
    write_atomic(out / "report.html", page.encode())


def _anchor(name: str) -> str:
    return f"item-{name.encode().hex()}"


def _medians(entries: dict[str, Entry]) -> str:
    """Medians over what is done, as the rest of a sentence."""
    words = ""
    for key, label, form in SCORES:
        values = [e.metrics[key] for e in entries.values() if e.state == "done" and _is_number(e.metrics.get(key))]
        if key in MEDIANS and values:
            words += f", median {label} {form.format(statistics.median(values))}"
    return words


def _item(out: Path, folder: Path, name: str, entry: Entry) -> str:
    picture = _embedded(folder / entry.picture, PICTURE_SIDE, PICTURE_SIDE)
    seen = f"<img src='{picture}' alt='input picture'>" if picture else "<p class='meta none'>cannot be shown</p>"
    meta = [_duration(entry.seconds) if entry.seconds else "", entry.where]
    meta += [f"attempt {entry.attempts}" if entry.attempts > 1 else ""]
    right = f"<p class=why>{html.escape(entry.message)}</p>" if entry.state == "failed" else ""
    if entry.state == "done":
        views = _embedded(out / name / "sheet.png", VIEWS_WIDTH, VIEWS_WIDTH)
        right = f"<img src='{views}' alt='views of the object'>" if views else ""
        right += _scores(entry.metrics)
        right += "".join(f"<p class=note>{html.escape(str(text))}</p>" for text in entry.metrics.get("warnings", []))
    return (
        f"<section class=item id='{_anchor(name)}'><div>{seen}"
        f"<p class=meta>{html.escape(' · '.join(filter(None, meta)))}</p>{_stages(entry.metrics)}</div>"
        f"<div><h2>{html.escape(name)}<span class='tag {entry.state}'>{entry.state}</span></h2>{right}</div></section>"
    )


def _stages(metrics: dict) -> str:
    stages = metrics.get("seconds_by_stage")
    if not isinstance(stages, dict):
        return ""
    words = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in stages.items() if _is_number(seconds))
    return f"<p class=meta>{html.escape(words)}</p>"


def _scores(metrics: dict) -> str:
    cells = [
        f"<div><dt>{label}</dt><dd>{form.format(metrics[key])}</dd></div>"
        for key, label, form in SCORES
        if _is_number(metrics.get(key))
    ]
    return f"<dl>{''.join(cells)}</dl>" if cells else ""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


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
