"""Files of a repository on the Hugging Face hub, one at a time on the disk: hf://OWNER/REPO[@REVISION].

The library huggingface_hub talks to the hub: addresses, tokens, proxies, and waiting where the hub asks for it.
HF_TOKEN, HF_ENDPOINT and its other variables count as usual. What it downloads with is not used: since its version
1.18 a download that is killed begins anew, beside a partial file that nobody finds again (huggingface_hub issue 4196),
and it compares the length with the hub's, but not the sha256. Files come by plain HTTP; its faster transfer, hf_xet,
is never asked.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from cpmjax.run.errors import DiskFull, Unreachable, UserError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

_URL = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[^@\s]+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

_MARGIN = 2**28  # bytes of disk that a download leaves free
_FAILURES = 6  # connections in a row without a new byte, after which a download gives up
_WAIT = 1.0  # seconds until the next connection, doubled by each such failure

_NO_HUB = "did not answer as a hub does; check HF_ENDPOINT, and whether the network wants a sign-in"


@dataclass(frozen=True)
class RemoteFile:
    size: int  # bytes
    sha256: str | None  # 64 hexadecimal digits; None for a small file that is not stored with Git LFS


class HubRepository:
    """One commit of a model repository: the one `url` means at this moment, whatever is pushed later.

    `folder` is for its downloads alone: what else lies there is deleted in time, see `fetch`.
    """

    def __init__(self, url: str, folder: Path) -> None:
        """Asks the hub what the commit holds.

        Raises UserError for an address of another form, for a repository or revision that the hub does not give, if
        the hub cannot be reached, and if huggingface_hub is not installed.
        """
        parts = _URL.fullmatch(url)
        if parts is None:
            raise UserError(
                f"{url}: not an address of a repository; expected hf://OWNER/REPO or hf://OWNER/REPO@REVISION"
            )
        try:
            from huggingface_hub import HfApi, constants
        except ImportError as error:
            raise UserError(f"{url}: the Hugging Face hub needs huggingface_hub: pip install cpmjax[hub]") from error
        self.url = url
        self.folder = folder
        # The library reads HF_ENDPOINT once, when it is imported.
        self.endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self._repository = parts["repository"]
        self._held: set[Path] = set()
        with self._errors_of(url):
            try:
                info = HfApi(self.endpoint).model_info(
                    self._repository,
                    revision=parts["revision"],
                    files_metadata=True,
                    timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                )
                self.commit: str = info.sha or ""  # 40 hexadecimal digits
                if not _COMMIT.fullmatch(self.commit):
                    raise UserError(f"{url}: the hub names commit {info.sha!r:.50}; expected 40 hexadecimal digits")
                self._files = {file.rfilename: self._checked(file) for file in info.siblings or ()}
            except (KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{url}: {self.endpoint} {_NO_HUB}") from error

    def files(self) -> dict[str, RemoteFile]:
        """What the commit holds, by name; a "/" in a name stands for a folder."""
        return dict(self._files)

    @contextlib.contextmanager
    def fetch(self, name: str, on_bytes: Callable[[int], object] = lambda count: None) -> Iterator[Path]:
        """The file at `folder`/`name`, with the size and the sha256 that the hub lists; deleted when the block ends.

        Part of it that an earlier process left is gone on from. Another file that was left is deleted when one as
        large is fetched: small ones may come first, and there is never more than one of the large ones.

        `on_bytes` hears of bytes as they come, of those that lie there already at once, and of a negative number if
        some are thrown away: the sum is what is on the disk.

        Raises UserError for a name that the commit lacks, too little room on the disk, a hub that refuses or cannot be
        reached any more, and bytes that are not those listed; the last are deleted, an unfinished file stays.
        """
        if name not in self._files:
            raise UserError(f"{self.url}: no file {name} at commit {self.commit}; expected a name that it lists")
        path = self.folder / name
        self._held.add(path)
        try:
            with self._errors_of(f"{self.url}/{name}"):
                self._delete_leftovers(self._files[name].size)
                self._download(name, path, on_bytes)
            try:
                yield path
            finally:
                path.unlink(missing_ok=True)
        finally:
            self._held.remove(path)

    def _checked(self, listed: RepoSibling) -> RemoteFile:
        """What the hub says of a file, which is no more to be trusted than the file."""
        name = listed.rfilename
        if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise UserError(f"{self.url}: lists a file {name!r}; expected names that stay inside a folder")
        size, sha256 = (listed.size, None) if listed.lfs is None else (listed.lfs.size, listed.lfs.sha256)
        if not isinstance(size, int) or size < 0:
            raise UserError(f"{self.url}/{name}: the hub lists {size!r} as its size; expected a number of bytes")
        if sha256 is not None and not _SHA256.fullmatch(sha256):
            raise UserError(
                f"{self.url}/{name}: the hub lists {sha256!r} as its sha256; expected 64 hexadecimal digits"
            )
        return RemoteFile(size, sha256)

    def _delete_leftovers(self, largest: int) -> None:
        """A killed process may have left a file that nobody asks for again."""
        for path in self.folder.rglob("*"):
            if path.is_file() and path not in self._held and path.stat().st_size <= largest:
                path.unlink()

    def _download(self, name: str, path: Path, on_bytes: Callable[[int], object]) -> None:
        file = self._files[name]
        if file.sha256 is None:
            path.unlink(missing_ok=True)  # nothing would show that it is a part of another commit's file
        continued = path.exists()
        self._receive(name, path, on_bytes)
        fault = _difference(path, file)
        if fault and continued:
            # Then the part that was there may have been of another commit, or was damaged when the machine went down.
            on_bytes(-path.stat().st_size)
            path.unlink()
            self._receive(name, path, on_bytes)
            fault = _difference(path, file)
        if fault:
            path.unlink()
            raise UserError(f"{self.url}/{name}: downloaded {fault}; deleted, run again to download it anew")

    def _receive(self, name: str, path: Path, on_bytes: Callable[[int], object]) -> None:
        """Appends to the file until it is as long as listed, over as many connections as bring something."""
        import httpx2

        size = self._files[name].size
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            on_bytes(file.tell())
            needed, free = size - file.tell() + _MARGIN, shutil.disk_usage(path.parent).free
            if free < needed:
                raise DiskFull(
                    f"{self.url}/{name}: {free / 1e9:.2f} GB free at {self.folder}; expected {needed / 1e9:.2f} GB: "
                    "make room, then run again"
                )
            failures = 0
            while (before := file.tell()) < size:
                trouble = "the hub ended the file too early"
                try:
                    self._append(name, file, on_bytes)
                except httpx2.TransportError as error:
                    trouble = str(error) or type(error).__name__
                if file.tell() >= size:
                    return
                failures = 0 if file.tell() > before else failures + 1
                if failures == _FAILURES:
                    raise Unreachable(
                        f"{self.url}/{name}: nothing more came after {file.tell()} of {size} bytes ({trouble}); "
                        "check the network, then run again to go on from there"
                    )
                time.sleep(_WAIT * 2**failures)

    def _append(self, name: str, file: BinaryIO, on_bytes: Callable[[int], object]) -> None:
        """Takes what one connection gives of the bytes that are missing."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        present = file.tell()
        url = hf_hub_url(self._repository, name, revision=self.commit, endpoint=self.endpoint)
        headers = build_hf_headers() | {"Accept-Encoding": "identity", "Range": f"bytes={present}-"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with http_stream_backoff("GET", url, headers=headers, timeout=timeout, retry_on_exceptions=()) as response:
            hf_raise_for_status(response)
            if response.status_code != 206:  # not the part asked for, but the whole
                file.truncate(0)
                file.seek(0)
                on_bytes(-present)
            for chunk in response.iter_bytes():
                file.write(chunk)
                on_bytes(len(chunk))
                if file.tell() > self._files[name].size:
                    return

    @contextlib.contextmanager
    def _errors_of(self, what: str) -> Iterator[None]:
        """Says in one line what the hub, the network or the disk refused."""
        import httpx2

        try:
            yield
        except (OSError, ValueError, httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise UserError(f"{what}: {self._explain(error)}") from error

    def _explain(self, error: Exception) -> str:
        from huggingface_hub import errors

        match error:
            case errors.OfflineModeIsEnabled():
                return "the hub is not asked while HF_HUB_OFFLINE is set; expected it unset"
            case errors.GatedRepoError():
                page = f"{self.endpoint}/{self._repository}"
                return f"gated; expected HF_TOKEN to be of a user who has accepted the terms at {page}"
            case errors.RepositoryNotFoundError():
                return f"no such repository at {self.endpoint}, or a private one; expected another name or HF_TOKEN set"
            case errors.RevisionNotFoundError():
                return "no such revision; expected a branch, a tag or a commit of the repository"
            case errors.RemoteEntryNotFoundError():
                return f"listed, but not there at commit {self.commit}; expected a complete repository"
            case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
                return (
                    f"access denied (HTTP {error.response.status_code}); expected HF_TOKEN to be one that may read it"
                )
            case errors.HfHubHTTPError() if error.response.status_code == 416:
                return "the hub has fewer bytes than it lists; run again later to go on"
            case errors.HfHubHTTPError():
                return f"the hub answered HTTP {error.response.status_code}; run again later to go on"
            case errors.HFValidationError():
                return "not a name that the hub allows; expected hf://OWNER/REPO or hf://OWNER/REPO@REVISION"
            case OSError():
                return f"{error.filename or self.folder}: {error.strerror or error}; mend that, then run again to go on"
            case ValueError():
                return f"{self.endpoint} {_NO_HUB}"
        return f"cannot reach {self.endpoint} ({error or type(error).__name__}); check the network and HF_ENDPOINT"


def _difference(path: Path, expected: RemoteFile) -> str | None:
    """How a file differs from what the hub lists, or None."""
    size = path.stat().st_size
    if size != expected.size:
        return f"{size} bytes or more, expected {expected.size}"
    if expected.sha256 is not None:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != expected.sha256:
            return f"bytes with sha256 {sha256}, expected {expected.sha256}"
    return None
