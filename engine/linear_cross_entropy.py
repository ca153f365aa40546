"""The loss of a tied decoder, fast: a few logits at a time, their gradient in their place, and no product with
what dropout has set to zero.

Shapes: T time steps, B batch, H hidden, H' with zeros behind (`factors`), V words.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.autograd import forbid_double_backward, unformed_grad
from engine.dropout import drop
from engine.elementwise import LOG2_E
from engine.inductor import kernel
from engine.matmul import Workspace, add_rows, addmm_, padding

CHUNK = 1 << 25  # bytes of logits held at once, and of their tangents
SKIP_FROM = 128  # hidden units
COPY_FROM = 4096  # words, which make up for copying the decoder
BLOCK = 512  # rows or columns copied at once


def nll(
    hiddens: Tensor,
    mask: Tensor | None,
    embedding: Tensor,
    bias: Tensor,
    y: Tensor,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Mean negative log-likelihood in nats of the words y (T, B) under softmax(outputs @ embedding.T + bias), where
    outputs (T, B, H) are the hidden states times the mask (B, H).

    embedding (V, H), bias (V,); `compute_dtype` is the dtype of products. The gradient is formed with the loss, while
    the logits are at hand, for those arguments that want one. Of the second derivatives there are those in the hidden
    states.
    """
    wants = [torch.is_grad_enabled() and argument.requires_grad for argument in (hiddens, embedding, bias)]
    return TiedDecoder.apply(wants, compute_dtype or hiddens.dtype, hiddens, mask, embedding, bias, y)


class TiedDecoder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, wants, compute_dtype, hiddens, mask, embedding, bias, y):
        skipped = worth_skipping(mask, compute_dtype)
        outputs, decoder = factors(drop(hiddens, mask), embedding, skipped, compute_dtype)  # (T, B, H'), (H', V)
        losses, share = hiddens.new_empty(y.shape), 1 / y.numel()
        by_words = torch.empty(decoder.shape[::-1], device="meta").t()  # only its layout, (H', V)
        alike = outputs, by_words if skipped is None else decoder, bias
        d_outputs, d_decoder, d_bias = (
            torch.zeros_like(like, dtype=dtype, device=y.device) if want else None
            for like, dtype, want in zip(alike, (compute_dtype, bias.dtype, bias.dtype), wants, strict=True)
        )
        for piece in chunks(skipped, *y.shape, decoder):
            part, columns, words = piece.rows(outputs), piece.columns(decoder), piece.words(y)
            logits = piece.take()
            torch.matmul(part, columns, out=logits)
            flat = logits.view(-1, len(bias))
            found = to_softmax(flat, bias, words, share)
            piece.put_losses(losses, found)
            if any(wants):
                subtract_one_hot(flat, words, share)
            if d_bias is not None:
                add_rows(d_bias, flat)
            if d_outputs is not None:
                piece.put(d_outputs, torch.matmul(logits, columns.mT))
            if d_decoder is not None:
                piece.addmm_(d_decoder, part, logits, columns)
        H = hiddens.size(-1)
        d_hiddens = None if d_outputs is None else drop(d_outputs[..., :H].to(hiddens.dtype), mask)
        ctx.compute_dtype, ctx.found = (
            compute_dtype,
            (d_hiddens, None if d_decoder is None else in_rows(d_decoder[:H].t()), d_bias),
        )
        ctx.save_for_backward(hiddens, mask, embedding, bias, y)
        return losses.mean()

    @staticmethod
    def backward(ctx, g):
        hiddens, mask, embedding, bias, y = ctx.saved_tensors
        if torch.is_grad_enabled():
            found = TiedDecoderBack.apply(ctx.compute_dtype, ctx.found, mask, y, g, hiddens, embedding, bias)
        else:
            found = [None if d is None else g * d for d in ctx.found]
        return None, None, found[0], None, *found[1:], None


class TiedDecoderBack(torch.autograd.Function):
    """The way back from the loss, where it is to be differentiated itself: in the hidden states, along everything."""

    @staticmethod
    def forward(ctx, compute_dtype, found, mask, y, g, hiddens, embedding, bias):
        ctx.set_materialize_grads(False)
        ctx.compute_dtype, ctx.found = compute_dtype, found
        ctx.save_for_backward(mask, y, g, hiddens, embedding, bias)
        return tuple(None if d is None else g * d for d in found)

    @staticmethod
    def backward(ctx, *direction):
        forbid_double_backward("third")
        mask, y, g, *inputs = ctx.saved_tensors
        direction = [torch.zeros_like(like) if v is None else v for v, like in zip(direction, inputs, strict=True)]
        d_g = None
        if ctx.needs_input_grad[4]:
            d_g = sum((d * v).sum() for d, v in zip(ctx.found, direction, strict=True) if d is not None)
        of_hiddens = g * r_gradient(*inputs, *direction, mask, y, ctx.compute_dtype)
        return (
            None,
            None,
            None,
            None,
            d_g,
            of_hiddens,
            unformed_grad(inputs[1]),
            None,
        )  # the embedding has another share


def r_gradient(
    hiddens: Tensor,
    embedding: Tensor,
    bias: Tensor,
    v_hiddens: Tensor,
    v_embedding: Tensor,
    v_bias: Tensor,
    mask: Tensor | None,
    y: Tensor,
    compute_dtype: torch.dtype,
) -> Tensor:
    """The tangent of the gradient of `nll` in the hidden states, (T, B, H), as these, the embedding and the bias go
    along the v's (see second_derivative.py)."""
    skipped = worth_skipping(mask, compute_dtype)
    outputs, decoder = factors(drop(hiddens, mask), embedding, skipped, compute_dtype)
    r_outputs, r_decoder = factors(drop(v_hiddens, mask), v_embedding, skipped, compute_dtype)
    found, share = torch.zeros_like(outputs), 1 / y.numel()
    for piece in chunks(skipped, *y.shape, decoder):
        part, columns, r_columns = piece.rows(outputs), piece.columns(decoder), piece.columns(r_decoder)
        logits, r_logits = piece.take(), piece.take()
        torch.matmul(part, columns, out=logits)
        torch.matmul(piece.rows(r_outputs), columns, out=r_logits)
        add_matmul(r_logits, part, r_columns)
        flat, words = logits.view(-1, len(bias)), piece.words(y)
        to_softmax(flat, bias, words, share)
        r_softmax(flat, v_bias, share, r_logits.view_as(flat))
        subtract_one_hot(flat, words, share)
        d = torch.matmul(r_logits, columns.mT)
        add_matmul(d, logits, r_columns.mT)
        piece.put(found, d)
    return drop(found[..., : hiddens.size(-1)].to(hiddens.dtype), mask)


def to_softmax(logits: Tensor, bias: Tensor, words: Tensor, scale: float) -> Tensor:
    """logits (n, V) without their bias become scale * softmax; returns the losses (n,) of the words (n, 1)."""
    losses = bias.new_empty(len(words))
    of_words = logits.gather(1, words).to(bias.dtype) + bias.detach()[words]  # (n, 1)
    softmax(logits, bias.detach(), of_words, scale, losses)
    return losses


def subtract_one_hot(flat: Tensor, words: Tensor, share: float) -> None:
    """Less `share` at the word (n, 1) of each row (n, V). (`scatter_add_` goes through a copy of all rows in bf16.)"""
    flat[torch.arange(len(flat), device=flat.device), words.squeeze(1)] -= share


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, of matrices or batches of them."""
    total.addmm_(a, b) if a.dim() == 2 else total.baddbmm_(a, b)


# The words are taken a piece at a time, of which there are two kinds: a few time steps, or a few rows of the batch with
# the outputs that dropout has left of them. (In a piece, n = words, r = rows, k = outputs kept.)


def factors(
    outputs: Tensor, embedding: Tensor, skipped: Tensor | None, compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The outputs (T, B, H') and the decoder (H', V) in that dtype. This is turned over in memory where it is gathered
    from, and where products are so quick that they would wait for that each time, if there are words enough to make up
    for it. Else both have zeros behind if products want them."""
    outputs, decoder = outputs.to(compute_dtype), embedding.to(compute_dtype)
    enough = outputs.shape[:2].numel() >= COPY_FROM
    if skipped is not None or (enough and has_amx(decoder.device, compute_dtype)):
        return outputs, in_rows(decoder.t())
    if more := padding(decoder, compute_dtype):
        outputs, decoder = F.pad(outputs, (0, more)), F.pad(decoder, (0, more))
    return outputs, decoder.t()


def in_rows(matrix: Tensor) -> Tensor:
    """matrix, contiguous. One that lies in memory column by column torch copies at a fifth of the speed in one go."""
    if matrix.is_contiguous() or matrix.is_cuda:
        return matrix.contiguous()
    rows, longer = torch.empty_like(matrix, memory_format=torch.contiguous_format), int(matrix.size(1) > len(matrix))
    for to, block in zip(rows.split(BLOCK, longer), matrix.split(BLOCK, longer), strict=True):
        to.copy_(block)
    return rows


def chunks(skipped: Tensor | None, T: int, B: int, decoder: Tensor) -> Iterator["Chunk"]:
    """All words (T, B) once, for a decoder (H', V); without products with what the mask `skipped` drops."""
    if skipped is None:
        steps = max(1, CHUNK // (decoder.size(1) * B * decoder.itemsize))
        for t in range(0, T, steps):
            yield TimeChunk(slice(t, t + steps), decoder, min(steps, T - t) * B)
        return
    # What is kept of an output differs from row to row of the batch, but not from time step to time step. A few rows
    # at once, one for each core, that keep about as many; zeros fill up the rest.
    together = torch.get_num_threads()
    counts, rows = (skipped != 0).sum(1).sort()
    kept = skipped[rows].topk(int(counts.max()), dim=1).indices  # (B, k)
    for b in range(0, B, together):
        yield BatchChunk(rows[b : b + together], kept[b : b + together, : counts[b : b + together].max()], decoder, T)


class Chunk:
    def __init__(self, decoder: Tensor, *words: int):
        self.shape, self.space = (*words, decoder.size(1)), Workspace(decoder.dtype, decoder.dtype, decoder.device)

    def take(self) -> Tensor:
        """A buffer for this piece's logits, (..., V)."""
        return self.space.take(*self.shape)


class TimeChunk(Chunk):
    """A few time steps."""

    def __init__(self, steps: slice, decoder: Tensor, n: int):
        super().__init__(decoder, n)
        self.steps = steps

    def rows(self, outputs: Tensor) -> Tensor:
        return outputs[self.steps].flatten(0, 1)  # (n, H')

    def columns(self, decoder: Tensor) -> Tensor:
        return decoder  # (H', V)

    def words(self, y: Tensor) -> Tensor:
        return y[self.steps].reshape(-1, 1)  # (n, 1)

    def put_losses(self, losses: Tensor, found: Tensor) -> None:
        losses[self.steps] = found.view_as(losses[self.steps])

    def put(self, d_outputs: Tensor, d: Tensor) -> None:
        d_outputs[self.steps] = d.view_as(d_outputs[self.steps])

    def addmm_(self, d_decoder: Tensor, part: Tensor, d: Tensor, columns: Tensor) -> None:
        addmm_(d_decoder.t(), d.t(), part)  # (V, H), as it lies in memory


class BatchChunk(Chunk):
    """A few rows of the batch, with the outputs that are kept of each."""

    def __init__(self, rows: Tensor, kept: Tensor, decoder: Tensor, T: int):
        super().__init__(decoder, len(rows), T)
        self.index, self.kept = rows, kept  # (r,), (r, k)
        self.everywhere = kept[:, None, :].expand(-1, T, -1)  # (r, T, k)

    def rows(self, outputs: Tensor) -> Tensor:
        return outputs[:, self.index].transpose(0, 1).gather(2, self.everywhere)  # (r, T, k)

    def columns(self, decoder: Tensor) -> Tensor:
        columns = self.space.take(*self.kept.shape, decoder.size(1))
        torch.index_select(decoder, 0, self.kept.flatten(), out=columns.flatten(0, 1))
        return columns  # (r, k, V)

    def words(self, y: Tensor) -> Tensor:
        return y[:, self.index].t().reshape(-1, 1)  # (rT, 1)

    def put_losses(self, losses: Tensor, found: Tensor) -> None:
        losses[:, self.index] = found.view(len(self.index), -1).t()

    def put(self, d_outputs: Tensor, d: Tensor) -> None:
        filled = d.new_zeros(*d.shape[:2], d_outputs.size(2)).scatter_(2, self.everywhere, d)
        d_outputs[:, self.index] = filled.transpose(0, 1)

    def addmm_(self, d_decoder: Tensor, part: Tensor, d: Tensor, columns: Tensor) -> None:
        torch.bmm(part.mT, d, out=columns)  # which have done their duty
        d_decoder.index_add_(0, self.kept.flatten(), columns.flatten(0, 1).to(d_decoder.dtype))


def worth_skipping(mask: Tensor | None, compute_dtype: torch.dtype) -> Tensor | None:
    """The mask (B, H), if so much is dropped that gathering what is kept pays. Not in a narrow model, where the product
    is the least of it; nor in bf16 on a processor with units for it (AMX), where a whole product costs less than a
    gathering; nor on CUDA, where the host would have to wait to hear how much is dropped."""
    if mask is None or mask.device.type != "cpu" or mask.size(1) < SKIP_FROM or has_amx(mask.device, compute_dtype):
        return None
    return mask if (mask != 0).float().mean().item() < 0.6 else None


def has_amx(device: torch.device, compute_dtype: torch.dtype) -> bool:
    """Whether it is a processor with units for products of that dtype."""
    return device.type == "cpu" and compute_dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()


@kernel
def softmax(logits, bias, of_words, scale, losses):
    """losses (n,) = -log softmax at the words, whose logits (n, 1) are given; logits (n, V) become scale * softmax."""
    z = logits.to(bias.dtype) + bias
    top = z.amax(-1, keepdim=True)
    e = torch.exp2(LOG2_E * (z - top))
    total = e.sum(-1, keepdim=True)
    losses.copy_((total.log() + top - of_words).squeeze(1))
    logits.copy_(e * (scale / total))


@kernel
def r_softmax(p, r_bias, scale, r_logits):
    """The tangent of p = scale * softmax (n, V) in the place of that of the logits without their bias."""
    p, r_z = p.to(r_bias.dtype), r_logits.to(r_bias.dtype) + r_bias
    r_logits.copy_(p * (r_z - (p * r_z).sum(-1, keepdim=True) / scale))
