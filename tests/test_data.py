"""data.py reads corpora word for word, reports all errors together, and uses each time step as an input once."""

import hashlib
import itertools
import os
import random
import shutil
import socket
import struct
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
import download
import utils

# The numbers of tokens by split, and of types, are from the table of Mikolov et al. 2010 with <eos> and from that of
# Merity et al. 2017.
PUBLISHED = {
    "penn": (929_589, 73_760, 82_430, 10_000),
    "wikitext-2": (2_088_628, 217_646, 245_569, 33_278),
}
TEXTS = {"train": "the cat sat\non the mat\n", "valid": "the cat\n", "test": "the mat sat\n"}


def write_folder(folder: Path, **texts: str | bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, text in texts.items():
        (folder / f"{split}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def words_of(corpus: data.Corpus, split: str) -> list[str]:
    return [corpus.words[i] for i in getattr(corpus, split).tolist()]


def same_corpus(a: data.Corpus, b: data.Corpus) -> bool:
    ids = all(getattr(a, split).equal(getattr(b, split)) for split in data.SPLITS)
    unknown = all(a.unknown[split].equal(b.unknown[split]) for split in data.SPLITS)
    rest = [(c.name, c.words, c.written_eos, c.sha256) for c in (a, b)]
    return ids and unknown and rest[0] == rest[1]


def reference_tokens(path: Path) -> list[str]:
    """Tokenizes a text file with a plain loop, as the reference for `data.tokens`."""
    words = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            words.extend(line.split())
            words.append("<eos>")
    return words


def fail_if_called(*args: object, **kwargs: object) -> None:
    raise AssertionError("this must not be called")


# --- the real corpora ---


@pytest.fixture(scope="module", params=list(PUBLISHED))
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("corpora")
    for place in (ROOT / "corpora", ROOT.parent / "shared" / "corpora"):
        if data.is_available(request.param, place):
            (root / request.param).mkdir()
            for split in data.SPLITS:
                shutil.copyfile(place / request.param / f"{split}.txt", root / request.param / f"{split}.txt")
            return SimpleNamespace(name=request.param, root=root, corpus=data.load_corpus(request.param, root))
    pytest.skip(f"{request.param} is neither in corpora/ nor in ../shared/corpora/")


def test_real_corpus_has_the_published_counts(real):
    counts = [len(getattr(real.corpus, split)) for split in data.SPLITS]
    assert (*counts, len(real.corpus.words)) == PUBLISHED[real.name]
    assert not any(map(len, real.corpus.unknown.values())) and set(real.corpus.written_eos.values()) == {0}


def test_real_corpus_is_the_files_word_for_word(real):
    for split in ("valid", "test"):
        assert words_of(real.corpus, split) == reference_tokens(real.root / real.name / f"{split}.txt")


def test_real_vocabulary_is_in_order_of_first_appearance(real):
    assert real.corpus.words == list(dict.fromkeys(words_of(real.corpus, "train")))


def test_real_checksums_and_sizes_match_the_sources(real):
    for split, source in data.CORPORA[real.name].items():
        raw = (real.root / real.name / f"{split}.txt").read_bytes()
        assert (len(raw), hashlib.sha256(raw).hexdigest()) == (source.size, source.sha256)
        assert real.corpus.sha256[split] == source.sha256


def test_real_corpus_is_read_unchanged_from_its_cache(real, monkeypatch):
    monkeypatch.setattr(data, "_index", fail_if_called)
    assert same_corpus(data.load_corpus(real.name, real.root), real.corpus)


def test_real_corpus_with_one_changed_byte_is_refused(real, tmp_path):
    folder = tmp_path / real.name
    shutil.copytree(real.root / real.name, folder)
    raw = bytearray((folder / "valid.txt").read_bytes())
    raw[1000] ^= 1
    (folder / "valid.txt").write_bytes(raw)
    with pytest.raises(data.DataError, match=r"valid\.txt: .*remove it") as caught:
        data.load_corpus(real.name, tmp_path)
    assert len(caught.value.faults) == 1
    assert (folder / "valid.txt").read_bytes() == raw  # The rejected file is unchanged.


def test_read_split_of_a_real_corpus_matches_the_corpus(real):
    ids, unknown, _ = data.read_split(real.name, "valid", real.corpus.words, real.root)
    assert ids.dtype == torch.int64 and ids.equal(real.corpus.valid) and not unknown.any()


# --- a folder ---

text_lines = st.text(st.sampled_from("ab \t\n\r\x0b\x0c\x1c\x1d\x1e\x85\xa0\u2003\u2028\u2029\u3000é字<"), max_size=40)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text_lines)
def test_tokens_match_a_loop_over_the_file(tmp_path, text):
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    assert list(data.tokens(text)) == reference_tokens(path)


def test_last_line_without_newline_ends_with_eos(tmp_path):
    texts = dict.fromkeys(data.SPLITS, "a b\r\nc")
    corpus = data.load_corpus(str(write_folder(tmp_path, **texts)))
    assert words_of(corpus, "train") == ["a", "b", "<eos>", "c", "<eos>"]


def test_unknown_words_become_unk_and_are_counted(tmp_path):
    folder = write_folder(tmp_path, train="a b\n", valid="a x x\n", test="y b x\n")
    corpus = data.load_corpus(str(folder))
    assert corpus.words == ["a", "b", "<eos>", "<unk>"]
    assert {split: at.tolist() for split, at in corpus.unknown.items()} == {
        "train": [],
        "valid": [1, 2],
        "test": [0, 2],
    }
    assert corpus.unknown_mask("valid").tolist() == [False, True, True, False]
    assert corpus.unknown_share("test") == 0.5
    assert words_of(corpus, "valid") == ["a", "<unk>", "<unk>", "<eos>"]
    assert words_of(corpus, "test") == ["<unk>", "b", "<unk>", "<eos>"]


def test_unk_of_the_train_text_is_reused(tmp_path):
    folder = write_folder(tmp_path, train="<unk> b\n", valid="x\n", test="b <unk>\n")
    corpus = data.load_corpus(str(folder))
    assert corpus.words == ["<unk>", "b", "<eos>"]
    assert corpus.valid.tolist() == [0, 2] and corpus.unknown["valid"].tolist() == [0]
    assert corpus.unknown["test"].tolist() == []  # <unk> is written there


def test_no_unk_is_added_without_unknown_words(tmp_path):
    assert data.UNK not in data.load_corpus(str(write_folder(tmp_path, **TEXTS))).words


def test_read_split_uses_the_given_vocabulary(tmp_path):
    folder = write_folder(tmp_path, **TEXTS)
    words = ["<unk>", "mat", "<eos>", "the"]
    assert data.read_split(str(folder), "test", words)[0].tolist() == [3, 1, 0, 2]


def test_read_split_reads_no_other_split(tmp_path):
    folder = write_folder(tmp_path, test=TEXTS["test"])
    assert len(data.read_split(str(folder), "test", ["<unk>"])[0]) == 4


def test_read_split_rejects_unknown_words_without_unk(tmp_path):
    folder = write_folder(tmp_path, **TEXTS)
    with pytest.raises(data.DataError, match="test: the vocabulary given lacks 2 of its words"):
        data.read_split(str(folder), "test", ["<eos>", "the"])


def test_all_errors_of_a_folder_are_reported_together(tmp_path):
    folder = write_folder(tmp_path, valid=" \n\t\n", test=b"good line\nbad \xff line\n")
    with pytest.raises(data.DataError) as caught:
        data.load_corpus(str(folder))
    train, valid, test = caught.value.faults
    assert "train.txt: missing" in train
    assert "valid.txt: empty" in valid
    assert "test.txt: not UTF-8 at line 2, byte 14 of the file (0xff)" in test
    assert str(caught.value) == "\n".join(caught.value.faults)


def test_zero_byte_file_is_reported_as_empty(tmp_path):
    with pytest.raises(data.DataError, match=r"train\.txt: empty"):
        data.load_corpus(str(write_folder(tmp_path, **TEXTS | {"train": ""})))


def test_folder_in_place_of_a_file_is_an_error(tmp_path):
    write_folder(tmp_path, train="a\n", valid="a\n")
    (tmp_path / "test.txt").mkdir()
    with pytest.raises(data.DataError, match=r"test\.txt: not a file") as caught:
        data.load_corpus(str(tmp_path))
    assert len(caught.value.faults) == 1


@pytest.mark.parametrize("name", ["ptb", "no/such/folder"])
def test_unknown_corpus_name_lists_the_choices(name):
    with pytest.raises(data.DataError) as caught:
        data.load_corpus(name)
    assert all(choice in str(caught.value) for choice in (name, "penn", "wikitext-2", "builtin", "folder"))


# --- the vocabulary ---


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.sampled_from(["a", "b", "c", "d", "<unk>"]), max_size=6), min_size=1, max_size=8),
    st.integers(1, 4), st.sampled_from([0, 3, 4, 5, 9]),
)  # fmt: skip
def test_vocabulary_has_the_most_frequent_words_of_train(lines, min_count, vocab_size):
    text = "\n".join(map(" ".join, lines)) + "\n"
    read = list(data.tokens(text))
    texts = {"train": text, "valid": "a z\n", "test": "b\n"}
    ordinary = [w for w in dict.fromkeys(read) if read.count(w) >= min_count and w not in ("<eos>", "<unk>")]
    if not ordinary:
        with pytest.raises(data.DataError, match="--min_count" if min_count > 1 else "no word but"):
            data._index("x", texts, {}, min_count, vocab_size)
        return
    words = data._index("x", texts, {}, min_count, vocab_size).words
    places = vocab_size - 2 if vocab_size else len(ordinary)
    expected = sorted(ordinary, key=lambda word: (-read.count(word), read.index(word)))[:places]
    assert set(words) == {*expected, "<eos>", "<unk>"}  # z is unknown
    known = words if words[-1] != "<unk>" else words[:-1]
    assert known == sorted(known, key=read.index)


def test_text_of_one_line_keeps_its_eos(tmp_path):
    texts = {"train": "a b a b c", "valid": "a c", "test": "b"}
    corpus = data.load_corpus(str(write_folder(tmp_path, **texts)), min_count=2)
    assert corpus.words == ["a", "b", "<eos>", "<unk>"]
    assert corpus.train.tolist() == [0, 1, 0, 1, 3, 2] and corpus.unknown["train"].tolist() == [4]


def test_vocab_size_that_fits_changes_nothing(tmp_path):
    folder = str(write_folder(tmp_path, **TEXTS))
    assert same_corpus(data.load_corpus(folder, vocab_size=7), data.load_corpus(folder))  # six words and no <unk>
    assert len(data.load_corpus(folder, vocab_size=6).words) == 6


def test_min_count_of_builtin_is_3_unless_it_is_given(builtin):
    assert same_corpus(data.load_corpus("builtin", min_count=3), builtin)
    assert len(data.load_corpus("builtin", min_count=1).words) > len(builtin.words)


def test_cache_of_another_vocabulary_is_not_used(tmp_path):
    folder = str(write_folder(tmp_path, train="a a b b c\n", valid="a c\n", test="b\n"))
    sizes = [(1, 0), (2, 0), (1, 4), (2, 3)]
    for _ in range(2):
        vocabularies = [data.load_corpus(folder, min_count=m, vocab_size=v).words for m, v in sizes]
        assert vocabularies == [["a", "b", "c", "<eos>"], ["a", "b", "<eos>", "<unk>"], ["a", "b", "<eos>", "<unk>"],
                         ["a", "<eos>", "<unk>"]]  # fmt: skip


# --- encodings ---


def test_byte_order_mark_is_no_part_of_the_first_word(tmp_path):
    marked = {split: b"\xef\xbb\xbf" + text.encode() for split, text in TEXTS.items()}
    corpus = data.load_corpus(str(write_folder(tmp_path / "marked", **marked)))
    plain = data.load_corpus(str(write_folder(tmp_path / "plain", **TEXTS)))
    assert corpus.words == plain.words and corpus.train.equal(plain.train)
    assert data.read_split(str(tmp_path / "marked"), "test", plain.words)[0].equal(plain.test)
    with pytest.raises(data.DataError, match=r"train\.txt: empty"):
        data.load_corpus(str(write_folder(tmp_path / "marked", train=b"\xef\xbb\xbf\n")))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16", "utf-32"])
def test_other_encodings_and_nul_bytes_are_refused(tmp_path, encoding):
    folder = write_folder(tmp_path, **{split: text.encode(encoding) for split, text in TEXTS.items()})
    with pytest.raises(data.DataError) as caught:
        data.load_corpus(str(folder))
    assert len(caught.value.faults) == 3
    assert all("not UTF-8 at line 1, byte" in fault and "iconv" in fault for fault in caught.value.faults)
    write_folder(tmp_path, **TEXTS | {"valid": "good\nthe c\0at\n"})
    with pytest.raises(data.DataError, match=r"valid\.txt: not UTF-8 at line 2, byte 10 .* NUL"):
        data.load_corpus(str(folder))


# --- the cache ---


def test_cache_is_written_under_the_root_alone_and_through_no_link(tmp_path, monkeypatch):
    root, mine, shared = tmp_path / "corpora", tmp_path / "mine", tmp_path / "shared"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for folder in (root / "own", mine, shared):
        write_folder(folder, **TEXTS)
    (root / "link").symlink_to(shared)
    (tmp_path / "linked").symlink_to(root)

    def caches(folder: Path) -> int:
        return len(list(folder.glob("*.npz")))

    data.load_corpus(str(root / "own"), root)
    assert caches(root / "own") == 1 and not (tmp_path / "cache").exists()
    for folder, from_root in ((mine, root), (root / "link", root), (tmp_path / "linked" / "own", tmp_path / "linked")):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        first = data.load_corpus(str(folder), from_root)
        assert caches(tmp_path / "cache" / data.CACHES) == 1
        assert same_corpus(data.load_corpus(str(folder), from_root), first)
    assert (caches(mine), caches(shared), caches(root / "own")) == (0, 0, 1)


@pytest.mark.parametrize("given", [None, "", "relative"])
def test_cache_folder_is_below_home_without_an_absolute_xdg_cache_home(tmp_path, monkeypatch, given):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME")
    if given is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", given)
    data.load_corpus(str(write_folder(tmp_path / "mine", **TEXTS)))
    assert len(list((tmp_path / ".cache" / data.CACHES).iterdir())) == 1


@pytest.mark.parametrize("home", ["", "/proc/nowhere"])
def test_corpus_is_read_without_a_home_folder_that_can_hold_its_cache(tmp_path, monkeypatch, home):
    """A container may set HOME to a folder that does not exist, or none for a user without an entry in passwd."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", home)
    if not home:
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(os, "getuid", lambda: 2**31 - 5)  # a user that passwd does not know
    assert len(data.load_corpus(str(write_folder(tmp_path / "mine", **TEXTS))).words) > 1


@pytest.fixture
def cached(tmp_path, monkeypatch) -> SimpleNamespace:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_folder(tmp_path / "mine", train="a b c\n" * 3000, valid="a x\n", test="y c\n")
    corpus = data.load_corpus(str(folder))
    (path,) = (tmp_path / "cache" / data.CACHES).iterdir()
    return SimpleNamespace(name=str(folder), folder=folder, corpus=corpus, path=path)


def test_cache_restores_the_corpus(cached, monkeypatch):
    monkeypatch.setattr(data, "_index", fail_if_called)
    assert same_corpus(data.load_corpus(cached.name), cached.corpus)


def test_damaged_cache_is_rejected_or_restores_the_same_corpus(cached):
    raw = cached.path.read_bytes()
    rng = random.Random(0)
    damaged = [raw[:n] for n in range(0, len(raw), 499)]
    for _ in range(400):
        flipped = bytearray(raw)
        flipped[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    for content in damaged:
        cached.path.write_bytes(content)
        corpus = data._load_cache(cached.path, cached.name, cached.corpus.sha256)
        assert corpus is None or same_corpus(corpus, cached.corpus)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "shortened", "missing", "range", "words"])
def test_damaged_cache_is_rebuilt(cached, damage):
    raw = cached.path.read_bytes()
    with np.load(cached.path) as file:
        arrays = dict(file)
    if damage == "truncated":
        cached.path.write_bytes(raw[: len(raw) // 2])
    elif damage == "flipped":
        at = raw.index(arrays["train"].tobytes())
        cached.path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    elif damage == "shortened":  # The damage is in the header of an array, which numpy does not check.
        cached.path.write_bytes(raw.replace(b"(12000,)", b"(10000,)", 1))
    else:
        if damage == "missing":
            del arrays["written_eos"]
        elif damage == "range":
            arrays["test"][0] = -1
        else:
            arrays["words"] = np.frombuffer(b"a b", np.uint8)
        np.savez(cached.path, **arrays)
    assert same_corpus(data.load_corpus(cached.name), cached.corpus)
    assert cached.path.read_bytes() == raw  # The cache has been restored.


def test_changed_corpus_invalidates_the_cache(cached):
    write_folder(cached.folder, valid="b x\n")  # The number of words is unchanged.
    assert words_of(data.load_corpus(cached.name), "valid") == ["b", "<unk>", "<eos>"]


def test_swapped_splits_invalidate_the_cache(cached):
    write_folder(cached.folder, valid="y c\n", test="a x\n")
    assert words_of(data.load_corpus(cached.name), "valid") == ["<unk>", "c", "<eos>"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write to any folder")
def test_corpus_loads_from_a_read_only_folder(tmp_path):
    write_folder(tmp_path, **TEXTS)
    tmp_path.chmod(0o555)
    try:
        assert len(data.load_corpus(str(tmp_path)).train) == 8
    finally:
        tmp_path.chmod(0o755)


def test_failed_cache_write_is_no_error_and_leaves_no_file(tmp_path, monkeypatch):
    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    write_folder(tmp_path, **TEXTS)
    monkeypatch.setattr(utils.os, "replace", refuse)
    assert len(data.load_corpus(str(tmp_path)).train) == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.txt", "train.txt", "valid.txt"]


# --- download ---

CONTENT = b"some words of a corpus\n" * 9000


class Server(BaseHTTPRequestHandler):
    """Serves CONTENT at /good, and faulty responses at the other paths."""

    def do_GET(self) -> None:
        kind = self.path.strip("/").split(".")[0]
        self.server.requests.append(self.path)
        body = {
            "tampered": CONTENT[:-2] + b"X\n",
            "truncated": CONTENT[:-100],
            "long": CONTENT + b"more",
        }.get(kind, CONTENT)
        if kind == "gone":
            self.send_error(404)
            return
        if kind == "babbles":
            self.wfile.write(b"this is not HTTP\n")
            return
        self.send_response(200)
        if kind != "endless":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if kind == "endless":
            for _ in range(500):  # The response has 100 MB unless the client disconnects.
                self.wfile.write(body)
            self.server.overruns.append(self.path)
        elif kind in ("closes", "resets", "stalls"):
            self.wfile.write(body[: len(body) // 2])
            if kind == "resets":  # Without lingering, closing sends a reset.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if kind == "stalls":
                self.server.released.wait(5)
                self.wfile.write(body[len(body) // 2 :])
        else:
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.handle_error = lambda *args: None  # The tests break connections on purpose.
    server.requests, server.overruns, server.released = [], [], threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


def source_at(server: ThreadingHTTPServer, kind: str) -> download.Source:
    url = f"http://127.0.0.1:{server.server_address[1]}/{kind}"
    return download.Source(url, hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))


def test_download_writes_only_the_requested_file(server, tmp_path, capsys):
    download.download(source_at(server, "good"), tmp_path / "penn" / "train.txt")
    assert [path.name for path in (tmp_path / "penn").iterdir()] == ["train.txt"]
    assert (tmp_path / "penn" / "train.txt").read_bytes() == CONTENT
    assert capsys.readouterr().err == ""  # There is no progress bar without a terminal.


BAD = ["tampered", "truncated", "long", "endless", "gone", "closes", "resets", "stalls", "babbles"]


@pytest.mark.parametrize("kind", BAD)
def test_bad_download_leaves_no_file_and_suggests_a_remedy(server, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    source = source_at(server, kind)
    with pytest.raises(data.DataError) as caught:
        download.download(source, tmp_path / "train.txt")
    (error,) = caught.value.faults
    assert "\n" not in error
    assert all(part in error for part in (str(tmp_path / "train.txt"), source.url, "--data builtin"))
    assert list(tmp_path.iterdir()) == []


def test_download_stops_reading_at_the_expected_size(server, tmp_path):
    server.overruns.clear()
    with pytest.raises(data.DataError):
        download.download(source_at(server, "endless"), tmp_path / "train.txt")
    assert server.overruns == []


def test_bad_download_does_not_replace_an_existing_file(server, tmp_path):
    (tmp_path / "train.txt").write_text("mine")
    with pytest.raises(data.DataError):
        download.download(source_at(server, "closes"), tmp_path / "train.txt")
    assert (tmp_path / "train.txt").read_text() == "mine"


def test_interrupted_download_leaves_no_file(server, tmp_path, monkeypatch):
    def interrupt(fd: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(utils.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download.download(source_at(server, "good"), tmp_path / "train.txt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("proxy", ["http:/proxy:3128", "http://.proxy:80"])
def test_download_through_an_address_that_is_no_proxy_is_an_error(proxy, tmp_path, monkeypatch):
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("https_proxy", proxy)
    with pytest.raises(data.DataError, match="download failed"):
        download.download(download.Source("https://nowhere.invalid/", "0" * 64, 10), tmp_path / "train.txt")


def test_text_of_unk_alone_is_refused_for_what_it_is(tmp_path):
    folder = write_folder(tmp_path / "text", train=b"<unk> <unk>\n", valid=b"a\n", test=b"a\n")
    with pytest.raises(data.DataError, match="train has no word but <unk>; take another text"):
        data.load_corpus(str(folder))


@pytest.mark.parametrize("loop", ["text", "text/train.txt"])
def test_link_to_itself_is_refused(loop, tmp_path):
    if loop != "text":
        write_folder(tmp_path / "text", valid=b"a\n", test=b"a\n")
    (tmp_path / loop).symlink_to(tmp_path / loop)
    with pytest.raises(data.DataError):
        data.load_corpus(str(tmp_path / "text"))


def test_download_to_an_unwritable_path_is_an_error(server, tmp_path):
    (tmp_path / "penn").write_text("a file where the folder should be")
    with pytest.raises(data.DataError, match="download failed"):
        download.download(source_at(server, "good"), tmp_path / "penn" / "train.txt")


def test_download_to_a_folder_that_may_not_be_written_names_another_one(server, tmp_path, monkeypatch):
    def refuse(*arguments, **more):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(download, "atomic_write", refuse)
    with pytest.raises(data.DataError, match=r"cannot be written \(Permission denied\); put the texts in a folder of"):
        download.download(source_at(server, "good"), tmp_path / "penn" / "train.txt")


@pytest.fixture
def served(server, monkeypatch) -> ThreadingHTTPServer:
    """Makes the local server the source of `penn` and clears its list of requests."""
    monkeypatch.setitem(data.CORPORA, "penn", {s: source_at(server, f"good.{s}") for s in data.SPLITS})
    server.requests.clear()
    return server


def test_only_missing_files_are_downloaded_and_only_once(served, tmp_path):
    write_folder(tmp_path / "penn", valid=CONTENT)
    assert not data.is_available("penn", tmp_path)
    first = data.load_corpus("penn", tmp_path)
    assert served.requests == ["/good.train", "/good.test"]
    assert data.is_available("penn", tmp_path)
    assert same_corpus(data.load_corpus("penn", tmp_path), first)
    assert len(served.requests) == 2


def test_download_without_network_names_every_missing_file(tmp_path, monkeypatch):
    with socket.socket() as unused:  # The port is bound but nobody listens, so connections are refused.
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
        sources = {split: download.Source(url + split, "0" * 64, 10) for split in data.SPLITS}
        monkeypatch.setitem(data.CORPORA, "penn", sources)
        with pytest.raises(data.DataError) as caught:
            data.load_corpus("penn", tmp_path)
    for error, split in zip(caught.value.faults, data.SPLITS, strict=True):
        assert str(tmp_path / "penn" / f"{split}.txt") in error
        assert url + split in error and "--data builtin" in error
    assert list(tmp_path.iterdir()) == []


def test_is_available_is_true_for_builtin_and_existing_folders_only(tmp_path):
    assert data.is_available("builtin") and data.is_available(str(tmp_path))
    assert not data.is_available("penn", tmp_path) and not data.is_available("no such name")


# --- builtin ---


@pytest.fixture(scope="module")
def builtin() -> data.Corpus:
    return data.load_corpus("builtin")


def test_builtin_is_deterministic_and_needs_no_file(builtin, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert same_corpus(data.load_corpus("builtin"), builtin)
    assert list(tmp_path.iterdir()) == []


def test_builtin_has_no_duplicate_paragraph():
    # The texts are compared and not the ids, which are equal if paragraphs differ in rare words alone.
    texts = data._builtin_texts()
    lines = Counter(line for split in data.SPLITS for line in texts[split].splitlines())
    assert len(lines) > 1000 and max(lines.values()) == 1


def test_builtin_splits_have_80_10_and_10_percent_of_the_words(builtin):
    sizes = torch.tensor([len(getattr(builtin, split)) for split in data.SPLITS], dtype=torch.float64)
    assert sizes.sum() > 50_000
    assert (sizes / sizes.sum() - torch.tensor([0.8, 0.1, 0.1])).abs().max() < 0.05


def test_builtin_vocabulary_has_words_with_3_occurrences_in_train(builtin):
    counts = Counter(words_of(builtin, "train"))
    assert set(counts) == set(builtin.words) and min(counts.values()) >= 3
    assert counts["<unk>"] < 0.1 * len(builtin.train)


def test_builtin_counts_unknown_words_of_valid_and_test(builtin):
    for split in data.SPLITS:
        assert len(builtin.unknown[split]) == words_of(builtin, split).count("<unk>") > 0


@pytest.mark.parametrize("split", data.SPLITS)
def test_read_split_of_builtin_matches_the_corpus(builtin, split):
    ids, unknown, sha256 = data.read_split("builtin", split, builtin.words)
    assert ids.equal(getattr(builtin, split)) and unknown.equal(builtin.unknown_mask(split))
    assert sha256 == builtin.sha256[split]


# --- batches ---


@given(st.integers(2, 200), st.integers(1, 20))
def test_batchify_matches_a_plain_loop(n, batch_size):
    if n // batch_size < 2:
        with pytest.raises(data.DataError, match=f"too few for a batch size of {batch_size}"):
            utils.batchify(torch.arange(n), batch_size)
        return
    n_steps = n // batch_size
    expected = [[b * n_steps + t for b in range(batch_size)] for t in range(n_steps)]
    result = utils.batchify(torch.arange(n), batch_size)
    assert result.tolist() == expected
    assert result.is_contiguous()


def test_targets_are_the_next_words_and_the_last_segment_is_shorter():
    source = utils.batchify(torch.arange(26), 4)  # This is the alphabet of the docstring, with 6 time steps.
    x, y = utils.get_batch(source, 0, 4)
    assert x.tolist() == source[:4].tolist() and y.equal(x + 1)
    x, y = utils.get_batch(source, 4, 4)
    assert x.tolist() == source[4:5].tolist() and y.tolist() == source[5:].tolist()


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    n_steps=st.integers(0, 400), bptt=st.integers(1, 40), std=st.sampled_from([0.0, 5.0, 50.0]),
    max_delta=st.sampled_from([None, 0, 20]), start=st.integers(0, 50), seed=st.integers(0, 9),
)  # fmt: skip
def test_segments_cover_each_input_time_step_once(n_steps, bptt, std, max_delta, start, seed):
    covered = []
    for i, seq_len in utils.segments(n_steps, bptt, rng(seed), std, max_delta, start):
        assert seq_len >= 1
        covered += range(i, i + seq_len)
    assert covered == list(range(start, n_steps - 1))


def test_one_segment_in_twenty_has_half_the_length_without_jitter():
    lengths = Counter(seq_len for _, seq_len in list(utils.segments(200_000, 35, rng()))[:-1])
    assert set(lengths) == {35, 17}
    assert lengths[17] / lengths.total() == pytest.approx(0.05, abs=0.01)  # The tolerance is 3.5 standard errors.


def test_jitter_is_normal_around_the_base_length():
    lengths = torch.tensor([n for _, n in utils.segments(400_000, 70, rng(), std=5.0)][:-1], dtype=torch.float64)
    full = lengths[lengths > 52]  # Segments of half the length have 35 +- 5.
    assert len(full) / len(lengths) == pytest.approx(0.95, abs=0.01)
    assert full.mean().item() == pytest.approx(69.5, abs=0.3)  # int() lowers the mean by a half.
    assert full.std().item() == pytest.approx(5.0, abs=0.3)


def test_jitter_is_clamped_at_5_and_at_max_delta():
    lengths = [n for _, n in utils.segments(50_000, 35, rng(), std=30.0, max_delta=20)][:-1]
    assert min(lengths) == 5 and max(lengths) == 55


def test_segment_length_is_unbounded_without_max_delta():
    assert max(n for _, n in utils.segments(50_000, 35, rng(), std=30.0)) > 70


@pytest.mark.parametrize("std", [0.0, 5.0])
def test_segments_resume_where_they_stopped(std):
    whole = list(utils.segments(5000, 35, rng(), std, 20))
    generator = rng()
    running = utils.segments(5000, 35, generator, std, 20)
    begun = list(itertools.islice(running, 60))
    saved = generator.get_state()
    resumed = torch.Generator()
    resumed.set_state(saved)
    i, seq_len = begun[-1]
    assert begun + list(utils.segments(5000, 35, resumed, std, 20, start=i + seq_len)) == whole


def test_segments_do_not_use_the_global_generator():
    before = torch.get_rng_state()
    list(utils.segments(1000, 35, rng(), 5.0, 20))
    assert torch.get_rng_state().equal(before)


# --- the cursor ---


@given(n_steps=st.integers(2, 60), lengths=st.lists(st.integers(1, 59), min_size=1, max_size=30))
def test_cursor_gives_full_segments_in_order_or_wraps(n_steps, lengths):
    source = torch.arange(n_steps * 3).view(n_steps, 3)
    cursor, position = utils.Cursor(source), 0
    for seq_len in lengths:
        x, y, wrapped = cursor.take(seq_len)
        full = min(seq_len, n_steps - 1)
        fits = position + seq_len <= n_steps - 1
        assert wrapped == (not fits and position > 0)
        assert x.equal(source[0 if wrapped else position :][:full])
        assert y.equal(x + 3)
        position = (0 if wrapped else position) + full
        assert cursor.position == position


def test_cursor_resumes_from_a_saved_position():
    source = torch.arange(80).view(40, 2)
    first, second = utils.Cursor(source), utils.Cursor(source)
    first.take(11)
    second.position = first.position
    for seq_len in (7, 15, 30):
        (x, y, wrapped), (x2, y2, wrapped2) = first.take(seq_len), second.take(seq_len)
        assert x.equal(x2) and y.equal(y2) and wrapped == wrapped2


def test_cursor_visits_every_target_of_an_even_stream():
    cursor = utils.Cursor(torch.arange(31).view(31, 1))
    taken = [cursor.take(10) for _ in range(6)]
    assert [wrapped for *_, wrapped in taken] == [False, False, False, True, False, False]
    assert torch.cat([y for _, y, _ in taken[:3]]).flatten().tolist() == list(range(1, 31))
