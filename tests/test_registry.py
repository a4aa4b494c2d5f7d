"""One registry for six kinds of extension: what it finds, and what it says of a member or a value that is wrong."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import ClassVar, Literal, Protocol

import pytest

from qbench import registry
from qbench.errors import RequestError
from qbench.registry import Kind, find, make
from qbench.values import typed


class Speaker(Protocol):
    loud: bool

    def say(self, text: str) -> str: ...


@dataclass(frozen=True)
class Parrot:
    loud: ClassVar[bool] = True
    times: int = 1
    pitch: float = 1.0
    name: str = "polly"
    caged: bool = False
    food: str | None = None
    words: list[str] | None = None
    colour: Literal["green", "grey"] = "green"

    def __post_init__(self) -> None:
        if self.times < 1:
            raise ValueError(f"times must be at least 1, not {self.times}")

    def say(self, text: str) -> str:
        return " ".join([text] * self.times)


@dataclass(frozen=True)
class Mute:
    loud: ClassVar[bool] = False


class Loose:
    loud = True

    def say(self, text: str) -> str:
        return text


SPEAKER = Kind("speaker", "bird", "kind", "birds:Speaker")


@pytest.fixture
def installed(monkeypatch):
    """Installs members of a kind of the test's own, as `name -> MODULE:CLASS`."""
    module = types.ModuleType("birds")
    module.__dict__.update(Speaker=Speaker, Parrot=Parrot, Mute=Mute, Loose=Loose, word="no class")
    monkeypatch.setitem(sys.modules, "birds", module)

    def install(*members: tuple[str, str]) -> None:
        found = [EntryPoint(name, value, SPEAKER.group) for name, value in members]
        monkeypatch.setattr(registry, "entry_points", lambda group: found if group == SPEAKER.group else [])

    return install


def refusal(call, *args) -> str:
    with pytest.raises(RequestError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_member_is_made_from_its_fields(installed):
    installed(("parrot", "birds:Parrot"))
    made = make(SPEAKER, {"kind": "parrot", "times": 2, "food": None, "words": ["a"]})
    assert made == Parrot(times=2, words=["a"])
    assert made.say("hi") == "hi hi"


def test_an_unknown_name_lists_the_choices(installed):
    installed(("parrot", "birds:Parrot"), ("mute", "birds:Mute"))
    assert refusal(find, SPEAKER, "parot") == (
        "unknown bird.kind 'parot'; did you mean 'parrot'? choose from: mute, parrot"
    )


def test_two_packages_that_claim_a_name_are_both_named(installed):
    installed(("parrot", "birds:Parrot"), ("parrot", "others:Parrot"))
    assert refusal(find, SPEAKER, "parrot") == (
        "two packages register the speaker 'parrot': birds:Parrot, others:Parrot; keep one"
    )


@pytest.mark.parametrize("value", ["birds.gone:Parrot", "birds:Gone"])
def test_what_cannot_be_imported_is_named(installed, value):
    installed(("parrot", value))
    assert refusal(find, SPEAKER, "parrot").startswith(f"the speaker 'parrot' ({value}) cannot be imported: ")


@pytest.mark.parametrize(
    ("value", "lacking"),
    [
        ("birds:Mute", "it has no say"),
        ("birds:Loose", "it is not a dataclass"),
        ("birds:word", "it is not a class"),
    ],
)
def test_a_class_that_lacks_something_of_the_interface_says_what(installed, value, lacking):
    installed(("parrot", value))
    assert refusal(find, SPEAKER, "parrot") == f"'{value}' (speaker 'parrot') is no birds.Speaker: {lacking}"


def test_an_unknown_field_lists_the_fields(installed):
    installed(("parrot", "birds:Parrot"))
    assert refusal(make, SPEAKER, {"kind": "parrot", "tims": 2}).startswith(
        "unknown key for bird.kind=parrot: 'bird.tims'; did you mean 'bird.times'? choose from: bird.caged, "
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"times": "abc"}, "bird.times: 'abc' is no whole number"),
        ({"times": True}, "bird.times: True is no whole number"),
        ({"times": 1.5}, "bird.times: 1.5 is no whole number"),
        ({"times": 2.0}, "bird.times: 2.0 is no whole number; write 2"),
        ({"times": None}, "bird.times: None is no whole number"),
        ({"pitch": "high"}, "bird.pitch: 'high' is no number"),
        ({"pitch": float("nan")}, "bird.pitch: nan is no number"),
        ({"name": None}, "bird.name: None is no text"),
        ({"name": ["a"]}, "bird.name: ['a'] is no text"),
        ({"caged": "perhaps"}, "bird.caged: 'perhaps' is neither true nor false"),
        ({"caged": 1}, "bird.caged: 1 is neither true nor false"),
        ({"food": {"a": 1}}, "bird.food: {'a': 1} is no text and not null"),
        ({"words": "a"}, "bird.words: 'a' is no list of texts and not null"),
        ({"words": [None]}, "bird.words: [None] is no list of texts and not null"),
        ({"colour": "red"}, "bird.colour: 'red' is none of 'green', 'grey'"),
    ],
)
def test_a_value_of_another_type_is_said_with_its_key(installed, settings, sentence):
    installed(("parrot", "birds:Parrot"))
    with pytest.raises(RequestError) as caught:
        make(SPEAKER, {"kind": "parrot", **settings})
    assert str(caught.value) == sentence
    assert caught.value.key == f"bird.{next(iter(settings))}"


def test_a_value_that_the_member_refuses_is_said_in_its_own_words(installed):
    installed(("parrot", "birds:Parrot"))
    assert refusal(make, SPEAKER, {"kind": "parrot", "times": 0}) == (
        "bird.kind=parrot: times must be at least 1, not 0"
    )


@pytest.mark.parametrize(
    ("value", "wanted", "found"),
    [
        (2, float, 2),  # an int where a float is asked stays what was written
        (2024, str, "2024"),  # a folder's name that YAML takes for a number
        (12345678, str | None, "12345678"),
        (None, str | None, None),
        (2, int | str, 2),
        ("2", int | str, "2"),
        ([1, 2], tuple[int, ...], (1, 2)),
        ([1, 2], tuple[int, int], (1, 2)),
        ((1,), list[int], [1]),
        ({"a": 1}, dict[str, int], {"a": 1}),
        ({1}, set[int], {1}),  # no type of YAML's: the class's own business
    ],
)
def test_a_value_that_can_be_read_as_its_type_is(value, wanted, found):
    read = typed("key", value, wanted)
    assert read == found
    assert type(read) is type(found)


def test_a_quantizer_says_a_wrong_type_before_it_computes_with_it():
    assert refusal(make, registry.QUANTIZER, {"name": "sinq", "group_size": "many"}) == (
        "quantizer.group_size: 'many' is no whole number"
    )
