"""Tests the features of cells on cells whose features are easily counted by hand."""

from genotypes import resolve
from study.features import depths, features


def test_features_of_published_cells():
    # relu 0, relu 1, tanh 2, relu 3, relu 4, identity 1, relu 5, relu 1
    assert depths(resolve("DARTS_V1").recurrent) == [1, 2, 3, 4, 5, 2, 6, 2]
    assert features(resolve("DARTS_V1")) == {
        "mean depth": 25 / 8, "largest depth": 6, "width": 3, "nodes on s_0": 1,
        "tanh": 1, "relu": 6, "sigmoid": 0, "identity": 1,
    }  # fmt: skip
    # tanh 0, tanh 1, relu 1, tanh 3, tanh 3, relu 3, relu 4, relu 7, relu 8, relu 8, relu 8
    assert depths(resolve("ENAS").recurrent) == [1, 2, 2, 3, 3, 3, 4, 5, 6, 6, 6]
