// The gradients of a convolution.
//
// Of the weight: sums over windows of the upstream gradient times the dequantized input, whose
// codes are made anew from the float input.  The shape alone decides who adds what (slabs of images), so that the bits do
// not depend on the number of threads.
#include "codes.h"
#include "common.h"
#include "products.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace lsquant {
namespace {

// to[N][PANEL] += sum over windows of x[window + 0 .. N - 1] * up[window][panel]
template <int N>
void outer(const float* x, int64_t row, int64_t pixel, const float* up, int64_t up_row, int64_t up_pixel, int64_t rows,
           int64_t columns, float* to) {
#if defined(__AVX2__) && defined(__FMA__)
  __m256 low[N], high[N];
#pragma GCC unroll 8
  for (int c = 0; c < N; ++c) low[c] = _mm256_load_ps(to + c * PANEL), high[c] = _mm256_load_ps(to + c * PANEL + 8);
  for (int64_t h = 0; h < rows; ++h) {
    const float *p = x + h * row, *g = up + h * up_row;
    for (int64_t w = 0; w < columns; ++w, p += pixel, g += up_pixel) {
      const __m256 g0 = _mm256_loadu_ps(g), g1 = _mm256_loadu_ps(g + 8);
#pragma GCC unroll 8
      for (int c = 0; c < N; ++c) {
        const __m256 v = _mm256_broadcast_ss(p + c);
        low[c] = _mm256_fmadd_ps(v, g0, low[c]), high[c] = _mm256_fmadd_ps(v, g1, high[c]);
      }
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < N; ++c) _mm256_store_ps(to + c * PANEL, low[c]), _mm256_store_ps(to + c * PANEL + 8, high[c]);
#else
  for (int64_t h = 0; h < rows; ++h)
    for (int64_t w = 0; w < columns; ++w)
      for (int64_t c = 0; c < N; ++c)
        for (int64_t o = 0; o < PANEL; ++o) to[c * PANEL + o] += x[h * row + w * pixel + c] * up[h * up_row + w * up_pixel + o];
#endif
}

// one panel's sums over a block of windows that lie together: to[channels][PANEL]
void outer_all(const float* x, int64_t row, int64_t pixel, const float* up, int64_t up_row, int64_t up_pixel, int64_t rows,
               int64_t columns, int64_t channels, float* to) {
  for (int64_t c = 0; c < channels;) {
    const int64_t rest = channels - c, block = rest == 4 || rest == 8 ? 4 : 6;
    (block == 6 ? outer<6> : outer<4>)(x + c, row, pixel, up, up_row, up_pixel, rows, columns, to + c * PANEL);
    c += block;
  }
}

// Winograd's minimal filtering F(3x3, 2x2) (Lavin and Gray, arXiv:1509.09308): 16 multiplications for a tile of 2 x 2
// windows instead of 36.  Four inputs and two gradients of a row become four products, whose sums over all tiles are
// turned into three taps once, at the end.

typedef float Eight __attribute__((vector_size(32)));
inline Eight get(const float* from) {
  Eight v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
inline void put(float* to, const Eight& v) { std::memcpy(to, &v, sizeof v); }

// (4, 4) inputs of a tile, in rows of `row` and pixels of `channels` floats, into to[16][stride]
void transform_input(const float* x, int64_t row, int64_t channels, float* to, int64_t stride) {
  for (int64_t c = 0; c < channels; c += 8) {
    Eight half[4][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const float* d = x + j * channels + c;
      const Eight d0 = get(d), d1 = get(d + row), d2 = get(d + 2 * row), d3 = get(d + 3 * row);
      half[0][j] = d0 - d2, half[1][j] = d1 + d2, half[2][j] = d2 - d1, half[3][j] = d3 - d1;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Eight* h = half[i];
      float* t = to + 4 * i * stride + c;
      put(t, h[0] - h[2]), put(t + stride, h[1] + h[2]), put(t + 2 * stride, h[2] - h[1]), put(t + 3 * stride, h[3] - h[1]);
    }
  }
}

// (2, 2) upstream gradients of a panel into to[16][stride]
void transform_gradient(const float* g00, const float* g01, const float* g10, const float* g11, float* to, int64_t stride) {
  for (int64_t o = 0; o < PANEL; o += 8) {
    const Eight a = get(g00 + o), b = get(g01 + o), c = get(g10 + o), d = get(g11 + o);
    const Eight rows[4][2] = {{a, b}, {0.5f * (a + c), 0.5f * (b + d)}, {0.5f * (a - c), 0.5f * (b - d)}, {c, d}};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      float* t = to + 4 * i * stride + o;
      const Eight v = rows[i][0], w = rows[i][1];
      put(t, v), put(t + stride, 0.5f * (v + w)), put(t + 2 * stride, 0.5f * (v - w)), put(t + 3 * stride, w);
    }
  }
}

// 16 sums of products into 9 taps
void taps_of(const float* m, float* taps) {
  float half[3][4];
  for (int j = 0; j < 4; ++j) {
    half[0][j] = m[j] + m[4 + j] + m[8 + j];
    half[1][j] = m[4 + j] - m[8 + j];
    half[2][j] = m[4 + j] + m[8 + j] + m[12 + j];
  }
  for (int i = 0; i < 3; ++i) {
    const float* h = half[i];
    taps[3 * i] = h[0] + h[1] + h[2], taps[3 * i + 1] = h[1] - h[2], taps[3 * i + 2] = h[1] + h[2] + h[3];
  }
}

}  // namespace

void weight_gradient(Type type, const void* x, const float* up, const Shape& s, int64_t out, const InputGrid& q, float* to) {
  const bool fast = s.kernel_h == 3 && s.kernel_w == 3 && s.stride_h == 1 && s.stride_w == 1 && s.dilation_h == 1 &&
                    s.dilation_w == 1 && s.c >= 8 && s.out_h >= 4 && s.out_w >= 4;
  const int64_t channels = fast ? (s.c + 7) / 8 * 8 : std::max<int64_t>(4, (s.c + 1) / 2 * 2), taps = s.kernel_h * s.kernel_w;
  const int64_t panels = (out + PANEL - 1) / PANEL, pixels = s.out_h * s.out_w;
  const int64_t tiles_h = (s.out_h + 1) / 2, tiles_w = (s.out_w + 1) / 2;  // of 2 x 2 windows
  const int64_t height = fast ? 2 * tiles_h + 2 : s.h + 2 * s.pad_h, width = fast ? 2 * tiles_w + 2 : s.w + 2 * s.pad_w;
  const int64_t sums_each = fast ? 16 : taps, one = sums_each * channels * PANEL, total = panels * one;
  const int64_t slabs = std::max<int64_t>(1, std::min<int64_t>({16, s.n, (int64_t(1) << 19) / total}));
  const int64_t shares = std::min<int64_t>(panels, (16 + slabs - 1) / slabs);
  const bool direct = s.channels_last && out % PANEL == 0;
  const int64_t lines = std::max<int64_t>(1, fast ? 64 / tiles_w : 256 / s.out_w), block = lines * tiles_w;
  const int64_t input_stride = block * channels + 16, gradient_stride = block * PANEL + 16;  // no powers of 2: they share cache sets
  const int64_t up_pixel = direct ? out : PANEL;
  Buffer<float> partial(slabs * total);
  std::fill_n(partial.data, slabs * total, 0.0f);

  auto images = [&](auto tag) {
    using T = decltype(tag);
    parallel(slabs * shares, 1, [&](int64_t begin, int64_t end) {
      const int64_t size = height * width * channels + 16;
      Buffer<float> buffer(size), scratch(s.w * s.c + 16), arranged(direct ? 0 : (pixels + s.out_w) * PANEL), zeros(PANEL);
      Buffer<float> inputs(fast ? 16 * input_stride : 0), gradients(fast ? 16 * gradient_stride : 0);
      std::fill_n(buffer.data, size, 0.0f);
      std::fill_n(zeros.data, PANEL, 0.0f);

      auto panel_gradient = [&](int64_t n, int64_t panel) {
        const int64_t first = panel * PANEL, count = std::min(PANEL, out - first);
        const float* g = up + n * pixels * out + first;
        if (direct) return g;
        for (int64_t i = 0; i < pixels; ++i)
          for (int64_t o = 0; o < PANEL; ++o)
            arranged.data[i * PANEL + o] =
                o >= count ? 0.0f : s.channels_last ? g[i * out + o] : up[(n * out + first + o) * pixels + i];
        return static_cast<const float*>(arranged.data);
      };

      auto direct_sums = [&](const float* g, float* sums) {
        for (int64_t oh = 0; oh < s.out_h; oh += lines)
          for (int64_t tap = 0; tap < taps; ++tap) {
            const int64_t h = oh * s.stride_h + tap / s.kernel_w * s.dilation_h, w = tap % s.kernel_w * s.dilation_w;
            outer_all(buffer.data + (h * width + w) * channels, s.stride_h * width * channels, s.stride_w * channels,
                      g + oh * s.out_w * up_pixel, s.out_w * up_pixel, up_pixel, std::min(lines, s.out_h - oh), s.out_w,
                      channels, sums + tap * channels * PANEL);
          }
      };

      // two rows of windows of one image and panel; zeros beyond the last one
      auto tile_row = [&](int64_t n, int64_t panel, int64_t h, float* to) {
        const int64_t first = panel * PANEL, count = std::min(PANEL, out - first), step_h = s.out_w * up_pixel;
        const float* g = up + (n * pixels + h * s.out_w) * out + first;
        if (!direct) {
          std::fill_n(arranged.data, 2 * s.out_w * PANEL, 0.0f);
          for (int64_t i = 0; i < std::min<int64_t>(2, s.out_h - h) * s.out_w; ++i)
            for (int64_t o = 0; o < count; ++o)
              arranged.data[i * PANEL + o] =
                  s.channels_last ? g[i * out + o] : up[(n * out + first + o) * pixels + h * s.out_w + i];
          g = arranged.data;
        }
        const bool second = h + 1 < s.out_h;
        for (int64_t w = 0; w < s.out_w; w += 2, to += PANEL) {
          const float *a = g + w * up_pixel, *b = w + 1 < s.out_w ? a + up_pixel : zeros.data;
          transform_gradient(a, b, second ? a + step_h : zeros.data, second && w + 1 < s.out_w ? b + step_h : zeros.data, to,
                             gradient_stride);
        }
      };

      for (int64_t task = begin; task < end; ++task) {
        const int64_t slab = task / shares, share = task % shares;
        const int64_t panel_begin = share * panels / shares, panel_end = (share + 1) * panels / shares;
        const int64_t image_begin = slab * s.n / slabs, image_end = (slab + 1) * s.n / slabs;
        auto codes = [&](int64_t n) {
          const T* image = static_cast<const T*>(x) + n * s.c * s.h * s.w;
          quantize_image(image, buffer.data, scratch.data, s, width, channels, q, q.zero);
        };
        for (int64_t n = image_begin; !fast && n < image_end; ++n) {
          codes(n);
          for (int64_t panel = panel_begin; panel < panel_end; ++panel)
            direct_sums(panel_gradient(n, panel), partial.data + slab * total + panel * one);
        }
        int64_t there = -1;
        for (int64_t first = image_begin * tiles_h; fast && first < image_end * tiles_h; first += lines) {
          const int64_t rows = std::min(lines, image_end * tiles_h - first);  // of tiles, of one image or several
          for (int64_t r = 0; r < rows; ++r) {
            const int64_t n = (first + r) / tiles_h, h = 2 * ((first + r) % tiles_h);
            if (n != there) codes(n);
            there = n;
            for (int64_t t = 0; t < tiles_w; ++t)
              transform_input(buffer.data + (h * width + 2 * t) * channels, width * channels, channels,
                              inputs.data + (r * tiles_w + t) * channels, input_stride);
          }
          for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
            for (int64_t r = 0; r < rows; ++r)
              tile_row((first + r) / tiles_h, panel, 2 * ((first + r) % tiles_h), gradients.data + r * tiles_w * PANEL);
            for (int64_t p = 0; p < 16; ++p)
              outer_all(inputs.data + p * input_stride, 0, channels, gradients.data + p * gradient_stride, 0, PANEL, 1,
                        rows * tiles_w, channels, partial.data + slab * total + panel * one + p * channels * PANEL);
          }
        }
      }
    });
  };
  type == Type::f32 ? images(float{}) : type == Type::bf16 ? images(bf16{}) : images(f16{});

  parallel(total, 4096, [&](int64_t begin, int64_t end) {  // the slabs in their order
    for (int64_t slab = 1; slab < slabs; ++slab)
      for (int64_t i = begin; i < end; ++i) partial.data[i] += partial.data[slab * total + i];
  });
  parallel(out, std::max<int64_t>(1, 4096 / (taps * s.c)), [&](int64_t begin, int64_t end) {
    std::vector<float> sums(sums_each), done(taps);
    for (int64_t o = begin; o < end; ++o)
      for (int64_t c = 0; c < s.c; ++c) {
        for (int64_t p = 0; p < sums_each; ++p) sums[p] = partial.data[o / PANEL * one + (p * channels + c) * PANEL + o % PANEL];
        if (fast) taps_of(sums.data(), done.data());
        for (int64_t tap = 0; tap < taps; ++tap) to[(o * taps + tap) * s.c + c] = (fast ? done : sums)[tap] * q.step;
      }
  });
}

// ---- the input's gradient of a 3x3 convolution, by F(2x2, 3x3) ----

namespace {

// to[N][PANEL] = sum over k of a[n][k] * b[k][PANEL]; rows of a are `row` apart
template <int N>
void multiply(const float* a, int64_t row, const float* b, int64_t count, float* to) {
#if defined(__AVX2__) && defined(__FMA__)
  __m256 low[N], high[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) low[n] = high[n] = _mm256_setzero_ps();
  for (int64_t k = 0; k < count; ++k, b += PANEL) {
    const __m256 b0 = _mm256_load_ps(b), b1 = _mm256_load_ps(b + 8);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const __m256 v = _mm256_broadcast_ss(a + n * row + k);
      low[n] = _mm256_fmadd_ps(v, b0, low[n]), high[n] = _mm256_fmadd_ps(v, b1, high[n]);
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) _mm256_store_ps(to + n * PANEL, low[n]), _mm256_store_ps(to + n * PANEL + 8, high[n]);
#else
  std::fill_n(to, N * PANEL, 0.0f);
  for (int64_t k = 0; k < count; ++k)
    for (int n = 0; n < N; ++n)
      for (int64_t c = 0; c < PANEL; ++c) to[n * PANEL + c] += a[n * row + k] * b[k * PANEL + c];
#endif
}

// weights (out, 3, 3, in), turned round, into [panel of in][16][out][PANEL]
void transform_weights(const float* weight, int64_t out, int64_t in, float* to) {
  const int64_t panels = (in + PANEL - 1) / PANEL;
  parallel(panels * out, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t lane = 0; lane < PANEL; ++lane) {
        const int64_t panel = i / out, o = i % out, c = panel * PANEL + lane;
        float half[4][3];
        for (int64_t kw = 0; kw < 3; ++kw) {
          auto w = [&](int64_t kh) { return c < in ? weight[((o * 3 + 2 - kh) * 3 + 2 - kw) * in + c] : 0.0f; };
          half[0][kw] = w(0), half[3][kw] = w(2);
          half[1][kw] = 0.5f * (w(0) + w(1) + w(2)), half[2][kw] = 0.5f * (w(0) - w(1) + w(2));
        }
        for (int64_t p = 0; p < 4; ++p) {
          const float *h = half[p], all[4] = {h[0], 0.5f * (h[0] + h[1] + h[2]), 0.5f * (h[0] - h[1] + h[2]), h[2]};
          for (int64_t r = 0; r < 4; ++r) to[((panel * 16 + p * 4 + r) * out + o) * PANEL + lane] = all[r];
        }
      }
  });
}

// 16 products of a tile, `stride` apart, into (2, 2) outputs of a panel
void transform_back(const float* m, int64_t stride, float* to[4], int64_t count) {
  alignas(32) float out[4][PANEL];
  for (int64_t c = 0; c < PANEL; c += 8) {
    Eight half[2][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Eight m0 = get(m + j * stride + c), m1 = get(m + (4 + j) * stride + c), m2 = get(m + (8 + j) * stride + c),
                  m3 = get(m + (12 + j) * stride + c);
      half[0][j] = m0 + m1 + m2, half[1][j] = m1 - m2 + m3;
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const Eight* h = half[i];
      put(out[2 * i] + c, h[0] + h[1] + h[2]), put(out[2 * i + 1] + c, h[1] - h[2] + h[3]);
    }
  }
  for (int i = 0; i < 4; ++i)
    if (to[i]) std::copy_n(out[i], count, to[i]);
}

}  // namespace

void input_gradient(const float* up, const float* weight, const Shape& s, int64_t out, float* to) {
  const int64_t tiles_h = (s.h + 1) / 2, tiles_w = (s.w + 1) / 2, panels = (s.c + PANEL - 1) / PANEL;
  const int64_t height = 2 * tiles_h + 2, width = 2 * tiles_w + 2, size = height * width * out + 16;
  const int64_t lines = std::max<int64_t>(1, std::max<int64_t>(24, 2048 / out) / tiles_w);
  const int64_t block = lines * tiles_w, stride = block * out + 16, product_stride = (block + 6) * PANEL + 16;
  const int64_t pad_h = 2 - s.pad_h, pad_w = 2 - s.pad_w, units = s.n * tiles_h, blocks = (units + lines - 1) / lines;
  Buffer<float> weights(panels * 16 * out * PANEL);
  transform_weights(weight, out, s.c, weights.data);
  parallel(blocks, 1, [&](int64_t begin, int64_t end) {
    Buffer<float> image(size), gradients(16 * stride + 6 * out), products(16 * product_stride);
    std::fill_n(image.data, size, 0.0f);
    int64_t there = -1;
    for (int64_t first = begin * lines; first < std::min(units, end * lines); first += lines) {
      const int64_t rows = std::min(lines, units - first), tiles = rows * tiles_w;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t n = (first + r) / tiles_h, h = 2 * ((first + r) % tiles_h);
        for (int64_t i = 0; n != there && i < s.out_h; ++i)
          std::copy_n(up + (n * s.out_h + i) * s.out_w * out, s.out_w * out, image.data + ((i + pad_h) * width + pad_w) * out);
        there = n;
        for (int64_t t = 0; t < tiles_w; ++t)
          transform_input(image.data + (h * width + 2 * t) * out, width * out, out,
                          gradients.data + (r * tiles_w + t) * out, stride);
      }
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t count = std::min(PANEL, s.c - panel * PANEL);
        for (int64_t p = 0; p < 16; ++p) {
          const float *a = gradients.data + p * stride, *b = weights.data + (panel * 16 + p) * out * PANEL;
          float* m = products.data + p * product_stride;
          for (int64_t t = 0; t < tiles; t += 6) multiply<6>(a + t * out, out, b, out, m + t * PANEL);  // beyond: not read
        }
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t unit = first + t / tiles_w, n = unit / tiles_h, h = 2 * (unit % tiles_h), w = 2 * (t % tiles_w);
          float* corner = to + ((n * s.h + h) * s.w + w) * s.c + panel * PANEL;
          const bool down = h + 1 < s.h, right = w + 1 < s.w;
          float* places[4] = {corner, right ? corner + s.c : nullptr, down ? corner + s.w * s.c : nullptr,
                              down && right ? corner + (s.w + 1) * s.c : nullptr};
          transform_back(products.data + t * PANEL, product_stride, places, count);
        }
      }
    }
  });
}

}  // namespace lsquant
