"""When a run has gone astray, and how often it may start again from its last checkpoint."""

import math
from typing import Any

import torch
from torch import Tensor

from utils import Diverged, RunError

SPIKE_FACTOR = 3.0  # times its running mean: a loss above that has leapt
MEMORY, RECENT = 100, 5  # steps of the running mean, and of the mean that is held against it
ADVICE = "start again with a lower --lr or a lower --clip"


class DivergenceMonitor:
    """Looks at each step's loss (nats per word) and gradient norm.

    A step has diverged if its loss or norm is not finite, or if the mean loss of the last few steps is more than
    `SPIKE_FACTOR` times the running mean and worse than that of a uniform prediction over V words: one odd batch is
    neither. The verdict is formed on the device. A CPU reads it at each step; on a GPU, which would be waited for,
    `check` is called where the host reads numbers anyway.
    """

    def __init__(self, device: torch.device, vocabulary: int):
        self.even = math.log(vocabulary)  # what a model without any knowledge loses
        self.mean = torch.tensor(self.even, dtype=torch.float64, device=device)
        self.recent = self.mean.clone()
        self.diverged = torch.zeros((), dtype=torch.bool, device=device)
        self.steps, self.rollbacks = 1, 0
        self.last = self.mean, self.mean

    def add(self, nll: Tensor, norm: Tensor) -> None:
        """The loss of a step and the norm of its gradient. Raises `Diverged`, on a GPU at the next `check`."""
        nll = nll.double()
        self.recent += (nll - self.recent) / RECENT
        leapt = self.recent > torch.clamp(SPIKE_FACTOR * self.mean, min=self.even)
        self.diverged |= leapt | ~torch.isfinite(nll) | ~torch.isfinite(norm)
        self.steps = min(self.steps + 1, MEMORY)
        self.mean += (nll - self.mean) / self.steps
        self.last = nll, norm
        if self.mean.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Raises `Diverged` if a step since the last call was astray."""
        if self.diverged.item():
            nll, norm = (number.item() for number in self.last)
            raise Diverged(f"the training loss is {nll:.4g}, the norm of its gradient {norm:.4g}")

    def check_weights(self, loss: float) -> None:
        """Raises `Diverged` unless all went well so far, and weights with this loss are fit to be kept: a step's loss
        is that of the weights before it, so that nothing has been said of the present ones."""
        self.check()
        if not math.isfinite(loss) or loss > max(SPIKE_FACTOR * self.mean.item(), self.even):
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
        self.diverged.zero_()
