"""Training the embedded prior: pool files, the rasterizer, framing, rendered rounds, batches, augmentation and the loop."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conrad_engine import cameras as project_cameras
from conrad_engine.config import HALF_BOX, HALF_FRAME
from conrad_engine.errors import InputError, MissingDependency
from conrad_engine.guidance.embedded.unet import Group, ViewPrior
from conrad_engine.guidance.embedded.weights import load, to_bytes
from conrad_engine.training import augment, batches, evaluate_prior, raster, sources, train, views
from conrad_engine.training.pool import Pool, PoolMesh
from conrad_engine.training.pool_build.meshes import Material, Mesh
from conrad_engine.training.pool_build.packing import (
    PackedObject,
    encode_geometry,
    encode_texture,
    index_mesh,
    write_pool,
)
from conrad_engine.training.shapes import random_shape

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="the rasterizer needs a C compiler")

PARTS = (
    ((-0.1, -0.1, -0.5), (0.1, 0.1, 0.5), (0.2, 0.8, 0.2)),
    ((-0.5, -0.08, 0.2), (-0.1, 0.08, 0.4), (0.9, 0.1, 0.1)),
    ((0.1, -0.08, -0.2), (0.4, 0.08, 0.0), (0.1, 0.1, 0.9)),
)
"""Low corner, high corner and color: a post, a high red arm towards -X, a low blue one towards +X."""
UNLIT = raster.Light((0.0, 0.0, 1.0), 1.0, 0.0, 0.0)
FOV_RAD = math.radians(40)


def boxes(parts: tuple = PARTS) -> PoolMesh:
    """Boxes of one material each."""
    corners = np.array(list(itertools.product((0, 1), repeat=3)))
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    triangles = np.array([t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))])
    vertices = [np.array(low) + corners * (np.array(high) - np.array(low)) for low, high, _ in parts]
    return PoolMesh(
        vertices=np.concatenate(vertices).astype(np.float32),
        faces=np.concatenate([triangles + 8 * k for k in range(len(parts))]).astype(np.int32),
        uvs=np.zeros((8 * len(parts), 2), np.float32),
        face_materials=np.repeat(np.arange(len(parts)), 12).astype(np.int32),
        material_rgba=np.array([[*color, 1.0] for _, _, color in parts], np.float32),
        material_texture=np.full(len(parts), -1, np.int32),
    )


def box(x: float, y: float, z: float) -> PoolMesh:
    half = np.array([x, y, z]) / 2
    return boxes(((-half, half, (0.7, 0.5, 0.3)),))


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


def in_order_of_use(mesh: PoolMesh) -> PoolMesh:
    """The same with faces sorted by material and vertices numbered as the pool file needs them, box side 1."""
    by_material = np.argsort(mesh.face_materials, kind="stable")
    flat = mesh.faces[by_material].ravel()
    used, first = np.unique(flat, return_index=True)
    old = used[np.argsort(first)]
    new = np.zeros(len(mesh.vertices), np.int32)
    new[old] = np.arange(len(old))
    vertices = mesh.vertices[old] / np.ptp(mesh.vertices[old], axis=0).max()
    return replace(
        mesh,
        vertices=vertices - (vertices.min(0) + vertices.max(0)) / 2,
        uvs=mesh.uvs[old],
        faces=new[flat].reshape(-1, 3),
        face_materials=mesh.face_materials[by_material],
    )


def packed(mesh: PoolMesh, key: str, source: str, split: str) -> PackedObject:
    return PackedObject(
        source=source,
        key=key,
        name=key,
        category="things",
        license="CC0-1.0",
        author="tests",
        geometry=encode_geometry(mesh),
        material_rgba=np.round(mesh.material_rgba * 255).astype(np.uint8),
        material_texture=mesh.material_texture,
        textures=[encode_texture(texture) for texture in mesh.textures],
        n_faces=len(mesh.faces),
        n_faces_before=len(mesh.faces),
        shape_hash=key,
        appearance=np.zeros((4, 2, 2, 4), np.uint8),
        split=split,
    )


@pytest.fixture(scope="module")
def pool_folder(tmp_path_factory) -> Path:
    """Two training objects and one for validation of each of two sources."""
    folder, rng = tmp_path_factory.mktemp("pool"), np.random.default_rng(0)
    for source in ("sweethome3d", "0ad"):
        meshes = [boxes(), random_shape(rng), random_shape(rng)]
        items = []
        for k, mesh in enumerate(map(in_order_of_use, meshes)):
            items.append(packed(mesh, f"{source}_{k}", source, "val" if k == 2 else "train"))
        write_pool(folder / f"pool_{source}.npz", source, items)
    return folder


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
    with pytest.raises(InputError, match="must hold pool_.*npz of 0ad"):
        views.open_pools(tmp_path, ("0ad",), "train")


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
        assert np.ptp(uv, axis=0).max() == pytest.approx(2 * framing.fill, abs=2e-3)
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


def test_an_object_that_never_shows_is_told(monkeypatch):
    monkeypatch.setattr(views, "MIN_COVERAGE", 0.99)
    pictures, cameras = np.zeros((views.N_VIEWS, 64, 64, 4), np.uint8), np.zeros((views.N_VIEWS, 4), np.float32)
    with pytest.raises(ValueError, match="no reference in four shows more than 99%"):
        views.render_group(np.random.default_rng(0), box(0.5, 0.5, 0.5), True, pictures, cameras)


def test_evaluation_turns_an_object_that_is_too_deep():
    moved, framing = evaluate_prior.seen_from_the_front(box(0.1, 1.0, 0.13).vertices)
    assert framing.azimuth_rad > 0 and views.is_usable(moved, framing)
    assert evaluate_prior.seen_from_the_front(box(0.5, 0.4, 0.6).vertices)[1].azimuth_rad == 0
    assert np.ptp(moved, axis=0).max() <= 1.2 * 2 * HALF_BOX


# Rendered rounds


def test_the_views_command_renders_a_round(pool_folder, tmp_path):
    views.main(["--pool", str(pool_folder), "--out", str(tmp_path), "--processes", "1", "--sources", "green"])
    pictures, cameras, sizes = (np.load(tmp_path / f"{name}_0.npy") for name in ("views", "cameras", "sizes"))
    assert (tmp_path / "done_0").exists()
    assert pictures.shape == (3, views.N_GROUPS, views.N_VIEWS, 64, 64, 4)  # two objects and a procedural one
    assert np.load(tmp_path / "sources.npy").tolist() == [0, 0, sources.SOURCES.index("procedural")]
    assert (cameras[:, :, 0, 0] == 0).all() and (cameras[..., 2] > 0).all()
    assert ((sizes > 0.5) & (sizes < 3)).all()
    assert ((pictures[..., 3] > 127).mean((-1, -2)) >= 0.005).all()
    loaded = batches.load_round(tmp_path, 0, torch.device("cpu"))
    assert (loaded.chances > 0).all()
    assert float(loaded.chances[2]) == pytest.approx(batches.SOURCE_SHARES["procedural"])


def test_the_views_command_refuses_reserved_sources(pool_folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        views.main(["--pool", str(pool_folder), "--out", str(tmp_path), "--sources", "sweethome3d,pybullet"])
    assert "pybullet is kept for evaluation" in capsys.readouterr().err


# Batches


def marked_round(n_objects: int = 6) -> batches.Round:
    """Views filled with numbers: red is the object, green the view; the left half is opaque; azimuth 0.5, except view 0."""
    shape = (n_objects, views.N_GROUPS, views.N_VIEWS)
    pictures = torch.zeros(*shape, 64, 64, 4, dtype=torch.uint8)
    pictures[..., 0] = (torch.arange(n_objects) * 10 + 5)[:, None, None, None, None]
    pictures[..., 1] = (torch.arange(views.N_VIEWS) * 10 + 5)[:, None, None]
    pictures[..., :32, 3] = 255
    cameras = torch.tensor([0.5, 0.1, 2.0, 0.36]).expand(*shape, 4).clone()
    cameras[:, :, 0, 0] = 0
    cameras[..., 1] += torch.arange(views.N_VIEWS) / 100
    return batches.Round(pictures, cameras, torch.full(shape[:2], 1.3), torch.ones(n_objects))


LAYOUT = (Group(3, 4, True), Group(5, 2, False))


def numbers(pictures: torch.Tensor, channel: int) -> list[int]:
    """The number drawn into the left half of each picture in [-1, 1]."""
    return [round(float(x)) for x in ((pictures[:, channel, :, :32].mean((1, 2)) + 1) / 2 * 255 - 5) / 10]


def test_targets_belong_to_their_references_and_repeat_none():
    store = batches.ViewStore([marked_round()], torch.device("cpu"))
    batch = store.batch(LAYOUT, is_training=False)
    owners = [0] * 4 + [1] * 4 + [2] * 4 + [3] * 2 + [4] * 2 + [5] * 2 + [6] * 2 + [7] * 2
    objects = numbers(batch.picture, 0)
    assert numbers(batch.targets, 0) == [objects[i] for i in owners]
    assert numbers(batch.picture, 1) == [0] * 8
    shown = numbers(batch.targets, 1)
    for owner in range(8):
        mine = [view for view, o in zip(shown, owners) if o == owner]
        assert 0 not in mine and len(set(mine)) == len(mine)
    assert torch.allclose(batch.cameras[:, 1], 0.1 + torch.tensor(shown) / 100, atol=1e-4)
    assert batch.reference.is_elevation_known.all() and batch.reference.is_present.all()
    assert not batch.reference.is_size_known.any()


def test_mirrored_pictures_come_with_mirrored_azimuths():
    torch.manual_seed(0)
    store = batches.ViewStore([marked_round()], torch.device("cpu"))
    seen = set()
    for _ in range(4):
        batch = store.batch(LAYOUT)
        owners = torch.arange(8).repeat_interleave(torch.tensor([4] * 3 + [2] * 5))
        is_left = batch.targets[:, 3, :, :32].mean((1, 2)) > batch.targets[:, 3, :, 32:].mean((1, 2))
        reference_left = batch.picture[:, 3, :, :32].mean((1, 2)) > batch.picture[:, 3, :, 32:].mean((1, 2))
        assert torch.equal(is_left, reference_left[owners])
        assert torch.allclose(batch.cameras[:, 0], torch.where(is_left, 0.5, -0.5))
        seen |= set(is_left.tolist())
    assert seen == {True, False}


def test_training_batches_stay_in_range_and_drop_facts():
    torch.manual_seed(1)
    store = batches.ViewStore([marked_round()], torch.device("cpu"))
    facts = []
    for _ in range(20):
        batch = store.batch(LAYOUT)
        for pictures in (batch.targets, batch.picture):
            assert pictures.min() >= -1 and pictures.max() <= 1
        facts.append(torch.stack(batch.reference[1:], 1))
    known, present, log_size, size_known = torch.cat(facts).unbind(1)
    for value, chance in ((known, 0.85), (present, 0.9), (size_known, 0.5)):
        assert abs(float(value.mean()) - chance) < 0.13
    assert float(log_size.mean()) == pytest.approx(math.log(1.3), abs=0.05)


def test_failed_objects_are_never_drawn(tmp_path):
    made = marked_round()
    made.cameras[2] = 0
    for name, value in (("views", made.views), ("cameras", made.cameras), ("sizes", made.sizes)):
        np.save(tmp_path / f"{name}_0.npy", value.numpy())
    np.save(tmp_path / "sources.npy", np.zeros(6, np.int64))
    store = batches.ViewStore([batches.load_round(tmp_path, 0, torch.device("cpu"))], torch.device("cpu"))
    drawn = {number for _ in range(15) for number in numbers(store.batch(LAYOUT, is_training=False).picture, 0)}
    assert 2 not in drawn and len(drawn) == 5


# Augmentation


def random_pictures(n: int = 16) -> torch.Tensor:
    """Premultiplied discs of random colors."""
    generator = torch.Generator().manual_seed(0)
    v, u = torch.meshgrid(*[torch.linspace(-1, 1, 64)] * 2, indexing="ij")
    alpha = ((u**2 + v**2) < 0.5).float().expand(n, 1, 64, 64)
    return torch.cat([torch.rand(n, 3, 64, 64, generator=generator) * alpha, alpha], 1)


def test_photo_like_pictures_stay_premultiplied_and_some_stay_as_they_are():
    torch.manual_seed(0)
    pictures = random_pictures(64)
    changed = augment.photo_like(pictures)
    assert changed.shape == pictures.shape
    assert changed.min() >= 0 and (changed[:, :3] <= changed[:, 3:] + 1e-5).all() and changed.max() <= 1
    is_same = (changed == pictures).flatten(1).all(1)
    assert 15 < is_same.sum() < 60
    assert (changed[:, 3] - pictures[:, 3]).abs().mean() < 0.1


def test_color_shifts_keep_the_mask_and_the_range():
    torch.manual_seed(0)
    pictures = random_pictures()
    shifts = augment.draw_color_shifts(16, torch.device("cpu"))
    changed = augment.shifted_colors(pictures, shifts)
    assert torch.equal(changed[:, 3], pictures[:, 3])
    assert changed.min() >= 0 and (changed[:, :3] <= changed[:, 3:] + 1e-6).all()
    untouched = (shifts == 0).all(1)
    assert untouched.any() and not untouched.all()
    assert torch.allclose(changed[untouched], pictures[untouched], atol=2e-3)
    assert (changed - pictures)[~untouched].abs().mean() > 5e-3


def test_fine_quantization_changes_nothing_and_coarse_does():
    rgb = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    basis = augment.cosine_basis(torch.device("cpu"))
    assert torch.allclose(basis @ basis.T, torch.eye(8), atol=1e-5)
    for step, is_close in ((1e-5, True), (0.3, False)):
        steps = torch.full((2, 1, 1, 1), step)
        assert torch.allclose(augment.quantized(rgb, steps), rgb, atol=1e-3) == is_close


def test_blur_keeps_flat_pictures_and_widens_edges():
    edge = torch.zeros(2, 1, 16, 16)
    edge[..., 8:] = 1
    widths = torch.tensor([0.01, 1.5]).view(2, 1, 1, 1)
    blurred = augment.blurred(edge, widths)
    assert torch.allclose(blurred[0], edge[0], atol=1e-4)
    assert 0.1 < blurred[1, 0, 0, 7] < 0.5
    assert torch.allclose(augment.blurred(torch.ones(2, 1, 16, 16), widths), torch.ones(2, 1, 16, 16), atol=1e-5)


# The loop


def test_times_fit_the_layout():
    torch.manual_seed(0)
    for unit in (1, 3):
        layout = train.training_layout(unit)
        t = train.draw_times(unit, torch.device("cpu"))
        assert len(t) == sum(group.n_references * group.n_targets for group in layout) == 31 * unit
        assert t.min() >= 0 and t.max() <= 1
        joint = t[: 7 * unit].view(unit, 7)
        assert (joint == joint[:, :1]).all()


def test_the_loss_weight_is_clipped_signal_to_noise():
    t = torch.linspace(0.01, 0.99, 50)
    alpha, sigma = (math.pi / 2 * t).cos(), (math.pi / 2 * t).sin()
    in_clean_picture = train.loss_weights(t) / sigma**2  # v - v' = (x' - x) / sigma
    assert torch.allclose(in_clean_picture, (alpha**2 / sigma**2 + 1).clamp(max=5), rtol=1e-4)


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    assert train.learning_rate(0, 0.0) < train.learning_rate(100, 0.1) < train.learning_rate(10_000, 0.3)
    assert train.learning_rate(10_000, 0.3) == train.PEAK_RATE
    assert train.learning_rate(10_000, 1.0) == 0


@pytest.fixture(scope="module")
def rendered(pool_folder, tmp_path_factory) -> Path:
    """Rounds of both splits."""
    folder = tmp_path_factory.mktemp("rendered")
    for split in ("train", "val"):
        views.main(["--pool", str(pool_folder), "--out", str(folder / split), "--processes", "1", "--split", split])
    return folder


def train_arguments(rendered: Path, run: Path, plan: float) -> list[str]:
    folders = {
        "--data": rendered / "train",
        "--val": rendered / "val",
        "--state": run / "state",
        "--export": run / "out",
    }
    settings = ["--plan", str(plan), "--unit", "1", "--most-rounds", "1", "--compile", "none", "--smoke"]
    return [*(str(x) for pair in folders.items() for x in pair), *settings, "--widths", "32", "32", "32"]


def log_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "out" / "train.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_training_writes_weights_and_resumes(rendered, tmp_path):
    train.main(train_arguments(rendered, tmp_path, 1.0))
    first = log_of(tmp_path)
    steps = [entry["step"] for entry in first if "loss" in entry]
    assert steps == list(range(1, len(steps) + 1))
    assert all(math.isfinite(x) for entry in first if "loss" in entry for x in entry["loss"])
    assert first[-1] == {"event": "finished"} and first[-2]["bad"] == 0
    data = b"".join(path.read_bytes() for path in sorted((tmp_path / "out").glob("prior.safetensors.part*")))
    (tmp_path / "weights.safetensors").write_bytes(data)
    net = load(tmp_path / "weights.safetensors")
    assert net.leave[-1].weight.abs().max() > 0  # zero before the first step
    assert (tmp_path / "out" / "samples.png").stat().st_size > 100
    train.main(train_arguments(rendered, tmp_path, 60.0) + ["--deadline", "0"])
    resumed = [entry["step"] for entry in log_of(tmp_path)[len(first) :] if "loss" in entry]
    assert resumed[0] == steps[-1] + 1


@pytest.mark.slow
def test_two_processes_train_together(rendered, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    command = [*launcher, "-m", "conrad_engine.training.train", *train_arguments(rendered, tmp_path, 1.0)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    log = log_of(tmp_path)
    last = next(entry for entry in reversed(log) if "targets" in entry)
    assert last["targets"] == last["step"] * 31 * 2
    assert log[0]["gpus"] == 2 and log[-1] == {"event": "finished"}


def test_a_step_follows_the_gradient_and_leaves_bad_ones_out(tmp_path):
    arguments = train_arguments(tmp_path, tmp_path, 1.0)
    options = train.parse(arguments)
    trainer = train.Trainer(options, train.Workers())
    before = [p.detach().clone() for p in trainer.parameters]
    trainer.gradients.fill_(torch.nan)
    trainer.update(0.0)
    assert int(trainer.n_bad) == 1
    assert all(torch.isfinite(p).all() for p in trainer.parameters)
    trainer.gradients.fill_(2.0)
    norm = trainer.update(1e-3)
    assert float(norm) == pytest.approx(2 * math.sqrt(len(trainer.gradients)), rel=1e-3)
    assert float(trainer.gradients.norm()) == pytest.approx(train.MAX_NORM, rel=1e-3)
    moved = [(p.detach() - b) for p, b in zip(trainer.parameters, before)]
    assert all((m <= 0).all() for m, b in zip(moved, before) if (b == 0).all())  # without decay: straight downhill


# Scores


def test_scores_of_equal_pictures_are_perfect_and_of_others_are_not():
    pictures = random_pictures(4)
    rgb, mask = pictures[:, :3], pictures[:, 3] > 0.5
    assert torch.allclose(evaluate_prior.ssim(rgb, rgb), torch.ones(4), atol=1e-4)
    assert (evaluate_prior.ssim(rgb, rgb.flip(0)) < 0.9).all()
    assert float(evaluate_prior.psnr(torch.tensor(0.01))) == pytest.approx(20)
    assert (evaluate_prior.overlap(mask, mask) == 1).all()
    half = mask.clone()
    half[:, :, :32] = False
    assert torch.allclose(evaluate_prior.overlap(mask, half), torch.full((4,), 0.5), atol=0.02)


def test_silhouettes_of_one_solid_agree_and_of_different_ones_do_not():
    rows = [(math.radians(a), 0.3, 2.4, math.tan(FOV_RAD / 2)) for a in (0, 90, 180, 270)]
    masks = []
    for mesh in (box(0.9, 0.9, 0.9), box(0.9, 0.9, 0.3)):
        scene = raster.Rasterizer(mesh)
        pictures = [scene.render(raster.orbit_camera(*row[:3]), FOV_RAD, 64, UNLIT) for row in rows]
        masks.append(torch.from_numpy(np.stack(pictures)[..., 3] > 127))
    cameras = torch.tensor(rows)[None]
    assert evaluate_prior.hull_agreement(masks[0][None], cameras) > 0.9
    mixed = torch.stack([masks[0][0], masks[1][1], masks[0][2], masks[1][3]])
    assert evaluate_prior.hull_agreement(mixed[None], cameras) < 0.8


@pytest.mark.parametrize("chunk", [1, 2])
def test_evaluation_writes_scores_and_a_sheet(chunk, pool_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_prior, "SETTINGS", evaluate_prior.SHOWN)
    monkeypatch.setattr(evaluate_prior, "AZIMUTHS_DEG", (90, 180))
    weights = tmp_path / "tiny.safetensors"
    weights.write_bytes(to_bytes(ViewPrior((32, 32, 32)), (32, 32, 32)))
    arguments = ["--pool", pool_folder, "--weights", weights, "--out", tmp_path, "--steps", 1, "--chunk", chunk]
    evaluate_prior.main([str(x) for x in arguments])
    scores = json.loads((tmp_path / "prior_scores.json").read_text())
    assert scores["objects"] == 2 and scores["names"] == ["sweethome3d/sweethome3d_2", "0ad/0ad_2"]
    assert scores["truth"]["iou"] == 1 and scores["truth"]["psnr"] == 60
    assert scores["joint, guidance 2"]["psnr"] < scores["truth"]["psnr"]
    assert (tmp_path / "prior_sheet.png").stat().st_size > 100
