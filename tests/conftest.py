"""Settings for every test: dtypes never mix and ranks never stretch unasked; pyproject.toml makes warnings errors."""

import jax
import pytest

from squeezejax.command_line import waiting
from squeezejax.online import fallback

# With JAX_ENABLE_X64=1 (.ci/run) whole numbers of 32 and of 64 bits meet, as in the programs of those who set it.
jax.config.update("jax_numpy_dtype_promotion", "standard" if jax.config.jax_enable_x64 else "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def selecting_pays(monkeypatch):
    """Trees in tests are so small that the rule would answer every request densely; test_fallback.py tests the rule."""
    for cost in ("LOOK_UP", "READ_BY_LIST", "OVERHEAD"):
        monkeypatch.setattr(fallback, cost, 0.0)


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """However slow the machine, nothing is said about waiting; test_terminal.py tests what is said."""
    monkeypatch.setattr(waiting, "PATIENCE", float("inf"))


@pytest.fixture(autouse=True, scope="session")
def state_of_the_user(tmp_path_factory):
    """Where the command line keeps its key: not in the folder of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_file():
    """Forgets compiled programs after each file: each takes some 50 memory maps, and the kernel allows 65,530."""
    yield
    jax.clear_caches()
