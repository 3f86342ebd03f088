"""A complete directory, put on the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from td_plugin.errors import TdError, first_line
from td_plugin.export.companions import has_processor
from td_plugin.export.external_data import check_external
from td_plugin.export.origin import CARD
from td_plugin.export.serving_files import CONFIG

_NOT_OURS = [".*", "**/.*", "__pycache__/*"]  # what writers leave that were ended halfway, and the system's own files


def push_to_hub(
    directory: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Add model with td-plugin",
    create_pr: bool | None = None,
) -> str:
    """Upload what `save_onnx` or `save_pretrained` wrote; the repository is made if missing.

    Args:
        directory: graph or weights, ``config.json``, tokenizer or processor, and a model card.
        repo_id: ``"user/name"``.
        private: whether a new repository is private; None is the account's default.
        token: of the Hub; None is the one that ``hf auth login`` keeps.
        commit_message: title of the commit.
        create_pr: make a pull request in place of a commit.

    Returns:
        The address of the commit or the pull request.

    Raises:
        TdError: the directory is not complete or a file in it is damaged, or the Hub refuses.
    """
    path = Path(directory)
    check_complete(path)
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=token)
        place = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        made = api.upload_folder(
            repo_id=place,
            folder_path=path,
            commit_message=commit_message,
            create_pr=create_pr,
            ignore_patterns=_NOT_OURS,
        )
    except Exception as error:  # the Hub's errors, those of the HTTP library, and those of the system
        raise TdError(
            "the Hub does not take the directory",
            where=repo_id,
            got=f"{type(error).__name__}: {first_line(error)}",
            fix="see the name of the repository, the network, and the token: hf auth login",
        ) from error
    return str(made.pr_url or made.commit_url)


def check_complete(path: Path) -> None:
    """Nothing, if `path` holds all that a model needs.

    Raises:
        TdError: something is missing, or an ONNX file cannot be read or lacks its weights.
    """
    if not path.is_dir():
        fix = "give the directory that save_onnx wrote"
        raise TdError("there is no such directory", where=str(path), fix=fix)
    found = sorted(path.rglob("*.onnx"))
    graphs = [graph for graph in found if not any(part.startswith(".") for part in graph.relative_to(path).parts)]
    missing = [name for name in (CONFIG, CARD) if not (path / name).is_file()]
    missing += [] if graphs or any(path.glob("*.safetensors")) else ["model.onnx or model.safetensors"]
    missing += [] if has_processor(path) else ["tokenizer or image processor"]
    if missing:
        fix = "write it with save_onnx(model, directory, processor=...); write_card(directory) for the README.md"
        raise TdError("the directory is not complete", where=str(path), got=f"no {', no '.join(missing)}", fix=fix)
    for graph in graphs:
        check_external(graph)
