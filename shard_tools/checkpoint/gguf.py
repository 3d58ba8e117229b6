"""A .gguf file, dequantised tensor by tensor to float32.

Configuration, tokenizer, names and the Q/K row order are transformers' own reading of the file, so that the model
served is the model transformers loads; only its loader is not used, since it dequantises everything at once.
Same file, same bytes, given the same versions of transformers and gguf (constraints.txt pins them).
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from shard_tools.checkpoint.families import meta_model
from shard_tools.checkpoint.source import Row
from shard_tools.errors import CheckpointError, InputError

_READ = frozenset(  # architectures whose tensors map one to one; the others merge or split experts or layers
    ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "stablelm", "starcoder2", "nemotron")
)
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class GgufFile:
    """A Checkpoint in one .gguf file. Raises CheckpointError if it is not a whole model of a known architecture."""

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as e:
            raise InputError("reading .gguf files needs the package gguf: pip install 'llm-d[gguf]'") from e
        self._path = path
        try:
            self._reader = GGUFReader(path)
            self._arch = str(self._field("general.architecture") or "")
        except Exception as e:  # what bad files make it raise is no closed set
            raise CheckpointError(f"{path} is cut short or no GGUF file: {e}") from e
        if self._arch not in _READ:
            raise CheckpointError(
                f"{path} is of architecture {self._arch[:80]!r}; those read are {', '.join(sorted(_READ))}. "
                f"Publish the safetensors folder of this model instead."
            )
        try:
            self._config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        except Exception as e:  # what bad files make it raise is no closed set
            raise CheckpointError(f"transformers cannot read the metadata of {path}: {e}") from e
        self._processor = TENSOR_PROCESSORS.get(self._arch, TensorProcessor)(config=self._config.to_dict())
        self._names = _names(self._arch, self._config)
        self._tensors = self._by_name()
        self._table = {name: Row("float32", self._shape(name)) for name in self._tensors}

    @property
    def label(self) -> str:
        return str(self._path)

    @property
    def config(self) -> Any:
        return self._config

    @property
    def license(self) -> str:
        said = str(self._field("general.license") or "")
        return said if re.fullmatch(r"[A-Za-z0-9.+-]{1,64}", said) else ""

    @property
    def table(self) -> Mapping[str, Row]:
        return self._table

    def read(self, name: str) -> torch.Tensor:
        from gguf import dequantize

        raw = self._tensors[name]
        try:
            values = dequantize(raw.data, raw.tensor_type)
        except (NotImplementedError, ValueError) as e:
            raise CheckpointError(f"{self._path}: tensor {raw.name!r} cannot be dequantised: {e}") from e
        result = self._processor.process(weights=values, name=raw.name)
        if result.name != raw.name:
            raise CheckpointError(f"{self._path}: tensor {raw.name!r} is not one parameter of its own")
        return torch.from_numpy(np.array(result.weights, dtype=np.float32, order="C"))  # a copy: the file is mapped

    def parts(self) -> tuple[str, ...]:
        return ()

    def place(self, name: str) -> tuple[str, int] | None:
        return None

    def files(self) -> dict[str, bytes]:
        out = self._tokenizer_files()
        config = self._config.to_dict()
        for key in ("transformers_version", "_name_or_path"):  # say how it was read, not what it is
            config.pop(key, None)
        config["dtype"] = "float32"
        config["architectures"] = [type(meta_model(self._config)).__name__]
        out["config.json"] = _json(config)
        ids = {
            key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None
        }
        out["generation_config.json"] = _json(ids)
        return out

    def _tokenizer_files(self) -> dict[str, bytes]:
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self._path.parent, gguf_file=self._path.name, local_files_only=True
            )
        except Exception as e:  # what bad files make it raise is no closed set
            raise CheckpointError(f"transformers cannot read the tokenizer of {self._path}: {e}") from e
        with tempfile.TemporaryDirectory() as directory:
            tokenizer.save_pretrained(directory)
            out = {"tokenizer.json": (Path(directory) / "tokenizer.json").read_bytes()}
        special = {key: str(value) for key in _SPECIAL if (value := getattr(tokenizer, key, None)) is not None}
        out["tokenizer_config.json"] = _json(
            special
            | {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": int(self._config.max_position_embeddings),
                "clean_up_tokenization_spaces": False,
            }
        )
        if isinstance(tokenizer.chat_template, str):
            out["chat_template.jinja"] = tokenizer.chat_template.encode()
        return out

    def _by_name(self) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for tensor in self._reader.tensors:
            name = self._names.get(tensor.name, tensor.name)
            if name in out:
                raise CheckpointError(f"{self._path}: two tensors are {name!r}")
            if tensor.name != "rope_freqs.weight":  # follows from the configuration, which transformers reads
                out[name] = tensor
        return out

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def _field(self, name: str) -> object:
        field = self._reader.fields.get(name)
        return None if field is None else field.contents()


def _names(arch: str, config: Any) -> dict[str, str]:
    """The parameter of each GGUF tensor name, by the gguf package's table of this architecture."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    state = meta_model(config).state_dict()  # first: it refuses absurd numbers of layers
    known = {text: arch for arch, text in MODEL_ARCH_NAMES.items()}
    table = get_tensor_name_map(known[arch], int(config.num_hidden_layers))
    out = {}
    for name in state:
        stem, _, suffix = name.rpartition(".")
        found = table.get_name(stem)
        if found is not None:
            out[f"{found}.{suffix}"] = name
    return out


def _json(value: object) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=True).encode() + b"\n"
