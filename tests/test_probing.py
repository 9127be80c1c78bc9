"""The probe while pretraining: ridge regression as scikit-learn's, on the same images each time, changing nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from core_pieces import OPTIM, PRETRAIN, pretrain_row, source
from sklearn.linear_model import RidgeCV

from mim_core.data.pack import Pack, Sample, Source, open_pack, write
from mim_core.devices import Compute
from mim_core.files import read_curve
from mim_core.jobs import perform, pretrain
from mim_core.probing import PENALTIES, Linear, Probing, fit
from mim_core.spec import SpecError

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Compute(torch.device("cpu"), bf16=False)
PROBE = {"labels": 24, "evaluations": 4}
LONG = {**OPTIM, "epochs": 12}  # 48 steps
# Batch normalisation keeps moments of what it sees in training mode, and a critic trains beside it.
NORMED = {
    "encoder": {"name": "conv", "base": 4, "layers": 2, "bottleneck": 8},
    "mask": "central",
    "fill": "colour",
    "head": {"name": "channelwise_decoder", "base": 4, "region": "centre"},
    "loss": "l2",
    "adversarial": {"weight": 0.01, "base": 4},
}


def probed(folder: Path) -> dict[int, float]:
    return {line["step"]: line["probe_score"] for line in read_curve(folder / "curve.jsonl") if "probe_score" in line}


@pytest.mark.parametrize("count", [20, 200])
def test_the_fit_is_ridge_regression_with_the_best_generalised_criterion(count: int) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(count, 30)) * rng.uniform(0.1, 9, 30) + 5
    features[:, 3] = 7.0  # a constant feature has no scale
    wanted = np.eye(4)[rng.integers(0, 4, count)] + 0.1 * features[:, :4]
    criterion, (mean, scale, weights) = fit(torch.from_numpy(features), torch.from_numpy(wanted))
    standard = (features - mean.numpy()) / scale.numpy()
    criteria = []
    for penalty in count * PENALTIES.numpy():
        # By its definition: n |y - Hy|^2 / trace(1 - H)^2, H with the mean.
        hat = standard @ np.linalg.solve(standard.T @ standard + penalty * np.eye(30), standard.T) + 1 / count
        criteria.append(count * np.square(wanted - hat @ wanted).sum() / (count - np.trace(hat)) ** 2)
    assert criterion == pytest.approx(min(criteria), rel=1e-6)
    chosen = float(count * PENALTIES[int(np.argmin(criteria))])
    theirs = RidgeCV([chosen]).fit(standard, wanted)
    np.testing.assert_allclose(weights.numpy(), theirs.coef_.T, atol=1e-8)


def test_probes_come_evenly_and_at_the_end(pack: Pack, tmp_path: Path) -> None:
    result = pretrain(pretrain_row(optim=LONG), pack, tmp_path, 0, probe=PROBE)
    scores = probed(tmp_path)
    assert list(scores) == [12, 24, 36, 48]
    # Brightness tells the classes: any encoder's features hold it.
    assert result["probe_score"] == scores[48] > 0.9
    assert result["probe_block"] in {1, 2}


@pytest.mark.parametrize(("steps", "evaluations"), [(2057, 4), (748, 3), (100, 8), (7, 4), (3, 16)])
def test_as_many_probes_as_asked_where_there_are_steps(steps: int, evaluations: int) -> None:
    probing = Probing(evaluations=evaluations)
    every = max(1, steps // (evaluations * -(-8 // evaluations)))
    at = [step for step in range(1, steps + 1) if step % every == 0 or step == steps]
    due = [step for step in at if probing.due(step, steps, every)]
    assert len(due) == min(evaluations, steps)
    assert due[-1] == steps
    assert max(np.diff([0, *due])) <= 2 * steps / evaluations + 1


@pytest.mark.parametrize("changes", [{}, NORMED])
def test_what_is_trained_is_the_same_bit_for_bit_with_a_probe_and_without(
    pack: Pack, tmp_path: Path, changes: dict[str, Any]
) -> None:
    row = pretrain_row(optim=LONG, **changes)
    for name, probe in (("with", PROBE), ("without", None)):
        pretrain(row, pack, tmp_path / name, 3, probe=probe)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1]
    curves = [read_curve(tmp_path / name / "curve.jsonl") for name in ("with", "without")]
    passing = {"seconds", "time", "images_per_s", "probe_score", "probe_block"}
    plain = [[{key: line[key] for key in line.keys() - passing} for line in curve] for curve in curves]
    # So short a run is evaluated at its end only, where no probe asks for more.
    evaluated = [[line for line in curve if "loss" not in line] for curve in plain]
    assert [line["step"] for line in evaluated[0]] == [12, 24, 36, 48]
    assert evaluated[0][-1:] == evaluated[1]
    trained = [[line for line in curve if "loss" in line] for curve in plain]
    assert trained[0] == trained[1]
    assert len(trained[0]) == 48


def test_a_run_is_not_evaluated_more_often_than_every_150_steps(pack: Pack, tmp_path: Path) -> None:
    pretrain(pretrain_row(optim={**LONG, "epochs": 80}), pack, tmp_path, 0)
    found = [line["step"] for line in read_curve(tmp_path / "curve.jsonl") if "validation_loss" in line]
    assert found == [160, 320]


def test_a_resumed_run_has_the_same_probes(pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {**PRETRAIN, "optim": LONG, "checkpoint_minutes": 1.0e-6}
    job = {"kind": "pretrain", "row": row, "pack": str(pack.folder), "seed": 5, "threads": 1, "fitted": None}
    perform({**job, "probe": PROBE, "folder": str(tmp_path / "whole")})
    killed = {**job, "probe": PROBE, "folder": str(tmp_path / "killed")}
    score, asked = Linear.score, iter(range(9))

    def dies(self: Linear, encoder: Any) -> dict[str, float]:
        if next(asked) == 2:
            raise KeyboardInterrupt
        return score(self, encoder)

    with monkeypatch.context() as patched:
        patched.setattr(Linear, "score", dies)
        with pytest.raises(KeyboardInterrupt):
            perform(killed)
    assert list(probed(tmp_path / "killed")) == [12, 24]
    perform(killed)
    assert probed(tmp_path / "killed") == probed(tmp_path / "whole")
    assert list(probed(tmp_path / "whole")) == [12, 24, 36, 48]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert weights[0] == weights[1]


def test_the_seed_chooses_the_labels_evenly_over_the_classes(pack: Pack) -> None:
    first, again, other = (Linear(pack, 24, seed, CPU).chosen for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()
    assert np.bincount(pack.split("train").labels[first]).tolist() == [6, 6, 6, 6]


def test_what_no_probe_can_judge_is_refused_before_training(pack: Pack, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^probe\.labels: found 65; the training split has 64 labelled images"):
        pretrain(pretrain_row(), pack, tmp_path, 0, probe={"labels": 65})
    with pytest.raises(SpecError, match=r"probe\.label: .*labels"):
        pretrain(pretrain_row(), pack, tmp_path, 0, probe={"label": 5})
    given = source()
    unlabelled = Source([], given.counts, lambda split: (Sample(one.image) for one in given.samples(split)))
    write(unlabelled, tmp_path / "plain", {"source": {"name": "plain"}})
    with pytest.raises(ValueError, match="probe: plain has no training image with a class"):
        pretrain(pretrain_row(), open_pack(tmp_path / "plain"), tmp_path, 0, probe={})
    assert not (tmp_path / "curve.jsonl").exists()
    assert json.loads((tmp_path / "plain/meta.json").read_text())["classes"] == []
