"""A model with some of another's layers, against one that was built with so many and given their weights by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import td_plugin as td
from td_plugin import TdError
from td_plugin.export import fewer_layers, load_pretrained, save_pretrained, shrink
from td_plugin.layerwise import depth_and_width

IDS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))


def bert(layers: int) -> PreTrainedModel:
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": layers}
    return BertForSequenceClassification(BertConfig(vocab_size=50, **sizes)).eval()


def gpt2(layers: int) -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=50, n_embd=16, n_head=4, n_layer=layers, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def with_weights_of(model: nn.Module, small: nn.Module, path: str, places: Sequence[int]) -> nn.Module:
    """`small`, with the weights of `model`'s layers at `places`."""
    pattern = re.compile(re.escape(path) + r"\.(\d+)\.(.*)")
    weights = {}
    for name in small.state_dict():
        found = pattern.fullmatch(name)
        source = f"{path}.{places[int(found[1])]}.{found[2]}" if found else name
        weights[name] = model.state_dict()[source]
    small.load_state_dict(weights)
    return small


@pytest.mark.parametrize(
    ("keep", "places"), [(3, [1, 3, 5]), (2, [2, 5]), (6, [0, 1, 2, 3, 4, 5]), ([0, 4], [0, 4]), (4, [1, 2, 3, 5])]
)
@pytest.mark.parametrize(("make", "path"), [(bert, "bert.encoder.layer"), (gpt2, "transformer.h")])
def test_it_is_the_model_of_so_many_layers(make, path: str, keep: int | list[int], places: list[int]) -> None:
    torch.manual_seed(0)
    model = make(6)
    small = fewer_layers(model, keep)
    expected = with_weights_of(model, make(len(places)), path, places)
    with torch.no_grad():
        assert torch.equal(small(IDS).logits, expected(IDS).logits)
    assert type(small) is type(model) and small.config.num_hidden_layers == len(places)
    assert len(model.get_submodule(path)) == model.config.num_hidden_layers == 6, "the model stays as it is"


def test_a_shorter_decoder_generates_with_a_cache_and_is_loaded_by_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = fewer_layers(gpt2(4), 2)
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS)}
    told = [model.generate(IDS, use_cache=cache, **options) for model in (small, again) for cache in (True, False)]
    assert all(torch.equal(told[0], other) for other in told[1:])


def test_depth_and_then_width(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = bert(6)
    kept, level = depth_and_width(6, 0.75)
    small = fewer_layers(model, kept)
    sparsifier = td.TargetedDropout(td.recipes.magnitude(td.granularity.Units()), level)
    sparsifier.prepare(small)
    sparsifier.squash_mask()
    small = shrink(small, round_to=1)
    save_pretrained(small, tmp_path)
    with torch.no_grad():
        assert torch.equal(load_pretrained(tmp_path)(IDS).logits, small(IDS).logits)

    def weights(m: nn.Module) -> int:
        return sum(p.numel() for n, p in m.bert.encoder.named_parameters() if p.dim() == 2)

    assert weights(small) == weights(model) / 4


@given(st.integers(1, 100), st.floats(0, 0.999))
def test_depth_and_width_leave_the_share_asked_for(layers: int, level: float) -> None:
    kept, width = depth_and_width(layers, level)
    assert 1 <= kept <= layers and 0 <= width < 1
    left = kept * (1 - width) / layers
    if width > 0:
        assert left == pytest.approx(1 - level)
    else:
        assert left <= 1 - level + 1e-9, "rounding took more layers than asked for"
    assert abs(kept - layers * (1 - level) ** 0.5) <= 0.5 or kept == 1


@given(st.integers(2, 60).flatmap(lambda count: st.tuples(st.just(count), st.integers(1, count))))
def test_any_number_can_be_kept_evenly(numbers: tuple[int, int]) -> None:
    count, keep = numbers
    model = nn.ModuleDict({"stack": nn.ModuleList(nn.Linear(1, 1) for _ in range(count))})
    for place, layer in enumerate(model["stack"]):
        nn.init.constant_(layer.weight, place)
    places = [int(layer.weight) for layer in fewer_layers(model, keep)["stack"]]
    assert len(places) == keep and places[-1] == count - 1
    gaps = [after - before for before, after in zip([-1, *places], places, strict=False)]
    assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


def test_refusals() -> None:
    model = bert(4)
    for keep in (0, 5, True):
        with pytest.raises(TdError, match=r"cannot be kept; where: bert\.encoder\.layer.*fix: 1 to 4"):
            fewer_layers(model, keep)
    for places in ([], [1, 1], [2, 0], [0, 4], [-1, 2]):
        with pytest.raises(TdError, match=r"places of layers rise.*fix: of 0 to 3"):
            fewer_layers(model, places)
    with pytest.raises(TdError, match=r"no such module; where: bert\.layers"):
        fewer_layers(model, 2, container="bert.layers")
    with pytest.raises(TdError, match=r"ModuleList or Sequential; where: bert\.pooler"):
        fewer_layers(model, 1, container="bert.pooler")
    with pytest.raises(TdError, match="not clear.*no list of several layers of one class"):
        fewer_layers(nn.Linear(2, 2), 1)
    td.TargetedDropout(td.recipes.targeted_unit(), 0.5).prepare(model)
    with pytest.raises(TdError, match="carries masks already"):
        fewer_layers(model, 2)


def test_two_stacks_of_one_length_are_told_apart_by_name() -> None:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 4, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(vocab_size=50, decoder_start_token_id=0, **sizes)).eval()
    with pytest.raises(TdError, match=r"not clear.*got: encoder\.block, decoder\.block"):
        fewer_layers(model, 2)
    small = fewer_layers(model, 2, container="decoder.block")
    assert len(small.encoder.block) == 4 and len(small.decoder.block) == 2
    with torch.no_grad():
        assert small(input_ids=IDS, decoder_input_ids=IDS).logits.shape == (2, 7, 50)
