"""The differentiable ops: ``fake_quantize``, and linear and convolution over exact integer sums."""

from lsquant.kernels import Conv as Conv
from lsquant.kernels import Grid as Grid
from lsquant.kernels import swap_channels as swap_channels
from lsquant.ops.checks import require_steps as require_steps
from lsquant.ops.matmul import convolution as convolution
from lsquant.ops.matmul import linear as linear
from lsquant.ops.quantize import fake_quantize as fake_quantize
from lsquant.ops.quantize import fake_quantize_with as fake_quantize_with
from lsquant.ops.quantize import quantized as quantized
from lsquant.ops.quantize import quantized_gradients as quantized_gradients
from lsquant.ops.scale_shift import scale_shift as scale_shift
from lsquant.ops.sums import convolution_of_codes as convolution_of_codes
from lsquant.ops.sums import linear_of_codes as linear_of_codes
