"""serve_keys.SERVE_KEYS is what Ray Serve really reads. Run as a program, this file prints another Ray's table."""

from __future__ import annotations

import json
import typing
from typing import Any

import pytest
from pydantic import BaseModel

from serve_app.serve_keys import SERVE_KEYS


def model_in(hint: Any) -> type[BaseModel] | None:
    """The pydantic model in a type hint, through lists and alternatives."""
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return hint
    return next((found for found in map(model_in, typing.get_args(hint)) if found), None)


def table_of(model: type[BaseModel]) -> dict[str, Any]:
    """The keys of a pydantic model, as serve_keys writes them."""
    below = {name: model_in(field.annotation) for name, field in model.model_fields.items()}
    return {name: table_of(found) if found else None for name, found in below.items()}


def test_the_table_is_the_schema_of_the_installed_ray() -> None:
    schema = pytest.importorskip("ray.serve.schema")
    assert table_of(schema.ServeDeploySchema) == SERVE_KEYS


def test_serves_default_host_and_port_are_the_ones_we_assume() -> None:
    schema = pytest.importorskip("ray.serve.schema")
    from serve_app.serve_file import SERVE_DEFAULT_HOST, SERVE_DEFAULT_PORT

    options = schema.HTTPOptionsSchema()
    assert (options.host, options.port) == (SERVE_DEFAULT_HOST, SERVE_DEFAULT_PORT)


if __name__ == "__main__":
    from ray.serve.schema import ServeDeploySchema

    print(json.dumps(table_of(ServeDeploySchema), indent=4))
