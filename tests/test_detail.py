"""The detail model: network, sampling, what training does to views, the stage that repaints a texture, and its switch."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conrad_engine import finish
from conrad_engine.config import MeshConfig
from conrad_engine.errors import Cancelled, GuidanceError, InputError
from conrad_engine.evaluation import metrics
from conrad_engine.guidance.embedded import detail
from conrad_engine.guidance.embedded.unet import ViewPrior, alpha_sigma
from conrad_engine.guidance.embedded.weights import to_bytes as prior_bytes
from conrad_engine.guidance.interfaces import ReferencePicture
from conrad_engine.mesh.bake import Photo, bake_texture
from conrad_engine.mesh.canvas import Canvas
from conrad_engine.mesh.raster import rasterize, render_mesh
from conrad_engine.mesh.unwrap import unwrap
from conrad_engine.redraw import HUE_SHARE, PLAIN, redraw_texture, repainted, view_angles_deg, view_camera
from conrad_engine.training import degrade, train_detail, views

from .mesh_scenes import box_mesh, camera, sphere_mesh
from .training_meshes import write_tiny_pool

TINY = (32, 32, 32)
CAMERAS = torch.tensor([[0.7, 0.2, 2.0, 0.36], [2.5, 0.1, 2.2, 0.36]])
REFERENCE = torch.tensor([[0.0, 0.2, 2.1, 0.36]])


def tiny_net(seed: int = 0) -> detail.DetailNet:
    torch.manual_seed(seed)
    net = detail.DetailNet(TINY, n_embedding=128).requires_grad_(False).eval()
    for value in net.parameters():  # layers that start at zero answer nothing
        value += 0.05 * torch.randn_like(value)
    return net


def discs(n: int, size: int = 32) -> torch.Tensor:
    """Premultiplied discs with stripes, in [0, 1]."""
    v, u = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    alpha = (u.square() + v.square() < 0.6).float().expand(n, 1, size, size)
    phase = torch.arange(n)[:, None, None]
    rgb = torch.stack([0.5 + 0.4 * torch.sin(9 * u + phase), 0.5 + 0.4 * torch.cos(11 * v + phase), u + 0 * phase], 1)
    return torch.cat([rgb.clamp(0, 1) * alpha, alpha], 1)


def conditioned(size: int = 32) -> detail.ConditionedDetail:
    cast = torch.autocast("cpu", enabled=False)
    return detail.ConditionedDetail(tiny_net(), discs(1, size) * 2 - 1, REFERENCE, cast)


def half_final(size: int = 32) -> torch.Tensor:
    final = torch.zeros(2, 1, size, size)
    final[..., : size // 2] = 1
    return torch.cat([discs(2, size) * 2 - 1, final], 1)


# Network and sampling


def test_the_shipped_size_stays_below_ten_megabytes():
    assert len(detail.to_bytes(detail.DetailNet(), detail.WIDTHS)) < 10_000_000


@pytest.mark.parametrize("size", [32, 48])
def test_samples_keep_what_is_final_and_the_silhouette(size):
    view = half_final(size)
    drawn = conditioned(size).sample(view, CAMERAS, 2, torch.Generator().manual_seed(1))
    assert drawn.shape == (2, 4, size, size) and drawn.min() >= -1 and drawn.max() <= 1
    is_open = detail.open_pixels(view).expand(-1, 3, -1, -1) > 0
    assert torch.equal(drawn[:, :3][~is_open], view[:, :3][~is_open])
    assert torch.equal(drawn[:, 3], view[:, 3])
    assert (drawn[:, :3][is_open] != view[:, :3][is_open]).float().mean() > 0.9


def test_sampling_follows_the_exact_path_more_closely_than_a_first_order_one(monkeypatch):
    """Residuals of a normal distribution, whose denoiser is known, end at `width` times the noise they start from."""
    width, model = 0.5, conditioned()

    class Denoiser:
        def __call__(self, noisy, t, views, cameras):
            a, s = alpha_sigma(t)
            clean = a * width**2 * noisy / (a * a * width**2 + s * s)
            return (a * noisy - clean) / s  # v = a ε - s x where the noisy one is a x + s ε

        def reset(self):
            """Nothing is captured."""

    model._graphed = Denoiser()
    gray = torch.cat([torch.zeros(2, 3, 32, 32), torch.ones(2, 1, 32, 32), torch.zeros(2, 1, 32, 32)], 1)
    exact = width * torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    errors = []
    for n_steps, is_first_order in ((8, False), (8, True), (12, True)):
        with monkeypatch.context() as patch:
            if is_first_order:
                patch.setattr(detail, "extrapolation", lambda step, n: 0.0)
            drawn = model.sample(gray, CAMERAS, n_steps, torch.Generator().manual_seed(1))
        errors.append(float((drawn[:, :3] / detail.RESIDUAL_SCALE - exact).norm() / exact.norm()))
    assert errors[0] < 0.5 * errors[1] and errors[0] < errors[2] < errors[1], errors


def test_sampling_is_repeatable_and_knows_noise_camera_and_reference():
    view = half_final()
    draw = lambda cameras, seed: conditioned().sample(  # noqa: E731
        view, cameras, 2, torch.Generator().manual_seed(seed)
    )
    first = draw(CAMERAS, 1)
    assert torch.equal(first, draw(CAMERAS, 1))
    assert not torch.equal(first, draw(CAMERAS, 2)) and not torch.equal(first, draw(CAMERAS.flip(0), 1))
    other = conditioned()
    other.tokens = [(key + 1, value + 1) for key, value in other.tokens]
    assert not torch.equal(first, other.sample(view, CAMERAS, 2, torch.Generator().manual_seed(1)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_sampling_draws_the_same():
    device = torch.device("cuda")
    net, cast = tiny_net().to(device), torch.autocast("cuda", enabled=False)
    model = lambda: detail.ConditionedDetail(net, discs(1).to(device) * 2 - 1, REFERENCE.to(device), cast)  # noqa: E731
    captured, plain = model(), model()
    plain._graphed.disable()
    for size, seed in ((32, 0), (32, 1), (48, 2)):
        view, cameras = half_final(size).to(device), CAMERAS.to(device)
        one, other = (m.sample(view, cameras, 4, torch.Generator().manual_seed(seed)).cpu() for m in (captured, plain))
        assert torch.allclose(one, other, atol=1e-3), (size, seed)
    assert captured._graphed.is_captured


def test_a_dropped_reference_tells_nothing():
    net, absent = tiny_net(), torch.zeros(1)
    for pictures in (discs(2)[:1], discs(2)[1:]):
        tokens = net.encode(pictures * 2 - 1, REFERENCE, absent)
        assert torch.equal(tokens[0][0], net.encode(discs(2)[:1] * 2 - 1, REFERENCE, absent)[0][0])


def test_weights_come_back_from_their_file_or_say_what_is_wrong(tmp_path):
    net, path = tiny_net(), tmp_path / "detail.safetensors"
    with pytest.raises(GuidanceError, match="missing"):
        detail.load(path)
    path.write_bytes(detail.to_bytes(net, TINY, {"steps": "3"}))
    read = detail.load(path)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(net.parameters(), read.parameters()))
    path.write_bytes(prior_bytes(ViewPrior(TINY), TINY))
    with pytest.raises(GuidanceError, match="conrad-detail"):
        detail.load(path)


# What training does to views


def test_blurring_keeps_plain_colors_up_to_the_rim():
    alpha = discs(3)[:, 3:]
    plain = torch.cat([torch.tensor([0.8, 0.4, 0.2])[None, :, None, None] * alpha, alpha], 1)
    colors = degrade.spread_colors(plain, torch.tensor([[0.3, 0.3], [2, 1], [5, 5]]))
    inside = (alpha > 0).expand(-1, 3, -1, -1)
    assert torch.allclose(colors[inside], (plain[:, :3])[inside], atol=0.02)


def test_blur_of_a_line_is_the_gaussian_one():
    picture = torch.zeros(1, 1, 65, 65)
    picture[..., 32, 32] = 1
    blurred = degrade.widely_blurred(picture, torch.tensor([[2.0, 4.0]]))[0, 0]
    offsets = torch.arange(65) - 32.0
    for profile, sigma in ((blurred[:, 32], 2.0), (blurred[32], 4.0)):
        assert float((profile * offsets.square()).sum() / profile.sum()) == pytest.approx(sigma**2, rel=0.02)


def test_degraded_views_lose_detail_and_keep_their_silhouette():
    torch.manual_seed(0)
    pictures = discs(8, 64)
    rough = degrade.textured(pictures, pictures[:, 3:], (8.0, 12.0))
    assert torch.equal(rough[:, 3], pictures[:, 3]) and (rough[:, :3] <= rough[:, 3:]).all() and rough.min() >= 0
    energy = train_detail.gradient_energies
    assert energy(rough).sum() < 0.5 * energy(pictures).sum()


def test_what_faces_the_reference_is_final_more_often():
    torch.manual_seed(0)
    azimuths = torch.tensor([0.3, 1.6, 3.1]).repeat_interleave(200)
    cameras = torch.stack([azimuths, *torch.zeros(3, 600)], 1)
    finals = degrade.random_finals(cameras, 32)
    assert set(finals.unique().tolist()) == {0.0, 1.0}
    near, side, far = finals.view(3, 200, 32, 32).mean((1, 2, 3)).tolist()
    assert near > side > far
    left, right = finals[200:400, 0, :, :8].mean(), finals[200:400, 0, :, -8:].mean()
    assert left > right  # seen from the right of the reference
    assert 0.2 < float((finals.amax((1, 2, 3)) == 0).float().mean()) < 0.6


def test_gradient_energy_is_the_evaluation_s():
    pictures = discs(4, 64)
    pictures[1, :, :20] = 0
    for picture, energy in zip(pictures, train_detail.gradient_energies(pictures)):
        straight = torch.cat([picture[:3] / picture[3:].clamp(min=1e-3), picture[3:]]).permute(1, 2, 0).numpy()
        assert float(energy) == pytest.approx(metrics.gradient_energy(straight), rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="the rasterizer needs a C compiler")
def test_training_writes_weights_a_log_and_a_sheet_and_goes_on_from_weights(tmp_path, torchrun):
    write_tiny_pool(tmp_path)
    for split in ("train", "val"):
        arguments = ["--pool", tmp_path, "--out", tmp_path / split, "--split", split, "--processes", 1]
        arguments += ["--size", 32, "--groups", 2, "--views", 4, "--tight"]
        views.main([str(x) for x in arguments])
    assert np.load(tmp_path / "train" / "views_0.npy").shape[1:] == (2, 4, 32, 32, 4)
    prior = tmp_path / "prior.safetensors"
    prior.write_bytes(prior_bytes(ViewPrior(TINY), TINY))
    arguments = ["--data", tmp_path / "train", "--val", tmp_path / "val", "--export", tmp_path / "out", "--plan", 0.5]
    arguments += ["--prior", prior, "--compile", "none", "--references", 2, "--targets", 3, "--size", 32]
    arguments += ["--steps", 2, "--smoke", "--widths", *TINY]
    train_detail.main([str(x) for x in arguments])
    weights = tmp_path / "out" / "detail.safetensors"
    first = detail.load(weights)
    torchrun("conrad_engine.training.train_detail", [*arguments, "--init", weights])
    moved = [(a - b).abs().max() for a, b in zip(first.parameters(), detail.load(weights).parameters())]
    assert 0 < float(max(moved)) < 0.1
    log = [json.loads(line) for line in (tmp_path / "out" / "train_detail.jsonl").read_text().splitlines()]
    assert log[-1] == {"event": "finished"}
    assert [row["gpus"] for row in log if row.get("event") == "compiled"] == [1, 2]
    last = [row for row in log if "step" in row][-1]
    assert log[-2]["targets"] == last["step"] * 2 * 3 * 2 and log[-2]["bad"] == 0
    (val,) = [row["val"] for row in log if "val" in row and "step" in row][-1:]
    for name in ("blurred", "prior"):
        assert val[name].keys() == {"v", "given", "drawn", "residual_std"}
        assert math.isfinite(val[name]["drawn"]["psnr"]) and val[name]["given"]["energy"] > 0
    assert (tmp_path / "out" / "detail_samples.png").stat().st_size > 500


def test_tight_views_just_hold_the_object():
    rng = np.random.default_rng(0)
    vertices = rng.uniform(-0.5, 0.5, (200, 3)) * [1.2, 0.4, 0.9]
    framing = views.Framing(math.radians(40), 0.2, 0.5, 0.8, True)
    rows = views.random_cameras(rng, vertices, framing, views.Shape(n_views=6, is_tight=True))
    assert rows.shape == (6, 4)
    for azimuth, elevation, distance, tan_half in rows[1:].tolist():
        points = vertices @ views.orbit_camera(framing.azimuth_rad + azimuth, elevation, 0.0)[:, :3]
        reach = np.abs(points[:, :2] / (distance - points[:, 2:]) / tan_half).max()
        is_widest = distance == pytest.approx(0.6 / tan_half, rel=1e-5)
        assert reach < 0.96 and (reach > 0.79 or is_widest)


# The stage


class Painter:
    """A stand-in for the model that draws stripes of one color and black, two pixels wide."""

    def __init__(self) -> None:
        self.cameras, self.seen = [], []

    def set_reference(self, reference: ReferencePicture) -> None:
        self.reference = reference

    def redraw(self, rgba, final, view, n_steps, generator, temperature):
        self.cameras.append(view)
        self.seen.append(torch.cat([rgba, final]))
        noise = torch.rand(3, 1, 1, generator=generator)
        stripes = (torch.arange(rgba.shape[-1]) // 2 % 2).float()
        return torch.cat([torch.where(final > 0, rgba[:3], noise * stripes * rgba[3:]), rgba[3:]])


CONFIG = MeshConfig(texture_size=256, detail_views=4, detail_steps=1)


def textured(make=sphere_mesh):
    """A mesh with a striped photo in front and gray elsewhere, and the photo."""
    mesh, view = make(), camera(0.0, 10.0, 256)
    rgb = discs(1, 256)[0, :3].permute(1, 2, 0).numpy()
    photo = Photo(view, rgb, (rasterize(mesh.vertices, mesh.faces, view).faces >= 0).astype(np.float32))
    gray = lambda positions: torch.full((len(positions), 3), 0.5)  # noqa: E731
    return bake_texture(unwrap(mesh, CONFIG), gray, [photo], CONFIG), photo


def reference_of(photo: Photo) -> ReferencePicture:
    return ReferencePicture(discs(1, 256)[0], photo.camera)


def redrawn(mesh, photo, model, config=CONFIG, seed=0, on_view=lambda index: None):
    return redraw_texture(mesh, [photo], reference_of(photo), config, model, seed, on_view)


@pytest.mark.parametrize("n_views", [1, 4, 7, 10, 14])
def test_views_go_outward_from_the_picture(n_views):
    angles = view_angles_deg(n_views)
    assert len(angles) == len(set(angles)) == n_views
    for elevation in {elevation for _, elevation in angles}:
        reach = [round(abs(azimuth), 6) for azimuth, e in angles if e == elevation]
        assert reach == sorted(reach) and min(reach) > 15
    assert view_angles_deg(0) == []


def test_frames_hold_the_mesh():
    vertices = box_mesh().vertices
    for azimuth, elevation in ((0.3, 0.1), (2.0, 0.9)):
        view = view_camera(vertices, azimuth, elevation, 0.6)
        uv, z_depths = view.project(torch.from_numpy(vertices))
        reach = (uv / view.width * 2 - 1).abs().max()
        assert 0.5 < float(reach) < 0.91 and (z_depths > 0.2).all()


@pytest.mark.parametrize("make", [sphere_mesh, box_mesh], ids=["sphere", "box"])
def test_the_photo_stays_and_the_rest_is_painted(make):
    mesh, photo = textured(make)
    model = Painter()
    result = redrawn(mesh, photo, model)
    canvas = Canvas(mesh, [photo], CONFIG)
    before, after = (m.texture.reshape(-1, 3)[canvas.texels.pixels].astype(int) for m in (mesh, result))
    is_photo = canvas.final == 1
    assert is_photo.mean() > 0.1
    assert (before[is_photo] == after[is_photo]).all()
    is_back = canvas.final == 0
    assert (np.abs(before - after).max(1)[is_back] > 1).mean() > 0.6
    front = photo.camera.resized(128, 128)
    change = np.abs(render_mesh(mesh, front) - render_mesh(result, front)).max(-1)
    assert np.quantile(change, 0.98) < 0.01
    # Stripes are painted, but what they make from afar is the gray that was there.
    assert np.abs(after[is_back].mean(0) - before[is_back].mean(0)).max() < 12
    for view, seen in zip(model.cameras, model.seen):
        assert seen.shape == (5, view.height, view.width) and 0 < float(seen[3].mean()) < 1
    assert float(model.seen[-1][4].sum()) > 0


def test_drawn_lightness_is_painted_and_little_of_a_drawn_hue():
    """A cream surface with checks: of darker ones all is kept, of green ones as light as the cream nearly nothing."""
    cream = np.array([0.8, 0.7, 0.5], np.float32)
    luma = np.array([0.299, 0.587, 0.114], np.float32)
    green = np.array([0.5, 0.8, 0.5], np.float32)
    green *= (cream @ luma) / (green @ luma)
    checks = (np.indices((64, 64)).sum(0) % 2)[..., None].astype(np.float32)
    before = np.concatenate([cream * (0.8 + 0.4 * checks), np.ones((64, 64, 1))], -1).astype(np.float32)
    plain = np.concatenate([np.broadcast_to(cream, (64, 64, 3)), np.ones((64, 64, 1))], -1).astype(np.float32)
    middle = np.s_[20:44, 20:44]

    def painted(base, other):
        drawn = base.copy()
        drawn[..., :3] += checks * (other - cream)
        return repainted(drawn, base)[middle]

    # The mean stays, so checks are as far from it on both sides.
    dark = painted(before, 0.7 * cream)
    assert np.ptp(dark @ luma) == pytest.approx(0.1 * (cream @ luma), rel=0.05)
    hue = painted(plain, green)
    assert np.allclose(np.ptp(hue, axis=(0, 1)), HUE_SHARE * np.abs(green - cream), atol=0.01)
    assert np.ptp(hue @ luma) < 0.01
    # What was there stays where nothing is drawn; black becomes gray, half as far as it is drawn, as it cannot get darker.
    np.testing.assert_allclose(painted(before, cream), before[middle][..., :3], atol=1e-5)
    black = before * [0, 0, 0, 1]
    gray = repainted((black + checks * [0.02, 0.02, 0.02, 0]).astype(np.float32), black.astype(np.float32))[middle]
    assert np.ptp(gray) == pytest.approx(0.01, rel=0.05) and np.ptp(gray, axis=2).max() < 1e-5


def test_a_plain_surface_gets_little_contrast_and_a_textured_one_at_most_as_much_again():
    checks = (np.indices((64, 64)).sum(0) % 2)[..., None] - 0.5
    middle = np.s_[20:44, 20:44]

    def painted(before: float, drawn: float) -> float:
        """Difference between light and dark checks."""
        pictures = (
            np.concatenate([0.5 + part * checks * np.ones(3), np.ones((64, 64, 1))], -1) for part in (drawn, before)
        )
        return float(np.ptp(repainted(*(picture.astype(np.float32) for picture in pictures))[middle]))

    assert painted(0.0, 0.4) == pytest.approx(2 * PLAIN, rel=0.02)
    assert painted(0.0, PLAIN) == pytest.approx(PLAIN, rel=0.02)
    assert painted(0.1, 0.6) == pytest.approx(0.2 + 2 * PLAIN, rel=0.02)
    assert painted(0.1, 0.18) == pytest.approx(0.18, rel=0.02)


def test_painted_texels_are_final():
    mesh, photo = textured()
    canvas, side = Canvas(mesh, [photo], CONFIG), camera(120.0, 10.0, 128)
    canvas.paint(side, np.zeros((128, 128, 3), np.float32))
    first, final = canvas.colors.copy(), canvas.final == 1
    canvas.paint(side, np.ones((128, 128, 3), np.float32))
    assert np.array_equal(first[final], canvas.colors[final]) and final.mean() > 0.3
    rgba, is_final = canvas.view(side)
    middle = np.s_[60:68, 60:68]
    assert rgba[middle][..., :3].max() < 0.02 and is_final[middle].all()
    assert not is_final[rgba[..., 3] == 0].any()


def test_the_stage_repeats_itself_by_its_seed():
    mesh, photo = textured()
    first, again, other = (redrawn(mesh, photo, Painter(), seed=seed).texture for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_the_real_model_redraws_a_sphere(tmp_path):
    path = tmp_path / "detail.safetensors"
    path.write_bytes(detail.to_bytes(tiny_net(), TINY))
    mesh, photo = textured()
    result = redrawn(mesh, photo, detail.DetailModel(torch.device("cpu"), path), replace(CONFIG, detail_views=2))
    assert not np.array_equal(result.texture, mesh.texture)


def test_the_stage_can_be_stopped_between_views():
    def stop(index):
        if index == 1:
            raise Cancelled("enough")

    mesh, photo = textured()
    model = Painter()
    with pytest.raises(Cancelled):
        redrawn(mesh, photo, model, on_view=stop)
    assert len(model.cameras) == 1


def test_the_switch():
    inferred, loss = (SimpleNamespace(config=SimpleNamespace(kind=kind)) for kind in ("inferred_depth", "loss"))
    assert finish.has_detail_stage(inferred, CONFIG)
    assert not finish.has_detail_stage(loss, CONFIG)
    assert not finish.has_detail_stage(inferred, replace(CONFIG, project_only=True))
    assert not finish.has_detail_stage(inferred, replace(CONFIG, detail_views=0))


@pytest.mark.parametrize("wrong", [{"detail_views": -1}, {"detail_steps": 0}, {"detail_temperature": 1.5}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(InputError):
        MeshConfig(**wrong)
