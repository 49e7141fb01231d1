// What candle's kernels need beside `emulator.h`: they are written for nvcc alone, and choose by __CUDA_ARCH__.
#pragma once

#include "emulator.h"

#include <cuda_fp8.h>
#include <cuda/std/limits>

// After NVIDIA's headers, which would take it for nvcc's own.
#define __CUDA_ARCH__ 800
