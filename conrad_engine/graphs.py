"""CUDA graphs: a step of many small kernels launched as one.

A step of score distillation is hundreds of launches of a few microseconds each; uncaptured, the processor that launches
them is the limit (measured: 37 ms a step against 17 ms for the same kernels replayed).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

WARM_UP_CALLS = 3
"""Calls on a side stream before the capture: libraries choose their kernels and allocate their workspaces there."""
Tensors = tuple[Any, ...]
"""Tensors, and further tuples of them."""
_within = threading.local()
"""Has `outer` while this thread warms up or captures a step: steps inside it are part of it."""


def flat(nested: Tensors) -> list[Tensor]:
    """The tensors of nested tuples in order."""
    return [tensor for item in nested for tensor in ([item] if isinstance(item, Tensor) else flat(item))]


def cloned(nested: Tensors) -> Tensors:
    """The same tuples (a named tuple becomes a plain one) with copies of the tensors."""
    return tuple(item.clone() if isinstance(item, Tensor) else cloned(item) for item in nested)


class GraphedStep:
    """Calls a function; on CUDA its kernels are captured after a few calls and replayed from then on.

    Every call does one real step: the first ones run as they are (they are the warm-up), then one call captures and
    replays. Anything else, a CPU or a function that cannot be captured, is called as it is; that is logged once. A step inside
    another one becomes part of the other one's capture.

    What the function must keep to, so that a replay does the same as a call:
    - Tensors of fixed shapes; state lives in tensors that are changed in place; gradients are set to None at its start.
    - No result is read on the host (`item`, `if tensor`), and no tensor is made from host numbers.
    - Nothing that is kept between calls holds an autograd graph of parameters (results are detached): the node that adds up
      a parameter's gradient runs on the stream it was made on, and it lives as long as a graph that leads to it.
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
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        """
        Args:
            step: Takes tensors, returns tensors, in any nesting of tuples, lists, dicts and dataclasses; or None.
            device: Where it runs.
            generators: CUDA generators that the step draws from, besides the default one.
            enabled: False calls the step as it is.
            stream: The current stream of every call, not the default one: warm-up and capture happen on it. For steps in which
                an autograd graph outlives a call.
        """
        self._step, self._generators, self._graph, self._stream = step, tuple(generators), None, stream
        self._wants_capture = enabled and device.type == "cuda"
        if self._wants_capture and any(generator.device.type != "cuda" for generator in self._generators):
            raise ValueError("a captured step cannot draw from a CPU generator: its numbers would repeat")
        self.reset()

    def reset(self) -> None:
        """Forget the capture, so that the next calls warm up and capture anew."""
        if self._graph is not None:
            # It may still be at work in the memory that is given back with it.
            torch.cuda.synchronize()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: Tensors = ()
        self._outputs: Any = None
        self._n_calls = 0

    def disable(self) -> None:
        """Call the step as it is from now on."""
        self._wants_capture = False
        self.reset()

    @property
    def is_captured(self) -> bool:
        return self._graph is not None

    @property
    def is_enabled(self) -> bool:
        """Whether the step is captured, or will be as far as is known."""
        return self._wants_capture

    def __call__(self, *inputs: Tensor | Tensors) -> Any:
        """One step.

        Args:
            inputs: Tensors or nested tuples of them, copied to the captured step's own: shapes and types must stay the same.

        Returns:
            What the step returns. Once captured, these are the same tensors every time: the next call overwrites them.
        """
        if not self._wants_capture or hasattr(_within, "outer"):
            return self._step(*inputs)
        if self._graph is None and self._n_calls < WARM_UP_CALLS:
            self._n_calls += 1
            return self._on_side_stream(inputs)
        if self._graph is None and not self._try_capture(inputs):
            return self._step(*inputs)
        assert self._graph is not None, "captured just now"
        if held := flat(self._inputs):
            torch._foreach_copy_(held, flat(inputs))
        self._graph.replay()
        return self._outputs

    def _as_outer(self, inputs: Tensors) -> Any:
        _within.outer = self
        try:
            return self._step(*inputs)
        finally:
            del _within.outer

    def _on_side_stream(self, inputs: Tensors) -> Any:
        if self._stream is not None:
            return self._as_outer(inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            outputs = self._as_outer(inputs)
        torch.cuda.current_stream().wait_stream(side)
        # What was allocated on the side stream may be used, and freed, on the current one from now on.
        torch.cuda.synchronize()
        return outputs

    def _try_capture(self, inputs: Tensors) -> bool:
        """Capture without running; False, once and for all, if the step cannot be captured.

        Raises:
            torch.OutOfMemoryError: As from the step itself; the caller decides on a smaller one.
        """
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        held = cloned(inputs)
        torch.cuda.synchronize()
        try:
            # Other threads (previews, the server's heartbeat) may use the device meanwhile.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._outputs = self._as_outer(held)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            logger.warning(
                "the step cannot be captured in a CUDA graph, so it runs slower: %s", str(error).split("\n")[0]
            )
            self.disable()
            return False
        self._graph, self._inputs = graph, held
        return True
