"""What a federated run came to: per site what was spent, in how many rounds, and what that does and does not promise.

Sites hold different patients, so the guarantee of a run is the largest epsilon of its sites; a patient who is known to
several sites pays the sum. What sites reported is in the run's own files; where a site's ledger lies on this machine
(a simulation, or the site itself), epsilon is counted again from it, and a report that says less is refused.

    folder    of a run (config.json, federated.json beside the model) or of a model (federated.json)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, ValidationError

from nnunet_dp.accounting import PrivacyBudget
from nnunet_dp.card_words import not_covered_rows
from nnunet_dp.errors import Refusal, UsageRefusal
from nnunet_dp.federated.protocol import Mode
from nnunet_dp.federated.site_store import fingerprint_run, released_without_guarantee

if TYPE_CHECKING:
    from nnunet_dp.charges import LedgerEntry

FEDERATED, CONFIG, SETTINGS, RESULT = "federated.json", "config.json", "settings", "federated_result.json"
NO_GUARANTEE = "no guarantee"
SUM = "costs add for a patient known to several sites"
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class SiteSummary:
    """What one site spent on the run.

    Attributes:
        name: declared.
        rounds: in which its update was used.
        epsilon: spent, as reported; None without a guarantee and before its first round.
        delta: of it.
        unit: of it.
        recounted: epsilon from its own ledger, where that is at hand.
        dataset_total: epsilon of every run on its dataset, from the same ledger; None where some had no guarantee.
        released_without_guarantee: whether a mode without guarantee was run on its dataset; None where nobody knows.
    """

    name: str
    rounds: int
    epsilon: float | None = None
    delta: float | None = None
    unit: str | None = None
    recounted: float | None = None
    dataset_total: float | None = None
    released_without_guarantee: bool | None = None

    @property
    def spent(self) -> float | None:
        """What the ledger says, else what was reported."""
        return self.epsilon if self.recounted is None else self.recounted

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        told = {"name": self.name, "epsilon_spent": self.spent, "delta": self.delta, "unit": self.unit}
        counted = {"recounted": self.recounted is not None, "epsilon_dataset_total": self.dataset_total}
        free = {"released_without_guarantee": self.released_without_guarantee}
        return {**told, "rounds": self.rounds, **counted, **free}

    def line(self, private: bool) -> str:
        """For people."""
        if self.spent is None or not private:
            return f"{self.rounds} rounds, {'nothing spent' if private else NO_GUARANTEE}"
        how = "counted from its ledger" if self.recounted is not None else "as reported"
        total = f"; its dataset in total {self.dataset_total:.4g}" if self.dataset_total is not None else ""
        if self.released_without_guarantee:
            total = "; OTHER RUNS on its dataset had NO GUARANTEE: this epsilon is of this run alone"
        return f"epsilon {self.spent:.4g} at delta {self.delta:g} per {self.unit}, {self.rounds} rounds, {how}{total}"


@dataclass(frozen=True)
class Summary:
    """A run's claim.

    Attributes:
        run: identifier.
        mode: of training.
        rounds: that counted.
        complete: whether all planned rounds were done.
        sites: in the order of their names.
        model_folder: the model's folder, as far as it is known here.
        planned: epsilon of each site and number of rounds, where the run's folder is at hand.
        client_level: epsilon and delta for whole sites, where asked for.
        inputs: what plans and first weights are a function of.
        not_covered: what the guarantee leaves out.
    """

    run: str
    mode: Mode
    rounds: int
    complete: bool
    sites: tuple[SiteSummary, ...]
    model_folder: Path | None = None
    planned: tuple[float, int] | None = None
    client_level: Mapping[str, float] | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)
    not_covered: tuple[str, ...] = ()

    @property
    def private(self) -> bool:
        """Whether the mode has a guarantee."""
        return self.mode in (Mode.dp_fedavg, Mode.adp_fl)

    @property
    def epsilon(self) -> float | None:
        """The largest of the sites'."""
        spent = [site.spent for site in self.sites if site.spent is not None]
        return max(spent) if spent and self.private else None

    @property
    def guarantee(self) -> str:
        """In words."""
        if not self.private:
            return f"{NO_GUARANTEE}: {self.mode.value} is for comparison, do not release its weights"
        if self.epsilon is None:
            return "nothing spent yet"
        units = ", ".join(sorted({str(site.unit) for site in self.sites if site.unit}))
        return f"epsilon {self.epsilon:.4g} per {units}, the largest of the sites'; {SUM}"

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        epsilon, rounds = self.planned or (None, None)
        return {
            "model_folder": str(self.model_folder) if self.model_folder else None,
            "sites": [site.as_dict() for site in self.sites],
            "run": self.run,
            "mode": self.mode.value,
            "guarantee": self.guarantee,
            "epsilon_max": self.epsilon,
            "epsilon_target": epsilon,
            "rounds": self.rounds,
            "rounds_planned": rounds,
            "complete": self.complete,
            "client_level": dict(self.client_level) if self.client_level else None,
            "inputs": dict(self.inputs),
            "not_covered": list(self.not_covered),
        }

    def lines(self) -> list[tuple[str, str]]:
        """Label and value, for a table."""
        state = "complete" if self.complete else "not complete"
        target = f" of {self.planned[1]}" if self.planned else ""
        whole = self.client_level
        words = "epsilon {epsilon:.4g} at delta {delta:g} per site".format(**whole) if whole else ""
        level = [("whole sites", words)] if whole else []
        return [
            ("run", f"{self.run}, mode {self.mode.value}"),
            ("guarantee", self.guarantee),
            *((site.name, site.line(self.private)) for site in self.sites),
            *level,
            ("rounds", f"{self.rounds}{target}; {state}"),
            *([("model", str(self.model_folder))] if self.model_folder else []),
            *self.inputs.items(),
            *not_covered_rows(self.not_covered),
        ]


# ---- recounting --------------------------------------------------------------------------------------------------


def recounted(summary: Summary, places: Mapping[str, tuple[Path, Path]]) -> Summary:
    """The summary with epsilon counted from the ledgers that are at hand.

    Args:
        summary: as reported.
        places: of each site whose files lie here: results and preprocessed folder of its dataset.

    Raises:
        Refusal: when a ledger says more than was reported.
    """
    if not summary.private:
        return summary
    known = {site.name: site for site in summary.sites}
    known |= {name: SiteSummary(name, 0) for name in places if name not in known}  # charged, and never heard of
    counted = (_recount(site, summary, *places[name]) if name in places else site for name, site in known.items())
    heard = (site for site in counted if site.name in {one.name for one in summary.sites} or site.spent is not None)
    return replace(summary, sites=tuple(sorted(heard, key=lambda site: site.name)))


def _recount(site: SiteSummary, summary: Summary, results: Path, preprocessed: Path) -> SiteSummary:
    from nnunet_dp.charges import epsilon_of
    from nnunet_dp.run import LEDGER

    fold, mine, everything = _charged(summary.run, results, preprocessed)
    budget = _budget_beside(fold) if fold is not None else None
    if site.delta is None and budget is not None:  # no reply came through that said it
        site = replace(site, delta=budget.delta, unit=budget.unit)
    if not mine or site.delta is None:
        return site
    spent = epsilon_of(mine, site.delta)
    if site.epsilon is not None and site.epsilon > spent + _TOLERANCE:
        raise Refusal(
            f"{site.name} reported epsilon {site.epsilon:.4g}, the ledger beside its weights proves only {spent:.4g}: "
            f"put {LEDGER} back from a backup"
        )
    released = released_without_guarantee(preprocessed, results)
    total = epsilon_of(everything, site.delta) if everything and not released else None
    return replace(site, recounted=spent, dataset_total=total, released_without_guarantee=released)


def _budget_beside(fold: Path) -> PrivacyBudget | None:
    from nnunet_dp.plans import read_plans, read_section

    file = fold.parent / "plans.json"
    section = read_section(read_plans(file)) if file.is_file() else None
    return section.budget if section is not None else None


def _charged(
    run: str, results: Path, preprocessed: Path
) -> tuple[Path | None, tuple[LedgerEntry, ...], tuple[LedgerEntry, ...]]:
    """A site's folder of a run, its charges for it, and all that its dataset was ever charged."""
    from nnunet_dp.ledger import read_copy, read_ledger
    from nnunet_dp.run import LEDGER

    fold, whole = _fold_of(run, results), preprocessed / LEDGER
    everything = read_ledger(whole) if whole.is_file() else ()
    own = read_copy(fold / LEDGER) if fold is not None and (fold / LEDGER).is_file() else ()
    runs = {fingerprint_run(run), *(entry.run for entry in own)}  # the copy may lack the newest line
    return fold, tuple(entry for entry in everything if entry.run in runs) or own, everything


def charges_of_sites(summary: Summary) -> dict[str, tuple[LedgerEntry, ...]]:
    """What each site whose ledger lies on this machine was charged for the run, by the sites' names."""
    folder = _run_folder(summary.run)
    places = dict(places_of(folder)) if folder is not None else {}
    found = {site.name: _charged(summary.run, *places[site.name])[1] for site in summary.sites if site.name in places}
    return {name: entries for name, entries in found.items() if entries}


def thresholds_of(summary: Summary) -> dict[str, tuple[float, ...]]:
    """Noised threshold of each site after each round, as its replies said, where the run's folder is at hand."""
    from nnunet_dp.federated.coordinator import PROGRESS

    folder = _run_folder(summary.run)
    if folder is None or not (folder / PROGRESS).is_file():
        return {}
    try:
        rows = [_Round.model_validate_json(line) for line in (folder / PROGRESS).read_bytes().splitlines()]
    except ValidationError:  # a line that a crash tore; without all of them nothing can be said of any round
        return {}
    rounds = {row.round: row.sites for row in rows}  # a round that was held again counts once
    silent = _SiteInRound()
    told = {name: [rounds[number].get(name, silent).bound for number in sorted(rounds)] for name in _names(summary)}
    return {name: tuple(filter(None, bounds)) for name, bounds in told.items() if bounds and None not in bounds}


class _SiteInRound(BaseModel):
    bound: float | None = Field(default=None, gt=0, allow_inf_nan=False)


class _Round(BaseModel):
    """One line of the coordinator's progress, as far as it is repeated here."""

    round: int
    sites: dict[str, _SiteInRound]


def _names(summary: Summary) -> list[str]:
    return [site.name for site in summary.sites]


def _fold_of(run: str, results: Path) -> Path | None:
    """The site's own folder of a run, archived or not; its checkpoint says which run it is."""
    from nnunet_dp.run import LATEST, read_checkpoint

    for file in sorted(results.rglob(f"nnUNetTrainerDP_Federated__*/**/{LATEST}")):
        if read_checkpoint(file).get("federated", {}).get("run") == run:
            return file.parent
    return None


def places_of(folder: Path) -> Iterator[tuple[str, tuple[Path, Path]]]:
    """Sites whose settings lie in a simulation's folder, with their results and preprocessed folders."""
    from nnunet_dp.federated.site_settings import read_settings

    for file in sorted((folder / SETTINGS).glob("*.toml")):
        settings = read_settings(file)
        dataset = settings.dataset_name()
        yield settings.name, (settings.folder("results") / dataset, settings.folder("preprocessed") / dataset)


# ---- files -------------------------------------------------------------------------------------------------------


def read_summary(folder: Path) -> Summary:
    """A run's or a model's summary, recounted where ledgers are at hand.

    Args:
        folder: of a run, of a model, or of a model's fold.

    Raises:
        UsageRefusal: for a folder that is neither.
        Refusal: when a ledger says less than was reported.
    """
    folder = Path(folder).resolve()
    model = next((place for place in (folder, folder.parent) if (place / FEDERATED).is_file()), None)
    if model is not None:
        told = _read_result(model / FEDERATED, model)
        run_folder = _run_folder(told.run)
        return told if run_folder is None else recounted(_with_plan(told, run_folder), dict(places_of(run_folder)))
    if (folder / CONFIG).is_file():
        told = _read_result(folder / RESULT) if (folder / RESULT).is_file() else _begun(folder)
        return recounted(_with_plan(told, folder), dict(places_of(folder)))
    within = sorted(config.parent for config in folder.glob(f"runs/*/{CONFIG}"))
    if within:
        names = ", ".join(str(run) for run in within)
        raise UsageRefusal(f"{folder.name} is a coordinator's folder and holds runs: give one of them: {names}")
    raise UsageRefusal(
        f"{folder.name} should be the folder of a federated run or model, found neither {CONFIG} nor {FEDERATED}: give "
        "the folder that `nnunet-dp fed simulate` or `nnunet-dp fed run` named"
    )


def _run_folder(run: str) -> Path | None:
    """Where a simulation of that run lies on this machine, if it lies where they are made."""
    from nnunet_dp.federated.run_config import read_config

    base = os.environ.get("nnUNet_results")
    for config in Path(base or ".").glob(f"federated_runs/*/{CONFIG}") if base else ():
        with suppress(Refusal):  # of a run whose configuration is damaged nobody knows which it is
            if read_config(config).terms.run == run:
                return config.parent
    return None


def _with_plan(summary: Summary, folder: Path) -> Summary:
    from nnunet_dp.federated.run_config import read_config

    config = read_config(folder / CONFIG)
    model = summary.model_folder or Path(config.model_folder)
    planned = config.terms.epsilon, config.terms.rounds
    return replace(summary, planned=planned, model_folder=model if model.is_dir() else None)


class _SiteTold(BaseModel):
    name: str
    rounds: int
    epsilon_spent: float | None
    delta: float | None
    unit: str | None


class _Told(BaseModel):
    """What the coordinator wrote in the end (``coordinator.Result``), as far as it is repeated here."""

    run: str
    mode: Mode
    rounds: int
    complete: bool
    sites: list[_SiteTold]
    client_level: dict[str, float] | None = None
    inputs: dict[str, str] = {}
    not_covered: tuple[str, ...] = ()


def _read_result(file: Path, model: Path | None = None) -> Summary:
    """From the coordinator's last words.

    Raises:
        UsageRefusal: for a file that it did not write so, naming the fields.
    """
    try:
        told = _Told.model_validate_json(file.read_bytes())
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, part['loc'])) or 'file'}: {part['msg']}" for part in error.errors())
        raise UsageRefusal(
            f"{file.name} should be what the coordinator wrote, found {wrong}: put it back from a backup, or go on "
            "with the run, which writes it again"
        ) from None
    sites = (SiteSummary(one.name, one.rounds, one.epsilon_spent, one.delta, one.unit) for one in told.sites)
    return Summary(
        run=told.run, mode=told.mode, rounds=told.rounds, complete=told.complete, sites=tuple(sites),
        model_folder=model, client_level=told.client_level, inputs=told.inputs, not_covered=told.not_covered,
    )  # fmt: skip


def _begun(folder: Path) -> Summary:
    """Of a run that goes on, or was killed."""
    from nnunet_dp.federated.run_config import read_config
    from nnunet_dp.federated.server_state import read_state

    config = read_config(folder / CONFIG)
    state = read_state(folder, config.terms)
    known = sorted(state.sites.items()) if state else []
    sites = (SiteSummary(name, site.rounds, site.epsilon, site.delta, site.unit) for name, site in known)
    return Summary(
        run=config.terms.run,
        mode=config.terms.mode,
        rounds=state.round if state else 0,
        complete=False,
        sites=tuple(sites),
        inputs=config.inputs,
        not_covered=config.not_covered,
    )
