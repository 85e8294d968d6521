// From floats to codes in a buffer that stays in the cache, with the padding of a convolution.
#pragma once
#include "common.h"
#include "products.h"

namespace lsquant {

constexpr int64_t PANEL = 16;  // output channels that are multiplied at once

// shifted codes of n values that lie together; returns whether one is NaN or infinite.  A code that would be NaN is q_min,
// as no integer is NaN: who asks for integers makes the outputs NaN that such a value feeds.
template <class T, class C>
inline bool codes_of(const T* x, C* to, int64_t n, const InputGrid& q, float shift) {
  int32_t bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float v = load(x[i]);
    float code = rounded(v / q.step) + q.zero;
    code = code > q.q_min ? code : q.q_min;
    code = code < q.q_max ? code : q.q_max;
    bad |= v - v == 0.0f ? 0 : 1;
    if constexpr (std::is_same_v<C, float>) to[i] = v - v == 0.0f ? code - shift : __builtin_nanf("");
    else to[i] = C(int32_t(code - shift));
  }
  return bad != 0;
}

// one image into `to`, rows of `width` pixels of `channels` each, behind the padding; both are at least what is needed
template <class T, class C>
inline bool quantize_image(const T* x, C* to, C* scratch, const Shape& s, int64_t width, int64_t channels, const InputGrid& q,
                           float shift) {
  const int64_t row = width * channels;
  bool bad = false;
  for (int64_t h = 0; h < s.h; ++h) {
    C* place = to + (h + s.pad_h) * row + s.pad_w * channels;
    if (s.channels_last && channels == s.c) {
      bad |= codes_of(x + h * s.w * s.c, place, s.w * s.c, q, shift);
      continue;
    }
    if (s.channels_last) {
      bad |= codes_of(x + h * s.w * s.c, scratch, s.w * s.c, q, shift);
      for (int64_t w = 0; w < s.w; ++w) std::copy_n(scratch + w * s.c, s.c, place + w * channels);
      continue;
    }
    for (int64_t c = 0; c < s.c; ++c) bad |= codes_of(x + (c * s.h + h) * s.w, scratch + c * s.w, s.w, q, shift);
    for (int64_t w = 0; w < s.w; ++w)
      for (int64_t c = 0; c < s.c; ++c) place[w * channels + c] = scratch[c * s.w + w];
  }
  return bad;
}

}  // namespace lsquant
