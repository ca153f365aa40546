"""Defines the parser of all scripts and the flags that train_search.py and train.py share (validate_arguments.py checks
their values)."""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from data import absolute_name
from engine import ENGINES, PRECISIONS
from experiment.run_directory import new_folder
from model import default_init_range
from training.lr_schedule import DECAYS, SHAPES, Decay, Schedule, WarmUp
from training.optimizers import DEFAULT_LR

CLIP = 0.25
ARCH_START = 2  # epochs of the weights alone (docs/signal.md)
# Maps flags of the published code, and of ports of it, to what takes their place here (docs/from-darts.md).
FLAGS_ELSEWHERE = {
    "cuda": "it turns CUDA off in the published code; use --device cpu",
    "gpu": "use --device cuda:N",
    "single_gpu": "it spreads a batch over all GPUs in the published code; use torchrun (docs/distributed.md)",
    "continue_train": "use --resume",
    "model_path": "name the file alone, without a flag, to evaluate.py",
    **dict.fromkeys(("learning_rate", "w_lr"), "use --lr"),
    **dict.fromkeys(("weight_decay", "w_weight_decay"), "use --wdecay"),
    **dict.fromkeys(("grad_clip", "w_grad_clip"), "use --clip"),
    **dict.fromkeys(("w_momentum",), "use --optimizer momentum --momentum"),
    **dict.fromkeys(("arch_learning_rate", "alpha_lr"), "use --arch_lr"),
    **dict.fromkeys(("arch_weight_decay", "alpha_weight_decay"), "use --arch_wdecay"),
    **dict.fromkeys(("report_freq", "print_freq"), "use --log_interval"),
    "nonmono": "a search never switches to averaging; leave it out",
    "arch": "a search finds the cell; use train.py --arch",
    **dict.fromkeys(("unrolled", "arch_lr", "arch_wdecay"), "it is for train_search.py"),
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends the default to the help of each flag, except for None, False and empty ones."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        without = action.default is False or action.default in (None, "", [])
        return action.help if without else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser that prints one line for each fault, and all defaults in its help."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=HelpFormatter)
        self.quiet = False  # True on all ranks but the main one
        self.elsewhere = dict(FLAGS_ELSEWHERE)
        self.argv: Sequence[str] = ()  # the command line that is parsed

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        self.argv = sys.argv[1:] if args is None else args
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        unknown = message.startswith(("unrecognized arguments", "the following arguments are required"))
        self.refuse((unknown and self.unknown_flags()) or [f"{message} (see --help)"])

    def unknown_flags(self) -> list[str]:
        """Returns a fault for each flag of the command line that this parser lacks, with the one to use instead."""
        given = [word.split("=")[0] for word in self.argv if re.match("--[A-Za-z]", word)]
        unknown = [flag for flag in given if flag not in self._option_string_actions]
        return [f"{flag}: no such flag; {self.instead(flag)}" for flag in unknown]

    def instead(self, flag: str) -> str:
        """Returns what to use in the place of a flag that this parser lacks."""
        flags, name = self._option_string_actions, flag[2:].lower().replace("-", "_")
        if f"--{name}" in flags:
            return f"use --{name}"
        advice = self.elsewhere.get(name, "")
        if advice and (not advice.startswith("use --") or advice.split()[1] in flags):
            return advice
        near = difflib.get_close_matches(f"--{name}", flags, n=1, cutoff=0.8)
        return f"did you mean {near[0]}?" if near else "see --help"

    def refuse(self, faults: list[str]) -> NoReturn:
        """Ends the script with exit code 2 and one line for each fault."""
        for fault in [] if self.quiet else faults:
            print(f"{self.prog}: error: {' '.join(fault.split())}", file=sys.stderr)
        sys.exit(2)

    def add_flags(self, title: str, flags: Sequence[tuple[str, Any, Any, str]]) -> None:
        """Adds a group of flags, each given by its name, kind, default (None if `complete` sets it) and help.

        The kind is int, float, bool (a flag without a value, False by default), BooleanOptionalAction (which has a
        --no-NAME too), the permitted values, or for any other text the word that stands for it in the help.
        """
        group = self.add_argument_group(title)
        for name, kind, default, text in flags:
            if kind is bool:
                options = {"action": "store_true"}
            elif kind is argparse.BooleanOptionalAction:
                options = {"action": kind}
            elif kind in (int, float):
                options = {"type": kind}
            else:
                options = {"metavar" if isinstance(kind, str) else "choices": kind}
            group.add_argument(f"--{name}", default=default, help=text, **options)


def add_shared_flags(
    parser: Parser, *, size: int, batch_size: int, epochs: int, dropoute: float, wdecay: float, bptt_std: float,
    seed: int, log_interval: int, optimizers: Sequence[str],
) -> None:  # fmt: skip
    """Adds the flags that searching and retraining share; the arguments are the defaults in which they differ."""
    add_model_flags(parser, batch_size, bptt_std, size, dropoute, wdecay)
    add_optimisation_flags(parser, epochs, optimizers)
    add_run_flags(parser, seed, log_interval)


def add_model_flags(
    parser: Parser, batch_size: int, bptt_std: float, size: int, dropoute: float, wdecay: float
) -> None:
    """Adds the flags of the text and its batches, of sizes and initial weights, and of regularisation."""
    parser.add_flags("text", [
        ("data", "NAME|DIR", "penn", "penn or wikitext-2 (downloaded to corpora/ when missing), builtin (no network), "
         "or a folder with train.txt, valid.txt and test.txt"),
        ("min_count", int, 0,
         "words that occur less often in train.txt become <unk>; 0 for 3 with --data builtin, else for every word"),
        ("vocab_size", int, 0, "number of word types, <eos> and <unk> included: the most frequent words of train.txt; "
         "the others become <unk>; 0 for all"),
        ("limit_tokens", int, 0,
         "number of tokens to read from the start of train.txt, with the vocabulary of the whole text; 0 for all"),
        ("batch_size", int, batch_size, "batch size: number of columns that the text is cut into"),
        ("small_batch_size", int, None, "batch elements per forward pass; gradients are summed over the batch, so that "
         "less memory is needed (default: batch_size)"),
        ("bptt", int, 35, "time steps per segment (halved with probability 0.05)"),
        ("bptt_std", float, bptt_std,
         "standard deviation of the segment length, with mean bptt or its half and minimum 5 (or bptt +"
         " max_seq_len_delta, if that is less); 0 for none"),
        ("max_seq_len_delta", int, 20, "with --bptt_std, the largest length of a segment above bptt"),
    ])  # fmt: skip
    parser.add_flags("model", [
        ("emsize", int, size, "size of the word embeddings"),
        ("nhid", int, None, "hidden units of the cell; equals emsize, since the decoder shares the embedding matrix "
         "(default: emsize)"),
        ("nhidlast", int, None, "hidden units of the last layer; equals emsize (default: emsize)"),
        ("init_range", float, None, "initial weights are uniform in [-init_range, init_range] (default: 0.04 * sqrt(850"
         " / emsize), which is the published 0.04 at the published size of retraining; LSTM and GRU have torch's own)"),
    ])  # fmt: skip
    parser.add_flags("regularisation", [
        ("dropout", float, 0.75, "dropout of the cell's output"),
        ("dropouth", float, 0.25, "dropout of the hidden state inside the cell's products"),
        ("dropoutx", float, 0.75, "dropout of the input inside the cell's product"),
        ("dropouti", float, 0.2, "dropout of the word embeddings, element by element"),
        ("dropoute", float, dropoute, "dropout of whole word types in the embedding"),
        ("alpha", float, 0.0,
         "coefficient of activation regularisation (AR), the mean square of the output after dropout"),
        ("beta", float, 1e-3,
         "coefficient of temporal activation regularisation (TAR), the mean squared change of the hidden state"),
        ("wdecay", float, wdecay, "weight decay of the weights"),
    ])  # fmt: skip


def add_optimisation_flags(parser: Parser, epochs: int, optimizers: Sequence[str]) -> None:
    """Adds the flags of the optimizer of the weights, the length of the run and the learning rate schedule."""
    parser.add_flags("optimisation of the weights", [
        ("optimizer", optimizers, optimizers[0], "asgd is SGD that averages the weights from its first step on; ntasgd "
         "(retraining only) starts when the validation loss has stopped falling; momentum is SGD with momentum"),
        ("lr", float, None, "learning rate for a segment of bptt time steps; proportional to the segment's length "
         f"(default: {DEFAULT_LR['sgd']:g}, {DEFAULT_LR['momentum']:g} with momentum, {DEFAULT_LR['adam']:g} with adam "
         "and adamw)"),
        ("momentum", float, 0.9, "momentum of --optimizer momentum"),
        ("clip", float, None,
         f"largest norm of the gradient, 0 for none (default: {CLIP:g}, or none with --clip_value)"),
        ("clip_value", float, 0.0,
         "largest absolute value of an element of the gradient, applied before --clip; 0 for none"),
        ("epochs", int, epochs, "passes over the training text"),
        ("patience", int, 0,
         "stop after this many epochs without a lower validation loss, and keep the best weights; 0 for never"),
        ("min_delta", float, 0.0, "with --patience, the least decrease of the loss (nats) that counts"),
    ])  # fmt: skip
    warm_up, decay = WarmUp(), Decay()
    parser.add_flags("schedule of the learning rate", [
        ("warmup", int, warm_up.steps, "number of steps in which the rate rises to --lr"),
        ("warmup_shape", SHAPES, warm_up.shape, "shape of the rise"),
        ("warmup_start", float, warm_up.start, "rate at the first step, relative to --lr"),
        ("schedule", DECAYS, decay.name, "decay after the warm-up, until the end of --epochs (another --epochs of a "
         "resumed run changes the decay)"),
        ("step_size", float, decay.step_size, "step: epochs between two decreases"),
        ("gamma", float, decay.gamma, "step, plateau: factor of the rate at a decrease; exponential: factor per epoch, "
         "applied continuously"),
        ("final_lr", float, decay.final, "cosine, polynomial: rate at the end"),
        ("power", float, decay.power, "polynomial: exponent"),
        ("cycle", int, decay.cycle,
         "cosine, polynomial: number of epochs after which the rate restarts at --lr; 0 for no restart"),
        ("plateau_patience", int, decay.patience,
         "plateau: decrease after more than this many epochs without a lower validation loss"),
    ])  # fmt: skip


def add_run_flags(parser: Parser, seed: int, log_interval: int) -> None:
    """Adds the flags of engine and precision, and of the run directory, checkpoints, device and seed."""
    parser.add_flags("speed", [
        ("engine", ENGINES, "fused",
         "fused is compiled at the first steps (cached), or runs uncompiled where that fails; eager is the readable "
         "definition; equal up to rounding"),
        ("precision", PRECISIONS, "fp32", "precision of matrix products: fp32, tf32 (CUDA) or bf16 (fused), in which "
         "what is saved for backward is stored too; sums, normalisation, softmax, the optimizer and --hessian finite "
         "stay in fp32, and on a CPU a narrow cell, or all if bf16 is not fast there"),
    ])  # fmt: skip
    parser.add_flags("run", [
        ("save", "DIR", None, "run directory (default: runs/KIND-YYYYMMDD-HHMMSS)"),
        ("resume", bool, False, "resume the run in --save with its own flags; only --epochs, --log_interval, "
         "--checkpoint_minutes, --test, --device, --engine, --diagnose_every, --tensorboard and the path of the same "
         "--data may be given again"),
        ("checkpoint_minutes", float, 10.0, "longest time between two checkpoints; each epoch ends with one too"),
        ("device", "DEVICE", "auto", "auto (CUDA if available), cpu, cuda or cuda:N"),
        ("deterministic", bool, False,
         "on CUDA, use only deterministic algorithms, which are slower; on a CPU all are"),
        ("seed", int, seed, "seed of the weights, the dropout masks and the segment lengths"),
        ("overfit", bool, False, "only check that the model overfits one batch (perplexity below 1.5), without dropout,"
         " AR, TAR and schedule; exit code 1 if it does not"),
        ("test", ("read", "skip"), "read", "skip does not read the test text at the end; resuming the finished run with"
         " read does, so that of many runs only the selected one is measured on it"),
        ("tensorboard", argparse.BooleanOptionalAction, False, "also write metrics for TensorBoard, to tensorboard/ in "
         "the run directory: scalars, flags and the cell of a search (needs: pip install tensorboard matplotlib)"),
        ("log_interval", int, log_interval, "steps between two log lines"),
    ])  # fmt: skip


def complete(args: argparse.Namespace, kind: str) -> None:
    """Sets the flags whose defaults depend on others, and names a run directory for a new run of this kind."""
    if args.save is None:
        args.save = str(new_folder(kind))
    args.data = absolute_name(args.data)
    if args.init_range is None and args.emsize >= 1:
        args.init_range = default_init_range(args.emsize)
    defaults = {
        "lr": DEFAULT_LR[args.optimizer], "clip": 0.0 if args.clip_value else CLIP, "finetune": "", "arch": "DARTS",
        "arch_start": max(0, min(ARCH_START, args.epochs - 1)), "arch_batch_size": args.batch_size,
        "nhid": args.emsize, "nhidlast": args.emsize, "small_batch_size": args.batch_size,
    }  # fmt: skip
    for name, value in defaults.items():
        # The published code has -1 as the default of the last two.
        is_default = (None, -1) if name in ("nhidlast", "small_batch_size") else (None,)
        if name in vars(args) and getattr(args, name) in is_default:
            setattr(args, name, value)


def schedule(args: argparse.Namespace) -> Schedule:
    """Returns the learning rate schedule that the flags describe."""
    warm_up = WarmUp(args.warmup, args.warmup_shape, args.warmup_start)
    decay = Decay(
        args.schedule, args.step_size, args.gamma, args.final_lr, args.power, args.cycle, args.plateau_patience
    )
    return Schedule(args.lr, args.epochs, warm_up, decay)
