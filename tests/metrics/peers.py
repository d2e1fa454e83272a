"""The metrics beside those of well-known libraries, on the ten pictures of the tests. Installs nothing.

    python -m tests.metrics.peers table [METRIC ...] [PICTURE ...]   how far each library is from ours
    python -m tests.metrics.peers expected                           writes tests/metrics/expected.json

Needs torchvision and those of the libraries that are to be seen; what is missing is named. Of basicsr the
unpacked source package on PYTHONPATH is enough. Weights come from the cache, where `hitsr-fast weights lpips
dists niqe` puts them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hitsr_fast.metrics import METRICS, folders, imresize
from hitsr_fast.metrics.sources import SOURCES
from tests.metrics import pictures, stand_ins, thumbnails

EXPECTED = Path(__file__).parent / "expected.json"
Measure = Callable[[Tensor, Tensor], float]


class Peer(NamedTuple):
    """One metric of one library, on a result and its truth, `(1, 3, H, W)` in [0, 1]."""

    metric: str  # ours that it is compared with
    library: str
    call: str  # how the library is asked
    make: Callable[[], Measure]
    border: int = 0
    of_truths: bool = False  # a metric of single pictures: of the truths, in place of the results


def official() -> dict[str, Tensor]:
    """The weights in the cache, under the names that the files have."""
    files = ((name, source.load(source.path)) for name, source in SOURCES.items())
    return {f"{name}.{key}": value for name, tensors in files for key, value in tensors.items()}


def unofficial() -> dict[str, Tensor]:
    """The stand-ins, so named."""
    return {
        **{f"lpips.{key}": value for key, value in stand_ins.vgg().items()},
        **{f"dists.{key}": value for key, value in stand_ins.dists_heads().items()},
        **{f"niqe.{key}": value for key, value in stand_ins.niqe_parameters().items()},
    }


@contextlib.contextmanager
def torchvision_with(weights: dict[str, Tensor]) -> Iterator[None]:
    """torchvision's networks have these convolutions, and download nothing."""
    models = importlib.import_module("torchvision.models")

    def network(name: str, net: str) -> Callable[..., torch.nn.Module]:
        make = getattr(models, name)

        def made(*_: object, **__: object) -> torch.nn.Module:
            with torch.device("meta"):
                module: torch.nn.Module = make(weights=None)
            convs = [layer for layer in module.features if isinstance(layer, torch.nn.Conv2d)]
            start = f"lpips.{net}.convs."
            names = [
                key.removesuffix(".weight") for key in weights if key.startswith(start) and "weight" in key
            ]
            for layer, key in zip(convs, sorted(names), strict=True):
                layer.weight = torch.nn.Parameter(weights[f"{key}.weight"], requires_grad=False)
                layer.bias = torch.nn.Parameter(weights[f"{key}.bias"], requires_grad=False)
            return module

        return made

    with (
        mock.patch.object(models, "vgg16", network("vgg16", "vgg")),
        mock.patch.object(models, "alexnet", network("alexnet", "alex")),
    ):
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries print when they are set up."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def basicsr(module: str) -> Any:
    """A module of basicsr without its `__init__`, which needs much and breaks with today's torchvision."""
    spec = importlib.util.find_spec("basicsr")
    if spec is None or spec.origin is None:
        raise ImportError("basicsr is not on the path")
    folder = Path(spec.origin).parent
    if not isinstance(sys.modules.get("basicsr"), types.ModuleType) or "basicsr.utils" not in sys.modules:
        for name in ("basicsr", "basicsr.utils", "basicsr.metrics"):
            package = types.ModuleType(name)
            package.__path__ = [str(folder.parent / name.replace(".", "/"))]
            package.__spec__ = spec if name == "basicsr" else None
            sys.modules[name] = package
        colours = importlib.import_module("basicsr.utils.color_util")
        sys.modules["basicsr.utils"].bgr2ycbcr = colours.bgr2ycbcr  # type: ignore[attr-defined]
    return importlib.import_module(f"basicsr.metrics.{module}")


def bgr(image: Tensor) -> Any:
    """As cv2 reads it."""
    return (image[0] * 255).round().byte().permute(1, 2, 0).flip(2).numpy()


def rgb(image: Tensor) -> Any:
    return (image[0] * 255).round().byte().permute(1, 2, 0).numpy()


def basicsr_pair(function: str, y: bool, border: int) -> Measure:
    measure = getattr(basicsr("psnr_ssim"), function)
    return lambda a, b: measure(bgr(a), bgr(b), border, test_y_channel=y)


def basicsr_niqe(weights: dict[str, Tensor], border: int, *, exact: bool = False) -> Measure:
    """exact: the half-size picture from sums in float64, in place of those in float32."""
    module = basicsr("niqe")
    arrays = {
        "mu_pris_param": weights["niqe.mean"].numpy()[None],
        "cov_pris_param": weights["niqe.covariance"].numpy(),
        "gaussian_window": weights["niqe.window"].numpy(),
    }

    own = module.imresize

    def in_float64(image: Any, scale: float, antialiasing: bool) -> Any:
        return imresize(torch.from_numpy(image).double(), scale).float().numpy()

    def measure(a: Tensor, _: Tensor) -> float:
        load = mock.patch.object(module.np, "load", lambda _: arrays)
        with load, mock.patch.object(module, "imresize", in_float64 if exact else own), quiet():
            return float(module.calculate_niqe(bgr(a), border))

    return measure


def skimage_pair(function: str, **options: object) -> Measure:
    module = importlib.import_module("skimage.metrics")
    return lambda a, b: float(getattr(module, function)(rgb(b), rgb(a), **options))


def torchmetrics_pair(function: str, **options: object) -> Measure:
    measure = getattr(importlib.import_module("torchmetrics.functional.image"), function)
    return lambda a, b: float(measure(a, b, **options))


def piq_pair(name: str, **options: object) -> Measure:
    measure = getattr(importlib.import_module("piq"), name)
    return lambda a, b: float(measure(a, b, **options))


def piq_module(name: str, weights: dict[str, Tensor]) -> Measure:
    heads: object = [weights[f"lpips.vgg.heads.{stage}"].view(1, -1, 1, 1) for stage in range(5)]
    if name == "DISTS":
        heads = {key: weights[f"dists.{key}"].view(1, -1, 1, 1) for key in ("alpha", "beta")}
    with mock.patch("torch.hub.load_state_dict_from_url", lambda *_, **__: heads), torchvision_with(weights):
        perceptual = importlib.reload(importlib.import_module("piq.perceptual"))
        with quiet():
            module = getattr(perceptual, name)()
    return lambda a, b: float(module(a, b))


def lpips_module(net: str, weights: dict[str, Tensor]) -> Measure:
    with torchvision_with(weights), quiet():
        module = importlib.import_module("lpips").LPIPS(net=net, verbose=False)
    return lambda a, b: float(module(a, b, normalize=True))


def torchmetrics_lpips(net: str, weights: dict[str, Tensor]) -> Measure:
    with torchvision_with(weights), quiet():
        name = "torchmetrics.image.lpip"
        module = importlib.import_module(name).LearnedPerceptualImagePatchSimilarity(net, normalize=True)

    def measure(a: Tensor, b: Tensor) -> float:
        module.reset()
        return float(module(a, b))

    return measure


def torchmetrics_dists(weights: dict[str, Tensor]) -> Measure:
    with torchvision_with(weights), quiet():
        module = importlib.reload(importlib.import_module("torchmetrics.functional.image.dists"))
        network = module.DISTSNetwork(load_weights=True)
    return lambda a, b: float(network(a, b))


def dists_module(weights: dict[str, Tensor]) -> Measure:
    with torchvision_with(weights), quiet():
        module = importlib.import_module("DISTS_pytorch").DISTS(load_weights=False)
    module.alpha.data = weights["dists.alpha"].view(1, -1, 1, 1)
    module.beta.data = weights["dists.beta"].view(1, -1, 1, 1)
    return lambda a, b: float(module(a, b))


def pyiqa_metric(name: str, weights: dict[str, Tensor], **options: object) -> Measure:
    logging.disable(logging.INFO)
    module = importlib.import_module("pyiqa")
    with tempfile.TemporaryDirectory() as folder, torchvision_with(weights), quiet():
        path = Path(folder) / "weights"
        if name.startswith("lpips"):
            net = "vgg" if name.endswith("vgg") else "alex"
            heads = {
                f"lin{i}.model.1.weight": weights[f"lpips.{net}.heads.{i}"].view(1, -1, 1, 1)
                for i in range(5)
            }
            torch.save(heads, path)
        elif name == "dists":
            torch.save({key: weights[f"dists.{key}"].view(1, -1, 1, 1) for key in ("alpha", "beta")}, path)
        elif name == "niqe":
            path = path.with_suffix(".mat")
            found = {"mu_prisparam": weights["niqe.mean"].numpy()[None]}
            found["cov_prisparam"] = weights["niqe.covariance"].numpy()
            importlib.import_module("scipy.io").savemat(path, found)
        if path.is_file():
            options["pretrained_model_path"] = str(path)
        metric = module.create_metric(name, device=torch.device("cpu"), **options)
    if name == "niqe":
        return lambda a, _: float(metric(a))
    return lambda a, b: float(metric(a, b))


def peers(weights: dict[str, Tensor]) -> list[Peer]:
    gauss = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    colour = {**gauss, "channel_axis": 2}
    found = [
        Peer("psnr_y", "basicsr", "calculate_psnr(crop_border=4, test_y_channel=True)",
             lambda: basicsr_pair("calculate_psnr", True, 4), 4),
        Peer("psnr_y", "pyiqa", "psnry", lambda: pyiqa_metric("psnry", weights)),
        Peer("psnr_y", "pyiqa", "psnry(color_space='ycbcr')",
             lambda: pyiqa_metric("psnry", weights, color_space="ycbcr")),
        Peer("psnr_rgb", "basicsr", "calculate_psnr(crop_border=4)",
             lambda: basicsr_pair("calculate_psnr", False, 4), 4),
        Peer("psnr_rgb", "scikit-image", "peak_signal_noise_ratio",
             lambda: skimage_pair("peak_signal_noise_ratio", data_range=255)),
        Peer("psnr_rgb", "torchmetrics", "peak_signal_noise_ratio(data_range=1.0)",
             lambda: torchmetrics_pair("peak_signal_noise_ratio", data_range=1.0)),
        Peer("psnr_rgb", "piq", "psnr", lambda: piq_pair("psnr")),
        Peer("psnr_rgb", "pyiqa", "psnr", lambda: pyiqa_metric("psnr", weights)),
        Peer("ssim_y", "basicsr", "calculate_ssim(crop_border=4, test_y_channel=True)",
             lambda: basicsr_pair("calculate_ssim", True, 4), 4),
        Peer("ssim_y", "pyiqa", "ssim", lambda: pyiqa_metric("ssim", weights)),
        Peer("ssim_y", "pyiqa", "ssim(color_space='ycbcr')",
             lambda: pyiqa_metric("ssim", weights, color_space="ycbcr")),
        Peer("ssim_rgb", "basicsr", "calculate_ssim(crop_border=4)",
             lambda: basicsr_pair("calculate_ssim", False, 4), 4),
        Peer("ssim_rgb", "scikit-image", "structural_similarity, Gaussian, sigma 1.5, no sample covariance",
             lambda: skimage_pair("structural_similarity", **colour)),
        Peer("ssim_rgb", "scikit-image", "structural_similarity as it is",
             lambda: skimage_pair("structural_similarity", channel_axis=2, data_range=255)),
        Peer("ssim_rgb", "torchmetrics", "structural_similarity_index_measure(data_range=1.0)",
             lambda: torchmetrics_pair("structural_similarity_index_measure", data_range=1.0)),
        Peer("ssim_rgb", "piq", "ssim", lambda: piq_pair("ssim")),
        Peer("ssim_rgb", "piq", "ssim(downsample=False)", lambda: piq_pair("ssim", downsample=False)),
        Peer("ssim_rgb", "pyiqa", "ssimc", lambda: pyiqa_metric("ssimc", weights)),
        Peer("lpips", "lpips", "LPIPS(net='alex')", lambda: lpips_module("alex", weights)),
        Peer("lpips", "torchmetrics", "LearnedPerceptualImagePatchSimilarity('alex')",
             lambda: torchmetrics_lpips("alex", weights)),
        Peer("lpips", "pyiqa", "lpips", lambda: pyiqa_metric("lpips", weights)),
        Peer("lpips_vgg", "lpips", "LPIPS(net='vgg')", lambda: lpips_module("vgg", weights)),
        Peer("lpips_vgg", "piq", "LPIPS()", lambda: piq_module("LPIPS", weights)),
        Peer("lpips_vgg", "pyiqa", "lpips-vgg", lambda: pyiqa_metric("lpips-vgg", weights)),
        Peer("dists", "DISTS_pytorch", "DISTS()", lambda: dists_module(weights)),
        Peer("dists", "torchmetrics", "DISTSNetwork()", lambda: torchmetrics_dists(weights)),
        Peer("dists", "piq", "DISTS()", lambda: piq_module("DISTS", weights)),
        Peer("dists", "pyiqa", "dists", lambda: pyiqa_metric("dists", weights)),
        Peer("niqe", "basicsr", "calculate_niqe(crop_border=0), truths",
             lambda: basicsr_niqe(weights, 0), 0, True),
        Peer("niqe", "basicsr", "calculate_niqe(crop_border=4), truths",
             lambda: basicsr_niqe(weights, 4), 4, True),
        Peer("niqe", "basicsr", "calculate_niqe(crop_border=0), results", lambda: basicsr_niqe(weights, 0)),
        Peer("niqe", "basicsr", "calculate_niqe(crop_border=0), truths, resize in float64",
             lambda: basicsr_niqe(weights, 0, exact=True), 0, True),
        Peer("niqe", "basicsr", "calculate_niqe(crop_border=0), results, resize in float64",
             lambda: basicsr_niqe(weights, 0, exact=True)),
        Peer("niqe", "pyiqa", "niqe", lambda: pyiqa_metric("niqe", weights)),
        Peer("niqe", "pyiqa", "niqe(color_space='ycbcr')",
             lambda: pyiqa_metric("niqe", weights, color_space="ycbcr")),
    ]  # fmt: skip
    return found


def ours(peer: Peer, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[float | None]:
    """Of each pair; None where it is too small for us."""
    metric, found = METRICS[peer.metric], []
    for result, truth in pairs:
        images = (result, truth) if metric.kind == "full" else (result,)
        try:
            found.append(metric.measure(*images, peer.border).item())
        except ValueError:
            found.append(None)
    return found


def largest_difference(
    peer: Peer, measure: Measure, pairs: Sequence[tuple[Tensor, Tensor]], values: Sequence[float | None]
) -> str:
    """Over all pairs that we measure; how many of them the library refuses is said."""
    differences, refused = [], 0
    for (result, truth), value in zip(pairs, values, strict=True):
        if value is None:
            continue
        try:
            with quiet():
                differences.append(abs(measure(result, truth) - value))
        except (ValueError, RuntimeError, AssertionError) as error:
            print(f"{peer.library} {peer.call} on {tuple(result.shape)}: {error}", file=sys.stderr)
            refused += 1
    if not differences:
        return "-" if not refused else "refuses all"
    found = f"{max(differences):.2g}"
    return found if not refused else f"{found} (refuses {refused} of {len(differences) + refused})"


def table(names: Sequence[str], paths: Sequence[Path]) -> None:
    """Print how far each library is from us, in its own unit, at most over the pictures."""
    whole = [(pictures.spoiled(i), pictures.picture(i)) for i in range(10)]
    corners = [(pictures.small(a, i), pictures.small(b, i)) for i, (a, b) in enumerate(whole)]
    photos = []
    for path in paths:
        with Image.open(path) as opened:
            photo = opened.convert("RGB")
        quarter = photo.resize((photo.width // 4, photo.height // 4), Image.Resampling.BICUBIC)
        blurred = quarter.resize(photo.size, Image.Resampling.BICUBIC)
        photos.append((np.array(blurred), np.array(photo)))
    sets = [
        [(pictures.to_tensor(a), pictures.to_tensor(b)) for a, b in pairs]
        for pairs in (whole, corners, photos)
    ]
    weights = official()
    print("| metric | library | call | ten pictures | small ones | photographs |")
    print("| --- | --- | --- | --- | --- | --- |")
    known: dict[tuple[str, int, bool], list[list[float | None]]] = {}
    for peer in peers(weights):
        if names and peer.metric not in names:
            continue
        try:
            measure = peer.make()
        except ImportError as error:
            print(f"{peer.library}: {error}", file=sys.stderr)
            continue
        shown = [[(b, b) for _, b in pairs] for pairs in sets] if peer.of_truths else sets
        key = (peer.metric, peer.border, peer.of_truths)
        known[key] = known.get(key) or [ours(peer, pairs) for pairs in shown]
        columns = [largest_difference(peer, measure, *both) for both in zip(shown, known[key], strict=True)]
        version = "1.4.2" if peer.library == "basicsr" else importlib.metadata.version(peer.library)
        cells = (peer.metric, f"{peer.library} {version}", f"`{peer.call}`", *columns)
        print(f"| {' | '.join(cells)} |", flush=True)
    if not names or {"fid", "kid"} & set(names):
        fidelity()


def fidelity() -> None:
    """FID and KID of the ten pictures: our call, and torch-fidelity's own."""
    if folders.missing():
        print(folders.missing(), file=sys.stderr)
        return
    package = importlib.import_module("torch_fidelity")
    with tempfile.TemporaryDirectory() as folder:
        both = []
        for name, make in (("results", pictures.spoiled), ("truths", pictures.picture)):
            both.append(Path(folder) / name)
            both[-1].mkdir()
            for index in range(10):
                Image.fromarray(make(index)).save(both[-1] / f"{index}.png")
        arguments = {
            "feature_extractor": thumbnails.register(),
            "cuda": False,
            "batch_size": 1,
            "cache": False,
        }
        inputs = {"input1": str(both[0]), "input2": str(both[1]), "verbose": False}
        direct = package.calculate_metrics(**inputs, **arguments, fid=True, kid=True, kid_subset_size=10)
        values = {
            "frechet_inception_distance": folders.fid(*both, **arguments),
            "kernel_inception_distance_mean": folders.kid(*both, **arguments),
        }
    version = importlib.metadata.version("torch-fidelity")
    for (key, value), metric in zip(values.items(), ("fid", "kid"), strict=True):
        difference = abs(value - direct[key])
        call = f"`calculate_metrics`: {value:.6g}"
        print(f"| {metric} | torch-fidelity {version} | {call} | {difference:.1g} | - | - |")


def expected() -> None:
    """Write what the public implementations give, for the tests."""
    weights, stands = official(), unofficial()
    dists, dists_stand_in = dists_module(weights), dists_module(stands)
    niqe, niqe_stand_in = basicsr_niqe(weights, 0), basicsr_niqe(stands, 0)
    exact = basicsr_niqe(stands, 0, exact=True)
    found: list[dict[str, Any]] = []
    for index in range(10):
        images = pictures.picture(index), pictures.spoiled(index)
        truth, result = map(pictures.to_tensor, images)
        corners = [pictures.to_tensor(pictures.small(image, index)) for image in images]
        found.append(
            {
                "size": list(images[0].shape[:2]),
                "truth": pictures.digest(images[0]),
                "result": pictures.digest(images[1]),
                "dists": round(dists(result, truth), 7),
                "dists_stand_in": round(dists_stand_in(corners[1], corners[0]), 7),
                "niqe": [round(niqe(image, image), 6) for image in (truth, result)],
                "niqe_stand_in": [round(niqe_stand_in(image, image), 6) for image in (truth, result)],
                "niqe_stand_in_float64": [round(exact(image, image), 6) for image in (truth, result)],
            }
        )
    image = pictures.to_tensor(pictures.picture(4))
    found[4]["niqe_stand_in_border_4"] = round(basicsr_niqe(stands, 4)(image, image), 6)
    libraries = {
        name: importlib.metadata.version(name) for name in ("DISTS_pytorch", "torch", "numpy", "scipy")
    }
    content = {
        "command": "python -m tests.metrics.peers expected",
        "versions": {"basicsr": "1.4.2", **libraries},
        "pictures": found,
    }
    EXPECTED.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    with torch.inference_mode():
        if sys.argv[1:2] == ["expected"]:
            expected()
        elif sys.argv[1:2] == ["table"]:
            names = [argument for argument in sys.argv[2:] if argument in METRICS]
            table(names, [Path(argument) for argument in sys.argv[2:] if argument not in METRICS])
        else:
            sys.exit(__doc__)
