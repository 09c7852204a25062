"""Intents of spoken commands: 42 classes, sentences made from a voice assistant's templates."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

from multitask.packages import INTENTS, DataError, fetch, members
from multitask.rows import Row
from multitask.templates import Node, parse, sample

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

__all__ = ["intent_rows", "labels", "read"]

_MEMBER = "home_assistant_intents/data/en.json"
SENTENCES_PER_TEMPLATE = 12
SEED = 20260313

# The package leaves these to the household: rooms, devices, free text.
_VALUES: dict[str, tuple[str, ...]] = {
    "area": (
        "kitchen", "living room", "bedroom", "bathroom", "garage", "office", "hallway", "garden",
        "basement", "dining room", "nursery", "attic", "laundry room", "guest room", "patio",
    ),
    "floor": ("first", "second", "ground", "upper", "lower", "top", "main", "third"),
    "zone": ("work", "school", "home", "the gym", "the office", "the airport", "the park"),
    "message": (
        "dinner is ready", "the bus leaves in ten minutes", "time for bed", "please come down",
        "the package has arrived", "grandma is at the door", "we are leaving now", "movie time",
        "the laundry is done", "school starts in an hour", "breakfast is on the table",
        "someone left the gate open", "homework first", "the game starts soon",
    ),
    "search_query": (
        "blue in green", "the beatles", "stairway to heaven", "jazz classics", "daily news",
        "miles davis", "summer hits", "abbey road", "taylor swift", "the crown", "star wars",
        "piano concerto", "morning coffee", "ninety nine luftballons", "bedtime stories",
    ),
    "timer_name": (
        "pizza", "laundry", "egg", "pasta", "tea", "workout", "bread", "homework", "nap",
        "chicken", "meeting", "parking",
    ),
    "timer_command": (
        "turn off the lights", "open the garage door", "close the blinds", "start the vacuum",
        "play some music", "lock the front door", "turn on the heater", "pause the movie",
    ),
    "shopping_list_item": (
        "milk", "eggs", "bread", "apples", "toilet paper", "coffee beans", "olive oil", "rice",
        "bananas", "dish soap", "cheese", "batteries", "tomatoes", "cat food",
    ),
    "todo_list_item": (
        "call the dentist", "water the plants", "book flights", "fix the bike", "pay the rent",
        "clean the gutters", "renew the passport", "mow the lawn", "send the invoice",
        "return the books", "write the report", "buy a gift",
    ),
}  # fmt: skip

# Names of devices by the domain that a template asks for.
_NAMES: dict[str, tuple[str, ...]] = {
    "light": ("desk lamp", "ceiling light", "floor lamp", "reading light", "porch light"),
    "switch": ("coffee maker", "christmas tree", "heater", "kettle", "aquarium pump"),
    "fan": ("ceiling fan", "desk fan", "exhaust fan", "tower fan"),
    "media_player": ("tv", "soundbar", "radio", "stereo", "kitchen speaker", "apple tv"),
    "input_boolean": ("guest mode", "night mode", "away mode"),
    "climate": ("thermostat", "air conditioner", "radiator", "heat pump"),
    "cover": ("garage door", "left curtain", "window blind", "main gate", "skylight shade"),
    "lock": ("front door", "back door", "shed door", "side gate"),
    "valve": ("sprinkler valve", "water valve", "gas valve", "irrigation valve"),
    "binary_sensor": ("motion sensor", "smoke detector", "door sensor", "leak sensor"),
    "sensor": ("outdoor sensor", "battery level", "power meter", "humidity sensor"),
    "todo": ("chores", "packing", "weekend", "work", "holiday", "reading"),
    "vacuum": ("robot vacuum", "dusty", "vacuum cleaner"),
    "person": ("anna", "tom", "maria", "david", "grandpa"),
    "lawn_mower": ("lawn mower", "robot mower", "grass cutter"),
    "scene": ("movie night", "romantic dinner", "party", "good morning", "relax"),
    "script": ("bedtime routine", "leave home", "wake up sequence"),
    "weather": ("home forecast", "london", "weather station"),
    "button": ("doorbell", "restart button", "garage opener"),
    "input_button": ("feed the cat", "restart button"),
}
_ANY_NAME = ("light", "switch", "fan", "media_player", "climate", "cover")


def read(cache: Path) -> dict[str, Any]:
    """Return the package's English templates.

    Raises:
        DataError: the package is not laid out as expected.
    """
    for _, content in members(fetch(INTENTS, cache), lambda name: name == _MEMBER):
        data: dict[str, Any] = json.loads(content)
        return data
    raise DataError(f"{INTENTS.file} does not have the file {_MEMBER}")


def labels(data: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the intents, sorted."""
    return tuple(sorted(data["intents"]))


def intent_rows(data: Mapping[str, Any]) -> list[Row]:
    """Return sentences made from every template; a template's sentences are one group."""
    rng = random.Random(SEED)
    lists = {name: tuple(_list_values(spec)) for name, spec in sorted(data["lists"].items())}
    rules = {name: parse(text) for name, text in data["expansion_rules"].items()}
    rows: list[Row] = []
    for index, intent in enumerate(labels(data)):
        for block in data["intents"][intent]["data"]:
            domains = _domains(block)
            for template in block["sentences"]:
                node = parse(template)
                found = {
                    _sentence(node, rng, rules, lists, domains, data.get("skip_words", ()))
                    for _ in range(SENTENCES_PER_TEMPLATE)
                }
                rows += [Row(text, index, template, intent) for text in sorted(found)]
    return rows


def _sentence(
    node: Node,
    rng: random.Random,
    rules: Mapping[str, Node],
    lists: Mapping[str, tuple[str, ...]],
    domains: tuple[str, ...],
    polite: tuple[str, ...],
) -> str:
    def slot(name: str, rng: random.Random) -> str:
        if name == "name":
            return rng.choice(_NAMES[rng.choice(domains)])
        return sample(parse(rng.choice(_VALUES.get(name) or lists[name])), rng, rules, slot)

    sentence = sample(node, rng, rules, slot)
    # Words that the assistant skips: people say them, so the classifier should have heard them.
    if polite and rng.random() < 0.15:
        sentence = f"{rng.choice(polite)} {sentence}"
    return sentence


def _domains(block: Mapping[str, Any]) -> tuple[str, ...]:
    asked = (block.get("requires_context") or {}).get("domain") or ()
    names = (asked,) if isinstance(asked, str) else tuple(asked)
    return tuple(name for name in names if name in _NAMES) or _ANY_NAME


def _list_values(spec: Mapping[str, Any]) -> Iterator[str]:
    if "range" in spec:
        bounds = spec["range"]
        step = int(bounds.get("step", 1))
        yield from map(str, range(int(bounds["from"]), int(bounds["to"]) + 1, step))
    for value in spec.get("values", ()):
        yield value if isinstance(value, str) else value["in"]
