"""What the scripts share: command line, data, encoders, run folder, pictures. It names no paper."""
import argparse, contextlib, functools, hashlib, inspect, json, math, os, re, resource
import shutil, signal, sys, sysconfig, time
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import distributed as dist, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun
SHAPES = "disc ring square triangle cross star crescent bar pair corner".split()
FREE = "fresh device log_every save_every sample_every steps sample n npz out".split()  # on resume

# ---- command line, device, ranks, precision --------------------------------------------
def fail(message, status=2):
    """End the program with one line on stderr. Status 2: bad input; 1: the run itself broke."""
    tqdm.write(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", sys.stderr)
    raise SystemExit(status)

@contextlib.contextmanager
def explain(what, *kinds):
    """Errors of these kinds in the block end the program: `what` and the last line of the error."""
    try:
        yield
    except kinds as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        hint = f": pip install {error.name}" if isinstance(error, ModuleNotFoundError) else ""
        fail(f"{what}: {reason}{hint}")

def parse_config(cls, presets, sampling=(), argv=None):
    """Flags from a dataclass: `lr: float = 2e-4  # help` is --lr; `# on | off: help` a choice.
    presets   {name: {field: value}}; a preset beats the defaults, a flag beats the preset
    sampling  fields allowed beside --sample FILE; all others come from that checkpoint
    errors    one line and exit status 2 for whatever argparse or cls.__post_init__ rejects"""
    notes = dict(re.findall(r"^    (\w+):.*?  # (.+)$", inspect.getsource(cls), re.M))
    parser = argparse.ArgumentParser(allow_abbrev=False, description=inspect.getmodule(cls).__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message} (--help lists what is allowed)")
    for name, kind in cls.__annotations__.items():
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        words = re.match(r"([\w-]+(?: \| [\w-]+)+)(?:[:;]|$)", notes[name])
        choices = [*presets] if name == "preset" else words and words[1].split(" | ")
        how |= {"choices": choices} if choices else {}
        how["help"] = f"{notes[name]} [{getattr(cls, name)}]".replace("%", "%%")
        parser.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS, **how)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v or k != "out"}
    preset, source = given.get("preset", ""), given.get("sample", "")
    out = f"runs/{Path(inspect.getfile(cls)).stem}-{preset}".strip("-")
    values = {"out": out} | presets.get(preset, {})
    if source:
        if extra := set(given) - {*"sample device precision seed n npz out".split(), *sampling}:
            fail(f"--sample takes {', '.join(sorted(extra))} from the checkpoint: drop that flag")
        values = load_checkpoint(source)["config"] | {"out": str(Path(source).parent)}
    with explain("config", TypeError, ValueError):  # TypeError: a checkpoint of another script
        cfg = cls(**values | given)
    for name in "seed steps batch_size image_size log_every save_every sample_every n".split():
        if getattr(cfg, name) < (least := int(name != "seed")):
            fail(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(cfg, name)}")
    return cfg

def mix(*keys):
    """One seed out of several non-negative integers."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> 1)

def setup(cfg, *fixed):
    """Start ranks, seed (the same on all: equal initial weights), check cfg.out; torch.device.
    fixed    fields that a continued run may not change although others may, such as steps"""
    there = [kind for kind in ("cuda", "mps", "cpu") if getattr(torch, kind).is_available()]
    kind = there[0] if cfg.device == "auto" else cfg.device
    if kind not in there:
        fail(f"--device {kind}: this machine has {', '.join(there)}")
    if cfg.batch_size % WORLD and not cfg.sample:
        fail(f"batch size {cfg.batch_size} must be divisible by the {WORLD} ranks")
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in float32
    torch.backends.cuda.enable_flash_sdp(kind != "cpu")  # also a CPU's, slow on short sequences
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    torch.manual_seed(cfg.seed)
    last = Path(cfg.out, "last.pt")
    if cfg.sample:
        with explain(f"--out {cfg.out}: cannot write there", OSError):
            Path(cfg.out).mkdir(parents=True, exist_ok=True)
    elif last.exists() and not cfg.fresh:
        old, new = load_checkpoint(last)["config"], vars(cfg)
        other = ", ".join(f"{k} {old.get(k)!r} (now {new.get(k)!r})" for k in new | old
                          if (k not in FREE or k in fixed) and new.get(k) != old.get(k))
        if other:
            fail(f"{last} has {other}: give its flags, another --out, or --fresh to start over")
    return torch.device(kind)

def autocast(cfg, device):
    """Context for matrix products in bf16; `auto`: where the device has instructions for them."""
    fast = {"cuda": True, "mps": False, "cpu": torch.cpu._is_avx512_bf16_supported()}[device.type]
    use = fast if cfg.precision == "auto" else cfg.precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=use)

def parallel(model, cfg, device):
    """What to call in training: model, compiled in place, wrapped under torchrun. Save model."""
    headers = Path(sysconfig.get_paths()["include"], "Python.h").exists()
    compiles = headers and sys.platform == "linux" and shutil.which(os.environ.get("CXX", "g++"))
    if cfg.compile == "on" or (cfg.compile == "auto" and (device.type == "cuda" or compiles)):
        model.compile()
    return nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model

@torch.no_grad()
def ema_update(ema, model, decay, step=math.inf):
    """ema <- d ema + (1 - d) model, d = min(decay, (1 + step) / (10 + step)); copies buffers."""
    d = min(decay, 1 - 9 / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)
    for mine, theirs in zip(ema.buffers(), model.buffers()):
        mine.copy_(theirs)

# ---- data, frozen encoders -------------------------------------------------------------
def shapes(n, size, seed, device="cpu"):
    """Bright shapes on dark, free in position, scale, angle and two colours: ten 10-d manifolds.
    returns  uint8 (n, 3, size, size), anti-aliased; int64 (n,): i % 10 for image i, index of SHAPES
    note     devices agree to one grey level; every channel is brighter by 0.25 in the shape"""
    u = torch.rand(n, 10, generator=torch.Generator().manual_seed(seed)).to(device)
    radius = 0.55 + 0.3 * u[:, 2]  # of the outer circle; the image is [-1, 1]^2
    centre = (2 * u[:, :2] - 1) * (1 - radius)[:, None]  # the shape stays inside
    back, front = 0.4 * u[:, 4:7, None, None], 0.65 + 0.35 * u[:, 7:, None, None]
    turn = torch.polar(1 / radius, -2 * math.pi * u[:, 3])[:, None, None]
    axis = (torch.arange(size, device=device) + 0.5) * 2 / size - 1
    plane = torch.complex(*torch.meshgrid(axis, axis, indexing="xy"))
    images = torch.empty(n, 3, size, size, dtype=torch.uint8, device=device)
    labels = torch.arange(n, device=device) % len(SHAPES)
    for label, name in enumerate(SHAPES):
        for i in (labels == label).nonzero()[:, 0].split(1000):
            p = (plane - torch.complex(*centre[i].T)[:, None, None]) * turn[i]
            distance = shape_distance(name, p.real, p.imag) * radius[i, None, None]
            cover = (0.5 - distance * size / 2).clamp(0, 1)[:, None]  # share of the pixel
            images[i] = torch.lerp(back[i], front[i], cover).mul_(255).round_().to(torch.uint8)
    return images, labels

def shape_distance(name, x, y):
    """Signed distance to a shape of outer radius 1, negative inside; exact up to the corners."""
    r = torch.hypot(x, y)
    def box(x, y, width, height):
        return torch.maximum(x.abs() - width, y.abs() - height)
    def star(points, inner):  # folded onto half a point: the line from its tip to its inner corner
        half = math.pi / points
        a = half - (torch.atan2(x, y) % (2 * half) - half).abs()  # angle from the tip
        ex, ey = inner * math.sin(half), inner * math.cos(half) - 1
        return ((r * a.cos() - 1) * ex - r * a.sin() * ey) / math.hypot(ex, ey)
    return {
        "disc": lambda: r - 0.85, "ring": lambda: (r - 0.72).abs() - 0.22,
        "square": lambda: box(x, y, 0.72, 0.72), "bar": lambda: box(x, y, 0.95, 0.25),
        "triangle": lambda: star(3, 0.5), "star": lambda: star(5, 0.4),
        "pair": lambda: torch.hypot(x.abs() - 0.58, y) - 0.4,
        "cross": lambda: torch.minimum(box(x, y, 0.95, 0.28), box(x, y, 0.28, 0.95)),
        "crescent": lambda: torch.maximum(r - 0.95, 0.75 - torch.hypot(x - 0.5, y)),
        "corner": lambda: torch.minimum(box(x, y + 0.5, 0.8, 0.26), box(x + 0.54, y, 0.26, 0.76)),
    }[name]()

def simulate_balls(p, v, radius, frames, step=1 / 15, gravity=1.6):
    """Exact elastic motion in the unit box, y down: parabolas from one wall or ball to the next.
    p, v     (n, balls, 2) float64 in the first frame, NaN: no ball; radius (n,); equal masses
    returns  (n, frames, balls, 4): x, y, vx, vy"""
    r, (i, j) = radius[:, None], torch.combinations(torch.arange(p.shape[1])).T
    tracks, g = [torch.cat([p, v], -1)], p.new_tensor([0, gravity])
    for _ in range(frames - 1):
        left = torch.full_like(radius, step)
        while left.any():  # each clip goes on to its next event, or to the frame
            (x, y), (vx, vy) = p.unbind(-1), v.unbind(-1)
            side = torch.where(vx > 0, 1 - r - x, x - r) / vx.abs()
            floor = ((vy**2 + 2 * gravity * (1 - r - y)).clamp(min=0).sqrt() - vy) / gravity
            ceiling = -((vy**2 - 2 * gravity * (y - r)).sqrt() + vy) / gravity
            dp, dv = p[:, i] - p[:, j], v[:, i] - v[:, j]
            a, b, c = (dv * dv).sum(-1), (dp * dv).sum(-1), (dp * dp).sum(-1) - 4 * r**2
            meet = -((b**2 - a * c).sqrt() + b) / a  # |dp + s dv| = 2 r: both fall alike
            times = [side, floor, ceiling.where(vy < 0, math.inf), meet.where(b < 0, math.inf)]
            first, event = torch.cat(times, 1).nan_to_num(math.inf).clamp(min=0).min(1)
            dt, stop = torch.minimum(first, left)[:, None, None], (first < left)[:, None]
            p, v, left = p + v * dt + g * dt**2 / 2, v + g * dt, left - dt[:, 0, 0]
            hit = nn.functional.one_hot(event, sum(t.shape[1] for t in times)).bool() & stop
            side, floor, ceiling, meet = hit.split([t.shape[1] for t in times], 1)
            v = torch.where(torch.stack([side, floor | ceiling], -1), -v, v)
            normal = nn.functional.normalize(p[:, i] - p[:, j], dim=-1)
            kick = torch.where(meet[..., None], (dv * normal).sum(-1, True) * normal, 0)
            v = v.index_add(1, i, -kick).index_add(1, j, kick)  # they swap their normal parts
        tracks.append(torch.cat([p, v], -1))
    return torch.stack(tracks, 1)

def draw_balls(tracks, radius, size):
    """Tracks (n, F, balls, 2 or 4) -> cover of the pixels, a Gaussian blob of std 0.6 r for each
    ball, 1 in its middle and 0 for NaN: float32 (n, balls, F, size, size)."""
    axis = (torch.arange(size, device=tracks.device) + 0.5) / size
    d = (axis - tracks[..., :2, None]) / (0.6 * radius.view(-1, 1, 1, 1, 1))
    x, y = (-d**2 / 2).exp().nan_to_num(0).float().transpose(1, 2).unbind(3)  # (n, balls, F, size)
    return y[..., :, None] * x[..., None, :]

def bouncing_balls(n, frames, size, seed, texture=False):
    """Clips, 15 frames a second, of balls that fall and bounce in the unit box, one a channel.
    texture  a random smooth background that does not move, instead of black
    returns  namespace: videos uint8 (n, 3, F, size, size), background uint8 (n, 3, 1, size, size),
             tracks (n, F, 3, 4), radius (n,), labels int64 (n,): clip i has 1 + i % 3 balls"""
    generator, labels = torch.Generator().manual_seed(seed), torch.arange(n) % 3
    uniform = functools.partial(torch.rand, dtype=torch.float64, generator=generator)
    radius = torch.where(labels < 2, 0.13, 0.10).double()
    p, again = torch.zeros(n, 3, 2, dtype=torch.float64), torch.arange(n)
    while len(again):  # no two may overlap
        r = radius[again, None, None]
        p[again] = r + (1 - 2 * r) * uniform(len(again), 3, 2)
        p[torch.arange(3) > labels[:, None]] = math.nan
        distance = (p[:, [0, 0, 1]] - p[:, [1, 2, 2]]).norm(dim=-1)
        again = (distance < 2 * radius[:, None]).any(1).nonzero()[:, 0]
    v = (2 * uniform(n, 3, 2) - 1) * torch.tensor([1.6, 1.2])
    tracks, coarse = simulate_balls(p, v, radius, frames), uniform(n, 3, 4, 4).float() * texture / 2
    back = nn.functional.interpolate(coarse, size, mode="bilinear").mul(255).round()[:, :, None]
    videos = torch.lerp(back, back.new_tensor(255), draw_balls(tracks, radius, size)).round()
    return argparse.Namespace(videos=videos.to(torch.uint8), background=back.to(torch.uint8),
                              tracks=tracks, radius=radius, labels=labels)

def load_images(cfg, device, split="all", limit=None):
    """The data set of --data: on the device if it takes at most a quarter of memory, else streamed.
    limit    of a set that is not shapes, take at most so many images, the same in every run
    split    all: 50,000 shapes, or a set's training part | validation: 10,000 other shapes, a set's
             held-out part, or, of a folder or .tar without one, every tenth image | train: the rest
    returns  namespace: classes (number), size M, images uint8 (M, 3, S, S), labels int64 (M,);
             if streamed, images is None and stream(step) iterates over batches from that step on
    errors   a set that is missing, empty, unreadable, without classes or smaller than the batch"""
    S, cuda = cfg.image_size, device.type == "cuda"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / WORLD  # each rank decodes
    memory = min(torch.cuda.mem_get_info()[1], memory) if cuda else memory
    loader = functools.partial(DataLoader, num_workers=min(16, -(-os.cpu_count() // WORLD)),
                               pin_memory=cuda, generator=torch.Generator())  # not the step's own
    data = argparse.Namespace(classes=len(SHAPES), images=None)
    if cfg.data.partition(":")[0] == "shapes":
        kinds = cfg.data[7:].split(",") if ":" in cfg.data else SHAPES  # the others are left out
        if set(kinds) - set(SHAPES):
            fail(f"--data {cfg.data}: after shapes: are allowed {', '.join(SHAPES)}")
        images, y = shapes(*((10_000, S, 1) if split == "validation" else (50_000, S, 0)), device)
        keep = torch.isin(y, torch.tensor([SHAPES.index(k) for k in kinds], device=device))
        data.images, data.labels, data.size = images[keep], y[keep], keep.sum().item()
    else:
        dataset, indices, data.classes = open_dataset(cfg.data, split)
        if limit:
            indices = [indices[i] for i in epoch_order(len(indices), 0)[:limit]]
        streamed = len(indices) * 3 * S * S > memory / 4
        read = functools.partial(read_images, dataset, indices, cfg, streamed)
        if streamed:
            data.size = len(indices)
            data.stream = lambda step: iter(loader(range(step, 2**60), None, collate_fn=read))
        else:
            parts = loader(range(0, len(indices), 256), None, collate_fn=read)
            with explain(f"--data {cfg.data}", OSError):  # raised in a worker
                parts = tqdm(parts, f"reading {cfg.data}", disable=RANK > 0 or None)
                parts = zip(*[[x.to(device, copy=True) for x in part] for part in parts])
            data.images, data.labels = map(torch.cat, parts)
            data.size = len(data.labels)
            if cfg.skip_bad and RANK == 0:
                print(f"left out {len(indices) - data.size} of {len(indices)} images of {cfg.data}")
    if split != "validation" and data.size < cfg.batch_size:
        fail(f"batch size {cfg.batch_size} is larger than the {data.size} images of {cfg.data}")
    return data

def open_dataset(name, split):
    """What timm's create_dataset makes of --data, the indices of this split, number of classes."""
    known = ("torch/", "hfds/")  # iterable sets (wds/, tfds/, hfids/) cannot be resumed exactly
    if not name.startswith(known) and not os.path.exists(name):
        fail(f"--data {name}: allowed: shapes, a folder, a .tar, timm's {'..., '.join(known)}...")
    kind, root = (name, "data") if name.startswith(known) else ("", name)
    part = "validation" if split == "validation" else "train"
    with explain(f"--data {name}", Exception):  # whatever that data set's library raises
        from timm.data import create_dataset
        dist.barrier() if kind and RANK > 0 else None  # rank 0 goes first: it downloads
        dataset = create_dataset(kind, root, part, is_training=part == "train", download=True)
        dist.barrier() if kind and RANK == 0 and WORLD > 1 else None
    reader, indices = getattr(dataset, "reader", dataset), range(len(dataset))
    classes = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    if not classes or "" in classes:
        fail(f"--data {name}: no classes; images of a folder or .tar must lie in class sub-folders")
    if split != "all" and getattr(reader, "root", "") == name:  # has no held-out part of its own
        indices = [i for i in indices if (i % 10 == 9) == (part == "validation")]
        if os.path.isdir(f"{name}/train") or not indices:
            fail(f"--data {name}: nothing to hold out: it needs val beside train, or ten images")
    return dataset, indices, max(classes.values()) + 1

def square(image, size):
    """ADM's centre crop: halve while twice too large, bicubic to size. PIL -> uint8 (3, S, S)."""
    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize([x // 2 for x in image.size], Image.Resampling.BOX)
    image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

def read_images(dataset, indices, cfg, streamed, i):
    """Decode batch i if streamed, else 256 images from number i on: uint8 (n, 3, S, S), int64 (n,).
    One that cannot be read raises OSError with its name (timm would replace it in silence); with
    --skip-bad a line names it, and it is left out or, if streamed, the next one takes its place."""
    n, size = len(indices), cfg.image_size
    queue = batch_indices(n, cfg, i).tolist() if streamed else [*range(n)[i:i + 256]]
    pairs = [(torch.empty(0, 3, size, size, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))]
    for k in queue:
        try:
            image, label = getattr(dataset, "reader", dataset)[indices[k]]
            image = Image.open(image) if hasattr(image, "read") else image
            pairs.append((square(image, size)[None], torch.tensor([int(label)])))
        except Exception as error:  # Pillow raises many kinds
            name = getattr(dataset, "filename", "number {}".format)(indices[k])
            if not cfg.skip_bad or len(queue) > 2 * n:  # none of them can be read
                raise OSError(f"cannot read image {name} (--skip-bad leaves it out): {error}")
            tqdm.write(f"left out image {name}, which cannot be read: {error}", file=sys.stderr)
            queue += [(k + 1) % n] * streamed
    return tuple(torch.cat(column) for column in zip(*pairs))

@functools.lru_cache(maxsize=2)
def epoch_order(size, seed):
    """Permutation of range(size), a function of the seed. int64 (size,)."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))

def batch_indices(size, cfg, step):
    """This rank's images of a step, int64 (B / ranks,): none twice an epoch or on two ranks."""
    epoch, i = divmod(step, size // cfg.batch_size)
    order = epoch_order(size, mix(cfg.seed, epoch))
    return order[i * cfg.batch_size:(i + 1) * cfg.batch_size].chunk(WORLD)[RANK]

def batch(data, cfg, device, step):
    """This rank's part of a batch: float32 (B / ranks, 3, S, S) in [-1, 1], int64 (B / ranks,)."""
    if data.images is not None:
        index = batch_indices(data.size, cfg, step).to(device, non_blocking=True)
        pixels, labels = data.images[index], data.labels[index]
    else:
        data.iterator = getattr(data, "iterator", None) or data.stream(step)
        with explain(f"--data {cfg.data}", OSError):  # raised in a worker
            pixels, labels = (x.to(device, non_blocking=True) for x in next(data.iterator))
    images = pixels.float() / 127.5 - 1
    if cfg.flip:
        mirror = torch.rand(len(images), 1, 1, 1, device=device) < 0.5
        images = torch.where(mirror, images.flip(-1), images)
    return images, labels

class Encoder(nn.Module):
    """Frozen timm backbone: images (B, 3, H, W) in [-1, 1] -> tokens (B, N, dim), for any H, W."""
    def __init__(self, model, grid, norm, mean, std):
        super().__init__()
        self.model, self.plain, self.dim = model, norm == "plain", model.num_features
        self.size = grid * model.feature_info[-1]["reduction"]
        if norm != "final":
            model.norm = nn.Identity()
        self.register_buffer("stats", torch.tensor([mean, std]).view(2, 1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, images):
        images = nn.functional.interpolate(images, self.size, mode="bicubic", antialias=True)
        h = self.model.forward_features((images * 0.5 + 0.5 - self.stats[0]) / self.stats[1])
        h = h[:, getattr(self.model, "num_prefix_tokens", 0):] if h.ndim == 3 else h.flatten(2).mT
        return nn.functional.layer_norm(h, h.shape[-1:]) if self.plain else h

def load_encoder(spec, grid, norm="final"):
    """A frozen encoder of images into grid x grid tokens: Encoder, its width in `.dim`.
    spec     timm:<name>, with timm's pretrained weights, or a .safetensors file with metadata timm
             (name), args, mean, std (JSON; for images in [0, 1]); looked up beside this file too
    norm     final: the encoder's own last one | none: before it | plain: LayerNorm, not affine"""
    import timm, safetensors
    with explain(f"--encoder {spec} (timm:name, or a file that simsiam.py makes)", Exception):
        if spec.startswith("timm:"):
            patch = getattr(timm.create_model(spec[5:]), "patch_embed", None)
            size = {"img_size": grid * patch.patch_size[0]} if patch else {}
            model = timm.create_model(spec[5:], pretrained=True, num_classes=0, **size)
            return Encoder(model, grid, norm, *(model.pretrained_cfg[k] for k in ("mean", "std")))
        path = spec if os.path.isfile(spec) else Path(__file__).parent / spec
        with safetensors.safe_open(path, "pt") as file:
            name, args, mean, std = (file.metadata()[k] for k in ("timm", "args", "mean", "std"))
        model = timm.create_model(name, checkpoint_path=path, num_classes=0, **json.loads(args))
        return Encoder(model, grid, norm, json.loads(mean), json.loads(std))

# ---- the run ---------------------------------------------------------------------------
def load_checkpoint(path, *names):
    """Entries of a checkpoint, mapped from disk; refused if it has code in it or lacks a name."""
    with explain(f"{path} is missing, truncated or no checkpoint of these scripts", Exception):
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {name: saved[name] for name in ("step", "config", *names)} | saved

def save_checkpoint(path, entries):
    """Write under another name, flush, rename: a kill leaves the old file or the new one, whole."""
    new = path.with_suffix(".new")
    try:
        with open(new, "wb") as f:
            torch.save(entries, f)
            f.flush()
            os.fsync(f.fileno())
        if path.exists():
            shutil.copyfile(path, path.with_name("prev.pt"))  # so `path` never goes missing
        os.replace(new, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        new.unlink(missing_ok=True)
        reason = error if isinstance(error, OSError) else error.__context__ or error
        fail(f"cannot save {path}, which stays as it was: {reason}")

def start_run(cfg, state):
    """Make or continue the run folder: fills `state` from last.pt, returns the first step to do."""
    out, last, table = Path(cfg.out), Path(cfg.out, "last.pt"), Path(cfg.out, "metrics.jsonl")
    files = Path(inspect.getfile(type(cfg))), Path(__file__)
    code, saved = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}, {"step": 0}
    misfit = explain(f"{last} does not fit this script", KeyError, RuntimeError, ValueError)
    with misfit, explain(f"--out {out}: cannot write there", OSError):
        if last.exists() and not cfg.fresh:
            saved = load_checkpoint(last)
            for name, entry in state.items():
                load = getattr(entry, "load_state_dict", lambda value: state.update({name: value}))
                load(saved[name])
        if RANK == 0:
            out.mkdir(parents=True, exist_ok=True)
            for file in [last, out / "prev.pt", table, *out.glob("samples_*")] * cfg.fresh:
                file.unlink(missing_ok=True)
            if saved.get("code", code) != code:
                tqdm.write(f"warning: the code has changed since {last} was made")
            table.touch()  # and drop the lines of steps that a kill undid
            lines = [x for x in table.read_text().splitlines(True) if x.endswith("}\n")]
            lines = [x for x in lines if json.loads(x)["step"] <= saved["step"]]
            config = json.dumps(vars(cfg) | {"code": code}, indent=1)
            for file, text in (out / "config.json", config), (table, "".join(lines)):
                file.with_suffix(".new").write_text(text)
                os.replace(file.with_suffix(".new"), file)  # whole at every moment
        state["code"] = code
        return saved["step"]

def steps(cfg, state):
    """`for step in steps(cfg, state)`: resumes, seeds each step from (seed, step, rank), saves.
    state    {name: module, optimizer or plain value}: what last.pt holds beside step and config
    Saves every save_every steps, at the end, and on Ctrl-C or SIGTERM; then exits, 128 + signal."""
    state["log"], caught = torch.zeros(0, 0), []
    start = start_run(cfg, state)
    state["clock"] = start, time.perf_counter()
    with contextlib.ExitStack() as at_end:
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(number, lambda number, frame: caught.append(number))
            at_end.callback(signal.signal, number, before)
        for step in tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, unit="step",
                         disable=RANK > 0 or None):
            torch.manual_seed(mix(cfg.seed, step, RANK))
            yield step
            stop = torch.tensor([*caught, 0][0])
            if WORLD > 1:
                dist.all_reduce(stop, dist.ReduceOp.MAX)  # every rank leaves after the same step
            if stop or due(cfg, cfg.save_every, step):
                state["log"] = check_finite(cfg, state, step)  # the ranks' mean, the same on all
                entries = {k: getattr(v, "state_dict", lambda: v)() for k, v in state.items()}
                if RANK == 0:
                    entries |= {"step": step + 1, "config": vars(cfg)}
                    save_checkpoint(Path(cfg.out, "last.pt"), entries)
                dist.barrier() if WORLD > 1 else None  # no rank reads it, or leaves, too early
            if stop:  # in the last step, too: another stage may follow
                fail(f"stopped at step {step + 1}, saved; run it again to go on", 128 + int(stop))

def due(cfg, every, step):
    """True every `every` steps (counted from 0), and at the last one."""
    return (step + 1) % every == 0 or step + 1 == cfg.steps

def log(cfg, state, step, **values):
    """Called every step; a line to terminal and metrics.jsonl every log_every steps. Of values,
    scalar tensors stay on the device until then: mean since the last line; numbers are as is."""
    tensors = {k: v for k, v in values.items() if torch.is_tensor(v)}
    row = torch.stack([v.detach().float() for v in tensors.values()])[None]  # (1, tensors)
    begins = due(cfg, cfg.log_every, step - 1)
    state["log"] = row if begins else torch.cat([state["log"].to(row.device), row])
    if not due(cfg, cfg.log_every, step):
        return
    mean, now = check_finite(cfg, state, step).mean(0), time.perf_counter()
    (first, before), state["clock"] = state["clock"], (step + 1, now)
    speed = cfg.batch_size * (step + 1 - first) / (now - before)
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes, on Linux kilobytes
    host *= 1024 if sys.platform == "linux" else 1
    memory = (torch.cuda.max_memory_allocated() if row.is_cuda else host) / 2**30
    line = values | dict(zip(tensors, mean.tolist())) | {"images_per_s": speed, "memory_gb": memory}
    if RANK == 0:
        tqdm.write(f"step {step + 1}  " + "  ".join(f"{k} {v:.4g}" for k, v in line.items()))
        path = Path(cfg.out, "metrics.jsonl")
        with explain(f"cannot write {path}", OSError), open(path, "a") as file:
            file.write(json.dumps({"step": step + 1} | line) + "\n")

def check_finite(cfg, state, step):
    """Rows logged since the last line, mean of the ranks; ends the run (1) if one is not finite."""
    rows, last = state["log"] / WORLD, Path(cfg.out, "last.pt")
    if WORLD > 1:
        dist.all_reduce(rows)
    bad = (~rows.isfinite().all(1)).nonzero() + step + 2 - len(rows)  # steps, counted from 1
    if len(bad):
        good = f"{last} of step {load_checkpoint(last)['step']}" if last.exists() else "none yet"
        fail(f"loss or gradient not finite at step {int(bad[0])}; last good checkpoint: {good}", 1)
    return rows

# ---- samples and pictures --------------------------------------------------------------
def shares(n, size, seed):
    """This rank's part of n samples: yields int64 indices (<= size,) and a CPU generator each."""
    for i, index in list(enumerate(torch.arange(n).split(size)))[RANK::WORLD]:
        yield index, torch.Generator().manual_seed(mix(seed, i))

def gather(parts):
    """Pairs (indices (n,), values (n, ...)) of all ranks -> values in index order, on the CPU."""
    parts = [[(index, values.cpu()) for index, values in parts]] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, parts[RANK])
    index, values = (torch.cat(column) for column in zip(*sum(parts, [])))
    return values[index.argsort()]

def to_uint8(images):
    """[-1, 1] -> 0 ... 255, clipped and rounded; uint8 stays as it is."""
    pixels = images if images.dtype == torch.uint8 else (images.float().clamp(-1, 1) + 1) * 127.5
    return pixels.round().to(torch.uint8)

def save_grid(images, path, columns):
    """PNG of images (n, C, H, W) in [-1, 1], `columns` a row, enlarged to at least 64 pixels."""
    save_gif(images[:, :, None], path, columns)

def save_gif(videos, path, columns, fps=8):
    """Animation of videos (n, C, F, H, W) in [-1, 1], `columns` a row, enlarged to 64 pixels."""
    if RANK > 0:
        return
    zoom, blank = max(1, 64 // videos.shape[-1]), -len(videos) % columns
    videos = to_uint8(videos).cpu().repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)
    videos = nn.functional.pad(videos, (0, 2, 0, 2, 0, 0, 0, 0, 0, blank), value=255)  # lines
    grid = rearrange(videos, "(row column) c f h w -> f (row h) (column w) c", column=columns)
    first, *rest = [Image.fromarray(frame) for frame in grid.expand(-1, -1, -1, 3).numpy()]
    with explain(f"cannot write {path}", OSError):
        first.save(path, save_all=bool(rest), append_images=rest, duration=1000 // fps, loop=0)

def save_npz(images, labels, path):
    """Samples in ADM's evaluation format: arr_0 uint8 (n, H, W, 3), arr_1 int64 (n,)."""
    if RANK == 0:
        np.savez(path, to_uint8(images).permute(0, 2, 3, 1).cpu().numpy(), labels.cpu().numpy())

@contextlib.contextmanager
def figure(path, rows=1, columns=1, size=(3.0, 2.4)):
    """Matplotlib axes (rows, columns), `size` inches each; written to path when the block ends."""
    from matplotlib.figure import Figure  # without pyplot: no display, nothing to close
    fig = Figure((size[0] * columns, size[1] * rows), layout="constrained")
    yield fig.subplots(rows, columns, squeeze=False)
    fig.savefig(path, dpi=110)
    octree = Image.Quantize.FASTOCTREE  # 256 colours, a third of the bytes
    Image.open(path).convert("RGB").quantize(method=octree).save(path, optimize=True)
