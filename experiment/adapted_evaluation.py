"""Evaluates a trained model that adapts to the text it reads: by dynamic evaluation, by a neural cache, or by both.

The text is read as one batch element, so that what is learned and kept is of one text (as several, if a relaxed model
with batch normalisation needs them).
"""

import sys
from argparse import Namespace
from itertools import product
from typing import NamedTuple

from torch import Tensor

from data import read_split
from experiment.evaluation_arguments import DECAY_FACTORS, LR_FACTORS, MAX_SHARE, SHARE_FACTORS, THETA_FACTORS
from experiment.trained_model import TrainedModel
from training.dynamic_evaluation import DynamicEvaluation, gradient_rms
from training.neural_cache import Mix, NeuralCache
from training.token_losses import token_losses
from utils import DataError, Diverged, RunError, batchify, progress_bar

STATISTICS_BATCH_SIZE = 100  # of the batches of train whose gradients `rms` averages: the default of the paper's code


class Setting(NamedTuple):
    """Holds the rate and the decay of dynamic evaluation and the mix of the cache; each is None if it is not used."""

    lr: float | None
    decay: float | None
    mix: Mix | None

    @classmethod
    def of_flags(cls, args: Namespace) -> "Setting":
        mix = Mix(args.cache_theta, args.cache_lambda) if args.cache_size else None
        return cls(args.dynamic_lr, args.dynamic_decay, mix) if args.dynamic else cls(None, None, mix)


class Adapter:
    """Predicts texts with a model that adapts to them, by the rule and sizes of the flags of evaluate.py."""

    def __init__(self, trained: TrainedModel, args: Namespace):
        """Reads the training text if the rule is `rms`. Raises `DataError` if that cannot be read."""
        self.model, self.rule, self.cache_size = trained.model, args.dynamic, args.cache_size
        self.batch_size = trained.batch_sizes["test"]
        self.bptt = args.dynamic_bptt if args.dynamic else trained.bptt
        self.rms: list[Tensor] | None = None
        if self.rule == "rms":
            ids = training_text(trained, args.data)
            text = batchify(ids, min(STATISTICS_BATCH_SIZE, len(ids) // 2))
            self.rms = gradient_rms(self.model, text.to(self.model.bias.device), self.bptt)

    def losses(self, ids: Tensor, setting: Setting, mixes: list[Mix], name: str) -> Tensor:
        """Returns the losses (1 + M, n - 1, B) of the words of a text (tokens,), in nats, by the rate and the decay of
        the setting: without the cache, and with each of the M `mixes`. Raises `RunError` if the model diverges."""
        dynamic = None
        if self.rule:
            dynamic = DynamicEvaluation(self.model.weights(), setting.lr, setting.decay, self.rms)
        cache = NeuralCache(self.cache_size, mixes) if mixes else None
        source = batchify(ids, self.batch_size).to(self.model.bias.device)  # (n, B)
        try:
            return token_losses(self.model, source, self.bptt, dynamic=dynamic, cache=cache, name=name)
        except Diverged as error:
            raise RunError(f"the model diverges with --dynamic_lr {setting.lr:g}; take a smaller one") from error

    def losses_of(self, ids: Tensor, setting: Setting, name: str) -> Tensor:
        """Returns the loss in nats of each word of a text (tokens,) but the first in each of its B columns, without the
        cache and, if the setting has one, with it: (1 or 2, n - 1, B)."""
        return self.losses(ids, setting, [setting.mix] if setting.mix else [], name)

    def tune(self, ids: Tensor, start: Setting) -> Setting:
        """Returns the setting that predicts a text (tokens,) best, of `grid(start)`; with a cache, best is said of the
        losses with the cache. All mixes are compared in one pass over the text for each rate and decay. A note on
        stderr names the flags whose chosen value is the largest or the smallest that was tried."""
        rules, mixes = grid(start)
        best, lowest = start, float("inf")
        for lr, decay in progress_bar(rules, "tuning", "pass"):
            try:
                means = self.losses(ids, Setting(lr, decay, None), mixes, "valid").flatten(1).mean(1)  # (1 + M,)
            except RunError:  # it diverges with this rate
                continue
            candidates = means[1:] if mixes else means
            if candidates.min() < lowest:
                mix = mixes[int(candidates.argmin())] if mixes else None
                best, lowest = Setting(lr, decay, mix), candidates.min().item()
        if at_edge := edges(best, rules, mixes):
            print(f"note: {' and '.join(at_edge)}; a --tune about the chosen flags may find better", file=sys.stderr)
        return best


def training_text(trained: TrainedModel, data: str | None) -> Tensor:
    """Returns the word ids (tokens,) of the text that the model was trained on, as much of it as its run read: from
    the corpus of its run or, if that is no longer there, from the corpus `data` (None: none is given) with the same
    train.txt. Raises `DataError`."""
    for name in (trained.data, data):
        try:
            if name is not None:
                ids, _, sha256 = read_split(name, "train", trained.words)
                if sha256 == trained.sha256.get("train"):
                    return ids[: trained.limit_tokens or None]
        except DataError:  # It is not there any more.
            continue
    raise DataError(
        f"--dynamic rms: reads the text that the model was trained on, which {trained.data} does not hold any more;"
        " name its folder by --data, or take --dynamic sgd"
    )


def grid(start: Setting) -> tuple[list[tuple[float | None, float | None]], list[Mix]]:
    """Returns what `Adapter.tune` tries: pairs of a rate and a decay, and mixes, each the multiples of those in
    `start`, and [(None, None)] and [] where `start` has none."""
    rules: list[tuple[float | None, float | None]] = [(None, None)]
    if start.lr is not None:
        decays = (min(1.0, start.decay * factor) for factor in DECAY_FACTORS)
        rules = list(dict.fromkeys(product((start.lr * factor for factor in LR_FACTORS), decays)))
    if start.mix is None:
        return rules, []
    shares = (min(MAX_SHARE, start.mix.share * factor) for factor in SHARE_FACTORS)
    mixes = product((start.mix.theta * factor for factor in THETA_FACTORS), shares)
    return rules, list(dict.fromkeys(Mix(*mix) for mix in mixes))


def edges(chosen: Setting, rules: list[tuple[float | None, float | None]], mixes: list[Mix]) -> list[str]:
    """Returns what to say of each flag whose chosen value is the largest or, other than 0, the smallest tried."""
    flags = []
    if chosen.lr is not None:
        flags += [("dynamic_lr", chosen.lr, [lr for lr, _ in rules])]
        flags += [("dynamic_decay", chosen.decay, [decay for _, decay in rules])]
    if chosen.mix is not None:
        flags += [("cache_theta", chosen.mix.theta, [mix.theta for mix in mixes])]
        flags += [("cache_lambda", chosen.mix.share, [mix.share for mix in mixes])]
    return [
        f"--{name} {value:g} is the {'largest' if value == max(tried) else 'smallest'} that was tried"
        for name, value, tried in flags
        if value in (min(tried), max(tried)) and value
    ]


def flags_of(setting: Setting, args: Namespace) -> tuple[str, str]:
    """Returns the flags of evaluate.py that give this setting: those of dynamic evaluation, and those of the cache."""
    dynamic = cache = ""
    if args.dynamic:
        dynamic = f" --dynamic {args.dynamic} --dynamic_lr {setting.lr:g} --dynamic_decay {setting.decay:g}"
        dynamic += f" --dynamic_bptt {args.dynamic_bptt}"
    if setting.mix:
        cache = f" --cache_size {args.cache_size} --cache_theta {setting.mix.theta:g}"
        cache += f" --cache_lambda {setting.mix.share:g}"
    return dynamic, cache
