"""From unpacked Debian packages to the packed mesh pool.

    apt-get download sweethome3d-furniture flightgear-data-base 0ad-data supertuxkart-data
    for p in *.deb; do dpkg -x $p DIR/${p%%_*}; done          # only unpacked, never installed
    python -m conrad_engine.training.pool_build --sources DIR --out POOL --only all|green|NAMES

DIR holds one folder a package. `green` builds the freely licensed source (CC0, CC BY) alone. Steps: `loaders` read, `meshes`
clean and normalize, `rules` choose, `simplify` reduces, `packing` writes, `attribution` credits.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections import Counter
from functools import partial
from multiprocessing import Pool as ProcessPool
from multiprocessing import TimeoutError
from pathlib import Path

import numpy as np

from ...errors import InputError
from ..raster import compiled_library
from ..sources import selected_sources
from . import attribution, rules
from .loaders import flightgear, supertuxkart, sweethome3d, zeroad
from .meshes import Candidate, cleaned, near_origin_uvs, normalized
from .packing import PackedObject, encode_geometry, encode_texture, index_mesh, write_pool
from .simplify import fitted_to_budget

LOADERS = {"sweethome3d": sweethome3d, "flightgear": flightgear, "0ad": zeroad, "supertuxkart": supertuxkart}
PACKAGES = {
    "sweethome3d": "sweethome3d-furniture",
    "flightgear": "flightgear-data-base",
    "0ad": "0ad-data",
    "supertuxkart": "supertuxkart-data",
}
MOST_RAW_FACES = 400_000
LONGEST_WAIT_S = 60
"""After this long without an answer a job counts as lost; jobs are answered nearly in order."""


def packed(candidate: Candidate, sources: Path) -> tuple[PackedObject | None, str]:
    """One candidate through load, filter, simplification and encoding; or None and the reason."""
    try:
        mesh = LOADERS[candidate.source].load(candidate)
    except (ValueError, IndexError, KeyError, OSError) as error:
        return None, f"unreadable: {type(error).__name__}"
    if len(mesh.faces) < 12 or len(mesh.faces) > MOST_RAW_FACES:
        return None, "few faces" if len(mesh.faces) < 12 else "huge"
    # Twice: cleaning may remove the triangles that set the size.
    mesh = normalized(cleaned(normalized(mesh))) if np.isfinite(mesh.vertices).all() else mesh
    if not len(mesh.faces):
        return None, "few faces"
    mesh = near_origin_uvs(mesh)
    reason = rules.reason_to_drop(mesh, rules.look_of(index_mesh(mesh)), candidate.source)
    if reason:
        return None, reason
    n_faces_before = len(mesh.faces)
    smaller, how = fitted_to_budget(mesh)
    if smaller is None:
        return None, how
    indexed = index_mesh(normalized(smaller))
    license, author = candidate.license, candidate.author
    if candidate.source == "supertuxkart":
        license, author = attribution.with_textures(
            mesh, license, author, partial(supertuxkart.texture_credit, sources)
        )
    return (
        PackedObject(
            source=candidate.source,
            key=candidate.key,
            name=candidate.name,
            category=candidate.category,
            license=license,
            author=author,
            geometry=encode_geometry(indexed),
            material_rgba=np.round(indexed.material_rgba * 255).astype(np.uint8),
            material_texture=indexed.material_texture,
            textures=[encode_texture(texture) for texture in indexed.textures],
            n_faces=len(indexed.faces),
            n_faces_before=n_faces_before,
            shape_hash=rules.shape_hash(mesh),
            appearance=rules.appearance(indexed),
        ),
        how,
    )


def _packed_or_crash(candidate: Candidate, sources: Path) -> tuple[PackedObject | None, str]:
    try:
        return packed(candidate, sources)
    except Exception as error:  # one broken file must not end a build of thousands; the reason is counted and printed
        traceback.print_exc()
        return None, f"failed: {type(error).__name__}: {error}"[:100]


def prepare(
    source: str, sources: Path, work: Path, n_processes: int, most: int
) -> tuple[list[PackedObject], Counter[str]]:
    """All usable objects of a source (of `most` evenly picked ones; 0 is all), and what happened to the others."""
    if not (sources / PACKAGES[source]).is_dir():
        raise InputError(
            f"{sources / PACKAGES[source]} is missing: unpack the package {PACKAGES[source]} there (dpkg -x)"
        )
    candidates = LOADERS[source].candidates(sources, work)
    if most:
        candidates = candidates[:: max(1, len(candidates) // most)][:most]
    wanted = [candidate for candidate in candidates if rules.is_wanted_name(candidate)]
    outcomes = Counter({"name left out": len(candidates) - len(wanted)})
    objects = []
    with ProcessPool(n_processes) as processes:
        jobs = [processes.apply_async(_packed_or_crash, (candidate, sources)) for candidate in wanted]
        for candidate, job in zip(wanted, jobs):
            try:
                item, outcome = job.get(timeout=LONGEST_WAIT_S)
            except TimeoutError:  # the mesh library brought its process down; the pool has started another one
                item, outcome = None, "crashed"
                print(f"{candidate.key} crashed", file=sys.stderr, flush=True)
            outcomes[outcome] += 1
            if item is not None:
                objects.append(item)
    return objects, outcomes


def build(source: str, options: argparse.Namespace) -> list[PackedObject]:
    """Prepare, select, split and write one source."""
    objects, outcomes = prepare(source, options.sources, options.work, options.processes, options.most)
    if not objects:
        raise InputError(f"no object of {source} is usable: {dict(outcomes)}")
    kept, dropped = rules.without_twins(objects)
    rules.split_off_validation(kept)
    kept.sort(key=lambda item: item.key)
    path = options.out / f"pool_{source}.npz"
    write_pool(path, source, kept)
    megabytes = path.stat().st_size / 1e6
    print(
        f"{source}: {len(kept)} objects, {megabytes:.1f} MB; read: {dict(outcomes)}; then dropped: {dict(dropped)}",
        flush=True,
    )
    return kept


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m conrad_engine.training.pool_build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sources", type=Path, required=True, help="folder with the unpacked packages")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pool files")
    known = tuple(LOADERS)
    parser.add_argument(
        "--only", type=lambda text: selected_sources(text, known), default=known, metavar="all|green|NAMES"
    )
    parser.add_argument("--work", type=Path, help="folder for archives opened on the way (default: OUT/work)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--most", type=int, default=0, help="read only so many objects a source, evenly picked; 0 is all"
    )
    options = parser.parse_args(arguments)
    options.work = options.work or options.out / "work"
    options.work.mkdir(parents=True, exist_ok=True)
    compiled_library()
    objects = [item for source in options.only for item in build(source, options)]
    (options.out / "ATTRIBUTION.md").write_text(attribution.document(objects), encoding="utf-8")
