"""Real text as material for tasks: paragraphs, words and constants of a document."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from random import Random

_PARAGRAPH_CHARACTERS = 1200
_CONSTANT = re.compile(
    r"""^(?P<before>[ \t]*(?:
        \#[ \t]*define[ \t]+(?P<macro>[A-Za-z_]\w{3,})[ \t]+
        | (?:(?:static|export|public|private|final|const|constexpr|let|var|val|int|long)[ \t]+)*
          (?P<name>[A-Za-z_]\w{3,})[ \t]*(?::[ \t]*\w+[ \t]*)?=[ \t]*
    ))(?P<value>0[xX][0-9A-Fa-f]+|\d+)(?P<after>[ \t]*(?:[;,#/].*)?)$""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Constant:
    """A line of source code that gives an integer to a name: `before` + digits + `after`."""

    name: str
    before: str
    after: str


@dataclass(frozen=True)
class Material:
    """A document, and a text to fall back on: what fills a task's context is taken from here.

    document is the user's; extra follows it where paragraphs run out, and lends its words.
    """

    document: str
    extra: str

    @cached_property
    def paragraphs(self) -> tuple[str, ...]:
        """Pieces of both texts of at most 1,200 characters, each once."""
        return tuple(dict.fromkeys(cut_paragraphs(self.document) + cut_paragraphs(self.extra)))

    @cached_property
    def words(self) -> tuple[str, ...]:
        """Plain lower-case words of 5 to 9 letters in both texts, sorted."""
        return tuple(sorted(set(re.findall(r"\b[a-z]{5,9}\b", self.document + "\n" + self.extra))))

    @cached_property
    def source_lines(self) -> tuple[str, ...]:
        """The document's lines."""
        return tuple(self.document.splitlines())

    @cached_property
    def constants(self) -> dict[int, Constant]:
        """Integer constants that the document's lines define, by line."""
        found = ((number, find_constant(line)) for number, line in enumerate(self.source_lines))
        return {number: constant for number, constant in found if constant is not None}

    def filler(self, random: Random, characters: int) -> list[str]:
        """Consecutive paragraphs, `characters` long in all, from a random one on; none comes twice, the last is cut.

        ValueError if both texts together are shorter.
        """
        room = characters
        start = random.randrange(len(self.paragraphs)) if self.paragraphs else 0
        taken: list[str] = []
        for paragraph in self.paragraphs[start:] + self.paragraphs[:start]:
            if len(paragraph) + 2 > room:
                rest = paragraph[: max(0, room - 2)].rpartition(" ")[0].rstrip()
                return taken + [rest] * (bool(rest) and rest not in taken)
            taken.append(paragraph)
            room -= len(paragraph) + 2
        raise ValueError(
            f"the document and the text beside it hold {characters - room} characters, fewer than the {characters} "
            "that a context of this length needs (no paragraph is used twice); give a longer document or lower --tokens"
        )


def cut_paragraphs(text: str) -> list[str]:
    """The parts of a text between blank lines; those above 1,200 characters are cut at line ends, else at blanks."""
    pieces: list[str] = []
    for block in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n").replace("\r", "\n")):
        rest = block.strip("\n").rstrip()
        while len(rest) > _PARAGRAPH_CHARACTERS:
            line_end = rest.rfind("\n", 1, _PARAGRAPH_CHARACTERS)
            cut = line_end if line_end > 0 else rest.rfind(" ", 1, _PARAGRAPH_CHARACTERS)
            cut = cut if cut > 0 else _PARAGRAPH_CHARACTERS
            pieces.append(rest[:cut].rstrip())
            rest = rest[cut:].lstrip("\n")
        pieces.append(rest)
    return [piece for piece in pieces if piece.strip()]


def find_constant(line: str) -> Constant | None:
    """The integer constant that a line of source code defines: `#define NAME 7`, `NAME = 7`, `const int NAME = 7;`."""
    found = _CONSTANT.match(line)
    if found is None:
        return None
    return Constant(found["macro"] or found["name"], found["before"], found["after"])
