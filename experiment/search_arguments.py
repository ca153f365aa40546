"""Defines the flags of a search and the texts that it reads."""

from argparse import Namespace

import torch

from experiment import arguments
from architect import RADIUS
from data import Corpus
from engine.reference import NORMS
from genotypes import STEPS
from training.evaluation import TEST_BATCH_SIZE, VALID_BATCH_SIZE
from training.optimizers import OPTIMIZERS

HELD_OUT = 0.1  # With --search_split train, the alphas are trained on this share of train.txt.


def build_parser() -> arguments.Parser:
    """Returns the parser of train_search.py."""
    parser = arguments.Parser(
        "train_search.py", "Search a recurrent cell for language modelling by gradient descent (DARTS)."
    )
    parser.add_flags("search", [
        ("unrolled", bool, False, "second order: take the alphas' gradient at the weights that the next weight step "
         "would give, not at the present weights"),
        ("hessian", ("finite", "exact"), "finite", "with --unrolled, how the product with the mixed second derivative "
         f"is computed, by two passes: finite is a central difference at radius {RADIUS:g}, always in fp32 and with "
         "relu's active set frozen; exact differentiates twice, in --precision (with --engine eager it needs that "
         "engine's memory). Over 20 batches of Penn Treebank, at --emsize 100 with --norm batch, the cosine between "
         "the two in fp32 has a median of 1.0000 and a minimum of 0.9999; in bf16 exact is faster, but far off in some "
         "batches (benchmarks/hessian.py)"),
        ("search_split", ("valid", "train"), "valid", "text that the alphas are trained on: valid.txt, as published, or"
         " the last tenth of train.txt, which keeps valid.txt unseen for choosing between cells"),
        ("norm", NORMS, "none", "normalisation of the relaxed cell's states: none, with the mean over predecessors "
         "instead of their sum; layer, over the hidden units of each batch element; batch, as published, over the "
         "batch. A norm hides from the alphas what depth costs a discrete cell, which has no norm, and with batch the "
         "recurrence can be chaotic (docs/signal.md)"),
        ("arch_lr", float, 3e-2, "learning rate of Adam on the alphas (published: 3e-3)"),
        ("arch_start", int, None, "number of first epochs in which only the weights are trained: a model that has "
         "learned no more than word frequencies favours other primitives than one that uses the context (default: 2, "
         "or fewer where that would leave no epoch for the alphas)"),
        ("arch_batch_size", int, None, "batch size of the alphas' text, a multiple of --small_batch_size; a larger "
         "batch makes the gradient of the alphas less noisy, which batches of a thousand words need (default: "
         "batch_size)"),
        ("arch_wdecay", float, 1e-3, "weight decay of the alphas"),
        ("derive_from", ("mean", "last"), "mean", "which alphas the genotype is derived from: their mean over all "
         "steps, in which later steps weigh more and which is stable where the alphas oscillate with the weights "
         "(docs/signal.md), or the last alphas, as published"),
        ("stop_stable", int, 0, "stop when the genotype has not changed for this many epochs; 0: never"),
        ("max_identity", int, STEPS, "stop when more than this many nodes of the genotype are identity, and keep the "
         "genotype of the epoch before, if there is one; with the number of nodes, 8, that never happens"),
        ("diagnose_every", int, 0, "number of steps between two diagnoses of the alphas' gradient, for visualize.py "
         "search: the cosine between the gradients of independent batches, the largest eigenvalue of the loss's Hessian"
         " in alpha, the error of the finite product, the loss through discretisation. Each takes as long as several "
         "steps and does not change the search; 0: never"),
    ])  # fmt: skip
    arguments.add_shared_flags(
        parser, size=300, batch_size=256, epochs=50, dropoute=0.0, wdecay=5e-7, bptt_std=0.0, seed=3, log_interval=50,
        optimizers=OPTIMIZERS,
    )  # fmt: skip
    return parser


def eval_batch_sizes(norm: str) -> dict[str, int]:
    """Returns the batch size with which the relaxed model evaluates each text, by name. That of the test text is a
    discrete cell's, except with batch normalisation: a batch of one has no statistics."""
    return {"valid": VALID_BATCH_SIZE, "test": VALID_BATCH_SIZE if norm == "batch" else TEST_BATCH_SIZE}


def search_texts(corpus: Corpus, split: str, limit: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the word ids (n,) that the weights are trained on, and those of the alphas, for a --search_split and a
    --limit_tokens."""
    train = corpus.train[:limit] if limit else corpus.train
    if split == "valid":
        return train, corpus.valid
    cut = len(train) - int(HELD_OUT * len(train))
    return train[:cut], train[cut:]


def texts_to_read(corpus: Corpus, args: Namespace) -> dict[str, tuple[torch.Tensor, int]]:
    """Returns the word ids (n,) and the batch size of each text that a search reads, by name."""
    train, alphas = search_texts(corpus, args.search_split, args.limit_tokens)
    batch_sizes = eval_batch_sizes(args.norm)
    return {
        "train": (train, args.batch_size),
        "the alphas": (alphas, args.arch_batch_size),
        "valid": (corpus.valid, batch_sizes["valid"]),
        **({"test": (corpus.test, batch_sizes["test"])} if args.test == "read" else {}),
    }
