"""Tests of the shell scripts: shellcheck has no complaint, slurm.sh starts the right commands, study_ptb.sh the stages
of its protocol, and a Python that is too old makes no `.venv`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, copy_scripts

from benchmarks.step import STEPS
from study.arguments import STAGE_FLAGS, build_parser
from study.validate_arguments import continues

SCRIPTS = sorted([*ROOT.glob("scripts/*.sh"), *ROOT.glob("benchmarks/*.sh"), ROOT / ".ci" / "run"])


def test_shellcheck_reports_nothing():
    assert len(SCRIPTS) > 8
    done = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), "-x", *SCRIPTS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_python_that_is_too_old_makes_no_environment(tmp_path):
    old = tmp_path / "python3.10"
    old.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 1\nmkdir .venv\n')  # the version check fails; -m venv would not
    old.chmod(0o755)
    script = f"source '{ROOT}/scripts/common.sh'; python_with requirements.txt"
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env={**os.environ, "PYTHON": str(old)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1 and not (tmp_path / ".venv").exists()
    assert done.stderr.count("\n") == 1 and f"3.11 or newer is needed, and {old} is not" in done.stderr


@pytest.mark.parametrize(
    ("part", "stages"),
    [
        ([], "proxy report search select baseline retrain report search select report"),
        (["proxies"], "proxy report"),
        (["two"], "search select baseline retrain report"),
        (["eight"], "search select report"),
    ],
)
def test_study_of_penn_runs_the_stages_of_its_protocol(part, stages, tmp_path):
    """A copy of the script, whose .venv has a program in the place of Python that prints the stage."""
    copy_scripts(tmp_path, '[ "$1" = -m ] || echo "$2"', "requirements-cluster.txt")
    script = ["bash", tmp_path / "scripts" / "study_ptb.sh"]
    done = subprocess.run([*script, *part], capture_output=True, text=True, check=True)
    assert done.stdout.split() == stages.split()
    wrong = subprocess.run([*script, "three"], capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stderr) == (2, "three: no part of the study; take proxies, two or eight\n")


@pytest.mark.parametrize(("part", "folder"), [("proxies", "penn-64"), ("two", "penn-64-confirmation")])
def test_study_of_penn_would_begin_with_the_flags_that_its_committed_parts_have(part, folder, tmp_path):
    """Flags that the stages of the part do not use are left out."""
    copy_scripts(tmp_path, '[ "$1" = -m ] || { shift; printf "%s\\0" "$@"; }', "requirements-cluster.txt")
    script = ["bash", tmp_path / "scripts" / "study_ptb.sh", part]
    stages = {"proxies": ["proxy"], "two": ["search", "select", "baseline", "retrain"]}[part]
    for stage in stages:
        done = subprocess.run([*script, stage], capture_output=True, text=True, check=True)
        args = build_parser().parse_args(done.stdout.split("\0")[:-1])
        committed = json.loads((ROOT / "docs" / "study" / folder / "study.json").read_text())["flags"]
        for name in STAGE_FLAGS[stage].split():
            assert continues(name, committed[name], getattr(args, name)), name


def test_stages_on_a_gpu_go_on_after_one_that_fails_and_never_mix_with_older_results(tmp_path):
    """A program in the place of Python writes down what it is asked, and fails for one of the steps."""
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\ncase "$*" in *"--steps train "*) exit 3;; esac\n')
    python.chmod(0o755)
    command = ["bash", ROOT / "benchmarks" / "gpu.sh"]
    environment = {**os.environ, "PYTHON": str(python), "OUT": str(out)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and (out / "failed.txt").read_text() == "step-train: exit 3\n"
    calls = (tmp_path / "calls").read_text()
    for words in ("-m pytest", *(f"--steps {name} " for name in STEPS), "train_search.py", "train.py", "gpu_report.py"):
        assert words in calls
    limits = [int(n) for n in re.findall(r"^ *stage \S+ (\d+) ", command[1].read_text(), re.MULTILINE)]
    limits += [int(n) for n in re.findall(r"[a-z]:(\d+)\b", command[1].read_text())]
    assert len(limits) == 3 + len(STEPS) and sum(limits) <= 9 * 60
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 2 and "holds files already" in again.stderr


@pytest.fixture
def slurm(tmp_path):
    """A function that runs slurm.sh as a job of some nodes, with fakes of Slurm and Python, and returns the job and the
    sorted command lines that the fake Python got."""
    fakes = {
        "scontrol": 'printf "node1\\nnode2\\n"',
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "sleep": "",
        "python": 'echo "$@" >>commands',
    }
    for name, body in fakes.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def run(*arguments, nodes=1):
        environment = {
            **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"),
            "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "16", "SLURM_JOB_ID": "77",
        }  # fmt: skip
        job = subprocess.run(
            ["bash", ROOT / "scripts" / "slurm.sh", *arguments], env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        log = tmp_path / "commands"
        return job, sorted(log.read_text().splitlines()) if log.exists() else []

    return run


TORCHRUN = (
    "-m torch.distributed.run --nnodes={} --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=node1:6380"
    " --rdzv_id=77 train.py"
)


def test_slurm_starts_a_run_with_torchrun_and_resumes_it(slurm, tmp_path):
    job, commands = slurm("train.py", "--arch", "DARTS", "--save", "run", nodes=2)
    assert (job.returncode, commands) == (0, [f"{TORCHRUN.format(2)} --arch DARTS --save run"])
    (tmp_path / "commands").unlink()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    _, commands = slurm("train.py", "--arch", "DARTS", "--save", "run")
    assert commands == [f"{TORCHRUN.format(1)} --resume --save run"]


def test_slurm_starts_ray_on_every_node_and_the_study_on_one(slurm, tmp_path):
    job, commands = slurm("study", "--study", "runs/study", "--gpus_per_trial", "0.25", nodes=2)
    assert job.returncode == 0, job.stderr
    ray = "-m ray.scripts.scripts start"
    assert commands == [
        "-m ray.scripts.scripts get-auth-token --generate",
        f"{ray} --address=node1:6379 --num-cpus=16 --num-gpus=4 --block",
        f"{ray} --head --port=6379 --num-cpus=16 --num-gpus=4 --block",
        "trials.py run --study runs/study --gpus_per_trial 0.25 --address node1:6379",
    ]
    (tmp_path / "commands").unlink()
    (tmp_path / "runs" / "study").mkdir(parents=True)
    (tmp_path / "runs" / "study" / "study.json").write_text("{}")
    job, commands = slurm("study", "--study", "runs/study")
    assert job.returncode == 0, job.stderr
    assert commands[-1] == "trials.py run --resume --study runs/study --address node1:6379"


def test_slurm_without_save_or_study_exits_2(slurm):
    job, commands = slurm("train.py", "--arch", "DARTS")
    assert (job.returncode, commands) == (2, [])
    assert job.stderr == "slurm.sh: give the job a directory to resume from, with --save or --study\n"
