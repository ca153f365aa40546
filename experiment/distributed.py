"""Data parallel training: the processes that `torchrun` starts share the elements of each batch.

    torchrun --nproc_per_node 2 train_search.py --unrolled

Every rank has all weights, and its own batch elements (docs/distributed.md). The main rank, rank 0, evaluates the
losses that decisions depend on, and it alone writes files; a signal to any rank stops all of them. A process that was
started without torchrun is the main rank of one rank, and nothing here communicates.
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

EXCHANGE_TIMEOUT = timedelta(hours=2)  # A rank may have to wait for another that evaluates or compiles.
SEEDS_APART = 1_000_003  # This is the difference between the mask seeds of successive ranks.

T = TypeVar("T")


class Distributed:
    """One rank of a data parallel run, with the exchanges between ranks; each raises `RunError` if a rank is lost.

    `rank` is the number of this process among `size` ranks, `local` that among the `on_this_machine` of its machine.
    """

    def __init__(self):
        launched = distributed.is_available() and distributed.is_torchelastic_launched()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        numbers = [int(os.environ[name]) for name in names] if launched else [0, 1, 0, 1]
        self.rank, self.size, self.local, self.on_this_machine = numbers
        if self.size > 1:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            with together():
                distributed.init_process_group(backend, timeout=EXCHANGE_TIMEOUT)
            atexit.register(distributed.destroy_process_group)

    def command(self, script: str) -> str:
        """Returns the command that starts `script` with as many ranks again."""
        if self.size == 1:
            return f"python {script}"
        machines = self.size // self.on_this_machine
        nodes = f"--nnodes {machines} " if machines > 1 else ""
        return f"torchrun {nodes}--nproc_per_node {self.on_this_machine} {script}"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """Returns the device of this rank; with several ranks and "cuda", each takes a GPU of its own."""
        if device.type == "cuda" and self.size > 1:
            device = torch.device("cuda", self.local)
            torch.cuda.set_device(device)
        return device

    def seed(self, seed: int) -> None:
        """Seeds the generator, once the weights are made, so that each rank samples other masks; the main rank
        keeps its generator, so that it samples the same masks as a single process."""
        if not self.is_main:
            torch.manual_seed(seed + SEEDS_APART * self.rank)

    def shard(self, whole: Tensor, dim: int = 0) -> Tensor:
        """Returns this rank's part of a tensor that has the whole batch along `dim`."""
        return whole if self.size == 1 else whole.chunk(self.size, dim)[self.rank].contiguous()

    def all_gather(self, part: Tensor) -> Tensor:
        """Returns the whole batch (B, S), concatenated from the parts (B / ranks, S) of all ranks."""
        if self.size == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.size)]
        with together():
            distributed.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    def all_reduce_mean(self, tensors: list[Tensor]) -> None:
        """Replaces the tensors by their means over all ranks, in one exchange."""
        if self.size == 1:
            return
        bucket = torch.cat([tensor.flatten() for tensor in tensors])
        with together():
            distributed.all_reduce(bucket)
        bucket /= self.size
        for tensor, part in zip(tensors, bucket.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def all_reduce_any(self, *flags: bool) -> list[bool]:
        """Returns for each flag whether it is True on any rank."""
        if self.size == 1:
            return list(flags)
        any_flags = torch.tensor(flags, dtype=torch.int32)
        with together():
            distributed.all_reduce(any_flags, distributed.ReduceOp.MAX)
        return any_flags.bool().tolist()

    def gather(self, value: T) -> list[T]:
        """Returns the values of all ranks, in the order of the ranks."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            with together():
                distributed.all_gather_object(values, value)
        return values

    def broadcast_from_main(self, make: Callable[[], T]) -> T:
        """Calls `make` on the main rank alone, and returns its result on every rank."""
        if self.size == 1:
            return make()
        values = [make() if self.is_main else None]
        with together():
            distributed.broadcast_object_list(values, src=0)
        return values[0]


def exit_process(code: int) -> int:
    """Returns `code`, or, in one of several ranks, flushes the output and exits with `code` at once.

    The files of the run must be complete by then. A rank that returned instead was seen to abort while torch destroyed
    the process group (3 of 90 runs on a busy machine, torch 2.13, gloo), which torchrun takes for a failed run.
    """
    if distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


@contextmanager
def together() -> Iterator[None]:
    """Turns a RuntimeError of an exchange between ranks inside the block into a `RunError`."""
    try:
        yield
    except RuntimeError as error:
        raise RunError(f"lost the other processes of this run ({' '.join(str(error).split())[:150]}); start them all"
                       " again, with --resume") from error  # fmt: skip
