"""The loss of each word of a text, by a model alone, by one that learns as it reads, and with a cache.

Shapes: T time steps, B batch, H hidden, V words, n time steps of a whole text, M mixes of a cache.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from model import RNNModel
from training.dynamic_evaluation import DynamicEvaluation
from training.evaluation import Score
from training.neural_cache import NeuralCache
from utils import Diverged, equal_segments


def token_losses(
    model: RNNModel, source: Tensor, bptt: int, *, dynamic: DynamicEvaluation | None = None,
    cache: NeuralCache | None = None, name: str = "text", show: bool = True,
) -> Tensor:  # fmt: skip
    """Returns the negative log-likelihoods (1 + M, n - 1, B), in nats, of the words of `source` (n, B) but the first,
    without dropout: by the model, and by it and each of the M mixes of `cache`.

    The text is read in segments of `bptt` time steps, and the hidden state is carried from each to the next. With
    `dynamic` the weights move after each segment, and are the trained ones again in the end; raises `Diverged` once a
    loss is not finite. A word's loss depends on no later word. The result is float64, on the CPU. A progress bar shows
    `name`, unless `show` is false.
    """
    state = model.initial_hidden(source.size(1))
    losses = torch.empty(1 + (len(cache.mixes) if cache else 0), len(source) - 1, source.size(1), dtype=torch.float64)
    with dynamic.restored() if dynamic else nullcontext(), torch.set_grad_enabled(dynamic is not None):
        for i, x, y in equal_segments(source, bptt, f"evaluating on {name}", show):  # (T, B) each
            hiddens, state = model(x, state.detach())  # (T, B, H), (B, S)
            own = model.log_probs(hiddens).gather(-1, y[..., None])[..., 0]  # (T, B)
            losses[0, i : i + len(y)] = -own.detach()
            if cache:
                losses[1:, i : i + len(y)] = -cache.log_probs(own.detach(), hiddens.detach(), y)
            if dynamic:
                if not losses[0, i : i + len(y)].isfinite().all():
                    raise Diverged(f"the loss on {name} is not finite any more")
                dynamic.step(-own.mean())
    return losses


def total_score(losses: Tensor, unknown: Tensor | None = None) -> Score:
    """Returns the `Score` of the losses (n - 1, B) of a text; `unknown` (n, B) marks the words that became `<unk>`."""
    if unknown is None:
        return Score(losses.mean().item())
    marked = unknown[1:].to(losses.device)  # (n - 1, B), of the predicted words
    known = losses[~marked]
    return Score(losses.mean().item(), marked.double().mean().item(), known.mean().item() if len(known) else None)
