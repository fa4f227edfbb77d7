"""The default verifier: the final answer that a text gives, and whether two answers are the same number.

A task may have its own verifier (data.Task). This one reads the number after GSM8K's marker ####.
"""

import re
from decimal import Decimal, InvalidOperation

# The text that may follow the marker. Groups: 1 sign, 2 number, 3 words after the number.
NUMBER = re.compile(
    r"\s*(?:[$€£¥￥₹]\s*)?(?:([-+−])\s*)?(?:[$€£¥￥₹]\s*)?"
    r"([0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
    r"\s?(?:[%％$€£¥￥₹]|°[CF]?)?[.,;!。]?(?:\s(.*))?\s*"
)
# What makes words hold a second number: the digits 0 to 9, also wide or of a mathematical font, and fractions.
DIGIT = re.compile("[0-9０-９𝟎-𝟿¼-¾⅐-⅟↉⁄]")


def extract_answer(text: str) -> str | None:
    r"""The final answer of a completion as a canonical decimal string; None if it gives none.

    It is read from the text between the marker `####` and the end of that line.

    "#### 18"  "####18"                     -> "18"
    "#### 1,234"                            -> "1234"    commas only between thousands: "#### 1,2" -> None
    "#### $5."  "#### 50%"  "#### -$7"      -> "5" "50" "-7"    $, % and a final full stop are ignored
    "#### €5"  "#### 5 £"  "#### 20°C."     -> "5" "5" "20"     so are other currencies and degrees
    "#### 3.50"  "#### 18.0"  "#### .5"     -> "3.5" "18" "0.5"
    "#### 007"  "#### -0"                   -> "7" "0"
    "#### 18 apples"  "#### $2.50 per day." -> "18" "2.5"       words after the number are ignored
    "#### 18 m²"  "#### 18 ①"  "#### 18 第三" -> "18"      superscripts and numerals of other scripts among them
    "#### 18 m2"  "#### 5 ½"  "#### 5 ６"   -> None      but no digit, not in a word either, and no fraction
    "#### 18²"  "#### 18m²"  "#### ١٨"      -> None      glued to the number they change it; they are no number alone
    "#### 5 or 6"  "#### 1/2"  "#### 1 2"   -> None      the line must contain exactly one number
    "####"  "#### five"  "#### x = 5"       -> None      and begin with it; "5k" and "1e3" are None too
    "#### 5\n#### 5"                        -> "5"       several markers that agree
    "#### 5 #### 7"  "#### 5\n####"         -> None      markers that differ, or one that cannot be read
    "The answer is 5."                      -> None      no marker

    The two rows before the last matter in reinforcement learning: a policy that may list several guesses will do so.
    """
    answers = set()
    for piece in text.split("####")[1:]:
        match = NUMBER.fullmatch(re.split(r"[\r\n]", piece, maxsplit=1)[0])
        if not match or DIGIT.search(match[3] or ""):
            return None
        answers.add(canonical((match[1] or "").replace("−", "-") + match[2].replace(",", "")))
    return answers.pop() if len(answers) == 1 else None


def last_line(text: str) -> str:
    """The last line of a text that is not blank, without the white space around it."""
    return re.split(r"[\r\n]", text.rstrip())[-1].strip()


def stated_answer(text: str) -> str | None:
    """The answer that a free text states; None if it states none. `extract_answer` with more care: the last line must
    be the marker and a bare number, and the only marker. "#### 1. Shape" is a heading of Markdown."""
    marker, number = last_line(text)[:4], NUMBER.fullmatch(last_line(text)[4:])
    bare = marker == "####" and number and not number[3]
    return extract_answer(text) if bare and text.count("####") == 1 else None


def canonical(number: str) -> str:
    """ "3.50" -> "3.5", "-0" -> "0", "007" -> "7"; exact at any length, without floats."""
    text = format(Decimal(number), "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def same_answer(a: str | None, b: str | None) -> bool:
    """Whether two answers are the same number; None and "" equal nothing, not even themselves."""
    try:
        return Decimal(a or "nan") == Decimal(b or "nan")
    except InvalidOperation:
        return False
