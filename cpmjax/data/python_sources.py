"""The text that comes with every Python: the source of its standard library, and the prose of its reference."""

from __future__ import annotations

import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from cpmjax.data.documents import Bad, Document, document, unreadable
from cpmjax.data.files import names_below
from cpmjax.run.errors import UserError

# Tests, installed packages and extension modules are not the library's source. `encodings` (1.4 MB of 12) is nearly
# all generated tables from bytes to characters; html/entities.py is a table too, and topics.py is a corpus of its own.
_FOLDERS_LEFT_OUT = frozenset(
    ["test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload", "encodings"]
)
_FILES_LEFT_OUT = frozenset(["html/entities.py", "pydoc_data/topics.py"])


def standard_library() -> Iterator[Document | Bad]:
    """Each source file, in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    for name in names_below(root, _FOLDERS_LEFT_OUT):
        # _sysconfigdata_*.py holds the compiler flags and paths of this one machine.
        if not name.endswith(".py") or name in _FILES_LEFT_OUT or name.startswith("_sysconfigdata"):
            continue
        try:
            text = importlib.util.decode_source((root / name).read_bytes())
        except OSError as error:
            yield unreadable(str(root / name), error)
            continue
        except (SyntaxError, UnicodeDecodeError) as error:
            yield Bad("undecodable", f"{root / name}: {error}; expected source in the encoding it declares")
            continue
        # A package's empty __init__.py is no document, and no fault either.
        if text.strip():
            yield Document(name, text)


def language_reference() -> Iterator[Document | Bad]:
    """Each topic, in alphabetical order."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError("pydoc_data/topics.py: not part of this Python; expected the language reference") from error
    for topic in sorted(topics):
        yield document(f"topics/{topic}", topics[topic], f"pydoc_data/topics.py, topic {topic}")
