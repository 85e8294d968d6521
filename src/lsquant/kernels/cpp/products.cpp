// Convolution and linear layers over codes: the exact integer sums.
//
// An image is quantized into codes in a buffer that stays in the cache, with its padding, and multiplied from there.
// Codes are shifted to start at 0; the shift times the sum of the weights is taken off the int32 sum.  Codes of 8 bits are
// multiplied four at a time (u8 x s8), and without a dot-product instruction their pairs are added in int16 first, at most
// `chain` of them, so that nothing saturates.  Where a single pair would, codes and weights are `wide`: 16 bits each.
#include "common.h"
#include "products.h"
#include "codes.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define LSQUANT_VNNI 1
#endif

namespace lsquant {
namespace {

constexpr int64_t WORD = 4 * PANEL;  // bytes of weights that meet 4 bytes of input
struct Run { int64_t offset, words; };  // codes from a window's first; 4-byte words that lie together
typedef int32_t Ints __attribute__((vector_size(32)));
typedef float Floats __attribute__((vector_size(32)));

// ---- integer sums of MR windows with one panel ----

#if defined(__AVX2__)

inline __m256i everywhere(const void* word) { return _mm256_castps_si256(_mm256_broadcast_ss(static_cast<const float*>(word))); }
inline __m256i widened(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

template <int MR>
inline void tile(const uint8_t* base, int64_t pixel, const std::vector<Run>& runs, const int8_t* panel, int64_t chain,
                 Ints (*to)[2]) {
  __m256i sums[MR][2], pairs[MR][2];
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) sums[m][0] = sums[m][1] = pairs[m][0] = pairs[m][1] = _mm256_setzero_si256();
  int64_t left = chain;
  for (const Run& run : runs) {
    const uint8_t* p = base + run.offset;
    for (int64_t k = 0; k < run.words;) {
      const int64_t end = std::min(run.words, k + left);
      left -= end - k;
      for (; k < end; ++k, p += 4, panel += WORD) {
        const __m256i b0 = _mm256_load_si256((const __m256i*)panel), b1 = _mm256_load_si256((const __m256i*)(panel + 32));
#pragma GCC unroll 4
        for (int m = 0; m < MR; ++m) {
          const __m256i a = everywhere(p + m * pixel);
#if defined(LSQUANT_VNNI)
          sums[m][0] = _mm256_dpbusd_epi32(sums[m][0], a, b0), sums[m][1] = _mm256_dpbusd_epi32(sums[m][1], a, b1);
#else
          pairs[m][0] = _mm256_add_epi16(pairs[m][0], _mm256_maddubs_epi16(a, b0));
          pairs[m][1] = _mm256_add_epi16(pairs[m][1], _mm256_maddubs_epi16(a, b1));
#endif
        }
      }
      if (left) continue;
      left = chain;
#pragma GCC unroll 4
      for (int m = 0; m < MR; ++m)
        for (int i = 0; i < 2; ++i)
          sums[m][i] = _mm256_add_epi32(sums[m][i], widened(pairs[m][i])), pairs[m][i] = _mm256_setzero_si256();
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m)
    for (int i = 0; i < 2; ++i) to[m][i] = (Ints)_mm256_add_epi32(sums[m][i], widened(pairs[m][i]));
}

template <int MR>
inline void tile(const int16_t* base, int64_t pixel, const std::vector<Run>& runs, const int8_t* panel, int64_t, Ints (*to)[2]) {
  __m256i sums[MR][2];
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) sums[m][0] = sums[m][1] = _mm256_setzero_si256();
  for (const Run& run : runs) {
    const int16_t* p = base + run.offset;
    for (int64_t k = 0; k < run.words; ++k, p += 2, panel += WORD) {
      const __m256i b0 = _mm256_load_si256((const __m256i*)panel), b1 = _mm256_load_si256((const __m256i*)(panel + 32));
#pragma GCC unroll 4
      for (int m = 0; m < MR; ++m) {
        const __m256i a = everywhere(p + m * pixel);
        sums[m][0] = _mm256_add_epi32(sums[m][0], _mm256_madd_epi16(a, b0));
        sums[m][1] = _mm256_add_epi32(sums[m][1], _mm256_madd_epi16(a, b1));
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) to[m][0] = (Ints)sums[m][0], to[m][1] = (Ints)sums[m][1];
}

#else

template <int MR, class C>
inline void tile(const C* base, int64_t pixel, const std::vector<Run>& runs, const int8_t* bytes, int64_t, Ints (*to)[2]) {
  constexpr int64_t per = 4 / sizeof(C);
  using W = std::conditional_t<sizeof(C) == 1, int8_t, int16_t>;
  const W* panel = reinterpret_cast<const W*>(bytes);
  int32_t sums[MR][PANEL] = {};
  for (const Run& run : runs)
    for (int64_t k = 0; k < run.words; ++k, panel += per * PANEL)
      for (int m = 0; m < MR; ++m)
        for (int64_t o = 0; o < PANEL; ++o)
          for (int64_t i = 0; i < per; ++i)
            sums[m][o] += int32_t(base[run.offset + per * k + m * pixel + i]) * panel[per * o + i];
  std::memcpy(to, sums, sizeof sums);
}

#endif

}  // namespace

// ---- weights ----

Packed::Packed(int64_t out, int64_t taps, int64_t channels, int64_t x_range, int64_t w_min, int64_t w_max)
    : out(out), taps(taps), channels(channels), panels((out + PANEL - 1) / PANEL), sum(panels * PANEL), bad(panels * PANEL) {
  const int64_t pair = 2 * x_range * std::max(-w_min, w_max);
#if !defined(LSQUANT_VNNI)
  wide = pair > INT16_MAX;
#endif
  chain = std::max<int64_t>(1, INT16_MAX / std::max<int64_t>(1, pair));
  per = wide ? 2 : 4;
  padded = (channels + per - 1) / per * per;
  words = taps * padded / per;
  codes = Buffer<int8_t>(panels * words * WORD);
}

void pack(Type type, const void* weight, const WeightGrid& q, Packed& p) {
  const int64_t row = p.taps * p.channels;
  auto rows = [&](auto tag) {
    using T = decltype(tag);
    const T* from = static_cast<const T*>(weight);
    parallel(p.panels, std::max<int64_t>(1, 16384 / (row * PANEL)), [&](int64_t begin, int64_t end) {
      std::vector<float> codes(row);
      for (int64_t panel = begin; panel < end; ++panel) {
        int8_t* narrow = p.codes.data + panel * p.words * WORD;
        int16_t* wide = reinterpret_cast<int16_t*>(narrow);
        std::memset(narrow, 0, p.words * WORD);
        for (int64_t lane = 0; lane < PANEL; ++lane) {
          const int64_t o = panel * PANEL + lane;
          p.sum.data[o] = 0, p.bad.data[o] = false;
          if (o >= p.out) continue;
          const InputGrid grid{q.step[q.steps == 1 ? 0 : o], 0.0f, float(q.q_min), float(q.q_max)};
          p.bad.data[o] = codes_of(from + o * row, codes.data(), row, grid, 0.0f);
          if (p.bad.data[o]) continue;
          int32_t sum = 0;
          for (int64_t tap = 0; tap < p.taps; ++tap)
            for (int64_t c = 0; c < p.channels; ++c) {
              const int32_t code = int32_t(codes[tap * p.channels + c]);
              const int64_t k = tap * p.padded + c, place = (k / p.per * PANEL + lane) * p.per + k % p.per;
              if (p.wide) wide[place] = int16_t(code);
              else narrow[place] = int8_t(code);
              sum += code;
            }
          p.sum.data[o] = sum;
        }
      }
    });
  };
  type == Type::f32 ? rows(float{}) : type == Type::bf16 ? rows(bf16{}) : rows(f16{});
}

// ---- forward ----

namespace {

struct Finish { Floats scale[2], bias[2]; Ints correction[2]; };  // of one panel

// which windows of an image hold a value that is NaN or infinite; only their outputs are NaN
template <class T>
std::vector<uint8_t> bad_windows(const T* x, const Shape& s) {
  std::vector<uint8_t> pixels(s.h * s.w), windows(s.out_h * s.out_w);
  for (int64_t i = 0; i < s.c * s.h * s.w; ++i)
    if (const float v = load(x[i]); v - v != 0.0f) pixels[s.channels_last ? i / s.c : i % (s.h * s.w)] = 1;
  for (int64_t i = 0; i < s.out_h * s.out_w; ++i)
    for (int64_t tap = 0; tap < s.kernel_h * s.kernel_w; ++tap) {
      const int64_t h = i / s.out_w * s.stride_h + tap / s.kernel_w * s.dilation_h - s.pad_h;
      const int64_t w = i % s.out_w * s.stride_w + tap % s.kernel_w * s.dilation_w - s.pad_w;
      if (h >= 0 && h < s.h && w >= 0 && w < s.w) windows[i] |= pixels[h * s.w + w];
    }
  return windows;
}

template <class T, class C>
void forward_as(const T* x, const Shape& s, const InputGrid& q, const Packed& p, const float* scale, const float* bias, float* y) {
  const int64_t channels = p.padded, height = s.h + 2 * s.pad_h, width = s.w + 2 * s.pad_w, pixels = s.out_h * s.out_w;
  const int64_t size = height * width * channels, pixel = s.stride_w * channels;
  const int32_t zero = q.zero == q.zero ? int32_t(q.zero - q.q_min) : 0;  // what a value of 0 is after the shift
  std::vector<Run> runs;
  for (int64_t kh = 0; kh < s.kernel_h; ++kh) {
    const int64_t offset = kh * s.dilation_h * width * channels;
    if (s.dilation_w == 1) runs.push_back({offset, s.kernel_w * channels / p.per});
    else
      for (int64_t kw = 0; kw < s.kernel_w; ++kw) runs.push_back({offset + kw * s.dilation_w * channels, channels / p.per});
  }
  Buffer<Finish> finish(p.panels);
  for (int64_t o = 0; o < p.panels * PANEL; ++o) {
    Finish& f = finish.data[o / PANEL];
    const int64_t i = o % PANEL / 8, lane = o % 8;
    const bool there = o < p.out;
    f.scale[i][lane] = !there ? 0.0f : p.bad.data[o] ? __builtin_nanf("") : scale[s.scales == 1 ? 0 : o];
    f.bias[i][lane] = there && bias ? bias[o] : 0.0f;
    f.correction[i][lane] = zero * p.sum.data[o];
  }
  const int64_t image_in = s.c * s.h * s.w, image_out = pixels * p.out;
  // few images: the panels are shared out as well
  const int64_t shares = s.n >= 16 ? 1 : std::min<int64_t>(p.panels, (16 + s.n - 1) / s.n);
  parallel(s.n * shares, std::max<int64_t>(1, 4096 / (pixels * p.words + 1)), [&](int64_t begin, int64_t end) {
    Buffer<C> buffer(size + 64), scratch(s.w * s.c + 64);
    Buffer<float> transposed(s.channels_last ? 0 : pixels * PANEL);
    std::fill_n(buffer.data, size + 64, C(zero));
    int64_t there = -1;
    bool bad = false;
    std::vector<uint8_t> windows;  // of a bad image
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / shares, share = task % shares;
      if (n != there) {
        bad = quantize_image(x + n * image_in, buffer.data, scratch.data, s, width, channels, q, q.q_min);
        if (bad) windows = bad_windows(x + n * image_in, s);
      }
      there = n;
      for (int64_t panel = share * p.panels / shares; panel < (share + 1) * p.panels / shares; ++panel) {
        const int64_t first = panel * PANEL, count = std::min(PANEL, p.out - first);
        const int64_t out_pixel = s.channels_last ? p.out : PANEL;
        const int8_t* weights = p.codes.data + panel * p.words * WORD;
        const Finish f = finish.data[panel];
        float* to = s.channels_last ? y + n * image_out + first : transposed.data;
        for (int64_t oh = 0; oh < s.out_h; ++oh) {
          const C* base = buffer.data + oh * s.stride_h * width * channels;
          for (int64_t ow = 0; ow < s.out_w; ow += 4, base += 4 * pixel) {
            const int64_t mr = std::min<int64_t>(4, s.out_w - ow);
            Ints sums[4][2];
            if (mr == 4) tile<4>(base, pixel, runs, weights, p.chain, sums);
            else if (mr == 3) tile<3>(base, pixel, runs, weights, p.chain, sums);
            else if (mr == 2) tile<2>(base, pixel, runs, weights, p.chain, sums);
            else tile<1>(base, pixel, runs, weights, p.chain, sums);
            for (int64_t m = 0; m < mr; ++m, to += out_pixel) {
              Floats out[2];
              for (int i = 0; i < 2; ++i) {
                out[i] = __builtin_convertvector(sums[m][i] - f.correction[i], Floats) * f.scale[i];
                if (bias) out[i] += f.bias[i];
                if (bad && windows[oh * s.out_w + ow + m]) out[i] = Floats{} + __builtin_nanf("");
              }
              if (out_pixel == PANEL || count == PANEL) std::memcpy(to, out, sizeof out);
              else std::memcpy(to, out, count * sizeof(float));
            }
          }
        }
        if (s.channels_last) continue;
        for (int64_t o = 0; o < count; ++o)
          for (int64_t i = 0; i < pixels; ++i) y[n * image_out + (first + o) * pixels + i] = transposed.data[i * PANEL + o];
      }
    }
  });
}

}  // namespace

void forward(Type type, const void* x, const Shape& s, const InputGrid& q, const Packed& p, const float* scale, const float* bias,
             float* y) {
  auto images = [&](auto tag) {
    const auto* from = static_cast<const decltype(tag)*>(x);
    if (p.wide) forward_as<decltype(tag), int16_t>(from, s, q, p, scale, bias, y);
    else forward_as<decltype(tag), uint8_t>(from, s, q, p, scale, bias, y);
  };
  type == Type::f32 ? images(float{}) : type == Type::bf16 ? images(bf16{}) : images(f16{});
}

}  // namespace lsquant
