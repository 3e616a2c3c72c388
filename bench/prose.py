"""Questions on real prose: the answer lies somewhere in a long text.

A document is a stretch of a book with the facts of all tasks put in at random places; each task
asks for its own, and the others' distract. The model is asked in its own chat format, and the
answer's first words are given, so that it has to name the fact and nothing else. All prompts of
a document begin alike, so a dense run of this beginning is shared. Texts for choosing a rule
and texts for reporting about it are different parts of the book: even stretches of 2^16
characters for choosing, odd ones for reporting.
"""

import itertools
import os
import random
from typing import NamedTuple

TASKS = "fact", "lookalike", "values", "chain", "reworded", "passage", "continuation"
MORE_TASKS = ("quote",)  # run where --tasks names them
CITIES = (
    "Paris London Tokyo Cairo Lima Oslo Rome Delhi Boston Berlin Madrid Vienna Dublin Lisbon "
    "Prague Warsaw Athens Havana Quito Seoul"
).split()
DOORS = "vault archive cellar library garden harbour laboratory museum observatory workshop".split()
PEOPLE = "Alice Henry Clara Victor Emma Oscar Julia Hugo Nora Felix".split()
STRETCH = 2**16  # characters
ROOM = 150  # tokens of a prompt besides the text: chat format, question, answer's first words


class Document(NamedTuple):
    shared: list[int]  # what all prompts begin with
    questions: dict[str, tuple[list[int], list[int]]]  # task -> prompt, answer


class Book:
    """A text and a tokenizer; part 0 is for choosing, 1 for reporting."""

    def __init__(self, text: str, tok, part: int):
        starts = range(part * STRETCH, len(text) - STRETCH + 1, 2 * STRETCH)
        self.tok = tok
        self.pieces = [text[start : start + STRETCH] for start in starts]
        if not self.pieces:
            raise ValueError(
                f"the text has {len(text):,} characters; {2 * STRETCH:,} are needed, a book's"
            )

    def prose(self, n: int, rng: random.Random) -> list[int]:
        """Return n tokens of running text; a long one goes on with another stretch."""
        ids: list[int] = []
        while len(ids) < n:
            piece = rng.choice(self.pieces)
            start = piece.index("\n", rng.randrange(STRETCH // 2)) + 1
            ids += self.tok.encode(piece[start : start + 5 * (n - len(ids)) + 1000])
        return ids[:n]


# ---- tasks: (lines in the text, question, answer's first words, answer) ---------------------


def number(rng: random.Random, digits: int = 7) -> str:
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def fact(rng: random.Random):
    """The only access code of the text."""
    door = rng.choice(DOORS)
    value = number(rng)
    begin = f"The access code of the {door} mentioned in the provided text is:"
    question = f"What is the access code of the {door} mentioned in the provided text?"
    return [f"The access code of the {door} is: {value}."], question, begin, f" {value}."


def lookalike(rng: random.Random):
    """The number of one city, where three other cities have theirs."""
    found = {city: number(rng) for city in rng.sample(CITIES, 4)}
    city = rng.choice(list(found))
    question = f"What is the special magic number for {city} mentioned in the provided text?"
    begin = f"The special magic number for {city} mentioned in the provided text is:"
    lines = [f"One of the special magic numbers for {name} is: {found[name]}." for name in found]
    return lines, question, begin, f" {found[city]}."


def values(rng: random.Random):
    """All three numbers of one person, where another has two."""
    name, other = rng.sample(PEOPLE, 2)
    found = [number(rng, 5) for _ in range(3)]
    lines = [f"One of the lucky numbers of {name} is: {value}." for value in found]
    for _ in range(2):
        place = rng.randrange(len(lines) + 1)
        lines.insert(place, f"One of the lucky numbers of {other} is: {number(rng, 5)}.")
    question = f"What are all the lucky numbers of {name} mentioned in the provided text?"
    begin = f"The lucky numbers of {name} mentioned in the provided text are:"
    return lines, question, begin, f" {', '.join(found)}."


def assignments(rng: random.Random) -> list[tuple[list[str], str, str, str]]:
    """Three tasks, each a chain of variables that get one value from another."""
    letters = itertools.product("BCDFGKLM", "AEIOU", "NPRSTVXZ")
    names = rng.sample(["".join(three) for three in letters], 9)
    chains = []
    for i in (0, 3, 6):
        first, second, third = names[i : i + 3]
        value = number(rng, 5)
        lines = [f"VAR {first} = {value}"]
        lines += [f"VAR {second} = VAR {first} ", f"VAR {third} = VAR {second} "]
        question = (
            f"Question: Find all variables that are assigned the value {value} in the text above."
        )
        begin = (
            f"Answer: According to the chain of variable assignments in the text above, "
            f"3 variables are assigned the value {value}, they are:"
        )
        chains.append((lines, question, begin, f" {first} {second} {third}"))
    return chains


REWORDED = [  # what the text says, what is asked, how the answer begins
    (
        "The old physician of the village lived in house number {}.",
        "At which house number was the local doctor's home?",
        "The local doctor's home was at house number",
    ),
    (
        "The ferry across the lake takes exactly {} passengers.",
        "How many people can the boat carry over the water?",
        "The boat can carry this many people over the water:",
    ),
    (
        "The treasure was buried {} steps to the north of the mill.",
        "How many paces from the mill did they hide the gold?",
        "From the mill, the number of paces to the gold is",
    ),
    (
        "The lawyer paid {} roubles for the white horse.",
        "What did the attorney's pale stallion cost?",
        "The attorney's pale stallion cost, in roubles,",
    ),
    (
        "The church tower was finished in the year {}.",
        "When did they complete the steeple?",
        "They completed the steeple in the year",
    ),
    (
        "The prisoner's cell bears the number {}.",
        "In which room is the captive kept?",
        "The captive is kept in room number",
    ),
    (
        "The baker sold {} loaves on that morning.",
        "How much bread did the man of the bakery sell at dawn?",
        "The number of breads he sold at dawn is",
    ),
    (
        "The telephone of the observatory is {}.",
        "What number must one dial to reach the astronomers?",
        "To reach the astronomers, one must dial",
    ),
]


def reworded(rng: random.Random):
    """A fact asked for in other words than its own, amid three others."""
    found = [(number(rng, 5), *words) for words in rng.sample(REWORDED, 4)]
    value, _, question, begin = rng.choice(found)
    lines = [says.format(value) for value, says, *_ in found]
    return lines, question + " Answer with the number that the text gives.", begin, f" {value}."


# ---- documents -----------------------------------------------------------------------------


def document(book: Book, n: int, seed: int) -> Document:
    """Return the seed-th document whose prompts have about n tokens, always the same one.

    passage asks for the text's own words again: 24 tokens are quoted, the next 32 wanted; quote
    wants the next 200 (176 at the end of a text), which lie in four or five blocks.
    continuation asks for the book's next 64 tokens, for perplexity.
    """
    rng = random.Random(f"{n} {seed}")
    tok = book.tok
    chain, other, example = assignments(rng)
    asked = {
        "fact": fact(rng),
        "lookalike": lookalike(rng),
        "values": values(rng),
        "chain": chain,
        "reworded": reworded(rng),
    }
    groups = [lines for lines, *_ in asked.values()] + [other[0]]
    for task in ("lookalike", "reworded"):
        rng.shuffle(asked[task][0])
    intro = (
        "Some facts, special magic numbers and chains of variable assignments are hidden within "
        "a text. Memorize them. An example of a chain:\n\n"
        + "\n".join([*example[0], example[1], example[2] + example[3]])
        + "\n\nThe text:\n"
    )
    parts = [(place, tok.encode(f"\n{line}\n")) for place, line in places(groups, rng)]
    taken = ROOM + len(tok.encode(intro)) + sum(len(part) for _, part in parts)
    running = book.prose(n - taken + 64, rng)
    ids = running[:-64]
    text = intro + tok.decode(put_in(parts, ids))
    questions = {}
    for task, (_, question, begin, answer) in asked.items():
        prompt = tok.chat(f"{text}\n\n{question}")
        prompt += tok.encode(begin, after=prompt)
        questions[task] = (prompt, tok.encode(answer, after=prompt))
    shared = common_start(questions)
    pause = tok.encode("\n\n* * *\n\n", after=shared)
    for task, n_wanted in {"passage": 32, "quote": 200}.items():
        start = rng.randrange(len(ids) // 20, len(ids) - 200)
        end = start + 24
        wanted = ids[end : end + n_wanted]
        questions[task] = (shared + pause + ids[start:end], wanted)
    questions["continuation"] = (shared, running[-64:])
    return Document(common_start(questions), questions)


def places(groups: list[list[str]], rng: random.Random) -> list[tuple[float, str]]:
    """Return (part of the text within 0..1, line); the lines of a group stay in their order."""
    placed = []
    for lines in groups:
        placed += zip(sorted(rng.random() for _ in lines), lines)
    return sorted(placed)


def put_in(parts: list[tuple[float, list[int]]], ids: list[int]) -> list[int]:
    """Return ids with the parts put in at their places."""
    out = []
    last = 0
    for place, part in parts:
        cut = int(len(ids) * (0.03 + 0.94 * place))
        out += ids[last:cut] + part
        last = cut
    return out + ids[last:]


def common_start(questions: dict[str, tuple[list[int], list[int]]]) -> list[int]:
    return os.path.commonprefix([prompt for prompt, _ in questions.values()])
