"""Writes the HTML page of a run or a study: one file that contains its pictures and opens offline."""

import os
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from plots.html.page import is_over, is_study
from plots.html.run_page import run_page
from plots.html.study_page import study_page
from plots.style import PictureError, plain_style, whole

NAME = "report.html"


def page_path(folder: str | Path, path: str | Path | None = None) -> Path:
    """Returns where the page of a directory is written: `path`, by default report.html in the directory. Raises
    `PictureError` for another ending than .html."""
    path = Path(folder) / NAME if path is None else Path(path)
    if path.suffix.lower() != ".html":
        raise PictureError(f"a page's name ends in .html, unlike {str(path)!r}")
    return path


def write(folder: str | Path, path: str | Path | None = None, refresh: int = 0) -> Path:
    """Writes the page of a run or a study to its `page_path`, which it returns. Until the run or study is over, the
    page reloads itself every `refresh` seconds if not 0. Raises `PictureError` and `OSError`."""
    folder, path = Path(folder), page_path(folder, path)

    def link(target: Path) -> str:
        return quote(os.path.relpath(target, path.parent), errors="replace")

    with plain_style():
        page = study_page(folder, link) if is_study(folder) else run_page(folder, link)
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    text = environment.get_template(NAME).render(page | {"refresh": 0 if is_over(folder) else refresh})
    with whole(path) as temporary:  # A browser may be reading the page.
        temporary.write_text(text, encoding="utf-8", errors="replace")
    return path
