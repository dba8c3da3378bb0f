// Writes SVG elements: the few shapes that the plan picture is made of.
#pragma once

#include <string>
#include <string_view>

namespace transfuse {

struct Point {
  double x = 0;
  double y = 0;
};

struct Extent {
  double width = 0;
  double height = 0;
};

enum class Anchor { kStart, kMiddle, kEnd };

struct TextStyle {
  double size = 12;
  std::string_view color = "#1f2937";
  Anchor anchor = Anchor::kStart;
  bool bold = false;
  double rotate = 0;  // degrees, clockwise, about the anchor
};

// Used from one thread.
class SvgCanvas {
 public:
  // `tooltip` may be empty; texts are escaped.
  void rect(Point at, Extent extent, std::string_view fill, std::string_view tooltip = {},
            std::string_view outline = {});
  void text(Point at, const TextStyle& style, std::string_view text);
  void line(Point from, Point to, std::string_view color);
  // A band from the vertical edge of `height` at `from` to that at `to`.
  void ribbon(Point from, Point to, double height, std::string_view fill, std::string_view tooltip);

  // The whole document, on a white ground.
  std::string document(Extent extent) const;

 private:
  std::string body_;
};

}  // namespace transfuse
