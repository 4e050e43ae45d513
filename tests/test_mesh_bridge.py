"""Parts that a picture needs are tied to the body; what the body hides is not."""

import math

import mcubes
import numpy as np
from scipy.ndimage import binary_dilation, label

from conrad_engine.cameras import orbit_camera
from conrad_engine.mesh.bridge import ANY_NEIGHBOR, MAX_GAP, SLACK_CELLS, _moved, _pixels, join_parts
from conrad_engine.mesh.clean import face_components

LOW, CELL, N = np.array([-1.0, -1, -1]), 2 / 47, 48
CAMERA = orbit_camera(0.0, 0.0, 4.0, math.radians(40), 200)


def join(values, hull, *rest, **named):
    return join_parts(values, hull, hull + SLACK_CELLS * CELL, *rest, **named)


def grid_points():
    axis = LOW[0] + CELL * np.arange(N)
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1)


def ball(center, radius):
    return radius - np.linalg.norm(grid_points() - center, axis=-1)


def n_parts(values) -> int:
    return label(values > 0, ANY_NEIGHBOR)[1]


def test_a_ball_above_the_body_is_tied_to_it():
    body, head = ball([0, 0, -0.3], 0.5), ball([0, 0, 0.45], 0.12)
    values = np.maximum(body, head)
    assert n_parts(values) == 2
    joined = join(values, np.full_like(values, 1.0), CELL, LOW, [CAMERA], MAX_GAP * N)
    assert n_parts(joined) == 1
    added = (joined > 0) & (values <= 0)
    x, y, z = grid_points()[added].T
    assert np.abs(x).max() < 0.12 and np.abs(y).max() < 0.12 and 0.1 < z.mean() < 0.4, "a thin rod across the gap"


def test_a_floater_hidden_behind_the_body_stays_apart():
    values = np.maximum(ball([0, -0.3, 0], 0.5), ball([0, 0.6, 0], 0.12))
    assert n_parts(join(values, np.full_like(values, 1.0), CELL, LOW, [CAMERA], MAX_GAP * N)) == 2


def test_rods_end_at_the_silhouette():
    values = np.maximum(ball([-0.5, 0, 0], 0.4), ball([0.5, 0, 0], 0.4))
    hull = np.where(np.abs(grid_points()[..., 0]) < 0.08, -1.0, 1.0)
    joined = join(values, hull, CELL, LOW, [CAMERA], MAX_GAP * N)
    assert n_parts(joined) == 2 and joined[hull < 0].max() < 0
    assert ((joined > 0) & (values <= 0)).any(), "there is a rod on either side"


def test_a_rod_goes_where_the_silhouette_is_narrower_than_a_cell():
    values = np.maximum(ball([-0.5, 0, 0], 0.4), ball([0.5, 0, 0], 0.4))
    hull = np.where(np.abs(grid_points()[..., 0]) < 0.08, -0.5 * CELL, 1.0)
    joined = join(np.minimum(values, hull), hull, CELL, LOW, [CAMERA], MAX_GAP * N)
    assert n_parts(joined) == 1
    assert joined[hull < 0].max() <= 0.5 * CELL, "no farther out than a cell"


def test_parts_that_touch_at_a_corner_are_tied_together():
    values = np.full((N, N, N), -CELL)
    values[8:20, 20:28, 8:20] = values[20:40, 20:28, 20:40] = CELL
    assert n_parts(values) == 1 and label(values > 0)[1] == 2, "one part by its cells, two by its surface"
    joined = join(values, np.full_like(values, 1.0), CELL, LOW, [CAMERA], MAX_GAP * N)
    vertices, faces = mcubes.marching_cubes(joined, 0.0)
    assert face_components(faces.astype(np.int32), len(vertices)).max() == 0


def test_dust_and_far_parts_are_left():
    values = np.maximum(ball([0, 0, -0.6], 0.3), ball([0, 0, 0.85], 0.1))
    values[4, 4, 40] = 0.01
    assert n_parts(join(values, np.full_like(values, 1.0), CELL, LOW, [CAMERA], MAX_GAP * N)) == 3


def test_one_part_is_returned_as_it_is():
    values = ball([0, 0, 0], 0.5)
    assert join(values, np.full_like(values, 1.0), CELL, LOW, [CAMERA], MAX_GAP * N) is values


def test_a_part_too_deep_for_a_rod_is_brought_beside_the_body_and_tied():
    """A crest that came out behind its helmet: from the camera it is where it was, from the side it is back."""
    crest = np.array([0.0, 0.1, 0.5])
    away = CAMERA.positions.numpy() + (crest - CAMERA.positions.numpy()) * 1.18
    body = ball([0, 0, -0.1], 0.5)
    values = np.maximum(body, ball(away, 0.15 * 1.18))
    rest = [np.full_like(values, 1.0), CELL, LOW, [CAMERA], 6.0]
    assert n_parts(values) == 2 and n_parts(join(values, *rest)) == 2, "depths that are known stay"
    joined = join(values, *rest, may_move=True)
    assert n_parts(joined) == 1
    x, y, z = grid_points()[(joined > 0) & (body <= 0)].T
    assert y.max() < 0.5 and y[z > 0.5].mean() < 0.3 < away[1] - 0.4
    before, after = (np.unique(_pixels(np.argwhere(v > 0), LOW, CELL, CAMERA), axis=0) for v in (values, joined))
    seen = [np.zeros((CAMERA.height, CAMERA.width), bool) for _ in range(2)]
    for picture, found in zip(seen, (before, after)):
        picture[tuple(found.T)] = True
    first, second = (binary_dilation(picture, iterations=3) for picture in seen)
    assert (first != second).mean() < 0.01


def test_a_part_that_touches_only_a_moved_one_follows_it():
    eye = CAMERA.positions.numpy()
    behind = [eye + (np.array([0.0, 0.1, height]) - eye) * 1.18 for height in (0.5, 0.8)]
    stem, plume = (ball(center, 0.13 * 1.18) for center in behind)
    values = np.maximum(ball([0, 0, -0.1], 0.5), np.maximum(stem, plume))
    rest = [np.full_like(values, 1.0), CELL, LOW, [CAMERA], 6.0]
    assert n_parts(values) == 3
    joined = join(values, *rest, may_move=True)
    assert n_parts(joined) == 1 and grid_points()[joined > 0][:, 1].max() < 0.55


def test_what_the_picture_shows_apart_keeps_its_depth():
    """A dog before its master: nothing says that they stand at one depth."""
    values = np.maximum(ball([-0.4, 0.3, 0], 0.35), ball([0.5, -0.6, 0], 0.2))
    rest = [np.full_like(values, 1.0), CELL, LOW, [CAMERA], 6.0]
    assert np.array_equal(join(values, *rest, may_move=True), np.minimum(values, 1.0))


def test_a_part_that_would_leave_the_grid_stays():
    values = np.maximum(ball([0, -0.7, 0], 0.25), ball([0.62, 0.7, 0.62], 0.2))
    near = orbit_camera(0.0, 0.0, 1.4, math.radians(100), 200)
    rest = [np.full_like(values, 1.0), CELL, LOW, [near], 6.0]
    cells = np.argwhere(values > 0)
    part = cells[cells[:, 1] > N / 2]
    assert _moved(values, values > 2, part, 3.0, LOW, CELL, near)[0] is values
    assert join(values, *rest, may_move=True).shape == values.shape
