"""Defines the genotype of a recurrent cell and the published cells, and parses a genotype from text or a file.

`--arch` finds a cell that is added here, `NAME = Genotype(recurrent=[...], concat=[...])`, by its name.

A cell has N nodes. Node i = 1..N applies one activation to one earlier node; node 0 is s_0, computed from the input x_t
and the previous hidden state h_{t-1}. The cell's output is the mean of the nodes in `concat` (DARTS, Liu, Simonyan &
Yang, ICLR 2019, arXiv:1806.09055, sections 2.1 and 3.1.2).
"""

import ast
import difflib
import json
import os
import random
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

PRIMITIVES = ("none", "tanh", "relu", "sigmoid", "identity")
STEPS = 8
CONCAT = tuple(range(1, STEPS + 1))

MAX_NODES = 64
MAX_TEXT = 20_000  # This is the largest number of characters of a genotype's text.
MAX_FILE = 1_000_000  # This is the largest number of bytes of a genotype's JSON or Python file.
MAX_LOG = 100_000_000  # This is the largest number of bytes of a log that holds genotypes.

CALL = re.compile(r"\bGenotype\(")
# A genotype has at most two levels of brackets inside; since no group is entered twice, the search takes linear time.
WHOLE = re.compile(CALL.pattern + r"(?:[^()]++|\((?:[^()]++|\([^()]*+\))*+\))*+\)")


class GenotypeError(ValueError):
    """Reports a genotype that cannot be used, in a message of one line for a person."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class Genotype(NamedTuple):
    """Describes a discrete cell: `recurrent[i - 1]` is (op, predecessor) of node i, `concat` lists the averaged nodes.
    `parse` reads its repr, such as `Genotype(recurrent=[('sigmoid', 0), ('relu', 1)], concat=[1, 2])`."""

    recurrent: tuple[tuple[str, int], ...]
    concat: tuple[int, ...]

    def __repr__(self) -> str:
        return f"Genotype(recurrent={list(self.recurrent)}, concat={list(self.concat)})"


# This cell was found by reinforcement learning over shared weights (Pham et al., ICML 2018).
ENAS = Genotype((
    ("tanh", 0), ("tanh", 1), ("relu", 1), ("tanh", 3), ("tanh", 3), ("relu", 3), ("relu", 4), ("relu", 7), ("relu", 8),
    ("relu", 8), ("relu", 8),
), (2, 5, 6, 9, 10, 11))  # fmt: skip

# This cell was found by the first-order search on Penn Treebank.
DARTS_V1 = Genotype((
    ("relu", 0), ("relu", 1), ("tanh", 2), ("relu", 3), ("relu", 4), ("identity", 1), ("relu", 5), ("relu", 1),
), CONCAT)  # fmt: skip

# This cell was found by the second-order (unrolled) search on Penn Treebank.
DARTS_V2 = Genotype((
    ("sigmoid", 0), ("relu", 1), ("relu", 1), ("identity", 1), ("tanh", 2), ("sigmoid", 5), ("tanh", 3), ("relu", 5),
), CONCAT)  # fmt: skip

DARTS = DARTS_V2
BASELINES = ("LSTM", "GRU")  # These are torch's own cells, which train.py accepts as well as genotypes.


def named_cells() -> dict[str, Genotype]:
    """Returns every cell that this module assigns to a name, the ones that a person added among them."""
    return {name: value for name, value in globals().items() if isinstance(value, Genotype)}


def validate(genotype: Genotype) -> None:
    """Raises `GenotypeError` unless the genotype describes a cell that can be built: 1 to `MAX_NODES` nodes, where the
    op of node i is a primitive other than none and its predecessor an int in 0..i-1, and in concat at least one of the
    ints 1..N, none twice."""
    recurrent, concat = genotype
    if not isinstance(recurrent, list | tuple):
        raise GenotypeError(f"recurrent must be a list of (op, predecessor), not {_short(recurrent)}")
    if not 1 <= len(recurrent) <= MAX_NODES:
        raise GenotypeError(f"a genotype has 1 to {MAX_NODES} nodes, this one has {len(recurrent)}")
    for i, node in enumerate(recurrent, start=1):
        if not isinstance(node, list | tuple) or len(node) != 2:
            raise GenotypeError(f"node {i} must be (op, predecessor), not {_short(node)}")
        op, j = node
        if op not in PRIMITIVES[1:]:
            raise GenotypeError(f"node {i}: op {_short(op)} is not one of {', '.join(PRIMITIVES[1:])}")
        if type(j) is not int or not 0 <= j < i:
            raise GenotypeError(f"node {i}: predecessor must be an integer in 0..{i - 1}, not {_short(j)}")
    if not isinstance(concat, list | tuple | range) or not concat:
        raise GenotypeError(f"concat must be a list of at least one node, not {_short(concat)}")
    seen = set()
    for j in concat:  # The loop stops at the first bad entry, so that range(1, 10**9) costs nothing.
        if type(j) is not int or not 1 <= j <= len(recurrent):
            raise GenotypeError(f"concat: nodes are integers in 1..{len(recurrent)}, not {_short(j)}")
        if j in seen:
            raise GenotypeError(f"concat: node {j} appears twice")
        seen.add(j)


def parse(text: str) -> Genotype:
    """Returns the genotype that a text describes; nothing is evaluated. Raises `GenotypeError`. The text has at most
    `MAX_TEXT` characters and is JSON for `from_json`, or it ends with a literal with lists or tuples and with or
    without keywords, such as `genotype = Genotype(recurrent=[('relu', 0), ...], concat=range(1, 9))`; what precedes the
    last `Genotype(`, as in a line of a log, is ignored."""
    if len(text) > MAX_TEXT:
        raise GenotypeError(f"a genotype's text has at most {MAX_TEXT:,} characters, not {len(text):,}")
    text = text.strip()
    if text.startswith("{"):
        return _parse_json(text)
    starts = [match.start() for match in CALL.finditer(text)]
    return _parse_literal(text[starts[-1] if starts else 0 :])


def to_json(genotype: Genotype) -> dict[str, Any]:
    """Returns `{"recurrent": [["relu", 0], ...], "concat": [1, ...]}`, in which all sequences are lists."""
    return {"recurrent": [list(node) for node in genotype.recurrent], "concat": list(genotype.concat)}


def from_json(obj: Any) -> Genotype:
    """Returns the genotype that `to_json` turned into `obj`, or into the value of its key "genotype", as a search
    writes it to genotype.json; other keys are ignored. Raises `GenotypeError`."""
    if isinstance(obj, dict) and "recurrent" not in obj:
        obj = obj.get("genotype")
    if not isinstance(obj, dict) or not {"recurrent", "concat"} <= obj.keys():
        raise GenotypeError('a genotype in JSON is an object with the keys "recurrent" and "concat"')
    return _build(obj["recurrent"], obj["concat"])


def random_genotype(seed: int, steps: int = STEPS) -> Genotype:
    """Returns a random cell of `steps` nodes, uniform over ops other than none and over predecessors, with every node
    in concat, as random search samples them (the paper's baseline; Li & Talwalkar, UAI 2019). Raises `GenotypeError`
    for steps outside 1..MAX_NODES."""
    if not 1 <= steps <= MAX_NODES:
        raise GenotypeError(f"a genotype has 1 to {MAX_NODES} nodes, not {steps}")
    rng = random.Random(seed)
    nodes = range(1, steps + 1)
    return Genotype(tuple((rng.choice(PRIMITIVES[1:]), rng.randrange(i)) for i in nodes), tuple(nodes))


def resolve(arch: str, note: Callable[[str], Any] = lambda line: None) -> Genotype:
    """Returns the genotype that the value of `--arch` specifies: the name of a cell of this module, `random:SEED`, a
    run directory with a genotype.json, a file (UTF-8), or a text for `parse`. Raises `GenotypeError`. A file is JSON,
    Python source or any other text; of several genotypes in it the last is taken, and `note` is called with a line that
    says which."""
    cells = named_cells()
    if arch in cells:
        try:
            return _build(*cells[arch])
        except GenotypeError as error:
            raise GenotypeError(f"{arch} in genotypes.py: {error}") from error
    if arch.startswith("random:"):
        if not re.fullmatch(r"random:[0-9]{1,18}", arch):
            raise GenotypeError(f"random:SEED takes a whole number of 1 to 18 digits, not {_short(arch[7:])}")
        return random_genotype(int(arch[7:]))
    # For a text that is too long to be a path, os.path's tests return False, whereas pathlib's may raise.
    if os.path.isdir(arch):
        path, config, log = (os.path.join(arch, name) for name in ("genotype.json", "config.json", "log.txt"))
        if not os.path.exists(path):
            none = f"no genotype.json in {_short(arch, 200)}"
            if os.path.exists(config):
                raise GenotypeError(f"{none}: it is a run of train.py, or a search that has not moved its alphas yet")
            if os.path.exists(log):  # a run of the published code
                raise GenotypeError(f"{none}; name its log instead: {log}")
        return _read(path, note)
    if os.path.isfile(arch) or (arch.endswith((".json", ".txt", ".py", ".log")) and "\0" not in arch):
        return _read(arch, note)
    if "(" in arch or arch.lstrip().startswith("{"):
        if (count := len(CALL.findall(arch))) > 1:
            note(f"the text holds {count} genotypes; the last is taken")
        return parse(arch)
    near = difflib.get_close_matches(arch[:40].upper(), cells, n=1)
    raise GenotypeError(
        f"unknown genotype {_short(arch)}"
        + (f", did you mean {near[0]}?" if near else "")
        + f" (a name: {', '.join(cells)}; {' or '.join(BASELINES)} in train.py; random:SEED; a run directory with"
        + " genotype.json; a .json, .txt, .py or log file; or the text Genotype(recurrent=[...], concat=[...]))"
    )


def resolve_cell(arch: str, note: Callable[[str], Any] = lambda line: None) -> Genotype | str:
    """Returns the cell that the value of train.py's `--arch` specifies: the name of a baseline in capitals, which may
    be given in any case, else the genotype that `resolve` returns. Raises `GenotypeError`."""
    return arch.upper() if arch.upper() in BASELINES else resolve(arch, note)


def cell_to_json(cell: Genotype | str) -> dict[str, Any] | str:
    """Returns what `to_json` makes of a genotype, or the name of a baseline unchanged."""
    return cell if isinstance(cell, str) else to_json(cell)


def cell_from_json(obj: Any) -> Genotype | str:
    """Returns the cell that `cell_to_json` turned into `obj`. Raises `GenotypeError`."""
    return obj if isinstance(obj, str) and obj in BASELINES else from_json(obj)


def _read(path: str, note: Callable[[str], Any]) -> Genotype:
    name, limit = _short(path, 200), MAX_FILE if path.endswith((".json", ".py")) else MAX_LOG
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise GenotypeError(f"cannot read {name}: {error.strerror}") from error
    if len(data) > limit:
        raise GenotypeError(f"{name} is over {limit:,} bytes, too long for a genotype")
    try:
        text = data.decode("utf-8")
        if path.endswith(".json") or text.lstrip().startswith("{"):
            return _parse_json(text)
        return _last(text, path.endswith(".py"), name, note)
    except UnicodeDecodeError as error:
        remedy = "; name the directory of the search, not a checkpoint" if path.endswith(".pt") else ""
        raise GenotypeError(f"{name} is not UTF-8{remedy}") from error
    except GenotypeError as error:
        raise GenotypeError(f"{name}: {error}") from error


def _last(text: str, is_python: bool, name: str, note: Callable[[str], Any]) -> Genotype:
    """Returns the last genotype in the text of a file with this name."""
    candidates = (_assigned(text) if is_python else None) or _written(text)
    if not candidates:
        raise GenotypeError("holds no whole Genotype(recurrent=[...], concat=[...])")
    line, literal = candidates[-1]
    if len(candidates) > 1:
        note(f"{name} holds {len(candidates)} genotypes; the last is taken, of line {line}")
    try:
        return parse(literal)
    except GenotypeError as error:
        raise GenotypeError(f"line {line}: {error}") from error


def _assigned(source: str) -> list[tuple[int, str]] | None:
    """Returns line and text of each genotype that Python source assigns to a name, outside of functions and classes;
    None for a text that is no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body = ast.parse(source).body
            values = [node.value for node in body if isinstance(node, ast.Assign | ast.AnnAssign)]
            return [(value.lineno, ast.unparse(value)) for value in values if _calls(value, "Genotype")]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _written(text: str) -> list[tuple[int, str]]:
    """Returns line and text of each genotype in any text. One without its closing bracket, such as the last line of a
    log that was cut off, is left out."""
    literals, line, position = [], 1, 0
    for match in WHOLE.finditer(text):
        line += text.count("\n", position, match.start())
        position = match.start()
        literals.append((line, match[0]))
    return literals


def _parse_json(text: str) -> Genotype:
    try:
        obj = json.loads(text)
    except ValueError as error:
        raise GenotypeError(f"not JSON: {error}") from error
    except RecursionError as error:
        raise GenotypeError("not a genotype: nested too deeply") from error
    return from_json(obj)


def _parse_literal(text: str) -> Genotype:
    try:
        with warnings.catch_warnings():  # Invalid escapes in the text must not print warnings.
            warnings.simplefilter("ignore")
            call = ast.parse(text, mode="eval").body
        if not _calls(call, "Genotype"):
            raise GenotypeError(f"expected Genotype(recurrent=[...], concat=[...]), not {_short(text)}")
        fields = list(zip(Genotype._fields, map(_literal, call.args), strict=False))
        fields += [(keyword.arg, _literal(keyword.value)) for keyword in call.keywords]
    except GenotypeError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        why = getattr(error, "msg", None) or "nested too deeply, or with characters that no genotype has"
        raise GenotypeError(f"cannot read {_short(text)}: {why}") from error
    if len(call.args) > 2 or sorted(str(name) for name, _ in fields) != ["concat", "recurrent"]:
        raise GenotypeError("Genotype takes recurrent and concat, each once, and nothing else")
    return _build(**dict(fields))


def _literal(node: ast.expr) -> Any:
    """Returns the value of a tree of ints, strings, lists, tuples and `range`, in which lists become tuples; raises
    `GenotypeError` for any other tree."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, str):
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        return tuple(map(_literal, node.elts))
    if _calls(node, "range") and not node.keywords:
        try:
            return range(*map(_literal, node.args))
        except (TypeError, ValueError):
            pass  # Bounds that range() does not accept are reported below.
    what = _short(ast.unparse(node))
    raise GenotypeError(f"a genotype's text holds strings, whole numbers, lists and range(), not {what}")


def _calls(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def _build(recurrent: Any, concat: Any) -> Genotype:
    validate(Genotype(recurrent, concat))
    return Genotype(tuple((op, j) for op, j in recurrent), tuple(concat))


def _short(value: Any, limit: int = 60) -> str:
    """Returns the repr of a value, cut to `limit` characters, or its type's name if it has no repr, such as an int of
    thousands of digits."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        text = f"<{type(value).__name__}>"
    return text if len(text) <= limit else text[: limit - 3] + "..."
