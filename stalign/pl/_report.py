"""One page about one slide, for people who were not there when it was computed."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from stalign._keys import Key
from stalign._logging import logger
from stalign._validate import check_adata, check_positive
from stalign.genes import library_size
from stalign.io._slides import replacing
from stalign.pl import _html as h
from stalign.pl import _report_pictures as pictures
from stalign.pl._colours import UNASSIGNED, distinct_colours
from stalign.pl._report_results import (
    QUALITY,
    SOURCES,
    TOP_GENES,
    Options,
    Results,
    check_genes,
    enrichment,
    work_out,
)
from stalign.pl._results import (
    QUALITY_LOOKS,
    UNITS,
    measured_values,
    pearson,
    predicted_values,
    quality_limits,
    value_range,
)
from stalign.pl._spatial import Panel, Slide, get_slides

if TYPE_CHECKING:
    from anndata import AnnData

    from stalign.models import STAlign

_PICTURE_SIDE: Final = 1400
_SPOTS_SHOWN: Final = 4
# Widths of maps in pixels: fewer libraries leave more room for each.
_WIDE, _NARROW, _MAPS_AT_WIDE = 760, 320, 14
_BINS: Final = 30
_NAMED: Final = 4
_NAMELESS: Final = "library"
_METADATA: Final = ("tissue", "technology", "species", "stain", "disease", "section", "dataset", "citation", "licence")
_LEAD: Final = ("tissue", "technology", "species", "stain")
_EXPRESSION_MAP, _CONFIDENCE_MAP, _COUNTS_MAP = "magma", "viridis", "cividis"
_DIVERGING: Final = "PuOr_r"


def report(
    adata: AnnData,
    path: str | Path,
    *,
    title: str | None = None,
    n_domains: int | None = None,
    markers: Mapping[str, Sequence[str]] | None = None,
    genes: Sequence[str] | str | None = None,
    model: str | Path | STAlign | None = None,
    image: Any = None,
    mpp: float | Mapping[str, float] | None = None,
    layer: str | None = None,
    library_key: str | None = None,
    device: str | None = None,
    batch_size: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a page about a slide: what is on it, what the model saw, what came out, and what to be careful with.

    The page is one HTML file of a few MB at most that needs nothing else: no network, no script, no file beside it.
    What the AnnData holds is shown as it is; what is missing is worked out on the side, and nothing is written to it.

    Parameters
    ----------
    adata
        A slide, embedded or not, in memory; several libraries get a section each.
    path
        The file to write.
    title
        Heading; ``None`` takes the names of the libraries.
    n_domains
        Number of domains to find. ``None`` shows ``obs["stalign_domain"]``, or finds seven (fewer on a small slide)
        where it is missing.
    markers
        Names and their marker genes, for :func:`stalign.tl.zero_shot_annotate`. ``None`` shows
        ``obs["stalign_annotation"]`` where it is there.
    genes
        Genes to show as predicted, beside what was measured. ``None``: the three of the predicted genes that vary
        most as measured.
    model
        What to embed the slide with: name, folder, Hub id or a loaded model. ``None`` takes the embedding that is
        there, or ``"stalign-mini"``.
    image, mpp
        As in :func:`stalign.tl.embed`; with either, the slide is embedded again.
    layer
        Layer with the raw counts; ``None`` is what the embedding was made from, or ``X``.
    library_key
        Column of ``obs`` that names each spot's library; ``None`` is what the niches were made with.
    device, batch_size
        As in :func:`stalign.tl.embed`.
    overwrite
        Replace a file that exists.

    Returns
    -------
    The file that was written.

    Raises
    ------
    FileExistsError
        If the file exists and ``overwrite`` is false.
    IsADirectoryError
        If ``path`` is a folder.
    ValueError
        If the AnnData is backed by a file, for genes that cannot be predicted, and for what :func:`stalign.tl.embed`,
        :func:`stalign.tl.spatial_domains` and :func:`stalign.tl.zero_shot_annotate` refuse.

    Notes
    -----
    ``obs["stalign_ood"]``, ``obs["stalign_agreement"]`` and ``obs["stalign_tissue"]`` are shown as maps where they
    are there.

    Examples
    --------
    >>> import stalign as sta
    >>> adata = sta.datasets.synthetic_visium()
    >>> sta.pl.report(adata, "report.html", n_domains=5)  # doctest: +SKIP
    PosixPath('report.html')
    """
    check_adata(adata)
    options = Options(
        n_domains=None if n_domains is None else check_positive("n_domains", n_domains, integer=True),
        markers=markers,
        genes=check_genes(genes),
        model=model,
        image=image,
        mpp=mpp,
        layer=layer,
        library_key=library_key,
        device=device,
        batch_size=batch_size,
    )
    if adata.isbacked:
        raise ValueError("The AnnData is backed by a file. Pass `adata.to_memory()`.")
    target = check_target(path, overwrite=overwrite)
    page = _write_page(work_out(adata, options), title)
    with replacing(target) as temporary:
        temporary.write_text(page, encoding="utf-8")
    logger.info("Wrote %s (%.1f MB).", target, target.stat().st_size / 1e6)
    return target


def check_target(path: str | Path, *, overwrite: bool) -> Path:
    """Return the file to write, unless it is a folder or must not be replaced."""
    target = Path(path).expanduser()
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder. Name the file to write, such as {target / 'report.html'}.")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists. Pass `overwrite=True` to replace it, or another path.")
    return target


# --- the page -----------------------------------------------------------------------------------------------------


class _Palette:
    """The colour and the short code of every category of a column, the same in all maps of the page."""

    def __init__(self, adata: AnnData, column: str) -> None:
        import matplotlib as mpl

        self.names = [str(name) for name in adata.obs[column].cat.categories]
        stored = [str(colour) for colour in adata.uns.get(f"{column}_colors", ())]
        usable = len(stored) == len(self.names) and all(mpl.colors.is_color_like(colour) for colour in stored)
        colours = stored if usable else distinct_colours(self.names)
        self.colours = {name: str(mpl.colors.to_hex(colour)) for name, colour in zip(self.names, colours, strict=True)}
        short = all(len(name) <= 3 for name in self.names)
        codes = self.names if short else [str(i + 1) for i in range(len(self.names))]
        self.codes = {name: "" if name == UNASSIGNED else code for name, code in zip(self.names, codes, strict=True)}

    def swatch(self, name: str) -> str:
        """A patch of the colour with the code in it, and the name unless the code is the name."""
        code = self.codes[name]
        return h.swatch(self.colours[name], code) + ("" if code == name else h.text(name))

    def options(self) -> dict[str, Any]:
        """Colours for a panel."""
        return {"colors": [self.colours[name] for name in self.names]}

    def legend(self, counts: Mapping[str, int]) -> str:
        """Legend with the number of spots of those that are there."""
        return h.legend(
            (
                self.colours[name],
                self.codes[name],
                "" if self.codes[name] == name else name,
                f"{counts[name]:,} spots",
            )
            for name in self.names
            if counts.get(name, 0)
        )


class _Writer:
    """Writes the sections; every one is empty where there is nothing to show."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.adata = results.adata
        key = str(results.niche.get("params", {}).get("spatial_key", Key.obsm.SPATIAL))
        self.slides = get_slides(self.adata, None, None, None, key, picture_side=_PICTURE_SIDE)
        self.single = len(self.slides) == 1
        self.domains = _Palette(self.adata, Key.obs.DOMAIN) if Key.obs.DOMAIN in self.adata.obs else None
        self.names = _Palette(self.adata, Key.obs.ANNOTATION) if results.has_names else None
        self.width = self._map_width()

    def _map_width(self) -> int:
        maps = len(self.slides) * (6 + 2 * len(self.results.genes) + sum(key in self.adata.obs for key in QUALITY))
        return int(np.clip(_WIDE * np.sqrt(_MAPS_AT_WIDE / maps), _NARROW, _WIDE))

    def by_library(self, write: Any, level: int = 3) -> str:
        """Write something for every slide, under its name where there are several."""
        parts = []
        for number, slide in enumerate(self.slides):
            part = write(slide)
            if part and not self.single:
                part = h.section(f"{write.__name__}-{number}", slide.name, part, level=level)
            parts.append(part)
        return "".join(parts)

    def categories(self, slide: Slide, column: str, palette: _Palette, title: str) -> str:
        """Map of a categorical column with its legend."""
        values = self.adata.obs[column].iloc[slide.index]
        counts = {str(name): int(count) for name, count in values.value_counts().items()}
        picture = pictures.spot_map(Panel(slide, values, "", palette.options()), self.width, codes=palette.codes)
        most = max(counts, key=lambda name: counts[name])
        alt = (
            f"{title} of {slide.name} on the tissue; the largest is {most} with {counts[most]} of {len(values)} spots."
        )
        return h.figure(h.image(picture, alt), title, palette.legend(counts))

    def numbers(
        self,
        slide: Slide,
        values: pd.Series,
        title: str,
        cmap: str,
        label: str,
        limits: tuple[float, float] | None = None,
    ) -> str:
        """Map of a number with its scale."""
        options = value_range(values, cmap) if limits is None else {"vmin": limits[0], "vmax": limits[1]}
        low, high = float(options.get("vmin", 0.0)), float(options.get("vmax", 1.0))
        panel = Panel(slide, values.rename("value"), "", {"cmap": cmap, "vmin": low, "vmax": high})
        finite = values[np.isfinite(values)]
        middle = f"median {finite.median():.3g}" if len(finite) else "no values"
        alt = f"{title} of {slide.name} on the tissue: {label}, from {low:.3g} to {high:.3g}, {middle}."
        scale = h.ramp(pictures.ramp_colours(cmap), f"{low:.3g}", f"{high:.3g}", label)
        return h.figure(h.image(pictures.spot_map(panel, self.width), alt), title, scale)


def _write_page(results: Results, title: str | None) -> str:
    writer = _Writer(results)
    heading = title or _names_of(writer.slides)
    parts = {
        "glance": ("At a glance", _glance(writer)),
        "seen": ("What the model saw", _seen(writer)),
        "domains": ("Domains", _domains(writer)),
        "names": ("Names", _names(writer)),
        "genes": ("Genes from histology", _genes(writer)),
        "neighbours": ("Neighbourhoods", _neighbours(writer)),
        "quality": ("Quality", _quality(writer)),
        "limits": ("Limits and method", _limits(writer)),
    }
    parts = {anchor: part for anchor, part in parts.items() if part[1]}
    body = "\n".join(h.section(anchor, name, content) for anchor, (name, content) in parts.items())
    contents = {anchor: name for anchor, (name, _) in parts.items()}
    foot = h.paragraph(f"Written by stalign {_version()} on {_today()}. This file needs no network and runs no script.")
    return h.page(f"{heading} · stalign report", _head(writer, heading), contents, body, foot)


def _names_of(slides: Sequence[Slide]) -> str:
    names = [slide.name for slide in slides[:_NAMED]]
    if names == [_NAMELESS]:
        return "Slide"
    return ", ".join(names) + (f" and {len(slides) - _NAMED} more" if len(slides) > _NAMED else "")


def _version() -> str:
    from stalign import __version__

    return __version__


def _today() -> str:
    return datetime.datetime.now(tz=datetime.UTC).strftime("%d %B %Y, %H:%M UTC")


def _head(writer: _Writer, heading: str) -> str:
    known = _metadata(writer)
    lead = " · ".join(str(known[key]) for key in _LEAD if key in known)
    slide = writer.slides[0]
    n = writer.adata.n_obs
    kind = "Slide report" if writer.single else f"Report of {len(writer.slides)} slides"
    words = (
        f'<div><p class="kind">{h.text(kind)}</p><h1>{h.text(heading)}</h1>'
        f'<p class="lead">{h.text(lead or f"{n:,} spots")}</p></div>'
    )
    alt = f"Tissue of {slide.name}" if slide.picture is not None else f"Spots of {slide.name}; it has no image"
    return words + h.image(pictures.tissue(slide, 560, scale_bar=False), f"{alt}.")


def _metadata(writer: _Writer) -> dict[str, Any]:
    """What is known of the slide: of all libraries where they agree."""
    adata = writer.adata
    entries: list[Mapping[str, Any]] = []
    if isinstance(adata.uns.get("metadata"), Mapping):
        entries.append(adata.uns["metadata"])
    spatial = adata.uns.get(Key.uns.SPATIAL, {})
    entries += [spatial.get(slide.name, {}).get("metadata", {}) for slide in writer.slides]
    known: dict[str, Any] = {}
    for key in _METADATA:
        values = {str(entry[key]).strip() for entry in entries if np.ndim(entry.get(key, ())) == 0}
        values -= {"", "nan", "None"}
        if len(values) == 1:
            known[key] = values.pop()
    return known


# --- at a glance --------------------------------------------------------------------------------------------------


def _glance(writer: _Writer) -> str:
    results, adata = writer.results, writer.adata
    record, genes = results.record, results.record.get("genes", {})
    facts = [("Spots", f"{adata.n_obs:,}", "" if writer.single else f"in {len(writer.slides)} slides")]
    if results.counts is not None:
        totals = library_size(results.counts)
        facts.append(("Genes measured", f"{adata.n_vars:,}", f"median {np.median(totals):,.0f} counts in a spot"))
    else:
        facts.append(("Genes measured", "none", "no raw counts in this file"))
    if genes and "coverage" in genes:
        share = f"{int(genes['n_covered']):,} of the {int(genes['n_vocabulary']):,} that it knows"
        facts.append(("Gene coverage of the model", f"{float(genes['coverage']):.0%}", share))
    facts += _scale_facts(writer)
    digest = str(record.get("sha256", ""))
    facts.append(("Model", str(record.get("model", "not recorded")), f"SHA-256 {digest[:16]}…" if digest else ""))
    sides = {"image": "image", "gene": "genes"}
    used = {side for entry in record.get("libraries", {}).values() for side in entry["modalities"]}
    if used:
        source = "found in the file" if results.embedded_before else "made for this report"
        facts.append(("Read from", " and ".join(sides[side] for side in sides if side in used), f"embedding {source}"))
    facts.append(("Made", f"{datetime.datetime.now(tz=datetime.UTC):%d %b %Y}", f"by stalign {_version()}"))
    notes = results.notes or [("note", "The checks of genes, scale, image and number of spots found nothing unusual.")]
    ordered = sorted(notes, key=lambda entry: entry[0] != "warning")
    return h.definitions(facts) + "<h3>Worth knowing</h3>" + h.notes(ordered) + _library_table(writer)


def _scale_facts(writer: _Writer) -> list[tuple[str, str, str]]:
    entries = writer.results.niche.get("libraries", {})
    if len(entries) != 1:
        return []
    entry = next(iter(entries.values()))
    if "mpp" not in entry:
        return []
    return [("Scale", f"{float(entry['mpp']):.4g} µm per pixel", _source_words(entry))]


def _source_words(entry: Mapping[str, Any]) -> str:
    source = SOURCES.get(str(entry.get("mpp_source", "")), "unknown source")
    pitch = float(entry.get("pitch_um", float("nan")))
    extra = f", {pitch:g} µm" if entry.get("mpp_source") == "pitch" and np.isfinite(pitch) else ""
    return f"from {source}{extra}"


def _library_table(writer: _Writer) -> str:
    if writer.single:
        return ""
    entries = writer.results.niche.get("libraries", {})
    used = writer.results.record.get("libraries", {})
    rows = []
    for slide in writer.slides:
        entry = entries.get(slide.name, {})
        mpp = f"{float(entry['mpp']):.4g}" if "mpp" in entry else "–"
        picture = "none"
        if entry.get("image", "none") != "none":
            picture = f"{int(entry['image_width']):,} × {int(entry['image_height']):,}"
        sides = ", ".join(used.get(slide.name, {}).get("modalities", ()))
        rows.append(
            [
                h.text(part)
                for part in (
                    slide.name,
                    f"{len(slide.index):,}",
                    mpp,
                    _source_words(entry) if entry else "–",
                    picture,
                    sides,
                )
            ]
        )
    head = ["slide", "spots", "µm per pixel", "scale", "image, pixels", "read from"]
    return h.table(head, rows, "The slides of this report", numbers=(1, 2))


# --- what the model saw -------------------------------------------------------------------------------------------


def _seen(writer: _Writer) -> str:
    from stalign.slide._library import PatchReader

    results = writer.results
    if not any(results.has_image(slide.name) for slide in writer.slides):
        return ""
    params, record = results.niche["params"], results.record
    pixels = {level: int(record.get(f"{level}_pixels", 64)) for level in ("spot", "niche")}
    words = (
        f"For every spot the model gets two patches of the H&E image: the spot, {float(params['spot_um']):g} µm wide "
        f"at {pixels['spot']} × {pixels['spot']} pixels, and its niche, {float(params['niche_um']):g} µm wide at "
        f"{pixels['niche']} × {pixels['niche']} pixels"
        + (", and the counts of both." if results.counts is not None else ".")
        + " Some spots, spread over the slide: above as they are, below with the pixels that the model gets."
    )
    with PatchReader(writer.adata) as reader:

        def seen(slide: Slide) -> str:
            if not results.has_image(slide.name):
                return ""
            n = min(_SPOTS_SHOWN if writer.single else 2, len(slide.index))
            return _seen_slide(
                *pictures.overview_and_patches(writer.adata, reader, slide.name, n, writer.width, pixels), slide.name
            )

        return h.paragraph(words) + writer.by_library(seen)


def _seen_slide(overview: h.Picture, spots: Sequence[pictures.Seen], name: str) -> str:
    cards = []
    for number, spot in enumerate(spots, start=1):
        where = f"spot {number} of {name}"
        images = [
            h.image(spot.niche, f"Niche patch of {where}"),
            h.image(spot.spot, f"Spot patch of {where}"),
            h.image(
                spot.niche_input, f"The same niche patch with the pixels that the model gets, {where}", css="exact"
            ),
            h.image(spot.spot_input, f"The same spot patch with the pixels that the model gets, {where}", css="exact"),
        ]
        caption = f"<figcaption>{number} <span>niche and spot · {h.text(spot.name)}</span></figcaption>"
        cards.append(f'<figure style="--edge:{spot.colour}">{caption}<div>{"".join(images)}</div></figure>')
    left = h.figure(
        h.image(overview, f"Tissue of {name} with the outlines of {len(spots)} niches and their spots."),
        "Where they are: large square niche, small square spot",
    )
    return f'<div class="seen">{left}<div class="spots">{"".join(cards)}</div></div>'


# --- domains ------------------------------------------------------------------------------------------------------


def _domains(writer: _Writer) -> str:
    if writer.domains is None:
        return ""
    palette = writer.domains
    how = writer.adata.uns.get(Key.UNS, {}).get(Key.uns.DOMAINS, {}).get("params", {})
    method = {"gmm": "a Gaussian mixture", "kmeans": "k-means", "leiden": "Leiden"}.get(str(how.get("method")), "")
    words = (
        "Regions whose spots the model sees as alike, found without labels"
        + (f" by {method} on the embedding." if method else ".")
        + " Their numbers are names without a meaning, given by size."
    )

    def domains(slide: Slide) -> str:
        maps = [writer.categories(slide, Key.obs.DOMAIN, palette, "Domains")]
        if slide.picture is not None:
            tissue = h.image(pictures.tissue(slide, writer.width), f"Tissue of {slide.name}.")
            maps.insert(0, h.figure(tissue, "Tissue"))
        return h.grid(maps)

    return h.paragraph(words) + writer.by_library(domains) + _domain_table(writer, palette)


def _domain_table(writer: _Writer, palette: _Palette) -> str:
    sizes = writer.adata.obs[Key.obs.DOMAIN].astype(str).value_counts()
    markers = writer.results.markers
    rows = []
    for name in palette.names:
        if not sizes.get(name, 0):
            continue
        share = sizes[name] / writer.adata.n_obs
        row = [palette.swatch(name), f"{sizes[name]:,}", f"{share:.1%}"]
        if markers:
            row.append(_gene_list(markers.get(name)))
        rows.append(row)
    head = ["domain", "spots", "share", *(["genes that are higher here than elsewhere"] if markers else [])]
    table = h.table(head, rows, f"Domains, with up to {TOP_GENES} genes each" if markers else "Domains", numbers=(1, 2))
    if not markers:
        return (
            table + h.paragraph("No counts to find marker genes in.", css="lead")
            if writer.results.counts is None
            else table
        )
    remark = (
        "Genes by Welch's t-test on log-normalised counts (adjusted p below 0.05), with the log2 fold change. The "
        "domains were found on the same slide, so these p-values rank genes; they are no evidence that the domains "
        "are real."
    )
    return table + f"<p><small>{h.text(remark)}</small></p>"


def _gene_list(genes: Sequence[tuple[str, float]] | None) -> str:
    if genes is None:
        return "<small>too few spots to say</small>"
    if not genes:
        return "<small>none</small>"
    parts = "".join(f"<span><b>{h.text(gene)}</b> <small>+{fold:.1f}</small></span>" for gene, fold in genes)
    return f'<span class="genes">{parts}</span>'


# --- names --------------------------------------------------------------------------------------------------------


def _names(writer: _Writer) -> str:
    if writer.names is None:
        return ""
    palette, adata = writer.names, writer.adata
    record = adata.uns.get(Key.UNS, {}).get(Key.uns.ANNOTATION, {})
    source = {"markers": "marker genes", "reference": "an annotated reference"}.get(str(record.get("source")), "")
    words = (
        "Every spot is compared with all names"
        + (f", given by {source}, with no training" if source else "")
        + ". Scores are standardised over the slide, so that every name finds the spots that fit it best, also where "
        "the tissue has none. Confidence is the share of the chosen name among those given: a tissue that is none of "
        "them gets one, too."
    )
    if "reference_ece" in record:
        words += (
            " On spots of the reference that were left out, it was off by "
            f"{float(record['reference_ece']):.0%} on average (expected calibration error)."
        )
    has_confidence = Key.obs.ANNOTATION_CONFIDENCE in adata.obs

    def names(slide: Slide) -> str:
        maps = [writer.categories(slide, Key.obs.ANNOTATION, palette, "Names")]
        if has_confidence:
            confidence = adata.obs[Key.obs.ANNOTATION_CONFIDENCE].iloc[slide.index].astype(np.float64)
            maps.append(
                writer.numbers(slide, confidence, "Confidence", _CONFIDENCE_MAP, "share of the chosen name", (0.0, 1.0))
            )
        return h.grid(maps)

    return h.paragraph(words) + writer.by_library(names) + _name_table(writer, palette, record) + _crossed(writer)


def _name_table(writer: _Writer, palette: _Palette, record: Mapping[str, Any]) -> str:
    adata = writer.adata
    values = adata.obs[Key.obs.ANNOTATION].astype(str)
    sizes = values.value_counts()
    confidence = adata.obs.get(Key.obs.ANNOTATION_CONFIDENCE)
    means = {} if confidence is None else confidence.astype(np.float64).groupby(values.to_numpy()).mean().to_dict()
    labels = [str(label) for label in record.get("labels", ())]
    genes = dict(zip(labels, [str(text) for text in record.get("markers", ())], strict=False))
    rows = []
    for name in palette.names:
        n = int(sizes.get(name, 0))
        mean = means.get(name, float("nan"))
        row = [palette.swatch(name), f"{n:,}", f"{n / adata.n_obs:.1%}", f"{mean:.2f}" if np.isfinite(mean) else "–"]
        rows.append([*row, h.text(genes.get(name, "–"))] if genes else row)
    head = ["name", "spots", "share", "mean confidence", *(["markers that the model knows"] if genes else [])]
    return h.table(head, rows, "Names", numbers=(1, 2, 3))


def _crossed(writer: _Writer) -> str:
    """Shares of the names in every domain."""
    if writer.domains is None or writer.names is None:
        return ""
    obs = writer.adata.obs
    table = pd.crosstab(obs[Key.obs.DOMAIN].astype(str), obs[Key.obs.ANNOTATION].astype(str), normalize="index")
    names = [name for name in writer.names.names if name in table.columns]
    colour = pictures.colour_of("Purples")
    domains = [domain for domain in writer.domains.names if domain in table.index]
    shares = table.loc[domains, names].to_numpy(dtype=np.float64)
    rows = [
        (writer.domains.swatch(domain), [(f"{share:.0%}", colour(0.85 * share)) for share in row])
        for domain, row in zip(domains, shares, strict=True)
    ]
    return h.heat_table([h.text(name) for name in names], rows, "Which names the spots of each domain have")


# --- predicted expression -----------------------------------------------------------------------------------------


def _genes(writer: _Writer) -> str:
    results, adata = writer.results, writer.adata
    if not results.genes:
        return ""
    record = adata.uns.get(Key.UNS, {}).get(Key.uns.PREDICTION, {})
    by = {"head": "the model's own head", "retrieval": "retrieval from reference slides", "ridge": "ridge regression"}
    words = (
        f"Expression predicted from the image alone, by {by.get(str(record.get('method')), 'a model')}, beside what "
        "was measured. It says where on the slide a gene is higher or lower; its level comes from the slides "
        "that it was learnt from, so the two scales differ."
    )

    def genes(slide: Slide) -> str:
        return "".join(_gene_pair(writer, slide, gene) for gene in results.genes)

    return h.paragraph(words) + _correlations(results) + writer.by_library(genes)


def _gene_pair(writer: _Writer, slide: Slide, gene: str) -> str:
    results = writer.results
    guess = predicted_values(writer.adata, gene, Key.layers.PREDICTED).iloc[slide.index]
    if not np.isfinite(guess).any():
        return ""
    title, maps = f"{gene}, predicted", []
    if results.counts is not None and gene in writer.adata.var_names:
        truth = measured_values(writer.adata, gene, results.counts).iloc[slide.index]
        maps.append(writer.numbers(slide, truth, f"{gene}, measured", _EXPRESSION_MAP, UNITS))
        r = pearson(truth.to_numpy(), guess.to_numpy())
        title += f" · r = {_number(r)}" if np.isfinite(r) else " · r cannot be said"
    maps.append(writer.numbers(slide, guess, title, _EXPRESSION_MAP, UNITS))
    return h.grid(maps, css="grid")


def _correlations(results: Results) -> str:
    r = results.correlations[np.isfinite(results.correlations)]
    shown = (
        "The genes below are those asked for."
        if results.genes_asked
        else ("The genes below are those that vary most as measured, not those that are predicted best.")
    )
    if len(r) < 2 * _BINS:
        return h.paragraph(f"{shown} r is Pearson's correlation over the spots of the slide.")
    quarter, median, three = np.percentile(r, [25, 50, 75])
    counts, edges = np.histogram(r, bins=_BINS, range=(min(float(r.min()), -0.2), max(float(r.max()), 0.2)))
    alt = (
        f"Histogram of the correlations of {len(r):,} genes: half lie between {_number(quarter)} and {_number(three)}."
    )
    bars = h.histogram(
        counts.tolist(),
        f"r = {_number(edges[0])}",
        _number(edges[-1]),
        f"{len(r):,} genes by r",
        alt,
    )
    words = (
        f"Pearson's r between predicted and measured over all spots, for the {len(r):,} genes that were predicted and "
        f"measured: median {_number(median)}, half of them between {_number(quarter)} and {_number(three)}. {shown} "
        "On a slide that the model was trained on, these numbers are too good."
    )
    return h.paragraph(words) + bars


# --- neighbourhoods -----------------------------------------------------------------------------------------------


def _signed(value: float) -> str:
    """A whole number with its sign, a true minus."""
    rounded = round(float(value))
    return f"{rounded:+d}".replace("-", "−") if rounded else "0"


def _number(value: float) -> str:
    """Two digits and a true minus."""
    return f"{value:.2f}".replace("-", "−")


def _neighbours(writer: _Writer) -> str:
    column, palette, kind = (
        (Key.obs.ANNOTATION, writer.names, "names")
        if writer.names is not None
        else (Key.obs.DOMAIN, writer.domains, "domains")
    )
    if palette is None:
        return ""
    colour = pictures.colour_of(_DIVERGING)

    def neighbours(slide: Slide) -> str:
        found = enrichment(writer.adata, column, slide.index)
        if found is None:
            return ""
        names, z = found
        top = max(float(np.nanmax(np.abs(z), initial=0.0)), 1e-9)
        rows = [
            (
                palette.swatch(name),
                [
                    (_signed(value), colour(0.5 + 0.5 * float(value) / top)) if np.isfinite(value) else ("–", "")
                    for value in row
                ],
            )
            for name, row in zip(names, z, strict=True)
        ]
        caption = f"z-scores of neighbourhood enrichment, {slide.name}"
        return h.heat_table([palette.swatch(name) for name in names], rows, caption)

    tables = writer.by_library(neighbours)
    if not tables:
        return ""
    n = int(writer.results.niche["params"]["n_neighbors"])
    words = (
        f"How often two {kind} are neighbours, compared with the same {kind} shuffled over the spots (squidpy's "
        f"neighbourhood enrichment, {n} nearest spots). Orange: side by side more often than by chance; purple: less "
        "often. What lies in one piece has a high value with itself."
    )
    return h.paragraph(words) + tables


# --- quality ------------------------------------------------------------------------------------------------------


def _quality(writer: _Writer) -> str:
    adata, results = writer.adata, writer.results
    there = [key for key in QUALITY if key in adata.obs]
    totals = None
    if results.counts is not None:
        sums = np.asarray(library_size(results.counts), dtype=np.float64)
        totals = pd.Series(np.log10(1 + sums), index=adata.obs_names)
    if not there and totals is None:
        return ""

    def quality(slide: Slide) -> str:
        maps = []
        for key in there:
            look = QUALITY_LOOKS[key.removeprefix(f"{Key.QUALITY}_")]
            values = adata.obs[key].iloc[slide.index].astype(np.float64)
            if np.isfinite(values).any():
                limits = quality_limits(adata.obs[key], look)
                maps.append(writer.numbers(slide, values, look.title, look.cmap, look.label, limits))
        if totals is not None:
            own = totals.iloc[slide.index]
            maps.append(writer.numbers(slide, own, "Counts in a spot", _COUNTS_MAP, "log10 of 1 + counts"))
        return h.grid(maps, css="three")

    words = "Where to trust the rest less." + (
        " Far means unlike the spots that the model was trained on, not that something is wrong with the tissue."
        if there
        else ""
    )
    return h.paragraph(words) + writer.by_library(quality)


# --- limits and method --------------------------------------------------------------------------------------------


def _limits(writer: _Writer) -> str:
    results = writer.results
    limits = [
        "For research. Not for diagnosis, and not checked by a pathologist.",
        "A model knows the tissues that it was trained on. On others its maps look just as smooth.",
        "Domains are one way to divide the tissue; their number was chosen, not found.",
    ]
    if writer.names is not None:
        limits.append("Names are relative to this slide: each is given to the spots that fit it best here.")
    if results.genes:
        limits.append("Predicted expression is no measurement. A correlation says how well places agree, not levels.")
    if results.counts is not None:
        limits.append("Spots are mixtures of cells, and neighbours share what the niche saw: borders are blurred.")
    items = "".join(f"<li>{h.text(limit)}</li>" for limit in limits)
    content = f'<ul class="limits">{items}</ul>'
    card = results.model.card if results.model is not None else None
    if card is not None and card.description.strip():
        paragraphs = [part for part in card.description.strip().split("\n\n") if part]
        content += "<h3>From the model's card</h3>" + "".join(h.paragraph(part.replace("`", "")) for part in paragraphs)
    return content + h.details("How this was made", h.definitions(_method(writer), css="list"))


def _method(writer: _Writer) -> list[tuple[str, str, str]]:
    results = writer.results
    record = results.record
    known = _metadata(writer)
    rows = [(key, str(value), "") for key, value in known.items()]
    names = {
        "model": "model",
        "revision": "revision of the model",
        "sha256": "SHA-256 of its weights",
        "package_version": "stalign that embedded",
        "device": "device",
        "input_transform": "counts",
        "layer": "layer",
        "organism": "organism",
    }
    rows += [(name, str(record[key]), "") for key, name in names.items() if str(record.get(key, ""))]
    for name, entry in results.niche.get("libraries", {}).items():
        if "mpp_candidates" in entry:
            said = "; ".join(
                f"{SOURCES.get(source, source)}: {float(mpp):.4g}" for source, mpp in entry["mpp_candidates"].items()
            )
            rows.append((f"µm per pixel of {name}", f"{float(entry['mpp']):.4g}", f"what the sources say: {said}"))
    params = writer.adata.uns.get(Key.UNS, {}).get(Key.uns.DOMAINS, {}).get("params", {})
    if params and writer.domains is not None:
        made = "for this report" if results.domains_made else "before"
        rows.append(
            (
                "domains",
                f"{params['method']}, {len(writer.domains.names)}, seed {params['random_state']}",
                f"made {made}",
            )
        )
    if results.genes:
        rows.append(("predictions", "made for this report" if results.predicted_made else "found in the file", ""))
    rows.append(("this report", f"stalign {_version()}, {_today()}", ""))
    return rows
