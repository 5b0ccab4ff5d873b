"""A store behind a URL gives what the store on disk gives, by ranges, with retries, in one line."""

import http.server
import json
import multiprocessing
import pickle
import shutil
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from spcxr.data import remote
from spcxr.data.manifest import Manifest
from spcxr.data.presets import Preprocess
from spcxr.data.remote import RemoteFile, RemoteFolder
from spcxr.data.store import Store, StoreWriter
from spcxr.errors import SpcxrError

SIZE, COUNT = 8, 11


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Shards of three rows; rows 1 and 4 have a mask, so the last two shards have none."""
    folder = tmp_path_factory.mktemp("made") / "store"
    rng = np.random.default_rng(0)
    with StoreWriter(folder, Preprocess(size_px=SIZE), shard_bytes=3 * SIZE * SIZE) as writer:
        for i in range(COUNT):
            pixels = rng.integers(0, 256, (SIZE, SIZE)).astype(np.uint8)
            writer.add(pixels, pixels % 2 if i in (1, 4) else None)
        columns = {
            "path": [f"{i}.png" for i in range(COUNT)],
            "split": ["train", "val"] * 5 + ["train"],
            "covid": ["1", "0", ""] * 3 + ["1", "0"],
        }
        return writer.finish(Manifest.from_columns(columns, root="/nowhere"))


@pytest.fixture(params=["memory", "file", "filecache::file", "filecache::memory", "simplecache"])
def url(request, local, tmp_path):
    *cache, protocol = request.param.replace("simplecache", "simplecache::memory").split("::")
    if protocol == "file":
        return "::".join([*cache, f"file://{shutil.copytree(local.path, tmp_path / 's')}"])
    return "::".join([*cache, in_memory(local.path, f"/{request.param.replace(':', '')}")])


def in_memory(folder, name):
    fs = fsspec.filesystem("memory")
    for file in folder.iterdir():
        fs.pipe_file(f"{name}/{file.name}", file.read_bytes())
    return f"memory:/{name}"


def test_it_gives_what_the_store_on_disk_gives(local, url):
    store = Store.open(url)
    assert len(store) == COUNT
    assert str(store.path) == url
    assert url in repr(store)
    rows = [10, 0, 4, 4, 7]
    np.testing.assert_array_equal(store.images(rows), local.images(rows))
    np.testing.assert_array_equal(store.masks(rows), local.masks(rows))
    assert store.images([]).shape == (0, SIZE, SIZE)
    assert store.manifest.table.equals(local.manifest.table)
    np.testing.assert_array_equal(store.manifest.rows("val"), local.manifest.rows("val"))
    np.testing.assert_array_equal(store.manifest.label_matrix(), local.manifest.label_matrix())
    with pytest.raises(IndexError, match="has 11 rows"):
        store.images([11])
    store.verify()


def test_it_travels_to_another_process(local, tmp_path):
    """By pickle and by fork: each process connects for itself."""
    store = Store.open(f"file://{local.path}")
    store.images([0])
    again = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(again.images([4]), local.images([4]))
    np.testing.assert_array_equal(again.manifest.rows("val"), local.manifest.rows("val"))
    manifest = pickle.loads(pickle.dumps(store.manifest))
    assert manifest.column("path") == local.manifest.column("path")
    file = tmp_path / "child.npy"
    child = multiprocessing.get_context("fork").Process(
        target=lambda: np.save(file, store.images([7]))
    )
    child.start()
    child.join(30)
    np.testing.assert_array_equal(np.load(file), local.images([7]))


class Shaky(MemoryFileSystem):
    """Fails as often as it is told, and counts what it is asked."""

    protocol = "shaky"
    cachable = False
    failures, asked = 0, 0
    error: type[Exception] = TimeoutError

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("shaky://", "memory://"))

    def cat_file(self, path, start=None, end=None, **options):
        Shaky.asked += 1
        if Shaky.failures:
            Shaky.failures -= 1
            raise self.error("the line is bad\nreally")
        return super().cat_file(path, start, end, **options)


@pytest.fixture
def shaky(monkeypatch, local):
    waits = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    fsspec.register_implementation("shaky", Shaky, clobber=True)
    in_memory(local.path, "/shaky")
    store = Store.open("shaky://shaky")
    monkeypatch.setattr(Shaky, "asked", 0)
    yield store, waits
    Shaky.failures = 0


def test_what_fails_is_asked_for_again_and_nothing_else_is(shaky, local):
    store, waits = shaky
    Shaky.failures = 3
    np.testing.assert_array_equal(store.images([0, 5]), local.images([0, 5]))
    assert Shaky.asked == 2 + 2 + 1
    assert waits == [0.5, 1.0]


def test_what_goes_on_failing_is_one_line_with_the_address(shaky):
    store, waits = shaky
    Shaky.failures = 99
    said = "shaky://shaky/images-00001.npy: cannot be read .TimeoutError: the line is bad.; check"
    with pytest.raises(SpcxrError, match=said) as caught:
        store.images([5])
    assert "\n" not in str(caught.value)
    assert len(waits) == remote.TRIES - 1


def test_only_the_rows_that_are_asked_for_are_read(shaky, monkeypatch):
    store, _ = shaky
    seen = []
    whole = MemoryFileSystem.cat_file
    monkeypatch.setattr(
        Shaky, "cat_file", lambda self, p, a, b, **o: seen.append(b - a) or whole(self, p, a, b)
    )
    store.images([0, 9, 5])
    assert seen == [SIZE * SIZE] * 3


def broken(name, change):
    def break_it(fs, folder):
        file = f"{folder}/{name}"
        if change is None:
            fs.rm(file)
        else:
            fs.pipe_file(file, change(fs.cat_file(file)))

    return break_it


BROKEN = {
    "store.json gone": (broken("store.json", None), "store.json: no such file; check the address"),
    "manifest gone": (broken("manifest.parquet", None), "manifest.parquet: no such file"),
    "manifest torn": (broken("manifest.parquet", lambda b: b[:-9]), "manifest.parquet: cannot be"),
    "half json": (broken("store.json", lambda b: b[:20]), "store.json: cannot be read"),
    "newer": (
        broken("store.json", lambda b: json.dumps({**json.loads(b), "version": 9}).encode()),
        "this spcxr reads up to 1",
    ),
    "shard gone": (broken("images-00000.npy", None), "images-00000.npy: no such file"),
    "shard torn": (broken("images-00000.npy", lambda b: b[:-1]), "images-00000.npy: ends early"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_store_is_refused_in_one_line(local, name):
    break_it, message = BROKEN[name]
    folder = f"/broken-{name.replace(' ', '-')}"
    address = in_memory(local.path, folder)
    break_it(fsspec.filesystem("memory"), folder)
    with pytest.raises(SpcxrError, match=message) as caught:
        Store.open(address).images([2])
    assert address in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_address_of_no_known_kind_is_refused():
    with pytest.raises(SpcxrError, match=r"nosuch://x: cannot be reached \(Protocol not known"):
        Store.open("nosuch://x")


def test_a_file_is_read_as_any_file():
    content = bytes(range(256)) * 3
    fsspec.filesystem("memory").pipe_file("/plain/a", content)
    stream = RemoteFile(RemoteFolder("memory://plain"), "a", len(content)).open()
    assert stream.read() == content
    assert (stream.seek(-5, 2), stream.read(99), stream.read()) == (763, content[-5:], b"")
    assert (stream.seek(3), stream.read(2), stream.tell()) == (3, content[3:5], 5)


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Files by GET with a Range header, as object stores serve them."""

    def do_GET(self):
        content = Path(self.directory, self.path.lstrip("/")).read_bytes()
        asked = self.headers.get("Range")
        first, last = 0, len(content) - 1
        if asked:
            first, last = (int(end) for end in asked.removeprefix("bytes=").split("-"))
        part = content[first : last + 1]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_):
        pass


def test_over_http(local):
    pytest.importorskip("aiohttp", reason="fsspec's http needs it")

    def handler(*args):
        return Ranges(*args, directory=str(local.path))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            store = Store.open(f"http://127.0.0.1:{server.server_port}")
            rows = np.random.default_rng(0).integers(0, COUNT, 100)
            np.testing.assert_array_equal(store.images(rows), local.images(rows))
            assert store.manifest.column("path") == local.manifest.column("path")
        finally:
            server.shutdown()
            thread.join()
