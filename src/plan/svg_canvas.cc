// Writes SVG elements: the few shapes that the plan picture is made of.
#include "plan/svg_canvas.h"

#include <fmt/format.h>

#include <iterator>
#include <string>
#include <string_view>

#include "plan/explain_format.h"

namespace transfuse {
namespace {

std::string_view anchor_name(Anchor anchor) {
  switch (anchor) {
    case Anchor::kStart:
      return "start";
    case Anchor::kMiddle:
      return "middle";
    case Anchor::kEnd:
      return "end";
  }
  return "start";
}

std::string title(std::string_view tooltip) {
  return tooltip.empty() ? "" : "<title>" + escape_xml(tooltip) + "</title>";
}

}  // namespace

void SvgCanvas::rect(Point at, Extent extent, std::string_view fill, std::string_view tooltip,
                     std::string_view outline) {
  fmt::format_to(std::back_inserter(body_),
                 R"(<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill="{}")", at.x,
                 at.y, extent.width, extent.height, fill);
  if (!outline.empty()) {
    fmt::format_to(std::back_inserter(body_), R"( stroke="{}" stroke-width="2.5")", outline);
  }
  fmt::format_to(std::back_inserter(body_), ">{}</rect>\n", title(tooltip));
}

void SvgCanvas::text(Point at, const TextStyle& style, std::string_view text) {
  fmt::format_to(std::back_inserter(body_),
                 R"(<text x="{:.1f}" y="{:.1f}" font-size="{:.1f}" fill="{}" text-anchor="{}")",
                 at.x, at.y, style.size, style.color, anchor_name(style.anchor));
  if (style.bold) body_ += R"( font-weight="600")";
  if (style.rotate != 0) {
    fmt::format_to(std::back_inserter(body_), R"x( transform="rotate({:.0f} {:.1f} {:.1f})")x",
                   style.rotate, at.x, at.y);
  }
  fmt::format_to(std::back_inserter(body_), ">{}</text>\n", escape_xml(text));
}

void SvgCanvas::line(Point from, Point to, std::string_view color) {
  fmt::format_to(std::back_inserter(body_),
                 R"(<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" stroke="{}"/>)", from.x,
                 from.y, to.x, to.y, color);
  body_ += '\n';
}

void SvgCanvas::ribbon(Point from, Point to, double height, std::string_view fill,
                       std::string_view tooltip) {
  const double middle = (from.x + to.x) / 2;
  fmt::format_to(
      std::back_inserter(body_),
      R"(<path d="M{0:.1f} {1:.2f}C{4:.1f} {1:.2f} {4:.1f} {3:.2f} {2:.1f} {3:.2f}V{5:.2f})"
      R"(C{4:.1f} {5:.2f} {4:.1f} {6:.2f} {0:.1f} {6:.2f}Z" fill="{7}" fill-opacity="0.4">)",
      from.x, from.y, to.x, to.y, middle, to.y + height, from.y + height, fill);
  body_ += title(tooltip) + "</path>\n";
}

std::string SvgCanvas::document(Extent extent) const {
  return fmt::format(
      R"(<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0:.0f} {1:.0f}" width="{0:.0f}" )"
      R"(height="{1:.0f}" font-family="system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif">)"
      "\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n{2}</svg>\n",
      extent.width, extent.height, body_);
}

}  // namespace transfuse
