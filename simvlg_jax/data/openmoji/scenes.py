"""Draws scenes, and divides them into splits that share no clip, one of them with unseen combinations."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from simvlg_jax.data.openmoji.motions import FRAMES, MOTIONS, Event, Pose, Scene
from simvlg_jax.data.openmoji.splits import fraction

SIDE = 64  # pixels of a frame
SPLITS = ("train", "val", "test", "unseen")
# Names in the training split of the pictures. All are singular and can be counted, and none looks alike when turned.
THINGS = (
    *("spider", "whale", "dog", "fish", "mouse", "eagle", "pig", "bird", "crab", "elephant", "snail", "rooster"),
    *("parrot", "shark", "lobster", "goat", "cat", "duck", "tiger", "cow", "butterfly", "scorpion", "snake", "horse"),
    *("goose", "frog", "zebra", "swan", "fox", "giraffe", "camel", "dolphin", "penguin", "kangaroo", "turtle", "owl"),
    *("mango", "birthday cake", "strawberry", "green apple", "red apple", "lemon", "carrot", "pear", "pineapple"),
    *("banana", "cupcake", "taco", "ambulance", "sailboat", "rocket", "bicycle", "tractor", "fire engine"),
    *("police car", "skateboard", "top hat", "backpack", "high-heeled shoe", "running shoe", "crown", "t-shirt"),
    *("key", "rose", "alarm clock", "umbrella", "guitar", "trumpet", "hammer", "bell", "candle", "chair", "teapot"),
    *("anchor", "camera", "light bulb", "magnet", "cactus", "trophy", "ghost", "castle", "house", "mushroom"),
)
FAMILIES = ("sideways", "up and down", "size", "turn", "presence")
# Kind of scene -> how many of 20 scenes; a thing has one family that is held out, so not two unseen motions in a scene.
KINDS = {"one": 10, "still": 1, "two things": 5, "two motions": 4}
UNSEEN_KINDS = {"one": 2, "two things": 1}
CHANGES = {"sideways": "x", "up and down": "y", "size": "size", "turn": "angle"}  # family -> attribute of a pose
MARGIN = 3  # pixels by which the ends of a path differ
LARGEST_MOVING = 38  # pixels, so that there is room to move
NEAR_MIDDLE = 3  # frames from the middle of a clip at which a thing appears or vanishes, in a clip of two events
TURNED = 0.75  # size of a thing that turns, of what fits where it is


class Area(NamedTuple):
    """A rectangle of the frame in which a thing stays, in pixels."""

    left: int
    top: int
    right: int
    bottom: int


WHOLE = Area(0, 0, SIDE, SIDE)
ROWS = (Area(0, 0, SIDE, SIDE // 2), Area(0, SIDE // 2, SIDE, SIDE))
COLUMNS = (Area(0, 0, SIDE // 2, SIDE), Area(SIDE // 2, 0, SIDE, SIDE))


def held_out(thing: str) -> str:
    """The family of motions that the thing has in the split "unseen", and in no other."""
    return FAMILIES[int(fraction(f"clip {thing}") * len(FAMILIES))]


def divide(counts: Mapping[str, int], seed: int) -> dict[str, list[Scene]]:
    """Draws so many scenes of each split. No scene occurs twice, nor does the reverse of another one.

    The number of training scenes, which are drawn last, does not change those of the other splits.
    """
    taken: set[Scene] = set()
    scenes = {}
    for split in reversed(SPLITS):
        drawn = _draw_all(np.random.default_rng([seed, SPLITS.index(split)]), split == "unseen")
        scenes[split] = found = []
        while len(found) < counts[split]:
            scene = next(drawn)
            if scene not in taken:
                taken |= {scene, scene.reverse()}
                found.append(scene)
    return {split: scenes[split] for split in SPLITS}


def _draw_all(rng: np.random.Generator, unseen: bool) -> Iterator[Scene]:
    weights = UNSEEN_KINDS if unseen else KINDS
    kinds = [kind for kind, weight in weights.items() for _ in range(weight)]
    while True:
        kind = _one_of(rng, kinds)
        things = [str(thing) for thing in rng.choice(THINGS, 2, replace=False)]
        families = [[name for name in FAMILIES if (name == held_out(thing)) == unseen] for thing in things]
        if kind == "two things":
            motions = [_motion(rng, _one_of(rng, names)) for names in families]
            areas = _areas(rng, {MOTIONS[motion].family for motion in motions})
            if areas:
                parts = enumerate(zip(things, motions, areas, strict=True))
                yield Scene(tuple(_events(rng, thing, [own], area, n, 2)[0] for n, (thing, own, area) in parts))
            continue
        count = 2 if kind == "two motions" else 1
        chosen = ["still"] if kind == "still" else rng.choice(families[0], count, replace=False).tolist()
        yield Scene(tuple(_events(rng, things[0], [_motion(rng, name) for name in chosen], WHOLE, 0, count)))


def _one_of(rng: np.random.Generator, names: Sequence[str]) -> str:
    return names[int(rng.integers(len(names)))]


def _motion(rng: np.random.Generator, family: str) -> str:
    return _one_of(rng, [name for name, motion in MOTIONS.items() if motion.family == family])


def _areas(rng: np.random.Generator, families: set[str]) -> Sequence[Area] | None:
    """Two areas in which things have room for these motions, in random order; None if there are none."""
    if {"sideways", "up and down"} <= families:
        return None
    rows = "sideways" in families or ("up and down" not in families and rng.random() < 0.5)
    areas = ROWS if rows else COLUMNS
    return areas if rng.random() < 0.5 else areas[::-1]


def _events(
    rng: np.random.Generator, thing: str, motions: Sequence[str], area: Area, first: int, count: int
) -> list[Event]:
    """What one thing does, one motion after the other, of different families.

    Paths, sizes and angles are drawn whatever the directions are: the order of the frames alone shows a direction.

    Args:
      first: number of the first motion among the events of the clip.
      count: events of the clip.
    """
    families = [MOTIONS[motion].family for motion in motions]
    moves = "sideways" in families or "up and down" in families
    room = min(area.right - area.left, area.bottom - area.top, LARGEST_MOVING if moves else SIDE)
    extent = int(rng.integers(round(0.8 * room), room + 1))
    large = round(TURNED * extent) if "turn" in families else extent
    small = round(large * rng.uniform(0.35, 0.5))
    middle, swing = int(rng.integers(-30, 31)), int(rng.integers(50, 76))
    ends = {
        "x": _ends(rng, area.left, area.right, extent, "sideways" in families),
        "y": _ends(rng, area.top, area.bottom, extent, "up and down" in families),
        "size": (small, large) if "size" in families else (large, large),
        "angle": (middle - swing, middle + swing) if "turn" in families else (0, 0),
    }
    # Which of its ends each attribute is at: the one where its motion starts.
    at = dict.fromkeys(ends, 0)
    for motion, family in zip(motions, families, strict=True):
        if family in CHANGES and motion != _first_of(family):
            at[CHANGES[family]] = 1
    events = []
    for number, (motion, family) in enumerate(zip(motions, families, strict=True), first):
        start, switch = Pose(*(ends[name][at[name]] for name in ends)), 0
        if family in CHANGES:
            at[CHANGES[family]] ^= 1
        end = Pose(*(ends[name][at[name]] for name in ends))
        if family == "presence":
            start, end = (None, end) if motion == "appear" else (start, None)
            switch = _switch(rng, number, count)
        events.append(Event(thing, motion, start, end, switch))
    return events


def _first_of(family: str) -> str:
    return next(name for name, motion in MOTIONS.items() if motion.family == family)


def _ends(rng: np.random.Generator, low: int, high: int, extent: int, moves: bool) -> tuple[int, int]:
    """The centre at both ends of its path: far apart, or equal, with the whole thing between `low` and `high`."""
    low, high = low + -(-extent // 2), high - -(-extent // 2)
    if moves:
        return low + int(rng.integers(MARGIN + 1)), high - int(rng.integers(MARGIN + 1))
    place = int(rng.integers(low, high + 1))
    return place, place


def _switch(rng: np.random.Generator, number: int, count: int) -> int:
    """The frame of event `number` from which on a thing is there, or is gone.

    Of two events it is near the middle of the clip. Then most of a half shows that the thing is not there yet, or the
    whole other half that it is, whichever frames are sampled.
    """
    if count == 1:
        return int(rng.integers(FRAMES // 3, FRAMES - FRAMES // 3 + 1))
    return FRAMES // 2 - NEAR_MIDDLE if number == 0 else NEAR_MIDDLE
