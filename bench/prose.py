"""Questions on real prose, for models that can read it: what is asked lies somewhere in a long text.

A task builds a prompt of about n tokens from a stretch of a book, with facts put in at random places, and the answer
that a model which read everything gives. The model is asked in its own chat format, and the answer's first words are
given, so that it has to name the fact and nothing else. Texts for choosing a rule and texts for reporting about it are
different parts of the book: even stretches of 2^16 characters for the one, odd ones for the other.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

CITIES = ("Paris London Tokyo Cairo Lima Oslo Rome Delhi Boston Berlin Madrid Vienna Dublin Lisbon Prague Warsaw "
          "Athens Havana Quito Seoul").split()  # fmt: skip
STRETCH = 2**16  # characters


class Sample(NamedTuple):
    prompt: list[int]
    answer: list[int]
    wanted: list[list[int]]  # what of the answer stands in the text, as ids


class Book:
    """A text and a tokenizer; `part` 0 is for choosing, 1 for reporting."""

    def __init__(self, text: str, tok, part: int):
        pieces = [text[at : at + STRETCH] for at in range(part * STRETCH, len(text), 2 * STRETCH)]
        self.tok, self.pieces = tok, [piece for piece in pieces if len(piece) == STRETCH]

    def prose(self, n: int, rng: random.Random) -> list[int]:
        """Return n tokens of running text; a long one goes on with another stretch."""
        ids: list[int] = []
        while len(ids) < n:
            piece = rng.choice(self.pieces)
            start = piece.index("\n", rng.randrange(STRETCH // 2)) + 1
            ids += self.tok.encode(piece[start : start + 5 * (n - len(ids)) + 1000])
        return ids[:n]

    def with_facts(self, facts: list[str], n: int, rng: random.Random) -> str:
        """Return about n tokens of prose with each fact in a line of its own, in the given order."""
        parts = [self.tok.encode(f"\n{fact}\n") for fact in facts]
        ids = self.prose(n - sum(map(len, parts)), rng)
        cuts = sorted(rng.randrange(len(ids) // 20, len(ids) * 19 // 20) for _ in facts)
        out, last = [], 0
        for part, cut in zip(parts, cuts):
            out, last = out + ids[last:cut] + part, cut
        return self.tok.decode(out + ids[last:])

    def asked(self, text: str, question: str, begin: str, answer: str, wanted: list[str]) -> Sample:
        """Ask after the text in the model's chat format, with the answer's first words."""
        prompt = self.tok.chat(f"{text}\n\n{question}") + self.tok.encode(begin)
        return Sample(prompt, self.tok.encode(answer), [self.tok.encode(w) for w in wanted])


NUMBER = "One of the special magic numbers for {} is: {}."
INTRO = "Some special magic numbers are hidden within the following text. Make sure to memorize them.\n"


def number(rng: random.Random, digits: int = 7) -> str:
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def fact(book: Book, n: int, rng: random.Random, others: int = 0) -> Sample:
    """One number of one city."""
    cities = rng.sample(CITIES, 1 + others)
    facts = [NUMBER.format(city, number(rng)) for city in cities]
    asked = rng.randrange(len(cities))
    city, value = cities[asked], facts[asked].split(": ")[1].rstrip(".")
    question = f"What is the special magic number for {city} mentioned in the provided text?"
    begin = f"The special magic number for {city} mentioned in the provided text is:"
    return book.asked(INTRO + book.with_facts(facts, n - 120, rng), question, begin, f" {value}.", [value])


def lookalike(book: Book, n: int, rng: random.Random) -> Sample:
    """The number of one city, where three other cities have theirs."""
    return fact(book, n, rng, others=3)


def values(book: Book, n: int, rng: random.Random) -> Sample:
    """All three numbers of one city, where another city has two."""
    city, other = rng.sample(CITIES, 2)
    found = [number(rng, 5) for _ in range(3)]
    facts = [NUMBER.format(city, value) for value in found]
    for _ in range(2):
        facts.insert(rng.randrange(len(facts) + 1), NUMBER.format(other, number(rng, 5)))
    question = f"What are all the special magic numbers for {city} mentioned in the provided text?"
    begin = f"The special magic numbers for {city} mentioned in the provided text are:"
    return book.asked(INTRO + book.with_facts(facts, n - 120, rng), question, begin, f" {', '.join(found)}.", found)


def chain(book: Book, n: int, rng: random.Random) -> Sample:
    """Variables that get one value from another, amid a second such chain; an example first, as the model is small."""
    names = rng.sample([f"{a}{b}{c}" for a in "BCDFGKLM" for b in "AEIOU" for c in "NPRSTVXZ"], 9)
    values = [number(rng, 5) for _ in range(3)]
    chains = [[f"VAR {a} = {value}", f"VAR {b} = VAR {a} ", f"VAR {c} = VAR {b} "]
              for value, a, b, c in zip(values, names[::3], names[1::3], names[2::3])]  # fmt: skip
    hidden = sorted((i + rng.random(), line) for part in chains[:2] for i, line in enumerate(part))

    def ask(i: int) -> tuple[str, str, str]:
        question = f"Question: Find all variables that are assigned the value {values[i]} in the text above."
        begin = (f"Answer: According to the chain of variable assignments in the text above, 3 variables are assigned "
                 f"the value {values[i]}, they are:")  # fmt: skip
        return question, begin, " " + " ".join(names[3 * i : 3 * i + 3])

    text = "Memorize and track the chains of variable assignments hidden in the following text.\n"
    example = "\n".join([text, *chains[2], ask(2)[0], ask(2)[1] + ask(2)[2]]) + "\n\n"
    question, begin, answer = ask(0)
    return book.asked(example + text + book.with_facts([line for _, line in hidden], n - 300, rng), question, begin,
                      answer, chains[0])  # fmt: skip


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


def reworded(book: Book, n: int, rng: random.Random) -> Sample:
    """A fact asked for in other words than its own, amid three others."""
    picked = rng.sample(REWORDED, 4)
    found = [number(rng, 5) for _ in picked]
    asked = rng.randrange(4)
    _, question, begin = picked[asked]
    text = book.with_facts([says.format(value) for (says, *_), value in zip(picked, found)], n - 100, rng)
    return book.asked(
        text, question + " Answer with the number that the text gives.", begin, f" {found[asked]}.", [found[asked]]
    )


def passage(book: Book, n: int, rng: random.Random) -> Sample:
    """The text's own words again: 24 of them are quoted at the end, the next 32 are wanted."""
    ids = book.prose(n - 40, rng)
    at = rng.randrange(len(ids) // 20, len(ids) - 200)
    return Sample(
        ids + book.tok.encode("\n\n* * *\n\n") + ids[at : at + 24], ids[at + 24 : at + 56], [ids[at : at + 56]]
    )


def going_on(book: Book, n: int, rng: random.Random) -> Sample:
    """What the book says next, 64 tokens of it: for perplexity."""
    ids = book.prose(n + 64, rng)
    return Sample(ids[:n], ids[n:], [])


TASKS: dict[str, Callable] = {
    "fact": fact, "lookalike": lookalike, "values": values, "chain": chain, "reworded": reworded, "passage": passage,
    "continuation": going_on,
}  # fmt: skip


def make(book: Book, task: str, n: int, seed: int) -> Sample:
    """Return the seed-th sample of a task, of about n prompt tokens; the same for the same arguments."""
    return TASKS[task](book, n, random.Random(f"{task} {n} {seed}"))
