"""Compares the models with golden numbers of the published PyTorch code; prints a line for each and the worst one last.

    python tests/check_golden.py tests/golden

Every known file of the folder is checked: NAME.json with NAME.safetensors and NAME.npz (whole models: outputs, loss,
every gradient, decoded ids), keys_KIND_LLM.json (names and shapes of full-size models, never made), tome.npz,
schedules.json, caption_metrics.json, text_and_answers.json (cleaned captions and questions, scores of answers). The
exit status is 1 if an error exceeds 1e-4 (scores: 1e-6), ids or names differ, or something is missing. It is 2 if a
file cannot be read.
"""

import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs from a checkout, installed or not

from simvlg_jax.convert import blip2, blip2_names, encoders, evlgen, families, opt, pformer, weight_map
from simvlg_jax.data import captions
from simvlg_jax.decoding.generate import generate
from simvlg_jax.decoding.settings import Decoding
from simvlg_jax.evaluation.scores import answers, ptb_tokenizer
from simvlg_jax.evaluation.scores import captions as scoring
from simvlg_jax.models import token_merging
from simvlg_jax.models.bert import BERT_SIZES
from simvlg_jax.models.blip2 import PAIRS, Blip2, Negatives, negative_logits
from simvlg_jax.models.connectors.qformer import QFormer
from simvlg_jax.models.connectors.tomeformer import TomeFormer
from simvlg_jax.models.encoders.vit import VIT_SIZES, VisionOutput, ViT
from simvlg_jax.models.llms.llama import Llama
from simvlg_jax.models.llms.opt import POSITION_OFFSET, Opt
from simvlg_jax.models.pformer import PFormer, PromptLearner, Texts
from simvlg_jax.models.simvlg import SimVLG, read_after_prompt
from simvlg_jax.tasks import params as partition
from simvlg_jax.utils.errors import UserError

TOLERANCE, SCORE_TOLERANCE = 1e-4, 1e-6
DECODINGS = {  # of the arrays gen/NAME
    "greedy": {},
    "beam5": dict(num_beams=5),
    "beam5_lp": dict(num_beams=5, length_penalty=-1.0),
    "beam5_lp2": dict(num_beams=5, length_penalty=2.0),
    "beam3_min": dict(num_beams=3, min_new_tokens=6),
    "beam5_rep": dict(num_beams=5, repetition_penalty=1.5),
}
FULL_SIZE = {"opt2.7b": "opt_2.7b", "opt6.7b": "opt_6.7b", "vicuna7b": "vicuna_7b", "vicuna13b": "vicuna_13b"}
Check = tuple[str, float]  # what was compared, and its error in units of its tolerance: above 1 it fails


def relative(ours: np.ndarray, theirs: np.ndarray, floor: float = 0.0) -> float:
    """Returns ||ours - theirs|| / ||theirs||; infinity if the shapes differ or ours is not finite."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape or not np.isfinite(ours).all():
        return float("inf")
    distance = np.linalg.norm(ours - theirs)
    return float(distance / max(np.linalg.norm(theirs), floor, 1e-30)) if distance else 0.0


def is_trained(path: tuple[str, ...]) -> bool:
    """Returns whether the published recipe trains a parameter: all but ViT and LLM, and video's part of the ViT."""
    return path[0] not in ("vit", "llm") or not partition.TEMPORAL.isdisjoint(path)


def exact(equal: bool) -> float:
    return 0.0 if equal else float("inf")


class Frames(nn.Module):
    """Takes the place of the vision encoder where the golden inputs are its outputs (B, N, C)."""

    temporal = False
    class_token = True

    def encode(self, frames: jax.Array) -> VisionOutput:
        return VisionOutput(frames)


def build_vit(sizes: dict, **options) -> ViT | Frames:
    if "vit" not in sizes:
        return Frames()
    v = sizes["vit"]
    hidden = int(v["dim"] * v["mlp"])
    temporal = sizes["video"]
    return ViT(v["img"], v["patch"], v["dim"], v["depth"], v["heads"], hidden, temporal=temporal, **options)


def build_qformer(sizes: dict) -> QFormer:
    q = sizes["qformer"]
    every = q["cross_attention_freq"]
    return QFormer(q["dim"], q["layers"], q["heads"], q["queries"], cross_every=every, hidden=q["ffn"])


def build(sizes: dict, max_positions: int = 128, **options) -> SimVLG:
    """Returns the model of a NAME.json. Only OPT has `max_positions`."""
    lm = sizes["lm"]
    if sizes["llm"] == "opt":
        ffn = lm.get("ffn", 4 * lm["dim"])
        llm = Opt(lm["dim"], lm["layers"], lm["heads"], ffn, lm["vocab"], max_positions, **options)
    else:
        llm = Llama(lm["dim"], lm["layers"], lm["heads"], lm.get("kv", lm["heads"]), lm["ffn"], lm["vocab"], **options)
    vit = build_vit(sizes, **options)
    if "qformer" in sizes:
        return SimVLG(vit, build_qformer(sizes), llm)
    c = sizes["connector"]
    merges = token_merging.merge_schedule(c["layers"], c["r"])
    return SimVLG(vit, TomeFormer(c["dim"], c["layers"], c["heads"], merges), llm, vit_grad=sizes["video"])


def read_model(folder: Path, name: str) -> tuple[dict, dict, dict]:
    """Returns (sizes, tensors, arrays) from NAME.json, .safetensors and .npz."""
    sizes = json.loads((folder / f"{name}.json").read_text())
    with np.load(folder / f"{name}.npz") as archive:
        arrays = dict(archive)
    return sizes, load_file(folder / f"{name}.safetensors"), arrays


def check_model(folder: Path, name: str, **options) -> Iterator[Check]:
    sizes, tensors, arrays = read_model(folder, name)
    table = tensors.get("opt_model.model.decoder.embed_positions.weight", np.zeros(0))
    model = build(sizes, max_positions=len(table) - POSITION_OFFSET, **options)
    params = jax.tree.map(jnp.asarray, evlgen.from_evlgen(model, tensors))
    trained, frozen = partition.split(params, is_trained)
    of_qformer = "qformer" in sizes
    seen = np.moveaxis(arrays["image"], 1, -1) if "image" in arrays else arrays["frames"]
    images = jnp.asarray(seen)  # channels last: (B, [F,] H, W, 3); or frames (B, N, C)
    text = [jnp.asarray(arrays[key]) for key in ("ids", "mask")]

    @jax.jit
    def outputs(params):
        options = dict(
            capture_intermediates=lambda module, _: module.name in ("vit", "ln_vision") or is_query_layer(module),
            mutable="intermediates",
        )
        out, inner = model.apply({"params": params}, images, *text, **options)
        inner = inner["intermediates"]
        frames, ln = inner["vit"]["encode"][0], inner["ln_vision"]["__call__"][0]
        stages = {"frames": frames.tokens, "ln": ln, "prefix": out.visual.prefix}
        stages["query_output" if of_qformer else "connector"] = out.visual.connector
        if of_qformer:
            stages["query_layers"] = layer_outputs(inner["connector"])
        return stages, model.llm.apply({"params": params["llm"]}, out.hidden, method="logits")

    @jax.jit
    def loss(trained, frozen):
        variables = {"params": partition.join(trained, frozen)}
        losses, counts = model.apply(variables, images, *text, jnp.asarray(arrays["targets"]), method="caption_losses")
        return losses.sum() / counts.sum()

    stages, logits = outputs(params)
    for stage, ours in stages.items():
        yield stage, relative(ours, arrays[stage]) / TOLERANCE
    prefix = np.ones(stages["prefix"].shape[:2], bool)
    real = np.concatenate([prefix, arrays["mask"] > 0], 1)
    yield "logits", relative(np.asarray(logits)[real], arrays["logits"][real]) / TOLERANCE
    value, gradients = jax.value_and_grad(loss)(trained, frozen)
    yield "loss", relative(value, arrays["loss"]) / TOLERANCE

    ours = {f"grad/{key}": x for key, x in evlgen.to_evlgen(model, gradients).items()}
    theirs = {key: x for key, x in arrays.items() if key.startswith("grad/")}
    yield "names of the gradients", exact(set(ours) == set(theirs))
    yield from compare_gradients(ours, theirs, of_qformer)
    for name in sorted(name for name in arrays if name.startswith("gen/")):
        ids = decode(model, params, sizes, stages["prefix"], DECODINGS[name.removeprefix("gen/")])
        yield name, exact(same_ids(ids, arrays[name], sizes))


def build_blip2(sizes: dict, prompts: PFormer | None = None) -> Blip2:
    """Returns the model of a NAME.json of BLIP-2's first stage."""
    q = sizes["qformer"]
    fields = (q["vocab"], q["max_positions"], sizes["embed_dim"])
    return Blip2(Frames(), build_qformer(sizes), *fields, pformer=prompts)


def check_stage1(folder: Path, name: str) -> Iterator[Check]:
    sizes, tensors, arrays = read_model(folder, name)
    model = build_blip2(sizes)
    heads = sizes["qformer"]["heads"]
    params = jax.tree.map(jnp.asarray, weight_map.from_torch(blip2.rows(model), tensors, heads))
    frames, ids, mask = (jnp.asarray(arrays[key]) for key in ("frames", "ids", "mask"))
    negatives = Negatives(*(jnp.asarray(arrays[f"neg_{kind}"]) for kind in ("image", "text")))
    weight, real = jnp.ones(len(ids)), arrays["mask"] > 0

    def run(model: Blip2) -> dict:
        features = model.features(frames, ids, mask)
        to_text, to_image = model.similarities(features.pair)
        states = model.writing_states(features.queries, ids, mask)
        picture, text = features.pair
        return {
            "ln": features.visual,
            "query_output": features.queries.tokens,
            "text_output": features.text.tokens,
            "image_feats": picture,
            "text_feat": text,
            "sim_i2t": to_text,
            "sim_t2i": to_image,
            "itm_logits": model.match(features.visual, ids, mask, negatives).swapaxes(0, 1).reshape(-1, 2),
            "lm_output": states,
            "lm_logits": model.logits(states),
        }

    options = dict(capture_intermediates=lambda module, _: is_query_layer(module), mutable="intermediates")
    outputs = jax.jit(lambda params: model.apply({"params": params}, method=run, **options))
    found, inner = outputs(params)
    # The Q-Former runs four times: over pictures, captions, the caption to write, and pairs.
    calls = inner["intermediates"]["connector"]
    found["query_layers"], found["text_layers"] = (layer_outputs(calls, call) for call in (0, 1))
    found["itm_output"] = by_kind(layer_outputs(calls, 3)[-1])
    queries = np.ones((len(found["itm_output"]), sizes["qformer"]["queries"]), bool)
    texts = np.concatenate([mask, mask, mask[arrays["neg_text"]]]) > 0
    counted = dict(itm_output=np.concatenate([queries, texts], 1))
    counted |= dict.fromkeys(("text_output", "lm_output", "lm_logits"), real)
    for key, ours in found.items():
        where = (slice(None), real) if key == "text_layers" else counted.get(key, slice(None))
        yield key, relative(np.asarray(ours)[where], arrays[key][where]) / TOLERANCE
    for suffix, floor in (("", False), ("_old", True)):
        for kind, similarity in (("t2i", "sim_t2i"), ("i2t", "sim_i2t")):
            wanted = arrays[f"weights_{kind}{suffix}"]
            ours = jax.nn.softmax(negative_logits(jnp.asarray(arrays[similarity]), weight, floor))
            yield f"weights_{kind}{suffix}", relative(ours, wanted / wanted.sum(1, keepdims=True)) / TOLERANCE

    counts = {"itc": len(ids), "itm": PAIRS * len(ids), "lm": (arrays["lm_targets"] >= 0).sum()}

    def means(params: dict) -> dict[str, jax.Array]:
        arguments = (frames, ids, mask, weight, jax.random.key(0), negatives)
        losses = model.apply({"params": params}, *arguments, method="losses")
        return {key: x.sum() / counts[key] for key, x in losses.items()}

    values, pull_back = jax.vjp(jax.jit(means), params)
    for key, value in values.items():
        yield f"loss_{key}", relative(value, arrays[f"loss_{key}"]) / TOLERANCE
    yield "loss", relative(sum(values.values()), arrays["loss"]) / TOLERANCE
    for prefix, chosen in (("grad/", tuple(counts)), *((f"grad_{key}/", (key,)) for key in counts)):
        gradients = pull_back({key: jnp.float32(key in chosen) for key in values})[0]
        ours = {prefix + key: x for key, x in weight_map.to_torch(blip2.rows(model), gradients).items()}
        theirs = {key: x for key, x in arrays.items() if key.startswith(prefix)}
        absent = [x for key, x in ours.items() if key not in theirs]
        yield f"{prefix} of {len(theirs)} names", exact(set(theirs) <= set(ours) and not any(map(np.any, absent)))
        yield from compare_gradients(ours, theirs, True)


def build_pformer(sizes: dict) -> PFormer:
    p = sizes["pformer"]
    return PFormer(
        p["dim"],
        p["layers"],
        p["heads"],
        sizes["lm"]["dim"],
        sizes["qformer"]["queries"],
        p["vocab"],
        hidden=p["ffn"],
        max_positions=p["max_positions"],
    )


def check_pformer(folder: Path, name: str) -> Iterator[Check]:
    """Checks the P-Former as it learns from text alone (stage0/), and as pictures' prompts resemble its own."""
    sizes, tensors, every = read_model(folder, name)
    for stage, checks in (
        ("stage0", check_learner),
        ("stage1", check_aligned_stage1),
        ("stage2", check_aligned_stage2),
    ):
        arrays = {key.removeprefix(f"{stage}/"): x for key, x in every.items() if not key.startswith("stage")}
        arrays |= {key.removeprefix(f"{stage}/"): x for key, x in every.items() if key.startswith(f"{stage}/")}
        for what, error in checks(sizes, tensors, arrays):
            yield f"{stage}/{what}", error


def build_opt(sizes: dict, tensors: dict) -> Opt:
    lm = sizes["lm"]
    positions = len(tensors["opt_model.model.decoder.embed_positions.weight"]) - POSITION_OFFSET
    return Opt(lm["dim"], lm["layers"], lm["heads"], lm["ffn"], lm["vocab"], positions)


def check_learner(sizes: dict, tensors: dict, arrays: dict) -> Iterator[Check]:
    ids, mask, drawn = (jnp.asarray(arrays[key]) for key in ("ids", "mask", "draw"))
    texts = Texts(*map(jnp.asarray, (arrays[f"lm_{key}"] for key in ("ids", "mask", "targets"))))
    llm = build_opt(sizes, tensors)
    model = PromptLearner(build_pformer(sizes), llm, sizes["mask_token_id"], sizes["embed_dim"])
    trained = jax.tree.map(jnp.asarray, pformer.of_blitext(model.pformer, tensors))
    frozen = {"llm": jax.tree.map(jnp.asarray, opt.from_hf(llm, tensors, "opt_model."))}
    last = f"layer_{sizes['pformer']['layers'] - 1}"

    def run(model: PromptLearner) -> dict:
        masked = model.masked(ids, mask, drawn)
        sentence = model.embed(masked, mask)
        prompts = model.pformer(masked, mask)
        hidden = read_after_prompt(model.llm, prompts, texts.ids, texts.mask, False)
        return {
            "masked_ids": masked,
            "text_feat": sentence,
            "sim_t2t": sentence @ sentence.T / model.temperature,
            "prompts": prompts,
            "nearest": model.nearest(prompts),
            "lm_logits": model.llm.logits(hidden),
        }

    options = dict(capture_intermediates=lambda module, _: module.name == last, mutable="intermediates")
    found, inner = jax.jit(lambda params: model.apply({"params": params}, method=run, **options))(trained | frozen)
    found["text_output"] = inner["intermediates"]["pformer"]["encoder"][last]["__call__"][0].tokens
    real = np.concatenate([np.ones(found["prompts"].shape[:2], bool), arrays["lm_mask"] > 0], 1)
    counted = {"lm_logits": real, "text_output": arrays["mask"] > 0}
    for key, ours in found.items():
        where, whole = counted.get(key, slice(None)), arrays[key].dtype.kind == "i"
        ours, theirs = np.asarray(ours)[where], arrays[key][where]
        yield key, exact(np.array_equal(ours, theirs)) if whole else relative(ours, theirs) / TOLERANCE

    def means(trained: dict) -> dict[str, jax.Array]:
        variables = {"params": trained | frozen}
        losses, own = model.apply(variables, ids, mask, drawn, texts, method="losses")
        contrast = model.apply(variables, own, own, jnp.ones(len(own)), method="contrastive_losses")
        return {"c": contrast.mean(), "vq": losses["vq"].mean(), "lm": losses["lm"].sum() / (texts.targets >= 0).sum()}

    values, pull_back = jax.vjp(jax.jit(means), trained)
    for key, value in values.items():
        yield f"loss_{key}", relative(value, arrays[f"loss_{key}"]) / TOLERANCE
    yield "loss", relative(sum(values.values()), arrays["loss"]) / TOLERANCE
    for prefix, chosen in (("grad/", tuple(values)), *((f"grad_{key}/", (key,)) for key in values)):
        gradients = pull_back({key: jnp.float32(key in chosen) for key in values})[0]
        named = weight_map.to_torch(pformer.rows(model.pformer), gradients)
        ours = {f"{prefix}Pformer.{key}": x for key, x in named.items()}
        theirs = {key: x for key, x in arrays.items() if key.startswith(prefix)}
        absent = [x for key, x in ours.items() if key not in theirs]
        yield f"{prefix} of {len(theirs)} names", exact(set(theirs) <= set(ours) and not any(map(np.any, absent)))
        yield from compare_gradients(ours, theirs, True)


def check_aligned_stage1(sizes: dict, tensors: dict, arrays: dict) -> Iterator[Check]:
    model = build_blip2(sizes, build_pformer(sizes))
    table = [*blip2.rows(model), *weight_map.linear("llm_proj", "opt_proj")]
    wanted = {row.torch for row in table}
    own = {key: x for key, x in tensors.items() if key in wanted}
    trained = jax.tree.map(jnp.asarray, weight_map.from_torch(table, own, sizes["qformer"]["heads"]))
    frozen = {"pformer": jax.tree.map(jnp.asarray, pformer.of_blitext(model.pformer, tensors))["pformer"]}
    frames, ids, mask = (jnp.asarray(arrays[key]) for key in ("frames", "ids", "mask"))
    negatives = Negatives(*(jnp.asarray(arrays[f"neg_{kind}"]) for kind in ("image", "text")))

    def run(model: Blip2) -> dict:
        queries = model.features(frames, ids, mask).queries.tokens
        return {"query_output": queries, "prefix": model.llm_proj(queries), "reference": model.pformer(ids, mask)}

    found = jax.jit(lambda params: model.apply({"params": params}, method=run))(trained | frozen)
    for key, ours in found.items():
        yield key, relative(ours, arrays[key]) / TOLERANCE
    counts = {"itc": len(ids), "itm": PAIRS * len(ids), "lm": jnp.maximum(mask.sum(1) - 1, 0).sum(), "align": len(ids)}

    def total(trained: dict) -> tuple[jax.Array, dict]:
        arguments = (frames, ids, mask, jnp.ones(len(ids)), jax.random.key(0), negatives, (ids, mask))
        losses = model.apply({"params": trained | frozen}, *arguments, method="losses")
        means = {key: x.sum() / counts[key] for key, x in losses.items()}
        means["align"] *= sizes["omega1"]
        return sum(means.values()), means

    (value, means), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(trained)
    for key, mean in means.items():
        yield f"loss_{key}", relative(mean, arrays[f"loss_{key}"]) / TOLERANCE
    yield "loss", relative(value, arrays["loss"]) / TOLERANCE
    yield from check_every_gradient(table, gradients, arrays)


def check_aligned_stage2(sizes: dict, tensors: dict, arrays: dict) -> Iterator[Check]:
    model = SimVLG(Frames(), build_qformer(sizes), build_opt(sizes, tensors), pformer=build_pformer(sizes))
    table, heads = evlgen.trained_rows(model), sizes["qformer"]["heads"]
    trained = jax.tree.map(jnp.asarray, weight_map.from_torch(table, tensors, heads, list(tensors)))
    frozen = {
        "llm": jax.tree.map(jnp.asarray, opt.from_hf(model.llm, tensors, "opt_model.")),
        "pformer": jax.tree.map(jnp.asarray, pformer.of_blitext(model.pformer, tensors))["pformer"],
    }
    frames, *sentence = (jnp.asarray(arrays[key]) for key in ("frames", "ids", "mask"))
    targets = np.where(arrays["lm_mask"] > 0, arrays["lm_ids"], -100)
    text = [jnp.asarray(x) for x in (arrays["lm_ids"], arrays["lm_mask"], targets)]

    def run(model: SimVLG) -> dict:
        out = model(frames, *text[:2])
        found = {"query_output": out.visual.connector, "prefix": out.visual.prefix}
        return found | {"reference": model.pformer(*sentence), "logits": model.llm.logits(out.hidden)}

    found = jax.jit(lambda params: model.apply({"params": params}, method=run))(trained | frozen)
    real = np.concatenate([np.ones(found["prefix"].shape[:2], bool), arrays["lm_mask"] > 0], 1)
    for key, ours in found.items():
        where = real if key == "logits" else slice(None)
        yield key, relative(np.asarray(ours)[where], arrays[key][where]) / TOLERANCE

    def total(trained: dict) -> tuple[jax.Array, dict]:
        variables = {"params": trained | frozen}
        losses, written, apart = model.apply(variables, frames, *sentence, *text, method="aligned_losses")
        means = {"lm": losses.sum() / written.sum(), "align": sizes["omega2"] * apart.mean()}
        return sum(means.values()), means

    (value, means), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(trained)
    for key, mean in means.items():
        yield f"loss_{key}", relative(mean, arrays[f"loss_{key}"]) / TOLERANCE
    yield "loss", relative(value, arrays["loss"]) / TOLERANCE
    yield from check_every_gradient(table, gradients, arrays)


def check_every_gradient(table: list[weight_map.Row], gradients: dict, arrays: dict) -> Iterator[Check]:
    ours = {f"grad/{key}": x for key, x in weight_map.to_torch(table, gradients).items()}
    theirs = {key: x for key, x in arrays.items() if key.startswith("grad/")}
    yield "names of the gradients", exact(set(ours) == set(theirs))
    yield from compare_gradients(ours, theirs, True)


def by_kind(x: np.ndarray) -> np.ndarray:
    """Returns pairs whose examples are neighbours (B PAIRS, ...) in the order of their kinds, as published."""
    return np.asarray(x).reshape(-1, PAIRS, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)


def is_query_layer(module: nn.Module) -> bool:
    """Returns whether a module is a layer of the Q-Former, or the norm before the first one."""
    return isinstance(module.parent, QFormer) and (module.name == "norm" or module.name.startswith("layer_"))


def layer_outputs(inner: dict, call: int = 0) -> jax.Array:
    """Returns what a call of the Q-Former gave after its norm and each layer, (1 + L, B, S, D)."""
    layers = (inner[f"layer_{i}"]["__call__"][call][0] for i in range(len(inner) - 1))
    return jnp.stack([inner["norm"]["__call__"][call], *layers])


def compare_gradients(ours: dict, theirs: dict, of_qformer: bool) -> Iterator[Check]:
    """Compares gradients by name. In those of the Q-Former, key biases hold rounding noise below 1e-7 of the norm."""
    norm = np.sqrt(sum(np.sum(x.astype(np.float64) ** 2) for x in theirs.values()))
    for key in sorted(set(ours) & set(theirs)):
        floor = 1e-7 / TOLERANCE if of_qformer and key.endswith("key.bias") else 1e-6
        yield key, relative(ours[key], theirs[key], floor * norm) / TOLERANCE


def decode(model: SimVLG, params: dict, sizes: dict, prefix: jax.Array, options: dict) -> np.ndarray:
    """Returns ids (B, max_length - 1). The published generate() counts a dummy start token, which ours lack."""
    start = jnp.full((prefix.shape[0], 1), sizes["bos_token_id"], jnp.int32)
    special = dict(eos_id=sizes["eos_token_id"], pad_id=sizes["pad_token_id"], bos_id=sizes["bos_token_id"])
    settings = Decoding(max_new_tokens=sizes["max_length"], count_bos=True, **options)
    decoded = jax.jit(
        lambda llm, prefix: generate(model.llm, llm, prefix, start, jnp.ones_like(start), settings, **special)
    )
    return np.asarray(decoded(params["llm"], prefix))[:, 0]


def same_ids(ours: np.ndarray, theirs: np.ndarray, sizes: dict) -> bool:
    """Returns whether ids agree. Theirs have the dummy start and end with the longest row; then ours are padding."""
    width = theirs.shape[1] - 1
    return np.array_equal(ours[:, :width], theirs[:, 1:]) and bool((ours[:, width:] == sizes["pad_token_id"]).all())


def full_size(kind: str, llm_name: str) -> tuple[SimVLG, dict]:
    """Returns a published model and its parameters as ShapeDtypeStructs."""
    size = FULL_SIZE[llm_name]
    family = families.of_size(size)
    connector = TomeFormer(**BERT_SIZES["base"], merges=token_merging.merge_schedule(12, 19))
    if kind == "blip2":
        connector = QFormer(**BERT_SIZES["base"])
    model = SimVLG(ViT(**VIT_SIZES["eva_g"], temporal=kind == "video"), connector, family.module(**family.sizes[size]))
    image, token = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.uint8), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    init = jax.eval_shape(
        lambda *x: model.init(jax.random.key(0), *x, method="caption_losses"), image, token, token, token
    )
    return model, nn.unbox(init)["params"]


def shapes_of(tensors: dict) -> dict[str, list[int]]:
    return {name: list(x.shape) for name, x in tensors.items()}


def check_names(model: SimVLG, params: dict, wanted: dict) -> Iterator[Check]:
    """Checks the names and shapes of a full-size model, and which of them are trained."""
    tensors = jax.eval_shape(lambda p: evlgen.to_evlgen(model, p), params)
    trained = partition.split(params, is_trained)[0]
    yield f"{len(wanted['parameters'])} names and shapes", exact(shapes_of(tensors) == wanted["parameters"])
    names = jax.eval_shape(lambda p: evlgen.to_evlgen(model, p), trained)
    yield f"{len(wanted['trainable'])} trained names", exact(set(names) == set(wanted["trainable"]))


def check_keys(path: Path) -> Iterator[Check]:
    """Checks names, shapes and the trained part of a full-size model without making its arrays."""
    _, kind, llm_name = path.stem.split("_")
    wanted = json.loads(path.read_text())
    model, params = full_size(kind, llm_name)
    if kind != "blip2":
        yield from check_names(model, params, wanted)
        return
    yield from check_names(model, params, wanted["stage2"])
    tensors = jax.eval_shape(lambda p: blip2_names.as_hugging_face(evlgen.to_evlgen(model, p), "opt"), params)
    yield f"{len(wanted['stage2']['hf'])} of Hugging Face", exact(shapes_of(tensors) == wanted["stage2"]["hf"])
    yield from check_stage1_names(model, wanted)


def check_stage1_names(second: SimVLG, wanted: dict) -> Iterator[Check]:
    """Checks the names and shapes of a full-size first stage, given the model of the second one."""
    model = Blip2(second.vit, second.connector, 30523)
    image, token = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.uint8), jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def tensors_of(image: jax.Array, ids: jax.Array) -> tuple[dict, dict]:
        key = jax.random.key(0)
        params = nn.unbox(model.init(key, image, ids, ids, jnp.ones(1), key, method="losses"))["params"]
        vision = encoders.of_model(model.vit).to_torch(model.vit, params["vit"])
        trained = weight_map.to_torch(blip2.rows(model), params)
        return {evlgen.VISION + name: x for name, x in vision.items()}, trained

    vision, trained = jax.eval_shape(tensors_of, image, token)
    tied = {name: trained[other] for name, other in wanted["tied"].items() if other in trained}
    names, wanted = vision | trained | tied, wanted["stage1"]
    yield f"stage 1: {len(wanted['parameters'])} names and shapes", exact(shapes_of(names) == wanted["parameters"])
    yield f"stage 1: {len(wanted['trainable'])} trained names", exact(set(trained) == set(wanted["trainable"]))
    found = jax.eval_shape(lambda x: blip2_names.as_hugging_face(x, "opt"), vision | trained)
    yield f"stage 1: {len(wanted['hf'])} of Hugging Face", exact(shapes_of(found) == wanted["hf"])


def check_tome(path: Path) -> Iterator[Check]:
    with np.load(path) as archive:
        golden = dict(archive)
    for case in sorted({name.split("/")[0] for name in golden}):
        metric, x, r = golden[f"{case}/metric"], golden[f"{case}/x"], int(golden[f"{case}/r"])
        slots = token_merging.match(jnp.asarray(metric), r)
        num_slots = x.shape[1] - token_merging.mergeable(x.shape[1], r)
        merged = token_merging.merge(jnp.asarray(x), slots, num_slots)
        yield f"{case}/mean", relative(merged, golden[f"{case}/mean"]) / TOLERANCE


def check_schedules(path: Path) -> Iterator[Check]:
    for depth, r, wanted in json.loads(path.read_text()):
        yield f"{depth} layers, r = {r}", exact(list(token_merging.merge_schedule(depth, r)) == wanted)


def check_metrics(path: Path) -> Iterator[Check]:
    golden = json.loads(path.read_text())
    yield "tokenised hypotheses", exact(ptb_tokenizer.tokenize(golden["hypotheses"]) == golden["tokenized_hypotheses"])
    tokens = [ptb_tokenizer.tokenize(texts) for texts in golden["references"]]
    yield "tokenised references", exact(tokens == golden["tokenized_references"])
    references = {str(i): texts for i, texts in enumerate(golden["references"])}
    hypotheses = {str(i): text for i, text in enumerate(golden["hypotheses"])}
    scores = scoring.score_captions(references, hypotheses)
    for name, value in scores.as_dict().items():
        yield name, relative(value, golden["scores"][name]) / SCORE_TOLERANCE
    each = [scores.cider_per_example[key] for key in references]
    yield "CIDEr of each", relative(each, golden["cider_each"]) / SCORE_TOLERANCE


def check_texts(path: Path) -> Iterator[Check]:
    golden = json.loads(path.read_text())
    rows = golden["processors"]
    for name, clean in (("caption", captions.blip_caption), ("question", captions.blip_question)):
        yield f"{len(rows)} texts as a {name}", exact(all(clean(row["text"]) == row[name] for row in rows))
    rows = golden["vqa"]
    right = all(answers.normalize(row["prediction"]) == row["normalized"] for row in rows)
    yield f"{len(rows)} answers, normalised", exact(right)
    # The golden accuracies are rounded to two digits.
    ours = [100 * answers.vqa_accuracy(row["prediction"], row["answers"]) for row in rows]
    right = all(abs(x - row["accuracy"]) < 0.00501 for x, row in zip(ours, rows, strict=True))
    yield f"VQA accuracy of {len(rows)} answers", exact(right)
    rows = golden["gqa"]
    for key, accuracy in (("correct", answers.gqa_accuracy), ("correct_raw_answer", answers.gqa_published_accuracy)):
        right = all(accuracy(row["prediction"], [row["answer"]]) == row[key] for row in rows)
        yield f"GQA {key} of {len(rows)} answers", exact(right)


def checks_of(folder: Path) -> list[tuple[str, Iterator[Check]]]:
    """Returns (name, its checks) of every known file.

    Raises:
      UserError: there is no known file, or a file of a model is missing.
    """
    found = []
    for path in sorted(folder.glob("keys_*.json")):
        if path.stem.count("_") != 2 or path.stem.split("_")[2] not in FULL_SIZE:
            raise UserError(f"{path.name}: known language models are {', '.join(FULL_SIZE)}")
        found.append((path.stem, check_keys(path)))
    arrays = [*folder.glob("*.npz"), *folder.glob("*.safetensors")]
    for name in sorted({path.stem for path in arrays} - {"tome"}):
        missing = [f for f in (f"{name}{s}" for s in (".json", ".safetensors", ".npz")) if not (folder / f).exists()]
        if missing:
            raise UserError(f"the model {name} lacks {', '.join(missing)}")
        check = {"qformer_stage1": check_stage1, "pformer": check_pformer}.get(name, check_model)
        found.append((name, check(folder, name)))
    known = {
        "tome.npz": check_tome,
        "schedules.json": check_schedules,
        "caption_metrics.json": check_metrics,
        "text_and_answers.json": check_texts,
    }
    found += [(name, check(folder / name)) for name, check in known.items() if (folder / name).exists()]
    if not found:
        raise UserError(f"no golden file in {folder}")
    return found


UNREADABLE = (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, SafetensorError)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print(__doc__, file=sys.stderr)
        return 2
    status, worst = 0, ("nothing was compared", 0.0)
    try:
        found = checks_of(Path(arguments[0]))
    except UserError as error:
        print(f"missing: {error}", file=sys.stderr)
        return 1
    for name, checks in found:
        try:
            with jax.default_matmul_precision("highest"):
                for what, error in checks:
                    mark = "" if error <= 1 else "  <-- FAILS"
                    print(f"{name:22} {what:78} {error * TOLERANCE:9.2e}{mark}", flush=True)
                    worst = max(worst, (f"{name} {what}", error), key=lambda check: check[1])
        except (UserError, KeyError) as error:
            print(f"{name}: missing: {error}", file=sys.stderr)
            status = max(status, 1)
        except UNREADABLE as error:
            print(f"{name}: cannot be read: {error}", file=sys.stderr)
            status = 2
    print(f"worst: {worst[1] * TOLERANCE:.2e} ({worst[0]})")
    return max(status, 1 if worst[1] > 1 else 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
