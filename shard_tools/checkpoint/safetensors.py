"""A Hugging Face folder: config.json and one or many .safetensors files, mapped, never read whole."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from shard_tools.checkpoint.source import Row
from shard_tools.errors import CheckpointError

MAX_HEADER_BYTES = 100 << 20  # what the library accepts
MAX_INDEX_BYTES = 64 << 20
MAX_FILE_BYTES = 64 << 20

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_README = "README.md"  # whose front matter says the license
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
_FILES = (  # what a server reads; weights, READMEs and other frameworks' files stay behind
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


class SafetensorsFolder:
    """A Checkpoint in a folder. Raises CheckpointError if the folder is not one whole, unquantised model's."""

    def __init__(self, path: Path) -> None:
        self._path = path
        raw = self._small("config.json")
        if "quantization_config" in _json_map(raw, path / "config.json"):
            raise CheckpointError(
                f"{path} is quantised (config.json has quantization_config): publish the original weights"
            )
        try:
            self._config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except Exception as e:  # what bad files make it raise is no closed set
            raise CheckpointError(f"{path}/config.json is no configuration transformers can use: {e}") from e
        self._open: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        self._table: dict[str, Row] = {}
        self._starts: dict[str, dict[str, int]] = {}  # of a file that was asked for: tensor -> first byte
        self._read_tables()

    @property
    def label(self) -> str:
        return str(self._path)

    @property
    def config(self) -> Any:
        return self._config

    @property
    def license(self) -> str:
        try:
            readme = (self._path / _README).open("rb").read(64 << 10).decode("utf-8", "replace")
        except OSError:
            return ""
        front = readme.split("\n---", 1)[0] if readme.startswith("---") else ""
        found = re.search(r"^license:[ \t]*['\"]?([A-Za-z0-9.+-]{1,64})['\"]?[ \t]*$", front, re.MULTILINE)
        return found.group(1) if found else ""

    @property
    def table(self) -> Mapping[str, Row]:
        return self._table

    def read(self, name: str) -> torch.Tensor:
        try:
            tensor: torch.Tensor = self._open[self._file_of[name]].get_tensor(name)
        except SafetensorError as e:
            raise CheckpointError(f"{self._path / self._file_of[name]}: tensor {name!r} cannot be read: {e}") from e
        return tensor

    def parts(self) -> tuple[str, ...]:
        small = (*_FILES, _README, *(() if (self._path / _SINGLE).exists() else (_INDEX,)))
        return (*(name for name in small if (self._path / name).exists()), *self._open)

    def place(self, name: str) -> tuple[str, int] | None:
        part = self._file_of[name]
        if part not in self._starts:
            self._starts[part] = _starts(self._path / part)
        return part, self._starts[part][name]

    def files(self) -> dict[str, bytes]:
        if not (self._path / "tokenizer.json").exists():
            raise CheckpointError(
                f"{self._path} has no tokenizer.json, without which the model cannot be served. "
                f"Make one: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        return {name: self._small(name) for name in _FILES if (self._path / name).exists()}

    def _read_tables(self) -> None:
        named = self._named_by_index()
        for part in sorted(set(named.values())) or [_SINGLE]:
            try:
                handle: Any = safe_open(self._path / part, framework="pt")
                rows = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118  # not a dict
            except (OSError, SafetensorError) as e:
                raise CheckpointError(f"{self._path / part} is missing, cut short or no safetensors file: {e}") from e
            self._open[part] = handle
            for name, row in rows.items():
                if name in self._table:
                    raise CheckpointError(f"{self._path}: tensor {name!r} is in {self._file_of[name]} and in {part}")
                dtype = row.get_dtype()
                self._table[name] = Row(_DTYPES.get(dtype, dtype), tuple(row.get_shape()))
                self._file_of[name] = part
        for name, part in named.items():
            if self._file_of.get(name) != part:
                raise CheckpointError(f"{self._path}: {_INDEX} says that {name!r} is in {part}; it is not")

    def _named_by_index(self) -> dict[str, str]:
        if (self._path / _SINGLE).exists():
            return {}
        path = self._path / _INDEX
        if not path.exists():
            raise CheckpointError(f"{self._path} has neither {_SINGLE} nor {_INDEX}; other formats are not read")
        weights = _json_map(self._small(_INDEX, MAX_INDEX_BYTES), path).get("weight_map")
        if not isinstance(weights, dict) or not weights:
            raise CheckpointError(f"{path} has no weight_map")
        for name, part in weights.items():
            if not isinstance(part, str) or not _PART.fullmatch(part):
                raise CheckpointError(
                    f"{path}: {name!r} is said to be in {str(part)[:80]!r}, which is no file of this folder"
                )
        return weights

    def _small(self, name: str, limit: int = MAX_FILE_BYTES) -> bytes:
        path = self._path / name
        try:
            with path.open("rb") as f:
                data = f.read(limit + 1)
        except OSError as e:
            raise CheckpointError(f"cannot read {path}: {e.strerror}. A checkpoint folder needs it.") from e
        if len(data) > limit:
            raise CheckpointError(f"{path} is larger than {limit} bytes")
        return data


def _starts(path: Path) -> dict[str, int]:
    """The byte of the file at which each tensor begins. The library, which has opened the file before, does not say."""
    try:
        with path.open("rb") as f:
            size = int.from_bytes(f.read(8), "little")
            if size > MAX_HEADER_BYTES:
                raise CheckpointError(f"{path} has a header of {size} bytes")
            table = _json_map(f.read(size), path)
        return {name: 8 + size + int(row["data_offsets"][0]) for name, row in table.items() if name != "__metadata__"}
    except (OSError, LookupError, TypeError, ValueError) as e:
        raise CheckpointError(f"the header of {path} cannot be read: {type(e).__name__}: {e}") from e


def _json_map(data: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is not JSON: {e}") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value
