"""Results to a file: npy, jsonl, csv or parquet, a part at a time."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, BinaryIO

import numpy as np

from encoder_fast.cli.errors import UserError
from encoder_fast.cli.parts import Part
from encoder_fast.cli.records import import_pyarrow

Writer = Callable[[Iterable[Part], BinaryIO], None]
"""Writes parts to a file. The first part has no records and shows what the results are like."""


def write_npy(parts: Iterable[Part], file: BinaryIO) -> None:
    """Vectors alone, in the order of the input."""
    rows, start = 0, file.tell()
    header: dict[str, Any] = {}
    for part in parts:
        assert isinstance(part.results, np.ndarray)
        if not header:
            header = np.lib.format.header_data_from_array_1_0(part.results)
            # NumPy leaves room for the number of rows to grow: the header keeps its length
            np.lib.format.write_array_header_1_0(file, header)
        file.write(part.results.tobytes())
        rows += len(part.ids)
    header["shape"] = (rows, *header["shape"][1:])
    file.seek(start)
    np.lib.format.write_array_header_1_0(file, header)


def write_jsonl(parts: Iterable[Part], file: BinaryIO) -> None:
    """An object a record: its id and what was found."""
    for part in parts:
        lines = _vector_lines(part) if isinstance(part.results, np.ndarray) else _object_lines(part)
        file.write("".join(lines).encode())


def _vector_lines(part: Part) -> Iterator[str]:
    assert isinstance(part.results, np.ndarray)
    for name, vector in zip(part.ids, part.results, strict=True):
        # NumPy's digits are the fewest that give the same float32 back
        values = ", ".join(vector.astype(str).tolist())
        yield f'{{"id": {_json(name)}, "embedding": [{values}]}}\n'


def _object_lines(part: Part) -> Iterator[str]:
    for name, found in zip(part.ids, part.results, strict=True):
        yield _json({"id": name, **found}) + "\n"


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    # half of a surrogate pair has no UTF-8, but JSON has an escape for it
    return text if text.isascii() else "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    return f"\\u{ord(character):04x}" if "\ud800" <= character <= "\udfff" else character


def write_csv_of(
    columns: list[str], rows: Callable[[str | int, dict[str, Any]], Iterable[list]]
) -> Writer:
    """A writer of csv.

    Args:
        columns: their names, after the id's.
        rows: from a record's id and what was found to its rows, of which there may be none.
    """

    def write(parts: Iterable[Part], file: BinaryIO) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="")
        try:
            table = csv.writer(text, lineterminator="\n")
            table.writerow(["id", *columns])
            for part in parts:
                for name, found in zip(part.ids, part.results, strict=True):
                    table.writerows(rows(name, found))
                text.flush()
        finally:
            text.detach()

    return write


def write_parquet_of(result_type: Callable[[Any, Part], dict[str, Any]]) -> Writer:
    """A writer of parquet: a row a record.

    Args:
        result_type: from ``pyarrow`` and the first part to the columns' names and types, after the
            id's.
    """

    def write(parts: Iterable[Part], file: BinaryIO) -> None:
        pyarrow, parquet = import_pyarrow()
        rest = iter(parts)
        first = next(rest)
        second = next(rest, first)
        is_number = not second.ids or isinstance(second.ids[0], int)
        id_type = pyarrow.int64() if is_number else pyarrow.string()
        columns = result_type(pyarrow, first)
        schema = pyarrow.schema({"id": id_type, **columns})
        with parquet.ParquetWriter(file, schema) as table:
            for part in chain([second], rest):
                arrays = [_ids(pyarrow, part.ids, id_type)]
                if isinstance(part.results, np.ndarray):
                    (kind,) = columns.values()
                    values = pyarrow.array(part.results.reshape(-1))
                    arrays.append(pyarrow.FixedSizeListArray.from_arrays(values, type=kind))
                else:
                    arrays += [
                        pyarrow.array([found[name] for found in part.results], kind)
                        for name, kind in columns.items()
                    ]
                table.write_batch(pyarrow.record_batch(arrays, schema=schema))

    return write


def _ids(pyarrow: Any, ids: list[str | int], kind: Any) -> Any:
    try:
        return pyarrow.array(ids, kind)
    except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError) as error:
        raise UserError(
            f"the ids don't fit one column of parquet, of {kind}, as the first id is: "
            f"{' '.join(str(error).split())}; --format jsonl takes any"
        ) from None


def vector_type(pyarrow: Any, part: Part) -> dict[str, Any]:
    """The columns of vectors in parquet."""
    assert isinstance(part.results, np.ndarray)
    kind = pyarrow.from_numpy_dtype(part.results.dtype)
    return {"embedding": pyarrow.list_(kind, part.results.shape[1])}
