// cuda_rnn.cc: what recurrent layers on cuDNN ask CUDA's run time (csrc/aten/cudnn.h).
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "csrc/aten/cudnn.h"

namespace flagos {
namespace {

bool reseeded(c10::DeviceIndex index) {
  auto generator = at::cuda::detail::getDefaultCUDAGenerator(index);
  return at::check_generator<at::CUDAGeneratorImpl>(generator)->reset_rnn_state();
}

unsigned long long capture(c10::DeviceIndex index) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(index);
#if CUDART_VERSION >= 13000
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, &id, nullptr, nullptr, nullptr, nullptr));
#else
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo_v2(stream, &status, &id));
#endif
  return status == cudaStreamCaptureStatusNone ? 0 : id;
}

const bool installed = (set_cuda_rnn({&reseeded, &capture}), true);

}  // namespace
}  // namespace flagos
