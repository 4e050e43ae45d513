"""Mesh files: what is written reopens as it was, upright, and what cannot be read is one sentence."""

import json
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import trimesh

from conrad_engine.errors import InputError
from conrad_engine.mesh.glb import glb_bytes, load_mesh, read_textured, write_glb, write_obj, write_ply, write_texture
from conrad_engine.mesh.mesh import Mesh, TexturedMesh, vertex_normals
from conrad_engine.mesh.occupancy import signed_distance_grid

from .mesh_scenes import box_mesh, sphere_mesh


@pytest.fixture
def textured() -> TexturedMesh:
    """A box, higher than deep and deeper than wide, with a texture of four colors."""
    mesh = box_mesh()
    vertices = (mesh.vertices * [0.5, 1.0, 1.5] + [0.1, 0.2, 0.3]).astype(np.float32)
    corners = vertices[mesh.faces].reshape(-1, 3)
    faces = np.arange(len(corners), dtype=np.int32).reshape(-1, 3)
    uvs = np.tile([[0.1, 0.1], [0.9, 0.1], [0.5, 0.9]], (len(faces), 1)).astype(np.float32)
    texture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    return TexturedMesh(corners, faces, uvs, vertex_normals(corners, faces), texture)


def test_glb_reopens_as_it_was(textured, tmp_path):
    write_glb(textured, tmp_path / "a.glb", 'chair "ü"')
    back = read_textured(tmp_path / "a.glb")
    assert np.allclose(back.vertices, textured.vertices, atol=1e-6) and (back.faces == textured.faces).all()
    assert np.allclose(back.uvs, textured.uvs, atol=1e-6) and (back.texture == textured.texture).all()
    assert [path.name for path in tmp_path.iterdir()] == ["a.glb"], "no temporary file stays"


def test_glb_is_y_up_with_one_named_material(textured):
    data = glb_bytes(textured, "chair")
    header = json.loads(data[20 : 20 + struct.unpack("<I", data[12:16])[0]])
    primitive = header["meshes"][0]["primitives"][0]
    positions = header["accessors"][primitive["attributes"]["POSITION"]]
    assert "NORMAL" in primitive["attributes"] and header["nodes"][0]["name"] == "chair"
    # Inside (x, y, z), in the file (x, z, -y).
    low, high = textured.vertices.min(0), textured.vertices.max(0)
    assert np.allclose(positions["min"], [low[0], low[2], -high[1]], atol=1e-6)
    assert np.allclose(positions["max"], [high[0], high[2], -low[1]], atol=1e-6)
    material = header["materials"][0]
    assert material["pbrMetallicRoughness"]["metallicFactor"] == 0 and not material.get("doubleSided", False)
    # glTF's v runs downward.
    other = trimesh.load(trimesh.util.wrap_as_stream(data), file_type="glb", force="mesh")
    assert np.allclose(other.visual.uv, textured.uvs, atol=1e-6)


@pytest.mark.parametrize("kind", ["glb", "obj", "ply"])
def test_written_files_load_in_place(textured, tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    write_texture(textured.texture, tmp_path / "texture.png")
    {"glb": write_glb, "obj": write_obj, "ply": write_ply}[kind](textured, path)
    for source in (path, path.read_bytes()):
        mesh = load_mesh(source)
        assert len(mesh.faces) == len(textured.faces)
        for end in ("min", "max"):
            assert np.allclose(getattr(mesh.vertices, end)(0), getattr(textured.vertices, end)(0), atol=1e-5)


def test_obj_lines_are_those_of_the_arrays(textured, tmp_path):
    write_obj(textured, tmp_path / "a.obj", "50% done")
    lines = ["mtllib a.mtl", "o 50% done", "usemtl picture"]
    lines += [f"v {x:.6g} {z:.6g} {-y:.6g}" for x, y, z in textured.vertices.tolist()]
    lines += [f"vt {u:.6g} {v:.6g}" for u, v in textured.uvs.tolist()]
    lines += [f"vn {x:.6g} {z:.6g} {-y:.6g}" for x, y, z in textured.normals.tolist()]
    lines += ["f " + " ".join(f"{k}/{k}/{k}" for k in face) for face in (textured.faces + 1).tolist()]
    assert (tmp_path / "a.obj").read_text().replace("-0 ", "0 ") == "\n".join([*lines, ""]).replace("-0 ", "0 ")


def test_stl_loads_from_path_and_bytes(tmp_path):
    mesh = sphere_mesh(0.5, 6)
    trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).export(tmp_path / "a.stl")
    assert (
        len(load_mesh(tmp_path / "a.stl").faces)
        == len(load_mesh((tmp_path / "a.stl").read_bytes()).faces)
        == len(mesh.faces)
    )


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.glb", b"", "cannot be read"),
        ("a.glb", b"glTF" + bytes(40), "cannot be read"),
        ("a.ply", b"ply\nformat ascii 1.0\nelement vertex 3\n", "cannot be read"),
        ("a.obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\n", "triangles"),
        ("a.obj", b"v 0 0 0\nv nan 0 0\nv 0 1 0\nf 1 2 3\n", "not finite"),
        ("a.blend", b"BLENDER", "can be"),
        ("a", b"BLENDER", "can be"),
    ],
)
def test_unusable_files_are_one_sentence(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        load_mesh(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_mesh(tmp_path / "none.glb")


def test_too_many_faces_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("conrad_engine.mesh.glb.MAX_FACES", 10)
    trimesh.Trimesh(*(getattr(box_mesh(), n) for n in ("vertices", "faces"))).export(tmp_path / "a.ply")
    with pytest.raises(InputError, match="12 triangles; reduce"):
        load_mesh(tmp_path / "a.ply")


def test_folder_in_the_way_leaves_nothing_behind(textured, tmp_path):
    (tmp_path / "a.glb").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        write_glb(textured, tmp_path / "a.glb")
    assert [path.name for path in tmp_path.iterdir()] == ["a.glb"]


@pytest.mark.slow
def test_khronos_validator_finds_nothing(textured, tmp_path):
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("node and npm are not installed")
    done = subprocess.run(["npm", "install", "--prefix", tmp_path, "gltf-validator"], capture_output=True, timeout=240)
    if done.returncode:
        pytest.skip("the npm package gltf-validator cannot be installed here")
    write_glb(textured, tmp_path / "a.glb")
    script = (
        "const v = require('gltf-validator'), fs = require('fs');"
        "v.validateBytes(new Uint8Array(fs.readFileSync('a.glb'))).then(r => console.log(JSON.stringify(r.issues)))"
    )
    answer = subprocess.run(["node", "-e", script], cwd=tmp_path, capture_output=True, check=True, timeout=60)
    issues = json.loads(answer.stdout)
    assert issues["numErrors"] == 0 and issues["numWarnings"] == 0, issues["messages"]


AABB = np.array([[-1.0, -0.8, -1.0], [1.0, 0.8, 1.0]])


def cell_centers(shape):
    axes = [AABB[0, k] + (np.arange(n) + 0.5) * (AABB[1, k] - AABB[0, k]) / n for k, n in enumerate(shape)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1)


def test_signed_distances_of_a_ball():
    grid = signed_distance_grid(sphere_mesh(0.5, 60), AABB, 40)
    assert grid.shape == (40, 32, 40)
    truth = 0.5 - np.linalg.norm(cell_centers(grid.shape), axis=-1)
    assert np.abs(grid - truth).max() < 0.08, "within one and a half cells"
    assert ((grid > 0) == (truth > 0))[np.abs(truth) > 0.05].all()


def test_overlapping_and_turned_parts_are_solid():
    left, right = sphere_mesh(0.35, 40), sphere_mesh(0.35, 40)
    vertices = np.concatenate([left.vertices - [0.2, 0, 0], right.vertices + [0.2, 0, 0]]).astype(np.float32)
    faces = np.concatenate([left.faces, right.faces[:, ::-1] + len(left.vertices)])
    grid = signed_distance_grid(Mesh(vertices, faces), AABB, 40)
    center = cell_centers(grid.shape)
    for x in (-0.35, 0.0, 0.35):
        assert grid[tuple(np.argwhere(np.abs(center - [x, 0, 0]).max(-1) < 0.03)[0])] > 0.05


def test_small_hole_is_closed_and_open_bowl_is_a_shell():
    mesh = sphere_mesh(0.5, 60)
    middle = mesh.vertices[mesh.faces].mean(1)
    holed = Mesh(mesh.vertices, mesh.faces[np.linalg.norm(middle - [0, 0, 0.5], axis=1) > 0.06])
    assert signed_distance_grid(holed, AABB, 40)[20, 16, 20] > 0.3
    bowl = signed_distance_grid(Mesh(mesh.vertices, mesh.faces[middle[:, 2] < 0]), AABB, 40)
    assert bowl[20, 16, 20] < 0 and bowl[20, 16, 10] > 0, "hollow in the middle, solid at its bottom"


def test_concave_corner_stays_empty():
    lower, upper = box_mesh(0.3), box_mesh(0.3)
    vertices = np.concatenate([lower.vertices - [0.3, 0, 0.3], upper.vertices + [0.3, 0, 0.3]]).astype(np.float32)
    grid = signed_distance_grid(Mesh(vertices, np.concatenate([lower.faces, upper.faces + 8])), AABB, 40)
    center = cell_centers(grid.shape)
    truth = (np.abs(center + [0.3, 0, 0.3]).max(-1) < 0.3) | (np.abs(center - [0.3, 0, 0.3]).max(-1) < 0.3)
    assert 0.97 < ((grid >= 0) & truth).sum() / truth.sum() and (grid > 0).sum() < 1.05 * truth.sum()


def test_paths_with_spaces(textured, tmp_path):
    folder = Path(tmp_path / "with space")
    folder.mkdir()
    write_obj(textured, folder / "a b.obj", "na me\nx")
    assert (folder / "a b.mtl").exists() and len(load_mesh(folder / "a b.obj").faces) == len(textured.faces)
