"""The table of model families: where a transformer layer keeps its feed-forward neurons and its attention heads.

Data only. A new family is one row of `FAMILIES`, keyed by the qualified name of its layer class (a name, so that
nothing is imported); all module names in a row are relative to that layer. Checked with transformers 5.23.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Neurons:
    """A feed-forward block: ``down(activation(up(x)))``.

    Attributes:
        up: linear layer whose output rows are the neurons.
        activation: elementwise function between the two.
        down: linear layer that reads the neurons.
        setting: what the family's configuration calls their number.
    """

    up: str
    activation: str
    down: str
    setting: str


@dataclass(frozen=True)
class Heads:
    """Multi-head attention whose number of heads follows from the widths of its projections.

    Attributes:
        attention: the attention module; carries the attributes below.
        projections: query, key and value; a head is `head_size` consecutive output rows of each. Value comes last.
        output: linear layer that reads the heads.
        head_size: attribute of `attention`: rows per head.
        counts: attributes of `attention` that state the number of heads.
        widths: attributes of `attention` that state heads times `head_size`.
        setting: what the family's configuration calls the number of heads.
        size_setting: what it calls `head_size`; empty where the configuration derives it from the number of heads.
    """

    attention: str
    projections: tuple[str, str, str]
    output: str
    head_size: str
    counts: tuple[str, ...]
    widths: tuple[str, ...]
    setting: str
    size_setting: str = ""


_BERT = (
    Neurons("intermediate.dense", "intermediate.intermediate_act_fn", "output.dense", "intermediate_size"),
    Heads(
        attention="attention.self",
        projections=("attention.self.query", "attention.self.key", "attention.self.value"),
        output="attention.output.dense",
        head_size="attention_head_size",
        counts=("num_attention_heads",),
        widths=("all_head_size",),
        setting="num_attention_heads",
    ),
)

_DISTILBERT = (
    Neurons("ffn.lin1", "ffn.activation", "ffn.lin2", "hidden_dim"),
    Heads(
        attention="attention",
        projections=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        output="attention.out_lin",
        head_size="attention_head_size",
        counts=("n_heads",),
        widths=("dim",),
        setting="n_heads",
    ),
)

_VIT = (
    Neurons("mlp.fc1", "mlp.activation_fn", "mlp.fc2", "intermediate_size"),
    Heads(
        attention="attention",
        projections=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        output="attention.o_proj",
        head_size="head_dim",
        counts=("num_attention_heads",),
        widths=(),
        setting="num_attention_heads",
        size_setting="head_dim",
    ),
)

FAMILIES: dict[str, tuple[Neurons, Heads]] = {
    "transformers.models.bert.modeling_bert.BertLayer": _BERT,
    "transformers.models.roberta.modeling_roberta.RobertaLayer": _BERT,
    "transformers.models.distilbert.modeling_distilbert.TransformerBlock": _DISTILBERT,
    "transformers.models.vit.modeling_vit.ViTLayer": _VIT,
}
