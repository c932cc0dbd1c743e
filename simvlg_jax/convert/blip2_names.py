"""BLIP-2's names in LAVIS's checkpoints and in transformers' `Blip2ForConditionalGeneration`, both ways."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from simvlg_jax.convert import weight_map
from simvlg_jax.convert.weight_map import Tensors

# Beginnings of names: LAVIS's and Hugging Face's. The first that fits counts. {llm} is "opt" or "llm".
PARTS = [
    ("ln_vision.", "vision_model.post_layernorm."),
    ("visual_encoder.", "vision_model."),
    ("Qformer.bert.embeddings.LayerNorm.", "qformer.layernorm."),
    ("Qformer.bert.embeddings.", "embeddings."),
    ("Qformer.bert.", "qformer."),
    ("vision_proj.", "vision_projection."),
    ("text_proj.", "text_projection."),
    ("{llm}_proj.", "language_projection."),
    ("{llm}_model.", "language_model."),
]
ATTENTION = ("attention.self.", "attention.attention.")  # inside the Q-Former
VISION = [  # inside the vision encoder; Hugging Face's own names are read by `vit.renamed`
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("blocks.", "encoder.layers."),
    (".norm", ".layer_norm"),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
]
NOWHERE = ("Qformer.cls.", "temp")  # what Hugging Face's models lack


def is_hugging_face(tensors: Mapping[str, np.ndarray]) -> bool:
    return "qformer.layernorm.weight" in tensors


def as_lavis(tensors: Mapping[str, np.ndarray], llm: str = "llm") -> Mapping[str, np.ndarray]:
    """Returns the tensors of a Hugging Face BLIP-2 under LAVIS's names; those of other files as they are.

    The vision encoder keeps Hugging Face's names behind LAVIS's "visual_encoder.".

    Args:
      llm: the first word of LAVIS's names of the language model, see `families.Family.evlgen`.
    """
    if not is_hugging_face(tensors):
        return tensors
    return weight_map.View(tensors, {_to_lavis(name, llm): name for name in tensors})


def _to_lavis(name: str, llm: str) -> str:
    for lavis, hf in PARTS:
        if name.startswith(hf):
            renamed = lavis.format(llm=llm) + name.removeprefix(hf)
            return renamed.replace(*reversed(ATTENTION)) if lavis.startswith("Qformer.") else renamed
    return name


def as_hugging_face(tensors: Tensors, llm: str) -> Tensors:
    """Returns LAVIS's tensors as transformers' BLIP-2 has them. It can be traced.

    Queries, keys and values of the vision encoder have one bias there, which is zero for the keys.
    """
    named: Tensors = {}
    for name, x in tensors.items():
        if name.endswith(".attn.q_bias"):
            value = tensors[name.replace("q_bias", "v_bias")]
            join: Callable = jnp.concatenate if isinstance(x, jax.Array) else np.concatenate
            named[_to_hugging_face(name.replace("q_bias", "qkv.bias"), llm)] = join([x, 0 * x, value])
        elif not name.endswith(".attn.v_bias") and not name.startswith(NOWHERE):
            named[_to_hugging_face(name, llm)] = x
    return named


def _to_hugging_face(name: str, llm: str) -> str:
    for lavis, hf in PARTS:
        start = lavis.format(llm=llm)
        if name.startswith(start):
            rest = name.removeprefix(start)
            if lavis == "visual_encoder.":
                for old, new in VISION:
                    rest = rest.replace(old, new)
            return hf + (rest.replace(*ATTENTION) if lavis.startswith("Qformer.") else rest)
    return name
