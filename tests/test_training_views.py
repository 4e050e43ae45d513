"""Training data: mesh pool files, sources, the rasterizer, framing and rendered rounds."""

from __future__ import annotations

import argparse
import errno
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conrad_engine import cameras as project_cameras
from conrad_engine.config import HALF_BOX, HALF_FRAME, REFERENCE_EXTENT
from conrad_engine.errors import InputError, MissingDependency
from conrad_engine.training import batches, evaluate_prior, raster, remodel, sources, views
from conrad_engine.training.pool import Pool
from conrad_engine.training.pool_build.meshes import Material, Mesh
from conrad_engine.training.pool_build.packing import encode_geometry, index_mesh, write_pool
from conrad_engine.warm_start import FRAMES, filled_part, ring_azimuths_rad, ring_cameras

from .training_meshes import FOV_RAD, UNLIT, box, boxes, in_order_of_use, packed, write_tiny_pool

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="the rasterizer needs a C compiler")


@pytest.fixture(scope="module")
def pool_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    write_tiny_pool(folder)
    return folder


def textured_mesh(rng: np.random.Generator, n_faces: int = 60) -> Mesh:
    """Random triangles in [-0.5, 0.5]³ with two textures, a plain material, corner colors and repeating UVs."""
    texture = np.zeros((16, 16, 4), np.uint8)
    texture[:, :8], texture[:, 8:] = (200, 40, 40, 255), (200, 40, 40, 90)
    plain = np.full((8, 8, 4), (30, 120, 200, 255), np.uint8)
    materials = [Material(texture=texture, color=(1, 1, 1)), Material((0.2, 0.4, 0.6), 0.5),
                 Material(texture=plain, color=(1, 1, 1))]  # fmt: skip
    vertices = rng.uniform(-0.5, 0.5, (40, 3))
    vertices[0], vertices[1] = -0.5, 0.5
    return Mesh(
        vertices=vertices,
        faces=np.stack([rng.permutation(40)[:3] for _ in range(n_faces)]),
        corner_uvs=rng.uniform(-3, 3, (n_faces, 3, 2)),
        face_materials=rng.integers(0, 3, n_faces),
        materials=materials,
        corner_colors=rng.uniform(0, 1, (n_faces, 3, 3)),
    )


# Pool files


@pytest.mark.parametrize("seed", range(5))
def test_a_mesh_survives_packing_to_its_grid(seed, tmp_path):
    indexed = index_mesh(textured_mesh(np.random.default_rng(seed)))
    write_pool(tmp_path / "pool.npz", "0ad", [packed(indexed, "a", "0ad", "train")] * 2)
    pool = Pool(tmp_path / "pool.npz")
    assert len(pool) == 2 and pool.source == "0ad" and pool.keys.tolist() == ["a", "a"]
    read = pool.mesh(1)
    np.testing.assert_array_equal(read.faces, indexed.faces)
    np.testing.assert_array_equal(read.face_materials, indexed.face_materials)
    np.testing.assert_allclose(read.vertices, indexed.vertices, atol=1e-6)
    np.testing.assert_allclose(read.uvs, indexed.uvs, atol=2.0**-12 + 1e-6)
    np.testing.assert_allclose(read.vertex_colors, indexed.vertex_colors, atol=1e-6)
    np.testing.assert_allclose(read.material_rgba, indexed.material_rgba, atol=0.5 / 255)
    assert [texture.shape for texture in read.textures] == [texture.shape for texture in indexed.textures]
    for texture, original in zip(read.textures, indexed.textures):
        assert np.abs(texture.astype(int) - original).mean() < 6  # WebP


def test_indexing_keeps_every_corner():
    mesh = textured_mesh(np.random.default_rng(1))
    indexed, order = index_mesh(mesh), np.argsort(mesh.face_materials, kind="stable")
    np.testing.assert_allclose(indexed.vertices[indexed.faces], mesh.vertices[mesh.faces[order]], atol=1 / 65535)
    is_textured = np.array([m.texture is not None for m in mesh.materials])[mesh.face_materials[order]]
    np.testing.assert_allclose(
        indexed.uvs[indexed.faces][is_textured], mesh.corner_uvs[order][is_textured], atol=2.0**-11
    )
    np.testing.assert_allclose(indexed.vertex_colors[indexed.faces], mesh.corner_colors[order], atol=1 / 255)


def test_a_damaged_pool_file_is_named(tmp_path):
    path = tmp_path / "pool_0ad.npz"
    path.write_bytes(b"PK no archive")
    with pytest.raises(InputError, match="pool_0ad.npz cannot be read .*build it again"):
        Pool(path)
    np.savez(path, format_version=np.int32(99))
    with pytest.raises(InputError, match="has format 99, this reader knows 1"):
        Pool(path)


def test_meshes_in_another_order_are_not_packed():
    mesh = in_order_of_use(boxes())
    with pytest.raises(ValueError, match="in order of first use"):
        encode_geometry(replace(mesh, faces=mesh.faces[::-1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"faces": np.array([[0, 1, 99]], np.int32), "face_materials": np.zeros(1, np.int32)}, "faces go from 0 to 99"),
        ({"face_materials": np.full(36, 3, np.int32)}, "face_materials go from 3 to 3, allowed is 0 to 2"),
        ({"material_texture": np.zeros(3, np.int32)}, "material_texture go from 0 to 0, allowed is -1 to -1"),
        ({"face_materials": np.zeros(2, np.int32)}, "differ in number"),
        ({"vertices": np.full((24, 3), np.nan, np.float32)}, "not finite"),
    ],
)
def test_the_rasterizer_refuses_what_it_could_not_read(change, message):
    with pytest.raises(ValueError, match=message):
        raster.Rasterizer(replace(boxes(), **change))


# Sources


@pytest.mark.parametrize(
    "name",
    ["libero", "LIBERO", "robosuite", "pybullet", "pybullet-data", "torcs-data", "megaglest", "assimp", "duck", "gltf"],
)
def test_reserved_sources_are_refused_by_name(name):
    assert not any(word in known for word in sources.RESERVED for known in sources.SOURCES)
    for text in (name, f"sweethome3d,{name}"):
        with pytest.raises(argparse.ArgumentTypeError, match="is kept for evaluation and must not be trained on"):
            sources.selected_sources(text)


def test_sources_are_selected_by_color_or_name():
    assert sources.selected_sources("all") == sources.SOURCES
    assert sources.selected_sources("green") == ("sweethome3d", "procedural")
    assert sources.selected_sources("0ad, procedural") == ("0ad", "procedural")
    assert sources.selected_sources("green", ("sweethome3d", "0ad")) == ("sweethome3d",)
    with pytest.raises(argparse.ArgumentTypeError, match="unknown source 'blender'"):
        sources.selected_sources("blender")


def test_a_reserved_pool_under_another_name_is_refused(tmp_path):
    write_pool(tmp_path / "pool_0ad.npz", "libero", [packed(in_order_of_use(boxes()), "a", "libero", "train")])
    with pytest.raises(InputError, match="holds objects of 'libero', not of '0ad'"):
        views.open_pools(tmp_path, ("0ad",), "train")


def test_an_empty_folder_says_what_it_needs(tmp_path):
    with pytest.raises(InputError, match="must hold pool_.*npz of 0ad, procedural"):
        views.open_pools(tmp_path, ("0ad", "procedural"), "train")
    assert views.open_pools(tmp_path, ("procedural",), "train") == [("procedural", 0)]


# Rasterizer


def project_camera(azimuth_rad: float, elevation_rad: float, distance: float, size: int) -> project_cameras.Camera:
    return project_cameras.orbit_camera(azimuth_rad, elevation_rad, distance, FOV_RAD, size)


@pytest.mark.parametrize("azimuth_deg", [0, 50, -130])
def test_silhouettes_lie_where_the_project_camera_projects_the_vertices(azimuth_deg):
    mesh, size, angles = boxes(), 128, (math.radians(azimuth_deg), 0.3)
    image = raster.Rasterizer(mesh).render(raster.orbit_camera(*angles, 2.4), FOV_RAD, size, UNLIT)
    uv, _ = project_camera(*angles, 2.4, size).project(torch.from_numpy(mesh.vertices))
    rows, columns = np.nonzero(image[..., 3] > 127)
    found = [columns.min(), columns.max() + 1, rows.min(), rows.max() + 1]
    expected = [*uv[:, 0].aminmax(), *uv[:, 1].aminmax()]
    np.testing.assert_allclose(found, [float(x) for x in expected], atol=1.0)


def test_depths_lead_back_to_the_surface():
    mesh, size, angles = box(0.6, 0.4, 0.8), 64, (0.7, 0.4)
    _, z_depths = raster.Rasterizer(mesh).render_with_depth(raster.orbit_camera(*angles, 2), FOV_RAD, size, UNLIT, 1)
    camera = project_camera(*angles, 2, size)
    is_hit = torch.from_numpy(z_depths > 0)
    points = camera.unproject(camera.pixel_centers()[is_hit], torch.from_numpy(z_depths)[is_hit])
    on_surface = (points.abs() / torch.tensor([0.3, 0.2, 0.4])).amax(-1)
    assert is_hit.sum() > 500
    assert torch.allclose(on_surface, torch.ones_like(on_surface), atol=1e-3)


def test_red_is_left_from_the_front_right_from_behind_and_hidden_from_plus_x():
    scene = raster.Rasterizer(boxes())

    def columns(azimuth_deg: float, channel: int) -> np.ndarray:
        image = scene.render(raster.orbit_camera(math.radians(azimuth_deg), 0.0, 2.4), FOV_RAD, 64, UNLIT).astype(int)
        return np.nonzero((image[..., 3] > 127) & (image[..., channel] - image[..., 2 - channel] > 100))[1]

    assert columns(0, 0).max() < 32 < columns(0, 2).min()
    assert columns(180, 2).max() < 32 < columns(180, 0).min()
    assert len(columns(90, 2)) and len(columns(-90, 0))
    assert len(columns(90, 2)) > len(columns(90, 0)) and len(columns(-90, 0)) > len(columns(-90, 2))


def test_mirroring_a_picture_is_rendering_the_mirrored_mesh_from_minus_the_azimuth():
    mesh = boxes()
    mirrored = replace(mesh, vertices=mesh.vertices * np.array([-1, 1, 1], np.float32))
    for azimuth_rad in (0.0, 0.8, -2.5):
        light, other = (raster.light_from(sign * 0.5, 0.7) for sign in (1, -1))
        image = raster.Rasterizer(mesh).render(raster.orbit_camera(azimuth_rad, 0.3, 2.4), FOV_RAD, 64, light)
        twin = raster.Rasterizer(mirrored).render(raster.orbit_camera(-azimuth_rad, 0.3, 2.4), FOV_RAD, 64, other)
        difference = np.abs(image[:, ::-1].astype(int) - twin)
        assert (difference.max(-1) > 8).mean() < 0.005  # pixels whose samples lie exactly on an edge


def test_the_compiled_rasterizer_leaves_small_numbers_alone():
    # Some compiler flags link code that rounds denormal numbers to zero in the whole process.
    probe = (
        "from conrad_engine.training.raster import Rasterizer\n"
        "from tests.training_meshes import box\n"
        "Rasterizer(box(1.0, 1.0, 1.0))\n"
        "assert Rasterizer._library is not None and 2.2250738585072014e-308 / 2 > 0"
    )
    subprocess.run([sys.executable, "-c", probe], cwd=Path(__file__).parents[1], check=True)


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_a_missing_compiler_gives_one_clear_sentence(compiler, tmp_path, monkeypatch):
    shutil.copy(raster.SOURCE, tmp_path / "rast.c")
    monkeypatch.setattr(raster, "SOURCE", tmp_path / "rast.c")
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(MissingDependency, match=f"needs a C compiler and '{compiler}' failed .*install gcc") as caught:
        raster.compiled_library()
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["rast.c"]


# Framing


def reference_depths(vertices: np.ndarray, framing: views.Framing) -> np.ndarray:
    camera = raster.orbit_camera(framing.azimuth_rad, framing.elevation_rad, HALF_FRAME / math.tan(framing.fov_rad / 2))
    return -(vertices - camera[:, 3]) @ camera[:, 2]


@pytest.mark.parametrize("is_centered", [True, False])
@pytest.mark.parametrize("fov_deg", [15, 40, 55])
def test_framed_objects_have_the_asked_fill_and_the_origin_in_its_place(is_centered, fov_deg):
    rng = np.random.default_rng(fov_deg)
    for _ in range(20):
        vertices = rng.uniform(-0.5, 0.5, (50, 3)) * rng.uniform(0.3, 1, 3) + rng.normal(size=3)
        framing = replace(views.random_framing(rng, math.radians(fov_deg)), is_silhouette_centered=is_centered)
        moved = views.framed(vertices, framing)
        distance = HALF_FRAME / math.tan(framing.fov_rad / 2)
        camera = project_cameras.orbit_camera(framing.azimuth_rad, framing.elevation_rad, distance, framing.fov_rad, 2)
        uv = camera.project(torch.from_numpy(moved).float())[0].numpy() - 1  # -1 to 1
        if is_centered or np.abs(uv).max() < views.HIGHEST_REACH - 1e-3:
            assert np.ptp(uv, axis=0).max() == pytest.approx(2 * framing.fill, abs=2e-3)
        else:
            assert np.abs(uv).max() == pytest.approx(views.HIGHEST_REACH, abs=1e-3)
            assert np.ptp(uv, axis=0).max() < 2 * framing.fill
        center = (moved.min(0) + moved.max(0)) / 2
        if is_centered:
            np.testing.assert_allclose(uv.min(0) + uv.max(0), 0, atol=2e-3)
            backward = raster.orbit_camera(framing.azimuth_rad, framing.elevation_rad, 1.0)[:, 2]
            assert center @ backward == pytest.approx(0, abs=1e-6)
        else:
            np.testing.assert_allclose(center, 0, atol=1e-6)
        # Moved and scaled only.
        ratios = np.ptp(moved, axis=0) / np.ptp(vertices, axis=0)
        np.testing.assert_allclose(ratios, ratios[0])


def test_placed_objects_lie_as_the_product_would_put_them():
    """Box centers at the origin but for the users' own errors, all in the frame; silhouettes alone in the middle."""
    rng = np.random.default_rng(2)
    kinds = set()
    for _ in range(30):
        vertices = rng.uniform(-0.5, 0.5, (50, 3)) * rng.uniform(0.3, 1, 3)
        moved, framing = views.place(rng, vertices)
        uv = views.projected(moved, framing, HALF_FRAME / math.tan(framing.fov_rad / 2))
        beside = np.abs(uv.min(0) + uv.max(0)).max() / 2 / np.ptp(uv, axis=0).max()
        center = (moved.min(0) + moved.max(0)) / 2
        kinds.add(framing.is_silhouette_centered)
        if framing.is_silhouette_centered:
            assert beside < 0.02
        else:
            assert (
                beside < views.MOST_BESIDE + 0.08 and np.abs(center).max() < 5 * views.ROUGH_JITTER * REFERENCE_EXTENT
            )
            assert np.abs(uv).max() < 1.1
    assert kinds == {True, False}


def test_a_size_is_known_where_the_origin_is_the_box_center(monkeypatch):
    mesh, shape = box(0.4, 0.7, 0.5), views.Shape(8, 1, 2)
    for is_centered in (True, False):
        monkeypatch.setattr(views, "P_CENTERED", float(is_centered))
        pictures, cameras = np.zeros((2, 8, 8, 4), np.uint8), np.zeros((2, 4), np.float32)
        size = views.render_group(np.random.default_rng(0), mesh, False, pictures, cameras, shape)
        assert size == 0 if is_centered else 0.9 < size < 2


def test_a_bus_seen_head_on_is_framed_from_outside():
    bus = box(0.2, 1.0, 0.26)
    framing = views.Framing(FOV_RAD, math.radians(15), 0.0, 0.8, is_silhouette_centered=True)
    moved = views.framed(bus.vertices, framing)
    assert np.ptp(views.projected(moved, framing, HALF_FRAME / math.tan(FOV_RAD / 2)), axis=0).max() == pytest.approx(
        1.6
    )
    assert reference_depths(moved, framing).min() > views.CLEARANCE
    image = raster.Rasterizer(replace(bus, vertices=moved.astype(np.float32))).render(
        raster.orbit_camera(0.0, framing.elevation_rad, HALF_FRAME / math.tan(FOV_RAD / 2)), FOV_RAD, 64, UNLIT
    )
    assert (image[..., 3] > 127).mean() > 0.2


def test_a_spear_towards_the_camera_is_not_usable_and_stays_in_front_of_it():
    spear = box(0.02, 1.0, 0.02).vertices
    framing = views.Framing(math.radians(55), 0.0, 0.0, 0.8, is_silhouette_centered=True)
    moved = views.framed(spear, framing)
    assert reference_depths(moved, framing).min() >= views.CLEARANCE - 1e-6
    assert not views.is_usable(moved, framing)
    assert views.is_usable(*(lambda f: (views.framed(spear, f), f))(replace(framing, azimuth_rad=math.pi / 2)))


@pytest.mark.parametrize("size", [(0.2, 1.0, 0.26), (0.02, 1.0, 0.02), (1.0, 0.9, 0.05), (0.5, 0.5, 0.5)])
def test_no_camera_of_a_group_is_inside_the_object_and_the_reference_shows_it(size):
    mesh = box(*size)
    for seed in range(12):
        rng = np.random.default_rng(seed)
        vertices, framing = views.place(rng, mesh.vertices)
        rows = views.random_cameras(rng, vertices, framing)
        for azimuth, elevation, distance, _ in rows.tolist():
            camera = raster.orbit_camera(framing.azimuth_rad + azimuth, elevation, distance)
            assert (-(vertices - camera[:, 3]) @ camera[:, 2]).min() > views.CLEARANCE * 0.6  # the jitter takes some
    pictures, cameras = np.zeros((views.N_VIEWS, 64, 64, 4), np.uint8), np.zeros((views.N_VIEWS, 4), np.float32)
    views.render_group(np.random.default_rng(0), mesh, True, pictures, cameras)
    assert (pictures[0, ..., 3] > 127).mean() >= views.MIN_COVERAGE


def test_half_of_the_groups_are_the_ring_that_the_product_draws():
    rng, mesh, n = np.random.default_rng(3), box(0.5, 0.4, 0.6), views.N_VIEWS - 1
    n_rings = 0
    for _ in range(60):
        vertices, framing = views.place(rng, mesh.vertices)
        rows = views.random_cameras(rng, vertices, framing)
        distance = HALF_FRAME / math.tan(framing.fov_rad / 2)
        condition = project_cameras.orbit_camera(0.0, framing.elevation_rad, distance, framing.fov_rad, 64)
        positions = [np.array(raster.orbit_position(*row[:2])) * row[2] for row in rows[1:].tolist()]
        rings = [ring_cameras(condition, n, half, 64).positions.numpy() for half, _ in FRAMES]
        n_rings += any(np.allclose(positions, ring, atol=1e-4) for ring in rings)
    assert 18 < n_rings < 42


def test_a_first_frame_says_nothing_of_size_and_another_is_the_first_that_holds_the_object(monkeypatch):
    framing = views.Framing(math.radians(30), 0.2, 0.0, 0.8, True)
    angles = [(azimuth, 0.3) for azimuth in ring_azimuths_rad(12)]

    def halves(size: float) -> set[float]:
        vertices = box(size, size, size / 4).vertices
        vertices = vertices * (size / np.linalg.norm(vertices[:, :2], axis=1).max())
        return {views.half_frame(rng, vertices, framing, angles) for _ in range(40)}

    rng = np.random.default_rng(0)
    assert halves(0.5) == {0.85}
    assert halves(0.75) == {0.85, 1.0}
    assert halves(2.0) == {0.85, 1.3}
    monkeypatch.setattr(views, "P_FIRST_FRAME", 0.0)
    for size in (0.5, 0.7, 0.8, 0.9):
        (half,) = halves(size)
        vertices = box(size, size, size / 4).vertices
        vertices = vertices * (size / np.linalg.norm(vertices[:, :2], axis=1).max())
        pictures, rows = np.zeros((13, 64, 64, 4), np.uint8), []
        for azimuth, elevation in [(0.0, 0.2), *angles]:
            rows.append((azimuth, elevation, half / math.tan(framing.fov_rad / 2), 0.0))
        views.render_views(
            replace(box(1, 1, 1), vertices=vertices.astype(np.float32)), framing, np.array(rows), UNLIT, pictures
        )
        assert (
            filled_part(torch.from_numpy(pictures[1:, ..., 3]) / 255) < dict(FRAMES)[half] + 0.04
        )  # a pixel and the blur


def test_an_object_that_never_shows_is_told(monkeypatch):
    monkeypatch.setattr(views, "MIN_COVERAGE", 0.99)
    pictures, cameras = np.zeros((views.N_VIEWS, 64, 64, 4), np.uint8), np.zeros((views.N_VIEWS, 4), np.float32)
    with pytest.raises(ValueError, match="no reference in four shows more than 99%"):
        views.render_group(np.random.default_rng(0), box(0.5, 0.5, 0.5), True, pictures, cameras)


def test_a_round_that_the_disk_does_not_hold_leaves_the_others(pool_folder, tmp_path, monkeypatch):
    arguments = ["--pool", str(pool_folder), "--out", str(tmp_path), "--rounds", "3", "--processes", "1"]
    take, taken = os.posix_fallocate, []

    def take_some(descriptor: int, offset: int, size: int) -> None:
        if len(taken) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken.append(size)
        take(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", take_some)
    with pytest.raises(InputError, match="the disk is full.*done stay, 1 of them; ask for no more --rounds"):
        views.main(arguments)
    assert (tmp_path / "done_0").exists() and not list(tmp_path.glob("*_1*"))
    rendered = tmp_path / "views_0.npy"
    assert rendered.stat().st_blocks * 512 >= rendered.stat().st_size == taken[0]


def test_evaluation_turns_an_object_that_is_too_deep():
    moved, framing = evaluate_prior.seen_from_the_front(box(0.1, 1.0, 0.13).vertices)
    assert framing.azimuth_rad > 0 and views.is_usable(moved, framing)
    assert evaluate_prior.seen_from_the_front(box(0.5, 0.4, 0.6).vertices)[1].azimuth_rad == 0
    assert np.ptp(moved, axis=0).max() <= 1.2 * 2 * HALF_BOX


# Changed objects


def test_reshaped_objects_stay_round_and_alike_on_both_sides(monkeypatch):
    monkeypatch.setattr(remodel, "P_FLATTER", 0.0)
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    ring = np.stack([np.cos(angles), np.sin(angles), np.zeros(24)], 1)
    vertices = np.concatenate([0.3 * ring + [0, 0, z] for z in np.linspace(-0.5, 0.5, 9)])
    heights = set()
    for seed in range(20):
        moved = remodel.reshaped(np.random.default_rng(seed), vertices).reshape(9, 24, 3)
        radii = np.hypot(moved[..., 0], moved[..., 1])
        np.testing.assert_allclose(radii, radii[:, :1] * np.ones(24), rtol=1e-6)
        assert np.all(radii > 0.15) and np.all(np.diff(moved[:, 0, 2]) > 0)
        heights.add(round(float(np.ptp(moved[..., 2])), 3))
    assert len(heights) > 5 and min(heights) < 0.9 and max(heights) > 1.1


def test_parts_go_as_a_whole_and_never_most_of_an_object():
    mesh = boxes()
    kept = set()
    for seed in range(40):
        left = remodel.without_parts(np.random.default_rng(seed), mesh)
        raster.Rasterizer(left)  # faces and vertices fit
        assert len(left.faces) % 12 == 0 and len(left.vertices) == 8 * (len(left.faces) // 12)
        assert 0 in left.face_materials  # the post is the larger part of the area
        kept.add(tuple(np.unique(left.face_materials).tolist()))
    assert kept == {(0,), (0, 1), (0, 2), (0, 1, 2)}


# Rendered rounds


def test_the_views_command_renders_a_round(pool_folder, tmp_path, capsys):
    views.main(["--pool", str(pool_folder), "--out", str(tmp_path), "--processes", "1", "--sources", "green"])
    pictures, cameras, sizes = (np.load(tmp_path / f"{name}_0.npy") for name in ("views", "cameras", "sizes"))
    assert (tmp_path / "done_0").exists() and "failed: none" in capsys.readouterr().out
    assert pictures.shape == (3, views.N_GROUPS, views.N_VIEWS, 64, 64, 4)  # two objects and a procedural one
    assert np.load(tmp_path / "sources.npy").tolist() == [0, 0, sources.SOURCES.index("procedural")]
    assert (cameras[:, :, 0, 0] == 0).all() and (cameras[..., 2] > 0).all()
    is_known = sizes > 0
    assert is_known.any() and ((sizes > 0.5) & (sizes < 3))[is_known].all()
    assert ((pictures[..., 3] > 127).mean((-1, -2)) >= 0.005).all()
    loaded = batches.load_round(tmp_path, 0, torch.device("cpu"))
    assert (loaded.chances > 0).all()
    assert float(loaded.chances[2]) == pytest.approx(batches.SOURCE_SHARES["procedural"])


def test_the_views_command_refuses_reserved_sources(pool_folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        views.main(["--pool", str(pool_folder), "--out", str(tmp_path), "--sources", "sweethome3d,pybullet"])
    assert "pybullet is kept for evaluation" in capsys.readouterr().err
