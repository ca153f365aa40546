"""The optimizers of the weights, and the average of the weights that some of them keep.

All but `ASGD` are torch's. Weight decay is added to the gradient, except in adamw, which multiplies the weights by
1 - lr * wdecay at each step (Loshchilov & Hutter 2019). NT-ASGD goes from sgd to asgd when `NonMonotonicTrigger` fires
(Merity et al. 2017, section 3).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, optim

from architect import WeightUpdate

OPTIMIZERS = ("sgd", "asgd", "momentum", "adam", "adamw")
LIKE_SGD = ("sgd", "asgd", "momentum")  # those whose step is that of `WeightUpdate.deltas`
# Rates for the published sizes. That of Adam is a common choice; momentum 0.9 moves 10 times as far as SGD at one rate.
DEFAULT_LR = {"ntasgd": 20.0, "sgd": 20.0, "asgd": 20.0, "momentum": 2.0, "adam": 1e-3, "adamw": 1e-3}


def new_optimizer(name: str, weights: list[Tensor], lr: float, update: WeightUpdate) -> optim.Optimizer:
    """Returns one of `OPTIMIZERS` before its first step."""
    kinds = {"sgd": optim.SGD, "asgd": ASGD, "momentum": optim.SGD, "adam": optim.Adam, "adamw": optim.AdamW}
    options = {"momentum": update.momentum} if name == "momentum" else {}
    return kinds[name](weights, lr=lr, weight_decay=update.weight_decay, **options)


def velocity(optimizer: optim.Optimizer) -> list[Tensor] | None:
    """Returns what momentum will add to the gradient of each weight in the next step: momentum times the running sum of
    gradients; None for an optimizer without momentum and before the first step."""
    [group] = optimizer.param_groups
    buffers = [optimizer.state.get(w, {}).get("momentum_buffer") for w in group["params"]]
    return None if any(buffer is None for buffer in buffers) else [group["momentum"] * buffer for buffer in buffers]


class NonMonotonicTrigger:
    """Detects when the validation loss has stopped falling (Merity et al. 2017, algorithm 1)."""

    def __init__(self, nonmono: int):
        self.nonmono = nonmono
        self.losses: list[float] = []

    def step(self, loss: float) -> bool:
        """Records a loss; returns whether it is above the smallest of those before it but the last `nonmono`."""
        older = self.losses[: -self.nonmono]
        self.losses.append(loss)
        return bool(older) and loss > min(older)

    def state_dict(self) -> dict[str, list[float]]:
        return {"losses": self.losses}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.losses = state["losses"]


class ASGD(optim.SGD):
    """SGD that also keeps the mean of each weight over its steps, without the first, as torch's ASGD does without decay
    of the step size (t0 = 0, lambd = 0). torch's ASGD reads a number on the host for each weight and step, and computes
    the step size at the end of the previous step, so that a rate scaled for one segment of text would be applied to the
    next one."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        [group] = self.param_groups
        for w in group["params"]:
            state = self.state[w]
            if not state:
                # The key is not "step", since torch would leave that on the CPU when it loads the state.
                state.update(ax=torch.zeros_like(w), steps=torch.zeros((), device=w.device))
            state["steps"] += 1
            state["ax"].lerp_(w, 1 / (state["steps"] - 1).clamp(min=1).to(w.dtype))
        return loss


@contextmanager
def scaled_lr(optimizer: optim.Optimizer, scale: float) -> Iterator[float]:
    """Multiplies the learning rate by `scale` inside, yields the scaled rate, and restores the old one afterwards."""
    [group] = optimizer.param_groups
    before = group["lr"]
    group["lr"] *= scale
    try:
        yield group["lr"]
    finally:
        group["lr"] = before


@contextmanager
def averaged(optimizer: optim.Optimizer) -> Iterator[None]:
    """Inside, the parameters have their averaged values, if the optimizer keeps an average; outside the raw ones."""
    raw = {}
    for parameter, state in optimizer.state.items():
        if "ax" in state:
            raw[parameter] = parameter.detach().clone()
            parameter.data.copy_(state["ax"])
    try:
        yield
    finally:
        for parameter, old in raw.items():
            parameter.data.copy_(old)


def saved_average(optimizer_state: dict) -> list[Tensor] | None:
    """Returns the averaged weights in an optimizer's `state_dict()`, in the order of its parameters, or None."""
    states = optimizer_state["state"]
    return [states[i]["ax"] for i in sorted(states)] if states and "ax" in states[min(states)] else None
