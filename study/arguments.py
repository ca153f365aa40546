"""Defines the command-line flags of a study (trials.py) and the stages that each flag shapes."""

from argparse import Namespace

from experiment import arguments
from study.design import METHODS, RANDOM

# These flags decide what a stage runs, so they must not change once the stage has begun.
STAGE_FLAGS = {
    "baseline": "data seed train_flags baselines full_epochs full_seeds",
    "proxy": "data seed train_flags full_epochs proxy_cells proxy_epochs proxy_emsize proxy_tokens proxy_reference"
    " proxy_seeds",
    "search": "data seed methods seeds search_epochs search_flags search_split",
    "select": "data seed train_flags methods random_cells select_epochs select_seeds select_flags halving",
    "retrain": "data seed train_flags top full_epochs full_seeds",
}


def build_parser() -> arguments.Parser:
    parser = arguments.Parser("trials.py", "A study: searches, selection, retraining and a leaderboard.")
    parser.add_argument("stage", choices=("run", *STAGE_FLAGS, "report"), help="run is all of them in this order")
    add_study_flags(parser)
    add_proxy_flags(parser)
    add_search_flags(parser)
    add_run_flags(parser)
    return parser


def add_study_flags(parser: arguments.Parser) -> None:
    """Adds the flags for the study's directory, its corpus and the options of every training."""
    study = parser.add_argument_group("study")
    study.add_argument("--study", metavar="DIR", help="its directory (default: runs/study-YYYYMMDD-HHMMSS)")
    study.add_argument(
        "--resume",
        action="store_true",
        help="continue a stage that has begun; flags of stages that have not begun may be given again",
    )
    study.add_argument("--dry_run", action="store_true", help="print what the study would run and cost, and stop")
    study.add_argument("--data", default="penn", metavar="NAME|DIR", help="the text, as of train.py")
    study.add_argument("--seed", type=int, default=1, help="of the first trial of each kind; the others count on")
    study.add_argument(
        "--train_flags", default="", metavar="FLAGS", help="of train.py, for every training of a cell, in quotes"
    )


def add_proxy_flags(parser: arguments.Parser) -> None:
    """Adds the flags of the baseline and proxy stages.

    The baseline stage trains reference cells in full. The proxy stage tests which short trainings rank cells as the
    full training does.
    """
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


def add_search_flags(parser: arguments.Parser) -> None:
    """Adds the flags of the stages that search for cells, select among them and retrain the best in full."""
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


def add_run_flags(parser: arguments.Parser) -> None:
    """Adds the flags that set how trials share a machine or a cluster, and when a stage ends early."""
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


def requested_stages(args: Namespace) -> list[str]:
    """Returns the stages to run, in their order; the list is empty if only a report is requested."""
    return [stage for stage in STAGE_FLAGS if args.stage in ("run", stage)]
