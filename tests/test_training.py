"""Training the embedded prior: batches, augmentation, the loop and the scores."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from conrad_engine.guidance.embedded.unet import Group, ViewPrior, enlarged
from conrad_engine.guidance.embedded.weights import load, to_bytes
from conrad_engine.training import augment, batches, descent, evaluate_prior, muon, raster, train, views

from .training_meshes import FOV_RAD, UNLIT, box, write_tiny_pool

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="the rasterizer needs a C compiler")


@pytest.fixture(scope="module")
def pool_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    write_tiny_pool(folder)
    return folder


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
    assert batch.reference.is_size_known.all()


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
    for value, chance in ((known, 0.85), (present, 0.9), (size_known, 0.8)):
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


def test_new_rounds_replace_the_oldest(tmp_path):
    marked = marked_round(2)
    np.save(tmp_path / "sources.npy", np.zeros(2, np.int64))

    def write(index: int) -> None:
        cameras = marked.cameras.clone()
        cameras[..., 3] = index
        for name, values in (("views", marked.views), ("cameras", cameras), ("sizes", marked.sizes)):
            np.save(tmp_path / f"{name}_{index}.npy", values.numpy())
        (tmp_path / f"done_{index}").touch()

    def held() -> list[float]:
        return [float(r.cameras[0, 0, 0, 3]) for r in store.rounds]

    write(0)
    store = batches.ViewStore.follow(tmp_path, torch.device("cpu"), most=2)
    for index, expected in ((1, [0, 1]), (2, [2, 1]), (3, [2, 3])):
        write(index)
        deadline = time.monotonic() + 20
        while held() != expected and time.monotonic() < deadline:
            time.sleep(0.05)
        assert held() == expected


def test_times_fit_the_layout():
    torch.manual_seed(0)
    for unit in (1, 3):
        layout = train.training_layout(unit)
        t = train.draw_times(layout, torch.device("cpu"))
        assert len(t) == train.count_targets(layout) == 31 * unit
        assert t.min() >= 0 and t.max() <= 1
        rings, few = t[: 24 * unit].view(2 * unit, 12), t[24 * unit :]
        assert (rings == rings[:, :1]).all() and few.max() <= train.MOST_DISTILLED
        fours = few[: 4 * unit].view(unit, 4)
        assert (fours == fours[:, :1]).all()


def test_the_loss_weight_is_clipped_signal_to_noise():
    t = torch.linspace(0.01, 0.99, 50)
    alpha, sigma = (math.pi / 2 * t).cos(), (math.pi / 2 * t).sin()
    in_clean_picture = train.loss_weights(t) / sigma**2  # v - v' = (x' - x) / sigma
    assert torch.allclose(in_clean_picture, (alpha**2 / sigma**2 + 1).clamp(max=5), rtol=1e-4)


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    rates = [train.learning_rate(step, part, 3e-4, 0.4) for step, part in ((0, 0.0), (100, 0.1), (9000, 0.3))]
    assert rates[0] < rates[1] < rates[2] == 3e-4
    assert train.learning_rate(9000, 0.7, 3e-4, 0.4) == pytest.approx(1.5e-4)
    assert train.learning_rate(10_000, 1.0, 3e-4, 0.4) == 0


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
@pytest.mark.timeout(1200)  # 362 s on two slow cores
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
@pytest.mark.timeout(1200)
def test_two_processes_train_together(rendered, tmp_path, torchrun):
    torchrun("conrad_engine.training.train", train_arguments(rendered, tmp_path, 1.0))
    log = log_of(tmp_path)
    last = next(entry for entry in reversed(log) if "targets" in entry)
    assert last["targets"] == last["step"] * 31 * 2
    assert log[0]["gpus"] == 2 and log[-1] == {"event": "finished"}


def test_group_norm_along_rows_equals_the_usual_one():
    torch.manual_seed(0)
    usual = torch.nn.GroupNorm(32, 64)
    torch.nn.init.normal_(usual.weight)
    torch.nn.init.normal_(usual.bias)
    ours = descent.RowGroupNorm(32, 64)
    ours.load_state_dict(usual.state_dict())
    x = 3 + 2 * torch.randn(3, 64, 5, 7)
    grads = []
    for norm in (usual, ours):
        mine = x.clone().requires_grad_(True)
        y = norm(mine)
        y.square().sum().backward()
        grads.append((y.detach(), mine.grad, norm.weight.grad, norm.bias.grad))
    for theirs, own in zip(*grads):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_enlarging_equals_nearest_interpolation():
    x = torch.rand(2, 3, 4, 5)
    assert torch.equal(enlarged(x), torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))


def test_a_step_follows_the_gradient_and_leaves_bad_ones_out(tmp_path):
    arguments = [*train_arguments(tmp_path, tmp_path, 1.0), "--optimizer", "adamw"]
    trainer = train.Trainer(train.parse(arguments), train.Workers())
    before = [p.detach().clone() for p in trainer.parameters]
    trainer.gradients.fill_(torch.nan)
    trainer.update(0.0)
    assert int(trainer.n_bad) == 1
    assert all(torch.isfinite(p).all() for p in trainer.parameters)
    trainer.gradients.fill_(2.0)
    norm = trainer.update(1e-3)
    assert float(norm) == pytest.approx(2 * math.sqrt(len(trainer.gradients)), rel=1e-3)
    assert float(trainer.gradients.norm()) == pytest.approx(descent.MAX_NORM, rel=1e-3)
    moved = [(p.detach() - b) for p, b in zip(trainer.parameters, before)]
    assert all((m <= 0).all() for m, b in zip(moved, before) if (b == 0).all())  # without decay: straight downhill


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures CUDA graphs")
def test_captured_training_does_what_plain_training_does(tmp_path):
    device = torch.device("cuda")
    cpu = marked_round()
    store = batches.ViewStore(
        [batches.Round(*(getattr(cpu, n).to(device) for n in batches.Round.__annotations__))], device
    )

    def trained(is_captured: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        trainer = train.Trainer(train.parse(train_arguments(tmp_path, tmp_path, 1.0)), train.Workers())
        before = torch.cat([p.detach().flatten() for p in trainer.parameters])
        if not is_captured:
            trainer.graphed_backward.disable()
            trainer.graphed_step.disable()
        torch.manual_seed(1)
        losses, norms = zip(*((trainer.backward(store), trainer.update(1e-3 * step)) for step in range(9)))
        assert trainer.graphed_backward.is_captured == trainer.graphed_step.is_captured == is_captured
        after = torch.cat([p.detach().flatten() for p in trainer.parameters])
        return torch.stack(losses), torch.stack(norms), after - before

    captured, plain = trained(True), trained(False)
    for theirs, own in zip(plain[:2], captured[:2]):
        torch.testing.assert_close(own, theirs, rtol=0.02, atol=2e-4)
    # Where a gradient is nearly 0, rounding decides its sign, and Adam steps as far as elsewhere.
    assert float(torch.cosine_similarity(captured[2], plain[2], dim=0)) > 0.9


# Muon


def test_orthogonal_updates_keep_the_singular_directions():
    torch.manual_seed(0)
    for shape in ((2, 40, 64), (2, 96, 32)):
        x = torch.randn(shape)
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        done = muon.orthogonalized(x)
        assert torch.linalg.svdvals(done).aminmax().min > 0.5 and torch.linalg.svdvals(done).max() < 1.3
        inner = u.mT @ done @ v.mT  # diagonal, where the directions are kept
        off = inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))
        assert off.abs().max() < 1e-3


def test_muon_steps_as_far_as_adam_and_keeps_its_momentum(tmp_path):
    torch.manual_seed(0)
    kernel = torch.nn.Parameter(torch.zeros(32, 32, 3, 3))
    stacked = torch.nn.Parameter(torch.zeros(96, 32))
    optimizer = muon.Muon([kernel, stacked], lr=1e-2, weight_decay=0.0)

    def stepped(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        for p in (kernel, stacked):
            p.grad = torch.randn(p.shape, generator=generator)
        before = [p.detach().clone() for p in (kernel, stacked)]
        optimizer.step()
        return tuple(p.detach() - b for p, b in zip((kernel, stacked), before))

    for moved in stepped(1):
        assert float(moved.square().mean().sqrt()) == pytest.approx(muon.UPDATE_RMS * 1e-2, rel=0.2)
    # Queries, keys and values are three matrices: each one's update is orthogonal by itself.
    update = stepped(2)[1] / (muon.UPDATE_RMS * 1e-2 * 32**0.5)
    for part in update.view(3, 32, 32):
        assert torch.linalg.svdvals(part).max() < 1.3
    saved, weights = optimizer.state_dict(), [p.detach().clone() for p in (kernel, stacked)]
    torch.save(saved, tmp_path / "state.pt")
    expected = stepped(3)
    for p, w in zip((kernel, stacked), weights):
        p.data.copy_(w)
    optimizer = muon.Muon([kernel, stacked], lr=1e-2, weight_decay=0.0)
    optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for moved, theirs in zip(stepped(3), expected):
        torch.testing.assert_close(moved, theirs)


def test_muon_takes_the_inner_matrices_and_adam_the_rest(tmp_path):
    arguments = [*train_arguments(tmp_path, tmp_path, 1.0), "--optimizer", "muon"]
    trainer = train.Trainer(train.parse(arguments), train.Workers())
    adam, inner = ({id(p) for s in optimizer.param_groups for p in s["params"]} for optimizer in trainer.optimizers)
    names = dict(trainer.net.named_parameters())
    assert not adam & inner and len(adam) + len(inner) == len(names)
    assert id(names["enter.weight"]) in adam and id(names["down.0.norm1.weight"]) in adam
    assert id(names["down.0.conv1.weight"]) in inner and id(names["attention.0.qkv.weight"]) in inner


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
