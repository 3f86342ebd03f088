"""Where a model comes from and on what terms it may be used: told by the caller, or passed on by the parent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from td_plugin.errors import TdError, first_line
from td_plugin.export.companions import cached, licence_files
from td_plugin.export.serving_files import CONFIG

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

CARD = "README.md"
UNKNOWN_LICENCE = (
    "the licence of the parent model is unknown: {directory} says so in its README.md; "
    "name it with origin=Origin(license=...), or the parent's directory with parent=..."
)


@dataclass(frozen=True)
class Origin:
    """What a model card passes on from the parent's, in the words of the Hub; empty where it is not known.

    Attributes:
        base_model: the parent, as the Hub calls it.
        license: of the list that the Hub keeps, such as ``"apache-2.0"``; ``"other"`` with a name and a link.
        license_name: of a licence that is not in that list.
        license_link: where its text is; a file of the directory will do.
        datasets: that it was trained on, as the Hub calls them.
        language: codes such as ``"en"``.
    """

    base_model: str = ""
    license: str = ""
    license_name: str = ""
    license_link: str = ""
    datasets: tuple[str, ...] = ()
    language: tuple[str, ...] = ()

    def over(self, other: Origin) -> Origin:
        """This one; from `other` what it does not know. The parts of a licence stay together."""
        known = {field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name)}
        if self.license:
            known |= {"license_name": self.license_name, "license_link": self.license_link}
        return replace(other, **known)

    def entries(self) -> dict[str, Any]:
        """What is known, for a card's metadata."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items() if value}


def read_card(directory: Path) -> ModelCard | None:
    """The model card in `directory`; None without one.

    Raises:
        TdError: its metadata cannot be read.
    """
    from huggingface_hub import ModelCard

    file = directory / CARD
    if not file.is_file():
        return None
    text = file.read_text(encoding="utf-8")
    try:  # without this line the Hub's library warns that there is no metadata
        return ModelCard(text if text.startswith("---") else f"---\n{{}}\n---\n{text}", ignore_metadata_errors=True)
    except Exception as error:  # of the YAML library as well
        raise TdError(
            "the metadata at the top of the model card cannot be read",
            where=str(file),
            got=first_line(error),
            fix="mend the block between the two lines of ---",
        ) from error


def origin_of(directory: Path) -> Origin:
    """What the card in `directory` passes on, else its configuration and its licence file.

    Raises:
        TdError: the card's metadata cannot be read.
    """
    card = read_card(directory)
    told: Mapping[str, Any] = {} if card is None else card.data.to_dict()  # type: ignore[no-untyped-call]
    found = Origin(
        base_model=_first(told.get("base_model")),
        license=_first(told.get("license")),
        license_name=_first(told.get("license_name")),
        license_link=_first(told.get("license_link")),
        datasets=_texts(told.get("datasets")),
        language=_texts(told.get("language")),
    )
    if not found.license:
        found = replace(found, license=_configured_licence(directory / CONFIG))
    files = licence_files(directory)
    if not found.license and files:  # a text that nobody has named
        found = replace(found, license="other", license_name=files[0].name.lower(), license_link=files[0].name)
    return found


def _configured_licence(file: Path) -> str:
    try:
        return _first(json.loads(file.read_text(encoding="utf-8")).get("license"))
    except (OSError, ValueError, AttributeError):
        return ""


def _texts(value: Any) -> tuple[str, ...]:
    """What may be one text or a list of them in a card."""
    values = value if isinstance(value, list) else [value]
    return tuple(item for item in values if isinstance(item, str) and item)


def _first(value: Any) -> str:
    return next(iter(_texts(value)), "")


def parent_origin(parent: Path | None, name: str) -> Origin:
    """`origin_of` the parent; a parent in the Hub's cache is itself what the model is based on.

    Args:
        parent: its directory, if there is one.
        name: as the model's configuration calls it.

    Raises:
        TdError: as `origin_of`.
    """
    found = Origin() if parent is None else origin_of(parent)
    return found if cached(name) is None else replace(found, base_model=name)
