"""Eight devices on one CPU, so that sharded runs are tested on any machine; set before jax starts."""

import os
import tempfile

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

# The same small programs are compiled again and again.
jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp(prefix="simvlg_jax_compiled_"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture(autouse=True)
def exact_matmuls():
    with jax.default_matmul_precision("highest"):
        yield
