"""Mixtures of Gaussians, whose exact velocity field is known: the yardstick of every error."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fmft_fast.errors import InputError


class GaussianMixture(nn.Module):
    """The law sum_k w_k N(mu_k, sigma_k^2 I) of the data, and the flow that makes it from noise.

    For x0 ~ N(0, I) drawn independently of the data and x_t = (1 - t) x0 + t x1,

        x_t | k ~ N(t mu_k, s_k^2 I),  s_k^2 = (1 - t)^2 + t^2 sigma_k^2,
        u(t, x) = E[x1 - x0 | x_t = x]
                = sum_k p(k | t, x) (mu_k + c_k (x - t mu_k)),  c_k = (t sigma_k^2 - 1 + t) / s_k^2,

    where p(k | t, x) is a softmax. It is the field that flow matching with *independent* pairs
    regresses on; with other couplings the target is another field with the same ends.
    The mixture is itself a field: solve it, differentiate it, give it as a reference.

    Args:
        means: [k, dim].
        sigma: standard deviation, > 0: a number or one for each component, [k].
        weights: [k], >= 0, in any units; equal unless given.

    Raises:
        InputError: the shapes do not fit, or a number is not finite or out of range.

    Source: Lipman et al. 2022 (arXiv 2210.02747), theorem 1, for a Gaussian mixture as the data.

    Example:
        >>> mixture = GaussianMixture(torch.tensor([[-2.0], [2.0]]), 0.1)
        >>> mixture(torch.tensor(0.0), torch.zeros(1, 1)), mixture.sample(3).shape
        (tensor([[0.]]), torch.Size([3, 1]))
    """

    means: Tensor
    sigma: Tensor
    weights: Tensor

    def __init__(self, means: Tensor, sigma: float | Tensor, weights: Tensor | None = None) -> None:
        super().__init__()
        means = torch.as_tensor(means).detach().double()
        if means.ndim != 2 or means.numel() == 0:
            raise InputError(f"means must be [k, dim], got {list(means.shape)}")
        count = len(means)
        sigma = torch.as_tensor(sigma).detach().to(means)
        weights = torch.ones(count) if weights is None else torch.as_tensor(weights).detach()
        weights = weights.to(means)
        if sigma.shape not in ((), (count,)) or weights.shape != (count,):
            raise InputError(
                f"sigma must be a number or [{count}] and weights [{count}], got "
                f"{list(sigma.shape)} and {list(weights.shape)}"
            )
        finite = all(bool(x.isfinite().all()) for x in (means, sigma, weights))
        if not (finite and (sigma > 0).all() and (weights >= 0).all() and weights.sum() > 0):
            raise InputError(
                "expected finite means, sigma > 0 and weights >= 0 with a positive sum, got "
                f"sigma = {sigma.tolist()} and weights = {weights.tolist()}"
            )
        # Float64 in store: a cast to another precision happens where the states are known.
        self.register_buffer("means", means.clone(), persistent=False)
        self.register_buffer("sigma", sigma.expand(count).clone(), persistent=False)
        self.register_buffer("weights", weights / weights.sum(), persistent=False)

    @property
    def dim(self) -> int:
        """Size of a state."""
        return self.means.shape[1]

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Give `velocity(t, x)`."""
        return self.velocity(t, x)

    def velocity(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Give the marginal velocity u(t, x), [*batch, dim], in x's dtype.

        It is finite for t in [0, 1], both ends included, wherever x is not near overflow.

        Args:
            t: flow time, 0-d or of a shape that broadcasts to [*batch].
            x: states, [*batch, dim].
        """
        t, s2, sigma2 = self._widths(t, x)
        p = self._logits(t, s2, x).softmax(-1)
        rate = (t * sigma2 - (1 - t)) / s2
        # Summed before x comes in: no weight of 0 meets a velocity that overflowed.
        return (p * (1 - t * rate)) @ self.means.to(x) + (p * rate).sum(-1, keepdim=True) * x

    def posterior(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Give p(k | x_t = x), [*batch, k]: which component a point on its way belongs to."""
        t, s2, _ = self._widths(t, x)
        return self._logits(t, s2, x).softmax(-1)

    def sample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        *,
        component: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Draw n points of the data, [n, dim], on the generator's device.

        Args:
            n: how many.
            generator: source of the draws; torch's global one unless given.
            component: which component each point comes from, [n]; drawn by the weights unless
                given.
            dtype: dtype of the points.

        Raises:
            InputError: there is not one component for each point.
        """
        device = self.means.device if generator is None else generator.device
        if component is None:
            weights = self.weights.to(device)
            component = torch.multinomial(weights, n, replacement=True, generator=generator)
        if component.shape != (n,):
            raise InputError(f"component must be [{n}], got {list(component.shape)}")
        means, sigma = (x.to(device, dtype)[component.to(device)] for x in (self.means, self.sigma))
        noise = torch.randn(n, self.dim, generator=generator, dtype=dtype, device=device)
        return means + sigma.unsqueeze(1) * noise

    def extra_repr(self) -> str:
        """Show what the mixture is made of."""
        return f"components={len(self.means)}, dim={self.dim}"

    def _widths(self, t: Tensor | float, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give t [*batch or 1.., 1], s_k^2 [.., k] and sigma_k^2 [k], in x's dtype."""
        if not x.is_floating_point() or x.ndim < 1 or x.shape[-1] != self.dim:
            raise InputError(
                f"x must be floating point, [*batch, {self.dim}], got {x.dtype} {list(x.shape)}"
            )
        t = (t.to(x) if isinstance(t, Tensor) else x.new_tensor(t)).unsqueeze(-1)
        sigma2 = self.sigma.to(x).square()
        return t, (1 - t).square() + t.square() * sigma2, sigma2

    def _logits(self, t: Tensor, s2: Tensor, x: Tensor) -> Tensor:
        """Give log p(k, x | t) up to a term without k, [*batch, k].

        |x - t mu_k|^2 is multiplied out, and of |x|^2 only the part in which the components differ
        stays: far away, the square would take all digits from the differences that decide.
        """
        # Beyond this size only the direction of x matters; squares must not overflow.
        largest = torch.finfo(x.dtype).max ** 0.25
        near = x * (largest / x.abs().amax(-1, keepdim=True).clamp_min(largest))
        means = self.means.to(x)
        precision = 1 / s2
        excess = precision - precision.amin(-1, keepdim=True)
        linear = t * precision * (near @ means.T - t * means.square().sum(-1) / 2)
        square = near.square().sum(-1, keepdim=True)
        log_width = self.dim / 2 * s2.log()
        return self.weights.to(x).log() + linear - log_width - excess * square / 2
