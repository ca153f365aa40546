"""The flags of a search, and the texts that it reads."""

import argparse
from argparse import Namespace

import torch

from architect import RADIUS
from data import Corpus
from engine.reference import NORMS
from experiment import arguments
from genotypes import STEPS
from training.evaluation import TEST_ROWS, VALID_ROWS
from training.optimizers import OPTIMIZERS

HELD_OUT = 0.1  # of train.txt, for the alphas, with --search_split train


def build_parser() -> arguments.Parser:
    parser = arguments.Parser(
        "train_search.py", "Search a recurrent cell for language modelling by gradient descent (DARTS)."
    )
    search = parser.add_argument_group("search")
    search.add_argument(
        "--unrolled",
        action="store_true",
        help="second order: the alphas' gradient is taken at the weights that the next weight step "
        "would give, not at the present ones",
    )
    search.add_argument(
        "--hessian",
        choices=("finite", "exact"),
        default="finite",
        help="with --unrolled, how the product with the mixed second derivative is formed, at the same cost: by a "
        f"central difference at radius {RADIUS:g}, always in fp32 and with relu's active set held, or exact by "
        "differentiating twice, in the --precision of all else (with --engine eager at its memory). Over 20 batches of "
        "Penn Treebank the cosine of the two in fp32 has a median of 1.0000 and a lowest value of 0.9999; in bf16 the "
        "exact one is faster, and in the odd batch far off (benchmarks/hessian.py)",
    )
    search.add_argument(
        "--search_split",
        choices=("valid", "train"),
        default="valid",
        help="text for the alphas: valid.txt, as published, or the last tenth of train.txt, which "
        "leaves valid.txt unseen for choosing",
    )
    search.add_argument(
        "--norm",
        choices=NORMS,
        default="none",
        help="of the relaxed cell's states: none, with the mean over predecessors in the place of their sum; layer, "
        "over the hidden units of each row; batch, the published one, over the batch. A norm hides from the alphas "
        "what depth costs a discrete cell, which has none, and under batch the recurrence is chaotic (docs/signal.md)",
    )
    add_alpha_flags(search)
    arguments.add_shared_flags(
        parser,
        size=300,
        batch_size=256,
        epochs=50,
        dropoute=0.0,
        wdecay=5e-7,
        bptt_std=0.0,
        seed=3,
        log_interval=50,
        optimizers=OPTIMIZERS,
    )
    return parser


def add_alpha_flags(search: argparse._ArgumentGroup) -> None:
    """How the alphas move, and when a search ends because of where they point."""
    search.add_argument(
        "--arch_lr", type=float, default=3e-2, help="learning rate of Adam on the alphas (published: 3e-3)"
    )
    search.add_argument(
        "--arch_start",
        type=int,
        help="epochs in which only the weights are trained, before the alphas begin to move: a model that knows no "
        "more than word frequencies asks for other primitives than one that reads its context (default: 2, or what "
        "leaves one epoch to the alphas)",
    )
    search.add_argument(
        "--arch_batch_size",
        type=int,
        help="rows of the alphas' text read side by side, a multiple of --small_batch_size; more make the gradient of "
        "the alphas less noisy, which batches of a thousand words need (default: batch_size)",
    )
    search.add_argument("--arch_wdecay", type=float, default=1e-3, help="weight decay of the alphas")
    search.add_argument(
        "--derive_from",
        choices=("mean", "last"),
        default="mean",
        help="which alphas the genotype is derived from: a mean over the steps that they have taken, in which later "
        "steps weigh more and which is steady where the alphas swing with the weights (docs/signal.md), or the last "
        "ones, as published",
    )
    search.add_argument(
        "--stop_stable",
        type=int,
        default=0,
        help="stop when the genotype has been the same for so many epochs; 0: never",
    )
    search.add_argument(
        "--max_identity",
        type=int,
        default=STEPS,
        help="stop when more than so many nodes of the genotype are identity, and keep the one of the epoch before",
    )
    search.add_argument(
        "--diagnose_every",
        type=int,
        default=0,
        help="every so many steps measure whether the alphas' gradient has a signal, for visualize.py search: how "
        "alike those of independent batches are, the largest eigenvalue of the loss's Hessian in alpha, what the "
        "finite product misses, what discretising costs. It takes as long as several steps and changes nothing of the "
        "search; 0: never",
    )


def eval_rows(norm: str) -> dict[str, int]:
    """In how many rows the relaxed model reads a text. Batch normalisation needs several, since a batch of one has no
    statistics; without it the test text is read in one row, as by a discrete cell."""
    return {"valid": VALID_ROWS, "test": VALID_ROWS if norm == "batch" else TEST_ROWS}


def search_texts(corpus: Corpus, split: str, limit: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Word ids for the weights and for the alphas."""
    train = corpus.train[:limit] if limit else corpus.train
    if split == "valid":
        return train, corpus.valid
    held_out = int(HELD_OUT * len(train))
    return train[:-held_out], train[-held_out:]


def texts_to_read(corpus: Corpus, args: Namespace) -> dict[str, tuple[torch.Tensor, int]]:
    """Word ids and the number of rows that they are cut into, by name."""
    train, alphas = search_texts(corpus, args.search_split, args.limit_tokens)
    rows = eval_rows(args.norm)
    return {
        "train": (train, args.batch_size),
        "the alphas": (alphas, args.arch_batch_size),
        "valid": (corpus.valid, rows["valid"]),
        "test": (corpus.test, rows["test"]),
    }
