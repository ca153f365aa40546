"""The flags of the two scripts: shared groups, and one check that reports every fault at once.

A flag that cannot be used ends the script with exit code 2 and one line for each fault; nothing is written.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

import data
from checkpoint import CheckpointError
from genotypes import GenotypeError, resolve
from utils import RunError, new_folder

# What may differ between a run and its continuation; every other flag belongs to the run.
RESUMABLE = {"epochs", "log_interval", "device", "save", "resume", "data"}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names every default that is a value; what None stands for, a flag's help says itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser whose faults are one line, and whose help names every default."""

    def __init__(self, prog: str, description: str):
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            formatter_class=HelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        self.refuse([f"{message} (see --help)"])

    def refuse(self, faults: list[str]) -> NoReturn:
        """End with exit code 2 and a line for each fault."""
        for fault in faults:
            print(f"{self.prog}: error: {fault}", file=sys.stderr)
        sys.exit(2)


def add_shared_flags(
    parser: Parser,
    *,
    size: int,
    batch_size: int,
    epochs: int,
    dropoute: float,
    wdecay: float,
    bptt_std: float,
    seed: int,
    log_interval: int,
) -> None:
    """The flags that searching and retraining have in common, with the defaults in which they differ."""
    text = parser.add_argument_group("text")
    text.add_argument(
        "--data",
        default="penn",
        metavar="NAME|DIR",
        help="penn or wikitext-2 (downloaded to corpora/ when missing), builtin (no network), or a "
        "folder with train.txt, valid.txt and test.txt",
    )
    text.add_argument("--batch_size", type=int, default=batch_size, help="rows of text read side by side")
    text.add_argument(
        "--small_batch_size",
        type=int,
        help="rows per forward pass; gradients are summed over the batch, so that less memory is "
        "needed (default: batch_size)",
    )
    text.add_argument(
        "--bptt",
        type=int,
        default=35,
        help="time steps per segment (halved with probability 0.05)",
    )
    text.add_argument(
        "--bptt_std",
        type=float,
        default=bptt_std,
        help="standard deviation of the segment length; 0 for fixed lengths",
    )
    text.add_argument(
        "--max_seq_len_delta",
        type=int,
        default=20,
        help="with --bptt_std, segments are at most bptt plus this long",
    )

    model = parser.add_argument_group("model")
    model.add_argument("--emsize", type=int, default=size, help="size of the word embeddings")
    model.add_argument(
        "--nhid",
        type=int,
        help="hidden units of the cell; equal to emsize, whose matrix the decoder shares (default: emsize)",
    )
    model.add_argument(
        "--nhidlast",
        type=int,
        help="hidden units of the last layer; equal to emsize (default: emsize)",
    )

    regularisation = parser.add_argument_group("regularisation")
    for name, p, meaning in (
        ("dropout", 0.75, "of the cell's output"),
        ("dropouth", 0.25, "of the hidden state inside the cell's products"),
        ("dropoutx", 0.75, "of the input inside the cell's product"),
        ("dropouti", 0.2, "of the word embeddings, element by element"),
        ("dropoute", dropoute, "of whole word types in the embedding"),
    ):
        regularisation.add_argument(f"--{name}", type=float, default=p, help=f"dropout {meaning}")
    regularisation.add_argument(
        "--alpha",
        type=float,
        default=0.0,
        help="activation regularisation (AR): times the mean square of the dropped output",
    )
    regularisation.add_argument(
        "--beta",
        type=float,
        default=1e-3,
        help="temporal activation regularisation (TAR): times the mean squared change of the hidden state",
    )
    regularisation.add_argument("--wdecay", type=float, default=wdecay, help="weight decay of the weights")

    optimisation = parser.add_argument_group("optimisation of the weights")
    optimisation.add_argument(
        "--lr",
        type=float,
        default=20.0,
        help="learning rate of SGD for a segment of bptt steps; scaled with the segment's length. 20 "
        "suits the published sizes; small models want less",
    )
    optimisation.add_argument("--clip", type=float, default=0.25, help="largest norm of the gradient")
    optimisation.add_argument("--epochs", type=int, default=epochs, help="passes over the training text")

    run = parser.add_argument_group("run")
    run.add_argument("--save", metavar="DIR", help="run directory (default: runs/KIND-YYYYMMDD-HHMMSS)")
    run.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --save with its own flags; only --epochs, --log_interval and "
        "--device may be given anew",
    )
    run.add_argument("--device", default="auto", help="auto (CUDA where there is some), cpu, cuda or cuda:N")
    run.add_argument(
        "--seed",
        type=int,
        default=seed,
        help="of the weights, the dropout masks and the segments",
    )
    run.add_argument("--log_interval", type=int, default=log_interval, help="steps between two log lines")


def parse(parser: Parser, argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and every fault in them.

    A resumed run's flags are those in its config.json. Missing sizes become the ones they default to.
    """
    args = parser.parse_args(argv)
    saved: dict[str, Any] = {}
    if args.resume:
        saved = read_config(parser, args.save)["flags"]
        parser.set_defaults(**{name: value for name, value in saved.items() if name in vars(args)})
        args = parser.parse_args(argv)
        args.resume = True
    if args.save is None:
        args.save = str(new_folder("search" if "unrolled" in vars(args) else "train"))
    args.nhid = args.emsize if args.nhid is None else args.nhid
    args.nhidlast = args.emsize if args.nhidlast is None else args.nhidlast
    args.small_batch_size = args.batch_size if args.small_batch_size is None else args.small_batch_size

    faults = validate(args)
    faults += [
        f"--{name} {value}: the run in {args.save} has {saved[name]}; leave the flag out, or start a new run"
        for name, value in vars(args).items()
        if name in saved and name not in RESUMABLE and saved[name] != value
    ]
    return args, faults


def read_config(parser: Parser, save: str | None) -> dict[str, Any]:
    """config.json of the run in `save`, to be continued by the script of `parser`; ends the script without one."""
    if save is None:
        parser.refuse(["--resume: say which run to continue with --save DIR"])
    path = Path(save) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        script, flags = config["script"], dict(config["flags"])
    except OSError:
        parser.refuse([f"--resume: there is no run in {save} ({path.name} cannot be read)"])
    except (ValueError, KeyError, TypeError):
        parser.refuse([f"--resume: {path} is damaged; start a new run"])
    if script != parser.prog:
        parser.refuse([f"--resume: {save} is a run of {script}"])
    return {**config, "flags": flags}


def load_corpus(
    parser: Parser,
    args: argparse.Namespace,
    faults: list[str],
    texts: Callable[[data.Corpus, argparse.Namespace], dict[str, tuple[torch.Tensor, int]]],
) -> data.Corpus:
    """The corpus of --data; with faults of its own or of the flags the script ends here, with all of them.

    `texts` names the texts that the script will read, with the number of rows that each is cut into. Nothing
    is downloaded for flags that cannot be used.
    """
    if not faults or data.is_available(args.data):
        try:
            corpus = data.load_corpus(args.data)
        except data.DataError as error:
            faults = faults + error.faults
        else:
            faults = faults + [
                f"--data {args.data}: {len(ids):,} tokens for {name} are too few for {rows} rows of text"
                f" (at least {2 * rows:,}); use a longer text or a smaller --batch_size"
                for name, (ids, rows) in texts(corpus, args).items()
                if len(ids) < 2 * rows
            ]
            if args.resume and read_config(parser, args.save).get("sha256") != corpus.sha256:
                faults.append(f"--data {args.data}: not the text that the run in {args.save} began with")
    if faults:
        parser.refuse(faults)
    return corpus


def describe(corpus: data.Corpus) -> str:
    """One line on a corpus: its size, and what of it is outside the vocabulary."""
    unknown = sum(corpus.unknown.values())
    return (
        f"{corpus.name} with {len(corpus.train):,} + {len(corpus.valid):,} + {len(corpus.test):,} tokens, "
        f"{len(corpus.words):,} word types" + (f" ({unknown:,} words of valid and test are unknown)" if unknown else "")
    )


def run_script(main: Callable[[], int]) -> int:
    """The exit code of a script; what a user can mend or has caused gives one line, not a traceback."""
    try:
        return main()
    except (RunError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, CheckpointError) else 1
    except KeyboardInterrupt:
        print("interrupted; the last checkpoint stands", file=sys.stderr)
        return 130


def validate(args: argparse.Namespace) -> list[str]:
    """Every fault of the flags, one line each; an empty list if they can be used."""
    return [*number_faults(args), *size_faults(args), *device_faults(args.device), *run_faults(args)]


def number_faults(args: argparse.Namespace) -> list[str]:
    """Numbers out of their range."""
    ranges = {
        "at least 1": (
            lambda x: x >= 1,
            "epochs batch_size small_batch_size bptt emsize nhid nhidlast log_interval nonmono",
        ),
        "above 0": (lambda x: x > 0, "lr clip arch_lr"),
        "at least 0": (
            lambda x: x >= 0,
            "alpha beta wdecay arch_wdecay bptt_std max_seq_len_delta seed",
        ),
        "at least 0 and below 1": (
            lambda x: 0 <= x < 1,
            "dropout dropouth dropoutx dropouti dropoute",
        ),
    }
    return [
        f"--{name} {value}: must be {words}"
        for words, (holds, names) in ranges.items()
        for name in names.split()
        if (value := getattr(args, name, None)) is not None and not (math.isfinite(value) and holds(value))
    ]


def size_faults(args: argparse.Namespace) -> list[str]:
    """Sizes that do not fit together."""
    faults = []
    if not args.emsize == args.nhid == args.nhidlast:
        faults.append(
            f"--emsize {args.emsize} --nhid {args.nhid} --nhidlast {args.nhidlast}: must be equal, since the "
            "decoder shares the embedding's matrix; give --emsize alone"
        )
    if args.batch_size >= 1 and args.small_batch_size >= 1 and args.batch_size % args.small_batch_size:
        faults.append(f"--small_batch_size {args.small_batch_size}: must divide --batch_size {args.batch_size} evenly")
    return faults


def device_faults(name: str) -> list[str]:
    """A device that is not there."""
    if name in ("auto", "cpu"):
        return []
    kind, _, index = name.partition(":")
    if kind != "cuda" or (":" in name and not index.isdecimal()):
        return [f"--device {name}: must be auto, cpu, cuda or cuda:N"]
    count = torch.cuda.device_count()
    if int(index or 0) >= count:
        return [f"--device {name}: this machine has {count} CUDA devices; use --device auto or cpu"]
    return []


def run_faults(args: argparse.Namespace) -> list[str]:
    """A run directory or an architecture that cannot be used."""
    faults = []
    if args.save is not None and not args.resume:
        folder = Path(args.save)
        if folder.is_dir() and any(folder.iterdir()):
            faults.append(f"--save {folder}: holds files already; add --resume to continue a run, or take another")
        elif folder.exists() and not folder.is_dir():
            faults.append(f"--save {folder}: is a file; name a directory")
    if "arch" in vars(args) and not args.resume:
        try:
            resolve(args.arch)
        except GenotypeError as error:
            faults.append(f"--arch: {error}")
    return faults
