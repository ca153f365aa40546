"""The flags of retraining, and the texts that it reads."""

from argparse import Namespace

import torch

from data import Corpus
from experiment import arguments
from training.evaluation import TEST_ROWS, VALID_ROWS
from training.optimizers import OPTIMIZERS

EVAL_ROWS = {"valid": VALID_ROWS, "test": TEST_ROWS}


def build_parser() -> arguments.Parser:
    parser = arguments.Parser("train.py", "Retrain a recurrent cell for language modelling, from scratch.")
    cell = parser.add_argument_group("cell")
    cell.add_argument(
        "--arch",
        default="DARTS",
        help="the cell: a name (DARTS, DARTS_V1, DARTS_V2, ENAS), a search's run directory, a genotype.json, the text "
        "of a genotype, random:SEED, or LSTM or GRU, torch's own cells",
    )
    cell.add_argument(
        "--n_experts", type=int, default=1, help="softmaxes that are mixed for each word (mixture of softmaxes)"
    )
    arguments.add_shared_flags(
        parser, size=850, batch_size=64, epochs=8000, dropoute=0.1, wdecay=8e-7, bptt_std=5.0, seed=1267,
        log_interval=200, optimizers=("ntasgd", *OPTIMIZERS),
    )  # fmt: skip
    averaging = parser.add_argument_group("averaging (NT-ASGD)")
    averaging.add_argument(
        "--nonmono",
        type=int,
        default=5,
        help="averaging starts when the validation loss is above the best of all but this many last epochs",
    )
    averaging.add_argument(
        "--finetune",
        metavar="RUN",
        help="start from the best weights of that run, with its text, sizes, dropouts and regularisation where they "
        "are not given anew, averaging from the first step on; what starts averaging elsewhere ends this",
    )
    twins = parser.add_argument_group("two passes over each batch, with different dropout masks")
    twins.add_argument(
        "--rdrop",
        type=float,
        default=0.0,
        help="R-Drop: times the mean symmetric divergence (nats) of the two predictions",
    )
    twins.add_argument(
        "--fraternal",
        type=float,
        default=0.0,
        help="fraternal dropout: times the mean squared difference of the two dropped outputs",
    )
    return parser


def texts_to_read(corpus: Corpus, args: Namespace) -> dict[str, tuple[torch.Tensor, int]]:
    """Word ids and the number of rows that they are cut into, by name."""
    return {
        "train": (corpus.train[: args.limit_tokens or None], args.batch_size),
        "valid": (corpus.valid, EVAL_ROWS["valid"]),
        "test": (corpus.test, EVAL_ROWS["test"]),
    }
