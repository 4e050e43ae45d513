"""Build the Blender add-on: one zip that Blender 4.2 or newer installs from disk.

    python build_addon.py                      # dist/conrad-VERSION.zip, with pyzmq's and the engine's wheels in it
    python build_addon.py --engine beside      # the engine's wheel lies next to the zip
    python build_addon.py --split-platforms    # one zip a platform
    python build_addon.py --abi3               # for Blender builds on Python 3.14, with pyzmq's stable-ABI wheels

The zip is the same, byte for byte, for the same sources: names sorted, times fixed, modes fixed. The source tree is never
written to. pyzmq's wheels are fetched by pip into a cache folder once and checked by their SHA-256 every time.

Blender refuses a zip that mixes `cp311-cp311` with `cp312-abi3` wheels on any Python but 3.11, so the normal zip carries
explicit wheels for 3.11 and 3.13 only, and `--abi3` carries stable-ABI wheels only.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ADDON = ROOT / "blender_addon"
PROTOCOL = ROOT / "conrad_engine" / "protocol"
FIXED_TIME = (1980, 1, 1, 0, 0, 0)
SKIPPED = ("__pycache__", ".pyc", ".pyo", ".DS_Store")


@dataclass(frozen=True)
class Wheel:
    """One pyzmq wheel: its file name, its hash, and the Blender platforms it serves."""

    name: str
    sha256: str
    python: str
    platform: str
    serves: tuple[str, ...]


_LINUX, _WINDOWS, _MACOS = ("linux-x64",), ("windows-x64",), ("macos-arm64", "macos-x64")
WHEELS = (
    Wheel(
        "pyzmq-26.4.0-cp311-cp311-macosx_10_15_universal2.whl",
        "bfcf82644c9b45ddd7cd2a041f3ff8dce4a0904429b74d73a439e8cab1bd9e54",
        "3.11",
        "macosx_10_15_universal2",
        _MACOS,
    ),
    Wheel(
        "pyzmq-26.4.0-cp311-cp311-manylinux_2_28_x86_64.whl",
        "2f9f7ffe9db1187a253fca95191854b3fda24696f086e8789d1d449308a34b88",
        "3.11",
        "manylinux_2_28_x86_64",
        _LINUX,
    ),
    Wheel(
        "pyzmq-26.4.0-cp311-cp311-win_amd64.whl",
        "963977ac8baed7058c1e126014f3fe58b3773f45c78cce7af5c26c09b6823896",
        "3.11",
        "win_amd64",
        _WINDOWS,
    ),
    Wheel(
        "pyzmq-26.4.0-cp313-cp313-macosx_10_15_universal2.whl",
        "c43fac689880f5174d6fc864857d1247fe5cfa22b09ed058a344ca92bf5301e3",
        "3.13",
        "macosx_10_15_universal2",
        _MACOS,
    ),
    Wheel(
        "pyzmq-26.4.0-cp313-cp313-manylinux_2_28_x86_64.whl",
        "6332452034be001bbf3206ac59c0d2a7713de5f25bb38b06519fc6967b7cf771",
        "3.13",
        "manylinux_2_28_x86_64",
        _LINUX,
    ),
    Wheel(
        "pyzmq-26.4.0-cp313-cp313-win_amd64.whl",
        "23ecc9d241004c10e8b4f49d12ac064cd7000e1643343944a10df98e57bc544b",
        "3.13",
        "win_amd64",
        _WINDOWS,
    ),
)
ABI3_WHEELS = (
    Wheel(
        "pyzmq-27.3.0-cp312-abi3-macosx_10_15_universal2.whl",
        "15155fd8f308d3bd47f67a8f6cc809f9db90abbf63c514c384a17622e2cf080f",
        "3.14",
        "macosx_10_15_universal2",
        _MACOS,
    ),
    Wheel(
        "pyzmq-27.3.0-cp312-abi3-manylinux_2_26_x86_64.manylinux_2_28_x86_64.whl",
        "858fe25231e0fd8612da142efde019faa5ef63fa150a821a27870e791b38c798",
        "3.14",
        "manylinux_2_28_x86_64",
        _LINUX,
    ),
    Wheel(
        "pyzmq-27.3.0-cp312-abi3-win_amd64.whl",
        "3ea8e8fa5c097e68fef91d70b150fda96f307758103868018fc4deeb9c214122",
        "3.14",
        "win_amd64",
        _WINDOWS,
    ),
)
PLATFORMS = ("linux-x64", "windows-x64", "macos-arm64", "macos-x64")


class BuildError(Exception):
    """The zip cannot be built; the message says why and what to do."""


def version() -> str:
    """The engine's version, read without importing it; the add-on carries the same one."""
    tree = ast.parse((ROOT / "conrad_engine" / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__version__":
            return ast.literal_eval(node.value)
    raise BuildError("conrad_engine/__init__.py has no __version__")


def default_cache() -> Path:
    base = os.environ.get("CONRAD_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "conrad" / "wheels"


def fetched(wheel: Wheel, cache: Path) -> Path:
    """The wheel's file in the cache folder, downloaded by pip if it is not there, its hash checked.

    Raises:
        BuildError: The download failed, or the file is not the one that was tested.
    """
    path = cache / wheel.name
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        requirement = "==".join(wheel.name.split("-")[:2])
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--implementation", "cp", "--python-version", wheel.python, "--platform", wheel.platform]
        command += ["--dest", str(cache)] + (["--abi", "abi3"] if "abi3" in wheel.name else []) + [requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not path.exists():
            raise BuildError(
                f"{wheel.name} is not in {cache} and pip could not fetch it: {done.stderr.strip() or 'other file name'}"
            )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise BuildError(f"{path} has SHA-256 {digest}, expected {wheel.sha256}: delete it and build again")
    return path


def _kept(path: Path) -> bool:
    return path.is_file() and not any(part.endswith(SKIPPED) for part in path.parts)


def build_engine_wheel(folder: Path) -> Path:
    """Build the engine's wheel from a copy of the sources and repack it with fixed order, times and modes."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        shutil.copytree(
            ROOT / "conrad_engine", source / "conrad_engine", ignore=shutil.ignore_patterns("__pycache__", "*.py[co]")
        )
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            if (ROOT / name).exists():
                shutil.copy(ROOT / name, source / name)
            elif name == "README.md":
                (source / name).write_text("# ConRad\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", scratch, str(source)]
        # An isolated build fetches setuptools; a machine without a network that has it does without.
        if _has_setuptools():
            command.insert(4, "--no-build-isolation")
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"pip could not build the engine's wheel: {done.stderr.strip()}")
        built = next(Path(scratch).glob("conrad_engine-*.whl"))
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(built) as wheel:
            files = {name: wheel.read(name) for name in wheel.namelist()}
        write_zip(folder / built.name, files)
        return folder / built.name


def _has_setuptools() -> bool:
    code = "import setuptools, sys; sys.exit(int(setuptools.__version__.split('.')[0]) < 77)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def write_zip(path: Path, files: dict[str, bytes]) -> None:
    """Write a zip whose bytes depend on nothing but names and contents. It appears under its name when complete."""
    partial = path.with_name(path.name + ".part")
    with zipfile.ZipFile(partial, "w") as archive:
        for name in sorted(files):
            info = zipfile.ZipInfo(name, FIXED_TIME)
            # Wheels are compressed already; deflating them again costs time and gains nothing.
            info.compress_type = zipfile.ZIP_STORED if name.endswith(".whl") else zipfile.ZIP_DEFLATED
            info.create_system = 3
            info.external_attr = 0o100644 << 16
            archive.writestr(info, files[name])
    os.replace(partial, path)


def manifest_text(wheel_names: list[str], platforms: tuple[str, ...]) -> str:
    """The manifest of a zip: the checked-in one with the version, platforms and wheels filled in."""
    text = (ADDON / "blender_manifest.toml").read_text(encoding="utf-8")
    listing = "".join(f'    "./wheels/{name}",\n' for name in sorted(wheel_names))
    text = re.sub(r'^version = ".*"$', f'version = "{version()}"', text, flags=re.M)
    text = re.sub(r"^platforms = .*$", "platforms = [" + ", ".join(f'"{p}"' for p in platforms) + "]", text, flags=re.M)
    return re.sub(r"^# build_addon\.py writes.*$", f"wheels = [\n{listing}]", text, flags=re.M)


def addon_files(wheels: list[Path], engine: Path | None, platforms: tuple[str, ...]) -> dict[str, bytes]:
    """Every file of the zip by its name in it."""
    files = {}
    for path in sorted(ADDON.rglob("*")):
        name = path.relative_to(ADDON).as_posix()
        if _kept(path) and not name.startswith(("protocol/", "wheels/", "engine/")):
            files[name] = path.read_bytes()
    for path in sorted(PROTOCOL.rglob("*.py")):
        if _kept(path):
            files["protocol/" + path.relative_to(PROTOCOL).as_posix()] = path.read_bytes()
    files["LICENSE"] = (ROOT / "LICENSE").read_bytes()
    files["blender_manifest.toml"] = manifest_text([w.name for w in wheels], platforms).encode()
    for wheel in wheels:
        files[f"wheels/{wheel.name}"] = wheel.read_bytes()
    if engine is not None:
        files[f"engine/{engine.name}"] = engine.read_bytes()
    return files


def find_validator(given: str) -> Path | None:
    """Blender's own extension tool, from a path, from $CONRAD_BPY_PYTHON's bpy package, or None."""
    if given:
        return Path(given)
    for interpreter in os.environ.get("CONRAD_BPY_PYTHON", "").split(os.pathsep):
        folder = Path(interpreter).parent.parent
        found = sorted(folder.glob("lib/python*/site-packages/bpy/*/scripts/addons_core/bl_pkg/cli/blender_ext.py"))
        if interpreter and found:
            return found[0]
    return None


def validate(zip_path: Path, validator: Path) -> None:
    done = subprocess.run([sys.executable, str(validator), "validate", str(zip_path)], capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"Blender's validator refuses {zip_path.name}: {(done.stdout + done.stderr).strip()}")


def build(
    out: Path,
    cache: Path,
    engine: str = "inside",
    is_abi3: bool = False,
    is_split: bool = False,
    engine_wheel: str = "",
) -> list[Path]:
    """Build the zip or zips.

    Args:
        out: Folder of the results.
        cache: Folder of the downloaded wheels.
        engine: inside, beside or none: where the engine's wheel goes.
        is_abi3: Carry stable-ABI wheels only.
        is_split: One zip a platform.
        engine_wheel: A built wheel to take instead of building one.

    Returns:
        The zips.
    """
    out.mkdir(parents=True, exist_ok=True)
    wheels = ABI3_WHEELS if is_abi3 else WHEELS
    paths = {wheel: fetched(wheel, cache) for wheel in wheels}
    with tempfile.TemporaryDirectory() as scratch:
        engine_path = None
        if engine != "none":
            engine_path = Path(engine_wheel) if engine_wheel else build_engine_wheel(Path(scratch))
        if engine == "beside" and engine_path is not None:
            shutil.copyfile(engine_path, out / engine_path.name)
        inside = engine_path if engine == "inside" else None
        zips = []
        for platforms in [(p,) for p in PLATFORMS] if is_split else [PLATFORMS]:
            chosen = [paths[w] for w in wheels if set(w.serves) & set(platforms)]
            suffix = ("-abi3" if is_abi3 else "") + (f"-{platforms[0]}" if is_split else "")
            zip_path = out / f"conrad-{version()}{suffix}.zip"
            write_zip(zip_path, addon_files(chosen, inside, platforms))
            zips.append(zip_path)
    return zips


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the ConRad add-on for Blender.")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the results (default: dist)")
    parser.add_argument("--wheels", type=Path, default=default_cache(), help="cache folder of pyzmq's wheels")
    parser.add_argument("--engine", choices=("inside", "beside", "none"), default="inside", help="the engine's wheel")
    parser.add_argument("--engine-wheel", default="", help="a built engine wheel to take")
    parser.add_argument("--abi3", action="store_true", help="stable-ABI wheels, for builds on Python 3.14")
    parser.add_argument("--split-platforms", action="store_true", help="one zip a platform")
    parser.add_argument("--blender-ext", default="", help="Blender's blender_ext.py, to validate with")
    options = parser.parse_args(arguments)
    try:
        zips = build(
            options.out, options.wheels, options.engine, options.abi3, options.split_platforms, options.engine_wheel
        )
        validator = find_validator(options.blender_ext)
        for zip_path in zips:
            if validator is not None:
                validate(zip_path, validator)
            print(f"{zip_path}  {zip_path.stat().st_size / 1e6:.1f} MB")
        print("validated by Blender" if validator else "not validated: name blender_ext.py or set CONRAD_BPY_PYTHON")
    except BuildError as error:
        print(f"build_addon: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
