"""An ONNX file that is called like a pipeline of transformers, by many threads at a time."""

from __future__ import annotations

import copy
import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from types import GeneratorType, new_class
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from td_plugin.errors import TdError
from td_plugin.export.decoding import PAST
from td_plugin.export.engines import OPENVINO
from td_plugin.export.parity import Precision, precision_of
from td_plugin.export.runners import provider_name
from td_plugin.export.serving_files import Job, find_graph, job_of, load_config, load_generation_config, load_processor
from td_plugin.export.serving_threads import serving_threads
from td_plugin.export.session import open_session, read_graph

if TYPE_CHECKING:
    from transformers import Pipeline, PreTrainedConfig

    from td_plugin.export.serving_model import ServedGraph

_TOLD = {"recipe": "recipe", "sparsity_level": "γ", "td-plugin.parameters": "parameters"}  # metadata entry -> its name
_DIMENSIONS = {"text-classification": 2, "token-classification": 3, "image-classification": 2}


@dataclass(frozen=True)
class About:
    """What is served, and what the file says of itself; `str()` is a few lines.

    Attributes:
        file: its path.
        task: what it is called for.
        architecture: the class of transformers whose place it takes.
        precision: of its weights.
        provider: what runs it, as onnxruntime calls it.
        threads: inside one operator.
        told: recipe, γ and the like, from the file's metadata.
    """

    file: str
    task: str
    architecture: str
    precision: Precision
    provider: str
    threads: int
    told: dict[str, str]

    @property
    def unknown(self) -> tuple[str, ...]:
        """What the file does not say."""
        return tuple(name for name in _TOLD.values() if name not in self.told)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "unknown": self.unknown}

    def __str__(self) -> str:
        lines = [f"{self.file}: {self.task}, {self.architecture}, {self.precision}"]
        lines.append(f"on {self.provider}, threads {self.threads}")
        lines += ["; ".join(f"{name} {text}" for name, text in self.told.items())] if self.told else []
        lines += [f"unknown, for the file does not say: {', '.join(self.unknown)}"] if self.unknown else []
        return "\n".join(lines)


class OnnxPipeline:
    """What `load_onnx` returns: called like transformers' pipeline for the task, by any number of threads.

    A tokenizer keeps the truncation of the call before, so threads must not share one. Every call takes a pipeline of
    its own from those at rest, or has one more made; they all run one session.

    Attributes:
        about: what is served.
        config: of the model.
        processor: the tokenizer or image processor; calls use copies of it.
    """

    def __init__(
        self, about: About, config: PreTrainedConfig, processor: Any, make: Callable[[], Pipeline], defaults: Any
    ) -> None:
        self.about, self.config, self.processor = about, config, processor
        self._make, self._defaults = make, dict(defaults)
        self._at_rest: deque[Pipeline] = deque()

    def __call__(self, inputs: Any, **options: Any) -> Any:  # the calling convention of transformers
        """What transformers' pipeline for the task answers.

        Args:
            inputs: a text or an image, a list of them, or a generator or `Dataset`, which is answered piece by piece.
            options: as the pipeline takes them: ``top_k``, ``truncation``, ``batch_size``, ``aggregation_strategy``,
                ``max_new_tokens``, ``return_full_text`` ...

        Raises:
            TdError: the inputs do not fit the graph, a text is too long, or onnxruntime fails.
        """
        try:
            pipe = self._at_rest.pop()
        except IndexError:
            pipe = self._make()
        try:
            return pipe(inputs, **{**self._defaults, **options})
        finally:
            if not isinstance(inputs, (GeneratorType, Dataset)):  # else it goes on working after this call
                self._at_rest.append(pipe)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.about.file!r}, task={self.about.task!r})"

    def __str__(self) -> str:
        return str(self.about)


def load_onnx(
    path: str | os.PathLike[str],
    *,
    task: str | None = None,
    provider: str = "cpu",
    threads: int | None = None,
    provider_options: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> OnnxPipeline:
    """Open an ONNX file for what transformers' `pipeline(task, model)` does, with the same calls and answers.

    Reading texts and images and writing answers is transformers' own code; only the model in between is onnxruntime.
    The file may be of another tool. The result may be called by many threads at a time.

    Args:
        path: a directory that `save_onnx` wrote, or an ONNX file with ``config.json`` and tokenizer or image processor
            beside it.
        task: one of `serving_files.TASKS`; the configuration's architecture tells it unless given.
        provider: as `Form.provider`.
        threads: inside one operator; None is what `serving_threads` finds. For many requests at a time take 1.
        provider_options: as `Form.options`.
        defaults: options of every call that does not give them, such as ``{"batch_size": 8, "truncation": True}``.

    Raises:
        TdError: a file is missing, damaged or does not fit the others, the task cannot be told, the provider is not
            installed, or onnxruntime cannot load the graph.
    """
    if find_spec("transformers") is None:
        raise TdError("transformers is not installed", where=str(path), fix="pip install 'td-plugin[hf]'")
    if threads is not None and threads < 1:
        raise TdError("a session needs a thread", got=f"threads={threads}", fix="give one, or leave it out")
    file, directory = find_graph(path)
    name = provider_name(provider)
    if name == OPENVINO:
        fix = "provider='OpenVINOExecutionProvider', of onnxruntime-openvino"
        raise TdError("files are served by onnxruntime", got=provider, fix=fix)
    config = load_config(directory)
    count = serving_threads(threads)
    session = open_session(file, threads=count, provider=name, options=provider_options)
    names = [entry.name for entry in session.get_inputs()]
    job = job_of(config, task, "pixel_values" in names, str(directory))
    processor = load_processor(directory, job)
    graph = _served(session, str(file), job, config, processor)
    stated = session.get_modelmeta().custom_metadata_map
    told = {shown: stated[key] for key, shown in _TOLD.items() if key in stated}
    about = About(str(file), job.task, job.architecture, precision_of(read_graph(file)), name, count, told)
    return OnnxPipeline(about, config, processor, _maker(job, graph, directory, processor), defaults or {})


def _served(session: Any, where: str, job: Job, config: PreTrainedConfig, processor: Any) -> ServedGraph:
    """The graph, if it does `job`."""
    from td_plugin.export.serving_model import MADE_UP, ServedGraph

    given = ["pixel_values"] if job.images else ["input_ids", *MADE_UP, *processor.model_input_names]
    inputs = tuple(session.get_inputs())
    strange = [entry.name for entry in inputs if entry.name not in given and not entry.name.startswith(PAST)]
    if strange:
        fix = "export the model for this task, or give another task"
        raise TdError(f"the graph takes inputs that {job.task} does not give", where=where, got=strange, fix=fix)
    shape = session.get_outputs()[0].shape
    classes = shape[-1] if shape and isinstance(shape[-1], int) else config.num_labels
    dimensions = _DIMENSIONS.get(job.task)
    if dimensions is not None and shape and (len(shape) != dimensions or classes != config.num_labels):
        fix = f"{job.task} needs {dimensions} dimensions, the last of {config.num_labels} as config.json says"
        raise TdError("the first output of the graph does not fit the task", where=where, got=shape, fix=fix)
    limits = [config.to_dict().get("max_position_embeddings")]
    limits += [] if job.images else [processor.model_max_length]
    known = [limit for limit in limits if isinstance(limit, int)]
    longest = None if job.images else min(known, default=None)
    return ServedGraph(session, where, inputs, longest, job.task == "text-generation")


def _maker(job: Job, graph: ServedGraph, directory: Path, processor: Any) -> Callable[[], Pipeline]:
    """What makes pipelines that share nothing but the session."""
    import transformers

    from td_plugin.export.serving_model import OnnxModel

    config = load_config(directory)
    settings = load_generation_config(directory, config)
    settings.use_cache = bool(graph.past)
    cls: Any = new_class(job.architecture, (OnnxModel,))  # pipelines look for the name of the model's class
    role = "image_processor" if job.images else "tokenizer"
    make_pipeline: Callable[..., Pipeline] = transformers.pipeline

    def make() -> Pipeline:
        model = cls(copy.deepcopy(config), graph)
        if graph.generates:
            model.generation_config = copy.deepcopy(settings)
        # Without a device the pipeline would move its inputs to a GPU where there is one.
        return make_pipeline(job.task, model=model, device="cpu", **{role: copy.deepcopy(processor)})

    return make
