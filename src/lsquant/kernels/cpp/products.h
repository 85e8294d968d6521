// Convolutions and linear layers over codes (products.cpp).  A linear layer is a 1x1 convolution of blocks of rows.
#pragma once
#include "common.h"

namespace lsquant {

struct Shape {
  int64_t n, c, h, w;  // input
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t out_h, out_w;
  int64_t scales;      // 1, or one per output channel
  bool channels_last;  // of input and output
};

struct InputGrid { float step, zero, q_min, q_max; };
struct WeightGrid {
  const float* step;
  int64_t steps, q_min, q_max;
};

// weights in the order in which they are read: [panel][word][16 outputs][`per` inputs], a word is 4 bytes of input
struct Packed {
  int64_t out, taps, channels, panels, padded, words, chain, per;
  bool wide = false;  // 16 bits a code
  Buffer<int8_t> codes{0};
  Buffer<int32_t> sum;
  Buffer<bool> bad;
  Packed(int64_t out, int64_t taps, int64_t channels, int64_t x_range, int64_t w_min, int64_t w_max);
};

// weight: (out, taps, channels), contiguous; x_range: q_max - q_min of the input
void pack(Type type, const void* weight, const WeightGrid&, Packed&);

// y = fl(fl(acc * scale) + bias), float32
void forward(Type type, const void* x, const Shape&, const InputGrid&, const Packed&, const float* scale, const float* bias, float* y);

// to: (out, taps, channels) float32, sum over windows of up * (code - z) * step
void weight_gradient(Type type, const void* x, const float* up, const Shape&, int64_t out, const InputGrid&, float* to);

// to: (n, h, w, c) float32 from up (n, out_h, out_w, out) and weight (out, 3, 3, c), dequantized.  3x3, stride 1, padding at
// most 2, `out` a multiple of 8.
void input_gradient(const float* up, const float* weight, const Shape&, int64_t out, float* to);

}  // namespace lsquant
