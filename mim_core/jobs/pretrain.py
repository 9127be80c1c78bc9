"""Pretrain a row on a pack's training images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mim_core import checkpoint, devices, gallery, ranks
from mim_core.adversarial import Critic
from mim_core.data.order import Order
from mim_core.data.pack import Pack, Split
from mim_core.grid import Grid
from mim_core.jobs.run import Run, about, evaluations, player, result
from mim_core.losses import LOSSES
from mim_core.masks import MASKS, MASKS_OF_MANY, OBJECT_MASKS, avg_distance, generator, generators, random
from mim_core.metrics.pictures import hole_psnr
from mim_core.optim import Player, adamw
from mim_core.params import PretrainRow, TokenizerOf
from mim_core.pretext import Box, Drawn, Masked, MaskedFetch, MaskedModel, Pretext, Scope, assemble, hole
from mim_core.probing import Linear, Probing
from mim_core.spec import bind, build, check
from mim_core.tokenizers import TOKENIZERS
from mim_core.train import Scalars

EVALUATIONS = 8
VALIDATED, SHOWN, RECOVERED = 512, 8, 6
MEASURED = 256
"""Masks over which hidden share and average distance are taken."""


def pretrain(
    row: PretrainRow,
    pack: Pack,
    folder: Path,
    seed: int,
    fitted: Path | None = None,
    probe: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Pretrain a row; products: encoder, whole model, gallery, recovery.

    `fitted` is the file of the tokenizer that the target needs. `probe`, in the words of `Probing`, has a linear
    classifier judge the encoder on the way: `probe_score` of some of the curve's lines; what is trained is the same
    with it. Gives the final scalars: losses, hole-only PSNR in dB on validation images where the target is a picture,
    share of the pixels hidden, SimMIM's AvgDist in px, seconds, images seen; nothing on ranks above 0, as rank 0 tells.
    Raises ValueError for a probe that the dataset has no labels for.
    """
    compute = devices.choose(precision=row.precision)
    probing = check(Probing, dict(probe), "probe") if probe is not None else None
    linear = Linear(pack, probing.labels, seed, compute) if probing else None
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(fitted, pack.channels) if fitted else None
    objective, trained, players, steps = begin(row, pack, seed, compute, tokenizer)
    model, target, encoder = objective.model, objective.target, objective.model.encoder
    mask = bind(MASKS, row.mask)
    images, held = pack.split("train"), pack.split("validation")
    # Validation masks are those of epoch 0 under the row's seed: the same at every evaluation.
    seen = MaskedFetch(held, encoder.grid, mask, None, seed)([(0, i) for i in range(min(VALIDATED, len(held)))])
    if ranks.count() > 1:
        objective.shared = ranks.shared(model)
    run = Run(folder, trained, players, steps, row.checkpoint_minutes)
    times = evaluations(steps, EVALUATIONS)
    if probing:
        # A multiple of the probes, so that each falls on an evaluation.
        times = probing.evaluations * math.ceil(times / probing.evaluations)

    def evaluate(step: int) -> Scalars:
        trained.eval()
        with torch.no_grad():
            *_, (_, value) = objective.losses(seen, step)
        pictures = objective.recover(seen)
        scalars = {"validation_loss": value.item()}
        if target.recovers:
            scalars["hole_psnr"] = hole_psnr(pictures["composites"], pictures["originals"], pictures["hidden"])
        if probing and linear and probing.due(step, steps, max(1, steps // times)):
            scalars |= linear.score(encoder)
        if step == steps:
            _draw(row, target, pictures, scalars.get("hole_psnr"), folder / "gallery.png")
            recovered = recoveries(objective, held, seed)
            note = f"Target: {row.target.name}. {_notes(row, target)}"
            gallery.draw_recoveries(recovered, "Recovered validation images", note).save(folder / "recovery.png")
            _keep(recovered["random"], folder / "recovered.npz")
        trained.train()
        return scalars

    batch = min(row.optim.batch, len(images))
    order = Order(np.arange(len(images)), batch, seed, 0, steps)
    on_device = compute.device.type == "cuda"
    fetch = MaskedFetch(images, encoder.grid, None if objective.drawn else mask, row.augment, seed, on_device)
    run.train(objective, fetch, order, evaluate, times)
    if ranks.number():
        return {}
    head = about(row.encoder, pack)
    checkpoint.write_weights(folder / "encoder.safetensors", encoder.state_dict(), head)
    checkpoint.write_weights(folder / "model.safetensors", model.state_dict(), {"row": row.model_dump(mode="json")})
    at = generators(seed)
    drawn = [mask(at(0, index), encoder.grid) for index in range(MEASURED)]
    # Where a mask hides all, no distance is defined.
    distances = [avg_distance(one, encoder.grid) for one in drawn if not one.all()]
    return {
        **result(folder, steps * batch, model, compute),
        "hidden_share": float(np.mean([one.mean() for one in drawn])),
        **({"avg_distance_px": float(np.mean(distances))} if distances else {}),
        "encoder_parameters": sum(parameter.numel() for parameter in encoder.parameters()),
        "about": {**head, "width": encoder.width},
    }


def begin(
    row: PretrainRow, pack: Pack, seed: int, compute: devices.Compute, tokenizer: nn.Module | None = None
) -> tuple[Pretext, nn.ModuleDict, dict[str, Player], int]:
    """Make what `train` takes: the objective, all that has weights, the players, and the steps in all.

    Initial weights come from torch's own generator.
    """
    model, target = assemble(row, pack.size, pack.channels, pack.mean, pack.std, tokenizer)
    chosen: Any = row.loss
    scope = Scope(chosen.scope, chosen.ring_px, chosen.visible_weight)
    objective = Pretext(model, target, bind(LOSSES, row.loss), scope, pack, compute)
    count = len(pack.split("train"))
    steps, own = player(row.optim, count, model, row.optim.rate, no_decay=partial(undecayed, model))
    players, trained = {"model": own}, nn.ModuleDict({"model": model})
    if row.adversarial:
        first = bind(MASKS, row.mask)(generator(seed, 0, 0), model.encoder.grid)
        trained["critic"] = _oppose(row, objective, torch.from_numpy(first.reshape(1, -1)))
        ratio = row.adversarial.lr / row.optim.rate
        groups = [{"params": list(trained["critic"].parameters()), "lr_scale": ratio, "weight_decay": 0.0}]
        players["critic"] = Player(adamw(groups, row.optim.betas), own.rate, own.clip)
    compute.prepare(trained)
    target.to(compute.device)
    if devices.pays(compute.device, steps):
        devices.compile_blocks(trained)
        objective.drawn = _drawn(row, objective, seed)
    return objective, trained, players, steps


def _drawn(row: PretrainRow, objective: Pretext, seed: int) -> Drawn | None:
    """Have the device draw masks where it can, and where what is predicted is exactly what they hide."""
    encoder = objective.model.encoder
    many, whole = MASKS_OF_MANY.get(row.mask.name), encoder.output.patch_px
    if not many or objective.scope.part != "hidden" or row.mask.params()["unit_px"] % whole:
        return None
    first = bind(MASKS, row.mask)(generator(seed, 0, 0), encoder.grid)
    return Drawn(partial(many, seed=seed, **row.mask.params()), int(first.sum()))


def load_tokenizer(path: Path, channels: int) -> nn.Module:
    """Build the tokenizer that a file of weights holds, ready to use; raises ValueError, SpecError."""
    weights, said = checkpoint.read_weights(path)
    piece = check(TokenizerOf, {"tokenizer": said.get("tokenizer")}, str(path)).tokenizer
    try:
        # A header may name something that takes all memory.
        with devices.unreal():
            shapes = {name: one.shape for name, one in build(TOKENIZERS, piece, channels).state_dict().items()}
    except ValueError as error:
        raise ValueError(f"{path}: tokenizer: {error}") from None
    if shapes != {name: one.shape for name, one in weights.items()}:
        raise ValueError(f"{path}: its header says '{piece.name}', and its weights are of something else; fit it again")
    tokenizer: nn.Module = build(TOKENIZERS, piece, channels)
    tokenizer.load_state_dict(weights)
    return tokenizer.eval().requires_grad_(False)


def undecayed(model: MaskedModel, name: str) -> bool:
    """Whether the papers' code keeps weight decay from a parameter in pretraining, beside vectors and biases."""
    if name == "fill.token":
        return not model.encoder.decays_token
    # Swin's code lists the tables as not to be decayed, and its pretraining decays them all the same: the names have a
    # prefix there that the list has not. The published weights come from that.
    return not name.endswith("relative_position_bias_table") and (
        name.removeprefix("encoder.") in model.encoder.no_weight_decay()
    )


def _oppose(row: PretrainRow, objective: Pretext, hidden: Tensor) -> Critic:
    """Give the objective its critic; `hidden` [1, n] is a mask, for the box that all of them have."""
    assert row.adversarial
    encoder, side = objective.model.encoder, objective.target.entries.side
    box: Box | None = None
    size = (encoder.output.shape[0] * side, encoder.output.shape[1] * side)
    if row.adversarial.sees == "hole":
        wanted, _ = objective.wanted(hidden)
        box = hole(wanted[0], encoder.output, side)
        size = (box[0].stop - box[0].start, box[1].stop - box[1].start)
    objective.critic = Critic(size, objective.target.entries.depth, row.adversarial.base)
    objective.critic_weight, objective.critic_sees = row.adversarial.weight, box
    return objective.critic


def recoveries(objective: Pretext, held: Split, seed: int) -> dict[str, dict[str, Tensor]]:
    """Recover validation images under random masks and, where pixels are labelled, most of the object and all of it.

    As SimMIM's figure shows. Masks are drawn in units of one size, so that encoders of any patch get the same ones. One
    image at a time: object masks hide unequal numbers of patches.
    """
    grid = objective.model.encoder.grid
    unit_px = _unit(grid.patch_px, min(grid.height, grid.width))
    units, times = Grid(grid.height, grid.width, unit_px), unit_px // grid.patch_px
    kinds, shown = ["random"], list(range(min(RECOVERED, len(held))))
    if (held.folder / "instances.npy").exists():
        labels = held.array("instances")
        with_object = [index for index in range(min(VALIDATED, len(held))) if labels[index].any()]
        if with_object:
            kinds, shown = ["random", *reversed(OBJECT_MASKS)], with_object[:RECOVERED]
    found: dict[str, dict[str, Tensor]] = {}
    for kind in kinds:
        parts = []
        for index in shown:
            rng = generator(seed, 0, index)
            if kind == "random":
                hidden = random(rng, units, ratio=0.6, unit_px=unit_px)
            else:
                hidden = OBJECT_MASKS[kind](rng, units, labels[index])
            hidden = hidden.repeat(times, 0).repeat(times, 1).reshape(1, -1)
            parts.append(objective.recover(Masked(held.tensor(index)[None], torch.from_numpy(hidden))))
        found[kind] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return found


def _keep(pictures: dict[str, Tensor], path: Path) -> None:
    """Keep pictures as uint8 [b, c, H, W], and what was hidden [b, H, W], for figures of several runs."""
    bytes_of = {name: (one.clamp(0, 1) * 255).round().byte() for name, one in pictures.items() if name != "hidden"}
    np.savez_compressed(path, **{name: one.cpu().numpy() for name, one in {**pictures, **bytes_of}.items()})  # type: ignore[arg-type]


def _unit(patch_px: int, side: int) -> int:
    """The mask unit for pictures: a sixth of the side as in the paper (32 of 192 px), or the next that divides."""
    fits = [unit for unit in range(patch_px, side + 1, patch_px) if side % unit == 0]
    return min(fits, key=lambda unit: abs(unit - side / 6))


def _draw(row: PretrainRow, target: Any, pictures: dict[str, Tensor], psnr: float | None, path: Path) -> None:
    few = {name: images[:SHOWN] for name, images in pictures.items()}
    share = pictures["hidden"].float().mean().item()
    told = "" if psnr is None else f", mean hole PSNR {psnr:.1f} dB"
    caption = f"Reconstructions of validation images, {share:.0%} hidden{told}"
    gallery.draw(few, caption, _notes(row, target)).save(path)


def _notes(row: PretrainRow, target: Any) -> str:
    notes = [f"Borrowed: {target.borrows}."] if target.borrows else []
    if row.head.params().get("region") == "centre":
        notes.append("Predicts the centre only.")
    elif row.loss.scope == "hidden":  # type: ignore[attr-defined]
        notes.append("Predictions of visible patches are not trained.")
    return " ".join(notes)
