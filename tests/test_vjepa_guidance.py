"""vjepa_guidance.py against loops, finite differences, dropped tokens and V-JEPA 2's key list."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vjepa_guidance as script
from common import bouncing_balls, load_checkpoint

GRID = (4, 2, 2)  # 8 frames of 8 pixels, tubelets of 2 x 4 x 4


def vjepa(grid=GRID, tiled=False, stir=0.3, **predictor):
    """A small world model with weights large enough for every term to count."""
    encoder = script.VideoEncoder(grid, 4, 36, 2, 3, 72, tiled)
    own = script.LatentPredictor(grid, 36, 64, 2, tiled, **predictor)
    world = script.WorldModel(encoder, own, grid, tiny=True)
    for w in world.parameters():
        w.data += stir * torch.randn_like(w) * (w.ndim > 1 or stir < 0.1)
    return world.eval()


def some_visible(n):
    """A third to two thirds of the 16 tokens, in any order."""
    visible = torch.rand(n, 16).argsort(1) < torch.tensor([5, 8, 11])[:n, None]
    assert visible.any(1).all() and not visible.all(1).any()
    return visible


class Perfect(nn.Module):
    """A predictor that knows the features of the whole clip."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, features, visible):
        return self.answer


# ---- rotation --------------------------------------------------------------------------


def rotated(x, place, tiled):
    """One vector x (D,) at a place (t, h, w), pair by pair as the official description goes."""
    out, third = x.clone(), 2 * (len(x) // 3 // 2)
    for axis in range(3):
        part = x[axis * third : (axis + 1) * third]
        for i in range(third // 2):
            for j in (0, 1):
                index = (2 * i + j) % (third // 2) if tiled else i
                angle = place[axis] * 10000 ** (-index / (third / 2))
                other = -part[2 * i + 1] if j == 0 else part[2 * i]
                value = part[2 * i + j] * math.cos(angle) + other * math.sin(angle)
                out[axis * third + 2 * i + j] = value
    return out


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("head_dim, third", [(64, 20), (80, 26), (32, 10), (12, 4)])
def test_rotation_against_a_loop_over_pairs(tiled, head_dim, third):
    grid = (2, 3, 4)
    table = script.rope_3d(grid, head_dim, tiled)
    assert table.shape == (2, 24, head_dim)
    assert (table[0, :, 3 * third :] == 1).all() and (table[1, :, 3 * third :] == 0).all()
    x = torch.randn(24, head_dim)
    got = script.turn_pairs(x, table)
    places = [(t, h, w) for t in range(2) for h in range(3) for w in range(4)]  # t H W + h W + w
    for n, place in enumerate(places):
        assert torch.allclose(got[n], rotated(x[n], place, tiled), atol=1e-5)


def test_only_the_correct_rotation_keeps_norms_and_knows_relative_places_only():
    q, k = torch.randn(64), torch.randn(64)
    place = {False: [], True: []}
    for tiled in place:
        table = script.rope_3d((6, 1, 1), 64, tiled)
        turned = [script.turn_pairs(x.expand(6, 64), table) for x in (q, k)]
        assert (torch.allclose(turned[0].norm(dim=1), q.norm(), rtol=1e-5)) is not tiled
        products = turned[0] @ turned[1].T
        place[tiled] = [products[0, 2], products[1, 3], products[3, 5]]
    assert torch.stack(place[False]).std() < 1e-4 < torch.stack(place[True]).std()


# ---- encoder and predictor -------------------------------------------------------------


def test_hidden_tokens_are_as_good_as_dropped():
    world, video = vjepa(), torch.randn(3, 3, 8, 8, 8)
    visible = some_visible(3)
    got = world.encoder(video, visible)
    tokens = world.encoder.patch_embed["proj"](video).flatten(2).mT
    for b in range(3):
        keep = visible[b].nonzero()[:, 0]
        h = tokens[b : b + 1, keep]
        for block in world.encoder.blocks:
            h = block(h, world.encoder.table[:, keep])
        assert torch.allclose(got[b, keep], world.encoder.norm(h)[0], atol=1e-5)


def test_block_against_plain_loops_in_float64():
    block = script.ViTBlock(12, 2, 20).double()
    for w in block.parameters():
        w.data += 0.3 * torch.randn_like(w)
    x, table = torch.randn(1, 5, 12).double(), script.rope_3d((5, 1, 1), 6).double()
    visible = torch.tensor([[True, False, True, True, False]])
    norm = lambda m, v: (v - v.mean()) / (v.var(unbiased=False) + 1e-6).sqrt() * m.weight + m.bias
    qkv = [block.attn["qkv"](norm(block.norm1, v)) for v in x[0]]
    out = []
    for i in range(5):
        heads = []
        for h in range(2):
            cut = lambda j, part: qkv[j][12 * part + 6 * h : 12 * part + 6 * h + 6]
            spin = lambda j, part: rotated(cut(j, part), (j, 0, 0), False)
            keys = [j for j in range(5) if visible[0, j]]
            score = torch.stack([spin(i, 0) @ spin(j, 1) / 6**0.5 for j in keys]).softmax(0)
            heads.append(sum(s * cut(j, 2) for s, j in zip(score, keys)))
        v = x[0, i] + block.attn["proj"](torch.cat(heads))
        hidden = block.mlp["fc1"](norm(block.norm2, v))
        gelu = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        out.append(v + block.mlp["fc2"](gelu))
    assert torch.allclose(block(x, table, visible)[0], torch.stack(out), atol=1e-6)


def test_initial_weights_are_truncated_normal_and_shrink_with_depth():
    net = script.VideoEncoder((2, 2, 2), 4, 96, 8, 3, 384)
    for i, block in enumerate(net.blocks, 1):
        assert block.attn["qkv"].weight.std().item() == pytest.approx(0.02, rel=0.05)
        for layer in (block.attn["proj"], block.mlp["fc2"]):
            assert layer.weight.std().item() == pytest.approx(0.02 / (2 * i) ** 0.5, rel=0.05)
        assert not block.mlp["fc1"].bias.any()
    assert net.patch_embed["proj"].weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_predictor_sees_visible_features_and_the_chosen_mask_token():
    world = vjepa(mask_tokens=3, mask_index=1)
    net, features = world.predictor, torch.randn(2, 16, 36)
    visible = script.draw_visible(2, GRID, "causal", "cpu")
    out = net(features, visible)
    noise = torch.where(visible[..., None], features, torch.randn_like(features))
    assert torch.equal(out, net(noise, visible))  # hidden features do not enter
    assert not torch.allclose(out, net(features + visible[..., None] * 0.1, visible))
    for index, same in ((0, True), (1, False), (2, True)):
        kept = net.mask_tokens[index].data.clone()
        net.mask_tokens[index].data += 1
        assert torch.equal(out, net(features, visible)) is same
        net.mask_tokens[index].data = kept


def test_prediction_of_a_window_is_the_training_forward_with_a_causal_mask():
    world, video = vjepa(), torch.randn(2, 3, 8, 8, 8)
    visible = (torch.arange(16) < 8).expand(2, 16)
    z_hat, z, h = world(video, visible)
    assert torch.equal(h, world.encoder(video, visible))
    assert torch.allclose(world.predict(video[:, :, :4], 16), z_hat[:, 8:], atol=1e-5)
    assert torch.equal(z, world.target(video)) and not z.requires_grad
    assert not torch.allclose(z, world.encoder(video))  # stirred on its own
    frozen = script.WorldModel(world.encoder, world.predictor, GRID)
    assert frozen.target is frozen.encoder and not frozen(video, visible)[1].requires_grad


# ---- official weights ------------------------------------------------------------------

SIZES = {"vitl": (1024, 24, 16, 4096), "vith": (1280, 32, 16, 5120), "vitg": (1408, 40, 22, 6144)}
MILLIONS = {"vitl": 304, "vith": 632, "vitg": 1012}


def published(dim, depth, hidden, own=384, own_depth=12):
    """Names and shapes of a file of V-JEPA 2, from the published description."""

    def block(name, dim, hidden):
        layers = {"norm1": (dim,), "attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
        layers |= {"norm2": (dim,), "mlp.fc1": (hidden, dim), "mlp.fc2": (dim, hidden)}
        for layer, shape in layers.items():
            yield f"{name}.{layer}.weight", shape
            yield f"{name}.{layer}.bias", shape[:1]

    encoder = {"patch_embed.proj.weight": (dim, 3, 2, 16, 16), "patch_embed.proj.bias": (dim,)}
    encoder |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    for i in range(depth):
        encoder |= dict(block(f"blocks.{i}", dim, hidden))
    predictor = {"predictor_embed.weight": (own, dim), "predictor_embed.bias": (own,)}
    predictor |= {f"mask_tokens.{i}": (1, 1, own) for i in range(10)}
    predictor |= {"predictor_norm.weight": (own,), "predictor_norm.bias": (own,)}
    predictor |= {"predictor_proj.weight": (dim, own), "predictor_proj.bias": (dim,)}
    for i in range(own_depth):
        predictor |= dict(block(f"predictor_blocks.{i}", own, 4 * own))
    return encoder, predictor


def shapes_of(net):
    return {name: tuple(w.shape) for name, w in net.state_dict().items()}


@pytest.mark.parametrize("name", SIZES)
def test_official_key_list_of_the_three_sizes(name):
    dim, depth, heads, hidden = SIZES[name]
    with torch.device("meta"):
        net = script.VideoEncoder((8, 16, 16), 16, dim, depth, heads, hidden, True)
        own = script.LatentPredictor((8, 16, 16), dim, 384, 12, True, 10, 1)
    encoder, predictor = published(dim, depth, hidden)
    assert shapes_of(net) == encoder and shapes_of(own) == predictor
    assert round(sum(math.prod(s) for s in encoder.values()) / 1e6) == MILLIONS[name]
    assert sum(math.prod(s) for s in predictor.values()) == pytest.approx(22e6, rel=0.03)


def official_file(path, dim=128, prefix="module.backbone.", **changes):
    """A file of V-JEPA 2's names and shapes, narrow, with random weights."""
    parts = published(dim, 2, 4 * dim, 64, 2)
    draw = lambda shapes: {prefix + k: 0.1 * torch.randn(s) for k, s in shapes.items()}
    saved = {"encoder": draw(parts[0]), "target_encoder": draw(parts[0]), "epoch": 10}
    saved["predictor"] = {k.replace("backbone.", ""): w for k, w in draw(parts[1]).items()}
    saved["encoder"][prefix + "pos_embed"] = torch.zeros(1, 8, dim)
    torch.save(saved | changes, path)
    return saved


def test_official_weights_load_by_key_into_both_encoders():
    saved = official_file("vit.pt")
    video = torch.rand(1, 3, 4, 32, 32) * 2 - 1
    features = {}
    for key in ("encoder", "target_encoder"):
        for index in (0, 1):
            world = script.load_official("vit.pt", key, index, 4).eval()
            for net in (world.encoder, world.target):
                for name, w in net.state_dict().items():
                    assert torch.equal(w, saved[key]["module.backbone." + name]), name
            for name, w in world.predictor.state_dict().items():
                assert torch.equal(w, saved["predictor"]["module." + name]), name
            with torch.no_grad():
                z = world.target(video)
                assert z.shape == (1, 2 * 16 * 16, 128) and world.grid == (2, 16, 16)
                features[key, index] = world.predict(video[:, :, :2], z.shape[1])
    assert not torch.allclose(features["encoder", 0], features["target_encoder", 0])
    assert not torch.allclose(features["encoder", 0], features["encoder", 1])


def test_official_loading_takes_the_tiled_rotation_and_imagenet_statistics():
    official_file("vit.pt")
    world = script.load_official("vit.pt", "encoder", 1, 4)
    assert torch.equal(world.encoder.table, script.rope_3d((2, 16, 16), 64, True))
    assert torch.equal(world.predictor.table, script.rope_3d((2, 16, 16), 32, True))
    assert not torch.allclose(world.encoder.table, script.rope_3d((2, 16, 16), 64))
    seen, proj = [], world.encoder.patch_embed["proj"]
    proj.register_forward_hook(lambda m, i, o: seen.append(i[0]))
    with torch.no_grad():
        world.encoder(torch.ones(1, 3, 4, 32, 32))
        world.encoder(torch.rand(2, 3, 4, 20, 40))  # squeezed, as in WMReward
    assert [tuple(x.shape) for x in seen] == [(1, 3, 4, 256, 256), (2, 3, 4, 256, 256)]
    white = torch.tensor([2.2489, 2.4286, 2.6400])  # (1 - mean) / std
    assert torch.allclose(seen[0][0, :, 1, 5, 5], white, atol=1e-3)


def test_official_files_with_a_name_too_few_or_too_many_are_refused(refuses):
    for change in ("missing", "extra", "shape"):
        saved = official_file("vit.pt")
        part = dict(saved["encoder"])
        if change == "missing":
            del part["module.backbone.blocks.1.mlp.fc2.bias"]
        elif change == "extra":
            part["module.backbone.blocks.1.attn.gate"] = torch.ones(1)
        else:
            part["module.backbone.norm.bias"] = torch.ones(2)
        official_file("vit.pt", encoder=part)
        refuses(lambda: script.load_official("vit.pt", "encoder", 1, 4), "vit.pt")
    refuses(lambda: script.load_official("vit.pt", "ema_encoder", 1, 4), "ema_encoder")


# ---- masks and loss --------------------------------------------------------------------


def test_block_masks_run_through_all_frames_and_hide_their_share():
    grid = (8, 16, 16)
    for count, share, low, high in ((1, 0.15, 0.13, 0.17), (8, 0.15, 0.5, 0.8), (2, 0.7, 0.7, 1)):
        hidden = script.hide_boxes(4000, grid, count, share, "cpu")
        assert low < hidden.float().mean() < high, (count, share)
    one = script.hide_boxes(500, grid, 1, 0.15, "cpu")
    rows, columns = one.any(2).sum(1), one.any(1).sum(1)
    assert (one.flatten(1).sum(1) == rows * columns).all()  # a full box
    assert 0.7 < (rows / columns).min() and (rows / columns).max() < 1.7  # 0.75 to 1.5, rounded
    assert len(rows.unique()) > 1
    visible = script.draw_visible(300, grid, "blocks", "cpu").view(300, *grid)
    assert (visible == visible[:, :1]).all()
    share = (~visible).float().mean((1, 2, 3))
    assert 0.2 < (share > 0.8).float().mean() < 0.8  # both kinds occur


def test_no_mask_hides_or_shows_everything():
    for grid in ((8, 4, 4), (8, 8, 8), (16, 1, 1)):
        for masks in ("causal", "mixed") if grid[1] > 1 else ("causal",):
            visible = script.draw_visible(3000, grid, masks, "cpu")
            assert visible.any(1).all() and (~visible).any(1).all(), (grid, masks)


def test_causal_masks_cut_in_the_middle_half():
    frames = script.draw_visible(4000, (16, 2, 2), "causal", "cpu").view(4000, 16, 4)
    assert (frames == frames[:, :, :1]).all()
    cut = frames[:, :, 0].sum(1)
    assert cut.min() == 4 and cut.max() == 12 and len(cut.unique()) == 9
    assert (frames[:, :, 0].int().diff(dim=1) <= 0).all()  # past visible, future hidden
    kinds = script.draw_visible(4000, (16, 4, 4), "mixed", "cpu").view(4000, 16, 16)
    causal = (kinds == kinds[:, :, :1]).all(-1).all(-1)
    assert causal.float().mean() == pytest.approx(1 / 3, abs=0.05)


def test_loss_is_l1_on_normalised_targets_of_hidden_tokens():
    world, video = vjepa(), torch.randn(3, 3, 8, 8, 8)
    visible = some_visible(3)
    loss = script.jepa_loss(world, video, visible)
    z_hat = world.predictor(world.encoder(video, visible), visible)
    z = world.target(video)
    z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    each = [(z_hat[b] - z[b])[~visible[b]].abs().mean() for b in range(3)]
    assert loss.item() == pytest.approx((sum(each) / 3).item(), rel=1e-5)
    wide = script.jepa_loss(world, video, visible, 0.7) - loss  # the terms of VICReg, by hand
    h = world.encoder(video, visible).flatten(0, 1)
    h = h - h.mean(0)
    cov = h.T @ h / (len(h) - 1)
    off = sum(cov[i, j] ** 2 for i in range(36) for j in range(36) if i != j) / 36
    hinge = (1 - (cov.diagonal() + 1e-4).sqrt()).clamp(min=0).mean()
    assert wide.item() == pytest.approx(0.7 * (off + hinge).item(), rel=1e-3)
    loss.backward()
    assert all(w.grad is None for w in world.target.parameters())
    assert all(w.grad is not None for w in world.encoder.parameters())
    assert all(w.grad is not None for w in world.predictor.parameters())


# ---- surprise --------------------------------------------------------------------------


def test_no_surprise_if_the_predictor_returns_the_target():
    world, video = vjepa(), torch.randn(2, 3, 8, 8, 8)
    world.predictor = Perfect(world.target(video))
    for cos in ("feature", "token"):
        S = script.surprise(video, world, 4, 8, 1, cos)
        assert S.shape == (2,) and S.abs().max() < 1e-5
    world.predictor.answer = -world.predictor.answer
    assert script.surprise(video, world, 4, 8).min() > 1.999  # and 2 for its opposite


def test_changing_the_future_leaves_the_prediction_bit_identical():
    for tiled in (False, True):
        world, video = vjepa(tiled=tiled), torch.randn(2, 3, 8, 8, 8)
        other = video.clone()
        other[:, :, 4:] = torch.randn(2, 3, 4, 8, 8)
        visible = (torch.arange(16) < 8).expand(2, 16)
        one, two = (world(v, visible) for v in (video, other))
        assert torch.equal(one[0], two[0]) and not torch.allclose(one[1], two[1])
        one, two = (world.predict(v[:, :, :4], 16) for v in (video, other))
        assert torch.equal(one, two)
        seen = []
        world.predictor.register_forward_hook(lambda m, i, o: seen.append(o))
        for v in (video, other):
            script.surprise(v, world, 4, 8)
        assert torch.equal(*seen)


@pytest.mark.parametrize("F_, W, stride", [(8, 4, 1), (8, 4, 2), (8, 8, 8), (8, 4, 3), (7, 4, 2)])
def test_windows_start_at_multiples_of_the_stride_and_average(F_, W, stride):
    world, video, calls = vjepa(), torch.randn(2, 3, F_, 8, 8), []
    with torch.no_grad():
        S = script.surprise(video, world, 2, W, stride)
        starts = range(0, F_ - W + 1, stride)
        assert len(starts) == (F_ - W) // stride + 1
        for k in starts:
            calls.append(script.surprise(video[:, :, k : k + W], world, 2, W))
    assert torch.allclose(S, torch.stack(calls).mean(0), atol=1e-6)


def test_cosine_over_channels_and_over_tokens_differ_and_match_numpy_style_loops():
    world, video = vjepa(), torch.randn(1, 3, 8, 8, 8)
    with torch.no_grad():
        z = script.plain_norm(world.target(video))[0, 8:]
        z_hat = script.plain_norm(world.predict(video[:, :, :4], 16))[0]
        cos = lambda a, b: (a @ b / (a @ a).sqrt() / (b @ b).sqrt()).item()
        feature = sum(1 - cos(z_hat[n], z[n]) for n in range(8)) / 8
        token = sum(1 - cos(z_hat[:, d], z[:, d]) for d in range(36)) / 36
        assert script.surprise(video, world, 4, 8).item() == pytest.approx(feature, abs=1e-5)
        S = script.surprise(video, world, 4, 8, cos="token").item()
    assert S == pytest.approx(token, abs=1e-5) and abs(token - feature) > 1e-3


def test_gradient_against_finite_differences_on_a_shift_of_three_pixels():
    world, video = vjepa(stir=0.1), torch.rand(2, 3, 8, 8, 8) * 2 - 1
    direction = video.roll(3, -1) - video
    x = video.clone().requires_grad_()
    g = {}
    for grad in ("target", "context", "both"):
        S = script.surprise(x, world, 4, 8, grad=grad)
        g[grad] = torch.autograd.grad(S.sum(), x)[0]
    assert torch.allclose(g["both"], g["target"] + g["context"], atol=1e-6)  # product rule
    assert not g["context"][:, :, 4:].any() and g["target"][:, :, 4:].any()
    assert g["context"][:, :, :4].any()
    with torch.no_grad():
        h = 1e-2
        up, down = (script.surprise(video + s * h * direction, world, 4, 8) for s in (1, -1))
    slope = (g["both"] * direction).flatten(1).sum(1)
    assert torch.allclose((up - down) / (2 * h), slope, rtol=2e-2, atol=1e-4)


def test_surprise_stays_in_float32_under_autocast():
    world, video = vjepa(), torch.randn(2, 3, 8, 8, 8)
    with torch.no_grad():
        expected = script.surprise(video, world, 4, 8)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(script.surprise(video, world, 4, 8), expected)


# ---- health ----------------------------------------------------------------------------


class Sees(nn.Module):
    """Features that are a given function of the clip, two tokens a frame pair."""

    def __init__(self, features):
        super().__init__()
        self.features, self.grid = features, (8, 2, 1)

    def target(self, video):
        return self.features(video)


def test_health_reads_position_and_velocity_and_tells_collapsed_features():
    clips = bouncing_balls(200, 16, 16, 0)
    videos = clips.videos.float() / 127.5 - 1
    state = clips.tracks[:, :8:2, 0].float()  # (200, 4, 4), of the 8 frames of a window
    noise, lift = torch.randn(200, 8, 12), torch.randn(4, 6)
    still = torch.tensor([1.0, -1.0]).repeat(8, 8, 3)[:1].expand(200, 8, 6)  # rules the LayerNorm

    def knows(video):  # both tokens of a pair of frames: position and velocity, linear
        assert torch.equal(video, videos[:, :, :8])  # no more frames than a window of training
        return torch.cat([0.01 * (state @ lift).repeat_interleave(2, 1), still], 2)

    S = lambda video: video[:, :, 0].mean((1, 2, 3))
    good = script.health(Sees(knows), videos, clips.tracks, S, 8)
    blind = script.health(Sees(lambda video: noise), videos, clips.tracks, S, 8)
    dull = 0.001 * noise + lift.view(2, 12).repeat(4, 1)
    dead = script.health(Sees(lambda video: dull), videos, clips.tracks, S, 8)
    assert good["position"] > 0.95 and good["velocity"] > 0.9
    assert abs(blind["position"]) < 0.3 and abs(blind["velocity"]) < 0.3
    assert blind["std"] == pytest.approx(1, abs=0.05) and dead["std"] < 0.01
    assert blind["rank"] == pytest.approx(11, abs=0.1) and dead["rank"] < 1.1  # LN takes one of 12
    assert good["surprise"] == pytest.approx(videos[:, :, 0].mean().item(), rel=1e-4)
    assert good["surprise"] != good["shuffled"]


# ---- generator, best-of-N, guidance ----------------------------------------------------


def test_generator_loss_against_its_definition_and_without_the_given_frames():
    z1, y = torch.randn(5, 4, 6, 3, 1), torch.tensor([0, 1, 2, 0, 1])
    t, seen = torch.rand(5), []

    def net(z, time, labels):
        seen.append((z, time, labels))
        return 0.5 * z

    torch.manual_seed(3)
    loss = script.flow_loss(net, z1, y, t, 2)
    torch.manual_seed(3)
    z0 = torch.randn_like(z1)
    z = torch.stack([t[b] * z1[b] + (1 - t[b]) * z0[b] for b in range(5)])
    z[:, :, :2] = z1[:, :, :2]
    assert torch.allclose(seen[0][0], z) and seen[0][1] is t and seen[0][2] is y
    assert loss.item() == pytest.approx((0.5 * z - z1 + z0)[:, :, 2:].square().mean().item())


def gaussian(mean, std, cond):
    """The exact velocity network of independent Gaussian data, and the flow's end for noise z."""

    def net(z, t, y):
        t = t.view(-1, 1, 1, 1, 1)
        gain = t * std**2 / (t**2 * std**2 + (1 - t) ** 2)
        x_hat = mean + gain * (z - t * mean)
        return (x_hat - z) / (1 - t)

    return net, lambda z: torch.cat([cond, (mean + std * z)[:, :, cond.shape[2] :]], 2)


def test_plain_sampler_converges_to_the_exact_flow_and_keeps_the_given_frames():
    cond, z = torch.randn(3, 4, 2, 3, 1), torch.randn(3, 4, 6, 3, 1)
    net, end = gaussian(0.7, 0.4, cond)
    errors = []
    for N in (50, 100):
        out = script.sample_guided(net, None, None, z, None, cond, N)
        assert torch.allclose(out[:, :, :2], cond, atol=1e-5)
        errors.append((out - end(z)).abs().max().item())
    assert errors[1] < 0.6 * errors[0] < 0.05  # order one


def test_eta_zero_and_a_window_that_is_never_reached_are_the_plain_sampler_bit_for_bit():
    cond, z = torch.randn(2, 4, 2, 3, 1), torch.randn(2, 4, 6, 3, 1)
    net, _ = gaussian(0.7, 0.4, cond)
    never = lambda x: pytest.fail("asked for a gradient")
    plain = script.sample_guided(net, never, never, z, None, cond, 8)
    assert torch.equal(script.sample_guided(net, never, never, z, None, cond, 8, 0.0, 0, 1), plain)
    assert torch.equal(script.sample_guided(net, never, never, z, None, cond, 8, 0.1, 8, 1), plain)
    S = lambda x: x.square().sum((1, 2, 3, 4))
    assert not torch.allclose(
        script.sample_guided(net, lambda z: z, S, z, None, cond, 8, 0.1, 7, 1), plain)


@pytest.mark.parametrize(
    "skip, every, steps", [(0, 1, range(8)), (3, 2, (3, 5, 7)), (2, 4, (2, 6))]
)
def test_guided_steps_are_those_after_skip_every_so_many(skip, every, steps, monkeypatch):
    cond, z, times = torch.randn(1, 4, 2, 3, 1), torch.randn(1, 4, 6, 3, 1), []
    monkeypatch.setattr(script, "guided_step", lambda v, d, S, z, t, eta: times.append(t) or z)
    net, _ = gaussian(0.7, 0.4, cond)
    script.sample_guided(net, None, None, z, None, cond, 8, 0.1, skip, every)
    assert times == [i / 8 for i in steps]


def test_guided_step_has_the_length_and_direction_of_the_gradient_by_finite_differences():
    z, t, eta = torch.randn(3, 2, 4, 3, 1).double(), 0.3, 0.05
    A = torch.randn(24, 24).double()
    velocity = lambda z, t: torch.tanh(z.flatten(1) @ A).view_as(z)
    decode = lambda z: 2 * z + 0.1 * z**2
    S = lambda x: (x - 1).square().flatten(1).sum(1) ** 0.5
    out = script.guided_step(velocity, decode, S, z, t, eta)
    f = lambda z: S(decode(z + 0.7 * velocity(z, t)))
    for b in range(3):
        g = torch.zeros(24).double()
        for i in range(24):
            h = torch.zeros(24).double()
            h[i] = 1e-6
            up, down = (f((z[b].flatten() + s * h).view(1, 2, 4, 3, 1)) for s in (1, -1))
            g[i] = (up - down)[0] / 2e-6
        expected = z[b].flatten() - eta * z[b].norm() * g / g.norm()
        assert torch.allclose(out[b].flatten(), expected, atol=1e-6)
    assert not out.requires_grad and (f(out) < f(z)).all()  # towards less surprise


def test_guidance_lowers_the_surprise_of_gaussian_samples_and_keeps_the_given_frames():
    cond, z = torch.randn(4, 4, 2, 3, 1), torch.randn(4, 4, 6, 3, 1)
    net, _ = gaussian(0.7, 0.4, cond)
    S = lambda x: (x[:, :, 2:] - 3).square().mean((1, 2, 3, 4))
    plain, guided = (script.sample_guided(net, lambda z: 2 * z, S, z, None, cond, 20, eta, 2)
                     for eta in (0.0, 0.02))
    assert (S(2 * guided) < S(2 * plain)).all()
    assert torch.allclose(guided[:, :, :2], cond, atol=1e-5)


def test_best_of_n_takes_the_least_surprise_of_each_condition():
    candidates, S = torch.randn(5, 4, 2, 3), torch.rand(5, 4)
    best = script.best_of_n(candidates, S)
    for b in range(4):
        n = min(range(5), key=lambda n: S[n, b])
        assert torch.equal(best[b], candidates[n, b])
    assert torch.equal(script.best_of_n(candidates[:1], S[:1]), candidates[0])


# ---- the script ------------------------------------------------------------------------

SMALL = (
    "--image-size 16 --clips 40 --batch-size 4 --frames 8 --components 8 --dim 16 --depth 1 "
    "--generator-steps 3 --steps 4 --log-every 2 --save-every 2 --sample-every 4 --n 3 "
    "--predictor-dim 32 --best-of 2 --sampling-steps 3 --skip 1 --C 2 --W 4 --device cpu "
    "--precision fp32 --compile off"
).split()
TINY = ["--world", "tiny", "--world-dim", "32", "--masks", "mixed", "--texture"]


def config(flags):
    return script.parse_config(script.Config, script.PRESETS, (), SMALL + flags)


def frames_of(path):
    from PIL import Image

    with Image.open(path) as picture:
        return picture.size, getattr(picture, "n_frames", 1)


@pytest.mark.parametrize("world", [[], TINY], ids=["frozen", "tiny"])
def test_end_to_end_writes_stages_metrics_and_pictures(world, refuses):
    script.main(SMALL + world + ["--out", "run"])
    stage, last = load_checkpoint("run/generator/last.pt"), load_checkpoint("run/last.pt")
    assert stage["step"] == 3 and last["step"] == 4
    for name, w in stage["generator"].items():  # what sampling needs is in the last stage's file
        assert torch.equal(w, last["ema"][name])
    lines = [json.loads(x) for x in Path("run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert {"std", "rank", "surprise", "shuffled", "position", "velocity"} <= set(lines[-1])
    assert frames_of("run/samples_0000004.gif") == ((5 * 66, 3 * 66), 8)
    assert frames_of("run/samples_0000004.png") == ((8 * 66, 5 * 66), 1)
    moved = [
        not torch.equal(last["model"]["encoder." + k[7:]], w)
        for k, w in last["model"].items() if k.startswith("target.")
    ]
    assert any(moved) is bool(world)  # an EMA of what is trained, or the same
    refuses(lambda: script.main(["--sample", "run/generator/last.pt"]), "generator/last.pt", "ema")


@pytest.mark.parametrize("world, tokens", [([], 4 * 3), (TINY, 2 * 16)], ids=["frozen", "tiny"])
def test_world_model_is_trained_on_windows_from_everywhere(world, tokens, monkeypatch):
    seen = []

    def loss(net, video, visible, spread, real=script.jepa_loss):
        seen.append((video, visible.shape, spread))
        return real(net, video, visible, spread)

    monkeypatch.setattr(script, "jepa_loss", loss)
    script.main(SMALL + world + ["--out", "run", "--steps", "12", "--sample-every", "99"])
    whole = script.load_videos(config(world), "cpu")[0].float() / 127.5 - 1
    starts = set()
    for video, visible, spread in seen:
        assert video.shape == (4, 3, 4, 16, 16) and visible == (4, tokens)
        assert spread == bool(world)
        for k in range(5):
            found = (whole[:, :, k : k + 4] == video[0]).flatten(1).all(1)
            starts |= {k} if found.any() else set()
    assert len(starts) > 2


@pytest.mark.parametrize("world", [[], TINY], ids=["frozen", "tiny"])
def test_interrupted_run_ends_with_the_same_weights(world, same_when_interrupted):
    same_when_interrupted(script, SMALL + world, ["model", "ema"])


def test_only_the_predictor_of_a_frozen_world_is_trained_and_targets_of_tiny_are_an_average():
    script.main(SMALL + ["--out", "frozen"])
    saved = load_checkpoint("frozen/last.pt")
    cfg = config(TINY[:4])
    codec = script.load_videos(cfg, "cpu")[2]
    for name, w in codec.state_dict().items():
        assert torch.equal(saved["model"]["encoder." + name], w)
        assert torch.equal(saved["model"]["target." + name], w)
    torch.manual_seed(cfg.seed)
    _, world = script.build(cfg, codec)  # as at the start of the run
    start = {k: w.clone() for k, w in world.target.state_dict().items()}
    script.main(SMALL + TINY[:4] + ["--out", "tiny", "--steps", "1"])
    saved = load_checkpoint("tiny/last.pt")["model"]
    for name, w in start.items():
        expected = 0.1 * w + 0.9 * saved["encoder." + name]  # (1 + k) / (10 + k) in step k = 0
        assert torch.allclose(saved["target." + name], expected, atol=1e-7), name


def test_sample_reads_the_checkpoint_and_takes_reward_flags(refuses):
    script.main(SMALL + ["--out", "run"])
    script.main(["--sample", "run/last.pt", "--n", "2", "--eta", "0", "--best-of", "1"])
    size, frames = frames_of("run/sample.gif")
    assert size == (3 * 66, 2 * 66) and frames == 8  # real | one sample | best of one
    strip = Path("run/sample.png").read_bytes()
    script.main(["--sample", "run/last.pt", "--n", "2", "--eta", "0.3", "--cos", "token"])
    assert Path("run/sample.png").read_bytes() != strip
    refuses(lambda: script.main(["--sample", "run/last.pt", "--world", "tiny"]), "frozen")
    refuses(lambda: script.main(["--sample", "run/last.pt", "--dim", "8"]), "dim")
    refuses(lambda: script.main(["--sample", "run/none.pt"]), "none.pt")


def test_sample_with_published_weights_ranks_by_them(refuses, monkeypatch):
    script.main(SMALL + ["--out", "run"])
    official_file("vit.pt")
    flags = ["--sample", "run/last.pt", "--n", "1", "--world", "official", "--weights"]
    script.main([*flags, "vit.pt", "--eta", "0", "--stride", "4"])
    assert frames_of("run/sample.gif") == ((3 * 66, 66), 8)
    refuses(lambda: script.main([*flags, "none.pt"]), "none.pt")  # nothing of that name to load
    asked = []
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url",
                        lambda url, **how: asked.append(url) or torch.load("vit.pt"))
    script.main([*flags, "vitg", "--eta", "0", "--stride", "4"])
    assert asked == ["https://dl.fbaipublicfiles.com/vjepa2/vitg.pt"]


def test_published_weights_judge_samples_of_a_run_with_other_masks():
    path = Path("run/last.pt")
    script.main(SMALL + ["--out", "run"])
    saved = torch.load(path, weights_only=True)
    saved["config"] |= {"world": "tiny", "masks": "mixed"}  # as --preset gpu has them
    torch.save(saved, path)
    official_file("vit.pt")
    script.main(["--sample", "run/last.pt", "--n", "1", "--world", "official", "--weights",
                 "vit.pt", "--eta", "0", "--stride", "4"])
    assert frames_of("run/sample.gif") == ((3 * 66, 66), 8)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--W", "4"], ["C < W"]),
        (["--frames", "6"], ["W <= frames"]),
        (["--C", "3"], ["even"]),
        (["--world", "official"], ["weights"]),
        (["--weights", "vitg"], ["official"]),
        (["--masks", "blocks"], ["tiny"]),
        (["--world", "tiny", "--image-size", "12"], ["image_size"]),
        (["--predictor-dim", "48"], ["predictor_dim"]),
        (["--eta", "-1"], ["eta"]),
        (["--components", "2000"], ["components"]),
        (["--clips", "10"], ["batch_size"]),
        (["--cos", "channel"], ["channel"]),
        (["--best-of", "0"], ["best_of"]),
        (["--ema-decay", "1"], ["ema_decay"]),
        (["--mask-index", "10"], ["mask_index"]),
        (["--preset", "gup"], ["gup", "gpu"]),  # the only one
    ],
)
def test_bad_input_ends_with_one_line_and_writes_nothing(flags, words, refuses):
    refuses(lambda: script.main([*flags, "--out", "run"]), *words)
    assert not Path("run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("world", [[], TINY], ids=["frozen", "tiny"])
def test_two_ranks_train_both_stages_and_sample_as_one(world, launch):
    launch(script, *SMALL, *world, "--out", "two", ranks=2)
    saved = load_checkpoint("two/last.pt")
    assert saved["step"] == 4 and load_checkpoint("two/generator/last.pt")["step"] == 3
    lines = [json.loads(x) for x in Path("two/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines] == [2, 4] and lines[-1]["rank"] > 1
    for ranks in (1, 2):  # 104 clips: the second rank has the last four
        launch(script, "--sample", "two/last.pt", "--n", "104", "--device", "cpu", "--out",
               f"s{ranks}", ranks=ranks)
    assert Path("s1/sample.gif").read_bytes() == Path("s2/sample.gif").read_bytes()
    assert frames_of("s2/sample.gif")[0] == (5 * 66, 104 * 66)


# ---- the claim's instruments -----------------------------------------------------------


def test_broken_laws_are_the_ones_they_are_called():
    from tests.claims import vjepa_guidance as claim

    clips = bouncing_balls(30, 16, 16, 0)
    real, r = clips.tracks, clips.radius
    on = claim.go_on(real[:, 8], r, 8)
    assert torch.allclose(on.nan_to_num(0), real[:, 8:].nan_to_num(0), atol=1e-9)  # the exact law
    for kind in [*claim.BROKEN, "reversed"]:
        tracks, index = claim.broken(kind, clips)
        same = (tracks.nan_to_num(9) == real.nan_to_num(9)).flatten(1).all(1)
        assert not same[index].any(), kind
        early = kind in ("shuffle", "jitter", "freeze", "reversed")
        assert early or torch.equal(tracks[:, :8].nan_to_num(9), real[:, :8].nan_to_num(9)), kind
    up, through = (claim.broken(kind, clips)[0][:, 8:] for kind in ("upwards", "through"))
    energy = (up[..., 2:].square().sum(-1) / 2 + 1.6 * up[..., 1]).nansum(-1)  # y points down
    assert (energy - energy[:, :1]).abs().max() < 1e-9
    assert torch.equal(claim.broken("through", clips)[1].nonzero() % 3 > 0,
                       torch.ones_like(claim.broken("through", clips)[1].nonzero()).bool())
    alone = (through[..., 2:].square().sum(-1) / 2 - 1.6 * through[..., 1]).nan_to_num(0)
    assert (alone - alone[:, :1]).abs().max() < 1e-9  # every ball keeps its own energy
    fast = claim.broken("gain", clips)[0][:, 8]
    assert torch.allclose(fast[:, 0, 2:], 1.5 * real[:, 8, 0, 2:])
    assert torch.equal(claim.render(real, clips), clips.videos.float() / 127.5 - 1)


def test_choices_and_correlations_of_the_claim():
    from tests.claims import vjepa_guidance as claim

    g = torch.Generator().manual_seed(0)
    m = {"residual": torch.rand(16, 50, 3, generator=g), "speed": torch.rand(16, 50, generator=g)}
    S = torch.rand(16, 50, generator=g)
    got = claim.best(m, S, 4)["speed"].view(4, 50)
    for group in range(4):
        for b in range(50):
            n = min(range(4 * group, 4 * group + 4), key=lambda n: S[n, b])
            assert got[group, b] == m["speed"][n, b]
    own = claim.residual_of(m)
    assert claim.correlations(own, m)["residual"].mean() == pytest.approx(1)
    # a score that is speed, and a residual that follows speed: nothing is left given speed
    m["residual"] = (m["speed"] + 0.3 * torch.rand(16, 50, generator=g))[..., None]
    rho = claim.correlations(m["speed"] + 0.3 * torch.rand(16, 50, generator=g), m)
    assert rho["residual"].mean() > 0.8 and rho["partial"].mean().abs() < 0.25
    chosen, near = claim.matched(m, S)
    assert torch.equal(chosen["speed"], m["speed"][S.argmin(0), torch.arange(50)])
    gap = (near["speed"] - chosen["speed"]).abs()
    assert (gap > 0).all() and gap.max() < 0.5


def test_copied_features_surprise_by_motion_only_and_pixel_errors_are_squares():
    from tests.claims import vjepa_guidance as claim

    clips = bouncing_balls(4, 8, 16, 0)
    video = clips.videos.float() / 127.5 - 1
    codec = script.FrozenCodes(16, 8)
    codec.fit(video)
    world = script.build(script.Config(image_size=16, components=8, frames=8), codec)[1]
    still = video[:, :, :1].expand_as(video)
    assert claim.copy_last(still, world, 2, 4, 1).abs().max() < 1e-5
    assert claim.copy_last(video, world, 2, 4, 1).min() > 1e-3

    class Ahead(script.WorldModel):
        def predict(self, context, N):  # off by 0.5 everywhere
            z = self.target(context)
            return z[:, -3:].repeat(1, (N - z.shape[1]) // 3, 1) + 0.5

    pixels = Ahead(claim.Pixels(), None, (8, 3, 1))
    tokens = pixels.target(video)  # frame by frame, channel by channel, at half the size
    assert tokens.shape == (4, 24, 64)
    block = video[1, 2, 5, 2:4, 4:6].mean()  # clip 1, frame 5, channel 2, row 1, column 2
    assert torch.allclose(tokens[1, 5 * 3 + 2, 1 * 8 + 2], block)
    assert torch.allclose(claim.pixel_error(still, pixels, 2, 4, 2), torch.full((4,), 0.25))

    class Last(script.WorldModel):
        def predict(self, context, N):  # the last context frame, after the LayerNorm
            z = script.plain_norm(self.target(context))
            return z[:, -3:].repeat(1, (N - z.shape[1]) // 3, 1)

    last = Last(codec, None, (8, 3, 1))
    assert claim.latent_error(still, last, 2, 4, 1).abs().max() < 1e-6
    z = script.plain_norm(codec(video)).unflatten(1, (8, 3))  # windows of frames 0-3 and 4-7
    by_hand = [(z[:, [k + 2, k + 3]] - z[:, k + 1:k + 2]).abs().mean((1, 2, 3)) for k in (0, 4)]
    assert torch.allclose(claim.latent_error(video, last, 2, 4, 4), sum(by_hand) / 2, atol=1e-6)


def test_frozen_tokens_are_the_channels_of_the_frames():
    video = bouncing_balls(4, 8, 16, 0).videos.float() / 127.5 - 1
    codec = script.FrozenCodes(16, 50)
    codec.fit(video)
    tokens = codec(video)
    assert tokens.shape == (4, 24, 40)  # the first 40 of 50 components
    x = (video[1, 2, 5].flatten() - codec.mean) @ codec.basis[:40].T / codec.std[:40]
    assert torch.allclose(tokens[1, 5 * 3 + 2], x, atol=1e-4)
    other = video.clone()
    other[:, :, 5:] = 0
    assert torch.equal(codec(other)[:, :15], tokens[:, :15])  # no token sees another frame


def test_verdicts_of_the_claim_leave_open_what_its_interval_does_not_settle():
    from tests.claims import vjepa_guidance as claim

    assert claim.below(-2, -1) is True and claim.below(1, 2) is False
    assert claim.below(-1, 1) is None and claim.below(math.nan, 1) is None
    assert claim.judge({1: True, 2: True}) == "as in the paper"
    assert claim.judge({1: True, 2: None}) == claim.judge({1: None}) == "not resolved"
    assert claim.judge({1: True, 2: None, 3: False}) == claim.judge({1: True, 2: False}) == "partly"
    assert claim.judge({1: False, 2: None}) == "contradicted"


def test_tables_verdicts_and_figure_of_the_claim_from_a_made_up_record(monkeypatch):
    from tests.claims import physics as instruments
    from tests.claims import report as reports
    from tests.claims import vjepa_guidance as claim

    few = lambda f, *m, draws=0: instruments.interval(f, *m, draws=20)
    monkeypatch.setattr(claim, "interval", few)
    clips = bouncing_balls(6, 16, 16, 0)
    shown = [claim.render(clips.tracks * (1 + 0.02 * k * torch.rand(6, 16, 3, 1)), clips)
             for k in range(16)]
    physics = claim.measured(torch.stack(shown), clips)  # candidate 0 is the real clip
    score = torch.arange(16.0)[:, None].expand(16, 6) + 0.1 * torch.rand(16, 6)
    names = ["frozen", *claim.REWARDS]
    S = {(kind, name): score if name == "frozen" else torch.rand(16, 6)
         for kind in claim.KINDS for name in names}
    S |= {(kind, "oracle"): claim.residual_of(physics) for kind in claim.KINDS}
    found = {"S": score[:1], "m": {k: v[:1] for k, v in physics.items()}}
    four = {"S": score[:4], "m": {k: v[:4] for k, v in physics.items()}}
    arms = ["none", *(f"{eta} target" for eta in claim.ETAS), "0.01 context", "0.01 both"]
    out = {
        "violations": {"frozen": dict.fromkeys([*claim.BROKEN, "reversed"], 0.5)},
        "health": {"frozen": {"std": 0.9, "rank": 20.0}}, "nfe": 26, "S": S,
        "physics": {"Euler": physics, "refined": physics, "real": {k: v[:1] for k, v in
                                                                   physics.items()}},
        "windows": {("frozen", name): score for name in ["4/8/1", *claim.WINDOWS, "4/8/1 token"]},
        "guidance": {("frozen", name): found for name in arms}
        | {("frozen", f"{name}, 4"): four for name in ("none", "0.01 target")}}
    brief = claim.tables({k: out[k] for k in ("violations", "health")}, ("frozen",))
    assert list(brief) == [("violations", "frozen")]  # preset long
    rows = claim.tables(out, ("frozen",))
    reward = rows["reward", "Euler, frozen"]
    assert reward["residual_16"] < reward["residual_4"] < reward["residual_1"]  # smaller k first
    assert rows["refine", "Euler, best of 16 (frozen)"]["residual"] == reward["residual_16"]
    assert rows["speed", "Euler (frozen)"]["rho_residual"] > 0.5
    assert rows["reward", "Euler, oracle"]["residual_16"] <= reward["residual_16"]
    assert rows["reward", "Euler, random"]["frozen_difference"] < 0
    report = reports.open_report("vjepa_guidance", "doc", [])
    for (table, name), row in rows.items():
        reports.arm(report, table, name, 0, lambda folder, row=row: row)
    claim.judge_claims(report, ("frozen",))
    claim.draw_figure(report, ("frozen",))
    verdicts = {c["table"]: c["agrees"] for c in report["json"]["claims"]}
    assert verdicts["violations"] == "partly"
    assert verdicts["both"] == "not resolved"  # the same candidates
    assert verdicts["guidance"] == "partly"  # surprise is that of the same clips
    assert len(verdicts) == 7 and Path("results/vjepa_guidance_cpu.png").exists()
