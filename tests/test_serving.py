"""ONNX files called like pipelines: what transformers' own pipeline answers with the torch model."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import form_models
import onnx
import pytest
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from td_plugin.errors import TdError
from td_plugin.export.quantize import quantize
from td_plugin.export.save_onnx import save_onnx
from td_plugin.export.serving import OnnxPipeline, load_onnx
from td_plugin.export.serving_files import job_of
from td_plugin.export.serving_threads import cpu_quota, serving_threads
from td_plugin.export.to_onnx import to_onnx

pytestmark = pytest.mark.filterwarnings("ignore:the licence of the parent model is unknown")
TEXTS = ["w5 w6 w7", "w9x w10 w11yx w12 w13", "w20", "w31 w32x w33 w34"]
LABELS = {0: "O", 1: "B-a", 2: "I-a"}


def tokenizer(side: str = "right") -> Any:
    """99 words, two of them endings of others."""
    words = ["[PAD]", "[UNK]", "##x", "##y", *(f"w{index}" for index in range(4, 99))]
    table = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    table.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "w98"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=table, padding_side=side, **special)


def images() -> list[Image.Image]:
    generator = torch.Generator().manual_seed(0)
    made = torch.randint(0, 256, (3, 20, 24, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(pixels.numpy()) for pixels in made]


def token_model() -> Any:
    torch.manual_seed(0)
    sizes = {"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 32}
    config = hf.DistilBertConfig(vocab_size=99, initializer_range=0.3, id2label=LABELS, **sizes)
    return hf.DistilBertForTokenClassification(config).eval()


def gap_model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.BertConfig(vocab_size=99, initializer_range=0.3, max_position_embeddings=32, **sizes)
    return hf.BertForMaskedLM(config).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    sizes = {"n_embd": 24, "n_layer": 1, "n_head": 4, "n_positions": 40}
    config = hf.GPT2Config(vocab_size=99, initializer_range=0.3, bos_token_id=0, eos_token_id=98, **sizes)
    model = hf.GPT2LMHeadModel(config).eval()
    model.generation_config.pad_token_id = 0
    return model


def llama() -> Any:
    model = form_models.llama()
    model.generation_config = hf.GenerationConfig(pad_token_id=0, eos_token_id=98)
    return model


def bert() -> Any:
    model = form_models.bert()
    model.config.id2label = {0: "bad", 1: "so-so", 2: "good"}
    return model


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "bert": (bert, tokenizer, "text-classification"),
    "tokens": (token_model, tokenizer, "token-classification"),
    "gaps": (gap_model, tokenizer, "fill-mask"),
    "vit": (form_models.vit, lambda: hf.ViTImageProcessorPil(size={"height": 12, "width": 12}), "image-classification"),
    "llama": (llama, lambda: tokenizer("left"), "text-generation"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("served")

    def directory(name: str) -> Path:
        if not (root / name).exists():
            model, processor, _ = MODELS[name]
            save_onnx(model(), root / name, processor=processor())
        return root / name

    return directory


def torch_pipeline(name: str, task: str = "") -> Any:
    model, processor, usual = MODELS[name]
    role = "image_processor" if name == "vit" else "tokenizer"
    make: Any = hf.pipeline
    return make(task or usual, model=model(), device="cpu", **{role: processor()})


def same(ours: Any, theirs: Any) -> None:
    """Equal keys, labels and texts; numbers to rounding."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            same(ours[key], value)
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            same(one, other)
    elif isinstance(theirs, float) or type(theirs).__name__ == "float32":
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    else:
        assert ours == theirs


CALLS: list[tuple[str, str, Any, dict[str, Any]]] = [
    ("bert", "", TEXTS[0], {}),
    ("bert", "", TEXTS, {}),
    ("bert", "", TEXTS, {"batch_size": 3, "top_k": None}),
    ("bert", "", TEXTS, {"top_k": 2, "function_to_apply": "sigmoid"}),
    ("bert", "", {"text": TEXTS[0], "text_pair": TEXTS[1]}, {}),
    ("bert", "", TEXTS[1] * 20, {"truncation": True, "max_length": 32}),
    ("bert", "", TEXTS, {"batch_size": 4, "padding": "max_length", "max_length": 9}),
    ("bert", "feature-extraction", TEXTS[1], {}),
    ("tokens", "", TEXTS, {}),
    ("tokens", "", TEXTS, {"batch_size": 4, "ignore_labels": []}),
    *(("tokens", "ner", TEXTS, {"aggregation_strategy": how}) for how in ("simple", "first", "average", "max")),
    ("gaps", "", ["w5 w98 w7", "w98 w8"], {"top_k": 3}),
    ("vit", "", images()[0], {}),
    ("vit", "", images(), {"top_k": 2, "batch_size": 2}),
    ("vit", "image-feature-extraction", images()[:2], {}),
    ("llama", "", TEXTS[0], {"do_sample": False, "max_new_tokens": 6}),
    ("llama", "", TEXTS, {"do_sample": False, "max_new_tokens": 6, "batch_size": 4}),
    ("llama", "", TEXTS[:2], {"do_sample": False, "max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2}),
    ("llama", "", TEXTS[1], {"do_sample": False, "max_new_tokens": 5, "return_full_text": False}),
]


@pytest.mark.parametrize(
    ("name", "task", "given", "options"),
    CALLS,
    ids=[f"{number}-{name}" for number, (name, *_) in enumerate(CALLS)],  # images have no name that lasts
)
def test_the_answers_are_those_of_the_torch_pipeline(
    saved: Callable[[str], Path], name: str, task: str, given: Any, options: dict[str, Any]
) -> None:
    served = load_onnx(saved(name), task=task or None)
    same(served(given, **options), torch_pipeline(name, task)(given, **options))


def test_sampling_with_a_seed_writes_what_torch_writes(saved: Callable[[str], Path]) -> None:
    options = {"do_sample": True, "temperature": 1.3, "max_new_tokens": 8}
    texts = []
    for pipe in (load_onnx(saved("llama")), torch_pipeline("llama")):
        torch.manual_seed(3)
        texts.append(pipe(TEXTS[0], **options))
    assert texts[0] == texts[1]


def test_a_generator_is_answered_piece_by_piece_and_calls_go_on_meanwhile(saved: Callable[[str], Path]) -> None:
    served = load_onnx(saved("bert"), defaults={"truncation": True, "max_length": 2})
    pieces = served(text for text in TEXTS)
    first = next(iter(pieces))
    alone = served(TEXTS[2])
    rest = list(pieces)
    same([first, *rest], served(TEXTS))
    assert alone == [served(TEXTS)[2]]


def test_many_threads_get_the_answers_of_one(saved: Callable[[str], Path]) -> None:
    """A tokenizer shared by threads would cut the texts of one at the length that another has asked for."""
    served = load_onnx(saved("bert"), threads=1)
    long = " ".join([*TEXTS, TEXTS[1]])  # 25 tokens
    calls = [(long, {"truncation": True, "max_length": length}) for length in range(1, 25)] + [(long, {})]
    alone = [served(text, top_k=None, **options) for text, options in calls]
    assert len({answer[0]["score"] for answer in alone}) > 20
    gate = threading.Barrier(8)

    def work(turn: int) -> list[Any]:
        gate.wait()
        order = calls[turn * 3 :] + calls[: turn * 3]
        answers = [served(text, top_k=None, **options) for text, options in order]
        return answers[len(calls) - turn * 3 :] + answers[: len(calls) - turn * 3]

    with ThreadPoolExecutor(8) as pool:
        for answers in pool.map(work, range(8)):
            assert answers == alone


def test_many_threads_generate_as_one(saved: Callable[[str], Path]) -> None:
    served = load_onnx(saved("llama"), defaults={"do_sample": False, "max_new_tokens": 5})
    alone = [served(text) for text in TEXTS]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(served, TEXTS * 3)) == alone * 3


def test_a_decoder_without_a_cache_pads_no_row(tmp_path: Path) -> None:
    model, words = gpt2(), tokenizer("left")
    example = {"input_ids": torch.arange(2, 14)[None].repeat(2, 1), "attention_mask": torch.ones(2, 12).long()}
    to_onnx(model, tmp_path / "any.onnx", example)
    model.config.architectures = ["GPT2LMHeadModel"]
    model.config.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    make: Any = hf.pipeline
    theirs = make("text-generation", model=model, tokenizer=words, device="cpu")
    options = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    served = load_onnx(tmp_path)  # the only ONNX file there
    for size in (1, 4):
        assert served(TEXTS, batch_size=size, **options) == theirs(TEXTS, batch_size=size, **options)
    with pytest.raises(TdError, match="no cache"):
        served(TEXTS[0], use_cache=True, **options)


def test_the_int8_form_answers_the_same_labels(saved: Callable[[str], Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(saved("bert"), copy)
    quantize(copy / "model.onnx", copy / "model.int8.onnx")
    served, full = load_onnx(copy / "model.int8.onnx"), load_onnx(copy)
    assert (served.about.precision, full.about.precision) == ("int8", "fp32")
    for ours, theirs in zip(served(TEXTS), full(TEXTS), strict=True):
        assert ours["label"] == theirs["label"]
        assert ours["score"] == pytest.approx(theirs["score"], abs=0.05)
        assert ours["score"] != theirs["score"]


@pytest.fixture
def foreign(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """The same model as another tool would have written it: other names, 32-bit integers, no metadata."""
    graph = onnx.load(saved("bert") / "model.onnx")
    del graph.metadata_props[:]
    for node in graph.graph.node:
        node.output[:] = ["output_0" if name == "logits" else name for name in node.output]
    graph.graph.output[0].name = "output_0"
    ids = graph.graph.input[0]
    cast = onnx.helper.make_node("Cast", ["input_ids"], ["input_ids_64"], to=onnx.TensorProto.INT64)
    for node in graph.graph.node:
        node.input[:] = ["input_ids_64" if name == ids.name else name for name in node.input]
    graph.graph.node.insert(0, cast)
    ids.type.tensor_type.elem_type = onnx.TensorProto.INT32
    (tmp_path / "onnx").mkdir()
    onnx.save(graph, str(tmp_path / "onnx" / "model.onnx"))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(saved("bert") / name, tmp_path / name)
    return tmp_path


def test_a_file_of_another_tool_works_and_what_it_does_not_say_is_named(
    foreign: Path, saved: Callable[[str], Path]
) -> None:
    theirs = load_onnx(saved("bert"))(TEXTS)
    for path in (foreign, foreign / "onnx" / "model.onnx"):
        served = load_onnx(path)
        same(served(TEXTS), theirs)
    assert served.about.unknown == ("recipe", "γ", "parameters")
    assert "does not say: recipe, γ, parameters" in str(served)
    assert served.about.to_dict()["unknown"] == ("recipe", "γ", "parameters")


def test_inputs_that_the_graph_lacks_are_dropped_and_others_made_up(saved: Callable[[str], Path]) -> None:
    for name, extra in (("tokens", ["input_ids", "token_type_ids", "attention_mask"]), ("bert", ["input_ids"])):
        served = load_onnx(saved(name))
        plain = served(TEXTS)
        served.processor.model_input_names = extra  # copied for each call that finds none at rest
        served = OnnxPipeline(served.about, served.config, served.processor, served._make, {})
        same(served(TEXTS), plain)


def test_a_headless_model_is_for_features() -> None:
    text = hf.BertConfig(architectures=["BertModel"])
    assert job_of(text, None, False, "here").task == "feature-extraction"
    image = hf.ViTConfig(architectures=["ViTModel"])
    assert job_of(image, None, True, "here").task == "image-feature-extraction"
    assert job_of(text, "sentiment-analysis", False, "here").architecture == "BertForSequenceClassification"


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def rewrite(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        graph = onnx.load(path / "model.onnx")
        change(graph)
        onnx.save(graph, str(path / "model.onnx"))

    return edit


def set_opset(graph: Any) -> None:
    graph.opset_import[0].version = 99


def without_tokenizer(path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()


def truncate(path: Path) -> None:
    content = (path / "model.onnx").read_bytes()
    (path / "model.onnx").write_bytes(content[: len(content) // 2])


def weights_elsewhere(path: Path) -> None:
    onnx.save(onnx.load(path / "model.onnx"), str(path / "model.onnx"), save_as_external_data=True, location="gone")
    (path / "gone").unlink()


def architecture(name: str) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        config = hf.AutoConfig.from_pretrained(path)
        config.architectures = [name]
        config.save_pretrained(path)

    return edit


DAMAGES: list[tuple[Callable[[Path], None], dict[str, Any], str]] = [
    (remove("model.onnx"), {}, "has no model.onnx.*no ONNX file.*save_onnx"),
    (remove("config.json"), {}, "no config.json beside.*config.json; fix: model.config.save_pretrained"),
    (without_tokenizer, {}, "no tokenizer beside.*tokenizer.json; fix: tokenizer.save_pretrained"),
    (lambda path: (path / "tokenizer.json").write_text("{"), {}, "the tokenizer cannot be read"),
    (lambda path: (path / "config.json").write_text("{"), {}, "config.json cannot be read"),
    (lambda path: (path / "generation_config.json").write_text("{"), {}, "generation_config.json cannot be read"),
    (lambda path: (path / "model.onnx").rename(path / "a.onnx").with_name("b.onnx").write_bytes(b""), {}, "a.onnx, b"),
    (architecture("BertForQuestionAnswering"), {}, "task cannot be inferred.*BertForQuestionAnswering.*give task"),
    (truncate, {}, "cannot"),
    (rewrite(set_opset), {}, "operator set.*99"),
    (weights_elsewhere, {}, "weights kept outside the ONNX file are missing"),
    (lambda path: None, {"task": "summarise"}, "no such task.*text-classification"),
    (lambda path: None, {"task": "token-classification"}, "first output of the graph does not fit.*3 dimensions"),
    (lambda path: None, {"task": "image-classification"}, "has no bert for this task"),
    (lambda path: None, {"provider": "cuda"}, "provider is not installed"),
    (lambda path: None, {"threads": 0}, "threads=0"),
]


@pytest.mark.parametrize(("damage", "options", "message"), DAMAGES, ids=[message for *_, message in DAMAGES])
def test_bad_directories_are_one_clear_error(
    saved: Callable[[str], Path], tmp_path: Path, damage: Any, options: dict[str, Any], message: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(saved("bert"), copy)
    damage(copy)
    with pytest.raises(TdError, match=message):
        load_onnx(copy, **options)


def test_other_labels_and_strange_inputs_are_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(saved("bert"), copy)
    config = hf.AutoConfig.from_pretrained(copy)
    config.num_labels = 5
    config.save_pretrained(copy)
    with pytest.raises(TdError, match=r"does not fit the task.*the last of 5"):
        load_onnx(copy)
    shutil.copy(saved("vit") / "model.onnx", copy / "model.onnx")
    with pytest.raises(TdError, match=r"inputs that text-classification does not give.*pixel_values"):
        load_onnx(copy)
    with pytest.raises(TdError, match="no such ONNX file or directory"):
        load_onnx(tmp_path / "nowhere")


def test_a_text_that_is_too_long_is_refused_with_the_remedy(saved: Callable[[str], Path]) -> None:
    served = load_onnx(saved("bert"))
    with pytest.raises(TdError, match=r"longer than the model.*50 tokens, at most 32.*truncation=True, max_length=32"):
        served("w5 " * 50)
    same(served(TEXTS), torch_pipeline("bert")(TEXTS))  # and the next call is served


def test_threads_respect_torch_and_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own"
    assert cpu_quota(tmp_path, own) is None
    own.write_text("0::/a/b\n")
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(tmp_path, own) is None
    (tmp_path / "a" / "cpu.max").write_text("150000 100000\n")
    assert cpu_quota(tmp_path, own) == 1.5
    own.write_text("1:cpu,cpuacct:/x\n0::/\n")  # in a container of version 1 the group's folder is the mount itself
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for quota, expected in (("-1", None), ("300000", 3.0)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
        assert cpu_quota(tmp_path, own) == expected
    monkeypatch.setattr("td_plugin.export.serving_threads.torch.get_num_threads", lambda: 8)
    for quota_found, threads in ((None, 8), (0.5, 1), (2.5, 3), (64.0, 8)):
        monkeypatch.setattr("td_plugin.export.serving_threads.cpu_quota", lambda found=quota_found: found)
        assert serving_threads() == threads
    assert serving_threads(5) == 5


def test_threads_are_told(saved: Callable[[str], Path]) -> None:
    served = load_onnx(saved("bert"), threads=2)
    assert served.about.threads == 2
    assert "threads 2" in str(served)
    assert repr(served) == f"OnnxPipeline({os.fspath(saved('bert') / 'model.onnx')!r}, task='text-classification')"
    assert load_onnx(saved("bert")).about.threads == serving_threads()
