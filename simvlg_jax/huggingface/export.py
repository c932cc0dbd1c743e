"""A folder that `transformers.AutoModel.from_pretrained(DIR, trust_remote_code=True)` loads, without JAX."""

import shutil
from dataclasses import asdict, fields
from pathlib import Path

from ml_collections import ConfigDict

from simvlg_jax.convert import evlgen, families, own_files, vit
from simvlg_jax.convert.weight_map import Tensors
from simvlg_jax.data.text import TextEncoder
from simvlg_jax.models.encoders.vit import ViT
from simvlg_jax.models.simvlg import SimVLG
from simvlg_jax.utils.errors import UserError
from simvlg_jax.utils.files import write_json

CODE = Path(__file__).parent / "remote_code"
VISION = (
    *("image_size", "patch_size", "width", "depth", "num_heads", "mlp_dim", "norm_eps"),
    *("class_token", "key_bias", "patch_bias", "activation", "input_norm", "temporal", "max_frames"),
)
LEFT_OUT = ("parent", "name", "dtype", "remat")  # fields of a module that PyTorch's has not
DECODING = ("max_new_tokens", "min_new_tokens", "num_beams", "length_penalty", "repetition_penalty")  # of Decoding


def model_config(model: SimVLG, text: TextEncoder, config: ConfigDict) -> dict:
    """config.json of the folder; see `SimVLGConfig` in remote_code."""
    connector, family = model.connector, families.of_model(model.llm)
    return dict(
        model_type="simvlg",
        architectures=["SimVLG"],
        auto_map={"AutoConfig": "configuration_simvlg.SimVLGConfig", "AutoModel": "modeling_simvlg.SimVLG"},
        vision={name: getattr(model.vit, name) for name in VISION} | {"merges": list(model.vit.merges)},
        connector={"type": type(connector).__name__}
        | {field.name: getattr(connector, field.name) for field in fields(connector) if field.name not in LEFT_OUT},
        frames=dict(asdict(model.frames), positions=model.max_frames),
        text_config={"model_type": family.hf_type} | family.hf_config(model.llm),
        start_token_id=text.prefix[0],
        prompt_ids=list(text.prefix[1:]),
        end_token_id=text.end,
        pad_token_id=text.pad_id,
        start_first=model.start_first,
        **{name: config.evaluate[name] for name in DECODING},
        dtype="float32",
    )


def split_ordering(params: dict) -> tuple[dict, Tensors]:
    """Returns the parameters that the published model has, and by name those of the order of frames."""
    vit = {name: x for name, x in params["vit"].items() if name != "temporal_position"}
    ordering = {name: params[name] for name in ("frame_embedding", "frame_weight") if name in params}
    rest = {name: x for name, x in params.items() if name not in ordering} | {"vit": vit}
    if "temporal_position" in params["vit"]:
        ordering["visual_encoder.temporal_position"] = params["vit"]["temporal_position"]
    return rest, ordering


def preprocessor_config(vit: ViT) -> dict:
    """Squash to a square with PIL's bicubic filter, scale to 0..1, the encoder's mean and deviation."""
    return dict(
        image_processor_type="CLIPImageProcessor",
        do_convert_rgb=True,
        do_resize=True,
        size={"height": vit.image_size, "width": vit.image_size},
        resample=3,
        do_center_crop=False,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(vit.image_mean),
        image_std=list(vit.image_std),
    )


def write_hf(folder: Path, model: SimVLG, params: dict, text: TextEncoder, config: ConfigDict) -> None:
    """Writes the folder: config, weights (safetensors, published names), tokenizer, preprocessor, modeling code.

    Args:
      params: host arrays of a scanned model, all of them.

    Raises:
      UserError: the connector does not merge as published.
    """
    if any(getattr(model.connector, name, False) for name in ("weighted_mean", "proportional_attention")):
        raise UserError("the PyTorch form merges as published: no weighted_mean, no proportional_attention")
    published, ordering = split_ordering(params)
    tensors: Tensors = evlgen.to_evlgen(model, published, vit.to_torch) | ordering
    family = families.of_model(model.llm)
    if family.hf_config(model.llm)["tie_word_embeddings"]:
        del tensors[f"{family.evlgen}_model.lm_head.weight"]  # the embedding once more
    own_files.write_arrays(folder / "model.safetensors", tensors, {"format": "pt"})
    text.tokenizer.save(str(folder / "tokenizer.json"))
    special = {name: text.tokenizer.id_to_token(i) for name, i in (("eos_token", text.end), ("pad_token", text.pad_id))}
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    write_json(folder / "preprocessor_config.json", preprocessor_config(model.vit))
    write_json(folder / "config.json", model_config(model, text, config))
    for path in CODE.glob("[a-z]*.py"):
        shutil.copyfile(path, folder / path.name)
