"""Checks the flags of a script and reports every fault at once, each in one line that names the flag and a remedy."""

import math
import os
from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from experiment import checkpoint, lock, metrics
from training.optimizers import LIKE_SGD
from utils import is_temporary

MAX_INTEGER = 2**31  # An integer flag must be below this.
MAX_FLOAT = 1e20  # A float flag must be at most this, so that float32 can hold what a step multiplies it by, too.
HOLDS_FILES = "--save {}: holds files already; add --resume to continue a run, or take another"
# These files of a run or a study are changed in place, the others replaced.
APPENDED = (lock.NAME, "log.txt", "metrics.jsonl", "events.jsonl", "trials.jsonl")
# Maps the words of a range to whether a number is in it, and to the flags that must be.
RANGES = {
    "at least 1": (lambda x: x >= 1, "epochs batch_size small_batch_size arch_batch_size bptt emsize nhid nhidlast"
                   " log_interval nonmono n_experts dynamic_bptt words samples"),
    "above 0": (lambda x: x > 0, "lr arch_lr power init_range dynamic_lr"),
    "above 0 and below 1": (lambda x: 0 < x < 1, "gamma cache_lambda"),
    "above 0 and at most 1": (lambda x: 0 < x <= 1, "top_p"),
    "at least 0.01": (lambda x: x >= 0.01, "step_size"),
    "at least 0": (lambda x: x >= 0, "alpha beta wdecay arch_wdecay bptt_std max_seq_len_delta seed checkpoint_minutes"
                   " clip clip_value patience min_delta warmup final_lr cycle plateau_patience limit_tokens rdrop"
                   " fraternal stop_stable max_identity diagnose_every arch_start min_count vocab_size"
                   " cache_size cache_theta tune_tokens temperature top_k average_after"),
    "at least 0 and at most 1": (lambda x: 0 <= x <= 1, "warmup_start dynamic_decay"),
    "at least 0 and below 1": (lambda x: 0 <= x < 1, "dropout dropouth dropoutx dropouti dropoute momentum"),
}  # fmt: skip


def validate(kind: str, args: Namespace, defaults: Callable[[str], Any]) -> list[str]:
    """Returns every fault of the flags of a run of this kind ("search" or "train"), one line each, but for those of
    --arch; `defaults` returns the default of the flag with a name."""
    return [
        *number_faults(args), *size_faults(args), *strategy_faults(kind, args), *idle_faults(args, defaults),
        *device_faults(args.device), *run_faults(args), *precision_faults(args),
    ]  # fmt: skip


def number_faults(args: Namespace) -> list[str]:
    """Returns a fault for each number that is out of its range."""
    numbers = {name: value for name, value in vars(args).items() if type(value) in (int, float)}
    out_of_range = [
        f"--{name} {numbers[name]}: must be {words}{'' if abs(numbers[name]) < math.inf else ', and a finite number'}"
        for words, (holds, names) in RANGES.items()
        for name in names.split()
        if name in numbers and not (holds(numbers[name]) and abs(numbers[name]) < math.inf)
    ]
    limits = {int: (MAX_INTEGER - 1, f"below {MAX_INTEGER:,}"), float: (MAX_FLOAT, f"at most {MAX_FLOAT:g}")}
    return out_of_range + [
        f"--{name} {value}: must be {words}"
        for kind, (largest, words) in limits.items()
        for name, value in numbers.items()
        if type(value) is kind and largest < value < math.inf
    ]


def broken(rules: list[tuple[Any, str]]) -> list[str]:
    """Returns the faults of the rules (whether it is broken, fault) that are broken."""
    return [fault for is_broken, fault in rules if is_broken]


def normalises_over_batch(args: Namespace) -> bool:
    """Returns whether these are the flags of a search whose cell has batch normalisation."""
    return getattr(args, "norm", None) == "batch"


def size_faults(args: Namespace) -> list[str]:
    """Returns a fault for each pair of sizes that do not fit together."""
    batch_size, small_batch_size = args.batch_size, args.small_batch_size
    arch_batch_size = getattr(args, "arch_batch_size", batch_size)
    rules = [
        (not args.emsize == args.nhid == args.nhidlast,
         f"--emsize {args.emsize} --nhid {args.nhid} --nhidlast {args.nhidlast}: must be equal, since the decoder "
         "shares the embedding's matrix; give --emsize alone"),
        (batch_size >= 1 and small_batch_size >= 1 and batch_size % small_batch_size,
         f"--small_batch_size {small_batch_size}: must divide --batch_size {batch_size} evenly"),
        (arch_batch_size != batch_size and small_batch_size >= 1 and arch_batch_size % small_batch_size,
         f"--arch_batch_size {arch_batch_size}: must be a multiple of --small_batch_size {small_batch_size}, which is "
         "--batch_size where it is not given"),
        (normalises_over_batch(args) and small_batch_size == 1,
         "--small_batch_size 1: --norm batch normalises over the batch and needs at least 2 elements at a time; take "
         "more, or --norm layer"),
        (0 < args.vocab_size < 3,
         f"--vocab_size {args.vocab_size}: has no place for a word beside <eos> and <unk>; take at least 3, or 0 for "
         "all"),
    ]  # fmt: skip
    return broken(rules)


# Maps each flag that has an effect only with others to these, as the message names them, and to whether they are given.
INEFFECTIVE_FLAGS = {
    "momentum": ("--optimizer momentum", lambda a: a.optimizer == "momentum"),
    "nonmono": (
        "--optimizer ntasgd without --average_after, or --finetune",
        lambda a: (a.optimizer == "ntasgd" and not a.average_after) or a.finetune,
    ),
    "average_after": ("--optimizer ntasgd", lambda a: a.optimizer == "ntasgd" or a.finetune),
    "min_delta": ("--patience", lambda a: a.patience > 0),
    "max_seq_len_delta": ("--bptt_std", lambda a: a.bptt_std > 0),
    "warmup_shape": ("--warmup", lambda a: a.warmup > 0),
    "warmup_start": ("--warmup", lambda a: a.warmup > 0),
    "step_size": ("--schedule step", lambda a: a.schedule == "step"),
    "gamma": (
        "--schedule step, exponential or plateau", lambda a: a.schedule in ("step", "exponential", "plateau")
    ),
    "final_lr": ("--schedule cosine or polynomial", lambda a: a.schedule in ("cosine", "polynomial")),
    "power": ("--schedule polynomial", lambda a: a.schedule == "polynomial"),
    "cycle": ("--schedule cosine or polynomial", lambda a: a.schedule in ("cosine", "polynomial")),
    "plateau_patience": ("--schedule plateau", lambda a: a.schedule == "plateau"),
    "hessian": ("--unrolled", lambda a: a.unrolled),
    **dict.fromkeys(("fresh", "json"), ("--text", lambda a: a.text is not None)),
    **dict.fromkeys(("dynamic_lr", "dynamic_decay", "dynamic_bptt"), ("--dynamic", lambda a: a.dynamic)),
    **dict.fromkeys(("cache_theta", "cache_lambda"), ("--cache_size", lambda a: a.cache_size > 0)),
    "tune": ("--dynamic or --cache_size", lambda a: a.dynamic or a.cache_size > 0),
    "tune_tokens": ("--tune", lambda a: a.tune),
}  # fmt: skip


def idle_faults(args: Namespace, defaults: Callable[[str], Any]) -> list[str]:
    """Returns a fault for each flag that differs from its default and would have no effect."""
    return [
        f"--{name}{'' if getattr(args, name) is True else f' {getattr(args, name)}'}: is for {needs}; add that or"
        " leave it out"
        for name, (needs, is_given) in INEFFECTIVE_FLAGS.items()
        if name in vars(args) and getattr(args, name) != defaults(name) and not is_given(args)
    ]


def strategy_faults(kind: str, args: Namespace) -> list[str]:
    """Returns a fault for each combination of strategies that is not possible in a run of this kind."""
    rules = [
        (args.warmup and args.warmup_shape == "exponential" and args.warmup_start == 0,
         "--warmup_start 0: an exponential warm-up starts above 0; give one, or --warmup_shape linear"),
        (args.final_lr > args.lr > 0,
         f"--final_lr {args.final_lr:g}: is above --lr {args.lr:g}, but the rate only falls; take less"),
        *((args.overfit and getattr(args, name, 0) not in (0, "constant"),
           f"--{name} {getattr(args, name, 0)}: has no effect with --overfit; leave it out")
          for name in ("rdrop", "fraternal", "alpha", "warmup", "schedule", "patience")),
        (args.cycle > args.epochs,
         f"--cycle {args.cycle}: longer than --epochs {args.epochs}; take a smaller one, or 0"),
    ]  # fmt: skip
    more_epochs = "take more epochs" if args.resume else "take a smaller one, or more epochs"
    if kind == "search":
        rules += [
            (0 < args.epochs <= args.arch_start,
             f"--arch_start {args.arch_start}: the alphas would never move in --epochs {args.epochs}; {more_epochs}"),
            (args.unrolled and args.optimizer not in LIKE_SGD,
             f"--unrolled: its virtual step is a step of SGD, unlike those of --optimizer {args.optimizer}; use "
             f"{', '.join(LIKE_SGD)}, or leave --unrolled out"),
        ]  # fmt: skip
    else:
        drops = any((args.dropout, args.dropouth, args.dropoutx, args.dropouti, args.dropoute))
        rules += [
            *((getattr(args, name) > 0 and not drops,
               f"--{name}: compares two passes with different dropout masks, but all dropout rates are 0; set one, or "
               "leave it out") for name in ("rdrop", "fraternal")),
            (0 < args.epochs <= args.average_after,
             f"--average_after {args.average_after}: averaging would never start in --epochs {args.epochs}; "
             f"{more_epochs}"),
            (args.finetune and args.average_after,
             f"--average_after {args.average_after}: --finetune averages from its first step on; leave it out"),
            (args.finetune and args.optimizer != "asgd",
             f"--finetune: averages from its first step on; leave out --optimizer {args.optimizer}"),
        ]  # fmt: skip
    return broken(rules)


def rank_faults(args: Namespace, ranks: int, on_this_machine: int) -> list[str]:
    """Returns a fault for each flag that does not allow `ranks` ranks, `on_this_machine` of them on this machine."""
    if ranks == 1 or args.batch_size < 1 or args.small_batch_size < 1:
        return []
    faults = []
    local_batch_size, rest = divmod(args.batch_size, ranks)
    arch_batch_size, arch_rest = divmod(getattr(args, "arch_batch_size", args.batch_size), ranks)
    if rest or not local_batch_size:
        faults.append(f"--batch_size {args.batch_size}: must divide evenly among {ranks} ranks")
    elif local_batch_size % min(local_batch_size, args.small_batch_size):
        faults.append(
            f"--small_batch_size {args.small_batch_size}: must divide the {local_batch_size} batch elements of each of"
            f" {ranks} ranks"
        )
    elif arch_rest or arch_batch_size % min(local_batch_size, args.small_batch_size):
        faults.append(
            f"--arch_batch_size {args.arch_batch_size}: must divide evenly among {ranks} ranks, into multiples of the"
            f" {min(local_batch_size, args.small_batch_size)} batch elements that each computes at a time"
        )
    elif local_batch_size == 1 and normalises_over_batch(args):
        faults.append(
            f"--batch_size {args.batch_size}: --norm batch normalises over the batch and needs at least 2 elements on"
            f" each of {ranks} ranks; take more, or --norm layer"
        )
    if args.overfit:
        faults.append("--overfit: is for one process; start it without torchrun")
    if args.device.startswith("cuda:"):
        faults.append(f"--device {args.device}: each rank takes a GPU of its own; use --device cuda")
    elif args.device != "cpu" and 0 < torch.cuda.device_count() < on_this_machine:
        faults.append(
            f"--device {args.device}: {on_this_machine} ranks on this machine with {torch.cuda.device_count()} GPUs;"
            " start as many as there are"
        )
    return faults


def device_faults(name: str) -> list[str]:
    """Returns a fault if the device has an unknown name or this machine lacks it; an empty list otherwise."""
    if name in ("auto", "cpu"):
        return []
    kind, _, index = name.partition(":")
    if kind != "cuda" or (":" in name and not index.isdecimal()):
        return [f"--device {name}: must be auto, cpu, cuda or cuda:N"]
    if int(index or 0) >= (count := torch.cuda.device_count()):
        return [f"--device {name}: this machine has {count} CUDA devices; use --device auto or cpu"]
    return []


def precision_faults(args: Namespace) -> list[str]:
    """Returns a fault if the engine or the device does not have the precision; an empty list otherwise."""
    if args.precision == "bf16" and args.engine == "eager":
        return ["--precision bf16: is for --engine fused; --engine eager computes in fp32 or tf32"]
    if args.precision == "tf32" and not args.resume and (args.device == "cpu" or not torch.cuda.is_available()):
        return ["--precision tf32: is for CUDA; on a CPU take fp32 or bf16"]
    return []


def must_not_be_overwritten(folder: Path) -> bool:
    """Returns whether a folder holds work that a new run must not overwrite: anything but the files that a run of this
    project has written when it ends before its first step."""
    left = {path.name for path in folder.iterdir() if not is_temporary(path.name)}
    if lock.NAME in left and lock.is_lock(folder / lock.NAME):
        left.remove(lock.NAME)
    if left <= {"log.txt", "tensorboard"}:  # to which a new run appends
        return False
    if not left <= {"config.json", "log.txt", "tensorboard", *checkpoint.NAMES}:
        return True
    ours = (metrics.read_json(folder / "config.json") or {}).get("script") in ("train_search.py", "train.py")
    try:
        return not ours or any(checkpoint.load(folder / name)["progress"]["step"] for name in left & checkpoint.NAMES)
    except (OSError, checkpoint.CheckpointError, *checkpoint.UNREADABLE, RecursionError):
        return True


def folder_faults(flag: str, folder: Path) -> list[str]:
    """Returns a fault of the flag if its folder is a file or a link to nothing, can be neither created nor written to,
    or has a link or a pipe in the place of a file that is written there. Raises OSError if that cannot be said."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        what = "a file; name a directory" if existing.exists() else "a link to nothing; make its target or take another"
        return [f"{flag} {folder}: {existing} is {what}"]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [f"{flag} {folder}: {existing} cannot be written to; take another"]
    return [
        f"{flag} {folder}: {name} is a link, or no file, and writing to it could change something else; remove it"
        for name in APPENDED if (path := folder / name).is_symlink() or (path.exists() and not path.is_file())
    ]  # fmt: skip


def run_faults(args: Namespace) -> list[str]:
    """Returns a fault for --save and --tensorboard each, if the directory or a package cannot be used."""
    folder, faults = Path(args.save), []
    try:
        faults = folder_faults("--save", folder) if args.save else ["--save: empty; name a directory"]
        if not faults and not args.resume:
            if process := lock.owner(folder):
                faults.append(f"--save {folder}: in use by {process}; take another")
            elif folder.is_dir() and must_not_be_overwritten(folder):
                faults.append(HOLDS_FILES.format(folder))
    except OSError as error:  # The folder cannot be read, or no folder can have this name.
        faults.append(f"--save {folder}: cannot be used ({error.strerror})")
    if args.tensorboard:
        faults += [
            f"--tensorboard: needs {name}; pip install {name}, or go without (--no-tensorboard)"
            for name in ("tensorboard", "matplotlib")
            if find_spec(name) is None
        ]
    return faults
