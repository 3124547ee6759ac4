"""Settings for every test: dtypes never mix and ranks never stretch unasked; pyproject.toml makes warnings errors."""

import jax

jax.config.update("jax_enable_x64", False)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
