"""`survey`: where the structure is read from, what the user keeps, and what it says when it cannot."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import FAMILIES
from graph_models import CASES, Net, build, floats
from torch import Tensor, nn
from transformers import BertConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from td_plugin.errors import TdError
from td_plugin.export import shrink
from td_plugin.graph import trace as tracing
from td_plugin.structure import Structure, refused_groups, survey, unit_groups

X = {"x": floats(7, 5).float()}


class Branching(nn.Module):
    """Looks at data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x).relu()
        if hidden.sum() > 1:  # the line to blame
            hidden = -hidden
        return self.b(hidden)


def mlp() -> nn.Module:
    return Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(5, 6), b=nn.Linear(6, 2))


def names(structure: Structure) -> list[str]:
    return [group.name for group in structure.groups]


@pytest.mark.parametrize(
    ("make", "inputs", "source"),
    [
        (FAMILIES["bert"].build, None, "table"),
        (FAMILIES["gpt2"].build, None, "graph"),
        (lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2)), None, "chains"),
        (lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2)), {"input": X["x"]}, "graph"),
        (mlp, X, "graph"),
        (mlp, None, "chains"),
    ],
    ids=["table", "transformers", "chain", "chain with inputs", "own", "own without inputs"],
)
def test_where_it_is_read_from(make: Callable[[], nn.Module], inputs: Mapping[str, Any] | None, source: str) -> None:
    model = make()
    found = survey(model, inputs)
    assert found.source == source
    assert (found.program is not None) == bool(found.work) == (source == "graph")
    assert list(found.groups) == unit_groups(model, inputs)
    assert {fixed.name: fixed.reason for fixed in found.fixed} == refused_groups(model, inputs)


def test_the_line_that_branches_on_data_is_named() -> None:
    with pytest.raises(TdError, match="Branching cannot be traced") as caught:
        survey(Branching(), X)
    lines, first = inspect.getsourcelines(Branching)
    line = first + next(i for i, text in enumerate(lines) if "the line to blame" in text)
    assert f"{Path(__file__).name}:{line}: if hidden.sum() > 1" in str(caught.value)
    assert "hand the groups over: groups=[...]" in str(caught.value)


def test_without_inputs_a_model_cannot_be_traced() -> None:
    with pytest.raises(TdError, match="Net cannot be traced without inputs|cannot be traced without inputs(.|\n)*Net"):
        survey(mlp(), source="graph")


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"x": floats(7, 4).float()}, "does not run with these inputs: .*7x4 and 5x6"),
        ({"wrong": X["x"]}, "does not run with these inputs: .*unexpected keyword argument 'wrong'"),
        ({}, "does not run with these inputs: .*missing 1 required positional argument: 'x'"),
        (X["x"], "inputs are given by name(.|\n)*Tensor"),
    ],
    ids=["shape", "name", "none", "no dict"],
)
def test_wrong_example_inputs(inputs: Any, reason: str) -> None:
    with pytest.raises(TdError, match=reason):
        survey(mlp(), inputs)


def test_inputs_of_a_wrong_type_are_noticed_when_the_model_runs() -> None:
    model = mlp()
    with torch.no_grad():
        model.a.weight[2] = 0
    with pytest.raises(TdError, match="does not run with these inputs(.|\n)*dtype"):
        shrink(model, example_inputs={"x": torch.ones(7, 5, dtype=torch.long)})


class Peculiar(PreTrainedModel):
    """Of transformers, and without a trace."""

    config_class = BertConfig

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.embedding, self.up, self.down = nn.Embedding(config.vocab_size, 8), nn.Linear(8, 6), nn.Linear(6, 8)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embedding(input_ids)
        return self.down(self.up(hidden).relu()) if hidden.sum() > 0 else hidden


def test_a_transformer_that_cannot_be_traced_falls_back_and_says_why() -> None:
    model = Peculiar(BertConfig(vocab_size=40, hidden_size=8))
    found = survey(model)
    assert (found.source, names(found)) == ("chains", [])
    (why,) = (fixed for fixed in found.fixed if fixed.name == "Peculiar")
    assert "cannot be traced" in why.reason and "hidden.sum() > 0" in why.reason
    with pytest.raises(TdError, match="Peculiar cannot be traced"):
        survey(model, source="graph")


def test_what_the_user_keeps_stays() -> None:
    model = build("linear")
    inputs = CASES["linear"].inputs
    found = survey(model, inputs, keep=["a.weight"])
    assert names(found) == []
    assert {fixed.name: fixed.reason for fixed in found.fixed}["a"] == "the user keeps it"
    assert names(survey(model, inputs, keep=["a.bias"])) == []  # any tensor of the units
    assert names(survey(model, inputs)) == ["a"]


def test_a_kept_layer_leaves_the_others() -> None:
    model = FAMILIES["gpt2"].build()
    every, kept = names(survey(model)), names(survey(model, keep=["transformer.h.1.mlp.c_fc.weight"]))
    assert set(every) - set(kept) == {"transformer.h.1.mlp.c_fc"}


@pytest.mark.parametrize("keep", [["nowhere.weight"], ["a"], ["a.weight", "b.wieght"]])
def test_a_misspelled_tensor_to_keep_is_an_error(keep: list[str]) -> None:
    with pytest.raises(TdError, match="no such tensor to keep(.|\n)*nearest"):
        survey(mlp(), X, keep=keep)


def test_one_name_alone_is_no_list_of_names() -> None:
    with pytest.raises(TdError, match="keep=.'a.weight'."):
        survey(mlp(), X, keep="a.weight")


def test_what_is_kept_stays_without_a_trace_too() -> None:
    model = FAMILIES["bert"].build()
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    found = survey(model, keep=[name])
    assert "bert.encoder.layer.0.intermediate.dense" not in names(found)
    assert "bert.encoder.layer.1.intermediate.dense" in names(found)


def test_the_model_is_left_as_it_was() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    survey(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert model.config.to_dict() == config and model.config.use_cache is True


def test_a_failure_leaves_the_model_as_it_was() -> None:
    model = Branching().train()
    model.b.eval()
    with pytest.raises(TdError):
        survey(model, X)
    assert (model.training, model.a.training, model.b.training) == (True, True, False)


SMALL = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 6}
SMALL |= {"num_key_value_heads": 2, "intermediate_size": 20, "max_position_embeddings": 16}


def test_weights_are_not_needed() -> None:
    real = LlamaForCausalLM(LlamaConfig(**SMALL))
    with torch.device("meta"):
        llama, own = LlamaForCausalLM(LlamaConfig(**SMALL)), mlp()
    assert survey(llama).groups == survey(real).groups
    assert survey(own, X).groups == survey(mlp(), X).groups  # whatever device the inputs are on


def test_a_graph_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "MOST_NODES", 5)
    with pytest.raises(TdError, match="the traced graph is too large(.|\n)*operators"):
        survey(mlp(), X)
