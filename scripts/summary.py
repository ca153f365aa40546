"""A small table of retraining runs: perplexity, and how far it is below that of a model without any context.

python scripts/summary.py runs/one runs/another
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import load_corpus
from genotypes import from_json
from progress import perplexity


def unigram_perplexity(train: torch.Tensor, test: torch.Tensor, words: int) -> float:
    """Perplexity of `test` under the word frequencies of `train`, with one count added to every word."""
    counts = torch.bincount(train, minlength=words).double() + 1
    return perplexity(-(counts / counts.sum()).log()[test].mean().item())


def main(folders: list[str]) -> None:
    results = {folder: json.loads(Path(folder, "result.json").read_text()) for folder in folders}
    config = json.loads(Path(folders[0], "config.json").read_text())
    corpus = load_corpus(config["flags"]["data"])
    unigram = unigram_perplexity(corpus.train, corpus.test, len(corpus.words))

    print(f"\n{'cell':<12}{'valid ppl':>10}{'test ppl':>10}   run")
    for folder, result in results.items():
        print(f"{Path(folder).name:<12}{result['valid_ppl']:>10.2f}{result['test_ppl']:>10.2f}   {folder}")
    print(f"{'no context':<12}{'':>10}{unigram:>10.2f}   (unigram model)")

    folder, result = next(iter(results.items()))
    print(f"\nThe {Path(folder).name} cell's test perplexity is {unigram / result['test_ppl']:.1f} times lower than"
          f" without context. It is\n{from_json(result['genotype'])}")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
