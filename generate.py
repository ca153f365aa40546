"""Lets a trained model write: words sampled one after another, each from the probabilities that the last ones give it.

    python generate.py runs/train-.../best.pt --prompt "the company said" --words 200
    python generate.py runs/train-.../best.pt --temperature 0.8 --top_p 0.9 --samples 4 --seed 2

A word takes milliseconds on a CPU. The same seed gives the same words on the same machine.
"""

import sys
from argparse import Namespace

import torch

from experiment import arguments, signals
from data import EOS, UNK
from experiment.trained_model import TrainedModel, load_trained, refusing
from experiment.validate_arguments import device_faults, number_faults
from genotypes import resolve_cell
from training.sampling import generate
from utils import DataError, choose_device


def build_parser() -> arguments.Parser:
    parser = arguments.Parser("generate.py", "Text sampled from a trained model.")
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="best.pt or last.pt of a run, or a model.pt of the published code"
    )
    parser.add_flags("text", [
        ("prompt", "TEXT", "", "the beginning of the text; the model reads it after a line's end"),
        ("words", int, 100, "number of words to sample, line ends included"),
        ("samples", int, 1, "number of texts; a single one is printed word by word as it is sampled"),
        ("seed", int, 1, "the same seed gives the same words on one machine"),
    ])  # fmt: skip
    parser.add_flags("sampling", [
        ("temperature", float, 1.0, "divides the log-probabilities: below 1 likely words become likelier; 0 takes the "
         "most likely word"),
        ("top_k", int, 0, "sample only from the K most likely words, 0 for all"),
        ("top_p", float, 1.0, "sample only from the most likely words whose probabilities add up to P"),
    ])  # fmt: skip
    parser.add_argument("--arch", help="the cell of a model of the published code whose file does not name it")
    parser.add_argument(
        "--data", metavar="NAME|DIR", help="the corpus of a model of the published code (default: penn)"
    )
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is some), cpu, cuda or cuda:N")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if faults := [*number_faults(args), *device_faults(args.device)]:
        parser.refuse(faults)
    with refusing(parser):
        trained = load_trained(args.checkpoint, args.arch and resolve_cell(args.arch), args.data)
        prompt = encode_prompt(args.prompt, trained)
    write(args, trained, prompt)
    return 0


def encode_prompt(prompt: str, trained: TrainedModel) -> torch.Tensor:
    """Returns the ids (n,) of a line's end and the words of a prompt; a note names those that become `<unk>`. Raises
    `DataError` if the vocabulary has no `<unk>` for them, or if the model cannot read one text alone."""
    if trained.needs_batch:
        raise DataError("--norm batch: this search's model normalises over a batch of texts, so it cannot read one")
    index = {word: i for i, word in enumerate(trained.words)}
    if unknown := [word for word in prompt.split() if word not in index]:
        named = ", ".join(dict.fromkeys(unknown))
        if UNK not in index:
            raise DataError(f"--prompt: the model does not know {named}, and has no {UNK} for it; leave it out")
        print(f"note: the model does not know {named}, and reads {UNK} instead", file=sys.stderr)
    return torch.tensor([index[EOS], *(index.get(word, index.get(UNK)) for word in prompt.split())])


def write(args: Namespace, trained: TrainedModel, prompt: torch.Tensor) -> None:
    """Prints the sampled texts: one as its words come, several one after another in the end."""
    device = choose_device(args.device)
    words = generate(
        trained.model.to(device), prompt.to(device), args.words, args.samples,
        torch.Generator().manual_seed(args.seed), args.temperature, args.top_k, args.top_p,
    )  # fmt: skip
    texts = [Text(args.prompt) for _ in range(args.samples)]
    for ids in words:  # (B,)
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

    def __init__(self, prompt: str):
        self.new = self.line = " ".join(prompt.split())

    def add(self, word: str) -> None:
        if word == EOS:
            self.new, self.line = self.new + "\n", ""
        else:
            self.new += f" {word}" if self.line else word
            self.line = word

    def take(self) -> str:
        """Returns what was added since the last call."""
        taken, self.new = self.new, ""
        return taken


if __name__ == "__main__":
    sys.exit(signals.run_script(main))
