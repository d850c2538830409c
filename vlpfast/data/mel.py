"""Batches of waveforms on any device: resampling, log-mel spectrograms, masks over them."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vlpfast.types import AudioSpec

_CROSSINGS, _BETA, _ROLLOFF = 24, 9.0, 0.94  # of the windowed sinc: zeros on each side, Kaiser's beta, pass band over Nyquist's
_LARGEST_KERNEL = 1 << 21  # numbers; rates without a common divisor have thousands of phases and go another way,
_CHUNK = 1 << 22  # so many at a time


def _exact(device: torch.device) -> torch.dtype:
    """float64 on GPUs, where products in float32 may be taken in TF32, of ten bits."""
    return torch.float64 if device.type == "cuda" else torch.float32


def reach(rate: int, new_rate: int) -> int:
    """Samples on either side that one sample at the new rate is made from; 0 if the rates are the same."""
    return 0 if rate == new_rate else math.ceil(_CROSSINGS / (_ROLLOFF * min(1.0, new_rate / rate)))


def resampled_length(samples: int, rate: int, new_rate: int) -> int:
    return -(-samples * new_rate // rate)


def _weights(fraction: Tensor, rate: int, new_rate: int) -> Tensor:
    """Kaiser-windowed sinc (Smith, "Digital Audio Resampling"): fraction float64 [K], the place of each output between two inputs
    -> float64 [K, 2 * reach], what the inputs from `reach - 1` before to `reach` after it weigh; rows sum to one."""
    width = reach(rate, new_rate)
    cutoff = _ROLLOFF * min(1.0, new_rate / rate)
    t = torch.arange(1 - width, width + 1, device=fraction.device) - fraction[:, None]
    inside = (1 - (t * cutoff / _CROSSINGS).square()).clamp(min=0)
    weights = torch.sinc(cutoff * t) * torch.special.i0(_BETA * inside.sqrt()) * (inside > 0)
    return weights / weights.sum(dim=1, keepdim=True)


@lru_cache(maxsize=16)
def _kernel(rate: int, new_rate: int) -> Tensor:
    """float64 [new, 1, rate + 2 * reach - 1]: the weights of `new` outputs, shifted to where their inputs begin."""
    phase = torch.arange(new_rate)
    weights = _weights((phase * rate % new_rate).to(torch.float64) / new_rate, rate, new_rate)
    kernel = torch.zeros(new_rate, rate + weights.shape[1] - 1, dtype=torch.float64)
    kernel.scatter_(1, (phase * rate // new_rate)[:, None] + torch.arange(weights.shape[1]), weights)
    return kernel[:, None]


def resample(x: Tensor, rate: int, new_rate: int, count: int) -> Tensor:
    """x float32 [B, n], whose first reach() samples are what is before the beginning -> [B, count]: output k is the band-limited
    signal at the time k / new_rate. Past the end of x: zeros."""
    if rate == new_rate:
        return F.pad(x, (0, max(0, count - x.shape[1])))[:, :count]
    divisor = math.gcd(rate, new_rate)
    rate, new_rate = rate // divisor, new_rate // divisor
    width = reach(rate, new_rate)
    blocks = -(-count // new_rate)
    x = F.pad(x, (-1, max(0, blocks * rate + 2 * width - x.shape[1])))  # the first sample that weighs is `reach - 1` before
    if new_rate * (rate + 2 * width) <= _LARGEST_KERNEL:
        dtype = _exact(x.device)
        y = F.conv1d(x[:, None].to(dtype), _kernel(rate, new_rate).to(x.device, dtype), stride=rate)  # [B, new, >= blocks]
        return y[..., :blocks].transpose(1, 2).flatten(1)[:, :count].to(x.dtype)
    parts = []
    for k in torch.arange(count, device=x.device).split(max(1, _CHUNK // (len(x) * 2 * width))):
        taps = (k * rate // new_rate)[:, None] + torch.arange(2 * width, device=x.device)
        weights = _weights((k * rate % new_rate).to(torch.float64) / new_rate, rate, new_rate)
        parts.append((x[:, taps] * weights.to(x.dtype)).sum(dim=-1))
    return torch.cat(parts, dim=1)


def _to_mel(frequency: np.ndarray, scale: str) -> np.ndarray:
    if scale == "htk":
        return 2595 * np.log10(1 + frequency / 700)
    linear = frequency * 3 / 200  # Slaney's: 200/3 Hz a mel up to 1 kHz, then 27 mels for each factor of 6.4
    return np.where(frequency < 1000, linear, 15 + 27 * np.log(np.maximum(frequency, 1000) / 1000) / np.log(6.4))


def _from_mel(mel: np.ndarray, scale: str) -> np.ndarray:
    if scale == "htk":
        return 700 * (10 ** (mel / 2595) - 1)
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((np.maximum(mel, 15) - 15) * np.log(6.4) / 27))


def mel_filters(spec: AudioSpec) -> np.ndarray:
    """Triangles over equal steps of the mel scale, float64 [n_fft // 2 + 1, n_mels]."""
    low, high = _to_mel(np.array([spec.f_min, spec.f_max]), spec.mel_scale)
    edges = _from_mel(np.linspace(low, high, spec.n_mels + 2), spec.mel_scale)
    bins = np.arange(spec.n_fft // 2 + 1)[:, None] * spec.sample_rate / spec.n_fft
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    filters = np.maximum(0, np.minimum(rising, falling))
    return filters * 2 / (edges[2:] - edges[:-2]) if spec.mel_norm == "slaney" else filters


class LogMel:
    """waveform float32 [B, S] -> [B, n_mels, T] float32, as AudioSpec describes it."""

    def __init__(self, spec: AudioSpec, device: torch.device):
        self._spec = spec
        self._window = torch.hann_window(spec.win).to(device)  # made on the host: the calls may run on another stream than this
        self._filters = torch.from_numpy(mel_filters(spec).T.copy()).to(device, _exact(device))

    def __call__(self, waveform: Tensor) -> Tensor:
        spec = self._spec
        spectrum = torch.stft(waveform, spec.n_fft, spec.hop, spec.win, self._window, return_complex=True)
        if spec.drop_last_frame:
            spectrum = spectrum[..., :-1]
        power = spectrum.real.square() + spectrum.imag.square()  # [B, n_fft // 2 + 1, T]
        mel = (self._filters @ power.to(self._filters.dtype)).to(waveform.dtype).clamp_(min=spec.floor)
        values = mel.log() if spec.log == "ln" else mel.log10().mul_(10 if spec.log == "db" else 1)
        if spec.dynamic_range:
            values = torch.maximum(values, values.amax(dim=(1, 2), keepdim=True) - spec.dynamic_range)
        return values.add_(spec.shift).mul_(spec.scale)


def mask_spans(values: Tensor, starts: Tensor, widths: Tensor, dim: int, fill: float) -> Tensor:
    """values [B, n_mels, T]; of each row the spans [B, M] along `dim` (1 or 2) are set to `fill`, in place."""
    places = torch.arange(values.shape[dim], device=values.device)
    inside = ((places >= starts[..., None]) & (places < (starts + widths)[..., None])).any(dim=1)  # [B, n_mels or T]
    return values.masked_fill_(inside.unsqueeze(3 - dim), fill)
