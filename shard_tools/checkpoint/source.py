"""The seam between the formats in which models are published and the splitter.

Laws: `table` names what `read` can give; read(name) has exactly the dtype and shape of its row.
Names are the file's own; families.py knows which parameter each of them is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from shard_tools.errors import InputError


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of a checkpoint. dtype: as torch names it, without `torch.`."""

    dtype: str
    shape: tuple[int, ...]


class Checkpoint(Protocol):
    """A model as somebody published it; opening one reads no weights."""

    @property
    def label(self) -> str:
        """What errors call it."""

    @property
    def config(self) -> Any:
        """transformers' PretrainedConfig."""

    @property
    def license(self) -> str:
        """SPDX id as the publisher wrote it, or empty."""

    @property
    def table(self) -> Mapping[str, Row]:
        """Every tensor, by name."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU; nothing else is loaded. Raises CheckpointError."""

    def parts(self) -> tuple[str, ...]:
        """The files of its folder that the model is made of; none where it is no folder."""

    def place(self, name: str) -> tuple[str, int] | None:
        """The file, and the byte of it, at which this tensor's bytes begin as a safetensors file has them; None where
        they stand in no such file.
        """

    def files(self) -> dict[str, bytes]:
        """The small files that a server needs: config, tokenizer, chat template, generation defaults."""


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`: a Hugging Face folder with safetensors, or a .gguf file. Raises InputError."""
    from shard_tools.checkpoint.gguf import GgufFile
    from shard_tools.checkpoint.safetensors import SafetensorsFolder

    if path.is_dir():
        return SafetensorsFolder(path)
    if path.is_file() and path.suffix == ".gguf":
        return GgufFile(path)
    raise InputError(
        f"{path} is no checkpoint: expected a folder with config.json and *.safetensors, or a file ending in .gguf"
    )
