"""Runs the pipeline, or a baseline, on the objects of a suite and scores what comes out.

    OUT/table.txt, table.md          every variant that OUT holds, one line each
    OUT/results.json                 settings, summaries and every object's row
    OUT/sheets/VARIANT_01.png        contact sheets
    OUT/VARIANT/settings.json        what the variant was run with; another run there must use the same
    OUT/VARIANT/OBJECT/              the result folder of the pipeline, evaluation.json and strip.png beside it

A run can be stopped and started again: objects with an evaluation.json are not done twice.
"""

from __future__ import annotations

import json
import logging
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import PipelineConfig, to_json
from ..errors import ConradError, InputError
from ..files import make_folder, write_atomic, write_json
from ..mesh.glb import read_textured, write_glb
from ..monitor import Monitor
from .baselines import BASELINES
from .contact import write_contact_sheets, write_strip
from .scoring import Row, evaluate_result, score_mesh
from .suite import SuiteObject, read_object, read_rgba, read_suite, write_picture
from .tables import LEGEND, markdown_table, plain_table, summarize, table_cells, worst_table
from .variants import Variant, find_variant
from .workers import run_tasks

if TYPE_CHECKING:
    from ..pipeline import Job

log = logging.getLogger(__name__)

Generate = Callable[["Job", Path, Monitor], Any]
"""`pipeline.generate`: a job, the result folder, a monitor."""
RESULT_NAME = "evaluation.json"


@dataclass(frozen=True)
class Task:
    """One object of one variant."""

    truth: Path
    folder: Path
    variant: Variant
    config: PipelineConfig
    generate: Generate


def pipeline_generate(job: Job, folder: Path, monitor: Monitor) -> Any:
    """The real pipeline, imported where it runs: the parent of the workers never loads it."""
    from ..pipeline import generate

    return generate(job, folder, monitor)


def evaluate_suite(
    suite: str | Path,
    out: str | Path,
    config: PipelineConfig,
    variants: tuple[str, ...] = ("constraint",),
    n_workers: int = 0,
    limit: int | None = None,
    generate: Generate = pipeline_generate,
    on_object: Callable[[str, Row], None] | None = None,
) -> dict[str, dict]:
    """Run and score every object of a suite, in every variant.

    Args:
        suite: See `suite.py`.
        out: Folder for the results; what is there already is kept and not done again.
        config: Settings before the variants' own changes.
        variants: Names in `variants.VARIANTS`.
        n_workers: Processes at once, on one device too; 0 stays in this process.
        limit: Take only the first objects, spread over the suite.
        generate: Stands for `pipeline.generate`.
        on_object: Called with the variant's name and the row after each object.

    Returns:
        The summary of every variant in `out`, of this run and of former ones.

    Raises:
        InputError: The suite or a variant cannot be used, or `out` has results of other settings.
    """
    objects = read_suite(suite)
    if limit is not None and limit < len(objects):
        # Spread evenly, so that every source of the suite has its share.
        objects = [objects[i] for i in np.linspace(0, len(objects) - 1, limit).round().astype(int)]
    out = make_folder(Path(out))
    chosen = [find_variant(name) for name in variants]
    if n_workers > 0 and config.threads == 0:
        config = replace(config, threads=max(1, (os.cpu_count() or 1) // n_workers))
    for variant in chosen:
        _claim_folder(out / variant.name, variant, config, Path(suite))
    for variant in chosen:
        settings = variant.settings(config)
        tasks = [
            Task(truth.folder, out / variant.name / truth.name, variant, settings, generate)
            for truth in objects
            if not (out / variant.name / truth.name / RESULT_NAME).is_file()
        ]
        for row in run_tasks(run_task, tasks, n_workers, _dead_worker):
            if on_object is not None:
                on_object(variant.name, row)
        _write_sheets(out, variant.name)
        write_tables(out)
    return write_tables(out)


def _claim_folder(folder: Path, variant: Variant, config: PipelineConfig, suite: Path) -> None:
    """Note the settings of a variant's folder, or check that they are those of the results in it."""
    make_folder(folder)
    settings = {} if variant.baseline else to_json(variant.settings(config))
    # Neither says anything about the result.
    settings.pop("threads", None)
    content = {"suite": str(suite.resolve()), "meaning": variant.meaning, "settings": settings}
    path = folder / "settings.json"
    if path.is_file():
        if json.loads(path.read_text(encoding="utf-8")) != content:
            raise InputError(f"{folder} has results of other settings or another suite; choose another output folder")
    else:
        write_json(path, content)


def run_task(task: Task) -> Row:
    """Make and score one object; whatever goes wrong becomes a row, so that one object never ends a suite."""
    truth = read_object(task.truth)
    task.folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    try:
        if not (task.folder / "mesh.glb").is_file():
            _make_mesh(task, truth)
        row = _score(task, truth)
    except ConradError as error:
        row = _failed_row(truth, f"{error.code}: {error}")
    except Exception as error:  # The row of a suite must say what happened, whatever a library raised.
        log.exception("object %s failed", truth.name)
        (task.folder / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
        row = _failed_row(truth, repr(error))
    row.setdefault("seconds", time.perf_counter() - start)
    write_json(task.folder / RESULT_NAME, row)
    return row


def _make_mesh(task: Task, truth: SuiteObject) -> None:
    start = time.perf_counter()
    if task.variant.baseline:
        mesh = BASELINES[task.variant.baseline](read_rgba(truth.folder / task.variant.picture), truth.setup)
        write_glb(mesh, task.folder / "mesh.glb")
    else:
        task.generate(make_job(task, truth), task.folder, Monitor())
    seconds = {"seconds": time.perf_counter() - start}
    write_json(task.folder / "time.json", seconds)


def make_job(task: Task, truth: SuiteObject) -> Job:
    """What the variant hands to the pipeline."""
    from ..pipeline import Job

    mask = None
    if task.variant.gives_mask:
        mask = task.folder / "mask.png"
        write_picture(read_rgba(truth.picture_path)[..., 3], mask)
    return Job(
        picture=truth.folder / task.variant.picture,
        config=task.config,
        mask=mask,
        depth=truth.folder / "depth.npz" if task.variant.gives_depth else None,
        depth_kind="metric",
        camera=truth.folder / "camera.json",
        name=truth.name,
    )


def _score(task: Task, truth: SuiteObject) -> Row:
    picture = truth.folder / task.variant.picture
    row = evaluate_result(task.folder, truth, picture)
    row |= field_scores(row.get("pipeline"))
    time_file = task.folder / "time.json"
    if time_file.is_file():
        row |= json.loads(time_file.read_text(encoding="utf-8"))
    write_strip(read_textured(task.folder / "mesh.glb"), truth, picture, task.folder)
    # Optimizer states of a hundred objects fill a disk, and a scored object is never gone on with.
    (task.folder / "checkpoint.pt").unlink(missing_ok=True)
    return row


def field_scores(pipeline: object) -> Row:
    """The field's own reference PSNR, which only the pipeline can measure, from its metrics.json."""
    if not isinstance(pipeline, dict) or "field_psnr_full" not in pipeline:
        return {}
    return {"field_reference_psnr": pipeline["field_psnr_full"]}


def _failed_row(truth: SuiteObject, reason: str) -> Row:
    row = score_mesh(None, truth)
    row["failures"] = [reason]
    return row


def _dead_worker(task: Task, exit_code: int) -> Row:
    truth = read_object(task.truth)
    row = _failed_row(truth, f"its process ended with code {exit_code} (out of memory?)")
    task.folder.mkdir(parents=True, exist_ok=True)
    write_json(task.folder / RESULT_NAME, row)
    return row


def read_rows(folder: Path) -> list[tuple[Path, Row]]:
    """Folders and rows of a variant's scored objects, by name."""
    paths = sorted(folder.glob(f"*/{RESULT_NAME}"))
    return [(path.parent, json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def _write_sheets(out: Path, name: str) -> None:
    write_contact_sheets(name, read_rows(out / name), out / "sheets")


def write_tables(out: Path) -> dict[str, dict]:
    """Write table.txt, table.md and results.json from all rows in `out`; return the summaries."""
    folders = [path.parent for path in sorted(out.glob("*/settings.json"), key=lambda path: path.stat().st_mtime_ns)]
    rows = {folder.name: [row for _, row in read_rows(folder)] for folder in folders}
    summaries = {name: summarize(found) for name, found in rows.items() if found}
    if not summaries:
        return {}
    cells = table_cells(summaries)
    text = plain_table(cells) + "\n" + LEGEND + "\n"
    for name, summary in summaries.items():
        text += f"\nWorst of {name}\n" + worst_table(summary, rows[name])
    write_atomic(out / "table.txt", text.encode())
    write_atomic(out / "table.md", (markdown_table(cells) + "\n" + LEGEND + "\n").encode())
    results = {
        name: {
            **json.loads((out / name / "settings.json").read_text(encoding="utf-8")),
            "summary": summary,
            "objects": rows[name],
        }
        for name, summary in summaries.items()
    }
    write_json(out / "results.json", results)
    return summaries
