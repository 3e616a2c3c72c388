"""Questions on real prose: the answer lies somewhere in a long text.

A document is a stretch of a book with the facts of all tasks put in at random places; each task
asks for its own, and the others' distract. The model is asked in its own chat format, and the
answer's first words are given, so that it has to name the fact and nothing else. All prompts of
a document begin alike, so a dense run of this beginning is shared. Texts for choosing a rule
and texts for reporting about it are different parts of the book: even stretches of 2^16
characters for choosing, odd ones for reporting.
"""

import os
import random
from typing import NamedTuple

TASKS = "fact", "lookalike", "values", "chain", "reworded", "passage", "continuation"
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
        pieces = [text[at : at + STRETCH] for at in range(part * STRETCH, len(text), 2 * STRETCH)]
        self.tok, self.pieces = tok, [piece for piece in pieces if len(piece) == STRETCH]
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
    door, value = rng.choice(DOORS), number(rng)
    begin = f"The access code of the {door} mentioned in the provided text is:"
    question = f"What is the access code of the {door} mentioned in the provided text?"
    return [f"The access code of the {door} is: {value}."], question, begin, f" {value}."


def lookalike(rng: random.Random):
    """The number of one city, where three other cities have theirs."""
    found = {city: number(rng) for city in rng.sample(CITIES, 4)}
    city = rng.choice(list(found))
    question = f"What is the special magic number for {city} mentioned in the provided text?"
    begin = f"The special magic number for {city} mentioned in the provided text is:"
    lines = [f"One of the special magic numbers for {c} is: {value}." for c, value in found.items()]
    return lines, question, begin, f" {found[city]}."


def values(rng: random.Random):
    """All three numbers of one person, where another has two."""
    name, other = rng.sample(PEOPLE, 2)
    found = [number(rng, 5) for _ in range(3)]
    lines = [f"One of the lucky numbers of {name} is: {value}." for value in found]
    for _ in range(2):
        lines.insert(
            rng.randrange(len(lines) + 1),
            f"One of the lucky numbers of {other} is: {number(rng, 5)}.",
        )
    question = f"What are all the lucky numbers of {name} mentioned in the provided text?"
    begin = f"The lucky numbers of {name} mentioned in the provided text are:"
    return lines, question, begin, f" {', '.join(found)}."


def assignments(rng: random.Random) -> list[tuple[list[str], str, str, str]]:
    """Three tasks, each a chain of variables that get one value from another."""
    names = rng.sample([f"{a}{b}{c}" for a in "BCDFGKLM" for b in "AEIOU" for c in "NPRSTVXZ"], 9)
    chains = []
    for a, b, c in zip(names[::3], names[1::3], names[2::3]):
        value = number(rng, 5)
        lines = [f"VAR {a} = {value}", f"VAR {b} = VAR {a} ", f"VAR {c} = VAR {b} "]
        question = (
            f"Question: Find all variables that are assigned the value {value} in the text above."
        )
        begin = (
            f"Answer: According to the chain of variable assignments in the text above, "
            f"3 variables are assigned the value {value}, they are:"
        )
        chains.append((lines, question, begin, f" {a} {b} {c}"))
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

    passage asks for the text's own words again: 24 tokens are quoted, the next 32 wanted.
    continuation asks for the book's next 64 tokens, for perplexity.
    """
    rng, tok = random.Random(f"{n} {seed}"), book.tok
    chain, other, example = assignments(rng)
    asked = {
        "fact": fact(rng),
        "lookalike": lookalike(rng),
        "values": values(rng),
        "chain": chain,
        "reworded": reworded(rng),
    }
    groups = [lines for lines, *_ in asked.values()] + [other[0]]
    for lines in (asked["lookalike"][0], asked["reworded"][0]):
        rng.shuffle(lines)
    placed = sorted(
        (at, line)
        for lines in groups
        for at, line in zip(sorted(rng.random() for _ in lines), lines)
    )
    intro = (
        "Some facts, special magic numbers and chains of variable assignments are hidden within "
        "a text. Memorize them. An example of a chain:\n\n"
        + "\n".join([*example[0], example[1], example[2] + example[3]])
        + "\n\nThe text:\n"
    )
    parts = [(at, tok.encode(f"\n{line}\n")) for at, line in placed]
    ids = book.prose(
        n - ROOM - len(tok.encode(intro)) - sum(len(part) for _, part in parts) + 64, rng
    )
    ids, after = ids[:-64], ids[-64:]
    out, last = [], 0
    for at, part in parts:
        cut = int(len(ids) * (0.03 + 0.94 * at))
        out, last = out + ids[last:cut] + part, cut
    text = intro + tok.decode(out + ids[last:])
    prompts = {
        task: (tok.chat(f"{text}\n\n{question}") + tok.encode(begin), tok.encode(answer))
        for task, (_, question, begin, answer) in asked.items()
    }
    shared = os.path.commonprefix([prompt for prompt, _ in prompts.values()])
    at = rng.randrange(len(ids) // 20, len(ids) - 200)
    quoted = shared + tok.encode("\n\n* * *\n\n") + ids[at : at + 24]
    prompts |= {"passage": (quoted, ids[at + 24 : at + 56]), "continuation": (shared, after)}
    return Document(os.path.commonprefix([prompt for prompt, _ in prompts.values()]), prompts)
