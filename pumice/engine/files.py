"""Files and folders of a checkpoint: checksums, safetensors written in chunks, and moves that are whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from pumice.core.errors import PumiceError

CHUNK = 16 << 20
_ST_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
}


def check_free(path: Path) -> None:
    """PumiceError if something is at `path` already (an empty folder is nothing)."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise PumiceError(
            f"out={str(path)!r} exists: give overwrite=True (--overwrite) to replace it, or another folder."
        )


def fact_of(content: bytes) -> dict[str, Any]:
    """Checksum and size of a file's content, as config.json lists them."""
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def check_file(path: Path, fact: Mapping[str, Any]) -> None:
    """PumiceError if a file is missing, shorter or longer than it was written, or has another checksum."""
    if not path.is_file():
        raise PumiceError(f"checkpoint {path.parent} lacks {path.name}: copy or download it again.")
    if path.stat().st_size != fact["bytes"]:
        raise PumiceError(
            f"{path} has {path.stat().st_size:,} bytes instead of {fact['bytes']:,}: it was cut off, copy or download it again."
        )
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != fact["sha256"]:
        raise PumiceError(f"{path} is damaged (its checksum differs): copy or download it again.")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write tensors in the safetensors format, chunk by chunk, synced; returns checksum and size.

    The file is written here rather than by the library so that the checksum comes for free and a shard is never in
    memory a second time. Wider dtypes come first, so that every tensor is aligned for memory mapping.

    Raises:
        PumiceError: a dtype that safetensors has no name for.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in ordered:
        if tensor.dtype not in _ST_NAMES:
            raise PumiceError(
                f"tensor {name!r} of dtype {tensor.dtype} cannot be stored in safetensors: cast it first."
            )
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _ST_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for piece in (len(text).to_bytes(8, "little"), text):
            digest.update(piece)
            file.write(piece)
        for _, tensor in ordered:
            raw = memoryview(cast(Any, tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))
            for start in range(0, len(raw), CHUNK):
                digest.update(raw[start : start + CHUNK])
                file.write(raw[start : start + CHUNK])
        sync(file)
    return {"sha256": digest.hexdigest(), "bytes": 8 + len(text) + position}


@contextlib.contextmanager
def staged(path: str | Path, overwrite: bool) -> Iterator[Path]:
    """A fresh folder `OUT.partial` to write into, which becomes OUT at the end, or vanishes on an error.

    Raises:
        PumiceError: OUT exists and `overwrite` is not given, or it cannot be written (disk full, no permission).
    """
    path = Path(path)
    if not overwrite:
        check_free(path)
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        move_into_place(partial, path)
    except OSError as error:
        raise PumiceError(
            f"out={str(path)!r} cannot be written ({error.strerror}): free some space or change out."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def move_into_place(new: Path, path: Path) -> None:
    """Rename a finished folder to its name; an older one there is exchanged with it in one step where the system can."""
    for folder, _, files in os.walk(new):
        for name in files:
            with open(os.path.join(folder, name), "rb") as file, contextlib.suppress(OSError):
                os.fsync(file.fileno())
    sync_folder(new)
    if not path.exists():
        os.rename(new, path)
    elif _exchange(new, path):
        shutil.rmtree(new, ignore_errors=True)
    else:
        old = path.with_name(path.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
        os.rename(new, path)
        shutil.rmtree(old, ignore_errors=True)
    sync_folder(path.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names atomically (Linux); False where the system has no such call."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2
    return renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


def sync(file: Any) -> None:
    """Put an open file on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Put the names in a folder on the disk."""
    # Windows cannot open folders; its renames are durable on their own.
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
