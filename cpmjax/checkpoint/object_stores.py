"""Checkpoints on object stores: `gs://bucket/folder`, `s3://bucket/folder`.

Two libraries share the work: arrays go through tensorstore, names and small files through fsspec (its gcsfs, s3fs).
An object store renames nothing, so that a step is written in its place, and is complete once its `commit_success.txt`
is there, which orbax writes last and which is deleted first.

Who may write, and where S3 is, is read from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY; AWS_ENDPOINT_URL
and AWS_REGION for a store that is not Amazon's), else found as Amazon's and Google's own tools find it.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from etils import epath
from orbax.checkpoint import options as orbax_options

from cpmjax.run.errors import Unreachable, UserError

_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
_COMPLETE = "commit_success.txt"  # orbax's
_RETRIES = 7  # of a request to S3, about a minute in all; tensorstore's own 32 would take half an hour


def is_url(folder: str | os.PathLike[str]) -> bool:
    return os.fspath(folder).startswith(tuple(f"{scheme}://" for scheme in _PACKAGES))


def kvstore(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What tensorstore calls a folder on this machine or on an object store."""
    path = os.fspath(folder)
    if not is_url(path):
        return {"driver": "file", "path": f"{path}/"}
    parts = urlsplit(path)
    place = {"bucket": parts.netloc, "path": parts.path.strip("/") + "/"}
    return {"driver": "gcs", **place} if parts.scheme == "gs" else {"driver": "s3", **place, **_of_s3()}


def _of_s3() -> dict[str, Any]:
    """What s3fs takes from the environment, and tensorstore does not."""
    found = {
        "endpoint": os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
        "aws_region": os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
        # Its search for credentials prints an error for each place that has none.
        "aws_credentials": {"type": "environment"} if "AWS_ACCESS_KEY_ID" in os.environ else None,
    }
    return {"s3_request_retries": {"max_retries": _RETRIES}} | {key: value for key, value in found.items() if value}


def options(folder: epath.Path) -> dict[str, Any]:
    """The options of an orbax manager that make a checkpoint in this folder complete or absent."""
    mode = orbax_options.AtomicityMode
    return {"atomicity_options": orbax_options.AtomicityOptions(mode.COMMIT_FILE)} if is_url(folder) else {}


@contextlib.contextmanager
def answering(folder: epath.Path) -> Iterator[None]:
    """Each store's library has errors of its own; from an object store all of them mean that it cannot be used."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        if not is_url(folder):
            raise
        package = _PACKAGES[urlsplit(os.fspath(folder)).scheme]
        raise UserError(f"{folder}: {error}; expected the package {package}: pip install {package}") from error
    except Exception as error:
        if not is_url(folder):
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise Unreachable(f"{folder}: {said}; expected an object store that answers") from error


def prepare(folder: epath.Path) -> None:
    """Before anything of an object store is used. Raises UserError if its bucket is not there or does not answer."""
    if not is_url(folder):
        return
    with answering(folder):
        import fsspec

        for protocol in ("gcs", "s3"):  # a listing that fsspec remembers would hide what tensorstore writes
            fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False
        _teach_orbax()
        parts = urlsplit(os.fspath(folder))
        try:
            fsspec.filesystem(parts.scheme).info(parts.netloc)
        except FileNotFoundError as error:  # it would be made otherwise, of a mistyped name too
            raise UserError(f"{folder}: there is no bucket {parts.netloc}; expected one that exists") from error


@functools.cache
def _teach_orbax() -> None:
    """Orbax 0.12 knows tensorstore's driver for gs:// only; and it deletes the files of a step in any order."""
    from orbax.checkpoint._src.path import deleter
    from orbax.checkpoint._src.serialization import tensorstore_utils

    build, delete = tensorstore_utils.build_kvstore_tspec, deleter.PathDeleter.delete

    def build_for_all(directory: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        scheme, colon, place = directory.partition(":")
        if (scheme, colon) != ("s3", ":"):
            return build(directory, *args, **kwargs)
        return _on_s3(build("gs://" + place.lstrip("/"), *args, **kwargs))

    def delete_mark_first(self: Any, path: epath.Path, **kwargs: Any) -> None:
        if is_url(path):
            (path / _COMPLETE).unlink(missing_ok=True)
        delete(self, path, **kwargs)

    tensorstore_utils.build_kvstore_tspec = build_for_all
    deleter.PathDeleter.delete = delete_mark_first


def _on_s3(spec: Any) -> Any:
    if not isinstance(spec, dict):
        return spec
    if str(spec.get("driver")).startswith("gcs"):
        spec = spec | {"driver": "s3"} | _of_s3()
    return {key: _on_s3(value) for key, value in spec.items()}
