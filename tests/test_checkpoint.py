"""Checkpoints: whole or untouched, every generator in them, and no code out of them."""

import pickle

import pytest
import torch

import checkpoint


def test_what_is_saved_is_loaded(tmp_path):
    state = {"model": {"w": torch.randn(3, 2)}, "numbers": [1, 2.5, None, True], "words": ["a", "ä"]}
    checkpoint.save(state, tmp_path / "last.pt")
    found = checkpoint.load(tmp_path / "last.pt")
    assert torch.equal(found["model"]["w"], state["model"]["w"])
    assert (found["numbers"], found["words"]) == (state["numbers"], state["words"])
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_a_save_that_fails_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save({"epoch": 1}, path)

    def full(*_):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(f"os.{name}", full)
            with pytest.raises(OSError, match="No space"):
                checkpoint.save({"epoch": 2}, path)
        assert checkpoint.load(path)["epoch"] == 1
        assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


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
    torch.save({"format": checkpoint.FORMAT, "x": Bomb()}, tmp_path / "x.pt")
    target = tmp_path / "written"
    Bomb.__reduce__ = lambda self: (open, (str(target), "w"))
    torch.save({"format": checkpoint.FORMAT, "x": Bomb()}, tmp_path / "x.pt")
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.load(tmp_path / "x.pt")
    assert not target.exists()


@pytest.mark.parametrize("keep", [10, 200, -1])
def test_a_truncated_checkpoint_is_refused(keep, tmp_path):
    path = tmp_path / "x.pt"
    checkpoint.save({"w": torch.randn(100)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.load(path)


def test_a_missing_one_and_another_format_are_refused(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match=r"missing\.pt"):
        checkpoint.load(tmp_path / "missing.pt")
    torch.save({"format": -1}, tmp_path / "x.pt")
    with pytest.raises(checkpoint.CheckpointError, match="format"):
        checkpoint.load(tmp_path / "x.pt")


def test_every_generator_goes_on_where_it_was():
    device, bptt = torch.device("cpu"), torch.Generator().manual_seed(5)
    torch.manual_seed(1)
    state = checkpoint.rng_state(device, bptt)
    first = torch.rand(3), torch.rand(3, generator=bptt)
    checkpoint.set_rng_state(state, device, bptt)
    torch.testing.assert_close((torch.rand(3), torch.rand(3, generator=bptt)), first, rtol=0, atol=0)
