"""The rooms of the repository: imports point down, there is no circle, and what is small stays small."""

import ast
import subprocess
import sys

import pytest
from helpers import ROOT

DOORS = {"train_search", "train", "evaluate", "visualize", "trials"}
ALGORITHM = {"architect", "model_search", "model"}
GROUND = {"data", "genotypes", "utils"}
PACKAGES = ("plots", "study", "experiment", "training", "engine")
ROOMS = (DOORS, {"plots"}, {"study"}, {"experiment"}, {"training"}, ALGORITHM, {"engine"}, GROUND)  # from the top down


def modules():
    """Each module of the repository by its dotted name, tests, benchmarks and scripts/ left out."""
    paths = [*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imported(path, known):
    """The modules of the repository that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & known
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & known) or ({node.module} & known)
    return found


def room(module):
    [number] = [i for i, names in enumerate(ROOMS) if module.split(".")[0] in names]
    return number


def imports():
    known = modules()
    return {module: imported(path, known.keys()) for module, path in known.items()}


def test_every_module_is_in_a_room():
    assert {room(module) for module in modules()} == set(range(len(ROOMS)))


def test_imports_point_down_and_doors_do_not_import_one_another():
    assert [
        (module, other)
        for module, others in imports().items()
        for other in others
        if room(other) < room(module) or (module in DOORS and other in DOORS)
    ] == []


def test_there_is_no_circle():
    """Modules whose imports are all gone are taken away until none is left. (A package's own import of its modules is
    how its names are given on.)"""
    left = {module: others - {module.split(".")[0]} for module, others in imports().items()}
    while free := {module for module, others in left.items() if not others}:
        left = {module: others - free for module, others in left.items() if module not in free}
    assert left == {}


def test_the_engine_imports_nothing_else_of_the_repository():
    of_engine = (others for module, others in imports().items() if module.startswith("engine"))
    assert {other.split(".")[0] for others in of_engine for other in others} == {"engine"}


WITHOUT_TORCH = [name for name in modules() if name.startswith("plots") and name != "plots.tensorboard"]


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_plots_load_no_torch(module):
    code = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# --- what is small stays small ---

LONGEST_LOOP = 40  # lines


@pytest.mark.parametrize(("script", "loop"), [("train_search", "search"), ("train", "retrain")])
def test_the_loop_that_trains_fits_on_a_screen(script, loop):
    [found] = [node for node in parsed(script).body if isinstance(node, ast.FunctionDef) and node.name == loop]
    assert found.end_lineno - found.lineno < LONGEST_LOOP


def parsed(module):
    return ast.parse(modules()[module].read_text())


def test_no_function_changes_the_variables_of_another():
    assert [module for module in modules() if any(isinstance(n, ast.Nonlocal) for n in ast.walk(parsed(module)))] == []


def test_no_six_lines_stand_in_both_scripts():
    """Imports left out, which say what a script uses."""
    runs = []
    for script in ("train_search", "train"):
        lines = [line.strip() for line in modules()[script].read_text().split("\n")]
        lines = [line for line in lines if line and not line.startswith(("import ", "from "))]
        runs.append({tuple(lines[i : i + 6]) for i in range(len(lines) - 5)})
    assert runs[0] & runs[1] == set()
