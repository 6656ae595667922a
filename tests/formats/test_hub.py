"""One file of a hub repository at a time: the real huggingface_hub against a server on this machine."""

from __future__ import annotations

import builtins
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from formats.hub_server import serve

from cpmjax.formats import hub
from cpmjax.formats.hub import HubRepository, RemoteFile
from cpmjax.run.errors import UserError

huggingface_hub = pytest.importorskip("huggingface_hub")

ROOT = Path(__file__).parents[2]
REPO = "openbmb/MiniCPM-2B-history"
URL = f"hf://{REPO}"
WEIGHTS = "pytorch_model.10000"
SIZE = 300_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the hub serves."""
    folder = tmp_path_factory.mktemp("hub")
    for seed, name in enumerate([WEIGHTS, "pytorch_model.20000", "deep/pytorch_model.30000"]):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(np.random.default_rng(seed).bytes(SIZE))
    (folder / "config.json").write_text('{"model_type": "minicpm"}')
    (folder / "empty.txt").write_text("")
    return folder


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub, "_WAIT", 0.0)
    with serve(folder, REPO) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


@pytest.fixture
def repository(server, tmp_path):
    return HubRepository(URL, tmp_path / "downloads")


def on_disk(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def refusal(action, *expected: str) -> str:
    """The one line that an action is refused with; it names everything expected."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for text in expected:
        assert text in message, message
    return message


def fetch(repository: HubRepository, name: str = WEIGHTS, on_bytes=lambda count: None) -> bytes:
    with repository.fetch(name, on_bytes) as path:
        return path.read_bytes()


# What is there.


def test_the_server_answers_the_library_as_the_hub_does(server, folder, tmp_path):
    """The files as huggingface_hub itself lists and downloads them; or the tests below would show little."""
    api = huggingface_hub.HfApi(server.endpoint)
    tree = {file.path: (file.size, file.lfs and file.lfs.sha256) for file in api.list_repo_tree(REPO, recursive=True)}
    files = HubRepository(URL, tmp_path).files()
    assert {name: (file.size, file.sha256) for name, file in files.items()} == tree
    assert tree.keys() == set(on_disk(folder))
    for name in (WEIGHTS, "deep/pytorch_model.30000", "config.json"):
        path = huggingface_hub.hf_hub_download(REPO, name, endpoint=server.endpoint, local_dir=tmp_path / "theirs")
        assert Path(path).read_bytes() == (folder / name).read_bytes()
        assert fetch(HubRepository(URL, tmp_path / "ours"), name) == (folder / name).read_bytes()


def test_small_text_has_no_sha256(repository):
    assert repository.files()["config.json"] == RemoteFile(25, None)
    assert re.fullmatch("[0-9a-f]{64}", repository.files()[WEIGHTS].sha256)


def test_the_commit_is_kept_while_the_repository_moves(server, folder, tmp_path):
    repository = HubRepository(URL, tmp_path / "downloads")
    before = server.commit
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / WEIGHTS).write_bytes(b"other weights")
    server.push(moved)
    assert fetch(repository) == (folder / WEIGHTS).read_bytes()
    assert repository.commit == before != server.commit
    assert fetch(HubRepository(URL, tmp_path / "downloads")) == b"other weights"
    assert fetch(HubRepository(f"{URL}@{before}", tmp_path / "downloads")) == (folder / WEIGHTS).read_bytes()


# One file at a time.


def test_one_file_lies_on_the_disk_at_any_moment(repository):
    most = []
    for name in repository.files():
        with repository.fetch(name, lambda count: most.append(on_disk(repository.folder))) as path:
            assert path == repository.folder / name
            assert on_disk(repository.folder) == [name]
        assert on_disk(repository.folder) == []
    assert max(map(len, most)) == 1


def test_a_file_is_deleted_when_its_block_fails(repository):
    with pytest.raises(ZeroDivisionError), repository.fetch(WEIGHTS) as path:
        _ = path.stat().st_size / 0
    assert on_disk(repository.folder) == []


def test_a_file_that_a_block_holds_stays(repository):
    with repository.fetch("pytorch_model.20000") as held, repository.fetch(WEIGHTS):
        assert held.stat().st_size == SIZE
        assert on_disk(repository.folder) == [WEIGHTS, "pytorch_model.20000"]
    assert on_disk(repository.folder) == []


def test_a_large_file_that_was_left_outlasts_small_ones_but_no_other_large_one(repository):
    repository.folder.mkdir()
    left = repository.folder / "pytorch_model.20000"
    left.write_bytes(b"?" * SIZE)
    fetch(repository, "config.json")
    assert on_disk(repository.folder) == [left.name]
    with repository.fetch(WEIGHTS):
        assert on_disk(repository.folder) == [WEIGHTS]


# Going on.


def test_a_dropped_connection_is_gone_on_from(server, repository, folder):
    server.break_after(WEIGHTS, 100_000, times=2)
    heard = []
    assert fetch(repository, WEIGHTS, heard.append) == (folder / WEIGHTS).read_bytes()
    assert [request.range for request in server.downloads(WEIGHTS)] == ["bytes=0-", "bytes=100000-", "bytes=200000-"]
    assert sum(heard) == SIZE


def test_a_server_without_ranges_gives_the_whole_again(server, repository, folder):
    server.ranges = False
    server.break_after(WEIGHTS, 100_000)
    heard = []
    assert fetch(repository, WEIGHTS, heard.append) == (folder / WEIGHTS).read_bytes()
    assert sum(heard) == SIZE
    assert min(heard) == -100_000


def test_a_killed_process_goes_on_where_it_was(server, repository, folder):
    server.slow(WEIGHTS, 200_000)
    code = "import sys; from pathlib import Path; from cpmjax.formats.hub import HubRepository\n"
    code += "with HubRepository(sys.argv[1], Path(sys.argv[2])).fetch(sys.argv[3]): pass"
    command = [sys.executable, "-c", code, URL, str(repository.folder), WEIGHTS]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    partial = repository.folder / WEIGHTS
    deadline = time.monotonic() + 30
    while not (partial.exists() and partial.stat().st_size > 20_000):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    present = partial.stat().st_size
    assert 20_000 < present < SIZE
    server.behave()
    heard = []
    assert fetch(repository, WEIGHTS, heard.append) == (folder / WEIGHTS).read_bytes()
    assert server.downloads(WEIGHTS)[-1].range == f"bytes={present}-"
    assert heard[0] == present and sum(heard) == SIZE


def test_a_whole_file_that_a_killed_process_left_is_not_downloaded_again(server, repository, folder):
    repository.folder.mkdir()
    (repository.folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    assert fetch(repository) == (folder / WEIGHTS).read_bytes()
    assert server.downloads(WEIGHTS) == []


@pytest.mark.parametrize("size", [1000, SIZE, SIZE + 1])
def test_a_part_of_another_file_is_replaced(server, repository, folder, size):
    repository.folder.mkdir()
    (repository.folder / WEIGHTS).write_bytes(b"?" * size)
    heard = []
    assert fetch(repository, WEIGHTS, heard.append) == (folder / WEIGHTS).read_bytes()
    assert server.downloads(WEIGHTS)[-1].range == "bytes=0-"
    assert sum(heard) == SIZE


def test_text_is_always_asked_for_anew(repository):
    repository.folder.mkdir()
    (repository.folder / "config.json").write_text('{"model_type": "another"}')  # of the same length
    assert fetch(repository, "config.json") == b'{"model_type": "minicpm"}'


# What is refused.


@pytest.mark.parametrize(
    "url", ["hf://openbmb", "hf://a/b/c", "hf:///b", "hf://a/", "hf://a/b@", "hf://a/b@c@d", "http://a/b", "hf://a/b c"]
)
def test_an_address_of_another_form(server, tmp_path, url):
    refusal(lambda: HubRepository(url, tmp_path), url, "expected hf://OWNER/REPO")
    assert server.requests == []


def test_a_name_that_the_hub_does_not_allow(server, tmp_path):
    refusal(lambda: HubRepository("hf://a/-b..c", tmp_path), "hf://a/-b..c", "expected hf://OWNER/REPO")


def test_without_the_library(monkeypatch, tmp_path):
    real = builtins.__import__

    def missing(name, *rest):
        if name == "huggingface_hub":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    refusal(lambda: HubRepository(URL, tmp_path), URL, "pip install cpmjax[hub]")


def test_an_unknown_repository(server, tmp_path):
    refusal(lambda: HubRepository("hf://openbmb/nothing", tmp_path), "hf://openbmb/nothing", "no such", "HF_TOKEN")


def test_an_unknown_revision(server, tmp_path):
    refusal(lambda: HubRepository(f"{URL}@refs/pr/7", tmp_path), f"{URL}@refs/pr/7", "no such revision")
    assert server.requests[-1].path.endswith("/revision/refs/pr/7")


def test_an_unknown_file(repository):
    refusal(lambda: fetch(repository, "pytorch_model.7"), URL, "pytorch_model.7", repository.commit)


@pytest.mark.parametrize(
    "status, code, expected",
    [
        (401, None, "access denied (HTTP 401)"),
        (403, None, "access denied (HTTP 403)"),
        (403, "GatedRepo", f"accepted the terms at http://127.0.0.1:{{port}}/{REPO}"),
        (404, "EntryNotFound", "not there at commit"),
        (418, None, "HTTP 418"),
    ],
)
def test_a_refused_file(server, repository, status, code, expected):
    server.refuse(status, code, WEIGHTS)
    refusal(lambda: fetch(repository), f"{URL}/{WEIGHTS}", expected.format(port=server.port))
    server.behave()
    assert len(fetch(repository)) == SIZE


def test_a_refused_repository(server, tmp_path):
    server.refuse(403, "GatedRepo")
    refusal(lambda: HubRepository(URL, tmp_path), URL, "gated", "HF_TOKEN")


@pytest.mark.parametrize(
    "listing",
    [
        b"<html>sign in</html>",
        [],
        {"id": REPO},
        {"id": REPO, "sha": "main", "siblings": []},
        {"id": REPO, "sha": "0" * 40, "siblings": [{"size": 1}]},
        {"id": REPO, "sha": "0" * 40, "siblings": [{"rfilename": "a"}]},
        {"id": REPO, "sha": "0" * 40, "siblings": [{"rfilename": 1, "size": 1}]},
        {"id": REPO, "sha": "0" * 40, "siblings": [{"rfilename": "a", "size": -1}]},
        {"id": REPO, "sha": "0" * 40, "siblings": [{"rfilename": "a", "size": 1, "lfs": {"sha256": "0"}}]},
    ],
)
def test_an_answer_that_is_no_listing(server, tmp_path, listing):
    server.listing = listing
    refusal(lambda: HubRepository(URL, tmp_path), URL)


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/../../b", "a\\b", "a\nb", "a//b", ".", ""])
def test_a_name_that_leaves_the_folder(server, tmp_path, name):
    server.listing = {"id": REPO, "sha": "0" * 40, "siblings": [{"rfilename": name, "size": 1}]}
    refusal(lambda: HubRepository(URL, tmp_path), URL, repr(name), "inside a folder")


def test_wrong_bytes_are_deleted(server, repository, folder):
    server.corrupt(WEIGHTS)
    message = refusal(lambda: fetch(repository), f"{URL}/{WEIGHTS}", repository.files()[WEIGHTS].sha256)
    assert len(re.findall("[0-9a-f]{64}", message)) == 2
    assert on_disk(repository.folder) == []


def test_more_bytes_than_listed_are_not_taken(server, folder, tmp_path):
    server.listing = server.info(server.commit)
    for sibling in server.listing["siblings"]:
        sibling["size"] = 10
        sibling.pop("lfs", None)
    repository = HubRepository(URL, tmp_path / "downloads")
    heard = []
    refusal(lambda: fetch(repository, WEIGHTS, heard.append), f"{URL}/{WEIGHTS}", "expected 10")
    assert sum(heard) < SIZE
    assert on_disk(repository.folder) == []


def test_fewer_bytes_than_listed(server, repository):
    server.truncate(WEIGHTS, 1000)
    refusal(lambda: fetch(repository), f"{URL}/{WEIGHTS}", "fewer bytes than it lists")
    assert (repository.folder / WEIGHTS).stat().st_size == 1000
    server.behave()
    assert len(fetch(repository)) == SIZE


def test_a_connection_that_brings_nothing_is_given_up(server, repository):
    server.break_after(WEIGHTS, 0, times=1000)
    refusal(lambda: fetch(repository), f"{URL}/{WEIGHTS}", f"after 0 of {SIZE} bytes", "run again")
    assert len(server.downloads(WEIGHTS)) == hub._FAILURES


def test_no_network(monkeypatch, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        refusal(lambda: HubRepository(URL, tmp_path), URL, f"cannot reach {endpoint}")


@pytest.mark.parametrize("endpoint", ["localhost", "http://[1", "http://"])
def test_an_endpoint_that_is_none(monkeypatch, tmp_path, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    refusal(lambda: HubRepository(URL, tmp_path), URL, "HF_ENDPOINT")


def test_offline(server, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refusal(lambda: HubRepository(URL, tmp_path), URL, "HF_HUB_OFFLINE")
    assert server.requests == []


def test_the_disk_is_too_small(server, repository, monkeypatch):
    usage = namedtuple("usage", "total used free")
    free = SIZE + hub._MARGIN
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: usage(free, 0, free - 1))
    refusal(lambda: fetch(repository), f"{URL}/{WEIGHTS}", str(repository.folder), "0.27 GB free", "make room")
    assert server.downloads(WEIGHTS) == []
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: usage(free, 0, free))
    assert len(fetch(repository)) == SIZE


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a full disk")
def test_a_disk_that_is_full_all_the_same(server, repository):
    repository.folder.mkdir()
    (repository.folder / WEIGHTS).symlink_to("/dev/full")
    refusal(lambda: fetch(repository), f"{URL}/{WEIGHTS}", "No space left on device")


# Whom the token is told.


def test_the_token_goes_to_the_hub_and_not_to_where_it_redirects(server, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(HubRepository(URL, tmp_path))
    told = {request.path.split("/")[1]: request.authorization for request in server.requests}
    assert told == {"api": "Bearer hf_secret", "openbmb": "Bearer hf_secret", "cdn": None}
