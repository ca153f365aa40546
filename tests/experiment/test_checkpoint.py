"""Checkpoints: whole or untouched, every generator in them, and no code out of them."""

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


def test_what_is_saved_is_loaded(tmp_path):
    state = {"model": {"w": torch.randn(3, 2)}, "numbers": [1, 2.5, None, True], "words": ["a", "ä"]}
    checkpoint.save(state, tmp_path / "last.pt")
    found = checkpoint.load(tmp_path / "last.pt")
    assert torch.equal(found["model"]["w"], state["model"]["w"])
    assert (found["numbers"], found["words"]) == (state["numbers"], state["words"])
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


# --- a disk that fails ---


class Disk:
    """The calls by which a checkpoint reaches the disk, the n-th of which fails (and leaves half a write)."""

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
def test_whatever_call_fails_a_whole_checkpoint_is_there(code, tmp_path, monkeypatch):
    """At every call of a save in turn, until a save makes fewer."""
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
    assert "survived link" in names  # copied instead
    state, _ = checkpoint.load_last(folder)
    assert (state["epoch"], checkpoint.load(folder / "previous.pt")["epoch"]) == (3, 2)


def test_a_full_disk_is_named_with_the_space_that_is_needed(tmp_path, monkeypatch):
    checkpoint.save({"w": torch.zeros(100_000)}, tmp_path / "last.pt")
    Disk(monkeypatch, 2, errno.ENOSPC)
    with pytest.raises(
        checkpoint.CheckpointError, match=r"last\.pt: cannot .*No space left.* takes 0\.4 MB, and .* MB"
    ):
        checkpoint.save({"w": torch.ones(100_000)}, tmp_path / "last.pt")
    assert not checkpoint.load(tmp_path / "last.pt")["w"].any()


# --- a file that was damaged ---


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bit_that_flips_and_any_cut_is_noticed_and_the_copy_before_is_taken(data, tmp_path):
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
    checkpoint.save_last({"epoch": 3}, tmp_path)  # and the damaged one does not become the copy before
    assert checkpoint.load(tmp_path / "previous.pt")["epoch"] == 1
    last.unlink()
    assert checkpoint.load_last(tmp_path)[0]["epoch"] == 1


def test_what_torch_makes_of_a_checkpoint_is_what_was_saved(tmp_path):
    """The seal does not keep anyone from reading a checkpoint with torch alone."""
    checkpoint.save({"w": torch.arange(5)}, tmp_path / "last.pt")
    assert torch.equal(torch.load(tmp_path / "last.pt", weights_only=True)["w"], torch.arange(5))


def test_equal_states_have_equal_bytes():
    """However they came about: as literals, as strings put together, as views, from a file."""
    w = torch.arange(12.0).view(3, 4)
    made = {"flags": {"arch": "".join(["re", "lu"]), "op": "relu"}, "w": w[:, :2], "v": [w[0], w[0]], "n": (1, 0.5)}
    told = {"flags": {"arch": "relu", "op": "relu"}, "w": w[:, :2].clone(), "v": [w[0].clone(), w[0]], "n": (1, 0.5)}
    assert checkpoint.with_checksum(made) == checkpoint.with_checksum(told)
    assert checkpoint.with_checksum(made) != checkpoint.with_checksum({**told, "n": (1, 0.25)})


# --- a file from a stranger ---


def seal(raw: bytes) -> bytes:
    """A zip file with the checksum that a stranger can compute as well."""
    body = raw[:-2] + struct.pack("<H", checkpoint.CHECKSUM_SIZE)
    return body + checkpoint.CHECKSUM.format(hashlib.sha256(body).hexdigest()).encode()


def refused(path):
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    file = io.BytesIO()
    torch.save({"format": checkpoint.FORMAT, "w": torch.zeros(5_000_000)}, file)
    packed = io.BytesIO()
    with zipfile.ZipFile(file) as plain, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for part in plain.infolist():
            archive.writestr(part.filename, plain.read(part))
    assert len(packed.getvalue()) < 1e5
    (tmp_path / "x.pt").write_bytes(seal(packed.getvalue()))
    refused(tmp_path / "x.pt")


def test_a_tensor_that_would_unfold_to_more_than_it_holds_is_refused(tmp_path):
    file = io.BytesIO()
    torch.save({"format": checkpoint.FORMAT, "model": {"w": torch.zeros(1).expand(10**12)}}, file)
    (tmp_path / "x.pt").write_bytes(seal(file.getvalue()))
    refused(tmp_path / "x.pt")


class Bytes:
    """What `weights_only` would build in any size."""

    def __reduce__(self):
        return bytearray, (300_000_000,)


def test_a_pickle_that_would_swell_is_refused_before_it_is_read(tmp_path):
    file = io.BytesIO()
    torch.save({"format": checkpoint.FORMAT, "x": Bytes()}, file)
    (tmp_path / "x.pt").write_bytes(seal(file.getvalue()))
    assert len(file.getvalue()) < 5000
    refused(tmp_path / "x.pt")


def test_no_memory_is_not_taken_for_damage(tmp_path, monkeypatch):
    checkpoint.save_last({"w": torch.zeros(3)}, tmp_path)

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(torch.OutOfMemoryError):
        checkpoint.load_last(tmp_path)


def test_a_list_that_holds_itself_and_what_is_no_file_are_refused(tmp_path):
    state = {"format": checkpoint.FORMAT, "w": torch.zeros(2)}
    state["self"] = state
    file = io.BytesIO()
    torch.save(state, file)
    (tmp_path / "x.pt").write_bytes(seal(file.getvalue()))
    checkpoint.load(tmp_path / "x.pt")  # ends; what is in it is for the reader to judge
    os.mkfifo(tmp_path / "pipe.pt")
    refused(tmp_path / "pipe.pt")
    refused(tmp_path)


class Bomb:
    def __reduce__(self):
        return open, ("/tmp/should-never-exist", "w")


@pytest.mark.parametrize("bytes_of", [
    lambda: b"",
    lambda: b"not a checkpoint",
    lambda: pickle.dumps({"format": checkpoint.FORMAT, "x": Bomb()}),
    lambda: pickle.dumps([1, 2]),
])  # fmt: skip
def test_what_is_no_checkpoint_is_refused_in_one_line(bytes_of, tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(bytes_of())
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    target = tmp_path / "written"
    Bomb.__reduce__ = lambda self: (open, (str(target), "w"))
    file = io.BytesIO()
    torch.save({"format": checkpoint.FORMAT, "x": Bomb()}, file)
    (tmp_path / "x.pt").write_bytes(seal(file.getvalue()))
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.load(tmp_path / "x.pt")
    assert not target.exists()


@pytest.mark.parametrize("length", [10, 200, -1])
def test_a_truncated_checkpoint_is_refused(length, tmp_path):
    path = tmp_path / "x.pt"
    checkpoint.save({"w": torch.randn(100)}, path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.load(path)


def test_a_missing_one_and_another_format_are_refused(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match=r"missing\.pt"):
        checkpoint.load(tmp_path / "missing.pt")
    torch.save({"format": 1}, tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(seal((tmp_path / "x.pt").read_bytes()))
    with pytest.raises(checkpoint.CheckpointError, match="format"):
        checkpoint.load(tmp_path / "x.pt")


def test_every_generator_goes_on_where_it_was():
    device, bptt = torch.device("cpu"), torch.Generator().manual_seed(5)
    torch.manual_seed(1)
    state = checkpoint.rng_state(device, bptt)
    first = torch.rand(3), torch.rand(3, generator=bptt)
    checkpoint.set_rng_state(state, device, bptt)
    torch.testing.assert_close((torch.rand(3), torch.rand(3, generator=bptt)), first, rtol=0, atol=0)


def optimizer_of(weight):
    weight = torch.nn.Parameter(weight)
    return torch.optim.Adam([weight], lr=0.1)


def test_a_state_of_another_device_has_the_form_of_this_one_s():
    """A GPU's generator is there or not; the rest is the same, and none of it is on any device."""
    optimizer = optimizer_of(torch.zeros(3))
    here = {"rng": [{"torch": torch.get_rng_state()}], "w": torch.zeros(3), "optimizer": optimizer.state_dict(),
            "stopped_by": ""}  # fmt: skip
    there = {**here, "rng": [{**here["rng"][0], "cuda": torch.zeros(16, dtype=torch.uint8)}]}
    for saved, form in ((here, there), (there, here)):
        form = {**form, "optimizer": checkpoint.optimizer_template(optimizer)}
        resume.check_state(saved, form, ("patience",))


@pytest.mark.parametrize(
    ("part", "odd"),
    [("w", torch.zeros(4)), ("w", torch.zeros(3, dtype=torch.int64)), ("w", 1.0), ("n", -1), ("n", True), ("n", 1.0),
     ("x", math.nan), ("x", 1e39), ("x", 1), ("losses", [1.0, "a"]), ("losses", {}), ("text", None), ("text", 3)],
)  # fmt: skip
def test_a_part_of_another_kind_is_named(part, odd):
    form = {"w": torch.zeros(3), "n": 3, "x": 0.5, "losses": [1.0], "text": "sgd"}
    for fine in ({}, {"losses": []}, {"losses": [2.0, 3.0]}, {"x": math.inf}, {"more": 1}):
        checkpoint.validate_state({**form, **fine}, form)
    with pytest.raises(ValueError, match=f"state, {part}"):
        checkpoint.validate_state({**form, part: odd}, form)
    with pytest.raises(ValueError, match="expected"):
        checkpoint.validate_state({name: form[name] for name in form if name != part}, form)


def test_the_form_of_an_optimizer_that_has_taken_a_step():
    weight = torch.ones(3)
    optimizer = optimizer_of(weight)
    form = checkpoint.optimizer_template(optimizer)
    assert not optimizer.state
    assert torch.equal(weight, torch.ones(3))
    checkpoint.validate_state(optimizer.state_dict(), form)  # before its first step there is no state
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    checkpoint.validate_state(optimizer.state_dict(), form)
    state = optimizer.state_dict()
    state["state"][0]["exp_avg"] = torch.zeros(2)
    with pytest.raises(ValueError, match="exp_avg"):
        checkpoint.validate_state(state, form)
