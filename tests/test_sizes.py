"""Parameter counts of the full sizes, without making their arrays; merging needs no communication."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from simvlg_jax.convert.encoders import ENCODERS
from simvlg_jax.convert.families import FAMILIES, of_size
from simvlg_jax.models import token_merging
from simvlg_jax.models.bert import BERT_SIZES
from simvlg_jax.models.connectors.tomeformer import TomeFormer
from simvlg_jax.models.encoders.vit import VIT_SIZES, ViT
from simvlg_jax.models.llms.vicuna import VICUNA_SIZES, Vicuna
from simvlg_jax.models.simvlg import SimVLG
from simvlg_jax.training.flops import count_flops


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


VITS = {
    "eva_g": 985_894_528,
    "clip_l": 290_581_504,
    "small_64px": 1_222_016,
    "tiny_32px": 23_776,
    "siglip_b16_224": 78_707_712,
    "siglip_b16_256": 78_753_792,
    "siglip_b16_384": 78_999_552,
    "siglip_b16_512": 79_343_616,
    "siglip_b32_256": 80_375_808,
    "siglip_l16_256": 290_762_752,
    "siglip_l16_384": 291_090_432,
    "siglip_l16_512": 291_549_184,
    "siglip_so400m14_224": 397_200_544,
    "siglip_so400m14_384": 397_745_440,
    "siglip_so400m16_256": 397_407_904,
    "siglip_so400m16_384": 397_776_544,
    "siglip_so400m16_512": 398_292_640,
    "siglip_tiny": 23_776,
}


def test_vit_sizes():
    found = {}
    for encoder in ENCODERS.values():
        for name, size in encoder.sizes.items():
            vit = encoder.module(**size)
            image = jax.ShapeDtypeStruct((1, vit.image_size, vit.image_size, 3), jnp.float32)
            tokens, params = jax.eval_shape(vit.init_with_output, jax.random.key(0), image)
            found[name] = count(params)
            assert tokens.shape[1] == vit.num_tokens
    assert found == VITS


LLMS = {
    "opt_125m": 125_239_296,
    "opt_350m": 331_196_416,
    "opt_1.3b": 1_315_758_080,
    "opt_2.7b": 2_651_596_800,
    "opt_6.7b": 6_658_473_984,
    "opt_13b": 12_853_473_280,
    "opt_tiny": 24_448,
    "smollm2_135m": 134_515_008,
    "tinyllama_1.1b": 1_100_048_384,
    "vicuna_7b": 6_738_423_808,
    "vicuna_13b": 13_015_874_560,
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "llama3.1_8b": 8_030_261_248,
    "llama3.2_1b": 1_235_814_400,
    "tiny": 21_728,
    "qwen2.5_0.5b": 494_032_768,
    "qwen2.5_1.5b": 1_543_714_304,
    "qwen2.5_3b": 3_085_938_688,
    "qwen2.5_7b": 7_615_616_512,
    "qwen2.5_tiny": 21_856,
    "qwen3_0.6b": 596_049_920,
    "qwen3_1.7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_tiny": 27_984,
}
AXES = {"vocab", "embed", "heads", "kv_heads", "head_dim", "mlp", "layers", "norm", None}


def logits_of_ids(llm: nn.Module, ids: jax.Array) -> jax.Array:
    """Maps ids (B, S) to logits (B, S, V), by calling every method."""
    return llm.logits(llm(llm.embed(ids), jnp.ones_like(ids), jnp.zeros_like(ids)).hidden)


@pytest.mark.parametrize("name", [size for family in FAMILIES.values() for size in family.sizes])
def test_llm_sizes(name):
    """Checks the number of parameters; each of their axes has a logical name."""
    llm, ids = of_size(name).module(**of_size(name).sizes[name]), jnp.zeros((1, 1), jnp.int32)
    params = jax.eval_shape(lambda: llm.init(jax.random.key(0), ids, method=logits_of_ids))["params"]
    assert count(nn.unbox(params)) == LLMS[name]
    for box in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nn.Partitioned)):
        assert len(box.names) == box.value.ndim and set(box.names) <= AXES


def test_a_size_names_one_family():
    """`llm.size` chooses one family, and the class of a model identifies its family."""
    sizes = [size for family in FAMILIES.values() for size in family.sizes]
    assert len(set(sizes)) == len(sizes)
    assert len({family.module for family in FAMILIES.values()}) == len(FAMILIES)


def test_published_image_model_with_vicuna_trains_what_was_published():
    connector = TomeFormer(**BERT_SIZES["base"], merges=token_merging.merge_schedule(12, 19))
    model = SimVLG(ViT(**VIT_SIZES["eva_g"]), connector, Vicuna(**VICUNA_SIZES["vicuna_7b"]))
    token = jnp.zeros((1, 1), jnp.int32)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.uint8)
    method = "caption_losses"
    params = jax.eval_shape(lambda k, x: model.init(k, x, token, token, token, method=method), jax.random.key(0), image)
    trained = {name: tree for name, tree in params["params"].items() if name not in ("vit", "llm")}
    assert count(trained) == 89_685_504

    visual = jax.eval_shape(lambda p, x: model.apply(p, x, method="encode_image"), params, image)
    assert visual.source_map.shape == (1, 257)
    assert visual.prefix.shape == (1, 29, 4096)


def test_merging_a_sharded_batch_compiles_without_collectives():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def merge(x):
        return token_merging.merge(x, token_merging.match(x, 4), x.shape[1] - 4)

    x = jax.ShapeDtypeStruct((16, 17, 8), jnp.float32)
    program = jax.jit(merge, in_shardings=rows, out_shardings=rows).lower(x).compile().as_text()
    assert "dot" in program
    assert not any(op in program for op in ("all-reduce", "all-gather", "all-to-all", "collective-permute"))


def test_flops_count_every_turn_of_a_scan():
    def stacked(x, kernels):
        return jax.lax.scan(lambda h, k: (h @ k, None), x, kernels)[0]

    x, kernels = jnp.zeros((5, 7)), jnp.zeros((3, 7, 7))
    assert count_flops(jax.make_jaxpr(jax.jit(stacked))(x, kernels)) == 3 * 2 * 5 * 7 * 7
