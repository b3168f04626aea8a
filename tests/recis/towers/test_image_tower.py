"""ImageTower: pixels by hand, a missing image, a broken one."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from recis.errors import ConfigError, DataError
from recis.io.batch import Batch
from recis.jagged import JaggedTensor, KeyedJaggedTensor
from recis.towers.backbone import BackboneError
from recis.towers.image import ImageTowerConfig, read_image


@pytest.fixture(scope="module")
def vit(tiny, tmp_path_factory) -> Path:
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    folder = tmp_path_factory.mktemp("vit")
    transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path) -> Path:
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (20, 10), (255, 0, 51)).save(tmp_path / "red.png")
    image.new("L", (3, 9), 255).save(tmp_path / "white.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "red.png").read_bytes()[:40])
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


def batch_of(paths: list[str]) -> Batch:
    size = len(paths)
    return Batch(
        sparse=KeyedJaggedTensor.from_jagged({}, stride=size), dense=torch.zeros(size, 0), dense_keys=(),
        dense_widths=(), labels=torch.zeros(size, 1), label_mask=None, label_weights=None, weights=torch.ones(size),
        group_ids=None, extras={"image": JaggedTensor.from_strings(paths)}, num_samples=size,
    )  # fmt: skip


def test_pixels(images):
    pixels = read_image(images / "red.png", 4)
    assert pixels.shape == (3, 4, 4)
    torch.testing.assert_close(pixels[:, 0, 0], torch.tensor([1.0, 0.0, 0.2]))


def test_vectors_and_missing_images(vit, images):
    tower = ImageTowerConfig(name="image", column="image", path=str(vit), root=str(images), out_width=3).build().eval()
    out = tower(batch_of(["red.png", "", "white.png", "red.png"]))
    assert out.shape == (4, 3)
    torch.testing.assert_close(out[0], out[3])
    assert not torch.allclose(out[0], out[2])
    assert torch.equal(out[1], tower.projection.get_parameter("bias"))
    assert tower.num_missing == 1
    assert tower(batch_of([""])).shape == (1, 3)


def test_broken_images_are_named(vit, images):
    tower = ImageTowerConfig(name="image", column="image", path=str(vit), root=str(images)).build()
    for name in ("broken.png", "text.png", "absent.png"):
        with pytest.raises(DataError, match=rf"{name}, row 1, column 'image': the image cannot be read"):
            tower(batch_of(["red.png", name]))


def test_a_text_model_is_refused(bert_folder, vit):
    with pytest.raises(BackboneError, match="no vision encoder"):
        ImageTowerConfig(name="image", column="image", path=str(bert_folder)).build()
    with pytest.raises(ConfigError, match="out_width"):
        ImageTowerConfig(name="image", column="image", path=str(vit), out_width=0)


def test_the_package_imports_without_transformers():
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['peft'] = sys.modules['PIL'] = None\n"
        "import recis.towers\n"
        "from recis.towers import TextTowerConfig, backbone\n"
        "import pathlib, tempfile\n"
        "folder = pathlib.Path(tempfile.mkdtemp()); (folder / 'config.json').write_text('{}')\n"
        "try: backbone.load_model(folder)\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'recis[hf]'" in done.stdout
