"""Tasks with one right answer, made from a seed and real text: pure functions, nothing here knows a model.

Every context holds distractors of the form of what is asked for, so that finding the form is not enough, and no
paragraph twice. The kinds are those of RULER (arXiv 2404.06654), written anew, with records and source code beside.
"""

from __future__ import annotations

import json
import re
import string
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from hga.evals.material import Material

T = TypeVar("T", int, str)

LEAST_CONSTANTS = 8
"""Integer constants that a stretch of source code must define to be asked about."""


@dataclass(frozen=True)
class Example:
    """A context, a question about it, and its answers.

    lead: how the answer begins, written for the model. form: a regular expression of what counts as a candidate in
    the reply. answer_tokens: no more need be written. depth: where in the context the first answer stands, from 0
    (its beginning) to 1.
    """

    task: str
    context: str
    question: str
    lead: str
    answers: tuple[str, ...]
    form: str
    answer_tokens: int

    @property
    def depth(self) -> float:
        """See the class."""
        return min(self.context.find(answer) for answer in self.answers) / len(self.context)


def candidates(example: Example, reply: str) -> list[str]:
    """What in a reply has the answers' form, each once, in order."""
    return list(dict.fromkeys(re.findall(example.form, reply)))


def grade(example: Example, reply: str) -> float:
    """The share of the answers among the first candidates of a reply, as many as there are answers.

    So naming everything does not help, and a wrong first answer counts against a single right one.
    """
    named = candidates(example, reply)[: len(example.answers)]
    return len(set(named) & set(example.answers)) / len(example.answers)


def needle(material: Material, random: Random, characters: int) -> Example:
    """One sentence gives the number of a key; three others give numbers of other keys."""
    return _needles("needle", material, random, characters, keys=4, values=1)


def needle_keys(material: Material, random: Random, characters: int) -> Example:
    """As `needle`, among one key in every thousand characters (at least 8)."""
    return _needles("needle_keys", material, random, characters, keys=max(8, characters // 1000), values=1)


def needle_values(material: Material, random: Random, characters: int) -> Example:
    """Four sentences give numbers of one key, and each of three other keys has four numbers too."""
    return _needles("needle_values", material, random, characters, keys=4, values=4)


def variables(material: Material, random: Random, characters: int) -> Example:
    """Chains of assignments through a text: which variables hold the number that heads one of the chains?"""
    length, chains = 4, 3
    names = _distinct(random, chains * length, lambda: _letters(random, 5))
    numbers = _numbers(random, chains, 5)
    lines: list[list[str]] = []
    for chain in range(chains):
        own = names[chain * length : (chain + 1) * length]
        sources = [str(numbers[chain]), *(f"VAR {name}" for name in own)]
        lines.append([f"VAR {name} = {source}" for name, source in zip(own, sources, strict=False)])
    # A chain's lines stay in order; the chains are mixed.
    turns = random.sample([chain for chain in range(chains) for _ in range(length)], chains * length)
    mixed = [lines[chain].pop(0) for chain in turns]
    asked = random.randrange(chains)
    return Example(
        "variables",
        _scatter(material.filler(random, characters - sum(len(line) + 2 for line in mixed)), mixed, random),
        f"Which variables hold the value {numbers[asked]}? Follow the assignments, directly or through other "
        f"variables, and name all {length}.",
        f"The {length} variables that hold the value {numbers[asked]} are",
        tuple(names[asked * length : (asked + 1) * length]),
        r"\b[A-Z]{5}\b",
        answer_tokens=40,
    )


def common_words(material: Material, random: Random, characters: int) -> Example:
    """A list of words: which come most often? Common ones come ten times as often as the others."""
    common = 5
    shuffled = random.sample(material.words, len(material.words))
    most, others = shuffled[:common], shuffled[common:]
    # A list too long for the words that there are repeats all of them, so that the shares stay.
    once = sum(map(_listed_characters, others)) + 10 * sum(map(_listed_characters, most))
    times = -(-characters // once)
    listed = most * (10 * times)
    room = characters - sum(map(_listed_characters, listed))
    for word in others:
        room -= times * _listed_characters(word)
        if room < 0:
            break
        listed += [word] * times
    random.shuffle(listed)
    return Example(
        "common_words",
        "\n".join(f"{number}. {word}" for number, word in enumerate(listed, 1)),
        f"Which {common} words come most often in the numbered list?",
        f"The {common} words that come most often are:",
        tuple(most),
        r"\b[a-z]{5,9}\b",
        answer_tokens=40,
    )


def records(material: Material, random: Random, characters: int) -> Example:
    """JSON records with a note from the text in each; asked is one field of one record."""
    lines: list[str] = []
    notes = iter(textwrap.wrap(" ".join(material.filler(random, characters + 1200)), 300))
    identities, codes, room = set[str](), set[int](), characters
    while True:
        record = {
            "id": _new(identities, lambda: _letters(random, 3) + f"-{random.randrange(1000, 10_000)}"),
            "name": " ".join(random.choice(material.words).capitalize() for _ in range(2)),
            "year": random.randrange(1900, 2025),
            "code": _new(codes, lambda: random.randrange(100_000, 1_000_000)),
            "tags": random.sample(material.words, 3),
            "note": next(notes),
        }
        line = json.dumps(record, ensure_ascii=False)
        if len(line) + 1 > room:
            break
        lines.append(line)
        room -= len(line) + 1
    if len(lines) < 2:
        raise ValueError(f"{characters} characters hold {len(lines)} records; raise --tokens")
    asked = json.loads(random.choice(lines))
    return Example(
        "records",
        "\n".join(lines),
        f"What is the code of the record whose id is {asked['id']}?",
        f"The code of the record {asked['id']} is",
        (str(asked["code"]),),
        r"\b\d{6}\b",
        answer_tokens=16,
    )


def code(material: Material, random: Random, characters: int) -> Example:
    """A stretch of the document's source code: what is the value of a constant defined in it?

    Every integer constant in the stretch gets a new value of five digits, so that having read a famous file before
    does not help. ValueError if the document has no stretch with eight constants.
    """
    lines, constants = material.source_lines, material.constants
    for anchor in random.sample(sorted(constants), len(constants)):
        first, last = _stretch(lines, anchor, random.random(), characters)
        inside = [number for number in constants if first <= number <= last]
        names = Counter(constants[number].name for number in inside)
        if (
            len(names) >= LEAST_CONSTANTS
            and names[constants[anchor].name] == 1
            and (first > 0 or last + 1 < len(lines))
        ):
            break
    else:
        raise ValueError(
            f"the document has {len(constants)} lines that define an integer constant and no stretch of {characters} "
            "characters with eight of them; task 'code' needs a source file, longer than the context"
        )
    values = dict(zip(inside, _numbers(random, len(inside), 5), strict=True))
    shown = [
        f"{constants[n].before}{values[n]}{constants[n].after}" if n in values else lines[n]
        for n in range(first, last + 1)
    ]
    name = constants[anchor].name
    return Example(
        "code",
        "\n".join(shown),
        f"What is the value of {name} in this source code?",
        f"The value of {name} is",
        (str(values[anchor]),),
        r"\b\d{5}\b",
        answer_tokens=16,
    )


TASKS: dict[str, Callable[[Material, Random, int], Example]] = {
    "needle": needle,
    "needle_keys": needle_keys,
    "needle_values": needle_values,
    "variables": variables,
    "common_words": common_words,
    "records": records,
    "code": code,
}
"""Tasks by name. Each makes an example whose context is at most so many characters long."""


def _listed_characters(word: str) -> int:
    return len(word) + len("12345. \n")


def _needles(task: str, material: Material, random: Random, characters: int, keys: int, values: int) -> Example:
    names = _distinct(random, keys, lambda: " ".join(random.sample(material.words, 2)))
    numbers = _numbers(random, keys * values, 7)
    sentences = [f"The secret number of {names[i // values]} is {number}." for i, number in enumerate(numbers)]
    asked = random.randrange(keys)
    answers = tuple(str(number) for number in numbers[asked * values : (asked + 1) * values])
    random.shuffle(sentences)
    several = values > 1
    subject = f"{values} secret numbers" if several else "secret number"
    return Example(
        task,
        _scatter(material.filler(random, characters - sum(len(s) + 2 for s in sentences)), sentences, random),
        f"What {'are the' if several else 'is the'} {subject} of {names[asked]}?",
        f"The {subject} of {names[asked]} {'are' if several else 'is'}",
        answers,
        r"\b\d{7}\b",
        answer_tokens=16 * values,
    )


def _scatter(paragraphs: list[str], lines: list[str], random: Random) -> str:
    """The lines, in their order, as paragraphs of their own at random places between others."""
    mixed = list(paragraphs)
    places = sorted(random.choices(range(len(mixed) + 1), k=len(lines)))
    for place, line in zip(reversed(places), reversed(lines), strict=True):
        mixed.insert(place, line)
    return "\n\n".join(mixed)


def _stretch(lines: Sequence[str], anchor: int, share_before: float, characters: int) -> tuple[int, int]:
    """First and last of the consecutive lines around one: so many characters in all, this share of them before it."""
    growth = len("\n12345")  # a value may become so much longer
    first = last = anchor
    room = characters - len(lines[anchor]) - growth
    before = room * share_before
    while first > 0 and (cost := len(lines[first - 1]) + growth) <= before:
        first, before, room = first - 1, before - cost, room - cost
    while last + 1 < len(lines) and (cost := len(lines[last + 1]) + growth) <= room:
        last, room = last + 1, room - cost
    while first > 0 and (cost := len(lines[first - 1]) + growth) <= room:
        first, room = first - 1, room - cost
    return first, last


def _distinct(random: Random, count: int, draw: Callable[[], str]) -> list[str]:
    drawn: set[str] = set()
    return [_new(drawn, draw) for _ in range(count)]


def _new(taken: set[T], draw: Callable[[], T]) -> T:
    while (value := draw()) in taken:
        pass
    taken.add(value)
    return value


def _letters(random: Random, count: int) -> str:
    return "".join(random.choices(string.ascii_uppercase, k=count))


def _numbers(random: Random, count: int, digits: int) -> list[int]:
    """Different numbers of so many digits."""
    return random.sample(range(10 ** (digits - 1), 10**digits), count)
