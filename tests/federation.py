"""Sites in memory, for tests of the coordinator: each adds its own number to the weights it gets."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from nnunet_dp import __version__
from nnunet_dp.federated.protocol import Code, Reply, Terms, TrainRequest, arrays_sha256
from nnunet_dp.federated.run_config import RunConfig

SHA = "ab" * 32
DATASET = {"labels": {"background": 0, "organ": 1}, "channel_names": {"0": "MRI"}, "file_ending": ".nii.gz"}
NNUNET = version("nnunetv2")
SHAPES = {"b": (3,), "w": (2, 2)}


def terms(**changes: Any) -> Terms:
    values = {"run": "0a", "mode": "adp-fl", "epsilon": 8.0, "rounds": 4, "plans_sha256": SHA, "configuration": "2d"}
    return Terms.model_validate(values | changes)


def config(folder: Path, sites: int = 3, asked: Terms | None = None, **changes: Any) -> RunConfig:
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "initial.safetensors"
    save_file({name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}, weights)
    values = {
        "terms": asked or terms(), "plans": {}, "dataset_json": DATASET, "initial_weights": str(weights),
        "sites": sites, "wait_for_sites_s": 0.0, "model_folder": str(folder / "T__P__2d"),
    }  # fmt: skip
    return RunConfig.model_validate(values | changes)


@dataclass
class Site:
    """Answers as the protocol says; ``spoil`` may change a train reply, None is silence.

    ``instead`` sees every message first and may answer it with a code, or be silent.
    """

    name: str
    step: float = 1.0
    dataset_json: dict[str, Any] = field(default_factory=lambda: dict(DATASET))
    version: str = __version__
    nnunetv2: str = NNUNET
    prepares: Code = Code.ok
    confirms: str = SHA
    instead: Callable[[str, str], Code | str | None] = lambda kind, header: None
    spoil: Callable[[TrainRequest, Reply, dict[str, np.ndarray]], tuple[Any, Any] | None] = lambda r, a, w: (a, w)
    trained: list[int] = field(default_factory=list)

    def answer(self, kind: str, header: str, arrays: Mapping[str, np.ndarray]) -> tuple[str, Any] | None:
        other = self.instead(kind, header)
        if isinstance(other, Code):
            number = json.loads(header).get("round")
            return Reply(code=other, site=self.name, run="0a", round=number).model_dump_json(), {}
        if other is not None:
            return None
        if kind == "query":
            versions = {"nnunet_dp": self.version, "nnunetv2": self.nnunetv2}
            reply = Reply(code=Code.ok, site=self.name, run="0a", dataset_json=self.dataset_json, versions=versions)
        elif kind == "prepare":
            reply = Reply(code=self.prepares, site=self.name, run="0a", plans_sha256=self.confirms)
        else:
            return self.train(TrainRequest.model_validate_json(header), arrays)
        return reply.model_dump_json(), {}

    def train(self, request: TrainRequest, arrays: Mapping[str, np.ndarray]) -> tuple[str, Any] | None:
        assert arrays_sha256(arrays) == request.weights_sha256
        self.trained.append(request.round)
        spent = {"epsilon": 1.0 + request.round, "delta": 1e-5, "unit": "patient", "bound": 0.5}
        reply = Reply(code=Code.ok, site=self.name, run="0a", round=request.round, **spent)
        moved = {name: (array + self.step).astype(np.float32) for name, array in arrays.items()}
        spoilt = self.spoil(request, reply, moved)
        if spoilt is None:
            return None
        told, weights = spoilt
        return (told if isinstance(told, str) else told.model_dump_json()), weights


@dataclass
class Memory:
    """A transport whose nodes are sites in this process; tests may change ``nodes`` while a run goes on."""

    nodes: dict[str, Site]
    before: Callable[[str], None] = lambda kind: None

    def sites(self, minimum: int, timeout_s: float) -> list[str]:
        return sorted(self.nodes)

    def exchange(self, kind, messages, timeout_s):
        self.before(kind)
        told = {
            node: self.nodes[node].answer(kind, *message) for node, message in messages.items() if node in self.nodes
        }
        return {node: reply for node, reply in told.items() if reply is not None}


def three(**changes: Any) -> Memory:
    return Memory({str(k): Site(name, step=float(k), **changes) for k, name in enumerate(("ann", "bob", "cleo"), 1)})
