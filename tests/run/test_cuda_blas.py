"""Products by cuBLASLt's algorithms, beside torch's."""

import pytest
import torch

from trtllm_cli.kernels.cuda.cublaslt import CublasLt, Operands
from trtllm_cli.run.backends.cuda_blas import Blas, Product, by_torch

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
N, K = 512, 256
OPERANDS = Operands(x=256, w=512, y=768, rows=64, n=N, k=K, x_type="bfloat16", y_type="bfloat16")


@pytest.mark.parametrize("change", [{"x": 8}, {"w": 2}, {"y": 8}, {"bias": 24}, {"k": 252}, {"n": 508}])
def test_what_is_not_aligned_is_left_to_torch(change):
    assert OPERANDS.are_aligned
    assert not OPERANDS._replace(**change).are_aligned


def test_rows_of_bytes_are_longer_for_as_many_inputs():
    assert OPERANDS._replace(k=24).are_aligned
    assert not OPERANDS._replace(k=24, x_type="float8_e4m3fn", scales=(256, 512)).are_aligned


def test_the_library_is_left_alone_until_it_is_asked(monkeypatch):
    """Products as torch does them need nothing of it; a process may not have it at all."""
    asked = []
    monkeypatch.setattr(CublasLt, "loaded", lambda: asked.append(True))
    blas = Blas(0, torch.device("cpu"))
    x, w, bias = torch.randn(4, K).bfloat16(), torch.randn(N, K).bfloat16(), torch.randn(N).bfloat16()
    for added in (None, bias):
        product = Product(x, w.t(), torch.empty(4, N, dtype=torch.bfloat16), added)
        blas.bound(product, "")()
        expected = x.float() @ w.float().t() + (0 if added is None else added.float())
        assert (product.y.float() - expected).norm() < 4e-3 * expected.norm()
    assert not asked
    assert (blas.name, blas.algorithms(product), len(asked)) == ("", [], 1)
    product.y.zero_()
    blas.bound(product, "00" * 64)()
    assert (product.y.float() - expected).norm() < 4e-3 * expected.norm()


@pytest.fixture(scope="module")
def blas():
    made = Blas(torch.cuda.current_stream().cuda_stream, torch.device("cuda"))
    assert made.name.startswith("cuBLASLt 1")
    return made


def product_of(rows, kind):
    torch.manual_seed(rows)
    x, w = torch.randn(rows, K, device="cuda"), torch.randn(N, K, device="cuda")
    bias = torch.randn(N, device="cuda").bfloat16() if "bias" in kind else None
    y = torch.empty(rows, N, device="cuda", dtype=torch.float32 if "fp32" in kind else torch.bfloat16)
    if "fp8" not in kind:
        return Product(x.bfloat16(), w.bfloat16().t(), y, bias)
    x, w = (x * 16).to(torch.float8_e4m3fn), (w * 16).to(torch.float8_e4m3fn)
    one = torch.tensor(1 / 16, device="cuda")
    if "rows" in kind:
        return Product(x, w.t(), y, bias, (one.expand(rows, 1).contiguous(), one.expand(1, N).contiguous()))
    return Product(x, w.t(), y, bias, (one, one.clone() / 2))


class TestOnAGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("kind", ["bf16", "bf16 bias", "bf16 fp32", "fp8", "fp8 bias"])
    @pytest.mark.parametrize("rows", [1, 16, 100, 1000])
    def test_every_algorithm_computes_what_torch_does(self, blas, rows, kind):
        product = product_of(rows, kind)
        by_torch(product)()
        expected = product.y.float().clone()
        names = blas.algorithms(product)
        assert names
        for name in names:
            product.y.zero_()
            blas.bound(product, name)()
            torch.cuda.synchronize()
            found = product.y.float()
            assert (found - expected).norm() < 4e-3 * expected.norm()

    def test_algorithms_of_another_number_of_rows(self, blas):
        """Which they compute too, or torch does."""
        names = blas.algorithms(product_of(1000, "fp8"))
        product = product_of(40, "fp8")
        by_torch(product)()
        expected = product.y.float().clone()
        for name in [*names, ""]:
            product.y.zero_()
            blas.bound(product, name)()
            torch.cuda.synchronize()
            assert (product.y.float() - expected).norm() < 4e-3 * expected.norm()

    def test_what_torch_alone_computes(self, blas):
        """Scales of rows; an algorithm that is none."""
        product = product_of(40, "fp8 rows")
        assert blas.algorithms(product) == []
        by_torch(product)()
        expected = product.y.clone()
        product.y.zero_()
        blas.bound(product, blas.algorithms(product_of(40, "fp8"))[0])()
        torch.cuda.synchronize()
        assert torch.equal(product.y, expected)
        plain = product_of(40, "bf16")
        blas.bound(plain, "00" * 64)()
        torch.cuda.synchronize()
        assert plain.y.isfinite().all()
