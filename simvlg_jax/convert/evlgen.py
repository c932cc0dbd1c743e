"""Converts between published checkpoints and our SimVLG parameters.

Published are EVLGen's (image or video, OPT or LLaMA), and those of BLIP-2, in LAVIS's names or Hugging Face's. EVLGen's
program is a copy of LAVIS, so only the names of the connector differ.
"""

from collections.abc import Callable, Mapping

from flax import traverse_util

from simvlg_jax.convert import blip2_names, connectors, encoders, families, stacking, weight_map
from simvlg_jax.convert.weight_map import Row, Tensors
from simvlg_jax.models.encoders.vit import ViT
from simvlg_jax.models.simvlg import SimVLG
from simvlg_jax.utils.errors import UserError

TEMPORAL = [
    Row("blocks_{i}/temporal_merge/alpha", "blocks.{i}.temporal_merge.alpha"),
    *weight_map.linear("blocks_{i}/temporal_merge/key", "blocks.{i}.temporal_merge.key"),
    *weight_map.linear("blocks_{i}/temporal_merge/query", "blocks.{i}.temporal_merge.query"),
]
CONTRAST = [  # of checkpoints trained with beta > 0
    *weight_map.linear("vision_proj", "vision_proj"),
    *weight_map.linear("text_proj", "text_proj"),
    Row("temperature", "temp"),
]
VISION = "visual_encoder."
# Files of the trained part have these too: the published code leaves out only what `named_parameters` calls frozen.
LEFTOVERS = ("lm_head.weight", "rotary_emb.inv_freq", "position_ids", "token_type_ids")


def trained_rows(model: SimVLG) -> list[Row]:
    """Returns the rows of the connector and the small trained modules around it."""
    return [
        *weight_map.layer_norm("ln_vision", "ln_vision"),
        *weight_map.below("connector", connectors.of_model(model.connector).rows(model.connector)),
        *weight_map.linear("llm_proj", f"{families.of_model(model.llm).evlgen}_proj"),
        *(CONTRAST if model.sentence_encoder is not None else []),
    ]


def from_evlgen(model: SimVLG, tensors: Mapping) -> dict:
    """Returns the parameters that a published state dict holds, as those of a scanned SimVLG.

    The trained part must be there. The vision encoder and the language model may be there; if one is not, the result
    lacks it too.

    Raises:
      UserError: names are missing, or belong to no module. The message lists both.
    """
    family = families.of_model(model.llm)
    tensors = blip2_names.as_lavis(tensors, family.evlgen)
    llm = f"{family.evlgen}_model."
    within = {prefix: weight_map.within(tensors, prefix) for prefix in (VISION, llm)}
    dropped = [name for name in tensors if name.startswith(tuple(within)) or name.endswith("position_ids")]
    rest = weight_map.View(tensors, {name: name for name in tensors if name not in set(dropped)})
    params = weight_map.from_torch(trained_rows(model), rest, getattr(model.connector, "num_heads", 1))
    if vit := vision_from_evlgen(model, within[VISION]):
        params["vit"] = vit
    if any(not name.endswith(LEFTOVERS) for name in within[llm]):
        params["llm"] = family.from_hf(model.llm, within[llm])
    return params


def vision_from_evlgen(model: SimVLG, tensors: Mapping) -> dict:
    """Returns what the file holds of the vision encoder: image blocks, temporal merging, both or neither.

    A video model may start from an image model's file. Its temporal merging then starts as the identity.

    Raises:
      UserError: the file holds temporal merging and the model is an image model.
    """
    temporal, image = (
        weight_map.View(tensors, {name: name for name in tensors if (".temporal_merge." in name) == wanted})
        for wanted in (True, False)
    )
    if temporal and not model.vit.temporal:
        raise UserError("this checkpoint holds a video model, and the config an image model: set vit.temporal=True")
    parts = {}
    if image:
        parts = encoders.of_model(model.vit).from_torch(model.vit, image)
    if temporal:
        rows = weight_map.numbered(TEMPORAL, model.vit.depth)
        merged = stacking.stack_layers(weight_map.from_torch(rows, temporal, 1))
        flat = {**traverse_util.flatten_dict(parts), **traverse_util.flatten_dict(merged)}
        parts = traverse_util.unflatten_dict(flat)
    return parts


def to_evlgen(model: SimVLG, params: Mapping, write_vit: Callable[[ViT, Mapping], Tensors] | None = None) -> Tensors:
    """Returns tensors under published names: of a whole scanned SimVLG, of its trained part, or of its gradients.

    It can be traced: `jax.eval_shape` gives names and shapes of a model that is too big for this machine.

    Args:
      write_vit: names the tensors of the vision encoder; None: as in the encoder's own published files.

    Raises:
      UserError: the model knows the order of frames, which the published model does not.
    """
    tensors: Tensors = {}
    if params.keys() & {"frame_embedding", "frame_weight"}:
        raise UserError("the published model knows no order of frames (video.max_frames): use --format hf")
    if "vit" in params:
        flat = traverse_util.flatten_dict(params["vit"])
        if ("temporal_position",) in flat:
            raise UserError("the published model has no temporal positions (vit.max_frames): use --format hf")
        temporal = {path: x for path, x in flat.items() if "temporal_merge" in path}
        image = {path: x for path, x in flat.items() if path not in temporal}
        if temporal:
            unrolled = stacking.unstack_layers(traverse_util.unflatten_dict(temporal))
            tensors |= weight_map.to_torch(weight_map.numbered(TEMPORAL, model.vit.depth), unrolled)
        if image:
            write_vit = write_vit or encoders.of_model(model.vit).to_torch
            tensors |= write_vit(model.vit, traverse_util.unflatten_dict(image))
        tensors = {VISION + name: x for name, x in tensors.items()}
    tensors |= weight_map.to_torch(trained_rows(model), params)
    if "llm" in params:
        family = families.of_model(model.llm)
        tensors |= family.to_hf(model.llm, params["llm"], f"{family.evlgen}_model.")
    return tensors
