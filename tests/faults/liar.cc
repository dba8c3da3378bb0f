// Lies, each one untruth in an otherwise honest description.
#include "faults/liar.h"

#include <fmt/format.h>
#include <sys/mman.h>

#include <utility>

#include "base/seqlock.h"
#include "session/descriptor.h"
#include "session/served_weights.h"
#include "transfuse/deadline.h"

namespace transfuse::faults {
namespace {

constexpr uint64_t kIncarnation = 0x1ce;
constexpr uint64_t kHoleBytes = uint64_t{1} << 20;
constexpr uint64_t kTableBytes = uint64_t{1} << 16;  // more sums than the small model has runs
constexpr int64_t kWaitMs = 20000;

}  // namespace

Result<std::string> Liar::describe(const std::string& lie) {
  MemberDescriptor told;
  told.transport = transport_.kind();
  TRANSFUSE_ASSIGN_OR_RETURN(told.endpoint, transport_.endpoint());
  told.control = words_->descriptor();
  told.regions.assign(bound_->regions().begin(), bound_->regions().end());
  told.slots = {bound_->binding()};
  Binding& binding = told.slots[0];
  RegionDescriptor& region = told.regions[0];
  if (lie == "larger_region") {  // than what is registered: more weights seem to lie in it
    region.size_bytes *= 2;
    for (Place& place : binding.places) place.offset_bytes += region.size_bytes / 2;
  } else if (lie == "beyond_region") {
    binding.places[0].offset_bytes = region.size_bytes - 1;
  } else if (lie == "offset_wraps") {
    binding.places[0].offset_bytes = UINT64_MAX - 3;
  } else if (lie == "no_such_place") {
    binding.places[0].region = 7;
  } else if (lie == "unregistered_region") {
    region.id = RegionId{1234567};
  } else if (lie == "nothing_mapped") {
    region = hole_->descriptor();
  } else if (lie == "fewer_places") {
    binding.places.pop_back();
  } else if (lie == "another_layout") {
    binding.layout.low ^= 1;
  } else if (lie == "no_generation") {
    told.control.size_bytes = 8;
  } else if (lie == "another_transport") {
    told.transport = "carrier pigeon";
  } else if (lie == "nobody_there") {
    told.endpoint += "-gone";
  } else if (lie == "garbage") {
    return std::string("\x54\x46\x44\x32\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", 15);
  } else if (lie == "truncated") {
    std::string bytes = encode(told);
    bytes.resize(bytes.size() / 2);
    return bytes;
  } else if (lie != "none" && lie != "another_generation" && lie != "no_such_slot") {
    return Error{ErrorCode::kInvalidArgument, fmt::format("no lie is called '{}'", lie)};
  }
  return encode(told);
}

Result<std::unique_ptr<Liar>> Liar::open(Transport& transport, Control& control,
                                         const Layout& layout, const std::string& name,
                                         const std::string& lie) {
  std::unique_ptr<Liar> liar(new Liar(transport, control));
  TRANSFUSE_ASSIGN_OR_RETURN(liar->weights_, Weights::open(transport, layout, "arena"));
  TRANSFUSE_ASSIGN_OR_RETURN(
      BoundMemory bound, BoundMemory::open(transport, layout, liar->weights_->parameters().memory(),
                                           liar->weights_->arenas(), BoundMemory::Use::kSource));
  liar->bound_ = std::make_unique<BoundMemory>(std::move(bound));
  TRANSFUSE_ASSIGN_OR_RETURN(liar->words_, transport.allocate(sizeof(GenerationWords)));
  void* const hole =
      ::mmap(nullptr, kHoleBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (hole == MAP_FAILED) return Error{ErrorCode::kResourceExhausted, "no room for a hole"};
  TRANSFUSE_ASSIGN_OR_RETURN(
      liar->hole_, transport.register_memory({static_cast<std::byte*>(hole), kHoleBytes}));

  auto& words = *reinterpret_cast<GenerationWords*>(liar->words_->bytes().data());
  words.incarnation = kIncarnation;
  begin_generation(words);
  liar->weights_->parameters().write(1);
  Generation& generation = liar->generation_;
  generation = {.incarnation = kIncarnation, .counter = end_generation(words)};
  if (lie == "another_generation") generation.counter += 2;

  TRANSFUSE_RETURN_IF_ERROR(control.put_layout(layout));
  Registration registration;
  registration.name = name;
  registration.model = "model";
  registration.incarnation = kIncarnation;
  registration.layout = layout.digest();
  TRANSFUSE_ASSIGN_OR_RETURN(registration.descriptor, liar->describe(lie));
  TRANSFUSE_ASSIGN_OR_RETURN(liar->member_, control.join(registration));
  auto drained = control.begin_write(
      liar->member_, {.version = 1, .replaces = {}, .when_leased = {}}, Deadline::after_ms(5000));
  if (!drained) return Unexpected{std::move(drained).error()};
  TRANSFUSE_RETURN_IF_ERROR(control.publish(
      liar->member_,
      {.version = 1, .generation = generation, .slot = lie == "no_such_slot" ? 5u : 0u}));
  return liar;
}

Result<void> Liar::answer_table(const std::string& lie) {
  TRANSFUSE_ASSIGN_OR_RETURN(const auto event,
                             control_.next_event(member_, Deadline::after_ms(kWaitMs)));
  if (!event || event->kind != MemberEvent::Kind::kTableRequest) {
    return Error{ErrorCode::kDeadlineExceeded, "nobody asked for fingerprints"};
  }
  TRANSFUSE_ASSIGN_OR_RETURN(
      table_, transport_.allocate(kTableHeaderBytes + (lie == "short" ? 0 : kTableBytes)));
  auto& header = *reinterpret_cast<TableHeader*>(table_->bytes().data());
  header.incarnation = kIncarnation;
  if (lie != "unfinished") header.counter = generation_.counter;  // every sum is 0
  const std::string told = lie == "garbage" ? "\xff\xff" : encode(table_->descriptor());
  return control_.put_table(member_, event->table.plan_key, told);
}

Liar::~Liar() {
  if (member_ != MemberId{}) (void)control_.leave(member_);  // the test is over
  if (hole_ != nullptr) ::munmap(hole_->bytes().data(), kHoleBytes);
}

}  // namespace transfuse::faults
