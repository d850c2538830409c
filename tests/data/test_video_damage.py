import io
import os

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("av")
import av
from media import CONTAINERS, clip, damaged_copies, grey, sound_file, wave
from test_video import broken_in_the_middle, content, draws, level, modality, numbers, watched

from vlpfast.data import streams
from vlpfast.data.pictures import DamagedBatch, DamagedSample

FUZZ = int(os.environ.get("VLPFAST_FUZZ", "12"))  # damaged copies of each file; more for a longer search


def first_part(data, share):
    return data[: int(len(data) * share)]


DAMAGES = {
    "nothing": (b"", "empty"),
    "text": (b"hello" * 100, "FFmpeg: Invalid data"),
    "zeros": (bytes(1000), "FFmpeg"),
    "mp4 without its index": (first_part(clip(60), 0.8), "FFmpeg"),
    "mkv half": (first_part(clip(60, "matroska"), 0.5), "6.00 s are stated"),
    "webm most": (first_part(clip(60, "webm", "libvpx"), 0.8), "6.00 s are stated"),
    "avi most": (first_part(clip(60, "avi", "mpeg4"), 0.8), "cut short"),
    "only sound": (sound_file(wave(8000, 8000), 8000), "no video stream"),
    "no frame": (clip(0, "matroska", "mpeg4", sound=(wave(9000, 8000), 8000, "flac")), "no frame"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_videos_are_named(name):
    data, reason = DAMAGES[name]
    with pytest.raises(DamagedSample, match=reason):
        modality().inspect(content(data), {})


def packets(data):
    """Place in the file, bytes and pts of each packet of video."""
    with av.open(io.BytesIO(data)) as container:
        return [(packet.pos, packet.size, packet.pts) for packet in container.demux(video=0) if packet.size]


def test_a_file_that_begins_with_its_index_is_missed_at_its_end(tmp_path):
    path = tmp_path / "clip.mp4"
    clip(60, "mp4", movflags="faststart", path=path)
    data = path.read_bytes()
    assert data.find(b"moov") < data.find(b"mdat") and len(streams.video_track(data).times) == 60
    place, size, _ = packets(data)[40]
    with pytest.raises(DamagedSample, match="cut short: 40 of 60 frames"):
        streams.video_track(data[:place])
    with pytest.raises(DamagedSample, match="cut short within a frame"):
        streams.video_track(data[: place + size // 2])


@pytest.mark.parametrize("missing", [7, 20])
def test_a_frame_that_the_decoder_passes_over_is_missed(monkeypatch, missing):
    data = clip(30)
    track = streams.video_track(data)
    watched(monkeypatch, lambda frame: frame.pts != track.pts[missing])
    kept = [n for n in range(30) if n != missing]
    assert sorted(streams.video_frames(data, track, np.array(kept), level)) == kept
    with pytest.raises(DamagedSample, match=f"frame {missing} cannot be decoded"):
        streams.video_frames(data, track, np.array([missing, 25]), level)


def test_no_member_is_named():
    with pytest.raises(DamagedSample, match=r"no video .a member mp4, webm"):
        modality().inspect(None, {})


def test_frames_too_large_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DamagedSample, match="64 x 48 pixels"):
        streams.video_track(clip(2))


def test_a_change_of_size_is_named():
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as out:
        stream = None
        for first, size in ((0, (64, 48)), (10, (32, 48))):
            with av.open(io.BytesIO(clip([grey(n, *size) for n in range(10)], "webm", "libvpx"))) as part:
                stream = stream or out.add_stream_from_template(part.streams.video[0])
                for packet in part.demux(part.streams.video[0]):
                    if packet.size:
                        packet.pts, packet.dts, packet.stream = packet.pts + 100 * first, packet.dts + 100 * first, stream
                        out.mux(packet)
    data = file.getvalue()
    track = streams.video_track(data)
    assert len(track.times) == 20
    streams.video_frames(data, track, np.array([3, 9]), level)
    with pytest.raises(DamagedSample, match="from 64 x 48 to 32 x 48"):
        streams.video_frames(data, track, np.array([3, 15]), level)


def test_a_damaged_frame_counts_when_it_is_needed():
    data = broken_in_the_middle([7])
    track = streams.video_track(data)
    assert numbers(list(streams.video_frames(data, track, np.array([3, 12]), level).values())).tolist() == [3, 12]
    with pytest.raises(DamagedSample, match=r"FFmpeg|ends|damaged|cannot be decoded"):
        streams.video_frames(data, track, np.array([3, 7, 12]), level)


def test_frames_that_ffmpeg_patches_up_are_damaged():
    """FFmpeg fills what is missing of H.264 frames with what was there before, and says so in a flag alone."""
    draw = np.random.default_rng(0)
    noise = [draw.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in range(12)]
    data = bytearray(clip(noise, options={"x264-params": "keyint=60:bframes=0:slices=4"}))
    end = data.find(b"moov")
    outcomes = set()
    for place in range(end // 2, end - 400, 97):
        copy = bytearray(data)
        copy[place : place + 30] = bytes(30)
        track = streams.video_track(bytes(copy))
        try:
            shown = streams.video_frames(bytes(copy), track, np.arange(12), np.asarray)
        except DamagedSample as error:
            outcomes.add(str(error).partition(":")[0].rstrip("0123456789 "))
        else:
            assert len(shown) == 12
    assert any("damaged" in outcome for outcome in outcomes), outcomes


@pytest.mark.parametrize(("container", "codec"), CONTAINERS[:7])
def test_arbitrary_damage_never_escapes(container, codec):
    draw = np.random.default_rng(5)
    showing = modality()
    outcomes = []
    for number, copy in enumerate(damaged_copies(clip(30, container, codec), draw, FUZZ)):
        try:
            info = showing.inspect(copy, {})
            showing.submit([copy], [info], [{}], draws(1, seed=number))
            assert showing.receive()["video"].isfinite().all()
            outcomes.append("")
        except DamagedSample as error:
            outcomes.append(str(error))
        except DamagedBatch as error:
            outcomes.append(error.reasons[0])
    assert sum(map(bool, outcomes)) >= FUZZ // 4


def test_damaged_positions_of_several_batches_in_flight():
    good, bad = content(clip(20)), content(broken_in_the_middle(range(20)[1:]))
    showing = modality(threads=2, sampling="uniform")
    infos = {id(file): showing.inspect(file, {}) for file in (good, bad)}
    for files in ([good, bad, good], [bad, bad], [good]):
        showing.submit(files, [infos[id(file)] for file in files], [{}] * len(files), draws(len(files)))
    for want in ({1}, {0, 1}):
        with pytest.raises(DamagedBatch) as error:
            showing.receive()
        assert error.value.reasons.keys() == want
    assert (numbers(showing.receive()["video"].mean((2, 3, 4))) == [[2, 7, 12, 17]]).all()
    showing.submit([good], [infos[id(good)]], [{}], draws(1))
    showing.reset()
    showing.submit([good, good], [infos[id(good)]] * 2, [{}] * 2, draws(2))
    assert len(showing.receive()["video"]) == 2
    showing.close()
