"""Prints the perplexity of a checkpoint on a split of a corpus: in fp32, the one that its own run reported.

    python evaluate.py runs/train-.../best.pt                 # reads test.txt of its training corpus
    python evaluate.py runs/train-.../best.pt --data wikitext-2 --split valid
    python evaluate.py runs/train-.../best.pt --text letter.txt --fresh       # the likelihood of each line of a file
    python evaluate.py runs/train-.../best.pt --dynamic rms --cache_size 2000 --tune    # adapts to the text it reads
    python evaluate.py ptb_model.pt --arch DARTS --data penn  # a model that the published code pickled

The validation text takes seconds. The test text is read with a batch size of 1 (more for a relaxed model with batch
normalisation), which takes minutes on a CPU at the published size. docs/evaluation.md is about adapting.
"""

import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from experiment import evaluation_arguments, signals
from data import EOS, read_lines, read_split
from experiment.adapted_evaluation import Adapter, Setting, flags_of
from experiment.line_scores import HEAD, LineScore, as_json, as_row, line_scores, total
from experiment.trained_model import TrainedModel, load_trained, refuse_unread_data, refusing
from genotypes import resolve_cell
from training.evaluation import Score, format_share, perplexity, score, unknown_warning
from training.token_losses import token_losses, total_score
from utils import DataError, batchify, choose_device, progress_bar


def main(argv: list[str] | None = None) -> int:
    parser = evaluation_arguments.build_parser()
    args = parser.parse_args(argv)
    evaluation_arguments.complete(args)
    if faults := evaluation_arguments.faults(args, parser.get_default):
        parser.refuse(faults)
    with refusing(parser):
        if args.text is not None and not args.tune and args.dynamic != "rms":
            refuse_unread_data(args.checkpoint, args.data)
        cell = args.arch and resolve_cell(args.arch, note=partial(print, "note:", file=sys.stderr))
        trained = load_trained(args.checkpoint, cell, args.data)
        trained.model.to(choose_device(args.device))
        if args.text is not None:
            score_lines(args, trained)
        elif args.dynamic or args.cache_size:
            score_adapted_split(args, trained)
        else:
            score_split(args, trained)
    return 0


def read(args: Namespace, trained: TrainedModel, split: str) -> tuple[str, Tensor, Tensor | None]:
    """Returns the name of a split, its word ids (tokens,), and marks (tokens,) of the words outside the vocabulary,
    None if there are none. Raises `DataError`."""
    name = trained.data if args.data is None else args.data
    ids, unknown, sha256 = read_split(name, split, trained.words)
    before = trained.sha256.get(split)  # None: the run had no such text
    if args.data is None and before is not None and sha256 != before:
        print(f"note: {name} {split} is not the text that the run read", file=sys.stderr)
    return f"{name} {split}", ids, unknown if unknown.any() else None


def score_split(args: Namespace, trained: TrainedModel) -> None:
    """Prints the perplexity of a split as the model's own run measures it."""
    name, ids, unknown = read(args, trained, args.split)
    batch_size, device = trained.batch_sizes[args.split], trained.model.bias.device
    source = batchify(ids, batch_size, name).to(device)
    marked = None if unknown is None else batchify(unknown, batch_size)
    result = score(trained.model, source, trained.bptt, args.split, marked)
    report(name, result, source)
    warn_of_unknown(name, result)


def adapter_and_setting(args: Namespace, trained: TrainedModel) -> tuple[Adapter, Setting]:
    """Returns what predicts a text, and the numbers that it takes: those of the flags, or with --tune those that
    predict valid.txt best."""
    adapter, setting = Adapter(trained, args), Setting.of_flags(args)
    if args.tune:
        _, ids, _ = read(args, trained, "valid")
        setting = adapter.tune(ids[: args.tune_tokens or None], setting)
    return adapter, setting


def score_adapted_split(args: Namespace, trained: TrainedModel) -> None:
    """Prints the perplexity of a split by the model that adapts to it: with a cache, without it first."""
    adapter, setting = adapter_and_setting(args, trained)
    name, ids, unknown = read(args, trained, args.split)
    source = batchify(ids, adapter.batch_size, name)
    losses = adapter.losses_of(ids, setting, args.split)  # (1 or 2, n - 1, B)
    marked = None if unknown is None else batchify(unknown, adapter.batch_size)
    scores = [total_score(each, marked) for each in losses]
    dynamic, cache = flags_of(setting, args)
    for flags, result in zip((dynamic, dynamic + cache), scores, strict=False):
        report(name + flags, result, source)
    warn_of_unknown(name, scores[-1])


def score_lines(args: Namespace, trained: TrainedModel) -> None:
    """Prints the score of each line of a file, and of all. Raises `DataError` for a file that cannot be scored."""
    trained.require_single_text(args.checkpoint)
    lines, ids, unknown = read_lines(args.text, trained.words)
    lengths = [len(line.split()) + 1 for line in lines]  # with the line's end
    if args.fresh:
        eos = torch.tensor([trained.words.index(EOS)])
        losses = fresh_losses(trained, [torch.cat([eos, line]) for line in ids.split(lengths)])
    else:
        if len(ids) < 2:
            raise DataError(f"--text {args.text}: has one token, which nothing precedes; add --fresh")
        adapter, setting = adapter_and_setting(args, trained)
        if args.tune:
            print(f"note: chosen on valid:{''.join(flags_of(setting, args))}", file=sys.stderr)
        lengths[0] -= 1  # The first word is not predicted.
        losses = adapter.losses_of(ids, setting, "text")[-1, :, 0].split(lengths)  # (tokens,) for each line
        unknown = unknown[1:]
    print_scores(line_scores(lines, losses, unknown.split(lengths)), args.json)


def fresh_losses(trained: TrainedModel, lines: list[Tensor]) -> Iterator[Tensor]:
    """Yields the losses (n - 1,) in nats of the words of each line (n,) but the first, from the initial state."""
    for ids in progress_bar(lines, "scoring", "line"):
        source = ids[:, None].to(trained.model.bias.device)  # (n, 1)
        yield token_losses(trained.model, source, trained.bptt, show=False)[0, :, 0]


def print_scores(scores: Iterable[LineScore], as_json_lines: bool) -> None:
    """Prints the score of each line as it comes; below a table, also that of all lines."""
    if not as_json_lines:
        print(HEAD)
    seen = []
    for each in scores:
        print(as_json(each) if as_json_lines else as_row(each), flush=True)
        seen.append(each)
    if not as_json_lines:
        print(as_row(total(seen)))


def report(name: str, result: Score, source: Tensor) -> None:
    """Prints a line with the score of a text, which was read as `source` (n, B)."""
    line = f"{name}: loss {result.loss:.6f}, perplexity {perplexity(result.loss):.4f}, "
    line += f"bits per token {result.bits:.4f}, {source.numel():,} tokens in batches of {source.size(1)}"
    if result.unknown_share:
        line += f", {format_share(result.unknown_share)} unknown words"
        line += "" if result.known_ppl is None else f", without them perplexity {result.known_ppl:.4f}"
    print(line)


def warn_of_unknown(name: str, result: Score) -> None:
    """Prints a warning on stderr if many tokens of a text are unknown words."""
    for warning in unknown_warning(name, result):
        print(warning, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(signals.run_script(main, advice="--device cpu, or a smaller --cache_size"))
