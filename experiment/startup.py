"""From the command line to a run that can begin, or go on: flags, corpus and earlier state, checked together.

What a user can mend ends the script here, with exit code 2 and one line for each fault, before anything is
written.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

import data
from experiment import arguments, checkpoint, validate_arguments
from experiment.distributed import Distributed
from experiment.lock import Locked
from experiment.resume import changed_flags, read_config, state_faults, tuned_with, tuning_faults
from experiment.run_directory import NullRun, Run
from genotypes import GenotypeError, resolve_cell
from utils import RunError

# The texts that a script reads: by name the word ids, and the number of rows that they are cut into.
Texts = dict[str, tuple[Tensor, int]]


def start_run(
    kind: str,
    parser: arguments.Parser,
    argv: list[str] | None,
    texts: Callable[[data.Corpus, Namespace], Texts],
    ranks: Distributed,
) -> tuple[Namespace, data.Corpus, Run, dict[str, Any] | None]:
    """The flags, the corpus, the run's directory, and the state to go on from (None for a new run). What the first rank
    finds holds for all."""
    if not ranks.is_main:
        parser.quiet = True
        told = ranks.broadcast_from_main(lambda: None)
        if isinstance(told, int):
            sys.exit(told)
        args, saved, sha256 = told
        try:
            corpus = data.load_corpus(args.data)
        except data.DataError as error:
            raise RunError(f"on the machine of rank {ranks.rank}: {' '.join(error.faults)}") from error
        if corpus.sha256 != sha256:
            raise RunError(
                f"--data {args.data}: another text on the machine of rank {ranks.rank} than of the first rank"
            )
        return args, corpus, NullRun(args.save), saved
    try:
        args, corpus, run, saved = start_on_main_rank(kind, parser, argv, texts, ranks)
    except SystemExit as end:
        code = end.code
        ranks.broadcast_from_main(lambda: code)
        raise
    ranks.broadcast_from_main(lambda: (args, saved, corpus.sha256))
    return args, corpus, run, saved


def start_on_main_rank(
    kind: str,
    parser: arguments.Parser,
    argv: list[str] | None,
    texts: Callable[[data.Corpus, Namespace], Texts],
    ranks: Distributed,
) -> tuple[Namespace, data.Corpus, Run, dict[str, Any] | None]:
    """The same on the first rank.

    A resumed run has the flags in its config.json, but for those given anew. Nothing is downloaded for flags
    that cannot be used, and the directory of a new run is made last.
    """
    args, config, first = parser.parse_args(argv), None, None
    if args.resume:
        config = read_config(parser, args.save, "--resume")
        parser.set_defaults(**config["flags"])
    elif getattr(args, "finetune", None) is not None:
        first = read_config(parser, args.finetune, "--finetune")
        parser.set_defaults(**tuned_with(first["flags"], args), optimizer="asgd")
    args = parser.parse_args(argv)
    rate_given = args.lr is not None
    arguments.complete(args, kind)
    found = validate_arguments.validate(args, parser.get_default) + validate_arguments.rank_faults(
        args, ranks.size, ranks.on_this_machine
    )
    if "arch" in vars(args):
        args.arch = cell_text(args.arch)
    if first is not None:
        found += tuning_faults(args, first["flags"], rate_given)

    run = saved = None
    if config is not None:
        found += changed_flags(args, config["flags"], f"the run in {args.save}")
        try:
            run = None if found else Run(args.save)  # before anything is read, so that nobody writes it meanwhile
            saved, note = checkpoint.load_last(args.save)
            if note:
                print(f"{parser.prog}: {note}", file=sys.stderr)
        except (Locked, checkpoint.CheckpointError) as error:
            found.append(f"--save: {error}" if run is None else str(error))
        if saved is not None:
            found += state_faults(kind, args, config["flags"], saved, ranks.size)

    corpus = None
    if not found or data.is_available(args.data):
        try:
            corpus = data.load_corpus(args.data)
        except data.DataError as error:
            found += error.faults
    if corpus is not None:
        found += length_faults(args, texts(corpus, args))
        if config is not None and config.get("sha256") != corpus.sha256:
            found.append(f"--data {args.data}: not the text that the run in {args.save} began with")
        if first is not None and first.get("sha256") != corpus.sha256:
            found.append(f"--data {args.data}: not the text that the run in {args.finetune} began with")
    if not found and run is None:
        try:
            run = Run(args.save)
            if any(
                map(validate_arguments.holds_work, run.folder.iterdir())
            ):  # another came and went while the corpus was read
                found.append(
                    f"--save {args.save}: holds files already; add --resume to continue a run, or take another"
                )
        except Locked as error:
            found.append(f"--save: {error}")
    if found:
        if run is not None:
            run.release()
        parser.refuse(found)
    return args, corpus, run, saved


@contextmanager
def memory_explained(args: Namespace) -> Iterator[None]:
    """Running out of memory inside becomes a `RunError` that tells the sizes and what would need less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not checkpoint.out_of_memory(error):
            raise
        rows = args.small_batch_size
        least = 2 if validate_arguments.normalises_over_rows(args) else 1
        smaller = max((n for n in range(least, rows // 2 + 1) if args.batch_size % n == 0), default=None)
        advice = f"--small_batch_size {smaller} needs about half" if smaller else "take a smaller --emsize or --bptt"
        raise RunError(
            f"out of memory with --emsize {args.emsize}, --bptt {args.bptt} and {rows} rows of --batch_size"
            f" {args.batch_size} at a time; {advice} (a new run), or go on with --resume where more memory is free"
        ) from error


def cell_text(arch: str) -> str:
    """The text of a genotype, which stays what it is when a search goes on or its directory moves."""
    try:
        return str(resolve_cell(arch))
    except GenotypeError:
        return arch  # `validate` has reported it


def length_faults(args: Namespace, texts: Texts) -> list[str]:
    """A fault for each text that has fewer than two rows, one to read and one to predict."""
    return [
        (f"--limit_tokens {args.limit_tokens}" if 0 < args.limit_tokens < 2 * rows else f"--data {args.data}")
        + f": {len(ids):,} tokens for {name} are too few for {rows} rows of text (at least"
        f" {2 * rows:,}); use a longer text" + (" or a smaller --batch_size" if rows == args.batch_size else "")
        for name, (ids, rows) in texts.items()
        if len(ids) < 2 * rows
    ]


def describe(corpus: data.Corpus, limit: int) -> str:
    """One line on a corpus: its size, what of it is read, and what is outside the vocabulary."""
    unknown = sum(corpus.unknown.values())
    return (
        (f"the first {limit:,} tokens of " if 0 < limit < len(corpus.train) else "")
        + f"{corpus.name} with {len(corpus.train):,} + {len(corpus.valid):,} + {len(corpus.test):,} tokens, "
        f"{len(corpus.words):,} word types" + (f" ({unknown:,} words of valid and test are unknown)" if unknown else "")
    )
