"""Perplexity: how it is measured and how it is printed."""

import math

import torch
from torch import Tensor
from tqdm import tqdm

from data import get_batch
from engine.matmul import matmul_precision

VALID_ROWS, TEST_ROWS = 10, 1  # the published batch sizes of evaluation


@torch.no_grad()
def evaluate(model, source: Tensor, bptt: int, name: str = "text") -> float:
    """Mean negative log-likelihood in nats per predicted word of `source` (n, B), without dropout, in the precision of
    the model's engine.

    The hidden state is carried from segment to segment. exp of it is the perplexity. `name` is for the bar.
    """

    def segment(x: Tensor, y: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        hiddens, hidden = model(x, hidden)  # (T, B, H), (B, S)
        return model.nll(hiddens, y), hidden

    hidden = model.initial_hidden(source.size(1))
    quick_segment = model.engine.with_cuda_graphs(
        segment, source.device
    )  # anew: the weights may lie elsewhere than last time
    total, count = torch.zeros((), dtype=torch.float64, device=source.device), 0
    starts = range(0, len(source) - 1, bptt)
    segments = tqdm(starts, desc=f"evaluating on {name}", unit="segment", leave=False, disable=None, dynamic_ncols=True)
    with matmul_precision(model.engine.precision):
        for i in segments:
            x, y = get_batch(source, i, bptt)  # (T, B)
            nll, hidden = quick_segment(x, y, hidden)
            total += nll.double() * y.numel()
            count += y.numel()
    return total.item() / count


def perplexity(loss: float) -> float:
    """exp of a loss in nats, infinite where that overflows."""
    return math.exp(loss) if not loss > 700 else math.inf


def format_perplexity(test_ppl: float | None) -> str:
    """The end of a run's last line."""
    return "test text not read" if test_ppl is None else f"test ppl {test_ppl:.2f}"
