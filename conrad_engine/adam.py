"""Adam in one fused call that needs no host: rates and step counts are tensors, and the device itself leaves a step out.

`torch.optim.Adam` computes the same, but making one imports torch's compiler: two seconds of every job's start, seven from a
cold disk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Adam:
    """Adam (arXiv:1412.6980, Algorithm 1). Its state has the form of `torch.optim.Adam`'s."""

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        """
        Args:
            groups: `params` and their learning rate `lr`, which becomes `initial_lr` and, on CUDA, a tensor, so that a
                captured step follows when it changes.
        """
        self.betas, self.eps = betas, eps
        self.param_groups = [group | {"params": list(group["params"]), "initial_lr": group["lr"]} for group in groups]
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
                }
            if group["params"][0].is_cuda:
                group["lr"] = torch.tensor(group["lr"], device=group["params"][0].device)

    def zero_grad(self) -> None:
        for parameter in self.state:
            parameter.grad = None

    @torch.no_grad()
    def step(self, is_bad: Tensor | None = None) -> None:
        """Update all parameters that have a gradient.

        Args:
            is_bad: A truth value on their device: nothing changes if it is true.
        """
        found_inf = None if is_bad is None else is_bad.float()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            states = [self.state[parameter] for parameter in parameters]
            steps, *moments = ([state[name] for state in states] for name in ("step", "exp_avg", "exp_avg_sq"))
            torch._foreach_add_(steps, 1)
            torch._fused_adam_(
                parameters,
                [parameter.grad for parameter in parameters],
                *moments,
                [],
                steps,
                lr=group["lr"],
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=0.0,
                eps=self.eps,
                amsgrad=False,
                maximize=False,
                found_inf=found_inf,
            )
            if found_inf is not None:
                torch._foreach_sub_(steps, [found_inf] * len(steps))

    def state_dict(self) -> dict[str, Any]:
        """Moments and step counts by the parameter's number."""
        return {"state": dict(enumerate(self.state.values()))}

    def load_state_dict(self, data: dict[str, Any]) -> None:
        """Take over moments and step counts, also from another kind of device or `torch.optim.Adam`; rates stay."""
        for index, own in enumerate(self.state.values()):
            for name, value in own.items():
                # A parameter that has never had a gradient has no state in torch's form.
                saved = data["state"].get(index)
                value.zero_() if saved is None else value.copy_(torch.as_tensor(saved[name]))
