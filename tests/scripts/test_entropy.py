"""Tests that a model reaches the entropy of a source whose entropy is known in closed form."""

import json
import math

import numpy as np

import train

STATES = 12  # Each state is a word of the language; state 0 is the end of a line.


def markov_chain(rng):
    """Returns a random transition matrix (S, S). Each row has a few likely successors; a line has at least one word."""
    matrix = rng.dirichlet(np.full(STATES, 0.25), size=STATES) + 1e-3
    matrix[0, 0] = 0
    return matrix / matrix.sum(1, keepdims=True)


def entropy_rate(matrix):
    """Returns H = - sum_i pi_i sum_j P_ij log P_ij in nats; pi is the stationary distribution (Cover & Thomas, 4.2)."""
    values, vectors = np.linalg.eig(matrix.T)
    pi = np.real(vectors[:, np.argmax(values.real)])
    pi = pi / pi.sum()
    logs = np.log(np.where(matrix > 0, matrix, 1))
    return float(-(pi[:, None] * matrix * logs).sum())


def text(matrix, rng, length):
    state, words = 0, []
    for _ in range(length):
        state = rng.choice(STATES, p=matrix[state])
        words.append("\n" if state == 0 else f"w{state}")
    return " ".join(words).replace(" \n ", "\n").strip() + "\n"


def test_trained_model_reaches_the_perplexity_of_a_markov_chain(tmp_path):
    rng = np.random.default_rng(4)
    matrix = markov_chain(rng)
    for split, length in (("train", 12_000), ("valid", 4_000), ("test", 4_000)):
        (tmp_path / f"{split}.txt").write_text(text(matrix, rng, length))
    expected = math.exp(entropy_rate(matrix))
    assert 2 < expected < STATES / 2  # far from 1 and from the perplexity without context

    flags = (
        "--arch DARTS --emsize 24 --batch_size 16 --bptt 20 --lr 10 --epochs 5 --dropout 0 --dropouth 0 --dropoutx 0"
    )
    more = "--dropouti 0 --dropoute 0 --device cpu --engine eager"
    assert train.main([*flags.split(), *more.split(), "--data", str(tmp_path), "--save", str(tmp_path / "run")]) == 0
    test_ppl = json.loads((tmp_path / "run" / "result.json").read_text())["test_ppl"]
    # The perplexity on a finite text may be a few percent below the expected one by chance.
    assert 0.95 * expected < test_ppl < 1.10 * expected
