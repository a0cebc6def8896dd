"""From a decoded picture to pixel_values, as a CLIP wants them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from PIL import Image

from defense.errors import ConfigError, InvalidImageError

__all__ = ["Preprocess"]

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_STD = (1e-3, 1e3)  # 1/255, for towers that want 0 to 255, is well inside
_RESIZE_MODES = ("shortest", "longest", "squash")

# What open_clip's PreprocessCfg fills in for keys that a model does not set.
_OPEN_CLIP_DEFAULTS = {
    "mode": "RGB",
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}


@dataclass(frozen=True)
class Preprocess:
    """Resize, crop and normalize, bit-equal to open_clip's eval transform.

    Attributes:
        size: Height and width of the result, in pixels.
        mean: Subtracted from red, green and blue, which lie in 0 to 1; so does it.
        std: Divides the difference; 0.001 to 1000.
        interpolation: "bicubic" or "bilinear".
        resize_mode: "shortest" fills the frame and crops the longer side at both ends, "longest" fits the picture in
            and pads, "squash" changes its aspect ratio.
        fill_color: Gray level, 0 to 255, of the padding.

    Raises:
        ConfigError: A value that is not one of these.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    resize_mode: str
    fill_color: int = 0

    def __post_init__(self) -> None:
        if not (_are(int, self.size, 2) and min(self.size) > 0):
            raise ConfigError(f"size is {self.size!r}; want a tuple of height and width, in pixels, both above 0")
        if not (_are_within(self.mean, 0, 1) and _are_within(self.std, *_STD)):
            raise ConfigError(
                f"mean is {self.mean!r}, std {self.std!r}; want tuples of three finite floats: mean in 0 to 1, std in "
                f"{_STD[0]:g} to {_STD[1]:g}, so no std of zero"
            )
        if self.interpolation not in _RESAMPLING:
            raise ConfigError(f"interpolation is {self.interpolation!r}; want one of {', '.join(_RESAMPLING)}")
        if self.resize_mode not in _RESIZE_MODES:
            raise ConfigError(f"resize_mode is {self.resize_mode!r}; want one of {', '.join(_RESIZE_MODES)}")
        if not (_are(int, (self.fill_color,), 1) and 0 <= self.fill_color <= 255):
            raise ConfigError(f"fill_color is {self.fill_color!r}; want an integer from 0 to 255")

    @classmethod
    def from_open_clip(cls, cfg: Mapping[str, Any]) -> Preprocess:
        """Return the transform that `open_clip.get_model_preprocess_cfg(model)` describes.

        Args:
            cfg: Keys size (int, or height and width), mode, mean, std, interpolation, resize_mode and fill_color. All
                but size may be missing and then have open_clip's defaults.

        Raises:
            ConfigError: A key or value that is not known, or no size.
        """
        cfg = {**_OPEN_CLIP_DEFAULTS, **cfg}
        if (mode := cfg.pop("mode")) != "RGB":
            raise ConfigError(f"mode is {mode!r}; want RGB")
        if isinstance(cfg.get("size"), int):
            cfg["size"] = (cfg["size"],) * 2
        return cls.from_dict(cfg)

    @classmethod
    def from_image_processor(cls, cfg: Mapping[str, Any]) -> Preprocess:
        """Return the transform that an image processor of transformers describes.

        The two agree on what is done; pixels differ by what libraries' resizing does.

        Args:
            cfg: What its `to_dict` returns, or its file `preprocessor_config.json`.

        Raises:
            ConfigError: It does something that there is no `Preprocess` for, such as keeping a border to crop.
        """
        for step in ("do_resize", "do_rescale", "do_normalize"):
            if not cfg.get(step, True):
                raise ConfigError(f"this image processor has {step}=false; want one that resizes and normalizes")
        if cfg.get("do_pad"):
            raise ConfigError("this image processor pads pictures; pass the Preprocess that is meant instead")
        factor = cfg.get("rescale_factor", 1 / 255)
        if not math.isclose(factor, 1 / 255):
            raise ConfigError(f"this image processor multiplies pixels by {factor}; want 1/255")
        size, crop = _sides(cfg.get("size")), _sides(cfg.get("crop_size")) if cfg.get("do_center_crop") else None
        if len(size) == 1 and crop == size * 2:
            mode = "shortest"
        elif len(size) == 2 and crop in (None, size):
            mode = "squash"
        else:
            raise ConfigError(
                f"this image processor resizes to {cfg.get('size')} and crops to {cfg.get('crop_size')}; a Preprocess "
                "resizes to the very frame: pass the one that is meant instead"
            )
        interpolation = {int(value): name for name, value in _RESAMPLING.items()}.get(cfg.get("resample", 3))
        mean, std = (tuple(cfg.get(key) or ()) for key in ("image_mean", "image_std"))
        frame = size if mode == "squash" else size * 2
        return cls(frame, mean, std, str(interpolation or cfg.get("resample")), mode)  # type: ignore[arg-type]  # checked

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Preprocess:
        """Return what `to_dict` was called on, from its result or that read back from JSON.

        Raises:
            ConfigError: A key is missing or not known, or a value is.
        """
        expected = {field.name for field in fields(cls)}
        if data.keys() != expected:
            raise ConfigError(f"preprocess has the keys {sorted(data)}; want {sorted(expected)}")
        tuples: dict[str, Any] = {key: tuple(value) for key, value in data.items() if isinstance(value, list)}
        return cls(**{**data, **tuples})

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as a dict that JSON can hold."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Return `pixel_values`: float32, shape (3, height, width), C-contiguous.

        Args:
            image: Mode RGB, as `decode` returns it.

        Raises:
            InvalidImageError: `image` has another mode.
        """
        if image.mode != "RGB":
            raise InvalidImageError("unsupported_mode", f"got Pillow mode {image.mode}; want RGB: use decode(image)")
        framed = self._frame(image.resize(self._resized(*image.size), self._resampling()))
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        pixels = np.asarray(framed).astype(np.float32) / np.float32(255)  # [height, width, 3]
        return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))

    def seen_box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Return the part of a picture that fills the frame: left, upper, right and lower edge, in its own pixels.

        Where the picture is padded the box reaches beyond it, so that edges may be negative.
        """
        resized = self._resized(width, height)
        left, upper = (-_offset(frame, side) for frame, side in zip(self.size[::-1], resized, strict=True))
        across, down = width / resized[0], height / resized[1]
        edges = (left * across, upper * down, (left + self.size[1]) * across, (upper + self.size[0]) * down)
        return round(edges[0]), round(edges[1]), round(edges[2]), round(edges[3])

    def _resampling(self) -> Image.Resampling:
        # open_clip forgets the interpolation where a non-square frame is filled.
        forgotten = self.resize_mode == "shortest" and self.size[0] != self.size[1]
        return _RESAMPLING["bicubic" if forgotten else self.interpolation]

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height before cropping or padding, with torchvision's and open_clip's rounding.

        Source: torchvision `_compute_resized_output_size`, open_clip `ResizeKeepRatio.get_params`.
        """
        to_height, to_width = self.size
        if self.resize_mode == "squash":
            return to_width, to_height
        if self.resize_mode == "shortest" and to_height == to_width:
            longer = int(to_height * max(width, height) / min(width, height))
            return (to_width, longer) if width <= height else (longer, to_height)
        fit = max if self.resize_mode == "longest" else min
        ratio = fit(height / to_height, width / to_width)
        return max(1, round(width / ratio)), max(1, round(height / ratio))

    def _frame(self, image: Image.Image) -> Image.Image:
        """Return the picture centered in the frame: cropped where it is larger, padded where it is smaller."""
        height, width = self.size
        frame = Image.new("RGB", (width, height), (self.fill_color,) * 3)
        frame.paste(image, (_offset(width, image.width), _offset(height, image.height)))
        return frame


def _sides(size: Any) -> tuple[int, ...]:
    """Return an image processor's size: the shorter side, or height and width; neither where it is another kind."""
    if isinstance(size, int):
        return size, size
    given = {key: value for key, value in dict(size or {}).items() if value is not None}
    if given.keys() == {"shortest_edge"}:
        return (given["shortest_edge"],)
    return (given["height"], given["width"]) if given.keys() == {"height", "width"} else ()


def _are(kind: type, values: object, count: int) -> bool:
    """Return whether `values` is a tuple of `count` finite numbers of that kind; an int is a float, a bool is not."""
    kinds = (int, float) if kind is float else (kind,)
    return (
        isinstance(values, tuple)
        and len(values) == count
        and all(type(value) in kinds and math.isfinite(value) for value in values)
    )


def _are_within(values: Any, low: float, high: float) -> bool:
    """Return whether `values` is a tuple of three floats of that range."""
    return _are(float, values, 3) and all(low <= value <= high for value in values)


def _offset(frame: int, side: int) -> int:
    """Return where a side of the picture begins in the frame; negative where it is cropped.

    Source: torchvision `center_crop`; padding rounds down, cropping to even.
    """
    return (frame - side) // 2 if side <= frame else -round((side - frame) / 2)


Box = tuple[int, int, int, int]
"""Left, upper, right and lower edge in pixels, as Pillow has it."""
