"""Describes a cell by a few numbers, to find out which of them explain its perplexity."""

from collections.abc import Iterable
from statistics import mean

from genotypes import PRIMITIVES, Genotype


def depths(recurrent: Iterable[tuple[str, int]]) -> list[int]:
    """Returns the depth of each node of a genotype's `recurrent`: the number of nodes from s_0 to its output, itself
    included."""
    depth = [0]
    for _, predecessor in recurrent:
        depth.append(1 + depth[predecessor])
    return depth[1:]


def features(genotype: Genotype) -> dict[str, float]:
    """Returns the mean and the largest depth of the nodes, the largest number of nodes at one depth (width), the number
    of nodes on s_0, and how many nodes have each primitive."""
    depth = depths(genotype.recurrent)
    primitives = [primitive for primitive, _ in genotype.recurrent]
    return {
        "mean depth": mean(depth),
        "largest depth": max(depth),
        "width": max(depth.count(level) for level in depth),
        "nodes on s_0": depth.count(1),
        **{name: primitives.count(name) for name in PRIMITIVES if name != "none"},
    }
