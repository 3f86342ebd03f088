"""Several processes: every check of `ranks` has run in two of them, in one gloo group; what one process can show."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch import Outcome, checks_of, launch

import td_plugin as td

_OUTCOMES: dict[str, list[Outcome]] = {}
SLOW = [(module, name) for module in ("ddp",) for name in checks_of(module)]


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name"), SLOW, ids=[f"{module}-{name}" for module, name in SLOW])
def test_in_two_processes(module: str, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    if module not in _OUTCOMES:
        directory: Path = tmp_path_factory.mktemp(module)
        _OUTCOMES[module] = launch(module, directory)
    told = [outcome.get(name, "an earlier check has failed") for outcome in _OUTCOMES[module]]
    assert told == ["", ""], "\n".join(told)


def test_an_unknown_rank_policy_is_refused() -> None:
    with pytest.raises(td.TdError, match="rank_policy"):
        td.TargetedDropout(td.recipes.targeted_weight(), rank_policy="own")  # type: ignore[arg-type]
