"""From one search to a result one can believe: trials of several methods, selection, retraining, a leaderboard.

    python trials.py run --study runs/study                            # published sizes; wants GPUs, and weeks of them
    python trials.py run --study runs/small --data builtin --dry_run --search_flags "--emsize 32 ..."

One search is a draw from a lottery. A study draws several cells by each method, and as many at random, trains all of
them under one budget, and says whether searching was better than drawing. It prints what it will cost before it
begins (--dry_run stops there), runs many trials at a time on one machine or a cluster, and goes on with --resume
after anything. Needs Ray: pip install -r requirements-cluster.txt
"""

import shlex
import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import data
from experiment import arguments, metrics, resume, signals, startup, validate_arguments
from experiment.lock import Locked
from experiment.run_directory import Run, new_folder
from genotypes import GenotypeError, random_genotype, resolve_cell
from study import cost
from study.design import METHODS, RANDOM, Cell, Study, label
from study.jobs import Job
from utils import RunError

# The flags that decide what a stage runs: they stay what they are once it has begun.
SHAPED_BY = {
    "baseline": "data seed train_flags baselines full_epochs full_seeds",
    "proxy": "data seed train_flags full_epochs proxy_cells proxy_epochs proxy_emsize proxy_tokens proxy_reference"
    " proxy_seeds",
    "search": "data seed methods seeds search_epochs search_flags search_split",
    "select": "data seed train_flags methods random_cells select_epochs select_seeds select_flags halving",
    "retrain": "data seed train_flags top full_epochs full_seeds",
}
QUOTED = {
    "baseline": "train_flags", "proxy": "train_flags", "search": "search_flags", "select": "select_flags",
    "retrain": "train_flags",
}  # fmt: skip
CONFIG = "study.json"
NOT_KEPT = {"help", "stage", "study", "resume", "dry_run", "address"}
LEAST = {"proxy_reference": 0, "top": 1, "proxy_emsize": 1, "proxy_tokens": 1}
INSTALL = "trials.py needs Ray, SciPy and rich: pip install -r requirements-cluster.txt"


def build_parser() -> arguments.Parser:
    parser = arguments.Parser("trials.py", "A study: searches, selection, retraining and a leaderboard.")
    parser.add_argument("stage", choices=("run", *SHAPED_BY, "report"), help="run is all of them in this order")
    study = parser.add_argument_group("study")
    study.add_argument("--study", metavar="DIR", help="its directory (default: runs/study-YYYYMMDD-HHMMSS)")
    study.add_argument(
        "--resume",
        action="store_true",
        help="go on with a stage that has begun; flags of stages that have not may be given anew",
    )
    study.add_argument("--dry_run", action="store_true", help="print what the study would run and cost, and stop")
    study.add_argument("--data", default="penn", metavar="NAME|DIR", help="the text, as of train.py")
    study.add_argument("--seed", type=int, default=1, help="of the first trial of each kind; the others count on")
    study.add_argument(
        "--train_flags", default="", metavar="FLAGS", help="of train.py, for every training of a cell, in quotes"
    )

    baseline = parser.add_argument_group("baseline: the yardstick, trained in full")
    baseline.add_argument("--baselines", nargs="+", default=["DARTS", "LSTM"], metavar="ARCH", help="cells")
    baseline.add_argument("--full_epochs", type=int, default=3600, help="epochs of a training in full")
    baseline.add_argument("--full_seeds", type=int, default=1, help="trainings in full of one cell")

    proxy = parser.add_argument_group("proxy: which short training ranks cells as long training does")
    proxy.add_argument(
        "--proxy_cells",
        nargs="+",
        default=["DARTS_V1", "DARTS_V2", "ENAS", *(f"random:{i}" for i in range(1000, 1005))],
        metavar="ARCH",
        help="cells to rank",
    )
    proxy.add_argument("--proxy_epochs", nargs="+", type=int, default=[50, 100, 300], metavar="N", help="to try")
    proxy.add_argument(
        "--proxy_emsize", nargs="*", type=int, default=[], metavar="N", help="smaller sizes to try, beside the full one"
    )
    proxy.add_argument(
        "--proxy_tokens", nargs="*", type=int, default=[], metavar="N",
        help="shorter texts to try (--limit_tokens), beside the full one",
    )  # fmt: skip
    proxy.add_argument("--proxy_reference", type=int, default=0, metavar="N",
                       help="epochs of the long training (default: full_epochs)")  # fmt: skip
    proxy.add_argument("--proxy_seeds", type=int, default=2, help="trainings of each cell")

    search = parser.add_argument_group("search: cells, by each method")
    search.add_argument(
        "--methods", nargs="+", choices=(*METHODS, RANDOM), default=[*METHODS, RANDOM], help="how cells are found"
    )
    search.add_argument("--seeds", type=int, default=4, help="searches by each method")
    search.add_argument("--random_cells", type=int, default=0, help="cells drawn at random (default: as many as found)")
    search.add_argument("--search_epochs", type=int, default=50, help="epochs of a search")
    search.add_argument("--search_flags", default="", metavar="FLAGS", help="of train_search.py, in quotes")
    search.add_argument(
        "--search_split",
        choices=("train", "valid"),
        default="train",
        help="text for the alphas: train keeps valid.txt, by which cells are selected, unseen; valid is as published",
    )

    select = parser.add_argument_group("select: a short training of every cell, under one budget")
    select.add_argument("--select_epochs", type=int, default=300, help="epochs of a short training")
    select.add_argument("--select_seeds", type=int, default=1, help="short trainings of each cell")
    select.add_argument(
        "--select_flags", default="", metavar="FLAGS", help="beside --train_flags, such as a smaller --emsize"
    )
    select.add_argument(
        "--halving",
        action="store_true",
        help="end the trainings that fall behind (successive halving, ASHA); methods are then not compared",
    )

    retrain = parser.add_argument_group("retrain: the best in full")
    retrain.add_argument("--top", type=int, default=1, metavar="K", help="how many cells")

    run = parser.add_argument_group("run")
    run.add_argument("--parallel", type=int, default=0, help="trials at a time (default: as many as fit)")
    run.add_argument("--cpus_per_trial", type=float, default=1, help="processor cores, and threads, of one trial")
    run.add_argument(
        "--gpus_per_trial",
        type=float,
        help="GPUs of one trial; 0.25 puts four trials on one GPU, 0 is for processors alone (default: 1 where there "
        "are GPUs, else 0)",
    )
    run.add_argument("--address", metavar="HOST:PORT", help="of a Ray cluster to join (default: this machine alone)")
    run.add_argument("--retries", type=int, default=3, help="how often a trial whose process died is started again")
    run.add_argument("--budget_hours", type=float, default=0, help="device time after which no more is run; 0: any")
    run.add_argument(
        "--converged",
        type=int,
        default=0,
        metavar="M",
        help="end a selection when M trials brought nothing better and spread less than the M before; 0: never",
    )
    return parser


def begin(parser: arguments.Parser, argv: list[str] | None) -> tuple[Namespace, data.Corpus, Run]:
    """The flags, the corpus and the directory of a study, new or begun; ends the script with a line for each fault."""
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
    stages = asked(args)
    found = found or missing_faults(study) or job_faults(parser, study, stages)
    corpus = None
    if not found:
        try:
            corpus = data.load_corpus(args.data)
        except data.DataError as error:
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
        flags = {name: value for name, value in vars(args).items() if name not in NOT_KEPT}
        run.write(CONFIG, {"flags": flags, "sha256": corpus.sha256})
    return args, corpus, run


def asked(args: Namespace) -> list[str]:
    """The stages to be run, in their order; none for a report alone."""
    return [stage for stage in SHAPED_BY if args.stage in ("run", stage)]


def read_config(parser: arguments.Parser, folder: Path) -> dict[str, Any]:
    """study.json: the flags of a study that has begun, and the checksums of its text."""
    found = metrics.read_json(folder / CONFIG) or {}
    flags, actions = found.get("flags"), {a.dest: a for a in parser._actions if a.dest not in NOT_KEPT}
    if (
        not isinstance(flags, dict)
        or flags.keys() != actions.keys()
        or not all(fits(actions[name], flags[name]) for name in flags)
        or "sha256" not in found
    ):
        parser.refuse([f"--study: {folder / CONFIG} is damaged or of an earlier version; start another study"])
    return found


def fits(action: Any, value: Any) -> bool:
    """Whether a value from a file could be that of a flag."""
    if action.nargs is None or action.nargs == 0:
        return (value is None and action.default is None) or resume.fits(action, value)
    return isinstance(value, list) and all(resume.fits(action, part) for part in value)


def number_faults(args: Namespace) -> list[str]:
    """Numbers out of their range."""
    found = []
    for name, value in vars(args).items():
        least = LEAST.get(name, 1 if name.endswith(("epochs", "seeds", "top")) else 0)
        for number in value if isinstance(value, list) else [value]:
            if type(number) in (int, float) and not least <= number < validate_arguments.LARGEST:
                found.append(f"--{name} {number}: must be at least {least} and below {validate_arguments.LARGEST:,}")
    if args.converged == 1:
        found.append("--converged 1: one trial has no spread; take at least 2, or 0 for never")
    if args.select_seeds > 1 and (args.converged or args.halving):
        rule = "--halving" if args.halving else "--converged"
        found.append(f"--select_seeds {args.select_seeds}: {rule} takes every short training for a cell; use 1 seed")
    if args.proxy_seeds < 2 and args.stage in ("run", "proxy"):
        found.append(f"--proxy_seeds {args.proxy_seeds}: at least 2, since no run is to be compared with itself")
    if RANDOM in args.methods and not args.random_cells and not METHODS.keys() & set(args.methods):
        found.append("--random_cells 0: as many as are found, and no method finds any; say how many")
    if args.cpus_per_trial == 0:
        found.append("--cpus_per_trial 0: a trial needs a processor; take at least a part of one")
    return found


def begun_faults(args: Namespace, config: dict[str, Any], folder: Path) -> list[str]:
    """Flags that a stage which has begun was shaped by and that are others now; and a stage to go on with, unasked."""
    begun = [stage for stage in SHAPED_BY if (folder / stage).exists()]
    again = [stage for stage in asked(args) if stage in begun]
    found = []
    if again and not args.resume and not args.dry_run:
        found.append(f"--study {folder}: its {again[0]} has begun; add --resume to go on, or take another")
    for name in dict.fromkeys(name for stage in begun for name in SHAPED_BY[stage].split()):
        if getattr(args, name) != (before := config["flags"][name]):
            found.append(f"--{name}: the study in {folder} has begun with {before}; leave it out, or start another")
    return found


def text_faults(args: Namespace) -> list[str]:
    """Flags in quotes that cannot be read, or that the study sets; cells that there are not."""
    found = []
    for name in ("train_flags", "search_flags", "select_flags"):
        try:
            words = shlex.split(getattr(args, name))
        except ValueError as error:
            found.append(f"--{name}: {error}; close the quotes")
            continue
        given = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
        found += [f"--{name}: --{taken} is the study's to set; leave it out" for taken in cost.TAKEN if taken in given]
        if name == "search_flags" and args.search_split == "train":
            found += [
                f"--search_flags: --{word} looks at valid.txt, which --search_split train keeps for selecting"
                for word in ("patience", "schedule") if word in given and (word != "schedule" or "plateau" in words)
            ]  # fmt: skip
    for name in ("methods", "baselines", "proxy_cells"):
        names = [label(value) for value in getattr(args, name)]
        found += [f"--{name}: {twice} is named twice" for twice in sorted({n for n in names if names.count(n) > 1})]
    for name in ("baselines", "proxy_cells"):
        for arch in getattr(args, name):
            try:
                resolve_cell(arch)
            except GenotypeError as error:
                found.append(f"--{name}: {error}")
    if len(args.proxy_cells) < 2:
        found.append("--proxy_cells: a ranking needs two cells at least")
    return found


def missing_faults(study: Study) -> list[str]:
    """A stage that is asked for alone and has nothing to begin with."""
    stage = study.args.stage
    if stage == "select" and not study.cells():
        return ["select: no cell has been found yet; run python trials.py search first"]
    if stage == "retrain" and not study.selected():
        return ["retrain: no cell has been selected yet; run python trials.py select first"]
    return []


def job_faults(
    parser: arguments.Parser, study: Study, stages: Sequence[str], corpus: data.Corpus | None = None
) -> list[str]:
    """What the scripts would find wrong with the jobs of these stages, a line for each fault; with a corpus, with its
    length alone."""
    found: dict[str, None] = {}
    for stage in stages:
        flag = QUOTED[stage]
        for job in planned(study, stage):
            script = cost.SCRIPTS[job.script]
            of_script = script.build_parser()
            of_script.prog = f"{parser.prog}: --{flag}"
            args = of_script.parse_args([*job.flags, "--save", str(study.folder / "new")])
            arguments.complete(args, stage)
            if corpus is not None:
                wrong = startup.length_faults(args, script.texts_to_read(corpus, args))
            else:
                wrong = validate_arguments.validate(args, of_script.get_default)
                if stage == "proxy" and args.schedule in ("cosine", "polynomial"):
                    wrong.append(f"--schedule {args.schedule}: under it a short training is not the beginning of a long"
                                 " one, as proxy takes it to be; leave it out")  # fmt: skip
            found.update(dict.fromkeys(f"{stage}: {line} (--{flag})" for line in wrong))
    return list(found)


def planned(study: Study, stage: str) -> list[Job]:
    """The jobs of a stage; as long as the cells are not known, of as many others."""
    args, searches = study.args, study.search()
    if stage == "select" and not all(job.decided(study.folder) for job in searches):
        return study.select(unknown(len(searches) + len(study.random_cells(len(searches)))))
    if stage == "retrain" and len(study.selected()) < args.top:
        return study.retrain(unknown(args.top))
    return getattr(study, stage)()


def unknown(number: int) -> list[Cell]:
    """So many cells, which stand for others."""
    return [Cell(random_genotype(i), (f"unknown-{i}",)) for i in range(number)]


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    parser.parse_args(argv)  # --help needs no Ray
    try:
        from study import leaderboard, ray_backend
        from study.runner import Crew
    except ImportError as error:
        raise RunError(f"{INSTALL} ({error.name} is missing)") from error
    args, corpus, run = begin(parser, argv)
    study = Study(run.folder, args)
    stages = asked(args)
    if stages:
        try:
            with ray_backend.connected(args.address):
                crew = Crew(run, args, corpus)
                whole = study.training("plan", "whole", "DARTS", args.full_epochs, 1)[0]
                run.log(crew.plan({stage: planned(study, stage) for stage in stages}, whole))
                if args.dry_run:
                    return 0
                for stage in stages:
                    todo = getattr(study, stage)()
                    go_on = crew.work(stage, todo, args.select_epochs if stage == "select" and args.halving else 0)
                    if go_on and stage == "retrain" and (chosen := study.chosen()):
                        go_on = crew.work("test", [chosen[1]])
                    if not go_on:
                        break
        finally:
            if not (run.folder / CONFIG).exists():  # a plan alone
                shutil.rmtree(run.folder)
        if crew.interrupted:
            run.log(f"interrupted; go on with: python trials.py {args.stage} --resume --study {run.folder}")
            return 130
    if args.stage in ("run", "report"):
        run.log(leaderboard.write(study, run))
    return 1 if "failures" in leaderboard.stopped(study).values() else 0


if __name__ == "__main__":
    sys.exit(signals.run_script(main))
