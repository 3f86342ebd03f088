"""Sparse files come back bit by bit whatever the bits, are what the paper says, and are refused when damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from test_storage import by_the_paper, unpacked
from torch import Tensor, nn

import td_plugin as td
from td_plugin import TdError
from td_plugin.export import load_sparse, save_sparse, sparse_file
from td_plugin.export.sparse_coding import DTYPES, compressed_rows

BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


def same_bits(one: Tensor, other: Tensor) -> bool:
    def raw(tensor: Tensor) -> bytes:
        return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""

    return one.dtype == other.dtype and one.shape == other.shape and raw(one) == raw(other)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, zeros: float, seed: int) -> Tensor:
    """Any pattern at all: NaN of every payload, infinities, subnormal and negative zeros."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, size), generator=generator, dtype=torch.uint8)
    raw[torch.rand(shape, generator=generator) < zeros] = 0
    negative = torch.rand(shape, generator=generator) < 0.05
    if dtype.is_floating_point:
        raw[negative] = torch.tensor([0] * (size - 1) + [128], dtype=torch.uint8)  # little-endian -0.0
    return raw.view(dtype).reshape(shape)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 30), max_size=3).map(tuple),
    dtype=st.sampled_from(sorted(DTYPES)),
    zeros=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    bits=st.sampled_from([None, 1, 5, 8, 16]),
    seed=st.integers(0, 99),
)
def test_every_bit_of_every_dtype_comes_back(shape, dtype, zeros, bits, seed, tmp_path_factory):
    path = tmp_path_factory.mktemp("sparse") / "w.sparse"
    tensor = random_bits(shape, DTYPES[dtype], zeros, seed)
    save_sparse({"w": tensor}, path, bits=bits, compare=False)
    assert same_bits(load_sparse(path)["w"], tensor)


@pytest.mark.parametrize("dtype", BITS)
def test_negative_zeros_and_payloads_of_nan(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.zeros(400, dtype=dtype)
    wide = {2: 0x7FFF, 4: 0x7FC00ABC, 8: 0x7FF8000000000ABC}[tensor.element_size()]
    tensor.view(BITS[dtype])[[3, 17]] = wide
    tensor[5], tensor[300], tensor[7] = -0.0, 1.5, float("-inf")
    save_sparse({"w": tensor}, tmp_path / "f", compare=False)
    found = load_sparse(tmp_path / "f")["w"]
    assert same_bits(found, tensor) and found.signbit()[5] and found[3].isnan()
    assert (tmp_path / "f").stat().st_size < tensor.nbytes + 500


def test_the_file_is_that_of_the_paper(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    values = (generator.standard_normal((60, 50)) * (generator.random((60, 50)) < 0.02)).astype(np.float32) + 0
    save_sparse({"w": torch.from_numpy(values)}, tmp_path / "f", bits=5, compare=False)
    gaps, kept = by_the_paper(values, 5)
    with safe_open(tmp_path / "f", "pt") as file:
        assert sorted(file.keys()) == ["w//gaps", "w//values"]
        assert file.get_tensor("w//values").tolist() == kept and 0.0 in kept  # a filler
        assert unpacked(file.get_tensor("w//gaps").numpy(), 5, len(kept)) == gaps
        table = json.loads(file.metadata()["table"])["w"]
    assert table["shape"] == [60, 50] and table["dtype"] == "float32" and table["bits"] == 5


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 40), nn.Linear(40, 3))


def test_a_masked_model_is_written_as_it_ships(tmp_path: Path) -> None:
    masked = model()
    sparsifier = td.TargetedDropout(td.recipes.targeted_weight(), 0.9)
    sparsifier.prepare(masked)
    before = {name: tensor.clone() for name, tensor in masked.state_dict().items()}
    report = save_sparse(masked, tmp_path / "f")
    assert all(torch.equal(tensor, before[name]) for name, tensor in masked.state_dict().items())
    other = model()
    found = load_sparse(tmp_path / "f", other)
    assert list(found) == list(before)
    sparsifier.squash_mask()
    assert all(same_bits(tensor, found[name]) for name, tensor in masked.state_dict().items())
    masked.eval(), other.eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(masked(x), other(x))
    assert report.sparsity > 0.8


def test_every_size_is_that_of_a_real_file(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    dense = {"w": torch.randn(300, 200, generator=generator), "b": torch.randn(300, generator=generator)}
    dense["w"][torch.rand(300, 200, generator=generator) > 0.1] = 0
    report = save_sparse(dense, tmp_path / "f", progress=True)
    save_file(dense, tmp_path / "own")
    sizes = {row.form: row.bytes for row in report.rows}
    kept = int(dense["w"].count_nonzero())
    assert sizes["dense"] == (tmp_path / "own").stat().st_size
    assert sizes["gaps + values"] == (tmp_path / "f").stat().st_size
    assert 0 < sizes["CSR, 32-bit indices"] - (8 * kept + 4 * 301 + 1200) < 500
    assert sizes["gaps + values"] < sizes["CSR, 32-bit indices"] < sizes["dense"]
    assert sizes["gaps + values, zip"] <= sizes["dense, zip"] < sizes["dense"]
    assert report.zeros == dense["w"].numel() - kept and report.weights == 60_300
    assert json.loads(json.dumps(report.to_dict()))["rows"][0]["form"] == "dense"
    assert "gaps + values" in str(report) and report.row("gaps + values").tensors == 1
    small = save_sparse(dense, tmp_path / "g", compare=False)
    assert [row.form for row in small.rows] == ["gaps + values"]
    assert small.rows[0].bytes == sizes["gaps + values"]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_compressed_rows_are_those_of_torch() -> None:
    tensor = torch.randn(20, 30).masked_fill(torch.rand(20, 30) > 0.1, 0)
    ours, theirs = compressed_rows(tensor), tensor.to_sparse_csr()
    assert torch.equal(ours["rows"].long(), theirs.crow_indices())
    assert torch.equal(ours["columns"].long(), theirs.col_indices()) and torch.equal(ours["values"], theirs.values())
    assert list(compressed_rows(torch.ones(3, 3))) == ["dense"]


def test_tied_tensors_are_written_once_and_stay_tied(tmp_path: Path) -> None:
    weight = torch.randn(100, 100)
    given = {"a": weight, "b": torch.ones(2), "c": weight, "d": weight.T, "e": weight.view(-1), "f": torch.ones(0)}
    report = save_sparse({**given, "g": torch.ones(0)}, tmp_path / "f", compare=False)
    assert report.rows[0].bytes < 3.5 * weight.nbytes
    found = load_sparse(tmp_path / "f")
    assert list(found) == [*given, "g"]
    assert found["a"] is found["c"] and all(torch.equal(found[name], tensor) for name, tensor in given.items())


def test_negative_zeros_are_told(tmp_path: Path) -> None:
    weight = torch.randn(40, 40) * (torch.arange(40) == 0)  # as a product with a mask leaves them
    negative = int((weight.signbit() & (weight == 0)).sum())
    report = save_sparse({"w": weight, "n": torch.arange(5)}, tmp_path / "f", compare=False)
    assert f"{negative} zeros are negative" in str(report)


class TestRefusals:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        tensors = {"w": torch.randn(50, 60).masked_fill(torch.rand(50, 60) > 0.1, 0), "b": torch.randn(50)}
        save_sparse(tensors, tmp_path / "f", compare=False)
        return tmp_path / "f"

    def test_cut_off_anywhere(self, path: Path) -> None:
        whole = path.read_bytes()
        for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(TdError, match=f"damaged or cut off; where: {path}"):
                load_sparse(path)

    def test_any_byte_flipped(self, path: Path) -> None:
        whole = path.read_bytes()
        expected = load_sparse(path)
        silent = 0
        for place in range(0, len(whole), 7):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
            try:
                found = load_sparse(path)
            except TdError as error:
                assert str(path) in str(error)
            else:  # a blank of the header
                silent += 1
                assert all(same_bits(found[name], tensor) for name, tensor in expected.items())
        assert silent < 5

    def test_other_files(self, path: Path, tmp_path: Path) -> None:
        with pytest.raises(TdError, match="there is no such file"):
            load_sparse(tmp_path / "none")
        save_file({"w": torch.ones(2)}, tmp_path / "dense")
        with pytest.raises(TdError, match="not a file of save_sparse"):
            load_sparse(tmp_path / "dense")

    def test_a_model_that_does_not_fit_stays_as_it_was(self, path: Path) -> None:
        other = nn.Linear(60, 50)
        before = other.weight.detach().clone()
        with pytest.raises(TdError, match=r"does not fit the model; where: .*got: b: \(50,\) in the file, None"):
            load_sparse(path, other)
        assert torch.equal(other.weight, before)

    def test_a_failed_write_leaves_the_old_file(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = path.read_bytes()

        def fails(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(sparse_file._safetensors(), "save_file", fails)
        with pytest.raises(TdError, match="cannot be written"):
            save_sparse({"w": torch.ones(3)}, path)
        assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == ["f"]

    @pytest.mark.parametrize(
        ("tensors", "what"),
        [
            ({}, "nothing to write"),
            ({"a//b": torch.ones(1)}, "names that contain"),
            ({"a": 3}, "only dense tensors"),
            ({"a": torch.ones(2, device="meta")}, "only dense tensors"),
            ({"a": torch.ones(2, dtype=torch.complex128)}, "a dtype that the file cannot hold"),
        ],
    )
    def test_what_cannot_be_written(self, tmp_path: Path, tensors: dict, what: str) -> None:
        with pytest.raises(TdError, match=what):
            save_sparse(tensors, tmp_path / "f")
        with pytest.raises(TdError, match="a gap takes 1 to 16 bits"):
            save_sparse({"a": torch.ones(2)}, tmp_path / "f", bits=17)
        assert not list(tmp_path.iterdir())
