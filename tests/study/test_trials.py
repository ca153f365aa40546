"""A study runs from its plan to its leaderboard, even if its workers, its driver or Ray are killed."""

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
from helpers import ROOT, wait_for, write_corpus, write_records

import train
import train_search
import trials
from experiment import metrics, startup, validate_arguments
from data import load_corpus
from experiment.metrics import EVENTS, events
from genotypes import Genotype, random_genotype, resolve, to_json
from study import arguments, cost, ray_backend, summary
from study.design import Study, distinct, falls_with_epochs, own_epochs
from study.jobs import Job
from study.leaderboard import as_markdown
from study.records import ARCHIVE, log_event, restore
from study.stats import Estimate, expected_best, holm, kendall, permutation_test
from study.validate_arguments import continues, number_faults
from utils import RunError, segments

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
    # With these initial weights and this norm, the four searches find four different cells.
    sizes = ("--train_flags", SIZES, "--search_flags", f"{SIZES} --norm batch --init_range 0.04 --arch_lr 0.003")
    return ["--study", str(folder), "--data", str(corpus), *sizes, *SMALL, *map(str, more)]


class SerialRunner:
    """Replaces Ray: runs the jobs one by one in this process, lists them in `ran`, and fails those in `fails`."""

    def __init__(self):
        self.ran, self.fails = [], set()

    def run_all(self, todo, monitor, resources, retries, halving=0):
        study = monitor.run.folder
        for job in todo:
            if monitor.reason():
                return
            monitor.started(job)
            if job.name in self.fails:
                Path(study, job.name).mkdir(parents=True, exist_ok=True)
                Path(study, f"{job.name}.out").write_text("error: it was to fail\n")
                monitor.failed(job)
                continue
            if not job.is_done(study):
                script, *given = job.command(study)
                assert SCRIPTS[Path(script).name].main(given) == 0
                self.ran.append(job.name)
            for record in metrics.epochs(study / job.name):
                monitor.epoch(job, record["epoch"], record["valid_ppl"], record["seconds"])
            monitor.ended(job)


@contextmanager
def replace_ray():
    """Runs the jobs of a study in this process instead of Ray's, on one thread as in a trial."""
    threads, runner = torch.get_num_threads(), SerialRunner()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_backend, "connected", lambda address: nullcontext())
        patch.setattr(ray_backend, "max_concurrent_trials", lambda share: 2)
        patch.setattr(ray_backend, "has_gpus", lambda: False)
        patch.setattr(ray_backend, "run_all", runner.run_all)
        torch.set_num_threads(1)
        try:
            yield runner
        finally:
            torch.set_num_threads(threads)


@pytest.fixture
def serial():
    with replace_ray() as runner:
        yield runner


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """Runs a study without interruption and returns its folder."""
    folder = tmp_path_factory.mktemp("whole") / "study"
    with replace_ray():
        assert trials.main(["run", *flags(corpus, folder)]) == 0
    return folder


def read_leaderboard(folder):
    """Returns the content of leaderboard.json without the values that depend on measured times."""
    board = json.loads((folder / "leaderboard.json").read_text())
    board["cost"] = [stage["runs"] for stage in board["cost"]]
    for proxy in board["proxies"]:
        del proxy["cost"], proxy["recommended"]
    for method in board["methods"]:
        del method["rival_draws"], method["minus_rival"]
    return board


# --- Complete studies ---


def test_study_writes_a_leaderboard_with_all_results(whole):
    board = read_leaderboard(whole)
    assert len(board["cells"]) == 6
    assert {m["method"]: m["n"] for m in board["methods"]} == {"first": 2, "unrolled": 2, "random": 2}
    assert [m["p"] is None for m in board["methods"]] == [m["method"] == "random" for m in board["methods"]]
    assert board["left_out"] == []
    assert {(row["cells"], row["epochs"]) for row in board["features"]} == {("all", 1), ("all", 2)}
    assert [a["n"] for a in board["agreement"]] == [2]
    assert [b["cell"] for b in board["baselines"]] == ["LSTM"]
    assert len(board["baselines"][0]["curve"]) == 3
    assert board["failures"] == []
    assert board["stopped"] == {}

    best = min(board["cells"], key=lambda cell: cell["retrain"] or 1e9)
    assert board["cells"][0] == best
    assert board["chosen"]["cell"] == best["cell"]
    assert board["chosen"]["valid_ppl"] == best["retrain"]
    retrained = {cell["cell"] for cell in board["cells"] if cell["retrain"] is not None}
    assert retrained == {cell["cell"] for cell in sorted(board["cells"], key=lambda cell: cell["select"])[:2]}
    for method in board["methods"]:
        values = [cell["select"] for cell in board["cells"] if cell["cell"].startswith(method["method"])]
        assert method["mean"] == pytest.approx(mean(values))


def test_only_the_chosen_cell_is_evaluated_on_the_test_text(whole):
    read = [path for path in whole.glob("**/result.json") if json.loads(path.read_text())["test_ppl"] is not None]
    chosen = read_leaderboard(whole)["chosen"]
    assert read == [whole / chosen["run"] / "result.json"]
    assert chosen["test_ppl"] > 1


def test_searches_train_the_alphas_on_held_out_train_text(whole):
    for path in whole.glob("search/*/*/config.json"):
        assert json.loads(path.read_text())["flags"]["search_split"] == "train"
    assert len(list(whole.glob("search/*/*/config.json"))) == 4


def test_selection_runs_differ_in_the_genotype_only(whole):
    budgets = [json.loads(path.read_text())["flags"] for path in whole.glob("select/*/*/config.json")]
    assert len(budgets) == 6
    alike = [{k: v for k, v in budget.items() if k not in ("arch", "save")} for budget in budgets]
    assert all(other == alike[0] for other in alike)
    assert len({budget["arch"] for budget in budgets}) == 6


def test_leaderboard_states_the_shares_of_unknown_words(whole):
    board = json.loads((whole / "leaderboard.json").read_text())
    assert board["chosen"]["unknown"] == {}  # the made-up language has no unknown words
    assert "unknown" not in as_markdown(board)
    board["chosen"]["unknown"] = {"valid": 0.082, "test": 0.0604}
    assert "8.2% of valid and 6.0% of test are unknown words, which count as `<unk>`" in as_markdown(board)


def test_leaderboard_csv_and_markdown_match_the_json(whole):
    with open(whole / "leaderboard.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["cell"] for row in table] == [row["cell"] for row in read_leaderboard(whole)["cells"]]
    assert float(table[0]["select"]) == read_leaderboard(whole)["cells"][0]["select"]
    text = (whole / "leaderboard.md").read_text()
    for part in ("# Leaderboard", "permutation test of the means", "## Proxies", "## Cost", "core-hours", "Genotype("):
        assert part in text


def copy_without(whole, folder, *parts):
    """Copies the study without some of its parts, as if it had been interrupted before them."""
    shutil.copytree(whole, folder)
    for part in parts:
        shutil.rmtree(folder / part)
    for name in ("leaderboard.json", "leaderboard.csv", "leaderboard.md", "lock", ARCHIVE):
        (folder / name).unlink()
    remaining = [event for event in events(folder) if (folder / event["trial"] / "result.json").exists()]
    (folder / EVENTS).write_text("".join(json.dumps(event) + "\n" for event in remaining))
    return folder


@pytest.fixture
def interrupted(whole, tmp_path):
    """Copies the study without the rest of its selection and all that follows."""
    return copy_without(whole, tmp_path / "study", "retrain", "select/random-1", "select/unrolled-2", "select/first-2")


def test_resumed_study_runs_only_the_missing_trials(whole, interrupted, serial):
    assert trials.main(["run", "--resume", "--study", str(interrupted)]) == 0
    names = [name.split("/")[0] for name in serial.ran]
    assert names == ["select"] * 3 + ["retrain"] * 2 + ["retrain"]  # The last run evaluates the test text.
    assert read_leaderboard(interrupted) == read_leaderboard(whole)


def test_converged_selection_ends_and_the_study_goes_on(interrupted, serial, monkeypatch):
    def reason(values, failed, allowed, hours, converged=0, budget_hours=0.0):
        return "converged" if converged == 3 and len(values) >= 4 else ""

    monkeypatch.setattr("study.monitor.reason_to_stop", reason)
    assert trials.main(["run", "--resume", "--study", str(interrupted), "--converged", "3"]) == 0
    assert [name.split("/")[0] for name in serial.ran] == ["select", "retrain", "retrain", "retrain"]
    assert read_leaderboard(interrupted)["stopped"] == {"select": "converged"}


def test_interrupted_study_prints_the_resume_command(interrupted, serial, monkeypatch, capsys):
    """Ray responds to Ctrl-C by ending its trials, and `run_all` returns."""
    monkeypatch.setattr(ray_backend, "run_all", lambda *_: None)
    assert trials.main(["run", "--resume", "--study", str(interrupted)]) == 130
    assert f"python trials.py run --resume --study {interrupted}" in capsys.readouterr().out


def test_stages_run_one_by_one_give_the_same_leaderboard(whole, corpus, tmp_path, serial):
    for stage in ("search", "select", "retrain", "baseline", "proxy", "report"):
        given = flags(corpus, tmp_path / "study") if stage == "search" else ["--study", str(tmp_path / "study")]
        assert trials.main([stage, *given]) == 0
    assert read_leaderboard(tmp_path / "study") == read_leaderboard(whole)


def test_methods_are_compared_with_random_cells_and_with_as_many_as_take_the_same_time(whole):
    board = json.loads((whole / "leaderboard.json").read_text())
    values = {m["method"]: [c["select"] for c in board["cells"] if c["cell"].startswith(m["method"])]
              for m in board["methods"]}  # fmt: skip

    def time(pattern):
        return min(metrics.seconds(path.parent) for path in whole.glob(f"{pattern}/*/metrics.jsonl"))

    searched = [m for m in board["methods"] if m["method"] != "random"]
    assert [m["p"] for m in searched] == [permutation_test(values[m["method"]], values["random"]) for m in searched]
    assert [m["p_corrected"] for m in searched] == holm([m["p"] for m in searched])
    for method in searched:
        draws = 1 + time(f"search/{method['method']}") / time("select/*")
        assert method["rival_draws"] == pytest.approx(draws)
        expected = mean(values[method["method"]]) - expected_best(values["random"], draws)
        assert method["minus_rival"][0] == pytest.approx(expected)
        better = mean((v < method["mean"]) + 0.5 * (v == method["mean"]) for v in values["random"])
        assert method["random_below"] == pytest.approx(better)


def test_rival_pays_for_every_seed_of_a_selection(tmp_path):
    study = study_of_four_searches(tmp_path, "--select_seeds", "2")
    for job, seconds in ((study.search()[0], 30.0), (study.select()[0], 10.0), (study.select()[1], 1.0)):
        write_records(tmp_path / job.name, [{"kind": "epoch", "epoch": 1, "valid_ppl": 9.0, "seconds": seconds}])
    assert summary.rival_draws(study, "first") is None  # No training has ended; the last one was interrupted.
    result = {"genotype": "LSTM", "valid_ppl": 9.0, "test_ppl": None}
    (tmp_path / study.select()[0].name / "result.json").write_text(json.dumps(result))
    assert summary.rival_draws(study, "first") == 1 + 30 / (2 * 10)


def test_cell_keeps_the_name_of_its_trainings_when_a_search_that_joins_finds_it_too(tmp_path):
    """A method that joins comes before the later seeds of the others."""
    study = study_of_four_searches(tmp_path)
    jobs = study.select()
    for job in jobs:
        (tmp_path / job.name).mkdir(parents=True)
    study.args.methods = ["layer=--norm layer", *study.args.methods]
    write_result(tmp_path / "search" / "layer" / "1", random_genotype(101), 99.0)
    assert {job.name for job in jobs} <= {job.name for job in study.select()}
    assert study.cells()[0].label == "first-1" and "layer-1" in study.cells()[0].found_by


def test_search_keeps_its_training_of_a_cell_that_a_search_which_joins_finds_too(tmp_path):
    """The search that joins has the first seed, as two of the three searches that found the cell before."""
    study = study_of_four_searches(tmp_path)
    for job in study.search():
        log_event(tmp_path, trial=job.name, event="done", valid_ppl=99.0)
    for ppl, job in enumerate(study.select(), start=100):
        write_result(tmp_path / job.name, random_genotype(101), float(ppl))
        log_event(tmp_path, trial=job.name, event="done", valid_ppl=float(ppl))
    before = study.by_name(study.cells()[0])
    assert len(before) == 3
    study.args.methods = ["layer=--norm layer", *study.args.methods]
    write_result(tmp_path / "search" / "layer" / "1", random_genotype(101), 99.0)
    log_event(tmp_path, trial="search/layer/1", event="done", valid_ppl=99.0)
    cell = study.cells()[0]
    assert cell.found_by == (*before, "layer-1") and study.by_name(cell) == before


@pytest.mark.parametrize("flags", ["--schedule  cosine", "--schedule\ncosine", "--schedule=cosine"])
def test_proxy_flags_are_read_like_the_scripts_read_them(flags):
    assert falls_with_epochs(flags) and own_epochs(flags.replace("schedule", "epochs").replace("cosine", "12")) == [12]


def move(whole, folder, drop=()):
    """Copies to `folder` only what a study keeps in git: study.json, and trials.jsonl without the trials in `drop`."""
    folder.mkdir()
    shutil.copy(whole / "study.json", folder)
    lines = (whole / ARCHIVE).read_text().splitlines(keepends=True)
    kept = [line for line in lines if not json.loads(line)["trial"].startswith(tuple(drop) or ("none",))]
    (folder / ARCHIVE).write_text("".join(kept))
    return folder


def test_report_of_the_small_results_is_the_same_without_ray_and_the_text(whole, tmp_path):
    folder = move(whole, tmp_path / "study")
    config = json.loads((folder / "study.json").read_text())
    config["flags"]["data"] = str(tmp_path / "nowhere")
    (folder / "study.json").write_text(json.dumps(config))
    code = "import sys; sys.modules['ray'] = None; import trials; sys.exit(trials.main())"
    run = subprocess.run([sys.executable, "-c", code, "report", "--study", folder], cwd=ROOT, capture_output=True,
                         text=True, check=False)  # fmt: skip
    assert run.returncode == 0, run.stderr
    for name in ("leaderboard.md", "leaderboard.csv", "leaderboard.json"):
        assert (folder / name).read_text() == (whole / name).read_text()
    assert {e["trial"] for e in events(folder)} == {e["trial"] for e in events(whole) if e["event"] == "done"}


def test_committed_leaderboard_is_the_report_of_the_committed_results(tmp_path):
    """The numbers of docs/study.md are those of this leaderboard."""
    committed = ROOT / "docs" / "study" / "penn-64"
    folder = move(committed, tmp_path / "study")
    assert trials.main(["report", "--study", str(folder)]) == 0
    assert (folder / "leaderboard.md").read_text() == (committed / "leaderboard.md").read_text()


def test_study_that_was_moved_with_its_small_results_goes_on_from_there(whole, tmp_path, serial):
    folder = move(whole, tmp_path / "study", drop=["select/random-1/", "retrain/", "baseline/"])
    assert trials.main(["run", "--resume", "--study", str(folder)]) == 0
    ran = sorted(name.split("/")[0] for name in serial.ran if not name.startswith("probe"))
    assert ran == ["baseline", "retrain", "retrain", "retrain", "select"]
    assert read_leaderboard(folder) == read_leaderboard(whole)
    lines = [json.loads(line)["trial"] for line in (folder / ARCHIVE).read_text().splitlines()]
    assert set(lines) == {json.loads(line)["trial"] for line in (whole / ARCHIVE).read_text().splitlines()}
    assert len(lines) == len(set(lines)) + 1  # The chosen run was archived again with its test perplexity.


def test_methods_of_ones_own_may_join_a_study_that_has_begun(whole, tmp_path, serial, capsys):
    folder = move(whole, tmp_path / "study")
    study = ["--study", str(folder), "--resume", "--methods"]
    with pytest.raises(SystemExit) as end:
        trials.main(["search", *study, "first", "random"])
    assert end.value.code == 2
    assert "--methods: the study in" in capsys.readouterr().err
    assert trials.main(["search", *study, "first", "unrolled", "random", "layer=--norm layer"]) == 0
    assert [name for name in serial.ran if not name.startswith("probe")] == ["search/layer/1", "search/layer/2"]
    configs = [json.loads((folder / f"search/layer/{seed}/config.json").read_text()) for seed in (1, 2)]
    assert {config["flags"]["norm"] for config in configs} == {"layer"}


def test_proxies_with_a_schedule_have_a_training_for_each_length(whole):
    args = arguments.build_parser().parse_args(
        ["proxy", *flags("penn", whole), "--proxy_epochs", "1", "2", "--proxy_flags", "--schedule cosine", "--emsize 4"]
    )
    flags_of = {job.name.rsplit("/", 2)[0]: job.flags for job in Study(whole, args).proxy()}
    epochs = {name: given[given.index("--epochs") + 1] for name, given in flags_of.items()}
    assert epochs == {"proxy/schedule-cosine-1": "1", "proxy/schedule-cosine-2": "2", "proxy/emsize-4": "2",
                      "proxy/full": "2"}  # fmt: skip
    assert flags_of["proxy/schedule-cosine-2"][-4:-2] == ("--schedule", "cosine")


def test_proxy_with_epochs_of_its_own_has_no_other_length(whole):
    own = ["--schedule cosine --epochs 3", "--emsize 4 --epochs 1"]
    args = arguments.build_parser().parse_args(
        ["proxy", *flags("penn", whole), "--proxy_epochs", "1", "2", "--proxy_flags", *own, "--emsize 4"]
    )
    flags_of = {job.name.rsplit("/", 2)[0]: job.flags for job in Study(whole, args).short_trainings()}
    epochs = {name: train.build_parser().parse_args(given).epochs for name, given in flags_of.items()}
    assert epochs == {
        "proxy/schedule-cosine---epochs-3": 3, "proxy/emsize-4---epochs-1": 1, "proxy/emsize-4": 2, "proxy/full": 1
    }  # fmt: skip
    assert [str(proxy) for proxy in Study(whole, args).proxies()] == [
        *own, "1 epoch, --emsize 4", "2 epochs, --emsize 4", "1 epoch"
    ]  # fmt: skip


@pytest.mark.parametrize(("now", "kept"), [(["a"], True), (["b", "a"], True), (["b"], False), ([], False)])
def test_proxy_settings_may_join_a_stage_that_has_begun_but_not_leave_it(now, kept):
    assert continues("proxy_flags", now, ["a"]) == kept


def test_short_trainings_of_proxies_have_other_seeds_than_long_ones(whole):
    args = arguments.build_parser().parse_args(
        ["proxy", *flags("penn", whole), "--proxy_flags", "--emsize 4", "--proxy_seeds", "4"]
    )
    seeds = {}
    for job in Study(whole, args).proxy():
        epochs = job.flags[job.flags.index("--epochs") + 1]
        seeds.setdefault((job.name.split("/")[1], epochs), set()).add(int(job.name.split("/")[3]))
    assert seeds == {("full", "1"): {1, 3}, ("full", "2"): {2, 4}, ("emsize-4", "1"): {1, 3}}


# --- Failures and budgets ---


def test_failed_trials_are_reported_and_left_out_until_rerun(whole, interrupted, serial):
    serial.fails = {"select/random-1/1001"}
    assert trials.main(["run", "--resume", "--study", str(interrupted)]) == 0
    board = read_leaderboard(interrupted)
    assert board["failures"] == [{"trial": "select/random-1/1001", "reason": "error: it was to fail"}]
    assert {m["method"]: m["n"] for m in board["methods"]} == {"first": 2, "unrolled": 2, "random": 1}
    assert board["left_out"] == ["random-1"]
    assert "Left out, as no short training of theirs ended: random-1." in (interrupted / "leaderboard.md").read_text()

    serial.fails = set()
    assert trials.main(["select", "--resume", "--study", str(interrupted)]) == 0
    assert trials.main(["report", "--study", str(interrupted)]) == 0
    board = read_leaderboard(interrupted)
    assert board["failures"] == []
    assert board["methods"] == read_leaderboard(whole)["methods"]


def test_number_of_random_cells_may_be_that_of_cells_found_by_a_method_of_ones_own():
    given = ["run", "--methods", "layer=--norm layer", "random"]
    assert number_faults(arguments.build_parser().parse_args(given)) == []


def test_too_many_failures_stop_a_study(corpus, tmp_path, serial, capsys):
    serial.fails = {"search/first/1", "search/first/2"}
    assert trials.main(["run", *flags(corpus, tmp_path / "study")]) == 1
    assert read_leaderboard(tmp_path / "study")["stopped"] == {"search": "failures"}
    assert "search stopped: too many trials failed" in capsys.readouterr().out
    assert not (tmp_path / "study" / "select").exists()


def test_study_stopped_by_its_budget_resumes_without_a_budget(whole, interrupted, serial):
    assert trials.main(["run", "--resume", "--study", str(interrupted), "--budget_hours", "1e-6"]) == 0
    assert read_leaderboard(interrupted)["stopped"] == {"select": "budget"}
    assert serial.ran == []
    assert trials.main(["run", "--resume", "--study", str(interrupted), "--budget_hours", "0"]) == 0
    assert read_leaderboard(interrupted) == read_leaderboard(whole)


# --- Plan and cost ---


def test_dry_run_prints_the_plan_and_writes_no_file(corpus, tmp_path, serial, capsys):
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
def test_estimated_steps_match_the_mean_of_sampled_segments(corpus, script):
    name, *more = script.split()
    job = Job("x", name, (*SIZES.split(), "--bptt", "12", "--epochs", "40", "--data", str(corpus), *more))
    args = cost.parse(job)
    text, batch_size = SCRIPTS[name].texts_to_read(load_corpus(str(corpus)), args)["train"]
    rng = torch.Generator().manual_seed(0)
    total = sum(
        1 for _ in range(40) for _ in segments(len(text) // batch_size, 12, rng, args.bptt_std, args.max_seq_len_delta)
    )
    assert cost.steps(job, load_corpus(str(corpus))) == pytest.approx(total, rel=0.15)


def test_job_kind_ignores_seed_genotype_and_run_length():
    a = Job("a", "train.py", ("--arch", "DARTS", "--seed", "1", "--epochs", "5"))
    assert cost.kind(a) == cost.kind(
        Job("b", "train.py", ("--arch", "random:7", "--seed", "2", "--limit_tokens", "99"))
    )
    assert cost.kind(a) != cost.kind(Job("c", "train.py", ("--arch", "LSTM")))
    assert cost.kind(a) != cost.kind(Job("d", "train.py", ("--emsize", "100")))


def test_timing_is_read_from_the_metrics_of_a_probe(tmp_path):
    times = [9.0, 12.0, 13.0, 13.5, 14.0, 14.5, 15.0, 15.5]  # The first steps include compilation.
    lines = [{"kind": "interval", "seconds": t} for t in times] + [{"kind": "epoch", "seconds": 17.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cost.read(tmp_path) == (0.5, 2.0)


def test_search_probe_has_enough_text_and_trains_the_alphas(tmp_path):
    """The text suffices for the batch of the weights and the larger batch of the alphas, which train from the start."""
    flags = "--data builtin --batch_size 4 --arch_batch_size 400 --search_split train --arch_start 3 --bptt 2".split()
    job = cost.probe(Job("a", "train_search.py", tuple(flags)), "probe")
    args = cost.parse(job)
    assert args.arch_start == 0 and validate_arguments.strategy_faults("search", args) == []
    assert startup.length_faults(args, train_search.texts_to_read(load_corpus("builtin"), args)) == []


def test_probe_of_a_training_that_averages_after_some_epochs_has_flags_that_can_be_used():
    job = cost.probe(Job("a", "train.py", ("--data", "builtin", "--average_after", "20", "--epochs", "24")), "probe")
    assert validate_arguments.strategy_faults("train", cost.parse(job)) == []


def test_makespan_is_the_end_time_of_the_last_job():
    assert cost.makespan([3, 3, 3], 2) == 6
    assert cost.makespan([1, 1, 1, 5], 2) == 6
    assert cost.makespan([], 2) == 0


# --- Cells ---


def test_cells_are_distinct_and_have_all_of_their_names():
    cell, other = random_genotype(1), random_genotype(2)
    cells = distinct([("first-1", cell), ("first-2", other), ("unrolled-1", cell)])
    assert [c.found_by for c in cells] == [("first-1", "unrolled-1"), ("first-2",)]


def write_result(folder, cell, valid_ppl, test_ppl=None):
    folder.mkdir(parents=True)
    result = {"genotype": to_json(cell), "valid_ppl": valid_ppl, "test_ppl": test_ppl}
    (folder / "result.json").write_text(json.dumps(result))


def study_of_four_searches(folder, *more):
    """Returns a study in which three of four searches found one cell, named first-1, and no cell has been trained."""
    cell, other = random_genotype(101), random_genotype(102)
    for name, genotype in (("first/1", cell), ("unrolled/1", cell), ("first/2", cell), ("unrolled/2", other)):
        write_result(folder / "search" / name, genotype, 99.0)
    given = ["run", "--methods", "first", "unrolled", "random", "--seeds", "2", "--random_cells", "2", *more]
    return Study(folder, arguments.build_parser().parse_args(given))


def test_cell_found_by_three_searches_has_a_training_for_each(tmp_path):
    study = study_of_four_searches(tmp_path)
    names = [job.name.removeprefix("select/") for job in study.select()]
    assert names == [
        "first-1/1001",
        "random-1/1001",
        "unrolled-2/1001",
        "random-2/1001",
        "first-1/1002",
        "first-1/1003",
    ]
    for seed, ppl in ((1001, 10.0), (1002, 20.0), (1003, 30.0)):
        assert study.selected() == []
        write_result(tmp_path / f"select/first-1/{seed}", random_genotype(101), ppl)
    [(ppl, cell)] = study.selected()
    assert (ppl, study.by_name(cell)) == (20.0, {"first-1": 10.0, "unrolled-1": 20.0, "first-2": 30.0})
    by_method = {row["method"]: (row["n"], row["mean"]) for row in summary.summary(study)["methods"]}
    assert by_method == {"first": (2, 20.0), "unrolled": (1, 20.0)}


def test_each_search_of_a_repeated_cell_has_as_many_seeds(tmp_path):
    study = study_of_four_searches(tmp_path, "--select_seeds", "2")
    cell = study.cells()[0]
    assert [job.name for job in study.select([cell])] == [f"select/first-1/{seed}" for seed in range(1001, 1007)]
    for seed in (1001, 1002, 1003):
        write_result(tmp_path / f"select/first-1/{seed}", cell.genotype, float(seed))
    assert study.by_name(cell) == {"first-1": 1001.5}  # The second one of unrolled-1 is to come.


def test_p_is_corrected_for_methods_without_values_too(tmp_path):
    study = study_of_four_searches(tmp_path)
    for label, seed, ppl in (("first-1", 1001, 1.0), ("first-1", 1003, 1.1), ("random-1", 1001, 5.0),
                             ("random-2", 1001, 5.1)):  # fmt: skip
        write_result(tmp_path / f"select/{label}/{seed}", random_genotype(101), ppl)
    cells = [summary.cell_row(study, cell) for cell in study.cells()]
    [first] = [row for row in summary.methods(study, cells, tested=True) if row["method"] == "first"]
    assert first["p_corrected"] == pytest.approx(min(1, 2 * first["p"]))


def test_methods_are_tested_once_all_trainings_have_ended(tmp_path):
    study = study_of_four_searches(tmp_path)
    jobs = study.select()
    for ppl, job in enumerate(jobs, start=100):
        results = summary.summary(study)
        assert results["to_run"] == len(jobs) - (ppl - 100)
        assert all(row["p"] is None and row["minus_rival"] is None for row in results["methods"])
        write_result(tmp_path / job.name, random_genotype(101), float(ppl))
    searched = [row for row in summary.summary(study)["methods"] if row["method"] == "first"]
    assert [row["p"] is None for row in searched] == [False]


@pytest.mark.parametrize("event", [{"trial": "select/random-2/1001", "event": "failed"},
                                   {"trial": "select", "event": "stopped"}])  # fmt: skip
def test_trainings_that_will_not_run_delay_no_test(event, tmp_path):
    study = study_of_four_searches(tmp_path)
    for job in study.select():
        if job.name != "select/random-2/1001":
            write_result(tmp_path / job.name, random_genotype(101), 100.0)
    assert summary.trials_to_run(study) == 1
    log_event(tmp_path, **event, reason="some reason")
    assert summary.trials_to_run(study) == 0


def test_searched_and_random_cells_alternate(whole):
    args = arguments.build_parser().parse_args(["run", *flags("penn", whole)])
    assert [cell.label.split("-")[0] for cell in Study(whole, args).cells()][:4:2] == ["first", "unrolled"]
    assert [cell.label for cell in Study(whole, args).cells()][1:4:2] == ["random-1", "random-2"]


def test_selection_and_retraining_use_different_seeds(whole):
    """A new seed does not inherit the luck of the short training that selected the cell."""
    seeds = {
        stage: {json.loads(path.read_text())["flags"]["seed"] for path in whole.glob(f"{stage}/*/*/config.json")}
        for stage in ("select", "retrain")
    }
    assert seeds == {"select": {1001}, "retrain": {2001}}


def test_chosen_cell_is_fixed_once_evaluated_on_the_test_text(whole, interrupted, serial):
    """A changed choice would evaluate a second cell on the test text when a failed retraining is rerun later."""
    best = read_leaderboard(whole)["cells"][0]["cell"]
    serial.fails = {f"retrain/{best}/2001"}
    assert trials.main(["run", "--resume", "--study", str(interrupted), "--top", "4"]) == 0
    chosen = read_leaderboard(interrupted)["chosen"]
    assert chosen["cell"] != best
    serial.fails = set()
    assert trials.main(["run", "--resume", "--study", str(interrupted)]) == 0
    assert read_leaderboard(interrupted)["chosen"] == chosen
    assert [cell["retrain"] for cell in read_leaderboard(interrupted)["cells"] if cell["cell"] == best] != [None]
    read = [path for path in interrupted.glob("**/result.json") if json.loads(path.read_text())["test_ppl"] is not None]
    assert read == [interrupted / chosen["run"] / "result.json"]


def test_tested_cell_remains_the_choice_though_a_better_one_joins(tmp_path):
    """Random cells may join after the test text has been read; a second reading would be a choice by it."""
    study = study_of_four_searches(tmp_path, "--methods", "first", "random")
    for label, ppl in (("random-1", 9.0), ("random-2", 8.0)):
        write_result(tmp_path / f"select/{label}/1001", random_genotype(1), ppl)
    write_result(tmp_path / "retrain/random-1/2001", random_genotype(1), 7.0, test_ppl=6.0)
    cell, job = study.chosen()
    assert (cell.label, job.name, job.is_done(tmp_path)) == ("random-1", "retrain/random-1/2001", True)


def test_proxy_agreement_compares_runs_with_different_seeds(whole):
    """The short training at full size is taken from one seed, and the long training from the other."""
    args = arguments.build_parser().parse_args(["run", *flags("penn", whole)])
    [proxy] = summary.proxies(Study(whole, args))
    short = [metrics.epochs(whole / f"proxy/full/{cell}/1")[0]["valid_ppl"] for cell in args.proxy_cells]
    long = [min(r["valid_ppl"] for r in metrics.epochs(whole / f"proxy/full/{c}/2")) for c in args.proxy_cells]
    again = [metrics.epochs(whole / f"proxy/full/{cell}/2")[0]["valid_ppl"] for cell in args.proxy_cells]
    assert proxy["tau"][0] == kendall(short, long)
    assert proxy["tau_of_seeds"] == kendall(short, again)
    assert proxy["cells"] == 2
    assert summary.proxy_cells(Study(whole, args)) == [
        {"cell": cell, "genotype": str(resolve(cell)), "ppl": {"1 epoch": early, "2 epochs": late}}
        for cell, early, late in zip(args.proxy_cells, short, long, strict=True)
    ]


@pytest.mark.parametrize(
    ("tau", "recommended"), [((0.8, 0.1, 1.0), ["3 epochs"]), ((0.8, 0.0, 1.0), []), ((0.69, 0.1, 1.0), [])]
)
def test_recommended_proxy_is_the_cheapest_with_a_high_tau_above_zero(tau, recommended, tmp_path, monkeypatch):
    folder = move(ROOT / "docs" / "study" / "penn-64", tmp_path / "study")
    restore(folder)
    args = arguments.build_parser().parse_args(["report"])
    vars(args).update(json.loads((folder / "study.json").read_text())["flags"])
    monkeypatch.setattr(summary.stats, "agreement", lambda *_: Estimate(*tau))
    rows = summary.proxies(Study(folder, args))
    assert len(rows) > 3 and [row["proxy"] for row in rows if row["recommended"]] == recommended


def test_proxy_with_too_few_cells_is_not_recommended(whole, monkeypatch):
    monkeypatch.setattr(summary.stats, "agreement", lambda *_: Estimate(1.0, 1.0, 1.0))
    study = Study(whole, arguments.build_parser().parse_args(["run", *flags("penn", whole)]))
    for few, recommended in ((3, False), (2, True)):
        monkeypatch.setattr(summary, "FEW_CELLS", few)
        assert [proxy["recommended"] for proxy in summary.proxies(study)] == [recommended]


def test_cell_of_a_proxy_counts_once_all_of_its_seeds_are_done(whole):
    args = arguments.build_parser().parse_args(["run", *flags("penn", whole), "--proxy_seeds", "4"])
    assert summary.proxies(Study(whole, args)) == []


def test_proxy_cells_without_a_long_training_are_shown(whole, tmp_path):
    args = arguments.build_parser().parse_args(["run", *flags("penn", tmp_path)])
    shutil.copytree(whole / "proxy/full/ENAS/1", tmp_path / "proxy/full/ENAS/1")
    [row] = summary.proxy_cells(Study(tmp_path, args))
    ppl = metrics.epochs(whole / "proxy/full/ENAS/1")[0]["valid_ppl"]
    assert row == {"cell": "ENAS", "genotype": str(resolve("ENAS")), "ppl": {"1 epoch": ppl, "2 epochs": None}}


def test_features_of_the_proxies_cells_are_correlated_with_the_long_training(tmp_path):
    """The cells are s_0 alone with 0 to 8 tanh: their long trainings are ranked by that number, the short against."""
    cells = [Genotype([("tanh" if i < k else "relu", 0) for i in range(8)], list(range(1, 9))) for k in range(9)]
    args = arguments.build_parser().parse_args(["run", *flags("penn", tmp_path)])
    args.proxy_cells = list(map(str, cells))
    study = Study(tmp_path, args)
    for k, (short, long) in enumerate(zip(study.short_trainings(), study.long_trainings(), strict=True)):
        for job, ppls in ((short, [100.0 + k]), (long, [100.0, 90.0 - k])):
            write_result(tmp_path / job.name, cells[k], ppls[-1])
            lines = [{"kind": "epoch", "epoch": i, "seconds": 1.0, "valid_ppl": ppl} for i, ppl in enumerate(ppls, 1)]
            (tmp_path / job.name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    correlations = summary.feature_correlations(study, [], summary.proxy_cells(study))
    rhos = {(row["feature"], row["epochs"]): row["rho"][0] for row in correlations if row["cells"] == "proxy"}
    assert rhos["tanh", 1] == pytest.approx(1) and rhos["tanh", 2] == pytest.approx(-1)
    assert rhos["relu", 2] == pytest.approx(1) and rhos["width", 2] is None
    assert {row["n"] for row in correlations} == {9}


@pytest.mark.parametrize(
    ("available", "cpus", "gpus", "fit"),
    [
        ({"CPU": 8}, 1, 0, 8), ({"CPU": 8}, 3, 0, 2), ({"CPU": 4}, 8, 0, 0), ({"CPU": 2}, 0.5, 0, 4),
        ({"CPU": 64, "GPU": 4}, 1, 0.25, 16), ({"CPU": 64, "GPU": 4}, 1, 0.75, 4), ({"CPU": 64, "GPU": 4}, 1, 2, 2),
        ({"CPU": 2, "GPU": 4}, 1, 0.25, 2), ({"CPU": 8}, 1, 1, 0),
    ],
)  # fmt: skip
def test_number_of_trials_that_fit_on_a_machine(available, cpus, gpus, fit):
    assert ray_backend.fitting(available, ray_backend.Resources(cpus, gpus)) == fit


# --- Errors ---


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--train_flags", "--lr 'x"], "--train_flags: No closing quotation; close the quotes"),
        (["--train_flags", "--save x --lr 1"], "--train_flags: --save is the study's to set; leave it out"),
        (["--search_flags=--unrolled"], "--search_flags: --unrolled is the study's to set; leave it out"),
        (["--train_flags", "--lr 0"], "baseline: --lr 0.0: must be above 0 (--train_flags)"),
        (["--train_flags", "--batch_size 9999"], "too few for a batch size of 9999"),
        (["--train_flags", "--schedule cosine"], "under it a short training is not the beginning of a long one"),
        (["--search_flags", "--patience 3"], "--search_flags: --patience looks at valid.txt"),
        (["--search_flags", "--schedule plateau"], "--search_flags: --schedule looks at valid.txt"),
        (["--search_flags=--schedule=plateau"], "--search_flags: --schedule looks at valid.txt"),
        (["--methods", "first", "first"], "--methods: first is named twice"),
        (["--methods", "layer"], "--methods layer: has no flags; give them as layer=FLAGS"),
        (["--methods", "random-2=--norm layer"], "--methods random-2=--norm layer: another name, please"),
        (["--methods", "../x=--norm layer"], "--methods ../x=--norm layer: another name, please"),
        (["--methods", "x=--save y"], "--methods x: --save is the study's to set; leave it out"),
        (["--methods", "x=--norm y"], "--methods: error: argument --norm: invalid choice: 'y'"),
        (["--methods", "x=--patience 3"], "--methods x: --patience looks at valid.txt"),
        (["--proxy_flags", "--seed 3"], "--proxy_flags: --seed is the study's to set; leave it out"),
        (["--train_flags", "--epochs 3"], "--train_flags: --epochs is the study's to set; leave it out"),
        (["--baselines", "LSTM", "DARTS", "LSTM"], "--baselines: LSTM is named twice"),
        (["--proxy_seeds", "1"], "--proxy_seeds 1: at least 2, since no run is to be compared with itself"),
        (["--methods", "random", "--random_cells", "0"], "--random_cells 0: as many as are found"),
        (["--proxy_flags", *(f"{'--dropout 0.1 ' * 6}--lr {lr}" for lr in (5, 20))], "would have one directory"),
        (["--select_seeds", "2", "--converged", "3"], "--select_seeds 2: --converged takes every short training for a"),
        (["--select_seeds", "2", "--halving"], "--select_seeds 2: --halving takes every short training for a cell"),
        (["--search_flags=--no_such_flag"], "--search_flags: error: --no_such_flag: no such flag; "),
        (["--baselines", "DARTZ"], "--baselines: unknown genotype 'DARTZ', did you mean DARTS?"),
        (["--proxy_cells", "DARTS"], "--proxy_cells: a ranking needs two cells at least"),
        (["--converged", "1"], "--converged 1: one trial has no spread"),
        (["--proxy_epochs", "2"], "--proxy_epochs 2: none is below the 2 epochs of the long training; take fewer, or"),
        (["--gpus_per_trial", "1.5"], "--gpus_per_trial 1.5: above 1, a trial takes whole GPUs; take 1 or 2"),
        (["--study", __file__], f"--study {__file__}: {__file__} is a file; name a directory"),
        (["--cpus_per_trial", "0"], "--cpus_per_trial 0: a trial needs a processor"),
        (["--resume"], "there is no study (study.json is missing)"),
    ],
)
def test_invalid_study_flags_exit_2_with_the_reason(more, message, corpus, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        trials.main(["run", *flags(corpus, tmp_path / "study"), *more])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["run"], "its baseline has begun; add --resume to continue it, or take another"),
        (
            ["select", "--resume", "--select_epochs", "9"],
            "--select_epochs: the study in {} has begun with 2; leave it out",
        ),
        (["run", "--resume", "--train_flags", "--lr 3"], "--train_flags: the study in {} has begun with --emsize 8"),
    ],
)
def test_changing_flags_of_a_started_stage_exits_2(given, message, whole, capsys):
    with pytest.raises(SystemExit) as end:
        trials.main([*given, "--study", str(whole)])
    assert end.value.code == 2
    assert message.format(whole) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "message"), [("select", "no cell has been found"), ("retrain", "no cell has been sel")]
)
def test_stage_without_its_preceding_stage_exits_2(stage, message, corpus, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        trials.main([stage, *flags(corpus, tmp_path / "study", "--methods", "first")])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_study_needs_a_test_text_only_to_retrain(corpus, tmp_path, serial, capsys):
    text, study = tmp_path / "text", tmp_path / "study"
    shutil.copytree(corpus, text)
    test = (text / "test.txt").read_text()
    (text / "test.txt").unlink()
    assert trials.main(["select", *flags(text, study)]) == 0
    resumed = ["retrain", "--resume", "--study", str(study), "--data", str(text)]
    with pytest.raises(SystemExit) as end:
        trials.main(resumed)
    assert end.value.code == 2
    assert "test.txt: missing" in capsys.readouterr().err
    (text / "test.txt").write_text(test)
    assert trials.main(resumed) == 0
    assert set(json.loads((study / "study.json").read_text())["sha256"]) == {"train", "valid", "test"}


def test_changed_corpus_of_an_existing_study_exits_2(whole, tmp_path, capsys):
    other = write_corpus(tmp_path, train=41, valid=16, test=16)
    study = shutil.copytree(whole, tmp_path / "study", ignore=shutil.ignore_patterns(*arguments.STAGE_FLAGS, ARCHIVE))
    with pytest.raises(SystemExit) as end:
        trials.main(["run", "--study", str(study), "--data", str(other)])
    assert end.value.code == 2
    assert "not the text that the study in" in capsys.readouterr().err


def test_damaged_study_json_exits_2(whole, tmp_path, capsys):
    flags = (whole / "study.json").read_text()
    for text in ("{", "[]", "{}", flags.replace('"seeds": 2', '"seeds": "two"'), flags.replace('"top"', '"tip"')):
        (tmp_path / "study.json").write_text(text)
        with pytest.raises(SystemExit) as end:
            trials.main(["report", "--study", str(tmp_path)])
        assert end.value.code == 2
        assert "study.json is damaged" in capsys.readouterr().err


def test_flag_that_is_younger_than_the_study_has_its_default(whole, tmp_path, serial):
    folder = move(whole, tmp_path / "study")
    config = json.loads((folder / "study.json").read_text())
    assert config["flags"].pop("converged") == 0
    (folder / "study.json").write_text(json.dumps(config))
    assert trials.main(["report", "--study", str(folder)]) == 0
    assert read_leaderboard(folder) == read_leaderboard(whole)


def test_missing_ray_exits_1_with_an_install_hint(corpus, tmp_path):
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
def test_unreachable_ray_address_raises_run_error(address):
    with pytest.raises(RunError, match=f"--address {address}: cannot reach Ray there"), ray_backend.connected(address):
        pass


def test_ray_that_does_not_start_raises_run_error(monkeypatch):
    def init(**options):
        raise Exception("The current node timed out during startup.\nThe GCS has become overloaded.")

    monkeypatch.setattr(ray_backend.ray, "init", init)
    with (
        pytest.raises(RunError, match=r"Ray does not start .*timed out during startup. The GCS"),
        ray_backend.connected(None),
    ):
        pass


# --- Studies with Ray ---


def study_process(*given):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "trials.py"), *given, "--cpus_per_trial", "1", "--parallel", "2"],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def children(pid, name):
    output = subprocess.run(["ps", "-o", "pid=,comm=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(line.split()[0]) for line in output.stdout.splitlines() if name in line]


def done(folder):
    return {event["trial"] for event in events(folder) if event["event"] == "done"}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ps") is None, reason="needs ps")
def test_study_with_killed_worker_driver_and_raylet_ends_the_same(whole, tmp_path):
    folder = copy_without(whole, tmp_path / "study", "search", "select", "retrain")
    first = study_process("run", "--resume", "--study", str(folder))

    def trial():
        """Returns the process id of a search that has a checkpoint and no result, read from its lock."""
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
    assert "error: Ray has stopped; continue with --resume" in out

    third = study_process("run", "--resume", "--study", str(folder))
    out, _ = third.communicate(timeout=300)
    assert third.returncode == 0, out
    # The run of the chosen cell is resumed to evaluate the test text, so its result changes.
    chosen = folder / read_leaderboard(whole)["chosen"]["run"] / "result.json"
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items() if path != chosen)
    assert read_leaderboard(folder) == read_leaderboard(whole)
    assert list(folder.glob("tune-*")) == []


@pytest.mark.slow
def test_halving_stops_some_cells_before_their_last_epoch(corpus, tmp_path):
    """Ray's ASHA ends at least two of six cells early and trains at least one to its last epoch."""
    given = flags(
        corpus, tmp_path / "study", "--methods", "random", "--random_cells", 6, "--select_epochs", 9, "--halving"
    )
    assert study_process("search", *given).wait() == 0
    process = study_process("select", "--study", str(tmp_path / "study"))
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    folder = tmp_path / "study" / "select"
    halved, over = list(folder.glob("*/*/halved.json")), list(folder.glob("*/*/result.json"))
    assert len(halved) + len(over) == 6
    assert len(halved) >= 2
    assert over
    assert "halved at epoch" in out
