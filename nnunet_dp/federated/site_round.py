"""One round at a site: restore, load the global weights, take the local steps, save, answer.

The site's run is an ordinary run folder of this package (``run.RunFolder``), so that everything that protects a
training on one machine protects it here: the chained ledger that is charged first, its copy beside the weights, the
checkpoint that knows the ledger's head, the refusal to continue one checkpoint twice, ``nnunet-dp status``. Two things
are added: the terms of a run may not change, and the dataset's total may not pass the site's ``max_epsilon``.

    checkpoint -> optimizer, threshold, step      global weights -> network      charge, draw, step, ... -> checkpoint

What survives between rounds (momentum, threshold, step number) are functions of earlier releases and stay here; the
weights are replaced by the coordinator's. A round that is asked again with the same weights is answered from the
checkpoint and costs nothing; with other weights it is a new release and is charged.

Formal guarantee:
    No step is taken that the run's plan has no charge left for, or that would bring the dataset's total, over every run
    in its ledger, above ``max_epsilon`` at the site's own delta.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nnunet_dp import nnunet_site
from nnunet_dp.charges import LedgerError, epsilon_of
from nnunet_dp.dpsgd import PrivacyPlan
from nnunet_dp.errors import BudgetRefusal, Refusal
from nnunet_dp.federated.local import LocalTraining, make_training, schedule_of
from nnunet_dp.federated.protocol import Arrays, Code, Mode, Terms, TrainRequest
from nnunet_dp.federated.site_budget import fits
from nnunet_dp.federated.site_settings import SiteSettings
from nnunet_dp.federated.site_store import (
    FREE_TRAINER,
    NO_GUARANTEE,
    SITE_TRAINER,
    Declined,
    Store,
    fingerprint_run,
)
from nnunet_dp.gradients import trainable
from nnunet_dp.ledger import Ledger, read_ledger
from nnunet_dp.nnunet_site import SiteModel
from nnunet_dp.plans import SECTION, json_sha256, read_section
from nnunet_dp.run import LATEST, LEDGER, RunFolder, read_checkpoint, write_checkpoint

_MARK = "Trained without any privacy guarantee, for comparison. Do not release these weights.\n"
Answer = tuple[dict[str, Any], dict[str, np.ndarray]]


def take_round(request: TrainRequest, arrays: Arrays, settings: SiteSettings, store: Store) -> Answer:
    """Answer a ``train`` message; the caller holds the dataset.

    Args:
        request: terms, round and hash of the global weights.
        arrays: the global weights, whose hash was compared.
        settings: the site's own; the terms keep within them.
        store: the site's files.

    Returns:
        Fields of the reply, and the site's weights [float32, names of the trainable parameters].

    Raises:
        Declined: with the code for the coordinator.
    """
    terms = request.terms
    plans_name = store.prepared(terms.plans_sha256, terms.configuration)["plans_name"]
    trainer = SITE_TRAINER if terms.private else FREE_TRAINER
    fold = store.fold(trainer, plans_name, terms.configuration)
    with store.held_fold(fold), _subnormals_flushed():
        run = _Run(request, settings, store, fold)
        with closing(run.open()):
            refuse_weights(arrays, run.model.network)
            run.begin_or_restore()
            return run.answer(arrays)


@contextmanager
def _subnormals_flushed() -> Iterator[None]:
    """Subnormal numbers are many times slower to compute with: weights made for it could ask by the clock.

    Only while it is needed: scipy's cKDTree ends the process with a segmentation fault in this mode.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


class _Run:
    """One message's work on one run: ``open`` looks, ``begin_or_restore`` refuses, ``answer`` charges and trains."""

    plans: dict[str, Any]
    model: SiteModel
    ledger: Ledger | None
    training: LocalTraining

    def __init__(self, request: TrainRequest, settings: SiteSettings, store: Store, fold: Path) -> None:
        self.request, self.terms = request, request.terms
        self.settings, self.store, self.fold = settings, store, fold
        self.folder = RunFolder(fold, store.dataset_ledger, store.results)
        self.dataset_json = store.dataset_json()
        self.checkpoint: dict[str, Any] | None = None

    # ---- before anything is charged ----------------------------------------------------------------------------

    def open(self) -> SiteModel:
        """The run's plans, made now if it is new, and their model."""
        record = self.store.run_record(self.terms.run)
        self._refuse_other_terms(record)
        self.checkpoint = self._newest_checkpoint(record)
        self.plans = record["plans"] if record else self._new_plans()
        self.model = nnunet_site.open_model(
            self.plans, self.terms.configuration, self.store.preprocessed, self.dataset_json,
            torch.device(self.settings.device), self.settings.processes, self.terms.local_steps, self.store.log,
        )  # fmt: skip
        return self.model

    def _refuse_other_terms(self, record: Mapping[str, Any] | None) -> None:
        if record is not None and Terms.model_validate(record["terms"]) != self.terms:
            raise Declined(Code.malformed, "the terms of this run are not those of its first round")

    def _newest_checkpoint(self, record: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """This run's newest checkpoint; None for a run that is new here.

        A recorded run had one, and so had one whose charges lie beside the weights: without it, nothing begins anew.
        """
        file = self.fold / LATEST
        found = read_checkpoint(file) if file.is_file() else {}
        mine = found.get("federated", {}).get("run") == self.terms.run
        if record is not None and not mine:
            raise Declined(Code.ledger_refuses, f"{LATEST} of this run is missing in {self.folder.name}: put it back")
        if record is None and mine and (self.fold / LEDGER).is_file():
            raise Declined(Code.ledger_refuses, "the record of this run is missing in the preprocessed folder")
        return found if record is not None else None

    def _new_plans(self) -> dict[str, Any]:
        voted = self.store.fingerprint(self.terms.run)
        if voted is not None and Mode(voted["asked"]["mode"]).private != self.terms.private:
            raise Declined(Code.malformed, "this run's fingerprint was asked for with or without a guarantee, not so")
        admitted = self.store.prepared(self.terms.plans_sha256, self.terms.configuration)
        return nnunet_site.site_plans(admitted, self.terms, self.settings, self.store.preprocessed, self.dataset_json)

    def begin_or_restore(self) -> None:
        """Ledger and training, from the checkpoint or for the first time; a lost or foreign ledger is refused."""
        state = self.checkpoint[self._key] if self.checkpoint else None
        try:
            self.ledger = self._open_ledger(state)
            self.training = self._training()
            if state is not None:
                self.training.restore(state, self.model.data_digest)
        except BudgetRefusal:
            raise
        except Refusal as refusal:  # a lost ledger, a changed plan or dataset, two continuations
            raise LedgerError(str(refusal)) from None
        if state is None:
            self._begin()

    def _begin(self) -> None:
        """Model files, first checkpoint, record, in this order, before the first charge."""
        shown = {key: value for key, value in self.plans.items() if self.terms.private or key != SECTION}
        nnunet_site.write_model_files(self.fold.parent, shown, self.dataset_json)
        if not self.terms.private:
            self.store.note_no_guarantee()
            (self.fold / NO_GUARANTEE).write_text(_MARK)
            (self.fold.parent / NO_GUARANTEE).write_text(_MARK)
        self._save({})
        self.store.write_run_record(self.terms, self.plans)

    def _open_ledger(self, state: dict[str, Any] | None) -> Ledger | None:
        if not self.terms.private:
            return None
        unit, units = self.model.patients.unit, self.model.patients.table_sha256
        if state is not None:
            return self.folder.resume(state, unit, units)
        label = f"{self.terms.run}-"
        if self.store.dataset_ledger.is_file() and any(
            f"/{label}" in entry.run for entry in read_ledger(self.store.dataset_ledger)
        ):
            raise LedgerError("this run was charged before, and its record and checkpoint are lost: put them back")
        return self.folder.start(self._plan().digest(), continuing=False, unit=unit, units=units, label=label)

    # ---- what moves epsilon, and the training ------------------------------------------------------------------

    def _plan(self) -> PrivacyPlan:
        section = read_section(self.plans)
        assert section is not None
        planned = section.configurations[self.terms.configuration]
        return planned.privacy_plan(section.budget, self.terms.rule, self.model.slots)

    def _training(self) -> LocalTraining:
        model, schedule = self.model, schedule_of(self.terms)
        return make_training(
            self.terms, model.network, model.loss, self._plan(), schedule, model.execution, self.ledger
        )

    @property
    def _key(self) -> str:
        return "private" if self.terms.private else "no_guarantee"

    # ---- the round ---------------------------------------------------------------------------------------------

    def answer(self, arrays: Arrays) -> Answer:
        """The round's weights: those of the checkpoint if it was taken already, else after new steps."""
        asked = {"round": self.request.round, "weights_sha256": self.request.weights_sha256}
        taken = self.checkpoint["federated"] if self.checkpoint else {}
        if {key: taken.get(key) for key in asked} != asked:
            load_weights(arrays, self.training.network)
            began, taken = time.monotonic(), self._take_steps()
            which, seconds = f"run {self.terms.run} round {self.request.round}", time.monotonic() - began
            self.store.log(f"{which}: {taken} steps in {seconds:.2f} s")
            if not taken:
                reason = "no further step fits the run's or the dataset's budget"
                raise Declined(Code.budget_spent, reason, **self._spent())
            self._save(asked)
        fields = {"run": self.terms.run, "round": self.request.round, "plans_sha256": self.terms.plans_sha256}
        bound = {"bound": self.training.rule.bound} if self.terms.mode is Mode.adp_fl else {}
        weights = weights_of(self.training.network)
        if not all(bool(np.isfinite(array).all()) for array in weights.values()):  # decided after the noise
            reason = "the weights are not finite after this round: they are not sent"
            raise Declined(Code.failed, reason, **self._spent())
        return fields | self._spent() | bound, weights

    def _take_steps(self) -> int:
        """As many of the round's local steps as the budgets leave; how many they were."""
        taken = 0
        while taken < self.terms.local_steps and not self.training.finished and self._affordable():
            self.training.advance(self.model.records)
            taken += 1
        return taken

    def _affordable(self) -> bool:
        """Whether one more step keeps the dataset's total within the site's own settings."""
        if self.ledger is None:
            return True
        return fits(self.ledger.entries, self.training.next_charges, self.settings, self.model.patients)

    def _spent(self) -> dict[str, Any]:
        if self.ledger is None:
            return {}
        budget = self.training.plan.budget
        mine = {self.ledger.run, fingerprint_run(self.terms.run)}
        spent = epsilon_of([entry for entry in self.ledger.entries if entry.run in mine], budget.delta)
        return {"epsilon": spent, "delta": budget.delta, "unit": budget.unit[:40]}

    def _save(self, asked: Mapping[str, Any]) -> None:
        """The checkpoint: state, and which round it answers; the weights in it are what is sent."""
        state = self.training.next_state(self.model.data_digest)
        federated = {"run": self.terms.run, "terms": json_sha256(self.terms.model_dump(mode="json")), **asked}
        write_checkpoint({self._key: state, "epoch": 0, "federated": federated}, self.fold / LATEST)
        self.training.saved(state)


# ---- weights in and out ------------------------------------------------------------------------------------------


def refuse_weights(arrays: Arrays, network: nn.Module) -> None:
    """Refuse global weights that are not this network's.

    Raises:
        Declined: ``plans_mismatch`` for other names or shapes, ``malformed`` for another dtype and what is not finite.
    """
    names, parameters = trainable(network)
    shapes = {name: tuple(parameter.shape) for name, parameter in zip(names, parameters, strict=True)}
    if {name: array.shape for name, array in arrays.items()} != shapes:
        raise Declined(Code.plans_mismatch, "the global weights have other names or shapes than the planned network")
    if any(array.dtype != np.float32 for array in arrays.values()):
        raise Declined(Code.malformed, "the global weights are not float32")
    if not all(bool(np.isfinite(array).all()) for array in arrays.values()):
        raise Declined(Code.malformed, "the global weights are not finite")


def load_weights(arrays: Arrays, network: nn.Module) -> None:
    """Put the global weights in place of the network's; optimizer and threshold stay."""
    with torch.no_grad():
        for name, parameter in zip(*trainable(network), strict=True):
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(arrays[name])))


def weights_of(network: nn.Module) -> dict[str, np.ndarray]:
    """The network's trainable parameters, as they are sent."""
    return {
        name: parameter.detach().to("cpu", torch.float32).numpy().copy()
        for name, parameter in zip(*trainable(network), strict=True)
    }
