// The element types of operands, as the bindings name them.

#pragma once

namespace encoder_fast {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

}  // namespace encoder_fast
