"""Pre-training of a vision encoder: a trained ViT against a frozen sentence encoder."""

from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from simvlg_jax.convert import own_files, pretrained, stacking
from simvlg_jax.data.batch import BatchSpec, Pictures
from simvlg_jax.models.contrastive import ContrastiveViT, Pair
from simvlg_jax.tasks import build, params
from simvlg_jax.tasks.params import Rule
from simvlg_jax.tasks.task import CONTRAST, Arrays, Contrast, Losses, Params, Task

INPUTS = ("image", "sentence_ids", "sentence_mask")


def contrastive_task(config: ConfigDict) -> Task:
    """The loss says which sentence belongs to which picture. When a run ends, the ViT is written to vit.safetensors."""
    named = config.sentence_encoder.weights
    vit = build.build_vit(config)
    model = ContrastiveViT(vit, build.build_sentence_encoder(config), dtype=jnp.dtype(config.dtype))

    def embed(params: Params, batch: Arrays, key: jax.Array | None) -> Pair:
        del key  # nothing in this model is random
        return model.apply({"params": params}, *(batch[name] for name in INPUTS))

    def contrastive_losses(params: Params, picture: jax.Array, text: jax.Array, weight: jax.Array) -> jax.Array:
        return model.apply({"params": params}, picture, text, weight, method="contrastive_losses")

    def load_pretrained(abstract: Params) -> Params:
        loaded = {"sentence_encoder": pretrained.load_sentence_encoder(config.sentence_encoder)} if named else {}
        if config.vit.weights:
            loaded["vit"] = pretrained.load_vit(config.vit.weights, vit)
        build.check_shapes(loaded, abstract)
        return loaded

    def write_vit(trained: Params, workdir: Path) -> None:
        tree = trained["vit"] if vit.scan else stacking.stack_layers(trained["vit"])
        own_files.write_tree(workdir / "vit.safetensors", tree)

    lr = config.optimizer.lr_multipliers
    trained = [
        rule
        for name in ("vit", "head_norm", "vision_proj", "text_proj")
        for rule in params.trained(name, lr.get(name, 1.0))
    ]
    return Task(
        model=model,
        batch=BatchSpec(Pictures(vit.image_size), {"sentence": build.sentence_spec(config, named)}),
        rules=(
            *trained,
            Rule("log_temperature", trained=True, lr=lr.get("temperature", 1.0)),
            *params.frozen("sentence_encoder/.*"),
        ),
        initialize=lambda key, batch: model.init(key, *(batch[name] for name in INPUTS))["params"],
        losses=lambda params, batch, key: Losses({}, embed(params, batch, key)),
        counts=lambda batch, training: {},
        weights={CONTRAST: 1.0},
        load_pretrained=load_pretrained,
        sources={"sentence_encoder": named or "random"},
        evaluator="retrieval",
        contrast=Contrast(embed, contrastive_losses),
        after_run=write_vit,
    )
