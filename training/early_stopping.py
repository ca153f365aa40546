"""Conditions under which a run ends before its last epoch."""

from typing import Any

from genotypes import Genotype, from_json


class Patience:
    """Ends a run whose validation loss has not been below its best by more than `min_delta` for `epochs` successive
    epochs; with 0 epochs it never does."""

    def __init__(self, epochs: int, min_delta: float = 0.0):
        self.epochs, self.min_delta = epochs, min_delta
        self.best, self.waited = float("inf"), 0

    def step(self, loss: float) -> bool:
        """Records the validation loss of an epoch; returns whether the run should end."""
        if loss < self.best - self.min_delta:
            self.best, self.waited = loss, 0
        else:
            self.waited += 1
        return 0 < self.epochs <= self.waited

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]


def is_stable(history: list[tuple[int, Any]], epochs: int) -> bool:
    """Returns whether the last genotype of a history of (epoch, genotype) is also that of the `epochs` epochs before
    it; False for 0 epochs."""
    last = [genotype for _, genotype in history[-epochs - 1 :]]
    return 0 < epochs < len(history) and all(genotype == last[-1] for genotype in last)


def check_history(history: list[tuple[int, Any]], epochs: range, collapsed: bool) -> None:
    """Raises ValueError unless the history has a genotype for each of the epochs; a search that `collapsed` may lack
    the last one."""
    expected = [list(epochs), list(epochs[:-1])] if collapsed else [list(epochs)]
    if [epoch for epoch, _ in history] not in expected:
        raise ValueError("its history is of other epochs")
    for _, genotype in history:
        from_json(genotype)


def identities(genotype: Genotype) -> int:
    """Returns how many nodes are identity: searches that are too long collapse to cells of little else, as those of
    convolutional DARTS do to skip connections (Zela et al. 2020; Liang et al. 2019)."""
    return sum(op == "identity" for op, _ in genotype.recurrent)
