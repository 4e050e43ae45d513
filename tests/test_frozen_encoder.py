"""The rewritten encoder computes what the library's does."""

from __future__ import annotations

import copy

import pytest
import torch

from conrad_engine.guidance.frozen_encoder import FrozenConv2d, PlainAttention, rewrite_encoder


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
    assert kinds.count(PlainAttention) == 1 and kinds.count(FrozenConv2d) > 8
    pictures, weight = torch.rand(2, 3, 48, 48) * 2 - 1, torch.randn(2, 4, 24, 24)
    expected, actual = (latents_and_gradient(vae, pictures, weight) for vae in (autoencoder, rewritten))
    for one, other in zip(actual, expected):
        assert float((one - other).norm() / other.norm()) < 1e-5


@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (3, 1), (3, 0), (5, 2)])
def test_convolution_of_any_padding(kernel: int, padding: int) -> None:
    conv = torch.nn.Conv2d(3, 5, kernel, padding=padding).double()
    frozen = FrozenConv2d(conv)
    x = torch.randn(1, 3, 7, 6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(frozen(x), conv(x))
    weight = torch.randn_like(conv(x))
    torch.testing.assert_close(*(torch.autograd.grad(layer(x), x, weight)[0] for layer in (frozen, conv)))
