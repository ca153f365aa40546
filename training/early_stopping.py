"""When a run ends before its last epoch."""

from typing import Any

from genotypes import Genotype, from_json


class Patience:
    """Over when the validation loss has not been lower than its best by more than `min_delta` for `epochs` epochs
    running; never for 0 epochs."""

    def __init__(self, epochs: int, min_delta: float = 0.0):
        self.epochs, self.min_delta = epochs, min_delta
        self.best, self.waited = float("inf"), 0

    def step(self, loss: float) -> bool:
        """After an epoch with this validation loss."""
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
    """Whether the genotype that the last epoch ended with is that of the `epochs` epochs before it; not for 0.

    history: (epoch, genotype) at the end of each epoch so far.
    """
    last = [genotype for _, genotype in history[-epochs - 1 :]]
    return 0 < epochs < len(history) and all(genotype == last[-1] for genotype in last)


def check_history(history: list[tuple[int, Any]], epochs: int, collapsed: bool) -> None:
    """Raises ValueError unless there is a genotype for each of the epochs, but for the last of a search that ended
    because of it."""
    if [epoch for epoch, _ in history] not in (list(range(1, epochs + 1)), list(range(1, epochs + 1 - collapsed))):
        raise ValueError("its history is of other epochs")
    for _, genotype in history:
        from_json(genotype)


def identities(genotype: Genotype) -> int:
    """How many nodes copy an earlier node: a cell that is nearly all copies is what a search collapses to that goes on
    for too long, as convolutional DARTS does to skip connections (Zela et al. 2020; Liang et al. 2019)."""
    return sum(op == "identity" for op, _ in genotype.recurrent)
