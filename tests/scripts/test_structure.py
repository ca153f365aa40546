"""Tests of the layers of the repository: imports point down, there are no cycles, and the training loops stay short."""

import ast
import subprocess
import sys

import pytest
from helpers import ROOT

SCRIPTS = {"train_search", "train", "evaluate", "generate", "visualize", "trials"}
ALGORITHM = {"architect", "model_search", "model"}
GROUND = {"data", "download", "genotypes", "utils"}
PACKAGES = ("plots", "study", "experiment", "training", "engine")
LAYERS = (SCRIPTS, {"plots"}, {"study"}, {"experiment"}, {"training"}, ALGORITHM, {"engine"}, GROUND)  # top first


def modules():
    """Returns the path of each module by its dotted name, without tests, benchmarks and scripts/."""
    paths = [*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imported(path, known):
    """Returns the modules of the repository that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names} & known
        elif isinstance(node, ast.ImportFrom):
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (submodules & known) or ({node.module} & known)
    return names


def layer(module):
    [number] = [i for i, names in enumerate(LAYERS) if module.split(".")[0] in names]
    return number


def imports():
    known = modules()
    return {module: imported(path, known.keys()) for module, path in known.items()}


def test_every_module_belongs_to_one_layer():
    assert {layer(module) for module in modules()} == set(range(len(LAYERS)))


def test_imports_point_down_and_scripts_do_not_import_each_other():
    assert [
        (module, other)
        for module, others in imports().items()
        for other in others
        if layer(other) < layer(module) or (module in SCRIPTS and other in SCRIPTS)
    ] == []


def test_imports_have_no_cycles():
    """Repeatedly removes the modules that import no remaining module, until none is left. A package's own imports of
    its modules are not counted, because they only re-export names."""
    left = {module: others - {module.split(".")[0]} for module, others in imports().items()}
    while free := {module for module, others in left.items() if not others}:
        left = {module: others - free for module, others in left.items() if module not in free}
    assert left == {}


def test_engine_imports_no_other_package_of_the_repository():
    engine_imports = (others for module, others in imports().items() if module.startswith("engine"))
    assert {other.split(".")[0] for others in engine_imports for other in others} == {"engine"}


WITHOUT_TORCH = [name for name in modules() if name.startswith("plots") and name != "plots.tensorboard"]


def test_plots_do_not_import_torch():
    code = f"import importlib, sys\nfor name in {WITHOUT_TORCH}:\n importlib.import_module(name)\n"
    code += " if 'torch' in sys.modules: sys.exit(name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"the first one to import torch: {done.stderr}"


# --- small functions and no duplication ---

LONGEST_LOOP = 40  # lines


@pytest.mark.parametrize(("script", "loop"), [("train_search", "search"), ("train", "retrain")])
def test_training_loop_is_shorter_than_40_lines(script, loop):
    [function] = [node for node in parsed(script).body if isinstance(node, ast.FunctionDef) and node.name == loop]
    assert function.end_lineno - function.lineno < LONGEST_LOOP


def parsed(module):
    return ast.parse(modules()[module].read_text())


def test_no_module_uses_nonlocal():
    assert [module for module in modules() if any(isinstance(n, ast.Nonlocal) for n in ast.walk(parsed(module)))] == []


def test_scripts_share_no_six_consecutive_lines():
    """Blank lines and imports do not count."""
    windows = []
    for script in ("train_search", "train"):
        lines = [line.strip() for line in modules()[script].read_text().split("\n")]
        lines = [line for line in lines if line and not line.startswith(("import ", "from "))]
        windows.append({tuple(lines[i : i + 6]) for i in range(len(lines) - 5)})
    assert windows[0] & windows[1] == set()


def test_no_file_is_over_350_lines_and_no_function_over_70():
    for module, path in modules().items():
        text = path.read_text()
        assert text.count("\n") <= 350, module
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 70, (module, node.name)
