"""Defines the flags of evaluate.py and checks their values."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from experiment import arguments
from experiment.validate_arguments import broken, device_faults, idle_faults, number_faults
from training.dynamic_evaluation import RULES
from training.neural_cache import Mix

# Flags of the published test.py that describe the model or its training; a checkpoint of this project has them.
LIKE_TRAINING = (
    "emsize nhid nhidlast lr clip epochs batch_size bptt dropout dropouth dropouti dropoute seed nonmono log_interval"
    " save alpha beta wdecay continue_train n_experts max_seq_len_delta"
).split()
# The settings were chosen on Penn Treebank (docs/evaluation.md); --tune tries these multiples of those that are given.
DYNAMIC = {"sgd": (0.3, 0.005), "rms": (1e-4, 0.02)}  # by rule: learning rate, decay
LR_FACTORS, DECAY_FACTORS = (0.3, 1.0, 3.0), (0.0, 1.0, 5.0)
MIX = Mix(theta=0.8, share=0.1)
THETA_FACTORS, SHARE_FACTORS = (0.25, 0.6, 1.0, 1.5, 2.25, 3.0), (0.5, 1.0, 1.5, 2.0)
MAX_SHARE = 0.95  # --tune tries no larger share of the cache, since at 1 the model would have none.
FEWEST_TOKENS = 100
TUNE_TOKENS = 10_000  # A pass over these takes a minute at H 256 on a core.


def build_parser() -> arguments.Parser:
    """Returns the parser of evaluate.py."""
    parser = arguments.Parser(
        "evaluate.py", "Perplexity of a checkpoint on a split of a corpus, or of the lines of a file."
    )
    for name in LIKE_TRAINING:
        parser.elsewhere[name] = "the checkpoint has it; leave it out"
    add_model_flags(parser)
    parser.add_flags("text", [
        ("data", "NAME|DIR", None, "penn, wikitext-2, builtin or a folder; words that the checkpoint does not know "
         "count as <unk> (default: what it was trained on; for a model of the published code, whose words are "
         "train.txt's, penn)"),
        ("split", ("valid", "test"), "test", "the split of the corpus to evaluate on"),
        ("text", "FILE", None, "score each line of FILE instead (- for standard input); the hidden state is carried "
         "from line to line, and the first word of all, which nothing precedes, is not predicted"),
        ("fresh", bool, False, "begin each line of --text anew, as after a line's end, and predict its first word too"),
        ("json", bool, False, "print a JSON object for each line of --text instead of a table, with each token's "
         "log-probability"),
    ])  # fmt: skip
    parser.add_flags("dynamic evaluation: the model learns from each segment after it has predicted it", [
        ("dynamic", RULES, None, "rule of the update; rms reads train first, for the size of each weight's gradient"),
        ("dynamic_lr", float, None,
         f"learning rate (default: {DYNAMIC['sgd'][0]} for sgd, {DYNAMIC['rms'][0]} for rms)"),
        ("dynamic_decay", float, None, "share of the distance to the trained weights that each update takes back "
         f"(default: {DYNAMIC['sgd'][1]} for sgd, {DYNAMIC['rms'][1]} for rms)"),
        ("dynamic_bptt", int, 5, "time steps of a segment, and of those of train that rms reads"),
    ])  # fmt: skip
    parser.add_flags("neural cache: words that followed similar states become likely again", [
        ("cache_size", int, 0, "how many of the last words are remembered, each with the state before it; 0 for no "
         "cache"),
        ("cache_theta", float, MIX.theta, "0 weighs all remembered words alike, a larger value favours those that "
         "followed the most similar states"),
        ("cache_lambda", float, MIX.share, "share of the cache in the mixture with the model"),
    ])  # fmt: skip
    parser.add_flags("choosing the flags of dynamic evaluation and of the cache", [
        ("tune", bool, False, "choose rate, decay, theta and lambda on valid.txt first, by a grid of multiples of the "
         "flags: nine passes for --dynamic, one for a cache alone"),
        ("tune_tokens", int, TUNE_TOKENS, "tokens of valid.txt that a pass of --tune reads, 0 for all"),
    ])  # fmt: skip
    return parser


def add_model_flags(parser: arguments.Parser) -> None:
    """Adds the flags that name a trained model and the device on which it runs."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT",
        help="best.pt or last.pt of a run of train.py or train_search.py, or a model.pt of the published code, which is"
        " read without running what it contains",
    )  # fmt: skip
    parser.add_argument(
        "--arch", help="the cell, as of train.py, of a model of the published code whose file does not name it"
    )
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is some), cpu, cuda or cuda:N")


def complete(args: Namespace) -> None:
    """Sets the defaults that depend on other flags."""
    if args.dynamic:
        lr, decay = DYNAMIC[args.dynamic]
        args.dynamic_lr = lr if args.dynamic_lr is None else args.dynamic_lr
        args.dynamic_decay = decay if args.dynamic_decay is None else args.dynamic_decay


def faults(args: Namespace, defaults: Callable[[str], Any]) -> list[str]:
    """Returns a line for each fault of the flags; `defaults` returns the default of the flag with a name."""
    rules = [
        (args.text is not None and args.split != defaults("split"),
         f"--split {args.split}: has no effect with --text; leave it out"),
        (args.fresh and (args.dynamic or args.cache_size),
         "--fresh: begins each line anew, so that nothing is learned or kept from the lines before; leave it out, or"
         " --dynamic and --cache_size"),
        (0 < args.tune_tokens < FEWEST_TOKENS,
         f"--tune_tokens {args.tune_tokens}: too few to choose by; take at least {FEWEST_TOKENS}, or 0 for all"),
    ]  # fmt: skip
    return [*device_faults(args.device), *number_faults(args), *idle_faults(args, defaults), *broken(rules)]
