"""rae.py against closed forms, Gaussian data with a known flow and networks written out again."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import rae as script
from common import load_checkpoint, load_encoder, load_images, shapes
from tests.claims import rae as claim

SMALL = """--device cpu --compile off --precision fp32 --image-size 8 --batch-size 20 --steps 4
--decoder-batch-size 20 --decoder-steps 2 --dim 16 --depth 1 --heads 2 --head-dim 24 --head-heads 2
--decoder-dim 16 --decoder-depth 1 --decoder-heads 2 --decoder-mlp 32 --sampling-steps 2
--lr-flat 2 --alpha 0 --guidance 1 --log-every 1 --save-every 2 --sample-every 4""".split()
double = torch.float64


def few_shapes(cfg, device, split="all", limit=None):
    """300 shapes in place of 50,000, others to validate."""
    images, labels = shapes(300, cfg.image_size, seed=3 + (split == "validation"))
    return SimpleNamespace(images=images, labels=labels, classes=10, size=300)


@pytest.fixture
def small_data(monkeypatch):
    monkeypatch.setattr(script, "load_images", few_shapes)


def stir(net, std=0.3):
    """Random weights everywhere, so that nothing hides behind a zero."""
    torch.manual_seed(1)
    for p in net.parameters():
        nn.init.normal_(p, std=std)
    return net


# ---- time and its shift ----------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.3, 1.0, 6.93])
def test_shift_multiplies_the_odds_and_keeps_the_ends(alpha):
    t = torch.linspace(0, 1, 101, dtype=double)
    s = script.shift_time(t, alpha)
    assert s[0] == 0 and s[-1].item() == pytest.approx(1, abs=1e-12)
    odds = lambda u: u[1:-1] / (1 - u[1:-1])
    assert torch.allclose(odds(s), alpha * odds(t), rtol=1e-10)
    assert torch.allclose(script.shift_time(s, 1 / alpha), t, atol=1e-12)
    assert alpha <= 1 or (s[1:-1] > t[1:-1]).all()  # towards the noise, t = 1


def test_shift_factor_is_the_paper_s():
    assert script.shift_factor(256 * 768) == pytest.approx(6.93, abs=2e-3)
    assert script.shift_factor(1024 * 768) == pytest.approx(13.86, abs=4e-3)
    assert script.shift_factor(4096) == 1 and script.shift_factor(1024, base=64) == 4


@pytest.mark.parametrize("alpha", [1.0, 6.93])
def test_laws_of_time(alpha):
    t = script.flow_time(200_000, "logit-normal", alpha, "cpu").double()
    logit = (t / (1 - t)).log()  # logit-normal(0, 1), shifted, is logit-normal(ln alpha, 1)
    assert logit.mean().item() == pytest.approx(math.log(alpha), abs=0.01)
    assert logit.std().item() == pytest.approx(1, abs=0.01)
    u = script.flow_time(200_000, "uniform", alpha, "cpu")
    for p in (0.1, 0.5, 0.9):  # t' <= q when t <= p
        q = alpha * p / (1 + (alpha - 1) * p)
        assert (u <= q).float().mean().item() == pytest.approx(p, abs=5e-3)


def test_shares_of_the_claim_s_table_integrated_once_more():
    """Two modes +-(1, ..., 1) in R^m, 0.8 and 0.2; 49 steps from 1 to 0.001, as in the code."""
    p = (np.arange(20_000) + 0.5) / 20_000
    start = torch.distributions.Normal(0, 1).icdf(torch.from_numpy(p)).numpy()
    for m, shares in claim.SHIFT.items():
        for factor, share in zip((1.0, (m / 16) ** 0.5), shares):
            u, grid = start.copy(), 1 - np.linspace(0, 0.999, 50)
            odds = factor * grid[1:] / (1 - grid[1:])
            grid = np.concatenate([[1.0], odds / (1 + odds)])
            for t, s in zip(grid, grid[1:]):  # along (1, ..., 1) / sqrt(m), where the data is +-A
                A = m**0.5
                u_hat = A * np.tanh(A * (1 - t) * u / t**2 + math.log(0.8 / 0.2) / 2)
                u += (s - t) * (u - u_hat) / t
            assert (u > 0).mean() == pytest.approx(share, abs=1.5e-3), (m, factor)


def test_claim_s_shift_arm_is_the_script_s_sampler_on_the_same_modes():
    for m in (16, 4096):
        found = claim.shift_arm(m, 20_000)
        for name, share in zip(("share", "share_shifted"), claim.SHIFT[m]):
            assert found[name] == pytest.approx(share, abs=0.004)


# ---- flow, guidance, noise -------------------------------------------------------------


class Spy(nn.Module):
    """Answers a constant and remembers what it was asked."""

    classes = 7

    def __init__(self, answer):
        super().__init__()
        self.answer, self.seen = answer, []

    def forward(self, zt, t, y):
        self.seen.append((zt, t, y))
        return self.answer(zt, t, y) if callable(self.answer) else self.answer.expand_as(zt)


def test_flow_loss_is_the_squared_error_of_the_slope_of_the_path():
    z, t = torch.randn(6, 4, 5), torch.tensor([0.0, 0.1, 0.4, 0.7, 0.95, 1.0])
    net = Spy(torch.tensor(0.3))
    torch.manual_seed(3)
    loss = script.latent_flow_loss(net, z, None, t)
    torch.manual_seed(3)
    eps, zt = torch.randn_like(z), net.seen[0][0]
    path = lambda s: z + s.view(-1, 1, 1) * (eps - z)  # from data to noise
    assert torch.allclose(zt, path(t), atol=1e-6) and torch.equal(zt[0], z[0])  # t = 0: data
    slope = (path(t + 0.5) - path(t - 0.5)).double()
    assert loss.item() == pytest.approx((0.3 - slope).square().mean().item(), rel=1e-5)


def test_loss_at_the_start_is_one_plus_the_mean_square():
    net = script.DiTDH(4, 12, 5, 16, 2, 2, 24, 1, 2)
    z, t = 1.5 * torch.randn(400, 16, 12), torch.rand(400)
    assert net(z, t, torch.zeros(400).long()).detach().abs().max() == 0
    loss = script.latent_flow_loss(net, z, torch.zeros(400).long(), t).item()
    assert loss == pytest.approx(1 + z.square().mean().item(), rel=0.02)


def test_euler_converges_with_order_one_to_the_flow_of_a_gaussian():
    mean, std = 0.7, 0.3
    noise = torch.randn(500, 2, 2, dtype=double)

    def velocity(zt, t):  # E[eps - z | z_t] for z ~ N(mean, std^2)
        t = t.view(-1, 1, 1)
        var = (1 - t) ** 2 * std**2 + t**2
        u = (zt - (1 - t) * mean) / var
        return t * u - (mean + (1 - t) * std**2 * u)

    for alpha in (1.0, 3.0):
        errors = [
            (script.euler_ode(velocity, noise, alpha, n) - (mean + std * noise)).abs().max().item()
            for n in (100, 200, 400)
        ]  # quantiles stay quantiles
        assert errors[-1] < 0.02, errors
        assert all(1.7 < a / b < 2.3 for a, b in zip(errors, errors[1:])), errors


def test_euler_visits_the_shifted_grid_from_noise_to_data():
    seen = []
    velocity = lambda z, t: seen.append(t) or torch.ones_like(z)
    end = script.euler_ode(velocity, torch.zeros(3, 2, 1), 2.5, 5)
    times = torch.stack(seen)  # (5, 3)
    u = 1 - torch.arange(5) / 5
    assert torch.allclose(times[:, 0], 2.5 * u / (1 + 1.5 * u)) and (times.T == times[:, 0]).all()
    assert torch.allclose(end, -torch.ones(3, 2, 1))  # the steps add up to -1: it ends at t = 0


def test_guidance_by_no_class_and_by_a_weaker_network():
    zt, t, y = torch.randn(2, 3, 4), torch.full((2,), 0.4), torch.tensor([3, 5])
    known = Spy(lambda z, t, y: (y != 7).float().view(-1, 1, 1).expand_as(z) + 1)
    v = script.guided_flow(known, None, zt, t, y, 3.0)
    assert torch.equal(v, torch.full_like(v, 1 + 3 * (2 - 1)))
    assert known.seen[0][2].tolist() == [3, 5, 7, 7]
    strong, weak = Spy(torch.tensor(2.0)), Spy(torch.tensor(0.5))
    v = script.guided_flow(strong, weak, zt, t, y, 1.42)
    assert torch.allclose(v, torch.full_like(v, 0.5 + 1.42 * 1.5))
    assert weak.seen[0][2].tolist() == strong.seen[0][2].tolist() == [3, 5]  # both with the class
    assert torch.equal(weak.seen[0][0], zt)
    v = script.guided_flow(strong, weak, zt, t, y, 1.0)
    assert torch.equal(v, torch.full_like(v, 2.0)) and len(weak.seen) == 1


@pytest.mark.parametrize(
    "law, mean, square, largest", [("half-normal", 0.638, 0.64, 9), ("uniform", 0.4, 0.2133, 0.81)]
)
def test_noise_of_the_tokens_has_one_scale_an_image_and_the_law_of_it(law, mean, square, largest):
    f = torch.randn(4000, 6, 50)
    noise = script.noisy_tokens(f, 0.8, law) - f
    per_token = noise.square().mean(2).sqrt()  # (B, N), each within 1 / sqrt(100) of sigma
    sigma = per_token.square().mean(1).sqrt()
    assert sigma.mean().item() == pytest.approx(mean, rel=0.03)
    assert sigma.square().mean().item() == pytest.approx(square, rel=0.05)
    assert sigma.max() < largest * 1.1
    assert (per_token / sigma[:, None] - 1).abs().mean() < 0.12  # the same for all its tokens
    assert noise.mean().abs() < 5e-3
    assert torch.equal(script.noisy_tokens(f, 0.0, law), f)


# ---- networks --------------------------------------------------------------------------


def test_parameters_of_the_published_networks():
    """DiT S, B, L, XL and DiT^DH by formula, and the two counts in the paper, in millions."""

    def count(n, dim, depth, head_dim=0, head_depth=0, heads=8):
        with torch.device("meta"):
            net = script.DiTDH(16, n, 1000, dim, depth, heads, head_dim, head_depth, 16)
        return sum(p.numel() for p in net.parameters())

    def formula(n, d, depth, heads, D=0, k=0):
        def block(w, heads):
            h = int(8 * w / 3)
            weights = 4 * w * w + 4 * w + 3 * w * h + 2 * h + w + 6 * w * w + 6 * w
            return weights + 2 * w + 2 * (w // heads)  # norms; of queries and keys: not the paper's
        w = D or d
        rest = n * d + d + 512 * d + d + d * d + d + 1001 * d  # latents, time, class
        rest += (d * D + D + n * D + D) if k else 0
        return depth * block(d, heads) + k * block(w, 16) + rest + w + 2 * w * w + 2 * w + w * n + n

    sizes = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
    for d, depth, heads in sizes.values():
        assert count(768, d, depth, heads=heads) == formula(768, d, depth, heads)
        both = count(768, d, depth, 2048, 2, heads)
        assert both == formula(768, d, depth, heads, 2048, 2)
    table, extra = 256 * 1152, 28 * 2 * 72  # the paper counts the fixed table, has no such norms
    assert round((count(384, 1152, 28, heads=16) + table - extra) / 1e6) == 676
    head = count(768, 1152, 28, 2048, 2, 16) + table - extra - 2 * 2 * 128
    assert round(head / 1e6) == 839


def test_decoders_of_the_paper():
    for w, depth, heads, h in ((768, 12, 12, 3072), (1024, 24, 16, 4096), (1152, 28, 16, 4096)):
        with torch.device("meta"):
            net = script.ViTDecoder(16, 768, 16, w, depth, heads, h)
        block = 4 * w * w + 4 * w + 2 * w * h + h + w + 4 * w
        expected = depth * block + 768 * w + w + w + 2 * w + w * 768 + 768
        assert sum(p.numel() for p in net.parameters()) == expected


def test_paper_s_encoder_has_256_tokens_of_768_numbers():
    cfg = script.Config(**script.PRESETS["paper"])
    with torch.device("meta"):
        model = timm.create_model(cfg.encoder[5:], num_classes=0, img_size=224)
    reduction = model.feature_info[-1]["reduction"]
    assert cfg.image_size // cfg.patch * reduction == 224
    assert (model.num_features, model.num_prefix_tokens, reduction) == (768, 5, 14)
    assert model.patch_embed.num_patches == 256
    assert model.forward_features(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 261, 768)


@pytest.mark.parametrize(
    "preset, params", [("paper", 838.39), ("paper-s", 196.36), ("paper-dit", 676.96)]
)
def test_presets_build_the_published_sizes(preset, params):
    cfg, n = script.Config(**script.PRESETS[preset]), 768
    with torch.device("meta"):
        net, decoder = script.build(cfg, n, 1000), script.build_decoder(cfg, n)
        z, y = torch.empty(2, 256, n), torch.zeros(2, dtype=torch.int64)
        assert net(z, torch.empty(2), y).shape == z.shape
        assert decoder(z).shape == (2, 3, 256, 256)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(params, abs=0.01)
    assert sum(p.numel() for p in decoder.parameters()) / 1e6 == pytest.approx(415.06, abs=0.01)
    assert cfg.image_size // cfg.patch * 14 == 224  # what DINOv2 sees
    assert cfg.steps == (14 if preset == "paper-s" else 800) * 1251 and cfg.lr_flat == 40 * 1251
    assert script.shift_factor(256 * n) == pytest.approx(6.93, abs=0.01) and cfg.alpha == 0


def plain_block(block, x, c, table):
    """A block by its weights, c (B, 1, D) or (B, N, D)."""
    norm = lambda m, x: x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * m.weight
    weights = zip(block.modulation.weight.chunk(6), block.modulation.bias.chunk(6))
    a1, b1, g1, a2, b2, g2 = (c @ w.T + b for w, b in weights)
    x = x + g1 * block.attention(norm(block.norm1, x) * (1 + b1) + a1, table)
    return x + g2 * block.mlp(norm(block.norm2, x) * (1 + b2) + a2)


@pytest.mark.parametrize("head", [0, 2])
def test_transformer_against_its_equations_written_out(head):
    net = stir(script.DiTDH(2, 5, 3, 8, 2, 2, 12, head, 3)).double()
    zt, t, y = torch.randn(2, 4, 5, dtype=double), torch.rand(2, dtype=double), torch.tensor([0, 3])
    linear = lambda m, x: x @ m.weight.T + m.bias
    wave = [[f(2 * math.pi * r * u) for f in (math.sin, math.cos) for r in net.rate.tolist()]
            for u in t.tolist()]
    e_t = linear(net.time[2], F.silu(linear(net.time[0], torch.tensor(wave, dtype=double))))
    c = F.silu(e_t + net.label.weight[y])[:, None]
    s = linear(net.embed, zt) + script.position_table(2, 8)
    for block in net.blocks:
        s = plain_block(block, s, c, net.rotary)
    if head:
        c = F.silu(linear(net.condition, F.silu(e_t[:, None] + s)))
        s = linear(net.head_embed, zt)
        for block in net.head_blocks:
            s = plain_block(block, s, c, net.head_rotary)
    a, b = linear(net.modulation, c).chunk(2, -1)
    s = s * (s.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * net.norm.weight
    expected = linear(net.output, s * (1 + b) + a)
    assert torch.allclose(net(zt, t, y), expected, atol=1e-4)
    assert not torch.allclose(net(zt, t, y), net(zt, t, torch.tensor([1, 2])), atol=1e-2)


def test_width_bounds_the_rank_of_the_velocity_and_a_wide_head_does_not():
    """v = B f(A z_t) lies in a d-dimensional affine subspace: at least 1 - d / n of eps is lost."""
    zt, t, y = torch.randn(40, 16, 24), torch.rand(40), torch.randint(0, 3, (40,))
    ranks = {}
    for name, depth, head in (("narrow", 1, 0), ("deep", 3, 0), ("head", 1, 1)):
        net = stir(script.DiTDH(4, 24, 3, 8, depth, 2, 32, head, 2))
        v = net(zt, t, y).detach().flatten(0, 1)
        ranks[name] = torch.linalg.matrix_rank((v - v.mean(0)).double(), rtol=1e-5).item()
    assert ranks == {"narrow": 8, "deep": 8, "head": 24}


def test_decoder_against_its_equations_written_out_and_its_patches():
    net = stir(script.ViTDecoder(2, 5, 2, 8, 2, 2, 12), 0.4).double()
    f = torch.randn(3, 4, 5, dtype=double)
    h = f @ net.embed.weight.T + net.embed.bias + script.position_table(2, 8)
    h = torch.cat([net.extra.expand(3, 1, 8), h], 1)
    norm = lambda x, m: F.layer_norm(x, (8,), m.weight, m.bias, 1e-12)
    for block in net.blocks:
        a, u = block.self_attn, norm(h, block.norm1)
        u = u @ a.in_proj_weight.T + a.in_proj_bias
        q, k, v = u.unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        u = ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)
        h = h + u @ a.out_proj.weight.T + a.out_proj.bias
        u = norm(h, block.norm2) @ block.linear1.weight.T + block.linear1.bias
        u = u * (1 + torch.erf(u / 2**0.5)) / 2
        h = h + u @ block.linear2.weight.T + block.linear2.bias
    h = (norm(h, net.norm) @ net.output.weight.T + net.output.bias)[:, 1:]  # (B, N, 12)
    x = net(f)
    assert x.shape == (3, 3, 4, 4)
    for i in range(4):  # token i is the patch of row i // 2, column i % 2: pixels, then colours
        row, column = 2 * (i // 2), 2 * (i % 2)
        patch = x[:, :, row : row + 2, column : column + 2].permute(0, 2, 3, 1).flatten(1)
        assert torch.allclose(patch, h[:, i], atol=1e-5)
    with torch.no_grad():  # torch has a fast path for this
        assert torch.allclose(net.eval()(f), x, atol=1e-5)


def test_adversarial_parts_against_their_definitions():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 0.2])
    hinge = script.hinge_discriminator(real, fake).item()
    assert hinge == pytest.approx(((0 + 0.5 + 2) / 3 + (0 + 1 + 1.2) / 3) / 2)
    assert script.hinge_generator(fake).item() == pytest.approx(2.8 / 3)
    w = torch.tensor([1.0, -2.0], requires_grad=True)
    lam = script.adaptive_weight((3 * w).sum(), (w * w).sum(), w)
    assert lam.item() == pytest.approx(3 * 2**0.5 / 20**0.5, rel=1e-4) and not lam.requires_grad


# ---- latents ---------------------------------------------------------------------------


class Linear(nn.Module):
    """An encoder with closed-form statistics: patches times a matrix, one channel always 2."""

    def __init__(self, dim=5):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.register_buffer("A", torch.randn(dim, 48, generator=g) * torch.arange(dim)[:, None])
        self.dim = dim

    def forward(self, x):
        return F.unfold(x, 4, stride=4).mT @ self.A.T + 2.0 * (torch.arange(self.dim) == 0)


def test_statistics_are_those_of_the_channels_and_normalisation_inverts():
    cfg = script.Config(image_size=8, batch_size=50, flip=True, seed=4, precision="fp32")
    data, encoder, cpu = few_shapes(cfg, "cpu"), Linear(), torch.device("cpu")
    data.iterator = "of a streamed set"
    latents = script.latent_statistics(encoder, data, cfg, cpu)
    assert not hasattr(data, "iterator")
    f = encoder(data.images.float() / 127.5 - 1).flatten(0, 1).double()
    mean, std = latents.double()
    assert torch.allclose(mean, f.mean(0), atol=1e-4)
    assert torch.allclose(std[1:], f.std(0, correction=0)[1:], rtol=1e-4)
    assert std[0].item() == pytest.approx(0.01) and mean[0] == 2  # a dead channel: floor 1e-4
    z = (f - mean) / std
    assert torch.allclose(z * std + mean, f, atol=1e-9)
    z = z[:, 1:]
    assert z.mean(0).abs().max() < 1e-3 and (z.std(0) - 1).abs().max() < 1e-3
    other = script.dataclasses.replace(cfg, seed=9)
    assert torch.equal(script.latent_statistics(encoder, data, other, cpu), latents)


def test_drawing_undoes_the_normalisation_and_shifts_as_training_does(monkeypatch):
    latents, seen = torch.tensor([[1.0, -2.0, 0.5], [2.0, 0.1, 3.0]]), []
    net = Spy(lambda z, t, y: seen.append(t[0].item()) or z * 0)
    cfg, y = script.Config(image_size=8, patch=4, alpha=0, sampling_steps=4), torch.tensor([0, 4])
    generator = torch.Generator().manual_seed(5)
    f = script.draw(net, None, latents, y, cfg, torch.device("cpu"), generator)
    noise = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(f, noise * latents[1] + latents[0])
    alpha = (4 * 3 / 4096) ** 0.5
    assert seen == pytest.approx([alpha * u / (1 + (alpha - 1) * u) for u in (1, 0.75, 0.5, 0.25)])
    fixed = script.dataclasses.replace(cfg, alpha=3.0)
    script.draw(net, None, latents, y, fixed, torch.device("cpu"), generator)
    assert seen[4:] == pytest.approx([3 * u / (1 + 2 * u) for u in (1, 0.75, 0.5, 0.25)])


def test_held_out_images_do_not_depend_on_seed_or_batch(monkeypatch):
    asked = []
    monkeypatch.setattr(script, "load_images", lambda cfg, *args: asked.append(cfg) or few_shapes(
        cfg, *args))
    cfg = script.Config(image_size=8, batch_size=20)
    one = script.held_out_images(cfg, torch.device("cpu"))
    other = script.dataclasses.replace(cfg, seed=5, flip=True, batch_size=30)
    assert torch.equal(script.held_out_images(other, torch.device("cpu")), one) and len(one) == 256
    # of a streamed set they are what load_images is told
    assert {(c.batch_size, c.seed, c.flip) for c in asked} == {(256, 0, False)}


def test_tokens_are_normalised_and_the_encoder_is_frozen():
    encoder = load_encoder("assets/teacher.safetensors", 2, "plain")
    f = encoder(shapes(8, 8, seed=1)[0].float() / 127.5 - 1)
    assert f.shape == (8, 4, encoder.dim) and not f.requires_grad
    assert f.mean(-1).abs().max() < 1e-4
    assert (f.var(-1, correction=0) - 1).abs().max() < 1e-2


# ---- training --------------------------------------------------------------------------


def lines(folder):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def test_run_resumes_bit_for_bit(same_when_interrupted, small_data):
    same_when_interrupted(script, SMALL, ["model", "ema", "decoder"])
    assert Image.open("whole/samples_0000004.png").size == (12 * 66, 10 * 66)
    assert Image.open("whole/decoder/samples_0000002.png").size == (8 * 66, 2 * 66)
    rows = lines("whole")
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 1e-3, 5.5e-4, 1e-4])  # flat, linear
    assert all(row["grad_norm"] > 0 and math.isfinite(row["loss"]) for row in rows)


def test_first_stage_also_resumes_and_the_second_does_not_notice(
        small_data, same_when_interrupted):
    flags = SMALL + ["--decoder-steps", "6", "--steps", "2"]  # the last stop: between the stages
    same_when_interrupted(script, flags, ["model", "ema"], stops=[("decoder", 3), (".", 0)])
    # 16 epochs in 6 steps: one of warm-up, then a cosine to a tenth in the other fifteen
    epochs = [16 * (i + 1) / 6 for i in range(6)]
    expected = [1e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * (e - 1) / 15)) / 2) for e in epochs]
    assert [row["lr"] for row in lines("whole/decoder")] == pytest.approx(expected)


def test_images_are_read_once_for_both_stages(small_data, monkeypatch, refuses):
    asked = []
    monkeypatch.setattr(script, "load_images", lambda cfg, device, split, *limit: asked.append(
        split) or few_shapes(cfg, device, split))
    script.main(SMALL)
    assert sorted(asked) == ["train", "validation"]
    monkeypatch.setattr(script, "load_images", load_images)  # the first stage has its own batch
    large = SMALL + ["--decoder-batch-size", "50001", "--out", "large"]
    refuses(lambda: script.main(large), "batch size 50001", "50000 images")


def test_second_stage_normalises_drops_labels_shifts_and_clips(small_data, monkeypatch):
    asked = {"z": [], "y": [], "alpha": [], "clip": []}

    def loss(net, z, y, t, real=script.latent_flow_loss):
        asked["z"].append(z)
        asked["y"].append(y)
        return real(net, z, y, t)

    def time(size, law, alpha, device, real=script.flow_time):
        asked["alpha"].append((size, law, alpha))
        return real(size, law, alpha, device)

    def clip(parameters, largest, real=nn.utils.clip_grad_norm_):
        asked["clip"].append(largest)
        return real(parameters, largest)

    monkeypatch.setattr(script, "latent_flow_loss", loss)
    monkeypatch.setattr(script, "flow_time", time)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", clip)
    flags = SMALL + "--batch-size 150 --steps 2 --label-drop 0.5".split()
    script.main(flags + ["--out", "one"])
    z, y = torch.cat(asked["z"]).flatten(0, 1), torch.cat(asked["y"])  # all images, once
    assert z.mean(0).abs().max() < 0.1 and (z.std(0) - 1).abs().max() < 0.1
    kept = y[y < 10].bincount(minlength=10)
    assert 120 < (y == 10).sum() < 180 and kept.min() > 4
    assert asked["alpha"] == [(150, "logit-normal", (4 * z.shape[1] / 4096) ** 0.5)] * 2
    assert asked["clip"] == [1.0] * 2
    other = "--label-drop 0 --alpha 3 --grad-clip 0 --time-law uniform --decoder-dir one/decoder"
    script.main(flags + other.split() + ["--out", "two"])
    assert asked["alpha"][2:] == [(150, "uniform", 3.0)] * 2
    assert (torch.cat(asked["y"][2:]) < 10).all() and asked["clip"][2:] == [math.inf] * 2


def test_lpips_is_added_to_l1_with_weight_one(small_data, monkeypatch):
    asked = []

    def lpips(one, two):
        asked.append((one, two))
        return (one - one.detach()).mean((1, 2, 3), keepdim=True) + 0.7

    monkeypatch.setattr(script, "load_lpips", lambda device: lpips)
    script.main(SMALL + ["--perceptual", "lpips", "--steps", "1", "--out", "run"])
    rows = lines("run/decoder")
    assert all(row["loss"] == pytest.approx(row["l1"] + 0.7) for row in rows)
    x_hat, x = asked[0]
    assert x_hat.requires_grad and x.min() < -0.5 and x.max() <= 1  # in [-1, 1], not [0, 1]
    assert rows[0]["l1"] == pytest.approx((x_hat - x).abs().mean().item() / 2)


def test_runs_share_a_decoder_which_the_second_stage_leaves_alone(small_data, refuses):
    script.main(SMALL + ["--out", "one"])
    shared = ["--decoder-dir", "one/decoder", "--head-depth", "0", "--alpha", "2", "--out", "two"]
    script.main(SMALL + shared)
    script.main(SMALL + shared + ["--fresh"])
    assert not Path("two/decoder").exists()
    first, stage = load_checkpoint("two/last.pt"), load_checkpoint("one/decoder/last.pt")
    assert all(torch.equal(w, first["decoder"][name]) for name, w in stage["ema"].items())
    names = set(first) - {"step", "config", "log", "clock", "code", "found"}
    assert names == {"model", "ema", "opt", "decoder", "latents", "classes"}  # no encoder
    refuses(lambda: script.main(SMALL + shared + ["--tau", "0"]), "tau", "now 0")
    refuses(lambda: script.main(SMALL + ["--out", "one", "--steps", "8"]), "steps 4 (now 8)")


def test_encoder_stays_as_it_is_and_gets_no_gradient(small_data, monkeypatch):
    kept = []

    def load(*args, real=script.load_encoder):
        kept.append(real(*args))
        return kept[-1]

    monkeypatch.setattr(script, "load_encoder", load)
    flags = ["--image-size", "24", "--gan", "0.75", "--steps", "1", "--n", "1"]
    script.main(SMALL + flags)
    fresh = load_encoder("assets/teacher.safetensors", 6, "plain").state_dict()
    assert all(torch.equal(w, fresh[name]) for name, w in kept[0].state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in kept[0].parameters())


def test_adversarial_term_starts_at_half_and_the_critic_sees_clean_8_bit_images(
    small_data, monkeypatch
):
    asked = []

    class Critic(script.PatchGAN):
        def __init__(self):
            super().__init__(8, 2)

        def forward(self, images):
            asked.append((images.detach(), images.requires_grad, self.body[0].weight.requires_grad))
            return super().forward(images)

    weights = []
    monkeypatch.setattr(script, "PatchGAN", Critic)
    monkeypatch.setattr(script, "ema_update", lambda ema, model, *a, real=script.ema_update: (
        weights.append({k: v.clone() for k, v in model.state_dict().items()}),
        real(ema, model, *a)))
    flags = "--image-size 24 --gan 0.75 --decoder-steps 16 --steps 1 --tau 5 --save-every 1"
    script.main(SMALL + flags.split() + ["--out", "run"])
    rows = lines("run/decoder")
    assert [row["w_gan"] > 0 for row in rows] == [False] * 8 + [True] * 8  # epoch 8 of 16
    assert [row["hinge"] > 0 for row in rows] == [False] * 6 + [True] * 10
    for row in rows:
        assert row["loss"] == pytest.approx(row["l1"] + row["w_gan"] * row["adversarial"])
    assert len(asked) == 28  # of a step from 8 on: the decoder's output, real images, decoded anew
    step = 12
    noisy, real, fake = asked[3 * step - 20 : 3 * step - 17]
    assert noisy[1] and not noisy[2] and real[2] and not fake[1]
    for images, *_ in (real, fake):
        assert ((images + 1) * 127.5 - ((images + 1) * 127.5).round()).abs().max() < 1e-4
        assert images.abs().max() <= 1
    net = script.build_decoder(script.Config(**load_checkpoint("run/decoder/last.pt")["config"]),
                               load_encoder("assets/teacher.safetensors", 6).dim)
    net.load_state_dict(weights[step])  # after the decoder's step
    clean = net(load_encoder("assets/teacher.safetensors", 6, "plain")(real[0]))
    assert (clean.clamp(-1, 1) - fake[0]).abs().max() < 0.5 / 127.5 + 1e-4
    assert (noisy[0] - fake[0]).abs().mean() > 0.02  # tau 5: far from it
    critic_opt = load_checkpoint("run/decoder/last.pt")["critic_opt"]
    # it began in epoch 6, with a warm-up of its own: after the tenth of its epochs
    late = 0.1 + 0.9 * (1 + math.cos(math.pi * 9 / 15)) / 2
    assert critic_opt["param_groups"][0]["lr"] == pytest.approx(1e-3 * late)


def test_critic_learns_from_the_sixth_epoch_on(small_data, monkeypatch):
    seen = []
    real_update = script.ema_update

    class Critic(script.PatchGAN):
        def __init__(self):
            super().__init__(8, 2)
            seen.append(self)

    moved, before = [], {}

    def update(ema, model, *args):
        if len(seen) == 1 and isinstance(model, script.ViTDecoder):
            now = seen[0].body[0].weight.detach().clone()
            moved.append("w" in before and not torch.equal(now, before["w"]))
            before["w"] = now
        real_update(ema, model, *args)

    monkeypatch.setattr(script, "PatchGAN", Critic)
    monkeypatch.setattr(script, "ema_update", update)
    flags = "--image-size 24 --gan 0.75 --decoder-steps 16 --steps 1"
    script.main(SMALL + flags.split())
    assert moved == [False] * 6 + [True] * 10


def test_weight_of_the_adversarial_term_makes_its_gradient_a_share_of_the_others():
    net = script.ViTDecoder(6, 8, 4, 16, 1, 2, 32)
    critic, f, x = script.PatchGAN(8, 2), torch.randn(4, 36, 8), torch.rand(4, 3, 24, 24)
    x_hat = net(f)
    rec, adversarial = (x_hat - x).abs().mean() / 2, script.hinge_generator(critic(x_hat))
    w = 0.75 * script.adaptive_weight(rec, adversarial, net.output.weight)
    size = [torch.autograd.grad(v, net.output.weight, retain_graph=True)[0].norm().item()
            for v in (rec, w * adversarial)]
    assert size[1] == pytest.approx(0.75 * size[0], rel=0.02)


def test_sample_uses_ema_decoder_and_latents_of_the_file(small_data, refuses):
    script.main(SMALL + ["--out", "run", "--guidance", "1.5"])
    stage = "run/decoder/last.pt"
    refuses(lambda: script.main(["--sample", stage]), stage, "decoder'")  # it has no other network
    saved = dict(load_checkpoint("run/last.pt"))
    saved["model"] = {k: w * 0 for k, w in saved["model"].items()}  # only the EMA is sampled
    torch.save(saved, "run/other.pt")
    cfg = script.Config(**saved["config"])
    n = saved["latents"].shape[1]
    net, decoder = script.build(cfg, n, 10).eval(), script.build_decoder(cfg, n).eval()
    net.load_state_dict(saved["ema"])
    decoder.load_state_dict(saved["decoder"])
    script.main(["--sample", "run/other.pt", "--n", "20", "--npz", "--out", "s"])
    noise = torch.randn(20, 4, n, generator=next(script.shares(20, 250, 0))[1])
    y, z, alpha = torch.arange(20) % 10, noise, (4 * n / 4096) ** 0.5
    with torch.no_grad():
        for t, then in ((1.0, alpha * 0.5 / (1 + (alpha - 1) * 0.5)), (None, 0.0)):
            t = last if t is None else t
            v, null = (net(z, torch.full((20,), t), k) for k in (y, torch.full((20,), 10)))
            z, last = z + (then - t) * (null + 1.5 * (v - null)), then
        mean, std = saved["latents"]
        expected = script.to_uint8(decoder(z * std + mean)).int()
    with np.load("s/sample.npz") as file:
        assert file["arr_1"].tolist() == y.tolist()
        got = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2).int()
    assert (got - expected).abs().max() <= 1
    assert Image.open("s/sample.png").size == (2 * 66, 10 * 66)


def test_weak_network_guides_and_must_fit(small_data, refuses):
    script.main(SMALL + ["--out", "run"])
    flags = ["--decoder-dir", "run/decoder", "--dim", "8", "--head-depth", "0", "--steps", "2"]
    script.main(SMALL + flags + ["--out", "weak"])
    entries = dict(load_checkpoint("weak/last.pt"))
    entries["ema"] = {k: v + 0.1 for k, v in entries["ema"].items()}
    torch.save(entries, "weak/other.pt")
    draws = {}
    for name, guide in (("own", []), ("none", ["--guidance", "3"]),
                        ("weak", ["--guidance", "3", "--weak", "weak/last.pt"]),
                        ("other", ["--guidance", "3", "--weak", "weak/other.pt"])):
        script.main(["--sample", "run/last.pt", "--n", "10", "--npz", "--out", name] + guide)
        draws[name] = np.load(f"{name}/sample.npz")["arr_0"]
    for one, two in (("own", "weak"), ("weak", "other"), ("none", "other")):
        assert (draws[one] != draws[two]).any()
    guided = ["--sample", "run/last.pt", "--guidance", "3", "--weak"]
    refuses(lambda: script.main(guided[:2] + ["--weak", "weak/last.pt"]), "guidance 1")
    refuses(lambda: script.main(guided + ["none.pt"]), "none.pt")
    latents = entries["latents"]
    torch.save(entries | {"latents": latents + 0.2}, "weak/latents.pt")
    refuses(lambda: script.main(guided + ["weak/latents.pt"]), "weak/latents.pt", "mean")
    entries["config"] = entries["config"] | {"patch": 2}
    torch.save(entries, "weak/patch.pt")
    refuses(lambda: script.main(guided + ["weak/patch.pt"]), "weak/patch.pt", "patch 2")
    entries["config"] = {"views": 2}
    torch.save(entries, "weak/foreign.pt")
    refuses(lambda: script.main(guided + ["weak/foreign.pt"]), "weak/foreign.pt", "views")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--image-size", "9"], ["9", "patch 4"]),
        (["--heads", "3"], ["dim / heads", "multiple of 4"]),
        (["--head-dim", "20"], ["head_dim / head_heads", "20 / 2"]),
        (["--decoder-dim", "12"], ["decoder_dim / decoder_heads"]),
        (["--decoder-steps", "0"], ["decoder_steps", "at least 1"]),
        (["--tau", "-1"], ["tau", "negative"]),
        (["--alpha", "inf"], ["alpha"]),
        (["--ema-decay", "1"], ["ema_decay"]),
        (["--gan", "0.75"], ["image_size 24"]),
        (["--sigma-law", "normal"], ["normal", "half-normal"]),
        (["--time-law", "beta"], ["beta", "uniform"]),
        (["--perceptual", "vgg"], ["vgg", "lpips"]),
        (["--weak", "weak.pt"], ["weak", "guidance 1"]),
        (["--weak", "weak.pt", "--guidance", "2"], ["weak.pt"]),
        (["--encoder", "none.safetensors"], ["none.safetensors", "simsiam.py"]),
        (["--preset", "imagenet"], ["imagenet", "paper-dit"]),
    ],
)
def test_bad_input_ends_with_one_line_and_writes_nothing(flags, words, refuses, small_data):
    refuses(lambda: script.main(SMALL + flags), *words)
    assert not Path("runs").exists()


def test_lpips_without_its_package_says_what_to_install(refuses, small_data, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    refuses(lambda: script.main(SMALL + ["--perceptual", "lpips"]), "lpips")


# ---- the claim's own parts -------------------------------------------------------------


def test_patches_in_the_place_of_an_encoder_are_undone_exactly():
    x = torch.randn(2, 3, 12, 12)
    f = claim.Pixels(4)(x)
    assert f.shape == (2, 9, 48) and torch.equal(claim.Unpatch(4)(f), x)


def test_token_net_is_bounded_by_its_width_and_freed_by_its_head():
    for d, head, rank in ((8, 0, 8), (8, 24, 20)):
        net = stir(claim.TokenNet(20, d, 2, head), 0.5)
        v = net(torch.randn(40, claim.TOKENS, 20), torch.rand(40), None).detach().flatten(0, 1)
        assert torch.linalg.matrix_rank((v - v.mean(0)).double(), rtol=1e-5) == rank


def test_random_encoder_has_the_teacher_s_shape_and_a_seed(tmp_path):
    paths = [tmp_path / f"{name}.safetensors" for name in ("0", "0 again", "1")]
    file, some = claim.ROOT / "assets/teacher.safetensors", shapes(20, 8, seed=1)[0]
    for path in paths:
        claim.random_encoder(path, file, some, 2, seed=int(path.name[0]))
    weights = [load_encoder(str(path), 2, "plain").state_dict() for path in paths]
    teacher = load_encoder("assets/teacher.safetensors", 2, "plain").state_dict()
    assert {k: w.shape for k, w in teacher.items()} == {k: w.shape for k, w in weights[0].items()}
    same = lambda a, b: all(torch.equal(w, b[name]) for name, w in a.items())
    assert same(weights[0], weights[1]) and not same(weights[0], weights[2])


def test_gap_is_what_the_best_linear_denoiser_of_so_many_dimensions_loses():
    """Least squares on samples: full rank, and the best of a lower rank (of its fitted values)."""
    n, count, generator = 5, 400_000, torch.Generator().manual_seed(3)
    normal = lambda *shape: torch.randn(*shape, dtype=double, generator=generator)
    std = torch.tensor([0.2, 0.6, 1.0, 1.4, 2.0], dtype=double)
    turn = torch.linalg.qr(normal(n, n)).Q
    z, eps = normal(count, n) * std @ turn.T, normal(count, n)
    t = torch.tensor([0.15, 0.5, 0.85], dtype=double)
    fitted = []
    for u in t:
        zt, v = (1 - u) * z + u * eps, eps - z
        fitted.append(zt @ torch.linalg.lstsq(zt, v).solution)
    full = sum((fit - (eps - z)).square().sum(1).mean() for fit in fitted) / 3
    moment = sum(fit.T @ fit / count for fit in fitted) / 3
    for width in (1, 3, 5):
        P = torch.linalg.eigh(moment).eigenvectors[:, n - width :]
        narrow = sum((fit @ P @ P.T - (eps - z)).square().sum(1).mean() for fit in fitted) / 3
        gap = claim.linear_gap(std**2, t, width)
        assert gap == pytest.approx((narrow - full).item() / n, abs=4e-3), width


@pytest.mark.parametrize("preset", ["cpu", "gpu"])
def test_arms_differ_and_the_head_costs_what_the_wide_transformer_does(preset):
    seen = {}
    for name, flags in claim.ARMS.items():
        flags = [*flags, *claim.ALSO[preset].get(name, [])]
        cfg = claim.parse(preset, claim.TEACHER, 0, "out", "cpu", flags)
        seen[name] = cfg
    plain = {"random", "pixels"}  # differ in the encoder
    different = {str(cfg) for name, cfg in seen.items() if name not in plain}
    assert len(different) == len(seen) - len(plain)
    assert seen["d 96, deep"].depth == 2 * seen["d 96"].depth
    alphas = [seen[name].alpha for name in claim.SWEEP]
    assert alphas == sorted(set(alphas)) and alphas[0] == 1
    cost = {}
    for name in ("d 192", "d 96 + head", "d 96"):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            side, y = seen[name].image_size // 4, torch.zeros(1, dtype=torch.int64)
            script.build(seen[name], 160, 10)(torch.empty(1, side**2, 160), torch.empty(1), y)
        cost[name] = counter.get_total_flops()
    assert abs(cost["d 96 + head"] / cost["d 192"] - 1) < 0.05
    assert cost["d 96"] < 0.35 * cost["d 192"]


def test_arms_of_the_images_run_on_one_another(tmp_path, monkeypatch):
    few = lambda size, device, split: few_shapes(SimpleNamespace(image_size=size), device, split)
    monkeypatch.setattr(claim, "images", few)
    monkeypatch.setattr(claim, "reference", lambda size, device: (
        judge, claim.statistics(judge, few(size, device, "all").images)))
    flags = SMALL + ["--image-size", "16", "--alpha", "2"]
    monkeypatch.setitem(claim.FLAGS, "cpu", " ".join(flags))
    monkeypatch.setitem(claim.STEPS, "cpu", 2)
    monkeypatch.setitem(claim.COUNT, "cpu", 60)
    monkeypatch.setattr(claim, "start", lambda preset: None)
    judge = claim.load_judge("shapes", 16)
    run = lambda f, *args: f("cpu", *args)
    found = {}
    for tau in (0, 0.8):
        found[tau] = run(claim.decoder_arm, claim.TEACHER, 0, tmp_path / f"{tau}", "cpu",
                         ["--tau", tau])
        assert load_checkpoint(tmp_path / f"{tau}/decoder/last.pt")["config"]["tau"] == tau
    noisy, clean = tmp_path / "0.8", tmp_path / "0"
    arms = {"strong": ("teacher", [], noisy, clean), "pixels": ("pixels", [], None, None),
            "weak": ("teacher", claim.WEAK, noisy, clean)}
    for name, (kind, flags, *decoders) in arms.items():
        found[name] = run(claim.image_arm, kind, claim.TEACHER, 0, tmp_path / name, "cpu", flags,
                          *decoders)
        assert not (tmp_path / name / "decoder").exists()  # it took the one it was given
    assert found["strong"]["rfd"] == pytest.approx(found[0.8]["rfd"], rel=1e-3)
    assert found["pixels"]["rfd"] < found["strong"]["rfd"]  # nothing is lost
    assert found["strong"]["fd"] != found["strong"]["fd_clean"]
    assert found["pixels"]["floor"] == 0 < found["strong"]["loss"]
    for name in ("w 1.00001", "w 2.0"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(claim, "setup", lambda cfg: torch.device("cpu"))  # of auto
    guided = [run(claim.guidance_arm, 0, tmp_path / f"w {w}", "auto", w, tmp_path / "strong",
                  tmp_path / "weak", noisy) for w in (1.00001, 2.0)]
    assert guided[0]["fd"] == pytest.approx(found["strong"]["fd"], rel=1e-2)  # the same noise
    assert guided[1]["fd"] != guided[0]["fd"]


def test_arm_begun_by_other_code_is_not_continued(tmp_path, refuses):
    report = claim.open_report("rae", "", ["--out", "arms", "--results", "results"])
    Path("arms/images_d_192_0").mkdir(parents=True)
    Path("arms/images_d_192_0/code").write_text("another")
    jobs = {("images", "d 192", 0): (claim.shift_arm, 16)}
    refuses(lambda: claim.run(report, None, jobs), "other code", "--reuse")


@pytest.mark.slow
def test_two_ranks_train_both_stages_and_sample_as_one(launch, same_on_two_ranks):
    flags = SMALL + ["--image-size", "24", "--gan", "0.75", "--out", "two"]
    launch(script, *flags, ranks=2)
    assert load_checkpoint("two/last.pt")["step"] == 4
    same_on_two_ranks(script, "--sample", "two/last.pt", "--n", "300", "--precision", "fp32")


@pytest.mark.gpu
def test_compiled_bf16_on_cuda(small_data):
    script.main(SMALL[6:])  # without device, compile and precision
    assert math.isfinite(lines("runs/rae")[-1]["loss"])
