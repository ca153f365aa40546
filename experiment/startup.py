"""Starts or resumes a run from its command line: checks flags, corpus and saved state together before it writes.

Faults that a user can correct end the script here with exit code 2 and one line each.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

import data
from experiment import arguments, checkpoint, validate_arguments
from engine.linear_cross_entropy import MAX_CHUNK_BYTES
from engine.memory import out_of_memory
from experiment.distributed import Distributed
from experiment.lock import Locked
from experiment.published_model import vocabulary_fault
from experiment.resume import (
    changed_flags,
    is_same_text,
    read_config,
    read_finetuned,
    state_faults,
    tuned_with,
    tuning_faults,
    with_younger,
)
from experiment.run_directory import NullRun, Run, new_folder
from genotypes import GenotypeError, resolve_cell
from training.evaluation import format_share
from utils import DataError, RunError

# Maps the name of each text that a script reads to its word ids (n,) and the batch size that they are cut into.
Texts = dict[str, tuple[Tensor, int]]
TextsToRead = Callable[[data.Corpus, Namespace], Texts]
MANY_WORDS = 50_000  # From so many word types on, a line says what they need in memory.


class Started(NamedTuple):
    """Holds the flags, the corpus, the run directory and the saved state with which a run starts."""

    args: Namespace
    corpus: data.Corpus
    run: Run
    saved: dict[str, Any] | None  # the state to resume from; None for a new run


def start_run(
    kind: str, parser: arguments.Parser, argv: list[str] | None, texts: TextsToRead, ranks: Distributed
) -> Started:
    """Starts a run of this kind ("search" or "train") from its command line, or resumes one.

    The main rank decides for all ranks. Exits with code 2 on faults of the flags, the corpus or the saved state; raises
    `RunError` on another rank whose machine lacks the corpus or has a different one.
    """
    parser.quiet = not ranks.is_main
    started, exit_code = None, None
    if ranks.is_main:
        try:
            started = start_on_main_rank(kind, parser, argv, texts, ranks)
        except SystemExit as end:
            exit_code = end.code
    exit_code, shared = ranks.broadcast_from_main(
        lambda: (exit_code, started and (started.args, started.saved, started.corpus.sha256))
    )
    if exit_code is not None:
        sys.exit(exit_code)
    if started:
        return started
    args, saved, sha256 = shared
    try:
        corpus = load_corpus(args)
    except DataError as error:
        raise RunError(f"on the machine of rank {ranks.rank}: {' '.join(error.faults)}") from error
    if corpus.sha256 != sha256:
        raise RunError(
            f"--data {args.data}: rank {ranks.rank} has another text than the main rank; copy that one there"
        )
    return Started(args, corpus, NullRun(args.save), saved)


def start_on_main_rank(
    kind: str, parser: arguments.Parser, argv: list[str] | None, texts: TextsToRead, ranks: Distributed
) -> Started:
    """Does the work of `start_run`, on the main rank; exits with code 2 on faults. Nothing is downloaded for flags that
    cannot be used, and the directory of a new run is created last."""
    args, earlier, faults = read_flags(kind, parser, argv, ranks)
    run = saved = None
    if args.resume:
        try:
            run = None if faults else Run(args.save)  # locked before the state is read: no other process may change it
            saved, note = checkpoint.load_last(args.save)
            if note:
                print(f"{parser.prog}: {note}", file=sys.stderr)
        except (Locked, checkpoint.CheckpointError) as error:
            faults.append(f"--save: {error}" if run is None else str(error))
        if saved is not None:
            saved["flags"] = with_younger(saved.get("flags"), earlier["flags"])
            faults += state_faults(kind, args, earlier["flags"], saved, ranks.size)

    corpus = None
    if not faults or data.is_available(args.data):
        try:
            corpus = load_corpus(args)
        except DataError as error:
            faults += error.faults
    if corpus is not None:
        faults += length_faults(args, texts(corpus, args))
        if "ntoken" in earlier:
            fault = vocabulary_fault(args.data, len(corpus.words), args.finetune, earlier["ntoken"])
            faults += [fault] if fault else []
        elif earlier and not is_same_text(earlier.get("sha256"), corpus.sha256):
            where = args.save if args.resume else args.finetune
            faults.append(
                f"--data {args.data}: not the text that the run in {where} began with; give that text by --data"
            )
    if not faults and run is None:
        try:
            run = Run(args.save) if parser.parse_args(argv).save else unnamed_run(kind, args)
            if validate_arguments.must_not_be_overwritten(run.folder):  # written while the corpus was read
                faults.append(validate_arguments.HOLDS_FILES.format(args.save))
            else:
                for name in checkpoint.NAMES:  # of a run that ended before its first step
                    (run.folder / name).unlink(missing_ok=True)
        except Locked as error:
            faults.append(f"--save: {error}")
    if faults:
        if run is not None:
            run.release()
        parser.refuse(faults)
    if len(corpus.words) > MANY_WORDS:
        print(f"{parser.prog}: {vocabulary_note(args, len(corpus.words))}", file=sys.stderr)
    if args.resume and args.engine != (before := earlier["flags"]["engine"]):
        run.log(f"--engine {args.engine} from here on, {before} before: the digits differ by rounding")
    return Started(args, corpus, run, saved)


def unnamed_run(kind: str, args: Namespace) -> Run:
    """Returns the directory of a run without --save, under another name than `complete` found if a run that started in
    the same second has taken that one."""
    while True:
        try:
            return Run(args.save)
        except Locked:
            args.save = str(new_folder(kind))


def read_flags(
    kind: str, parser: arguments.Parser, argv: list[str] | None, ranks: Distributed
) -> tuple[Namespace, dict[str, Any], list[str]]:
    """Returns the flags, config.json of the run that --resume or --finetune refers to ({} without), and their faults.

    A resumed run has the flags in its config.json, except for those given again. A fine-tuning run takes the flags
    `resume.TUNED_WITH` from the run that it starts from, unless they are given again.
    """
    args, earlier = parser.parse_args(argv), {}
    if args.resume:
        earlier = read_config(parser, args.save, "--resume")
        parser.set_defaults(**earlier["flags"])
    elif getattr(args, "finetune", None) is not None:
        earlier = read_finetuned(parser, args)
        clips = args.clip is not None or args.clip_value > 0
        parser.set_defaults(**tuned_with(earlier["flags"], clips), optimizer="asgd")
    args = parser.parse_args(argv)
    rate_given = args.lr is not None
    arguments.complete(args, kind)
    faults = validate_arguments.validate(kind, args, parser.get_default)
    faults += validate_arguments.rank_faults(args, ranks.size, ranks.on_this_machine)
    if kind == "train":
        try:
            # The text of the cell is the same when a search is resumed or its directory moves.
            args.arch = str(resolve_cell(args.arch, note=lambda line: print(f"{parser.prog}: {line}", file=sys.stderr)))
        except GenotypeError as error:
            faults.append(f"--arch: {error}")
    if args.resume:
        # A flag that may not change has no other remedy than to leave it out.
        faults = changed_flags(args, earlier["flags"]) or faults
    elif earlier:
        faults += tuning_faults(args, earlier["flags"], rate_given)
    return args, earlier, faults


def load_corpus(args: Namespace) -> data.Corpus:
    """Returns the corpus that the flags describe. Raises DataError."""
    vocabulary = {"min_count": args.min_count, "vocab_size": args.vocab_size}
    return data.load_corpus(args.data, **vocabulary, test=args.test == "read")


def batch_sizes(args: Namespace, ranks: int) -> tuple[int, int]:
    """Returns how many batch elements each of `ranks` ranks has, and how many of them it computes at a time."""
    local_batch_size = args.batch_size // ranks
    return local_batch_size, min(args.small_batch_size, local_batch_size)


@contextmanager
def memory_explained(args: Namespace, ranks: int) -> Iterator[None]:
    """Turns an out-of-memory error inside the block into a `RunError` with the sizes that each of `ranks` ranks has,
    and with what needs less memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        local_batch_size, at_once = batch_sizes(args, ranks)
        least = 2 if validate_arguments.normalises_over_batch(args) else 1
        sizes = local_batch_size, getattr(args, "arch_batch_size", args.batch_size) // ranks
        divisors = (n for n in range(least, at_once // 2 + 1) if not any(size % n for size in sizes))
        smaller = max(divisors, default=None)
        advice = f"--small_batch_size {smaller} needs about half" if smaller else "take a smaller --emsize or --bptt"
        each = f" on each of {ranks} ranks" if ranks > 1 else ""
        raise RunError(
            f"out of memory with --emsize {args.emsize}, --bptt {args.bptt} and {at_once} of the {local_batch_size}"
            f" batch elements at a time{each}; {advice} (a new run), or --resume where more memory is free"
        ) from error


def vocabulary_memory(args: Namespace, words: int) -> float:
    """Returns about how many bytes a run needs for a vocabulary of `words` word types, beside the program itself.

    The embedding has a gradient, an average or moments, and a copy while it is saved. The logits of a chunk of words
    have their softmax and gradient beside them: five tensors at a peak, measured with 300,000 types on a CPU. The fused
    engine takes one time step as a chunk if it is larger than MAX_CHUNK_BYTES, and the eager one a whole segment.
    """
    step = 4 * args.small_batch_size * words
    longest = args.bptt + (args.max_seq_len_delta if args.bptt_std else 0)
    chunk = max(step, MAX_CHUNK_BYTES) if args.engine == "fused" else longest * step
    copies = {"adam": 5, "adamw": 5, "sgd": 3}.get(args.optimizer, 4)
    return copies * 4 * words * args.emsize + 5 * chunk


def vocabulary_note(args: Namespace, words: int) -> str:
    """Returns a line on the memory that a large vocabulary needs, and on a flag with which it needs less."""
    needed, less = (vocabulary_memory(args, n) / 1e9 for n in (words, MANY_WORDS))
    return (
        f"note: {words:,} word types need about {needed:.1f} GB of memory with --emsize {args.emsize}"
        f" --small_batch_size {args.small_batch_size} --engine {args.engine};"
        f" --vocab_size {MANY_WORDS} needs {less:.1f} GB"
    )


def length_faults(args: Namespace, texts: Texts) -> list[str]:
    """Returns a fault for each text with fewer than two tokens per batch element, one to read and one to predict."""
    sizes = {"train": "batch_size", "the alphas": "arch_batch_size"}  # the texts whose batch size a flag says
    limited = {"train", "the alphas"} if getattr(args, "search_split", "train") == "train" else {"train"}
    cut, whole = (f"--limit_tokens {args.limit_tokens}", "larger one"), (f"--data {args.data}", "longer text")
    return [
        f"{flag}: {len(ids):,} tokens for {name} are too few for a batch size of {batch_size} (at least"
        f" {2 * batch_size:,}); use a {remedy}" + (f" or a smaller --{sizes[name]}" if name in sizes else "")
        for name, (ids, batch_size) in texts.items()
        for flag, remedy in [cut if args.limit_tokens and name in limited else whole]
        if len(ids) < 2 * batch_size
    ]


def describe(corpus: data.Corpus, limit: int) -> str:
    """Returns one line on a corpus: its tokens, the first `limit` that are read, its word types and unknown words."""
    part = f"the first {limit:,} tokens of " if 0 < limit < len(corpus.train) else ""
    sizes = f"{len(corpus.train):,} + {len(corpus.valid):,} + {len(corpus.test):,} tokens"
    shares = [
        f"{format_share(corpus.unknown_share(split))} of {split}" for split in data.SPLITS if len(corpus.unknown[split])
    ]
    note = f" ({', '.join(shares)} are unknown words, counted as {data.UNK})" if shares else ""
    return f"{part}{corpus.name} with {sizes}, {len(corpus.words):,} word types{note}"


def notes(corpus: data.Corpus, args: Namespace) -> list[str]:
    """Returns a line for each thing about a text that makes its perplexity, or the memory that it takes, other than one
    would expect."""
    lines, train = [], corpus.train[: args.limit_tokens or None]
    held_out = {split: corpus.unknown_share(split) for split in ("valid", "test") if len(corpus.unknown[split])}
    if held_out and not train.eq(corpus.words.index(data.UNK)).any():
        shares = " and ".join(f"{format_share(share)} of {split}" for split, share in held_out.items())
        lines.append(
            f"warning: {shares} are words that train lacks, counted as {data.UNK}, which no step trains since train has"
            f" none: the better the model fits train, the more they cost; add --min_count 2 (or --vocab_size N), with"
            f" which rare words of train become {data.UNK}"
        )
    if written := {split: count for split, count in corpus.written_eos.items() if count}:
        counts = " and ".join(f"{count:,} times in {split}" for split, count in written.items())
        lines.append(
            f"note: {data.EOS} is written in the text {counts}, and each line ends with one more; leave it out of the"
            " text, or perplexity counts line ends twice"
        )
    twins = [split for split in ("valid", "test") if corpus.sha256.get(split) == corpus.sha256["train"]]
    lines += [f"warning: {split}.txt is train.txt itself: its perplexity says nothing of new text" for split in twins]
    return lines
