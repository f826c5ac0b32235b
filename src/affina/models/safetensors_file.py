"""safetensors files one tensor at a time, in memory that one tensor needs.

The library's own reader maps the file, and every page it touches counts as memory of the process until the file is
closed; its writer wants all tensors at once. Loading a model "near its 4-bit size" and merging one "tensor by tensor"
need neither. The format is simple: 8 bytes length, a JSON header with type, shape and offsets of every tensor, then
their bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from affina.errors import Location, ModelError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100 * 1024 * 1024
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Where a tensor is: file, type, shape, first byte and number of bytes."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def read_header(path: Path) -> dict[str, TensorSpec]:
    """The tensors of one file. Raises ModelError[checkpoint-damaged] when the file is cut short or no safetensors
    file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise _damaged(path, f"its header should be {length} bytes, the file has {size}")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise _damaged(path, f"its header is not JSON: {error}") from error
    specs = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            raise ModelError(
                "checkpoint-unreadable",
                f"{name} in {path.name} has the type {entry['dtype']}, which affina does not read",
                fix="use a checkpoint in bfloat16, float16 or float32",
                where=Location(path),
            )
        specs[name] = TensorSpec(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + start, end - start)
    needed = max((spec.offset + spec.num_bytes for spec in specs.values()), default=8 + length)
    if needed > size:
        raise _damaged(path, f"it should be {needed:,} bytes, it is {size:,}")
    return specs


def read_tensor(spec: TensorSpec) -> Tensor:
    """The tensor in memory of its own."""
    if spec.num_bytes == 0:
        return torch.empty(spec.shape, dtype=spec.dtype)
    tensor = torch.empty(spec.num_bytes, dtype=torch.uint8)
    with spec.path.open("rb", buffering=0) as file:
        file.seek(spec.offset)
        view = tensor.numpy().data
        done = 0
        while done < spec.num_bytes:
            count = file.readinto(view[done:])
            if not count:
                raise _damaged(spec.path, "it ended while it was read")
            done += count
    return tensor.view(spec.dtype).view(spec.shape)


def checkpoint_tensors(folder: Path) -> dict[str, TensorSpec]:
    """Every tensor of a model directory, whether it is one file or has an index of shards.

    Raises ModelError: checkpoint-missing, checkpoint-unsafe (only pickled weights), checkpoint-incomplete (a shard is
                       absent), checkpoint-damaged.
    """
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise _damaged(index, f"it is no index of shards: {error}") from error
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                "checkpoint-incomplete",
                f"{folder} lacks {len(missing)} of {len(shards)} weight files: {', '.join(missing[:3])}",
                why="the download or the copy was interrupted",
                fix="download the model again",
            )
        specs: dict[str, TensorSpec] = {}
        for name in shards:
            specs |= read_header(folder / name)
        return specs
    files = [folder / SINGLE_FILE] if (folder / SINGLE_FILE).is_file() else sorted(folder.glob("*.safetensors"))
    files = [path for path in files if path.name != "adapter_model.safetensors"]
    if len(files) == 1:
        return read_header(files[0])
    raise _no_weights(folder, files)


def _no_weights(folder: Path, files: list[Path]) -> ModelError:
    if files:
        return ModelError(
            "checkpoint-incomplete",
            f"{folder} has {len(files)} safetensors files and no {INDEX_FILE}",
            why="without the index it is not known which files belong to the model",
            fix="download the model again",
        )
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"), *folder.glob("*.ckpt")])
    if pickled:
        return ModelError(
            "checkpoint-unsafe",
            f"{folder} has its weights only in {pickled[0].name}",
            why="such files are Python pickles: loading one can run any program",
            fix="use a safetensors version of the model, or convert it on a machine that may be lost: "
            "AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)",
        )
    return ModelError(
        "checkpoint-missing",
        f"{folder} holds no safetensors weights",
        fix="give a directory with config.json and model.safetensors",
    )


def _damaged(path: Path, why: str) -> ModelError:
    return ModelError(
        "checkpoint-damaged",
        f"{path.name} is damaged",
        why=why,
        fix="download it again",
        where=Location(path),
    )


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor that will be written: what it is, and how to make it when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


def write_sharded(folder: Path, tensors: Iterable[PlannedTensor], *, max_shard_bytes: int) -> list[Path]:
    """Writes a model's weights as one file, or as shards with an index; holds one tensor at a time."""
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    if len(shards) == 1:
        write_file(folder / SINGLE_FILE, shards[0])
        return [folder / SINGLE_FILE]
    weight_map: dict[str, str] = {}
    paths = []
    for number, shard in enumerate(shards, start=1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(path, shard)
        paths.append(path)
        weight_map |= {tensor.name: path.name for tensor in shard}
    total = sum(tensor.num_bytes for shard in shards for tensor in shard)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return paths


def write_file(path: Path, tensors: Iterable[PlannedTensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes one file, wide types first and then by name, as the library orders them, so that data stays aligned."""
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    offset = 0
    for tensor in ordered:
        end = offset + tensor.num_bytes
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for planned in ordered:
            made = planned.make()
            assert (made.dtype, tuple(made.shape)) == (planned.dtype, planned.shape), planned.name
            if made.numel():
                flat = made.detach().cpu().contiguous().reshape(-1)
                file.write(flat.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
