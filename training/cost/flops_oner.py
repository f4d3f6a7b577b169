"""Operations of one training step of OneR by formula, to check the counter against.

B pairs, N patches, W padded text length, n tokens of all texts, M masked tokens, K keys, D width, I width of the
feed-forward, V vocabulary, P embedding width, H hidden width of the heads.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from oner.modeling.configuration_oner import OneRConfig
from oner.modeling.modeling_oner_pretraining import SOURCES
from oner.training.objectives.oner import CONTRASTS, READS, OneRObjectiveArguments

from .flops import attention_flops, linear_flops


@dataclass(frozen=True)
class PairShape:
    """Sizes of a batch: B pairs, W length of the longest text, n tokens, M of them masked, K gathered keys."""

    pairs: int
    slots: int
    words: int
    masked_words: int
    keys: int


@dataclass(frozen=True)
class StepFlops:
    """Operations of a step: the student's forward, the teacher's, and the backward, without recomputation."""

    student: float
    teacher: float
    backward: float

    @property
    def total(self) -> float:
        return self.student + self.teacher + self.backward


def oner_step_flops(config: OneRConfig, arguments: OneRObjectiveArguments, shape: PairShape) -> StepFlops:
    """A step of `OneRObjective` on `OneRForPreTraining`, with `gather_gradient` off, at the start of a run."""
    # inputs of the losses: compared representations, and masked streams
    contrasts = [name for name in arguments.losses if name in CONTRASTS]
    queries = {query for name in contrasts for query, _ in CONTRASTS[name]}
    keys = {key for name in contrasts for _, key in CONTRASTS[name]}
    read = {stream for name, streams in READS.items() if name in arguments.losses for stream in streams}
    modelled = {name for name in arguments.masked_streams if name in read}
    masks = bool(modelled)

    # the trunk: one pass if contrastive losses use masked streams, otherwise two passes
    contrast_streams = _streams(queries)
    patches = _patches(config)
    kept = arguments.keeping.count(patches, 0.0)
    student = _stem(config, shape)
    if arguments.contrast_masked or not masks:
        student += _trunk(config, shape, sorted(contrast_streams | modelled), kept)
    else:
        student += _stem(config, shape) + _trunk(config, shape, contrast_streams, kept)
        student += _trunk(config, shape, modelled, patches if "mim" in arguments.losses else kept)

    # heads of the contrastive losses, of masked tokens and of masked patches
    student += _heads(config, shape, queries, predict=True)
    if "mlm" in arguments.losses:
        rows = shape.masked_words * len(modelled - {"image"})
        student += linear_flops(rows, config.hidden_size, config.hidden_size + config.vocab_size)
    if "mim" in arguments.losses:
        pixels = config.patch_size**2 * config.num_channels
        student += linear_flops(_patches(config) * shape.pairs * len(modelled - {"text"}), config.hidden_size, pixels)

    # the first convolution computes no gradient of the pixels
    first = 0.0 if not (masks or contrasts) else _first_convolution(config, shape)
    stems = 1 if arguments.contrast_masked or not masks else 2
    terms = sum(len(CONTRASTS[name]) for name in contrasts)
    loss = terms * linear_flops(shape.pairs, config.projection_dim, shape.keys)

    # the teacher computes the keys, without predictor
    teacher = 0.0
    if contrasts:
        read = kept if arguments.keep_in_keys else patches
        teacher = _stem(config, shape) + _trunk(config, shape, _streams(keys), read)
        teacher += _heads(config, shape, keys, predict=False)

    # keys carry no gradient: the loss has a backward for the queries only
    return StepFlops(student + loss, teacher, 2 * student - stems * first + loss)


def _patches(config: OneRConfig) -> int:
    return (config.image_size // config.patch_size) ** 2


def _streams(representations: set[str]) -> set[str]:
    return {source for name in representations for source in SOURCES[name]}


def _stem(config: OneRConfig, shape: PairShape) -> float:
    width = config.hidden_size
    positions = shape.pairs * _patches(config)
    if config.stem == "linear":
        return linear_flops(positions, config.patch_size**2 * config.num_channels, width)

    # 3 x 3 convolutions of stride 2, each twice as wide as the previous one, then a 1 x 1 convolution
    stages = config.patch_size.bit_length() - 1
    total = linear_flops(positions, width, width)
    narrow = config.num_channels
    for stage in range(stages):
        wide = width // 2 ** (stages - 1 - stage)
        total += linear_flops(shape.pairs * (config.image_size // 2 ** (stage + 1)) ** 2, 9 * narrow, wide)
        narrow = wide
    return total


def _first_convolution(config: OneRConfig, shape: PairShape) -> float:
    if config.stem == "linear":
        return _stem(config, shape)
    wide = config.hidden_size // 2 ** (config.patch_size.bit_length() - 2)
    return linear_flops(shape.pairs * (config.image_size // 2) ** 2, 9 * config.num_channels, wide)


def _trunk(config: OneRConfig, shape: PairShape, streams: Iterable[str], patches: int) -> float:
    """All layers on packed streams: linear layers on real tokens, attention on padded rows; `patches` per image."""
    width = config.hidden_size
    pairs = shape.pairs
    tokens = attention = 0.0
    for stream in streams:
        own, _, other = stream.partition("|")
        rows, length = _length(shape, own, patches)
        tokens += rows
        attention += attention_flops(pairs, length, _length(shape, other or own, patches)[1], width)
    maps = linear_flops(tokens, width, 4 * width + 2 * config.intermediate_size)
    return config.num_hidden_layers * (maps + attention)


def _length(shape: PairShape, stream: str, patches: int) -> tuple[int, int]:
    """Real tokens of a stream over the batch, and its padded length."""
    rows, length = shape.pairs, 1
    if "image" in stream:
        rows += shape.pairs * patches
        length += patches
    if "text" in stream:
        rows += shape.words
        length += shape.slots
    return rows, length


def _heads(config: OneRConfig, shape: PairShape, representations: set[str], predict: bool) -> float:
    # mixing hidden states needs one projection per mixture, mixing embeddings one per stream
    mixed = config.mixup_space == "hidden"
    rows = shape.pairs * len(representations if mixed else _streams(representations))
    total = _mlp(config, rows, config.hidden_size, config.projector_layers)
    if predict:
        total += _mlp(config, shape.pairs * len(representations), config.projection_dim, config.predictor_layers)
    return total


def _mlp(config: OneRConfig, rows: float, inner: int, layers: int) -> float:
    if layers == 0:
        return 0.0
    widths = [inner, *[config.projection_hidden_size] * (layers - 1), config.projection_dim]
    return sum(linear_flops(rows, a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
