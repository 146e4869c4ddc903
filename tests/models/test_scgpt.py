from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch
from scipy import sparse

from stalign.models._checkpoint import check_state
from stalign.models.encoders import ScGPT, build_gene_encoder
from stalign.models.encoders._scgpt import _UNUSED, Tokens, _Network, _official_names, _rename, bin_values

WIDTH, N_TOKENS = 8, 23
TOLERANCE = 1e-5


def _state(naming: str = "Wqkv") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "encoder.embedding.weight": (N_TOKENS, WIDTH),
        "value_encoder.linear1.weight": (WIDTH, 1),
        "value_encoder.linear1.bias": (WIDTH,),
        "value_encoder.linear2.weight": (WIDTH, WIDTH),
        "value_encoder.linear2.bias": (WIDTH,),
        "decoder.fc.0.weight": (WIDTH, WIDTH),
        "flag_encoder.weight": (2, WIDTH),
    }
    norms = ["encoder.enc_norm", "value_encoder.norm"]
    for layer in range(2):
        prefix = f"transformer_encoder.layers.{layer}"
        qkv, out = {
            "Wqkv": ("self_attn.Wqkv.", "self_attn.out_proj."),
            "in_proj": ("self_attn.in_proj_", "self_attn.out_proj."),
            "impl": ("self_attn._impl.Wqkv.", "self_attn._impl.out_proj."),
        }[naming]
        norms += [f"{prefix}.norm1", f"{prefix}.norm2"]
        for part, shape in {
            qkv: (3 * WIDTH, WIDTH),
            out: (WIDTH, WIDTH),
            "linear1.": (WIDTH, WIDTH),
            "linear2.": (WIDTH, WIDTH),
        }.items():
            shapes[f"{prefix}.{part}weight"] = shape
            shapes[f"{prefix}.{part}bias"] = shape[:1]
    # sorted by content, not by name, so that every naming gets the same numbers
    order = sorted(shapes, key=lambda key: key.replace("_impl.", "").replace("Wqkv.", "in_proj_"))
    state = {key: torch.randn(shapes[key], generator=generator) * 0.5 for key in order}
    for norm in norms:
        state[f"{norm}.weight"], state[f"{norm}.bias"] = torch.ones(WIDTH), torch.zeros(WIDTH)
    return state


GENES = [f"G{i}" for i in range(N_TOKENS - 3)]
VOCAB = {gene: i for i, gene in enumerate(GENES)} | {"<pad>": 20, "<cls>": 21, "<eoc>": 22}
ARGS = {"embsize": WIDTH, "nheads": 2, "d_hid": WIDTH, "nlayers": 2, "pad_token": "<pad>", "pad_value": -2, "lr": 1e-4}


def _write(folder, *, state=None, vocab=None, args=None):
    folder.mkdir(exist_ok=True)
    (folder / "args.json").write_text(json.dumps(ARGS if args is None else args))
    (folder / "vocab.json").write_text(json.dumps(VOCAB if vocab is None else vocab))
    torch.save(_state() if state is None else state, folder / "best_model.pt")
    return folder


@pytest.fixture
def scgpt(tmp_path):
    return ScGPT.from_folder(_write(tmp_path / "scgpt"))


@pytest.fixture
def counts():
    rng = np.random.default_rng(0)
    return rng.poisson(0.8, size=(9, len(GENES))).astype(np.float32)


# -- reference -------------------------------------------------------------------------------------------------------


@pytest.mark.reference
@pytest.mark.parametrize("naming", ["flash", "inproj", "impl"])
def test_reference(shared, tmp_path, naming):
    source = shared / "reference" / "scgpt_tiny"
    folder = source / f"ckpt_{naming}"
    if naming == "impl":
        folder = tmp_path / "impl"
        shutil.copytree(source / "ckpt_flash", folder, copy_function=shutil.copyfile)
        state = torch.load(folder / "best_model.pt", weights_only=True)
        state = {key.replace("self_attn.", "self_attn._impl."): value for key, value in state.items()}
        torch.save(state, folder / "best_model.pt")
    data = np.load(source / "input_A.npz")
    scgpt = ScGPT.from_folder(folder)
    before = scgpt.embed(data["counts"], data["gene_symbols"], normalise=False)
    after = scgpt.embed(sparse.csr_matrix(data["counts"]), data["gene_symbols"], batch_size=5)
    np.testing.assert_allclose(before, data["expected_cls_before_l2"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(after, data["expected_embedding"], rtol=0, atol=TOLERANCE)
    assert scgpt.report.n_known_genes < len(data["gene_symbols"])


@pytest.mark.reference
def test_reference_tokens(shared):
    source = shared / "reference" / "scgpt_tiny"
    data = np.load(source / "input_A.npz")
    scgpt = ScGPT.from_folder(source / "ckpt_flash")
    tokens = scgpt._tokens(sparse.csr_matrix(data["counts"]), scgpt._gene_ids(data["gene_symbols"]))
    digits = bin_values(tokens)
    for cell in range(len(data["counts"])):
        real = data["token_ids"][cell] != scgpt.pad_id
        ids, values = data["token_ids"][cell][real][1:], data["token_values"][cell][real][1:]
        here = slice(*tokens.indptr[cell : cell + 2])
        assert dict(zip(tokens.ids[here], digits[here], strict=True)) == dict(zip(ids, values, strict=True))


@pytest.mark.reference
def test_public_checkpoint_fits(shared, read_shapes):
    """The list of what the public whole-human file holds is what the network takes, plus heads that are not used."""
    public = read_shapes((shared / "reference" / "whole_human_state_dict_keys.txt").read_text())
    public = {key: shape for key, shape in public.items() if not key.startswith(_UNUSED)}
    public = {key: torch.empty(shape, device="meta") for key, shape in public.items()}
    with torch.device("meta"):
        own = _Network(60697, 512, 8, 512, 12).state_dict()
    names = _official_names(12)
    check_state(_rename(public), {names[key]: value for key, value in own.items()}, what="the public file")


# -- binning ---------------------------------------------------------------------------------------------------------


def _one_cell(values):
    return Tokens(np.array([0, len(values)]), np.arange(len(values)), np.asarray(values, dtype=float))


@pytest.mark.parametrize("n", [2, 3, 50, 51, 333])
def test_binning_is_numpys_digitize(n):
    values = np.random.default_rng(n).lognormal(size=n)
    edges = np.quantile(values, np.linspace(0, 1, 50))
    np.testing.assert_array_equal(bin_values(_one_cell(values)), np.digitize(values, edges))


def test_conventions_for_ties():
    tokens = _one_cell([1.0] * 50 + [2.0] * 50)
    # 49 · 49 / 99 = 24.25 and 49 · 50 / 99 = 24.75
    assert set(bin_values(tokens, binning="upper")[:50]) == {25}
    assert set(bin_values(tokens, binning="lower")[:50]) == {1}
    assert set(bin_values(tokens, binning="middle")[:50]) == {13}
    assert set(bin_values(tokens, binning="upper")[50:]) == {50}
    assert set(bin_values(tokens, binning="lower")[50:]) == {26}
    assert bin_values(_one_cell([7.0]), binning="upper") == [50]
    assert bin_values(_one_cell([7.0]), binning="lower") == [1]


def test_random_binning_is_uniform_over_the_tie():
    tokens = _one_cell([1.0] * 5000 + [2.0] * 5000)
    random = np.random.default_rng(0).integers(0, 2**64, size=10_000, dtype=np.uint64)
    digits = bin_values(tokens, binning="random", random=random)[:5000]
    assert digits.min() == 1
    assert digits.max() == 25
    assert abs(digits.mean() - 13) < 0.5


# -- embedding -------------------------------------------------------------------------------------------------------


def test_unit_norm(scgpt, counts):
    embedding = scgpt.embed(counts, GENES)
    assert embedding.dtype == np.float32
    assert embedding.shape == (9, WIDTH)
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("naming", ["in_proj", "impl"])
def test_namings_agree(scgpt, counts, tmp_path, naming):
    other = ScGPT.from_folder(_write(tmp_path / naming, state=_state(naming)))
    np.testing.assert_array_equal(other.embed(counts, GENES), scgpt.embed(counts, GENES))


@pytest.mark.parametrize("binning", ["upper", "random"])
@pytest.mark.parametrize("max_length", [1200, 6])
def test_order_and_batches_change_nothing(scgpt, counts, binning, max_length):
    options = {"binning": binning, "max_length": max_length, "seed": 3}
    whole = scgpt.embed(counts, GENES, **options)
    one_by_one = scgpt.embed(counts, GENES, batch_size=1, **options)
    np.testing.assert_allclose(one_by_one, whole, atol=1e-5)
    cells, genes = np.random.default_rng(1).permutation(9), np.random.default_rng(2).permutation(len(GENES))
    shuffled = scgpt.embed(counts[cells][:, genes], np.array(GENES)[genes], **options)
    np.testing.assert_allclose(shuffled, whole[cells], atol=1e-5)
    np.testing.assert_allclose(scgpt.embed(counts[4:6], GENES, **options), whole[4:6], atol=1e-5)


def test_blocks_change_nothing(scgpt, counts, monkeypatch):
    counts[3] = 0
    whole = scgpt.embed(counts, GENES, max_length=6)
    report = scgpt.report
    monkeypatch.setattr("stalign.models.encoders._scgpt._CELLS_PER_BLOCK", 2)
    np.testing.assert_allclose(scgpt.embed(counts, GENES, max_length=6), whole, atol=1e-5)
    assert scgpt.report == report


def test_seed(scgpt, counts):
    random = [scgpt.embed(counts, GENES, binning="random", seed=seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(random[0], random[1])
    assert np.abs(random[0] - random[2]).max() > 1e-3
    sampled = [scgpt.embed(counts, GENES, max_length=5, seed=seed) for seed in (0, 1)]
    assert scgpt.report.n_sampled > 0
    assert np.abs(sampled[0] - sampled[1]).max() > 1e-3
    np.testing.assert_array_equal(scgpt.embed(counts, GENES, seed=0), scgpt.embed(counts, GENES, seed=1))


def test_raw_and_log_counts_agree(scgpt, counts):
    np.testing.assert_allclose(scgpt.embed(np.log1p(counts), GENES), scgpt.embed(counts, GENES), atol=1e-6)


def test_unsigned_integers(scgpt, counts):
    np.testing.assert_array_equal(scgpt.embed(counts.astype(np.uint16), GENES), scgpt.embed(counts, GENES))


def test_empty_cells_and_unknown_genes(scgpt, counts):
    counts = np.hstack([counts, np.ones((9, 1), dtype=np.float32)])
    counts[2, :-1] = 0
    embedding = scgpt.embed(counts, [*GENES, "not a gene"])
    np.testing.assert_array_equal(embedding[2], 0)
    assert np.isfinite(embedding).all()
    assert scgpt.report == (9, 21, 20, 1, 0)
    np.testing.assert_array_equal(scgpt.embed(np.zeros((2, 20)), GENES), 0)


def test_explicit_zeros_and_duplicate_entries(scgpt):
    rows, columns = [0, 0, 0], [1, 1, 2]
    matrix = sparse.coo_matrix(([2.0, 3.0, 1.0], (rows, columns)), shape=(1, 20)).tocsr()
    untidy = sparse.csr_matrix(
        (np.array([2.0, 3.0, 1.0, 0.0]), np.array([1, 1, 2, 4]), np.array([0, 4])), shape=(1, 20)
    )
    np.testing.assert_array_equal(scgpt.embed(untidy, GENES), scgpt.embed(matrix, GENES))
    assert untidy.nnz == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: (-c, GENES), "negative values"),
        (lambda c: (c * np.nan, GENES), "NaN or infinite"),
        (lambda c: (c, GENES[:-1]), "20 columns, but 19 gene names"),
        (lambda c: (c, [f"ENSG{i}" for i in range(20)]), "None of the 20 gene names.*not Ensembl ids"),
    ],
)
def test_bad_counts(scgpt, counts, change, message):
    with pytest.raises(ValueError, match=message):
        scgpt.embed(*change(counts))


@pytest.mark.parametrize(
    "options", [{"binning": "uper"}, {"batch_size": 0}, {"max_length": 1}, {"seed": -1}, {"n_bins": 2}]
)
def test_bad_options(scgpt, counts, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        scgpt.embed(counts, GENES, **options)


# -- files -----------------------------------------------------------------------------------------------------------


def test_vocabulary_with_gaps(tmp_path):
    vocab = {**VOCAB, "G3": 40}
    with pytest.raises(ValueError, match="gap or a repeat at id 3"):
        ScGPT.from_folder(_write(tmp_path / "x", vocab=vocab))
    with pytest.raises(ValueError, match="gap or a repeat at id 1"):
        ScGPT.from_folder(_write(tmp_path / "x", vocab={**VOCAB, "G1": 0}))
    with pytest.raises(ValueError, match=r"not: \['G1'\]"):
        ScGPT.from_folder(_write(tmp_path / "x", vocab={**VOCAB, "G1": 1.5}))


def test_specials_are_appended(tmp_path, scgpt, counts):
    folder = _write(tmp_path / "x", vocab={gene: i for i, gene in enumerate(GENES)})
    np.testing.assert_array_equal(ScGPT.from_folder(folder).embed(counts, GENES), scgpt.embed(counts, GENES))


def test_vocabulary_of_another_model(tmp_path):
    vocab = VOCAB | {"extra": 23}
    with pytest.raises(ValueError, match=r"embeddings of 23 tokens, but .* names 24"):
        ScGPT.from_folder(_write(tmp_path / "x", vocab=vocab))


def test_wrong_embsize(tmp_path):
    with pytest.raises(ValueError, match=r"embsize 16.*another shape"):
        ScGPT.from_folder(_write(tmp_path / "x", args={**ARGS, "embsize": 16}))
    with pytest.raises(ValueError, match="not a multiple of nheads"):
        ScGPT.from_folder(_write(tmp_path / "x", args={**ARGS, "nheads": 3}))
    with pytest.raises(ValueError, match="lacks \\['nlayers'\\]"):
        ScGPT.from_folder(_write(tmp_path / "x", args={k: v for k, v in ARGS.items() if k != "nlayers"}))


@pytest.mark.parametrize("key", ["bn.weight", "dsbn.bns.0.weight"])
def test_batch_normalisation_is_refused(tmp_path, key):
    with pytest.raises(ValueError, match="changes the embedding"):
        ScGPT.from_folder(_write(tmp_path / "x", state=_state() | {key: torch.ones(WIDTH)}))


def test_missing_and_foreign_weights(tmp_path):
    state = _state()
    del state["transformer_encoder.layers.1.linear2.bias"]
    with pytest.raises(ValueError, match=r"keys are missing: \['transformer_encoder\.layers\.1\.linear2\.bias'\]"):
        ScGPT.from_folder(_write(tmp_path / "x", state=state))
    with pytest.raises(ValueError, match="do not belong to it: \\['batch_encoder"):
        ScGPT.from_folder(_write(tmp_path / "x", state=_state() | {"batch_encoder.weight": torch.ones(2, WIDTH)}))
    with pytest.raises(ValueError, match="in two namings"):
        ScGPT.from_folder(_write(tmp_path / "x", state=_state() | _state("in_proj")))


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        ScGPT.from_folder(tmp_path / "nowhere")
    for name in ("args.json", "vocab.json", "best_model.pt"):
        folder = _write(tmp_path / f"without-{name}")
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            ScGPT.from_folder(folder)
        folder = _write(tmp_path / f"damaged-{name}")
        (folder / name).write_bytes((folder / name).read_bytes()[:60])
        with pytest.raises(ValueError, match=name):
            ScGPT.from_folder(folder)


class Payload:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_code_is_not_executed(tmp_path):
    trap = tmp_path / "executed"
    folder = _write(tmp_path / "x", state={**_state(), "payload": Payload(str(trap))})
    with pytest.raises(ValueError, match="is refused"):
        ScGPT.from_folder(folder)
    assert not trap.exists()


# -- as a branch -----------------------------------------------------------------------------------------------------


def test_branch(scgpt, counts):
    branch = build_gene_encoder("scgpt", vocabulary=GENES, dim=WIDTH)
    matrix = sparse.csr_matrix(counts)
    with pytest.raises(ValueError, match="no scGPT checkpoint is attached"):
        branch.preprocess(matrix)
    branch.attach(scgpt)
    assert branch.state_dict() == {}
    np.testing.assert_array_equal(branch.preprocess(matrix), scgpt.embed(matrix, GENES))
    assert branch.prompt(np.array([1, 4])).shape == (WIDTH,)
    with pytest.raises(ValueError, match="embeds to 8 numbers, this model takes 512"):
        build_gene_encoder("scgpt").attach(scgpt)
