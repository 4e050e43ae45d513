"""Masks: the built-in cut-out against true masks, ONNX networks made here, and what is said when nothing is found."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from conrad_engine.config import PictureConfig
from conrad_engine.errors import InputError, MissingDependency
from conrad_engine.preprocess import matting
from conrad_engine.preprocess.cutout import cut_out, fit_backdrop, soften
from conrad_engine.preprocess.foreground import clean_rim, estimate_foreground, object_colors, spread
from conrad_engine.preprocess.saliency import border_saliency

PICTURES = Path(__file__).parent / "pictures"
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))


def load(name: str, side: int = 512) -> np.ndarray:
    image = Image.open(PICTURES / name)
    image.thumbnail((side, side), Image.Resampling.BOX)
    return np.asarray(image, np.float32) / 255


def iou(found: np.ndarray, truth: np.ndarray) -> float:
    found, truth = found > 0.5, truth > 0.5
    return float((found & truth).sum() / (found | truth).sum())


def over(rgba: np.ndarray, backdrop: np.ndarray) -> np.ndarray:
    return (rgba[..., :3] * rgba[..., 3:] + backdrop * (1 - rgba[..., 3:])).astype(np.float32)


def gradient(shape: tuple[int, ...]) -> np.ndarray:
    v, u = np.mgrid[0 : 1 : shape[0] * 1j, 0 : 1 : shape[1] * 1j]
    return np.stack([0.62 + 0.25 * v, 0.66 + 0.2 * v - 0.05 * u, 0.75 + 0.15 * v], -1)


@pytest.mark.parametrize("backdrop", ["white", "gray", "gradient", "noisy", "shadow"])
@pytest.mark.parametrize("name", ["robot.png", "chair.webp"])
def test_plain_backdrops_give_nearly_true_masks(name: str, backdrop: str) -> None:
    rgba = load(name)
    shape = rgba.shape[:2] + (1,)
    ground = {"white": np.ones(shape), "gray": np.full(shape, 0.78)}.get(backdrop, gradient(rgba.shape))
    if backdrop == "noisy":
        ground = ground + np.random.default_rng(0).normal(0, 0.012, rgba.shape[:2] + (3,))
    if backdrop == "shadow":
        blob = np.zeros(rgba.shape[:2], np.float32)
        cv2.ellipse(blob, (300, 470), (110, 25), 0, 0, 360, 1, -1)
        ground = ground * (1 - 0.35 * cv2.GaussianBlur(blob, (0, 0), 12))[..., None]
    mask, how = cut_out(over(rgba, ground).clip(0, 1))
    assert how == "backdrop"
    assert iou(mask, rgba[..., 3]) > 0.97
    assert np.abs(mask - rgba[..., 3]).mean() < 0.008


def test_holes_that_show_the_backdrop_stay_open() -> None:
    rgba = load("chair.webp")
    mask, _ = cut_out(over(rgba, np.ones((1, 1, 3))))
    closed = cv2.morphologyEx((rgba[..., 3] > 0.5).astype(np.uint8), cv2.MORPH_CLOSE, np.ones((31, 31), np.uint8))
    between_slats = (closed > 0) & (rgba[..., 3] < 0.01)
    assert between_slats.sum() > 3000 and (mask[between_slats] < 0.5).mean() > 0.95


@pytest.mark.parametrize(
    "name, how, least", [("camera", "backdrop", 0.95), ("truck", "grabcut", 0.65), ("lighthouse", "grabcut", 0.65)]
)
def test_shipped_photos_against_their_true_masks(name: str, how: str, least: float) -> None:
    """The floors are what color alone reaches here: the busy ones lose parts that look like their surroundings."""
    mask, found_by = cut_out(load(f"{name}.jpg"))
    assert found_by == how
    assert iou(mask, load(f"{name}.mask.png")) > least


def test_backdrop_fit_ignores_an_object_at_the_border() -> None:
    lab = cv2.cvtColor(gradient((120, 100)).astype(np.float32), cv2.COLOR_RGB2LAB)
    touched = lab.copy()
    touched[90:, 30:60] = [30, 40, 20]
    field, noise = fit_backdrop(touched)
    assert field is not None and np.abs(field - lab).max() < 1 and noise < 0.5
    assert fit_backdrop(np.random.default_rng(0).uniform(0, 100, (80, 80, 3)).astype(np.float32))[0] is None


def test_saliency_of_a_patch_on_a_plain_ground() -> None:
    rgb = np.full((90, 120, 3), 0.4, np.float32)
    rgb[30:60, 40:80] = [0.9, 0.2, 0.1]
    saliency = border_saliency(cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB))
    assert saliency[35:55, 45:75].min() > 0.8 and saliency[:20].max() < 0.2
    assert (border_saliency(np.full((40, 40, 3), 50, np.float32)) == 0).all()


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_picture_without_an_object_is_refused(value: float) -> None:
    with pytest.raises(InputError, match="no object stands out"):
        cut_out(np.full((60, 80, 3), value, np.float32))


def test_soft_edge_recovers_the_true_alpha() -> None:
    v, u = np.mgrid[:200, :200] + 0.5
    alpha = ((70.3 - np.hypot(u - 100, v - 97)) + 0.5).clip(0, 1).astype(np.float32)[..., None]
    picture = (alpha * [0.9, 0.3, 0.1] + (1 - alpha) * [0.1, 0.4, 0.6]).astype(np.float32)
    mask = soften(picture, alpha[..., 0] > 0.5)
    assert np.abs(mask - alpha[..., 0]).max() < 0.06


def test_foreground_colors_do_not_hold_the_background() -> None:
    v, u = np.mgrid[:160, :160] + 0.5
    alpha = ((50 - np.hypot(u - 80, v - 80)) / 4 + 0.5).clip(0, 1).astype(np.float32)
    own = np.stack([0.7 + 0.2 * np.sin(u / 9), 0.25 + 0 * u, 0.2 + 0.1 * np.cos(v / 7)], -1).astype(np.float32)
    picture = (alpha[..., None] * own + (1 - alpha[..., None]) * [0.1, 0.9, 0.2]).astype(np.float32)
    colors = object_colors(estimate_foreground(picture, alpha)[0], alpha)
    rim = (alpha > 0.05) & (alpha < 0.95)
    assert np.abs(picture - own)[rim].mean() > 0.2 and np.abs(colors - own)[rim].mean() < 0.06
    beyond = (np.hypot(u - 80, v - 80) > 53) & (np.hypot(u - 80, v - 80) < 58)
    assert np.abs(colors[..., 1] - 0.25)[beyond].max() < 0.1, "beyond the rim the object's color goes on"
    np.testing.assert_allclose(colors[alpha == 1], own[alpha == 1], atol=1e-5)


@pytest.mark.parametrize("hidden", ["own", "background", "white", "black"])
def test_rim_of_cut_outs_is_cleaned_only_if_it_holds_a_mixture(hidden: str) -> None:
    v, u = np.mgrid[:160, :160] + 0.5
    alpha = ((50 - np.hypot(u - 80, v - 80)) / 4 + 0.5).clip(0, 1).astype(np.float32)
    own = np.stack([0.7 + 0.02 * np.sin(u / 9), 0.3 + 0 * u, 0.5 + 0 * u], -1).astype(np.float32)
    colors = {"own": [0, 0, 0], "background": [0.1, 0.9, 0.2], "white": [1, 1, 1], "black": [0, 0, 0]}
    mixture = alpha[..., None] * own + (1 - alpha[..., None]) * colors[hidden]
    stored = np.where(alpha[..., None] > 0, own if hidden == "own" else mixture, 0)
    stored = mixture if hidden == "background" else stored
    cleaned = clean_rim(stored.astype(np.float32), alpha)
    rim = (alpha > 0.3) & (alpha < 0.9)
    if hidden == "own":
        np.testing.assert_array_equal(cleaned, stored.astype(np.float32))
    else:
        assert np.abs(cleaned - own)[rim].mean() < 0.3 * np.abs(stored - own)[rim].mean()


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (33, 50), (64, 64)])
def test_spread_keeps_what_is_known_and_fills_the_rest(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    rgb = rng.uniform(size=(*shape, 3)).astype(np.float32)
    weight = (rng.uniform(size=shape) < 0.2).astype(np.float32)
    weight[0, 0] = 1
    filled = spread(rgb, weight)
    np.testing.assert_allclose(filled[weight == 1], rgb[weight == 1], atol=1e-6)
    known = rgb[weight == 1]
    assert (filled >= known.min(0) - 1e-4).all() and (filled <= known.max(0) + 1e-4).all()


def test_backends_that_are_not_there_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rgb = np.zeros((32, 32, 3), np.float32)
    with pytest.raises(InputError, match="needs a picture with transparency"):
        matting.matte(rgb, PictureConfig(matting="alpha"))
    monkeypatch.setenv("U2NET_HOME", str(tmp_path))
    monkeypatch.setattr(matting, "has_rembg", lambda: True)
    with pytest.raises(MissingDependency, match="rembg has no model on this machine and none is downloaded"):
        matting.matte(rgb, PictureConfig(matting="rembg"))
    monkeypatch.setattr(matting, "has_rembg", lambda: False)
    with pytest.raises(MissingDependency, match=r"pip install 'conrad-engine\[matting\]'"):
        matting.matte(rgb, PictureConfig(matting="rembg"))


@pytest.mark.parametrize("place", ["u2net.onnx", "models/isnet-general-use/isnet-general-use.onnx"])
def test_rembg_models_are_found_in_old_and_new_places(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    monkeypatch.setenv("U2NET_HOME", str(tmp_path))
    assert matting.rembg_model() is None
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).touch()
    assert matting.rembg_model() == tmp_path / place


def write_network(path: Path, side: int | str, gain: float = 1.0, offset: float = 0.0) -> None:
    """An ONNX network that answers gain * (red - green) + offset of its normalized input."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.array([gain, -gain, 0], np.float32).reshape(1, 3, 1, 1)
    entry = helper.make_tensor_value_info("picture", TensorProto.FLOAT, [1, 3, side, side])
    answer = helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1, 1, side, side])
    constants = [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(np.float32([offset]), "b")]
    graph = helper.make_graph(
        [helper.make_node("Conv", ["picture", "w", "b"], ["mask"])], "tiny", [entry], [answer], constants
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, path)


@pytest.mark.skipif(not HAS_ONNX, reason="needs onnx and onnxruntime")
@pytest.mark.parametrize("side", [320, 512, "free"])
@pytest.mark.parametrize("name", ["u2net", "isnet"])
def test_onnx_networks_of_any_size_give_a_mask_of_the_pictures_size(tmp_path: Path, side: int | str, name: str) -> None:
    path = tmp_path / f"{name}.onnx"
    write_network(path, side, gain=4.0, offset=-1.0)
    rgb = np.full((120, 200, 3), 0.5, np.float32)
    rgb[40:80, 60:140] = [0.9, 0.1, 0.5]
    mask, how = matting.matte(rgb, PictureConfig(matting="onnx", matting_model=str(path)))
    truth = (rgb[..., 0] > 0.7).astype(np.float32)
    assert mask.shape == (120, 200) and how == f"onnx {name}.onnx"
    assert iou(mask, truth) > 0.97 and mask.min() == 0 and mask.max() == 1


@pytest.mark.skipif(not HAS_ONNX, reason="needs onnx and onnxruntime")
def test_onnx_input_is_normalized_as_the_network_was_trained() -> None:
    gray = np.full((8, 8, 3), 0.5, np.float32)
    imagenet = matting._network_input(gray, 4, 6, "u2net.onnx")
    assert imagenet.shape == (1, 3, 4, 6) and imagenet.dtype == np.float32
    np.testing.assert_allclose(imagenet[0, :, 0, 0], [0.0655, 0.1964, 0.4178], atol=1e-3)
    np.testing.assert_allclose(matting._network_input(gray, 4, 6, "isnet-general-use.onnx"), 0, atol=1e-6)


@pytest.mark.skipif(not HAS_ONNX, reason="needs onnx and onnxruntime")
def test_onnx_files_that_do_not_fit_give_one_sentence(tmp_path: Path) -> None:
    def error(path: Path | str) -> str:
        with pytest.raises(InputError) as caught:
            matting.onnx_mask(np.full((32, 32, 3), 0.5, np.float32), str(path))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "does not exist" in error(tmp_path / "none.onnx") and "does not exist" in error("")
    (tmp_path / "text.onnx").write_text("no network")
    assert "cannot be used" in error(tmp_path / "text.onnx")
    write_network(tmp_path / "flat.onnx", 64)
    assert "finds no object" in error(tmp_path / "flat.onnx")
    write_network(tmp_path / "nan.onnx", 64, offset=float("nan"))
    assert "not a finite map" in error(tmp_path / "nan.onnx")


@pytest.mark.skipif(not (HAS_ONNX and importlib.util.find_spec("rembg")), reason="needs rembg and onnx")
@pytest.mark.parametrize(
    "place, side", [("u2net.onnx", 320), ("models/isnet-general-use/isnet-general-use.onnx", 1024)]
)
def test_rembg_uses_the_file_at_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str, side: int) -> None:
    monkeypatch.setenv("U2NET_HOME", str(tmp_path))
    monkeypatch.delenv("MODEL_CHECKSUM_DISABLED", raising=False)
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    write_network(tmp_path / place, side, gain=4.0, offset=-1.0)
    rgb = np.full((120, 200, 3), 0.5, np.float32)
    rgb[40:80, 60:140] = [0.9, 0.1, 0.5]
    mask, how = matting.matte(rgb, PictureConfig())
    assert how == f"rembg {Path(place).stem}" and iou(mask, rgb[..., 0] > 0.7) > 0.97
    assert matting.os.environ["U2NET_HOME"] == str(tmp_path) and "MODEL_CHECKSUM_DISABLED" not in matting.os.environ
