"""balanced_representation.py against closed forms, brute force and exact averages, in float64."""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import balanced_representation as script
from common import load_checkpoint, shapes
from tests.claims import balanced_representation as claim

SMALL = ["--device", "cpu", "--data", "fields", "--image-size", "8", "--samples", "60"]
SMALL += ["--batch-size", "20", "--steps", "6", "--few-steps", "3", "--log-every", "1"]
SMALL += ["--sample-every", "6", "--width", "12", "--sampling-steps", "5"]


@pytest.fixture
def no_pictures(monkeypatch):
    """A picture takes half a second."""
    monkeypatch.setattr(script, "draw", lambda networks, path: None)


def orthogonal(d, k=None):
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0][:, :k]


def design(x):
    """Each sample 2 d times and noise +-sqrt(d) e_j: mean 0 and covariance 1 exactly, so that a
    mean of quadratic functions of it is the expectation."""
    n, d = x.shape
    e = d**0.5 * torch.cat([torch.eye(d), -torch.eye(d)]).to(x)
    return x.repeat_interleave(2 * d, 0), e.repeat(n, 1)


def loss_and_gradient(monkeypatch, W, x, sigma, lam):
    """paper_loss of a ReLUDAE with these weights, its expectation over noise; gradient (d, p)."""
    net = script.ReLUDAE(*W.shape).double()
    net.W.data = W.clone()
    rows, e = design(x)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda u: e)
        loss = script.paper_loss(net, net.W, rows, sigma, lam)
    loss.backward()
    return loss.item(), net.W.grad


def separated_samples(n=4, d=6):
    """Samples at negative cosines and of different norms, 5 to 8."""
    turn = orthogonal(d)
    return torch.linspace(5, 8, n).double()[:, None] * (
        F.normalize(torch.eye(n, d) - F.pad(torch.full((n, n), 1.1 / n), (0, d - n))).double()
        @ turn.T
    )


def test_memorising_weights_are_stationary_and_the_misprints_are_not(monkeypatch):
    x, sigma, lam = separated_samples(), 0.2, 0.8
    unit = F.normalize(x)
    assert (unit @ unit.T - 2 * torch.eye(4)).max() < 0  # so only unit i is active on sample i
    W = script.mem_weights(x, sigma, lam)
    _, gradient = loss_and_gradient(monkeypatch, W, x, sigma, lam)
    scale = 4 * lam * W.norm()
    assert gradient.norm() < 1e-10 * scale
    square, four = x.square().sum(1), x.pow(4).sum(1)
    quartic = ((square - 4 * lam) / (four + sigma**2 * square)).sqrt()  # an L4 norm
    for r in (quartic, ((square - 2 * lam) / (square**2 + sigma**2 * square)).sqrt()):
        _, gradient = loss_and_gradient(monkeypatch, (r[:, None] * x).T, x, sigma, lam)
        assert gradient.norm() > 1e-2 * scale
    split = torch.cat([0.6 * W[:, :1], 0.8 * W[:, :1], W[:, 1:]], 1)  # not unique
    _, gradient = loss_and_gradient(monkeypatch, split, x, sigma, lam)
    assert gradient.norm() < 1e-10 * scale


def test_memorising_loss_and_norms_have_their_closed_forms(monkeypatch):
    x, sigma = separated_samples(), 0.3
    loss, _ = loss_and_gradient(monkeypatch, script.mem_weights(x, sigma, 0.0), x, sigma, 0.0)
    square = x.square().sum(1)
    assert loss == pytest.approx((sigma**2 * square / (sigma**2 + square)).mean().item(), rel=1e-9)
    erased = script.mem_weights(x, sigma, square[1].item() / 4)  # n lam = |x_1|^2
    assert erased[:, 1].norm() == 0 and (erased.norm(dim=0) > 0).tolist() == [False, False, 1, 1]


def test_blocks_of_one_sample_are_the_memorising_weights():
    x = separated_samples()
    clusters = [(*script.spectrum(row[None], 3), 1 / 4) for row in x]
    theory = script.theory_weights(clusters, 0.2, 0.8)
    assert torch.allclose(theory, script.mem_weights(x, 0.2, 0.8), atol=1e-12)
    copies = [(*script.spectrum(x[:1].repeat(7, 1), 1), 0.7)]  # Cor. 3.4: a share of 0.7
    square = x[0].square().sum()
    norm = ((square - 0.8 / 0.7) / (square + 0.04)).sqrt()
    assert script.theory_weights(copies, 0.2, 0.8).norm().item() == pytest.approx(norm.item())


def test_block_minimises_the_expected_loss_of_a_linear_autoencoder():
    torch.manual_seed(3)
    S = orthogonal(7) @ torch.diag(torch.tensor([9, 4, 2, 1, 0.5, 0.2, 0.1]).double())
    S = S @ S.T / 4
    s, U = (u.flip(-1) for u in torch.linalg.eigh(S))
    sigma, lam, rho = 0.5, 0.15, 0.4
    W = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    opt = torch.optim.LBFGS([W], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-16,
                            line_search_fn="strong_wolfe")

    def loss():  # E |W W^T (x + sigma e) - x|^2 on a share rho of the samples
        opt.zero_grad()
        P = W @ W.T
        bias = torch.eye(7) - P
        value = rho * ((bias @ S @ bias).trace() + sigma**2 * P.square().sum())
        value = value + 2 * lam * W.square().sum()
        value.backward()
        return value

    opt.step(loss)
    theory = script.theory_weights([(U[:, :5], s[:5], rho)], sigma, lam)
    assert torch.allclose(W @ W.T, theory @ theory.T, atol=1e-6)
    alive = (s[:5] > lam / rho).sum()
    assert alive == 3 and torch.linalg.matrix_rank(theory, atol=1e-9) == alive  # pruned


def test_block_with_positive_codes_is_stationary_in_the_network(monkeypatch):
    torch.manual_seed(1)
    x = 0.3 * torch.randn(40, 5, dtype=torch.float64)
    x[:, 0] += 4
    clusters = [(*script.spectrum(x, 3), 1.0)]
    W, sigma = script.theory_weights(clusters, 0.02, 0.01), 0.02
    rows, e = design(x)
    assert script.encode(W, rows + sigma * e).min() > 0
    _, gradient = loss_and_gradient(monkeypatch, W, x, sigma, 0.01)
    assert gradient.norm() < 1e-9
    U, s, _ = clusters[0]
    printed = U * ((s - 0.01) / (s + sigma)).sqrt()  # sigma I, as printed
    _, gradient = loss_and_gradient(monkeypatch, printed @ script.spread(3, U).T, x, sigma, 0.01)
    assert gradient.norm() > 1e-3


def test_signed_pairs_are_stationary_on_symmetric_samples(monkeypatch):
    torch.manual_seed(2)
    x = torch.randn(30, 5, dtype=torch.float64) * torch.tensor([3, 2, 1, 0.5, 0.3])
    x = torch.cat([x, -x])
    W = script.signed_weights(*script.spectrum(x, 3), 0.3, 0.05)
    _, gradient = loss_and_gradient(monkeypatch, W, x, 0.3, 0.05)
    assert gradient.norm() < 1e-9 and W.shape == (5, 6)
    U, s = script.spectrum(x, 3)
    wrong = U * ((s - 0.05) / (s + 0.09)).sqrt()  # one column's decay for two
    _, gradient = loss_and_gradient(monkeypatch, torch.cat([wrong, -wrong], 1), x, 0.3, 0.05)
    assert gradient.norm() > 1e-2


def test_wiener_risk_of_signed_pairs():
    torch.manual_seed(0)
    s = torch.tensor([4, 1, 0.25]).double()
    U, sigma = orthogonal(3), 0.4
    W = script.signed_weights(U, s, sigma, 0.0)
    x = torch.randn(200_000, 3, dtype=torch.float64) * s.sqrt() @ U.T
    y = x + sigma * torch.randn_like(x)
    risk = (script.denoise(W, y) - x).square().sum(1).mean().item()
    assert risk == pytest.approx((s * sigma**2 / (s + sigma**2)).sum().item(), rel=0.01)


def test_paper_loss_counts_both_layers():
    x = torch.randn(50, 6).double()
    net = script.ReLUDAE(6, 4).double()
    e = script.paper_loss(net, net.W, x, 0.0, 0.0)
    both = script.paper_loss(net, net.W, x, 0.0, 0.3)
    assert (both - e).item() == pytest.approx(0.6 * net.W.square().sum().item())
    assert e.item() == pytest.approx((script.denoise(net.W, x) - x).square().sum().item() / 50)
    assert script.code_loss(net, x, 0.0).item() == pytest.approx(e.item() / 6)


def test_effective_lambda_makes_the_notebook_s_gradient_the_paper_s_over_d(monkeypatch):
    d, decay, sigma = 6, 0.02, 0.3
    x, e = torch.randn(50, d).double(), torch.randn(50, d).double()
    net = script.ReLUDAE(d, 4).double()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda u: e)
        lam = script.effective_lambda(d, decay)
        script.paper_loss(net, net.W, x, sigma, lam).backward()
    first, second = (net.W.detach().clone().requires_grad_() for _ in range(2))  # two layers
    x_hat = ((x + sigma * e) @ first).relu() @ second.T
    F.mse_loss(x_hat, x).backward()
    notebook = first.grad + decay * first + second.grad + decay * second
    assert torch.allclose(notebook * d, net.W.grad, rtol=1e-9, atol=1e-12)
    assert script.effective_lambda(1024, 0.01) == pytest.approx(5.12)


def test_network_shares_one_parameter_and_has_no_bias():
    net = script.ReLUDAE(6, 4)
    assert [tuple(w.shape) for w in net.parameters()] == [(6, 4)]
    assert torch.equal(net(torch.zeros(2, 6)), torch.zeros(2, 6))
    y = torch.randn(9, 6)
    assert torch.allclose(net(3 * y), 3 * net(y), atol=1e-5)  # homogeneous
    h = (y @ net.W).clamp(min=0)
    assert torch.allclose(net(y), torch.einsum("np,dp->nd", h, net.W), atol=1e-6)


@pytest.mark.parametrize("n, k", [(40, 3), (4, 3), (2, 3), (40, 9)])
def test_spectrum_is_that_of_the_second_moment(n, k):
    x = torch.randn(n, 6, dtype=torch.float64) + 0.5
    U, s = script.spectrum(x, k)
    k = min(k, n, 6)
    values = np.linalg.eigvalsh((x.T @ x / n).numpy())[::-1][:k]
    assert np.allclose(s.numpy(), values, atol=1e-10) and U.shape == (6, k)
    assert torch.allclose(U.T @ U, torch.eye(k).double(), atol=1e-9)
    assert torch.allclose(x.T @ x / n @ U, U * s, atol=1e-9)
    assert x.mean(0) @ U[:, 0] > 0
    assert torch.allclose(script.spectrum(-x, k)[0][:, 0], -U[:, 0], atol=1e-8)


@pytest.mark.parametrize("k", [1, 2, 7])
def test_spread_is_orthogonal_with_a_constant_column(k):
    O = script.spread(k, torch.zeros(1).double())
    assert torch.allclose(O @ O.T, torch.eye(k).double(), atol=1e-12)
    assert torch.allclose(O[:, 0], torch.full((k,), k**-0.5).double(), atol=1e-12)


def test_codes_of_a_cluster_are_positive_on_its_block_and_zero_elsewhere():
    x, labels = script.simplex_mog(4000, 64, seed=0)
    clusters = [(*script.spectrum(x[labels == k], 6), 1 / 4) for k in range(4)]
    h = script.encode(script.theory_weights(clusters, 0.2, 0.01), x).unflatten(1, (4, 6))
    own = h[torch.arange(4000), labels]  # (n, 6)
    assert (own > 0).float().mean() > 0.97
    others = h.square().sum((1, 2)) - own.square().sum(1)
    assert others.max() < 1e-6 * own.square().sum(1).mean()


def test_spikiness_knows_one_unit_and_many_and_its_identity():
    one, flat = torch.eye(10)[:1] * 3, torch.zeros(1, 10)
    flat[0, :4] = 2
    a, b = script.spikiness(one), script.spikiness(flat)
    assert a["pr"].item() == pytest.approx(-1) and b["pr"].item() == pytest.approx(-4)
    assert a["l4"].item() == pytest.approx(1) and b["l4"].item() == pytest.approx(4**-0.25)
    h = torch.randn(50, 10, dtype=torch.float64).relu() + 0.01
    m = script.spikiness(h)
    assert np.allclose(m["std"].numpy(), h.numpy().std(1), atol=1e-12)
    energy = h.square().sum(1) / 10
    assert torch.allclose(m["std"] ** 2, energy * (1 + m["pr"] / 10), atol=1e-12)
    double = script.spikiness(2 * h)  # energy moves std alone
    assert torch.allclose(double["std"], 2 * m["std"]) and torch.allclose(double["pr"], m["pr"])
    assert torch.allclose(double["l4"], m["l4"])
    quartic = (h**4).sum(1) / (h**2).sum(1) ** 2
    assert torch.allclose(m["l4"] ** 4, quartic)
    assert all(v.isfinite().all() for v in script.spikiness(torch.zeros(2, 5)).values())


def test_auroc_counts_pairs_and_half_of_ties():
    torch.manual_seed(0)
    a, b = torch.randint(0, 12, (37,)).float(), torch.randint(0, 9, (53,)).float()
    wins = (a[:, None] > b).double() + 0.5 * (a[:, None] == b).double()
    assert script.auroc(a, b) == pytest.approx(wins.mean().item(), abs=1e-12)
    assert script.auroc(b, a) == pytest.approx(1 - wins.mean().item(), abs=1e-12)
    assert script.auroc(b + 20, a) == 1 and script.auroc(a, a) == 0.5


def test_optimum_without_constraints_of_two_points_is_a_tanh():
    m = torch.randn(1, 5, dtype=torch.float64)
    y = torch.randn(20, 5, dtype=torch.float64)
    expected = m * torch.tanh(y @ m.T / 0.7**2)
    assert torch.allclose(script.f_emp(y, torch.cat([m, -m]), 0.7), expected, atol=1e-12)


def test_sampling_is_a_product_of_factors_and_nears_the_exact_flow():
    s = torch.tensor([4, 1, 0.25]).double()
    U, noise = orthogonal(5, 3), torch.randn(7, 5, dtype=torch.float64)

    def weights(sigma):
        return script.signed_weights(U, s, sigma, 0.0)

    def factors(levels):  # along each eigenvector; the rest of space ends at 0
        product = torch.full((3,), levels[0]).double()
        for a, b in zip(levels, [*levels[1:], 0.0]):
            q = s / (s + a**2)
            product = product * (q + b / a * (1 - q))
        return product

    levels = script.noise_levels(6, 3.0, 0.1)
    assert len(levels) == 6 and levels[0] == pytest.approx(3) and levels[-1] == pytest.approx(0.1)
    got = script.sample_ddim(weights, noise, levels)
    assert torch.allclose(got, noise @ (U * factors(levels)) @ U.T, atol=1e-10)
    fine = script.noise_levels(4000, 10.0, 1e-3)
    exact = 10 * (s / (s + 100)).sqrt()  # d log x / d log sigma = sigma^2 / (s + sigma^2)
    assert torch.allclose(factors(fine), exact, rtol=5e-3)


def test_steering_adds_a_times_the_mean_code():
    W, y = torch.randn(5, 8), torch.randn(3, 5)
    v = torch.rand(8)
    base = script.denoise(W, y)
    for a in (0.3, 0.6):
        assert torch.allclose(script.denoise(W, y, a * v) - base, a * (W @ v).expand(3, 5),
                              atol=1e-5)
    concept, noise = torch.randn(20, 5), torch.randn(3, 5)

    def run(a):
        g = torch.Generator().manual_seed(4)
        return script.sample_ddim(lambda sigma: W / sigma, noise, [2.0], concept, a, g)

    e = torch.randn(20, 5, generator=torch.Generator().manual_seed(4))
    v = ((concept + 2 * e) @ (W / 2)).clamp(min=0).mean(0)
    assert torch.allclose(run(0.5) - run(0.0), 0.5 * (W / 2 @ v).expand(3, 5), atol=1e-5)


def test_simplex_has_its_cosines_and_clusters_their_covariance():
    means = script.simplex_means(4, 30, norm=6.0)
    cosines = F.normalize(means) @ F.normalize(means).T
    assert torch.allclose(cosines, torch.full((4, 4), -1 / 3) + 4 / 3 * torch.eye(4), atol=1e-6)
    assert torch.allclose(means.norm(dim=1), torch.full((4,), 6.0)) and means.shape == (4, 30)
    x, labels = script.simplex_mog(40_000, 30, seed=0)
    assert labels[:6].tolist() == [0, 1, 2, 3, 0, 1]
    spans = []
    for k in range(4):
        part = x[labels == k]
        assert torch.allclose(part.mean(0), means[k], atol=0.05)
        values, vectors = torch.linalg.eigh(part.T.cov())
        expected = torch.tensor([0.3, 0.475, 0.65, 0.825, 1.0])
        assert torch.allclose(values[-5:], expected, atol=0.05) and values[:-5].abs().max() < 1e-5
        spans.append(vectors[:, -5:])
    spans = torch.cat(spans, 1)
    assert (spans.T @ spans - torch.eye(20)).abs().max() < 1e-3  # disjoint directions
    assert (means @ spans).abs().max() < 1e-3
    again, other = script.simplex_mog(40, 30, seed=0)[0], script.simplex_mog(40, 30, seed=1)[0]
    assert not torch.equal(again, other)


def test_fields_have_their_correlation_and_stay_in_range():
    x = script.fields(4000, 16, seed=0, std=0.1).view(-1, 16, 16)  # never clipped
    assert x.std().item() == pytest.approx(0.1, rel=0.02)
    for shift in (1, 2, 4):
        c = (x * x.roll(shift, 2)).mean().item() / 0.01
        expected = math.exp(-(shift**2) / (2 * 2.0**2))  # length 1/8 of 16 pixels
        assert c == pytest.approx(expected, abs=0.03), shift
    x = script.fields(2000, 16, seed=0)
    assert x.abs().max() == 1 and x.shape == (2000, 256)
    assert 45 < x.square().sum(1).mean() < 65
    assert not torch.equal(x[:5], script.fields(5, 16, seed=1))


def test_separated_samples_are_the_greedy_choice():
    torch.manual_seed(0)
    x = torch.randn(60, 4, dtype=torch.float64)
    u = F.normalize(x)
    cosine = u @ u.T
    expected = [cosine.amin(1).argmin().item()]
    for _ in range(4):
        left = [i for i in range(60) if i not in expected]
        expected.append(min(left, key=lambda i: max(cosine[i, j].item() for j in expected)))
    assert script.pick_separated(x, 5).tolist() == expected
    fields = script.fields(5000, 16, seed=0)
    five = F.normalize(fields[script.pick_separated(fields, 5)])
    assert (five @ five.T - 2 * torch.eye(5)).max() < 0  # what the theorem asks for


def pool_of(*flags):
    cfg = script.parse_config(script.Config, script.PRESETS, (), list(flags))
    return script.load_pool(cfg, torch.device("cpu")), cfg


def test_images_are_gray_centred_and_held_out(monkeypatch):
    def load(cfg, device, split):
        images, labels = shapes(12_000 if split == "train" else 3000, 8, int(split != "train"))
        return argparse.Namespace(images=images, labels=labels, size=len(images))

    monkeypatch.setattr(script, "load_images", load)
    pool, cfg = pool_of("--image-size", "8", "--seed", "3", "--no-center")
    rgb = shapes(12_000, 8, 0)[0].double()
    gray = (0.299 * rgb[:, 0] + 0.587 * rgb[:, 1] + 0.114 * rgb[:, 2]).flatten(1) / 127.5 - 1
    key = gray[:200].float()
    exact = "donot_use_mm_for_euclid_dist"
    distance, index = torch.cdist(pool.x, key, compute_mode=exact).min(0)
    assert (distance < 1e-3).float().mean() > 0.7  # 10,000 of 12,000
    found = index[distance < 1e-3]
    assert torch.equal(pool.labels[found], (torch.arange(200) % 10)[distance < 1e-3])
    assert torch.cdist(pool.test[:50], gray.float()).min() > 0.1 and len(pool.test) == 2000
    other, _ = pool_of("--image-size", "8", "--seed", "4", "--no-center")
    assert not torch.equal(pool.x, other.x)
    centred, _ = pool_of("--image-size", "8", "--seed", "3")
    assert centred.x.mean(0).abs().max() < 1e-4
    assert torch.allclose(centred.x + centred.mean, pool.x, atol=1e-6)
    assert torch.allclose(centred.test + centred.mean, pool.test, atol=1e-6)


def test_copies_are_one_point_and_fresh_samples_are_of_the_others():
    pool, cfg = pool_of("--data", "simplex", "--image-size", "6", "--copies", "2", "--no-center",
                        "--samples", "400")
    data = script.choose(pool, cfg)
    for k in range(4):
        part = data.x[data.labels == k]
        assert (part == part[0]).all() == (k < 2)
    assert not torch.equal(data.x[0], data.x[1]) and len(data.stored) == 200
    assert set(data.labels[(data.x[:, None] == data.stored[None, :2]).all(2).any(1)].tolist()) == {
        0, 1}
    means = F.normalize(script.simplex_means(4, 36))
    assert ((F.normalize(pool.test) @ means.T).argmax(1) >= 2).all() and len(pool.test) == 2000
    assert len(data.concept) == 50 and (data.concept == data.x[0]).all()


def test_few_samples_become_the_columns_and_many_do_not(no_pictures):
    flags = ["--device", "cpu", "--data", "fields", "--image-size", "8", "--few-steps", "0"]
    flags += ["--no-center", "--loss", "code", "--log-every", "5000", "--width", "30"]
    few = ["--samples", "3", "--separated", "--batch-size", "3", "--steps", "1500"]
    few += ["--optimizer", "rmsprop", "--weight-decay", "0.03", "--sample-every", "1500"]
    script.main(flags + few + ["--out", "few"])
    many = ["--steps", "600", "--sample-every", "600", "--weight-decay", "1e-4", "--lr", "3e-3"]
    script.main(flags + many + ["--out", "many"])
    a, b = (json.loads(Path(f"{k}/metrics.jsonl").read_text().splitlines()[-1])
            for k in ("few", "many"))
    assert a["cosine"] > 0.99 > 0.9 > b["cosine"] and a["live"] < b["live"] == 30
    assert a["mse_test"] > 3 * b["mse_test"] and a["mse"] < 0.2 * b["mse"]
    assert abs(b["auroc_pr"] - 0.5) < 0.1 < a["auroc_pr"] - 0.5
    saved = load_checkpoint("few/last.pt")
    data = script.choose(*pool_of(*flags, *few))
    theory = script.mem_weights(data.x, 0.2, 64 * 0.03 / 2).norm(dim=0)
    norms = claim.summed_norms(saved["model"]["W"], data.x)
    assert torch.allclose(norms, theory, atol=0.04)


def test_run_trains_both_networks_and_draws_them():
    script.main(SMALL + ["--out", "run"])
    assert Path("run/samples_0000006.png").exists() and Path("run/few/samples_0000003.png").exists()
    heights = [Image.open(p).size[1] for p in ("run/samples_0000006.png",
                                               "run/few/samples_0000003.png")]
    assert heights[0] == pytest.approx(2 * heights[1], abs=2)
    one, two = load_checkpoint("run/few/last.pt"), load_checkpoint("run/last.pt")
    assert one["config"]["samples"] == 5 and one["config"]["optimizer"] == "rmsprop"
    assert two["config"]["samples"] == 60 and one["step"] == 3 and two["step"] == 6
    line = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    for key in ("loss", "grad_norm", "mse", "mse_test", "std", "auroc_pr", "l4", "cosine", "live"):
        assert math.isfinite(line[key]), key
    script.main(SMALL + ["--out", "run", "--steps", "8"])  # goes on; the first run is not repeated
    assert load_checkpoint("run/last.pt")["step"] == 8
    lines = Path("run/few/metrics.jsonl").read_text().splitlines()
    assert [json.loads(x)["step"] for x in lines] == [1, 2, 3]


def test_fresh_starts_both_over(no_pictures):
    script.main(SMALL + ["--out", "run"])
    first = load_checkpoint("run/last.pt")["model"]["W"].clone()
    script.main(SMALL + ["--out", "run", "--fresh", "--seed", "1"])
    assert load_checkpoint("run/few/last.pt")["config"]["seed"] == 1
    assert not torch.equal(first, load_checkpoint("run/last.pt")["model"]["W"])


def test_decay_is_in_the_loss_or_in_the_optimizer(no_pictures):
    flags = SMALL + ["--few-steps", "0", "--weight-decay", "0.01"]
    for loss, decay in (("paper", 0.0), ("code", 0.02)):  # double, for two layers
        script.main(flags + ["--loss", loss, "--out", loss])
        (group,) = load_checkpoint(f"{loss}/last.pt")["opt"]["param_groups"]
        assert group["weight_decay"] == decay and group["lr"] == 1e-3
    paper, code = (load_checkpoint(f"{k}/last.pt")["model"]["W"] for k in ("paper", "code"))
    assert torch.allclose(paper, code, atol=1e-4)  # Adam does not see the factor d


def test_interrupted_run_equals_a_whole_one(no_pictures, same_when_interrupted):
    flags = SMALL + ["--few-steps", "4", "--save-every", "2"]
    same_when_interrupted(script, flags, ["model"], stops=[("few", 2), (".", 2)])


def test_every_batch_of_a_few_samples_has_them_all(monkeypatch, no_pictures):
    seen = []

    def watch(net, W, x, *args, real=script.paper_loss):
        seen.append(x.sum(1).sort().values)
        return real(net, W, x, *args)

    monkeypatch.setattr(script, "paper_loss", watch)
    script.main(SMALL + ["--few-steps", "0", "--samples", "4", "--batch-size", "8"])
    assert all(torch.equal(s[::2], s[1::2]) and torch.equal(s, seen[0]) for s in seen)
    assert len(seen) == 6 and len(seen[0].unique()) == 4


def test_sample_draws_with_closed_form_weights_of_the_training_samples(refuses):
    script.main(SMALL + ["--out", "run"])
    script.main(["--sample", "run/few/last.pt", "--n", "9", "--npz", "--out", "s"])
    assert Image.open("s/sample.png").size == (8 * 66, 2 * 66)
    images = np.load("s/sample.npz")["arr_0"]
    assert images.shape == (9, 8, 8, 3) and images.dtype == np.uint8
    assert (images == images[..., :1]).all()  # gray
    saved = load_checkpoint("run/few/last.pt")
    x = saved["stats"]["U"] * saved["stats"]["s"].sqrt()  # (d, 5), up to order the samples
    span = torch.linalg.qr(x.double())[0]
    v = torch.from_numpy(images[..., 0]).double().flatten(1) / 127.5 - 1 - saved["mean"].double()
    keep = (torch.from_numpy(images[..., 0]).flatten(1) % 255 != 0).all(1)  # nothing clipped
    off = (v - v @ span @ span.T)[keep].norm(dim=1) / v[keep].norm(dim=1)
    assert keep.sum() >= 2 and off.max() < 0.1  # in the span of five samples, but for rounding
    script.main(["--sample", "run/few/last.pt", "--n", "9", "--npz", "--out", "t", "--steer", "3"])
    concept = saved["concept"].mean(0).double()
    steered = torch.from_numpy(np.load("t/sample.npz")["arr_0"][..., 0]).double().flatten(1)
    steered = steered / 127.5 - 1 - saved["mean"].double()
    near = F.cosine_similarity(steered, concept[None]).mean()
    assert near > 0.8 > F.cosine_similarity(v, concept[None]).mean() + 0.2
    script.main(["--sample", "run/last.pt", "--n", "3", "--out", "u"])
    assert Path("u/sample.png").exists()
    refuses(lambda: script.main(["--sample", "run/last.pt", "--sigma", "1"]), "sigma")


def test_statistics_pick_a_block_per_sample_cluster_or_set():
    x = torch.randn(60, 36)
    data = argparse.Namespace(x=x, labels=torch.arange(60) % 4)
    build = lambda **k: script.statistics(data, script.Config(**k, few_steps=0, image_size=6))
    few = build(samples=60, width=60, data="fields")
    assert few["sizes"] == [1] * 60 and few["rho"] == [1 / 60] * 60
    weights = script.closed_form(few, script.Config(samples=60, width=60, data="fields",
                                                    image_size=6, weight_decay=0.001), 0.2)
    assert torch.allclose(weights, script.mem_weights(x, 0.2, 0.018), atol=1e-4)
    assert build(samples=60, width=24, data="simplex")["sizes"] == [6] * 4
    assert build(samples=60, width=24, data="fields")["sizes"] == [12]  # pairs
    assert build(samples=60, width=24, data="fields", center=False)["sizes"] == [24]


def test_measure_has_closed_forms_at_zero_weights_and_at_the_memorising_ones():
    x = script.fields(5000, 16, seed=0)
    x = x[script.pick_separated(x, 5)]
    test = script.fields(300, 16, seed=1)
    data = argparse.Namespace(x=x, test=test, stored=x, labels=torch.arange(5))
    cfg = script.Config(sigma=0.2)
    zero = script.measure_codes(torch.zeros(256, 7), data, cfg)
    assert zero["mse"] == pytest.approx(x.square().mean().item(), rel=1e-5) and zero["live"] == 0
    m = script.measure_codes(script.mem_weights(x, 0.2, 0.0), data, cfg)
    square = x.square().sum(1)
    expected = (0.04 * square / (0.04 + square)).mean().item() / 256  # Cor. 3.2, lambda to 0
    assert m["mse"] == pytest.approx(expected, rel=0.1) and m["cosine"] == pytest.approx(1)
    assert m["live"] == 5 and m["pr"] == pytest.approx(1, abs=0.1) and m["l4"] > 0.98
    assert m["auroc_std"] > 0.95 and m["mse_test"] > 0.1


def test_instruments_of_the_claim():
    x = separated_samples()
    assert claim.residual(x, 0.2, 0.8) < 1e-12
    W = script.mem_weights(x, 0.2, 0.8)
    split = torch.cat([0.6 * W, 0.8 * W, 0 * W], 1)
    assert torch.allclose(claim.summed_norms(split, x), W.norm(dim=0))
    pool, cfg = pool_of("--data", "simplex", "--image-size", "8", "--width", "40", "--no-center",
                        "--copies", "2", "--loss", "code", "--weight-decay", "1e-3")
    data = script.choose(pool, cfg)
    lam = script.effective_lambda(64, 1e-3)
    clusters = [(*script.spectrum(data.x[data.labels == k], 1 if k < 2 else 10), 1 / 4)
                for k in range(4)]
    exact = claim.blocks(script.theory_weights(clusters, 0.2, lam), data, cfg)
    for key in ("copy_error", "block_error", "copy_norm_gap", "block_eigen"):
        assert exact[key] < 1e-3, key
    assert exact["copy_cosine"] > 0.9999 and exact["block_printed_error"] > 0.1
    doubled = claim.blocks(2**0.5 * script.theory_weights(clusters, 0.2, lam), data, cfg)
    assert doubled["block_error"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--width", "0"], ["width", "at least 1"]),
        (["--sigma", "0"], ["sigma > 0"]),
        (["--sigma-max", "0.01"], ["sigma_max > sigma_min"]),
        (["--lr", "-1"], ["lr", "negative"]),
        (["--weight-decay", "inf"], ["weight_decay"]),
        (["--copies", "2"], ["copies", "simplex"]),
        (["--data", "simplex", "--copies", "4"], ["copies", "0 to 3"]),
        (["--data", "simplex", "--image-size", "4"], ["image_size"]),
        (["--optimizer", "sgd"], ["--optimizer"]),
        (["--data", "none"], ["--data none", "shapes"]),
        (["--seed", "-1"], ["--seed", "at least 0"]),
        (["--batch-size", "0"], ["--batch-size", "at least 1"]),
    ],
)
def test_bad_input_is_one_line(flags, words, refuses):
    refuses(lambda: script.main(SMALL + flags), *words)
    assert not Path("runs").exists()


def test_more_samples_than_a_folder_has_are_refused(refuses):
    for i in range(20):
        path = Path(f"photos/{i % 2}/{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (10 * i, 0, 0)).save(path)
    flags = SMALL + ["--data", "photos", "--batch-size", "18"]
    refuses(lambda: script.main(flags), "--samples 60", "18 to train on")
    script.main(flags + ["--samples", "18", "--out", "run"])
    assert load_checkpoint("run/last.pt")["step"] == 6


@pytest.mark.slow
def test_two_ranks_train_as_one_sample_as_one_and_stop_together(launch, same_on_two_ranks):
    launch(script, *SMALL, "--out", "two", ranks=2)
    for folder, count in (("two/few", 3), ("two", 6)):
        lines = [json.loads(x) for x in Path(folder, "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, count + 1))  # written once
        assert math.isfinite(lines[-1]["mse_test"])
        assert Path(folder, f"samples_{count:07d}.png").exists()
    same_on_two_ranks(script, "--sample", "two/last.pt", "--n", "600", "--steer", "0.5")
    launch(script, *SMALL, "--out", "odd", "--batch-size", "7", ranks=2,
           fails="divisible by the 2 ranks")
    assert not Path("odd").exists()


def test_a_measurement_that_was_not_logged_yet_outlives_a_kill(tmp_path, monkeypatch, no_pictures):
    flags = [*SMALL, "--few-steps", "0", "--sample-every", "2", "--save-every", "2",
             "--log-every", "3", "--out", str(tmp_path)]
    calls, own = [], script.paper_loss

    def killed(*args):
        calls.append(0)
        if len(calls) == 3:
            raise InterruptedError
        return own(*args)

    with monkeypatch.context() as patch:
        patch.setattr(script, "paper_loss", killed)
        with pytest.raises(InterruptedError):
            script.main(flags)
    script.main(flags)
    lines = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines] == [3, 6]
    assert all("mse_test" in row for row in lines)
