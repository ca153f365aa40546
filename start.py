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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import checkpoint
import data
import faults
import options
from genotypes import GenotypeError, resolve_cell
from lock import Locked
from optimizers import RATES
from ranks import Ranks, leave
from utils import Onlooker, Run, RunError

# What may differ between a run and its continuation; every other flag belongs to the run. The data may lie
# elsewhere, but must be the same text.
RESUMABLE = {
    "epochs", "log_interval", "device", "save", "resume", "data", "checkpoint_minutes", "backoff", "max_rollbacks",
    "test", "diagnose_every", "tensorboard",
}  # fmt: skip
# What --finetune takes over from the run whose weights it starts from, where it is not given anew.
TUNED_WITH = {
    "data", "limit_tokens", "batch_size", "bptt", "bptt_std", "max_seq_len_delta",
    "emsize", "arch", "n_experts", "dropout", "dropouth", "dropoutx", "dropouti", "dropoute",
    "alpha", "beta", "rdrop", "fraternal", "wdecay", "nonmono", "seed", "engine", "precision",
}  # fmt: skip
MAX_CONFIG = 1_000_000  # bytes

# The texts that a script reads: by name the word ids, and the number of rows that they are cut into.
Texts = dict[str, tuple[Tensor, int]]


def begin(
    kind: str,
    parser: options.Parser,
    argv: list[str] | None,
    texts: Callable[[data.Corpus, Namespace], Texts],
    ranks: Ranks,
) -> tuple[Namespace, data.Corpus, Run, dict[str, Any] | None]:
    """The flags, the corpus, the run's directory, and the state to go on from (None for a new run). What the first rank
    finds holds for all."""
    if not ranks.first:
        parser.quiet = True
        told = ranks.same(lambda: None)
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
        return args, corpus, Onlooker(args.save), saved
    try:
        args, corpus, run, saved = begin_first(kind, parser, argv, texts, ranks)
    except SystemExit as end:
        code = end.code
        ranks.same(lambda: code)
        raise
    ranks.same(lambda: (args, saved, corpus.sha256))
    return args, corpus, run, saved


def begin_first(
    kind: str,
    parser: options.Parser,
    argv: list[str] | None,
    texts: Callable[[data.Corpus, Namespace], Texts],
    ranks: Ranks,
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
    options.complete(args, kind)
    found = faults.validate(args, parser.get_default) + faults.rank_faults(args, ranks.size, ranks.on_this_machine)
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
            if any(map(faults.holds_work, run.folder.iterdir())):  # another came and went while the corpus was read
                found.append(
                    f"--save {args.save}: holds files already; add --resume to continue a run, or take another"
                )
        except Locked as error:
            found.append(f"--save: {error}")
    if found:
        if run is not None:
            run.release()
        parser.refuse(found)
    if args.tensorboard:
        from mirror import Mirror  # needs more than the scripts do

        run.mirror = Mirror(run.folder, vars(args))
    return args, corpus, run, saved


def tuned_with(first: dict[str, Any], args: Namespace) -> dict[str, Any]:
    """The flags that a fine-tuning run takes over from the run whose weights it starts from."""
    names = set(TUNED_WITH)
    if RATES[first["optimizer"]] == RATES["asgd"]:  # that of another says nothing of what averaged SGD needs
        names.add("lr")
    if first["small_batch_size"] != first["batch_size"]:
        names.add("small_batch_size")
    if args.clip is None and not args.clip_value:
        names |= {"clip", "clip_value"}
    return {name: first[name] for name in names}


def tuning_faults(args: Namespace, first: dict[str, Any], rate_given: bool) -> list[str]:
    """Why the weights of a run with the flags `first` cannot be what this one starts from."""
    found = [
        f"--{name} {value}: the weights of --finetune {args.finetune} are for {first[name]}; leave it out"
        for name in ("emsize", "arch", "n_experts")
        if (value := getattr(args, name)) != first[name]
    ]
    if not rate_given:
        found.append(f"--lr: give one for averaged SGD; that of --finetune {args.finetune} is of {first['optimizer']}")
    if not checkpoint.is_whole(Path(args.finetune, "best.pt")):
        found.append(f"--finetune {args.finetune}: best.pt is missing or damaged; name another run")
    return found


def identity(kind: str, args: Namespace, corpus: data.Corpus, ranks: int) -> dict[str, Any]:
    """What a checkpoint says of its run: all that tells it from another, and not where it lies."""
    flags = {name: value for name, value in vars(args).items() if name not in RESUMABLE or name == "data"}
    return {"kind": kind, "flags": flags, "words": corpus.words, "sha256": corpus.sha256, "ranks": ranks}


@contextmanager
def restoring(parser: options.Parser, run: Run, path: Path | None = None) -> Iterator[None]:
    """Ends the script with a line if what a checkpoint holds cannot be put in its place: the run's, or that at `path`,
    for --finetune."""
    try:
        yield
    except (*checkpoint.UNREADABLE, checkpoint.CheckpointError) as error:
        if checkpoint.out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        run.release()
        if path is not None:
            parser.refuse([f"--finetune: {path} has no weights for this model ({reason}); name another run"])
        parser.refuse([f"{run.folder}: its checkpoint is not the state of this run ({reason}); start a new run"])


def check_state(
    saved: dict[str, Any],
    form: dict[str, Any],
    reasons: Sequence[str],
    optimizers: dict[str, torch.optim.Optimizer],
) -> None:
    """Raises ValueError unless what was saved has the form of this run's state, a step of each optimizer taken, and was
    stopped for one of the reasons, if at all.

    What a run on another kind of device has of its own, the state of a generator, is left out of it.
    """
    form = {**form, **{name: checkpoint.stepped(optimizer) for name, optimizer in optimizers.items()}}
    form["rng"] = [{name: part for name, part in rng.items() if name != "cuda"} for rng in form["rng"]]
    checkpoint.check_form(saved, form)
    if saved["stopped_by"] not in ("", *reasons):
        raise ValueError("it was stopped by nothing that is known")


@contextmanager
def memory_explained(args: Namespace) -> Iterator[None]:
    """Running out of memory inside becomes a `RunError` that tells the sizes and what would need less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not checkpoint.out_of_memory(error):
            raise
        rows = args.small_batch_size
        least = 2 if faults.normalises_over_rows(args) else 1
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


def read_config(parser: options.Parser, save: str | None, flag: str) -> dict[str, Any]:
    """config.json of the run in `save`, which this flag is for and `parser`'s script wrote; ends the script without."""
    if save is None:
        parser.refuse([f"{flag}: say which run to continue with --save DIR"])
    path = Path(save) / "config.json"
    try:
        if path.stat().st_size > MAX_CONFIG:
            raise ValueError("too long")
        config = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse_constant)
        script, flags = config["script"], dict(config["flags"])
        if not isinstance(config.get("resumed", []), list):
            raise ValueError("resumed")
    except OSError:
        parser.refuse([f"{flag}: there is no run in {save} ({path.name} cannot be read)"])
    except (ValueError, LookupError, TypeError, RecursionError):
        parser.refuse([f"{flag}: {path} is damaged; start a new run"])
    if script != parser.prog:
        parser.refuse([f"{flag}: {save} is a run of {script}"])
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "resume")}
    if lost := actions.keys() - flags.keys():
        parser.refuse([f"{flag}: {path} is damaged or of an earlier version (no {min(lost)}); start a new run"])
    wrong = [name for name, action in actions.items() if not fits(action, flags[name])]
    if wrong or flags.keys() - actions.keys():
        parser.refuse([f"{flag}: {path} is damaged at {', '.join(wrong) or 'its flags'}; start a new run"])
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


def state_faults(kind: str, args: Namespace, flags: dict[str, Any], saved: dict[str, Any], ranks: int) -> list[str]:
    """Why a run with these flags in its config.json cannot go on from the state in its directory."""
    path = Path(args.save, "last.pt")
    try:
        other = {name: saved["flags"][name] for name in flags.keys() - RESUMABLE if saved["flags"][name] != flags[name]}
        begun = saved["progress"]["epoch"] - (saved["progress"]["row"] == 0)
        if saved["kind"] != kind:
            return [f"{path}: the state of another kind of run ({reprlib.repr(saved['kind'])}); start a new run"]
        if saved["ranks"] != ranks:
            before = int(saved["ranks"])
            how = f"with torchrun and {before} processes in all" if before > 1 else "without torchrun"
            return [f"--resume: the run in {args.save} is one of {before} ranks, not {ranks}; start it {how}"]
        best = path.with_name("best.pt")
        needed = saved["best"] < math.inf if kind == "train" else saved["stopped_by"] == "patience"
        if needed and not checkpoint.is_whole(best):
            return [f"{best}: missing or damaged, and the result is made from it; put a copy there, or start a new run"]
        if saved["stopped_by"] and args.epochs != flags["epochs"]:
            return [
                f"--epochs {args.epochs}: the run in {args.save} was stopped by {saved['stopped_by']}; start a new run"
            ]
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


def run_script(main: Callable[[], int]) -> int:
    """The exit code of a script: what its surroundings did to it gives one line, not a traceback."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler)
    code = 1
    try:
        code = main()
    except (RunError, checkpoint.CheckpointError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    except (RuntimeError, MemoryError) as error:  # before the first step, when the weights are made
        if not checkpoint.out_of_memory(error):
            raise
        print("error: out of memory; take a smaller --emsize, --n_experts or --small_batch_size", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    return leave(code)
