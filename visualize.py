"""Draws searches, retrainings, studies and cells, and writes one HTML page that contains the pictures.

    python visualize.py report runs/search               # writes report.html there; --watch repeats it
    python visualize.py search runs/search --out search.svg
    python visualize.py formation runs/search --out formation.gif
    python visualize.py train runs/train-one runs/train-another
    python visualize.py study runs/study                 # also: cells, proxies
    python visualize.py cell DARTS_V2 --out cell.svg

All pictures are made from metrics.jsonl and the other small files of a run directory, whether the run is live, finished
or interrupted, in a few seconds on a CPU. This needs matplotlib; the page also needs jinja2.
"""

import argparse
import difflib
import shlex
import sys
import time
from pathlib import Path
from typing import NoReturn

from experiment import discard_unwritable_output, set_up_terminal  # refuses a system that is not supported
from genotypes import GenotypeError, resolve

try:
    from plots.animation import draw_formation
    from plots.cell_graph import cell_dot, cell_figure
    from plots.run_history import History
    from plots.search_curves import whole_figure
    from plots.study_curves import cells_figure, proxies_figure, selection_figure
    from plots.style import FORMATS, PictureError, plain_style, save, whole
    from plots.train_curves import train_figure
except ImportError as missing:
    print(f"visualize.py: needs {missing.name}; pip install -r requirements-plots.txt", file=sys.stderr)
    sys.exit(2)
except OSError as error:  # Matplotlib found no folder that it can write to.
    print(f"visualize.py: {error}".replace("\n", " "), file=sys.stderr)
    sys.exit(2)

REFRESH_SECONDS = 5  # The page of a live run is rewritten after this many seconds or more.
ENDINGS = ", ".join(FORMATS)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """Returns the parser of the script, and the parsers of its commands by name."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    its = "its directory"
    for name, words, argument, meaning, out, endings in (
        ("cell", "draw one recurrent cell", "ARCH",
         "a published cell's name, random:SEED, a search's run directory, a genotype.json, a log, or its text",
         "cell.svg", f"{ENDINGS}, or .dot for graphviz"),
        ("search", "draw a search: losses, alphas, genotype, signal", "RUN", its, "search.svg", ENDINGS),
        ("formation", "animate how the cell of a search formed", "RUN", its, "formation.gif",
         ".gif, or .mp4, which needs ffmpeg"),
        ("train", "draw the validation curves of trainings", "RUN", "directories", "train.svg", ENDINGS),
        ("study", "draw what the selection of a study found, trial by trial", "STUDY", its, "study.svg", ENDINGS),
        ("cells", "draw which feature tells the cells of a study apart", "STUDY", its, "cells.svg", ENDINGS),
        ("proxies", "draw how each short training of a study ranks the cells", "STUDY", its, "proxies.svg", ENDINGS),
        ("report", "write one page about a run or a study", "DIR", its, None,
         ".html; report.html in that directory if not given"),
    ):  # fmt: skip
        command = commands.add_parser(name, help=words, description=words[0].upper() + words[1:] + ".")
        command.add_argument("what", metavar=argument, nargs="+" if name == "train" else None, help=meaning)
        command.add_argument("--out", metavar="FILE", default=out, help=f"ends in {endings}; rewritten if it exists")
    watch = "write it again while the run continues, and let the browser reload it"
    commands.choices["report"].add_argument("--watch", action="store_true", help=watch)
    return parser, commands.choices


def draw(args: argparse.Namespace) -> Path:
    """Writes the picture that the command names and returns its path. Raises `GenotypeError` and `PictureError`."""
    out = Path(args.out)
    if args.command == "cell":
        cell = resolve(args.what, note=lambda line: print(f"visualize.py: {line}", file=sys.stderr))
        if out.suffix.lower() == ".dot":
            with whole(out) as file:
                file.write_text(cell_dot(cell), encoding="utf-8")
        else:
            save(cell_figure(cell), out, str(cell))
    elif args.command == "search":
        save(whole_figure(History(args.what)), out, "search")
    elif args.command == "formation":
        draw_formation(args.what, out)
    elif args.command == "train":
        save(train_figure([History(folder) for folder in args.what]), out, "retraining")
    else:
        figure = {"study": selection_figure, "cells": cells_figure, "proxies": proxies_figure}[args.command]
        save(figure(Path(args.what)), out, args.command)
    return out


def report(args: argparse.Namespace) -> Path:
    """Writes the page, with --watch until the run is over or Ctrl-C, and returns its path. Raises `PictureError`."""
    from plots.html.page import is_over
    from plots.html.report import page_path, write

    if not args.watch:
        return write(args.what, args.out)
    if not Path(args.what).is_dir():
        raise PictureError(f"{args.what}: no such directory")
    page_path(args.what, args.out)  # A wrong ending stays wrong, unlike a run without a record.
    shown = 0  # the length of the status on the terminal
    try:
        while not is_over(Path(args.what)):
            clock = time.monotonic()
            try:
                status = f"wrote {write(args.what, args.out, refresh=REFRESH_SECONDS)}; Ctrl-C ends it"
            except PictureError as error:  # A new run may soon have a record.
                status = str(error)
            print(f"\r{time.strftime('%H:%M:%S')} {status:<{shown}}", end="", flush=True)
            shown = len(status)
            time.sleep(max(REFRESH_SECONDS, 4 * (time.monotonic() - clock)))  # This uses at most a fifth of a core.
    except KeyboardInterrupt:
        pass
    print()
    return write(args.what, args.out)  # The last version does not reload itself.


def main(argv: list[str] | None = None) -> int:
    set_up_terminal()
    parser, commands = build_parser()
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] not in commands and not argv[0].startswith("-"):
        near = difflib.get_close_matches(argv[0], commands, n=1)
        words = [*near, *argv[1:]] if near else ["report" if Path(argv[0]).is_dir() else "cell", *argv]
        meant = shlex.join(["visualize.py", *words])
        parser.error(f"{argv[0]!r} is no command ({', '.join(commands)}); did you mean {meant}?")
    args = parser.parse_args(argv)
    command = commands[args.command]
    try:
        with plain_style():
            out = report(args) if args.command == "report" else draw(args)
    except (GenotypeError, PictureError) as error:
        command.error(str(error))
    except ImportError as error:
        command.error(f"needs {error.name}; pip install -r requirements-plots.txt")
    except OSError as error:
        command.error(f"cannot write {args.out or error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        return 130
    try:
        print(f"wrote {out}", flush=True)
    except BrokenPipeError:
        discard_unwritable_output()
        return 141  # that of a process that SIGPIPE ends
    except OSError as error:
        discard_unwritable_output()
        command.error(f"cannot write to the terminal: {error.strerror}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
