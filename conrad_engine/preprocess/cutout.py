"""The built-in matting: GrabCut seeded from the border."""

from __future__ import annotations

import cv2
import numpy as np

from ..errors import InputError


def cut_out(rgb):
    h, w = rgb.shape[:2]
    image = (rgb * 255).astype(np.uint8)
    mask = np.zeros((h, w), np.uint8)
    m = max(2, int(0.05 * min(h, w)))
    try:
        cv2.grabCut(
            image, mask, (m, m, w - 2 * m, h - 2 * m), np.zeros((1, 65)), np.zeros((1, 65)), 5, cv2.GC_INIT_WITH_RECT
        )
    except cv2.error:
        raise InputError("no object stands out from the background: give a mask") from None
    return cv2.GaussianBlur((mask % 2).astype(np.float32), (0, 0), 1)
