"""Prints the perplexity of a checkpoint on a split of a corpus, equal to the one that its own run reported.

    python evaluate.py runs/train-.../best.pt                 # reads test.txt of its training corpus
    python evaluate.py runs/train-.../best.pt --data wikitext-2 --split valid
    python evaluate.py ptb_model.pt --arch DARTS --data penn  # a model that the published code pickled

The validation text takes seconds. The test text is read with a batch size of 1 (more for a relaxed model with batch
normalisation), which takes minutes on a CPU at the published size.
"""

import sys
from functools import partial

import torch

from experiment import arguments, published_model, signals
from data import load_corpus, read_split
from engine.dropout import DropoutRates
from engine.reference import NORMS
from experiment.checkpoint import UNREADABLE, CheckpointError, load
from experiment.retrain_arguments import EVAL_BATCH_SIZES
from experiment.validate_arguments import device_faults
from genotypes import Genotype, GenotypeError, cell_from_json, cell_to_json, resolve_cell
from model import RNNModel, retrain_model
from model_search import RNNModelSearch
from training.evaluation import format_share, perplexity, score, unknown_warning
from training.optimizers import saved_average
from utils import DataError, batchify, choose_device

# Flags of the published test.py that describe the model or its training; a checkpoint of this project has them.
LIKE_TRAINING = (
    "emsize nhid nhidlast lr clip epochs batch_size bptt dropout dropouth dropouti dropoute seed nonmono log_interval"
    " save alpha beta wdecay continue_train n_experts max_seq_len_delta"
).split()


def build_parser() -> arguments.Parser:
    parser = arguments.Parser("evaluate.py", "Perplexity of a checkpoint on a split of a corpus.")
    for name in LIKE_TRAINING:
        parser.elsewhere[name] = "the checkpoint has it; leave it out"
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="best.pt or last.pt of a run of either script, or a model.pt of the published code, which is read without"
        " running what it contains",
    )
    parser.add_argument(
        "--data",
        metavar="NAME|DIR",
        help="penn, wikitext-2, builtin or a folder; words that the checkpoint does not know count as <unk> "
        "(default: what it was trained on; for a model of the published code, whose words are train.txt's, penn)",
    )
    parser.add_argument(
        "--arch", help="the cell, as of train.py, of a model of the published code whose file does not name it"
    )
    parser.add_argument("--split", choices=("valid", "test"), default="test", help="which text")
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is some), cpu, cuda or cuda:N")
    return parser


def build_model(saved: dict) -> RNNModel:
    """Returns the model of a checkpoint with the weights that its run evaluated: the averaged ones if it has any. The
    model is built on the meta device and takes the checkpoint's own tensors, so that no memory is allocated for a size
    which the file merely claims. Raises `ValueError` or `TypeError` for a norm or a dtype that no run has."""
    vocabulary, flags = len(saved["words"]), saved["flags"]
    with torch.device("meta"):
        if saved["kind"] == "search":
            norm = flags.get("norm", "batch")  # Older checkpoints lack the flag.
            if norm not in NORMS:
                raise ValueError("a norm that no run has")
            model = RNNModelSearch(vocabulary, flags["emsize"], DropoutRates(), norm=norm)
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


def reading(saved: dict, split: str) -> tuple[str, list[str], int, int]:
    """Returns how a run read a split: corpus, vocabulary, B and T. Raises `ValueError` for a value that no run has."""
    name, words = saved["flags"]["data"], saved["words"]
    batch_size, bptt = saved["eval_batch_sizes"][split], saved["flags"]["bptt"]
    if not (isinstance(name, str) and all(isinstance(word, str) for word in words) and min(batch_size, bptt) >= 1):
        raise ValueError("not what a run writes")
    return name, words, int(batch_size), int(bptt)


def published_checkpoint(path: str, cell: Genotype | str | None, data: str) -> dict:
    """Returns a model of the published code as a checkpoint of a run on the corpus `data`, with `cell` where the file
    does not name its own. Raises `CheckpointError`, and `DataError` with every fault of the corpus."""
    model = published_model.load(path)
    cell = model.genotype or cell
    if cell is None:
        raise CheckpointError(f"{path}: does not name its cell; add --arch")
    corpus = load_corpus(data)
    if fault := published_model.vocabulary_fault(data, len(corpus.words), path, model.ntoken):
        raise CheckpointError(fault)
    return {
        "kind": "train", "model": model.weights, "optimizer": {"state": {}}, "genotype": cell_to_json(cell),
        "flags": {"emsize": model.nhid, "n_experts": 1, "data": data, "bptt": 35}, "words": corpus.words,
        "eval_batch_sizes": EVAL_BATCH_SIZES, "sha256": corpus.sha256,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if faults := device_faults(args.device):
        parser.refuse(faults)
    try:
        cell = args.arch and resolve_cell(args.arch, note=partial(print, "note:", file=sys.stderr))
    except GenotypeError as error:
        parser.refuse([f"--arch: {error}"])
    try:
        if published_model.is_pickled(args.checkpoint):
            saved = published_checkpoint(args.checkpoint, cell, args.data or "penn")
        else:
            saved = load(args.checkpoint)
        if cell and cell != (its := cell_from_json(saved["genotype"])):
            parser.refuse([f"--arch {args.arch}: {args.checkpoint} has another cell, {its}; leave the flag out"])
        model = build_model(saved)
        trained_on, words, batch_size, bptt = reading(saved, args.split)
        before = saved["sha256"].get(args.split)  # None: the run had no test text
    except CheckpointError as error:
        parser.refuse([str(error)])
    except DataError as error:
        parser.refuse(error.faults)
    except UNREADABLE:  # The file is a dict with other content.
        parser.refuse([f"{args.checkpoint}: holds no model of this project"])
    name = args.data or trained_on
    try:
        ids, unknown, sha256 = read_split(name, args.split, words)
        source, unknown = batchify(ids, batch_size), batchify(unknown, batch_size) if unknown.any() else None
    except DataError as error:
        parser.refuse(error.faults)
    if args.data is None and before is not None and sha256 != before:
        print(f"note: {name} {args.split} is not the text that the run read", file=sys.stderr)
    device = choose_device(args.device)
    marked = None if unknown is None else unknown.to(device)
    result = score(model.to(device), source.to(device), bptt, args.split, marked)
    line = f"{name} {args.split}: loss {result.loss:.6f}, perplexity {perplexity(result.loss):.4f}, "
    line += f"bits per token {result.bits:.4f}, {source.numel():,} tokens"
    if result.unknown:
        line += f", {format_share(result.unknown)} unknown words"
        line += "" if result.known_ppl is None else f", without them perplexity {result.known_ppl:.4f}"
    print(line)
    for warning in unknown_warning(f"{name} {args.split}", result):
        print(warning, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(signals.run_script(main))
