"""Where compiling fails, kernels run uncompiled after one line, with the results of the functions themselves."""

import os
import random
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run_compiling
from torch._dynamo import exc as dynamo_errors
from torch._inductor import exc as inductor_errors
from torch._subclasses.fake_tensor import FakeTensorMode

from engine import kernel_cache
from engine.inductor import LOG, Call, Compiled, inductor
from experiment.run_directory import LogHandler, NullRun, Run

CXX = shutil.which(os.environ.get("CXX", "g++"))
needs_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler")
NOTE = r"compiling failed \((.*)\): --engine fused runs uncompiled from here on, slower and with other rounding\n"

# Both kernels add to their last argument, so that a second run of one would give another result.
KERNELS = """
import os, torch
from engine import inductor

inductor.TIME_LIMIT = float(os.environ.get("LIMIT", "300"))

@inductor.kernel
def add_wave(x, total):
    total.copy_(total + x.sin() * 2)

@inductor.kernel
def add_sum(x, total):
    total.copy_(total + x.sum(0))

def totals(wave, add):
    x, sums = torch.arange(12.0).view(3, 4), [torch.ones(3, 4), torch.ones(4)]
    for _ in range(2):
        wave(x, sums[0])
        add(x, sums[1])
    return sums

sums, expected = totals(add_wave, add_sum), totals(add_wave.__wrapped__, add_sum.__wrapped__)
assert all(torch.allclose(*pair) for pair in zip(sums, expected))
print(inductor.Compiled.failed, all(torch.equal(*pair) for pair in zip(sums, expected)))
"""


def fallback_reason(done):
    """Returns the reason in the line of a process that ran KERNELS, all uncompiled."""
    assert (done.returncode, done.stdout) == (0, "True True\n"), done.stderr
    return re.fullmatch(NOTE, done.stderr)[1]


ANSWERS = f"""case "$*" in *--version*|-v|*print-file-name*) exec {CXX} "$@";; esac\n"""
COMPILERS = {
    "fails": (ANSWERS + "echo 'x.cpp:1: error: no luck' >&2; exit 1", "error: no luck"),
    "hangs": (ANSWERS + "sleep 1000", "had not ended after 8 seconds"),
    "does not answer": ("sleep 1000", "No working C"),
    "writes garbage": (
        ANSWERS + 'while [ $# -gt 0 ]; do [ "$1" = -o ] && echo garbage > "$2"; shift; done', "file too short"
    ),
    "writes half and fails": (
        ANSWERS + 'while [ $# -gt 0 ]; do [ "$1" = -o ] && echo half > "$2"; shift; done; exit 1', "ended with code 1"
    ),
    "writes nothing": (ANSWERS, ""),
    "segfaults": (ANSWERS + "kill -SEGV $$", "ended with code -11"),
    "has no Python headers": (
        'for x; do shift; [[ $x == -I*/include/python3* ]] || set -- "$@" "$x"; done; '
        f'exec {CXX} "$@"',
        "error: Python.h",
    ),
    "vanishes between two kernels": (
        ANSWERS + f'case "$*" in *main.cpp*) mv "$0" "$0.gone";; esac; exec {CXX} "$@"', "c++"
    ),
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize(
    "name", [name if name == "fails" else pytest.param(name, marks=pytest.mark.slow) for name in COMPILERS]
)
def test_failing_compiler_gives_one_line_and_the_uncompiled_result(name, tmp_path):
    """And a compiler that works then finds no file of the other one in the cache."""
    code, reason = COMPILERS[name]
    compiler, cache = tmp_path / "c++", {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    compiler.write_text(f"#!/usr/bin/env bash\n{code}\n")
    compiler.chmod(0o755)
    limit = {"LIMIT": "8"} if name in ("hangs", "does not answer") else {}
    done = run_compiling(KERNELS, CXX=str(compiler), **limit, **cache)
    if name == "vanishes between two kernels":  # the first one was compiled
        assert done.stdout.startswith("True ")
        assert reason in re.fullmatch(NOTE, done.stderr)[1]
    else:
        assert reason in fallback_reason(done)
    if name != "fails":
        done = run_compiling(KERNELS, **cache)
        assert (done.stdout.split()[:1], done.stderr) == (["False"], "")


MOUNTED = ("unshare", "--mount", "bash", "-c", 'mount -t tmpfs -o "$MOUNT" none "$AT" && exec "$@"', "-")


def can_mount():
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="may not mount a file system")
@pytest.mark.parametrize(("mount", "name", "below", "reason"), [
    ("noexec", "TMPDIR", "", "failed to map segment"),
    ("ro", "TORCHINDUCTOR_CACHE_DIR", "", "Read-only file system"),
    ("ro", "TORCHINDUCTOR_CACHE_DIR", "new", "Read-only file system"),
    ("size=40k", "TORCHINDUCTOR_CACHE_DIR", "", "No space left on device"),
])  # fmt: skip
def test_unusable_folder_gives_one_line_and_the_uncompiled_result(mount, name, below, reason, tmp_path, monkeypatch):
    if name == "TMPDIR":
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    done = run_compiling(KERNELS, MOUNTED, MOUNT=mount, AT=str(tmp_path), **{name: str(tmp_path / below)})
    assert reason in fallback_reason(done)


OPTIMIZER = "import engine, torch; torch.optim.SGD([torch.ones(1, requires_grad=True)], 1.0).zero_grad(); print('ran')"


@pytest.mark.parametrize(("code", "out"), [(KERNELS, "True True\n"), (OPTIMIZER, "ran\n")], ids=["fused", "eager"])
def test_cache_folder_that_cannot_be_created_stops_neither_engine(code, out, tmp_path):
    """The import of torch._dynamo creates that folder, and every optimizer imports torch._dynamo."""
    (tmp_path / "file").write_text("")
    done = run_compiling(code, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "file"))
    assert (done.returncode, done.stdout) == (0, out), done.stderr
    assert done.stderr == "" if code == OPTIMIZER else re.fullmatch(NOTE, done.stderr)


# --- a damaged cache ---


def cut(data):
    return data[: len(data) // 2]


def flip(data):
    place = random.Random(len(data)).randrange(len(data))
    return data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("damage", [cut, flip])
def test_damaged_cache_is_compiled_again(damage, tmp_path):
    first = run_compiling(KERNELS, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    damaged = list(kernel_cache.files(tmp_path))
    assert len(damaged) > 10
    for _, path in damaged:
        path.write_bytes(damage(path.read_bytes()))
    again = run_compiling(KERNELS, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert (again.stdout, again.stderr) == (first.stdout, "")
    assert first.stdout.startswith("False")


@needs_compiler
@pytest.mark.slow
def test_cached_file_of_another_version_is_passed_over(tmp_path):
    """An entry whose classes are not those of this version cannot be unpickled."""
    first = run_compiling(KERNELS, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    for path in [*tmp_path.glob("fxgraph/*/*/*"), *tmp_path.glob("aotautograd/*/*")]:
        path.write_bytes(b"ctorch._inductor\nNoSuchClass\n.")
    (tmp_path / kernel_cache.CHECKSUMS).unlink()
    again = run_compiling(KERNELS, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert (again.stdout, again.stderr) == (first.stdout, "")


def test_files_that_changed_are_removed_and_those_of_others_are_kept(tmp_path):
    kept, changed, unknown, old = (tmp_path / "ab" / name for name in ("kept", "changed", "unknown", "old"))
    kept.parent.mkdir()
    for path in (kept, changed, old):
        path.write_bytes(b"code")
    os.utime(old, (1, 1))  # It was there before this process compiled anything.
    kernel_cache.record_checksums(tmp_path, since=2.0)
    for path in (changed, unknown, old):
        path.write_bytes(b"kode")
    with open(tmp_path / kernel_cache.CHECKSUMS, "ab") as file:
        file.write(b"\xff\n 0 ../outside\n\ncut")
    kernel_cache.remove_damaged(tmp_path)
    assert sorted(path.name for path in kept.parent.iterdir()) == ["kept", "old", "unknown"]


def test_file_that_another_process_had_not_finished_is_recorded_again(tmp_path):
    library = tmp_path / "library.so"
    library.write_bytes(b"half")
    kernel_cache.record_checksums(tmp_path, since=0.0)
    library.write_bytes(b"whole")
    kernel_cache.record_checksums(tmp_path, since=0.0)
    kernel_cache.remove_damaged(tmp_path)
    assert library.exists()


# --- on CUDA ---

FOR_H100 = """
import sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from engine.inductor import compiler_within

@triton.jit
def double(x, y, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(y + at, 2 * tl.load(x + at))

source = ASTSource(double, {"x": "*fp32", "y": "*fp32", "n": "constexpr"}, {"n": 64})
try:
    with compiler_within(float(sys.argv[1]), "cuda"):
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
    print("compiled")
except Exception as error:
    print(type(error).__name__, error.cmd[0])
"""
SAYS_VERSION = 'case "$*" in *--version*) echo "Cuda compilation tools, release 12.8, V12.8.93"; exit;; esac; '


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("code", [SAYS_VERSION + "sleep 1000", pytest.param("sleep 1000", marks=pytest.mark.slow)])
def test_triton_whose_ptxas_hangs_ends_at_the_time_limit(code, tmp_path):
    """Triton itself compiles here for a GPU that is not there; a script stands for ptxas."""
    script, ptxas = tmp_path / "double.py", tmp_path / "ptxas"
    script.write_text(FOR_H100)
    ptxas.write_text(f"#!/bin/sh\n{code}\n")
    ptxas.chmod(0o755)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache")}

    def compile_within(limit, **more):
        command = [sys.executable, script, limit]
        return subprocess.run(command, env=environment | more, capture_output=True, text=True, timeout=100).stdout

    assert compile_within("4", TRITON_PTXAS_PATH=str(ptxas)) == f"TimeoutExpired {ptxas}\n"
    assert compile_within("100") == "compiled\n"


@pytest.mark.parametrize(("device", "in_this_process"), [("cuda", True), ("cpu", False)])
def test_triton_compiles_in_the_process_that_limits_its_time(device, in_this_process, monkeypatch):
    given = {}
    compile_fx = "torch._inductor.compile_fx.compile_fx"
    monkeypatch.setattr(compile_fx, lambda *_, config_patches: given.update(config_patches))
    with FakeTensorMode():
        inductor(None, [torch.empty(2, device=device), 3])
    assert (given.get("compile_threads") == 1) == in_this_process


# --- errors, in the place of a compiler ---


class Refused(Exception):
    """Stands for the errors of Triton, which is not installed where there is no GPU."""


def wrapped(error):
    return inductor_errors.InductorError(error, None)


@pytest.fixture
def compiled(monkeypatch):
    """Returns a function that makes a kernel whose compiling raises an error, possibly after its code has begun."""
    monkeypatch.setattr(Compiled, "failed", False)

    def make(error, begins=False):
        def compile_and_fail(self, args, calls):
            if begins:
                args[-1].add_(100)  # a part of the results
                calls.append(Call(None, (), True))
            raise error

        monkeypatch.setattr(Compiled, "compile", compile_and_fail)
        return Compiled(lambda x, total: total.copy_(total + x)), Compiled(lambda x, total: total.copy_(total * x))

    return make


@pytest.mark.parametrize("error", [
    wrapped(Refused("ptxas fatal: sm_999 is not defined for option 'gpu-name'")),
    wrapped(subprocess.CalledProcessError(1, ["gcc", "launcher.c"])),
    wrapped(subprocess.TimeoutExpired(["ptxas"], 1)),
    wrapped(ImportError("libcuda.so.1: cannot open shared object file")),
    inductor_errors.TritonMissing(None),
    dynamo_errors.BackendCompilerFailed(print, Refused("OutOfResources: shared memory"), None),
    dynamo_errors.FailOnRecompileLimitHit("recompile_limit reached"),
    PermissionError(13, "Permission denied", "/home/someone/.triton"),
], ids=lambda error: type(getattr(error, "inner_exception", error)).__name__)  # fmt: skip
def test_error_of_compiling_for_cuda_makes_all_kernels_run_uncompiled(error, compiled, caplog):
    add, multiply = compiled(error)
    total = torch.ones(2)
    for _ in range(2):
        add(torch.ones(2), total)
        multiply(torch.full((2,), 3.0), total)
    assert total.tolist() == [21.0, 21.0]
    [record] = caplog.records
    assert re.fullmatch(NOTE, record.getMessage() + "\n")


@pytest.mark.parametrize(("error", "begins"), [
    (wrapped(torch.OutOfMemoryError("CUDA out of memory")), False),
    (wrapped(MemoryError()), False),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
    (wrapped(RuntimeError("in the code's own run")), True),
    (AssertionError("a fault of this program"), False),
], ids=str)  # fmt: skip
def test_lack_of_memory_and_errors_of_running_code_are_raised(error, begins, compiled, caplog):
    add, _ = compiled(error, begins)
    with pytest.raises(type(error)):
        add(torch.ones(2), torch.ones(2))
    assert not Compiled.failed
    assert caplog.records == []


def test_error_of_the_function_itself_is_raised(compiled, caplog):
    add, _ = compiled(dynamo_errors.TorchRuntimeError("fake tensors of other shapes"))
    with pytest.raises(RuntimeError, match="size of tensor"):
        add(torch.ones(3), torch.ones(2))
    assert not Compiled.failed
    assert caplog.records == []


@pytest.mark.parametrize("kind", [Run, NullRun])
def test_main_rank_alone_prints_and_logs_the_line(kind, tmp_path, capsys):
    handler = LogHandler(kind(tmp_path))
    LOG.addHandler(handler)
    try:
        LOG.warning("compiling failed")
    finally:
        LOG.removeHandler(handler)
    log = Path(tmp_path, "log.txt")
    if kind is Run:
        handler.run.release()
        assert log.read_text().count("compiling failed") == capsys.readouterr().out.count("compiling failed") == 1
    else:
        assert capsys.readouterr() == ("", "") and not log.exists()
