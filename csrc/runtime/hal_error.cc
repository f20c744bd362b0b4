// hal_error.cc: the text of a failing HAL call and the exception type it becomes.
#include "csrc/runtime/hal_error.h"

#include <c10/util/Exception.h>

#include "csrc/runtime/fork.h"
#include "csrc/runtime/last_ops.h"

namespace flagos {
namespace {

const char* hint(flagos_status status) {
  switch (status) {
    case FLAGOS_INVALID_ARGUMENT:
      return "this is a bug in torch_fl unless you passed the value yourself";
    case FLAGOS_OUT_OF_MEMORY:
      return "free tensors or call torch.flagos.empty_cache()";
    case FLAGOS_UNAVAILABLE:
    case FLAGOS_NOT_FOUND:
      return "'python -m torch_fl doctor' shows what was looked for";
    case FLAGOS_UNSUPPORTED:
      return "this chip cannot do it";
    case FLAGOS_NOT_READY:
      return "synchronize the event or stream first";
    case FLAGOS_FAILED_PRECONDITION:
      return "the call came at the wrong moment";
    case FLAGOS_TIMEOUT:
      return "the device did not answer in time";
    case FLAGOS_DEVICE_LOST:
      return "the device is gone for this process; start a new one";
    default:
      return "'python -m torch_fl doctor' shows the chip's state";
  }
}

// Whether the cause may be work that was queued earlier.
bool may_be_late(flagos_status status) {
  return status == FLAGOS_INTERNAL || status == FLAGOS_DEVICE_LOST || status == FLAGOS_TIMEOUT;
}

}  // namespace

std::string hal_error_text(const flagos_hal* hal, const char* what, int device, flagos_status status) {
  const std::string chip_message = hal->last_message ? hal->last_message() : "";
  std::string text = std::string("flagos: ") + what + " failed";
  if (device >= 0) text += " on flagos:" + std::to_string(device);
  text += std::string(" (") + hal->name + "): " + flagos_status_name(status);
  if (!chip_message.empty()) text += " " + chip_message;
  text += std::string("; ") + hint(status);
  if (may_be_late(status)) {
    const std::string ops = last_ops_text();
    if (!ops.empty()) text += "; " + ops;
  }
  return text;
}

void throw_hal_error(const flagos_hal* hal, const char* what, int device, flagos_status status) {
  if (in_bad_fork()) throw_bad_fork();
  const std::string text = hal_error_text(hal, what, device, status);
  if (status == FLAGOS_OUT_OF_MEMORY) TORCH_CHECK_WITH(OutOfMemoryError, false, text);
  TORCH_CHECK(false, text);
}

}  // namespace flagos
