"""Settings of every test."""

from __future__ import annotations

import os

# Tests run two at a time on few cores and never look for an accelerator, nor at the user's cache.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Several processes share few cores: BLAS threads that wait for each other make small fits many times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
