"""Where compiled programs are kept."""

import jax
import pytest

from simvlg_jax.parallel.compile_cache import keep_compiled

NAMES = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture(autouse=True)
def same_settings_afterwards():
    before = {name: getattr(jax.config, name) for name in NAMES}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_the_users_cache_folder(tmp_path, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_compiled()
    first = jax.config.jax_compilation_cache_dir
    assert first.startswith(str(tmp_path / "simvlg_jax" / "compiled-"))
    jax.config.update("jax_compilation_cache_dir", None)
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir == first


def test_a_cache_that_the_user_has_chosen_stays(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    keep_compiled()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)


def test_no_cache_keeps_nothing(tmp_path, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_compiled(False)
    assert jax.config.jax_compilation_cache_dir is None and not jax.config.jax_enable_compilation_cache
