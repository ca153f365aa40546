"""Reads and checks the flags and the state that a run takes from an earlier one, for --resume and --finetune."""

import json
import math
import reprlib
from argparse import Namespace
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import data
from experiment import arguments, checkpoint, metrics, published_model
from engine.memory import out_of_memory
from experiment.run_directory import Run
from genotypes import GenotypeError, resolve_cell
from training.optimizers import DEFAULT_LR

# Flags that may differ between a run and its continuation. The data may be at another path, but must be the same text.
RESUMABLE = {
    "epochs", "log_interval", "device", "engine", "save", "resume", "data", "checkpoint_minutes", "test",
    "diagnose_every", "tensorboard",
}  # fmt: skip
# Flags that --finetune takes from the run whose weights it starts from, unless they are given again.
TUNED_WITH = {
    "data", "min_count", "vocab_size", "limit_tokens", "batch_size", "bptt", "bptt_std", "max_seq_len_delta",
    "emsize", "arch", "n_experts", "dropout", "dropouth", "dropoutx", "dropouti", "dropoute",
    "alpha", "beta", "rdrop", "fraternal", "wdecay", "nonmono", "seed", "engine", "precision",
}  # fmt: skip
# Flags that are younger than runs which can still be resumed, with the values that these runs had.
YOUNGER = {"min_count": 0, "vocab_size": 0, "average_after": 0}
MAX_CONFIG = 1_000_000  # bytes


def with_younger(flags: Any, names: Container[str]) -> Any:
    """Returns the flags of a run with those of `names`, its script's flags, that are younger than the run; another
    value is returned as it is."""
    added = {name: value for name, value in YOUNGER.items() if name in names}
    return {**added, **flags} if isinstance(flags, dict) else flags


def is_same_text(before: Any, now: dict[str, str]) -> bool:
    """Returns whether the texts with the checksums `now` are those of a run with the checksums `before`. A test text
    that only one of them has makes no difference: a run with --test skip needs none."""
    return isinstance(before, dict) and all(
        before.get(split) == digest for split, digest in now.items() if split != "test" or split in before
    )


def tuned_with(first: dict[str, Any], clips: bool) -> dict[str, Any]:
    """Returns the flags that a fine-tuning run takes from `first`, those of the run whose weights it starts from; how
    that run clipped is left out if the new one `clips` in a way of its own."""
    names = set(TUNED_WITH)
    if DEFAULT_LR[first["optimizer"]] == DEFAULT_LR["asgd"]:  # another optimizer's rate does not suit averaged SGD
        names.add("lr")
    if first["small_batch_size"] != first["batch_size"]:
        names.add("small_batch_size")
    if not clips:
        names |= {"clip", "clip_value"}
    return {name: first[name] for name in names}


def tuning_faults(args: Namespace, first: dict[str, Any], rate_given: bool) -> list[str]:
    """Returns the reasons why a fine-tuning run cannot start from the weights of a run with the flags `first`."""
    faults = [
        f"--{name} {value}: the weights of --finetune {args.finetune} are for {first[name]}; leave it out"
        for name in ("emsize", "arch", "n_experts", "min_count", "vocab_size")
        if (value := getattr(args, name)) != first[name]
    ]
    if not rate_given:
        faults.append(f"--lr: give one for averaged SGD; that of --finetune {args.finetune} is of {first['optimizer']}")
    if not Path(args.finetune).is_file() and not checkpoint.is_valid(Path(args.finetune, "best.pt")):
        faults.append(f"--finetune {args.finetune}: best.pt is missing or damaged; name another run")
    return faults


def identity(kind: str, args: Namespace, corpus: data.Corpus, ranks: int) -> dict[str, Any]:
    """Returns what identifies a run in its checkpoints, which includes --data but not the run directory."""
    flags = {name: value for name, value in vars(args).items() if name not in RESUMABLE or name == "data"}
    return {"kind": kind, "flags": flags, "words": corpus.words, "sha256": corpus.sha256, "ranks": ranks}


@contextmanager
def restoring(parser: arguments.Parser, run: Run, path: Path | None = None) -> Iterator[None]:
    """Ends the script with exit code 2 and one line if the state of a checkpoint cannot be loaded inside the block: the
    run's own checkpoint, or for --finetune the one at `path`."""
    try:
        yield
    except (*checkpoint.UNREADABLE, checkpoint.CheckpointError) as error:
        if out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        run.release()
        if path is not None:
            parser.refuse([f"--finetune: {path} has no weights for this model ({reason}); name another run"])
        parser.refuse([f"{run.folder}: its checkpoint is not the state of this run ({reason}); start a new run"])


def check_state(saved: dict[str, Any], form: dict[str, Any], reasons: Sequence[str]) -> None:
    """Raises ValueError unless the saved state has the form of this run's state and, if stopped, one of the `reasons`.

    The state of the CUDA generator is not required, since the run may have been saved on another kind of device, nor
    the checksum of a test text, which the run may not have had.
    """
    form = {**form, "rng": [{name: part for name, part in rng.items() if name != "cuda"} for rng in form["rng"]]}
    form["sha256"] = {split: part for split, part in form["sha256"].items() if split != "test"}
    check_vocabulary(saved, form["words"])
    checkpoint.validate_state(saved, form)
    if saved["stopped_by"] not in ("", *reasons):
        raise ValueError("it was stopped by nothing that is known")


def check_vocabulary(saved: dict[str, Any], words: list[str]) -> None:
    """Raises ValueError unless `words`, the vocabulary of this run, is that of a checkpoint: equal texts and flags may
    give another one in another version."""
    before = saved.get("words")
    if isinstance(before, list) and words == [*before, data.UNK]:
        raise ValueError(
            f"its vocabulary has no {data.UNK}, which words of a test.txt that was added later would become; take"
            " test.txt away, with --test skip"
        )
    if before != words:
        raise ValueError(f"its vocabulary is not that of {len(words):,} word types which this text has")


def read_config(parser: arguments.Parser, save: str | None, flag: str) -> dict[str, Any]:
    """Returns config.json of the run in `save`, to which `flag` (--resume or --finetune) refers. Exits with code 2 if
    it is missing or damaged, or if another script than that of `parser` wrote it."""
    if save is None:
        parser.refuse([f"{flag}: say which run to continue with --save DIR"])
    path = Path(save) / "config.json"
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "resume")}
    try:
        if path.stat().st_size > MAX_CONFIG or not path.is_file():
            raise ValueError("too long, or no file")
        config = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse_constant)
        script, flags = config["script"], with_younger(dict(config["flags"]), actions)
        config["flags"] = flags
        if not isinstance(config.get("resumed", []), list):
            raise ValueError("resumed")
    except OSError:
        parser.refuse([f"{flag}: there is no run in {save} ({path.name} cannot be read); name a run directory"])
    except (ValueError, LookupError, TypeError, RecursionError):
        parser.refuse([f"{flag}: {path} is damaged; start a new run"])
    if script != parser.prog:
        parser.refuse([f"{flag}: {save} is a run of {script}; name a run of {parser.prog}"])
    if lost := actions.keys() - flags.keys():
        parser.refuse([f"{flag}: {path} is damaged or of another version (no {min(lost)}); start a new run"])
    if unknown := flags.keys() - actions.keys():
        what = reprlib.repr(min(unknown))
        parser.refuse([f"{flag}: {path} is damaged or of another version (with {what}); start a new run"])
    if wrong := [name for name, action in actions.items() if not fits(action, flags[name])]:
        parser.refuse([f"{flag}: {path} is damaged at {', '.join(wrong)}; start a new run"])
    return config


def read_finetuned(parser: arguments.Parser, args: Namespace) -> dict[str, Any]:
    """Returns config.json of the run that --finetune names, or what takes its place for a model of the published code:
    the flags of this script's defaults, which are the published ones, with the size and the cell of the model, and the
    size of its vocabulary. Exits with code 2 if the file cannot be read."""
    if not published_model.is_pickled(args.finetune):
        return read_config(parser, args.finetune, "--finetune")
    try:
        model = published_model.load(args.finetune)
        cell = published_model.cell_of(model, args.arch and resolve_cell(args.arch), args.finetune)
    except checkpoint.CheckpointError as error:
        parser.refuse([f"--finetune: {error}"])
    except GenotypeError as error:
        parser.refuse([f"--arch: {error}"])
    flags = parser.parse_args([])
    flags.emsize, flags.arch = model.nhid, str(cell)
    arguments.complete(flags, "train")
    return {"flags": vars(flags), "ntoken": model.ntoken}


def refuse_constant(name: str) -> None:
    """Raises ValueError for NaN and infinity, which JSON does not have but Python's reader accepts."""
    raise ValueError(name)


def fits(action: Any, value: Any) -> bool:
    """Returns whether a value from a file has the type of the flag and is one of its choices, if it has any."""
    if isinstance(action.default, bool):
        return isinstance(value, bool)
    kinds = {int: (int,), float: (int, float)}.get(action.type, (str,))
    fits_type = isinstance(value, kinds) and (kinds == (str,) or metrics.is_number(value))
    return fits_type and value in (action.choices or [value])


def changed_flags(args: Namespace, before: dict[str, Any]) -> list[str]:
    """Returns a fault for each flag that is fixed for a run and differs from its earlier value in `before`."""
    return [
        f"--{name} {value}: the run in {args.save} has {before[name]}; leave the flag out, or start a new run"
        for name, value in vars(args).items()
        if name in before and name not in RESUMABLE and before[name] != value
    ]


def state_faults(kind: str, args: Namespace, flags: dict[str, Any], saved: dict[str, Any], ranks: int) -> list[str]:
    """Returns the reasons why a run with `flags` in its config.json cannot resume from the state in its directory."""
    path = Path(args.save, "last.pt")
    try:
        other = {name: saved["flags"][name] for name in flags.keys() - RESUMABLE if saved["flags"][name] != flags[name]}
        begun = saved["progress"]["epoch"] - (saved["progress"]["time_step"] == 0)
        if saved["kind"] != kind:
            return [f"{path}: the state of another kind of run ({reprlib.repr(saved['kind'])}); start a new run"]
        if saved["ranks"] != ranks:
            before = int(saved["ranks"])
            how = f"with torchrun and {before} processes in all" if before > 1 else "without torchrun"
            return [f"--resume: the run in {args.save} is one of {before} ranks, not {ranks}; start it {how}"]
        best = path.with_name("best.pt")
        needed = saved["best"] < math.inf if kind == "train" else saved["stopped_by"] == "patience"
        if needed and not checkpoint.is_valid(best):
            return [f"{best}: missing or damaged, and the result is made from it; put a copy there, or start a new run"]
        if (stopped_by := saved["stopped_by"]) and args.epochs != flags["epochs"]:
            return [f"--epochs {args.epochs}: the run in {args.save} was stopped by {stopped_by}; start a new run"]
        if args.epochs < begun:
            return [
                f"--epochs {args.epochs}: the run in {args.save} is in epoch {begun} already; take at least {begun}"
            ]
    except checkpoint.UNREADABLE:
        return [f"{path}: not the state of a run; start a new run"]
    return [
        f"--{name} {flags[name]}: {path} was written with {reprlib.repr(written)}; put the run's own there, or start"
        " a new run"
        for name, written in sorted(other.items())
    ]
