"""The engine: a bundle, loaded, that answers texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from eptc.errors import InputError
from eptc.runtime.batches import in_batches
from eptc.runtime.chat import chat_template, rendered
from eptc.runtime.cpus import usable_cpus
from eptc.runtime.decoding import Steps, begin, sound
from eptc.runtime.device_arrays import (
    DeviceArray,
    check_uncaptured,
    check_whole,
    on_device,
    shared,
)
from eptc.runtime.feeds import check_vocabulary, checked, checked_prompt
from eptc.runtime.fixed_shape import FixedShape, fixed_shape
from eptc.runtime.generation import greedy, limited, planned, sampled, stream, write
from eptc.runtime.gpu import wait_for_device
from eptc.runtime.inputs import Example, listed, positive, prepare
from eptc.runtime.loading import open_graphs, open_tokenizer
from eptc.runtime.manifest import Manifest, load_manifest
from eptc.runtime.prepacked import kept_in
from eptc.runtime.providers import Provider, choose
from eptc.runtime.results import Classification, Generation, classified
from eptc.runtime.row_tasks import RowTasks, TaskName, of_task
from eptc.runtime.scoring import Labels, score, task_labels
from eptc.runtime.spec import TASK_IDS

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping, Sequence
    from types import TracebackType

    from eptc.runtime.chat import Conversation
    from eptc.runtime.graph import Graph, NumpyArray
    from eptc.runtime.tokenizer import TextTokenizer
    from eptc.tasks import Task

__all__ = ["Engine"]


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
        self._rows = RowTasks(manifest)
        self._labels: dict[int, Labels] = {}
        self._template = chat_template(directory, manifest)
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
        cache: bool | str | Path = False,
        warm_up: bool = False,
        allow_fallback: bool = False,
    ) -> Self:
        """Load a bundle.

        Engines of one bundle share its sessions and weights within a process, and with a cache
        the weights in every process. A process that is forked later has to load its own.

        Args:
            directory: the bundle's folder.
            providers: execution providers in order of preference, `cpu`, `cuda`, `tensorrt` or
                ONNX Runtime's names, each alone or with its options (TensorRT's: see
                `eptc.runtime.tensorrt`). None: the best that start here and run the whole
                graph, CUDA before CPU, and TensorRT before both where the bundle was made for it;
                `engine.providers` says which did.
            threads: CPU threads one operator may use. None: the CPUs this process may use, by its
                CPU set and its control group's quota.
            cache: a folder to keep optimised graphs and packed weights in, so that later loads
                are faster and every process maps one copy of the weights; on disk it takes 1.5
                to 2.5 times the bundle. For the CPU provider, on Linux. True:
                `$EPTC_CACHE_DIR`, else `$XDG_CACHE_HOME/eptc`, else `~/.cache/eptc`. It may be
                removed at any time; where it cannot be used the log says why, and the engine
                loads without it.
            warm_up: whether to call `warm_up` before returning.
            allow_fallback: whether what the first provider has no kernel for may run on the
                CPU. Without it that is an error: such an engine names a GPU and waits for the
                CPU. The arithmetic of shapes belongs there and is none.

        Raises:
            BundleError: not a bundle, damaged, or newer than this version.
            OptionError: a provider that does not start or does not run the whole graph, or a
                wrong number of threads.
        """
        folder = Path(directory)
        count = usable_cpus() if threads is None else positive("threads", threads)
        manifest = load_manifest(folder)
        tokenizer = open_tokenizer(folder, manifest)
        requests = choose(providers, for_tensorrt=manifest.target == "tensorrt")
        graphs = open_graphs(
            folder,
            manifest,
            requests,
            count,
            strict=providers is not None,
            cache=kept_in(cache),
            allow_fallback=allow_fallback,
        )
        engine = cls(folder, manifest, graphs, tokenizer)
        if warm_up:
            engine.warm_up()
        return engine

    @property
    def task(self) -> Task | None:
        """The task the engine was compiled for; None where there are several, or none."""
        return self.manifest.task

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks the engine serves; a row names its own by its place among them."""
        return tuple(task for task in self._rows.tasks if task is not None)

    def for_task(self, task: TaskName) -> Engine:
        """Return the engine as one of a single task: the same sessions, every row of that task.

        Args:
            task: its name, an alias of it, or its place in `tasks`.

        Raises:
            TaskError: there is no such task.
        """
        (place,) = self._rows.places(1, [task])
        if not self.manifest.tasks:
            return self
        manifest = of_task(self.manifest, int(place))
        graphs = {
            name: self._graph(name).of_task(int(place), spec)
            for name, spec in manifest.graphs.items()
        }
        tokenizer = self._tokenizer
        if tokenizer is not None and manifest.tokenizer is not None:
            tokenizer = tokenizer.limited(manifest.tokenizer.max_length)
        return Engine(self.directory, manifest, graphs, tokenizer)

    @property
    def providers(self) -> tuple[str, ...]:
        """The execution providers that really started, in order."""
        return self._providers

    def classify(
        self,
        texts: Iterable[Example],
        *,
        tasks: TaskName | Sequence[TaskName] | None = None,
        truncate: bool = False,
        batch_size: int = 32,
    ) -> list[Classification]:
        """Return each text's class.

        A text-to-text engine scores every label as an answer, in one pass of its decoder. The
        label is the one that greedy writing arrives at if it may write nothing but labels, so it
        agrees with `generate` wherever that writes a label. The probabilities compare the labels
        as wholes; where labels have several tokens, another can in rare cases be the likeliest.

        Where `manifest.routing.mode` is `batch`, the texts of one batch change one another's
        answers: `batch_size=1` gives the answer to each alone.

        Args:
            texts: a list; each a string, a pair, or a dict by its task's field names.
            tasks: where the engine serves several: the task of all texts, or of each, by name,
                alias or place in `tasks`. Texts of different tasks share batches.
            truncate: cut texts that are too long, as training did, instead of refusing them.
            batch_size: texts, or pairs of a text and a label, run at once; texts of like length
                are put together.

        Raises:
            InputError: something that is not such a text, or too long.
            TaskError: a task has no labels, or two of them are the same tokens; no task where
                there are several, or one that the engine does not have.
        """
        writes = self.manifest.kind != "encoder-classifier"
        if writes and not self.manifest.tasks:
            self._task_labels(0)
        encodings, places = self._encoded(texts, tasks, truncate)

        def answer(rows: list[Any], positions: list[int]) -> list[Classification]:
            own = places[positions]
            feeds = self._padded(rows, own)
            if writes:
                labels = [self._task_labels(place) for place in own.tolist()]
                steps = self._steps(feeds, [each.longest for each in labels])
                return score(steps, labels, batch_size)
            graph = self._graph("model")
            logits = graph.run(checked(feeds, graph.name, graph.spec, None, self.tasks))["logits"]
            return [
                classified(row if task is None else row[: task.num_outputs], task)
                for row, task in zip(sound(logits), self._rows.at(own), strict=True)
            ]

        return in_batches(encodings, batch_size, answer, self.manifest.routing)

    def generate(
        self,
        texts: Iterable[Example | Conversation],
        max_new_tokens: int | None = None,
        *,
        tasks: TaskName | Sequence[TaskName] | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        chat: bool = False,
        truncate: bool = False,
        batch_size: int = 16,
    ) -> list[Generation]:
        """Return what the engine writes for each text.

        By default the likeliest token is chosen each time: the tokens of transformers' `generate`
        with `do_sample=False`. With `do_sample` tokens are drawn, for each text by a random
        generator of its own, made from the seed and the text's place in the list. What is drawn
        does not depend on `batch_size` or on the other texts, short of rounding: a text's logits
        differ in their last digits from batch to batch. Where `manifest.routing.mode` is `batch`
        it does: `batch_size=1` gives the answer to each alone.

        Args:
            texts: a list; each a string, a pair, or a dict by its task's field names.
            max_new_tokens: tokens written at most. None: the manifest's for the task.
            tasks: as for `classify`.
            do_sample: draw tokens instead of taking the likeliest.
            temperature: divides the logits; above 0.
            top_k: draw from so many of the likeliest tokens. None: from all.
            top_p: draw from the fewest tokens whose probabilities add up to it. None: from all.
            seed: the same seed draws the same tokens. None: another one each time.
            stop: strings that end an answer and are no part of its text, across the borders of
                tokens; the name of a special token stands for that token.
            stop_token_ids: tokens that end an answer, instead of the manifest's.
            chat: the texts are conversations, each a string (one user message) or a list of
                `{"role": ..., "content": ...}`. They are put into the model's chat template, and
                the task's prompt is left out.
            truncate: cut texts that are too long, as training did, instead of refusing them.
            batch_size: texts run at once; texts of like length are put together.

        Raises:
            InputError: something that is not such a text, or too long; no chat template.
            MissingExtraError: `chat`, and jinja2 is not installed.
            OptionError: a value out of its range, or an option of sampling without `do_sample`.
            TaskError: the engine classifies and writes nothing; no task where there are several,
                or one that the engine does not have.
        """
        tokenizer, options = self._text_tokenizer(), (temperature, top_k, top_p, seed)
        sampling = sampled(do_sample, *options)
        plan = planned(self.manifest, tokenizer, max_new_tokens, sampling, stop, stop_token_ids)

        encodings, places = self._prompts(texts, tasks, truncate, chat)

        def answer(rows: list[Any], positions: list[int]) -> list[Generation]:
            own = places[positions]
            limits = self._rows.new_tokens(own, plan.limit)
            steps = self._steps(self._padded(rows, own), limits)
            return write(steps, positions, tokenizer, plan, limits)

        return in_batches(encodings, batch_size, answer, self.manifest.routing)

    def stream(
        self,
        text: Example | Conversation,
        max_new_tokens: int | None = None,
        *,
        task: TaskName | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        chat: bool = False,
        truncate: bool = False,
    ) -> Generator[str, None, None]:
        """Yield what the engine writes for one text, piece by piece while it is written.

        A piece is never empty and never ends within a character; together they are the text that
        `generate` returns. The caller may stop after any piece.

        Arguments and errors are those of `generate`, `task` is that of the text. What is wrong
        with them is raised at once, not at the first piece.
        """
        tokenizer, options = self._text_tokenizer(), (temperature, top_k, top_p, seed)
        sampling = sampled(do_sample, *options)
        plan = planned(self.manifest, tokenizer, max_new_tokens, sampling, stop, stop_token_ids)
        rows, places = self._prompts([text], task, truncate, chat)
        limits = self._rows.new_tokens(places, plan.limit)
        return stream(self._steps(self._padded(rows, places), limits), tokenizer, plan, limits[0])

    def generate_ids(
        self, feeds: Mapping[str, Any], max_new_tokens: int | None = None
    ) -> list[list[int]]:
        """Return what the engine writes for token ids: new tokens a row, the stop token included.

        Args:
            feeds: input_ids and attention_mask, integers [batch, sequence], padded on the side
                the manifest says; task_ids [batch] where the engine serves several tasks.
            max_new_tokens: tokens written at most. None: the manifest's for the task.

        Raises:
            InputError: feeds that do not fit, or more tokens than the model has positions for.
            TaskError: the engine classifies and writes nothing.
        """
        settings, limit = limited(self.manifest, max_new_tokens)
        prompt = checked_prompt(feeds, self.manifest)
        places = prompt.get(TASK_IDS, np.zeros(len(prompt["input_ids"]), np.int64))
        limits = self._rows.new_tokens(places, limit)
        return greedy(self._steps(prompt, limits), settings, limits)

    def tokenize(
        self,
        texts: Iterable[Example],
        *,
        tasks: TaskName | Sequence[TaskName] | None = None,
        truncate: bool = False,
    ) -> dict[str, NumpyArray]:
        """Return input_ids, attention_mask[, token_type_ids], int64 [batch, longest text].

        Where the engine serves several tasks there is task_ids [batch] as well; `tasks` as for
        `classify`.

        Raises:
            InputError: no text, something that is not one, or too long.
            TaskError: no task where there are several, or one that the engine does not have.
        """
        rows, places = self._encoded(texts, tasks, truncate)
        if not rows:
            raise InputError("there are no texts", expected="at least one")
        return self._text_tokenizer().pad(rows) | self._rows.feeds(places)

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
        opened = self._named_graph(graph)
        arrays = checked(
            feeds, opened.name, opened.spec, self.manifest.vocab_size, self.manifest.tasks
        )
        return opened.run(arrays)

    def run_device(
        self, feeds: Mapping[str, Any], graph: str | None = None, *, synchronize: bool = True
    ) -> dict[str, DeviceArray]:
        """Run one graph on arrays that stay where they are, and leave its outputs on the device.

        Nothing is copied or converted. The call returns when the outputs are complete.

        Args:
            feeds: per input an array that speaks DLPack (PyTorch, CuPy, JAX, a `DeviceArray`)
                of the declared type, on the engine's device or in the CPU's memory. The values
                of those on a GPU are not looked at: a token outside the vocabulary reads zeros.
            graph: as for `run`.
            synchronize: whether to wait until the device has written the feeds. False: the
                caller has waited, or writes them on the stream that the engine was given
                (`user_compute_stream` among the provider's options).

        Returns:
            Every output by name; `torch.from_dlpack` and its like take them without a copy.

        Raises:
            InputError: as for `run`; an array of another type or device.
            OptionError: the engine is a view of one task (`for_task`), or captures.
        """
        opened = self._named_graph(graph)
        check_whole(opened, "run_device")
        check_uncaptured(opened)
        values = shared(
            feeds, opened.name, opened.spec, opened.device, self.manifest.vocab_size,
            self.manifest.tasks,
        )  # fmt: skip
        if synchronize and on_device(feeds):
            wait_for_device(opened.device[1])
        outputs = opened.run_bound(values, stay=True)
        return {name: DeviceArray(value) for name, value in outputs.items()}

    def fixed(self, batch: int, sequence: int) -> FixedShape:
        """Return the engine at one shape, on buffers of its own; on CUDA it can be captured.

        Load the engine with `providers=[("cuda", {"enable_cuda_graph": "1"})]` and each shape is
        captured at its first run, and replayed from then on.

        Args:
            batch: rows of every run; fewer are padded.
            sequence: tokens of every row; fewer are padded.

        Raises:
            OptionError: a shape that the model refuses, answers that padding would change, or a
                view of one task (`for_task`).
            TaskError: the engine writes text.
        """
        return fixed_shape(
            self._graph(next(iter(self.manifest.graphs))), self.manifest, batch, sequence
        )

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
                # The second token reads a cache.
                self.generate_ids(feeds | self._rows.feeds(ones[:, 0] - 1), max_new_tokens=2)
            else:
                names = [tensor.name for tensor in self.manifest.graphs["model"].inputs]
                feeds = {name: ones if name == "attention_mask" else ones - 1 for name in names}
                self.run(feeds | self._rows.feeds(ones[:, 0] - 1))

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
        names = [task.name for task in self.tasks]
        state = "closed" if self._closed else f"on {', '.join(self.providers)}"
        return (
            f"<Engine {self.manifest.kind} {_named(names)} {self.manifest.precision} {state}: "
            f"{self.directory}>"
        )

    def _task_labels(self, place: int) -> Labels:
        labels = self._labels.get(place)
        if labels is None:
            labels = task_labels(self._rows.tasks[place], self.manifest, self._text_tokenizer())
            self._labels[place] = labels
        return labels

    def _steps(self, feeds: dict[str, NumpyArray], new: Sequence[int]) -> Steps:
        return begin(self.manifest, self._graph, feeds, new)

    def _encoded(
        self,
        texts: Iterable[Example],
        tasks: TaskName | Sequence[TaskName] | None,
        truncate: bool,
    ) -> tuple[list[Any], NumpyArray]:
        """Return an encoding per text, and the place of its task."""
        tokenizer, given = self._text_tokenizer(), listed(texts)
        places = self._rows.places(len(given), tasks)
        prepared = prepare(given, self._rows.at(places))
        limits = self._rows.limits(places)
        return tokenizer.encode(prepared, truncate=truncate, limits=limits), places

    def _prompts(
        self,
        texts: Iterable[Any],
        tasks: TaskName | Sequence[TaskName] | None,
        truncate: bool,
        chat: bool,
    ) -> tuple[list[Any], NumpyArray]:
        if not chat:
            return self._encoded(texts, tasks, truncate)
        given = rendered(texts, self._template, truncate=truncate)
        places = self._rows.places(len(given), tasks)
        # The template has written the special tokens.
        return self._text_tokenizer().encode(
            given, add_special_tokens=False, limits=self._rows.limits(places)
        ), places

    def _padded(self, rows: Sequence[Any], places: NumpyArray) -> dict[str, NumpyArray]:
        feeds = self._text_tokenizer().pad(rows)
        check_vocabulary(feeds["input_ids"], self.manifest.vocab_size)
        return feeds | self._rows.feeds(places)

    def _named_graph(self, graph: str | None) -> Graph:
        if graph is None and len(self.manifest.graphs) > 1:
            raise InputError(
                "the engine has several graphs", expected=", ".join(self.manifest.graphs)
            )
        name = graph if graph is not None else next(iter(self.manifest.graphs))
        if name not in self.manifest.graphs:
            raise InputError(
                f"there is no graph {name!r}", expected=", ".join(self.manifest.graphs)
            )
        return self._graph(name)

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


def _named(tasks: Sequence[str]) -> str:
    if len(tasks) > 1:
        return f"tasks={list(tasks)!r}"
    return f"task={tasks[0] if tasks else None!r}"
