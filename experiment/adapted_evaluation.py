"""Evaluates a trained model that adapts to the text it reads: by dynamic evaluation, by a neural cache, or by both.

The text is read as one batch element, so that what is learned and kept is of one text (as several, if a relaxed model
with batch normalisation needs them).
"""

from argparse import Namespace
from itertools import product
from typing import NamedTuple

from torch import Tensor
from tqdm import tqdm

from data import read_split
from experiment.evaluation_arguments import DECAY_FACTORS, LR_FACTORS, SHARES, THETAS
from experiment.trained_model import TrainedModel
from training.dynamic_evaluation import DynamicEvaluation, gradient_rms
from training.neural_cache import Mix, NeuralCache
from training.token_losses import token_losses
from utils import RunError, batchify

STATISTICS_BATCH_SIZE = 100  # of the batches of train whose gradients `rms` averages: the default of the paper's code


class Setting(NamedTuple):
    """The numbers of an adaptation: rate and decay of dynamic evaluation, and the mix of the cache; None without it."""

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
        """Reads train if the rule is `rms`. Raises `DataError` if that cannot be read."""
        self.model, self.rule, self.cache_size = trained.model, args.dynamic, args.cache_size
        self.batch_size = trained.batch_sizes["test"]
        self.bptt = args.dynamic_bptt if args.dynamic else trained.bptt
        self.rms: list[Tensor] | None = None
        if self.rule == "rms":
            ids, _, _ = read_split(trained.data, "train", trained.words)
            text = batchify(ids, min(STATISTICS_BATCH_SIZE, len(ids) // 2))
            self.rms = gradient_rms(self.model, text.to(self.model.bias.device), self.bptt)

    def losses(self, ids: Tensor, setting: Setting, mixes: list[Mix], name: str) -> Tensor:
        """Returns the losses (1 + M, n - 1, B) of the words of a text (tokens,), in nats, without the cache and with
        each of the M `mixes` in the place of the setting's. Raises `RunError` if the model diverges."""
        dynamic = None
        if self.rule:
            dynamic = DynamicEvaluation(self.model.weights(), setting.lr, setting.decay, self.rms)
        cache = NeuralCache(self.cache_size, mixes) if mixes else None
        source = batchify(ids, self.batch_size).to(self.model.bias.device)  # (n, B)
        losses = token_losses(self.model, source, self.bptt, dynamic=dynamic, cache=cache, name=name)
        if not losses.isfinite().all():
            raise RunError(f"the model diverges with --dynamic_lr {setting.lr:g}; take a smaller one")
        return losses

    def tune(self, ids: Tensor, start: Setting) -> Setting:
        """Returns the setting that predicts a text (tokens,) best, of a small grid about `start`. For each rate and
        decay, the mixes of the cache are compared in one pass over the text."""
        mixes = [Mix(*each) for each in product(THETAS, SHARES)] if start.mix else []
        rules: list[tuple[float | None, float | None]] = [(None, None)]
        if self.rule:
            rules = [(start.lr * a, min(1.0, start.decay * b)) for a, b in product(LR_FACTORS, DECAY_FACTORS)]
        best, lowest = start, float("inf")
        for lr, decay in tqdm(rules, desc="tuning", unit="pass", leave=False, disable=None, dynamic_ncols=True):
            try:
                means = self.losses(ids, Setting(lr, decay, None), mixes, "valid").flatten(1).mean(1)  # (1 + M,)
            except RunError:  # it diverges with this rate
                continue
            if means.min() < lowest:
                mix = mixes[int(means[1:].argmin())] if mixes else None
                best, lowest = Setting(lr, decay, mix), means.min().item()
        return best


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
