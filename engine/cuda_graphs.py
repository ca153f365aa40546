"""CUDA graphs for a step that is taken again and again in a few shapes.

A step at these sizes is thousands of small launches, and a GPU would wait for each. A graph replays them as one.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

Step = Callable[..., tuple[Tensor, ...]]


class Graphs:
    """`step`, by a graph for each shape of its tensors and each value of its other arguments; without a `capture`,
    `step`.

    A shape is run as it stands when it first comes, which compiles what there is to compile; is captured when it
    comes again; and is replayed from then on. `step` must not read a tensor on the host. Where a capture fails one
    line says so, and from then on all steps of this process run as they stand: what other graphs hold of torch's
    generator is then out of date.
    """

    failed: ClassVar[bool] = False

    def __init__(self, step: Step, capture: Callable | None = None):
        self.step, self.capture = step, capture
        self.recorded: dict[tuple, tuple | None] = {}

    def __call__(self, *arguments: Any) -> tuple[Tensor, ...]:
        if self.capture is None or Graphs.failed:
            return self.step(*arguments)
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        key = tuple((a.shape, a.dtype) if isinstance(a, Tensor) else a for a in arguments)
        if key not in self.recorded:
            self.recorded[key] = None
            return self.step(*arguments)
        if self.recorded[key] is None:
            static = [tensor.clone() for tensor in tensors]
            place = iter(static)
            run = partial(self.step, *[next(place) if isinstance(a, Tensor) else a for a in arguments])
            try:
                self.recorded[key] = static, *self.capture(run)
            except RuntimeError as error:  # a fault of the step itself shows again when it runs as it stands
                print(f"no CUDA graphs, slower: {' '.join(str(error).split())[:200]}", file=sys.stderr)
                Graphs.failed = True
            if Graphs.failed:  # and what the error remembers of the step is gone
                return self.step(*arguments)
        static, replay, outputs = self.recorded[key]
        for tensor, new in zip(static, tensors, strict=True):
            tensor.copy_(new)
        replay()
        return tuple(output.clone() for output in outputs)  # the next replay writes over them


class Capture:
    """Records what a call would launch; all graphs share one pool of memory, as only one runs at a time."""

    def __init__(self):
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                outputs = run()
        except RuntimeError:  # torch leaves its stream current then, and its generator waiting for the capture's end
            torch.cuda.set_stream(stream)
            generator = torch.cuda.default_generators[stream.device_index]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        return graph.replay, outputs
