"""Compiled kernels match the same functions run uncompiled; accumulation, matrix products and precision settings."""

import os
import shutil

import pytest
import tiny
import torch
from helpers import run_compiling, write_corpus
from hypothesis import given
from hypothesis import strategies as st

import evaluate
import train
import train_search
from architect import Architect, WeightUpdate
from engine import elementwise, matmul
from engine.matmul import add_rows, addmm_, matmul_precision
from model import RNNModel

needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")


COMPARE = """
import os
import sys
sys.path[:0] = ["tests/engine", "tests", "."]
import torch
from engine import cell_kernels, fused, linear_cross_entropy, matmul, reference, second_derivative
from test_second_derivative import by_index, directions, loss_derivatives, mixed_derivative
from test_fused import NORMED_CELLS, decoder_problem, problem, relative_errors, values_and_gradients
from engine.dropout import FrozenReLU
from engine import Engine

device, full = os.environ["ON"], os.environ["FULL"] == "True"

def check(actual, expected, bound=1e-5):
    assert max(relative_errors(*by_index(actual, expected)).values()) < bound

def cell_problem(N):
    leaves, masks, R = problem(3, 6, 8, 20, N, seed=1, masked=True, scale=0.2, dtype=torch.float32)
    return {name: leaf.to(device) for name, leaf in leaves.items()}, [mask.to(device) for mask in masks], R.to(device)

def compare():
    for cell, norm in NORMED_CELLS if full else [("relaxed", "none"), ("discrete", "batch")]:
        frozen, (leaves, masks, R) = cell == "relaxed", cell_problem(3 if full else 2)
        check(*(
            values_and_gradients(m, cell, leaves, masks, R, 3, FrozenReLU() if frozen else None, norm).values()
            for m in (fused, reference)
        ))
    leaves, masks, R = cell_problem(3)
    for norm in reference.NORMS if full else []:
        along = directions(leaves, 1)
        check(*(mixed_derivative(m, leaves, masks, R, along, norm=norm) for m in (fused, reference)), bound=2e-5)
    linear_cross_entropy.SKIP_FROM = 1
    *floats, y = decoder_problem(3, 6, 20, 50, 1, 0.75)
    hiddens, mask, embedding, bias = (a.float().to(device) for a in floats)
    y = y.to(device)
    for precision, scale, bound in (("fp32", 1, 1e-5), ("bf16", 0.3, 0.02))[: 2 if full else 1]:
        check(*(
            loss_derivatives(engine, scale * hiddens, mask, scale * embedding, bias, y, seed=1)
            for engine in (Engine("fused", precision), Engine())
        ), bound)

compare()
modules = cell_kernels, second_derivative, linear_cross_entropy, matmul
functions = [f for m in modules for f in vars(m).values() if hasattr(f, "compiled")]
used = [f.compiled() for f in functions if f.compiled.cache_info().currsize]
assert len(used) > 10
assert fused.relaxed_node.compiled() is not fused.relaxed_node.__wrapped__
for kernel in used:
    kernel.torch_compiled = None
compare()  # runs the cached code alone, without torch.compile
print("equal")
"""


@needs_compiler
@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one norm", "all norms"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=tiny.on_cuda)])
def test_compiled_kernels_match_reference(device, full):
    """The short variant has no second derivative, no norm and no bf16."""
    done = run_compiling(COMPARE, ON=device, FULL=str(full))
    assert done.stdout.strip() == "equal", done.stderr


KINDS = """
import torch
from engine.inductor import kernel

@kernel
def both(x, factor, product, total):
    product.copy_(x * factor)
    total.copy_(total + x.sum(0))

of_x = [torch.rand(4, 6), torch.rand(5, 6), torch.rand(6, 5).t(), torch.rand(5, 6).double()]
for _ in range(3):
    for x, factor in zip([*of_x, of_x[0]], [2.0, 2.0, 2.0, 2.0, 3.0]):
        x.copy_(torch.rand(x.shape))
        product, total = torch.empty_like(x), torch.ones(6, dtype=x.dtype)
        both(x, factor, product, total)
        torch.testing.assert_close(product, x * factor)
        torch.testing.assert_close(total, 1 + x.sum(0))
code = both.compiled()
assert len(code.code_by_kind) == 5, code.code_by_kind
assert not any(isinstance(n, torch.Tensor) and n.dim() for _, _, numbers in code.code_by_kind.values() for n in numbers)
compiled, code.torch_compiled = code.torch_compiled, None
both(x, 3.0, product, total)
code.torch_compiled = compiled
with torch.compiler.set_stance("force_eager"):
    both(torch.ones(7, 6), 2.0, product := torch.empty(7, 6), torch.zeros(6))
assert torch.equal(product, torch.full((7, 6), 2.0))
print("found")
"""


@needs_compiler
def test_cached_code_is_selected_by_shape_stride_dtype_and_scalar():
    done = run_compiling(KINDS)
    assert done.stdout.strip() == "found", done.stderr


EVALUATE = """
import sys
sys.path[:0] = ["tests/engine", "tests", "."]
import torch, tiny
from engine import Engine
from genotypes import DARTS_V1
from engine.cuda_graphs import Graphs
from training.evaluation import evaluate

for build in (tiny.search_model, lambda: tiny.discrete_model(DARTS_V1)):
    model, source = build().float().cuda(), torch.randint(tiny.V, (24, 2)).cuda()
    actual, expected = (evaluate(model.with_engine(Engine(name)), source, 5) for name in ("fused", "eager"))
    assert abs(actual - expected) < 1e-4, (actual, expected)
print(Graphs.failed)
"""


@needs_compiler
@tiny.on_cuda
def test_on_cuda_compiled_kernels_run_in_cuda_graphs():
    done = run_compiling(EVALUATE)
    assert done.stdout.strip() == "False", done.stderr


VIEWS = """
import torch
from engine.inductor import kernel

@kernel
def doubled(x, out):
    out.copy_(2 * x)

for n in range(2):
    x, out = torch.full((3, 4, 10), float(n)).chunk(2, -1)
    doubled(x, out)
    print((out == 2 * n).all().item(), (x == n).all().item(), len(doubled.compiled().code_by_kind))
"""


@needs_compiler
def test_code_is_not_cached_for_views_of_one_storage():
    """Its code takes a tensor that is not an argument, and the next call has another storage, so no code is cached."""
    done = run_compiling(VIEWS)
    assert done.stdout.split("\n")[:3] == ["True True 0", "True True 0", ""], done.stdout + done.stderr


THREADS = """
import threading
import torch
from engine.inductor import kernel

@kernel
def named(x, name, out):
    out.copy_(x * len(name))

def call(n):
    named(x, "a" * n, out)
    results.append(out[0].item())

def call_more():
    torch._dynamo.config.recompile_limit = 1
    for n in range(2, 4):
        call(n)

x, out, results = torch.ones(4), torch.empty(4), []
call(1)
thread = threading.Thread(target=call_more)
thread.start()
thread.join()
print(results == [1, 2, 3], len(named.compiled().code_by_kind))
"""


@needs_compiler
def test_kernel_compiles_in_a_second_thread():
    done = run_compiling(THREADS)  # the code compiles more variants than torch.compile is allowed to
    assert done.stdout.strip() == "True 3", done.stderr


def test_missing_compiler_warns_once_and_runs_uncompiled():
    code = "import torch\nfrom engine.inductor import kernel\n"
    code += "f = kernel(lambda x, out: out.copy_(x + 1)); o = torch.zeros(2)\n"
    code += "f(o, o); f(o, o); print(o.tolist())"
    done = run_compiling(code, CXX="no-such")
    assert done.stdout.strip() == "[2.0, 2.0]"
    assert done.stderr.count("\n") == 1
    assert "compiler" in done.stderr


@given(st.floats(-1e4, 1e4))
def test_sigmoid_and_tanh_match_torch_in_float64(x):
    x = torch.tensor(x, dtype=torch.float64)
    for actual, expected in zip(
        (elementwise.sigmoid(x), *elementwise.sigmoid_tanh(x)), (x.sigmoid(), x.sigmoid(), x.tanh()), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-15)


@given(st.floats(2**-100, 20, width=32), st.booleans())
def test_float32_tanh_has_small_relative_error(x, negative):
    x = torch.tensor(-x if negative else x, dtype=torch.float32)
    torch.testing.assert_close(elementwise.sigmoid_tanh(x)[1].double(), x.double().tanh(), rtol=3e-6, atol=0)


@given(st.floats(-100, 100, width=32))
def test_sigmoid_and_tanh_of_bf16_inputs_are_computed_in_fp32(x):
    x = torch.tensor(x).bfloat16()
    wide = x.float()
    for actual, expected in zip(elementwise.sigmoid_tanh(x, wide.dtype), (wide.sigmoid(), wide.tanh()), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=3e-7)


@pytest.mark.parametrize("quicker", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_matmul_is_correct_with_either_library(monkeypatch, quicker, transposed):
    monkeypatch.setattr(matmul, "onednn_is_quicker", lambda: quicker)
    a, b, out = torch.randn(7, 400), torch.randn(400, 350), torch.empty(7, 350)
    b = b.t().contiguous().t() if transposed else b
    matmul.matmul(a, b, out)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-4, atol=1e-4)


@pytest.fixture
def choice(monkeypatch, tmp_path):
    """Returns a function that makes the choice as a new process does; its measurements give onednn, mkl and onednn."""
    measured = iter(["onednn", "mkl", "onednn"])
    monkeypatch.setattr(matmul, "quicker_library", lambda: next(measured))
    monkeypatch.setattr(matmul.kernel_cache, "folder", lambda: tmp_path)
    return matmul.onednn_is_quicker.__wrapped__


needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@needs_onednn
def test_all_processes_make_the_choice_that_was_measured_first(choice, tmp_path):
    assert [choice() for _ in range(3)] == [True, True, True]
    [file] = tmp_path.iterdir()
    assert file.read_text() == '"onednn"'
    for damaged, measured in (("", False), ("[]", True)):
        file.write_text(damaged)
        assert choice() == choice() == measured


@needs_onednn
def test_library_stored_by_another_process_meanwhile_is_taken(choice, tmp_path, monkeypatch):
    choice()
    [file] = tmp_path.iterdir()
    file.unlink()

    def measure():
        file.write_text('"onednn"')
        return "mkl"

    monkeypatch.setattr(matmul, "quicker_library", measure)
    assert choice() is True and file.read_text() == '"onednn"'


@needs_onednn
@pytest.mark.parametrize("slow", ["mkl", "onednn"])
def test_quicker_library_is_the_one_of_the_shorter_time(slow, monkeypatch):
    clock = [0.0]

    def timed(library, multiply):
        def call(*args, **more):
            clock[0] += 2.0 if library == slow else 1.0
            return multiply(*args, **more)

        return call

    monkeypatch.setattr(matmul, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch, "mm", timed("mkl", torch.mm))
    monkeypatch.setattr(matmul, "onednn", timed("onednn", matmul.onednn))
    assert matmul.quicker_library() != slow


def test_addmm_accumulates_bf16_products_in_fp32():
    a, b, total = torch.ones(2, 3).bfloat16(), torch.ones(3, 2).bfloat16(), torch.full((2, 2), 1000.0)
    addmm_(total, a, b)
    assert torch.equal(total, torch.full((2, 2), 1003.0))  # bf16 cannot represent 1003


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_rows_accumulates_in_fp32(dtype):
    total = torch.full((2,), 1000.0)
    add_rows(total, torch.ones(257, 2, dtype=dtype))
    assert torch.equal(total, torch.full((2,), 1257.0))  # bf16 cannot represent 257


def test_matmul_precision_is_restored_on_exit():
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    with matmul_precision("tf32"):
        assert settings.fp32_precision == "tf32"
        with matmul_precision("fp32"):
            assert settings.fp32_precision == "ieee"
        assert settings.fp32_precision == "tf32"
    assert settings.fp32_precision == before


def test_finite_difference_runs_in_full_precision_under_tf32():
    seen = []
    w, alphas = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)

    class Part:
        hidden = torch.zeros(1, 1)

        def __init__(self):
            self.total = (w * alphas).square().sum()

    def loss(name):
        def parts(_):
            seen.append((name, torch.backends.cuda.matmul.fp32_precision))
            yield Part()

        return parts

    architect = Architect(
        [w], alphas, loss("train"), loss("valid"), loss("precise"), update=WeightUpdate(1.0), hessian="finite"
    )
    with matmul_precision("tf32"):
        architect.gradient(None, None, 0.1)
    assert seen == [("train", "tf32"), ("valid", "tf32"), ("precise", "ieee"), ("precise", "ieee")]


def test_every_evaluation_runs_in_the_chosen_precision(monkeypatch, tmp_path):
    corpus, settings = write_corpus(tmp_path, train=30, valid=16, test=16), []

    def record_precision(model, *args):
        if not torch.is_grad_enabled():
            settings.append(torch.backends.cudnn.rnn.fp32_precision)
        return forward(model, *args)

    forward = RNNModel.forward
    monkeypatch.setattr(RNNModel, "forward", record_precision)
    flags = f"--data {corpus} --emsize 8 --batch_size 4 --bptt 6 --epochs 1 --lr 1 --device cpu"
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "tf32")  # the initial setting of torch
    assert train_search.main([*flags.split(), "--save", str(tmp_path / "search")]) == 0
    assert train.main([*flags.split(), "--save", str(tmp_path / "run")]) == 0
    assert train.main([*flags.split(), "--finetune", str(tmp_path / "run"), "--save", str(tmp_path / "more")]) == 0
    assert evaluate.main([str(tmp_path / "run" / "best.pt"), "--device", "cpu"]) == 0
    assert len(settings) >= 12
    assert set(settings) == {"ieee"}
