"""The networks of random network distillation."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state
from torch.nn import functional

from rlloss_nn.networks import RNDConvNetwork, RNDVectorNetwork


def weights(network):
    return [m.weight for m in network.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


def params_of(network):
    return {k: v.detach() for k, v in network.named_parameters()}


def test_convolutional_network_is_the_authors():
    target, predictor = RNDConvNetwork(), RNDConvNetwork(predictor=True)
    convolutions = [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3)]
    assert [tuple(w.shape) for w in weights(target)] == [*convolutions, (512, 3136)]
    assert [tuple(w.shape) for w in weights(predictor)] == [*convolutions, (512, 3136), (512, 512), (512, 512)]


def test_vector_network_has_the_same_plan():
    target, predictor = RNDVectorNetwork(3, 8, 5), RNDVectorNetwork(3, 8, 5, predictor=True)
    assert [tuple(w.shape) for w in weights(target)] == [(8, 3), (8, 8), (5, 8)]
    assert [tuple(w.shape) for w in weights(predictor)] == [(8, 3), (8, 8), (8, 8), (8, 8), (5, 8)]


@pytest.mark.parametrize(
    "make", [lambda: RNDConvNetwork((1, 36, 40), 16, hidden=24, predictor=True), lambda: RNDVectorNetwork(3, 8, 5)]
)
def test_every_layer_starts_orthogonal_with_gain_sqrt_2(make):
    network = make()
    for weight in weights(network):
        matrix = weight.detach().flatten(1)
        matrix = matrix if len(matrix) <= matrix.shape[1] else matrix.T
        torch.testing.assert_close(matrix @ matrix.T, 2 * torch.eye(len(matrix)), rtol=1e-5, atol=1e-5)
    assert not any(p.any() for name, p in network.named_parameters() if name.endswith("bias"))


def test_outputs_equal_the_formula():
    """Leaky ReLU of slope 0.2 after the trunk's layers, ReLU between the predictor's."""
    network, x = RNDVectorNetwork(3, 8, 5, predictor=True).double(), torch.randn(4, 3).double()
    layers = [m for m in network.modules() if isinstance(m, nn.Linear)]
    y = x
    for i, layer in enumerate(layers):
        y = y @ layer.weight.T + layer.bias
        slope = 0.2 if i < 2 else 0.0
        y = y if i == 4 else torch.maximum(y, torch.zeros(())) + slope * torch.minimum(y, torch.zeros(()))
    torch.testing.assert_close(network(x), y)

    network, x = RNDConvNetwork((2, 36, 36), 5).double(), torch.randn(4, 2, 36, 36).double()
    y = x
    for weight, stride in zip(weights(network)[:3], (4, 2, 1), strict=True):
        y = functional.conv2d(y, weight, stride=stride)
        y = torch.where(y > 0, y, 0.2 * y)
    torch.testing.assert_close(network(x), y.flatten(1) @ weights(network)[3].T)


@pytest.mark.parametrize("size", [36, 47, 64, 84])
def test_any_image_size_and_channel_count(size):
    network = RNDConvNetwork((1, size, size + 3), 6, hidden=5, predictor=True)
    assert network(torch.zeros(2, 1, size, size + 3)).shape == (2, 6)


@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 3)])
def test_any_leading_dimensions(leading):
    image, vector = torch.randn(*leading, 2, 36, 36), torch.randn(*leading, 3)
    convolutional, plain = RNDConvNetwork((2, 36, 36), 6), RNDVectorNetwork(3, 8, 6)
    assert convolutional(image).shape == plain(vector).shape == (*leading, 6)
    flat = convolutional(image.reshape(math.prod(leading), 2, 36, 36))
    torch.testing.assert_close(convolutional(image).reshape(flat.shape), flat)


def test_uint8_images_are_read_as_fractions():
    network, image = RNDConvNetwork((1, 36, 36), 6), torch.randint(256, (2, 1, 36, 36), dtype=torch.uint8)
    torch.testing.assert_close(network(image), network(image / 255))


def test_the_dtype_is_that_of_the_parameters():
    assert RNDVectorNetwork(3, 8, 6).double()(torch.zeros(2, 3)).dtype == torch.float64
    assert RNDVectorNetwork(3, 8, 6).bfloat16()(torch.zeros(2, 3)).dtype == torch.bfloat16
    assert RNDConvNetwork((1, 36, 36), 6).double()(torch.zeros(1, 36, 36)).dtype == torch.float64


def test_values_and_gradients_in_every_variant(variant):
    network, x = RNDConvNetwork((2, 36, 36), 5, hidden=8, predictor=True), torch.randn(4, 2, 36, 36)

    def loss(params, x):
        y = functional_call(network, params, (x,))
        return y.square().mean(), y

    function = torch.func.grad(loss, has_aux=True)
    arguments = (params_of(network), x)
    torch.testing.assert_close(variant(function)(*arguments), function(*arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("leading", [(4,), (2, 2)])
def test_channels_last_reaches_every_convolution_and_changes_no_number(dtype, leading):
    network = RNDConvNetwork((2, 36, 36), 5, hidden=8, predictor=True)
    image = torch.randn(4, 2, 36, 36) if dtype == torch.float32 else torch.randint(256, (4, 2, 36, 36), dtype=dtype)
    expected = network(image)
    gradients = torch.autograd.grad(expected.square().sum(), list(network.parameters()))
    network.to(memory_format=torch.channels_last)
    formats = []
    for layer in network.trunk[:-1]:
        layer.register_forward_hook(
            lambda _, inputs, y: formats.extend(
                x.is_contiguous(memory_format=torch.channels_last) for x in (*inputs, y)
            )
        )
    image = image.to(memory_format=torch.channels_last).unflatten(0, leading)
    y = network(image).flatten(0, -2)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    for got, wanted in zip(torch.autograd.grad(y.square().sum(), list(network.parameters())), gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())
    assert len(formats) == 12
    assert all(formats)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: RNDVectorNetwork(3, 8, 5), (4, 3)),
        (lambda: RNDConvNetwork((2, 36, 36), 5), (4, 2, 36, 36)),
    ],
)
def test_an_ensemble_equals_a_loop(make, shape):
    members, x = [make() for _ in range(3)], torch.randn(shape)
    params, _ = stack_module_state(members)
    outputs = torch.func.vmap(lambda params: functional_call(members[0], params, (x,)))(params)
    torch.testing.assert_close(outputs, torch.stack([m(x) for m in members]), rtol=1e-4, atol=1e-5)


def test_equal_seeds_give_equal_networks():
    torch.manual_seed(1)
    first = params_of(RNDVectorNetwork(3, 8, 5))
    torch.manual_seed(1)
    second = params_of(RNDVectorNetwork(3, 8, 5))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_bad_input():
    with pytest.raises(ValueError, match=r"RNDConvNetwork: observation_shape must be \(C, H, W\) .* got \(4, 32, 84\)"):
        RNDConvNetwork((4, 32, 84))
    with pytest.raises(ValueError, match=r"RNDConvNetwork: observation_shape must be \(C, H, W\)"):
        RNDConvNetwork((84, 84))
    with pytest.raises(ValueError, match="RNDConvNetwork: out_features must be at least 1, got 0"):
        RNDConvNetwork(out_features=0)
    with pytest.raises(ValueError, match="RNDVectorNetwork: hidden must be at least 1, got 0"):
        RNDVectorNetwork(3, 0)
    with pytest.raises(ValueError, match=r"image must be of shape \[..., 1, 36, 36\], got .*pass channels last\?"):
        RNDConvNetwork((1, 36, 36), 5)(torch.zeros(2, 36, 36, 1))
    with pytest.raises(TypeError, match="image must be a tensor, got list"):
        RNDConvNetwork((1, 36, 36), 5)([1.0])
    with pytest.raises(ValueError, match=r"vector must be of shape \[..., 3\], got float32 \[2, 4\]"):
        RNDVectorNetwork(3, 8, 5)(torch.zeros(2, 4))
    with pytest.raises(TypeError, match="vector must be a tensor of numbers, got bool"):
        RNDVectorNetwork(3, 8, 5)(torch.zeros(2, 3).bool())
