"""Log-probabilities of the next word over the whole vocabulary, and the losses that need all of them.

A model with one softmax and one pass over a batch computes its loss faster by `Engine.nll`. `losses` holds the
log-probabilities of only a few tokens at a time and forms their gradient at once, since those of a whole batch would be
the largest tensors of a step several times over.

Shapes: T time steps, B batch, n tokens of a batch, H hidden, V words, K experts.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.autograd import forbid_double_backward

MAX_CHUNK_LOGITS = 1 << 21  # A chunk of several tokens has at most so many logits in each pass.
MIN_CHUNKS = 8  # A batch is divided into about this many chunks for each expert, or more.


def tied(outputs: Tensor, embedding: Tensor, bias: Tensor, compute_dtype: torch.dtype | None = None) -> Tensor:
    """Returns log softmax(outputs @ embedding.T + bias), (n, V). The shapes are outputs (n, H), embedding (V, H) and
    bias (V,). `compute_dtype` is the dtype of the product, None for that of the weights."""
    compute_dtype = compute_dtype or bias.dtype
    return ((outputs.to(compute_dtype) @ embedding.t().to(compute_dtype)).to(bias.dtype) + bias).log_softmax(-1)


def mixed(
    outputs: Tensor, embedding: Tensor, bias: Tensor, prior: Tensor, latent: Tensor, latent_bias: Tensor,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Returns the log-probabilities (n, V) of a mixture of K softmaxes (Yang et al. 2018).

    They are the log of sum_k pi_k softmax(tanh(outputs @ latent_k + latent_bias_k) @ embedding.T + bias) with
    pi = softmax(outputs @ prior). The shapes are outputs (n, H), embedding (V, H), bias (V,), prior (H, K),
    latent (H, K H) and latent_bias (K H,). `compute_dtype` is the dtype of the product with the embedding, None for
    that of the weights.
    """
    K, H = prior.size(1), outputs.size(1)
    log_pi = (outputs @ prior).log_softmax(-1)  # (n, K)
    contexts = torch.tanh(outputs @ latent + latent_bias).view(-1, H)  # (n K, H)
    log_probs = tied(contexts, embedding, bias, compute_dtype).view(-1, K, len(bias))  # (n, K, V)
    return (log_pi[:, :, None] + log_probs).logsumexp(1)


class Mixture(nn.Module):
    """Holds the weights that a mixture of K softmaxes has in addition to the embedding and its bias."""

    def __init__(self, nhid: int, experts: int, init_range: float):
        super().__init__()
        self.prior = nn.Parameter(torch.empty(nhid, experts).uniform_(-init_range, init_range))  # (H, K)
        self.latent = nn.Parameter(torch.empty(nhid, experts * nhid).uniform_(-init_range, init_range))  # (H, K H)
        self.latent_bias = nn.Parameter(torch.zeros(experts * nhid))  # (K H,)


def symmetric_kl(p: Tensor, q: Tensor) -> Tensor:
    """Returns (KL(P || Q) + KL(Q || P)) / 2 in nats, (n,), for the log-probabilities p and q (n, V)."""
    return ((p.exp() - q.exp()) * (p - q)).sum(-1) / 2


def losses(
    log_probs: Callable[..., Tensor], weights: Sequence[Tensor], passes: Sequence[Tensor], y: Tensor, rdrop: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Returns the loss and the mean negative log-likelihood of the words y (T, B), both in nats per word, as scalars.

    The likelihood is the mean over one or two passes. The loss adds `rdrop` times the mean divergence between the two
    (R-Drop, Liang et al. 2021, with the mean of both likelihoods in place of their sum). Only the loss is
    differentiable, and only once: a second derivative raises RuntimeError.

    `passes` are outputs (T, B, H) each, and log_probs(outputs (n, H), *weights) returns log-probabilities (n, V).
    """
    V, experts = len(weights[1]), weights[2].size(1) if len(weights) > 2 else 1
    size = max(1, min(MAX_CHUNK_LOGITS // (V * experts), -(-y.numel() // (MIN_CHUNKS * experts))))

    def chunk_loss(words: Tensor, outputs: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        by_pass = [log_probs(output, *weights) for output in outputs]  # (n, V) each
        total = nll = sum(F.nll_loss(p, words, reduction="sum") for p in by_pass) / (len(by_pass) * y.numel())
        if rdrop:
            total = total + rdrop * symmetric_kl(*by_pass).sum() / y.numel()
        return total, nll.detach()

    outputs = [output.flatten(0, 1) for output in passes]  # (TB, H) each
    return SumOverChunks.apply(chunk_loss, size, torch.is_grad_enabled(), y.flatten(), len(outputs), *outputs, *weights)


class SumOverChunks(torch.autograd.Function):
    """Sums a loss and a figure to report over chunks of the tokens, and forms each chunk's gradient along with it.

    loss(words (n,), outputs of each pass, weights) returns both as scalars, for the `words` of one chunk of `size`
    tokens. `tensors` are the outputs (TB, H) of `n_passes` passes, then the weights; `wants` says whether to form
    gradients.
    """

    @staticmethod
    def forward(ctx, loss, size, wants, words, n_passes, *tensors):
        outputs, weights = tensors[:n_passes], [w.detach().requires_grad_(wants) for w in tensors[n_passes:]]
        ctx.gradients = [torch.zeros_like(tensor) for tensor in tensors] if wants else []
        sums = outputs[0].new_zeros(2)
        for start in range(0, len(words), size):
            chunk = slice(start, start + size)
            with torch.set_grad_enabled(wants):
                chunk_outputs = [output[chunk].detach().requires_grad_(wants) for output in outputs]
                total, reported = loss(words[chunk], chunk_outputs, weights)
                gradients = torch.autograd.grad(total, [*chunk_outputs, *weights]) if wants else []
            for i, gradient in enumerate(gradients):
                (ctx.gradients[i][chunk] if i < n_passes else ctx.gradients[i]).add_(gradient)
            sums += torch.stack([total.detach(), reported.detach()])
        total, reported = sums.unbind()
        ctx.mark_non_differentiable(reported)
        return total, reported

    @staticmethod
    def backward(ctx, g, _):
        forbid_double_backward("mixtures of softmaxes and R-Drop have no second derivative")
        return None, None, None, None, None, *(g * gradient for gradient in ctx.gradients)
