"""ddpm_xpred.py against algebra in float64, closed-form samplers and killed runs."""

import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ddpm_xpred as script
from common import load_checkpoint

SMALL = [
    "--image-size",
    "8",
    "--dim",
    "16",
    "--depth",
    "2",
    "--heads",
    "2",
    "--bottleneck",
    "4",
    "--class-start",
    "1",
    "--batch-size",
    "8",
    "--steps",
    "6",
    "--warmup",
    "2",
    "--log-every",
    "2",
    "--save-every",
    "3",
    "--sample-every",
    "100",
    "--sampling-steps",
    "2",
    "--device",
    "cpu",
    "--precision",
    "fp32",
    "--compile",
    "off",
]
BARS = script.noise_schedule()
PROCESSES = {
    "flow": script.flow_matching,
    "ddpm": script.variance_preserving(BARS, "cpu"),
}
SPACES = ("x", "eps", "v")


def triple(process, n=64):
    """t on the chain's grid, x, eps, z and v in float64, v by its definition."""
    t = torch.randint(20, 980, (n,)).double() / 1000
    x, eps = torch.randn(n, 3, 2, 2).double(), torch.randn(n, 3, 2, 2).double()
    if process == "flow":
        a, b = t, 1 - t
        v = (1 + 0 * a).view(-1, 1, 1, 1) * x - eps
    else:
        bar = torch.tensor(
            [
                math.prod(1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(k))
                for k in (1000 - 1000 * t).round().long().tolist()
            ]
        ).double()
        a, b = bar.sqrt(), (1 - bar).sqrt()
        v = b.view(-1, 1, 1, 1) * x - a.view(-1, 1, 1, 1) * eps
    z = a.view(-1, 1, 1, 1) * x + b.view(-1, 1, 1, 1) * eps
    return t, z, dict(zip(SPACES, (x, eps, v))), a, b


# ---- process and conversions -----------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("kind", SPACES)
def test_conversion_of_the_truth_is_the_truth(process, kind):
    t, z, truth, _, _ = triple(process)
    factors = PROCESSES[process](t)
    for name, got in script.convert(kind, truth[kind], z, *factors).items():
        expected = truth[name]
        assert torch.allclose(got, expected, atol=2e-4 if process == "ddpm" else 1e-12)


@pytest.mark.parametrize("process", PROCESSES)
def test_conversions_of_any_output_agree_with_each_other(process):
    t, z, _, _, _ = triple(process)
    factors, o = PROCESSES[process](t), torch.randn(64, 3, 2, 2).double()
    for kind in SPACES:
        all_three = script.convert(kind, o, z, *factors)
        for other, value in all_three.items():
            back = script.convert(other, value, z, *factors)[kind]
            assert torch.allclose(back, o, atol=1e-3 if process == "ddpm" else 1e-9)


def test_flow_velocity_is_the_derivative_of_the_path_and_points_to_the_data():
    t, _, truth, _, _ = triple("flow")
    path = lambda t: sum(
        f * u for f, u in zip(script.flow_matching(t)[:2], (truth["x"], truth["eps"]))
    )
    slope = (path(t + 1e-6) - path(t - 1e-6)) / 2e-6
    assert torch.allclose(slope, truth["v"], atol=1e-8)
    assert torch.equal(path(torch.ones(64).double()), truth["x"])  # t = 1 is data
    a, b, *_ = PROCESSES["ddpm"](torch.tensor([0.0, 0.5, 1.0]))  # the chain's ends, and its middle
    assert a.flatten()[2] == pytest.approx((1 - 1e-4) ** 0.5) and a.flatten()[0] < 0.01  # k = 1, T
    assert torch.allclose(a**2 + b**2, torch.ones(3, 1, 1, 1))


# JiT, section on loss spaces: weight of the squared error of the direct output; flow, then a and b
WEIGHTS = {
    ("x", "x"): lambda a, b: 1,
    ("eps", "x"): lambda a, b: (a / b) ** 2,
    ("v", "x"): lambda a, b: 1 / b**2,
    ("x", "eps"): lambda a, b: (b / a) ** 2,
    ("eps", "eps"): lambda a, b: 1,
    ("v", "eps"): lambda a, b: 1 / a**2,
    ("x", "v"): lambda a, b: b**2,
    ("eps", "v"): lambda a, b: a**2,
    ("v", "v"): lambda a, b: 1,
}


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("space, kind", WEIGHTS)
def test_the_nine_losses_are_weighted_errors_of_the_output(process, space, kind):
    for time in (0.1, 0.3, 0.6, 0.9):
        t = torch.full((32,), time)
        x, o = torch.randn(32, 3, 4, 4), torch.randn(32, 3, 4, 4)
        torch.manual_seed(3)
        loss = script.denoising_loss(
            lambda z, t, y: o, x, None, t, PROCESSES[process], kind, space, 0.0, 0.5
        )
        torch.manual_seed(3)
        eps = 0.5 * torch.randn_like(x)
        if process == "flow":
            a, b, v = time, 1 - time, x - eps
        else:
            a, b = (
                BARS[round(1000 * (1 - time))].sqrt().item(),
                (1 - BARS[round(1000 * (1 - time))]).sqrt().item(),
            )
            v = b * x - a * eps
        direct = (o - {"x": x, "eps": eps, "v": v}[kind]).square().mean()
        assert loss.item() == pytest.approx(WEIGHTS[space, kind](a, b) * direct.item(), rel=2e-3)


@pytest.mark.parametrize("kind", SPACES)
def test_clip_bounds_the_weight_and_a_perfect_output_has_no_loss(kind):
    x, t = torch.randn(16, 3, 2, 2), torch.full((16,), 0.99 if kind == "x" else 0.01)
    torch.manual_seed(3)
    eps = torch.randn_like(x)
    perfect = {"x": x, "eps": eps, "v": x - eps}[kind]
    for off, expected in (
        (0.0, 0.0),
        (0.1, {"x": 4.0, "eps": 4.0, "v": 0.01}[kind]),
    ):  # (0.1 / 0.05)^2
        torch.manual_seed(3)
        net = lambda z, t, y: perfect + off
        loss = script.denoising_loss(net, x, None, t, script.flow_matching, kind, "v", 0.05)
        assert loss.item() == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_the_loss_reaches_the_network_only_through_its_output():
    o = torch.randn(4, 3, 2, 2, requires_grad=True)
    x, t = torch.randn(4, 3, 2, 2), torch.tensor([0.2, 0.5, 0.7, 0.9])
    script.denoising_loss(lambda z, t, y: o, x, None, t, script.flow_matching, "x", "v").backward()
    gradient = 2 * (o.detach() - x) / (1 - t.view(-1, 1, 1, 1)) ** 2 / x.numel()
    assert torch.allclose(o.grad, gradient, rtol=1e-4)


def test_time_law_has_the_quantiles_of_the_paper_and_the_chain_its_own():
    t = script.sample_time(400_000, "logit-normal", -0.8, 0.8, "cpu")
    assert t.median().item() == pytest.approx(1 / (1 + math.exp(0.8)), abs=2e-3)  # 0.31
    assert (t > 0.9).float().mean().item() == pytest.approx(9e-5, abs=5e-5)
    k = ((1 - script.sample_time(400_000, "chain", 0, 1, "cpu")) * 1000).round()
    assert k.min() == 1 and k.max() == 1000 and k.mean().item() == pytest.approx(500.5, abs=2)
    assert len(k.unique()) == 1000
    u = script.sample_time(400_000, "uniform", 0, 1, "cpu")
    assert u.mean().item() == pytest.approx(0.5, abs=2e-3) and u.var().item() == pytest.approx(
        1 / 12, abs=1e-3
    )


# ---- network ---------------------------------------------------------------------------


def network(**changes):
    arguments = (
        dict(
            image_size=8,
            patch=2,
            classes=5,
            dim=24,
            depth=3,
            heads=2,
            bottleneck=6,
            class_tokens=3,
            class_start=1,
        )
        | changes
    )
    return script.JiT(**arguments)


def stir(net, std=0.2):
    """Random weights everywhere, so that nothing is hidden behind a zero."""
    torch.manual_seed(1)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=std)
    return net


@pytest.mark.parametrize(
    "preset, patch, millions",
    [
        ("paper", 16, 131.12),
        ("paper-l", 16, 458.88),
        ("paper-h", 16, 952.51),
        ("paper-g", 16, 2007.1),
        ("paper", 32, 133.19),
        ("paper-l", 32, 461.53),
        ("paper-h", 32, 956.06),
        ("paper-g", 32, 2011.6),
    ],
)
def test_parameter_counts_of_the_paper(preset, patch, millions):
    cfg = script.Config(**script.PRESETS[preset] | {"patch": patch, "image_size": 16 * patch})
    with torch.device("meta"):
        net = script.build(cfg, 1000)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=4e-5)


def test_output_is_zero_and_blocks_are_identities_at_initialisation():
    net = network()
    z, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 5])
    assert net(z, t, y).detach().abs().max() == 0
    h = torch.randn(2, 19, 24)
    assert torch.equal(net.blocks[0](h, torch.randn(2, 24), net.rotary), h)
    assert net.embed[0].weight.detach().abs().max() > 0
    assert net.label.weight.detach().std() == pytest.approx(0.02, rel=0.3)


def test_rotation_keeps_class_tokens_and_depends_on_relative_position():
    table = script.rotary_table(4, 12, prefix=3)
    x = torch.randn(19, 12)
    turned = script.rotate(x, table)
    assert torch.equal(turned[:3], x[:3]) and not torch.allclose(turned[4:], x[4:])
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    table = script.rotary_table(4, 12, prefix=0)
    q, k = (script.rotate(torch.randn(12).expand(16, 12), table) for _ in range(2))
    product = (q @ k.T).view(4, 4, 4, 4)  # query row, column, key row, column
    assert torch.allclose(product[0, 1, 2, 0], product[1, 3, 3, 2], atol=1e-4)  # both (+2, -1)
    assert not torch.allclose(
        product[0, 0, 1, 0], product[0, 0, 0, 1], atol=1e-3
    )  # row is not column


def test_rotation_angles_against_complex_numbers():
    table = script.rotary_table(3, 8, prefix=0)
    x = torch.randn(9, 8)
    pairs = torch.complex(x[:, :4], x[:, 4:])
    for n in range(9):
        row, column = divmod(n, 3)
        angle = torch.tensor([row * 1.0, row / 100.0, column * 1.0, column / 100.0])
        turned = pairs[n] * torch.polar(torch.ones(4), angle)
        expected = torch.cat([turned.real, turned.imag])
        assert torch.allclose(script.rotate(x, table)[n], expected, atol=1e-5)


def test_position_table_and_time_features():
    table = script.position_table(3, 8)
    for n in range(9):
        row, column = divmod(n, 3)
        expected = [
            f(c * r) for c in (column, row) for f in (math.sin, math.cos) for r in (1, 0.01)
        ]
        assert table[n].tolist() == pytest.approx(expected, abs=1e-5)
    f = script.time_features(torch.tensor([0.3]), 4)[0]
    assert f.tolist() == pytest.approx(
        [math.cos(0.3), math.cos(0.003), math.sin(0.3), math.sin(0.003)], abs=1e-6
    )


def test_attention_and_mlp_against_plain_loops():
    a, m = stir(script.Attention(8, 2), 0.5), stir(script.SwiGLU(8), 0.5)
    x, table = torch.randn(1, 4, 8), script.rotary_table(2, 4, 0)
    q, k, v = (x[0] @ a.qkv.weight.T + a.qkv.bias).chunk(3, -1)
    norm = lambda u, w: u / (u.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w
    heads = []
    for h in range(2):
        s = slice(4 * h, 4 * h + 4)
        qh = script.rotate(norm(q[:, s], a.q_norm.weight), table)
        kh = script.rotate(norm(k[:, s], a.k_norm.weight), table)
        heads.append((qh @ kh.T / 2).softmax(-1) @ v[:, s])  # sqrt(head_dim) = 2
    expected = torch.cat(heads, -1) @ a.proj.weight.T + a.proj.bias
    assert torch.allclose(a(x, table)[0], expected, atol=1e-5)
    gate, value = (x @ m.up.weight.T + m.up.bias).chunk(2, -1)
    assert m.down.in_features == 21 and torch.allclose(
        m(x), (gate * gate.sigmoid() * value) @ m.down.weight.T + m.down.bias, atol=1e-9
    )


def test_class_reaches_the_output_by_both_ways_and_tokens_leave_before_the_head():
    z, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([1, 5])
    net = stir(network())
    out = net(z, t, y)
    assert out.shape == z.shape and not torch.allclose(out[1], net(z, t, torch.tensor([1, 2]))[1])
    with torch.no_grad():
        for block in net.blocks:  # cut adaLN: the class is left with its tokens only
            block.modulation.weight.zero_()
        net.modulation.weight.zero_()
    assert not torch.allclose(net(z, t, y)[0], net(z, t, torch.tensor([2, 5]))[0])
    assert torch.equal(net(z, t, y)[0], net(z, t * 0.5, y)[0])  # time has no other way in
    assert stir(network(class_tokens=0))(z, t, y).shape == z.shape


def test_dropout_acts_in_the_middle_half_only():
    net = network(depth=9, dropout=0.3)
    rates = [block.attention.dropout.p for block in net.blocks]
    assert rates == [0, 0, 0.3, 0.3, 0.3, 0.3, 0, 0, 0]  # depth // 4 <= i < 3 * (depth // 4)
    assert [block.mlp.dropout.p for block in net.blocks] == rates


def test_patches_keep_their_place():
    net = network(bottleneck=0, dim=24, patch=2, class_tokens=0)
    z = torch.randn(1, 3, 8, 8)
    with torch.no_grad():  # a network that copies: dim = 24 > 12 = 3 patch^2
        net.embed.weight.copy_(torch.eye(24, 12))
        net.position.zero_()
        net.head.weight.copy_(torch.eye(12, 24))
        net.norm.forward = lambda x: x
    assert torch.allclose(net(z, torch.rand(1), torch.tensor([0])), z, atol=1e-6)


# ---- samplers --------------------------------------------------------------------------


def gaussian_x(z, t, mean, var):
    """E[x | z] for x ~ N(mean, var) and z = t x + (1 - t) eps."""
    return (mean * (1 - t) ** 2 + t * var * z) / ((1 - t) ** 2 + t**2 * var)


@pytest.mark.parametrize("kind", SPACES)
def test_heun_converges_with_order_two_to_the_exact_flow(kind):
    mean, var = 0.7, 0.3**2
    noise = torch.randn(50, 3, 2, 2).double()
    exact = mean + var**0.5 * noise  # the flow of a Gaussian keeps quantiles

    def net(z, t, y):
        t = t.view(-1, 1, 1, 1).double()
        x = gaussian_x(z, t, mean, var)
        return {"x": x, "eps": (z - t * x) / (1 - t), "v": (x - z) / (1 - t)}[kind]

    class Double:  # .float() in the sampler would hide the order
        def __call__(self, z, t, y):
            out = net(z, t, y)
            out.float = lambda: out
            return out

    errors = []
    for n in (40, 80, 160):
        z = script.sample_heun(Double(), noise, None, kind, n, clip=1e-9)
        errors.append((z - exact).abs().max().item())
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    if kind == "eps":  # v = (z - eps) / t at t = 0 is 0 / clip, not E[x] - z: order 1
        assert errors[-1] < 0.01 and min(orders) > 0.8, (errors, orders)
    else:  # one Euler step of local error O(dt^2) leaves the order of Heun
        assert errors[-1] < 2e-3 and all(1.7 < order < 2.6 for order in orders), (errors, orders)


def test_clip_leaves_the_share_of_noise_that_the_paper_s_grid_implies():
    x = torch.tensor(0.4)
    noise = torch.randn(2000, 1, 1, 1)
    perfect = lambda z, t, y: x.expand_as(z)  # the data are one point: x_hat is exact
    z = script.sample_heun(perfect, noise, None, "x", 50, clip=0.05)
    share, dt = 1.0, 0.02  # of z - x, at first noise - x: ds/dt = -s / max(1 - t, 0.05)
    slope = lambda s, i: -s / max(1 - i * dt, 0.05)
    for i in range(49):
        first = slope(share, i)
        share += dt * (first + slope(share + dt * first, i + 1)) / 2
    share += dt * slope(share, 49)
    assert share == pytest.approx(0.0171, abs=1e-4)
    assert torch.allclose(z - x, share * (noise - x), atol=1e-5)
    assert (script.sample_heun(perfect, noise, None, "x", 50, clip=1e-9) - x).abs().max() < 1e-5


class Count(torch.nn.Module):
    """Answers 1 to a class and 0 to no class; remembers when it was asked."""

    classes = 7

    def forward(self, z, t, y):
        self.seen = getattr(self, "seen", []) + [(round(t[0].item(), 4), len(z), y.tolist())]
        return (y != self.classes).float().view(-1, 1, 1, 1).expand_as(z)


def test_guidance_mixes_with_the_null_class_inside_its_interval_only():
    net, z, y = Count(), torch.zeros(2, 1, 1, 1), torch.tensor([3, 4])
    assert script.guided(net, z, torch.full((2,), 0.5), y, 3.0).flatten().tolist() == [
        3.0,
        3.0,
    ]  # 0 + 3 (1 - 0)
    assert net.seen[-1][2] == [3, 4, 7, 7] and script.guided(
        net, z, torch.full((2,), 0.5), y, 1.0
    ).flatten().tolist() == [1, 1]
    net = Count()
    script.sample_heun(net, z, y, "v", 10, 3.0, low=0.1, high=0.6)
    doubled = sorted({t for t, n, _ in net.seen if n == 4})
    assert doubled == [0.2, 0.3, 0.4, 0.5]  # above 0.1 and below 0.6
    assert len(net.seen) == 19 and max(t for t, *_ in net.seen) == 0.9  # 9 Heun steps and one Euler
    net = Count()
    script.sample_heun(net, z, y, "v", 10, 3.0, low=0.0, high=0.6)
    assert sorted({t for t, n, _ in net.seen if n == 4})[0] == 0.0  # 0: from the start


def test_guidance_of_the_output_is_guidance_of_the_velocity():
    z, w = torch.randn(4, 3, 2, 2), 2.5
    factors = script.flow_matching(torch.full((4,), 0.3))
    for kind in SPACES:
        o, null = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
        v, v_null = (script.convert(kind, u, z, *factors, 0.05)["v"] for u in (o, null))
        mixed = script.convert(kind, null + w * (o - null), z, *factors, 0.05)["v"]
        assert torch.allclose(mixed, v_null + w * (v - v_null), atol=1e-4)


@pytest.mark.parametrize("kind", SPACES)
def test_ancestral_sampler_follows_the_product_of_two_gaussians(kind, monkeypatch):
    """Data N(0, var) per pixel: variance of every step by multiplying densities, not by Eq. 7."""
    bars, var = script.noise_schedule(8, 0.05, 0.5), 0.2**2
    a, b = bars.sqrt(), (1 - bars).sqrt()

    def net(z, t, y):
        k = round((1 - t[0].item()) * 8)
        x = a[k] * var / (a[k] ** 2 * var + b[k] ** 2) * z.double()
        eps = (z - a[k] * x) / b[k]
        return {"x": x, "eps": eps, "v": b[k] * x - a[k] * eps}[kind].float()

    noise = torch.randn(20000, 1, 1, 1)
    z = script.sample_ancestral(
        net, noise, None, bars, kind, generator=torch.Generator().manual_seed(1)
    )
    variance = 1.0
    for k in range(8, 0, -1):
        gain = a[k] * var / (a[k] ** 2 * var + b[k] ** 2)  # x_hat = gain z
        step = bars[k] / bars[k - 1]  # z_k | z_{k-1} ~ N(sqrt(step) z_{k-1}, 1 - step)
        if k == 1:  # z_0 = x_hat, no noise
            variance = gain**2 * variance
            continue
        precision = step / (1 - step) + 1 / (
            1 - bars[k - 1]
        )  # q(z_{k-1} | z_k, x): both are Gaussian
        factor = (step.sqrt() / (1 - step) + a[k - 1] / (1 - bars[k - 1]) * gain) / precision
        variance = factor**2 * variance + 1 / precision
    assert (
        z.var().item() == pytest.approx(float(variance), rel=0.03) and abs(z.mean().item()) < 0.01
    )


def test_ancestral_sampler_clamps_x_and_ends_without_noise():
    far = lambda z, t, y: torch.full_like(z, 5.0)
    z = script.sample_ancestral(
        far, torch.randn(4, 3, 2, 2), None, script.noise_schedule(5, 0.1, 0.5), "x"
    )
    assert torch.allclose(z, torch.ones_like(z), atol=1e-5)


def test_schedule_is_that_of_ho_et_al():
    assert len(BARS) == 1001 and BARS[0] == 1 and BARS[1].item() == pytest.approx(1 - 1e-4)
    assert BARS[1000].item() == pytest.approx(4.0358e-5, rel=1e-3)


# ---- the script ------------------------------------------------------------------------


def weights(folder):
    return load_checkpoint(Path(folder, "last.pt"))["ema"]


def assert_same(one, two):
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("kind", SPACES)
def test_end_to_end_and_three_plus_three_steps_equal_six(process, kind, monkeypatch):
    monkeypatch.setattr(
        script, "noise_schedule", functools.partial(script.noise_schedule, 20, 1e-3, 0.4)
    )
    flags = SMALL + ["--process", process, "--prediction", kind, "--loss", "eps"]
    script.main(flags + ["--out", "whole"])
    script.main(flags + ["--out", "parts", "--steps", "3"])
    script.main(flags + ["--out", "parts"])
    assert_same(weights("whole"), weights("parts"))
    last = json.loads(Path("whole/metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 6 and math.isfinite(last["loss"]) and last["lr"] == 1e-3
    assert Image.open("whole/samples_0000006.png").size == (8 * 66, 10 * 66)


def test_sample_uses_the_checkpoint_s_config_and_the_ema(monkeypatch):
    script.main(SMALL + ["--out", "run"])
    script.main(
        ["--sample", "run/last.pt", "--n", "30", "--npz", "--device", "cpu", "--precision", "fp32"]
    )
    with np.load("run/sample.npz") as file:
        first, labels = file["arr_0"], file["arr_1"]
    assert first.shape == (30, 8, 8, 3) and labels.tolist() == [i % 10 for i in range(30)]
    script.main(["--sample", "run/last.pt", "--n", "30", "--npz", "--out", "new/a", "--seed", "1"])
    assert (np.load("new/a/sample.npz")["arr_0"] != first).any()
    entries = dict(load_checkpoint("run/last.pt"))
    entries["model"] = {k: v * 0 for k, v in entries["model"].items()}  # only the EMA is sampled
    torch.save(entries, "run/other.pt")
    script.main(
        ["--sample", "run/other.pt", "--n", "30", "--npz", "--device", "cpu", "--precision", "fp32"]
    )
    assert (np.load("run/sample.npz")["arr_0"] == first).all()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--image-size", "9"], ["9", "patch 4"]),
        (["--heads", "3"], ["multiple of 4"]),
        (["--prediction", "noise"], ["noise", "eps"]),
        (["--loss", "l1"], ["l1", "eps"]),
        (["--process", "vp"], ["vp", "ddpm"]),
        (["--time", "cosine"], ["cosine", "uniform"]),
        (["--class-start", "2"], ["class_start 2"]),
        (["--process", "ddpm", "--noise-scale", "2"], ["noise_scale"]),
        (["--prediction", "eps", "--clip", "0"], ["clip"]), (["--clip", "1"], ["clip"]),
        (["--patch", "0"], ["patch"]),
        (["--batch-size", "60000"], ["60000", "50000"]),
        (["--data", "no/where"], ["no/where", "shapes"]),
        (["--preset", "imagenet"], ["imagenet", "cifar10"]),
        (["--wat"], ["--wat"]),
    ],
)
def test_bad_input_ends_with_one_line_and_writes_nothing(flags, words, refuses):
    refuses(lambda: script.main(SMALL + ["--out", "run"] + flags), *words)
    assert not Path("run").exists()


def test_bad_checkpoints_to_sample(refuses):
    script.main(SMALL + ["--out", "run", "--steps", "1"])
    refuses(lambda: script.main(["--sample", "run/last.pt", "--dim", "32"]), "dim")
    refuses(lambda: script.main(["--sample", "run/none.pt"]), "none.pt")
    Path("run/cut.pt").write_bytes(Path("run/last.pt").read_bytes()[:1000])
    refuses(lambda: script.main(["--sample", "run/cut.pt"]), "cut.pt", "truncated")
    entries = dict(load_checkpoint("run/last.pt"))
    entries["config"] = entries["config"] | {"views": 2}
    torch.save(entries, "run/foreign.pt")
    refuses(lambda: script.main(["--sample", "run/foreign.pt"]), "views")


@pytest.mark.slow
def test_two_ranks_train_as_one_sample_as_one_and_stop_together(launch, same_on_two_ranks):
    flags = SMALL + ["--process", "flow"]
    launch(script, *flags, "--out", "two", ranks=2)
    same_on_two_ranks(script, "--sample", "two/last.pt", "--n", "600")
    launch(script, *flags, "--out", "odd", "--batch-size", "7", ranks=2,
           fails="divisible by the 2 ranks")


@pytest.mark.gpu
def test_compiled_bf16_on_cuda():
    script.main(
        [
            f
            for f in SMALL
            if f not in ("cpu", "fp32", "off", "--device", "--precision", "--compile")
        ]
    )
    assert math.isfinite(
        json.loads(Path("runs/ddpm_xpred/metrics.jsonl").read_text().splitlines()[-1])["loss"]
    )
