"""The process of a trial starts, resumes, fails, and ends with its parent process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, SIZES, outcome, wait_for, write_corpus

import trials
from experiment import metrics
from study import cost, jobs
from study.jobs import Job, TrialFailed

FLAGS = [*SIZES, *"--arch DARTS_V1 --lr 1 --engine eager".split()]


@pytest.fixture
def job(tmp_path):
    write_corpus(tmp_path, train=30, valid=16, test=16)
    return Job("select/cell/1", "train.py", (*FLAGS, "--epochs", "3", "--data", str(tmp_path)))


def test_finished_trial_reports_its_epochs_and_runs_again_only_for_the_test_text(job, tmp_path):
    """The text has moved meanwhile, and its vocabulary is that of the run's first start."""
    records, job = [], job._replace(flags=(*job.flags, "--min_count", "2"))
    jobs.run(job, tmp_path / "study", tmp_path, 1, records.append)
    folder = tmp_path / "study" / job.name
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert job.is_done(tmp_path / "study")
    assert metrics.result(folder)["test_ppl"] is None  # The test text was not evaluated.
    before, again = outcome(folder), []
    jobs.run(job, tmp_path / "study", tmp_path, 1, again.append)
    assert again == records
    assert outcome(folder) == before

    (moved := tmp_path / "moved").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").rename(moved / f"{split}.txt")
    text = job.flags.index("--data") + 1
    test = job._replace(flags=(*job.flags[:text], str(moved), *job.flags[text + 1 :]), test=True)
    assert not test.is_done(tmp_path / "study")
    jobs.run(test, tmp_path / "study", tmp_path, 1, again.append)
    assert test.is_done(tmp_path / "study")
    after = metrics.result(folder)
    assert after["test_ppl"] > 1
    assert after["valid_ppl"] == before["result.json"]["valid_ppl"]


def test_killed_trial_resumes_from_its_checkpoint(job, tmp_path):
    """A resumed trial takes its flags from config.json and ignores those of the job."""
    whole, cut = tmp_path / "whole", tmp_path / "study"
    jobs.run(job, whole, tmp_path, 1, list)
    flags = [*job.flags, "--save", str(cut / job.name), "--test", "skip"]
    command = [sys.executable, ROOT / "train.py", *flags, "--checkpoint_minutes", "0"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=one_thread, stdout=subprocess.DEVNULL) as process:
        wait_for((cut / job.name / "metrics.jsonl").exists, process)
        process.kill()
    records = []
    jobs.run(job._replace(flags=("--not_a_flag",)), cut, tmp_path, 1, records.append)
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert metrics.result(cut / job.name)["valid_ppl"] == metrics.result(whole / job.name)["valid_ppl"]


def test_failed_trial_raises_with_its_last_line_of_output(job, tmp_path):
    with pytest.raises(TrialFailed, match=r"select/cell/1: train.py: error: --lr 0.0: must be above 0"):
        jobs.run(job._replace(flags=(*job.flags, "--lr", "0")), tmp_path / "study", tmp_path, 1, list)


def test_trial_is_killed_when_its_parent_process_is_killed(job, tmp_path):
    """A trial that outlived its parent would hold the lock of its directory and block the next attempt."""
    job = job._replace(flags=(*job.flags, "--epochs", "5000"))
    code = f"from study import jobs; jobs.run(jobs.{job!r}, jobs.Path({str(tmp_path)!r}), {str(tmp_path)!r}, 1, list)"
    lock = tmp_path / job.name / "lock"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as parent:
        wait_for((tmp_path / job.name / "metrics.jsonl").exists, parent)
        trial = json.loads(lock.read_text())["pid"]
        os.kill(trial, 0)
        parent.send_signal(signal.SIGKILL)
    until = time.monotonic() + 10
    while Path(f"/proc/{trial}").exists() and "Z" not in Path(f"/proc/{trial}/stat").read_text().split()[2]:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_trial_with_a_damaged_result_is_not_done(tmp_path):
    (tmp_path / "result.json").write_text('{"valid_ppl": NaN, "genotype": "LSTM"}')
    assert not Job(".", "train.py", ()).is_done(tmp_path)


def test_study_finds_a_relative_folder_from_another_working_directory(tmp_path, monkeypatch):
    write_corpus(tmp_path, train=30, valid=16, test=16)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    small = ["--seeds", "1", "--search_epochs", "1", "--search_flags", f"{' '.join(SIZES)} --vocab_size 8"]
    argv = ["search", "--study", str(tmp_path / "study")]
    for place, more in ((tmp_path, ["--data", ".", *small]), (tmp_path / "elsewhere", [])):
        monkeypatch.chdir(place)
        args, corpus, run = trials.start_study(trials.build_parser(), [*argv, *more])
        run.release()
        assert Path(args.data).is_absolute() and len(corpus.train) == 300
    job = trials.Study(tmp_path / "study", args).search()[0]
    assert cost.parse(job).vocab_size == 8
