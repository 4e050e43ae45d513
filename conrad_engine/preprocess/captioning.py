"""A sentence that says what a picture shows, by any image-to-text model of transformers."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import UInt8
from numpy import ndarray

from ..config import SeedingConfig
from ..errors import GuidanceError
from ..model_files import model_folder, require_diffusers, with_precision

MAX_WORDS = 30
"""Longer captions would push the words for the view out of the prompt."""


def caption(rgb: UInt8[ndarray, "height width 3"], config: SeedingConfig, device: torch.device) -> str:
    """What the picture shows, in a few words.

    Raises:
        MissingDependency: transformers is not installed.
        GuidanceError: The model cannot be found, read, or answers nothing.
    """
    require_diffusers()
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = model_folder(config.caption_model, ("",), with_precision(config.weights, device))
    try:
        processor = AutoProcessor.from_pretrained(folder)
        # Float32: a captioner runs once a job, and some of them overflow in half precision.
        model = AutoModelForImageTextToText.from_pretrained(
            folder, use_safetensors=None if config.weights.allow_pickle else True
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise GuidanceError(f"{config.caption_model} cannot be read as an image-to-text model: {reason}") from None
    model = model.float().to(device).eval()
    inputs = processor(images=Image.fromarray(np.ascontiguousarray(rgb)), return_tensors="pt").to(device)
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=2 * MAX_WORDS, do_sample=False)
    words = processor.batch_decode(tokens, skip_special_tokens=True)[0].split()
    if not words:
        raise GuidanceError(f"{config.caption_model} finds no words for the picture: give --prompt instead")
    return " ".join(words[:MAX_WORDS])
