"""Reading data files from any source: JSONL, JSON, CSV, TSV or plain text, optionally gzipped.

`scan` turns a file into plain dictionaries, each with its place in the file. `problem_fields`, `pair_fields`,
`judged_fields` and `review_fields` know the keys that public data sets use for a problem, a preference pair, a judged
answer and a review, and return the fields of data.Problem, data.Pair, data.Judged and data.Review. `read_problems`,
`read_pairs`, `read_judged` and `read_reviews` do both for a data set by name, or a path; `read_documents` reads plain
text. Whatever is wrong with a file is a DataError of one line that names it and the place.
"""

import csv
import gzip
import io
import json
import math
import os
import re
import zlib
from decimal import Decimal
from functools import partial
from itertools import count, islice
from pathlib import Path

from support.answers import NUMBER, extract_answer, last_line, same_answer, stated_answer
from support.downloads import DATASETS, data_folder, find, imdb_reviews, part_of, refuse
from support.errors import ConfigError, DataError

# -----------------------------------------------------------------------------------------------------------------
# From a file to plain dictionaries.


def file_kind(path: str | Path) -> str:
    """The ending of a file's name, such as ".csv", in small letters and without ".gz"."""
    return Path(Path(path).name.lower().removesuffix(".gz")).suffix


def read_text(path: Path, errors: str = "strict") -> str:
    """The text of a UTF-8 file, gzipped or not. Raises DataError. errors: "surrogateescape" keeps bytes that are not
    UTF-8, for `broken_byte` to find."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix.lower() == ".gz" else data
        text = data.decode("utf-8-sig", errors).replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}): convert it first") from error
    except (OSError, EOFError, zlib.error) as error:  # not gzip; cut off; damaged
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if not text.strip():
        raise DataError(f"{path} is empty")
    return text


def broken_byte(text: str, where: str) -> DataError | None:
    """The error if `read_text` met a byte that is not UTF-8 in this part of a file."""
    broken = re.search("[\udc80-\udcff]", text)
    if broken is None:
        return None
    byte = len(text[: broken.start()].encode())
    return DataError(f"{where} is not UTF-8 (byte {byte}): convert it first")


def read_all(path: Path, parse, skip_bad: bool) -> list:
    """parse(record, where) for each record of a file. skip_bad: records that cannot be read or for which parse raises
    DataError are counted and left out; DataError if none remains."""
    parsed, bad = [], []
    for place, record in scan(path):
        try:
            if isinstance(record, DataError):
                raise record
            parsed.append(parse(record, f"{path} {place}"))
        except DataError as error:
            if not skip_bad:
                raise
            bad.append(str(error).removeprefix(f"{path} "))
    if bad and not parsed:
        raise DataError(f"{path}: none of the {len(bad)} records can be used (first: {bad[0]})")
    report_skipped(path, {"records that cannot be used": bad})
    return parsed


def report_skipped(path: Path, skipped: dict[str, list[str]]) -> None:
    """Print one line, on rank 0: how many records were skipped, why, and the place of the first.
    skipped: {reason: places}."""
    counts = [f"{len(places)} {reason} (first: {places[0]})" for reason, places in skipped.items() if places]
    if counts and os.environ.get("RANK", "0") == "0":
        print(f"{path}: skipped {', '.join(counts)}")


def drop_too_long(records, lengths, max_tokens, label, dist):
    """The records of at most max_tokens tokens; prints how many are left out. ConfigError if none remains. label: what
    the messages call one record, such as "test prompt"."""
    kept = [record for record, length in zip(records, lengths, strict=True) if length <= max_tokens]
    if not kept:
        raise ConfigError(f"no {label} fits: the shortest has {min(lengths)} tokens, the limit is {max_tokens}")
    if len(kept) < len(records) and dist.is_main:
        dropped = len(records) - len(kept)
        print(f"{dropped} of {len(records)} {label}s are longer than {max_tokens} tokens: left out")
    return kept


def load_splits(load, sizes, length, max_tokens, label, dist):
    """{split: n} -> {split: the records of load(split, n) of at most max_tokens tokens, as length(record) counts them}.
    ConfigError if a split has none."""
    splits = {}
    for split, n in sizes.items():
        records = load(split, n)
        lengths = [length(record) for record in records]
        splits[split] = drop_too_long(records, lengths, max_tokens, f"{split} {label}", dist)
    return splits


def scan(path: Path):
    """Yields (place, record) for the records of a .jsonl, a .json, a .csv, or a .tsv (without quoting: a text may
    contain quotes but no tab); for one that cannot be read its DataError. place: "line 3" in JSON lines, "record 3" in
    the others, counted from 1. A .json holds one array, or JSON lines. The name may be in capitals, and may end in .gz.
    Raises DataError where nothing after it can be read: a damaged .gz, a broken array."""
    text, kind = read_text(path, "surrogateescape"), file_kind(path)
    parts = table_rows if kind in (".csv", ".tsv") else json_array if kind == ".json" else json_lines
    for place, record in parts(text, path):
        error = record if isinstance(record, DataError) else flaw(record, f"{path} {place}")
        yield place, error or record


def json_lines(text: str, path: Path):
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand inside a string
        if line.strip():
            place = f"line {number}"
            yield place, broken_byte(line, f"{path} {place}") or json_of(line, f"{path} {place}")


def json_of(line: str, where: str):
    """The value of a line of JSON, or a DataError."""
    try:
        return from_json(line)
    except json.JSONDecodeError as error:
        return DataError(f"{where}: not JSON ({error.msg} at column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        return DataError(f"{where}: cannot be read as JSON ({error})")


def without_repeats(pairs: list) -> dict:
    """An object of JSON; ValueError if a key stands in it twice, where it is not clear which is meant."""
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in an object")
    return record


from_json = json.JSONDecoder(object_pairs_hook=without_repeats).decode


def json_array(text: str, path: Path):
    try:
        records = from_json(text)
    except (ValueError, RecursionError) as error:
        first_lines = islice((line for line in text.split("\n") if line.strip()), 2)
        if any(isinstance(json_of(line, ""), dict) for line in first_lines):  # JSON lines: of two one may be broken
            yield from json_lines(text, path)
            return
        if isinstance(error, json.JSONDecodeError):
            problem = DataError(f"{path} line {error.lineno}: not JSON ({error.msg})")
        else:
            problem = DataError(f"{path}: cannot be read as JSON ({error})")
        raise broken_byte(text, f"{path}") or problem from None
    if error := broken_byte(text, f"{path}"):
        raise error
    if not isinstance(records, list):
        raise DataError(f"{path}: a .json file must hold an array of objects; or give one object a line in .jsonl")
    yield from ((f"record {number}", record) for number, record in enumerate(records, start=1))


def table_rows(text: str, path: Path):
    csv.field_size_limit(1 << 30)  # a text may be long
    dialect = {"strict": True} if file_kind(path) == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    rows = csv.DictReader(io.StringIO(text), **dialect)
    try:
        names = rows.fieldnames or ()
    except csv.Error as error:
        raise DataError(f"{path} line {rows.reader.line_num}: not CSV ({error})") from error
    if error := broken_byte("".join(names), f"{path} line 1"):
        raise error
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise DataError(f"{path} line 1: the column {twice[0]!r} stands twice: rename or remove one of them")
    for number in count(1):
        place, first = f"record {number}", rows.reader.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:  # a quote that is never closed takes the rest of the file with it
            last = rows.reader.line_num
            lines = f"line {last}" if first >= last else f"lines {first} to {last}"
            yield place, DataError(f"{path} {lines}: not CSV ({error})")
            continue
        if None in row or None in row.values():
            yield place, DataError(f"{path} {place}: not as many fields as the header has columns")
        else:
            yield place, broken_byte("".join(row.values()), f"{path} {place}") or row


def flaw(record, where: str) -> DataError | None:
    """The error if a record is no object, or holds a number that is none: NaN, Infinity, 1e999."""
    if not isinstance(record, dict):
        return DataError(f"{where}: a record is an object {{...}}, not {type(record).__name__}")
    values = list(record.items())
    for key, value in values:  # grows by what lists and objects hold
        if isinstance(value, float) and not math.isfinite(value):
            return DataError(f"{where}: {key!r} holds {value}, which is no number in JSON")
        if isinstance(value, dict):
            values += value.items()
        elif isinstance(value, list):
            values += ((key, item) for item in value)
    return None


def text_of(record: dict, key: str, where: str) -> str:
    """The text under a key as it stands, white space included; it may be empty."""
    if key not in record:
        raise DataError(f"{where}: the key {key!r} is missing")
    if not isinstance(record[key], str):
        raise DataError(f"{where}: {key!r} must be text, not {type(record[key]).__name__}")
    return encodable(record[key], where)


def encodable(text: str, where: str) -> str:
    """The text itself if UTF-8 can encode it, else DataError."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: {text[:40]!r}… holds half of a surrogate pair, which is no character") from None
    return text


def prompt_of(record: dict, where: str) -> str:
    """The prompt: `prompt`, or `instruction` followed by `input`. DataError if it is empty."""
    key = "prompt" if "prompt" in record or "instruction" not in record else "instruction"
    prompt = text_of(record, key, where)
    if key == "instruction" and record.get("input"):
        more = text_of(record, "input", where)
        prompt += "\n" + more if more.strip() else ""
    if not prompt.strip():
        raise DataError(f"{where}: {key!r} is empty")
    return prompt


# -----------------------------------------------------------------------------------------------------------------
# A record of a problem, in any of the known layouts -> the fields of data.Problem by name.


def problem_fields(record: dict, where: str, story: str) -> dict:
    """A record has one of these sets of keys:

    {"question", "answer"}              `answer` is the worked solution with its #### line, just a number, or free text
    {"question", "solution", "answer"}  `answer` is the number
    {"messages": [...]}                 a conversation, whose last turn is the assistant's: the solution
    {"prompt", "response", "rating"}    a response and its rating, 1 to 5
    {"instruction", "input", "output"}  `input` may be missing or empty

    Text is used as it stands, white space included. Exceptions: from the first two, GSM8K's calculator annotations
    `48/2=<<48/2=24>>24` are stripped (they were made for a calculator that overwrites the sampled tokens, and without
    one the model would write each result twice; "calls" keeps them, for agent.py), and nothing follows the #### line.

    A text states an answer in its last line alone: #### above it is a heading of Markdown. The first two layouts may
    say more around the number, `so it is #### 18 apples`, and are refused if it cannot be read. The last three are free
    text, and state an answer only where the last line is `#### 18` and the text has no other ####. What states none has
    the answer "": good enough for SFT, which judges it by token F1, but no verifier accepts it.
    """
    if "messages" in record:
        return conversation_fields(record["messages"], where, story)
    if "rating" in record or "response" in record:
        fields = plain_fields(prompt_of(record, where), text_of(record, "response", where), where, story)
        return fields | {"rating": rating_of(record, where)}
    if "instruction" in record:
        return plain_fields(prompt_of(record, where), text_of(record, "output", where), where, story)
    return worked_fields(record, where, story)


def worked_fields(record: dict, where: str, story: str) -> dict:
    """A question whose answer is a number. level: the number of calculator annotations in the solution, at least 1."""
    for key in ("question", "answer"):
        if key not in record:
            raise DataError(f"{where}: the key {key!r} is missing")
    texts = {}
    for key in ("question", "answer", *(["solution"] if "solution" in record else [])):
        value = record[key]
        if key == "answer" and (type(value) is int or (isinstance(value, float) and math.isfinite(value))):
            value = format(Decimal(str(value)), "f")  # extract_answer does not read 1e-05
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{where}: {key!r} must be text that is not empty")
        texts[key] = encodable(value, where)

    key = "solution" if "solution" in texts else "answer"
    solution, annotations = re.subn(r"<<[-+*/().,\d ]+=[-/.,\d ]+>>", "", texts[key])  # not `cout << x; cin >> y`
    if not solution.strip():
        raise DataError(f"{where}: {key!r} holds nothing but calculator annotations")
    given, level = texts["answer"].strip(), max(1, annotations)
    calls = texts[key].rstrip() if annotations else ""
    number, value = NUMBER.fullmatch(given), extract_answer(f"#### {given}")
    if "solution" in texts:
        if value is None:
            raise DataError(f"{where}: no single number in the answer {given!r}")
        if "####" not in solution:
            solution, calls = f"{solution.rstrip()}\n#### {value}", calls and f"{calls}\n#### {value}"
        elif "####" not in last_line(solution) and not same_answer(extract_answer(solution), value):
            raise DataError(f"{where}: #### stands above the last line of the solution, so no verifier can read it")
    elif number and not number[3]:  # just a number: "12 people came." is a text
        solution = f"#### {value}"
    elif "####" not in last_line(solution):
        return dict(question=texts["question"], solution=solution, answer="", level=level, story=story, calls=calls)
    solution = solution.rstrip()
    answer = extract_answer(solution)
    if answer is None:
        raise DataError(f"{where}: no single number after ####: {solution[-60:]!r}")
    if "solution" in texts and not same_answer(answer, value):
        raise DataError(f"{where}: the solution ends in {answer}, the answer says {given!r}")
    return dict(question=texts["question"], solution=solution, answer=answer, level=level, story=story, calls=calls)


def conversation_fields(turns, where: str, story: str) -> dict:
    """[{"role", "content"}, ...]: an optional system turn, then user and assistant in turn, the assistant last. An
    empty system turn is as if it were not there."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f"{where}: messages must be a list of {{role, content}}")
    roles, contents = ([turn.get(key) for turn in turns] for key in ("role", "content"))
    after_system = roles[1:] if roles[:1] == ["system"] else roles
    if not after_system or after_system != ["user", "assistant"] * (len(after_system) // 2):
        raise DataError(f"{where}: messages must be user and assistant in turn and end with the assistant, not {roles}")
    for number, (role, content) in enumerate(zip(roles, contents, strict=True), start=1):
        if not isinstance(content, str) or not (content.strip() or role == "system"):
            raise DataError(f"{where}: the content of message {number} must be text that is not empty")
    said = [(role, encodable(content, where)) for role, content in zip(roles, contents, strict=True) if content.strip()]
    *history, (_, question), (_, solution) = said
    return plain_fields(question, solution, where, story) | {"history": tuple(history)}


def plain_fields(question: str, solution: str, where: str, story: str) -> dict:
    """A problem whose solution is used unchanged."""
    if not solution.strip():
        raise DataError(f"{where}: the response is empty")
    return dict(question=question, solution=solution, answer=stated_answer(solution) or "", level=1, story=story)


def rating_of(record: dict, where: str) -> float:
    given = record.get("rating")
    try:
        rating = float(given)
    except (TypeError, ValueError, OverflowError):
        rating = None
    if rating is None or isinstance(given, bool):
        raise DataError(f"{where}: the rating is {given!r}, not a number from 1 to 5")
    if not 1 <= rating <= 5:
        raise DataError(f"{where}: the rating is {given}, it must be from 1 to 5")
    return rating


# -----------------------------------------------------------------------------------------------------------------
# A record of a preference pair -> the fields of data.Pair; a record of a review -> its text and label.


def pair_fields(record: dict, where: str, kind: str) -> dict:
    """A record with a prompt (as in `prompt_of`), "chosen" and "rejected"; the answers may be empty, the prompt may
    not. Or Anthropic's layout: no prompt, and in "chosen" and "rejected" two whole dialogues that differ in the
    assistant's last turn."""
    has_prompt = "prompt" in record or "instruction" in record
    if not has_prompt and str(record.get("chosen")).lstrip().startswith("Human:"):
        return dialogue_fields(record, where)
    if "label" in record and "chosen" not in record:
        raise DataError(f"{where}: no pair but one judged answer, which dpo.py reads with --variant kto")
    prompt = prompt_of(record, where)
    if kind == "ultrafeedback" and scored_alike(record, where):
        kind = "equal_scores"
    return dict(
        prompt=prompt, chosen=text_of(record, "chosen", where), rejected=text_of(record, "rejected", where), kind=kind
    )


def dialogue_fields(record: dict, where: str) -> dict:
    """A pair in Anthropic's layout: two dialogues of turns that begin with "Human: " and "Assistant: ", after an empty
    line."""
    dialogues = []
    for key in ("chosen", "rejected"):
        start, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text_of(record, key, where).lstrip())
        speakers, contents = parts[::2], [content.removeprefix(" ") for content in parts[1::2]]
        in_turn = speakers and speakers == ["Human", "Assistant"] * (len(speakers) // 2)
        if start or not in_turn or not all(content.strip() for content in contents[:-1]):
            raise DataError(f"{where}: {key!r} must be Human and Assistant in turn, the Assistant last, not {speakers}")
        roles = {"Human": "user", "Assistant": "assistant"}
        dialogues.append([(roles[speaker], content) for speaker, content in zip(speakers, contents, strict=True)])
    (*history, (_, prompt), (_, chosen)), (*_, (_, rejected)) = dialogues
    before = [[content.strip() for _, content in dialogue[:-1]] for dialogue in dialogues]
    if before[0] != before[1]:
        raise DataError(f"{where}: the dialogues differ before the assistant's last turn")
    return dict(prompt=prompt, chosen=chosen, rejected=rejected, kind="hh", history=tuple(history))


def scored_alike(record: dict, where: str) -> bool:
    """Whether UltraFeedback's judge gave both answers of a pair the same score."""
    scores = record.get("metadata") or {}
    if not isinstance(scores, dict):
        raise DataError(f"{where}: 'metadata' must be an object {{...}}, not {type(scores).__name__}")
    return scores.get("score_chosen") is not None and scores.get("score_chosen") == scores.get("score_rejected")


VERDICTS = {"true": True, "false": False, "1": True, "0": False, "good": True, "bad": False}
ANSWER_KEYS = ("completion", "answer", "response")


def judged_fields(record: dict, where: str) -> dict:
    """A record of one answer and whether it is good, the "label": true or false, 1 or 0, "good" or "bad". With a prompt
    (as in `prompt_of`) the answer is its "completion", "answer" or "response", which may be empty; prompt and
    completion may also be lists of {role, content}. Or "messages", whose last turn is the answer."""
    if "label" not in record:
        raise DataError(f"{where}: the key 'label' is missing: whether the answer is good, true or false")
    label = VERDICTS.get(str(record["label"]).strip().lower())
    if label is None:
        raise DataError(f"{where}: 'label' must be true or false, not {record['label']!r}")
    keys = [key for key in ANSWER_KEYS if key in record]
    turns = record.get("messages")
    if turns is None and len(keys) != 1:
        has = f"it has {' and '.join(keys)}" if keys else "it has none of them"
        raise DataError(f"{where}: the answer is the completion, answer or response, one of them; {has}")
    if turns is None and isinstance(record.get("prompt"), list) and isinstance(record[keys[0]], list):
        turns = record["prompt"] + record[keys[0]]
    if turns is None:
        return dict(prompt=prompt_of(record, where), answer=text_of(record, keys[0], where), good=label)
    fields = conversation_fields(turns, where, "file")
    return dict(prompt=fields["question"], answer=fields["solution"], good=label, history=fields["history"])


def holds_records(name: str) -> bool:
    """Whether a data set, or the file of this name, holds problems, and not plain text."""
    known = name in ("gsm8k", "instructions", "ratings")
    return known or file_kind(name) in (".jsonl", ".ndjson", ".json", ".csv", ".tsv")


def read_documents(name: str, split: str, skip_bad: bool) -> list[str]:
    """The documents of a split, "train" or "valid", of plain text: tinystories has one per story; any other file is
    one, of which the first 90 % of the characters is train. DataError with skip_bad, as it has no records."""
    refuse(name, "text for pretraining")
    if skip_bad:
        raise DataError(f"{name} is plain text, which has no records to skip: leave --skip_bad out")
    path = find(name, split)
    text = read_text(path)
    if name == "tinystories":
        return [story.strip("\n") for story in text.split("<|endoftext|>") if story.strip()]
    cut = len(text) * 9 // 10
    part = text[:cut] if split == "train" else text[cut:]
    if not part:
        raise DataError(f"{path} is too short to split: {len(text)} characters")
    return [part]


def read_problems(name: str, split: str, skip_bad: bool) -> list[dict]:
    """The fields of data.Problem, of each record of the file that a split is in (`part_of`). skip_bad: as for
    `read_all`."""
    refuse(name, "problems")
    parse = partial(problem_fields, story="gsm8k" if name == "gsm8k" else "file")
    return read_all(find(name, part_of(name, split)), parse, skip_bad)


def read_pairs(name: str, split: str, skip_bad: bool) -> list[dict]:
    """The same of pairs, the fields of data.Pair. Pairs that teach nothing (equal answers, or one that is empty) are
    left out and counted, in one printed line. White space alone is empty, but answers that differ in it differ."""
    refuse(name, "preference pairs")
    path, kind = find(name, part_of(name, split)), name if name in DATASETS else "file"
    records = read_all(path, lambda record, where: (where, pair_fields(record, where, kind)), skip_bad)
    return drop_useless(path, records, "pairs with an empty answer")


def read_judged(name: str, skip_bad: bool) -> list[dict]:
    """The same of a path of judged answers: the fields of data.Judged, or of data.Pair where a record is a pair."""
    path = find(name)

    def parse(record, where):
        is_pair = "chosen" in record or "rejected" in record
        return where, pair_fields(record, where, "file") if is_pair else judged_fields(record, where)

    return drop_useless(path, read_all(path, parse, skip_bad), "records with an empty answer")


def drop_useless(path: Path, records: list[tuple[str, dict]], empty_ones: str) -> list[dict]:
    """[(where, fields)] -> the fields without those of `read_pairs` that teach nothing."""
    kept, same, empty = [], [], []
    for where, fields in records:
        answers = [fields[key] for key in ("chosen", "rejected", "answer") if key in fields]
        if not all(answer.strip() for answer in answers):
            empty.append(where.removeprefix(f"{path} "))
        elif len(set(answers)) < len(answers):
            same.append(where.removeprefix(f"{path} "))
        else:
            kept.append(fields)
    report_skipped(path, {"pairs of equal answers": same, empty_ones: empty})
    return kept


LABELS = {"1": 1, "0": 0, "positive": 1, "negative": 0, "pos": 1, "neg": 0}


def review_fields(record: dict, where: str) -> tuple[str, int]:
    """{"text", "label"} -> the text, without white space around it, and 1 for a positive review, 0 for a negative
    one."""
    label = LABELS.get(str(record.get("label")).strip().lower())
    if label is None:
        raise DataError(f"{where}: 'label' must be 1 or 0, positive or negative, not {record.get('label')!r}")
    return text_of(record, "text", where).strip(), label


def read_reviews(name: str, split: str, skip_bad: bool) -> list[tuple[str, int]]:
    """The same of reviews, the text and the label of each. Where imdb's file is not there, it comes through Hugging
    Face's `datasets`."""
    refuse(name, "labelled texts")
    part = part_of(name, split)
    if name == "imdb" and not (data_folder() / DATASETS[name][part].path).is_file():
        return imdb_reviews(part, DATASETS[name][part])
    return read_all(find(name, part), review_fields, skip_bad)
