"""Lets a trained model write: words sampled one after another, each from the probabilities that the last ones give it.

    python generate.py runs/train-.../best.pt --prompt "the company said" --words 200
    python generate.py runs/train-.../best.pt --temperature 0.8 --top_p 0.9 --samples 4 --seed 2

A word takes milliseconds on a CPU. The same seed gives the same words on the same machine.
"""

import sys
from argparse import Namespace
from functools import partial
from itertools import islice

import torch

from experiment import arguments, signals
from data import EOS, UNK, encode_text, tokens, unknown_words
from experiment.evaluation_arguments import add_model_flags
from experiment.trained_model import TrainedModel, load_trained, refuse_unread_data, refusing
from experiment.validate_arguments import device_faults, number_faults
from genotypes import resolve_cell
from training.sampling import generate
from utils import choose_device


def build_parser() -> arguments.Parser:
    parser = arguments.Parser("generate.py", "Text sampled from a trained model.")
    add_model_flags(parser)
    parser.add_flags("text", [
        ("prompt", "TEXT", "", "the beginning of the text, of one line or several; the model reads it after a line's "
         "end"),
        ("words", int, 100, "number of words to sample, line ends included"),
        ("samples", int, 1, "number of texts; a single one is printed word by word as it is sampled"),
        ("seed", int, 1, "the same seed gives the same words on one machine"),
    ])  # fmt: skip
    parser.add_flags("sampling", [
        ("temperature", float, 1.0, "divides the log-probabilities: below 1 likely words become likelier; 0 takes the "
         "most likely word"),
        ("top_k", int, 0, "sample only from the K most likely words, 0 for all"),
        ("top_p", float, 1.0, "sample only from the most likely words whose probabilities add up to P"),
        ("no_unk", bool, False, "never sample <unk>"),
    ])  # fmt: skip
    parser.add_argument(
        "--data", metavar="NAME|DIR", help="the corpus of a model of the published code, whose words are those of its"
        " train.txt (default: penn)",
    )  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if faults := [*number_faults(args), *device_faults(args.device)]:
        parser.refuse(faults)
    with refusing(parser):
        refuse_unread_data(args.checkpoint, args.data)
        cell = args.arch and resolve_cell(args.arch, note=partial(print, "note:", file=sys.stderr))
        trained = load_trained(args.checkpoint, cell, args.data)
        trained.require_single_text(args.checkpoint)
        prompt = encode_prompt(args.prompt, trained.words)
    write(args, trained, prompt)
    return 0


def encode_prompt(prompt: str, words: list[str]) -> torch.Tensor:
    """Returns the ids (n,) of a line's end and the words of a prompt; a note names those that become `<unk>`. Raises
    `DataError` if the vocabulary has no `<unk>` for them."""
    ids, unknown = encode_text(prompt, words, "--prompt", "leave these out")
    if unknown.any():
        named = unknown_words(prompt, unknown)
        print(f"note: the model does not know {named}, and reads {UNK} instead", file=sys.stderr)
    within_line = prompt != "" and not prompt.endswith(("\n", "\r"))  # whose end is not in the prompt
    return torch.cat([torch.tensor([words.index(EOS)]), ids[: len(ids) - within_line]])


def write(args: Namespace, trained: TrainedModel, prompt: torch.Tensor) -> None:
    """Prints the sampled texts: one as its words come, several one after another in the end."""
    device = choose_device(args.device)
    excluded = [i for i, word in enumerate(trained.words) if args.no_unk and word == UNK]
    sampled = generate(
        trained.model.to(device), prompt.to(device), args.words, args.samples,
        torch.Generator().manual_seed(args.seed), args.temperature, args.top_k, args.top_p, excluded,
    )  # fmt: skip
    texts = [Text() for _ in range(args.samples)]
    for text in texts:
        for word in islice(tokens(args.prompt), len(prompt) - 1):
            text.add(word)
    for ids in sampled:  # (B,)
        for text, i in zip(texts, ids.tolist(), strict=True):
            text.add(trained.words[i])
        if args.samples == 1:
            print(texts[0].take(), end="", flush=True)
    for number, text in enumerate(texts, start=1):
        if args.samples > 1:
            print(f"== {number}")
        print(text.take())


class Text:
    """A text that grows by words; `<eos>` ends a line."""

    def __init__(self):
        self.new, self.line_begun = "", False

    def add(self, word: str) -> None:
        self.new += "\n" if word == EOS else f" {word}" if self.line_begun else word
        self.line_begun = word != EOS

    def take(self) -> str:
        """Returns what was added since the last call."""
        taken, self.new = self.new, ""
        return taken


if __name__ == "__main__":
    sys.exit(signals.run_script(main, advice="--device cpu, or fewer --samples"))
