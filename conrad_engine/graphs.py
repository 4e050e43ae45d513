"""CUDA graphs: a step of many small kernels launched as one.

A step of score distillation is hundreds of launches of a few microseconds each; uncaptured, the processor that launches
them is the limit (measured: 37 ms a step against 17 ms for the same kernels replayed).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

WARM_UP_CALLS = 3
"""Calls on a side stream before the capture: libraries choose their kernels and allocate their workspaces there."""


class GraphedStep:
    """Calls a function; on CUDA its kernels are captured after a few calls and replayed from then on.

    Every call does one real step: the first ones run as they are (they are the warm-up), then one call captures and
    replays. Anything else, a CPU or a function that cannot be captured, is called as it is; that is logged once.

    What the function must keep to, so that a replay does the same as a call:
    - Tensors of fixed shapes; state lives in tensors that are changed in place; gradients are set to None at its start.
    - No result is read on the host (`item`, `if tensor`), and no tensor is made from host numbers.
    - Random numbers from CUDA generators only: the default one, or those named in `generators`. Each replay draws anew.
    - Optimisers with `capturable=True`. Plain Python numbers are frozen as they were at the capture: after changing one,
      call `reset`.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        device: torch.device,
        generators: Sequence[torch.Generator] = (),
        enabled: bool = True,
    ) -> None:
        """
        Args:
            step: Takes tensors, returns tensors, in any nesting of tuples, lists, dicts and dataclasses; or None.
            device: Where it runs.
            generators: CUDA generators that the step draws from, besides the default one.
            enabled: False calls the step as it is.
        """
        self._step, self._generators = step, tuple(generators)
        self._wants_capture = enabled and device.type == "cuda"
        if self._wants_capture and any(generator.device.type != "cuda" for generator in self._generators):
            raise ValueError("a captured step cannot draw from a CPU generator: its numbers would repeat")
        self.reset()

    def reset(self) -> None:
        """Forget the capture, so that the next calls warm up and capture anew."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._outputs: Any = None
        self._n_calls = 0

    @property
    def is_captured(self) -> bool:
        return self._graph is not None

    def __call__(self, *inputs: Tensor) -> Any:
        """One step.

        Args:
            inputs: Copied to the captured step's own tensors, so shapes and types must stay the same.

        Returns:
            What the step returns. Once captured, these are the same tensors every time: the next call overwrites them.
        """
        if not self._wants_capture:
            return self._step(*inputs)
        if self._graph is None and self._n_calls < WARM_UP_CALLS:
            self._n_calls += 1
            return self._on_side_stream(inputs)
        if self._graph is None and not self._try_capture(inputs):
            return self._step(*inputs)
        assert self._graph is not None, "captured just now"
        for held, given in zip(self._inputs, inputs, strict=True):
            held.copy_(given)
        self._graph.replay()
        return self._outputs

    def _on_side_stream(self, inputs: tuple[Tensor, ...]) -> Any:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            outputs = self._step(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        # What was allocated on the side stream may be used, and freed, on the current one from now on.
        torch.cuda.synchronize()
        return outputs

    def _try_capture(self, inputs: tuple[Tensor, ...]) -> bool:
        """Capture without running; False, once and for all, if the step cannot be captured.

        Raises:
            torch.OutOfMemoryError: As from the step itself; the caller decides on a smaller one.
        """
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        held = tuple(given.clone() for given in inputs)
        torch.cuda.synchronize()
        try:
            # Other threads (previews, the server's heartbeat) may use the device meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._outputs = self._step(*held)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            logger.warning(
                "the step cannot be captured in a CUDA graph, so it runs slower: %s", str(error).split("\n")[0]
            )
            self._wants_capture = False
            self._outputs = None
            return False
        self._graph, self._inputs = graph, held
        return True
