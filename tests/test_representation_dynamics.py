"""representation_dynamics.py against dense mixtures, scores, brute force and closed forms."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import representation_dynamics as script
from common import load_checkpoint, shapes
from tests.claims import representation_dynamics as claim

SMALL = ["--device", "cpu", "--precision", "fp32", "--compile", "off", "--batch-size", "32"]
SMALL += ["--steps", "6", "--image-size", "8", "--dim", "16", "--blocks", "1"]
SMALL += ["--layer", "decoder.0", "--sigmas", "0.01,0.1,1", "--probe-images", "200"]
SMALL += ["--log-every", "1", "--sample-every", "6"]

SIGMAS = (0.008, 0.023, 0.06, 0.14, 0.296, 0.585, 1.088, 1.923)
TABLE_4 = (24.88, 25.15, 26.95, 35.84, 58.27, 20.84, 4.05, 1.57)  # K = 2, from the paper


def molrg(n=12, d=2, K=3, delta=0.3):
    return script.MoLRG(n, d, K, delta).double().requires_grad_(False)


def full(sigma, n):
    return torch.full((n,), sigma, dtype=torch.float64)


def covariances(truth):
    """C_k = U_k U_k^T + delta^2 sum of the other U_l U_l^T, dense: (K, n, n)."""
    P = truth.subspaces() @ truth.subspaces().mT
    return truth.delta**2 * P.sum(0) + (1 - truth.delta**2) * P


def log_density(truth, x, sigma):
    """log p(x) of the noisy data at level sigma, up to pi: (B,)."""
    C = covariances(truth) + sigma**2 * torch.eye(x.shape[1], dtype=x.dtype)
    each = [
        torch.distributions.MultivariateNormal(torch.zeros_like(x[0]), c).log_prob(x) for c in C
    ]
    return torch.stack(each, 1).logsumexp(1)


def test_basis_is_orthonormal_and_gradients_pass_through_it():
    truth = script.MoLRG(12, 2, 3, 0.3).double()
    U = truth.basis()
    assert torch.allclose(U.T @ U, torch.eye(6, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(torch.cat(list(truth.subspaces()), 1), U)
    R = U.T @ truth.weight  # U R is weight, R upper triangular with a positive diagonal
    assert torch.allclose(U @ R, truth.weight) and torch.allclose(R, R.triu(), atol=1e-12)
    assert (R.diagonal() > 0).all()
    x, sigma = torch.randn(5, 12, dtype=torch.float64), full(0.4, 5)

    def denoised(weight):
        return torch.func.functional_call(truth, {"weight": weight}, (x, sigma))

    assert torch.autograd.gradcheck(denoised, truth.weight)
    truth.weight.data[:, 0] *= -1  # the column's sign goes into U, not into the denoiser
    assert torch.allclose(truth.basis()[:, 0], -U[:, 0])
    assert torch.allclose(truth(x, sigma), denoised(truth.weight.abs() * truth.weight.sign()))


def test_data_have_the_covariances_of_assumption_1_in_each_class():
    truth = molrg()
    x0, y = truth.draw(300_000, torch.Generator().manual_seed(1))
    for k, C in enumerate(covariances(truth)):
        assert torch.allclose(x0[y == k].T.cov(), C, atol=0.02)
    assert y.bincount().tolist() == [100_000] * 3
    again, _ = truth.draw(300_000, torch.Generator().manual_seed(1))
    assert torch.equal(x0, again)


@pytest.mark.parametrize("sigma", [0.02, 0.3, 2.0])
def test_exact_denoiser_is_the_posterior_mean_of_the_dense_mixture_and_tweedie_s(sigma):
    truth = molrg()
    x0, _ = truth.draw(40)
    x = x0 + sigma * torch.randn_like(x0)
    C, eye = covariances(truth), torch.eye(12, dtype=torch.float64)
    noisy = C + sigma**2 * eye
    zero = torch.zeros(12, dtype=torch.float64)
    log_p = [torch.distributions.MultivariateNormal(zero, c).log_prob(x) for c in noisy]
    w = torch.stack(log_p, 1).softmax(1)
    means = x @ torch.linalg.solve(noisy, C)  # (K, B, n): C (C + sigma^2)^-1 x
    expected = torch.einsum("bk,kbn->bn", w, means)
    h, posterior = truth.features(x, full(sigma, 40))
    assert torch.allclose(posterior, w, atol=1e-9)
    assert torch.allclose(truth(x, full(sigma, 40)), expected, atol=1e-9)
    assert torch.allclose(h @ truth.basis().T, expected, atol=1e-9)
    x = x.requires_grad_()
    score = torch.autograd.grad(log_density(truth, x, sigma).sum(), x)[0]
    assert torch.allclose(x + sigma**2 * score, expected, atol=1e-9)


def test_denoiser_agrees_with_importance_weighted_draws_of_the_data():
    truth = molrg(6, 1, 2, 0.5)
    x0, _ = truth.draw(400_000)
    x = truth.draw(8)[0] + 0.6 * torch.randn(8, 6, dtype=torch.float64)
    weight = (-torch.cdist(x, x0).square() / (2 * 0.36)).softmax(1)
    assert torch.allclose(truth(x, full(0.6, 8)), weight @ x0, atol=0.03)


def test_gate_of_proposition_1_has_two_terms_that_become_one():
    truth = molrg()
    x, sigma, delta = torch.randn(9, 12, dtype=torch.float64), 0.37, truth.delta
    zeta, xi = 1 / (1 + sigma**2), delta**2 / (delta**2 + sigma**2)
    own = (x @ truth.subspaces()).square().sum(-1).T  # (B, K): |U_l^T x|^2
    others = own.sum(1, keepdim=True) - own  # |Ut_l^T x|^2
    expected = ((zeta * own + xi * others) / (2 * sigma**2)).softmax(1)
    h, w = truth.features(x, full(sigma, 9))
    assert torch.allclose(w, expected)
    beta = h.view(9, 3, 2) / (x @ truth.basis()).view(9, 3, 2)
    assert torch.allclose(beta, (xi + (zeta - xi) * w)[..., None].expand_as(beta))


def table(d, K, count=40_000, clean=False, seed=1):
    """SNR of the exact denoiser on fresh draws at the paper's levels, n = 50, delta = .2."""
    truth = molrg(50, d, K, 0.2)
    x0, y = truth.draw(count, torch.Generator().manual_seed(seed))
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed + 1)).double()
    values = []
    for sigma in SIGMAS:
        x = x0 if clean else x0 + sigma * eps
        x0_hat = truth(x, full(sigma, len(x)))
        values.append(script.snr(x0_hat, y, truth.subspaces()).item())
    return values


def test_snr_of_the_exact_denoiser_is_the_paper_s_table_4():
    got = table(5, 2)
    for value, paper in zip(got, TABLE_4):
        assert value == pytest.approx(paper, rel=0.08)
    assert 0.2 < SIGMAS[got.index(max(got))] < 0.4
    three = table(5, 3)
    for value, expected in zip(three, (12.50, 12.64, 13.55, 18.10, 30.2, 13.0, 2.45, 0.83)):
        assert value == pytest.approx(expected, rel=0.06)
    clean = table(5, 2, clean=True)
    for value, expected in zip(clean, (25.0, 25.6, 29.4, 53.0, 203, 493, 107, 33)):
        assert value == pytest.approx(expected, rel=0.15)


def test_snr_formula_is_tight_away_from_the_peak_and_has_its_limits():
    sigma = torch.tensor(SIGMAS, dtype=torch.float64)
    formula = script.snr_formula(sigma, 5, 2, 0.2)
    printed = (25.04, 25.32, 27.15, 36.53, 73.3, 153, 7.8, 1.59)
    assert torch.allclose(formula, torch.tensor(printed).double(), rtol=7e-3)
    measured = table(5, 2)
    for i in (0, 1, 2, 3, 7):
        assert formula[i].item() == pytest.approx(measured[i], rel=0.03)
    ends = torch.tensor([1e-5, 1e5], dtype=torch.float64)
    assert script.snr_formula(ends, 5, 3, 0.2).tolist() == pytest.approx([12.5, 0.5], rel=1e-3)
    confident = script.snr_formula(sigma[:4], 5, 3, 0.2)  # w_plus = 1
    v = sigma[:4] ** 2
    expected = (0.04 + v) / (2 * 0.04**2 * (1 + v))
    assert torch.allclose(confident, expected, rtol=1e-4)
    clean = script.snr_formula(sigma, 5, 2, 0.2, clean=True)
    assert torch.allclose(clean / formula, (0.04 + sigma**2) / 0.04 / (1 + sigma**2))
    got = table(5, 2, clean=True)
    for i in (0, 1, 2, 3):
        assert clean[i].item() == pytest.approx(got[i], rel=0.05)


def test_class_confidence_has_the_mean_of_the_gate_s_exponent():
    truth, sigma = molrg(50, 5, 3, 0.2), 0.6
    x0, y = truth.draw(200_000)
    x = x0 + sigma * torch.randn_like(x0)
    own = (x @ truth.subspaces()).square().sum(-1)  # (K, B)
    first = own[0, y == 0].mean() - own[1, y == 0].mean()
    zeta, xi = 1 / (1 + sigma**2), 0.04 / (0.04 + sigma**2)
    D_t = (zeta - xi) / (2 * sigma**2) * first
    plus, minus = script.class_confidence(full(sigma, 1), 5, 3, 0.2)
    assert plus.item() == pytest.approx(1 / (1 + 2 * math.exp(-D_t)), rel=5e-3)
    assert (plus + 2 * minus).item() == pytest.approx(1)


def test_snr_is_a_ratio_of_energies_and_its_mean_over_classes():
    bases = torch.eye(4)[:, :2].view(2, 2, 2).new_zeros(2, 4, 2)
    bases[0, :2], bases[1, 2:] = torch.eye(2), torch.eye(2)
    h = torch.tensor([[3.0, 0, 1, 0], [0, 1.0, 0, 1], [1.0, 0, 0, 2]])
    y = torch.tensor([0, 0, 1])
    # class 0: (9 + 1) / (1 + 1) = 5; class 1: 4 / 1
    assert script.snr(h, y, bases).item() == pytest.approx(4.5)
    assert script.snr(7 * h, y, bases).item() == pytest.approx(4.5)


def test_block_model_learns_the_subspaces_and_the_truth_has_the_least_loss():
    truth = molrg(30, 5, 2, 0.2).float()

    def loss(denoiser, count):
        sigma = (math.log(0.1) + math.log(5) * torch.rand(count)).exp()
        return script.dae_loss(denoiser, truth.draw(count)[0], sigma, torch.ones(count))

    losses, errors = [], []
    for start in range(3):  # the loss has minima where blocks share classes: best of three
        torch.manual_seed(start)
        model = script.MoLRG(30, 5, 2, 0.2)
        opt = torch.optim.Adam(model.parameters(), 0.03)
        for _ in range(300):
            value = loss(model, 256)
            opt.zero_grad()
            value.backward()
            opt.step()
        cos = torch.einsum("knd,lne->klde", truth.subspaces(), model.subspaces())
        share = cos.square().sum((2, 3)) / 5  # of block l in subspace k
        errors.append(1 - max(share.trace(), share.flip(0).trace()).item() / 2)
        torch.manual_seed(5)
        losses.append(loss(model, 20_000).item())
    torch.manual_seed(5)
    exact = loss(truth, 20_000).item()
    torch.manual_seed(5)
    untrained = loss(script.MoLRG(30, 5, 2, 0.2), 20_000).item()
    best = losses.index(min(losses))
    assert errors[best] < 0.01
    assert exact < losses[best] < 1.05 * exact < 0.5 * untrained


def test_dae_loss_of_the_identity_is_the_weighted_variance():
    x0 = torch.randn(4000, 3, 4, 4)
    sigma, weight = torch.rand(4000) + 0.1, torch.rand(4000)
    got = script.dae_loss(lambda x, sigma: x, x0, sigma, weight).item()
    assert got == pytest.approx((weight * sigma**2).mean().item(), rel=0.02)


class Exact(nn.Module):
    """F for which denoise_edm is the posterior mean of N(mu, s^2) data, plus `shift`."""

    def __init__(self, mu, s, shift=0.0):
        super().__init__()
        self.mu, self.s, self.shift = mu, s, shift

    def forward(self, x_in, c_noise):
        sigma = (4 * c_noise).exp().view(-1, 1, 1, 1)
        root = (sigma**2 + 0.25).sqrt()
        x = x_in * root
        x0_hat = (self.s**2 * x + sigma**2 * self.mu) / (self.s**2 + sigma**2)
        return (x0_hat - 0.25 / root**2 * x) / (sigma * 0.5 / root) + self.shift


def test_edm_preconditioning_and_weight():
    x, sigma = torch.randn(64, 3, 2, 2), torch.rand(64) + 0.01
    expected = (0.49 * x + sigma.view(-1, 1, 1, 1) ** 2 * 0.2) / (
        0.49 + sigma.view(-1, 1, 1, 1) ** 2
    )
    got = script.denoise_edm(Exact(0.2, 0.7), x, sigma)
    assert torch.allclose(got, expected, atol=1e-5)
    # data at 0: a network off by 1 in F has loss 1 at every level, since weight = 1 / c_out^2
    zero = torch.zeros(256, 3, 2, 2)
    assert script.image_loss(Exact(0.0, 0.0, 1.0), zero).item() == pytest.approx(1, rel=1e-3)
    assert script.image_loss(Exact(0.0, 0.0, 3.0), zero).item() == pytest.approx(9, rel=1e-3)


def test_noise_levels_in_training_are_log_normal():
    seen = []

    def spy(x, c_noise):
        seen.append(4 * c_noise)
        return torch.zeros_like(x)

    value = script.image_loss(spy, torch.zeros(50_000, 1, 1, 1)).item()
    log_sigma = torch.cat(seen)
    assert log_sigma.mean().item() == pytest.approx(-1.2, abs=0.02)
    assert log_sigma.std().item() == pytest.approx(1.2, abs=0.02)
    # F = 0 leaves c_skip sigma eps, weighted: E 0.25 / (sigma^2 + 0.25), by quadrature
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = (-(z**2) / 2).exp() / (2 * math.pi) ** 0.5
    integrand = density * 0.25 / ((2 * (-1.2 + 1.2 * z)).exp() + 0.25)
    expected = torch.trapezoid(integrand, z).item()
    assert value == pytest.approx(expected, rel=0.02)


def test_sampler_follows_the_exact_ode_of_gaussian_data_with_order_two():
    noise = torch.randn(50, 3, 2, 2, dtype=torch.float64)
    # x(sigma) - mu scales like sqrt(s^2 + sigma^2)
    expected = 0.2 + (80 * noise - 0.2) * 0.3 / (0.09 + 80**2) ** 0.5
    errors = []
    for count in (18, 36, 72, 144):
        got = script.sample_edm(Exact(0.2, 0.3), noise, count)
        errors.append((got - expected).abs().max().item() / (expected - 0.2).abs().max().item())
    assert errors[0] < 0.07 and errors[3] < 1e-3
    for a, b in zip(errors[1:], errors[2:]):
        assert 3.5 < a / b < 5
    assert not got.requires_grad


def test_memorising_denoiser_against_loops_its_limits_and_its_score():
    train = torch.randn(7, 3, dtype=torch.float64)
    x, sigma = torch.randn(5, 3, dtype=torch.float64), 0.8
    for i, point in enumerate(x):
        weight = [math.exp(-sum((point - p) ** 2).item() / (2 * sigma**2)) for p in train]
        expected = sum(w * p for w, p in zip(weight, train)) / sum(weight)
        assert torch.allclose(script.memorising_denoiser(x, sigma, train)[i], expected)
    nearest = train[torch.cdist(x, train).argmin(1)]
    assert torch.allclose(script.memorising_denoiser(x, 1e-3, train), nearest)
    mean = train.mean(0).expand(5, 3)
    assert torch.allclose(script.memorising_denoiser(x, 1e4, train), mean, atol=1e-6)
    point = x.clone().requires_grad_()
    log_p = (-torch.cdist(point, train).square() / (2 * sigma**2)).logsumexp(1).sum()
    score = torch.autograd.grad(log_p, point)[0]
    got = script.memorising_denoiser(x, sigma, train)
    assert torch.allclose(x + sigma**2 * score, got)


def test_memorising_denoiser_tends_to_the_exact_one_as_the_set_grows():
    truth = molrg(6, 1, 2, 0.5)
    x0, _ = truth.draw(500)
    x = x0 + 0.5 * torch.randn_like(x0)
    exact = truth(x, full(0.5, 500))
    errors = [
        (script.memorising_denoiser(x, 0.5, truth.draw(n)[0]) - exact).square().mean().item()
        for n in (30, 1000, 30_000)
    ]
    assert errors[0] > 5 * errors[1] > 25 * errors[2]


def test_nearest_ratio_knows_copies_midpoints_and_who_is_near():
    train = torch.tensor([[0.0, 0], [4, 0], [0, 8], [50, 50]]).view(4, 1, 1, 2)
    samples = torch.tensor([[0.0, 0], [1, 0], [2, 0], [0, 7]]).view(4, 1, 1, 2)
    ratio, index = script.nearest_ratio(samples, train)
    assert ratio.tolist() == pytest.approx([0, 1 / 3, 1, 1 / 7])
    assert index.tolist()[:2] == [0, 0] and index[3] == 2
    twice = torch.cat([train, train[:1]])  # a duplicated image: 0 / 0 is memorised, not NaN
    assert script.nearest_ratio(samples[:1], twice)[0].item() == 0


def small_net():
    net = script.DenoisingUNet(2, 16, 2, 2)
    for w in net.parameters():  # residual branches start at 0: wake them
        nn.init.normal_(w, std=0.3)
    return net


def test_blocks_start_as_linear_maps_and_the_network_knows_the_level():
    x, c = torch.randn(5, 3, 8, 8), torch.randn(5)
    block = script.DenoisingUNet(2, 16, 2, 2).encoder[0]
    h = torch.randn(5, 16, 4, 4)
    assert torch.allclose(block(h, torch.randn(5, 32)) - block.conv2.bias.view(-1, 1, 1),
                          block.skip(h), atol=1e-6)
    woken = small_net()
    assert (woken(x, c) - woken(x, c + 0.5)).abs().max() > 1e-3


def test_block_is_two_normalised_convolutions_with_scale_and_shift():
    block = small_net().encoder[2].double()  # 16 to 32 channels
    x, c = torch.randn(2, 16, 4, 4).double(), torch.randn(2, 32).double()

    def normed(u, layer):
        groups = u.reshape(2, 8, -1)
        groups = groups - groups.mean(-1, keepdim=True)
        groups = groups / (groups.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return groups.reshape(u.shape) * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)

    def silu(u):
        return u / (1 + (-u).exp())

    def convolved(u, layer):  # one product for each of the nine places
        padded, (H, W) = F.pad(u, (1, 1, 1, 1)), u.shape[2:]
        parts = [torch.einsum("oc,bchw->bohw", layer.weight[:, :, i, j],
                              padded[:, :, i : i + H, j : j + W])
                 for i in range(3) for j in range(3)]
        return sum(parts) + layer.bias.view(-1, 1, 1)

    h = normed(convolved(silu(normed(x, block.norm1)), block.conv1), block.norm2)
    scale, shift = block.time(c)[:, :32, None, None], block.time(c)[:, 32:, None, None]
    h = convolved(silu(h * (1 + scale) + shift), block.conv2)
    skip = torch.einsum("oc,bchw->bohw", block.skip.weight[:, :, 0, 0], x)
    expected = skip + block.skip.bias.view(-1, 1, 1) + h
    assert torch.allclose(block(x, c), expected, atol=1e-10)


def test_attention_mixes_places_by_softmax_and_starts_as_a_shift():
    layer, x = script.SpatialAttention(16).double(), torch.randn(3, 16, 2, 4).double()
    assert torch.allclose(layer(x), x + layer.proj.bias.view(-1, 1, 1))
    for w in layer.parameters():
        nn.init.normal_(w, std=0.3)
    u = layer.norm(x).flatten(2)  # (B, C, N)
    q, k, v = torch.einsum("oc,bcn->bon", layer.qkv.weight[..., 0, 0], u).chunk(3, 1)
    q, k, v = (part + bias[:, None] for part, bias in zip((q, k, v), layer.qkv.bias.chunk(3)))
    share = (torch.einsum("bcn,bcm->bnm", q, k) / 4).softmax(2)  # of place m in place n; 4^2 = C
    mixed = torch.einsum("bnm,bcm->bcn", share, v)
    out = torch.einsum("oc,bcn->bon", layer.proj.weight[..., 0, 0], mixed)
    expected = x.flatten(2) + out + layer.proj.bias[:, None]
    assert torch.allclose(layer(x).flatten(2), expected, atol=1e-10)


def test_activations_are_the_hooked_layer_s_mean_and_the_hook_goes():
    net = small_net()
    x, sigma = torch.randn(5, 3, 8, 8), torch.rand(5) + 0.1
    x_in = x / (sigma.view(-1, 1, 1, 1) ** 2 + 0.25).sqrt()
    angle = sigma.log()[:, None] / 4 * 10000 ** (-torch.arange(8) / 7)
    c = net.time(torch.cat([angle.cos(), angle.sin()], 1))
    squares = [x_in[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]  # (p q c)
    e0 = net.encoder[0](net.conv_in(torch.cat(squares, 1)), c)
    e1 = net.encoder[1](e0, c)
    half = sum(e1[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
    e2 = net.encoder[2](half, c)
    e3 = net.encoder[3](e2, c)
    d0 = net.decoder[0](torch.cat([net.attention(net.middle(e3, c)), e3], 1), c)
    d1 = net.decoder[1](torch.cat([d0, e2], 1), c)
    wide = d1.repeat_interleave(2, 2).repeat_interleave(2, 3)
    d2 = net.decoder[2](torch.cat([wide, e1], 1), c)
    d3 = net.decoder[3](torch.cat([d2, e0], 1), c)
    out, image = net.conv_out(F.silu(net.norm_out(d3))), torch.zeros_like(x)
    for n, (i, j) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        image[:, :, i::2, j::2] = out[:, 3 * n : 3 * n + 3]
    assert torch.allclose(net(x_in, sigma.log() / 4), image, atol=1e-5)
    got = script.activations(net, "decoder.2", x, sigma)
    assert torch.allclose(got, d2.mean((2, 3)), atol=1e-5)
    assert not net.decoder[2]._forward_hooks
    with pytest.raises(ValueError, match="channels"):
        script.activations(net, "time", x, sigma)
    assert not net.time._forward_hooks


def test_probe_is_at_the_minimum_of_its_convex_objective():
    f = torch.randn(300, 6, dtype=torch.float64) * 3 + 1
    y = (f[:, 0] + torch.randn(300).double()).argsort().argsort() // 100  # three classes
    logits = script.logistic_probe(f, y, f, 3, l2=0.05)
    X = (f - f.mean(0)) / f.std(0)
    design = torch.cat([X, torch.ones(300, 1).double()], 1)
    solution = torch.linalg.lstsq(design, logits).solution  # the weights that made these logits
    assert torch.allclose(design @ solution, logits, atol=1e-5)
    residual = (logits.softmax(1) - F.one_hot(y, 3)) / 300
    assert (X.T @ residual + 0.05 * solution[:6]).abs().max() < 1e-4
    assert residual.sum(0).abs().max() < 1e-4
    scaled = script.logistic_probe(5 * f - 7, y, 5 * f - 7, 3, l2=0.05)
    assert torch.allclose(scaled, logits, atol=1e-4)
    # the test set's own statistics play no part
    shifted = script.logistic_probe(f, y, torch.cat([f, f + 100]), 3, l2=0.05)
    assert torch.allclose(shifted[:300], logits, atol=1e-4)


def test_probe_of_symmetric_classes_needs_absolute_values():
    """Zero-mean classes look alike to a linear probe: h and -h are equally likely."""
    truth = molrg(20, 3, 3, 0.2)
    (x0, y), (t0, t) = (truth.draw(1500, torch.Generator().manual_seed(s)) for s in (1, 2))
    (h, _), (h_test, _) = (truth.features(u, full(0.1, 1500)) for u in (x0, t0))
    plain = script.logistic_probe(h, y, h_test, 3)
    folded = script.logistic_probe(h.abs(), y, h_test.abs(), 3)
    assert (plain.argmax(1) == t).double().mean() < 0.5
    assert (folded.argmax(1) == t).double().mean() > 0.93


def test_few_shot_draws_that_many_of_each_class():
    y = torch.arange(1000) % 10
    sets = claim.few_shot(y, 10, 7, 3)
    assert all(y[index].bincount().tolist() == [7] * 10 for index in sets)
    assert sets.shape == (3, 70) and len(sets.unique()) == 210  # none twice
    assert torch.equal(sets, claim.few_shot(y, 10, 7, 3))


def test_probes_of_random_labels_stay_at_chance():
    cfg, cpu = config(), torch.device("cpu")
    net, (images, _) = script.build(cfg), shapes(1000, 8, 3)
    y = torch.cat([torch.randperm(500) % 10 for _ in range(2)])  # a leak would be learned
    got = script.curve(net, images, y, 10, True, cfg, cpu)
    assert got["accuracy"].mean() < 0.16 and got["subspace"].mean() < 0.16


def test_measurements_keep_clean_and_noisy_copies_and_others_apart():
    cfg, cpu = config("--subset", "64"), torch.device("cpu")
    data, held_out = script.load_data(cfg, cpu)
    net = script.build(cfg)
    nn.init.normal_(net.conv_out.weight, std=0.1)
    for samples, share in ((data.images[:8], 1.0), (held_out[0][:8], 0.0)):
        pairs, curves, got = script.measure_features(net, data, held_out, samples, cfg, cpu)
        assert got["memorised"] == share and torch.equal(pairs[:, 0], samples)
        assert torch.equal(pairs[:, 1], samples) == (share == 1)
        script.show_curves(pairs, curves, script.levels(cfg.sigmas), "m")
    kept = json.loads(Path("m_probe.json").read_text())
    for kind in ("clean", "noisy"):
        want = script.curve(net, *held_out, 10, kind == "noisy", cfg, cpu)
        assert {k: v.mean(0).tolist() for k, v in want.items()} == kept[kind]
    assert kept["clean"]["accuracy"] != kept["noisy"]["accuracy"]
    every, _ = script.take(data, cfg, cpu, 64)
    for name, images in (("train", every), ("held_out", held_out[0])):
        assert got[name] == script.fixed_noise_loss(net, images, cfg, cpu)


def test_class_subspaces_are_the_leading_directions_of_each_class():
    truth = molrg(30, 2, 3, 0.05)
    f, y = truth.draw(3000)
    mean, bases = script.class_subspaces(f, y, 3, rank=2)
    unit = f / f.norm(dim=1, keepdim=True)
    assert torch.allclose(mean, unit.mean(0))
    for k in range(3):
        centred = unit[y == k] - unit.mean(0)
        vectors = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -2:]
        assert torch.allclose(bases[k] @ bases[k].T, vectors @ vectors.T, atol=1e-8)
        U = truth.subspaces()[k]
        assert (bases[k] @ bases[k].T - U @ U.T).norm() < 0.05
    energy = torch.einsum("bn,knd->bkd", unit - mean, bases).square().sum(-1)
    assert (energy.argmax(1) == y).double().mean() > 0.99


def test_unimodality_needs_an_inner_peak_and_two_standard_errors_on_both_sides():
    hill = torch.tensor([[0.5, 0.7, 0.6], [0.52, 0.74, 0.6], [0.48, 0.69, 0.63]])
    got = script.unimodality(hill)
    assert got["peak"] == 1 and got["unimodal"] == 1 and got["at_end"] == 0
    rises = [0.2, 0.22, 0.21]
    assert got["rise"] == pytest.approx(0.21) and got["accuracy"] == pytest.approx(0.71)
    spread = (sum((r - 0.21) ** 2 for r in rises) / 2) ** 0.5 / 3**0.5
    assert got["rise_se"] == pytest.approx(spread, rel=1e-4)
    assert got["drop"] == pytest.approx((0.1 + 0.14 + 0.06) / 3)
    fall = script.unimodality(hill.flip(1) + torch.tensor([1.0, 0, 0]))
    assert fall["unimodal"] == 0 and fall["at_end"] == 1 and fall["rise"] == 0
    assert script.unimodality(hill[:, [1, 0, 2]])["peak"] == 0
    unsure = torch.tensor([[0.5, 0.7, 0.4], [0.6, 0.5, 0.4], [0.5, 0.51, 0.4]])
    got = script.unimodality(unsure)  # even rows peak in the middle, the odd one at the start
    assert got["peak"] == 1 and got["unimodal"] == 0 and got["at_end"] == 0
    # each row is read at the other half's peak: rows 0 and 2 at level 0, row 1 at level 1
    assert got["rise"] == pytest.approx(-0.1 / 3)
    assert got["drop"] == pytest.approx((0.1 + 0.1 + 0.1) / 3)


def test_unimodality_does_not_judge_a_maximum_by_the_noise_that_chose_it():
    """Flat, then falling: the rise to a chosen maximum is positive in the mean, unless the peak is
    chosen elsewhere; 400 curves of 200 repeats."""
    g = torch.Generator().manual_seed(0)
    level = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, 0.2])
    found = [script.unimodality(level + torch.randn(200, 6, generator=g)) for _ in range(400)]
    rise = torch.tensor([f["rise"] for f in found])
    assert abs(rise.mean()) < 3 * rise.std() / 20
    assert sum(f["unimodal"] for f in found) < 0.05 * 400


def test_claim_of_unlike_classes_has_the_gate_of_eq_5_or_the_posterior(monkeypatch):
    monkeypatch.setattr(claim, "DENSE", [0.14, 0.3, 0.585])
    arms = {(name, exact): claim.relaxed_arm(name, exact, 0, None, 4000)
            for name in claim.RELAXED for exact in (False, True)}
    for name in ("none", "angle 30"):  # of equal weight and volume: the gate is the posterior
        assert arms[name, True] == pytest.approx(arms[name, False], rel=1e-9)
    keys = [claim.key("snr", s) for s in claim.DENSE]
    for name in claim.UNLIKE:
        assert all(abs(arms[name, True][k] / arms[name, False][k] - 1) > 0.001 for k in keys)
    # Prop. 1 written out for ranks 10 and 2, on draws of its own
    torch.manual_seed(0)
    double = torch.float64
    Q = torch.linalg.qr(torch.randn(50, 12, dtype=double))[0]
    U, dd = (Q[:, :10], Q[:, 10:]), 0.04
    for sigma, k in zip(claim.DENSE, keys):
        v, ratio = sigma**2, []
        zeta, xi = 1 / (1 + v), dd / (dd + v)
        for own in (0, 1):
            a, b = U[own], U[1 - own]
            x = torch.randn(20_000, a.shape[1], dtype=double) @ a.T
            x = x + 0.2 * torch.randn(20_000, b.shape[1], dtype=double) @ b.T
            x = x + sigma * torch.randn(x.shape, dtype=double)
            energy = [(x @ u).square().sum(1) for u in U]
            exponent = [(zeta * energy[i] + xi * energy[1 - i]) / (2 * v) for i in (0, 1)]
            w = torch.stack(exponent, 1).softmax(1)
            h = [xi + (zeta - xi) * w[:, i] for i in (0, 1)]  # gain of block i
            kept = [(h[i] ** 2 * energy[i]).mean() for i in (0, 1)]
            ratio.append(kept[own] / kept[1 - own])
        assert arms["ranks 10 and 2", False][k] == pytest.approx(sum(ratio).item() / 2, rel=0.1)


def test_claim_adds_the_errors_of_draws_and_of_points():
    g = torch.Generator().manual_seed(0)
    share = torch.tensor([0.5, 0.8, 0.4])
    points = (torch.rand(1, 500, 1, generator=g) < 0.3) * 0.3  # some are easy in every draw
    right = torch.rand(8, 500, 3, generator=g) < share + points
    got = claim.shape(right)
    draws, over = (script.unimodality(right.double().mean(i)) for i in (1, 0))
    assert got["unimodal"] == 1 and got["rise"] == over["rise"]
    assert got["rise_se"] == math.hypot(draws["rise_se"], over["rise_se"]) > over["rise_se"]
    alike = (torch.rand(8, 500, 1, generator=g) < 0.5).expand(-1, -1, 3)
    assert claim.shape(alike)["unimodal"] == 0


def test_claim_says_not_resolved_between_a_hill_and_a_peak_at_the_end():
    yes, no, open_ = "as in the paper", "contradicted", "not resolved"
    assert claim.curve_word([1, 1], [0, 0]) == yes and claim.curve_word([0, 0], [1, 1]) == no
    assert claim.curve_word([1, 0], [0, 1]) == claim.curve_word([0, 0], [0, 0]) == open_
    assert claim.peaks_earlier([(0.02, 0), (0.3, 1)], [(0.1, 0), (0.1, 0)]) == yes
    assert claim.peaks_earlier([(0.2, 0), (0.1, 0)], [(0.1, 0), (0.1, 0)]) == no
    assert claim.peaks_earlier([(0.2, 0), (0.02, 0)], [(0.1, 0), (0.1, 0)]) == open_


class Labelled(nn.Module):
    """A network whose layer shows the class: channel y of a one-hot map, from the brightness."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, x, c_noise):
        level = (x.mean((1, 2, 3)) * 10).round().long().clamp(0, 3)  # class y has brightness y / 10
        hot = torch.nn.functional.one_hot(level, 4).float()[..., None, None].expand(-1, -1, 2, 2)
        self.layer(hot + 0.01 * torch.arange(4.0)[None, :, None, None])
        return torch.zeros_like(x)


def test_curve_tests_the_second_half_against_its_own_labels():
    y = torch.cat([torch.arange(40) % 4, torch.arange(40).flip(0) % 4])  # halves in other orders
    x0 = y[:, None, None, None] / 10 * (0.01**2 + 0.25) ** 0.5  # input is scaled by c_in
    images = ((x0 + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, 8, 8)
    cfg = config("--layer", "layer", "--sigmas", "0.01,0.02,0.03", "--precision", "fp32")
    got = script.curve(Labelled(), images, y, 4, False, cfg, torch.device("cpu"))
    assert got["accuracy"].shape == (40, 3) and got["accuracy"][:, 0].min() == 1
    h = torch.eye(4) + 0.01 * torch.arange(4.0)
    h = (h / h.norm(dim=1, keepdim=True))[y]
    mean = h[:40].mean(0)
    _, bases = script.class_subspaces(h[:40], y[:40], 4)
    assert got["snr"][0, 0] == pytest.approx(
        script.snr(h[40:] - mean, y[40:], bases).item(), rel=1e-3)


def config(*flags):
    return script.parse_config(script.Config, script.PRESETS, (), [*SMALL, *flags])


def test_noise_is_the_same_at_every_level_and_vanishes_for_clean_input():
    net, cfg, cpu = small_net(), config(), torch.device("cpu")
    images, _ = shapes(600, 8, seed=3)
    clean = script.collect(net, images, 0.3, False, cfg, cpu)
    x = images.float() / 127.5 - 1
    with torch.no_grad():
        expected = script.activations(net, "decoder.0", x, torch.full((600,), 0.3))
    assert torch.allclose(clean, expected, atol=1e-5)
    noise = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = nn.ModuleList([nn.Identity()])

        def forward(self, x_in, c_noise):
            sigma = (4 * c_noise).exp().view(-1, 1, 1, 1)
            noise.append(x_in * (sigma**2 + 0.25).sqrt() / sigma)
            return self.decoder[0](x_in)

    black = torch.full_like(images, 0)
    for sigma in (0.1, 2.0):
        script.collect(Spy(), black, sigma, True, cfg, cpu)
    small, large = torch.cat(noise[:2]) + 1 / 0.1, torch.cat(noise[2:]) + 1 / 2.0
    assert torch.allclose(small, large, atol=1e-4)
    assert small.std().item() == pytest.approx(1, abs=0.01)
    assert (small[:100] - small[500:]).abs().mean() > 0.5  # each batch has its own


def test_held_out_loss_has_one_noise_for_all_images_and_repeats_a_small_set():
    net, cfg, cpu = small_net(), config(), torch.device("cpu")
    images, _ = shapes(64, 8, seed=3)
    with torch.no_grad():
        one = script.fixed_noise_loss(net, images, cfg, cpu)
        torch.manual_seed(99)
        assert script.fixed_noise_loss(net, images, cfg, cpu) == one
        many = images[torch.arange(2000) % 64]
        assert script.fixed_noise_loss(net, many, cfg, cpu) == pytest.approx(one)
        assert script.fixed_noise_loss(net, images.flip(0), cfg, cpu) != one


def test_subset_is_random_balanced_by_chance_and_the_probe_s_images_are_held_out():
    cpu = torch.device("cpu")
    data, (images, y) = script.load_data(config("--subset", "64"), cpu)
    all_images, all_labels = shapes(50_000, 8, 0)
    held, _ = shapes(10_000, 8, 1)
    rows = {x.numpy().tobytes(): int(k) for x, k in zip(all_images, all_labels)}
    assert data.size == 64 == len(data.images)
    assert all(rows[x.numpy().tobytes()] == k for x, k in zip(data.images, data.labels))
    other, _ = script.load_data(config("--subset", "64", "--seed", "1"), cpu)
    assert not torch.equal(data.images, other.images)
    inside = {x.numpy().tobytes() for x in held}
    assert len(images) == 384 == len(y) and all(x.numpy().tobytes() in inside for x in images)
    repeated, _ = script.take(data, config("--subset", "64"), cpu, 200)
    assert len(repeated) == 64  # each once: whole batches of an epoch


def test_run_leaves_curves_pictures_and_numbers(capsys, refuses):
    script.main(SMALL + ["--subset", "32", "--out", "run"])
    table = [line.split() for line in capsys.readouterr().out.splitlines() if "." in line]
    rows = {row[0]: [float(v) for v in row[1:]] for row in table if len(row) == 7}
    assert list(rows) == ["0.010", "0.100", "1.000"]
    assert all(0 <= v[i] <= 1 for v in rows.values() for i in (0, 1, 3, 4))
    line = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    best = max(rows, key=lambda k: rows[k][0])
    assert line["peak"] == float(best)
    assert line["accuracy"] == pytest.approx(rows[best][0], abs=1e-4)
    assert line["rise"] == pytest.approx(rows[best][0] - rows["0.010"][0], abs=2e-4)
    assert 0 <= line["memorised"] <= 1 and 0 < line["train"] < 5 and 0 < line["held_out"] < 5
    assert Image.open("run/samples_0000006.png").size == (8 * 66, 8 * 66)
    assert Image.open("run/samples_0000006_probe.png").width > 600
    kept = json.loads(Path("run/samples_0000006_probe.json").read_text())
    best, curve = kept["sigma"].index(line["peak"]), kept["noisy"]["accuracy"]
    ends = [curve[best] - curve[i] for i in (0, -1)]
    assert ends == pytest.approx([line["rise"], line["drop"]], abs=1e-6)
    script.main(["--sample", "run/last.pt", "--n", "3", "--npz", "--out", "s", "--layer", "middle"])
    assert Image.open("s/sample.png").size == (8 * 66, 66) and Path("s/sample.npz").exists()
    assert Path("s/sample_probe.png").exists() and "memorised" in capsys.readouterr().out
    line = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    script.main(["--sample", "run/last.pt", "--n", "3", "--seed", "5", "--out", "s"])
    words = capsys.readouterr().out.split()
    train = float(words[words.index("train") + 1])  # still of the images that it was trained on
    assert train == pytest.approx(line["train"], rel=1e-3)
    refuses(lambda: script.main(["--sample", "run/last.pt", "--dim", "32"]), "dim")
    refuses(lambda: script.main(["--sample", "run/none.pt"]), "none.pt")


def test_rate_rises_over_the_warm_up_and_stays():
    script.main([*SMALL, "--warmup", "4", "--lr", "1e-3", "--log-every", "1", "--out", "run"])
    rates = [json.loads(x)["lr"] for x in Path("run/metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([min(1, (i + 1) / 4) * 1e-3 for i in range(len(rates))])


def test_interrupted_run_equals_a_whole_one(same_when_interrupted):
    flags = SMALL + ["--save-every", "2", "--subset", "64"]
    same_when_interrupted(script, flags, ["model", "ema"])
    ema, model = (load_checkpoint("whole/last.pt")[k] for k in ("ema", "model"))
    assert any(not torch.equal(ema[k], model[k]) for k in model)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--layer", "decoder.7"], ["--layer decoder.7", "7"]),
        (["--layer", "time"], ["--layer time", "channels"]),
        (["--sigmas", "0.1,0.1,1"], ["sigmas", "rising"]),
        (["--sigmas", "0.1,one,1"], ["one"]),
        (["--sigmas", "0,0.1,1"], ["sigmas", "positive"]),
        (["--patch", "3"], ["image_size 8", "divisible by 6"]),
        (["--scales", "4"], ["image_size 8", "divisible by 16"]),
        (["--dim", "12"], ["dim 12", "8"]),
        (["--subset", "8"], ["subset 8", "one batch"]),
        (["--subset", "60000"], ["--subset 60000", "50000"]),
        (["--probe-images", "16"], ["--probe-images 16", "a class has"]),
        (["--lr", "0"], ["lr"]),
        (["--ema-decay", "1"], ["ema_decay"]),
        (["--preset", "tiny"], ["tiny"]),
    ],
)
def test_bad_input_is_one_line(flags, words, refuses):
    refuses(lambda: script.main(SMALL + flags), *words)
    assert not Path("runs").exists()


@pytest.mark.gpu
def test_compiled_bf16_on_cuda():
    own = ("--device", "cpu", "--precision", "fp32", "--compile", "off")
    script.main([flag for flag in SMALL if flag not in own] + ["--out", "run"])
    line = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert math.isfinite(line["loss"]) and 0 <= line["accuracy"] <= 1


@pytest.mark.slow
def test_two_ranks_train_as_one_sample_as_one_and_stop_together(launch, same_on_two_ranks):
    output = launch(script, *SMALL, "--subset", "64", "--out", "two", ranks=2)
    lines = [json.loads(x) for x in Path("two/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]  # written once
    assert math.isfinite(lines[-1]["held_out"]) and 0 <= lines[-1]["memorised"] <= 1
    assert output.count("noisy accuracy") == 1 and Path("two/samples_0000006_probe.png").exists()
    outputs = same_on_two_ranks(script, "--sample", "two/last.pt", "--n", "600", "--precision",
                                "fp32")
    words = [next(x for x in out.splitlines() if "memorised" in x).split() for out in outputs]
    one, two = ([float(x) for x in row[1::2]] for row in words)
    assert one == pytest.approx(two, abs=0.02)  # the same images, gathered from two ranks
    launch(script, *SMALL, "--out", "odd", "--batch-size", "7", ranks=2,
           fails="divisible by the 2 ranks")
    assert not Path("odd").exists()
