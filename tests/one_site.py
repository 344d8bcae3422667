"""One federated site on tiny 2D phantoms: its folders, a coordinator's plans, messages in this or in another process.

``python one_site.py FOLDER`` answers the one message that lies in the folder, as Flower's process per message would.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ordinary_plans
from doors import read_lines
from safetensors.numpy import load_file, save_file

from nnunet_dp.federated.protocol import PrepareRequest, QueryRequest, Reply, Terms, TrainRequest, arrays_sha256
from nnunet_dp.federated.site import handle
from nnunet_dp.federated.site_settings import SiteSettings, read_settings
from nnunet_dp.plans import json_sha256

DATASET = "Dataset412_PhantomLesion"
PLANS = "fedPlans"
LEDGER = "privacy_ledger.jsonl"


class Answer(NamedTuple):
    header: str
    arrays: dict[str, np.ndarray]

    @property
    def reply(self) -> Reply:
        return Reply.model_validate_json(self.header)

    @property
    def code(self) -> str:
        return self.reply.code.value


@dataclass(frozen=True)
class Site:
    """A site's folders and settings.

    Attributes:
        root: holds raw, preprocessed and results.
        more: settings that differ from a small site's.
    """

    root: Path
    more: Mapping[str, Any]

    @property
    def settings(self) -> SiteSettings:
        folders = {part: self.root / part for part in ("raw", "preprocessed", "results")}
        return SiteSettings(**{"name": "north", "dataset": "412", "max_epsilon": 8.0, **folders, **self.more})

    @property
    def fold(self) -> Path:
        return self.model("nnUNetTrainerDP_Federated") / "fold_all"

    @property
    def preprocessed(self) -> Path:
        return self.root / "preprocessed" / DATASET

    def model(self, trainer: str) -> Path:
        return self.root / "results" / DATASET / f"{trainer}__{PLANS}__2d"

    def charges(self) -> list[dict[str, Any]]:
        return read_lines(self.preprocessed / LEDGER)

    def log(self) -> str:
        file = self.root / "results" / DATASET / "federated_log.txt"
        return file.read_text() if file.is_file() else ""

    def with_settings(self, **more: Any) -> Site:
        return replace(self, more={**self.more, **more})

    def copied_to(self, root: Path) -> Site:
        shutil.copytree(self.root, root, dirs_exist_ok=True)
        return replace(self, root=root)

    # ---- messages ----------------------------------------------------------------------------------------------

    def say(self, kind: str, header: str, arrays: Mapping[str, np.ndarray] | None = None) -> Answer:
        return Answer(*handle(kind, header, arrays or {}, self.settings))

    def query(self) -> Answer:
        return self.say("query", QueryRequest(run="0a").model_dump_json())

    def prepare(
        self,
        plans: dict[str, Any] | None = None,
        dataset_json: dict[str, Any] | None = None,
        asked: Terms | None = None,
    ) -> Answer:
        plans = plans or coordinator_plans()
        described = dataset_json or self.query().reply.dataset_json
        assert described is not None
        request = PrepareRequest(
            run=asked.run if asked else "0a",
            plans=plans,
            dataset_json=described,
            configuration="2d",
            plans_sha256=json_sha256(plans),
            terms=asked,
        )
        return self.say("prepare", request.model_dump_json())

    def train(self, terms: Terms, number: int, weights: Mapping[str, np.ndarray], **changed: Any) -> Answer:
        return self.say("train", train_header(terms, number, weights, **changed), weights)

    def started(self, folder: Path, terms: Terms, number: int, weights: Mapping[str, np.ndarray]) -> subprocess.Popen:
        """A ``train`` message in a process of its own, which imports everything anew."""
        folder.mkdir(parents=True)
        settings = {key: value for key, value in self.settings.model_dump(mode="json").items() if value is not None}
        text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())
        (folder / "site.toml").write_text(text)
        (folder / "request.json").write_text(train_header(terms, number, weights))
        save_file(dict(weights), folder / "request.safetensors")
        return subprocess.Popen([sys.executable, __file__, str(folder)], start_new_session=True)

    def train_apart(self, folder: Path, terms: Terms, number: int, weights: Mapping[str, np.ndarray]) -> Answer:
        assert self.started(folder, terms, number, weights).wait(300) == 0
        return answered(folder)


def answered(folder: Path) -> Answer:
    return Answer((folder / "reply.json").read_text(), load_file(folder / "reply.safetensors"))


def train_header(terms: Terms, number: int, weights: Mapping[str, np.ndarray], **changed: Any) -> str:
    request = {"terms": terms, "round": number, "weights_sha256": arrays_sha256(weights)} | changed
    return TrainRequest(**request).model_dump_json()


def make_site(root: Path, patients: int = 10) -> Site:
    """A dataset of phantoms with skin lesions, two images of some patients; not prepared."""
    from nnunet_dp.phantoms import write_dataset

    (root / "raw").mkdir(parents=True)
    write_dataset(root / "raw", "lesion", patients, 3, dataset_id=412, shape=(32, 32))
    return Site(root, {})


def coordinator_plans(**changes: Any) -> dict[str, Any]:
    """As a coordinator sends them: three channels, a network of three narrow stages, no private section."""
    two = ordinary_plans.configuration("2d", [32, 32], 3)
    two["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 8, 8]
    two |= {"normalization_schemes": ["ZScoreNormalization"] * 3, "use_mask_for_norm": [False] * 3}
    for what in ("data", "seg", "probabilities"):
        two[f"resampling_fn_{what}"] = "resample_data_or_seg_to_shape"
        two[f"resampling_fn_{what}_kwargs"] = {
            "is_seg": what == "seg", "order": 3 if what == "data" else 1, "order_z": 0, "force_separate_z": None,
        }  # fmt: skip
    return (
        ordinary_plans.ordinary_plans()
        | {
            "plans_name": PLANS,
            "image_reader_writer": "NaturalImage2DIO",
            "configurations": {"2d": two},
            "foreground_intensity_properties_per_channel": {str(channel): {} for channel in range(3)},
            "original_median_shape_after_transp": [1, 32, 32],
        }
        | changes
    )


def terms(**changes: Any) -> Terms:
    usual = {"run": "0a", "mode": "dp-fedavg", "epsilon": 8.0, "rounds": 3, "local_steps": 2, "configuration": "2d"}
    return Terms(**{**usual, "plans_sha256": json_sha256(coordinator_plans()), **changes})


def first_weights(site: Site) -> dict[str, np.ndarray]:
    """Global weights of round 0."""
    return planned_weights(site.query().reply.dataset_json or {})


def planned_weights(dataset_json: dict[str, Any]) -> dict[str, np.ndarray]:
    """Weights of the planned network, freshly initialised."""
    from nnunet_dp.nnunet_start import planned_network

    network = planned_network(coordinator_plans(), "2d", dataset_json)
    return {name: parameter.detach().numpy().copy() for name, parameter in network.named_parameters()}


if __name__ == "__main__":
    place = Path(sys.argv[1])
    sent = load_file(place / "request.safetensors")
    text, arrays = handle("train", (place / "request.json").read_text(), sent, read_settings(place / "site.toml"))
    save_file(arrays, place / "reply.safetensors")
    (place / "reply.json").write_text(text)
