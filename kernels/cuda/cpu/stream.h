// Streams. Work is done when it is given, unless the stream is being captured: then it goes into a graph.
#pragma once

#include <cuda.h>

#include <functional>

namespace gpu {

using Work = std::function<CUresult()>;

// Does the work, or captures it.
CUresult give(CUstream stream, Work work);

}  // namespace gpu
