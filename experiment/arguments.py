"""Defines the flags that both scripts have; validate_arguments.py checks their values."""

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
    """Appends the default to the help of each flag, except for None and False, which the help text explains."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser that prints one line for each fault, and all defaults in its help."""

    def __init__(self, prog: str, description: str):
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            formatter_class=HelpFormatter,
        )

        self.quiet = False  # True on all ranks but the main one

    def error(self, message: str) -> NoReturn:
        self.refuse([f"{message} (see --help)"])

    def refuse(self, faults: list[str]) -> NoReturn:
        """Ends the script with exit code 2 and one line for each fault."""
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
    """Adds the flags that searching and retraining share; the arguments are the defaults in which they differ."""
    add_text_flags(parser, batch_size, bptt_std)
    add_model_flags(parser, size)
    add_regularisation_flags(parser, dropoute, wdecay)
    add_optimisation_flags(parser, epochs, optimizers)
    add_schedule_flags(parser)
    add_speed_flags(parser)
    add_run_flags(parser, seed, log_interval)


def add_text_flags(parser: Parser, batch_size: int, bptt_std: float) -> None:
    """Adds the flags of the text and of its batches."""
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
        help="number of tokens to read from the start of train.txt, with the vocabulary of the whole text; 0 for all",
    )
    text.add_argument(
        "--batch_size", type=int, default=batch_size, help="batch size: number of columns that the text is cut into"
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
        help="standard deviation of the segment length, with mean bptt or its half and minimum 5; 0 for none",
    )
    text.add_argument(
        "--max_seq_len_delta",
        type=int,
        default=20,
        help="with --bptt_std, the largest length of a segment above bptt",
    )


def add_model_flags(parser: Parser, size: int) -> None:
    """Adds the flags of sizes and initial weights."""
    model = parser.add_argument_group("model")
    model.add_argument("--emsize", type=int, default=size, help="size of the word embeddings")
    model.add_argument(
        "--nhid",
        type=int,
        help="hidden units of the cell; equals emsize, since the decoder shares the embedding matrix (default: emsize)",
    )
    model.add_argument(
        "--nhidlast",
        type=int,
        help="hidden units of the last layer; equals emsize (default: emsize)",
    )

    model.add_argument(
        "--init_range",
        type=float,
        help="initial weights are uniform in [-init_range, init_range] (default: 0.04 * sqrt(850 / emsize), which is "
        "the published 0.04 at the published size of retraining; LSTM and GRU have torch's own)",
    )


def add_regularisation_flags(parser: Parser, dropoute: float, wdecay: float) -> None:
    """Adds the flags of dropout, activation regularisation and weight decay."""
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
        help="coefficient of activation regularisation (AR), the mean square of the output after dropout",
    )
    regularisation.add_argument(
        "--beta",
        type=float,
        default=1e-3,
        help="coefficient of temporal activation regularisation (TAR), the mean squared change of the hidden state",
    )
    regularisation.add_argument("--wdecay", type=float, default=wdecay, help="weight decay of the weights")


def add_optimisation_flags(parser: Parser, epochs: int, optimizers: Sequence[str]) -> None:
    """Adds the flags of the optimizer of the weights and of the length of the run."""
    optimisation = parser.add_argument_group("optimisation of the weights")
    optimisation.add_argument(
        "--optimizer",
        choices=optimizers,
        default=optimizers[0],
        help="asgd is SGD that averages the weights from its first step on; ntasgd (retraining only) starts when the "
        "validation loss has stopped falling; momentum is SGD with momentum",
    )
    optimisation.add_argument(
        "--lr",
        type=float,
        help="learning rate for a segment of bptt time steps; proportional to the segment's length (default: "
        f"{DEFAULT_LR['sgd']:g}, {DEFAULT_LR['momentum']:g} with momentum, {DEFAULT_LR['adam']:g} with adam and adamw)",
    )
    optimisation.add_argument("--momentum", type=float, default=0.9, help="momentum of --optimizer momentum")
    optimisation.add_argument(
        "--clip",
        type=float,
        help=f"largest norm of the gradient, 0 for none (default: {CLIP:g}, or none with --clip_value)",
    )
    optimisation.add_argument(
        "--clip_value",
        type=float,
        default=0.0,
        help="largest absolute value of an element of the gradient, applied before --clip; 0 for none",
    )
    optimisation.add_argument("--epochs", type=int, default=epochs, help="passes over the training text")
    optimisation.add_argument(
        "--patience",
        type=int,
        default=0,
        help="stop after this many epochs without a lower validation loss, and keep the best weights; 0 for never",
    )
    optimisation.add_argument(
        "--min_delta",
        type=float,
        default=0.0,
        help="with --patience, the least decrease of the loss (nats) that counts",
    )


def add_schedule_flags(parser: Parser) -> None:
    """Adds the flags of the learning rate schedule."""
    schedule = parser.add_argument_group("schedule of the learning rate")
    schedule.add_argument(
        "--warmup", type=int, default=WarmUp().steps, help="number of steps in which the rate rises to --lr"
    )
    schedule.add_argument("--warmup_shape", choices=SHAPES, default=WarmUp().shape, help="shape of the rise")
    schedule.add_argument(
        "--warmup_start", type=float, default=WarmUp().start, help="rate at the first step, relative to --lr"
    )
    schedule.add_argument(
        "--schedule",
        choices=DECAYS,
        default=Decay().name,
        help="decay after the warm-up, until the end of --epochs (another --epochs of a resumed run changes the decay)",
    )
    schedule.add_argument(
        "--step_size", type=float, default=Decay().step_size, help="step: epochs between two decreases"
    )
    schedule.add_argument(
        "--gamma",
        type=float,
        default=Decay().gamma,
        help="step, plateau: factor of the rate at a decrease; exponential: factor per epoch, applied continuously",
    )
    schedule.add_argument("--final_lr", type=float, default=Decay().final, help="cosine, polynomial: rate at the end")
    schedule.add_argument("--power", type=float, default=Decay().power, help="polynomial: exponent")
    schedule.add_argument(
        "--cycle",
        type=int,
        default=Decay().cycle,
        help="cosine, polynomial: number of epochs after which the rate restarts at --lr; 0 for no restart",
    )
    schedule.add_argument(
        "--plateau_patience",
        type=int,
        default=Decay().patience,
        help="plateau: decrease after more than this many epochs without a lower validation loss",
    )


def add_speed_flags(parser: Parser) -> None:
    """Adds the flags of engine and precision."""
    speed = parser.add_argument_group("speed")
    speed.add_argument(
        "--engine",
        choices=ENGINES,
        default="fused",
        help="fused is compiled at the first steps (cached); eager is the readable definition; equal up to rounding",
    )
    speed.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="precision of matrix products: fp32, tf32 (CUDA) or bf16 (fused), which also halves the memory; sums, "
        "normalisation, softmax, the optimizer and --hessian finite stay in fp32",
    )


def add_run_flags(parser: Parser, seed: int, log_interval: int) -> None:
    """Adds the flags of the run directory, checkpoints, device and seed."""
    run = parser.add_argument_group("run")
    run.add_argument("--save", metavar="DIR", help="run directory (default: runs/KIND-YYYYMMDD-HHMMSS)")
    run.add_argument(
        "--resume",
        action="store_true",
        help="resume the run in --save with its own flags; only --epochs, --log_interval, --checkpoint_minutes, "
        "--test, --device, --diagnose_every, --tensorboard and the path of the same --data may be given again",
    )
    run.add_argument(
        "--checkpoint_minutes",
        type=float,
        default=10.0,
        help="longest time between two checkpoints; each epoch ends with one too",
    )
    run.add_argument("--device", default="auto", help="auto (CUDA if available), cpu, cuda or cuda:N")
    run.add_argument(
        "--deterministic",
        action="store_true",
        help="on CUDA, use only deterministic algorithms, which are slower; on a CPU all are",
    )
    run.add_argument(
        "--seed",
        type=int,
        default=seed,
        help="seed of the weights, the dropout masks and the segment lengths",
    )
    run.add_argument(
        "--overfit",
        action="store_true",
        help="only check that the model overfits one batch (perplexity below 1.5), without dropout, regularisation "
        "and schedule; exit code 1 if it does not",
    )
    run.add_argument(
        "--test",
        choices=("read", "skip"),
        default="read",
        help="skip does not read the test text at the end; resuming the finished run with read does, so that of many "
        "runs only the selected one is measured on it",
    )
    run.add_argument(
        "--tensorboard",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="also write metrics for TensorBoard, to tensorboard/ in the run directory: scalars, flags and the cell of "
        "a search (needs: pip install tensorboard matplotlib)",
    )
    run.add_argument("--log_interval", type=int, default=log_interval, help="steps between two log lines")


def complete(args: argparse.Namespace, kind: str) -> None:
    """Sets the flags whose defaults depend on others, and names a run directory for a new run of this kind."""
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
    """Returns the learning rate schedule that the flags describe."""
    warm_up = WarmUp(args.warmup, args.warmup_shape, args.warmup_start)
    decay = Decay(
        args.schedule, args.step_size, args.gamma, args.final_lr, args.power, args.cycle, args.plateau_patience
    )
    return Schedule(args.lr, args.epochs, warm_up, decay)
