"""The toy pipeline, in a process where pictures that begin with STUCK are never decoded, nor anything else done meanwhile."""

from __future__ import annotations

import re

from PIL import Image, ImageFile

from .toy_pipeline import Job, describe_device, generate

__all__ = ["Job", "describe_device", "generate"]


class StuckImage(ImageFile.ImageFile):
    """A format whose decoder holds the interpreter's lock for ages, as a decoder in C may."""

    format = "STUCK"

    def _open(self) -> None:
        self._size, self._mode = (8, 8), "RGB"

    def load(self) -> None:
        re.match("(a+)+$", "a" * 64 + "b")


Image.register_open("STUCK", StuckImage, lambda head: head.startswith(b"STUCK"))
