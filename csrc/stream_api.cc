// stream_api.cc: libstream_api.so, through which FlagGems' native library asks for the stream to launch on. A library
// of its own, because that one names it as a dependency.
#include "csrc/runtime/platform.h"

// The chip's own handle of the current stream of `device`; null when there is none, also when the device does not
// exist.
extern "C" __attribute__((visibility("default"))) void* GetCurrentStream(int device) {
  try {
    if (!flagos::has_platform() || device < 0 || device >= flagos::platform().device_count()) return nullptr;
    const auto& platform = flagos::platform();
    return platform.native_handle(platform.current_stream(static_cast<c10::DeviceIndex>(device)));
  } catch (const std::exception&) {
    return nullptr;
  }
}
