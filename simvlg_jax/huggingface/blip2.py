"""A folder that transformers loads as BLIP-2 (`Blip2ForConditionalGeneration`), of a model with a Q-Former.

    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    model.generate(**processor(images=picture, return_tensors="pt"))

transformers has one epsilon for all norms of the vision encoder, 1e-6, and ours is 1e-5 in the norm after it, as in
LAVIS. The variances there are so much greater that this is hardly seen; for equal numbers set
`model.vision_model.post_layernorm.eps = 1e-5`.
"""

from pathlib import Path

from ml_collections import ConfigDict
from tokenizers import Tokenizer

from simvlg_jax.convert import blip2_names, encoders, evlgen, families, own_files
from simvlg_jax.data.text import TextEncoder
from simvlg_jax.huggingface.export import preprocessor_config
from simvlg_jax.models.simvlg import SimVLG
from simvlg_jax.utils.errors import UserError
from simvlg_jax.utils.files import write_json

IMAGE = "<image>"  # stands in the ids where the soft prompt comes
PROCESSOR = {"processor_class": "Blip2Processor"}


def write_hf(folder: Path, model: SimVLG, params: dict, text: TextEncoder, config: ConfigDict) -> None:
    """Writes the folder: config, weights (safetensors), tokenizer and processor.

    Args:
      params: host arrays of a scanned model, all of them.

    Raises:
      UserError: a model that transformers' BLIP-2 cannot be.
    """
    del config  # transformers' BLIP-2 reads no settings of decoding from its folder
    vit, family = model.vit, families.of_model(model.llm)
    if encoders.of_model(vit) is not encoders.ENCODERS["eva"] or model.frames.count or any(vit.merges):
        raise UserError("transformers' BLIP-2 has EVA's vision encoder, for pictures, without merging: not exported")
    if model.start_first:
        raise UserError("transformers' BLIP-2 puts the picture before the start token, and llm.start_first=True after")
    tokenizer = Tokenizer.from_str(text.tokenizer.to_str())
    tokenizer.add_special_tokens([IMAGE])
    image = tokenizer.token_to_id(IMAGE)
    if image >= model.llm.vocab_size:
        raise UserError(f"all {image} tokens of the language model are in use, and BLIP-2 needs one more for {IMAGE}")
    pad = text.end if text.pad_id == image else text.pad_id
    tensors = blip2_names.as_hugging_face(evlgen.to_evlgen(model, params), family.evlgen)
    if family.hf_config(model.llm)["tie_word_embeddings"]:
        del tensors["language_model.lm_head.weight"]  # the embedding once more
    own_files.write_arrays(folder / "model.safetensors", tensors, {"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {name: tokenizer.id_to_token(i) for name, i in (("eos_token", text.end), ("pad_token", pad))}
    special |= {"extra_special_tokens": {"image_token": IMAGE}}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special, **PROCESSOR})
    pixels = preprocessor_config(vit) | {"image_processor_type": "BlipImageProcessor"}
    write_json(folder / "preprocessor_config.json", pixels | PROCESSOR)
    write_json(folder / "processor_config.json", {"num_query_tokens": model.connector.queries, **PROCESSOR})
    ids = dict(bos_token_id=text.prefix[0], eos_token_id=text.end, pad_token_id=pad)
    write_json(folder / "config.json", model_config(model, ids, image))


def model_config(model: SimVLG, ids: dict[str, int], image: int) -> dict:
    """config.json of the folder, see transformers' `Blip2Config`.

    Args:
      ids: of the start, end and padding tokens.
      image: id of IMAGE.
    """
    vit, connector, family = model.vit, model.connector, families.of_model(model.llm)
    return dict(
        model_type="blip-2",
        architectures=["Blip2ForConditionalGeneration"],
        vision_config=dict(
            model_type="blip_2_vision_model",
            hidden_size=vit.width,
            intermediate_size=vit.mlp_dim,
            num_hidden_layers=vit.depth,
            num_attention_heads=vit.num_heads,
            image_size=vit.image_size,
            patch_size=vit.patch_size,
            layer_norm_eps=vit.norm_eps,
            qkv_bias=True,
        ),
        qformer_config=dict(
            model_type="blip_2_qformer",
            hidden_size=connector.width,
            num_hidden_layers=connector.depth,
            num_attention_heads=connector.num_heads,
            intermediate_size=connector.hidden or 4 * connector.width,
            cross_attention_frequency=connector.cross_every,
            layer_norm_eps=connector.epsilon,
            hidden_dropout_prob=connector.dropout,
            attention_probs_dropout_prob=connector.dropout,
        ),
        text_config={"model_type": family.hf_type, **family.hf_config(model.llm), **ids},
        num_query_tokens=connector.queries,
        image_token_index=image,
        tie_word_embeddings=family.hf_config(model.llm)["tie_word_embeddings"],
        dtype="float32",
    )
