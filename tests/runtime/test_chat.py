"""Chat templates: rendered as transformers does, tokenized once, refused where they do not fit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eptc.errors import BundleError, InputError, MissingExtraError, OptionError
from eptc.runtime import MANIFEST, Engine, TextTooLongError
from eptc.runtime.chat import ChatTemplate
from eptc.runtime.seal import sealed

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
PLAIN = """\
{% for message in messages %}
{{ bos_token + message['role'] + ': ' + message['content'] + eos_token }}
{% endfor %}
{% if add_generation_prompt %}
assistant:
{% endif %}
"""
TEMPLATES = {
    "plain": PLAIN,
    "blocks": "  {% if true %}\n  x\n  {% endif %}\n  {#- gone -#}\n {{ messages | length }}\n\n",
    "json": "{{ messages | tojson }}|{{ messages[0] | tojson(indent=2) }}|{{ '<é>' | tojson }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
    "{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}\n{% generation %}\n"
    "{% set said = m.content %}{{ said }}\n{% endgeneration %}{% endif %}{% endfor %}{{ said }}",
    "undefined": "{{ messages[0].name }}{% if tools %}x{% endif %}{{ unknown }}"
    "{% if tools is none %}y{% endif %}{% if unk_token is defined %}z{% endif %}",
    "strings": "{{ messages[-1]['content'].strip().split('a')[0] | upper | trim }}",
    "slices": "{% for m in messages[1:] %}{{ loop.index0 }}{{ m.content | length }}{% endfor %}",
}
CONVERSATIONS: dict[str, Any] = {
    "a string": "  what is rain?  \n",
    "one message": [{"role": "user", "content": 'the <b>film</b> & "é" \n 🙂'}],
    "several": [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "rain"},
        {"role": "assistant", "content": "fell"},
        {"role": "user", "content": ""},
    ],
}


def template(folder: Path, source: str) -> ChatTemplate:
    path = folder / "chat_template.jinja"
    path.write_bytes(source.encode("utf-8"))
    return ChatTemplate(path, SPECIAL)


def theirs(words: Any, source: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=source, **SPECIAL)


def messages(given: Any) -> Any:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_equals_transformers(tmp_path: Path, make_tokenizer: Any, source: str) -> None:
    ours, other = template(tmp_path, source), theirs(make_tokenizer("start"), source)
    given = list(CONVERSATIONS.values())
    for found, conversation in zip(ours.render(given), given, strict=True):
        wanted = other.apply_chat_template(
            messages(conversation), add_generation_prompt=True, tokenize=False
        )
        assert found == wanted


@pytest.mark.parametrize("source", ["{% if %}", "{% unknown %}", "{{ messages", "\udcff"])
def test_no_template(tmp_path: Path, source: str) -> None:
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(source.encode("utf-8", "surrogateescape"))
    with pytest.raises(BundleError, match=r"chat_template\.jinja is not a chat template"):
        ChatTemplate(path, {}).render(["rain"])


REFUSING = {
    "its own words": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "an unknown attribute": ("{{ messages.nothing.at.all }}", "no attribute"),
    "a number": ("{{ 1 / (messages | length - 1) }}", "division"),
    "a type": ("{{ messages + 1 }}", "can only concatenate"),
    "Python's internals": ("{{ ''.__class__.__mro__ }}", "__class__"),
    "a change": ("{{ messages.append(1) }}", "append"),
}


@pytest.mark.parametrize(("source", "words"), REFUSING.values(), ids=REFUSING)
def test_template_that_refuses(tmp_path: Path, source: str, words: str) -> None:
    """The sandbox lets a template neither out nor change anything; it says what it refuses."""
    with pytest.raises(InputError, match="chat template refuses conversation 0") as refusal:
        template(tmp_path, source).render(["rain"])
    assert words in refusal.value.found


WRONG: dict[str, tuple[Any, str]] = {
    "a string": ("rain", "the conversations are a str"),
    "a message": ({"role": "user", "content": "rain"}, "the conversations are a dict"),
    "None": (None, "the conversations are a NoneType"),
    "a flat list": ([{"role": "user", "content": "rain"}], "conversation 0 is a dict"),
    "a number": (["rain", 3], "conversation 1 is a int"),
    "no messages": ([[]], "conversation 0 has no messages"),
    "a string as message": ([["rain"]], "message 0 of conversation 0 is 'rain'"),
    "no role": ([[{"content": "rain"}]], "message 0 of conversation 0 is {"),
    "no content": ([[{"role": "user", "content": None}]], "message 0 of conversation 0 is {"),
    "an unknown key": ([[{"role": "user", "content": "a", "name": "b"}]], "message 0"),
    "half a character": (["\ud800"], "message 0 of conversation 0 is not valid Unicode"),
}


@pytest.mark.parametrize(("given", "message"), WRONG.values(), ids=WRONG)
def test_wrong_conversations(tmp_path: Path, given: Any, message: str) -> None:
    with pytest.raises(InputError) as refusal:
        template(tmp_path, PLAIN).render(given)
    assert message in refusal.value.found


@pytest.fixture(scope="module")
def chatting(lowered_llama: Any, tmp_path_factory: pytest.TempPathFactory, rewrite: Any) -> Path:
    """Return an engine with a chat template and prompts of 64 tokens at most."""
    bundle = tmp_path_factory.mktemp("chat") / "bundle"
    shutil.copytree(lowered_llama.path, bundle)
    (bundle / "chat_template.jinja").write_text(PLAIN, "utf-8")
    with Engine.load(bundle, ["cpu"]) as engine:
        manifest = engine.manifest
    rewrite(
        bundle, manifest.kind, vocab_size=manifest.vocab_size, task=manifest.task,
        generation=manifest.generation, tokenizer=manifest.tokenizer,
    )  # fmt: skip
    data = json.loads((bundle / MANIFEST).read_text())
    data["tokenizer"] |= {"chat_template": "chat_template.jinja", "special_tokens": SPECIAL}
    (bundle / MANIFEST).write_text(json.dumps(sealed(data)))
    return bundle


def test_engine(chatting: Path, lowered_llama: Any) -> None:
    """The ids of `apply_chat_template`, one BOS a message, then the tokens of `generate`."""
    import torch

    other = theirs(lowered_llama.tokenizer.backend_tokenizer, PLAIN)
    given = list(CONVERSATIONS.values())
    with Engine.load(chatting, ["cpu"]) as engine:
        answers = engine.generate(given, 8, chat=True)
        assert [answer.text for answer in answers] == [
            "".join(engine.stream(conversation, 8, chat=True)) for conversation in given
        ]
        assert engine.generate([given[0]], 8) != answers[:1]
    for conversation, answer in zip(given, answers, strict=True):
        feeds = other.apply_chat_template(
            messages(conversation), add_generation_prompt=True, return_tensors="pt"
        )
        ids = feeds["input_ids"]
        assert (ids == 2).sum() == len(messages(conversation))
        with torch.no_grad():
            wanted = lowered_llama.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8,
                do_sample=False,
            )  # fmt: skip
        assert list(answer.token_ids) == wanted[0, ids.shape[1] :].tolist()


def test_engine_refuses(chatting: Path, lowered_llama: Any) -> None:
    with Engine.load(chatting, ["cpu"]) as engine:
        with pytest.raises(OptionError, match="truncate would cut the end"):
            engine.generate(["rain"], chat=True, truncate=True)
        with pytest.raises(TextTooLongError, match="text 1 has"):
            engine.generate(["rain", "rain " * 70], chat=True)
        with pytest.raises(InputError, match="conversation 0 is a int"):
            engine.stream(3, chat=True)  # type: ignore[arg-type]
        assert engine.generate([], chat=True) == []
        assert engine.generate(["rain"], chat=True)
    with (
        Engine.load(lowered_llama.path, ["cpu"]) as engine,
        pytest.raises(InputError, match="no chat template"),
    ):
        engine.generate(["rain"], chat=True)


def test_missing_file(chatting: Path, tmp_path: Path) -> None:
    """A template the manifest names and the bundle does not have is damage."""
    bundle = Path(shutil.copytree(chatting, tmp_path / "bundle"))
    (bundle / "chat_template.jinja").unlink()
    with pytest.raises(BundleError, match="chat_template"):
        Engine.load(bundle, ["cpu"])
    data = json.loads((bundle / MANIFEST).read_text())
    del data["files"]["chat_template.jinja"]
    (bundle / MANIFEST).write_text(json.dumps(sealed(data)))
    with pytest.raises(BundleError, match="is used but not listed"):
        Engine.load(bundle, ["cpu"])


WITHOUT_JINJA = """
import sys
sys.modules["jinja2"] = None
from eptc.errors import MissingExtraError
from eptc.runtime import Engine
with Engine.load(sys.argv[1], ["cpu"]) as engine:
    assert engine.generate(["rain"])
    try:
        engine.generate(["rain"], chat=True)
    except MissingExtraError as error:
        print(error)
"""


def test_without_jinja(chatting: Path) -> None:
    """Only a chat needs it; the message names the extra."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_JINJA, str(chatting)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "pip install 'ept-compiler[chat]'" in done.stdout
    assert MissingExtraError.exit_code == 2
