"""Reads a model that the published code of DARTS pickled (`torch.save(model, "model.pt")`), without running any of it.

Such a file names the classes of its modules, their source code beside them if torch was older than 1.6, which torch's
own safe loader does not read. Here every name of a fixed list stands for an inert record of what the pickle passes to
it. A pickle with another name, or with an instruction that no model needs, is refused before any of it is built.
"""

import io
import math
import pickle
import pickletools
import stat
import struct
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from engine.memory import out_of_memory
from experiment.checkpoint import UNREADABLE, CheckpointError, has_checksum
from genotypes import MAX_NODES, Genotype, from_json

# The names that a model of the published code has in its pickle, from torch 0.3 on.
NAMES = frozenset((
    "model RNNModel", "model DARTSCell", "utils LockedDropout", "genotypes Genotype",
    "torch.nn.modules.sparse Embedding", "torch.nn.modules.linear Linear", "torch.nn.modules.dropout Dropout",
    "torch.nn.modules.container ModuleList", "torch.nn.modules.container ParameterList",
    "torch.nn.backends.thnn _get_thnn_function_backend", "torch.nn.backends.thnn THNNFunctionBackend",
    "torch.nn.parameter Parameter", "torch._utils _rebuild_parameter", "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2", "torch FloatStorage", "torch.cuda FloatStorage", "collections OrderedDict",
    "__builtin__ set", "__builtin__ range", "__builtin__ xrange", "builtins set", "builtins range",
))  # fmt: skip
RELAXED = {"model_search RNNModelSearch", "model_search DARTSCellSearch"}
REFUSED = {"INST", "OBJ", "PERSID", "EXT1", "EXT2", "EXT4"}  # beside all that are newer than pickle's protocol 2
MAX_OPCODES = 50_000  # A model of 64 nodes has about 3,000; nested values that exhaust the C stack need more.
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickle with which torch before 1.6 begins a file
PROTOCOL = 1001


class PublishedModel(NamedTuple):
    """A model of the published code: its weights by their names here, and its cell unless the file lacks that."""

    weights: dict[str, Tensor]
    genotype: Genotype | None

    @property
    def ntoken(self) -> int:
        return len(self.weights["bias"])

    @property
    def nhid(self) -> int:
        return self.weights["embedding"].size(1)


class StandIn:
    """An inert object in the place of one that a pickle builds; it keeps the arguments and the state."""

    def __new__(cls, *args: Any):
        self = super().__new__(cls)
        self.args, self.state = args, {}
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def is_a(self, *names: str) -> bool:
        return type(self).__name__ in names


class Storage(NamedTuple):
    """Names the memory of a tensor in a file."""

    key: str
    numel: int


class Unpickler(pickle.Unpickler):
    """An unpickler that builds dicts, lists, tuples, strings, numbers and stand-ins alone."""

    def __init__(self, file: BinaryIO):
        super().__init__(file, encoding="latin-1")  # Python 2 wrote byte strings.
        self.stand_ins = {name: type(name.split()[1], (StandIn,), {}) for name in NAMES}

    def find_class(self, module: str, name: str) -> type:
        return OrderedDict if name == "OrderedDict" else self.stand_ins[f"{module} {name}"]

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "module":  # a class, its file and its source code
            return pid[1]
        kind, storage, key, _, numel, *view = pid
        if kind != "storage" or storage.__name__ != "FloatStorage" or view not in ([], [None]):
            raise ValueError("not the memory of float32 numbers")
        return Storage(key, numel)


def is_pickled(path: str | Path) -> bool:
    """Returns whether a path is a file that torch wrote, but no checkpoint of this project."""
    with suppress(OSError):
        if stat.S_ISREG(Path(path).stat().st_mode):
            with open(path, "rb") as file:
                start = file.read(len(LEGACY))
                return (start == LEGACY or start.startswith(b"PK")) and not has_checksum(file)
    return False


def load(path: str | Path) -> PublishedModel:
    """Returns the model that a file of the published code holds, or its `state_dict`. Raises `CheckpointError`."""
    try:
        with open(path, "rb") as file:
            if file.read(2) == b"PK":
                with zipfile.ZipFile(file) as archive:
                    return read_model(*open_zip(archive))
            file.seek(0)
            # A file would try to allocate whatever length a damaged pickle claims; these bytes return what there is.
            return read_model(*open_legacy(io.BytesIO(file.read())))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except UNREADABLE as error:
        if out_of_memory(error):
            raise
        raise CheckpointError(f"{path}: not a checkpoint, or a damaged one, or not of the published code") from error


def vocabulary_fault(data: str, ntoken: int, path: str | Path, expected: int) -> str:
    """Returns the fault of a corpus whose vocabulary is not of the size of a model's, "" for one that is."""
    if ntoken == expected:
        return ""
    return (
        f"--data {data}: has {ntoken:,} word types, but {path} has {expected:,}; name the corpus that it was trained on"
        " (not one whose valid.txt or test.txt has words that train.txt lacks, which the published code counts)"
    )


# --- the two formats of torch ---


def unpickle(file: BinaryIO) -> Any:
    """Returns what the pickle at the file's position describes, and leaves the file behind it. Raises `CheckpointError`
    for names that are not in `NAMES`, before anything is built."""
    start, names, largest = file.tell(), set(), 0
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.proto > 2 or opcode.name in REFUSED or count > MAX_OPCODES:
            raise ValueError("not the pickle of a model")
        if opcode.name == "GLOBAL":
            names.add(argument)
        elif opcode.name.endswith("PUT"):
            largest = max(largest, argument)
    if names & RELAXED:
        raise CheckpointError("a relaxed model of a search; train the cell in its log instead: train.py --arch log.txt")
    if foreign := names - NAMES:
        raise CheckpointError(
            f"names {min(foreign).replace(' ', '.')[:80]!r}, which no model of the published code does (a checkpoint of"
            " this project with such names is damaged); nothing of it was run"
        )
    size = file.tell() - start
    if largest > size:
        raise ValueError("a table of objects that is larger than the pickle")
    file.seek(start)
    return Unpickler(io.BytesIO(file.read(size))).load()


def open_zip(archive: zipfile.ZipFile) -> tuple[Any, Any]:
    """Returns the pickled object in a file of torch 1.6 or newer, and a function that reads the bytes of a storage."""
    [index] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    folder = index.removesuffix("data.pkl")

    def read(name: str) -> bytes:
        part = archive.getinfo(folder + name)
        if part.compress_type != zipfile.ZIP_STORED:
            raise ValueError("compressed, and of any size")
        return archive.read(part)

    if f"{folder}byteorder" in archive.namelist() and read("byteorder") != b"little":
        raise ValueError("numbers of another byte order")
    return unpickle(io.BytesIO(read("data.pkl"))), lambda storage: read(f"data/{storage.key}")


def open_legacy(file: BinaryIO) -> tuple[Any, Any]:
    """Returns the pickled object in a file of a torch before 1.6, and a function that reads the bytes of a storage."""
    magic, protocol, system, root, keys = (unpickle(file) for _ in range(5))
    if pickle.dumps(magic, 2) != LEGACY or protocol != PROTOCOL or not system["little_endian"]:
        raise ValueError("another format")
    places, position, end = {}, file.tell(), file.seek(0, io.SEEK_END)
    for key in keys:
        file.seek(position)
        [numel] = struct.unpack("<q", file.read(8))
        if not 0 <= 4 * numel <= end - position - 8:
            raise ValueError("truncated")
        places[key] = (position + 8, 4 * numel)
        position += 8 + 4 * numel

    def read(storage: Storage) -> bytes:
        offset, size = places[storage.key]
        file.seek(offset)
        return file.read(size)

    return root, read


# --- the model ---


def read_model(root: Any, read: Any) -> PublishedModel:
    """Returns the model of a pickled object, whose storages the function `read` reads. Raises an error of `UNREADABLE`
    for any other object."""
    genotype = None
    if isinstance(root, dict):
        records = dict(root)
    else:
        parts = root.state["_modules"]
        [cell] = parts["rnns"].state["_modules"].values()
        records = {
            "encoder.weight": parts["encoder"].state["_parameters"]["weight"],
            "decoder.weight": parts["decoder"].state["_parameters"]["weight"],
            "decoder.bias": parts["decoder"].state["_parameters"]["bias"],
            "rnns.0._W0": cell.state["_parameters"]["_W0"],
            **{f"rnns.0._Ws.{i}": w for i, w in cell.state["_modules"]["_Ws"].state["_parameters"].items()},
        }
        genotype = read_genotype(cell.state.get("genotype"))
    names = {"embedding": "encoder.weight", "bias": "decoder.bias", "cell.W0": "rnns.0._W0"}
    nodes = len(records) - len(names) - 1
    names |= {f"cell.Ws.{i}": f"rnns.0._Ws.{i}" for i in range(min(nodes, MAX_NODES))}
    if records.keys() != {*names.values(), "decoder.weight"} or (genotype and len(genotype.recurrent) != nodes):
        raise ValueError("other weights than those of a cell of so many nodes")
    weights = {name: read_tensor(records[theirs], read) for name, theirs in names.items()}
    if not torch.equal(weights["embedding"], read_tensor(records["decoder.weight"], read)):
        raise CheckpointError("its decoder has a matrix of its own; models of this project share the embedding's")
    V, H = weights["embedding"].shape
    shapes = [(V, H), (V,), (2 * H, 2 * H), *[(H, 2 * H)] * nodes]
    if [tuple(weight.shape) for weight in weights.values()] != shapes:
        raise ValueError("weights of other shapes")
    return PublishedModel(weights, genotype)


def read_tensor(record: StandIn, read: Any) -> Tensor:
    """Returns the contiguous float32 tensor that a record describes."""
    while record.is_a("Parameter", "_rebuild_parameter"):
        record = record.args[0]
    if not record.is_a("_rebuild_tensor", "_rebuild_tensor_v2"):
        raise ValueError("no tensor")
    storage, offset, size, stride = record.args[:4]
    numel = math.prod(size)
    if not 0 <= offset <= offset + numel <= storage.numel or torch.empty(size, device="meta").stride() != stride:
        raise ValueError("a tensor beyond its memory, or not contiguous")
    data = bytearray(read(storage)[4 * offset : 4 * (offset + numel)])
    return torch.frombuffer(data, dtype=torch.float32).view(size)


def cell_of(model: PublishedModel, given: Genotype | str | None, path: str | Path) -> Genotype:
    """Returns the cell that the file of a model names, else the `given` one. Raises `CheckpointError` if there is
    neither, or if the given one has another number of nodes than the weights."""
    if model.genotype is not None:
        return model.genotype
    if given is None:
        raise CheckpointError(f"{path}: does not name its cell; add --arch")
    nodes = sum(name.startswith("cell.Ws.") for name in model.weights)
    if isinstance(given, str) or len(given.recurrent) != nodes:
        raise CheckpointError(f"{path}: has the weights of a cell of {nodes} nodes; name that cell by --arch")
    return given


def read_genotype(value: StandIn | None) -> Genotype | None:
    """Returns the genotype that a cell of the published code keeps, in whose `concat` is a list or a range."""
    if value is None:
        return None
    recurrent, concat = value.args
    if isinstance(concat, StandIn) and concat.is_a("range", "xrange"):
        concat = range(*concat.args)
    return from_json({"recurrent": recurrent, "concat": concat})
