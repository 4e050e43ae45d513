"""What a result looks like: the overview sheet, the turntable, and the cameras of both.

Pictures are (height, width, 4) or (height, width, 3) floats in [0, 1], sRGB, straight alpha.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_dilation, binary_erosion

from .cameras import Camera, look_at, orbit_positions, square_intrinsics
from .errors import InputError, MissingDependency

SHEET_AZIMUTHS_DEG = (0, 45, 90, 135, 180, 225, 270, 315)
SHEET_ELEVATIONS_DEG = (0, 30)
"""Alternating, so that the eight views show the top as well."""
ERROR_GAIN = 8
TILE = 256
MARGIN = 8
CAPTION = 22
COLUMNS = 6
PAPER, INK, FAINT = (255, 255, 255), (40, 40, 40), (232, 232, 232)
OUTLINE = np.array([1.0, 0.1, 0.6])
MAX_TURNTABLE_BYTES = 3_000_000


@dataclass(frozen=True)
class SheetData:
    """What the sheet of one result shows; None leaves a tile out."""

    picture: np.ndarray
    """(H, W, 3 or 4) as the user gave it."""
    mask: np.ndarray
    """(H, W) in [0, 1]."""
    views: list[np.ndarray]
    """The mesh from `sheet_cameras`, RGBA."""
    field_view: np.ndarray | None = None
    """(h, w, 4): the field from the reference camera, the picture's aspect."""
    mesh_view: np.ndarray | None = None
    """(h, w, 4): the mesh from the reference camera, the picture's aspect."""
    depth: np.ndarray | None = None
    """(h, w) of the field from the reference camera; 0 or not finite where nothing is. Near is bright."""
    surface: np.ndarray | None = None
    """(h, w, 4): the mesh without its texture, from the second of `sheet_cameras`."""
    numbers: dict[str, str] = field(default_factory=dict)
    """Lines of text: name and value."""
    title: str = ""


def fit_distance(
    points: np.ndarray, center: np.ndarray, fov_rad: float, elevations_rad: tuple[float, ...], fill: float = 0.9
) -> float:
    """Smallest distance from `center` at which the points fill at most `fill` of a square frame from all around."""
    reach = math.tan(fov_rad / 2) * fill
    azimuths = torch.arange(16, dtype=torch.float64) * (math.pi / 8)
    local = torch.from_numpy(np.asarray(points, np.float64) - center)
    distance = 1e-6
    for elevation_rad in elevations_rad:
        backward = orbit_positions(azimuths, torch.full_like(azimuths, elevation_rad), torch.ones_like(azimuths))
        axes = look_at(backward, torch.zeros(3, dtype=torch.float64).expand_as(backward))[..., :3]
        seen = local @ axes
        needed = seen[..., :2].abs().amax(-1) / reach + seen[..., 2]
        distance = max(distance, float(needed.max()))
    return distance


def _orbit_cameras(
    points: np.ndarray, angles_deg: list[tuple[float, float]], size: int, fov_deg: float
) -> list[Camera]:
    center = (points.min(axis=0) + points.max(axis=0)) / 2
    fov_rad = math.radians(fov_deg)
    elevations_rad = tuple(math.radians(e) for e in sorted({elevation for _, elevation in angles_deg}))
    distance = torch.tensor(fit_distance(points, center, fov_rad, elevations_rad), dtype=torch.float64)
    target = torch.from_numpy(np.asarray(center, np.float64))
    cameras = []
    for azimuth_deg, elevation_deg in angles_deg:
        angles = (torch.tensor(math.radians(x), dtype=torch.float64) for x in (azimuth_deg, elevation_deg))
        position = target + orbit_positions(*angles, distance)
        cameras.append(
            Camera(look_at(position, target), square_intrinsics(torch.tensor(fov_rad).double(), size), size, size)
        )
    return cameras


def turntable_cameras(
    points: np.ndarray,
    n_frames: int = 36,
    size: int = 256,
    elevation_deg: float = 15.0,
    fov_deg: float = 30.0,
    start_deg: float = 0.0,
) -> list[Camera]:
    """Cameras of one turn around some points; the last frame leads into the first.

    Args:
        points: (n, 3), a mesh's vertices; the turn is around the middle of their box, +Z up.
        start_deg: Azimuth of the first frame: the picture's, in a world where that is not 0.
    """
    angles = [(start_deg + 360 * i / n_frames, elevation_deg) for i in range(n_frames)]
    return _orbit_cameras(points, angles, size, fov_deg)


def sheet_cameras(points: np.ndarray, size: int = TILE, fov_deg: float = 30.0, start_deg: float = 0.0) -> list[Camera]:
    """The eight views of the sheet: all 45 degrees from the picture's azimuth, alternately level and 30 degrees above."""
    angles = [(start_deg + azimuth, SHEET_ELEVATIONS_DEG[i % 2]) for i, azimuth in enumerate(SHEET_AZIMUTHS_DEG)]
    return _orbit_cameras(points, angles, size, fov_deg)


def on_color(rgba: np.ndarray, color: float | np.ndarray = 1.0) -> np.ndarray:
    """(h, w, 3): the picture composited over one color."""
    rgba = np.asarray(rgba, np.float64)
    return rgba if rgba.shape[-1] == 3 else rgba[..., :3] * rgba[..., 3:] + color * (1 - rgba[..., 3:])


def to_bytes(rgb: np.ndarray) -> np.ndarray:
    """8-bit sRGB of a float picture; 8-bit pictures are returned as they are."""
    return rgb if rgb.dtype == np.uint8 else np.round(np.clip(rgb, 0, 1) * 255).astype(np.uint8)


def resized(rgb: np.ndarray, width: int, height: int) -> np.ndarray:
    """(height, width, channels) float, by area averaging when smaller."""
    channels = [
        Image.fromarray(np.ascontiguousarray(rgb[..., k], np.float32)).resize((width, height), Image.Resampling.BOX)
        if width < rgb.shape[1]
        else Image.fromarray(np.ascontiguousarray(rgb[..., k], np.float32)).resize((width, height), Image.BICUBIC)
        for k in range(rgb.shape[2])
    ]
    return np.clip(np.stack([np.asarray(channel) for channel in channels], -1), 0, 1)


def depth_tile(depth: np.ndarray) -> np.ndarray:
    """(h, w, 3) gray: near is bright, from the 2nd to the 98th percentile; white where nothing is."""
    valid = np.isfinite(depth) & (depth > 0)
    if not valid.any():
        return np.ones((*depth.shape, 3))
    near, far = np.percentile(depth[valid], (2, 98))
    shade = 0.9 - 0.8 * np.clip((np.where(valid, depth, far) - near) / max(far - near, 1e-9), 0, 1)
    return np.repeat(np.where(valid, shade, 1.0)[..., None], 3, -1)


def error_tile(view: np.ndarray, picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(h, w, 3): what the view has too much or too little, on white, amplified `ERROR_GAIN` times; black is none."""
    height, width = view.shape[:2]
    target = resized(np.concatenate([on_color(picture[..., :3]), mask[..., None]], -1), width, height)
    return np.clip(np.abs(on_color(view) - on_color(target)) * ERROR_GAIN, 0, 1)


def outlined(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(H, W, 3): the picture on white with the mask's outline drawn in."""
    inside = mask > 0.5
    thickness = max(1, round(max(mask.shape) / 300))
    line = binary_dilation(inside, iterations=thickness) & ~binary_erosion(inside, iterations=thickness)
    return np.where(line[..., None], OUTLINE, on_color(picture))


def object_window(mask: np.ndarray, margin: float = 0.08) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the object with a margin, as parts of the picture's width and height."""
    rows, columns = np.flatnonzero((mask > 0.5).any(1)), np.flatnonzero((mask > 0.5).any(0))
    if len(rows) == 0:
        return 0.0, 0.0, 1.0, 1.0
    height, width = mask.shape
    left, right = columns[0] / width, (columns[-1] + 1) / width
    top, bottom = rows[0] / height, (rows[-1] + 1) / height
    # The same margin in pixels on all sides.
    reach = margin * max((right - left) * width, (bottom - top) * height)
    return (
        max(left - reach / width, 0.0),
        max(top - reach / height, 0.0),
        min(right + reach / width, 1.0),
        min(bottom + reach / height, 1.0),
    )


def _window_of(rgb: np.ndarray, window: tuple[float, float, float, float]) -> np.ndarray:
    height, width = rgb.shape[:2]
    left, right = int(window[0] * width), max(math.ceil(window[2] * width), int(window[0] * width) + 1)
    top, bottom = int(window[1] * height), max(math.ceil(window[3] * height), int(window[1] * height) + 1)
    return rgb[top:bottom, left:right]


def sheet_tiles(data: SheetData) -> list[tuple[str, np.ndarray]]:
    """Captions and pictures (h, w, 3) of the sheet, in reading order."""
    window = object_window(data.mask)
    cut_out = np.concatenate([on_color(data.picture[..., :3]), data.mask[..., None]], -1)
    tiles = [
        ("input and mask outline", outlined(data.picture, data.mask)),
        ("object", _window_of(on_color(cut_out), window)),
    ]
    for name, view in (("field", data.field_view), ("mesh", data.mesh_view)):
        if view is not None:
            tiles.append((f"{name}, reference view", _window_of(on_color(view), window)))
            error = error_tile(view, data.picture, data.mask)
            tiles.append((f"{name}, error x {ERROR_GAIN}", _window_of(error, window)))
    for i, view in enumerate(data.views):
        azimuth, elevation = SHEET_AZIMUTHS_DEG[i % 8], SHEET_ELEVATIONS_DEG[i % 2]
        tiles.append((f"azimuth {azimuth}°, elevation {elevation}°", on_color(view)))
    if data.depth is not None:
        tiles.append(("depth, near is bright", _window_of(depth_tile(data.depth), window)))
    if data.surface is not None:
        tiles.append((f"surface, azimuth {SHEET_AZIMUTHS_DEG[1]}°", on_color(data.surface)))
    return tiles


def make_sheet(data: SheetData, path: str | Path, columns: int = COLUMNS) -> Path:
    """Write the overview of one result as PNG: labeled tiles, the numbers in the last place."""
    tiles = sheet_tiles(data)
    n_cells = len(tiles) + (2 if data.numbers else 0)
    header = 34 if data.title else 0
    rows = math.ceil(n_cells / columns)
    # The numbers take two places side by side; if these would break over the end of a row, they take the next row.
    if data.numbers and len(tiles) % columns == columns - 1:
        rows = math.ceil((len(tiles) + 1) / columns) + 1
    pitch_x, pitch_y = TILE + MARGIN, TILE + CAPTION + MARGIN
    sheet = Image.new("RGB", (columns * pitch_x + MARGIN, rows * pitch_y + MARGIN + header), PAPER)
    draw = ImageDraw.Draw(sheet)
    if data.title:
        draw.text((MARGIN, MARGIN), data.title, INK, ImageFont.load_default(20))
    for i, (caption, rgb) in enumerate(tiles):
        corner = (MARGIN + (i % columns) * pitch_x, MARGIN + header + (i // columns) * pitch_y)
        paste_tile(sheet, rgb, corner, caption)
    if data.numbers:
        place = len(tiles) if len(tiles) % columns != columns - 1 else (rows - 1) * columns
        left, top = MARGIN + (place % columns) * pitch_x, MARGIN + header + (place // columns) * pitch_y
        _write_numbers(draw, data.numbers, left, top, 2 * pitch_x - MARGIN)
    path = Path(path)
    sheet.save(path, "PNG", compress_level=6)
    return path


def paste_tile(sheet: Image.Image, rgb: np.ndarray, corner: tuple[int, int], caption: str, tile: int = TILE) -> None:
    """Draw a picture, fitted into a square, and its caption below."""
    height, width = rgb.shape[:2]
    scale = tile / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    # Small renders are enlarged without smoothing: the sheet shows pixels as they are.
    method = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    picture = Image.fromarray(to_bytes(rgb)).resize(size, method)
    draw = ImageDraw.Draw(sheet)
    left, top = corner
    draw.rectangle([left - 1, top - 1, left + tile, top + tile], PAPER, FAINT)
    sheet.paste(picture, (left + (tile - size[0]) // 2, top + (tile - size[1]) // 2))
    draw.text((left + 2, top + tile + 3), caption, INK, ImageFont.load_default(14))


def _write_numbers(draw: ImageDraw.ImageDraw, numbers: dict[str, str], left: int, top: int, width: int) -> None:
    line = min(22, (TILE + CAPTION) // max(len(numbers), 1))
    font = ImageFont.load_default(max(line - 6, 8))
    for i, (name, value) in enumerate(numbers.items()):
        y = top + i * line
        draw.text((left + 4, y), name, INK, font)
        draw.text((left + width - 4, y), str(value), INK, font, anchor="ra")
        draw.line([left, y + line - 2, left + width, y + line - 2], FAINT)


def write_turntable(frames: list[np.ndarray], path: str | Path, fps: float = 15.0) -> Path:
    """Write a looping animation, GIF or MP4 by the file's ending; a GIF stays under 3 MB.

    Args:
        frames: (h, w, 3 or 4), all of one size; composited over white.
        path: `.gif`, or `.mp4` where imageio-ffmpeg is installed.

    Raises:
        InputError: There are no frames, or the ending is another one.
        MissingDependency: MP4 without imageio-ffmpeg.
    """
    path = Path(path)
    if not frames:
        raise InputError("a turntable needs at least one frame, and there are none")
    pictures = [to_bytes(on_color(frame / 255 if frame.dtype == np.uint8 else frame)) for frame in frames]
    if path.suffix == ".gif":
        _write_gif(pictures, path, fps)
    elif path.suffix == ".mp4":
        _write_mp4(pictures, path, fps)
    else:
        raise InputError(f"a turntable ends in .gif or .mp4, not {path.name!r}")
    return path


def _write_gif(pictures: list[np.ndarray], path: Path, fps: float) -> None:
    """One palette for all frames, dithered; without dithering, then smaller, where the file would be too large."""
    size = pictures[0].shape[1], pictures[0].shape[0]
    for scale, dither in ((1.0, True), (1.0, False), (0.75, False), (0.5, False), (0.25, False)):
        target = (max(round(size[0] * scale), 1), max(round(size[1] * scale), 1))
        images = [Image.fromarray(picture).resize(target, Image.Resampling.LANCZOS) for picture in pictures]
        palette = _shared_palette(images)
        method = Image.Dither.FLOYDSTEINBERG if dither else Image.Dither.NONE
        frames = [image.quantize(palette=palette, dither=method) for image in images]
        frames[0].save(
            path,
            "GIF",
            save_all=True,
            append_images=frames[1:],
            duration=round(1000 / fps),
            loop=0,
            optimize=False,
            disposal=1,
        )
        if path.stat().st_size < MAX_TURNTABLE_BYTES:
            return


def _shared_palette(images: list[Image.Image]) -> Image.Image:
    """The 256 colors that serve all frames, chosen on up to twelve of them at half their size; white stays white."""
    chosen = [image.reduce(2) for image in images[:: max(1, len(images) // 12)]]
    strip = Image.new("RGB", (chosen[0].width, sum(image.height for image in chosen)))
    for i, image in enumerate(chosen):
        strip.paste(image, (0, i * image.height))
    # Maximum coverage with k-means kept colors three times better than median cut on renders of textured objects.
    palette = strip.quantize(colors=255, method=Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
    colors = (palette.getpalette() or [])[: 3 * 255]
    palette.putpalette(colors + [255, 255, 255] * (256 - len(colors) // 3))
    return palette


def _write_mp4(pictures: list[np.ndarray], path: Path, fps: float) -> None:
    if find_spec("imageio_ffmpeg") is None:
        raise MissingDependency("an MP4 turntable needs imageio-ffmpeg: pip install imageio-ffmpeg, or write a .gif")
    import imageio_ffmpeg

    height, width = pictures[0].shape[:2]
    writer = imageio_ffmpeg.write_frames(str(path), (width, height), fps=fps, macro_block_size=2, quality=7)
    writer.send(None)
    for picture in pictures:
        writer.send(np.ascontiguousarray(picture))
    writer.close()
