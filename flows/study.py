"""The study of a search, in Optuna: what is tried next, what came of it, and what it has cost.

It lies in a database, and a search that was cut off goes on from it: its trials are taken up where they stopped. With
one worker it goes the way that it would have gone: what the sampler draws for a trial follows from the seed, the
trial's place and the results of those before it alone.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.pruners import BasePruner, HyperbandPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, GPSampler, QMCSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages._heartbeat import BaseHeartbeatThread, NullHeartbeatThread, get_heartbeat_thread
from optuna.trial import FrozenTrial, TrialState

from flows import workspace
from flows.spaces import Choice, Scale, Settings, Space

HEARTBEAT_SECONDS, GRACE_SECONDS = 60, 600
"""How often a running trial says that it lives, and the silence after which another machine takes it over."""
MARGIN = 1.1
"""By how much the final comparison may cost more than the trials that it repeats."""
HOUR = 3600
BASE, SAMPLED = "default row", "sampler"
"""Where a trial comes from, beside the ablations that the study was told of."""
DEFAULT = "default"
RUNNING, WAITING, COMPLETE, PRUNED, FAIL = (
    TrialState.RUNNING,
    TrialState.WAITING,
    TrialState.COMPLETE,
    TrialState.PRUNED,
    TrialState.FAIL,
)


def tpe(*, seed: int, startup: int) -> BaseSampler:
    """A tree-structured Parzen estimator over all axes together; trials that run count as bad ones, so that two workers
    do not try the same."""
    return TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=True)


def gp(*, seed: int, startup: int) -> BaseSampler:
    """A Gaussian process."""
    return GPSampler(seed=seed, n_startup_trials=startup, deterministic_objective=False)


def qmc(*, seed: int, startup: int) -> BaseSampler:
    """Points that fill the ranges evenly (Sobol); choices are drawn at random."""
    return QMCSampler(seed=seed, qmc_type="sobol", scramble=True, warn_independent_sampling=False)


def random(*, seed: int, startup: int) -> BaseSampler:
    """Points drawn at random."""
    return RandomSampler(seed=seed)


def asha(*, evaluations: int, reduction: int) -> BasePruner:
    """Asynchronous successive halving: of the trials that reached a rung, one in `reduction` goes on. Rungs lie at
    1, reduction, reduction^2 ... evaluations of the probe."""
    return SuccessiveHalvingPruner(min_resource=1, reduction_factor=reduction)


def hyperband(*, evaluations: int, reduction: int) -> BasePruner:
    """Several successive halvings side by side, which begin at later rungs."""
    return HyperbandPruner(min_resource=1, max_resource=evaluations, reduction_factor=reduction)


def unpruned(*, evaluations: int, reduction: int) -> BasePruner:
    """Every trial runs to its end, and no probe is taken."""
    return NopPruner()


SAMPLERS: dict[str, Callable[..., BaseSampler]] = {"tpe": tpe, "gp": gp, "qmc": qmc, "random": random}
PRUNERS: dict[str, Callable[..., BasePruner]] = {"asha": asha, "hyperband": hyperband, "none": unpruned}
COUNTING = ("qmc",)
"""Samplers whose next point follows from how many they gave."""


@dataclass
class Ongoing:
    """A trial that runs here: its place among the search's trials, what it chose, and what it has cost so far.

    `pruned`: it lags behind; `stopped`: the budget is met. `seconds` of a worker's time by part (`pretrain`, `judge`).
    `told` is what the study knows of it, `beat` its heartbeat.
    """

    trial: optuna.Trial
    place: int
    settings: Settings
    origin: str
    pruned: bool
    stopped: bool = False
    reported: set[int] = field(default_factory=set)
    seconds: dict[str, float] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)
    beat: BaseHeartbeatThread = field(default_factory=NullHeartbeatThread)

    @property
    def spent(self) -> float:
        return sum(list(self.seconds.values()))

    def keep(self, **attributes: Any) -> None:
        """Write what is to be known of the trial into the study, where it is not there."""
        for key, value in attributes.items():
            if self.told.get(key) != value:
                self.trial.set_user_attr(key, value)
                self.told[key] = value


class Course:
    """A search's study: what is tried next, what came of it, and what it has cost."""

    def __init__(
        self, name: str, search: Mapping[str, Any], space: Space, key: str, folder: Path, workers: int
    ) -> None:
        """Open the study, or make it: before anything that works on it starts. Raises UserError.

        `key` names what makes trials comparable; `folder` is where databases lie; `workers` is how many trials run at
        once, and a second of one of them costs a device that part of a second.
        """
        self.name, self.search, self.space, self.workers = name, search, space, workers
        self.running: dict[int, Ongoing] = {}
        self.noting = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        address = storage_address(search, folder / f"{name}-{key[:12]}.db")
        self.storage = masked(address)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner = search["pruner"]
        chosen = {one: pruner[one] for one in ("evaluations", "reduction")}
        with quiet(), readable(address):
            self.again = RetryHeartbeatStaleTrialCallback()
            storage = RDBStorage(
                address,
                # Threads of this process write too, and other machines.
                engine_kwargs={"connect_args": {"timeout": 100}} if address.startswith("sqlite") else None,
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
                heartbeat_stale_trial_callback=self.again,
            )
            self.study = optuna.create_study(
                study_name=f"{name}-{key[:12]}",
                storage=storage,
                direction="maximize",
                pruner=PRUNERS[pruner["name"]](**chosen),
                load_if_exists=True,
            )
        self.axes = {axis.name: distribution(axis) for axis in space.axes}

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Trials of some states, or all, by number."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    def tell(self, results: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Tell a new study the results of ablations: `taken` (settings, score, origin), `left` (why others were not).

        What was told is fixed with the study: a result that comes later would change the way of a search that goes on.
        """
        if "warm" not in self.study.user_attrs:
            self.study.set_user_attr("warm", dict(results()))
        said: Mapping[str, Any] = self.study.user_attrs["warm"]
        there = {trial.user_attrs.get("warm") for trial in self.trials()}
        for index, one in enumerate(said["taken"]):
            if index not in there:
                told = {"warm": index, "origin": one["origin"]}
                known = optuna.create_trial(
                    state=COMPLETE,
                    params=one["settings"],
                    distributions=self.axes,
                    value=one["score"],
                    user_attrs=told,
                )
                self.study.add_trial(known)
        return said

    def next(self) -> Ongoing | None:
        """Begin the next trial, or take up one that was cut off; None where trials or budget are used up."""
        for frozen in self._abandoned():
            return self._begin(optuna.Trial(self.study, frozen._trial_id))
        with quiet():
            optuna.storages.fail_stale_trials(self.study)
        if self.study.user_attrs.get("closed") == self.ends_at or not self.affordable():
            return None
        if not self.trials(WAITING):
            there = latest(self.trials())
            stopped = [one for one in there.values() if state_of(one) == "stopped"]
            if stopped:
                with quiet():
                    self.again(self.study, stopped[0])
            elif len(there) < self.search["trials"]:
                self._enqueue(len(there))
            else:
                return None
        with quiet():
            return self._begin(self.study.ask())

    def _abandoned(self) -> Iterator[FrozenTrial]:
        """Trials whose process has died on this machine, or lives on without them; those of others have heartbeats."""
        for trial in self.trials(RUNNING):
            owner = trial.user_attrs.get("owner", {})
            if trial.number not in self.running and owner.get("host") == socket.gethostname() and not alive(owner):
                yield trial

    def _enqueue(self, place: int) -> None:
        """Draw what the trial at a place tries, and queue it.

        A trial is drawn as a whole in a copy of the study, by a sampler of its own: a kill then finds all of its
        settings in the study or none, and nothing that a sampler remembers is lost with a process.
        """
        chosen: Mapping[str, Any] | None = self.space.settings(self.space.default) if place == 0 else None
        told = {"origin": BASE if chosen else SAMPLED, "owner": owner()}
        if chosen is None:
            sampler, counts = self.search["sampler"], self.search["sampler"]["name"] in COUNTING
            seed = self.search["seed"] if counts else derived(self.search["seed"], place)
            with quiet():
                draft = optuna.create_study(
                    study_name=self.study.study_name,
                    direction="maximize",
                    sampler=SAMPLERS[sampler["name"]](seed=seed, startup=sampler["startup"]),
                    pruner=self.study.pruner,
                )
                draft.add_trials(self.trials())
                for _ in range(place + 1 if counts else 1):
                    drawn = draft.ask(self.axes)
            chosen = drawn.params
        self.study.enqueue_trial(dict(chosen), user_attrs=told)

    def _begin(self, trial: optuna.Trial) -> Ongoing:
        settings: Settings = {axis.name: suggest(trial, axis) for axis in self.space.axes}
        trials, told = self.trials(), trial.user_attrs
        one = Ongoing(trial, places(trials)[trial.number], settings, told["origin"], "pruned_at" in told)
        one.told, one.seconds = dict(told), dict(told.get("seconds", {}))
        one.keep(owner=owner(), stopped=False)
        one.reported = set(trials[trial.number].intermediate_values)
        if one.reported and not one.pruned:
            self._judge(one, max(one.reported))  # a kill may have come between the report and the verdict
        one.beat = get_heartbeat_thread(trial._trial_id, self.study._storage)
        one.beat.start()
        self.running[trial.number] = one
        return one

    def follow(self, one: Ongoing, lines: Sequence[Mapping[str, float]]) -> None:
        """Report a trial's probes, by their number, and find out whether it lags behind.

        Trials of different lengths compare, as each has the same number of probes in equal parts of its own length.
        """
        for line in lines:
            if "probe_score" not in line or one.pruned:
                continue
            step = max(1, round(line["step"] / line["steps"] * self.search["pruner"]["evaluations"]))
            if step not in one.reported:
                one.trial.report(line["probe_score"], step)
                one.reported.add(step)
                self._judge(one, step)

    def _judge(self, one: Ongoing, step: int) -> None:
        # The default row is what all is compared with: it runs to its end.
        if one.trial.should_prune() and one.origin != BASE:
            one.keep(pruned_at=step)
            one.pruned = True

    def ends(self, one: Ongoing) -> bool:
        """Whether a running trial has to end now."""
        one.stopped = one.stopped or self.spent() + self.reserve() > self.budget
        return one.pruned or one.stopped

    def finish(self, one: Ongoing, state: TrialState, score: float | None = None, **attributes: Any) -> None:
        """Tell the study what came of a trial."""
        one.keep(seconds=dict(one.seconds), **attributes)
        self.study.tell(one.trial, score, state=state)
        self.leave(one)

    def leave(self, one: Ongoing) -> None:
        """Let go of a trial; where it is not finished, it is taken up again."""
        if self.running.pop(one.trial.number, None):
            one.beat.join()

    @property
    def budget(self) -> float:
        """Worker-seconds that all of the search may take."""
        return float(self.search["budget_device_hours"]) * HOUR * self.workers

    @property
    def finals(self) -> dict[str, float]:
        """Worker-seconds of the final comparison's runs, by row and seed."""
        return dict(self.study.user_attrs.get("finals", {}))

    def note_final(self, name: str, seconds: float) -> None:
        """Note what a run of the final comparison has taken."""
        with self.noting:
            self.study.set_user_attr("finals", {**self.finals, name: seconds})

    def spent(self) -> float:
        """Worker-seconds that the search has taken, its running trials and the final comparison too."""
        there = [one for one in latest(self.trials()).values() if one.number not in self.running]
        seconds = sum(sum(trial.user_attrs.get("seconds", {}).values()) for trial in there)
        running = sum(one.spent for one in list(self.running.values()))
        return float(seconds + running + sum(self.finals.values()))

    def costs(self) -> dict[int, float]:
        """Worker-seconds of each whole trial, all its seeds, whenever it was measured, by number."""
        return {one.number: one.user_attrs["cost"] for one in self.trials(COMPLETE) if "cost" in one.user_attrs}

    def reserve(self) -> float:
        """Worker-seconds that the final comparison will still take, by what the same rows took as trials."""
        costs, there = self.costs(), self.finals
        if not costs:
            return 0.0
        mean, best = sum(costs.values()) / len(costs), self.best()
        # While the default row leads, what beats it may still come.
        leader = self.label(best) if self.label(best) != DEFAULT else ""
        arms = {DEFAULT: costs.get(self.default(), mean), leader: costs.get(best.number, mean)}
        seeds = self.search["seeds"]
        left = sum(cost for arm, cost in arms.items() for seed in seeds if f"{arm} {seed}" not in there)
        return MARGIN * left / len(self.search["trial_seeds"])

    def affordable(self) -> bool:
        """Whether one more whole trial fits into the budget, by the cost of those so far. Raises UserError.

        The final comparison's cost is reserved, and running trials are taken to run to their ends.
        """
        costs = list(self.costs().values())
        whole, reserve = sum(costs) / len(costs) if costs else 0.0, self.reserve()
        if whole + reserve > self.budget and len(costs) <= self.workers:
            need, given = (whole + reserve) / HOUR / self.workers, self.search["budget_device_hours"]
            raise workspace.UserError(
                f"params/search.yaml: {self.name}.budget_device_hours: found {given:g}; one trial and the final "
                f"comparison alone take {need:.3f}; give several times that, or fewer seeds"
            )
        rest = sum(max(0.0, whole - one.spent) for one in list(self.running.values()))
        return self.spent() + rest + whole + reserve <= self.budget

    def best(self) -> FrozenTrial:
        """The trial of the highest score, told results among them; the first of equals."""
        return max(self.trials(COMPLETE), key=lambda trial: (trial.value, -trial.number))

    def default(self) -> int:
        """The number of the trial that is the default row; -1 where the space does not hold it."""
        found = latest(self.trials()).get(0)
        return found.number if found and found.user_attrs.get("origin") == BASE else -1

    def label(self, trial: FrozenTrial) -> str:
        """Name a trial's row in the final comparison."""
        return DEFAULT if trial.params == self.space.settings(self.space.default) else f"trial {trial.number}"

    @property
    def ends_at(self) -> dict[str, Any]:
        """What ends the search; one that has ended goes on where it is changed."""
        return {key: self.search[key] for key in ("trials", "budget_device_hours")}

    def close(self) -> None:
        """Note that the search has ended: what is left of its budget begins nothing more."""
        self.study.set_user_attr("closed", self.ends_at)

    def report(self) -> list[dict[str, Any]]:
        """Say what came of each trial, told results first; a trial that was taken up again is one trial."""
        trials = self.trials()
        told = [(None, trial) for trial in trials if "warm" in trial.user_attrs]
        return [
            {
                "number": trial.number,
                "place": place,
                "state": state_of(trial),
                "settings": self.space.tidy(trial.params),
                "score": trial.value if trial.state == COMPLETE else None,
                "reports": {str(step): value for step, value in sorted(trial.intermediate_values.items())},
                "device_seconds": sum(trial.user_attrs.get("seconds", {}).values()) / self.workers,
                "origin": trial.user_attrs.get("origin", SAMPLED),
                "error": trial.user_attrs.get("error"),
                "mlflow_run_id": trial.user_attrs.get("mlflow_run_id"),
            }
            for place, trial in (*told, *latest(trials).items())
        ]

    def importances(self) -> dict[str, float]:
        """The share of the scores' variation that each axis accounts for; empty where too few trials are completed."""
        with quiet():
            try:
                return {key: float(share) for key, share in optuna.importance.get_param_importances(self.study).items()}
            except (ValueError, RuntimeError):
                return {}

    def draw(self, folder: Path) -> list[Path]:
        """Write Optuna's own plots as pages that need no network: one script is shared by all, beside them."""
        import plotly.offline  # type: ignore[import-untyped]
        from optuna import visualization

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plotly.min.js").write_text(plotly.offline.get_plotlyjs())
        pages = []
        for name in (
            "optimization_history",
            "param_importances",
            "parallel_coordinate",
            "slice",
            "intermediate_values",
        ):
            with quiet(), contextlib.suppress(ValueError, RuntimeError):  # too few trials for this one
                figure = getattr(visualization, f"plot_{name}")(self.study)
                figure.write_html(folder / f"{name}.html", include_plotlyjs="directory")
                pages.append(folder / f"{name}.html")
        return pages


def distribution(axis: Scale | Choice) -> BaseDistribution:
    """What Optuna samples an axis from."""
    if isinstance(axis, Choice):
        return CategoricalDistribution(list(axis.labels))
    if axis.whole:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log, step=int(axis.step or 1))
    return FloatDistribution(axis.low, axis.high, log=axis.log, step=axis.step)


def suggest(trial: optuna.Trial, axis: Scale | Choice) -> float | int | str:
    """Choose for an axis: what the trial was queued with."""
    if isinstance(axis, Choice):
        return str(trial.suggest_categorical(axis.name, list(axis.labels)))
    if axis.whole:
        step = int(axis.step or 1)
        return trial.suggest_int(axis.name, int(axis.low), int(axis.high), log=axis.log, step=step)
    return trial.suggest_float(axis.name, axis.low, axis.high, log=axis.log, step=axis.step)


def places(trials: Sequence[FrozenTrial]) -> dict[int, int]:
    """Give each trial its place among the search's own, by number: one that is tried again keeps its first place."""
    found: dict[int, int] = {}
    count = 0
    for trial in sorted(trials, key=lambda trial: trial.number):
        first = trial.system_attrs.get("failed_trial")
        if "warm" in trial.user_attrs:
            continue
        if first is None:
            found[trial.number], count = count, count + 1
        else:
            found[trial.number] = found[first]
    return found


def latest(trials: Sequence[FrozenTrial]) -> dict[int, FrozenTrial]:
    """Give the search's own trials by place, each as it was tried last."""
    given = places(trials)
    return {given[one.number]: one for one in sorted(trials, key=lambda one: one.number) if one.number in given}


def state_of(trial: FrozenTrial) -> str:
    if trial.state == FAIL:
        return "stopped" if trial.user_attrs.get("stopped") else "failed"
    return trial.state.name.lower()


def owner() -> dict[str, Any]:
    """This process, as others can find out whether it lives."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "born": psutil.Process().create_time()}


def alive(owner: Mapping[str, Any]) -> bool:
    """Whether the process lives that runs a trial, and is not this one, which knows its own."""
    try:
        return bool(owner["pid"] != os.getpid() and psutil.Process(owner["pid"]).create_time() == owner["born"])
    except psutil.NoSuchProcess:
        return False


def derived(seed: int, place: int) -> int:
    """A seed for each place."""
    return int(workspace.digest([seed, place])[:8], 16) % 2**31


def storage_address(search: Mapping[str, Any], file: Path) -> str:
    """The database's address: `UNMASK_OPTUNA_STORAGE`, else the row's, else a file. Raises UserError."""
    given = search["storage"] or ""
    if given and given != masked(given):
        raise workspace.UserError(
            "params/search.yaml: storage: it holds a password, and params are recorded; leave the key out and put the "
            "address into the environment variable UNMASK_OPTUNA_STORAGE"
        )
    address = os.environ.get("UNMASK_OPTUNA_STORAGE") or given or f"sqlite:///{file}"
    if not address.startswith(("sqlite:///", "postgresql")):
        raise workspace.UserError(
            f"the database's address: found '{masked(address)}'; it must begin with postgresql:// or sqlite:///"
        )
    return address


def masked(address: str) -> str:
    """An address as it may be written down."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(address).render_as_string(hide_password=True)
    except ArgumentError:
        return "no address of a database"


@contextlib.contextmanager
def readable(address: str) -> Iterator[None]:
    """Turn a database's faults into the user's, without the password."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, ImportError, optuna.exceptions.StorageInternalError) as error:
        hint = "; pip install 'unmask[pg]' brings its driver" if isinstance(error, ImportError) else ""
        said = workspace.first_line(error.__cause__ or error)
        raise workspace.UserError(f"{masked(address)}: the study's database does not open{hint} ({said})") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Optuna's warnings of what is experimental, or meant for its own loop, from the terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
