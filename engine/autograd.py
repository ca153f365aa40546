"""Helpers of the hand-written backward passes, which deal with autograd."""

import torch
from torch import Tensor


def forbid_double_backward(message: str) -> None:
    """Raises RuntimeError with the message if the hand-written backward pass that calls this function is to be
    differentiated itself. torch's `once_differentiable` would raise an error only if the incoming gradient depends on
    something."""
    if torch.is_grad_enabled():
        raise RuntimeError(message)


def unformed_grad(like: Tensor) -> Tensor:
    """Returns NaNs in the shape of `like`, in place of a term of a gradient that is not computed.

    The NaNs make the sum of all terms NaN, so that the other terms cannot be mistaken for the whole gradient, as they
    would be if this one were None. torch's anomaly detection reports them as an error.
    """
    return like.new_full((), torch.nan).expand_as(like)


def graph_task_id() -> int:
    """Returns the number of autograd's current backward call, which all functions that this call runs share."""
    return torch._C._current_graph_task_id()
