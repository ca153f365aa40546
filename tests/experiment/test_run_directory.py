"""Tests what a run records about the checkout that it runs from."""

import os
import subprocess

from experiment import run_directory


def test_git_commit_names_the_commit_and_leaves_the_index_alone(tmp_path, monkeypatch):
    """`git status` rewrites an index whose file times are stale, under a lock that a kill would leave behind."""

    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True, text=True)

    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setattr(run_directory, "__file__", str(tmp_path / "experiment" / "run_directory.py"))
    git("init", "-q")
    tracked, index = tmp_path / "tracked", tmp_path / ".git" / "index"
    tracked.write_text("1")
    git("add", "tracked")
    git("commit", "-qm", "first")
    os.utime(tracked, (1, 1))
    before = index.read_bytes()
    commit = git("rev-parse", "HEAD").stdout.strip()
    git_commit = run_directory.git_commit.__wrapped__  # without the memory of conftest.py
    assert git_commit() == commit
    assert index.read_bytes() == before
    tracked.write_text("2")
    assert git_commit() == commit + "+"
    assert index.read_bytes() == before
