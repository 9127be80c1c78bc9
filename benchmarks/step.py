"""Time a training step of ours beside `transformers`, `lightly` and plain timm, in turns.

    python benchmarks/step.py                    # CPU: all cases, one thread and two
    python benchmarks/step.py --device cuda      # one GPU: needs the core's packages only (pyproject.toml)

Ours is what a pretraining job runs: its objective, optimiser, clipping, schedule and reports, by `mim_core.train.train`
(checkpoints: see `layers.py`). A peer does forward, backward, clipping and AdamW (fused), on images that are normalised
already and under the same masks. Peers that are not installed are left out; `pip install transformers lightly` in an
environment of your own brings them. In each round every contender trains for a turn of some `--seconds`; a ratio is
taken within its round, and the median of the rounds is given with their spread. On a CPU the measure is images per
CPU-second, on a GPU per second. bf16 is left out on a processor that has no instructions for it, where it is emulated.

Writes benchmarks/step.<device>.json and the table benchmarks/step.<device>.md.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import statistics
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# As the product's own workers: threads that spin for long starve where anything else wants a core.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch
from machine import Turn, described, drawn_pack, table, timed
from peers import PEERS, Batch, Peer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mim_core import devices
from mim_core.data.pack import Pack
from mim_core.devices import Compute
from mim_core.jobs.pretrain import begin
from mim_core.jobs.run import REPORTS, Run
from mim_core.masks import MASKS
from mim_core.params import PretrainRow
from mim_core.pretext import Masked, MaskedFetch, Pretext
from mim_core.spec import bind, check
from mim_core.train import taker, train
from mim_core.transforms import normalise

BATCHES = 4
"""Batches that each contender goes round."""
STEPS = 100_000
"""Steps of the run that ours is at the beginning of; more than a benchmark does, so that it does not end."""


CPU = ["simmim_vit_tiny_64", "simmim_vit_s_224", "mae_vit_s_224", "beit_s_224", "simmim_swin_t_192"]
"""The cases of a CPU; those of a GPU are the tiny one and the papers' base and large models."""
GPU = ["simmim_vit_tiny_64", "simmim_vit_b_224", "mae_vit_l_224", "beit_b_224", "simmim_swin_b_192"]


@dataclass(frozen=True)
class Case:
    """A method on an encoder; `kind` names its peers. `depths` and `heads` are of one stage in a plain ViT."""

    kind: str
    said: str
    size: int
    patch_px: int
    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    batch: int
    ratio: float = 0.6
    unit_px: int = 32
    window: int = 0
    codes: int = 0

    def row(self, precision: str, batch: int) -> PretrainRow:
        """The row of our side."""
        vit = {"name": "vit", "width": self.width, "depth": self.depths[0], "heads": self.heads[0]}
        swin = {"name": "swin", "width": self.width, "depths": list(self.depths), "heads": list(self.heads)}
        encoder = {**swin, "window": self.window} if self.window else vit
        pieces: dict[str, Any] = {"fill": "mask_token", "head": "linear", "target": "pixels", "loss": "l1"}
        if self.kind == "mae":
            encoder |= {"positions": "sincos", "init": "xavier"}
            target = {"name": "pixels", "normalise": "patch"}
            pieces = {"fill": "drop", "head": "transformer_decoder", "target": target, "loss": "l2"}
        if self.kind == "beit":
            encoder |= {"positions": "relative", "layer_scale": 0.1}
            pieces |= {"target": {"name": "tokens", "fitted": "drawn"}, "loss": "cross_entropy"}
        row = {
            "data": "drawn",
            "encoder": {**encoder, "patch_px": self.patch_px},
            "mask": {"name": "random", "ratio": self.ratio, "unit_px": self.unit_px},
            **pieces,
            "optim": {"lr": 1e-4, "batch": batch, "epochs": STEPS, "clip": 5.0, "warmup_epochs": 10},
            "precision": precision,
        }
        return check(PretrainRow, row, "row")


CASES = {
    "simmim_vit_b_224": Case("simmim_vit", "SimMIM ViT-B 224", 224, 16, 768, (12,), (12,), 4),
    "mae_vit_l_224": Case("mae", "MAE ViT-L 224", 224, 16, 1024, (24,), (16,), 8, ratio=0.75, unit_px=16),
    "beit_b_224": Case("beit", "BEiT-B 224, 8192 tokens", 224, 16, 768, (12,), (12,), 4, 0.4, 16, codes=8192),
    "simmim_swin_b_192": Case(
        "simmim_swin", "SimMIM Swin-B 192", 192, 4, 128, (2, 2, 18, 2), (4, 8, 16, 32), 4, window=6
    ),
    "simmim_vit_tiny_64": Case("simmim_vit", "SimMIM ViT-tiny 64 px", 64, 8, 192, (12,), (3,), 64, unit_px=8),
    "simmim_vit_s_224": Case("simmim_vit", "SimMIM ViT-S 224", 224, 16, 384, (12,), (6,), 8),
    "mae_vit_s_224": Case("mae", "MAE ViT-S 224", 224, 16, 384, (12,), (6,), 16, ratio=0.75, unit_px=16),
    "beit_s_224": Case("beit", "BEiT-S 224, 8192 tokens", 224, 16, 384, (12,), (6,), 8, 0.4, 16, codes=8192),
    "simmim_swin_t_192": Case(
        "simmim_swin", "SimMIM Swin-tiny 192", 192, 4, 96, (2, 2, 6, 2), (3, 6, 12, 24), 4, window=6
    ),
}


class Drawn(nn.Module):
    """Stands for a tokenizer whose tokens are known: BEiT's peers take them as labels, so none is timed."""

    def __init__(self, codes: int, stride: int) -> None:
        super().__init__()
        self.codes, self.stride, self.drawn = codes, stride, torch.empty(0)

    def tokens(self, images: Tensor) -> Tensor:
        return self.drawn[: len(images)]


def ours(case: Case, batch: int, compute: Compute, pack: Pack, folder: Path) -> Turn:
    """Our side: what `mim_core.jobs.pretrain` runs."""
    torch.manual_seed(0)
    tokenizer = Drawn(case.codes, case.patch_px) if case.codes else None
    row = case.row("bf16" if compute.bf16 else "fp32", batch)
    objective, trained, players, steps = begin(row, pack, 0, compute, tokenizer)
    if tokenizer:
        tokenizer.drawn = labels(case, objective, batch).reshape(batch, *objective.model.encoder.grid.shape)
        tokenizer.drawn = tokenizer.drawn.to(compute.device)
    batches = masked(case, objective, pack, batch)
    if compute.device.type == "cuda":
        batches = [one.pin_memory() for one in batches]
    run = Run(folder, trained, players, steps, row.checkpoint_minutes)
    done = run.resume()
    take = taker(objective, players)
    every = max(1, steps // REPORTS)

    def turn(count: int) -> None:
        nonlocal done
        train(
            objective,
            players,
            itertools.islice(itertools.cycle(batches), count),
            seed=0,
            start=done,
            steps=steps,
            report=run.report,
            report_every=min(every, 20),
            save=run.save,
            save_every=every,
            evaluate=lambda step: {},
            evaluate_every=0,
            window=run.window,
            take=take,
        )
        done += count

    return turn


def theirs(case: Case, batch: int, compute: Compute, pack: Pack, make: Callable[[Any], Peer]) -> Turn:
    """A peer's side, as its own examples train."""
    torch.manual_seed(0)
    objective, *_ = begin(case.row("fp32", batch), pack, 0, Compute(torch.device("cpu"), False), _drawn(case))
    given = [
        Batch(
            normalise(one.images, pack.mean, pack.std).to(compute.device),
            one.hidden.to(compute.device),
            labels(case, objective, batch).to(compute.device),
        )
        for one in masked(case, objective, pack, batch)
    ]
    endless = itertools.cycle(given)
    peer = make(case).to(compute.device).train()
    optimiser = torch.optim.AdamW(peer.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

    def turn(count: int) -> None:
        for one in itertools.islice(endless, count):
            with compute.autocast():
                loss = peer.loss(one)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(peer.parameters(), 5.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    return turn


def _drawn(case: Case) -> nn.Module | None:
    return Drawn(case.codes, case.patch_px) if case.codes else None


def masked(case: Case, objective: Pretext, pack: Pack, batch: int) -> list[Masked]:
    """Batches from the product's own loader; all of one number of hidden patches."""
    mask = None if objective.drawn else bind(MASKS, case.row("fp32", batch).mask)
    fetch = MaskedFetch(pack.split("train"), objective.model.encoder.grid, mask, None, 0)
    return [fetch([(epoch, index) for index in range(batch)]) for epoch in range(BATCHES)]


def labels(case: Case, objective: Pretext, batch: int) -> Tensor:
    shape = (batch, objective.model.encoder.grid.count)
    return torch.randint(max(1, case.codes), shape, generator=torch.Generator().manual_seed(0))


def contenders(
    case: Case, batch: int, device: torch.device, pack: Pack, folder: Path, precisions: list[str], own_only: bool
) -> dict[tuple[str, str], Callable[[], Turn]]:
    """Who takes part, by name and precision: how to make each."""
    found: dict[tuple[str, str], Callable[[], Turn]] = {}
    for precision in precisions:
        compute = Compute(device, precision == "bf16")
        found["ours", precision] = partial(ours, case, batch, compute, pack, folder / precision)
        for name, make in {} if own_only else PEERS[case.kind].items():
            try:
                __import__(name)
            except ImportError:
                print(f"{name} is not installed and left out: pip install {name}", flush=True)
                continue
            found[name, precision] = partial(theirs, case, batch, compute, pack, make)
    return found


def peak_mib(make: Callable[[], Turn], device: torch.device) -> float:
    """Peak memory of two steps in MiB: on a CPU what a fresh process grows by while it builds and trains."""
    if device.type != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        make()(2)
        return torch.cuda.max_memory_allocated() / 2**20
    reading, writing = os.pipe()
    if not (child := os.fork()):
        try:
            gc.collect()
            if sys.platform == "linux":  # else what this process has freed and kept would be used again, uncounted
                ctypes.CDLL(None).malloc_trim(0)
            before = _resident("VmRSS")
            make()(2)
            os.write(writing, f"{_resident('VmHWM') - before}".encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        grown = float(said.read() or "nan")
    os.waitpid(child, 0)
    return grown


def _resident(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def gemm(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large matrix product, the best of ten."""
    side = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def turn(count: int) -> None:
        torch.mm(a, b, out=out)

    return 2 * side**3 / min(timed(turn, 1, device) for _ in range(10))


def flops(case: Case, pack: Pack, folder: Path) -> float:
    """FLOPs an image of the matrix products and convolutions of one of our steps, forward and backward."""
    batch = 2
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        turn = ours(case, batch, Compute(torch.device("cpu"), False), pack, folder / "flops")
        with FlopCounterMode(display=False) as counter:
            turn(1)
    return float(counter.get_total_flops()) / batch


def measure(case: Case, given: argparse.Namespace, device: torch.device, precisions: list[str]) -> dict[str, Any]:
    """All that is known of a case."""
    batch = given.batch or case.batch * (1 if device.type == "cpu" else 32)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pack = drawn_pack((case.size, case.size), batch, folder / "pack")
        makers = contenders(case, batch, device, pack, folder, precisions, given.own_only)
        memory = {} if given.no_memory else {name: peak_mib(make, device) for name, make in makers.items()}
        turns = {name: make() for name, make in makers.items()}
        work = flops(case, pack, folder) * batch
        said: dict[str, Any] = {"batch": batch, "flops_per_step": work, "threads": {}}
        for threads in given.threads if device.type == "cpu" else [torch.get_num_threads()]:
            torch.set_num_threads(threads)
            said["threads"][str(threads)] = rounds(turns, batch, work, given, device, precisions)
    said["peak_mib"] = {" ".join(name): round(value, 1) for name, value in memory.items()}
    return said


def rounds(
    turns: dict[tuple[str, str], Turn],
    batch: int,
    work: float,
    given: argparse.Namespace,
    device: torch.device,
    precisions: list[str],
) -> dict[str, Any]:
    """Time all in turns, in one order and then the other."""
    steps = {}
    for name, turn in turns.items():
        if device.type != "cpu":
            timed(turn, 8, device)  # compiles, and records a step
        steps[name] = max(1, round(given.seconds / timed(turn, 1, device)))
    rates: dict[tuple[str, str], list[float]] = {name: [] for name in turns}
    peaks: dict[str, list[float]] = {precision: [] for precision in precisions}
    for index in range(given.rounds):
        for name in list(turns)[:: -1 if index % 2 else 1]:
            rates[name].append(steps[name] * batch / timed(turns[name], steps[name], device))
        for precision in precisions:
            peaks[precision].append(gemm(device, torch.bfloat16 if precision == "bf16" else torch.float32))
    best = "bf16" if "bf16" in precisions else "fp32"
    ratios = {}
    for (name, precision), theirs in rates.items():
        # Both as they ship (ours in the precision that it chooses), and both in the same.
        for mine in {best, precision} if name != "ours" else {}:
            each = [a / b for a, b in zip(rates["ours", mine], theirs, strict=True)]
            spread = {"median": statistics.median(each), "lowest": min(each), "highest": max(each), "rounds": each}
            ratios[f"ours {mine} / {name} {precision}"] = spread
    return {
        "images_per_s": {" ".join(name): statistics.median(one) for name, one in rates.items()},
        "utilisation": {
            " ".join(name): statistics.median(
                rate * work / batch / peak for rate, peak in zip(one, peaks[name[1]], strict=True)
            )
            for name, one in rates.items()
            if name[0] == "ours"
        },
        "gemm_gflops": {precision: max(one) / 1e9 for precision, one in peaks.items()},
        "ratios": ratios,
    }


def lines(said: dict[str, Any]) -> str:
    """The table: a line a ratio."""
    rows = []
    for name, one in said["cases"].items():
        for threads, found in one["threads"].items():
            for ratio, value in found["ratios"].items():
                mine, other = (part.strip() for part in ratio.split("/"))
                rows.append(
                    [
                        CASES[name].said,
                        threads,
                        mine.removeprefix("ours "),
                        other,
                        f"{value['median']:.2f} ({value['lowest']:.2f}-{value['highest']:.2f})",
                        f"{found['images_per_s'][mine]:.1f}",
                        f"{found['images_per_s'][other]:.1f}",
                        f"{found['utilisation'][mine]:.0%}",
                        *(f"{one['peak_mib'].get(key, float('nan')):.0f}" for key in (mine, other)),
                    ]
                )
    unit = "images/s" if said["device"] == "cuda" else "images/CPU-s"
    head = ["case", "threads", "ours in", "peer", "ratio (spread)", f"{unit}, ours", f"{unit}, peer", "of GEMM, ours"]
    return table([*head, "MiB, ours", "MiB, peer"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="instead of the device's")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn, about")
    parser.add_argument("--batch", type=int, help="images a step, instead of the case's")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), help="instead of what the device gains by")
    parser.add_argument("--own-only", action="store_true", help="without peers")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    device = torch.device(given.device)
    gains = devices.choose(given.device).bf16
    devices.keep_freed_memory()  # as a job does; the peers gain by it as well
    precisions = given.precisions or (["fp32", "bf16"] if gains else ["fp32"])
    said: dict[str, Any] = {"device": given.device, "machine": described(device), "bf16": gains, "cases": {}}
    for name in given.cases or (GPU if given.device == "cuda" else CPU):
        torch.set_num_threads(1)
        print(CASES[name].said, flush=True)
        said["cases"][name] = measure(CASES[name], given, device, precisions)
        (given.out / f"step.{given.device}.json").write_text(json.dumps(said, indent=1) + "\n")
        (given.out / f"step.{given.device}.md").write_text(lines(said))
    print(lines(said))


if __name__ == "__main__":
    main()
