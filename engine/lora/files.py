"""The tensors of an adapter's directory: adapter_model.safetensors, or adapter_model.bin by torch's own safe reader.

Headers come from strangers, and whoever trains may write a file anew while it is read: sizes are those that the file
has, nothing is mapped, and whatever is wrong is an AdapterError.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.config import StartupError
from engine.lora.words import AdapterError
from engine.models.loading.checkpoint import FLOATS, StoredTensor, read_header
from engine.models.loading.weights import TORCH_DTYPES

SAFETENSORS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
MAX_TENSORS = 1_000_000


class Tensors:
    """Of one adapter, by the names in its file. adapter: what it is called in errors."""

    def __init__(self, directory: Path, adapter: str) -> None:
        self._adapter = adapter
        self._stored: Mapping[str, StoredTensor] = {}
        self._loaded: Mapping[str, Tensor] = {}
        if (directory / SAFETENSORS).is_file():
            try:
                self._stored = read_header(directory / SAFETENSORS)
            except StartupError as error:
                raise AdapterError(f"adapter {adapter}: {_without_folder(error, directory)}") from None
        elif (directory / PICKLED).is_file():
            self._loaded = self._read_pickled(directory / PICKLED)
        else:
            raise AdapterError(f"adapter {adapter}: holds neither {SAFETENSORS} nor {PICKLED}")
        if not self.names:
            raise AdapterError(f"adapter {adapter}: has no tensors")
        if len(self.names) > MAX_TENSORS:
            raise AdapterError(f"adapter {adapter}: has {len(self.names)} tensors, more than {MAX_TENSORS}")

    @property
    def names(self) -> list[str]:
        return list(self._stored or self._loaded)

    def fail(self, name: str, reason: str) -> AdapterError:
        """The one line for a tensor."""
        shown = name if len(name) <= 200 else name[:197] + "..."
        return AdapterError(f"adapter {self._adapter}: tensor {shown!r}: {reason}")

    def shape(self, name: str) -> tuple[int, ...]:
        """Before it is read."""
        return self._stored[name].shape if self._stored else tuple(self._loaded[name].shape)

    def get(self, name: str) -> Tensor:
        """float32, in its shape; all numbers are finite. Raises AdapterError."""
        value = self._read(name, self._stored[name]) if self._stored else self._loaded[name].detach()
        wide = value.to(torch.float32).contiguous()
        if not bool(wide.isfinite().all()):
            raise self.fail(name, "has a number that is not finite")
        return wide

    def _read(self, name: str, stored: StoredTensor) -> Tensor:
        if stored.dtype not in FLOATS:
            raise self.fail(name, f"its dtype {stored.dtype} is none of {', '.join(FLOATS)}")
        dtype = TORCH_DTYPES[stored.dtype]
        try:
            with stored.file.open("rb") as file:
                file.seek(stored.begin)
                content = file.read(stored.end - stored.begin)
        except OSError as error:
            raise self.fail(name, f"cannot be read: {error.strerror}") from None
        if len(content) != math.prod(stored.shape) * dtype.itemsize:
            raise self.fail(name, "the file has been cut off while it was read")
        if not content:
            return torch.empty(stored.shape, dtype=dtype)
        return torch.from_numpy(np.frombuffer(bytearray(content), np.uint8)).view(dtype).view(stored.shape)

    def _read_pickled(self, path: Path) -> dict[str, Tensor]:
        """All of them; stored sizes are held against the file's before torch believes them."""
        with self._any_error(path):
            size = path.stat().st_size
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
            if any(each.compress_type != zipfile.ZIP_STORED for each in entries):
                raise ValueError("an entry is compressed")
            if sum(each.file_size for each in entries) > size:
                raise ValueError("its entries are longer than the file")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(loaded, dict):
            raise AdapterError(f"adapter {self._adapter}: {path.name}: holds no tensors by name")
        found: dict[str, Tensor] = {}
        total = 0
        for name, value in loaded.items():
            if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
                raise AdapterError(f"adapter {self._adapter}: {path.name}: holds something that is no tensor by name")
            if not value.is_floating_point() or value.is_quantized or value.dtype.itemsize < 2:
                raise self.fail(name, f"its dtype {value.dtype} is no number of 16 bits or more")
            total += value.numel() * value.element_size()
            if total > size:  # a view that repeats its storage
                raise self.fail(name, "is larger than the file")
            found[name] = value
        return found

    @contextmanager
    def _any_error(self, path: Path) -> Iterator[None]:
        """torch's reader raises many kinds of errors for a file that is not what it should be."""
        try:
            yield
        except AdapterError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            raise AdapterError(f"adapter {self._adapter}: {path.name} cannot be read: {text}") from None


def _without_folder(error: Any, directory: Path) -> str:
    return str(error).replace(f"{directory}/", "")
