"""Released weights as files: a checkpoint that nnU-Net loads, and the same tensors as safetensors.

A checkpoint is a zip of a pickle and of raw numbers. Both can hold what nobody asked for: code, further keys, numbers
behind a tensor that shows only a part of them, strings that are read and dropped. So it is written in one way, and
read by somebody who trusts nothing: the pickle's instructions are looked at before one of them is carried out.

>>> weights = {"conv.weight": torch.ones(2, 3)}
>>> content = checkpoint_bytes(released_checkpoint(weights, "nnUNetTrainer", "2d", 0, None, charges=5, steps=4))
>>> checkpoint, faults = read_checkpoint_bytes(content)
>>> faults, same_weights(checkpoint["network_weights"], safetensors_bytes(weights))
((), ())

Formal guarantee:
    ``read_checkpoint_bytes`` carries out no pickle that names anything but torch's tensors. Where it finds no fault,
    the file holds the whitelisted keys, the numbers of the tensors, and nothing else.
"""

from __future__ import annotations

import io
import json
import pickletools
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import safetensors.torch
import torch

from nnunet_dp.archive import pack, unpack

KEYS = frozenset((
    "network_weights", "trainer_name", "inference_allowed_mirroring_axes", "init_args", "optimizer_state",
    "grad_scaler_state", "logging", "_best_ema", "current_epoch",
))  # fmt: skip
INIT_ARGS = frozenset(("configuration", "fold", "charges", "steps"))
_NEUTRAL = {"optimizer_state": {}, "grad_scaler_state": None, "logging": {}, "_best_ema": None, "current_epoch": 0}
_GLOBALS = frozenset((
    "torch._utils _rebuild_tensor_v2", "collections OrderedDict",
    *(f"torch {kind}Storage" for kind in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Bool", "Byte")),
))  # fmt: skip
_CALLS = ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD", "EXT1", "EXT2", "EXT4", "POP")
_ROOT = "archive"  # torch's own name for a checkpoint that is written to a stream
_FIXED = {f"{_ROOT}/byteorder": b"little", f"{_ROOT}/version": b"3\n"}
_PICKLE = f"{_ROOT}/data.pkl"


def released_checkpoint(
    weights: Mapping[str, torch.Tensor],
    trainer: str,
    configuration: str,
    fold: int | str,
    mirroring: Any,
    charges: int,
    steps: int,
) -> dict[str, Any]:
    """What a released checkpoint holds: weights, what nnU-Net needs to load them, how often the ledger was charged.

    Args:
        weights: averaged ones.
        trainer: class name that nnU-Net looks for.
        configuration: nnU-Net's name.
        fold: its number, or ``all``.
        mirroring: axes, or None.
        charges: releases of the run that trained it.
        steps: private ones that led to the weights.
    """
    counted = {"configuration": configuration, "fold": fold, "charges": charges, "steps": steps}
    axes = None if mirroring is None else tuple(int(axis) for axis in mirroring)
    return {
        "network_weights": _without_slack(weights),
        "trainer_name": trainer,
        "inference_allowed_mirroring_axes": axes,
        "init_args": counted,
        **_NEUTRAL,
    }


def _without_slack(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the CPU, each storage as long as its tensor; tensors that share numbers go on sharing them."""
    known: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}
    kept = {}
    for name, tensor in weights.items():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        known.setdefault(key, tensor.detach().cpu().clone(memory_format=torch.contiguous_format))
        kept[name] = known[key]
    return kept


def checkpoint_bytes(content: Mapping[str, Any]) -> bytes:
    """A checkpoint for ``torch.load``, the same bytes for the same content: no dates, no identifiers."""
    stream = io.BytesIO()
    torch.save(dict(content), stream)
    records, _ = unpack(stream.getvalue())  # torch's records of version, alignment and identity are not needed
    return pack({name: data for name, data in records.items() if _is_record(name)})


def _is_record(name: str) -> bool:
    return name in (_PICKLE, *_FIXED) or name.removeprefix(f"{_ROOT}/data/").isdecimal()


def safetensors_bytes(weights: Mapping[str, torch.Tensor]) -> bytes:
    """All tensors under all their names, without metadata."""
    apart = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    return safetensors.torch.save(apart)


# ---- reading without trust ---------------------------------------------------------------------------------------


def read_checkpoint_bytes(content: bytes) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A released checkpoint, and everything in it that is not declared.

    Args:
        content: of the file.

    Returns:
        Its content, empty where it could not be loaded safely; and faults, in words.
    """
    records, faults = unpack(content)
    found = [*faults, *(f"the record {name} is not declared" for name in records if not _is_record(name))]
    found += [f"the record {name} is missing or odd" for name, data in _FIXED.items() if records.get(name) != data]
    found += _code(records.get(_PICKLE, b""))
    if found:
        return {}, tuple(found)
    try:
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files fail in every part of zipfile, pickle and torch
        return {}, (f"cannot be loaded as weights alone ({type(error).__name__})",)
    if type(loaded) is not dict:  # others may carry attributes, which torch would write again
        return {}, ("holds no plain dictionary",)
    found += _undeclared(loaded) or list(_slack(loaded["network_weights"], records))
    if not found and checkpoint_bytes(loaded) != content:
        found.append(f"holds more than is loaded from it, or was not written as torch {torch.__version__} writes it")
    return loaded, tuple(found)


def _code(pickled: bytes) -> list[str]:
    """What the pickle would import or call, beyond torch's tensors; nothing is carried out."""
    end = 0
    try:
        for code, argument, position in pickletools.genops(pickled):
            end = position or 0
            if code.name in _CALLS:
                return [f"its pickle holds code ({code.name})"]
            if code.name == "GLOBAL" and argument not in _GLOBALS:
                return [f"its pickle holds code: it imports {argument}"]
    except Exception as error:
        return [f"its pickle cannot be read ({type(error).__name__})"]
    return [] if end == len(pickled) - 1 else ["bytes behind the end of its pickle"]


def _undeclared(loaded: Mapping[Any, Any]) -> list[str]:
    found = [f"the key {key!r:.80} is not declared" for key in loaded if key not in KEYS]
    found += [f"the key {key} is missing" for key in sorted(KEYS - set(loaded))]
    for key, neutral in _NEUTRAL.items():
        if key in loaded and not (type(loaded[key]) is type(neutral) and loaded[key] == neutral):
            found.append(f"{key} should be empty in what is released, found content")
    arguments, weights = loaded.get("init_args"), loaded.get("network_weights")
    if type(arguments) is not dict or set(arguments) != INIT_ARGS:
        odd = sorted(map(str, set(arguments) ^ INIT_ARGS)) if type(arguments) is dict else ["no plain dictionary"]
        found.append(f"init_args should hold {', '.join(sorted(INIT_ARGS))}; found another {', '.join(odd)}")
    elif not all(type(arguments[key]) is int for key in ("charges", "steps")):
        found.append("charges and steps in init_args should be numbers")
    if type(weights) is not dict or not all(
        type(name) is str and type(value) is torch.Tensor for name, value in weights.items()
    ):
        found.append("network_weights should be a plain dictionary of tensors by their names")
    axes = loaded.get("inference_allowed_mirroring_axes")
    if axes is not None and not (isinstance(axes, tuple) and all(type(axis) is int for axis in axes)):
        found.append("inference_allowed_mirroring_axes should be axes")
    return found


def _slack(weights: Mapping[str, torch.Tensor], records: Mapping[str, bytes]) -> Iterator[str]:
    """Numbers that belong to no tensor: records nobody reads, storages longer than what is shown of them."""
    storages = {}
    for name, tensor in weights.items():
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.numel() * tensor.element_size()
        if not whole or tensor._backward_hooks:
            yield f"{name} shows only a part of the numbers stored"
    written = sorted(len(data) for name, data in records.items() if name.startswith(f"{_ROOT}/data/"))
    if written != sorted(storages.values()):
        yield "numbers are stored that belong to no tensor"


def same_weights(weights: Mapping[str, torch.Tensor], content: bytes) -> tuple[str, ...]:
    """How a safetensors file differs from the weights of a checkpoint; nothing where it holds these and no more."""
    try:
        (length,) = struct.unpack("<Q", content[:8])
        described = json.loads(content[8 : 8 + length].decode("ascii"))
        tensors = safetensors.torch.load(content)
    except Exception as error:  # of three parsers
        return (f"cannot be read as safetensors ({type(error).__name__})",)
    found = ["its header holds metadata"] if "__metadata__" in described else []
    found += [f"the tensor {name} is not in the checkpoint" for name in tensors if name not in weights]
    found += [f"the tensor {name} is missing" for name in weights if name not in tensors]
    found += [
        f"the tensor {name} differs from the checkpoint's"
        for name in tensors
        if name in weights and not same_bits(tensors[name], weights[name])
    ]
    if not found and safetensors_bytes(weights) != content:
        found.append("is not written as safetensors writes these tensors")
    return tuple(found)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)))
