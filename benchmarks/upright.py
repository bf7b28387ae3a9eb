"""How many images that a universal GAN draws stand upright, and how many have a colour, beside the test images.

    python -m benchmarks.upright --run RUN --data DATA

An image is upright where the mean of the train images, of all the four quarter turns of that mean, is nearest to it (in
the signs of `raresynth.dataset.symmetries`). Chance makes it a quarter of the images. Coloured are those of which more
than one pixel in a hundred is. RUN has got as far as `pretrain`, or `--universal` names a folder that pretrain left.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.gan_series import Inputs
from raresynth import flow
from raresynth.dataset.images import Pixels, load_images
from raresynth.dataset.manifest import read_manifest
from raresynth.dataset.probe import perceptual_hash
from raresynth.dataset.symmetries import changed, signs_of
from raresynth.gan.sampling import generate, load_generator
from raresynth.lineage import load_checkpoint

DRAWN = 400
COLOURED = 8
"""From here on apart, of 255, a pixel's channels are a colour that is seen."""


def signs(images: Pixels) -> np.ndarray:
    return signs_of([perceptual_hash(Image.fromarray(image)) for image in images])


def coloured(images: Pixels) -> str:
    spread = images.max(3).astype(int) - images.min(3)
    return f"{((spread > COLOURED).mean((1, 2)) > 0.01).mean():.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--universal", type=Path)
    args = parser.parse_args()
    inputs = Inputs(args.run, args.data)
    manifest = read_manifest(inputs.manifest)
    universal = args.universal or args.run / flow.read_record(args.run, "pretrain").output
    resolution = load_checkpoint(universal)[1]["architecture"]["resolution"]

    def split(name: str) -> Pixels:
        return load_images(manifest[manifest["split"] == name], args.data, resolution, inputs.packed)

    means = [signs(split("train")).mean(0, keepdims=True)]
    for _ in range(3):
        means.append(changed(means[-1], "quarter_turn"))

    def told(images: Pixels) -> str:
        nearest = np.einsum("nuv,tuv->nt", signs(images), np.concatenate(means)).argmax(1)
        return f"{(nearest == 0).mean():.0%} upright, {coloured(images)} coloured, of {len(images)}"

    print(f"test images: {told(split('test'))}")
    for label in sorted(manifest["label"].unique()):
        generator, _ = load_generator(universal, "cpu", label)
        print(f"drawn as {label}: {told(generate(generator, 0, range(DRAWN)))}")


if __name__ == "__main__":
    main()
