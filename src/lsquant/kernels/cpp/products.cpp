// Convolution and linear layers over codes: the exact integer sums.
//
// An image is quantized into 8-bit codes in a buffer that stays in the cache, with its padding, and multiplied
// from there.  Codes are shifted to start at 0 (u8); the shift times the sum of the weights is taken off the int32 sum.
// Without a dot-product instruction u8 x s8 pairs are added in int16 first, at most `chain` of them, so that nothing
// saturates; weights whose pairs would are split, w = 2 (w >> 1) + (w & 1), and multiplied in two passes.
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

struct Run { int64_t offset, words; };  // bytes from a window's first; 4-byte words that lie together

// ---- integer sums of MR windows with one panel ----

#if defined(__AVX2__)

struct Sums { __m256i v[4][2]; };

template <int MR>
inline void tile(const uint8_t* base, int64_t pixel, const std::vector<Run>& runs, const int8_t* panel, int64_t chain,
                 Sums& sums) {
#if defined(LSQUANT_VNNI)
  for (const Run& run : runs) {
    const uint8_t* p = base + run.offset;
    for (int64_t k = 0; k < run.words; ++k, p += 4, panel += 4 * PANEL) {
      const __m256i b0 = _mm256_load_si256((const __m256i*)panel), b1 = _mm256_load_si256((const __m256i*)(panel + 32));
      for (int m = 0; m < MR; ++m) {
        int32_t word;
        std::memcpy(&word, p + m * pixel, 4);
        const __m256i a = _mm256_set1_epi32(word);
        sums.v[m][0] = _mm256_dpbusd_epi32(sums.v[m][0], a, b0);
        sums.v[m][1] = _mm256_dpbusd_epi32(sums.v[m][1], a, b1);
      }
    }
  }
  (void)chain;
#else
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i pairs[MR][2];
  for (int m = 0; m < MR; ++m) pairs[m][0] = pairs[m][1] = _mm256_setzero_si256();
  int64_t left = chain;
  for (const Run& run : runs) {
    const uint8_t* p = base + run.offset;
    for (int64_t k = 0; k < run.words;) {
      const int64_t end = std::min(run.words, k + left);
      left -= end - k;
      for (; k < end; ++k, p += 4, panel += 4 * PANEL) {
        const __m256i b0 = _mm256_load_si256((const __m256i*)panel), b1 = _mm256_load_si256((const __m256i*)(panel + 32));
#pragma GCC unroll 4
        for (int m = 0; m < MR; ++m) {
          int32_t word;
          std::memcpy(&word, p + m * pixel, 4);
          const __m256i a = _mm256_set1_epi32(word);
          pairs[m][0] = _mm256_add_epi16(pairs[m][0], _mm256_maddubs_epi16(a, b0));
          pairs[m][1] = _mm256_add_epi16(pairs[m][1], _mm256_maddubs_epi16(a, b1));
        }
      }
      if (left) continue;
      left = chain;
      for (int m = 0; m < MR; ++m)
        for (int i = 0; i < 2; ++i) {
          sums.v[m][i] = _mm256_add_epi32(sums.v[m][i], _mm256_madd_epi16(pairs[m][i], ones));
          pairs[m][i] = _mm256_setzero_si256();
        }
    }
  }
  for (int m = 0; m < MR; ++m)
    for (int i = 0; i < 2; ++i) sums.v[m][i] = _mm256_add_epi32(sums.v[m][i], _mm256_madd_epi16(pairs[m][i], ones));
#endif
}

inline void clear(Sums& s) { std::memset(&s, 0, sizeof s); }
inline void twice(Sums& s) {
  for (auto& row : s.v)
    for (auto& v : row) v = _mm256_slli_epi32(v, 1);
}
inline void read(const Sums& s, int m, int32_t* to) { std::memcpy(to, s.v[m], sizeof s.v[m]); }

#else

struct Sums { int32_t v[4][PANEL]; };

template <int MR>
inline void tile(const uint8_t* base, int64_t pixel, const std::vector<Run>& runs, const int8_t* panel, int64_t, Sums& sums) {
  for (const Run& run : runs)
    for (int64_t k = 0; k < run.words; ++k, panel += 4 * PANEL)
      for (int m = 0; m < MR; ++m)
        for (int64_t o = 0; o < PANEL; ++o)
          for (int64_t i = 0; i < 4; ++i)
            sums.v[m][o] += int32_t(base[run.offset + 4 * k + m * pixel + i]) * panel[4 * o + i];
}

inline void clear(Sums& s) { std::memset(&s, 0, sizeof s); }
inline void twice(Sums& s) {
  for (auto& row : s.v)
    for (auto& v : row) v *= 2;
}
inline void read(const Sums& s, int m, int32_t* to) { std::memcpy(to, s.v[m], sizeof s.v[m]); }

#endif

}  // namespace

// ---- weights ----

Packed::Packed(int64_t out, int64_t taps, int64_t channels)
    : out(out), taps(taps), channels(channels), padded((channels + 3) / 4 * 4), panels((out + PANEL - 1) / PANEL),
      words(taps * padded / 4), high(panels * words * 4 * PANEL), low(0), sum(panels * PANEL), bad(panels * PANEL) {}

void pack(Type type, const void* weight, const WeightGrid& q, int64_t x_range, Packed& p) {
  const int64_t top = std::max(-q.q_min, q.q_max), pair = 2 * x_range * top;
#if !defined(LSQUANT_VNNI)
  p.split = pair > INT16_MAX;
#endif
  p.chain = p.split ? INT16_MAX / (x_range * (top + 1)) : INT16_MAX / std::max<int64_t>(1, pair);
  p.low_chain = INT16_MAX / (2 * x_range);
  p.chain = std::max<int64_t>(1, p.chain);
  if (p.split) p.low = Buffer<int8_t>(p.panels * p.words * 4 * PANEL);
  const int64_t row = p.taps * p.channels;
  auto rows = [&](auto tag) {
    using T = decltype(tag);
    const T* from = static_cast<const T*>(weight);
    parallel(p.panels, std::max<int64_t>(1, 16384 / (row * PANEL)), [&](int64_t begin, int64_t end) {
      std::vector<float> codes(row);
      for (int64_t panel = begin; panel < end; ++panel) {
        int8_t* high = p.high.data + panel * p.words * 4 * PANEL;
        int8_t* low = p.split ? p.low.data + panel * p.words * 4 * PANEL : nullptr;
        std::memset(high, 0, p.words * 4 * PANEL);
        if (low) std::memset(low, 0, p.words * 4 * PANEL);
        for (int64_t lane = 0; lane < PANEL; ++lane) {
          const int64_t o = panel * PANEL + lane;
          p.sum.data[o] = 0, p.bad.data[o] = false;
          if (o >= p.out) continue;
          const InputGrid grid{q.step[q.steps == 1 ? 0 : o], 0.0f, float(q.q_min), float(q.q_max)};
          p.bad.data[o] = codes_of(from + o * row, codes.data(), row, grid, 0.0f);
          int32_t sum = 0;
          for (int64_t tap = 0; tap < p.taps; ++tap)
            for (int64_t c = 0; c < p.channels; ++c) {
              const int32_t code = p.bad.data[o] ? 0 : int32_t(codes[tap * p.channels + c]);
              const int64_t k = tap * p.padded + c, place = (k / 4 * PANEL + lane) * 4 + k % 4;
              high[place] = int8_t(low ? code >> 1 : code);
              if (low) low[place] = int8_t(code & 1);
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

void forward(Type type, const void* x, const Shape& s, const InputGrid& q, const Packed& p, const float* scale, const float* bias,
             float* y) {
  const int64_t channels = p.padded, height = s.h + 2 * s.pad_h, width = s.w + 2 * s.pad_w, pixels = s.out_h * s.out_w;
  const int64_t size = height * width * channels, pixel = s.stride_w * channels;
  const int32_t zero = int32_t(q.zero - q.q_min);  // what a value of 0 is after the shift
  std::vector<Run> runs;
  for (int64_t kh = 0; kh < s.kernel_h; ++kh) {
    const int64_t offset = kh * s.dilation_h * width * channels;
    if (s.dilation_w == 1) runs.push_back({offset, s.kernel_w * channels / 4});
    else
      for (int64_t kw = 0; kw < s.kernel_w; ++kw) runs.push_back({offset + kw * s.dilation_w * channels, channels / 4});
  }
  std::vector<float> scales(p.panels * PANEL, 0.0f), biases(p.panels * PANEL, 0.0f);
  std::vector<int32_t> corrections(p.panels * PANEL, 0);
  for (int64_t o = 0; o < p.out; ++o) {
    scales[o] = p.bad.data[o] ? __builtin_nanf("") : scale[s.scales == 1 ? 0 : o];
    biases[o] = bias ? bias[o] : 0.0f;
    corrections[o] = zero * p.sum.data[o];
  }
  const int64_t image_in = s.c * s.h * s.w, image_out = pixels * p.out;
  // few images: the panels are shared out as well
  const int64_t shares = s.n >= 16 ? 1 : std::min<int64_t>(p.panels, (16 + s.n - 1) / s.n);

  auto images = [&](auto tag) {
    using T = decltype(tag);
    parallel(s.n * shares, std::max<int64_t>(1, 4096 / (pixels * p.words + 1)), [&](int64_t begin, int64_t end) {
      Buffer<uint8_t> buffer(size + 64), scratch(s.w * s.c + 64);
      Buffer<float> transposed(s.channels_last ? 0 : pixels * PANEL);
      std::memset(buffer.data, zero, size + 64);
      int64_t there = -1;
      bool bad = false;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / shares, share = task % shares;
        if (n != there)
          bad = quantize_image(static_cast<const T*>(x) + n * image_in, buffer.data, scratch.data, s, width, channels, q, q.q_min);
        there = n;
        for (int64_t panel = share * p.panels / shares; panel < (share + 1) * p.panels / shares; ++panel) {
          const int64_t first = panel * PANEL, count = std::min(PANEL, p.out - first);
          const int8_t* high = p.high.data + panel * p.words * 4 * PANEL;
          const int8_t* low = p.split ? p.low.data + panel * p.words * 4 * PANEL : nullptr;
          for (int64_t oh = 0; oh < s.out_h; ++oh) {
            const uint8_t* line = buffer.data + oh * s.stride_h * width * channels;
            for (int64_t ow = 0; ow < s.out_w; ow += 4) {
              const int mr = int(std::min<int64_t>(4, s.out_w - ow));
              const uint8_t* base = line + ow * pixel;
              Sums sums;
              clear(sums);
              auto multiply = [&](const int8_t* weights, int64_t chain) {
                if (mr == 4) tile<4>(base, pixel, runs, weights, chain, sums);
                else
                  for (int m = 0; m < mr; ++m) {
                    Sums one;
                    std::memcpy(&one.v[0], &sums.v[m], sizeof one.v[0]);
                    tile<1>(base + m * pixel, pixel, runs, weights, chain, one);
                    std::memcpy(&sums.v[m], &one.v[0], sizeof one.v[0]);
                  }
              };
              multiply(high, p.chain);
              if (low) {
                twice(sums);
                multiply(low, p.low_chain);
              }
              for (int m = 0; m < mr; ++m) {
                alignas(64) int32_t acc[PANEL];
                alignas(64) float out[PANEL];
                read(sums, m, acc);
                for (int64_t o = 0; o < PANEL; ++o) out[o] = float(acc[o] - corrections[first + o]) * scales[first + o];
                if (bias)
                  for (int64_t o = 0; o < PANEL; ++o) out[o] += biases[first + o];
                if (bad) std::fill_n(out, PANEL, __builtin_nanf(""));
                const int64_t place = oh * s.out_w + ow + m;
                if (!s.channels_last) std::memcpy(transposed.data + place * PANEL, out, sizeof out);
                else if (count == PANEL) std::memcpy(y + n * image_out + place * p.out + first, out, sizeof out);
                else std::copy_n(out, count, y + n * image_out + place * p.out + first);
              }
            }
          }
          if (!s.channels_last)
            for (int64_t o = 0; o < count; ++o)
              for (int64_t i = 0; i < pixels; ++i) y[n * image_out + (first + o) * pixels + i] = transposed.data[i * PANEL + o];
        }
      }
    });
  };
  type == Type::f32 ? images(float{}) : type == Type::bf16 ? images(bf16{}) : images(f16{});
}

}  // namespace lsquant
