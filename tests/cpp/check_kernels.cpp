// The arithmetic of the C++ engine against plain loops, without PyTorch: for instruction sets that the tests' machine has
// only through an emulator.  Prints what differs; returns how many cases did.  tests/test_instruction_sets.py builds it.
#include <cstdio>
#include <random>

#include "common.h"
#include "products.h"

using namespace lsquant;

extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*f)(int64_t, int64_t, void*), void* ctx) {
  const int64_t part = std::max(grain, (end - begin + 2) / 3);  // three shares, one after the other
  for (int64_t b = begin; b < end; b += part) f(b, std::min(end, b + part), ctx);
  return 0;
}

namespace {

int failures = 0;
std::mt19937 generator(0);
std::normal_distribution<float> normal;

bool same(float a, float b) { return a == b || (a != a && b != b); }
void expect(bool right, const char* what, int64_t a, int64_t b, int64_t c) {
  if (right) return;
  ++failures;
  std::printf("differs: %s, %ld %ld %ld\n", what, long(a), long(b), long(c));
}

template <class T>
std::vector<T> numbers(int64_t n, float scale, bool special) {
  std::vector<T> v(n);
  for (auto& x : v) store(&x, normal(generator) * scale);
  for (int64_t i = 0; special && i < n; i += 37) {  // ties, bounds, denormals, infinities, NaN
    const float odd[] = {0.5f, -1.5f, 2.0f, -2.0f, 1e-41f, -0.0f, 1e30f, INFINITY, -INFINITY, NAN};
    store(&v[i], odd[i / 37 % 10]);
  }
  return v;
}

float code_of(float v, float step, float zero, float low, float high) {
  return std::min(high, std::max(low, std::nearbyint(v / step) + zero));
}

template <class T>
void quantizer(Type type, const Layout& l, bool learned) {
  const int64_t n = l.outer * l.steps * l.inner;
  const float low = -4, high = 3;
  auto x = numbers<T>(n, 1.0f, true), up = numbers<T>(n, 1.0f, false);
  std::vector<T> y(n), grad(n);
  std::vector<float> step(l.steps), zero(l.steps);
  for (int64_t i = 0; i < l.steps; ++i) step[i] = 0.5f + 0.01f * float(i % 7), zero[i] = learned ? float(i % 3) - 1 : 0.0f;
  const Grid g{step.data(), zero.data(), low, high, learned};
  std::vector<double> by_step(l.steps), by_offset(l.steps), wanted_step(l.steps), wanted_offset(l.steps), size(l.steps);
  quantize(type, x.data(), y.data(), l, g);
  bool right = true, right_grad = true;
  auto finite = x;
  for (auto& v : finite)
    if (!std::isfinite(load(v))) store(&v, 0.25f);  // for the sums
  quantize_backward(type, up.data(), type, finite.data(), type, grad.data(), l, g, by_step.data(), by_offset.data());
  for (int64_t i = 0; i < n; ++i) {
    const int64_t k = i / l.inner % l.steps;
    const float v = load(x[i]), z = zero[k], s = step[k];
    T wanted;
    store(&wanted, std::isfinite(v) ? (code_of(v, s, z, low, high) - z) * s : NAN);
    right &= same(load(y[i]), load(wanted));
    const float f = load(finite[i]), vs = f / s, u = load(up[i]);
    const bool in = vs > low - z && vs < high - z;
    right_grad &= load(grad[i]) == (in ? u : 0.0f);
    const float term = in ? std::nearbyint(vs) - vs : vs <= low - z ? (learned ? low : low - z) : (learned ? high : high - z);
    wanted_step[k] += double(term) * u, size[k] += std::abs(double(term) * u), wanted_offset[k] += in ? 0.0 : u;
  }
  const int64_t kind = int64_t(type) * 10 + learned;
  expect(right, "quantize", kind, l.steps, l.inner);
  expect(right_grad, "the input's gradient of a quantizer", kind, l.steps, l.inner);
  for (int64_t k = 0; k < l.steps; ++k) {
    expect(std::abs(by_step[k] - wanted_step[k]) <= 1e-5 * (size[k] + 1), "a step's gradient", kind, l.steps, k);
    expect(!learned || std::abs(by_offset[k] - wanted_offset[k]) <= 1e-5 * (size[k] + 100), "an offset's gradient", kind, l.steps, k);
  }
}

struct Case { int64_t n, c, h, out, kernel, stride, pad, dilation, x_bits, w_bits; bool last, bias; };

void convolution(const Case& t) {
  Shape s{t.n, t.c, t.h, t.h + 1, t.kernel, t.kernel, t.stride, t.stride, t.pad, t.pad, t.dilation, t.dilation, 0, 0, t.out, t.last};
  s.out_h = (s.h + 2 * t.pad - t.dilation * (t.kernel - 1) - 1) / t.stride + 1;
  s.out_w = (s.w + 2 * t.pad - t.dilation * (t.kernel - 1) - 1) / t.stride + 1;
  const int64_t taps = t.kernel * t.kernel, w_high = (int64_t(1) << (t.w_bits - 1)) - 1;
  const InputGrid q{0.1f, 2.0f, 0.0f, float((1 << t.x_bits) - 1)};
  auto x = numbers<float>(s.n * s.c * s.h * s.w, 0.1f * q.q_max / 3, false), w = numbers<float>(t.out * taps * t.c, 0.1f * float(w_high + 1), false);
  auto scale = numbers<float>(t.out, 1.0f, false), bias = numbers<float>(t.out, 1.0f, false);
  x[0] = 1e6f, w[0] = -1e6f;
  std::vector<float> steps(t.out, 0.2f), y(s.n * t.out * s.out_h * s.out_w), up = numbers<float>(int64_t(y.size()), 1.0f, false);
  Packed p(t.out, taps, t.c, int64_t(q.q_max), -w_high - 1, w_high);
  pack(Type::f32, w.data(), {steps.data(), t.out, -w_high - 1, w_high}, p);
  forward(Type::f32, x.data(), s, q, p, scale.data(), t.bias ? bias.data() : nullptr, y.data());
  auto in = [&](int64_t n, int64_t c, int64_t h, int64_t w) {
    return t.last ? ((n * s.h + h) * s.w + w) * s.c + c : ((n * s.c + c) * s.h + h) * s.w + w;
  };
  auto to = [&](int64_t n, int64_t o, int64_t h, int64_t w) {
    return t.last ? ((n * s.out_h + h) * s.out_w + w) * t.out + o : ((n * t.out + o) * s.out_h + h) * s.out_w + w;
  };
  bool right = true;
  std::vector<double> gradient(t.out * taps * t.c);
  for (int64_t n = 0; n < s.n; ++n)
    for (int64_t o = 0; o < t.out; ++o)
      for (int64_t h = 0; h < s.out_h; ++h)
        for (int64_t v = 0; v < s.out_w; ++v) {
          int64_t sum = 0;
          for (int64_t k = 0; k < taps; ++k) {
            const int64_t a = h * t.stride + k / t.kernel * t.dilation - t.pad, b = v * t.stride + k % t.kernel * t.dilation - t.pad;
            if (a < 0 || b < 0 || a >= s.h || b >= s.w) continue;
            for (int64_t c = 0; c < t.c; ++c) {
              const int64_t code = int64_t(code_of(x[in(n, c, a, b)], q.step, q.zero, q.q_min, q.q_max) - q.zero);
              sum += code * int64_t(code_of(w[(o * taps + k) * t.c + c], 0.2f, 0.0f, float(-w_high - 1), float(w_high)));
              gradient[(o * taps + k) * t.c + c] += double(up[to(n, o, h, v)]) * double(code) * q.step;
            }
          }
          volatile float product = float(sum) * scale[o];
          right &= y[to(n, o, h, v)] == (t.bias ? product + bias[o] : product);
        }
  expect(right, "convolution", t.c, t.out, t.x_bits * 100 + t.w_bits);
  std::vector<float> by_weight(gradient.size());
  weight_gradient(Type::f32, x.data(), up.data(), s, t.out, q, by_weight.data());
  double error = 0, largest = 0;
  for (size_t i = 0; i < gradient.size(); ++i)
    error = std::max(error, std::abs(gradient[i] - by_weight[i])), largest = std::max(largest, std::abs(gradient[i]));
  expect(error <= 4e-5 * largest, "the weight's gradient", t.c, t.out, t.kernel);
  if (t.kernel != 3 || t.stride != 1 || t.dilation != 1 || !t.last || t.out % 8) return;
  std::vector<float> by_input(x.size());
  input_gradient(up.data(), w.data(), s, t.out, by_input.data());
  std::vector<double> wanted(x.size());
  for (int64_t n = 0; n < s.n; ++n)
    for (int64_t o = 0; o < t.out; ++o)
      for (int64_t h = 0; h < s.out_h; ++h)
        for (int64_t v = 0; v < s.out_w; ++v)
          for (int64_t k = 0; k < 9; ++k) {
            const int64_t a = h + k / 3 - t.pad, b = v + k % 3 - t.pad;
            for (int64_t c = 0; a >= 0 && b >= 0 && a < s.h && b < s.w && c < t.c; ++c)
              wanted[in(n, c, a, b)] += double(up[to(n, o, h, v)]) * w[(o * 9 + k) * t.c + c];
          }
  error = largest = 0;
  for (size_t i = 0; i < wanted.size(); ++i)
    error = std::max(error, std::abs(wanted[i] - by_input[i])), largest = std::max(largest, std::abs(wanted[i]));
  expect(error <= 8e-6 * largest, "the input's gradient", t.c, t.out, t.pad);
}

}  // namespace

int main() {
  for (const Layout& l : {Layout{1, 1, 10007}, {3, 5, 700}, {301, 9, 1}, {40, 3, 13}, {1, 64, 32}, {0, 3, 4}})
    for (bool learned : {false, true}) {
      quantizer<float>(Type::f32, l, learned);
      quantizer<bf16>(Type::bf16, l, learned);
      quantizer<f16>(Type::f16, l, learned);
    }
  for (bool last : {true, false})
    for (auto [x_bits, w_bits] : {std::pair<int64_t, int64_t>{4, 4}, {2, 2}, {8, 8}, {8, 7}, {5, 3}})
      for (bool bias : {false, true}) {
        convolution({2, 16, 7, 24, 3, 1, 1, 1, x_bits, w_bits, last, bias});
        convolution({3, 5, 9, 19, 3, 2, 1, 1, x_bits, w_bits, last, bias});
        convolution({1, 7, 8, 16, 5, 1, 2, 2, x_bits, w_bits, last, bias});
        convolution({2, 33, 6, 8, 1, 1, 0, 1, x_bits, w_bits, last, bias});
      }
  std::printf(failures ? "%d differ\n" : "all equal\n", failures);
  return failures != 0;
}
