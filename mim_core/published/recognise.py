"""Recognise published weights by their names and shapes, and bring them under our names."""

from __future__ import annotations

from collections.abc import Callable

from mim_core.published import convolution, swin, tokenizers, vit
from mim_core.published.imported import Hints, Imported, Names, State, verified

Family = tuple[Callable[[Names], bool], Callable[[Names, Hints], Imported]]


def convert(
    state: State,
    *,
    size: tuple[int, int] | None = None,
    heads: int | None = None,
    decoder_heads: int | None = None,
) -> Imported:
    """Turn a published state dict into pieces and weights that load into them.

    Known are: SimMIM's ViT and Swin, BEiT, MAE (each in pretraining and as encoders), timm's `vit`, `beit` and `swin`,
    DALL-E's tokenizer, the small tokenizer of BEiT's code, and the Context Encoder's inpainting net as re-expressed in
    torch. The architecture is inferred from shapes; what they do not tell is assumed, and told in `notes`, or given:
    `size` (height, width) in px, `heads` of a plain ViT's attention, `decoder_heads` of MAE's decoder.

    Raises ValueError where the names are of no known family, are of other parts too, or do not fit.
    """
    names = Names(_bare(state))
    for knows, read in FAMILIES:
        if knows(names):
            return verified(read(names, Hints(size, heads, decoder_heads)))
    few = ", ".join(sorted(state)[:5])
    raise ValueError(
        f"weights: found {few}, ...; these are no names of a family known here (SimMIM, BEiT, MAE, DALL-E's tokenizer, "
        "the small dVAE, timm's vit, beit and swin, Context Encoder); export the model under timm's names"
    )


def _bare(state: State) -> State:
    """Drop the prefix that an encoder has inside a pretraining model."""
    for prefix in ("encoder.", "backbone."):
        if f"{prefix}patch_embed.proj.weight" in state:
            return {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _named(*names: str) -> Callable[[Names], bool]:
    return lambda found: any(name in found for name in names)


FAMILIES: tuple[Family, ...] = (
    (tokenizers.is_large, tokenizers.large),
    (tokenizers.is_small, tokenizers.small),
    (_named(f"layers.0.blocks.0.{swin.TABLE}"), swin.swin),
    (_named("rel_pos_bias.relative_position_bias_table", f"blocks.0.{swin.TABLE}"), vit.relative),
    (
        lambda names: {"patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight"} <= names.state.keys(),
        vit.plain,
    ),
    (convolution.is_inpainting, convolution.inpainting),
)
