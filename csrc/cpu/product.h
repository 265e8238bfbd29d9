// The products of dW and of float32 logits, which torch rounds to 16 bits where these do not.
#pragma once

#include <ATen/ATen.h>

namespace em_kernels::cpu {

// total (V, D) float32 = (total if add) + g (rows, V)^T @ x (rows, D), both bfloat16, without rounding
// the product to bfloat16. False, and nothing done, where that is not at hand.
bool add_product(const at::Tensor& total, const at::Tensor& g, const at::Tensor& x, bool add);

// out (N, V) float32 = x (N, D) @ w (V, D)^T, both of the same 16 bits. False as above.
bool product(const at::Tensor& out, const at::Tensor& x, const at::Tensor& w);

}  // namespace em_kernels::cpu
