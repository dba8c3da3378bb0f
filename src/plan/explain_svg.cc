// An explanation as a picture: who reads how much from whom, the busiest link, the run lengths.
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "plan/explain_format.h"
#include "plan/svg_canvas.h"
#include "transfuse/plan.h"

namespace transfuse {
namespace {

constexpr double kWidth = 960;
constexpr double kMargin = 40;
constexpr std::string_view kInk = "#1f2937";
constexpr std::string_view kPale = "#6b7280";
constexpr std::string_view kRule = "#d1d5db";
constexpr std::string_view kBusy = "#d1293d";
constexpr std::string_view kTarget = "#475569";
constexpr std::string_view kPalette[] = {"#3b6fb6", "#2a9d8f", "#8a5fbf", "#c98a1b",
                                         "#5b8c3a", "#b0578d", "#4f9bd0", "#7a7a3c"};

// Ribbons stay readable up to this; beyond it the picture is a matrix.
constexpr size_t kMaxRibbonSide = 24;
constexpr size_t kMaxRibbons = 160;
constexpr size_t kMaxMatrixSide = 128;  // more ranks share a row or column

double share(uint64_t part, uint64_t whole) {
  return whole == 0 ? 0 : static_cast<double>(part) / static_cast<double>(whole);
}

int exponent(const RunLengthBucket& bucket) { return std::countr_zero(bucket.min_bytes); }

// Used from one thread.
class Picture {
 public:
  explicit Picture(const Explanation& e)
      : e_(e), sent_(sent_bytes(e)), received_(received_bytes(e)) {}

  std::string draw() {
    head();
    if (e_.sources.size() <= kMaxRibbonSide && e_.targets.size() <= kMaxRibbonSide &&
        e_.pairs.size() <= kMaxRibbons) {
      ribbons();
    } else {
      matrix();
    }
    histogram();
    return canvas_.document({kWidth, y_ + kMargin});
  }

 private:
  bool source_is_busiest(size_t i) const {
    return e_.total_bytes > 0 && e_.busiest_link == "source " + e_.sources[i];
  }
  bool target_is_busiest(size_t i) const {
    return e_.total_bytes > 0 && e_.busiest_link == "target " + e_.targets[i];
  }

  void head() {
    uint64_t runs = 0;
    for (const PairTraffic& pair : e_.pairs) runs += pair.run_count;
    canvas_.text({kMargin, 52}, {.size = 22, .color = kInk, .bold = true},
                 fmt::format("{} source{} \u2192 {} target{}", e_.sources.size(),
                             e_.sources.size() == 1 ? "" : "s", e_.targets.size(),
                             e_.targets.size() == 1 ? "" : "s"));
    canvas_.text(
        {kMargin, 76}, {.size = 13, .color = kPale},
        fmt::format("{} read in {} strided runs over {} pairs", spell_bytes(e_.total_bytes),
                    spell_count(runs), spell_count(e_.pairs.size())));
    canvas_.rect({kMargin, 87}, {10, 10}, kBusy);
    canvas_.text({kMargin + 17, 96}, {.size = 13, .color = kBusy}, spell_bound(e_));
    y_ = 126;
  }

  // Heights of stacked bars that together fill `height`; what moves nothing is still a line.
  static std::vector<double> heights(const std::vector<uint64_t>& bytes, uint64_t total,
                                     double height, double gap) {
    const double room = height - gap * static_cast<double>(bytes.size() - 1);
    std::vector<double> out;
    out.reserve(bytes.size());
    for (const uint64_t b : bytes) out.push_back(std::max(1.0, room * share(b, total)));
    return out;
  }

  void ribbons() {
    const auto most = static_cast<double>(std::max(e_.sources.size(), e_.targets.size()));
    const double height = std::clamp(most * 46, 220.0, 880.0);
    constexpr double kGap = 10;
    constexpr double kBar = 14;
    constexpr double kLeft = 270;
    constexpr double kRight = kWidth - kLeft;
    const auto left = heights(sent_, e_.total_bytes, height, kGap);
    const auto right = heights(received_, e_.total_bytes, height, kGap);
    std::vector<double> left_at = bars(left, kGap, height);
    std::vector<double> right_at = bars(right, kGap, height);
    const std::vector<double> left_top = left_at;
    const std::vector<double> right_top = right_at;

    for (const PairTraffic& pair : e_.pairs) {  // sorted by source, then target
      const double from = left[pair.source] * share(pair.size_bytes, sent_[pair.source]);
      const double to = right[pair.target] * share(pair.size_bytes, received_[pair.target]);
      const double thick = std::min(from, to);
      canvas_.ribbon({kLeft, left_at[pair.source]}, {kRight, right_at[pair.target]}, thick,
                     kPalette[pair.source % std::size(kPalette)],
                     fmt::format("{} \u2192 {}: {} in {} runs", e_.sources[pair.source],
                                 e_.targets[pair.target], spell_bytes(pair.size_bytes),
                                 spell_count(pair.run_count)));
      left_at[pair.source] += from;
      right_at[pair.target] += to;
    }
    for (size_t i = 0; i < left.size(); ++i) {
      node({kLeft - kBar, left_top[i]}, {kBar, left[i]}, kPalette[i % std::size(kPalette)],
           e_.sources[i], sent_[i], source_is_busiest(i), Anchor::kEnd);
    }
    for (size_t i = 0; i < right.size(); ++i) {
      node({kRight, right_top[i]}, {kBar, right[i]}, kTarget, e_.targets[i], received_[i],
           target_is_busiest(i), Anchor::kStart);
    }
    y_ += height + 50;
  }

  // Tops of stacked bars, the stack centred in `height`.
  std::vector<double> bars(const std::vector<double>& heights, double gap, double height) const {
    double used = gap * static_cast<double>(heights.size() - 1);
    for (const double h : heights) used += h;
    double at = y_ + std::max(0.0, (height - used) / 2);
    std::vector<double> tops;
    for (const double h : heights) {
      tops.push_back(at);
      at += h + gap;
    }
    return tops;
  }

  void node(Point at, Extent extent, std::string_view fill, const std::string& name, uint64_t bytes,
            bool busiest, Anchor anchor) {
    canvas_.rect(at, extent, fill, name + ": " + spell_bytes(bytes), busiest ? kBusy : "");
    const double x = anchor == Anchor::kEnd ? at.x - 12 : at.x + extent.width + 12;
    const double middle = at.y + extent.height / 2;
    const std::string_view color = busiest ? kBusy : kInk;
    const std::string size = spell_bytes(bytes) + (busiest ? ", busiest link" : "");
    if (extent.height < 26) {  // one line
      canvas_.text({x, middle + 4}, {.size = 12, .color = color, .anchor = anchor},
                   name + "  " + size);
      return;
    }
    canvas_.text({x, middle - 3}, {.size = 13, .color = color, .anchor = anchor, .bold = true},
                 name);
    canvas_.text({x, middle + 13}, {.size = 12, .color = busiest ? kBusy : kPale, .anchor = anchor},
                 size);
  }

  // Ranks in groups so that a side has at most kMaxMatrixSide of them.
  struct Side {
    size_t group = 1;
    size_t count = 0;
    double cell = 0;
    std::vector<uint64_t> bytes;
    std::vector<std::string> labels;
    size_t busiest = SIZE_MAX;

    Side(const std::vector<std::string>& names, const std::vector<uint64_t>& sums, double room,
         double largest) {
      group = (names.size() + kMaxMatrixSide - 1) / kMaxMatrixSide;
      count = (names.size() + group - 1) / group;
      cell = std::clamp(room / static_cast<double>(count), 4.0, largest);
      bytes.resize(count);
      for (size_t i = 0; i < names.size(); ++i) bytes[i / group] += sums[i];
      for (size_t i = 0; i < count; ++i) {
        const size_t last = std::min(names.size(), (i + 1) * group) - 1;
        labels.push_back(group == 1 ? names[i] : names[i * group] + " .. " + names[last]);
      }
    }
    // Every how many cells a label of `size` fits.
    size_t label_step(double size) const {
      return std::max<size_t>(1, static_cast<size_t>((size + cell - 0.1) / cell));
    }
  };

  static std::string heat(double value) {
    const auto mix = [value](double low, double high) {
      return static_cast<int>(low + (high - low) * value);
    };
    return fmt::format("#{:02x}{:02x}{:02x}", mix(219, 12), mix(232, 56), mix(248, 120));
  }

  void matrix() {
    Side rows(e_.sources, sent_, 720, 22);
    Side columns(e_.targets, received_, 540, 48);
    for (size_t i = 0; i < e_.sources.size(); ++i) {
      if (source_is_busiest(i)) rows.busiest = i / rows.group;
    }
    for (size_t i = 0; i < e_.targets.size(); ++i) {
      if (target_is_busiest(i)) columns.busiest = i / columns.group;
    }
    std::vector<uint64_t> cells(rows.count * columns.count);
    for (const PairTraffic& pair : e_.pairs) {
      cells[pair.source / rows.group * columns.count + pair.target / columns.group] +=
          pair.size_bytes;
    }
    const uint64_t most = std::max<uint64_t>(1, *std::max_element(cells.begin(), cells.end()));
    const Point origin{190, y_ + 30};
    const double width = columns.cell * static_cast<double>(columns.count);
    const double height = rows.cell * static_cast<double>(rows.count);
    canvas_.text({origin.x, y_}, {.size = 13, .color = kInk, .bold = true},
                 "Bytes from each source (row) to each target (column)");
    canvas_.rect(origin, {width, height}, "#f3f4f6");
    for (size_t r = 0; r < rows.count; ++r) {
      for (size_t c = 0; c < columns.count; ++c) {
        const uint64_t bytes = cells[r * columns.count + c];
        if (bytes == 0) continue;
        canvas_.rect({origin.x + static_cast<double>(c) * columns.cell,
                      origin.y + static_cast<double>(r) * rows.cell},
                     {columns.cell - 0.5, rows.cell - 0.5}, heat(share(bytes, most)),
                     rows.labels[r] + " \u2192 " + columns.labels[c] + ": " + spell_bytes(bytes));
      }
    }
    row_totals(rows, origin, width);
    column_totals(columns, origin, height);
    legend({origin.x + width + 30, origin.y + height + 20}, most);
    y_ = origin.y + height + 190;
  }

  void row_totals(const Side& rows, Point origin, double width) {
    const uint64_t most = *std::max_element(rows.bytes.begin(), rows.bytes.end());
    const size_t step = rows.label_step(10);
    canvas_.text({origin.x + width + 12, origin.y - 8}, {.size = 11, .color = kPale}, "sent");
    for (size_t i = 0; i < rows.count; ++i) {
      const bool busiest = i == rows.busiest;
      const double top = origin.y + static_cast<double>(i) * rows.cell;
      const double length = 90 * share(rows.bytes[i], most);
      canvas_.rect({origin.x + width + 12, top}, {length, rows.cell - 1},
                   busiest ? kBusy : kPalette[0],
                   rows.labels[i] + " sends " + spell_bytes(rows.bytes[i]));
      if (i % step == 0 || busiest) {
        const double line = top + rows.cell / 2 + 3.5;
        canvas_.text({origin.x - 8, line},
                     {.size = 10, .color = busiest ? kBusy : kInk, .anchor = Anchor::kEnd},
                     rows.labels[i]);
        canvas_.text({origin.x + width + 18 + length, line},
                     {.size = 10, .color = busiest ? kBusy : kPale}, spell_bytes(rows.bytes[i]));
      }
    }
  }

  void column_totals(const Side& columns, Point origin, double height) {
    const uint64_t most = *std::max_element(columns.bytes.begin(), columns.bytes.end());
    const size_t step = columns.label_step(11);
    const double top = origin.y + height + 12;
    canvas_.text({origin.x - 8, top + 10}, {.size = 11, .color = kPale, .anchor = Anchor::kEnd},
                 "received");
    for (size_t i = 0; i < columns.count; ++i) {
      const bool busiest = i == columns.busiest;
      const double left = origin.x + static_cast<double>(i) * columns.cell;
      const double length = 50 * share(columns.bytes[i], most);
      canvas_.rect({left, top}, {columns.cell - 1, length}, busiest ? kBusy : kTarget,
                   columns.labels[i] + " receives " + spell_bytes(columns.bytes[i]));
      if (i % step == 0 || busiest) {
        canvas_.text({left + columns.cell / 2 - 3, top + length + 8},
                     {.size = 10, .color = busiest ? kBusy : kInk, .rotate = 60},
                     columns.labels[i] + "  " + spell_bytes(columns.bytes[i]));
      }
    }
  }

  void legend(Point at, uint64_t most) {
    for (int i = 0; i <= 20; ++i) {
      canvas_.rect({at.x + 4.0 * i, at.y}, {4.2, 10}, heat(i / 20.0));
    }
    canvas_.text({at.x, at.y + 24}, {.size = 10, .color = kPale}, "0");
    canvas_.text({at.x + 84, at.y + 24}, {.size = 10, .color = kPale, .anchor = Anchor::kEnd},
                 spell_bytes(most));
  }

  void histogram() {
    canvas_.text({kMargin, y_}, {.size = 15, .color = kInk, .bold = true},
                 "Contiguous bytes at the source");
    canvas_.text({kMargin, y_ + 18}, {.size = 12, .color = kPale},
                 "share of all bytes in pieces of at least this length");
    if (e_.run_lengths.empty()) {
      y_ += 30;
      return;
    }
    const int first = exponent(e_.run_lengths.front());
    const int last = exponent(e_.run_lengths.back());
    const double step = std::min(72.0, (kWidth - 2 * kMargin) / (last - first + 1));
    uint64_t most = 1;
    for (const RunLengthBucket& b : e_.run_lengths) most = std::max(most, b.size_bytes);
    constexpr double kHeight = 130;
    const double base = y_ + 50 + kHeight;
    for (const RunLengthBucket& b : e_.run_lengths) {
      const double left = kMargin + step * (exponent(b) - first);
      const double height = std::max(1.0, kHeight * share(b.size_bytes, most));
      canvas_.rect({left + 3, base - height}, {step - 6, height}, kPalette[0],
                   fmt::format("{} pieces from {}: {}", spell_count(b.piece_count),
                               spell_length(b.min_bytes), spell_bytes(b.size_bytes)));
      const double middle = left + step / 2;
      const double percent = 100 * share(b.size_bytes, e_.total_bytes);
      canvas_.text({middle, base - height - 5},
                   {.size = 11, .color = kInk, .anchor = Anchor::kMiddle},
                   percent < 0.1 ? "<0.1 %" : fmt::format("{:.1f} %", percent));
      canvas_.text({middle, base + 16}, {.size = 11, .color = kInk, .anchor = Anchor::kMiddle},
                   spell_length(b.min_bytes));
      canvas_.text({middle, base + 30}, {.size = 10, .color = kPale, .anchor = Anchor::kMiddle},
                   spell_count(b.piece_count));
    }
    canvas_.line({kMargin, base}, {kMargin + step * (last - first + 1), base}, kRule);
    canvas_.text({kMargin, base + 48}, {.size = 11, .color = kPale},
                 "second line: number of pieces");
    y_ = base + 48;
  }

  const Explanation& e_;
  const std::vector<uint64_t> sent_;
  const std::vector<uint64_t> received_;
  SvgCanvas canvas_;
  double y_ = 0;
};

}  // namespace

std::string Explanation::to_svg() const { return Picture(*this).draw(); }

}  // namespace transfuse
