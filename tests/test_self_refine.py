"""self_refine.py against closed forms, the authors' convention in sigma, and itself."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import self_refine as script
from common import bouncing_balls, load_checkpoint
from tests.claims import self_refine as claim

SMALL = (
    "--image-size 8 --batch-size 6 --clips 12 --steps 4 --warmup 2 --log-every 2 --save-every 2 "
    "--sample-every 100 --frames 4 --components 6 --dim 16 --depth 1 --heads 2 --n 3 "
    "--sampling-steps 3 --plan 0.3-0.7:2 --device cpu --precision fp32 --compile off"
).split()
f64 = dict(dtype=torch.float64)


def seeds(n, base=0):
    return [torch.Generator().manual_seed(base + i) for i in range(n)]


def gaussian(mean=0.7, var=0.3**2, counter=None):
    """The exact velocity for data N(mean, var): E[z1 - z0 | z]."""

    def velocity(z, t):
        if counter is not None:
            counter.append(t)
        a, b = t, 1 - t
        x = (mean * b**2 + a * var * z) / (b**2 + a**2 * var)  # E[z1 | z]
        return (x - z) / b

    return velocity


def curved(z, t):
    """Some velocity that depends on everything, within a clip."""
    return torch.sin(3 * z + t) + z.mean((1, 2, 3, 4), keepdim=True) - z.roll(1, 2) * t


# ---- flow matching is a denoising autoencoder ------------------------------------------


def test_flow_loss_is_the_weighted_loss_of_a_denoising_autoencoder():
    z1, t = torch.randn(5, 3, 4, 2, 2, **f64), torch.rand(5, **f64)
    net = lambda z, t, y: SimpleNamespace(float=lambda: curved(z, 0.3))  # stays in float64
    torch.manual_seed(7)
    loss = script.flow_loss(net, z1, None, t, given=0)
    torch.manual_seed(7)
    z0, t5 = torch.randn_like(z1), t.view(-1, 1, 1, 1, 1)
    z = (1 - t5) * z0 + t5 * z1
    x = z + (1 - t5) * curved(z, 0.3)
    expected = ((x - z1).square() / (1 - t5) ** 2).mean()  # Eq. 3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_flow_loss_shows_the_given_frames_clean_and_leaves_them_out():
    z1, t, seen = torch.randn(2, 3, 5, 2, 1), torch.tensor([0.1, 0.9]), []
    o = torch.zeros(2, 3, 5, 2, 1, requires_grad=True)

    def net(z, times, y):
        seen.append((z, times))
        return o

    torch.manual_seed(7)
    loss = script.flow_loss(net, z1, None, t, given=2)
    loss.backward()
    torch.manual_seed(7)
    z0 = torch.randn_like(z1)
    assert torch.equal(seen[0][0][:, :, :2], z1[:, :, :2]) and torch.equal(seen[0][1], t)
    assert torch.allclose(seen[0][0][1, :, 2:], 0.9 * z1[1, :, 2:] + 0.1 * z0[1, :, 2:])
    assert o.grad[:, :, :2].abs().max() == 0
    target = (z1 - z0)[:, :, 2:]
    assert torch.allclose(o.grad[:, :, 2:], -2 * target / target.numel(), atol=1e-7)


# ---- the sampler -----------------------------------------------------------------------


def test_times_are_the_shifted_noise_levels_and_windows_pick_steps():
    for shift in (1.0, 3.0, 5.0, 12.0):
        times = script.flow_times(40, shift)
        for i, t in enumerate(times):
            q = 1 - i / 40
            assert 1 - t == pytest.approx(shift * q / (1 + (shift - 1) * q), abs=1e-12)
        assert times[0] == 0 and times[-1] == 1
    spec = {1: 0.33, 3: 0.14, 5: 0.09, 12: 0.04}  # step 13 of 40
    for shift, t in spec.items():
        assert script.flow_times(40, shift)[13] == pytest.approx(t, abs=6e-3)
    cfg = script.Config(**script.PRESETS["wan"])
    plan = script.plan_steps(script.parse_plan(cfg.plan), script.flow_times(40, 3.0))
    assert plan == {i: 3 if i < 6 else 1 for i in range(2, 14)} and sum(plan.values()) == 20
    times = script.flow_times(20)
    assert list(script.plan_steps([(0.2, 0.4, 2)], times)) == [4, 5, 6, 7]  # low in, high out
    every = script.plan_steps([(0.0, 1.0, 1)], times)
    assert list(every) == list(range(1, 20))  # never at t = 0 or 1
    assert script.plan_steps([], times) == {}
    for windows in ([(0.2, 0.4, 2), (0.41, 0.44, 1)], [(0.0, 0.05, 1)], [(0.96, 1.0, 1)]):
        with pytest.raises(ValueError, match="no step after t = 0 lies in"):
            script.plan_steps(windows, times)


def test_without_a_plan_it_is_euler_bit_for_bit_and_converges_to_the_exact_flow():
    z0, times = torch.randn(3, 2, 4, 3, 1), script.flow_times(7, 2.0)
    got, U = script.pnp_sample(curved, z0, times, {}, seeds(3))
    z = z0
    for t, t_next in zip(times, times[1:]):
        z = z + (t_next - t) * curved(z, t)
    assert torch.equal(got, z) and not U
    z0, errors = torch.randn(50, 1, 1, 1, 1, **f64), []
    for n in (50, 100, 200):
        z, _ = script.pnp_sample(gaussian(), z0, script.flow_times(n), {}, [])
        errors.append((z - (0.7 + 0.3 * z0)).abs().max().item())  # the flow keeps quantiles
    assert errors[-1] < 0.02
    assert all(1.8 < a / b < 2.2 for a, b in zip(errors, errors[1:]))  # order 1


def reference(v, x, sigmas, plan, noises, tau):
    """The authors' loop in their own convention: v = -u, sigma = 1 - t; one clip, written anew."""
    for i in range(len(sigmas) - 1):
        s, ds = sigmas[i], sigmas[i + 1] - sigmas[i]
        out = v(x, s)
        clean, ahead, frozen = x - s * out, x + ds * out, None
        for _ in range(plan.get(i, 0)):
            x = (1 - s) * clean + s * noises.pop(0)
            out = v(x, s)
            clean2, ahead2 = x - s * out, x + ds * out
            small = sum((clean2 - clean)[:, c].abs() for c in range(x.shape[1])) / x.shape[1] < tau
            frozen = small if frozen is None else frozen | small
            keep = frozen[:, None].to(x.dtype)
            clean, ahead = keep * clean + (1 - keep) * clean2, keep * ahead + (1 - keep) * ahead2
        x = ahead
    return x


@pytest.mark.parametrize("tau", [0.0, 0.4, 0.8])
def test_predict_and_perturb_against_the_authors_loop(tau):
    z0, times = torch.randn(1, 2, 4, 3, 1, **f64), script.flow_times(6, 2.0)
    plan = {1: 3, 2: 1, 4: 2}
    torch.set_default_dtype(torch.float64)  # so that the fresh noise is drawn in it
    try:
        got, U = script.pnp_sample(curved, z0, times, plan, seeds(1, 5), tau)
        g = torch.Generator().manual_seed(5)
        noises = [torch.randn(1, *z0.shape[1:], generator=g) for _ in range(6)]
    finally:
        torch.set_default_dtype(torch.float32)
    v = lambda x, s: -curved(x, 1 - s)
    expected = reference(v, z0, [1 - t for t in times], plan, noises, tau)
    assert torch.allclose(got, expected, atol=1e-12) and not noises
    assert set(U) == set(plan) and U[1].shape == (1, 1, 4, 3, 1)
    if tau:  # the mask does something, and not everything
        plain, _ = script.pnp_sample(curved, z0, times, plan, seeds(1, 5), 0.0)
        euler, _ = script.pnp_sample(curved, z0, times, {}, [])
        assert (got - plain).abs().max() > 1e-3 and (got - euler).abs().max() > 1e-3


def test_certain_places_stay_frozen_inside_a_step_and_the_union_starts_anew():
    """U of one place over the iterations: 0.1, 1, 1: it keeps its first x for the whole step."""
    script_of_x = iter([0.0, 0.1, 1.1, 2.1, 5.0, 9.0])  # what the network predicts, call by call
    places = torch.zeros(1, 1, 2, 1, 1)

    def velocity(z, t):
        x = next(script_of_x)
        prediction = torch.cat([places[:, :, :1] + x, places[:, :, 1:] + 10 * x], 2)
        return (prediction - z) / (1 - t)

    _, U = script.pnp_sample(velocity, places, [0.0, 0.5, 1.0], {0: 3, 1: 1}, seeds(1), tau=0.5)
    assert U[0].flatten().tolist() == pytest.approx([2.1, 10.0], abs=1e-5)  # against its frozen 0
    assert U[1].flatten().tolist() == pytest.approx([4.0, 40.0], abs=1e-4)  # against 5 and 50


def plain_reference(v, x, sigmas, plan, noises):
    """As reference, of the paper without a mask: no place is ever kept."""
    for i, (s, s_next) in enumerate(zip(sigmas, sigmas[1:])):
        for _ in range(plan.get(i, 0)):
            x = (1 - s) * (x - s * v(x, s)) + s * noises.pop(0)
        x = x + (s_next - s) * v(x, s)
    return x


def test_huge_tau_keeps_the_first_result_and_zero_tau_masks_nothing():
    z0, times, plan = torch.randn(2, 2, 4, 3, 1), script.flow_times(6), {1: 3, 4: 2}
    euler, _ = script.pnp_sample(curved, z0, times, {}, [])
    same, U = script.pnp_sample(curved, z0, times, plan, seeds(2), tau=math.inf)
    assert torch.equal(same, euler) and set(U) == {1, 4}
    plain, _ = script.pnp_sample(curved, z0, times, plan, seeds(2))
    pair = seeds(2)
    noise = [torch.stack([torch.randn(z0.shape[1:], generator=g) for g in pair]) for _ in range(5)]
    expected = plain_reference(lambda x, s: -curved(x, 1 - s), z0, [1 - t for t in times], plan,
                               noise)
    assert torch.allclose(plain, expected, atol=1e-5) and not noise
    assert not torch.allclose(plain, euler, atol=0.1)


def test_at_time_zero_an_iteration_forgets_the_noise_it_started_from():
    z0, other = torch.randn(2, 2, 4, 3, 1), torch.randn(2, 2, 4, 3, 1)
    times = script.flow_times(5)
    one, two = (script.pnp_sample(curved, z, times, {0: 1}, seeds(2))[0] for z in (z0, other))
    assert torch.equal(one, two)
    fresh = torch.stack([torch.randn(z0.shape[1:], generator=g) for g in seeds(2)])
    euler, _ = script.pnp_sample(curved, fresh, times, {}, [])
    assert torch.equal(one, euler)


def test_a_batch_is_the_same_as_its_clips_alone_and_evaluations_are_counted():
    z0, times, plan = torch.randn(3, 2, 4, 3, 1), script.flow_times(6), {1: 3, 2: 1}
    calls = []

    def counted(z, t):
        calls.append(t)
        return curved(z, t)

    batch, U = script.pnp_sample(counted, z0, times, plan, seeds(3), tau=0.6)
    assert len(calls) == 6 + 4
    assert calls == [times[i] for i in (0, 1, 1, 1, 1, 2, 2, 3, 4, 5)]  # back to the same t
    for i in range(3):
        alone, V = script.pnp_sample(curved, z0[i : i + 1], times, plan, seeds(1, i), tau=0.6)
        assert torch.allclose(batch[i : i + 1], alone, atol=1e-6)
        assert torch.allclose(U[1][i : i + 1], V[1], atol=1e-6)


def test_an_iteration_removes_the_variance_of_the_posterior():
    """Section 2 of the theory: Cov z' = Cov z - t^2 E Cov(z1 | z), exactly, for Gaussian data."""
    var, t, n, K = 0.6, 0.5, 400_000, 3
    z = t * var**0.5 * torch.randn(n, 1, 1, 1, 1) + (1 - t) * torch.randn(n, 1, 1, 1, 1)
    gain = t * var / ((1 - t) ** 2 + t**2 * var)  # E[z1 | z] = gain z
    expected = variance = (1 - t) ** 2 + t**2 * var
    posterior = var - gain * t * var
    for _ in range(K):
        expected = t**2 * gain**2 * expected + (1 - t) ** 2
    assert t**2 * gain**2 * variance + (1 - t) ** 2 == pytest.approx(variance - t**2 * posterior)
    velocity = gaussian(0.0, var)
    generators = seeds(1, 99)
    one = z.view(1, 1, n, 1, 1)  # as one clip: one generator
    got, _ = script.pnp_sample(velocity, one, [t, t + 1e-6], {0: K}, generators)
    assert got.var().item() == pytest.approx(expected, rel=0.01)
    assert expected < 0.9 * variance


def test_conditioning_frames_come_out_exact_after_any_perturbation():
    seen = []

    class Net:
        classes = 3

        def __call__(self, z, t, y):
            seen.append((z, t, y))
            return curved(z, t[0].item())

    cond, y = torch.randn(2, 3, 2, 2, 2), torch.tensor([0, 2])
    velocity = script.conditional_velocity(Net(), y, cond)
    z, _ = script.pnp_sample(
        velocity, torch.randn(2, 3, 5, 2, 2), script.flow_times(5, 2.0), {1: 2, 4: 3}, seeds(2)
    )
    assert torch.allclose(z[:, :, :2], cond, atol=1e-6)
    assert all(torch.equal(s[0][:, :, :2], cond) and torch.equal(s[2], y) for s in seen)
    assert not torch.allclose(z[:, :, 2], cond[:, :, 0])
    u = velocity(torch.zeros(2, 3, 5, 2, 2), 0.75)
    assert torch.allclose(u[:, :, :2], cond / 0.25)


def test_guidance_extrapolates_from_no_condition():
    class Net:
        classes = 3

        def __call__(self, z, t, y):
            assert len(z) == len(t) == len(y)
            return z * 0 + y.view(-1, 1, 1, 1, 1) + z

    z, y = torch.randn(2, 3, 4, 2, 2), torch.tensor([0, 2])
    cond = torch.randn(2, 3, 1, 2, 2)
    for w in (1.0, 4.0):
        u = script.conditional_velocity(Net(), y, cond, w)(z, 0.5)
        expected = 3 + w * (y - 3).view(-1, 1, 1, 1, 1) + z
        assert torch.allclose(u[:, :, 1:], expected[:, :, 1:], atol=1e-5)
        assert torch.allclose(u[:, :, :1], 2 * (cond - z[:, :, :1]))


def test_draw_gives_each_clip_its_own_noise_and_perturbs_with_another(monkeypatch):
    cfg = script.Config(image_size=8, components=6, frames=4, dim=16, depth=1, heads=2)
    net, codec = script.build(cfg)
    real = script.pnp_sample
    caught = []

    def catch(velocity, z, times, plan, generators, tau):
        draws = [torch.randn(z.shape[1:], generator=torch.Generator().set_state(g.get_state()))
                 for g in generators]
        caught.append((z, torch.stack(draws)))
        return real(velocity, z, times, plan, generators, tau)

    monkeypatch.setattr(script, "pnp_sample", catch)
    videos, y = torch.rand(3, 3, 4, 8, 8) * 2 - 1, torch.tensor([0, 1, 2])
    windows = script.parse_plan("0.2-0.4:1")
    with torch.no_grad():
        draw = lambda i, plan, cfg=cfg: script.draw(stir(net), codec, videos[i], y[i],
                                                    torch.tensor(i) + 7, cfg, torch.device("cpu"),
                                                    plan)
        together, alone, _ = draw([0, 1, 2], windows), draw([1], windows), draw([0, 1, 2], [])
        draw([0, 1, 2], windows, dataclasses.replace(cfg, seed=1))
    (z, fresh), (z_1, fresh_1), (z_e, _), (z_s, fresh_s) = caught
    for noise in (z, fresh, torch.stack([z, fresh])):
        assert (noise[0] - noise[1]).abs().max() > 0.1  # clips differ, and fresh from z0
    assert torch.equal(z, z_e) and not torch.equal(z, z_s) and not torch.equal(fresh, fresh_s)
    assert torch.equal(z[1:2], z_1) and torch.equal(fresh[1:2], fresh_1)
    assert torch.allclose(together[1:2], alone, atol=1e-5)


# ---- latents and network ---------------------------------------------------------------


def test_frame_pca_projects_on_the_leading_components_and_whitens_with_a_floor():
    videos = bouncing_balls(60, 4, 8, seed=0).videos.float() / 127.5 - 1
    pca = script.FramePCA(8, 20).fit(videos)
    x = videos.permute(0, 2, 1, 3, 4).reshape(-1, 64).double()
    U, s, V = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    std = s / (len(x) - 1) ** 0.5
    z = pca.encode(videos)
    assert z.shape == (60, 20, 4, 3, 1)
    flat = z[..., 0].permute(0, 2, 3, 1).reshape(-1, 20).double()
    assert torch.allclose(flat.std(0), std[:20] / std[:20].clamp(min=0.05 * std[0]), atol=1e-3)
    best = ((x - x.mean(0)) @ V[:20].T @ V[:20] + x.mean(0)).float()
    decoded = pca.decode(z)
    assert decoded.shape == videos.shape
    assert torch.allclose(decoded.permute(0, 2, 1, 3, 4).reshape(-1, 64), best, atol=1e-4)
    full = script.FramePCA(8, 64).fit(videos)
    assert torch.allclose(full.decode(full.encode(videos)), videos, atol=1e-4)
    other = videos.clone()  # a change in one channel of one frame is one column of the latent
    other[:, 1, 2] += 0.5
    changed = (pca.encode(other) - z).abs().amax((0, 1, 4)) > 1e-4
    assert changed.nonzero().tolist() == [[2, 1]]


def test_rotary_angles_turn_with_frame_row_and_column():
    table = script.rotary_grid(3, 2, 2, 14)  # 7 pairs, 2 an axis, one left over
    assert table.shape == (2, 12, 7)
    for n in range(12):
        f, h, w = n // 4, n // 2 % 2, n % 2
        angle = torch.tensor([f, f / 100, h, h / 100, w, w / 100, 0.0])
        assert torch.allclose(table[0, n], angle.cos(), atol=1e-6)
        assert torch.allclose(table[1, n], angle.sin(), atol=1e-6)
    assert script.rotary_grid(4, 3, 1, 32).shape == (2, 12, 16)


def stir(net, std=0.2):
    torch.manual_seed(1)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=std)
    return net


def test_network_is_zero_at_first_and_then_sees_time_label_and_place():
    shape = (3, 4, 8, 8)
    net = script.VideoDiT(shape, 2, 4, 3, 24, 2, 2)
    z, t, y = torch.randn(2, *shape), torch.rand(2), torch.tensor([0, 3])
    assert net(z, t, y).detach().abs().max() == 0
    net = stir(net)
    out = net(z, t, y)
    assert out.shape == z.shape
    assert not torch.allclose(out, net(z, t / 2, y)) and not torch.allclose(out, net(z, t, y - y))
    moved = net(z.roll(2, 2), t, y).roll(-2, 2)  # tokens of another time: positions are seen
    assert not torch.allclose(out, moved, atol=1e-3)
    assert torch.allclose(net(z[:1], t[:1], y[:1]), out[:1], atol=1e-5)


def test_patches_keep_their_place():
    shape, numbers = (3, 4, 4, 4), 3 * 2 * 2 * 2
    net = script.VideoDiT(shape, 2, 2, 3, numbers, 1, 2)
    z = torch.randn(1, *shape)
    with torch.no_grad():  # blocks are identities: a network that copies
        net.embed.weight.copy_(torch.eye(numbers))
        net.head.weight.copy_(torch.eye(numbers))
        net.position.zero_()
        net.norm.forward = lambda x: x
    assert torch.allclose(net(z, torch.rand(1), torch.tensor([0])), z, atol=1e-6)


# ---- a pretrained model ----------------------------------------------------------------


class StandIn(torch.nn.Module):
    """The documented call of diffusers' WanTransformer3DModel; output as of a trained one, for data
    that are one point x: v = (z - x) / sigma."""

    def __init__(self, x):
        super().__init__()
        self.x, self.calls = x, []
        self.config = SimpleNamespace(in_channels=x.shape[1])

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict=True):
        assert return_dict is False and timestep.shape == (len(hidden_states),)
        self.calls.append((timestep[0].item(), encoder_hidden_states.mean().item()))
        sigma = timestep.view(-1, 1, 1, 1, 1) / 1000
        x = self.x * encoder_hidden_states.mean()
        return ((hidden_states - x) / sigma,)


def test_wan_velocity_has_the_sign_the_time_and_the_guidance_of_the_model():
    x = torch.randn(1, 4, 3, 2, 2)
    text, no_text = torch.ones(1, 5, 8), torch.full((1, 5, 8), 0.5)
    model = StandIn(x)
    velocity = script.wan_velocity(model, text, no_text, 1.0)
    z0, times = torch.randn(1, 4, 3, 2, 2), script.flow_times(4, 3.0)
    z, _ = script.pnp_sample(velocity, z0, times, {}, [])
    assert torch.allclose(z, x, atol=1e-5)  # exact for one point, in any number of steps
    assert model.calls[0][0] == pytest.approx(1000) and model.calls[-2][0] < 600
    z = torch.randn(1, 4, 3, 2, 2)
    u = script.wan_velocity(model, text, no_text, 3.0)(z, 0.2)
    assert torch.allclose(u, (x * (0.5 + 3 * 0.5) - z) / 0.8, atol=1e-5)


def pipeline(x, sigmas):
    """A stand-in of the parts of WanPipeline that the script uses."""
    decoded = []

    def decode(z, return_dict):  # one frame, then four for every latent frame, as Wan's does
        decoded.append(z)
        video = torch.tanh(z[:, :3]).repeat_interleave(4, 2)[:, :, 3:] / 2
        return (video + torch.linspace(0, 0.4, video.shape[2]).view(-1, 1, 1),)

    config = SimpleNamespace(latents_mean=[0.5] * x.shape[1], latents_std=[2.0] * x.shape[1])
    vae = SimpleNamespace(config=config, dtype=torch.float32, decode=decode)
    scheduler = SimpleNamespace(set_timesteps=lambda n: setattr(scheduler, "sigmas", sigmas(n)))
    encode = lambda prompt, negative, max_sequence_length: (
        torch.ones(1, 5, 8) * (prompt == "a ball"),
        torch.ones(1, 5, 8) * (negative == ""),
    )
    pipe = SimpleNamespace(
        transformer=StandIn(x), vae=vae, scheduler=scheduler, encode_prompt=encode,
        vae_scale_factor_spatial=8, vae_scale_factor_temporal=4,
    )
    pipe.to = lambda device: pipe
    return pipe, decoded


WAN = "--generator some/Wan --image-size 16 --width 32 --frames 9 --given 0 --n 2 --device cpu"
WAN = WAN.split() + ["--sampling-steps", "4", "--plan", "0.2-0.6:2", "--prompt", "a ball"]


def test_pretrained_model_by_the_script_s_command_line(monkeypatch):
    x = torch.randn(1, 4, 3, 2, 4)
    pipe, decoded = pipeline(x, lambda n: torch.linspace(1, 0, n + 1))
    load = lambda name, torch_dtype: pipe if name == "some/Wan" else None
    fake = SimpleNamespace(WanPipeline=SimpleNamespace(from_pretrained=load))
    monkeypatch.setitem(sys.modules, "diffusers", fake)
    script.main(WAN + ["--out", "wan"])
    assert len(decoded) == 4 and len(pipe.transformer.calls) == 2 * 2 * (4 + 4 + 2 * 2)
    for z in decoded:  # latents leave the unit scale of the transformer
        assert torch.allclose(z, 2 * x + 0.5, atol=1e-4)
    with Image.open("wan/sample.gif") as gif:
        assert gif.n_frames == 9


def test_pretrained_model_keeps_its_first_noise_when_it_is_perturbed(monkeypatch, refuses):
    pipe, _ = pipeline(torch.randn(1, 4, 3, 2, 4), lambda n: torch.linspace(1, 0, n + 1))
    fake = SimpleNamespace(WanPipeline=SimpleNamespace(from_pretrained=lambda *a, **k: pipe))
    monkeypatch.setitem(sys.modules, "diffusers", fake)
    caught, real = [], script.pnp_sample

    def catch(velocity, z, times, plan, generators, tau):
        state = generators[0].get_state()
        caught.append((z, torch.randn(z.shape[1:], generator=torch.Generator().set_state(state))))
        return real(velocity, z, times, plan, generators, tau)

    monkeypatch.setattr(script, "pnp_sample", catch)
    script.main(WAN + ["--out", "one"])
    script.main(WAN + ["--out", "two", "--plan", "0.2-0.3:1"])
    (e0, _), (r0, f0), (e1, _), (r1, f1) = caught[:4]  # of the first call: two clips
    assert torch.equal(e0, r0) and torch.equal(e1, r1) and not torch.equal(e0, e1)
    assert not torch.equal(f0, f1) and not torch.equal(f0, e0[0])
    assert [torch.equal(a, b) for a, b in zip(caught[2], caught[6])] == [True, True]
    refuses(lambda: script.main(WAN + ["--out", "no", "--plan", "0.3-0.4:1"]), "0.3-0.4")
    assert not Path("no").exists()


def test_without_diffusers_the_error_says_what_to_install(monkeypatch, refuses):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    refuses(lambda: script.main(WAN + ["--out", "wan"]), "some/Wan", "diffusers")
    assert not Path("wan").exists()


def test_the_real_transformer_class_with_random_weights():
    """Skipped without diffusers, which no other test needs; it passes with diffusers 0.42.1."""
    diffusers = pytest.importorskip("diffusers", reason="pip install diffusers: the wan preset")
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=8, freq_dim=16, ffn_dim=32, num_layers=2,
    )
    text, no_text = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    scheduler.set_timesteps(40)
    times = (1 - scheduler.sigmas).tolist()
    assert len(times) == 41 and times[-1] == 1
    windows = script.parse_plan(script.PRESETS["wan"]["plan"])
    assert script.plan_steps(windows, times) == {i: 3 if i < 6 else 1 for i in range(2, 14)}
    scheduler.set_timesteps(3)
    times = (1 - scheduler.sigmas).tolist()
    with torch.no_grad():
        velocity = script.wan_velocity(model, text, no_text, 2.0)
        z, U = script.pnp_sample(velocity, torch.randn(1, 4, 3, 4, 4), times, {1: 2}, seeds(1), 0.1)
        v, v_null = (
            model(hidden_states=z, timestep=torch.tensor([400.0]), encoder_hidden_states=s).sample
            for s in (text, no_text)
        )
        assert torch.allclose(velocity(z, 0.6), -(2 * v - v_null), atol=1e-4)
    assert z.shape == (1, 4, 3, 4, 4) and z.isfinite().all() and U[1].shape == (1, 1, 3, 4, 4)


# ---- the script end to end -------------------------------------------------------------


@pytest.mark.parametrize("tier", [[], ["--components", "0", "--patch", "4", "--patch-frames", "2"]])
def test_interrupted_and_continued_equals_uninterrupted(tier, same_when_interrupted):
    same_when_interrupted(script, SMALL + tier, ("model", "ema"))
    last = json.loads(Path("whole/metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 4 and math.isfinite(last["loss"])
    with Image.open("whole/samples_0000004.gif") as gif:
        assert gif.n_frames == 4 and gif.size == (3 * 66, 3 * 66)
    assert Image.open("whole/samples_0000004.png").size == (4 * 66, 9 * 66)


def test_learning_rate_warms_up_and_falls_over_the_last_half():
    script.main(SMALL + ["--steps", "8", "--log-every", "1", "--save-every", "8", "--out", "run"])
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    share = [row["lr"] / 1.5e-3 for row in rows]
    assert share == pytest.approx([0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_training_drops_this_share_of_the_labels_to_no_condition(drop, monkeypatch):
    seen, real = [], script.flow_loss

    def catch(net, z1, y, t, given):
        seen.append((y, t))
        return real(net, z1, y, t, given)

    monkeypatch.setattr(script, "flow_loss", catch)
    monkeypatch.setattr(script, "batch_indices", lambda M, cfg, step: torch.arange(300) % 12)
    script.main(SMALL + ["--label-drop", str(drop), "--out", "run", "--save-every", "4"])
    y, t = (torch.cat(part) for part in zip(*seen))
    dropped = y == 3  # `classes`, beside labels 0, 1, 2 of one to three balls
    assert dropped.double().mean().item() == pytest.approx(drop, abs=0.06)
    assert torch.equal(y[~dropped], (torch.arange(1200) % 3)[~dropped])
    assert 0 <= t.min() < 0.02 and 0.98 < t.max() < 1 and abs(t.mean() - 0.5) < 0.03


def test_sample_draws_from_the_ema_with_the_plan_it_is_given():
    script.main(SMALL + ["--out", "run"])
    draw = lambda *flags: script.main(["--sample", "run/last.pt", "--device", "cpu", *flags])
    draw("--out", "a")
    draw("--plan", "", "--out", "b")
    one, two = (Image.open(f"{out}/sample.png").convert("RGB") for out in "ab")
    row = lambda image, i: image.crop((0, 66 * i, 4 * 66, 66 * i + 66)).tobytes()
    assert row(one, 0) == row(two, 0) and row(one, 1) == row(two, 1)  # real, Euler: paired
    assert row(one, 2) != row(one, 1) and row(two, 2) == row(two, 1)  # refined
    entries = dict(load_checkpoint("run/last.pt"))
    entries["model"] = {k: w * 0 for k, w in entries["model"].items()}
    torch.save(entries, "run/other.pt")
    script.main(["--sample", "run/other.pt", "--device", "cpu", "--out", "c"])
    assert Image.open("c/sample.png").convert("RGB").tobytes() == one.tobytes()
    first = Image.open("run/samples_0000004.png").convert("RGB")
    assert first.tobytes() == one.tobytes()  # and the same as in training


def test_held_out_clips_are_not_training_clips_and_depend_on_no_seed_of_the_run():
    cfg = script.Config(clips=20, batch_size=5, image_size=8, frames=4)
    (train, y), (held, _) = (next(script.make_clips(12, seed, cfg, "cpu")) for seed in (0, 1))
    assert train.shape == (12, 3, 4, 8, 8) and y.tolist() == [0, 1, 2] * 4
    assert (train[:, None] - held[None]).abs().amax((2, 3, 4, 5)).min() > 0.1
    assert train.min() == -1 and 0.5 < train.max() <= 1
    codec = script.FramePCA(8, 6)
    z1, labels = script.load_clips(cfg, codec, "cpu")
    assert z1.shape == (20, 6, 4, 3, 1) and codec.mean.abs().sum() > 0
    assert z1.std().item() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--plan", "0.4-0.2:3"], ["plan"]),
        (["--plan", "0.1-0.4:3,0.3-0.5:1"], ["rising"]),
        (["--plan", "0.1-0.4"], ["plan"]),
        (["--plan", "0.1-0.4:0"], ["K >= 1"]),
        (["--plan", "early:3"], ["plan"]),
        (["--plan", "0.4-0.6:3"], ["no step", "0.4-0.6"]),
        (["--plan", "0-0.3:3"], ["no step after t = 0"]),
        (["--label-drop", "1"], ["label_drop"]),
        (["--given", "4"], ["given"]),
        (["--shift", "0"], ["shift"]),
        (["--tau", "-1"], ["tau"]),
        (["--heads", "3"], ["dim / heads"]),
        (["--patch", "2"], ["patches"]),
        (["--patch-frames", "3"], ["patches of 3"]),
        (["--components", "65"], ["components"]),
        (["--clips", "5"], ["batch_size"]),
        (["--generator", "some/Wan"], ["prompt"]),
        (WAN + ["--frames", "8"], ["4 k + 1"]),
        (["--preset", "paper"], ["paper", "wan"]),
        (["--sampling-steps", "0"], ["sampling_steps"]),
    ],
)
def test_bad_input_ends_with_one_line_and_writes_nothing(flags, words, refuses):
    refuses(lambda: script.main(SMALL + ["--out", "run"] + flags), *words)
    assert not Path("run").exists()


# ---- instruments of the claim ----------------------------------------------------------


def test_mixture_velocity_is_the_posterior_mean_by_numerical_integration():
    t = 0.6
    axis = torch.linspace(-2.2, 2.2, 441, **f64)
    z1 = torch.cartesian_prod(axis, axis)  # (441^2, 2)
    p = torch.exp(-torch.cdist(z1, claim.CENTRES).square() / (2 * claim.STD**2)) @ claim.WEIGHTS
    for point in ([0.3, 0.9], [-0.5, 0.2], [0.8, -0.6]):
        z = torch.tensor([point], **f64)
        weight = p * torch.exp(-(z - t * z1).square().sum(1) / (2 * (1 - t) ** 2))
        mean = (weight[:, None] * z1).sum(0) / weight.sum()
        u = claim.mixture_velocity(z.T[None, :, :, None, None], t)[0, :, 0, 0, 0]
        assert torch.allclose(u, (mean - z[0]) / (1 - t), atol=1e-4)


def test_number_of_steps_spends_the_evaluations_and_no_more():
    for plan, shift in (("", 1.0), ("0.4-0.6:3", 1.0), ("0-0.2:5", 3.0), ("0-1:1", 1.0)):
        N = claim.steps_for(32, plan, shift)
        flags = dict(plan=plan, shift=shift)
        spent = [claim.evaluations(flags | {"sampling_steps": n}) for n in range(N, 33)]
        assert spent[0] <= 32 and all(more > 32 for more in spent[1:])
    assert claim.steps_for(32, "0-1:1") == 16 and claim.steps_for(32, "0.4-0.6:3") == 20
    with pytest.raises(ValueError, match="too few"):
        claim.steps_for(10, "0.4-0.42:9")
    flags = dict(plan=claim.CODE_PLAN, sampling_steps=40, shift=3.0)
    assert claim.evaluations(flags) == 60  # the authors' figure
    for preset in ("cpu", "gpu"):
        for name, flags in claim.sweep_arms(preset).items():
            assert claim.evaluations(flags) <= (32 if name.startswith("t ") else 60), name


def test_area_under_the_curve_counts_pairs():
    high, low = torch.randint(0, 5, (30,)).float() + 1, torch.randint(0, 5, (40,)).float()
    pairs = (high[:, None] > low).double() + 0.5 * (high[:, None] == low)
    assert claim.auc(high, low) == pytest.approx(pairs.mean().item())


def test_fast_conditions_are_faster_and_follow_the_simulator():
    cfg = script.Config()
    clips, plain = claim.conditions(cfg, "fast", 30), claim.conditions(cfg, n=30)
    speed = clips.tracks[:, 0, :, 2:].norm(dim=-1)
    speed = speed[~speed.isnan()]
    assert (1.6**2 + 1.2**2) ** 0.5 == pytest.approx(2.0)  # the fastest start in training
    assert 2.0 <= speed.min() and speed.max() <= 2.6
    start, other = (x.tracks[:, 0, :, :2].nan_to_num(0) for x in (clips, plain))
    assert torch.equal(start, other)
    tracks, _, _ = claim.physics.track(clips.videos, clips.radius)
    assert (tracks - clips.tracks[..., :2]).norm(dim=-1).nan_to_num(0).max() * 32 < 0.01


@pytest.fixture(autouse=True)
def short_bootstrap(monkeypatch):
    monkeypatch.setattr(claim, "DRAWS", 100)


def measures(n=24, seed=0, **metrics):
    """What physics.measure leaves, made up, with some of its metrics replaced."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(*shape, generator=g, **f64)
    made = {"bad": draw(n).round(), "bad_frames": draw(n), "teleports": 0.3 + draw(n),
            "walls": draw(n), "speed": 1 + draw(n), "real_speed": 1 + draw(n), "energy": draw(n),
            "residual": 2 + draw(n, 36), "qualified": draw(n), "momentum": draw(n, 6),
            "position": 1 + draw(n, 16)}
    return {k: metrics.get(k, lambda v: v)(v) for k, v in made.items()}


def filled(preset, change=lambda table, name: {}, numbers=lambda table, name, metric: 1.0):
    """A report whose arms are all alike, but for change(table, name) = {metric: function} of the
    measures and numbers(table, name, metric) of the table modes and mask."""
    report = claim.open_report("self_refine", "doc", ["--preset", preset])
    seeds, names = claim.SEEDS[preset], list(claim.sweep_arms(preset))

    def leave(table, name):
        m = measures(**change(table, name))
        if table == "frames":
            m = {"moved": m["energy"], "apart": m["qualified"]}
        for seed in seeds:
            kept = claim.arm_file(report, table, name, seed).with_name("measure.pt")
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.save(m, kept)

    for name in names:
        leave("sweep", name)
    for T in ("T 1", "T 16"):
        for t in claim.ONE_STEP:
            leave("frames", f"{T}, t {t}")
    chosen = claim.choose(report, seeds, [name for name in names if name.startswith("t ")])
    for name in ("Euler 32", "t 0.2-0.4 K 3", chosen[0]):
        leave("planner", name)
    rows = {("modes", name): ("entropy",) for name in (
        "Euler", *(f"{low:g}-{high:g}:3" for low, high in claim.WINDOWS), "0.4-0.6:1", "0.4-0.6:8",
        "0-1:3")}
    rows |= {("mask", name): ("drift", "drift_moving", "contrast", "auc")
             for name in ("K 2", "K 5", "K 5, mask")}
    for (table, name), metrics in rows.items():
        report["done"][table, name] = {
            seed: {metric: numbers(table, name, metric) for metric in metrics} for seed in seeds}
    return report, chosen, seeds


def verdicts(report, chosen, seeds):
    claim.judge_claims(report, seeds, *chosen)
    return {"U" if c["claim"].startswith("U") else c["table"]: c["agrees"]
            for c in report["json"]["claims"]}


@pytest.mark.parametrize("preset", ["cpu", "gpu"])
def test_arms_without_a_difference_resolve_nothing(preset):
    found = verdicts(*filled(preset, numbers=lambda table, name, metric: 0.6))
    mask = {"mask": "contradicted", "U": "not resolved"} if preset == "gpu" else {}  # not halved
    open_ = dict.fromkeys("sweep twice early planner modes frames".split(), "not resolved")
    assert found == open_ | mask


def better(table, name, **more):
    """Fewer teleports, smaller residual and position for K 3 in 0.2-0.4, on known speeds only."""
    if table == "sweep" and name == "t 0.2-0.4 K 3":
        less = lambda v: 0.5 * v
        return {"teleports": less, "residual": less, "position": less, **more}
    return {"energy": lambda v: 2 * v} if table == "frames" and name.startswith("T 1,") else {}


def test_a_clear_gain_is_chosen_and_agrees_and_its_guards_make_it_partly():
    report, chosen, seeds = filled("cpu", better)
    assert chosen[0] == "t 0.2-0.4 K 3" and chosen[1].startswith("t 0-0.2 K") and chosen[2]
    assert verdicts(report, chosen, seeds) == {
        "sweep": "as in the paper", "twice": "as in the paper", "early": "contradicted",
        "planner": "as in the paper", "modes": "not resolved", "frames": "as in the paper"}
    bad = lambda table, name: better(table, name, bad=lambda v: v * 0 + 1,
                                     bad_frames=lambda v: v * 0)
    found = verdicts(*filled("cpu", bad))
    assert found["sweep"] == "partly" and found["twice"] == "partly"


def test_a_gain_everywhere_is_early_too_and_a_planner():
    def change(table, name):
        less = {"teleports": lambda v: 0.5 * v, "position": lambda v: 0.5 * v}
        if table == "planner" and name.startswith("t "):
            return {"position": lambda v: 0.2 * v}
        return less if name.startswith("t 0-0.2") or name == "t 0.2-0.4 K 3" else {}

    report, chosen, seeds = filled("cpu", change)
    found = verdicts(report, ("t 0.2-0.4 K 3", *chosen[1:]), seeds)
    assert found["early"] == "as in the paper" and found["planner"] == "contradicted"
    assert found["sweep"] == "partly"  # teleports, not the residual


def test_a_loss_is_contradicted():
    def change(table, name):
        return {} if name.startswith("Euler") else {"teleports": lambda v: 2 * v,
                                                    "residual": lambda v: 2 * v}
    found = verdicts(*filled("cpu", change))
    assert found["sweep"] == found["twice"] == "contradicted" and found["early"] == "not resolved"


def test_slow_motion_is_not_chosen_and_if_all_arms_are_slow_nothing_is_resolved():
    slow = lambda v: 0.3 * v
    one = lambda table, name: better(table, name, speed=slow)
    assert filled("cpu", one)[1][0] != "t 0.2-0.4 K 3"
    every = lambda table, name: {"speed": slow} | better(table, name)
    report, chosen, seeds = filled("cpu", every)
    assert chosen[0] == "t 0.2-0.4 K 3" and not chosen[2]
    found = verdicts(report, chosen, seeds)
    assert {found[t] for t in ("sweep", "twice", "early", "planner")} == {"not resolved"}


@pytest.mark.parametrize("moving, word", [(0.8, "as in the paper"), (0.1, "partly")])
def test_a_mask_that_undoes_everything_is_not_as_in_the_paper(moving, word):
    def numbers(table, name, metric):
        if table == "modes":
            return {"Euler": 1.5, "0.4-0.6:1": 1.4, "0.4-0.6:3": 1.3, "0.4-0.6:8": 1.2,
                    "0-1:3": 1.1}.get(name, 1.4)
        values = {"drift": (1, 2, 0.5), "drift_moving": (0.5, 1, moving),
                  "contrast": (1.2, 1.5, 1.1), "auc": (0.7, 0.8, 0.8)}[metric]
        return dict(zip(("K 2", "K 5", "K 5, mask"), values))[name]

    found = verdicts(*filled("gpu", numbers=numbers))
    assert found["mask"] == word and found["U"] == found["modes"] == "as in the paper"


def test_arms_are_run_once_in_order_and_a_refusal_in_a_worker_ends_the_claim():
    def work(folder, number):
        if number < 0:
            raise SystemExit(2)
        calls.append(number)
        return {"number": number}

    def run(jobs):
        report = claim.open_report("self_refine", "doc", [])
        extra = lambda name, seed: {"before": len(report["done"])}
        claim.run_arms(report, claim.inline, "table", jobs, extra)
        return report["done"]

    calls = []
    jobs = {(name, seed): (work, 10 * i + seed) for i, name in enumerate("ab") for seed in (0, 1)}
    done = run(jobs)
    assert calls == [0, 1, 10, 11] and run(jobs) == done and len(calls) == 4
    assert done["table", "b"] == {0: {"number": 10, "before": 1}, 1: {"number": 11, "before": 2}}
    with pytest.raises(RuntimeError, match="work ended with status 2"):
        run({("c", 0): (work, -1)})


def test_a_half_trained_network_of_other_code_is_refused(refuses):
    def run(*flags):
        report = claim.open_report("self_refine", "doc", list(flags))
        report["device"] = torch.device("cpu")
        claim.run_networks(report, lambda *a: SimpleNamespace(get=lambda: {"loss": 1.0}),
                           {("main", 0): []})
        return report

    folder = claim.network(run(), "main", 0)
    (folder / "result.json").unlink()  # cut off
    run()
    (folder / "result.json").unlink()
    (folder / "code").write_text("0" * 64)
    refuses(run, "other code", "--reuse")
    run("--reuse")


def test_differences_are_taken_to_the_base_of_each_arm():
    report, _, _ = filled("cpu", better)
    bases = {"t 0.2-0.4 K 3": "Euler 32", "Euler 32": "Euler 32"}
    got = claim.differences(report, "sweep", bases, "t 0.2-0.4 K 3", 0)
    m, euler = (claim.measured(report, "sweep", name, 0) for name in bases)
    gap = (m["teleports"].mean() - euler["teleports"].mean()).item()
    assert got["teleports_diff"] == pytest.approx(gap) and gap < 0
    assert got["teleports_low"] < gap < got["teleports_high"] < 0 and got["residual_high"] < 0
    for name in ("Euler 32", "Euler 60"):
        assert claim.differences(report, "sweep", bases, name, 0) == {}


@pytest.fixture
def networks(monkeypatch):
    """Run folders of tiny networks: latents, and pixels on a textured background."""
    monkeypatch.setattr(claim, "CONDITIONS", 6)
    script.main(SMALL + ["--out", "latent", "--given", "0"])
    script.main(SMALL + ["--out", "pixels", "--texture", "--components", "0", "--patch", "4"])
    return Path("latent"), Path("pixels")


def test_change_and_background_against_what_they_measure(networks):
    (latent, pixels), cpu = networks, torch.device("cpu")
    flags = dict(plan="0.4-0.6:1", sampling_steps=5)
    got = claim.change(Path("."), latent, flags, cpu)
    clips = claim.conditions(claim.load(latent, cpu)[0])
    draw = lambda plan, first: claim.continued(latent, flags | {"plan": plan}, clips, cpu, first)
    rms = lambda a, b: (a - b).square().mean().sqrt().item()
    euler = draw("", 0)
    expected = rms(draw("0.4-0.6:1", 0), euler) / rms(draw("", 1000), euler)
    assert got["change"] == pytest.approx(expected, rel=1e-5) and got["nfe"] == 6
    assert 0.01 < got["change"] < 1.5

    flags = dict(plan="0.3-0.7:2", tau=0.0, guidance=2.0, sampling_steps=4)
    got = claim.background(Path("."), pixels, flags, cpu)
    clips = claim.conditions(claim.load(pixels, cpu)[0])
    one, two = (claim.continued(pixels, f, clips, cpu) for f in (flags, flags | {"plan": ""}))
    cover = claim.draw_balls(clips.tracks, clips.radius, 8).amax(1).amax(1)  # (n, S, S)
    for name, places in (("drift", cover < 0.02), ("drift_moving", cover > 0.3)):
        moved = torch.cat([(one - two).abs()[:, :, f].permute(0, 2, 3, 1)[places] for f in (2, 3)])
        assert got[name] == pytest.approx(moved.median().item(), abs=1e-6)
    assert 0 < got["auc"] < 1 and got["median_U"] > 0 and got["contrast"] > 0
    masked = claim.background(Path("."), pixels, flags | {"tau": -1.0}, cpu)
    assert masked["tau"] == got["median_U"] and masked["drift"] < got["drift"]
    plain = claim.background(Path("."), pixels, flags | {"plan": ""}, cpu)
    assert plain["drift"] == plain["drift_moving"] == 0 and "auc" not in plain
