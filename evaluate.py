"""Prints the perplexity of a checkpoint on a split of a corpus, equal to the one that its own run reported.

    python evaluate.py runs/train-.../best.pt                 # reads test.txt of its training corpus
    python evaluate.py runs/train-.../best.pt --data wikitext-2 --split valid

The validation text takes seconds. The test text is read with a batch size of 1 (more for a relaxed model with batch
normalisation), which takes minutes on a CPU at the published size.
"""

import sys

import torch

from data import read_split
from engine.dropout import DropoutRates
from engine.reference import NORMS
from experiment import arguments, signals
from experiment.checkpoint import UNREADABLE, CheckpointError, load
from experiment.validate_arguments import device_faults
from genotypes import cell_from_json
from model import RNNModel, retrain_model
from model_search import RNNModelSearch
from training.evaluation import evaluate, perplexity
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
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="best.pt or last.pt of a run of either script")
    parser.add_argument(
        "--data",
        metavar="NAME|DIR",
        help="penn, wikitext-2, builtin or a folder; words that the checkpoint does not know count as <unk> "
        "(default: what it was trained on)",
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


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if faults := device_faults(args.device):
        parser.refuse(faults)
    try:
        saved = load(args.checkpoint)
        model = build_model(saved)
        trained_on, words, batch_size, bptt = reading(saved, args.split)
        before = saved["sha256"][args.split]
    except CheckpointError as error:
        parser.refuse([str(error)])
    except UNREADABLE:  # The file is a dict with other content.
        parser.refuse([f"{args.checkpoint}: holds no model of this project"])
    name = args.data or trained_on
    try:
        ids, sha256 = read_split(name, args.split, words)
        source = batchify(ids, batch_size)
    except DataError as error:
        parser.refuse(error.faults)
    if args.data is None and sha256 != before:
        print(f"note: {name} {args.split} is not the text that the run read", file=sys.stderr)
    device = choose_device(args.device)
    loss = evaluate(model.to(device), source.to(device), bptt, args.split)
    print(f"{name} {args.split}: loss {loss:.6f}, perplexity {perplexity(loss):.4f}, {source.numel():,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(signals.run_script(main))
