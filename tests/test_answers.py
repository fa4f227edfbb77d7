"""support/answers.py: what answer a text commits to, and when two are the same."""

import re
import time
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.answers import extract_answer, same_answer, stated_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 18", "18"),
        ("####18", "18"),
        ("Tom has 5 + 3 = 8 apples.\n#### 8", "8"),
        ("#### 8\nand more 9 text", "8"),
        ("#### 8\r\n", "8"),
        ("#### 1,234", "1234"),
        ("#### 1,234,567.50", "1234567.5"),
        ("#### $5.", "5"),
        ("#### 50%", "50"),
        ("#### -7", "-7"),
        ("#### - 7", "-7"),
        ("#### −7", "-7"),
        ("#### -$7", "-7"),
        ("#### $-7", "-7"),
        ("#### .5", "0.5"),
        ("#### -.5", "-0.5"),
        ("#### 3.50", "3.5"),
        ("#### 18.0", "18"),
        ("#### -0", "0"),
        ("#### -0.00", "0"),
        ("#### 007", "7"),
        ("#### 100", "100"),
        ("#### 18 apples", "18"),
        ("#### $1,234.50 per day.", "1234.5"),
        ("#### 18 m²", "18"),
        ("#### 18 m³/s.", "18"),
        ("#### 18 ①", "18"),
        ("#### 18 第三", "18"),
        ("#### 18 ٤", "18"),
        ("#### 18 %", "18"),
        ("#### 18°", "18"),
        ("#### 18 °C", "18"),
        ("#### 18°F.", "18"),
        ("#### €18", "18"),
        ("#### -£18.50 each", "-18.5"),
        ("#### 18€", "18"),
        ("#### 18。", "18"),
        ("#### ¥ 18", "18"),
        ("#### -￥18", "-18"),
        ("#### ¥-18", "-18"),
        ("#### 5\n#### 5", "5"),
        ("#### 5 #### 5.0", "5"),
        ("#### 12345678901234567890123456789012345678901", "12345678901234567890123456789012345678901"),
        (r"so it is \boxed{18}.", "18"),
        (r"so it is $\boxed{-18.50}$", "-18.5"),
        (r"\boxed{\$1{,}234}", "1234"),
        (r"\boxed{1,234}", "1234"),
        (r"\boxed{5\text{ metres}}", "5"),
        (r"\boxed{50\%} or \boxed{50}", "50"),
        (r"\boxed{5^\circ}", "5"),
        (r"#### \boxed{18}", "18"),
        (r"#### $\boxed{18}$.", "18"),
        ("\\boxed{5}\n#### 5.0", "5"),
        ("\\boxed{5}\n#### 6", None),
        (r"\boxed{5} \boxed{6}", None),
        (r"\boxed{5 \text{ or } 6}", None),
        (r"\boxed{5\text{k}}", None),
        (r"\boxed{\frac{1}{2}}", None),
        (r"\boxed{x = 5}", None),
        (r"\boxed{\boxed{5}}", None),
        (r"\boxed{5", None),
        (r"\boxed5", None),
        (r"\boxed", None),
        (r"\boxed{1,\!234}", "1234"),
        (r"(\boxed{5}), \boxed{5}.", "5"),
        (r"the answer - \boxed{5}\%", "5"),
        (r"the answer is - \boxed{5}", "5"),
        (r"**\boxed{5}**", "5"),
        (r"$\boxed{20}^{\circ}$", "20"),
        (r"\boxed{5}!", "5"),
        (r"\boxed{5}^2", None),
        (r"\boxed{5} \times 10^3", None),
        (r"\boxed{5}\cdot 2", None),
        (r"\boxed{5} * 2", None),
        (r"2*\boxed{5}", None),
        (r"2 \times \boxed{5}", None),
        (r"x = - \boxed{5}", None),
        (r"- \boxed{5}", None),
        (r"2^\boxed{5}", None),
        (r"3\boxed{5}", None),
        (r"\boxed{5}6", None),
        (r"-\boxed{5}", None),
        ("−\\boxed{5}", None),
        (r"\boxed{3}.5", None),
        (r"0.\boxed{5}", None),
        (r"\boxed{1},000", None),
        (r"\boxed{5}/2", None),
        (r"$1/\boxed{2}$", None),
        (r"\boxed{} #### 5", None),
        (r"\boxed{5} ####", None),
        ("#### 5 #### 7", None),
        ("#### 5\n#### 7", None),
        ("#### 5\n####", None),
        ("####", None),
        ("####\n5", None),
        ("#### five", None),
        ("#### 1 2", None),
        ("#### 5 or 6", None),
        ("#### 5, 6", None),
        ("#### 1,2", None),
        ("#### 12,34", None),
        ("#### 1/2", None),
        ("#### 5-3", None),
        ("#### 5 - 3", None),
        ("#### --5", None),
        ("#### -$-5", None),
        ("#### 1.2.3", None),
        ("#### 1e3", None),
        ("#### 5k", None),
        ("#### x = 5", None),
        ("#### ½", None),
        ("#### 18²", None),
        ("#### 18m²", None),
        ("#### 18 m2", None),
        ("#### 18個", None),
        ("#### 5 or ６", None),
        ("#### 5 or 𝟔", None),
        ("#### 5 ¹⁄₂", None),
        ("#### 2 · 10³", None),
        ("#### ²", None),
        ("#### ١٨", None),
        ("#### １８", None),
        ("#### 5 ½", None),
        ("#### ٥", None),
        ("##### 5", None),
        ("### 5", None),
        ("The answer is 5.", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


def test_blanks_after_the_marker_take_no_time():
    began = time.perf_counter()
    for line in (
        " " * 50_000,
        " " * 50_000 + "x",
        "$" + " " * 50_000 + "x",
        "-" + " " * 50_000,
        "5" + " " * 50_000 + "x6",
    ):
        assert extract_answer("####" + line) is None
    assert extract_answer("#### $ - " + " " * 50_000 + "5") == extract_answer("#### - $ 5") == "-5"
    assert time.perf_counter() - began < 5  # nested choices of where the blanks belong took minutes


def test_extract_answer_docstring_is_true():
    rows = re.findall(r'^    (".*?)\s*-> (.*)$', extract_answer.__doc__, flags=re.M)
    assert len(rows) == 19
    for inputs, outputs in rows:
        inputs = [text.strip('"').replace(r"\n", "\n") for text in re.findall(r'"[^"]*"', inputs)]
        wanted = re.findall(r'"[^"]*"|None', outputs.split("   ")[0])
        wanted = [None if text == "None" else text.strip('"') for text in wanted]
        if len(wanted) < len(inputs):
            wanted = wanted[:1] * len(inputs)
        assert [extract_answer(text) for text in inputs] == wanted


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3) | st.integers(), st.booleans())
def test_extract_answer_round_trip(number, commas):
    text = f"{number:,f}" if commas and isinstance(number, Decimal) else f"{Decimal(number):f}"
    answer = extract_answer(f"so it is\n#### {text}")
    assert Decimal(answer) == number
    assert extract_answer(f"#### {answer}") == answer
    assert same_answer(answer, str(number))


@settings(max_examples=200)
@given(st.text(alphabet="#0123456789 .,$%-+\nax½", max_size=30))
def test_extract_answer_never_fails_and_is_canonical(text):
    answer = extract_answer(text)
    if answer is not None:
        assert re.fullmatch(r"-?(0|[1-9][0-9]*)(\.[0-9]*[1-9])?", answer)
        assert answer != "-0"
        assert "####" in text


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("5 + 3 = 8\n#### 8", "8"),
        ("#### -$1,234.50\n\n", "-1234.5"),
        ("    #### 8", "8"),
        ("5 + 3 = 8\r#### 8", "8"),
        ("#### 8\r\nIt is.", None),
        ("#### 1. Shape\nIt is round.", None),
        ("It is round.\n#### 1. Shape", None),
        ("It is round.\n#### 3 kinds", None),
        ("#### 8\n#### 8", None),
        ("#### Why\nBecause.\n#### 8", None),
        ("so #### 8", None),
        ("##### 8", None),
        ("8", None),
        ("", None),
    ],
)
def test_what_a_free_text_states(text, answer):
    assert stated_answer(text) == answer


def test_same_answer():
    assert same_answer("5", "5.0")
    assert not same_answer("5", "5.0000000000000000000000000000001")
    assert not same_answer("5", "6")
    assert not same_answer(None, None)
    assert not same_answer("", "")
    assert not same_answer("5", "five")
