// copy.h: the copy and fill entries of the host chip's table (flagos.h says what each does).
#ifndef FLAGOS_HOST_COPY_H_
#define FLAGOS_HOST_COPY_H_

#include "flagos.h"

namespace flagos {
namespace host {

flagos_status copy_async(int32_t device, void* dst, const void* src, uint64_t n, int32_t kind, flagos_stream stream);
flagos_status copy2d_async(int32_t device, void* dst, uint64_t dst_pitch, const void* src, uint64_t src_pitch,
                           uint64_t width, uint64_t height, int32_t kind, flagos_stream stream);
flagos_status fill_async(int32_t device, void* dst, int32_t byte_value, uint64_t n, flagos_stream stream);

}  // namespace host
}  // namespace flagos
#endif  // FLAGOS_HOST_COPY_H_
