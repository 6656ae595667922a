"""The released sizes and the wind-tunnel family, as data.

Released: config.json of the openbmb repositories (widths and counts: paper, Table 2). Wind tunnel: paper, Table 8,
heads of width 64 throughout; their vocabulary is the one of MiniCPM-2B.
"""

from __future__ import annotations

from typing import Any

_2B = {"vocabulary": 122753, "width": 2304, "feed_forward": 5760, "layers": 40, "heads": 36, "context": 4096}
_1B = {"vocabulary": 73440, "width": 1536, "feed_forward": 3840, "layers": 52, "heads": 24, "kv_heads": 8}


def _wind_tunnel(width: int, feed_forward: int, heads: int, layers: int) -> dict[str, Any]:
    return {"vocabulary": 122753, "width": width, "feed_forward": feed_forward, "heads": heads, "layers": layers}


PRESETS: dict[str, dict[str, Any]] = {
    "minicpm-2b": _2B,
    "minicpm-1b": _1B,
    "minicpm-2b-128k": _2B
    | {"vocabulary": 122760, "context": 65536, "tied": False}
    | {"rope_theta": 1e6, "rope_scaling": "dynamic", "rope_factor": 4.0},
    "tunnel-9m": _wind_tunnel(320, 800, 5, 8),
    "tunnel-30m": _wind_tunnel(512, 1280, 8, 12),
    "tunnel-70m": _wind_tunnel(640, 1600, 10, 14),
    "tunnel-0.1b": _wind_tunnel(768, 1920, 12, 16),
    "tunnel-0.17b": _wind_tunnel(896, 2240, 14, 18),
    "tunnel-0.2b": _wind_tunnel(1024, 2560, 16, 20),
    "tunnel-0.5b": _wind_tunnel(1344, 3360, 21, 24),
}
