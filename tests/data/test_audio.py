import io
import os
import re

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("soundfile")
import soundfile
from media import clip, damaged_copies, mux_sound, sound_file, wave

from vlpfast.data import audio, streams
from vlpfast.data.audio import AudioModality
from vlpfast.data.mel import LogMel, mel_filters, reach, resample, resampled_length
from vlpfast.data.modality import Draws
from vlpfast.data.order import uniform
from vlpfast.data.pictures import DamagedBatch, DamagedSample
from vlpfast.types import AudioSpec, UserError

FUZZ = int(os.environ.get("VLPFAST_FUZZ", "12"))  # damaged copies of each file; more for a longer search
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def closed(monkeypatch):
    """No modality leaves its threads behind."""
    made, init = [], AudioModality.__init__

    def noted(self, *arguments):
        init(self, *arguments)
        made.append(self)

    monkeypatch.setattr(AudioModality, "__init__", noted)
    yield
    for one in made:
        one.close()


def modality(threads=1, **options):
    return AudioModality(AudioSpec(**{"sample_rate": 8000, "seconds": 0.5, "features": "waveform", **options}), threads, 4, CPU)


def mel_modality(**options):
    return modality(**{"features": "log_mel", "n_fft": 256, "win": 256, "hop": 80, "n_mels": 20, "f_max": 4000.0, **options})


def stored(samples, rate=8000, kind="WAV", subtype="FLOAT"):
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=kind, subtype=subtype if kind == "WAV" else None)
    return np.frombuffer(stream.getvalue(), np.uint8)


def draws(count, train=True, seed=3, epoch=1):
    return Draws(seed, epoch, 10 + np.arange(count), train)


def batch_of(modality, files, records=None, train=True, **options):
    records = records or [{}] * len(files)
    infos = [modality.inspect(file, record) for file, record in zip(files, records, strict=True)]
    fields = modality.submit(files, infos, records, draws(len(files), train, **options))
    return fields | modality.receive()


# --- the presets ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_mels", [80, 128])
def test_whisper_equals_transformers(n_mels):
    from transformers import WhisperFeatureExtractor

    extract = WhisperFeatureExtractor(feature_size=n_mels, chunk_length=4)
    sounds = [wave(64000, 16000, 1), wave(23456, 16000, 2), 1e-3 * wave(40000, 16000, 3)]
    want = extract([s.astype(np.float32) for s in sounds], sampling_rate=16000, return_tensors="np", return_attention_mask=True)
    spec = AudioSpec.whisper(n_mels, seconds=4.0)
    fields = batch_of(AudioModality(spec, 1, 3, CPU), [stored(s, 16000) for s in sounds])
    assert fields["audio"].shape == (3, n_mels, 400)
    np.testing.assert_allclose(fields["audio"], want["input_features"], atol=2e-5)
    assert fields["audio_length"].tolist() == [len(s) // 160 for s in sounds]


def test_whisper_of_silence_and_of_thirty_seconds():
    spec = AudioSpec.whisper()
    spec.keep_silence = True
    fields = batch_of(AudioModality(spec, 1, 1, CPU), [stored(np.zeros(160000), 16000)])
    assert fields["audio"].shape == (1, 80, 3000) and fields["audio_length"].tolist() == [1000]
    assert (fields["audio"] == -1.5).all()


@pytest.mark.parametrize("samples", [480000, 100000, 300001])
def test_clap_equals_transformers(samples):
    from transformers import ClapFeatureExtractor

    extract = ClapFeatureExtractor(frequency_min=50, truncation="rand_trunc", padding="repeatpad")
    sound = (wave(samples, 48000) + np.random.default_rng(0).normal(0, 0.01, samples)).astype(np.float32)
    want = extract(sound, sampling_rate=48000, return_tensors="np")["input_features"][0, 0].T
    fields = batch_of(AudioModality(AudioSpec.clap(), 1, 1, CPU), [stored(sound, 48000)])
    assert fields["audio"].shape == (1, 64, 1001)
    np.testing.assert_allclose(fields["audio"][0], want, atol=2e-2)
    assert (fields["audio"][0].numpy() - want).std() < 1e-3
    assert fields["audio_length"].tolist() == [480000 // samples * samples // 480 + 1]


@pytest.mark.parametrize("norm", ["slaney", "none"])
@pytest.mark.parametrize("scale", ["slaney", "htk"])
@pytest.mark.parametrize(("n_fft", "rate", "n_mels", "low", "high"), [(400, 16000, 80, 0, 8000), (1028, 44100, 64, 50, 14000)])
def test_filters_equal_transformers(n_fft, rate, n_mels, low, high, scale, norm):
    from transformers.audio_utils import mel_filter_bank

    named = None if norm == "none" else norm
    want = mel_filter_bank(n_fft // 2 + 1, n_mels, low, high, rate, norm=named, mel_scale=scale)
    spec = AudioSpec(sample_rate=rate, n_fft=n_fft, n_mels=n_mels, f_min=low, f_max=high, mel_scale=scale, mel_norm=norm)
    np.testing.assert_allclose(mel_filters(spec), want, atol=1e-9)


def written_out(x, spec):
    """The spectrogram as its definition says it, float64, frame by frame."""
    x = np.pad(x, spec.n_fft // 2, mode="reflect")
    window = np.zeros(spec.n_fft)
    first = (spec.n_fft - spec.win) // 2
    window[first : first + spec.win] = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(spec.win) / spec.win)
    n, k = np.arange(spec.n_fft), np.arange(spec.n_fft // 2 + 1)
    basis = np.exp(-2j * np.pi * np.outer(k, n) / spec.n_fft)
    columns = []
    for start in range(0, len(x) - spec.n_fft + 1, spec.hop):
        power = np.abs(basis @ (window * x[start : start + spec.n_fft])) ** 2
        columns.append(np.maximum(mel_filters(spec).T @ power, spec.floor))
    values = np.array(columns).T
    if spec.drop_last_frame:
        values = values[:, :-1]
    values = {"log10": np.log10, "db": lambda v: 10 * np.log10(v), "ln": np.log}[spec.log](values)
    if spec.dynamic_range:
        values = np.maximum(values, values.max() - spec.dynamic_range)
    return (values + spec.shift) * spec.scale


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"log": "db", "win": 200, "hop": 100},
        {"log": "ln", "floor": 1e-5, "mel_scale": "htk", "mel_norm": "none", "f_min": 60.0, "f_max": 3000.0},
        {"dynamic_range": 2.0, "shift": 4.0, "scale": 0.25, "drop_last_frame": True, "n_fft": 255, "win": 255},
    ],
)
def test_the_spectrogram_is_its_definition(options):
    showing = mel_modality(**options)
    sound = wave(4000, 8000) + np.random.default_rng(0).normal(0, 0.01, 4000)
    fields = batch_of(showing, [stored(sound), stored(0.1 * sound[:2000])])
    short = np.pad(0.1 * sound[:2000], (0, 2000))
    for row, x in zip(fields["audio"], (sound, short), strict=True):
        want = written_out(x.astype(np.float32).astype(np.float64), showing._spec)
        assert row.shape == want.shape
        np.testing.assert_allclose(row, want, atol=2e-3)


# --- resampling ----------------------------------------------------------------------------------------------------------------

RATES = [(48000, 16000), (44100, 16000), (8000, 16000), (44100, 48000), (22050, 8000), (96000, 44100), (16000, 16001)]


@pytest.mark.parametrize(("rate", "new"), RATES)
def test_resampled_tones(rate, new):
    """What both rates can hold comes out as it was, what the new one cannot hold does not come out at all."""
    around, count = reach(rate, new), new // 4
    t = (np.arange(rate // 4 + 2 * around) - around) / rate
    nyquist = min(rate, new) / 2
    for frequency, tolerance in ((0.0, 1e-6), (0.01, 1e-4), (0.5, 1e-4), (0.8, 1e-3)):
        tone = torch.tensor(np.cos(2 * np.pi * frequency * nyquist * t + 0.3), dtype=torch.float32)[None]
        want = np.cos(2 * np.pi * frequency * nyquist * np.arange(count) / new + 0.3)
        np.testing.assert_allclose(resample(tone, rate, new, count)[0], want, atol=tolerance)
    if new < rate:
        tone = torch.tensor(np.cos(2 * np.pi * 1.15 * nyquist * t), dtype=torch.float32)[None]
        assert resample(tone, rate, new, count).abs().max() < 1e-4


@pytest.mark.parametrize(("rate", "new"), RATES)
def test_resampling_is_its_definition(rate, new):
    """Each output by its own sum over all inputs, in float64."""
    around = reach(rate, new)
    x = np.random.default_rng(0).normal(size=(2, 800 + 2 * around))
    count = resampled_length(800, rate, new)
    got = resample(torch.tensor(x, dtype=torch.float32), rate, new, count)
    assert got.shape == (2, count)
    cutoff = 0.94 * min(1, new / rate)
    for k in (0, 1, count // 3, count - 1):
        t = np.arange(x.shape[1]) - around - k * rate / new
        weights = np.sinc(cutoff * t) * np.i0(9 * np.sqrt(np.clip(1 - (t * cutoff / 24) ** 2, 0, None))) * (abs(t * cutoff) < 24)
        np.testing.assert_allclose(got[:, k], (x * weights).sum(1) / weights.sum(), atol=2e-5)


def test_both_ways_of_resampling_agree(monkeypatch):
    from vlpfast.data import mel

    x = torch.randn(3, 4000, generator=torch.Generator().manual_seed(0))
    by_kernel = resample(x, 44100, 16000, 1300)
    monkeypatch.setattr(mel, "_LARGEST_KERNEL", 0)
    monkeypatch.setattr(mel, "_CHUNK", 7000)
    np.testing.assert_allclose(resample(x, 44100, 16000, 1300), by_kernel, atol=1e-5)
    monkeypatch.undo()
    monkeypatch.setattr(mel, "_exact", lambda device: torch.float64)  # as on a GPU
    exact = resample(x, 44100, 16000, 1300)
    assert exact.dtype == torch.float32
    np.testing.assert_allclose(exact, by_kernel, atol=1e-5)
    spec = AudioSpec(n_mels=20)
    in_doubles = LogMel(spec, CPU)(x)
    assert in_doubles.dtype == torch.float32
    monkeypatch.undo()
    np.testing.assert_allclose(in_doubles, LogMel(spec, CPU)(x), atol=1e-4)


def test_a_cut_is_resampled_with_what_is_around_it():
    """The middle of a long sound at another rate equals the same stretch of the whole of it, resampled."""
    sound = wave(44100, 44100).astype(np.float32)
    fields = batch_of(modality(sample_rate=16000, seconds=0.25), [stored(sound, 44100)], train=False)
    around, start = reach(44100, 16000), (44100 - 11025) // 2
    t = (start + np.arange(4000) * 44100 / 16000) / 44100
    assert around < start
    assert fields["audio"].shape == (1, 4000) and fields["audio_length"].tolist() == [4000]
    whole = wave_at(t)
    np.testing.assert_allclose(fields["audio"][0], whole, atol=1e-4)


def wave_at(t, seed=0):
    """wave(), at any times."""
    draw = np.random.default_rng(seed)
    tones = sum(np.sin(2 * np.pi * f * t + p) for f, p in zip(draw.uniform(100, 2500, 7), draw.uniform(0, 6, 7), strict=True))
    return 0.1 * tones * (0.6 + 0.4 * np.sin(2 * np.pi * 0.7 * t))


# --- files ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "tolerance"), [("WAV", 1e-6), ("FLAC", 1e-4), ("OGG", 0.06), ("MP3", 0.06)])
def test_sound_files(kind, tolerance):
    sound = wave(16000, 8000)
    fields = batch_of(modality(seconds=2.0), [stored(sound, 8000, kind)])
    np.testing.assert_allclose(fields["audio"][0], sound, atol=tolerance)
    fields = batch_of(modality(seconds=0.5), [stored(sound, 8000, kind)], train=False)
    np.testing.assert_allclose(fields["audio"][0], sound[6000:10000], atol=tolerance)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "DOUBLE"])
def test_sample_formats(subtype):
    sound = wave(4000, 8000)
    fields = batch_of(modality(), [stored(sound, subtype=subtype)])
    np.testing.assert_allclose(fields["audio"][0], sound, atol=1 / 120 if subtype == "PCM_U8" else 1e-4)


@pytest.mark.parametrize(
    ("container", "codec", "rate"),
    [
        ("mp4", "aac", 16000),
        ("matroska", "flac", 44100),
        ("webm", "libopus", 48000),
        ("mov", "pcm_s16le", 8000),
        ("mov", "pcm_u8", 8000),
        ("mov", "pcm_f32le", 8000),
    ],
)
def test_sound_tracks_of_containers(container, codec, rate):
    sound = wave(2 * rate, rate)
    data = sound_file(sound, rate, container, codec)
    track = streams.sound_track(data)
    assert track.rate == rate and abs(track.samples - 2 * rate) < 0.01 * rate
    whole = streams.sound(data, track, 0, 2 * rate)
    inner = slice(rate // 10, -rate // 10)
    assert np.abs(whole[inner] - sound[inner]).max() < (0.1 if codec in ("aac", "libopus") else 0.01)
    part = streams.sound(data, track, rate, rate // 2)  # containers that count milliseconds may be one off
    lags = range(-rate // 800, rate // 800)
    assert min(np.abs(part - whole[rate + lag : rate + lag + rate // 2]).max() for lag in lags) < 0.02
    beyond = streams.sound(data, track, 2 * rate - 100, 5000)
    assert len(beyond) == 5000 and not beyond[2000:].any()


def test_sound_of_a_video():
    sound = wave(16000, 8000)
    data = np.frombuffer(clip(20, sound=(sound, 8000, "aac")), np.uint8)
    fields = batch_of(modality(seconds=1.0), [data], train=False)
    assert np.abs(fields["audio"][0].numpy() - sound[4000:12000]).max() < 0.1
    with pytest.raises(DamagedSample, match="no sound track"):
        modality().inspect(np.frombuffer(clip(2), np.uint8), {})


def test_channels_are_averaged():
    left, right = wave(4000, 8000, 1), wave(4000, 8000, 2)
    fields = batch_of(modality(), [stored(np.stack([left, right], 1)), stored(np.stack([left] * 6, 1))])
    np.testing.assert_allclose(fields["audio"][0], (left + right) / 2, atol=1e-6)
    np.testing.assert_allclose(fields["audio"][1], left, atol=1e-6)


@pytest.mark.parametrize(
    ("layout", "channels", "codec"),
    [("stereo", 2, "aac"), ("stereo", 2, "pcm_u8"), ("7.1", 8, "aac"), ("7.1", 8, "flac"), ("hexadecagonal", 16, "pcm_s16le")],
)
def test_many_channels_of_a_container(layout, channels, codec):
    import av

    sounds = np.stack([wave(8000, 8000, seed) for seed in range(channels)])
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as out:
        mux_sound(out, out.add_stream(codec, rate=8000, layout=layout), sounds, 8000, layout)
    data = file.getvalue()
    got = streams.sound(data, streams.sound_track(data), 0, 8000)
    assert np.abs(got - sounds.mean(0))[300:-300].max() < {"aac": 0.1, "pcm_u8": 0.01}.get(codec, 0.001)


# --- cut and padded -------------------------------------------------------------------------------------------------------------


def test_cuts():
    sound = wave(20000, 8000)
    files = [stored(sound)] * 3
    fields = batch_of(modality(), files)
    starts = (uniform(3, 1, 10 + np.arange(3), 1 << 21) * 16001).astype(int)
    assert len(set(starts)) == 3
    for row, start in zip(fields["audio"], starts, strict=True):
        np.testing.assert_allclose(row, sound[start : start + 4000], atol=1e-6)
    fields = batch_of(modality(), files, train=False)
    for row in fields["audio"]:
        np.testing.assert_allclose(row, sound[8000:12000], atol=1e-6)
    assert fields["audio_length"].tolist() == [4000] * 3


def test_padding():
    sound = wave(1500, 8000)
    want = {
        "zeros": np.pad(sound, (0, 2500)),
        "repeat": np.concatenate([sound, sound, sound[:1000]]),
        "repeat_zeros": np.pad(np.concatenate([sound, sound]), (0, 1000)),
    }
    lengths = {"zeros": 1500, "repeat": 4000, "repeat_zeros": 3000}
    for pad, samples in want.items():
        fields = batch_of(modality(pad=pad), [stored(sound)])
        np.testing.assert_allclose(fields["audio"][0], samples, atol=1e-6)
        assert fields["audio_length"].tolist() == [lengths[pad]]
        fields = batch_of(mel_modality(pad=pad), [stored(sound)])
        assert fields["audio"].shape == (1, 20, 51) and fields["audio_length"].tolist() == [lengths[pad] // 80 + 1]


def test_padding_at_another_rate_is_silent():
    """The filter's ringing past the end of a short sound is not part of it."""
    fields = batch_of(modality(sample_rate=16000, seconds=0.25), [stored(wave(441, 44100) + 0.5, 44100)])
    assert fields["audio_length"].tolist() == [160]
    assert (fields["audio"][0, 160:] == 0).all() and (fields["audio"][0, :160] != 0).all()


def test_batches_of_several_rates_keep_their_order():
    files = [stored(wave(rate, rate), rate) for rate in (8000, 44100, 16000, 44100, 8000)]
    fields = batch_of(modality(seconds=1.0), [files[0], files[1], files[2], files[3]], train=False)
    for row in fields["audio"]:
        np.testing.assert_allclose(row[200:-200], wave(8000, 8000)[200:-200], atol=1e-2)
    alone = batch_of(modality(seconds=1.0), [files[1]], train=False)
    assert torch.equal(alone["audio"][0], fields["audio"][1]) or (alone["audio"][0] - fields["audio"][1]).abs().max() < 1e-6


def test_sixteen_bits():
    sound = np.array([0.3, -0.3, 1.5, -1.5, 1e-5, 0.99999] * 667)[:4000]
    fields = batch_of(modality(int16=True), [stored(sound)])
    want = (np.clip(sound, -1, 1) * 32767).astype(np.int16) / 32767
    np.testing.assert_allclose(fields["audio"][0], want, atol=1e-7)


def test_intervals():
    sound = wave(16000, 8000)
    cutting = modality(interval=["from", "to"])
    fields = batch_of(cutting, [stored(sound)] * 2, [{"from": 0.5, "to": 1.0}, {"from": 1.9, "to": 9}])
    np.testing.assert_allclose(fields["audio"][0], sound[4000:8000], atol=1e-6)
    np.testing.assert_allclose(fields["audio"][1], np.pad(sound[15200:], (0, 3200)), atol=1e-6)
    for record, reason in (
        ({"from": 3, "to": 4}, "no sound in 3.0 .. 4.0 s: it ends at 2.000 s"),
        ({"from": 1}, "'to' is None"),
        ({"from": 1e11, "to": 2e11}, "no sound in"),
        ({"from": 1, "to": 1e300}, r"'to' is 1e.300"),
        ({"from": 1, "to": 1}, "empty"),
    ):
        with pytest.raises(DamagedSample, match=reason):
            cutting.inspect(stored(sound), record)


# --- masks ----------------------------------------------------------------------------------------------------------------------


def test_masks():
    options = {"time_masks": 2, "time_mask_width": 9, "mel_masks": 1, "mel_mask_width": 6, "mask_value": -7.0}
    files = [stored(wave(4000, 8000, seed)) for seed in range(8)]
    plain, masked = batch_of(mel_modality(), files)["audio"], batch_of(mel_modality(**options), files)["audio"]
    hidden = masked == -7.0
    assert torch.equal(masked[~hidden], plain[~hidden])
    numbers = (1 << 21) + 1 + np.arange(6)
    u = uniform(3, 1, 10 + np.arange(8)[:, None], numbers).reshape(8, 3, 2)
    want = np.zeros((8, 20, 51), bool)
    for row in range(8):
        for mask, (axis, size, most) in enumerate([(1, 51, 9), (1, 51, 9), (0, 20, 6)]):
            width = int(u[row, mask, 0] * (most + 1))
            start = int(u[row, mask, 1] * (size - width + 1))
            where = slice(start, start + width)
            want[row][(slice(None), where) if axis else (where, slice(None))] = True
    assert (hidden.numpy() == want).all()
    assert 0.02 < want.mean() < 0.6 and want.any((1, 2)).sum() >= 7
    evaluated = batch_of(mel_modality(**options), files, train=False)["audio"]
    assert torch.equal(evaluated, plain)


def test_a_function_of_seed_epoch_and_index_alone():
    options = {"time_masks": 1, "time_mask_width": 9, "mel_masks": 1, "mel_mask_width": 5}
    files = [stored(wave(9000 + 1000 * n, rate, n), rate) for n, rate in enumerate((8000, 16000, 44100))]
    first = batch_of(mel_modality(**options), files)
    again = batch_of(mel_modality(threads=3, **options), files)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["audio"], batch_of(mel_modality(**options), files, epoch=2)["audio"])


# --- damage ---------------------------------------------------------------------------------------------------------------------


def header(file, rate):
    """The WAV file with another rate in its header."""
    data = bytearray(file.tobytes())
    data[24:28] = rate.to_bytes(4, "little")
    return np.frombuffer(bytes(data), np.uint8)


WHOLE = stored(wave(8000, 8000), kind="WAV", subtype="PCM_16")
DAMAGES = {
    "nothing": (np.empty(0, np.uint8), "the file is empty"),
    "text": (np.frombuffer(b"hello" * 100, np.uint8), "libsndfile: "),
    "no samples": (stored(np.zeros(0)), "holds no sound"),
    "a rate of 1 Hz": (header(WHOLE, 1), "a sample rate of 1 Hz, expected 1000 .. 768000"),
    "a rate of 1 GHz": (header(WHOLE, 10**9), "libsndfile|a sample rate of 1000000000 Hz"),
    "WAV cut short": (WHOLE[:9000], "cut short: 9000 of 16044 bytes"),
    "FLAC cut short": (stored(wave(8000, 8000), kind="FLAC")[:-500], "cut short or broken: the last of 8000"),
    "MP3 cut short": (stored(wave(80000, 8000), kind="MP3")[:-9000], "cut short or broken"),
    "mp4 cut short": (np.frombuffer(sound_file(wave(8000, 8000), 8000)[:-300], np.uint8), "FFmpeg"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_sounds_are_named(name):
    file, reason = DAMAGES[name]
    with pytest.raises(DamagedSample, match=reason):
        modality().inspect(file, {})


def test_no_member_and_too_short_a_sound_are_named():
    with pytest.raises(DamagedSample, match=r"no sound .a member wav, flac"):
        modality().inspect(None, {})
    with pytest.raises(DamagedSample, match="79 samples at 8000 Hz are shorter than one frame"):
        mel_modality(drop_last_frame=True).inspect(stored(wave(79, 8000)), {})
    assert mel_modality(drop_last_frame=True).inspect(stored(wave(80, 8000)), {}).count == 80


def reasons_of(modality, files):
    infos = [modality.inspect(file, {}) for file in files]
    modality.submit(files, infos, [{}] * len(files), draws(len(files), train=False))
    with pytest.raises(DamagedBatch) as error:
        modality.receive()
    return error.value.reasons


def test_silence_and_values_that_are_no_numbers():
    good = wave(8000, 8000)
    silent, nan, infinite, quiet_part = np.zeros(8000), good.copy(), good.copy(), np.zeros(8000)
    nan[4000], infinite[4100], quiet_part[10] = np.nan, np.inf, 0.5
    reasons = reasons_of(modality(), [stored(x) for x in (good, silent, nan, quiet_part, infinite)])
    assert reasons.keys() == {1, 2, 4}
    assert "silent" in reasons[1] and "NaN" in reasons[2] and "NaN" in reasons[4]
    fields = batch_of(modality(keep_silence=True), [stored(silent)])
    assert not fields["audio"].any()


def test_only_a_silent_sound_is_searched_to_its_end(monkeypatch):
    monkeypatch.setattr(audio, "_BLOCK", 1000)
    late = np.zeros(9000)
    late[8500] = 0.1
    fields = batch_of(modality(), [stored(late)], train=False)
    assert not fields["audio"].any()
    assert "silent" in reasons_of(modality(), [stored(np.zeros(9000))])[0]
    track = np.frombuffer(sound_file(late, 8000, "mov", "pcm_s16le"), np.uint8)
    assert not batch_of(modality(), [track], train=False)["audio"].any()
    silent = np.frombuffer(sound_file(np.zeros(9000), 8000, "mov", "pcm_s16le"), np.uint8)
    assert "silent" in reasons_of(modality(), [silent])[0]


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3", "mp4", "webm"])
def test_arbitrary_damage_never_escapes(kind):
    sound, draw = wave(16000, 16000), np.random.default_rng(7)
    if kind in ("mp4", "webm"):
        data = sound_file(wave(48000, 48000), 48000, kind, "aac" if kind == "mp4" else "libopus")
    else:
        data = stored(sound, 16000, kind, "PCM_16").tobytes()
    hearing = mel_modality()
    outcomes = []
    for number, copy in enumerate(damaged_copies(data, draw, FUZZ)):
        try:
            info = hearing.inspect(copy, {})
            hearing.submit([copy], [info], [{}], draws(1, seed=number))
            assert hearing.receive()["audio"].isfinite().all()
            outcomes.append("")
        except DamagedSample as error:
            outcomes.append(str(error))
        except DamagedBatch as error:
            outcomes.append(error.reasons[0])
    assert len(outcomes) == FUZZ and (any(outcomes) or kind == "webm")


def test_several_batches_in_flight():
    good, bad = stored(wave(8000, 8000)), stored(np.zeros(8000))
    hearing = modality(threads=2)
    infos = {id(file): hearing.inspect(file, {}) for file in (good, bad)}
    for files in ([good, bad], [good, good], [bad]):
        hearing.submit(files, [infos[id(file)] for file in files], [{}] * len(files), draws(len(files), train=False))
    with pytest.raises(DamagedBatch) as error:
        hearing.receive()
    assert error.value.reasons.keys() == {1}
    np.testing.assert_allclose(hearing.receive()["audio"][1], wave(8000, 8000)[2000:6000], atol=1e-6)
    hearing.reset()
    hearing.submit([good], [infos[id(good)]], [{}], draws(1))
    assert len(hearing.receive()["audio"]) == 1
    hearing.close()


# --- options --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pad": "mirror"}, "audio.pad: expected one of zeros, repeat, repeat_zeros, got 'mirror'"),
        ({"features": "mfcc"}, "audio.features"),
        ({"mel_scale": "bark"}, "audio.mel_scale"),
        ({"mel_norm": "l2"}, "audio.mel_norm"),
        ({"log": "log2"}, "audio.log"),
        ({"sample_rate": 10}, "audio.sample_rate: expected 1000 .. 768000, got 10"),
        ({"seconds": 0.0}, "audio.seconds: expected at least"),
        ({"n_fft": 100_000}, "audio.n_fft: expected 2 .. 7999, got 100000"),
        ({"win": 500}, "audio.win: expected 1 .. 256, got 500"),
        ({"hop": 0}, "audio.hop: expected 1 .. 4000, got 0"),
        ({"n_mels": 0}, "audio.n_mels: expected at least 1, got 0"),
        ({"f_max": 5000.0}, "audio.f_max: expected 1.0 .. 4000.0, got 5000.0"),
        ({"f_min": -1.0}, "audio.f_min"),
        ({"floor": 0.0}, "audio.floor"),
        ({"features": "waveform", "time_masks": 1}, "expected 0 for a waveform"),
        ({"mel_mask_width": 99}, "audio.mel_mask_width: expected 0 .. 20, got 99"),
        ({"time_mask_width": 99}, "audio.time_mask_width: expected 0 .. 50, got 99"),
        ({"interval": ["a", "b", "c"]}, "audio.interval: expected the names of two fields"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        mel_modality(**options)


def test_without_soundfile(monkeypatch):
    monkeypatch.setattr(audio, "soundfile", None)
    with pytest.raises(UserError, match=r"pip install vlpfast\[audio\]"):
        modality()


def test_without_pyav_sound_files_are_read_still(monkeypatch):
    monkeypatch.setattr(streams, "av", None)
    assert modality().inspect(stored(wave(8000, 8000)), {}).count == 8000
    with pytest.raises(UserError, match=r"pip install vlpfast\[video\]"):
        modality().inspect(np.frombuffer(sound_file(wave(8000, 8000), 8000), np.uint8), {})
