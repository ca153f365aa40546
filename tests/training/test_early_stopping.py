"""When a run stops before its last epoch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genotypes import DARTS_V1, DARTS_V2, Genotype
from training.early_stopping import Patience, identities, is_stable


@given(losses=st.lists(st.integers(0, 12), min_size=1, max_size=30), epochs=st.integers(1, 5), delta=st.integers(0, 3))
def test_patience_counts_the_epochs_since_the_last_one_that_was_lower(losses, epochs, delta):
    """Against a second reading of the whole record at each epoch."""
    patience = Patience(epochs, delta)
    for n in range(1, len(losses) + 1):
        best, at = float("inf"), -1
        for i, loss in enumerate(losses[:n]):
            if loss < best - delta:
                best, at = loss, i
        assert patience.step(losses[n - 1]) == (n - 1 - at >= epochs)


def test_no_patience_is_never_over():
    patience = Patience(0)
    assert not any(patience.step(loss) for loss in [1.0, 2.0] * 50)


def test_patience_goes_on_from_its_state():
    one, other = Patience(2), Patience(2)
    assert [one.step(loss) for loss in (3.0, 2.0, 2.5)] == [False, False, False]
    other.load_state_dict(one.state_dict())
    assert other.step(2.0)


def test_a_loss_that_is_not_a_number_is_not_lower():
    patience = Patience(1)
    assert not patience.step(1.0)
    assert patience.step(float("nan"))


@given(st.lists(st.integers(0, 2), max_size=12), st.integers(0, 5))
def test_a_genotype_is_stable_when_it_is_that_of_the_epochs_before(genotypes, epochs):
    history = [[n, {"recurrent": g}] for n, g in enumerate(genotypes, 1)]
    expected = epochs > 0 and len(genotypes) > epochs and len(set(genotypes[-epochs - 1 :])) == 1
    assert is_stable(history, epochs) == expected


@pytest.mark.parametrize(
    ("genotype", "count"),
    [(DARTS_V1, 1), (DARTS_V2, 1), (Genotype((("identity", 0), ("identity", 1), ("relu", 0)), (1, 2, 3)), 2)],
)
def test_copies_are_counted(genotype, count):
    assert identities(genotype) == count
