"""The constraint: whatever the field's weights, the reference view is the picture."""

import math

import numpy as np
import pytest
import torch

from conrad_engine.cameras import orbit_camera
from conrad_engine.config import ConstraintConfig, FieldConfig, PictureConfig
from conrad_engine.constraint import ConstrainedField, ReferenceView, reference_view
from conrad_engine.fields.radiance_field import make_field
from conrad_engine.preprocess.framing import frame_object
from conrad_engine.rendering.renderer import render_picture
from conrad_engine.resampling import reduced_by_area

BOX = torch.tensor([[-1.0, -1, -1], [1, 1, 1]])


@pytest.fixture
def view(figure) -> ReferenceView:
    rgba = figure.astype(np.float32) / 255
    frame = frame_object(rgba[..., 3], None, PictureConfig(elevation_deg=10))
    return reference_view(rgba[..., :3], rgba[..., 3], frame.camera)


def random_field(seed: int, scale: float = 1.5, kind: str = "dense_volume"):
    torch.manual_seed(seed)
    field = make_field(
        FieldConfig(kind=kind, resolution=32, coarsest=8, n_levels=6, log2_table=12, max_resolution=64), BOX
    )
    for parameter in field.parameters():
        torch.nn.init.normal_(parameter, std=scale)
    field.set_progress(1.0)
    field.prepare()
    return field


def reference_error(constrained: ConstrainedField, view: ReferenceView, n_samples: int = 256):
    """Largest color error of opaque pixels inside the mask, over opacity, and the opacities."""
    picture = render_picture(constrained, view.camera, n_samples, early_stop=0)
    inside = (view.mask[0] > 0.99) & (picture.opacities > 0.02)
    wanted = view.rgb.permute(1, 2, 0)
    return (picture.rgb - wanted * picture.opacities[..., None]).abs().amax(-1)[inside], picture.opacities[inside]


@pytest.mark.parametrize("fraction", [0.3, 0.05, 0.01])
@pytest.mark.parametrize(
    ("kind", "seed"),
    [
        ("dense_volume", 0),
        ("dense_volume", 1),
        ("dense_volume", 2),
        pytest.param("hash_grid", 0, marks=pytest.mark.slow),
    ],
)
def test_any_weights_show_the_picture_up_to_the_bound(view, kind, fraction, seed):
    """METHOD: what lies behind the inferred surface weighs at most `fraction` of the ray's opacity, so the error of a
    channel is at most fraction * A * 1."""
    constrained = ConstrainedField(random_field(seed, kind=kind), [view], ConstraintConfig(delta=0.01, depth_size=512))
    constrained.fraction = fraction
    constrained.infer_surfaces(256)
    error, opacities = reference_error(constrained, view)
    # The surface lies inside a sample, so delta must reach that sample's middle: it is a little over half a sample here.
    assert len(error) > 500
    assert float((error - fraction * opacities).max()) < 2e-3


def test_without_the_constraint_the_same_field_does_not_show_the_picture(view):
    constrained = ConstrainedField(random_field(0), [view], ConstraintConfig(kind="loss"))
    constrained.infer_surfaces(128)
    assert reference_error(constrained, view)[0].mean() > 0.1


def test_the_back_is_not_printed_on(view):
    """Seen from behind, the field's own color is seen, not the picture."""
    field = random_field(0)
    for grid in field.grids:
        torch.nn.init.zeros_(grid)
    field.grids[-1].data[:, 1:] = 20.0  # white everywhere
    field.prepare()
    constrained = ConstrainedField(field, [view], ConstraintConfig())
    constrained.fraction = 0.05
    constrained.infer_surfaces(256)
    back = render_picture(constrained, orbit_camera(math.pi, 0.1, 3.0, 0.6, 48), 256)
    opaque = back.opacities > 0.9
    assert opaque.sum() > 100
    assert back.rgb[opaque].mean() > 0.95


def test_space_outside_the_mask_is_empty(view):
    constrained = ConstrainedField(random_field(3), [view], ConstraintConfig())
    constrained.infer_surfaces(128)
    picture = render_picture(constrained, view.camera, 128)
    grown = torch.nn.functional.max_pool2d(view.mask, 7, 1, 3)[0]
    assert (grown < 0.5).any()
    assert picture.opacities[grown < 0.5].max() == 0
    assert constrained.density(torch.tensor([[0.9, 0.0, 0.0], [0.0, 0.0, 0.95]])).max() == 0, "also beside the window"


def test_no_gradient_flows_through_the_surface(view):
    field = random_field(0)
    constrained = ConstrainedField(field, [view], ConstraintConfig())
    constrained.infer_surfaces(64)
    assert not constrained.views[0].surface.requires_grad
    _, color = constrained.density_and_color(torch.tensor([[0.0, -0.6, 0.0], [0.0, 0.6, 0.0]]))
    assert color[0].requires_grad is True
    gradient = torch.autograd.grad(color[0].sum(), field.grids[-1])[0]
    assert gradient.abs().max() == 0, "in front of the surface the color is the picture's alone"


def test_known_depth_is_a_wall_at_its_place(view):
    height, width = view.mask.shape[1:]
    distance = float(view.camera.positions.norm())
    known = torch.full((1, height, width), distance)
    view = ReferenceView(view.rgb, view.mask, view.camera, known)
    constrained = ConstrainedField(random_field(5), [view], ConstraintConfig(kind="known_depth"))
    constrained.infer_surfaces(64)
    picture = render_picture(constrained, view.camera, 512)
    inside = view.mask[0] > 0.99
    assert picture.opacities[inside].min() > 0.99
    assert (picture.depths[inside] - distance).abs().max() < 0.03
    assert ((picture.rgb - view.rgb.permute(1, 2, 0)).abs().amax(-1)[inside]).max() < 0.02


def test_two_views_are_each_exact_from_their_own_camera(view):
    """A blue back picture beside the front one, around an opaque ball."""
    field = random_field(0)
    for grid in field.grids:
        torch.nn.init.zeros_(grid)
    field.base.copy_((40 * (0.45 - field.centers().norm(dim=-1)))[None, None])
    field.prepare()
    cameras = [orbit_camera(a, 0.0, 3.0, math.radians(25), 64) for a in (0.0, math.pi)]
    disc = (cameras[0].pixel_centers() - 32).norm(dim=-1) < 20
    colors = [torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])]
    views = [
        ReferenceView(color[:, None, None].expand(3, 64, 64).contiguous(), disc[None].float(), camera)
        for camera, color in zip(cameras, colors)
    ]
    constrained = ConstrainedField(field, views, ConstraintConfig())
    constrained.fraction = 0.02
    constrained.infer_surfaces(256)
    for camera, color in zip(cameras, colors):
        picture = render_picture(constrained, camera, 256)
        inner = (camera.pixel_centers() - 32).norm(dim=-1) < 14
        assert (picture.rgb[inner] - color).abs().max() < 0.05


def test_soft_boundary_blends(view):
    hard = ConstrainedField(random_field(0), [view], ConstraintConfig())
    soft = ConstrainedField(hard.field, [view], ConstraintConfig(softness=0.05))
    for constrained in (hard, soft):
        constrained.infer_surfaces(128)
    surface = hard.views[0].surface[0, 0]
    row, column = (surface.isfinite() & (surface > 0)).nonzero()[200].tolist()
    camera = hard.views[0].depth_camera
    uv = torch.tensor([[column + 0.5, row + 0.5]])
    origin, direction = camera.rays(uv)
    line = origin + direction * (surface[row, column] + torch.linspace(-0.1, 0.15, 26)[:, None])
    jump = {name: c.density_and_color(line)[1].diff(dim=0).abs().max() for name, c in (("hard", hard), ("soft", soft))}
    assert jump["soft"] < jump["hard"] / 2


def test_resized_view_keeps_its_colors_at_the_rim(view):
    """Averaging never mixes in what lies outside the mask."""
    rgb = torch.where(view.mask > 0.5, view.rgb, torch.tensor(1.0))
    small = ReferenceView(rgb, view.mask, view.camera).resized(24)
    inside = small.mask[0] > 0.2
    exact = reduced_by_area(view.rgb * view.mask, *small.mask.shape[1:])
    assert (small.rgb - exact / small.mask.clamp(min=1e-3)).abs()[:, inside].max() < 0.02


def blurred_slowly(view: ReferenceView, sigma: float) -> np.ndarray:
    """Mean color of the mask's pixels around each pixel, weighted by a Gaussian of their distance."""
    rgb, mask = view.rgb.permute(1, 2, 0).double().numpy(), view.mask[0].double().numpy() + 1e-3
    height, width = mask.shape
    rows, columns = np.mgrid[:height, :width]
    found = np.empty_like(rgb)
    for row in range(height):
        for column in range(width):
            near = (abs(rows - row) <= round(4 * sigma)) & (abs(columns - column) <= round(4 * sigma))
            squared = ((rows - row) ** 2 + (columns - column) ** 2)[near]
            weights = mask[near] * np.exp(-squared / (2 * sigma**2))
            found[row, column] = (rgb[near] * weights[:, None]).sum(0) / weights.sum()
    return found


def test_softened_colors_are_means_inside_the_mask(view):
    small = view.resized(24)
    width = 0.08
    sigma = width * float(small.camera.intrinsics[0]) / float(small.camera.positions.norm())
    assert 0.8 < sigma < 3
    found = small.softened(width).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(found, blurred_slowly(small, sigma), atol=1e-5)


def test_only_steps_see_the_softened_picture(view):
    """What is shown, measured and textured is the picture as it is, also while the optimisation sees a softened one."""
    constrained = ConstrainedField(random_field(0), [view], ConstraintConfig(delta=0.01, depth_size=512))
    constrained.fraction = 0.05
    constrained.infer_surfaces(256)
    constrained.soften(0.05)
    assert reference_error(constrained, view)[0].max() > 0.2
    for shown in (constrained.sharp(), constrained.with_pictures([view])):
        error, opacities = reference_error(shown, view)
        assert float((error - 0.05 * opacities).max()) < 2e-3
    assert constrained.is_soft, "steps go on with the softened one"


def test_a_picture_loss_sees_the_picture_as_it_is(view):
    constrained = ConstrainedField(random_field(0), [view], ConstraintConfig(kind="loss"))
    constrained.soften(0.05)
    assert not constrained.is_soft
