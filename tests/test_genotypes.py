"""Genotypes match the papers and round-trip in every format, and malformed input is rejected without being run."""

import json
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import genotypes
from genotypes import Genotype, GenotypeError, from_json, parse, random_genotype, resolve, to_json, validate

OPS = ["tanh", "relu", "sigmoid", "identity"]


@st.composite
def cells(draw):
    """Generates any valid genotype without the code under test."""
    n = draw(st.integers(1, 64))
    recurrent = tuple((draw(st.sampled_from(OPS)), draw(st.integers(0, i))) for i in range(n))
    concat = draw(st.lists(st.integers(1, n), min_size=1, unique=True))
    return Genotype(recurrent, tuple(concat))


def error_message(call, *args) -> str:
    """Returns the message of the GenotypeError that the call must raise, after checking that it is one line."""
    with pytest.raises(GenotypeError) as caught:
        call(*args)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 500
    return message


def test_published_cells_match_the_papers():
    every = "1 2 3 4 5 6 7 8"
    spelled = {
        "DARTS_V1": ("relu 0, relu 1, tanh 2, relu 3, relu 4, identity 1, relu 5, relu 1", every),
        "DARTS_V2": ("sigmoid 0, relu 1, relu 1, identity 1, tanh 2, sigmoid 5, tanh 3, relu 5", every),
        "ENAS": (
            "tanh 0, tanh 1, relu 1, tanh 3, tanh 3, relu 3, relu 4, relu 7, relu 8, relu 8, relu 8",
            "2 5 6 9 10 11",
        ),
    }
    spelled["DARTS"] = spelled["DARTS_V2"]
    assert set(genotypes.named_cells()) == set(spelled)
    for name, (nodes, concat) in spelled.items():
        cell = getattr(genotypes, name)
        assert cell == genotypes.named_cells()[name] == resolve(name)
        assert ", ".join(f"{op} {j}" for op, j in cell.recurrent) == nodes
        assert " ".join(map(str, cell.concat)) == concat
        validate(cell)
    assert genotypes.PRIMITIVES == ("none", "tanh", "relu", "sigmoid", "identity")
    assert genotypes.STEPS == 8 and genotypes.CONCAT == (1, 2, 3, 4, 5, 6, 7, 8)


@settings(max_examples=50)
@given(cells())
def test_every_format_round_trips(cell):
    as_json = json.dumps(to_json(cell))
    positional = f"Genotype({cell.recurrent!r}, {cell.concat!r})"
    lists = f"Genotype(concat={list(cell.concat)}, recurrent={[list(node) for node in cell.recurrent]})"
    for text in (str(cell), repr(cell), as_json, positional, lists, f"\n  {cell} \n"):
        for back in (parse(text), resolve(text)):
            assert back == cell and hash(back) == hash(cell) and type(back) is Genotype
    assert from_json(json.loads(as_json)) == cell
    assert from_json({"genotype": to_json(cell), "epoch": 3, "probabilities": [[0.2] * 5]}) == cell
    assert from_json({**to_json(cell), "note": "kept out"}) == cell


def test_str_has_the_published_format():
    cell = Genotype((("sigmoid", 0), ("relu", 1)), (1, 2))
    assert str(cell) == repr(cell) == "Genotype(recurrent=[('sigmoid', 0), ('relu', 1)], concat=[1, 2])"
    assert parse("Genotype(recurrent=[('sigmoid', 0), ('relu', 1)], concat=range(1, 3))") == cell
    assert str(Genotype([("relu", 0)], range(1, 2))) == "Genotype(recurrent=[('relu', 0)], concat=[1])"


def test_resolve_reads_runs_and_files(tmp_path):
    cell = random_genotype(5)
    run = tmp_path / "a run (1)"
    run.mkdir()
    assert "genotype.json" in error_message(resolve, str(run))
    written = {"genotype": to_json(cell), "epoch": 50, "probabilities": [[0.2] * 5] * 36}
    (run / "genotype.json").write_text(json.dumps(written, indent=4))
    assert resolve(str(run)) == resolve(f"{run}/") == resolve(str(run / "genotype.json")) == cell

    path = tmp_path / "cell.json"
    assert "cell.json" in error_message(resolve, str(path))
    for content in (b"", b"\xff\xfe", b"{", b"[1]", b"[" * 500_000, b'{"a": 1}', b" " * 1_000_001):
        path.write_bytes(content)
        assert "cell.json" in error_message(resolve, str(path))
    path.write_text(json.dumps(to_json(cell)) + " " * 900_000)
    assert resolve(str(path)) == cell


def test_resolve_reads_names_and_random_seeds():
    assert resolve("random:7") == random_genotype(7)
    assert "did you mean DARTS_V2?" in error_message(resolve, "darts_v2")
    message = error_message(resolve, "LSTM")
    for form in ("ENAS", "DARTS_V1", "DARTS_V2", "random:SEED", ".json", "Genotype("):
        assert form in message
    for seed in ("", "x", "-1", "1.5", "٣", "9" * 19):
        error_message(resolve, f"random:{seed}")
    for arch in ("", " ", "\0", "\0.json", "a" * 100_000, "a/" * 3_000 + "b.json", "Genotype" + "(" * 30_000):
        error_message(resolve, arch)


BAD_CELLS = {
    "no node": ([], [1]),
    "too many nodes": ([("relu", 0)] * 65, [1]),
    "none": ([("none", 0)], [1]),
    "unknown op": ([("gelu", 0)], [1]),
    "op not a string": ([(0, 0)], [1]),
    "op unhashable": ([([], 0)], [1]),
    "predecessor is itself": ([("relu", 1)], [1]),
    "predecessor ahead": ([("relu", 0), ("relu", 2)], [1]),
    "predecessor negative": ([("relu", -1)], [1]),
    "predecessor a bool": ([("relu", 0), ("relu", True)], [1]),
    "predecessor a float": ([("relu", 0.0)], [1]),
    "predecessor a string": ([("relu", "0")], [1]),
    "predecessor huge": ([("relu", 16**5000)], [1]),
    "node too short": ([("relu",)], [1]),
    "node too long": ([("relu", 0, 0)], [1]),
    "node a string": (["ab"], [1]),
    "nodes a string": ("ab", [1]),
    "nodes a number": (3, [1]),
    "nodes missing": (None, [1]),
    "concat empty": ([("relu", 0)], []),
    "concat missing": ([("relu", 0)], None),
    "concat a number": ([("relu", 0)], 1),
    "concat a string": ([("relu", 0)], "1"),
    "concat has s_0": ([("relu", 0)], [0, 1]),
    "concat beyond": ([("relu", 0)], [2]),
    "concat a bool": ([("relu", 0)], [True]),
    "concat a float": ([("relu", 0)], [1.0]),
    "concat twice": ([("relu", 0)], [1, 1]),
    "concat a huge range": ([("relu", 0)], range(1, 10**30)),
}


@pytest.mark.parametrize("case", BAD_CELLS)
def test_invalid_cells_are_rejected_in_every_format(case):
    recurrent, concat = BAD_CELLS[case]
    error_message(validate, Genotype(recurrent, concat))
    error_message(from_json, {"recurrent": recurrent, "concat": concat})
    if case != "predecessor huge":  # Python refuses to write this number as decimal text.
        error_message(parse, f"Genotype(recurrent={recurrent!r}, concat={concat!r})")


BAD_TEXTS = [
    "",
    "Genotype",
    "Genotype()",
    "Genotype(",
    "Genotype([('relu', 0)])",
    "Genotype([('relu', 0)], [1], [2])",
    "Genotype([('relu', 0)], recurrent=[('relu', 0)])",
    "Genotype([('relu', 0)], [1], concat=[1])",
    "Genotype(recurrent=[('relu', 0)], concat=[1], concat=[1])",
    "Genotype(recurrent=[('relu', 0)], concat=[1], normal=[1])",
    "Genotype([('relu', 0)], [1]).recurrent",
    "Genotype([('relu', 0)], [1]); 1",
    "Genotype(*[[('relu', 0)], [1]])",
    "Genotype(**{'recurrent': [('relu', 0)], 'concat': [1]})",
    "Genotip([('relu', 0)], [1])",
    "list([('relu', 0)], [1])",
    "(lambda: 1)()",
    "Genotype([('relu', 0)], {1})",
    "Genotype([(b'relu', 0)], [1])",
    "Genotype([(f'relu', 0)], [1])",
    "Genotype([('relu', 0)], [n for n in (1,)])",
    "Genotype([('relu', 1 - 1)], [1])",
    "Genotype([('relu', 0)], range())",
    "Genotype([('relu', 0)], range(1, 2, 0))",
    "Genotype([('relu', 0)], range(1, 2, 3, 4))",
    "Genotype([('relu', 0)], range('1', 2))",
    "Genotype([('relu', 0)], range(1, stop=2))",
    "Genotype([('relu', 0)], range([1], 2))",
    "Genotype([('relu', 0)], range(10**9))",
    "Genotype([('relu', 0)], range(1, 1000000000))",
    "Genotype(range(1), [1])",
    "Genotype([range(2)], [1])",
    "Genotype([('relu', 0x" + "f" * 10_000 + ")], [1])",
    "Genotype([('relu', 0)], -0x" + "f" * 10_000 + ")",
    "Genotype([('relu', " + "1" * 5_000 + ")], [1])",
    "Genotype(" + "[" * 80 + "]" * 80 + ", [1])",
    "Genotype(" + "(" * 9_000,
    "Genotype(" + "-" * 15_000 + "1, [1])",
    "Genotype(" + "1+" * 9_000 + "1, [1])",
    "Genotype(" + "a." * 9_000 + "a, [1])",
    "Genotype(" + "lambda:" * 2_500 + "1, [1])",
    "Genotype(" + "not " * 4_500 + "1, [1])",
    "Genotype([('re\nlu', 0)], [1])",
    "Genotype([('relu\\n\\u2028', 0)], [1])",
    "Genotype([('\\d', 0)], [1])",
    "Genotype\0([('relu', 0)], [1])",
    "Genotype([('relu', 0)], [1]) # \ud800",
    "Genotype([('relu', 0)], [1])" + " " * 20_000,
    "{",
    "{}",
    '{"recurrent": ' + "[" * 19_000,
    '{"recurrent": [["relu", ' + "1" * 5_000 + ']], "concat": [1]}',
    '{"recurrent": [["relu", NaN]], "concat": [1]}',
    '{"recurrent": [["relu", 0]]}',
    '{"genotype": {"genotype": {"recurrent": [["relu", 0]], "concat": [1]}}}',
]


@pytest.mark.parametrize("text", BAD_TEXTS, ids=range(len(BAD_TEXTS)))
def test_parse_rejects_malformed_texts(text):
    error_message(parse, text)


@settings(max_examples=150)
@given(st.text(max_size=80), st.sampled_from(["{}", "{{{}", "Genotype({})", "Genotype([('relu', 0)], {})"]))
def test_any_text_gives_a_genotype_or_a_one_line_error(text, frame):
    for call in (parse, resolve):
        try:
            validate(call(frame.format(text)))
        except GenotypeError as error:
            assert len(str(error).splitlines()) == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(OPS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=100)
@given(json_values, json_values)
def test_any_json_gives_a_genotype_or_a_one_line_error(left, right):
    for obj in (left, {"genotype": left}, {"recurrent": left, "concat": right}):
        try:
            validate(from_json(obj))
        except GenotypeError as error:
            assert len(str(error).splitlines()) == 1


def test_parse_and_resolve_execute_no_code(tmp_path):
    touched = tmp_path / "touched"
    act = f"open({str(touched)!r}, 'w')"
    for text in (
        f"Genotype({act}, [1])",
        f"Genotype([('relu', 0)], {act})",
        f"Genotype([('relu', 0)], range({act}))",
        f"Genotype([('relu', [{act}])], concat=[1])",
        f"Genotype([('relu', 0)], f'{{{act}}}')",
        f"{act}(recurrent=[('relu', 0)], concat=[1])",
        f"(lambda Genotype: Genotype)({act})",
    ):
        error_message(parse, text)
        error_message(resolve, text)
    assert not touched.exists()


def test_random_genotype_is_uniform_and_reproducible():
    samples = [random_genotype(seed) for seed in range(2_000)]
    assert samples == [random_genotype(seed) for seed in range(2_000)] and len(set(samples)) > 1_990
    for i in range(8):
        for column, values in ((0, OPS), (1, range(i + 1))):
            counts = Counter(cell.recurrent[i][column] for cell in samples)
            assert set(counts) == set(values)
            expected = len(samples) / len(values)
            chi2 = sum((count - expected) ** 2 / expected for count in counts.values())
            freedom = len(values) - 1
            # Chi-squared has mean k and variance 2k; 3 is added to five standard deviations for the long tail.
            assert chi2 <= freedom + 5 * math.sqrt(2 * freedom) + 3
    assert all(cell.concat == tuple(range(1, 9)) for cell in samples)


@pytest.mark.parametrize("steps", [1, 64])
def test_random_genotype_has_the_requested_number_of_nodes(steps):
    cell = random_genotype(0, steps)
    validate(cell)
    assert len(cell.recurrent) == len(cell.concat) == steps
    assert cell == random_genotype(0, steps=steps) != random_genotype(1, steps)


@pytest.mark.parametrize("steps", [0, -1, 65, 10**9])
def test_random_genotype_rejects_invalid_numbers_of_nodes(steps):
    error_message(random_genotype, 0, steps)


# --- cells of people who come from the published code ---

CELL = Genotype((("sigmoid", 0), ("relu", 1), ("tanh", 1)), (1, 2, 3))
LITERAL = "Genotype(recurrent=[('sigmoid', 0), ('relu', 1), ('tanh', 1)], concat=range(1, 4))"
OTHER = "Genotype(recurrent=[('tanh', 0)], concat=range(1, 2))"


@pytest.mark.parametrize("text", [
    f"MINE = {LITERAL}",
    f"genotype = {LITERAL}",
    f"11/26 06:37:01 PM {LITERAL}",
    f"11/26 06:37:01 PM Genotype: {LITERAL}",
    f"  found (at last) {LITERAL}\n",
    f"{OTHER}\n{LITERAL}",
    f"{OTHER} {LITERAL}",
    LITERAL.replace(", (", ",\n  ("),
])  # fmt: skip
def test_text_before_the_last_genotype_is_ignored(text):
    assert parse(text) == resolve(text) == CELL


@pytest.mark.parametrize("name", ["log.txt", "log", "cells.py", "a.log", "genotype.json.bak"])
@pytest.mark.parametrize("cut", [False, True])
def test_last_whole_genotype_of_a_file_is_taken_and_a_line_says_which(name, cut, tmp_path):
    path, lines = tmp_path / name, []
    text = f"import os\nFIRST = {OTHER}\n\nSECOND = {LITERAL}\n# end\n" + cut * "THIRD = Genotype(recurrent=[('relu'"
    path.write_text(text)
    assert resolve(str(path), lines.append) == resolve(str(path)) == CELL
    assert lines == [f"'{path}' holds 2 genotypes; the last is taken, of line 4"]
    path.write_text(f"epoch 1 | ppl 3.5 | {LITERAL} | done")
    assert resolve(str(path), lines.append) == CELL and len(lines) == 1  # There is no choice to tell.


def test_python_source_is_read_for_its_assignments_alone(tmp_path):
    path, touched = tmp_path / "genotypes.py", tmp_path / "touched"
    path.write_text(
        f'"""For instance {OTHER}."""\nfrom collections import namedtuple\nGenotype = namedtuple("Genotype", "a b")\n'
        f"open({str(touched)!r}, 'w')\nMINE = {LITERAL}\nTHEIRS: Genotype = {LITERAL}\n# {OTHER}\n"
    )
    lines = []
    assert resolve(str(path), lines.append) == CELL
    assert not touched.exists() and "2 genotypes; the last is taken, of line 6" in lines[0]


@pytest.mark.parametrize(("text", "message"), [
    ("", "holds no whole Genotype("),
    ("Genotype(recurrent=[('relu', 0)", "holds no whole Genotype("),
    (f"{LITERAL}\nGenotype(recurrent=[('sine', 0)], concat=[1])", "line 2: node 1: op 'sine'"),
    (f"{LITERAL}\nGenotype(normal=[('skip', 0)], reduce=[1])", "line 2: Genotype takes recurrent and concat"),
    ("X = Genotype(open('touched', 'w'), [1])", "line 1: a genotype's text holds"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["a.txt", "a.py"])
def test_file_without_a_usable_genotype_is_named_with_its_line(text, message, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(text)
    error = error_message(resolve, name)
    assert name in error and message in error and [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("part", ["Genotype(", "Genotype()", "Genotype((", "Genotype([", "(", "Genotype(("])
def test_long_files_are_read_in_linear_time(part, tmp_path):
    """A search that took quadratic time would run for hours on these."""
    path = tmp_path / "log.txt"
    path.write_text(part * 300_000)
    error_message(resolve, str(path))
    path.write_text("x " * 1_000_000 + LITERAL)
    assert resolve(str(path)) == CELL


@settings(max_examples=100)
@given(st.lists(cells(), min_size=1, max_size=4), st.text(st.characters(exclude_characters="(){"), max_size=30))
def test_any_cells_between_any_texts_are_found(tmp_path_factory, several, between):
    path = tmp_path_factory.mktemp("any") / "log.txt"
    path.write_text("-" + between.join(f" {cell} " for cell in several) + between, encoding="utf-8", newline="")
    assert resolve(str(path)) == several[-1]


def test_directory_of_the_published_code_names_its_log(tmp_path):
    (tmp_path / "log.txt").write_text(f"11/26 06:37:01 PM {LITERAL}\n")
    error = error_message(resolve, str(tmp_path))
    assert error.endswith(f"name its log instead: {tmp_path}/log.txt")
    assert resolve(f"{tmp_path}/log.txt") == CELL


def test_cell_added_by_hand_is_found_by_its_name(monkeypatch):
    """As the published README says, and with the lists and the range of the published format."""
    monkeypatch.setattr(genotypes, "MINE", Genotype(recurrent=[("relu", 0), ("tanh", 1)], concat=range(1, 3)), False)
    cell = resolve("MINE")
    assert cell == Genotype((("relu", 0), ("tanh", 1)), (1, 2)) and hash(cell)
    assert "did you mean MINE?" in error_message(resolve, "mine")
    monkeypatch.setattr(genotypes, "WRONG", Genotype(recurrent=[("relu", 1)], concat=range(1, 2)), False)
    assert "WRONG in genotypes.py: node 1: predecessor" in error_message(resolve, "WRONG")
