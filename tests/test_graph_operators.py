"""What can shrink in models of one operator each, and why the rest cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from graph_models import CASES, Net, build, conv, floats, lin, net, parameter, tokens
from torch import Tensor, nn

from td_plugin.structure import Structure, survey


def found(name: str) -> Structure:
    return survey(build(name), CASES[name].inputs, source="graph")


@pytest.mark.parametrize("name", CASES)
def test_the_groups_of_every_operator(name: str) -> None:
    structure = found(name)
    groups = {group.name: (group.kind, group.units) for group in structure.groups if group.kind != "layers"}
    assert groups == CASES[name].groups, structure.fixed
