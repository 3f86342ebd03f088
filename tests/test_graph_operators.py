"""What can shrink in models of one operator each, and why the rest cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from graph_models import CASES, build, floats
from torch import Tensor, nn

from td_plugin.structure import Structure, survey


def found(name: str) -> Structure:
    return survey(build(name), CASES[name].inputs, source="graph")


@pytest.mark.parametrize("name", CASES)
def test_the_groups_of_every_operator(name: str) -> None:
    structure = found(name)
    groups = {group.name: (group.kind, group.units) for group in structure.groups if group.kind != "layers"}
    assert groups == CASES[name].groups, structure.fixed


def parts(name: str) -> dict[str, dict[str, tuple[tuple[str, int, int, tuple[int, ...]], ...]]]:
    return {
        group.name: {
            role: tuple((part.fqn, part.dim, part.span, part.owners) for part in slices)
            for role, slices in (
                ("ranked", group.ranked),
                ("carried", group.carried),
                ("read", group.consumers),
                ("statistics", group.statistics),
            )
        }
        for group in found(name).groups
        if group.kind != "layers"
    }


def test_slices_of_a_packed_projection_name_the_head_of_each_entry() -> None:
    owners = tuple(entry // 3 % 4 for entry in range(36))
    assert parts("packed (3, heads, size)") == {
        "qkv": {
            "ranked": (("qkv.weight", 0, 1, owners),),
            "carried": (("qkv.bias", 0, 1, owners),),
            "read": (("o.weight", 1, 3, ()),),
            "statistics": (),
        }
    }
    assert parts("packed (heads, 3, size)")["qkv"]["ranked"] == (("qkv.weight", 0, 9, ()),)


def test_slices_of_a_key_and_value_group() -> None:
    group = parts("attention of grouped queries")["q"]
    assert group["ranked"] == (("q.weight", 0, 8, ()), ("k.weight", 0, 4, ()), ("v.weight", 0, 4, ()))
    assert group["read"] == (("o.weight", 1, 8, ()),)


def test_slices_behind_a_concatenation_leave_the_others_out() -> None:
    groups = parts("concatenated")
    assert groups["a"]["read"] == (
        ("b.weight", 1, 1, ()),
        ("c.weight", 1, 1, (0, 1, 2, 3, *[-1] * 5)),
        ("d.weight", 1, 1, (0, 1, 2, 3, *[-1] * 11)),
    )
    assert groups["c"]["read"] == (("d.weight", 1, 1, (*[-1] * 9, 0, 1, 2, 3, 4, 5)),)


def test_slices_behind_a_flatten() -> None:
    assert parts("flattened, channels first")["a"]["read"] == (("b.weight", 1, 49, ()),)
    assert parts("flattened, channels last")["a"]["read"] == (("b.weight", 1, 1, tuple(range(6)) * 49),)


def test_roles_of_norms_and_convolutions() -> None:
    group = parts("batch norm")["a"]
    assert [fqn for fqn, *_ in group["carried"]] == ["a.bias", "n.weight", "n.bias"]
    assert [fqn for fqn, *_ in group["statistics"]] == ["n.running_mean", "n.running_var"]
    deep = parts("depthwise with a multiplier")["a"]
    assert deep["ranked"] == (("a.weight", 0, 1, ()),)  # a filter of one channel makes no channel
    assert ("b.weight", 0, 2, ()) in deep["carried"]
    assert parts("transposed")["b"]["ranked"] == (("b.weight", 1, 1, ()),)
    assert parts("grouped")["a"]["read"] == (("b.weight", 1, 1, ()),)


def test_gates_of_recurrent_layers_go_together() -> None:
    group = parts("LSTM, 2 layers, both ways")["rnn"]
    assert {dims[:2] for dims in group["ranked"]} == {
        (f"rnn.weight_{side}_l{layer}{way}", 0) for side in ("ih", "hh") for layer in (0, 1) for way in ("", "_reverse")
    }
    assert ("head.weight", 1, 1, (0, 1, 2, 3) * 2) in group["read"]
    assert ("rnn.weight_ih_l1", 1, 1, (0, 1, 2, 3) * 2) in group["read"]
    assert group["ranked"][0][3] == (0, 1, 2, 3) * 4


def test_a_divisor_is_cut_and_never_zeroed() -> None:
    assert parts("divided by a parameter")["a"]["statistics"] == (("s", 0, 1, ()),)


def test_the_norm_is_noted_with_its_epsilon() -> None:
    (norm,) = next(group for group in found("RMS norm by hand").groups).norms
    assert (norm.module, norm.epsilon) == ("n", "epsilon")


def reasons(model: nn.Module, *inputs: Tensor) -> dict[str, str]:
    """Group that cannot shrink -> why; what reaches the output is left out."""
    structure = survey(model, dict(zip(("x", "y"), inputs, strict=False)), source="graph")
    assert not structure.groups
    return {group.name: group.reason for group in structure.fixed if "reaches an output" not in group.reason}


class Between(nn.Module):
    """`act` between two layers."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act, self.a, self.b = act, nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)))


UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "linalg_qr": lambda x: torch.linalg.qr(x)[0],
    "fft_rfft": lambda x: torch.fft.rfft(x, n=10).real,
    "cumprod": lambda x: x.cumprod(-1),
    "cdist": lambda x: torch.cdist(x, x[:, :6]),
}


@pytest.mark.parametrize("operator", UNKNOWN)
def test_an_unknown_operator_is_named_with_its_line(operator: str) -> None:
    (reason,) = reasons(Between(UNKNOWN[operator]), floats(2, 7, 5).float()).values()
    assert f"aten.{operator}" in reason
    assert "test_graph_operators.py" in reason


COMPARED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "softmax": (lambda x: x.softmax(-1), "aten.softmax"),
    "sum": (lambda x: x * x.sum(-1, keepdim=True), "it is reduced: aten.sum"),
    "mean": (lambda x: x - x.mean(-1, keepdim=True), "it is reduced: aten.mean"),
    "layer norm": (lambda x: F.layer_norm(x, (6,)), "LayerNorm takes the mean over it"),
    "sorted": (lambda x: x.sort(-1).values, "aten.sort"),
    "rolled": (lambda x: x.roll(1, -1), "aten.roll"),
    "rolled whole": (lambda x: x.roll(1), "aten.roll"),
    "picked": (lambda x: x[..., [0, 1, 2, 3, 4, 5]], "entries of it are picked: aten.index"),
    "its mask": (lambda x: x * x[..., 0:1].squeeze(-1)[..., None] + x[..., 3][..., None], "one entry of it is picked"),
    "pooled": (lambda x: F.avg_pool1d(x, 3, 1, 1), "it is pooled or resized"),
    "padded": (lambda x: F.pad(x, (1, 0))[..., 1:], "it is padded"),
    "attends to itself": (lambda x: x @ x.mT @ x, "activations are summed over it"),
    "depends on others when silenced": (lambda x: x.relu() + x.new_ones(6) * floats(2, 7, 1).float().sin(), "pass on"),
}


@pytest.mark.parametrize("name", COMPARED)
def test_what_compares_or_mixes_units_is_named(name: str) -> None:
    act, expected = COMPARED[name]
    assert any(expected in reason for reason in reasons(Between(act), floats(2, 7, 5).float()).values())


def test_a_kept_tensor_keeps_its_units() -> None:
    structure = survey(build("linear"), CASES["linear"].inputs, source="graph", keep=["a.weight"])
    assert next((group.name, group.reason) for group in structure.fixed) == ("a", "the user keeps it")


def test_heads_that_share_their_value_stay() -> None:
    (group, *_) = (group for group in found("attention of one key").fixed if group.name == "q")
    assert "would still pass on what others compute" in group.reason
