"""The flags of the two scripts: shared groups, and one check that reports every fault at once."""

import argparse
import math
import os
import sys
from pathlib import Path
from typing import NoReturn

import torch

import lock
from engine import ENGINES, PRECISIONS
from genotypes import GenotypeError, resolve
from utils import new_folder

LARGEST = 2**31  # of a flag that is a whole number


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names every default that is a value; what None stands for, a flag's help says itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


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
            print(f"{self.prog}: error: {' '.join(fault.split())}", file=sys.stderr)
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
        help="standard deviation of the segment length about bptt or its half, at least 5; 0 for just those two",
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

    speed = parser.add_argument_group("speed")
    speed.add_argument(
        "--engine",
        choices=ENGINES,
        default="fused",
        help="fused, compiled at the first steps (cached), or eager, the readable definition; they agree to rounding",
    )
    speed.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="of matrix products: fp32, tf32 (CUDA) or bf16 (fused), which also halves what is stored; sums, "
        "normalisation, softmax and optimizer stay in fp32, and so does a finite --hessian",
    )

    run = parser.add_argument_group("run")
    run.add_argument("--save", metavar="DIR", help="run directory (default: runs/KIND-YYYYMMDD-HHMMSS)")
    run.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --save with its own flags; only --epochs, --log_interval, --checkpoint_minutes, "
        "--backoff, --max_rollbacks, --device and the place of the same --data may be given anew",
    )
    run.add_argument(
        "--checkpoint_minutes",
        type=float,
        default=10.0,
        help="the longest time between two checkpoints, which are made at each epoch's end as well",
    )
    run.add_argument(
        "--backoff",
        type=float,
        default=0.5,
        help="when the loss diverges, the run goes back to its last checkpoint and on with --lr times this",
    )
    run.add_argument("--max_rollbacks", type=int, default=5, help="how often it does that before it ends")
    run.add_argument("--device", default="auto", help="auto (CUDA where there is some), cpu, cuda or cuda:N")
    run.add_argument(
        "--deterministic",
        action="store_true",
        help="on CUDA, take only algorithms that give the same bits every time, which is slower; a CPU does anyway",
    )
    run.add_argument(
        "--seed",
        type=int,
        default=seed,
        help="of the weights, the dropout masks and the segments",
    )
    run.add_argument("--log_interval", type=int, default=log_interval, help="steps between two log lines")


def complete(args: argparse.Namespace, kind: str) -> None:
    """Fill in the flags whose defaults depend on others, and name a new run directory for a run of this kind."""
    if args.save is None:
        args.save = str(new_folder(kind))
    args.nhid = args.emsize if args.nhid is None else args.nhid
    args.nhidlast = args.emsize if args.nhidlast is None else args.nhidlast
    args.small_batch_size = args.batch_size if args.small_batch_size is None else args.small_batch_size


def validate(args: argparse.Namespace) -> list[str]:
    """Every fault of the flags, one line each; an empty list if they can be used."""
    faults = [*number_faults(args), *size_faults(args), *device_faults(args.device), *run_faults(args)]
    return faults + precision_faults(args)


def number_faults(args: argparse.Namespace) -> list[str]:
    """Numbers out of their range."""
    ranges = {
        "at least 1": (
            lambda x: x >= 1,
            "epochs batch_size small_batch_size bptt emsize nhid nhidlast log_interval nonmono",
        ),
        "above 0": (lambda x: x > 0, "lr clip arch_lr"),
        "above 0 and at most 1": (lambda x: 0 < x <= 1, "backoff"),
        "at least 0": (
            lambda x: x >= 0,
            "alpha beta wdecay arch_wdecay bptt_std max_seq_len_delta seed checkpoint_minutes max_rollbacks",
        ),
        "at least 0 and below 1": (
            lambda x: 0 <= x < 1,
            "dropout dropouth dropoutx dropouti dropoute",
        ),
    }
    faults = [
        f"--{name} {value}: must be {words}"
        for words, (holds, names) in ranges.items()
        for name in names.split()
        if (value := getattr(args, name, None)) is not None
        and not (holds(value) and (isinstance(value, int) or math.isfinite(value)))
    ]
    return faults + [
        f"--{name} {value}: must be below {LARGEST:,}"
        for name, value in vars(args).items()
        if type(value) is int and value >= LARGEST
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
    if "unrolled" in vars(args) and args.small_batch_size == 1:
        faults.append(
            "--small_batch_size 1: a search needs at least 2 rows at a time, since its cell normalises over them"
        )
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


def precision_faults(args: argparse.Namespace) -> list[str]:
    """A precision that the engine or the device does not have."""
    if args.precision == "bf16" and args.engine == "eager":
        return ["--precision bf16: is for --engine fused; --engine eager computes in fp32 or tf32"]
    if args.precision == "tf32" and (args.device == "cpu" or not torch.cuda.is_available()):
        return ["--precision tf32: is for CUDA; on a CPU take fp32 or bf16"]
    return []


def holds_work(path: Path) -> bool:
    """Whether a file in a run directory is more than what an end before the first step leaves behind."""
    return path.name != lock.NAME and not path.name.endswith(".tmp")


def run_faults(args: argparse.Namespace) -> list[str]:
    """A run directory or an architecture that cannot be used."""
    folder, faults = Path(args.save), []
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not there.is_dir():
            faults.append(f"--save {folder}: {there} is a file; name a directory")
        elif not os.access(there, os.W_OK | os.X_OK):
            faults.append(f"--save {folder}: {there} cannot be written to; take another")
        elif not args.resume and (process := lock.owner(folder)):
            faults.append(f"--save {folder}: in use by {process}; take another")
        elif not args.resume and there == folder and any(holds_work(path) for path in folder.iterdir()):
            faults.append(f"--save {folder}: holds files already; add --resume to continue a run, or take another")
    except OSError as error:  # a folder that may not be looked into, or a name that no folder can have
        faults.append(f"--save {folder}: cannot be used ({error.strerror})")
    if "arch" in vars(args):
        try:
            resolve(args.arch)
        except GenotypeError as error:
            faults.append(f"--arch: {error}")
    return faults
