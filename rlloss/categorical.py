r"""Vectors of categorical variables, given by logits [..., groups, classes]."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from rlloss import checks, fused
from rlloss.types import Scalar


def unimix(logits: Tensor, mix: Scalar = 0.01) -> Tensor:
    r"""Logits of a mixture of the given distribution with the uniform one.

    .. math:: \tilde l = \log\left((1 - u) \, \mathrm{softmax}(l) + u / C\right)

    No probability falls below ``u / C``, so that no KL divergence between two mixtures exceeds ``log(C / u)``.

    Source: Hafner et al. 2023 (arXiv:2301.04104), "1% uniform"; danijar/dreamerv3@e3f0224 embodied/jax/outs.py
    ``Categorical``.

    Args:
        logits: [..., classes], any float dtype; computed in float32 at least.
        mix: share u of the uniform distribution, in [0, 1]; 0 gives the logits back.

    Returns:
        [..., classes]: normalised log-probabilities where ``mix`` is not 0.

    Raises:
        TypeError: if ``logits`` is not a floating-point tensor.
        ValueError: if ``mix`` is outside [0, 1] or ``logits`` has no classes.

    Example:
        >>> unimix(torch.tensor([1e4, 0.0]), 0.01).exp()
        tensor([0.9950, 0.0050])
    """
    logits = _logits("unimix", "logits", logits)
    checks.knob("unimix", "mix", mix, 0.0, 1.0)
    if not isinstance(mix, Tensor) and mix == 0:
        return logits
    uniform = logits.new_full((), 1 / logits.shape[-1])
    mixture = (1 - mix) * torch.softmax(logits, -1) + mix * uniform
    if not isinstance(mix, Tensor):
        return torch.log(mixture)
    # A mix that may be 0 leaves probabilities whose logarithm, or its gradient, is infinite.
    underflows = mixture < torch.finfo(mixture.dtype).tiny / torch.finfo(mixture.dtype).eps
    return torch.where(underflows, torch.log_softmax(logits, -1), torch.log(torch.where(underflows, 1.0, mixture)))


def categorical_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    r"""Kullback-Leibler divergence between categorical distributions, in nats.

    .. math:: \mathrm{KL}(p \| q) = \sum_c p_c \, (\log p_c - \log q_c)

    Computed from log-softmax, so that it and its gradients are finite for any finite logits. A class that both rule
    out (logit ``-inf``) adds nothing.

    Source: danijar/dreamerv3@e3f0224 embodied/jax/outs.py ``Categorical.kl``.

    Args:
        p_logits: [..., groups, classes], any float dtype; computed in float32 at least.
        q_logits: the same shape.

    Returns:
        [..., groups], the last dimension reduced.

    Raises:
        TypeError: if an argument is not a floating-point tensor.
        ValueError: if the shapes differ or there are no classes.

    Example:
        >>> categorical_kl(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0]))
        tensor(0.1201)
    """
    p_logits = _logits("categorical_kl", "p_logits", p_logits)
    q_logits = _logits("categorical_kl", "q_logits", q_logits)
    checks.same_shape("categorical_kl", "q_logits", q_logits, "p_logits", p_logits.shape)
    return _kl(p_logits, q_logits)


def categorical_kl_balanced(
    posterior_logits: Tensor, prior_logits: Tensor, alpha: Scalar = 0.8, free_bits: Scalar = 1.0
) -> Tensor:
    r"""KL divergence of posterior and prior, balanced between the two, with free bits for each categorical.

    .. math:: \mathrm{mean}\left[\alpha \max(\mathrm{KL}(\mathrm{sg}(z) \| \hat z), b) +
              (1 - \alpha) \max(\mathrm{KL}(z \| \mathrm{sg}(\hat z)), b)\right]

    Each categorical is clamped on its own before the average, so a sum of small divergences has no gradient; the
    author's current code clamps the sum: :func:`categorical_kl_terms`.

    Source: Hafner et al. 2020 (arXiv:2010.02193), algorithm 2; torchrl 0.14.1 ``categorical_kl_balanced`` (which
    clamps probabilities at 1e-8; here log-softmax keeps saturated logits exact).

    Args:
        posterior_logits: [..., groups, classes], any float dtype; computed in float32 at least.
        prior_logits: the same shape.
        alpha: weight of the term that trains the prior, in [0, 1].
        free_bits: nats below which a categorical costs a constant; at equality half the gradient passes. 0: no clamp.

    Returns:
        [], the mean over all leading dimensions and groups; 0 for an empty batch.

    Raises:
        TypeError: if logits are not floating-point tensors.
        ValueError: if the shapes differ or lack groups or classes, ``alpha`` is outside [0, 1] or ``free_bits`` is
            negative.

    Example:
        >>> categorical_kl_balanced(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), free_bits=0.5)
        tensor(0.5000)
    """
    function = "categorical_kl_balanced"
    posterior_logits, prior_logits = _posterior_and_prior(function, posterior_logits, prior_logits)
    checks.knob(function, "alpha", alpha, 0.0, 1.0)
    checks.knob(function, "free_bits", free_bits, 0.0)
    per_categorical = balanced_kl(posterior_logits, prior_logits, alpha, free_bits)
    return per_categorical.sum() / max(per_categorical.numel(), 1)


def categorical_kl_terms(
    posterior_logits: Tensor, prior_logits: Tensor, *, free_nats: Scalar = 1.0, unimix: Scalar = 0.01
) -> tuple[Tensor, Tensor]:
    r"""Dynamics and representation losses of the author's current code.

    .. math:: L_{dyn} = \max(f, \textstyle\sum_g \mathrm{KL}(\mathrm{sg}(z_g) \| \hat z_g)), \quad
              L_{rep} = \max(f, \textstyle\sum_g \mathrm{KL}(z_g \| \mathrm{sg}(\hat z_g)))

    The clamp acts on the sum over groups; where the sum equals ``free_nats`` exactly, half the gradient passes, as
    with ``jnp.maximum``.

    Source: Hafner et al. 2023 (arXiv:2301.04104), section "World model learning"; danijar/dreamerv3@e3f0224
    dreamerv3/rssm.py ``RSSM.loss``.

    Args:
        posterior_logits: [..., groups, classes], any float dtype; computed in float32 at least.
        prior_logits: the same shape.
        free_nats: nats below which a step costs a constant; 0: no clamp.
        unimix: share of the uniform distribution mixed into both, see :func:`unimix`.

    Returns:
        ``(dynamics, representation)``, [...] each: the first trains the prior only, the second the posterior only.

    Raises:
        TypeError: if logits are not floating-point tensors.
        ValueError: if the shapes differ or lack groups or classes, ``free_nats`` is negative or ``unimix`` is outside
            [0, 1].

    Example:
        >>> dynamics, representation = categorical_kl_terms(torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8))
        >>> dynamics.shape, representation.shape
        (torch.Size([2, 3]), torch.Size([2, 3]))
    """
    function = "categorical_kl_terms"
    posterior_logits, prior_logits = _posterior_and_prior(function, posterior_logits, prior_logits)
    checks.knob(function, "free_nats", free_nats, 0.0)
    checks.knob(function, "unimix", unimix, 0.0, 1.0)
    of_posterior, of_prior = _at_least(_divergences(posterior_logits, prior_logits, unimix, 2), free_nats)
    return of_prior, of_posterior


def categorical_entropy(logits: Tensor) -> Tensor:
    r"""Entropy of categorical distributions, in nats.

    .. math:: H(p) = -\sum_c p_c \log p_c

    Source: danijar/dreamerv3@e3f0224 embodied/jax/outs.py ``Categorical.entropy``.

    Args:
        logits: [..., groups, classes], any float dtype; computed in float32 at least.

    Returns:
        [..., groups], the last dimension reduced.

    Raises:
        TypeError: if ``logits`` is not a floating-point tensor.
        ValueError: if ``logits`` has no classes.

    Example:
        >>> categorical_entropy(torch.zeros(2))
        tensor(0.6931)
    """
    logits = _logits("categorical_entropy", "logits", logits)
    log_p = torch.log_softmax(logits, -1)
    return -_weigh(log_p.exp(), log_p).sum(-1)


def straight_through_one_hot(logits: Tensor, noise: Tensor) -> Tensor:
    r"""One-hot sample with the gradient of its probabilities.

    .. math:: \mathrm{onehot}(\arg\max_c (l_c + g_c)) + p - \mathrm{sg}(p), \quad p = \mathrm{softmax}(l)

    With Gumbel noise this is an exact sample of the categorical; with zeros it is the mode. Mix the uniform
    distribution into the logits first (:func:`unimix`) where the distribution has it.

    Source: Bengio et al. 2013 (arXiv:1308.3432); danijar/dreamerv3@e3f0224 embodied/jax/outs.py ``OneHot.sample``.

    Args:
        logits: [..., groups, classes], any float dtype; computed in float32 at least.
        noise: the shape of ``logits``, Gumbel distributed (``rlloss.random.gumbel``).

    Returns:
        [..., groups, classes]: exactly one-hot in value.

    Raises:
        TypeError: if an argument is not a floating-point tensor.
        ValueError: if the shapes differ or there are no classes.

    Example:
        >>> straight_through_one_hot(torch.tensor([0.0, 2.0, 1.0]), torch.zeros(3))
        tensor([0., 1., 0.])
    """
    function = "straight_through_one_hot"
    logits = _logits(function, "logits", logits)
    noise = checks.floating(function, "noise", noise)
    checks.same_shape(function, "noise", noise, "logits", logits.shape)
    index = torch.argmax(logits + noise, -1, keepdim=True)
    one_hot = (index == torch.arange(logits.shape[-1], device=logits.device)).to(logits.dtype)
    probabilities = torch.softmax(logits, -1)
    return one_hot + (probabilities - probabilities.detach())


def balanced_kl(posterior: Tensor, prior: Tensor, alpha: Scalar, free_bits: Scalar, mix: Scalar = 0.0) -> Tensor:
    """[..., groups]: what :func:`categorical_kl_balanced` averages, of mixtures with ``mix``; for checked logits."""
    trains_posterior, trains_prior = _at_least(_divergences(posterior, prior, mix, 1), free_bits)
    return alpha * trains_prior + (1 - alpha) * trains_posterior


def _divergences(posterior: Tensor, prior: Tensor, mix: Scalar, dims: int) -> tuple[Tensor, Tensor]:
    """The divergences that train the posterior and the prior, of each row of ``dims`` dimensions."""
    formula = partial(_kl_pair, mix=mix, dims=dims)
    # No fast path: a share to be differentiated by, and one that may vanish in 1 + its part.
    lost = 4 * posterior.shape[-1] * torch.finfo(posterior.dtype).eps
    if isinstance(mix, Tensor) or 0 < mix < max(SMALLEST_MIX, lost):
        return formula(posterior, prior)
    of_posterior, of_prior = fused.reduce(fused.Divergence(formula, dims, mix), posterior, prior)
    return of_posterior, of_prior


def _kl_pair(posterior: Tensor, prior: Tensor, *, mix: Scalar, dims: int) -> tuple[Tensor, Tensor]:
    if isinstance(mix, Tensor) or mix < SMALLEST_MIX:
        posterior, prior = _unimix(posterior, mix), _unimix(prior, mix)
        pair = _kl(posterior, prior.detach()), _kl(posterior.detach(), prior)
        return pair if dims == 1 else (pair[0].sum(-1), pair[1].sum(-1))
    # Probabilities that cannot be 0 need no logits: one logarithm, of the quotient.
    over = tuple(range(-dims, 0))
    if torch.compiler.is_compiling():
        # One graph for all shares, in which a quotient that is written twice is taken once.
        p, q = (mix / x.shape[-1] + (1 - mix) * torch.softmax(x, -1) for x in (posterior, prior))
        return (p * torch.log(p / q.detach())).sum(over), (p.detach() * torch.log(p.detach() / q)).sum(over)
    # Fewer operators, where each is a pass over memory.
    p, q = (torch.lerp(torch.softmax(x, -1), x.new_full((), 1 / x.shape[-1]), mix) for x in (posterior, prior))
    of_posterior = (p * torch.log(p / q.detach())).sum(over)
    nats = (p.detach() * torch.log(q)).sum(over)
    return of_posterior, of_posterior.detach() + (nats.detach() - nats)


def _kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    log_p, log_q = torch.log_softmax(p_logits, -1), torch.log_softmax(q_logits, -1)
    return _weigh(log_p.exp(), log_p - log_q).sum(-1)


def _weigh(p: Tensor, x: Tensor) -> Tensor:
    """The product, where a probability of exactly 0 silences an infinite x: 0 log 0 is 0."""
    return p * torch.where(p == 0, 0.0, x)


def _at_least(pair: tuple[Tensor, Tensor], floor: Scalar) -> tuple[Tensor, Tensor]:
    if not isinstance(floor, Tensor) and floor == 0:
        return pair
    least = checks.scalar_like(pair[0], floor)
    return torch.maximum(pair[0], least), torch.maximum(pair[1], least)


#: The least share of the uniform distribution that keeps every probability, and the quotient of two, a normal number.
SMALLEST_MIX = 1e-6

# Under its own name `unimix` is hidden by the argument of `categorical_kl_terms`.
_unimix = unimix


def _logits(function: str, argument: str, x: Tensor, names: Sequence[str] = ("classes",)) -> Tensor:
    x = checks.floating(function, argument, x)
    checks.rank_at_least(function, argument, x, names)
    if x.shape[-1] == 0:
        raise ValueError(checks.text(function, argument, "of shape [..., classes >= 1]", checks.describe(x)))
    return x


def _posterior_and_prior(function: str, posterior: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    posterior = _logits(function, "posterior_logits", posterior, ("groups", "classes"))
    prior = checks.floating(function, "prior_logits", prior)
    checks.same_shape(function, "prior_logits", prior, "posterior_logits", posterior.shape)
    return posterior, prior
