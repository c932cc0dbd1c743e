"""Vicuna: LLaMA with one more token. The published code adds it, for padding."""

from simvlg_jax.models.llms.llama import Llama

VICUNA_SIZES = {
    "vicuna_7b": dict(width=4096, depth=32, num_heads=32, num_kv_heads=32, ffn=11008, vocab_size=32001),
    "vicuna_13b": dict(width=5120, depth=40, num_heads=40, num_kv_heads=40, ffn=13824, vocab_size=32001),
}


class Vicuna(Llama):
    """`Llama`. The last token of its vocabulary is the added one."""
