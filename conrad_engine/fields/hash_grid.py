"""Multiresolution hash encoding of positions, with three interchangeable backends.

Source: instant-ngp (arXiv:2201.05989), section 3, equations 1 to 4, with the conventions of its authors' library
tiny-cuda-nn where the two differ: a level of N_l grid *vertices* a side has scale N_l - 1, positions are shifted by half a
cell so that levels do not line up, and corners beyond a dense level's last vertex wrap around.

    paper    here
    L, F     n_levels, n_features
    T        2 ** log2_table
    N_l, b   GridLevel.resolution, growth
    π_1..3   PRIMES

All backends share one parameter, `HashGrid.table`: rows of all levels one after the other, features of a row adjacent.
This is tiny-cuda-nn's own layout (its flat `params` is `table.flatten()`), so a state saved with one backend loads into
every other one.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from dataclasses import dataclass
from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..config import FieldConfig
from ..errors import InputError

logger = logging.getLogger(__name__)

PRIMES = (1, 2_654_435_761, 805_459_861)
ENCODERS = ("auto", "torch", "triton", "tinycudann")
INITIAL_RANGE = 1e-4
"""Features start uniform in ± this (arXiv:2201.05989, section 4)."""
_UINT32 = 0xFFFFFFFF


@dataclass(frozen=True)
class GridLevel:
    """One resolution level and its rows in the table."""

    scale: float
    """Grid cells across the unit cube, exact in float32."""
    resolution: int
    """Vertices a side."""
    offset: int
    """First row in the table."""
    size: int
    """Rows."""

    @property
    def is_dense(self) -> bool:
        """Every vertex has a row of its own; otherwise rows are found by hashing."""
        return self.resolution**3 <= self.size


def grid_levels(config: FieldConfig) -> tuple[GridLevel, ...]:
    """The levels of a hash grid (arXiv:2201.05989, eq. 2 and 3; scales as tiny-cuda-nn rounds them).

    Raises:
        InputError: A setting is outside of its range.
    """
    if not (1 <= config.n_levels <= 32 and 1 <= config.n_features <= 8 and 4 <= config.log2_table <= 24):
        raise InputError(
            "a hash grid needs 1 to 32 levels, 1 to 8 features and a log2_table from 4 to 24, "
            f"not {config.n_levels}, {config.n_features} and {config.log2_table}"
        )
    if not 2 <= config.base_resolution <= config.max_resolution:
        raise InputError(
            "a hash grid needs 2 <= base_resolution <= max_resolution, "
            f"not {config.base_resolution} and {config.max_resolution}"
        )
    # In float32, as tiny-cuda-nn does it: a float64 scale can land on the other side of an integer.
    exponents = torch.arange(config.n_levels, dtype=torch.float32) * torch.log2(torch.tensor(growth(config)))
    scales = torch.exp2(exponents) * config.base_resolution - 1
    levels: list[GridLevel] = []
    offset = 0
    for scale in scales.tolist():
        resolution = math.ceil(scale) + 1
        size = min(-(-(resolution**3) // 8) * 8, 2**config.log2_table)
        levels.append(GridLevel(scale, resolution, offset, size))
        offset += size
    return tuple(levels)


def growth(config: FieldConfig) -> float:
    """Ratio b between the resolutions of neighboring levels (arXiv:2201.05989, eq. 3)."""
    if config.n_levels == 1:
        return 1.0
    return (config.max_resolution / config.base_resolution) ** (1 / (config.n_levels - 1))


def corner_rows(
    x: Int[Tensor, " n"], y: Int[Tensor, " n"], z: Int[Tensor, " n"], level: GridLevel
) -> Int[Tensor, " n"]:
    """Table rows of grid vertices, counted from the level's first row (arXiv:2201.05989, eq. 4)."""
    if level.is_dense:
        return (x + (y + z * level.resolution) * level.resolution) % level.size
    return ((x * PRIMES[0]) ^ (y * PRIMES[1] & _UINT32) ^ (z * PRIMES[2] & _UINT32)) % level.size


def encode_level(
    positions: Float[Tensor, "n 3"], table: Float[Tensor, "rows features"], level: GridLevel, smooth: bool
) -> Float[Tensor, "n features"]:
    """Features of one level: the eight corners of each position's cell, weighted trilinearly.

    Twice differentiable, to positions and table.

    Args:
        positions: In [0, 1].
        table: Rows of all levels.
        level: The level to read.
        smooth: Weights from a smoothstep of the cell coordinate, so that the gradient to positions is continuous.
    """
    scaled = positions * level.scale + 0.5
    cells = scaled.detach().floor()
    upper = scaled - cells
    if smooth:
        upper = upper * upper * (3 - 2 * upper)
    (x, y, z), upper_xyz = cells.long().unbind(-1), upper.unbind(-1)
    features = torch.zeros_like(table[:1])
    for dx, dy, dz in itertools.product((0, 1), repeat=3):
        sides = (side if bit else 1 - side for side, bit in zip(upper_xyz, (dx, dy, dz)))
        rows = level.offset + corner_rows(x + dx, y + dy, z + dz, level)
        features = features + math.prod(sides)[:, None] * table[rows]
    return features


def encode(
    positions: Float[Tensor, "n 3"],
    table: Float[Tensor, "rows features"],
    levels: tuple[GridLevel, ...],
    level_weights: Float[Tensor, " levels"],
    smooth: bool = False,
) -> Float[Tensor, "n level_features"]:
    """The encoding in plain torch: reference of the other backends, and the only one that is twice differentiable."""
    positions = positions.clamp(0, 1)
    encoded = [encode_level(positions, table, level, smooth) * w for level, w in zip(levels, level_weights)]
    return torch.cat(encoded, -1)


class HashGrid(nn.Module):
    """Positions in [0, 1]³ to `n_levels * n_features` features; positions outside are moved to the cube's surface.

    Backends (`config.encoder`): "torch" everywhere; "triton" and "tinycudann" on CUDA, where they are many times faster;
    "auto" is triton where it runs, else torch. A backend that cannot run here is reported once and replaced by the next
    best. Gradients flow to positions and table with all of them; only torch can be differentiated twice.
    """

    def __init__(
        self,
        config: FieldConfig,
        smooth: bool = False,
        half_reads: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        """
        Args:
            config: Sizes and backend.
            smooth: Smoothstep interpolation: continuous normals, at the price of flat spots at the vertices.
            half_reads: Triton only: read features rounded to half precision (relative error 2e-4), as tiny-cuda-nn does
                by default; gradients and parameters stay float32.
            generator: Source of the initial features.

        Raises:
            InputError: A setting is outside of its range.
        """
        super().__init__()
        if config.encoder not in ENCODERS:
            raise InputError(f"unknown encoder {config.encoder!r}: use {', '.join(ENCODERS)}")
        self.levels = grid_levels(config)
        self.n_features = config.n_features
        self.n_outputs = config.n_levels * config.n_features
        self.encoder, self.smooth, self.half_reads = config.encoder, smooth, half_reads
        self._tinycudann_config = tinycudann_config(config, smooth)
        n_rows = self.levels[-1].offset + self.levels[-1].size
        start = torch.rand(n_rows, config.n_features, generator=generator)
        self.table = nn.Parameter((start * 2 - 1) * INITIAL_RANGE)
        # Rebuilt from the settings, so not part of a saved state.
        self.register_buffer("scales", torch.tensor([level.scale for level in self.levels]), persistent=False)
        extents = [[level.resolution, level.offset, level.size] for level in self.levels]
        self.register_buffer("extents", torch.tensor(extents, dtype=torch.int32), persistent=False)
        self.register_buffer("level_weights", torch.ones(config.n_levels), persistent=False)
        self._active_levels = float(config.n_levels)

    @property
    def active_levels(self) -> float:
        """Coarse to fine: levels from here on answer zeros and get no gradient; a fraction fades the last one in."""
        return self._active_levels

    @active_levels.setter
    def active_levels(self, n: float) -> None:
        # A device tensor changed in place: a captured step follows without being captured again.
        n = min(max(float(n), 0.0), float(len(self.levels)))
        if n != self._active_levels:
            self._active_levels = n
            self.level_weights.copy_((n - torch.arange(len(self.levels))).clamp(0, 1))

    def forward(self, positions: Float[Tensor, "n 3"]) -> Float[Tensor, "n level_features"]:
        """Features, float32. Triton's result is stored feature by feature (a transposed view)."""
        positions = positions.float()
        match self.backend(positions.device):
            case "tinycudann":
                return self._encode_tinycudann(positions)
            case "triton":
                return self._encode_triton(positions)
            case _:
                return self._encode_torch(positions)

    def backend(self, device: torch.device) -> str:
        """The backend that answers on a device: the one asked for, or what stands in for it."""
        wanted = "triton" if self.encoder == "auto" and device.type == "cuda" else self.encoder
        if wanted in ("triton", "tinycudann") and device.type != "cuda":
            _report_once(f"encoder {wanted} needs a CUDA device, not {device.type}: using torch")
            return "torch"
        if wanted == "tinycudann" and _tinycudann_module(self._tinycudann_config) is None:
            wanted = "triton"
        if wanted == "triton" and self.n_features != 2:
            _report_once(f"encoder triton reads 2 features a level, not {self.n_features}: using torch")
            return "torch"
        if wanted == "triton" and _triton_module() is None:
            return "torch"
        return "torch" if wanted == "auto" else wanted

    def _encode_torch(self, positions: Tensor) -> Tensor:
        # Without CUDA nothing is captured, so inactive levels need not be evaluated.
        n = len(self.levels) if positions.is_cuda else math.ceil(self.active_levels)
        if n == 0:
            return positions.new_zeros(len(positions), self.n_outputs)
        encoded = encode(positions, self.table, self.levels[:n], self.level_weights, self.smooth)
        return nn.functional.pad(encoded, (0, self.n_outputs - encoded.shape[1]))

    def _encode_triton(self, positions: Tensor) -> Tensor:
        kernels = _triton_module()
        assert kernels is not None, "checked by backend"
        n_merged = kernels.n_merged_levels([level.resolution for level in self.levels])
        return kernels.encode(
            positions, self.table, self.scales, self.extents, self.level_weights, n_merged, self.smooth, self.half_reads
        )

    def _encode_tinycudann(self, positions: Tensor) -> Tensor:
        module = _tinycudann_module(self._tinycudann_config)
        assert module is not None, "checked by backend"
        params = {"params": self.table.flatten()}
        encoded = torch.func.functional_call(module, params, (positions.clamp(0, 1),))
        return encoded.float() * self.level_weights.repeat_interleave(self.n_features)


def tinycudann_config(config: FieldConfig, smooth: bool) -> tuple[tuple[str, object], ...]:
    """tiny-cuda-nn's settings of the same encoding (its DOCUMENTATION.md, 'Grid'), as sorted pairs."""
    settings = {
        "otype": "HashGrid",
        "n_levels": config.n_levels,
        "n_features_per_level": config.n_features,
        "log2_hashmap_size": config.log2_table,
        "base_resolution": config.base_resolution,
        "per_level_scale": growth(config),
        "interpolation": "Smoothstep" if smooth else "Linear",
    }
    return tuple(sorted(settings.items()))


@functools.cache
def _tinycudann_module(settings: tuple[tuple[str, object], ...]) -> nn.Module | None:
    """tiny-cuda-nn's encoding in fp32; it is called with our parameter in place of its own."""
    try:
        import tinycudann
    # Without a GPU, or built for another one, the import raises EnvironmentError, not ImportError.
    except (ImportError, OSError) as error:
        _report_once(f"encoder tinycudann is not usable here ({error}): using triton or torch")
        return None
    return tinycudann.Encoding(3, dict(settings), dtype=torch.float32)


@functools.cache
def _triton_module() -> ModuleType | None:
    try:
        from . import hash_grid_triton
    except ImportError as error:
        _report_once(f"encoder triton is not usable here ({error}): using torch")
        return None
    return hash_grid_triton


@functools.cache
def _report_once(message: str) -> None:
    logger.warning(message)
