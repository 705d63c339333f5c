"""Exact prefill: the reference against SDPA, the kernels against the reference (interpreted where there is no GPU)."""

import pytest
import torch

from hga.ops import fused, prefill
from hga.ops.attention import merge
from hga.ops.closing import pack_records

kernels = pytest.importorskip("hga.ops.kernels.prefill")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])

HEADS_OF_ONE = 32
"""For a single token: of two logits the reference may have both exact by chance, and no kernel is within twice that."""


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


def records_of(keys: torch.Tensor, values: torch.Tensor, chunk: int, group: int) -> torch.Tensor:
    return pack_records(*(x.unflatten(1, (-1, chunk)).transpose(0, 1) for x in (keys, values)), group)


def check(kernel, reference, query, *others, **options):
    """The kernel's error against float64 is at most twice that of the eager reference, and four eps."""
    exact = reference(query.double(), *(x.double() if torch.is_tensor(x) else x for x in others), **options)
    eager = reference(query, *others, **options)
    real = kernel(query, *others, **options)
    for found, plain, right in zip(real, eager, exact, strict=True):
        assert found.shape == right.shape
        eps = 4 * torch.finfo(query.dtype).eps * right.abs().max()
        # The reference widens 16-bit inputs first; a kernel rounds its weights to the input type, as SDPA does.
        bound = 2 * (plain - right).abs().max() + eps
        assert (found - right).abs().max() <= bound


@pytest.mark.parametrize(("first", "tokens"), [(0, 1), (0, 7), (37, 70), (200, 3)])
def test_reference_is_sdpa(first, tokens):
    query, keys, values = draw(2, 3, tokens, 16), draw(2, first + tokens, 16), draw(2, first + tokens, 16)
    mask = torch.ones(tokens, first + tokens, dtype=torch.bool, device=DEVICE).tril(first)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, *(x[:, None].expand(-1, 3, -1, -1) for x in (keys, values)), attn_mask=mask, scale=0.3
    )
    output = prefill.attend_causal(query, keys, values, first, 0.3)
    torch.testing.assert_close(output.value, expected, rtol=0, atol=1e-12)
    if first:
        own = prefill.attend_causal(query, keys[:, first:], values[:, first:], 0, 0.3)
        records = records_of(keys[:, : first // 4 * 4], values[:, : first // 4 * 4], 4, 2)
        rest = slice(first // 4 * 4, first)
        both = prefill.attend_all(query, *records.unbind(3), 0.3, onto=own)
        both = merge(both, prefill.attend_all(query, keys[:, rest], values[:, rest], 0.3))
        torch.testing.assert_close(both.value, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(both.logsumexp, output.logsumexp, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 80, 128])
@pytest.mark.parametrize(
    ("repeats", "tokens", "first", "softcap"),
    [(1, 1, 0, None), (3, 45, 150, None), (8, 33, 63, 5.0), (2, 130, 0, None)],
)
def test_causal(dtype, width, repeats, tokens, first, softcap):
    heads = HEADS_OF_ONE if tokens == 1 else 2
    query = draw(tokens, heads, repeats, width, dtype=dtype).permute(1, 2, 0, 3)  # the layout that a model hands over
    keys, values = (draw(heads, first + tokens + 5, width, dtype=dtype) for _ in range(2))
    keys[:, first + tokens :], values[:, first + tokens :] = float("nan"), float("nan")
    keys, values = keys[:, : first + tokens], values[:, : first + tokens]
    check(kernels.attend_causal, prefill.attend_causal, query, keys, values, first, width**-0.5, softcap=softcap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("chunks", "chunk", "group"), [(1, 8, 4), (5, 32, 4), (3, 64, 8)])
def test_records(dtype, chunks, chunk, group):
    query = draw(2, 3, 50, 64, dtype=dtype)
    keys, values = draw(2, chunks * chunk, 64, dtype=dtype), draw(2, chunks * chunk, 64, dtype=dtype)
    records = records_of(keys, values, chunk, group)
    check(kernels.attend_all, prefill.attend_all, query, *records.unbind(3), 0.125, softcap=7.0)
    check(kernels.attend_all, prefill.attend_all, query, keys, values, 0.125)


def test_continues_an_output():
    query, keys, values = draw(2, 3, 20, 64).float(), draw(2, 40, 64).float(), draw(2, 40, 64).float()
    whole = prefill.attend_all(query, keys, values, 0.125)
    output = kernels.attend_all(query, keys[:, :0], values[:, :0], 0.125)
    assert (output.value == 0).all()
    assert (output.logsumexp == float("-inf")).all()
    for here in (slice(0, 0), slice(0, 13), slice(13, 40)):
        output = kernels.attend_all(query, keys[:, here], values[:, here], 0.125, onto=output)
    torch.testing.assert_close(output.value, whole.value, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.logsumexp, whole.logsumexp, rtol=0, atol=1e-5)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="PyTorch's operator for CPUs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("repeats", "tokens", "first", "width"), [(1, 1, 0, 64), (3, 45, 150, 80), (7, 1, 90, 16)])
def test_fused(dtype, repeats, tokens, first, width):
    heads = HEADS_OF_ONE if tokens == 1 else 2
    query = draw(tokens, heads, repeats, width, dtype=dtype).permute(1, 2, 0, 3)
    keys, values = (draw(heads, first + tokens + 5, width, dtype=dtype) for _ in range(2))
    keys[:, first + tokens :], values[:, first + tokens :] = float("nan"), float("nan")
    keys, values = keys[:, : first + tokens], values[:, : first + tokens]
    check(fused.attend_causal, prefill.attend_causal, query, keys, values, first, width**-0.5)
    check(fused.attend_all, prefill.attend_all, query, keys, values, 0.125)
    query, keys, values = (x.double() for x in (query, keys, values))
    whole, output = prefill.attend_all(query, keys, values, 0.3), None
    for here in (slice(0, 0), slice(0, first), slice(first, None)):
        output = fused.attend_all(query, keys[:, here], values[:, here], 0.3, onto=output)
    torch.testing.assert_close(output.value, whole.value, rtol=0, atol=1e-12)
    torch.testing.assert_close(output.logsumexp, whole.logsumexp, rtol=0, atol=1e-12)
    apart = [x.mT.contiguous().mT for x in (query, keys, values)]  # numbers of a row are no neighbours
    found = fused.attend_causal(*apart, first, 0.3)
    torch.testing.assert_close(found, prefill.attend_causal(query, keys, values, first, 0.3), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="fused attention knows"):
        fused.attend_all(query, keys, values, 0.3, 5.0)


def test_refusals():
    query, keys = draw(2, 3, 20, 64), draw(2, 40, 64)
    with pytest.raises(ValueError, match="float64"):
        kernels.attend_causal(query, keys, keys, 20, 0.125)
    with pytest.raises(ValueError, match="40 keys"):
        kernels.attend_causal(query, keys, keys, 21, 0.125)
    with pytest.raises(TypeError, match="one type"):
        kernels.attend_all(query, keys.float(), keys.float(), 0.125)
    with pytest.raises(ValueError, match="must agree"):
        kernels.attend_all(query[:1], keys, keys, 0.125)
    with pytest.raises(ValueError, match="one shape"):
        kernels.attend_all(query, keys, keys[:, 1:], 0.125)
