"""The loss of a tied decoder, fast: a few logits at a time, their gradient in their place, and no product with
what dropout has set to zero.

Shapes: T time steps, B batch, H hidden, V words.
"""

import torch
from torch import Tensor

from dropout import drop
from kernels import LOG2_E, Pool, add_product, first_derivative_only, kernel

POOL = Pool()
CHUNK = 1 << 23  # logits held at once
SKIP_FROM = 128  # hidden units


def nll(
    hiddens: Tensor, mask: Tensor | None, embedding: Tensor, bias: Tensor, y: Tensor, store: torch.dtype | None = None
) -> Tensor:
    """Mean negative log-likelihood in nats of the words y (T, B) under softmax(outputs @ embedding.T + bias), where
    outputs (T, B, H) are the hidden states times the mask (B, H).

    embedding (V, H), bias (V,); `store` is the dtype of products. The gradient is formed with the loss, while
    the logits are at hand, for those arguments that want one.
    """
    wants = [torch.is_grad_enabled() and argument.requires_grad for argument in (hiddens, embedding, bias)]
    return TiedDecoder.apply(wants, store or hiddens.dtype, hiddens, mask, embedding, bias, y)


class TiedDecoder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, wants, store, hiddens, mask, embedding, bias, y):
        (T, B, H), V, device = hiddens.shape, len(embedding), hiddens.device
        outputs, decoder = drop(hiddens, mask).to(store), embedding.t().to(store)  # (T, B, H), (H, V)
        losses = hiddens.new_empty(y.shape)
        d_outputs, d_embedding, d_bias = (
            torch.zeros_like(like, dtype=dtype) if want else None
            for like, dtype, want in zip(
                (outputs, embedding, bias), (store, bias.dtype, bias.dtype), wants, strict=True
            )
        )

        def gradient_of_logits(part: Tensor, columns: Tensor, words: Tensor, losses: Tensor) -> Tensor:
            """part (..., n, k) @ columns (..., k, V) against words (..., n); fills losses (..., n)."""
            logits = POOL.take("logits", (*words.shape, V), store, device)
            torch.matmul(part, columns, out=logits)
            flat, words = logits.view(-1, V), words.reshape(-1, 1)
            of_words = flat.gather(1, words).to(bias.dtype) + bias[words]  # (n, 1)
            found = losses.new_empty(len(words))
            softmax(flat, bias.detach(), of_words, 1 / y.numel(), found)
            losses.copy_(found.view_as(losses))
            if any(wants):
                flat.scatter_add_(1, words, flat.new_full(words.shape, -1 / y.numel()))
            if d_bias is not None:
                d_bias.add_(flat.sum(0, dtype=bias.dtype))
            return logits

        if mask is None or not worth_skipping(mask):
            steps = max(1, CHUNK // (V * B))
            for t in range(0, T, steps):
                part = outputs[t : t + steps].flatten(0, 1)  # (n, H)
                d = gradient_of_logits(part, decoder, y[t : t + steps].flatten(), losses[t : t + steps].flatten())
                if d_outputs is not None:
                    torch.mm(d, decoder.t(), out=d_outputs[t : t + steps].flatten(0, 1))
                if d_embedding is not None:
                    add_product(d_embedding, d.t(), part)
                POOL.give("logits", d)
        else:
            # What is kept of an output differs from row to row of the batch, but not from time step to time step.
            # A few rows at once, one for each core, that keep about as many; zeros fill up the rest.
            decoder, together = decoder.contiguous(), torch.get_num_threads()
            counts, rows = (mask != 0).sum(1).sort()
            kept = mask[rows].topk(int(counts.max()), dim=1).indices  # (B, k)
            d_decoder = None if d_embedding is None else torch.zeros_like(decoder, dtype=bias.dtype)
            for b in range(0, B, together):
                here = kept[b : b + together, : counts[b : b + together].max()]  # (r, k)
                index = here[:, None, :].expand(-1, T, -1)  # (r, T, k)
                r = rows[b : b + together]
                part = outputs[:, r].transpose(0, 1).gather(2, index)  # (r, T, k)
                columns = POOL.take("columns", (*here.shape, V), store, device)
                torch.index_select(decoder, 0, here.flatten(), out=columns.flatten(0, 1))
                losses_here = losses.new_empty(len(r), T)
                d = gradient_of_logits(part, columns, y[:, r].t(), losses_here)
                losses[:, r] = losses_here.t()
                if d_outputs is not None:
                    kept_of_d = d_outputs.new_zeros(len(r), T, H).scatter_(2, index, d @ columns.mT)
                    d_outputs[:, r] = kept_of_d.transpose(0, 1)
                if d_decoder is not None:
                    torch.bmm(part.mT, d, out=columns)
                    d_decoder.index_add_(0, here.flatten(), columns.flatten(0, 1).to(bias.dtype))
                POOL.give("columns", columns)
                POOL.give("logits", d)
            d_embedding = None if d_decoder is None else d_decoder.t().contiguous()

        d_hiddens = None if d_outputs is None else drop(d_outputs.to(hiddens.dtype), mask)
        ctx.found = d_hiddens, d_embedding, d_bias
        return losses.mean()

    @staticmethod
    def backward(ctx, g):
        first_derivative_only()
        d_hiddens, d_embedding, d_bias = (None if d is None else g * d for d in ctx.found)
        return None, None, d_hiddens, None, d_embedding, d_bias, None


def worth_skipping(mask: Tensor) -> bool:
    """Whether so much is dropped that gathering what is kept pays. Not in a narrow model, where the product is
    the least of it, nor on CUDA, where the host would have to wait to hear how much is dropped."""
    return mask.device.type == "cpu" and mask.size(1) >= SKIP_FROM and (mask != 0).float().mean().item() < 0.6


@kernel
def softmax(logits, bias, of_words, scale, losses):
    """losses (n,) = -log softmax at the words, whose logits (n, 1) are given; logits (n, V) become scale * softmax."""
    z = logits.to(bias.dtype) + bias
    top = z.amax(-1, keepdim=True)
    e = torch.exp2(LOG2_E * (z - top))
    total = e.sum(-1, keepdim=True)
    losses.copy_((total.log() + top - of_words).squeeze(1))
    logits.copy_(e * (scale / total))
