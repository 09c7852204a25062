"""MEPT and SMoP end to end: compiled, proven against the reference, and served."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import eptc
from eptc.errors import OptionError, ParityError
from eptc.ir import PromptTuning
from eptc.lower import prompted_t5
from eptc.nn.mept import MeptModel

Make = Callable[..., Any]
MODES = {
    "mept-t5-top2": ("per-sample", True),
    "mept-t5-top1-partial": ("batch", True),
    "mept-llama-cls": ("batch", True),
    "mept-llama-stochastic": ("constant", True),
    "smop-t5": ("batch", False),
}


@pytest.mark.parametrize("name", MODES)
def test_recorded_checkpoints(golden: Path, tmp_path: Path, name: str) -> None:
    """Parity passes, every recorded batch and token is given, the manifest says the mode."""
    folder = golden / "mept" / name
    bundle = eptc.export(
        folder / "checkpoint", base=folder / "base", out=tmp_path / "out", allow_pickle=True
    )
    manifest = bundle.manifest
    assert manifest.parity["passed"]
    assert (manifest.routing.mode, manifest.routing.reads_padding) == MODES[name]
    with np.load(folder / "golden.npz") as file:
        arrays = dict(file)
    graph, output, recorded = (
        ("model", "logits", "logits")
        if manifest.kind == "encoder-classifier"
        else ("encoder", "last_hidden_state", "encoder_last_hidden_state")
    )
    with bundle.load(providers=["cpu"]) as engine:
        for number in range(9):
            feeds = {key: arrays[f"b{number}_{key}"] for key in ("input_ids", "attention_mask")}
            found = engine.run(feeds, graph)[output]
            wanted = arrays[f"b{number}_{recorded}"]
            np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)
        for rows in (1, 4) if graph == "encoder" else ():
            feeds = {key: arrays[f"gen{rows}_{key}"] for key in ("input_ids", "attention_mask")}
            for tokens, sequence in zip(
                engine.generate_ids(feeds, 10), arrays[f"gen{rows}_sequences"], strict=True
            ):
                assert tokens == sequence[1 : len(tokens) + 1].tolist()


def describe(path: Path, **task: Any) -> Path:
    path.write_text(json.dumps([{"name": "tone", **task}]))
    return path


TEXTS = ["a good film", "bad", "the very long film was not dull and not bad", "quiet and short"]


@pytest.mark.parametrize("settings", [{"topk": 1}, {}, {"stochastic": True}], ids=str)
def test_a_classifier_serves_text(small_mept: Make, tmp_path: Path, settings: Any) -> None:
    """One at a time and together; only rows of one length share a batch in `per-sample`."""
    folders = small_mept("llama", **settings)
    spec = describe(tmp_path / "tasks.json", kind="classification", labels=["bad", "good", "odd"])
    routing: Any = "per-sample" if settings.get("topk") == 1 else "exact"
    bundle = eptc.export(
        folders.ckpt, base=folders.base, out=folders.out, task_spec=spec, routing=routing
    )
    assert bundle.manifest.tokenizer is not None
    # Three positions of 64 are the prompts'.
    assert bundle.manifest.tokenizer.max_length == 61
    reference = MeptModel.load(folders.ckpt, folders.base)
    with bundle.load(providers=["cpu"]) as engine:
        together = engine.classify(TEXTS, batch_size=4)
        for text, found in zip(TEXTS, together, strict=True):
            feeds = engine.tokenize([text])
            wanted = logits(reference, feeds)
            np.testing.assert_allclose(engine.run(feeds)["logits"], wanted, rtol=0, atol=2e-5)
            assert found.label == ("bad", "good", "odd")[int(wanted.argmax())]
            assert found.probabilities == pytest.approx(
                engine.classify([text])[0].probabilities, abs=1e-5
            )


def logits(reference: MeptModel, feeds: dict[str, Any]) -> Any:
    import torch

    with torch.no_grad():
        inputs = {name: torch.from_numpy(array) for name, array in feeds.items()}
        return reference.hf(**inputs).logits.numpy()


def test_rows_of_a_batch_depend_on_one_another_as_in_the_original(
    small_mept: Make, tmp_path: Path
) -> None:
    folders = small_mept("llama", topk=1)
    spec = describe(tmp_path / "tasks.json", kind="classification", labels=["bad", "good", "odd"])
    bundle = eptc.export(folders.ckpt, base=folders.base, out=folders.out, task_spec=spec)
    assert "depends on the other rows" in bundle.manifest.routing.meaning
    reference = MeptModel.load(folders.ckpt, folders.base)
    with bundle.load(providers=["cpu"]) as engine:
        feeds = engine.tokenize(TEXTS)
        wanted = logits(reference, feeds)
        np.testing.assert_allclose(engine.run(feeds)["logits"], wanted, rtol=0, atol=2e-5)
        alone = np.concatenate([engine.run(engine.tokenize([text]))["logits"] for text in TEXTS])
        assert np.abs(alone - wanted).max() > 1e-2


def test_a_writer_scores_labels_and_writes(small_mept: Make, tmp_path: Path) -> None:
    """A client need not know of the prompts: masks are the text's."""
    import torch

    folders = small_mept("t5", layers=[1])
    spec = describe(tmp_path / "tasks.json", kind="text-to-text", labels=["good", "bad film"])
    bundle = eptc.export(
        folders.ckpt, base=folders.base, out=folders.out, task_spec=spec, routing="per-sample"
    )
    reference = MeptModel.load(folders.ckpt, folders.base, mode="per-sample")
    with bundle.load(providers=["cpu"]) as engine:
        found = engine.classify(TEXTS)
        for text, answer in zip(TEXTS, found, strict=True):
            assert answer.probabilities == pytest.approx(
                engine.classify([text])[0].probabilities, abs=1e-5
            )
        feeds = engine.tokenize([TEXTS[2]])
        inputs = {name: torch.from_numpy(array) for name, array in feeds.items()}
        with torch.no_grad():
            wanted = reference.hf.generate(**inputs, max_new_tokens=8, do_sample=False)[0, 1:]
        tokens = engine.generate_ids(feeds, 8)[0]
        assert tokens == wanted.tolist()[: len(tokens)]
        assert (
            engine.generate([TEXTS[2]], max_new_tokens=8)[0].text
            == engine.generate(TEXTS, max_new_tokens=8)[2].text
        )


def test_what_inspect_says(small_mept: Make) -> None:
    folders = small_mept("t5", topk=1)
    found = eptc.inspect(folders.ckpt, base=folders.base)
    assert found["routing"]["mode"] == "batch"
    assert found["prompts"] == {
        "method": "prompt-expert", "virtual_tokens": 3, "experts": 4, "top_k": 1,
        "layers": [0, 1, 2], "input_level": False, "shared": True, "stochastic": False,
        "constant": False, "state_dict": "whole",
    }  # fmt: skip


def test_a_swap_that_is_missing_is_found(
    small_mept: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a batch of as many rows as a row has prompts shows it."""
    folders = small_mept("t5", layers=[1], num_virtual_tokens=5, num_virtual_tokens_full=10)
    monkeypatch.setattr(prompted_t5, "swapped", lambda prompts: prompts)
    monkeypatch.setenv("EPTC_CACHE_DIR", str(folders.root / "cache"))
    with pytest.raises(ParityError, match="seeded tokens 5x5"):
        eptc.export(folders.ckpt, base=folders.base, out=folders.out)


def test_rows_that_are_not_mixed_are_found(
    small_mept: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = small_mept("llama", topk=1)
    monkeypatch.setattr(PromptTuning, "couples", False)
    with pytest.raises(ParityError, match="logits"):
        eptc.export(folders.ckpt, base=folders.base, out=folders.out)


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_prompts_stay_float32(small_mept: Make, precision: Any) -> None:
    """Whatever the rest of the engine becomes: what chooses experts is not rounded."""
    import onnx_ir

    folders = small_mept("t5", num_virtual_tokens=1, num_virtual_tokens_full=32, layers=[0, 1])
    bundle = eptc.export(
        folders.ckpt, base=folders.base, out=folders.out, precision=precision, verify=False
    )
    graph = onnx_ir.load(bundle.path / "encoder.onnx").graph
    types = {str(name): value.dtype for name, value in graph.initializers.items()}
    own = {name: dtype for name, dtype in types.items() if ".prompts." in name}
    assert len(own) == 8
    assert set(own.values()) == {onnx_ir.DataType.FLOAT}
    assert len(set(types.values())) > 2


def test_a_model_too_large_for_memory_is_refused_by_name(small_mept: Make) -> None:
    folders = small_mept("t5")
    from eptc import checkpoint
    from eptc.parity_gate.reference import stream_reference

    with pytest.raises(OptionError, match="a mept checkpoint is verified as a whole"):
        stream_reference(checkpoint.read(folders.ckpt, folders.base))


def test_two_builds_are_equal_to_the_byte(small_mept: Make) -> None:
    folders = small_mept("llama", stochastic=True)
    outs = [folders.root / f"out-{number}" for number in range(2)]
    for out in outs:
        eptc.export(folders.ckpt, base=folders.base, out=out, verify=False)
    one, two = ({p.name: p.read_bytes() for p in sorted(out.iterdir())} for out in outs)
    assert one == two


def test_rows_in_another_order_answer_in_that_order(small_mept: Make, tmp_path: Path) -> None:
    folders = small_mept("llama")
    spec = describe(tmp_path / "tasks.json", kind="classification", labels=["bad", "good", "odd"])
    bundle = eptc.export(
        folders.ckpt, base=folders.base, out=folders.out, task_spec=spec, verify=False
    )
    with bundle.load(providers=["cpu"]) as engine:
        want = {text: engine.classify([text])[0].probabilities for text in TEXTS}
        for order in itertools.permutations(TEXTS):
            for text, found in zip(order, engine.classify(list(order)), strict=True):
                assert found.probabilities == pytest.approx(want[text], abs=1e-5)
