"""Early stopping ends a run by patience on the validation loss, or when its genotype is stable."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genotypes import DARTS_V1, DARTS_V2, Genotype
from training.early_stopping import Patience, identities, is_stable


@given(losses=st.lists(st.integers(0, 12), min_size=1, max_size=30), epochs=st.integers(1, 5), delta=st.integers(0, 3))
def test_patience_counts_epochs_since_the_best_loss(losses, epochs, delta):
    """The expected value is recomputed from all losses at each epoch."""
    patience = Patience(epochs, delta)
    for n in range(1, len(losses) + 1):
        best, at = float("inf"), -1
        for i, loss in enumerate(losses[:n]):
            if loss < best - delta:
                best, at = loss, i
        assert patience.step(losses[n - 1]) == (n - 1 - at >= epochs)


def test_zero_patience_never_stops():
    patience = Patience(0)
    assert not any(patience.step(loss) for loss in [1.0, 2.0] * 50)


def test_patience_resumes_from_its_state():
    one, other = Patience(2), Patience(2)
    assert [one.step(loss) for loss in (3.0, 2.0, 2.5)] == [False, False, False]
    other.load_state_dict(one.state_dict())
    assert other.step(2.0)


def test_nan_loss_counts_as_no_improvement():
    patience = Patience(1)
    assert not patience.step(1.0)
    assert patience.step(float("nan"))


@given(st.lists(st.integers(0, 2), max_size=12), st.integers(0, 5))
def test_genotype_is_stable_after_unchanged_epochs(genotypes, epochs):
    history = [[n, {"recurrent": g}] for n, g in enumerate(genotypes, 1)]
    expected = epochs > 0 and len(genotypes) > epochs and len(set(genotypes[-epochs - 1 :])) == 1
    assert is_stable(history, epochs) == expected


@pytest.mark.parametrize(
    ("genotype", "count"),
    [(DARTS_V1, 1), (DARTS_V2, 1), (Genotype((("identity", 0), ("identity", 1), ("relu", 0)), (1, 2, 3)), 2)],
)
def test_identity_nodes_are_counted(genotype, count):
    assert identities(genotype) == count
