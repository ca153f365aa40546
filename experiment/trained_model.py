"""Loads the model of a finished or running training, from a checkpoint of train.py or train_search.py, or from the
published code."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from experiment import arguments, published_model
from data import EOS, load_corpus
from engine.dropout import DropoutRates
from engine.reference import NORMS
from experiment.checkpoint import UNREADABLE, CheckpointError, load
from experiment.retrain_arguments import EVAL_BATCH_SIZES
from genotypes import Genotype, GenotypeError, cell_from_json, cell_to_json
from model import RNNModel, retrain_model
from model_search import RNNModelSearch
from training.optimizers import saved_average
from utils import DataError


class TrainedModel(NamedTuple):
    """A model with the weights that its run evaluated, and how its run read its corpus."""

    model: RNNModel
    words: list[str]  # the word of each id
    data: str  # the corpus, as of --data
    bptt: int  # the time steps of a segment
    limit_tokens: int  # how many tokens of train it read, 0 for all
    batch_sizes: dict[str, int]  # by split, of an evaluation
    sha256: dict[str, str]  # by split, the checksum of its text

    def require_single_text(self, path: str) -> None:
        """Raises `DataError`, which names the checkpoint, if the model cannot read one text alone."""
        if getattr(self.model.cell, "norm", None) == "batch":
            raise DataError(
                f"{path}: the model of a search with batch normalisation, which reads several texts at a time and not"
                " one; take a search with --norm none or layer, or a run of train.py"
            )


@contextmanager
def refusing(parser: arguments.Parser) -> Iterator[None]:
    """Ends the script with exit code 2 and one line for each fault of a cell, a checkpoint or a text in the block."""
    try:
        yield
    except GenotypeError as error:
        parser.refuse([f"--arch: {error}"])
    except CheckpointError as error:
        parser.refuse([str(error)])
    except DataError as error:
        parser.refuse(error.faults)


def refuse_unread_data(path: str, data: str | None) -> None:
    """Raises `DataError` if `--data` is given for a checkpoint that has its vocabulary itself. A file that cannot be
    read is left to `load_trained`."""
    if data is not None and Path(path).is_file() and not published_model.is_pickled(path):
        raise DataError(f"--data {data}: is for a model.pt of the published code, and {path} is none; leave it out")


def load_trained(path: str, cell: Genotype | str | None = None, data: str | None = None) -> TrainedModel:
    """Returns the model of best.pt or last.pt of a run, or of a model.pt that the published code pickled; that one has
    `cell` where the file does not name its own, and the vocabulary of the corpus `data` (penn by default).

    Raises `CheckpointError` if the file holds no such model, or one with another cell than `cell`, and `DataError` with
    every fault of the corpus.
    """
    corpus = "penn" if data is None else data
    saved = published_checkpoint(path, cell, corpus) if published_model.is_pickled(path) else load(path)
    try:
        if cell and cell != (its := cell_from_json(saved["genotype"])):
            raise CheckpointError(f"--arch: {path} has another cell, {its}; leave the flag out")
        flags, words = saved["flags"], saved["words"]
        batch_sizes = {split: int(saved["eval_batch_sizes"][split]) for split in EVAL_BATCH_SIZES}
        trained = TrainedModel(
            build_model(saved), words, flags["data"], int(flags["bptt"]), int(flags.get("limit_tokens", 0)),
            batch_sizes, dict(saved["sha256"]),
        )  # fmt: skip
        if not isinstance(trained.data, str) or not all(isinstance(word, str) for word in words) or EOS not in words:
            raise ValueError("not what a run writes")
        if min(trained.bptt, *batch_sizes.values()) < 1:
            raise ValueError("not what a run writes")
    except UNREADABLE as error:  # The file is a dict with other content.
        raise CheckpointError(f"{path}: holds no model of this project") from error
    return trained


def build_model(saved: dict[str, Any]) -> RNNModel:
    """Returns the model of a checkpoint with the weights that its run evaluated: the averaged ones if it has any. The
    model is built on the meta device and takes the checkpoint's own tensors, so that no memory is allocated for a size
    which the file merely claims. Raises `ValueError` or `TypeError` for a norm or a dtype that no run has."""
    vocabulary, flags = len(saved["words"]), saved["flags"]
    with torch.device("meta"):
        if saved["kind"] == "search":
            if flags["norm"] not in NORMS:
                raise ValueError("a norm that no run has")
            model = RNNModelSearch(vocabulary, flags["emsize"], DropoutRates(), norm=flags["norm"])
        else:
            cell = cell_from_json(saved["genotype"])
            model = retrain_model(vocabulary, flags["emsize"], DropoutRates(), cell, flags["n_experts"])
    if any(weight.dtype != torch.float32 for weight in saved["model"].values()):
        raise TypeError("weights that no run has")
    model.load_state_dict(saved["model"], assign=True)
    if average := saved_average(saved["optimizer"]):
        for w, ax in zip(model.weights(), average, strict=True):
            w.data.copy_(ax)
    return model


def published_checkpoint(path: str, cell: Genotype | str | None, data: str) -> dict[str, Any]:
    """Returns a model of the published code as a checkpoint of a run on the corpus `data`, with `cell` where the file
    does not name its own. Raises `CheckpointError`, and `DataError` with every fault of the corpus."""
    model = published_model.load(path)
    cell = published_model.cell_of(model, cell, path)
    corpus = load_corpus(data)
    if fault := published_model.vocabulary_fault(data, len(corpus.words), path, model.ntoken):
        raise CheckpointError(fault)
    return {
        "kind": "train", "model": model.weights, "optimizer": {"state": {}}, "genotype": cell_to_json(cell),
        "flags": {"emsize": model.nhid, "n_experts": 1, "data": data, "bptt": 35}, "words": corpus.words,
        "eval_batch_sizes": EVAL_BATCH_SIZES, "sha256": corpus.sha256,
    }  # fmt: skip
