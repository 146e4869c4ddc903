"""Checkpoints of other sizes and habits, against a second implementation: PyTorch's transformer, NumPy's quantiles."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from torch import nn

from stalign.models.encoders import ScGPT
from stalign.models.encoders._scgpt import Tokens, bin_values

SPECIALS = ("<pad>", "<cls>", "<eoc>")


class Reference(nn.Module):
    """The embedding path as the facts describe it; attention and layers are PyTorch's."""

    def __init__(self, n_tokens: int, width: int, heads: int, feedforward: int, layers: int) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.embedding = nn.Embedding(n_tokens, width)
        self.encoder.enc_norm = nn.LayerNorm(width)
        self.value_encoder = nn.Module()
        self.value_encoder.linear1 = nn.Linear(1, width)
        self.value_encoder.linear2 = nn.Linear(width, width)
        self.value_encoder.norm = nn.LayerNorm(width)
        layer = nn.TransformerEncoderLayer(width, heads, feedforward, dropout=0.0, batch_first=True)
        self.transformer_encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, ids: list[int], values: list[float]) -> torch.Tensor:
        value = torch.tensor(values, dtype=torch.float32).clamp(max=512).view(1, -1, 1)
        value = self.value_encoder.linear2(torch.relu(self.value_encoder.linear1(value)))
        x = self.encoder.enc_norm(self.encoder.embedding(torch.tensor([ids]))) + self.value_encoder.norm(value)
        return self.transformer_encoder(x)[0, 0]


def digits(values: np.ndarray, binning: str = "upper") -> np.ndarray:
    edges = np.quantile(values, np.linspace(0, 1, 50))
    most, least = np.digitize(values, edges), np.digitize(values, edges, right=True)
    share = {"upper": 0.0, "middle": 0.5, "lower": 1 - 1e-9}[binning]
    return np.array([math.ceil(m - share * (m - k)) for m, k in zip(most, least, strict=True)])


def expected(
    reference: Reference, vocab: dict[str, int], counts: np.ndarray, names: list[str], **options
) -> np.ndarray:
    rows = []
    for cell in counts:
        keep = [i for i, name in enumerate(names) if name in vocab and cell[i] != 0]
        ids = [vocab["<cls>"], *(vocab[names[i]] for i in keep)]
        values = [-2.0, *digits(cell[keep].astype(float), **options)]
        with torch.inference_mode():
            state = reference(ids, values).numpy()
        rows.append(state / np.linalg.norm(state))
    return np.array(rows, dtype=np.float32)


def make(folder, *, width=24, heads=3, feedforward=40, layers=3, genes=60, naming="in_proj", listed=SPECIALS, seed=0):
    """Write a checkpoint; returns the reference with its weights, and the vocabulary."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    names = [f"GENE{i}" for i in range(genes)]
    # Ids in no order of the names, entries of the file in no order of the ids.
    ids = rng.permutation(genes + len(listed)) if listed == SPECIALS else np.arange(genes + len(listed))
    vocab = {name: int(number) for name, number in zip([*names, *listed], ids, strict=True)}
    full = dict(vocab)
    for special in SPECIALS:
        full.setdefault(special, len(full))
    reference = Reference(len(full), width, heads, feedforward, layers).eval()
    for parameter in reference.parameters():
        nn.init.normal_(parameter, std=0.4)
    state = dict(reference.state_dict())
    state |= {"cls_decoder.out_layer.weight": torch.randn(7, width), "decoder.fc.0.weight": torch.randn(width, width)}
    if naming != "in_proj":
        state = {key.replace("self_attn.in_proj_", "self_attn.Wqkv."): value for key, value in state.items()}
    if naming == "impl":
        state = {key.replace("self_attn.", "self_attn._impl."): value for key, value in state.items()}
    folder.mkdir()
    torch.save(state, folder / "best_model.pt")
    order = rng.permutation(len(vocab))
    shuffled = {list(vocab)[i]: vocab[list(vocab)[i]] for i in order}
    (folder / "vocab.json").write_text(json.dumps(shuffled, indent=1))
    args = {"embsize": width, "nheads": heads, "d_hid": feedforward, "nlayers": layers, "n_bins": 7, "max_seq_len": 3}
    (folder / "args.json").write_text(json.dumps({"world_size": 8, "a key of tomorrow": {"x": [1]}, **args}))
    return reference, full


def draw(n: int, genes: int, seed: int = 1, mean: float = 1.5) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.poisson(rng.lognormal(np.log(mean), 1.0, size=(n, genes))).astype(np.float32)


@pytest.mark.parametrize(
    "size",
    [
        {},
        {"width": 8, "heads": 1, "feedforward": 8, "layers": 1},
        {"width": 32, "heads": 8, "feedforward": 16, "layers": 5},
        {"width": 20, "heads": 5, "feedforward": 64, "layers": 2, "genes": 400},
    ],
)
@pytest.mark.parametrize("naming", ["flash", "in_proj", "impl"])
def test_sizes_and_namings(tmp_path, size, naming):
    reference, vocab = make(tmp_path / "scgpt", naming=naming, **size)
    n_genes = size.get("genes", 60)
    counts, names = draw(6, n_genes + 2), [*(f"GENE{i}" for i in range(n_genes)), "unknown", "<cls>"]
    names[-1] = "another unknown"
    got = ScGPT.from_folder(tmp_path / "scgpt").embed(sparse.csc_matrix(counts), names)
    assert got.shape == (6, size.get("width", 24))
    np.testing.assert_allclose(got, expected(reference, vocab, counts, names), rtol=0, atol=1e-5)


@pytest.mark.parametrize("listed", [(), ("<pad>",), ("<pad>", "<cls>"), ("<eoc>",)])
def test_specials_that_are_not_listed(tmp_path, listed):
    reference, vocab = make(tmp_path / "scgpt", listed=listed)
    counts, names = draw(4, 60), [f"GENE{i}" for i in range(60)]
    got = ScGPT.from_folder(tmp_path / "scgpt").embed(counts, names)
    np.testing.assert_allclose(got, expected(reference, vocab, counts, names), rtol=0, atol=1e-5)


@pytest.mark.parametrize("binning", ["upper", "middle", "lower"])
def test_conventions_of_ties(tmp_path, binning):
    reference, vocab = make(tmp_path / "scgpt", genes=300)
    counts, names = draw(5, 300, mean=0.8), [f"GENE{i}" for i in range(300)]
    got = ScGPT.from_folder(tmp_path / "scgpt").embed(counts, names, binning=binning)
    np.testing.assert_allclose(got, expected(reference, vocab, counts, names, binning=binning), rtol=0, atol=1e-5)


@pytest.mark.parametrize("binning", ["upper", "middle", "lower"])
def test_bins_are_numpys_where_an_edge_meets_a_value(binning):
    """With n - 1 a multiple of 7 some edges fall exactly on a value, and rounding decides."""
    rng = np.random.default_rng(0)
    for n in (8, 15, 50, 99, 148, 344, 708, 1030):
        for _ in range(25):
            values = rng.poisson(rng.lognormal(0.5, 1.2, n)) + 1.0
            tokens = Tokens(np.array([0, n]), np.arange(n), values)
            np.testing.assert_array_equal(bin_values(tokens, binning=binning), digits(values, binning))


def test_duplicate_genes_are_tokens_of_their_own(tmp_path):
    reference, vocab = make(tmp_path / "scgpt")
    names = [f"GENE{i % 40}" for i in range(60)]
    counts = draw(5, 60)
    got = ScGPT.from_folder(tmp_path / "scgpt").embed(counts, names)
    np.testing.assert_allclose(got, expected(reference, vocab, counts, names), rtol=0, atol=1e-5)


def test_long_cells(tmp_path):
    reference, vocab = make(tmp_path / "scgpt", width=8, heads=2, feedforward=8, layers=1, genes=1500)
    scgpt = ScGPT.from_folder(tmp_path / "scgpt")
    names = [f"GENE{i}" for i in range(1500)]
    counts = draw(4, 1500, mean=6) + 1
    counts[1, 300:] = 0
    counts[2, 1199:] = 0  # with <cls> exactly as long as allowed
    whole = expected(reference, vocab, counts, names)
    np.testing.assert_allclose(scgpt.embed(counts, names, max_length=1501), whole, rtol=0, atol=1e-5)
    assert scgpt.report.n_sampled == 0
    got = scgpt.embed(counts, names)
    assert scgpt.report.n_sampled == 2
    np.testing.assert_allclose(got[[1, 2]], whole[[1, 2]], rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, rtol=1e-5)
    for other in (scgpt.embed(counts, names, batch_size=1), scgpt.embed(counts[::-1], names)[::-1]):
        np.testing.assert_allclose(other, got, rtol=0, atol=1e-5)
    # A sample is 1,199 of the cell's own tokens with their own bins: the reference on them says the same.
    tokens = scgpt._tokens(sparse.csr_matrix(counts), scgpt._gene_ids(names))
    kept, n_long = scgpt._shorten(tokens._replace(values=bin_values(tokens)), tokens.values, 0, 1200)
    assert n_long == 2
    for cell in (0, 3):
        here = slice(*kept.indptr[cell : cell + 2])
        assert len(set(kept.ids[here])) == 1199
        every = dict(zip([vocab[name] for name in names], digits(counts[cell].astype(float)), strict=True))
        assert all(every[i] == value for i, value in zip(kept.ids[here], kept.values[here], strict=True))
        with torch.inference_mode():
            state = reference([vocab["<cls>"], *kept.ids[here]], [-2.0, *kept.values[here]]).numpy()
        np.testing.assert_allclose(got[cell], state / np.linalg.norm(state), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "as_given",
    [
        sparse.csr_matrix,
        sparse.csr_array,
        sparse.csc_matrix,
        sparse.coo_matrix,
        np.asfortranarray,
        pd.DataFrame,
        torch.from_numpy,
        np.ndarray.tolist,
        lambda x: x.astype(np.uint8),
        lambda x: x.astype(np.int64),
        lambda x: x.astype(np.float16),
    ],
)
def test_kinds_of_counts(tmp_path, as_given):
    make(tmp_path / "scgpt")
    scgpt, names = ScGPT.from_folder(tmp_path / "scgpt"), np.array([f"GENE{i}" for i in range(60)])
    counts = draw(4, 60)
    np.testing.assert_array_equal(scgpt.embed(as_given(counts), names), scgpt.embed(counts, names))


@pytest.mark.parametrize("bad", [np.zeros(60), np.full((2, 60), "x"), np.zeros((2, 60, 1))])
def test_what_is_no_matrix_of_numbers(tmp_path, bad):
    make(tmp_path / "scgpt")
    with pytest.raises(ValueError, match=r"must be a .* matrix of numbers"):
        ScGPT.from_folder(tmp_path / "scgpt").embed(bad, [f"GENE{i}" for i in range(60)])


def test_no_cells(tmp_path):
    make(tmp_path / "scgpt")
    assert ScGPT.from_folder(tmp_path / "scgpt").embed(np.zeros((0, 2)), ["GENE1", "GENE2"]).shape == (0, 24)


def test_half_precision_and_old_files(tmp_path):
    reference, vocab = make(tmp_path / "scgpt")
    file = tmp_path / "scgpt" / "best_model.pt"
    state = torch.load(file, weights_only=True)
    counts, names = draw(3, 60), [f"GENE{i}" for i in range(60)]
    torch.save(state, file, _use_new_zipfile_serialization=False)
    got = ScGPT.from_folder(tmp_path / "scgpt").embed(counts, names)
    np.testing.assert_allclose(got, expected(reference, vocab, counts, names), rtol=0, atol=1e-5)
    torch.save({"model_state_dict": {f"module.{key}": value.half() for key, value in state.items()}}, file)
    halved = ScGPT.from_folder(tmp_path / "scgpt")
    assert halved.network.embedding.weight.dtype == torch.float32
    np.testing.assert_allclose(halved.embed(counts, names), got, atol=5e-2)


def test_bad_files(tmp_path):
    make(tmp_path / "scgpt")
    folder = tmp_path / "scgpt"
    file = folder / "best_model.pt"
    content = file.read_bytes()
    flipped = bytearray(content)
    place = content.find(torch.load(file, weights_only=True)["encoder.embedding.weight"].numpy().tobytes()[:64])
    flipped[place + 10] ^= 0x40
    file.write_bytes(flipped)
    with pytest.raises(ValueError, match="truncated or corrupt"):
        ScGPT.from_folder(folder)
    file.write_bytes(content)
    state = torch.load(file, weights_only=True)
    state["value_encoder.linear1.bias"][0] = torch.nan
    torch.save(state, file)
    with pytest.raises(ValueError, match="NaN or infinite weights"):
        ScGPT.from_folder(folder)
    file.write_bytes(content)
    vocab = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({**vocab, "GENE3": 10**30}))
    with pytest.raises(ValueError, match="gap or a repeat"):
        ScGPT.from_folder(folder)
    (folder / "vocab.json").write_text(json.dumps(list(vocab)))
    with pytest.raises(ValueError, match="must hold a JSON object"):
        ScGPT.from_folder(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "args.json").write_text(json.dumps({"embsize": 24, "nheads": 3, "d_hid": 40, "nlayers": 4}))
    with pytest.raises(ValueError, match=r"nlayers 4.*keys are missing"):
        ScGPT.from_folder(folder)
    (folder / "args.json").write_text(json.dumps({"embsize": 24, "nheads": 3, "d_hid": 40, "nlayers": 2}))
    with pytest.raises(ValueError, match=r"nlayers 2.*do not belong"):
        ScGPT.from_folder(folder)


def test_genes_of_the_vocabulary(tmp_path):
    _, vocab = make(tmp_path / "scgpt")
    genes = ScGPT.from_folder(tmp_path / "scgpt").genes
    assert set(genes) == set(vocab) - set(SPECIALS)
    assert [vocab[gene] for gene in genes] == sorted(vocab[gene] for gene in genes)
