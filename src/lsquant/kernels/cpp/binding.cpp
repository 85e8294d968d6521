// The ops lsquant_cpp::* on torch tensors, and the derivative of the quantizer.  No arithmetic on elements here.
//
// Every op first requires what the arithmetic relies on: whoever calls it with anything else gets an error.  Layers are
// checked in Python before, in all engines alike (lsquant/ops/checks.py), with messages that say what to do.
#include <ATen/core/Tensor.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/div.h>
#include <ATen/ops/round.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "common.h"
#include "products.h"

namespace lsquant {
namespace {

using at::Tensor;
using std::optional;
using Tensors = std::tuple<Tensor, Tensor, Tensor>;

Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return Type::f32;
    case at::kBFloat16: return Type::bf16;
    case at::kHalf: return Type::f16;
    default: TORCH_CHECK(false, "lsquant: dtype ", t.scalar_type(), " is not float32, bfloat16 or float16");
  }
}

// ---- what the arithmetic relies on ----

constexpr int64_t LARGEST_CODE = int64_t(1) << 22, LARGEST_NUMBER = int64_t(1) << 30;
constexpr double LARGEST_BUFFER = double(int64_t(1) << 40), SUM_LIMIT = double(int64_t(1) << 30);

// all elements lie in the tensor's memory, which may have been taken away or made smaller under it
void require_memory(const Tensor& t, const char* name) {
  if (!t.numel()) return;
  int64_t last = t.storage_offset();
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  TORCH_CHECK((last + 1) * int64_t(t.element_size()) <= int64_t(t.storage().nbytes()), "lsquant: ", name, " of shape ", t.sizes(),
              " reaches beyond its memory, which was freed or made smaller");
}

void require_values(const Tensor& t, const char* name) {
  type_of(t);
  require_memory(t, name);
}

// steps, offsets and constants: 1-D float32
void require_floats(const Tensor& t, int64_t count, const char* name) {
  TORCH_CHECK(t.dim() == 1 && t.scalar_type() == at::kFloat, "lsquant: ", name, " must be 1-D float32, got ", t.scalar_type(),
              " of shape ", t.sizes());
  TORCH_CHECK(t.numel() == count, "lsquant: ", name, " has ", t.numel(), " elements, ", count, " are needed here");
  require_memory(t, name);
}

void require_bounds(int64_t q_min, int64_t q_max) {
  TORCH_CHECK(-LARGEST_CODE <= q_min && q_min <= q_max && q_max <= LARGEST_CODE, "lsquant: codes from ", q_min, " to ", q_max,
              "; bounds must be in order and within 2^22");
}

void require_numbers(at::IntArrayRef numbers, int64_t least, const char* name) {
  TORCH_CHECK(numbers.size() == 2, "lsquant: ", name, "=", numbers, "; two numbers are needed");
  for (int64_t v : numbers)
    TORCH_CHECK(least <= v && v <= LARGEST_NUMBER, "lsquant: ", name, "=", numbers, "; each must be ", least, " or more, up to 2^30");
}

int64_t steps_needed(const Tensor& x, optional<int64_t> axis, optional<int64_t> group_size) {
  if (group_size) {
    int64_t row = 1;
    for (int64_t d = 1; d < x.dim(); ++d) row *= x.size(d);
    TORCH_CHECK(!axis || *axis == 0 || *axis == -x.dim(), "lsquant: axis=", *axis, " with group_size; groups lie within axis 0");
    TORCH_CHECK(*group_size >= 1 && row % *group_size == 0, "lsquant: group_size=", *group_size, " does not divide the ", row,
                " elements of a row of ", x.sizes());
    return x.numel() / *group_size;
  }
  if (!axis) return 1;
  TORCH_CHECK(-x.dim() <= *axis && *axis < x.dim(), "lsquant: axis=", *axis, " is outside an input of shape ", x.sizes());
  return x.size(*axis);
}

// the same values in the strides that empty_like gives: dense, and those of t where t is dense
Tensor dense(const Tensor& t, bool rows) {
  if (rows ? t.is_contiguous() : t.is_non_overlapping_and_dense()) return t;
  return rows ? t.contiguous() : at::empty_like(t).copy_(t);
}

// where the elements of a dense tensor have their step; groups are along the row-major order
Layout layout_of(const Tensor& x, int64_t steps, optional<int64_t> axis, optional<int64_t> group_size) {
  if (group_size) return {1, steps, *group_size};
  if (!axis || x.dim() == 0) return {1, 1, x.numel()};
  const int64_t a = *axis < 0 ? *axis + x.dim() : *axis;
  Layout l{1, x.size(a), 1};
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (d == a || x.size(d) == 1) continue;
    const bool before = x.stride(d) > x.stride(a) || (x.stride(d) == x.stride(a) && (x.size(a) > 1 || d < a));
    (before ? l.outer : l.inner) *= x.size(d);
  }
  return l;
}

struct Quantizer {
  Tensor step, zero;
  Grid grid;
  Quantizer(const Tensor& s, int64_t q_min, int64_t q_max, int64_t fixed, const optional<Tensor>& zero_point,
            const optional<Tensor>& offset)
      : step(s.contiguous()) {
    if (offset)
      zero = at::clamp(at::round(at::div(*offset, step).neg_()), q_min, q_max).contiguous();
    else if (zero_point)
      zero = zero_point->to(at::kFloat).contiguous();
    else
      zero = at::full(step.sizes(), double(fixed), step.options());
    grid = {step.const_data_ptr<float>(), zero.const_data_ptr<float>(), float(q_min), float(q_max), offset.has_value()};
  }
};

#define QUANTIZER_ARGUMENTS                                                                                      \
  const Tensor &x, const Tensor &step, int64_t q_min, int64_t q_max, double scale, optional<int64_t> axis,       \
      optional<int64_t> group_size, int64_t fixed_zero, const optional<Tensor>&zero_point,                      \
      const optional<Tensor>&offset
#define QUANTIZER_PASSED x, step, q_min, q_max, scale, axis, group_size, fixed_zero, zero_point, offset

void require_quantizer(QUANTIZER_ARGUMENTS) {
  require_values(x, "x");
  const int64_t steps = steps_needed(x, axis, group_size);
  require_floats(step, steps, "step");
  require_bounds(q_min, q_max);
  TORCH_CHECK(!zero_point || !offset, "lsquant: give zero_point or offset, not both");
  if (offset) require_floats(*offset, steps, "offset");
  if (!zero_point) return;
  TORCH_CHECK(zero_point->dim() == 1 && zero_point->numel() == steps && !zero_point->is_complex(), "lsquant: zero_point must be 1-D, ",
              steps, " numbers like step, got ", zero_point->scalar_type(), " of shape ", zero_point->sizes());
  require_memory(*zero_point, "zero_point");
}

Tensor quantize_cpu(QUANTIZER_ARGUMENTS) {
  require_quantizer(QUANTIZER_PASSED);
  const Quantizer q(step, q_min, q_max, fixed_zero, zero_point, offset);
  const Tensor from = dense(x, group_size.has_value());
  Tensor y = at::empty_like(from);
  quantize(type_of(x), from.const_data_ptr(), y.mutable_data_ptr(), layout_of(from, step.numel(), axis, group_size), q.grid);
  return group_size && !x.is_contiguous() ? at::empty_like(x).copy_(y) : y;
}

// fl(fl(x alpha) + beta) with a constant of each per channel, dimension 1
Tensor scale_shift_cpu(const Tensor& x, const Tensor& alpha, const Tensor& beta) {
  require_values(x, "x");
  TORCH_CHECK(x.dim() >= 2, "lsquant: x of shape ", x.sizes(), " has no channels, dimension 1");
  require_floats(alpha, x.size(1), "alpha"), require_floats(beta, x.size(1), "beta");
  const Tensor from = dense(x, false), a = alpha.contiguous(), b = beta.contiguous();
  Tensor y = at::empty_like(from);
  scale_shift(type_of(x), from.const_data_ptr(), y.mutable_data_ptr(), layout_of(from, a.numel(), 1, std::nullopt),
              a.const_data_ptr<float>(), b.const_data_ptr<float>());
  return y;
}

// grad may be float32 where x is not; `reuse`: its memory becomes the input's gradient if it can
Tensors backward_of(const Tensor& grad, QUANTIZER_ARGUMENTS, bool reuse) {
  require_quantizer(QUANTIZER_PASSED);
  TORCH_CHECK(grad.sizes() == x.sizes() && grad.is_floating_point(), "lsquant: grad must be floating point in the shape of x, ",
              x.sizes(), ", got ", grad.scalar_type(), " of shape ", grad.sizes());
  require_memory(grad, "grad");
  const Quantizer q(step, q_min, q_max, fixed_zero, zero_point, offset);
  const bool rows = group_size.has_value();
  const Tensor from = dense(x, rows);
  Tensor up = grad;
  if (up.scalar_type() != x.scalar_type()) up = up.to(at::kFloat);
  if (up.strides() != from.strides()) up = at::empty_like(from, up.options()).copy_(up), reuse = true;
  Tensor to = reuse && up.scalar_type() == x.scalar_type() ? up : at::empty_like(from);
  const Layout l = layout_of(from, step.numel(), axis, group_size);
  std::vector<double> sums(2 * l.steps);
  quantize_backward(type_of(up), up.const_data_ptr(), type_of(x), from.const_data_ptr(), type_of(to), to.mutable_data_ptr(), l,
                    q.grid, sums.data(), sums.data() + l.steps);
  Tensor by_step = at::empty({l.steps}, step.options()), by_offset = at::empty({offset ? l.steps : 0}, step.options());
  for (int64_t i = 0; i < l.steps; ++i) {
    by_step.mutable_data_ptr<float>()[i] = float(sums[i] * scale);
    if (offset) by_offset.mutable_data_ptr<float>()[i] = float(sums[l.steps + i] * scale);
  }
  return {rows && !x.is_contiguous() ? at::empty_like(x).copy_(to) : to, by_step, by_offset};
}

Tensors quantize_backward_cpu(const Tensor& grad, QUANTIZER_ARGUMENTS) {
  return backward_of(grad, QUANTIZER_PASSED, false);
}

Tensors quantize_backward_reusing(const Tensor& grad, QUANTIZER_ARGUMENTS) {
  return backward_of(grad, QUANTIZER_PASSED, true);
}

// ---- layers ----

#define INPUT_ARGUMENTS const Tensor &x, const Tensor &x_step, const optional<Tensor>&x_offset, int64_t x_min, int64_t x_max
#define INPUT_SCHEMA "Tensor x, Tensor x_step, Tensor? x_offset, int x_min, int x_max"

InputGrid input_grid(const Tensor& step, const optional<Tensor>& offset, int64_t q_min, int64_t q_max) {
  const Quantizer q(step, q_min, q_max, 0, std::nullopt, offset);
  return {q.grid.step[0], q.grid.zero[0], float(q_min), float(q_max)};
}

#define INPUT_PASSED x, x_step, x_offset, x_min, x_max

void require_input(INPUT_ARGUMENTS) {
  require_values(x, "x");
  TORCH_CHECK(x.numel(), "lsquant: x of shape ", x.sizes(), " is empty");
  require_floats(x_step, 1, "x_step");
  if (x_offset) require_floats(*x_offset, 1, "x_offset");
  require_bounds(x_min, x_max);
  TORCH_CHECK(x_max - x_min < 256, "lsquant: codes of x from ", x_min, " to ", x_max, " do not fit 8 bits");
}

// x by channel and weight (out, channels, ...) of `dims` dimensions
void require_product(INPUT_ARGUMENTS, const Tensor& weight, int64_t dims, int64_t channels, const Tensor& w_step, int64_t w_min,
                     int64_t w_max, const optional<Tensor>& bias) {
  require_input(INPUT_PASSED);
  require_values(weight, "weight");
  TORCH_CHECK(weight.dim() == dims && weight.numel() && weight.size(1) == channels, "lsquant: weight of shape ", weight.sizes(),
              " does not fit x of shape ", x.sizes());
  const int64_t out = weight.size(0);
  require_floats(w_step, w_step.numel() == 1 ? 1 : out, "w_step");
  require_bounds(w_min, w_max);
  TORCH_CHECK(-128 <= w_min && w_max <= 127, "lsquant: codes of the weight from ", w_min, " to ", w_max, " are no int8");
  TORCH_CHECK(double(weight.numel() / out) * double((x_max - x_min) * std::max(-w_min, w_max)) < SUM_LIMIT,
              "lsquant: sums of ", weight.numel() / out, " products may leave int32");
  if (!bias) return;
  TORCH_CHECK(bias->dim() == 1 && bias->numel() == out && bias->is_floating_point(), "lsquant: bias must be floating point, one number "
              "for each of ", out, " outputs, got ", bias->scalar_type(), " of shape ", bias->sizes());
  require_memory(*bias, "bias");
}

struct Geometry {
  Tensor x;
  Shape shape;
};

// a batch of images as it lies, channels last or first
Geometry geometry(const Tensor& input, int64_t kernel_h, int64_t kernel_w, at::IntArrayRef stride, at::IntArrayRef padding,
                  at::IntArrayRef dilation) {
  require_numbers(stride, 1, "stride"), require_numbers(dilation, 1, "dilation"), require_numbers(padding, 0, "padding");
  const bool last = input.is_contiguous(at::MemoryFormat::ChannelsLast) && !input.is_contiguous();
  Geometry g{last ? input : input.contiguous(), {}};
  Shape& s = g.shape;
  s.n = input.size(0), s.c = input.size(1), s.h = input.size(2), s.w = input.size(3);
  s.kernel_h = kernel_h, s.kernel_w = kernel_w, s.stride_h = stride[0], s.stride_w = stride[1];
  s.pad_h = padding[0], s.pad_w = padding[1], s.dilation_h = dilation[0], s.dilation_w = dilation[1];
  const int64_t height = s.h + 2 * s.pad_h, width = s.w + 2 * s.pad_w;
  const int64_t window_h = s.dilation_h * (kernel_h - 1) + 1, window_w = s.dilation_w * (kernel_w - 1) + 1;
  TORCH_CHECK(window_h <= height && window_w <= width, "lsquant: padded input size per channel: (", height, " x ", width,
              "). Kernel size: (", window_h, " x ", window_w, "). Kernel size can't be greater than actual input size");
  TORCH_CHECK(double(height) * double(width) * double(s.c + 8) < LARGEST_BUFFER, "lsquant: a padded image of ", height, " x ", width,
              " is too large");
  s.out_h = (height - window_h) / s.stride_h + 1;
  s.out_w = (width - window_w) / s.stride_w + 1;
  s.channels_last = last;
  return g;
}

struct Product {
  Packed packed;
  Tensor scale, bias;
  const float* bias_data;
  Product(const Tensor& weight, int64_t taps, const Tensor& w_step, int64_t w_min, int64_t w_max, const Tensor& x_step,
          int64_t x_range, const optional<Tensor>& b)
      : packed(weight.size(0), taps, weight.size(1), x_range, w_min, w_max), scale(at::mul(x_step, w_step).contiguous()),
        bias(b ? b->to(at::kFloat).contiguous() : Tensor()), bias_data(b ? bias.const_data_ptr<float>() : nullptr) {
    const Tensor step = w_step.contiguous();
    pack(type_of(weight), weight.const_data_ptr(), {step.const_data_ptr<float>(), step.numel(), w_min, w_max}, packed);
  }
};

// y of a 2-d convolution without groups, float32, in the input's memory format
Tensor convolution_cpu(INPUT_ARGUMENTS, const Tensor& weight, const Tensor& w_step, int64_t w_min, int64_t w_max,
                       const optional<Tensor>& bias, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  TORCH_CHECK(x.dim() == 4, "lsquant: x of shape ", x.sizes(), " is no batch of images");
  require_product(INPUT_PASSED, weight, 4, x.size(1), w_step, w_min, w_max, bias);
  Geometry g = geometry(x, weight.size(2), weight.size(3), stride, padding, dilation);
  const Tensor rows = weight.contiguous(at::MemoryFormat::ChannelsLast);
  const Product p(rows, weight.size(2) * weight.size(3), w_step, w_min, w_max, x_step, x_max - x_min, bias);
  g.shape.scales = p.scale.numel();
  Tensor y = at::empty({g.shape.n, weight.size(0), g.shape.out_h, g.shape.out_w}, x.options().dtype(at::kFloat),
                       g.shape.channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  forward(type_of(x), g.x.const_data_ptr(), g.shape, input_grid(x_step, x_offset, x_min, x_max), p.packed,
          p.scale.const_data_ptr<float>(), p.bias_data, y.mutable_data_ptr<float>());
  return y;
}

Tensor linear_cpu(INPUT_ARGUMENTS, const Tensor& weight, const Tensor& w_step, int64_t w_min, int64_t w_max,
                  const optional<Tensor>& bias) {
  constexpr int64_t ROWS = 32;  // of the input, a block that stays in the cache
  TORCH_CHECK(x.dim() >= 1, "lsquant: x has no dimension");
  require_product(INPUT_PASSED, weight, 2, x.size(-1), w_step, w_min, w_max, bias);
  const Tensor from = x.contiguous(), rows = weight.contiguous();
  const int64_t in = weight.size(1), out = weight.size(0), count = from.numel() / in;
  const Product p(rows, 1, w_step, w_min, w_max, x_step, x_max - x_min, bias);
  auto sizes = x.sizes().vec();
  sizes.back() = out;
  Tensor y = at::empty(sizes, x.options().dtype(at::kFloat));
  const InputGrid q = input_grid(x_step, x_offset, x_min, x_max);
  auto block = [&](int64_t first, int64_t n, int64_t w) {
    const Shape s{n, in, 1, w, 1, 1, 1, 1, 0, 0, 1, 1, 1, w, p.scale.numel(), true};
    forward(type_of(x), static_cast<const char*>(from.const_data_ptr()) + first * in * from.element_size(), s, q, p.packed,
            p.scale.const_data_ptr<float>(), p.bias_data, y.mutable_data_ptr<float>() + first * out);
  };
  const int64_t whole = count / ROWS, rest = count % ROWS;
  if (whole) block(0, whole, ROWS);
  if (rest) block(whole * ROWS, 1, rest);
  return y;
}

// sum over windows of grad * x_hat: (out, in, kernel) float32, channels last
Tensor weight_gradient_cpu(const Tensor& grad, INPUT_ARGUMENTS, at::IntArrayRef kernel, at::IntArrayRef stride,
                           at::IntArrayRef padding, at::IntArrayRef dilation) {
  require_input(INPUT_PASSED);
  TORCH_CHECK(x.dim() == 4, "lsquant: x of shape ", x.sizes(), " is no batch of images");
  require_numbers(kernel, 1, "kernel");
  const Geometry g = geometry(x, kernel[0], kernel[1], stride, padding, dilation);
  TORCH_CHECK(grad.dim() == 4 && grad.numel() && grad.is_floating_point() && grad.size(0) == g.shape.n && grad.size(2) == g.shape.out_h &&
              grad.size(3) == g.shape.out_w, "lsquant: grad of shape ", grad.sizes(), " is not that of the output for x of shape ", x.sizes());
  require_memory(grad, "grad");
  const auto format = g.shape.channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const Tensor up = grad.to(at::kFloat).contiguous(format);
  Tensor to = at::empty({grad.size(1), x.size(1), kernel[0], kernel[1]}, up.options(), at::MemoryFormat::ChannelsLast);
  weight_gradient(type_of(x), g.x.const_data_ptr(), up.const_data_ptr<float>(), g.shape, grad.size(1),
                  input_grid(x_step, x_offset, x_min, x_max), to.mutable_data_ptr<float>());
  return to;
}

// the input's gradient of a 3x3 convolution, channels last: (n, in, h, w) float32
Tensor input_gradient_cpu(const Tensor& grad, const Tensor& weight, at::IntArrayRef size, at::IntArrayRef padding) {
  const auto format = at::MemoryFormat::ChannelsLast;
  require_numbers(padding, 0, "padding");
  TORCH_CHECK(size.size() == 4 && grad.dim() == 4 && weight.dim() == 4, "lsquant: grad ", grad.sizes(), ", weight ", weight.sizes(),
              " and input ", size, " must each have 4 dimensions");
  const int64_t out = weight.size(0);
  TORCH_CHECK(out > 0 && out % 8 == 0 && weight.size(2) == 3 && weight.size(3) == 3 && weight.scalar_type() == at::kFloat, "lsquant: ",
              "weight must be (a multiple of 8, in, 3, 3) float32, got ", weight.scalar_type(), " of shape ", weight.sizes());
  for (int64_t d = 0; d < 4; ++d) TORCH_CHECK(size[d] > 0 && size[d] <= LARGEST_NUMBER, "lsquant: an input of shape ", size);
  TORCH_CHECK(padding[0] <= 2 && padding[1] <= 2, "lsquant: padding=", padding, " is more than 2");
  TORCH_CHECK(grad.is_floating_point() && grad.size(0) == size[0] && grad.size(1) == out && weight.size(1) == size[1] && grad.numel() &&
              grad.size(2) == size[2] + 2 * padding[0] - 2 && grad.size(3) == size[3] + 2 * padding[1] - 2, "lsquant: grad ",
              grad.sizes(), ", weight ", weight.sizes(), " and input ", size, " do not fit each other");
  require_memory(grad, "grad"), require_memory(weight, "weight");
  const Tensor up = grad.to(at::kFloat).contiguous(format), rows = weight.contiguous(format);
  Tensor to = at::empty(size, up.options(), format);
  Shape s{};
  s.n = size[0], s.c = size[1], s.h = size[2], s.w = size[3], s.out_h = grad.size(2), s.out_w = grad.size(3);
  s.pad_h = padding[0], s.pad_w = padding[1];
  input_gradient(up.const_data_ptr<float>(), rows.const_data_ptr<float>(), s, grad.size(1), to.mutable_data_ptr<float>());
  return to;
}

// ---- the derivative ----

template <class F>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

Tensor quantize_op(QUANTIZER_ARGUMENTS) {
  static const auto call = op<decltype(quantize_cpu)>("lsquant_cpp::fake_quantize");
  return call.call(QUANTIZER_PASSED);
}

Tensors quantize_backward_op(const Tensor& grad, QUANTIZER_ARGUMENTS) {
  static const auto call = op<decltype(quantize_backward_cpu)>("lsquant_cpp::fake_quantize_backward");
  return call.call(grad, QUANTIZER_PASSED);
}

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

struct FakeQuantize : torch::autograd::Function<FakeQuantize> {
  static Variable forward(AutogradContext* ctx, QUANTIZER_ARGUMENTS) {
    ctx->save_for_backward({x, step, zero_point.value_or(Tensor()), offset.value_or(Tensor())});
    ctx->saved_data["numbers"] = std::vector<int64_t>{q_min, q_max, axis.value_or(0), group_size.value_or(0), fixed_zero};
    ctx->saved_data["present"] = std::vector<int64_t>{axis.has_value(), group_size.has_value()};
    ctx->saved_data["scale"] = scale;
    at::AutoDispatchBelowADInplaceOrView guard;
    return quantize_op(QUANTIZER_PASSED);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto n = ctx->saved_data["numbers"].toIntVector(), present = ctx->saved_data["present"].toIntVector();
    auto given = [](const Tensor& t) { return t.defined() ? optional<Tensor>(t) : std::nullopt; };
    auto number = [](bool there, int64_t v) { return there ? optional<int64_t>(v) : std::nullopt; };
    auto [by_x, by_step, by_offset] = quantize_backward_op(
        grads[0], saved[0], saved[1], n[0], n[1], ctx->saved_data["scale"].toDouble(), number(present[0], n[2]),
        number(present[1], n[3]), n[4], given(saved[2]), given(saved[3]));
    variable_list out(10);
    out[0] = by_x;
    out[1] = by_step;
    if (saved[3].defined()) out[9] = by_offset;
    return out;
  }
};

Tensor quantize_autograd(QUANTIZER_ARGUMENTS) { return FakeQuantize::apply(QUANTIZER_PASSED); }

// there is no second derivative: the backward op's own derivative says so
struct Refused : torch::autograd::Function<Refused> {
  static variable_list forward(AutogradContext*, const Tensor& grad, QUANTIZER_ARGUMENTS) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [a, b, c] = quantize_backward_op(grad, QUANTIZER_PASSED);
    return {a, b, c};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "lsquant defines no second derivative: round() has none. Call backward() without "
                       "create_graph=True, or switch the quantizers off with lsquant.disabled(model)");
  }
};

Tensors quantize_backward_autograd(const Tensor& grad, QUANTIZER_ARGUMENTS) {
  if (!at::GradMode::is_enabled()) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return quantize_backward_op(grad, QUANTIZER_PASSED);
  }
  auto out = Refused::apply(grad, QUANTIZER_PASSED);
  return {out[0], out[1], out[2]};
}

}  // namespace

#define QUANTIZER_SCHEMA                                                                                \
  "Tensor x, Tensor step, int q_min, int q_max, float gradient_scale, int? axis, int? group_size, int " \
  "fixed_zero, Tensor? zero_point, Tensor? offset"

TORCH_LIBRARY(lsquant_cpp, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("fake_quantize(" QUANTIZER_SCHEMA ") -> Tensor", tags);
  m.def("fake_quantize_backward(Tensor grad, " QUANTIZER_SCHEMA ") -> (Tensor, Tensor, Tensor)", tags);
  m.def("fake_quantize_backward_reusing(Tensor grad, " QUANTIZER_SCHEMA ") -> (Tensor, Tensor, Tensor)");
  m.def("scale_shift(Tensor x, Tensor alpha, Tensor beta) -> Tensor");
  m.def("convolution(" INPUT_SCHEMA ", Tensor weight, Tensor w_step, int w_min, int w_max, Tensor? bias, int[] stride, "
        "int[] padding, int[] dilation) -> Tensor");
  m.def("linear(" INPUT_SCHEMA ", Tensor weight, Tensor w_step, int w_min, int w_max, Tensor? bias) -> Tensor");
  m.def("input_gradient(Tensor grad, Tensor weight, int[] size, int[] padding) -> Tensor");
  m.def("weight_gradient(Tensor grad, " INPUT_SCHEMA ", int[] kernel, int[] stride, int[] padding, int[] dilation) -> Tensor");
}

TORCH_LIBRARY_IMPL(lsquant_cpp, CPU, m) {
  m.impl("fake_quantize", quantize_cpu);
  m.impl("fake_quantize_backward", quantize_backward_cpu);
  m.impl("fake_quantize_backward_reusing", quantize_backward_reusing);
  m.impl("scale_shift", scale_shift_cpu);
  m.impl("convolution", convolution_cpu);
  m.impl("linear", linear_cpu);
  m.impl("weight_gradient", weight_gradient_cpu);
  m.impl("input_gradient", input_gradient_cpu);
}

TORCH_LIBRARY_IMPL(lsquant_cpp, AutogradCPU, m) {
  m.impl("fake_quantize", quantize_autograd);
  m.impl("fake_quantize_backward", quantize_backward_autograd);
}

}  // namespace lsquant
