"""Validates a study's flags, alone and against the stages that have begun.

A fault is one line of text for the user that names the flag and says how to correct it.
"""

import re
import shlex
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import data
from experiment import arguments, metrics, resume, startup, validate_arguments
from genotypes import GenotypeError, random_genotype, resolve_cell
from study import cost
from study.arguments import STAGE_FLAGS, requested_stages
from study.design import METHODS, RANDOM, Cell, Study, falls_with_epochs, label, named_method
from study.jobs import Job

CONFIG = "study.json"
EPHEMERAL_FLAGS = {"help", "stage", "study", "resume", "dry_run", "address"}
# The study sets these flags itself, so the quoted flags that a user gives for the scripts must not contain them.
RESERVED_FLAGS = "save resume data arch epochs seed test overfit finetune search_split".split()
METHOD_NAME = re.compile(r"(?!random-)[A-Za-z][A-Za-z0-9-]*")
# These may grow after their stage has begun: what was run before remains part of the study.
GROWING_FLAGS = {"methods", "seeds", "random_cells", "baselines", "proxy_cells", "proxy_flags", "proxy_seeds"}


def read_config(parser: arguments.Parser, folder: Path) -> dict[str, Any]:
    """Reads study.json, which holds the flags of a study that has begun and the checksums of its text; a flag that is
    younger than the study has its default. Ends the script with an error message if the file is damaged or has a flag
    that this version does not have."""
    config = metrics.read_json(folder / CONFIG) or {}
    flags, actions = config.get("flags"), {a.dest: a for a in parser._actions if a.dest not in EPHEMERAL_FLAGS}
    known = isinstance(flags, dict) and flags.keys() <= actions.keys() and "sha256" in config
    if not known or not all(fits(actions[name], flags[name]) for name in flags):
        parser.refuse([f"--study: {folder / CONFIG} is damaged or of an earlier version; start another study"])
    config["flags"] = {**{name: action.default for name, action in actions.items()}, **flags}
    return config


def fits(action: Any, value: Any) -> bool:
    """Returns whether a value read from a file is valid for the flag that `action` defines."""
    if action.nargs is None or action.nargs == 0:
        return (value is None and action.default is None) or resume.fits(action, value)
    return isinstance(value, list) and all(resume.fits(action, part) for part in value)


def number_faults(args: Namespace) -> list[str]:
    """Returns a fault for each number that is out of its range or contradicts another flag."""
    faults = []
    for name, value in vars(args).items():
        least = 1 if name.endswith(("epochs", "seeds", "top")) else 0
        for number in value if isinstance(value, list) else [value]:
            if type(number) in (int, float) and not least <= number < validate_arguments.MAX_INTEGER:
                faults.append(
                    f"--{name} {number}: must be at least {least} and below {validate_arguments.MAX_INTEGER:,}"
                )
    if args.converged == 1:
        faults.append("--converged 1: one trial has no spread; take at least 2, or 0 for never")
    if args.select_seeds > 1 and (args.converged or args.halving):
        rule = "--halving" if args.halving else "--converged"
        faults.append(f"--select_seeds {args.select_seeds}: {rule} takes every short training for a cell; use 1 seed")
    if args.proxy_seeds < 2 and args.stage in ("run", "proxy"):
        faults.append(f"--proxy_seeds {args.proxy_seeds}: at least 2, since no run is to be compared with itself")
    long = args.proxy_reference or args.full_epochs
    if args.stage in ("run", "proxy") and not args.proxy_flags and min(args.proxy_epochs) >= long:
        faults.append(
            f"--proxy_epochs {min(args.proxy_epochs)}: none is below the {long} epochs of the long training; take"
            " fewer, or a longer --proxy_reference"
        )
    if set(args.methods) == {RANDOM} and not args.random_cells:
        faults.append("--random_cells 0: as many as are found, and no method finds any; say how many")
    if args.cpus_per_trial == 0:
        faults.append("--cpus_per_trial 0: a trial needs a processor; take at least a part of one")
    if (gpus := args.gpus_per_trial or 0) > 1 and gpus % 1:
        faults.append(
            f"--gpus_per_trial {gpus:g}: above 1, a trial takes whole GPUs; take {int(gpus)} or {int(gpus) + 1}"
        )
    return faults


def begun_faults(args: Namespace, config: dict[str, Any], folder: Path) -> list[str]:
    """Returns the faults of flags that conflict with a study that has begun; `config` is the content of study.json. A
    requested stage that has begun needs --resume (or --dry_run), and a flag that shapes such a stage must keep its
    value, or keep what it had and gain more (`GROWING_FLAGS`). The text may have moved: its checksums are compared."""
    begun = [stage for stage in STAGE_FLAGS if (folder / stage).exists()]
    again = [stage for stage in requested_stages(args) if stage in begun]
    faults = []
    if again and not args.resume and not args.dry_run:
        faults.append(f"--study {folder}: its {again[0]} has begun; add --resume to continue it, or take another")
    for name in dict.fromkeys(name for stage in begun for name in STAGE_FLAGS[stage].split()):
        if name != "data" and not continues(name, getattr(args, name), before := config["flags"][name]):
            faults.append(f"--{name}: the study in {folder} has begun with {before}; leave it out, or start another")
    return faults


def continues(name: str, now: Any, before: Any) -> bool:
    """Returns whether the new value of a flag keeps everything that the earlier value has run."""
    if name not in GROWING_FLAGS or now == before:
        return now == before
    return set(before) <= set(now) if isinstance(before, list) else 0 < before <= now


def text_faults(args: Namespace) -> list[str]:
    """Returns the faults of the quoted flags and of the names of methods and cells. Quoted flags must be parsable and
    must not contain a flag that the study itself sets. Names must be distinct, cells must exist, and the proxy stage
    needs at least two cells."""
    faults = []
    for name, flags, reserved in quoted_flags(args):
        try:
            words = shlex.split(flags.replace("=", " "))
        except ValueError as error:
            faults.append(f"{name}: {error}; close the quotes")
            continue
        given = {word[2:] for word in words if word.startswith("--")}
        faults += [f"{name}: --{flag} is the study's to set; leave it out" for flag in reserved if flag in given]
        if name.startswith(("--search_flags", "--methods")) and args.search_split == "train":
            faults += [
                f"{name}: --{word} looks at valid.txt, which --search_split train keeps for selecting; leave it out,"
                " or add --search_split valid"
                for word in ("patience", "schedule") if word in given and (word != "schedule" or "plateau" in words)
            ]  # fmt: skip
    for text in args.methods:
        name, sign, _ = text.partition("=")
        if not sign and name not in (*METHODS, RANDOM):
            faults.append(f"--methods {name}: has no flags; give them as {name}=FLAGS")
        elif sign and (not METHOD_NAME.fullmatch(name) or name in (*METHODS, RANDOM)):
            faults.append(f"--methods {text}: another name, please: a letter, then letters, digits and -")
    for name in ("methods", "baselines", "proxy_cells", "proxy_flags"):
        faults += naming_faults(name, getattr(args, name))
    for name in ("baselines", "proxy_cells"):
        for arch in getattr(args, name):
            try:
                resolve_cell(arch)
            except GenotypeError as error:
                faults.append(f"--{name}: {error}")
    if len(args.proxy_cells) < 2:
        faults.append("--proxy_cells: a ranking needs two cells at least")
    return faults


def naming_faults(flag: str, values: Sequence[str]) -> list[str]:
    """Returns a fault for each value of the flag that is given twice, and for different values whose directories would
    have one name (`label`)."""
    alike: dict[str, list[str]] = {}
    for value in values:
        name = value.partition("=")[0] if flag == "methods" else value
        alike.setdefault(label(name), []).append(name)
    remedy = "begin them with what differs" if flag == "proxy_flags" else "save the cells as JSON and give the paths"
    return [
        f"--{flag}: {names[0]} is named twice; leave one out" if len(set(names)) == 1
        else f"--{flag}: {' and '.join(names)} would have one directory, {directory}; {remedy}"
        for directory, names in alike.items() if len(names) > 1
    ]  # fmt: skip


def quoted_flags(args: Namespace) -> Iterator[tuple[str, str, list[str]]]:
    """Yields the flags for the scripts that the user gives in quotes: the study's flag that has them, their text, and
    the names of the flags that must not be among them."""
    for name in ("train_flags", "search_flags", "select_flags"):
        yield f"--{name}", getattr(args, name), [*RESERVED_FLAGS, "unrolled"]
    for flags in args.proxy_flags:
        yield "--proxy_flags", flags, [name for name in RESERVED_FLAGS if name != "epochs"]
    for name, flags in map(named_method, args.methods):
        yield f"--methods {name}", flags, RESERVED_FLAGS


def missing_faults(study: Study) -> list[str]:
    """Returns a fault if the select or retrain stage is requested alone and has no cell to start from."""
    stage = study.args.stage
    if stage == "select" and not study.cells():
        return ["select: no cell has been found yet; run python trials.py search first"]
    if stage == "retrain" and not study.selected():
        return ["retrain: no cell has been selected yet; run python trials.py select first"]
    return []


def job_faults(study: Study, stages: Sequence[str], corpus: data.Corpus | None = None) -> list[str]:
    """Returns the faults that train.py and train_search.py would report for the jobs of these stages. Without a corpus,
    the flags are validated. With one, only the lengths of its texts are."""
    faults: dict[str, None] = {}
    for stage in stages:
        for job in planned(study, stage):
            flag = flag_of(job)
            script = cost.SCRIPTS[job.script]
            of_script = script.build_parser()
            of_script.prog = f"trials.py: {flag}"
            test = "read" if stage == "retrain" else "skip"  # The chosen cell's run reads it after that stage.
            args = of_script.parse_args([*job.flags, "--save", str(study.folder / "new"), "--test", test])
            arguments.complete(args, stage)
            if corpus is not None:
                wrong = startup.length_faults(args, script.texts_to_read(corpus, args))
            else:
                kind = "search" if stage == "search" else "train"
                wrong = validate_arguments.validate(kind, args, of_script.get_default)
                if stage == "proxy" and falls_with_epochs(study.args.train_flags):
                    wrong.append(f"--schedule {args.schedule}: under it a short training is not the beginning of a long"
                                 " one, as proxy takes it to be; leave it out")  # fmt: skip
            faults.update(dict.fromkeys(f"{stage}: {line} ({flag})" for line in wrong))
    return list(faults)


def flag_of(job: Job) -> str:
    """Returns the flags of the study, as a message names them, in which a user finds those of a job's script."""
    stage, group, *_ = job.name.split("/")
    if stage == "search":
        return "--search_flags" if group in METHODS else "--search_flags or --methods"
    if stage == "proxy":
        return "--train_flags" if group == "full" else "--train_flags or --proxy_flags"
    return "--train_flags or --select_flags" if stage == "select" else "--train_flags"


def planned(study: Study, stage: str) -> list[Job]:
    """Returns the jobs of a stage, with as many placeholder cells as needed while the real cells are unknown."""
    args, searches = study.args, study.search()
    if stage == "select" and not all(job.is_done(study.folder) for job in searches):
        return study.select(placeholder_cells(len(searches) + len(study.random_cells(len(searches)))))
    if stage == "retrain" and len(study.selected()) < args.top:
        return study.retrain(placeholder_cells(args.top))
    return getattr(study, stage)()


def placeholder_cells(number: int) -> list[Cell]:
    """Returns `number` random cells that stand for cells which are not known yet."""
    return [Cell(random_genotype(i), (f"unknown-{i}",)) for i in range(number)]
