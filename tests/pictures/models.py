"""The objects of the sample pictures, built from a few beveled shapes with procedural materials (Blender)."""

import math

import bpy
from mathutils import Matrix, Vector

OBJECT, SCENERY = "object", "scenery"
group = OBJECT
"""Name of the collection that new parts join; `make_pictures` switches it."""


def material(name, color, rough=0.45, metal=0.0, vary=0.15, scale=6.0, bump=0.0, wood=None, stripes=None, coat=0.0):
    """A paint, metal or wood (whose grain runs along an axis).

    `stripes` is (second color, axis, count): bands along an axis of the part's own box.
    """
    made = bpy.data.materials.new(name)
    made.use_nodes = True
    nodes, link = made.node_tree.nodes, made.node_tree.links.new
    shader = nodes["Principled BSDF"]
    shader.inputs["Roughness"].default_value = rough
    shader.inputs["Metallic"].default_value = metal
    shader.inputs["Coat Weight"].default_value = coat
    place = nodes.new("ShaderNodeTexCoord")
    noise = nodes.new("ShaderNodeTexNoise")
    noise.inputs["Scale"].default_value, noise.inputs["Detail"].default_value = scale, 6.0
    along = nodes.new("ShaderNodeMapping")
    along.inputs["Scale"].default_value = {"x": (1, 12, 12), "z": (12, 12, 1)}.get(wood, (1, 1, 1))
    link(place.outputs["Object"], along.inputs["Vector"])
    link(along.outputs[0], noise.inputs["Vector"])
    mix = nodes.new("ShaderNodeMixRGB")
    mix.inputs[1].default_value = (*color, 1)
    mix.inputs[2].default_value = (*(c * (1 - 2.2 * vary) for c in color), 1)
    link(noise.outputs["Fac"], mix.inputs[0])
    out = mix.outputs[0]
    if stripes:
        second, axis, count = stripes
        split = nodes.new("ShaderNodeSeparateXYZ")
        link(place.outputs["Generated"], split.inputs[0])
        times = nodes.new("ShaderNodeMath")
        times.operation = "MULTIPLY"
        times.inputs[1].default_value = count / 2
        link(split.outputs[axis], times.inputs[0])
        part = nodes.new("ShaderNodeMath")
        part.operation = "FRACT"
        link(times.outputs[0], part.inputs[0])
        step = nodes.new("ShaderNodeMath")
        step.operation = "GREATER_THAN"
        link(part.outputs[0], step.inputs[0])
        band = nodes.new("ShaderNodeMixRGB")
        band.inputs[2].default_value = (*second, 1)
        link(step.outputs[0], band.inputs[0])
        link(out, band.inputs[1])
        out = band.outputs[0]
    link(out, shader.inputs["Base Color"])
    if bump:
        relief = nodes.new("ShaderNodeBump")
        relief.inputs["Strength"].default_value = bump
        link(noise.outputs["Fac"], relief.inputs["Height"])
        link(relief.outputs[0], shader.inputs["Normal"])
    return made


def _finish(paint, bevel, turn=(0, 0, 0)):
    part = bpy.context.object
    part.rotation_euler = tuple(math.radians(a) for a in turn)
    part.data.materials.append(paint)
    if bevel:
        rounding = part.modifiers.new("bevel", "BEVEL")
        rounding.width, rounding.segments, rounding.limit_method = bevel, 4, "ANGLE"
    if part.type == "MESH":
        part.data.polygons.foreach_set("use_smooth", [True] * len(part.data.polygons))
        part.modifiers.new("normals", "WEIGHTED_NORMAL").keep_sharp = True
    for owner in part.users_collection:
        owner.objects.unlink(part)
    bpy.data.collections[group].objects.link(part)
    return part


def box(paint, size, at, bevel=0.02, turn=(0, 0, 0)):
    bpy.ops.mesh.primitive_cube_add(size=1, location=at)
    bpy.context.object.scale = size
    bpy.ops.object.transform_apply(location=False, rotation=False, scale=True)
    return _finish(paint, bevel, turn)


def rod(paint, start, end, radius, tip=None, bevel=0.008, sides=48):
    """A cylinder or cone from one point to another."""
    start, end = Vector(start), Vector(end)
    bpy.ops.mesh.primitive_cone_add(
        vertices=sides, radius1=radius, radius2=radius if tip is None else tip, depth=(end - start).length
    )
    part = _finish(paint, bevel)
    part.matrix_world = (
        Matrix.Translation((start + end) / 2) @ (end - start).to_track_quat("Z", "Y").to_matrix().to_4x4()
    )
    return part


def ball(paint, at, size):
    bpy.ops.mesh.primitive_uv_sphere_add(segments=48, ring_count=24, location=at)
    bpy.context.object.scale = size if isinstance(size, tuple) else (size,) * 3
    return _finish(paint, 0)


def ring(paint, at, major, minor, turn=(0, 0, 0)):
    bpy.ops.mesh.primitive_torus_add(location=at, major_radius=major, minor_radius=minor, major_segments=64)
    return _finish(paint, 0, turn)


def text(paint, words, at, size, turn=(90, 0, 0)):
    bpy.ops.object.text_add(location=at)
    words_object = bpy.context.object
    words_object.data.body, words_object.data.size, words_object.data.extrude = words, size, 0.004
    words_object.data.align_x, words_object.data.align_y = "CENTER", "CENTER"
    return _finish(paint, 0, turn)


def robot():
    teal = material("teal", (0.03, 0.30, 0.33), 0.35, coat=0.5)
    cream = material("cream", (0.80, 0.66, 0.42), 0.4, coat=0.3)
    steel = material("steel", (0.45, 0.46, 0.48), 0.32, 0.9)
    red, blue = (
        material("red", (0.62, 0.05, 0.03), 0.35, coat=0.5),
        material("blue", (0.03, 0.09, 0.42), 0.35, coat=0.5),
    )
    dark, glow = material("dark", (0.02, 0.02, 0.025), 0.3), material("amber", (0.95, 0.45, 0.04), 0.2)
    box(teal, (0.62, 0.42, 0.66), (0, 0, 0.80), 0.06)
    box(cream, (0.44, 0.03, 0.36), (0, -0.215, 0.86), 0.012)
    for k, paint in enumerate((red, glow, blue)):
        rod(paint, (-0.13 + 0.10 * k, -0.22, 0.78), (-0.13 + 0.10 * k, -0.26, 0.78), 0.034)
    rod(dark, (0.13, -0.22, 0.95), (0.13, -0.245, 0.95), 0.075)
    rod(red, (0.13, -0.25, 0.95), (0.17, -0.25, 0.99), 0.008)
    text(dark, "CR-7", (-0.08, -0.232, 0.96), 0.115)
    text(cream, "TOY CO.", (0, -0.214, 0.56), 0.09)
    rod(steel, (0, 0, 1.10), (0, 0, 1.22), 0.10)
    box(cream, (0.50, 0.40, 0.36), (0, 0, 1.38), 0.07)
    for x, size in ((-0.11, 0.085), (0.12, 0.065)):
        rod(dark, (x, -0.19, 1.41), (x, -0.225, 1.41), size + 0.02)
        ball(glow, (x, -0.215, 1.41), (size, 0.03, size))
    box(dark, (0.24, 0.02, 0.05), (0.0, -0.20, 1.26), 0.008)
    for k in range(4):
        box(steel, (0.02, 0.025, 0.05), (-0.08 + 0.055 * k, -0.203, 1.26), 0.003)
    rod(steel, (0.16, 0, 1.55), (0.20, 0, 1.80), 0.014)
    ball(red, (0.205, 0, 1.82), 0.05)
    for side in (-1, 1):
        rod(steel, (0.24 * side, 0, 1.38), (0.31 * side, 0, 1.38), 0.07)
        rod(steel, (0.28 * side, 0, 1.00), (0.40 * side, 0, 1.00), 0.09)
        rod(steel, (0.16 * side, 0, 0.5), (0.16 * side, 0, 0.16), 0.07)
        ring(teal, (0.16 * side, 0, 0.33), 0.075, 0.022)
        box(teal if side < 0 else cream, (0.24, 0.40, 0.17), (0.17 * side, -0.05, 0.085), 0.05)
    rod(red, (0.42, 0, 1.0), (0.60, -0.06, 1.32), 0.075, 0.06)  # raised, on the picture's right
    rod(blue, (-0.42, 0, 1.0), (-0.47, -0.10, 0.62), 0.075, 0.06)
    for at, up in (((0.61, -0.065, 1.34), 1), ((-0.475, -0.105, 0.58), -1)):
        ball(steel, at, 0.075)
        for side in (-1, 1):
            x = at[0] + 0.06 * side
            rod(steel, (x, at[1], at[2]), (x + 0.03 * side, at[1] - 0.02, at[2] + 0.15 * up), 0.026, 0.018)
    ring(steel, (0.0, 0.24, 0.86), 0.12, 0.03, (90, 0, 0))
    rod(glow, (0.0, 0.2, 0.86), (0.0, 0.34, 0.86), 0.02)


def chair():
    oak = material("oak", (0.55, 0.30, 0.11), 0.45, vary=0.27, scale=3.0, bump=0.05, wood="x")
    spoke = material("spoke", (0.55, 0.30, 0.11), 0.45, vary=0.27, scale=3.0, bump=0.05, wood="z")
    dark = material("walnut", (0.20, 0.09, 0.04), 0.4, vary=0.27, scale=3.0, bump=0.05, wood="z")
    cloth = material("cloth", (0.10, 0.22, 0.30), 0.9, vary=0.3, scale=40, bump=0.3)
    box(oak, (0.46, 0.44, 0.035), (0, 0, 0.45), 0.012)
    box(cloth, (0.41, 0.39, 0.04), (0, -0.005, 0.485), 0.018)
    for x in (-0.2, 0.2):
        rod(dark, (x * 1.08, -0.21, 0), (x, -0.19, 0.44), 0.014, 0.021)
        rod(dark, (x * 1.08, 0.25, 0), (x, 0.19, 0.46), 0.014, 0.021)
        rod(dark, (x, 0.19, 0.46), (x * 0.95, 0.27, 0.95), 0.021, 0.015)
        rod(spoke, (x * 1.04, -0.20, 0.2), (x * 1.04, 0.22, 0.2), 0.011)
    rod(spoke, (-0.208, 0.01, 0.2), (0.208, 0.01, 0.2), 0.011)
    rod(spoke, (-0.205, -0.20, 0.28), (0.205, -0.20, 0.28), 0.011)
    box(oak, (0.44, 0.022, 0.085), (0, 0.265, 0.91), 0.01, (-9, 0, 0))
    for k in range(5):
        x = -0.13 + 0.065 * k
        rod(spoke, (x, 0.195, 0.46), (x * 1.05, 0.262, 0.89), 0.0095)


def camera():
    leather = material("leather", (0.035, 0.022, 0.018), 0.6, vary=0.3, scale=90, bump=0.5)
    chrome = material("chrome", (0.55, 0.55, 0.53), 0.3, 0.95, vary=0.05)
    brown = material("brown", (0.26, 0.10, 0.04), 0.5, vary=0.2, scale=30, bump=0.3)
    black, glass = material("black", (0.015, 0.015, 0.017), 0.35), material("glass", (0.02, 0.03, 0.09), 0.05, coat=1.0)
    red, white = material("red", (0.6, 0.03, 0.02), 0.35), material("white", (0.8, 0.8, 0.76), 0.5)
    box(brown, (1.30, 0.36, 0.56), (0, 0, 0.36), 0.07)
    box(chrome, (1.30, 0.36, 0.16), (0, 0, 0.70), 0.05)
    box(chrome, (1.30, 0.36, 0.09), (0, 0, 0.05), 0.035)
    box(chrome, (0.36, 0.30, 0.12), (0.05, 0, 0.81), 0.04)
    for x, paint in ((0.05, glass), (-0.36, glass)):
        box(black, (0.20, 0.02, 0.11), (x, -0.175, 0.73), 0.01)
        box(paint, (0.15, 0.02, 0.07), (x, -0.182, 0.73), 0.005)
    for radius, far, paint in ((0.29, 0.28, chrome), (0.27, 0.36, black), (0.25, 0.46, chrome), (0.23, 0.52, leather)):
        rod(paint, (0.08, -0.10, 0.38), (0.08, -far, 0.38), radius, bevel=0.015, sides=96)
    ball(glass, (0.08, -0.49, 0.38), (0.17, 0.055, 0.17))
    ring(white, (0.08, -0.46, 0.38), 0.243, 0.006, (90, 0, 0))
    for x, radius, tall, paint in ((-0.50, 0.10, 0.09, chrome), (-0.28, 0.07, 0.06, black), (0.47, 0.12, 0.07, chrome)):
        rod(paint, (x, 0.02, 0.77), (x, 0.02, 0.78 + tall), radius)
    rod(red, (0.33, -0.08, 0.77), (0.33, -0.08, 0.82), 0.032)
    rod(chrome, (-0.46, -0.17, 0.46), (-0.46, -0.23, 0.46), 0.05)
    box(chrome, (0.03, 0.02, 0.22), (-0.46, -0.235, 0.37), 0.008)
    text(black, "RADIAL", (0.05, -0.152, 0.825), 0.075)
    box(red, (0.035, 0.02, 0.14), (0.52, -0.18, 0.40), 0.005)
    for x in (-0.67, 0.67):
        ring(chrome, (x, 0, 0.68), 0.04, 0.01, (0, 0, 90))


def truck():
    red = material("red", (0.60, 0.06, 0.03), 0.3, coat=0.7)
    cream = material("cream", (0.82, 0.74, 0.55), 0.35, coat=0.4)
    wood = material("wood", (0.48, 0.28, 0.12), 0.5, vary=0.27, scale=2, bump=0.05, wood="x")
    tyre, steel = material("tyre", (0.02, 0.02, 0.02), 0.8), material("steel", (0.6, 0.6, 0.6), 0.25, 0.95)
    glass, amber = material("glass", (0.04, 0.09, 0.14), 0.08, coat=1.0), material("amber", (0.95, 0.5, 0.08), 0.2)
    green = material("green", (0.05, 0.28, 0.10), 0.4)
    box(tyre, (2.0, 0.50, 0.10), (0.05, 0, 0.26), 0.02)
    box(red, (0.46, 0.70, 0.34), (-0.80, 0, 0.48), 0.09)  # bonnet, towards -X
    box(red, (0.56, 0.76, 0.72), (-0.34, 0, 0.66), 0.10)
    box(cream, (0.58, 0.78, 0.06), (-0.34, 0, 1.03), 0.03)
    box(glass, (0.02, 0.58, 0.24), (-0.622, 0, 0.82), 0.01)
    for y in (-0.38, 0.38):
        box(glass, (0.34, 0.02, 0.24), (-0.34, y, 0.82), 0.01)
        box(steel, (0.10, 0.03, 0.025), (-0.20, y * 1.02, 0.62), 0.008)
        ball(amber, (-1.03, y * 0.62, 0.50), (0.04, 0.085, 0.085))
        ring(steel, (-1.02, y * 0.62, 0.50), 0.09, 0.016, (0, 90, 0))
        box(red, (0.52, 0.14, 0.07), (-0.74, y, 0.42), 0.03)
    box(steel, (0.04, 0.30, 0.20), (-1.03, 0, 0.47), 0.015)
    box(steel, (0.07, 0.80, 0.09), (-1.07, 0, 0.30), 0.03)
    box(wood, (1.12, 0.80, 0.07), (0.56, 0, 0.36), 0.015)
    for k in range(3):
        for y in (-0.39, 0.39):
            box(wood, (1.10, 0.03, 0.11), (0.56, y, 0.47 + 0.14 * k), 0.012)
    for x in (0.06, 0.56, 1.06):
        for y in (-0.41, 0.41):
            box(red, (0.06, 0.03, 0.46), (x, y, 0.58), 0.01)
    box(green, (0.36, 0.36, 0.40), (0.30, 0.05, 0.60), 0.03)
    text(cream, "TEA", (0.30, -0.135, 0.70), 0.15)
    ball(amber, (0.74, -0.10, 0.58), 0.20)
    ball(cream, (0.90, 0.20, 0.54), 0.16)
    rod(steel, (-0.02, 0.30, 0.5), (-0.02, 0.30, 1.22), 0.035)
    for x in (-0.76, 0.30, 0.82):
        for y in (-0.36, 0.36):
            rod(tyre, (x, y - 0.08, 0.21), (x, y + 0.08, 0.21), 0.21, bevel=0.04)
            rod(cream, (x, y - 0.09, 0.21), (x, y + 0.09, 0.21), 0.12, bevel=0.01)
            rod(red, (x, y - 0.105, 0.21), (x, y + 0.105, 0.21), 0.045, bevel=0.01)


def lighthouse():
    white = material("white", (0.80, 0.76, 0.68), 0.5, vary=0.06, stripes=((0.55, 0.04, 0.03), 2, 7))
    rock = material("rock", (0.20, 0.18, 0.16), 0.85, vary=0.35, scale=9, bump=0.7)
    navy, brass = material("navy", (0.02, 0.05, 0.16), 0.4), material("brass", (0.65, 0.42, 0.12), 0.3, 0.9)
    lamp, wood = (
        material("lamp", (0.95, 0.75, 0.25), 0.15, coat=1.0),
        material("door", (0.25, 0.11, 0.04), 0.5, wood="z"),
    )
    red, plaster = (
        material("roof", (0.55, 0.04, 0.03), 0.4),
        material("plaster", (0.75, 0.70, 0.60), 0.7, scale=30, bump=0.2),
    )
    rod(rock, (0, 0, 0), (0, 0, 0.20), 0.52, 0.42, 0.05, 11)
    ball(rock, (0.36, -0.2, 0.12), (0.20, 0.16, 0.14))
    rod(white, (0, 0, 0.18), (0, 0, 1.60), 0.30, 0.19, 0.01, 96)
    rod(navy, (0, 0, 1.58), (0, 0, 1.65), 0.29, bevel=0.015)
    ring(brass, (0, 0, 1.80), 0.27, 0.012)
    for k in range(12):
        x, y = 0.27 * math.cos(k * math.pi / 6), 0.27 * math.sin(k * math.pi / 6)
        rod(brass, (x, y, 1.64), (x, y, 1.80), 0.009)
    rod(lamp, (0, 0, 1.65), (0, 0, 1.90), 0.15)
    for k in range(6):
        x, y = 0.155 * math.cos(k * math.pi / 3), 0.155 * math.sin(k * math.pi / 3)
        rod(navy, (x, y, 1.65), (x, y, 1.90), 0.012)
    rod(red, (0, 0, 1.89), (0, 0, 2.09), 0.21, 0.03)
    ball(brass, (0, 0, 2.11), 0.04)
    box(wood, (0.15, 0.06, 0.26), (-0.04, -0.285, 0.34), 0.01)
    for z in (0.80, 1.22):
        box(navy, (0.08, 0.06, 0.13), (0.05, -0.255 + 0.05 * (z - 0.8), z), 0.01)
    box(plaster, (0.34, 0.34, 0.26), (-0.34, -0.05, 0.30), 0.01)
    for side in (-1, 1):
        box(red, (0.25, 0.40, 0.03), (-0.34 + 0.09 * side, -0.05, 0.485), 0.008, (0, 38 * side, 0))
    box(navy, (0.09, 0.02, 0.10), (-0.36, -0.225, 0.31), 0.006)
