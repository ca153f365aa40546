"""Defines the flags of retraining and the texts that it reads."""

from argparse import Namespace

import torch

from data import Corpus
from experiment import arguments
from training.evaluation import TEST_BATCH_SIZE, VALID_BATCH_SIZE
from training.optimizers import OPTIMIZERS

EVAL_BATCH_SIZES = {"valid": VALID_BATCH_SIZE, "test": TEST_BATCH_SIZE}


def build_parser() -> arguments.Parser:
    """Returns the parser of train.py."""
    parser = arguments.Parser("train.py", "Retrain a recurrent cell for language modelling, from scratch.")
    cell = parser.add_argument_group("cell")
    cell.add_argument(
        "--arch",
        default="DARTS",
        help="the cell: a name (DARTS, DARTS_V1, DARTS_V2, ENAS), a search's run directory, a genotype.json, the text "
        "of a genotype, random:SEED, or LSTM or GRU, torch's own cells",
    )
    cell.add_argument("--n_experts", type=int, default=1, help="number of softmaxes in the mixture of softmaxes")
    arguments.add_shared_flags(
        parser, size=850, batch_size=64, epochs=8000, dropoute=0.1, wdecay=8e-7, bptt_std=5.0, seed=1267,
        log_interval=200, optimizers=("ntasgd", *OPTIMIZERS),
    )  # fmt: skip
    averaging = parser.add_argument_group("averaging (NT-ASGD)")
    averaging.add_argument(
        "--nonmono",
        type=int,
        default=5,
        help="averaging starts when the validation loss is above the lowest of all earlier epochs but the last NONMONO",
    )
    averaging.add_argument(
        "--finetune",
        metavar="RUN",
        help="start from the best weights of RUN and average from the first step on; text, sizes, dropout rates and "
        "regularisation are those of RUN unless given again; the condition of --nonmono ends this run",
    )
    twins = parser.add_argument_group("two passes over each batch, with different dropout masks")
    twins.add_argument(
        "--rdrop",
        type=float,
        default=0.0,
        help="R-Drop: coefficient of the mean symmetric KL divergence (nats) between the two predictions",
    )
    twins.add_argument(
        "--fraternal",
        type=float,
        default=0.0,
        help="fraternal dropout: coefficient of the mean squared difference between the two outputs after dropout",
    )
    return parser


def texts_to_read(corpus: Corpus, args: Namespace) -> dict[str, tuple[torch.Tensor, int]]:
    """Returns the word ids (n,) and the batch size of each text that retraining reads, by name."""
    return {
        "train": (corpus.train[: args.limit_tokens or None], args.batch_size),
        "valid": (corpus.valid, EVAL_BATCH_SIZES["valid"]),
        "test": (corpus.test, EVAL_BATCH_SIZES["test"]),
    }
