"""No step of a search or a retraining reads a tensor on the host, or mixes devices; an evaluation does so at its end,
and a log interval once.

The steps run on torch's `meta` device, whose tensors have shapes and no values: reading one raises an error, as mixing
it with a tensor of another device does. What passes here needs no synchronisation of host and GPU.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

import train
import train_search
from experiment import arguments
from architect import WeightUpdate
from engine.dropout import DropoutRates
from experiment.distributed import Distributed
from experiment.divergence import DivergenceMonitor
from experiment.experiment import Experiment
from experiment.progress import Progress
from model_search import RNNModelSearch
from training import evaluation
from training.early_stopping import Patience
from training.optimizers import averaged, scaled_lr

META = torch.device("meta")
V, SIZES = 30, "--emsize 16 --batch_size 4 --bptt 3 --device cpu"
CELL = "Genotype(recurrent=[('tanh',0),('relu',1),('identity',1)],concat=[1,2,3])"


@pytest.fixture(autouse=True)
def cells_of_three_nodes(monkeypatch):
    """Gives the relaxed cell three nodes, as `CELL` has: what a step reads does not depend on their number."""
    monkeypatch.setattr(train_search, "RNNModelSearch", partial(RNNModelSearch, steps=3))


def state_on_meta(script, state_class, flags):
    """Returns what a script trains, with every tensor on the `meta` device."""
    args = script.build_parser().parse_args([*SIZES.split(), *flags.split()])
    arguments.complete(args, "search" if script is train_search else "train")
    experiment = SimpleNamespace(
        args=args, ranks=Distributed(), run=None, patience=Patience(args.patience, args.min_delta), device=META,
        update=WeightUpdate(args.clip, args.clip_value, args.wdecay, args.momentum),
        local_batch_size=args.batch_size, micro_batch_size=args.small_batch_size,
        corpus=SimpleNamespace(words=[str(i) for i in range(V)]),
        dropout_rates=lambda: DropoutRates(**{name: getattr(args, name) for name in DropoutRates._fields}),
        texts={name: torch.zeros(50, args.batch_size, dtype=torch.long, device=META)
               for name in ("train", "valid", "the alphas")},
    )  # fmt: skip
    return state_class(experiment)


def segment(state, start, length):
    text = state.train_text
    return text[start : start + length], text[start + 1 : start + 1 + length]


SEARCH = [
    f"{order} --engine {engine} --norm {norm} {more}"
    for order in ("", "--unrolled --hessian finite", "--unrolled --hessian exact")
    for engine in ("fused", "eager")
    for norm in ("batch", "layer", "none")
    for more in ("--precision fp32", "--precision bf16")
    if not (engine == "eager" and "bf16" in more)
] + [
    "--unrolled --small_batch_size 2 --alpha 0.1",
    "--unrolled --optimizer momentum --momentum 0.9",
    "--unrolled --clip_value 0.1",
    "--optimizer asgd",
    "--optimizer adam",
]


# The slow ones are the other combinations of order, engine, norm and precision, and more of the unrolled step.
SHORT = [
    flags
    for flags in SEARCH
    if ("fp32" in flags and "--norm none" in flags and "finite --engine eager" not in flags)
    or (flags.startswith(" --engine fused") and ("fp32" in flags or "none" in flags))
    or flags == "--optimizer asgd"
]


@pytest.mark.parametrize(
    "flags", [flags if flags in SHORT else pytest.param(flags, marks=pytest.mark.slow) for flags in SEARCH]
)
def test_search_step_reads_no_tensor(flags):
    state = state_on_meta(train_search, train_search.SearchState, flags)
    for start, length in ((0, 3), (3, 2)):
        x, y = segment(state, start, length)
        with scaled_lr(state.optimizer, len(x) / 3) as lr:
            state.alpha_step(lr, x, y)
            nll, norm = state.weight_gradient(x, y)
            state.optimizer.step()
    assert nll.device == norm.device == META
    assert all(w.grad is not None for w in state.weights)


RETRAINING = [
    f"--arch {arch} --engine {engine} {more}"
    for arch in (CELL, "LSTM")
    for engine in ("fused", "eager")
    for more in (
        "--optimizer sgd", "--optimizer asgd", "--optimizer momentum --momentum 0.9", "--optimizer adam",
        "--optimizer adamw", "--rdrop 0.5", "--fraternal 0.5", "--n_experts 2", "--small_batch_size 2 --alpha 0.5",
    )
] + ["--arch GRU", "--arch ENAS --precision bf16", "--arch LSTM --precision bf16"]  # fmt: skip


@pytest.mark.parametrize("flags", RETRAINING)
def test_retraining_step_reads_no_tensor(flags):
    state = state_on_meta(train, train.RetrainState, flags)
    for start, length in ((0, 3), (3, 2)):
        x, y = segment(state, start, length)
        with scaled_lr(state.optimizer, len(x) / 3):
            nll, norm = state.weight_gradient(x, y)
            state.optimizer.step()
    with averaged(state.optimizer):
        hiddens, _ = state.model(*segment(state, 9, 6)[:1], state.hidden)
        assert state.model.nll(hiddens, segment(state, 9, 6)[1]).device == META
    assert nll.device == norm.device == META


@pytest.mark.parametrize(("script", "state_class", "flags"), [
    (train_search, train_search.SearchState, "--optimizer sgd"), (train, train.RetrainState, "--arch DARTS"),
])  # fmt: skip
def test_log_interval_reads_all_it_needs_in_one_transfer(script, state_class, flags, monkeypatch):
    state, records, lines, transfers = state_on_meta(script, state_class, f"{flags} --log_interval 2"), [], [], []
    run = state.run = SimpleNamespace(
        disable_progress_bar=True, record=lambda **record: records.append(record), log=lines.append, n_records=0
    )
    experiment = SimpleNamespace(
        args=state.args, device=META, monitor=DivergenceMonitor(META, V), progress=Progress(run, META, 1, 50)
    )

    def read(tensor):
        transfers.append(tensor.numel())
        return torch.zeros(tensor.shape, dtype=tensor.dtype)

    monkeypatch.setattr(torch.Tensor, "cpu", read)
    for _ in experiment.progress.track([(0, 3), (3, 3), (6, 3), (9, 3)], columns=4):
        if script is train_search:
            state.alpha_step(20.0, *segment(state, 0, 3))  # before the first one no genotype is logged
        nll, norm = state.weight_gradient(*segment(state, 0, 3))
        Experiment.after_step(experiment, state, nll, norm, 20.0, 3)
    assert len(transfers) == len(records) == 2
    assert [record["step"] for record in records] == [2, 4]
    if script is train_search:
        assert records[0]["genotype"] and sum(line.startswith("Genotype(") for line in lines) == 2


@pytest.mark.parametrize(("flags", "some_unknown"), [
    ("--arch DARTS", True), ("--arch DARTS --n_experts 2", True), ("--arch LSTM", False), ("search", True),
    ("search --norm batch", False),
])  # fmt: skip
def test_evaluation_reads_tensors_only_at_its_end(flags, some_unknown, monkeypatch):
    """The sums are read once the last segment has been evaluated; the marks of unknown words lie on the CPU."""
    is_search, flags = flags.startswith("search"), flags.removeprefix("search")
    script, state_class = (train_search, train_search.SearchState) if is_search else (train, train.RetrainState)
    state, unknown = state_on_meta(script, state_class, flags), torch.zeros(14, 4, dtype=torch.bool)
    unknown[4:6] = True
    reads, begun, equal_segments = [], [], evaluation.equal_segments

    def counted(*given):
        for i, x, y in equal_segments(*given):
            begun.append(i)
            yield i, x, y
        begun.append("the end")

    def read(tensor):
        reads.append(list(begun))
        return 1.0

    monkeypatch.setattr(evaluation, "equal_segments", counted)
    monkeypatch.setattr(torch.Tensor, "item", read)
    score = evaluation.score(state.model, state.train_text[:14], 3, unknown=unknown if some_unknown else None)
    assert score.unknown_share == (8 / 52 if some_unknown else 0)
    assert 1 <= len(reads) <= 2
    assert all(before == [0, 3, 6, 9, 12, "the end"] for before in reads)
