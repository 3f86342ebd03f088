"""`shrink` of models that are read from their traced graph: constants, refusals, floors, rounding, optimizers."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from family_cases import FAMILIES
from family_nets import BasicBlock
from graph_models import Net, Rms, attend, excite, floats
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from td_plugin.cutting import alignment
from td_plugin.errors import TdError
from td_plugin.export import shrink
from td_plugin.structure import Residue, Slice, Structure, UnitGroup, survey

X, S, IMAGES = ({"x": floats(*shape).float()} for shape in ((7, 5), (2, 7, 5), (2, 3, 9, 9)))
GONE = (1, 3)
Inputs = Mapping[str, Tensor]


def output(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """In evaluation mode; the model is left in the mode it was in."""
    with torch.no_grad():
        found = copy.deepcopy(model).eval()(**inputs)
    return found if isinstance(found, Tensor) else found[0]


def zero(model: nn.Module, group: UnitGroup, units: Sequence[int] = GONE, biases: bool = False) -> None:
    """In place: the weights of the units, and with `biases` all that is silenced with them."""
    with torch.no_grad():
        for part in group.ranked + (group.carried if biases else ()):
            tensor = attrgetter(part.fqn)(model).movedim(part.dim, 0)
            tensor[torch.isin(part.units(len(tensor)), torch.tensor(units))] = 0


def group_of(model: nn.Module, inputs: Mapping[str, Any], name: str) -> UnitGroup:
    found = {group.name: group for group in survey(model, inputs, source="graph").groups}
    return found[name]


def built(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """In evaluation mode, with biases and norms that do something."""
    torch.manual_seed(seed)
    model = make().eval()
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim == 1:
                tensor.copy_(torch.rand_like(tensor) + 0.3)
        for name, tensor in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return model


def parameters(model: nn.Module) -> int:
    return sum(tensor.numel() for tensor in model.parameters())


def same(one: nn.Module, other: nn.Module, inputs: Mapping[str, Any], tolerance: float = 1e-5) -> bool:
    return bool((output(one, inputs) - output(other, inputs)).abs().max() < tolerance)


def equal_state(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Embedded(nn.Module):
    """A recurrent layer that reads what a linear layer computes."""

    def __init__(self, kind: type[nn.RNNBase], both: bool = False) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(5, 6), nn.Linear(8 if both else 4, 2)
        self.rnn = kind(6, 4, bidirectional=both, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.a(x).sigmoid())[0])


def _conv(act: Callable[[Tensor], Tensor], bias: bool = True, **options: Any) -> Callable[[], nn.Module]:
    return lambda: Net(
        lambda m, x: m.b(act(m.n(m.a(x)))).mean((2, 3)),
        a=nn.Conv2d(3, 6, 3, padding=1),
        n=nn.BatchNorm2d(6),
        b=nn.Conv2d(6, 4, 3, bias=bias, **options),
    )


def _attention(bias: bool) -> Callable[[], nn.Module]:
    return lambda: Net(attend, q=nn.Linear(5, 12), k=nn.Linear(5, 12), v=nn.Linear(5, 12), o=nn.Linear(12, 4, bias))


def _chain(act: Callable[[Tensor], Tensor], bias: bool = True) -> Callable[[], nn.Module]:
    return lambda: Net(lambda m, x: m.b(act(m.a(x))), a=nn.Linear(5, 6), b=nn.Linear(6, 2, bias))


def _joined(m: Net, x: Tensor) -> Tensor:
    return m.d(torch.cat((m.a(x).sigmoid(), m.b(x).tanh()), -1))


FOLDS: dict[str, tuple[Callable[[], nn.Module], Inputs, str]] = {
    "gelu": (_chain(F.gelu), X, "a"),
    "sigmoid, a new bias": (_chain(torch.sigmoid, bias=False), S, "a"),
    "batch norm, convolution": (_conv(F.relu), IMAGES, "a"),
    "a new bias of a convolution": (_conv(torch.sigmoid, bias=False), IMAGES, "a"),
    "circular padding": (_conv(F.relu, padding=1, padding_mode="circular"), IMAGES, "a"),
    "depthwise in between": (
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x).relu()).relu()).mean((2, 3)),
            a=nn.Conv2d(3, 6, 3),
            b=nn.Conv2d(6, 6, 3, groups=6),
            c=nn.Conv2d(6, 2, 1),
        ),
        IMAGES,
        "a",
    ),
    "flatten": (
        lambda: Net(lambda m, x: m.b(m.a(x).sigmoid().flatten(1)), a=nn.Conv2d(3, 6, 3), b=nn.Linear(294, 2)),
        IMAGES,
        "a",
    ),
    "Conv1D of transformers": (lambda: Net(lambda m, x: m.b(F.gelu(m.a(x))), a=Conv1D(6, 5), b=Conv1D(2, 6)), S, "a"),
    "value biases of heads": (_attention(True), S, "q"),
    "a new bias behind heads": (_attention(False), S, "q"),
    "input bias of an LSTM": (lambda: Embedded(nn.LSTM), S, "a"),
    "input bias of a GRU": (lambda: Embedded(nn.GRU), S, "a"),
    "input biases of both directions": (lambda: Embedded(nn.LSTM, both=True), S, "a"),
    "two readers": (
        lambda: Net(
            lambda m, x: m.b(m.a(x).sigmoid()) + m.c(m.a(x).tanh()),
            a=nn.Linear(5, 6),
            b=nn.Linear(6, 2),
            c=nn.Linear(6, 2, False),
        ),
        X,
        "a",
    ),
    "gated": (
        lambda: Net(lambda m, x: m.b(F.silu(m.a(x)) * m.c(x)), a=nn.Linear(5, 6), c=nn.Linear(5, 6), b=nn.Linear(6, 2)),
        X,
        "a",
    ),
    "squeeze and excite": (
        lambda: Net(excite, a=nn.Conv2d(3, 6, 3), down=nn.Conv2d(6, 4, 1), up=nn.Conv2d(4, 6, 1), c=nn.Conv2d(6, 2, 1)),
        IMAGES,
        "a",
    ),
    "one layer that reads twice the same": (
        lambda: Net(lambda m, x: m.b(m.a(x).relu()) + m.b(m.a(2 * x).relu()), a=nn.Linear(5, 6), b=nn.Linear(6, 2)),
        X,
        "a",
    ),
    "one half of a concatenation": (
        lambda: Net(_joined, a=nn.Linear(5, 6), b=nn.Linear(5, 4), d=nn.Linear(10, 2)),
        X,
        "a",
    ),
}


@pytest.mark.parametrize("case", FOLDS)
def test_constants_move_into_the_reader(case: str) -> None:
    make, inputs, name = FOLDS[case]
    model = built(make)
    group = group_of(model, inputs, name)
    zero(model, group)
    small = shrink(model, round_to=1, example_inputs=inputs)
    assert parameters(small) < parameters(model)
    assert same(small, model, inputs)
    without = copy.deepcopy(model)
    zero(without, group, biases=True)
    assert not same(without, model, inputs)  # there was something to fold


def test_constants_of_both_halves_of_a_concatenation() -> None:
    model = built(lambda: Net(_joined, a=nn.Linear(5, 6), b=nn.Linear(5, 4), d=nn.Linear(10, 2)))
    for name in ("a", "b"):
        zero(model, group_of(model, X, name))
    small = shrink(model, round_to=1, example_inputs=X)
    assert attrgetter("d.in_features")(small) == 6
    assert same(small, model, X)


def test_a_constant_that_feeds_units_which_go_too() -> None:
    def chain(m: Net, x: Tensor) -> Tensor:
        return m.c(m.b(m.a(x).sigmoid()).sigmoid())

    model = built(lambda: Net(chain, a=nn.Linear(5, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 2)))
    for name in ("a", "b"):
        zero(model, group_of(model, X, name))
    assert same(shrink(model, round_to=1, example_inputs=X), model, X)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "own_vit"])
def test_constants_in_models_of_other_people(family: str) -> None:
    case = FAMILIES[family]
    model = case.build()
    inputs = case.inputs(model)
    for group in survey(model, inputs, source="graph").groups:
        if group.kind in ("heads", "neurons"):
            zero(model, group, (1,))
    small = shrink(model, round_to=1, example_inputs=inputs)
    assert parameters(small) < parameters(model)
    assert same(small, model, inputs)


def test_a_layer_that_is_run_several_times() -> None:
    """ALBERT: its only layer adds the same constant every time."""
    sizes = {"vocab_size": 50, "embedding_size": 16, "hidden_size": 24, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "intermediate_size": 20, "max_position_embeddings": 16}
    model = built(lambda: AlbertModel(AlbertConfig(**sizes), add_pooling_layer=False))
    groups = survey(model).groups
    assert {group.kind for group in groups} == {"heads", "neurons"}
    for group in groups:
        zero(model, group, (1,))
    inputs = {"input_ids": IDS["input_ids"]}
    small = shrink(model, round_to=1)
    assert parameters(small) < parameters(model) and same(small, model, inputs)


REFUSED: dict[str, tuple[Callable[[], nn.Module], Inputs, str]] = {
    "pads with zeros": (_conv(F.relu, padding=1), IMAGES, "b.weight pads with zeros"),
    "grouped": (_conv(F.relu, groups=2), IMAGES, "b.weight .*group"),
    "transposed": (
        lambda: Net(
            lambda m, x: m.b(m.a(x).relu()).mean((2, 3)), a=nn.Conv2d(3, 6, 3), b=nn.ConvTranspose2d(6, 4, 3)
        ),
        IMAGES,
        "b.weight is a grouped or transposed convolution",
    ),
    "from sample to sample": (
        lambda: Net(
            lambda m, x: m.b(m.a(x).relu() * x.mean(-1, keepdim=True)), a=nn.Linear(5, 6), b=nn.Linear(6, 2)
        ),
        X,
        "b.weight reads of it differs from sample to sample or place to place",
    ),
    "from place to place": (
        lambda: Net(
            lambda m, x: m.b(m.a(x) + m.p), a=nn.Linear(5, 6), b=nn.Linear(6, 2), p=nn.Parameter(torch.randn(7, 6))
        ),
        S,
        "b.weight reads of it differs from sample to sample or place to place",
    ),
    "no place for a bias": (
        lambda: Net(
            lambda m, x: m.a(x).relu() @ m.b, a=nn.Linear(5, 6), b=nn.Parameter(torch.randn(6, 2))
        ),
        X,
        "b has no bias",
    ),
    "two constants for one layer": (
        lambda: Net(
            lambda m, x: m.b(m.a(x).relu()) + m.b(m.a(x).tanh()), a=nn.Linear(5, 6), b=nn.Linear(6, 2)
        ),
        X,
        "b.weight reads different constants",
    ),
    "an LSTM without biases": (
        lambda: Net(
            lambda m, x: m.c(m.rnn(m.a(x))[0]),
            a=nn.Linear(5, 6), rnn=nn.LSTM(6, 4, bias=False, batch_first=True), c=nn.Linear(4, 2),
        ),
        S,
        "rnn.weight_ih_l0 has no bias",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_folded_is_refused_with_the_reason(case: str) -> None:
    make, inputs, reason = REFUSED[case]
    model = built(make)
    group = group_of(model, inputs, "a")
    zero(model, group, range(3) if case == "grouped" else GONE)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TdError, match=f"still emits a constant(.|\n)*{reason}"):
        shrink(model, round_to=1, example_inputs=inputs)
    assert equal_state(before, model.state_dict())
    zero(model, group, range(3) if case == "grouped" else GONE, biases=True)
    assert same(shrink(model, round_to=1, example_inputs=inputs), model, inputs)


def test_a_bias_that_is_not_used_is_no_place_for_a_constant() -> None:
    model = built(
        lambda: Net(lambda m, x: F.linear(m.a(x).sigmoid(), m.b.weight), a=nn.Linear(5, 6), b=nn.Linear(6, 2))
    )
    zero(model, group_of(model, X, "a"))
    with pytest.raises(TdError, match="computes something else"):
        shrink(model, round_to=1, example_inputs=X)


def _surveyed(patch: pytest.MonkeyPatch, structure: Structure) -> None:
    patch.setattr(importlib.import_module("td_plugin.export.shrink"), "survey", lambda *_: structure)


def test_a_wrong_group_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(
        lambda: Net(lambda m, x: m.b(m.norm(m.a(x))), a=nn.Linear(5, 6, bias=False), norm=Rms(6), b=nn.Linear(6, 2))
    )
    structure = survey(model, X)
    (group,) = structure.groups
    zero(model, group, biases=True)
    before = copy.deepcopy(model.state_dict())
    assert same(shrink(model, round_to=1, example_inputs=X), model, X)
    _surveyed(monkeypatch, replace(structure, groups=(replace(group, norms=()),)))
    with pytest.raises(TdError, match="computes something else(.|\n)*differ by"):
        shrink(model, round_to=1, example_inputs=X)
    assert equal_state(before, model.state_dict())


def test_widths_that_the_code_cannot_take_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = FAMILIES["own_vit"]
    model = case.build()
    structure = survey(model, case.inputs(model))
    group = next(group for group in structure.groups if group.kind == "heads")
    zero(model, group, biases=True)
    _surveyed(monkeypatch, replace(structure, groups=(replace(group, sizes=()),)))
    with pytest.raises(TdError, match="does not run with these widths(.|\n)*RuntimeError"):
        shrink(model, example_inputs=case.inputs(model))


def test_a_layer_whose_heads_are_all_gone_emits_its_constant() -> None:
    case = FAMILIES["bert"]
    model = case.build()
    inputs = case.inputs(model)
    heads = next(group for group in survey(model).groups if group.kind == "heads")
    zero(model, heads, range(heads.units))
    kept, none = shrink(model, round_to=1), shrink(model, round_to=1, floors={"heads": 0})
    attention = attrgetter(heads.name)
    assert (attention(kept).num_attention_heads, attention(none).num_attention_heads) == (1, 0)
    assert same(kept, model, inputs) and same(none, model, inputs)


def test_a_model_that_cannot_do_without_heads_says_so() -> None:
    case = FAMILIES["gpt2"]
    model = case.build()
    before = copy.deepcopy(model.state_dict())
    heads = next(group for group in survey(model).groups if group.kind == "heads")
    zero(model, heads, range(heads.units))
    with pytest.raises(TdError, match="does not run with these widths(.|\n)*keep at least one unit") as caught:
        shrink(model, floors={"heads": 0})
    assert "GPT2LMHeadModel" in str(caught.value)
    zero(model, heads, range(heads.units), biases=True)
    assert attrgetter(f"{heads.name.rpartition('.')[0]}.num_heads")(shrink(model)) == 1
    assert before.keys() == model.state_dict().keys()


def _mixed() -> nn.Module:
    return Net(
        lambda m, x: m.d(m.c(m.b(m.a(x).relu()).relu().mean((2, 3))).relu()),
        a=nn.Conv2d(3, 40, 3), b=nn.Conv2d(40, 30, 3), c=nn.Linear(30, 300), d=nn.Linear(300, 2),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("round_to", "widths"),
    [
        (1, (17, 8, 99)),
        (8, (24, 8, 104)),
        ({"channels": 5}, (20, 10, 99)),
        ({"neurons": 50}, (17, 8, 100)),
        (None, (32, 8, 112)),
    ],
)
def test_rounding_by_kind(round_to: Any, widths: tuple[int, ...]) -> None:
    model = built(_mixed)
    for name, keep in (("a", 17), ("b", 8), ("c", 99)):
        group = group_of(model, IMAGES, name)
        zero(model, group, range(keep, group.units))
    small = shrink(model, round_to=round_to, example_inputs=IMAGES)
    assert tuple(len(attrgetter(f"{name}.weight")(small)) for name in "abc") == widths
    assert same(small, model, IMAGES)


def test_groups_by_hand() -> None:
    class Branching(nn.Module):
        """No trace can be made of it."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu()) if x.sum() > -1e9 else x[:, :2]

    model = built(Branching)
    group = UnitGroup(
        "a",
        "neurons",
        6,
        (Slice("a", "weight", 0),),
        (Slice("a", "bias", 0),),
        (Slice("b", "weight", 1),),
        (),
        (),
        None,
    )
    zero(model, group)
    with pytest.raises(TdError, match="cannot be traced"):
        shrink(model, example_inputs=X)
    with pytest.raises(TdError, match="what a silent unit of this group emits is not known"):
        shrink(model, round_to=1, groups=[group])
    relu = nn.ReLU()
    model.act = relu
    small = shrink(model, round_to=1, groups=[replace(group, residue=Residue("a", ("act",)))])
    assert same(small, model, X) and len(attrgetter("a.weight")(small)) == 4
    zero(model, group, biases=True)
    assert same(shrink(model, round_to=1, groups=[group]), model, X)


class Stacked(nn.Module):
    """A stem, residual blocks of two stages, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(BasicBlock(8, 10, 8, 1), BasicBlock(8, 12, 16, 2), BasicBlock(16, 10, 16, 1))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.norm(self.stem(x)).relu()).mean((2, 3)))
        return out


def _llama() -> nn.Module:
    sizes = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 6}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 20, "max_position_embeddings": 16}
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))


IDS = {"input_ids": torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(1)), "use_cache": False}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Mapping[str, Any], number: int) -> Tensor:
    found = model.train()(**inputs)
    logits = found if isinstance(found, Tensor) else found.logits
    target = torch.randn(logits.shape, generator=torch.Generator().manual_seed(number))
    loss = (logits - target).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize(
    ("make", "inputs", "kinds"),
    [(Stacked, IMAGES, ("channels",)), (_llama, IDS, ("heads", "neurons", "layers"))],
    ids=["residual convolutions", "llama"],
)
def test_training_goes_on_as_with_the_mask(
    make: Callable[[], nn.Module], inputs: Mapping[str, Any], kinds: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for number in range(3):
        step(model, optimizer, inputs, number)
    groups = [group for group in survey(model, inputs, source="graph").groups if group.kind in kinds]
    gone = [(group, (0,) if group.units < 4 else GONE) for group in groups]
    for group, units in gone:
        zero(model, group, units, biases=True)
    dense, whole = copy.deepcopy(model), optimizer.state_dict()
    reference = torch.optim.Adam(dense.parameters(), lr=3e-3)
    reference.load_state_dict(copy.deepcopy(whole))
    small = shrink(model, round_to=1, example_inputs=inputs, optimizer=optimizer)
    assert parameters(small) < 0.85 * parameters(model)
    assert {id(p) for p in small.parameters()} == {id(p) for g in optimizer.param_groups for p in g["params"]}
    for parameter in small.parameters():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
        assert optimizer.state[parameter]["exp_avg"].any() and optimizer.state[parameter]["step"] == 3
    for number in range(3, 9):
        losses = step(small, optimizer, inputs, number), step(dense, reference, inputs, number)
        for group, units in gone:
            zero(dense, group, units, biases=True)
        assert abs(losses[0] - losses[1]) < 1e-5
        assert same(small, dense, inputs)


def test_the_optimizer_gets_the_bias_that_folding_makes() -> None:
    model = built(_chain(torch.sigmoid, bias=False)).train()
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer, X, 0)
    zero(model, group_of(model, X, "a"))
    small = shrink(model, round_to=1, example_inputs=X, optimizer=optimizer)
    bias = attrgetter("b.bias")(small)
    before = bias.detach().clone()
    step(small, optimizer, X, 1)
    assert not torch.equal(bias, before)


@pytest.mark.parametrize("family", ["own_resnet", "own_vit", "llama", "gpt2"])
def test_bfloat16(family: str) -> None:
    case = FAMILIES[family]
    model = case.build().to(torch.bfloat16)
    inputs = {
        name: value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in case.inputs(model).items()
    }
    for group in survey(model, inputs, source="graph").groups:
        if group.kind != "layers":
            zero(model, group, (1,), biases=True)
    small = shrink(model, round_to=1, example_inputs=inputs)
    assert {tensor.dtype for tensor in small.parameters()} == {torch.bfloat16}
    assert same(small, model, inputs, 0.05 * float(output(model, inputs).abs().max()))


def test_constants_in_bfloat16() -> None:
    model = built(_chain(torch.sigmoid)).to(torch.bfloat16)
    inputs = {"x": X["x"].to(torch.bfloat16)}
    zero(model, group_of(model, inputs, "a"))
    assert same(shrink(model, round_to=1, example_inputs=inputs), model, inputs, 0.02)


def test_the_model_is_left_as_it_was() -> None:
    model = built(Stacked).train()
    model.blocks[0].eval()
    model.stem.weight.requires_grad_(False)
    model.stem.register_forward_hook(lambda *_: None)
    group = group_of(model, IMAGES, "blocks.0.conv1")
    zero(model, group, biases=True)
    state, hooks = copy.deepcopy(model.state_dict()), list(model.stem._forward_hooks)
    modes = [module.training for module in model.modules()]
    pointers = [tensor.data_ptr() for tensor in model.parameters()]
    small = shrink(model, round_to=1, example_inputs=IMAGES)
    assert equal_state(state, model.state_dict()) and list(model.stem._forward_hooks) == hooks
    assert [module.training for module in model.modules()] == modes
    assert [tensor.data_ptr() for tensor in model.parameters()] == pointers
    assert [module.training for module in small.modules()] == modes
    assert [t.requires_grad for t in small.parameters()] == [t.requires_grad for t in model.parameters()]
    assert same(small, model, IMAGES)


def test_what_is_frozen_stays_frozen() -> None:
    model = built(_chain(torch.sigmoid, bias=False)).requires_grad_(False)
    zero(model, group_of(model, X, "a"))
    small = shrink(model, round_to=1, example_inputs=X)
    assert not any(tensor.requires_grad for tensor in small.parameters()) and same(small, model, X)


def test_a_layer_that_is_used_twice() -> None:
    def twice(m: Net, x: Tensor) -> Tensor:
        return m.b(m.same(m.same(m.a(x)).relu()).relu())

    model = built(lambda: Net(twice, a=nn.Linear(5, 6), same=nn.Linear(6, 6), b=nn.Linear(6, 2)))
    (group,) = survey(model, X).groups
    zero(model, group, biases=True)
    small = shrink(model, round_to=1, example_inputs=X)
    assert attrgetter("same.weight")(small).shape == (4, 4) and same(small, model, X)


def test_one_module_under_two_names_stays_one() -> None:
    def both(m: Net, x: Tensor) -> Tensor:
        return m.one(x).relu() @ m.b.weight.T + m.other(x).tanh() @ m.c.weight.T

    shared = nn.Linear(5, 6)
    model = built(lambda: Net(both, one=shared, other=shared, b=nn.Linear(6, 2), c=nn.Linear(6, 2)))
    (group,) = survey(model, X).groups
    zero(model, group, biases=True)
    small = shrink(model, round_to=1, example_inputs=X)
    assert attrgetter("one")(small) is attrgetter("other")(small)
    assert attrgetter("one.weight")(small).shape == (4, 5) and same(small, model, X)


def test_tied_weights_stay_tied() -> None:
    def towers(m: Net, x: Tensor) -> Tensor:
        return m.c(m.a(x).relu() + m.b(2 * x).tanh())

    def make() -> nn.Module:
        model = Net(towers, a=nn.Linear(5, 6), b=nn.Linear(5, 6), c=nn.Linear(6, 2))
        model.b.weight = model.a.weight
        return model

    model = built(make)
    (group,) = survey(model, X).groups
    zero(model, group, biases=True)
    small = shrink(model, round_to=1, example_inputs=X)
    assert attrgetter("a.weight")(small) is attrgetter("b.weight")(small)
    assert attrgetter("a.weight")(small).shape == (4, 5) and same(small, model, X)


def test_a_second_time_there_is_nothing_to_remove() -> None:
    model = built(Stacked)
    with pytest.raises(TdError, match="no unit is zero, nothing to remove"):
        shrink(model, example_inputs=IMAGES)
    zero(model, group_of(model, IMAGES, "blocks.0.conv1"), biases=True)
    small = shrink(model, round_to=1, example_inputs=IMAGES)
    with pytest.raises(TdError, match="nothing to remove"):
        shrink(small, round_to=1, example_inputs=IMAGES)
    with pytest.raises(TdError, match="rounding up keeps every zero unit(.|\n)*2 zero units"):
        shrink(model, round_to=10, example_inputs=IMAGES)


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model = Stacked()
    with pytest.raises(TdError, match="the weights are not there(.|\n)*meta"):
        shrink(model, example_inputs=IMAGES)


@pytest.mark.parametrize(("dtype", "multiple"), [(torch.float32, 4), (torch.bfloat16, 8)])
def test_fused_experts_keep_rows_of_16_bytes(dtype: torch.dtype, multiple: int) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 6}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 40, "num_local_experts": 3, "pad_token_id": 0}
    torch.manual_seed(0)
    model: nn.Module = MixtralForCausalLM(MixtralConfig(**sizes)).eval()
    groups = {group.name: group for group in survey(model).groups}
    model = model.to(dtype)
    experts, heads = groups["model.layers.0.mlp.experts"], groups["model.layers.0.self_attn"]
    stream = next(group for group in groups.values() if group.kind == "hidden")
    assert [alignment(model, group) for group in (experts, heads, stream)] == [multiple, 1, multiple]
    zero(model, experts, range(9, experts.units))
    for round_to in (1, 3):  # rounded up first
        small = shrink(model, groups=[experts], round_to=round_to)
        left = attrgetter("model.layers.0.mlp.experts.gate_up_proj")(small).shape[1] // 2
        assert left == -(-9 // multiple) * multiple
        assert same(small, model, IDS, 1e-5 if dtype == torch.float32 else 0.1)
    if dtype == torch.float32:  # the traced model chooses the same
        left = attrgetter("model.layers.0.mlp.experts.gate_up_proj")(shrink(model, round_to=1)).shape[1] // 2
        assert left == 12


def test_a_positional_embedding_is_no_stack_of_experts() -> None:
    def stream(m: Net, x: Tensor) -> Tensor:
        return m.b(m.norm(m.a(x) + m.places))

    model = built(
        lambda: Net(
            stream, a=nn.Linear(5, 10), norm=Rms(10), b=nn.Linear(10, 2), places=nn.Parameter(torch.randn(1, 7, 10))
        )
    )
    (group,) = survey(model, S).groups
    zero(model, group, range(3), biases=True)
    small = shrink(model, round_to=1, example_inputs=S)
    assert attrgetter("a.out_features")(small) == 7 and same(small, model, S)


class Blocks(nn.Module):
    """Pre-norm residual layers in a `nn.Sequential` that is not the model itself."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.layers = nn.Sequential(*layers)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body.layers(x))
        return out


class Residual(nn.Module):
    """Pre-norm; with `extra` it returns something beside the stream, with `post` the norm is around the sum."""

    def __init__(self, extra: bool = False, post: bool = False) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6)
        self.extra, self.post = extra, post

    def forward(self, x: Any) -> Any:
        x = x[0] if isinstance(x, tuple) else x
        hidden = self.up(x if self.post else self.norm(x)).relu()
        out = self.norm(x + self.down(hidden)) if self.post else x + self.down(hidden)
        return (out, hidden) if self.extra else out


class Other(Residual):
    """Of another class."""


class Tapped(Blocks):
    """What a layer computes inside is used outside too."""

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(())
        for layer in self.body.layers:
            x, hidden = layer(x)
            total = total + hidden.mean()
        out: Tensor = self.head(x) + total
        return out


STREAM = {"x": floats(2, 7, 6).float()}
CONTAINERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "residual layers": (lambda: Blocks([Residual() for _ in range(4)]), 4),
    "one layer": (lambda: Blocks([Residual()]), 0),
    "of different classes": (lambda: Blocks([Residual(), Other(), Residual()]), 0),
    "norms around the sum": (lambda: Blocks([Residual(post=True) for _ in range(3)]), 0),
    "what is inside is used outside": (lambda: Tapped([Residual(extra=True) for _ in range(3)]), 0),
}


@pytest.mark.parametrize("case", CONTAINERS)
def test_which_containers_hold_layers_that_can_leave(case: str) -> None:
    make, units = CONTAINERS[case]
    model = built(make)
    found = [group for group in survey(model, STREAM).groups if group.kind == "layers"]
    assert [(group.name, group.units) for group in found] == ([("body.layers", units)] if units else [])


def test_bert_has_norms_around_its_sums() -> None:
    assert "layers" not in {group.kind for group in survey(FAMILIES["bert"].build(), source="graph").groups}


def test_layers_leave_and_the_others_move_up() -> None:
    model = built(CONTAINERS["residual layers"][0])
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer, STREAM, 0)
    zero(model, group_of(model, STREAM, "body.layers"), (0, 2), biases=True)
    state = {name: optimizer.state[tensor]["exp_avg"].clone() for name, tensor in model.named_parameters()}
    small = shrink(model, example_inputs=STREAM, optimizer=optimizer)
    assert len(attrgetter("body.layers")(small)) == 2 and same(small, model, STREAM)
    for new, old in enumerate((1, 3)):
        name = "body.layers.{}.up.weight"
        parameter = small.get_parameter(name.format(new))
        assert torch.equal(parameter, model.get_parameter(name.format(old)))
        assert torch.equal(optimizer.state[parameter]["exp_avg"], state[name.format(old)])


def test_a_layer_that_still_adds_its_bias_is_refused() -> None:
    model = built(CONTAINERS["residual layers"][0])
    zero(model, group_of(model, STREAM, "body.layers"), (1,))
    with pytest.raises(TdError, match="is not known(.|\n)*body.layers.1.down.bias"):
        shrink(model, example_inputs=STREAM)


def test_no_layer_may_be_left() -> None:
    model = built(CONTAINERS["residual layers"][0])
    zero(model, group_of(model, STREAM, "body.layers"), range(4), biases=True)
    one, none = (shrink(model, example_inputs=STREAM, floors=floors) for floors in (None, {"layers": 0}))
    assert [len(attrgetter("body.layers")(small)) for small in (one, none)] == [1, 0]
    assert same(one, model, STREAM) and same(none, model, STREAM)


@pytest.mark.parametrize("options", [{"round_to": {"nuerons": 8}}, {"floors": {"head": 1}}])
def test_a_misspelled_kind_is_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(TdError, match="no such kind of units(.|\n)*(nuerons|head)(.|\n)*neurons"):
        shrink(built(_chain(F.relu)), example_inputs=X, **options)


def test_a_configuration_counts_its_layers_anew() -> None:
    torch.manual_seed(0)
    types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    sizes = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4, "head_dim": 6}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 20, "sliding_window": 3, "use_sliding_window": True}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, layer_types=types)).eval()
    zero(model, group_of(model, IDS, "model.layers"), (0, 3))
    small: Any = shrink(model)
    assert (small.config.num_hidden_layers, small.config.layer_types) == (2, types[1:3])
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == [0, 1]
    assert model.config.num_hidden_layers == 4 and model.config.layer_types == types
    assert same(small, model, IDS)
    prompt = IDS["input_ids"]
    expected = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(small.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0), expected)


def test_only_the_decoder_counts_fewer_layers() -> None:
    case = FAMILIES["whisper"]
    model = case.build()
    inputs = case.inputs(model)
    zero(model, group_of(model, inputs, "model.decoder.layers"), (0,), biases=True)
    small: Any = shrink(model)
    assert (small.config.encoder_layers, small.config.decoder_layers) == (2, 1)
    assert [layer.self_attn.layer_idx for layer in small.model.decoder.layers] == [0]
    assert same(small, model, inputs)
