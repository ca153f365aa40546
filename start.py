"""From the command line to a run that can begin, or go on: flags, corpus and earlier state, checked together.

What a user can mend ends the script here, with exit code 2 and one line for each fault, before anything is
written.
"""

import json
import math
import reprlib
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import checkpoint
import data
import options
from genotypes import GenotypeError, resolve
from lock import Locked
from utils import Run, RunError

# What may differ between a run and its continuation; every other flag belongs to the run. The data may lie
# elsewhere, but must be the same text.
RESUMABLE = {
    "epochs", "log_interval", "device", "save", "resume", "data", "checkpoint_minutes", "backoff", "max_rollbacks",
}  # fmt: skip
MAX_CONFIG = 1_000_000  # bytes

# The texts that a script reads: by name the word ids, and the number of rows that they are cut into.
Texts = dict[str, tuple[Tensor, int]]


def begin(
    kind: str, parser: options.Parser, argv: list[str] | None, texts: Callable[[data.Corpus, Namespace], Texts]
) -> tuple[Namespace, data.Corpus, Run, dict[str, Any] | None]:
    """The flags, the corpus, the run's directory, and the state to go on from (None for a new run).

    A resumed run has the flags in its config.json, but for those given anew. Nothing is downloaded for flags
    that cannot be used, and the directory of a new run is made last.
    """
    args = parser.parse_args(argv)
    config = read_config(parser, args.save) if args.resume else None
    if config is not None:
        parser.set_defaults(**config["flags"])
        args = parser.parse_args(argv)
    options.complete(args, kind)
    faults = options.validate(args)
    if "arch" in vars(args):
        args.arch = cell_text(args.arch)

    run = saved = None
    if config is not None:
        faults += changed_flags(args, config["flags"], f"the run in {args.save}")
        try:
            run = None if faults else Run(args.save)  # before anything is read, so that nobody writes it meanwhile
            saved, note = checkpoint.load_last(args.save)
            if note:
                print(f"{parser.prog}: {note}", file=sys.stderr)
        except (Locked, checkpoint.CheckpointError) as error:
            faults.append(f"--save: {error}" if run is None else str(error))
        if saved is not None:
            faults += state_faults(kind, args, config["flags"], saved)

    corpus = None
    if not faults or data.is_available(args.data):
        try:
            corpus = data.load_corpus(args.data)
        except data.DataError as error:
            faults += error.faults
    if corpus is not None:
        faults += length_faults(args, texts(corpus, args))
        if config is not None and config.get("sha256") != corpus.sha256:
            faults.append(f"--data {args.data}: not the text that the run in {args.save} began with")
    if not faults and run is None:
        try:
            run = Run(args.save)
            if any(map(options.holds_work, run.folder.iterdir())):  # another came and went while the corpus was read
                faults.append(
                    f"--save {args.save}: holds files already; add --resume to continue a run, or take another"
                )
        except Locked as error:
            faults.append(f"--save: {error}")
    if faults:
        if run is not None:
            run.lock.release()
        parser.refuse(faults)
    return args, corpus, run, saved


def identity(kind: str, args: Namespace, corpus: data.Corpus) -> dict[str, Any]:
    """What a checkpoint says of its run: all that tells it from another, and not where it lies."""
    flags = {name: value for name, value in vars(args).items() if name not in RESUMABLE or name == "data"}
    return {"kind": kind, "flags": flags, "words": corpus.words, "sha256": corpus.sha256}


@contextmanager
def restoring(parser: options.Parser, run: Run) -> Iterator[None]:
    """Ends the script with a line if what a checkpoint holds cannot be put in its place."""
    try:
        yield
    except (*checkpoint.UNREADABLE, checkpoint.CheckpointError) as error:
        if checkpoint.out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        run.lock.release()
        parser.refuse([f"{run.folder}: its checkpoint is not the state of this run ({reason}); start a new run"])


def check_state(saved: dict[str, Any], form: dict[str, Any], optimizers: dict[str, torch.optim.Optimizer]) -> None:
    """Raises ValueError unless what was saved has the form of this run's state, a step of each optimizer taken.

    What a run on another kind of device has of its own, the state of a generator, is left out of it.
    """
    form = {**form, **{name: checkpoint.stepped(optimizer) for name, optimizer in optimizers.items()}}
    form["rng"] = {name: part for name, part in form["rng"].items() if name != "cuda"}
    checkpoint.check_form(saved, form)


@contextmanager
def memory_explained(args: Namespace) -> Iterator[None]:
    """Running out of memory inside becomes a `RunError` that tells the sizes and what would need less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not checkpoint.out_of_memory(error):
            raise
        rows = args.small_batch_size
        least = 2 if "unrolled" in vars(args) else 1  # a relaxed cell normalises over its rows
        smaller = max((n for n in range(least, rows // 2 + 1) if args.batch_size % n == 0), default=None)
        advice = f"--small_batch_size {smaller} needs about half" if smaller else "take a smaller --emsize or --bptt"
        raise RunError(
            f"out of memory with --emsize {args.emsize}, --bptt {args.bptt} and {rows} rows of --batch_size"
            f" {args.batch_size} at a time; {advice} (a new run), or go on with --resume where more memory is free"
        ) from error


def cell_text(arch: str) -> str:
    """The text of a genotype, which stays what it is when a search goes on or its directory moves."""
    try:
        return str(resolve(arch))
    except GenotypeError:
        return arch  # `validate` has reported it


def read_config(parser: options.Parser, save: str | None) -> dict[str, Any]:
    """config.json of the run in `save`, to be continued by the script of `parser`; ends the script without one."""
    if save is None:
        parser.refuse(["--resume: say which run to continue with --save DIR"])
    path = Path(save) / "config.json"
    try:
        if path.stat().st_size > MAX_CONFIG:
            raise ValueError("too long")
        config = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse_constant)
        script, flags = config["script"], dict(config["flags"])
        if not isinstance(config.get("resumed", []), list):
            raise ValueError("resumed")
    except OSError:
        parser.refuse([f"--resume: there is no run in {save} ({path.name} cannot be read)"])
    except (ValueError, LookupError, TypeError, RecursionError):
        parser.refuse([f"--resume: {path} is damaged; start a new run"])
    if script != parser.prog:
        parser.refuse([f"--resume: {save} is a run of {script}"])
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "resume")}
    wrong = [name for name, action in actions.items() if name not in flags or not fits(action, flags[name])]
    if wrong or flags.keys() - actions.keys():
        parser.refuse([f"--resume: {path} is damaged at {', '.join(wrong) or 'its flags'}; start a new run"])
    return config


def refuse_constant(name: str) -> None:
    """For NaN and infinity, which JSON does not have and Python reads."""
    raise ValueError(name)


def fits(action: Any, value: Any) -> bool:
    """Whether a value from a file could be that of a flag."""
    if isinstance(action.default, bool):
        return isinstance(value, bool)
    kinds = {int: (int,), float: (int, float)}.get(action.type, (str,))
    return isinstance(value, kinds) and not isinstance(value, bool) and value in (action.choices or [value])


def changed_flags(args: Namespace, before: dict[str, Any], where: str) -> list[str]:
    """A fault for each flag that belongs to a run and is another now."""
    return [
        f"--{name} {value}: {where} has {before[name]}; leave the flag out, or start a new run"
        for name, value in vars(args).items()
        if name in before and name not in RESUMABLE and before[name] != value
    ]


def state_faults(kind: str, args: Namespace, flags: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    """Why a run with these flags in its config.json cannot go on from the state in its directory."""
    path = Path(args.save, "last.pt")
    try:
        other = {name: saved["flags"][name] for name in flags.keys() - RESUMABLE if saved["flags"][name] != flags[name]}
        begun = saved["progress"]["epoch"] - (saved["progress"]["row"] == 0)
        if saved["kind"] != kind:
            return [f"{path}: the state of another kind of run ({reprlib.repr(saved['kind'])}); start a new run"]
        best = path.with_name("best.pt")
        if kind == "train" and saved["best"] < math.inf and not checkpoint.is_whole(best):
            return [f"{best}: missing or damaged, and the result is made from it; put a copy there, or start a new run"]
        if args.epochs < begun:
            return [f"--epochs {args.epochs}: the run in {args.save} is in epoch {begun} already"]
    except checkpoint.UNREADABLE:
        return [f"{path}: not the state of a run; start a new run"]
    return [
        f"--{name} {flags[name]}: {path} was written with {reprlib.repr(there)}; it is the state of another run"
        for name, there in sorted(other.items())
    ]


def length_faults(args: Namespace, texts: Texts) -> list[str]:
    """A fault for each text that has fewer than two rows, one to read and one to predict."""
    return [
        f"--data {args.data}: {len(ids):,} tokens for {name} are too few for {rows} rows of text (at least"
        f" {2 * rows:,}); use a longer text" + (" or a smaller --batch_size" if rows == args.batch_size else "")
        for name, (ids, rows) in texts.items()
        if len(ids) < 2 * rows
    ]


def describe(corpus: data.Corpus) -> str:
    """One line on a corpus: its size, and what of it is outside the vocabulary."""
    unknown = sum(corpus.unknown.values())
    return (
        f"{corpus.name} with {len(corpus.train):,} + {len(corpus.valid):,} + {len(corpus.test):,} tokens, "
        f"{len(corpus.words):,} word types" + (f" ({unknown:,} words of valid and test are unknown)" if unknown else "")
    )


def run_script(main: Callable[[], int]) -> int:
    """The exit code of a script: what its surroundings did to it gives one line, not a traceback."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler)
    try:
        return main()
    except (RunError, checkpoint.CheckpointError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    except (RuntimeError, MemoryError) as error:  # before the first step, when the weights are made
        if not checkpoint.out_of_memory(error):
            raise
        print("error: out of memory; take a smaller --emsize, or a smaller --small_batch_size", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 1
