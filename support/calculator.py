"""A calculator for text that nobody checked: + − × ÷ and parentheses on numbers, by hand, exact, and bounded.

Python's `eval` would run whatever a model writes, and "9**9**9" for ever. Here a text is at most LONGEST characters, it
is read once from left to right, and no operation makes more digits than its operands have together: there is no
exponent. So every text has an answer within a millisecond.

    sum     = product (("+" | "-") product)*          12*(3+4)
    product = factor (("*" | "/") factor)*
    factor  = "-" factor | "+" factor | "(" sum ")" | number
    number  = 12 | 1.5 | .5
"""

import re
from fractions import Fraction

LONGEST = 100  # characters of an expression
DIGITS = 15  # of a number in it, and before the point of a result
DEPTH = 20  # parentheses and signs inside each other
PLACES = 6  # after the point of a result, which is rounded there
TOKEN = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+|[-+*/()])")
SAME = str.maketrans("−×÷", "-*/")


class ExpressionError(ValueError):
    """Text that is no expression, or one beyond the limits."""


def calculator(text: str) -> str:
    """ "12*(3+4)" -> "84", "1/8" -> "0.125", "2/3" -> "0.666667"; for anything else "error" and why. Never raises."""
    try:
        if len(text) > LONGEST:
            raise ExpressionError("too long")
        tokens = split(text.translate(SAME).rstrip())
        value = sum_of(tokens, 0)
        if tokens:
            raise ExpressionError(f"cannot read {tokens[-1]}")
        return shown(value)
    except (ExpressionError, ZeroDivisionError) as error:
        return f"error: {'division by 0' if isinstance(error, ZeroDivisionError) else error}"


def split(text):
    """ "3*(4" -> ["(", "4", …] in reverse: the next one is at the end."""
    tokens, at = [], 0
    while at < len(text):
        token = TOKEN.match(text, at)
        if token is None:
            raise ExpressionError("not an expression")
        if sum(c.isdigit() for c in token[1]) > DIGITS:
            raise ExpressionError("number too long")
        tokens.append(token[1])
        at = token.end()
    return tokens[::-1]


def sum_of(tokens, depth):
    value = product_of(tokens, depth)
    while tokens and tokens[-1] in "+-":
        sign = 1 if tokens.pop() == "+" else -1
        value += sign * product_of(tokens, depth)
    return value


def product_of(tokens, depth):
    value = factor_of(tokens, depth)
    while tokens and tokens[-1] in "*/":
        value = value * factor_of(tokens, depth) if tokens.pop() == "*" else value / factor_of(tokens, depth)
    return value


def factor_of(tokens, depth):
    if depth > DEPTH:
        raise ExpressionError("too deep")
    token = tokens.pop() if tokens else "the end"
    if token in ("-", "+"):
        return factor_of(tokens, depth + 1) * (1 if token == "+" else -1)
    if token == "(":
        value = sum_of(tokens, depth + 1)
        if not tokens or tokens.pop() != ")":
            raise ExpressionError("a ( without its )")
        return value
    if token[-1] not in "0123456789.":
        raise ExpressionError(f"cannot read {token}")
    return Fraction(token.rstrip("."))


def shown(value):
    """A Fraction as decimal text, rounded half to even after PLACES."""
    scaled = round(value * 10**PLACES)
    whole, rest = divmod(abs(scaled), 10**PLACES)
    if whole >= 10**DIGITS:
        raise ExpressionError("result too large")
    text = f"{whole}.{rest:0{PLACES}d}".rstrip("0").rstrip(".")
    return f"-{text}" if scaled < 0 else text
