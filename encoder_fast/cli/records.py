"""Texts from a file or a pipe, one record at a time: text, csv, jsonl or parquet.

Whatever is wrong with a record is an error that names the line or row that it is in.
"""

from __future__ import annotations

import csv
import json
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from encoder_fast.cli.errors import UserError, first_line

STANDARD = "-"
"""What stands for standard input or output in place of a file's name."""

FORMATS = ("text", "csv", "jsonl", "parquet")

_SUFFIXES = {
    ".txt": "text",
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}

# A quote that is never closed makes one field of the rest of the file: this is where it ends.
_LONGEST_FIELD = 100_000_000

_PARQUET_ROWS = 1024

_JSON_TYPES: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a truth value",
    type(None): "null",
}


class Record(NamedTuple):
    """A text, and what it is called in the output."""

    id: str | int
    text: str


class Source:
    """The records of an input, read anew by each iteration.

    Attributes:
        path: the file; ``-`` is standard input.
        format: one of ``FORMATS``.
        column: which column or key has the texts.
        id_column: which has the ids; a record's number, from 0, where ``None``.
        rereadable: whether a second iteration gives the same.

    Raises:
        UserError: there is no such file, or an option does not fit its format.
    """

    def __init__(
        self, path: str, format: str | None, column: str | None, id_column: str | None
    ) -> None:
        self.path = path
        self.name = "standard input" if path == STANDARD else path
        if path == STANDARD and sys.stdin is None:
            raise UserError("standard input is closed")
        mode = None if path == STANDARD else _mode(path)
        self.rereadable = mode is not None and stat.S_ISREG(mode)
        self.format = format or _guess(path)
        if self.format == "text":
            for option, value in (("--column", column), ("--id-column", id_column)):
                if value is not None:
                    raise UserError(f"{option} is for csv, jsonl and parquet; {path} is text")
        elif self.format == "parquet" and not self.rereadable:
            raise UserError("parquet can't be read from a pipe: give a file")
        self.column = "text" if column is None else column
        self.id_column = id_column

    def __iter__(self) -> Iterator[Record]:
        if self.format == "parquet":
            yield from self._parquet()
            return
        read: dict[str, Callable[[Iterator[str]], Iterator[Record]]] = {
            "text": self._text,
            "csv": self._csv,
            "jsonl": self._jsonl,
        }
        with self._opened() as file:
            yield from read[self.format](self._decoded(file))

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        try:
            if self.path == STANDARD:
                yield sys.stdin.buffer
                return
            with open(self.path, "rb") as file:
                yield file
        except OSError as error:
            raise UserError(f"{self.name}: {error.strerror or first_line(error)}") from None

    def _decoded(self, file: BinaryIO) -> Iterator[str]:
        """The lines, their ends kept. Only a newline ends one: a text may hold U+2028."""
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise self._wrong(f"line {number}", _not_utf8(error)) from None
            # nothing is left of a file that holds a byte order mark alone
            if text:
                yield text

    def _text(self, lines: Iterator[str]) -> Iterator[Record]:
        for number, line in enumerate(lines):
            yield Record(number, line.removesuffix("\n").removesuffix("\r"))

    def _csv(self, lines: Iterator[str]) -> Iterator[Record]:
        csv.field_size_limit(_LONGEST_FIELD)
        delimiter = "\t" if Path(self.path).suffix.lower() == ".tsv" else ","
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        first = 1
        try:
            header = next(filter(None, rows), None)
            if header is None:
                raise UserError(f"{self.name} is empty: a csv begins with the names of its columns")
            column = self._find(self.column, header)
            id_column = None if self.id_column is None else self._find(self.id_column, header)
            number = 0
            first = rows.line_num + 1
            for row in rows:
                if row:
                    if len(row) != len(header):
                        raise self._wrong(
                            f"line {first}", f"{len(row)} fields, and the header has {len(header)}"
                        )
                    yield Record(number if id_column is None else row[id_column], row[column])
                    number += 1
                first = rows.line_num + 1
        except csv.Error as error:
            raise self._wrong(f"line {first}", str(error)) from None

    def _jsonl(self, lines: Iterator[str]) -> Iterator[Record]:
        number = 0
        for line_number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"line {line_number}"
            try:
                value = json.loads(line, object_pairs_hook=self._object)
            except (ValueError, RecursionError) as error:
                raise self._wrong(where, f"no JSON: {first_line(error)}") from None
            except UserError as error:
                raise self._wrong(where, str(error)) from None
            if not isinstance(value, dict):
                raise self._wrong(where, f"{_name(value)}, not an object with a key for the text")
            text = value.get(self.column) if self.column in value else self._absent(where, value)
            if not isinstance(text, str):
                raise self._wrong(where, f"{self.column!r} is {_name(text)}, not a string")
            yield Record(self._id(value, number, where), text)
            number += 1

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names: list[str | None] = [name for name, _ in pairs]
            for name in (self.column, self.id_column):
                if names.count(name) > 1:
                    raise UserError(f"an object has the key {name!r} {names.count(name)} times")
        return found

    def _absent(self, where: str, value: dict) -> Any:
        keys = ", ".join(map(repr, value)) or "none"
        raise self._wrong(where, f"no key {self.column!r}; it has {keys}")

    def _id(self, value: dict, number: int, where: str) -> str | int:
        if self.id_column is None:
            return number
        found = value.get(self.id_column)
        if isinstance(found, bool) or not isinstance(found, (str, int)):
            raise self._wrong(where, f"the id {self.id_column!r} is {_name(found)}")
        return found

    def _parquet(self) -> Iterator[Record]:
        pyarrow, parquet = import_pyarrow()
        wanted = list(dict.fromkeys([self.column, self.id_column or self.column]))
        number = 0
        try:
            with parquet.ParquetFile(self.path) as file:
                schema = file.schema_arrow
                for name in wanted:
                    self._find(name, schema.names)
                self._check_type(schema.field(self.column).type, pyarrow)
                for batch in file.iter_batches(_PARQUET_ROWS, columns=wanted):
                    columns = [batch.column(batch.schema.get_field_index(n)) for n in wanted]
                    for values in zip(*(column.to_pylist() for column in columns), strict=True):
                        where = f"row {number}"
                        if values[0] is None:
                            raise self._wrong(where, f"{self.column!r} is null")
                        ids = dict(zip(wanted, values, strict=True))
                        yield Record(self._id(ids, number, where), values[0])
                        number += 1
        except UnicodeDecodeError as error:
            raise self._wrong(f"rows from {number} on", _not_utf8(error)) from None
        except pyarrow.ArrowException as error:
            raise UserError(f"{self.path} can't be read as parquet: {first_line(error)}") from None
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror or first_line(error)}") from None

    def _check_type(self, kind: Any, pyarrow: Any) -> None:
        types = pyarrow.types
        values = kind.value_type if types.is_dictionary(kind) else kind
        if not any(
            is_text(values)
            for is_text in (types.is_string, types.is_large_string, types.is_string_view)
        ):
            raise UserError(f"{self.path}: column {self.column!r} is {kind}, not string")

    def _find(self, name: str, names: Iterable[str]) -> int:
        names = list(names)
        if name not in names:
            found = ", ".join(map(repr, names))
            raise UserError(f"{self.name} has no column {name!r}; it has {found}")
        if names.count(name) > 1:
            raise UserError(f"{self.name} has {names.count(name)} columns {name!r}")
        return names.index(name)

    def _wrong(self, where: str, what: str) -> UserError:
        return UserError(f"{self.name}, {where}: {what}")


def import_pyarrow() -> tuple[Any, Any]:
    """``pyarrow`` and ``pyarrow.parquet``.

    Raises:
        UserError: they are not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "parquet needs pyarrow: pip install 'encoder-fast[parquet]'; csv and jsonl need nothing"
        ) from None
    return pyarrow, pyarrow.parquet


def _mode(path: str) -> int:
    try:
        mode = Path(path).stat().st_mode
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        raise UserError(f"{path} is a folder, not a file")
    return mode


def _guess(path: str) -> str:
    if path == STANDARD:
        return "text"
    suffix = Path(path).suffix.lower()
    if suffix not in _SUFFIXES:
        raise UserError(
            f"{path}: the name does not tell the format; give --input-format {'|'.join(FORMATS)}"
        )
    return _SUFFIXES[suffix]


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} is not UTF-8"


def _name(value: Any) -> str:
    """A value's type, for an error; parquet has more of them than JSON."""
    return _JSON_TYPES.get(type(value), f"of type {type(value).__name__}")
