"""From the command line to a run that can begin, or go on: flags, corpus and earlier state, checked together.

What a user can mend ends the script here, with exit code 2 and one line for each fault, before anything is
written.
"""

import json
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

import checkpoint
import data
import options
from genotypes import GenotypeError, resolve
from utils import RunError

# What may differ between a run and its continuation; every other flag belongs to the run. The data may lie
# elsewhere, but must be the same text.
RESUMABLE = {"epochs", "log_interval", "device", "save", "resume", "data"}

# The texts that a script reads: by name the word ids, and the number of rows that they are cut into.
Texts = dict[str, tuple[Tensor, int]]


def begin(
    kind: str, parser: options.Parser, argv: list[str] | None, texts: Callable[[data.Corpus, Namespace], Texts]
) -> tuple[Namespace, data.Corpus, dict[str, Any] | None]:
    """The flags, the corpus, and the state to go on from (None for a new run) of a run of this kind.

    A resumed run has the flags in its config.json, but for those given anew. Nothing is downloaded for flags
    that cannot be used.
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

    saved = None
    if config is not None:
        faults += changed_flags(args, config["flags"], f"the run in {args.save}")
        try:
            saved = checkpoint.load_last(args.save)
        except checkpoint.CheckpointError as error:
            faults.append(str(error))
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
    if faults:
        parser.refuse(faults)
    return args, corpus, saved


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
        config = json.loads(path.read_text(encoding="utf-8"))
        script, flags = config["script"], dict(config["flags"])
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
        same = all(saved["flags"][name] == value for name, value in flags.items() if name not in RESUMABLE)
        begun = saved["progress"]["epoch"] - (saved["progress"]["row"] == 0)
        if saved["kind"] != kind or not same:
            return [f"{path}: the state of another run than config.json tells of; start a new run"]
    except (LookupError, TypeError):
        return [f"{path}: not the state of a run; start a new run"]
    if args.epochs < begun:
        return [f"--epochs {args.epochs}: the run in {args.save} is in epoch {begun} already"]
    return []


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
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return main()
    except (RunError, checkpoint.CheckpointError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 1
