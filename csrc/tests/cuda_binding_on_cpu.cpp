// binding_cuda.cpp for CPU tensors, with the kernels that run on the CPU: what tests/codegen/test_cuda_on_cpu.py loads
// in place of the CPU engine's sampled_softmax.
#include <ATen/ATen.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace {

// The CPU has no streams; the binding asks for one, which the kernels here do not look at.
struct OneStream final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CPU> {
  void* getStreamNativeHandle(const c10::Stream) const override { return nullptr; }
};
const c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CPU, new OneStream);

}  // namespace

#define CUDA CPU  // the key that it registers for; all of torch's headers are behind us
#include "binding_cuda.cpp"
