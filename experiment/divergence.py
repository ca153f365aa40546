"""Detects that a run has diverged, and limits how often it may be rolled back to its last checkpoint."""

import math
from typing import Any

import torch
from torch import Tensor

from utils import Diverged, RunError, to_host

SPIKE_FACTOR = 3.0  # The loss has diverged when it is above this many times its running mean.
MEMORY, RECENT = 100, 5  # The number of steps of the running mean, and of the mean that is compared with it.
BACKOFF = 0.5  # the factor of the learning rate at a rollback
MAX_ROLLBACKS = 5


class DivergenceMonitor:
    """Checks each step's loss (nats per word) and gradient norm.

    A step has diverged if its loss or norm is not finite, or if the mean loss of the last few steps is more than
    `SPIKE_FACTOR` times the running mean and above that of a uniform prediction over V words; one odd batch is not
    enough. The comparison is computed on `device`. On a CPU it is read at each step; on a GPU, for which the host would
    have to wait, the caller calls `check` where it reads numbers anyway. `vocabulary` is V.
    """

    def __init__(self, device: torch.device, vocabulary: int):
        self.uniform_loss = math.log(vocabulary)  # This is the loss of a uniform prediction, in nats per word.
        self.mean = torch.tensor(self.uniform_loss, dtype=torch.float64, device=device)
        self.recent = self.mean.clone()
        self.diverged = torch.zeros((), dtype=torch.bool, device=device)
        self.steps, self.rollbacks = 1, 0
        self.last = self.mean, self.mean

    def add(self, nll: Tensor, norm: Tensor) -> None:
        """Records the loss and gradient norm of a step. Raises `Diverged`, on a GPU only at the next `check`."""
        nll = nll.double()
        self.recent += (nll - self.recent) / RECENT
        spiked = self.recent > torch.clamp(SPIKE_FACTOR * self.mean, min=self.uniform_loss)
        self.diverged |= spiked | ~torch.isfinite(nll) | ~torch.isfinite(norm)
        self.steps = min(self.steps + 1, MEMORY)
        self.mean += (nll - self.mean) / self.steps
        self.last = nll, norm
        if self.mean.device.type == "cpu" and self.diverged:
            self.check(self.verdict())

    def verdict(self) -> Tensor:
        """Returns what `check` needs (3,), on the device: whether a recorded step has diverged, and the loss and the
        gradient norm of the last step."""
        return torch.stack([number.double() for number in (self.diverged, *self.last)])

    def check(self, verdict: Tensor) -> None:
        """Raises `Diverged` if a recorded step has diverged, by a `verdict` on the CPU."""
        diverged, nll, norm = verdict.tolist()
        if diverged:
            raise Diverged(f"the training loss is {nll:.4g}, the norm of its gradient {norm:.4g}")

    def check_weights(self, loss: float) -> None:
        """Raises `Diverged` if a recorded step has diverged, or if `loss`, measured at the present weights, has.

        The loss of a step is that of the weights before it, and does not show whether the present ones may be saved.
        """
        verdict, mean = to_host(self.verdict(), self.mean)
        self.check(verdict)
        if not math.isfinite(loss) or loss > max(SPIKE_FACTOR * mean.item(), self.uniform_loss):
            raise Diverged(f"the loss is {loss:.4g} with the weights of the last step")

    def next_rollback(self, fault: Diverged, step: int, lr: float, optimizer: str, clip: float) -> int:
        """Returns the number of the next rollback; raises RunError if that is more than `MAX_ROLLBACKS`. The error
        names the last rate `lr` that was tried and the optimizer, and a remedy for the limit `clip` (0: none)."""
        if self.rollbacks >= MAX_ROLLBACKS:
            raise RunError(
                f"the run has diverged at step {step} after {MAX_ROLLBACKS} rollbacks to an earlier checkpoint:"
                f" {fault}; start again with an --lr below {lr:g}, the last that this {optimizer} run tried, or"
                f" {'a lower --clip' if clip else 'with --clip 0.25'}"
            )
        return self.rollbacks + 1

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "recent": self.recent, "steps": self.steps, "rollbacks": self.rollbacks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean.copy_(state["mean"])
        self.recent.copy_(state["recent"])
        self.steps, self.rollbacks = state["steps"], state["rollbacks"]
        self.diverged.zero_()
