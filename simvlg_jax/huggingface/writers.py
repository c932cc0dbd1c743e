"""The table of what writes a model as a folder for transformers, by `connector.type`."""

from simvlg_jax.huggingface import blip2, export

WRITERS = {
    "tomeformer": export.write_hf,
    "qformer": blip2.write_hf,
    "mlp": export.write_hf,
    "pool": export.write_hf,
    "perceiver": export.write_hf,
}
