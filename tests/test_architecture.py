"""Which way imports point (the style guide's table), read from every file with `ast`."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENGINE = ROOT / "conrad_engine"
EVERYWHERE = {"config", "model_config", "errors", "monitor", "files", "device", "resampling"}
"""Importable from everywhere in the engine."""
HEAVY = {"torch", "diffusers", "transformers"}

# What a part may import besides itself and EVERYWHERE.
MAY_IMPORT = {
    "config": {"errors"},
    "model_config": {"errors"},
    "errors": set(),
    "monitor": set(),
    "resampling": set(),
    "files": {"errors"},
    "device": {"errors"},
    "cameras": set(),
    "protocol": set(),
    "rendering": {"cameras"},
    "adam": set(),
    "fields": {"adam"},
    "losses": set(),
    "constraint": {"cameras", "rendering"},
    "guidance": {"cameras", "graphs", "model_files", "known_models"},
    "model_files": {"known_models"},
    "known_models": set(),
    "graphs": set(),
    "preprocess": {"cameras", "model_files", "known_models"},
    "elevation": {"guidance", "preprocess"},
    "mesh": {"cameras"},
    "redraw": {"cameras", "guidance", "mesh"},
    "hull": {"cameras"},
    "symmetry": {"cameras", "constraint", "guidance"},
    "state": {"adam", "constraint", "fields", "rendering"},
    "warm_start": {"cameras", "constraint", "guidance", "hull", "state", "symmetry"},
    "ranks": set(),
    "step": {
        "cameras",
        "constraint",
        "graphs",
        "guidance",
        "losses",
        "ranks",
        "rendering",
        "state",
        "warm_start",
    },
    "optimize": {"cameras", "guidance", "ranks", "state", "step", "warm_start"},
    "checkpoint": {"state"},
    "preview": {"cameras"},
}
TOP_ROW = {
    "cli", "__main__", "server", "batch", "batch_report", "batch_runners", "pipeline", "finish", "seeding", "doctor",
    "evaluation", "benchmark", "training", "baselines", "words", "__init__",
}  # fmt: skip


def imported(path: Path) -> set[tuple[int, str]]:
    """Imported modules as (level, dotted name); annotations-only imports count too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {(0, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {(node.level, name) for name in names}
    return found


def engine_parts(path: Path) -> set[str]:
    """First-level engine parts that a file imports."""
    depth = len(path.relative_to(ENGINE).parts)
    parts = set()
    for level, name in imported(path):
        if level == depth or (level == 0 and name.startswith("conrad_engine.")):
            parts.add(name.removeprefix("conrad_engine.").split(".")[0])
    return parts


FILES = sorted(path for path in ENGINE.rglob("*.py") if "__pycache__" not in path.parts)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ENGINE)))
def test_imports_point_the_right_way(path):
    part = path.relative_to(ENGINE).parts[0].removesuffix(".py")
    if part in TOP_ROW:
        return
    assert part in MAY_IMPORT, f"{part} is new: say in this table what it may import"
    forbidden = engine_parts(path) - MAY_IMPORT[part] - EVERYWHERE - {part, "__version__"}
    assert not forbidden, f"{path.name} must not import {sorted(forbidden)}"


def test_protocol_needs_the_standard_library_and_pyzmq_only():
    for path in (ENGINE / "protocol").glob("*.py"):
        for level, name in imported(path):
            assert level in (0, 1), f"{path.name}: only relative imports of itself"
            assert level == 1 or name.split(".")[0] in sys.stdlib_module_names | {"zmq"}, f"{path.name} imports {name}"


@pytest.mark.parametrize("name", ["config", "model_config", "errors", "monitor", "files"])
def test_light_parts_need_the_standard_library_only(name):
    for level, module in imported(ENGINE / f"{name}.py"):
        assert level == 1 or module.split(".")[0] in sys.stdlib_module_names


def test_server_process_never_imports_torch():
    worker_side = {"worker.py", "device_info.py"}
    for path in (ENGINE / "server").glob("*.py"):
        top_level = {
            name.split(".")[0]
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        }
        assert path.name in worker_side or not top_level & HEAVY, path.name


def test_the_add_on_knows_blender_and_the_protocol_only():
    for path in (ROOT / "blender_addon").rglob("*.py"):
        for level, name in imported(path):
            root = name.split(".")[0]
            assert root not in HEAVY, f"{path.name} imports {name}"
            if level == 0 and root == "conrad_engine":
                assert path.parent.name == "protocol", f"{path.name} imports {name}: only the protocol folder may"


def test_top_level_of_the_repository():
    tracked = {"blender_addon", "conrad_engine", "tests", "build_addon.py", "README.md", "pyproject.toml", "LICENSE"}
    tracked |= {"constraints.txt"}
    hidden_or_made = {"build", "dist", "results", "venv"}
    found = {p.name for p in ROOT.iterdir() if not p.name.startswith(".") and not p.name.endswith(".egg-info")}
    assert found - hidden_or_made <= tracked, sorted(found - tracked)
