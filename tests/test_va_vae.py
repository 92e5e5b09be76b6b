"""va_vae.py against loops in float64, closed forms, Gaussian flows and interrupted runs."""

import functools
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

import va_vae as script
from common import load_checkpoint, load_encoder, shapes
from tests.claims import va_vae as claim

ROOT = Path(script.__file__).parent
GAN = "--image-size 24 --widths 4,4,8 --gan 0.5 --gan-start 2"
SMALL = """--device cpu --compile off --precision fp32 --image-size 8 --batch-size 8 --steps 4
--tokenizer-steps 4 --tokenizer-batch-size 8 --widths 4,8 --latent-dim 3 --dim 16 --depth 2
--heads 2 --sampling-steps 2 --log-every 1 --save-every 2 --sample-every 4""".split()
double = torch.float64


def few_shapes(cfg, device, split="all", limit=None):
    """1,000 shapes in place of 50,000."""
    images, labels = shapes(1000, cfg.image_size, seed=int(split == "validation"))
    return SimpleNamespace(images=images, labels=labels, classes=10, size=1000)


@pytest.fixture
def small_data(monkeypatch):
    """Few shapes, and few channels in the discriminator."""
    monkeypatch.setattr(script, "load_images", few_shapes)
    monkeypatch.setattr(script, "PatchGAN", functools.partial(script.PatchGAN, 2))


def stir(net, std=0.3):
    """Random weights everywhere, so that nothing is hidden behind a zero."""
    torch.manual_seed(1)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=std)
    return net


# ---- the VF loss and its weight --------------------------------------------------------


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def test_vf_loss_against_loops():
    z, f = torch.randn(2, 5, 4, dtype=double), torch.randn(2, 5, 4, dtype=double)
    for m1, m2 in ((0.0, 0.0), (0.5, 0.25), (0.2, 0.6)):
        mcos = [max(0, 1 - m1 - cosine(z[b, i], f[b, i])) for b in range(2) for i in range(5)]
        mdms = [
            max(0, abs(cosine(z[b, i], z[b, j]) - cosine(f[b, i], f[b, j])) - m2)
            for b in range(2) for i in range(5) for j in range(5)
        ]
        mcos, mdms = sum(mcos) / 10, sum(mdms) / 50
        for terms, value in (("both", mcos + mdms), ("mcos", mcos), ("mdms", mdms)):
            assert script.vf_loss(z, f, m1, m2, terms).item() == pytest.approx(value, rel=1e-9)


def test_vf_loss_is_zero_on_scaled_teacher_features_and_margins_stop_the_gradient():
    f = torch.randn(3, 16, 8, dtype=double)
    assert script.vf_loss(3.7 * f, f, 0.0, 0.0).item() == pytest.approx(0, abs=1e-9)
    assert script.vf_loss(-f, f, 0.0, 0.0, "mcos").item() == pytest.approx(2)
    assert script.vf_loss(-f, f, 0.0, 0.0, "mdms").item() == pytest.approx(0, abs=1e-9)
    z = torch.randn(3, 64, 192, dtype=double)  # unrelated directions of many dimensions
    g = torch.randn(3, 64, 192, dtype=double)
    assert script.vf_loss(z, g, 0.5, 0.25, "mcos").item() == pytest.approx(0.5, abs=0.01)
    near = (f + 0.05 * torch.randn_like(f)).requires_grad_()  # cos near 1
    script.vf_loss(near, f, 0.5, 0.25).backward()
    assert near.grad.abs().max() == 0
    script.vf_loss(near, f, 0.0, 0.0).backward()
    assert near.grad.abs().max() > 0


def test_distance_matrix_is_within_an_image():
    z, f = torch.randn(4, 6, 5), torch.randn(4, 6, 5)
    parts = [script.vf_loss(z[i:i + 1], f[i:i + 1], 0.0, 0.1, "mdms") for i in range(4)]
    assert torch.allclose(script.vf_loss(z, f, 0.0, 0.1, "mdms"), torch.stack(parts).mean())


def tokenizer_losses(scale=1.0):
    """A small tokenizer, its reconstruction loss times scale, and a VF loss."""
    torch.manual_seed(3)
    net = script.Tokenizer(3, [4, 8], 1, teacher_dim=6)
    x, f = torch.rand(4, 3, 8, 8) * 2 - 1, torch.randn(4, 16, 6)
    x_hat, _, z = net(x)
    return net, scale * script.reconstruction_loss(x_hat, x), script.vf_loss(z, f, 0.5, 0.25)


def test_vf_gradient_has_w_hyper_times_the_norm_of_the_reconstruction_s():
    net, rec, vf = tokenizer_losses()
    weight = net.encoder[-2].weight  # the last 3 x 3 convolution, before the 1 x 1 of the moments
    assert weight.shape == (6, 8, 3, 3) and net.encoder[-1].weight.shape == (6, 6, 1, 1)
    w = script.adaptive_weight(rec, vf, weight, 1e8)
    assert not w.requires_grad
    norms = []
    for loss in (rec, 0.1 * w * vf):
        net.zero_grad()
        loss.backward(retain_graph=True)
        norms.append(weight.grad.norm().item())
    assert norms[1] == pytest.approx(0.1 * norms[0], rel=5e-3)  # the 1e-4 in the quotient
    assert w.item() > 10  # sums over an image against a mean
    net, rec, vf = tokenizer_losses(10.0)
    tenfold = script.adaptive_weight(rec, vf, net.encoder[-2].weight, 1e8)
    assert tenfold.item() == pytest.approx(10 * w.item(), rel=1e-4)
    assert script.adaptive_weight(rec, vf, net.encoder[-2].weight, 7.0).item() == 7.0


def test_adaptive_weight_is_the_quotient_of_norms_in_closed_form():
    w = torch.tensor([3.0, -4.0], requires_grad=True)
    a, b = 2 * w.square().sum(), (w * torch.tensor([0.6, 0.8])).sum()  # |4 w| = 20 and 1
    assert script.adaptive_weight(a, b, w).item() == pytest.approx(20 / (1 + 1e-4), rel=1e-6)
    assert script.adaptive_weight(a, 0 * b, w).item() == 1e4  # a vanishing loss hits the ceiling
    assert w.grad is None


def test_vf_loss_reaches_encoder_and_projection_and_neither_decoder_nor_teacher():
    teacher = load_encoder("assets/teacher.safetensors", 4)
    net = script.Tokenizer(3, [4, 8], 1, teacher.dim)
    assert not teacher.training
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    z, f = net(x)[2], teacher(x)
    assert z.shape == f.shape == (2, 16, teacher.dim) and not f.requires_grad
    script.vf_loss(z, f, 0.0, 0.0).backward()
    assert net.project.weight.grad.abs().max() > 0 and net.project.bias is None
    assert net.encoder[0].weight.grad.abs().max() > 0
    assert all(p.grad is None for p in [*net.decoder.parameters(), *teacher.parameters()])
    assert all(not p.requires_grad for p in teacher.parameters())


def test_projection_is_of_the_sample_and_keeps_positions():
    net = script.Tokenizer(3, [4, 8], 1, teacher_dim=5)
    x = torch.rand(2, 3, 8, 8)
    torch.manual_seed(5)
    z_prime = net(x)[2]
    torch.manual_seed(5)
    z = net.posterior(x)[2]
    for i in range(4):
        for j in range(4):
            expected = z[:, :, i, j] @ net.project.weight[:, :, 0, 0].T
            assert torch.allclose(z_prime[:, 4 * i + j], expected, atol=1e-5)


def test_stages_of_the_vf_loss():
    cfg = script.Config(steps=130, vf_stages="100,15,15", w_hyper="0.5,0.1,0.2", m1="0,0,0.5",
                        m2="0,0.1,0.25")
    settings = {step: script.vf_setting(cfg, step) for step in (0, 99, 100, 114, 115, 129)}
    first, second, third = [0.5, 0.0, 0.0], [0.1, 0.0, 0.1], [0.2, 0.5, 0.25]
    assert [*settings.values()] == [first, first, second, second, third, third]
    cfg = script.Config(**script.PRESETS["paper-b"])
    assert script.vf_setting(cfg, 0) == script.vf_setting(cfg, 199_999) == [0.1, 0.5, 0.25]


# ---- tokenizer, discriminator ----------------------------------------------------------


def test_parameter_counts_of_the_paper():
    cfg = script.Config(**script.PRESETS["paper"])
    with torch.device("meta"):
        net, tokenizer = script.build(cfg, 1000)
    count = lambda m: sum(p.numel() for p in m.parameters()) / 1e6
    assert count(tokenizer.encoder) == pytest.approx(28.4, abs=0.05)
    assert count(tokenizer.decoder) == pytest.approx(41.4, abs=0.05)
    assert count(tokenizer) == pytest.approx(69.8, abs=0.05)
    assert count(net) == pytest.approx(675, abs=1) and script.grid_side(cfg) == 16
    # LightningDiT in closed form: attention, MLP, two norms, modulation; ends
    for preset, D, depth in (("paper", 1152, 28), ("paper-b", 768, 12)):
        hidden = int(2 / 3 * 4 * D)
        block = 4 * D * D + 4 * D + 3 * D * hidden + 2 * hidden + D + 2 * D + 6 * D * D + 6 * D
        ends = 33 * D + 257 * D + D * D + D + 1001 * D + D + 2 * D * D + 2 * D + 32 * D + 32
        with torch.device("meta"):
            net, other = script.build(script.Config(**script.PRESETS[preset]), 1000)
        assert sum(p.numel() for p in net.parameters()) == depth * block + ends
        assert count(other) == count(tokenizer)


def test_tokenizer_has_the_shapes_of_its_levels():
    for widths, side in (([4], 16), ([4, 8], 8), ([4, 4, 8], 4)):
        net = script.Tokenizer(5, widths, 2)
        mean, log_var, z = net.posterior(torch.rand(2, 3, 16, 16))
        assert mean.shape == log_var.shape == z.shape == (2, 5, side, side)
        x_hat, _, nothing = net(torch.rand(2, 3, 16, 16))
        assert x_hat.shape == (2, 3, 16, 16) and nothing is None


def test_convolutions_are_local_and_attention_is_not(monkeypatch):
    x = torch.randn(1, 8, 6, 6).requires_grad_()
    for attend in (False, True):
        x.grad = None
        with monkeypatch.context() as patch:  # GroupNorm sees everything
            patch.setattr(script, "norm", lambda channels: torch.nn.Identity())
            stir(script.VAEBlock(8, 8, attend))(x)[0, 0, 0, 0].backward()
        away = x.grad[0, :, 3:, 3:].abs().max().item()
        assert away > 1e-6 if attend else away == 0
        assert x.grad[0, :, 2, 2].abs().max() > 0  # two convolutions of 3 x 3
    a = stir(script.VAEAttention(4))
    y = torch.randn(2, 4, 3, 3)
    h = a.norm(y)
    q, k, v = (F.conv2d(h, w, b).flatten(2) for w, b in zip(a.qkv.weight.chunk(3),
                                                            a.qkv.bias.chunk(3)))
    weights = (q.mT @ k / 2).softmax(-1)  # sqrt(4) = 2
    expected = y + F.conv2d((v @ weights.mT).view_as(y), a.proj.weight, a.proj.bias)
    assert torch.allclose(a(y), expected, atol=1e-5)


def test_posterior_is_sampled_clamped_and_its_kl_is_the_closed_form():
    net = script.Tokenizer(2, [4], 1)
    mean, log_var = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    net.encoder.forward = lambda x: torch.cat([mean, log_var], 1)
    q = torch.distributions.Normal(mean, (log_var / 2).exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1))
    assert net(torch.rand(3, 3, 4, 4))[1].item() == pytest.approx(kl.sum().item() / 3, rel=1e-4)
    z = torch.stack([net.posterior(None)[2] for _ in range(4000)])
    assert torch.allclose(z.mean(0), mean, atol=0.2)
    assert torch.allclose(z.std(0), (log_var / 2).exp(), rtol=0.1)
    log_var = torch.tensor([-100.0, 100.0]).view(1, 2, 1, 1).expand(3, 2, 4, 4)
    assert net.posterior(None)[1].unique().tolist() == [-30, 20]


def test_reconstruction_loss_sums_over_an_image_and_adds_lpips_at_every_pixel():
    x, x_hat = torch.randn(3, 3, 4, 4), torch.randn(3, 3, 4, 4)
    plain = (x - x_hat).abs().sum() / 3
    assert script.reconstruction_loss(x_hat, x).item() == pytest.approx(plain.item(), rel=1e-5)
    lpips = lambda a, b: torch.tensor([0.1, 0.2, 0.6]).view(3, 1, 1, 1)
    value = script.reconstruction_loss(x_hat, x, lpips).item()
    assert value == pytest.approx(plain.item() + 48 * 0.3, rel=1e-5)


def test_psnr_of_known_errors():
    x = torch.zeros(2, 3, 4, 4)
    net = lambda x: (torch.tensor([0.2, 5.0]).view(2, 1, 1, 1).expand_as(x), None)  # 5 is clipped
    cfg, device = script.Config(precision="fp32"), torch.device("cpu")
    x_hat, psnr = script.reconstruct(net, x, cfg, device)
    assert x_hat.max() == 1
    assert psnr == pytest.approx((10 * math.log10(4 / 0.04) + 10 * math.log10(4)) / 2)


def test_discriminator_sees_patches_of_70_pixels():
    critic = script.PatchGAN(8)
    x = torch.randn(2, 3, 128, 128).requires_grad_()
    logits = critic(x)
    assert logits.shape == (2, 1, 14, 14)
    assert sum(p.numel() for p in script.PatchGAN().parameters()) == 2_765_633
    for module in critic.body:  # batch statistics reach everywhere
        if isinstance(module, torch.nn.BatchNorm2d):
            module.forward = lambda x: x
    critic(x)[0, 0, 7, 7].backward()
    rows = x.grad[0].abs().sum((0, 2)).nonzero()[:, 0]
    assert rows[-1] - rows[0] + 1 == 70 and x.grad[1].abs().max() == 0
    assert not list(critic.buffers())


def test_hinge_losses():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0])
    value = script.hinge_discriminator(real, fake).item()
    assert value == pytest.approx(((0 + 0.5 + 2) / 3 + (0 + 1) / 2) / 2)
    assert script.hinge_generator(fake).item() == 1.5


def test_channel_statistics_whiten_each_channel_and_decode_inverts():
    net = script.Tokenizer(3, [4, 8], 1)
    with torch.no_grad():
        net.encoder[-1].weight[1] *= 30
        net.encoder[-1].weight[3:] = 0  # hardly any noise
        net.encoder[-1].bias.copy_(torch.tensor([5.0, -2, 0, -9, -9, -9]))
    cfg = script.Config(image_size=8, batch_size=50, precision="fp32", widths="4,8", latent_dim=3)
    data, device = few_shapes(cfg, None), torch.device("cpu")
    data.iterator = "of an earlier run"
    raw = net.posterior(data.images.float() / 127.5 - 1)[2]
    script.channel_statistics(net, data, cfg, device)
    assert not hasattr(data, "iterator")
    assert torch.allclose(net.shift[:, 0, 0], raw.mean((0, 2, 3)), rtol=0.01)
    assert torch.allclose(net.scale[:, 0, 0], raw.transpose(0, 1).flatten(1).std(1), rtol=0.01)
    z = net.encode(data.images.float() / 127.5 - 1)
    assert z.mean((0, 2, 3)).abs().max() < 0.05
    assert torch.allclose(z.transpose(0, 1).flatten(1).std(1), torch.ones(3), rtol=0.05)
    assert torch.allclose(net.decode((raw - net.shift) / net.scale), net.decoder(raw), atol=1e-4)


# ---- transformer -----------------------------------------------------------------------


def network(**changes):
    arguments = dict(side=4, latent_dim=3, classes=5, dim=24, depth=2, heads=2)
    return script.LightningDiT(**arguments | changes)


def test_output_is_zero_and_the_loss_of_step_0_is_that_of_zero():
    net, x1 = network(), torch.randn(64, 3, 4, 4)
    t, y = torch.rand(64), torch.randint(0, 6, (64,))
    assert net(x1, t, y).detach().abs().max() == 0
    torch.manual_seed(2)
    mse, direction = script.lightning_loss(net, x1, y, t)
    torch.manual_seed(2)
    v = x1 - torch.randn_like(x1)
    assert mse.item() == pytest.approx(v.square().mean().item(), rel=1e-5)
    assert direction.item() == 1
    direction.backward()  # without a bound on 1 / |v_hat| it would be of the order of 1e8
    assert 0 < net.head.weight.grad.norm() < 100


@pytest.mark.parametrize("d", [4, 32])
def test_bound_on_the_direction_leaves_the_mean_velocity_where_it_is(d):
    """v = m + 1.4 N(0, 1), |m| = 0.2, known by m alone: the best v_hat = a m / |m| has a = 0.2, as
    with the square alone. With |v_hat| counted as at least 1 it is 0.6 at d = 32."""
    x1 = math.sqrt(1.4**2 - 1) * torch.randn(40_000, d, 1, 1)
    x1[:, 0] += 0.2
    direction, losses = torch.eye(d)[0].view(1, d, 1, 1), []
    size = torch.arange(0.05, 0.7, 0.05)
    for a in size:
        torch.manual_seed(0)
        net = lambda xt, t, y: (a * direction).expand_as(xt)
        losses.append(sum(script.lightning_loss(net, x1, None, torch.ones(len(x1)))))
    assert size[torch.stack(losses).argmin()].item() == pytest.approx(0.2, abs=0.03)


def test_velocity_loss_against_its_formula_and_the_direction_of_time():
    x1, y = 9 * torch.randn(6, 3, 2, 2), torch.arange(6)
    t = torch.tensor([0.0, 0.1, 0.4, 0.6, 0.9, 1.0])
    output, seen = 5 * torch.randn(6, 3, 2, 2), {}

    def net(z, time, label):
        seen.update(z=z, t=time, y=label)
        return output

    torch.manual_seed(4)
    mse, direction = script.lightning_loss(net, x1, y, t)
    torch.manual_seed(4)
    x0 = torch.randn_like(x1)
    assert torch.equal(seen["z"][0], x0[0]) and torch.equal(seen["z"][5], x1[5])  # 1 is data
    assert torch.allclose(seen["z"][2], 0.4 * x1[2] + 0.6 * x0[2], atol=1e-6)
    assert torch.equal(seen["t"], t) and torch.equal(seen["y"], y)
    v, squares, angles = x1 - x0, [], []
    for b in range(6):
        for i in range(4):
            a, c = output[b].flatten(1)[:, i].double(), v[b].flatten(1)[:, i].double()
            squares.append(((a - c) ** 2).mean().item())
            angles.append(1 - cosine(a, c))
    assert mse.item() == pytest.approx(np.mean(squares), rel=1e-5)
    assert direction.item() == pytest.approx(np.mean(angles), rel=1e-5)
    output = v
    torch.manual_seed(4)
    assert sum(script.lightning_loss(net, x1, y, t)).item() == pytest.approx(0, abs=1e-6)


def test_transformer_knows_position_time_and_class_and_does_not_normalise_queries():
    net = stir(network())
    assert isinstance(net.blocks[0].attention.q_norm, torch.nn.Identity)
    assert not any("q_norm" in name or "k_norm" in name for name, _ in net.named_parameters())
    z, t, y = torch.randn(2, 3, 4, 4), torch.tensor([0.3, 0.3]), torch.tensor([1, 5])
    out = net(z, t, y)
    assert out.shape == z.shape
    assert not torch.allclose(out[0], net(z, t + 0.1, y)[0], atol=1e-4)
    assert not torch.allclose(out[0], net(z, t, torch.tensor([2, 5]))[0], atol=1e-4)
    shifted = net(z.roll(1, -1), t, y).roll(-1, -1)
    assert not torch.allclose(out, shifted, atol=1e-4)
    with torch.no_grad():  # a network that copies: tokens keep their place
        net = network()
        net.embed.weight.copy_(torch.eye(24, 3))
        net.embed.bias.zero_(), net.position.zero_()
        net.head.weight.copy_(torch.eye(3, 24))
        net.norm.forward = lambda x: x
        assert torch.allclose(net(z, t, y), z, atol=1e-6)


# ---- sampler ---------------------------------------------------------------------------


class Gaussian:
    """Velocity of x1 ~ N(mean, std^2) in closed form; remembers when it was asked."""

    classes, mean, std = 7, 0.7, 0.3

    def __init__(self):
        self.times, self.sizes = [], []

    def __call__(self, z, t, y):
        self.times.append(t[0].item())
        self.sizes.append(len(z))
        t = t.view(-1, 1, 1, 1)
        gain = t * self.std**2 / (t**2 * self.std**2 + (1 - t) ** 2)
        x1 = self.mean + gain * (z - t * self.mean)  # E[x1 | z]
        x0 = (1 - t) / (t**2 * self.std**2 + (1 - t) ** 2) * (z - t * self.mean)
        return x1 - x0


@pytest.mark.parametrize("shift", [1.0, 0.3])
def test_euler_converges_with_order_one_to_the_exact_flow(shift):
    noise = torch.randn(200, 1, 2, 2)
    exact, errors = 0.7 + 0.3 * noise, []  # the flow of a Gaussian keeps quantiles
    for n in (50, 100, 200):
        z = script.sample_euler(Gaussian(), noise, torch.zeros(200).long(), n, shift)
        errors.append((z - exact).abs().max().item())
    assert errors[-1] < 0.04
    assert all(1.7 < a / b < 2.3 for a, b in zip(errors, errors[1:])), errors


def test_times_are_shifted_towards_the_noise():
    net = Gaussian()
    script.sample_euler(net, torch.randn(1, 1, 2, 2), torch.tensor([0]), 249, 0.3)
    u = np.arange(249) / 249
    assert len(net.times) == 249  # of 250 points: the last one, t = 1, is not asked
    assert np.allclose(net.times, 0.3 * u / (1 - 0.7 * u), atol=1e-6)
    assert all(a < b for a, b in zip(net.times, net.times[1:])) and net.times[0] == 0
    assert np.mean(np.array(net.times) < 0.11) == pytest.approx(0.29, abs=0.005)
    net = Gaussian()
    script.sample_euler(net, torch.randn(1, 1, 2, 2), torch.tensor([0]), 4, 1.0)
    assert net.times == [0, 0.25, 0.5, 0.75]


def test_guidance_acts_from_its_start_on_and_on_the_first_channels():
    net, y = Gaussian(), torch.zeros(3).long()
    script.sample_euler(net, torch.randn(3, 2, 1, 1), y, 10, 1.0, guidance=3.0, low=0.3)
    doubled = [t for t, n in zip(net.times, net.sizes) if n == 6]
    assert np.allclose(doubled, np.arange(3, 10) / 10)
    assert all(n == 3 for t, n in zip(net.times, net.sizes) if t < 0.29)

    class Count(torch.nn.Module):
        classes = 7

        def forward(self, z, t, y):  # 1 with a class, 0 without
            return (y != 7).float().view(-1, 1, 1, 1).expand_as(z)

    z, t = torch.zeros(2, 4, 1, 1), torch.zeros(2)
    run = lambda *a: script.guided_velocity(Count(), z, t, torch.tensor([3, 4]), *a)
    assert run(2.5).flatten().tolist() == [2.5] * 8  # 0 + 2.5 (1 - 0)
    assert run(2.5, 3)[1].flatten().tolist() == [2.5, 2.5, 2.5, 1]
    assert run(1.0, 3).flatten().tolist() == [1] * 8


# ---- the script ------------------------------------------------------------------------


@pytest.mark.parametrize("extra", ["", "--vf none", GAN])
def test_both_stages_resume_bit_for_bit(extra, small_data, monkeypatch):
    flags = SMALL + extra.split()

    class Stop(Exception):
        pass

    script.main(flags + ["--out", "whole"])
    for stage in ("parts/tokenizer", "parts"):

        def stop(cfg, state, step, real=script.log, **values):
            real(cfg, state, step, **values)
            if step == 2 and cfg.out == stage:
                raise Stop

        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(script, "log", stop)
            script.main(flags + ["--out", "parts"])
        assert load_checkpoint(f"{stage}/last.pt")["step"] == 2
        assert Path("parts/last.pt").exists() == (stage == "parts")
    script.main(flags + ["--out", "parts"])
    for file, parts in (("tokenizer/last.pt", ("model", "ema")),
                        ("last.pt", ("model", "ema", "tokenizer"))):
        one, two = (load_checkpoint(f"{out}/{file}") for out in ("whole", "parts"))
        for part in parts:
            assert all(torch.equal(w, two[part][k]) for k, w in one[part].items()), part
        if "gan" in extra and "tokenizer" in file:
            critic = one["critic"]
            assert all(torch.equal(w, two["critic"][k]) for k, w in critic.items())
    S = 24 if "gan" in extra else 8
    cell = S * max(1, 64 // S) + 2
    assert Image.open("whole/samples_0000004.png").size == (12 * cell, 10 * cell)
    assert Image.open("whole/tokenizer/samples_0000004.png").size == (8 * cell, 2 * cell)
    line = json.loads(Path("whole/tokenizer/metrics.jsonl").read_text().splitlines()[-1])
    assert ("cos" in line) == (extra != "--vf none") and math.isfinite(line["psnr"])


def trained(folder, part="model"):
    return load_checkpoint(f"{folder}/tokenizer/last.pt")[part]


def test_discriminator_begins_at_its_step_and_takes_no_gradient_of_the_generator(
        small_data, monkeypatch):
    flags = SMALL + "--image-size 24 --widths 4,4,8 --vf none --tokenizer-steps 2 --steps 1".split()
    monkeypatch.setattr(script, "channel_statistics", lambda *a: None)
    monkeypatch.setattr(script, "draw", lambda *a: torch.zeros(80, 3, 24, 24))
    script.main(flags + ["--out", "without"])
    script.main(flags + ["--out", "later", "--gan", "0.5", "--gan-start", "3"])
    script.main(flags + ["--out", "from2", "--gan", "0.5", "--gan-start", "2"])
    monkeypatch.setattr(script, "hinge_discriminator", lambda real, fake: 0 * real.mean())
    script.main(flags + ["--out", "frozen", "--gan", "0.5", "--gan-start", "1"])
    torch.manual_seed(0)
    same = lambda a, b: all(torch.equal(w, b[k]) for k, w in a.items())
    assert same(trained("without"), trained("later"))
    assert not same(trained("without"), trained("from2"))
    assert same(trained("later", "critic"), trained("frozen", "critic"))
    assert not same(trained("later", "critic"), trained("from2", "critic"))


def test_tokenizer_descends_the_weighted_sum_of_its_losses(small_data, monkeypatch):
    margins, weights, critics, models, decays = [], [], [], [], set()

    class Enough(Exception):
        pass

    def vf_loss(z_prime, f, m1, m2, terms, real=script.vf_loss):
        assert z_prime.requires_grad and not f.requires_grad
        margins.append((m1, m2, terms))
        return real(z_prime, f, m1, m2, terms)

    def adaptive_weight(reference, loss, parameter, ceiling=1e4):
        weights.append((reference.item(), loss.item(), parameter, ceiling))
        return torch.tensor(3.0)

    def hinge_generator(fake, real=script.hinge_generator):
        critics.append(real(fake).item())
        return real(fake)

    def train_tokenizer(cfg, model, *rest, real=script.train_tokenizer):
        models.append(model)
        real(cfg, model, *rest)
        raise Enough

    def ema_update(ema, model, decay, step):
        decays.add(decay)

    for stand_in in (vf_loss, adaptive_weight, hinge_generator, train_tokenizer, ema_update):
        monkeypatch.setattr(script, stand_in.__name__, stand_in)
    flags = """--image-size 24 --widths 4,4,8 --tokenizer-steps 6 --vf mcos --vf-stages 1,1,1
--w-hyper 0.5,0.2,0.1 --m1 0.05,0.1,0.5 --m2 0.01,0.2,0.25 --kl 0.1 --gan 0.7 --gan-start 4
--tokenizer-ema 0.5 --tokenizer-lr 0.003 --out run""".split()
    with pytest.raises(Enough):
        script.main(SMALL + flags)
    lines = [json.loads(s) for s in Path("run/tokenizer/metrics.jsonl").read_text().splitlines()]
    (model,), expected = models, []
    for i, line in enumerate(lines):
        stage = i // 2
        assert margins[i] == ((0.05, 0.1, 0.5)[stage], (0.01, 0.2, 0.25)[stage], "mcos")
        assert line["w_vf"] == pytest.approx(3 * (0.5, 0.2, 0.1)[stage], rel=1e-5)
        rec, loss = line["rec"] * 3 * 24 * 24, line["w_vf"] * line["vf"]
        expected.append((rec, line["vf"], model.encoder[-2].weight, 1e8))
        if i >= 3:
            expected.append((rec, critics[i - 3], model.decoder[-1].weight, 1e4))
            loss += 0.7 * 3 * critics[i - 3]
        assert line["loss"] == pytest.approx(rec + 0.1 * line["kl"] + loss, rel=1e-4)
    assert len(lines) == 6 and len(critics) == 3 and decays == {0.5}
    for found, (reference, loss, parameter, ceiling) in zip(weights, expected, strict=True):
        assert found[:2] == pytest.approx((reference, loss), rel=1e-4)
        assert found[2] is parameter and found[3] == ceiling
    saved = load_checkpoint("run/tokenizer/last.pt")
    for name in ("opt", "critic_opt"):
        group = saved[name]["param_groups"][0]
        assert group["betas"] == (0.5, 0.9) and group["lr"] == 0.003 and not group["weight_decay"]


def test_transformer_sees_normalised_latents_dropped_labels_and_logit_normal_times(
        small_data, monkeypatch):
    seen, decays = [], []

    def lightning_loss(net, x1, y, t, real=script.lightning_loss):
        mse, direction = real(net, x1, y, t)
        seen.append((x1, y, t))
        return 0 * mse, direction  # it trains the network, too

    def channel_statistics(tokenizer, *rest):
        tokenizer.shift.fill_(50)
        tokenizer.scale.fill_(0.5)

    monkeypatch.setattr(script, "lightning_loss", lightning_loss)
    monkeypatch.setattr(script, "channel_statistics", channel_statistics)
    monkeypatch.setattr(script, "ema_update", lambda ema, model, decay, step: decays.append(decay))
    monkeypatch.setattr(script, "draw", lambda *a: torch.zeros(80, 3, 8, 8))
    flags = """--vf none --batch-size 512 --tokenizer-steps 1 --steps 3 --lr 0.004
--ema-decay 0.8 --tokenizer-ema 0.7 --out run""".split()
    script.main(SMALL + flags)
    x1, y, t = (torch.cat(part) for part in zip(*seen))
    assert x1.shape == (1536, 3, 4, 4) and -120 < x1.mean() < -80  # (z - 50) / 0.5
    assert (y == 10).float().mean().item() == pytest.approx(0.1, abs=0.03)
    assert t.logit().mean().abs() < 0.1 and t.logit().std().item() == pytest.approx(1, abs=0.1)
    saved = load_checkpoint("run/last.pt")
    group = saved["opt"]["param_groups"][0]
    assert group["betas"] == (0.9, 0.95) and group["lr"] == 0.004 and group["weight_decay"] == 0
    assert saved["model"]["head.weight"].abs().max() > 0 and decays == [0.7, 0.8, 0.8, 0.8]


def test_draw_hands_on_the_settings_of_sampling(monkeypatch):
    seen = []

    def sample_euler(net, noise, y, *settings):
        seen.append((noise, y, settings))
        return noise

    monkeypatch.setattr(script, "sample_euler", sample_euler)
    cfg = script.Config(precision="fp32", latent_dim=5, sampling_steps=7, shift=0.4, guidance=3.0,
                        guidance_low=0.15, guidance_channels=2)
    tokenizer = SimpleNamespace(decode=lambda z: 3 * z)
    y, g = torch.tensor([1, 4]), torch.Generator().manual_seed(3)
    images = script.draw(network(), tokenizer, y, cfg, torch.device("cpu"), g)
    (noise, labels, settings), = seen
    assert settings == (7, 0.4, 3.0, 0.15, 2) and torch.equal(labels, y)
    assert torch.equal(noise, torch.randn(2, 5, 4, 4, generator=g.manual_seed(3)))
    assert torch.equal(images, (3 * noise).clamp(-1, 1))


def test_plain_and_aligned_tokenizers_start_from_the_same_weights(small_data, monkeypatch):
    models = []

    class Enough(Exception):
        pass

    def train_tokenizer(cfg, model, *rest):
        models.append(model.state_dict())
        raise Enough

    monkeypatch.setattr(script, "train_tokenizer", train_tokenizer)
    for vf in ("none", "both"):
        with pytest.raises(Enough):
            script.main(SMALL + ["--vf", vf])
    plain, aligned = models
    assert set(aligned) - set(plain) == {"project.weight"}
    assert all(torch.equal(w, aligned[k]) for k, w in plain.items())


def test_a_plain_tokenizer_has_no_projection_and_needs_no_teacher(small_data, refuses):
    flags = SMALL + ["--tokenizer-steps", "1", "--steps", "1"]
    script.main(flags + ["--vf", "none", "--encoder", "no/where", "--out", "plain"])
    assert not any("project" in k for k in trained("plain"))
    refuses(lambda: script.main(flags + ["--encoder", "no/where", "--out", "vf"]), "no/where")
    assert not Path("vf").exists()
    script.main(flags + ["--out", "vf"])
    assert trained("vf")["project.weight"].shape[1:] == (3, 1, 1)
    assert not any("project" in k for k in load_checkpoint("vf/last.pt")["tokenizer"])


def test_training_aligns_the_latent(small_data):
    flags = SMALL + "--tokenizer-steps 60 --tokenizer-lr 0.005 --steps 1 --latent-dim 8".split()
    script.main(flags + ["--out", "vf", "--log-every", "20"])
    lines = [json.loads(s) for s in Path("vf/tokenizer/metrics.jsonl").read_text().splitlines()]
    assert abs(lines[0]["cos"]) < 0.5 < lines[-1]["cos"] and lines[-1]["rec"] < lines[0]["rec"]


def test_sample_uses_ema_tokenizer_and_statistics_of_the_file(small_data, refuses):
    script.main(SMALL + ["--out", "run"])
    stage = "run/tokenizer/last.pt"
    refuses(lambda: script.main(["--sample", stage]), stage, "tokenizer'")  # it has no other one
    saved = load_checkpoint("run/last.pt")
    cfg = script.Config(**saved["config"])
    net, tokenizer = script.build(cfg, 10)
    net.load_state_dict(saved["ema"])
    tokenizer.load_state_dict(saved["tokenizer"])
    assert (tokenizer.scale != 1).all()
    flags = ["--sample", "run/last.pt", "--n", "20", "--npz", "--out", "s", "--guidance", "1"]
    script.main(flags + ["--shift", "1"])
    index, g = next(script.shares(20, 100, 0))
    noise = torch.randn(20, 3, 4, 4, generator=g)
    z = script.sample_euler(net, noise, index % 10, 2, 1.0)
    with torch.no_grad():
        x = tokenizer.decoder(z * tokenizer.scale + tokenizer.shift)
    expected = script.to_uint8(x).permute(0, 2, 3, 1).numpy()
    with np.load("s/sample.npz") as file:
        assert file["arr_1"].tolist() == [*range(10)] * 2
        assert np.abs(file["arr_0"].astype(int) - expected.astype(int)).max() <= 1
    assert Image.open("s/sample.png").size == (2 * 66, 10 * 66)


def test_more_steps_continue_but_another_tokenizer_is_refused(small_data, refuses):
    script.main(SMALL + ["--out", "run", "--steps", "2"])
    before = Path("run/tokenizer/last.pt").stat().st_mtime_ns
    script.main(SMALL + ["--out", "run", "--steps", "3"])
    assert load_checkpoint("run/last.pt")["step"] == 3
    assert Path("run/tokenizer/last.pt").stat().st_mtime_ns == before
    more = SMALL + ["--out", "run", "--tokenizer-steps", "8"]
    refuses(lambda: script.main(more), "tokenizer_steps 4 (now 8)")
    Path("run/last.pt").unlink()
    refuses(lambda: script.main(more), "steps 4 (now 8)")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--widths", "4,6"], ["widths", "multiples of 4"]),
        (["--widths", ""], ["widths"]),
        (["--image-size", "9"], ["image_size 9", "divisible"]),
        (["--gan", "0.5"], ["image_size 8", "24"]),
        (["--heads", "3"], ["multiple of 4"]),
        (["--heads", "0"], ["at least 1"]),
        (["--tokenizer-batch-size", "2000"], ["--tokenizer-batch-size 2000", "1000 images"]),
        (["--m1", "0,0"], ["as many numbers"]),
        (["--w-hyper", "0.5,0,0.1"], ["positive"]),
        (["--m2", "0,0,-1"], ["not negative"]),
        (["--vf", "cos"], ["cos", "mcos"]),
        (["--perceptual", "vgg"], ["vgg", "lpips"]),
        (["--guidance-channels", "4"], ["guidance_channels"]),
        (["--shift", "0"], ["shift > 0"]),
        (["--tokenizer-ema", "1"], ["tokenizer_ema"]),
        (["--tokenizer-steps", "0"], ["at least 1"]),
        (["--kl", "-1"], ["kl", "not be negative"]),
        (["--preset", "imagenet"], ["imagenet", "paper-b"]),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(flags, words, refuses, small_data):
    refuses(lambda: script.main(SMALL + ["--out", "run"] + flags), *words)
    assert not Path("run").exists()


def test_lpips_is_asked_for_by_name(refuses, small_data, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)  # as if it were not installed
    flags = SMALL + ["--out", "run", "--perceptual", "lpips"]
    refuses(lambda: script.main(flags), "--perceptual lpips", "pip install lpips")
    assert not Path("run").exists()


# ---- the claim -------------------------------------------------------------------------


def test_uniformity_of_normal_numbers_in_closed_form():
    """At its own points a normal density in the plane is u^a of its top, u uniform, a = 1 / (1 +
    h^2) with a kernel of width h; directions of three normal numbers have uniform cosines."""
    n, a = 2000, 1 / (1 + 2000 ** (-1 / 3))
    found = claim.uniformity(torch.randn(n, 3, 2, 2), 4)
    assert found["cv"] == pytest.approx(a / math.sqrt(1 + 2 * a), abs=0.02)
    assert found["gini"] == pytest.approx(a / (2 + a), abs=0.02)
    entropy = 1 - (math.log(1 + a) - a / (1 + a)) / math.log(n)
    assert found["entropy"] == pytest.approx(entropy, abs=0.003)
    assert found["pairs"] == pytest.approx(math.log(math.sinh(4) / 4) - 4, abs=0.03)
    sign = torch.tensor([1.0, -1.0]).repeat(n // 2).view(n, 1, 1, 1)  # two opposite directions
    found = claim.uniformity(sign + 1e-3 * torch.randn(n, 3, 1, 1), 1)
    assert found["pairs"] == pytest.approx(math.log((1 + math.exp(-8)) / 2), abs=0.01)


def test_a_linear_map_is_found_and_a_constant_is_not_mistaken_for_it():
    z, W, b = torch.randn(40, 6, 5), torch.randn(5, 7), torch.randn(7)
    found = claim.cosines(z, z @ W + b, 30)
    assert found["cos_fit"] == pytest.approx(1, abs=1e-4) and found["cos_constant"] < 0.9
    f = torch.ones(40, 6, 7) + 0.01 * torch.randn(40, 6, 7)
    found = claim.cosines(z, f, 30)
    assert found["cos_constant"] > 0.999 and found["cos_fit"] < 1 - 1e-6


def test_linear_code_leaves_what_it_does_not_hold():
    signs = torch.tensor([(0.4 * a, 0.1 * b) for a in (1, -1) for b in (1, -1)])
    u, v = torch.linalg.qr(torch.randn(12, 2)).Q.T  # patches of 2 x 2 pixels
    patches = (signs[:, :1] * u + signs[:, 1:] * v).view(4, 1, 12).expand(4, 4, 12)
    images = F.fold(patches.mT, 4, 2, stride=2)
    assert claim.linear_psnr(images, images, 2, 2) > 100
    assert claim.linear_psnr(images, images, 2, 1) == pytest.approx(10 * math.log10(4 * 12 / 0.01))


def test_steps_to_target_is_the_first_checkpoint_that_is_as_good():
    run = {"fd_1000": 9.0, "fd_2000": 5.0, "fd_4000": 6.0, "fd": 3.0, "fd_floor": 0.1}
    for target, share in ((9.5, 0.125), (5.0, 0.25), (4.0, 1.0), (2.0, 2.0)):
        assert claim.steps_to_target(target, run, 8000) == share


def test_random_teacher_has_the_statistics_of_the_images():
    images = shapes(50, 16, 0)[0].float() / 127.5 - 1
    encoder = load_encoder(str(claim.random_teacher(Path("a b/r.safetensors"), images, 4)), 4)
    f = encoder(images)
    encoder.model.train()
    assert torch.allclose(f, encoder(images), rtol=0.02, atol=0.02)
    assert F.cosine_similarity(f, f.mean((0, 1)), dim=-1).mean() < 0.8
    state, trained = encoder.model.state_dict(), load_encoder(claim.TEACHER, 4).model.state_dict()
    assert not any(torch.equal(w, trained[k]) for k, w in state.items() if "conv" in k)


def verdicts(changes, preset="cpu"):
    """What judge_claims says of two seeds that agree with the paper, but for {(arm, metric): v}."""
    plain = dict(psnr=(25.0, 25.1), cos_fit=(0.6, 0.61), probe=(0.3, 0.31), cv=(0.6, 0.61),
                 gini=(0.3, 0.31), entropy=(0.95, 0.951), pairs=(-2.0, -2.01), fd=(30.0, 31.0))
    vf = dict(psnr=(24.6, 24.7), cos_fit=(0.8, 0.81), probe=(0.5, 0.51), cv=(0.5, 0.51),
              gini=(0.2, 0.21), entropy=(0.97, 0.971), pairs=(-3.0, -3.01), fd=(20.0, 21.0),
              cos_start=(0.01, -0.02), cos=(0.7, 0.71), fd_4000=(29.0, 30.0))
    arms = {"d 4 plain": plain | dict(psnr=(20.0, 20.1), fd=(9.0, 9.1)), "d 32 plain": plain,
            "d 4 VF": vf | dict(fd=(9.2, 9.3)), "d 32 VF": vf, "d 64 plain": plain, "d 64 VF": vf,
            "d 16 plain": plain | dict(psnr=(22.0, 22.1), fd=(11.0, 11.1)), "d 16 VF": vf}
    more = dict(zip(claim.ABLATION, ((27.0, 27.1), (24.0, 24.1), (25.0, 25.1))))
    arms |= {name: {"fd": v} for name, v in (more | {"random": (26.0, 26.1)}).items()}
    for (name, metric), v in changes.items():
        arms[name] = arms[name] | {metric: v}
    table = lambda name: {"random": "teacher"}.get(name, "ablation" * name.startswith("with"))
    one = lambda arm, seed: {k: v[seed] for k, v in arm.items()}
    done = {(table(name) or "tokenizers", name): {seed: one(arm, seed) for seed in (0, 1)}
            for name, arm in arms.items()}
    report = {"args": SimpleNamespace(preset=preset), "done": done, "path": Path("r"),
              "json": {"claims": []}}
    claim.judge_claims(report)
    return {row["table"]: row["agrees"] for row in report["json"]["claims"]}


def test_verdicts_know_noise_and_what_the_cost_of_alignment_presupposes():
    agreeing = verdicts({}, "gpu")
    assert len(agreeing) == 8 and set(agreeing.values()) == {"as in the paper"}
    only = lambda table, changes, preset="cpu": verdicts(changes, preset)[table]
    assert only("reconstruction", {("d 32 plain", "psnr"): (25.0, 20.2)}) == "not resolved"
    assert only("reconstruction", {("d 4 plain", "psnr"): (27.0, 27.1)}) == "contradicted"
    assert only("alignment", {("d 32 VF", "psnr"): (20.0, 20.1)}) == "partly"
    little = {("d 4 plain", "psnr"): (24.2, 20.0)}  # one seed gains less than 1 dB from d
    none = {("d 32 VF", "cos"): (0.7, 0.4), ("d 32 VF", "cos_fit"): (0.6, 0.6)}
    assert only("alignment", little) == "partly" and only("alignment", none | little) == (
        "not resolved")
    assert only("probe", {("d 32 VF", "probe"): (0.5, 0.32)}) == "not resolved"
    assert only("uniformity", {("d 32 VF", "pairs"): (-1.0, -1.01)}) == "not resolved"
    assert only("uniformity", {("d 32 VF", "gini"): (0.4, 0.41)}) == "not resolved"
    worse = {"pairs": (-1.0, -1.01), "cv": (0.7, 0.71), "gini": (0.4, 0.41), "entropy": (0.9, 0.91)}
    assert only("uniformity", {("d 32 VF", k): v for k, v in worse.items()}) == "contradicted"
    slow = {("d 64 VF", "fd_4000"): (40.0, 29.0)}
    assert only("convergence", slow, "gpu") == "not resolved"
    slow = {("d 64 VF", k): (40.0, 39.0) for k in ("fd", "fd_4000")}
    assert only("convergence", slow, "gpu") == "contradicted"
    assert only("generation", {("d 4 VF", "fd"): (-5.0, 9.0)}, "gpu") == "partly"
    assert only("ablation", {("without mdms", "fd"): (27.5, 26.0)}, "gpu") == "partly"
    assert only("teacher", {("random", "fd"): (26.0, 20.0)}, "gpu") == "not resolved"


def test_arms_begun_by_other_code_are_refused(refuses):
    report = {"code": "new", "arms": Path("arms"), "args": SimpleNamespace(reuse=False)}
    claim.refuse_older(report, Path("arms/one"), "new")
    refuses(lambda: claim.refuse_older(report, Path("arms/one"), "old"), "arms/one", "--reuse")
    report["args"].reuse = True
    claim.refuse_older(report, Path("arms/one"), "old")


@pytest.mark.slow
def test_two_ranks_train_both_stages_with_a_discriminator():
    flags = [*SMALL, "--image-size", "24", "--gan", "0.5", "--gan-start", "2", "--out", "two"]
    head = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*head, "--", str(ROOT / "va_vae.py"), *flags], capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr
    assert load_checkpoint("two/last.pt")["step"] == 4


@pytest.mark.gpu
def test_compiled_bf16_on_cuda(small_data):
    drop = ("cpu", "fp32", "off", "--device", "--precision", "--compile")
    script.main([f for f in SMALL if f not in drop])
    line = Path("runs/va_vae/metrics.jsonl").read_text().splitlines()[-1]
    assert math.isfinite(json.loads(line)["loss"])
