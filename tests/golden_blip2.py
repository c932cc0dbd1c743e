"""Golden numbers of BLIP-2's first stage, and of the P-Former alone and in both stages; see check_golden.py."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from golden_numbers import (
    TOLERANCE,
    Check,
    Frames,
    build_qformer,
    compare_gradients,
    exact,
    is_query_layer,
    layer_outputs,
    read_model,
    relative,
)

from simvlg_jax.convert import blip2, evlgen, opt, pformer, weight_map
from simvlg_jax.models.blip2 import PAIRS, Blip2, Negatives, negative_logits
from simvlg_jax.models.llms.opt import POSITION_OFFSET, Opt
from simvlg_jax.models.pformer import PFormer, PromptLearner, Texts
from simvlg_jax.models.simvlg import SimVLG, read_after_prompt


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
