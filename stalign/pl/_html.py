"""Pieces of a page that stands on its own: no script, no file beside it, nothing from a network.

Text goes through :func:`text`, which escapes it; everything else here returns HTML.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

# A browser that honours it fetches nothing, whatever slipped into the page.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


class Picture(NamedTuple):
    """An encoded image and its size in pixels."""

    data: bytes
    kind: str
    width: int
    height: int


def text(value: Any) -> str:
    """Escape anything that is shown, also inside attributes."""
    return html.escape(str(value), quote=True)


def image(picture: Picture, alt: str, *, css: str = "") -> str:
    """Return an image whose bytes are in the page."""
    uri = f"data:image/{picture.kind};base64,{base64.b64encode(picture.data).decode('ascii')}"
    style = f' class="{css}"' if css else ""
    return f'<img src="{uri}" width="{picture.width}" height="{picture.height}" alt="{text(alt)}"{style}>'


def figure(content: str, title: str, below: str = "") -> str:
    """Return content with its title above and a legend below."""
    return f"<figure><figcaption>{text(title)}</figcaption>{content}{below}</figure>"


def grid(figures: Iterable[str], *, css: str = "grid") -> str:
    """Return figures side by side, as many as there is room for."""
    return f'<div class="{css}">{"".join(figures)}</div>'


def swatch(colour: str, code: str = "") -> str:
    """Return a patch of colour, with a short name in it. ``colour`` must be a checked ``#rrggbb``."""
    ink = ink_on(colour)
    return f'<span class="swatch" style="background:{colour};color:{ink}" aria-hidden="true">{text(code)}</span>'


def ink_on(colour: str) -> str:
    """Black or white, whichever has more contrast on ``#rrggbb`` (relative luminance of WCAG 2.1)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000" if luminance > 0.179 else "#fff"


def legend(entries: Iterable[tuple[str, str, str, str]]) -> str:
    """Return a legend from (colour, code, name, detail)."""
    items = "".join(
        f"<li>{swatch(colour, code)}{f'<span>{text(name)}</span>' if name else ''}<small>{text(detail)}</small></li>"
        for colour, code, name, detail in entries
    )
    return f'<ul class="legend">{items}</ul>'


def ramp(colours: Sequence[str], low: str, high: str, label: str) -> str:
    """Return a bar of colours with its ends and what it stands for."""
    return (
        f'<div class="ramp"><span>{text(low)}</span><span class="bar" aria-hidden="true" '
        f'style="background:linear-gradient(to right,{",".join(colours)})"></span><span>{text(high)}</span>'
        f"<small>{text(label)}</small></div>"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str, *, numbers: Iterable[int] = ()) -> str:
    """Return a table that scrolls on its own where it is too wide; cells are HTML, ``numbers`` the columns of figures.

    The first cell of each row is its heading.
    """
    right = set(numbers)
    css = {i: ' class="n"' if i in right else "" for i in range(len(head))}
    top = "".join(f'<th scope="col"{css[i]}>{text(name)}</th>' for i, name in enumerate(head))
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row"{css[i]}>{cell}</th>' if i == 0 else f"<td{css[i]}>{cell}</td>"
            for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return _scrolling(
        f"<table><caption>{text(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody>", caption
    )


def heat_table(
    head: Sequence[str],
    rows: Sequence[tuple[str, Sequence[tuple[str, str]]]],
    caption: str,
) -> str:
    """Return a table of coloured cells: each row a heading (HTML) and (text, checked colour or ``""``) of its cells."""
    top = "".join(f'<th scope="col">{name}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{name}</th>{"".join(_heat_cell(*cell) for cell in cells)}</tr>' for name, cells in rows
    )
    thead = f"<caption>{text(caption)}</caption><thead><tr><td></td>{top}</tr></thead>"
    return _scrolling(f'<table class="heat">{thead}<tbody>{body}</tbody>', caption)


def _heat_cell(value: str, colour: str) -> str:
    style = f' style="background:{colour};color:{ink_on(colour)}"' if colour else ""
    return f"<td{style}>{text(value)}</td>"


def _scrolling(inner: str, label: str) -> str:
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{text(label)}">{inner}</table></div>'


def histogram(counts: Sequence[int], low: str, high: str, label: str, alt: str) -> str:
    """Return bars as boxes of the page, so that they follow its colours and its width."""
    top = max(max(counts), 1)
    bars = "".join(f'<i style="height:{100 * count / top:.1f}%"></i>' for count in counts)
    return (
        f'<div class="histogram"><div class="bars" role="img" aria-label="{text(alt)}">{bars}</div>'
        f'<div class="ends"><span>{text(low)}</span><small>{text(label)}</small><span>{text(high)}</span></div></div>'
    )


def definitions(entries: Iterable[tuple[str, str, str]], *, css: str = "facts") -> str:
    """Return terms with their value and a remark."""
    parts = "".join(
        f"<div><dt>{text(term)}</dt><dd>{text(value)}{f'<small>{text(remark)}</small>' if remark else ''}</dd></div>"
        for term, value, remark in entries
    )
    return f'<dl class="{css}">{parts}</dl>'


def notes(entries: Iterable[tuple[str, str]]) -> str:
    """Return remarks as (weight, text), weight ``"warning"`` or ``"note"``."""
    words = {"warning": "Take care", "note": "Note"}
    items = "".join(f'<li class="{weight}"><b>{words[weight]}</b> {text(body)}</li>' for weight, body in entries)
    return f'<ul class="notes">{items}</ul>'


def paragraph(body: str, *, css: str = "") -> str:
    """Return a paragraph of plain text."""
    return f"<p{f' class={css!r}' if css else ''}>{text(body)}</p>"


def details(summary: str, content: str) -> str:
    """Return content that is folded away."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def section(anchor: str, title: str, content: str, *, level: int = 2) -> str:
    """Return a part of the page with its heading; ``anchor`` is a name of ours."""
    return f'<section id="{anchor}"><h{level}>{text(title)}</h{level}>{content}</section>'


def page(title: str, head: str, contents: Mapping[str, str], body: str, foot: str) -> str:
    """Return the whole page; ``contents`` maps anchors to titles."""
    links = "".join(f'<li><a href="#{anchor}">{text(name)}</a></li>' for anchor, name in contents.items())
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f'<link rel="icon" href="data:,">\n<title>{text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n'
        f'<a class="skip" href="#main">Skip to the results</a>\n<header>{head}</header>\n'
        f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n<main id="main">\n{body}\n</main>\n'
        f"<footer>{foot}</footer>\n</body>\n</html>\n"
    )


_STYLE = """
:root{--page:#f7f5f8;--card:#fff;--ink:#1f1b2b;--soft:#5d5769;--line:#e2dde8;--accent:#5b3a9e;--warm:#b3246b;
--heat:91 58 158;--care:#8a4b00;--careback:#fff4e0;--noteback:#f0ecf8}
@media (prefers-color-scheme:dark){:root{--page:#141219;--card:#1e1b26;--ink:#ece9f3;--soft:#aea7bd;--line:#373243;
--accent:#b9a2f2;--warm:#f089bb;--heat:150 120 225;--care:#ffc266;--careback:#33270f;--noteback:#2a2438}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-padding-top:3.2rem}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;overflow-wrap:break-word}
header,main,footer{max-width:72rem;margin:0 auto;padding:0 1.25rem}
header{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,19rem);gap:2rem;align-items:center;
padding-top:2.2rem;padding-bottom:1.2rem}
header.plain{grid-template-columns:minmax(0,1fr)}
header img{border-radius:14px;width:100%;max-height:19rem;object-fit:contain}
.kind{color:var(--warm);font-weight:650;font-size:.85rem;letter-spacing:.06em;text-transform:uppercase;margin:0}
h1{font-size:clamp(1.7rem,4.5vw,2.6rem);line-height:1.15;margin:.15em 0 .3em;letter-spacing:-.015em}
h2{font-size:1.45rem;line-height:1.25;margin:0 0 .4rem;letter-spacing:-.01em}
h3{font-size:1.08rem;margin:1.8rem 0 .4rem}
p{margin:.4rem 0 .8rem;max-width:46rem}
.lead{color:var(--soft);font-size:1.05rem;margin:0}
small{color:var(--soft);font-size:.83rem}
a{color:var(--accent)}
a:focus-visible,summary:focus-visible,.scroll:focus-visible{outline:3px solid var(--accent);outline-offset:2px}
.skip{position:absolute;left:-99rem}
.skip:focus{left:1rem;top:1rem;background:var(--card);padding:.5rem 1rem;z-index:9}
nav{position:sticky;top:0;z-index:5;background:var(--page);border-bottom:1px solid var(--line)}
nav ul{max-width:72rem;margin:0 auto;padding:.55rem 1.25rem;display:flex;gap:1.3rem;list-style:none;overflow-x:auto;
white-space:nowrap;font-size:.92rem}
nav a{text-decoration:none}
nav a:hover{text-decoration:underline}
section{background:var(--card);border:1px solid var(--line);border-radius:16px;padding:1.5rem 1.6rem;margin:1.2rem 0}
section section{border:0;padding:0;margin:1.6rem 0 0;border-radius:0}
dl.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,13.5rem),1fr));gap:1px;margin:.6rem 0 0;
background:var(--card);border:1px solid var(--line);border-radius:12px;overflow:hidden}
dl.facts div{padding:.75rem .95rem;box-shadow:0 0 0 1px var(--line)}
dt{color:var(--soft);font-size:.83rem}
dd{margin:0;font-weight:620;font-size:1.12rem;overflow-wrap:anywhere}
dd small{display:block;font-weight:400;line-height:1.4}
dl.list{margin:.6rem 0}
dl.list div{display:grid;grid-template-columns:minmax(8rem,14rem) minmax(0,1fr);gap:.2rem 1rem;padding:.3rem 0;
border-bottom:1px solid var(--line)}
dl.list dd{font-weight:400;font-size:.95rem}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,24rem),1fr));gap:1.4rem;margin:1rem 0;
align-items:start}
.three{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,16rem),1fr));gap:1.4rem;margin:1rem 0;
align-items:start}
.seen{display:grid;grid-template-columns:minmax(0,5fr) minmax(0,6fr);gap:1.6rem;margin:1rem 0;align-items:start}
.seen>figure{position:sticky;top:4rem}
.spots{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:1.1rem}
.spots figure div{display:grid;grid-template-columns:1fr 1fr;gap:.45rem}
.spots img{border:3px solid var(--edge);border-radius:6px}
.spots figcaption span{color:var(--soft);font-weight:400}
figure{margin:0;min-width:0}
figcaption{font-weight:600;font-size:.95rem;margin-bottom:.4rem}
figure img{display:block;width:100%;height:auto;border-radius:10px}
img.exact{image-rendering:pixelated}
.legend{list-style:none;margin:.7rem 0 0;padding:0;display:flex;flex-wrap:wrap;gap:.3rem .95rem;font-size:.88rem}
.legend li{display:flex;align-items:center;gap:.3rem;min-width:0}
.legend .swatch{margin-right:0}
.swatch{display:inline-flex;align-items:center;justify-content:center;flex:none;min-width:1.45em;height:1.45em;
padding:0 .25em;border-radius:.4em;font-size:.78rem;font-weight:700;box-shadow:inset 0 0 0 1px #0003;
font-variant-numeric:tabular-nums;margin-right:.4em}
.ramp{display:grid;grid-template-columns:auto minmax(2rem,1fr) auto;gap:.1rem .55rem;align-items:center;
margin-top:.6rem;font-size:.85rem;font-variant-numeric:tabular-nums}
.ramp .bar{height:.7rem;border-radius:.35rem;box-shadow:inset 0 0 0 1px #0003}
.ramp small{grid-column:1/-1}
.scroll{overflow-x:auto;margin:.9rem 0;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;font-size:.92rem;min-width:100%}
caption{text-align:left;color:var(--soft);font-size:.85rem;padding-bottom:.4rem}
th,td{padding:.42rem 1.6rem .42rem 0;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
thead th{color:var(--soft);font-weight:600;font-size:.85rem;white-space:nowrap}
tbody th{font-weight:600;white-space:nowrap}
td:last-child:not(.n){min-width:12rem}
.n{text-align:right;font-variant-numeric:tabular-nums}
.genes{display:flex;flex-wrap:wrap;gap:.15rem .8rem}
.genes b{font-weight:600;font-style:italic}
table.heat caption{white-space:nowrap}
table.heat{min-width:0;border-collapse:separate;border-spacing:2px}
table.heat th,table.heat td{border:0;padding:.35rem .55rem;border-radius:5px}
table.heat td,table.heat td:last-child{text-align:center;min-width:3.1rem;font-size:.86rem;
font-variant-numeric:tabular-nums}
table.heat thead th{color:var(--ink);vertical-align:bottom;text-align:center;font-size:.85rem}
.histogram{max-width:34rem;margin:1rem 0}
.bars{display:flex;align-items:flex-end;gap:2px;height:7rem;border-bottom:1px solid var(--soft)}
.bars i{flex:1;background:var(--accent);border-radius:3px 3px 0 0}
.ends{display:flex;justify-content:space-between;gap:1rem;font-size:.85rem;font-variant-numeric:tabular-nums}
.ends small{text-align:center}
.ends span{white-space:nowrap}
.notes{list-style:none;margin:0;padding:0;display:grid;gap:.5rem}
.notes li{padding:.6rem .9rem;border-radius:10px;background:var(--noteback);font-size:.95rem}
.notes b{color:var(--accent);margin-right:.3rem}
.notes .warning{background:var(--careback)}
.notes .warning b{color:var(--care)}
details{margin:1.2rem 0 .2rem}
summary{cursor:pointer;color:var(--accent);font-weight:600;font-size:.95rem}
footer{padding-top:.4rem;padding-bottom:2.5rem;color:var(--soft);font-size:.88rem}
ul.limits{padding-left:1.15rem;margin:.4rem 0;max-width:48rem}
ul.limits li{margin:.45rem 0}
code{font-size:.9em;overflow-wrap:anywhere}
@media (max-width:600px){
body{font-size:15.5px}
header{grid-template-columns:minmax(0,1fr);gap:1rem;padding-top:1.3rem}
header,main,footer{padding-left:.8rem;padding-right:.8rem}
nav ul{padding-left:.8rem;padding-right:.8rem}
.grid,.three,.seen,.spots{grid-template-columns:minmax(0,1fr)}
.seen>figure{position:static}
table.heat caption{white-space:normal}
th,td{padding-right:1rem}
section{padding:1.1rem .95rem;border-radius:12px}
dl.facts{grid-template-columns:minmax(0,1fr)}
dl.list div{grid-template-columns:minmax(0,1fr)}
}
@media print{
:root{--page:#fff;--card:#fff;--ink:#000;--soft:#444;--line:#ccc;--accent:#3d2a75;--warm:#8a1a52;--care:#6b3a00;
--careback:#fff;--noteback:#fff}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}
body{font-size:10.5pt}
nav,.skip{display:none}
section{border:0;padding:0;margin:1.4rem 0}
figure,.notes li,tr{break-inside:avoid}
h2,h3{break-after:avoid}
.scroll{overflow:visible}
.grid{grid-template-columns:repeat(2,minmax(0,1fr))}
.three{grid-template-columns:repeat(3,minmax(0,1fr))}
table.heat td,table.heat td:last-child{min-width:0}
.seen>figure{position:static}
}
"""
