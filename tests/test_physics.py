"""The simulator of bouncing balls and the instruments of tests/claims/physics.py."""

import math

import numpy as np
import pytest
import torch

from common import bouncing_balls, draw_balls, simulate_balls
from tests.claims import physics

G, STEP = 1.6, 1 / 15
f64 = dict(dtype=torch.float64)


# ---- simulator -------------------------------------------------------------------------


def energy(tracks):
    return (0.5 * tracks[..., 2:].square().sum(-1) - G * tracks[..., 1]).nansum(-1)


def test_energy_and_walls_over_a_thousand_bounces():
    clips = bouncing_balls(30, 2, 8, seed=3)
    state, frames = clips.tracks[:, 0], 2400
    tracks = simulate_balls(state[..., :2], state[..., 2:], clips.radius, frames)
    free = tracks[:, :-1, :, 2:] + STEP * torch.tensor([0, G])  # velocity without an event
    bounces = ((tracks[:, 1:, :, 2:] - free).abs() > 1e-9).any(-1).sum((1, 2))
    assert bounces.min() > 1000
    drift = energy(tracks) - energy(tracks)[:, :1]
    assert drift.abs().max() < 1e-10
    r = clips.radius.view(-1, 1, 1, 1)
    gap = torch.minimum(tracks[..., :2] - r, 1 - r - tracks[..., :2])
    assert gap[~gap.isnan()].min() > -1e-12
    i, j = [0, 0, 1], [1, 2, 2]
    apart = (tracks[:, :, i, :2] - tracks[:, :, j, :2]).norm(dim=-1) - 2 * r[..., 0]
    assert apart[~apart.isnan()].min() > -1e-12
    assert (tracks.isnan() == state.isnan()[:, None]).all()  # no ball comes or goes


def test_one_ball_against_the_closed_form_of_a_bounce():
    """Dropped at rest it comes back to its height with the period 2 sqrt(2 h / g); in x it runs in
    a box of width 1 - 2 r, so x is a folded straight line."""
    r, y0, x0, vx = 0.13, 0.2, 0.3, 1.1
    p, v = torch.tensor([[[x0, y0]]], **f64), torch.tensor([[[vx, 0.0]]], **f64)
    tracks = simulate_balls(p, v, torch.tensor([r], **f64), 200)[0, :, 0]
    t = torch.arange(200, **f64) * STEP
    h = 1 - r - y0
    fall = math.sqrt(2 * h / G)
    phase = (t + fall) % (2 * fall) - fall  # time from the nearest apex
    y = y0 + G * phase**2 / 2
    width = 1 - 2 * r
    fold = (x0 - r + vx * t) % (2 * width)
    x = r + torch.minimum(fold, 2 * width - fold)
    assert torch.allclose(tracks[:, 1], y, atol=1e-10)
    assert torch.allclose(tracks[:, 0], x, atol=1e-10)
    assert torch.allclose(tracks[:, 3], G * phase, atol=1e-9)


def test_ceiling_is_hit_when_the_ball_is_fast_enough_and_only_then():
    r = torch.tensor([0.1, 0.1], **f64)
    p = torch.tensor([[[0.5, 0.5]], [[0.5, 0.5]]], **f64)
    reach = math.sqrt(2 * G * 0.4)  # just touches y = r
    v = torch.tensor([[[0.0, -1.5 * reach]], [[0.0, -0.99 * reach]]], **f64)
    tracks = simulate_balls(p, v, r, 400, step=0.005)
    top = tracks[:, :, 0, 1].amin(1)
    assert top[0] == pytest.approx(0.1, abs=5e-3) and top[1] == pytest.approx(
        0.5 - 0.4 * 0.99**2, abs=1e-4
    )
    s = (1.5 * reach - math.sqrt(2.25 * reach**2 - 2 * G * 0.4)) / G  # first contact, then down
    speed = math.sqrt(2.25 * reach**2 - 2 * G * 0.4)
    k = int(s / 0.005) + 1
    assert tracks[0, k, 0, 3] == pytest.approx(speed + G * (k * 0.005 - s), abs=1e-9)


def test_two_balls_against_the_closed_form_of_their_collision():
    """In the frame that falls with them: contact by bisection, then an elastic collision of equal
    masses solved from momentum and energy along the line of centres."""
    r = 0.1
    p = torch.tensor([[[0.25, 0.30], [0.70, 0.42]]], **f64)
    v = torch.tensor([[[1.2, -0.3], [-0.9, -0.5]]], **f64)
    frames, step = 60, 0.01
    tracks = simulate_balls(p, v, torch.tensor([r], **f64), frames, step=step)[0]
    P, V = p[0].numpy(), v[0].numpy()
    gap = lambda s: np.linalg.norm(P[0] - P[1] + s * (V[0] - V[1])) - 2 * r
    low, high = 0.0, 0.45 / 2.1
    assert gap(low) > 0 > gap(high)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if gap(middle) > 0 else (low, middle)
    n = P[0] - P[1] + low * (V[0] - V[1])
    n /= np.linalg.norm(n)
    tangent = np.array([-n[1], n[0]])
    a, b = V @ n  # 1-d elastic collision: u1 = ((m1 - m2) a + 2 m2 b) / (m1 + m2)
    after = np.stack([b * n + (V[0] @ tangent) * tangent, a * n + (V[1] @ tangent) * tangent])
    fall = np.array([0, G])
    for k in range(frames):
        t = k * step
        where = P + V * min(t, low) + after * max(t - low, 0) + fall * t**2 / 2
        if where.min() < r or where.max() > 1 - r:
            break
        assert np.allclose(tracks[k, :, :2], where, atol=1e-10), k
        assert np.allclose(tracks[k, :, 2:], (V if t < low else after) + fall * t, atol=1e-10), k
    assert k * step > low + 0.1


def test_reversed_in_time_a_trajectory_returns_to_its_start():
    """Events of a few balls in sequence, none lost: elastic motion is reversible."""
    clips = bouncing_balls(60, 16, 8, seed=5)
    end = clips.tracks[:, -1]
    back = simulate_balls(end[..., :2], end[..., 2:] * torch.tensor([-1.0, -1.0]), clips.radius, 16)
    there = ~end[..., 0].isnan()
    error = (back.flip(1)[..., :2] - clips.tracks[..., :2])[there[:, None].expand(-1, 16, -1)]
    assert error.abs().max() < 1e-8


def test_clips_are_what_the_docstring_says():
    clips = bouncing_balls(300, 16, 32, seed=0)
    assert clips.videos.dtype == torch.uint8 and clips.videos.shape == (300, 3, 16, 32, 32)
    count = clips.tracks[:, 0, :, 0].isfinite().sum(1)
    assert torch.equal(count, 1 + torch.arange(300) % 3) and torch.equal(count - 1, clips.labels)
    assert torch.equal(clips.radius, torch.where(count < 3, 0.13, 0.10).double())
    v = clips.tracks[:, 0, :, 2:]
    v = v[~v.isnan()].view(-1, 2)
    assert v.abs().amax(0).tolist() == pytest.approx([1.6, 1.2], rel=0.02)
    assert v.std(0).tolist() == pytest.approx([1.6 / 3**0.5, 1.2 / 3**0.5], rel=0.08)
    empty = clips.tracks[:, 0, :, 0].isnan()
    assert clips.videos.amax((2, 3, 4))[empty].max() == 0
    assert torch.equal(clips.videos, bouncing_balls(300, 16, 32, seed=0).videos)
    assert not torch.equal(clips.videos, bouncing_balls(300, 16, 32, seed=1).videos)


def test_blobs_have_their_place_width_and_height_and_lie_over_the_background():
    tracks = torch.full((1, 1, 3, 2), math.nan, **f64)
    tracks[0, 0, 1] = torch.tensor([0.25, 0.75], **f64)  # left and low: y points down
    cover = draw_balls(tracks, torch.tensor([0.13], **f64), 32)[0, :, 0]
    assert cover[0].max() == 0 and cover[2].max() == 0
    row, column = divmod(cover[1].argmax().item(), 32)
    assert row in (23, 24) and column in (7, 8)
    for i, j in ((20, 9), (24, 3), (30, 8)):
        d2 = ((j + 0.5) / 32 - 0.25) ** 2 + ((i + 0.5) / 32 - 0.75) ** 2
        assert cover[1, i, j].item() == pytest.approx(math.exp(-d2 / 2 / 0.078**2), rel=1e-4)
    clips = bouncing_balls(6, 4, 32, seed=1, texture=True)
    back, plain = clips.background.float(), bouncing_balls(6, 4, 32, seed=1).videos.float()
    assert back.max() <= 128 and back.std() > 10
    over = back + (255 - back) * plain / 255
    assert (over - clips.videos.float()).abs().max() <= 1


# ---- tracker ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    return bouncing_balls(150, 16, 32, seed=11)


def test_tracker_floors_on_real_clips(real):
    """Centroid to 0.01 pixels even at the walls, and gravity to 1 % from five frames."""
    tracks, mass, second = physics.track(real.videos, real.radius)
    here = real.tracks[..., 0].isfinite()
    error = (tracks - real.tracks[..., :2]).norm(dim=-1)[here] * 32
    assert error.mean() < 0.003 and error.max() < 0.01
    assert (mass[here] - 1).abs().max() < 0.01 and (second[here] - 1).abs().max() < 0.02
    assert mass[~here].max() == 0
    free = physics.free_frames(tracks, real.radius).unfold(1, 5, 1).all(-1)
    a = physics.parabolas(tracks)[2][free]
    assert (a[:, 1] - G).abs().median() < 0.015 and free.sum() > 500
    # what the tracker is for: the binarised mask of the same clips has ten to fifty times the error
    x = real.videos.float() / 255
    flat = physics.moments((x > 0.5).float())[0].transpose(1, 2)
    rough = (flat - real.tracks[..., :2]).norm(dim=-1)[here] * 32
    assert rough.mean() > 0.05
    a = physics.parabolas(flat.double())[2][free]
    assert (a[:, 1] - G).abs().median() > 0.1


def test_tracker_floors_on_textured_clips():
    clips = bouncing_balls(30, 16, 32, seed=2, texture=True)
    tracks, mass, _ = physics.track(clips.videos, clips.radius, clips.background)
    here = clips.tracks[..., 0].isfinite()
    assert (tracks - clips.tracks[..., :2]).norm(dim=-1)[here].max() * 32 < 0.03
    assert (mass[here] - 1).abs().max() < 0.03 and mass[~here].max() < 0.02


def test_parabolas_are_exact_on_parabolas():
    t = torch.arange(16, **f64) * STEP
    p0, v0 = torch.randn(2, 1, 3, 2, **f64), torch.randn(2, 1, 3, 2, **f64)
    a = torch.randn(2, **f64)
    tracks = p0 + v0 * t.view(-1, 1, 1) + a * t.view(-1, 1, 1) ** 2 / 2
    p, v, a_hat = physics.parabolas(tracks)
    middle = t[2:-2].view(-1, 1, 1)
    assert torch.allclose(a_hat, a.expand_as(a_hat), atol=1e-8)
    assert torch.allclose(v, v0 + a * middle, atol=1e-8)
    assert torch.allclose(p, p0 + v0 * middle + a * middle**2 / 2, atol=1e-8)


def test_free_frames_keep_away_from_walls_and_balls():
    tracks = torch.full((1, 4, 3, 2), math.nan, **f64)
    tracks[0, :, 0] = torch.tensor([[0.5, 0.5], [0.18, 0.5], [0.5, 0.83], [0.5, 0.5]], **f64)
    tracks[0, :, 1] = torch.tensor([[0.8, 0.7], [0.8, 0.5], [0.8, 0.5], [0.7, 0.45]], **f64)
    free = physics.free_frames(tracks, torch.tensor([0.1], **f64))
    assert free[0].tolist() == [
        [True, True, False],
        [True, True, False],
        [True, True, False],
        [False, False, False],
    ]
    free = physics.free_frames(tracks, torch.tensor([0.13], **f64))
    assert not free[0, 1, 0] and not free[0, 2, 0] and free[0, 1, 1]


def metrics(videos, clips):
    return physics.summary(physics.measure(videos, clips))


def test_real_clips_have_their_floor_in_every_metric(real):
    got = metrics(real.videos, real)
    for name in ("bad_videos", "bad_frames", "teleports", "walls"):
        assert got[name] == 0, name
    assert got["residual"] < 0.015 and got["energy"] < 1e-3 and got["momentum"] < 0.05
    assert got["position"] < 0.003 and got["speed_ratio"] == pytest.approx(1, abs=1e-3)
    assert 0.15 < got["qualified"] < 0.35
    m = physics.measure(real.videos, real)
    assert got["hits"] == sum(1 for x in m["momentum"].flatten().tolist() if x == x) > 0
    m["position"] = torch.arange(16.0).expand(len(m["position"]), 16)
    got = physics.summary(m)
    assert [got[f"position_{k}"] for k in (5, 10, 15)] == [5, 10, 15] and got["position"] == 7.5
    assert "position_10" not in physics.summary(m | {"position": m["position"][:, :8]})


def test_cheats_and_faults_show_in_the_metric_that_is_meant_for_them(real):
    got = metrics(physics.frozen(real.videos), real)
    assert got["teleports"] == 0 and got["bad_videos"] == 0  # the cheat
    assert got["speed_ratio"] == 0 and got["residual"] == pytest.approx(G, abs=1e-3)
    got = metrics(physics.shuffled(real.videos), real)
    assert got["teleports"] > 0.3 and got["residual"] > 5 and got["speed_ratio"] > 2
    r = real.radius
    slow = real.tracks.clone()
    slow[..., :2] = slow[:, :1, :, :2] + 0.5 * (slow[..., :2] - slow[:, :1, :, :2])
    got = metrics(2 * draw_balls(slow, r, 32) - 1, real)
    assert got["speed_ratio"] == pytest.approx(0.5, abs=0.01) and got["residual"] > 0.7
    gone = real.videos.clone()
    gone[:, :, 8] = 0
    got = metrics(gone, real)
    assert got["bad_frames"] == pytest.approx(1 / 16) and got["bad_videos"] == 1
    assert got["teleports"] == pytest.approx(2 / 14, abs=0.01)  # into nothing and out of it
    ghost = real.videos.clone()
    ghost[0::3, 2] = ghost[0::3, 0]  # one ball too many in the clips of one
    assert metrics(ghost, real)["bad_videos"] == pytest.approx(1 / 3)
    sunk = real.tracks.clone()
    sunk[..., 1] += 0.1
    below = real.tracks[..., 1] > 1 - r[:, None, None] + 0.03 - 0.1
    expected = (below.sum((1, 2)) / (16 * (1 + real.labels))).mean()
    assert metrics(2 * draw_balls(sunk, r, 32) - 1, real)["walls"] == pytest.approx(
        expected.item(), abs=0.01
    )


def test_momentum_at_a_hit_against_a_collision_made_by_hand():
    """Two balls meet in frame 8 and leave with 0.25 more momentum than they came with."""
    t = (torch.arange(16, **f64) - 8) * STEP
    tracks = torch.full((2, 16, 3, 2), math.nan, **f64)
    for clip, gain in enumerate((0.0, 0.25)):
        before, after = (0.5, -0.3), (-0.3, 0.5 + gain)
        for ball in (0, 1):
            v = torch.where(t < 0, before[ball], after[ball])
            tracks[clip, :, ball, 0] = 0.4 + 0.2 * ball + v * t
            tracks[clip, :, ball, 1] = 0.5 + t**2  # any fall is the same for both
    kick = physics.kicks(tracks, torch.tensor([0.1, 0.1], **f64))
    assert (~kick.isnan()).sum((1, 2)).tolist() == [1, 1] and not kick[0, 5, 0].isnan()
    assert kick[:, 5, 0].tolist() == pytest.approx([0.0, 0.25], abs=1e-9)
    assert physics.kicks(tracks - torch.tensor([0.25, 0.0]), torch.tensor([0.1, 0.1])).isnan().all()
    clips = bouncing_balls(1500, 16, 8, seed=7)
    kick = physics.kicks(clips.tracks[..., :2], clips.radius)
    kick = kick[~kick.isnan()]
    assert len(kick) > 50 and kick.quantile(0.9) < 1e-9


def test_energy_of_real_tracks_is_the_simulator_s_and_a_wind_changes_it():
    clips = bouncing_balls(600, 16, 8, seed=7)
    tracks = clips.tracks[..., :2]
    e, truth = physics.energies(tracks, clips.radius), energy(clips.tracks)[:, 2:-2]
    known = e.isfinite()
    assert known.sum() > 300 and (e - truth)[known].abs().median() < 1e-9
    t = torch.arange(16, **f64).view(1, -1, 1, 1) * STEP
    windy = physics.energies(tracks - torch.tensor([0.0, 0.2], **f64) * t, clips.radius)
    known &= windy.isfinite()
    assert known.sum() > 100 and (windy - truth)[known].abs().median() > 0.02


def test_distance_to_the_nearest_trajectory_finds_a_disturbed_start():
    clips = bouncing_balls(12, 16, 32, seed=21)
    state = clips.tracks[:, 0].clone()
    g = torch.Generator().manual_seed(0)
    state[..., 2:] += 0.05 * torch.randn(12, 3, 2, generator=g, **f64)
    other = simulate_balls(state[..., :2], state[..., 2:], clips.radius, 16)
    m = {"tracks": other[..., :2]}
    assert physics.distance(m, clips, 32, rounds=12).median() < 1e-3
    away = (other - clips.tracks)[..., :2].norm(dim=-1).nanmean((1, 2)).median() * 32
    assert away > 0.3
    noisy = {"tracks": other[..., :2] + 0.05 * torch.randn(12, 16, 3, 2, generator=g, **f64)}
    assert 1.2 < physics.distance(noisy, clips, 32).median() < 0.05 * 32 * 2**0.5 * 1.05


def test_spread_and_interval_against_plain_formulas():
    a, b = torch.randn(5, 16, 3, 2, **f64), torch.randn(5, 16, 3, 2, **f64)
    expected = ((a - b)[:, 2:].square().sum(-1) / 2).sqrt().mean((1, 2)) * 32
    assert torch.allclose(physics.spread([a, b], 2, 32), expected)
    x = torch.randn(400, **f64)
    m, better = {"teleports": x + 5}, {"teleports": x + 5 - 0.1}
    low, value, high = physics.interval(lambda m: m["teleports"].mean().item(), m)
    assert value == pytest.approx((x + 5).mean().item())
    assert (high - low) / 2 == pytest.approx(1.96 * x.std().item() / 20, rel=0.15)
    difference = lambda m, n: (m["teleports"] - n["teleports"]).mean().item()
    low, value, high = physics.interval(difference, m, better)  # paired: no spread at all
    assert high - low < 1e-9 and value == pytest.approx(0.1)
