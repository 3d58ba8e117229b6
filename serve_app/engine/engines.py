"""The engines that a config can name; packages add others in the entry-point group `llmd.engines`.

A factory is called with (store, manifest, start, stop, options) and the config's own options as keyword arguments, and
returns an Engine of layers [start, stop) that has read no tensor of other layers. `options` is load.LoadOptions: what
of it an engine cannot do it must refuse with a ConfigError. Imports no torch: a config is checked without it.
"""

from __future__ import annotations

from serve_app.engine.engine import Engine
from shard_tools.choice import Choice, Table

ENGINES = Table(
    "engine",
    "llmd.engines",
    Engine,
    {
        "auto": "serve_app.engine.load:load_fastest",
        "torch": "serve_app.engine.load:load_plain",
        "cpu": "serve_app.engine.load:load_cpu",
        "gpu": "serve_app.engine.load:load_gpu",
    },
)

AUTO, TORCH = Choice("auto"), Choice("torch")
