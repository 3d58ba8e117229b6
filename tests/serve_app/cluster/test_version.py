"""What makes another version of the application, and how its actors are told from those of others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml

from serve_app.cluster.audit_specs import AUDITOR
from serve_app.cluster.specs import GroupId, is_supervisor, supervisor_name
from serve_app.cluster.version import version_of
from serve_app.config import AppConfig, config_path

ARGS = yaml.safe_load(config_path(None).read_text())["applications"][0]["args"]


def changed(group: str, **keys: Any) -> AppConfig:
    args = copy.deepcopy(ARGS)
    args[group] |= keys
    return AppConfig.parse(args)


@pytest.mark.parametrize(
    ("group", "keys"),
    [("model", {"manifest": "bafy"}), ("pipeline", {"stages": 3}), ("identity", {"session_lifetime_s": 600})],
)
def test_another_model_pipeline_or_identity_is_another_version(group: str, keys: dict[str, Any]) -> None:
    assert version_of(changed(group, **keys)) != version_of(AppConfig.parse(ARGS))


def test_what_only_ingresses_look_at_keeps_the_pipeline() -> None:
    assert version_of(changed("ingress", replicas=7, drain_s=5.0)) == version_of(AppConfig.parse(ARGS))


def test_more_pipelines_or_fewer_restart_none() -> None:
    assert version_of(changed("pipeline", replicas=4)) == version_of(AppConfig.parse(ARGS))


def test_names_say_whose_an_actor_is() -> None:
    version = version_of(AppConfig.parse(ARGS))
    group = GroupId(version, 3, 17)
    assert GroupId.of(str(group)) == GroupId.of(group.actor("stage-1", 18)) == group
    for digits in (version, "0123456789"):
        assert GroupId.of(supervisor_name(digits)) is None and is_supervisor(supervisor_name(digits))
    names = ("llmd", "other-1-2-3", "llmd-x-y", "llmd-x-1", "llmd-x-1-y", AUDITOR, "")
    assert all(GroupId.of(name) is None and not is_supervisor(name) for name in names)
    assert GroupId(version, 0, 9) < GroupId(version, 0, 10)
