"""Defines the flags of retraining and the texts that it reads."""

from argparse import Namespace

import torch

from experiment import arguments
from data import Corpus
from training.evaluation import TEST_BATCH_SIZE, VALID_BATCH_SIZE
from training.optimizers import OPTIMIZERS

EVAL_BATCH_SIZES = {"valid": VALID_BATCH_SIZE, "test": TEST_BATCH_SIZE}


def build_parser() -> arguments.Parser:
    """Returns the parser of train.py."""
    parser = arguments.Parser("train.py", "Retrain a recurrent cell for language modelling, from scratch.")
    parser.add_flags("cell", [
        ("arch", "ARCH", None, "the cell: a name in genotypes.py (DARTS, DARTS_V1, DARTS_V2, ENAS), a search's run "
         "directory, a genotype.json, a .txt, .py or log file that holds genotypes (the last is taken), the text of a "
         "genotype, random:SEED, or LSTM or GRU, torch's own cells (default: DARTS)"),
        ("n_experts", int, 1, "number of softmaxes in the mixture of softmaxes"),
    ])  # fmt: skip
    arguments.add_shared_flags(
        parser, size=850, batch_size=64, epochs=8000, dropoute=0.1, wdecay=8e-7, bptt_std=5.0, seed=1267,
        log_interval=200, optimizers=("ntasgd", *OPTIMIZERS),
    )  # fmt: skip
    parser.add_flags("averaging (NT-ASGD)", [
        ("nonmono", int, 5, "averaging starts when the validation loss is above the lowest of all earlier epochs but "
         "the last NONMONO"),
        ("average_after", int, 0, "averaging starts after this many epochs, whatever the validation loss is, so that "
         "all cells of a comparison are averaged over as many (0: as --nonmono says)"),
        ("finetune", "RUN", None, "start from the best weights of RUN and average from the first step on; text, cell "
         "and size are those of RUN, dropout rates and regularisation too unless given again; the condition of "
         "--nonmono ends this run. RUN may also be a model.pt of the published code, which gives size and cell"),
    ])  # fmt: skip
    parser.add_flags("two passes over each batch, with different dropout masks", [
        ("rdrop", float, 0.0,
         "R-Drop: coefficient of the mean symmetric KL divergence (nats) between the two predictions"),
        ("fraternal", float, 0.0,
         "fraternal dropout: coefficient of the mean squared difference between the two outputs after dropout"),
    ])  # fmt: skip
    return parser


def texts_to_read(corpus: Corpus, args: Namespace) -> dict[str, tuple[torch.Tensor, int]]:
    """Returns the word ids (n,) and the batch size of each text that retraining reads, by name."""
    return {
        "train": (corpus.train[: args.limit_tokens or None], args.batch_size),
        "valid": (corpus.valid, EVAL_BATCH_SIZES["valid"]),
        **({"test": (corpus.test, EVAL_BATCH_SIZES["test"])} if args.test == "read" else {}),
    }
