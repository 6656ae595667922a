"""Settings of every test."""

from __future__ import annotations

import os

# Tests run two at a time on few cores and never look for an accelerator, nor at the user's cache.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
