"""Keeps compiled programs between commands, in the user's cache folder."""

import hashlib
import os
import platform
from pathlib import Path

import jax

MAX_BYTES = 2**30  # the programs that were used last stay


def keep_compiled(keep: bool = True) -> None:
    """Lets JAX keep the programs that take longer than half a second to compile, and find them the next time.

    JAX finds a program again if it, its options, the devices and the versions of JAX are the same.

    A cache that the user has chosen (`JAX_COMPILATION_CACHE_DIR`) stays. Programs for a CPU use its instructions, so
    each kind of CPU has a folder of its own: a home folder may be on a disk that several machines share.

    Args:
      keep: False for --no_cache: every program is compiled anew, and none is kept.
    """
    if not keep:
        jax.config.update("jax_enable_compilation_cache", False)
    if not keep or jax.config.jax_compilation_cache_dir:
        return
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(base / "simvlg_jax" / f"compiled-{_machine()}"))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _machine() -> str:
    """Names the kind of CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    except OSError:
        flags = platform.processor()
    return hashlib.sha256(f"{platform.machine()} {flags}".encode()).hexdigest()[:12]
