"""FID beside FD, on pytorch-fid's Inception network, for figures that other publications can be compared with."""

import hashlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from raresynth.dataset.images import Pixels
from raresynth.errors import CheckpointError
from raresynth.lineage import sha256_file
from raresynth.progress import progress
from raresynth.quality.distances import frechet_distance
from raresynth.quality.reports import Fid

BATCH = 32
DOWNLOAD_TIMEOUT_S = 30.0


class WeightsUnavailable(CheckpointError):
    """The Inception weights cannot be fetched; figures can do without."""


def find_weights(source: str) -> tuple[Path, str]:
    """The weights file and its SHA-256.

    Args:
        source: a file's path, or "auto": pytorch-fid's file from torch's cache, fetched first if it is not there. Its
            name carries the start of its hash, which is checked.

    Raises:
        WeightsUnavailable: "auto", but there is no network.
        CheckpointError: there is no such file, or it is not the one its name says.
    """
    if source != "auto":
        path = Path(source)
        if not path.is_file():
            raise CheckpointError(f"no Inception weights at {path}; set quality.inception to a file, auto or none")
        return path, sha256_file(path)
    from pytorch_fid.inception import FID_WEIGHTS_URL

    path = Path(torch.hub.get_dir()) / "checkpoints" / FID_WEIGHTS_URL.rsplit("/", 1)[1]
    prefix = path.stem.rsplit("-", 1)[1]
    if not path.is_file():
        _fetch(FID_WEIGHTS_URL, path, prefix)
    digest = sha256_file(path)
    if not digest.startswith(prefix):
        raise CheckpointError(f"{path} is damaged (its SHA-256 does not start with {prefix}); delete it and try again")
    return path, digest


def _fetch(url: str, path: Path, prefix: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix, progress=False)
    except (URLError, OSError, RuntimeError) as error:
        raise WeightsUnavailable(f"the Inception weights could not be fetched ({error})") from error
    finally:
        socket.setdefaulttimeout(before)


def load_inception(path: Path, sha256: str) -> nn.Module:
    """pytorch-fid's network with the weights of a file of known hash, loaded without running any pickled code.

    Raises:
        CheckpointError: the file changed since it was hashed, or does not fit the network.
    """
    from pytorch_fid import inception as library

    contents = path.read_bytes()
    if hashlib.sha256(contents).hexdigest() != sha256:
        raise CheckpointError(f"{path} changed while it was read; start again once it is complete")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        with _library_loads(library, weights):
            network: nn.Module = library.InceptionV3([library.InceptionV3.DEFAULT_BLOCK_INDEX]).eval()
    except Exception as error:
        raise CheckpointError(f"{path} holds no weights of pytorch-fid's Inception; name another file") from error
    return network


@contextmanager
def _library_loads(library: object, weights: dict[str, Tensor]) -> Iterator[None]:
    """Within the block pytorch-fid takes these weights where it would download its own unchecked."""
    name = "load_state_dict_from_url"
    download = getattr(library, name)
    setattr(library, name, lambda *_, **__: weights)
    try:
        yield
    finally:
        setattr(library, name, download)


def inception_features(network: nn.Module, images: Pixels) -> npt.NDArray[np.float64]:
    """Pool3 features of uint8 images (N, H, W, 3): float64 (N, 2048). The network resizes to 299 x 299."""
    rows = []
    with torch.inference_mode(), progress("inception features", len(images), "images") as advance:
        for start in range(0, len(images), BATCH):
            pixels = torch.from_numpy(np.ascontiguousarray(images[start : start + BATCH])).permute(0, 3, 1, 2)
            rows.append(network(pixels.float() / 255)[0].flatten(1).double().numpy())
            advance(len(pixels))
    return np.concatenate(rows)


def fid(
    source: str,
    real: Pixels,
    fake: Pixels,
    halves: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]],
) -> Fid:
    """FID of all fakes to all reals, and, at equal numbers, of fakes and of one half of the reals to the other half.

    Args:
        source: see `find_weights`.
        real, fake: uint8 (N, S, S, 3), (M, S, S, 3) of one side S.
        halves: two disjoint sets of indices of `real`, which share no group.
    """
    path, sha256 = find_weights(source)
    network = load_inception(path, sha256)
    of_real, of_fake = inception_features(network, real), inception_features(network, fake)
    size = min(len(halves[0]), len(halves[1]), len(of_fake))
    first, second = of_real[halves[0][:size]], of_real[halves[1][:size]]
    return Fid(
        value=frechet_distance(of_real, of_fake),
        n_real=len(of_real),
        n_fake=len(of_fake),
        floor=frechet_distance(first, second),
        value_at_floor=frechet_distance(first, of_fake[:size]),
        n_floor=size,
        weights_sha256=sha256,
    )
