"""The words that every layer shares: what a batch holds, what a model may offer, what it wants from the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, runtime_checkable

if TYPE_CHECKING:  # torch takes seconds to load, and `--help` should not wait for it
    from torch import Tensor


class UserError(Exception):
    """A mistake that the user can mend: commands print its message alone, without a traceback, and exit with 2."""


class PeerError(UserError):
    """The mistake of another process of the same run, which says it: this one ends with 2 and without a word."""


class Batch(TypedDict, total=False):
    """One batch, as every loader yields it and every model's forward takes it. Fields a model does not ask for are absent."""

    image: Tensor  # [B, 3, S, S] float32, normalised with the DataSpec's mean and std; [B, V, 3, S, S] of several views. Of
    #                several pictures a sample (ImageSpec.pictures) they stand behind B, as in image_local, crop, crop_local, warp
    image_local: Tensor  # [B, V, 3, s, s] the local views
    text: Tensor  # [B, L] int64 token ids, padded with the tokenizer's pad id
    text_mask: Tensor  # [B, L] bool, True = token
    text_masked: Tensor  # [B, L] int64 the same with some of it hidden (TextSpec.mask)
    text_labels: Tensor  # [B, L] int64 what is asked for at each token, -100: nothing; of a hidden token its id, of an answer too
    text_of: Tensor  # [A] int64 which sample each row belongs to, where a sample has any number of rows (TextSpec.every): A for B
    text_weight: Tensor  # [A] float32 the weights of these rows
    # Each further text NAME of DataSpec.texts likewise: NAME, NAME_mask, NAME_masked, NAME_labels, NAME_of, NAME_weight; each
    # target NAME of DataSpec.targets: NAME.
    positions: Tensor  # [B, L] int64 place of a token in its document; packed rows alone, as all down to image_of
    cu_seqlens: Tensor  # [S + 1] int32 where in text.flatten() the documents and the rows' paddings begin, then B * L
    document: Tensor  # [S] int64 the document that each of these sequences is, -1: padding
    image_slots: Tensor  # [P] int64 where in text.flatten() each picture's first token is; picture p is image[p]
    image_of: Tensor  # [P, 2] int64 the document of each picture, and which of its pictures it is; `index` and `key` are [D] here
    video: Tensor  # [B, T, 3, H, W] float32, normalised with the VideoSpec's mean and std
    frame_times: Tensor  # [B, T] float32 seconds from the video's first frame, NaN where they are unknown; on the CPU
    video_crop: Tensor  # [B, 5] as crop, of the video's frames as they are shown; on the CPU
    short_video: Tensor  # [B, T', 3, H, W] a moment of the same video; only with VideoSpec.short_frames
    short_times: Tensor  # [B, T'] as frame_times
    audio: Tensor  # [B, n_mels, T] float32 log-mel, or [B, S] waveform
    audio_length: Tensor  # [B] int64 frames (or samples) that hold sound, the others are padding; on the CPU
    index: Tensor  # [B] int64 position of the sample in its source, on the CPU
    source: Tensor  # [B] int64 number of the source in a mixture, on the CPU; only with several sources
    crop: Tensor  # [B, 5] float32 x0, y0, width, height as fractions of the stored picture, then 1 if mirrored; on the CPU.
    #               [B, V, 5] of several views. It reaches beyond the picture where the view is padded
    crop_local: Tensor  # [B, V, 5] of the local views, on the CPU
    warp: Tensor  # [B, (V,) 2, 3] float32 what RandAugment did after the crop: x, y of the view as fractions -> where they are
    boxes: Tensor  # [B, (V,) N, 4] float32 x0, y0, x1, y1 as fractions of the view, cut at its border, in the order of the JSON
    box_mask: Tensor  # [B, (V,) N] bool, True = enough of this box is in view
    masks: Tensor  # [B, (V,) N, S, S] bool, what is seen of each object
    volume: Tensor  # [B, C, D, H, W] float32, windowed, normalised; [B, D, C, H, W] if the VolumeSpec asks for slices
    volume_box: Tensor  # [B, 9] float32 d, h, w, depth, height, width as fractions of the stored volume, then 1 for each of the
    #                     three axes that is flipped; on the CPU. It reaches beyond the volume where the view is padded
    volume_slices: Tensor  # [B, D] int64 numbers of the stored slices that are shown, in their order; on the CPU; only of slices
    volume_labels: Tensor  # [B, D, H, W] int64, -100 where the view is padded
    volume_local: Tensor  # [B, V, C, d, h, w] the local views
    volume_local_box: Tensor  # [B, V, 9] of the local views; on the CPU
    points: Tensor  # [B, N, 3 (+ 3) (+ 1)] float32 x, y, z, then red, green, blue in 0 .. 1, then the height, as asked for
    points_transform: Tensor  # [B, 3, 4] float32 stored x, y, z, 1 -> x, y, z before jitter
    key: list[str]  # [B] WebDataset keys
    meta: list[dict[str, Any]]  # [B] the sample's JSON; only when the loader was asked for it


# Fields of a batch that stay on the CPU: what was shown of each sample, for drawing and looking up.
ON_HOST = frozenset(
    [
        "index",
        "source",
        "crop",
        "crop_local",
        "frame_times",
        "short_times",
        "video_crop",
        "audio_length",
        "volume_box",
        "volume_local_box",
        "volume_slices",
    ]
)


@dataclass(frozen=True)
class Progress:
    """Where training stands: `step` of `steps`, counted within the stage, before the step is taken (0 .. steps - 1)."""

    step: int
    steps: int
    epoch: float = 0.0  # passes over the stage's data that are behind it

    @property
    def fraction(self) -> float:
        return self.step / max(1, self.steps)


# --- what a model wants from the data ---------------------------------------------------------------------------------


@dataclass
class ColorJitterSpec:
    """ColorJitter: factors uniform in [max(0, 1 - s), 1 + s], the hue turned by up to `hue` of the circle; in a random order."""

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    prob: float = 0.8  # of all four together


@dataclass
class RandAugmentSpec:
    """RandAugment (Cubuk et al. 2020): `num_ops` operations, drawn with replacement, all of strength `magnitude`.

    recipe: "torchvision" is its fourteen operations with 31 magnitudes; "albef" the variant of ALBEF and its descendants: ten
    operations, each left out with probability 1/2, magnitudes 0 to 10. See vlpfast/data/augment.py.
    """

    num_ops: int = 2
    magnitude: int = 9
    recipe: str = "torchvision"


@dataclass
class AugmentSpec:
    """What happens to the pixels of a view in training, in this order; the flip comes before rand_augment. 0 or None: nothing."""

    color_jitter: ColorJitterSpec | None = None
    grayscale: float = 0.0  # probability
    blur: float = 0.0  # probability of a Gaussian blur
    blur_sigma: list[float] = field(default_factory=lambda: [0.1, 2.0])  # pixels of the view, uniform between the two
    solarize: float = 0.0  # probability; levels from 128 on are inverted
    rand_augment: RandAugmentSpec | None = None


@dataclass
class ViewSpec:
    """`count` views of each picture, drawn independently."""

    count: int = 1
    scale: list[float] = field(default_factory=lambda: [0.9, 1.0])
    ratio: list[float] = field(default_factory=lambda: [0.75, 4 / 3])
    mirror: float = 0.0
    augment: AugmentSpec = field(default_factory=AugmentSpec)


@dataclass
class ImageSpec:
    """Pictures: decoded to RGB, cropped, resized to `size` x `size`, mirrored, augmented, normalised.

    Evaluation shows one view, without random choices: what `resize` says. So does training if `random_crop` is off, but for
    flips and augmentations. Boxes and masks follow the views in `image`, local views have none.
    """

    size: int = 224
    mean: list[float] = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])
    std: list[float] = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])
    scale: list[float] = field(default_factory=lambda: [0.9, 1.0])  # RandomResizedCrop: share of the picture's area
    ratio: list[float] = field(default_factory=lambda: [0.75, 4 / 3])  # RandomResizedCrop: width over height
    mirror: float = 0.0  # probability of a left-right flip in training
    interpolation: str = "bicubic"  # or "bilinear"
    random_crop: bool = True  # RandomResizedCrop in training
    resize: str = "crop"  # the square in the middle; "squash": all of it, stretched; "pad": all of it, the mean colour around
    augment: AugmentSpec = field(default_factory=AugmentSpec)
    views: list[ViewSpec] = field(default_factory=list)  # in training in place of the one view that the fields above describe
    local_views: list[ViewSpec] = field(default_factory=list)  # beside them, smaller: Batch["image_local"]
    local_size: int = 96
    boxes: str = ""  # JSON field of the boxes, n times x0 y0 x1 y1 in pixels; "objects.box": the field of each object of a list
    masks: str = ""  # JSON field of their masks, in the same order: run lengths as data/emojiworld/rle.py describes
    max_boxes: int = 32  # a picture with more is left out
    min_visible: float = 0.1  # a box counts while this share of its area is in view
    pictures: int = 1  # of each sample: the members 0.jpg, 1.jpg, ..., each with views of its own: [B, pictures, (V,) 3, S, S]


@dataclass
class VideoSpec:
    """Videos: `frames` of each, all cut, resized to `size` x `size` and mirrored alike, normalised.

    sampling (data/frames.py): "uniform"; "segment": a random frame of each of `frames` equal parts; "head_tail": random ones of
    both halves; "dense": `stride` apart from a random place on; "middle": `stride` apart around the middle. Evaluation takes
    "uniform" in place of "segment" and "head_tail", "middle" in place of "dense". A video of fewer frames repeats its last one.
    """

    frames: int = 8
    sampling: str = "segment"
    stride: int = 1
    short_frames: int = 0  # > 0: also as many of a random moment (in evaluation: of the middle), HiTeA's second view
    short_share: list[float] = field(default_factory=lambda: [0.25, 0.5])  # the moment's length over the video's
    interval: list[str] = field(default_factory=list)  # two fields of the JSON: the seconds in which the clip begins and ends
    size: int = 224
    mean: list[float] = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])
    std: list[float] = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])
    resize: str = "crop"  # RandomResizedCrop, the centre in evaluation; or "squash": the whole frame, its aspect ratio not kept
    scale: list[float] = field(default_factory=lambda: [0.5, 1.0])  # RandomResizedCrop: share of the frame's area
    ratio: list[float] = field(default_factory=lambda: [0.75, 4 / 3])  # RandomResizedCrop: width over height
    mirror: float = 0.0  # probability of a left-right flip in training
    interpolation: str = "bicubic"  # or "bilinear"


@dataclass
class AudioSpec:
    """Sounds: mixed to one channel, resampled, cut or padded to `seconds`, as log-mel spectrogram or waveform.

    What is longer is cut at a random place in training, in the middle in evaluation. The spectrogram: Hann window, centred frames
    with reflected ends, power, triangular filters, logarithm. Masks (Park et al. 2019, "SpecAugment") in training alone.
    """

    sample_rate: int = 16000  # Hz
    seconds: float = 10.0
    pad: str = "zeros"  # or "repeat": over and over; "repeat_zeros": whole repetitions, then zeros (CLAP's repeatpad)
    interval: list[str] = field(default_factory=list)  # two fields of the JSON: the seconds in which the sound begins and ends
    int16: bool = False  # samples rounded towards zero to 16 bits, as LAION's CLAP does
    keep_silence: bool = False  # False: a sound without a single sample other than zero counts as damaged
    features: str = "log_mel"  # or "waveform"
    n_fft: int = 400
    hop: int = 160
    win: int = 400
    n_mels: int = 80
    f_min: float = 0.0  # Hz
    f_max: float = 8000.0
    mel_scale: str = "slaney"  # or "htk"
    mel_norm: str = "slaney"  # each filter of the same area; or "none": of height one
    log: str = "log10"  # or "db": 10 log10; "ln"
    floor: float = 1e-10  # power below this counts as this
    dynamic_range: float = 0.0  # > 0: values further below the sound's largest are raised to it, in units of `log`
    shift: float = 0.0  # (value + shift) * scale at the end
    scale: float = 1.0
    drop_last_frame: bool = False  # seconds * sample_rate / hop frames; False: one more, centred on the sound's end
    time_masks: int = 0
    time_mask_width: int = 0  # frames, at most
    mel_masks: int = 0
    mel_mask_width: int = 0
    mask_value: float = 0.0

    @classmethod
    def whisper(cls, n_mels: int = 80, seconds: float = 30.0) -> AudioSpec:
        """Whisper's and Qwen-Audio's input: 100 frames a second (Radford et al. 2022, section 2.2)."""
        return cls(seconds=seconds, n_mels=n_mels, dynamic_range=8.0, shift=4.0, scale=0.25, drop_last_frame=True)

    @classmethod
    def clap(cls) -> AudioSpec:
        """CLAP's input without feature fusion, as ClapFeatureExtractor's "rand_trunc": 64 x 1001 decibels."""
        return cls(
            sample_rate=48000, pad="repeat_zeros", n_fft=1024, hop=480, win=1024, n_mels=64, f_min=50.0, f_max=14000.0, log="db"
        )


@dataclass
class MaskSpec:
    """What a masked language model is asked for: Batch NAME_masked and NAME_labels (data/masking.py, mask_tokens)."""

    rate: float = 0.15  # share of the tokens
    words: bool = False  # whole words are chosen together
    exact: bool = False  # exactly that share of each text, not each token for itself
    longest: int = 1  # runs of up to so many
    shares: list[float] = field(default_factory=lambda: [0.8, 0.1])  # of the chosen: mask token, random token; the others stay


@dataclass
class TextSpec:
    """A text of each sample: written by a template, tokenised, cut to `context_length` with the end token kept, padded.

    A template names fields of the sample's JSON: "a photo of a {label}"; "{caption}" is also the member txt. Of a field that is
    a list, training draws one anew each epoch and evaluation takes the first: "{captions}" of texts, "{qa.question}" of objects,
    of which all texts and targets of the sample then take the same.

    Of the special tokens that the model adds (Vocabulary.extra), a template may spell one, which then is that token; whatever a
    sample's field spells stays text. A sample without one of the fields, or with an empty one (but for the caption), is damaged.
    Evaluation hides nothing: it has no NAME_masked.
    """

    context_length: int = 77
    templates: list[str] = field(default_factory=lambda: ["{caption}"])  # several: one drawn each epoch, in evaluation the first
    tokenizer: str = ""  # one of data.tokenizers; "": data.tokenizer
    clean: str = ""  # what is done to each field's value; "albef": lower case, without punctuation, - and / become spaces
    max_words: int = 0  # each field's value is cut behind so many words, after it was cleaned; 0: none
    drop: str = "end"  # what a text that is too long loses; or "start", as always before an answer: the prompt gives way
    # Behind a prompt, the text it is answered with, written likewise: bos, prompt, answer, eos, where NAME_labels asks for the
    # answer and its eos alone.
    answer: list[str] = field(default_factory=list)
    every: bool = False  # all elements of the list, a row each: NAME_of, NAME_weight (the elements' "weight", else 1)
    mask: MaskSpec | None = None


@dataclass
class TargetSpec:
    """A number, a class or several numbers of each sample, from its JSON. Classes are named or numbered there; true counts as
    1."""

    key: str = "label"  # field of the JSON; "objects.count": of the object that was drawn for the texts
    kind: str = "class"  # int64 [B]; "number": float32 [B]; "vector": float32 [B, n]
    classes: list[str] = field(default_factory=list)  # class: names in their order; empty: evaluation.class_names
    first: int = 0  # class: the number that the JSON gives to the first of them


@dataclass
class Vocabulary:
    """What a model asks of a tokenizer: ids below `size`, and special tokens at the ids that it was made for."""

    size: int
    bos_id: int | None = None  # None: wherever it is
    eos_id: int | None = None
    pad_id: int | None = None
    mask_id: int | None = None
    mask: bool = False  # it needs a mask token
    extra: list[str] = field(default_factory=list)  # further special tokens, such as "[DEC]": the ids follow the others


@dataclass
class VolumeSpec:
    """Volumes (the member `vol`, see data/volume_file.py): resampled, cut, windowed to channels in 0 .. 1, (x - mean) / std.

    Axes D, H, W grow to the patient's head, front and right ("RAS", read backwards), or to the head, back and left ("LPS"), which
    is how slices are displayed. What lies beyond the volume has the windows' floor. Without random choices in evaluation: the
    middle, the whole scale, no flips. All lists of three are D, H, W.
    """

    size: list[int] = field(default_factory=lambda: [96, 96, 96])  # voxels of the view
    fit: str = "crop"  # a part, at `spacing`; "resize": all of it, stretched
    spacing: list[float] = field(default_factory=list)  # mm between the voxels of a part; empty: as stored
    scale: list[float] = field(default_factory=lambda: [1.0, 1.0])  # the view's extent times a number uniform between these
    flips: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # probability for each axis
    foreground: bool = False  # the views are taken of the box around what is not background
    orientation: str = "RAS"  # or "LPS"
    windows: list[list[float]] = field(default_factory=lambda: [[40.0, 400.0]])  # centre, width: a channel each
    percentiles: list[list[float]] = field(default_factory=list)  # low, high of the volume's foreground, in place of windows
    mean: list[float] = field(default_factory=lambda: [0.0])  # one, or one for each channel
    std: list[float] = field(default_factory=lambda: [1.0])
    antialias: bool = True  # averages blocks of voxels where the view is coarser than the volume
    slices: bool = False  # size[0] slices as they are stored: the middle, in training a random one, of each of as many parts
    neighbours: int = 0  # of slices: channels are also this many slices before and after; each window's stand together
    labels: bool = False  # the label map beside the voxels, by nearest neighbours
    local_views: int = 0  # parts drawn independently, at `spacing`: Batch["volume_local"], in training alone
    local_size: list[int] = field(default_factory=lambda: [96, 96, 96])


@dataclass
class PointsSpec:
    """Point clouds (.npy, see data/points.py): `count` points of each, normalised, then in training scaled, flipped, turned about
    the up axis, shifted, jittered, dropped."""

    count: int = 1024
    sampling: str = "random"  # in evaluation evenly along the file; "farthest": farthest-point sampling
    axes: list[str] = field(default_factory=lambda: ["x", "y", "z"])  # which stored axis becomes x, y, z; "-x": turned round
    up: str = "z"  # after `axes`
    normalize: str = "sphere"  # centred on the mean, the largest radius 1; "centre": centred alone; "none"
    colors: bool = False
    height: bool = False  # a channel: above the floor, the 0.99th percentile along `up` (Qi et al. 2019, VoteNet)
    scale: list[float] = field(default_factory=lambda: [1.0, 1.0])  # a factor uniform between these
    flips: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # probability for each axis
    rotation: float = 0.0  # degrees, uniform up to this to either side; 180: any
    shift: float = 0.0  # along each axis, uniform up to this to either side
    jitter: float = 0.0  # standard deviation of Gaussian noise ...
    jitter_clip: float = 0.05  # ... cut off here
    dropout: float = 0.0  # a share uniform up to this becomes copies of the first point (Qi et al. 2017, PointNet++)


@dataclass
class DocumentSpec:
    """Documents in packed rows, in place of all but `image`: the batch size counts rows of `length` tokens, see Batch.positions
    and what follows there. A sample is a text (the member txt), or a text with pictures in it (the json's "parts" and members
    0.jpg, 1.png, ...) as `vlpfast-data build documents` writes it; without DataSpec.image its texts alone. What is longer than a
    row is cut (data/documents.py, `window`): in training anywhere, or near a picture.
    """

    length: int = 256  # tokens of a row
    tokenizer: str = ""  # as TextSpec.tokenizer
    image_token: str = "<image>"  # what stands for a picture, `tokens_per_image` times: of Vocabulary.extra, as end_token
    tokens_per_image: int = 1
    end_token: str = ""  # closes a picture's text (Flamingo's <|endofchunk|>); "": nothing does
    max_images: int = 0  # pictures after so many are left out of a document; 0: none is
    most_shift: int = 20  # tokens before its picture at which a cut begins, at most
    asked: str = "all"  # what text_labels ask for; "pictured": only text that belongs to a picture, up to its end_token


@dataclass
class DataSpec:
    """Ties a model to its pipeline. A modality set to None is neither read nor yielded."""

    image: ImageSpec | None = field(default_factory=ImageSpec)
    text: TextSpec | None = field(default_factory=TextSpec)
    texts: dict[str, TextSpec] = field(default_factory=dict)  # further ones: Batch[name], Batch[name + "_mask"], ...
    targets: dict[str, TargetSpec] = field(default_factory=dict)  # Batch[name]
    video: VideoSpec | None = None
    audio: AudioSpec | None = None
    volume: VolumeSpec | None = None
    points: PointsSpec | None = None
    documents: DocumentSpec | None = None


class Tokenizer(Protocol):
    """Text to ids. `vocab_size` counts every id; ids of the special tokens are plain ints."""

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int

    def encode(self, texts: Sequence[str], context_length: int) -> tuple[Tensor, Tensor]:
        """-> ids [B, L] int64, mask [B, L] bool (True = token), L = context_length; bos + text + eos, cut text keeps its eos."""
        ...

    def save(self, path: str) -> None: ...


@runtime_checkable
class Loader(Protocol):
    """Batches with a position that can be saved. A training loader never ends; an evaluation loader makes one pass in order."""

    batch_size: int
    skipped: dict[str, str]  # shard.tar:key of each damaged sample met so far -> what was wrong

    def __iter__(self) -> Iterator[Batch]: ...
    def __len__(self) -> int:
        """Batches in one epoch of this rank."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was handed out; plain JSON values."""
        ...

    def load_state_dict(self, state: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Goes on from what this rank saved, or from what another number of ranks saved together, in their order."""
        ...

    def close(self) -> None: ...


# --- what a model may offer beside forward(batch, progress) -> dict[str, Tensor] -----------------------------------------


@runtime_checkable
class BeforeStep(Protocol):
    def before_step(self, progress: Progress) -> None:
        """Called before the forward of every step: clamps, ramps, moving averages. The only places where state changes are
        this and after_step; forward changes none."""
        ...


@runtime_checkable
class AfterStep(Protocol):
    def after_step(self) -> None:
        """Called after the optimiser's step: queues."""
        ...


@runtime_checkable
class PreparesEpoch(Protocol):
    def prepare_epoch(self, loader: Loader) -> None: ...


@runtime_checkable
class HasModes(Protocol):
    def set_mode(self, mode: str) -> None:
        """Switches to the objective set of a stage, and by requires_grad to what is offered for training in it; raises ValueError
        naming the known modes."""
        ...


@runtime_checkable
class LayerDepths(Protocol):
    def layer_depth(self, name: str) -> tuple[int, int]:
        """Where a parameter stands for layer_decay: its depth in its tower and the tower's last depth. Its learning rate is
        multiplied by layer_decay ** (last - depth). Without this method depths are read from the names."""
        ...


@runtime_checkable
class EncodesImages(Protocol):
    def encode_image(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] -> [B, D] of unit length."""
        ...


@runtime_checkable
class EncodesTexts(Protocol):
    def encode_text(self, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """text [B, L] -> [B, D] of unit length."""
        ...


@runtime_checkable
class ScoresPairs(Protocol):
    """Scores a picture and a text together: the second stage of retrieval. The states are made once for each, not for each
    pair."""

    def image_states(self, image: Tensor) -> Tensor:
        """image [B, 3, H, W] -> [B, T, C]"""
        ...

    def text_states(self, text: Tensor, text_mask: Tensor) -> Tensor:
        """text [B, L], text_mask [B, L] bool -> [B, L, C]"""
        ...

    def score_pairs(self, image_states: Tensor, text_states: Tensor, text_mask: Tensor) -> Tensor:
        """[P, T, C], [P, L, C], [P, L] bool -> [P] float32, the larger the better they fit"""
        ...


@runtime_checkable
class Classifies(Protocol):
    """Names a class; where batches have no field "label" for it, the model is not asked."""

    def classify(self, batch: Batch) -> Tensor:
        """-> logits [B, K]"""
        ...


@runtime_checkable
class TakesClasses(Protocol):
    """Works on a list of class names, which is given before training and may be another at evaluation."""

    def set_classes(self, names: Sequence[str], tokenizer: Tokenizer) -> None: ...


@runtime_checkable
class Generates(Protocol):
    """Writes a text about each sample, in ids of the tokenizer that the attribute `writes_with` names ("": data.tokenizer)."""

    writes_with: str

    def generate(self, batch: Batch, *, max_new_tokens: int = 30, beams: int = 3, length_penalty: float = 1.0) -> Tensor:
        """-> ids [B, L] int64 without the prompt, each row up to its end token, then padding"""
        ...


@runtime_checkable
class Answers(Protocol):
    """Ranks given answers to the question in a batch. The candidates are of the tokenizer that `writes_with` names."""

    writes_with: str

    def rank_answers(self, batch: Batch, candidates: Tensor, candidate_mask: Tensor) -> Tensor:
        """candidates [K, L] int64 as Tokenizer.encode makes them, candidate_mask [K, L] bool -> [B, K] float32, larger is
        likelier; -inf where a candidate was ruled out before it was scored in full"""
        ...


@runtime_checkable
class SplitsContrastive(Protocol):
    """Lets a large batch be encoded in micro-batches and contrasted once."""

    def encode(self, batch: Batch) -> dict[str, Tensor]: ...
    def contrast(self, features: dict[str, Tensor]) -> dict[str, Tensor]: ...
