"""Finding the weights of diffusers and transformers models and reading them: hub ids, the hub's cache, local folders.

Weights are read from safetensors files. The older .bin files are pickles, which run code when opened; they are refused
unless the settings say otherwise. Every model is first resolved to a folder, so that there is one way of reading.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .config import WeightsConfig
from .errors import GuidanceError, MissingDependency
from .known_models import HINTS, SUCCESSORS, license_of

log = logging.getLogger(__name__)

WEIGHT_FILE = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?\.(?P<kind>safetensors|bin)"
)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
ALL = ("*",)
"""Stands for every component that a model has."""
NO_WEIGHTS = ("tokenizer", "scheduler", "feature_extractor", "image_processor", "processor")
"""Components that are text files only (by the start of their name)."""


def require_diffusers() -> None:
    """Raise a clear error where diffusers or transformers is missing.

    Raises:
        MissingDependency: One of them is not installed.
    """
    # Looked up rather than imported: importing both takes seconds.
    missing = [name for name in ("diffusers", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(
            f"diffusion models need {' and '.join(missing)}; install them with: pip install conrad-engine[sd]"
        )


def import_hub() -> None:
    """Import the hub's client, a sixth of a second, before a thread imports the libraries: they use it too, and of its modules,
    which import each other, two threads could see halves. Whoever needs it says what fails."""
    with suppress(Exception):
        from huggingface_hub import HfApi, constants, snapshot_download  # noqa: F401
        from huggingface_hub.utils import LocalEntryNotFoundError  # noqa: F401


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def with_precision(weights: WeightsConfig, device: torch.device) -> WeightsConfig:
    """The settings with `auto` decided: float16 on a GPU, float32 on a CPU."""
    if weights.precision != "auto":
        return weights
    return replace(weights, precision="float32" if device.type == "cpu" else "float16")


def model_folder(
    model: str,
    components: tuple[str, ...],
    weights: WeightsConfig,
    single_files: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
) -> Path:
    """The folder that holds a model, downloaded to the hub's cache if need be; its licence is logged.

    Args:
        model: A folder in diffusers layout, or a hub id.
        components: Subfolders that are needed; an empty name is the top folder.
        single_files: Weight files that are needed besides, by their name in the folder.
        optional: Subfolders that some models of the kind have; where one is there, it must be whole.

    Raises:
        GuidanceError: It cannot be found, or has no usable weights.
    """
    wanted = _Wanted(components, single_files, optional, weights)
    folder = _find(model, wanted)
    reasons = wanted.unusable(list_files(folder))
    if reasons:
        raise GuidanceError(_refusal(model, reasons))
    log.info("model %s, license: %s", model, license_of(model, folder))
    files = [folder / name for name in wanted.chosen(list_files(folder))]
    threading.Thread(target=_read_ahead, args=(files,), daemon=True).start()
    return folder


def _read_ahead(files: list[Path]) -> None:
    """Bring files into the system's cache, while the caller imports the libraries that read them.

    Read from end to end a disk is faster than through the memory map that weights are taken from.
    """
    buffer = bytearray(1 << 24)
    with suppress(OSError):  # whoever needs the file says what is wrong with it
        for path in files:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def pipeline_folder(model: str, weights: WeightsConfig) -> Path:
    """The folder of a model of which every component is needed, whatever they are.

    Raises:
        GuidanceError: It cannot be found, or has no usable weights.
    """
    return model_folder(model, ALL, weights)


def pipeline_options(folder: Path, weights: WeightsConfig) -> dict[str, Any]:
    """What `from_pretrained` of a whole pipeline needs to read just the files that are wanted."""
    files = list_files(folder)
    chosen = [weight_files(files, name, weights) for name in components_of(files) if has_weights(files, name)]
    kinds = {(match["variant"], match["kind"]) for names in chosen for name in names[:1] if (match := _parsed(name))}
    variants = {variant for variant, _ in kinds}
    # One variant only if every component has it; the library falls back on none by itself.
    return {
        "torch_dtype": DTYPES[weights.precision],
        "variant": variants.pop() if len(variants) == 1 else None,
        "use_safetensors": not any(kind == "bin" for _, kind in kinds),
    }


def components_of(files: list[str]) -> tuple[str, ...]:
    """Subfolders of a model in diffusers layout that hold settings."""
    return tuple(sorted({f.split("/")[0] for f in files if f.count("/") == 1 and f.endswith(".json")}))


def has_weights(files: list[str], component: str) -> bool:
    """Whether a component is a network rather than a tokenizer, a scheduler or a picture processor."""
    return f"{component}/config.json" in files


def is_xl(folder: Path) -> bool:
    """Whether a model in diffusers layout has XL's second text encoder."""
    return (folder / "text_encoder_2").is_dir()


def trusted_file(path: str, weights: WeightsConfig) -> Path:
    """A single local weight file that may be opened.

    Raises:
        GuidanceError: It does not exist, or is a pickle and pickles are not allowed.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise GuidanceError(f"file {path} does not exist")
    if file.suffix != ".safetensors" and not weights.allow_pickle:
        raise GuidanceError(_refusal(path, {file.name: "pickle"}))
    return file


@dataclass(frozen=True)
class _Wanted:
    """What is needed of a model's files."""

    components: tuple[str, ...]
    single_files: tuple[str, ...]
    optional: tuple[str, ...]
    weights: WeightsConfig

    def present(self, files: list[str]) -> tuple[str, ...]:
        if self.components == ALL:
            return components_of(files)
        return self.components + tuple(name for name in self.optional if any(f.startswith(f"{name}/") for f in files))

    def unusable(self, files: list[str]) -> dict[str, str]:
        return unusable(files, self.present(files), self.weights) | {
            name: "pickle" if name in files else "missing"
            for name in self.single_files
            if name not in files or not (name.endswith(".safetensors") or self.weights.allow_pickle)
        }

    def chosen(self, files: list[str]) -> list[str]:
        return choose_files(files, self.present(files), self.weights) + list(self.single_files)


def describe(model: str, weights: WeightsConfig) -> str:
    """One sentence about a model for a person: where it is, under which licence; asks no network.

    Raises:
        MissingDependency: The hub's client is not installed.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        cached = _cached(model, weights.revision) or _cached(SUCCESSORS.get(model, model), weights.revision)
        if cached is None:
            gone = f" (its owner deleted it; {SUCCESSORS[model]} is a copy)" if model in SUCCESSORS else ""
            return f"{model}: not on this machine{gone}; license {license_of(model)}"
        folder = cached
    reasons = _Wanted(ALL, (), (), weights).unusable(list_files(folder))
    state = "usable" if not reasons else _refusal(model, reasons)
    return f"{model}: in {folder}, license {license_of(model, folder)}; {state}"


def _find(model: str, wanted: _Wanted) -> Path:
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise GuidanceError(
            f"model {model} is a single file: a folder in diffusers layout (model_index.json, unet, vae, ...) is needed; "
            "diffusers' from_single_file and save_pretrained convert it"
        )
    if not HUB_ID.fullmatch(model) or model.startswith(("./", "../", "~/")):
        raise GuidanceError(f"model {model} is neither an existing folder nor a hub id such as owner/name")
    cached = _cached(model, wanted.weights.revision)
    if cached is not None and not wanted.unusable(list_files(cached)):
        return cached
    if model in SUCCESSORS:
        log.warning("%s was deleted by its owner; using the community's copy %s instead", model, SUCCESSORS[model])
        return _find(SUCCESSORS[model], wanted)
    return _download(model, wanted)


def _cached(model: str, revision: str) -> Path | None:
    require_diffusers()
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import LocalEntryNotFoundError

    try:
        # A pattern that matches nothing: only the folder's place is asked for.
        found = snapshot_download(model, revision=revision or None, local_files_only=True, allow_patterns=["-/-"])
    except LocalEntryNotFoundError:
        return None
    return Path(found)


def _download(model: str, wanted: _Wanted) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download

    revision = wanted.weights.revision or None
    manual = f"`hf download {model}` on a connected machine, or give the folder of a copy as guidance.model"
    if constants.HF_HUB_OFFLINE:
        raise GuidanceError(
            f"model {model} is not complete in {constants.HF_HUB_CACHE} and HF_HUB_OFFLINE is set: unset it, or run {manual}"
        )
    try:
        files = HfApi().list_repo_files(model, revision=revision)
        reasons = wanted.unusable(files)
        if reasons:
            raise GuidanceError(_refusal(model, reasons))
        log.info("downloading %s, license: %s", model, license_of(model))
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted.chosen(files)))
    except GuidanceError:
        raise
    except Exception as error:  # The hub's client raises whatever the HTTP library of its version raises.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = HINTS.get(model, "check the id, your connection, and whether the owner asks you to accept terms first")
        raise GuidanceError(f"model {model} cannot be downloaded ({reason}): {hint}; or run {manual}") from None


def list_files(folder: Path) -> list[str]:
    """Files of a folder and of its subfolders, as relative names with forward slashes."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def weight_files(files: list[str], component: str, weights: WeightsConfig) -> list[str]:
    """The weight files of a component to read: safetensors, the half-precision variant first unless float32 is asked for."""
    found: dict[tuple[str, str], list[str]] = {}
    for file in files:
        match = _parsed(file) if file.rpartition("/")[0] == component else None
        if match:
            found.setdefault((match["kind"], match["variant"] or ""), []).append(file)
    kinds = ("safetensors", "bin") if weights.allow_pickle else ("safetensors",)
    variants = ("", "fp16") if weights.precision == "float32" else ("fp16", "")
    return next((found[k, v] for k in kinds for v in variants if (k, v) in found), [])


def _parsed(file: str) -> re.Match[str] | None:
    return WEIGHT_FILE.fullmatch(file.rpartition("/")[2])


def choose_files(files: list[str], components: tuple[str, ...], weights: WeightsConfig) -> list[str]:
    """What to download of a repository: the components' settings and one set of weights each."""
    chosen = [file for file in files if file in ("README.md", "model_index.json")]
    for component in components:
        prefix = f"{component}/" if component else ""
        inside = [file for file in files if file.startswith(prefix) and "/" not in file.removeprefix(prefix)]
        chosen += [file for file in inside if file.endswith((".json", ".txt", ".model"))]
        chosen += weight_files(files, component, weights)
    return sorted(set(chosen))


def unusable(files: list[str], components: tuple[str, ...], weights: WeightsConfig) -> dict[str, str]:
    """Components that cannot be read, and why: `missing`, or `pickle` where only refused .bin files are there."""
    trusting = WeightsConfig(allow_pickle=True, precision=weights.precision)
    reasons = {}
    for component in components:
        if component.startswith(NO_WEIGHTS):
            if not any(file.startswith(f"{component}/") for file in files):
                reasons[component] = "missing"
        elif not weight_files(files, component, weights):
            reasons[component] = "pickle" if weight_files(files, component, trusting) else "missing"
    return reasons


def _refusal(model: str, reasons: dict[str, str]) -> str:
    names = ", ".join(name or "the top folder" for name in reasons)
    hint = f"; {HINTS[model]}" if model in HINTS else ""
    if "pickle" in reasons.values():
        return (
            f"model {model} has no safetensors for {names}, only .bin files, which are pickles and can run any program when "
            "opened: choose another copy or revision, or, if you trust its author with your machine, set "
            f"guidance.weights.allow_pickle=true{hint}"
        )
    return f"model {model} lacks {names}: a complete folder in diffusers layout is needed{hint}"


def load_component(folder: Path, name: str, kind: type, dtype: torch.dtype, weights: WeightsConfig) -> Any:
    """One network of a model, frozen, on the CPU.

    Args:
        kind: A class of diffusers or transformers with `from_pretrained`.

    Raises:
        GuidanceError: Its files are damaged or of another network.
    """
    files = weight_files(list_files(folder), name, weights)
    match = _parsed(files[0]) if files else None
    if match is None:
        raise GuidanceError(_refusal(str(folder), unusable(list_files(folder), (name,), weights)))
    from diffusers import ModelMixin

    options: dict[str, Any] = {"subfolder": name} if name else {}
    if issubclass(kind, ModelMixin):
        options["torch_dtype"] = dtype  # Without it diffusers would unfold half-precision files to float32 on the way.
    try:
        network, info = kind.from_pretrained(
            folder,
            variant=match["variant"],
            use_safetensors=match["kind"] == "safetensors",
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, KeyError, json.JSONDecodeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise GuidanceError(
            f"{name or 'the network'} of {folder} cannot be read as {kind.__name__}: {reason}"
        ) from None
    # Both libraries fill what a file lacks with random numbers and only warn.
    if info["missing_keys"]:
        lacking = sorted(info["missing_keys"])
        raise GuidanceError(
            f"{files[0]} of {folder} lacks {len(lacking)} tensors of {kind.__name__}, such as {lacking[0]}: it is incomplete, "
            "or the weights of another network"
        )
    # diffusers has read it in this type already, and warns of a second conversion.
    network = network if isinstance(network, ModelMixin) else network.to(dtype)
    return network.eval().requires_grad_(False)
