"""Documents that read like an archive, with facts hidden in them and questions at the end.

Everything is grammar-generated from a seed, so a document of any length can be made
again by anybody. A document is mostly filler ("the old clerk waited near the stone
wall at dusk."); among it lie facts ("the code of gavoki is 7342."), and a question
is the beginning of a sentence that the model has to finish. The kinds of question:

  single     one number asked, only a few facts in the document
  lookalike  one number asked among many facts worded the same way
  multi      several questions about one document of many mixed facts
  two_hop    "with the code, the owner of X is": the answer goes on from the name found to a
             second fact in another place ("gavoki is 7342")
  three_hop  the same with one more link
  latest     a seal that was updated several times: the last value counts
  mixed      all of the above in one document (this is what training uses)
"""

import random
from collections import namedtuple

# fact_spans: [(start, end)] character ranges in the document, in the order they are needed.
Question = namedtuple("Question", "text answer fact_spans kind")
Sample = namedtuple("Sample", "document questions")

KINDS = ["single", "lookalike", "multi", "two_hop", "three_hop", "latest"]

# Names are three syllables: with 30 syllables, 27,000 names, and many that differ in
# one syllable only, so that a name has to be read whole.
SYLLABLES = [c + v for c in "zvkjbg" for v in "aeiou"]
ROLES = ["owner", "pilot", "warden"]  # facts whose value is a name
NUMBERS = ["code", "mark", "lot"]  # facts whose value is a number


def words(text):
    """Return what stands between commas."""
    return [" ".join(part.split()) for part in text.split(",")]


SUBJECTS = words(
    """
    the clerk, the old boat, a young guard, the night watch, the miller, the north wind, a
    tall man, the crew, the sailor, the postman, a small child, the teacher, the storm, a
    stranger, the doctor
    """
)
VERBS = words(
    """
    walked past, waited near, looked at, spoke about, returned to, slept near, painted, left,
    crossed, wrote about, sat near, watched
    """
)
OBJECTS = words(
    """
    the harbour, the stone wall, the empty hall, the river, the mill, the first house, the old
    tower, the road, the forest, the winter market, the church, the last train, the tall
    trees, the school, the small island
    """
)
TAILS = words(
    """
    in the morning, before the rain, after supper, without a word, at dusk, for a while, in
    the snow, at noon, with some others, as on other days, in the evening, in the summer, last
    winter, on sunday, once more
    """
)
GOODS = words(
    """
    salt, oats, wool, tin, corn, tea, wood, sand, rope, fish
    """
)


def name(rng):
    return "".join(rng.choice(SYLLABLES) for _ in range(3))


def number(rng):
    return "".join(rng.choice("0123456789") for _ in range(4))


def filler(rng):
    """One sentence that answers nothing."""
    pick = rng.choice
    kind = rng.random()
    if kind < 0.55:
        return f"{pick(SUBJECTS)} {pick(VERBS)} {pick(OBJECTS)} {pick(TAILS)}."
    if kind < 0.75:
        begin = f"{pick(TAILS)}, {pick(SUBJECTS)} {pick(VERBS)} {pick(OBJECTS)}"
        return f"{begin} and {pick(VERBS)} {pick(OBJECTS)}."
    if kind < 0.88:  # names and numbers outside of facts, so that their mere presence tells nothing
        return f"{name(rng)} {pick(VERBS)} {pick(OBJECTS)} {pick(TAILS)}."
    return f"{rng.randint(2, 999)} loads of {pick(GOODS)} were counted near {pick(OBJECTS)}."


def sentence(relation, key, value):
    return f"the {relation} of {key} is {value}."


class World:
    """The facts of one document: [(group, sentence)].

    A group is one or more facts made together, and the questions (`asks`) that they answer.
    """

    def __init__(self, rng):
        self.rng = rng
        self.facts = []
        self.asks = []
        self.groups = 0
        self.names = []  # that may get more facts
        self.taken = set()
        self.pairs = set()

    def new_name(self, reuse=True):
        new = name(self.rng)
        while new in self.taken:
            new = name(self.rng)
        self.taken.add(new)
        if reuse:
            self.names.append(new)
        return new

    def free_pair(self, relations):
        """A (relation, key) that has no value yet; now and then the key is a known name,
        so that the relation matters too."""
        while True:
            relation = self.rng.choice(relations)
            if self.names and self.rng.random() < 0.3:
                key = self.rng.choice(self.names)
            else:
                key = self.new_name()
            if (relation, key) not in self.pairs:
                self.pairs.add((relation, key))
                return relation, key

    def add(self, text):
        self.facts.append((self.groups, text))
        return len(self.facts) - 1

    def add_number(self, kind="lookalike", relations=NUMBERS):
        relation, key = self.free_pair(relations)
        value = number(self.rng)
        fact = self.add(sentence(relation, key, value))
        self.asks.append((kind, f"the {relation} of {key} is", value, [fact]))
        self.groups += 1

    def add_chain(self, hops):
        """hops = 2: the owner of X is B, the code of B is 7342. The question names X only,
        so the place of the second fact is not known before the first was read."""
        relation, key = self.free_pair(ROLES)
        start = f"the {relation} of {key} is"
        later = []  # relations
        values = []
        facts = []
        for hop in range(hops):
            last = hop == hops - 1
            value = number(self.rng) if last else self.new_name(reuse=False)
            facts.append(self.add(sentence(relation, key, value)))
            values.append(value)
            if hop > 0:
                later.append(f"the {relation}")
            if not last:
                key = value
                relation = self.rng.choice(NUMBERS if hop == hops - 2 else ROLES)
        self.asks.append(("lookalike", start, values[0], facts[:1]))
        kind = {2: "two_hop", 3: "three_hop"}[hops]
        self.asks.append((kind, f"with {' and '.join(later)}, {start}", " is ".join(values), facts))
        self.groups += 1

    def add_updates(self):
        key = self.new_name()
        for i in range(self.rng.randint(2, 4)):
            value = number(self.rng)
            fact = self.add(f"update {i + 1}: the seal of {key} is {value}.")
        self.asks.append(("latest", f"the last seal of {key} is", value, [fact]))
        self.groups += 1


def make(kind, n_tokens, seed, tokenizer, n_questions=None, depth=None, n_facts=None, weights=None):
    """One document of at most (and nearly) n_tokens tokens, and questions about it.

    depth (0..1) is where the fact that answers the first question lies; by default
    anywhere. tokenizer needs encode(text) -> list of ids. Questions are drawn with
    replacement: asked once each, a model could guess the last ones by elimination.
    weights, for kind "mixed": how often each kind is asked, by name."""
    rng = random.Random(f"{kind}/{n_tokens}/{seed}")

    def cost(text):
        return len(tokenizer.encode(text))

    if n_questions is None:
        n_questions = 4 if kind == "multi" else 1
    if n_facts is None:
        n_facts = 4 if kind == "single" else max(4, min(64, n_tokens // 24))
    world = World(rng)
    relation = rng.choice(NUMBERS)
    document = f"archive of the harbour, volume {rng.randint(1, 99)}."
    budget = n_tokens - cost(document)
    items, spent = make_facts(world, kind, relation, n_facts, budget, cost)
    chosen = choose_questions(world, kind, n_questions, weights)
    items += make_filler(rng, budget - spent, cost)
    items.sort(key=lambda item: item[0])
    if depth is not None:
        move_to_depth(items, depth, chosen[0], world)
    spans = {}  # of the facts
    for _, text, fact in items:
        if fact is not None:
            spans[fact] = (len(document) + 1, len(document) + len(text))
        document += text
    questions = []
    for asked_kind, text, answer, facts in chosen:
        questions.append(Question(text, answer, [spans[fact] for fact in facts], asked_kind))
    return Sample(document, questions)


def gap(rng):
    """What stands before a sentence."""
    return "\n" if rng.random() < 0.15 else " "


def make_facts(world, kind, relation, n_facts, budget, cost):
    """The facts, as many as fit in 85 % of the document: items [sort key, text, fact number], and
    the tokens they take. An item's number is None where it is no fact (see make_filler)."""
    rng = world.rng
    items = []
    spent = 0
    kept = 0  # facts
    while len(items) < n_facts:
        asks_before = len(world.asks)
        add_group(world, kind, relation)
        new = []
        for fact in range(kept, len(world.facts)):
            text = gap(rng) + world.facts[fact][1]
            new.append([rng.random(), text, fact])
        if "update" in new[0][1]:  # updates stay in order
            for item, key in zip(new, sorted(item[0] for item in new)):
                item[0] = key
        price = sum(cost(text) for _, text, _ in new)
        if items and spent + price > 0.85 * budget:
            del world.asks[asks_before:]
            break
        spent += price
        kept = len(world.facts)
        items += new
    return items, spent


def add_group(world, kind, relation):
    """Add the next group of facts that a document of this kind has."""
    draw = world.rng.random()
    mixed = kind in ("mixed", "multi")
    if kind == "single" or kind == "lookalike":
        world.add_number(kind, [relation] if kind == "lookalike" else NUMBERS)
    elif kind == "two_hop" or (mixed and draw < 0.3):
        world.add_chain(2)
    elif kind == "three_hop" or (mixed and draw < 0.4):
        world.add_chain(3)
    elif kind == "latest" or (mixed and draw < 0.55):
        world.add_updates()
    else:
        world.add_number()


def choose_questions(world, kind, n, weights):
    rng = world.rng
    if kind not in ("mixed", "multi"):
        asks = [ask for ask in world.asks if ask[0] == kind]
        return [rng.choice(asks) for _ in range(n)]
    by_kind = {}
    for ask in world.asks:
        by_kind.setdefault(ask[0], []).append(ask)
    names = sorted(by_kind)
    often = [(weights or {}).get(name, 1.0) for name in names]
    if sum(often) == 0:
        often = [1.0] * len(often)
    return [rng.choice(by_kind[rng.choices(names, often)[0]]) for _ in range(n)]


def make_filler(rng, room, cost):
    """Items of filler, until four sentences did not fit into the tokens that are left."""
    items = []
    misses = 0
    while misses < 4:
        text = gap(rng) + filler(rng)
        price = cost(text)
        if price <= room:
            room -= price
            items.append([rng.random(), text, None])
        else:
            misses += 1
    return items


def move_to_depth(items, depth, question, world):
    """Move the fact that answers a question to this part (0..1) of the text."""
    total = sum(len(text) for _, text, _ in items)
    so_far = 0
    for item in items:  # sort keys become places in the text: 0 .. 1
        item[0] = so_far / total
        so_far += len(item[1])
    target = question[3][0]
    if question[0] == "latest":  # the earlier updates must stay before the last one
        group = world.facts[target][0]
        for item in items:
            if item[2] is not None and world.facts[item[2]][0] == group:
                item[0] *= depth
    moved = next(item for item in items if item[2] == target)
    moved[0] = depth
    items.sort(key=lambda item: item[0])


def prompt(document, question):
    """What the model is given; it continues with " answer\\n"."""
    return document + "\nquestion: " + question


def build_ids(sample, tokenizer, bos=1):
    """Token ids of document, questions and answers, and for each question where its
    answer lies: ids, [(start, end)], the end of line that closes the answer included.
    (The pieces may be encoded one by one: no piece crosses a space or an end of line.)"""
    ids = [bos] + tokenizer.encode(sample.document + "\n")
    where = []
    for question in sample.questions:
        ids += tokenizer.encode("question: " + question.text)
        start = len(ids)
        ids += tokenizer.encode(" " + question.answer + "\n")
        where.append((start, len(ids)))
    return ids, where


if __name__ == "__main__":  # python tasks.py > document.txt: the document of the default run
    from pathlib import Path

    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(
        model_file=str(Path(__file__).parent / "tokenizer.model")
    )
    print(make("lookalike", 8150, 1, pieces, n_facts=12).document)
