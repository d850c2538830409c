"""What videos, sounds and volumes say of themselves, and whether they can be read."""

from __future__ import annotations

import importlib
from typing import Any, BinaryIO

import numpy as np

from vlpfast.data.pictures import DamagedSample
from vlpfast.types import UserError


def video_info(file: BinaryIO) -> dict[str, Any]:
    """duration in seconds, width, height, fps, frames (0: the file does not say) of the first video stream, whose first frame
    is decoded. Raises DamagedSample."""
    av = require("av", "video")
    try:
        with av.open(file) as container:
            if not container.streams.video:
                raise DamagedSample("the file has no video stream")
            stream = container.streams.video[0]
            if next(container.decode(stream), None) is None:
                raise DamagedSample("the video has no frame")
            seconds = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / av.time_base
            return {
                "duration": round(float(seconds), 3),
                "width": stream.width,
                "height": stream.height,
                "fps": round(float(stream.average_rate or 0), 3),
                "frames": stream.frames,
            }
    except (av.FFmpegError, ValueError) as error:
        raise DamagedSample(f"the video cannot be read: {error}") from error


def audio_info(file: BinaryIO) -> dict[str, Any]:
    """duration in seconds, rate in Hz, channels; the last sample is read, so a file cut short is found. Raises DamagedSample."""
    soundfile = require("soundfile", "audio")
    try:
        with soundfile.SoundFile(file) as sound:
            if not sound.frames:
                raise DamagedSample("the sound has no samples")
            sound.seek(sound.frames - 1)
            if len(sound.read(1)) != 1:
                raise DamagedSample("the sound ends before its last sample")
            duration = round(sound.frames / sound.samplerate, 3)
            return {"duration": duration, "rate": sound.samplerate, "channels": sound.channels}
    except soundfile.SoundFileError as error:
        raise DamagedSample(f"the sound cannot be read: {error}") from error


def volume_info(file: BinaryIO) -> dict[str, Any]:
    """shape [D, H, W]; every slice is unpacked. Raises DamagedSample."""
    store = volume_file()
    content = np.frombuffer(file.read(), np.uint8)
    info, one = store.read_header(content), np.zeros(1, np.int64)
    for read in (store.read_slices, store.read_labels)[: 1 + info.labels]:
        read(content, info, np.arange(info.shape[0]), one, one)
    return {"shape": list(info.shape)}


def volume_file() -> Any:
    """The reader of the member `vol`."""
    try:
        return importlib.import_module("vlpfast.data.volume_file")
    except ImportError as error:
        raise MissingPackage(f"this version of vlpfast cannot read volumes: {error}") from error


class MissingPackage(UserError):
    pass


def require(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingPackage(f"this needs the package {package}: pip install 'vlpfast[{extra}]' ({error})") from error
