"""Swin transformer behind the encoder contract: timm's stages, entered between patch embedding and the first block.

Source: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021; the module
inside is timm's `SwinTransformer`, so its weights load there under timm's own names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from jaxtyping import Float, Int
from pydantic import Field, PositiveInt
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from mim_core.blocks import embed_patches
from mim_core.grid import Grid, Level, no_taps
from mim_core.spec import Counts

Share = Annotated[float, Field(ge=0, lt=1)]


class Swin(nn.Module):
    """Swin: attention inside windows, shifted in every second block; each stage after the first halves the map.

    Masks hide patches of `patch_px`; features lie `patch_px * 2 ** (stages - 1)` px apart and are as many times wider.
    A window shrinks to the map, and is not shifted, where the map is no larger (each side on its own, so that maps that
    are not square keep their shift along the longer side).
    """

    drops = False
    decays_token = False
    """Whether weight decay holds for a mask token in front of it, as in the published pretraining."""

    def __init__(
        self,
        size: tuple[int, int],
        channels: int,
        *,
        patch_px: PositiveInt = 4,
        width: PositiveInt = 128,
        depths: Counts = (2, 2, 18, 2),
        heads: Counts = (4, 8, 16, 32),
        window: PositiveInt = 7,
        mlp_ratio: Annotated[float, Field(gt=0)] = 4.0,
        drop_path: Share = 0.0,
    ) -> None:
        """Build for images of `size` (height, width) px; `window` is a side in patches, `width` the first stage's.

        Raises ValueError where a stage has no heads or they do not divide its width, where the stages cannot halve the
        image, and where windows do not tile a stage's map: timm would pad it, and real patches would attend to padding.
        """
        super().__init__()
        if len(depths) != len(heads):
            raise ValueError(
                f"heads: found {len(heads)} numbers; there must be one for each of the {len(depths)} stages in depths; "
                "make both lists equally long"
            )
        widths = [width * 2**stage for stage in range(len(depths))]
        for stage, (share, whole) in enumerate(zip(heads, widths, strict=True)):
            if whole % share:
                raise ValueError(
                    f"heads: found {share} in stage {stage + 1}; they must divide its width {whole}; "
                    f"choose one of {[n for n in range(1, whole + 1) if whole % n == 0]}"
                )
        _check_halving(size, patch_px, len(depths))
        self.grid = Grid(*size, patch_px)
        self.output = Grid(*size, patch_px * 2 ** (len(depths) - 1))
        _check_window(self.grid.shape, window, len(depths))
        self.embed_width = width
        self.width = widths[-1]
        self.depths = depths
        self.depth = sum(depths)
        self.backbone = SwinTransformer(
            img_size=size,
            patch_size=patch_px,
            in_chans=channels,
            embed_dim=width,
            depths=depths,
            num_heads=heads,
            window_size=window,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path,
            num_classes=0,
        )

    def embed(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b n e"]:
        """Embed each patch and normalise it: a fill's token takes the place of what comes out of the LayerNorm."""
        return embed_patches(self.backbone.patch_embed, images)

    def encode(
        self, tokens: Float[Tensor, "b n e"], kept: Int[Tensor, "b k"] | None = None
    ) -> tuple[Float[Tensor, "b m d"], Float[Tensor, "b 0 d"]]:
        """Give the features and, as a Swin has no class token, an empty summary."""
        features = self(tokens, kept)
        return features, features[:, :0]

    def forward(self, tokens: Float[Tensor, "b n e"], kept: Int[Tensor, "b k"] | None = None) -> Float[Tensor, "b m d"]:
        """Run the stages and the final norm. Raises ValueError where tokens were dropped: windows need them all."""
        if kept is not None:
            raise ValueError("kept: found dropped tokens; a Swin's windows need every token; use a fill that keeps all")
        swin = self.backbone
        features: Tensor = swin.norm(swin.layers(tokens.reshape(len(tokens), *self.grid.shape, self.embed_width)))
        return features.flatten(1, 2)

    def blocks(self, images: Float[Tensor, "b c H W"]) -> list[tuple[Float[Tensor, "b m d"], Float[Tensor, "b 0 d"]]]:
        """Give the features after each block through all stages, the last after the final norm; no class token."""
        out, outs = self.backbone.patch_embed(images), []
        for stage in self.backbone.layers:
            out = stage.downsample(out)
            for block in stage.blocks:
                out = block(out)
                outs.append(out)
        outs[-1] = self.backbone.norm(out)
        return [(each.flatten(1, 2), each.flatten(1, 2)[:, :0]) for each in outs]

    @property
    def block_widths(self) -> list[int]:
        """Width of what `blocks` gives, block by block."""
        return [self.embed_width * 2**stage for stage, depth in enumerate(self.depths) for _ in range(depth)]

    def levels(self, taps: Sequence[int] | None = None) -> list[Level]:
        """Say what `pyramid` gives: each stage is twice as wide as the one before, at twice its stride."""
        no_taps(taps, "Swin")
        return [Level(self.embed_width * 2**at, self.grid.patch_px * 2**at) for at in range(len(self.depths))]

    def pyramid(
        self, images: Float[Tensor, "b c H W"], taps: Sequence[int] | None = None
    ) -> list[Float[Tensor, "b d h w"]]:
        """Give each stage's feature map for dense tasks, from the finest to the coarsest.

        The last is what `forward` gives, after the final norm. The earlier ones are the stages' own sums of residuals,
        not normed, as pretraining has no norm for them: a dense head normalises them itself.
        """
        no_taps(taps, "Swin")
        out = self.backbone.patch_embed(images)
        maps = []
        for stage in self.backbone.layers:
            out = stage(out)
            maps.append(out)
        maps[-1] = self.backbone.norm(out)
        return [each.permute(0, 3, 1, 2) for each in maps]

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the papers' code never decays, beside vectors and biases.

        The tables of relative positions, as in SimMIM's fine-tuning (its pretraining decays them all the same).
        """
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def layer(self, name: str) -> int:
        """Give a parameter's layer for layer-wise decay: 0 for embeddings, block i is i + 1, the rest the last.

        Blocks count through all stages. The merging of patches is in the layer of the block before it, as in the
        published code, where it ends a stage; timm has it at the start of the next.
        """
        parts = name.removeprefix("backbone.").split(".")
        if parts[0] == "patch_embed":
            return 0
        if parts[0] != "layers":
            return self.depth + 1
        before = sum(self.depths[: int(parts[1])])
        return before if parts[2] == "downsample" else before + int(parts[3]) + 1


def _check_halving(size: tuple[int, int], patch_px: int, stages: int) -> None:
    step = patch_px * 2 ** (stages - 1)
    for name, side in zip(("height", "width"), size, strict=True):
        if side % step:
            raise ValueError(
                f"image {name}: found {side} px; it must be a multiple of {step}, as patches of {patch_px} px are "
                f"merged {stages - 1} times, 2 x 2; try {max(1, side // step) * step} px, or fewer stages in depths"
            )


def _check_window(shape: tuple[int, int], window: int, stages: int) -> None:
    sides = sorted({side >> stage for stage in range(stages) for side in shape}, reverse=True)

    def tiles(window: int) -> bool:
        return all(side <= window or side % window == 0 for side in sides)

    if not tiles(window):
        raise ValueError(
            f"window: found {window}; it must divide each side of a stage's map that is larger, and the sides are "
            f"{sides} patches; choose one of {[side for side in range(2, sides[0] + 1) if tiles(side)]}"
        )
