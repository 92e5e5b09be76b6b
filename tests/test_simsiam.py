"""simsiam.py against closed forms, float64, torchvision and a second look at its gradients."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import simsiam as script
from common import load_checkpoint, load_encoder, shapes

SMALL = ["--device", "cpu", "--precision", "fp32", "--compile", "off", "--batch-size", "32"]
SMALL += ["--steps", "4", "--dim", "16", "--log-every", "1", "--image-size", "16"]
SMALL += ["--backbone-args", '{"layers": [1], "channels": [16], "stem_chs": 8}']


def toy(predictor=True):
    """A SimSiam on 8-pixel images whose backbone is a convolution: small enough for float64."""

    class Backbone(nn.Module):
        num_features = 12

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 12, 4, 4)

        def forward_features(self, x):
            return self.conv(x).tanh()

    return script.SimSiam(Backbone(), 8, 2, predictor).double()


def views(n=16):
    return torch.randn(2, n, 3, 8, 8, dtype=torch.float64)


def test_negative_cosine_has_its_closed_form_and_ignores_length():
    p, z = torch.randn(5, 7), torch.randn(5, 7)
    angle = [torch.dot(a, b) / a.norm() / b.norm() for a, b in zip(p, z)]
    assert script.negative_cosine(p, z).item() == pytest.approx(-sum(angle).item() / 5, abs=1e-6)
    assert script.negative_cosine(p, 3 * p).item() == pytest.approx(-1, abs=1e-6)
    unit = lambda u: u / u.norm(dim=1, keepdim=True)  # half the squared distance, less one (Sec. 3)
    half = (unit(p) - unit(z)).square().sum(1).mean() / 2 - 1
    assert script.negative_cosine(p, z).item() == pytest.approx(half.item(), abs=1e-6)


def test_loss_is_algorithm_1_and_the_target_gets_no_gradient():
    x1, x2 = views()
    model = toy()
    loss, z = script.simsiam_loss(model, None, x1, x2)
    loss.backward()
    got = {k: w.grad.clone() for k, w in model.named_parameters()}
    model.zero_grad()
    f = lambda x: model.projector(model.backbone.forward_features(x).flatten(2).mT.mean(1))
    z1, z2 = f(x1), f(x2)
    p1, p2 = model.predictor(z1), model.predictor(z2)
    with torch.no_grad():
        t1, t2 = f(x1), f(x2)  # constants: a target that no gradient can reach
    expected = -(F.cosine_similarity(p1, t2).mean() + F.cosine_similarity(p2, t1).mean()) / 2
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert torch.allclose(z, z1)
    for k, w in model.named_parameters():
        assert torch.allclose(got[k], w.grad, atol=1e-6), k
    assert any(g.abs().max() > 1e-4 for g in got.values())


def test_without_predictor_stopping_the_gradient_halves_it_and_nothing_else():
    """Sec. 4.2: then D(z1, sg z2) / 2 + D(z2, sg z1) / 2 has half the gradient of D(z1, z2)."""
    x1, x2 = views()
    model = toy(predictor=False)
    grads = []
    for stop in (True, False):
        model.zero_grad()
        script.simsiam_loss(model, None, x1, x2, stop_grad=stop)[0].backward()
        grads.append(torch.cat([w.grad.flatten() for w in model.parameters()]))
    assert torch.allclose(2 * grads[0], grads[1], atol=1e-6) and grads[1].norm() > 1e-3
    model = toy(predictor=True)  # with a predictor the directions differ
    grads = []
    for stop in (True, False):
        model.zero_grad()
        script.simsiam_loss(model, None, x1, x2, stop_grad=stop)[0].backward()
        grads.append(torch.cat([w.grad.flatten() for w in model.backbone.parameters()]))
    assert F.cosine_similarity(*grads, dim=0) < 0.99


def test_asymmetric_loss_is_one_term_and_a_moving_target_is_its_own_network():
    x1, x2 = views()
    model, target = toy(), toy()
    (z1, p1), (z2, p2) = model(x1, x2)
    (t1, _), (t2, _) = target(x1, x2)
    one = script.simsiam_loss(model, target, x1, x2, symmetric=False)[0]
    both = script.simsiam_loss(model, target, x1, x2)[0]
    assert one.item() == pytest.approx(-F.cosine_similarity(p1, t2).mean().item(), abs=1e-6)
    other = -F.cosine_similarity(p2, t1).mean().item()
    assert both.item() == pytest.approx((one.item() + other) / 2, abs=1e-6)
    both.backward()
    assert all(w.grad is None for w in target.parameters())
    assert all(w.grad is not None for w in model.parameters())


def test_std_and_rank_know_isotropy_a_line_and_a_point():
    z = torch.randn(4000, 32)
    assert script.embedding_std(z).item() == pytest.approx(1, abs=0.02)
    assert script.effective_rank(z) == pytest.approx(32, rel=0.02)
    assert script.embedding_std(torch.ones(64, 32)).item() == pytest.approx(0, abs=1e-6)
    u = torch.randint(0, 2, (4000, 1)).float() * 2 - 1
    line = u * F.normalize(torch.randn(1, 32).sign(), dim=1)  # z = +-u: std stays, the rank is 1
    assert script.embedding_std(line).item() == pytest.approx(1, abs=0.02)
    assert script.effective_rank(line + 1e-6 * torch.randn_like(line)) == pytest.approx(1, abs=0.01)
    assert script.effective_rank(torch.ones(64, 32)) == pytest.approx(1)  # a point, and no NaN
    angle = torch.rand(20000) * 2 * math.pi
    z = torch.stack([angle.cos(), angle.sin()], 1)
    assert script.effective_rank(z) == pytest.approx(2, rel=1e-3)
    few = torch.randn(10, 64)  # fewer rows than channels: rank below the number of rows
    unit = F.normalize(few.double())
    share = torch.linalg.eigvalsh(unit.T.cov()).clamp(min=1e-300)
    share = share / share.sum()
    expected = (-(share * share.log()).sum()).exp().item()
    assert script.effective_rank(few) == pytest.approx(expected, rel=1e-6)


def test_projector_and_predictor_have_the_paper_s_layers():
    model = script.SimSiam(toy().backbone, 2048, 3)
    kinds = [type(m).__name__ for m in model.projector]
    block = ["Linear", "BatchNorm1d", "ReLU"]
    assert kinds == block + block + ["Linear", "BatchNorm1d"]
    assert [m.bias is None for m in model.projector if isinstance(m, nn.Linear)] == [True] * 3
    assert model.projector[-1].affine is False and model.projector[1].affine is True
    assert [type(m).__name__ for m in model.predictor] == block + ["Linear"]
    assert model.predictor[0].out_features == 512 and model.predictor[-1].bias is not None
    cfg = script.Config(**script.PRESETS["paper"])
    resnet = script.build(cfg).backbone
    assert resnet.num_features == 2048 and resnet.layer1[0].bn3.weight.abs().max() == 0
    cfg = script.Config(**script.PRESETS["cifar10"])
    assert script.build(cfg).tokens(torch.randn(1, 3, 32, 32)).shape == (1, 16, 512)


def test_crop_of_the_whole_image_is_the_image_and_flip_mirrors_half():
    x = torch.rand(400, 3, 8, 8) * 2 - 1
    same = script.crop(x, 1.0, False)  # aspect ratio still varies, but no side is longer than 1
    assert same.shape == x.shape
    keep = script.augment(x, 1.0, False, 0.0, 0.0)
    assert (keep - x).abs().mean() < 0.35
    ramp = torch.linspace(-1, 1, 8).expand(2000, 3, 8, 8)
    slope = script.crop(ramp, 0.5, True)[:, 0, 4].diff(dim=-1).mean(-1)
    assert 0.45 < (slope < 0).float().mean() < 0.55
    # the width of a crop is what the ramp spans: area in [0.2, 1], aspect in [3/4, 4/3]
    wide = script.crop(torch.linspace(-1, 1, 64).expand(4000, 1, 64, 64), 0.2, False)
    width = (wide[:, 0, 32, 48] - wide[:, 0, 32, 16]) * 63 / 64
    assert width.min() > math.sqrt(0.2 * 3 / 4) * 0.98 and width.max() < 1.03
    g = torch.Generator().manual_seed(1)
    area = 0.2 + 0.8 * torch.rand(100000, generator=g, dtype=torch.float64)
    u = torch.rand(100000, generator=g, dtype=torch.float64)
    aspect = (math.log(4 / 3) * (2 * u - 1)).exp()
    expected = (area * aspect).sqrt().clamp(max=1).mean().item()
    assert width.mean().item() == pytest.approx(expected, abs=0.02)


def test_recolour_equals_torchvision_step_by_step(monkeypatch):
    tv = pytest.importorskip("torchvision.transforms.functional")
    x = torch.rand(1, 3, 8, 8) * 0.5 - 0.3  # far enough from the ends that nothing clips
    for name, column in (("brightness", 0), ("contrast", 1), ("saturation", 2)):
        u = torch.full((1, 4), 0.5)
        u[0, column] = 0.8  # factor 1 + 0.4 * 0.6
        draws = iter([torch.zeros(1, 1), u, torch.ones(1, 1, 1)])
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *a, **k: next(draws))
            got = script.recolour(x, 0.4, 0.0)
        expected = getattr(tv, f"adjust_{name}")((x + 1) / 2, 1.24) * 2 - 1
        assert torch.allclose(got, expected, atol=2e-3), name
    draws = iter([torch.zeros(1, 1), torch.full((1, 4), 0.5), torch.zeros(1, 1, 1)])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda *a, **k: next(draws))
        got = script.recolour(x, 0.4, 0.5)
    assert torch.allclose(got, tv.rgb_to_grayscale((x + 1) / 2, 3) * 2 - 1, atol=1e-3)


def test_colour_changes_come_in_the_stated_order(monkeypatch):
    tv = pytest.importorskip("torchvision.transforms.functional")
    x = torch.rand(1, 3, 8, 8) * 0.4 - 0.2
    u = torch.tensor([[0.7, 0.2, 0.9, 0.8]])
    draws = iter([torch.zeros(1, 1), u, torch.ones(1, 1, 1)])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda *a, **k: next(draws))
        got = script.recolour(x, 0.4, 0.0)
    b, c, s, h = (0.4 * (2 * u - 1)).flatten().tolist()
    y = tv.adjust_contrast(tv.adjust_brightness((x + 1) / 2, 1 + b), 1 + c)
    y = tv.adjust_saturation(y, 1 + s)
    grey, angle = y.mean(1, keepdim=True), math.pi / 2 * h
    cross = torch.linalg.cross(torch.full_like(y, 3**-0.5), y, dim=1)
    y = grey + (y - grey) * math.cos(angle) + cross * math.sin(angle)
    assert torch.allclose(got, 2 * y - 1, atol=3e-3)


def test_hue_turns_about_the_grey_axis(monkeypatch):
    x = torch.rand(1, 3, 4, 4) * 0.4 - 0.2
    u = torch.full((1, 4), 0.5)
    u[0, 3] = 1.0
    draws = iter([torch.zeros(1, 1), u, torch.ones(1, 1, 1)])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda *a, **k: next(draws))
        got = script.recolour(x, 0.4, 0.0)
    assert torch.allclose(got.mean(1), x.mean(1), atol=1e-6)  # grey stays
    a, b = (y - y.mean(1, keepdim=True) for y in (x, got))
    assert torch.allclose(a.norm(dim=1), b.norm(dim=1), atol=1e-6)  # so does the distance from it
    cos = F.cosine_similarity(a, b, dim=1)
    assert torch.allclose(cos, torch.full_like(cos, math.cos(2 * math.pi * 0.1)), atol=1e-5)


def test_blur_equals_torchvision(monkeypatch):
    tv = pytest.importorskip("torchvision.transforms.functional")
    x = torch.rand(2, 3, 40, 40)
    draws = iter([torch.full((2, 1), 0.5), torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda *a, **k: next(draws))
        got = script.blurred(x, 0.5)
    expected = tv.gaussian_blur(x[:1], [23, 23], [1.05, 1.05])
    assert torch.allclose(got[0, :, 11:-11, 11:-11], expected[0, :, 11:-11, 11:-11], atol=1e-5)
    assert torch.equal(got[1], x[1])


def test_knn_and_probe_on_clusters_and_on_noise():
    centres = 5 * torch.eye(4).repeat(1, 2)
    y, y_test = torch.arange(400) % 4, torch.arange(200) % 4
    f, f_test = centres[y] + 0.1 * torch.randn(400, 8), centres[y_test] + 0.1 * torch.randn(200, 8)
    assert script.knn_accuracy(f, y, f_test, y_test, 4) == 1
    assert script.linear_probe(f, y, f_test, y_test, 4) == 1
    noise, noise_test = torch.randn(400, 8), torch.randn(200, 8)
    assert script.knn_accuracy(noise, y, noise_test, y_test, 4) < 0.45
    assert script.linear_probe(noise, y, noise_test, y_test, 4) < 0.45
    # three neighbours by hand: do two of class 1 at cosine 0.8 outvote one of class 0 at 1.0?
    bank = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6], [-1.0, 0.0]])
    query, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([0, 1, 1, 2])
    vote = lambda T: script.knn_accuracy(bank, labels, query, torch.tensor([1]), 3, 3, T)
    assert vote(1.0) == 1 and vote(0.1) == 0  # 2 e^0.8 > e^1, but 2 e^8 < e^10


def test_probe_is_the_ridge_solution():
    X, X_test = torch.randn(300, 5).double(), torch.randn(100, 5).double()
    y, y_test = torch.randint(0, 3, (300,)), torch.randint(0, 3, (100,))
    A = torch.cat([(X - X.mean(0)) / X.std(0), torch.ones(300, 1)], 1)
    A = torch.cat([A, math.sqrt(300 * 1e-3) * torch.eye(6).double()])  # ridge as rows of data
    Y = torch.cat([F.one_hot(y, 3).double(), torch.zeros(6, 3).double()])
    W = torch.linalg.lstsq(A, Y).solution
    B = torch.cat([(X_test - X.mean(0)) / X.std(0), torch.ones(100, 1)], 1)
    expected = ((B @ W).argmax(1) == y_test).double().mean().item()
    assert script.linear_probe(X, y, X_test, y_test, 3) == pytest.approx(expected)


def test_run_leaves_pictures_metrics_and_a_teacher():
    script.main(SMALL + ["--out", "whole"])
    script.main(SMALL + ["--out", "other", "--target-ema", "0.9", "--no-symmetric"])
    script.main(SMALL + ["--out", "collapse", "--no-stop-grad", "--no-predictor"])
    one = load_checkpoint("whole/last.pt")
    assert Image.open("whole/samples_0000004.png").size == (8 * 66, 10 * 66)
    line = json.loads(Path("whole/metrics.jsonl").read_text().splitlines()[-1])
    for key in ("loss", "std", "lr", "grad_norm", "knn", "probe", "token_probe"):
        assert math.isfinite(line[key]), key
    assert -1 <= line["loss"] <= 1 and 1 <= line["effective_rank"] <= 16
    encoder = load_encoder("whole/teacher.safetensors", grid=4)
    images = shapes(6, 16, 3)[0].float() / 127.5 - 1
    model = script.build(script.Config(**one["config"]))
    model.load_state_dict(one["model"])
    with torch.no_grad():
        expected = model.eval().tokens(images)
    assert torch.allclose(encoder(images), expected, atol=2e-2)  # half precision on disk
    assert encoder(images).shape == (6, 16, 16)
    assert "target" in load_checkpoint("other/last.pt") and "target" not in one


def test_interrupted_run_equals_a_whole_one(same_when_interrupted):
    flags = SMALL + ["--save-every", "2", "--target-ema", "0.9"]
    same_when_interrupted(script, flags, ["model", "target"])


def test_optimiser_decays_all_but_the_predictor_s_rate():
    script.main(SMALL + ["--out", "run", "--lr", "0.8"])
    first, second = load_checkpoint("run/last.pt")["opt"]["param_groups"]
    rate = 0.8 * 32 / 256  # the paper's: linear in the batch
    assert first["lr"] == pytest.approx(rate * (1 + math.cos(math.pi * 3 / 4)) / 2)
    assert second["lr"] == pytest.approx(rate)
    assert first["momentum"] == second["momentum"] == 0.9
    assert first["weight_decay"] == second["weight_decay"] == 5e-4
    assert len(second["params"]) == 5  # two weights, one bias, BatchNorm's two


def test_continued_run_may_not_change_its_steps(refuses):
    script.main(SMALL + ["--out", "run"])
    refuses(lambda: script.main(SMALL + ["--out", "run", "--steps", "8"]), "steps 4 (now 8)")


def test_weights_that_features_do_not_need_stay_out_of_training():
    args = '{"depths": [1], "dims": [16], "mlp_ratios": [1]}'  # its head keeps a hidden layer
    cfg = script.Config(backbone="inception_next_tiny", backbone_args=args, image_size=16)
    model = script.build(cfg)
    idle = {k.split(".")[0] for k, w in model.backbone.named_parameters() if not w.requires_grad}
    assert idle == {"head"} and model.training
    assert all(w.grad is None for w in model.parameters())
    assert all(w.requires_grad for w in script.build(script.Config()).parameters())


def test_synchronised_batch_norms_keep_their_activations():
    import timm

    model = timm.layers.convert_sync_batchnorm(script.build(script.Config()))
    norms = [m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert len(norms) >= 6 and any(hasattr(m, "act") for m in norms)


def test_sample_measures_and_writes_a_teacher(capsys):
    script.main(SMALL + ["--out", "run"])
    capsys.readouterr()
    script.main(["--sample", "run/last.pt", "--n", "20", "--out", "s"])
    words = capsys.readouterr().out.split()
    line = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert float(words[words.index("knn") + 1]) == pytest.approx(line["knn"], abs=2e-3)
    assert Image.open("s/sample.png").size == (8 * 66, 20 * 66)
    assert Path("s/teacher.safetensors").stat().st_size < 20_000


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--backbone", "resnet_none"], ["resnet_none"]),
        (["--backbone-args", "[1]"], ["JSON object"]),
        (["--backbone-args", "{dim: 3}"], ["config"]),
        (["--crop-min", "0"], ["crop_min", "(0, 1]"]),
        (["--gray", "2"], ["gray", "[0, 1]"]),
        (["--target-ema", "1"], ["target_ema", "[0, 1)"]),
        (["--cifar-stem"], ["ResNet"]),
        (["--dim", "3"], ["dim", "at least 4"]),
        (["--seed", "-1"], ["--seed", "at least 0"]),
        (["--lr", "-1"], ["lr", "at least 0"]),
        (["--batch-size", "1"], ["two images"]),
        (["--no-stop-grad", "--target-ema", "0.9"], ["target_ema"]),
        (["--backbone", "vit_tiny_patch16_224", "--backbone-args", "{}"], ["vit_tiny"]),
        (["--backbone", "swin_tiny_patch4_window7_224", "--backbone-args", '{"img_size": 32}'],
         ["swin"]),
    ],
)
def test_bad_input_is_one_line(flags, words, refuses):
    refuses(lambda: script.main(SMALL + flags), *words)
    assert not Path("runs").exists()
