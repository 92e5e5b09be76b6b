"""consistency_training.py against the numbers of its papers, closed forms and float64."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import consistency_training as script
from common import load_checkpoint

SMALL = ["--device", "cpu", "--compile", "off", "--batch-size", "16", "--steps", "4"]
SMALL += ["--image-size", "8", "--channels", "8", "--widths", "8,8", "--data", "shapes"]
SMALL += ["--log-every", "1", "--edit-steps", "3", "--diffusion-steps", "2"]


class Anything(nn.Module):
    """A network F with large outputs: what the boundary condition must tame."""

    def forward(self, x, c_noise):
        return 100 * torch.sin(7 * x + c_noise.view(-1, 1, 1, 1))


def full(t, n=4):
    return torch.full((n,), t, dtype=torch.float64)


def test_boundary_condition_is_exact_for_any_network():
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(script.consistency(Anything(), x, full(0.002)), x)
    assert torch.equal(script.consistency(Anything(), x, script.karras_grid(1281)[:1]), x)
    far = script.consistency(Anything(), x, full(80.0))
    assert (far - x).abs().max() > 10


def test_preconditioning_is_that_of_the_paper():
    t, x, net = full(1.7), torch.randn(4, 3, 4, 4), Anything()
    c_skip = 0.25 / ((1.7 - 0.002) ** 2 + 0.25)
    c_out = 0.5 * (1.7 - 0.002) / math.sqrt(0.25 + 1.7**2)
    F = net(x / math.sqrt(1.7**2 + 0.25), torch.full((4,), math.log(1.7) / 4))
    assert torch.allclose(script.consistency(net, x, t), c_skip * x + c_out * F, atol=1e-4)


def test_grid_ends_exactly_and_has_the_gaps_of_18_points():
    for N in (2, 11, 18, 1281):
        grid = script.karras_grid(N)
        assert grid[0] == 0.002 and grid[-1] == 80 and (grid.diff() > 0).all() and len(grid) == N
        assert grid.dtype == torch.float64
    gaps = script.karras_grid(18).diff()
    assert gaps.min().item() == pytest.approx(0.00553, abs=5e-6)
    assert gaps.max().item() == pytest.approx(22.41, abs=5e-3)
    i, N, a, b = 5, 18, 0.002 ** (1 / 7), 80 ** (1 / 7)
    assert script.karras_grid(18)[4].item() == pytest.approx((a + (i - 1) / (N - 1) * (b - a)) ** 7)


def test_curricula_have_the_papers_values():
    assert script.count_ct(0, 800) == 2 and script.count_ct(800, 800) == 151
    assert script.count_ct(400, 800) == 107  # the root of (4 + 22801) / 2, rounded up
    mu = [script.target_decay(0.9, 2, N) for N in (2, 151)]  # 0.9 at the start, 0.9986 at the end
    assert mu[0] == pytest.approx(0.9) and mu[1] == pytest.approx(0.9986, abs=5e-5)
    stages = [script.count_ict(k, 400_000) for k in range(0, 400_000, 50_000)]
    assert stages == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert script.count_ict(49_999, 400_000) == 11 and script.count_ict(399_999, 400_000) == 1281
    assert script.count_ict(0, 4) == 11  # fewer steps than stages


def test_pairs_ct_are_neighbours_uniform_over_the_index():
    grid = script.karras_grid(5)
    hi, lo, w = script.pairs_ct(40_000, grid)
    i = torch.searchsorted(grid, hi)
    assert torch.equal(grid[i], hi) and torch.equal(grid[i - 1], lo) and (w == 1).all()
    share = torch.bincount(i, minlength=5)[1:] / 40_000
    assert torch.allclose(share, torch.full((4,), 0.25), atol=0.01)


def test_pairs_ict_have_the_quantiles_and_weights_of_1281_points():
    grid = script.karras_grid(1281)
    hi, lo, w = script.pairs_ict(400_000, grid)
    assert torch.allclose(w, 1 / (hi - lo))
    assert (1 / grid.diff()[0]).item() == pytest.approx(25585, rel=1e-3)
    assert (1 / grid.diff()[-1]).item() == pytest.approx(2.94, abs=0.01)
    level = lo.sort().values
    for q, expected in ((5, 0.013), (25, 0.088), (50, 0.33), (75, 1.27), (95, 8.5)):
        assert level[4000 * q].item() == pytest.approx(expected, rel=0.05), q
    index = torch.searchsorted(grid, hi)
    assert torch.equal(grid[index - 1], lo)


def test_pairs_ect_follow_the_stage_table():
    def ratio(t, stage):  # of the pair whose t is nearest
        hi, lo, _ = script.pairs_ect(200_000, stage)
        i = (hi - t).abs().argmin()
        return (lo[i] / hi[i]).item()

    for stage, expected in enumerate((0.023, 0.512, 0.756, 0.878)):
        assert ratio(2.0, stage) == pytest.approx(expected, abs=3e-3), stage
    hi, lo, w = script.pairs_ect(200_000, 0)
    assert (lo[hi < 1.9] == 0.002).all() and (lo[hi > 2.1] > 0.002).all()
    assert torch.allclose(w, 1 / (hi - lo)) and (hi > lo).all() and hi.dtype == torch.float64
    log = hi.log()
    assert log.mean().item() == pytest.approx(-1.1, abs=0.03)
    assert log.std().item() == pytest.approx(2.0, abs=0.03)
    last, r, _ = script.pairs_ect(100_000, 7)
    inside = (last > 0.1) & (last < 80)
    share = (r / last)[inside]
    assert 0.979 < share.min() and share.max() < 0.9965


def test_distances_have_their_formulas():
    a, b = torch.randn(3, 3, 4, 4), torch.randn(3, 3, 4, 4)
    square, c = (a - b).square().sum((1, 2, 3)), 0.00054 * math.sqrt(48)
    assert torch.allclose(script.distance(a, b), (square + c**2).sqrt() - c)
    assert torch.allclose(script.distance(a, b, "l2"), square / 48)
    assert torch.allclose(script.distance(a, b, "l1"), (a - b).abs().mean((1, 2, 3)))
    same = a.clone().requires_grad_()
    script.distance(same, a).sum().backward()  # no division by zero where the branches agree
    assert torch.equal(same.grad, torch.zeros_like(a))


def small_net(dropout=0.0, **how):
    net = script.UNet(8, 8, [8, 16], 1, 4, dropout)
    for w in net.parameters():  # the ends of residual branches start near 0: wake them
        if w.ndim > 1:
            nn.init.normal_(w, std=0.2)
    return net


def loss(net, target, x, hi=1.0, lo=0.5, **how):
    n = len(x)
    return script.consistency_loss(net, target, x, full(hi, n), full(lo, n), full(1.0, n), **how)


def test_target_gets_no_gradient_and_the_online_branch_the_right_one():
    x, net = torch.randn(4, 3, 8, 8), small_net()
    target = small_net()
    torch.manual_seed(3)
    value = loss(net, target, x)
    value.backward()
    assert all(w.grad is None for w in target.parameters())
    got = torch.cat([w.grad.flatten() for w in net.parameters()])
    net.zero_grad()
    torch.manual_seed(3)
    z = torch.randn_like(x)
    with torch.no_grad():
        b = script.consistency(target, x + 0.5 * z, full(0.5))
    a = script.consistency(net, x + z, full(1.0))
    expected = script.distance(a, b).mean()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(got, torch.cat([w.grad.flatten() for w in net.parameters()]), atol=1e-5)


def test_symmetrised_training_has_the_gradient_of_no_stop_gradient():
    """d(a, sg b) + d(sg a, b) and d(a, b): the same ablation."""
    x, net, grads = torch.randn(4, 3, 8, 8), small_net(), []
    torch.manual_seed(5)
    loss(net, net, x, stop_grad=False).backward()
    grads.append(torch.cat([w.grad.flatten() for w in net.parameters()]))
    net.zero_grad()
    torch.manual_seed(5)
    one = loss(net, net, x)  # trains the noisier side
    torch.manual_seed(5)
    other = loss(net, net, x, hi=0.5, lo=1.0)  # the same z; trains the cleaner side
    (one + other).backward()
    grads.append(torch.cat([w.grad.flatten() for w in net.parameters()]))
    assert torch.allclose(*grads, atol=1e-4 * grads[0].abs().max()) and grads[0].norm() > 1e-2


def test_network_with_dropout_is_not_compiled(monkeypatch):
    """Compiled with gradient and without, it may draw two masks from one seed."""
    seen = []

    def stop(model, cfg, device):
        seen.append(cfg.compile)
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "parallel", stop)
    for dropout in ("0", "0.2"):
        with pytest.raises(KeyboardInterrupt):
            flags = ["--method", "ict", "--compile", "on", "--dropout", dropout, "--out", dropout]
            script.main(SMALL + flags)
    assert seen == ["on", "off"]


def test_branches_share_noise_and_dropout_mask():
    x, net = torch.randn(4, 3, 8, 8), small_net(dropout=0.5)
    assert net.training
    value = loss(net, net, x, hi=1.0, lo=1.0, metric="l1")
    assert value.item() == 0  # equal t: equal outputs, in both modes
    assert loss(net, net, x, hi=1.0, lo=0.99, metric="l1") > 0
    torch.manual_seed(0)
    one = script.consistency(net, x, full(1.0))
    torch.manual_seed(1)
    assert (one - script.consistency(net, x, full(1.0))).abs().max() > 1e-3  # masks there are


def linear_table(N, s=0.5, weight=None, stop_grad=True):
    """1-D data N(0, s^2), f(x, t_n) = a_n x, trained to the fixed point of its loss; a_N T / s.

    With stop-gradient each a follows from its neighbour; without, a quadratic is minimised. Both
    use the moments E[x_hi x_lo] = s^2 + t_hi t_lo, as the pairs of the script have them.
    """
    grid = script.karras_grid(N)
    hi, lo = grid[1:], grid[:-1]
    cross, own_hi, own_lo = s**2 + hi * lo, s**2 + hi**2, s**2 + lo**2
    if stop_grad:
        return ((cross / own_hi).prod() * 80 / s).item()
    w = torch.ones_like(hi) if weight is None else weight(hi, lo)
    A, rhs = torch.zeros(N - 1, N - 1, dtype=torch.float64), torch.zeros(N - 1, dtype=torch.float64)
    for i in range(N - 1):  # unknown a_1 ... a_{N-1}; a_0 = 1
        A[i, i] += w[i] * own_hi[i]
        if i:
            A[i - 1, i - 1] += w[i] * own_lo[i]
            A[i, i - 1] -= w[i] * cross[i]
            A[i - 1, i] -= w[i] * cross[i]
        else:
            rhs[0] += w[0] * cross[0]
    return (torch.linalg.solve(A, rhs)[-1] * 80 / s).item()


def test_linear_table_of_shrinkage():
    for N, ratio in ((11, 0.753), (18, 0.846), (41, 0.931), (151, 0.981), (1281, 0.998)):
        assert linear_table(N) == pytest.approx(ratio, abs=6e-4), N
    steep = lambda hi, lo: 1 / (hi - lo)
    assert linear_table(2500, weight=steep, stop_grad=False) == pytest.approx(0.638, abs=2e-3)
    assert linear_table(1281, stop_grad=False) == pytest.approx(0.302, abs=2e-3)


def test_script_s_loss_has_the_linear_table_as_its_fixed_point():
    """The gradient of consistency_loss in a_hi vanishes at a_lo (s^2 + t t') / (s^2 + t'^2)."""

    class Linear(nn.Module):  # F such that f(x, t) = a(t) x, a given at the two levels
        def __init__(self, hi, a_hi, a_lo):
            super().__init__()
            self.a, self.hi, self.a_lo = nn.Parameter(torch.tensor(a_hi)), hi, a_lo

        def forward(self, x, c_noise):
            t = (4 * c_noise[0].double()).exp().item()
            a = self.a if abs(t - self.hi) < 1e-3 * t else self.a_lo
            s = t - 0.002
            c_skip = 0.25 / (s**2 + 0.25)
            c_out, c_in = 0.5 * s / math.sqrt(0.25 + t**2), 1 / math.sqrt(t**2 + 0.25)
            return (a - c_skip) / c_out / c_in * x

    hi, lo, a_lo = 2.0, 1.5, 0.4
    x = 0.5 * torch.randn(20_000, 3, 4, 4)
    best = a_lo * (0.25 + hi * lo) / (0.25 + hi**2)
    slopes = []
    for a in (best - 0.05, best, best + 0.05):
        net = Linear(hi, a, a_lo)
        torch.manual_seed(1)  # x was drawn with seed 0
        n = len(x)
        script.consistency_loss(net, net, x, full(hi, n), full(lo, n), full(1, n), "l2").backward()
        slopes.append(net.a.grad.item())
    assert slopes[0] < 0 < slopes[2] and abs(slopes[1]) < 0.01 * slopes[2]


def test_single_point_example_of_ict():
    """Data one point xi, f = (eps / s) x + (1 - eps / s) theta: without an EMA the gradient over ds
    is finite and 0 at theta = xi only; with a lagging target it diverges (iCT Sec. 3.2)."""
    eps, xi, s = 0.002, 0.7, 1.0

    def slope(theta, lag, ds):
        theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        z = torch.linspace(-3, 3, 101, dtype=torch.float64)
        f = lambda level, p: eps / level * (xi + level * z) + (1 - eps / level) * p
        gap = f(s + ds, theta) - f(s, theta.detach() - lag)
        gap.square().mean().backward()
        return theta.grad.item() / ds

    for ds in (1e-2, 1e-3, 1e-4):
        assert slope(xi, 0.0, ds) == pytest.approx(0, abs=1e-9)
        assert slope(xi + 0.1, 0.0, ds) == pytest.approx(slope(xi + 0.1, 0.0, 1e-5), rel=0.05)
    assert abs(slope(xi, 0.01, 1e-4)) > 9 * abs(slope(xi, 0.01, 1e-3))


@pytest.mark.parametrize("kind", ["pixels", "luminance", "blocks"])
def test_projectors_are_orthogonal(kind):
    mask = (torch.rand(8, 8) < 0.5).double()
    P = {
        "pixels": lambda y: script.project_pixels(y, mask),
        "luminance": script.project_luminance,
        "blocks": lambda y: script.project_blocks(y, 4),
    }[kind]
    u, v = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)
    assert torch.allclose(P(P(v)), P(v), atol=1e-12) and (P(v) - v).abs().max() > 0.1
    assert (P(u) * v).sum().item() == pytest.approx((u * P(v)).sum().item(), abs=1e-9)


def test_luminance_direction_is_the_paper_s():
    red = torch.tensor([1.0, 0, 0], dtype=torch.float64).view(1, 3, 1, 1)
    q = script.project_luminance(red).flatten() / 0.4471
    assert q.tolist() == pytest.approx([0.4471, 0.8781, 0.1705], abs=2e-4)


class Gaussian(nn.Module):
    """F of the exact consistency function of data N(0, s^2): f(x, t) = x sqrt((s^2 + eps^2) / (s^2
    + t^2)), the endpoint of the probability-flow ODE."""

    def __init__(self, s):
        super().__init__()
        self.s = s

    def forward(self, x, c_noise):
        t = (4 * c_noise.double()).exp().view(-1, 1, 1, 1)
        a = ((self.s**2 + 0.002**2) / (self.s**2 + t**2)).sqrt()
        gap = t - 0.002
        c_skip, c_out = 0.25 / (gap**2 + 0.25), 0.5 * gap / (0.25 + t**2).sqrt()
        return ((a - c_skip) / c_out * (t**2 + 0.25).sqrt() * x.double()).float()


def test_sampler_with_the_exact_function_gives_the_data_in_any_number_of_steps():
    noise = torch.randn(500, 3, 8, 8)
    for taus in ([], [0.8], [2.0, 0.5]):
        g = torch.Generator().manual_seed(1)
        x = script.sample_multistep(Gaussian(0.2), noise, [80.0, *taus], generator=g)
        assert x.std().item() == pytest.approx(0.2, rel=0.01), taus
    assert torch.equal(x, x.clamp(-1, 1)) and x.dtype == torch.float32
    one = script.sample_multistep(Gaussian(0.2), noise, [80.0])
    assert torch.allclose(one, 0.2 * noise, atol=1e-3)


def test_noise_is_added_up_to_the_level_of_each_step():
    """With f = identity (c_skip = 1) the variances add up: T^2, then + tau^2 - eps^2."""
    noise, g = torch.zeros(4000, 3, 4, 4), torch.Generator().manual_seed(1)
    seen = []

    class Watch(nn.Module):
        def forward(self, x, c_noise):
            t = (4 * c_noise[0].double()).exp().item()
            seen.append((t, (x * math.sqrt(t**2 + 0.25)).std().item()))
            gap = t - 0.3
            c_skip, c_out = 0.25 / (gap**2 + 0.25), 0.5 * gap / math.sqrt(0.25 + t**2)
            return -c_skip / c_out * x * math.sqrt(t**2 + 0.25)  # f = 0

    script.sample_multistep(Watch(), noise, [80.0, 2.0, 0.5], t_min=0.3, generator=g)
    for (t, std), level in zip(seen, (80.0, 2.0, 0.5)):
        assert t == pytest.approx(level, rel=1e-5)
        expected = 0 if level == 80 else math.sqrt(level**2 - 0.09)
        assert std == pytest.approx(expected, rel=0.01), level


def test_editing_puts_back_what_is_known_after_every_step():
    known = lambda y: y * torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    y, g, seen = torch.full((2000, 3, 4, 4), 0.5), torch.Generator().manual_seed(1), []

    class Watch(nn.Module):
        def forward(self, x, c_noise):
            t = (4 * c_noise[0].double()).exp().item()
            seen.append((x * math.sqrt(t**2 + 0.25)).mean((0, 2, 3)).tolist())
            gap = t - 0.002
            c_skip, c_out = 0.25 / (gap**2 + 0.25), 0.5 * gap / math.sqrt(0.25 + t**2)
            return (-0.25 - c_skip * x * math.sqrt(t**2 + 0.25)) / c_out  # f = -0.25

    x = script.edit(Watch(), y, known, [1.0, 0.5, 0.25], generator=g)
    assert seen[0] == pytest.approx([0.5, 0, 0], abs=0.02)
    for means in seen[1:]:
        assert means == pytest.approx([0.5, -0.25, -0.25], abs=0.02)
    assert x.mean((0, 2, 3)).tolist() == pytest.approx([0.5, -0.25, -0.25], abs=1e-3)


def test_editing_with_the_exact_function_keeps_what_is_known_and_draws_the_rest():
    mask = (torch.arange(8) < 4).float().expand(8, 8)
    known = lambda y: script.project_pixels(y, mask)
    y, levels = 0.2 * torch.randn(500, 3, 8, 8), script.karras_grid(18).flip(0)[:-1].tolist()
    g = torch.Generator().manual_seed(1)
    x = script.edit(Gaussian(0.2), y, known, levels, generator=g)
    assert torch.allclose(known(x), known(y), atol=1e-6)
    free = x[:, :, :, 4:]
    assert free.std().item() == pytest.approx(0.2, rel=0.02)
    assert (free - y[:, :, :, 4:]).std() > 0.2  # generated, not copied
    colour = script.edit(Gaussian(0.2), y, script.project_luminance, levels, generator=g)
    grey = script.project_luminance
    assert torch.allclose(grey(colour), grey(y), atol=1e-6)


def test_network_is_ddpm_of_55_7_million_and_near_zero_at_the_start():
    cfg = script.Config(**script.PRESETS["paper"])
    with torch.device("meta"):
        net = script.build(cfg)
    assert sum(w.numel() for w in net.parameters()) / 1e6 == pytest.approx(55.7, abs=0.05)
    attention = [b.attention for b in net.encoder]
    assert sum(attention) == 4 and sum(b.attention for b in net.decoder) == 1
    assert [b.attention for b in net.middle] == [True, False]
    net = script.UNet(16, 8, [8, 16], 1, 4)
    x = torch.randn(2, 3, 16, 16)
    out = net(x, torch.randn(2))
    assert out.shape == x.shape and out.abs().max() < 1e-3


def test_features_are_the_middle_of_the_network():
    net, x = small_net(), torch.randn(4, 3, 8, 8)
    seen = []
    net.middle[-1].register_forward_hook(lambda m, i, o: seen.append(o))
    h = script.features(net, x, full(0.5))
    script.consistency(net, x, full(0.5))
    assert h.shape == (4, 16) and torch.allclose(h, seen[1].mean((2, 3)), atol=1e-6)


def test_edm_loss_is_zero_for_the_exact_denoiser_of_one_image():
    x = torch.randn(1, 3, 4, 4).expand(64, 3, 4, 4)

    class Known(nn.Module):
        def forward(self, h, c_noise):
            t = (4 * c_noise.double()).exp().view(-1, 1, 1, 1)
            gap = t - 0.002
            c_skip, c_out = 0.25 / (gap**2 + 0.25), 0.5 * gap / (0.25 + t**2).sqrt()
            return ((x - c_skip * h * (t**2 + 0.25).sqrt()) / c_out).float()

    assert script.edm_loss(Known(), x).item() < 1e-5
    zero = lambda h, c: torch.zeros_like(h)
    torch.manual_seed(0)
    value = script.edm_loss(zero, 0.5 * torch.randn(20_000, 3, 4, 4)).item()
    assert value == pytest.approx(1, rel=0.05)  # c_skip x alone leaves sd^2 t^2 / (sd^2 + t^2)


@pytest.mark.parametrize("method", ["ct", "ict", "ect"])
def test_run_resumes_bit_for_bit(method, same_when_interrupted):
    flags = SMALL + ["--method", method, "--dropout", "0.2", "--save-every", "2"]
    flags += ["--target-ema", "0.9", "--s0", "2"] if method == "ct" else []
    same_when_interrupted(script, flags, ["model", "ema"] + ["target"] * (method == "ct"))
    assert Path("whole/diffusion/last.pt").exists() == (method == "ect")
    assert Image.open("whole/samples_0000004.png").size == (8 * 66, 8 * 66)
    assert Image.open("whole/samples_0000004_edits.png").size == (8 * 66, 7 * 66)
    line = json.loads(Path("whole/metrics.jsonl").read_text().splitlines()[-1])
    assert math.isfinite(line["loss"]) and line["std_ratio"] > 0


def test_ect_starts_from_the_diffusion_model(monkeypatch):
    seen = {}
    real = script.pairs

    def spy(cfg, n, step):
        seen.setdefault(step, True)  # the second stage: its weights stay as they began
        monkeypatch.setattr(torch.optim.RAdam, "step", lambda self: None)
        return real(cfg, n, step)

    monkeypatch.setattr(script, "pairs", spy)
    script.main(SMALL + ["--method", "ect", "--out", "run", "--lr", "0.01"])
    start, end = (load_checkpoint(f"run/{f}last.pt") for f in ("diffusion/", ""))
    assert all(torch.equal(w, end["model"][k]) for k, w in start["ema"].items()) and len(seen) == 4
    torch.manual_seed(0)
    fresh = script.build(script.Config(**end["config"])).state_dict()
    assert any((w - start["ema"][k]).abs().max() > 1e-4 for k, w in fresh.items())


def test_pairs_follow_method_and_step():
    cfg = lambda **how: script.Config(steps=80, **how)
    ect = cfg(method="ect", stages=8)
    assert [script.pairs(ect, 4, k)[3] for k in (0, 9, 10, 79)] == [0, 0, 1, 7]
    assert [script.pairs(cfg(s0=10, s1=40), 4, k)[3] for k in (0, 27, 79)] == [11, 21, 41]
    hi, lo, w, N = script.pairs(cfg(method="ct", s0=2, s1=2), 400, 0)
    assert N == 2 and (hi == 80).all() and (lo == 0.002).all() and (w == 1).all()
    hi, lo, _, N = script.pairs(cfg(method="ct", s0=2, s1=50, t_max=10.0), 400, 79)
    assert N == script.count_ct(79, 80, 2, 50) and hi.max() == 10
    stage = cfg(method="ect", stages=1, q=256.0)
    t, r, _, _ = script.pairs(stage, 4000, 0)
    assert (r / t)[(t > 0.2) & (t < 50)].min() > 0.96


@pytest.mark.parametrize("decays, rates", [(True, [0.4, 0.3, 0.2, 0.1]), (False, [0.4] * 4)])
def test_rate_falls_linearly_if_asked_for(decays, rates, monkeypatch):
    used, real = [], torch.optim.RAdam.step

    def step(opt):
        used.append(opt.param_groups[0]["lr"])
        real(opt)

    monkeypatch.setattr(torch.optim.RAdam, "step", step)
    flag = "--lr-decay" if decays else "--no-lr-decay"
    script.main(SMALL + ["--lr", "0.4", flag, "--out", "run"])
    assert used == pytest.approx(rates)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_target_is_the_moving_average_exactly_when_asked_for(decay, monkeypatch):
    seen = []
    real = script.consistency_loss
    monkeypatch.setattr(
        script, "consistency_loss", lambda *a, **k: (seen.append(a[:2]), real(*a, **k))[1]
    )
    script.main(SMALL + ["--target-ema", str(decay), "--out", "run"])
    for online, target in seen:
        assert (target is not online) == (decay > 0)
    if decay:
        saved = load_checkpoint("run/last.pt")
        mine = dict(seen[-1][1].state_dict())
        assert all(torch.equal(w, mine[k]) for k, w in saved["target"].items())


def test_continued_run_may_not_change_its_steps(refuses):
    script.main(SMALL + ["--out", "run"])
    refuses(lambda: script.main(SMALL + ["--out", "run", "--steps", "8"]), "steps 4 (now 8)")


@pytest.mark.parametrize("widths", ["12,24", "20,20"])
def test_widths_need_not_divide_by_the_number_of_groups(widths):
    cfg = script.Config(image_size=8, channels=48, widths=widths)
    net = script.build(cfg)
    assert net(torch.randn(2, 3, 8, 8), torch.randn(2)).shape == (2, 3, 8, 8)


def test_target_ema_follows_mu_of_the_paper(monkeypatch):
    used = []
    real = script.ema_update
    monkeypatch.setattr(script, "ema_update", lambda *a: (used.append(a[2:]), real(*a)))
    flags = ["--method", "ct", "--s0", "2", "--s1", "150", "--target-ema", "0.9", "--out", "run"]
    script.main(SMALL + flags)
    counts = [script.count_ct(k, 4, 2, 150) for k in range(4)]
    assert [u[0] for u in used[::2]] == pytest.approx([0.9 ** (2 / N) for N in counts])


def test_sample_takes_one_or_more_steps_from_the_ema():
    script.main(SMALL + ["--out", "run"])
    import numpy as np

    saved, levels = load_checkpoint("run/last.pt"), {"": [80.0], "2,0.5": [80.0, 2.0, 0.5]}
    net = script.build(script.Config(**saved["config"])).eval()
    net.load_state_dict({k: w + 0.05 for k, w in saved["ema"].items()})
    torch.save(dict(saved) | {"ema": net.state_dict()}, "run/other.pt")  # outputs of some size
    for taus in levels:
        flags = ["--n", "12", "--npz", "--taus", taus, "--out", "s"]
        script.main(["--sample", "run/other.pt", *flags])
        g = next(script.shares(12, 250, 0))[1]
        noise = torch.randn(12, 3, 8, 8, generator=g)
        expected = script.to_uint8(script.sample_multistep(net, noise, levels[taus], generator=g))
        with np.load("s/sample.npz") as file:
            assert file["arr_0"].shape == (12, 8, 8, 3) and file["arr_0"].dtype == np.uint8
            got = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2).int()
        assert (got - expected.int()).abs().max() <= 1
        levels[taus] = got
    assert not torch.equal(levels[""], levels["2,0.5"])
    assert Image.open("s/sample.png").size == (8 * 66, 2 * 66)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--image-size", "10"], ["10", "divisible by 4"]),
        (["--widths", "8,6"], ["multiples of 4"]),
        (["--lr", "-1"], ["lr"]),
        (["--taus", "nan"], ["t_max > taus"]),
        (["--edit-steps", "1"], ["edit_steps"]),
        (["--no-stop-grad", "--target-ema", "0.9"], ["target_ema"]),
        (["--widths", "a"], ["config"]),
        (["--taus", "0.5,0.8"], ["t_max > taus"]),
        (["--taus", "90"], ["t_max > taus"]),
        (["--method", "sct"], ["sct", "ect"]),
        (["--metric", "huge"], ["huge", "huber"]),
        (["--dropout", "1"], ["dropout", "[0, 1)"]),
        (["--s0", "20", "--s1", "10"], ["s0 <= s1"]),
        (["--q", "1"], ["q^stages"]),
        (["--q", "256"], ["q^stages"]),
    ],
)
def test_bad_input_is_one_line(flags, words, refuses):
    refuses(lambda: script.main(SMALL + flags), *words)
    assert not Path("runs").exists()


def test_lpips_without_its_package_says_what_to_install(refuses, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lpips", None)
    refuses(lambda: script.main(SMALL + ["--metric", "lpips", "--out", "run"]), "lpips", "pip")


def test_both_stages_of_a_streamed_set_start_at_its_beginning(monkeypatch):
    """Else a run that was continued in the second stage would see other images."""
    asked, load = [], script.load_images

    pair = torch.zeros(16, 3, 8, 8, dtype=torch.uint8), torch.zeros(16, dtype=torch.int64)

    def stream(step):
        asked.append(step)
        return itertools.repeat(pair)

    def streamed(cfg, device, split="all", limit=None):
        data = load(cfg, device, split, limit)
        if split == "train":
            data.images, data.stream = None, stream
        return data

    monkeypatch.setattr(script, "load_images", streamed)
    script.main(SMALL + ["--method", "ect", "--out", "run"])
    assert asked == [0, 0]
