"""Linear layers by oneDNN against torch's own."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from retriever_service.linear import OneDnnLinear, use_onednn

sizes = st.integers(1, 40)


def results(layer: nn.Linear, x: Tensor, grad: Tensor) -> list[Tensor | None]:
    """Output and gradients."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    output = layer(x)
    if output.requires_grad:
        output.backward(grad)
    return [output, x.grad, *(parameter.grad for parameter in layer.parameters())]


@given(
    shape=st.sampled_from([(), (1,), (7,), (2, 3), (0,)]),
    inputs=sizes,
    outputs=sizes,
    bias=st.booleans(),
    trained=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_outputs_and_gradients_are_those_of_the_layer_before(
    shape: tuple[int, ...], inputs: int, outputs: int, bias: bool, trained: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, outputs, bias=bias).requires_grad_(trained)
    x, grad = torch.randn(*shape, 5, inputs), torch.randn(*shape, 5, outputs)
    expected = results(layer, x, grad)

    use_onednn(layer)

    assert isinstance(layer, OneDnnLinear)
    for ours, theirs in zip(results(layer, x, grad), expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_other_layers_stay_what_they_are() -> None:
    class Own(nn.Linear):
        pass

    inner, half = nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.bfloat16)
    model = nn.Sequential(Own(2, 2), nn.Sequential(inner), nn.Embedding(3, 2), half)
    names = list(model.state_dict())

    use_onednn(model)

    kinds = [type(module) for module in (model[0], inner, model[2], half)]
    assert kinds == [Own, OneDnnLinear, nn.Embedding, nn.Linear]
    assert list(model.state_dict()) == names
