"""What `build` refuses before Serve makes anything of it; no Ray runs here."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from serve_app.cluster.application import build
from serve_app.config import config_path
from serve_app.errors import ConfigError


def args() -> dict[str, object]:
    """The args of the documented example."""
    return dict(yaml.safe_load(config_path(None).read_text())["applications"][0]["args"])


def test_the_documented_example_builds() -> None:
    assert build(args()) is not None


def test_an_unknown_key_is_refused_by_raw_serve_run_too() -> None:
    """Serve itself would take it in silence; the message names the nearest known key."""
    wrong = args() | {"pipeline": {"stagez": 2}}
    with pytest.raises(ConfigError, match="stages"):
        build(wrong)


def test_ingress_supervisor_and_head_need_no_torch() -> None:
    """Only stages compute: seconds of import and 300 MB of memory spared in every other process."""
    code = (
        "import serve_app.cluster.application, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
