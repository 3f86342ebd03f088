"""Small inputs made up from what a transformers model says of itself, for tracing and comparing; not for accuracy.

transformers is not imported: whoever has one of its models has imported it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PIXELS = 64  # height and width for models that take images of any size
MOST_IDS = 4096  # of a vocabulary that are drawn from
STATES = 5  # length of the encoder's output that a decoder without an encoder is given
LEGACY_END = 2  # a CLIP whose eos_token_id is this pools at the highest id instead


def model_inputs(model: nn.Module, *, batch: int = 2, length: int = 7, seed: int = 0) -> dict[str, Any] | None:
    """What `model` can be called with: ``model(**model_inputs(model))``.

    Text has no padding; images, spectrograms and waveforms are noise of the size that the configuration asks for.
    Nothing is cached (``use_cache=False``), so that a trace has no cache among its outputs.

    Args:
        model: any module; its `config` and the signature of its `forward` are read.
        batch: rows; only one where the model cannot tell padding from text in more.
        length: tokens per row, or frames of a waveform; fewer where the model has fewer positions.
        seed: of the draw.

    Returns:
        name -> tensor or flag, what the model needs of ``input_ids``, ``attention_mask`` and ``token_type_ids``
        ``[batch, length]``, ``decoder_input_ids [batch, length - 1]``, ``encoder_hidden_states [batch, 5, hidden]``,
        ``pixel_values [batch, channels, height, width]``, ``input_features [batch, mels, frames]``, ``input_values
        [batch, samples]`` and ``use_cache``; tensors on the device of the model's parameters, the meta device too,
        floats of their dtype. None where the model is none of transformers, or is not known how to call.
    """
    library = sys.modules.get("transformers")
    if library is None or not isinstance(model, library.PreTrainedModel):
        return None
    accepted = inspect.signature(model.forward).parameters
    facts = _Facts(type(model).__name__, tuple(_configurations(model.config)))
    draw = _Draw(_rows(facts, batch, accepted), _positions(facts, length), torch.Generator().manual_seed(seed))
    drawn = _sources(facts, draw, accepted)
    if drawn is None:
        return None
    drawn |= _beside(facts, draw, accepted, drawn)
    return {name: _placed(value, model) for name, value in drawn.items()}


@dataclass(frozen=True)
class _Facts:
    """The configuration of a model, then those of its parts: the first that states something is right."""

    model: str
    parts: tuple[Any, ...]

    def get(self, name: str) -> Any:
        return next((value for part in self.parts if (value := getattr(part, name, None)) is not None), None)


@dataclass(frozen=True)
class _Draw:
    batch: int
    length: int
    generator: torch.Generator

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, *shape, generator=self.generator)


def _configurations(config: Any) -> Iterator[Any]:
    yield config
    for name in config.sub_configs:
        part = getattr(config, name)
        if part is not None:
            yield from _configurations(part)


def _rows(facts: _Facts, batch: int, accepted: Collection[str]) -> int:
    padless = facts.get("pad_token_id") is None and facts.model.endswith("ForSequenceClassification")
    return 1 if padless and "past_key_values" in accepted else batch


def _positions(facts: _Facts, length: int) -> int:
    most = facts.get("max_position_embeddings")  # RoBERTa starts counting at two
    return length if most is None else max(1, min(length, most - 2))


def _sources(facts: _Facts, draw: _Draw, accepted: Collection[str]) -> dict[str, Any] | None:
    """What the model is about; None where one of it is of an unknown size."""
    drawn: dict[str, Any] = {}
    if "input_ids" in accepted:
        drawn["input_ids"] = _ids(facts, draw, draw.length, None if _causal(facts, accepted) else _end(facts))
    if "pixel_values" in accepted and not _marks_images(facts):
        drawn["pixel_values"] = _pixels(facts, draw)
    if "input_features" in accepted:
        drawn["input_features"] = _spectrogram(facts, draw)
    if "input_values" in accepted:
        drawn["input_values"] = _waveform(facts, draw)
    return None if not drawn or any(value is None for value in drawn.values()) else drawn


def _causal(facts: _Facts, accepted: Collection[str]) -> bool:
    if "past_key_values" not in accepted or "decoder_input_ids" in accepted:
        return False
    return facts.get("is_decoder") is not False  # configurations of models that only decode do not say


def _beside(facts: _Facts, draw: _Draw, accepted: Collection[str], drawn: dict[str, Any]) -> dict[str, Any]:
    """What goes with it. A causal model needs no mask, so its graph is kept free of one."""
    found: dict[str, Any] = {}
    if "input_ids" in drawn and not _causal(facts, accepted):
        found["attention_mask"] = torch.ones_like(drawn["input_ids"])
        if "token_type_ids" in accepted and (facts.get("type_vocab_size") or 0) > 1:
            found["token_type_ids"] = torch.zeros_like(drawn["input_ids"])
    if "decoder_input_ids" in accepted and "past_key_values" in accepted:  # without a cache they make their own
        found["decoder_input_ids"] = _ids(facts, draw, max(1, draw.length - 1), None)
    if "encoder_hidden_states" in accepted and facts.get("add_cross_attention"):
        found["encoder_hidden_states"] = draw.noise(STATES, facts.get("hidden_size"))
    if "use_cache" in accepted or {"past_key_values", "kwargs"} <= set(accepted):
        found["use_cache"] = False
    return found


def _ids(facts: _Facts, draw: _Draw, length: int, end: int | None) -> Tensor | None:
    """Ordinary tokens, none with a meaning of its own, then `end`."""
    vocabulary = facts.get("vocab_size")
    if vocabulary is None:
        return None
    special = _special(facts)
    ids = torch.tensor([token for token in range(min(vocabulary, MOST_IDS)) if token not in special] or [0])
    drawn = ids[torch.randint(len(ids), (draw.batch, length), generator=draw.generator)]
    if end is not None and end < vocabulary:
        drawn[:, -1] = end
    return drawn


def _special(facts: _Facts) -> set[int]:
    found: set[int] = set()
    for part in facts.parts:
        for name, value in part.to_dict().items():
            if name.endswith(("_token_id", "_token_index")):
                found.update(value if isinstance(value, (list, tuple)) else [value])
    return found


def _end(facts: _Facts) -> int | None:
    """The token that ends a text: some models pool at it, and expect one in every row."""
    end = facts.get("eos_token_id")
    if end == LEGACY_END and str(facts.get("model_type")).startswith("clip"):
        vocabulary = facts.get("vocab_size")
        return None if vocabulary is None else int(vocabulary) - 1
    return end if isinstance(end, int) else None


def _marks_images(facts: _Facts) -> bool:
    """Whether images stand at tokens of their own among the text; then text alone will do."""
    return facts.get("image_token_id") is not None or facts.get("image_token_index") is not None


def _pixels(facts: _Facts, draw: _Draw) -> Tensor:
    size = facts.get("image_size") or PIXELS
    height, width = (size, size) if isinstance(size, int) else size
    return draw.noise(facts.get("num_channels") or 3, height, width)


def _spectrogram(facts: _Facts, draw: _Draw) -> Tensor | None:
    """Whisper's encoder halves the frames once; a wav2vec2-bert takes any number of them, as vectors."""
    mels, positions = facts.get("num_mel_bins"), facts.get("max_source_positions")
    if facts.get("feature_projection_input_dim") is not None:
        return draw.noise(draw.length, facts.get("feature_projection_input_dim"))
    return None if mels is None or positions is None else draw.noise(mels, 2 * positions)


def _waveform(facts: _Facts, draw: _Draw) -> Tensor | None:
    """As many samples as the strided convolutions turn into `length` frames; AST takes a spectrogram instead."""
    kernels, strides, samples = facts.get("conv_kernel"), facts.get("conv_stride"), draw.length
    if kernels is None or strides is None:
        mels, frames = facts.get("num_mel_bins"), facts.get("max_length")
        return None if mels is None or frames is None else draw.noise(frames, mels)
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        samples = (samples - 1) * stride + kernel
    return draw.noise(samples)


def _placed(value: Any, model: nn.Module) -> Any:
    if not isinstance(value, Tensor):
        return value
    # The largest: wav2vec2 makes a small one on the CPU whatever device was asked for.
    floats = [tensor for tensor in model.parameters() if tensor.is_floating_point()]
    if not floats:
        return value
    weight = max(floats, key=Tensor.numel)
    return value.to(weight.device, weight.dtype if value.is_floating_point() else None)
