"""The architectures that the packed encoder covers, described by data: where each part of the model is, and its form.

Nothing here runs a model. ``examine.py`` checks that a model is what its description says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Architecture:
    """Paths are attribute paths, from the model or from one of its layers; an empty one stands for "has none".

    Attributes:
        model_type: name in transformers, also that of the module that defines it.
        model_class: class of the base model.
        output_class: what its ``forward`` returns.
        words, positions, token_types, embedding_norm: the embedding tables and their norm.
        padding_idx: where positions start after this number, which tokens equal to it keep as their position.
        projection: from the embedding size to the hidden size; a model may lack it where the two are equal.
        attention_bias: module with the relative position bias.
        pooler: class of the module `pooler`, which is called with the last hidden state; a model may lack it.
        layers: list of the layers; what follows is in each of them.
        qkv: query, key and value, or the one that holds all three.
        pre_norm: the norms stand before the two parts of a layer, and one after the last layer.
        gated: the first half of `up` goes through the activation and multiplies the second.
        rotary: positions turn queries and keys; some layers see a window only.
        embedding_dropout: module; the other dropouts are in each layer.
        attention: module whose mode decides whether attention drops weights.
        attention_dropout: its Dropout, or a number, the probability.
        output_dropout, gate_dropout, feed_forward_dropout: after `output`, before and after `down`.
    """

    model_type: str
    model_class: str
    output_class: str = "BaseModelOutputWithPoolingAndCrossAttentions"
    words: str = "embeddings.word_embeddings"
    positions: str = "embeddings.position_embeddings"
    token_types: str = "embeddings.token_type_embeddings"
    embedding_norm: str = "embeddings.LayerNorm"
    padding_idx: str = ""
    projection: str = ""
    attention_bias: str = ""
    pooler: str = ""
    layers: str = "encoder.layer"
    qkv: tuple[str, ...] = ("attention.self.query", "attention.self.key", "attention.self.value")
    output: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    activation: str = "intermediate.intermediate_act_fn"
    down: str = "output.dense"
    feed_forward_norm: str = "output.LayerNorm"
    final_norm: str = ""
    pre_norm: bool = False
    gated: bool = False
    rotary: bool = False
    embedding_dropout: str = "embeddings.dropout"
    attention: str = "attention.self"
    attention_dropout: str = "attention.self.dropout"
    output_dropout: str = "attention.output.dropout"
    gate_dropout: str = ""
    feed_forward_dropout: str = "output.dropout"

    @property
    def module(self) -> str:
        """The Python module that defines the model and its parts."""
        name = self.model_type.replace("-", "_")
        return f"transformers.models.{name}.modeling_{name}"


_BERT = Architecture("bert", "BertModel", pooler="BertPooler")
_ROBERTA = replace(
    _BERT,
    model_type="roberta",
    model_class="RobertaModel",
    padding_idx="embeddings.padding_idx",
    pooler="RobertaPooler",
)

ARCHITECTURES = (
    _BERT,
    _ROBERTA,
    replace(_ROBERTA, model_type="xlm-roberta", model_class="XLMRobertaModel", pooler="XLMRobertaPooler"),
    replace(_ROBERTA, model_type="camembert", model_class="CamembertModel", pooler="CamembertPooler"),
    replace(
        _BERT,
        model_type="electra",
        model_class="ElectraModel",
        output_class="BaseModelOutputWithPastAndCrossAttentions",
        pooler="",
        projection="embeddings_project",
    ),
    Architecture(
        "distilbert",
        "DistilBertModel",
        output_class="BaseModelOutput",
        token_types="",
        layers="transformer.layer",
        qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        output="attention.out_lin",
        attention_norm="sa_layer_norm",
        up="ffn.lin1",
        activation="ffn.activation",
        down="ffn.lin2",
        feed_forward_norm="output_layer_norm",
        attention="attention",
        attention_dropout="attention.dropout",
        output_dropout="",
        feed_forward_dropout="ffn.dropout",
    ),
    Architecture(
        "mpnet",
        "MPNetModel",
        output_class="BaseModelOutputWithPooling",
        token_types="",
        padding_idx="embeddings.padding_idx",
        attention_bias="encoder",
        pooler="MPNetPooler",
        qkv=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        output="attention.attn.o",
        attention_norm="attention.LayerNorm",
        attention="attention.attn.dropout",
        attention_dropout="attention.attn.dropout",
        output_dropout="attention.dropout",
    ),
    Architecture(
        "modernbert",
        "ModernBertModel",
        output_class="BaseModelOutput",
        words="embeddings.tok_embeddings",
        positions="",
        token_types="",
        embedding_norm="embeddings.norm",
        layers="layers",
        qkv=("attn.Wqkv",),
        output="attn.Wo",
        attention_norm="attn_norm",
        up="mlp.Wi",
        activation="mlp.act",
        down="mlp.Wo",
        feed_forward_norm="mlp_norm",
        final_norm="final_norm",
        pre_norm=True,
        gated=True,
        rotary=True,
        embedding_dropout="embeddings.drop",
        attention="attn",
        attention_dropout="attn.attention_dropout",
        output_dropout="attn.out_drop",
        gate_dropout="mlp.drop",
        feed_forward_dropout="",
    ),
)
MODEL_TYPES = tuple(architecture.model_type for architecture in ARCHITECTURES)
_BY_CLASS = {(architecture.module, architecture.model_class): architecture for architecture in ARCHITECTURES}


def architecture_of(cls: type) -> tuple[Architecture, type] | None:
    """The description of a model's class and the class of transformers itself, of which it may be a subclass."""
    for base in cls.__mro__:
        found = _BY_CLASS.get((base.__module__, base.__name__))
        if found is not None:
            return found, base
    return None
