"""Measures the loss of a model on a text, and formats its perplexity and what unknown words do to it."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.matmul import matmul_precision
from utils import equal_segments, get_batch

VALID_BATCH_SIZE, TEST_BATCH_SIZE = 10, 1  # These are the published batch sizes of evaluation.
NOTABLE = 0.01  # Above this share of unknown words, a warning says what they do to the perplexity.


class Score(NamedTuple):
    """The mean loss of a text, and what the words that became `<unk>` do to it."""

    loss: float  # in nats per predicted word
    unknown_share: float = 0.0  # the share of the predicted words that became <unk>
    known_loss: float | None = None  # in nats per predicted word, over the others alone; None if there are none

    @property
    def bits(self) -> float:
        """Returns the loss in bits per token."""
        return self.loss / math.log(2)

    @property
    def known_ppl(self) -> float | None:
        """Returns the perplexity without the unknown words; None if all words are unknown."""
        return None if self.known_loss is None else perplexity(self.known_loss)


@torch.no_grad()
def score(model, source: Tensor, bptt: int, name: str = "text", unknown: Tensor | None = None) -> Score:
    """Returns the `Score` of a model on `source` (n, B), without dropout. `unknown` (n, B), on the CPU, marks the words
    that became `<unk>`; it is None if there are none. The score is computed in the precision of the model's engine, in
    segments of `bptt` time steps, from each of which the hidden state is carried to the next. The progress bar shows
    `name`. The host waits for the model's device only at the end."""

    def segment(x: Tensor, y: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hiddens, hidden = model(x, hidden)  # (T, B, H), (B, S)
        return model.nll(hiddens, y), hidden, hiddens

    hidden = model.initial_hidden(source.size(1))
    # Each evaluation captures new graphs, since the weights may have other addresses than in the last one.
    quick_segment = model.engine.with_cuda_graphs(segment, source.device)
    total, count = torch.zeros((), dtype=torch.float64, device=source.device), 0
    unknown_total, n_unknown = torch.zeros_like(total), 0
    with matmul_precision(model.engine.precision):
        for i, x, y in equal_segments(source, bptt, f"evaluating on {name}"):  # (T, B) each
            nll, hidden, hiddens = quick_segment(x, y, hidden)
            total += nll.double() * y.numel()
            count += y.numel()
            places = [] if unknown is None else get_batch(unknown, i, bptt)[1].flatten().nonzero(as_tuple=True)[0]
            if n := len(places):
                places = places.to(source.device)
                outputs, words = hiddens.flatten(0, 1)[places, None], y.flatten()[places, None]  # (n, 1, H), (n, 1)
                # `model.nll` would compile kernels for each number of words.
                unknown_total += model.word_losses([outputs], words)[1].double() * n
                n_unknown += n
    known = (total - unknown_total).item() / (count - n_unknown) if n_unknown < count else None
    return Score(total.item() / count, n_unknown / count, known)


def evaluate(model, source: Tensor, bptt: int, name: str = "text") -> float:
    """Returns the mean negative log-likelihood in nats per predicted word of `source` (n, B), as `score` does."""
    return score(model, source, bptt, name).loss


def perplexity(loss: float) -> float:
    """Returns exp of a loss in nats per word, and infinity for a loss above 700, near which exp overflows."""
    return math.exp(loss) if not loss > 700 else math.inf


def format_share(share: float) -> str:
    """Returns a share as a percentage, of which the smallest is "under 0.1%"."""
    return f"{share:.1%}" if share == 0 or share >= 0.001 else "under 0.1%"


def format_score(split: str, result: Score | None) -> str:
    """Returns the perplexity of a split and what belongs beside it, for the last line of a run; for None, that the text
    of this split was not read."""
    if result is None:
        return f"{split} text not read"
    note = f"; {format_share(result.unknown_share)} unknown words" if result.unknown_share else ""
    if note and result.known_ppl is not None:
        note += f", without them ppl {result.known_ppl:.2f}"
    return f"{split} ppl {perplexity(result.loss):.2f} ({result.bits:.2f} bits per token{note})"


def unknown_warning(text: str, result: Score | None) -> list[str]:
    """Returns a line that says what unknown words do to the perplexity of a text, if they are more than `NOTABLE`."""
    if result is None or result.unknown_share <= NOTABLE:
        return []
    warning = (
        f"warning: {format_share(result.unknown_share)} of {text} are words outside the vocabulary, counted as <unk>"
    )
    if result.known_loss is None:
        return [f"{warning}: its perplexity says nothing about the text"]
    effect = "lowers" if result.loss < result.known_loss else "raises"
    return [
        f"{warning}, which {effect} its perplexity: without them it is {result.known_ppl:.2f}; compare neither with the"
        " perplexity of another vocabulary"
    ]


def score_entries(**scores: Score | None) -> dict[str, Any]:
    """Returns what result.json says about the score of each split, None for a text that was not read: the perplexity,
    as SPLIT_ppl, and by split the bits per token, the share of unknown words and the perplexity without them."""
    return {
        **{f"{split}_ppl": None if s is None else perplexity(s.loss) for split, s in scores.items()},
        "bits_per_token": {split: None if s is None else s.bits for split, s in scores.items()},
        "unknown_share": {split: None if s is None else s.unknown_share for split, s in scores.items()},
        "known_ppl": {split: None if s is None else s.known_ppl for split, s in scores.items()},
    }
