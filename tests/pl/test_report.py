from __future__ import annotations

import http.server
import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

import stalign as sta
from stalign.pl import _html
from stalign.pl._colours import bar_length, distinct_colours
from stalign.pl._report_results import Results, enrichment, marker_genes

VOID = {"meta", "link", "img", "br", "hr", "input"}
BROWSER = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
MARKERS = {"tumour": ["ERBB2", "KRT8"], "immune": ["CD3E", "PTPRC"], "stroma": ["COL1A1", "DCN"]}
pytestmark = pytest.mark.filterwarnings("ignore:The data cover:UserWarning")


class Page(HTMLParser):
    """What a page is made of; fails on tags that are not closed in their order."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.source = file.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.styles = ""
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" in self._open:
            self.styles += data
        else:
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def assert_stands_alone(page: Page) -> None:
    """Nothing on the page can make a browser fetch or run anything."""
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed", "base", "form", "video", "audio"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "srcset", "poster", "data", "action"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, name)
        assert attributes.get("href", "#").startswith(("#", "data:")), tag
        assert "url(" not in attributes.get("style", "")
    assert not re.search(r"@import|url\(", page.styles)
    policy = next(meta for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy["content"]


@pytest.fixture(scope="module")
def slide() -> ad.AnnData:
    """Embedded, with domains, names and predictions."""
    adata = sta.datasets.synthetic_visium(n_rows=12, n_cols=12)
    adata.uns["metadata"] = {"tissue": "drawn breast", "technology": "Visium", "patient": "not shown"}
    sta.tl.embed(adata, progress=False)
    sta.tl.spatial_domains(adata, 4)
    sta.tl.zero_shot_annotate(adata, MARKERS)
    sta.tl.predict_expression(adata, ["ERBB2", "COL1A1"])
    return adata


@pytest.fixture(scope="module")
def file(slide, tmp_path_factory) -> Path:
    return sta.pl.report(slide, tmp_path_factory.mktemp("report") / "report.html", genes=["COL1A1"])


@pytest.fixture(scope="module")
def page(file) -> Page:
    return Page(file)


# --- the page ------------------------------------------------------------------------------------------------------


def test_page_stands_alone(page, file):
    assert_stands_alone(page)
    assert "http" not in re.sub(r"http-equiv", "", page.source)
    assert file.stat().st_size < 3e6


def test_page_can_be_read_by_everybody(page):
    assert page.all("html")[0]["lang"] == "en"
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))
    pictures = page.all("img")
    assert len(pictures) > 10
    assert all(picture["alt"].strip() and int(picture["width"]) > 0 for picture in pictures)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert max(np.diff(levels)) <= 1
    assert len(page.all("caption")) == len(page.all("table"))
    assert all("scope" in head for head in page.all("th"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link["href"][1:] for link in page.all("a")} <= set(ids)
    for rule in ("prefers-color-scheme:dark", "max-width:600px", "@media print"):
        assert rule in page.styles


def test_page_says_what_is_known(page, slide):
    record = slide.uns["stalign"]["embed"]
    for part in (
        "147" if slide.n_obs == 147 else str(slide.n_obs),
        f"{record['genes']['coverage']:.0%}",
        f"{record['genes']['n_covered']} of the {record['genes']['n_vocabulary']:,} that it knows",
        "0.5 µm per pixel",
        "from the distance between spots, 100 µm",
        record["sha256"],
        f"stalign {sta.__version__}",
        "drawn breast · Visium",
        "embedding found in the file",
        "This slide is synthetic",
        "Not for diagnosis",
    ):
        assert part in page.text, part
    assert "not shown" not in page.text


def test_page_shows_the_results_of_the_slide(page, slide):
    for size in slide.obs["stalign_domain"].value_counts():
        assert f"{size} spots" in page.text
    for label in MARKERS:
        assert label in page.text
    r = float(slide.var.loc["COL1A1", "stalign_predicted_r"])
    assert f"COL1A1, predicted · r = {r:.2f}".replace("-", "−") in page.text
    assert "ERBB2, predicted" not in page.text
    assert "made before" in page.text


def test_nothing_is_written_to_the_slide(slide, snapshot, tmp_path):
    bare = sta.datasets.synthetic_visium(n_rows=10, n_cols=10)
    for adata in (bare, slide):
        before = snapshot(adata)
        sta.pl.report(adata, tmp_path / "a.html", overwrite=True, n_domains=3, markers=MARKERS)
        assert snapshot(adata) == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_text_of_the_data_stays_text(tmp_path):
    script, picture = "<script>alert('x')</script>", '"><img src=http://evil.example/x onerror=alert(1)>'
    adata = sta.datasets.synthetic_visium(n_rows=12, n_cols=12)
    adata.uns["spatial"] = {'"><script>': adata.uns["spatial"]["synthetic_visium"]}
    sta.tl.embed(adata, progress=False)
    half = adata.obs["region"].eq("tumour").to_numpy()
    adata.obs["stalign_annotation"] = pd.Categorical(np.where(half, script, picture))
    adata.obs["stalign_domain"] = pd.Categorical(np.where(half, "$x^{", "</style><b>&amp;"))
    adata.uns["stalign_domain_colors"] = ["red;background:url(http://evil.example/c)", "blue"]
    adata.var_names = [f"<i>{gene}" for gene in adata.var_names]
    adata.obs_names = [f"<u>{name}" for name in adata.obs_names]
    adata.uns["metadata"] = {"tissue": "<svg onload=alert(1)>", "citation": "</title><script src=//evil.example>"}
    hostile = Page(sta.pl.report(adata, tmp_path / "a.html"))
    assert_stands_alone(hostile)
    assert not {tag for tag, _ in hostile.tags} & {"u", "svg"}
    assert all("evil" not in attributes.get("src", "") for _, attributes in hostile.tags)
    for part in ('"><script>', "<u>", "<i>", script, picture, "</style><b>&amp;", "<svg onload=alert(1)>"):
        assert part in hostile.text


# --- slides that lack something ---------------------------------------------------------------------------------------


def _sections(page: Page) -> set[str]:
    return {attributes["id"] for attributes in page.all("section")}


def test_genes_alone(tmp_path):
    adata = sta.datasets.synthetic_visium(n_rows=12, n_cols=12)
    del adata.uns["spatial"]
    page = Page(sta.pl.report(adata, tmp_path / "a.html"))
    assert_stands_alone(page)
    assert _sections(page) == {"glance", "domains", "neighbours", "quality", "limits"}
    assert "There is no image" in page.text
    with pytest.raises(ValueError, match=r"genes=\['ERBB2'\].*without an image"):
        sta.pl.report(adata, tmp_path / "b.html", genes="ERBB2")
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_image_alone_and_quality(slide, tmp_path):
    adata = ad.AnnData(obs=slide.obs[["array_row", "array_col"]].copy(), uns={"spatial": slide.uns["spatial"]})
    adata.obsm["spatial"] = slide.obsm["spatial"]
    adata.obs["stalign_ood"] = np.linspace(2.5, 7.25, adata.n_obs)
    page = Page(sta.pl.report(adata, tmp_path / "a.html", n_domains=3))
    assert_stands_alone(page)
    assert {"seen", "domains", "genes", "quality"} <= _sections(page)
    assert "There are no counts" in page.text
    assert "measured</" not in page.source.split('id="genes"')[1].split("</section>")[0]
    assert "Far from what the model knows" in page.text


def test_several_libraries_and_many_domains(slide, tmp_path):
    other = sta.datasets.synthetic_visium(n_rows=10, n_cols=12, seed=3)
    libraries = {"A": slide.uns["spatial"]["synthetic_visium"], "B": {**other.uns["spatial"]["synthetic_visium"]}}
    libraries["B"]["images"] = {}
    plain = sta.datasets.synthetic_visium(n_rows=12, n_cols=12)
    both = ad.concat({"A": plain, "B": other}, label="sample", index_unique="-")
    both.uns["spatial"] = libraries
    page = Page(sta.pl.report(both, tmp_path / "a.html", library_key="sample", n_domains=22))
    assert_stands_alone(page)
    assert "Report of 2 slides" in page.text
    assert "No image for B" in page.text
    assert {"seen-0", "domains-0", "domains-1", "neighbours-0"} <= _sections(page)
    assert "seen-1" not in _sections(page)
    assert "21" in page.text


def test_results_without_their_records(slide, tmp_path):
    adata = slide.copy()
    adata.uns = {"spatial": slide.uns["spatial"]}  # as after a concatenation
    page = Page(sta.pl.report(adata, tmp_path / "a.html"))
    assert _sections(page) == {"glance", "domains", "names", "genes", "quality", "limits"}
    assert "Nothing is recorded about how the embedding was made" in page.text


def test_an_image_in_a_file_that_moves_away(slide, tmp_path):
    from PIL import Image

    adata = sta.datasets.synthetic_visium(n_rows=12, n_cols=12)
    library = adata.uns["spatial"]["synthetic_visium"]
    scale = library["scalefactors"]["tissue_hires_scalef"]
    picture = Image.fromarray(library["images"]["hires"])
    picture = picture.resize([round(side / scale) for side in picture.size])
    picture.save(tmp_path / "slide.png")
    del adata.uns["spatial"]
    page = Page(sta.pl.report(adata, tmp_path / "a.html", image=tmp_path / "slide.png", mpp=0.51, n_domains=2))
    assert "seen" in _sections(page)
    assert "0.51 µm per pixel from what was passed" in page.text
    assert sum("Tissue of library" in picture["alt"] for picture in page.all("img")) == 3
    sta.tl.embed(adata, image=tmp_path / "slide.png", progress=False)
    (tmp_path / "slide.png").unlink()
    page = Page(sta.pl.report(adata, tmp_path / "b.html", n_domains=2))
    assert "seen" not in _sections(page)
    assert "The image of library that the embedding was made from is gone" in page.text


def test_a_few_spots(tmp_path):
    adata = sta.datasets.synthetic_visium(n_rows=12, n_cols=12)[:6].copy()
    page = Page(sta.pl.report(adata, tmp_path / "a.html"))
    assert "A library has 6 spots" in page.text


# --- refusals ------------------------------------------------------------------------------------------------------


def test_refusals_leave_the_file_that_is_there(slide, snapshot, tmp_path):
    file = tmp_path / "a.html"
    file.write_text("mine")
    before = snapshot(slide)
    with pytest.raises(FileExistsError, match=r"a\.html exists.*overwrite"):
        sta.pl.report(slide, file)
    with pytest.raises(IsADirectoryError, match=r"is a folder.*report\.html"):
        sta.pl.report(slide, tmp_path)
    with pytest.raises(ValueError, match=r"n_domains must be a positive integer, got 2\.5"):
        sta.pl.report(slide, file, n_domains=2.5, overwrite=True)
    with pytest.raises(ValueError, match="genes is empty"):
        sta.pl.report(slide, file, genes=[], overwrite=True)
    with pytest.raises(ValueError, match="NOSUCHGENE"):
        sta.pl.report(slide, file, genes=["NOSUCHGENE"], overwrite=True)
    with pytest.raises(KeyError, match="'raw' not found"):
        sta.pl.report(slide, file, layer="raw", overwrite=True)
    with pytest.raises(TypeError, match="Expected an AnnData"):
        sta.pl.report("slide.h5ad", file, overwrite=True)
    assert file.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]
    assert snapshot(slide) == before


def test_backed_is_refused(slide, tmp_path):
    slide.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    with pytest.raises(ValueError, match="to_memory"):
        sta.pl.report(backed, tmp_path / "a.html")
    backed.file.close()


# --- what it is made of -----------------------------------------------------------------------------------------------


def test_marker_genes_find_the_gene_that_was_planted():
    rng = np.random.default_rng(0)
    counts = rng.poisson(5, (90, 6)).astype(np.float32)
    for domain in range(3):
        counts[30 * domain : 30 * (domain + 1), domain] += 40
    adata = ad.AnnData(csr_matrix(counts), var=pd.DataFrame(index=[f"g{i}" for i in range(6)]))
    adata.obs["stalign_domain"] = pd.Categorical(np.repeat(["0", "1", "2"], 30))
    found = marker_genes(Results(adata, None, adata.X))
    assert [found[domain][0][0] for domain in "012"] == ["g0", "g1", "g2"]
    assert all(fold > 1 for genes in found.values() for _, fold in genes[:1])
    assert marker_genes(Results(adata, None, None)) == {}


def test_enrichment_of_two_halves(hexagonal):
    sta.pp.extract_niches(hexagonal, n_neighbors=6, spot_um=100.0, niche_um=400.0)
    half = np.where(np.arange(81) < 40, "upper", "lower")
    hexagonal.obs["half"] = pd.Categorical(half, categories=["upper", "lower", "none here"])
    names, z = enrichment(hexagonal, "half", np.arange(81))
    assert names == ["upper", "lower"]
    assert z[0, 0] > 3
    assert z[1, 1] > 3
    assert z[0, 1] < -3
    assert enrichment(hexagonal, "half", np.arange(30)) is None


def test_pieces():
    assert _html.text('<a href="x">&') == "&lt;a href=&quot;x&quot;&gt;&amp;"
    assert _html.ink_on("#ffffff") == "#000"
    assert _html.ink_on("#0072b2") == "#fff"
    assert bar_length(4100) == 1000
    assert bar_length(3999) == 500
    assert bar_length(800) == 200
    assert distinct_colours(["a", "unassigned", "b"])[1] == "#d3d3d3"
    assert all(len(set(distinct_colours([str(i) for i in range(n)]))) == n for n in (2, 7, 8, 9, 10, 25, 60))


# --- in a browser -----------------------------------------------------------------------------------------------------


class _Server(http.server.ThreadingHTTPServer):
    """Serves a folder and, as the browser's proxy, sees every request that is not encrypted."""

    def __init__(self, folder: Path) -> None:
        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args):
                super().__init__(*args, directory=str(folder))

            def do_GET(self):
                self.server.asked.append(self.path)
                self.path = "/" + self.path.rpartition("/")[2]
                super().do_GET()

            def do_CONNECT(self):  # of the browser itself; pages cannot be told from it
                self.send_error(502)

            def log_message(self, *args):
                pass

        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), Handler)


def _browse(folder: Path, page: str) -> tuple[str, list[str]]:
    """Open a page and return its content when it has settled, and what was asked for."""
    with _Server(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        command = [
            str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--disable-component-update", "--no-first-run", f"--user-data-dir={folder / 'profile'}",
            f"--proxy-server={address}", "--proxy-bypass-list=<-loopback>", "--virtual-time-budget=8000",
            "--dump-dom", f"http://{address}/{page}",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)  # noqa: S603
        server.shutdown()
    own = [path.rpartition("/")[2] for path in server.asked if address in path or "evil" in path]
    return done.stdout, own


_FRAME = """<!DOCTYPE html><link rel="icon" href="data:,">
<iframe id="f" src="report.html" style="width:{width}px;height:900px;border:0"></iframe>
<p id="out"></p><script>
const f = document.getElementById("f");
f.onload = () => {{ const d = f.contentDocument, e = d.documentElement, i = [...d.images];
document.getElementById("out").textContent =
  ["found", e.scrollWidth, i.length, i.filter(p => p.complete && p.naturalWidth > 0).length].join(" "); }};
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome on PATH")
@pytest.mark.slow
def test_in_a_browser(file, page, tmp_path):
    shutil.copy(file, tmp_path / "report.html")
    n_pictures = len(page.all("img"))
    for width in (390, 1280):
        (tmp_path / "frame.html").write_text(_FRAME.format(width=width))
        content, asked = _browse(tmp_path, "frame.html")
        assert asked == ["frame.html", "report.html"]
        scroll, found, loaded = map(int, re.search(r"found (\d+) (\d+) (\d+)", content).groups())
        assert scroll <= width
        assert found == loaded == n_pictures

    # What would be fetched is seen here, and the page's own policy keeps it from being fetched.
    leak = '<img src="http://evil.example/leak.png">'
    (tmp_path / "leak.html").write_text(f'<!DOCTYPE html><link rel="icon" href="data:,"><body>{leak}</body>')
    assert "leak.png" in _browse(tmp_path, "leak.html")[1]
    (tmp_path / "policy.html").write_text(page.source.replace("</main>", f"{leak}</main>"), encoding="utf-8")
    assert "leak.png" not in _browse(tmp_path, "policy.html")[1]
