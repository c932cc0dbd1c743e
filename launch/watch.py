"""The verbs that last: waiting for a slice, and keeping a run going on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NoReturn

from keys import fail, say
from slices import READY, Slice

PREEMPTED = ("SUSPENDED", "PREEMPTED", "TERMINATED")
DEAD = (*PREEMPTED, "SUSPENDING", "FAILED", "STOPPED", "ABSENT")


def create(a_slice: Slice) -> None:
    if a_slice.state(expected="ABSENT") == "ABSENT":
        a_slice.request()
    else:
        say(f"{a_slice.keys.NAME} exists already")
    before = None
    while (state := a_slice.state()) not in READY:
        if state != before:
            tell_time(a_slice, state)
        if state in DEAD:
            give_up(a_slice, state)
        before = state
        time.sleep(float(a_slice.keys.POLL))
    tell_time(a_slice, state)


def tell_time(a_slice: Slice, text: str) -> None:
    a_slice.tell(f"{time.strftime('%T')} {a_slice.keys.NAME}: {text}")


def run(a_slice: Slice) -> None:
    a_slice.check_shared()
    a_slice.check_idle()
    a_slice.start()
    if a_slice.keys.WATCH == "yes":
        watch(a_slice)
    elif a_slice.keys.FOLLOW == "yes":
        a_slice.logs()


def watch(a_slice: Slice) -> None:
    """Stays until the run ends, and brings the slice step by step back to where it trains.

    A spot slice that was preempted is deleted, and requested again once it is gone. What is new or was rebooted is set
    up and started. Training resumes from its last checkpoint.
    """
    keys, spot = a_slice.keys, a_slice.keys.KIND == "spot"
    a_slice.tell(f"watching every {keys.POLL} s; Ctrl-C leaves the run going, without a watch")
    before, deleted, failures = None, False, 0
    while failures < 10:
        state, result, errors = look(a_slice)
        if (state, result) != before:
            tell_time(a_slice, f"{state}, the run: {result}\n{errors}".rstrip())
        before = state, result
        worked = True
        if keys.dry_run:
            attempt(*[a_slice.delete, a_slice.request] * spot, a_slice.setup, a_slice.start)
            return
        if result == "done":
            return
        if result in ("wrong", "failed", "stopped"):
            fail(f"the run ended: {result}; why: bash launch/tpu.sh logs FOLLOW=no, what still goes on: status, stop")
        elif result == "running":
            failures = 0
        elif result in ("none", "terminated"):
            worked = attempt(a_slice.setup, a_slice.start)
        elif state in (*PREEMPTED, "FAILED") and spot:
            if state == "FAILED":
                a_slice.tell_why()
            worked = attempt(a_slice.delete)
            deleted = deleted or worked
            worked = worked and state != "FAILED"  # the next request may fail as well
        elif state == "ABSENT" and deleted:
            worked = attempt(a_slice.request)
            deleted = not worked
        elif state in (*PREEMPTED, "FAILED", "STOPPED", "ABSENT"):
            give_up(a_slice, state)  # what somebody else has deleted must not be paid for again
        elif state in (*READY, "UNKNOWN"):
            worked = False
        failures += not worked
        time.sleep(float(keys.POLL) * (1 + failures))  # ever longer, to outlast an outage of some minutes
    fail(f"gave up after {failures} failures in a row (see above)")


def look(a_slice: Slice) -> tuple[str, str, str]:
    """The slice's state, the run's result, and what gcloud has said if the result is unknown."""
    try:
        state = a_slice.state()
        result, errors = a_slice.result() if state in READY else ("unknown", "")
    except SystemExit:  # gcloud could not tell
        return "UNKNOWN", "unknown", ""
    return ("PREEMPTED" if result == "preempted" else state), result, errors


def attempt(*steps: Callable[[], None]) -> bool:
    try:
        for step in steps:
            step()
    except SystemExit:  # what fails now may work at the next look
        return False
    return True


def give_up(a_slice: Slice, state: str) -> NoReturn:
    name = a_slice.keys.NAME
    if state == "ABSENT":
        fail(f"{name} is not there any more")
    a_slice.tell_why()
    if state == "FAILED":
        fail(f"{name} is FAILED: the request could not be met. Delete it and ask again: bash launch/tpu.sh delete")
    fail(f"{name} is {state}: it was preempted or stopped and does not come back. Delete it and create it again")
