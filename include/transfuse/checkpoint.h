// Safetensors checkpoints on disk: what they hold, and their conversion between any two layouts.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {

// One tensor in a file. Its bytes were checked to lie inside it, apart from all others.
struct StoredTensor {
  std::string name;
  std::string dtype_text;      // as the file spells it: "BF16"
  std::optional<Dtype> dtype;  // nullopt: a dtype that layouts do not have
  Dims shape;
  uint32_t file = 0;          // index into CheckpointListing::files
  uint64_t offset_bytes = 0;  // from the start of the file
  uint64_t size_bytes = 0;
};
struct StoredFile {
  std::string path;
  uint64_t size_bytes = 0;
};
struct CheckpointListing {
  std::vector<StoredFile> files;
  std::vector<StoredTensor> tensors;  // by file, then name
  std::vector<uint64_t> versions;     // per file: of the weights, as it records; 0: it does not
};
// `path`: a safetensors file, or a folder with model.safetensors, with
// model.safetensors.index.json and its shards, or with rank0.safetensors and so on. Reads headers
// alone and believes nothing in them: kCorrupt names file, tensor, expected and found.
Result<CheckpointListing> list_checkpoint(const std::string& path);

// The tensors of a model, from a checkpoint's own headers and index: `spec` is hf, or fsdp without
// tp, whose ranks' shards are put together. In the order of their names. kUnsupported: a dtype that
// layouts do not have, or another spec. kCorrupt: shards of different dtypes or widths.
Result<Catalog> read_catalog(const std::string& path, const std::string& spec = "hf");

// Weights on disk that a receiver may fall back to: one version of a model.
struct Checkpoint {
  std::string path;         // a folder in the layout `spec`; for hf also a file
  std::string spec = "hf";  // as in parse_parallel_spec(); without dtype= the config's dtype
  // The text of the model's config.json. Empty: that of config.json in the folder; without one, hf
  // and fsdp are read by their own headers.
  std::string config_json = {};
  // Of the weights in it. 0: the one that every file records ("transfuse.version" in its metadata);
  // kInvalidArgument if there is none, or if it is another one.
  uint64_t version = 0;
};

// The shapes that the parameters of `layout` have in a file, in their order: rows as wide as their
// tiles; a stack of experts has the expert as its first dimension. One dimension where tiles do not
// say.
std::vector<Dims> parameter_shapes(const Layout& layout);

// parse_parallel_spec(), and the JSON file that expert_map= names.
Result<ParallelSpec> read_parallel_spec(std::string_view text);

struct ConvertRequest {
  // The text of the model's config.json. Empty: that of config.json in the source folder. Without
  // one, or of an unknown architecture: hf and fsdp only, by the source's own headers.
  std::string config_json;
  std::string from;  // specs as in read_parallel_spec(); without dtype= the config's dtype
  std::string to;
  std::string source;           // an existing folder (for hf also a file)
  std::string target;           // a folder that is made
  bool replace_target = false;  // of an existing checkpoint folder, in one step at the end
  bool verify = false;          // fingerprints of both sides, before the target gets its name
  uint64_t shard_bytes = 5'000'000'000;  // most tensor bytes of one file of an hf folder
  uint64_t version = 0;                  // to be recorded; 0: what the source records, if anything
  uint32_t threads = 0;                  // 0: one per core that this process may use, at most 8
  // Called on the calling thread with rising numbers; may be empty.
  std::function<void(uint64_t done_bytes, uint64_t total_bytes)> progress;
};
struct TensorFingerprint {
  std::string tensor;
  uint64_t source = 0;
  uint64_t target = 0;
};
struct ConvertReport {
  uint64_t tensor_count = 0;  // of the catalog
  uint64_t source_file_count = 0;
  uint64_t target_file_count = 0;
  uint64_t source_bytes = 0;  // of tensors, replicas included
  uint64_t target_bytes = 0;
  double move_seconds = 0;  // reading and writing
  double sync_seconds = 0;  // until the disk has it
  double verify_seconds = 0;
  std::vector<TensorFingerprint> fingerprints;  // with `verify`: of whole tensors as the target
                                                // holds them; equal on both sides
};
// Everything is checked before anything is written; the target appears complete, synced and under
// its name, or not at all (a killed process leaves a hidden folder, which the next conversion to
// the same target removes). kLayoutMismatch: a tensor is missing, too many, or of another dtype or
// shape. kAlreadyExists: the target is there. kResourceExhausted: the disk is full. kTornRead: a
// source file changed. kFingerprintMismatch: the target holds other bytes than the source.
Result<ConvertReport> convert_checkpoint(const ConvertRequest& request);

}  // namespace transfuse
