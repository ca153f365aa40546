"""Element-wise functions that compiled kernels share."""

import torch
from torch import Tensor

LOG2_E = 1.4426950408889634


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), by exp2, which is the exponential that Inductor leaves where it is used."""
    return 1 / (1 + torch.exp2(-LOG2_E * x))


def sigmoid_tanh(x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Both of one exponential, in that dtype or that of x. Of tanh that has the absolute error of 1 in its dtype, which
    for an x in float32 is too much for the small arguments of a young model, whose batch normalisation enlarges them:
    there, the series. (An x that was rounded to bfloat16 has lost more than that.)"""
    small_matter = x.dtype == torch.float32
    x = x.to(dtype or x.dtype)
    e = torch.exp2(-LOG2_E * x)
    tanh = 2 / (1 + e * e) - 1
    if small_matter:
        q = x * x
        series = x * (1 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835)))))
        tanh = torch.where(q < 1 / 16, series, tanh)
    return 1 / (1 + e), tanh


def force_materialize(x: Tensor) -> Tensor:
    """x, which Inductor gives a buffer of its own, and with it a place in the order of loops. A sum can join the
    loop of an element-wise result that has come before it; else it would be a loop of its own, computing all again.
    (The buffer itself is optimised away.)"""
    return x.as_strided(x.shape, x.stride())
