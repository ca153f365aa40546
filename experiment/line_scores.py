"""Scores the lines of a text by a trained model: how likely each is, and how many of its words the model knows."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from training.evaluation import perplexity


class LineScore(NamedTuple):
    """Holds the log-probability of a line, its end included, and that of each of its tokens."""

    line: int  # its number, from 1
    tokens: int  # the predicted ones: the words and the line's end
    unknown: int  # how many of these are outside the vocabulary, and count as <unk>
    log_prob: float  # in nats, the sum over the tokens
    log_probs: tuple[float, ...]  # of each token
    text: str

    @property
    def perplexity(self) -> float | None:
        """Returns the perplexity of the line; None if no token of it was predicted."""
        return perplexity(-self.log_prob / self.tokens) if self.tokens else None


def line_scores(lines: Sequence[str], losses: Iterable[Tensor], unknown: Sequence[Tensor]) -> Iterator[LineScore]:
    """Yields the score of each line. For each, `losses` has the losses (tokens,) of its predicted tokens in nats, and
    `unknown` (tokens,) marks those tokens that are outside the vocabulary."""
    for i, (line, nats, marks) in enumerate(zip(lines, losses, unknown, strict=True), start=1):
        log_probs = tuple((0.0 - nats).tolist())  # 0.0 - 0.0 is 0.0, without a sign
        yield LineScore(i, len(nats), int(marks.sum()), 0.0 - nats.sum().item(), log_probs, line.strip())


def total(scores: Sequence[LineScore]) -> LineScore:
    """Returns the score of all lines together; its field `line` is the number of lines."""
    tokens, unknown, log_prob = (sum(each) for each in zip(*(score[1:4] for score in scores), strict=True))
    return LineScore(len(scores), tokens, unknown, log_prob, (), "all lines")


def as_json(score: LineScore) -> str:
    """Returns a JSON object with the fields of a score and its perplexity, null if that is infinite or undefined."""
    ppl = score.perplexity if score.perplexity is not None and math.isfinite(score.perplexity) else None
    return json.dumps({**score._asdict(), "perplexity": ppl})


HEAD = f"{'line':>6} {'tokens':>7} {'unknown':>8} {'log-prob':>11} {'perplexity':>11}  text"
WIDTH = 60  # letters of a line's text that a row shows


def as_row(score: LineScore) -> str:
    """Returns a row below `HEAD`, with the first `WIDTH` letters of the line."""
    ppl = "-" if score.perplexity is None else f"{score.perplexity:.2f}"
    text = score.text if len(score.text) <= WIDTH else score.text[: WIDTH - 1] + "…"
    return f"{score.line:>6} {score.tokens:>7} {score.unknown:>8} {score.log_prob:>11.3f} {ppl:>11}  {text}".rstrip()
