"""support/records.py and support/downloads.py: files of every form, foreign keys, what is wrong in one line."""

import contextlib
import csv
import gzip
import io
import json
import re
import sys
import types
import urllib.error
from dataclasses import replace

import pytest

from data import (
    Judged,
    Pair,
    Problem,
    load_judged,
    load_pairs,
    load_problems,
    load_reviews,
    load_text,
    rows_at,
    split_key,
)
from support import downloads, records, splits
from support.content import content_of
from support.errors import DataError


def problem_from(record, where, story):
    return Problem(**records.problem_fields(record, where, story))


def test_user_file(tmp_path):
    file = tmp_path / "own.jsonl"
    records = [
        {"question": "A?", "answer": "He has 1+1=<<1+1=2>>2 pens.\n#### 2"},
        {"question": "B?", "solution": "Two and two.", "answer": 4},
        {"question": "C?", "answer": "$1,200"},
        {"question": "D?", "answer": "Blue, I think."},
        {"question": "G?", "answer": "12 people came to the party."},
        {"question": "H?", "answer": "5 in each box.\n3 boxes hold 5 * 3 = 15, so fifteen."},
        {"messages": [{"role": "user", "content": "E?"}, {"role": "assistant", "content": "x\n#### 7"}]},
    ]
    records += [{"question": f"What is {i}?", "answer": f"#### {i}"} for i in range(100)]
    file.write_text("\n".join(json.dumps(record) for record in records) + "\n\n", encoding="utf-8")
    found = {split: load_problems(file, split) for split in splits.SPLITS}
    assert sum(len(part) for part in found.values()) == 107
    assert all(splits.split_of(problem.question) == split for split, part in found.items() for problem in part)
    by = {problem.question: problem for part in found.values() for problem in part}
    assert by["A?"].solution == "He has 1+1=2 pens.\n#### 2"
    assert (by["B?"].solution, by["B?"].answer) == ("Two and two.\n#### 4", "4")
    assert (by["C?"].solution, by["C?"].answer) == ("#### 1200", "1200")
    assert (by["D?"].solution, by["D?"].answer) == ("Blue, I think.", "")
    assert (by["G?"].solution, by["G?"].answer) == ("12 people came to the party.", "")
    assert (by["H?"].solution, by["H?"].answer) == ("5 in each box.\n3 boxes hold 5 * 3 = 15, so fifteen.", "")
    assert (by["E?"].answer, by["E?"].story) == ("7", "file")
    shifts = "cout << x; cin >> y;\nHe has 3+(4)=<<3+(4)=7>>7, half: <<7/2=3.5>>3.5 pens.\n#### 3.5"
    problem = problem_from({"question": "F?", "answer": shifts}, "", "")  # only what is an annotation goes
    assert problem.solution == "cout << x; cin >> y;\nHe has 3+(4)=7, half: 3.5 pens.\n#### 3.5"
    assert (problem.level, problem.answer) == (2, "3.5")
    assert problem.calls == shifts  # for agent.py
    assert problem == replace(problem, calls="")  # not a part of what the problem is
    assert content_of(problem) == content_of(replace(problem, calls=""))
    apart = problem_from({"question": "F?", "solution": "1+1=<<1+1=2>>2", "answer": 2}, "", "")
    assert (apart.solution, apart.calls) == ("1+1=2\n#### 2", "1+1=<<1+1=2>>2\n#### 2")
    assert by["B?"].calls == by["D?"].calls == by["E?"].calls == ""
    assert [problem_from({"question": "F?", "answer": x}, "", "").answer for x in (1e-05, 1e20, 2.5, 10**400)] == [
        "0.00001",
        "100000000000000000000",
        "2.5",
        "1" + "0" * 400,
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nonsense", "line 2: not JSON"),
        ("[1, 2]", "line 2: a record is an object"),
        ('{"question": "A \\ud83d?", "answer": "5"}', "half of a surrogate pair"),
        ('{"prompt": "p \\ud83d", "response": "r", "rating": 5}', "half of a surrogate pair"),
        ('{"question": "A?", "answer": ' + "9" * 5000 + "}", "line 2: cannot be read as JSON"),
        ("[" * 100_000, "line 2: cannot be read as JSON"),
        ('{"question": "A?"}', "line 2: the key 'answer' is missing"),
        ('{"answer": "5"}', "line 2: the key 'question' is missing"),
        ('{"question": "", "answer": "5"}', "line 2: 'question' must be text"),
        ('{"question": "A?", "answer": null}', "line 2: 'answer' must be text"),
        ('{"question": "A?", "answer": "#### 5 or 6"}', "line 2: no single number"),
        ('{"question": "A?", "answer": "<<1+1=2>>"}', "line 2: 'answer' holds nothing but calculator annotations"),
        ('{"question": "A?", "solution": "x", "answer": "many"}', "line 2: no single number"),
        ('{"question": "A?", "solution": "x\\n#### 3", "answer": "4"}', "line 2: the solution ends in 3"),
        ('{"messages": [{"role": "user", "content": "A?"}]}', "line 2: messages must be"),
        ('{"messages": "A?"}', "line 2: messages must be"),
        (
            '{"messages": [{"role": "user"}, {"role": "assistant", "content": "5"}]}',
            "line 2: the content of message 1 must",
        ),
    ],
)
def test_bad_records_name_the_line(tmp_path, line, message):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"question": "A?", "answer": "5"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        load_problems(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


class Reply(io.BytesIO):
    headers = {"Content-Length": "5"}  # noqa: RUF012


def test_download(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_DATA", str(tmp_path))
    file = tmp_path / "gsm8k/test.jsonl"

    def offline(url, timeout):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(downloads.urllib.request, "urlopen", offline)
    with pytest.raises(DataError, match=r"cannot download https://raw.*no route.*put the file at") as caught:
        downloads.find("gsm8k", "test")
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)

    asked = []
    monkeypatch.setattr(downloads.urllib.request, "urlopen", lambda url, timeout: asked.append(url) or Reply(b"hello"))
    with pytest.raises(DataError, match="has changed: sha256 2cf24d"):
        downloads.find("gsm8k", "test")
    assert not list(file.parent.iterdir())  # neither the file nor a part of it

    digest = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    monkeypatch.setitem(downloads.SHA256, "gsm8k/test.jsonl", digest)
    assert downloads.find("gsm8k", "test").read_text(encoding="utf-8") == "hello"
    assert list(file.parent.iterdir()) == [file]
    assert asked[-1].endswith("/grade_school_math/data/test.jsonl")

    file.unlink()
    monkeypatch.delitem(downloads.SHA256, "gsm8k/test.jsonl")
    monkeypatch.setattr(downloads.urllib.request, "urlopen", lambda url, timeout: Reply(b"hel"))
    with pytest.raises(DataError, match="3 of 5 bytes came"):  # the connection broke
        downloads.find("gsm8k", "test")
    assert not list(file.parent.iterdir())


def test_records_of_every_form_are_records_in_pretraining_too(tmp_path):
    rows = [{"question": f"What is {i}?", "answer": str(i)} for i in range(40)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    expected = load_text(tmp_path / "a.jsonl", "train")
    assert len(expected) > 20
    assert expected[0].startswith("What is ")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.tsv").write_text(
        "question\tanswer\n" + "".join(f"{r['question']}\t{r['answer']}\n" for r in rows), encoding="utf-8"
    )
    (tmp_path / "d.csv").write_text(
        "question,answer\n" + "".join(f"{r['question']},{r['answer']}\n" for r in rows), encoding="utf-8"
    )
    for name in ("b.jsonl.gz", "c.tsv", "d.csv"):
        assert load_text(tmp_path / name, "train") == expected


def test_a_file_where_the_folder_of_data_is_to_be(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ALIGN_DATA", str(tmp_path / "file"))
    monkeypatch.setattr(downloads.urllib.request, "urlopen", lambda *_, **__: pytest.fail("a download had begun"))
    with pytest.raises(DataError, match=r"gsm8k: cannot download .*put the file at .* by hand, or set ALIGN_DATA"):
        downloads.find("gsm8k")


def test_damaged_files_and_other_datasets_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_DATA", str(tmp_path))
    (tmp_path / "a.csv").write_text('question,answer\n"1 + 1? 2"x,2\n', encoding="utf-8")
    (tmp_path / "b.csv").write_text("question,answer\n" + "long " * 40_000 + ",2\n" * 1, encoding="utf-8")
    whole = gzip.compress(bytes(range(256)) * 50)
    (tmp_path / "c.jsonl.gz").write_bytes(whole[:30] + b"\xff" * 9 + whole[39:])
    for call, words in [
        (lambda: load_problems(tmp_path / "a.csv"), "line 2: not CSV"),
        (lambda: load_problems(tmp_path / "c.jsonl.gz"), "cannot read"),
        (lambda: load_problems("tinyshakespeare"), "has no problems: choose word"),
        (lambda: load_text("polarity"), "has no text for pretraining: choose word"),
    ]:
        with pytest.raises(DataError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    [(place, row)] = records.scan(tmp_path / "b.csv")
    assert (place, len(row["question"])) == ("record 1", 200_000)
    assert splits.split_of("half of a pair: \ud83d") in splits.SPLITS


# Conversations, instructions, ratings.


def turn(role, content):
    return {"role": role, "content": content}


def test_conversations(tmp_path):
    long = [turn("system", "Be brief.\n"), turn("user", "A?"), turn("assistant", "\tB."), turn("user", "? ")]
    long.append(turn("assistant", "#### Why\nBecause.\n"))
    short = [turn("user", "2 + 3?"), turn("assistant", "5")]
    path = write_pairs(tmp_path / "chats.jsonl", {"messages": long}, {"messages": short})
    found = []
    for split in splits.SPLITS:
        with contextlib.suppress(DataError):  # two records do not fill three splits
            found += load_problems(path, split)
    first, second = sorted(found, key=lambda problem: problem.question, reverse=True)
    assert (first.question, first.solution, first.answer) == ("? ", "#### Why\nBecause.\n", "")
    assert first.history == (("system", "Be brief.\n"), ("user", "A?"), ("assistant", "\tB."))
    assert (second.question, second.solution, second.history) == ("2 + 3?", "5", ())  # as it stands
    again = problem_from({"messages": long[1:]}, "x", "file")  # without the system turn, as in a file of pairs
    assert split_key(again) == split_key(first) == "A?"


def test_every_epoch_and_every_seed_has_its_own_order():
    first, second = (rows_at(20, epoch, 20, 0) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == [*range(20)]
    assert first != second
    assert rows_at(20, 0, 20, 1) != first


def test_a_conversation_is_in_one_split_with_each_that_begins_as_it_does(tmp_path):
    """SFT trains on every answer of a conversation, so no other may have one of them as its test."""
    rows = []
    for n in range(60):
        first = [turn("user", f"What is {n}?"), turn("assistant", f"It is {n}.")]
        rows += [{"messages": first}, {"messages": [*first, turn("user", "And?"), turn("assistant", f"More {n}.")]}]
    path = write_pairs(tmp_path / "chats.jsonl", *rows)
    trained = set()
    for problem in load_problems(path, "train"):
        trained |= {problem.solution, *(content for _, content in problem.history)}
    tested = [problem.solution for problem in load_problems(path, "test")]
    assert len(tested) > 4
    assert not trained & set(tested)


@pytest.mark.parametrize("content", ["", " \n"])
def test_an_empty_system_turn_is_as_if_it_were_not_there(content):
    rest = [turn("user", "A?"), turn("assistant", "B."), turn("user", "C?"), turn("assistant", "D.")]
    problem = problem_from({"messages": [turn("system", content), *rest]}, "", "file")
    assert problem == problem_from({"messages": rest}, "", "file")
    assert problem.history == (("user", "A?"), ("assistant", "B."))


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "must be user and assistant in turn"),
        ([turn("system", "s")], "must be user and assistant in turn"),
        ([turn("assistant", "a")], "must be user and assistant in turn"),
        ([turn("user", "a"), turn("user", "b"), turn("assistant", "c")], "must be user and assistant in turn"),
        ([turn("user", "a"), turn("assistant", "b"), turn("user", "c")], "end with the assistant"),
        ([turn("user", "a"), turn("assistant", " ")], "the content of message 2"),
        ([turn("system", ""), turn("user", ""), turn("assistant", "b")], "the content of message 2"),
        ([turn("system", None), turn("user", "a"), turn("assistant", "b")], "the content of message 1"),
        ([turn("user", 3), turn("assistant", "b")], "the content of message 1"),
        ([1, 2], "a list of {role, content}"),
    ],
)
def test_bad_conversations(turns, message):
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        problem_from({"messages": turns}, "f.jsonl line 9", "file")
    assert str(caught.value).startswith("f.jsonl line 9: ")


def test_ratings_in_csv_and_jsonl(tmp_path):
    rows = [{"prompt": f"ask {i}", "response": f'say "{i}",\nor not', "rating": 1 + i % 5} for i in range(80)]
    with open(tmp_path / "rated.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "response", "rating"])
        writer.writeheader()
        writer.writerows(rows)
    write_pairs(tmp_path / "rated.jsonl", *rows)
    for split in splits.SPLITS:
        problems = load_problems(tmp_path / "rated.csv", split)
        assert problems == load_problems(tmp_path / "rated.jsonl", split)
        for problem in problems:
            i = int(problem.question.split()[1])
            assert (problem.solution, problem.rating, problem.answer) == (rows[i]["response"], 1 + i % 5, "")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("p,r,6", "the rating is 6, it must be from 1 to 5"),
        ("p,r,0.5", "the rating is 0.5, it must"),
        ("p,r,nan", "the rating is nan, it must"),
        ("p,r,good", "the rating is 'good', not a number"),
        ("p,r,", "the rating is '', not a number"),
        ("p,r,1e999", "the rating is 1e999, it must"),
        ("p,,4", "the response is empty"),
        (",r,4", "'prompt' is empty"),
        ("p,r", "not as many fields"),
        ("p,r,4,5", "not as many fields"),
    ],
)
def test_bad_ratings_name_their_record(tmp_path, row, message):
    (tmp_path / "rated.csv").write_text(f"prompt,response,rating\np,r,5\n{row}\n", encoding="utf-8")
    with pytest.raises(DataError, match=re.escape(f"rated.csv record 2: {message}")):
        load_problems(tmp_path / "rated.csv")


def test_instructions(tmp_path):
    records = [{"instruction": f"do {i}", "input": "" if i % 2 else "x", "output": str(i)} for i in range(60)]
    (tmp_path / "all.json").write_text(json.dumps(records), encoding="utf-8")
    assert "do 7\n7" in load_text(tmp_path / "all.json") + load_text(tmp_path / "all.json", "valid")
    found = [problem for split in splits.SPLITS for problem in load_problems(tmp_path / "all.json", split)]
    assert {p.question for p in found} == {f"do {i}" + ("" if i % 2 else "\nx") for i in range(60)}
    assert all(p.solution == re.findall(r"\d+", p.question)[0] for p in found)


CODE = "    y = x\n    return y\n"
AS_IT_STANDS = ["cout << x; cin >> y;", "Use a << 2, then b >> 1.", "<<1+1=2>>", "1+1=<<1+1=2>>2", CODE]


@pytest.mark.parametrize("said", AS_IT_STANDS)
def test_whatever_is_no_worked_problem_is_taken_as_it_stands(said):
    for record in (
        {"instruction": "i", "output": said},
        {"prompt": "p", "response": said, "rating": 5},
        {"messages": [turn("user", "u"), turn("assistant", said)]},
    ):
        problem = problem_from(record, "", "file")
        assert (problem.solution, problem.level, problem.answer) == (said, 1, "")


def test_white_space_means_something(tmp_path, monkeypatch):
    asked = f"{CODE}\n?\n"
    problems = [
        problem_from(record, "", "file")
        for record in (
            {"question": asked, "answer": CODE},
            {"instruction": asked, "input": " \n", "output": CODE},
            {"messages": [turn("user", asked), turn("assistant", CODE)]},
        )
    ]
    assert all((problem.question, problem.solution) == (asked, CODE) for problem in problems)
    worked = problem_from({"question": "q", "answer": "  2 + 3 = 5\n#### 5\n"}, "", "file")
    assert worked.solution == "  2 + 3 = 5\n#### 5"  # nothing follows the line of the answer
    worked = problem_from({"question": "q", "solution": "  2 + 3 = 5\n", "answer": "5\n"}, "", "file")
    assert worked.solution == "  2 + 3 = 5\n#### 5"
    with pytest.raises(DataError, match="the response is empty"):
        problem_from({"instruction": asked, "output": " \n"}, "", "file")
    assert records.review_fields({"text": " Good.\n", "label": 1}, "") == ("Good.", 1)
    pair = records.pair_fields({"prompt": asked, "chosen": CODE, "rejected": CODE.strip()}, "", "file")
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == (asked, CODE, CODE.strip())
    start = "\n\nHuman:   Hi \n\nAssistant: \tHo\n\nHuman: x?\n\nAssistant:"
    spaced = f" {start.replace('Hi ', 'Hi')}{CODE}"  # before the answers it makes no difference
    pair = records.pair_fields({"chosen": f"{start} {CODE}", "rejected": spaced}, "", "hh")
    assert (pair["chosen"], pair["rejected"]) == (CODE, CODE[1:])  # one blank belongs to the speaker's name
    assert pair["history"] == (("user", "  Hi "), ("assistant", "\tHo"))
    monkeypatch.setenv("ALIGN_DATA", str(tmp_path))
    (tmp_path / "tinystories").mkdir()
    (tmp_path / "tinystories/train.txt").write_text(f"{CODE}<|endoftext|>\n  B. \n<|endoftext|>\n \n", encoding="utf-8")
    assert load_text("tinystories") == [CODE.rstrip("\n"), "  B. "]
    (tmp_path / "code.txt").write_text(CODE * 10, encoding="utf-8")
    assert "".join(load_text(tmp_path / "code.txt", split)[0] for split in ("train", "valid")) == CODE * 10


def test_pairs_may_differ_in_white_space_alone(tmp_path):
    path = write_pairs(tmp_path / "p.jsonl", *[pair_record(f"p{i}", CODE, CODE.lstrip()) for i in range(30)])
    assert all((p.chosen, p.rejected) == (CODE, CODE.lstrip()) for p in load_pairs(path))


LAYOUTS = [
    lambda text: {"question": "How?", "answer": text},
    lambda text: {"instruction": "How?", "output": text},
    lambda text: {"prompt": "How?", "response": text, "rating": 5},
    lambda text: {"messages": [turn("user", "How?"), turn("assistant", text)]},
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 1. Shape\nIt is round.", ""),
        ("#### 1. Shape\nIt is round.\n#### 2. Size\nIt is big.\n", ""),
        ("#### Why\nBecause.", ""),
        ("It is #### 5\nor so.", ""),
        ("2 + 3 = 5\n#### 5", "5"),
        ("2 + 3 = 5\n#### 5\n\n", "5"),
    ],
)
def test_a_heading_is_no_answer(layout, text, answer):
    assert problem_from(layout(text), "", "file").answer == answer


def test_a_worked_solution_says_more_around_its_number():
    for text in ("so it is #### 18", "So:\n#### 18 apples", "18", "€18"):
        assert problem_from({"question": "q", "answer": text}, "", "file").answer == "18"
    for text in ("so it is #### 18", "So:\n#### 18 apples", "18"):
        assert [problem_from(layout(text), "", "file").answer for layout in LAYOUTS[1:]] == [""] * 3
    area = problem_from({"question": "q", "solution": "6 * 3", "answer": "18 m²"}, "", "file")
    assert (area.solution, area.answer) == ("6 * 3\n#### 18", "18")
    headed = {"question": "q", "solution": "#### 1. Add\n2 + 3", "answer": 5}
    with pytest.raises(DataError, match="l 1: #### stands above the last line of the solution"):
        problem_from(headed, "l 1", "file")


def test_bad_records_are_counted_and_left_out_where_asked(tmp_path, capsys):
    rows = [f"p{i},r{i},{3 if i % 20 else 7}" for i in range(100)]
    path = tmp_path / "rated.csv"
    path.write_text("\n".join(["prompt,response,rating", *rows, "p,,4"]) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="record 1: the rating is 7"):
        load_problems(path, "train")
    kept = [p for split in splits.SPLITS for p in load_problems(path, split, skip_bad=True)]
    assert len(kept) == 95
    assert all(p.rating == 3 for p in kept)
    said = capsys.readouterr().out.splitlines()
    line = "rated.csv: skipped 6 records that cannot be used (first: record 1: the rating is 7, it must be from 1 to 5)"
    assert len(said) == 3
    assert all(s.endswith(line) for s in said)
    with pytest.raises(DataError, match="record 1: the rating is 7"):
        load_text(path, "train")
    texts = [text for split in ("train", "valid") for text in load_text(path, split, skip_bad=True)]
    assert sorted(texts) == sorted(f"{p.question}\n{p.solution}" for p in kept if splits.split_of(p.question) != "test")

    path = write_pairs(tmp_path / "pairs.jsonl", *[pair_record(f"prompt {i}") for i in range(100)], {"prompt": "p"})
    with pytest.raises(DataError, match="line 101"):
        load_pairs(path, "train")
    assert sum(len(load_pairs(path, split, skip_bad=True)) for split in splits.SPLITS) == 100
    assert "skipped 1 records that cannot be used (first: line 101: the key" in capsys.readouterr().out


def test_plain_text_has_no_records_to_skip(tmp_path):
    (tmp_path / "a.txt").write_text("one text. " * 20, encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.txt is plain text, which has no records to skip: leave --skip_bad out"):
        load_text(tmp_path / "a.txt", skip_bad=True)


def all_of(load, path, **options):
    """What is read of a file, in all splits."""
    return [record for split in splits.SPLITS for record in load(path, split, **options)]


BAD_LINES = [
    (b'{"question": "cut", "prompt"', "not JSON"),
    (b"[1, 2]", "a record is an object"),
    (b'{"question": "caf\xe9", "answer": "5"}', "is not UTF-8 (byte 17)"),
    ('{"question": "é'.encode() + b'\xff"}', "is not UTF-8 (byte 16)"),
    (b'{"question": "x", "answer": NaN}', "'answer' holds nan"),
    (b'{"question": "x", "answer": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
    (b"[" * 100_000, "cannot be read as JSON"),
    (b'{"prompt": "p", "chosen": "a", "rejected": "b", "chosen": "c"}', "the key 'chosen' stands twice"),
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
@pytest.mark.parametrize("at", [0, 40, 100])
@pytest.mark.parametrize(("bad", "why"), BAD_LINES)
def test_a_line_that_cannot_be_read_is_counted_and_left_out(tmp_path, capsys, name, at, bad, why):
    both = {"prompt": "p", "chosen": "a", "rejected": "b", "text": "t", "label": 1}
    lines = [json.dumps(both | {"prompt": f"p{i}", "text": f"review {i}", "label": i % 2}).encode() for i in range(100)]
    lines[at:at] = [bad]
    content, path = b"\n".join(lines), tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    for load in (load_pairs, load_reviews):
        with pytest.raises(DataError, match=re.escape(f"{name} line {at + 1}")) as caught:
            load(path)
        assert why in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(all_of(load, path, skip_bad=True)) == 100
        out = capsys.readouterr().out
        assert f"{name}: skipped 1 records that cannot be used (first: line {at + 1}" in out
        assert why in out


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (b"q,3,4", "record 31: not as many fields"),
        (b"q", "record 31: not as many fields"),
        (b"caf\xe9,3", "record 31 is not UTF-8 (byte 3)"),
        (b'"q"x,3', "line 32: not CSV"),
    ],
)
def test_a_row_that_cannot_be_read_is_counted_and_left_out(tmp_path, capsys, row, why):
    rows = [b"What is %d?,%d" % (i, i) for i in range(60)]
    path = tmp_path / "a.csv"
    path.write_bytes(b"\n".join([b"question,answer", *rows[:30], row, *rows[30:]]))
    with pytest.raises(DataError, match=re.escape(f"a.csv {why}")):
        load_problems(path)
    assert sorted(int(p.answer) for p in all_of(load_problems, path, skip_bad=True)) == [*range(60)]
    assert f"a.csv: skipped 1 records that cannot be used (first: {why}" in capsys.readouterr().out
    path.write_bytes(b"\n".join([b"question,answer", *rows, b'"cut in\na text']))
    with pytest.raises(DataError, match=r"a\.csv lines 62 to 63: not CSV"):
        load_problems(path)
    assert len(all_of(load_problems, path, skip_bad=True)) == 60
    assert "(first: lines 62 to 63: not CSV (unexpected end of data))" in capsys.readouterr().out


def test_what_no_skipping_saves(tmp_path):
    rows = [{"question": f"What is {i}?", "answer": i} for i in range(60)]
    text = json.dumps(rows, indent=1)
    (tmp_path / "cut.json").write_text(text[:-9], encoding="utf-8")
    (tmp_path / "latin.json").write_bytes(text.replace("What", "Caf\xe9", 1).encode("latin-1"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode())[:-20])
    (tmp_path / "none.jsonl").write_text("one\ntwo\n", encoding="utf-8")
    (tmp_path / "heading.csv").write_bytes(b"question,answer,caf\xe9\n1,2,3\n")
    (tmp_path / "twice.csv").write_text("question,answer,,answer,\n1,2,,3,\n", encoding="utf-8")
    (tmp_path / "twice.json").write_text('[{"question": "q", "answer": "1", "answer": "2"}]', encoding="utf-8")
    for name, message in [
        ("cut.json", "cut.json line 240: not JSON"),
        ("latin.json", "latin.json is not UTF-8 (byte "),
        ("cut.jsonl.gz", "cannot read"),
        ("none.jsonl", "none.jsonl: none of the 2 records can be used (first: line 1: not JSON"),
        ("heading.csv", "heading.csv line 1 is not UTF-8"),
        ("twice.csv", "twice.csv line 1: the column 'answer' stands twice"),
        ("twice.json", "twice.json: cannot be read as JSON (the key 'answer' stands twice in an object)"),
    ]:
        with pytest.raises(DataError, match=re.escape(message)) as caught:
            load_problems(tmp_path / name, skip_bad=True)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize(
    "record",
    [
        '{"question": "How many?", "answer": VALUE}',
        '{"prompt": "p", "response": "r", "rating": VALUE}',
        '{"question": "How many?", "answer": "5", "more": [1, {"score": VALUE}]}',
    ],
)
def test_a_number_that_is_none_names_its_record(tmp_path, value, record):
    good = json.dumps({"question": "A?", "answer": "5"})
    for name, text, place in [
        ("a.jsonl", f"{good}\n%s\n", "line 2"),
        ("a.json", f"[{good},\n\n%s]", "record 2"),
    ]:
        (tmp_path / name).write_text(text % record.replace("VALUE", value), encoding="utf-8")
        with pytest.raises(DataError, match=rf"{name} {place}: '\w+' holds -?(nan|inf), which is no number in JSON"):
            load_problems(tmp_path / name)


def test_truth_is_no_number():
    for rated in (True, float("nan"), None):
        with pytest.raises(DataError, match=f"the rating is {rated}"):
            problem_from({"prompt": "p", "response": "r", "rating": rated}, "w", "file")
    for answer in (True, None, float("inf")):
        with pytest.raises(DataError, match="'answer' must be text"):
            problem_from({"question": "q", "answer": answer}, "w", "file")


def test_the_ending_of_a_name_may_be_in_capitals(tmp_path):
    rows = [(f"What is {i}?", str(i)) for i in range(60)]
    objects = [{"question": q, "answer": a} for q, a in rows]
    lines = "\n".join(map(json.dumps, objects))
    texts = {
        "jsonl": lines,
        "ndjson": lines,
        "json": json.dumps(objects),
        "csv": "question,answer\n" + "\n".join(map(",".join, rows)),
        "tsv": "question\tanswer\n" + "\n".join(map("\t".join, rows)),
    }
    for kind, text in texts.items():
        for name in (f"a.{kind}", f"b.{kind.upper()}", f"c.{kind.upper()}.GZ", f"d.{kind.title()}.gz"):
            content = text.encode()
            (tmp_path / name).write_bytes(gzip.compress(content) if name.lower().endswith("gz") else content)
            assert len(all_of(load_problems, tmp_path / name)) == 60
            assert load_text(tmp_path / name)[0].startswith("What is ")  # records, not one long text


def test_json_lines_in_a_file_called_json(tmp_path):
    path = write_pairs(tmp_path / "lines.json", *[{"question": f"{i} + 1?", "answer": i + 1} for i in range(60)])
    assert len(all_of(load_problems, path)) == 60
    with path.open("a", encoding="utf-8") as file:
        file.write("\nnonsense")
    with pytest.raises(DataError, match=r"lines\.json line 61: not JSON"):
        load_problems(path)
    for one in ('{"question": "A?", "answer": 1}', '{"data":\n[\n{"question": "A?", "answer": 1}\n]\n}'):
        path.write_text(one, encoding="utf-8")
        with pytest.raises(DataError, match="must hold an array of objects"):
            load_problems(path)


# Preference pairs.


def write_pairs(path, *records):
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


def pair_record(prompt, chosen="good", rejected="bad"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_pairs_of_dialogues(tmp_path, monkeypatch):
    """Anthropic's transcripts, by name, from a file that stands where the download would."""
    monkeypatch.setenv("ALIGN_DATA", str(tmp_path))
    one = {"chosen": "\n\nHuman: Is it 2?\n\nAssistant: Yes.", "rejected": "\n\nHuman: Is it 2?\n\nAssistant: No: 3."}
    start = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nNice day.\n\nHuman: Human: what?\n\nAssistant:"
    long = {"chosen": start + " A human.", "rejected": start + " Who knows?"}
    (tmp_path / "preferences").mkdir()
    with gzip.open(tmp_path / "preferences/hh_helpful_test.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in (one, long))
    short, deep = load_pairs("hh", "test")
    assert (short.prompt, short.chosen, short.rejected, short.kind) == ("Is it 2?", "Yes.", "No: 3.", "hh")
    assert short.history == ()
    assert (deep.prompt, deep.chosen, deep.rejected) == ("Human: what?", "A human.", "Who knows?")
    assert deep.history == (("user", "Hi"), ("assistant", "Hello.\n\nNice day."))
    bad = [
        {"chosen": start + " x", "rejected": one["rejected"]},
        {"chosen": start + " x\n\nHuman: more", "rejected": start + " y"},
        {"chosen": "\n\nHuman:  \n\nAssistant: x", "rejected": "\n\nHuman:  \n\nAssistant: y"},
        {"chosen": one["chosen"], "rejected": f"Well.{one['rejected']}"},
        {"chosen": one["chosen"], "rejected": ""},
    ]
    messages = ("differ before", "the Assistant last", "must be Human", "must be", "'rejected' must be Human")
    for record, message in zip(bad, messages, strict=True):
        with pytest.raises(DataError, match=f"line 1: .*{message}"):
            load_pairs(write_pairs(tmp_path / "bad.jsonl", record), "train")


def test_what_has_a_prompt_is_no_dialogue(tmp_path):
    answers = {"chosen": "Human: the speaker", "rejected": "robot"}
    for key in ("prompt", "instruction"):
        pair = Pair(**records.pair_fields({key: "Name a role", **answers}, "", "file"))
        assert pair == Pair("Name a role", "Human: the speaker", "robot", "file")


def test_the_first_question_of_a_dialogue_decides_its_split(tmp_path):
    ask = [f"\n\nHuman: {i}\n\nAssistant: ok\n\nHuman: same\n\nAssistant:" for i in range(60)]
    path = write_pairs(tmp_path / "d.jsonl", *[{"chosen": f"{a} yes", "rejected": f"{a} no"} for a in ask])
    for split in splits.SPLITS:
        assert {p.history[0][1] for p in load_pairs(path, split)} == {
            str(i) for i in range(60) if splits.split_of(str(i)) == split
        }


def test_pairs_of_a_file(tmp_path, capsys):
    records = [pair_record(f"prompt {i}") for i in range(100)]
    records[3] |= {"rejected": "good"}
    records[5] |= {"chosen": "  "}
    records[8] |= {"rejected": ""}
    records[9] |= {"rejected": "\n"}
    path = write_pairs(tmp_path / "pairs.jsonl", *records)
    found = {split: load_pairs(path, split) for split in splits.SPLITS}
    said = capsys.readouterr().out.splitlines()
    line = "pairs.jsonl: skipped 1 pairs of equal answers (first: line 4), 3 pairs with an empty answer "
    assert len(said) == 3
    assert all(f"{line}(first: line 6)" in s for s in said)
    for split, pairs in found.items():
        assert pairs
        assert all(splits.split_of(pair.prompt) == split for pair in pairs)
        assert all((pair.chosen, pair.rejected, pair.kind) == ("good", "bad", "file") for pair in pairs)
    assert sum(map(len, found.values())) == 96
    assert load_pairs(path, "train", 5) == found["train"][:5]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "p", "chosen": "a"}, "the key 'rejected' is missing"),
        ({"prompt": "p", "chosen": "a", "rejected": ["b"]}, "'rejected' must be text, not list"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "'prompt' is empty"),
        ({"chosen": "a", "rejected": "b"}, "the key 'prompt' is missing"),
        ([1], "a record is an object {...}, not list"),
        ({"prompt": "p", "completion": "a", "label": True}, "no pair but one judged answer, which dpo.py reads with"),
    ],
)
def test_bad_pairs_name_their_record(tmp_path, record, message):
    path = write_pairs(tmp_path / "pairs.jsonl", pair_record("p"), record)
    with pytest.raises(DataError, match=re.escape(f"pairs.jsonl line 2: {message}")):
        load_pairs(path)


def test_scores_that_cannot_be_read_name_their_record(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_DATA", str(tmp_path))
    (tmp_path / "preferences").mkdir()
    path = tmp_path / "preferences/ultrafeedback_test.jsonl"
    write_pairs(path, pair_record("p"), pair_record("q") | {"metadata": {"score_chosen": 4, "score_rejected": 4}})
    assert [pair.kind for pair in load_pairs("ultrafeedback", "test")] == ["ultrafeedback", "equal_scores"]
    write_pairs(path, pair_record("p"), pair_record("q") | {"metadata": "score_chosen: 4"})
    with pytest.raises(DataError, match=r"line 2: 'metadata' must be an object \{\.\.\.\}, not str"):
        load_pairs("ultrafeedback", "test")


def test_pairs_that_are_not_there(tmp_path):
    (tmp_path / "cut.jsonl").write_text('{"prompt": "p",', encoding="utf-8")
    with pytest.raises(DataError, match="line 1: not JSON"):
        load_pairs(tmp_path / "cut.jsonl")
    with pytest.raises(DataError, match="gsm8k has no preference pairs"):
        load_pairs("gsm8k")
    one = write_pairs(tmp_path / "one.jsonl", pair_record("p"))
    other = next(split for split in splits.SPLITS if split != splits.split_of("p"))
    with pytest.raises(DataError, match=f"no pair in the split {other}"):
        load_pairs(one, other)


def test_style_pairs_read_an_array(tmp_path, monkeypatch):
    records = [{"instruction": f"say {i}", "input": "x" * (i % 2), "chosen": "a", "rejected": "b"} for i in range(60)]
    (tmp_path / "preferences").mkdir()
    (tmp_path / "preferences/short_style_preferences.json").write_text(json.dumps(records), encoding="utf-8")
    monkeypatch.setenv("ALIGN_DATA", str(tmp_path))
    prompts = [pair.prompt for split in splits.SPLITS for pair in load_pairs("style", split)]
    assert sorted(prompts) == sorted(f"say {i}" + "\nx" * (i % 2) for i in range(60))


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl", "a.json", "a.tsv.gz", "a.jsonl.gz"])
def test_reviews_of_a_file(tmp_path, name):
    reviews = [(f'review {i} with "quotes, and commas"', i % 2) for i in range(60)]
    kind = name.split(".")[1]
    if kind == "tsv":
        text = "text\tlabel\n" + "".join(f"{t}\t{label}\n" for t, label in reviews)
    elif kind == "csv":
        file = io.StringIO()
        csv.writer(file).writerows([("label", "text"), *((("negative", "positive")[n], t) for t, n in reviews)])
        text = file.getvalue()
    else:
        rows = [json.dumps({"text": t, "label": label, "id": "x"}) for t, label in reviews]
        text = "\n".join(rows) if kind == "jsonl" else f"[{','.join(rows)}]"
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    parts = {split: load_reviews(path, split) for split in splits.SPLITS}
    assert sorted(r for part in parts.values() for r in part) == sorted(reviews)
    assert all(splits.split_of(r.text) == split for split, part in parts.items() for r in part)


def test_bad_reviews_name_their_record(tmp_path):
    path = tmp_path / "a.jsonl"
    good = "".join(json.dumps({"text": f"text {i}", "label": i % 2}) + "\n" for i in range(40))
    for line, message in [
        ({"text": "x", "label": 2}, "line 41: 'label' must be 1 or 0, positive or negative, not 2"),
        ({"text": "x"}, "line 41: 'label' must be"),
        ({"label": 1}, "line 41: the key 'text' is missing"),
        ({"text": 5, "label": 1}, "line 41: 'text' must be text"),
    ]:
        path.write_text(good + json.dumps(line), encoding="utf-8")
        with pytest.raises(DataError, match=message):
            load_reviews(path)
    path.write_text(good.replace('"label": 0', '"label": 1'), encoding="utf-8")
    with pytest.raises(DataError, match="the split train needs texts of both labels"):
        load_reviews(path)
    (tmp_path / "b.tsv.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"cannot read .*Not a gzipped file"):
        load_reviews(tmp_path / "b.tsv.gz")
    (tmp_path / "b.tsv.gz").write_bytes(gzip.compress(good.encode())[:60])
    with pytest.raises(DataError, match=r"cannot read .*ended before"):
        load_reviews(tmp_path / "b.tsv.gz")
    with pytest.raises(DataError, match="unknown split"):
        load_reviews("sentiment", "dev")


def test_imdb_from_the_folder_or_from_datasets_or_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_DATA", str(tmp_path))
    rows = [{"text": f"film {i}<br />end", "label": i % 2} for i in range(50)]
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return rows

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    parts = {split: load_reviews("imdb", split) for split in splits.SPLITS}
    assert asked == [("stanfordnlp/imdb", part) for part in ("train", "train", "test")]
    assert len(parts["train"]) + len(parts["valid"]) == len(parts["test"]) == 50
    assert not set(parts["train"]) & set(parts["valid"])
    assert parts["test"][0] == ("film 0\nend", 0)

    def fail(name, split):
        raise ConnectionError("no network\nhere")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=fail))
    with pytest.raises(DataError, match=r"the download failed \(ConnectionError: no network here\)"):
        load_reviews("imdb")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="no package to download it: pip install"):
        load_reviews("imdb")
    (tmp_path / "sentiment").mkdir()
    lines = "".join(json.dumps({"text": f"mine {i}", "label": i % 2}) + "\n" for i in range(9))
    (tmp_path / "sentiment/imdb_test.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert len(load_reviews("imdb", "test")) == 9
    with pytest.raises(DataError, match=r"polarity: no .*this dataset has no automatic download"):
        load_reviews("polarity")


# ------------------------------------------------------------------------------------------------ judged answers


def test_judged_answers_in_every_layout(tmp_path):
    """One answer and its label: TRL's layout, as text and as conversations; other keys; messages; the two of a pair."""
    turn = {"role": "user", "content": "before"}, {"role": "assistant", "content": "so"}
    history = (("user", "before"), ("assistant", "so"))
    rows = []
    for i in range(40):
        prompt, good = f"p{i}", i % 2 == 0
        rows += [
            ({"prompt": prompt, "completion": "c", "label": good}, Judged(prompt, "c", good)),
            ({"instruction": prompt, "response": "r", "label": int(good)}, Judged(prompt, "r", good)),
            ({"prompt": prompt, "answer": "a", "label": ("bad", "Good")[good]}, Judged(prompt, "a", good)),
        ]
        asked = [*turn, {"role": "user", "content": prompt}]
        said = [{"role": "assistant", "content": "m"}]
        rows += [
            ({"prompt": asked, "completion": said, "label": good}, Judged(prompt, "m", good, history)),
            ({"messages": asked + said, "label": good}, Judged(prompt, "m", good, history)),
        ]
    path = tmp_path / "judged.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record, _ in rows), encoding="utf-8")
    assert sorted(all_of(load_judged, path), key=str) == sorted((judged for _, judged in rows), key=str)
    train = load_judged(path, "train")
    assert all(splits.split_of(split_key(judged)) == "train" for judged in train)
    assert load_judged(path, "train", 3) == train[:3]
    pairs = write_pairs(tmp_path / "pairs.jsonl", *(pair_record(f"p{i}") for i in range(60)))
    both = all_of(load_judged, pairs)
    assert [j.answer for j in both] == ["good", "bad"] * 60
    assert [j.good for j in both] == [True, False] * 60
    assert load_judged("word", "valid", 3, levels=(1,))[:2] == load_pairs("word", "valid", 1, levels=(1,))[0].judged


def test_judged_answers_of_a_table(tmp_path):
    """As pandas writes them: True and False."""
    path = tmp_path / "judged.csv"
    path.write_text(
        "prompt,completion,label\n" + "".join(f'"p {i}, or?",c{i},{i % 3 == 0}\n' for i in range(60)), encoding="utf-8"
    )
    assert sorted((j.prompt, j.answer, j.good) for j in all_of(load_judged, path)) == sorted(
        (f"p {i}, or?", f"c{i}", i % 3 == 0) for i in range(60)
    )


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "p", "completion": "a"}, "the key 'label' is missing: whether the answer is good, true or false"),
        ({"prompt": "p", "completion": "a", "label": "maybe"}, "'label' must be true or false, not 'maybe'"),
        ({"prompt": "p", "completion": "a", "label": None}, "'label' must be true or false, not None"),
        ({"prompt": "p", "completion": "a", "label": 2}, "'label' must be true or false, not 2"),
        ({"prompt": "p", "label": True}, "the answer is the completion, answer or response, one of them; it has none"),
        ({"prompt": "p", "answer": "a", "response": "b", "label": True}, "the answer is the completion, answer or res"),
        ({"completion": "a", "label": True}, "the key 'prompt' is missing"),
        ({"prompt": "p", "completion": 3, "label": True}, "'completion' must be text, not int"),
        ({"prompt": " ", "completion": "a", "label": True}, "'prompt' is empty"),
        ({"prompt": [{"role": "user", "content": "p"}], "completion": "a", "label": True}, "'prompt' must be text"),
        (
            {"messages": [{"role": "user", "content": "p"}], "label": True},
            "messages must be user and assistant in turn",
        ),
        ({"prompt": "p", "chosen": "a", "label": True}, "the key 'rejected' is missing"),
    ],
)
def test_bad_judged_answers_name_their_record(tmp_path, record, message, capsys):
    rows = [
        {"prompt": f"p{i}", "completion": "", "label": True} | ({"completion": "a"} if i else {}) for i in range(40)
    ]
    path = tmp_path / "judged.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, record]), encoding="utf-8")
    with pytest.raises(DataError, match=re.escape(f"judged.jsonl line 41: {message}")):
        load_judged(path)
    assert len(all_of(load_judged, path, skip_bad=True)) == 39
    printed = capsys.readouterr().out
    assert f"skipped 1 records that cannot be used (first: line 41: {message}" in printed
    assert "skipped 1 records with an empty answer (first: line 1)" in printed


def test_judged_answers_that_are_not_there(tmp_path):
    (tmp_path / "one.jsonl").write_text('{"prompt": "p", "completion": "a", "label": true}', encoding="utf-8")
    other = next(split for split in splits.SPLITS if split != splits.split_of("p"))
    with pytest.raises(DataError, match=f"no answer in the split {other}"):
        load_judged(tmp_path / "one.jsonl", other)
    with pytest.raises(DataError, match="gsm8k has no preference pairs"):
        load_judged("gsm8k")
    with pytest.raises(DataError, match="no such file"):
        load_judged("nothing.jsonl")
