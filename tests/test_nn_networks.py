"""Layers, encoders, decoders, heads and the world model made of them."""

import math
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.func import functional_call, stack_module_state
from torch.nn import functional

import rlloss_nn.networks
from rlloss import DREAMER_V3_OFFICIAL, dreamer_v3_model_loss, symlog
from rlloss_nn.functional import functionalize
from rlloss_nn.networks import (
    MLP,
    SIZES,
    BlockLinear,
    Decoder,
    Encoder,
    ImageDecoder,
    ImageEncoder,
    MLPHead,
    RMSNorm,
    RSSMState,
    VectorDecoder,
    VectorEncoder,
    WorldModel,
)


def params_of(module):
    return {k: v.detach() for k, v in module.named_parameters()}


def equal_in(variant, module, *inputs):
    """Values and gradients of a module in a variant equal the eager ones."""

    def loss(params, *inputs):
        y = functional_call(module, params, inputs)
        return y.square().sum(), y

    function = torch.func.grad(loss, has_aux=True)
    arguments = (params_of(module), *inputs)
    torch.testing.assert_close(variant(function)(*arguments), function(*arguments), rtol=1e-4, atol=1e-5)


# Layers


def test_the_public_names_are_exactly_these():
    public = {k for k in vars(rlloss_nn.networks) if not k.startswith("_")}
    modules = {"agent", "codecs", "heads", "layers", "loop", "observations", "rnd", "rssm", "world_model"}
    assert public - modules == set(rlloss_nn.networks.__all__)
    assert len(set(rlloss_nn.networks.__all__)) == len(rlloss_nn.networks.__all__)


def test_rms_norm_is_its_formula():
    norm, x = RMSNorm(5).double(), torch.randn(3, 5).double()
    nn.init.normal_(norm.scale)
    expected = norm.scale * x / (x.pow(2).mean(-1, keepdim=True) + 1e-4).sqrt()
    torch.testing.assert_close(norm(x), expected)
    assert not norm(torch.zeros(5).double()).any()

    norm, image = RMSNorm(5, dim=-3).double(), torch.randn(3, 5, 2, 4).double()
    nn.init.normal_(norm.scale)
    expected = image / (image.pow(2).mean(1, keepdim=True) + 1e-4).sqrt() * norm.scale[:, None, None]
    torch.testing.assert_close(norm(image), expected)


def test_rms_norm_computes_in_float32():
    # 300**2 is beyond float16.
    x = torch.full((4,), 300.0, dtype=torch.float16)
    norm = RMSNorm(4).half()
    assert norm(x).dtype == torch.float16
    torch.testing.assert_close(norm(x), torch.ones(4, dtype=torch.float16))


def test_block_linear_is_block_diagonal():
    layer, x = BlockLinear(6, 4, 2).double(), torch.randn(3, 5, 6).double()
    nn.init.normal_(layer.bias)
    matrix = torch.block_diag(*layer.weight)
    torch.testing.assert_close(layer(x), x @ matrix + layer.bias)


def test_initialisation_is_the_authors():
    """Truncated normal at two sigma, standard deviation 1 / sqrt(fan-in); blocks count the whole input."""
    mlp = MLP(200, 300, 1)
    blocks = BlockLinear(400, 800, 8)
    encoder = ImageEncoder((16, 16, 16), depth=32, mults=(4,), kernel=5)
    cases = [(mlp.linears[0].weight, 200), (blocks.weight, 400), (encoder.convolutions[0].weight, 16 * 25)]
    for weight, fan_in in cases:
        assert weight.std().item() == pytest.approx(1 / math.sqrt(fan_in), rel=0.02)
        bound = 2 * 1.1368 / math.sqrt(fan_in)
        assert 0.98 * bound < weight.abs().max().item() <= bound * (1 + 1e-6)
    biases = [mlp.linears[0].bias, blocks.bias, encoder.convolutions[0].bias]
    assert not any(bias.any() for bias in biases)
    assert (mlp.norms[0].scale == 1).all()


def test_equal_seeds_give_equal_parameters():
    torch.manual_seed(3)
    first = params_of(WorldModel((3,), 2, **TINY))
    torch.manual_seed(3)
    second = params_of(WorldModel((3,), 2, **TINY))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_mlp_is_linear_norm_activation():
    mlp, x = MLP(3, 4, 2).double(), torch.randn(5, 3).double()
    for parameter in mlp.parameters():
        nn.init.normal_(parameter)
    y = x
    for linear, norm in zip(mlp.linears, mlp.norms, strict=True):
        y = y @ linear.weight.T + linear.bias
        y = y / (y.pow(2).mean(-1, keepdim=True) + 1e-4).sqrt() * norm.scale
        y = y * torch.sigmoid(y)
    torch.testing.assert_close(mlp(x), y)
    assert torch.equal(MLP(3, 4, 0)(x), x)


def test_gelu_is_the_approximation_of_jax():
    mlp = MLP(3, 4, 1, act="gelu")
    x = torch.linspace(-3, 3, 7)
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    torch.testing.assert_close(mlp.act(x), 0.5 * x * (1 + torch.tanh(inner)))


# Heads


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_a_zero_initialised_head_gives_exactly_zero(layers):
    head = MLPHead(6, 255, layers=layers, units=8)
    logits = head(torch.randn(2, 3, 6) * 1e3)
    assert logits.shape == (2, 3, 255)
    assert not logits.any()
    logits.sum().backward()
    assert head.out.weight.grad.any()


def test_outscale_scales_the_weights_of_the_output():
    heads = []
    for outscale in (1.0, 0.01):
        torch.manual_seed(0)
        heads.append(MLPHead(6, 3, outscale=outscale))
    torch.testing.assert_close(heads[1].out.weight, 0.01 * heads[0].out.weight)
    assert torch.equal(heads[1].mlp.linears[0].weight, heads[0].mlp.linears[0].weight)


# Vectors and images


def test_vector_encoder_squashes():
    encoder, x = VectorEncoder(3, units=8).double(), torch.tensor([[1e6, -2.0, 0.0]]).double()
    torch.testing.assert_close(encoder(x), encoder.mlp(symlog(x)))
    torch.testing.assert_close(
        encoder(torch.tensor([[7, -2, 0]])), encoder.mlp(symlog(torch.tensor([[7.0, -2.0, 0.0]]).double()))
    )


def test_image_encoder_is_the_authors_network():
    """Convolution that keeps the size, max-pooling by 2, norm over channels, activation; input in [-0.5, 0.5]."""
    encoder = ImageEncoder((3, 8, 12), depth=2, mults=(2, 3)).double()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter)
    image = torch.randint(256, (2, 3, 8, 12), dtype=torch.uint8)
    x = image.double() / 255 - 0.5
    for convolution, norm in zip(encoder.convolutions, encoder.norms, strict=True):
        x = functional.conv2d(functional.pad(x, (2, 2, 2, 2)), convolution.weight, convolution.bias)
        x = functional.max_pool2d(x, 2)
        x = x / (x.pow(2).mean(1, keepdim=True) + 1e-4).sqrt() * norm.scale[:, None, None]
        x = x * torch.sigmoid(x)
    assert x.shape == (2, 6, 2, 3)
    torch.testing.assert_close(encoder(image), x.flatten(1))
    torch.testing.assert_close(encoder(image / 255), x.flatten(1), rtol=1e-5, atol=1e-5)


def test_pixels_that_tie_share_the_gradient():
    encoder = ImageEncoder((1, 4, 4), depth=2, mults=(1,), kernel=1).double()
    image = torch.full((1, 4, 4), 0.7).double().requires_grad_()
    encoder(image).square().sum().backward()
    assert image.grad.any()
    torch.testing.assert_close(image.grad, image.grad.flatten()[0].expand(1, 4, 4))


def test_image_decoder_is_the_authors_network():
    decoder = ImageDecoder(4, 6, (3, 8, 12), depth=2, mults=(2, 3), units=5, blocks=2).double()
    for parameter in decoder.parameters():
        nn.init.normal_(parameter)
    deter, stoch = torch.randn(2, 4).double(), torch.randn(2, 6).double()

    def normalised(x, scale, shape):
        x = x / (x.pow(2).mean(1, keepdim=True) + 1e-4).sqrt() * scale.reshape(shape)
        return x * torch.sigmoid(x)

    hidden = decoder.stoch_mlp.linears[0](stoch)
    assert hidden.shape == (2, 10)
    hidden = normalised(hidden, decoder.stoch_mlp.norms[0].scale, (-1,))
    start = deter @ torch.block_diag(*decoder.deter_start.weight) + decoder.deter_start.bias
    x = (start + decoder.stoch_start(hidden)).reshape(2, 6, 2, 3)
    x = normalised(x, decoder.start_norm.scale, (-1, 1, 1))
    x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    x = functional.conv2d(x, decoder.convolutions[0].weight, decoder.convolutions[0].bias, padding=2)
    x = normalised(x, decoder.norms[0].scale, (-1, 1, 1))
    x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    x = functional.conv2d(x, decoder.out.weight, decoder.out.bias, padding=2)
    torch.testing.assert_close(decoder(torch.cat([deter, stoch], -1)), torch.sigmoid(x))


def test_each_block_of_the_recurrent_state_makes_its_own_channels():
    decoder = ImageDecoder(8, 6, (3, 8, 8), depth=4, mults=(2,), blocks=4)
    deter = torch.zeros(8)
    deter[2:4] = 1
    channels = decoder.deter_start(deter).reshape(8, 4, 4).abs().sum((1, 2)) > 0
    assert channels.tolist() == [False, False, True, True, False, False, False, False]


@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 3)])
def test_any_leading_dimensions(leading):
    image, vector = torch.rand(*leading, 3, 64, 64), torch.randn(*leading, 3)
    features = torch.randn(*leading, 28)
    assert ImageEncoder((3, 64, 64), depth=2)(image).shape == (*leading, 128)
    assert ImageDecoder(16, 12, (3, 64, 64), depth=2, units=8)(features).shape == (*leading, 3, 64, 64)
    assert VectorEncoder(3, units=8)(vector).shape == (*leading, 8)
    assert VectorDecoder(28, 3, units=8)(features).shape == (*leading, 3)


def test_images_in_every_variant(variant):
    encoder = ImageEncoder((2, 8, 8), depth=2, mults=(4,))
    decoder = ImageDecoder(64, 64, (2, 8, 8), depth=2, mults=(2, 4), units=8)
    equal_in(variant, nn.Sequential(encoder, decoder), torch.rand(2, 2, 8, 8))


SHAPES = {"low": (1, 16, 16), "camera": (3, 16, 16), "position": (2,), "height": (), "joints": (2, 2)}
IMAGES = {"depth": 2, "mults": (2, 4), "units": 8, "kernel": 3}


def observation(*leading):
    vectors = {
        "position": torch.randn(*leading, 2),
        "height": torch.randn(*leading),
        "joints": torch.randn(*leading, 2, 2),
    }
    cameras = {
        "camera": torch.randint(256, (*leading, 3, 16, 16), dtype=torch.uint8),
        "low": torch.rand(*leading, 1, 16, 16),
    }
    return vectors | cameras


@pytest.mark.parametrize("leading", [(3,), (2, 4)])
def test_mixed_observations(leading):
    encoder, decoder, x = Encoder(SHAPES, **IMAGES), Decoder(16, 12, SHAPES, **IMAGES), observation(*leading)
    tokens = encoder(x)
    assert tokens.shape == (*leading, encoder.out_features) == (*leading, 8 + 8 * 16)
    # Names in order: height, joints, position in one vector; camera, low in one image.
    vector = torch.cat([x["height"][..., None], x["joints"].flatten(-2), x["position"]], -1)
    image = torch.cat([x["camera"] / 255, x["low"]], -3)
    torch.testing.assert_close(tokens, torch.cat([encoder.vector(vector), encoder.image(image)], -1))
    torch.testing.assert_close(encoder(TensorDict(x, batch_size=leading)), tokens)

    features = torch.randn(*leading, 28)
    prediction = decoder(features)
    assert {k: v.shape[len(leading) :] for k, v in prediction.items()} == SHAPES
    vector, image = decoder.vector(features), decoder.image(features)
    assert torch.equal(prediction["height"], vector[..., 0])
    assert torch.equal(prediction["joints"].flatten(-2), vector[..., 1:5])
    assert torch.equal(prediction["low"], image[..., 3:, :, :])
    assert ((image >= 0) & (image <= 1)).all()


def test_a_single_observation_is_a_tensor():
    assert Encoder((3,), units=8)(torch.zeros(2, 3)).shape == (2, 8)
    assert Decoder(16, 12, (3,), units=8)(torch.zeros(2, 28)).shape == (2, 3)
    assert Encoder((), units=8)(torch.zeros(2)).shape == (2, 8)
    assert Decoder(16, 12, (), units=8)(torch.zeros(2, 28)).shape == (2,)


# World model

TINY = {"deter": 16, "hidden": 8, "stoch": 3, "classes": 4, "units": 8, "depth": 2, "mults": (2, 4), "kernel": 3}


def batch_of(shape, batch=2, steps=3):
    if isinstance(shape, dict):
        seen = observation(batch, steps)
    elif len(shape) == 3:
        seen = torch.randint(256, (batch, steps, *shape), dtype=torch.uint8)
    else:
        seen = torch.randn(batch, steps, *shape)
    return {
        "observation": seen,
        "action": torch.randn(batch, steps, 2),
        "is_first": torch.zeros(batch, steps, dtype=torch.bool),
        "noise": -torch.log(-torch.log(torch.rand(batch, steps, 3, 4))),
        "reward": torch.randn(batch, steps),
        "terminated": torch.zeros(batch, steps, dtype=torch.bool),
    }


@pytest.mark.parametrize("shape", [(3,), (3, 16, 16), SHAPES])
def test_world_model_trains_by_the_loss(shape):
    world_model, batch = WorldModel(shape, 2, **TINY), batch_of(shape)
    apply, _ = functionalize(world_model)
    knobs = {**DREAMER_V3_OFFICIAL, "free_bits": 0.0}
    loss = partial(dreamer_v3_model_loss, world_model=apply, **knobs)
    grads, (value, _) = torch.func.grad_and_value(loss, has_aux=True)(params_of(world_model), batch)
    assert value.isfinite()
    # The output of a head that starts at zero hides what is before it from the first gradient.
    assert {k for k, g in grads.items() if not g.any()} <= {k for k in grads if k.startswith("reward_head.mlp")}
    assert all(g.isfinite().all() for g in grads.values())

    outputs = world_model(batch)
    assert outputs["reward"].shape == (2, 3, 255)
    assert not outputs["reward"].any()
    assert outputs["continue_logits"].shape == (2, 3)
    features = world_model.features(outputs["deter"], outputs["stoch"])
    assert torch.equal(features, torch.cat([outputs["deter"], outputs["stoch"].flatten(2)], -1))
    again = world_model.predict(outputs["deter"], outputs["stoch"])
    torch.testing.assert_close(again, {k: outputs[k] for k in again})


def test_world_model_in_every_variant(variant):
    world_model, batch = WorldModel((3,), 2, **TINY), batch_of((3,), steps=1)
    apply, _ = functionalize(world_model)
    loss = partial(dreamer_v3_model_loss, world_model=apply)

    def run(params, batch):
        return torch.func.grad_and_value(loss, has_aux=True)(params, batch)

    arguments = (params_of(world_model), batch)
    torch.testing.assert_close(variant(run)(*arguments), run(*arguments), rtol=1e-4, atol=1e-5)


def test_an_ensemble_of_world_models_equals_a_loop():
    members, batch = [WorldModel(SHAPES, 2, **TINY).double() for _ in range(2)], batch_of(SHAPES)
    params, _ = stack_module_state(members)

    def loss(params):
        outputs = functional_call(members[0], params, (batch,))
        return outputs["reconstruction"]["camera"].square().sum() + outputs["prior_logits"].square().sum()

    grads = torch.func.vmap(torch.func.grad(loss))(params)
    for i, member in enumerate(members):
        for name, grad in torch.func.grad(loss)(params_of(member)).items():
            torch.testing.assert_close(grads[name][i], grad)


def test_world_model_starts_from_the_given_state():
    world_model, batch = WorldModel((3,), 2, **TINY).double(), batch_of((3,))
    whole = world_model(batch)
    state = RSSMState(whole["deter"][:, 0], whole["stoch"][:, 0])
    rest = {k: v[:, 1:] for k, v in batch.items()}
    for given in (state, state._asdict()):
        continued = world_model({**rest, "state": given})
        torch.testing.assert_close(continued["posterior_logits"], whole["posterior_logits"][:, 1:])
    nested = TensorDict({**rest, "state": TensorDict(state._asdict(), batch_size=[2])}, batch_size=[2])
    torch.testing.assert_close(world_model(nested)["deter"], whole["deter"][:, 1:])


def test_imagined_states_are_decoded_like_observed_ones():
    world_model, batch = WorldModel(SHAPES, 2, **TINY), batch_of(SHAPES)
    outputs = world_model(batch)
    start = RSSMState(outputs["deter"][:, -1], outputs["stoch"][:, -1])
    imagined = world_model.rssm.imagine(start, torch.zeros(2, 5, 2), torch.zeros(2, 5, 3, 4))
    prediction = world_model.predict(imagined.deter, imagined.stoch)
    assert prediction["reconstruction"]["camera"].shape == (2, 5, 3, 16, 16)
    assert prediction["reward"].shape == (2, 5, 255)


def test_the_smallest_size_has_as_many_parameters_as_the_authors():
    """640,867 parameters train on walker-walk from its 24 state variables, policy and value included."""
    walker = {"orientations": (14,), "height": (), "velocity": (9,)}
    with torch.device("meta"):
        world_model = WorldModel(walker, action_dim=6, **SIZES["1m"])
        policy = MLPHead(world_model.feature_size, 2 * 6, layers=3)
        value = MLPHead(world_model.feature_size, 255, layers=3)
    counts = [sum(p.numel() for p in module.parameters()) for module in (world_model, policy, value)]
    assert counts == [524_440, 50_316, 66_111]
    assert sum(counts) == 640_867


def test_state_dict_makes_the_round_trip():
    first, second, batch = WorldModel((3,), 2, **TINY), WorldModel((3,), 2, **TINY), batch_of((3,))
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(first(batch), second(batch))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_is_that_of_the_parameters(dtype):
    world_model, batch = WorldModel(SHAPES, 2, **TINY).to(dtype), batch_of(SHAPES)
    outputs = world_model(batch)
    tensors = [*outputs.pop("reconstruction").values(), *outputs.values()]
    assert {x.dtype for x in tensors} == {dtype}
    assert all(x.isfinite().all() for x in tensors)


def test_nothing_is_drawn_and_no_buffer_written():
    world_model, batch = WorldModel(SHAPES, 2, **TINY), batch_of(SHAPES)
    assert not list(world_model.buffers())
    before, generator = {k: v.clone() for k, v in world_model.state_dict().items()}, torch.get_rng_state()
    torch.testing.assert_close(world_model(batch), world_model(batch))
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in world_model.state_dict().items())


# What bad input gets


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: BlockLinear(6, 4, 4), ValueError, "BlockLinear: in_features must be a multiple of blocks=4, got 6"),
        (lambda: BlockLinear(6, 4, 2)(torch.zeros(5)), ValueError, r"x must be of shape \[..., 6\], got float32 \[5\]"),
        (
            lambda: MLP(3, 4, 1)(torch.zeros(2, 4)),
            ValueError,
            r"MLP: x must be of shape \[..., 3\], got float32 \[2, 4\]",
        ),
        (lambda: MLP(3, 4, -1), ValueError, "MLP: layers must be at least 0, got -1"),
        (lambda: MLP(3, 4, 1, act="mish"), ValueError, "MLP: act must be one of 'silu', .* got 'mish'"),
        (lambda: MLPHead(3, 0), ValueError, "MLPHead: out_features must be at least 1, got 0"),
        (
            lambda: MLPHead(3, 2)(torch.zeros(2)),
            ValueError,
            r"MLPHead: x must be of shape \[..., 3\], got float32 \[2\]",
        ),
        (lambda: VectorEncoder(3)(torch.zeros(2)), ValueError, r"VectorEncoder: vector must be of shape \[..., 3\]"),
        (lambda: VectorEncoder(3, layers=0), ValueError, "VectorEncoder: layers must be at least 1, got 0"),
        (
            lambda: VectorDecoder(3, 2)(torch.zeros(2)),
            ValueError,
            r"VectorDecoder: features must be of shape \[..., 3\]",
        ),
        (lambda: ImageEncoder((3, 60, 64)), ValueError, r"shape must be \(C, H, W\) with H and W divisible by 16"),
        (lambda: ImageEncoder((64, 64, 3)), ValueError, r"got \(64, 64, 3\). Did you pass channels last\?"),
        (lambda: ImageDecoder(8, 4, (64, 64)), ValueError, r"ImageDecoder: shape must be \(C, H, W\), got \(64, 64\)"),
        (
            lambda: ImageDecoder(8, 4, (3, 64, 64), depth=1),
            ValueError,
            r"ImageDecoder: depth \* mults\[-1\] must be a multiple of blocks=8, got 4",
        ),
        (
            lambda: ImageEncoder((3, 16, 16), mults=(2,))(torch.zeros(2, 16, 16, 3)),
            ValueError,
            r"image must be of shape \[..., 3, 16, 16\], .*Did you pass channels last\? Images are \[..., C, H, W\]",
        ),
        (
            lambda: ImageDecoder(8, 4, (3, 64, 64))(torch.zeros(2, 13)),
            ValueError,
            r"ImageDecoder: features must be of shape \[..., 12\], got float32 \[2, 13\]",
        ),
        (lambda: Encoder({}), ValueError, "Encoder: observation_shape must be one or more shapes"),
        (lambda: Decoder(8, 4, (2, 3, 64, 64)), ValueError, "Decoder: observation_shape must be one or more shapes"),
        (lambda: Encoder({"a": (3, 64, 64), "b": (3, 32, 32)}), ValueError, "must be of equal image sizes"),
        (
            lambda: Encoder(SHAPES, **IMAGES)({**observation(3), "position": torch.zeros(3, 3)}),
            ValueError,
            r"Encoder: observation\['position'\] must be of shape \[..., 2\], got float32 \[3, 3\]",
        ),
        (
            lambda: Encoder({"a": (3,), "b": (2,)})({"a": torch.zeros(4, 5, 3), "b": torch.zeros(5, 4, 2)}),
            ValueError,
            r"observation\['b'\] must be of shape \[4, 5, ...\] like the other observations, .*pass time first\?",
        ),
        (lambda: Encoder((3,))({"a": torch.zeros(3)}), TypeError, "Encoder: observation must be a tensor, got dict"),
        (lambda: Encoder({"a": (3,)})(torch.zeros(3)), TypeError, "observation must be a mapping of tensors"),
        (lambda: Encoder({"a": (3,)})({"A": torch.zeros(3)}), KeyError, "observation must be a mapping with 'a'"),
        (lambda: Encoder((3,))(torch.zeros(3).bool()), TypeError, "Encoder: observation.* must be a tensor of numbers"),
    ],
)
def test_bad_parts(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"action": None}, KeyError, r"WorldModel: batch must be a mapping with 'action', got keys \["),
        ({"observation": None}, KeyError, "WorldModel: batch must be a mapping with 'observation'"),
        ({"noise": None}, KeyError, "WorldModel: batch must be a mapping with 'noise'"),
        ({"observation": torch.zeros(2, 3, 4)}, ValueError, r"observation must be of shape \[..., 3\]"),
        ({"observation": torch.zeros(3, 2, 3)}, ValueError, r"tokens must be of shape \[2, 3, 8\].*pass time first\?"),
        ({"action": torch.zeros(2, 3, 2).long()}, TypeError, "Discrete actions come in one-hot, as floats"),
        ({"state": {"deter": torch.zeros(2, 16)}}, KeyError, r"batch\['state'\] must be a mapping with 'stoch'"),
        ({"state": torch.zeros(2, 16)}, TypeError, r"batch\['state'\] must be a mapping of tensors"),
    ],
)
def test_bad_batches(change, error, match):
    batch = {k: v for k, v in {**batch_of((3,)), **change}.items() if v is not None}
    with pytest.raises(error, match=match):
        WorldModel((3,), 2, **TINY)(batch)


def test_bad_latent_states():
    world_model = WorldModel((3,), 2, **TINY)
    with pytest.raises(
        ValueError, match=r"WorldModel.features: deter must be of shape \[..., 16\], got float32 \[2, 8\]"
    ):
        world_model.predict(torch.zeros(2, 8), torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"WorldModel.features: stoch must be of shape \[2, 3, 4\] like deter"):
        world_model.predict(torch.zeros(2, 16), torch.zeros(2, 12))
