"""Scores of each group of records, such as the domains of NoCaps."""

from collections.abc import Callable

from simvlg_jax.utils.errors import warn

MOST = 64  # groups; a column with more values does not name groups


def by_group(examples: list[dict], scores: Callable[[list[dict]], dict[str, float]]) -> dict[str, dict]:
    """Returns {"groups": {name: its scores and "num_examples"}}, or {} if the examples have no group.

    A group is scored on its own, as NoCaps' official evaluation does: for CIDEr, the document frequencies are those of
    the group's references. Warns and returns {} if there are more than MOST groups.

    Args:
      examples: those that can be scored, with "group" if the record has one.
      scores: examples -> scores by name.
    """
    members: dict[str, list[dict]] = {}
    for example in examples:
        if "group" in example:
            members.setdefault(example["group"], []).append(example)
    if len(members) > MOST:
        warn(f"the records have {len(members)} groups, more than {MOST}, which are not scored one by one")
        return {}
    groups = {name: {**scores(own), "num_examples": len(own)} for name, own in sorted(members.items())}
    return {"groups": groups} if groups else {}
