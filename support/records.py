"""Reading files of records: JSONL, JSON, CSV, TSV, each perhaps gzipped; what is wrong is one line with its place."""

import csv
import gzip
import io
import json
import os
import zlib
from pathlib import Path

from support.errors import ConfigError, DataError


def read_text(path: Path) -> str:
    """A file as UTF-8, or one line that says what is wrong with it."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}): convert it first") from error
    except (OSError, EOFError, zlib.error) as error:  # no gzip; one that is cut off; one that is damaged
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if not text.strip():
        raise DataError(f"{path} is empty")
    return text


def read_all(path: Path, parse, skip_bad: bool) -> list:
    """What `parse(record, where)` makes of each record. skip_bad: those that it refuses are counted and left out."""
    found, bad = [], []
    for place, record in read_records(path):
        try:
            found.append(parse(record, f"{path} {place}"))
        except DataError as error:
            if not skip_bad:
                raise
            bad.append(str(error).removeprefix(f"{path} "))
    report_skipped(path, {"records that cannot be used": bad})
    return found


def read_records(path: Path) -> list[tuple[str, dict]]:
    """The objects of a .jsonl, of a .json that holds one array, of a .csv, or of a .tsv (which has no quoting: a text
    may hold quotes, but no tab), each with its place: "line 3" of a .jsonl, "record 3" of the others, counted from 1.
    Any of them may end in .gz besides."""
    text, kind = read_text(path), Path(path.name.removesuffix(".gz")).suffix
    if kind == ".json":
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {error.lineno}: not JSON ({error.msg})") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
            raise DataError(f"{path}: cannot be read as JSON ({error})") from error
        if not isinstance(records, list):
            raise DataError(f"{path}: a .json file must hold an array of objects; or give one object a line in .jsonl")
        found = [(f"record {number}", record) for number, record in enumerate(records, start=1)]
    elif kind in (".csv", ".tsv"):
        form = {"strict": True} if kind == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        csv.field_size_limit(1 << 30)  # a text may be long
        rows = csv.DictReader(io.StringIO(text), **form)
        try:
            found = [(f"record {n}", row) for n, row in enumerate(rows, start=1)]
        except csv.Error as error:
            raise DataError(f"{path} line {rows.reader.line_num}: not CSV ({error})") from error
        for place, row in found:
            if None in row or None in row.values():
                raise DataError(f"{path} {place}: not as many fields as the header has columns")
    else:
        found = []
        for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand inside a string
            if line.strip():
                try:
                    found.append((f"line {number}", json.loads(line)))
                except json.JSONDecodeError as error:
                    where = f"{path} line {number}"
                    raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path} line {number}: cannot be read as JSON ({error})") from error
    for place, record in found:
        if not isinstance(record, dict):
            raise DataError(f"{path} {place}: a record is an object {{...}}, not {type(record).__name__}")
    return found


def text_of(record: dict, key: str, where: str) -> str:
    if key not in record:
        raise DataError(f"{where}: the key {key!r} is missing")
    if not isinstance(record[key], str):
        raise DataError(f"{where}: {key!r} must be text, not {type(record[key]).__name__}")
    return encodable(record[key].strip(), where)


def encodable(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: {text[:40]!r}… holds half of a surrogate pair, which is no character") from None
    return text


def prompt_of(record: dict, where: str) -> str:
    """`prompt`, or `instruction` with `input`; never empty."""
    key = "prompt" if "prompt" in record or "instruction" not in record else "instruction"
    prompt = text_of(record, key, where)
    if key == "instruction" and record.get("input"):
        prompt += "\n" + text_of(record, "input", where)
    if not prompt:
        raise DataError(f"{where}: {key!r} is empty")
    return prompt


def report_skipped(path: Path, skipped: dict[str, list[str]]) -> None:
    """One line, from one process: how many records were left out, why, and where the first stands."""
    said = [f"{len(places)} {what} (first: {places[0]})" for what, places in skipped.items() if places]
    if said and os.environ.get("RANK", "0") == "0":
        print(f"{path}: skipped {', '.join(said)}")


def fitting(problems, lengths, room, what, dist):
    """The problems that fit the context; says how many did not. Raises ConfigError if none does."""
    kept = [p for p, length in zip(problems, lengths, strict=True) if length <= room]
    if not kept:
        raise ConfigError(f"no {what} fits: the shortest has {min(lengths)} tokens, the room is {room}")
    if len(kept) < len(problems) and dist.is_main:
        print(f"{len(problems) - len(kept)} of {len(problems)} {what}s are longer than {room} tokens: left out")
    return kept
