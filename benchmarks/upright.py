"""How many images that a universal GAN draws stand upright, beside the test images.

    python -m benchmarks.upright --run RUN --data DATA

An image is upright where the mean of the train images, of all the four quarter turns of that mean, is nearest to it (in
the signs of `raresynth.dataset.symmetries`). RUN has got as far as `pretrain`. Chance makes it a quarter of the images.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.gan_series import Inputs
from raresynth import flow
from raresynth.dataset.manifest import read_manifest
from raresynth.dataset.probe import perceptual_hash
from raresynth.dataset.symmetries import changed, signs_of
from raresynth.gan.sampling import generate, load_generator

DRAWN = 400


def signs(images: Iterable[Image.Image]) -> np.ndarray:
    return signs_of([perceptual_hash(image) for image in images])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    manifest = read_manifest(Inputs(args.run, args.data).manifest)
    universal = args.run / flow.read_record(args.run, "pretrain").output

    def split(name: str) -> np.ndarray:
        return signs(Image.open(args.data / path) for path in manifest["path"][manifest["split"] == name])

    means = [split("train").mean(0, keepdims=True)]
    for _ in range(3):
        means.append(changed(means[-1], "quarter_turn"))

    def upright(images: np.ndarray) -> str:
        nearest = np.einsum("nuv,tuv->nt", images, np.concatenate(means)).argmax(1)
        return f"{(nearest == 0).mean():.0%} of {len(images)}"

    print(f"test images: {upright(split('test'))}")
    for label in sorted(manifest["label"].unique()):
        generator, _ = load_generator(universal, "cpu", label)
        drawn = generate(generator, 0, range(DRAWN))
        print(f"drawn as {label}: {upright(signs(Image.fromarray(image) for image in drawn))}")


if __name__ == "__main__":
    main()
