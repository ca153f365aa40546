"""The optimizers of the weights, and the average that some of them keep.

Every one is torch's, with weight decay as torch defines it there: added to the gradient, but for adamw, which shrinks
the weights themselves by lr * wdecay a step (Loshchilov & Hutter 2019). NT-ASGD starts to average the weights when the
validation loss has stopped falling (Merity et al. 2017, section 4):

if trigger.fires(valid_loss):
    optimizer = ASGD(model.weights(), lr, t0=0, lambd=0, weight_decay=wdecay)
with averaged(optimizer):
    loss = evaluate(...)
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

OPTIMIZERS = ("sgd", "asgd", "momentum", "adam", "adamw")
LIKE_SGD = ("sgd", "asgd", "momentum")  # whose step is the rate times a gradient plus what does not depend on it
# What suits the published sizes: for Adam a common choice, for momentum what moves as far as SGD in the long run.
DEFAULT_LR = {"ntasgd": 20.0, "sgd": 20.0, "asgd": 20.0, "momentum": 2.0, "adam": 1e-3, "adamw": 1e-3}


def new_optimizer(
    name: str, weights: list[Tensor], lr: float, wdecay: float, momentum: float = 0.9
) -> torch.optim.Optimizer:
    """One of `OPTIMIZERS`, before its first step; asgd averages from that on."""
    return {
        "sgd": lambda: torch.optim.SGD(weights, lr=lr, weight_decay=wdecay),
        "asgd": lambda: averaging_sgd(weights, lr, wdecay),
        "momentum": lambda: torch.optim.SGD(weights, lr=lr, weight_decay=wdecay, momentum=momentum),
        "adam": lambda: torch.optim.Adam(weights, lr=lr, weight_decay=wdecay),
        "adamw": lambda: torch.optim.AdamW(weights, lr=lr, weight_decay=wdecay),
    }[name]()


def velocity(optimizer: torch.optim.Optimizer) -> list[Tensor] | None:
    """momentum times the running sum of gradients, for each weight: what the next step adds to its gradient. None
    where there is none, before the first step too."""
    [group] = optimizer.param_groups
    buffers = [optimizer.state.get(w, {}).get("momentum_buffer") for w in group["params"]]
    return None if any(buffer is None for buffer in buffers) else [group["momentum"] * buffer for buffer in buffers]


class NonMonotonicTrigger:
    """Fires when the validation loss has stopped falling (Merity et al. 2017, algorithm 1).

    That is: more than `nonmono` losses are on record, and the new one is above the smallest of all but the
    last `nonmono`. The new loss is then put on record.
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
    """torch's ASGD, but each step has the learning rate of its own parameter group.

    torch computes the step size at the end of the step before, so that a rate scaled for one segment of text
    would act on the next one. Without decay of the step size (lambd = 0, the only use here) it is just lr.
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
        """Of a run on any device: where torch keeps its counters depends on where the weights are now."""
        groups = [
            {**old, "capturable": new["capturable"]}
            for old, new in zip(state["param_groups"], self.param_groups, strict=True)
        ]
        super().load_state_dict({**state, "param_groups": groups})


def averaging_sgd(weights: list[Tensor], lr: float, wdecay: float) -> ASGD:
    """SGD that averages from its first step on."""
    on_gpu = weights[0].is_cuda  # then torch keeps its counters there, and does not wait for them
    return ASGD(weights, lr=lr, t0=0, lambd=0, weight_decay=wdecay, capturable=on_gpu)


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Parameters that are their average inside, the raw ones again outside; no change where an optimizer has none."""
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
    """The averaged weights in an optimizer's `state_dict()`, in the order of its parameters; None without."""
    states = optimizer_state["state"]
    return [states[i]["ax"] for i in sorted(states)] if states and "ax" in states[min(states)] else None
