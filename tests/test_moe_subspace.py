"""moe_subspace.py against brute-force mixtures, autograd, Monte Carlo and separate networks."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import moe_subspace as script
from common import load_checkpoint, mix, shapes

SMALL = """--device cpu --compile off --precision fp32 --image-size 8 --batch-size 40 --steps 4
--vae-steps 3 --vae-channels 4 --latent-dim 4 --modes 2 --rank 2 --log-every 1
--save-every 2 --sample-every 2""".split()
double = torch.float64
ROOT = Path(script.__file__).parent


def few_shapes(cfg, device, split="all"):
    """1,000 shapes in place of 50,000."""
    images, labels = shapes(1000, cfg.image_size, seed=3)
    return SimpleNamespace(images=images, labels=labels, classes=10, size=1000)


def unequal_shapes(cfg, device, split="all"):
    """100 shapes of class 0, 40 of class 1, 100 of each other."""
    data = few_shapes(cfg, device)
    keep = (data.labels != 1) | (data.labels.eq(1).cumsum(0) <= 40)
    return SimpleNamespace(images=data.images[keep], labels=data.labels[keep], classes=10, size=940)


def logged(out):
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def small_data(monkeypatch):
    monkeypatch.setattr(script, "load_images", few_shapes)
    monkeypatch.setattr(script, "LEVELS", 4)


def random_parameters(D=10, dims=(3, 1, 4), modes=(2, 3, 1), ranks=(2, 1, 4), seed=0):
    """Subspaces at any angles, everything unequal: weights, A, pi, mu, U in float64."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *size: torch.randn(*size, generator=g, dtype=double)
    weights = torch.rand(len(dims), generator=g, dtype=double) + 0.2
    A = [torch.linalg.qr(normal(D, d))[0] for d in dims]
    pi = [torch.rand(m, generator=g, dtype=double) + 0.2 for m in modes]
    mu = [normal(m, d) for m, d in zip(modes, dims)]
    U = [0.5 * normal(m, d, r) for m, d, r in zip(modes, dims, ranks)]
    return weights / weights.sum(), A, [p / p.sum() for p in pi], mu, U


def components(weights, A, pi, mu, U, eta, s, gamma):
    """log weight, mean (D,) and full covariance (D, D) of every Gaussian of p_t, each in D."""
    for k, w in enumerate(weights):
        for l, p in enumerate(pi[k]):
            L = A[k] @ U[k][l]
            noise = (gamma**2 + s**2 * eta**2) * torch.eye(len(L), dtype=double)
            yield k, (w * p).log(), s * A[k] @ mu[k][l], s**2 * L @ L.T + noise


CASES = [(1.0, 0.5, 0.0), (1.0, 0.05, 0.2), (0.8, 0.6, 0.0), (0.3, 2.0, 0.5), (1.0, 3.0, 0.1)]


@pytest.mark.parametrize("s, gamma, eta", CASES)
def test_score_is_the_gradient_of_log_prob_and_that_the_brute_force_mixture(s, gamma, eta):
    for seed in range(3):
        parameters = random_parameters(seed=seed)
        oracle = script.MoLRMoG(*parameters, eta)
        x = s * oracle.sample(60)[0] + gamma * torch.randn(60, 10, dtype=double)
        x = torch.cat([x, 3 * torch.randn(20, 10, dtype=double)]).requires_grad_()
        parts = [
            w + torch.distributions.MultivariateNormal(mean, cov).log_prob(x)
            for _, w, mean, cov in components(*parameters, eta, s, gamma)
        ]
        exact = torch.stack(parts).logsumexp(0)
        log_prob, score = oracle.log_prob(x, s, gamma), oracle.score(x, s, gamma)
        assert torch.allclose(log_prob, exact, rtol=1e-10, atol=1e-9)
        for value in (log_prob, exact):
            grad = torch.autograd.grad(value.sum(), x)[0]
            worst = (score - grad).norm(dim=1) / grad.norm(dim=1)
            assert worst.max() < 1e-8


@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_denoiser_is_the_posterior_mean_of_a_monte_carlo_sample(eta):
    oracle = script.MoLRMoG(*random_parameters(D=5, dims=(2, 1), modes=(2, 2), ranks=(2, 1)), eta)
    x0 = oracle.sample(400_000)[0]
    s, gamma = 0.8, 0.7
    x = s * x0[:6] + gamma * torch.randn(6, 5, dtype=double)
    log_w = -torch.cdist(x, s * x0).square() / (2 * gamma**2)
    share = log_w.softmax(1)
    mean = share @ x0
    spread = torch.stack([share[i] @ (x0 - mean[i]).square() for i in range(6)])
    error = (spread * share.square().sum(1, keepdim=True)).sqrt()  # of an importance sample
    gap = (oracle(x, s, gamma)[0] - mean).abs()
    assert (gap < 4.5 * error + 1e-9).all() and error.max() < 0.05


def test_noise_off_the_subspace_is_shrunk_by_its_own_share():
    """One subspace, one Gaussian: across A the posterior mean is s eta^2 / (gamma^2 + s^2 eta^2) x,
    along A that of variance tau^2 + eta^2."""
    A = torch.eye(4, 1, dtype=double)
    tau, eta, s, gamma = 0.9, 0.4, 0.7, 0.3
    one, zero = torch.ones(1, dtype=double), torch.zeros(1, 1, dtype=double)
    oracle = script.MoLRMoG(one, [A], [one], [zero], [torch.full((1, 1, 1), tau).double()], eta)
    x = torch.randn(9, 4, dtype=double)
    variance = torch.tensor([tau**2 + eta**2, eta**2, eta**2, eta**2], dtype=double)
    expected = s * variance / (s**2 * variance + gamma**2) * x
    assert torch.allclose(oracle(x, s, gamma)[0], expected, atol=1e-12)
    assert torch.allclose(oracle.eta2, torch.tensor(eta**2, dtype=double), rtol=1e-15)


def test_samples_have_the_model_s_moments_and_labels():
    parameters = random_parameters()
    oracle = script.MoLRMoG(*parameters, 0.1)
    x0, k, l = oracle.sample(200_000)
    assert torch.allclose(k.bincount() / len(k), parameters[0].float(), atol=0.005)
    for j, _, mean, cov in components(*parameters, 0.1, 1.0, 0.0):
        mode = [i for i, m in enumerate(parameters[3][j]) if torch.allclose(parameters[1][j] @ m,
                                                                             mean)][0]
        own = x0[(k == j) & (l == mode)]
        share = (l[k == j] == mode).double().mean()
        assert share.item() == pytest.approx(parameters[2][j][mode].item(), abs=0.01)
        assert torch.allclose(own.mean(0), mean, atol=0.03)
        assert torch.allclose(own.T.cov(), cov, atol=0.04)


def test_gate_needs_both_of_its_easily_forgotten_terms():
    parameters = random_parameters(dims=(2, 4), modes=(2, 2), ranks=(2, 3))
    oracle = script.MoLRMoG(*parameters, 0.1)
    s, gamma = 1.0, 1.2
    x = oracle.sample(300)[0] + gamma * torch.randn(300, 10, dtype=double)
    exact = torch.zeros(300, 2, dtype=double)  # p(k | x) by full covariances
    for k, w, mean, cov in components(*parameters, 0.1, s, gamma):
        exact[:, k] += (w + torch.distributions.MultivariateNormal(mean, cov).log_prob(x)).exp()
    exact = exact / exact.sum(1, keepdim=True)
    G = oracle(x, s, gamma)[1]
    assert torch.allclose(G.softmax(1), exact, atol=1e-10)
    z, g2 = torch.einsum("bn,knd->bkd", x, oracle.A), gamma**2 + 0.1**2
    square = z.square().sum(-1) / (2 * g2)
    volume = torch.tensor([2, 4]) / 2 * math.log(2 * math.pi * g2)
    for forgotten in (square, volume):
        assert ((G - forgotten).softmax(1) - exact).abs().mean() > 0.05


def test_gates_route_softly_by_label_or_to_the_most_likely():
    weights, A, _, _, _ = random_parameters(dims=(2, 2, 2), modes=(2,) * 3, ranks=(1,) * 3)
    A = torch.stack(A).float()
    experts = script.MoGExperts([2, 2, 2], 2, 1)
    with torch.no_grad():
        experts.mu.normal_()
    nets = {g: script.MoESubspaceDenoiser(A, experts, weights.float(), 0.2, g)
            for g in ("soft", "label", "top1")}
    x, y = torch.randn(50, 10), torch.randint(3, (50,))
    z = torch.einsum("bn,knd->bkd", x, A)
    z_hat = experts(z, 1.0, torch.full((50,), 0.5**2 + 0.2**2))[0]
    lifted = torch.einsum("bkd,knd->bkn", z_hat, A)
    g2 = 0.5**2 + 0.2**2
    whole = lambda c: c + 0.2**2 / g2 * (x - c)
    out, G = nets["soft"](x, 1.0, 0.5)
    assert torch.allclose(out, whole((G.softmax(1)[..., None] * lifted).sum(1)), atol=1e-5)
    assert torch.allclose(nets["label"](x, 1.0, 0.5, y)[0], whole(lifted[range(50), y]), atol=1e-5)
    best = G.argmax(1)
    assert torch.allclose(nets["top1"](x, 1.0, 0.5)[0], whole(lifted[range(50), best]), atol=1e-5)
    assert len(best.unique()) == 3 and not torch.equal(best, y)


def test_mog_expert_of_rank_0_is_a_two_layer_softmax_network():
    experts = script.MoGExperts([5, 5], 7).double()
    with torch.no_grad():
        experts.mu.normal_()
        experts.logit_pi.normal_()
        experts.log_tau2.copy_(torch.tensor([[-1.0], [0.5]]))
    z, s, g2 = torch.randn(30, 2, 5, dtype=double), 0.8, 0.3
    z_hat, _ = experts(z, s, g2)
    for k in range(2):
        tau2, M = experts.log_tau2[k, 0].exp(), experts.mu[k]
        v = s**2 * tau2 + g2
        W, b = s / v * M, experts.logit_pi[k] - s**2 * M.square().sum(1) / (2 * v)
        attention = (z[:, k] @ W.T + b).softmax(1) @ M
        expected = s * tau2 / v * z[:, k] + (1 - s**2 * tau2 / v) * attention
        assert torch.allclose(z_hat[:, k], expected, atol=1e-12)


def test_mog_expert_has_density_and_posterior_mean_of_its_full_covariances():
    experts = script.MoGExperts([4], 3, 2).double()
    with torch.no_grad():
        for w in (experts.mu, experts.logit_pi, experts.log_tau2, experts.log_lam, experts.V):
            w.normal_()
    script.qr_retraction(experts.V)
    z, s, g2 = torch.randn(20, 1, 4, dtype=double), 0.7, 0.2
    z_hat, log_p = experts(z, s, g2)
    log_q, means = [], []
    for l in range(3):
        V, lam = experts.V[0, l], experts.log_lam[0, l].exp()
        eye = torch.eye(4, dtype=double)
        Sigma = experts.log_tau2[0, l].exp() * eye + V @ torch.diag(lam) @ V.T
        C, mu = s**2 * Sigma + g2 * eye, experts.mu[0, l]
        prior = experts.logit_pi[0].log_softmax(0)[l]
        log_q.append(prior + torch.distributions.MultivariateNormal(s * mu, C).log_prob(z[:, 0]))
        means.append(mu + (s * Sigma @ torch.linalg.solve(C, (z[:, 0] - s * mu).T)).T)
    log_q = torch.stack(log_q, 1)
    assert torch.allclose(log_p[:, 0], log_q.logsumexp(1), atol=1e-10)
    expected = (log_q.softmax(1)[..., None] * torch.stack(means, 1)).sum(1)
    assert torch.allclose(z_hat[:, 0], expected, atol=1e-10)


def test_molrg_is_linear_and_its_wiener_filter():
    experts = script.MoGExperts([3], 1, 3, zero_mean=True).double()
    z = torch.randn(4000, 1, 3, dtype=double) @ torch.randn(3, 3, dtype=double) + 0.5
    script.fit_em(experts, z, torch.tensor([4000]))
    S = z[:, 0].T @ z[:, 0] / 4000  # not centred
    y = torch.randn(8, 1, 3, dtype=double)
    expected = y[:, 0] @ torch.linalg.inv(S + 0.25 * torch.eye(3)) @ S
    assert torch.allclose(experts(y, 1.0, 0.25)[0][:, 0], expected, atol=1e-4)
    assert experts.mu.abs().max() == 0 and "mu" not in dict(experts.named_parameters())


def test_levels_may_differ_in_a_batch():
    experts, sigma = script.MoGExperts([4, 4], 3, 1), torch.rand(6) + 0.1
    with torch.no_grad():
        experts.mu.normal_()
    A = torch.linalg.qr(torch.randn(2, 9, 4))[0]
    net = script.MoESubspaceDenoiser(A, experts, torch.ones(2) / 2, 0.1)
    mlp, x, z = script.MLPExperts([4, 4], 8), torch.randn(6, 9), torch.randn(6, 2, 4)
    s = torch.rand(6) + 0.5
    for i in range(6):
        one = net(x[i : i + 1], s[i].item(), sigma[i].item())[0]
        assert torch.allclose(net(x, s, sigma)[0][i], one[0], atol=1e-4)
        one = mlp(z[i : i + 1], s[i].item(), sigma[i].item() ** 2)[0]
        assert torch.allclose(mlp(z, s, sigma**2)[0][i], one[0], atol=1e-5)


def test_mlp_experts_are_separate_networks_that_are_right_at_both_ends():
    mlp, z = script.MLPExperts([4, 4, 4], 8), torch.randn(5, 3, 4)
    base = mlp(z, 1.0, 0.3)[0]
    other = z.clone()
    other[:, 1] += 1
    changed = (mlp(other, 1.0, 0.3)[0] - base).abs().amax((0, 2))
    assert changed[1] > 1e-3 and changed[0] == changed[2] == 0
    assert torch.allclose(mlp(z, 0.5, 1e-10)[0], z / 0.5, atol=1e-3)


def test_retraction_is_orthonormal_and_leaves_what_is():
    A = torch.randn(3, 10, 4, dtype=double)
    before = A.clone()
    script.qr_retraction(A)
    assert torch.allclose(A.mT @ A, torch.eye(4, dtype=double).expand(3, 4, 4), atol=1e-12)
    residual = before - A @ (A.mT @ before)
    assert residual.abs().max() < 1e-12  # the same span
    again = A.clone()
    script.qr_retraction(again)
    assert torch.allclose(again, A, atol=1e-12)  # and no sign is turned
    padded = F.pad(before[..., :2], (0, 2))
    script.qr_retraction(padded)
    assert padded[..., 2:].abs().max() == 0
    assert torch.allclose(padded[..., :2].mT @ padded[..., :2], torch.eye(2, dtype=double))


def test_tangent_gradient_is_that_of_rotations():
    """<G, dA> is kept for every turn dA = A skew, and nothing is left for a symmetric change."""
    A = torch.linalg.qr(torch.randn(2, 7, 3, dtype=double))[0].requires_grad_()
    G = torch.randn(2, 7, 3, dtype=double)
    A.grad = G.clone()
    script.tangent_gradient(A)
    K = torch.randn(3, 3, dtype=double)
    for sign, expected in ((-1, (G * (A @ (K - K.T))).sum()), (1, torch.zeros((), dtype=double))):
        assert torch.allclose((A.grad * (A @ (K + sign * K.T))).sum(), expected, atol=1e-10)
    off = G - A @ (A.mT @ G)  # off the span it is untouched
    assert torch.allclose(A.grad - A @ (A.mT @ A.grad), off, atol=1e-10)


def test_training_keeps_what_em_found():
    """A Gaussian expert at the maximum of the likelihood is the best linear filter: training it
    must not raise its error. (It did, 77 times over, before the gradient was made tangent.)"""
    scales = torch.tensor([2.0, 1.0, 0.5, 0.1, 0.03, 0.01])
    turn = torch.linalg.qr(torch.randn(2, 6, 6))[0]
    x0 = torch.einsum("nkd,ked->nke", scales * torch.randn(4000, 2, 6), turn)
    experts = script.MoGExperts([6, 6], 1, 6, zero_mean=True)
    script.fit_em(experts, x0, torch.tensor([4000, 4000]))

    def error(sigma):
        torch.manual_seed(1)
        z = x0 + sigma * torch.randn_like(x0)
        return (experts(z, 1.0, sigma**2)[0] - x0).square().mean().item()

    levels = (0.1, 1.0)
    before = [error(sigma) for sigma in levels]
    trained = {name: w for name, w in experts.named_parameters() if w.requires_grad}
    opt = torch.optim.Adam(trained.values(), 3e-3)
    for step in range(300):
        opt.param_groups[0]["lr"] = 3e-3 * (1 - step / 300)
        batch = x0[torch.randint(4000, (64,))]
        z, sigma = script.at_random_levels(batch)
        script.score_matching_loss(experts(z, 1.0, sigma**2)[0], batch, sigma).backward()
        script.tangent_gradient(experts.V)
        opt.step()
        opt.zero_grad()
        script.qr_retraction(experts.V)
    for sigma, first in zip(levels, before):
        assert first < sigma**2 and error(sigma) < 1.02 * first


def test_svd_is_not_centred():
    """A subspace that data far from 0 span: the mean is a direction of it, and is kept."""
    A = torch.linalg.qr(torch.randn(20, 3, dtype=double))[0]
    z = torch.randn(500, 3, dtype=double) * torch.tensor([0.3, 0.3, 0.0]) + torch.tensor(
        [0.0, 0.0, 5.0])
    found = script.uncentred_svd(z @ A.T, 3)
    assert torch.allclose(found @ found.T, A @ A.T, atol=1e-10)
    assert torch.allclose(found.T @ found, torch.eye(3, dtype=double), atol=1e-12)


def test_k_subspaces_recovers_the_subspaces():
    A = torch.linalg.qr(torch.randn(3, 30, 2))[0]
    y = torch.arange(900) % 3
    x = torch.einsum("nd,nDd->nD", torch.randn(900, 2), A[y]) + 0.02 * torch.randn(900, 30)
    found = script.k_subspaces(x, 3, 2)
    near = (x @ found).square().sum(-1).argmax(0)
    counts = torch.stack([near[y == k].bincount(minlength=3) for k in range(3)])
    assert sorted(counts.argmax(1).tolist()) == [0, 1, 2]
    assert counts.amax(1).sum() > 0.97 * 900
    for k, j in enumerate(counts.argmax(1)):
        assert (found[j] @ found[j].T - A[k] @ A[k].T).abs().max() < 0.05


def test_em_finds_modes_with_known_noise_taken_off():
    g = torch.Generator().manual_seed(0)
    mu, tau, eta = 3 * torch.randn(2, 3, 4, generator=g), 0.3, 0.2
    pick = torch.tensor([0, 0, 0, 1, 1, 2])[torch.randint(6, (6000, 2), generator=g)]
    z = mu[[0, 1], pick] + (tau**2 + eta**2) ** 0.5 * torch.randn(6000, 2, 4, generator=g)
    z[4000:, 1] = 50.0  # beyond the second expert's count: must not be looked at
    experts = script.MoGExperts([4, 4], 3)
    script.fit_em(experts, z, torch.tensor([6000, 4000]), eta)
    for k in range(2):
        distance = torch.cdist(mu[k], experts.mu[k])
        order = distance.argmin(1)
        assert sorted(order.tolist()) == [0, 1, 2] and distance.amin(1).max() < 0.06
        share = experts.logit_pi[k].softmax(0)[order]
        assert torch.allclose(share, torch.tensor([3, 2, 1]) / 6, atol=0.03)
        assert torch.allclose(experts.log_tau2[k].exp(), torch.tensor(tau**2), rtol=0.15)


def test_em_fits_low_rank_covariances():
    g = torch.Generator().manual_seed(0)
    V = torch.linalg.qr(torch.randn(5, 2, generator=g))[0]
    z = torch.randn(8000, 2, generator=g) * torch.tensor([2.0, 1.0]) @ V.T
    z = (z + 0.3 * torch.randn(8000, 5, generator=g) + 4.0)[:, None]
    experts = script.MoGExperts([5], 1, 2)
    script.fit_em(experts, z, torch.tensor([8000]))
    assert experts.log_tau2.exp().item() == pytest.approx(0.09, rel=0.03)
    lam = sorted(experts.log_lam.exp()[0, 0].tolist())
    assert lam == pytest.approx([1.0, 4.0], rel=0.06)
    found = experts.V[0, 0]
    assert (found @ found.T - V @ V.T).abs().max() < 0.02
    assert torch.allclose(experts.mu[0, 0], torch.full((5,), 4.0), atol=0.1)


def test_grouped_vae_equals_separate_ones():
    group = script.ExpertVAEs(10, 8, 4, 3)
    x = torch.randn(6, 10, 3, 8, 8)
    mean, log_var = group.encode(x)
    images = group.decode(mean)
    (images.square().mean((0, 2, 3, 4)).sum() + log_var.sum()).backward()
    for k in range(10):
        one = script.ExpertVAEs(1, 8, 4, 3)
        mine = {
            name: w.chunk(10)[k] for name, w in group.state_dict().items()
        }
        one.load_state_dict(mine)
        m, v = one.encode(x[:, k : k + 1])
        y = one.decode(m)
        assert torch.allclose(m, mean[:, k : k + 1], atol=1e-6)
        assert torch.allclose(y, images[:, k : k + 1], atol=1e-6)
        (y.square().mean() + v.sum()).backward()
        for name, w in group.named_parameters():
            assert torch.allclose(w.grad.chunk(10)[k], one.get_parameter(name).grad, atol=1e-5)


def test_unified_vae_serves_every_expert_alike():
    one, x = script.ExpertVAEs(1, 8, 4, 3), torch.randn(6, 10, 3, 8, 8)
    mean, _ = one.encode(x)
    assert mean.shape == (6, 10, 3) and one.decode(mean).shape == x.shape
    alone = one.encode(x[2:3, 7:8])[0]
    assert torch.allclose(mean[2, 7], alone[0, 0], atol=1e-6)
    assert torch.allclose(one.decode(mean)[2, 7], one.decode(alone)[0, 0], atol=1e-6)


def test_vae_loss_is_error_and_the_closed_form_of_kl():
    x = torch.randn(5, 2, 3, 4, 4)
    mean, log_var = torch.randn(5, 2, 6), torch.randn(5, 2, 6)
    q = torch.distributions.Normal(9 * mean, (log_var / 2).exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1)).sum(-1).mean()
    loss = script.vae_loss(lambda x: (x + 0.5, 9 * mean, log_var), x)
    assert loss.item() == pytest.approx(0.25 + script.KL * kl.item() / 48, rel=1e-5)
    net = script.ExpertVAEs(1, 4, 4, 3)
    torch.manual_seed(0)
    image, m, v = net(x[:, :1, :, :4, :4])
    torch.manual_seed(0)
    e = torch.randn_like(m)
    assert torch.allclose(image, net.decode(m + (v / 2).exp() * e), atol=1e-6)


def test_noise_and_loss_have_their_levels_and_weight():
    x0 = torch.randn(20_000, 2, 3)
    x, sigma = script.at_random_levels(x0)
    white = (x - x0) / sigma[:, None, None]
    assert white.mean().abs() < 0.01 and white.std().item() == pytest.approx(1, abs=0.01)
    assert sigma.min() >= script.SIGMA_MIN and sigma.max() <= script.SIGMA_MAX
    middle = math.log(script.SIGMA_MIN * script.SIGMA_MAX) / 2
    assert sigma.log().mean().item() == pytest.approx(middle, abs=0.05)
    zero, one = torch.zeros(20_000, 2, 3), torch.ones(20_000, 2, 3)
    exact = (1 + 1 / sigma.double() ** 2).mean().item()
    assert script.score_matching_loss(zero, one, sigma).item() == pytest.approx(exact, rel=1e-4)
    wiener = x / (1 + sigma.view(-1, 1, 1) ** 2)  # weight times posterior variance is 1 everywhere
    assert script.score_matching_loss(wiener, x0, sigma).item() == pytest.approx(1, rel=0.02)


def test_heun_draws_a_gaussian_along_its_exact_path():
    tau, noise = 0.7, torch.randn(200, 3, dtype=double)
    levels = torch.logspace(1, math.log10(0.02), 80, dtype=double).tolist()
    x = script.heun_ode(lambda x, s: tau**2 / (tau**2 + s**2) * x, noise, levels)
    path = ((tau**2 + levels[-1] ** 2) / (tau**2 + levels[0] ** 2)) ** 0.5 * levels[0] * noise
    expected = tau**2 / (tau**2 + levels[-1] ** 2) * path
    error = (x - expected).abs().max().item()
    assert error < 2e-3
    half = script.heun_ode(lambda x, s: tau**2 / (tau**2 + s**2) * x, noise, levels[::2])
    half_end = levels[::2][-1]
    path = ((tau**2 + half_end**2) / (tau**2 + levels[0] ** 2)) ** 0.5 * levels[0] * noise
    ratio = (half - tau**2 / (tau**2 + half_end**2) * path).abs().max().item() / error
    assert 3 < ratio < 5.5  # second order


@pytest.mark.parametrize("K, D, d, m, r", [(3, 64, 4, 4, 0), (2, 12, 3, 5, 2), (2, 9, 3, 5, 3)])
def test_parameters_follow_the_formula(K, D, d, m, r):
    """What no loss can move is not counted: weights of one mode, tau beside full rank, mean 0."""
    experts = script.MoGExperts([d] * K, m, r)
    net = script.MoESubspaceDenoiser(torch.zeros(K, D, d), experts, torch.ones(K) / K)
    count = script.count_parameters(net, None)
    tau = {0: K, d: 0}.get(r, K * m)
    expected = K * D * d + K * m * (d + 1) + tau + K + K * m * r * (d + 1)
    assert count == {"parameters": expected, "with_vaes": expected}
    gauss = script.MoGExperts([d] * K, 1, d, zero_mean=True)
    vae = script.ExpertVAEs(K, 8, 4, d)
    weights = sum(v.numel() for v in vae.parameters())
    expected = K * d * (d + 1)
    assert script.count_parameters(gauss, vae) == {
        "parameters": expected, "with_vaes": expected + weights}
    mlp = script.MLPExperts([d] * K, 6)
    expected += K * (d + 6 * (d + 2) + 6 * 7 + 7 * d)
    assert script.count_parameters(mlp, None)["parameters"] == expected


def test_images_are_sorted_by_expert_and_drawn_evenly(monkeypatch):
    labels = torch.tensor([0] * 7 + [1] * 3)
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 4, 4).clone()
    data = SimpleNamespace(images=images, labels=labels, classes=2, size=10)
    monkeypatch.setattr(script, "load_images", lambda *a: data)
    cfg = script.Config(image_size=4, latent_dim=2, rank=1, batch_size=2000)
    table, counts, mean, scale = script.load_experts(cfg, torch.device("cpu"))
    assert counts.tolist() == [7, 3] and table.shape == (7, 2, 3, 4, 4)
    assert table[:, 0, 0, 0, 0].tolist() == [*range(7)]
    assert table[:3, 1, 0, 0, 0].tolist() == [7, 8, 9]
    x = script.expert_batch(table, counts, cfg.batch_size)[:, :, 0, 0, 0]
    assert x.shape == (1000, 2)
    for k, members in enumerate((range(7), range(7, 10))):
        share = torch.bincount(x[:, k].long(), minlength=10)[[*members]] / 1000
        assert share.sum().item() == pytest.approx(1)
        assert (share - 1 / len(members)).abs().max() < 0.06
    pixels = (script.to_float(images).flatten(1) - mean) / scale
    assert pixels.mean().abs() < 1e-5
    assert pixels.square().sum(1).mean().item() == pytest.approx(2, rel=1e-4)  # latent_dim


def test_clusters_make_experts_without_labels(monkeypatch):
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(3, 48, 2, generator=g))[0]
    y = torch.arange(600) % 3
    x = torch.einsum("nd,nDd->nD", torch.randn(600, 2, generator=g), basis[y])
    images = (127.5 + 60 * x).round().clamp(0, 255).to(torch.uint8).view(600, 3, 4, 4)
    data = SimpleNamespace(images=images, labels=torch.zeros(600).long(), classes=1, size=600)
    monkeypatch.setattr(script, "load_images", lambda *a: data)
    cfg = script.Config(image_size=4, latent_dim=2, rank=1, clusters=3)
    table, counts, _, _ = script.load_experts(cfg, torch.device("cpu"))
    truth = {tuple(image.flatten().tolist()): k.item() for image, k in zip(images, y)}
    for k, n in enumerate(counts):
        owners = torch.tensor([truth[tuple(i.flatten().tolist())] for i in table[:n, k]])
        assert owners.bincount().max() > 0.9 * n > 100


@pytest.mark.parametrize("extra", ["--vae-steps 2", "--unified --expert gauss", "--expert mlp",
                                   "--projection linear --learn-subspaces --sampler gated"])
def test_run_resumes_bit_for_bit(extra, same_when_interrupted, small_data):
    flags = SMALL + extra.split()
    same_when_interrupted(script, flags, ["model", "ema"])
    linear = "linear" in extra
    assert Path("whole/vae/last.pt").exists() != linear
    assert Image.open("whole/samples_0000004.png").size == (8 * 66, 10 * 66)
    line = json.loads(Path("whole/metrics.jsonl").read_text().splitlines()[-1])
    assert math.isfinite(line["loss"]) and line["step"] == 4
    assert (line["with_vaes"] > line["parameters"]) != linear
    if linear:
        for part in ("model", "ema"):
            A = load_checkpoint("whole/last.pt")[part]["A"]
            assert torch.allclose(A.mT @ A, torch.eye(4).expand(10, 4, 4), atol=1e-5)
    else:
        (grid,) = list(Path("whole/vae").glob("samples_*.png"))[-1:]
        assert Image.open(grid).size == (8 * 66, 10 * 66)


def test_first_stage_also_resumes(small_data, same_when_interrupted):
    flags = SMALL + ["--vae-steps", "6"]
    same_when_interrupted(script, flags, ["ema"], stops=[("vae", 3)])


def test_runs_share_the_first_stage_and_start_from_em(small_data, monkeypatch):
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *a: None)  # what the start is like
    script.main(SMALL + ["--out", "mog"])
    seen = load_checkpoint("mog/vae/last.pt")["ema"]
    flags = ["--expert", "gauss", "--rank", "1", "--steps", "2", "--vae-dir", "mog/vae"]
    script.main(SMALL + flags + ["--out", "gauss"])
    script.main(SMALL + flags + ["--out", "gauss", "--fresh"])
    assert not Path("gauss/vae").exists()
    saved = load_checkpoint("gauss/last.pt")
    assert all(torch.equal(w, saved["vae"][name]) for name, w in seen.items())
    vae = script.ExpertVAEs(10, 8, 4, 4)
    vae.load_state_dict(seen)
    images = few_shapes(script.Config(image_size=8), None)
    x = script.to_float(images.images).unflatten(0, (-1, 10))  # label i % 10
    with torch.no_grad():
        z = vae.encode(x)[0]
    scale = z.square().mean((0, 2)).sqrt()
    assert torch.allclose(saved["frame"]["scale"][:, 0], scale, rtol=1e-4)
    z = z / scale[:, None]
    lam, V = saved["model"]["log_lam"][:, 0].exp(), saved["model"]["V"][:, 0]
    S = torch.einsum("nkd,nke->kde", z, z) / len(z)
    assert torch.allclose(V @ torch.diag_embed(lam) @ V.mT, S, atol=1e-3)


def test_linear_start_is_the_svd_with_its_residual(monkeypatch):
    """Of each image once: class 1 is filled up with repeats."""
    monkeypatch.setattr(script, "load_images", unequal_shapes)
    monkeypatch.setattr(script, "LEVELS", 4)
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *a: None)
    script.main(SMALL + ["--projection", "linear", "--out", "run"])
    saved, data = load_checkpoint("run/last.pt"), unequal_shapes(script.Config(image_size=8), None)
    x = script.to_float(data.images).flatten(1)
    x = (x - saved["frame"]["mean"]) / saved["frame"]["scale"]
    rest = 0.0
    for k in range(10):
        own = x[data.labels == k].double()
        A = torch.linalg.svd(own, full_matrices=False)[2][:4].T
        mine = saved["model"]["A"][k].double()
        assert torch.allclose(mine @ mine.T, A @ A.T, atol=1e-3)
        rest += (own - own @ A @ A.T).square().sum().item()
    assert saved["model"]["eta2"].item() == pytest.approx(rest / (940 * (192 - 4)), rel=1e-3)
    share = saved["model"]["logit_w"].softmax(0)
    assert share[1].item() == pytest.approx(40 / 940, rel=1e-4)
    assert torch.allclose(share, saved["frame"]["share"], atol=1e-6)


def test_scale_of_latents_counts_no_repeat():
    vae, cfg = script.ExpertVAEs(2, 8, 4, 3), script.Config(image_size=8, precision="fp32")
    images, counts = torch.randint(256, (5, 2, 3, 8, 8), dtype=torch.uint8), torch.tensor([5, 2])
    images[2:, 1] = 255  # not data
    x0, frame = script.encode_experts(cfg, vae, images, counts, None, None, torch.device("cpu"))
    for k, n in enumerate(counts):
        assert x0[:n, k].square().mean().item() == pytest.approx(1, rel=1e-5)
        code = vae.encode(script.to_float(images))[0][:n, k]
        assert torch.allclose(x0[:n, k] * frame["scale"][k], code, atol=1e-6)
    assert torch.allclose(frame["share"], torch.tensor([5 / 7, 2 / 7]))


def test_bases_move_only_if_they_are_to_be_learned(small_data):
    x = script.to_float(few_shapes(script.Config(image_size=8), None).images).flatten(1)
    for flag, moves in (("--learn-subspaces", True), ("--no-learn-subspaces", False)):
        out = f"run{flag}"
        script.main(SMALL + ["--projection", "linear", flag, "--lr", "0.01", "--out", out])
        saved = load_checkpoint(f"{out}/last.pt")
        own = ((x - saved["frame"]["mean"]) / saved["frame"]["scale"]).unflatten(0, (-1, 10))
        for k in range(10):
            A, mine = script.uncentred_svd(own[:, k], 4), saved["model"]["A"][k]
            turned = 4 - (A.T @ mine).square().sum().item()  # sum of squared sines
            assert (turned > 1e-4) == moves, (k, turned)


def test_rates_fall_as_a_cosine_in_both_stages(small_data):
    script.main(SMALL + ["--lr", "0.01", "--vae-steps", "4", "--out", "run"])
    for out, lr in (("run", 0.01), ("run/vae", script.VAE_LR)):
        expected = [lr * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
        assert [line["lr"] for line in logged(out)] == pytest.approx(expected)


def test_first_loss_of_linear_experts_is_that_of_their_own_labels(small_data, monkeypatch):
    """The label gate's loss at step 0, anew: full covariances, an image at a time."""
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *a: None)
    flags = ["--projection", "linear", "--gate", "label", "--steps", "1", "--out", "run"]
    script.main(SMALL + flags)
    saved, data = load_checkpoint("run/last.pt"), few_shapes(script.Config(image_size=8), None)
    x = script.to_float(data.images).flatten(1)
    x = ((x - saved["frame"]["mean"]) / saved["frame"]["scale"]).unflatten(0, (-1, 10))
    torch.manual_seed(mix(0, 0, 0))
    x0, k = script.batch_by_share(x, torch.full((10,), 100), 40)
    noisy, sigma = script.at_random_levels(x0)
    model = {name: v.double() for name, v in saved["model"].items()}
    eta2, loss = model["eta2"], 0.0
    for clean, y, j, level in zip(x0.double(), noisy.double(), k, sigma.double()):
        A, log_q, means = model["A"][j], [], []
        for l in range(2):
            V = model["experts.V"][j, l]
            S = model["experts.log_tau2"][j, l].exp() * torch.eye(4, dtype=double)
            S = S + V @ torch.diag(model["experts.log_lam"][j, l].exp()) @ V.T
            C, mu = S + (level**2 + eta2) * torch.eye(4), model["experts.mu"][j, l]
            normal = torch.distributions.MultivariateNormal(mu, C)
            log_q.append(model["experts.logit_pi"][j].log_softmax(0)[l] + normal.log_prob(A.T @ y))
            means.append(mu + S @ torch.linalg.solve(C, A.T @ y - mu))
        c = A @ (torch.stack(log_q).softmax(0) @ torch.stack(means))
        x0_hat = c + eta2 / (level**2 + eta2) * (y - c)
        loss += (1 + 1 / level**2) * (x0_hat - clean).square().mean() / 40
    assert logged("run")[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_batches_by_share_keep_rows_and_experts_together():
    counts = torch.tensor([80, 20])
    x = torch.stack([torch.arange(80), 1000 + torch.arange(80)], 1)
    rows, k = script.batch_by_share(x, counts, 20_000)
    assert torch.equal(rows // 1000, k) and (rows[k == 1] - 1000).max() == 19
    assert k.float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert (rows[k == 0].bincount(minlength=80) / 16_000 - 1 / 80).abs().max() < 0.005


def test_trained_gate_keeps_unequal_shares(monkeypatch):
    """Two lines, four fifths of the images on one: batches with as many of both would pull the
    prior to one half."""
    g = torch.Generator().manual_seed(0)
    A = torch.linalg.qr(torch.randn(48, 2, generator=g))[0].T
    labels = (torch.arange(1000) % 5 == 0).long()
    z = 0.4 * torch.randn(1000, 1, generator=g)
    images = 127.5 * (1 + z * A[labels]) + torch.randn(1000, 48, generator=g)
    data = SimpleNamespace(images=images.round().clamp(0, 255).to(torch.uint8).view(-1, 3, 4, 4),
                           labels=labels, classes=2, size=1000)
    monkeypatch.setattr(script, "load_images", lambda *a: data)
    flags = ["--image-size", "4", "--latent-dim", "1", "--rank", "0", "--projection", "linear"]
    flags += ["--steps", "300", "--save-every", "300", "--sample-every", "300", "--lr", "0.01"]
    script.main(SMALL + flags + ["--out", "run"])
    share = load_checkpoint("run/last.pt")["ema"]["logit_w"].softmax(0)
    assert share[1].item() == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize("sampler", ["expert", "gated"])
def test_linear_samples_are_scaled_and_moved_into_the_frame(sampler):
    """Modes of almost no width, label gate: images must be mean + scale A mu of their expert."""
    A = torch.linalg.qr(torch.randn(2, 48, 1))[0]
    experts = script.MoGExperts([1, 1], 1)
    with torch.no_grad():
        experts.mu.copy_(torch.tensor([[[2.0]], [[-3.0]]]))
        experts.log_tau2.fill_(-20)
    model = script.MoESubspaceDenoiser(A, experts, torch.tensor([0.5, 0.5]), gate="label")
    cfg = script.Config(image_size=4, latent_dim=1, rank=0, projection="linear", gate="label",
                        sampler=sampler)
    mean = torch.randn(48)
    frame = {"share": torch.ones(2) / 2, "mean": mean, "scale": torch.tensor(0.25)}
    y = torch.tensor([0, 1, 1, 0])
    images, k = script.draw(model, None, frame, cfg, y, torch.Generator().manual_seed(0))
    expected = mean + 0.25 * A[y, :, 0] * torch.tensor([2.0, -3.0])[y, None]
    assert torch.equal(k, y) and images.shape == (4, 3, 4, 4)
    assert (images.flatten(1) - expected).abs().max() < 0.01


def test_samples_of_clusters_follow_their_shares(small_data):
    script.main(SMALL + ["--clusters", "2", "--vae-steps", "2", "--steps", "2", "--out", "run"])
    saved = torch.load("run/last.pt", weights_only=True)
    saved["frame"]["share"] = torch.tensor([0.9, 0.1])
    torch.save(saved, "run/unequal.pt")
    script.main(["--sample", "run/unequal.pt", "--n", "600", "--npz", "--out", "s"])
    with np.load("s/sample.npz") as file:
        assert file["arr_1"].mean() == pytest.approx(0.1, abs=0.04)


def test_sample_uses_ema_and_vae_of_the_file(small_data, refuses):
    script.main(SMALL + ["--out", "run"])
    stage = "run/vae/last.pt"
    refuses(lambda: script.main(["--sample", stage]), stage)  # of the first stage
    saved = load_checkpoint("run/last.pt")
    cfg = script.Config(**saved["config"])
    model, vae = script.build(cfg, 10)
    model.load_state_dict(saved["ema"])
    vae.load_state_dict(saved["vae"])
    script.main(["--sample", "run/last.pt", "--n", "20", "--npz", "--out", "s"])
    g = next(script.shares(20, 250, 0))[1]
    levels = torch.logspace(1, math.log10(0.02), script.LEVELS).tolist()
    noise = torch.randn(2, 10, 4, generator=g)
    z = script.heun_ode(lambda z, sigma: model(z, 1.0, sigma**2)[0], noise, levels)
    with torch.no_grad():
        expected = script.to_uint8(vae.decode(z * saved["frame"]["scale"])).flatten(0, 1)
    with np.load("s/sample.npz") as file:
        assert file["arr_1"].tolist() == [*range(10)] * 2
        got = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2).int()
    assert (got - expected.int()).abs().max() <= 1
    assert Image.open("s/sample.png").size == (2 * 66, 10 * 66)


def test_gated_samples_of_a_union_of_lines_lie_on_it():
    """The ambient ODE on exact linear experts: every sample ends in one subspace, of its gate."""
    g = torch.Generator().manual_seed(0)
    A = torch.linalg.qr(torch.randn(2, 48, 1, generator=g))[0]
    experts = script.MoGExperts([1, 1], 2)
    with torch.no_grad():
        experts.mu.copy_(torch.tensor([[[-3.0], [3.0]], [[-2.0], [4.0]]]))
        experts.log_tau2.fill_(math.log(0.01))
    model = script.MoESubspaceDenoiser(A, experts, torch.tensor([0.3, 0.7]))
    cfg = script.Config(image_size=4, latent_dim=1, rank=0, projection="linear", sampler="gated")
    frame = {"share": torch.ones(2) / 2, "mean": torch.zeros(48), "scale": torch.tensor(1.0)}
    start = torch.zeros(400, dtype=torch.int64)
    images, k = script.draw(model, None, frame, cfg, start, g)
    x = images.flatten(1)
    z = torch.einsum("nD,nDd->nd", x, A[k])
    off = (x - torch.einsum("nd,nDd->nD", z, A[k])).norm(dim=1)
    near = (z - experts.mu[k, :, 0]).abs().amin(1)
    assert ((off < 0.02) & (near < 0.5)).float().mean() > 0.98
    assert k.float().mean().item() == pytest.approx(0.7, abs=0.08)


def test_continued_run_may_not_change_its_steps(refuses, small_data):
    script.main(SMALL + ["--out", "run"])
    refuses(lambda: script.main(SMALL + ["--out", "run", "--steps", "8"]), "steps 4 (now 8)")
    flags = ["--out", "other", "--vae-dir", "run/vae", "--vae-channels", "8"]
    refuses(lambda: script.main(SMALL + flags), "vae_channels 4 (now 8)")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--expert", "unet"], ["unet", "mog"]),
        (["--modes", "0"], ["modes", "at least 1"]),
        (["--rank", "5"], ["rank <= latent_dim"]),
        (["--latent-dim", "192"], ["latent_dim < 192"]),
        (["--image-size", "10"], ["divisible by 4"]),
        (["--sampler", "gated"], ["projection linear"]),
        (["--learn-subspaces"], ["projection linear"]),
        (["--projection", "linear", "--unified"], ["unified", "projection vae"]),
        (["--projection", "linear", "--expert", "mlp"], ["gate label"]),
        (["--ema-decay", "1"], ["ema_decay < 1"]),
        (["--lr", "-1"], ["lr", "not negative"]),
        (["--batch-size", "5"], ["10 experts", "below 10"]),
    ],
)
def test_bad_input_is_one_line(flags, words, refuses, small_data):
    refuses(lambda: script.main(SMALL + flags), *words)
    assert not Path("runs").exists()


def test_streamed_data_are_refused(refuses, monkeypatch):
    streamed = SimpleNamespace(images=None)
    monkeypatch.setattr(script, "load_images", lambda *a: streamed)
    refuses(lambda: script.main(SMALL), "streamed")


@pytest.mark.slow
@pytest.mark.parametrize("extra", [["--expert", "mlp"], ["--projection", "linear"]])
def test_two_ranks_train_and_sample_as_one(extra):
    def run(*flags, ranks):
        head = [sys.executable]
        if ranks > 1:
            head += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
                     "--"]
        return subprocess.run(head + [str(ROOT / "moe_subspace.py"), *flags], capture_output=True,
                              text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)

    done = run(*SMALL, *extra, "--out", "two", ranks=2)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in logged("two")] == [1, 2, 3, 4]  # written once
    for ranks in (1, 2):
        done = run("--sample", "two/last.pt", "--n", "600", "--npz", "--device", "cpu", "--out",
                   f"s{ranks}", ranks=ranks)
        assert done.returncode == 0, done.stderr
    one, two = (np.load(f"s{ranks}/sample.npz")["arr_0"] for ranks in (1, 2))
    assert len(one) == 600 and (one == two).all()
    done = run(*SMALL, *extra, "--out", "odd", "--batch-size", "41", ranks=2)
    assert done.returncode != 0 and "divisible by the 2 ranks" in done.stderr


def test_vaes_train_in_bf16(small_data):
    flags = [f for f in SMALL if f not in ("fp32", "--precision")]
    script.main(flags + ["--precision", "bf16", "--out", "run"])
    for out in ("run", "run/vae"):
        assert all(math.isfinite(line["loss"]) for line in logged(out))
    for part in ("model", "vae"):
        assert {v.dtype for v in load_checkpoint("run/last.pt")[part].values()} == {torch.float32}


@pytest.mark.slow
def test_vaes_train_compiled(small_data):
    flags = [f for f in SMALL if f not in ("off", "--compile")]
    script.main(flags + ["--compile", "on", "--out", "fast"])
    script.main(SMALL + ["--out", "plain"])
    for one, two in zip(logged("fast/vae"), logged("plain/vae")):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)


@pytest.mark.gpu
def test_compiled_bf16_on_cuda():
    off = ("cpu", "fp32", "off", "--device", "--precision", "--compile")
    for extra in ([], ["--projection", "linear", "--sampler", "gated"]):
        out = f"run{len(extra)}"
        script.main([f for f in SMALL if f not in off] + extra + ["--out", out])
        assert math.isfinite(logged(out)[-1]["loss"])
