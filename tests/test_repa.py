"""repa.py against closed forms, Gaussian data with a known flow, and a vanilla SiT by hand."""

import copy
import functools
import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import repa as script
from common import batch, load_checkpoint, load_encoder, load_images, mix, save_grid
from tests.claims import repa as claim

ROOT = Path(script.__file__).parent
SMALL = ["--image-size", "16", "--patch", "4", "--dim", "16", "--depth", "3", "--heads", "2"]
SMALL += ["--pool", "2", "--align-depth", "2", "--projector-dim", "8", "--batch-size", "8"]
SMALL += ["--steps", "4", "--lr", "1e-2", "--log-every", "1", "--save-every", "2"]
SMALL += ["--sample-every", "100", "--sampling-steps", "2", "--device", "cpu"]
SMALL += ["--precision", "fp32", "--compile", "off"]
PATHS = ("linear", "vp")


@pytest.fixture(autouse=True)
def shapes_once(monkeypatch):
    """The 50,000 images are drawn once for all tests."""
    monkeypatch.setattr(script, "load_images", cached_images)


@functools.lru_cache
def images_of(data, size):
    return load_images(types.SimpleNamespace(data=data, image_size=size, batch_size=1),
                       torch.device("cpu"))


def cached_images(cfg, device, split="all"):
    if cfg.data != "shapes" or cfg.batch_size > 50_000:
        return load_images(cfg, device, split)
    return copy.copy(images_of(cfg.data, cfg.image_size))


def network(projector=True, depth=3, align_depth=2, kind="mlp", channels=3, side=8, patch=2):
    net = script.SiT(side, channels, patch, 5, 16, depth, 2, align_depth)
    if projector:
        net.projector = script.make_projector(kind, side // patch, 16, 8, 7)
    return net


def stir(net):
    """Weights away from the zeros of initialisation."""
    for w in net.parameters():
        nn.init.normal_(w, std=0.2)
    return net


def inputs(n=4, side=8, channels=3):
    return torch.randn(n, channels, side, side), torch.rand(n), torch.randint(0, 5, (n,))


# ---- model -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset, params, projector",
    [({}, 32.86, 6.6), ("paper-b", 130.30, 7.3), ("paper-l", 457.82, 7.9), ("paper", 674.82, 8.1)],
)
def test_sizes_have_the_papers_parameters(preset, params, projector):
    small = dict(dim=384, depth=12, heads=6)  # SiT-S/2
    cfg = script.Config(**(script.PAPER | small if preset == {} else script.PRESETS[preset]))
    with torch.device("meta"):
        net = script.build(cfg, 1000, width=768)
    count = lambda module: sum(w.numel() for w in module.parameters()) / 1e6
    assert count(net.projector) == pytest.approx(projector, abs=0.06)
    assert count(net) - count(net.projector) == pytest.approx(params, abs=0.006)
    assert (net.side, net.projector[0].in_features) == (16, cfg.dim)


def test_output_is_zero_at_first_and_the_loss_that_of_zero():
    net, (x0, t, y) = network(), inputs()
    assert torch.equal(net(x0, t, y), torch.zeros_like(x0))
    torch.manual_seed(1)
    loss, _ = script.velocity_loss(net, x0, y, t)
    torch.manual_seed(1)
    assert torch.allclose(loss, (torch.randn_like(x0) - x0).square().mean())


def test_projector_comes_last_so_that_the_rest_starts_alike():
    cfg = script.Config()
    nets = []
    for width in (0, 7):
        torch.manual_seed(3)
        nets.append(script.build(cfg, 10, width))
    assert nets[0].projector is None and nets[1].projector is not None
    for name, w in nets[0].state_dict().items():
        assert torch.equal(w, nets[1].state_dict()[name]), name
    assert all((layer.bias == 0).all() for layer in nets[1].projector if hasattr(layer, "bias"))


def test_aligned_or_not_training_starts_from_the_same_weights(monkeypatch):
    """The teacher is loaded first, and draws random numbers."""
    built = []
    build = script.build
    monkeypatch.setattr(script, "build", lambda *args: built.append(build(*args)) or built[-1])
    for lam in ("0", "0.5"):
        script.main(SMALL + ["--lam", lam, "--steps", "1", "--lr", "0", "--out", lam])
    assert built[0].projector is None and built[1].projector is not None
    for name, w in built[0].state_dict().items():
        assert torch.equal(w, built[1].state_dict()[name]), name


def test_block_by_hand():
    block, x, c = stir(script.SiTBlock(8, 2)).double(), torch.randn(5, 8).double(), torch.randn(8)
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c.double()).chunk(6)
    norm = lambda u: (u - u.mean(-1, True)) / (u.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    q, k, v = block.qkv(norm(x) * (1 + scale1) + shift1).chunk(3, -1)
    heads = [(q[:, s] @ k[:, s].T / 2).softmax(-1) @ v[:, s] for s in (slice(0, 4), slice(4, 8))]
    h = x + gate1 * block.proj(torch.cat(heads, -1))
    u = block.up(norm(h) * (1 + scale2) + shift2)
    gelu = 0.5 * u * (1 + (math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)).tanh())
    expected = h + gate2 * block.down(gelu)
    assert torch.allclose(block(x[None], c.double()[None])[0], expected, atol=1e-9)


def test_p_is_the_projection_of_block_align_depth_counted_from_1():
    for depth in (1, 2, 3):
        net, kept = stir(network(align_depth=depth)), []
        net.blocks[depth - 1].register_forward_hook(lambda m, args, out: kept.append(out))
        x, t, y = inputs()
        v, p = net(x, t, y, align=True)
        assert torch.equal(p, net.projector(kept[0])) and torch.equal(v, net(x, t, y))
    assert stir(network(projector=False))(x, t, y, align=True)[1] is None


def test_class_and_time_reach_the_output():
    net, (x, t, y) = stir(network()), inputs()
    assert not torch.allclose(net(x, t, y), net(x, t, (y + 1) % 6))
    assert not torch.allclose(net(x, t, y), net(x, t / 2, y))


def test_patches_keep_their_place():
    net = network(projector=False, depth=1)
    x, t, y = inputs()
    with torch.no_grad():  # a network that copies: 12 = 3 patch^2 of 16 channels
        net.embed.weight.copy_(torch.eye(16, 12))
        net.head.weight.copy_(torch.eye(12, 16))
        net.position.zero_()
    net.norm = nn.Identity()
    assert torch.allclose(net(x, t, y), x, atol=1e-6)


def test_conv_projector_sees_the_neighbours_of_a_token_and_no_other():
    projector, h = stir(script.make_projector("conv", 4, 16, 8, 7)), torch.randn(1, 16, 16)
    moved = h.clone()
    moved[0, 6] += 1  # row 1, column 2
    changed = (projector(h) != projector(moved)).any(-1)[0].view(4, 4)
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[0:3, 1:4] = True
    assert torch.equal(changed, expected)
    weight, bias = projector[1].weight, projector[1].bias
    by_hand = bias + sum(weight[:, :, 1 + r, 1 + c] @ h[0, 4 * (1 + r) + 2 + c]
                         for r in (-1, 0, 1) for c in (-1, 0, 1))
    assert torch.allclose(projector(h)[0, 6], by_hand, atol=1e-5)


# ---- losses ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_path_goes_from_data_to_noise_and_its_derivatives_are_right(path):
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    alpha, sigma, d_alpha, d_sigma = (u.flatten() for u in script.interpolant(path, t))
    assert torch.allclose(alpha[[0, 2]], torch.tensor([1.0, 0.0]).double())
    assert torch.allclose(sigma[[0, 2]], torch.tensor([0.0, 1.0]).double())
    up, down = (script.interpolant(path, t + e) for e in (1e-5, -1e-5))
    assert torch.allclose((up[0] - down[0]).flatten() / 2e-5, d_alpha, atol=1e-8)
    assert torch.allclose((up[1] - down[1]).flatten() / 2e-5, d_sigma, atol=1e-8)
    if path == "vp":
        assert torch.allclose(alpha**2 + sigma**2, torch.ones(3).double())


@pytest.mark.parametrize("path", PATHS)
def test_velocity_loss_is_zero_for_the_true_velocity_only(path):
    x0, t, y = inputs()
    t = 0.1 + 0.8 * t

    def true(xt, t, y, align):  # v from xt and the x0 that is known here
        alpha, sigma, d_alpha, d_sigma = script.interpolant(path, t)
        eps = (xt - alpha * x0) / sigma
        return (eps - x0 if path == "linear" else d_alpha * x0 + d_sigma * eps), None

    assert script.velocity_loss(true, x0, y, t, path)[0] < 1e-9
    back = lambda *args, **how: (-true(*args, **how)[0], None)
    assert script.velocity_loss(back, x0, y, t, path)[0] > 1


def test_alignment_is_minus_the_mean_cosine_in_float32():
    p, y_star = torch.randn(3, 4, 7), torch.randn(3, 4, 7)
    a, b = p.double().numpy(), y_star.double().numpy()
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert script.repa_loss(p, y_star).item() == pytest.approx(-cosine.mean(), abs=1e-6)
    assert script.repa_loss(3 * y_star, y_star).item() == pytest.approx(-1, abs=1e-6)
    assert script.repa_loss(-y_star, y_star).item() == pytest.approx(1, abs=1e-6)
    half = script.repa_loss(p.bfloat16(), y_star)
    assert half.dtype == torch.float32
    assert torch.equal(half, script.repa_loss(p.bfloat16().float(), y_star))


def test_gradient_of_the_alignment_stops_at_its_block_and_at_the_teacher():
    net, (x0, t, y) = stir(network()), inputs()
    y_star = torch.randn(4, 16, 7)
    velocity, p = script.velocity_loss(net, x0, y, t)
    script.repa_loss(p, y_star).backward(retain_graph=True)
    touched = {name.split(".")[0] + "." + name.split(".")[1] if name.startswith("blocks") else
               name.split(".")[0] for name, w in net.named_parameters() if w.grad is not None}
    assert touched == {"embed", "time", "label", "blocks.0", "blocks.1", "projector"}
    assert all(w.grad.abs().sum() > 0 for w in net.projector.parameters())
    net.zero_grad()
    velocity.backward()
    assert all((w.grad is None) == name.startswith("projector")
               for name, w in net.named_parameters())


def test_teacher_is_frozen_and_gives_no_gradient():
    encoder = load_encoder(str(ROOT / "assets/teacher.safetensors"), 8)
    images = (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_()
    y_star = script.teacher_tokens(encoder, images, 4, 2)
    assert y_star.shape == (2, 16, encoder.dim) and y_star.dtype == torch.float32
    assert not y_star.requires_grad and not encoder.training
    assert not any(w.requires_grad for w in encoder.parameters())


def test_teacher_tokens_are_averaged_in_squares_and_normalised_over_tokens():
    y = torch.randn(2, 64, 5)
    got = script.teacher_tokens(lambda images: y, None, 4, 2)
    grid = y.numpy().reshape(2, 4, 2, 4, 2, 5).mean((2, 4)).reshape(2, 16, 5)
    assert np.allclose(got, grid, atol=1e-6)
    assert torch.equal(script.teacher_tokens(lambda images: y, None, 8), y)
    got = script.teacher_tokens(lambda images: y, None, 4, 2, gamma=0.6).numpy()
    mean, std = grid.mean(1, keepdims=True), grid.std(1, keepdims=True, ddof=1)
    assert np.allclose(got, (grid - 0.6 * mean) / (std + 1e-6), atol=1e-5)


def test_student_and_teacher_count_their_tokens_alike():
    encoder = load_encoder(str(ROOT / "assets/teacher.safetensors"), 8)
    net = script.SiT(32, 3, 8, 1, 16, 1, 2)
    for place in (0, 6, 9, 15):
        row, column = divmod(place, 4)
        images = torch.full((2, 3, 32, 32), -0.8)
        images[1, :, 8 * row + 2:8 * row + 6, 8 * column + 2:8 * column + 6] = 0.8
        dark, bright = script.teacher_tokens(encoder, images, 4, 2)
        assert (bright - dark).norm(dim=-1).argmax() == place
        kept = []
        net.embed.register_forward_hook(lambda m, args, out: kept.append(out))
        net(images, torch.zeros(2), torch.zeros(2, dtype=torch.int64))
        assert (kept[-1][1] - kept[-1][0]).norm(dim=-1).argmax() == place


# ---- samplers --------------------------------------------------------------------------


class Gaussian:
    """v for data N(0, s^2): E[v | xt], computed in float64 although the sampler asks for float."""

    def __init__(self, s, path="linear"):
        self.s, self.path, self.times = s, path, []

    def __call__(self, x, t, y):
        self.times.append(t[0].item())
        alpha, sigma, d_alpha, d_sigma = script.interpolant(self.path, t.double())
        gain = d_alpha * alpha * self.s**2 + d_sigma * sigma
        out = x * gain / (alpha**2 * self.s**2 + sigma**2)
        out.float = lambda: out
        return out


def final_std(s, monkeypatch, path="linear", **how):
    """Exact: all is linear, so a sampler fed with one basis vector per draw returns its weights."""
    count = iter(range(1, 10_000))
    basis = lambda i: F.one_hot(torch.tensor(i), 300).double().view(1, 1, 1, 300)
    monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: basis(next(count)))
    net = Gaussian(s, path)
    return script.sample_flow(net, basis(0), None, path, **how).norm().item(), net.times


TABLE = {0.5: (0.4854, 0.4970, 0.4900, 0.4953, 0.4921, 0.4943),
         1.0: (0.9746, 0.9949, 0.9818, 0.9950, 0.9864, 0.9952),
         2.0: (1.9416, 1.9882, 1.9524, 1.9898, 1.9606, 1.9911)}


@pytest.mark.parametrize("s", TABLE)
def test_samplers_leave_the_std_of_the_gaussian_table(s, monkeypatch):
    columns = [("ode", 2, 50), ("ode", 2, 250), ("sde", 1, 50), ("sde", 1, 250), ("sde", 2, 50),
               ("sde", 2, 250)]
    for (sampler, w, n), expected in zip(columns, TABLE[s]):
        std, times = final_std(s, monkeypatch, sampler=sampler, sampling_steps=n, diffusion=w)
        assert std == pytest.approx(expected, abs=1e-3), (sampler, w, n)
        assert len(times) == n and times[0] == 1
        assert times[-1] == pytest.approx(0.04 if sampler == "sde" else 1 / n)


@pytest.mark.parametrize("path", PATHS)
def test_samplers_converge_to_the_data_on_both_paths(path, monkeypatch):
    for sampler, steps, close in (("sde", 290, 0.02), ("heun", 80, 2e-3)):
        std, _ = final_std(0.5, monkeypatch, path, sampler=sampler, sampling_steps=steps)
        assert std == pytest.approx(0.5, rel=close), sampler


def test_heun_has_order_two_and_ends_with_euler(monkeypatch):
    errors = [abs(final_std(0.5, monkeypatch, sampler="heun", sampling_steps=n)[0] - 0.5)
              for n in (20, 40, 80)]
    assert all(1.7 < math.log2(a / b) < 2.6 for a, b in zip(errors, errors[1:])), errors
    _, times = final_std(0.5, monkeypatch, sampler="heun", sampling_steps=4)
    assert times == pytest.approx([1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25])


def test_sde_step_of_the_linear_path_is_the_printed_one(monkeypatch):
    net, x, xi = Gaussian(0.7), torch.randn(2, 3, 2, 2).double(), torch.randn(2, 3, 2, 2)
    monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: xi)
    got = script.sample_flow(net, x, None, sampling_steps=2, last=0.3)
    drift = lambda x, t: (2 - t) * net(x, torch.tensor([t]), None) + x
    x = x - 0.7 * drift(x, 1.0) + math.sqrt(2 * 1.0 * 0.7) * xi
    assert torch.allclose(got, x - 0.3 * drift(x, 0.3), atol=1e-6)


class Count(nn.Module):
    """Answers 1 to a class and 0 to no class; remembers when it was asked."""

    classes, seen = 7, ()

    def forward(self, x, t, y):
        self.seen = (*self.seen, (round(t[0].item(), 4), len(x), y.tolist()))
        return (y != self.classes).float().view(-1, 1, 1, 1).expand_as(x)


@pytest.mark.parametrize("sampler", ["sde", "ode", "heun"])
def test_guidance_acts_inside_its_interval_with_the_null_class(sampler):
    x, y = torch.zeros(2, 1, 1, 1), torch.tensor([3, 4])
    net = Count()
    script.sample_flow(net, x, y, "linear", sampler, 8, 3.0, 0.25, 0.75, last=0.125)
    doubled = [t for t, n, _ in net.seen if n == 4]
    inside = [0.75, 0.625, 0.5, 0.375, 0.25]  # both ends included
    # Heun: the second evaluation goes by the time of the first
    assert doubled == sorted([*inside, *inside[1:], 0.125] if sampler == "heun" else inside)[::-1]
    assert all(labels == [3, 4, 7, 7] for _, n, labels in net.seen if n == 4)
    assert {t for t, n, _ in net.seen} >= {0.125, 1.0}
    plain = Count()
    script.sample_flow(plain, x, y, "linear", sampler, 10, 1.0)
    assert all(labels == [3, 4] for *_, labels in plain.seen)


def test_guidance_of_the_drift_is_guidance_of_the_velocity():
    x, y = torch.randn(2, 1, 2, 2), torch.tensor([3, 4])
    run = lambda w: script.sample_flow(Count(), x, y, "linear", "sde", 1, w)
    plain, off, far = run(1.0), script.sample_flow(Count(), x, y + 3, "linear", "sde", 1, 0.0), 2.5
    assert torch.allclose(run(far), off + far * (plain - off), atol=1e-5)


# ---- the claim's instruments ----------------------------------------------------------


def test_cknna_of_equal_rotated_and_independent_features():
    f, other = torch.randn(200, 12).double(), torch.randn(200, 9).double()
    rotation = torch.linalg.qr(torch.randn(12, 12).double())[0]
    assert claim.cknna(f, f) == pytest.approx(1)
    assert claim.cknna(f, 3 * f @ rotation) == pytest.approx(1)
    assert abs(claim.cknna(f, other)) < 0.1
    near = claim.cknna(f, f + 0.5 * torch.randn(200, 12).double())
    assert 0.2 < near < 0.9


def test_cknna_by_hand():
    f, g, m, k = torch.randn(9, 3).double(), torch.randn(9, 4).double(), 9, 2

    def kernel(h):
        h = h / h.norm(dim=1, keepdim=True)
        return [[float(h[i] @ h[j]) for j in range(m)] for i in range(m)]

    def neighbours(K):
        order = lambda i: sorted((j for j in range(m) if j != i), key=lambda j: -K[i][j])
        return [set(order(i)[:k]) for i in range(m)]

    def align(K, L, a, b):
        on = lambda i, j: i != j and j in a[i] and j in b[i]
        P, Q = ([[X[i][j] * on(i, j) for j in range(m)] for i in range(m)] for X in (K, L))
        total = lambda X: sum(map(sum, X))
        first = sum(P[i][j] * Q[j][i] for i in range(m) for j in range(m))
        product = sum(P[i][r] * Q[r][j] for i in range(m) for j in range(m) for r in range(m))
        second = total(P) * total(Q) / ((m - 1) * (m - 2)) - 2 / (m - 2) * product
        return (first + second) / (m * (m - 3))

    K, L = kernel(f), kernel(g)
    a, b = neighbours(K), neighbours(L)
    expected = align(K, L, a, b) / math.sqrt(align(K, K, a, a) * align(L, L, b, b))
    assert claim.cknna(f, g, k) == pytest.approx(expected)


def test_features_are_mean_tokens_of_each_block_without_a_class():
    cfg = script.Config(image_size=8, patch=2, path="vp", precision="fp32")
    net, images = stir(network()), torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    means, h, p, error = claim.look(net, images, 0.3, cfg, torch.device("cpu"), seed=5)
    eps = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    x0, a, b = images / 127.5 - 1, math.cos(0.15 * math.pi), math.sin(0.15 * math.pi)
    y, t = torch.full((6,), 5), torch.full((6,), 0.3)
    v_hat, expected = net(a * x0 + b * eps, t, y, align=True)
    assert torch.allclose(p, expected, atol=1e-5)
    v = math.pi / 2 * (a * eps - b * x0)
    assert error == pytest.approx((v_hat - v).square().mean().item(), rel=1e-4)
    kept = []
    for k in (1, 2):
        net.blocks[k].register_forward_hook(lambda m, args, out: kept.append(out))
    net(a * x0 + b * eps, t, y)
    assert means.shape == (3, 6, 16) and torch.allclose(means[2], kept[1].mean(1), atol=1e-5)
    assert torch.allclose(h, kept[0], atol=1e-5)  # of block align_depth, 2
    assert not net.blocks[0]._forward_hooks


def test_targets_of_the_claim_are_those_of_the_script_by_other_means():
    y, images = torch.randn(3, 64, 5), torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    for pool, gamma in ((1, 0.0), (2, 0.0), (2, 0.6), (4, 0.7)):
        got = claim.tokens_of(lambda x: y, images, 8 // pool, pool, gamma)
        by_hand = torch.zeros(3, (8 // pool)**2, 5)
        for n in range(64):
            row, column = n // 8 // pool, n % 8 // pool
            by_hand[:, row * (8 // pool) + column] += y[:, n] / pool**2
        if gamma:
            by_hand = (by_hand - gamma * by_hand.mean(1, True)) / by_hand.std(1, keepdim=True)
        assert torch.allclose(got, by_hand, atol=1e-4)
        theirs = script.teacher_tokens(lambda x: y, None, 8 // pool, pool, gamma)
        assert torch.allclose(got, theirs, atol=1e-5)


def test_random_encoder_has_the_statistics_of_its_images():
    teacher, images = ROOT / "assets/teacher.safetensors", images_of("shapes", 32).images[:40]
    claim.random_encoder("made/random.safetensors", teacher, images[:30], 4, part=15)
    encoder, model = load_encoder("made/random.safetensors", 4), load_encoder(str(teacher), 4).model
    assert not torch.equal(encoder.model.stem.conv.weight, model.stem.conv.weight)
    seen, norms = [], [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(m.running_mean.abs().sum() > 0 for m in norms)
    norms[0].register_forward_hook(lambda m, args, out: seen.append(args[0]))
    encoder(images[:30] / 127.5 - 1)
    assert torch.allclose(norms[0].running_mean, seen[0].mean((0, 2, 3)), atol=1e-3)
    batches = torch.stack([x.var((0, 2, 3)) for x in seen[0].split(15)]).mean(0)
    assert torch.allclose(norms[0].running_var, batches, rtol=1e-3)

    def constant(encoder):  # how well a constant answers the tokens of other images
        y = claim.tokens_of(encoder, images, 2, 2)
        return F.cosine_similarity(y[30:], claim.constant_answer(y[:30]), dim=-1).mean()

    calibrated = constant(encoder)
    for m in norms:
        m.reset_running_stats()
    assert calibrated < constant(encoder) - 0.05


def test_contrasts_see_positions_and_images():
    y = torch.randn(50, 16, 9)
    match, place, image = claim.contrasts(3 * y, y)
    assert match == pytest.approx(1, abs=1e-5) and image > 0.9
    assert place == pytest.approx(0.75, abs=0.05)  # a mirrored grid keeps its diagonal
    grid = y.view(50, 4, 4, 9)
    for turned in (grid.transpose(1, 2), grid.flip(1), grid.flip(2), grid.flip(1, 2),
                   grid.rot90(1, (1, 2)), grid.rot90(3, (1, 2)),
                   grid.rot90(1, (1, 2)).flip(1)):  # a wrong order of tokens is found out
        assert claim.contrasts(turned.reshape(50, 16, 9), y)[1] < -0.6
    _, place, image = claim.contrasts(y.mean(1, True).expand_as(y), y)  # what, but not where
    assert abs(place) < 0.1 and image > 0.1
    fixed = torch.randn(1, 16, 9)
    y = y + 3 * fixed
    _, place, image = claim.contrasts(fixed.expand_as(y), y)  # where, but not what
    assert place > 0.5 and abs(image) < 0.05


def test_contrasts_by_hand():
    p, y = torch.randn(7, 4, 3), torch.randn(7, 4, 3)
    cosine = lambda i, n, j, m: F.cosine_similarity(p[i, n], y[j, m], dim=0).item()
    over = lambda f: sum(f(i, n) for i in range(7) for n in range(4)) / 28
    match, place, image = claim.contrasts(p, y)
    assert match == pytest.approx(over(lambda i, n: cosine(i, n, i, n)), abs=1e-5)
    orders = [(1, 0, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0), (0, 2, 1, 3), (3, 1, 2, 0), (1, 3, 0, 2),
              (2, 0, 3, 1)]  # of 0 1 / 2 3
    best = [over(lambda i, n: cosine(i, n, i, order[n])) for order in orders]
    best.append(over(lambda i, n: sum(cosine(i, n, i, m) for m in range(4) if m != n) / 3))
    assert place == pytest.approx(match - max(best), abs=1e-5)
    every = sum(cosine(i, n, j, n) for i in range(7) for j in range(7) for n in range(4) if i != j)
    many = [claim.contrasts(p[o], y[o])[2] for o in (torch.randperm(7) for _ in range(400))]
    assert match - sum(many) / 400 == pytest.approx(every / (7 * 6 * 4), abs=0.02)


def test_readout_finds_a_linear_map_and_nothing_in_noise():
    y = F.normalize(torch.randn(400, 4, 6) + torch.randn(4, 6), dim=-1)
    h = 5 * y @ torch.randn(6, 6) + 3
    got = claim.readout(h[:300], 2 * y[:300], h[300:])
    assert F.cosine_similarity(got, y[300:], dim=-1).mean() > 0.99
    noise = torch.randn(400, 4, 6)
    answer = claim.constant_answer(y[:300])
    got = claim.readout(noise[:300], y[:300], noise[300:])
    assert torch.allclose(got, answer.expand_as(got), atol=0.2)
    by_constant = F.cosine_similarity(answer, y[300:], dim=-1).mean()
    assert abs(F.cosine_similarity(got, y[300:], dim=-1).mean() - by_constant) < 0.02


def test_steps_to_a_goal_and_a_curve_against_itself():
    marks = (1, 2, 4, 8)
    assert claim.first_reach(marks, (9, 5, 3, 4), 4) == 3
    assert claim.first_reach(marks, (9, 5, 3, 4), 9) == 1
    assert claim.first_reach(marks, (9, 5, 3, 4), 3) == 4
    assert claim.first_reach(marks, (9, 5, 3, 4), 2) == math.inf
    for curve in ((9, 5, 3, 4), (9, 8, 7, 6), (1, 2, 3, 4), (5, 5, 5, 5), (9, 3, 4, 2)):
        assert claim.speed_ratio(marks, curve, curve) == 1
    assert claim.speed_ratio(marks, (9, 5, 3, 4), (9, 3, 2, 2)) == 2
    assert claim.speed_ratio(marks, (9, 5, 3, 4), (9, 9, 4, 3)) == 0.5
    assert claim.speed_ratio(marks, (9, 5, 3, 4), (9, 9, 9, 9)) == 0


def test_words_of_the_rules():
    yes, no, open_ = "as in the paper", "contradicted", "not resolved"
    assert claim.above([5, 6], [1, 2]) == yes and claim.above([1, 2], [5, 6]) == no
    assert claim.above([5, 9], [1, 6]) == open_  # 3.5 apart, spreads 2.8 and 3.5
    assert claim.above([5, 5.1, 5], [4, 4, 5.2]) == open_  # not at every seed
    assert claim.above([1, 1], [1, 1]) == open_
    for words, word in ((3 * [yes], yes), (3 * [no], no), (3 * [open_], open_),
                        ([yes, yes, no], "partly"), ([yes, open_], open_), ([yes, no, no], open_),
                        ([no, open_, open_], open_), ([no, no, open_], no)):
        assert claim.together(dict(enumerate(words))) == word, words
    assert claim.hold({"a": True, "b": False}) == {"a": yes, "b": no}
    assert claim.faster([1.3, 1.21]) == yes and claim.faster([1.3, 1.1]) == open_
    assert claim.faster([1, 1]) == open_ and claim.faster([0, 0.8]) == no


class Numbers(dict):
    """Metrics of an arm: those given, and 0.5 for each other."""

    def __missing__(self, name):
        return 0.5


@pytest.mark.parametrize("taught", [0.9, 0.4])
def test_verdicts_need_a_teacher_that_knows_more(taught):
    good = Numbers({f"{k}_2_{t}": 0.7 for k in ("probe", "cknna", "judge") for t in claim.TIMES})
    good |= {f"{k}_{t}": 0.7 for k in ("readout", "place", "image") for t in claim.TIMES}
    good |= {f"best_{k}": 0.7 for k in ("probe", "cknna", "judge")}
    good |= {"probe": 0.7, "fd": 0.1, "aligned_0.1": 0.3, "aligned_0.7": 0.1}
    arms = {"vanilla": Numbers(), "REPA": Numbers(good), "iREPA": Numbers(good | {"fd": 0.05}),
            "random": Numbers(), "shuffled": Numbers({f"aligned_{t}": 0.01 for t in claim.TIMES})}
    report = {"args": types.SimpleNamespace(preset="cpu"), "align_depth": 2, "depth": 3,
              "path": Path("result"), "json": {"claims": [], "rows": []},
              "done": {("arms", name): {0: m, 1: m} for name, m in arms.items()}}
    report["done"]["teacher", "teacher"] = {0: {"probe": taught}}
    claim.judge_claims(report)
    words = {c["table"]: c["agrees"] for c in report["json"]["claims"]}
    first = words.pop("teacher")
    assert first == ("as in the paper" if taught == 0.9 else "contradicted")
    assert set(words) == {"probe", "cknna", "best", "judge", "alignment", "place", "shuffled",
                          "random", "fd", "irepa"}
    assert set(words.values()) == {"as in the paper" if taught == 0.9 else "not resolved"}


def test_exchanged_targets_are_those_of_another_image_and_only_there(monkeypatch):
    own, seen = script.teacher_tokens, []
    real = script.repa_loss
    monkeypatch.setattr(script, "repa_loss", lambda p, y: seen.append(y) or real(p, y))
    for active in (False, True):
        with claim.exchanged_targets(active):
            script.main(SMALL + ["--steps", "1", "--out", f"run-{active}"])
        assert script.teacher_tokens is own
    assert torch.equal(seen[1], seen[0].roll(1, 0)) and not torch.equal(seen[1], seen[0])


def test_code_of_a_claim_is_that_of_its_judge_and_teachers_too(monkeypatch):
    files = []

    def stop(script, doc, argv, also):
        files.append([Path(f) for f in also])
        raise KeyboardInterrupt

    monkeypatch.setattr(claim, "open_report", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            claim.main([])
        Path("runs/teacher-cifar10").mkdir(parents=True, exist_ok=True)
        Path("runs/teacher-cifar10/teacher.safetensors").touch()
    assert {"simsiam.py", "judge.py", "judge_shapes_32.safetensors"} <= {f.name for f in files[0]}
    assert all((ROOT / f).exists() for f in files[1])
    made = Path("runs/teacher-cifar10/teacher.safetensors").resolve()
    assert set(files[1]) - set(files[0]) == {made}


# ---- the script ------------------------------------------------------------------------


def lines(out):
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def test_lambda_0_is_a_vanilla_sit_bit_for_bit():
    script.main(SMALL + ["--lam", "0", "--out", "run"])
    cfg = script.parse_config(script.Config, {}, (), SMALL)
    torch.manual_seed(cfg.seed)
    net = script.SiT(16, 3, 4, 10, 16, 3, 2)
    opt = torch.optim.AdamW(net.parameters(), 1e-2, (0.9, 0.999), weight_decay=0, fused=True)
    for step in range(4):  # without a projector, a path or a weight anywhere
        torch.manual_seed(mix(cfg.seed, step, 0))
        x0, y = batch(images_of("shapes", 16), cfg, torch.device("cpu"), step)
        y = torch.where(torch.rand(8) < 0.1, 10, y)
        t, eps = torch.rand(8), torch.randn_like(x0)
        s = t.view(-1, 1, 1, 1)
        loss = (net((1 - s) * x0 + s * eps, t, y) - (eps - x0)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
    saved = load_checkpoint("run/last.pt")
    assert saved["width"] == 0 and saved["model"].keys() == net.state_dict().keys()
    for name, w in net.state_dict().items():
        assert torch.equal(w, saved["model"][name]), name
    assert all(line["align"] == 0 and line["loss"] == line["velocity"] for line in lines("run"))


@pytest.mark.parametrize("more", [
    [], ["--projector", "conv", "--spatial-norm", "0.6", "--stop-align", "3", "--path", "vp",
         "--lam", "0.8"]])
def test_end_to_end_and_interrupted_is_the_same(more, same_when_interrupted):
    same_when_interrupted(script, SMALL + more, ["model", "ema"])
    rows = lines("whole")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[-1]["lr"] == 1e-2
    for row in rows:
        lam = 0.8 if more else 0.5
        assert row["loss"] == pytest.approx(row["velocity"] + lam * row["align"], rel=1e-5)
        assert (row["align"] == 0) == bool(more and row["step"] == 4)
    assert Image.open("whole/samples_0000004.png").size == (8 * 66, 10 * 66)
    saved = load_checkpoint("whole/last.pt")
    assert any(name.startswith("projector") for name in saved["ema"])


def test_after_the_stop_no_teacher_runs_and_its_projector_gets_zeros(monkeypatch):
    calls, seen, real = [], [], script.teacher_tokens
    monkeypatch.setattr(script, "teacher_tokens", lambda *a: calls.append(1) or real(*a))
    clip = nn.utils.clip_grad_norm_

    def look(parameters, limit):
        parameters = list(parameters)
        seen.append([w.grad for w in parameters[-6:]])  # the projector's
        assert limit == 0.3
        return clip(parameters, limit)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", look)
    script.main(SMALL + ["--stop-align", "2", "--grad-clip", "0.3", "--out", "run"])
    assert len(calls) == 2 and all(g is not None for grads in seen for g in grads)
    assert all((g == 0).all() for g in seen[-1])


def test_alignment_rises_when_trained(monkeypatch):
    script.main(SMALL + ["--steps", "40", "--out", "run"])
    rows = lines("run")
    assert rows[-1]["align"] < rows[0]["align"] - 0.3


def test_label_drop_1_never_shows_a_class(monkeypatch):
    labels, real = [], script.velocity_loss
    monkeypatch.setattr(script, "velocity_loss",
                        lambda net, x0, y, *rest: labels.append(y) or real(net, x0, y, *rest))
    script.main(SMALL + ["--label-drop", "1", "--guidance", "1", "--out", "run"])
    assert (torch.cat(labels) == 10).all()
    cfg = script.Config(image_size=16, patch=4, dim=16, depth=3, heads=2, label_drop=1.0,
                        guidance=1.0, sampling_steps=2)
    net = stir(script.build(cfg, 10, 0))
    one, two = (script.draw(net, None, torch.full((2,), k), cfg, torch.device("cpu"),
                            torch.Generator().manual_seed(0)) for k in (1, 2))
    assert torch.equal(one, two)


def test_sample_uses_the_checkpoint_s_config_and_the_ema():
    script.main(SMALL + ["--out", "run"])
    flags = ["--sample", "run/last.pt", "--n", "30", "--npz", "--device", "cpu"]
    flags += ["--precision", "fp32"]
    script.main(flags)
    with np.load("run/sample.npz") as file:
        first, labels = file["arr_0"], file["arr_1"]
    assert first.shape == (30, 16, 16, 3) and labels.tolist() == [i % 10 for i in range(30)]
    for more in (["--seed", "1"], ["--sampler", "sde"], ["--guidance", "5"]):
        script.main(flags + ["--out", "new", *more])
        other = np.load("new/sample.npz")["arr_0"]
        script.main(flags + ["--out", "again", *more])
        assert (other != first).any(), more
        assert (other == np.load("again/sample.npz")["arr_0"]).all(), more
    entries = dict(load_checkpoint("run/last.pt"))
    cfg = script.Config(**entries["config"])
    net = script.build(cfg, 10, entries["width"])
    net.load_state_dict(entries["ema"])
    y, generator = script.class_rows(10), torch.Generator().manual_seed(0)
    save_grid(script.draw(net, None, y, cfg, torch.device("cpu"), generator), "grid.png", 8)
    assert Path("grid.png").read_bytes() == Path("run/samples_0000004.png").read_bytes()
    entries["model"] = {k: v * 0 for k, v in entries["model"].items()}  # only the EMA is sampled
    torch.save(entries, "run/other.pt")
    script.main(["--sample", "run/other.pt", *flags[2:]])
    assert (np.load("run/sample.npz")["arr_0"] == first).all()


class FakeVAE(nn.Module):
    """Four channels an eighth as wide: the mean colour and zeros; noise of std 0 around them."""

    @classmethod
    def from_pretrained(cls, name):
        assert name == "some/vae"
        return cls()

    def encode(self, images):
        z = F.pad(F.avg_pool2d(images, 8), (0, 0, 0, 0, 0, 1))
        draw = types.SimpleNamespace(sample=lambda: z)
        return types.SimpleNamespace(latent_dist=draw)

    def decode(self, z):
        return types.SimpleNamespace(sample=F.interpolate(z[:, :3], scale_factor=8))


def test_latents_are_scaled_and_decoded_and_diffusers_is_asked_for(monkeypatch, refuses):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    flags = SMALL + ["--vae", "some/vae", "--image-size", "64", "--patch", "2", "--out", "run"]
    refuses(lambda: script.main(flags), "some/vae", "diffusers")
    assert not Path("run").exists()
    fake = types.ModuleType("diffusers")
    fake.AutoencoderKL = FakeVAE
    monkeypatch.setitem(sys.modules, "diffusers", fake)
    vae = script.load_vae("some/vae", "cpu")
    images = F.interpolate(torch.rand(40, 3, 2, 2) * 2 - 1, scale_factor=8)
    x0 = script.encode_images(vae, images)
    assert torch.allclose(x0[:, :3], 0.18215 * images[:, :, ::8, ::8], atol=1e-6)
    assert torch.allclose(script.decode_images(vae, x0), images, atol=1e-5)
    assert script.encode_images(None, images) is images
    monkeypatch.setattr(script, "load_images", lambda cfg, device: types.SimpleNamespace(
        images=torch.randint(0, 256, (64, 3, 64, 64), dtype=torch.uint8), classes=2, size=64,
        labels=torch.arange(64) % 2))
    script.main(flags)
    net = load_checkpoint("run/last.pt")["ema"]
    assert net["embed.weight"].shape == (16, 4 * 2 * 2)
    script.main(["--sample", "run/last.pt", "--n", "4", "--npz", "--device", "cpu"])
    assert np.load("run/sample.npz")["arr_0"].shape == (4, 64, 64, 3)


@pytest.mark.parametrize("flags, words", [
    (["--image-size", "18"], ["18", "4"]), (["--vae", "x", "--image-size", "16"], ["16", "32"]),
    (["--heads", "3"], ["heads 3"]), (["--dim", "18"], ["18", "4"]),
    (["--align-depth", "4"], ["align_depth 4", "1 ... 3"]), (["--align-depth", "0"], ["0"]),
    (["--projector", "linear"], ["linear", "conv"]), (["--sampler", "rk4"], ["rk4", "heun"]),
    (["--path", "cosine"], ["cosine", "vp"]), (["--lam", "-1"], ["lam"]),
    (["--label-drop", "1"], ["--guidance 1"]), (["--spatial-norm", "2"], ["spatial_norm"]),
    (["--pool", "0"], ["pool"]), (["--grad-clip", "0"], ["grad_clip"]),
    (["--stop-align", "-1"], ["stop_align"]), (["--lr", "-1"], ["lr"]),
    (["--ema-decay", "1"], ["ema_decay"]),
    (["--encoder", "none.safetensors"], ["none.safetensors"]),
    (["--encoder", "timm:no_such_model"], ["no_such_model"]),
    (["--batch-size", "60000"], ["60000", "50000"]), (["--preset", "imagenet"], ["cifar10"]),
    (["--data", "no/where"], ["no/where", "shapes"]), (["--wat"], ["--wat"]),
])
def test_bad_input_ends_with_one_line_and_writes_nothing(flags, words, refuses):
    refuses(lambda: script.main(SMALL + ["--out", "run"] + flags), *words)
    assert not Path("run").exists()


def test_an_encoder_with_another_number_of_tokens_is_refused(monkeypatch, refuses):
    monkeypatch.setattr(script, "load_encoder", lambda spec, grid: nn.Sequential(nn.Flatten(2)))
    monkeypatch.setattr(nn.Sequential, "model", nn.Identity(), raising=False)
    refuses(lambda: script.main(SMALL + ["--out", "run"]), "3 tokens", "8^2")


def test_the_encoder_s_grid_is_pool_times_the_network_s(monkeypatch):
    grids = []

    def look(spec, grid):
        grids.append(grid)
        return load_encoder(spec, grid)

    monkeypatch.setattr(script, "load_encoder", look)
    for more in ([], ["--pool", "1"]):
        cfg = script.parse_config(script.Config, {}, (), SMALL + more)
        script.load_teacher(cfg, torch.device("cpu"))
    assert grids == [8, 4]
    assert script.load_teacher(script.Config(lam=0.0), torch.device("cpu")) is None


@pytest.mark.slow
def test_two_ranks_train_past_the_stop_and_sample_as_one(launch, same_on_two_ranks):
    launch(script, *SMALL, "--stop-align", "2", "--out", "two", ranks=2)
    assert [row["align"] == 0 for row in lines("two")] == [False, False, True, True]
    launch(script, *SMALL, "--lam", "0", "--out", "vanilla", ranks=2)
    same_on_two_ranks(script, "--sample", "two/last.pt", "--n", "600")


@pytest.mark.gpu
def test_compiled_bf16_on_cuda():
    off = ("cpu", "fp32", "off", "--device", "--precision", "--compile")
    script.main([f for f in SMALL if f not in off] + ["--stop-align", "2"])
    assert math.isfinite(lines("runs/repa")[-1]["loss"])
