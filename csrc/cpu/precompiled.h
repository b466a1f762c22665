// What nearly every source of the kernels includes. The build compiles it once and puts it before
// each source, which saves a fifth of the time; sources do not rely on it and name what they use.
// Without <cmath> and <functional>, which few need: each source would instantiate again what their
// inline functions call.
// No #pragma once: compilers warn of it in a file that is compiled by itself.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "core/buffer.h"
#include "cpu/simd.h"
