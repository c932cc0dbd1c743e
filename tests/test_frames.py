"""Ways to join the frames of a clip: equal to their definitions by loops, exact for still clips, cheap if merged."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from simvlg_jax.config.load import fill, load_config
from simvlg_jax.config.saved import read_config, save_config
from simvlg_jax.models import token_merging
from simvlg_jax.models.encoders.frames import WAYS, Frames, add_positions, weigh
from simvlg_jax.models.encoders.merge_frames import group_sizes, merge_frames
from simvlg_jax.models.layers import LayerNorm
from simvlg_jax.tasks import build_task
from simvlg_jax.tasks import params as partition
from simvlg_jax.tasks.build import check_shapes
from simvlg_jax.training.flops import count_flops
from simvlg_jax.utils.errors import UserError

RNG = np.random.default_rng(0)
CLIPS = RNG.integers(0, 256, (3, 4, 32, 32, 3), dtype=np.uint8)
PLACES = 16  # patches of a frame


def random_tree(shapes: dict, seed: int = 0) -> dict:
    """Returns parameters far from their initial values."""
    rng, flat = np.random.default_rng(seed), traverse_util.flatten_dict(shapes)
    flat = {path: rng.normal(path[-1] == "scale", 0.3, x.shape).astype(np.float32) for path, x in flat.items()}
    return traverse_util.unflatten_dict(flat)


def task_of(*flags: str):
    """Returns a tiny caption task of clips of four frames, and random parameters."""
    task = build_task(load_config("configs/tiny.py", [f"--config.{flag}" for flag in ("data.frames=4", *flags)]))
    return task, random_tree(nn.unbox(jax.eval_shape(task.init, jax.random.key(0))))


def encode_image(task, params: dict, images: np.ndarray):
    return jax.jit(lambda p, x: task.model.apply({"params": p}, x, method="encode_image"))(params, images)


# Merging across time for one clip, by loops and sets of patches, in float64.


def reference_merge(patches: np.ndarray, wanted: int) -> tuple[np.ndarray, list[set[int]]]:
    """Returns the tokens (M, D) of patches (F, P, D), and which patches each is made of."""
    frames, places, _ = patches.shape
    flat = patches.reshape(frames * places, -1).astype(np.float64)
    centre = flat.mean(0)
    halves = [[{frame * places + place} for place in range(places)] for frame in range(frames)]
    for left in group_sizes(frames, places, wanted):
        halves = [join_halves(*pair, flat, centre, left) for pair in zip(halves[::2], halves[1::2], strict=True)]
    (groups,) = halves
    return np.array([flat[sorted(group)].mean(0) for group in groups]), groups


def join_halves(earlier: list[set], later: list[set], flat: np.ndarray, centre: np.ndarray, left: int) -> list[set]:
    def unit(group: set) -> np.ndarray:
        deviation = flat[sorted(group)].mean(0) - centre
        return deviation / np.linalg.norm(deviation)

    edges = [max((float(unit(a) @ unit(b)), i, j) for j, b in enumerate(later)) for i, a in enumerate(earlier)]
    removed = len(earlier) + len(later) - left
    chosen = {i: j for _, i, j in sorted(edges, reverse=True)[:removed]}
    if not removed:
        return [group for pair in zip(earlier, later, strict=True) for group in pair]
    kept = [group for i, group in enumerate(earlier) if i not in chosen]
    return kept + [group.union(*(earlier[i] for i in chosen if chosen[i] == j)) for j, group in enumerate(later)]


@pytest.mark.parametrize(("frames", "wanted"), [(2, 5), (4, 5), (4, 9), (4, 20), (8, 11)])
def test_merging_across_time_is_its_definition_by_loops(frames, wanted):
    patches = np.random.default_rng(wanted).normal(size=(3, frames, 5, 8)).astype(np.float32)
    tokens, source_map = jax.jit(merge_frames, static_argnums=1)(patches, wanted)
    assert tokens.shape == (3, wanted, 8) and source_map.shape == (3, frames * 5)
    for row in range(3):
        expected, groups = reference_merge(patches[row], wanted)
        np.testing.assert_allclose(tokens[row], expected, rtol=1e-5, atol=1e-6)
        assert [set(np.flatnonzero(source_map[row] == slot)) for slot in range(wanted)] == groups


def test_groups_grow_evenly_from_a_frame_to_the_clip():
    assert group_sizes(16, 256, 256) == [256] * 4
    assert group_sizes(4, 16, 64) == [32, 64], "nothing is merged"
    assert group_sizes(4, 16, 1000) == [32, 64] and group_sizes(1, 16, 20) == []
    assert group_sizes(16, 256, 1024) == [362, 512, 724, 1024]


@pytest.mark.parametrize("frames", [2, 4, 8])
def test_a_repeated_picture_merges_to_its_own_tokens_exactly(frames):
    picture = np.random.default_rng(1).normal(size=(2, 1, 9, 8)).astype(np.float32)
    merge = jax.jit(merge_frames, static_argnums=1)
    np.testing.assert_array_equal(merge(picture.repeat(frames, 1), 9)[0], picture[:, 0])
    picture[:, :, 3] = picture[:, :, 6]  # patches that are equal within the picture; means of 3 are rounded
    tokens, source_map = merge(picture.repeat(frames, 1), 9)
    np.testing.assert_allclose(tokens, picture[:, 0], rtol=3e-7)
    sizes = token_merging.slot_sizes(source_map, 9)
    np.testing.assert_array_equal(sizes.sum(1), [frames * 9] * 2)


def test_a_change_keeps_tokens_of_its_own():
    """Of a clip that stands still but for one patch of one frame, that patch alone stays apart."""
    patches = np.random.default_rng(2).normal(size=(1, 1, 6, 8)).astype(np.float32).repeat(4, 1)
    patches[0, 1, 4] = 5 * np.random.default_rng(3).normal(size=8)
    tokens, source_map = merge_frames(jnp.asarray(patches), 7)
    sizes = np.bincount(np.asarray(source_map)[0])
    assert sizes.sum() == 24 and sizes[source_map[0, 6 + 4]] == 1
    np.testing.assert_allclose(tokens[0, source_map[0, 6 + 4]], patches[0, 1, 4], rtol=1e-6)


def reference_join(way: str, tokens: np.ndarray, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens (M, D) of one clip (F, 1 + P, D), and the share of each frame in each, (M, F)."""
    frames, places = len(tokens), tokens.shape[1] - 1
    one_frame = np.eye(frames)
    out, shares = [tokens[:, 0].mean(0)], [np.full(frames, 1 / frames)]
    if way in ("mean", "pooled"):
        out += [tokens[:, 1 + place].mean(0) for place in range(places)]
        shares += [np.full(frames, 1 / frames)] * places
    if way == "pooled":
        out += [frame[1:].mean(0) for frame in tokens]
        shares += list(one_frame)
    if way == "joined":
        out += [token for frame in tokens for token in frame[1:]]
        shares += [one_frame[frame] for frame in range(frames) for _ in range(places)]
    if way == "merged":
        merged, groups = reference_merge(tokens[:, 1:], wanted)
        out += list(merged)
        shares += [np.mean([one_frame[patch // places] for patch in group], 0) for group in groups]
    return np.array(out), np.array(shares)


@pytest.mark.parametrize("way", WAYS)
def test_each_way_is_its_definition_by_loops_with_the_positions_of_its_frames(way):
    rng = np.random.default_rng(4)
    tokens, positions = rng.normal(size=(2, 4, 6, 8)).astype(np.float32), rng.normal(size=(5, 8)).astype(np.float32)
    frames = Frames(4, way, 7 * (way == "merged"))
    plain, made_of, source_map = frames.join(jnp.asarray(tokens), True)
    placed = add_positions(plain, made_of, jnp.asarray(positions))
    for row in range(2):
        expected, shares = reference_join(way, tokens[row], 7)
        np.testing.assert_allclose(plain[row], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(placed[row], expected + shares @ positions[:4], rtol=1e-5, atol=1e-5)
    assert plain.shape[1] == 1 + WAYS[way].count(4, 5, frames.wanted)
    assert (source_map is not None) == (way == "merged")
    if source_map is not None:
        assert source_map.shape == (2, 21) and (source_map[:, 0] == 0).all() and (source_map[:, 1:] > 0).all()


def test_weighted_frames_have_the_mean_that_their_definition_by_loops_has():
    rng = np.random.default_rng(5)
    tokens, weights = rng.normal(size=(2, 3, 6, 8)).astype(np.float32), rng.normal(size=(5, 8)).astype(np.float32)
    found = weigh(jnp.asarray(tokens), jnp.asarray(weights)).mean(1)
    shares = [[(1 + weights[f, d] - weights[:3, d].mean()) / 3 for d in range(8)] for f in range(3)]
    expected = sum(tokens[:, f] * shares[f] for f in range(3))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_the_model_encodes_each_frame_as_a_picture_and_joins_them(way):
    """From pixels to the soft prompt: the picture's ViT on each frame, the definition above, norm, connector."""
    left = {"mean": 9, "joined": 18, "pooled": 12, "merged": 12}[way]
    flags = [f"video.frames_as={way}", f"connector.tokens={left}", *["video.tokens=20"] * (way == "merged")]
    task, params = task_of(*flags)
    out = encode_image(task, params, CLIPS)
    vit, connector = task.model.vit, task.model.connector
    frames = vit.apply({"params": params["vit"]}, vit.normalize(CLIPS.reshape(12, 32, 32, 3)))
    frames = np.asarray(frames).reshape(3, 4, 17, 32)
    joined = np.array([reference_join(way, clip, 20)[0] for clip in frames], np.float32)
    source_map = None
    if way == "merged":
        groups = [reference_merge(clip[:, 1:], 20)[1] for clip in frames]
        source_map = np.zeros((3, 65), np.int32)
        for row, slot in np.ndindex(3, 20):
            source_map[row, 1 + np.array(sorted(groups[row][slot]))] = 1 + slot
    norm = params["ln_vision"]
    joined = (joined - joined.mean(-1, keepdims=True)) / np.sqrt(joined.var(-1, keepdims=True) + 1e-5)
    joined = joined * norm["scale"] + norm["bias"]
    expected = connector.apply({"params": params["connector"]}, joined, source_map)
    np.testing.assert_allclose(out.connector, expected.tokens, rtol=1e-3, atol=1e-4)
    assert out.prefix.shape[1] == left
    if way == "pooled":
        assert out.source_map is None and out.layers == ()
    else:
        assert out.source_map.shape == (3, 17 if way == "mean" else 65)
        assert all(set(row) == set(range(left)) for row in np.asarray(out.source_map))


@pytest.mark.parametrize("way", ["joined", "merged"])
def test_patches_of_every_frame_have_the_positions_of_their_places(way):
    task, params = task_of(f"video.frames_as={way}", "connector.merges=()")
    embedded = {}

    def keep(next_method, args, kwargs, context):
        result = next_method(*args, **kwargs)
        if context.module.name == "embeddings" and context.method_name == "__call__":
            embedded.update(x=args[0], source_map=args[1], result=result)
        return result

    with nn.intercept_methods(keep):
        task.model.apply({"params": params}, CLIPS, method="encode_image")
    own = params["connector"]["embeddings"]
    rows = np.concatenate([own["position"][:1], np.tile(own["position"][1:17], (4, 1))])  # (65, D)
    for row, x in enumerate(np.asarray(embedded["x"])):
        places = rows if way == "joined" else rows[:17].copy()
        if way == "merged":
            source_map = np.asarray(embedded["source_map"])[row]
            places = np.array([rows[source_map == slot].mean(0) for slot in range(17)])
        x = x + places + own["token_type"][0]
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        expected = x * own["norm"]["scale"] + own["norm"]["bias"]
        np.testing.assert_allclose(embedded["result"][row], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("way", "max_frames"), [("mean", 0), ("mean", 6), ("merged", 0)])
def test_a_still_clip_is_its_picture(way, max_frames):
    clip_task, params = task_of(f"video.frames_as={way}", f"video.max_frames={max_frames}")
    picture_task, _ = task_of("data.frames=0")
    stills = CLIPS[:, :1]
    clips, pictures = (
        encode_image(clip_task, params, stills.repeat(4, 1)),
        encode_image(picture_task, params, stills[:, 0]),
    )
    np.testing.assert_allclose(clips.prefix, pictures.prefix, rtol=1e-4, atol=1e-5)
    if way == "merged":
        np.testing.assert_array_equal(clips.source_map[:, -PLACES:], pictures.source_map[:, 1:])


def test_a_permuted_batch_gives_the_permuted_result():
    task, params = task_of("video.frames_as=merged", "video.tokens=24")
    order = np.array([2, 0, 1])
    one, other = encode_image(task, params, CLIPS), encode_image(task, params, CLIPS[order])
    np.testing.assert_allclose(other.prefix, one.prefix[order], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(other.source_map, one.source_map[order])


def test_positions_are_zero_at_first_and_then_tell_a_clip_from_its_reverse():
    flags = ["video.frames_as=merged", "connector.merges=()"]
    (plain, params), (ordered, more) = task_of(*flags), task_of(*flags, "video.max_frames=6")
    assert set(more) - set(params) == {"frame_embedding"} and more["frame_embedding"].shape == (6, 32)
    fresh = nn.unbox(jax.jit(ordered.init)(jax.random.key(0)))["frame_embedding"]
    assert not fresh.any()
    np.testing.assert_allclose(
        encode_image(ordered, {**params, "frame_embedding": fresh}, CLIPS).prefix,
        encode_image(plain, params, CLIPS).prefix,
        rtol=1e-5,
        atol=1e-5,
    )
    forth, back = (encode_image(ordered, more, clips).prefix for clips in (CLIPS, CLIPS[:, ::-1]))
    assert np.abs(forth.mean(1) - back.mean(1)).max() > 1e-3


def test_weights_of_frames_tell_a_clip_from_its_reverse_from_the_start():
    (plain, params), (ordered, more) = task_of(), task_of("video.max_frames=4")
    assert set(more) - set(params) == {"frame_weight"} and more["frame_weight"].shape == (4, 32)
    fresh = nn.unbox(jax.jit(ordered.init)(jax.random.key(0)))["frame_weight"]
    assert 1.6 < fresh.std() < 2.4
    means = encode_image(plain, params, CLIPS), encode_image(plain, params, CLIPS[:, ::-1])
    np.testing.assert_allclose(means[0].prefix, means[1].prefix, rtol=1e-4, atol=1e-4)
    own = {**params, "frame_weight": fresh}
    forth, back = (encode_image(ordered, own, clips).prefix for clips in (CLIPS, CLIPS[:, ::-1]))
    assert np.abs(forth.mean(1) - back.mean(1)).max() > 1e-2


def test_weights_of_another_way_to_know_the_order_are_listed():
    _, params = task_of("video.frames_as=joined", "video.max_frames=4")
    task, _ = task_of("video.max_frames=4")
    shapes = nn.unbox(jax.eval_shape(task.init, jax.random.key(0)))
    with pytest.raises(UserError, match=r"frame_embedding: model has none, weights \(4, 32\)"):
        check_shapes(params, shapes)


def test_frames_are_trained_through_a_frozen_vit_only_where_they_have_to_be():
    trained = {}
    for flags in (
        ["video.frames_as=joined", "video.max_frames=4"],
        ["vit.temporal=True", "video.frames_as=merged"],
        ["video.max_frames=4"],
    ):
        task, params = task_of(*flags)
        trained[flags[0]] = set(partition.split(params, task.is_trained)[0])
        assert task.model.vit_grad == ("vit.temporal=True" in flags)
    assert "frame_embedding" in trained["video.frames_as=joined"] and "vit" not in trained["video.frames_as=joined"]
    assert "frame_weight" in trained["video.max_frames=4"] and "vit" not in trained["video.max_frames=4"]
    assert "vit" in trained["vit.temporal=True"]


def test_sixteen_merged_frames_cost_what_four_averaged_ones_do():
    """Counted after the vision encoder, which sees every frame: joining, connector and language model."""

    def flops(frames: int, way: str) -> int:
        flags = [f"--config.data.frames={frames}", f"--config.video.frames_as={way}"]
        model = build_task(load_config("configs/pretrain_image.py:llm=opt2.7b", flags)).model
        seen = jax.ShapeDtypeStruct((1, frames, 224, 224, 3), jnp.uint8)
        text = jax.ShapeDtypeStruct((1, 14), jnp.int32)
        variables = jax.eval_shape(lambda *x: model.init(jax.random.key(0), *x), seen, text, text)
        whole = count_flops(jax.make_jaxpr(model.apply)(variables, seen, text, text))
        vit = {"params": variables["params"]["vit"]}
        pixels = jax.ShapeDtypeStruct(seen.shape, jnp.float32)
        return whole - count_flops(jax.make_jaxpr(model.vit.apply)(vit, pixels))

    averaged, merged, joined = flops(4, "mean"), flops(16, "merged"), flops(16, "joined")
    assert averaged == flops(16, "mean")
    assert averaged < merged < 1.03 * averaged and joined > 10 * averaged


def test_a_config_without_the_keys_of_video_is_that_of_the_published_way(tmp_path):
    config = load_config("configs/tiny.py", ["--config.vit.temporal=True", "--config.data.frames=4"])
    with config.unlocked():
        del config["video"]
    save_config(config, tmp_path)
    old = read_config(tmp_path)
    assert dict(old.video) == dict(frames_as="mean", tokens=0, max_frames=0) == dict(fill(old).video)
    model = build_task(old).model
    assert model.frames == Frames(4) and not model.max_frames
    params = random_tree(nn.unbox(jax.eval_shape(build_task(old).init, jax.random.key(0))))
    out = model.apply({"params": params}, CLIPS, method="encode_image")
    seen = model.vit.apply({"params": params["vit"]}, model.vit.normalize(CLIPS)).mean(1)
    normed = LayerNorm(1e-5).apply({"params": params["ln_vision"]}, seen)
    expected = model.connector.apply({"params": params["connector"]}, normed)
    np.testing.assert_array_equal(out.connector, expected.tokens)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["video.frames_as=sum"], r"video\.frames_as is 'sum'; it takes 'mean', 'joined', 'pooled', 'merged'"),
        (["video.frames_as=merged", "data.frames=6"], "takes 2, 4, 8, ... frames, and data.frames=6"),
        (["video.frames_as=merged", "video.tokens=15"], "between 16, the patches of a frame, and 64"),
        (["video.frames_as=merged", "video.tokens=65"], "between 16, the patches of a frame, and 64"),
        (["video.frames_as=joined", "data.frames=0"], "is for clips: set data.frames"),
        (["video.frames_as=joined", "video.tokens=20"], "video.tokens is for video.frames_as='merged'"),
        (["data.frames=0", "video.max_frames=4"], r"video\.max_frames is for clips"),
        (["video.frames_as=joined", "video.max_frames=3"], r"data\.frames=4 is more than video\.max_frames=3"),
        (["task=contrastive"], "data.frames is for the tasks caption and scst"),
        (["vit.r=2"], "vit.r is for pictures, and data.frames for clips"),
        (["video.frames_as=joined", "connector.type=pool", "connector.tokens=4", "connector.merges=()"], "one picture"),
    ],
)
def test_what_does_not_fit_is_an_error(flags, message):
    with pytest.raises(UserError, match=message) as error:
        task_of(*flags)
    assert error.value.status == 2


@pytest.mark.parametrize("kind", ["qformer", "mlp", "perceiver"])
@pytest.mark.parametrize("way", ["joined", "merged", "pooled"])
def test_other_connectors_take_the_tokens_of_clips(kind, way):
    task, params = task_of(f"video.frames_as={way}", f"connector.type={kind}")
    out = encode_image(task, params, CLIPS)
    counts = {"joined": 64, "merged": 16, "pooled": 20}
    assert out.prefix.shape[1] == (counts[way] if kind == "mlp" else 32)
    assert np.isfinite(out.prefix).all()


def test_a_sharded_batch_of_clips_merges_without_collectives():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    patches = jax.ShapeDtypeStruct((16, 4, 9, 8), jnp.float32)
    merge = jax.jit(lambda x: merge_frames(x, 12), in_shardings=rows, out_shardings=rows)
    program = merge.lower(patches).compile().as_text()
    assert "dot" in program
    for operation in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert operation not in program
