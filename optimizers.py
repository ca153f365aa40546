"""What moves the weights. Every one is torch's, with weight decay as torch defines it there: added to the gradient,
but for adamw, which shrinks the weights themselves by lr * wdecay a step (Loshchilov & Hutter 2019)."""

import torch
from torch import Tensor

from averaging import averaging_sgd

OPTIMIZERS = ("sgd", "asgd", "momentum", "adam", "adamw")
LIKE_SGD = ("sgd", "asgd", "momentum")  # whose step is the rate times a gradient plus what does not depend on it
# What suits the published sizes: for Adam a common choice, for momentum what moves as far as SGD in the long run.
RATES = {"ntasgd": 20.0, "sgd": 20.0, "asgd": 20.0, "momentum": 2.0, "adam": 1e-3, "adamw": 1e-3}


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
