"""The default verifier: the final answer that a text gives, and whether two answers are the same number.

A task may have its own verifier (data.Task). This one reads the number after GSM8K's marker ####.
"""

import re
from decimal import Decimal, InvalidOperation

# The text that may follow the marker. Groups: 1 sign, 2 number, 3 words after the number.
NUMBER = re.compile(
    r"\s*(?:\$\s*)?(?:([-+−])\s*)?(?:\$\s*)?([0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
    r"\s?[%$]?[.,;!]?(?:\s(.*))?\s*"
)


def extract_answer(text: str) -> str | None:
    r"""The final answer of a completion as a canonical decimal string; None if it gives none.

    It is read from the text between the marker `####` and the end of that line.

    "#### 18"  "####18"                     -> "18"
    "#### 1,234"                            -> "1234"    commas only between thousands: "#### 1,2" -> None
    "#### $5."  "#### 50%"  "#### -$7"      -> "5" "50" "-7"    $, % and a final full stop are ignored
    "#### 3.50"  "#### 18.0"  "#### .5"     -> "3.5" "18" "0.5"
    "#### 007"  "#### -0"                   -> "7" "0"
    "#### 18 apples"  "#### $2.50 per day." -> "18" "2.5"       words after the number are ignored
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
        if not match or any(char.isnumeric() for char in match[3] or ""):
            return None
        answers.add(canonical((match[1] or "").replace("−", "-") + match[2].replace(",", "")))
    return answers.pop() if len(answers) == 1 else None


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
