"""Each script ends with one line on a system that is not supported, and prints any path on any terminal."""

import ast
import os
import subprocess
import sys

import pytest
from helpers import ROOT, SIZES, write_corpus

from experiment import unsupported

SCRIPTS = ("train_search.py", "train.py", "evaluate.py", "generate.py", "visualize.py", "trials.py")


def test_old_python_and_windows_are_unsupported():
    assert unsupported((3, 10, 9), "linux") == "Python 3.11 or newer is needed, and this is 3.10"
    assert unsupported((3, 12), "win32").startswith("Windows is not supported")
    assert unsupported((3, 11), "linux") is unsupported((3, 13), "darwin") is None


def test_scripts_refuse_an_old_python_before_they_import_anything_else_of_the_repository():
    code = (
        "import runpy, sys; import torch; sys.version_info = (3, 9, 2, 'final', 0); own = set(sys.modules)\n"
        f"for script in {SCRIPTS}:\n"
        " try: runpy.run_path(script, run_name='__main__')\n"
        " except SystemExit as end: print(script, end.code)\n"
        "print(sorted(name for name in set(sys.modules) - own if name in ('genotypes', 'data', 'utils')))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stderr == "error: Python 3.11 or newer is needed, and this is 3.9\n" * len(SCRIPTS)
    assert run.stdout == "".join(f"{script} 2\n" for script in SCRIPTS) + "[]\n"


@pytest.mark.parametrize("path", [*SCRIPTS, "experiment/__init__.py"])
def test_what_refuses_an_old_python_can_be_parsed_by_it(path):
    ast.parse((ROOT / path).read_text(), feature_version=(3, 8))


def test_run_in_a_folder_with_letters_that_the_terminal_cannot_print_ends_as_elsewhere(tmp_path):
    (folder := tmp_path / "é中").mkdir()
    write_corpus(folder, train=30, valid=16, test=16)
    flags = [
        *SIZES,
        "--arch",
        "DARTS",
        "--epochs",
        "1",
        "--engine",
        "eager",
        "--data",
        folder,
        "--save",
        folder / "run",
    ]
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"}
    scripts = (["train.py", *flags], ["visualize.py", "train", folder / "run", "--out", folder / "x.svg"])
    for script, *given in scripts:
        run = subprocess.run(
            [sys.executable, ROOT / script, *map(str, given)],
            cwd=ROOT,
            env=ascii_only,
            capture_output=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
    assert (folder / "x.svg").exists()
