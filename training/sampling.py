"""Samples text from a language model, word by word.

Shapes: n words of a prompt, B samples, V words.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from model import RNNModel


def next_word_probs(log_probs: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Returns the probabilities (B, V) by which the next word is sampled, in float64, for log-probabilities (B, V).

    The temperature divides the log-probabilities; at 0 the most likely word is certain. Of the words, then the `top_k`
    most likely remain (0: all), and of those the most likely whose probabilities add up to at least `top_p` (Holtzman
    et al. 2020), at least one. What remains is divided by its sum. Equally likely words are ranked by id.
    """
    if temperature == 0:
        top_k = 1
    ordered, words = log_probs.double().sort(dim=-1, descending=True, stable=True)  # (B, V)
    logits = (ordered - ordered[:, :1]) / (temperature or 1.0)  # at most 0, so that no temperature is too low
    if top_k:
        logits[:, top_k:] = -torch.inf
    probs = logits.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs  # the probability of the more likely words
    probs = probs.masked_fill(before >= top_p, 0.0) if top_p < 1 else probs
    return torch.zeros_like(probs).scatter(-1, words, probs / probs.sum(dim=-1, keepdim=True))


@torch.no_grad()
def generate(
    model: RNNModel, prompt: Tensor, n_words: int, samples: int, generator: torch.Generator, temperature: float = 1.0,
    top_k: int = 0, top_p: float = 1.0, excluded: Sequence[int] = (),
) -> Iterator[Tensor]:  # fmt: skip
    """Yields `n_words` times the ids (B,) of the next word of each of B = `samples` texts that begin with the word ids
    `prompt` (n,), n > 0. Words are drawn on the CPU by `generator`, with the probabilities of `next_word_probs`, and
    never those with an id in `excluded`."""
    state = model.initial_hidden(samples)
    x = prompt[:, None].expand(-1, samples)  # (n, B)
    for _ in range(n_words):
        hiddens, state = model(x, state)
        log_probs = model.log_probs(hiddens[-1:])[0]  # (B, V)
        log_probs[:, list(excluded)] = -torch.inf
        probs = next_word_probs(log_probs, temperature, top_k, top_p)  # (B, V)
        x = torch.multinomial(probs.cpu(), 1, generator=generator).t().to(prompt.device)  # (1, B)
        yield x[0]
