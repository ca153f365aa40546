"""Runs a study: searches by several methods, selection, retraining and a leaderboard.

    python trials.py run --study runs/study                            # published sizes: weeks of GPU time
    python trials.py run --study runs/small --data builtin --dry_run --search_flags "--emsize 32 ..."

One search yields one random sample of a cell. A study searches for several cells by each method, samples as many at
random, trains all of them under one budget, and tests whether the searched cells are better than the random ones. It
prints its cost before it begins (--dry_run stops there), runs many trials at a time on one machine or a cluster, and
resumes with --resume after any interruption. It needs Ray: pip install -r requirements-cluster.txt
"""

import shutil
import sys
from argparse import Namespace
from pathlib import Path
from tempfile import mkdtemp

import data
from experiment import arguments, signals, validate_arguments
from experiment.lock import Locked
from experiment.run_directory import Run, new_folder
from study.arguments import build_parser, requested_stages
from study.design import Study
from study.validate_arguments import (
    CONFIG,
    EPHEMERAL_FLAGS,
    begun_faults,
    job_faults,
    missing_faults,
    number_faults,
    planned,
    read_config,
    text_faults,
)
from utils import DataError, RunError

INSTALL = "trials.py needs Ray, SciPy and rich: pip install -r requirements-cluster.txt"


def start_study(parser: arguments.Parser, argv: list[str] | None) -> tuple[Namespace, data.Corpus, Run]:
    """Returns the flags, the corpus and the directory of a new or resumed study.

    Ends the script with one line for each fault if the flags or the corpus cannot be used.
    """
    args, config = parser.parse_args(argv), None
    if args.study and (Path(args.study) / CONFIG).exists():
        config = read_config(parser, Path(args.study))
        parser.set_defaults(**config["flags"])
        args = parser.parse_args(argv)
    folder = Path(args.study or new_folder("study"))

    found = number_faults(args) + text_faults(args)
    if config is None:
        if args.resume or args.stage == "report":
            found.append(f"--study {args.study}: there is no study ({CONFIG} is missing); name another")
        elif folder.is_dir() and any(map(validate_arguments.holds_work, folder.iterdir())):
            found.append(f"--study {folder}: holds files already; take another")
    else:
        found += begun_faults(args, config, folder)
    study = Study(folder, args)
    stages = requested_stages(args)
    found = found or missing_faults(study) or job_faults(parser, study, stages)
    corpus = None
    if not found:
        try:
            corpus = data.load_corpus(args.data)
        except DataError as error:
            found += error.faults
    if corpus is not None:
        found += job_faults(parser, study, stages, corpus)
        if config is not None and config["sha256"] != corpus.sha256:
            found.append(f"--data {args.data}: not the text that the study in {folder} began with")
    if found:
        parser.refuse(found)

    try:
        if args.dry_run and config is None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(mkdtemp(prefix="plan-", dir=folder.parent))
        run = Run(folder)
    except Locked as error:
        parser.refuse([f"--study: {error}"])
    if not args.dry_run:
        flags = {name: value for name, value in vars(args).items() if name not in EPHEMERAL_FLAGS}
        run.write(CONFIG, {"flags": flags, "sha256": corpus.sha256})
    return args, corpus, run


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    parser.parse_args(argv)  # --help must work without Ray.
    try:
        from study import leaderboard, ray_backend
        from study.runner import StudyRunner
    except ImportError as error:
        raise RunError(f"{INSTALL} ({error.name} is missing)") from error
    args, corpus, run = start_study(parser, argv)
    study = Study(run.folder, args)
    stages = requested_stages(args)
    if stages:
        try:
            with ray_backend.connected(args.address):
                crew = StudyRunner(run, args, corpus)
                whole = study.training("plan", "whole", "DARTS", args.full_epochs, 1)[0]
                run.log(crew.plan({stage: planned(study, stage) for stage in stages}, whole))
                if args.dry_run:
                    return 0
                for stage in stages:
                    todo = getattr(study, stage)()
                    go_on = crew.run_stage(stage, todo, args.select_epochs if stage == "select" and args.halving else 0)
                    if go_on and stage == "retrain" and (chosen := study.chosen()):
                        go_on = crew.run_stage("test", [chosen[1]])
                    if not go_on:
                        break
        finally:
            if not (run.folder / CONFIG).exists():  # A --dry_run of a new study leaves no directory.
                shutil.rmtree(run.folder)
        if crew.interrupted:
            run.log(f"interrupted; continue with: python trials.py {args.stage} --resume --study {run.folder}")
            return 130
    if args.stage in ("run", "report"):
        run.log(leaderboard.write(study, run))
    return 1 if "failures" in leaderboard.stopped(study).values() else 0


if __name__ == "__main__":
    sys.exit(signals.run_script(main))
