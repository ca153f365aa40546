"""What a hand-written backward pass asks of autograd."""

import torch
from torch import Tensor


def forbid_double_backward(order: str) -> None:
    """For a way back written by hand: called in one that is to be differentiated itself, to a derivative of that
    order, raises RuntimeError.

    (torch's `once_differentiable` notices only if the incoming gradient depends on something.)
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"the fused engine has no {order} derivative here; use the eager engine")


def unformed_grad(like: Tensor) -> Tensor:
    """In the place of a share of a gradient that is not there: no numbers, so that nobody takes the other shares for
    the whole. (torch's anomaly detection minds it.)"""
    return like.new_full((), torch.nan).expand_as(like)


def graph_task_id() -> int:
    """The number of the call of autograd that runs now, the same in every function that it runs."""
    return torch._C._current_graph_task_id()
