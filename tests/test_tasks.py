"""Tasks: what is asked for stands where it should, among others of its form, and nothing is repeated."""

import json
import re
from collections import Counter
from importlib.resources import files
from random import Random

import pytest
import torch
from tiny_model import byte_tokenizer, tiny_model

import hga
from hga.evals.exam import answer, check_tasks, encode, make_example
from hga.evals.material import Constant, Material, cut_paragraphs, find_constant
from hga.evals.tasks import TASKS, Example, candidates, grade

NOVEL = (files("hga") / "data" / "thursday.txt").read_text(encoding="utf-8")
SOURCE = "\n".join(
    f"#define LIMIT_{number} {number}  /* of part {number} */\nint part_{number}(void) {{ return LIMIT_{number}; }}\n"
    for number in range(200)
)
MATERIAL = Material(SOURCE, NOVEL)
CHARACTERS = 9001


def example(task: str, index: int = 0, characters: int = CHARACTERS, material: Material = MATERIAL) -> Example:
    return TASKS[task](material, Random(f"{task} 7 {index}"), characters)


@pytest.mark.parametrize("task", TASKS)
def test_every_example_can_be_answered_from_its_context(task):
    for index in range(8):
        made = example(task, index)
        assert made.task == task
        assert made.context.isprintable() or "\n" in made.context
        assert 0.7 * CHARACTERS < len(made.context) <= CHARACTERS
        assert len(set(made.answers)) == len(made.answers) > 0
        for right in made.answers:
            assert re.fullmatch(made.form, right)
            assert re.search(rf"\b{right}\b", made.context)
            assert right not in made.question + made.lead
        assert 0 <= made.depth < 1
        assert grade(made, " " + ", ".join(made.answers) + ".") == 1


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_makes_the_same_example(task):
    assert example(task) == example(task)
    assert example(task) != example(task, 1)


@pytest.mark.parametrize("task", sorted(set(TASKS) - {"common_words"}))
def test_distractors_have_the_form_of_the_answers(task):
    made = example(task, 3)
    others = set(re.findall(made.form, made.context)) - set(made.answers)
    assert len(others) >= {"needle": 3, "needle_keys": 8, "needle_values": 12, "variables": 8}.get(task, 7)


@pytest.mark.parametrize("task", sorted(set(TASKS) - {"common_words", "code"}))
def test_no_paragraph_comes_twice(task):
    for characters in (3000, 30_000):
        made = example(task, 1, characters)
        separator = "\n" if task == "records" else "\n\n"
        assert max(Counter(made.context.split(separator)).values()) == 1


@pytest.mark.parametrize("task", ["needle", "needle_keys", "needle_values"])
def test_needles_by_reading_them(task):
    made = example(task, 2)
    told: dict[str, list[str]] = {}
    for name, number in re.findall(r"The secret number of (\w+ \w+) is (\d+)\.", made.context):
        told.setdefault(name, []).append(number)
    asked = re.search(r"of (\w+ \w+)\?", made.question)[1]
    assert set(told[asked]) == set(made.answers)
    assert {len(numbers) for numbers in told.values()} == {len(made.answers)}


def test_variables_by_following_them():
    for index in range(10):
        made = example("variables", index)
        holds: dict[str, str] = {}
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", made.context):
            holds[name] = source if source.isdigit() else holds[source]  # a KeyError: used before it is set
        asked = re.search(r"value (\d+)\?", made.question)[1]
        assert {name for name, value in holds.items() if value == asked} == set(made.answers)
        assert len(set(holds.values())) == 3


@pytest.mark.parametrize("characters", [3000, 100_000])
def test_common_words_by_counting_them(characters):
    made = example("common_words", 0, characters)
    counts = Counter(re.findall(r"\d+\. (\w+)", made.context)).most_common()
    assert {word for word, _ in counts[:5]} == set(made.answers)
    assert counts[4][1] == 10 * counts[5][1]


def test_records_by_parsing_them():
    made = example("records", 4)
    read = [json.loads(line) for line in made.context.splitlines()]
    (asked,) = (record for record in read if record["id"] in made.question)
    assert (str(asked["code"]),) == made.answers
    assert len({record["id"] for record in read}) == len({record["code"] for record in read}) == len(read)
    assert all(len(record["note"]) > 50 for record in read)


def test_code_is_the_document_with_other_values():
    made = example("code", 5)
    name = re.search(r"value of (\w+) in", made.question)[1]
    assert f"#define {name} {made.answers[0]}  /* of part" in made.context
    assert re.sub(r"(#define \w+) \d+", r"\1", made.context) in re.sub(r"(#define \w+) \d+", r"\1", SOURCE)
    with pytest.raises(ValueError, match="has 0 lines that define an integer constant"):
        example("code", material=Material(NOVEL, ""))
    with pytest.raises(ValueError, match="has 7 lines"):
        example("code", material=Material("\n".join(f"PART_{n} = {n}" for n in range(7)), ""))


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("#define SIZE_MAX_ROWS 0x1F  // rows", "SIZE_MAX_ROWS"),
        ("  # define DEPTH 12", "DEPTH"),
        ("BUDGET = 2048", "BUDGET"),
        ("    limit: int = 3  # three", "limit"),
        ("static const int kWidth = 7;", "kWidth"),
        ("  KIND_TREE = 4,", "KIND_TREE"),
        ("Chapter 12", None),
        ("#define MASK (1 << 3)", None),
        ("x = 3", None),
        ("total = 3 + rest", None),
        ("if (count == 3) return", None),
        ("share = 0.5", None),
    ],
)
def test_constants_of_source_code(line, name):
    found = find_constant(line)
    assert (found and found.name) == name
    if found:
        digits = line[len(found.before) : len(line) - len(found.after)]
        assert int(digits, 0) >= 0
    assert find_constant("#define A_LONG_NAME 7 /* x */") == Constant("A_LONG_NAME", "#define A_LONG_NAME ", " /* x */")


def test_paragraphs():
    assert cut_paragraphs("one\r\ntwo\r\n \r\nthree\n\n\n") == ["one\ntwo", "three"]
    lines = [f"line {number} of a long block" for number in range(200)]
    assert "\n".join(cut_paragraphs("\n".join(lines))) == "\n".join(lines)
    for text in ("word " * 1000, "x" * 5000):
        pieces = cut_paragraphs(text)
        assert max(map(len, pieces)) <= 1200
        assert "".join("".join(pieces).split()) == "".join(text.split())


def test_a_document_too_short():
    with pytest.raises(ValueError, match=r"hold \d+ characters, fewer than the \d+"):
        example("needle", characters=100_000)
    with pytest.raises(ValueError, match="records"):
        example("records", characters=300)
    with pytest.raises(ValueError, match="longer than the context"):
        example("code", characters=40_000)


def test_grading():
    asked = Example("t", "1111 2222 3333", "?", ":", ("1111", "2222"), r"\b\d{4}\b", 9)
    assert grade(asked, " 2222 and 1111.") == 1
    assert grade(asked, "1111, 1111 and 2222") == 1
    assert grade(asked, "1111 3333 2222") == 0.5  # a third guess does not count
    assert grade(asked, "11112222") == grade(asked, "") == 0
    assert candidates(asked, "3333, 1111, 3333") == ["3333", "1111"]


def test_unknown_tasks():
    assert check_tasks(["needle", "code"]) == ["needle", "code"]
    with pytest.raises(ValueError, match="'haystack' is unknown; choose from needle"):
        check_tasks(["needle", "haystack"])
    with pytest.raises(ValueError, match="no task"):
        check_tasks([])


# ---- put to a model -----------------------------------------------------------------------------------


def test_prompts_are_as_long_as_asked_for():
    tokenizer = byte_tokenizer()
    for task in TASKS:
        made = make_example(tokenizer, MATERIAL, task, 5000, 1, 0)
        assert 4750 <= encode(tokenizer, made).shape[1] + made.answer_tokens <= 5000
        assert made == make_example(tokenizer, MATERIAL, task, 5000, 1, 0)
    with pytest.raises(ValueError, match="raise --tokens"):
        make_example(tokenizer, MATERIAL, "needle", 150, 1, 0)


def test_prompts_follow_the_chat_template():
    tokenizer = byte_tokenizer()
    made = example("needle", characters=1500)
    plain = tokenizer.decode(encode(tokenizer, made)[0])
    assert plain == f"{made.context}\n\n{made.question}\n{made.lead}"
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    assert tokenizer.decode(encode(tokenizer, made)[0]) == f"<user>{made.context}\n\n{made.question}<answer>{made.lead}"


class Parrot:
    """A tokenizer and a model that continue any prompt with a given text, a byte a token."""

    def __init__(self, model, tokenizer, text):
        self.model, self.answer = model, tokenizer(text).input_ids
        self.asked = 0

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, ids, **options):
        out = self.model(ids, **options)
        if ids.shape[1] == 1:
            out.logits = torch.nn.functional.one_hot(torch.tensor([[self.answer[self.asked]]]), 257).float()
            self.asked += 1
        return out


def test_a_reply_ends_when_the_answers_are_there():
    tokenizer, model = byte_tokenizer(), tiny_model()
    made = example("needle", characters=1500)
    right = made.answers[0]
    for text, reply, score in (
        (f" {right}. And more", f" {right}.", 1),
        (f" {right}1. And", f" {right}1. And more than that", 0),
        (" 7654321, no", " 7654321,", 0),
    ):
        made_short = Example(**vars(made) | {"answer_tokens": 25})
        given = answer(Parrot(model, tokenizer, (text + " more than that")[:25].ljust(25)), tokenizer, made_short, None)
        assert given.reply.startswith(reply[: len(given.reply)])
        assert given.score == score
    assert given.prompt_tokens == encode(tokenizer, made).shape[1]


def test_a_full_budget_answers_as_dense_does():
    tokenizer, model = byte_tokenizer(), tiny_model(dtype=torch.float64)
    made = make_example(tokenizer, MATERIAL, "needle_values", 1000, 1, 0)
    small = hga.HGAConfig(chunk_size=32, sink_tokens=4, window_tokens=12, budget_tokens=2000, prefill="routed")
    dense, whole, few = (
        answer(model, tokenizer, made, rule) for rule in (None, small, small.replace(budget_tokens=32))
    )
    assert len(dense.reply) > 20
    assert whole.reply == dense.reply != few.reply
    assert (dense.held["attended"], whole.held["attended"]) == (1, pytest.approx(1))
    assert 0 < few.held["attended"] < 0.05
