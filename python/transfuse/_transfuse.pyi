"""Native part of transfuse; use the package, not this module."""

from collections.abc import Mapping, Sequence
import enum
from typing import overload


class ErrorCode(enum.Enum):
    """Why an operation failed."""

    INVALID_ARGUMENT = 0

    LAYOUT_MISMATCH = 1

    CORRUPT = 2

    NOT_FOUND = 3

    ALREADY_EXISTS = 4

    PERMISSION_DENIED = 5

    RESOURCE_EXHAUSTED = 6

    UNAVAILABLE = 7

    DEADLINE_EXCEEDED = 8

    TORN_READ = 9

    VERSION_GONE = 10

    FINGERPRINT_MISMATCH = 11

    POISONED = 12

    CANCELLED = 13

    GROUP_BROKEN = 14

    UNSUPPORTED = 15

    NO_FITTING_SOURCE = 16

class Digest:
    """
    Identity of a layout, a plan, or the bytes of a version (a revision): equal in every process.
    """

    def __eq__(self, arg: object, /) -> bool: ...

    def __lt__(self, arg: Digest, /) -> bool: ...

    @staticmethod
    def parse(text: str) -> Digest:
        """Reads what str() gives."""

    def __hash__(self) -> int: ...

    def __str__(self) -> str: ...

    def __repr__(self) -> str: ...

class RequirementKind(enum.Enum):
    """How a requirement is met."""

    EQUALS = 0

    AT_LEAST = 1

    PRESENT = 2

class Requirement:
    """
    One condition on the metadata of a version or source, or (with a pattern) of every tensor of a source's layout whose name matches.
    """

    def __init__(self, key: str, kind: RequirementKind, value: str = '', tensors: str = '') -> None: ...

    @property
    def key(self) -> str: ...

    @property
    def kind(self) -> RequirementKind: ...

    @property
    def value(self) -> str: ...

    @property
    def tensors(self) -> str: ...

    def __eq__(self, arg: object, /) -> bool: ...

class Demand:
    """What a target accepts; a source that does not fit is not read."""

    def __init__(self, kinds: Sequence[str] = [], require: Sequence[Requirement] = [], revision: Digest | None = None) -> None: ...

    @property
    def kinds(self) -> list[str]: ...

    @property
    def require(self) -> list[Requirement]: ...

    @property
    def revision(self) -> Digest | None: ...

    def __eq__(self, arg: object, /) -> bool: ...

MAX_RANK: int = 8

class Dtype(enum.Enum):
    """Element type of a tensor or parameter."""

    F32 = 0

    F16 = 1

    BF16 = 2

    F8E4M3 = 3

    F8E5M2 = 4

    I8 = 5

    U8 = 6

    I32 = 7

    I64 = 8

    @property
    def size_bytes(self) -> int: ...

    @property
    def text(self) -> str: ...

    @staticmethod
    def parse(name: str) -> Dtype:
        """The dtype of a name such as 'f32', 'bf16', 'f8e4m3'."""

def castable(source: Dtype, target: Dtype) -> bool:
    """True if a refit may read `source` and write `target`."""

class Box:
    """Half-open box: dimension d covers [offset[d], offset[d] + length[d])."""

    def __init__(self, offset: Sequence[int], length: Sequence[int]) -> None: ...

    @staticmethod
    def whole(shape: Sequence[int]) -> Box: ...

    @property
    def offset(self) -> tuple[int, ...]: ...

    @property
    def length(self) -> tuple[int, ...]: ...

    @property
    def element_count(self) -> int: ...

    def intersect(self, other: Box) -> Box | None: ...

    def __eq__(self, arg: object, /) -> bool: ...

    def __hash__(self) -> int: ...

    def __repr__(self) -> str: ...

class TensorSpec:
    """A tensor as the published checkpoint names it."""

    def __init__(self, name: str, dtype: Dtype, shape: Sequence[int]) -> None: ...

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> Dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __eq__(self, arg: object, /) -> bool: ...

    def __repr__(self) -> str: ...

class ParameterSpec:
    """A parameter as this process holds it: a span of storage elements."""

    def __init__(self, name: str, dtype: Dtype, element_count: int) -> None: ...

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> Dtype: ...

    @property
    def element_count(self) -> int: ...

    @property
    def size_bytes(self) -> int: ...

    def __eq__(self, arg: object, /) -> bool: ...

    def __repr__(self) -> str: ...

class Tile:
    """
    Element i of `box` of a tensor lies at element_offset + sum(i * strides) of a parameter. Tensor and parameter are indices into their layout.
    """

    @property
    def tensor(self) -> int: ...

    @property
    def parameter(self) -> int: ...

    @property
    def box(self) -> Box: ...

    @property
    def element_offset(self) -> int: ...

    @property
    def element_strides(self) -> tuple[int, ...]: ...

    def __eq__(self, arg: object, /) -> bool: ...

class Fill:
    """Elements of a parameter that hold zeros and no catalog tensor."""

    @property
    def parameter(self) -> int: ...

    @property
    def element_offset(self) -> int: ...

    @property
    def length(self) -> tuple[int, ...]: ...

    @property
    def element_strides(self) -> tuple[int, ...]: ...

    def __eq__(self, arg: object, /) -> bool: ...

class Quantization:
    """
    A tensor of fp8 e4m3 and the tensor of its f32 scales, one for every block. Both are indices into the layout's tensors.
    """

    def __init__(self, tensor: int, scales: int, block_rows: int, block_columns: int) -> None: ...

    @property
    def tensor(self) -> int: ...

    @property
    def scales(self) -> int: ...

    @property
    def block_rows(self) -> int: ...

    @property
    def block_columns(self) -> int: ...

    def __eq__(self, arg: object, /) -> bool: ...

    def __repr__(self) -> str: ...

class Layout:
    """
    Which boxes of which catalog tensors lie where in the parameters of one process. Immutable; holds no addresses; build it with LayoutBuilder.
    """

    def __init__(self) -> None: ...

    @property
    def tensors(self) -> list[TensorSpec]: ...

    @property
    def parameters(self) -> list[ParameterSpec]: ...

    @property
    def tiles(self) -> list[Tile]: ...

    @property
    def fills(self) -> list[Fill]: ...

    def find_tensor(self, name: str) -> int | None:
        """Index of a tensor in `tensors`, or None."""

    def find_parameter(self, name: str) -> int | None:
        """Index of a parameter in `parameters`, or None."""

    @property
    def digest(self) -> Digest: ...

    @property
    def kind(self) -> str:
        """
        For which consumer the values were made: "hf_raw", ...; "": not stated.
        """

    def metadata_of(self, tensor: str) -> dict[str, str]:
        """What the layout says of a tensor."""

    def with_kind(self, kind: str) -> Layout:
        """The same layout with this kind, and with another digest."""

    @property
    def quantizations(self) -> list[Quantization]: ...

    def with_quantizations(self, quantizations: Sequence[Quantization]) -> Layout:
        """The same layout with these fp8 tensors and scales in place of its own."""

    @property
    def tile_bytes(self) -> int: ...

    @property
    def parameter_bytes(self) -> int: ...

    def encode(self) -> bytes:
        """The compact wire form."""

    @staticmethod
    def decode(data: bytes) -> Layout:
        """Reads the wire form; CorruptError if it is none."""

    def __eq__(self, arg: object, /) -> bool: ...

    def __hash__(self) -> int: ...

    def __repr__(self) -> str: ...

class LayoutBuilder:
    """Collects a layout in any order; build() finds the errors."""

    def __init__(self) -> None: ...

    def tensor(self, name: str, dtype: Dtype, shape: Sequence[int]) -> int:
        """Adds a catalog tensor and returns its handle."""

    def parameter(self, name: str, dtype: Dtype, element_count: int) -> int:
        """Adds a parameter of this process and returns its handle."""

    def tile(self, tensor: int, box: Box, parameter: int, element_offset: int = 0, element_strides: Sequence[int] | None = None) -> None:
        """
        Says that a box of a tensor lies at an offset of a parameter; strides default to row-major over the box.
        """

    def fill(self, parameter: int, element_offset: int, length: Sequence[int], element_strides: Sequence[int] | None = None) -> None:
        """Declares elements that hold zeros."""

    def quantization(self, tensor: int, scales: int, block_rows: int = 128, block_columns: int = 128) -> None:
        """
        Says that a tensor of fp8 e4m3 has its scales, one for every block, in another tensor; a block that is larger than the tensor is the tensor.
        """

    def kind(self, kind: str) -> None:
        """States for which consumer the values are made."""

    def metadata(self, tensor: int, metadata: Mapping[str, str]) -> None:
        """Says something of a tensor that lasts as long as the layout."""

    def build(self) -> Layout: ...

def revision(layout: Layout, parameters: dict[str, object], threads: int = 0) -> Digest:
    """
    The content address of weights that this process holds whole: the same however they are fused or sharded. LayoutMismatchError names a tensor that is here in part.
    """

class FindingKind(enum.Enum):
    """What is wrong between a target and its sources."""

    GAP = 0

    UNCOVERED = 1

    OVERLAP = 2

    DTYPE = 3

    SHAPE = 4

    UNKNOWN_TENSOR = 5

    BLOCK = 6

class Finding:
    """
    One reason why no plan exists. `box` is in catalog coordinates where `tensor` is set, else in elements of `parameter`.
    """

    @property
    def kind(self) -> FindingKind: ...

    @property
    def tensor(self) -> str: ...

    @property
    def parameter(self) -> str: ...

    @property
    def box(self) -> Box: ...

    @property
    def reason(self) -> str: ...

    def __repr__(self) -> str: ...

class Run:
    """One strided run of one catalog tensor into one target parameter."""

    @property
    def target_offset(self) -> int: ...

    @property
    def linear_index(self) -> int: ...

    @property
    def count(self) -> tuple[int, int, int]: ...

    @property
    def tensor(self) -> int: ...

    @property
    def parameter(self) -> int: ...

    @property
    def target_pattern(self) -> int: ...

    @property
    def index_pattern(self) -> int: ...

    @property
    def quantizes(self) -> bool: ...

    @property
    def element_count(self) -> int: ...

class Holder:
    """A distinct source layout that holds a run, and where."""

    @property
    def source_offset(self) -> int: ...

    @property
    def source_layout(self) -> int: ...

    @property
    def parameter(self) -> int: ...

    @property
    def source_pattern(self) -> int: ...

    @property
    def dequantizes(self) -> bool: ...

class Chunk:
    """A range of runs: the unit of work, progress and verification."""

    @property
    def first_run(self) -> int: ...

    @property
    def run_count(self) -> int: ...

    @property
    def size_bytes(self) -> int: ...

class Plan:
    """
    Which bytes of which sources land where in one target. Immutable; compile() makes it.
    """

    @property
    def chunks(self) -> list[Chunk]: ...

    @property
    def runs(self) -> list[Run]: ...

    @property
    def holders(self) -> list[Holder]: ...

    def holders_of(self, run: Run) -> list[Holder]: ...

    def pattern(self, index: int) -> tuple[int, int, int]:
        """Strides of a pattern in elements, outermost first."""

    @property
    def target(self) -> Layout: ...

    @property
    def source_layouts(self) -> list[Layout]: ...

    @property
    def chunk_bytes(self) -> int: ...

    @property
    def key(self) -> Digest: ...

    @property
    def size_bytes(self) -> int: ...

    @property
    def memory_bytes(self) -> int: ...

    def box_of(self, run: Run) -> Box: ...

class PairTraffic:
    """Bytes from one source to one target (indices)."""

    @property
    def source(self) -> int: ...

    @property
    def target(self) -> int: ...

    @property
    def size_bytes(self) -> int: ...

    @property
    def run_count(self) -> int: ...

class RunLengthBucket:
    """Pieces by contiguous bytes at the source."""

    @property
    def min_bytes(self) -> int: ...

    @property
    def piece_count(self) -> int: ...

    @property
    def size_bytes(self) -> int: ...

class Explanation:
    """What a set of plans costs, for people."""

    @property
    def sources(self) -> list[str]: ...

    @property
    def targets(self) -> list[str]: ...

    @property
    def pairs(self) -> list[PairTraffic]: ...

    @property
    def run_lengths(self) -> list[RunLengthBucket]: ...

    @property
    def total_bytes(self) -> int: ...

    @property
    def busiest_source_bytes(self) -> int: ...

    @property
    def busiest_target_bytes(self) -> int: ...

    @property
    def busiest_link(self) -> str: ...

    def to_text(self) -> str: ...

    def to_json(self) -> str: ...

    def to_svg(self) -> str: ...

def compile(target: Layout, sources: Sequence[Layout], chunk_bytes: int = 1048576) -> Plan:
    """
    Proves that the sources cover the target, and compiles the plan. LayoutMismatchError otherwise; diagnose() returns every reason.
    """

def diagnose(target: Layout, sources: Sequence[Layout], limit: int = 1000) -> list[Finding]:
    """
    Everything that is wrong between a target and its sources; empty if compile() succeeds.
    """

def plan_key(target: Digest, sources: Sequence[Digest], chunk_bytes: int = 1048576) -> Digest:
    """The key that compile() would give, without compiling."""

def explain(targets: Sequence[tuple[str, Plan]], sources: Sequence[tuple[str, Layout]]) -> Explanation:
    """
    Explains plans, given as (name, plan) pairs, over sources, given as (name, layout) pairs.
    """

class ModelConfig:
    """What layouts need to know of an HF config.json."""

    @property
    def architecture(self) -> str: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def intermediate_size(self) -> int: ...

    @property
    def moe_intermediate_size(self) -> int: ...

    @property
    def num_hidden_layers(self) -> int: ...

    @property
    def num_attention_heads(self) -> int: ...

    @property
    def num_key_value_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def num_experts(self) -> int: ...

    @property
    def tie_word_embeddings(self) -> bool: ...

    @property
    def dtype(self) -> Dtype: ...

    @property
    def dense_layers(self) -> int: ...

    @property
    def shared_experts(self) -> int: ...

    @property
    def mtp_layers(self) -> int: ...

def parse_model_config(json: str) -> ModelConfig:
    """Reads the text of an HF config.json."""

def make_catalog(config: ModelConfig) -> list[TensorSpec]:
    """The tensors of the published checkpoint, by HF name."""

class ParallelSpec:
    """
    Parallelism of one side, such as 'fsdp:dp=4' or 'vllm:tp=2'. 0 where the spec leaves a number open.
    """

    @property
    def family(self) -> str: ...

    @property
    def tp(self) -> int: ...

    @property
    def dp(self) -> int: ...

    @property
    def replicas(self) -> int: ...

    @property
    def dtype(self) -> Dtype: ...

    @property
    def pp(self) -> int: ...

    @property
    def vpp(self) -> int: ...

    @property
    def cp(self) -> int: ...

    @property
    def ep(self) -> int: ...

    @property
    def etp(self) -> int: ...

    @property
    def first(self) -> int: ...

    @property
    def last(self) -> int: ...

    @property
    def layers(self) -> list[int]: ...

    @property
    def vocab_divisor(self) -> int: ...

    @property
    def padded_vocab(self) -> int: ...

    @property
    def expert_parallel(self) -> bool: ...

    @property
    def round_robin(self) -> bool: ...

    @property
    def up_before_gate(self) -> bool: ...

    @property
    def separate_norms(self) -> bool: ...

    @property
    def sequential_experts(self) -> bool: ...

    @property
    def account_for_embedding(self) -> bool: ...

    @property
    def account_for_loss(self) -> bool: ...

    @property
    def rank_count(self) -> int: ...

class ParallelRanks:
    """A process's place in every group of its framework."""

    def __init__(self, *, tp: int = 0, pp: int = 0, dp: int = 0, cp: int = 0, etp: int = 0, ep: int = 0, edp: int = 0) -> None: ...

    @property
    def tp(self) -> int: ...

    @property
    def pp(self) -> int: ...

    @property
    def dp(self) -> int: ...

    @property
    def cp(self) -> int: ...

    @property
    def etp(self) -> int:
        """Of experts."""

    @property
    def ep(self) -> int: ...

    @property
    def edp(self) -> int:
        """Replica of the experts."""

    def __eq__(self, arg: object, /) -> bool: ...

    def __repr__(self) -> str: ...

def parse_parallel_spec(text: str) -> ParallelSpec: ...

def parallel_ranks(spec: ParallelSpec, rank: int) -> ParallelRanks:
    """
    The place of a rank, counted within the spec, in the framework's own order of ranks.
    """

@overload
def make_layouts(config: ModelConfig, spec: ParallelSpec) -> list[Layout]:
    """One layout per rank, in the family's own rank order."""

@overload
def make_layouts(catalog: Sequence[TensorSpec], spec: ParallelSpec, dtype: Dtype | None = None) -> list[Layout]:
    """
    For a model of which nothing is known but its tensors: hf, or fsdp without tp. `dtype` is of all parameters; None: each as in the catalog.
    """

@overload
def make_layout(config: ModelConfig, spec: ParallelSpec, rank: int) -> Layout:
    """
    The layout of one rank, counted within the spec (never the world rank).
    """

@overload
def make_layout(config: ModelConfig, spec: ParallelSpec, ranks: ParallelRanks) -> Layout:
    """The same for a process that knows its ranks from its own groups."""

@overload
def make_layout(catalog: Sequence[TensorSpec], spec: ParallelSpec, rank: int, dtype: Dtype | None = None) -> Layout:
    """The same for one rank, counted within the spec."""

class LiveTensor:
    """A parameter or persistent buffer as its framework describes it."""

    def __init__(self, name: str, dtype: Dtype, shape: Sequence[int], *, tensor_model_parallel: bool = False, partition_dim: int = -1, partition_stride: int = 1) -> None: ...

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> Dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def tensor_model_parallel(self) -> bool: ...

    @property
    def partition_dim(self) -> int: ...

    @property
    def partition_stride(self) -> int: ...

def make_live_layout(config: ModelConfig, spec: ParallelSpec, ranks: ParallelRanks, tensors: Sequence[LiveTensor], layers: Sequence[Sequence[int]], *, layers_of_module: bool) -> Layout:
    """
    The layout of a rank's Megatron-Core modules, or LayoutMismatchError where they are not what the spec means. `layers`: of each model chunk, the numbers of its decoder layers. With `layers_of_module` the spec says nothing of layers, and they are the module's.
    """

class PlacementKind(enum.Enum):
    """How a DTensor lies on one mesh axis."""

    REPLICATE = 0

    SHARD = 1

    STRIDED_SHARD = 2

class Placement:
    """DTensor placement on one mesh axis."""

    def __init__(self, kind: PlacementKind, dim: int = 0, split_factor: int = 1) -> None: ...

    @property
    def kind(self) -> PlacementKind: ...

    @property
    def dim(self) -> int: ...

    @property
    def split_factor(self) -> int: ...

def dtensor_box(global_shape: Sequence[int], placements: Sequence[Placement], mesh_shape: Sequence[int], coordinate: Sequence[int]) -> Box:
    """
    The box of a DTensor that the process at a mesh coordinate holds, possibly empty.
    """

def flat_range_boxes(shape: Sequence[int], begin: int, end: int) -> list[Box]:
    """
    The boxes of elements begin to end of a row-major tensor, in the order of the elements.
    """

class ExpertMap:
    """
    Which logical expert every physical place of an engine holds (EPLB): one list a layer, of all decoder layers or of those with experts.
    """

    def __init__(self, physical_to_logical: Sequence[Sequence[int]], version: int = 0) -> None: ...

    @property
    def physical_to_logical(self) -> list[list[int]]: ...

    @property
    def version(self) -> int:
        """The engine's own count."""

def parse_expert_map(json: str) -> ExpertMap:
    """
    Reads {'version': 3, 'physical_to_logical_map': [[0, 1, ...], ...]}, or the list alone.
    """

def with_expert_map(spec: ParallelSpec, expert_map: ExpertMap) -> ParallelSpec:
    """
    The spec of an engine whose experts lie as the map says. make_layout refuses a map that does not fit the model.
    """

class NativeCheckpoint:
    """See transfuse.Checkpoint."""

    def __init__(self, path: str, *, spec: str, config_json: str, version: int, kind: str, metadata: Mapping[str, str]) -> None: ...

def read_catalog(path: str, spec: str = 'hf') -> list[TensorSpec]:
    """
    The tensors of a model, from a checkpoint's own headers and index: hf, or fsdp without tp.
    """

class NativeArena:
    """
    Zeroed memory that other processes read by mapping it: the best route on one host. A writable buffer, or on a GPU what __cuda_array_interface__ says; it lives as long as a view of it.
    """

    def __init__(self, size_bytes: int, *, job: str = '', threads: int | None = None, allow_any_tracer: bool | None = None, device: int | None = None) -> None: ...

    @property
    def device(self) -> int | None:
        """The GPU's ordinal; None: memory of the host."""

    @property
    def __cuda_array_interface__(self) -> dict[str, object]: ...

    @property
    def size_bytes(self) -> int: ...

    def __len__(self) -> int: ...

class RefitPhases:
    """Where the time of a refit went, in microseconds."""

    @property
    def discover_us(self) -> int: ...

    @property
    def lease_us(self) -> int: ...

    @property
    def transfer_us(self) -> int: ...

    @property
    def verify_us(self) -> int: ...

    @property
    def decide_us(self) -> int: ...

    @property
    def commit_us(self) -> int: ...

    @property
    def total_us(self) -> int: ...

class RefitRoute:
    """What came from one source, and how."""

    @property
    def source(self) -> str: ...

    @property
    def transport(self) -> str: ...

    @property
    def route(self) -> str: ...

    @property
    def size_bytes(self) -> int: ...

    @property
    def run_count(self) -> int: ...

class RefitStep:
    """A failure on the way, and what was done about it."""

    @property
    def code(self) -> ErrorCode: ...

    @property
    def source(self) -> str: ...

    @property
    def what(self) -> str: ...

    def __repr__(self) -> str: ...

class RefitReport:
    """What one refit did."""

    @property
    def version(self) -> int: ...

    @property
    def phases(self) -> RefitPhases: ...

    @property
    def size_bytes(self) -> int: ...

    @property
    def source_bytes(self) -> int: ...

    @property
    def reread_bytes(self) -> int: ...

    @property
    def chunk_count(self) -> int: ...

    @property
    def verified_bytes(self) -> int: ...

    @property
    def attempts(self) -> int: ...

    @property
    def planned(self) -> bool: ...

    @property
    def checkpoint(self) -> str: ...

    @property
    def gigabytes_per_second(self) -> float: ...

    @property
    def routes(self) -> list[RefitRoute]: ...

    @property
    def steps(self) -> list[RefitStep]: ...

    @property
    def revision(self) -> Digest | None: ...

    @property
    def metadata(self) -> dict[str, str]: ...

    def to_json(self) -> str: ...

    def to_text(self) -> str: ...

    def __repr__(self) -> str: ...

class WriteTiming:
    """What begin_write() waited for."""

    @property
    def waited_us(self) -> int: ...

    @property
    def revoked(self) -> int: ...

    @property
    def copy_waited_us(self) -> int: ...

class PublishTiming:
    """What publish() waited for and copied."""

    @property
    def waited_us(self) -> int: ...

    @property
    def revoked(self) -> int: ...

    @property
    def copy_us(self) -> int: ...

    @property
    def skipped(self) -> bool: ...

    @property
    def copying(self) -> bool: ...

class SnapshotState(enum.Enum):
    NONE = 0

    COPYING = 1

    PUBLISHED = 2

    SKIPPED = 3

    FAILED = 4

class SnapshotProgress:
    """See transfuse.Publisher.snapshot."""

    @property
    def state(self) -> SnapshotState: ...

    @property
    def version(self) -> int: ...

    @property
    def copied_bytes(self) -> int: ...

    @property
    def size_bytes(self) -> int: ...

    @property
    def elapsed_us(self) -> int: ...

class VersionState(enum.Enum):
    """Where a version is in its life."""

    OPEN = 0

    READY = 1

    RETIRED = 2

    ABORTED = 3

class VersionInfo:
    """A version of a model as the coordinator knows it."""

    @property
    def model(self) -> str: ...

    @property
    def version(self) -> int: ...

    @property
    def state(self) -> VersionState: ...

    @property
    def published(self) -> int: ...

    @property
    def source_count(self) -> int: ...

    @property
    def leases(self) -> int: ...

    @property
    def reason(self) -> str: ...

    @property
    def revision(self) -> Digest | None: ...

    @property
    def metadata(self) -> dict[str, str]: ...

    def __repr__(self) -> str: ...

class MemberRole(enum.Enum):
    """What a member of a job does."""

    SOURCE = 0

    TARGET = 1

class MemberInfo:
    """A process that publishes or receives a model."""

    @property
    def role(self) -> MemberRole: ...

    @property
    def model(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def layout(self) -> Digest: ...

    @property
    def version(self) -> int: ...

    @property
    def kind(self) -> str: ...

    @property
    def metadata(self) -> dict[str, str]: ...

    @property
    def version_metadata(self) -> dict[str, str]: ...

    @property
    def revision(self) -> Digest | None: ...

class StageState(enum.Enum):
    """Where a version is on its way into a shadow."""

    NONE = 0

    MOVING = 1

    READY = 2

    FAILED = 3

class StageProgress:
    """How far a stage is."""

    @property
    def state(self) -> StageState: ...

    @property
    def version(self) -> int: ...

    @property
    def landed_bytes(self) -> int: ...

    @property
    def size_bytes(self) -> int: ...

class GroupState(enum.Enum):
    """Whether the ranks of one engine may serve."""

    FORMING = 0

    WHOLE = 1

    SWITCHING = 2

    BROKEN = 3

class VersionEvent:
    """One entry in the story of a version."""

    @property
    def at_us(self) -> int:
        """Since the version was opened."""

    @property
    def who(self) -> str:
        """A member, a group, or nobody."""

    @property
    def what(self) -> str: ...

    def __repr__(self) -> str: ...

class GroupRank:
    """A rank of a group, and the version that it holds."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...

class GroupInfo:
    """The ranks of one engine as the coordinator knows them."""

    @property
    def model(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def state(self) -> GroupState: ...

    @property
    def version(self) -> int: ...

    @property
    def round(self) -> int: ...

    @property
    def reason(self) -> str: ...

    @property
    def ranks(self) -> list[GroupRank]: ...

    def __repr__(self) -> str: ...

class BoxMismatch:
    """A box whose fingerprints differ."""

    @property
    def tensor(self) -> str: ...

    @property
    def box(self) -> Box: ...

    @property
    def source_fingerprint(self) -> int: ...

    @property
    def target_fingerprint(self) -> int: ...

class TargetVerdict:
    """One target against its sources."""

    @property
    def target(self) -> str: ...

    @property
    def version(self) -> int: ...

    @property
    def box_count(self) -> int: ...

    @property
    def size_bytes(self) -> int: ...

    @property
    def mismatches(self) -> list[BoxMismatch]: ...

    @property
    def not_compared(self) -> str: ...

    @property
    def matches(self) -> bool: ...

class VersionRevision:
    """The content address of a version."""

    @property
    def version(self) -> int: ...

    @property
    def computed(self) -> Digest: ...

    @property
    def stated(self) -> Digest | None: ...

class VerifyReport:
    """Every target of a model against its sources."""

    @property
    def model(self) -> str: ...

    @property
    def targets(self) -> list[TargetVerdict]: ...

    @property
    def matches(self) -> bool: ...

    def to_json(self) -> str: ...

    def to_text(self) -> str: ...

    def __repr__(self) -> str: ...

class Retention(enum.Enum):
    """What readers of a version read while the trainer goes on."""

    IN_PLACE = 0

    SNAPSHOT = 1

class WhenLeased(enum.Enum):
    """What publish() does if readers hold every snapshot."""

    REVOKE_AT_DEADLINE = 0

    WAIT = 1

    REVOKE = 2

    SKIP = 3

class SnapshotPlace(enum.Enum):
    WITH_WEIGHTS = 0

    HOST = 1

def snapshot_bytes(layout: Layout, slots: int) -> int:
    """Memory that so many snapshots of a layout need, beside the weights."""

class NativePublisher:
    """See transfuse.Publisher."""

    def __init__(self, layout: Layout, parameters: dict[str, object], *, name: str, model: str, source_count: int, drain_ms: int, retention: Retention, snapshot_slots: int, snapshot_place: SnapshotPlace, snapshot_gigabytes_per_second: float, snapshot_async: bool, when_leased: WhenLeased, fingerprint_threads: int, metadata: Mapping[str, str], compute_revision: bool, job: str, address: str | None, token: str | None, threads: int | None, allow_any_tracer: bool | None, device: int | None) -> None: ...

    def begin_write(self, version: int) -> WriteTiming: ...

    def publish(self, version: int, metadata: Mapping[str, str], revision: Digest | None) -> PublishTiming: ...

    def abort_write(self, reason: str) -> None: ...

    def set_retention(self, retention: Retention) -> None: ...

    def wait_published(self, timeout_ms: int) -> SnapshotProgress: ...

    @property
    def snapshot(self) -> SnapshotProgress: ...

    @property
    def version(self) -> int: ...

    @property
    def device(self) -> int | None: ...

    def close(self) -> None: ...

class Verify(enum.Enum):
    """Whether a refit compares fingerprints."""

    FULL = 0

    OFF = 1

class ReceiveInto(enum.Enum):
    """Where versions arrive."""

    IN_PLACE = 0

    SHADOW = 1

def shadow_bytes(layout: Layout) -> int:
    """Memory that a shadow of a layout needs, beside the parameters."""

class NativeReceiver:
    """See transfuse.Receiver."""

    def __init__(self, layout: Layout, parameters: dict[str, object], *, name: str, model: str, verify: Verify, chunk_bytes: int, spread: int, no_progress_ms: int, max_attempts: int, into: ReceiveInto, keep_previous: bool, group: str, group_size: int, round_ms: int, checkpoint: NativeCheckpoint | None, checkpoint_wait_ms: int, demand: Demand, job: str, address: str | None, token: str | None, threads: int | None, allow_any_tracer: bool | None, device: int | None) -> None: ...

    def refit(self, *, exactly: int | None, at_least: int | None, demand: Demand, timeout_ms: int) -> RefitReport: ...

    def stage(self, *, exactly: int | None, at_least: int | None, demand: Demand, timeout_ms: int, max_gigabytes_per_second: float, max_multiprocessors: int) -> None: ...

    @property
    def staged(self) -> StageProgress: ...

    def wait_staged(self, timeout_ms: int) -> StageProgress: ...

    def commit(self, timeout_ms: int) -> RefitReport: ...

    def rollback(self, timeout_ms: int) -> int: ...

    def check_group(self) -> GroupInfo: ...

    @property
    def last_report(self) -> RefitReport: ...

    @property
    def version(self) -> int: ...

    @property
    def device(self) -> int | None: ...

    def cancel(self) -> None: ...

    def close(self) -> None: ...

class NativeWatch:
    """Changes of versions; see Control.watch()."""

    def next(self, timeout_ms: int) -> VersionInfo | None:
        """The next change, or None when the time is over."""

class NativeControl:
    """See transfuse.Control."""

    def __init__(self, *, job: str, address: str | None, token: str | None) -> None: ...

    def versions(self, model: str) -> list[VersionInfo]: ...

    def members(self, model: str) -> list[MemberInfo]: ...

    def groups(self, model: str) -> list[GroupInfo]: ...

    def history(self, model: str, version: int) -> list[VersionEvent]: ...

    def watch(self, model: str) -> NativeWatch: ...

    def revision(self, model: str, version: int, timeout_ms: int) -> VersionRevision: ...

    def verify(self, model: str, timeout_ms: int) -> VerifyReport: ...

class CoordinatorInfo:
    """The coordinator of a job."""

    @property
    def address(self) -> str: ...

    @property
    def epoch(self) -> int:
        """Rises with every start."""

    @property
    def pid(self) -> int: ...

def find_coordinator(job: str = '', *, address: str = '', token: str = '') -> CoordinatorInfo:
    """
    The coordinator of a job if one runs; NotFoundError otherwise. Starts none.
    """
