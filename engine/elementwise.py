"""Element-wise functions that the compiled kernels share."""

import torch
from torch import Tensor

LOG2_E = 1.4426950408889634


def sigmoid(x: Tensor) -> Tensor:
    """Returns 1 / (1 + exp(-x)), computed with exp2, the exponential that Inductor computes inline where it is used."""
    return 1 / (1 + torch.exp2(-LOG2_E * x))


def sigmoid_tanh(x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Returns sigmoid(x) and tanh(x), both from one exponential, in `dtype` or by default in that of x.

    This tanh has the absolute error that rounding a 1 has in its dtype. For an x in float32 that is too much: at the
    start of training the arguments are small, and batch normalisation scales them up. Small arguments therefore take
    the Taylor series. An x that was rounded to bfloat16 has lost more than that, and takes no series.
    """
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
    """Returns x, for which Inductor allocates a buffer of its own, and so gives it a place in the order of the loops.

    A sum can be fused with the loop of an element-wise result that precedes it. Otherwise it would be a separate loop
    that computes everything again. The buffer itself is optimised away.
    """
    return x.as_strided(x.shape, x.stride())
