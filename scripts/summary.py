"""Prints a table of retraining runs, and how far the first one's perplexity is below that of a model without context.

python scripts/summary.py runs/one runs/another
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import DataError, load_corpus
from experiment.signals import run_script
from genotypes import cell_from_json
from training.evaluation import format_share, perplexity


def unigram_perplexity(train: torch.Tensor, test: torch.Tensor, words: int) -> float:
    """Returns the perplexity of `test` under the word frequencies of `train`, with one count added to every word."""
    counts = torch.bincount(train, minlength=words).double() + 1
    return perplexity(-(counts / counts.sum()).log()[test].mean().item())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="directories of finished runs of train.py on one corpus")
    folders = parser.parse_args().runs
    results = {folder: json.loads((folder / "result.json").read_text(encoding="utf-8")) for folder in folders}
    config = json.loads((folders[0] / "config.json").read_text(encoding="utf-8"))
    flags = config["flags"]
    vocabulary = {name: flags.get(name, 0) for name in ("min_count", "vocab_size")}
    try:
        corpus = load_corpus(flags["data"], **vocabulary, test=False)
    except DataError as error:
        parser.error(f"{folders[0]}: {error}")

    print(f"\n{'cell':<12}{'valid ppl':>10}{'test ppl':>10}   run")
    for folder, result in results.items():
        test = "not read" if result["test_ppl"] is None else f"{result['test_ppl']:.2f}"
        print(f"{folder.name:<12}{result['valid_ppl']:>10.2f}{test:>10}   {folder}")
    if len(corpus.test):
        unigram = unigram_perplexity(corpus.train, corpus.test, len(corpus.words))
        print(f"{'no context':<12}{'':>10}{unigram:>10.2f}   (unigram model)")
    if shares := [f"{format_share(corpus.unknown_share(split))} of {split}"
                  for split in ("valid", "test") if len(corpus.unknown[split])]:  # fmt: skip
        print(f"{' and '.join(shares)} are unknown words, which count as <unk> in each of these perplexities")

    folder, result = next(iter(results.items()))
    if result["test_ppl"] is None:
        return 0
    random = sorted(r["valid_ppl"] for f, r in results.items() if f.name.startswith("random"))
    if random:
        better = sum(result["valid_ppl"] < ppl for ppl in random)
        print(f"\nThe {folder.name} cell's valid perplexity is below that of {better} of {len(random)} random cells"
              f" (their median: {median(random):.2f}).")  # fmt: skip
    factor = unigram / result["test_ppl"]
    print(f"Its test perplexity is {factor:.1f} times lower than without context. It is")
    print(cell_from_json(result["genotype"]))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
