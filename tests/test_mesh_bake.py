"""Textures: the photo where it sees, no seam where it ends."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import binary_erosion, distance_transform_edt, gaussian_filter

from conrad_engine.config import MeshConfig
from conrad_engine.evaluation.metrics import psnr
from conrad_engine.mesh import bake
from conrad_engine.mesh.bake import Photo, bake_texture, depth_map, visibilities
from conrad_engine.mesh.blend import SEAM_FADE, complete_colors
from conrad_engine.mesh.extract import extract_mesh
from conrad_engine.mesh.mesh import Mesh
from conrad_engine.mesh.raster import rasterize, render_mesh
from conrad_engine.mesh.unwrap import unwrap

from .mesh_scenes import AABB, ball, box_mesh, camera, soft_density, sphere_mesh

CONFIG = MeshConfig(texture_size=512)
GRAY = torch.tensor([0.5, 0.45, 0.4])


def fine_picture(size: int) -> np.ndarray:
    """Waves a few pixels long and checks, with soft edges."""
    v, u = np.mgrid[:size, :size] * (512 / size)
    rgb = np.stack([0.5 + 0.3 * np.sin(u / 5), 0.5 + 0.3 * np.sin(v / 6 + u / 17), 0.5 + 0.3 * np.cos((u + v) / 9)], -1)
    return gaussian_filter(rgb + 0.15 * ((u // 24 + v // 24) % 2)[..., None], (1, 1, 0)).clip(0, 1).astype(np.float32)


def photo_of(mesh: Mesh, view, rgb) -> Photo:
    return Photo(view, rgb, (rasterize(mesh.vertices, mesh.faces, view).faces >= 0).astype(np.float32))


def plain(color=GRAY):
    return lambda positions: color.expand(len(positions), 3).clone()


def reference_psnr(textured, photo, size=512):
    shape = size, size
    picture = F.interpolate(torch.from_numpy(photo.rgb).permute(2, 0, 1)[None], shape, mode="area")[0].permute(1, 2, 0)
    inside = F.interpolate(torch.from_numpy(photo.mask)[None, None], shape, mode="area")[0, 0].numpy() > 0.99
    rendered = render_mesh(textured, photo.camera.resized(size, size))
    return -10 * np.log10(np.square(rendered[..., :3] * rendered[..., 3:] - picture.numpy())[inside].mean())


def bumpy():
    shape = lambda p: ball(0.5)(p) - 0.04 * torch.sin(9 * p[:, 0]) * torch.cos(8 * p[:, 2] + 1) * torch.sin(7 * p[:, 1])  # noqa: E731
    return extract_mesh(soft_density(shape), AABB, MeshConfig(resolution=48, level=17.0), []).mesh


@pytest.mark.parametrize("make", [lambda: sphere_mesh(0.5), box_mesh, bumpy], ids=["sphere", "box", "bumpy"])
def test_reference_view_is_the_picture(make):
    mesh = make()
    photo = photo_of(mesh, camera(20.0, 15.0, 1024), fine_picture(1024))
    textured = bake_texture(
        unwrap(mesh, MeshConfig(texture_size=1024)), plain(), [photo], MeshConfig(texture_size=1024)
    )
    assert reference_psnr(textured, photo) > 30


def test_what_the_texture_s_look_up_takes_is_given_back(monkeypatch):
    """Also with a photo finer than the texels, and no farther than where the photo alone counts."""
    mesh, config = bumpy(), MeshConfig(texture_size=512)
    for size in (256, 1024):
        photo, found = photo_of(mesh, camera(20.0, 15.0, size), fine_picture(size)), []
        inside = binary_erosion(photo.mask > 0.5, iterations=3)
        for n in (0, 2):
            monkeypatch.setattr(bake, "N_CORRECTIONS", n)
            textured = bake_texture(unwrap(mesh, config), plain(), [photo], config)
            front, back = (render_mesh(textured, view, 3) for view in (photo.camera, camera(200.0, 15.0, 64)))
            found.append((psnr(front[..., :3], photo.rgb, inside), back))
        assert found[1][0] > found[0][0] + 1.5, (size, [front for front, _ in found])
        np.testing.assert_allclose(found[0][1], found[1][1], atol=0.01)


def test_photo_much_finer_than_the_texture_does_not_alias():
    rng = np.random.default_rng(0)
    mesh = box_mesh()
    noise = (0.5 + 0.5 * (rng.random((1024, 1024, 1)) - 0.5)).repeat(3, 2).astype(np.float32)
    config = MeshConfig(texture_size=128)
    textured = bake_texture(
        unwrap(mesh, config), plain(torch.full((3,), 0.5)), [photo_of(mesh, camera(size=1024), noise)], config
    )
    # Averaged over some 5 x 5 photo pixels; one sample a texel would keep the noise's own 36.
    assert textured.texture.astype(float).std() < 12


def test_no_seam_where_the_photo_ends():
    mesh = sphere_mesh(0.5)
    view = camera(0.0, 0.0, 512)
    warm = np.broadcast_to(np.array([0.62, 0.5, 0.4], np.float32), (512, 512, 3)).copy()
    textured = bake_texture(unwrap(mesh, CONFIG), plain(), [photo_of(mesh, view, warm)], CONFIG)
    side = render_mesh(textured, camera(90.0, 0.0, 256))
    row = side[128, 60:196, 0]
    assert row[0] == pytest.approx(0.62, abs=0.02) or row[-1] == pytest.approx(0.62, abs=0.02)
    assert np.abs(np.diff(row)).max() < 0.015, "from the photo's color to the field's in small steps"
    back = render_mesh(textured, camera(180.0, 0.0, 256))
    assert back[128, 128, 0] == pytest.approx(0.5, abs=0.03), "far from the seam the field keeps its color"


def test_a_rim_of_the_photo_is_not_drawn_out():
    """What goes on past the photo's end is what lies inside of an outline or a highlight there, a few pixels wide."""
    mesh, view = sphere_mesh(0.5), camera(0.0, 0.0, 512)
    inside = (rasterize(mesh.vertices, mesh.faces, view).faces >= 0).astype(np.float32)
    v, u = np.mgrid[:512, :512] - 255.5
    radii = np.hypot(u, v) / np.sqrt(inside.sum() / np.pi)
    rgb = np.where(radii[..., None] > 0.975, [0.95, 0.5, 0.1], [0.6, 0.5, 0.4]).astype(np.float32)
    textured = bake_texture(unwrap(mesh, CONFIG), plain(), [Photo(view, rgb, inside)], CONFIG)
    rim = (radii > 0.98) & (radii < 0.99)
    assert np.abs(render_mesh(textured, view)[rim, :3] - rgb[rim]).mean() < 0.02, "its own view still shows it"
    side = render_mesh(textured, camera(90.0, 0.0, 256))[128, 60:196, 0]
    assert 0 < (side > 0.65).sum() < 28, "drawn out as far as the field is shifted it has 36"
    assert np.abs(np.diff(side))[45:].max() < 0.1, "it ends without a seam"


def test_hidden_surface_takes_nothing_of_what_hides_it():
    plate = Mesh(
        np.array(
            [
                [x, y, z]
                for y, half in ((-0.4, 0.2), (0.4, 0.6))
                for x, z in ((-half, -half), (half, -half), (half, half), (-half, half))
            ],
            np.float32,
        ),
        np.array([[0, 1, 2], [0, 2, 3], [4, 5, 6], [4, 6, 7]], np.int32),
    )
    view = camera(0.0, 0.0, 512)
    nearest = rasterize(plate.vertices, plate.faces, view).faces
    rgb = np.where((nearest < 2)[..., None], np.array([1.0, 0, 0]), np.array([0, 0, 1.0])).astype(np.float32)
    textured = bake_texture(
        unwrap(plate, CONFIG), plain(torch.tensor([0.0, 0.0, 0.9])), [photo_of(plate, view, rgb)], CONFIG
    )
    behind = Mesh(plate.vertices, plate.faces[2:])
    assert len(behind.faces) == 2
    # From the side, past the small red plate: the large one shows no red where it was hidden.
    seen = render_mesh(textured, camera(60.0, 0.0, 256))
    large = (
        rasterize(plate.vertices, plate.faces, camera(60.0, 0.0, 512)).faces.reshape(256, 2, 256, 2).min((1, 3)) >= 2
    )
    assert large.sum() > 1000 and (seen[..., 0][large] > 0.5).mean() < 0.01


def test_front_and_back_photos_meet():
    mesh = sphere_mesh(0.5)
    photos = [
        photo_of(mesh, camera(azimuth, 0.0, 512), np.broadcast_to(np.array(color, np.float32), (512, 512, 3)).copy())
        for azimuth, color in ((0.0, (0.7, 0.5, 0.4)), (180.0, (0.5, 0.5, 0.6)))
    ]
    textured = bake_texture(unwrap(mesh, CONFIG), plain(torch.tensor([0.62, 0.52, 0.5])), photos, CONFIG)
    for azimuth, red in ((0.0, 0.7), (180.0, 0.5)):
        assert render_mesh(textured, camera(azimuth, 0.0, 64))[32, 32, 0] == pytest.approx(red, abs=0.01)
    side = render_mesh(textured, camera(90.0, 0.0, 256))[128, 60:196, 0]
    assert np.abs(np.diff(side)).max() < 0.02, "no step on the way from one to the other"


def test_a_filler_shows_only_what_no_other_photo_does():
    mesh = sphere_mesh(0.5)
    gray, red = (
        np.broadcast_to(np.array(c, np.float32), (512, 512, 3)).copy() for c in ((0.4, 0.4, 0.4), (0.8, 0.2, 0.2))
    )
    # The second one stands so near that both see much of the sphere.
    photos = [photo_of(mesh, camera(0.0, 0.0, 512), gray), photo_of(mesh, camera(70.0, 0.0, 512), red)]
    alone = bake_texture(unwrap(mesh, CONFIG), plain(torch.tensor([0.0, 0.0, 0.9])), photos[:1], CONFIG)
    photos[1] = replace(photos[1], is_filler=True)
    both = bake_texture(unwrap(mesh, CONFIG), plain(torch.tensor([0.0, 0.0, 0.9])), photos, CONFIG)
    front = [render_mesh(textured, camera(0.0, 0.0, 128)) for textured in (alone, both)]
    # Up to its very rim the first photo's camera sees what it saw without the filler, but for a mixed texel here and there.
    difference = np.abs(front[0] - front[1])[..., :3].max(-1)
    assert (difference[front[0][..., 3] > 0.99] > 0.02).mean() < 0.02
    assert render_mesh(both, camera(110.0, 0.0, 64))[32, 32, :3] == pytest.approx([0.8, 0.2, 0.2], abs=0.02)
    # What the filler is painted over is not redrawn either.
    unwrapped = unwrap(mesh, CONFIG)
    depth_maps = [depth_map(unwrapped, photo.camera) for photo in photos]
    visible = visibilities(depth_maps, unwrapped.vertices, unwrapped.normals, photos, CONFIG)
    assert max((a + b).max() for (a, _), (b, _) in [visible]) <= 1 + 1e-6


@pytest.mark.parametrize("is_filler", (False, True))
def test_what_lies_at_the_outline_of_a_filler_is_not_drawn_out(is_filler):
    mesh, beside = sphere_mesh(0.5), camera(120.0, 0.0, 512)
    outline = photo_of(mesh, beside, np.zeros((512, 512, 3), np.float32))
    depth = distance_transform_edt(outline.mask > 0.5)
    rgb = np.where((depth < 4)[..., None], 0.0, [0.8, 0.2, 0.2]).astype(np.float32)
    photos = [
        photo_of(mesh, camera(0.0, 0.0, 512), np.full((512, 512, 3), 0.4, np.float32)),
        replace(photo_of(mesh, beside, rgb), is_filler=is_filler),
    ]
    textured = bake_texture(unwrap(mesh, CONFIG), plain(torch.tensor([0.6, 0.5, 0.4])), photos, CONFIG)
    seen = render_mesh(textured, camera(215.0, 0.0, 128))
    darkest = seen[seen[..., 3] > 0.99][:, 0].min()
    assert darkest > 0.35 if is_filler else darkest < 0.1


def test_without_a_photo_the_field_colors_all():
    textured = bake_texture(unwrap(sphere_mesh(0.5, 12), CONFIG), plain(), [], CONFIG)
    assert np.abs(textured.texture / 255.0 - GRAY.numpy()).max() < 0.01, "padding included"


def grid_surface(n: int):
    x, y = np.meshgrid(np.linspace(0, 1, n), np.linspace(0, 1, n), indexing="ij")
    index = np.arange(n * n).reshape(n, n)
    a, b, c, d = index[:-1, :-1], index[1:, :-1], index[1:, 1:], index[:-1, 1:]
    faces = np.concatenate([np.stack(t, -1).reshape(-1, 3) for t in ((a, b, c), (a, c, d))])
    return np.stack([x, y, 0 * x], -1).reshape(-1, 3), faces


def test_completed_colors_shift_the_field_and_fade():
    vertices, faces = grid_surface(41)
    x = vertices[:, 0]
    seen = (x < 0.3).astype(float)
    field = np.repeat((0.3 + 0.2 * x)[:, None], 3, 1)
    photo = field + 0.1
    colors = complete_colors(vertices, faces, photo, seen, field, np.ones(len(x)))
    shift = (colors - field)[:, 0]
    assert np.allclose(shift[x < 0.29], 0.1, atol=0.01)
    for distance in (0.1, 0.2, 0.4):
        at = shift[np.abs(x - 0.3 - distance) < 0.005]
        assert np.allclose(at, 0.1 * np.exp(-distance / SEAM_FADE), atol=0.012), "the screened equation's own decay"


def test_unknown_parts_are_filled_smoothly():
    vertices, faces = grid_surface(31)
    x = vertices[:, 0]
    seen, known = (x < 0.25).astype(float), (x > 0.75).astype(float)
    field = np.where(x[:, None] > 0.75, 0.7, np.random.default_rng(0).random((len(x), 3)))
    colors = complete_colors(vertices, faces, np.full_like(vertices, 0.6), seen, field, known)
    assert 0.59 < colors.min() and colors.max() < 0.71, "nothing of the unknown colors comes through"
    assert (np.diff(colors.reshape(31, 31, 3)[:, 15, 0]) > -1e-3).all()


def test_true_edge_is_left_alone():
    vertices, faces = grid_surface(31)
    seen = (vertices[:, 0] < 0.5).astype(float)
    red, blue = np.array([0.9, 0.1, 0.1]), np.array([0.1, 0.1, 0.9])
    colors = complete_colors(vertices, faces, np.tile(red, (961, 1)), seen, np.tile(blue, (961, 1)), np.ones(961))
    assert np.abs(colors[vertices[:, 0] > 0.55] - blue).max() < 0.05
    assert np.abs(colors[vertices[:, 0] < 0.45] - red).max() < 0.05
