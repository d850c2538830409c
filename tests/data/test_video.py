import contextlib
import io
import json
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from test_loader import Characters, assert_same

pytest.importorskip("av")
from media import CONTAINERS, clip, grey, wave

from vlpfast.data import ShardWriter, frames, make_loader, streams, video
from vlpfast.data.modality import Draws
from vlpfast.data.pictures import DamagedBatch, DamagedSample
from vlpfast.data.video import VideoModality, pack_frames
from vlpfast.data.views import view_rectangles
from vlpfast.types import AudioSpec, DataSpec, ImageSpec, TextSpec, UserError, VideoSpec

PLAIN = {"mean": [0.0] * 3, "std": [1 / 255] * 3}  # pixels as levels 0 .. 255


def level(image):
    return np.asarray(image).mean()


def numbers(values):
    """The numbers of frames whose mean level this is."""
    n = np.rint(np.asarray(values) / 4).astype(int)
    assert np.abs(np.asarray(values) - 4 * n).max() < 1.5
    return n


def modality(threads=1, batch_size=4, **options):
    return VideoModality(VideoSpec(**{"frames": 4, "size": 8, **PLAIN, **options}), threads, batch_size, torch.device("cpu"))


def draws(count, train=True, seed=3, epoch=1):
    return Draws(seed, epoch, 10 + np.arange(count), train)


def content(data):
    return np.frombuffer(data, np.uint8)


def batch_of(modality, files, records=None, train=True, **options):
    files = [content(file) for file in files]
    records = records or [{}] * len(files)
    infos = [modality.inspect(file, record) for file, record in zip(files, records, strict=True)]
    fields = modality.submit(files, infos, records, draws(len(files), train, **options))
    return fields | modality.receive()


def picture(pixels, kind="JPEG", **options):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


# --- the frames that were asked for -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("container", "codec"), CONTAINERS)
def test_frames_are_those_asked_for(container, codec):
    data = clip(60, container, codec)
    track = streams.video_track(data)
    assert (track.width, track.height, track.rotation, len(track.times)) == (64, 48, 0, 60)
    np.testing.assert_allclose(track.times, np.arange(60) / 10, atol=1e-3)
    for places in ([0, 59], [59], [5], [13, 14, 59], [24, 30, 31, 30], list(range(60))):
        shown = streams.video_frames(data, track, np.array(places), level)
        assert sorted(shown) == sorted(set(places))
        assert (numbers(list(shown.values())) == list(shown)).all()


@pytest.mark.parametrize(
    "x264", ["keyint=12:bframes=3:b-pyramid=2:open-gop=1", "keyint=7:bframes=0", "keyint=60:bframes=5", "intra-refresh=1"]
)
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_orders_of_frames(container, x264):
    data = clip(60, container, options={"x264-params": x264})
    track = streams.video_track(data)
    for places in ([47], [3, 11, 12, 13, 50], [25, 26, 27]):
        shown = streams.video_frames(data, track, np.array(places), level)
        assert (numbers(list(shown.values())) == places).all()


def watched(monkeypatch, passes):
    """From here on only those decoded frames come that pass."""
    opened = streams._opened

    class Watched:
        def __init__(self, container):
            self._container = container

        def __getattr__(self, name):
            return getattr(self._container, name)

        def decode(self, stream):
            return filter(passes, self._container.decode(stream))

    @contextlib.contextmanager
    def watching(data):
        with opened(data) as container:
            yield Watched(container)

    monkeypatch.setattr(streams, "_opened", watching)


@pytest.mark.parametrize(("container", "codec"), [("mp4", "libx264"), ("matroska", "libx264"), ("webm", "libvpx")])
def test_no_more_is_decoded_than_from_the_key_frame_on(monkeypatch, container, codec):
    data = clip(60, container, codec, options={"x264-params": "keyint=10:scenecut=0"} if codec == "libx264" else {"g": "10"})
    track = streams.video_track(data)
    assert len(track.key_pts) >= 5
    decoded = []
    watched(monkeypatch, lambda frame: decoded.append(frame) or True)
    streams.video_frames(data, track, np.array([2, 33, 55]), level)
    assert len(decoded) <= 3 + 3 * 12
    decoded.clear()
    streams.video_frames(data, track, np.array([51]), level)
    assert len(decoded) <= 13


def test_variable_frame_rate():
    times = [0, 100, 150, 400, 401, 900, 1000, 1050, 3000, 3010]
    fields = batch_of(modality(frames=10, sampling="uniform"), [clip(10, "matroska", times=times)])
    np.testing.assert_allclose(fields["frame_times"], [np.array(times) / 1000], atol=1e-6)
    assert (numbers(fields["video"].mean((2, 3, 4))) == np.arange(10)).all()


def test_a_video_that_does_not_begin_at_zero():
    fields = batch_of(modality(frames=3, sampling="uniform"), [clip(3, "matroska", times=[5000, 5100, 5300])])
    np.testing.assert_allclose(fields["frame_times"], [[0, 0.1, 0.3]], atol=1e-6)


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_rotated_streams(rotation):
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24, :32] = 240
    file = content(clip([pixels] * 3, rotation=rotation))
    turning = modality(frames=1, resize="squash", size=32)
    info = turning.inspect(file, {})
    assert (info.track.width, info.track.height) == ((48, 64) if rotation % 180 else (64, 48))
    turning.submit([file], [info], [{}], draws(1, train=False))
    shown = turning.receive()["video"][0, 0, 0]
    want = np.rot90(np.kron([[240, 0], [0, 0]], np.ones((16, 16))), rotation // 90)
    assert np.abs(shown.numpy() - want)[2:-2, 2:-2].mean() < 8


def test_a_rotation_that_is_no_quarter_turn_is_named():
    with pytest.raises(DamagedSample, match=r"turned by (29|30) degrees"):
        streams.video_track(clip(2, rotation=30))


# --- what is chosen and how it is shown ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "train", "want"),
    [
        ({"sampling": "uniform"}, True, lambda n, i: frames.uniform_frames(n, 4)),
        ({"sampling": "segment"}, True, lambda n, i: frames.segment_frames(n, i, 4, seed=3, epoch=1)),
        ({"sampling": "segment"}, False, lambda n, i: frames.uniform_frames(n, 4)),
        ({"sampling": "head_tail"}, True, lambda n, i: frames.head_tail_frames(n, i, 4, seed=3, epoch=1)),
        ({"sampling": "head_tail"}, False, lambda n, i: frames.uniform_frames(n, 4)),
        ({"sampling": "dense", "stride": 3}, True, lambda n, i: frames.dense_frames(n, i, 4, 3, seed=3, epoch=1)),
        ({"sampling": "dense", "stride": 3}, False, lambda n, i: frames.middle_frames(n, 4, 3)),
        ({"sampling": "middle", "stride": 2}, True, lambda n, i: frames.middle_frames(n, 4, 2)),
        ({"sampling": "middle", "stride": 2}, False, lambda n, i: frames.middle_frames(n, 4, 2)),
    ],
)
def test_sampling(options, train, want):
    lengths = np.array([50, 3, 1])
    fields = batch_of(modality(**options), [clip(int(n)) for n in lengths], train=train)
    places = want(lengths, 10 + np.arange(3))
    assert fields["video"].shape == (3, 4, 3, 8, 8) and fields["video"].dtype == torch.float32
    assert (numbers(fields["video"].mean((2, 3, 4))) == places).all()
    np.testing.assert_allclose(fields["frame_times"], places / 10, atol=1e-6)
    assert fields["frame_times"].dtype == torch.float32


def test_fewer_frames_than_asked_for_repeat_the_last():
    fields = batch_of(modality(frames=6), [clip(2)])
    assert (numbers(fields["video"].mean((2, 3, 4))) == [[0, 1, 1, 1, 1, 1]]).all()


def test_two_views():
    lengths = np.array([60, 5])
    options = {"frames": 4, "short_frames": 3, "short_share": [0.2, 0.4]}
    fields = batch_of(modality(**options), [clip(int(n)) for n in lengths])
    want = frames.two_views(lengths, 10 + np.arange(2), 4, 3, (0.2, 0.4), seed=3, epoch=1)
    for name, times, places in (("video", "frame_times", want[0]), ("short_video", "short_times", want[1])):
        assert (numbers(fields[name].mean((2, 3, 4))) == places).all()
        np.testing.assert_allclose(fields[times], places / 10, atol=1e-6)
    fields = batch_of(modality(**options), [clip(int(n)) for n in lengths], train=False)
    assert (numbers(fields["short_video"].mean((2, 3, 4))) == [[24, 30, 36], [1, 2, 3]]).all()  # the middle 18 and 3


def test_intervals():
    taking = modality(sampling="uniform", interval=["start", "end"])
    fields = batch_of(taking, [clip(60)] * 2, [{"start": 2.0, "end": 2.4}, {"start": 5, "end": 100}])
    assert (numbers(fields["video"].mean((2, 3, 4))) == [[20, 21, 22, 23], [51, 53, 56, 58]]).all()
    np.testing.assert_allclose(fields["frame_times"][0], [2.0, 2.1, 2.2, 2.3], atol=1e-6)
    for record, reason in (
        ({"start": 1.0}, "'end' is None"),
        ({"start": "1", "end": 2}, "'start' is '1'"),
        ({"start": True, "end": 2}, "'start' is True"),
        ({"start": 2, "end": 2}, "empty"),
        ({"start": -1, "end": 2}, "empty"),
        ({"start": float("nan"), "end": 2}, "'start' is nan"),
        ({"start": 1, "end": float("inf")}, "'end' is inf"),
        ({"start": 1, "end": 10**400}, "'end' is 10*, expected a number"),
        ({"start": 1e11, "end": 2e11}, "no frame in"),
        ({"start": 7, "end": 9}, r"no frame in 7.0 .. 9.0 s: the video ends at 5.900"),
    ):
        with pytest.raises(DamagedSample, match=reason):
            taking.inspect(content(clip(60)), record)


def pattern(seed=0):
    y, x = np.mgrid[:48, :64]
    draw = np.random.default_rng(seed)
    waves = [127 + 100 * np.sin(x / draw.uniform(5, 9)) * np.cos(y / draw.uniform(5, 9)) for _ in range(3)]
    return np.stack(waves, -1).astype(np.uint8)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("train", [True, False])
def test_cut_resized_and_mirrored_alike(train, interpolation):
    """All frames of a clip as PIL makes them of the whole frame, by the rectangles of views.py."""
    options = {"size": 24, "scale": [0.2, 0.9], "mirror": 0.5, "interpolation": interpolation}
    stored = [pack_frames([picture(pattern(seed), "PNG")] * 3, "png") for seed in range(6)]
    fields = batch_of(modality(frames=2, **options), stored, train=train)
    rectangles, mirrored = view_rectangles(
        ImageSpec(size=24, scale=[0.2, 0.9], mirror=0.5),
        np.array([[64, 48]] * 6),
        10 + np.arange(6),
        train=train,
        seed=3,
        epoch=1,
    )
    assert mirrored.any() == train
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    for seed, (x0, y0, w, h) in enumerate(rectangles.tolist()):
        view = Image.fromarray(pattern(seed)).crop((x0, y0, x0 + w, y0 + h)).resize((24, 24), filters[interpolation])
        want = np.asarray(view)[:, :: -1 if mirrored[seed] else 1]
        for frame in fields["video"][seed]:
            np.testing.assert_allclose(frame.permute(1, 2, 0), want, atol=1e-4)
        got = fields["video_crop"][seed].numpy()
        np.testing.assert_allclose(got, [x0 / 64, y0 / 48, w / 64, h / 48, mirrored[seed]], atol=1e-6)


def test_squash_shows_the_whole_frame():
    stored = pack_frames([picture(pattern(), "PNG")], "png")
    for train in (True, False):
        fields = batch_of(modality(frames=1, resize="squash", size=24), [stored], train=train)
        want = np.asarray(Image.fromarray(pattern()).resize((24, 24), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(fields["video"][0, 0].permute(1, 2, 0), want, atol=1e-4)
        assert fields["video_crop"].tolist() == [[0, 0, 1, 1, 0]]


def test_normalised():
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 2.0]
    fields = batch_of(modality(frames=1, mean=mean, std=std), [pack_frames([picture(grey(30), "PNG")], "png")])
    want = (np.array(120 / 255) - mean) / std
    np.testing.assert_allclose(fields["video"][0, 0].mean((1, 2)), want, atol=1e-5)
    assert fields["video"].is_contiguous()


def test_a_function_of_seed_epoch_and_index_alone():
    files = [clip(50), clip(40)]
    make = {"sampling": "segment", "scale": [0.3, 1.0], "mirror": 0.5}
    first = batch_of(modality(**make), files)
    for threads in (1, 3):
        again = batch_of(modality(threads, **make), files)
        assert all(torch.equal(first[name], again[name]) for name in first)
    other = batch_of(modality(**make), files, epoch=2)
    assert not torch.equal(first["frame_times"], other["frame_times"])
    assert not torch.equal(first["video_crop"], other["video_crop"])


# --- frames as pictures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_frames_as_pictures(kind, extension):
    stored = pack_frames([picture(grey(n), kind) for n in range(20)], extension)
    fields = batch_of(modality(sampling="uniform"), [stored, stored], [{"fps": 5}, {}])
    places = frames.uniform_frames(np.array([20]), 4)[0]
    assert (numbers(fields["video"].mean((2, 3, 4))) == places).all()
    np.testing.assert_allclose(fields["frame_times"][0], places / 5, atol=1e-6)
    assert fields["frame_times"][1].isnan().all()


def zipped(**members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name.replace("_", "."), data)
    return stream.getvalue()


def test_pictures_are_in_the_order_of_their_names():
    stored = zipped(b_jpg=picture(grey(2)), notes_txt=b"", a_JPG=picture(grey(1)), c_png=picture(grey(3), "PNG"))
    fields = batch_of(modality(frames=3, sampling="uniform"), [stored])
    assert (numbers(fields["video"].mean((2, 3, 4))) == [[1, 2, 3]]).all()


def test_damaged_zips():
    good = pack_frames([picture(grey(n)) for n in range(4)])
    taking = modality(sampling="uniform")
    for data, record, reason in (
        (good[:-30], {}, "the zip cannot be read"),
        (zipped(), {}, "no picture in the zip"),
        (zipped(a_txt=b"x"), {}, "no picture in the zip"),
        (zipped(a_jpg=b""), {}, "the picture is empty"),
        (good, {"fps": 0}, "'fps' is 0.0, expected more than 0"),
        (good, {"fps": 10**400}, "'fps' is 10*, expected a number"),
        (good, {"fps": None}, "'fps' is None"),
        (good, {"fps": "30"}, "'fps' is '30'"),
    ):
        with pytest.raises(DamagedSample, match=reason):
            taking.inspect(content(data), record)
    with pytest.raises(DamagedSample, match="times of the frames are not known"):
        modality(interval=["a", "b"]).inspect(content(good), {"a": 0, "b": 1})
    cut = picture(grey(1))[:-40]
    for second, reason in ((cut, "b.jpg: .*cut short"), (picture(grey(1, 32, 48)), "b.jpg: 32 x 48 pixels, .* 64 x 48")):
        with pytest.raises(DamagedBatch) as error:
            batch_of(taking, [good, zipped(a_jpg=picture(grey(0)), b_jpg=second), good])
        assert list(error.value.reasons) == [1] and re.search(reason, error.value.reasons[1])
        taking.reset()


def test_a_picture_of_a_zip_cannot_ask_for_all_memory(monkeypatch):
    monkeypatch.setattr(video, "_LARGEST_PICTURE", 1000)
    with pytest.raises(DamagedSample, match="a picture of 5000 bytes"):
        modality().inspect(content(zipped(a_jpg=bytes(5000))), {})


def test_pack_frames_refuses_what_will_not_be_read():
    with pytest.raises(ValueError, match=r"extension: expected one of jpg.* got 'gif'"):
        pack_frames([], "gif")


def broken_in_the_middle(places):
    """An MJPEG video, of which these frames are overwritten."""
    data = bytearray(clip(20, "mov", "mjpeg"))
    starts = [at for at in range(len(data)) if data[at : at + 3] == b"\xff\xd8\xff"]
    assert len(starts) == 20
    for place in places:
        data[starts[place] : starts[place] + 600] = bytes(600)
    return bytes(data)


# --- options ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": "random"}, "video.sampling: expected one of uniform, .*'random'"),
        ({"resize": "stretch"}, "video.resize: expected one of crop, squash, got 'stretch'"),
        ({"interpolation": "nearest"}, "video.interpolation"),
        ({"frames": 0}, "video.frames: expected at least 1, got 0"),
        ({"stride": 0}, "video.stride"),
        ({"short_frames": -1}, "video.short_frames"),
        ({"size": 0}, "video.size"),
        ({"short_share": [0.5, 1.5]}, "video.short_share: .* <= 1, got .0.5, 1.5."),
        ({"scale": [0.5, 0.1]}, "video.scale"),
        ({"ratio": [0.0, 1.0]}, "video.ratio"),
        ({"short_frames": 2, "sampling": "dense"}, "video.sampling: expected \"segment\" with short_frames, got 'dense'"),
        ({"interval": ["start"]}, "video.interval: expected the names of two fields"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        modality(**options)


def test_without_pyav(monkeypatch):
    monkeypatch.setattr(streams, "av", None)
    with pytest.raises(UserError, match=r"pip install vlpfast\[video\]"):
        modality()


def test_import_is_light():
    code = "import sys, vlpfast.data, vlpfast.types; print(sorted({'av', 'soundfile'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- in the loader ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Samples n of 20 + n frames with a sound track; two of them are damaged, one where only decoding tells."""
    folder = tmp_path_factory.mktemp("videos")
    with ShardWriter(folder, "s", samples_per_shard=5) as writer:
        for n in range(14):
            sound = (wave(8000, 8000, n), 8000, "aac")
            video = clip(20 + n, *CONTAINERS[n % 2], sound=sound)
            video = {3: video[: len(video) // 2], 8: broken_in_the_middle(range(1, 20))}.get(n, video)
            writer.write(f"{n:04d}", {"mp4": video, "txt": f"clip {n}".encode(), "json": json.dumps({"n": n}).encode()})
    return str(folder)


SPEC = DataSpec(
    image=None,
    text=TextSpec(12),
    video=VideoSpec(frames=3, size=16, mirror=0.5, **PLAIN),
    audio=AudioSpec(sample_rate=8000, seconds=0.5, n_mels=16, f_max=4000.0, time_masks=1, time_mask_width=5),
)


def load(shards, train=True, spec=SPEC, **options):
    return make_loader(shards, spec, Characters(), 4, train=train, seed=5, **options)


def test_batches_of_videos_with_their_sound(shards):
    video_alone = DataSpec(image=None, text=TextSpec(12), video=SPEC.video)
    loader = load(shards, train=False, spec=video_alone, with_meta=True)
    batches = list(loader)
    assert [key for batch in batches for key in batch["key"]] == [f"{n:04d}" for n in range(14) if n not in (3, 8)]
    assert sorted(name.rpartition(":")[2] for name in loader.skipped) == ["0003", "0008"]
    for batch in batches:
        lengths = np.array([20 + record["n"] for record in batch["meta"]])
        assert (numbers(batch["video"].mean((2, 3, 4))) == frames.uniform_frames(lengths, 3)).all()
    loader = load(shards, train=False)
    batch = next(iter(loader))
    assert batch["video"].shape == (4, 3, 3, 16, 16) and batch["audio"].shape == (4, 16, 26)
    assert batch["key"] == ["0000", "0001", "0002", "0004"]
    list(loader)
    assert {name.rpartition(":")[2] for name in loader.skipped} == {"0003", "0008"}


def test_resuming_gives_the_rest_exactly(shards):
    first = load(shards)
    states, batches, iterator = [json.dumps(first.state_dict())], [], iter(first)
    for _ in range(8):
        batches.append(next(iterator))
        states.append(json.dumps(first.state_dict()))
    first.close()
    assert len(json.loads(states[-1])["skipped"]) == 2
    for cut in (0, 2, 3, 5):
        again = load(shards, threads=1)
        again.load_state_dict(json.loads(states[cut]))
        iterator = iter(again)
        for batch, state in zip(batches[cut:], states[cut + 1 :], strict=True):
            assert_same(batch, next(iterator))
            assert json.dumps(again.state_dict()) == state
        again.close()


def test_resuming_leaves_out_what_was_found_damaged_before(tmp_path):
    """Whether a damaged frame is needed depends on the epoch: once it was, the sample is out for good, in a resumed run too."""
    with ShardWriter(tmp_path, "s", samples_per_shard=6) as writer:
        for n in range(12):
            writer.write(f"{n:04d}", {"mov": broken_in_the_middle([2] if n % 2 else [])})
    spec = DataSpec(image=None, text=None, video=VideoSpec(frames=2, size=8, **PLAIN))

    def loader():
        return make_loader(str(tmp_path), spec, None, 3, train=True, seed=1)

    first = loader()
    states, batches, iterator = [first.state_dict()], [], iter(first)
    for _ in range(24):
        batches.append(next(iterator))
        states.append(first.state_dict())
    first.close()
    found = [len(state["skipped"]) for state in states]
    assert 0 == found[0] < found[8] < found[-1]
    for cut in (0, 5, 12, 18):
        again = loader()
        again.load_state_dict(json.loads(json.dumps(states[cut])))
        for batch, other in zip(batches[cut:], again, strict=False):
            assert_same(batch, other)
        assert again.state_dict() == states[-1]
        again.close()


@pytest.mark.gpu
def test_on_a_gpu(shards):
    """The frames and sounds of the CPU, and they stay while later batches come."""
    iterator = iter(load(shards, device="cuda"))
    batches = [next(iterator) for _ in range(8)]
    copies = [(batch["video"].cpu(), batch["audio"].cpu()) for batch in batches]
    for batch, (pixels, sound), other in zip(batches, copies, load(shards), strict=False):
        assert batch["video"].is_cuda and batch["audio"].is_cuda
        for name in ("frame_times", "video_crop", "audio_length"):
            assert torch.equal(batch[name], other[name]), name  # on the CPU both
        assert torch.equal(batch["video"].cpu(), pixels) and torch.equal(batch["audio"].cpu(), sound)
        np.testing.assert_allclose(pixels, other["video"], atol=1e-3)
        np.testing.assert_allclose(sound, other["audio"], atol=1e-3)
