import colorsys
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from vlpfast.data import augment
from vlpfast.data.augment import Step, apply_steps, check, draw_steps, is_empty, total_warp, warp_masks, warps
from vlpfast.data.modality import Draws
from vlpfast.types import AugmentSpec, ColorJitterSpec, RandAugmentSpec, UserError

SIZE = 20
N = 6


@pytest.fixture(scope="module")
def pictures():
    """uint8 [N, S, S, 3]: noise, waves, one colour, greys, few levels, a dark one."""
    draw = np.random.default_rng(0)
    noise = draw.integers(0, 256, (SIZE, SIZE, 3))
    y, x = np.mgrid[:SIZE, :SIZE]
    waves = np.stack([127 + 120 * np.sin(x / 3) * np.cos(y / 5), 127 + 90 * np.cos(x / 4), 6 * (x + y)], -1)
    plain = np.full((SIZE, SIZE, 3), (200, 30, 77))
    greys = np.repeat(draw.integers(40, 180, (SIZE, SIZE, 1)), 3, 2)
    return np.stack([noise, waves, plain, greys, noise // 64 * 64, noise // 5]).astype(np.uint8)


def run(pictures, operation, values, rows=None):
    """-> float64 [N, S, S, 3]"""
    rows = np.arange(len(pictures)) if rows is None else rows
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
    return apply_steps(pixels, [Step(operation, rows, np.asarray(values, np.float64))]).permute(0, 2, 3, 1).double().numpy()


# --- the published formulas, one picture at a time, in float64 --------------------------------------------------------


def luma(x):
    return (0.2989 * x[..., 0] + 0.587 * x[..., 1] + 0.114 * x[..., 2])[..., None]


def blend(x, y, factor):
    return np.clip(factor * x + (1 - factor) * y, 0, 1)


def hue(x, turn):
    out = np.empty_like(x)
    for i, j in itertools.product(range(SIZE), range(SIZE)):
        h, s, v = colorsys.rgb_to_hsv(*x[i, j])
        out[i, j] = colorsys.hsv_to_rgb((h + turn) % 1, s, v)
    return out


def sharpness(x, factor):
    smooth = x.copy()
    for i, j in itertools.product(range(1, SIZE - 1), range(1, SIZE - 1)):
        smooth[i, j] = (x[i - 1 : i + 2, j - 1 : j + 2].sum((0, 1)) + 4 * x[i, j]) / 13
    return blend(x, smooth, factor)


def blur(x, sigma, radius):
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    padded = np.pad(x, ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    out = np.zeros_like(x)
    for i, j in itertools.product(range(SIZE), range(SIZE)):
        window = padded[i : i + 2 * radius + 1, j : j + 2 * radius + 1]
        out[i, j] = np.einsum("i,j,ijc->c", kernel, kernel, window)
    return out


def autocontrast(x, _):
    low, high = x.min((0, 1)), x.max((0, 1))
    return np.where(high > low, (x - low) / np.where(high > low, high - low, 1), x)


def equalize(x, _):
    levels = np.rint(255 * x).astype(int)
    out = levels.copy()
    for c in range(3):
        histogram = np.bincount(levels[..., c].ravel(), minlength=256)
        used = histogram[histogram > 0]
        step = used[:-1].sum() // 255
        if step:
            table = [min(255, (histogram[:level].sum() + step // 2) // step) for level in range(256)]
            out[..., c] = np.array(table)[levels[..., c]]
    return out / 255


FORMULAS = {
    "brightness": (lambda x, f: blend(x, 0, f), [0.0, 0.3, 1.0, 1.4, 1.9, 0.6]),
    "contrast": (lambda x, f: blend(x, luma(x).mean(), f), [0.0, 0.3, 1.0, 1.4, 1.9, 0.6]),
    "color": (lambda x, f: blend(x, luma(x), f), [0.0, 0.3, 1.0, 1.4, 1.9, 0.6]),
    "sharpness": (sharpness, [0.0, 0.3, 1.0, 1.4, 1.9, 0.6]),
    "hue": (hue, [-0.5, -0.1, 0.0, 0.07, 0.3, 0.5]),
    "grayscale": (lambda x, _: np.repeat(luma(x), 3, -1), [0.0] * N),
    "blur 6": (lambda x, sigma: blur(x, sigma, 6), [0.1, 0.5, 1.0, 1.3, 2.0, 0.9]),
    "posterize": (lambda x, bits: (np.rint(255 * x).astype(int) & (-(2 ** int(8 - bits)))) / 255, [8, 7, 6, 5, 4, 1]),
    "solarize": (lambda x, t: np.where(np.rint(255 * x) >= t, 1 - x, x), [0, 40, 128, 200, 255, 256]),
    "autocontrast": (autocontrast, [0.0] * N),
    "equalize": (equalize, [0.0] * N),
}


@pytest.mark.parametrize("operation", FORMULAS)
def test_operations_are_their_formulas(pictures, operation):
    formula, values = FORMULAS[operation]
    expected = np.stack([formula(x / 255, value) for x, value in zip(pictures, values, strict=True)])
    np.testing.assert_allclose(run(pictures, operation, values), expected, atol=3e-6, rtol=0)


PIL = {
    "brightness": (lambda x, f: ImageEnhance.Brightness(x).enhance(f), [0.0, 0.3, 1.0, 1.4, 1.9, 0.6], 1.01),
    "contrast": (lambda x, f: ImageEnhance.Contrast(x).enhance(f), [0.0, 0.3, 1.0, 1.4, 1.9, 0.6], 2.01),
    "color": (lambda x, f: ImageEnhance.Color(x).enhance(f), [0.0, 0.3, 1.0, 1.4, 1.9, 0.6], 2.01),
    "sharpness": (lambda x, f: ImageEnhance.Sharpness(x).enhance(f), [0.0, 0.3, 1.0, 1.4, 1.9, 0.6], 2.01),
    "grayscale": (lambda x, _: x.convert("L").convert("RGB"), [0.0] * N, 1.01),
    "posterize": (lambda x, bits: ImageOps.posterize(x, bits), [8, 7, 6, 5, 4, 1], 0.01),
    "solarize": (lambda x, t: ImageOps.solarize(x, t), [0, 40, 128, 200, 255, 256], 0.01),
    "autocontrast": (lambda x, _: ImageOps.autocontrast(x), [0.0] * N, 1.01),
    "equalize": (lambda x, _: ImageOps.equalize(x), [0.0] * N, 0.01),
}


@pytest.mark.parametrize("operation", PIL)
def test_operations_are_those_of_pil_but_for_rounding(pictures, operation):
    formula, values, levels = PIL[operation]
    expected = np.stack([formula(Image.fromarray(x), value) for x, value in zip(pictures, values, strict=True)])
    assert np.abs(255 * run(pictures, operation, values) - expected).max() < levels


def test_equalize_spreads_a_large_picture():
    """Pictures of few pixels stay as they are: the formula's test alone would not see much."""
    draw = np.random.default_rng(1)
    large = (draw.beta(2, 5, (1, 64, 64, 3)) * 200).astype(np.uint8)
    out = run(large, "equalize", [0.0])
    assert np.abs(255 * out[0] - np.asarray(ImageOps.equalize(Image.fromarray(large[0])))).max() < 0.01
    assert large.max() < 180 and out.max() == 1


def test_steps_touch_their_rows_alone_and_run_in_order(pictures):
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
    kept = pixels.clone()
    rows = np.array([4, 1])
    steps = [Step("brightness", rows, np.array([0.5, 2.0])), Step("solarize", rows[:1], np.array([60.0]))]
    out = apply_steps(pixels, steps)
    x = pixels.double() / 255
    x[4], x[1] = 0.5 * x[4], (2 * x[1]).clamp(0, 1)
    x[4] = torch.where(x[4] >= 60 / 255, 1 - x[4], x[4])
    torch.testing.assert_close(out.double(), x, atol=1e-6, rtol=0)
    assert torch.equal(pixels, kept)


def test_step_by_step_and_picture_by_picture_are_the_same(pictures):
    spec = AugmentSpec(ColorJitterSpec(prob=0.9), 0.3, 0.5, solarize=0.3, rand_augment=RandAugmentSpec(3, 12))
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).repeat(10, 1, 1, 1).float() / 255
    steps = draw_steps(spec, SIZE, Draws(0, 0, np.arange(len(x)), True), 0)
    assert len({step.operation for step in steps}) == 12
    difference = (augment._step_by_step(x.clone(), steps) - augment._picture_by_picture(x.clone(), steps)).abs()
    # sums are split in another way, and a level that lies between two may fall to the other one
    assert (difference > 1e-5).float().mean() < 1e-3


# --- warps ------------------------------------------------------------------------------------------------------------


def rand_steps(recipe, magnitude, count, **options):
    spec = AugmentSpec(rand_augment=RandAugmentSpec(magnitude=magnitude, recipe=recipe, **options))
    return draw_steps(spec, SIZE, Draws(5, 1, np.arange(count), True), 0)


def warped_steps(recipe):
    """Random pictures under each kind of warp: picture [S, S, 3], matrix [2, 3], our result."""
    draw = np.random.default_rng(3)
    for step in rand_steps(recipe, 7, 60, num_ops=1):
        if step.operation.startswith("warp"):
            pictures = draw.integers(0, 256, (len(step.rows), SIZE, SIZE, 3)).astype(np.uint8)
            yield from zip(pictures, step.values, run(pictures, step.operation, step.values), strict=True)


def test_warps_are_those_of_pil():
    seen = 0
    for picture, matrix, ours in warped_steps("torchvision"):
        back = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2].ravel().tolist()
        theirs = Image.fromarray(picture).transform((SIZE, SIZE), Image.Transform.AFFINE, back, Image.Resampling.NEAREST)
        # where a source lies on the border of two pixels, rounding decides
        assert (np.abs(255 * ours - np.asarray(theirs)).max(-1) > 0.01).mean() < 0.02
        seen += 1
    assert seen > 15


def test_bilinear_warps_are_their_formula():
    seen = 0
    for picture, matrix, ours in warped_steps("albef"):
        around = np.pad(picture / 255, ((1, 1), (1, 1), (0, 0)), constant_values=128 / 255)
        back = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))
        for i, j in itertools.product(range(SIZE), range(SIZE)):
            x, y, _ = back @ [j + 0.5, i + 0.5, 1] - 0.5
            x, y = np.clip(x, -1, SIZE - 1e-9), np.clip(y, -1, SIZE - 1e-9)
            left, top = math.floor(x), math.floor(y)
            (a, b), (c, d) = around[top + 1 : top + 3, left + 1 : left + 3]
            u, v = x - left, y - top
            expected = (1 - v) * ((1 - u) * a + u * b) + v * ((1 - u) * c + u * d)
            np.testing.assert_allclose(ours[i, j], expected, atol=2e-5)
        seen += 1
    assert seen > 8


@pytest.mark.parametrize("recipe", ["torchvision", "albef"])
def test_what_comes_in_from_outside(recipe):
    white = np.full((1, SIZE, SIZE, 3), 255, np.uint8)
    out = run(white, f"warp {recipe}", np.array([[[1, 0, 4], [0, 1, 0]]]))
    np.testing.assert_allclose(out[0, :, :4], 0 if recipe == "torchvision" else 128 / 255, atol=1e-6)
    np.testing.assert_allclose(out[0, :, 4:], 1, atol=1e-6)


def test_directions():
    """A bright spot goes where the matrix says, and a quarter turn is counterclockwise, as PIL's."""
    spot = np.zeros((1, SIZE, SIZE, 3), np.uint8)
    spot[0, 3, 15] = 255
    out = run(spot, "warp torchvision", np.array([[[1, 0, -5], [0, 1, 2]]]))
    assert np.argwhere(out[0, ..., 0]).tolist() == [[5, 10]]
    (step,) = [step for step in rand_steps("torchvision", 30, 400, num_ops=1) if is_rotation(step.values)]
    picture = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
    for matrix in step.values[:4]:
        degrees = math.degrees(math.atan2(matrix[0, 1], matrix[0, 0]))
        assert abs(degrees) == pytest.approx(30)
        theirs = np.asarray(Image.fromarray(picture).rotate(degrees))
        assert (np.abs(255 * run(picture[None], "warp torchvision", matrix[None])[0] - theirs).max(-1) > 0.01).mean() < 0.02


def is_rotation(matrices):
    return matrices.ndim == 3 and abs(matrices[0, 0, 0] - 1) > 1e-6


@pytest.mark.parametrize("recipe", ["torchvision", "albef"])
def test_masks_go_with_the_pixels(recipe):
    """A mask painted into the picture and warped is the mask warped, but for the blended border of the bilinear recipe."""
    steps = rand_steps(recipe, 8, 40, num_ops=3)
    draw = np.random.default_rng(0)
    masks = torch.from_numpy(draw.random((40, 1, SIZE // 4, SIZE // 4)) < 0.5).repeat_interleave(4, 2).repeat_interleave(4, 3)
    only = [step for step in steps if step.operation.startswith("warp")]
    painted = apply_steps((255 * masks).to(torch.uint8).expand(-1, 3, -1, -1).contiguous(), only)
    warped = warp_masks(masks.expand(-1, 2, -1, -1).clone(), steps)
    assert torch.equal(warped[:, 0], warped[:, 1])
    if recipe == "torchvision":
        assert torch.equal(painted[:, 0] > 0.5, warped[:, 0])
    else:
        inside = warp_masks(torch.ones_like(masks), steps)[:, 0]
        wrong = ((painted[:, 0] > 0.5) != warped[:, 0]) & inside
        assert wrong.float().mean() < 0.08
    assert not torch.equal(warped[:, :1], masks)


def test_the_recorded_warp_is_all_of_them():
    steps = rand_steps("torchvision", 20, 50, num_ops=4)
    total = total_warp(steps, 50, SIZE)
    points = np.random.default_rng(0).random((50, 2))
    x = points * SIZE
    for step in steps:
        if step.operation.startswith("warp"):
            x[step.rows] = np.einsum("nij,nj->ni", step.values[:, :, :2], x[step.rows]) + step.values[:, :, 2]
    np.testing.assert_allclose(np.einsum("nij,nj->ni", total[:, :, :2], points) + total[:, :, 2], x / SIZE, atol=1e-5)
    assert len(warps(steps, 50)) > 4 and total.dtype == np.float32


# --- drawing ----------------------------------------------------------------------------------------------------------


def shares(steps, count):
    return {step.operation: len(step.rows) / count for step in steps}


def test_probabilities_ranges_and_order():
    count = 4000
    spec = AugmentSpec(ColorJitterSpec(0.4, 0.3, 0.2, 0.1, prob=0.8), grayscale=0.2, blur=0.5, solarize=0.1)
    steps = draw_steps(spec, 64, Draws(0, 0, np.arange(count), True), 0)
    names = [step.operation for step in steps]
    assert names[-3:] == ["grayscale", "blur 6", "solarize"]
    for name, share in (("grayscale", 0.2), ("blur 6", 0.5), ("solarize", 0.1)):
        assert abs(shares(steps, count)[name] - share) < 4 * math.sqrt(share * (1 - share) / count)
    sigmas = steps[-2].values
    assert 0.1 <= sigmas.min() < 0.12 and 1.98 < sigmas.max() <= 2 and abs(sigmas.mean() - 1.05) < 0.06
    assert set(steps[-1].values) == {128.0}
    orders = {}
    for name, low, high in (("brightness", 0.6, 1.4), ("contrast", 0.7, 1.3), ("color", 0.8, 1.2), ("hue", -0.1, 0.1)):
        mine = [step for step in steps[:-3] if step.operation == name]
        rows = np.concatenate([step.rows for step in mine])
        values = np.concatenate([step.values for step in mine])
        assert len(rows) == len(set(rows.tolist())) and abs(len(rows) / count - 0.8) < 0.03
        assert low <= values.min() < low + 0.01 and high - 0.01 < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.05 * (high - low)
        orders[name] = set(rows.tolist())
    assert len({frozenset(rows) for rows in orders.values()}) == 1  # all four, or none
    sequences = {}
    for step in steps[:-3]:
        for row in step.rows.tolist():
            sequences.setdefault(row, []).append(step.operation)
    counts = {order: sum(tuple(s) == order for s in sequences.values()) for order in itertools.permutations(orders)}
    assert min(counts.values()) > 0.6 * len(sequences) / 24


def test_strong_jitter_does_not_go_below_zero():
    steps = draw_steps(AugmentSpec(ColorJitterSpec(3.0, 0, 0, 0, prob=1.0)), 64, Draws(0, 0, np.arange(500), True), 0)
    assert {step.operation for step in steps} == {"brightness"}
    values = np.concatenate([step.values for step in steps])
    assert 0 <= values.min() < 0.1 and 3.9 < values.max() <= 4


@pytest.mark.parametrize("recipe, kinds", [("torchvision", 14), ("albef", 10)])
def test_rand_augment_draws_every_operation_as_often(recipe, kinds):
    count = 6000
    steps = rand_steps(recipe, 10, count, num_ops=1)
    left = 1.0 if recipe == "torchvision" else 0.5
    parts = [len(step.rows) / count for step in steps]
    assert len(parts) == kinds - 1  # identity does nothing
    assert all(abs(part - left / kinds) < 4.5 * math.sqrt(left / kinds / count) for part in parts)
    rows = np.concatenate([step.rows for step in steps])
    assert len(set(rows.tolist())) == len(rows)
    pairs = rand_steps(recipe, 10, count, num_ops=2)
    assert abs(sum(len(step.rows) for step in pairs) / count - 2 * left * (kinds - 1) / kinds) < 0.06


def test_strengths_of_torchvision():
    s = 12 / 30
    steps = {(step.operation, i): step for i, step in enumerate(rand_steps("torchvision", 12, 3000, num_ops=1))}
    found = {name: step.values for (name, _), step in steps.items() if not name.startswith("warp")}
    for name in ("brightness", "color", "contrast", "sharpness"):
        assert set(np.round(found[name], 9)) == {round(1 - 0.9 * s, 9), round(1 + 0.9 * s, 9)}
        assert abs((found[name] > 1).mean() - 0.5) < 0.15
    assert set(found["posterize"]) == {8 - 2.0} and set(found["solarize"]) == {255 - 255 * s}
    amounts = [np.abs(step.values - np.eye(2, 3)).max((1, 2)) for (name, _), step in steps.items() if name.startswith("warp")]
    shift = math.floor(150 / 331 * SIZE * s)
    expected = [0.3 * s, 0.3 * s, shift, shift]
    for amount, value in zip(amounts, expected, strict=False):
        np.testing.assert_allclose(amount, value, atol=1e-12)
    assert len(amounts) == 5


def test_strengths_of_albef():
    steps = {(step.operation, i): step for i, step in enumerate(rand_steps("albef", 7, 3000, num_ops=1))}
    found = {name: step.values for (name, _), step in steps.items() if not name.startswith("warp")}
    assert found.keys() == {"autocontrast", "equalize", "brightness", "sharpness"}
    np.testing.assert_allclose(found["brightness"], 1.36)
    np.testing.assert_allclose(found["sharpness"], 1.36)
    amounts = [np.abs(step.values - np.eye(2, 3)).max((1, 2)) for (name, _), step in steps.items() if name.startswith("warp")]
    for amount, value in zip(amounts, [0.21, 0.21, 7, 7], strict=False):
        np.testing.assert_allclose(amount, value, atol=1e-12)
    rotated = [step.values for (name, _), step in steps.items() if name.startswith("warp") and is_rotation(step.values)]
    np.testing.assert_allclose(rotated[0][:, 0, 0], math.cos(math.radians(21)))
    assert {1, -1} == set(np.sign(rotated[0][:, 0, 1]))


def test_draws_depend_on_seed_epoch_index_and_view_alone():
    spec = AugmentSpec(ColorJitterSpec(), 0.5, 0.5, solarize=0.5, rand_augment=RandAugmentSpec())

    def per_sample(draws, first=0):
        out = {int(i): [] for i in draws.index}
        for step in draw_steps(spec, 64, draws, first):
            for row, value in zip(step.rows.tolist(), step.values, strict=True):
                out[int(draws.index[row])].append((step.operation, np.asarray(value).tolist()))
        return out

    index = np.arange(40)
    here = per_sample(Draws(1, 1, index, True))
    turned = per_sample(Draws(1, 1, index[::-1], True))
    assert all(here[i] == turned[i] for i in range(40))
    for other in (Draws(2, 1, index, True), Draws(1, 2, index, True)):
        assert sum(here[i] == per_sample(other)[i] for i in range(40)) < 4
    assert sum(here[i] == per_sample(Draws(1, 1, index, True), 1 << 16)[i] for i in range(40)) < 4


def test_nothing_to_do_is_nothing():
    assert is_empty(AugmentSpec()) and draw_steps(AugmentSpec(), 32, Draws(0, 0, np.arange(9), True), 0) == []
    for spec in (AugmentSpec(ColorJitterSpec()), AugmentSpec(grayscale=0.1), AugmentSpec(rand_augment=RandAugmentSpec())):
        assert not is_empty(spec)


@pytest.mark.parametrize(
    "spec, message",
    [
        (AugmentSpec(grayscale=1.2), r"augment.grayscale: .*1\.2"),
        (AugmentSpec(blur=-0.1), "augment.blur: "),
        (AugmentSpec(blur_sigma=[2.0, 0.1]), "blur_sigma"),
        (AugmentSpec(blur_sigma=[2.0]), "blur_sigma"),
        (AugmentSpec(blur=0.5, blur_sigma=[1.0, 11.0]), r"33 pixels, too far for a view of 32"),
        (AugmentSpec(ColorJitterSpec(hue=0.6)), r"hue.*0\.6"),
        (AugmentSpec(ColorJitterSpec(contrast=-1)), "contrast"),
        (AugmentSpec(ColorJitterSpec(brightness=math.nan)), "brightness"),
        (AugmentSpec(ColorJitterSpec(prob=2)), "prob"),
        (AugmentSpec(rand_augment=RandAugmentSpec(recipe="timm")), "recipe.*timm"),
        (AugmentSpec(rand_augment=RandAugmentSpec(magnitude=11, recipe="albef")), "0 to 10.*11"),
        (AugmentSpec(rand_augment=RandAugmentSpec(num_ops=0)), "num_ops"),
    ],
)
def test_wrong_specs_are_refused(spec, message):
    with pytest.raises(UserError, match=message):
        check(spec, 32)
