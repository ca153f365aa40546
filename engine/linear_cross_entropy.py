"""The fast loss of a tied decoder: it computes a few logits at a time, replaces them by their gradient in place, and
skips products with what dropout has set to zero.

The target words are processed in chunks of two kinds: a few time steps of the whole batch, or a few batch elements with
the hidden units that dropout has left them. Shapes: T time steps, B batch, H hidden, H' hidden with padding
(`logit_factors`), V words; in a chunk n target words, r batch elements, k hidden units left.
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

# These numbers were measured (benchmarks/NOTES.md).
MAX_CHUNK_BYTES = 1 << 25  # A chunk of several time steps or batch elements has at most so many bytes of logits.
SKIP_FROM = 128  # From this number of hidden units on, skipping what dropout has set to zero can pay.
COPY_FROM = 4096  # From this number of target words on, transposing the decoder in memory can pay.
BLOCK = 512  # `row_major` copies so many rows or columns of a matrix at once.


def nll(
    hiddens: Tensor, mask: Tensor | None, embedding: Tensor, bias: Tensor, y: Tensor,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Returns the mean negative log-likelihood, in nats per word, of the target words y (T, B), a scalar.

    The probabilities are softmax(outputs @ embedding.T + bias), where outputs (T, B, H) are the hidden states times
    the mask (B, H), with embedding (V, H) and bias (V,). `compute_dtype` is the dtype of products, by default that of
    the hidden states. The gradient is computed together with the loss, while the logits are in memory, for those
    arguments that require one. The only second derivatives are those with respect to the hidden states; a third
    derivative raises RuntimeError.
    """
    wants = [torch.is_grad_enabled() and argument.requires_grad for argument in (hiddens, embedding, bias)]
    return TiedDecoder.apply(wants, compute_dtype or hiddens.dtype, hiddens, mask, embedding, bias, y)


class TiedDecoder(torch.autograd.Function):
    """`nll` and its gradient, computed together; the backward pass only multiplies the gradient by its argument."""

    @staticmethod
    def forward(ctx, wants, compute_dtype, hiddens, mask, embedding, bias, y):
        sparse_mask = mask_if_sparse(mask, compute_dtype)
        # The outputs are (T, B, H'), the decoder is (H', V).
        outputs, decoder = logit_factors(drop(hiddens, mask), embedding, sparse_mask, compute_dtype)
        losses, scale = hiddens.new_empty(y.shape), 1 / y.numel()
        by_words = torch.empty(decoder.shape[::-1], device="meta").t()  # (H', V), without storage, for its layout alone
        alike = outputs, by_words if sparse_mask is None else decoder, bias
        d_outputs, d_decoder, d_bias = (
            torch.zeros_like(like, dtype=dtype, device=y.device) if want else None
            for like, dtype, want in zip(alike, (compute_dtype, bias.dtype, bias.dtype), wants, strict=True)
        )
        for chunk in chunks(sparse_mask, *y.shape, decoder):
            part, columns, words = chunk.rows(outputs), chunk.columns(decoder), chunk.words(y)
            logits = chunk.take()
            torch.matmul(part, columns, out=logits)
            flat = logits.view(-1, len(bias))
            chunk_losses = to_softmax(flat, bias, words, scale)
            chunk.put_losses(losses, chunk_losses)
            if any(wants):
                subtract_one_hot(flat, words, scale)
            if d_bias is not None:
                add_rows(d_bias, flat)
            if d_outputs is not None:
                chunk.put(d_outputs, torch.matmul(logits, columns.mT))
            if d_decoder is not None:
                chunk.addmm_(d_decoder, part, logits, columns)
        H = hiddens.size(-1)
        d_hiddens = None if d_outputs is None else drop(d_outputs[..., :H].to(hiddens.dtype), mask)
        d_embedding = None if d_decoder is None else row_major(d_decoder[:H].t())
        ctx.compute_dtype, ctx.gradients = compute_dtype, (d_hiddens, d_embedding, d_bias)
        ctx.save_for_backward(hiddens, mask, embedding, bias, y)
        return losses.mean()

    @staticmethod
    def backward(ctx, g):
        hiddens, mask, embedding, bias, y = ctx.saved_tensors
        if torch.is_grad_enabled():
            gradients = TiedDecoderBack.apply(ctx.compute_dtype, ctx.gradients, mask, y, g, hiddens, embedding, bias)
        else:
            gradients = [None if d is None else g * d for d in ctx.gradients]
        return None, None, gradients[0], None, *gradients[1:], None


class TiedDecoderBack(torch.autograd.Function):
    """The backward pass of `TiedDecoder`, for when it is itself to be differentiated.

    Its own `backward` takes a direction in the hidden states (T, B, H), the embedding (V, H) and the bias (V,), and
    returns g times the derivative, along this direction, of the gradient with respect to the hidden states
    (`r_gradient`). For the embedding and the bias it returns NaNs (`unformed_grad`). A third derivative raises
    RuntimeError.
    """

    @staticmethod
    def forward(ctx, compute_dtype, gradients, mask, y, g, hiddens, embedding, bias):
        ctx.set_materialize_grads(False)
        ctx.compute_dtype, ctx.gradients = compute_dtype, gradients
        ctx.save_for_backward(mask, y, g, hiddens, embedding, bias)
        return tuple(None if d is None else g * d for d in gradients)

    @staticmethod
    def backward(ctx, *direction):
        forbid_double_backward("the fused engine has no third derivative here; use the eager engine")
        mask, y, g, *inputs = ctx.saved_tensors
        direction = [torch.zeros_like(like) if v is None else v for v, like in zip(direction, inputs, strict=True)]
        d_g = None
        if ctx.needs_input_grad[4]:
            d_g = sum((d * v).sum() for d, v in zip(ctx.gradients, direction, strict=True) if d is not None)
        d_hiddens = g * r_gradient(*inputs, *direction, mask, y, ctx.compute_dtype)
        return None, None, None, None, d_g, d_hiddens, *map(unformed_grad, inputs[1:])


def r_gradient(
    hiddens: Tensor, embedding: Tensor, bias: Tensor, v_hiddens: Tensor, v_embedding: Tensor, v_bias: Tensor,
    mask: Tensor | None, y: Tensor, compute_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Returns the tangent of the gradient of `nll` with respect to the hidden states, (T, B, H).

    It is the derivative of that gradient as the hidden states (T, B, H), the embedding (V, H) and the bias (V,) move
    along `v_hiddens`, `v_embedding` and `v_bias` of the same shapes (see second_derivative.py). The prefix r_ marks
    tangents.
    """
    sparse_mask = mask_if_sparse(mask, compute_dtype)
    outputs, decoder = logit_factors(drop(hiddens, mask), embedding, sparse_mask, compute_dtype)
    r_outputs, r_decoder = logit_factors(drop(v_hiddens, mask), v_embedding, sparse_mask, compute_dtype)
    d_outputs, scale = torch.zeros_like(outputs), 1 / y.numel()
    for chunk in chunks(sparse_mask, *y.shape, decoder):
        part, columns, r_columns = chunk.rows(outputs), chunk.columns(decoder), chunk.columns(r_decoder)
        logits, r_logits = chunk.take(), chunk.take()
        torch.matmul(part, columns, out=logits)
        torch.matmul(chunk.rows(r_outputs), columns, out=r_logits)
        addmm_(r_logits, part, r_columns)
        flat, words = logits.view(-1, len(bias)), chunk.words(y)
        to_softmax(flat, bias, words, scale)
        r_softmax(flat, v_bias, scale, r_logits.view_as(flat))
        subtract_one_hot(flat, words, scale)
        d = torch.matmul(r_logits, columns.mT)
        addmm_(d, logits, r_columns.mT)
        chunk.put(d_outputs, d)
    return drop(d_outputs[..., : hiddens.size(-1)].to(hiddens.dtype), mask)


def to_softmax(logits: Tensor, bias: Tensor, words: Tensor, scale: float) -> Tensor:
    """Replaces logits (n, V), which lack their bias (V,), by scale * softmax(logits + bias) in place. Returns the
    negative log-likelihoods (n,) in nats of the target words (n, 1)."""
    losses = bias.new_empty(len(words))
    target_logits = logits.gather(1, words).to(bias.dtype) + bias.detach()[words]  # (n, 1)
    softmax(logits, bias.detach(), target_logits, scale, losses)
    return losses


def subtract_one_hot(flat: Tensor, words: Tensor, scale: float) -> None:
    """Subtracts `scale` in place from the entry of each row of `flat` (n, V) at its target word, of `words` (n, 1),
    without `scatter_add_`, which in bf16 makes a copy of the whole matrix."""
    flat[torch.arange(len(flat), device=flat.device), words.squeeze(1)] -= scale


def logit_factors(
    outputs: Tensor, embedding: Tensor, sparse_mask: Tensor | None, compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns the outputs (T, B, H') and the decoder (H', V), the factors of the logits, in `compute_dtype`.

    The arguments are the outputs (T, B, H), the embedding (V, H) and what `mask_if_sparse` returns. The decoder is
    transposed in memory if its rows are to be gathered (with a mask). It also is on a CPU with AMX, whose fast products
    would otherwise wait for the transposition each time, if the target words are enough to make up for the copy
    (`COPY_FROM`). In both cases H' = H. Otherwise both factors are padded as `padding` requires.
    """
    outputs, decoder = outputs.to(compute_dtype), embedding.to(compute_dtype)
    enough = outputs.shape[:2].numel() >= COPY_FROM
    if sparse_mask is not None or (enough and has_amx(decoder.device, compute_dtype)):
        return outputs, row_major(decoder.t())
    if more := padding(decoder, compute_dtype):
        outputs, decoder = F.pad(outputs, (0, more)), F.pad(decoder, (0, more))
    return outputs, decoder.t()


def row_major(matrix: Tensor) -> Tensor:
    """Returns the matrix contiguous, row by row in memory. On a CPU it is copied in blocks, since torch copies a matrix
    that lies in memory column by column at a fifth of the speed if it is copied as a whole."""
    if matrix.is_contiguous() or matrix.is_cuda:
        return matrix.contiguous()
    rows, longer = torch.empty_like(matrix, memory_format=torch.contiguous_format), int(matrix.size(1) > len(matrix))
    for to, block in zip(rows.split(BLOCK, longer), matrix.split(BLOCK, longer), strict=True):
        to.copy_(block)
    return rows


def chunks(sparse_mask: Tensor | None, T: int, B: int, decoder: Tensor) -> Iterator["Chunk"]:
    """Yields chunks that contain every target word (T, B) once, for a decoder (H', V). With a `sparse_mask` (B, H),
    the chunks leave the hidden units that it drops out of the products."""
    if sparse_mask is None:
        steps = max(1, MAX_CHUNK_BYTES // (decoder.size(1) * B * decoder.itemsize))
        for t in range(0, T, steps):
            yield TimeChunk(slice(t, t + steps), decoder, min(steps, T - t) * B)
        return
    # The hidden units that are left differ between batch elements, but not between time steps. A chunk has one batch
    # element for each thread, or fewer if their logits are too many. They are sorted so that those of one chunk have
    # about as many units left; dropped units, whose outputs are 0, pad the others to the largest number.
    together = max(1, min(torch.get_num_threads(), MAX_CHUNK_BYTES // (T * decoder.size(1) * decoder.itemsize)))
    counts, elements = (sparse_mask != 0).sum(1).sort()
    units = sparse_mask[elements].topk(int(counts.max()), dim=1).indices  # (B, k)
    for b in range(0, B, together):
        yield BatchChunk(
            elements[b : b + together], units[b : b + together, : counts[b : b + together].max()], decoder, T
        )


class Chunk:
    """Selects its part of the outputs (`rows`), the decoder (`columns`) and the target words (`words`), and puts its
    part of the losses (`put_losses`), of the outputs' gradient (`put`) and of the decoder's (`addmm_`) in place."""

    def __init__(self, decoder: Tensor, *words: int):
        self.shape, self.space = (*words, decoder.size(1)), Workspace(decoder.dtype, decoder.dtype, decoder.device)

    def take(self) -> Tensor:
        """Returns an uninitialised buffer for the logits of this chunk, (..., V)."""
        return self.space.take(*self.shape)


class TimeChunk(Chunk):
    """A chunk of a few time steps of the whole batch, n target words."""

    def __init__(self, steps: slice, decoder: Tensor, n: int):
        super().__init__(decoder, n)
        self.steps = steps

    def rows(self, outputs: Tensor) -> Tensor:
        return outputs[self.steps].flatten(0, 1)  # (n, H')

    def columns(self, decoder: Tensor) -> Tensor:
        return decoder  # (H', V)

    def words(self, y: Tensor) -> Tensor:
        return y[self.steps].reshape(-1, 1)  # (n, 1)

    def put_losses(self, losses: Tensor, chunk_losses: Tensor) -> None:
        losses[self.steps] = chunk_losses.view_as(losses[self.steps])

    def put(self, d_outputs: Tensor, d: Tensor) -> None:
        d_outputs[self.steps] = d.view_as(d_outputs[self.steps])

    def addmm_(self, d_decoder: Tensor, part: Tensor, d: Tensor, columns: Tensor) -> None:
        addmm_(d_decoder.t(), d.t(), part)  # (V, H'), the layout that it has in memory


class BatchChunk(Chunk):
    """A chunk of r batch elements at all time steps, with the k hidden units that dropout has left each of them."""

    def __init__(self, elements: Tensor, units: Tensor, decoder: Tensor, T: int):
        super().__init__(decoder, len(elements), T)
        self.index, self.units = elements, units  # (r,), (r, k)
        self.everywhere = units[:, None, :].expand(-1, T, -1)  # (r, T, k)

    def rows(self, outputs: Tensor) -> Tensor:
        return outputs[:, self.index].transpose(0, 1).gather(2, self.everywhere)  # (r, T, k)

    def columns(self, decoder: Tensor) -> Tensor:
        columns = self.space.take(*self.units.shape, decoder.size(1))
        torch.index_select(decoder, 0, self.units.flatten(), out=columns.flatten(0, 1))
        return columns  # (r, k, V)

    def words(self, y: Tensor) -> Tensor:
        return y[:, self.index].t().reshape(-1, 1)  # (rT, 1)

    def put_losses(self, losses: Tensor, chunk_losses: Tensor) -> None:
        losses[:, self.index] = chunk_losses.view(len(self.index), -1).t()

    def put(self, d_outputs: Tensor, d: Tensor) -> None:
        filled = d.new_zeros(*d.shape[:2], d_outputs.size(2)).scatter_(2, self.everywhere, d)
        d_outputs[:, self.index] = filled.transpose(0, 1)

    def addmm_(self, d_decoder: Tensor, part: Tensor, d: Tensor, columns: Tensor) -> None:
        torch.bmm(part.mT, d, out=columns)  # The columns are no longer needed.
        d_decoder.index_add_(0, self.units.flatten(), columns.flatten(0, 1).to(d_decoder.dtype))


def mask_if_sparse(mask: Tensor | None, compute_dtype: torch.dtype) -> Tensor | None:
    """Returns the mask (B, H) if it drops so much that gathering the remaining hidden units pays, else None.

    That is less than 60 % remaining. It does not pay in a narrow model (below `SKIP_FROM`), where the product is the
    smallest part of the cost; nor in bf16 on a processor with AMX, where a whole product costs less than gathering; nor
    on CUDA, where the host would have to wait for the number of dropped units.
    """
    if mask is None or mask.device.type != "cpu" or mask.size(1) < SKIP_FROM or has_amx(mask.device, compute_dtype):
        return None
    return mask if (mask != 0).float().mean().item() < 0.6 else None


def has_amx(device: torch.device, compute_dtype: torch.dtype) -> bool:
    """Returns whether the device is a CPU with AMX, units for bfloat16 products, and `compute_dtype` is bfloat16."""
    return device.type == "cpu" and compute_dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()


@kernel
def softmax(logits, bias, target_logits, scale, losses):
    """Writes -log softmax(logits + bias) at the target words to `losses` (n,), and scale * softmax to `logits` (n, V).
    `target_logits` (n, 1) are the logits of the target words with their bias, and bias is (V,)."""
    z = logits.to(bias.dtype) + bias
    top = z.amax(-1, keepdim=True)
    e = torch.exp2(LOG2_E * (z - top))
    total = e.sum(-1, keepdim=True)
    losses.copy_((total.log() + top - target_logits).squeeze(1))
    logits.copy_(e * (scale / total))


@kernel
def r_softmax(p, r_bias, scale, r_logits):
    """Replaces `r_logits` (n, V), the tangent of the logits without bias, by the tangent of p = scale * softmax (n, V).
    `r_bias` (V,) is the tangent of the bias."""
    p, r_z = p.to(r_bias.dtype), r_logits.to(r_bias.dtype) + r_bias
    r_logits.copy_(p * (r_z - (p * r_z).sum(-1, keepdim=True) / scale))
