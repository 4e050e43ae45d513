"""The rewritten encoder computes what the library's does."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from conrad_engine.guidance.frozen_encoder import FrozenConv2d, PlainAttention, PlainResidual, rewrite_encoder
from conrad_engine.guidance.fused_norms import FusedGroupNorm, TimedResidual, fuse_norms

from .triton_interpreter import runnable_kernels


@pytest.fixture
def autoencoder():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=32,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    return vae.eval().requires_grad_(False)


def latents_and_gradient(vae, pictures: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = pictures.clone().requires_grad_()
    latents = vae.encode(leaf).latent_dist.mode()
    (gradient,) = torch.autograd.grad(latents, leaf, weight)
    return latents, gradient


def test_same_latents_and_same_gradient(autoencoder) -> None:
    rewritten = copy.deepcopy(autoencoder)
    rewrite_encoder(rewritten)
    kinds = [type(module) for module in rewritten.encoder.modules()]
    assert kinds.count(PlainAttention) == 1 and kinds.count(FrozenConv2d) > 8 and kinds.count(PlainResidual) == 4
    pictures, weight = torch.rand(2, 3, 48, 48) * 2 - 1, torch.randn(2, 4, 24, 24)
    expected, actual = (latents_and_gradient(vae, pictures, weight) for vae in (autoencoder, rewritten))
    for one, other in zip(actual, expected):
        assert float((one - other).norm().detach() / other.norm().detach()) < 1e-5


@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (3, 1), (3, 0), (5, 2)])
def test_convolution_of_any_padding(kernel: int, padding: int) -> None:
    conv = torch.nn.Conv2d(3, 5, kernel, padding=padding).double()
    frozen = FrozenConv2d(conv)
    x = torch.randn(1, 3, 7, 6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(frozen(x), conv(x))
    weight = torch.randn_like(conv(x))
    torch.testing.assert_close(*(torch.autograd.grad(layer(x), x, weight)[0] for layer in (frozen, conv)))


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    with runnable_kernels("conrad_engine.guidance.group_norm_triton") as module:
        yield module


@pytest.mark.parametrize("n_shifts", [1, 2])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", [(2, 40, 5, 7), (2, 64, 24, 23)], ids=["ten channels a group", "several chunks"])
def test_group_norm_equals_the_library(
    kernels: ModuleType, shape: tuple[int, ...], silu: bool, n_shifts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "TILE", 1024)
    monkeypatch.setattr(kernels, "MAX_CHUNKS", 4)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * 2 + 1).to(device).contiguous(memory_format=torch.channels_last)
    weight, bias = (torch.randn(shape[1], generator=generator).to(device) for _ in range(2))
    shift = torch.randn(n_shifts, shape[1], generator=generator).to(device)
    gradient = torch.randn(shape, generator=generator).to(device)
    expected_x, actual_x = x.double().requires_grad_(), x.clone().requires_grad_()
    expected = F.group_norm(expected_x + shift.double()[..., None, None], 4, weight.double(), bias.double(), 1e-5)
    expected = F.silu(expected) if silu else expected
    expected.backward(gradient.double())
    actual = kernels.group_norm(actual_x, weight, bias, 4, 1e-5, silu, shift)
    actual.backward(gradient)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual_x.grad.double(), expected_x.grad, rtol=1e-4, atol=1e-5)


def fused_norms(network: torch.nn.Module) -> list[bool]:
    """Whether SiLU is part of each, by the order of modules."""
    return [module.silu for module in network.modules() if isinstance(module, FusedGroupNorm)]


def test_fused_norms_leave_the_encoder_as_it_was(autoencoder) -> None:
    changed = copy.deepcopy(autoencoder)
    rewrite_encoder(changed)
    fuse_norms(changed.encoder)
    norms = fused_norms(changed.encoder)
    # Two a residual block, of which there are four, one at the end; and the attention's own.
    assert norms.count(True) == 9 and norms.count(False) == 1
    assert not any(isinstance(module, torch.nn.GroupNorm) for module in changed.encoder.modules())
    pictures, weight = torch.rand(1, 3, 32, 32) * 2 - 1, torch.randn(1, 4, 16, 16)
    expected, actual = (latents_and_gradient(vae, pictures, weight) for vae in (autoencoder, changed))
    for one, other in zip(actual, expected):
        assert float((one - other).norm().detach() / other.norm().detach()) < 1e-5


def make_unet(**changes) -> torch.nn.Module:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    settings = {
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": 8,
    }
    return diffusers.UNet2DConditionModel(**settings | changes).eval().requires_grad_(False)


UNETS = {
    "as it comes": {},
    "linear projections": {"use_linear_projection": True},
    "activated once": {"resnet_skip_time_act": True},
    "scaled by the time": {"resnet_time_scale_shift": "scale_shift"},
    "divided": {"mid_block_scale_factor": 2.0},
}
each_unet = pytest.mark.parametrize("changes", UNETS.values(), ids=UNETS.keys())


@each_unet
def test_fused_norms_leave_the_unet_as_it_was(changes: dict) -> None:
    unet = make_unet(**changes)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([20, 700]), torch.randn(2, 3, 16)
    expected = unet(*inputs).sample
    fuse_norms(unet)
    assert True in fused_norms(unet) and False in fused_norms(unet)
    n_timed = sum(isinstance(module, TimedResidual) for module in unet.modules())
    assert n_timed == (0 if "resnet_time_scale_shift" in changes else 6 if "mid_block_scale_factor" in changes else 8)
    torch.testing.assert_close(unet(*inputs).sample, expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, torch.nn.GroupNorm) for module in unet.modules())


@each_unet
def test_norms_find_the_layout_that_their_kernel_reads(changes: dict) -> None:
    unet, n_found, n_others = make_unet(**changes).to(memory_format=torch.channels_last), 0, 0
    fuse_norms(unet)

    def look(module: torch.nn.Module, inputs: tuple) -> None:
        nonlocal n_found, n_others
        is_found = inputs[0].is_contiguous(memory_format=torch.channels_last)
        n_found, n_others = n_found + is_found, n_others + (not is_found)

    for module in unet.modules():
        if isinstance(module, FusedGroupNorm):
            module.register_forward_pre_hook(look)
    pictures = torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    unet(pictures, torch.tensor([20, 700]), torch.randn(2, 3, 16))
    assert n_others == 0 and n_found > 16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_unet
def test_the_unet_is_the_same_on_a_gpu(changes: dict) -> None:
    unet = make_unet(**changes).cuda()
    inputs = torch.randn(2, 4, 8, 8).cuda(), torch.tensor([20, 700]).cuda(), torch.randn(2, 3, 16).cuda()
    expected = unet(*inputs).sample
    unet = unet.half().to(memory_format=torch.channels_last)
    fuse_norms(unet)
    turned = inputs[0].half().contiguous(memory_format=torch.channels_last)
    actual = unet(turned, inputs[1], inputs[2].half()).sample
    assert float((actual.float() - expected).norm() / expected.norm()) < 2e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_all_rewrites_on_a_gpu(autoencoder) -> None:
    plain = autoencoder.cuda()
    changed = copy.deepcopy(plain)
    rewrite_encoder(changed)
    fuse_norms(changed.encoder)
    changed = changed.half().to(memory_format=torch.channels_last)
    pictures = torch.rand(1, 3, 64, 64, device="cuda") * 2 - 1
    weight = torch.randn(1, 4, 32, 32, device="cuda")
    _, expected = latents_and_gradient(plain, pictures, weight)
    turned = pictures.half().contiguous(memory_format=torch.channels_last)
    _, actual = latents_and_gradient(changed, turned, weight.half())
    assert float((actual.float() - expected).norm() / expected.norm()) < 2e-2
