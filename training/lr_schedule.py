"""The learning rate over a run: it rises during the warm-up and decays after it (docs/strategies.md).

The rate is a function of the progress of a run and of what a `Schedule` saves (`STATE`), so that a resumed run has the
rates of one that was never stopped.
"""

import math
from typing import Any, NamedTuple

import torch

SHAPES = ("linear", "exponential")
DECAYS = ("constant", "step", "exponential", "cosine", "polynomial", "plateau")
STATE = ("scale", "decay_from", "plateau", "best", "bad_epochs")  # what a `Schedule` saves


class WarmUp(NamedTuple):
    """Raises the rate from `start` times its value to its value within `steps` steps."""

    steps: int = 0
    shape: str = "linear"
    start: float = 0.1

    def factor(self, step: int) -> float:
        """Returns the factor of the rate after `step` steps of the warm-up, fewer than `steps`."""
        share = step / self.steps
        if self.shape == "exponential":
            return self.start ** (1 - share)
        return self.start + (1 - self.start) * share


class Decay(NamedTuple):
    """Lowers the rate after the warm-up."""

    name: str = "constant"
    step_size: float = 1.0  # epochs
    gamma: float = 0.5
    final: float = 0.0  # rate
    power: float = 1.0
    cycle: int = 0  # epochs; 0 for one descent to the end of the run
    patience: int = 3  # epochs

    def rate(self, lr: float, epochs: float, left: float) -> float:
        """Returns the rate after `epochs` epochs of decay, with `left` epochs left until the end of the run."""
        if self.name == "step":
            return lr * self.gamma ** math.floor(epochs / self.step_size)
        if self.name == "exponential":
            return lr * self.gamma**epochs
        # the elapsed share of the decay, or of its present cycle
        share = (epochs % self.cycle) / self.cycle if self.cycle else epochs / max(epochs + left, 1e-9)
        if self.name == "cosine":  # Loshchilov & Hutter 2017, equation 5
            return self.final + (lr - self.final) * (1 + math.cos(math.pi * share)) / 2
        if self.name == "polynomial":
            return self.final + (lr - self.final) * (1 - share) ** self.power
        return lr


class Schedule:
    """Computes the rate of each step. Rollbacks multiply `scale`, a factor of all rates, by a constant below 1."""

    def __init__(self, lr: float, epochs: int, warm_up: WarmUp, decay: Decay):
        self.lr, self.epochs, self.warm_up, self.decay = lr, epochs, warm_up, decay
        self.scale = 1.0
        self.decay_from = 0.0  # the position in epochs at which the warm-up ended
        self.plateau, self.best, self.bad_epochs = 1.0, math.inf, 0  # for `plateau`: the factor so far, and its reason

    def rate(self, step: int, position: float) -> float:
        """Returns the rate after `step` steps, at `position` epochs (1.5 is the middle of the second epoch)."""
        if step < self.warm_up.steps:
            return self.scale * self.lr * self.warm_up.factor(step)
        rate = self.decay.rate(self.lr, max(0.0, position - self.decay_from), self.epochs - position)
        return self.scale * rate * self.plateau

    def set_rate(self, optimizer: torch.optim.Optimizer, step: int, position: float) -> None:
        """Sets the optimizer's rate for the next step. `step` and `position` are those of `rate`; neither decreases
        from call to call, except after `load_state_dict`."""
        if step <= self.warm_up.steps:
            self.decay_from = position
        for group in optimizer.param_groups:
            group["lr"] = self.rate(step, position)

    def close_epoch(self, valid_loss: float) -> None:
        """Multiplies the rate by gamma, if the decay is `plateau`, after more than `patience` epochs without a lower
        loss."""
        if self.decay.name != "plateau":
            return
        self.best, self.bad_epochs = (valid_loss, 0) if valid_loss < self.best else (self.best, self.bad_epochs + 1)
        if self.bad_epochs > self.decay.patience:
            self.plateau, self.bad_epochs = self.plateau * self.decay.gamma, 0

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads what `state_dict` returned. Raises ValueError for a state that no run can have."""
        if not 0 <= state["decay_from"] <= self.epochs:
            raise ValueError("the decay begins outside of the run")
        for name in STATE:
            setattr(self, name, state[name])
