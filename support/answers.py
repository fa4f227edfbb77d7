"""The usual verifier: what answer a text commits to, and whether two answers are the same number.

A task may bring its own (data.Task); this one reads the number after GSM8K's marker ####.
"""

import re
from decimal import Decimal, InvalidOperation

# What may stand after the marker: groups 1 sign, 2 number, 3 words after it.
NUMBER = re.compile(
    r"\s*(?:\$\s*)?(?:([-+−])\s*)?(?:\$\s*)?([0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
    r"\s?[%$]?[.,;!]?(?:\s(.*))?\s*"
)


def extract_answer(text: str) -> str | None:
    r"""The answer that a completion commits to, as a canonical decimal string; None if it commits to none.

    Read is what stands after the marker `####` up to the end of that line.

    "#### 18"  "####18"                     -> "18"
    "#### 1,234"                            -> "1234"    commas only between thousands: "#### 1,2" -> None
    "#### $5."  "#### 50%"  "#### -$7"      -> "5" "50" "-7"    $, % and a final full stop do not count
    "#### 3.50"  "#### 18.0"  "#### .5"     -> "3.5" "18" "0.5"
    "#### 007"  "#### -0"                   -> "7" "0"
    "#### 18 apples"  "#### $2.50 per day." -> "18" "2.5"       words after the number are not read
    "#### 5 or 6"  "#### 1/2"  "#### 1 2"   -> None      exactly one number must stand on the line
    "####"  "#### five"  "#### x = 5"       -> None      and come first; "5k" and "1e3" are None
    "#### 5\n#### 5"                        -> "5"       several markers that agree
    "#### 5 #### 7"  "#### 5\n####"         -> None      markers that differ, or one that cannot be read
    "The answer is 5."                      -> None      no marker

    The last two rows matter in reinforcement learning: a policy that may list its guesses will.
    """
    answers = set()
    for piece in text.split("####")[1:]:
        match = NUMBER.fullmatch(re.split(r"[\r\n]", piece, maxsplit=1)[0])
        if not match or any(char.isnumeric() for char in match[3] or ""):
            return None
        answers.add(canonical((match[1] or "").replace("−", "-") + match[2].replace(",", "")))
    return answers.pop() if len(answers) == 1 else None


def canonical(number: str) -> str:
    """ "3.50" -> "3.5", "-0" -> "0", "007" -> "7"; exact, however long: no float, no rounding."""
    text = format(Decimal(number), "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def same_answer(a: str | None, b: str | None) -> bool:
    """Whether two answers are the same number; None or "" is nobody's answer, not even its own."""
    try:
        return Decimal(a or "nan") == Decimal(b or "nan")
    except InvalidOperation:
        return False
