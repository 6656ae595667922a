"""ArrayRecord files, as TensorFlow Datasets and grain write them: a document a record."""

from __future__ import annotations

from collections.abc import Iterator

from cpmjax.data.documents import Bad, Document, from_bytes, from_json
from cpmjax.data.files import is_url, matching, reading
from cpmjax.data.optional import optional
from cpmjax.run.errors import UserError

# Also NAME.array_record-00003-of-00010.
_GLOBS = ("*.array_record*", "*.arrayrecord*")

_RECORDS = 1024  # read at one time


def array_records(path: str, field: str | None) -> Iterator[Document | Bad]:
    """Each record, named FILE:RECORD (the first is 1): UTF-8 text, or JSON whose `field` is the text."""
    module = optional("array_record.python.array_record_module", path)
    if is_url(path):
        raise UserError(f"{path}: expected a path of this machine, where its array records lie")
    for file in matching(path, _GLOBS):
        record = 0
        try:
            with reading(file):
                reader = module.ArrayRecordReader(file.place)
                # A reader of a damaged file is not ok, but raises nothing and has no records until it is closed.
                total = reader.num_records() if reader.ok() else 0
                if reader.ok() and total == 0:
                    yield Bad("empty", f"{file.place}: empty; expected text")
                for start in range(0, total, _RECORDS):
                    for raw in reader.read(start, min(start + _RECORDS, total)):
                        record += 1
                        name, place = f"{file.name}:{record}", f"{file.place}, record {record}"
                        yield from_json(name, raw, place, field) if field else from_bytes(name, raw, place)
                reader.close()
        except (OSError, RuntimeError) as error:
            place = f"{file.place}, after record {record}" if record else file.place
            said = " ".join(str(error).split())[:200] or "damaged"
            yield Bad("damaged array record", f"{place}: {said}; expected a readable, complete array record file")
