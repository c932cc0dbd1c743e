"""What happens in a clip: the poses of its things in every frame, its caption, and the same in reverse."""

import hashlib
from dataclasses import dataclass, replace
from typing import NamedTuple

FRAMES = 20  # of a clip, an even number so that two events last equally long


class Motion(NamedTuple):
    """What a thing can do.

    Attributes:
      words: "moves to the left".
      opposite: the motion that it is in reverse.
      family: both belong to it.
    """

    words: str
    opposite: str
    family: str


MOTIONS = {
    "right": Motion("moves to the right", "left", "sideways"),
    "left": Motion("moves to the left", "right", "sideways"),
    "down": Motion("moves down", "up", "up and down"),
    "up": Motion("moves up", "down", "up and down"),
    "grow": Motion("grows", "shrink", "size"),
    "shrink": Motion("shrinks", "grow", "size"),
    "clockwise": Motion("turns clockwise", "counterclockwise", "turn"),
    "counterclockwise": Motion("turns counterclockwise", "clockwise", "turn"),
    "appear": Motion("appears", "vanish", "presence"),
    "vanish": Motion("vanishes", "appear", "presence"),
    "still": Motion("stays still", "still", "still"),
}


class Pose(NamedTuple):
    """How a thing is drawn: centre (x to the right, y down) and side in pixels, angle in degrees clockwise."""

    x: int
    y: int
    size: int
    angle: int = 0


@dataclass(frozen=True)
class Event:
    """One thing and its motion.

    Attributes:
      start, end: None if the thing is not there.
      switch: of "appear" and "vanish", the frame of the event from which on the thing is as in the end.
    """

    thing: str
    motion: str
    start: Pose | None
    end: Pose | None
    switch: int = 0

    def at(self, frame: int, frames: int) -> Pose | None:
        """The pose in one of the frames of the event, the same as in frame `frames - 1 - frame` of the reverse."""
        if self.start is None or self.end is None:
            return self.start if frame < self.switch else self.end
        last = frames - 1  # sums of whole numbers, so that the reverse is exact
        pairs = zip(self.start, self.end, strict=True)
        return Pose(*(round((a * (last - frame) + b * frame) / last) for a, b in pairs))


@dataclass(frozen=True)
class Scene:
    """One event, or two one after the other, which share the frames of the clip. Both may be of the same thing."""

    events: tuple[Event, ...]

    @property
    def id(self) -> str:
        """Names the motions, and the whole scene by a hash."""
        digest = hashlib.sha256(repr((FRAMES, self)).encode()).hexdigest()[:12]
        return "-".join([*(event.motion for event in self.events), digest])

    @property
    def group(self) -> str:
        """The family of a single motion, or how two events belong together."""
        if len(self.events) == 1:
            return MOTIONS[self.events[0].motion].family
        return "two motions" if len({event.thing for event in self.events}) == 1 else "two things"

    def caption(self) -> str:
        """The sentence that is true of the clip: "a clock shrinks, then a crown appears"."""
        parts, before = [], None
        for event in self.events:
            who = "it" if event.thing == before else with_article(event.thing)
            parts.append(f"{who} {MOTIONS[event.motion].words}")
            before = event.thing
        return ", then ".join(parts)

    def reverse(self) -> "Scene":
        """The scene whose frames are the same in reverse order."""
        length = FRAMES // len(self.events)

        def turned(event: Event) -> Event:
            switch = length - event.switch if event.switch else 0
            opposite = MOTIONS[event.motion].opposite
            return replace(event, motion=opposite, start=event.end, end=event.start, switch=switch)

        return Scene(tuple(turned(event) for event in reversed(self.events)))

    def at(self, frame: int) -> list[tuple[str, Pose]]:
        """The things that are there in a frame, 0 to FRAMES - 1, with their poses."""
        length = FRAMES // len(self.events)
        now, inner = divmod(frame, length)
        poses: dict[str, Pose | None] = {}
        for place, event in enumerate(self.events):
            if place == now:
                poses[event.thing] = event.at(inner, length)
            elif place < now:
                poses[event.thing] = event.end
            else:
                poses.setdefault(event.thing, event.start)
        return [(thing, pose) for thing, pose in sorted(poses.items()) if pose is not None]


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
