"""Small sections in the layouts that the instruments' software and the collections write."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image
from scipy.sparse import csc_matrix, csr_matrix

MPP = 0.5


@dataclass
class Section:
    """An array of spots on an image, wider than high, with a square of its own colour under every spot."""

    rows: np.ndarray
    cols: np.ndarray
    xy: np.ndarray
    image: np.ndarray
    counts: csr_matrix
    barcodes: list[str]
    genes: list[str]
    pitch: float

    @property
    def colours(self) -> np.ndarray:
        return spot_colours(len(self.xy))


def spot_colours(n: int) -> np.ndarray:
    i = np.arange(n)
    return np.stack([20 + i * 7 % 200, 20 + i * 13 % 200, 20 + i * 29 % 200], axis=1).astype(np.uint8)


def draw(rows, cols, um, *, pitch_um: float, barcodes: list[str], genes: list[str]) -> Section:
    """Spots at ``um`` (x, y); the margin is larger at the left than at the top."""
    xy = um / MPP + np.array([3.0, 1.5]) * pitch_um
    width, height = (np.ceil(xy.max(axis=0) + 1.5 * pitch_um / MPP) // 8 * 8).astype(int)
    image = np.full((height, width, 3), 245, dtype=np.uint8)
    half = max(1, round(0.3 * pitch_um / MPP))
    for (x, y), colour in zip(np.rint(xy).astype(int), spot_colours(len(xy)), strict=True):
        image[y - half : y + half, x - half : x + half] = colour
    counts = np.random.default_rng(0).poisson(1.0, (len(xy), len(genes)))
    counts[:, 0] = np.arange(1, len(xy) + 1)
    return Section(rows, cols, xy, image, csr_matrix(counts), barcodes, genes, pitch_um / MPP)


@pytest.fixture(scope="session")
def visium() -> Section:
    rows = np.repeat(np.arange(6), 9)
    cols = np.tile(2 * np.arange(9), 6) + rows % 2
    um = np.column_stack([cols * 50.0, rows * 50.0 * np.sqrt(3)])
    barcodes = [f"{'ACGT'[i % 4]}{'ACGT'[i // 4 % 4]}{'ACGT'[i // 16]}AAACCCGGG-1" for i in range(len(rows))]
    genes = ["ERBB2", "CD3E", "TBCE", "TBCE", "EPCAM"]
    return draw(rows, cols, um, pitch_um=100.0, barcodes=barcodes, genes=genes)


@pytest.fixture(scope="session")
def bins() -> Section:
    rows, cols = (axis.ravel() for axis in np.mgrid[3:13, 5:25])
    um = np.column_stack([(cols - 5) * 8.0, (rows - 3) * 8.0])
    barcodes = [f"s_008um_{row:05d}_{col:05d}-1" for row, col in zip(rows, cols, strict=True)]
    return draw(rows, cols, um, pitch_um=8.0, barcodes=barcodes, genes=["ERBB2", "CD3E", "EPCAM"])


@pytest.fixture(scope="session")
def legacy() -> Section:
    """Legacy ST: 200 µm apart, names column x row."""
    cols, rows = (axis.ravel() for axis in np.mgrid[10:18, 13:18])
    um = np.column_stack([(cols - 10) * 200.0, (rows - 13) * 200.0])
    names = [f"SlideA1_{col}x{row}" for col, row in zip(cols, rows, strict=True)]
    return draw(rows, cols, um, pitch_um=200.0, barcodes=names, genes=["HN1", "CD3E", "EPCAM"])


def write_10x(file: Path, section: Section, *, library: str | None = "V1_Section") -> None:
    """The HDF5 layout of version 3: features × barcodes by column."""
    matrix = csc_matrix(section.counts.T)
    with h5py.File(file, "w") as handle:
        group = handle.create_group("matrix")
        group["barcodes"] = np.array(section.barcodes, dtype="S")
        group["data"], group["indices"] = matrix.data.astype(np.int32), matrix.indices.astype(np.int64)
        group["indptr"], group["shape"] = matrix.indptr.astype(np.int64), np.array(matrix.shape, dtype=np.int32)
        features = group.create_group("features")
        n = len(section.genes)
        features["id"] = np.array([f"ENSG{i:011d}" for i in range(n)], dtype="S")
        features["name"] = np.array(section.genes, dtype="S")
        features["feature_type"] = np.array(["Gene Expression"] * n, dtype="S")
        features["genome"] = np.array(["GRCh38"] * n, dtype="S")
        features["_all_tag_keys"] = np.array(["genome"], dtype="S")
        handle.attrs["chemistry_description"] = "Spatial 3' v1"
        handle.attrs["software_version"] = "spaceranger-2.0.0"
        if library is not None:
            handle.attrs["library_ids"] = np.array([library], dtype="S")


def positions(section: Section) -> pd.DataFrame:
    """Space Ranger's table, in another order than the matrix and with a spot outside the tissue."""
    table = pd.DataFrame(
        {
            "barcode": section.barcodes,
            "in_tissue": 1,
            "array_row": section.rows,
            "array_col": section.cols,
            "pxl_row_in_fullres": section.xy[:, 1],
            "pxl_col_in_fullres": section.xy[:, 0],
        }
    )
    outside = pd.DataFrame([["TTTTTTTTTTTT-1", 0, 60, 60, 9000.0, 9000.0]], columns=table.columns)
    return pd.concat([table.iloc[::-1], outside], ignore_index=True)


def write_pictures(spatial: Path, section: Section, **factors: float) -> None:
    for key, step in (("hires", 4), ("lowres", 8)):
        Image.fromarray(section.image[step // 2 :: step, step // 2 :: step]).save(spatial / f"tissue_{key}_image.png")
    content = {"tissue_hires_scalef": 0.25, "tissue_lowres_scalef": 0.125, **factors}
    (spatial / "scalefactors_json.json").write_text(json.dumps(content))


def write_visium(folder: Path, section: Section, *, header: bool) -> Path:
    (folder / "spatial").mkdir(parents=True)
    write_10x(folder / "filtered_feature_bc_matrix.h5", section)
    name = "tissue_positions.csv" if header else "tissue_positions_list.csv"
    positions(section).to_csv(folder / "spatial" / name, header=header, index=False)
    write_pictures(folder / "spatial", section, spot_diameter_fullres=65.0 / MPP, fiducial_diameter_fullres=105.0 / MPP)
    return folder


@pytest.fixture
def visium_folder(tmp_path: Path, visium: Section) -> Path:
    return write_visium(tmp_path / "sample" / "outs", visium, header=True)


@pytest.fixture
def older_visium_folder(tmp_path: Path, visium: Section) -> Path:
    return write_visium(tmp_path / "older" / "outs", visium, header=False)


@pytest.fixture
def hd_folder(tmp_path: Path, bins: Section) -> Path:
    folder = tmp_path / "colon" / "outs"
    square = folder / "binned_outputs" / "square_008um"
    (square / "spatial").mkdir(parents=True)
    (folder / "binned_outputs" / "square_016um").mkdir()
    write_10x(square / "filtered_feature_bc_matrix.h5", bins, library=None)
    positions(bins).to_parquet(square / "spatial" / "tissue_positions.parquet", index=False)
    write_pictures(square / "spatial", bins, microns_per_pixel=MPP, bin_size_um=8.0, spot_diameter_fullres=8.0 / MPP)
    return folder


HEST_METADATA = {
    "id": "TENX95",
    "st_technology": "Visium",
    "organ": "Breast",
    "patient": None,
    "pixel_size_um_estimated": 0.5,
    "pixel_size_um_embedded": 0.501,
    "inter_spot_dist": 100.0,
    "spot_diameter": 55.0,
    "spots_under_tissue": 54,
    "treatment_comment": float("nan"),
}


@pytest.fixture
def hest(tmp_path, visium):
    """``st/``, ``wsis/`` with a pyramid and ``metadata/`` of one sample, as the collection's own code writes them."""
    for name in ("st", "wsis", "metadata", "patches"):
        (tmp_path / name).mkdir()
    obs = pd.DataFrame({"in_tissue": 1, "array_row": visium.rows, "array_col": visium.cols}, index=visium.barcodes)
    adata = anndata.AnnData(visium.counts.tocsc().astype(np.int64), obs=obs)
    adata.var_names = visium.genes
    adata.obsm["spatial"] = np.rint(visium.xy).astype(np.int64)
    factor = 300 / max(visium.image.shape[:2])
    rows, cols = (np.arange(int(side * factor)) for side in visium.image.shape[:2])
    small = visium.image[(rows[:, None] / factor).astype(int), (cols / factor).astype(int)]
    factors = {"tissue_downscaled_fullres_scalef": factor, "spot_diameter_fullres": 55.0 / 0.5}
    adata.uns["spatial"] = {"ST": {"images": {"downscaled_fullres": small}, "scalefactors": factors}}
    adata.write_h5ad(tmp_path / "st" / "TENX95.h5ad")
    options = {"tile": (128, 128), "compression": "jpeg", "photometric": "rgb", "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(tmp_path / "wsis" / "TENX95.tif", bigtiff=True) as tif:
        tif.write(visium.image, resolution=(2e4, 2e4), **options)
        tif.write(visium.image[::2, ::2], resolution=(1e4, 1e4), subfiletype=1, **options)
    (tmp_path / "metadata" / "TENX95.json").write_text(json.dumps(HEST_METADATA))
    return tmp_path


def write_slide(root, section, technology, slide, names, radius):
    """The tables as pandas writes them, named after the slide."""
    folder = root / technology
    for name in ("coord", "gene_exp", "image"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    coord = pd.DataFrame({"yaxis": section.xy[:, 1], "xaxis": section.xy[:, 0], "r": radius}, index=names)
    coord.iloc[::-1].to_csv(folder / "coord" / f"{slide}_coord.csv")
    counts = pd.DataFrame(section.counts.toarray(), index=names, columns=section.genes)
    counts.to_csv(folder / "gene_exp" / f"{slide}_count.csv")
    Image.fromarray(section.image).save(folder / "image" / f"{slide}.png")
    return folder


@pytest.fixture
def collection(tmp_path, visium, legacy, bins):
    write_slide(
        tmp_path, legacy, "ST", "Human_Breast_ST_A1", [f"Human_Breast_ST_{n[5:]}" for n in legacy.barcodes], 100
    )
    names = [f"Human_Brain_V1_{barcode}" for barcode in visium.barcodes]
    write_slide(tmp_path, visium, "Visium", "Human_Brain_V1", names, 65.0)
    names = [f"Human_Colon_HD_{barcode}" for barcode in bins.barcodes]
    write_slide(tmp_path, bins, "VisiumHD", "Human_Colon_HD", names, 8.0)
    return tmp_path
