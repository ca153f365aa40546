"""Log-probabilities of the next word over the whole vocabulary, and the losses that need all of them.

A model with one softmax and one pass over a batch takes a quicker way to its loss (`Engine.nll`). What is here holds
the log-probabilities of a few rows at a time and forms their gradient at once: those of a whole batch would be the
largest tensors of a step several times over.

Shapes: T time steps, B batch, n rows (tokens of a batch), H hidden, V words, K experts.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.autograd import forbid_double_backward

CHUNK = 1 << 21  # logits at once
PIECES = 8  # at least: all that is held of one is then about what a plain loss holds of the whole


def tied(outputs: Tensor, embedding: Tensor, bias: Tensor, compute_dtype: torch.dtype | None = None) -> Tensor:
    """log softmax(outputs @ embedding.T + bias): outputs (n, H), embedding (V, H), bias (V,) -> (n, V).

    `compute_dtype` is the dtype of the product, None for that of the weights.
    """
    compute_dtype = compute_dtype or bias.dtype
    return ((outputs.to(compute_dtype) @ embedding.t().to(compute_dtype)).to(bias.dtype) + bias).log_softmax(-1)


def mixed(
    outputs: Tensor, embedding: Tensor, bias: Tensor, prior: Tensor, latent: Tensor, latent_bias: Tensor,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """The log of sum_k pi_k softmax(tanh(outputs @ latent_k + latent_bias_k) @ embedding.T + bias) with
    pi = softmax(outputs @ prior) (Yang et al. 2018), (n, V).

    outputs (n, H), embedding (V, H), bias (V,), prior (H, K), latent (H, K H), latent_bias (K H,).
    """
    K, H = prior.size(1), outputs.size(1)
    share = (outputs @ prior).log_softmax(-1)  # (n, K)
    contexts = torch.tanh(outputs @ latent + latent_bias).view(-1, H)  # (n K, H)
    log_probs = tied(contexts, embedding, bias, compute_dtype).view(-1, K, len(bias))  # (n, K, V)
    return (share[:, :, None] + log_probs).logsumexp(1)


class Mixture(nn.Module):
    """The weights that a mixture of K softmaxes has beside the embedding and its bias."""

    def __init__(self, nhid: int, experts: int, initrange: float):
        super().__init__()
        self.prior = nn.Parameter(torch.empty(nhid, experts).uniform_(-initrange, initrange))  # (H, K)
        self.latent = nn.Parameter(torch.empty(nhid, experts * nhid).uniform_(-initrange, initrange))  # (H, K H)
        self.latent_bias = nn.Parameter(torch.zeros(experts * nhid))  # (K H,)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """(KL(P || Q) + KL(Q || P)) / 2 of log-probabilities p and q (n, V), summed over words: (n,)."""
    return ((p.exp() - q.exp()) * (p - q)).sum(-1) / 2


def losses(
    log_probs: Callable[..., Tensor], weights: Sequence[Tensor], passes: Sequence[Tensor], y: Tensor, rdrop: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(total, nll): the mean negative log-likelihood (nats) of the words y (T, B) over one or two passes, and in
    `total` also `rdrop` times the mean divergence of the two (R-Drop, Liang et al. 2021, with the mean of both
    likelihoods in the place of their sum).

    passes: outputs (T, B, H) each. log_probs(outputs (n, H), *weights) -> (n, V). Of `nll` there is no gradient.
    """
    V, experts = len(weights[1]), weights[2].size(1) if len(weights) > 2 else 1
    size = max(1, min(CHUNK // (V * experts), -(-y.numel() // (PIECES * experts))))

    def of_rows(words: Tensor, outputs: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        found = [log_probs(part, *weights) for part in outputs]  # (n, V) each
        total = nll = sum(F.nll_loss(p, words, reduction="sum") for p in found) / (len(found) * y.numel())
        if rdrop:
            total = total + rdrop * divergence(*found).sum() / y.numel()
        return total, nll.detach()

    rows = [output.flatten(0, 1) for output in passes]  # (TB, H) each
    return InPieces.apply(of_rows, size, torch.is_grad_enabled(), y.flatten(), len(rows), *rows, *weights)


class InPieces(torch.autograd.Function):
    """The sums of (loss, what is reported of it) over pieces of the rows; the gradient of a piece is formed with it."""

    @staticmethod
    def forward(ctx, loss, size, wants, words, passes, *tensors):
        rows, weights = tensors[:passes], [w.detach().requires_grad_(wants) for w in tensors[passes:]]
        ctx.found = [torch.zeros_like(tensor) for tensor in tensors] if wants else []
        sums = rows[0].new_zeros(2)
        for start in range(0, len(words), size):
            here = slice(start, start + size)
            with torch.set_grad_enabled(wants):
                parts = [part[here].detach().requires_grad_(wants) for part in rows]
                found = loss(words[here], parts, weights)
                gradients = torch.autograd.grad(found[0], [*parts, *weights]) if wants else []
            for i, gradient in enumerate(gradients):
                (ctx.found[i][here] if i < passes else ctx.found[i]).add_(gradient)
            sums += torch.stack([part.detach() for part in found])
        total, reported = sums.unbind()
        ctx.mark_non_differentiable(reported)
        return total, reported

    @staticmethod
    def backward(ctx, g, _):
        forbid_double_backward("second")
        return None, None, None, None, None, *(g * gradient for gradient in ctx.found)
