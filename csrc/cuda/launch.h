// A kernel's start and its shared memory: CUDA under nvcc; under a C++ compiler the same source runs on the CPU.
#pragma once

#ifdef __CUDACC__

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace alterrec::cuda {

// Starts `blocks` blocks; raises std::runtime_error where the launch was refused.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, cudaStream_t stream,
            Arguments... arguments) {
  if (blocks == 0) return;
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA launch: ") + cudaGetErrorString(error));
}

}  // namespace alterrec::cuda

#else

#include "tests/cuda_on_cpu.h"

#endif
