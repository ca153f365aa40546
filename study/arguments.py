"""Defines the command-line flags of a study (trials.py) and the stages that each flag shapes."""

from argparse import Namespace

from experiment import arguments
from study.design import METHODS, RANDOM

# These flags decide what a stage runs, so they must not change once the stage has begun.
STAGE_FLAGS = {
    "baseline": "data seed train_flags baselines full_epochs full_seeds",
    "proxy": "data seed train_flags full_epochs proxy_cells proxy_epochs proxy_flags proxy_reference proxy_seeds",
    "search": "data seed methods seeds search_epochs search_flags search_split",
    "select": "data seed train_flags methods random_cells select_epochs select_seeds select_flags halving",
    "retrain": "data seed train_flags top full_epochs full_seeds",
}


def build_parser() -> arguments.Parser:
    """Returns the parser of trials.py."""
    parser = arguments.Parser("trials.py", "A study: searches, selection, retraining and a leaderboard.")
    parser.add_argument("stage", choices=("run", *STAGE_FLAGS, "report"), help="run is all of them in this order")

    add = parser.add_argument_group("study").add_argument
    add("--study", metavar="DIR", help="its directory (default: runs/study-YYYYMMDD-HHMMSS)")
    add("--resume", action="store_true",
        help="continue a stage that has begun; flags of stages that have not begun may be given again")  # fmt: skip
    add("--dry_run", action="store_true", help="print what the study would run and cost, and stop")
    add("--data", default="penn", metavar="NAME|DIR", help="the text, as of train.py")
    add("--seed", type=int, default=1, help="seed of the first trial of each kind; each further trial adds 1")
    add("--train_flags", default="", metavar="FLAGS", help="flags of train.py for every training of a cell, in quotes")

    add_stage_flags(parser)

    add = parser.add_argument_group("run").add_argument
    add("--parallel", type=int, default=0, help="trials at a time; 0: as many as fit")
    add("--cpus_per_trial", type=float, default=1, help="processor cores, and threads, of one trial")
    add("--gpus_per_trial", type=float,
        help="GPUs of one trial; 0.25 puts four trials on one GPU, 0 is for processors alone (default: 1 where there "
        "are GPUs, else 0)")  # fmt: skip
    add("--address", metavar="HOST:PORT", help="address of a Ray cluster to join (default: this machine alone)")
    add("--retries", type=int, default=3, help="how often a trial whose process died is started again")
    add("--budget_hours", type=float, default=0, help="device time after which no more is run; 0: any")
    add("--converged", type=int, default=0, metavar="M",
        help="end a selection when M trials brought nothing better and spread less than the M before; "
        "0: never")  # fmt: skip
    return parser


def add_stage_flags(parser: arguments.Parser) -> None:
    """Adds the flags of each stage, in the order in which the stages run."""
    add = parser.add_argument_group("baseline: the yardstick, trained in full").add_argument
    add("--baselines", nargs="+", default=["DARTS", "LSTM"], metavar="ARCH", help="cells")
    add("--full_epochs", type=int, default=3600, help="epochs of a training in full")
    add("--full_seeds", type=int, default=1, help="full trainings of each cell")

    add = parser.add_argument_group("proxy: which short training ranks cells as long training does").add_argument
    cells = ["DARTS_V1", "DARTS_V2", "ENAS", *(f"random:{i}" for i in range(1000, 1005))]
    add("--proxy_cells", nargs="+", default=cells, metavar="ARCH", help="cells to rank")
    add("--proxy_epochs", nargs="+", type=int, default=[50, 100, 300], metavar="N",
        help="lengths of the short trainings, in epochs")  # fmt: skip
    add("--proxy_flags", nargs="*", default=[], metavar="FLAGS",
        help="other settings to try beside --train_flags, each in quotes, such as '--emsize 300'; one with --epochs "
        "has this length alone, the others each of --proxy_epochs")  # fmt: skip
    add("--proxy_reference", type=int, default=0, metavar="N",
        help="epochs of the long training; 0: --full_epochs")  # fmt: skip
    add("--proxy_seeds", type=int, default=2, help="trainings of each cell")

    add = parser.add_argument_group("search: cells, by each method").add_argument
    add("--methods", nargs="+", default=[*METHODS, RANDOM], metavar="NAME[=FLAGS]",
        help="how cells are found: first, unrolled, random, or a name of your own with flags of train_search.py, such "
        "as 'layer=--norm layer'")  # fmt: skip
    add("--seeds", type=int, default=4, help="searches by each method")
    add("--random_cells", type=int, default=0, help="number of random cells; 0: as many as were found")
    add("--search_epochs", type=int, default=50, help="epochs of a search")
    add("--search_flags", default="", metavar="FLAGS", help="flags of train_search.py for every search, in quotes")
    add("--search_split", choices=("train", "valid"), default="train",
        help="text for the alphas: train keeps valid.txt, by which cells are selected, unseen; "
        "valid is as published")  # fmt: skip

    add = parser.add_argument_group("select: a short training of every cell, under one budget").add_argument
    add("--select_epochs", type=int, default=300, help="epochs of a short training")
    add("--select_seeds", type=int, default=1, help="short trainings of each cell")
    add("--select_flags", default="", metavar="FLAGS", help="further flags of train.py, such as a smaller --emsize")
    add("--halving", action="store_true",
        help="end the trainings that fall behind (successive halving, ASHA); "
        "methods are then not compared")  # fmt: skip

    add = parser.add_argument_group("retrain: the best in full").add_argument
    add("--top", type=int, default=1, metavar="K", help="how many cells")


def requested_stages(args: Namespace) -> list[str]:
    """Returns the stages to run, in their order; the list is empty if only a report is requested."""
    return [stage for stage in STAGE_FLAGS if args.stage in ("run", stage)]
