"""CUDA graphs for a step that is called repeatedly with a few shapes.

At these sizes a step consists of thousands of small kernel launches, and a GPU would wait for each of them. A graph
replays them as one launch.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

Step = Callable[..., tuple[Tensor, ...]]


class Graphs:
    """Runs `step` from one CUDA graph for each shape of its tensors and each value of its other arguments.

    The first call with a shape runs `step` without a graph, which compiles its kernels. The second call captures the
    graph, and this and all later calls replay it. After `LIMIT` captures, other shapes run without a graph: of the
    random lengths of segments in a retraining these are the rare ones. `step` must not read a tensor on the host.
    Without a `capture`, every call runs `step` without a graph. If a capture fails, one line on stderr says so, and
    from then on all steps of this process run without graphs, since the state of torch's generator in the other graphs
    is then out of date.
    """

    LIMIT: ClassVar[int] = 40  # They cover over 99% of the steps of 3,600 epochs (tests/engine/test_cuda_graphs.py).
    failed: ClassVar[bool] = False

    def __init__(self, step: Step, capture: Callable | None = None):
        self.step, self.capture = step, capture
        self.recorded: dict[tuple, tuple | None] = {}
        self.captured = 0

    def __call__(self, *arguments: Any) -> tuple[Tensor, ...]:
        if self.capture is None or Graphs.failed:
            return self.step(*arguments)
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        key = tuple((a.shape, a.dtype) if isinstance(a, Tensor) else a for a in arguments)
        if key not in self.recorded:
            self.recorded[key] = None
            return self.step(*arguments)
        if self.recorded[key] is None and self.captured == self.LIMIT:
            return self.step(*arguments)
        if self.recorded[key] is None:
            static = [tensor.clone() for tensor in tensors]
            place = iter(static)
            run = partial(self.step, *[next(place) if isinstance(a, Tensor) else a for a in arguments])
            try:
                self.recorded[key] = static, *self.capture(run)
                self.captured += 1
            except RuntimeError as error:  # An error of the step itself is raised again below.
                print(f"no CUDA graphs, slower: {' '.join(str(error).split())[:200]}", file=sys.stderr)
                Graphs.failed = True
            if Graphs.failed:  # After the except block, the traceback no longer keeps the capture's tensors alive.
                return self.step(*arguments)
        static, replay, outputs = self.recorded[key]
        for tensor, new in zip(static, tensors, strict=True):
            tensor.copy_(new)
        replay()
        return tuple(output.clone() for output in outputs)  # The next replay overwrites the outputs.


class Capture:
    """Captures the kernels that a call would launch as a CUDA graph.

    A call returns the graph's replay function and its output tensors, which each replay overwrites. All graphs of one
    `Capture` share one pool of memory, since only one of them runs at a time. Raises RuntimeError if the capture fails.
    """

    def __init__(self):
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                outputs = run()
        except RuntimeError:
            # torch then leaves the capture's stream current, and its generator waiting for the end of the capture.
            torch.cuda.set_stream(stream)
            generator = torch.cuda.default_generators[stream.device_index]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        return graph.replay, outputs
