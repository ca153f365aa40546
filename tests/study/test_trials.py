"""A study from its plan to its leaderboard, and whatever is killed on the way."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import mean

import pytest
import torch
from helpers import ROOT, wait_for, write_corpus

import train
import train_search
import trials
from data import load_corpus, segments
from experiment import metrics, startup, validate_arguments
from experiment.metrics import EVENTS, events
from genotypes import random_genotype
from study import arguments, cost, leaderboard, ray_backend
from study.design import Study, distinct
from study.jobs import Job
from study.stats import kendall
from utils import RunError

SCRIPTS = {"train.py": train, "train_search.py": train_search}
SIZES = "--emsize 8 --batch_size 4 --bptt 6 --lr 1 --log_interval 100 --device cpu --engine eager"
SMALL = (
    "--baselines LSTM --full_epochs 3 --proxy_cells DARTS_V1 ENAS --proxy_epochs 1 --proxy_reference 2 --proxy_seeds 2 "
    "--methods first unrolled random --seeds 2 --random_cells 2 --search_epochs 1 --select_epochs 2 --top 2"
).split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), train=40, valid=16, test=16)


def flags(corpus, folder, *more):
    # with initial weights and a norm under which the four searches find four cells
    sizes = ("--train_flags", SIZES, "--search_flags", f"{SIZES} --norm batch --init_range 0.04 --arch_lr 0.003")
    return ["--study", str(folder), "--data", str(corpus), *sizes, *SMALL, *map(str, more)]


class Alone:
    """In the place of Ray: one job after the other, in this process. Knows the jobs that it ran, and fails some."""

    def __init__(self):
        self.ran, self.fails = [], set()

    def run_all(self, todo, study, share, parallel, retries, board, halving=0):
        for job in todo:
            if board.reason():
                return
            board.started(job)
            if job.name in self.fails:
                Path(study, job.name).mkdir(parents=True, exist_ok=True)
                Path(study, f"{job.name}.out").write_text("error: it was to fail\n")
                board.failed(job)
                continue
            if not job.is_done(study):
                script, *given = job.command(study)
                assert SCRIPTS[Path(script).name].main(given) == 0
                self.ran.append(job.name)
            for row in metrics.epochs(study / job.name):
                board.epoch(job, row["epoch"], row["valid_ppl"], row["seconds"])
            board.ended(job)


@contextmanager
def in_the_place_of_ray():
    """With one thread, as a trial has."""
    threads, stand_in = torch.get_num_threads(), Alone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_backend, "connected", lambda address: nullcontext())
        patch.setattr(ray_backend, "max_concurrent_trials", lambda share: 2)
        patch.setattr(ray_backend, "has_gpus", lambda: False)
        patch.setattr(ray_backend, "run_all", stand_in.run_all)
        torch.set_num_threads(1)
        yield stand_in
    torch.set_num_threads(threads)


@pytest.fixture
def alone():
    with in_the_place_of_ray() as stand_in:
        yield stand_in


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A study that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "study"
    with in_the_place_of_ray():
        assert trials.main(["run", *flags(corpus, folder)]) == 0
    return folder


def board_of(folder):
    """leaderboard.json without what tells the time."""
    found = json.loads((folder / "leaderboard.json").read_text())
    found["cost"] = [row["runs"] for row in found["cost"]]
    for row in found["proxies"]:
        del row["cost"], row["recommended"]
    return found


# --- the whole ---


def test_a_study_ends_with_a_leaderboard(whole):
    found = board_of(whole)
    assert len(found["cells"]) == 6
    assert {m["method"]: m["n"] for m in found["methods"]} == {"first": 2, "unrolled": 2, "random": 2}
    assert found["searched_against_random"]["searched"] == 4
    assert [a["n"] for a in found["agreement"]] == [4, 2]
    assert [b["cell"] for b in found["baselines"]] == ["LSTM"]
    assert len(found["baselines"][0]["curve"]) == 3
    assert found["failures"] == []
    assert found["stopped"] == {}

    best = min(found["cells"], key=lambda row: row["retrain"] or 1e9)
    assert found["cells"][0] == best
    assert found["chosen"]["cell"] == best["cell"]
    assert found["chosen"]["valid_ppl"] == best["retrain"]
    retrained = {row["cell"] for row in found["cells"] if row["retrain"] is not None}
    assert retrained == {row["cell"] for row in sorted(found["cells"], key=lambda row: row["select"])[:2]}
    for method in found["methods"]:
        values = [row["select"] for row in found["cells"] if row["cell"].startswith(method["method"])]
        assert method["mean"] == pytest.approx(mean(values))


def test_the_test_text_is_read_once(whole):
    read = [path for path in whole.glob("**/result.json") if json.loads(path.read_text())["test_ppl"] is not None]
    chosen = board_of(whole)["chosen"]
    assert read == [whole / chosen["run"] / "result.json"]
    assert chosen["test_ppl"] > 1


def test_selection_never_sees_the_text_of_the_alphas(whole):
    for path in whole.glob("search/*/*/config.json"):
        assert json.loads(path.read_text())["flags"]["search_split"] == "train"
    assert len(list(whole.glob("search/*/*/config.json"))) == 4


def test_every_cell_has_the_same_budget(whole):
    budgets = [json.loads(path.read_text())["flags"] for path in whole.glob("select/*/*/config.json")]
    assert len(budgets) == 6
    alike = [{k: v for k, v in budget.items() if k not in ("arch", "save")} for budget in budgets]
    assert all(other == alike[0] for other in alike)
    assert len({budget["arch"] for budget in budgets}) == 6


def test_the_files_for_programs(whole):
    with open(whole / "leaderboard.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["cell"] for row in table] == [row["cell"] for row in board_of(whole)["cells"]]
    assert float(table[0]["select"]) == board_of(whole)["cells"][0]["select"]
    text = (whole / "leaderboard.md").read_text()
    for part in ("# Leaderboard", "two-sided permutation test", "## Proxies", "## Cost", "core-hours", "Genotype("):
        assert part in text


def copy_without(whole, folder, *parts):
    """The same study, left before these parts of it were done."""
    shutil.copytree(whole, folder)
    for part in parts:
        shutil.rmtree(folder / part)
    for name in ("leaderboard.json", "leaderboard.csv", "leaderboard.md", "lock"):
        (folder / name).unlink()
    kept = [event for event in events(folder) if (folder / event["trial"] / "result.json").exists()]
    (folder / EVENTS).write_text("".join(json.dumps(event) + "\n" for event in kept))
    return folder


@pytest.fixture
def left(whole, tmp_path):
    """The same study, left in the middle of its selection."""
    return copy_without(whole, tmp_path / "study", "retrain", "select/random-1", "select/unrolled-2", "select/first-2")


def test_a_study_goes_on_where_it_was_left(whole, left, alone):
    assert trials.main(["run", "--resume", "--study", str(left)]) == 0
    names = [name.split("/")[0] for name in alone.ran]
    assert names == ["select"] * 3 + ["retrain"] * 2 + ["retrain"]  # the last reads the test text
    assert board_of(left) == board_of(whole)


def test_an_interrupted_study_says_how_to_go_on(left, alone, monkeypatch, capsys):
    """Ray obeys Ctrl-C by ending its trials, and returns."""
    monkeypatch.setattr(ray_backend, "run_all", lambda *_: None)
    assert trials.main(["run", "--resume", "--study", str(left)]) == 130
    assert f"python trials.py run --resume --study {left}" in capsys.readouterr().out


def test_stage_by_stage_is_the_same(whole, corpus, tmp_path, alone):
    for stage in ("search", "select", "retrain", "baseline", "proxy", "report"):
        given = flags(corpus, tmp_path / "study") if stage == "search" else ["--study", str(tmp_path / "study")]
        assert trials.main([stage, *given]) == 0
    assert board_of(tmp_path / "study") == board_of(whole)


# --- what ends early ---


def test_what_fails_is_left_out_and_told_until_it_is_done(whole, left, alone):
    alone.fails = {"select/random-1/1"}
    assert trials.main(["run", "--resume", "--study", str(left)]) == 0
    found = board_of(left)
    assert found["failures"] == [{"trial": "select/random-1/1", "reason": "error: it was to fail"}]
    assert {m["method"]: m["n"] for m in found["methods"]} == {"first": 2, "unrolled": 2, "random": 1}
    assert found["searched_against_random"]["left_out"] == ["random-1"]
    assert "Left out, as no short training of theirs ended: random-1." in (left / "leaderboard.md").read_text()

    alone.fails = set()
    assert trials.main(["select", "--resume", "--study", str(left)]) == 0
    assert trials.main(["report", "--study", str(left)]) == 0
    found = board_of(left)
    assert found["failures"] == []
    assert found["methods"] == board_of(whole)["methods"]


def test_too_many_failures_end_a_study(corpus, tmp_path, alone, capsys):
    alone.fails = {"search/first/1", "search/first/2"}
    assert trials.main(["run", *flags(corpus, tmp_path / "study")]) == 1
    assert board_of(tmp_path / "study")["stopped"] == {"search": "failures"}
    assert "search stopped: too many trials failed" in capsys.readouterr().out
    assert not (tmp_path / "study" / "select").exists()


def test_a_budget_ends_a_study_that_more_of_it_lets_go_on(whole, left, alone):
    assert trials.main(["run", "--resume", "--study", str(left), "--budget_hours", "1e-6"]) == 0
    assert board_of(left)["stopped"] == {"select": "budget"}
    assert alone.ran == []
    assert trials.main(["run", "--resume", "--study", str(left), "--budget_hours", "0"]) == 0
    assert board_of(left) == board_of(whole)


# --- the plan ---


def test_a_dry_run_prints_the_plan_and_leaves_nothing(corpus, tmp_path, alone, capsys):
    assert trials.main(["run", *flags(corpus, tmp_path / "runs" / "study"), "--dry_run"]) == 0
    assert list((tmp_path / "runs").iterdir()) == []
    out = capsys.readouterr().out
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    assert {name: int(lines[name][0]) for name in arguments.STAGE_FLAGS} == {
        "baseline": 1, "proxy": 4, "search": 4, "select": 6, "retrain": 2,
    }  # fmt: skip
    assert "times one training in full" in out
    assert "core-hours" in out


@pytest.mark.parametrize("script", ["train.py --bptt_std 0", "train_search.py --search_split train", "train.py"])
def test_the_steps_that_are_foreseen_are_taken_on_average(corpus, script):
    name, *more = script.split()
    job = Job("x", name, (*SIZES.split(), "--bptt", "12", "--epochs", "40", "--data", str(corpus), *more))
    args = cost.parse(job)
    text, rows = SCRIPTS[name].texts_to_read(load_corpus(str(corpus)), args)["train"]
    rng = torch.Generator().manual_seed(0)
    taken = sum(
        1 for _ in range(40) for _ in segments(len(text) // rows, 12, rng, args.bptt_std, args.max_seq_len_delta)
    )
    assert cost.steps(job, load_corpus(str(corpus))) == pytest.approx(taken, rel=0.15)


def test_jobs_that_differ_in_seed_and_genotype_alone_are_of_one_kind():
    a = Job("a", "train.py", ("--arch", "DARTS", "--seed", "1", "--epochs", "5"))
    assert cost.kind(a) == cost.kind(
        Job("b", "train.py", ("--arch", "random:7", "--seed", "2", "--limit_tokens", "99"))
    )
    assert cost.kind(a) != cost.kind(Job("c", "train.py", ("--arch", "LSTM")))
    assert cost.kind(a) != cost.kind(Job("d", "train.py", ("--emsize", "100")))


def test_a_pace_is_read_from_a_probe(tmp_path):
    times = [9.0, 12.0, 13.0, 13.5, 14.0, 14.5, 15.0, 15.5]  # the first steps compile
    lines = [{"kind": "interval", "seconds": t} for t in times] + [{"kind": "epoch", "seconds": 17.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cost.read(tmp_path) == (0.5, 2.0)


def test_a_search_is_probed_on_a_text_that_is_long_enough(tmp_path):
    """For the weights' batch and for the larger one of the alphas, with alphas that move."""
    flags = "--data builtin --batch_size 4 --arch_batch_size 400 --search_split train --arch_start 3 --bptt 2".split()
    job = cost.probe(Job("a", "train_search.py", tuple(flags)), "probe")
    args = cost.parse(job)
    assert args.arch_start == 0 and validate_arguments.strategy_faults(args) == []
    assert startup.length_faults(args, train_search.texts_to_read(load_corpus("builtin"), args)) == []


def test_the_wall_clock_is_that_of_the_last_to_end():
    assert cost.makespan([3, 3, 3], 2) == 6
    assert cost.makespan([1, 1, 1, 5], 2) == 6
    assert cost.makespan([], 2) == 0


# --- the cells ---


def test_a_cell_that_two_searches_found_is_trained_once():
    cell, other = random_genotype(1), random_genotype(2)
    found = distinct([("first-1", cell), ("first-2", other), ("unrolled-1", cell)])
    assert [c.found_by for c in found] == [("first-1", "unrolled-1"), ("first-2",)]


def test_searched_and_random_cells_take_turns(whole):
    args = arguments.build_parser().parse_args(["run", *flags("penn", whole)])
    assert [cell.label.split("-")[0] for cell in Study(whole, args).cells()][:4:2] == ["first", "unrolled"]
    assert [cell.label for cell in Study(whole, args).cells()][1:4:2] == ["random-1", "random-2"]


def test_what_is_retrained_has_other_seeds_than_what_was_selected(whole):
    """What a cell owed to luck in its short training it does not keep."""
    seeds = {
        stage: {json.loads(path.read_text())["flags"]["seed"] for path in whole.glob(f"{stage}/*/*/config.json")}
        for stage in ("select", "retrain")
    }
    assert seeds == {"select": {1}, "retrain": {2}}


def test_the_choice_stays_once_it_has_read_the_test_text(whole, left, alone):
    """Else a second cell would read it too when a retraining that had failed is done later."""
    best = board_of(whole)["cells"][0]["cell"]
    alone.fails = {f"retrain/{best}/2"}
    assert trials.main(["run", "--resume", "--study", str(left), "--top", "4"]) == 0
    chosen = board_of(left)["chosen"]
    assert chosen["cell"] != best
    alone.fails = set()
    assert trials.main(["run", "--resume", "--study", str(left)]) == 0
    assert board_of(left)["chosen"] == chosen
    assert [row["retrain"] for row in board_of(left)["cells"] if row["cell"] == best] != [None]
    read = [path for path in left.glob("**/result.json") if json.loads(path.read_text())["test_ppl"] is not None]
    assert read == [left / chosen["run"] / "result.json"]


def test_a_proxy_is_not_held_against_itself(whole):
    """The short training of full size is read from one seed, the long one from the other."""
    args = arguments.build_parser().parse_args(["run", *flags("penn", whole)])
    [row] = leaderboard.proxies(Study(whole, args))
    short = [metrics.epochs(whole / f"proxy/full/{cell}/1")[0]["valid_ppl"] for cell in args.proxy_cells]
    long = [min(r["valid_ppl"] for r in metrics.epochs(whole / f"proxy/full/{c}/2")) for c in args.proxy_cells]
    assert row["tau"][0] == kendall(short, long)
    assert row["cells"] == 2


@pytest.mark.parametrize(
    ("there", "cpus", "gpus", "fit"),
    [
        ({"CPU": 8}, 1, 0, 8), ({"CPU": 8}, 3, 0, 2), ({"CPU": 4}, 8, 0, 0), ({"CPU": 2}, 0.5, 0, 4),
        ({"CPU": 64, "GPU": 4}, 1, 0.25, 16), ({"CPU": 64, "GPU": 4}, 1, 0.75, 4), ({"CPU": 64, "GPU": 4}, 1, 2, 2),
        ({"CPU": 2, "GPU": 4}, 1, 0.25, 2), ({"CPU": 8}, 1, 1, 0),
    ],
)  # fmt: skip
def test_how_many_trials_fit_on_a_machine(there, cpus, gpus, fit):
    assert ray_backend.fitting(there, ray_backend.Resources(cpus, gpus)) == fit


# --- what is refused ---


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--train_flags", "--lr 'x"], "--train_flags: No closing quotation; close the quotes"),
        (["--train_flags", "--save x --lr 1"], "--train_flags: --save is the study's to set; leave it out"),
        (["--search_flags=--unrolled"], "--search_flags: --unrolled is the study's to set; leave it out"),
        (["--train_flags", "--lr 0"], "baseline: --lr 0.0: must be above 0 (--train_flags)"),
        (["--train_flags", "--batch_size 9999"], "too few for 9999 rows"),
        (["--train_flags", "--schedule cosine"], "under it a short training is not the beginning of a long one"),
        (["--search_flags", "--patience 3"], "--search_flags: --patience looks at valid.txt"),
        (["--search_flags", "--schedule plateau"], "--search_flags: --schedule looks at valid.txt"),
        (["--methods", "first", "first"], "--methods: first is named twice"),
        (["--baselines", "LSTM", "DARTS", "LSTM"], "--baselines: LSTM is named twice"),
        (["--proxy_seeds", "1"], "--proxy_seeds 1: at least 2, since no run is to be compared with itself"),
        (["--methods", "random", "--random_cells", "0"], "--random_cells 0: as many as are found"),
        (["--select_seeds", "2", "--converged", "3"], "--select_seeds 2: --converged takes every short training for a"),
        (["--select_seeds", "2", "--halving"], "--select_seeds 2: --halving takes every short training for a cell"),
        (["--search_flags=--no_such_flag"], "--search_flags: error: unrecognized arguments: --no_such_flag"),
        (["--baselines", "DARTZ"], "--baselines: unknown genotype 'DARTZ', did you mean DARTS?"),
        (["--proxy_cells", "DARTS"], "--proxy_cells: a ranking needs two cells at least"),
        (["--converged", "1"], "--converged 1: one trial has no spread"),
        (["--cpus_per_trial", "0"], "--cpus_per_trial 0: a trial needs a processor"),
        (["--resume"], "there is no study (study.json is missing)"),
    ],
)
def test_what_a_study_cannot_be_is_said_in_a_line(more, said, corpus, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        trials.main(["run", *flags(corpus, tmp_path / "study"), *more])
    assert end.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["run"], "its baseline has begun; add --resume to go on, or take another"),
        (
            ["select", "--resume", "--select_epochs", "9"],
            "--select_epochs: the study in {} has begun with 2; leave it out",
        ),
        (["run", "--resume", "--train_flags", "--lr 3"], "--train_flags: the study in {} has begun with --emsize 8"),
    ],
)
def test_a_stage_that_has_begun_stays_what_it_is(given, said, whole, capsys):
    with pytest.raises(SystemExit) as end:
        trials.main([*given, "--study", str(whole)])
    assert end.value.code == 2
    assert said.format(whole) in capsys.readouterr().err


@pytest.mark.parametrize(("stage", "said"), [("select", "no cell has been found"), ("retrain", "no cell has been sel")])
def test_a_stage_without_the_one_before_it_is_refused(stage, said, corpus, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        trials.main([stage, *flags(corpus, tmp_path / "study", "--methods", "first")])
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_another_text_under_the_same_name_is_refused(whole, tmp_path, capsys):
    other = write_corpus(tmp_path, train=41, valid=16, test=16)
    study = shutil.copytree(whole, tmp_path / "study", ignore=shutil.ignore_patterns(*arguments.STAGE_FLAGS))
    with pytest.raises(SystemExit) as end:
        trials.main(["run", "--study", str(study), "--data", str(other)])
    assert end.value.code == 2
    assert "not the text that the study in" in capsys.readouterr().err


def test_a_damaged_study_is_refused(whole, tmp_path, capsys):
    flags = (whole / "study.json").read_text()
    for text in ("{", "[]", "{}", flags.replace('"seeds": 2', '"seeds": "two"'), flags.replace('"top"', '"tip"')):
        (tmp_path / "study.json").write_text(text)
        with pytest.raises(SystemExit) as end:
            trials.main(["report", "--study", str(tmp_path)])
        assert end.value.code == 2
        assert "study.json is damaged" in capsys.readouterr().err


def test_without_ray_one_line_says_how_to_get_it(corpus, tmp_path):
    code = (
        "import sys; sys.modules['ray'] = None; import trials; from experiment.signals import run_script; "
        "sys.exit(run_script(trials.main))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "run", *flags(corpus, tmp_path / "study")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr.splitlines() == [f"error: {trials.INSTALL} (ray is missing)"]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "no such host:6379", "127.0.0.1:x"])
def test_a_cluster_that_is_not_there_is_told_in_a_line(address):
    with pytest.raises(RunError, match=f"--address {address}: cannot reach Ray there"), ray_backend.connected(address):
        pass


# --- Ray itself ---


def study_process(*given):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "trials.py"), *given, "--cpus_per_trial", "1", "--parallel", "2"],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def children(pid, name):
    found = subprocess.run(["ps", "-o", "pid=,comm=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(line.split()[0]) for line in found.stdout.splitlines() if name in line]


def done(folder):
    return {event["trial"] for event in events(folder) if event["event"] == "done"}


@pytest.mark.skipif(shutil.which("ps") is None, reason="needs ps")
def test_a_worker_the_driver_and_ray_are_killed_and_the_study_ends_the_same(whole, tmp_path):
    folder = copy_without(whole, tmp_path / "study", "search", "select", "retrain")
    first = study_process("run", "--resume", "--study", str(folder))

    def trial():
        """The process of a search that has begun, read from its lock."""
        for lock in folder.glob("search/*/*/lock"):
            if (lock.parent / "last.pt").exists() and not (lock.parent / "result.json").exists():
                return json.loads(lock.read_text())["pid"]
        return None

    os.kill(parent(wait_for(trial, first, 240)), signal.SIGKILL)
    wait_for(lambda: any(event["event"] == "retried" for event in events(folder)), first, 240)
    wait_for(lambda: any(name.startswith("select/") for name in done(folder)), first, 240)
    first.kill()
    first.communicate()
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("**/result.json")}
    assert len(finished) >= 10

    second = study_process("run", "--resume", "--study", str(folder))
    [raylet] = wait_for(lambda: children(second.pid, "raylet"), second, 240)
    wait_for(lambda: len(list(folder.glob("select/*/*/result.json"))) >= 3, second, 240)
    os.kill(raylet, signal.SIGKILL)
    out, _ = second.communicate(timeout=120)
    assert second.returncode == 1, out
    assert "error: Ray is gone; go on with --resume" in out

    third = study_process("run", "--resume", "--study", str(folder))
    out, _ = third.communicate(timeout=300)
    assert third.returncode == 0, out
    chosen = folder / board_of(whole)["chosen"]["run"] / "result.json"  # which was resumed to read the test text
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items() if path != chosen)
    assert board_of(folder) == board_of(whole)
    assert list(folder.glob("tune-*")) == []


def test_halving_spares_what_falls_behind(corpus, tmp_path):
    """Ray's ASHA: of six cells some are ended before their last epoch, and the rest compete."""
    given = flags(
        corpus, tmp_path / "study", "--methods", "random", "--random_cells", 6, "--select_epochs", 9, "--halving"
    )
    assert study_process("search", *given).wait() == 0
    process = study_process("select", "--study", str(tmp_path / "study"))
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    folder = tmp_path / "study" / "select"
    halved, over = list(folder.glob("*/1/halved.json")), list(folder.glob("*/1/result.json"))
    assert len(halved) + len(over) == 6
    assert len(halved) >= 2
    assert over
    assert "halved at epoch" in out
