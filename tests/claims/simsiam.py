"""Stop-gradient and predictor keep SimSiam from collapsing; and is the shipped teacher any good?

    python -m tests.claims.simsiam                  # 7 to 17 minutes, 2 CPU cores
    python -m tests.claims.simsiam --preset gpu     # ResNet-18 on CIFAR-10, 50 epochs

What the paper reports (arXiv:2011.10566v1) and what counts as agreeing, stated before the run:

collapse  Fig. 2, Tab. 1 and Sec. 4.2: ImageNet, 100 epochs, linear probe 67.7 with stop-gradient,
          0.1 without it, 0.1 without predictor; without stop-gradient the loss runs to -1. A moving
          average of the target (BYOL) is not needed. Here: equal data, steps and rate for all arms.
          Agrees if for every seed the loss without stop-gradient and without predictor is below
          that of the full method and within 0.02 of -1, their effective rank is below half of the
          full one, and their probe below the full one; if the full probe is above the untrained
          backbone's at every seed, and on average within 5 points of the moving average's, or above
          it. (std sqrt(d), the paper's measure, is no criterion: with BatchNorm it can stay up on
          a line.) The paper's 67.7 decays the rate of the predictor too; the constant one here
          gives 68.1 there.
teacher   No claim of the paper: the bar that this repository sets for assets/teacher.safetensors
          on held-out shapes. Agrees if the probe of its pooled features is 20 points above the
          untrained backbone's and above raw pixels', its token probe above the untrained one's,
          and a linear map from each token, without the network's last norm, to its own pixels
          reaches 20 dB.

loss, std        at the end of training, mean of the last log line; std times sqrt(d)
effective_rank   of the last batch
knn, probe       accuracy from mean-pooled features: 20 neighbours, least squares on classes
token_probe      accuracy of least squares from one token to what lies under it: in collapse the
                 class of the image, in teacher that class or, where no shape is, background
psnr             of pixels in [0, 1] from a linear map of the token above them, dB; psnr_none: from
                 the token without the network's last norm
Untrained backbones have random weights and BatchNorm statistics of the data.
"""
import functools
import json
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import simsiam
from common import figure, load_encoder, load_images, setup
from tests.claims.report import arm, arm_file, conclude, mean, open_report, values, verdict

ARMS = {"full": [], "no stop-gradient": ["--no-stop-grad"], "no predictor": ["--no-predictor"],
        "EMA target": ["--target-ema", 0.99]}
SEEDS = (0, 1, 2)
TEACHER = "assets/teacher.safetensors"


def flags(report, seed, folder):
    """The command line that all arms share."""
    argv = ["--out", folder, "--seed", seed, "--device", report["args"].device]
    small = ["--image-size", 16, "--steps", 1000, "--sample-every", 1000, "--compile", "off"]
    small += ["--backbone-args", '{"layers": [2], "channels": [96], "stem_chs": 96}']  # narrow
    large = ["--preset", "cifar10", "--steps", 4850, "--sample-every", 4850]
    return [str(a) for a in argv + (small if report["args"].preset == "cpu" else large)]


def trained_arm(report, extra, seed, folder):
    """Train one arm through the script's own command line: its last line of metrics.jsonl."""
    torch._dynamo.reset()  # else the ninth network of one process would run uncompiled
    simsiam.main(flags(report, seed, folder) + [str(a) for a in extra])
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return {k: line[k] for k in ("loss", "std", "effective_rank", "knn", "probe", "token_probe")}


def settle(model, images):
    """Give the BatchNorms of an untrained backbone the statistics of images (n, 3, S, S)."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # the mean over all batches
    with torch.no_grad():
        for x in images.split(256):
            model.backbone.forward_features(x)
    return model.eval()


def untrained_arm(report, seed, folder):
    """The same backbone with random weights, measured alike."""
    cfg = simsiam.parse_config(simsiam.Config, simsiam.PRESETS, (), flags(report, seed, folder))
    device = setup(cfg)
    data, held_out = (load_images(cfg, device, part) for part in ("train", "validation"))
    model = settle(simsiam.build(cfg).to(device), to_float(data.images[:2560]))
    return simsiam.measure(model, data, held_out, cfg, device, folder / "neighbours.png", 10)


def to_float(images):
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def token_labels(images, labels, grid):
    """Class under each token of images (n, 3, S, S), 10 where at least half is background:
    int64 (n, grid^2). A shape is brighter than its background in every channel: the mean of
    darkest and brightest lies between."""
    grey = to_float(images).mean(1, keepdim=True)
    middle = (grey.amin((1, 2, 3), keepdim=True) + grey.amax((1, 2, 3), keepdim=True)) / 2
    covered = F.adaptive_avg_pool2d((grey > middle).float(), grid).flatten(1) > 0.5
    return torch.where(covered, labels[:, None], 10)


def pixel_psnr(h, images, h_test, test, grid, ridge=1e-4):
    """PSNR, in dB, of held-out pixels in [0, 1] from a linear map of the token (n, N, C) above."""
    squares = lambda x: rearrange(x.float() / 255, "n c (h p) (w q) -> (n h w) (c p q)", h=grid,
                                  w=grid).double()
    design = lambda h: F.pad(h.flatten(0, 1).double(), (0, 1), value=1.0)
    X, Y = design(h), squares(images)
    gram = X.T @ X / len(X) + ridge * torch.eye(X.shape[1], dtype=X.dtype)
    W = torch.linalg.solve(gram, X.T @ Y / len(X))
    error = (design(h_test) @ W - squares(test)).square().mean().item()
    return -10 * math.log10(error)


def measure_tokens(tokens):
    """What the teacher's bar asks of a map tokens(images in [-1, 1]) -> (n, N, C), on shapes."""
    cfg = simsiam.Config()
    cpu = torch.device("cpu")
    train, test = (load_images(cfg, cpu, part) for part in ("train", "validation"))
    parts = [(d.images[:m], d.labels[:m]) for d, m in ((train, 8000), (test, 4000))]
    with torch.no_grad():
        h = [torch.cat([tokens(to_float(x)) for x in images.split(500)]) for images, _ in parts]
    (images, y), (held, y_held) = parts
    grid, classes = round(h[0].shape[1] ** 0.5), train.classes
    under = [token_labels(x[:m], k[:m], grid).flatten() for (x, k), m in zip(parts, (2000, 1000))]
    few = [x[:m].flatten(0, 1) for x, m in zip(h, (2000, 1000))]
    return {"knn": simsiam.knn_accuracy(h[0].mean(1), y, h[1].mean(1), y_held, classes),
            "probe": simsiam.linear_probe(h[0].mean(1), y, h[1].mean(1), y_held, classes),
            "token_probe": simsiam.linear_probe(few[0], under[0], few[1], under[1], classes + 1),
            "psnr": pixel_psnr(h[0][:2000], images[:2000], h[1][:1000], held[:1000], grid)}


def measure_teacher(folder):
    """The shipped teacher, as the other scripts load it."""
    plain = measure_tokens(load_encoder(TEACHER, grid=8, norm="none"))
    return measure_tokens(load_encoder(TEACHER, grid=8)) | {"psnr_none": plain["psnr"]}


def measure_untrained(seed, folder):
    """The teacher's architecture with random weights."""
    torch.manual_seed(seed)
    cfg = simsiam.Config(seed=seed)
    images = load_images(cfg, torch.device("cpu"), "train").images[:2560]
    model = settle(simsiam.build(cfg), to_float(images))
    result = measure_tokens(model.tokens)
    model.backbone.norm = nn.Identity()
    return result | {"psnr_none": measure_tokens(model.tokens)["psnr"]}


def measure_pixels(folder):
    """Least squares from all pixels, and from the pixels of one 4 x 4 patch as a token."""
    data = [load_images(simsiam.Config(), torch.device("cpu"), p) for p in ("train", "validation")]
    (x, y), (x_held, y_held) = [(d.images[:8000], d.labels[:8000]) for d in data]
    flat = [to_float(images).flatten(1) for images in (x, x_held)]
    patches = lambda im: rearrange(im, "n c (h p) (w q) -> n (h w) (c p q)", h=8, w=8)
    result = measure_tokens(patches)
    return {"knn": simsiam.knn_accuracy(flat[0], y, flat[1], y_held, 10),
            "probe": simsiam.linear_probe(flat[0], y, flat[1], y_held, 10),
            "token_probe": result["token_probe"]}


def draw_figure(report):
    """Loss, std and rank against the step, an arm a colour, seeds as lines."""
    columns = (("loss", "loss"), ("std", r"std $\sqrt{d}$"),
               ("effective_rank", "effective rank"))
    with figure(f"{report['path']}.png", 1, 3, (3.2, 2.6)) as axes:
        for i, name in enumerate(ARMS):
            for seed in SEEDS[: 3 if report["args"].preset == "cpu" else 1]:
                path = arm_file(report, "collapse", name, seed).with_name("metrics.jsonl")
                lines = [json.loads(line) for line in path.read_text().splitlines()]
                for ax, (key, title) in zip(axes[0], columns):
                    ax.plot([x["step"] for x in lines], [x[key] for x in lines], f"C{i}", lw=1,
                            label=name if seed == 0 else None)
                    ax.set(title=title, xlabel="step")
        axes[0, 0].legend(fontsize=7)


def judge_claims(report):
    """Hold the numbers against the docstring."""
    get = {(a, m): values(report, "collapse", a, m)
           for a in ARMS for m in ("loss", "effective_rank", "probe")}
    ok = {}
    for name in ("no stop-gradient", "no predictor"):
        loss = zip(get[name, "loss"], get["full", "loss"])
        ok[name, "loss"] = all(a < b and a < -0.98 for a, b in loss)
        rank = zip(get[name, "effective_rank"], get["full", "effective_rank"])
        ok[name, "rank"] = all(a < b / 2 for a, b in rank)
        ok[name, "probe"] = all(a < b for a, b in zip(get[name, "probe"], get["full", "probe"]))
    untrained = values(report, "collapse", "untrained", "probe")
    ok["untrained"] = all(a < b for a, b in zip(untrained, get["full", "probe"]))
    probe = {name: mean(report, "collapse", name, "probe") for name in ARMS}
    ok["EMA target"] = probe["EMA target"] - probe["full"] < 0.05
    conclude(report, "collapse", "linear probe 67.7 with stop-gradient, 0.1 without (Fig. 2), 0.1 "
             "without predictor (Tab. 1)", verdict(ok))
    if report["args"].preset == "cpu":
        at = lambda name, metric: mean(report, "teacher", name, metric)
        ok = {"probe": at("teacher", "probe") > at("untrained", "probe") + 0.2,
              "pixels": at("teacher", "probe") > at("pixels", "probe"),
              "tokens": at("teacher", "token_probe") > at("untrained", "token_probe"),
              "psnr": at("teacher", "psnr_none") > 20}
        conclude(report, "teacher", "this repository's bar for its small teacher", verdict(ok))


def main(argv=None):
    report = open_report("simsiam", __doc__, argv, also=[TEACHER])
    small = report["args"].preset == "cpu"
    for seed in SEEDS if small else SEEDS[:1]:
        for name, extra in ARMS.items():
            measure = functools.partial(trained_arm, report, extra, seed)
            arm(report, "collapse", name, seed, measure)
        arm(report, "collapse", "untrained", seed, functools.partial(untrained_arm, report, seed))
    if small:
        arm(report, "teacher", "teacher", 0, measure_teacher)
        arm(report, "teacher", "pixels", 0, measure_pixels)
        for seed in SEEDS:
            arm(report, "teacher", "untrained", seed, functools.partial(measure_untrained, seed))
    judge_claims(report)
    draw_figure(report)


if __name__ == "__main__":
    main()
