"""The optimizers of the weights, and the average of the weights that some of them keep.

All are torch's. Weight decay is added to the gradient, except in adamw, which multiplies the weights by 1 - lr * wdecay
at each step (Loshchilov & Hutter 2019). NT-ASGD starts to average the weights when the validation loss has stopped
falling (Merity et al. 2017, section 4):

if trigger.step(valid_loss):
    optimizer = new_optimizer("asgd", model.weights(), lr, update)
with averaged(optimizer):
    loss = evaluate(...)
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from architect import WeightUpdate

OPTIMIZERS = ("sgd", "asgd", "momentum", "adam", "adamw")
LIKE_SGD = ("sgd", "asgd", "momentum")  # those whose step is that of `WeightUpdate.deltas`
# Rates for the published sizes. That of Adam is a common choice; momentum 0.9 moves 10 times as far as SGD at one rate.
DEFAULT_LR = {"ntasgd": 20.0, "sgd": 20.0, "asgd": 20.0, "momentum": 2.0, "adam": 1e-3, "adamw": 1e-3}


def new_optimizer(name: str, weights: list[Tensor], lr: float, update: WeightUpdate) -> torch.optim.Optimizer:
    """Returns one of `OPTIMIZERS` before its first step; asgd averages the weights from its first step on."""
    wdecay, momentum = update.weight_decay, update.momentum
    return {
        "sgd": lambda: torch.optim.SGD(weights, lr=lr, weight_decay=wdecay),
        "asgd": lambda: averaging_sgd(weights, lr, wdecay),
        "momentum": lambda: torch.optim.SGD(weights, lr=lr, weight_decay=wdecay, momentum=momentum),
        "adam": lambda: torch.optim.Adam(weights, lr=lr, weight_decay=wdecay),
        "adamw": lambda: torch.optim.AdamW(weights, lr=lr, weight_decay=wdecay),
    }[name]()


def velocity(optimizer: torch.optim.Optimizer) -> list[Tensor] | None:
    """Returns what momentum will add to the gradient of each weight in the next step: momentum times the running sum of
    gradients; None for an optimizer without momentum and before the first step."""
    [group] = optimizer.param_groups
    buffers = [optimizer.state.get(w, {}).get("momentum_buffer") for w in group["params"]]
    return None if any(buffer is None for buffer in buffers) else [group["momentum"] * buffer for buffer in buffers]


class NonMonotonicTrigger:
    """Detects when the validation loss has stopped falling (Merity et al. 2017, algorithm 1).

    `step` returns True if more than `nonmono` losses were recorded before and the new one is above the smallest of all
    but the last `nonmono` of them; it then records the new loss.
    """

    def __init__(self, nonmono: int):
        self.nonmono = nonmono
        self.losses: list[float] = []

    def step(self, loss: float) -> bool:
        older = self.losses[: -self.nonmono]
        self.losses.append(loss)
        return bool(older) and loss > min(older)

    def state_dict(self) -> dict[str, list[float]]:
        return {"losses": self.losses}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.losses = state["losses"]


class ASGD(torch.optim.ASGD):
    """torch's ASGD, except that each step uses the present learning rate of its parameter group.

    torch computes the step size at the end of the previous step, so that a rate that was scaled for one segment of text
    would be applied to the next one. Without decay of the step size (lambd = 0, the only use here) it equals lr.
    """

    def step(self, closure=None):
        for group in self.param_groups:
            if group["lambd"]:
                raise ValueError("this ASGD keeps the step size at lr: lambd must be 0")
            for parameter in group["params"]:
                if state := self.state.get(parameter):  # empty before the first step, which has the right rate
                    state["eta"].fill_(group["lr"])
        return super().step(closure)

    def load_state_dict(self, state: dict) -> None:
        """Loads a state that was saved on any device; `capturable` depends on the present device of the weights."""
        groups = [
            {**old, "capturable": new["capturable"]}
            for old, new in zip(state["param_groups"], self.param_groups, strict=True)
        ]
        super().load_state_dict({**state, "param_groups": groups})


def averaging_sgd(weights: list[Tensor], lr: float, wdecay: float) -> ASGD:
    """Returns SGD that averages the weights from its first step on."""
    on_gpu = weights[0].is_cuda  # torch then keeps its step counters on the GPU, which avoids synchronisation
    return ASGD(weights, lr=lr, t0=0, lambd=0, weight_decay=wdecay, capturable=on_gpu)


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
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
