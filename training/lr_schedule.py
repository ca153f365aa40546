"""The learning rate over a run: up during the warm-up, down after it.

    schedule.set_rate(optimizer, progress.step, progress.position())   # before each step
    schedule.close_epoch(valid_loss)                                   # for `plateau`

The rate is a closed form of where a run stands, so that one that goes on from a checkpoint has the rates of one that
was never stopped. The warm-up is counted in steps. What comes after is counted in epochs, and fractions of them by the
text that has been read: segments differ in length, so that nobody knows beforehand how many steps there will be.
"""

import math
from typing import Any, NamedTuple

import torch

SHAPES = ("linear", "exponential")
DECAYS = ("constant", "step", "exponential", "cosine", "polynomial", "plateau")


class WarmUp(NamedTuple):
    """From `start` times the rate to the rate in so many steps."""

    steps: int = 0
    shape: str = "linear"
    start: float = 0.1

    def factor(self, step: int) -> float:
        """Of the rate of the step that comes after `step` steps; 1 when the warm-up is over."""
        share = min(step / self.steps, 1.0) if self.steps else 1.0
        if self.shape == "exponential":
            return self.start ** (1 - share)
        return self.start + (1 - self.start) * share


class Decay(NamedTuple):
    """What becomes of the rate after the warm-up."""

    name: str = "constant"
    step_size: float = 1.0  # epochs
    gamma: float = 0.5
    final: float = 0.0  # rate
    power: float = 1.0
    cycle: int = 0  # epochs; 0 for one descent to the end of the run
    patience: int = 3  # epochs

    def rate(self, lr: float, epochs: float, left: float) -> float:
        """The rate after so many epochs of decay, with so many left until the end of the run.

        step          lr gamma^floor(epochs / step_size)
        exponential   lr gamma^epochs
        cosine        final + (lr - final) (1 + cos(pi share)) / 2        (Loshchilov & Hutter 2017, equation 5)
        polynomial    final + (lr - final) (1 - share)^power

        where share is that of the run, or of a cycle of it, that is behind.
        """
        if self.name == "step":
            return lr * self.gamma ** math.floor(epochs / self.step_size)
        if self.name == "exponential":
            return lr * self.gamma**epochs
        share = (epochs % self.cycle) / self.cycle if self.cycle else epochs / max(epochs + left, 1e-9)
        if self.name == "cosine":
            return self.final + (lr - self.final) * (1 + math.cos(math.pi * share)) / 2
        if self.name == "polynomial":
            return self.final + (lr - self.final) * (1 - share) ** self.power
        return lr


class Schedule:
    """The rate of each step. `scale` is what rollbacks have left of all of them."""

    def __init__(self, lr: float, epochs: int, warm_up: WarmUp, decay: Decay):
        self.lr, self.epochs, self.warm_up, self.decay = lr, epochs, warm_up, decay
        self.scale = 1.0
        self.decay_from = 0.0  # epochs behind when the warm-up ended
        # torch's scheduler sets the rate of an optimizer: this one has a rate of 1, and nothing to train
        self.unit = torch.optim.SGD([torch.zeros(())], lr=1.0)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.unit, factor=decay.gamma, patience=decay.patience, threshold=0.0, eps=0.0
        )

    def rate(self, step: int, position: float) -> float:
        """For the step that comes after `step` steps and `position` epochs (1.5: the middle of the second)."""
        if step < self.warm_up.steps:
            return self.scale * self.lr * self.warm_up.factor(step)
        rate = self.decay.rate(self.lr, max(0.0, position - self.decay_from), self.epochs - position)
        return self.scale * rate * self.unit.param_groups[0]["lr"]

    def set_rate(self, optimizer: torch.optim.Optimizer, step: int, position: float) -> None:
        """The rate of the next step into the optimizer; positions as in `rate`, in the order that a run has them."""
        if step <= self.warm_up.steps:
            self.decay_from = position
        for group in optimizer.param_groups:
            group["lr"] = self.rate(step, position)

    def close_epoch(self, valid_loss: float) -> None:
        """`plateau`: gamma times the rate after more than `patience` epochs without a lower loss."""
        if self.decay.name == "plateau":
            self.plateau.step(valid_loss)

    def state_dict(self) -> dict[str, Any]:
        return {
            "scale": self.scale, "decay_from": self.decay_from, "plateau": self.unit.param_groups[0]["lr"],
            "best": self.plateau.best, "bad_epochs": self.plateau.num_bad_epochs,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for a state that no run has."""
        if not 0 <= state["decay_from"] <= self.epochs:
            raise ValueError("the decay begins outside of the run")
        self.scale, self.decay_from = state["scale"], state["decay_from"]
        self.unit.param_groups[0]["lr"] = state["plateau"]
        self.plateau.best, self.plateau.num_bad_epochs = state["best"], state["bad_epochs"]
