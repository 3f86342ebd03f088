"""The options of the user's data: which rows, and how they are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from td_plugin.errors import TdError

Data = Annotated[str | None, typer.Option(help="Labelled rows: parquet, csv, json, directory or hub id.")]
Tokenizer = Annotated[Path | None, typer.Option(help="Directory; that of the first model or file if left out.")]
Metric = Annotated[str | None, typer.Option(help="accuracy, f1, binary_f1, perplexity, masked_perplexity, bleu.")]
Split = Annotated[str | None, typer.Option(help="Of the data; found out if left out.")]
TextColumn = Annotated[str | None, typer.Option(help="Found by its type unless given.")]
PairColumn = Annotated[str | None, typer.Option(help="A second text of each row.")]
ImageColumn = Annotated[str | None, typer.Option(help="Found by its type unless given.")]
LabelColumn = Annotated[str | None, typer.Option(help="Found by its type or name unless given.")]
MaxLength = Annotated[int | None, typer.Option(help="Texts are cut after so many tokens; 128.")]
MaxRows = Annotated[int | None, typer.Option(help="Judge on so many rows of --data; 0 = all.")]
DATA = (
    "data",
    "tokenizer",
    "metric",
    "split",
    "text_column",
    "pair_column",
    "image_column",
    "label_column",
    "max_length",
    "max_rows",
)
"""The options of labelled data."""


def data_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options of labelled data that were given.

    Raises:
        TdError: without data, some that are about their score.
    """
    found = {name: given[name] for name in DATA if given[name] is not None}
    alone = [name for name in ("metric", "split", "max_rows") if name in found and "data" not in found]
    if alone:
        raise TdError(f"--{alone[0].replace('_', '-')} is about labelled data", got=found[alone[0]], fix="give --data")
    return found
