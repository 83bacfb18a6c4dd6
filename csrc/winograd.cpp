#include "winograd.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "winograd_ops.h"
#include "workspace.h"

#define BAGSSL_BODY "winograd_body.h"
#include "simd_levels.h"

namespace bagssl {
namespace {

// Floats of transformed weights, and of a chunk's transformed tiles, that are held at a time. Both
// are shared by the threads and fit a last-level cache.
constexpr int64_t kWeightFloats = int64_t{9} << 18;
constexpr int64_t kTileFloats = int64_t{9} << 17;
constexpr int64_t kTilesPerItem = 16;
constexpr int64_t kPanelsPerItem = 4;
constexpr int64_t kLine = 16;  // floats in a cache line

const WinogradOps& winograd_ops() { return *BAGSSL_PICK(kOps); }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t whole_panels(int64_t channels) { return ceil_div(channels, kPanel) * kPanel; }

/// Numbers of one point apart by an odd number of cache lines: at a power of two they would all
/// compete for the same few places of a cache.
int64_t odd_lines(int64_t floats) { return (ceil_div(floats, kLine) | 1) * kLine; }

thread_local Workspace workspace;

void check(const ConvShape& s) {
  if (s.n < 0 || s.height < 1 || s.width < 1 || s.in_channels < 1 || s.out_channels < 1) {
    throw std::invalid_argument(
        "conv3x3: maps [" + std::to_string(s.n) + ", " + std::to_string(s.height) + ", " +
        std::to_string(s.width) + ", " + std::to_string(s.in_channels) + "] to " +
        std::to_string(s.out_channels) + " channels; expected at least one pixel and channel");
  }
}

/// Channels worked on at a time, so that `others` times as many weights fit.
int64_t channels_at_a_time(int64_t channels, int64_t others) {
  const int64_t most = kWeightFloats / (kPoints * others) / kPanel * kPanel;
  return std::clamp<int64_t>(most, kPanel, whole_panels(channels));
}

int64_t tiles_at_a_time(int64_t tiles, int64_t channels) {
  const int64_t most = kTileFloats / (kPoints * channels) / kTilesPerItem * kTilesPerItem;
  return std::min(tiles, std::max(most, kTilesPerItem));
}

/// transform(part) for all tiles of `all`, a few at a time.
template <typename Transform>
void for_tiles(ThreadPool& pool, const Part& all, Transform transform) {
  pool.parallel_for(ceil_div(all.last - all.first, kTilesPerItem), [&](int, int64_t item) {
    Part part = all;
    part.first = all.first + item * kTilesPerItem;
    part.last = std::min(all.last, part.first + kTilesPerItem);
    transform(part, item * kTilesPerItem);
  });
}

/// The 9 taps between input channel `c` and kPanel output channels from `k` on.
void gather_taps(const float* weight, WeightStrides strides, int64_t k, int64_t last_k, int64_t c,
                 int64_t count, float (*taps)[9][kPanel]) {
  const int64_t lanes = std::min<int64_t>(last_k - k, kPanel);
  weight += k * strides.out + c * strides.in;
  for (int64_t tap = 0; tap < 9; ++tap, weight += strides.tap) {
    if (strides.in < strides.out) {  // the inner loop is over neighbors
      for (int64_t l = 0; l < lanes; ++l) {
        const float* from = weight + l * strides.out;
        for (int64_t i = 0; i < count; ++i) taps[i][tap][l] = from[i * strides.in];
      }
    } else {
      for (int64_t i = 0; i < count; ++i) {
        const float* from = weight + i * strides.in;
        for (int64_t l = 0; l < lanes; ++l) taps[i][tap][l] = from[l * strides.out];
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t l = lanes; l < kPanel; ++l) taps[i][tap][l] = 0.0f;
    }
  }
}

/// Transformed weights of output channels [first, last): panels [in_channels][kPanel] per point.
void transform_weights(const float* weight, WeightStrides strides, int64_t in_channels,
                       int64_t first, int64_t last, int64_t points, float* out, ThreadPool& pool) {
  const WinogradOps& ops = winograd_ops();
  const int64_t groups = ceil_div(in_channels, kPanel);
  pool.parallel_for(ceil_div(last - first, kPanel) * groups, [&](int, int64_t item) {
    float taps[kPanel][9][kPanel];
    const int64_t k = item / groups * kPanel, c = item % groups * kPanel;
    const int64_t count = std::min<int64_t>(kPanel, in_channels - c);
    gather_taps(weight, strides, first + k, last, c, count, taps);
    for (int64_t i = 0; i < count; ++i) {
      ops.from_taps(taps[i][0], points, out + k * in_channels + (c + i) * kPanel);
    }
  });
}

/// Both conv3x3 and conv3x3_dx: from `in` with shape.in_channels to `out`.
void convolve(const float* in, const float* weight, float* out, const ConvShape& shape,
              WeightStrides strides, ThreadPool& pool) {
  const WinogradOps& ops = winograd_ops();
  const int64_t cin = shape.in_channels, cout = shape.out_channels, cin_padded = whole_panels(cin);
  const Maps in_maps{shape.n, shape.height, shape.width, cin};
  const Maps out_maps{shape.n, shape.height, shape.width, cout};
  const int64_t tiles = in_maps.tiles(), block = channels_at_a_time(cout, cin);
  const int64_t chunk = tiles_at_a_time(tiles, std::max(cin_padded, block));

  const int64_t weight_points = odd_lines(cin * block);
  const Layout in_layout{odd_lines(chunk * cin_padded), kPanel, cin_padded};
  const Layout out_layout{odd_lines(chunk * block), kPanel, block};
  float* weights = workspace.take(kPoints * (weight_points + in_layout.points + out_layout.points));
  float* inputs = weights + kPoints * weight_points;
  float* outputs = inputs + kPoints * in_layout.points;

  for (int64_t k = 0; k < cout; k += block) {
    const int64_t last_k = std::min(cout, k + block), panels = ceil_div(last_k - k, kPanel);
    transform_weights(weight, strides, cin, k, last_k, weight_points, weights, pool);
    for (int64_t first = 0; first < tiles; first += chunk) {
      const int64_t last = std::min(tiles, first + chunk);
      if (k == 0 || chunk < tiles) {  // else they are there
        for_tiles(pool, {first, last, 0, cin}, [&](const Part& part, int64_t t) {
          ops.from_windows(in, in_maps, part, in_layout, inputs + t * in_layout.tiles);
        });
      }
      const int64_t groups = ceil_div(panels, kPanelsPerItem);
      pool.parallel_for(kPoints * groups, [&](int, int64_t item) {
        const int64_t point = item / groups, panel = item % groups * kPanelsPerItem;
        Product p{};
        p.a = inputs + point * in_layout.points;
        p.a_row = cin_padded;
        p.a_step = 1;
        p.rows = p.rows_in_panel = last - first;
        p.b = weights + point * weight_points + panel * kPanel * cin;
        p.b_panel = cin * kPanel;
        p.panels = std::min(kPanelsPerItem, panels - panel);
        p.steps = cin;
        p.out = outputs + point * out_layout.points + panel * kPanel;
        p.out_row = block;
        ops.product(p);
      });
      for_tiles(pool, {first, last, k, last_k}, [&](const Part& part, int64_t t) {
        ops.to_tiles(outputs + t * out_layout.tiles, out_layout, out_maps, part, out);
      });
    }
  }
}

}  // namespace

void conv3x3(const float* x, const float* weight, float* y, const ConvShape& shape,
             WeightStrides strides, ThreadPool& pool) {
  check(shape);
  convolve(x, weight, y, shape, strides, pool);
}

void conv3x3_dx(const float* dy, const float* weight, float* dx, const ConvShape& shape,
                WeightStrides strides, ThreadPool& pool) {
  check(shape);
  const ConvShape turned{shape.n, shape.height, shape.width, shape.out_channels, shape.in_channels};
  convolve(dy, weight + 8 * strides.tap, dx, turned, {strides.in, strides.out, -strides.tap}, pool);
}

void conv3x3_dweight(const float* x, const float* dy, float* dweight, const ConvShape& shape,
                     WeightStrides strides, ThreadPool& pool) {
  check(shape);
  const WinogradOps& ops = winograd_ops();
  const int64_t cin = shape.in_channels, cout = shape.out_channels;
  const Maps x_maps{shape.n, shape.height, shape.width, cin};
  const Maps dy_maps{shape.n, shape.height, shape.width, cout};
  const int64_t tiles = x_maps.tiles(), block = channels_at_a_time(cin, cout);
  const int64_t chunk = tiles_at_a_time(tiles, std::max(whole_panels(cout), block));

  const Layout x_layout{odd_lines(chunk * block), chunk * kPanel, kPanel};
  const Layout dy_layout{odd_lines(chunk * whole_panels(cout)), chunk * kPanel, kPanel};
  const int64_t sum_points = odd_lines(cout * block);
  float* sums = workspace.take(kPoints * (sum_points + x_layout.points + dy_layout.points));
  float* inputs = sums + kPoints * sum_points;
  float* gradients = inputs + kPoints * x_layout.points;
  if (tiles == 0) std::fill(sums, sums + kPoints * sum_points, 0.0f);

  for (int64_t c = 0; c < cin; c += block) {
    const int64_t last_c = std::min(cin, c + block), panels = ceil_div(last_c - c, kPanel);
    for (int64_t first = 0; first < tiles; first += chunk) {
      const int64_t last = std::min(tiles, first + chunk);
      for_tiles(pool, {first, last, c, last_c}, [&](const Part& part, int64_t t) {
        ops.from_windows(x, x_maps, part, x_layout, inputs + t * kPanel);
        if (c == 0 || chunk < tiles) {  // else they are there
          const Part of_dy{part.first, part.last, 0, cout};
          ops.from_tiles(dy, dy_maps, of_dy, dy_layout, gradients + t * kPanel);
        }
      });
      const int64_t groups = ceil_div(panels, kPanelsPerItem);
      pool.parallel_for(kPoints * groups, [&](int, int64_t item) {
        const int64_t point = item / groups, panel = item % groups * kPanelsPerItem;
        Product p{};
        p.a = gradients + point * dy_layout.points;
        p.a_row = 1;
        p.a_step = kPanel;
        p.a_panel = dy_layout.panels;
        p.rows = cout;
        p.rows_in_panel = kPanel;
        p.b = inputs + point * x_layout.points + panel * x_layout.panels;
        p.b_panel = x_layout.panels;
        p.panels = std::min(kPanelsPerItem, panels - panel);
        p.steps = last - first;
        p.out = sums + point * sum_points + panel * kPanel;
        p.out_row = block;
        p.accumulate = first > 0;
        ops.product(p);
      });
    }
    pool.parallel_for(cout, [&](int, int64_t k) {
      float taps[9][kPanel];
      for (int64_t panel = c; panel < last_c; panel += kPanel) {
        ops.to_taps(sums + k * block + panel - c, sum_points, taps[0]);
        const int64_t lanes = std::min<int64_t>(kPanel, last_c - panel);
        for (int64_t tap = 0; tap < 9; ++tap) {
          float* to = dweight + k * strides.out + panel * strides.in + tap * strides.tap;
          for (int64_t l = 0; l < lanes; ++l) to[l * strides.in] = taps[tap][l];
        }
      }
    });
  }
}

}  // namespace bagssl
