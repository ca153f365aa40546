"""Whether a model learns at all: one batch, which any of these can learn by heart, before hours go into a text."""

import math

import torch
from torch import Tensor
from tqdm import tqdm

from architect import WeightUpdate
from data import get_batch
from engine.dropout import Masks
from training.evaluation import perplexity
from training.gradients import clipped_gradient
from training.losses import Batch, MicroBatches
from utils import RunError

KNOWN = 1.5  # perplexity of a batch that is known by heart
STEPS = 2000  # at most


def overfit(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    text: Tensor,
    bptt: int,
    small_batch_size: int,
    update: WeightUpdate,
) -> str:
    """Take steps on the first segment of a text (n, B), without dropout, until its perplexity is below `KNOWN`; returns
    a line that says so. Raises `RunError` if it is not after `STEPS`, or not a number."""
    batch = Batch(*get_batch(text, 0, bptt), model.initial_hidden(text.size(1)), Masks())
    weights, ppl = model.weights(), math.inf
    with tqdm(range(STEPS + 1), desc="one batch", unit="step", leave=False, disable=None, dynamic_ncols=True) as bar:
        for step in bar:
            nll, _, _ = clipped_gradient(MicroBatches(model, batch, small_batch_size), weights, update)
            ppl = perplexity(nll.item())
            bar.set_postfix_str(f"ppl {ppl:.2f}")
            if ppl < KNOWN:
                return f"one batch of {batch.x.numel():,} words: perplexity {ppl:.3f} after {step} steps"
            if not math.isfinite(ppl):
                break
            optimizer.step()
            optimizer.zero_grad()
    raise RunError(
        f"--overfit: one batch is at perplexity {ppl:.4g} after {step} steps, not below {KNOWN}; try another --lr"
        " before anything else"
    )
