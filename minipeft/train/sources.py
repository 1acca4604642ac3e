"""Places of data: files of several formats, folders, and data sets of the `datasets` library, read object by object.

`a.jsonl`, `a.json` (a list of objects, or one a line), `a.csv`, `a.tsv`, `a.parquet`, each but Parquet also as `.gz`,
`.bz2` or `.xz`; a folder of such files, or one that `datasets` saved; a hub's data set by `org/name`. After `#` stands
the part to take (`org/name#train`, `#config/train`, `folder#train`), train unless told otherwise. Several places stand
with commas between them, each with its share after a colon: `chats.jsonl:2,notes.csv:0.5`. Nothing is held in memory
but the object at hand, a row group of Parquet, or a whole `.json` list.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from minipeft.train.errors import DataError, MissingExtraError

# The file, the row or line from 1, and the object there; or the DataError of a row that cannot be read, after which
# others may follow.
Rows = Iterator[tuple[str, int, Any]]

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_ON_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SHARE = re.compile(r"(.+):(\d+(?:\.\d+)?|\.\d+)")
# Parts of data sets, as the names of files begin with them.
_PARTS = re.compile(r"(train|valid|validation|dev|test|eval)(?![a-z])", re.IGNORECASE)
# What `datasets` writes beside the data.
_ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# Columns of tables that hold JSON, since a cell is a text.
_JSON_COLUMNS = ("messages", "conversations", "conversation", "tools", "history")


def shares(data: str | Path) -> list[tuple[str, float]]:
    """The places that `data` names, each with its share: 1 unless one is given.

    Raises:
        DataError: a share of 0.
    """
    whole = str(data)
    found = []
    for part in [whole] if isinstance(data, Path) or _exists(whole) else whole.split(","):
        name, share = part.strip(), 1.0
        given = None if _exists(name) else _SHARE.fullmatch(name)
        if given:
            name, share = given[1], float(given[2])
        if share == 0:
            raise DataError(f"expected a share above 0 after the colon, got {part.strip()!r}")
        found.append((name, share))
    return found


def objects(place: str) -> Rows:
    """The objects at one place, in order.

    Raises:
        DataError: no such place, or something there that cannot be read: with file and row.
        MissingExtraError: a format whose library is not installed.
    """
    path, part = Path(place), None
    if not _exists(place) and "#" in place:
        name, _, part = place.rpartition("#")
        path = Path(name)
    if path.is_dir():
        yield from _folder(path, part)
    elif is_on_hub(str(path)):
        yield from _hub(str(path), part)
    elif part is not None and path.exists():
        raise DataError(f"expected no part (#{part}): a file has none", path)
    else:
        yield from _file(path)


def jsonl(path: Path, opened: Callable[..., IO[bytes]] = open) -> Rows:
    """The objects of a JSON Lines file; blank lines are passed over."""
    # Lines end at newlines only: str.splitlines would also cut at U+2028, which JSON allows inside strings.
    for number, raw in enumerate(_lines(path, opened), 1):
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if raw.strip():
            yield str(path), number, _or_error(parse, raw, path, number)


def _or_error(read: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return read(*arguments)
    except DataError as error:
        return error


def parse(raw: bytes, path: str | Path, line: int | None, what: str = "one JSON object") -> Any:
    """JSON as it stands in a file; DataError for what is none, with the place."""
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_distinct)
    except UnicodeDecodeError as error:
        message = f"expected UTF-8 text, found byte 0x{raw[error.start]:02x} at column {error.start + 1}"
        raise DataError(message, path, line) from None
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if line is not None else f"line {error.lineno}, column {error.colno}"
        raise DataError(f"expected {what}, found invalid JSON ({error.msg} at {where})", path, line) from None
    except _RepeatedKey as error:
        raise DataError(f"expected every key once, found {error.args[0]!r} twice in one object", path, line) from None
    except RecursionError:
        raise DataError(f"expected {what}, found JSON that is nested too deep", path, line) from None
    except ValueError:
        # Python refuses whole numbers of more than some thousand digits.
        raise DataError(f"expected {what}, found a number of too many digits", path, line) from None


class _RepeatedKey(Exception):
    """An object has a key twice, of which json would keep the last in silence."""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _RepeatedKey(key)
        found[key] = value
    return found


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # a name too long, or with a null character
        return False


def is_on_hub(place: str) -> bool:
    """True for `org/name`, where it can be no file that is merely missing."""
    if _exists(place) or not _ON_HUB.fullmatch(place) or _suffixes(Path(place))[0] in FORMATS:
        return False
    return not Path(place).parent.is_dir()


def _suffixes(path: Path) -> tuple[str, str]:
    """The format's suffix, and that of the compression or nothing."""
    packed = path.suffix.lower() if path.suffix.lower() in _OPENERS else ""
    inner = path.with_suffix("") if packed else path
    return inner.suffix.lower(), packed


def _file(path: Path) -> Rows:
    kind, packed = _suffixes(path)
    opened = _OPENERS.get(packed, open)
    if kind == ".parquet" and not packed:
        return _parquet(path)
    if kind in (".csv", ".tsv"):
        return _table(path, opened, "\t" if kind == ".tsv" else ",")
    if kind == ".json":
        return _json(path, opened)
    # Whatever its name is: JSON Lines.
    return jsonl(path, opened)


def _lines(path: Path, opened: Callable[..., IO[bytes]]) -> Iterator[bytes]:
    """The lines of a file that may be compressed."""
    try:
        with opened(path, "rb") as file:
            yield from file
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"the compressed file is damaged or cut off: {error}", path) from None
    except OSError as error:
        raise DataError(f"cannot read the data file: {error.strerror or error}", path) from None


def _json(path: Path, opened: Callable[..., IO[bytes]]) -> Rows:
    """A list of objects, counted from 1, or one object a line."""
    lines = _lines(path, opened)
    first = next((line for line in lines if line.removeprefix(b"\xef\xbb\xbf").strip()), b"")
    lines.close()  # type: ignore[attr-defined]
    if not first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from jsonl(path, opened)
        return
    content = b"".join(_lines(path, opened)).removeprefix(b"\xef\xbb\xbf")
    for number, value in enumerate(parse(content, path, None, "a list of objects"), 1):
        yield str(path), number, value


def _table(path: Path, opened: Callable[..., IO[bytes]], delimiter: str) -> Rows:
    """The rows of a CSV or TSV file with a header, each under the line on which it begins."""
    line = 1
    before = csv.field_size_limit(sys.maxsize)
    try:
        rows = csv.reader(_texts(_lines(path, opened), path), delimiter=delimiter, strict=True)
        header = next(rows, [])
        twice = {name for name in header if header.count(name) > 1}
        if twice:
            raise DataError(f"expected every column once, found {sorted(twice)} more often in the header", path, 1)
        line = rows.line_num + 1
        for row in rows:
            if row:
                yield str(path), line, _or_error(_row, header, row, path, line)
            line = rows.line_num + 1
    except csv.Error as error:
        raise DataError(f"expected a row of a table with {delimiter!r} between cells: {error}", path, line) from None
    finally:
        csv.field_size_limit(before)


def _texts(lines: Iterable[bytes], path: Path) -> Iterator[str]:
    for number, raw in enumerate(lines, 1):
        try:
            yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            message = f"expected UTF-8 text, found byte 0x{raw[error.start]:02x} at column {error.start + 1}"
            raise DataError(message, path, number) from None


def _row(header: list[str], row: list[str], path: Path, line: int) -> dict[str, Any]:
    if len(row) != len(header):
        raise DataError(f"expected {len(header)} cells as in the header, found {len(row)}", path, line)
    return {column: _cell(column, text, path, line) for column, text in zip(header, row, strict=True)}


def _cell(column: str, text: str, path: Path, line: int) -> Any:
    if column in _JSON_COLUMNS and text.strip():
        return parse(text.encode(), path, line, f"JSON in the column {column!r}")
    return text


def _parquet(path: Path) -> Rows:
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield str(path), number, _present(value)
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: texts that are no UTF-8
        said = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"cannot read the Parquet file: {said}", path) from None


def _present(value: Any) -> Any:
    """A value without the nulls of Arrow, whose records all have every field that one of them has."""
    if isinstance(value, Mapping):
        return {key: _present(inner) for key, inner in value.items() if inner is not None}
    return [_present(inner) for inner in value] if isinstance(value, list) else value


def _folder(path: Path, part: str | None) -> Rows:
    """A folder that `datasets` saved, or the files of one part in a folder, in the order of their names."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        yield from _of_datasets(path, part, lambda library: library.load_from_disk(str(path)))
        return
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name not in _ABOUT)
    files = [file for file in files if _suffixes(file)[0] in FORMATS and not file.name.startswith(".")]
    if not files:
        raise DataError(f"expected a file of records, found a directory without any ({', '.join(FORMATS)})", path)
    parts = {file: _PARTS.match(file.name) for file in files}
    names = sorted({found[1].lower() for found in parts.values() if found})
    if part is not None:
        chosen = [file for file, found in parts.items() if found and found[1].lower() == part.lower()]
        if not chosen:
            raise DataError(f"expected files of the part {part!r}, found those of {names or 'no part'}", path)
    elif names and len({found and found[1].lower() for found in parts.values()}) > 1:
        raise DataError(f"expected the files of one part, found several: say which, such as {path}#{names[-1]}", path)
    else:
        chosen = files
    for file in chosen:
        yield from _file(file)


def _hub(name: str, part: str | None) -> Rows:
    config, _, split = (part or "").rpartition("/")
    yield from _of_datasets(name, split or None, lambda library: library.load_dataset(name, config or None))


def _of_datasets(place: str | Path, split: str | None, load: Callable[[Any], Any]) -> Rows:
    """The rows of one split of a data set; of the only one, or train, unless `split` says which."""
    try:
        import datasets
    except ImportError:
        raise MissingExtraError(f"{place}: reading it needs the datasets library: pip install datasets") from None
    try:
        found = load(datasets)
    except Exception as error:  # of many kinds: the network's, the hub's, the formats'
        said = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"no such file, and the datasets library cannot load it: {said}", place) from None
    if isinstance(found, Mapping):
        names = list(found)
        chosen = split or (names[0] if len(names) == 1 else "train")
        if chosen not in found:
            raise DataError(f"expected one of the parts {names}, got {chosen!r}: name one, as in {place}#{names[0]}")
        found = found[chosen]
    elif split is not None:
        raise DataError(f"expected no part (#{split}): the data set has none", place)
    number = 0
    try:
        for value in found:
            number += 1
            yield str(place), number, _present(value)
    except Exception as error:  # of many kinds again: Arrow's, the formats', those of pictures and sounds
        said = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"the datasets library cannot read row {number + 1}: {said}", place) from None
