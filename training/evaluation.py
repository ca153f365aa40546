"""Measures the loss of a model on a text, and formats its perplexity."""

import math

import torch
from torch import Tensor
from tqdm import tqdm

from engine.matmul import matmul_precision
from utils import get_batch

VALID_BATCH_SIZE, TEST_BATCH_SIZE = 10, 1  # These are the published batch sizes of evaluation.


@torch.no_grad()
def evaluate(model, source: Tensor, bptt: int, name: str = "text") -> float:
    """Returns the mean negative log-likelihood in nats per predicted word of `source` (n, B), without dropout. It is
    computed in the precision of the model's engine, in segments of `bptt` time steps, from each of which the hidden
    state is carried to the next. The progress bar shows `name`."""

    def segment(x: Tensor, y: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        hiddens, hidden = model(x, hidden)  # (T, B, H), (B, S)
        return model.nll(hiddens, y), hidden

    hidden = model.initial_hidden(source.size(1))
    # Each evaluation captures new graphs, since the weights may have other addresses than in the last one.
    quick_segment = model.engine.with_cuda_graphs(segment, source.device)
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
    """Returns exp of a loss in nats per word, and infinity for a loss above 700, near which exp overflows."""
    return math.exp(loss) if not loss > 700 else math.inf


def format_perplexity(test_ppl: float | None) -> str:
    """Returns the end of a run's last line: the test perplexity, or for None that the test text was not read."""
    return "test text not read" if test_ppl is None else f"test ppl {test_ppl:.2f}"
