"""Where the object is: the choice of a matting backend, and the backends that need a model file."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float
from numpy import ndarray
from PIL import Image

from ..config import PictureConfig
from ..errors import InputError, MissingDependency

Rgb = Float[ndarray, "height width 3"]
Mask = Float[ndarray, "height width"]

REMBG_MODELS = ("birefnet-general", "isnet-general-use", "birefnet-general-lite", "u2net", "silueta", "u2netp")
"""rembg's models for any object, best first."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def matte(rgb: Rgb, config: PictureConfig) -> tuple[Mask, str]:
    """The object's soft mask in an opaque picture, and the name of the backend that made it.

    Raises:
        InputError: No object stands out, or `config.matting` asks for an alpha channel that is not there.
        MissingDependency: The backend asked for is not installed or has no model.
    """
    match config.matting:
        case "alpha":
            raise InputError(
                "matting 'alpha' needs a picture with transparency, but this one is opaque: "
                "use matting 'auto' or give a mask"
            )
        case "onnx":
            return onnx_mask(rgb, config.matting_model), f"onnx {Path(config.matting_model).name}"
        case "rembg":
            return _rembg_or_explain(rgb)
        case "auto" if has_rembg() and (found := rembg_model()):
            return rembg_mask(rgb, found), f"rembg {found.stem}"
    from .cutout import cut_out  # brings scikit-image, which takes a while to load

    return cut_out(rgb)


def has_rembg() -> bool:
    return importlib.util.find_spec("rembg") is not None and importlib.util.find_spec("onnxruntime") is not None


def rembg_model() -> Path | None:
    """The best model file that rembg has on this machine; none is ever downloaded."""
    data = os.environ.get("XDG_DATA_HOME")
    flat = Path(os.environ.get("U2NET_HOME") or Path(data or "~") / ".u2net").expanduser()
    default = Path(data) / "rembg" if data else Path("~/.rembg")
    home = flat if os.environ.get("U2NET_HOME") else Path(os.environ.get("REMBG_HOME") or default).expanduser()
    for name in REMBG_MODELS:
        for path in (home / "models" / name / f"{name}.onnx", flat / f"{name}.onnx"):
            if path.is_file():
                return path
    return None


def _rembg_or_explain(rgb: Rgb) -> tuple[Mask, str]:
    if not has_rembg():
        raise MissingDependency(
            "rembg is not installed: pip install 'conrad-engine[matting]', or use matting 'grabcut'"
        )
    found = rembg_model()
    if found is None:
        raise MissingDependency(
            f"rembg has no model on this machine and none is downloaded: put one of {', '.join(REMBG_MODELS)} "
            "(.onnx) into ~/.u2net, or use matting 'grabcut'"
        )
    return rembg_mask(rgb, found), f"rembg {found.stem}"


def rembg_mask(rgb: Rgb, model: Path) -> Mask:
    """Mask by a rembg session on a model file that is already there."""
    import rembg

    # With these two, every version of rembg finds the file where it lies and has no reason to fetch another.
    forced = {"U2NET_HOME": str(model.parent), "MODEL_CHECKSUM_DISABLED": "1"}
    before = {name: os.environ.get(name) for name in forced}
    os.environ.update(forced)
    try:
        session = rembg.new_session(model.stem)
        image = Image.fromarray((rgb * 255).round().astype(np.uint8))
        mask = np.asarray(session.predict(image)[0], np.float32) / 255
    except Exception as error:  # onnxruntime's exceptions have no common base but Exception
        raise InputError(f"rembg cannot use its model {model} ({error}): replace it, or use other matting") from None
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    return mask


def onnx_mask(rgb: Rgb, model: str) -> Mask:
    """Mask by any ONNX matting network: one NCHW RGB picture in, one map out.

    The input size is the network's own, or 1024 where it is free. Values are normalized by ImageNet's mean and deviation,
    as U²-Net and BiRefNet expect it, except for networks of the IS-Net family (name has isnet or rmbg), which take
    x - 0.5. Outputs beyond [0, 1] are logits.

    Raises:
        MissingDependency: onnxruntime is not installed.
        InputError: The file is missing, is no ONNX model, or does not take a picture and answer a map.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise MissingDependency("matting 'onnx' needs onnxruntime: pip install 'conrad-engine[matting]'")
    if not model or not Path(model).is_file():
        raise InputError(
            f"matting model {model or '(none)'} does not exist: set picture.matting_model to an .onnx file"
        )
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        entry = session.get_inputs()[0]
        height, width = _input_size(entry.shape, model)
        values = _network_input(rgb, height, width, Path(model).name.lower())
        if entry.type == "tensor(float16)":
            values = values.astype(np.float16)
        output = np.asarray(session.run(None, {entry.name: values})[0], np.float32)
    except InputError:
        raise
    except Exception as error:  # onnxruntime's exceptions have no common base but Exception
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"matting model {model} cannot be used: {first_line}") from None
    return _mask_from_output(output, rgb.shape[:2], model)


def _input_size(shape: list, model: str) -> tuple[int, int]:
    if len(shape) != 4 or (isinstance(shape[1], int) and shape[1] != 3):
        raise InputError(f"matting model {model} takes {shape}: an NCHW input with 3 channels is needed")
    return tuple(side if isinstance(side, int) and side > 0 else 1024 for side in shape[2:])


def _network_input(rgb: Rgb, height: int, width: int, name: str) -> Float[ndarray, "1 3 h w"]:
    small = cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA)
    plain = "isnet" in name or "rmbg" in name
    mean, std = ((0.5, 0.5, 0.5), (1.0, 1.0, 1.0)) if plain else (IMAGENET_MEAN, IMAGENET_STD)
    return ((small - np.float32(mean)) / np.float32(std)).transpose(2, 0, 1)[None].astype(np.float32)


def _mask_from_output(output: ndarray, size: tuple[int, int], model: str) -> Mask:
    output = output.reshape(-1, *output.shape[-2:])[0] if output.ndim >= 2 else output
    if output.ndim != 2 or min(output.shape) < 2 or not np.isfinite(output).all():
        raise InputError(f"matting model {model} answered {output.shape}, not a finite map: use another model")
    if output.min() < -0.01 or output.max() > 1.01:
        output = 1 / (1 + np.exp(-output.clip(-50, 50)))
    low, high = float(output.min()), float(output.max())
    if high - low < 1e-3:
        raise InputError(f"matting model {model} finds no object (its map is {high:.2f} everywhere): give a mask")
    # U²-Net-like networks do not use the whole range; rembg stretches it in the same way.
    stretched = ((output - low) / (high - low)).astype(np.float32)
    return cv2.resize(stretched, (size[1], size[0]), interpolation=cv2.INTER_CUBIC).clip(0, 1)
