r"""The default verifier: the final answer that a text gives, and whether two answers are the same number; and which
problems have an answer to check.

A task may have its own verifier (tasks.Task). This one reads the number after GSM8K's marker ####, and that in the
\boxed{…} of models that were trained on mathematics in LaTeX.
"""

import itertools
import re
from decimal import Decimal, InvalidOperation

# The text that may follow the marker. Groups: 1 sign, 2 number, 3 words after the number.
NUMBER = re.compile(
    r"\s*(?:[$€£¥￥₹]\s*)?(?:([-+−])\s*)?(?:[$€£¥￥₹]\s*)?"
    r"([0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
    r"\s?(?:[%％$€£¥￥₹]|°[CF]?)?[.,;!。]?(?:\s(.*))?\s*"
)
# What LaTeX writes around a number in a box, and what it stands for: \text{ apples}, \$5, 1{,}000, 5^\circ.
LATEX = (
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\{,\}|,\\!"), ","),  # the two ways of writing thousands
    (re.compile(r"\^\{?\\circ\}?"), "°"),
    (re.compile(r"\\[,;: ]|~"), " "),
)
BOX = "\ufdd0"  # stands for a box; never assigned to a character
# What changes the number in a box that comes right after it, or right before it.
SIGN = r"\\(?:times|cdot|div|pm)"
CHANGES_AFTER = re.compile(rf"(?:[^\W_]|[-−/^]|[0-9][.,]|[0-9)]\s*\*\s*|{SIGN}\s*|(?:\A|[=(])\s*[-−]\s*)\Z")
CHANGES_BEFORE = re.compile(rf"[^\W_]|/|[.,][0-9]|\s*(?:\^(?!\{{?\\circ)|\*\s*[0-9(]|{SIGN})")
# What makes words hold a second number: the digits 0 to 9, also wide or of a mathematical font, and fractions.
DIGIT = re.compile("[0-9０-９𝟎-𝟿¼-¾⅐-⅟↉⁄]")


def extract_answer(text: str) -> str | None:
    r"""The final answer of a completion as a canonical decimal string; None if it gives none.

    It is read from the text between the marker `####` and the end of that line, and from `\boxed{…}`.

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
    "so it is \boxed{18}."                  -> "18"      a box holds what may stand after the marker,
    "\boxed{\$1{,}234}"  "\boxed{5\text{ m}}" -> "1234" "5"    also as LaTeX writes it
    "#### \boxed{18}"                       -> "18"
    "\boxed{x = 5}"  "\boxed{\frac{1}{2}}"  "\boxed{5" -> None
    "#### 5\n#### 5"  "\boxed{5} #### 5.0"  -> "5"       several markers and boxes that agree
    "#### 5 #### 7"  "#### 5\n####"         -> None      those that differ, or one that cannot be read
    "The answer is 5."                      -> None      neither

    The two rows before the last matter in reinforcement learning: a policy that may list several guesses will do so.
    """
    boxes, text = split_boxes(text)
    if boxes is None:
        return None
    pieces = [re.split(r"[\r\n]", piece, maxsplit=1)[0] for piece in text.split("####")[1:]]
    answers = set()
    for piece in boxes + [piece for piece in pieces if piece.strip(" $.") != BOX]:
        match = NUMBER.fullmatch(piece)
        if not match or DIGIT.search(match[3] or ""):
            return None
        answers.add(canonical((match[1] or "").replace("−", "-") + match[2].replace(",", "")))
    return answers.pop() if len(answers) == 1 else None


def split_boxes(text):
    r"""-> what stands in each `\boxed{…}`, without LaTeX's spelling, and the text with BOX in its place. (None, "") if
    one has no braces, does not end, or touches what would change its number: -\boxed{5}, \boxed{3}.5, 1/\boxed{2}."""
    before, *rest = text.split("\\boxed")
    boxes = []
    for piece in rest:
        end = matching_brace(piece)
        if end is None or CHANGES_AFTER.search(before) or CHANGES_BEFORE.match(piece, end + 1):
            return None, ""
        box = piece[1:end]
        for written, meant in LATEX:
            box = written.sub(meant, box)
        boxes.append(box)
        before += BOX + piece[end + 1 :]
    return boxes, before


def matching_brace(text):
    """The place of the brace that closes the one that the text begins with; None if there is none."""
    depth = 0
    for place, sign in enumerate(text):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        if depth <= 0:
            return place if place else None
    return None


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


def is_checkable(problems):
    """Whether each of the problems has an answer to check; if none has, all count, and every answer is wrong."""
    answered = [bool(problem.answer) for problem in problems]
    return answered if any(answered) else [True] * len(problems)


def checkable(problems):
    """Those of the problems that `is_checkable` picks."""
    return list(itertools.compress(problems, is_checkable(problems)))


def verifiable(problems):
    """Whether at least half of the problems have an answer to check, so that an accuracy speaks for them."""
    return 2 * sum(bool(problem.answer) for problem in problems) >= len(problems)


def measure_of(problems):
    """The name of the figure that speaks for all of these problems: "accuracy" if each has an answer to check, "f1" if
    none has, else "own_measure"."""
    answered = {bool(problem.answer) for problem in problems}
    return "own_measure" if len(answered) == 2 else "accuracy" if True in answered else "f1"
