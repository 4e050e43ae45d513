"""Muon: momentum, made orthogonal matrix by matrix (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

Every direction of a layer's update gets the same length, so rare ones are learned as fast as common ones. Updates are scaled to
the root mean square that Adam's have, 0.2 (Liu et al., arXiv:2502.16982, section 2.2), so that both share a learning rate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

MOMENTUM = 0.95
COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Of the quintic Newton-Schulz iteration (the post above): singular values of (0, 1] come near 1 in five steps."""
UPDATE_RMS = 0.2


def orthogonalized(matrices: Float[Tensor, "n rows columns"], n_steps: int = 5) -> Float[Tensor, "n rows columns"]:
    """About U V^T of each matrix U S V^T, in bfloat16 on a GPU."""
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x.bfloat16() if x.is_cuda else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(n_steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices)


def is_for_muon(name: str, parameter: Tensor) -> bool:
    """Matrices and kernels between hidden layers; what touches pictures, conditions or single channels is Adam's."""
    is_inner = not name.startswith(("enter", "leave", "embed.0"))
    return is_inner and parameter.ndim >= 2 and min(parameter.flatten(1).shape) >= 32


class Muon(torch.optim.Optimizer):
    """Takes matrices, and kernels as matrices of (out, in * height * width); three stacked square ones (queries, keys, values)
    count as three. A rate in a tensor may change where the step is captured in a CUDA graph."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float | Tensor, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for settings in self.param_groups:
            alike: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for p in settings["params"]:
                alike[_as_matrices(p).shape].append(p)
            for parameters in alike.values():
                gradients = torch.stack([_as_matrices(p.grad) for p in parameters])
                state = self.state[parameters[0]]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(gradients)
                momentum = state["momentum"].lerp_(gradients, 1 - MOMENTUM)
                ahead = gradients.lerp_(momentum, MOMENTUM)  # Nesterov's
                scale = UPDATE_RMS * max(ahead.shape[-2:]) ** 0.5
                updates = orthogonalized(ahead.flatten(0, 1)).view_as(ahead) * (-settings["lr"] * scale)
                torch._foreach_mul_(parameters, 1 - settings["lr"] * settings["weight_decay"])
                torch._foreach_add_(parameters, [u.reshape(p.shape) for u, p in zip(updates, parameters)])


def _as_matrices(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    is_stacked = flat.shape[0] == 3 * flat.shape[1]
    return flat.view(3, -1, flat.shape[1]) if is_stacked else flat[None]
