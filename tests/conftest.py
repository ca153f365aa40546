"""The tests share these settings and fixtures."""

import itertools
import os
from functools import cache

import pytest
from helpers import FULL, write_corpus
from hypothesis import settings

from experiment import run_directory

# Tests that compile the kernels of the fused engine do so in processes of their own (`helpers.run_compiling`); all
# others run the same functions uncompiled, so that they do not wait for a compiler.
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
# Property tests have the same examples in every run, and at full length new ones. None has a deadline: how long an
# example takes depends on what else the machine does.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.register_profile("full", deadline=None, database=None)
settings.load_profile("full" if FULL else "repeatable")


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=8 if FULL else 1, help="how many runs test_crash.py kills")


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory):
    """Keeps caches of corpora, also those of processes that a test starts, out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("caches")))
        yield


@pytest.fixture(scope="session", autouse=not FULL)
def fsync_does_not_wait():
    """Leaves out fsync, which matters only where a machine loses its power, and no test turns one off. Many tests save
    a checkpoint at every step, and would wait for the disk a fifth of their time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def git_is_asked_once():
    """Remembers the commit that each of a thousand runs records."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_directory, "git_commit", cache(run_directory.git_commit))
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Returns the folder of a corpus of a made-up language, on which a run takes a second; no test may write to it."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), train=30, valid=16, test=16)


@pytest.fixture
def before_step(monkeypatch):
    """A function that makes a script call `action` before its step of this `number`, in this process."""

    def set_up(script, number, action):
        clipped_gradient, steps = script.clipped_gradient, itertools.count(1)

        def step(*arguments):
            if next(steps) == number:
                action()
            return clipped_gradient(*arguments)

        monkeypatch.setattr(script, "clipped_gradient", step)

    return set_up
