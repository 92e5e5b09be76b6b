"""The README's picture, a row per script, out of the default runs: writes assets/gallery.png.

    python <script>.py                      # each of them: runs/<script>, less than an hour in all
    python balanced_representation.py --sample runs/balanced_representation/last.pt
    python -m tests.gallery
"""
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from common import fail

ROOT = Path(__file__).resolve().parents[1]
TILE, COLUMNS, LABEL = 66, 10, 250  # pixels of a tile with its line, tiles a row, pixels of a label
ROWS = {  # script: what is shown, the picture in its run folder, which of its tiles [row, column]
    "consistency_training": ("one step of a consistency model", "samples_*0.png", np.s_[:2]),
    "simsiam": ("images, their nearest in its features", "samples_*.png", np.s_[::2, :5]),
    "representation_dynamics": ("a sample, its nearest image", "*_nearest.png", np.s_[:2]),
    "balanced_representation": ("samples", "sample.png", np.s_[:2]),
    "va_vae": ("samples of an aligned latent", "samples_*.png", np.s_[:, 4]),
    "repa": ("samples of an aligned denoiser", "samples_*.png", np.s_[:, 0]),
    "rae": ("samples in the encoder's space", "samples_*.png", np.s_[:, 4]),
    "vjepa_guidance": ("best of eight, guided", "samples_*.png", np.s_[4]),
    "moe_subspace": ("samples of small experts", "samples_*.png", np.s_[:, 0]),
    "ddpm_xpred": ("samples, x-prediction", "samples_*.png", np.s_[:, 0]),
    "self_refine": ("frames of a refined video", "samples_*.png", np.s_[8]),
}


def main():
    picture = Image.new("RGB", (LABEL + TILE * COLUMNS, TILE * len(ROWS)), "white")
    draw = ImageDraw.Draw(picture)
    for i, (script, (words, pattern, chosen)) in enumerate(ROWS.items()):
        found = sorted((ROOT / "runs" / script).glob(pattern))
        if not found:
            fail(f"no {pattern} in runs/{script}: see the commands in {Path(__file__).name}")
        source = np.asarray(Image.open(found[-1]))
        rows, columns = (n // TILE for n in source.shape[:2])
        tiles = source.reshape(rows, TILE, columns, TILE, 3).swapaxes(1, 2)[chosen]
        tiles = tiles.reshape(-1, TILE, TILE, 3)[:COLUMNS]
        strip = Image.fromarray(tiles.swapaxes(0, 1).reshape(TILE, -1, 3))
        picture.paste(strip, (LABEL, i * TILE))
        draw.text((4, i * TILE + 16), f"{script}.py", "black", font_size=16)
        draw.text((4, i * TILE + 36), words, "dimgray", font_size=13)
    picture.quantize(method=Image.Quantize.FASTOCTREE).save(ROOT / "assets/gallery.png")


if __name__ == "__main__":
    main()
