// Rows of text in aligned columns.
#pragma once

#include <string>
#include <vector>

namespace transfuse {

class TextTable {
 public:
  explicit TextTable(std::vector<std::string> header) : rows_{std::move(header)} {}
  // As many cells as the header has.
  void add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }
  bool empty() const { return rows_.size() == 1; }
  // Two spaces between columns, `indent` before each line, no space at the end of a line.
  std::string to_text(size_t indent = 0) const;

 private:
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace transfuse
