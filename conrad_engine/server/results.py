"""A job's result on the disk, complete or not there: `arrays.json` + `arrays.bin` and the files that can be fetched."""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from ..protocol import ARRAYS, MAX_FRAME_BYTES, RESULT_FILES
from ..protocol.messages import Table
from .store import ARRAY_FIELDS

DTYPES = {"vertices": "<f4", "faces": "<i4", "uvs": "<f4", "normals": "<f4", "texture": "u1"}
MAX_METRICS = 128
"""They travel with every state of a job."""


def write_result(job_folder: Path, number: int, mesh: Any, files: Path, metrics: Table) -> tuple[str, ...]:
    """Write result `number` of a job and return what can be fetched.

    Args:
        mesh: With the fields of `mesh.mesh.TexturedMesh`.
        files: Folder where the pipeline left its files.
    """
    parts = [ARRAYS]
    making = job_folder / f"making-{uuid.uuid4().hex}"
    making.mkdir()
    try:
        described: dict[str, Any] = {"metrics": metrics}
        with open(making / "arrays.bin", "wb") as file:
            for name in ARRAY_FIELDS:
                array = np.ascontiguousarray(getattr(mesh, name), DTYPES[name])
                described[name] = {"dtype": DTYPES[name], "shape": list(array.shape)}
                file.write(array.data)
            file.flush()
            os.fsync(file.fileno())
        (making / "arrays.json").write_text(json.dumps(described))
        for name in RESULT_FILES:
            if (files / name).is_file() and (files / name).stat().st_size <= MAX_FRAME_BYTES:
                shutil.copyfile(files / name, making / name)
                parts.append(name)
        final = job_folder / f"result-{number}"
        if final.exists():  # Finished before, but the server was not told.
            final.rename(job_folder / f"making-{uuid.uuid4().hex}")
        making.rename(final)
    finally:
        for rest in job_folder.glob("making-*"):
            shutil.rmtree(rest, ignore_errors=True)
    return tuple(parts)


def flat_metrics(metrics: dict, prefix: str = "") -> Table:
    """Nested measures as one flat table of what JSON can hold; lists and numbers that are not finite are left out."""
    flat: Table = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat.update(flat_metrics(value, f"{prefix}{name}."))
        elif isinstance(value, (bool, int, str)):
            flat[f"{prefix}{name}"[:100]] = value[:200] if isinstance(value, str) else value
        elif isinstance(value, (float, np.floating, np.integer)) and math.isfinite(value):
            flat[f"{prefix}{name}"[:100]] = float(value)
    return dict(list(flat.items())[:MAX_METRICS])
