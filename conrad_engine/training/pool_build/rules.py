"""Which objects enter the pool: names, shape and look of a single object, twins, caps, validation split."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from ..pool import PoolMesh
from ..raster import Light, Rasterizer, default_light, fit_distance, orbit_camera
from .meshes import Candidate, Mesh
from .packing import PackedObject

FOV_RAD = math.radians(40)
ELEVATION_RAD = math.radians(20)
N_VIEWS = 8

NAMES_LEFT_OUT = {
    "sweethome3d": r"duck|soccer",
    "flightgear": r"duck|egyp|othodox|soccer|apron|parking|park-lined|windsock|sign[_-]|[_-]sign|papi|helipad|taxi|"
    r"marker|runway|_lit$|light[-_ ]?pole|lamp|light_|lights_|lightmast|biglight|collar|embankment|tunnelportal|"
    r"-hill|carpark|[-_]lod",
    "0ad": r"duck|destruct|fndn|scaf|decal|rubble|death|dead|wake|foam|dust|smoke|fire|flame|blood|shadow|"
    r"[_ ]rain|bubble|shoal|flag|banner"
    r"|garrison|[_ ]water|waterfall|reservoir|target_marker|rally|skybox|outline|selection|debug|[_ ]test|"
    r"particle|corpse|ghost|plot_field|plot field|"
    r"rice_|aura|hair|beard|crest|_tile|handgrip|projectile|reflection|crow_circle|temp_field|dummy|plot_roof|"
    r"mine_round_snow|fading|_grass",
    "supertuxkart": r"duck|_track|lod\d|_lod|water|ground|sky|bubble|wheel|beam|cloud|terrain|shadow|invisible|"
    r"limit|lava|fog|road|checker|"
    r"lightning|gfx_|crowd|displace|glow|halo|sea[-_. ]|grass|river|waterfall|reset|headlight|-low$|_low$|plane\.|"
    r"field_lining|neonarrow|zipper|"
    r"wall|floor|bridge|cliff|hill|mountain|tunnel|[_ ]rail|fence|[_ ]lane|leaves|firefl|blast|nebula|ribbon|"
    r"shield|boundar|"
    r"bodypart|_physics|_lo$|stones|reve?rseramp|baggage|_rotor|_screw|soccer|leftdoor|rightdoor|_medium$|"
    r"plants_test|corn_field|spot$|"
    r"teslaspark|basered|baseblue|labyrinth pipe|datatape|barrel_a_bottom|barrel_a_cover|chestlid|chesttop|_hit$|"
    r"movingmap|introcutscene tree",
}
FEW_OF = {
    "sweethome3d": (r"plug|switch|radiator|socket|outlet|convector|sensor|vent\b|grille|thermostat", 6),
    "flightgear": (r"hang[ae]r|shed|warehouse|storehouse|industrial|factory|storage|tank", 90),
}
"""Names of which only a few stay."""
FLORA = {
    "sweethome3d": r"$^",
    "flightgear": r"^Trees/",
    "0ad": r"^(flora|fungi)/|^props/flora/",
    "supertuxkart": r"tree|palm|bush|fern|plant|birch|willow|pine|agave|cattail|cypress|liana|seaweed|root|flower|"
    r"lily|cocoa|vegetation|weed|leaf",
}
CAPS = {
    "flora": {"0ad": 60, "flightgear": 10, "supertuxkart": 30},
    "units": {"0ad": 250},
    "structures": {"0ad": 420},
    "props/units": {"0ad": 200},
    "props": {"0ad": 250},
}
MOST_LOOKS_OF_ONE_SHAPE = 3
MOST_OF_ONE_FAMILY = {"flightgear": 3}
"""Objects whose names differ by digits and colors only."""
COLOR_WORDS = r"black|white|red|blue\d?n?|green|yellow|orange|brown|silver|grey|gray|sand|dark|light"
TWIN_DISTANCE = {"sweethome3d": 0.035, "flightgear": 0.075, "0ad": 0.075, "supertuxkart": 0.05}
"""Objects closer than this (see `distances`) count as the same object: the first one stays."""
RELATED_DISTANCE = 0.13
"""Objects closer than this stay on one side of the validation split."""
N_VALIDATION = {"sweethome3d": 45, "flightgear": 20, "0ad": 25, "supertuxkart": 10}


@dataclass(frozen=True)
class Look:
    """Measurements of one object's renders from `N_VIEWS` azimuths."""

    coverage: np.ndarray
    """(N_VIEWS,) part of the frame that is covered; the camera is as near as the object fits."""
    main_part: float
    """Part of the covered pixels in the largest connected region, smallest over the views."""
    saturation: float
    """Mean over pixels of max - min of the unlit color, 8-bit."""
    color_spread: float
    """Mean standard deviation of the unlit color channels, 8-bit."""


def is_wanted_name(item: Candidate | PackedObject) -> bool:
    """False for parts of scenery, ground sheets, level-of-detail copies and the like."""
    return re.search(NAMES_LEFT_OUT[item.source], f"{item.key} {item.name}", re.IGNORECASE) is None


def look_of(mesh: PoolMesh, size: int = 64) -> Look:
    """Render and measure; unlit, so that shading does not count as color."""
    rasterizer = Rasterizer(mesh)
    distance = fit_distance(mesh.vertices, FOV_RAD, ELEVATION_RAD)
    unlit = Light((0.0, 0.0, 1.0), 1.0, 0.0, 0.0)
    coverage, main_parts, pixels = [], [], []
    for view in range(N_VIEWS):
        image = rasterizer.render(
            orbit_camera(2 * math.pi * (view + 0.5) / N_VIEWS, ELEVATION_RAD, distance), FOV_RAD, size, unlit
        )
        is_covered = image[..., 3] > 90
        coverage.append(image[..., 3].mean() / 255)
        labels, n_regions = ndimage.label(is_covered, np.ones((3, 3)))
        main_parts.append(np.bincount(labels.ravel())[1:].max() / is_covered.sum() if n_regions else 0.0)
        pixels.append(image[is_covered][:, :3].astype(np.float32))
    colors = np.concatenate(pixels)
    if not len(colors):
        return Look(np.array(coverage), 0.0, 0.0, 0.0)
    return Look(
        np.array(coverage),
        float(np.median(main_parts)),
        float((colors.max(1) - colors.min(1)).mean()),
        float(colors.std(0).mean()),
    )


def reason_to_drop(mesh: Mesh, look: Look, source: str) -> str:
    """Why an object is of no use for training, or '' where it is fine. Expects a normalized mesh."""
    extents = np.sort(np.ptp(mesh.vertices[np.unique(mesh.faces)], axis=0))
    if len(mesh.faces) < 40:
        return "few faces"
    if extents[0] < 0.03:
        return "flat"
    if extents[1] < 0.07:
        return "stick"
    if look.coverage.min() < 0.042 or look.coverage.mean() < 0.06:
        return "covers little"
    if look.coverage.max() > 0.88:
        return "covers all"
    if look.main_part < 0.8:
        return "scattered"
    # Elsewhere colorless means that textures are missing; household things may well be white.
    if look.saturation < 6 and look.color_spread < 12 and source != "sweethome3d":
        return "colorless"
    return ""


def appearance(mesh: PoolMesh, size: int = 20) -> np.ndarray:
    """(4, size, size, 4) uint8: four small views, colors premultiplied by alpha."""
    rasterizer = Rasterizer(mesh)
    distance = fit_distance(mesh.vertices, FOV_RAD, ELEVATION_RAD)
    azimuths_rad = [math.radians(azimuth) for azimuth in (25, 115, 205, 295)]
    images = np.stack(
        [
            rasterizer.render(orbit_camera(a, ELEVATION_RAD, distance), FOV_RAD, size, default_light(a), 3)
            for a in azimuths_rad
        ]
    )
    images[..., :3] = images[..., :3].astype(np.float32) * images[..., 3:] / 255
    return images


def shape_hash(mesh: Mesh) -> str:
    """Equal for equal vertex sets of normalized meshes, to two decimals."""
    points = np.unique(np.round(mesh.vertices[np.unique(mesh.faces)], 2) + 0.0, axis=0)
    return hashlib.sha1(points.astype(np.float32).tobytes()).hexdigest()[:16]


def distances(looks: np.ndarray) -> np.ndarray:
    """(n, n) root mean square difference of `appearance`, over the area that either object covers, [0, 1]."""
    flat = looks.reshape(len(looks), -1).astype(np.float32) / 255
    squares = (flat**2).sum(axis=1)
    differences = np.maximum(squares[:, None] + squares[None] - 2 * flat @ flat.T, 0)
    cover = looks[..., 3].reshape(len(looks), -1).astype(np.float32).sum(axis=1) / 255
    return np.sqrt(differences / (4 * np.maximum(cover[:, None], cover[None])))


def group_of(item: PackedObject) -> str:
    """The cap that an object counts towards, or ''."""
    if re.search(
        FLORA[item.source], f"{item.key} {item.name}" if item.source == "supertuxkart" else item.key, re.IGNORECASE
    ):
        return "flora"
    return next(
        (
            group
            for group in ("units", "structures", "props/units", "props")
            if item.source == "0ad" and item.category.startswith(group)
        ),
        "",
    )


def without_twins(items: list[PackedObject]) -> tuple[list[PackedObject], Counter]:
    """Objects in random order, twins and surplus left out; and how many fell to what."""
    order = np.random.default_rng(7).permutation(len(items))
    items = [items[k] for k in order]
    distance = distances(np.stack([item.appearance for item in items]))
    accepted: list[int] = []
    shapes, families, groups, few, dropped = Counter(), Counter(), Counter(), Counter(), Counter()
    for k, item in enumerate(items):
        group = group_of(item)
        few_pattern, most_few = FEW_OF.get(item.source, (r"$^", 0))
        is_few = re.search(few_pattern, item.name, re.IGNORECASE) is not None
        family = re.sub(rf"{COLOR_WORDS}|[\W\d_]+", "", item.name, flags=re.IGNORECASE)
        if accepted and distance[k, accepted].min() < TWIN_DISTANCE[item.source]:
            dropped["twin"] += 1
        elif shapes[item.shape_hash] >= MOST_LOOKS_OF_ONE_SHAPE:
            dropped["recoloring"] += 1
        elif families[family] >= MOST_OF_ONE_FAMILY.get(item.source, 10**9):
            dropped["family"] += 1
        elif groups[group] >= CAPS.get(group, {}).get(item.source, 10**9):
            dropped[f"cap on {group}"] += 1
        elif is_few and few["few"] >= most_few:
            dropped["too many of a kind"] += 1
        else:
            accepted.append(k)
            shapes[item.shape_hash] += 1
            families[family] += 1
            groups[group] += 1
            few["few"] += is_few
    return [items[k] for k in accepted], dropped


def relatives(items: list[PackedObject]) -> np.ndarray:
    """(n,) group numbers: objects that share a shape, look alike, or differ in name by digits only."""
    parent = np.arange(len(items))

    def root(k: int) -> int:
        while parent[k] != k:
            parent[k] = parent[parent[k]]
            k = parent[k]
        return k

    close = np.argwhere(np.triu(distances(np.stack([item.appearance for item in items])) < RELATED_DISTANCE, 1))
    same: dict[str, int] = {}
    pairs = [tuple(pair) for pair in close]
    for k, item in enumerate(items):
        labels = [item.shape_hash]
        if item.source != "sweethome3d":  # its names are plain words: two things called "Chair" need not be alike
            labels.append(f"{item.category} " + re.sub(r"[\W\d_]+", " ", item.name.lower()).strip())
        for label in labels:
            pairs.append((same.setdefault(label, k), k))
    for a, b in pairs:
        parent[root(a)] = root(b)
    return np.array([root(k) for k in range(len(items))])


def split_off_validation(items: list[PackedObject]) -> None:
    """Mark about `N_VALIDATION` objects, a tenth at most, as 'val'.

    They are whole groups of relatives, small ones, spread over the categories.
    """
    groups = defaultdict(list)
    for k, group in enumerate(relatives(items)):
        groups[group].append(k)
    small = [members for members in groups.values() if len(members) <= 3]
    rng = np.random.default_rng(11)
    rng.shuffle(small)
    n_wanted = min(N_VALIDATION[items[0].source], max(1, len(items) // 10))
    sizes = Counter(item.category for item in items)
    quota = {category: max(1, round(n_wanted * count / len(items))) for category, count in sizes.items()}
    taken: Counter = Counter()
    for members in small:
        category = items[members[0]].category
        if taken[category] < quota[category] and taken.total() < n_wanted:
            for k in members:
                items[k].split = "val"
            taken[category] += len(members)
