"""The engine: a bundle, loaded, that answers texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from eptc.errors import InputError, OptionError, TaskError
from eptc.runtime.cpus import usable_cpus
from eptc.runtime.decoding import decode_decoder_only, decode_encoder_decoder, refuse_nan
from eptc.runtime.feeds import check_vocabulary, checked
from eptc.runtime.inputs import Example, prepare
from eptc.runtime.labels import label_index
from eptc.runtime.loading import open_graphs, open_tokenizer
from eptc.runtime.manifest import Manifest, load_manifest
from eptc.runtime.prepacked import cache_folder
from eptc.runtime.providers import Provider, choose
from eptc.runtime.results import Classification, Generation, classified

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from types import TracebackType

    from eptc.runtime.graph import Graph, NumpyArray
    from eptc.runtime.tokenizer import TextTokenizer
    from eptc.tasks import Task

__all__ = ["Engine"]

_Answer = TypeVar("_Answer")


class Engine:
    """A loaded bundle. Make one with `Engine.load`; threads may share it.

    Use it as a context manager, or call `close` to free its memory before it is collected.

    Args:
        directory: the bundle's folder.
        manifest: its manifest.
        graphs: an open graph per role.
        tokenizer: None where the bundle has none; `run` still works then.
    """

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        graphs: Mapping[str, Graph],
        tokenizer: TextTokenizer | None,
    ) -> None:
        self.directory = directory
        self.manifest = manifest
        self._graphs = dict(graphs)
        self._tokenizer = tokenizer
        self._closed = False
        first, *others = self._graphs.values()
        self._providers = tuple(
            name for name in first.providers if all(name in graph.providers for graph in others)
        )

    @classmethod
    def load(
        cls,
        directory: str | Path,
        providers: Sequence[Provider] | None = None,
        threads: int | None = None,
        *,
        cache: bool | str | Path | None = None,
        warm_up: bool = False,
    ) -> Self:
        """Load a bundle.

        Engines of one bundle share its sessions and weights within a process, and with a cache
        the weights in every process. A process that is forked later has to load its own.

        Args:
            directory: the bundle's folder.
            providers: execution providers in order of preference, `cpu`, `cuda`, `tensorrt` or
                ONNX Runtime's names, each alone or with its options. None: the best that start
                here, TensorRT before CUDA before CPU; `engine.providers` says which did.
            threads: CPU threads one operator may use. None: the CPUs this process may use, by its
                CPU set and its control group's quota.
            cache: a folder to keep optimised graphs and packed weights in, so that later loads
                are faster and every process maps one copy of the weights; on disk it takes 1.5
                to 2.5 times the bundle. For the CPU provider, on Linux. True:
                `$EPTC_CACHE_DIR`, else `$XDG_CACHE_HOME/eptc`, else `~/.cache/eptc`. None:
                `$EPTC_CACHE_DIR` where it is set. False: none. It may be removed at any time;
                where it cannot be used the log says why, and the engine loads without it.
            warm_up: whether to call `warm_up` before returning.

        Raises:
            BundleError: not a bundle, damaged, or newer than this version.
            OptionError: a provider that does not start, or a wrong number of threads.
        """
        folder = Path(directory)
        count = usable_cpus() if threads is None else _positive("threads", threads)
        manifest = load_manifest(folder)
        tokenizer = open_tokenizer(folder, manifest)
        requests = choose(providers)
        graphs = open_graphs(
            folder,
            manifest,
            requests,
            count,
            strict=providers is not None,
            cache=cache_folder(cache),
        )
        engine = cls(folder, manifest, graphs, tokenizer)
        if warm_up:
            engine.warm_up()
        return engine

    @property
    def task(self) -> Task | None:
        """The task the engine was compiled for."""
        return self.manifest.task

    @property
    def providers(self) -> tuple[str, ...]:
        """The execution providers that really started, in order."""
        return self._providers

    def classify(
        self, texts: Iterable[Example], *, truncate: bool = False, batch_size: int = 32
    ) -> list[Classification]:
        """Return each text's class.

        A text-to-text engine writes its answer first, which is then matched to a label.

        Args:
            texts: a list; each a string, a pair, or a dict by the task's field names.
            truncate: cut texts that are too long, as training did, instead of refusing them.
            batch_size: texts run at once; texts of like length are put together.

        Raises:
            InputError: something that is not such a text, or too long.
            TaskError: the task has no labels.
        """
        if self.manifest.kind != "encoder-classifier":
            return self._classify_written(texts, truncate, batch_size)

        def answer(rows: list[Any]) -> list[Classification]:
            logits = self._graph("model").run(self._classifier_feeds(rows))["logits"]
            return [classified(row, self.task) for row in refuse_nan(logits)]

        return self._batched(texts, truncate, batch_size, answer)

    def generate(
        self,
        texts: Iterable[Example],
        max_new_tokens: int | None = None,
        *,
        truncate: bool = False,
        batch_size: int = 16,
    ) -> list[Generation]:
        """Return what the engine writes for each text, choosing the likeliest token each time.

        Args:
            texts: a list; each a string, a pair, or a dict by the task's field names.
            max_new_tokens: tokens written at most. None: the manifest's.
            truncate: cut texts that are too long, as training did, instead of refusing them.
            batch_size: texts run at once; texts of like length are put together.

        Raises:
            InputError: something that is not such a text, or too long.
            TaskError: the engine classifies and writes nothing.
        """
        limit = self._limit(max_new_tokens)
        settings = self.manifest.generation
        assert settings is not None
        tokenizer = self._text_tokenizer()

        def answer(rows: list[Any]) -> list[Generation]:
            feeds = tokenizer.pad(rows)
            check_vocabulary(feeds["input_ids"], self.manifest.vocab_size)
            answers = self._decode(feeds, limit)
            return [
                Generation(tokenizer.decode(ids), tuple(ids), ids[-1] in settings.eos_token_id)
                for ids in answers
            ]

        return self._batched(texts, truncate, batch_size, answer)

    def generate_ids(
        self, feeds: Mapping[str, Any], max_new_tokens: int | None = None
    ) -> list[list[int]]:
        """Return what the engine writes for token ids: new tokens a row, the stop token included.

        Args:
            feeds: input_ids and attention_mask, int64 [batch, sequence], padded on the side the
                manifest says.
            max_new_tokens: tokens written at most. None: the manifest's.

        Raises:
            InputError: feeds that do not fit, or more tokens than the model has positions for.
            TaskError: the engine classifies and writes nothing.
        """
        return self._decode(dict(feeds), self._limit(max_new_tokens))

    def tokenize(
        self, texts: Iterable[Example], *, truncate: bool = False
    ) -> dict[str, NumpyArray]:
        """Return input_ids, attention_mask[, token_type_ids], int64 [batch, longest text].

        Raises:
            InputError: no text, something that is not one, or too long.
        """
        tokenizer = self._text_tokenizer()
        prepared = prepare(texts, self.task)
        if not prepared:
            raise InputError("there are no texts", expected="at least one")
        return tokenizer.pad(tokenizer.encode(prepared, truncate=truncate))

    def run(self, feeds: Mapping[str, Any], graph: str | None = None) -> dict[str, NumpyArray]:
        """Run one graph on arrays.

        Args:
            feeds: an array per input, names and shapes as in `manifest.graphs`.
            graph: which one (`encoder`, `decoder`); None where there is only one.

        Returns:
            Every output by name.

        Raises:
            InputError: no such graph, or feeds that do not fit it; the batch may not be empty.
        """
        if graph is None and len(self.manifest.graphs) > 1:
            raise InputError(
                "the engine has several graphs", expected=", ".join(self.manifest.graphs)
            )
        name = graph if graph is not None else next(iter(self.manifest.graphs))
        if name not in self.manifest.graphs:
            raise InputError(
                f"there is no graph {name!r}", expected=", ".join(self.manifest.graphs)
            )
        opened = self._graph(name)
        return opened.run(checked(feeds, name, opened.spec, self.manifest.vocab_size))

    def warm_up(self, shapes: Iterable[tuple[int, int]] = ((1, 8),)) -> None:
        """Run every graph now, so that the first request does not wait for what happens once.

        Weights are read from disk, memory is taken, a GPU's kernels are loaded. Memory is kept
        for the largest shape seen: give the largest that will be served.

        Args:
            shapes: pairs of batch size and tokens a row.

        Raises:
            InputError: a shape that the model refuses.
        """
        for batch, tokens in shapes:
            ones = np.ones((batch, tokens), np.int64)
            if self.manifest.generation is not None:
                feeds = {"input_ids": ones - 1, "attention_mask": ones}
                self.generate_ids(feeds, max_new_tokens=2)  # the second reads a cache
            else:
                names = [tensor.name for tensor in self.manifest.graphs["model"].inputs]
                self.run({name: ones if name == "attention_mask" else ones - 1 for name in names})

    def close(self) -> None:
        """Free the sessions unless another engine shares them; this one answers nothing more.

        A call under way in another thread finishes the batch it runs.
        """
        self._closed = True
        self._graphs = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        task = self.task.name if self.task is not None else None
        state = "closed" if self._closed else f"on {', '.join(self.providers)}"
        return (
            f"<Engine {self.manifest.kind} task={task!r} {self.manifest.precision} {state}: "
            f"{self.directory}>"
        )

    def _classify_written(
        self, texts: Iterable[Example], truncate: bool, batch_size: int
    ) -> list[Classification]:
        labels = self.task.labels if self.task is not None else ()
        if not labels:
            name = f"task {self.task.name!r}" if self.task is not None else "this engine"
            raise TaskError(f"{name} has no labels to choose from", fix="call generate instead")
        written = self.generate(texts, truncate=truncate, batch_size=batch_size)
        found = [label_index(answer.text, labels) for answer in written]
        return [
            Classification(labels[i] if i is not None else None, i, text=answer.text)
            for i, answer in zip(found, written, strict=True)
        ]

    def _batched(
        self,
        texts: Iterable[Example],
        truncate: bool,
        batch_size: int,
        answer: Callable[[list[Any]], list[_Answer]],
    ) -> list[_Answer]:
        """Answer texts in batches of like length, which need little padding, in given order."""
        size = _positive("batch_size", batch_size)
        tokenizer = self._text_tokenizer()
        prepared = prepare(texts, self.task)
        if not prepared:
            return []
        encodings = tokenizer.encode(prepared, truncate=truncate)
        order = sorted(range(len(encodings)), key=lambda i: len(encodings[i].ids))
        answers: dict[int, _Answer] = {}
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            answers.update(zip(rows, answer([encodings[i] for i in rows]), strict=True))
        return [answers[i] for i in range(len(order))]

    def _limit(self, max_new_tokens: int | None) -> int:
        settings = self.manifest.generation
        if settings is None:
            raise TaskError(
                "this engine is a classifier: it writes no text", fix="call classify instead"
            )
        if max_new_tokens is None:
            return settings.max_new_tokens
        return _positive("max_new_tokens", max_new_tokens)

    def _decode(self, feeds: dict[str, NumpyArray], limit: int) -> list[list[int]]:
        settings = self.manifest.generation
        assert settings is not None
        if self.manifest.kind == "encoder-decoder":
            encoder, decoder = self._graph("encoder"), self._graph("decoder")
            return decode_encoder_decoder(encoder, decoder, feeds, settings, limit)
        longest = feeds["input_ids"].shape[1]
        if settings.max_positions is not None and longest + limit > settings.max_positions:
            raise InputError(
                f"a prompt of {longest} tokens and {limit} new ones do not fit the model",
                expected=f"{settings.max_positions} together",
                fix="give a smaller max_new_tokens or shorter texts",
            )
        return decode_decoder_only(self._graph("model"), feeds, settings, limit)

    def _classifier_feeds(self, rows: list[Any]) -> dict[str, NumpyArray]:
        graph = self._graph("model")
        feeds = self._text_tokenizer().pad(rows)
        return checked(feeds, graph.name, graph.spec, self.manifest.vocab_size)

    def _graph(self, name: str) -> Graph:
        # One read of the dict: another thread may be closing the engine.
        graph = self._graphs.get(name)
        if graph is None:
            raise InputError("the engine is closed", fix="load it again")
        return graph

    def _text_tokenizer(self) -> TextTokenizer:
        if self._closed:
            raise InputError("the engine is closed", fix="load it again")
        if self._tokenizer is None:
            raise InputError("the bundle has no tokenizer", fix="give token ids to run")
        return self._tokenizer


def _positive(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(f"{name} is {value!r}", expected="an integer, 1 or more")
    return value
