"""CUDA graphs are captured and replayed at the right calls; without a GPU, a plain call stands in for a capture."""

import sys
from functools import partial
from itertools import product

import numpy as np
import pytest
import tiny
import torch

import utils
from architect import Architect, WeightUpdate, perturbed
from engine import Engine, dispatch
from engine.cuda_graphs import Capture, Graphs
from engine.dropout import FrozenReLU, Masks
from engine.reference import NORMS
from genotypes import DARTS_V1
from training.evaluation import evaluate
from training.losses import Batch, MicroBatches, clipped_gradient, losses

MODELS = [
    *(partial(tiny.search_model, norm=norm) for norm in NORMS),
    partial(tiny.discrete_model, DARTS_V1),
    partial(tiny.discrete_model, "LSTM"),
    partial(tiny.discrete_model, DARTS_V1, n_experts=2),
]


class PlainCapture:
    """Imitates a CUDA graph: a capture runs nothing, and a replay reads and writes the tensors of the capture."""

    def __init__(self):
        self.captures = self.replays = 0

    def __call__(self, run):
        self.captures += 1
        outputs = []

        def replay():
            self.replays += 1
            new = run()
            if not outputs:
                outputs.extend(torch.empty_like(o) for o in new)
            for old, value in zip(outputs, new, strict=True):
                old.copy_(value)

        return replay, outputs


def test_each_call_runs_one_step_with_its_own_arguments():
    taken, capture = [], PlainCapture()
    total = torch.zeros(3)

    def step(eta, x):
        taken.append((eta, len(x)))
        total[: len(x)].add_(eta * x)
        return x.sum() * eta, total[: len(x)] * 1

    graphs, expected = Graphs(step, capture), torch.zeros(3)
    calls = [(0.5, 3), (0.5, 3), (1.0, 3), (0.5, 2), (0.5, 3), (1.0, 3), (0.5, 2), (0.5, 2)]
    for n, (eta, length) in enumerate(calls):
        x = torch.full((length,), float(n + 1))
        summed, state = graphs(eta, x)
        expected[:length] += eta * x
        assert summed == eta * x.sum()
        assert torch.equal(state, expected[:length])
    assert taken == calls
    assert capture.captures == 3  # one for each pair of a shape and a rate that occurs twice
    assert capture.replays == len(calls) - 3


def test_outputs_are_not_overwritten_by_later_replays():
    graphs = Graphs(lambda x: (x * 2,), PlainCapture())
    actual = [graphs(torch.full((2,), float(n)))[0] for n in range(4)]
    assert [f[0].item() for f in actual] == [0, 2, 4, 6]


def test_numbered_gpu_becomes_the_current_device_for_captures(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name in ("cpu", "cuda", "cuda:1"):
        assert utils.choose_device(name) == torch.device(name)
    assert current == [torch.device("cuda:1")]


def test_only_fused_engine_on_a_single_gpu_is_replayed(monkeypatch):
    monkeypatch.setattr(dispatch, "Capture", PlainCapture)
    x, counts = torch.ones(2), {}
    for name, device, ranks in product(("fused", "eager"), ("cuda", "cpu"), (1, 2)):
        monkeypatch.setattr(dispatch.distributed, "is_initialized", lambda ranks=ranks: ranks > 1)
        graphs = Engine(name).with_cuda_graphs(lambda x: (x + 1,), torch.device(device))
        assert all(graphs(x)[0].tolist() == [2, 2] for _ in range(3))
        counts[name, device, ranks] = graphs.capture.replays if graphs.capture else 0
    assert counts.pop(("fused", "cuda", 1)) == 2
    assert set(counts.values()) == {0}


@pytest.mark.parametrize("model_of", MODELS)
def test_replayed_evaluation_uses_the_current_weights(monkeypatch, model_of):
    captures = []

    def replayed(dispatch, step, device):
        captures.append(PlainCapture())
        return Graphs(step, captures[-1])

    model, source = model_of(), torch.randint(tiny.V, (24, 2), generator=torch.Generator().manual_seed(0))
    for scale in (1.0, 0.5):
        # The perturbed weights have other addresses.
        with perturbed(model.weights(), [(scale - 1) * w.detach() for w in model.weights()]):
            expected = evaluate(model, source, 5)
            with monkeypatch.context() as patch:
                patch.setattr(Engine, "with_cuda_graphs", replayed)
                actual = evaluate(model.with_engine(Engine("fused")), source, 5)
        assert actual == pytest.approx(expected, rel=1e-12)
    # There are 5 segments: the first is run, three are replayed, and the last is shorter and is run.
    assert [(c.captures, c.replays) for c in captures] == [(1, 3)] * 2


def test_failed_capture_warns_once_and_runs_steps_eagerly(capsys, monkeypatch):
    monkeypatch.setattr(Graphs, "failed", False)
    before = Graphs(lambda x: (x + 1,), PlainCapture())
    assert all(before(torch.ones(2))[0].tolist() == [2, 2] for _ in range(3))
    taken = []  # the exception being handled at each step, which would keep the objects of its traceback alive

    def capture(run):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    x = torch.ones(2)
    for _ in range(2):
        graphs = Graphs(lambda x: (taken.append(sys.exc_info()[1]), x)[1:], capture)
        assert all(graphs(x)[0] is x for _ in range(4))
    assert taken == [None] * 8
    assert before(torch.ones(2))[0].tolist() == [2, 2]
    assert before.capture.replays == 2  # it is not replayed again, since its generator state is out of date
    assert capsys.readouterr().err.count("\n") == 1


def test_rare_lengths_are_not_captured_over_3600_epochs():
    """The lengths are those of a published retraining: base 35 with probability 0.95, else 17.5, normal about it with
    standard deviation 5, cut to 5..55. A shape's state changes only at its first two calls, so only those are made."""
    rng, steps = np.random.default_rng(0), 3600 * 415
    base = np.where(rng.random(steps) < 0.95, 35, 17.5)
    lengths = np.clip(rng.normal(base, 5).astype(int), 5, 55)
    firsts = np.sort(np.concatenate([np.flatnonzero(lengths == length)[:2] for length in np.unique(lengths)]))
    capture = PlainCapture()
    graphs = Graphs(lambda x: (x * 2,), capture)
    for length in lengths[firsts].tolist():
        graphs(torch.ones(length, 4))
    assert len(np.unique(lengths)) > Graphs.LIMIT == capture.captures
    held = [recorded for recorded in graphs.recorded.values() if recorded]
    assert len(held) == Graphs.LIMIT
    numbers = sum(tensor.numel() for static, _, outputs in held for tensor in (*static, *outputs))
    assert numbers <= Graphs.LIMIT * 2 * 55 * 4  # those of the inputs and the outputs that the graphs hold
    captured = {key[0][0][0] for key, recorded in graphs.recorded.items() if recorded}
    assert np.isin(lengths, list(captured)).mean() > 0.99
    rare = next(length for length in np.unique(lengths) if length not in captured)
    before = capture.replays
    assert graphs(torch.ones(int(rare), 4))[0].sum() == 8 * rare
    assert capture.replays == before  # it ran without a graph


@tiny.on_cuda
def test_on_cuda_steps_that_synchronize_run_eagerly(capsys, monkeypatch):
    monkeypatch.setattr(Graphs, "failed", False)

    def step(x):
        mask = torch.empty_like(x).bernoulli_(0.5)
        return (x + (mask.sum().item() >= 0),)

    graphs, x = Graphs(step, Capture()), torch.ones(2, device="cuda")
    assert all(graphs(x)[0].tolist() == [2, 2] for _ in range(4))
    assert capsys.readouterr().err.count("\n") == 1
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


@tiny.on_cuda
def test_on_cuda_replayed_weight_steps_match_eager():
    ends = []
    for capture in (None, Capture()):
        model = tiny.search_model().float().cuda().with_engine(Engine("fused"))
        weights, batch = model.weights(), tiny.batch(tiny.search_model(), 1)
        optimizer = torch.optim.SGD(weights, lr=0.1)
        torch.manual_seed(1)

        def gradient(x, y, hidden, model=model, weights=weights):
            masks = model.sample_masks(hidden.size(0))
            part = losses(model, Batch(x, y, hidden, masks), beta=0.1)
            return clipped_gradient([part], weights, WeightUpdate())[:2]

        graphs, hidden = Graphs(gradient, capture), batch.hidden.float().cuda()
        for length in (tiny.T, 3, 3, tiny.T, 3, tiny.T):  # both lengths write to the same gradient tensors
            _, hidden = graphs(batch.x[:length].cuda(), batch.y[:length].cuda(), hidden)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        assert all(graphs.recorded.values()) and bool(graphs.recorded) == (capture is not None)
        ends.append([hidden, *(w.detach().clone() for w in weights)])
    for plain, replayed in zip(*ends, strict=True):
        torch.testing.assert_close(replayed, plain, rtol=1e-4, atol=1e-5)


@tiny.on_cuda
@pytest.mark.parametrize("hessian", ["finite", "exact"])
def test_on_cuda_replayed_alpha_steps_match_eager(hessian):
    ends = []
    for capture in (None, Capture()):
        model = tiny.search_model().float().cuda().with_engine(Engine("fused"))
        loss, batch = partial(MicroBatches, model, micro_batch_size=tiny.B), tiny.batch(tiny.search_model(), 1)
        architect = Architect(
            model.weights(), model.alphas, loss, loss, update=WeightUpdate(0.25, weight_decay=1e-2), hessian=hessian
        )

        def step(x, y, hidden, architect=architect):
            train = Batch(x, y, hidden, Masks(relu=FrozenReLU() if architect.hessian == "finite" else None))
            return (architect.step(train, Batch(y, x, hidden, Masks()), eta=0.7),)

        graphs, hidden = Graphs(step, capture), batch.hidden.float().cuda()
        for _ in range(4):
            [hidden] = graphs(batch.x.cuda(), batch.y.cuda(), hidden)
        assert all(graphs.recorded.values()) and bool(graphs.recorded) == (capture is not None)
        ends.append([hidden, model.alphas.detach().clone(), *(w.detach().clone() for w in model.weights())])
    for plain, replayed in zip(*ends, strict=True):
        torch.testing.assert_close(replayed, plain, rtol=1e-4, atol=1e-5)


@tiny.on_cuda
@pytest.mark.parametrize("model_of", MODELS)
def test_on_cuda_replayed_evaluation_matches_eager(model_of):
    model, source = model_of().float().cuda(), torch.randint(tiny.V, (24, 2)).cuda()
    for _ in range(2):
        actual = evaluate(model.with_engine(Engine("fused")), source, 5)
        assert actual == pytest.approx(evaluate(model, source, 5), rel=1e-5)
    assert not Graphs.failed
