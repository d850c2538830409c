"""What happens to the pixels of a view: drawn on the host, done in torch on the whole batch where it lies, one code for every
decoder and device.

The formulas are torchvision's for tensors of floats: colours as multiples of 1 / 255 in [0, 1], cut to that range after every
operation but not rounded; posterize and equalize work on 8-bit levels. The blur is cut at three times the largest sigma.

RandAugment of strength m, s = m / 30, signs at random where +-: shear by +-0.3 s, translate by +-150 / 331 s of the size (whole
pixels), rotate by +-30 s degrees, brightness, color, contrast and sharpness with the factor 1 +- 0.9 s, posterize to
8 - round(4 s) bits, solarize from 255 - 255 s on, autocontrast, equalize, identity; nearest neighbours, black around.
The recipe "albef", s = m / 10: identity, autocontrast, equalize, brightness and sharpness with the factor 0.1 + 1.8 s, shear by
+-0.3 s, translate by +-10 s pixels, rotate by +-30 s degrees, each left out with probability 1/2; bilinear, grey (128) around.
(Its published code rotates about a point half a pixel off the centre and shears about the centre of the first pixel; here it is
the centre, and the corner.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlpfast.data.modality import Draws
from vlpfast.data.order import uniform
from vlpfast.types import AugmentSpec, ColorJitterSpec, RandAugmentSpec, UserError

# What the draws of a view are for. 0 to 63 belong to order.py and the crop; a view adds its number times 2^16 (views.py).
_JITTER, _GRAYSCALE, _BLUR, _SOLARIZE, _RAND_AUGMENT = 64, 80, 81, 83, 96
_WARPS = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
_ENHANCEMENTS = ("brightness", "color", "contrast", "sharpness")
_OPERATIONS = {
    "torchvision": ("identity", *_WARPS, *_ENHANCEMENTS, "posterize", "solarize", "autocontrast", "equalize"),
    "albef": ("identity", "autocontrast", "equalize", "brightness", "sharpness", *_WARPS),
}
_MAGNITUDES = {"torchvision": 30, "albef": 10}  # the largest


class Step(NamedTuple):
    """One operation on some samples of a batch."""

    operation: str
    rows: np.ndarray  # int64 [n] positions in the batch, each once
    values: np.ndarray  # float64 [n] its strength; of a warp [n, 2, 3]: x, y in pixels -> where they are afterwards


def check(spec: AugmentSpec, size: int) -> None:
    """Raises UserError. size: of the view, in pixels."""
    for name in ("grayscale", "blur", "solarize"):
        if not 0 <= getattr(spec, name) <= 1:
            raise UserError(f"augment.{name}: expected a probability, got {getattr(spec, name)}")
    if len(spec.blur_sigma) != 2 or not 0 < spec.blur_sigma[0] <= spec.blur_sigma[1] < math.inf:
        raise UserError(f"augment.blur_sigma: expected two numbers, 0 < low <= high, got {list(spec.blur_sigma)}")
    if spec.blur and _radius(spec) >= size:
        raise UserError(
            f"augment.blur_sigma: {spec.blur_sigma[1]} reaches over {_radius(spec)} pixels, too far for a view of {size}"
        )
    if (jitter := spec.color_jitter) is not None:
        for name in ("brightness", "contrast", "saturation"):
            if not getattr(jitter, name) >= 0:
                raise UserError(f"augment.color_jitter.{name}: expected at least 0, got {getattr(jitter, name)}")
        if not 0 <= jitter.hue <= 0.5:
            raise UserError(f"augment.color_jitter.hue: expected 0 to 0.5, got {jitter.hue}")
        if not 0 <= jitter.prob <= 1:
            raise UserError(f"augment.color_jitter.prob: expected a probability, got {jitter.prob}")
    if (rand := spec.rand_augment) is not None:
        if rand.recipe not in _MAGNITUDES:
            raise UserError(f'augment.rand_augment.recipe: expected "torchvision" or "albef", got {rand.recipe!r}')
        if not 0 <= rand.magnitude <= _MAGNITUDES[rand.recipe]:
            raise UserError(
                f"augment.rand_augment.magnitude: expected 0 to {_MAGNITUDES[rand.recipe]} (recipe {rand.recipe}), "
                f"got {rand.magnitude}"
            )
        if not 1 <= rand.num_ops <= 100:
            raise UserError(f"augment.rand_augment.num_ops: expected 1 to 100, got {rand.num_ops}")


def is_empty(spec: AugmentSpec) -> bool:
    return spec.color_jitter is None and spec.rand_augment is None and not (spec.grayscale or spec.blur or spec.solarize)


# --- drawing ----------------------------------------------------------------------------------------------------------


def draw_steps(spec: AugmentSpec, size: int, draws: Draws, first: int) -> list[Step]:
    """What is to be done to each sample of a batch, in order. first: added to the numbers of the draws."""

    def u(number: int) -> np.ndarray:  # [B] in [0, 1)
        return uniform(draws.seed, draws.epoch, draws.index, first + number)

    steps: list[Step] = []
    if spec.color_jitter is not None:
        steps += _jitter(spec.color_jitter, u)
    low, high = spec.blur_sigma
    for name, share, number, values in (
        ("grayscale", spec.grayscale, _GRAYSCALE, np.zeros(len(draws.index))),
        (f"blur {_radius(spec)}", spec.blur, _BLUR, low + u(_BLUR + 1) * (high - low)),
        ("solarize", spec.solarize, _SOLARIZE, np.full(len(draws.index), 128.0)),
    ):
        rows = np.flatnonzero(u(number) < share)
        steps.append(Step(name, rows, values[rows]))
    if spec.rand_augment is not None:
        for place in range(spec.rand_augment.num_ops):
            steps += _rand_augment(spec.rand_augment, size, *(u(_RAND_AUGMENT + 3 * place + k) for k in range(3)))
    return [step for step in steps if len(step.rows)]


def _radius(spec: AugmentSpec) -> int:
    return math.ceil(3 * spec.blur_sigma[1])


def _jitter(spec: ColorJitterSpec, u: Callable[[int], np.ndarray]) -> list[Step]:
    strengths = {"brightness": spec.brightness, "contrast": spec.contrast, "color": spec.saturation, "hue": spec.hue}
    chosen = u(_JITTER) < spec.prob  # [B]
    order = np.stack([u(_JITTER + 1 + k) for k in range(4)], 1).argsort(1, kind="stable")  # [B, 4]: which comes at each place
    steps = []
    for place in range(4):
        for k, (name, strength) in enumerate(strengths.items()):
            if strength:
                low, high = (-strength, strength) if name == "hue" else (max(0.0, 1 - strength), 1 + strength)
                rows = np.flatnonzero(chosen & (order[:, place] == k))
                steps.append(Step(name, rows, low + u(_JITTER + 5 + k)[rows] * (high - low)))
    return steps


def _rand_augment(spec: RandAugmentSpec, size: int, choice: np.ndarray, sign: np.ndarray, prob: np.ndarray) -> list[Step]:
    """One operation for each sample. choice, sign, prob [B] uniform in [0, 1)."""
    names = _OPERATIONS[spec.recipe]
    chosen = (choice * len(names)).astype(np.int64)  # [B]
    if spec.recipe == "albef":
        chosen[prob < 0.5] = names.index("identity")
    s = spec.magnitude / _MAGNITUDES[spec.recipe]
    steps = []
    for k, name in enumerate(names):
        rows = np.flatnonzero(chosen == k)
        signs = np.where(sign[rows] < 0.5, 1.0, -1.0)
        if name in _WARPS:
            shift = 10 * s if spec.recipe == "albef" else math.floor(150 / 331 * size * s)
            amounts = signs * {"sh": 0.3 * s, "tr": shift, "ro": math.radians(30 * s)}[name[:2]]
            steps.append(Step(f"warp {spec.recipe}", rows, _matrices(name, amounts, size)))
        elif name in _ENHANCEMENTS:
            factors = 1 + signs * 0.9 * s if spec.recipe == "torchvision" else np.full(len(rows), 0.1 + 1.8 * s)
            steps.append(Step(name, rows, factors))
        elif name != "identity":
            strength = {"posterize": 8.0 - round(4 * s), "solarize": 255 - 255 * s}.get(name, 0.0)
            steps.append(Step(name, rows, np.full(len(rows), strength)))
    return steps


def _matrices(name: str, amounts: np.ndarray, size: int) -> np.ndarray:
    """-> float64 [n, 2, 3], pixels to pixels. amounts [n]: shear, pixels, or radians counterclockwise about the centre."""
    matrices = np.tile(np.eye(2, 3), (len(amounts), 1, 1))
    if name == "rotate":
        cos, sin = np.cos(amounts), np.sin(amounts)
        matrices[:, 0, 0], matrices[:, 0, 1], matrices[:, 1, 0], matrices[:, 1, 1] = cos, sin, -sin, cos
        matrices[:, :, 2] = size / 2 - matrices[:, :, :2].sum(2) * (size / 2)
    else:
        row = 0 if name.endswith("x") else 1
        matrices[:, row, 2 if name.startswith("translate") else 1 - row] = amounts
    return matrices


def warps(steps: list[Step], batch_size: int) -> list[np.ndarray]:
    """The warps among the steps, each as float64 [B, 2, 3] with the identity for samples that it leaves alone."""
    found = []
    for step in steps:
        if step.operation.startswith("warp"):
            matrices = np.tile(np.eye(2, 3), (batch_size, 1, 1))
            matrices[step.rows] = step.values
            found.append(matrices)
    return found


def total_warp(steps: list[Step], batch_size: int, size: int) -> np.ndarray:
    """All warps one after another, for x, y as fractions of the view: float32 [B, 2, 3]."""
    total = np.tile(np.eye(3), (batch_size, 1, 1))
    for matrices in warps(steps, batch_size):
        total[:, :2] = matrices @ total
    total[:, :2, 2] /= size
    return total[:, :2].astype(np.float32)


# --- pixels -----------------------------------------------------------------------------------------------------------


def apply_steps(pixels: Tensor, steps: list[Step]) -> Tensor:
    """pixels uint8 [B, 3, S, S] -> float32 [B, 3, S, S] in [0, 1]."""
    x = pixels.float().div_(255)
    return _step_by_step(x, steps) if x.is_cuda else _picture_by_picture(x, steps)


def _step_by_step(x: Tensor, steps: list[Step]) -> Tensor:
    """Few launches: what a GPU wants."""
    for step in steps:
        rows = torch.from_numpy(step.rows).to(x.device)
        x[rows] = _operate(step.operation, x[rows], step.values)
    return x


def _picture_by_picture(x: Tensor, steps: list[Step]) -> Tensor:
    """From step to step a picture stays in the cache: what a CPU wants."""
    todo: list[list[tuple[str, np.ndarray]]] = [[] for _ in range(len(x))]
    for step in steps:
        for row, value in zip(step.rows.tolist(), step.values, strict=True):
            todo[row].append((step.operation, value[None]))
    for one, operations in zip(x.split(1), todo, strict=True):
        seen = one
        for operation, value in operations:
            seen = _operate(operation, seen, value)
        if operations:
            one.copy_(seen)
    return x


def _operate(operation: str, x: Tensor, values: np.ndarray) -> Tensor:
    """x [n, 3, S, S], values as in Step -> the same, new"""
    name, _, how = operation.partition(" ")
    if name == "warp":
        return _warp(x, values, 0.0 if how == "torchvision" else 128 / 255, bilinear=how == "albef")
    strengths = torch.from_numpy(values.astype(np.float32)).to(x.device)
    if name == "blur":
        return _blur(x, strengths, int(how))
    return _PIXELWISE[name](x, strengths[:, None, None, None])


def warp_masks(masks: Tensor, steps: list[Step]) -> Tensor:
    """masks bool [B, N, S, S], in place -> under the warps among the steps, by nearest neighbours, False around."""
    for step in steps:
        if step.operation.startswith("warp"):
            rows = torch.from_numpy(step.rows).to(masks.device)
            masks[rows] = _warp(masks[rows], step.values, False, bilinear=False)
    return masks


def _gray(x: Tensor) -> Tensor:
    """x [n, 3, S, S] -> [n, 1, S, S], the luma of ITU-R 601"""
    return 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def _blend(x: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    return (factor * x).add_((1 - factor) * other).clamp_(0, 1)


def _sharpness(x: Tensor, factor: Tensor) -> Tensor:
    """Blends with the mean of 3 x 3 pixels in which the middle counts five times; the border stays."""
    size = x.shape[-1]
    if size <= 2:
        return x
    sums = sum(x[..., i : size - 2 + i, j : size - 2 + j] for i in range(3) for j in range(3))
    middle = x[..., 1:-1, 1:-1]
    out = x.clone()
    out[..., 1:-1, 1:-1] = _blend(middle, (sums + 4 * middle) / 13, factor)
    return out


def _hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turns the hue of HSV (Smith 1978) by a share of the circle."""
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)  # [n, 1, S, S]
    chroma = value - low
    r, g, b = (x / chroma.clamp_min(1e-12)).split(1, 1)
    red, green = x[:, :1] == value, x[:, 1:2] == value
    sixths = torch.where(red, g - b, torch.where(green, 2 + b - r, 4 + r - g))
    sixths = torch.where(chroma > 0, sixths, 0) + 6 * turn
    offset = torch.tensor([5.0, 3.0, 1.0], device=x.device)[:, None, None]
    k = torch.remainder(offset + sixths, 6)  # [n, 3, S, S]: a channel is low where k is in [4, 6], and rises before
    return (value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)).clamp(0, 1)


def _levels(x: Tensor) -> Tensor:
    return (255 * x).round().to(torch.int64)


def _posterize(x: Tensor, bits: Tensor) -> Tensor:
    step = 2 ** (8 - bits)
    return (_levels(x) / step).floor() * step / 255


def _solarize(x: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(x >= threshold / 255, 1 - x, x)


def _autocontrast(x: Tensor, _: Tensor) -> Tensor:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)  # [n, 3, 1, 1]
    return torch.where(high > low, (x - low) / (high - low).clamp_min(1e-12), x).clamp(0, 1)


def _equalize(x: Tensor, _: Tensor) -> Tensor:
    """The cumulative histogram of each channel becomes a line; the pixels of the highest level do not count for its slope."""
    levels = _levels(x).flatten(2)  # [n, 3, S * S]
    counts = torch.zeros(*levels.shape[:2], 256, dtype=torch.int64, device=x.device)
    counts.scatter_add_(2, levels, torch.ones_like(levels))
    last = counts.gather(2, levels.amax(2, keepdim=True))  # [n, 3, 1]
    step = (levels.shape[2] - last) // 255
    table = (counts.cumsum(2) - counts + step // 2) // step.clamp_min(1)
    return torch.where(step > 0, table.clamp(0, 255).gather(2, levels), levels).view_as(x) / 255


def _blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """sigma [n]. The border is mirrored without repeating the last pixel."""
    # sums of shifted pictures: a convolution would lose bits to TF32 on a GPU, and its result depend on the algorithm chosen
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    weights = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)  # [n, K]
    weights = (weights / weights.sum(1, keepdim=True)).T[:, :, None, None, None]  # [K, n, 1, 1, 1]
    size = x.shape[-1]
    for dim in (3, 2):
        padded = F.pad(x, (radius, radius, 0, 0) if dim == 3 else (0, 0, radius, radius), mode="reflect")
        x = weights[0] * padded.narrow(dim, 0, size)
        for k in range(1, 2 * radius + 1):
            x.addcmul_(weights[k], padded.narrow(dim, k, size))
    return x


def _warp(x: Tensor, matrices: np.ndarray, fill: float, *, bilinear: bool) -> Tensor:
    """x [n, C, S, S]; matrices float64 [n, 2, 3] from pixels of x to pixels of the result; `fill` comes in from outside."""
    size = x.shape[-1]
    linear = np.linalg.inv(matrices[:, :, :2])
    back = np.concatenate([linear, -linear @ matrices[:, :, 2:]], 2)  # [n, 2, 3]
    at = torch.arange(size, device=x.device) + 0.5  # the middle of a pixel
    m = torch.from_numpy(back.astype(np.float32)).to(x.device)[:, :, :, None, None]  # [n, 2, 3, 1, 1]
    source = m[:, :, 0] * at + m[:, :, 1] * at[:, None] + m[:, :, 2]  # [n, 2, S, S]
    if bilinear:
        grid = (source * (2 / size) - 1).permute(0, 2, 3, 1)
        return F.grid_sample(x - fill, grid, align_corners=False) + fill
    whole = source.floor().long()
    within = ((whole >= 0) & (whole < size)).all(1)[:, None]  # [n, 1, S, S]
    whole = whole.clamp(0, size - 1)
    flat = (whole[:, 1] * size + whole[:, 0]).flatten(1)[:, None].expand(-1, x.shape[1], -1)  # [n, C, S * S]
    return torch.where(within, x.flatten(2).gather(2, flat).view_as(x), fill)


_PIXELWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": lambda x, factor: _blend(x, 0.0, factor),
    # rows first: so the sum is split in the same way for any number of threads
    "contrast": lambda x, factor: _blend(x, _gray(x).mean(3, keepdim=True).mean(2, keepdim=True), factor),
    "color": lambda x, factor: _blend(x, _gray(x), factor),
    "hue": _hue,
    "grayscale": lambda x, _: _gray(x).expand_as(x),
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
