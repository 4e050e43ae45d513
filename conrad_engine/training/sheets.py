"""Contact sheets of premultiplied RGBA pictures on white."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor


def on_white(pictures: Float[Tensor, "b 4 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Pictures in [-1, 1] over white, in [0, 1]."""
    rgba = (pictures.float().clamp(-1, 1) + 1) / 2
    return (rgba[:, :3] + 1 - rgba[:, 3:]).clamp(0, 1)


def write_sheet(rows: list[Float[Tensor, "n 4 h w"]], path: Path, n_columns: int = 2) -> None:
    """Rows of pictures in [-1, 1] as one PNG; the list is broken into columns, padded with empty pictures."""
    longest = max(len(row) for row in rows)
    blank = -torch.ones_like(rows[0][:1])
    strips = [torch.cat([*on_white(torch.cat([row, blank.expand(longest - len(row), -1, -1, -1)]))], 2) for row in rows]
    per_column = -(-len(strips) // n_columns)
    strips += [torch.ones_like(strips[0])] * (per_column * n_columns - len(strips))
    columns = [torch.cat(strips[i * per_column : (i + 1) * per_column], 1) for i in range(n_columns)]
    grid = torch.cat(columns, 2).permute(1, 2, 0).cpu().numpy()
    Image.fromarray(np.round(grid * 255).astype(np.uint8)).save(path, optimize=True)
