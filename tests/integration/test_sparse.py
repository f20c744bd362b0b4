"""Sparse COO, CSR and friends, nested and quantized tensors: made, moved, computed with, as on the CPU."""

import pytest
import torch


def dense():
    x = torch.zeros(4, 5)
    x[0, 1], x[2, 3], x[3, 0], x[3, 4] = 1.0, -2.0, 3.5, 4.0
    return x


LAYOUTS = {
    "coo": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr(),
    "csc": lambda x: x.to_sparse_csc(),
    "bsr": lambda x: torch.nn.functional.pad(x, (0, 1)).to_sparse_bsr((2, 2)),
    "bsc": lambda x: torch.nn.functional.pad(x, (0, 1)).to_sparse_bsc((2, 2)),
}
MEMBERS = {
    torch.sparse_coo: ("indices", "values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}
pytestmark = pytest.mark.filterwarnings("ignore:Sparse:UserWarning", "ignore:.*nested.*prototype:UserWarning")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conversion_and_members(layout, device):
    expected = LAYOUTS[layout](dense())
    for sparse in (LAYOUTS[layout](dense().to(device)), expected.to(device)):
        assert sparse.is_flagos and sparse.layout is expected.layout and sparse.shape == expected.shape
        for name in MEMBERS[expected.layout]:
            member = getattr(sparse.coalesce() if layout == "coo" else sparse, name)()
            reference = getattr(expected.coalesce() if layout == "coo" else expected, name)()
            assert member.is_flagos and torch.equal(member.cpu(), reference)
        assert torch.equal(sparse.to_dense().cpu(), expected.to_dense())
        assert torch.equal(sparse.cpu().to_dense(), expected.to_dense())
        assert sparse._nnz() == expected._nnz()


def test_constructors(device):
    indices, values = torch.tensor([[0, 1, 1], [2, 0, 0]]), torch.tensor([1.0, 2.0, 3.0])
    x = torch.sparse_coo_tensor(indices.to(device), values.to(device), (2, 3))
    assert x.is_flagos and not x.is_coalesced()
    assert x.coalesce().values().tolist() == [1.0, 5.0]
    assert torch.sparse_coo_tensor(indices, values, (2, 3), device=device).is_flagos
    csr = torch.sparse_csr_tensor(
        torch.tensor([0, 1, 2], device=device),
        torch.tensor([2, 0], device=device),
        torch.tensor([1.0, 5.0], device=device),
        (2, 3),
    )
    assert torch.equal(csr.to_dense().cpu(), x.to_dense().cpu())
    with pytest.raises(RuntimeError, match="device"):
        torch.sparse_coo_tensor(indices, values.to(device), (2, 3), check_invariants=True)
    with pytest.raises((RuntimeError, ValueError), match=r"size|index|bound"):
        torch.sparse_coo_tensor(indices.to(device), values.to(device), (1, 1), check_invariants=True)


OPS = {
    "mm": lambda s, d: torch.sparse.mm(s, d),
    "matmul": lambda s, d: s @ d,
    "add": lambda s, d: (s + s).to_dense(),
    "add_dense": lambda s, d: torch.add(d.t()[:4, :5].contiguous(), s),
    "mul_scalar": lambda s, d: (s * 3).to_dense(),
    "mul": lambda s, d: (s * s).to_dense(),
    "sum": lambda s, d: torch.sparse.sum(s),
    "sum_dim": lambda s, d: torch.sparse.sum(s, 1).to_dense(),
    "neg": lambda s, d: s.neg().to_dense(),
    "relu": lambda s, d: s.relu().to_dense(),
    "t": lambda s, d: s.t().to_dense(),
    "clone": lambda s, d: s.clone().to_dense(),
    "zeros_like": lambda s, d: torch.zeros_like(s).to_dense(),
    "softmax": lambda s, d: torch.sparse.softmax(s, 1).to_dense(),
    "index_select": lambda s, d: s.index_select(0, torch.tensor([0, 3], device=s.device)).to_dense(),
    "cat": lambda s, d: torch.cat([s, s]).to_dense(),
    "select": lambda s, d: s[3].to_dense(),
    "sparse_mask": lambda s, d: torch.ones(4, 5, device=s.device).sparse_mask(s.coalesce()).to_dense(),
    "norm": lambda s, d: s.norm(),
}


@pytest.mark.parametrize("name", OPS)
def test_coo_operators(name, device):
    right = torch.arange(30.0).reshape(5, 6)
    expected = OPS[name](dense().to_sparse(), right)
    actual = OPS[name](dense().to_sparse().to(device), right.to(device))
    assert actual.is_flagos
    torch.testing.assert_close(actual.cpu(), expected)


@pytest.mark.parametrize("name", ["mm", "matmul", "mul_scalar", "neg", "t", "clone"])
def test_csr_operators(name, device):
    right = torch.arange(30.0).reshape(5, 6)
    expected = OPS[name](dense().to_sparse_csr(), right)
    torch.testing.assert_close(OPS[name](dense().to_sparse_csr().to(device), right.to(device)).cpu(), expected)


def test_gradients_through_sparse(device):
    results = []
    for where in ("cpu", device):
        values = torch.tensor([1.0, 2.0, 3.0]).to(where).requires_grad_()
        x = torch.sparse_coo_tensor(torch.tensor([[0, 1, 2], [1, 0, 2]]).to(where), values, (3, 3))
        weight = torch.arange(9.0).reshape(3, 3).to(where).requires_grad_()
        torch.sparse.mm(x, weight).square().sum().backward()
        results.append((values.grad.cpu(), weight.grad.cpu()))
    for a, e in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(a, e)


def test_sparse_gradient_of_an_embedding(device):
    embedding = torch.nn.Embedding(10, 3, sparse=True).to(device)
    embedding(torch.tensor([1, 4, 1], device=device)).sum().backward()
    gradient = embedding.weight.grad
    assert gradient.is_sparse and gradient.is_flagos
    assert gradient.coalesce().indices().tolist() == [[1, 4]] and gradient.to_dense()[1].tolist() == [2, 2, 2]


def test_inplace_on_sparse(device):
    x = dense().to_sparse().to(device)
    same = x
    x.mul_(2)
    assert x is same and torch.equal(x.to_dense().cpu(), dense() * 2)
    x.add_(x)
    assert torch.equal(x.to_dense().cpu(), dense() * 4)
    x.zero_()
    assert x._nnz() == 0 or not x.to_dense().any().item()
    assert repr(dense().to_sparse().to(device)).count("flagos") >= 1


def test_nested(device):
    parts = [torch.arange(6.0).reshape(2, 3), torch.arange(12.0).reshape(4, 3)]
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([p.to(device) for p in parts], layout=layout)
        assert nested.is_nested and nested.device.type == "flagos"
        for part, expected in zip(nested.unbind(), parts, strict=True):
            assert part.is_flagos and torch.equal(part.cpu(), expected)
        padded = torch.nested.to_padded_tensor(nested, 0.0)
        expected = torch.nested.to_padded_tensor(torch.nested.nested_tensor(parts, layout=layout), 0.0)
        assert torch.equal(padded.cpu(), expected)
        doubled = nested * 2
        assert torch.equal(doubled.unbind()[1].cpu(), parts[1] * 2)


PARTS = [torch.arange(6.0).reshape(2, 3), torch.arange(12.0).reshape(4, 3)]


def test_nested_moves(device):
    nested = torch.nested.nested_tensor(PARTS).to(device)
    assert nested.device.type == "flagos"
    for part, reference in zip(nested.cpu().unbind(), PARTS, strict=True):
        assert torch.equal(part, reference)


def test_nested_linear(device):
    torch.manual_seed(0)
    layer, results = torch.nn.Linear(3, 2), {}
    for where in ("cpu", device):
        layer = layer.to(where)
        layer.zero_grad()
        out = layer(torch.nested.nested_tensor(PARTS).to(where)).unbind()
        sum(part.square().sum() for part in out).backward()
        results[where] = [*(part.detach().cpu() for part in out), layer.weight.grad.to("cpu", copy=True)]
    for here, there in zip(results[device], results["cpu"], strict=True):
        torch.testing.assert_close(here, there)


def test_nested_matmul(device):
    left, right = torch.nested.nested_tensor(PARTS), torch.nested.nested_tensor([part.t() for part in PARTS])
    expected = torch.matmul(left, right).unbind()
    for part, reference in zip(torch.matmul(left.to(device), right.to(device)).unbind(), expected, strict=True):
        assert part.is_flagos
        torch.testing.assert_close(part.cpu(), reference)


def test_quantized(device):
    x = torch.linspace(-1, 1, 12).reshape(3, 4)
    expected = torch.quantize_per_tensor(x, 0.1, 3, torch.quint8)
    quantized = torch.quantize_per_tensor(x.to(device), 0.1, 3, torch.quint8)
    assert quantized.is_quantized and quantized.is_flagos
    assert (quantized.q_scale(), quantized.q_zero_point()) == (0.1, 3)
    assert torch.equal(quantized.int_repr().cpu(), expected.int_repr())
    assert torch.equal(quantized.dequantize().cpu(), expected.dequantize())
    moved = expected.to(device)
    assert moved.is_flagos and torch.equal(moved.dequantize().cpu(), expected.dequantize())
    assert torch.equal(moved.cpu().int_repr(), expected.int_repr())
    scales, points = torch.tensor([0.1, 0.2, 0.3]), torch.zeros(3, dtype=torch.int64)
    channels = torch.quantize_per_channel(x.to(device), scales.to(device), points.to(device), 0, torch.qint8)
    reference = torch.quantize_per_channel(x, scales, points, 0, torch.qint8)
    assert torch.equal(channels.int_repr().cpu(), reference.int_repr())
    fake = torch.fake_quantize_per_tensor_affine(x.to(device), 0.1, 0, -128, 127)
    assert torch.equal(fake.cpu(), torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127))
