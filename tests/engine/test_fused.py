"""The fused engine computes what the definition does: every value and every gradient, for both cells and the loss."""

from contextlib import contextmanager

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from engine import Engine, fused, linear_cross_entropy, matmul, reference
from engine.dropout import FrozenReLU
from genotypes import DARTS_V1, PRIMITIVES, random_genotype
from training.losses import losses

CELLS = ("relaxed", "discrete")
NORMED_CELLS = [*(("relaxed", norm) for norm in reference.NORMS), ("discrete", "batch")]  # which has no norm
normed = pytest.mark.parametrize(("cell", "norm"), NORMED_CELLS)
norms = st.sampled_from(reference.NORMS)
sizes = st.fixed_dictionaries(
    {
        "T": st.integers(1, 4), "B": st.integers(1, 5), "E": st.integers(1, 4), "H": st.integers(1, 5),
        "N": st.integers(1, 8), "seed": st.integers(0, 10**6), "masked": st.booleans(),
    }
)  # fmt: skip


rows = st.sampled_from([1, 3, 16])


@contextmanager
def in_rows_of(row):
    """Behind hidden states stand zeros, up to a multiple of `row`; in either cell."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "ALIGNMENT", row)
        patch.setattr(fused, "padding", lambda rows, compute_dtype: -rows.size(-1) % row)
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


def run(module, cell, leaves, masks, seed=0, held=None, norm="batch"):
    x, h0, W0, Ws, alpha = leaves.values()
    if cell == "relaxed":
        return module.relaxed(x, h0, W0, list(Ws), alpha.softmax(-1), *masks, held, norm)
    return module.discrete(x, h0, W0, list(Ws), *random_genotype(seed, len(Ws)), *masks)


def values_and_gradients(module, cell, leaves, masks, R, seed=0, held=None, norm="batch"):
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    out = run(module, cell, leaves, masks, seed, held, norm)
    found = torch.autograd.grad((out * R).sum(), list(leaves.values()), allow_unused=True)
    return {"hiddens": out.detach(), **dict(zip(leaves, found, strict=True))}


def assert_equal(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert found[name] is None or not found[name].any(), name
        else:
            scale = value.abs().max().item()
            torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance * (1 + scale), msg=name)


@normed
@settings(max_examples=60, deadline=None)
@given(size=sizes, row=rows)
def test_fused_is_eager_in_float64(cell, norm, size, row):
    leaves, masks, R = problem(**size)
    with in_rows_of(row):
        found = values_and_gradients(fused, cell, leaves, masks, R, size["seed"], norm=norm)
    assert_equal(found, values_and_gradients(reference, cell, leaves, masks, R, size["seed"], norm=norm), 1e-9)


def widened(held):
    """The same set for the fused engine, whose hidden states have zeros behind."""
    other = FrozenReLU()
    other.active = {
        place: F.pad(active, (0, -active.size(-1) % matmul.ALIGNMENT)) for place, active in held.active.items()
    }
    return other


def relative_errors(found, exact):
    return {k: ((found[k].double() - v).norm() / (v.norm() + 1e-30)).item() for k, v in exact.items() if v is not None}


@normed
@settings(max_examples=25, deadline=None)
@given(
    T=st.integers(1, 6), B=st.integers(8, 20), H=st.integers(4, 24), seed=st.integers(0, 10**6), masked=st.booleans()
)
def test_in_fp32_fused_is_as_near_to_float64_as_eager_is(cell, norm, T, B, H, seed, masked):
    """To 1e-5; where a random cell is so steep that fp32 does not carry that far, to 4 times eager's own error. With
    relu active where it is in float64: at a kink the last digit decides, and neither engine is nearer."""
    held = FrozenReLU() if cell == "relaxed" else None
    exact_leaves, masks, R = problem(T, B, H, H, 8, seed, masked, scale=0.2)
    exact = values_and_gradients(reference, cell, exact_leaves, masks, R, seed, held, norm)
    leaves = {name: leaf.float() for name, leaf in exact_leaves.items()}
    masks, R = [None if mask is None else mask.float() for mask in masks], R.float()
    eager, found = (
        relative_errors(values_and_gradients(m, cell, leaves, masks, R, seed, relu, norm), exact)
        for m, relu in ((reference, held), (fused, held and widened(held)))
    )
    assert all(found[name] <= max(1e-5, 4 * eager[name]) for name in found), (found, eager)


@pytest.mark.parametrize("cell", CELLS)
def test_hidden_states_are_filled_up(cell):
    leaves, masks, _ = problem(2, 3, 3, 4, 3, seed=1, masked=False)
    leaves["W0"].requires_grad_()
    for row, width in ((1, 4), (3, 6)):
        with in_rows_of(row):
            assert run(fused, cell, leaves, masks)._base.size(-1) == width


def test_rows_are_filled_up_where_products_gain_by_it():
    rows = torch.empty(2, 300)
    assert matmul.padding(rows, torch.bfloat16) == 4
    assert matmul.padding(rows[:, :288], torch.bfloat16) == 0
    assert matmul.padding(rows, torch.float32) == 0
    assert matmul.padding(rows.to("meta"), torch.float32) == 4  # as on any device but a CPU


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("size", [(2, 3, 2, 3, 2), (1, 2, 2, 2, 3), (2, 1, 2, 2, 2)])
@normed
def test_gradcheck(cell, norm, size, masked):
    leaves, masks, _ = problem(*size, seed=4, masked=masked)
    names = [name for name in leaves if cell == "relaxed" or name != "alpha"]
    inputs = [leaves[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *args: run(fused, cell, {**leaves, **dict(zip(names, args, strict=True))}, masks, norm=norm), inputs
    )


@normed
def test_weight_gradients_after_the_loop_are_those_within_it(cell, norm, monkeypatch):
    """What CUDA and small cells do, and what a large cell does on a CPU."""
    leaves, masks, R = problem(4, 3, 3, 4, 5, seed=1, masked=True)
    after = values_and_gradients(fused, cell, leaves, masks, R, norm=norm)  # as for any small cell
    monkeypatch.setattr(fused, "sum_after_loop", lambda h: False)
    assert_equal(values_and_gradients(fused, cell, leaves, masks, R, norm=norm), after, 1e-12)


def test_held_relu_takes_and_holds_the_same_set_as_eager():
    leaves, masks, R = problem(3, 4, 3, 4, 4, seed=2, masked=True)
    elsewhere = {name: leaf + 0.3 for name, leaf in leaves.items()}
    found = {}
    for module in (fused, reference):
        held = FrozenReLU()
        found[module] = [
            values_and_gradients(module, "relaxed", where, masks, R, held=held) for where in (leaves, elsewhere)
        ]
    for one, other in zip(found[fused], found[reference], strict=True):
        assert_equal(one, other, 1e-9)
    free = values_and_gradients(reference, "relaxed", elsewhere, masks, R)
    assert not torch.allclose(free["hiddens"], found[fused][1]["hiddens"])


@pytest.mark.parametrize("cell", CELLS)
def test_two_graphs_at_once_keep_out_of_each_others_buffers(cell):
    first, second = (problem(3, 4, 3, 4, 3, seed=seed, masked=True) for seed in (1, 2))
    alone = [values_and_gradients(fused, cell, *p) for p in (first, second)]
    graphs = []
    for leaves, masks, R in (first, second):
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
        graphs.append((leaves, (run(fused, cell, leaves, masks) * R).sum()))
    for (leaves, total), expected in zip(graphs, alone, strict=True):
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        for name, value in zip(leaves, found, strict=True):
            assert value is expected[name] or torch.equal(value, expected[name])


@normed
def test_without_gradients_the_values_are_the_same_and_nothing_is_kept(cell, norm):
    leaves, masks, _ = problem(4, 3, 3, 4, 3, seed=1, masked=False)
    wanted = run(fused, cell, {name: leaf.requires_grad_() for name, leaf in leaves.items()}, masks, norm=norm)
    with torch.no_grad():
        free = run(fused, cell, leaves, masks, norm=norm)
    assert torch.equal(wanted, free)
    assert not free.requires_grad


def test_a_second_derivative_of_the_discrete_cell_is_refused():
    """That of the relaxed one: test_second_derivative.py."""
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
chunks = st.sampled_from([1, 160, 1 << 25])
fillings = st.sampled_from([0, 3])


@contextmanager
def in_pieces(chunk, more=0):
    """Columns are skipped where much is dropped, however few there are; so many bytes of logits are held at once, and
    so many zeros put behind the outputs; a few rows are copied at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_cross_entropy, "CHUNK", chunk)
        patch.setattr(linear_cross_entropy, "SKIP_FROM", 1)
        patch.setattr(linear_cross_entropy, "BLOCK", 5)
        patch.setattr(linear_cross_entropy, "padding", lambda rows, compute_dtype: more)
        yield


@settings(max_examples=60, deadline=None)
@given(size=decoder_sizes, chunk=chunks, more=fillings)
def test_the_loss_is_cross_entropy_of_the_dropped_outputs(size, chunk, more):
    """With columns skipped (much is dropped) and not, in one chunk and in many, with zeros behind and without."""
    arguments = decoder_problem(**size)
    with in_pieces(chunk, more):
        found = loss_and_gradients(Engine("fused"), *arguments)
    for one, other in zip(found, loss_and_gradients(Engine("eager"), *arguments), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("amx", "copied"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("chunk", [1, 1 << 25])
def test_the_loss_in_bf16_is_within_its_rounding(monkeypatch, amx, copied, chunk):
    """Whether a processor multiplies bf16 in tiles, and skips no columns, or does not; and however the weight lies."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(linear_cross_entropy, "COPY_FROM", 48 if copied else 49)
    *floats, y = decoder_problem(6, 8, 13, 30, 0, 0.75)
    hiddens, mask, embedding, bias = (a.float() for a in floats)
    arguments = 0.3 * hiddens, mask, 0.3 * embedding, bias, y
    with in_pieces(chunk, more=3):
        skipped = linear_cross_entropy.worth_skipping(mask, torch.bfloat16)
        assert (skipped is None) == amx
        outputs, weight = linear_cross_entropy.factors(hiddens, embedding, skipped, torch.bfloat16)
        assert weight.is_contiguous() == copied
        assert outputs.size(-1) == len(weight) == (13 if copied else 16)
        found = loss_and_gradients(Engine("fused", "bf16"), *arguments)
    for one, other in zip(found, loss_and_gradients(Engine("eager"), *arguments), strict=True):
        assert one.dtype == torch.float32
        assert 1e-6 < (one - other).norm() / other.norm() < 0.01


def test_large_logits_do_not_overflow():
    hiddens, mask, embedding, bias, y = decoder_problem(2, 3, 4, 5, 1, None)
    found, expected = (
        engine.nll(1e4 * hiddens, mask, embedding, bias, y) for engine in (Engine("fused"), Engine("eager"))
    )
    torch.testing.assert_close(found, expected)


# The model.


@pytest.mark.parametrize("build", [tiny.search_model, lambda: tiny.discrete_model(DARTS_V1)])
def test_a_model_behind_another_engine_is_the_same_model(build):
    """AR, TAR, every dropout; and the parameters are shared, not copied."""
    model = build()
    other = model.with_engine(Engine("fused"))
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    batch = tiny.batch(model, 1)
    found, expected = (losses(m, batch, 0.3, 0.7) for m in (other, model))
    torch.testing.assert_close(found.total, expected.total, rtol=1e-10, atol=0)
    parameters = list(model.parameters())
    for one, two in zip(*(torch.autograd.grad(loss.total, parameters) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


@normed
def test_bf16_rounds_products_and_nothing_else(cell, norm):
    """Within a few of bf16's rounding errors (1/256) of fp32, and not equal to it; gradients in fp32."""
    leaves, masks, R = problem(5, 16, 12, 12, 8, seed=3, masked=True, scale=0.1, dtype=torch.float32)
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    x, h0, W0, Ws, alpha = leaves.values()
    found = {}
    for compute_dtype in (None, torch.bfloat16):
        if cell == "relaxed":
            out = fused.relaxed(x, h0, W0, list(Ws), alpha.softmax(-1), *masks, norm=norm, compute_dtype=compute_dtype)
        else:
            out = fused.discrete(x, h0, W0, list(Ws), *random_genotype(0, 8), *masks, compute_dtype=compute_dtype)
        assert out.dtype == torch.float32
        found[compute_dtype] = [out.detach(), *torch.autograd.grad((out * R).sum(), [h0, W0, Ws])]
    for wide, narrow in zip(*found.values(), strict=True):
        assert narrow.dtype == torch.float32
        assert 1e-5 < (wide - narrow).norm() / wide.norm() < 0.05
