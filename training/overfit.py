"""Tests whether a model learns at all, before hours go into a text: every model here can overfit one batch."""

import math

from torch import Tensor, nn
from torch.optim import Optimizer

from architect import WeightUpdate
from engine.dropout import Masks
from training.evaluation import perplexity
from training.losses import Batch, MicroBatches, clipped_gradient
from utils import RunError, get_batch, progress_bar

OVERFIT_PPL = 1.5  # A model overfits a batch if its perplexity is below this.
MAX_STEPS = 2000


def overfit(
    model: nn.Module, optimizer: Optimizer, text: Tensor, bptt: int, micro_batch_size: int, update: WeightUpdate
) -> str:
    """Trains on the first segment of a text (n, B), without dropout, until its perplexity is below `OVERFIT_PPL`.
    Returns a line with the perplexity and the number of steps. Raises `RunError` if the perplexity is not below
    `OVERFIT_PPL` after `MAX_STEPS` steps, or as soon as it is not finite. `update` clips the gradient."""
    batch = Batch(*get_batch(text, 0, bptt), model.initial_hidden(text.size(1)), Masks())
    weights, ppl = model.weights(), math.inf
    with progress_bar(range(MAX_STEPS + 1), "one batch", "step") as bar:
        for step in bar:
            nll, _, _ = clipped_gradient(MicroBatches(model, batch, micro_batch_size), weights, update)
            ppl = perplexity(nll.item())
            bar.set_postfix_str(f"ppl {ppl:.2f}")
            if ppl < OVERFIT_PPL:
                return f"one batch of {batch.x.numel():,} words: perplexity {ppl:.3f} after {step} steps"
            if not math.isfinite(ppl):
                break
            optimizer.step()
            optimizer.zero_grad()
    raise RunError(
        f"--overfit: one batch is at perplexity {ppl:.4g} after {step} steps, not below {OVERFIT_PPL}; try another --lr"
        " before anything else"
    )
