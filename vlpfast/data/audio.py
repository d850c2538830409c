"""Sounds as a modality: what is heard of each is planned on the host, threads read no more than that, and everything after it
(resampling, padding, log-mel, masks) is done to the whole batch where it lies.

The member is a sound file or a video file, of which the first sound track counts: by soundfile (WAV, FLAC, Ogg, MP3) or, in the
containers of videos, by PyAV.
"""

from __future__ import annotations

import contextlib
import io
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlpfast.data import streams
from vlpfast.data.mel import LogMel, mask_spans, reach, resample, resampled_length
from vlpfast.data.modality import Draws
from vlpfast.data.order import uniform
from vlpfast.data.pictures import DamagedSample, results
from vlpfast.types import AudioSpec, UserError

try:
    import soundfile
except ImportError:
    soundfile = None

_DRAW = 1 << 21  # of a sample's draws, those from here on belong to its sound: the place of the cut, then the masks
_RATES = (1000, 768_000)  # Hz; a header that says something else is not to be believed
_BLOCK = 1 << 20
_CONTAINERS = (b"\x1aE\xdf\xa3",)  # Matroska, WebM


class SoundInfo(NamedTuple):
    track: streams.SoundTrack
    first: int  # of the samples, where the sound begins ...
    count: int  # ... and how many are its own


@dataclass
class _Batch:
    rows: list[Future[np.ndarray]]  # float32, at the rate of the file, from reach() samples before the cut to as many after it
    rates: list[int]
    lengths: Tensor  # [B, 1] int64 samples that hold sound, at the rate of the spec
    masks: list[tuple[int, Tensor, Tensor]]  # dim, starts [B, M], widths [B, M]


class AudioModality:
    """Batch["audio"], and "audio_length" beside it. See modality.Modality."""

    members = ("wav", "flac", "ogg", "opus", "mp3", "m4a", "mp4", "webm", "mkv", "avi", "mov")

    def __init__(self, spec: AudioSpec, threads: int, batch_size: int, device: torch.device):
        _check(spec)
        if soundfile is None:
            raise UserError("sounds need soundfile: pip install vlpfast[audio]")
        self._spec, self._device = spec, device
        self._samples = round(spec.seconds * spec.sample_rate)
        self._log_mel = self._frames = None
        if spec.features == "log_mel":
            self._log_mel = LogMel(spec, device)
            self._frames = self._samples // spec.hop + (not spec.drop_last_frame)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="vlpfast-audio")
        self._submitted: deque[_Batch] = deque()

    def inspect(self, content: np.ndarray | None, record: dict[str, Any]) -> SoundInfo:
        if content is None:
            raise DamagedSample(f"no sound (a member {', '.join(self.members)})")
        begin, end = streams.json_interval(record, self._spec.interval)
        track = _track(content.tobytes())
        if not _RATES[0] <= track.rate <= _RATES[1]:
            raise DamagedSample(f"a sample rate of {track.rate} Hz, expected {_RATES[0]} .. {_RATES[1]}")
        if track.samples < 1:
            raise DamagedSample("the file holds no sound")
        first, last = (min(track.samples, round(min(time, 1e12) * track.rate)) for time in (begin, end))
        if first >= last:
            raise DamagedSample(f"no sound in {begin} .. {end} s: it ends at {track.samples / track.rate:.3f} s")
        if self._length(last - first, track.rate) < 1:
            raise DamagedSample(f"{last - first} samples at {track.rate} Hz are shorter than one frame")
        return SoundInfo(track, first, last - first)

    def submit(
        self, contents: list[np.ndarray], infos: list[SoundInfo], records: list[dict[str, Any]], draws: Draws
    ) -> dict[str, Any]:
        rates = [info.track.rate for info in infos]
        needed = [-(-self._samples * rate // self._spec.sample_rate) for rate in rates]  # at the rate of the file
        spare = np.array([max(0, info.count - need) for info, need in zip(infos, needed, strict=True)])
        starts = spare // 2
        if draws.train:
            starts = (uniform(draws.seed, draws.epoch, draws.index, _DRAW) * (spare + 1)).astype(np.int64)
        rows = [
            self._pool.submit(self._waveform, content, info, start, need)
            for content, info, start, need in zip(contents, infos, starts.tolist(), needed, strict=True)
        ]
        kept = [min(info.count, need) for info, need in zip(infos, needed, strict=True)]
        samples = [self._kept(count, rate) for count, rate in zip(kept, rates, strict=True)]
        self._submitted.append(
            _Batch(rows, rates, torch.tensor(samples)[:, None], self._masks(draws) if draws.train and self._log_mel else [])
        )
        return {"audio_length": torch.tensor([self._length(count, rate) for count, rate in zip(kept, rates, strict=True)])}

    def receive(self) -> dict[str, Tensor]:
        batch = self._submitted.popleft()
        rows = results(batch.rows)
        x = torch.empty(len(rows), self._samples, device=self._device)
        for rate in sorted(set(batch.rates)):
            places = [place for place, other in enumerate(batch.rates) if other == rate]
            same = torch.from_numpy(np.stack([rows[place] for place in places])).to(self._device)
            x[torch.tensor(places, device=self._device)] = resample(same, rate, self._spec.sample_rate, self._samples)
        x = self._padded(x, batch.lengths.to(self._device))
        if self._spec.int16:
            x = (x.clamp(-1, 1) * 32767).trunc() / 32767
        if self._log_mel is None:
            return {"audio": x}
        values = self._log_mel(x)
        for dim, starts, widths in batch.masks:
            mask_spans(values, starts.to(self._device), widths.to(self._device), dim, self._spec.mask_value)
        return {"audio": values}

    def reset(self) -> None:
        for batch in self._submitted:
            for future in batch.rows:
                future.cancel()
        self._submitted.clear()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _kept(self, count: int, rate: int) -> int:
        return min(self._samples, resampled_length(count, rate, self._spec.sample_rate))

    def _length(self, count: int, rate: int) -> int:
        """Batch["audio_length"] of `count` samples of the file: samples, or the frames that they would have without padding."""
        samples = self._kept(count, rate)
        if self._spec.pad != "zeros":
            samples = self._samples if self._spec.pad == "repeat" else self._samples // samples * samples
        if self._spec.features == "waveform":
            return samples
        return min(self._frames, samples // self._spec.hop + (not self._spec.drop_last_frame))

    def _padded(self, x: Tensor, lengths: Tensor) -> Tensor:
        """x [B, S], of whose rows the first lengths [B, 1] samples count."""
        places = torch.arange(self._samples, device=x.device).expand_as(x)
        if self._spec.pad == "zeros":
            return x.masked_fill(places >= lengths, 0.0)
        repeated = x.gather(1, places % lengths)
        return repeated if self._spec.pad == "repeat" else repeated.masked_fill(places >= self._samples // lengths * lengths, 0.0)

    def _masks(self, draws: Draws) -> list[tuple[int, Tensor, Tensor]]:
        spec, masks, first = self._spec, [], _DRAW + 1
        for dim, size, count, most in (
            (2, self._frames, spec.time_masks, spec.time_mask_width),
            (1, spec.n_mels, spec.mel_masks, spec.mel_mask_width),
        ):
            numbers = first + np.arange(2 * count)
            u = uniform(draws.seed, draws.epoch, draws.index[:, None], numbers).reshape(len(draws.index), count, 2)
            widths = (u[..., 0] * (most + 1)).astype(np.int64)
            starts = (u[..., 1] * (size - widths + 1)).astype(np.int64)
            masks.append((dim, torch.from_numpy(starts), torch.from_numpy(widths)))
            first += 2 * count
        return masks

    def _waveform(self, content: np.ndarray, info: SoundInfo, start: int, count: int) -> np.ndarray:
        """-> float32 [reach + count + reach]: the cut, what is around it, and zeros beyond the sound's ends"""
        around = reach(info.track.rate, self._spec.sample_rate)
        low, high = max(0, start - around), min(info.count, start + count + around)
        data = content.tobytes()
        samples = _read(data, info.track, info.first + low, high - low)
        if not np.isfinite(samples).all():
            raise DamagedSample("the samples hold NaN or infinite values")
        if not (self._spec.keep_silence or samples.any() or _any_sound(data)):
            raise DamagedSample("the sound is silent: every sample is zero")
        row = np.zeros(count + 2 * around, np.float32)
        row[low - start + around : high - start + around] = samples
        return row


def _check(spec: AudioSpec) -> None:
    for name, known in (
        ("features", ("log_mel", "waveform")),
        ("pad", ("zeros", "repeat", "repeat_zeros")),
        ("mel_scale", ("slaney", "htk")),
        ("mel_norm", ("slaney", "none")),
        ("log", ("log10", "db", "ln")),
    ):
        if getattr(spec, name) not in known:
            raise UserError(f"audio.{name}: expected one of {', '.join(known)}, got {getattr(spec, name)!r}")
    _check_range(spec, "sample_rate", *_RATES)
    _check_range(spec, "seconds", 1 / spec.sample_rate, float("inf"))
    if len(spec.interval) not in (0, 2):
        raise UserError(f"audio.interval: expected the names of two fields of the JSON, got {list(spec.interval)}")
    if spec.features == "waveform":
        if spec.time_masks or spec.mel_masks:
            raise UserError("audio.time_masks, audio.mel_masks: expected 0 for a waveform")
        return
    samples = round(spec.seconds * spec.sample_rate)
    for name, *bounds in (
        ("n_fft", 2, 2 * samples - 1),  # the reflected ends are half of it
        ("win", 1, spec.n_fft),
        ("hop", 1, samples),
        ("n_mels", 1, float("inf")),
        ("f_min", 0, float("inf")),
        ("f_max", spec.f_min + 1, spec.sample_rate / 2),
        ("floor", 1e-30, float("inf")),
        ("dynamic_range", 0, float("inf")),
        ("time_masks", 0, float("inf")),
        ("mel_masks", 0, float("inf")),
        ("mel_mask_width", 0, spec.n_mels),
    ):
        _check_range(spec, name, *bounds)
    _check_range(spec, "time_mask_width", 0, samples // spec.hop)


def _check_range(spec: AudioSpec, name: str, low: float, high: float) -> None:
    if not low <= (value := getattr(spec, name)) <= high:
        expected = f"at least {low}" if high == float("inf") else f"{low} .. {high}"
        raise UserError(f"audio.{name}: expected {expected}, got {value}")


# --- files ------------------------------------------------------------------------------------------------------------------


def _in_container(data: bytes) -> bool:
    return data.startswith(_CONTAINERS) or data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide") or data[8:12] == b"AVI "


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Any]:
    if not data:
        raise DamagedSample("the file is empty")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            yield file
    except (soundfile.SoundFileError, RuntimeError, ValueError) as error:  # ValueError: a seek went past the end
        raise DamagedSample(f"libsndfile: {getattr(error, 'error_string', error)}") from error


def _track(data: bytes) -> streams.SoundTrack:
    if _in_container(data):
        streams.need_av()
        return streams.sound_track(data)
    stated = int.from_bytes(data[4:8], "little")
    if data[:4] == b"RIFF" and len(data) < stated + 8 and stated < 0x7FFFF000:  # more is what a program writes that cannot know
        raise DamagedSample(f"the file is cut short: {len(data)} of {stated + 8} bytes are there")
    with _opened(data) as file:
        if file.frames > 0 and not _has_sample(file, file.frames - 1):
            raise DamagedSample(f"the file is cut short or broken: the last of {file.frames} samples cannot be reached")
        return streams.SoundTrack(file.samplerate, file.frames)


def _has_sample(file: Any, place: int) -> bool:
    try:
        file.seek(place)
        return len(file.read(1)) == 1
    except (soundfile.SoundFileError, ValueError):
        return False


def _read(data: bytes, track: streams.SoundTrack, first: int, count: int) -> np.ndarray:
    """The mean of all channels, float32 [count]."""
    if _in_container(data):
        return streams.sound(data, track, first, count)
    with _opened(data) as file:
        file.seek(first)
        samples = file.read(count, dtype="float32", always_2d=True)
    if len(samples) != count:
        raise DamagedSample(f"the file is cut short: it ends {count - len(samples)} samples early")
    return samples.mean(axis=1)


def _any_sound(data: bytes) -> bool:
    """Whether anything of the file can be heard: what counts as silent must not depend on the place of the cut."""
    if _in_container(data):
        return streams.any_sound(data)
    with _opened(data) as file:
        return any(block.any() for block in file.blocks(_BLOCK, dtype="float32"))
