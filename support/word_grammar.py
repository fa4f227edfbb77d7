"""The grammar of the built-in stories: their themes, events and wordings, the words, and how they are counted.

GRAMMAR is the text that a person writes, a block per theme; `parse` makes it the tables that support/word_problems.py
draws from: THEMES = {"food": Theme(...), ...}.
"""

from typing import NamedTuple

# -----------------------------------------------------------------------------------------------------------------
# A block per theme, with the nouns it is about. A row is one event:
#
#   +  this | that     an operator and a sentence, in several wordings. + - * / act on the running total,
#                      "k-" subtracts the total from the row's own number, "=" opens with a number
#   -> worked [unit]   the solution line, and what its result counts if that is not the theme's noun
#   ?  asked           the question if the story ends here
#
# -> and ? under a section's name serve all rows of the section that have none (?+ and ?- by operator). [<= 5]
# bounds the row's number: nobody eats 20 eggs. "use" pastes a shared block.
#
# Slots: N the hero, he/He/his/him the pronouns, F a friend (of the other sex, so that a pronoun has one
# reading), thing/things the noun, k the row's number, ks "3 apples", more "3 more apples", fewer "3 fewer
# apples", a and b the operands, e "5 + 3 = 8", eq "5 + 3 = 8 apples", unit "apples". Names of POOLS are drawn
# when a template has them.

GRAMMAR = """
owning-open
    -> {N} has {eq} in all. | In all, {he} has {eq}.
    ?  How many {things} does {N} have in all? | How many {things} does {he} have?

owning-then
    -> {N} has {eq}. | Now {he} has {eq}. | {He} has {eq} now.
    ?+ How many {things} does {N} have now? | How many {things} does {he} have in all?
    ?- How many {things} does {N} have left? | How many {things} does {he} still have?

start
    =  {N} has {ks}. | {N} buys {ks} {at}. | {N} starts the day with {ks}.
    +  {N} has {a} big {things} and {b} small {things}.
    +  {N} buys {a} {things} on {day} and {b} on {next}.

buy
    +  {He} buys {more} {at}. | Then {he} buys {more}.
    +  {F} gives {him} {more}. | {He} gets {more} from {F}.

give
    -  {He} gives {ks} to {F}. | {He} gives {F} {ks}.

eat
    -  {He} eats {ks}. | {He} eats {k} of {his} {things} for lunch. [<= 5]

share
    /  {He} shares {his} {things} equally among {k} friends. | Then {k} friends share {his} {things} equally.
    -> Each friend gets {eq}. | Each of them gets {eq}.
    ?  How many {things} does each friend get? | How many {things} are there for each friend?

pack
    /  {He} packs all {his} {things} in bags of {k}. | {He} puts {his} {things} in bags, {k} in each bag.
    -> {He} fills {eq}. | {He} needs {eq}. [bag]
    ?  How many bags does {he} fill? | How many bags does {N} need?

sell
    *  {He} sells all {his} {things} for ${k} each. | {He} sells each of {his} {things} for ${k}.
    -> {He} gets {eq}. | {N} earns {eq}. [dollar]
    ?  How much money does {he} get? | How many dollars does {N} earn?

compare
    +  {F} has {ks}.
    -> Together they have {eq}. | They have {eq} in all.
    ?  How many {things} do they have together? | How many {things} do {N} and {F} have in all?
    -  {F} has {ks}.
    -> {N} has {e} more {unit}.
    ?  How many more {things} does {N} have than {F}?
    +  {F} has {more} than {N}.
    -> {F} has {eq}.
    ?  How many {things} does {F} have?
    -  {F} has {fewer} than {N}.
    -> {F} has {eq}.
    ?  How many {things} does {F} have?
    *  {F} has {k} times as many {things} as {N}.
    -> {F} has {eq}.
    ?  How many {things} does {F} have?

food: apple orange pear egg plum carrot
  open
    use owning-open
    use start
    *  {N} has {a} baskets with {ks} in each basket. | {N} has {a} baskets of {ks} each.
  then
    use owning-then
    use buy
    use give
    use eat
  end
    use share
    use pack
    use sell
    use compare

things: book pencil marble sticker card shell coin stamp balloon toy
  open
    use owning-open
    use start
    *  {N} has {a} boxes with {ks} in each box. | {N} has {a} boxes of {ks} each.
  then
    use owning-then
    use buy
    use give
    +  {He} finds {more} {where}.
    -  {He} loses {ks} {where}. | Then {he} loses {k} of {his} {things}.
  end
    use share
    use sell
    use compare
    /  {He} sorts all {his} {things} into piles of {k}. | {He} puts {his} {things} in piles of {k}.
    -> {He} makes {eq}. [pile]
    ?  How many piles does {he} make? | How many piles does {N} make?

baking: cookie muffin bun cupcake
  open
    use owning-open
    =  {N} bakes {ks}. | {N} bakes {ks} for a party.
    *  {N} bakes {a} trays of {ks} each. | {N} bakes {a} trays with {ks} on each tray.
    +  {N} bakes {a} {things} in the morning and {b} in the evening.
  then
    use owning-then
    +  {He} bakes {more}. | {F} brings {him} {more}.
    use give
    use eat
    -  {His} family eats {ks}. [<= 12]
  end
    use share
    use pack
    use sell
    /  {He} puts {his} {things} on plates, {k} on each plate.
    -> {He} fills {eq}. | {He} needs {eq}. [plate]
    ?  How many plates does {he} need? | How many plates does {N} fill?

garden: rose tulip daisy flower
  open
    use owning-open
    =  {N} plants {ks}. | {N} has {ks} in {his} garden.
    *  {N} plants {a} rows of {ks} each. | {N} plants {a} rows with {ks} in each row.
    +  {N} plants {a} {things} on {day} and {b} on {next}.
  then
    use owning-then
    +  {He} plants {more}. | {F} plants {more} for {him}.
    -  A rabbit eats {ks}. | A storm breaks {k} of {his} {things}. [<= 9]
    -  {He} picks {ks} for {F}.
  end
    use sell
    /  {He} picks all {his} {things} and puts {k} in each vase.
    -> {He} fills {eq}. | {He} needs {eq}. [vase]
    ?  How many vases does {he} fill? | How many vases does {N} need?
    *  Each of {his} {things} needs {k} cups of water.
    -> They need {eq} of water. [cup]
    ?  How many cups of water do they need? | How many cups of water does {N} need?

shop: dollar
  open
    -> {N} pays {eq}. | {He} spends {eq}.
    ?  How much does {N} pay in all? | How many dollars does {he} spend?
    =  {N} buys a {toy} for ${k}. | {N} buys a {toy} that costs ${k}.
    *  {N} buys {a} {toys} for ${k} each. | {N} buys {a} {toys}. Each {toy} costs ${k}.
    +  {N} buys a {toy} for ${a} and a {toy2} for ${b}.
  then
    -> {N} pays {eq}. | Now {he} pays {eq}. | The cost is {eq}.
    ?  How much does {N} pay in all? | How many dollars does {he} spend?
    +  {He} also buys a {toy} for ${k}. | Then {he} buys a {toy} for ${k}.
    -  The shop takes ${k} off the price. | {He} uses a coupon for ${k} off.
  end
    k- {He} pays with ${k}. | {He} gives the shop ${k}.
    -> {He} gets {eq} back.
    ?  How much change does {he} get? | How many dollars does {N} get back?
    /  Then {k} friends share the cost equally. | A group of {k} friends shares the cost equally.
    -> Each friend pays {eq}.
    ?  How much does each friend pay? | How many dollars does each friend pay?
    +  {F} spends ${k} more than {N}.
    -> {F} spends {eq}.
    ?  How much does {F} spend?
    -  {F} spends ${k} less than {N}.
    -> {F} spends {eq}.
    ?  How much does {F} spend?
    *  {F} spends {k} times as much as {N}.
    -> {F} spends {eq}.
    ?  How much does {F} spend?

savings: dollar
  open
    -> {N} has {eq} in all. | In all, {he} has {eq}.
    ?  How much money does {N} have in all? | How many dollars does {he} get?
    =  {N} has ${k}. | {N} has ${k} in {his} piggy bank.
    *  {N} saves ${k} a week for {a} weeks. | {N} earns ${k} an hour and works for {a} hours.
    +  {N} earns ${a} on {day} and ${b} on {next}.
  then
    -> {N} has {eq}. | Now {he} has {eq}. | {He} has {eq} now.
    ?+ How much money does {N} have now? | How many dollars does {he} have in all?
    ?- How much money does {N} have left? | How many dollars does {he} have left?
    +  {F} gives {him} ${k}. | {He} gets ${k} from {F}.
    +  {He} earns ${k} more by {job}.
    -  {He} buys a {toy} for ${k}. | {He} spends ${k} on a {toy}.
    -  {He} gives ${k} to {F}.
  end
    k- {He} wants a {toy} that costs ${k}. | A {toy} costs ${k}.
    -> {He} needs {e} more {unit}.
    ?  How much more money does {he} need for the {toy}?
    /  {He} spends it all on {toys} that cost ${k} each. | {He} spends it all on {toys} for ${k} each.
    -> {He} buys {eq}. [toy]
    ?  How many {toys} does {he} buy?
    /  {He} shares all {his} money equally among {k} friends.
    -> Each friend gets {eq}.
    ?  How much money does each friend get? | How many dollars does each friend get?
    *  {F} has {k} times as much money as {N}.
    -> {F} has {eq}.
    ?  How much money does {F} have?
    +  {F} has ${k} more than {N}.
    -> {F} has {eq}.
    ?  How much money does {F} have?
    -  {F} has ${k} less than {N}.
    -> {F} has {eq}.
    ?  How much money does {F} have?

trip: mile
  open
    -> {N} goes {eq}. | In all, {he} goes {eq}.
    ?  How many miles does {N} go in all? | How far does {he} go in all?
    =  {N} rides {ks} on {day}. | {N} rides {his} bike for {ks}.
    *  {N} walks {ks} a day for {a} days. | {N} rides {ks} a day for {a} days.
    +  {N} rides {a} {things} on {day} and {b} on {next}.
  then
    -> {N} goes {eq}. | In all, {he} goes {eq}. | That makes {eq}.
    ?  How many miles does {N} go in all? | How far does {he} go in all?
    +  Then {he} rides {more}. | After a rest, {he} rides {more}.
    +  Then {he} walks {more}. | {He} walks {more} with {F}. [<= 5]
  end
    k- {He} wants to go {ks} in all. | {His} goal is {ks}.
    -> {He} has {eq} to go.
    ?  How many miles does {he} still have to go? | How many more miles does {N} have to go?
    *  Each mile takes {him} {k} minutes.
    -> {He} needs {eq}. [minute]
    ?  How many minutes does {he} need? | How many minutes does it take {him}?
    /  {He} goes {ks} an hour.
    -> {He} needs {eq}. [hour]
    ?  How many hours does {he} need? | How many hours does it take {him}?
    +  {F} goes {more} than {N}.
    -> {F} goes {eq}.
    ?  How many miles does {F} go?
    -  {F} goes {fewer} than {N}.
    -> {F} goes {eq}.
    ?  How many miles does {F} go?
    *  {F} goes {k} times as far as {N}.
    -> {F} goes {eq}.
    ?  How many miles does {F} go?

reading: page
  open
    -> {N} has {eq} to read. | {He} has to read {eq}.
    ?  How many pages does {N} have to read? | How many pages are there in all?
    =  {N} has a book of {ks}. | {N} starts a book that has {ks}.
    *  {N} has {a} books of {ks} each. | {N} wants to read {a} books. Each book has {ks}.
    +  {N} has to read {a} {things} for school and {b} for fun.
  then
    -> {N} has {eq} to read. | Now {he} has {eq} left. | {He} still has {eq} left.
    ?  How many pages are left? | How many pages does {he} still have to read?
    -  {He} reads {ks} on the bus. | {He} reads {ks} in bed.
    -  {He} reads {ks} {where}. | {He} reads {ks} to {F}.
  end
    /  From now on, {he} reads {ks} a day. | Each day from now on, {he} reads {ks}.
    -> {He} needs {eq}. [day]
    ?  How many days does {he} need to finish? | How many days does it take {him} to finish?
    *  Each page takes {him} {k} minutes. | {He} needs {k} minutes for each page.
    -> {He} needs {eq}. [minute]
    ?  How many minutes does {he} need to finish? | How many minutes does it take {him} to finish?

ride: person
  open
    -> It carries {eq}. | In all, it carries {eq}.
    ?  How many people does it carry? | How many people are there in all?
    =  There are {ks} on a {ride}. | A {ride} leaves the {stop} with {ks}.
    *  A train has {a} cars with {ks} in each car. | A train has {a} cars. Each car carries {ks}.
    +  There are {a} children and {b} adults on a {ride}.
  then
    -> It carries {eq}. | Now it carries {eq}. | It has {eq} on it.
    ?+ How many people does it carry now? | How many people are there now?
    ?- How many people are left on it? | How many people are still on it?
    +  At the {stop}, {k} more people get on. | Then {k} more people get on.
    -  At the {stop}, {k} people get off. | Then {k} people get off.
  end
    *  Each person on it pays ${k}. | Each person on it buys a ticket for ${k}.
    -> They pay {eq}. [dollar]
    ?  How much do they pay in all? | How many dollars do they pay in all?
    /  At the last stop, the people on it take taxis, {k} in each taxi.
    -> They need {eq}. [taxi]
    ?  How many taxis do they need? | How many taxis do they fill?
    /  The people on it sit in rows of {k}.
    -> They fill {eq}. [row]
    ?  How many rows do they fill?

class: child
  open
    -> The class has {eq}. | That makes {eq}.
    ?  How many children are there in all? | How many children are in the class?
    =  There are {ks} in a class. | A class has {ks}.
    *  A class has {a} tables with {ks} at each table. | In a class, {ks} sit at each of {a} tables.
    +  A class has {a} boys and {b} girls. | There are {a} boys and {b} girls in a class.
  then
    -> The class has {eq}. | Now the class has {eq}. | The class has {eq} now.
    ?+ How many children are there now? | How many children are in the class now?
    ?- How many children are left? | How many children are still there?
    +  Then {k} new children join the class. | Soon {k} more children come.
    -  Then {k} children go home. | Soon {k} of the children go home.
  end
    /  The teacher makes teams of {k}. | The class plays in teams of {k}.
    -> This makes {eq}. | The class makes {eq}. [team]
    ?  How many teams does the class make? | How many teams are there?
    *  Each child in the class gets {k} {gifts}. | The teacher gives each child in the class {k} {gifts}.
    -> They get {eq}. [gift]
    ?  How many {gifts} do they get in all? | How many {gifts} does the teacher need?
"""
# The vocabulary is small on purpose: words recur, so that a model of a million parameters can learn them all.

MEN = ("Tom", "Ben", "Sam", "Max", "Leo", "Jack", "Adam", "Luke", "Noah", "Paul")
WOMEN = ("Anna", "Mia", "Jane", "Emma", "Kate", "Sara", "Zoe", "Lucy", "Nora", "Ella")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
POOLS = {
    "at": ("at the market", "at the shop", "at the fair"),
    "where": ("at home", "at school", "in the park", "in the garden"),
    "stop": ("market", "bridge", "park", "beach", "museum"),
    "ride": ("bus", "tram", "boat"),
    "job": ("washing a car", "walking a dog", "painting a fence"),
    "toy": ("ball", "kite", "cap", "game", "puzzle", "lamp"),
    "gift": ("book", "pencil", "card", "balloon"),
}
WEATHER = ("sunny", "rainy", "cold", "warm", "windy")
HOURS = ("day", "morning", "afternoon", "evening")
START = {"reading": range(10, 41)}  # what a "=" row may open with, where that is not 5..20
IRREGULAR = {"daisy": "daisies", "person": "people", "child": "children"}


# -----------------------------------------------------------------------------------------------------------------
# The grammar as tables.


class Row(NamedTuple):
    """One event that a story may have next."""

    op: str
    sentence: tuple[str, ...]  # a choice of wordings, as below
    worked: tuple[str, ...]
    ask: tuple[str, ...]
    unit: str  # "" = the theme's noun
    most: int  # the largest number of a middle row


class Theme(NamedTuple):
    """What stories of one kind are about, and their events."""

    things: tuple[str, ...]
    open: tuple[Row, ...]
    then: tuple[Row, ...]  # only + and -: they keep the unit, so any number of them can follow
    end: tuple[Row, ...]  # last step only: they change the unit or the owner
    person: bool  # has a hero
    start: range
    least: int  # smallest number of a middle row: 2 without a hero, where "1 people get off" would come out


def parse(grammar: str) -> dict[str, Theme]:
    """GRAMMAR as tables: {"food": Theme(...), ...}."""
    blocks, themes = {}, {}
    for block in grammar.strip().split("\n\n"):
        title, *lines = block.split("\n")
        name, _, nouns = title.partition(":")
        lines = [new for line in lines for new in blocks.get(line.removeprefix("    use "), [line])]
        blocks[name] = lines
        if nouns:
            rows = {"open": [], "then": [], "end": []}
            for line in lines:
                mark, _, text = line.strip().partition(" ")
                text, _, note = text.strip().removesuffix("]").partition(" [")
                texts = tuple(text.split(" | "))
                if mark in rows:
                    section, default, last = rows[mark], {}, None
                elif mark not in ("->", "?", "?+", "?-"):
                    most = int(note.removeprefix("<= ") or 20)
                    ask = default.get("?" + mark, default.get("?", ()))
                    last = Row(mark, texts, default.get("->", ()), ask, "", most)
                    section.append(last)
                elif last is None:
                    default[mark] = texts
                else:
                    new = dict(worked=texts, unit=note) if mark == "->" else dict(ask=texts)
                    section[-1] = last = last._replace(**new)
            person = "{N}" in rows["open"][0].sentence[0]
            tables = (tuple(section) for section in rows.values())
            start = START.get(name, range(5, 21))
            themes[name] = Theme(tuple(nouns.split()), *tables, person, start, 1 if person else 2)
    return themes


THEMES = parse(GRAMMAR)
STORIES = tuple(THEMES)
NOUNS = {noun for theme in THEMES.values() for noun in theme.things} | {*POOLS["toy"], *POOLS["gift"]}
NOUNS |= {row.unit for theme in THEMES.values() for row in theme.end if row.unit}
PLURAL = {noun: IRREGULAR.get(noun, noun + "s") for noun in sorted(NOUNS)}
SINGULAR = {plural: noun for noun, plural in PLURAL.items()}


def count(n: int, noun: str, adjective: str = "") -> str:
    """count(1, "apple") -> "1 apple"; count(2, "daisy", "more ") -> "2 more daisies"."""
    return f"{n} {adjective}{noun if n == 1 else PLURAL[noun]}"
