"""Tests that checkpoints are written atomically, restore all random states and are refused if damaged or unsafe."""

import errno
import hashlib
import io
import math
import os
import pickle
import struct
import zipfile
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import utils
from experiment import checkpoint, resume
from engine.memory import out_of_memory


def test_load_returns_the_saved_state(tmp_path):
    state = {"model": {"w": torch.randn(3, 2)}, "numbers": [1, 2.5, None, True], "words": ["a", "ä"]}
    checkpoint.save(state, tmp_path / "last.pt")
    loaded = checkpoint.load(tmp_path / "last.pt")
    assert torch.equal(loaded["model"]["w"], state["model"]["w"])
    assert (loaded["numbers"], loaded["words"]) == (state["numbers"], state["words"])
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


# --- disk failures ---


class Disk:
    """Replaces the calls that write a checkpoint to disk; the call with number `fails_at` fails. A write that fails has
    written half of its data."""

    def __init__(self, patch, fails_at, code):
        self.calls, self.fails_at, self.code = [], fails_at, code
        patch.setattr(utils, "open", self.open, raising=False)
        for name in ("fsync", "replace", "link"):
            patch.setattr(checkpoint.os, name, partial(self.call, name, getattr(os, name)))

    def call(self, name, real, *arguments):
        self.calls.append(name)
        if len(self.calls) == self.fails_at:
            raise OSError(self.code, os.strerror(self.code))
        return real(*arguments)

    def open(self, path, mode="r", **more):
        if "x" not in mode:
            return open(path, mode, **more)
        file = self.call("open", open, path, mode)
        whole = file.write

        def write(data):
            try:
                return self.call("write", whole, data)
            except OSError:
                whole(data[: len(data) // 2])
                raise

        return Writer(file, write)


class Writer:
    def __init__(self, file, write):
        self.file, self.write = file, write

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=errno.errorcode.get)
def test_failing_save_leaves_a_valid_checkpoint(code, tmp_path, monkeypatch):
    """Each call of a save fails in turn, until a save makes fewer calls."""
    names = set()
    for fails_at in range(1, 100):
        folder = tmp_path / str(fails_at)
        folder.mkdir()
        for epoch in (1, 2):
            checkpoint.save_last({"epoch": epoch}, folder)
        with monkeypatch.context() as patch:
            disk = Disk(patch, fails_at, code)
            try:
                checkpoint.save_last({"epoch": 3}, folder)
                failed = False
            except checkpoint.CheckpointError as error:
                failed = True
                assert str(folder) in str(error)
                assert os.strerror(code) in str(error)
                assert "\n" not in str(error)
        if len(disk.calls) < fails_at:
            break
        names.add(disk.calls[-1] if failed else "survived " + disk.calls[fails_at - 1])
        state, note = checkpoint.load_last(folder)
        assert note is None
        renamed = not failed or disk.calls.count("fsync") == 3  # the third fsync is that of the folder
        assert state["epoch"] == (3 if renamed else 2)
        assert {path.name for path in folder.iterdir()} == {"last.pt", "previous.pt"}
        assert checkpoint.load(folder / "previous.pt")["epoch"] in (1, 2)
    assert {"open", "write", "fsync", "replace"} <= names
    assert "survived link" in names  # a save that cannot link copies instead
    state, _ = checkpoint.load_last(folder)
    assert (state["epoch"], checkpoint.load(folder / "previous.pt")["epoch"]) == (3, 2)


def test_full_disk_error_names_the_needed_and_the_free_space(tmp_path, monkeypatch):
    checkpoint.save({"w": torch.zeros(100_000)}, tmp_path / "last.pt")
    Disk(monkeypatch, 2, errno.ENOSPC)
    with pytest.raises(
        checkpoint.CheckpointError, match=r"last\.pt: cannot .*No space left.* takes 0\.4 MB, and .* MB"
    ):
        checkpoint.save({"w": torch.ones(100_000)}, tmp_path / "last.pt")
    assert not checkpoint.load(tmp_path / "last.pt")["w"].any()


def test_save_to_a_removed_folder_fails_and_does_not_create_it(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match=r"last\.pt: cannot be written"):
        checkpoint.save_last({"epoch": 1}, tmp_path / "removed")
    assert not (tmp_path / "removed").exists()


# --- damaged files ---


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bit_or_truncation_falls_back_to_previous_checkpoint(data, tmp_path):
    for epoch in (1, 2):
        checkpoint.save_last({"epoch": epoch, "w": torch.arange(50.0)}, tmp_path)
    last = tmp_path / "last.pt"
    raw = bytearray(last.read_bytes())
    if data.draw(st.booleans()):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    last.write_bytes(raw)
    state, note = checkpoint.load_last(tmp_path)
    assert state["epoch"] == 1
    assert "last.pt" in note
    assert "previous.pt" in note
    checkpoint.save_last({"epoch": 3}, tmp_path)  # The damaged checkpoint does not become previous.pt.
    assert checkpoint.load(tmp_path / "previous.pt")["epoch"] == 1
    last.unlink()
    assert checkpoint.load_last(tmp_path)[0]["epoch"] == 1


def test_torch_load_reads_a_checkpoint(tmp_path):
    """The checksum in the file does not keep torch from reading a checkpoint."""
    checkpoint.save({"w": torch.arange(5)}, tmp_path / "last.pt")
    assert torch.equal(torch.load(tmp_path / "last.pt", weights_only=True)["w"], torch.arange(5))


def test_equal_states_have_equal_bytes():
    """The bytes do not depend on how a state was built: from literals or joined strings, from views or copies."""
    w = torch.arange(12.0).view(3, 4)
    joined = {"flags": {"arch": "".join(["re", "lu"]), "op": "relu"}, "w": w[:, :2], "v": [w[0], w[0]], "n": (1, 0.5)}
    literal = {"flags": {"arch": "relu", "op": "relu"}, "w": w[:, :2].clone(), "v": [w[0].clone(), w[0]], "n": (1, 0.5)}
    assert checkpoint.with_checksum(joined) == checkpoint.with_checksum(literal)
    assert checkpoint.with_checksum(joined) != checkpoint.with_checksum({**literal, "n": (1, 0.25)})


# --- files from an untrusted source ---


def add_checksum(raw: bytes) -> bytes:
    """Returns a zip file with a valid checksum, which anyone can compute."""
    body = raw[:-2] + struct.pack("<H", checkpoint.CHECKSUM_SIZE)
    return body + checkpoint.CHECKSUM.format(hashlib.sha256(body).hexdigest()).encode()


def assert_refused(path):
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_zip_bomb_is_refused(tmp_path):
    file = io.BytesIO()
    torch.save({"format": checkpoint.FORMAT, "w": torch.zeros(5_000_000)}, file)
    packed = io.BytesIO()
    with zipfile.ZipFile(file) as plain, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for part in plain.infolist():
            archive.writestr(part.filename, plain.read(part))
    assert len(packed.getvalue()) < 1e5
    (tmp_path / "x.pt").write_bytes(add_checksum(packed.getvalue()))
    assert_refused(tmp_path / "x.pt")


def test_expanded_tensor_larger_than_its_storage_is_refused(tmp_path):
    file = io.BytesIO()
    torch.save({"format": checkpoint.FORMAT, "model": {"w": torch.zeros(1).expand(10**12)}}, file)
    (tmp_path / "x.pt").write_bytes(add_checksum(file.getvalue()))
    assert_refused(tmp_path / "x.pt")


class Bytes:
    """Pickles to a call of `bytearray`, which `weights_only` permits with any size."""

    def __reduce__(self):
        return bytearray, (300_000_000,)


def test_pickle_that_allocates_a_large_bytearray_is_refused(tmp_path):
    file = io.BytesIO()
    torch.save({"format": checkpoint.FORMAT, "x": Bytes()}, file)
    (tmp_path / "x.pt").write_bytes(add_checksum(file.getvalue()))
    assert len(file.getvalue()) < 5000
    assert_refused(tmp_path / "x.pt")


def test_each_wording_of_an_out_of_memory_error_is_recognised():
    texts = ("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
             "CUDA error: out of memory", "Triton Error [CUDA]: out of memory", "CUDA driver error: out of memory",
             "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
             "cuDNN error: CUDNN_STATUS_ALLOC_FAILED")  # fmt: skip
    for error in (*map(RuntimeError, texts), torch.OutOfMemoryError("CUDA out of memory. Tried ..."), MemoryError()):
        assert out_of_memory(error)
    assert not out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_out_of_memory_is_not_reported_as_damage(tmp_path, monkeypatch):
    checkpoint.save_last({"w": torch.zeros(3)}, tmp_path)

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(torch.OutOfMemoryError):
        checkpoint.load_last(tmp_path)


def test_self_referential_state_ends_and_pipe_and_folder_are_refused(tmp_path):
    state = {"format": checkpoint.FORMAT, "w": torch.zeros(2)}
    state["self"] = state
    file = io.BytesIO()
    torch.save(state, file)
    (tmp_path / "x.pt").write_bytes(add_checksum(file.getvalue()))
    checkpoint.load(tmp_path / "x.pt")  # The load ends; the caller validates the state.
    os.mkfifo(tmp_path / "pipe.pt")
    assert_refused(tmp_path / "pipe.pt")
    assert_refused(tmp_path)


class Exploit:
    """Pickles to a call of `open` that creates the file `target`."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.parametrize("bytes_of", [
    lambda target: b"",
    lambda target: b"not a checkpoint",
    lambda target: pickle.dumps({"format": checkpoint.FORMAT, "x": Exploit(target)}),
    lambda target: pickle.dumps([1, 2]),
])  # fmt: skip
def test_file_that_is_no_checkpoint_is_refused_with_one_line(bytes_of, tmp_path):
    path, target = tmp_path / "x.pt", tmp_path / "written"
    path.write_bytes(bytes_of(target))
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not target.exists()


def test_code_in_a_checkpoint_is_not_executed(tmp_path):
    target = tmp_path / "written"
    file = io.BytesIO()
    torch.save({"format": checkpoint.FORMAT, "x": Exploit(target)}, file)
    (tmp_path / "x.pt").write_bytes(add_checksum(file.getvalue()))
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.load(tmp_path / "x.pt")
    assert not target.exists()


@pytest.mark.parametrize("length", [10, 200, -1])
def test_truncated_checkpoint_is_refused(length, tmp_path):
    path = tmp_path / "x.pt"
    checkpoint.save({"w": torch.randn(100)}, path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.load(path)


def test_missing_file_and_old_format_are_refused(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match=r"missing\.pt"):
        checkpoint.load(tmp_path / "missing.pt")
    torch.save({"format": 1}, tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(add_checksum((tmp_path / "x.pt").read_bytes()))
    with pytest.raises(checkpoint.CheckpointError, match="format"):
        checkpoint.load(tmp_path / "x.pt")


def test_rng_state_restores_every_generator():
    device, bptt = torch.device("cpu"), torch.Generator().manual_seed(5)
    torch.manual_seed(1)
    state = checkpoint.rng_state(device, bptt)
    first = torch.rand(3), torch.rand(3, generator=bptt)
    checkpoint.set_rng_state(state, device, bptt)
    torch.testing.assert_close((torch.rand(3), torch.rand(3, generator=bptt)), first, rtol=0, atol=0)


def optimizer_of(weight):
    weight = torch.nn.Parameter(weight)
    return torch.optim.Adam([weight], lr=0.1)


def test_state_from_another_device_passes_validation():
    """A state may have the random state of a GPU or not; nothing else depends on the device that it was saved on."""
    optimizer = optimizer_of(torch.zeros(3))
    cpu = {"rng": [{"torch": torch.get_rng_state()}], "w": torch.zeros(3), "optimizer": optimizer.state_dict(),
           "stopped_by": "", "words": ["a"], "sha256": {"train": "0"}}  # fmt: skip
    gpu = {**cpu, "rng": [{**cpu["rng"][0], "cuda": torch.zeros(16, dtype=torch.uint8)}]}
    for saved, template in ((cpu, gpu), (gpu, cpu)):
        template = {**template, "optimizer": checkpoint.optimizer_template(optimizer)}
        resume.check_state(saved, template, ("patience",))


@pytest.mark.parametrize(
    ("part", "odd"),
    [("w", torch.zeros(4)), ("w", torch.zeros(3, dtype=torch.int64)), ("w", 1.0), ("n", -1), ("n", True), ("n", 1.0),
     ("x", math.nan), ("x", 1e39), ("x", 1), ("losses", [1.0, "a"]), ("losses", {}), ("text", None), ("text", 3)],
)  # fmt: skip
def test_validate_state_names_the_entry_that_does_not_fit(part, odd):
    template = {"w": torch.zeros(3), "n": 3, "x": 0.5, "losses": [1.0], "text": "sgd"}
    for changes in ({}, {"losses": []}, {"losses": [2.0, 3.0]}, {"x": math.inf}, {"more": 1}):
        checkpoint.validate_state({**template, **changes}, template)
    with pytest.raises(ValueError, match=f"state, {part}"):
        checkpoint.validate_state({**template, part: odd}, template)
    with pytest.raises(ValueError, match="expected"):
        checkpoint.validate_state({name: template[name] for name in template if name != part}, template)


def test_optimizer_template_fits_states_before_and_after_a_step():
    weight = torch.ones(3)
    optimizer = optimizer_of(weight)
    template = checkpoint.optimizer_template(optimizer)
    assert not optimizer.state
    assert torch.equal(weight, torch.ones(3))
    checkpoint.validate_state(optimizer.state_dict(), template)  # before its first step an optimizer has no state
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    checkpoint.validate_state(optimizer.state_dict(), template)
    state = optimizer.state_dict()
    state["state"][0]["exp_avg"] = torch.zeros(2)
    with pytest.raises(ValueError, match="exp_avg"):
        checkpoint.validate_state(state, template)
