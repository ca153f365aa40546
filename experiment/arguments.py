"""The flags of the two scripts. `validate_arguments.py` says which of them cannot be used."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from engine import ENGINES, PRECISIONS
from experiment.run_directory import new_folder
from model import default_init_range
from training.lr_schedule import DECAYS, SHAPES, Decay, Schedule, WarmUp
from training.optimizers import DEFAULT_LR

CLIP = 0.25
ARCH_START = 2  # epochs of the weights alone (docs/signal.md)


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

        self.quiet = False  # on all ranks but one

    def error(self, message: str) -> NoReturn:
        self.refuse([f"{message} (see --help)"])

    def refuse(self, faults: list[str]) -> NoReturn:
        """End with exit code 2 and a line for each fault."""
        for fault in [] if self.quiet else faults:
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
    optimizers: Sequence[str],
) -> None:
    """The flags that searching and retraining have in common, with the defaults in which they differ."""
    add_text_flags(parser, batch_size, bptt_std)
    add_model_flags(parser, size)
    add_regularisation_flags(parser, dropoute, wdecay)
    add_optimisation_flags(parser, epochs, optimizers)
    add_schedule_flags(parser)
    add_speed_flags(parser)
    add_run_flags(parser, seed, log_interval)


def add_text_flags(parser: Parser, batch_size: int, bptt_std: float) -> None:
    """Which text is read, and how it is cut into batches."""
    text = parser.add_argument_group("text")
    text.add_argument(
        "--data",
        default="penn",
        metavar="NAME|DIR",
        help="penn or wikitext-2 (downloaded to corpora/ when missing), builtin (no network), or a "
        "folder with train.txt, valid.txt and test.txt",
    )
    text.add_argument(
        "--limit_tokens",
        type=int,
        default=0,
        help="read only so many tokens from the start of the training text, with the whole one's vocabulary; 0 for all",
    )
    text.add_argument(
        "--batch_size", type=int, default=batch_size, help="batch size B: so many columns of the text are read at once"
    )
    text.add_argument(
        "--small_batch_size",
        type=int,
        help="batch elements per forward pass; gradients are summed over the batch, so that less memory is "
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


def add_model_flags(parser: Parser, size: int) -> None:
    """Sizes and initial weights."""
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

    model.add_argument(
        "--init_range",
        type=float,
        help="initial weights are uniform between minus this and this (default: 0.04 * sqrt(850 / emsize), which is "
        "the published 0.04 at the published size of retraining; torch's own LSTM and GRU keep theirs)",
    )


def add_regularisation_flags(parser: Parser, dropoute: float, wdecay: float) -> None:
    """Dropout, activation regularisation and weight decay."""
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


def add_optimisation_flags(parser: Parser, epochs: int, optimizers: Sequence[str]) -> None:
    """What moves the weights, and for how long."""
    optimisation = parser.add_argument_group("optimisation of the weights")
    optimisation.add_argument(
        "--optimizer",
        choices=optimizers,
        default=optimizers[0],
        help="asgd is SGD that averages from its first step on, ntasgd (in retraining) once the validation loss has "
        "stopped falling; momentum is SGD with it",
    )
    optimisation.add_argument(
        "--lr",
        type=float,
        help="learning rate for a segment of bptt steps; scaled with the segment's length (default: "
        f"{DEFAULT_LR['sgd']:g}, {DEFAULT_LR['momentum']:g} with momentum, {DEFAULT_LR['adam']:g} with adam and adamw)",
    )
    optimisation.add_argument("--momentum", type=float, default=0.9, help="of --optimizer momentum")
    optimisation.add_argument(
        "--clip",
        type=float,
        help=f"largest norm of the gradient, 0 for none (default: {CLIP:g}, or none with --clip_value)",
    )
    optimisation.add_argument(
        "--clip_value", type=float, default=0.0, help="largest element of the gradient, before its norm; 0 for none"
    )
    optimisation.add_argument("--epochs", type=int, default=epochs, help="passes over the training text")
    optimisation.add_argument(
        "--patience",
        type=int,
        default=0,
        help="stop after this many epochs without a lower validation loss, and end with the best weights; 0 for never",
    )
    optimisation.add_argument(
        "--min_delta", type=float, default=0.0, help="with --patience, how much lower (nats) counts as lower"
    )


def add_schedule_flags(parser: Parser) -> None:
    """The learning rate over the run."""
    schedule = parser.add_argument_group("schedule of the learning rate")
    schedule.add_argument("--warmup", type=int, default=WarmUp().steps, help="steps in which the rate rises to --lr")
    schedule.add_argument("--warmup_shape", choices=SHAPES, default=WarmUp().shape, help="how it rises")
    schedule.add_argument("--warmup_start", type=float, default=WarmUp().start, help="what it rises from, times --lr")
    schedule.add_argument(
        "--schedule",
        choices=DECAYS,
        default=Decay().name,
        help="how it falls after the warm-up, until the end of --epochs (which, given anew to a resumed run, moves it)",
    )
    schedule.add_argument("--step_size", type=float, default=Decay().step_size, help="step: epochs between two falls")
    schedule.add_argument(
        "--gamma",
        type=float,
        default=Decay().gamma,
        help="step, plateau: the rate is multiplied by this; exponential: each epoch, evenly over its text",
    )
    schedule.add_argument("--final_lr", type=float, default=Decay().final, help="cosine, polynomial: rate at the end")
    schedule.add_argument("--power", type=float, default=Decay().power, help="polynomial: its power")
    schedule.add_argument(
        "--cycle",
        type=int,
        default=Decay().cycle,
        help="cosine, polynomial: start again from --lr every so many epochs; 0 for one descent",
    )
    schedule.add_argument(
        "--plateau_patience",
        type=int,
        default=Decay().patience,
        help="plateau: it falls after more than this many epochs without a lower validation loss",
    )


def add_speed_flags(parser: Parser) -> None:
    """Engine and precision."""
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


def add_run_flags(parser: Parser, seed: int, log_interval: int) -> None:
    """The run directory, checkpoints, device and seed."""
    run = parser.add_argument_group("run")
    run.add_argument("--save", metavar="DIR", help="run directory (default: runs/KIND-YYYYMMDD-HHMMSS)")
    run.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --save with its own flags; only --epochs, --log_interval, --checkpoint_minutes, "
        "--test, --device, --diagnose_every, --tensorboard and the path of the same --data may be given again",
    )
    run.add_argument(
        "--checkpoint_minutes",
        type=float,
        default=10.0,
        help="the longest time between two checkpoints, which are made at each epoch's end as well",
    )
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
    run.add_argument(
        "--overfit",
        action="store_true",
        help="only check that one batch can be learned by heart (perplexity below 1.5), without dropout, "
        "regularisation and schedule; exit code 1 if not",
    )
    run.add_argument(
        "--test",
        choices=("read", "skip"),
        default="read",
        help="skip leaves the test text unread at the end; it is read when the finished run is resumed with read, so "
        "that of many runs only the chosen one sees it",
    )
    run.add_argument(
        "--tensorboard",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="write what metrics.jsonl gets for TensorBoard too, into tensorboard/ of the run directory: scalars, "
        "flags and the cell of a search (needs: pip install tensorboard matplotlib)",
    )
    run.add_argument("--log_interval", type=int, default=log_interval, help="steps between two log lines")


def complete(args: argparse.Namespace, kind: str) -> None:
    """Fill in the flags whose defaults depend on others, and name a new run directory for a run of this kind."""
    if args.save is None:
        args.save = str(new_folder(kind))
    args.lr = DEFAULT_LR[args.optimizer] if args.lr is None else args.lr
    if args.clip is None:
        args.clip = 0.0 if args.clip_value else CLIP
    if "finetune" in vars(args):
        args.finetune = args.finetune or ""
    if args.init_range is None and args.emsize >= 1:
        args.init_range = default_init_range(args.emsize)
    if "arch_start" in vars(args) and args.arch_start is None:
        args.arch_start = max(0, min(ARCH_START, args.epochs - 1))
    if "arch_batch_size" in vars(args) and args.arch_batch_size is None:
        args.arch_batch_size = args.batch_size
    args.nhid = args.emsize if args.nhid is None else args.nhid
    args.nhidlast = args.emsize if args.nhidlast is None else args.nhidlast
    args.small_batch_size = args.batch_size if args.small_batch_size is None else args.small_batch_size


def schedule(args: argparse.Namespace) -> Schedule:
    """The learning rate that the flags ask for."""
    warm_up = WarmUp(args.warmup, args.warmup_shape, args.warmup_start)
    decay = Decay(
        args.schedule, args.step_size, args.gamma, args.final_lr, args.power, args.cycle, args.plateau_patience
    )
    return Schedule(args.lr, args.epochs, warm_up, decay)
