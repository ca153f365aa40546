"""Tests that models which the published code pickled are read as their weights and cell, and that nothing in them runs.

The look-alikes have modules of the published names, which exist while they are saved: in the formats of torch 2, and in
that of torch 0.3, which names the memory of a GPU, its function backend and the source code of each class.
"""

import contextlib
import copyreg
import io
import itertools
import math
import os
import pickle
import struct
import sys
import types
import warnings
import zipfile
from collections import OrderedDict, namedtuple
from unittest import mock

import numpy as np
import oracle
import pytest
import torch
from helpers import call, write_corpus
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.backends import thnn

import evaluate
import generate
import train
from experiment import published_model
from data import load_corpus
from experiment.checkpoint import CheckpointError
from experiment.published_model import is_pickled, load
from genotypes import Genotype, parse, to_json
from utils import batchify

H = 6
CELL = Genotype((("sigmoid", 0), ("relu", 1), ("tanh", 0)), (1, 2, 3))
FORMS = ["zip", "legacy", "torch 0.3"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), train=30, valid=16, test=16)


@pytest.fixture(scope="module")
def ntoken(corpus):
    return len(load_corpus(str(corpus)).words)


@contextlib.contextmanager
def published_modules(**classes):
    """Makes modules with the names of the published code's files, and yields a class for each of their names."""
    names = {"RNNModel": "model", "DARTSCell": "model", "LockedDropout": "utils", "RNNModelSearch": "model_search"}
    modules = {name: types.ModuleType(name) for name in {*names.values(), "genotypes"}}
    made = types.SimpleNamespace(Genotype=namedtuple("Genotype", "recurrent concat", module="genotypes"))
    for name, module in names.items():
        setattr(made, name, type(name, (nn.Module,), {"__module__": module}))
        setattr(modules[module], name, getattr(made, name))
    modules["genotypes"].Genotype = made.Genotype
    with mock.patch.dict(sys.modules, modules):
        yield made


def look_alike(made, ntoken, cell=CELL, kind="RNNModel"):
    """Returns a module with the parts and attributes of a model of the published code, and random weights."""
    generator = torch.Generator().manual_seed(1)

    def weight(*size):
        return nn.Parameter(torch.randn(size, generator=generator) * 0.4)

    core = made.DARTSCell()
    core.nhid, core.dropouth, core.dropoutx = H, 0.25, 0.75
    core.genotype = made.Genotype(recurrent=list(cell.recurrent), concat=range(1, len(cell.recurrent) + 1))
    core._W0 = weight(2 * H, 2 * H)
    core._Ws = nn.ParameterList([weight(H, 2 * H) for _ in cell.recurrent])
    model = getattr(made, kind)()
    model.lockdrop, model.encoder = made.LockedDropout(), nn.Embedding(ntoken, H)
    model.rnns, model.decoder = nn.ModuleList([core]), nn.Linear(H, ntoken)
    model.encoder.weight, model.decoder.bias = weight(ntoken, H), weight(ntoken)
    model.decoder.weight = model.encoder.weight
    model.ninp = model.nhid = model.nhidlast = H
    model.ntoken, model.cell_cls, model.dropoute = ntoken, made.DARTSCell, 0.1
    return model


class Pickler03(pickle.Pickler):
    """Pickles a module as torch 0.3 does on a GPU."""

    def __init__(self, file):
        super().__init__(file, protocol=2)
        self.storages, self.sourced = {}, set()

    def persistent_id(self, obj):
        if isinstance(obj, type) and issubclass(obj, nn.Module) and obj not in self.sourced:
            self.sourced.add(obj)
            return ("module", obj, f"/home/{obj.__module__}.py", f"class {obj.__name__}(nn.Module):\n  ...\n")
        if isinstance(obj, Storage03):
            self.storages[obj.key] = obj.tensor
            return ("storage", torch.cuda.FloatStorage, obj.key, "cuda:0", obj.tensor.numel(), None)
        return None

    def reducer_override(self, obj):
        if isinstance(obj, nn.Module) and "_backend" not in vars(obj):
            old = {"_backend": Backend03(), **{k: v for k, v in vars(obj).items() if k[0] != "_" or k in OLD}}
            return copyreg.__newobj__, (type(obj),), old
        if isinstance(obj, Backend03):
            return thnn._get_thnn_function_backend, ()
        if isinstance(obj, nn.Parameter):
            return nn.Parameter, (Tensor03(obj),), (True, False, OrderedDict())
        if isinstance(obj, Tensor03):
            size = tuple(obj.tensor.shape)
            return torch._utils._rebuild_tensor, (Storage03(obj.tensor), 0, size, obj.tensor.stride())
        return NotImplemented


OLD = ("_parameters", "_buffers", "_backward_hooks", "_forward_hooks", "_forward_pre_hooks", "_modules")


class Backend03:
    pass


class Tensor03:
    def __init__(self, parameter):
        self.tensor = parameter.detach()


class Storage03:
    def __init__(self, tensor):
        self.tensor, self.key = tensor, str(tensor.data_ptr())


def save_03(model, path):
    with open(path, "wb") as file:
        sizes = {"short": 2, "int": 4, "long": 8}
        system = {"protocol_version": 1001, "little_endian": True, "type_sizes": sizes}
        for part in (0x1950A86A20F9469CFC6C, 1001, system):
            pickle.dump(part, file, 2)
        pickler = Pickler03(file)
        pickler.dump(model)
        keys = sorted(pickler.storages)
        pickle.dump(keys, file, 2)
        for key in keys:
            data = pickler.storages[key].numpy().tobytes()
            file.write(struct.pack("<q", len(data) // 4) + data)


def save(model, path, form):
    if form == "torch 0.3":
        save_03(model, path)
    else:
        with warnings.catch_warnings():  # These classes have no source code.
            warnings.simplefilter("ignore")
            torch.save(model, path, _use_new_zipfile_serialization=form == "zip")


@pytest.fixture(scope="module", params=FORMS)
def published(request, ntoken, tmp_path_factory):
    """Returns the path of a look-alike in one of the forms, and its weights by their published names."""
    path = tmp_path_factory.mktemp("published") / "ptb_model.pt"
    with published_modules() as made:
        model = look_alike(made, ntoken)
        save(model, path, request.param)
    return path, {name: weight.detach() for name, weight in model.state_dict().items()}


def expected_loss(corpus, weights, split, batch_size):
    """Returns the loss in nats per word of the weights on a split, by the numpy cell and loops over the text."""
    text = batchify(getattr(load_corpus(str(corpus)), split), batch_size).numpy()
    weights = {name: weight.double().numpy() for name, weight in weights.items()}
    embedding, bias, ones = weights["encoder.weight"], weights["decoder.bias"], np.ones((batch_size, H))
    Ws = [weights[f"rnns.0._Ws.{i}"] for i in range(len(CELL.recurrent))]
    hidden, losses = np.zeros((batch_size, H)), []
    for words, following in itertools.pairwise(text):
        hidden = oracle.discrete_step(embedding[words], hidden, weights["rnns.0._W0"], Ws, *CELL, ones, ones)
        for b, word in enumerate(following):
            losses.append(-np.log(oracle.softmax(hidden[b] @ embedding.T + bias)[word]))
    return sum(losses) / len(losses)


# --- what is read ---


def test_look_alike_of_torch_03_has_the_names_of_its_time(ntoken, tmp_path):
    """The stand-ins of backend, GPU memory and source code would otherwise be tested on nothing."""
    with published_modules() as made:
        save_03(look_alike(made, ntoken), tmp_path / "model.pt")
    data = (tmp_path / "model.pt").read_bytes()
    for name in (
        "ctorch.cuda\nFloatStorage",
        "_get_thnn_function_backend",
        "_rebuild_tensor\n",
        "class RNNModel",
        "xrange",
    ):
        assert name.encode() in data


def test_weights_and_cell_are_read_exactly(published, ntoken):
    path, weights = published
    model = load(path)
    assert is_pickled(path) and model.genotype == CELL and (model.ntoken, model.nhid) == (ntoken, H)
    theirs = {"embedding": "encoder.weight", "bias": "decoder.bias", "cell.W0": "rnns.0._W0"}
    theirs |= {f"cell.Ws.{i}": f"rnns.0._Ws.{i}" for i in range(3)}
    assert model.weights.keys() == theirs.keys()
    for name, weight in model.weights.items():
        assert torch.equal(weight, weights[theirs[name]]) and weight.dtype == torch.float32


@pytest.mark.parametrize("split", ["valid", "test"])
def test_evaluate_prints_the_loss_of_the_equations(split, published, corpus):
    path, weights = published
    flags = (path, "--data", corpus, "--split", split, "--device", "cpu")
    code, out, err = call(evaluate, *flags, "--arch", str(CELL))
    assert (code, err) == (0, "")
    expected = expected_loss(corpus, weights, split, {"valid": 10, "test": 1}[split])
    loss = float(out.split("loss ")[1].split(",")[0])
    assert loss == pytest.approx(expected, abs=2e-6)
    assert (
        call(evaluate, path, "--data", corpus, "--split", split, "--device", "cpu")[1] == out
    )  # The file has its cell.


def test_finetuning_starts_from_a_published_model(published, corpus, tmp_path):
    path, weights = published
    flags = f"--data {corpus} --batch_size 4 --bptt 6 --epochs 1 --lr 1e-30 --device cpu --engine eager".split()
    code, _, err = call(train, "--finetune", path, *flags, "--save", tmp_path / "run")
    assert code == 0, err
    assert f"{math.exp(expected_loss(corpus, weights, 'valid', 10)):.2f}" in (tmp_path / "run" / "log.txt").read_text()
    code, out, err = call(evaluate, tmp_path / "run" / "best.pt", "--device", "cpu")
    assert code == 0 and float(out.split("loss ")[1].split(",")[0]) == pytest.approx(
        expected_loss(corpus, weights, "test", 1), abs=2e-6
    )
    code, _, err = call(train, "--resume", "--save", tmp_path / "run", "--epochs", "2")
    assert code == 0, err


def test_published_model_generates_text_and_scores_lines(published, corpus, tmp_path):
    path, _ = published
    code, out, err = call(generate, path, "--data", corpus, "--prompt", "a b", "--words", 5, "--device", "cpu")
    assert code == 0 and out.startswith("a b"), err
    (tmp_path / "text").write_text("a b c\n")
    code, out, err = call(evaluate, path, "--data", corpus, "--text", tmp_path / "text", "--fresh", "--json")
    assert code == 0 and '"tokens": 4' in out, err


def test_state_dict_needs_arch(ntoken, corpus, tmp_path):
    path = tmp_path / "weights.pt"
    with published_modules() as made:
        torch.save(look_alike(made, ntoken).state_dict(), path)
    code, out, err = call(evaluate, path, "--data", corpus, "--device", "cpu")
    assert (code, out) == (2, "") and err == f"evaluate.py: error: {path}: does not name its cell; add --arch\n"
    assert call(evaluate, path, "--data", corpus, "--arch", str(CELL), "--device", "cpu")[0] == 0
    for other in ("ENAS", "LSTM"):
        code, _, err = call(evaluate, path, "--data", corpus, "--arch", other, "--device", "cpu")
        nodes = len(CELL.recurrent)
        assert code == 2 and f"has the weights of a cell of {nodes} nodes; name that cell by --arch" in err
    code, _, err = call(train, "--finetune", path, "--data", corpus, "--save", tmp_path / "run")
    assert (code, err) == (2, f"train.py: error: --finetune: {path}: does not name its cell; add --arch\n")


def test_path_without_a_file_is_the_fault_that_is_named(tmp_path):
    for script in (generate, evaluate):
        code, _, err = call(script, tmp_path / "typo.pt", "--data", "penn", "--device", "cpu")
        assert code == 2 and f"{tmp_path / 'typo.pt'}: cannot be read" in err
        assert err.count("\n") == 1


# --- what is refused ---


def refused(*flags, script=evaluate):
    code, out, err = call(script, *flags)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1, (code, out, err)
    return err


def test_other_cell_and_other_corpus_are_refused(published, corpus, tmp_path):
    path, _ = published
    assert "has another cell, Genotype(" in refused(path, "--data", corpus, "--arch", "DARTS")
    assert "--arch: unknown genotype" in refused(path, "--data", corpus, "--arch", "DRATS")
    other = write_corpus(tmp_path, train=30, valid=16, test=16)
    (other / "train.txt").write_text("one two three four\n" * 30)
    assert f"--data {other}: has 6 word types" in refused(path, "--data", other)
    tune = ("--finetune", path, "--save", tmp_path / "run", "--batch_size", "4", "--device", "cpu")
    assert f"--data {other}: has 6 word types" in refused(*tune, "--data", other, script=train)
    assert "--arch Genotype(" in refused(*tune, "--data", corpus, "--arch", "DARTS", script=train)
    assert "--emsize 9" in refused(*tune, "--data", corpus, "--emsize", "9", script=train)
    assert not (tmp_path / "run").exists()


class Exploit:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", ["model", "cell", "genotype"])
def test_code_in_a_model_is_refused_before_it_runs(form, place, ntoken, corpus, tmp_path):
    target, path = tmp_path / "written", tmp_path / "model.pt"
    for number, call_ in enumerate([(open, (str(target), "w")), (os.mkdir, (str(target),)), (eval, ("1",))]):
        with published_modules() as made:
            model = look_alike(made, ntoken)
            exploit = Exploit(call_)
            if place == "genotype":
                model.rnns[0].genotype = made.Genotype(recurrent=exploit, concat=[1])
            else:
                (model if place == "model" else model.rnns[0]).note = exploit
            save(model, path, form)
        name = {0: "open", 1: "mkdir", 2: "eval"}[number]
        message = refused(path, "--data", corpus)
        assert f"{name}', which no model of the published code does" in message
        assert name in refused("--finetune", path, "--data", corpus, "--save", tmp_path / "run", script=train)
        assert not target.exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("form", FORMS)
def test_relaxed_model_of_a_search_is_refused_with_advice(form, ntoken, corpus, tmp_path):
    with published_modules() as made:
        save(look_alike(made, ntoken, kind="RNNModelSearch"), tmp_path / "model.pt", form)
    assert "train.py --arch log.txt" in refused(tmp_path / "model.pt", "--data", corpus)


def test_every_name_of_the_list_is_inert():
    """Whatever a pickle does with a name of the list, it gets a record of it."""
    unpickler = published_model.Unpickler(io.BytesIO())
    for name in published_model.NAMES - {"collections OrderedDict"}:
        stand_in = unpickler.find_class(*name.split())
        record = stand_in(1, "a")
        assert issubclass(stand_in, published_model.StandIn) and record.args == (1, "a")
        assert set(vars(record)) == {"args", "state"}
    for name in ("posix system", "builtins eval", "torch load", "torch.nn.modules.linear Bilinear", "model nn"):
        with pytest.raises(KeyError):
            unpickler.find_class(*name.split())


def pickled(*codes):
    return b"\x80\x02" + b"".join(codes) + b"."


DEEP = b")" + b"\x85" * 200_000  # a tuple in a tuple in a tuple, whose hash exhausts the C stack
HOSTILE = {
    "a table of 2^31 objects": pickled(b"Nr\xff\xff\xff\x7f"),
    "deep key": pickled(b"}", DEEP, b"Ns"),
    "a bytearray of 2^40 bytes": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
    "a string of 2^60 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b".",
    "protocol 4": pickle.dumps({"a": 1}, 4),
    "old instruction": pickled(b"(iposix\nsystem\n"),
    "registered extension": pickled(b"\x82\x01"),
    "state for a class": pickled(b"cmodel\nRNNModel\n}b"),
    "persistent name": pickled(b"Pposix\n"),
    "persistent number": pickled(b"K\x01Q"),
    "a list": pickled(b"]"),
    "nothing": b"",
    "no end": b"\x80\x02N",
    "model without state": pickled(b"cmodel\nRNNModel\n)\x81"),
}


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickle_is_refused_with_one_line(case, form, corpus, tmp_path):
    path = tmp_path / "model.pt"
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", HOSTILE[case])
    else:
        system = pickle.dumps({"little_endian": True}, 2)
        path.write_bytes(published_model.LEGACY + pickle.dumps(1001, 2) + system + HOSTILE[case] + pickle.dumps([], 2))
    assert str(path) in refused(path, "--data", corpus)


def spoiled(change, ntoken, path, form="zip"):
    with published_modules() as made:
        model = look_alike(made, ntoken)
        change(model, made)
        save(model, path, form)
    return path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", [
    lambda model, made: setattr(model.decoder, "weight", nn.Parameter(torch.randn(model.ntoken, H))),
    lambda model, made: setattr(model.rnns[0], "genotype", made.Genotype([("relu", 0)], range(1, 10**12))),
    lambda model, made: setattr(model.rnns[0], "genotype", made.Genotype([("relu", 0)], [1])),
    lambda model, made: setattr(model.rnns[0], "genotype", made.Genotype([("relu", 5)] * 3, [1])),
    lambda model, made: setattr(model.rnns[0], "genotype", 3),
    lambda model, made: setattr(model.rnns[0], "_W0", nn.Parameter(torch.randn(H, 2 * H))),
    lambda model, made: setattr(model.rnns[0], "_W0", nn.Parameter(torch.randn(2 * H, 2 * H).t())),
    lambda model, made: setattr(model.rnns[0], "_Ws", nn.ParameterList()),
    lambda model, made: setattr(model.encoder, "weight", None),
    lambda model, made: model.rnns.append(model.rnns[0]),
])  # fmt: skip
def test_model_of_another_form_is_refused_with_one_line(form, change, ntoken, corpus, tmp_path):
    path = spoiled(change, ntoken, tmp_path / "model.pt", form)
    assert str(path) in refused(path, "--data", corpus)


def test_tensor_of_another_type_is_refused(ntoken, corpus, tmp_path):
    path = spoiled(lambda model, made: model.half(), ntoken, tmp_path / "half.pt")
    assert str(path) in refused(path, "--data", corpus)


@settings(max_examples=120, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_model_is_a_model_or_one_error(data, published, tmp_path):
    """The format has no checksum, so that a changed weight is a weight."""
    content = bytearray(published[0].read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        last = data.draw(st.sampled_from([300, 3_000, len(content)]))  # Most of the file is weights.
        content[data.draw(st.integers(0, min(last, len(content)) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "model.pt"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        assert isinstance(load(path), published_model.PublishedModel)
    except CheckpointError as error:
        assert str(path) in str(error) and "\n" not in str(error)


def test_own_checkpoints_and_other_files_are_not_taken_for_published_ones(corpus, tmp_path):
    flags = f"--data {corpus} --emsize 6 --batch_size 4 --bptt 6 --epochs 1 --lr 1 --device cpu --engine eager".split()
    assert call(train, *flags, "--arch", str(CELL), "--save", tmp_path / "run")[0] == 0
    best = tmp_path / "run" / "best.pt"
    assert not any(map(is_pickled, (best, corpus / "train.txt", tmp_path, tmp_path / "none.pt")))
    assert call(evaluate, best, "--arch", str(CELL), "--device", "cpu")[0] == 0
    assert "has another cell" in refused(best, "--arch", "DARTS")
    assert parse(str(CELL)) == CELL and to_json(CELL)["concat"] == [1, 2, 3]
