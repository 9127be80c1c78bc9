"""The ledger: every run once, sums by stage, and energy that says what it assumes."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest

from flows.ledger import as_csv, ledger
from flows.workspace import UserError

XEON = {"device": "Intel(R) Xeon(R) Platinum 8488C", "type": "cpu", "threads": 2}


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNMASK_WATTS", raising=False)


def run(stage: str, row: str, hours: float, compute: dict[str, Any] = XEON, **more: Any) -> dict[str, Any]:
    return {
        "stage": stage, "row": row, "wall_seconds": 1800 * hours, "device_hours": hours, "images_seen": 1000,
        "compute": compute, **more,
    }  # fmt: skip


def test_each_run_is_a_line_and_each_stage_a_sum() -> None:
    found = ledger([run("pretrain", "a", 0.5), run("pretrain", "b", 0.25), run("ablate", "head", 1.0)])
    assert [(line.stage, line.row, line.device_hours) for line in found.lines] == [
        ("pretrain", "a", 0.5), ("pretrain", "b", 0.25), ("ablate", "head", 1.0),
    ]  # fmt: skip
    assert [(one.stage, one.runs, one.device_hours, one.images_seen) for one in found.sums] == [
        ("pretrain", 2, 0.75, 2000), ("ablate", 1, 1.0, 1000),
    ]  # fmt: skip
    assert (found.total.runs, found.total.device_hours, found.total.wall_seconds) == (3, 1.75, 3150.0)


def test_energy_of_a_cpu_is_by_its_cores_also_for_runs_of_one_thread() -> None:
    found = ledger([run("pretrain", "a", 1.0), run("downstream", "b", 2.0, {**XEON, "threads": 1})])
    assert [line.kwh for line in found.lines] == pytest.approx([0.012, 0.024])
    assert found.total.kwh == pytest.approx(0.036)
    assert "an estimate, not a measurement" in found.note
    assert "6 W a core x 2 for Intel(R) Xeon(R) Platinum 8488C" in found.note


@pytest.mark.parametrize(
    ("device", "watts"),
    [
        ("NVIDIA H100 80GB HBM3", 700), ("NVIDIA H100 PCIe", 350), ("NVIDIA L40S", 300), ("NVIDIA L4", 72),
        ("NVIDIA GeForce RTX 4090", 450), ("Tesla V100-SXM2-32GB", 300), ("Something new", 300),
    ],
)  # fmt: skip
def test_energy_of_a_gpu_is_by_its_board(device: str, watts: float) -> None:
    found = ledger([run("pretrain", "a", 2.0, {"device": device, "type": "cuda", "threads": 16})])
    assert found.total.kwh == pytest.approx(2 * watts / 1000)
    assert f"{watts} W a board for {device}" in found.note


def test_the_assumption_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMASK_WATTS", "250")
    found = ledger([run("pretrain", "a", 2.0)])
    assert found.total.kwh == pytest.approx(0.5)
    assert "250 W a device (UNMASK_WATTS)" in found.note
    for wrong in ("much", "-1", "inf", ""):
        monkeypatch.setenv("UNMASK_WATTS", wrong)
        with pytest.raises(UserError, match=f"UNMASK_WATTS: found '{wrong}'; it must be the watts of a device"):
            ledger([run("pretrain", "a", 2.0)])


def test_the_csv_has_a_line_a_run_and_what_was_assumed() -> None:
    (line,) = csv.DictReader(io.StringIO(as_csv(ledger([run("search", 'odd, "name"', 0.5, images_seen=None)]))))
    assert line["row"] == 'odd, "name"'
    assert (line["device_hours"], line["assumed_watts"], line["estimated_kwh"]) == ("0.5", "12.0", "0.006")
    assert line["images_seen"] == "0"


def test_nothing_published_costs_nothing() -> None:
    found = ledger([])
    assert (found.lines, found.sums, found.total.kwh) == ([], [], 0)
