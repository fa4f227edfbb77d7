"""Problems unlike those of training, by one property at a time: does what was learned carry over?

shifted_problems(name, n)    -> [Problem], name one of SHIFTS:

    more steps          three steps, where training has one or two
    larger numbers      the same stories with numbers up to 99; in training no total is above 50
    new words           names and things that no training problem has
    by hand             tests/handwritten.jsonl: fifty in the style of GSM8K's easiest, in other words throughout
"""

from dataclasses import replace
from pathlib import Path

from data import DEFAULT_TASK, Problem, load_problems
from support.word_problems import MEN, PLURAL, POOLS, THEMES, TO_99, WOMEN, other_words, word_problems

NEW_MEN = ("Otto", "Hugo", "Felix", "Victor", "Omar", "Ivan", "Carl", "Ali", "Ken", "Dan")
NEW_WOMEN = ("Ruth", "Vera", "Iris", "Hana", "Rosa", "Olga", "Ines", "Joan", "Ivy", "Gail")
NEW_THINGS = (
    *("lemon", "melon", "onion", "pepper", "turnip", "olive", "button", "feather", "ribbon", "spoon", "pebble"),
    *("saddle", "magnet", "whistle", "bottle", "lantern", "waffle", "pretzel", "donut", "biscuit"),
    *("lily", "orchid", "poppy", "violet", "drum", "robot", "doll", "scarf", "hammer", "mirror"),
)
BY_HAND = Path(__file__).resolve().parent.parent / "tests/handwritten.jsonl"
SHIFTS = ("more steps", "larger numbers", "new words", "by hand")


def plural(noun):
    endings = {"y": ("y", "ies"), "f": ("f", "ves")}
    old, new = endings.get(noun[-1], ("", "s"))
    return noun.removesuffix(old) + new


def new_words():
    """{word of a training problem: a word that none has}: names, things and gifts, in the singular and the plural."""
    things = [thing for theme in THEMES.values() if len(theme.things) > 1 for thing in theme.things]
    things += [thing for pool in ("toy", "gift") for thing in POOLS[pool]]
    things = list(dict.fromkeys(things))
    table = dict(zip(MEN, NEW_MEN, strict=True)) | dict(zip(WOMEN, NEW_WOMEN, strict=True))
    for old, new in zip(things, NEW_THINGS, strict=True):
        table |= {old: new, PLURAL[old]: plural(new)}
    return table


def shifted_problems(name, n):
    """n problems of the test split, or all of the fifty. Raises KeyError on an unknown name."""
    if name == "by hand":
        return [p for split in ("train", "valid", "test") for p in load_problems(BY_HAND, split)][:n]
    if name == "new words":
        known, words = load_problems(DEFAULT_TASK, "test", 2 * n, (1, 2)), new_words()
        problems = [
            replace(p, question=other_words(p.question, words), solution=other_words(p.solution, words)) for p in known
        ]
        return [p for p, old in zip(problems, known, strict=True) if p.question != old.question][:n]
    levels, options = {"more steps": ((3,), {}), "larger numbers": ((1, 2), {"large": TO_99})}[name]
    return [Problem(*fields, task=DEFAULT_TASK) for fields in word_problems("test", n, levels, **options)]
