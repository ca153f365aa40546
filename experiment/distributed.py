"""Data parallel training: the processes that `torchrun` starts take a batch's rows between them.

    torchrun --nproc_per_node 2 train_search.py --unrolled

Every rank has all weights and its own rows of text, hidden state and masks. What a step needs of all rows, the
gradients, is averaged over the ranks, so that all take the same step; what is decided once (a loss that is judged, an
epoch that ends, a signal), the first rank decides. It alone writes. gloo carries what lies on a CPU, NCCL what lies on
a GPU. Started without torchrun, a process is the first rank of one, and nothing here does anything.
"""

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from utils import RunError

PATIENCE = timedelta(hours=2)  # that a rank waits for another, which may be evaluating or compiling
SEEDS_APART = 1_000_003  # of the masks that two ranks draw

T = TypeVar("T")


class Distributed:
    """This process, `rank`, among `size`; `local` of them are on this machine before it."""

    def __init__(self):
        launched = distributed.is_available() and distributed.is_torchelastic_launched()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        here = [int(os.environ[name]) for name in names] if launched else [0, 1, 0, 1]
        self.rank, self.size, self.local, self.on_this_machine = here
        if self.size > 1:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            with together():
                distributed.init_process_group(backend, timeout=PATIENCE)
            atexit.register(distributed.destroy_process_group)

    def command(self, script: str) -> str:
        """What starts as many ranks again."""
        if self.size == 1:
            return f"python {script}"
        machines = self.size // self.on_this_machine
        nodes = f"--nnodes {machines} " if machines > 1 else ""
        return f"torchrun {nodes}--nproc_per_node {self.on_this_machine} {script}"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """The device of this rank: of several GPUs each takes its own."""
        if device.type == "cuda" and self.size > 1:
            device = torch.device("cuda", self.local)
            torch.cuda.set_device(device)
        return device

    def seed(self, seed: int) -> None:
        """Let this rank draw other masks than the others, once the weights are made; the first draws what a process
        alone would."""
        if not self.is_main:
            torch.manual_seed(seed + SEEDS_APART * self.rank)

    def shard(self, whole: Tensor, dim: int = 0) -> Tensor:
        """This rank's part of what has the whole batch along `dim`."""
        return whole if self.size == 1 else whole.chunk(self.size, dim)[self.rank].contiguous()

    def all_gather(self, part: Tensor) -> Tensor:
        """The whole batch, of the parts (rows, S) of all ranks."""
        if self.size == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.size)]
        with together():
            distributed.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    def all_reduce_mean(self, tensors: list[Tensor]) -> None:
        """Put the mean over all ranks into the tensors, by one exchange."""
        if self.size == 1:
            return
        bucket = torch.cat([tensor.flatten() for tensor in tensors])
        with together():
            distributed.all_reduce(bucket)
        bucket /= self.size
        for tensor, part in zip(tensors, bucket.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def all_reduce_any(self, *flags: bool) -> list[bool]:
        """Of each flag, whether it is up on any rank."""
        if self.size == 1:
            return list(flags)
        found = torch.tensor(flags, dtype=torch.int32)
        with together():
            distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return found.bool().tolist()

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        found: list[Any] = [value] * self.size
        if self.size > 1:
            with together():
                distributed.all_gather_object(found, value)
        return found

    def broadcast_from_main(self, make: Callable[[], T]) -> T:
        """What the first rank makes, on all."""
        if self.size == 1:
            return make()
        found = [make() if self.is_main else None]
        with together():
            distributed.broadcast_object_list(found, src=0)
        return found[0]


def exit_process(code: int) -> int:
    """The exit code of a process that is done: one of several ranks ends right here.

    What lies on the disk is whole by then, and so is what was said; but while torch takes down what carried the
    gradients, a rank that was done has been seen to abort (3 of 90 runs on a busy machine, torch 2.13, gloo),
    and torchrun takes that for a failed run.
    """
    if distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


@contextmanager
def together() -> Iterator[None]:
    """What goes wrong between ranks becomes a `RunError`."""
    try:
        yield
    except RuntimeError as error:
        raise RunError(f"lost the other processes of this run ({' '.join(str(error).split())[:150]}); start them all"
                       " again, with --resume") from error  # fmt: skip
