"""ImageTower: a Hugging Face vision encoder by local path as a dense feature, from image paths.

    path -> RGB, resized to the model's square, (x / 255 - mean) / std -> model -> mean over the patches [B, H] -> projection

The column lies in `batch.extras` as strings (FeatureSpec kind "extra"). An empty string is a sample without an image: it gives
zeros and is counted. Mean, std and size come from preprocessor_config.json and the model's config. Needs `hf` and pillow.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from recis.errors import ConfigError, DataError, nearest
from recis.jagged import JaggedTensor
from recis.towers.backbone import BackboneError, freeze, load_model
from recis.towers.optimizer import set_lr_scale
from recis.towers.weights import FrozenState, frozen_state

if TYPE_CHECKING:
    from recis.io.batch import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTowerConfig:
    """A vision encoder and the column of paths it reads."""

    name: str
    """Of the dense feature it makes."""
    column: str
    """Paths, one per sample, in batch.extras."""
    path: str
    """Folder of the model; nothing is fetched."""
    root: str = ""
    """Folder that relative image paths start from; "": the working folder."""
    out_width: int | None = None
    """Width of a projection; None: the model's own width."""
    frozen_layers: int | None = None
    """As in TextTowerConfig."""
    lr_scale: float = 0.1
    """As in TextTowerConfig."""
    seed: int = 0
    """Of the projection's weights."""

    def __post_init__(self) -> None:
        if self.out_width is not None and self.out_width < 1:
            raise ConfigError(f"image tower {self.name!r}: out_width must be at least 1 or None; got {self.out_width}")

    def build(self) -> "ImageTower":
        """Return the tower with the folder's weights."""
        return ImageTower(self)


class ImageTower(nn.Module):
    """forward(batch) -> [B, width] float32.

    Attributes:
        width: of the output.
        num_missing: samples so far without an image.

    Raises:
        BackboneError: the folder holds no whole vision model.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ImageTowerConfig) -> None:
        super().__init__()
        self.config, self.name = config, config.name
        self.model = load_model(config.path)
        size = getattr(self.model.config, "image_size", None)
        if not isinstance(size, int) or self.model.main_input_name != "pixel_values":
            raise BackboneError(f"{config.path}: {type(self.model).__name__} is no vision encoder with one image_size")
        self.image_size = size
        settings = Path(config.path) / "preprocessor_config.json"
        told: dict[str, Any] = json.loads(settings.read_text()) if settings.exists() else {}
        for name in ("mean", "std"):
            value = torch.tensor(told.get(f"image_{name}", (0.5, 0.5, 0.5)), dtype=torch.float32)
            self.register_buffer(name, value.view(3, 1, 1), persistent=False)
        self.num_missing = 0
        hidden = self.model.config.hidden_size
        self.width = hidden if config.out_width is None else config.out_width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.projection = nn.Identity() if config.out_width is None else nn.Linear(hidden, config.out_width)
        freeze(self.model, config.frozen_layers)
        set_lr_scale(self.model, config.lr_scale)
        self._frozen: FrozenState | None = None

    def frozen_state(self) -> FrozenState:
        """See TextTower.frozen_state."""
        if self._frozen is None:
            self._frozen = frozen_state(self.model, prefix="model.")
        return self._frozen

    def forward(self, batch: "Batch") -> Tensor:
        """Return [B, width].

        Raises:
            ConfigError: the batch has no such column of strings.
            DataError: a file is missing or no whole image; with its path and row.
        """
        column = batch.extras.get(self.config.column)
        if not isinstance(column, JaggedTensor) or not column.is_strings:
            raise ConfigError(
                f"image tower {self.name!r}: batch.extras has no strings {self.config.column!r}; "
                f"{nearest(self.config.column, batch.extras)}"
            )
        return self.project(self.encode([path.decode() for path in column.to_strings()]))

    def project(self, pooled: Tensor) -> Tensor:
        """Return [B, width] of pooled states [B, H]."""
        return self.projection(pooled.float()).float()

    def encode(self, paths: list[str]) -> Tensor:
        """Return the mean state of each image [B, H]; zeros for an empty path. Raises DataError as forward."""
        device = next(self.model.parameters()).device
        out = torch.zeros(len(paths), self.model.config.hidden_size, device=device)
        present = [row for row, path in enumerate(paths) if path]
        self.num_missing += len(paths) - len(present)
        if not present:
            return out
        pixels = torch.stack([self._pixels(paths[row], row) for row in present]).to(device)
        trains = torch.is_grad_enabled() and any(value.requires_grad for value in self.model.parameters())
        with torch.set_grad_enabled(trains):
            states = self.model(pixel_values=(pixels - self.mean) / self.std).last_hidden_state
        return out.index_copy(0, torch.tensor(present, device=device), states.flatten(2).mean(1).float())

    def _pixels(self, path: str, row: int) -> Tensor:
        return read_image(Path(self.config.root) / path, self.image_size, row=row, column=self.config.column)


def read_image(path: Path, size: int, *, row: int | None = None, column: str | None = None) -> Tensor:
    """Return an image as [3, size, size] float32 in [0, 1].

    Raises:
        DataError: the file is missing, or no whole image.
        ImportError: pillow is not installed.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("image towers need pillow: pip install pillow") from error
    try:
        with Image.open(path) as image:
            square = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"the image cannot be read: {error}",
            file=str(path),
            row=row,
            column=column,
            option="an empty path means none",
        ) from error
    return torch.from_numpy(np.asarray(square, dtype=np.float32) / 255).permute(2, 0, 1).contiguous()
