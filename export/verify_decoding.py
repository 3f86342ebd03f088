"""A decoder's ONNX file with a cache against `generate`, token by token."""

from __future__ import annotations

import copy
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from td_plugin.errors import TdError, first_line
from td_plugin.export.decoding import greedy
from td_plugin.export.modes import evaluating
from td_plugin.export.parity import TOLERANCES, Precision, precision_of
from td_plugin.export.probes import Batch, tensors_of
from td_plugin.export.session import open_session, read_graph
from td_plugin.report import table

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PromptParity:
    """One prompt.

    Attributes:
        tokens: of the prompt, without padding.
        generated: tokens that `generate` added.
        equal: how many of the file's tokens are the same, from the first one on.
        max_abs: largest difference of a logit, as long as both had written the same.
        relative: ``||onnx - torch|| / ||torch||`` of these logits.
    """

    tokens: int
    generated: int
    equal: int
    max_abs: float
    relative: float


@dataclass(frozen=True)
class DecodingReport:
    """A file that generates what the model generates; `str()` is a table.

    Attributes:
        rows: one per prompt.
        precision: of the file.
        tolerance: see `parity.Tolerance.bound`.
    """

    rows: tuple[PromptParity, ...]
    precision: Precision
    tolerance: float

    @property
    def equal(self) -> float:
        """Share of equal tokens."""
        return sum(row.equal for row in self.rows) / sum(row.generated for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"equal": self.equal, **asdict(self)}

    def __str__(self) -> str:
        rows = [[str(r.tokens), f"{r.equal}/{r.generated}", f"{r.max_abs:.1e}", f"{r.relative:.1e}"] for r in self.rows]
        return table(["prompt", "equal", "max", "relative"], rows)


def verify_decoding(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    prompts: Batch,
    *,
    new_tokens: int = 16,
    tolerance: float | None = None,
) -> DecodingReport:
    """Let the model and an ONNX file with a cache write on, and compare what they write and why.

    Both choose the most likely token at each step; the model by ``generate``, which does not stop at an end token here.
    While both have written the same, their logits must agree. Where the two best tokens are as close as that, the texts
    may part; what follows is then another text and is not compared.

    Args:
        model: as it was exported; masked or not.
        path: the file, of any precision, or one without a cache.
        prompts: ``input_ids [rows, tokens]``, padded on the left, and ``attention_mask``.
        new_tokens: how far.
        tolerance: see `parity.Tolerance`; that of the file's precision unless given.

    Raises:
        TdError: the file is missing, damaged or no decoder, the model cannot generate, or their logits differ.
    """
    session, where = open_session(path), str(path)
    precision = precision_of(read_graph(path))
    bound = TOLERANCES[precision].bound if tolerance is None else tolerance
    given = {name: tensors_of(prompts)[name] for name in ("input_ids", "attention_mask") if name in prompts}
    ours, our_logits = _generate(model, given, new_tokens)
    theirs, their_logits = greedy(session, given, new_tokens, where=where)
    lengths = given.get("attention_mask", torch.ones_like(given["input_ids"])).sum(1)
    rows = []
    for row, length in enumerate(lengths.tolist()):
        equal = int((ours[row] == theirs[row]).long().cumprod(0).sum())
        seen = min(equal + 1, new_tokens)  # where they chose otherwise too: up to there they had the same text
        a, b = our_logits[row, :seen].double(), their_logits[row, :seen].double()
        gap = (a - b).abs()
        relative = (gap.norm() / a.norm().clamp_min(1e-30)).item()
        rows.append(PromptParity(length, new_tokens, equal, gap.max().item(), relative))
        close = torch.allclose(b, a, rtol=bound, atol=bound) if precision == "fp32" else relative <= bound
        if not close:
            step = int(((gap > bound * (1 + a.abs())).any(1)).long().argmax())
            raise TdError(
                "the ONNX file does not generate what the model generates",
                where=where,
                got=f"max difference of a logit {gap.max():.3g} at token {step} of prompt {row}",
                fix=f"the tolerance is {bound:g}: export again",
            )
    return DecodingReport(tuple(rows), precision, bound)


def _generate(model: PreTrainedModel, prompts: dict[str, Tensor], new_tokens: int) -> tuple[Tensor, Tensor]:
    """Tokens ``[rows, new]`` and logits ``[rows, new, vocabulary]``, whatever the model's own settings are."""
    from transformers import GenerationConfig

    plain: Any = copy.copy(model)  # shares the weights; generate takes what is not given from the model's own settings
    plain.generation_config = GenerationConfig(pad_token_id=0)  # type: ignore[no-untyped-call]
    try:
        with evaluating(model), torch.no_grad():
            found = plain.generate(
                **{name: value.to(model.device) for name, value in prompts.items()},
                max_new_tokens=new_tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
    except (ValueError, TypeError, AttributeError) as error:  # no head, no such inputs, no generation at all
        raise TdError("the model cannot generate", where=type(model).__name__, got=first_line(error)) from error
    return found.sequences[:, prompts["input_ids"].shape[1] :].cpu(), torch.stack(found.logits, 1).float().cpu()
