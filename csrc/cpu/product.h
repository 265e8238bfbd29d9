// The product of dW, which torch rounds to bfloat16 where this does not.
#pragma once

#include <ATen/ATen.h>

namespace em_kernels::cpu {

// total (V, D) float32 = (total if add) + g (rows, V)^T @ x (rows, D), both bfloat16, without rounding
// the product to bfloat16. False, and nothing done, where that is not at hand.
bool add_product(const at::Tensor& total, const at::Tensor& g, const at::Tensor& x, bool add);

}  // namespace em_kernels::cpu
