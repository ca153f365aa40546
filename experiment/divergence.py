"""When a run has gone astray, and how often it may start again from its last checkpoint."""

import math
from typing import Any

import torch
from torch import Tensor

from utils import Diverged, RunError

LEAP = 3.0  # times its running mean: a loss above that has leapt
MEMORY, RECENT = 100, 5  # steps of the running mean, and of the mean that is held against it
ADVICE = "start again with a lower --lr (5 suits small models) or a lower --clip"


class Watch:
    """Looks at each step's loss (nats per word) and gradient norm.

    Astray is what is not finite, and a loss that is, over the last few steps, more than `LEAP` times its running mean
    and worse than giving each of V words the same chance: one odd batch is neither. The verdict is formed on the
    device; a CPU reads it at each step, and for a GPU, which would be waited for, call `check` where the host looks at
    numbers anyway.
    """

    def __init__(self, device: torch.device, vocabulary: int):
        self.even = math.log(vocabulary)  # what a model without any knowledge loses
        self.mean = torch.tensor(self.even, dtype=torch.float64, device=device)
        self.recent = self.mean.clone()
        self.astray = torch.zeros((), dtype=torch.bool, device=device)
        self.steps, self.rollbacks = 1, 0
        self.last = self.mean, self.mean

    def add(self, nll: Tensor, norm: Tensor) -> None:
        """The loss of a step and the norm of its gradient. Raises `Diverged`, on a GPU at the next `check`."""
        nll = nll.double()
        self.recent += (nll - self.recent) / RECENT
        leapt = self.recent > torch.clamp(LEAP * self.mean, min=self.even)
        self.astray |= leapt | ~torch.isfinite(nll) | ~torch.isfinite(norm)
        self.steps = min(self.steps + 1, MEMORY)
        self.mean += (nll - self.mean) / self.steps
        self.last = nll, norm
        if self.mean.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Raises `Diverged` if a step since the last call was astray."""
        if self.astray.item():
            nll, norm = (number.item() for number in self.last)
            raise Diverged(f"the training loss is {nll:.4g}, the norm of its gradient {norm:.4g}")

    def judge(self, loss: float) -> None:
        """Raises `Diverged` unless all went well so far, and weights with this loss are fit to be kept: a step's loss
        is that of the weights before it, so that nothing has been said of the present ones."""
        self.check()
        if not math.isfinite(loss) or loss > max(LEAP * self.mean.item(), self.even):
            raise Diverged(f"the loss is {loss:.4g} with the weights of the last step")

    def count(self, fault: Diverged, most: int, step: int) -> int:
        """The number of the rollback that is to come; raises RunError if that were more than `most`."""
        if self.rollbacks >= most:
            again = f" after {most} returns to an earlier checkpoint" if most else ""
            raise RunError(f"the run has diverged at step {step}{again}: {fault}; {ADVICE}")
        return self.rollbacks + 1

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "recent": self.recent, "steps": self.steps, "rollbacks": self.rollbacks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean.copy_(state["mean"])
        self.recent.copy_(state["recent"])
        self.steps, self.rollbacks = state["steps"], state["rollbacks"]
        self.astray.zero_()
