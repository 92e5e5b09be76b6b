"""Does a video obey the law of motion? A soft-centroid tracker and the physics errors of balls.

    clips = bouncing_balls(256, 16, 32, seed)
    m = measure(videos, clips, given=2)      # per clip; videos continue the first frames of clips
    summary(m)                               # one number a metric, lengths in pixels
    interval(f, m)                           # bootstrap over clips; paired: interval(f, m, other)

Real clips have a floor in every metric, and two cheats have to be seen beside them: a frozen video
never teleports and keeps every ball, and slow motion has small accelerations. So a table shows the
speed relative to the real one, the share of windows that could be measured, and the controls.
"""
import torch
import torch.nn.functional as F

from common import draw_balls, simulate_balls

STEP, G = 1 / 15, 1.6  # of bouncing_balls
V_MAX = (1.6**2 + 1.2**2 + 2 * G * 0.74) ** 0.5  # of a ball alone; a hit may add to it, rarely


# ---- tracker ---------------------------------------------------------------------------


def moments(weights):
    """(..., S, S) -> centroid (..., 2) as x, y in the unit box, mass (...,) in pixels, and the
    second moment (...,) about the centroid."""
    axis = (torch.arange(weights.shape[-1], device=weights.device) + 0.5) / weights.shape[-1]
    mass = weights.sum((-1, -2))
    x, y = (weights.sum(d) / mass[..., None] for d in (-2, -1))  # marginals, (..., S)
    centre = torch.stack([(x * axis).sum(-1), (y * axis).sum(-1)], -1)
    second = (x * axis**2).sum(-1) + (y * axis**2).sum(-1) - centre.square().sum(-1)
    return centre, mass, second


def track(videos, radius, background=None, floor=0.05):
    """Where the ball of each channel is: tracks (n, F, 3, 2) in the unit box, mass and second
    moment (n, F, 3) relative to those of a clean ball at the same place.

    videos      (n, 3, F, S, S), uint8 or [-1, 1]; background (n, 3, 1, S, S) uint8 or None: black
    floor       what is fainter has no weight; never binarise: that costs 0.1 pixels
    A wall cuts the blob's tail off, which moves its centroid by up to 0.3 pixels, so the centroid
    is compared with that of a clean ball drawn at the estimate. Below a tenth of a ball's mass
    there is no ball: NaN.
    """
    x = videos.float() / 255 if videos.dtype == torch.uint8 else (videos.float() + 1) / 2
    if background is not None:
        back = background.float() / 255
        x = (x - back) / (1 - back)
    measured, mass, second = (m.transpose(1, 2) for m in moments((x - floor).clamp(min=0)))
    centre = measured = measured.double()
    for _ in range(4):
        clean = draw_balls(centre, radius, videos.shape[-1])
        there, clean_mass, clean_second = (
            m.transpose(1, 2) for m in moments((clean - floor).clamp(min=0))
        )
        centre = (centre + measured - there).clamp(0, 1)
    blob = 2 * torch.pi * (0.6 * radius * videos.shape[-1])[:, None, None] ** 2
    mass = torch.where(clean_mass > 0, mass / clean_mass, mass / blob)
    centre = torch.where((mass > 0.1)[..., None], centre, torch.nan)
    return centre, mass, second / clean_second


# ---- windows of free flight ------------------------------------------------------------


def parabolas(tracks):
    """Least squares over windows of five frames: position, velocity and acceleration in the middle,
    each (n, F - 4, 3, 2), in box widths and seconds."""
    p, k = tracks.unfold(1, 5, 1), torch.arange(-2.0, 3.0, dtype=tracks.dtype)
    curve = (p * (k**2 - 2)).sum(-1) / 14  # half the second difference
    return p.mean(-1) - 2 * curve, (p * k).sum(-1) / 10 / STEP, 2 * curve / STEP**2


def free_frames(tracks, radius):
    """Frames (n, F, 3) in which a ball is well away from walls and other balls."""
    r = radius[:, None, None]
    inside = torch.minimum(tracks, 1 - tracks).amin(-1) > r + 0.06  # False for NaN
    gaps = (tracks[:, :, :, None] - tracks[:, :, None]).norm(dim=-1)  # (n, F, 3, 3)
    touch = (gaps < 2.2 * r[..., None]) & ~torch.eye(3, dtype=torch.bool)
    return inside & ~touch.any(-1)


def energies(tracks, radius):
    """Total energy (n, F - 4) of the windows in which all balls fly freely, else NaN."""
    p, v, _ = parabolas(tracks)
    free = free_frames(tracks, radius).unfold(1, 5, 1).all(-1)
    there = tracks.isfinite().all(-1).any(1)[:, None]  # (n, 1, 3): balls of this clip
    e = 0.5 * v.square().sum(-1) - G * p[..., 1]  # y points down
    all_free = (free | ~there).all(-1) & there.any(-1)
    return torch.where(all_free, torch.where(there, e, 0).sum(-1), torch.nan)


def kicks(tracks, radius):
    """Change of the total horizontal momentum at hits of two balls, which should be 0: (n, F - 6,
    3), NaN where there is no hit, or a side wall is near; floor and ceiling do not change it."""
    i, j = [0, 0, 1], [1, 2, 2]
    gap = (tracks[:, :, i] - tracks[:, :, j]).norm(dim=-1)  # (n, F, pairs)
    close = (gap[:, 1:-1] <= gap[:, :-2]) & (gap[:, 1:-1] <= gap[:, 2:])
    hit = (close & (gap[:, 1:-1] < 2.4 * radius[:, None, None]))[:, 2:-2]  # frames 3 ... F - 4
    x = tracks[..., 0]
    clear = (torch.minimum(x, 1 - x) > radius[:, None, None] + 0.08) | x.isnan().all(1, True)
    clear = clear.all(-1).unfold(1, 7, 1).all(-1, True)  # (n, F - 6, 1)
    k = torch.arange(-1.0, 2.0, dtype=tracks.dtype)
    momentum = (x.nansum(-1).unfold(1, 3, 1) * k).sum(-1) / 2 / STEP  # in frames 1 ... F - 2
    change = (momentum[:, 4:] - momentum[:, :-4]).abs()  # two frames after the hit and before it
    return torch.where(hit & clear, change[..., None], torch.nan)


# ---- metrics ---------------------------------------------------------------------------


def measure(videos, clips, given=2, background=None):
    """Every metric of each clip, a dict of tensors (n, ...) with NaN where there is nothing.

    bad         (n,) 1 if in some frame a ball's mass is off by 30 %, its second moment by 50 %, or
                there is a ball too many
    bad_frames  (n,) share of such frames
    teleports   (n,) share of steps longer than 1.5 V_MAX STEP, or from or to a missing ball
    walls       (n,) share of positions more than 0.03 inside a wall
    speed, real_speed  (n,) mean length of a step / STEP
    residual    (n, windows) length of the acceleration minus gravity in free flight
    qualified   (n,) share of windows in free flight
    energy      (n,) |last - first| of the total energy over windows in free flight
    momentum    (n, hits) kicks
    position    (n, F) distance to the simulator's continuation, pixels
    tracks      (n, F, 3, 2)
    """
    n, size = len(videos), videos.shape[-1]
    tracks, mass, second = track(videos, clips.radius, background)
    here = clips.tracks[:, :1, :, 0].isfinite()  # (n, 1, 3)
    balls = here.sum(-1)
    bad = torch.where(here, ((mass - 1).abs() > 0.3) | (second > 1.5), mass > 0.3).any(-1)  # (n, F)
    tracks = torch.where(here[..., None], tracks, torch.nan)
    steps = tracks.diff(dim=1).norm(dim=-1)[:, max(given - 1, 0) :]
    jump = ~(steps <= 1.5 * V_MAX * STEP) & here
    r = clips.radius[:, None, None, None] - 0.03
    through = ((tracks < r) | (tracks > 1 - r)).any(-1)
    real = clips.tracks[..., :2]
    a = parabolas(tracks)[2] - tracks.new_tensor([0, G])
    free = free_frames(tracks, clips.radius).unfold(1, 5, 1).all(-1)
    residual = torch.where(free, a.norm(dim=-1), torch.nan)
    energy = energies(tracks, clips.radius)
    order = torch.arange(energy.shape[1]).expand_as(energy)
    known = energy.isfinite()
    first = torch.where(known, order, 10**6).amin(1).clamp(max=energy.shape[1] - 1)
    last = torch.where(known, order, -1).amax(1).clamp(min=0)
    drift = (energy.gather(1, last[:, None]) - energy.gather(1, first[:, None])).abs()[:, 0]
    return {
        "bad": bad.any(1).double(),
        "bad_frames": bad.double().mean(1),
        "teleports": jump.sum((1, 2)) / (balls[:, 0] * steps.shape[1]),
        "walls": through.sum((1, 2)) / (balls[:, 0] * tracks.shape[1]),
        "speed": steps.nanmean((1, 2)) / STEP,
        "real_speed": real.diff(dim=1).norm(dim=-1)[:, max(given - 1, 0) :].nanmean((1, 2)) / STEP,
        "residual": residual.flatten(1),
        "qualified": free.sum((1, 2)) / (balls[:, 0] * free.shape[1]),
        "energy": torch.where(first < last, drift, torch.nan),
        "momentum": kicks(tracks, clips.radius).flatten(1),
        "position": (tracks - real).norm(dim=-1).nanmean(2) * size,
        "tracks": tracks,
        "truth": real.expand(n, *real.shape[1:]),
    }


def summary(m):
    """One number a metric of what measure gave; medians where a few windows would rule a mean.

    hits: how many of two balls momentum is the median of; position_k: position in frame k
    """
    horizons = [k for k in (5, 10, 15) if k < m["position"].shape[1]]
    return {
        "bad_videos": m["bad"].mean().item(),
        "bad_frames": m["bad_frames"].mean().item(),
        "teleports": m["teleports"].mean().item(),
        "walls": m["walls"].mean().item(),
        "residual": m["residual"].nanmedian().item(),
        "energy": m["energy"].nanmedian().item(),
        "momentum": m["momentum"].nanmedian().item(),
        "hits": m["momentum"].isfinite().sum().item(),
        "position": m["position"].nanmean().item(),
        **{f"position_{k}": m["position"][:, k].nanmean().item() for k in horizons},
        "speed_ratio": (m["speed"].nanmean() / m["real_speed"].mean()).item(),
        "qualified": m["qualified"].mean().item(),
    }


def distance(m, clips, size, rounds=8):
    """RMSE in pixels to the nearest trajectory of the simulator, (n,): Levenberg-Marquardt over the
    first positions and velocities, from those of the real clip."""
    tracks, r = m["tracks"], clips.radius[:, None, None]
    n, frames = tracks.shape[:2]
    there = tracks.isfinite()  # missing balls have no residual

    def legal(s):  # a first position in a wall is no trajectory
        return torch.cat([torch.minimum(torch.maximum(s[..., :2], r), 1 - r), s[..., 2:]], -1)

    def error(s):  # (m, 3, 4) -> (m, frames * 6), of m / n states a clip
        times = len(s) // n
        path = simulate_balls(s[..., :2], s[..., 2:], clips.radius.repeat(times), frames)[..., :2]
        difference = path - tracks.repeat(times, 1, 1, 1)
        return torch.where(there.repeat(times, 1, 1, 1), difference, 0).nan_to_num(0).flatten(1)

    state, damping = legal(clips.tracks[:, 0]), torch.full((n, 1, 1), 1e-3, dtype=torch.float64)
    now, eye = error(state), torch.eye(12, dtype=torch.float64)
    for _ in range(rounds):
        ahead = torch.cat([state + 1e-6 * e.view(3, 4) for e in eye])  # (12 n, 3, 4)
        J = ((error(ahead).view(12, n, -1) - now) / 1e-6).permute(1, 2, 0)  # (n, residuals, 12)
        step = torch.linalg.solve(J.mT @ J + damping * eye, -(J.mT @ now[..., None]))
        trial = legal(state + step.view(n, 3, 4).clamp(-0.5, 0.5))
        then = error(trial)
        better = then.square().sum(1) < now.square().sum(1)
        state = torch.where(better[:, None, None], trial, state)
        now = torch.where(better[:, None], then, now)
        damping = torch.where(better[:, None, None], damping / 4, damping * 8).clamp(1e-8, 1e6)
    points = there.all(-1).sum((1, 2)).clamp(min=1)
    return (now.square().sum(1) / points).sqrt() * size


def spread(tracks, given, size):
    """Std in pixels of the positions over several samples of one condition, (n,): a list of tracks
    (n, F, 3, 2); balls that are missing in some sample do not count."""
    std = torch.stack(tracks)[:, :, given:].var(0).sum(-1).sqrt()  # (n, F - given, 3)
    return std.nanmean((1, 2)) * size


def frozen(videos, given=2):
    """Control: the last given frame repeated."""
    still = videos[:, :, given - 1 : given].expand(-1, -1, videos.shape[2] - given, -1, -1)
    return torch.cat([videos[:, :, :given], still], 2)


def shuffled(videos, given=2, seed=0):
    """Control: the frames after the given ones in one random order."""
    g = torch.Generator().manual_seed(seed)
    order = given + torch.randperm(videos.shape[2] - given, generator=g)
    return torch.cat([videos[:, :, :given], videos[:, :, order]], 2)


# ---- statistics ------------------------------------------------------------------------


def interval(statistic, *measures, draws=1000, seed=0, level=0.95):
    """Bootstrap over clips: (low, value, high) of statistic(*measures), dicts of tensors (n, ...).

    All measures take the same clips in every draw, so that a difference of two arms is paired.
    """
    n = len(next(iter(measures[0].values())))
    g = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(draws):
        i = torch.randint(n, (n,), generator=g)
        found.append(statistic(*({k: v[i] for k, v in m.items()} for m in measures)))
    tail = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.tensor(found, dtype=torch.float64).quantile(tail).tolist()
    return low, statistic(*measures), high
