// The header of a safetensors file: one JSON object of known form, read as a stream of events so
// that repeated names are seen.
#include "files/safetensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "transfuse/checkpoint.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

struct DtypeRow {
  std::string_view name;
  uint32_t size_bytes;
  std::optional<Dtype> dtype;
};

// In the order of the package's enum, by which it sorts tensors (last first).
constexpr std::array<DtypeRow, 16> kDtypes = {{{"BOOL", 1, std::nullopt},
                                               {"U8", 1, Dtype::kU8},
                                               {"I8", 1, Dtype::kI8},
                                               {"F8_E5M2", 1, Dtype::kF8E5M2},
                                               {"F8_E4M3", 1, Dtype::kF8E4M3},
                                               {"F8_E8M0", 1, std::nullopt},
                                               {"I16", 2, std::nullopt},
                                               {"U16", 2, std::nullopt},
                                               {"F16", 2, Dtype::kF16},
                                               {"BF16", 2, Dtype::kBF16},
                                               {"I32", 4, Dtype::kI32},
                                               {"U32", 4, std::nullopt},
                                               {"F32", 4, Dtype::kF32},
                                               {"F64", 8, std::nullopt},
                                               {"I64", 8, Dtype::kI64},
                                               {"U64", 8, std::nullopt}}};

size_t row_of(Dtype dtype) {
  for (size_t i = 0; i < kDtypes.size(); ++i) {
    if (kDtypes[i].dtype == dtype) return i;
  }
  check_failed(__FILE__, __LINE__, "a Dtype without a name in safetensors");
}

// A tensor as its JSON object says it, before any check of the numbers.
struct RawTensor {
  std::string name;
  std::optional<std::string> dtype;
  std::optional<std::vector<uint64_t>> shape;
  std::optional<std::vector<uint64_t>> offsets;
};

// Accepts exactly {"name": {"dtype": text, "shape": [numbers], "data_offsets": [numbers]}, ...,
// "__metadata__": {text: text}}. Used from one thread.
class HeaderEvents final : public nlohmann::json_sax<nlohmann::json> {
 public:
  std::vector<RawTensor>& tensors() { return tensors_; }
  const std::string& problem() const { return problem_; }
  const std::optional<std::string>& version_text() const { return version_text_; }

  bool null() override { return unexpected("null"); }
  bool boolean(bool) override { return unexpected("true or false"); }
  bool number_integer(number_integer_t value) override {
    return unexpected(fmt::format("{}", value));
  }
  bool number_float(number_float_t, const string_t& text) override { return unexpected(text); }
  bool binary(binary_t&) override { return unexpected("binary data"); }
  bool number_unsigned(number_unsigned_t value) override {
    if (list_ == nullptr) return unexpected(fmt::format("{}", value));
    list_->push_back(value);
    return true;
  }
  bool string(string_t& value) override {
    if (depth_ == 2 && in_metadata_) {
      if (field_ == kVersionKey) version_text_ = value;
      return true;
    }
    if (depth_ != 2 || field_ != "dtype" || list_ != nullptr) {
      return unexpected("\"" + value + "\"");
    }
    tensors_.back().dtype = value;
    return true;
  }
  bool start_object(size_t) override {
    if (depth_ == 2 || list_ != nullptr) return unexpected("an object");
    ++depth_;
    return true;
  }
  bool end_object() override {
    --depth_;
    in_metadata_ = false;
    return true;
  }
  bool key(string_t& name) override {
    if (depth_ == 1) return begin_tensor(name);
    if (in_metadata_) {
      field_ = name;
      return true;
    }
    const RawTensor& tensor = tensors_.back();
    const bool repeated = (name == "dtype" && tensor.dtype) || (name == "shape" && tensor.shape) ||
                          (name == "data_offsets" && tensor.offsets);
    if (repeated) return fail(fmt::format("tensor {}: {} is there twice", tensor.name, name));
    if (name != "dtype" && name != "shape" && name != "data_offsets") {
      return fail(fmt::format("tensor {}: expected dtype, shape and data_offsets, found \"{}\"",
                              tensor.name, name));
    }
    field_ = name;
    return true;
  }
  bool start_array(size_t) override {
    if (depth_ != 2 || in_metadata_ || list_ != nullptr || field_ == "dtype") {
      return unexpected("a list");
    }
    auto& list = field_ == "shape" ? tensors_.back().shape : tensors_.back().offsets;
    list_ = &list.emplace();
    return true;
  }
  bool end_array() override {
    list_ = nullptr;
    return true;
  }
  bool parse_error(size_t position, const std::string&,
                   const nlohmann::detail::exception&) override {
    return fail(fmt::format("the header is no JSON from byte {} on", position));
  }

 private:
  bool begin_tensor(const std::string& name) {
    if (!names_.insert(name).second) {
      return fail(fmt::format("tensor {}: the name is there twice", name));
    }
    field_.clear();
    in_metadata_ = name == "__metadata__";
    if (!in_metadata_) tensors_.emplace_back().name = name;
    return true;
  }
  bool unexpected(const std::string& found) {
    const std::string where =
        in_metadata_       ? "__metadata__: expected text"
        : tensors_.empty() ? "expected an object of tensors"
                           : fmt::format("tensor {}: {}: expected {}", tensors_.back().name, field_,
                                         field_ == "dtype" ? "text" : "whole numbers");
    return fail(fmt::format("{}, found {}", where, found));
  }
  bool fail(std::string problem) {
    problem_ = std::move(problem);
    return false;
  }

  std::vector<RawTensor> tensors_;
  std::set<std::string> names_;
  std::string problem_;
  std::string field_;
  std::optional<std::string> version_text_;
  std::vector<uint64_t>* list_ = nullptr;
  int depth_ = 0;
  bool in_metadata_ = false;
};

Unexpected corrupt(std::string_view path, const std::string& problem) {
  return {Error{ErrorCode::kCorrupt, fmt::format("{}: {}", path, problem)}};
}

// Elements, or nullopt where they do not fit.
std::optional<uint64_t> element_count(const std::vector<uint64_t>& shape) {
  constexpr auto kMost = static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
  uint64_t count = 1;
  for (const uint64_t length : shape) {
    if (length > kMost || (length != 0 && count > kMost / length)) return std::nullopt;
    count *= length;
  }
  return count;
}

Result<StoredTensor> check_tensor(std::string_view path, const RawTensor& raw, uint64_t data_offset,
                                  uint64_t data_bytes) {
  const auto wrong = [&](const std::string& problem) {
    return corrupt(path, fmt::format("tensor {}: {}", raw.name, problem));
  };
  if (!raw.dtype || !raw.shape || !raw.offsets) {
    return wrong("expected dtype, shape and data_offsets, found fewer");
  }
  const auto row = std::ranges::find(kDtypes, std::string_view(*raw.dtype), &DtypeRow::name);
  if (row == kDtypes.end()) return wrong(fmt::format("dtype {} is not known", *raw.dtype));
  if (raw.shape->size() > kMaxRank) {
    return wrong(
        fmt::format("expected at most {} dimensions, found {}", kMaxRank, raw.shape->size()));
  }
  const auto elements = element_count(*raw.shape);
  if (!elements) return wrong("the shape has more elements than 2^63");
  if (raw.offsets->size() != 2 || (*raw.offsets)[0] > (*raw.offsets)[1]) {
    return wrong("data_offsets: expected [begin, end]");
  }
  const uint64_t begin = (*raw.offsets)[0];
  const uint64_t end = (*raw.offsets)[1];
  if (end > data_bytes) {
    return wrong(
        fmt::format("ends at byte {} of the data, of which the file has {}: it is "
                    "truncated or its header lies",
                    end, data_bytes));
  }
  StoredTensor tensor{.name = raw.name,
                      .dtype_text = *raw.dtype,
                      .dtype = row->dtype,
                      .shape = {},
                      .offset_bytes = data_offset + begin,
                      .size_bytes = end - begin};
  for (const uint64_t length : *raw.shape) tensor.shape.push_back(static_cast<int64_t>(length));
  if (*elements > data_bytes || *elements * row->size_bytes != end - begin) {
    return wrong(fmt::format("{} {} takes {} elements of {} bytes, its data_offsets hold {} bytes",
                             *raw.dtype, tensor.shape.to_string(), *elements, row->size_bytes,
                             end - begin));
  }
  return tensor;
}

// Every byte of the data belongs to exactly one tensor.
Result<void> check_cover(std::string_view path, std::vector<StoredTensor>& tensors,
                         uint64_t data_offset, uint64_t file_bytes) {
  std::ranges::sort(tensors, [](const StoredTensor& a, const StoredTensor& b) {
    return std::pair(a.offset_bytes, a.size_bytes) < std::pair(b.offset_bytes, b.size_bytes);
  });
  uint64_t at = data_offset;
  for (const StoredTensor& tensor : tensors) {
    if (tensor.offset_bytes != at) {
      return corrupt(path,
                     fmt::format("tensor {}: expected to begin at byte {} of the data, "
                                 "found {}: {}",
                                 tensor.name, at - data_offset, tensor.offset_bytes - data_offset,
                                 tensor.offset_bytes < at ? "it overlaps another" : "a gap"));
    }
    at += tensor.size_bytes;
  }
  if (at != file_bytes) {
    return corrupt(path, fmt::format("expected {} bytes, found {}: {} belong to no tensor", at,
                                     file_bytes, file_bytes - at));
  }
  return {};
}

Result<uint64_t> version_of(std::string_view path, const std::optional<std::string>& text) {
  if (!text) return uint64_t{0};
  uint64_t version = 0;
  const char* const end = text->data() + text->size();
  const auto [stop, error] = std::from_chars(text->data(), end, version);
  if (error == std::errc() && stop == end && version > 0) return version;
  return corrupt(path, fmt::format("__metadata__: {}: expected a number from 1, found \"{}\"",
                                   kVersionKey, *text));
}

}  // namespace

Result<std::vector<StoredTensor>> parse_header(std::string_view path, std::string_view json,
                                               uint64_t file_bytes, uint64_t* recorded_version) {
  HeaderEvents events;
  if (!nlohmann::json::sax_parse(json, &events)) return corrupt(path, events.problem());
  if (recorded_version != nullptr) {
    TRANSFUSE_ASSIGN_OR_RETURN(*recorded_version, version_of(path, events.version_text()));
  }
  const uint64_t data_offset = kLengthBytes + json.size();
  std::vector<StoredTensor> tensors;
  tensors.reserve(events.tensors().size());
  for (const RawTensor& raw : events.tensors()) {
    TRANSFUSE_ASSIGN_OR_RETURN(StoredTensor tensor,
                               check_tensor(path, raw, data_offset, file_bytes - data_offset));
    tensors.push_back(std::move(tensor));
  }
  TRANSFUSE_RETURN_IF_ERROR(check_cover(path, tensors, data_offset, file_bytes));
  std::ranges::sort(tensors, {}, &StoredTensor::name);
  return tensors;
}

Result<std::string> lay_out(std::vector<FileEntry>& entries, uint64_t version) {
  std::ranges::sort(entries, [](const FileEntry& a, const FileEntry& b) {
    const size_t first = row_of(a.dtype);
    const size_t second = row_of(b.dtype);
    return first != second ? first > second : a.name < b.name;
  });
  nlohmann::ordered_json header;
  header["__metadata__"] = {{"format", "pt"}};
  if (version > 0) header["__metadata__"][kVersionKey] = std::to_string(version);
  uint64_t at = 0;
  std::string text = header.dump();
  text.pop_back();
  for (FileEntry& entry : entries) {
    const uint64_t end = at + entry.size_bytes();
    const nlohmann::ordered_json body = {{"dtype", stored_dtype_name(entry.dtype)},
                                         {"shape", entry.shape.values()},
                                         {"data_offsets", {at, end}}};
    text += "," + nlohmann::json(entry.name).dump() + ":" + body.dump();
    entry.offset_bytes = at;
    at = end;
  }
  text += "}";
  text.append((kLengthBytes - text.size() % kLengthBytes) % kLengthBytes, ' ');
  if (text.size() > kMaxHeaderBytes) {
    return Error{ErrorCode::kUnsupported,
                 fmt::format("a file of {} tensors needs a header of {} bytes: safetensors allows "
                             "{}; use more ranks or smaller shards",
                             entries.size(), text.size(), kMaxHeaderBytes)};
  }
  for (FileEntry& entry : entries) entry.offset_bytes += kLengthBytes + text.size();
  const auto length = std::bit_cast<std::array<char, kLengthBytes>>(uint64_t{text.size()});
  text.insert(text.begin(), length.begin(), length.end());
  return text;
}

std::string_view stored_dtype_name(Dtype dtype) { return kDtypes[row_of(dtype)].name; }

}  // namespace transfuse
