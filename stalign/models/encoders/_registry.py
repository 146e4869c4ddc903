"""Encoders by name. A new encoder is one file and one line here."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from stalign._validate import listing, near
from stalign.models.encoders._base import Encoder, GeneEncoder, ImageEncoder

_VIT = "stalign.models.encoders._vit:ViT"


class EncoderEntry(NamedTuple):
    """One line of the registry.

    Attributes
    ----------
    factory
        ``"module:class"``, imported when used.
    args
        Arguments of the class that make up this encoder; those of a config go on top.
    hub
        Hugging Face Hub repository of the pretrained weights, empty when there is none.
    file
        The weights' file there.
    licence
        Licence of the pretrained weights.
    gated
        Whether the licence must be accepted on the Hub first.
    """

    factory: str
    args: Mapping[str, Any] = {}
    hub: str = ""
    file: str = ""
    licence: str = ""
    gated: bool = False


# Transforms: ImageNet mean and std at 224 px unless stated. Sizes are those of the model cards.
IMAGE_ENCODERS: dict[str, EncoderEntry] = {
    "resnet50-small": EncoderEntry("stalign.models.encoders._resnet:SmallStemResNet50"),
    "uni": EncoderEntry(
        _VIT,
        {"img_size": 224, "patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16},
        hub="MahmoodLab/UNI",
        file="pytorch_model.bin",
        licence="CC BY-NC-ND 4.0",
        gated=True,
    ),
    "uni2-h": EncoderEntry(
        _VIT,
        {
            "img_size": 224,
            "patch_size": 14,
            "embed_dim": 1536,
            "depth": 24,
            "num_heads": 24,
            "mlp_ratio": 2.66667 * 2,
            "mlp": "swiglu",
            "reg_tokens": 8,
            "no_embed_class": True,
        },
        hub="MahmoodLab/UNI2-h",
        file="pytorch_model.bin",
        licence="CC BY-NC-ND 4.0",
        gated=True,
    ),
    "virchow2": EncoderEntry(
        _VIT,
        {
            "img_size": 224,
            "patch_size": 14,
            "embed_dim": 1280,
            "depth": 32,
            "num_heads": 16,
            "mlp_ratio": 5.3375,
            "mlp": "swiglu",
            "reg_tokens": 4,
            "pool": "cls+mean",
        },
        hub="paige-ai/Virchow2",
        file="pytorch_model.bin",
        licence="CC BY-NC-ND 4.0",
        gated=True,
    ),
    "h-optimus-0": EncoderEntry(
        _VIT,
        {
            "img_size": 224,
            "patch_size": 14,
            "embed_dim": 1536,
            "depth": 40,
            "num_heads": 24,
            "mlp_ratio": 2.66667 * 2,
            "mlp": "swiglu",
            "reg_tokens": 4,
            "no_embed_class": True,
            "mean": (0.707223, 0.578729, 0.703617),
            "std": (0.211883, 0.230117, 0.177517),
        },
        hub="bioptimus/H-optimus-0",
        file="pytorch_model.bin",
        licence="Apache-2.0",
        gated=True,
    ),
    "phikon-v2": EncoderEntry(
        _VIT,
        {"img_size": 224, "patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16, "layout": "dinov2-hf"},
        hub="owkin/phikon-v2",
        file="model.safetensors",
        licence="Owkin non-commercial licence",
    ),
    "timm": EncoderEntry("stalign.models.encoders._timm:TimmEncoder"),
    "colour-cnn": EncoderEntry("stalign.models.encoders._colour_cnn:ColourCNN"),
    "filter-bank": EncoderEntry("stalign.models.encoders._filter_bank:FilterBank"),
}

GENE_ENCODERS: dict[str, EncoderEntry] = {
    "pathway-transformer": EncoderEntry("stalign.models.encoders._pathway:PathwayTransformer"),
    "scgpt": EncoderEntry("stalign.models.encoders._scgpt:ScGPTEmbedding"),
    "mlp": EncoderEntry("stalign.models.encoders._mlp:GeneMLP"),
    "slide-profile": EncoderEntry("stalign.models.encoders._slide_profile:SlideProfile"),
}


def find_image_encoder(name: str) -> EncoderEntry:
    """Return the registry's line for ``name``; any name that timm knows is one of its encoders."""
    if name in IMAGE_ENCODERS:
        return IMAGE_ENCODERS[name]
    import timm

    model = name.removeprefix("timm/")
    if timm.is_model(model.split(".")[0]):
        return EncoderEntry(
            IMAGE_ENCODERS["timm"].factory,
            {"model": model},
            hub=f"timm/{model}",
            licence="see the model's page on the Hub",
        )
    known = [*IMAGE_ENCODERS, *timm.list_models()]
    raise ValueError(
        f"Unknown image encoder {name!r}.{near(name, known)} Available: {listing(IMAGE_ENCODERS)} and every model "
        "of timm."
    )


def find_gene_encoder(name: str) -> EncoderEntry:
    """Return the registry's line for the gene encoder ``name``."""
    if name not in GENE_ENCODERS:
        raise ValueError(
            f"Unknown gene encoder {name!r}.{near(name, GENE_ENCODERS)} Available: {listing(GENE_ENCODERS, 20)}."
        )
    return GENE_ENCODERS[name]


def _make(name: str, entry: EncoderEntry, args: Mapping[str, Any]) -> Encoder:
    module, _, attribute = entry.factory.partition(":")
    factory = getattr(importlib.import_module(module), attribute)
    known = [p for p in inspect.signature(factory).parameters if p != "vocabulary"]
    for key in args:
        if key not in known and key != "vocabulary":
            raise ValueError(
                f"Encoder {name!r} has no argument {key!r}.{near(key, known)} Available: {listing(known, 20)}."
            )
    encoder = factory(**{**entry.args, **args})
    # Kept for messages and model cards.
    encoder.encoder_name, encoder.licence = name, entry.licence
    return encoder


def build_image_encoder(name: str, **args: Any) -> ImageEncoder:
    """Make an image encoder with *untrained* weights, to be filled from a checkpoint.

    For pretrained weights use :func:`load_image_encoder`.

    Parameters
    ----------
    name
        A name of the registry, or any name that timm knows.
    **args
        Arguments of the encoder.

    Returns
    -------
    The encoder, in training mode.

    Raises
    ------
    ValueError
        For an unknown name or argument, with the nearest known one.

    Examples
    --------
    >>> from stalign.models.encoders import build_image_encoder
    >>> build_image_encoder("resnet50-small", dim=64).dim
    64
    """
    encoder = _make(name, find_image_encoder(name), args)
    if not isinstance(encoder, ImageEncoder):
        raise TypeError(f"{name!r} is not an image encoder.")
    return encoder


def build_gene_encoder(name: str, *, vocabulary: Sequence[str] = (), **args: Any) -> GeneEncoder:
    """Make a gene encoder with *untrained* weights for a vocabulary of gene symbols.

    Parameters
    ----------
    name
        A name of the registry.
    vocabulary
        Gene symbols, in the order of the columns of the counts.
    **args
        Arguments of the encoder.

    Returns
    -------
    The encoder, in training mode.

    Raises
    ------
    ValueError
        For an unknown name or argument, with the nearest known one.

    Examples
    --------
    >>> from stalign.models.encoders import build_gene_encoder
    >>> build_gene_encoder("slide-profile", vocabulary=["ERBB2", "CD3E", "EPCAM"], dim=16).dim
    16
    """
    encoder = _make(name, find_gene_encoder(name), {**args, "vocabulary": tuple(vocabulary)})
    if not isinstance(encoder, GeneEncoder):
        raise TypeError(f"{name!r} is not a gene encoder.")
    return encoder
