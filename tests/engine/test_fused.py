"""The fused engine matches the reference engine in every value and every gradient, for both cells and the loss."""

from contextlib import contextmanager
from math import prod

import pytest
import tiny
import torch
from helpers import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from engine import Engine, fused, linear_cross_entropy, matmul, reference
from engine.dropout import FrozenReLU
from genotypes import DARTS_V1, PRIMITIVES, random_genotype
from training.losses import losses

CELLS = ("relaxed", "discrete")
# The discrete cell ignores the norm.
NORMED_CELLS = [*(("relaxed", norm) for norm in reference.NORMS), ("discrete", "batch")]
normed = pytest.mark.parametrize(("cell", "norm"), NORMED_CELLS)
norms = st.sampled_from(reference.NORMS)
sizes = st.fixed_dictionaries(
    {
        "T": st.integers(1, 4), "B": st.integers(1, 5), "E": st.integers(1, 4), "H": st.integers(1, 5),
        "N": st.integers(1, 8), "seed": st.integers(0, 10**6), "masked": st.booleans(),
    }
)  # fmt: skip


alignments = st.sampled_from([1, 3, 16])


@contextmanager
def aligned_to(alignment):
    """Pads the hidden states of either cell with zeros to a multiple of `alignment`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "ALIGNMENT", alignment)
        patch.setattr(fused, "padding", lambda matrix, compute_dtype: -matrix.size(-1) % alignment)
        yield


def problem(T, B, E, H, N, seed, masked, scale=0.7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    leaves = {
        "x": normal(T, B, E), "h0": normal(B, H), "W0": normal(E + H, 2 * H, scale=scale),
        "Ws": normal(N, H, 2 * H, scale=scale), "alpha": normal(N * (N + 1) // 2, len(PRIMITIVES)),
    }  # fmt: skip
    masks = [torch.randint(2, (B, n), generator=generator).to(dtype) * 2 if masked else None for n in (E, H)]
    return leaves, masks, normal(T, B, H)


def run(module, cell, leaves, masks, seed=0, frozen=None, norm="batch"):
    x, h0, W0, Ws, alpha = leaves.values()
    if cell == "relaxed":
        return module.relaxed(x, h0, W0, list(Ws), alpha.softmax(-1), *masks, frozen, norm)
    return module.discrete(x, h0, W0, list(Ws), *random_genotype(seed, len(Ws)), *masks)


def values_and_gradients(module, cell, leaves, masks, R, seed=0, frozen=None, norm="batch"):
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    out = run(module, cell, leaves, masks, seed, frozen, norm)
    actual = torch.autograd.grad((out * R).sum(), list(leaves.values()), allow_unused=True)
    return {"hiddens": out.detach(), **dict(zip(leaves, actual, strict=True))}


def assert_equal(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None or not actual[name].any(), name
        else:
            scale = value.abs().max().item()
            torch.testing.assert_close(actual[name], value, rtol=tolerance, atol=tolerance * (1 + scale), msg=name)


@normed
@settings(max_examples=examples(60))
@given(size=sizes, alignment=alignments)
def test_fused_matches_eager_in_float64(cell, norm, size, alignment):
    leaves, masks, R = problem(**size)
    with aligned_to(alignment):
        actual = values_and_gradients(fused, cell, leaves, masks, R, size["seed"], norm=norm)
    assert_equal(actual, values_and_gradients(reference, cell, leaves, masks, R, size["seed"], norm=norm), 1e-9)


def padded(frozen):
    """Pads the active sets of `frozen` with zeros, as the fused engine pads its hidden states."""
    other = FrozenReLU()
    other.active = {
        place: F.pad(active, (0, -active.size(-1) % matmul.ALIGNMENT)) for place, active in frozen.active.items()
    }
    return other


def relative_errors(actual, exact):
    return {k: ((actual[k].double() - v).norm() / (v.norm() + 1e-30)).item() for k, v in exact.items() if v is not None}


@normed
@settings(max_examples=examples(25))
@given(
    T=st.integers(1, 6), B=st.integers(8, 20), H=st.integers(4, 24), seed=st.integers(0, 10**6), masked=st.booleans()
)
def test_fused_fp32_error_is_comparable_to_eager(cell, norm, T, B, H, seed, masked):
    """The bound is 1e-5 or, where a random cell is too steep for fp32 to reach that, 4 times the error of eager.

    The active set of relu is that of float64, because rounding decides near a kink and neither engine is nearer there.
    """
    frozen = FrozenReLU() if cell == "relaxed" else None
    exact_leaves, masks, R = problem(T, B, H, H, 8, seed, masked, scale=0.2)
    exact = values_and_gradients(reference, cell, exact_leaves, masks, R, seed, frozen, norm)
    leaves = {name: leaf.float() for name, leaf in exact_leaves.items()}
    masks, R = [None if mask is None else mask.float() for mask in masks], R.float()
    eager, actual = (
        relative_errors(values_and_gradients(m, cell, leaves, masks, R, seed, relu, norm), exact)
        for m, relu in ((reference, frozen), (fused, frozen and padded(frozen)))
    )
    assert all(actual[name] <= max(1e-5, 4 * eager[name]) for name in actual), (actual, eager)


@pytest.mark.parametrize("cell", CELLS)
def test_hidden_states_are_padded_to_the_alignment(cell):
    leaves, masks, _ = problem(2, 3, 3, 4, 3, seed=1, masked=False)
    leaves["W0"].requires_grad_()
    for alignment, width in ((1, 4), (3, 6)):
        with aligned_to(alignment):
            assert run(fused, cell, leaves, masks)._base.size(-1) == width


def test_padding_by_width_dtype_and_device():
    matrix = torch.empty(2, 300)
    assert matmul.padding(matrix, torch.bfloat16) == 4
    assert matmul.padding(matrix[:, :288], torch.bfloat16) == 0
    assert matmul.padding(matrix, torch.float32) == 0
    assert matmul.padding(matrix.to("meta"), torch.float32) == 4  # every device except the CPU pads fp32


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("size", [(2, 3, 2, 3, 2), (1, 2, 2, 2, 3), (2, 1, 2, 2, 2)])
@normed
def test_fused_cell_passes_gradcheck(cell, norm, size, masked):
    leaves, masks, _ = problem(*size, seed=4, masked=masked)
    names = [name for name in leaves if cell == "relaxed" or name != "alpha"]
    inputs = [leaves[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *args: run(fused, cell, {**leaves, **dict(zip(names, args, strict=True))}, masks, norm=norm), inputs
    )


@normed
def test_weight_gradients_match_summed_after_or_within_the_loop(cell, norm, monkeypatch):
    """CUDA and small cells sum weight gradients after the loop; a large cell on a CPU sums them within it."""
    leaves, masks, R = problem(4, 3, 3, 4, 5, seed=1, masked=True)
    after = values_and_gradients(fused, cell, leaves, masks, R, norm=norm)  # the default for a small cell
    monkeypatch.setattr(fused, "sum_after_loop", lambda h: False)
    assert_equal(values_and_gradients(fused, cell, leaves, masks, R, norm=norm), after, 1e-12)


def test_frozen_relu_active_set_matches_eager():
    leaves, masks, R = problem(3, 4, 3, 4, 4, seed=2, masked=True)
    elsewhere = {name: leaf + 0.3 for name, leaf in leaves.items()}
    actual = {}
    for module in (fused, reference):
        frozen = FrozenReLU()
        actual[module] = [
            values_and_gradients(module, "relaxed", where, masks, R, frozen=frozen) for where in (leaves, elsewhere)
        ]
    for one, other in zip(actual[fused], actual[reference], strict=True):
        assert_equal(one, other, 1e-9)
    free = values_and_gradients(reference, "relaxed", elsewhere, masks, R)
    assert not torch.allclose(free["hiddens"], actual[fused][1]["hiddens"])


@pytest.mark.parametrize("cell", CELLS)
def test_concurrent_graphs_do_not_share_buffers(cell):
    first, second = (problem(3, 4, 3, 4, 3, seed=seed, masked=True) for seed in (1, 2))
    alone = [values_and_gradients(fused, cell, *p) for p in (first, second)]
    graphs = []
    for leaves, masks, R in (first, second):
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
        graphs.append((leaves, (run(fused, cell, leaves, masks) * R).sum()))
    for (leaves, total), expected in zip(graphs, alone, strict=True):
        actual = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        for name, value in zip(leaves, actual, strict=True):
            assert value is expected[name] or torch.equal(value, expected[name])


@normed
def test_no_grad_forward_is_bit_identical_and_saves_nothing(cell, norm):
    leaves, masks, _ = problem(4, 3, 3, 4, 3, seed=1, masked=False)
    wanted = run(fused, cell, {name: leaf.requires_grad_() for name, leaf in leaves.items()}, masks, norm=norm)
    with torch.no_grad():
        free = run(fused, cell, leaves, masks, norm=norm)
    assert torch.equal(wanted, free)
    assert not free.requires_grad


def test_second_derivative_of_discrete_cell_raises():
    """test_second_derivative.py tests the second derivative of the relaxed cell, which is supported."""
    leaves, masks, _ = problem(2, 3, 3, 4, 3, seed=1, masked=False)
    total = run(fused, "discrete", {name: leaf.requires_grad_() for name, leaf in leaves.items()}, masks).sum()
    with pytest.raises(RuntimeError, match="eager"):
        torch.autograd.grad(total, leaves["W0"], create_graph=True)


# The loss.


def decoder_problem(T, B, H, V, seed, p):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    mask = None if p is None else (torch.rand(B, H, generator=generator) >= p).double() * 3
    return normal(T, B, H), mask, normal(V, H), normal(V), torch.randint(V, (T, B), generator=generator)


def loss_and_gradients(engine, hiddens, mask, embedding, bias, y):
    leaves = [leaf.clone().requires_grad_() for leaf in (hiddens, embedding, bias)]
    total = engine.nll(leaves[0], mask, *leaves[1:], y)
    return [total.detach(), *torch.autograd.grad(3 * total, leaves)]


decoder_sizes = st.fixed_dictionaries(
    {
        "T": st.integers(1, 5), "B": st.integers(1, 6), "H": st.integers(1, 6), "V": st.integers(1, 12),
        "seed": st.integers(0, 10**6), "p": st.sampled_from([None, 0.0, 0.3, 0.75, 1.0]),
    }
)  # fmt: skip


@pytest.mark.parametrize("threads", [1, 16])
@pytest.mark.parametrize("skips", [True, False])
def test_no_chunk_has_more_logits_than_the_bound(threads, skips, monkeypatch):
    """The bound is that of the module, or the logits of one time step or one batch element."""
    T, B, V, H = 35, 40, 20_000, 4
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    skipped = (torch.rand(B, H) < 0.5).float() if skips else None
    sizes = [
        prod(chunk.shape) * 4 for chunk in linear_cross_entropy.chunks(skipped, T, B, torch.empty(H, V, device="meta"))
    ]
    assert sum(sizes) == 4 * T * B * V
    assert max(sizes) <= max(linear_cross_entropy.MAX_CHUNK_BYTES, 4 * B * V, 4 * T * V)


chunks = st.sampled_from([1, 160, 1 << 25])
paddings = st.sampled_from([0, 3])


@contextmanager
def chunked_by(chunk, more=0):
    """Holds at most `chunk` bytes of logits at once and pads the outputs with `more` zeros. Columns are skipped where
    much is dropped, even if there are few of them, and weights are copied in blocks of 5 rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_cross_entropy, "MAX_CHUNK_BYTES", chunk)
        patch.setattr(linear_cross_entropy, "SKIP_FROM", 1)
        patch.setattr(linear_cross_entropy, "BLOCK", 5)
        patch.setattr(linear_cross_entropy, "padding", lambda matrix, compute_dtype: more)
        yield


@settings(max_examples=examples(60))
@given(size=decoder_sizes, chunk=chunks, more=paddings)
def test_fused_loss_matches_eager_with_dropout(size, chunk, more):
    """The cases cover skipped columns (where much is dropped), one and several chunks, and padded outputs."""
    arguments = decoder_problem(**size)
    with chunked_by(chunk, more):
        actual = loss_and_gradients(Engine("fused"), *arguments)
    for one, other in zip(actual, loss_and_gradients(Engine("eager"), *arguments), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("amx", "copied"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("chunk", [1, 1 << 25])
def test_bf16_loss_is_within_rounding_error(monkeypatch, amx, copied, chunk):
    """A processor with AMX tiles skips no columns in bf16. The weight is tested copied and as a strided view."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(linear_cross_entropy, "COPY_FROM", 48 if copied else 49)
    *floats, y = decoder_problem(6, 8, 13, 30, 0, 0.75)
    hiddens, mask, embedding, bias = (a.float() for a in floats)
    arguments = 0.3 * hiddens, mask, 0.3 * embedding, bias, y
    with chunked_by(chunk, more=3):
        skipped = linear_cross_entropy.mask_if_sparse(mask, torch.bfloat16)
        assert (skipped is None) == amx
        outputs, weight = linear_cross_entropy.logit_factors(hiddens, embedding, skipped, torch.bfloat16)
        assert weight.is_contiguous() == copied
        assert outputs.size(-1) == len(weight) == (13 if copied else 16)
        actual = loss_and_gradients(Engine("fused", "bf16"), *arguments)
    for one, other in zip(actual, loss_and_gradients(Engine("eager"), *arguments), strict=True):
        assert one.dtype == torch.float32
        assert 1e-6 < (one - other).norm() / other.norm() < 0.01


def test_loss_does_not_overflow_for_large_logits():
    hiddens, mask, embedding, bias, y = decoder_problem(2, 3, 4, 5, 1, None)
    actual, expected = (
        engine.nll(1e4 * hiddens, mask, embedding, bias, y) for engine in (Engine("fused"), Engine("eager"))
    )
    torch.testing.assert_close(actual, expected)


# The model.


@pytest.mark.parametrize("build", [tiny.search_model, lambda: tiny.discrete_model(DARTS_V1)])
def test_fused_model_matches_eager_and_shares_parameters(build):
    """The losses include AR, TAR and every kind of dropout. The two models share their parameters."""
    model = build()
    other = model.with_engine(Engine("fused"))
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    batch = tiny.batch(model, 1)
    actual, expected = (losses(m, batch, 0.3, 0.7) for m in (other, model))
    torch.testing.assert_close(actual.total, expected.total, rtol=1e-10, atol=0)
    parameters = list(model.parameters())
    for one, two in zip(*(torch.autograd.grad(loss.total, parameters) for loss in (actual, expected)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


@normed
@pytest.mark.parametrize("small", [False, True])
def test_bf16_rounds_matmuls_only(cell, norm, small, monkeypatch):
    """The error is above zero and within a few rounding errors of bf16 (1/256), and gradients are in fp32. A discrete
    cell that is small has no error."""
    if not small:
        monkeypatch.setattr(fused, "ROUND_FROM", 0)
    leaves, masks, R = problem(5, 16, 12, 12, 8, seed=3, masked=True, scale=0.1, dtype=torch.float32)
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    x, h0, W0, Ws, alpha = leaves.values()
    actual = {}
    for compute_dtype in (None, torch.bfloat16):
        if cell == "relaxed":
            out = fused.relaxed(x, h0, W0, list(Ws), alpha.softmax(-1), *masks, norm=norm, compute_dtype=compute_dtype)
        else:
            out = fused.discrete(x, h0, W0, list(Ws), *random_genotype(0, 8), *masks, compute_dtype=compute_dtype)
        assert out.dtype == torch.float32
        actual[compute_dtype] = [out.detach(), *torch.autograd.grad((out * R).sum(), [h0, W0, Ws])]
    for wide, narrow in zip(*actual.values(), strict=True):
        assert narrow.dtype == torch.float32
        if small and cell == "discrete":
            assert torch.equal(wide, narrow)
        else:
            assert 1e-5 < (wide - narrow).norm() / wide.norm() < 0.05
