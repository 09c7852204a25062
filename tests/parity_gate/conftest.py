"""Checkpoints to plant faults in, and what every planted fault must come to."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import eptc
from eptc import checkpoint, text
from eptc.errors import ParityError
from eptc.ir import AdaptedModel
from eptc.parity_gate import ParityReport
from eptc.parity_gate.blocks import prove_blocks
from eptc.runtime.manifest import load_manifest


@dataclasses.dataclass(frozen=True)
class Subject:
    """A sound checkpoint, and how it is exported.

    Args:
        ckpt: its folder.
        base: the base's folder.
        options: what the folder does not say itself.
    """

    ckpt: Path
    base: Path
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def export(self, out: Path, task: str | int, **more: Any) -> eptc.Bundle:
        """Compile one task, verified."""
        given = {**self.options, **more}
        built: eptc.Bundle = eptc.export(self.ckpt, task=task, out=out, base=self.base, **given)
        return built

    def read(self) -> checkpoint.Checkpoint:
        """Read it as the compiler does."""
        return checkpoint.read(self.ckpt, self.base, **self.options)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread: with tensors this small a second one only waits for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def recorded(golden: Path) -> Callable[[str], Subject]:
    """Return a function that gives a recorded checkpoint of the released code by name."""

    def find(name: str) -> Subject:
        folder = golden / "ept" / name
        meta = json.loads((folder / "meta.json").read_text())
        options = {"tasks": meta["tasks"], "top_k": meta["moe_top_k"]}
        return Subject(folder / "adapter", folder / "base", options)

    return find


@pytest.fixture(scope="session")
def paper(small_native: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Subject]:
    """Return a function that makes a native checkpoint of the paper's variant on a tiny BERT.

    Options are `EptConfig`'s. Nothing is zero, the base's biases neither; gates are soft (every
    expert kept counts); sizes do not divide the linears; all tasks share one trace.
    """
    made: dict[str, Subject] = {}
    base = tmp_path_factory.mktemp("paper-base")
    _jitter(small_native.base, base)

    def make(**options: Any) -> Subject:
        key = repr(sorted(options.items()))
        if key not in made:
            ckpt = tmp_path_factory.mktemp("paper")
            _write_paper(ckpt, base, options)
            made[key] = Subject(ckpt, base)
        return made[key]

    return make


def _jitter(source: Path, base: Path) -> None:
    """Copy a base; biases of zero and norms of one get numbers a fault would show on.

    Its tokenizer tells the texts of a pair apart, as BERT's own does.
    """
    for path in source.iterdir():
        shutil.copyfile(path, base / path.name)
    path = base / "tokenizer_config.json"
    names = ["input_ids", "token_type_ids", "attention_mask"]
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_input_names": names}))
    generator = torch.Generator().manual_seed(2)
    weights = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in safetensors.torch.load_file(source / "model.safetensors").items()
    }
    safetensors.torch.save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def _write_paper(ckpt: Path, base: Path, options: Mapping[str, Any]) -> None:
    from eptc.nn import EptConfig, EptModel, GateConfig, load_base
    from eptc.tasks import Task

    labels = ("bad", "good")
    defaults = {
        "variant": "paper",
        "targets": ("query", "key", "intermediate.dense", "output.dense"),
        "kernel_sizes": (2, 2, 3, 5),
        "top_k": 2,
        "rank": 3,
        "gate": GateConfig(temperature=0.5),
        "tasks": (
            Task("tone", "classification", labels=labels, aliases=("sentiment",)),
            Task("same", "classification", ("first", "second"), labels=labels),
            Task("care", "classification", labels=labels, max_length=24),
        ),
    }
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = EptModel.attach(load_base(base), EptConfig(**{**defaults, **options}))
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save(ckpt, base_dir=base, base_name="small-bert")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


@pytest.fixture(scope="session")
def as_subject() -> type[Subject]:
    """Return what makes a subject of two folders."""
    return Subject


@pytest.fixture(scope="session")
def prove_by_block() -> Callable[..., ParityReport]:
    """Return a function that verifies a folder against a subject's first task, block by block."""

    def run(subject: Subject, directory: Path, **more: Any) -> ParityReport:
        source = subject.read()
        tokenizer = text.find_tokenizer(source.path, source.base.path)
        return prove_blocks(directory, load_manifest(directory), source, 0, tokenizer, **more)

    return run


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Return a function that exports, sees it refused with nothing left, and gives the message."""

    def export(subject: Subject, task: str | int, **more: Any) -> str:
        place = tmp_path / "place"
        place.mkdir()
        with pytest.raises(ParityError) as raised:
            subject.export(place / "out", task, **more)
        assert raised.value.exit_code == 1
        assert list(place.iterdir()) == [], "a refused build left something behind"
        return str(raised.value)

    return export


@pytest.fixture
def plant_in_reader(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that lets the reader alone return a model with a fault in it."""

    def plant(fault: Callable[[AdaptedModel], AdaptedModel]) -> None:
        sound = checkpoint.read

        def read(*arguments: Any, **options: Any) -> checkpoint.Checkpoint:
            source = sound(*arguments, **options)
            model = fault(source.model)
            contents = dataclasses.replace(
                source.contents, adapters=model.adapters, heads=model.heads, tasks=model.tasks
            )
            base = dataclasses.replace(source.base, weights=model.weights)
            return dataclasses.replace(source, contents=contents, base=base)

        monkeypatch.setattr(checkpoint, "read", read)

    return plant


@pytest.fixture
def plant_in_pass(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that lets one adapter pass alone see a model with a fault in it."""

    def plant(step: type[Any], fault: Callable[[AdaptedModel], AdaptedModel]) -> None:
        sound = step.rewrite
        monkeypatch.setattr(step, "rewrite", lambda self, model: sound(self, fault(model)))

    return plant


@pytest.fixture(scope="session")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Subject]:
    """Return a function that gives a native checkpoint on a RoBERTa without a tokenizer."""
    made: list[Subject] = []

    def make() -> Subject:
        if not made:
            made.append(_write_roberta(tmp_path_factory.mktemp("roberta")))
        return made[0]

    return make


def _write_roberta(root: Path) -> Subject:
    import transformers

    from eptc.nn import EptConfig, EptModel, load_base
    from eptc.tasks import Task

    shape = transformers.RobertaConfig(
        vocab_size=50,
        hidden_size=36,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=51,
        max_position_embeddings=60,
        type_vocab_size=1,
        pad_token_id=1,
        initializer_range=0.3,
    )
    subject = Subject(root / "ckpt", root / "base")
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        base = transformers.RobertaModel(shape, add_pooling_layer=False)
        for parameter in base.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
        base.save_pretrained(subject.base)
        config = EptConfig(
            variant="paper",
            targets=("query", "value"),
            kernel_sizes=(2, 3, 4),
            top_k=2,
            rank=3,
            tasks=(Task("mood", "classification", labels=("bad", "fair", "good")),),
        )
        model = EptModel.attach(load_base(subject.base), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save(subject.ckpt, base_dir=subject.base, base_name="small-roberta")
    return subject
