"""Qwen2.5 and Qwen3: LLaMA with biases on query, key and value, or with RMSNorm on query and key."""

from simvlg_jax.models.llms.llama import Llama

QWEN2_SIZES = {
    "qwen2.5_0.5b": dict(
        width=896, depth=24, num_heads=14, num_kv_heads=2, ffn=4864, vocab_size=151936, tie_embeddings=True
    ),
    "qwen2.5_1.5b": dict(
        width=1536, depth=28, num_heads=12, num_kv_heads=2, ffn=8960, vocab_size=151936, tie_embeddings=True
    ),
    "qwen2.5_3b": dict(
        width=2048, depth=36, num_heads=16, num_kv_heads=2, ffn=11008, vocab_size=151936, tie_embeddings=True
    ),
    "qwen2.5_7b": dict(width=3584, depth=28, num_heads=28, num_kv_heads=4, ffn=18944, vocab_size=152064),
    # The vocabulary of `data.text.character_tokenizer`.
    "qwen2.5_tiny": dict(width=32, depth=2, num_heads=4, num_kv_heads=2, ffn=64, vocab_size=98, tie_embeddings=True),
}
QWEN3_SIZES = {
    "qwen3_0.6b": dict(
        width=1024, depth=28, num_heads=16, num_kv_heads=8, ffn=3072, vocab_size=151936, tie_embeddings=True
    ),
    "qwen3_1.7b": dict(
        width=2048, depth=28, num_heads=16, num_kv_heads=8, ffn=6144, vocab_size=151936, tie_embeddings=True
    ),
    "qwen3_4b": dict(
        width=2560, depth=36, num_heads=32, num_kv_heads=8, ffn=9728, vocab_size=151936, tie_embeddings=True
    ),
    "qwen3_8b": dict(width=4096, depth=36, num_heads=32, num_kv_heads=8, ffn=12288, vocab_size=151936),
    "qwen3_tiny": dict(width=32, depth=2, num_heads=4, num_kv_heads=2, head_dim=12, ffn=64, vocab_size=98),
}


class Qwen2(Llama):
    """`Llama` with the defaults of Qwen2.5."""

    rope_theta: float = 1e6
    qkv_bias: bool = True


class Qwen3(Llama):
    """`Llama` with the defaults of Qwen3. A head is 128 wide in every size."""

    rope_theta: float = 1e6
    head_dim: int | None = 128
    qk_norm: bool = True
