"""The KEY=VALUE arguments of tpu.py and gpu.py, and how both report errors. Needs Python 3.8 and no package."""

from __future__ import annotations

import os
import re
import sys
from types import SimpleNamespace
from typing import NamedTuple, NoReturn


class Key(NamedTuple):
    default: str
    meaning: str
    pattern: str = ".*"  # of the whole value


class Keys(SimpleNamespace):
    """Each key's value as an attribute: from the arguments, else from the environment, else the default."""

    def __init__(self, known: dict[str, Key], arguments: list[str]):
        self.given, self.dry_run = {}, "--dry-run" in arguments
        for argument in arguments:
            name, equals, value = argument.partition("=")
            if equals and name in known:
                self.given[name] = value
            elif equals:
                misuse(f"unknown key '{name}'; known are: {' '.join(known)}")
            elif argument != "--dry-run":
                misuse(f"'{argument}' is no KEY=VALUE")
        for name, (default, meaning, pattern) in known.items():
            setattr(self, name, self.given.get(name, os.environ.get(name) or default))
            if not re.fullmatch(pattern, getattr(self, name), re.DOTALL):
                self.refuse(name, meaning)

    def refuse(self, name: str, reason: str) -> NoReturn:
        value = getattr(self, name)
        # Other programs set such variables too: NAME is the host's name on WSL.
        origin = "" if name in self.given else " (from the environment)"
        misuse(f"{name} cannot be '{value}'{origin}: {reason}" if value else f"{name} is missing: {reason}")


def show_usage(text: str, known: dict[str, Key], arguments: list[str]) -> None:
    """Ends the program if its arguments ask for it, or if there are none."""
    if not arguments or arguments[0] in ("help", "-h", "--help"):
        lines = [f"  {name:15}{key.meaning}" + f" [{key.default}]" * bool(key.default) for name, key in known.items()]
        lines = [text.strip(), "", "Keys, each also read from the environment [default]:", *lines]
        print("\n".join(lines), file=sys.stdout if arguments else sys.stderr)
        sys.exit(0 if arguments else 2)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def fail(message: str, status: int = 1) -> NoReturn:
    say(f"error: {message}")
    sys.exit(status)


def misuse(message: str) -> NoReturn:
    fail(message, status=2)
