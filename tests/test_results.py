"""The tables of docs/results/ are those of the numbers that lie beside them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from results import main

RESULTS = Path(__file__).parent.parent / "docs" / "results"


@pytest.mark.slow
def test_every_table_can_be_made_again(tmp_path: Path) -> None:
    main(["--results", str(RESULTS), "--output", str(tmp_path)])
    made = {path.name for path in tmp_path.iterdir()}
    assert {path.name for path in RESULTS.iterdir() if path.suffix in (".md", ".png")} == made
    for path in tmp_path.glob("*.md"):
        assert path.read_text(encoding="utf-8") == (RESULTS / path.name).read_text(encoding="utf-8"), path.name


def test_a_file_that_nobody_knows_is_named(tmp_path: Path) -> None:
    (tmp_path / "unheard_of.json").write_text(json.dumps({}), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"unheard_of\.json.*overhead"):
        main(["--results", str(tmp_path), "--output", str(tmp_path / "out")])
