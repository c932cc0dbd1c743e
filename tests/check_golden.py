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

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs from a checkout, installed or not

from golden_blip2 import check_pformer, check_stage1
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

from simvlg_jax.convert import blip2, blip2_names, encoders, evlgen, families, weight_map
from simvlg_jax.data import captions
from simvlg_jax.decoding.generate import generate
from simvlg_jax.decoding.settings import Decoding
from simvlg_jax.evaluation.scores import answers, ptb_tokenizer
from simvlg_jax.evaluation.scores import captions as scoring
from simvlg_jax.models import token_merging
from simvlg_jax.models.bert import BERT_SIZES
from simvlg_jax.models.blip2 import Blip2
from simvlg_jax.models.connectors.qformer import QFormer
from simvlg_jax.models.connectors.tomeformer import TomeFormer
from simvlg_jax.models.encoders.vit import VIT_SIZES, ViT
from simvlg_jax.models.llms.llama import Llama
from simvlg_jax.models.llms.opt import POSITION_OFFSET, Opt
from simvlg_jax.models.simvlg import SimVLG
from simvlg_jax.tasks import params as partition
from simvlg_jax.utils.errors import UserError

SCORE_TOLERANCE = 1e-6
DECODINGS = {  # of the arrays gen/NAME
    "greedy": {},
    "beam5": dict(num_beams=5),
    "beam5_lp": dict(num_beams=5, length_penalty=-1.0),
    "beam5_lp2": dict(num_beams=5, length_penalty=2.0),
    "beam3_min": dict(num_beams=3, min_new_tokens=6),
    "beam5_rep": dict(num_beams=5, repetition_penalty=1.5),
}
FULL_SIZE = {"opt2.7b": "opt_2.7b", "opt6.7b": "opt_6.7b", "vicuna7b": "vicuna_7b", "vicuna13b": "vicuna_13b"}


def is_trained(path: tuple[str, ...]) -> bool:
    """Returns whether the published recipe trains a parameter: all but ViT and LLM, and video's part of the ViT."""
    return path[0] not in ("vit", "llm") or not partition.TEMPORAL.isdisjoint(path)


def build_vit(sizes: dict, **options) -> ViT | Frames:
    if "vit" not in sizes:
        return Frames()
    v = sizes["vit"]
    hidden = int(v["dim"] * v["mlp"])
    temporal = sizes["video"]
    return ViT(v["img"], v["patch"], v["dim"], v["depth"], v["heads"], hidden, temporal=temporal, **options)


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
