// cudnn.h: what cudnn.cc asks CUDA's run time, which only libtorch_fl_cuda.so links (csrc/runtime/cuda_rnn.cc).
#pragma once

#include <c10/core/Device.h>

namespace flagos {

struct CudaRnn {
  // Whether the device's default generator was seeded since the last question.
  bool (*reseeded)(c10::DeviceIndex index);
  // The graph capture that the device's current stream is in; 0 outside of one.
  unsigned long long (*capture)(c10::DeviceIndex index);
};
void set_cuda_rnn(const CudaRnn& functions);

}  // namespace flagos
