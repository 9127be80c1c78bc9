"""What a row of each file may hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from mim_core.adversarial import Adversarial
from mim_core.data.sources import SOURCES
from mim_core.devices import Precision
from mim_core.encoders import ENCODERS
from mim_core.fills import FILLS
from mim_core.fit_target import Anneal, Temperature
from mim_core.heads import HEADS
from mim_core.losses import LOSSES
from mim_core.masks import MASKS
from mim_core.optim import OPTIMISERS, SCHEDULES, WITH_BETAS
from mim_core.spec import OneOf, Piece, Strict, check, pair, shown
from mim_core.targets import TARGETS
from mim_core.tasks import TASKS
from mim_core.tokenizers import TOKENIZERS
from mim_core.transforms import Augment

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


BETAS = (0.9, 0.999)


class FineTune(Strict):
    """An optimiser under warm-up and a schedule; the rate comes from a grid."""

    batch: PositiveInt
    epochs: Annotated[float, Field(gt=0, le=1e6)]
    warmup_epochs: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    warmup_from: Share = 0.0
    """The first learning rate as a share of the peak."""
    schedule: Annotated[Piece, OneOf(SCHEDULES), Field(validate_default=True)] = "cosine"  # type: ignore[assignment]
    floor: Share = 0.0
    """The last learning rate as a share of the peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    optimiser: Annotated[Piece, OneOf(OPTIMISERS), Field(validate_default=True)] = "adamw"  # type: ignore[assignment]
    betas: Annotated[tuple[Share, Share], BeforeValidator(pair)] = BETAS
    """AdamW's, and those of what muon leaves to it."""
    clip: Positive | None = None
    """Largest gradient norm."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a moving average of the weights, which is what is evaluated and saved (see `optim.Average`)."""

    @model_validator(mode="after")
    def _betas_have_a_taker(self) -> FineTune:
        if self.optimiser.name not in WITH_BETAS and self.betas != BETAS:
            raise ValueError(
                f"found betas {list(self.betas)} with the optimiser {self.optimiser.name}; they are of adamw and muon; "
                "delete betas, or give the optimiser's own momentum"
            )
        return self

    def steps(self, images: int) -> tuple[int, int]:
        """Steps in all and of warm-up, for a training set of `images`."""
        epoch = max(1, images // self.batch)
        return max(1, round(self.epochs * epoch)), round(self.warmup_epochs * epoch)


class Optim(FineTune):
    """An optimiser at one rate: `lr` is a step's; `base_lr` is the papers' rate for `base_batch` images a step."""

    lr: Positive | None = None
    base_lr: Positive | None = None
    base_batch: PositiveInt | None = None

    @model_validator(mode="after")
    def _one_rate(self) -> Optim:
        if (self.lr is None) == (self.base_lr is None) or (self.base_lr is None) != (self.base_batch is None):
            raise ValueError(
                f"found lr {self.lr}, base_lr {self.base_lr}, base_batch {self.base_batch}; "
                "give either lr, or base_lr with base_batch"
            )
        return self

    @property
    def rate(self) -> float:
        """The peak learning rate of a step: base_lr * batch / base_batch where the row gives those."""
        if self.base_lr is not None and self.base_batch is not None:
            return self.base_lr * self.batch / self.base_batch
        assert self.lr is not None, "held by the validator"
        return self.lr


class EncoderOf(Strict):
    """The encoder that a file of weights names in its header."""

    encoder: Annotated[Piece, OneOf(ENCODERS)]


class TokenizerOf(Strict):
    """The tokenizer that a file of weights names in its header."""

    tokenizer: Annotated[Piece, OneOf(TOKENIZERS)]


class DataRow(Strict):
    """A dataset: the folder `data/<name>/` read by a source."""

    source: Annotated[Piece, OneOf(SOURCES)]


class TargetRow(Strict):
    """A tokenizer that is fitted to a dataset before a method can predict its tokens.

    A palette is found by k-means and takes none of what follows `seed`; an autoencoder is trained. A discrete VAE is so
    under a Gumbel-softmax `temperature` and with `kl_weight` on the divergence from even use of the codes, which others
    may not be given.
    """

    data: str
    tokenizer: Annotated[Piece, OneOf(TOKENIZERS)]
    least_perplexity: Annotated[float, Field(ge=1)] = 2.0
    """Codes in effective use on validation images, below which the codebook counts as collapsed and work stops."""
    seed: Seed = 0
    optim: Optim | None = None
    temperature: Temperature = Anneal(start=1.0, end=1 / 16, over=0.5)
    kl_weight: Anneal = Anneal(start=0.0, end=0.0)
    augment: Augment | None = None
    precision: Precision = "auto"
    checkpoint_minutes: Positive = 1.0


class PretrainRow(Strict):
    """A method on a dataset: mask x fill x encoder x head x target x loss, and how long and how fast it learns."""

    data: str
    encoder: Annotated[Piece, OneOf(ENCODERS)]
    mask: Annotated[Piece, OneOf(MASKS)]
    fill: Annotated[Piece, OneOf(FILLS)]
    head: Annotated[Piece, OneOf(HEADS)]
    target: Annotated[Piece, OneOf(TARGETS)]
    loss: Annotated[
        Piece,
        OneOf(
            LOSSES,
            scope=(Literal["hidden", "ring", "all"], "hidden"),
            ring_px=(NonNegativeInt, 0),
            visible_weight=(Positive, 1.0),
        ),
    ]
    adversarial: Adversarial | None = None
    augment: Augment | None = None
    optim: Optim
    seed: Seed = 0
    precision: Precision = "auto"
    checkpoint_minutes: Positive = 1.0
    devices: PositiveInt = 1
    """GPUs, or without any processes, that share each batch: what is trained is the same, up to rounding."""

    @model_validator(mode="after")
    def _batches_are_shared(self) -> PretrainRow:
        if self.devices > self.optim.batch:
            raise ValueError(
                f"devices: found {self.devices}; each needs an image of the batch of {self.optim.batch}; choose fewer"
            )
        if self.devices > 1 and self.adversarial:
            raise ValueError(
                f"devices: found {self.devices} beside adversarial; its critic needs the whole batch for BatchNorm; "
                "delete devices"
            )
        return self

    @property
    def fitted(self) -> str | None:
        """The row of targets.yaml that the target is fitted by, or None."""
        return self.target.params().get("fitted")


class DownstreamRow(Strict):
    """A task that judges an encoder.

    `init` is `scratch` with the `encoder` to start afresh, a pretrain row, a downstream row (a supervised middle
    stage), a file of weights, or `timm:NAME`; the section that a row stands in says which.
    """

    task: Annotated[Piece, OneOf(TASKS)]
    data: str
    init: str
    encoder: Annotated[Piece, OneOf(ENCODERS)] | None = None
    labels: PositiveInt | None = None
    """Labelled training images; all of them where it is left out."""
    lr_grid: list[Positive] = Field(default_factory=list)
    """Learning rates to choose from, on validation images, with the first seed."""
    seeds: Annotated[list[Seed], Field(min_length=1)]
    augment: Augment | None = None
    drop_path: Share = 0.0
    window: PositiveInt | None = None
    """A Swin's window in patches where it is to be another than that it begins with (SimMIM: 6 at 192, 7 at 224 px)."""
    optim: FineTune | None = None
    """Left out, as is `lr_grid`, by a task that trains nothing."""
    precision: Precision = "auto"
    checkpoint_minutes: Positive = 1.0


Label = Annotated[str, Field(min_length=1, max_length=60)]
Changes = Annotated[dict[Label, Any], Field(min_length=1)]
"""A path with points (`mask.ratio`) to its new value: a number or a whole piece."""
Axes = Annotated[dict[Label, Annotated[list[Any], Field(min_length=1)]], Field(min_length=1)]
Judges = Annotated[dict[str, dict[Label, Any]], Field(min_length=1)]
"""Downstream rows, each with what is changed in it."""


def _once(name: str, seeds: list[int]) -> None:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{name}: found {seeds}; one stands twice; delete it")


class AblationRow(Strict):
    """Points that differ from a base row in little, each pretrained and judged alike over the same seeds.

    One of three says which: `grid` (all combinations of the axes' values), `zip` (the axes' values side by side),
    `points` (by label, each with its own changes). Scores are of validation images: test images choose nothing.
    """

    data: str
    """The dataset of all points and judges, whatever their own rows name."""
    base: str
    """A pretrain row."""
    change: dict[Label, Any] = Field(default_factory=dict)
    """What is changed in every point, the baseline too: its budget, as a rule."""
    grid: Axes | None = None
    zip: Axes | None = None
    points: Annotated[dict[Label, Changes], Field(min_length=1)] | None = None
    seeds: Annotated[list[Seed], Field(min_length=1)]
    judges: Judges
    scratch: bool = True
    """Whether the judges judge the encoder from scratch too, as a reference."""

    @model_validator(mode="after")
    def _one_form(self) -> AblationRow:
        given = [key for key in ("grid", "zip", "points") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"found {given or 'none'} of grid, zip and points; give exactly one")
        if self.zip is not None and len({len(values) for values in self.zip.values()}) > 1:
            counts = {path: len(values) for path, values in self.zip.items()}
            raise ValueError(f"zip: found axes of unequal length {counts}; each needs as many values as the others")
        _once("seeds", self.seeds)
        return self


class Scale(Strict):
    """A range of numbers to search in: by `step`, or on a logarithmic scale; whole numbers where all are whole."""

    low: int | float
    high: int | float
    step: Annotated[int | float, Field(gt=0)] | None = None
    log: bool = False

    @model_validator(mode="after")
    def _a_range(self) -> Scale:
        if self.low >= self.high:
            raise ValueError(f"found low {self.low} and high {self.high}; low must be below high")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("found log; a logarithmic scale begins above 0 and has no step")
        return self


class Sampler(Strict):
    """What tries next; Optuna's, by its short name."""

    name: Literal["tpe", "gp", "random", "qmc"] = "tpe"
    startup: PositiveInt = 8
    """Trials drawn at random before the sampler learns from them (tpe, gp)."""


class Pruner(Strict):
    """What ends a trial early, by the accuracy of a probe while it pretrains: asynchronous halving or Hyperband.

    A loss of reconstruction never does: it does not compare across targets and masks.
    """

    name: Literal["asha", "hyperband", "none"] = "asha"
    reduction: Annotated[int, Field(ge=2)] = 3
    """One in so many trials goes on from each rung."""
    labels: PositiveInt = 1000
    """Labelled images that the probe learns from."""
    evaluations: Annotated[int, Field(ge=2)] = 4
    """Probes in a trial's pretraining, evenly spaced; rungs lie on them."""


def _entry(value: Any) -> Any:
    """Read an entry of a search's space."""
    if isinstance(value, Mapping) and {"low", "high"} & value.keys():
        return check(Scale, value, "range")
    if isinstance(value, list) and len(value) > 1:
        return value
    if isinstance(value, Mapping) and len(value) > 1:
        changes = [value, *value.values()]
        if all(isinstance(one, Mapping) and one and all(isinstance(key, str) for key in one) for one in changes):
            return value
    raise ValueError(
        f"found {shown(value)}; give a range {{low, high}}, a list of two values or more, or two labels or more, each "
        "with its changes"
    )


class SearchRow(Strict):
    """A search over pieces and numbers of a base row, judged on validation images by one downstream row.

    The best row is pretrained again with fresh `seeds` beside the base row and scored once on test images.
    """

    data: str
    base: str
    change: dict[Label, Any] = Field(default_factory=dict)
    judge: Annotated[Judges, Field(max_length=1)]
    space: Annotated[dict[Label, Annotated[Any, AfterValidator(_entry)]], Field(min_length=1)]
    """A path to a range or to a list of values; or a name to several choices by label, each with its changes."""
    sampler: Sampler = Sampler()
    pruner: Pruner = Pruner()
    trials: PositiveInt
    budget_device_hours: Positive
    """What all of it may cost, the final comparison with it; the device is all of the machine, or one GPU."""
    seed: Seed = 0
    """Of the sampler."""
    trial_seeds: Annotated[list[Seed], Field(min_length=1)] = Field(default_factory=lambda: [0])
    """Of each trial: it is scored by the mean over them, and probed with the first."""
    seeds: Annotated[list[Seed], Field(min_length=1)]
    """Of the final comparison."""
    warm_start: list[str] = Field(default_factory=list)
    """Ablations whose points the sampler is told of first."""
    storage: str | None = None
    """Address of a database for several machines; a file of this repository's where it is left out."""

    @model_validator(mode="after")
    def _fresh(self) -> SearchRow:
        _once("trial_seeds", self.trial_seeds)
        _once("seeds", self.seeds)
        if used := sorted({*self.trial_seeds} & {*self.seeds}):
            raise ValueError(
                f"seeds: found {self.seeds}, of which trials have {used}; the last comparison needs fresh ones"
            )
        return self
