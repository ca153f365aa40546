"""Runs a study: searches by several methods, selection, retraining and a leaderboard (docs/study.md).

    python trials.py run --study runs/study                            # published sizes: weeks of GPU time
    python trials.py run --study runs/small --data builtin --dry_run --search_flags "--emsize 32 ..."

A study tests whether searched cells are better than random ones under one budget. It prints its cost before it begins
(--dry_run stops there), and continues with --resume. It needs Ray: pip install -r requirements-cluster.txt
"""

import shutil
import sys
from argparse import Namespace
from pathlib import Path
from shlex import quote
from tempfile import mkdtemp

from experiment import arguments, signals
from data import Corpus, absolute_name, load_corpus
from experiment.lock import Locked
from experiment.run_directory import Run, new_folder
from experiment.validate_arguments import folder_faults, must_not_be_overwritten
from study import validate_arguments
from study.arguments import build_parser, requested_stages
from study.design import Study
from study.records import restore
from study.validate_arguments import CONFIG, EPHEMERAL_FLAGS, job_faults, planned
from utils import DataError, RunError

INSTALL = "trials.py needs Ray, SciPy and rich: pip install -r requirements-cluster.txt"


def start_study(parser: arguments.Parser, argv: list[str] | None) -> tuple[Namespace, Corpus | None, Run]:
    """Returns the flags, the corpus (None for a report) and the directory of a new or resumed study. Ends the script
    with one line for each fault if the flags or the corpus cannot be used."""
    args, config = parser.parse_args(argv), None
    if args.study and (Path(args.study) / CONFIG).exists():
        config = validate_arguments.read_config(parser, Path(args.study))
        restore(Path(args.study))
        parser.set_defaults(**config["flags"])
        args = parser.parse_args(argv)
    args.data = absolute_name(args.data)
    folder = Path(args.study or new_folder("study"))

    faults = validate_arguments.number_faults(args) + validate_arguments.text_faults(args)
    if config is None:
        if args.resume or args.stage == "report":
            known = f"--study {args.study}: there is no study ({CONFIG} is missing); name another"
            faults.append(known if args.study else "--study: say which study to resume or report, with --study DIR")
        elif folder.is_dir() and must_not_be_overwritten(folder):
            faults.append(f"--study {folder}: holds files already; take another")
    else:
        faults += validate_arguments.begun_faults(args, config, folder)
    study = Study(folder, args)
    stages = requested_stages(args)
    faults = faults or folder_faults("--study", folder) or validate_arguments.missing_faults(study)
    faults = faults or job_faults(study, stages)
    corpus = None
    if stages and not faults:  # A report needs no text.
        try:
            corpus = load_corpus(args.data, test="retrain" in stages)
        except DataError as error:
            parser.refuse(error.faults)
        faults = job_faults(study, stages, corpus)
        begun_with = {} if config is None else config["sha256"]
        if any(corpus.sha256.get(split, digest) != digest for split, digest in begun_with.items()):
            faults.append(
                f"--data {args.data}: not the text that the study in {folder} began with; give that text by --data"
            )
    if faults:
        parser.refuse(faults)

    try:
        if args.dry_run and config is None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(mkdtemp(prefix="plan-", dir=folder.parent))
        run = Run(folder)
    except Locked as error:
        parser.refuse([f"--study: {error}"])
    if corpus and not args.dry_run:
        flags = {name: value for name, value in vars(args).items() if name not in EPHEMERAL_FLAGS}
        run.write(CONFIG, {"flags": flags, "sha256": begun_with | corpus.sha256})
    return args, corpus, run


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    asked = parser.parse_args(argv)  # --help must work without Ray, and a report does.
    try:
        from study import leaderboard, summary

        if requested_stages(asked):
            from study import ray_backend
            from study.runner import StudyRunner
    except ImportError as error:
        raise RunError(f"{INSTALL} ({error.name} is missing)") from error
    args, corpus, run = start_study(parser, argv)
    study = Study(run.folder, args)
    stages = requested_stages(args)
    if stages:
        try:
            with ray_backend.connected(args.address):
                runner = StudyRunner(run, args, corpus)
                whole = study.training("plan", "whole", "DARTS", args.full_epochs, 1)[0]
                run.log(runner.plan({stage: planned(study, stage) for stage in stages}, whole))
                if args.dry_run:
                    return 0
                for stage in stages:
                    go_on = runner.run_stage(stage, getattr(study, stage)())
                    if go_on and stage == "retrain" and (chosen := study.chosen()):
                        go_on = runner.run_stage("test", [chosen[1]])
                    if not go_on:
                        break
        finally:
            if not (run.folder / CONFIG).exists():  # A --dry_run of a new study leaves no directory.
                shutil.rmtree(run.folder)
        if runner.interrupted:
            where = f" --address {args.address}" if args.address else ""
            again = f"python trials.py {args.stage} --resume --study {quote(str(run.folder))}{where}"
            run.log(f"interrupted; continue with: {again}")
            return 130
    if args.stage in ("run", "report"):
        run.log(leaderboard.write(study, run))
    return 1 if "failures" in summary.reasons(study, "stopped").values() else 0


if __name__ == "__main__":
    sys.exit(signals.run_script(main))
