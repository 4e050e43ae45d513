"""Renders the sample pictures with Blender's Python module: `python make_pictures.py OUT [NAME ...]`.

Needs `pip install bpy==4.5.15` (Python 3.11); SAMPLES sets the samples a pixel (40 for the shipped ones). Writes NAME.png,
NAME.camera.json and, for pictures with a backdrop, NAME.mask.png; these were then saved as the smaller files beside it.
"""

import json
import math
import os
import sys
from pathlib import Path

import bpy
import models
from mathutils import Matrix, Vector
from models import OBJECT, SCENERY, ball, box, camera, chair, lighthouse, material, robot, rod, truck

FOV_DEG = 40.0


def studio():
    """A sweep of gray paper: floor and wall without an edge between them."""
    profile = [(-12.0, 0.0), (2.0, 0.0)]
    profile += [(2 + 5 * math.sin(k * math.pi / 40), 5 - 5 * math.cos(k * math.pi / 40)) for k in range(1, 21)] + [
        (7.0, 15.0)
    ]
    mesh = bpy.data.meshes.new("sweep")
    corners = [(x, y, z) for y, z in profile for x in (-15.0, 15.0)]
    mesh.from_pydata(corners, [], [(2 * k, 2 * k + 1, 2 * k + 3, 2 * k + 2) for k in range(len(profile) - 1)])
    mesh.polygons.foreach_set("use_smooth", [True] * len(mesh.polygons))
    mesh.materials.append(material("paper", (0.62, 0.62, 0.62), 0.9, vary=0.0))
    bpy.data.collections[SCENERY].objects.link(bpy.data.objects.new("sweep", mesh))


def room(scale):
    """A table before shelves full of things, out of focus."""
    table = material("table", (0.34, 0.19, 0.09), 0.45, vary=0.27, scale=0.8 / scale, bump=0.05, wood="x")
    wall = material("wall", (0.42, 0.46, 0.40), 0.9, vary=0.2, scale=2)
    shelf = material("shelf", (0.45, 0.30, 0.18), 0.6, vary=0.25, scale=1, wood="x")
    at = lambda x, y, z: (x * scale, y * scale, z * scale)  # noqa: E731
    box(table, at(9, 4, 0.1), at(0, 0.6, -0.05), 0.02)
    box(wall, at(20, 0.1, 12), at(0, 4.2, 2), 0)
    colors = [
        (0.5, 0.1, 0.06),
        (0.1, 0.2, 0.35),
        (0.6, 0.5, 0.25),
        (0.12, 0.3, 0.16),
        (0.7, 0.66, 0.6),
        (0.3, 0.12, 0.3),
    ]
    paints = [material(f"book{k}", color, 0.6) for k, color in enumerate(colors)]
    for level in range(-1, 4):
        z = 1.25 * level - 0.35
        box(shelf, at(12, 0.7, 0.08), at(0, 3.8, z), 0.01)
        x, k = -5.2, 3 * level
        while x < 5.2:
            k += 1
            wide, tall = 0.12 + 0.05 * ((k * 7) % 5), 0.62 + 0.09 * ((k * 5) % 4)
            if k % 9:
                box(
                    paints[(k * 11 + level) % 6], at(wide, 0.5, tall), at(x + wide / 2, 3.75, z + 0.04 + tall / 2), 0.01
                )
            x += wide + (0.5 if k % 9 == 0 else 0.02)
    rod(paints[4], at(-1.9, 1.5, 0), at(-1.9, 1.5, 0.5), 0.22 * scale, bevel=0.02)
    for k in range(9):
        turn = k * 0.7
        ball(paints[3], at(-1.9 + 0.25 * math.cos(turn), 1.5 + 0.25 * math.sin(turn), 0.7 + 0.06 * k), 0.2 * scale)
    for k in range(3):
        box(paints[(2, 0, 1)[k]], at(0.9, 0.6, 0.13), at(1.8 + 0.1 * k, 1.2, 0.065 + 0.13 * k), 0.01, (0, 0, 12 * k))


# name: model, turn about Z, width, height, elevation, backdrop, share of the picture to fill
PICTURES = {
    "robot": (robot, -24, 768, 768, 12, None, 0.88),
    "chair": (chair, -34, 768, 768, 16, None, 0.88),
    "camera": (camera, -25, 900, 768, 14, studio, 0.68),
    "truck": (truck, 32, 1024, 640, 15, room, 0.62),
    "lighthouse": (lighthouse, 18, 640, 960, 10, room, 0.80),
}


def bounds(parts):
    bpy.context.view_layer.update()
    graph = bpy.context.evaluated_depsgraph_get()
    corners = [p.matrix_world @ Vector(c) for p in parts for c in p.evaluated_get(graph).bound_box]
    return [[choose(c[i] for c in corners) for i in range(3)] for choose in (min, max)]


def light(at, target, power, size):
    bpy.ops.object.light_add(type="AREA", location=at)
    lamp = bpy.context.object
    lamp.data.energy, lamp.data.size = power, size
    lamp.rotation_euler = (Vector(target) - Vector(at)).to_track_quat("-Z", "Y").to_euler()


def fitting_distance(parts, center, up, focal, width, height, share):
    """How far on -Y, `up` radians above level, the camera has to stand for the parts to fill this share of the picture."""
    graph = bpy.context.evaluated_depsgraph_get()
    needed = 0.0
    for part in parts:
        shape = part.evaluated_get(graph).to_mesh()
        for vertex in shape.vertices:
            x, y, z = part.matrix_world @ vertex.co - Vector(center)
            toward, above = -y * math.cos(up) + z * math.sin(up), y * math.sin(up) + z * math.cos(up)
            needed = max(needed, toward + 2 * focal * max(abs(x) / width, abs(above) / height) / share)
    return needed


def place_camera(width, height, up, center, distance, focal, is_blurred):
    """On -Y of the object's center, looking at it; the picture's larger side spans FOV_DEG."""
    position = Vector(center) + distance * Vector((0, -math.cos(up), math.sin(up)))
    bpy.ops.object.camera_add(location=position, rotation=(math.pi / 2 - up, 0, 0))
    lens = bpy.context.object.data
    lens.sensor_fit, lens.angle = "AUTO", math.radians(FOV_DEG)
    lens.dof.use_dof, lens.dof.focus_distance, lens.dof.aperture_fstop = is_blurred, 0.95 * distance, 5 / distance
    bpy.context.scene.camera = bpy.context.object
    bpy.context.view_layer.update()
    return [list(row) for row in bpy.context.object.matrix_world], [focal, focal, width / 2, height / 2]


def render(name, out):
    model, turn, width, height, elevation, backdrop, share = PICTURES[name]
    bpy.ops.wm.read_factory_settings(use_empty=True)
    scene = bpy.context.scene
    for name_of_part in (OBJECT, SCENERY):
        scene.collection.children.link(bpy.data.collections.new(name_of_part))
    models.group = OBJECT
    model()
    parts = list(bpy.data.collections[OBJECT].objects)
    bpy.context.view_layer.update()
    for part in parts:
        part.matrix_world = Matrix.Rotation(math.radians(turn), 4, "Z") @ part.matrix_world
    low, high = bounds(parts)
    center, sizes = [(a + b) / 2 for a, b in zip(low, high)], [b - a for a, b in zip(low, high)]
    extent = max(sizes)
    up, focal = math.radians(elevation), max(width, height) / 2 / math.tan(math.radians(FOV_DEG) / 2)
    distance = fitting_distance(parts, center, up, focal, width, height, share)
    c2w, intrinsics = place_camera(width, height, up, center, distance, focal, backdrop is room)
    models.group = SCENERY
    if backdrop:
        backdrop(extent / 2) if backdrop is room else backdrop()
    for part in bpy.data.collections[SCENERY].objects:
        part.location.z += low[2]
    for (x, y, z), power, size in (
        ((-1.6, -1.8, 2.2), 90, 1.2),
        ((2.2, -1.2, 1.0), 30, 1.6),
        ((0.6, 2.0, 2.4), 60, 0.8),
    ):
        at = [c + extent * v for c, v in zip(center, (x, y, z))]
        light(at, center, power * extent**2 * (0.8 if backdrop is studio else 1.2), size * extent)
    scene.world = bpy.data.worlds.new("sky")
    scene.world.use_nodes = True
    scene.world.node_tree.nodes["Background"].inputs["Color"].default_value = (0.75, 0.8, 0.9, 1)
    scene.world.node_tree.nodes["Background"].inputs["Strength"].default_value = 0.5
    scene.render.engine = "CYCLES"
    scene.cycles.samples, scene.cycles.use_denoising, scene.cycles.seed = int(os.environ.get("SAMPLES", "40")), True, 1
    scene.render.resolution_x, scene.render.resolution_y = width, height
    scene.render.film_transparent = True
    scene.render.image_settings.color_mode = "RGBA"
    scene.view_settings.view_transform = "Standard"
    scene.render.filepath = str(out / f"{name}.png")
    bpy.ops.render.render(write_still=True)
    if backdrop:
        # The object once more without its surroundings: its true mask.
        scene.view_layers[0].layer_collection.children[SCENERY].exclude = True
        scene.cycles.samples, scene.cycles.use_denoising = 16, False
        scene.render.filepath = str(out / f"{name}.mask.png")
        bpy.ops.render.render(write_still=True)
    facts = {"c2w": c2w, "intrinsics": intrinsics, "width": width, "height": height}
    facts |= {"object_center": center, "object_size": extent}
    (out / f"{name}.camera.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for picture in sys.argv[2:] or PICTURES:
        render(picture, folder)
    sys.stdout.flush()
    os._exit(0)  # the module can hang at a normal exit
