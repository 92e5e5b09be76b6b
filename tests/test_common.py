"""common.py against independent derivations: areas, means, files on disk, killed writes."""

import json
import math
import os
import pickle
import shutil
import signal
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import common


@dataclass(frozen=True)
class Config:
    preset: str = ""  # big | small: p
    out: str = ""  # o
    fresh: bool = False  # f
    seed: int = 0  # s
    device: str = "cpu"  # auto | cuda | mps | cpu: d
    precision: str = "fp32"  # auto | bf16 | fp32; auto: p
    compile: str = "off"  # auto | on | off: c
    data: str = "shapes"  # d
    image_size: int = 8  # i
    flip: bool = False  # f
    skip_bad: bool = False  # s
    batch_size: int = 4  # b
    steps: int = 6  # s
    lr: float = 0.1  # 50% of something
    log_every: int = 2  # l
    save_every: int = 2  # s
    sample_every: int = 100  # s
    sample: str = ""  # s
    n: int = 1  # n
    npz: bool = False  # n

    def __post_init__(self):
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")


def config(*argv, presets={"big": {"lr": 0.5, "steps": 9}}):
    return common.parse_config(Config, presets, (), [str(a) for a in argv])


# ---- command line ----------------------------------------------------------------------


def test_flag_beats_preset_beats_default():
    cfg = config("--preset", "big", "--steps", "3", "--flip", "--no-fresh")
    assert (cfg.lr, cfg.steps, cfg.flip, cfg.batch_size) == (0.5, 3, True, 4)
    assert cfg.out == "runs/test_common-big" and config().out == "runs/test_common"
    assert config("--out", "").out == "runs/test_common"


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--stesp", "3"], ["--stesp", "--help"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--preset", "huge"], ["huge", "big"]),
        (["--lr", "-1"], ["positive", "-1"]),
        (["--device", "tpu"], ["tpu", "cuda"]),
        (["--precision", "fp16"], ["fp16", "bf16"]),
        (["--steps", "0"], ["steps", "at least 1"]),
        (["--ste", "3"], ["--ste"]),
        (["--sample", "none.pt"], ["none.pt"]),
    ],
)
def test_bad_flags_end_with_one_line(argv, words, refuses):
    refuses(lambda: config(*argv), *words)
    assert not Path("runs").exists()


def test_help_lists_every_field_and_survives_a_percent_sign(capsys):
    with pytest.raises(SystemExit) as stop:
        config("--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "50% of something [0.1]" in text
    assert all("--" + name.replace("_", "-") in text for name in Config.__annotations__)


def test_missing_device(refuses, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # on a machine with CUDA, too
    refuses(lambda: common.setup(config("--device", "cuda")), "cuda", "cpu")


# ---- data ------------------------------------------------------------------------------


def test_shapes_are_a_function_of_the_seed_and_of_the_index():
    one, two = common.shapes(40, 16, 3), common.shapes(40, 16, 3)
    assert one[0].dtype == torch.uint8 and torch.equal(one[0], two[0])
    assert torch.equal(one[1], torch.arange(40) % 10)
    assert not torch.equal(one[0], common.shapes(40, 16, 4)[0])
    larger = common.shapes(40, 32, 3)[0].float()  # the same scene at another resolution
    smaller = torch.nn.functional.avg_pool2d(larger, 2)
    assert (smaller - one[0].float()).abs().mean() < 2.5


def test_some_kinds_of_shapes_keep_their_images_and_labels(refuses):
    every, some = (common.load_images(config("--data", name), torch.device("cpu"), "validation")
                   for name in ("shapes", "shapes:ring,bar"))
    keep = (every.labels == 1) | (every.labels == 7)
    assert some.size == 2000 and some.classes == 10
    assert torch.equal(some.images, every.images[keep])
    assert torch.equal(some.labels, every.labels[keep])
    wrong = config("--data", "shapes:ring,cube")
    refuses(lambda: common.load_images(wrong, torch.device("cpu")), "ring,cube", "disc, ring")


def test_shapes_cover_the_area_that_geometry_says():
    s, c = math.sin(math.pi / 5), math.cos(math.pi / 5)
    # crescent: disc of 0.95 minus its lens with a disc of 0.75, centres 0.5 apart
    R, r, d = 0.95, 0.75, 0.5
    lens = (
        r * r * math.acos((d * d + r * r - R * R) / (2 * d * r))
        + R * R * math.acos((d * d + R * R - r * r) / (2 * d * R))
        - 0.5 * math.sqrt((-d + r + R) * (d + r - R) * (d - r + R) * (d + r + R))
    )
    area = {
        "disc": math.pi * 0.85**2,
        "ring": math.pi * (0.94**2 - 0.50**2),
        "square": 1.44**2,
        "triangle": 0.75 * 3**0.5,
        "cross": 2 * 1.9 * 0.56 - 0.56**2,
        "star": 5 * 0.4 * s,
        "crescent": math.pi * R * R - lens,
        "bar": 1.9 * 0.5,
        "pair": 2 * math.pi * 0.4**2,
        "corner": 1.6 * 0.52 + 0.52 * 1.52 - 0.52 * 0.5,
    }
    # corner: boxes [-.8,.8]x[-.76,-.24] and [-.8,-.28]x[-.76,.76] share [-.8,-.28]x[-.76,-.24]
    area["corner"] = 1.6 * 0.52 + 0.52 * 1.52 - 0.52 * 0.52
    axis = (torch.arange(1000) + 0.5) / 500 - 1
    y, x = torch.meshgrid(1.2 * axis, 1.2 * axis, indexing="ij")
    for name in common.SHAPES:
        inside = (common.shape_distance(name, x, y) < 0).double().mean() * 2.4**2
        assert inside == pytest.approx(area[name], rel=5e-3), name
        assert torch.hypot(x, y)[common.shape_distance(name, x, y) < 0].max() < 1.11, name
    assert c > s


def test_shape_is_visible_in_every_channel_and_away_from_the_corners():
    images, _ = common.shapes(500, 32, 0)
    back = images[:, :, :1, :1].int()
    difference = (images.int() - back).flatten(2).amax(2)  # (n, 3): where the shape is whole
    assert difference.min() >= 0.25 * 255 - 1
    for i, j in ((0, -1), (-1, 0), (-1, -1)):
        assert torch.equal(images[:, :, i, j].int(), back[:, :, 0, 0])


def test_an_epoch_shows_each_image_once_and_ranks_share_none(monkeypatch):
    cfg = config("--batch-size", 4)
    whole = [common.batch_indices(22, cfg, step) for step in range(5)]
    assert len(torch.cat(whole).unique()) == 20
    assert not torch.equal(torch.cat(whole)[:4], common.batch_indices(22, cfg, 5))  # next epoch
    monkeypatch.setattr(common, "WORLD", 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(common, "RANK", rank)
        parts.append(common.batch_indices(22, cfg, 3))
    assert torch.equal(torch.cat(parts), whole[3])


@pytest.fixture
def folder(tmp_path):
    """Three classes of four PNGs, 10 x 8; pixel value tells class and number."""
    for k, name in enumerate(("cat", "dog", "eel")):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.full((8, 10, 3), 60 * k + 10 * i, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / name / f"{i}.png")
    return tmp_path / "set"


def load(data, *flags):
    return common.load_images(config("--data", data, *flags), torch.device("cpu"))


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_folder_and_tar_give_pixels_and_classes(folder, kind):
    path = folder
    if kind == "tar":
        path = folder.parent / "set.tar"
        with tarfile.open(path, "w") as tar:
            tar.add(folder, "set")
    data = load(path)
    assert data.classes == 3 and data.images.shape == (12, 3, 8, 8)
    assert data.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.images[:, 0, 0, 0].tolist() == [60 * k + 10 * i for k in range(3) for i in range(4)]


def test_streamed_batches_equal_those_in_memory(folder, monkeypatch):
    memory, cfg = load(folder), config("--data", folder)
    monkeypatch.setattr(common.os, "sysconf", lambda name: 1)  # no memory
    streamed = load(folder)
    assert streamed.images is None and streamed.size == 12
    for step in (2, 3, 4, 5):  # begins in the middle, as a continued run does; crosses an epoch
        after = []
        for data in (memory, streamed):
            torch.manual_seed(step)
            after.append((*common.batch(data, cfg, torch.device("cpu"), step), torch.rand(3)))
        assert all(torch.equal(one, two) for one, two in zip(*after))  # the noise that follows, too


def test_a_limit_takes_some_images_of_every_class_order_and_seed(folder):
    cfg, cpu = config("--data", folder, "--batch-size", 2), torch.device("cpu")
    all_of_it, some = load(folder), common.load_images(cfg, cpu, "all", 5)
    cfg_9 = config("--data", folder, "--batch-size", 2, "--seed", 9)
    other = common.load_images(cfg_9, cpu, "all", 5)
    assert some.size == 5 and torch.equal(some.images, other.images) and some.classes == 3
    known = {tuple(image.flatten().tolist()) for image in all_of_it.images}
    found = {tuple(image.flatten().tolist()) for image in some.images}
    assert len(found) == 5 and found <= known and len(some.labels.unique()) > 1
    assert common.load_images(cfg, cpu, "all", 100).size == 12


def test_bad_data_end_with_one_line(folder, refuses, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "loose").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "loose" / "0.png")
    refuses(lambda: load("no/such"), "no/such", "shapes")
    refuses(lambda: load("torch/nonsense"), "torch/nonsense")
    refuses(lambda: load(tmp_path / "empty"), "empty")
    refuses(lambda: load(tmp_path / "loose"), "loose", "class sub-folders")
    refuses(lambda: load(folder, "--batch-size", 13), "13", "12")
    half = config("--data", tmp_path / "half")
    shutil.copytree(folder, tmp_path / "half" / "train")
    refuses(lambda: common.load_images(half, torch.device("cpu"), "validation"), "hold out")


def test_a_tenth_of_a_plain_folder_or_tar_is_held_out(folder):
    for k in range(18):
        Image.new("RGB", (8, 8), (k, 255, 0)).save(folder / "dog" / f"x{k}.png")
    with tarfile.open("set.tar", "w") as tar:
        tar.add(folder, arcname=".")
    for name in (folder, "set.tar"):
        cfg = config("--data", name, "--batch-size", 2)
        parts = {s: common.load_images(cfg, torch.device("cpu"), s)
                 for s in ("all", "train", "validation")}
        assert [parts[s].size for s in parts] == [30, 27, 3]
        assert {p.classes for p in parts.values()} == {3}
        key = lambda p: sorted(map(str, p.images[:, :, 0, 0].tolist()))
        assert key(parts["all"]) == sorted(key(parts["train"]) + key(parts["validation"]))
        assert torch.equal(parts["validation"].images, parts["all"].images[9::10])
        assert torch.equal(parts["validation"].labels, parts["all"].labels[9::10])


def test_truncated_image_is_named_or_left_out_but_never_replaced_in_silence(
    folder, refuses, capsys
):
    bad = folder / "dog" / "1.png"
    bad.write_bytes(bad.read_bytes()[:45])
    refuses(lambda: load(folder), "dog/1.png", "--skip-bad")
    data = load(folder, "--skip-bad")
    assert data.size == 11 and 70 not in data.images[:, 0, 0, 0].tolist()
    assert data.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 4


def test_a_streamed_batch_takes_the_next_of_its_part_for_an_image_that_cannot_be_read(
    folder, monkeypatch, capfd
):
    for k in range(18):
        Image.new("RGB", (8, 8), (k, 255, 0)).save(folder / "dog" / f"x{k}.png")
    pixels = load(folder).images[:, :2, 0, 0].tolist()  # 30, all different
    for bad in (folder / "dog" / "x0.png", folder / "dog" / "x1.png"):  # numbers 8 and 9
        bad.write_bytes(bad.read_bytes()[:45])
    monkeypatch.setattr(common.os, "sysconf", lambda name: 1)  # no memory
    monkeypatch.setattr(common.os, "cpu_count", lambda: 0)  # no workers
    cfg, cpu = config("--data", folder, "--skip-bad", "--batch-size", 3), torch.device("cpu")
    for split, part in (
        ("train", [i for i in range(30) if i % 10 < 9]),
        ("validation", [9, 19, 29]),
    ):
        data = common.load_images(cfg, cpu, split)
        assert data.images is None and data.size == len(part)
        x = torch.cat([common.batch(data, cfg, cpu, step)[0] for step in range(len(part) // 3)])
        seen = ((x[:, :2, 0, 0] + 1) * 127.5).round().int().tolist()
        assert len(seen) == len(part)
        assert sorted(pixels[i] for i in part if i not in (8, 9)) == sorted(
            list(pixel) for pixel in {tuple(pixel) for pixel in seen}
        )
    assert "dog/x0.png" in capfd.readouterr().err


def test_square_crops_the_centre_halves_with_a_box_and_resizes_with_antialiasing():
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 200
    assert torch.equal(
        common.square(Image.fromarray(wide), 4), torch.full((3, 4, 4), 200, dtype=torch.uint8)
    )
    fine = torch.arange(64).reshape(8, 8).to(torch.uint8)
    half = torch.nn.functional.avg_pool2d(fine[None, None].float(), 2)[0, 0]
    got = common.square(Image.fromarray(fine.numpy()).convert("RGB"), 4)[0].float()
    assert (got - half).abs().max() <= 0.5
    for h, w in ((16, 16), (48, 16), (16, 48)):  # resized whole, then cropped: the same
        photo = torch.randint(64, 192, (1, 3, h, w), dtype=torch.uint8)  # overshoots, no clipping
        whole = torch.nn.functional.interpolate(
            photo.float(), (h * 9 // 16, w * 9 // 16), mode="bicubic", antialias=True
        )[0]
        y, x = ((n - 9) // 2 for n in whole.shape[1:])
        got = common.square(Image.fromarray(photo[0].permute(1, 2, 0).numpy()), 9)
        assert got.dtype == torch.uint8
        assert (got - whole[:, y : y + 9, x : x + 9]).abs().max() <= 1


def test_flip_mirrors_about_half():
    cfg = config("--flip", "--batch-size", 200)
    data = load("shapes", "--batch-size", 200)
    x, _ = common.batch(data, cfg, torch.device("cpu"), 0)
    plain = data.images[common.batch_indices(data.size, cfg, 0)].float() / 127.5 - 1
    same = (x == plain).flatten(1).all(1)
    mirrored = (x == plain.flip(-1)).flatten(1).all(1)
    assert (same | mirrored).all() and 70 < mirrored.sum() < 130


# ---- encoders --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_encoder_gives_patch_tokens_of_the_grid(name, monkeypatch):
    import timm

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda n, pretrained=False, **k: create(n, **k))
    encoder = common.load_encoder(f"timm:{name}", grid=4)
    images = torch.rand(2, 3, 40, 40) * 2 - 1
    tokens = encoder(images)
    assert tokens.shape == (2, 16, encoder.dim) and not any(
        p.requires_grad for p in encoder.parameters()
    )
    side = 4 * (16 if "vit" in name else 32)
    resized = torch.nn.functional.interpolate(images, side, mode="bicubic", antialias=True)
    mean, std = (
        torch.tensor(encoder.model.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std")
    )
    raw = encoder.model.forward_features(((resized + 1) / 2 - mean) / std)
    expected = raw[:, 1:] if "vit" in name else raw.flatten(2).transpose(1, 2)
    assert torch.allclose(tokens, expected, atol=1e-5)
    plain = common.load_encoder(f"timm:{name}", grid=4, norm="plain")(images)
    assert (
        plain.mean(-1).abs().max() < 1e-5 and (plain.var(-1, unbiased=False) - 1).abs().max() < 1e-2
    )


def test_encoder_file_round_trip_and_errors(refuses, tmp_path):
    import timm
    from safetensors.torch import save_file

    args = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **args).eval()
    meta = {
        "timm": "vit_tiny_patch16_224",
        "args": json.dumps(args),
        "mean": "[0.5, 0.5, 0.5]",
        "std": "[0.5, 0.5, 0.5]",
    }
    save_file(model.state_dict(), "teacher.safetensors", meta)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    tokens = common.load_encoder("teacher.safetensors", grid=2)(images)
    assert torch.allclose(tokens, model.forward_features(images)[:, 1:], atol=1e-5)
    Path("broken.safetensors").write_bytes(b"no")
    refuses(lambda: common.load_encoder("missing.safetensors", 2), "missing", "simsiam")
    refuses(lambda: common.load_encoder("broken.safetensors", 2), "broken")
    refuses(lambda: common.load_encoder("timm:no_such_net", 2), "no_such_net")


# ---- the run ---------------------------------------------------------------------------


def run(*flags, at=lambda step, w: None):
    """A tiny training run: w moves by noise that depends on the step alone; `at` may interfere."""
    cfg = config("--out", "run", *flags)
    common.setup(cfg)
    torch.manual_seed(0)
    w = nn.Linear(3, 2)
    opt = torch.optim.AdamW(w.parameters(), cfg.lr)
    state = {"w": w, "opt": opt, "classes": 7}
    for step in common.steps(cfg, state):
        loss = (w(torch.randn(5, 3)) - 1).square().mean()
        factor = at(step, w)
        loss = loss if factor is None else loss * factor
        loss.backward()
        opt.step()
        opt.zero_grad()
        common.log(cfg, state, step, loss=loss, lr=cfg.lr)
    return w.weight.detach().clone(), state


def metrics():
    return [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]


def test_three_steps_and_three_more_equal_six():
    whole, _ = run("--out", "whole")
    run("--steps", 3)
    assert common.load_checkpoint(Path("run/last.pt"))["step"] == 3
    resumed, state = run()
    assert torch.equal(whole, resumed) and state["classes"] == 7
    for name in ("last.pt", "prev.pt", "config.json"):
        assert Path("run", name).exists()
    assert not torch.equal(run("--fresh", "--seed", 1)[0], whole)


def test_metrics_are_means_and_a_kill_leaves_no_double_lines():
    seen = []
    run(at=lambda step, w: seen.append(1.0 + step) or torch.tensor(1.0 + step))
    first = metrics()
    assert [line["step"] for line in first] == [2, 4, 6] and first[0]["lr"] == 0.1
    assert {"loss", "images_per_s", "memory_gb"} <= set(first[0])
    with pytest.raises(RuntimeError):  # dies at step 5, after the line and the save of step 4
        run("--fresh", at=lambda step, w: torch.tensor(1.0 + step) if step < 4 else die())
    with open("run/metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 0}\n{"step": 6, "lo')  # what a kill between may leave
    run(at=lambda step, w: torch.tensor(1.0 + step))
    again = metrics()
    assert [(a["step"], a["loss"]) for a in first] == [(a["step"], a["loss"]) for a in again]


def die():
    raise RuntimeError


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_exits(number, refuses):
    kill = lambda step, w: os.kill(os.getpid(), number) if step == 2 else None
    before = signal.getsignal(number)
    refuses(lambda: run("--save-every", 100, at=kill), "step 3", status=128 + number)
    assert signal.getsignal(number) == before
    assert common.load_checkpoint(Path("run/last.pt"))["step"] == 3
    assert torch.equal(run("--save-every", 100)[0], run("--out", "whole")[0])


@pytest.mark.parametrize("every", [2, 100])  # found when a line is due, or only before a save
def test_non_finite_loss_names_the_step_and_keeps_the_last_good_checkpoint(every, refuses):
    bad = lambda step, w: torch.tensor(math.nan if step == 4 else 1.0)
    refuses(lambda: run("--log-every", every, at=bad), "step 5", "last.pt of step 4", status=1)
    saved = common.load_checkpoint(Path("run/last.pt"))
    assert saved["step"] == 4 and saved["w"]["weight"].isfinite().all()


def test_another_config_is_refused_with_its_fields(refuses):
    run()
    refuses(lambda: run("--lr", 0.2), "lr 0.1", "0.2", "--fresh")
    run("--log-every", 3, "--save-every", 5, "--steps", 8)  # these may change


def test_unusable_files_are_refused(refuses, tmp_path):
    run()
    good = Path("run/last.pt").read_bytes()

    class Code:
        def __reduce__(self):
            return (os.system, ("touch owned",))

    for content in (good[:200], b"", pickle.dumps(Code())):
        Path("run/last.pt").write_bytes(content)
        refuses(run, "last.pt", "truncated")
    torch.save(Code(), "run/last.pt")
    refuses(run, "last.pt")
    assert not Path("owned").exists()
    torch.save({"step": 3}, "run/last.pt")
    refuses(run, "last.pt")
    Path("file").write_text("")
    refuses(lambda: run("--out", "file/run"), "file/run")


def test_last_is_loadable_whatever_step_of_saving_fails(monkeypatch, refuses):
    path = Path("last.pt")
    for i in range(2):
        common.save_checkpoint(path, {"step": i, "config": {}})
    real = {"replace": os.replace, "fsync": os.fsync}

    def full(*args):
        raise OSError(28, "No space left on device")

    for name in real:
        monkeypatch.setattr(os, name, full)
        refuses(lambda: common.save_checkpoint(path, {"step": 9, "config": {}}), "No space left")
        assert common.load_checkpoint(path)["step"] == 1 and not Path("last.new").exists()
        monkeypatch.setattr(os, name, real[name])
    seen = []
    def replace(a, b):
        seen.append([common.load_checkpoint(p)["step"] for p in (path, Path("prev.pt"))])
        real["replace"](a, b)

    monkeypatch.setattr(os, "replace", replace)
    for step in (2, 3):
        common.save_checkpoint(path, {"step": step, "config": {}})
    assert seen == [[1, 1], [2, 2]] and common.load_checkpoint(path)["step"] == 3


def test_no_space_while_logging_or_drawing_is_one_line(monkeypatch, refuses):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(common, "open", full, raising=False)
        refuses(lambda: run("--log-every", 1), "metrics.jsonl", "No space left")
    monkeypatch.setattr(Image.Image, "save", full)
    refuses(lambda: common.save_grid(torch.zeros(1, 3, 4, 4), "g.png", 1), "g.png", "No space left")


def test_read_only_folder(monkeypatch, refuses):
    def refuse(*args, **kwargs):  # as for a user who may not write there; root may everywhere
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    refuses(lambda: run("--out", "locked/run"), "locked", "Permission denied")


def test_ema_is_the_weighted_sum_of_the_weights():
    model, ema = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.zeros_(ema.weight)
    weights, expected = [0.5, -1.0, 2.0, 3.0], 0.0
    decays = [min(0.3, (1 + k) / (10 + k)) for k in range(4)]  # 0.1, 0.1818, 0.25, 0.3
    for k, w in enumerate(weights):
        nn.init.constant_(model.weight, w)
        common.ema_update(ema, model, 0.3, k)
        expected += w * (1 - decays[k]) * math.prod(decays[k + 1 :])
    assert ema.weight.item() == pytest.approx(expected, rel=1e-6)


def test_ema_copies_buffers():
    model, ema = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    model(torch.randn(8, 2))
    common.ema_update(ema, model, 0.9, 0)
    assert torch.equal(ema.running_mean, model.running_mean) and ema.num_batches_tracked == 1


# ---- samples and pictures --------------------------------------------------------------


def test_shares_and_gather_do_not_depend_on_the_ranks(monkeypatch):
    draw = lambda: [
        (i, torch.randn(len(i), 2, generator=g)) for i, g in common.shares(10, 3, seed=5)
    ]
    alone = common.gather(draw())
    parts = []
    for rank in (1, 0):
        monkeypatch.setattr(common, "RANK", rank)
        monkeypatch.setattr(common, "WORLD", 2)
        parts += draw()
    monkeypatch.setattr(common, "WORLD", 1)
    assert alone.shape == (10, 2) and torch.equal(common.gather(parts), alone)


def test_grid_puts_image_i_at_row_and_column():
    images = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 3, 32, 32)
    common.save_grid(images, "grid.png", columns=3)
    picture = np.array(Image.open("grid.png"))
    assert picture.shape == (2 * 66, 3 * 66, 3)
    assert [picture[66 * (i // 3), 66 * (i % 3), 0] for i in range(6)] == [
        0,
        64,
        128,
        191,
        255,
        255,
    ]


def test_gif_has_the_frames_and_npz_the_bytes():
    video = torch.linspace(-1, 1, 4).view(1, 1, 4, 1, 1).expand(2, 3, 4, 64, 64)
    common.save_gif(video, "v.gif", columns=2)
    with Image.open("v.gif") as gif:
        assert gif.n_frames == 4 and gif.size == (132, 66)
    images = torch.rand(3, 3, 4, 5) * 2.4 - 1.2
    common.save_npz(images, torch.arange(3), "s.npz")
    with np.load("s.npz") as file:
        expected = np.clip(
            np.round((images.permute(0, 2, 3, 1).numpy().clip(-1, 1) + 1) * 127.5), 0, 255
        )
        assert file["arr_0"].dtype == np.uint8 and np.abs(file["arr_0"] - expected).max() == 0
        assert file["arr_1"].tolist() == [0, 1, 2]


def test_figure_writes_a_picture():
    with common.figure("f.png", 1, 2) as axes:
        axes[0, 1].plot([0, 1], [1, 0])
    assert Image.open("f.png").size[0] > 300


def test_a_signal_in_the_last_step_ends_the_program_since_another_stage_may_follow():
    cfg, state = config("--steps", 2, "--save-every", 1), {}
    with pytest.raises(SystemExit) as stop:
        for step in common.steps(cfg, state):
            if step == 1:
                signal.raise_signal(signal.SIGTERM)
            common.log(cfg, state, step, loss=torch.ones(()))
    assert stop.value.code == 128 + signal.SIGTERM
    assert common.load_checkpoint(Path(cfg.out, "last.pt"))["step"] == 2
